"""kron_matmul against its definition: values, gradients, transforms, dtypes, layouts, refusals."""

import itertools
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from engines import EAGER, NATIVE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels import KronShape, dispatch, kron_feed_forward, kron_matmul, kron_qkv, reference
from kron_kernels.backends import eager
from kron_kernels.checks import Activation
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import SHAPES, draw, name

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
ACTIVATIONS = get_args(Activation)
# Native's gradients of factors with whole vectors of columns take another path.
TURNED = [KronShape(48, 32, 2, 16), KronShape(2, 3, 32, 48)]


def terms(s: KronShape) -> int:
    return s.rank * (s.n1 + s.n2)


# Column ⊗ row and row ⊗ column, of more terms and fewer, and both at once.
LOW_RANK = [
    KronShape(30, 1, 1, 40),
    KronShape(24, 1, 1, 17, 5),
    KronShape(1, 17, 24, 1, 5),
    KronShape(1, 40, 30, 1),
    KronShape(1, 1, 1, 9, 2),
    KronShape(5, 1, 1, 4, 9),
]
SHAPES = [*SHAPES, *LOW_RANK]
SMALL = [s for s in SHAPES if s.parameters < 500]


def engines_and_tokens(eager, native):
    """Each engine with the numbers of tokens at which its code changes path."""
    pairs = [*itertools.product(EAGER, eager), *itertools.product(NATIVE, native)]
    return pytest.mark.parametrize(("engine", "tokens"), pairs, indirect=["engine"])


# Eager: one chunk, several. Native: around a vector of tokens, a block of three vectors, and the
# end of a second block.
@engines_and_tokens(eager=[0, 1, 7, 1500], native=[0, 1, 2, 5, 16, 17, 48, 49, 130])
@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_it_is_the_product_by_torch_kron(s, tokens, engine):
    backend, dtype = engine
    x, a, b = draw(s, tokens, dtype)
    y = kron_matmul(x, a, b, backend=backend)
    assert y.dtype == dtype and y.shape == (tokens, s.out_features)
    # Drawn to be of order 1; a single entry may be near zero by chance.
    assert_close("y", y, reference.kron_matmul(x, a, b), terms(s), scale=1.0)


@pytest.mark.parametrize("form", eager.FORMS, ids="-".join)
@pytest.mark.parametrize("tokens", [0, 5, 900])
@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_every_form_of_eager_agrees_forward_and_backward(s, tokens, form):
    x, a, b = (t.requires_grad_() for t in draw(s, tokens))
    y = reference.kron_matmul(x, a, b)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, a, b), dy)
    with torch.no_grad():
        assert_close("y", eager.kron_matmul(x, (a, b), form=form), y, terms(s))
        grads = eager.kron_matmul_backward(dy, x, a, b, (True, True, True), form)
    for label, grad, other in zip(("dx", "da", "db"), grads, expected, strict=True):
        assert_close(label, grad, other, max(tokens, 1) * (s.m1 + s.m2 + terms(s)))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("s", LOW_RANK, ids=name)
def test_low_rank_is_two_gemms_of_any_number_of_terms(s, backend):
    operands = draw(s, 8, torch.float32)
    with torch.profiler.profile() as profile:
        kron_matmul(*operands, backend=backend)
    ran = {e.key: e.count for e in profile.key_averages()}
    assert ran["aten::mm"] == 2 and not ran.keys() & {"aten::bmm", "aten::copy_", "aten::add_"}


@engines_and_tokens(eager=[600], native=[1, 16, 49, 300])
@pytest.mark.parametrize("s", [*SHAPES, *TURNED], ids=name)
def test_gradients_in_every_dtype(s, tokens, engine):
    backend, dtype = engine
    x, a, b = (t.requires_grad_() for t in draw(s, tokens, dtype))
    y = kron_matmul(x, a, b, backend=backend)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    wide = [t.detach().to(wide).requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.to(wide[0].dtype))
    # A gradient may have a single entry, near zero by chance: its scale is that of n products of
    # random signs, whose absolute values sum to √n times as much.
    size = [t.detach().abs().requires_grad_() for t in wide]
    sums = torch.autograd.grad(reference.kron_matmul(*size), size, dy.to(wide[0].dtype).abs())
    products = (s.m1 * s.m2, tokens * s.m2 * s.n2, tokens * s.m1 * s.n1)
    for label, grad, other, total, n in zip(
        ("dx", "da", "db"), grads, expected, sums, products, strict=True
    ):
        assert grad.dtype == dtype
        scale = total.square().mean().sqrt().item() / n**0.5
        assert_close(label, grad, other, tokens * (s.m1 + s.m2 + terms(s)), scale=scale)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("s", [*SHAPES[1:6], *LOW_RANK[1:3]], ids=name)
