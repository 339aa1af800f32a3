"""Which calls the Triton kernels can run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from kron_kernels.backends import gpu
from kron_kernels.backends.gpu import constant, dtype_why_not
from kron_kernels.backends.triton.configs import geometry
from kron_kernels.shapes import KronShape

# 3.4, the Triton of torch 2.8, merges accumulators of a loop: the factors' gradients are wrong, and
# products of several tiles too; compilation fails if the mix is frozen.
OLDEST = "3.5"
# Up to 3.6, the Triton of torch 2.11, the pipeliner fails where the mix comes first.
OLDEST_SM_100 = "3.7"

_INT32 = 2**31  # factors are addressed in 32 bits, tokens in 64


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """Why these kernels cannot run this call, as the end of a sentence, or None."""
    if reason := _why_not_on(x):
        return reason
    if len(factors) != 2:
        return f"it multiplies by two factors, and there are {len(factors)}"
    if max(f.numel() for f in factors) >= _INT32:
        return "a factor has 2^31 entries or more"
    return _no_geometry(*KronShape.of(*factors))


@constant
def _no_geometry(*sizes: int) -> str | None:
    s = KronShape(*sizes)
    if geometry(s) is not None:
        return None
    if s.rank > 16:
        return f"it sums up to 16 products, and the Kronecker rank is {s.rank}"
    return (
        f"both factors are large ({s.m1}x{s.n1} and {s.m2}x{s.n2}), "
        "and two large matrix products need no special kernel"
    )


def why_not_embedding(a: Tensor, b: Tensor) -> str | None:
    """Why the lookup's kernel cannot read this table, as the end of a sentence, or None."""
    if b.shape[2] > 1024:
        return f"it takes rows b of up to 1024 entries, and this one has {b.shape[2]}"
    return _why_not_on(a)


def _why_not_on(x: Tensor) -> str | None:
    if not gpu.on_gpu(x):
        return f"it runs on GPUs, and x is on {x.device}"
    return _without_triton() or _too_old(x.device.index) or dtype_why_not(x.dtype)


@constant
def _without_triton() -> str | None:
    return why_no_triton()


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    """Why there is no Triton that compiles these kernels correctly, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    found = getattr(triton, "__version__", None)
    if found is None:  # a folder with this name, such as one of models to be served
        return f"the imported triton is not a package ({triton!r}); pip install triton"
    return _older_than(found, OLDEST)


@lru_cache(maxsize=4)
def _older_than(installed: str, needed: str) -> str | None:
    if TorchVersion(installed) >= needed:
        return None
    return f"it needs Triton {needed} or later, and {installed} is installed; pip install -U triton"


@constant
def _too_old(index: int) -> str | None:
    if torch.version.hip:
        return None
    major, _ = gpu.capability(index)
    if major < 8:
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(index)} is older"
    if major == 10:
        import triton

        return _older_than(triton.__version__, OLDEST_SM_100)
    return None
