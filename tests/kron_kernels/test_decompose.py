"""nearest_kronecker against the SVD of the rearranged matrix, and against known weighted optima."""

import math
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KronShape,
    decompose,
    nearest_kronecker,
    nearest_kronecker_sum,
)
from kron_kernels.reference import materialize
from kron_kernels.testing.cases import SHAPES, name

# With the last, every sort of factor: square, 1 x 1, 1 x n, n x 1, A smaller than B and larger.
ALL = [*SHAPES, KronShape(1, 6, 7, 1), KronShape(7, 1, 1, 6), KronShape(1, 1, 6, 4)]


def most_terms(s: KronShape) -> int:
    return min(s.m1 * s.n1, s.m2 * s.n2)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def rearranged(w: torch.Tensor, s: KronShape) -> torch.Tensor:
    """Van Loan's matrix: one block of W per row, which makes A ⊗ B an outer product."""
    blocks = w.double().reshape(s.m1, s.m2, s.n1, s.n2).transpose(1, 2)
    return blocks.reshape(s.m1 * s.n1, s.m2 * s.n2)


def dropped(w: torch.Tensor, s: KronShape, rank: int) -> float:
    """The least possible squared error of ``rank`` terms."""
    return torch.linalg.svdvals(rearranged(w, s))[rank:].square().sum().item()


def squared_error(w, a, b, c=None) -> float:
    """``‖(W − Ŵ) C^½‖²`` in float64."""
    off = w.double() - materialize(a.double(), b.double())
    return (off.square() if c is None else (off @ c.double()) * off).sum().item()


def second_moment(n: int, samples: int, seed: int = 1) -> torch.Tensor:
    """Of correlated inputs of unlike sizes."""
    x = randn(samples, n, seed=seed) @ randn(n, n, seed=seed + 1)
    x = x * torch.logspace(0, -2, n, dtype=torch.float64)
    return x.mT @ x / samples


def separable_moment(s: KronShape, seed: int = 1):
    """``C = P ⊗ Q`` and ``C^½``; then ``(A ⊗ B) C^½ = A P^½ ⊗ B Q^½``, which has a closed form."""
    p, q = (second_moment(n, 3 * n, seed + n) for n in (s.n1, s.n2))
    root = torch.kron(*(symmetric_root(t) for t in (p, q)))
    return torch.kron(p, q), root


def in_metric(w, a_shape, rank, c, **options) -> decompose.Factors:
    """The data-aware fit without anything added to C's diagonal."""
    return decompose._nearest(w, [(a_shape, rank)], c, shrinkage=0, **options)[0]


