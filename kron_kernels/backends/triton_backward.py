"""Gradients of the factors in one Triton kernel; see ``triton_tiles`` for its terms.

The gradients of ``Σ dy_o[d] dot_k[d, c] mix_k[o, u] x_u[c]`` over tokens, in the terms of a product
whose mix comes first (of another one x and dy change places, and the factors are transposed):

    d dot_k[d, c] = Σ_t,o dy_o[d] z_k,o[c]          with z_k,o[c] = Σ_u mix_k[o, u] x_u[c]
    d mix_k[o, u] = Σ_t,c v_k,o[c] x_u[c]           with v_k,o[c] = Σ_d dot_k[d, c] dy_o[d]

A program has one tile (d, c) of ``dot`` and sums over a share of the tokens, z and v recomputed. The
shares' sums, and the tiles' of ``d mix``, are added afterwards in a fixed order: deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kron_kernels.backends.triton_tiles import (
    load_each,
    load_rows,
    load_vectors,
    mix_vectors,
)


@triton.jit
def factor_gradients_kernel(
    dy, x, mix, dot, d_mix, d_dot, rows_total, share,
    mix_r, mix_o, mix_u, dot_r, dot_d, dot_c,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr, BY_DOT: tl.constexpr,
    EACH: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
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
        if BY_DOT:
            sum_mix = tl.zeros((U_, O_), tl.float32)
        elif EACH:
            sum_mix = ()
            for _ in tl.static_range(U):
                sum_mix = sum_mix + (tl.zeros((BT, O_), tl.float32),)
        else:
            sum_mix = tl.zeros((BT, O_, U_), tl.float32)

    for t in tl.range(0, share, BT, num_stages=STAGES):
        rows = part * share + t + tl.arange(0, BT)
        live = (rows < rows_total) & (t + tl.arange(0, BT) < share)
        x_offsets, dy_offsets = rows * (K * U), rows * (N * O)
        right = load_rows(dy, dy_offsets, live, d, N, O, O_, INNER, BT, BN)
        if EACH:
            vectors = load_each(x, x_offsets, live, c, K, U, BC)
        else:
            vectors = load_vectors(x, x_offsets, live, c, K, U, U_, INNER, BT, BC)
        if d_dot is not None:
            z = mix_vectors(
                vectors, mix, k, mix_r, mix_o, mix_u,
                U, O, U_, O_, BY_DOT, EACH, PRECISION, BT, BC,
            )  # fmt: skip
            sum_dot = tl.dot(tl.trans(right), z, sum_dot, input_precision=PRECISION)
        if d_mix is not None:
            v = tl.dot(right, factor, input_precision=PRECISION)
            v = tl.reshape(v, (BT, O_, BC))
            if BY_DOT:
                v = tl.reshape(tl.permute(v, (0, 2, 1)), (BT * BC, O_)).to(vectors.dtype)
                flat = tl.reshape(vectors, (BT * BC, U_))
                sum_mix = tl.dot(tl.trans(flat), v, sum_mix, input_precision=PRECISION)
            elif EACH:
                old = sum_mix
                sum_mix = ()
                for u in tl.static_range(U):
                    product = tl.sum(v * vectors[u].to(tl.float32)[:, None, :], 2)
                    sum_mix = sum_mix + (old[u] + product,)
            else:
                v = tl.permute(v, (0, 2, 1))
                wide = vectors.to(tl.float32)
                sum_mix += tl.sum(v[:, :, :, None] * wide[:, :, None, :], 1)

    if d_dot is not None:
        where = d_dot + (part * RANK + k) * (N * K) + ds[:, None] * K + cs[None, :]
        tl.store(where, sum_dot, mask=(ds[:, None] < N) & (cs[None, :] < K))
    if d_mix is not None:
        start = (k * tl.num_programs(2) + part) * tl.num_programs(0) + tile
        where = d_mix + start * (O * U)
        if BY_DOT:
            inside = (us[:, None] < U) & (os[None, :] < O)
            tl.store(where + os[None, :] * U + us[:, None], sum_mix, mask=inside)
        elif EACH:
            for u in tl.static_range(U):
                tl.store(where + os * U + u, tl.sum(sum_mix[u], 0), mask=os < O)
        else:
            inside = (os[:, None] < O) & (us[None, :] < U)
            tl.store(where + os[:, None] * U + us[None, :], tl.sum(sum_mix, 0), mask=inside)
