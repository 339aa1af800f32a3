"""A feed-forward block in Triton whose hidden vector exists in registers only.

``up = A (H, U) ⊗ B (N, K)`` is contracted from the right and ``down = A' (P, H) ⊗ B' (M, N)`` from
the left, so both see the hidden vector as a grid (H, N). Column d of the grid is a mix of the U
numbers ``z_u[d] = Σ_c B[d, c] x_u[c]``, and ``down`` mixes it into P numbers:

    v_p[d] = Σ_h A'[p, h] act(Σ_u A[h, u] z_u[d] + bias[h, d]).

For a block of tokens the kernel computes z by a product, loops over h in registers, and passes v to
the next product. None of z, v and the hidden vector is ever in memory. The backward recomputes
them. It writes v and the gradient of z, which are H / P and H / U times shorter than the hidden
vector: the gradients of B, B' and x are plain products of these. ``blocks`` defines the terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kron_kernels.backends.triton.blocks import (
    activate,
    activate_with_slope,
    load_dot,
    load_mix,
    load_rows,
    split_rows,
)
from kron_kernels.backends.triton.forward import store_tile


@triton.jit
def feed_forward_kernel(
    x, a1, b1, bias1, a2, b2, bias2, residual, y, gamma, beta, epsilon, rows_total,
    a1_r, a1_o, a1_u, b1_r, b1_d, b1_c, a2_r, a2_o, a2_u, b2_r, b2_d, b2_c,
    R1: tl.constexpr, R2: tl.constexpr, H: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, U_: tl.constexpr, P_: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``x (T, U * K)`` to ``y (T, P * M)``; ranks R1 and R2, BM columns of y at a time.

    With gamma, y is normalised: a program has whole rows of it.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = rows < rows_total
    x_offsets, y_offsets = rows * (U * K), rows * (P * M)
    HIDDEN_TILES: tl.constexpr = (N + BN - 1) // BN
    OUT_TILES: tl.constexpr = (M + BM - 1) // BM

    zs = ()  # hidden tile i and term k: i * R1 + k
    for _ in tl.static_range(HIDDEN_TILES * R1):
        zs = zs + (tl.zeros((BT * U_, BN), tl.float32),)
    for c in tl.range(0, K, BC, num_stages=STAGES):
        left = load_rows(x, x_offsets, live, c, K, U, U_, False, BT, BC)
        old = zs
        zs = ()
        for i in tl.static_range(HIDDEN_TILES * R1):
            right = load_dot(b1, i % R1, c, i // R1 * BN, b1_r, b1_d, b1_c, K, N, BC, BN)
            zs = zs + (tl.dot(left, right, old[i], input_precision=PRECISION),)

    sums = ()
    for _ in tl.static_range(OUT_TILES):
        sums = sums + (tl.zeros((BT * P_, BM), tl.float32),)
    vectors = ()
    for i in tl.static_range(HIDDEN_TILES * R1):
        vectors = vectors + split_rows(zs[i], U_)
    vs = contract_hidden(
        vectors, a1, bias1, a2, a1_r, a1_o, a1_u, a2_r, a2_o, a2_u,
        R1, R2, H, U, P, N, U_, P_, ACTIVATION, BT, BN, HIDDEN_TILES,
    )  # fmt: skip
    for i in tl.static_range(HIDDEN_TILES * R2):
        left = tl.reshape(vs[i], (BT * P_, BN)).to(x.dtype.element_ty)
        old = sums
        sums = ()
        for j in tl.static_range(OUT_TILES):
            right = load_dot(b2, i % R2, i // R2 * BN, j * BM, b2_r, b2_d, b2_c, N, M, BN, BM)
            sums = sums + (tl.dot(left, right, old[j], input_precision=PRECISION),)
    if gamma is not None:
        normalise_and_store(
            sums, bias2, residual, y, gamma, beta, epsilon, y_offsets, live,
            P, M, P_, BT, BM, OUT_TILES,
        )  # fmt: skip
    else:
        for j in tl.static_range(OUT_TILES):
            store_tile(
                tl.reshape(sums[j], (BT, P_, BM)), bias2, residual, y, y_offsets, live, j * BM,
                P, M, P_, False, None, BT, BM,
            )  # fmt: skip


@triton.jit
def normalise_and_store(
    sums, bias, residual, y, gamma, beta, epsilon, offsets, live,
    P: tl.constexpr, M: tl.constexpr, P_: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``LayerNorm(sums + bias + residual)`` of rows ``(BT, P * M)`` in tiles of BM columns."""
    ps = tl.arange(0, P_)[None, :, None]
    outs = ()
    total = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(TILES):
        ms = j * BM + tl.arange(0, BM)[None, None, :]
        e, inside = ps * M + ms, (ms < M) & (ps < P)
        out = tl.reshape(sums[j], (BT, P_, BM))
        if bias is not None:
            out += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            where = residual + offsets[:, None, None] + e
            mask = live[:, None, None] & inside
            out += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        out = tl.where(inside, out, 0.0)
        outs = outs + (out,)
        total += tl.sum(tl.sum(out, 2), 1)
    mean = (total / (P * M))[:, None, None]
    squares = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(TILES):
        ms = j * BM + tl.arange(0, BM)[None, None, :]
        far = tl.where((ms < M) & (ps < P), outs[j] - mean, 0.0)
        squares += tl.sum(tl.sum(far * far, 2), 1)
    scale = (1.0 / tl.sqrt(squares / (P * M) + epsilon))[:, None, None]
    for j in tl.static_range(TILES):
        ms = j * BM + tl.arange(0, BM)[None, None, :]
        e, inside = ps * M + ms, (ms < M) & (ps < P)
        out = (outs[j] - mean) * scale * tl.load(gamma + e, mask=inside, other=0.0).to(tl.float32)
        if beta is not None:
            out += tl.load(beta + e, mask=inside, other=0.0).to(tl.float32)
        where = y + offsets[:, None, None] + e
        tl.store(where, out.to(y.dtype.element_ty), mask=live[:, None, None] & inside)


