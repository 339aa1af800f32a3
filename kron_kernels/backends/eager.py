"""The portable backend, in PyTorch's own operations: any device, any dtype.

``plain_matmul`` is one differentiable expression, which compilers and exporters trace.
``kron_matmul`` and ``kron_matmul_backward`` compute the same for two factors in chunks of tokens.
Read ``x (tokens, n1, n2)``. Either factor may be contracted first, and A, which contracts the
middle axis, is applied in one of two ways:

``batched``  a product per token, ``A @ Z[t]``, on views: no copies, but a narrow Z[t] (two columns
             for the paper's attention) starves the GEMM.
``planes``   one large GEMM over all tokens, on a copy with the middle axis last: the planes
             ``(n2, tokens, n1)``. A GEMM with B reads or writes planes for free by transposing an
             operand, so each form has exactly one copy.

A low-rank weight, ``A (r, m, 1) ⊗ B (r, 1, n)``, needs neither: a third layout takes all its terms
at once, in two GEMMs (T = 128, 3072 x 768, r = 16: 0.37 ms instead of 2.1 term by term).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels.checks import Activation, Layer
from kron_kernels.shapes import KronShape, Order, contraction_order, sizes

# On a CPU, tokens are processed in chunks whose operands and results stay in the cache, as large
# temporaries cost page faults: 1.1x to 1.5x faster at 1024 tokens of width 768, from 1 to 4 MB.
_CHUNK_BYTES = 2**22

# Costs, in multiply-adds of a large GEMM. benchmarks/eager_forms.py measures how far the form
# chosen with these numbers is from the best one.
_COPY = 40  # per element of the copy into or out of planes
_NARROW = 12  # a batched product of q columns runs at q / (q + _NARROW) of the large GEMM's rate
_BATCH = 2000  # per batched product

# Neighbouring factors are multiplied out while the product's sides stay within this.
_MERGED = 64

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def epilogue(y: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
    """``act(y) + residual``."""
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def plain_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (…, n)`` and ``(r, m_i, n_i)``; differentiable."""
    operands: Sequence[Tensor] = [_compute(t) for t in (x, *factors)]
    wide, fs = operands[0], operands[1:]
    if len(fs) > 2:
        fs = merge_small(fs)
    # Not a match statement: the compiler of torch 2.10 does not know it.
    if len(fs) == 1:
        y = F.linear(wide, fs[0].sum(0))
    elif len(fs) == 2:
        a, b = fs
        s = KronShape.of(a, b)
        contract = _CONTRACT[choose_form(s)]
        if x.ndim == 2:
            y = contract(wide, a, b, s)
        else:
            rows = wide.flatten(0, -2) if x.ndim > 1 else wide[None]
            y = contract(rows, a, b, s).view(*x.shape[:-1], s.out_features)
    else:
        terms = zip(*(f.unbind() for f in fs), strict=True)
        first, *others = (_one_term(wide, term) for term in terms)
        y = sum(others, first)
    if bias is not None:
        y = y + bias
    return epilogue(y if y.dtype == x.dtype else y.to(x.dtype), activation, residual)


def _one_term(x: Tensor, term: tuple[Tensor, ...]) -> Tensor:
    """Contract one axis after another."""
    sides = [sizes(f) for f in term]
    axes = [n for _, n in sides]
    lead = x.shape[:-1]
    for i in contraction_order(sides):
        inner = prod(axes[i + 1 :])
        x = x.reshape(*lead, prod(axes[:i]), axes[i], inner)
        x = x.squeeze(-1) @ term[i].t() if inner == 1 else term[i] @ x
        axes[i] = sides[i][0]
    return x.reshape(*lead, prod(axes))