def symmetric_root(c: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


@pytest.mark.parametrize("s", ALL, ids=name)
def test_the_error_is_that_of_the_truncated_svd(s):
    w = randn(s.out_features, s.in_features)
    most = most_terms(s)
    for rank in sorted({1, min(2, most), (most + 1) // 2, most}):
        a, b = nearest_kronecker(w, (s.m1, s.n1), rank)
        assert a.shape == (rank, s.m1, s.n1) and b.shape == (rank, s.m2, s.n2)
        best, energy = dropped(w, s, rank), w.square().sum().item()
        assert squared_error(w, a, b) == pytest.approx(best, rel=1e-9, abs=1e-13 * energy)


@st.composite
def problems(draw):
    side = st.integers(1, 7)
    s = KronShape(*(draw(side) for _ in range(4)))
    rank = draw(st.integers(1, most_terms(s)))
    # Of fewer terms than asked for, of entries of any size, or with repeated singular values.
    kind = draw(st.sampled_from(["full", "deficient", "large", "small", "integer"]))
    return s, rank, kind, draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_error_is_that_of_the_truncated_svd_for_drawn_weights(problem):
    s, rank, kind, seed = problem
    w = randn(s.out_features, s.in_features, seed=seed)
    match kind:
        case "deficient":
            w = torch.kron(randn(s.m1, s.n1, seed=seed), randn(s.m2, s.n2, seed=seed + 1))
        case "large":
            w = w * 1e15
        case "small":
            w = w * 1e-15
        case "integer":
            w = w.round()
    a, b = nearest_kronecker(w, (s.m1, s.n1), rank)
    energy = w.square().sum().item()
    error = squared_error(w, a, b)
    assert error == pytest.approx(dropped(w, s, rank), rel=1e-9, abs=1e-12 * energy)
    norm_a, norm_b = a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm_a, norm_b, rtol=1e-10, atol=1e-10 * energy**0.25)
    size = norm_a * norm_b
    assert (size[1:] <= size[:-1] + 1e-7 * energy**0.5).all()


@pytest.mark.parametrize("s", [s for s in SHAPES if s.rank > 1], ids=name)
def test_a_sum_of_products_is_recovered(s):
    w = materialize(randn(s.rank, s.m1, s.n1), randn(s.rank, s.m2, s.n2, seed=1))
    a, b = nearest_kronecker(w, (s.m1, s.n1), s.rank)
    torch.testing.assert_close(materialize(a, b), w, rtol=0, atol=1e-12)
    a, b = nearest_kronecker(w, (s.m1, s.n1), s.rank - 1)
    assert squared_error(w, a, b) > 1e-3 * w.square().sum().item()


def test_terms_are_singular_triples_in_descending_order_and_of_equal_norms():
    s = KronShape(5, 4, 3, 6)
    w = randn(s.out_features, s.in_features)
    a, b = nearest_kronecker(w, (5, 4), 6)
    sigma = torch.linalg.svdvals(rearranged(w, s))[:6]
    torch.testing.assert_close(a.flatten(1).norm(dim=1), sigma.sqrt())
    torch.testing.assert_close(b.flatten(1).norm(dim=1), sigma.sqrt())
    for t in (a, b):  # the terms are orthogonal to one another
        t = t.flatten(1) / sigma.sqrt()[:, None]
        torch.testing.assert_close(t @ t.mT, torch.eye(6).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data-aware"])
def test_a_narrow_weight_is_computed_in_float64_and_rounded_once(dtype, aware):
    w = randn(12, 20).to(dtype)
    c = second_moment(20, 50) if aware else None
    a, b = nearest_kronecker(w, (3, 5), 4, second_moment=c)
    wide = nearest_kronecker(w.double(), (3, 5), 4, second_moment=c)
    assert a.dtype == b.dtype == dtype and a.device == w.device
    assert a.is_contiguous() and b.is_contiguous()
    assert torch.equal(a, wide[0].to(dtype)) and torch.equal(b, wide[1].to(dtype))


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data-aware"])
def test_a_zero_weight_has_zero_factors(aware):
    c = torch.eye(6) if aware else None
    for fitted in (
        [nearest_kronecker(torch.zeros(4, 6), (2, 2), 3, second_moment=c)],
        nearest_kronecker_sum(torch.zeros(4, 6), [((2, 2), 1), ((4, 1), 2)], second_moment=c),
    ):
        assert not any(factor.any() for part in fitted for factor in part)


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data-aware"])
def test_more_terms_than_the_weight_has(aware):
    w = torch.kron(randn(3, 4), randn(5, 2, seed=1))
    c = second_moment(8, 30) if aware else None
    a, b = nearest_kronecker(w, (3, 4), 7, second_moment=c)
    assert a.isfinite().all() and b.isfinite().all()
    assert squared_error(w, a, b) < (1e-16 if aware else 1e-20) * w.square().sum()


@pytest.mark.parametrize("s", [KronShape(4, 3, 5, 2), KronShape(4, 1, 1, 5)], ids=name)
def test_strides_do_not_matter_and_the_weight_is_left_as_it_was(s):
    w = randn(s.out_features, s.in_features)
    expected = nearest_kronecker(w, (s.m1, s.n1))
    views = [w.mT.contiguous().mT, torch.stack([w, w * torch.nan], -1)[..., 0]]
    views.append(torch.nn.Parameter(w))
    for view in views:
        before = view.detach().clone()
        a, b = nearest_kronecker(view, (s.m1, s.n1))
        torch.testing.assert_close((a, b), expected)
        assert torch.equal(view, before) and not a.requires_grad
    row = randn(1, s.in_features).expand(s.out_features, -1)
    a, b = nearest_kronecker(row, (s.m1, s.n1), most_terms(s))
    torch.testing.assert_close(materialize(a, b), row.contiguous())


@pytest.mark.parametrize("size", [1, 2**22], ids=["a block row at a time", "at once"])
def test_the_size_of_a_chunk_changes_nothing(size, monkeypatch):
    s = KronShape(13, 7, 5, 3)
    w = randn(s.out_features, s.in_features)
    expected = materialize(*nearest_kronecker(w, (13, 7), 3))
    monkeypatch.setattr(decompose, "_CHUNK", size)
    torch.testing.assert_close(materialize(*nearest_kronecker(w, (13, 7), 3)), expected)


@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0], ids="decay {}".format)
def test_sides_above_the_gram_limit_come_within_two_percent(slope, monkeypatch):
    s = KronShape(8, 10, 9, 10)
    u, v = (torch.linalg.qr(randn(n, 80, seed=n)).Q for n in (80, 90))
    r = u * torch.arange(1.0, 81).double() ** -slope @ v.mT
    w = r.view(8, 10, 9, 10).transpose(1, 2).reshape(72, 100)
    monkeypatch.setattr(decompose, "_LARGEST_GRAM", 16)
    for rank in (1, 4, 40, 80):
        a, b = nearest_kronecker(w, (8, 10), rank)
        best = dropped(w, s, rank)
        assert best * (1 - 1e-9) - 1e-12 <= squared_error(w, a, b) <= 1.02**2 * best + 1e-12


def test_the_global_random_state_is_left_alone(monkeypatch):
    monkeypatch.setattr(decompose, "_LARGEST_GRAM", 16)
    before = torch.get_rng_state()
    nearest_kronecker(randn(72, 100), (8, 10), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_embedding_is_factorised_in_little_memory():
    """30522 x 768 in float32 are 94 MB, and R in float64 would be 188."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the high-water mark of memory from /proc")
    program = """
import re, torch, kron_kernels
torch.set_num_threads(2)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
kron_kernels.nearest_kronecker(torch.randn(64, 64), (8, 8))  # the libraries' own buffers
w = torch.empty(30522, 768).uniform_(-1, 1)
before = peak()
a, b = kron_kernels.nearest_kronecker(w, (30522, 96))
print(peak() - before, a.shape, b.shape)
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    megabytes = float(done.stdout.split()[0])
    assert megabytes < 400, f"{megabytes:.0f} MB in {time.monotonic() - start:.1f} s"
    assert "[1, 30522, 96]" in done.stdout and "[1, 1, 8]" in done.stdout


# --- nearest in the outputs


AWARE = [s for s in ALL if s.in_features <= 100]


@pytest.mark.parametrize("samples", [2, 5, 400], ids="{} samples".format)
@pytest.mark.parametrize("s", AWARE, ids=name)
def test_the_outputs_err_no_more_than_with_the_nearest_weights(s, samples):
    w = randn(s.out_features, s.in_features)
    c = second_moment(s.in_features, samples)
    energy = squared_error(w, torch.zeros(1, s.m1, s.n1), torch.zeros(1, s.m2, s.n2), c)
    for rank in {1, min(3, most_terms(s)), most_terms(s)}:
        plain = squared_error(w, *nearest_kronecker(w, (s.m1, s.n1), rank), c)
        a, b = in_metric(w, (s.m1, s.n1), rank, c)
        assert a.isfinite().all() and b.isfinite().all()
        # Up to the alternation's ridge on C's diagonal, seen through the whole of W.
        slack = 2e-7 * c.diagonal().mean().item() * w.square().sum().item()
        assert squared_error(w, a, b, c) <= plain * (1 + 1e-9) + slack
        if rank == most_terms(s):
            assert squared_error(w, a, b, c) <= 1e-9 * energy + slack


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(1, 60))
def test_the_outputs_err_no_more_for_drawn_weights_and_inputs(problem, samples):
    s, rank, _, seed = problem
    w = randn(s.out_features, s.in_features, seed=seed)
    c = second_moment(s.in_features, samples, seed=seed + 1)
    plain = squared_error(w, *nearest_kronecker(w, (s.m1, s.n1), rank), c)
    a, b = in_metric(w, (s.m1, s.n1), rank, c)
    slack = 2e-7 * c.diagonal().mean().item() * w.square().sum().item()
    assert squared_error(w, a, b, c) <= plain * (1 + 1e-9) + slack


@pytest.mark.parametrize("s", AWARE, ids=name)
def test_white_inputs_make_the_nearest_outputs_the_nearest_weights(s):
    w = randn(s.out_features, s.in_features)
    for rank in {1, min(2, most_terms(s))}:
        a, b = in_metric(w, (s.m1, s.n1), rank, torch.eye(s.in_features))
        best, energy = dropped(w, s, rank), w.square().sum().item()
        assert squared_error(w, a, b) == pytest.approx(best, rel=1e-7, abs=1e-12 * energy)


@pytest.mark.parametrize(
    "s", [KronShape(5, 4, 3, 6), KronShape(2, 6, 8, 3), KronShape(6, 2, 2, 7)], ids=name
)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_separable_moments_have_the_optimum_of_a_truncated_svd(s, rank):
    w = randn(s.out_features, s.in_features)
    c, root = separable_moment(s)
    a, b = in_metric(w, (s.m1, s.n1), rank, c, max_iterations=500, tolerance=0)
    best = dropped(w @ root, s, rank)
    scale = squared_error(w, torch.zeros(1, s.m1, s.n1), torch.zeros(1, s.m2, s.n2), c)
    assert best * (1 - 1e-6) <= squared_error(w, a, b, c) <= best * 1.001 + 1e-9 * scale


@pytest.mark.parametrize("samples", [4, 40], ids="{} samples".format)
@pytest.mark.parametrize("rows", [5, 9], ids="{} rows".format)
@pytest.mark.parametrize("transposed", [False, True], ids=["column ⊗ row", "row ⊗ column"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_weighted_low_rank_approximation_is_the_svd_of_the_weighted_matrix(
    rank, transposed, rows, samples
):
    w, c = randn(rows, 7), second_moment(7, samples)
    a_shape = (1, 7) if transposed else (rows, 1)
    a, b = in_metric(w, a_shape, rank, c, max_iterations=0)
    u, s, vh = torch.linalg.svd(w @ symmetric_root(c), full_matrices=False)
    slack = 2e-7 * s.square().sum().item()  # for the ridge of a C with fewer samples than columns
    best = s[rank:].square().sum().item()
    assert squared_error(w, a, b, c) == pytest.approx(best, rel=1e-6, abs=slack)
    products = u[:, :rank] * s[:rank] @ vh[:rank]  # the outputs that the optimum has
    if rank < samples:
        found = materialize(a, b) @ symmetric_root(c)
        torch.testing.assert_close(found, products, rtol=0, atol=1e-4 * s[0].item())
    norm_a, norm_b = a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm_a, norm_b)


def test_a_scalar_factor_or_all_terms_leave_no_error():
    w, c = randn(6, 8), second_moment(8, 30)
    for a_shape, rank in [((1, 1), 1), ((6, 8), 1), ((3, 2), 6)]:
        a, b = in_metric(w, a_shape, rank, c)
        torch.testing.assert_close(materialize(a, b), w, rtol=0, atol=1e-4)


def test_every_iteration_lowers_the_error():
    s, rank = KronShape(6, 4, 5, 6), 3
    w, c = randn(s.out_features, s.in_features), second_moment(s.in_features, 60)
    errors = []
    for steps in range(15):
        a, b = in_metric(w, (6, 4), rank, c, max_iterations=steps, tolerance=0)
        errors.append(squared_error(w, a, b, c))
    assert errors[0] == pytest.approx(squared_error(w, *nearest_kronecker(w, (6, 4), rank), c))
    assert errors[1] < 0.9 * errors[0]
    for previous, error in pairwise(errors):
        assert error <= previous * (1 + 1e-9)


def test_the_terms_that_alternation_ends_with_are_balanced_and_ordered():
    w, c = randn(30, 24), second_moment(24, 60)
    a, b = in_metric(w, (6, 4), 5, c)
    norm_a, norm_b = a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm_a, norm_b)
    size = norm_a * norm_b
    assert (size[1:] <= size[:-1]).all()


@pytest.mark.parametrize("factor", [1e-300, 1e-6, 1e6, 1e300])
def test_the_scale_of_the_moments_does_not_matter(factor):
    w, c = randn(12, 20), second_moment(20, 50)
    expected = materialize(*in_metric(w, (3, 5), 2, c))
    scaled = materialize(*in_metric(w, (3, 5), 2, c * factor))
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [10, 50], ids="{} samples".format)
def test_moments_in_float32_and_asymmetric_by_rounding(samples):
    w, c = randn(12, 20), second_moment(20, samples)
    noise = randn(20, 20, seed=9) * 1e-7 * c.diagonal().max()
    rounded = (c + noise).float()
    before = rounded.clone()
    assert not torch.equal(rounded, rounded.mT)
    expected = squared_error(w, *in_metric(w, (3, 5), 2, c), c)
    a, b = in_metric(w, (3, 5), 2, rounded)
    assert squared_error(w, a, b, c) == pytest.approx(expected, rel=0.02)
    assert torch.equal(rounded, before)


