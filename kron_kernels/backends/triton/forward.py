"""``y = act(x Wᵀ + bias) + residual`` in one Triton kernel; ``blocks`` defines the terms.

A program computes TILES tiles of BN entries of every output vector, for a block of BT tokens. It
reads the input once, BC entries of every input vector in a step, and accumulates the outputs if the
mix comes first, otherwise the vectors to be mixed. If one program computes all of N, x is read once
and y is written once, for any rank. Every program reads the factors once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kron_kernels.backends.triton.blocks import (
    finish,
    load_dot,
    load_each,
    load_mix,
    load_rows,
    load_vectors,
    mix_by_dot,
    mix_each,
    split_rows,
)


@triton.jit
def kron_matmul_kernel(
    x, mixes, dots, biases, residual, ys, rows_total,
    mix_r, mix_o, mix_u, dot_r, dot_d, dot_c,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr, MIX_FIRST: tl.constexpr,
    BY_DOT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The products of x with each of ``mixes`` and ``dots``, tuples of equal shapes."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = rows < rows_total
    x_offsets = rows * (K * U)
    y_offsets = rows * (N * O)
    first = tl.program_id(1) * (TILES * BN)

    # One accumulator for each product p, tile i and, if the mix comes last, term k, at
    # (p * TILES + i) * TERMS + k.
    TERMS: tl.constexpr = 1 if MIX_FIRST else RANK
    sums = ()
    for _ in tl.static_range(len(ys) * TILES * TERMS):
        sums = sums + (tl.zeros((BT * (O_ if MIX_FIRST else U_), BN), tl.float32),)
    for c in tl.range(0, K, BC, num_stages=STAGES):
        if not MIX_FIRST:
            left = load_rows(x, x_offsets, live, c, K, U, U_, INNER, BT, BC)
        elif BY_DOT:
            vectors = load_vectors(x, x_offsets, live, c, K, U, U_, INNER, BT, BC)
        else:
            vectors = load_each(x, x_offsets, live, c, K, U, U_, INNER, BT, BC)
        new = ()
        for p in tl.static_range(len(ys)):
            parts = sums[p * TILES * TERMS : (p + 1) * TILES * TERMS]
            for k in tl.static_range(RANK):
                if MIX_FIRST and BY_DOT:
                    left = mix_by_dot(
                        vectors, mixes[p], k, mix_r, mix_o, mix_u, U, O, U_, O_, PRECISION, BT, BC
                    )
                elif MIX_FIRST:
                    left = mix_each(vectors, mixes[p], k, mix_r, mix_o, mix_u, U, O, O_, BT, BC)
                old = parts
                parts = ()
                for i in tl.static_range(len(old)):
                    if MIX_FIRST or i % TERMS == k:
                        d = first + i // TERMS * BN
                        right = load_dot(dots[p], k, c, d, dot_r, dot_d, dot_c, K, N, BC, BN)
                        parts = parts + (tl.dot(left, right, old[i], input_precision=PRECISION),)
                    else:
                        parts = parts + (old[i],)
            new = new + parts
        sums = new

    for p in tl.static_range(len(ys)):
        parts = sums[p * TILES * TERMS : (p + 1) * TILES * TERMS]
        if MIX_FIRST:
            for i in tl.static_range(TILES):
                out = tl.reshape(parts[i], (BT, O_, BN))
                if INNER:
                    out = tl.permute(out, (0, 2, 1))
                store_tile(
                    out, biases[p], residual, ys[p], y_offsets, live, first + i * BN,
                    O, N, O_, INNER, ACTIVATION, BT, BN,
                )  # fmt: skip
        elif BY_DOT:
            mix_by_dot_and_store(
                parts, mixes[p], mix_r, mix_o, mix_u, biases[p], residual, ys[p],
                y_offsets, live, first,
                RANK, O, U, N, O_, U_, INNER, ACTIVATION, PRECISION, BT, BN, TILES,
            )  # fmt: skip
        else:
            mix_and_store(
                parts, mixes[p], mix_r, mix_o, mix_u, biases[p], residual, ys[p],
                y_offsets, live, first,
                RANK, O, U, N, O_, U_, INNER, ACTIVATION, BT, BN, TILES,
            )  # fmt: skip


@triton.jit
def store_tile(
    out, bias, residual, y, offsets, live, d,
    O: tl.constexpr, N: tl.constexpr, O_: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Finish entries d … d + BN of outputs ``(BT, BN, O_)`` if INNER, else ``(BT, O_, BN)``."""
    if INNER and O == O_:  # one contiguous piece
        e = d * O + tl.arange(0, BN * O)[None, :]
        inside = live[:, None] & (e < N * O)
        out = tl.reshape(out, (BT, BN * O))
        finish(out, bias, residual, y, offsets[:, None], e, inside, N * O, ACTIVATION)
    else:
        if INNER:
            ds, os = d + tl.arange(0, BN)[None, :, None], tl.arange(0, O_)[None, None, :]
            e = ds * O + os
        else:
            ds, os = d + tl.arange(0, BN)[None, None, :], tl.arange(0, O_)[None, :, None]
            e = os * N + ds
        inside = live[:, None, None] & (ds < N) & (os < O)
        finish(out, bias, residual, y, offsets[:, None, None], e, inside, N * O, ACTIVATION)


