"""Kronecker-factorised layers: ``(A ⊗ B) x`` without forming ``A ⊗ B``."""

from kron_kernels.decompose import nearest_kronecker
from kron_kernels.dispatch import explain_backends
from kron_kernels.functional import kron_matmul
from kron_kernels.nn import KroneckerEmbedding, KroneckerLinear
from kron_kernels.shapes import KronShape

__version__ = "0.1.0"
__all__ = [
    "KronShape",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "explain_backends",
    "kron_matmul",
    "nearest_kronecker",
]