def test_only_the_gradients_that_are_asked_for(s, needed):
    operands = draw(s)
    for t, wanted in zip(operands, needed, strict=True):
        t.requires_grad_(bool(wanted))
    kron_matmul(*operands).square().sum().backward()
    grads = [t.grad for t in operands]
    assert [g is not None for g in grads] == [bool(n) for n in needed]
    wanted = [t for t in operands if t.requires_grad]
    expected = torch.autograd.grad(reference.kron_matmul(*operands).square().sum(), wanted)
    for grad, other in zip([g for g in grads if g is not None], expected, strict=True):
        assert_close("grad", grad, other, 1000)


def gradchecks():
    """Complex Jacobians of the larger shapes take seconds."""
    for s in SMALL:
        yield pytest.param(s, "auto", torch.float64, id=f"{name(s)}-auto-real")
        marks = [pytest.mark.slow] if s.parameters >= 60 else []
        yield pytest.param(s, "eager", torch.complex128, id=f"{name(s)}-eager-complex", marks=marks)


@pytest.mark.parametrize(("s", "backend", "dtype"), list(gradchecks()))
def test_gradcheck_in_reverse_and_forward_mode_batched_and_twice(s, backend, dtype):
    small = s.parameters < 100
    tokens = 2 if small or not dtype.is_complex else 1  # complex Jacobians take seconds
    operands = [t.requires_grad_() for t in draw(s, tokens, dtype)]

    def product(x, a, b):
        return kron_matmul(x, a, b, backend=backend)

    torch.autograd.gradcheck(
        product,
        operands,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    if small:
        torch.autograd.gradgradcheck(product, operands, check_fwd_over_rev=True)


@pytest.mark.parametrize("s", [SHAPES[1], LOW_RANK[1], LOW_RANK[2]], ids=name)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_the_epilogue_is_activation_of_product_plus_bias_then_residual(activation, s):
    x, a, b = draw(s, (2, 3))
    bias = torch.randn(s.out_features, dtype=x.dtype)
    residual = torch.randn(2, 3, s.out_features, dtype=x.dtype)
    epilogue = {"bias": bias, "activation": activation, "residual": residual}
    expected = reference.kron_matmul(x, a, b, **epilogue)
    assert_close("y", kron_matmul(x, a, b, **epilogue), expected, terms(s))
    operands = [t.requires_grad_() for t in (x, a, b, bias, residual)]

    def f(x, a, b, bias, residual):
        return kron_matmul(x, a, b, bias=bias, activation=activation, residual=residual)

    torch.autograd.gradcheck(f, operands, check_forward_ad=True, check_batched_grad=True)


@engines_and_tokens(eager=[3, 1500], native=[3, 40])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("s", [SHAPES[3], SHAPES[8]], ids=name)
def test_the_epilogue_in_every_dtype(s, tokens, activation, engine):
    backend, dtype = engine
    x, a, b = draw(s, tokens, dtype)
    epilogue = {
        "bias": torch.randn(s.out_features).to(dtype),
        "activation": None if dtype.is_complex else activation,
        "residual": torch.randn(tokens, s.out_features).to(dtype),
    }
    y = kron_matmul(x, a, b, **epilogue, backend=backend)
    assert_close("y", y, reference.kron_matmul(x, a, b, **epilogue), terms(s))


@pytest.mark.parametrize(
    "sides",
    [
        [(3, 4)],
        [(2, 3), (4, 2), (3, 3)],
        [(9, 8), (8, 9), (10, 7)],
        [(3, 2), (17, 16), (33, 30), (1, 2)],
        [(7, 20), (80, 70), (3, 2)],
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_any_number_of_factors_with_the_epilogue(tokens, sides, engine):
    backend, dtype = engine
    m, n = (math.prod(side) for side in zip(*sides, strict=True))
    factors = [(torch.randn(side) / side[1] ** 0.5).to(dtype) for side in sides]
    x, residual = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)
    activation = None if dtype.is_complex else "gelu"
    epilogue = {"bias": torch.randn(m).to(dtype), "activation": activation, "residual": residual}
    y = kron_matmul(x, *factors, **epilogue, backend=backend)
    expected = reference.kron_matmul(x, *factors, **epilogue)
    # A product of four normal factors has entries of 20 RMS, whose errors are as much larger.
    assert_close("y", y, expected, sum(side[1] for side in sides), slack=8)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "sides",
    [
        [(3, 4)],
        [(2, 3), (4, 2), (3, 3)],
        [(1, 2), (5, 1), (2, 2), (3, 2)],
        [(9, 8), (8, 9), (10, 7)],
    ],
    ids=str,
)
def test_any_number_of_factors_and_terms_and_their_gradients(sides, rank):
    factors = [torch.randn(rank, *side, dtype=torch.float64) for side in sides]
    n = torch.Size([f.shape[2] for f in factors]).numel()
    x = torch.randn(2, 3, n, dtype=torch.float64)
    y = kron_matmul(x, *factors)
    assert_close("y", y, reference.kron_matmul(x, *factors), 30)
    if n < 100:
        operands = [t.requires_grad_() for t in (x, *factors)]
        torch.autograd.gradcheck(kron_matmul, operands, check_forward_ad=True)


@st.composite
def problems(draw_from):
    side = st.integers(1, 9) | st.sampled_from([13, 16, 17, 24, 31, 33, 97])
    s = KronShape(*(draw_from(side) for _ in range(4)), draw_from(st.integers(1, 3)))
    few = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    lead = draw_from(few | st.tuples(st.integers(0, 150)))
    layouts = ["contiguous", "strided", "transposed", "expanded", "offset"]
    return s, lead, draw_from(st.sampled_from(layouts))


def relayout(t, layout):
    """The same values at other strides."""
    match layout:
        case "strided":
            return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        case "transposed" if t.ndim > 1:
            return t.mT.contiguous().mT
        case "expanded" if t.ndim > 1 and t.shape[0]:
            return t[:1].expand_as(t)
        case "offset":
            return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)
    return t


