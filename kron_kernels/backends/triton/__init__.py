"""Triton kernels for GPUs. ``launch`` has the backend's functions, ``configs`` chooses tiles."""
