"""Tiles of a Kronecker product in Triton: loads, mixes, activations and stores.

The larger factor, ``dot (r, N, K)``, multiplies on tensor cores. The smaller one,
``mix (r, O, U)``, mixes U vectors into O. If the mix is the left factor, a token is ``x (U, K)``
and ``y (O, N)``. If it is the right one (``INNER``), a token is ``x (K, U)`` and ``y (N, O)``: the
vectors are interleaved. The mix comes before the product (``MIX_FIRST``) or after it. One kernel
covers all four cases.

A trailing underscore, as in ``U_``, marks a size rounded up to a power of two, as Triton requires.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_mix(mix, k, o, u, stride_r, stride_o, stride_u, O: tl.constexpr, U: tl.constexpr):
    """``mix[k, o, u]`` in float32, 0 outside; the indices broadcast."""
    inside = (o < O) & (u < U)
    return tl.load(mix + k * stride_r + o * stride_o + u * stride_u, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_dot(
    dot, k, c, d, stride_r, stride_d, stride_c,
    K: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``dot[k, d, c]`` transposed, as a tile ``(BC, BN)``, 0 outside."""
    cols = c + tl.arange(0, BC)[:, None]
    ds = d + tl.arange(0, BN)[None, :]
    where = dot + k * stride_r + ds * stride_d + cols * stride_c
    return tl.load(where, mask=(cols < K) & (ds < N), other=0.0)


