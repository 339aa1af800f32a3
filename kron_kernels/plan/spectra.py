"""Spectra of a rearranged weight: the error of each shape, without a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def spectra(
    w: Tensor, side: str, ps: Sequence[int], qs: Sequence[int]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Eigenvalues, descending, of the Gram matrix over a small factor's entries, for each (p, q).

    Only the largest p and q need a product with w: a divisor's matrix is a partial trace of theirs.
    """
    left = side == "left"
    for top_p in _tops(ps):
        for top_q in _tops(qs):
            gram = _gram(w, side, top_p, top_q)
            for p in ps:
                for q in qs:
                    owner = (
                        next(t for t in _tops(ps) if t % p == 0),
                        next(t for t in _tops(qs) if t % q == 0),
                    )
                    if owner == (top_p, top_q):
                        i, j = top_p // p, top_q // q
                        sides = (p, i, q, j) if left else (i, p, j, q)
                        trace = "aibjcidj->abcd" if left else "iajbicjd->abcd"
                        part = torch.einsum(trace, gram.view(*sides, *sides))
                        part = part.reshape(p * q, p * q)
                        yield (p, q), torch.linalg.eigvalsh(part).flip(0)


def _gram(w: Tensor, side: str, p: int, q: int) -> Tensor:
    m, n = w.shape
    if side == "left":
        r = w.reshape(p, m // p, q, n // q).permute(0, 2, 1, 3).reshape(p * q, -1)
    else:
        r = w.reshape(m // p, p, n // q, q).permute(1, 3, 0, 2).reshape(p * q, -1)
    return (r @ r.mT).double()


def dropped(spectrum: Tensor, rank: int) -> float:
    """Relative squared error of ``rank`` terms, from eigenvalues in descending order."""
    spectrum = spectrum.double().clamp_min(0)
    total = spectrum.sum().item()
    return spectrum[rank:].sum().item() / total if total > 0 else 0.0


def _tops(sizes: Sequence[int]) -> list[int]:
    """The sizes that divide no other."""
    return [d for d in sizes if not any(e > d and e % d == 0 for e in sizes)]
