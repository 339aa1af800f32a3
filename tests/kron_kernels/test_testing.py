"""assert_close passes results with their rounding, and catches planted errors."""

import re

import pytest
import torch

from kron_kernels import KronShape, reference
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import SHAPES, draw, name
from kron_kernels.testing.checks import terms

NARROW = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *NARROW]


def ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def product(x, a, b):
    """``kron_matmul`` by einsum, in the operands' dtype."""
    n1, n2 = a.shape[2], b.shape[2]
    y = torch.einsum("tjq,kij,kpq->tip", x.unflatten(-1, (n1, n2)), a, b)
    return y.flatten(-2)


def caught(*args, **options) -> str:
    with pytest.raises(AssertionError) as failure:
        assert_close("y", *args, **options)
    return str(failure.value)


BROAD = KronShape(12, 8, 10, 16, 2)


# --- what must pass


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=ids)
@pytest.mark.parametrize("size", [(1,), (1000,), (30, 40)], ids=str)
def test_one_rounding_passes(size, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = torch.randn(size, dtype=wide, generator=torch.Generator().manual_seed(1))
    assert_close("y", expected.to(dtype), expected, terms=1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ids)
@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_a_product_in_its_own_dtype_passes(s, dtype):
    x, a, b = draw(s, 50, dtype)
    assert_close("y", product(x, a, b), reference.kron_matmul(x, a, b), terms(s))


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_a_long_sum_in_float32_passes(n):
    x, w = torch.randn(4, n), torch.randn(n, 4)
    assert_close("y", x @ w, x.double() @ w.double(), terms=n)


@pytest.mark.parametrize("dtype", NARROW, ids=ids)
def test_a_narrow_sum_accumulated_in_float32_passes_as_one_rounding(dtype):
    x, w = torch.randn(40, 4096).to(dtype), torch.randn(4096, 40).to(dtype)
    expected = x.double() @ w.double()
    assert_close("y", (x.float() @ w.float()).to(dtype), expected, terms=1)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_limits_follow_the_size_of_the_entries(size):
    expected = torch.randn(100, dtype=torch.float64) * size
    assert_close("y", expected.float(), expected, terms=1)
    caught((expected * (1 + 1e-4)).float(), expected, terms=1)


def test_nothing_and_zeros_pass():
    assert_close("y", torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), terms=1)
    assert_close("y", torch.zeros(3), torch.zeros(3, dtype=torch.float64), terms=1)


def test_a_given_scale_replaces_that_of_too_few_entries():
    """A sum of a hundred terms that happens to be near zero has the error of its terms."""
    x = torch.randn(100, dtype=torch.float64)
    expected = torch.zeros(1, dtype=torch.float64) + 1e-9
    actual = expected.float() + 1e-6 * x.norm().float() / 10
    assert_close("y", actual, expected, terms=100, scale=x.norm().item() / 10)
    caught(actual, expected, terms=100)


