"""The compiled CPU kernels: activations, fusions, threads and limits, with each instruction set."""

import multiprocessing
import threading
import time
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from engines import at_threads

import kron_kernels
from kron_kernels import (
    KroneckerFeedForward,
    KroneckerLinear,
    KronShape,
    dispatch,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends import abi, native
from kron_kernels.checks import Activation
from kron_kernels.encoder import Division
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import PAIRS, PRESETS, SHAPES, draw, name

pytestmark = pytest.mark.skipif(native._native is None, reason="the kernels are not compiled")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = get_args(Activation)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def terms(s: KronShape) -> int:
    return s.rank * (s.n1 + s.n2)


# --- activations


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_torchs_at_every_size_of_their_argument(activation, isa):
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([-1e30, -0.0, 1e-40, 1e30])])
    y = kron_matmul(x[:, None], torch.ones(1, 1), activation=activation, backend="native")[:, 0]
    expected = reference.kron_matmul(x[:, None], torch.ones(1, 1), activation=activation)[:, 0]
    # 2.4e-7 for what multiplies x (csrc/cpu/activation.h promises gelu 1.6e-7); the product is
    # rounded once more.
    error = ((y - expected).abs() - 1e-37) / x.abs().clamp_min(1e-30)
    assert error.max() <= 2.4e-7 + 0.6e-7


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_of_non_finite_numbers_are_torchs(activation, isa):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    y = kron_matmul(x[:, None], torch.ones(1, 1), activation=activation, backend="native")[:, 0]
    # In float64: torch's float32 gelu makes a NaN of infinity.
    expected = {"gelu": F.gelu, "silu": F.silu}[activation](x.double()).float()
    torch.testing.assert_close(y, expected, equal_nan=True)


# --- fusions


def layer(s: KronShape, dtype=torch.float64, bias=True):
    _, a, b = draw(s, 0, dtype)
    return a, b, torch.randn(s.out_features).to(dtype) if bias else None


# The hidden grid is met entry by entry in the first two, and not in the others.
BLOCKS = [
    (KronShape(16, 2, 12, 24), KronShape(2, 16, 20, 12)),
    (KronShape(8, 3, 16, 5, 2), KronShape(4, 8, 9, 16, 3)),
    (KronShape(8, 8, 4, 6), KronShape(4, 4, 5, 8)),
    (KronShape(12, 24, 16, 2), KronShape(20, 12, 2, 16)),
]


