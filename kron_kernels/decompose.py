"""Factors nearest to a dense weight, in its entries or in the layer's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kron_kernels.checks import check_tensor
from kron_kernels.shapes import KronShape, check_rank, parts_of

Factors = tuple[Tensor, Tensor]  # a (r, m1, n1), b (r, m2, n2)
Parts = Sequence[tuple[tuple[int, int], int]]  # ((m1, n1), rank) of each part

# Share of the mean variance of C that is added to its diagonal. C is an estimate: from 64 samples
# of 256 correlated features, without it, the error on other samples was 50 times Van Loan's. 0.01
# costs nothing where samples abound.
SHRINKAGE = 0.01
# Steps of the alternation (rounds over the parts of a sum). It stops earlier, once a step lowers
# the error by less than _TOLERANCE of it.
_MAX_ITERATIONS = 20
_TOLERANCE = 1e-4
# Elements of W converted to float64 at a time. 2**22 are 32 MB: 30522 x 768 peaks below 0.3 GB.
_CHUNK = 2**22
# Largest side of a Gram matrix. The dense eigenproblem is cubic in it (1.4 s on two cores at 2048);
# above, a randomised SVD takes its place.
_LARGEST_GRAM = 2048


def nearest_kronecker(
    weight: Tensor,
    a_shape: tuple[int, int],
    rank: int = 1,
    *,
    second_moment: Tensor | None = None,
) -> Factors:
    """Factors of the sum of ``rank`` Kronecker products nearest to ``weight``.

    Without ``second_moment``, minimises ``‖W − Σ_k A_k ⊗ B_k‖_F``: W is rearranged with one block
    per row, where ``A ⊗ B`` is an outer product, and the leading singular triples are the terms
    (Van Loan & Pitsianis 1993). They come from the Gram matrix of the smaller side, in float64, a
    chunk of W at a time; above a side of 2048, from a randomised SVD with a fixed seed.

    With ``second_moment`` C = E[x xᵀ] of the layer's inputs, minimises the error of the layer's
    *outputs*, ``E‖(W − Σ_k A_k ⊗ B_k) x‖² = ‖(W − Σ_k A_k ⊗ B_k) C^½‖_F²``, by alternating least
    squares: with one side fixed, the other is a linear solve. No half step raises the error, and
    the result is a local minimum. It starts from the solution above or from the optimum for a
    separable metric ``C1 ⊗ C2`` close to C, whichever has the lower error after two steps. For
    terms ``column ⊗ row``, a low-rank weight, the exact optimum is a truncated SVD of ``W C^½``.

    Args:
        weight: W of shape ``(m, n)``, real floating point, any precision.
        a_shape: ``(m1, n1)`` of the left factor, dividing ``(m, n)``.
        rank: Number of terms.
        second_moment: C of shape ``(n, n)``, symmetric and positive semi-definite, at any scale;
            1 % of its mean variance is added to its diagonal. Zero means no knowledge of the
            inputs, and gives the factors nearest in the weight's entries.

    Returns:
        ``a (rank, m1, n1)`` and ``b (rank, m / m1, n / n1)`` of W's dtype and device, the terms in
        descending order and each with ``‖A_k‖ = ‖B_k‖``.

    Raises:
        TypeError: If W or C is not a dense tensor.
        ValueError: If W is not a finite real matrix, ``a_shape`` does not divide it, ``rank``
            exceeds the largest one for the shapes, or C does not fit.
    """
    return _nearest(weight, [(a_shape, rank)], second_moment)[0]


def nearest_kronecker_sum(
    weight: Tensor, parts: Parts, *, second_moment: Tensor | None = None
) -> list[Factors]:
    """Factors of a sum of parts of different shapes near ``weight``, one pair per part.

    A low-rank part, ``a_shape = (m, 1)``, represents weights that no Kronecker product of small
    factors can, and vice versa. Each part is first fitted to the residual of the parts before it.
    Then each in turn is fitted to W minus all others, until that no longer helps. No fit raises the
    error, and the result is a local minimum.

    Args:
        weight: W of shape ``(m, n)``, real floating point, any precision.
        parts: ``(a_shape, rank)`` each, as for ``nearest_kronecker``, fitted in this order.
        second_moment: C of shape ``(n, n)``, as for ``nearest_kronecker``.

    Returns:
        ``(a, b)`` for each part, ``a (rank, m1, n1)`` and ``b (rank, m / m1, n / n1)``, of W's
        dtype and device, their terms in descending order and of equal norms.

    Raises:
        TypeError: As ``nearest_kronecker``.
        ValueError: As ``nearest_kronecker``, or if ``parts`` is empty.
    """
    return _nearest(weight, parts_of(parts), second_moment)


def _nearest(
    weight: Tensor,
    parts: Parts,
    second_moment: Tensor | None,
    shrinkage: float = SHRINKAGE,
    max_iterations: int = _MAX_ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> list[Factors]:
    shapes = [_check(weight, a_shape, rank, second_moment) for a_shape, rank in parts]
    w, root = unit(weight.detach())
    c = None if second_moment is None else shrunk(second_moment.detach(), shrinkage)
    if len(shapes) == 1:
        fitted = [_fit(w, shapes[0], c, max_iterations, tolerance)]
    else:
        fitted = _fit_sum(w.double(), shapes, c, max_iterations, tolerance)
    return [((a * root).to(weight.dtype), (b * root).to(weight.dtype)) for a, b in fitted]


def _fit_sum(
    w: Tensor, shapes: Sequence[KronShape], c: Tensor | None, max_iterations: int, tolerance: float
) -> list[Factors]:
    rest, fitted = w.clone(), []  # W minus the sum of all fitted parts
    for s in shapes:
        fitted.append(_fit(rest, s, c))
        rest -= dense_weight(*fitted[-1])
    error, floor = _error(rest, c), 1e-24 * _error(w, c)
    for _ in range(max_iterations):
        before = error
        for i, s in enumerate(shapes):
            own = rest + dense_weight(*fitted[i])
            # Two steps from its present value: the other parts will change before the next round.
            part = _fit(own, s, c, max_iterations=2, start=fitted[i])
            own -= dense_weight(*part)
            now = _error(own, c)
            if now < error:  # otherwise the change is rounding
                fitted[i], rest, error = part, own, now
        if before - error <= tolerance * error or error <= floor:
            break
    return fitted


def dense_weight(a: Tensor, b: Tensor) -> Tensor:
    """``Σ_k A_k ⊗ B_k`` of shape ``(m1 * m2, n1 * n2)``, summed over k by one matrix product."""
    s = KronShape.of(a, b)
    blocks = a.reshape(s.rank, -1).mT @ b.reshape(s.rank, -1)  # (m1 * n1, m2 * n2)
    return (
        blocks.view(s.m1, s.n1, s.m2, s.n2).transpose(1, 2).reshape(s.out_features, s.in_features)
    )


def _fit(
    w: Tensor,
    s: KronShape,
    c: Tensor | None,
    max_iterations: int = _MAX_ITERATIONS,
    tolerance: float = _TOLERANCE,
    start: Factors | None = None,
) -> Factors:
    """Factors in float64, nearest to W in its entries or in the metric C, then from ``start``."""
    if c is None:
        return _van_loan(w, s)
    if s.is_low_rank:
        return _truncated(w, s, c)
    if start is None:
        start = _van_loan(w, s)
        if max_iterations > 2:
            tried = [
                alternate(w, c, *at, 2, tolerance) for at in (start, separable(w.double(), s, c))
            ]
            start = min(tried, key=lambda fit: fit[2].nan_to_num(torch.inf).item())[:2]
            max_iterations -= 2
    return alternate(w, c, *start, max_iterations, tolerance)[:2]


def _error(rest: Tensor, c: Tensor | None) -> Tensor:
    """``‖rest C^½‖_F²``."""
    return (rest * (rest if c is None else rest @ c)).sum()


def unit(t: Tensor) -> tuple[Tensor, float]:
    """Scale a float64 tensor to a largest entry near 1; returns it and ``2 ** k``, t = 4 ** k * it.

    The fits sum squares and products of squares in float64, where entries of 1e155 overflow and
    those of 1e-160 vanish. Squares of the entries of narrower dtypes, 1e-45 to 3e38, do neither, so
    such a tensor is returned unchanged. The scale is a power of 2, which rounds nothing.
    """
    if t.dtype != torch.float64:
        return t, 1.0
    _, exponent = math.frexp(t.abs().max().item())  # 0 for 0
    k = exponent // 2
    # In two steps: 4 ** k itself may overflow float64.
    return t * 2.0**-k * 2.0**-k, 2.0**k


def check_finite(label: str, weight: Tensor) -> None:
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(f"{label} has {bad} entries that are NaN or infinite; repair it first.")


def _check(
    weight: Tensor, a_shape: tuple[int, int], rank: int, second_moment: Tensor | None
) -> KronShape:
    check_tensor("weight", weight)
    if weight.ndim != 2 or not weight.is_floating_point():
        if weight.is_complex():
            way = "factorise real and imaginary parts one by one"
        elif weight.ndim != 2:
            way = "give a matrix: a slice, or of a convolution with a kernel of 1 weight.flatten(1)"
        else:
            way = "use weight.float()"
        raise ValueError(
            f"weight must be a real floating-point matrix, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}; {way}."
        )
    m, n = weight.shape
    if not m or not n:
        raise ValueError(f"weight is {m} x {n} and has no entries; it needs at least one.")
    s = KronShape.split(m, n, a_shape, rank)
    check_rank(s)
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load it first.")
    check_finite("weight", weight)
    if second_moment is not None:
        check_tensor("second_moment", second_moment)
        if second_moment.shape != (n, n):
            raise ValueError(
                f"second_moment must be E[x xᵀ] of shape ({n}, {n}), the weight's columns, "
                f"got {tuple(second_moment.shape)}."
            )
        if not second_moment.is_floating_point():
            raise ValueError(
                f"second_moment must be real floating point, got {second_moment.dtype}; sum x xᵀ "
                "of real x in float32 or better."
            )
        if second_moment.is_meta:
            raise ValueError(
                "second_moment is on the meta device and has no values; compute it first."
            )
        if not torch.isfinite(second_moment).all():
            raise ValueError(
                f"second_moment must be real and finite, got {second_moment.dtype} with "
                f"{int((~torch.isfinite(second_moment)).sum())} entries that are NaN or infinite; "
                "sum x xᵀ in float32 or better."
            )
        largest = second_moment.abs().max()
        asymmetry = (second_moment - second_moment.mT).abs().max()
        deviation = second_moment.diagonal().clamp_min(0).sqrt()
        # A correlation above 1, by more than rounding in 16 bits: C is not positive semi-definite,
        # and the least-squares problem has no minimum.
        beyond = second_moment.abs() - torch.outer(deviation, deviation) > 1e-2 * largest
        if asymmetry > 1e-2 * largest or (second_moment.diagonal() < 0).any() or beyond.any():
            raise ValueError(
                "second_moment must be symmetric with a non-negative diagonal and "
                "entries |C_ij| <= √(C_ii C_jj): X.T @ X / samples of the layer's inputs X "
                "(samples, columns)."
            )
    return s


def _van_loan(w: Tensor, s: KronShape) -> Factors:
    """Leading terms of W in float64, ``a (r, m1, n1)`` and ``b (r, m2, n2)`` of equal norms."""
    blocks = w.reshape(s.m1, s.m2, s.n1, s.n2)
    a_is_small = s.m1 * s.n1 < s.m2 * s.n2
    if a_is_small:
        blocks = blocks.permute(1, 0, 3, 2)
    # blocks: (M, m, N, n) with (m, n) the small factor's sides and (M, N) the large one's.
    large, small = _leading_terms(blocks, s.rank)
    a, b = (small, large) if a_is_small else (large, small)
    return a.contiguous(), b.contiguous()


def _leading_terms(blocks: Tensor, rank: int) -> Factors:
    """``large (r, M, N)`` and ``small (r, m, n)`` of R (M * N, m * n), without storing R."""
    rows, m, cols, n = blocks.shape
    side = m * n
    step = max(1, _CHUNK // (m * cols * n))

    def chunks():
        """R's rows in float64, a few block rows of W at a time: (… * N, m * n)."""
        for part in blocks.split(step):
            yield part.double().transpose(1, 2).reshape(-1, side)

    if side <= _LARGEST_GRAM:
        gram = blocks.new_zeros(side, side, dtype=torch.float64)
        for part in chunks():
            gram.addmm_(part.mT, part)
        right = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # (m * n, r)
    else:
        whole = torch.cat(list(chunks()))
        # Halko et al. 2011; 16 power iterations, because these spectra decay slowly.
        with torch.random.fork_rng(devices=[] if whole.device.type == "cpu" else None):
            torch.manual_seed(0)
            right = torch.svd_lowrank(whole, q=min(side, rank + 16), niter=16)[2][:, :rank]
    left = torch.cat([part @ right for part in chunks()])  # (M * N, r), norms are the σ_k
    root = left.norm(dim=0).sqrt()
    left = left / root.where(root > 0, 1.0)
    return left.mT.reshape(rank, rows, cols), (right * root).mT.reshape(rank, m, n)


