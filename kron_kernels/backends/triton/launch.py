"""Triton kernels on GPUs: what they serve, and their launches.

Triton is imported with the first call. Nothing here waits for the GPU or looks at its results, so
that a call can be captured in a CUDA graph once it has run outside of one and been compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from kron_kernels.backends.gpu import DTYPES, constant, precision
from kron_kernels.backends.triton import configs as triton_launch
from kron_kernels.backends.triton.configs import Geometry, Tile, device_of, geometry, power_of_two
from kron_kernels.checks import Activation, Layer
from kron_kernels.shapes import KronShape

# 3.4 merges two sums that a loop carries, so that the factors' gradients are wrong, and stops with
# an error if the mix is frozen.
OLDEST = "3.5"
# Up to 3.6, the Triton of torch 2.11, the pipeliner fails where a mix comes first.
OLDEST_SM_100 = "3.7"

_INT32 = 2**31  # factors are addressed in 32 bits, tokens in 64


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """Why these kernels cannot serve this call, as the end of a sentence, or None."""
    if reason := _unserved(x):
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
        "and two large matrix products need no kernel of ours"
    )


def why_not_embedding(a: Tensor, b: Tensor) -> str | None:
    """Why the lookup's kernel cannot serve this table, as the end of a sentence, or None."""
    if b.shape[2] > 1024:
        return f"it takes rows b of up to 1024 entries, and this one has {b.shape[2]}"
    return _unserved(a)


def _unserved(x: Tensor) -> str | None:
    if not (x.is_cuda or (triton_launch.simulating and x.device.type == "cpu")):
        return f"it runs on GPUs, and x is on {x.device}"
    if reason := _without_triton():
        return reason
    if x.is_cuda and (reason := _too_old(x.device.index)):
        return reason
    if x.dtype not in DTYPES:
        return f"it has kernels for {', '.join(str(d)[6:] for d in DTYPES)}, and x is {x.dtype}"
    return None


@constant
def _without_triton() -> str | None:
    return why_no_triton()


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    """Why there is no Triton that compiles these kernels right, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    found = getattr(triton, "__version__", None)
    if found is None:  # a folder of this name, such as one of models to be served
        return f"what is imported as triton is no package ({triton!r}); pip install triton"
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
    if _capability(index) < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(index)} is older"
    if _capability(index)[0] == 10:
        import triton

        return _older_than(triton.__version__, OLDEST_SM_100)
    return None


_capability = lru_cache(maxsize=64)(torch.cuda.get_device_capability)


def on_device(x: Tensor):
    """A context in which x's GPU is the current one, as Triton's launches want it."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def sizes(g: Geometry) -> dict[str, int | bool]:
    """A kernel's constants that say what is multiplied."""
    return {
        "RANK": g.rank, "O": g.O, "U": g.U, "N": g.N, "K": g.K, "INNER": g.inner,
        "O_": power_of_two(g.O), "U_": power_of_two(g.U), "BY_DOT": g.by_dot,
    }  # fmt: skip


def describe(x: Tensor, *factors: Tensor) -> str:
    """How the kernel computes this product, in words."""
    g = _geometry(KronShape.of(*factors))
    t = triton_launch.tile(
        g, prod(x.shape[:-1]), x.dtype, precision(x.dtype) == "ieee", device_of(x)
    )
    mixed, product = ("B", "A") if g.inner else ("A", "B")
    how = "on tensor cores" if g.by_dot else "in registers"
    first, then = f"{mixed} {how}", f"{product} on tensor cores"
    if not g.mix_first:
        first, then = then, first
    return f"{first}, then {then}; {t.tokens} tokens a program, {t.warps} warps"


def _geometry(s: KronShape) -> Geometry:
    """The geometry of a product that ``why_not`` does not refuse."""
    g = geometry(s)
    assert g is not None
    return g


def kron_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (T, n)`` and two factors."""
    a, b = factors
    return _products(x, [(a, b, bias)], activation, residual)[0]


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of each ``(a, b, bias)``; x ``(T, n)`` is read once, where that pays.

    It does where the large factors are small: a program that does all products has room for fewer
    tokens, and so reads the factors more often. In bytes moved for a token of KroneckerBERT's
    width: 21x 15 KB together, 17 KB apart; 8x 61 KB together (by calculation), 37 KB apart.
    """
    a, b, _ = layers[0]
    alike = all(
        (f.shape, f.stride()) == (g.shape, g.stride())
        for layer in layers[1:]
        for f, g in zip(layer[:2], (a, b), strict=True)
    )
    if alike and max(a.numel(), b.numel()) * x.element_size() <= 2**16:
        return _products(x, layers)
    return [kron_matmul(x, layer[:2], layer[2]) for layer in layers]