def test_the_blocks_meet_or_not():
    fused = [native.fuses(layer(up), layer(down)) for up, down in BLOCKS]
    assert fused == [True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [0, 1, 6, 16, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{name(b[0])}-{name(b[1])}")
def test_feed_forward_is_its_products(block, activation, tokens, dtype, isa):
    up, down = (layer(s, dtype) for s in block)
    x = draw(block[0], (1, tokens), dtype)[0]
    residual = torch.randn(1, tokens, block[1].out_features).to(dtype)
    y = kron_feed_forward(x, up, down, activation=activation, residual=residual, backend="native")
    hidden = reference.kron_matmul(x, *up[:2], bias=up[2], activation=activation)
    expected = reference.kron_matmul(hidden, *down[:2], bias=down[2], residual=residual)
    assert_close("y", y, expected, sum(map(terms, block)), slack=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("block", BLOCKS[:2], ids=lambda b: f"{name(b[0])}-{name(b[1])}")
def test_feed_forward_gradients(block, tokens, activation, dtype, isa):
    up, down = (layer(s, dtype) for s in block)
    x = draw(block[0], tokens, dtype)[0]
    operands = [t.requires_grad_() for t in (x, *up, *down)]
    y = kron_feed_forward(x, up, down, activation=activation, backend="native")
    dy = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, operands, dy)
    wide = [t.detach().double().requires_grad_() for t in operands]
    hidden = reference.kron_matmul(*wide[:3], bias=wide[3], activation=activation)
    expected = torch.autograd.grad(
        reference.kron_matmul(hidden, *wide[4:6], bias=wide[6]), wide, dy.double()
    )
    n = tokens * sum(map(terms, block)) * 4
    labels = ["x", "a1", "b1", "c1", "a2", "b2", "c2"]
    for label, grad, other in zip(labels, grads, expected, strict=True):
        assert_close(label, grad, other, n, slack=8)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{name(b[0])}-{name(b[1])}")
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_gradcheck(block, bias):
    up, down = (layer(s._replace(m2=s.m2, n2=s.n2), bias=bias) for s in block)
    x = draw(block[0], 2)[0]
    given = [t for t in (x, *up, *down) if t is not None]

    def f(x, *rest):
        rest = list(rest)
        layers = [(rest.pop(0), rest.pop(0), rest.pop(0) if bias else None) for _ in range(2)]
        return kron_feed_forward(x, *layers)

    operands = [t.requires_grad_() for t in given]
    torch.autograd.gradcheck(f, operands, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(f, operands, fast_mode=True)


def test_feed_forward_under_transforms_compile_and_autocast():
    up, down = (layer(s, torch.float32) for s in BLOCKS[0])
    x = draw(BLOCKS[0][0], (3, 5), torch.float32)[0]
    expected = kron_feed_forward(x, up, down)
    torch.testing.assert_close(
        torch.vmap(lambda row: kron_feed_forward(row, up, down))(x), expected
    )

    def loss(x):
        return kron_feed_forward(x, up, down).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    compiled = torch.compile(
        lambda x: kron_feed_forward(x, up, down), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), expected)
    traced = x.clone().requires_grad_()
    compiled(traced).square().sum().backward()
    torch.testing.assert_close(traced.grad, leaf.grad, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert kron_feed_forward(x, up, down).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_qkv_is_three_products(tokens, dtype, isa):
    shapes = KronShape(6, 4, 5, 6), KronShape(3, 4, 7, 6), KronShape(1, 6, 2, 4, 2)
    layers = [layer(s, dtype, bias=i != 1) for i, s in enumerate(shapes)]
    x = torch.randn(2, tokens, 24).to(dtype)
    for backend in ("native", "eager"):
        ys = kron_qkv(x, *layers, backend=backend)
        for y, s, (a, b, bias) in zip(ys, shapes, layers, strict=True):
            assert_close("y", y, reference.kron_matmul(x, a, b, bias=bias), terms(s), scale=1.5)


def test_qkv_has_gradients():
    layers = [layer(KronShape(6, 4, 5, 6)) for _ in range(3)]
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = kron_qkv(x, *layers)
    ((q @ k.mT).softmax(-1) @ v).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_the_feed_forward_module_and_its_errors():
    torch.manual_seed(0)
    up, down = KroneckerLinear(24, 96, (16, 2)), KroneckerLinear(96, 24, (2, 16))
    block = KroneckerFeedForward(up, down, "relu")
    x = torch.randn(4, 24)
    torch.testing.assert_close(block(x, residual=x), down(F.relu(up(x))) + x)
    with pytest.raises(ValueError, match="down takes 24 features, but up gives 96"):
        KroneckerFeedForward(up, up)
    factors = (up.a, up.b, up.bias), (down.a, down.b, down.bias)
    with pytest.raises(ValueError, match="activation must be None or one of gelu"):
        kron_feed_forward(x, *factors, activation="swish")
    with pytest.raises(ValueError, match="last dimension must be the product"):
        kron_feed_forward(x, factors[0], factors[0])
    with pytest.raises(ValueError, match="residual must have y's shape"):
        kron_feed_forward(x, *factors, residual=x[:1])


# --- weights are read where they lie


def test_no_copy_of_a_weight_outlives_a_call():
    s = KronShape(48, 40, 3, 5)
    x, a, b = draw(s, 9, torch.float32)
    linear = KroneckerLinear(s.in_features, s.out_features, (s.m1, s.n1), bias=False)
    with torch.no_grad():
        linear(x)
        linear.a.data.copy_(a)  # .data writes leave the version counter alone
        linear.b.data.mul_(0)
        assert not linear(x).any()
        linear.load_state_dict({"a": a, "b": b})
        assert_close("y", linear(x), reference.kron_matmul(x, a, b), terms(s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_factors_of_any_strides(dtype, isa):
    s = KronShape(24, 18, 20, 15, 2)
    for tokens in (2, 40):
        x, a, b = draw(s, tokens, dtype)
        expected = kron_matmul(x, a, b, backend="native")
        turned = a.mT.contiguous().mT, b.mT.contiguous().mT
        spaced = tuple(torch.stack([f, f], -1)[..., 0] for f in (a, b))
        for factors in (turned, spaced):
            y = kron_matmul(x, *factors, backend="native")
            assert_close("y", y, expected.double(), terms(s))


# --- threads


def test_results_do_not_depend_on_threads_and_repeat_exactly(two_threads):
    for s in (KronShape(48, 48, 12, 12), KronShape(12, 12, 48, 48)):
        x, a, b = draw(s, 1000, torch.float32)
        dy = torch.randn(1000, s.out_features)
        two = kron_matmul(x, a, b, backend="native")
        grads = [native.kron_matmul_backward(dy, x, a, b, (1, 1, 1)) for _ in range(3)]
        for other in grads[1:]:
            assert all(map(torch.equal, grads[0], other))
        torch.set_num_threads(1)
        assert torch.equal(kron_matmul(x, a, b, backend="native"), two)
        torch.set_num_threads(2)


def most_of_few(isa: str) -> int:
    """Up to two vectors of float32 tokens may be computed in another order on one thread."""
    return {"portable": 8, "avx2": 16, "avx512": 32}[isa]


# Enough terms that a few tokens are work for five threads, and their blocks fewer than these. The
# outputs are divided by rows of the factor that is contracted first, or second; those of low rank
# are not.
FEW = [
    KronShape(2, 2, 48, 40, 128),
    KronShape(48, 40, 2, 2, 128),
    KronShape(33, 17, 16, 20, 32),
    KronShape(70, 1, 1, 90, 400),
    KronShape(8, 9, 9, 8, 128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [1, 7, 16, 25, 40])
@pytest.mark.parametrize("s", FEW, ids=name)
def test_a_few_tokens_on_several_threads(s, tokens, dtype, isa):
    x, a, b = draw(s, tokens, dtype)
    bias = torch.randn(s.out_features).to(dtype)
    residual = torch.randn(tokens, s.out_features).to(dtype)
    ys = at_threads(
        lambda: kron_matmul(
            x, a, b, bias=bias, activation="gelu", residual=residual, backend="native"
        )
    )
    expected = reference.kron_matmul(x, a, b, bias=bias, activation="gelu", residual=residual)
    for y in ys:
        assert_close("y", y, expected, terms(s))
    if tokens > most_of_few(isa):
        assert all(torch.equal(y, ys[0]) for y in ys)
    dy = torch.randn(ys[0].shape).to(dtype)
    grads = at_threads(lambda: native.kron_matmul_backward(dy, x, a, b, (1, 1, 1)))
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    exact = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())
    for some in grads:
        assert torch.equal(some[0], grads[0][0])
        for label, grad, other in zip("xab", some, exact, strict=True):
            assert_close(label, grad, other, tokens * terms(s), slack=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [1, 7, 16, 25, 40])
@pytest.mark.parametrize(
    "block",
    [
        (KronShape(16, 2, 12, 24, 32), KronShape(2, 16, 20, 12, 32)),
        (KronShape(24, 16, 12, 8, 32), KronShape(16, 24, 8, 12, 32)),
        (KronShape(64, 1, 1, 48, 200), KronShape(48, 1, 1, 64, 200)),
    ],
    ids=["meet", "do not meet", "low rank"],
)
def test_a_few_tokens_of_a_feed_forward_on_several_threads(block, tokens, dtype, isa):
    up, down = (layer(s, dtype) for s in block)
    x = draw(block[0], tokens, dtype)[0]
    residual = torch.randn(tokens, block[1].out_features).to(dtype)
    ys = at_threads(lambda: kron_feed_forward(x, up, down, residual=residual, backend="native"))
    hidden = reference.kron_matmul(x, *up[:2], bias=up[2], activation="gelu")
    expected = reference.kron_matmul(hidden, *down[:2], bias=down[2], residual=residual)
    for y in ys:
        assert_close("y", y, expected, sum(map(terms, block)), slack=8)
    if tokens > most_of_few(isa):
        assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [1, 7, 16, 25, 40])
def test_gradients_of_a_feed_forward_of_a_few_tokens_on_several_threads(tokens, dtype, isa):
    shapes = KronShape(16, 2, 24, 20, 16), KronShape(2, 16, 22, 24, 16)
    up, down = (layer(s, dtype) for s in shapes)
    assert native.fuses(up, down)
    x = draw(shapes[0], tokens, dtype)[0]
    dy = torch.randn(tokens, shapes[1].out_features).to(dtype)
    given = dy, x, up, "silu", down, (True,) * 6
    found = at_threads(lambda: native.kron_feed_forward_backward(*given))
    wide = [t.double().requires_grad_() for t in (x, *up, *down[:2])]
    hidden = reference.kron_matmul(*wide[:3], bias=wide[3], activation="silu")
    exact = torch.autograd.grad(reference.kron_matmul(hidden, *wide[4:]), wide, dy.double())
    n = tokens * sum(map(terms, shapes)) * 4
    for grads in found:
        for label, grad, other in zip(
            ["x", "a1", "b1", "c1", "a2", "b2"], grads, exact, strict=True
        ):
            assert_close(label, grad, other, n, slack=8)


def test_qkv_of_a_few_tokens_on_several_threads(isa):
    shapes = KronShape(2, 2, 48, 48, 64), KronShape(16, 12, 5, 8, 2), KronShape(24, 8, 4, 12, 50)
    layers = [layer(s, torch.float32) for s in shapes]
    x = torch.randn(33, 96)
    all_ys = at_threads(lambda: kron_qkv(x, *layers, backend="native"))
    for i, (s, (a, b, bias)) in enumerate(zip(shapes, layers, strict=True)):
        assert_close("y", all_ys[0][i], reference.kron_matmul(x, a, b, bias=bias), terms(s))
        assert all(torch.equal(ys[i], all_ys[0][i]) for ys in all_ys)


THREADS = 1, 2, 4, 8, 16, 64


def divide(kind: str, threads: int, tokens: int, *shapes: KronShape) -> Division:
    count = [len(shapes)] if kind == "forward" else []
    numbers = [
        n for s in shapes for n in abi.product_of_shapes([(s.rank, *s[:2]), (s.rank, *s[2:4])])
    ]
    ask = getattr(abi.module, f"{kind}_division")
    return Division(*ask(native._isa, threads, 0, 1, 1, 0, tokens, *count, *numbers))


@pytest.mark.parametrize("tokens", [1, 16, 128, 512, 4096])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        *[("forward", [s]) for s in PRESETS.values()],
        *[("forward", [PRESETS[f"{size} attention"]] * 3) for size in PAIRS],
        *[("feed_forward", pair) for pair in PAIRS.values()],
        ("feed_forward", [KronShape(96, 48, 32, 16), KronShape(48, 96, 16, 32)]),
        *[("backward", [s]) for s in PRESETS.values()],
        *[("feed_forward_backward", pair) for pair in PAIRS.values()],
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(name, v)),
)
def test_the_division_of_work(kind, shapes, tokens, isa):
    """No thread has much more than its part of the work, and all have some if it is enough."""
    work = tokens * sum(s.multiply_adds(s.order) for s in shapes) * (3 if "backward" in kind else 1)
    last = 1.0
    for threads in THREADS:
        d = divide(kind, threads, tokens, *shapes)
        used = d.teams * d.workers
        assert used == 1 or (used <= threads and used <= work / 1e6)
        assert 1 - 1e-9 <= d.share * used <= 1.25
        if tokens > 1:  # one token is computed in the layout of memory
            assert used >= min(threads, int(work / 1e6), 4)
        assert d.share <= last + 1e-9
        last = d.share
        assert (d.parts > 1) <= (used > 1)
        assert d.stages == 1 or (d.teams, d.workers) == (1, used)


def _in_child(queue, operands):
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch fills in its own pool
    queue.put(kron_matmul(*operands, backend="native").tolist())


def test_a_forked_child_can_call(two_threads):
    operands = draw(KronShape(48, 48, 12, 12), 500, torch.float32)
    expected = kron_matmul(*operands, backend="native").tolist()  # torch's pool is up
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, operands))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