def test_inputs_that_take_fewer_directions_than_features_are_reproduced():
    """As many parameters as it needs: three inputs of a 16 x 16 layer, 3 * 16 outputs."""
    w, x = randn(16, 16), randn(3, 16, seed=1)
    c = x.mT @ x
    plain = squared_error(w, *nearest_kronecker(w, (4, 4), 4), c)
    a, b = in_metric(w, (4, 4), 4, c, max_iterations=100, tolerance=0)
    assert squared_error(w, a, b, c) < 1e-4 * plain
    assert a.abs().max() < 100 and b.abs().max() < 100


def test_autocast_and_inference_mode_change_nothing():
    w, c = randn(12, 20).float(), second_moment(20, 50).float()
    expected = in_metric(w, (3, 5), 2, c)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        a, b = in_metric(w.clone(), (3, 5), 2, c)
    assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


# --- sums of parts of different shapes

SUMS = {
    "kronecker and low rank": (12, 20, [((3, 5), 2), ((12, 1), 2)]),
    "low rank first": (20, 12, [((20, 1), 3), ((5, 3), 1)]),
    "two shapes": (12, 20, [((3, 5), 1), ((6, 2), 2)]),
    "three, one of them twice": (12, 12, [((3, 4), 1), ((1, 12), 1), ((3, 4), 1)]),
}


