"""Gradients of the factors in Triton; ``blocks`` defines the terms.

The gradients of ``Σ dy_o[d] dot_k[d, c] mix_k[o, u] x_u[c]``, summed over tokens, where the mix
comes first (where it comes last, x and dy change places and the factors are transposed):

    d dot_k[d, c] = Σ_t,o dy_o[d] z_k,o[c]          with z_k,o[c] = Σ_u mix_k[o, u] x_u[c]
    d mix_k[o, u] = Σ_t,c v_k,o[c] x_u[c]           with v_k,o[c] = Σ_d dot_k[d, c] dy_o[d]

If the mix is small, PyTorch computes v and the gradient of dot as plain matrix products, and one
kernel reads x once for z and the gradient of the mix. z and v are as large as the smaller of input
and output. If the mix uses tensor cores, one kernel computes everything, z and v included.
Programs sum over shares of the tokens; the shares are added in a fixed order, so the results are
deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kron_kernels.backends.triton.blocks import (
    load_each,
    load_mix,
    load_rows,
    load_vectors,
    mix_by_dot,
)


@triton.jit
def mix_gradients_kernel(
    x, v, mix, z, d_mix, rows_total, share, mix_r, mix_o, mix_u,
    O: tl.constexpr, U: tl.constexpr, K: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """z and d_mix for GROUP outputs of one term and BC columns of a share of the tokens.

    ``v`` and ``z (RANK, T, O, K)``, ``d_mix (shares, tiles, RANK, O, U)``. z may be None, and so
    may v with d_mix.
    """
    tile, part = tl.program_id(0), tl.program_id(2).to(tl.int64)
    GROUPS: tl.constexpr = (O + GROUP - 1) // GROUP
    k, first = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS * GROUP
    c = tile * BC
    cs = c + tl.arange(0, BC)[None, :]
    sums = ()  # per entry: the sum over threads happens once, at the end
    for _ in tl.static_range(GROUP * U if d_mix is not None else 0):
        sums = sums + (tl.zeros((BT, BC), tl.float32),)
    for t in range(0, share, BT):
        rows = part * share + t + tl.arange(0, BT)
        live = (rows < rows_total) & (t + tl.arange(0, BT) < share)
        inside = live[:, None] & (cs < K)
        vectors = load_each(x, rows * (K * U), live, c, K, U, U_, INNER, BT, BC)
        old = sums
        sums = ()
        for g in tl.static_range(GROUP):
            o = first + g
            where = ((k.to(tl.int64) * rows_total + rows[:, None]) * O + o) * K + cs
            mask = inside & (o < O)
            if z is not None:
                out = tl.zeros((BT, BC), tl.float32)
                for u in tl.static_range(U):
                    m = load_mix(mix, k, o, u, mix_r, mix_o, mix_u, O, U)
                    out += vectors[u].to(tl.float32) * m
                tl.store(z + where, out.to(z.dtype.element_ty), mask=mask)
            if d_mix is not None:
                one = tl.load(v + where, mask=mask, other=0.0).to(tl.float32)
                for u in tl.static_range(U):
                    sums = sums + (old[g * U + u] + one * vectors[u].to(tl.float32),)
    if d_mix is not None:
        terms = tl.num_programs(1) // GROUPS
        start = (part * tl.num_programs(0) + tile) * terms + k
        for g in tl.static_range(GROUP):
            for u in tl.static_range(U):
                where = d_mix + (start * O + first + g) * U + u
                tl.store(where, tl.sum(tl.sum(sums[g * U + u], 1), 0), mask=first + g < O)


@triton.jit
def factor_gradients_kernel(
    dy, x, mix, dot, d_mix, d_dot, rows_total, share,
    mix_r, mix_o, mix_u, dot_r, dot_d, dot_c,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Both gradients for a tile of dot and a share of the tokens, with the mix on tensor cores.

    ``d_dot (shares, RANK, N, K)``, ``d_mix (shares, tiles, RANK, O, U)``; either may be None.
    """
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
        sum_mix = tl.zeros((BT, O_, U_), tl.float32)  # summed over tokens once, at the end

    for t in tl.range(0, share, BT, num_stages=STAGES):
        rows = part * share + t + tl.arange(0, BT)
        live = (rows < rows_total) & (t + tl.arange(0, BT) < share)
        right = load_rows(dy, rows * (N * O), live, d, N, O, O_, INNER, BT, BN)
        vectors = load_vectors(x, rows * (K * U), live, c, K, U, U_, INNER, BT, BC)
        if d_dot is not None:
            z = mix_by_dot(vectors, mix, k, mix_r, mix_o, mix_u, U, O, U_, O_, PRECISION, BT, BC)
            sum_dot = tl.dot(tl.trans(right), z, sum_dot, input_precision=PRECISION)
        if d_mix is not None:
            v = tl.dot(right, factor, input_precision=PRECISION).to(x.dtype.element_ty)
            v = tl.reshape(v, (BT, O_, BC))
            sum_mix = tl.dot(v, vectors, sum_mix, input_precision=PRECISION)

    if d_dot is not None:
        where = d_dot + (part * RANK + k) * (N * K) + ds[:, None] * K + cs[None, :]
        tl.store(where, sum_dot, mask=(ds[:, None] < N) & (cs[None, :] < K))
    if d_mix is not None:
        where = d_mix + ((part * tl.num_programs(0) + tile) * RANK + k) * (O * U)
        inside = (os[:, None] < O) & (us[None, :] < U)
        tl.store(where + os[:, None] * U + us[None, :], tl.sum(sum_mix, 0), mask=inside)