def _products(
    x: Tensor,
    layers: Sequence[Layer],
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Products of one x with factors of equal shapes and strides, in one launch."""
    from kron_kernels.backends.triton.forward import kron_matmul_kernel

    x = x.contiguous()
    tokens = x.shape[0]
    s = KronShape.of(*layers[0][:2])
    ys = tuple(x.new_empty(tokens, s.out_features) for _ in layers)
    if tokens == 0:
        return list(ys)
    g = _geometry(s)
    side = 1 if g.inner else 0
    mixes = tuple(layer[:2][side] for layer in layers)
    dots = tuple(layer[:2][1 - side] for layer in layers)
    biases = tuple(None if bias is None else bias.contiguous() for *_, bias in layers)
    residual = None if residual is None else residual.contiguous()
    how = precision(x.dtype)
    t = triton_launch.tile(g, tokens, x.dtype, how == "ieee", device_of(x), len(layers))
    grid = -(-tokens // t.tokens), -(-g.N // (t.columns * t.tiles))
    with on_device(x):
        kron_matmul_kernel[grid](
            x, mixes, dots, biases, residual, ys, tokens,
            *mixes[0].stride(), *dots[0].stride(),
            **sizes(g), MIX_FIRST=g.mix_first, ACTIVATION=activation, PRECISION=how,
            BT=t.tokens, BC=t.depth, BN=t.columns, TILES=t.tiles, STAGES=t.stages,
            num_warps=t.warps,
        )  # fmt: skip
    return list(ys)


def kron_matmul_backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, an empty tensor for one that is not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = kron_matmul(dy, (a.mT, b.mT)) if needed[0] else x.new_empty(0)
    da = db = None
    if needed[1] or needed[2]:
        da, db = factor_gradients(dy, x, a, b, needed[1], needed[2])
    return dx, a.new_empty(0) if da is None else da, b.new_empty(0) if db is None else db


def factor_gradients(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the factors, deterministic; None for one that is not needed."""
    if x.shape[0] == 0:
        return torch.zeros_like(a) if need_a else None, torch.zeros_like(b) if need_b else None
    g = _geometry(KronShape.of(a, b))
    flipped = not g.mix_first
    if flipped:
        g, x, dy, a, b = g.transposed, dy, x, a.mT, b.mT
    mix, dot, need_mix, need_dot = (b, a, need_b, need_a) if g.inner else (a, b, need_a, need_b)
    exact = x.dtype == torch.float32 and precision(x.dtype) == "ieee"
    if g.by_dot:
        gradients = _gradients_by_dot
    elif g.dense_gradient_pays(x.itemsize, exact):
        gradients = _gradients_of_dense
    else:
        gradients = _gradients_of_small_mix
    d_mix, d_dot = gradients(g, dy, x, mix, dot, need_mix, need_dot)
    if flipped:
        d_mix, d_dot = (t if t is None else t.mT for t in (d_mix, d_dot))
    return (d_dot, d_mix) if g.inner else (d_mix, d_dot)


def _gradients_of_dense(
    g: Geometry, dy: Tensor, x: Tensor, mix: Tensor, dot: Tensor, need_mix: bool, need_dot: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the dense weight's gradient, in float32: both are contractions of it."""
    if x.is_cuda and x.itemsize == 2 and "dtype" in torch.ops.aten.mm.overloads():
        dense = torch.mm(dy.mT, x, out_dtype=torch.float32)  # torch 2.8
    else:
        dense = torch.mm(dy.mT, x).float()
    if g.inner:
        dense = dense.view(g.N, g.O, g.K, g.U).transpose(0, 1).transpose(2, 3)
    else:
        dense = dense.view(g.O, g.N, g.U, g.K)  # (O, N, U, K)
    d_mix = torch.einsum("oduc,kdc->kou", dense, dot.float()).to(mix.dtype) if need_mix else None
    d_dot = torch.einsum("oduc,kou->kdc", dense, mix.float()).to(dot.dtype) if need_dot else None
    return d_mix, d_dot


def _gradients_of_small_mix(
    g: Geometry, dy: Tensor, x: Tensor, mix: Tensor, dot: Tensor, need_mix: bool, need_dot: bool
) -> tuple[Tensor | None, Tensor | None]:
    from kron_kernels.backends.triton.backward import mix_gradients_kernel

    tokens = x.shape[0]
    rows = dy.view(tokens, g.N, g.O).mT if g.inner else dy.view(tokens, g.O, g.N)
    rows = rows.reshape(tokens * g.O, g.N)
    v = torch.matmul(rows, dot) if need_mix else None  # (rank, T * O, K)
    z = x.new_empty(g.rank, tokens * g.O, g.K) if need_dot else None
    t, group, shares = triton_launch.mix_gradient_tile(g, tokens, device_of(x))
    tiles = -(-g.K // t.depth)
    wide: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    d_mix = torch.empty(shares * tiles, g.rank, g.O, g.U, **wide) if need_mix else None
    with on_device(x):
        mix_gradients_kernel[tiles, g.rank * -(-g.O // group), shares](
            x, v, mix, z, d_mix, tokens, -(-tokens // shares), *mix.stride(),
            O=g.O, U=g.U, K=g.K, U_=power_of_two(g.U), INNER=g.inner,
            GROUP=group, BT=t.tokens, BC=t.depth, num_warps=t.warps,
        )  # fmt: skip
    return _summed(d_mix, mix.dtype), None if z is None else torch.matmul(rows.mT, z)


def _gradients_by_dot(
    g: Geometry, dy: Tensor, x: Tensor, mix: Tensor, dot: Tensor, need_mix: bool, need_dot: bool
) -> tuple[Tensor | None, Tensor | None]:
    from kron_kernels.backends.triton.backward import factor_gradients_kernel

    tokens = x.shape[0]
    how = precision(x.dtype)
    t, shares = triton_launch.factor_gradient_tile(g, tokens, x.dtype, how == "ieee", device_of(x))
    tiles = -(-g.N // t.columns) * -(-g.K // t.depth)
    wide: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    d_dot = torch.empty(shares, g.rank, g.N, g.K, **wide) if need_dot else None
    d_mix = torch.empty(shares * tiles, g.rank, g.O, g.U, **wide) if need_mix else None
    constants = sizes(g)
    del constants["BY_DOT"]
    with on_device(x):
        factor_gradients_kernel[tiles, g.rank, shares](
            dy, x, mix, dot, d_mix, d_dot, tokens, -(-tokens // shares),
            *mix.stride(), *dot.stride(),
            **constants, PRECISION=how,
            BT=t.tokens, BC=t.depth, BN=t.columns, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    return _summed(d_mix, mix.dtype), _summed(d_dot, dot.dtype)


def _summed(parts: Tensor | None, dtype: torch.dtype, over: int = 0) -> Tensor | None:
    """What each program summed, added up in a fixed order; None where it was not asked for."""
    return None if parts is None else parts.sum(over).to(dtype)


def fuses(up: Layer, down: Layer) -> bool:
    """Whether these layers fit the fused feed-forward block.

    They meet in a hidden grid that they exchange by columns, and a block of few tokens has room for
    what it keeps of them: the sums of both products.
    """
    (a1, b1, _), (a2, b2, _) = up, down
    (r1, hidden, u), (r2, p, _) = a1.shape, a2.shape
    sums = r1 * power_of_two(u) * b1.shape[1] + power_of_two(p) * b2.shape[1]
    rows = max(r1 * power_of_two(u), r2 * power_of_two(p))
    return (
        (hidden, b1.shape[1]) == (a2.shape[2], b2.shape[2])
        and KronShape.of(a1, b1).order == "b_first"
        and KronShape.of(a2, b2).order == "a_first"
        and rows <= triton_launch.MAX_VECTORS
        and sums * 4 * max(1, 16 // max(power_of_two(u), power_of_two(p)))
        <= triton_launch.SUMS_FEED_FORWARD
        and max(r1, r2) <= 4
    )


def kron_feed_forward(
    x: Tensor, up: Layer, activation: Activation, down: Layer, residual: Tensor | None
) -> Tensor:
    """``down(act(up(x))) + residual`` of ``(a, b, bias)`` each, x ``(T, n)``."""
    if not fuses(up, down):
        hidden = kron_matmul(x, up[:2], up[2], activation)
        return kron_matmul(hidden, down[:2], down[2], None, residual)
    from kron_kernels.backends.triton.feed_forward import feed_forward_kernel

    x = x.contiguous()
    y = x.new_empty(x.shape[0], down[0].shape[1] * down[1].shape[1])
    if x.shape[0] == 0:
        return y
    residual = None if residual is None else residual.contiguous()
    (a1, b1, bias1), (a2, b2, bias2) = (
        (a, b, bias if bias is None else bias.contiguous()) for a, b, bias in (up, down)
    )
    constants, t, out = _feed_forward_constants(x, a1, b1, a2, b2, activation, backward=False)
    with on_device(x):
        feed_forward_kernel[-(-x.shape[0] // t.tokens),](
            x, a1, b1, bias1, a2, b2, bias2, residual, y, x.shape[0],
            *a1.stride(), *b1.stride(), *a2.stride(), *b2.stride(),
            **constants, BT=t.tokens, BC=t.depth, BN=t.columns, BM=out, STAGES=t.stages,
            num_warps=t.warps,
        )  # fmt: skip
    return y


def kron_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, up's a, b and bias, down's a and b; empty where not needed."""
    from kron_kernels.backends.triton.feed_forward import feed_forward_backward_kernel

    dy, x = dy.contiguous(), x.contiguous()
    (a1, b1, bias1), (a2, b2, _) = up, down
    operands: tuple[Any, ...] = x, a1, b1, bias1, a2, b2
    needed = [n and t is not None for n, t in zip(needed, operands, strict=True)]
    tokens = x.shape[0]
    if tokens == 0:
        return tuple(
            torch.zeros_like(t) if n else x.new_empty(0)
            for t, n in zip(operands, needed, strict=True)
        )
    bias1 = None if bias1 is None else bias1.contiguous()
    (r1, h, u), (_, n, k), (r2, p, _), (_, m, _) = a1.shape, b1.shape, a2.shape, b2.shape
    constants, t, depth = _feed_forward_constants(x, a1, b1, a2, b2, activation, backward=True)
    grid = -(-tokens // t.tokens), -(-n // t.columns)
    wide: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    v, dz = x.new_empty(r2, tokens, p, n), x.new_empty(r1, tokens, u, n)
    d_a1 = torch.empty(r1, grid[0] * grid[1], h, u, **wide) if needed[1] else None
    d_bias1 = torch.empty(grid[0], h * n, **wide) if needed[3] else None
    d_a2 = torch.empty(r2, grid[0] * grid[1], p, h, **wide) if needed[4] else None
    with on_device(x):
        feed_forward_backward_kernel[grid](
            dy, x, a1, b1, bias1, a2, b2, v, dz, d_a1, d_bias1, d_a2, tokens,
            *a1.stride(), *b1.stride(), *a2.stride(), *b2.stride(),
            **constants, BT=t.tokens, BC=t.depth, BN=t.columns, BM=depth, STAGES=t.stages,
            num_warps=t.warps,
        )  # fmt: skip
    # Plain matrix products of all tokens' rows, which PyTorch's library does best.
    v, dz = v.view(r2, tokens * p, n), dz.view(r1, tokens * u, n)
    x_rows, dy_rows = x.view(tokens * u, k), dy.view(tokens * p, m)
    dx = None
    if needed[0]:
        dx = dz[0] @ b1[0]
        for i in range(1, r1):
            dx.addmm_(dz[i], b1[i])
        dx = dx.view(tokens, u * k)
    grads = (
        dx,
        _summed(d_a1, x.dtype, 1),
        dz.mT @ x_rows if needed[2] else None,
        _summed(d_bias1, x.dtype),
        _summed(d_a2, x.dtype, 1),
        dy_rows.mT @ v if needed[5] else None,
    )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _feed_forward_constants(
    x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, activation: str, backward: bool
) -> tuple[dict[str, object], Tile, int]:
    (r1, h, u), (_, n, k), (r2, p, _), (_, m, _) = a1.shape, b1.shape, a2.shape, b2.shape
    how = precision(x.dtype)
    constants = {
        "R1": r1, "R2": r2, "H": h, "U": u, "P": p, "N": n, "K": k, "M": m,
        "U_": power_of_two(u), "P_": power_of_two(p), "ACTIVATION": activation, "PRECISION": how,
    }  # fmt: skip
    vectors = power_of_two(u), power_of_two(p)
    t, out = triton_launch.feed_forward_tile(
        vectors, (r1, r2), (n, k, m), x.shape[0], x.dtype.itemsize, how == "ieee", backward
    )
    return constants, t, out


def kron_embedding(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows ``ids (T,)`` of ``Σ_k a_k ⊗ b_k``: ``(T, d)``."""
    from kron_kernels.backends.triton.embedding import embedding_kernel

    ids = ids.contiguous()
    (rank, rows, columns), size = a.shape, b.shape[2]
    y = a.new_empty(ids.shape[0], columns * size)
    if ids.shape[0] == 0:
        return y
    # 8 KB of y a program: 128-bit stores by 4 warps, several of them.
    wide = min(power_of_two(columns), max(1, 1024 // power_of_two(size)))
    block = max(1, 4096 // (wide * power_of_two(size)))
    grid = -(-ids.shape[0] // block), -(-columns // wide)
    with on_device(a):
        embedding_kernel[grid](
            ids, a, b, y, ids.shape[0], *a.stride(), b.stride(0), b.stride(2),
            RANK=rank, ROWS=rows, COLUMNS=columns, SIZE=size, SIZE_=power_of_two(size),
            BT=block, BJ=wide,
        )  # fmt: skip
    return y
