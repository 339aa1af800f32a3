"""What a layer may become, and how far its weight, or its outputs, would then be off."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kron_kernels.decompose import (
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
from kron_kernels.factorise import Terms, dense_of
from kron_kernels.plan.layers import Candidate, Target, dense_candidate
from kron_kernels.plan.spectra import dropped, spectra
from kron_kernels.shapes import KronShape, divisors

_SIDES = 16  # the small factor's sides at most
_B_SIZES = 32  # an embedding's b at most
_RANKS = (1, 2, 4, 8)
# Low rank is tried at these compressions, with ranks of multiples of 8 where that is possible.
_COMPRESSIONS = (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)
_BASES = 3  # Kronecker products that get a low-rank part
# A larger candidate must lower the error by this share of it. The errors of neighbours differ by
# less, and each that is kept may have to be timed.
_GAIN = 0.02
_SHRINKAGE = 0.01  # of second moments, as nearest_kronecker has it
# Steps of alternating least squares, from the separable metric's optimum, for those that lead in
# that metric, and for those that lead then. On weights of MiniLM the error of 4x2 ⊗ 384x192, 0.642
# at the start, was 0.443 after two steps, 0.417 after five and 0.407 after twenty.
_STEPS = (2, 3)
# Of those that lead on each side, so many get these steps: of all, 66 to 89, a layer took minutes.
_REFINED = 8

Errors = dict[Terms, float]
Factors = tuple[Tensor, Tensor]


def candidates_of(target: Target, moment: Tensor | None, mix: bool) -> list[Candidate]:
    """The dense layer first, then what may take its place, or what was decided alone.

    Args:
        target: The layer.
        moment: ``Σ x xᵀ`` of its inputs, in whose metric its errors then are, those of its outputs.
        mix: Try sums of a Kronecker product and a low-rank part, too.
    """
    dense = dense_candidate(target)
    if not target.decided and not target.inputs:
        return [dense]
    w = unit(dense_of(target.layer).detach())[0].float()
    w = w / w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    if target.decided:
        return [_priced(target, target.terms, _made_error(w, target.terms, moment))]
    groups = [_table_errors(w)] if target.embedding else _linear_errors(w, moment, mix)
    kept = [dense]
    for group in groups:
        priced = (_priced(target, terms, error) for terms, error in group.items())
        kept += _thinned([c for c in priced if c.parameters < dense.parameters])
    return kept


def _priced(target: Target, terms: Terms, error: float) -> Candidate:
    rows, columns = target.size
    shapes = [KronShape.split(rows, columns, *term) for term in terms]
    flops = 0 if target.embedding else sum(s.flops for s in shapes) * target.tokens
    return Candidate(terms, sum(s.parameters for s in shapes), flops, error)


def _thinned(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that none with fewer parameters and FLOPs comes near in error."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.parameters, c.flops, c.error, c.terms)):
        if all(c.error < (1 - _GAIN) * k.error for k in kept if k.flops <= c.flops):
            kept.append(c)
    return kept


def _table_errors(w: Tensor) -> Errors:
    """Of an embedding ``w (v, d)`` as ``(v, d / b_size) ⊗ (1, b_size)``, rank 1."""
    rows, dim = w.shape
    errors: Errors = {}
    for (_, b), spectrum in spectra(w, "right", [1], _sides(dim, _B_SIZES)):
        errors[((rows, dim // b), 1),] = dropped(spectrum, 1)
    return errors


def _linear_errors(w: Tensor, moment: Tensor | None, mix: bool) -> list[Errors]:
    """Of a small left factor, of a small right one, of low rank, and of sums."""
    m, n = w.shape
    c = None if moment is None else shrunk(moment, _SHRINKAGE)
    half = None if c is None else cholesky(c).float()  # (n, n), half @ half.mT = C
    left, right = (_product_errors(w, side, c) for side in ("left", "right"))
    factors: dict[Terms, Factors] = {}
    if c is not None:
        wc = w.double() @ c
        left, right = (_refined(w, c, wc, errors, factors) for errors in (left, right))
    whole = w if half is None else w @ half
    groups = [left, right, _low_rank_errors(whole, m, n)]
    if mix:
        groups.append({})
        for terms in _bases({**left, **right}, m, n):
            a, b = factors.get(terms) or nearest_kronecker(w, *terms[0])
            rest = w - dense_weight(a, b).float()
            rest = rest if half is None else rest @ half
            share = (rest.square().sum() / whole.square().sum().clamp_min(1e-30)).item()
            for (low_term,), error in _low_rank_errors(rest, m, n).items():
                groups[-1][(*terms, low_term)] = share * error
    return groups


def _bases(errors: Errors, m: int, n: int) -> list[Terms]:
    """The products that explain most beyond their share of the parameters."""

    def gain(item: tuple[Terms, float]) -> float:
        ((a_shape, rank),), error = item
        return 1 - error - KronShape.split(m, n, a_shape, rank).parameters / (m * n)

    best = sorted(errors.items(), key=gain, reverse=True)
    shapes: dict[tuple[int, int], Terms] = {}
    for terms, _ in best:
        shapes.setdefault(terms[0][0], terms)
        if len(shapes) == _BASES:
            break
    return list(shapes.values())


def _sides(size: int, most: int) -> list[int]:
    return [d for d in divisors(size) if d <= most]


def _low_rank_errors(w: Tensor, m: int, n: int) -> Errors:
    gram = w @ w.mT if m <= n else w.mT @ w
    spectrum = torch.linalg.eigvalsh(gram.double() if len(gram) <= 256 else gram).flip(0)
    full = m * n / (m + n)  # the rank that has as many parameters as the dense layer
    errors: Errors = {}
    for compression in _COMPRESSIONS:
        rank = int(full / compression)
        rank -= rank % 8 if rank > 16 else 0
        if 1 <= rank < full:
            errors[((m, 1), rank),] = dropped(spectrum, rank)
    return errors


def _product_errors(w: Tensor, side: str, c: Tensor | None) -> Errors:
    """Of products with a small factor on this side; in the separable metric next to C."""
    m, n = w.shape
    ps, qs = _sides(m, _SIDES), _sides(n, _SIDES)
    errors: Errors = {}

    def note(p: int, q: int, spectrum: Tensor) -> None:
        most = min(p * q, m * n // (p * q))
        for rank in _RANKS:
            if p * q > 1 and rank <= most:
                a_shape = (p, q) if side == "left" else (m // p, n // q)
                s = KronShape.split(m, n, a_shape, rank)
                if s.parameters < m * n and not s.is_low_rank:
                    errors[(a_shape, rank),] = dropped(spectrum, rank)

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
    w: Tensor, c: Tensor, wc: Tensor, errors: Errors, factors: dict[Terms, Factors]
) -> Errors:
    """In the metric C itself, of those that lead, whose ``factors`` are noted."""
    m, n = w.shape
    energy = (wc * w).sum().clamp_min(1e-30)
    for steps in _STEPS:
        shapes = {terms: KronShape.split(m, n, *terms[0]) for terms in errors}
        leading = _thinned(
            Candidate(terms, s.parameters, s.flops, errors[terms]) for terms, s in shapes.items()
        )
        leading = leading[:: -(-len(leading) // _REFINED)]  # evenly, from the smallest on
        errors = {}
        for terms, *_ in leading:
            start = factors.get(terms) or separable(w, shapes[terms], c)
            a, b, error = alternate(w, c, *start, steps, tolerance=0.0, wc=wc)
            factors[terms], errors[terms] = (a, b), (error / energy).item()
    return errors


def _made_error(w: Tensor, terms: Terms, moment: Tensor | None) -> float:
    """Of the terms that were decided, fitted to the end."""
    if not terms:
        return 0.0
    rest = w.double()
    for a, b in nearest_kronecker_sum(w, terms, second_moment=moment, shrinkage=_SHRINKAGE):
        rest = rest - dense_weight(a, b)
    if moment is None:
        return (rest.square().sum() / w.double().square().sum().clamp_min(1e-30)).item()
    c = shrunk(moment, _SHRINKAGE)
    return ((rest @ c * rest).sum() / (w.double() @ c * w).sum().clamp_min(1e-30)).item()
