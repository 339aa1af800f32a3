"""Launches of the Triton kernels: the functions of the backend ``"triton"``.

Triton is imported by the first call. Nothing here waits for the GPU or reads its results, so a CUDA
graph can capture a call whose kernels have been compiled by an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from kron_kernels.backends.gpu import precision
from kron_kernels.backends.gradients import returned
from kron_kernels.backends.triton import configs
from kron_kernels.backends.triton.configs import Geometry, Tile, power_of_two
from kron_kernels.backends.triton.served import why_no_triton, why_not, why_not_embedding
from kron_kernels.checks import Activation, Layer
from kron_kernels.shapes import KronShape

__all__ = [
    "describe",
    "fuses",
    "kron_embedding",
    "kron_feed_forward",
    "kron_feed_forward_backward",
    "kron_feed_forward_norm",
    "kron_matmul",
    "kron_matmul_backward",
    "kron_qkv",
    "why_no_triton",
    "why_not",
    "why_not_embedding",
]


def on_device(x: Tensor):
    """A context in which x's GPU is the current one: Triton launches on that."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def sizes(g: Geometry) -> dict[str, int | bool]:
    """A kernel's compile-time sizes."""
    return {
        "RANK": g.rank, "O": g.O, "U": g.U, "N": g.N, "K": g.K, "INNER": g.inner,
        "O_": power_of_two(g.O), "U_": power_of_two(g.U), "BY_DOT": g.by_dot,
    }  # fmt: skip


def describe(x: Tensor, *factors: Tensor) -> str:
    """How the kernel computes this product, in words."""
    g = _geometry(KronShape.of(*factors))
    t = configs.tile(
        g, prod(x.shape[:-1]), x.dtype, precision(x.dtype) == "ieee", configs.device_of(x)
    )
    mixed, product = ("B", "A") if g.inner else ("A", "B")
    place = "on tensor cores" if g.by_dot else "in registers"
    first, then = f"{mixed} {place}", f"{product} on tensor cores"
    if not g.mix_first:
        first, then = then, first
    return f"{first}, then {then}; {t.tokens} tokens a program, {t.warps} warps"


def _geometry(s: KronShape) -> Geometry:
    """The geometry of a product that ``why_not`` accepts."""
    g = configs.geometry(s)
    assert g is not None
    return g


def kron_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (…, n)`` and two factors."""
    a, b = factors
    return _products(x, [(a, b, bias)], activation, residual)[0]


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of each ``(a, b, bias)``, in one launch where that moves fewer bytes.

    One launch reads x ``(…, n)`` once, but its programs have room for fewer tokens and so read the
    factors more often. In bytes moved for a token of KroneckerBERT's width: 21x 15 KB together,
    17 KB apart; 8x 61 KB together (by calculation), 37 KB apart.
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
    """Products of x with layers of equal shapes and strides, in one launch."""
    from kron_kernels.backends.triton.forward import kron_matmul_kernel

    x = x.contiguous()
    *lead, _ = x.shape
    tokens = prod(lead)
    s = KronShape.of(*layers[0][:2])
    ys = tuple(x.new_empty(*lead, s.out_features) for _ in layers)
    if tokens == 0:
        return list(ys)
    g = _geometry(s)
    side = 1 if g.inner else 0
    mixes = tuple(layer[:2][side] for layer in layers)
    dots = tuple(layer[:2][1 - side] for layer in layers)
    biases = tuple(None if bias is None else bias.contiguous() for *_, bias in layers)
    residual = None if residual is None else residual.contiguous()
    mode = precision(x.dtype)
    t = configs.tile(g, tokens, x.dtype, mode == "ieee", configs.device_of(x), len(layers))
    grid = -(-tokens // t.tokens), -(-g.N // (t.columns * t.tiles))
    with on_device(x):
        kron_matmul_kernel[grid](
            x, mixes, dots, biases, residual, ys, tokens,
            *mixes[0].stride(), *dots[0].stride(),
            **sizes(g), MIX_FIRST=g.mix_first, ACTIVATION=activation, PRECISION=mode,
            BT=t.tokens, BC=t.depth, BN=t.columns, TILES=t.tiles, STAGES=t.stages,
            num_warps=t.warps,
        )  # fmt: skip
    return list(ys)


def kron_matmul_backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, a and b, an empty tensor for each that is not needed."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = kron_matmul(dy, (a.mT, b.mT)) if needed[0] else None
    return returned((dx, *factor_gradients(dy, x, a, b, needed[1], needed[2])), x)


def factor_gradients(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the factors, deterministic; None for each that is not needed."""
    if not (need_a or need_b):
        return None, None
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
    """Both as contractions of the dense weight's gradient, which is in float32."""
    if x.is_cuda and x.itemsize == 2:  # CPUs have no out_dtype
        dense = torch.mm(dy.mT, x, out_dtype=torch.float32)
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
    t, group, shares = configs.mix_gradient_tile(g, tokens, configs.device_of(x))
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
    mode = precision(x.dtype)
    t, shares = configs.factor_gradient_tile(
        g, tokens, x.dtype, mode == "ieee", configs.device_of(x)
    )
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
            **constants, PRECISION=mode,
            BT=t.tokens, BC=t.depth, BN=t.columns, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    return _summed(d_mix, mix.dtype), _summed(d_dot, dot.dtype)


