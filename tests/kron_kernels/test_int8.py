"""Factors in int8 and their products, against integers in numpy and ``torch.kron`` in float64."""

import itertools
import math
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engines import REAL, SETS, at_threads
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels import (
    Int8Factor,
    int8_products,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends import abi, native
from kron_kernels.int8 import columns_of, round_rows
from kron_kernels.repeats import Repeats
from kron_kernels.shapes import contraction_order
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import ACTIVATIONS

# (instruction set, whether by its instruction for bytes)
NATIVE = [
    (name, of_bytes)
    for i, name in enumerate(SETS)
    for of_bytes in ([False, True] if abi.module.bytes(i) else [False])
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ENGINES = [("eager", False, dtype) for dtype in REAL]
ENGINES += [(*engine, dtype) for engine in NATIVE for dtype in FLOATS]


def use(name: str, of_bytes: bool, monkeypatch) -> str:
    if name == "eager":
        return name
    monkeypatch.setattr(native, "_isa", SETS.index(name))
    monkeypatch.setattr(native, "_bytes", int(of_bytes))
    return "native"


def label(engine) -> str:
    name, of_bytes, *dtype = engine
    return "-".join([name + "-bytes" * of_bytes, *(str(d)[6:] for d in dtype)])


@pytest.fixture(params=ENGINES, ids=label)
def engine(request, monkeypatch) -> tuple[str, torch.dtype]:
    """A backend's name and a dtype."""
    *how, dtype = request.param
    return use(*how, monkeypatch), dtype


@pytest.fixture(params=[("eager", False), *NATIVE], ids=label)
def backend(request, monkeypatch) -> str:
    return use(*request.param, monkeypatch)


native_only = pytest.mark.skipif(native._native is None, reason="the kernels are not compiled")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def powers(*shape: int) -> Int8Factor:
    """Entries from -127 to 127, and scales that are powers of two."""
    r, m, _ = shape
    values = torch.randint(-127, 128, shape, dtype=torch.int8)
    return Int8Factor(values, 2.0 ** torch.randint(-9, -5, (r, m, 1)))


# --- Int8Factor.of


def as_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("shared", [False, True])
def test_a_factor_is_the_nearest_of_its_scales(shared):
    t = draw(3, 5, 17)
    t[1, 2] = 0
    if shared:
        t[:, 4] = 0
    values, scale = Int8Factor.of(t, shared)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == ((1, 5, 1) if shared else (3, 5, 1)) and scale.is_contiguous()
    # numpy divides and rounds half to even as well
    largest = np.abs(t.numpy()).max((0, 2) if shared else 2, keepdims=True)
    by_hand = largest / np.float32(127)
    np.testing.assert_array_equal(scale, by_hand)
    np.testing.assert_array_equal(values, np.rint(t.numpy() / np.where(by_hand, by_hand, 1)))
    assert values.abs().amax((0, 2) if shared else 2).unique().tolist() == [0, 127]
    f = Int8Factor(values, scale)
    error = (f.dequantized() - t).abs()
    assert (error <= scale * (0.5 + 1e-5)).all()  # t / scale is rounded before it is rounded
    assert f.dequantized()[1, 2].tolist() == [0] * 17
    assert (f.shape, f.ndim, f.stride()) == (t.shape, 3, (85, 17, 1))


def test_a_factor_of_multiples_of_its_scale_is_exact():
    f = powers(2, 3, 9)
    f.values[..., 0] = 127
    again = Int8Factor.of(f.dequantized())
    assert torch.equal(again.values, f.values) and torch.equal(again.scale, f.scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], 2)[..., :17],
        lambda t: torch.cat([t, t], 2)[..., ::2].repeat_interleave(2, 2)[..., ::2],
        lambda t: t.requires_grad_(),
        lambda t: torch.from_numpy(t.numpy()),
        lambda t: t[:1].expand(3, 5, 17),
        *[lambda t, d=d: t.to(d) for d in (torch.bfloat16, torch.float16, torch.float64)],
    ],
    ids=["mT", "rows apart", "columns apart", "grad", "numpy", "expanded", "bf16", "f16", "f64"],
)
def test_a_factor_of_a_view_or_another_dtype(change):
    t = change(draw(3, 5, 17))
    f, expected = Int8Factor.of(t), Int8Factor.of(as_contiguous(t).float())
    assert torch.equal(f.values, expected.values) and torch.equal(f.scale, expected.scale)
    assert not f.scale.requires_grad
    for dtype in REAL:
        assert torch.equal(f.dequantized(dtype), (f.values * f.scale).to(dtype))


def test_a_factor_of_integers_and_of_numbers_near_the_limits():
    assert Int8Factor.of(torch.tensor([[[-3, 127]]])).values.tolist() == [[[-3, 127]]]
    most = torch.finfo(torch.float32).max
    assert Int8Factor.of(torch.tensor([[[most, -most, 0.0]]])).values.tolist() == [[[127, -127, 0]]]
    # A scale that is subnormal has few bits; entries stay within 127.
    tiny = torch.tensor([[[1e-42, -1e-42, 3e-43]]])
    f = Int8Factor.of(tiny)
    assert f.values.abs().max() <= 127
    assert (f.dequantized() - tiny).abs().max() <= tiny.max() / 127 + 127 * 2**-150
    assert Int8Factor.of(tiny * 1e-2).dequantized().tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([[1.0]], TypeError, "a factor must be a torch.Tensor, got list; use torch.as_tensor"),
        (torch.ones(1, 2, 2).to_sparse(), TypeError, r"use .to_dense\(\)"),
        (torch.ones(2, 3), ValueError, r"real \(r, m, n\).* got torch.float32 \(2, 3\); use t\[No"),
        (torch.ones(3), ValueError, r"got torch.float32 \(3,\)\."),
        (torch.ones(1, 2, 0), ValueError, r"every side at least 1, got torch.float32 \(1, 2, 0\)"),
        (torch.ones(1, 2, 2) + 0j, ValueError, "must be real .* got torch.complex64"),
        (torch.tensor([[[1, math.nan, math.inf]]]), ValueError, "2 entries that are NaN or infin"),
        (torch.full((1, 1, 1), 1e300, dtype=torch.float64), ValueError, "1 entries that are NaN"),
    ],
    ids=["list", "sparse", "2-D", "1-D", "empty", "complex", "not finite", "too large"],
)
def test_other_factors_are_refused(t, error, message):
    with pytest.raises(error, match=message):
        Int8Factor.of(t)