def shrunk(c: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """C in float64, exactly symmetric, of mean variance 1, plus ``shrinkage`` on its diagonal.

    The scale of a metric does not change which factors are nearest.
    """
    c, _ = unit(c.double())
    c = (c + c.mT) / 2
    variance = c.diagonal().mean()
    c = c / variance.where(variance > 0, 1.0)
    # Never 0: a direction without variance would make the solves singular.
    c.diagonal().add_(max(shrinkage, 1e-9))
    return c


def _truncated(w: Tensor, s: KronShape, c: Tensor) -> Factors:
    """The low-rank optimum ``U Uᵀ W``, U the leading left singular vectors of ``W C^½``.

    It needs no inverse of C^½, so directions without variance do no harm.
    """
    w = w.double()
    m, n = w.shape
    if m <= n:
        left = torch.linalg.eigh(w @ c @ w.mT).eigenvectors[:, -s.rank :]
    else:
        values, vectors = torch.linalg.eigh(c)
        half = w @ (vectors * values.clamp_min(0).sqrt())  # (m, n), W C^½ in C's own axes
        right = torch.linalg.eigh(half.mT @ half).eigenvectors[:, -s.rank :]
        left = torch.linalg.qr(half @ right).Q
    column, row = left.mT, left.mT @ w  # (r, m), (r, n)
    a, b = (column, row) if s.n1 == 1 == s.m2 else (row, column)
    return _balance(a.reshape(s.rank, s.m1, s.n1), b.reshape(s.rank, s.m2, s.n2))


def cholesky(c: Tensor) -> Tensor:
    """Lower triangular L with ``L Lᵀ = C``, in float64, for a C from ``shrunk``."""
    return torch.linalg.cholesky_ex(c.double())[0]


def separable_roots(c: Tensor, n1: int) -> tuple[Tensor, Tensor]:
    """Cholesky roots of ``C1 (n1, n1)`` and ``C2``, the partial traces of C; ``C1 ⊗ C2`` ≈ C."""
    blocks = c.view(n1, len(c) // n1, n1, len(c) // n1)
    c1, c2 = torch.einsum("aibi->ab", blocks), torch.einsum("iaib->ab", blocks)
    return cholesky(c1 / c1.diagonal().mean()), cholesky(c2 / c2.diagonal().mean())


def whitened(w: Tensor, root1: Tensor, root2: Tensor) -> Tensor:
    """``W (L1 ⊗ L2)``, of W's dtype."""
    m, n1, n2 = w.shape[0], len(root1), len(root2)
    blocks = (w.reshape(m * n1, n2) @ root2.to(w.dtype)).view(m, n1, n2)
    return torch.einsum("mab,ac->mcb", blocks, root1.to(w.dtype)).reshape(m, n1 * n2)


def separable(w: Tensor, s: KronShape, c: Tensor) -> Factors:
    """Factors in float64 nearest in the metric ``C1 ⊗ C2`` ≈ C, a truncated SVD after whitening."""
    root1, root2 = separable_roots(c, s.n1)
    a, b = _van_loan(whitened(w, root1, root2), s)
    a = torch.linalg.solve_triangular(root1, a, upper=False, left=False)
    return a, torch.linalg.solve_triangular(root2, b, upper=False, left=False)


def alternate(
    w: Tensor,
    c: Tensor,
    a: Tensor,
    b: Tensor,
    max_iterations: int,
    tolerance: float,
    wc: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares on ``tr((W − Ŵ) C (W − Ŵ)ᵀ)``, in float64, from ``a, b``.

    Returns the factors and their error, infinite after no step. Pass ``wc = W C`` where several
    fits share it.
    """
    s = KronShape.of(a, b)
    wc = w.double() @ c if wc is None else wc  # (m, n)
    energy = (wc * w).sum()
    # Laid out once, which makes a half step two matrix products: over (n2, n2') or (n1, n1').
    c4 = c.view(s.n1, s.n2, s.n1, s.n2)
    c_inner = c4.permute(0, 2, 1, 3).reshape(s.n1 * s.n1, s.n2 * s.n2)
    wc_blocks = wc.view(s.m1, s.m2, s.n1, s.n2).transpose(1, 2).reshape(s.m1 * s.n1, s.m2 * s.n2)

    error = previous = energy.new_tensor(torch.inf)
    for _ in range(max_iterations):
        a, _ = _half_step(c_inner, wc_blocks, b, s)
        b, error = _half_step(c_inner.mT, wc_blocks.mT, a, s.swapped)
        error = energy + error
        if previous - error <= tolerance * error.clamp_min(energy * 1e-12):
            break
        previous = error
    return *_balance(a, b), error


def _half_step(
    c_inner: Tensor, wc_blocks: Tensor, fixed: Tensor, s: KronShape
) -> tuple[Tensor, Tensor]:
    """The optimal left factors given ``fixed (r, m2, n2)``, and ``error − tr(W C Wᵀ)``.

    ``Ŵ x = Σ_k A_k Z_k`` with ``Z_k = X B_kᵀ``, so the optimum solves
    ``[A_1 … A_r] E[Z Zᵀ] = E[Y Zᵀ]`` with Z (r * n1, m2) the stacked ``Z_k``.
    """
    r, m1, n1 = s.rank, s.m1, s.n1
    # (B_kᵀ B_l)[q, q'] for every pair of terms, contracted with C over q and q'.
    pairs = torch.einsum("kpq,lpt->qtkl", fixed, fixed).reshape(s.n2 * s.n2, r * r)
    moment = (c_inner @ pairs).view(n1, n1, r, r).permute(2, 0, 3, 1).reshape(r * n1, r * n1)
    cross = (wc_blocks @ fixed.reshape(r, -1).mT).view(m1, n1, r).transpose(1, 2)
    cross = cross.reshape(m1, r * n1)
    moment = (moment + moment.mT) / 2
    # Terms may become collinear; the ridge keeps the solve stable at no visible cost in error.
    moment.diagonal().add_(1e-12 * moment.diagonal().mean() + torch.finfo(torch.float64).tiny)
    free = torch.linalg.solve(moment, cross, left=False)  # (m1, r * n1)
    # At the optimum tr(Ŵ C Ŵᵀ) = tr(Ŵ C Wᵀ), so the error is tr(W C Wᵀ) minus either.
    error = -(free * cross).sum()
    return free.view(m1, r, n1).transpose(0, 1).contiguous(), error


def _balance(a: Tensor, b: Tensor) -> Factors:
    """The same sum with its terms of equal norms ``‖A_k‖ = ‖B_k‖``, largest first."""
    norm_a, norm_b = (t.flatten(1).norm(dim=1)[:, None, None] for t in (a, b))
    norm = norm_a * norm_b  # (r, 1, 1) of the terms; a zero term gets zero factors
    order = norm.flatten().argsort(descending=True)
    a, b = (t * (norm.sqrt() / n.where(n > 0, 1.0)) for t, n in ((a, norm_a), (b, norm_b)))
    return a[order], b[order]
