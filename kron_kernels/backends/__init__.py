"""Backends by name. The compiled ones have the same functions: see ``ops`` for what each does."""

from kron_kernels.backends import cuda, native
from kron_kernels.backends.triton import launch

COMPILED = {"native": native, "triton": launch, "cuda": cuda}