def total(fitted) -> torch.Tensor:
    return sum(materialize(a.double(), b.double()) for a, b in fitted)


def sum_error(w, fitted, c=None) -> float:
    off = w.double() - total(fitted)
    return (off.square() if c is None else (off @ c) * off).sum().item()


def greedy(w, parts, c=None):
    """One after another, each fitted to the residual."""
    fitted = []
    for a_shape, rank in parts:
        rest = w - total(fitted) if fitted else w
        fitted.append(nearest_kronecker(rest, a_shape, rank, second_moment=c))
    return fitted


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data-aware"])
@pytest.mark.parametrize("case", SUMS)
def test_a_sum_starts_from_the_greedy_fit_and_every_round_lowers_the_error(case, aware):
    rows, columns, parts = SUMS[case]
    w, c = randn(rows, columns), second_moment(columns, 60) if aware else None
    metric = decompose.shrunk(c) if aware else None  # in which the error is minimised
    errors = []
    for rounds in (0, 1, 2, 5, 20):
        fitted = decompose._nearest(w, parts, c, max_iterations=rounds, tolerance=0)
        assert [tuple(a.shape) for a, _ in fitted] == [(r, *shape) for shape, r in parts]
        errors.append(sum_error(w, fitted, metric))
    assert errors[0] == pytest.approx(sum_error(w, greedy(w, parts, c), metric), rel=1e-9)
    for previous, error in pairwise(errors):
        assert error <= previous * (1 + 1e-12)
    assert errors[-1] < 0.999 * errors[0]


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data-aware"])
@pytest.mark.parametrize("case", ["kronecker and low rank", "low rank first", "two shapes"])
def test_a_true_sum_is_recovered(case, aware):
    rows, columns, parts = SUMS[case]
    shapes = [KronShape.split(rows, columns, a_shape, rank) for a_shape, rank in parts]
    # Of different sizes, so that the greedy fit of the larger one is near.
    w = sum(
        10.0**-i * materialize(randn(s.rank, s.m1, s.n1, seed=i), randn(s.rank, s.m2, s.n2, seed=9))
        for i, s in enumerate(shapes)
    )
    c = second_moment(columns, 60) if aware else None
    metric = decompose.shrunk(c) if aware else None
    first, last = (
        decompose._nearest(w, parts, c, max_iterations=rounds, tolerance=0) for rounds in (0, 300)
    )
    assert sum_error(w, last, metric) < (1e-2 if aware else 1e-12) * sum_error(w, first, metric)
    if not aware:
        torch.testing.assert_close(total(last), w, rtol=0, atol=1e-6 * w.abs().max().item())


