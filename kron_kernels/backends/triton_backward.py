"""Gradients of the factors in one Triton kernel; see ``triton_tiles`` for its terms.

The gradients of ``Σ dy_o[d] dot_k[d, c] mix_k[o, u] x_u[c]`` over tokens, in the terms of a product
whose mix comes first (of another one x and dy change places, and the factors are transposed):

    d dot_k[d, c] = Σ_t,o dy_o[d] z_k,o[c]          with z_k,o[c] = Σ_u mix_k[o, u] x_u[c]
    d mix_k[o, u] = Σ_t,c v_k,o[c] x_u[c]           with v_k,o[c] = Σ_d dot_k[d, c] dy_o[d]

A program has one tile (d, c) of ``dot`` and sums over a share of the tokens, z and v recomputed.
The shares' sums, and the tiles' of ``d mix``, are added afterwards in a fixed order: deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kron_kernels.backends.triton_tiles import (
    load_rows,
    load_vectors,
    mix_by_dot,
    mix_each,
    split_last,
)


@triton.jit
def factor_gradients_kernel(
    dy, x, mix, dot, d_mix, d_dot, rows_total, share,
    mix_r, mix_o, mix_u, dot_r, dot_d, dot_c,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr, BY_DOT: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``d_dot (shares, RANK, N, K)``, ``d_mix (RANK, shares, tiles, O, U)``; either may be None."""
    TILES_C: tl.constexpr = (K + BC - 1) // BC
    tile, k, part = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, c = tile // TILES_C * BN, tile % TILES_C * BC
    ds, cs = d + tl.arange(0, BN), c + tl.arange(0, BC)
    os, us = tl.arange(0, O_), tl.arange(0, U_)
    if d_dot is not None:
        sum_dot = tl.zeros((BN, BC), tl.float32)
    if d_mix is not None:
        inside = (ds[:, None] < N) & (cs[None, :] < K)
        where = dot + k * dot_r + ds[:, None] * dot_d + cs[None, :] * dot_c
        factor = tl.load(where, mask=inside, other=0.0)
        # Of every token's v with every token's x, on tensor cores; in the end a token's own count.
        # To sum those alone takes a reduction over threads in every step, which is four times more
        # instructions than all the rest.
        sum_mix = tl.zeros((BT * O_, BT * U_), tl.float32)

    for t in tl.range(0, share, BT, num_stages=STAGES):
        rows = part * share + t + tl.arange(0, BT)
        live = (rows < rows_total) & (t + tl.arange(0, BT) < share)
        right = load_rows(dy, rows * (N * O), live, d, N, O, O_, INNER, BT, BN)
        vectors = load_vectors(x, rows * (K * U), live, c, K, U, U_, INNER, BT, BC)
        if d_dot is not None:
            if BY_DOT:
                z = mix_by_dot(
                    vectors, mix, k, mix_r, mix_o, mix_u, U, O, U_, O_, PRECISION, BT, BC
                )
            else:
                each = split_last(vectors, U_)
                z = mix_each(each, mix, k, mix_r, mix_o, mix_u, U, O, O_, BT, BC)
            sum_dot = tl.dot(tl.trans(right), z, sum_dot, input_precision=PRECISION)
        if d_mix is not None:
            v = tl.dot(right, factor, input_precision=PRECISION).to(x.dtype.element_ty)
            left = tl.reshape(tl.permute(vectors, (0, 2, 1)), (BT * U_, BC))
            sum_mix = tl.dot(v, tl.trans(left), sum_mix, input_precision=PRECISION)

    if d_dot is not None:
        where = d_dot + (part * RANK + k) * (N * K) + ds[:, None] * K + cs[None, :]
        tl.store(where, sum_dot, mask=(ds[:, None] < N) & (cs[None, :] < K))
    if d_mix is not None:
        ts = tl.arange(0, BT)
        own = ts[:, None, None, None] == ts[None, None, :, None]
        pairs = tl.where(own, tl.reshape(sum_mix, (BT, O_, BT, U_)), 0.0)
        where = d_mix + ((k * tl.num_programs(2) + part) * tl.num_programs(0) + tile) * (O * U)
        inside = (os[:, None] < O) & (us[None, :] < U)
        tl.store(where + os[:, None] * U + us[None, :], tl.sum(tl.sum(pairs, 2), 0), mask=inside)