def merge_small(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Fewer, larger factors of the same product, since GEMMs with sides below 64 are slow."""
    merged = [factors[0]]
    for f in factors[1:]:
        last = merged[-1]
        (_, m, n), (_, p, q) = sizes(last), sizes(f)
        if max(m * p, n * q) <= _MERGED:
            blocks = last[:, :, None, :, None] * f[:, None, :, None, :]  # (r, m, m', n, n')
            merged[-1] = blocks.flatten(3, 4).flatten(1, 2)
        else:
            merged.append(f)
    return merged


class Form(NamedTuple):
    """How two factors are contracted."""

    order: Order
    layout: str  # "batched", "planes", or "low_rank" for a low-rank weight


# The forms of every shape.
FORMS = tuple(Form(o, lay) for o in ("b_first", "a_first") for lay in ("batched", "planes"))


def cost(s: KronShape, form: Form) -> float:
    """Expected time per token, in multiply-adds of a large GEMM."""
    b_first = form.order == "b_first"
    columns = s.m2 if b_first else s.n2  # columns that A multiplies
    work = s.multiply_adds(form.order)
    if form.layout == "planes":
        return work + _COPY * (s.out_features if b_first else s.in_features)
    by_a = s.rank * s.m1 * s.n1 * columns
    return work + by_a * _NARROW / columns + s.rank * _BATCH


def choose_form(s: KronShape) -> Form:
    """The form of least cost."""
    # A compiler traces through the cache and warns.
    return _cheapest(s) if torch.compiler.is_compiling() else _cached_cheapest(s)


def _cheapest(s: KronShape) -> Form:
    if s.is_low_rank:
        return Form(s.order, "low_rank")
    costs = [cost(s, form) for form in FORMS]
    return FORMS[costs.index(min(costs))]


_cached_cheapest = lru_cache(maxsize=4096)(_cheapest)


def why_not(x: Tensor, *factors: Tensor) -> str | None:
    """None: eager serves every call."""
    return None


def describe(x: Tensor, *factors: Tensor) -> str:
    """The order and the layout of the products, and their FLOPs."""
    merged = merge_small(factors) if len(factors) > 2 else factors
    if len(merged) != 2:
        sides = " ⊗ ".join(f"{f.shape[1]}x{f.shape[2]}" for f in merged)
        return f"one product per axis of {sides}"
    s = KronShape.of(*merged)
    if s.is_low_rank:
        return (
            f'low rank, {s.rank}: two GEMMs over all tokens, which "auto" takes; '
            f"{s.flops:,} FLOPs per token"
        )
    form = choose_form(s)
    first, then = ("B", "A") if form.order == "b_first" else ("A", "B")
    layout = "one GEMM over all tokens" if form.layout == "planes" else "a batched product"
    return f"{first} first, then {then}; A by {layout}; {s.flops:,} FLOPs per token"


def kron_matmul(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    form: Form | None = None,
) -> Tensor:
    """``act(x Wᵀ + bias) + residual`` of ``x (…, n)`` and two factors; no autograd.

    The bias is added while a chunk of y is still in the cache.
    """
    a, b = factors
    s = KronShape.of(a, b)
    y = x.new_empty(*x.shape[:-1], s.out_features)
    contract = _CONTRACT[form or choose_form(s)]
    a, b = _compute(a), _compute(b)
    for x_part, y_part in _chunks(s, _rows(x.contiguous()), _rows(y)):
        if x_part.dtype == a.dtype:
            contract(x_part, a, b, s, out=y_part)
            if bias is not None:
                y_part += bias
        else:
            wide = contract(_compute(x_part), a, b, s)
            y_part.copy_(wide if bias is None else wide.add_(bias))
    return epilogue(y, activation, residual)


def kron_qkv(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """``x Wᵀ + bias`` of each ``(a, b, bias)``."""
    return [kron_matmul(x, (a, b), bias) for a, b, bias in layers]


def fuses(up: Layer, down: Layer) -> bool:
    """False: a block is two products, and so are its gradients."""
    return False


def kron_feed_forward(
    x: Tensor, up: Layer, activation: Activation, down: Layer, residual: Tensor | None
) -> Tensor:
    """``down(act(up(x))) + residual`` of ``(a, b, bias)`` each, x ``(…, n)``."""
    hidden = kron_matmul(x, up[:2], up[2], activation)
    return kron_matmul(hidden, down[:2], down[2], None, residual)


def kron_feed_forward_backward(
    dy: Tensor, x: Tensor, up: Layer, activation: Activation, down: Layer, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Never called, as ``fuses`` is False."""
    raise NotImplementedError("eager differentiates the two products of a block.")


def fits_one_chunk(x: Tensor, s: KronShape) -> bool:
    """Whether ``kron_matmul`` would not split x, so ``plain_matmul`` is as fast."""
    return x.device.type != "cpu" or x.numel() <= _chunk_tokens(s, x.element_size()) * x.shape[-1]


def _compute(t: Tensor) -> Tensor:
    """Contiguous, and in float32 for 16 bits on a CPU: one rounding, at the end, instead of two.

    A float16 GEMM ran at 14 GFLOP/s, float32 at 62 and bfloat16, which has instructions, at 166
    (AVX-512, one thread); older CPUs are slow in bfloat16 as well.
    """
    narrow = t.dtype in (torch.float16, torch.bfloat16) and t.device.type == "cpu"
    return (t.float() if narrow else t).contiguous()


def _rows(t: Tensor) -> Tensor:
    return t if t.ndim == 2 else t.view(-1, t.shape[-1])


def _chunk_tokens(s: KronShape, itemsize: int) -> int:
    middle = s.rank * (s.n1 * s.m2 if choose_form(s).order == "b_first" else s.m1 * s.n2)
    return max(32, _CHUNK_BYTES // ((s.in_features + s.out_features + middle) * itemsize))


def _chunks(s: KronShape, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of tokens that fit a CPU's cache, the same tokens of every argument."""
    step = _chunk_tokens(s, rows[0].element_size())
    if fits_one_chunk(rows[0], s):
        yield rows
        return
    for start in range(0, rows[0].shape[0], step):
        yield tuple(r[start : start + step] for r in rows)


def _b_batched(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    t = x.shape[0]
    z = torch.mm(x.view(t * s.n1, s.n2), b.view(s.rank * s.m2, s.n2).t())
    out = out if out is None else out.view(t, s.m1, s.m2)
    if s.rank == 1:  # fewer views, which count at a single token
        y = torch.bmm(a.expand(t, s.m1, s.n1), z.view(t, s.n1, s.m2), out=out)
        return y.view(t, s.out_features)
    z = z.view(t, s.n1, s.rank, s.m2)
    y = torch.bmm(a[0].expand(t, s.m1, s.n1), z[:, :, 0], out=out)
    # Here and below not in place without an `out`: vmap does not allow it.
    for k in range(1, s.rank):
        y = torch.baddbmm(y, a[k].expand(t, s.m1, s.n1), z[:, :, k], out=out)
    return y.view(t, s.out_features)


def _a_batched(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    t = x.shape[0]
    x = x.view(t, s.n1, s.n2)
    out = out if out is None else out.view(t * s.m1, s.m2)

    def mixed(k: int) -> Tensor:
        return torch.bmm(a[k].expand(t, s.m1, s.n1), x).view(t * s.m1, s.n2)

    y = torch.mm(mixed(0), b[0].t(), out=out)
    for k in range(1, s.rank):
        y = torch.addmm(y, mixed(k), b[k].t(), out=out)
    return y.view(t, s.out_features)


def _b_planes(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    t = x.shape[0]
    z = torch.mm(b.view(s.rank * s.m2, s.n2), x.view(t * s.n1, s.n2).t())
    z = z.view(s.rank, s.m2 * t, s.n1)
    y = torch.mm(z[0], a[0].t())  # (m2 * t, m1)
    for k in range(1, s.rank):
        y = torch.addmm(y, z[k], a[k].t())
    y = y.view(s.m2, t, s.m1).permute(1, 2, 0)
    if out is None:
        return y.reshape(t, s.out_features)
    out.view(t, s.m1, s.m2).copy_(y)
    return out


def _a_planes(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    t = x.shape[0]
    x = _planes(x, s.n1, s.n2)
    out = out if out is None else out.view(t * s.m1, s.m2)

    def mixed(k: int) -> Tensor:
        return torch.mm(x, a[k].t()).view(s.n2, t * s.m1).t()

    y = torch.mm(mixed(0), b[0].t(), out=out)
    for k in range(1, s.rank):
        y = torch.addmm(y, mixed(k), b[k].t(), out=out)
    return y.view(t, s.out_features)


def _b_low_rank(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    z = torch.mm(x, b.view(s.rank, s.n2).t())
    return torch.mm(z, a.view(s.rank, s.m1), out=out)


def _a_low_rank(x: Tensor, a: Tensor, b: Tensor, s: KronShape, out: Tensor | None = None) -> Tensor:
    return _b_low_rank(x, b, a, s.swapped, out)


_CONTRACT = {
    **dict(zip(FORMS, (_b_batched, _b_planes, _a_batched, _a_planes), strict=True)),
    Form("b_first", "low_rank"): _b_low_rank,
    Form("a_first", "low_rank"): _a_low_rank,
}


def _planes(x: Tensor, p: int, q: int) -> Tensor:
    """``(t, p * q)`` with the first of the two axes last: ``(q * t, p)``."""
    return x.view(-1, p, q).permute(2, 0, 1).reshape(-1, p)


# --- gradients

Needed = Sequence[bool]  # whether of x, a and b
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def kron_matmul_backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    needed: Sequence[bool],
    form: Form | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, an empty tensor for one that is not needed; no autograd.

    With V_k = A_kᵀ dY and Z_k = X B_kᵀ (``b_first``): dX = Σ V_k B_k, dA_k = Σ_t dY Z_kᵀ,
    dB_k = Σ_t V_kᵀ X. With U_k = dY B_k and Z_k = A_k X (``a_first``): dX = Σ A_kᵀ U_k,
    dA_k = Σ_t U_k Xᵀ, dB_k = Σ_t dYᵀ Z_k. Z is recomputed, not saved. Sums over tokens run in
    order, and in float32 for 16-bit dtypes.
    """
    s = KronShape.of(a, b)
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    sums = torch.float32 if narrow else x.dtype
    dx = x.new_empty(x.shape if needed[0] else 0)
    da = a.new_zeros(a.shape if needed[1] else 0, dtype=sums)
    db = b.new_zeros(b.shape if needed[2] else 0, dtype=sums)
    differentiate = _DIFFERENTIATE[form or choose_form(s)]
    wide_a, wide_b = _compute(a), _compute(b)
    rows = (dy.contiguous(), x.contiguous(), *((dx,) if needed[0] else ()))
    for dy_part, x_part, *dx_part in _chunks(s, *rows):
        of_x, of_a, of_b = differentiate(
            _compute(dy_part), _compute(x_part), wide_a, wide_b, needed, s
        )
        if of_x is not None:
            dx_part[0].view(of_x.shape).copy_(of_x)
        if of_a is not None:
            da += of_a
        if of_b is not None:
            db += of_b
    return dx, da.to(a.dtype), db.to(b.dtype)


def _b_batched_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    t = dy.shape[0]
    dy, x = dy.view(t, s.m1, s.m2), x.view(t * s.n1, s.n2)
    dx, das, dbs = None, [], []
    for a_k, b_k in zip(a, b, strict=True):
        if needed[0] or needed[2]:
            v = torch.bmm(a_k.mT.expand(t, s.n1, s.m1), dy).view(t * s.n1, s.m2)
        if needed[0]:
            dx = v @ b_k if dx is None else dx.addmm_(v, b_k)
        if needed[1]:
            das.append(_sum_of_products(dy, (x @ b_k.mT).view(t, s.n1, s.m2)))
        if needed[2]:
            dbs.append(v.mT @ x)
    return dx, _stack(das), _stack(dbs)


def _a_batched_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    t = dy.shape[0]
    dy, x = dy.view(t * s.m1, s.m2), x.view(t, s.n1, s.n2)
    dx, das, dbs = None, [], []
    for a_k, b_k in zip(a, b, strict=True):
        if needed[0] or needed[1]:
            u = (dy @ b_k).view(t, s.m1, s.n2)
        if needed[0]:
            a_t = a_k.mT.expand(t, s.n1, s.m1)
            dx = torch.bmm(a_t, u) if dx is None else dx.baddbmm_(a_t, u)
        if needed[1]:
            das.append(_sum_of_products(u, x))
        if needed[2]:
            z = torch.bmm(a_k.expand(t, s.m1, s.n1), x)
            dbs.append(dy.mT @ z.view(t * s.m1, s.n2))
    return dx, _stack(das), _stack(dbs)


def _b_planes_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    t = dy.shape[0]
    dy, x = _planes(dy, s.m1, s.m2), x.view(t * s.n1, s.n2)  # (m2 * t, m1)
    dx, das, dbs = None, [], []
    for a_k, b_k in zip(a, b, strict=True):
        if needed[0] or needed[2]:
            v = (dy @ a_k).view(s.m2, t * s.n1)
        if needed[0]:
            dx = v.mT @ b_k if dx is None else dx.addmm_(v.mT, b_k)
        if needed[1]:
            das.append(dy.mT @ (b_k @ x.mT).view(s.m2 * t, s.n1))
        if needed[2]:
            dbs.append(v @ x)
    return dx, _stack(das), _stack(dbs)


def _a_planes_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    t = dy.shape[0]
    dy, x = dy.view(t * s.m1, s.m2), _planes(x, s.n1, s.n2)  # (n2 * t, n1)
    dx, das, dbs = None, [], []
    for a_k, b_k in zip(a, b, strict=True):
        if needed[0] or needed[1]:
            u = (b_k.mT @ dy.mT).view(s.n2 * t, s.m1)
        if needed[0]:
            dx = u @ a_k if dx is None else dx.addmm_(u, a_k)
        if needed[1]:
            das.append(u.mT @ x)
        if needed[2]:
            dbs.append(dy.mT @ (x @ a_k.mT).view(s.n2, t * s.m1).mT)
    if dx is not None:
        dx = dx.view(s.n2, t, s.n1).permute(1, 2, 0)
    return dx, _stack(das), _stack(dbs)


def _b_low_rank_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    up, down = a.view(s.rank, s.m1), b.view(s.rank, s.n2)
    if needed[0] or needed[2]:
        v = dy @ up.mT
    dx = v @ down if needed[0] else None
    da = ((x @ down.mT).mT @ dy).view_as(a) if needed[1] else None
    db = (v.mT @ x).view_as(b) if needed[2] else None
    return dx, da, db


def _a_low_rank_grads(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, needed: Needed, s: KronShape
) -> Grads:
    dx, db, da = _b_low_rank_grads(dy, x, b, a, (needed[0], needed[2], needed[1]), s.swapped)
    return dx, da, db


_DIFFERENTIATE = dict(
    zip(
        _CONTRACT,
        (
            _b_batched_grads,
            _b_planes_grads,
            _a_batched_grads,
            _a_planes_grads,
            _b_low_rank_grads,
            _a_low_rank_grads,
        ),
        strict=True,
    )
)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_t left[t] @ right[t]ᵀ`` of ``(t, m, q)`` and ``(t, n, q)``."""
    m, n, q = left.shape[1], right.shape[1], left.shape[2]
    if m * n <= (m + n) * q:  # the products per token are smaller than the copies for one GEMM
        return torch.bmm(left, right.mT).sum(0)
    return torch.einsum("tmq,tnq->mn", left, right)


def _stack(terms: list[Tensor]) -> Tensor | None:
    return torch.stack(terms) if terms else None
