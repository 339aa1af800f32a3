"""Calls that repeat an earlier one: found by one look-up, and never mistaken for another call."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels import dispatch, functional, kron_feed_forward, kron_matmul, kron_qkv, repeats
from kron_kernels.backends import native
from kron_kernels.testing import assert_close

NAMES = ("_matmuls", "_qkvs", "_blocks")


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def key_of(*operands, activation=None, backend="auto"):
    return repeats.call_key(operands, activation, backend)


pytestmark = pytest.mark.skipif(
    native._native is None or key_of(torch.ones(1)) is None,
    reason="the kernels are not compiled, or cannot read this torch's tensors",
)


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    torch.manual_seed(0)
    for name in NAMES:
        monkeypatch.setattr(functional, name, repeats.Repeats())


def known() -> int:
    return sum(len(getattr(functional, name)._again) for name in NAMES)


@pytest.fixture
def repeated(monkeypatch):
    """Call for the second time, which must ask for no route."""

    def call(function, *operands, **options):
        assert known() == 1
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "is_observed", None)
            return function(*operands, **options)

    return call


def wide(*tensors):
    return [t if t is None else t.double().contiguous() for t in tensors]


# --- a repeat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("rank", [0, 1, 3])  # 0: factors of two dimensions
def test_a_repeated_product_is_of_its_own_operands(lead, rank, dtype, repeated):
    def operands():
        sides = [(rank, *s) if rank else s for s in ((4, 3), (2, 5))]
        shapes = [(*lead, 15), *sides, (8,), (*lead, 8)]
        return [draw(*shape, dtype=dtype) for shape in shapes]

    def product(x, a, b, bias, residual):
        return kron_matmul(x, a, b, bias=bias, activation="relu", residual=residual)

    product(*operands())
    given = operands()
    y = repeated(product, *given)
    with torch.no_grad():
        x, a, b, bias, residual = wide(*given)
        a, b = (t if rank else t[None] for t in (a, b))
        z = sum(x @ torch.kron(p, q).T for p, q in zip(a, b, strict=True))
    assert y.dtype == dtype
    assert_close("y", y, torch.relu(z + bias) + residual, 15 * max(rank, 1) + 2)


def test_a_repeated_product_of_one_factor(repeated):
    kron_matmul(draw(5, 3), draw(4, 3))
    x, a = draw(5, 3), draw(4, 3)
    assert_close("y", repeated(kron_matmul, x, a), x.double() @ a.double().T, 3)


@pytest.mark.parametrize("biased", [True, False])
def test_repeated_products_of_one_x(biased, repeated):
    def layers():
        for m1 in (4, 4, 2):
            yield draw(1, m1, 3), draw(1, 2, 5), draw(2 * m1) if biased else None

    kron_qkv(draw(2, 3, 15), *layers())
    x, given = draw(2, 3, 15), [*layers()]
    for y, layer in zip(repeated(kron_qkv, x, *given), given, strict=True):
        a, b, bias = wide(*layer)
        expected = x.double() @ torch.kron(a[0], b[0]).T
        assert_close("y", y, expected if bias is None else expected + bias, 16)


@pytest.mark.parametrize("with_residual", [True, False])
def test_a_repeated_block(with_residual, repeated):
    def operands():
        up, down = (draw(1, 4, 2), draw(1, 6, 6), draw(24)), (draw(1, 2, 4), draw(1, 6, 6), None)
        return draw(2, 5, 12), up, down, draw(2, 5, 12) if with_residual else None

    def block(x, up, down, residual):
        return kron_feed_forward(x, up, down, activation="relu", residual=residual)

    block(*operands())
    given = x, (a1, b1, bias), (a2, b2, _), residual = operands()
    y = repeated(block, *given)
    z = torch.relu(x.double() @ torch.kron(*wide(a1[0], b1[0])).T + bias)
    expected = z @ torch.kron(*wide(a2[0], b2[0])).T
    assert_close("y", y, expected + residual if with_residual else expected, 12 + 24)


def test_what_is_known_keeps_no_operand():
    operands = x, a, b = draw(2, 4), draw(2, 2), draw(2, 2)
    kron_matmul(*operands)
    alive = [weakref.ref(t) for t in operands]
    del operands, x, a, b
    gc.collect()
    assert known() == 1
    assert not any(ref() is not None for ref in alive)


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(repeats, "_MOST", 3)
    for tokens in range(1, 9):
        kron_matmul(draw(tokens, 4), draw(2, 2), draw(2, 2))
        assert 1 <= known() <= 3


# --- a call that differs


def test_other_strides_are_another_call():
    x, a, b, bias = draw(3, 4), draw(1, 2, 2), draw(1, 2, 2), draw(4)
    turned = draw(4, 3).T, a.mT, draw(1, 2, 4)[..., ::2], draw(8)[::2]
    calls = [(x, a, b, bias)]
    calls += [(*calls[0][:i], turned[i], *calls[0][i + 1 :]) for i in range(4)]
    for call in [*calls, *calls]:
        y = kron_matmul(*call[:3], bias=call[3])
        x, a, b, bias = wide(*call)
        assert_close("y", y, x @ torch.kron(a[0], b[0]).T + bias, 5)
    assert known() == 3  # x and bias with strides are copied


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": draw(3, 5)}, "last dimension"),
        ({"x": draw(3, 4).double()}, "factor 0 is torch.float32 but x is torch.float64"),
        ({"x": draw(3, 4, dtype=torch.complex64)}, "factor 0 is torch.float32"),
        ({"x": torch.ones(3, 4, dtype=torch.int32)}, "must be floating point"),
        ({"x": draw(3, 4).to("meta")}, "is on cpu but x is on meta"),
        ({"b": draw(2, 2, 2)}, "must share one Kronecker rank"),
        ({"bias": draw(1)}, "bias must have shape"),
        ({"bias": draw(4, 1)}, "bias must have shape"),
        ({"residual": draw(4)}, "residual must have y's shape"),
        ({"activation": "tanh"}, "activation must be"),
        ({"activation": ["relu"]}, "activation must be"),
        ({"backend": "mkl"}, "does not exist"),
        ({"backend": "cuda"}, "runs on NVIDIA GPUs"),
    ],
)
def test_a_wrong_operand_after_right_ones_is_refused(changed, message):
    right = {"x": draw(3, 4), "a": draw(1, 2, 2), "b": draw(1, 2, 2), "bias": draw(4)}
    right |= {"residual": draw(3, 4), "activation": "relu", "backend": "auto"}

    def product(x, a, b, **options):
        return kron_matmul(x, a, b, **options)

    product(**right)
    with pytest.raises(ValueError, match=message):
        product(**right | changed)


def test_an_operand_that_moves_to_its_neighbour_is_another_call():
    x, square, bias = draw(1, 4), draw(4, 4), draw(4)
    kron_matmul(x, square, bias=bias)
    with pytest.raises(ValueError, match=r"factor 1 must be \(m, n\)"):
        kron_matmul(x, square, bias)
    a, b = draw(2, 2), draw(2, 2)
    layer = (a, b, bias)
    kron_qkv(x, layer, layer, layer)
    with pytest.raises(TypeError, match=r"query must be \(a, b, bias\), got a tuple of 2"):
        kron_qkv(x, (a, b), (bias, a, b), (bias, a, b, bias))


# --- operands without a key


def freed(offset):
    t = draw(4)[offset:]
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize(
    "operand",
    [
        pytest.param(torch._neg_view(draw(4)), id="negated"),
        pytest.param(torch.complex(draw(4), draw(4)).conj().imag, id="conjugated"),
        pytest.param(torch._efficientzerotensor(4), id="zeros"),
        pytest.param(draw(4).as_subclass(type("Subclass", (torch.Tensor,), {})), id="subclass"),
        pytest.param(draw(4).to("meta"), id="meta"),
        pytest.param(torch.eye(4).to_sparse(), id="sparse"),
        pytest.param(torch.nested.nested_tensor([draw(2), draw(3)]), id="nested"),
        pytest.param(draw(0, 4), id="empty"),
        pytest.param(freed(0), id="freed"),
        pytest.param(freed(1), id="freed, offset"),
        pytest.param(draw(*[1] * 9), id="many axes"),
        pytest.param([1.0, 2.0], id="list"),
        pytest.param(torch.nn.UninitializedParameter(), id="uninitialised"),
    ],
)
def test_only_plain_tensors_in_memory_have_a_key(operand):
    assert key_of(draw(4), None, torch.nn.Parameter(draw(4), False)) is not None
    assert key_of(draw(4), operand) is None


def test_keys_differ_where_calls_do():
    t = draw(2, 2)
    calls = [(t,), (t, t), (t, None), (None, t), (t, None, t), (t[0], t[0]), (t.T,), (t[None],)]
    calls += [(t.double(),), (t.half(),), (t.bfloat16(),), (t.int(),), (t.new_ones(4),), ()]
    keys = [key_of(*call) for call in calls]
    keys += [key_of(t, activation="relu"), key_of(t, backend="native")]
    assert len({*keys}) == len(calls) + 2 and None not in keys
    assert key_of(t) == key_of(draw(2, 2)) == key_of(torch.nn.Parameter(draw(2, 2), False))
    assert key_of(*[t] * 17) is None  # more than any call has


# --- something is active


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
        pytest.param(profile, id="profiler"),
        pytest.param(lambda: FlopCounterMode(display=False), id="dispatch mode"),
        pytest.param(torch.autograd.forward_ad.dual_level, id="forward mode"),
    ],
)
def test_what_is_active_is_asked_at_every_call(context):
    operands = draw(3, 4), draw(2, 2), draw(2, 2)
    kron_matmul(*operands)
    assert known() == 1
    for active in (context, nullcontext, context):
        with active():
            assert (key_of(*operands) is None) == (active is context)


def test_transforms_have_no_key():
    found, t = [], draw(2)
    torch.vmap(lambda row: found.append(key_of(t)) or row)(draw(2, 2))
    torch.func.grad(lambda row: found.append(key_of(t)) or row.sum())(draw(2))
    assert found == [None, None]


def test_a_gradient_after_a_repeat():
    x, a, b = draw(3, 4), draw(2, 2).requires_grad_(), draw(2, 2)
    with torch.no_grad():
        kron_matmul(x, a, b)
        assert not kron_matmul(x, a, b).requires_grad
    kron_matmul(x, a, b).sum().backward()
    assert a.grad is not None
    kron_matmul(x, a.detach(), b)
    assert kron_matmul(x, a, b).requires_grad


def test_a_compiled_function_looks_up_nothing():
    operands = draw(3, 4), draw(2, 2), draw(2, 2)
    compiled = torch.compile(kron_matmul, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = kron_matmul(*operands)
        torch.testing.assert_close(compiled(*operands), expected)
        kron_matmul(draw(2, 9), draw(3, 3), draw(3, 3))  # the look-up table changes
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(*operands), expected)


# --- the compiled functions refuse what Python never passes


def test_a_plan_is_checked():
    x, a, y = draw(1, 2), draw(1, 2, 2), draw(1, 2)
    one = native._plan(x, False, ((a,), None))
    execution = native._isa, 1, native._POOL, 1, 1
    native._native.run_plan(one, *execution, x, a, None, None, y)
    assert_close("y", y, x.double() @ a[0].double().T, 2)
    for wrong, kind, message in [
        ((), TypeError, "no plan"),
        ((b"short", *execution, x, a, None, None, y), TypeError, "not those of a plan"),
        ((one, *execution, x, a, None, None), TypeError, "too few"),
        ((one, *execution, x, a, None, None, y, y), TypeError, "too many"),
        ((one, *execution, x, a, None, None, None), RuntimeError, "y is null"),
        ((one, *execution, None, a, None, None, y), RuntimeError, "x or dy is null"),
        ((one, *execution, x, None, None, None, y), RuntimeError, "factor is null"),
        ((one, *execution, x, torch.eye(2).to_sparse(), None, None, y), Exception, "storage"),
    ]:
        with pytest.raises(kind, match=message):
            native._native.run_plan(*wrong)
    for products, is_block in ((0, 0), (5, 0), (1, 1), (3, 1)):
        with pytest.raises(ValueError, match="1 to 4 products, or 2 of a block"):
            native._native.plan(is_block, 0, 1, products)
    with pytest.raises(TypeError, match="takes a capsule and two types"):
        native._native.set_tensors()
