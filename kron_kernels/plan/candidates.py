"""Candidates for a layer, with the relative squared error of its weight or its outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kron_kernels.decompose import (
    Factors,
    alternate,
    cholesky,
    dense_weight,
    nearest_kronecker,
    nearest_kronecker_sum,
    separable,
    separable_roots,
    shrunk,
    unit,
    whitened,
)
from kron_kernels.factors import Shapes
from kron_kernels.modules import linear_weight
from kron_kernels.plan.layers import Candidate, Target
from kron_kernels.plan.spectra import dropped, spectra
from kron_kernels.shapes import KronShape, divisors

_SIDES = 16  # largest side of a small factor
_B_SIZES = 32  # longest b of an embedding
_RANKS = (1, 2, 4)  # 8 took more than half of the time of calibrated plans, and was not chosen
# Compressions tried with low rank. A step of 1.5 left a plan at rank 16 where 30 fitted.
_COMPRESSIONS = [1.25 * 1.12**i for i in range(30)]  # to 33
_BASES = 3  # Kronecker products that get a low-rank part
# A larger candidate must lower the error by this share of it. Neighbours differ by less, and each
# candidate that is kept may have to be timed.
_GAIN = 0.02
# Steps of alternating least squares for the leading candidates in the separable metric, then for
# those that lead after them. On weights of MiniLM the error of 4x2 ⊗ 384x192 was 0.642 at the
# start, 0.443 after two steps, 0.417 after five and 0.407 after twenty.
_STEPS = (2, 3)
# Leading candidates on each side that get these steps. With all, 66 to 89, a layer took minutes.
_REFINED = 8
# A step solves a system of as many unknowns as the terms' larger factors have columns together. At
# 3072, four terms in MiniLM's feed-forward blocks, it took a second, and a plan seven minutes.
_WIDEST = 1536

Errors = dict[Shapes, float]


def candidates_of(target: Target, moment: Tensor | None, mix: bool) -> list[Candidate]:
    """The dense layer and its alternatives, or the decision alone.

    Args:
        target: The layer.
        moment: ``E[x xᵀ]`` of its inputs, for errors of its outputs instead of its weight.
        mix: Whether to try sums of a Kronecker product and a low-rank part.
    """
    if not target.decided and not target.inputs:
        return [target.dense]
    w = unit(linear_weight(target.layer).detach())[0].float()
    w = w / w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    if target.decision is not None:
        return [target.candidate(target.decision, _error_when_made(w, target.decision, moment))]
    groups = [_table_errors(w)] if target.is_table else _linear_errors(w, moment, mix)
    kept = [target.dense]
    for group in groups:
        candidates = [target.candidate(shapes, error) for shapes, error in group.items()]
        kept += _thinned(c for c in candidates if c.parameters < target.dense.parameters)
    return kept


def _thinned(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Drop candidates whose error is nearly matched by one with fewer parameters and FLOPs."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.parameters, c.flops, c.error, c.shapes)):
        if all(c.error < (1 - _GAIN) * k.error for k in kept if k.flops <= c.flops):
            kept.append(c)
    return kept


def _table_errors(w: Tensor) -> Errors:
    """Errors of an embedding ``w (v, d)`` as ``(v, d / b) ⊗ (1, b)``, rank 1, and of low rank."""
    rows, dim = w.shape
    products: Errors = {
        (KronShape(rows, dim // b, 1, b),): dropped(spectrum, 1)
        for (_, b), spectrum in spectra(w, "right", [1], _sides(dim, _B_SIZES))
    }
    return products | _low_rank_errors(w, rows, dim)


def _linear_errors(w: Tensor, moment: Tensor | None, mix: bool) -> list[Errors]:
    """Errors with a small left factor, with a small right one, of low rank, and of sums."""
    m, n = w.shape
    c = None if moment is None else shrunk(moment)
    half = None if c is None else cholesky(c).float()  # (n, n), half @ half.mT = C
    left, right = (_product_errors(w, side, c) for side in ("left", "right"))
    factors: dict[Shapes, Factors] = {}
    if c is not None:
        wc = w.double() @ c
        left, right = (_refined(w, c, wc, errors, factors) for errors in (left, right))
    whole = w if half is None else w @ half
    groups = [left, right, _low_rank_errors(whole, m, n)]
    if mix:
        groups.append({})
        for base in _bases({**left, **right}):
            a, b = factors.get(base) or nearest_kronecker(w, *base[0].part)
            rest = w - dense_weight(a, b).float()
            rest = rest if half is None else rest @ half
            share = (rest.square().sum() / whole.square().sum().clamp_min(1e-30)).item()
            for low_rank, error in _low_rank_errors(rest, m, n).items():
                groups[-1][base + low_rank] = share * error
    return groups


def _bases(errors: Errors) -> list[Shapes]:
    """Products of different a_shapes that explain most of the weight for their parameters."""

    def gain(item: tuple[Shapes, float]) -> float:
        (s,), error = item
        return 1 - error - s.parameters / (s.in_features * s.out_features)

    bases: dict[tuple[int, int], Shapes] = {}
    for shapes, _ in sorted(errors.items(), key=gain, reverse=True):
        bases.setdefault(shapes[0].a_shape, shapes)
    return list(bases.values())[:_BASES]


def _sides(size: int, most: int) -> list[int]:
    return [d for d in divisors(size) if d <= most]


def _low_rank_errors(w: Tensor, m: int, n: int) -> Errors:
    gram = w @ w.mT if m <= n else w.mT @ w
    spectrum = torch.linalg.eigvalsh(gram.double() if len(gram) <= 256 else gram).flip(0)
    full = m * n / (m + n)  # the rank that has as many parameters as the dense layer
    errors: Errors = {}
    for compression in _COMPRESSIONS:
        rank = int(full / compression)
        rank -= rank % 2 if rank > 16 else 0  # an odd rank leaves half a vector empty
        if 1 <= rank < full:
            errors[KronShape(m, 1, 1, n, rank),] = dropped(spectrum, rank)
    return errors


def _product_errors(w: Tensor, side: str, c: Tensor | None) -> Errors:
    """Errors of products with a small factor on this side, in the separable metric close to C."""
    m, n = w.shape
    ps, qs = _sides(m, _SIDES), _sides(n, _SIDES)
    errors: Errors = {}

    def note(p: int, q: int, spectrum: Tensor) -> None:
        most = min(p * q, m * n // (p * q))
        for rank in _RANKS:
            if p * q > 1 and rank <= most:
                small, large = (p, q), (m // p, n // q)
                sides = small + large if side == "left" else large + small
                s = KronShape(*sides, rank)
                if s.parameters < m * n and not s.is_low_rank:
                    errors[s,] = dropped(spectrum, rank)

    if c is None:
        for (p, q), spectrum in spectra(w, side, ps, qs):
            note(p, q, spectrum)
        return errors
    for q in qs:
        roots = separable_roots(c, q if side == "left" else n // q)
        for (p, _), spectrum in spectra(whitened(w, *roots), side, ps, [q]):
            note(p, q, spectrum)
    return errors


def _refined(
    w: Tensor, c: Tensor, wc: Tensor, errors: Errors, factors: dict[Shapes, Factors]
) -> Errors:
    """Errors in the metric C itself of the leading products; ``factors`` receives their factors."""
    energy = (wc * w).sum().clamp_min(1e-30)
    for steps in _STEPS:
        leading = _thinned(
            Candidate((s,), s.parameters, s.flops, error)
            for (s,), error in errors.items()
            if s.rank * max(s.n1, s.n2) <= _WIDEST
        )
        # Evenly, from the smallest on; none where all products are too wide, or the sides prime.
        leading = leading[:: max(1, -(-len(leading) // _REFINED))]
        errors = {}
        for shapes, *_ in leading:
            start = factors.get(shapes) or separable(w, shapes[0], c)
            a, b, error = alternate(w, c, *start, steps, tolerance=0.0, wc=wc)
            factors[shapes], errors[shapes] = (a, b), (error / energy).item()
    return errors


def _error_when_made(w: Tensor, shapes: Shapes, moment: Tensor | None) -> float:
    """The error of the terms fitted to the end, as ``factorise_`` does."""
    if not shapes:
        return 0.0
    rest = w.double()
    for a, b in nearest_kronecker_sum(w, [s.part for s in shapes], second_moment=moment):
        rest = rest - dense_weight(a, b)
    if moment is None:
        return (rest.square().sum() / w.double().square().sum().clamp_min(1e-30)).item()
    c = shrunk(moment)
    return ((rest @ c * rest).sum() / (w.double() @ c * w).sum().clamp_min(1e-30)).item()