@settings(
    max_examples=20,  # with each engine, which the fixture sets once
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problems())
def test_drawn_shapes_ranks_dtypes_and_layouts(engine, problem):
    backend, dtype = engine
    s, lead, layout = problem
    x, a, b = (relayout(t, layout) for t in draw(s, lead, dtype))
    y = kron_matmul(x, a, b, backend=backend)
    dy = relayout(torch.randn_like(y), layout)
    leaves = x.detach().requires_grad_(), b.detach().requires_grad_()
    again = kron_matmul(leaves[0], a, leaves[1], backend=backend)
    dx, _ = torch.autograd.grad(again, leaves, dy)
    assert y.shape == (*lead, s.out_features)
    # Drawn to be of order 1; a single entry may be near zero by chance.
    assert_close("y", y, reference.kron_matmul(x, a, b), terms(s), scale=1.0)
    expected = reference.kron_matmul(dy, a.mH, b.mH)
    scale = (s.m1 * s.m2 / (s.n1 * s.n2)) ** 0.5
    assert_close("dx", dx, expected, s.rank * (s.m1 + s.m2), scale=scale)


def test_a_vector_and_matrix_factors():
    x, a, b = draw(SHAPES[1], ())
    assert kron_matmul(x, a[0], b[0]).shape == (SHAPES[1].out_features,)
    torch.testing.assert_close(kron_matmul(x, a[0], b[0]), torch.kron(a[0], b[0]) @ x)


@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_nan_reaches_its_own_token_and_no_later_call(s, backend):
    clean, a, b = draw(s, 600, torch.float32)
    expected = kron_matmul(clean, a, b, backend=backend)
    for dtype in (torch.float64, torch.float32):
        x = clean.to(dtype, copy=True)
        x[3] = torch.nan
        bad = kron_matmul(x, a.to(dtype), b.to(dtype), backend=backend).isnan()
        assert bad[3].all() and bad.sum() == s.out_features
    assert torch.equal(kron_matmul(clean, a, b, backend=backend), expected)


@pytest.mark.parametrize("s", [*SHAPES[1:6], *LOW_RANK[1:3]], ids=name)
def test_vmap_over_each_operand_and_over_all(s):
    x, a, b = draw(s, (3, 3))
    a, b = torch.stack([a, 2 * a, -a]), torch.stack([b, b + 1, 3 * b])
    for dims in [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 0, None)]:
        mapped = torch.vmap(kron_matmul, dims)(
            *(t if d is not None else t[0] for t, d in zip((x, a, b), dims, strict=True))
        )
        for i in range(mapped.shape[0]):
            one = [
                t[0] if d is None else t.select(d, i) for t, d in zip((x, a, b), dims, strict=True)
            ]
            assert_close("vmap", mapped[i], reference.kron_matmul(*one), terms(s))


