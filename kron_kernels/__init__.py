"""Kronecker-factorised layers: ``(A ⊗ B) x`` without forming ``A ⊗ B``."""

from kron_kernels.decompose import nearest_kronecker, nearest_kronecker_sum
from kron_kernels.dispatch import explain_backends
from kron_kernels.factorise import densify_, factorise_
from kron_kernels.functional import kron_feed_forward, kron_matmul, kron_qkv
from kron_kernels.int8 import Int8Factor
from kron_kernels.nn import KroneckerEmbedding, KroneckerFeedForward, KroneckerLinear, KroneckerSum
from kron_kernels.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
    dequantize_,
    quantize_,
)
from kron_kernels.shapes import KronShape

__version__ = "0.1.0"
__all__ = [
    "Int8Factor",
    "KronShape",
    "KroneckerEmbedding",
    "KroneckerFeedForward",
    "KroneckerLinear",
    "KroneckerSum",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSum",
    "densify_",
    "dequantize_",
    "explain_backends",
    "factorise_",
    "kron_feed_forward",
    "kron_matmul",
    "kron_qkv",
    "nearest_kronecker",
    "nearest_kronecker_sum",
    "quantize_",
]