@triton.jit
def mix_by_dot_and_store(
    parts, mix, mix_r, mix_o, mix_u, bias, residual, y, offsets, live, first,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Mix ``parts[i * RANK + k] (BT * U_, BN)`` over k and u, and finish the outputs."""
    os, us = tl.arange(0, O_)[None, :], tl.arange(0, U_)[:, None]
    for i in tl.static_range(TILES):
        out = tl.zeros((BT * BN, O_), tl.float32)
        for k in tl.static_range(RANK):
            m = load_mix(mix, k, os, us, mix_r, mix_o, mix_u, O, U).to(y.dtype.element_ty)
            z = tl.permute(tl.reshape(parts[i * RANK + k], (BT, U_, BN)), (0, 2, 1))
            z = tl.reshape(z, (BT * BN, U_)).to(y.dtype.element_ty)
            out = tl.dot(z, m, out, input_precision=PRECISION)
        out = tl.reshape(out, (BT, BN, O_))
        if not INNER:
            out = tl.permute(out, (0, 2, 1))
        store_tile(
            out, bias, residual, y, offsets, live, first + i * BN,
            O, N, O_, INNER, ACTIVATION, BT, BN,
        )  # fmt: skip


@triton.jit
def mix_and_store(
    parts, mix, mix_r, mix_o, mix_u, bias, residual, y, offsets, live, first,
    RANK: tl.constexpr, O: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
    O_: tl.constexpr, U_: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The same in registers."""
    TERMS: tl.constexpr = RANK * U_
    vectors = ()
    for i in tl.static_range(TILES * RANK):
        vectors = vectors + split_rows(parts[i], U_)
    if INNER:
        os = tl.arange(0, O_)[None, None, :]
        for i in tl.static_range(TILES):
            out = tl.zeros((BT, BN, O_), tl.float32)
            for j in tl.static_range(TERMS):
                m = load_mix(mix, j // U_, os, j % U_, mix_r, mix_o, mix_u, O, U)
                out += vectors[i * TERMS + j][:, :, None] * m
            store_tile(
                out, bias, residual, y, offsets, live, first + i * BN,
                O, N, O_, INNER, ACTIVATION, BT, BN,
            )  # fmt: skip
    else:
        for o in range(O):
            ms = ()
            for j in tl.static_range(TERMS):
                ms = ms + (load_mix(mix, j // U_, o, j % U_, mix_r, mix_o, mix_u, O, U),)
            for i in tl.static_range(TILES):
                ds = first + i * BN + tl.arange(0, BN)[None, :]
                one = tl.zeros((BT, BN), tl.float32)
                for j in tl.static_range(TERMS):
                    one += vectors[i * TERMS + j] * ms[j]
                finish(
                    one, bias, residual, y, offsets[:, None], o * N + ds,
                    live[:, None] & (ds < N), N * O, ACTIVATION,
                )  # fmt: skip
