"""Rows of ``Σ_k A_k ⊗ b_k`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embedding_kernel(
    ids, a, b, y, tokens, a_r, a_v, a_j, b_r, b_p,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    SIZE_: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """``y[t, j, p] = Σ_k a[k, ids[t], j] b[k, p]``; NaN for an id out of range."""
    ts = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    js, ps = tl.program_id(1) * BJ + tl.arange(0, BJ), tl.arange(0, SIZE_)
    live = ts < tokens
    row = tl.load(ids + ts, mask=live, other=0).to(tl.int64)
    known = (row >= 0) & (row < ROWS)
    inside = (live & known)[:, None] & (js < COLUMNS)[None, :]
    out = tl.zeros((BT, BJ, SIZE_), tl.float32)
    for k in tl.static_range(RANK):
        where = a + k * a_r + row[:, None] * a_v + js[None, :] * a_j
        left = tl.load(where, mask=inside, other=float("nan")).to(tl.float32)
        right = tl.load(b + k * b_r + ps * b_p, mask=ps < SIZE, other=0.0).to(tl.float32)
        out += left[:, :, None] * right[None, None, :]
    out = out.to(y.dtype.element_ty)
    start = ts * (COLUMNS * SIZE)
    if SIZE == SIZE_:  # one contiguous piece
        es = tl.program_id(1) * (BJ * SIZE) + tl.arange(0, BJ * SIZE)[None, :]
        inside = live[:, None] & (es < COLUMNS * SIZE)
        tl.store(y + start[:, None] + es, tl.reshape(out, (BT, BJ * SIZE)), mask=inside)
    else:
        es = js[None, :, None] * SIZE + ps[None, None, :]
        inside = live[:, None, None] & (js < COLUMNS)[None, :, None] & (ps < SIZE)[None, None, :]
        tl.store(y + start[:, None, None] + es, out, mask=inside)