@pytest.mark.parametrize("s", [SHAPES[1], LOW_RANK[5]], ids=name)
def test_functional_transforms_compose(s):
    x, a, b = draw(s, 4)

    def loss(f):
        return lambda a, b, row: f(row[None], a, b).square().sum()

    per_token = torch.vmap(torch.func.grad(loss(kron_matmul), (0, 1)), (None, None, 0))(a, b, x)
    expected = torch.vmap(torch.func.grad(loss(reference.kron_matmul), (0, 1)), (None, None, 0))
    for grad, other in zip(per_token, expected(a, b, x), strict=True):
        torch.testing.assert_close(grad, other)
    hessian = torch.func.hessian(loss(kron_matmul))(a, b, x[0])
    torch.testing.assert_close(hessian, torch.func.hessian(loss(reference.kron_matmul))(a, b, x[0]))
    tangent = torch.func.jvp(kron_matmul, (x, a, b), (x, -a, 2 * b))[1]
    torch.testing.assert_close(tangent, 2 * reference.kron_matmul(x, a, b))


@pytest.mark.parametrize("tokens", [3, 2000])
def test_forward_mode_reaches_tensors_that_ask_for_no_gradient(tokens):
    x, a, b = draw(SHAPES[1], tokens)
    with torch.autograd.forward_ad.dual_level():
        y = kron_matmul(torch.autograd.forward_ad.make_dual(x, x), a, b)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, reference.kron_matmul(x, a, b))


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_as_linear_does(lower):
    s = SHAPES[2]
    x, a, b = draw(s, 9, torch.float32)
    bias, weight = torch.randn(s.out_features), torch.randn(s.out_features, s.in_features)
    for x_dtype in (torch.float32, lower, torch.float64):
        with torch.autocast("cpu", lower):
            cast = x.to(x_dtype)
            wide = [t.to(torch.float64) if x_dtype == torch.float64 else t for t in (a, b, bias)]
            y = kron_matmul(cast, *wide[:2], bias=wide[2])
            dense = F.linear(cast, weight.to(wide[2]), wide[2])
            assert y.dtype == dense.dtype
    with torch.autocast("cpu", lower):
        loss = kron_matmul(x, a.requires_grad_(), b, bias=bias).float().square().sum()
    loss.backward()
    assert a.grad.dtype == torch.float32 and a.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [5, 1500])