def test_a_sum_of_one_part_is_the_nearest_product():
    w, c = randn(12, 20), second_moment(20, 50)
    for moment in (None, c):
        ((a, b),) = nearest_kronecker_sum(w, [((3, 5), 2)], second_moment=moment)
        expected = nearest_kronecker(w, (3, 5), 2, second_moment=moment)
        torch.testing.assert_close(materialize(a, b), materialize(*expected))


FITS = {
    "plain": {},
    "data-aware": dict(second_moment=second_moment(20, 50)),
    "data-aware, large": dict(second_moment=second_moment(20, 50) * 1e300),
    "data-aware, small": dict(second_moment=second_moment(20, 50) * 1e-300),
}


def fitted_parts(w: torch.Tensor, kind: str, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A product, low rank, or the sum of both, of a weight ``(12, 20)``."""
    if kind == "sum":
        return nearest_kronecker_sum(w, [((3, 5), 2), ((12, 1), 2)], **options)
    return [nearest_kronecker(w, (3, 5) if kind == "product" else (12, 1), 2, **options)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(-530, 509),
    st.sampled_from(["product", "low rank", "sum"]),
    st.sampled_from(list(FITS)),
    st.integers(0, 2**31),
)
def test_factors_scale_with_the_weight_to_the_last_bit(half, kind, fit, seed):
    """``4 ** half`` times a weight has ``2 ** half`` times its factors, from 1e-319 to 1e307."""
    w = randn(12, 20, seed=seed).round(decimals=1)
    if half < -500:  # few enough digits to survive as subnormal numbers
        w = w.sign()
    scaled = w * 2.0**half * 2.0**half
    assert torch.equal(scaled * 2.0**-half * 2.0**-half, w)
    for part, small in zip(
        fitted_parts(scaled, kind, **FITS[fit]), fitted_parts(w, kind, **FITS[fit]), strict=True
    ):
        for factor, expected in zip(part, small, strict=True):
            assert factor.isfinite().all() and torch.equal(factor, expected * 2.0**half)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("end", ["largest", "smallest", "both"])
@pytest.mark.parametrize(
    ("kind", "fit"),
    [
        ("product", "plain"),
        ("product", "data-aware, large"),
        ("low rank", "data-aware, small"),
        ("sum", "plain"),
        ("sum", "data-aware, small"),
    ],
)
def test_entries_at_both_ends_of_a_dtype_have_finite_factors(dtype, end, kind, fit):
    """Entries at the other end vanish beside the largest, as in the weight's own norm."""
    limits = torch.finfo(dtype)
    signs = randn(12, 20).sign()
    w = torch.full((12, 20), limits.max, dtype=torch.float64)
    if end != "largest":
        w[: 12 if end == "smallest" else 6] = limits.smallest_normal * limits.eps
    parts = fitted_parts((w * signs).to(dtype), kind, **FITS[fit])
    assert all(t.dtype == dtype and t.isfinite().all() for part in parts for t in part)
    half = math.frexp(w.max().item())[1] // 2
    unit_w = w * signs * 2.0**-half * 2.0**-half
    found = sum(materialize(*(t.double() * 2.0**-half for t in part)) for part in parts)
    expected = sum(materialize(*part) for part in fitted_parts(unit_w, kind, **FITS[fit]))
    # Each factor is rounded once, to a relative eps / 2 or, denormal, to a part of the smallest.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * limits.eps)


def test_second_moments_that_are_zero_give_the_nearest_weights():
    w = randn(12, 20)
    for kind in ("product", "low rank", "sum"):
        plain, blind = (
            sum(materialize(*part) for part in fitted_parts(w, kind, second_moment=moment))
            for moment in (None, torch.zeros(20, 20))
        )
        assert (w - blind).norm().item() == pytest.approx((w - plain).norm().item(), rel=1e-3)


def test_a_sum_has_the_weights_dtype_and_leaves_the_weight_as_it_was():
    rows, columns, parts = SUMS["kronecker and low rank"]
    w = randn(rows, columns).bfloat16()
    before = w.clone()
    for a, b in nearest_kronecker_sum(w, parts):
        assert a.dtype == b.dtype == torch.bfloat16
    assert torch.equal(w, before)


# --- refusals


def test_a_sum_of_parts_that_do_not_fit_is_refused():
    w = torch.ones(4, 6)
    for parts, message in [
        ([], "parts is empty, but a sum needs at least one"),
        ([((2, 2), 1), ((3, 1), 1)], "weight's 4 rows are not divisible by a_shape[0] = 3"),
        ([((4, 1), 7)], "use rank <= 4"),
    ]:
        with pytest.raises(ValueError) as refusal:
            nearest_kronecker_sum(w, parts)
        assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(weight=torch.ones(3072, 768), a_shape=(5, 2)),
            "weight's 3072 rows are not divisible by a_shape[0] = 5; nearest divisors are 4 and 6.",
        ),
        (
            dict(weight=torch.ones(3072, 768), a_shape=(4, 10)),
            "weight's 768 columns are not divisible by a_shape[1] = 10; "
            "nearest divisors are 8 and 12.",
        ),
        (dict(a_shape=(9, 2)), "by a_shape[0] = 9; nearest divisor is 4."),
        (dict(a_shape=(0, 2)), "a_shape[0] = 0 is the factor's rows, at least 1."),
        (dict(a_shape=(2, -2)), "a_shape[1] = -2 is the factor's columns, at least 1."),
        (dict(a_shape=None), "a_shape = None must be two integers (m1, n1)"),
        (dict(a_shape=4), "a_shape = 4 must be two integers"),
        (dict(a_shape="22"), "a_shape = '22' must be two integers"),
        (dict(a_shape={2, 3}), "a_shape = {2, 3} must be two integers"),
        (dict(a_shape=(2, 2, 2)), "a_shape = (2, 2, 2) must be two integers"),
        (dict(a_shape=torch.ones(2, 2, 2).shape), "must be two integers"),
        (dict(a_shape=(2.0, 2)), "a_shape[0] = 2.0 must be an integer"),
        (dict(a_shape=(2, "2")), "a_shape[1] = '2' must be an integer"),
        (dict(a_shape=(True, 2)), "a_shape[0] = True must be an integer"),
        (dict(a_shape=(torch.tensor(True), 2)), "a_shape[0] = tensor(True) must be an integer"),
        (dict(rank=1.0), "rank = 1.0 must be an integer"),
        (dict(rank=True), "rank = True must be an integer"),
        (dict(rank=math.nan), "rank = nan must be an integer"),
        (dict(rank=0), "rank = 0, but a sum needs at least one term; use rank=1."),
        (dict(rank=-1), "rank = -1, but a sum needs at least one term"),
        (
            dict(rank=5),
            "rank = 5, but A 2x2 and B 2x3 already represent every weight with 4 terms; "
            "use rank <= 4.",
        ),
        (dict(weight=torch.ones(4, 6).fill_diagonal_(torch.nan)), "weight has 4 entries that are"),
        (dict(weight=torch.full((4, 6), -math.inf)), "weight has 24 entries that are NaN or inf"),
        (
            dict(weight=torch.ones(4, 6, dtype=torch.int64)),
            "(4, 6); use weight.float().",
        ),
        (
            dict(weight=torch.ones(4, 6, dtype=torch.complex64)),
            "(4, 6); factorise real and",
        ),
        (dict(weight=torch.ones(0, 6)), "weight is 0 x 6 and has no entries"),
        (dict(weight=torch.ones(2, 4, 6)), "got torch.float32 of shape (2, 4, 6); give a matrix"),
        (dict(weight=torch.ones(4)), "real floating-point matrix, got torch.float32 of shape (4,)"),
        (
            dict(second_moment=torch.eye(4)),
            "second_moment must be E[x xᵀ] of shape (6, 6), the weight's columns, got (4, 4).",
        ),
        *(
            (dict(second_moment=torch.eye(6).to(dtype)), f"real floating point, got {dtype}; sum")
            for dtype in (torch.bool, torch.int64, torch.complex64)
        ),
        (dict(second_moment=torch.eye(6, device="meta")), "second_moment is on the meta device"),
        (dict(second_moment=torch.ones(6)), "of shape (6, 6), the weight's columns, got (6,)."),
        (
            dict(second_moment=torch.full((6, 6), torch.nan)),
            "second_moment must be real and finite",
        ),
        (dict(second_moment=-torch.eye(6)), "symmetric with a non-negative diagonal"),
        (dict(second_moment=torch.eye(6) + torch.ones(6, 6).triu(1)), "must be symmetric"),
        (dict(second_moment=1e300 * (2 - torch.eye(6).double())), "|C_ij| <= √(C_ii C_jj)"),
    ],
    ids=lambda v: None if isinstance(v, str) else "-".join(v),
)
def test_a_bad_call_names_the_value_the_rule_and_the_remedy(change, message):
    call = {"weight": torch.ones(4, 6), "a_shape": (2, 2), **change}
    with pytest.raises(ValueError) as refusal:
        nearest_kronecker(**call)
    assert message in str(refusal.value)