def test_pythons_lock_is_released():
    s = KronShape(96, 96, 16, 16)
    x, a, b = draw(s, 20_000, torch.float32)
    ticks, done = [], threading.Event()

    def work():
        kron_matmul(x, a, b, backend="native")
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(1e-3)
    worker.join()
    assert len(ticks) > 5


# --- dispatch


def test_auto_takes_the_compiled_kernels_and_names_the_instruction_set():
    x, a, b = draw(SHAPES[2], 5, torch.float32)
    assert dispatch.choose("auto", x, (a, b)) == "native"
    assert f"native  ready: {native.instruction_set()}" in kron_kernels.explain_backends(x, a, b)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: draw(SHAPES[1], 2, torch.complex64), "x is torch.complex64"),
        (lambda: tuple(t.to("meta") for t in draw(SHAPES[1])), "x is on meta"),
        (
            lambda: (torch.ones(1, 1), *[torch.ones(1, 1, 1)] * 9),
            "up to 8 factors, and there are 9",
        ),
        (
            lambda: (torch.ones(1, 1), torch.ones(1, 1, 1, requires_grad=True)),
            "gradients for two factors and more, and there is one",
        ),
    ],
    ids=["complex", "device", "factors", "gradients"],
)
def test_other_calls_go_to_eager_with_a_reason(call, reason):
    operands = call()
    assert reason in dispatch.why_not("native", *operands)
    assert dispatch.choose("auto", operands[0], operands[1:]) == "eager"
    with pytest.raises(ValueError, match="backend='native' cannot serve this call"):
        kron_matmul(*operands, backend="native")


def test_without_the_module_auto_is_eager(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(abi, "missing", "the compiled module is missing; reinstall it")
    x, a, b = draw(SHAPES[2], 5, torch.float32)
    assert dispatch.why_not("native", x, a, b) == "the compiled module is missing; reinstall it"
    assert dispatch.choose("auto", x, (a, b)) == "eager"
    assert_close("y", kron_matmul(x, a, b), reference.kron_matmul(x, a, b), terms(SHAPES[2]))


def test_without_torchs_thread_pool_it_runs_with_one_thread_only(monkeypatch, two_threads):
    monkeypatch.setattr(native, "_POOL", 0)
    x, a, b = draw(SHAPES[2], 5, torch.float32)
    assert "thread pool" in dispatch.why_not("native", x, a, b)
    torch.set_num_threads(1)
    assert dispatch.why_not("native", x, a, b) is None