def _summed(parts: Tensor | None, dtype: torch.dtype, over: int = 0) -> Tensor | None:
    """The sum of the programs' parts, in a fixed order."""
    return None if parts is None else parts.sum(over).to(dtype)


def fuses(up: Layer, down: Layer) -> bool:
    """Whether these layers fit the fused feed-forward block.

    Both must use the same hidden grid column by column, and a program must have room for the
    accumulators of both products.
    """
    (a1, b1, _), (a2, b2, _) = up, down
    (r1, hidden, u), (r2, p, _) = a1.shape, a2.shape
    sums = r1 * power_of_two(u) * b1.shape[1] + power_of_two(p) * b2.shape[1]
    rows = max(r1 * power_of_two(u), r2 * power_of_two(p))
    return (
        (hidden, b1.shape[1]) == (a2.shape[2], b2.shape[2])
        and KronShape.of(a1, b1).order == "b_first"
        and KronShape.of(a2, b2).order == "a_first"
        and rows <= configs.MAX_VECTORS
        and sums * 4 * max(1, 16 // max(power_of_two(u), power_of_two(p)))
        <= configs.SUMS_FEED_FORWARD
        and max(r1, r2) <= 4
    )


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    residual: Tensor | None,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
) -> Tensor:
    """``down(act(up(x))) + residual`` of ``x (…, n)`` and two ``(a, b, bias)``.

    Layers that fuse may be followed by a layer norm of ``(weight, bias, epsilon)``.
    """
    if not fuses(up, down):
        hidden = kron_matmul(x, up[:2], up[2], activation)
        return kron_matmul(hidden, down[:2], down[2], None, residual)
    from kron_kernels.backends.triton.feed_forward import feed_forward_kernel

    x = x.contiguous()
    *lead, _ = x.shape
    tokens = prod(lead)
    y = x.new_empty(*lead, down[0].shape[1] * down[1].shape[1])
    if tokens == 0:
        return y
    residual = None if residual is None else residual.contiguous()
    (a1, b1, bias1), (a2, b2, bias2) = (
        (a, b, bias if bias is None else bias.contiguous()) for a, b, bias in (up, down)
    )
    gamma, beta, epsilon = norm or (None, None, 0.0)
    constants, t, out = _feed_forward_constants(x, a1, b1, a2, b2, activation, backward=False)
    with on_device(x):
        feed_forward_kernel[-(-tokens // t.tokens),](
            x, a1, b1, bias1, a2, b2, bias2, residual, y, gamma, beta, epsilon, tokens,
            *a1.stride(), *b1.stride(), *a2.stride(), *b2.stride(),
            **constants, BT=t.tokens, BC=t.depth, BN=t.columns, BM=out, STAGES=t.stages,
            num_warps=t.warps,
        )  # fmt: skip
    return y


def kron_feed_forward_norm(
    x: Tensor,
    up: Layer,
    activation: Activation,
    down: Layer,
    residual: Tensor | None,
    norm: tuple[Tensor, Tensor | None, float],
) -> Tensor:
    """``LayerNorm(down(act(up(x))) + residual)`` of layers that fuse; without gradients."""
    return kron_feed_forward(x, up, activation, down, residual, norm)


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
        zeros = (torch.zeros_like(t) if n else None for t, n in zip(operands, needed, strict=True))
        return returned(list(zeros), x)
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
    # The rest are plain matrix products over all tokens' rows, left to PyTorch.
    v, dz = v.view(r2, tokens * p, n), dz.view(r1, tokens * u, n)
    x_rows, dy_rows = x.view(tokens * u, k), dy.view(tokens * p, m)
    dx = None
    if needed[0]:
        dx = dz[0] @ b1[0]
        for i in range(1, r1):
            dx.addmm_(dz[i], b1[i])
        dx = dx.view(tokens, u * k)
    grads = [
        dx,
        _summed(d_a1, x.dtype, 1),
        dz.mT @ x_rows if needed[2] else None,
        _summed(d_bias1, x.dtype),
        _summed(d_a2, x.dtype, 1),
        dy_rows.mT @ v if needed[5] else None,
    ]
    return returned(grads, x)


def _feed_forward_constants(
    x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, activation: str, backward: bool
) -> tuple[dict[str, object], Tile, int]:
    (r1, h, u), (_, n, k), (r2, p, _), (_, m, _) = a1.shape, b1.shape, a2.shape, b2.shape
    mode = precision(x.dtype)
    constants = {
        "R1": r1, "R2": r2, "H": h, "U": u, "P": p, "N": n, "K": k, "M": m,
        "U_": power_of_two(u), "P_": power_of_two(p), "ACTIVATION": activation, "PRECISION": mode,
    }  # fmt: skip
    vectors = power_of_two(u), power_of_two(p)
    t, out = configs.feed_forward_tile(
        vectors, (r1, r2), (n, k, m), x.shape[0], x.dtype.itemsize, mode == "ieee", backward
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
    # 8 KB of y per program: several 128-bit stores for each thread of 4 warps.
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