def test_autocast_rounds_the_operands_and_the_result_and_nothing_between(tokens):
    x, a, b = draw(SHAPES[4], tokens, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_matmul(x, a, b)
    assert torch.equal(y, kron_matmul(x.bfloat16(), a.bfloat16(), b.bfloat16()))


@pytest.mark.parametrize("s", SHAPES[1:], ids=name)
@pytest.mark.parametrize("tokens", [0, 6])
def test_meta_tensors_know_the_shape(s, tokens):
    x, a, b = (t.to("meta").requires_grad_() for t in draw(s, (2, tokens)))
    y = kron_matmul(x, a, b)
    assert y.shape == (2, tokens, s.out_features) and y.is_meta
    y.sum().backward()
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("s", [*[s for s in SHAPES if s.rank == 1][1:], *LOW_RANK[1:3]], ids=name)
@pytest.mark.parametrize("tokens", [5, 3000], ids=["plain", "operator"])
def test_flops_are_counted(s, tokens):
    operands = draw(s, tokens, torch.float32)
    with FlopCounterMode(display=False) as counter:
        kron_matmul(*operands)
    form = eager.choose_form(s)
    assert counter.get_total_flops() in (tokens * s.flops, 2 * tokens * s.multiply_adds(form.order))
    for t in operands:
        t.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kron_matmul(*operands).sum().backward()
    assert 2 * tokens * s.flops <= counter.get_total_flops() <= 6 * tokens * s.flops


@pytest.mark.parametrize("s", [SHAPES[2], SHAPES[4], SHAPES[8], LOW_RANK[1]], ids=name)
def test_compile_sees_the_whole_graph(s):
    x, a, b = draw(s, 6, torch.float32)
    bias = torch.randn(s.out_features)
    compiled = torch.compile(kron_matmul, fullgraph=True, backend="aot_eager")
    for operands in ((x, a, b), (x[:4], a, b)):
        eagerly = [t.clone().requires_grad_() for t in operands]
        traced = [t.clone().requires_grad_() for t in operands]
        expected = kron_matmul(*eagerly, bias=bias, activation="gelu")
        y = compiled(*traced, bias=bias, activation="gelu")
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for t, other in zip(traced, eagerly, strict=True):
            torch.testing.assert_close(t.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "s", [SHAPES[2], SHAPES[3], SHAPES[4], SHAPES[8], *LOW_RANK[1:3]], ids=name
)
def test_export_with_a_dynamic_number_of_tokens(s):
    class Layer(torch.nn.Module):
        def forward(self, x, a, b):
            return kron_matmul(x, a, b)

    x, a, b = draw(s, (2, 6), torch.float32)
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, None, None)
    program = torch.export.export(Layer(), (x, a, b), dynamic_shapes=dynamic)
    assert "kron_kernels" not in str(program.graph), "an exporter cannot translate our operator"
    for lead in ((2, 6), (5, 3)):
        x = draw(s, lead, torch.float32)[0]
        torch.testing.assert_close(program.module()(x, a, b), kron_matmul(x, a, b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 11)), r"columns, 4 \* 3 = 12, got x of shape \(2, 11\)"),
        (dict(x=torch.ones(())), "got x of shape"),
        (
            dict(x=torch.ones(2, 12, dtype=torch.int64)),
            "floating point of at least 16 bits or complex, got torch.int64; use",
        ),
        (
            dict(x=torch.ones(2, 12, dtype=torch.float8_e4m3fn)),
            "floating point of at least 16 bits or complex, got torch.float8_e4m3fn; use",
        ),
        (dict(a=torch.ones(4)), r"factor 0 must be \(m, n\) or \(rank, m, n\)"),
        (dict(a=torch.ones(0, 4)), "every side at least 1"),
        (dict(a=torch.ones(3, 2, 4)), r"share one Kronecker rank, got \[3, 1\]"),
        (
            dict(b=torch.ones(5, 3, dtype=torch.float64)),
            "factor 1 is torch.float64 but x is torch.f",
        ),
        (dict(b=torch.ones(5, 3, device="meta")), "factor 1 is on meta but x is on cpu"),
        (dict(bias=torch.ones(9)), r"bias must have shape \(10,\).* got \(9,\)"),
        (dict(bias=torch.ones(10).half()), "bias is torch.float16"),
        (dict(residual=torch.ones(10)), r"residual must have y's shape \(2, 10\), got \(10,\)"),
        (dict(activation="swish"), f"one of {', '.join(ACTIVATIONS)}, got 'swish'"),
        (dict(backend="triton"), "backend='triton' cannot serve this call: it runs on GPUs, and x"),
        (dict(backend="mkl"), "it does not exist; the backends are auto, eager"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_the_error_of_a_bad_call_gives_value_rule_and_remedy(change, message):
    call = {"x": torch.ones(2, 12), "a": torch.ones(2, 4), "b": torch.ones(5, 3), **change}
    factors = call.pop("a"), call.pop("b")
    with pytest.raises(ValueError, match=message):
        kron_matmul(call.pop("x"), *factors, **call)


def test_no_factor_and_a_complex_activation_are_refused():
    with pytest.raises(ValueError, match="at least one factor"):
        kron_matmul(torch.ones(2, 3))
    with pytest.raises(ValueError, match="defined for real x"):
        kron_matmul(*draw(SHAPES[1], 2, torch.complex64), activation="gelu")


@pytest.mark.slow
def test_many_tokens():
    s = KronShape(24, 2, 12, 24)
    x, a, b = draw(s, 200_000, torch.float32)
    y = kron_matmul(x, a, b)
    for rows in (slice(0, 100), slice(-100, None)):
        assert_close("y", y[rows], reference.kron_matmul(x[rows], a, b), terms(s))


def test_one_low_rank_product_does_not_take_the_others_with_it(monkeypatch):
    """With "auto", fused calls then run product by product, each with its own backend."""
    low = torch.randn(3, 8, 1), torch.randn(3, 1, 8), None
    full = torch.randn(4, 4), torch.randn(2, 2), torch.randn(8)
    x, chosen = torch.randn(5, 8), []

    def noted(backend, x, *products):
        chosen.append((backend, len(products)))
        return "eager"

    monkeypatch.setattr(dispatch, "choose", noted)
    with torch.no_grad():
        ys = kron_qkv(x, full, low, full)
        y = kron_feed_forward(x, low, full)
        assert chosen == [("auto", 1)] * 5
        kron_qkv(x, full, low, full, backend="eager")
        kron_feed_forward(x, low, full, backend="eager")
        assert chosen[5:] == [("eager", 3), ("eager", 2)]
        kron_qkv(x, full, full, full)
        assert chosen[7:] == [("auto", 3)]
    for got, (a, b, bias) in zip(ys, (full, low, full), strict=True):
        assert_close("y", got, reference.kron_matmul(x, a, b, bias=bias), 16)
    hidden = F.gelu(kron_matmul(x, *low[:2]))
    assert_close("y", y, reference.kron_matmul(hidden, *full[:2], bias=full[2]), 16)