# --- rounding of rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_rounded_to_multiples_of_their_largest_entry(dtype):
    x = draw(9, 4, 33, dtype=dtype) * 10.0 ** torch.arange(-4, 5)[:, None, None]
    integers, unit = round_rows(x)
    assert unit.shape == (9, 4, 1) and integers.abs().amax(-1).unique().tolist() == [127]
    assert torch.equal(integers, integers.round())
    torch.testing.assert_close(unit, x.abs().amax(-1, keepdim=True) / 127)
    assert ((integers * unit - x).abs() <= unit * (0.5 + 1e-4)).all()


def test_rows_of_zeros_of_tiny_numbers_and_of_numbers_that_are_not_finite():
    most, least = torch.finfo(torch.float32).max, 2.0**-100
    finite = [[0, 0], [least, -least], [least * 0.999, 1e-45], [most, -most], [most, 1]]
    x = torch.tensor([*finite, [1, math.nan], [math.inf, 1], [-math.inf, math.inf]])
    integers, unit = round_rows(x)
    rows = [[0, 0], [127, -127], [0, 0], [127, -127], [127, 0], *[[0, 0]] * 3]
    assert integers.tolist() == rows
    torch.testing.assert_close(unit[:5, 0], torch.tensor([0, least, 0, most, most]) / 127)
    assert unit[5:].isnan().all()


# --- products against integers

Operand = np.ndarray


def rounded(v: Operand) -> tuple[Operand, Operand]:
    """Integers and units of the last axis, in v's dtype."""
    of = v.dtype.type
    with np.errstate(invalid="ignore"):
        largest = np.abs(v).max(-1, keepdims=True)
        finite = largest < np.inf
        used = finite & (largest >= of(2.0**-100))
        safe = np.where(used, largest, of(1))
        integers = np.rint(np.where(used, v, of(0)) * (of(127) / safe)).astype(np.int64)
    return integers, np.where(finite, np.where(used, safe / of(127), of(0)), of(np.nan))


def times(v: Operand, f, k: int) -> Operand:
    """The last axis of v times term k of a factor, the integers exactly, all else in v's dtype."""
    if isinstance(f, torch.Tensor):
        return (v.astype(np.float64) @ f[k].double().numpy().T).astype(v.dtype)
    integers, unit = rounded(v)
    sums = (integers @ f.values[k].numpy().astype(np.int64).T).astype(v.dtype)
    scale = f.scale[k if len(f.scale) > 1 else 0].numpy()
    return sums * (unit * scale.T.astype(v.dtype)).astype(v.dtype)


def oracle(x: torch.Tensor, *factors) -> torch.Tensor:
    """Terms of one or two factors, in float32 or in x's float64."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    sides = [tuple(f.shape[1:]) for f in factors]
    total = 0
    for k in range(factors[0].shape[0]):
        v = wide.reshape(-1, *(n for _, n in sides)).numpy()
        for axis in contraction_order(sides):
            v = np.moveaxis(times(np.moveaxis(v, axis + 1, -1), factors[axis], k), -1, axis + 1)
        total = total + v.reshape(len(v), -1)
    return torch.from_numpy(total).view(*x.shape[:-1], -1).to(x.dtype)


def dyadic(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/4 of up to 6 bits, whose sums float32 holds exactly."""
    return (torch.randint(-31, 32, shape) / 4).to(dtype)


def signs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([-1.0, 0.0, 0.5, 1.0])[torch.randint(0, 4, shape)].to(dtype)


def test_a_single_factor_is_the_integers_oracle_bit_for_bit(engine):
    backend, dtype = engine
    sizes = itertools.product((1, 3, 8, 33, 96, 1024), ((1, 1), (7, 5), (40, 33)))
    for columns, (rows, tokens) in sizes:
        f = Int8Factor.of(draw(1, rows, columns))
        x = draw(tokens, columns, dtype=dtype)
        assert torch.equal(kron_matmul(x, f, backend=backend), oracle(x, f))


# Contracted before and after the float factor; tails of rows, columns and tokens; sums.
EXACT = [(2, 3, 40, 32, 1), (40, 32, 2, 3, 1), (1, 5, 33, 31, 1), (3, 1, 17, 9, 3), (9, 9, 2, 4, 2)]