@triton.jit
def hidden_row(
    vectors, first, ms, h, d, bias1, TERMS: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns d … d + BN of row h of the hidden grid, before the activation.

    A sum over TERMS vectors, from ``first`` on, weighted by the entries ``ms`` of up's mix.
    """
    row = tl.zeros((BT, BN), tl.float32)
    for j in tl.static_range(TERMS):
        row += vectors[first + j] * ms[j]
    if bias1 is not None:
        ds = d + tl.arange(0, BN)[None, :]
        row += tl.load(bias1 + h * N + ds, mask=ds < N, other=0.0).to(tl.float32)
    return row


@triton.jit
def mix_row(a1, h, a1_r, a1_o, a1_u, R1: tl.constexpr, H: tl.constexpr, U: tl.constexpr,
            U_: tl.constexpr):  # fmt: skip
    """Row h of up's mix, for all terms, as a tuple of numbers."""
    ms = ()
    for j in tl.static_range(R1 * U_):
        ms = ms + (load_mix(a1, j // U_, h, j % U_, a1_r, a1_o, a1_u, H, U),)
    return ms


@triton.jit
def contract_hidden(
    vectors, a1, bias1, a2, a1_r, a1_o, a1_u, a2_r, a2_o, a2_u,
    R1: tl.constexpr, R2: tl.constexpr, H: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, U_: tl.constexpr, P_: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``v_k,p[d]`` as ``(BT, P_, BN)``, for each tile of columns and each term k of down."""
    ps = tl.arange(0, P_)
    vs = ()
    for _ in tl.static_range(TILES * R2):
        vs = vs + (tl.zeros((BT, P_, BN), tl.float32),)
    for h in range(H):
        ms = mix_row(a1, h, a1_r, a1_o, a1_u, R1, H, U, U_)
        downs = ()
        for k in tl.static_range(R2):
            downs = downs + (load_mix(a2, k, ps, h, a2_r, a2_o, a2_u, P, H),)
        old = vs
        vs = ()
        for i in tl.static_range(TILES):
            row = hidden_row(vectors, i * R1 * U_, ms, h, i * BN, bias1, R1 * U_, N, BT, BN)
            row = activate(row, ACTIVATION)[:, None, :]
            for k in tl.static_range(R2):
                vs = vs + (old[i * R2 + k] + row * downs[k][None, :, None],)
    spread = ()
    for i in tl.static_range(TILES * R2):  # keeps the product's layout out, as in mix_each
        spread = spread + (tl.sum(vs[i][:, :, :, None], 3),)
    return spread


@triton.jit
def feed_forward_backward_kernel(
    dy, x, a1, b1, bias1, a2, b2, v_out, dz_out, d_a1, d_bias1, d_a2, rows_total,
    a1_r, a1_o, a1_u, b1_r, b1_d, b1_c, a2_r, a2_o, a2_u, b2_r, b2_d, b2_c,
    R1: tl.constexpr, R2: tl.constexpr, H: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, U_: tl.constexpr, P_: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each block of tokens and BN columns of the hidden grid.

    Writes ``v_out (R2, T, P, N)`` and ``dz_out (R1, T, U, N)``; sums over its tokens to
    ``d_bias1 (blocks, H, N)``; and sums over its tokens and columns to
    ``d_a1 (R1, blocks, columns, H, U)`` and ``d_a2 (R2, blocks, columns, P, H)``. The last three
    may be None.
    """
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * BT + tl.arange(0, BT)
    live = rows < rows_total
    d = tile * BN
    ds = d + tl.arange(0, BN)[None, :]
    inside = live[:, None] & (ds < N)
    x_offsets, dy_offsets = rows * (U * K), rows * (P * M)

    zs, dvs = (), ()
    for _ in tl.static_range(R1):
        zs = zs + (tl.zeros((BT * U_, BN), tl.float32),)
    for _ in tl.static_range(R2):
        dvs = dvs + (tl.zeros((BT * P_, BN), tl.float32),)
    for c in tl.range(0, K, BC, num_stages=STAGES):
        left = load_rows(x, x_offsets, live, c, K, U, U_, False, BT, BC)
        old = zs
        zs = ()
        for k in tl.static_range(R1):
            right = load_dot(b1, k, c, d, b1_r, b1_d, b1_c, K, N, BC, BN)
            zs = zs + (tl.dot(left, right, old[k], input_precision=PRECISION),)
    for e in tl.range(0, M, BM, num_stages=STAGES):
        left = load_rows(dy, dy_offsets, live, e, M, P, P_, False, BT, BM)
        old = dvs
        dvs = ()
        for k in tl.static_range(R2):
            right = load_dot(b2, k, e, d, b2_r, b2_c, b2_d, M, N, BM, BN)
            dvs = dvs + (tl.dot(left, right, old[k], input_precision=PRECISION),)
    z, dv, dz, v = (), (), (), ()
    for k in tl.static_range(R1):
        z = z + split_rows(zs[k], U_)
    for k in tl.static_range(R2):
        dv = dv + split_rows(dvs[k], P_)
    for _ in tl.static_range(R1 * U_):
        dz = dz + (tl.zeros((BT, BN), tl.float32),)
    for _ in tl.static_range(R2 * P_):
        v = v + (tl.zeros((BT, BN), tl.float32),)

    part = block * tl.num_programs(1) + tile
    parts = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    for h in range(H):
        ups = mix_row(a1, h, a1_r, a1_o, a1_u, R1, H, U, U_)
        row = hidden_row(z, 0, ups, h, d, bias1, R1 * U_, N, BT, BN)
        row, slope = activate_with_slope(row, ACTIVATION)
        row = tl.where(inside, row, 0.0)  # rows beyond the tokens must not be summed
        grad = tl.zeros((BT, BN), tl.float32)
        old = v
        v = ()
        for j in tl.static_range(R2 * P_):
            m = load_mix(a2, j // P_, j % P_, h, a2_r, a2_o, a2_u, P, H)
            grad += dv[j] * m
            v = v + (old[j] + row * m,)
            if d_a2 is not None and j % P_ < P:
                where = d_a2 + ((j // P_ * parts + part) * P + j % P_) * H + h
                tl.store(where, tl.sum(tl.sum(dv[j] * row, 1), 0))
        grad = tl.where(inside, grad * slope, 0.0)
        old = dz
        dz = ()
        for j in tl.static_range(R1 * U_):
            dz = dz + (old[j] + grad * ups[j],)
            if d_a1 is not None and j % U_ < U:
                where = d_a1 + ((j // U_ * parts + part) * H + h) * U + j % U_
                tl.store(where, tl.sum(tl.sum(z[j] * grad, 1), 0))
        if d_bias1 is not None:
            column = tl.sum(grad, 0)
            es = d + tl.arange(0, BN)
            tl.store(d_bias1 + (block * H + h) * N + es, column, mask=es < N)

    for j in tl.static_range(R2 * P_):
        if j % P_ < P:
            where = (tl.full((), j // P_, tl.int64) * rows_total + rows) * (P * N) + j % P_ * N
            tl.store(v_out + where[:, None] + ds, v[j].to(v_out.dtype.element_ty), mask=inside)
    for j in tl.static_range(R1 * U_):
        if j % U_ < U:
            where = (tl.full((), j // U_, tl.int64) * rows_total + rows) * (U * N) + j % U_ * N
            tl.store(dz_out + where[:, None] + ds, dz[j].to(dz_out.dtype.element_ty), mask=inside)