@triton.jit
def load_vectors(
    x, offsets, live, c, K: tl.constexpr, U: tl.constexpr, U_: tl.constexpr,
    INNER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Entries c … c + BC of the tokens' U vectors, as ``(BT, BC, U_)``, 0 outside."""
    if INNER and U == U_:  # one contiguous piece, which 128-bit loads can read
        e = c * U + tl.arange(0, BC * U)[None, :]
        flat = tl.load(x + offsets[:, None] + e, mask=live[:, None] & (e < K * U), other=0.0)
        return tl.reshape(flat, (BT, BC, U))
    cols = c + tl.arange(0, BC)[None, :, None]
    us = tl.arange(0, U_)[None, None, :]
    e = cols * U + us if INNER else us * K + cols
    inside = live[:, None, None] & (cols < K) & (us < U)
    return tl.load(x + offsets[:, None, None] + e, mask=inside, other=0.0)


@triton.jit
def load_each(
    x, offsets, live, c, K: tl.constexpr, U: tl.constexpr, U_: tl.constexpr,
    INNER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same entries as a tuple of U vectors ``(BT, BC)``."""
    if INNER:
        return split_last(load_vectors(x, offsets, live, c, K, U, U_, True, BT, BC), U_)
    return split_rows(load_rows(x, offsets, live, c, K, U, U_, False, BT, BC), U_)


@triton.jit
def load_rows(
    x, offsets, live, c, K: tl.constexpr, U: tl.constexpr, U_: tl.constexpr,
    INNER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same entries as rows ``(BT * U_, BC)``, a token's vectors in consecutive rows."""
    if INNER:
        vectors = load_vectors(x, offsets, live, c, K, U, U_, True, BT, BC)
        return tl.reshape(tl.permute(vectors, (0, 2, 1)), (BT * U_, BC))
    cols = c + tl.arange(0, BC)[None, :]
    us = tl.arange(0, U_)[None, :]
    starts = tl.reshape(offsets[:, None] + us * K, (BT * U_,))
    used = tl.reshape(live[:, None] & (us < U), (BT * U_,))
    inside = used[:, None] & (cols < K)
    return tl.load(x + starts[:, None] + cols, mask=inside, other=0.0)


@triton.jit
def mix_by_dot(
    vectors, mix, k, mix_r, mix_o, mix_u,
    U: tl.constexpr, O: tl.constexpr, U_: tl.constexpr, O_: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``Σ_u mix[k, o, u] vector_u`` of ``vectors (BT, BC, U_)``, as rows ``(BT * O_, BC)``."""
    us, os = tl.arange(0, U_)[:, None], tl.arange(0, O_)[None, :]
    m = load_mix(mix, k, os, us, mix_r, mix_o, mix_u, O, U).to(vectors.dtype)
    z = tl.dot(tl.reshape(vectors, (BT * BC, U_)), m, input_precision=PRECISION)
    z = tl.permute(tl.reshape(z, (BT, BC, O_)), (0, 2, 1)).to(vectors.dtype)
    return tl.reshape(z, (BT * O_, BC))


@triton.jit
def mix_each(
    vectors, mix, k, mix_r, mix_o, mix_u,
    U: tl.constexpr, O: tl.constexpr, O_: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same in registers, for a tuple of vectors ``(BT, BC)``."""
    z = tl.zeros((BT, O_, BC), tl.float32)
    for u in tl.static_range(U):
        m = load_mix(mix, k, tl.arange(0, O_), u, mix_r, mix_o, mix_u, O, U)
        z += vectors[u].to(tl.float32)[:, None, :] * m[None, :, None]
    # In the layout of a product's operand every warp has all rows: 8 warps would mix the same
    # vectors, 8 times the work. A sum of one term keeps that layout from spreading to the mix.
    z = tl.sum(z[:, :, :, None], 3).to(vectors[0].dtype)
    return tl.reshape(z, (BT * O_, BC))


@triton.jit
def split_last(z, SIZE: tl.constexpr):
    """``(a, b, SIZE)`` as a tuple of ``(a, b)``, for SIZE a power of two within one thread."""
    parts = (z,)
    for level in tl.static_range(6):
        if SIZE >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                pair = tl.reshape(parts[i], (z.shape[0], z.shape[1], 2, SIZE >> (level + 1)))
                halves = halves + tl.split(tl.permute(pair, (0, 1, 3, 2)))
            parts = halves
    vectors = ()
    for i in tl.static_range(SIZE):
        vectors = vectors + (tl.reshape(parts[i], (z.shape[0], z.shape[1])),)
    return vectors


@triton.jit
def split_rows(rows, U_: tl.constexpr):
    """Rows ``(BT * U_, BN)``, a token's in sequence, as a tuple of U_ ``(BT, BN)``."""
    tokens = tl.reshape(rows, (rows.shape[0] // U_, U_, rows.shape[1]))
    return split_last(tl.permute(tokens, (0, 2, 1)), U_)


@triton.jit
def normal_tail(x, gauss):
    """The normal distribution at ``-|x|``, given ``gauss = exp(-x²/2)``.

    Relative error 1.5e-7 for ``|x| <= 14``: the same polynomial as in csrc/cuda/activation.h.
    """
    t = 1.0 / (1.0 + 0.3 * tl.abs(x))
    p = 0.035674778773789155 * t - 0.1572031018997223
    p = p * t + 0.20635353870925918
    p = p * t - 0.05368367300900895
    p = p * t + 0.1285616411245486
    p = p * t + 0.0999134879709448
    p = p * t + 0.12075395664861333
    p = p * t + 0.11962929879253524
    return gauss * p * t


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 x."""
    if ACTIVATION == "gelu":
        tail = normal_tail(x, tl.exp(-0.5 * x * x))
        return x * tl.where(x > 0, 1.0 - tail, tail)
    if ACTIVATION == "gelu_tanh":  # 0.5 x (1 + tanh w) = x / (1 + exp(-2w))
        w = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * w))
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """The activation of float32 x and its derivative."""
    if ACTIVATION == "gelu":
        gauss = tl.exp(-0.5 * x * x)
        tail = normal_tail(x, gauss)
        below = tl.where(x > 0, 1.0 - tail, tail)
        return x * below, below + x * gauss * 0.3989422804014327
    if ACTIVATION == "gelu_tanh":
        w = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = 1.0 / (1.0 + tl.exp(-2.0 * w))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * s * (1.0 - s) * slope
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s + x * s * (1.0 - s)


@triton.jit
def finish(
    y, bias, residual, out, where, e, inside, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Store ``act(y + bias[e]) + residual`` of a float32 tile at the offsets ``where + e``.

    ``residual`` has the layout of ``out``; it and ``bias`` may be None.
    """
    if bias is not None:
        y += tl.load(bias + e, mask=e < FEATURES, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if residual is not None:
        y += tl.load(residual + where + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + where + e, y.to(out.dtype.element_ty), mask=inside)
