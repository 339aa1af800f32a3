"""Static analysis of compiled GPU kernels, and the budgets that the tests hold them to.

reading reads machine code; multiprocessors has the limits of the hardware; triton_budget and
cuda_budget compile the kernels, and budget compares them with the limits in their JSON files.
"""