@pytest.mark.parametrize("sizes", EXACT, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("tokens", [1, 4, 19, 67])
def test_two_factors_are_the_integers_oracle_bit_for_bit(sizes, tokens, engine):
    """Where float32 is exact but for the rounding: the scales are powers of two."""
    backend, dtype = engine
    m1, n1, m2, n2, rank = sizes
    of_first = m1 * n1 > m2 * n2
    a, b = signs(rank, m1, n1, dtype=dtype), signs(rank, m2, n2, dtype=dtype)
    f = powers(rank, *((m1, n1) if of_first else (m2, n2)))
    factors = (f, b) if of_first else (a, f)
    # Each vector's largest entry is 127 times a power of two, if the factor comes first.
    x = torch.randint(-127, 128, (tokens, n1, n2)).to(dtype)
    (x[:, :, 0] if factors[1] is f else x[:, 0])[:] = 127
    x = x.flatten(1)
    if contraction_order([(m1, n1), (m2, n2)])[0] != factors.index(f):
        x = dyadic(tokens, n1 * n2, dtype=dtype)
    expected = oracle(x, *factors)
    y = kron_matmul(x, *factors, backend=backend)
    if rank == 1:
        assert torch.equal(y, expected)
    assert near(y, expected, 2)  # a sum of terms may be rounded once, by FMA


def near(y: torch.Tensor, expected: torch.Tensor, ulps: float) -> bool:
    """Whether they differ by some units in the last place of the largest entry of a row."""
    assert y.shape == expected.shape and y.dtype == expected.dtype
    rows = expected.double().abs().amax(-1, keepdim=True)
    return bool(((y.double() - expected.double()).abs() <= ulps * unit_of(y.dtype) * rows).all())


def unit_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_products_of_two_int8_factors_are_the_oracle_to_the_last_bits(engine):
    backend, dtype = engine
    for shape in ((1, 9, 12), (1, 33, 10)), ((3, 16, 8), (3, 8, 40)):
        factors = [Int8Factor.of(draw(*s)) for s in shape]
        x = draw(21, math.prod(f.shape[2] for f in factors), dtype=dtype)
        y = kron_matmul(x, *factors, backend=backend)
        # Every operation is the oracle's; only sums of terms may be added in another order.
        assert near(y, oracle(x, *factors), 2)


def test_more_than_1024_columns(backend):
    """The sums exceed what float32 holds, and eager adds them in parts."""
    for columns in (1025, 2500):
        f = Int8Factor.of(draw(1, 3, columns))
        x = torch.cat([draw(3, columns), torch.ones(1, columns)])
        assert near(kron_matmul(x, f, backend=backend), oracle(x, f), 2)


def test_as_many_columns_as_a_sum_holds(backend):
    f = Int8Factor(
        torch.tensor([127, -127, -128], dtype=torch.int8)[None, :, None].expand(1, 3, 65536),
        torch.ones(1, 3, 1),
    )
    y = kron_matmul(torch.full((2, 65536), 127.0), f, backend=backend)
    assert y.tolist() == [[127.0 * 65536 * v for v in (127, -127, -128)]] * 2
    more = f.values[:, :1, :1].expand(1, 1, 65537)
    with pytest.raises(ValueError, match="factor 0 has more than 65536 columns; keep it in float3"):
        kron_matmul(torch.ones(1, 65537), Int8Factor(more, torch.ones(1, 1, 1)), backend=backend)
    column, row = more.reshape(65537, 1, 1), torch.ones(65537, 1, 2)
    with pytest.raises(ValueError, match="factor 0 has more than 65536 columns"):
        kron_matmul(torch.ones(1, 2), Int8Factor(column, torch.ones(1, 1, 1)), row, backend=backend)


# --- products against torch.kron in float64


def step(x, error, w, half, eps: float):
    """``x (…, n)`` times ``w (m, n)``, and the error of what a kernel has instead of it.

    Weights are within ``half (m, 1)`` of w and multiply rounded numbers, or are w itself for None.
    """
    w, far = w.double(), x.abs() + error
    off = torch.zeros_like(w) if half is None else half.double().expand_as(w)
    if half is not None:
        # Half a unit; the quotient, its inverse and their product are rounded: 127 * 3 eps.
        unit = far.amax(-1, keepdim=True) / 127
        error = error + torch.where(unit * 127 < 2.0**-99, 2.0**-99, unit * (0.5 + 400 * eps))
    of_sums = (w.shape[1] + 4) * eps * ((far + error) @ (w.abs() + off).mT)
    return x @ w.mT, error @ w.abs().mT + (far + error) @ off.mT + of_sums


def bounded(x, originals, factors, eps: float, error=0.0):
    """The product of the originals in float64, and how far that of the factors may be from it.

    ``error`` is how far a kernel's x may be from x, and eps half of a unit of its sums.
    """

    def half(f, k, axis=1):
        if isinstance(f, torch.Tensor):
            return None
        scale = f.scale.expand(f.shape[0], -1, -1) / 2 * (1 + 300 * eps)  # t / scale is rounded
        return scale[k] if axis == 1 else scale[:, 0]

    x = x.double().reshape(-1, x.shape[-1])
    error = error + torch.zeros_like(x)
    columns = columns_of(factors)
    if columns is not None:
        c, row = columns, 1 - columns
        y, e = step(x, error, originals[row][:, 0], half(factors[row], 0, 0), eps)
        y, e = step(y, e, originals[c][:, :, 0].mT, half(factors[c], 0), eps)
    else:
        sides = [tuple(f.shape[1:]) for f in factors]
        terms = []
        for k in range(factors[0].shape[0]):
            v, e = (t.unflatten(1, [n for _, n in sides]) for t in (x, error))
            for axis in contraction_order(sides):
                v, e = v.movedim(axis + 1, -1), e.movedim(axis + 1, -1)
                v, e = step(v, e, originals[axis][k], half(factors[axis], k), eps)
                v, e = v.movedim(-1, axis + 1), e.movedim(-1, axis + 1)
            terms.append((v.flatten(1), e.flatten(1)))
        y, e = (sum(t) for t in zip(*terms, strict=True))
        e = e + len(terms) * eps * sum(v.abs() for v, _ in terms)
    return y, e


def half_unit(dtype: torch.dtype) -> float:
    """Of the sums in a product of this dtype."""
    return 2.0 ** (-53 if dtype == torch.float64 else -24)


def hold(y, x, originals, factors) -> None:
    expected, error = bounded(x, originals, factors, half_unit(x.dtype))
    exact = reference.kron_matmul(x.double(), *(t.double() for t in originals)).flatten(0, -2)
    torch.testing.assert_close(expected, exact)  # the bound is of the right product
    error = error + torch.finfo(y.dtype).eps * (expected.abs() + error)  # y is rounded
    off = (y.double().flatten(0, -2) - expected).abs()
    assert (off <= error).all(), f"{(off / error).max():.3g} of the bound"
    # The bound means something: it is far below the result itself.
    assert error.square().mean().sqrt() < 0.5 * expected.square().mean().sqrt()


PRODUCTS = [(1, 1, 40, 33, 1), (40, 32, 2, 3, 1), (3, 2, 24, 40, 3), (33, 1, 1, 29, 21)]
PRODUCTS += [(1, 29, 33, 1, 21), (16, 12, 10, 9, 2)]


@pytest.mark.parametrize("sizes", PRODUCTS, ids=lambda s: "x".join(map(str, s)))
def test_errors_are_those_of_rounding(sizes, engine):
    for which in ("a", "b", "ab"):
        hold_products(sizes, which, *engine)


def hold_products(sizes, which: str, backend: str, dtype: torch.dtype) -> None:
    """For a few tokens, with int8 factors that are named."""
    m1, n1, m2, n2, rank = sizes
    originals = draw(rank, m1, n1, dtype=dtype), draw(rank, m2, n2, dtype=dtype)
    columns = columns_of(originals)
    factors = [
        Int8Factor.of(t, shared=i == columns) if name in which else t
        for i, (name, t) in enumerate(zip("ab", originals, strict=True))
    ]
    for tokens in (1, 3, 37):
        x = draw(tokens, n1 * n2, dtype=dtype)
        hold(kron_matmul(x, *factors, backend=backend), x, originals, factors)
    if columns is None and rank > 1:  # terms that share scales
        factors = [Int8Factor.of(t, shared=True) for t in originals]
        hold(kron_matmul(x, *factors, backend=backend), x, originals, factors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_activation_and_residual(activation, engine):
    backend, dtype = engine
    a, f = signs(1, 2, 3, dtype=dtype), powers(1, 20, 32)
    x, bias = dyadic(5, 96, dtype=dtype), draw(40, dtype=dtype)
    residual = draw(5, 40, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = oracle(x.to(wide), a.to(wide), f).double() + bias.double()
    expected = reference.kron_matmul(z, torch.eye(40).double(), activation=activation)
    y = kron_matmul(x, a, f, bias=bias, activation=activation, residual=residual, backend=backend)
    # eager rounds to 16 bits before the activation and before the residual
    eps, size = torch.finfo(dtype).eps, expected.abs() + residual.double().abs() + z.abs()
    assert y.dtype == dtype
    assert ((y.double() - expected - residual.double()).abs() <= 2 * eps * size + 1e-6).all()
    without = kron_matmul(x, a, f, backend=backend)
    assert not torch.equal(y, without)


# --- shapes and strides of x


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_x_of_any_shape(lead, backend):
    a, f = draw(1, 2, 3), Int8Factor.of(draw(1, 20, 32))
    x, residual = draw(*lead, 96), draw(*lead, 40)
    y = kron_matmul(x, a, f, activation="relu", residual=residual, backend=backend)
    assert y.shape == (*lead, 40)
    rows = kron_matmul(x.reshape(-1, 96), a, f, activation="relu", backend=backend)
    if x.numel():
        torch.testing.assert_close(y, rows.view(y.shape) + residual, rtol=1e-5, atol=1e-4)
    q, k, v = kron_qkv(x, (a, f, None), (a, draw(1, 4, 32), None), (a, f, None), backend=backend)
    assert q.shape == v.shape == (*lead, 40) and k.shape == (*lead, 8)
    assert torch.equal(q, v)
    down = (Int8Factor.of(draw(1, 33, 40)), draw(1, 1, 1), None)
    assert kron_feed_forward(x, (a, f, None), down, backend=backend).shape == (*lead, 33)


def test_factors_of_two_dimensions_and_strides(backend):
    a, f = draw(2, 3), Int8Factor.of(draw(1, 20, 32))
    x = draw(7, 96)
    y = kron_matmul(x, a, f, backend=backend)
    turned = Int8Factor(f.values.mT.contiguous().mT, f.scale)
    apart = Int8Factor(torch.cat([f.values] * 2, 2)[..., :32], torch.cat([f.scale] * 2, 2)[..., :1])
    backwards = torch.from_numpy(f.values.numpy()[:, ::-1].copy()).flip(1)
    for other in (turned, apart, Int8Factor(backwards, f.scale)):
        assert torch.equal(kron_matmul(x, a, other, backend=backend), y)
        q, *_ = kron_qkv(x, *[(a, other, None)] * 3, backend=backend)
        assert torch.equal(q, y)
    for same in (
        draw(96, 7).copy_(x.T).T,
        torch.cat([x, x], 1)[:, :96],
        x[:, None].expand(7, 1, 96),
    ):
        assert torch.equal(kron_matmul(same, a[None], f, backend=backend).view(7, 40), y)


def test_rows_of_a_larger_factor_with_scales_apart(backend):
    """Scales of every other row: their stride is 2."""
    whole = Int8Factor.of(draw(2, 24, 40))
    part = Int8Factor(whole.values[:, ::2], whole.scale[:, ::2])
    x, a = draw(6, 80), draw(2, 3, 2)
    expected = kron_matmul(x, a, whole, backend=backend).view(6, 3, 24)[..., ::2]
    y = kron_matmul(x, a, part, backend=backend).view(6, 3, 12)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    shared = Int8Factor.of(whole.dequantized(), shared=True)
    expanded = Int8Factor(shared.values, shared.scale.expand(2, 24, 1))
    ys = [kron_matmul(x, a, f, backend=backend) for f in (shared, expanded)]
    assert torch.equal(*ys)


def test_a_read_only_x_is_read(backend):
    given = np.random.default_rng(0).standard_normal((5, 32), dtype=np.float32)
    given.flags.writeable = False
    f = Int8Factor.of(draw(1, 12, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that it cannot be written to
        x = torch.from_numpy(given)
    assert torch.equal(kron_matmul(x, f, backend=backend), oracle(x.clone(), f))


# --- extremes


def test_factors_and_tokens_at_the_limits_of_int8(backend):
    for value in (127, -127, -128, 0):
        f = Int8Factor(torch.full((1, 7, 77), value, dtype=torch.int8), torch.ones(1, 7, 1))
        for x in (torch.full((3, 77), 127.0), torch.full((3, 77), -127.0), torch.zeros(3, 77)):
            assert torch.equal(kron_matmul(x, f, backend=backend), x[:, :7] * value * 77)


def test_an_outlier_rounds_only_the_vector_it_is_in(backend):
    a, f = draw(1, 3, 4), Int8Factor.of(draw(1, 20, 32))
    x = draw(37, 128)
    y = kron_matmul(x, a, f, backend=backend)
    other = x.clone()
    other[5, 40] = 1e30  # in the second of four vectors of the token
    changed = kron_matmul(other, a, f, backend=backend)
    unchanged = torch.arange(37) != 5
    assert torch.equal(changed[unchanged], y[unchanged])
    # The other entries of the vector are below half a unit, so only the outlier is left of it.
    x[5, 32:64] = 0
    rest = kron_matmul(x, a, f, backend=backend)[5]
    alone = torch.zeros(1, 128)
    alone[0, 40] = 1e30
    of_outlier = kron_matmul(alone, a, f, backend=backend)[0]
    torch.testing.assert_close(changed[5], of_outlier + rest, rtol=1e-6, atol=1e23)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_in_their_token(bad, engine):
    backend, dtype = engine
    for factors in (
        (Int8Factor.of(draw(1, 20, 32)),),
        (draw(1, 2, 4, dtype=dtype), Int8Factor.of(draw(1, 20, 8))),
        (Int8Factor.of(draw(1, 9, 16)), draw(1, 7, 2, dtype=dtype)),
        (Int8Factor.of(draw(11, 9, 1), shared=True), Int8Factor.of(draw(11, 1, 32))),
    ):
        x = draw(41, 32, dtype=dtype)
        y = kron_matmul(x, *factors, backend=backend)
        x[7, 3] = bad
        other = kron_matmul(x, *factors, backend=backend)
        finite = torch.arange(41) != 7
        assert torch.equal(other[finite], y[finite])
        assert not other[7].isfinite().any()


def test_numbers_below_2_to_the_minus_100_count_as_zeros(backend):
    f = Int8Factor.of(draw(1, 20, 32))
    x = torch.full((3, 32), 2.0**-100)
    x[1] = 2.0**-101
    x[2] = 1e-45
    y = kron_matmul(x, f, backend=backend)
    assert torch.equal(y, oracle(x, f)) and y[0].abs().min() > 0
    assert y[1:].tolist() == [[0.0] * 20] * 2
    assert kron_matmul(x[1:], f, bias=torch.ones(20), backend=backend).unique().tolist() == [1.0]


# --- the fused calls


def layer_and_originals(r, m1, n1, m2, n2, int8, dtype):
    """``(a, b, bias)``, a and b in int8 if they are named; and what a and b were made of."""
    scale = (r * n1 * n2) ** -0.25
    originals = draw(r, m1, n1, dtype=dtype) * scale, draw(r, m2, n2, dtype=dtype) * scale
    columns = columns_of(originals)
    a, b = (
        Int8Factor.of(t, shared=i == columns) if name in int8 else t
        for i, (name, t) in enumerate(zip("ab", originals, strict=True))
    )
    return (a, b, draw(m1 * m2, dtype=dtype)), *originals


def layer(*sizes_and_dtype):
    return layer_and_originals(*sizes_and_dtype)[0]


def test_three_products_are_single_ones(engine):
    backend, dtype = engine
    x = draw(2, 19, 64, dtype=dtype)
    layers = [
        layer(1, 2, 2, 32, 32, "b", dtype),
        (*layer(9, 48, 1, 1, 64, "ab", dtype)[:2], None),
        layer(2, 16, 16, 3, 4, "", dtype),
    ]
    ys = kron_qkv(x, *layers, backend=backend)
    for (a, b, bias), y in zip(layers, ys, strict=True):
        if isinstance(a, Int8Factor) or isinstance(b, Int8Factor):
            assert near(y, kron_matmul(x, a, b, bias=bias, backend=backend), 2)
        else:
            assert_close("y", y, reference.kron_matmul(x, a, b, bias=bias), 2 * (16 + 4))


# Two whose factors meet in the hidden vector, two that do not, and an up or a down of floats.
BLOCKS = [
    ((1, 8, 2, 16, 24), (1, 2, 8, 24, 16), ("b", "b")),
    ((2, 8, 2, 16, 24), (3, 2, 8, 24, 16), ("b", "")),
    ((1, 16, 12, 8, 4), (1, 12, 16, 4, 8), ("a", "ab")),
    ((20, 128, 1, 1, 48), (1, 2, 8, 24, 16), ("ab", "b")),
    ((1, 8, 2, 16, 24), (12, 48, 1, 1, 128), ("", "a")),
]


@pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda b: "-".join("x".join(map(str, s)) for s in b[:2])
)
@pytest.mark.parametrize("activation", ["gelu", None])
def test_a_feed_forward_block_is_its_products(block, activation, engine):
    backend, dtype = engine
    *sizes, int8 = block
    (up, *of_up), (down, *of_down) = (
        layer_and_originals(*s, name, dtype) for s, name in zip(sizes, int8, strict=True)
    )
    eps, of_sums = torch.finfo(dtype).eps, half_unit(dtype)
    for tokens in (1, 6, 40):
        x, residual = draw(tokens, 48, dtype=dtype), draw(tokens, 48, dtype=dtype)
        y = kron_feed_forward(
            x, up, down, activation=activation, residual=residual, backend=backend
        )
        h, error = bounded(x, of_up, up[:2], of_sums)
        h = h + up[2].double()
        error = error + eps * (h.abs() + error)
        if activation:
            h, error = F.gelu(h), 1.13 * error  # the largest slope of gelu
            error = error + 4 * eps * (h.abs() + error) + 1e-6
        y2, error = bounded(h, of_down, down[:2], of_sums, error)
        expected = y2 + down[2].double() + residual.double()
        error = error + 3 * eps * (y2.abs() + expected.abs() + error)
        off = (y.double() - expected).abs()
        assert (off <= error).all(), f"{(off / error).max():.3g} of the bound"
        assert off.square().mean() < 0.05 * y2.square().mean()


def test_a_block_of_exact_numbers_is_its_products_bit_for_bit(engine):
    """With relu and power-of-two scales, float32 rounds nothing but what int8 rounds."""
    backend, dtype = engine
    a1, f1 = signs(1, 8, 2, dtype=dtype), powers(1, 16, 24)
    a2, f2 = signs(1, 2, 8, dtype=dtype), powers(1, 24, 16)
    x = torch.randint(-127, 128, (21, 2, 24)).to(dtype)
    x[..., 0] = 127
    x = x.flatten(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h = oracle(x.to(wide), a1.to(wide), f1).relu()
    expected = oracle(h, a2.to(wide), f2)
    if dtype in (torch.float32, torch.float64):
        y = kron_feed_forward(x, (a1, f1, None), (a2, f2, None), activation="relu", backend=backend)
        assert near(y, expected, 1)
    elif backend == "native":
        y = kron_feed_forward(x, (a1, f1, None), (a2, f2, None), activation="relu", backend=backend)
        assert near(y, expected.to(dtype), 1)


# --- threads and processes


@native_only
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_bits_do_not_depend_on_the_number_of_threads(tokens, monkeypatch):
    for engine in NATIVE:
        use(*engine, monkeypatch)
        a, f = draw(1, 2, 2), Int8Factor.of(draw(1, 96, 96))
        x = draw(tokens, 192)
        low = Int8Factor.of(draw(40, 192, 1), shared=True), Int8Factor.of(draw(40, 1, 192))
        for call in (
            lambda: kron_matmul(x, a, f, backend="native"),  # noqa: B023
            lambda: kron_qkv(x, (a, f, None), (f, a, None), (*low, None))[2],  # noqa: B023
            lambda: kron_feed_forward(x, (a, f, None), (*low, None)),  # noqa: B023
        ):
            first, *others = at_threads(call)
            assert all(torch.equal(y, first) for y in others)


@native_only
def test_instruction_sets_give_the_same_bits(monkeypatch):
    f, x = Int8Factor.of(draw(1, 40, 75)), draw(50, 75)
    ys = []
    for engine in NATIVE:
        use(*engine, monkeypatch)
        ys.append(kron_matmul(x, f, activation="relu", backend="native"))
    ys.append(kron_matmul(x, f, activation="relu", backend="eager"))
    assert all(torch.equal(y, ys[0]) for y in ys)


def _in_child(queue, x, f):
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch fills in its own pool
    queue.put(kron_matmul(x, *f, backend="native").tolist())


@native_only
def test_a_forked_child_can_call():
    f, x = (draw(1, 2, 2), Int8Factor.of(draw(1, 96, 96))), draw(300, 192)
    torch.set_num_threads(2)
    expected = kron_matmul(x, *f, backend="native").tolist()  # torch's pool is up
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x, f))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


# --- repeated calls


@pytest.fixture
def known(monkeypatch):
    """How many calls are remembered."""
    repeats = Repeats()
    monkeypatch.setattr(int8_products, "_matmuls", repeats)
    return lambda: len(repeats._again)


@native_only
def test_a_repeated_call_asks_nothing_and_gives_the_same(known, monkeypatch):
    def operands():
        f = Int8Factor.of(draw(2, 20, 32))
        return draw(5, 96), draw(2, 2, 3), f, draw(40), draw(5, 40)

    def product(x, a, f, bias, residual):
        return kron_matmul(x, a, f, bias=bias, activation="relu", residual=residual)

    product(*operands())
    assert known() == 1
    given = operands()
    with monkeypatch.context() as patch:
        patch.setattr(int8_products, "checked_factors", None)
        y = product(*given)
    x, a, f, bias, residual = given
    assert torch.equal(y, native.kron_matmul(x, (a, f), bias, "relu", residual))
    assert known() == 1
    f.values.zero_()  # the numbers are read again
    assert torch.equal(product(*given), bias.relu() + residual)


@native_only
def test_another_call_is_not_mistaken_for_a_known_one(known):
    a, f = draw(2, 2, 3), Int8Factor.of(draw(2, 20, 32))
    x, bias = draw(5, 96), draw(40)
    shared = Int8Factor.of(draw(2, 20, 32), shared=True)
    calls = [
        (x, a, f),
        (x, a, shared),
        (x.bfloat16(), a.bfloat16(), f),
        (draw(6, 96), a, f),
        (x, a, Int8Factor(f.values.mT.contiguous().mT, f.scale)),
        (x, Int8Factor.of(a), f),
        (x, Int8Factor.of(a), draw(2, 20, 32)),
        (x, a, Int8Factor(f.values, torch.cat([f.scale, f.scale], 2)[..., :1])),
    ]
    for round_ in range(2):
        for x_, *factors in calls:
            y = kron_matmul(x_, *factors)
            assert torch.equal(y, kron_matmul(x_, *factors, backend="native"))
            packed = [
                t if isinstance(t, torch.Tensor) else Int8Factor(t.values, t.scale.contiguous())
                for t in factors
            ]
            assert torch.equal(y, native.kron_matmul(x_, packed))
        # The last has a scale that is not contiguous, and is prepared each time.
        assert known() == 2 * (len(calls) - 1), round_
    one = Int8Factor.of(draw(1, 40, 96))
    for options in ({}, {"bias": bias}, {"residual": draw(5, 40)}, {"activation": "silu"}):
        for _ in range(2):
            y = kron_matmul(x, one, **options)
            assert near(y, kron_matmul(x, one, backend="eager", **options), 4)
    for wrong in (
        Int8Factor(one.values, one.scale.double()),
        Int8Factor(one.values, one.scale[:, :-1]),
        Int8Factor(one.values.short(), one.scale),
        Int8Factor(one.values, one.scale.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match=r"factor 0's|no gradient"):
            kron_matmul(x, wrong)


# --- what is refused

A, F8, X = draw(1, 2, 3), Int8Factor.of(draw(1, 20, 32)), draw(5, 96)
COLUMN, ROW = draw(9, 20, 1), draw(9, 1, 96)


class Sub(torch.Tensor):
    pass


REFUSED = {
    "values of uint8": (
        lambda: (X, A, Int8Factor(F8.values.to(torch.uint8), F8.scale)),
        r"factor 1's values must be int8 \(r, m, n\) with every side at least 1, got torch.uint8",
    ),
    "values of two dimensions": (
        lambda: (X, A, Int8Factor(F8.values[0], F8.scale)),
        r"got torch.int8 \(20, 32\); make it with Int8Factor.of\(t\)",
    ),
    "no dimension": (lambda: (X, A, Int8Factor(F8.values[0, 0, 0], F8.scale)), r"torch.int8 \(\);"),
    "no values": (
        lambda: (X, A, Int8Factor(F8.values[:, :0], F8.scale)),
        r"torch.int8 \(1, 0, 32\)",
    ),
    "scale of float64": (
        lambda: (X, A, Int8Factor(F8.values, F8.scale.double())),
        r"factor 1's scale must be float32 of shape \(1, 20, 1\) on cpu, got torch.float64",
    ),
    "scale of a matrix": (
        lambda: (X, A, Int8Factor(F8.values, F8.scale[0])),
        r"shape \(1, 20, 1\) on cpu, got torch.float32 \(20, 1\) on cpu\.",
    ),
    "scale for each column": (
        lambda: (X, A, Int8Factor(F8.values, torch.ones(1, 1, 32))),
        r"got torch.float32 \(1, 1, 32\)",
    ),
    "scales of other terms": (
        lambda: (X, A.repeat(3, 1, 1), Int8Factor(F8.values.repeat(3, 1, 1), torch.ones(2, 20, 1))),
        r"shape \(1, 20, 1\) or \(3, 20, 1\) on cpu",
    ),
    "scale elsewhere": (
        lambda: (X, A, Int8Factor(F8.values, F8.scale.to("meta"))),
        r"on cpu, got torch.float32 \(1, 20, 1\) on meta",
    ),
    "columns with scales of their own": (
        lambda: (X, Int8Factor.of(COLUMN), ROW),
        r"shape \(1, 20, 1\) on cpu, got .* \(9, 20, 1\) .*Int8Factor.of\(t, shared=True\)",
    ),
    "factor elsewhere": (
        lambda: (X, A, Int8Factor(*(t.to("meta") for t in F8))),
        "factor 1 is on meta but x is on cpu; move one",
    ),
    "three factors": (
        lambda: (X, A, F8, A),
        "int8 factors are for products of up to two, got 3; dequantise them",
    ),
    "columns": (lambda: (X[:, :5], A, F8), r"3 \* 32 = 96, got x of shape \(5, 5\)"),
    "no token": (lambda: (torch.tensor(1.0), A, F8), r"got x of shape \(\)"),
    "ranks": (lambda: (X, A.repeat(2, 1, 1), F8), r"must share one Kronecker rank, got \[2, 1\]"),
    "factor of three and a half dimensions": (lambda: (X, A[0, 0], F8), "factor 0 must be"),
    "factor of another dtype": (
        lambda: (X, A.half(), F8),
        "factor 0 is torch.float16 but x is torch",
    ),
    "integers": (
        lambda: (X.long(), A.long(), F8),
        "x must be real with int8 factors, got torch.int64; use x.float",
    ),
    "complex": (
        lambda: (X + 0j, A + 0j, F8),
        "x must be real with int8 factors, got torch.complex6",
    ),
    "x with a gradient": (
        lambda: (X.clone().requires_grad_(), A, F8),
        r"have no gradient, and an operand requires one; call it under torch.no_grad\(\), or train",
    ),
    "factor with a gradient": (lambda: (X, A.clone().requires_grad_(), F8), "have no gradient"),
    "scale with a gradient": (
        lambda: (X, A, Int8Factor(F8.values, F8.scale.clone().requires_grad_())),
        "have no gradient",
    ),
}
NOT_TENSORS = {
    "x": (lambda: (F8, A, F8), "x must be a torch.Tensor, got kron_kernels.int8.Int8Factor; use"),
    "no x": (lambda: (None, A, F8), "x must be a torch.Tensor, got NoneType"),
    "array": (
        lambda: (X.numpy(), A, F8),
        "x must be a torch.Tensor, got numpy.ndarray; use torch.as",
    ),
    "factor": (
        lambda: (X, [[1.0]], F8),
        "factor 0 must be a torch.Tensor, got list; use torch.as_te",
    ),
    "values": (
        lambda: (X, A, Int8Factor([1], F8.scale)),
        "factor 1's values must be a torch.Tensor",
    ),
    "scale": (
        lambda: (X, A, Int8Factor(F8.values, 2.0)),
        "factor 1's scale must be a torch.Tensor, g",
    ),
    "sparse": (lambda: (X.to_sparse(), A, F8), "x has layout torch.sparse_coo, but must be dense"),
    "sparse values": (
        lambda: (X, A, Int8Factor(F8.values.to_sparse(), F8.scale)),
        "factor 1's values has layout torch.sparse_coo",
    ),
    "nested": (
        lambda: (torch.nested.nested_tensor([X[0]], layout=torch.jagged), A, F8),
        "x is a nested tensor, but must be dense",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED, *NOT_TENSORS])
def test_other_operands_are_refused_with_the_remedy(case):
    for backend in ("eager", "auto"):
        refuse(case, backend)


def refuse(case: str, backend: str) -> None:
    """Call all functions with these operands."""
    error = ValueError if case in REFUSED else TypeError
    operands, message = (REFUSED | NOT_TENSORS)[case]
    x, *factors = operands()
    with pytest.raises(error, match=message):
        kron_matmul(x, *factors, backend=backend)
    if len(factors) == 2:
        good, bad = (A, F8, None), (*factors, None)
        of_x = case in ("x", "no x", "array", "sparse", "nested")
        of_key, of_up = ("", "") if of_x else ("(query|key): .*", "up: .*")
        with pytest.raises(error, match=of_key + message):
            kron_qkv(x, bad if x is not X else good, bad, good, backend=backend)
        with pytest.raises(error, match=of_up + message):
            kron_feed_forward(x, bad, good, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias": torch.ones(39)}, ValueError, r"bias must have shape \(40,\)"),
        (
            {"bias": torch.ones(40).half()},
            ValueError,
            "bias is torch.float16 but x is torch.float32",
        ),
        ({"bias": F8}, TypeError, "bias must be a torch.Tensor, got kron_kernels.int8.Int8Factor"),
        ({"bias": torch.ones(40, requires_grad=True)}, ValueError, "have no gradient"),
        ({"residual": torch.ones(4, 40)}, ValueError, r"residual must have y's shape \(5, 40\)"),
        (
            {"residual": torch.ones(5, 40, device="meta")},
            ValueError,
            "residual is on meta but x is",
        ),
        ({"residual": [1.0]}, TypeError, "residual must be a torch.Tensor, got list"),
        ({"residual": torch.ones(5, 40, requires_grad=True)}, ValueError, "have no gradient"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of gelu"),
        *[
            (
                {"backend": name},
                ValueError,
                f"'{name}' has no int8 factors; those that do are auto, e",
            )
            for name in ("triton", "cuda", "nonsense")
        ],
    ],
)
def test_other_options_are_refused_with_the_remedy(options, error, message):
    with pytest.raises(error, match=message):
        kron_matmul(X, A, F8, **options)
    if "residual" not in options and "bias" not in options:
        with pytest.raises(error, match=message):
            kron_feed_forward(
                X, (A, F8, None), (A.mT, Int8Factor.of(draw(1, 9, 20)), None), **options
            )


@native_only
def test_native_says_why_it_cannot():
    with pytest.raises(
        ValueError, match="native' cannot serve this call: it has no int8 factors in fl"
    ):
        kron_matmul(X.double(), A.double(), F8, backend="native")
    with pytest.raises(
        ValueError, match="'native' cannot serve this call: it runs on CPUs, and x is on"
    ):
        meta = Int8Factor(*(t.to("meta") for t in F8))
        kron_matmul(X.to("meta"), A.to("meta"), meta, backend="native")
    with pytest.raises(ValueError, match="or an operand is not an ordinary tensor"):
        kron_matmul(X.as_subclass(Sub), A, F8, backend="native")
    with (
        FlopCounterMode(display=False),
        pytest.raises(ValueError, match="a tracer or a mode is active"),
    ):
        kron_matmul(X, A, F8, backend="native")


GOOD = (A, F8, None)


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        ((A, F8), "a tuple of 2"),
        ((A, F8, None, None), "a tuple of 4"),
        ([F8], "a list of 1"),
        (None, "a NoneType"),
        (F8, "a Int8Factor of 2"),
    ],
    ids=["two", "four", "one", "none", "a factor"],
)
def test_a_layer_that_is_not_three_values_is_refused(layer, got):
    with pytest.raises(TypeError, match=rf"value must be \(a, b, bias\), got {got}\."):
        kron_qkv(X, GOOD, GOOD, layer)
    with pytest.raises(TypeError, match=rf"up must be \(a, b, bias\), got {got}\."):
        kron_feed_forward(X, layer, GOOD)
    with pytest.raises(TypeError, match=rf"down must be \(a, b, bias\), got {got}\."):
        kron_feed_forward(X, GOOD, layer)


def test_a_block_that_does_not_fit_is_refused_by_the_layers_name():
    with pytest.raises(
        ValueError, match=r"down: the input's last dimension must be .* 3 \* 32 = 96"
    ):
        kron_feed_forward(X, GOOD, GOOD)
    with pytest.raises(ValueError, match=r"down: residual must have y's shape \(5, 27\)"):
        down = (A.mT, Int8Factor.of(draw(1, 9, 20)), None)
        kron_feed_forward(X, GOOD, down, residual=X)


def test_a_residual_of_another_dtype_is_added_by_its_promotion(backend):
    down = (A.mT, Int8Factor.of(draw(1, 32, 20)), None)
    for residual in (draw(5, 40, dtype=torch.float64), draw(5, 40, dtype=torch.bfloat16)):
        y = kron_matmul(X, A, F8, residual=residual, backend=backend)
        expected = kron_matmul(X, A, F8, backend=backend) + residual
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        wide = draw(5, 96).to(residual.dtype)
        y = kron_feed_forward(X, GOOD, down, residual=wide, backend=backend)
        expected = kron_feed_forward(X, GOOD, down, backend=backend) + wide
        assert y.dtype == expected.dtype and torch.equal(y, expected)


# --- what PyTorch has around a call

FAR = {"rtol": 1e-5, "atol": 1e-5}


def test_operands_that_require_gradients_are_taken_without_them():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not kron_matmul(x, A, F8).requires_grad
    with torch.inference_mode():
        y = kron_matmul(X.clone(), A, Int8Factor.of(F8.dequantized()))
    assert y.is_inference()
    torch.testing.assert_close(y, kron_matmul(X, A, F8), **FAR)


def test_derivatives_are_refused_in_every_form():
    def f(x):
        return kron_matmul(x, A, F8)

    with pytest.raises(ValueError, match="no gradient"):
        torch.func.grad(lambda x: f(x).sum())(X)
    with pytest.raises(ValueError, match="no gradient"):
        torch.func.jvp(f, (X,), (X,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(ValueError, match="no gradient"):
            f(torch.autograd.forward_ad.make_dual(X, X))
        torch.testing.assert_close(f(X), kron_matmul(X, A, F8), **FAR)


def test_vmap_over_tokens_and_over_factors():
    y = kron_matmul(X, A, F8)
    torch.testing.assert_close(torch.vmap(lambda x: kron_matmul(x, A, F8))(X), y, **FAR)
    many = Int8Factor.of(draw(4, 20, 32))
    ys = torch.vmap(lambda v, s: kron_matmul(X, A, Int8Factor(v[None], s[None])))(*many)
    for i, y in enumerate(ys):
        one = Int8Factor(many.values[i : i + 1], many.scale[i : i + 1])
        torch.testing.assert_close(y, kron_matmul(X, A, one), **FAR)
    q, _, _ = torch.vmap(lambda x: kron_qkv(x, GOOD, GOOD, GOOD))(X)
    torch.testing.assert_close(q, kron_matmul(X, A, F8), **FAR)


class Product(torch.nn.Module):
    def __init__(self, backend="auto"):
        super().__init__()
        for name, t in {
            "a": A,
            "values": F8.values,
            "scale": F8.scale,
            "c": torch.ones(40),
        }.items():
            self.register_buffer(name, t)
        self.backend = backend

    def forward(self, x):
        f = Int8Factor(self.values, self.scale)
        return kron_matmul(x, self.a, f, bias=self.c, activation="relu", backend=self.backend)


def test_compile_sees_the_whole_graph():
    product = Product("eager")

    def call(x):
        q, *_ = kron_qkv(x, GOOD, GOOD, GOOD)
        return product(x), q, kron_feed_forward(x, GOOD, (A.mT, F8_BACK, None))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for tokens in (5, 7):  # the second is compiled for any number
        x = draw(tokens, 96)
        for y, expected in zip(compiled(x), call(x), strict=True):
            torch.testing.assert_close(y, expected, **FAR)
    autocast = torch.compile(product, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = autocast(X)
        assert y.dtype == torch.bfloat16 and near(y, product(X), 2)


F8_BACK = Int8Factor.of(draw(1, 32, 20))


def test_export_with_a_dynamic_number_of_tokens():
    program = torch.export.export(Product(), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "kron_kernels" not in str(program.graph), "an exporter cannot translate our operator"
    x = draw(9, 96)
    torch.testing.assert_close(program.module()(x), Product()(x), **FAR)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_keeps_no_number_of_tokens(recwarn):
    traced = torch.jit.trace(Product(), (X,))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    x = draw(9, 96)
    torch.testing.assert_close(traced(x), Product()(x), **FAR)


def test_meta_tensors_have_the_right_shapes():
    x, a, f = X.to("meta"), A.to("meta"), Int8Factor(*(t.to("meta") for t in F8))
    layer, down = (a, f, None), (a.mT, Int8Factor(*(t.to("meta") for t in F8_BACK)), None)
    for y, columns in (
        (kron_matmul(x[None], a, f), 40),
        (kron_qkv(x[None], layer, layer, layer)[2], 40),
        (kron_feed_forward(x[None], layer, down), 96),
    ):
        assert y.is_meta and y.shape == (1, 5, columns) and y.dtype == torch.float32


def test_autocast_lowers_x_and_the_bias_as_for_other_factors():
    bias = torch.randn(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (X, X.bfloat16()):
            y = kron_matmul(x, A, F8, bias=bias)
            other = kron_matmul(x, A, F8.dequantized(), bias=bias)
            assert y.dtype == other.dtype == torch.bfloat16
            q, k, v = kron_qkv(x, (A, F8, bias), GOOD, GOOD)
            assert torch.equal(q, y) and torch.equal(k, v) and k.dtype == torch.bfloat16
            h = kron_feed_forward(x, (A, F8, bias), (A.mT, F8_BACK, None), residual=X)
            assert h.dtype == torch.float32  # promoted with the residual's
            wide = kron_matmul(x.double(), A.double(), F8, bias=bias.double())
            assert wide.dtype == torch.float64  # which autocast leaves alone
    expected = kron_matmul(X.bfloat16(), A.bfloat16(), F8, bias=bias.bfloat16())
    assert torch.equal(y, expected)


def test_modes_and_profilers_see_the_call():
    expected = kron_matmul(X, A, F8)
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(kron_matmul(X, A, F8), expected, **FAR)
    assert counter.get_total_flops() == 2 * 5 * (2 * 3 * 32 + 2 * 20 * 32)
    with torch.profiler.profile() as profile:
        assert torch.equal(kron_matmul(X, A, F8), expected)
        kron_qkv(X, GOOD, GOOD, GOOD)
        kron_feed_forward(X, GOOD, (A.mT, F8_BACK, None))
    if native._native is not None:
        seen = {e.key for e in profile.key_averages()}
        names = ("kron_matmul", "kron_qkv", "kron_feed_forward")
        assert seen >= {f"kron_kernels::{name}" for name in names}


def test_subclasses_and_pending_signs():
    y = kron_matmul(X, A, F8)
    assert type(kron_matmul(X.as_subclass(Sub), A, F8)) is Sub
    torch.testing.assert_close(kron_matmul(torch._neg_view(X), A, F8), -y, **FAR)
    minus = Int8Factor(torch._neg_view(F8.values), F8.scale)
    torch.testing.assert_close(kron_matmul(X, A, minus), -y, **FAR)
    with torch.no_grad():
        p = Int8Factor(torch.nn.Parameter(F8.values, requires_grad=False), F8.scale)
        assert torch.equal(kron_matmul(X, torch.nn.Parameter(A), p), y)