NO_DENSE_TENSORS = {
    "list": torch.ones(6, 6).tolist(),
    "ndarray": np.ones((6, 6)),
    "sparse": torch.eye(6).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(6)] * 2, layout=torch.jagged),
}


@pytest.mark.parametrize("given", NO_DENSE_TENSORS)
def test_an_argument_that_is_not_a_dense_tensor_names_the_remedy(given):
    message = {
        "list": "must be a torch.Tensor, got list; use torch.as_tensor",
        "ndarray": "must be a torch.Tensor, got numpy.ndarray; use torch.as_tensor",
        "sparse": "has layout torch.sparse_coo, but must be dense; use .to_dense()",
        "nested": "is a nested tensor, but must be dense; pass its .values()",
    }[given]
    for fit in (
        lambda *args, **options: nearest_kronecker(*args, (2, 2), **options),
        lambda *args, **options: nearest_kronecker_sum(*args, [((2, 2), 1)], **options),
    ):
        with pytest.raises(TypeError, match=f"weight {message}"):
            fit(NO_DENSE_TENSORS[given])
        with pytest.raises(TypeError, match=f"second_moment {message}"):
            fit(torch.ones(6, 6), second_moment=NO_DENSE_TENSORS[given])
        with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got NoneType"):
            fit(None)


