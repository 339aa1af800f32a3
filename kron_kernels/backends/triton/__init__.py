"""Triton kernels for GPUs: ``launch`` calls them, with the tiles that ``configs`` chooses."""