# --- what must not


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_entry_that_is_not_finite_is_caught(wrong, dtype):
    expected = torch.randn(40, 50, dtype=torch.float64)
    actual = expected.to(dtype, copy=True)
    actual[3, 7] = wrong
    message = caught(actual, expected, terms=500)
    assert "worst at (3, 7)" in message and str(actual[3, 7].item()) in message


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_one_wrong_entry_among_many_is_caught(dtype):
    s = BROAD
    x, a, b = draw(s, 500, dtype)
    expected = reference.kron_matmul(x, a, b)
    for wrong in (expected[5, 6] + 3, 10 * torch.ones(())):
        actual = expected.to(dtype, copy=True)
        actual[5, 6] = wrong
        assert "worst at (5, 6)" in caught(actual, expected, terms=1)
        if dtype not in NARROW:
            caught(actual, expected, terms(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("s", [s for s in SHAPES if s.rank > 1], ids=name)
def test_a_term_left_out_is_caught(s, dtype):
    x, a, b = draw(s, 100, dtype)
    expected = reference.kron_matmul(x, a, b)
    caught(product(x, a[1:], b[1:]), expected, terms(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_one_product_left_out_of_each_sum_is_caught(dtype):
    s = BROAD
    x, a, b = draw(s, 100, dtype)
    expected = reference.kron_matmul(x, a, b)
    short = b.clone()
    short[..., -1] = 0
    actual = reference.kron_matmul(x, a, short).to(dtype)
    caught(actual, expected, terms=1)
    if dtype != torch.bfloat16:
        caught(actual, expected, terms(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("which", ["a", "b", "both", "swapped"])
def test_a_transposed_or_swapped_factor_is_caught(which, dtype):
    s = KronShape(8, 8, 8, 8)
    x, a, b = draw(s, 100, dtype)
    expected = reference.kron_matmul(x, a, b)
    wrong_a = a.mT if which in ("a", "both") else a
    wrong_b = b.mT if which in ("b", "both") else b
    if which == "swapped":
        wrong_a, wrong_b = b, a
    caught(product(x, wrong_a, wrong_b), expected, terms(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_columns_out_of_order_are_caught(dtype):
    x, a, b = draw(BROAD, 100, dtype)
    expected = reference.kron_matmul(x, a, b)
    caught(expected.to(dtype).unflatten(-1, (12, 10)).mT.flatten(-2), expected, terms(BROAD))
    caught(expected.to(dtype).roll(1, 0), expected, terms(BROAD))


def narrow_sum(dtype: torch.dtype, n: int = 4096):
    """``(sum in dtype after each product, float64)`` of n products."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(200, n, generator=generator).to(dtype) for _ in range(2))
    total = torch.zeros(200, dtype=dtype)
    for x_i, w_i in zip(x.unbind(1), w.unbind(1), strict=True):
        total = total + x_i * w_i
    return total, (x.double() * w.double()).sum(1)


@pytest.mark.parametrize("dtype", NARROW, ids=ids)
def test_a_narrow_accumulator_is_caught_where_one_rounding_is_promised(dtype):
    caught(*narrow_sum(dtype), terms=1)


def test_a_float32_accumulator_in_float64_is_caught():
    x, w = torch.randn(20, 500).double(), torch.randn(500, 20).double()
    caught((x.float() @ w.float()).double(), x @ w, terms=500)


def test_reduced_precision_products_in_float32_are_caught():
    """TF32 keeps 10 bits of each operand's mantissa."""
    x, w = torch.randn(100, 256), torch.randn(256, 100)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, w)]
    caught(cut[0] @ cut[1], x.double() @ w.double(), terms=256)


def test_a_small_bias_on_every_entry_is_caught_by_rms():
    expected = torch.randn(1000, dtype=torch.float64)
    unit = torch.finfo(torch.float32).eps
    message = caught((expected + 6 * unit).float(), expected, terms=1)
    assert float(re.search(r"error (\S+) RMS", message)[1]) == pytest.approx(6, rel=0.1)


def test_another_shape_is_caught_even_if_it_broadcasts():
    expected = torch.zeros(3, 4, dtype=torch.float64)
    assert "shape (4,), not (3, 4)" in caught(torch.zeros(4), expected, terms=1)
    assert "shape (), not (1,)" in caught(torch.zeros(()), torch.zeros(1).double(), terms=1)


def test_a_smaller_slack_is_stricter():
    expected = torch.randn(1000, dtype=torch.float64)
    actual = (expected * (1 + 2 * torch.finfo(torch.float32).eps)).float()
    assert_close("y", actual, expected, terms=1)
    caught(actual, expected, terms=1, slack=1)


# --- many terms in 16 bits, where limits by the dtype's own epsilon would pass anything


@pytest.mark.parametrize("dtype", NARROW, ids=ids)
def test_a_narrow_accumulator_is_caught_over_many_terms(dtype):
    caught(*narrow_sum(dtype), terms=4096)


@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 1100), (torch.float16, 70_000)], ids=str)
def test_zeros_are_caught_over_many_terms(dtype, n):
    expected = torch.randn(1000, dtype=torch.float64).clamp(-3, 3)
    caught(torch.zeros(1000, dtype=dtype), expected, terms=n)


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_complex_result_is_not_compared_by_its_real_part():
    expected = torch.ones(9, dtype=torch.float64)
    caught(expected + 5j, expected, terms=1)