@pytest.mark.parametrize(
    "a_shape",
    [[2, 3], torch.ones(2, 3).shape, np.array([2, 3]), torch.tensor([2, 3]), (np.int32(2), 3)],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("rank", [2, np.int64(2), torch.tensor(2)], ids=lambda v: type(v).__name__)
def test_shapes_take_integers_of_any_library_in_any_sequence(a_shape, rank):
    w = randn(4, 6)
    expected = nearest_kronecker(w, (2, 3), 2)
    assert all(map(torch.equal, nearest_kronecker(w, a_shape, rank), expected))
    layer = KroneckerLinear(np.int64(6), 4, a_shape, rank)
    assert layer.a.shape == (2, 2, 3) and type(layer.rank) is type(layer.in_features) is int


def test_the_divisors_of_a_huge_size_are_found_at_once():
    """A search through all numbers up to the size took 30 s."""
    size = 999_999_937  # a prime
    calls = [
        lambda: KronShape.split(size, 768, (5, 2)),
        lambda: KroneckerEmbedding(9, size, 5),
        lambda: KronShape.split(2 * 3 * 5 * 10**8, 768, (7, 2)),
    ]
    start = time.process_time()
    for call, nearest in zip(calls, ("1 and 999999937", "1 and 999999937", "6 and 8"), strict=True):
        with pytest.raises(ValueError, match=f"nearest divisors are {nearest}"):
            call()
    assert time.process_time() - start < 5
