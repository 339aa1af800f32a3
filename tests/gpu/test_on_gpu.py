"""The kernels of both engines on a GPU, and the same tests in the simulator.

pytest -m gpu -n 1 tests/gpu/test_on_gpu.py runs them on a GPU; python -m benchmarks.gpu does so
with a crash or a hang costing one test.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from machines import CUDA, ON_GPU, TRITON, cases, machines, on

from kron_kernels import (
    KroneckerEmbedding,
    KronShape,
    dispatch,
    kron_feed_forward,
    kron_matmul,
    reference,
)
from kron_kernels.testing.cases import (
    ACTIVATIONS,
    DECODER,
    DTYPES,
    FEED_FORWARDS,
    MIXED,
    PAIRS,
    PRESETS,
    SHAPES,
    SQUARES,
    SUMS,
)
from kron_kernels.testing.checks import (
    check_feed_forward,
    check_forward,
    check_gradients,
    check_qkv,
    close,
    hold,
    oracle,
    same,
    terms,
    wide,
)

ODD = [*MIXED, *SQUARES, KronShape(20, 33, 70, 17)]
FEW = [SHAPES[1], SHAPES[8]]  # in the simulator, by default
only_triton = machines(TRITON, gpus=ON_GPU[:1])


@pytest.fixture
def dtype(dtype, machine, request):
    """Skips the test if the engine has no kernel for its shapes."""
    for s in request.node.callspec.params.values():
        if isinstance(s, KronShape):
            machine.draw(s, 1, dtype)
    return dtype


# --- products


def products(tokens, few_tokens, cuda_tokens):
    """Every shape and dtype; a quarter of them by default.

    ``tokens(turn)`` are the numbers of tokens on a GPU, ``few_tokens`` those in the simulator of
    Triton's kernels, ``cuda_tokens`` in that of CUDA's, where nvcc takes half a minute a dtype.
    """
    found = []
    shapes = [*ODD, *PRESETS.values(), *SUMS]
    for (i, s), (j, dtype) in product(enumerate(shapes), enumerate(DTYPES)):
        turn, slow = 7 * i + j, (i + j) % 4 > 0
        found += [on(gpu, dtype, s, t, turn + t, slow=slow) for gpu in ON_GPU for t in tokens(turn)]
        if s in ODD:
            slow = s not in FEW or (FEW.index(s) + j) % 4 > 0
            found.append(on(TRITON, dtype, s, few_tokens, turn + few_tokens, slow=slow))
    return found + [on(CUDA, "float16", SHAPES[1], t, t) for t in cuda_tokens]


# 3 and 19 tokens are without and with tensor cores in CUDA's kernels.
@cases("dtype s tokens turn", products(lambda turn: ((1, 19, 300)[turn % 3], 35), 5, (3, 19)))
def test_forward(machine, dtype, s, tokens, turn):
    check_forward(s, tokens, dtype, machine.engine, turn, machine.device)


@cases("dtype s tokens turn", products(lambda turn: ((1, 70, 1000)[turn % 3],), 9, (19,)))
def test_gradients(machine, dtype, s, tokens, turn):
    check_gradients(s, tokens, dtype, machine.engine, machine.device)


@cases(
    "s tokens",
    [
        *(
            on(gpu, PRESETS["21x attention"], tokens)
            for gpu in ON_GPU
            for tokens in (0, 1, 2, 3, 17, 33, 129, 1001, 8191)
        ),
        *(on(TRITON, SHAPES[2], tokens, slow=True) for tokens in (0, 1, 2, 3, 17)),
    ],
)
def test_numbers_of_tokens(machine, s, tokens):
    x, a, b = machine.draw(s, tokens, torch.float16)
    y = kron_matmul(x, a, b, backend=machine.engine)
    hold("y", y, oracle(x, a, b), terms(s), torch.float16)
    grads = machine.kernels.kron_matmul_backward(torch.zeros_like(y), x, a, b, [True] * 3)
    for grad, t in zip(grads, (x, a, b), strict=True):
        assert grad.shape == t.shape and not grad.any()


def at_an_odd_address(t):
    """A copy at one entry behind a multiple of 16 bytes."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@machines(TRITON, CUDA)
def test_operands_that_are_not_contiguous_or_not_aligned(machine):
    s, dtype = SHAPES[2], torch.float16
    x, a, b = machine.draw(s, 6, dtype)
    residual, bias = machine.noise(dtype, 6, s.out_features), machine.noise(dtype, s.out_features)
    forms = {
        "every second column of x": {"x": torch.stack([x, x], 2)[..., 0]},
        "x by columns": {"x": x.mT.contiguous().mT},
        "x at an odd address": {"x": at_an_odd_address(x)},
        "factors at odd addresses": {"a": at_an_odd_address(a), "b": at_an_odd_address(b)},
        "slices of factors": {
            "a": torch.cat([a, a], 1)[:, : s.m1],
            "b": torch.cat([b, b], 2)[..., : s.n2],
        },
        "one row for all": {"x": x[:1].expand(6, -1)},
        "bias and residual": {
            "bias": bias[:1].expand(s.out_features),
            "residual": residual.mT.contiguous().mT,
        },
        "both at odd addresses": {
            "bias": at_an_odd_address(bias),
            "residual": at_an_odd_address(residual),
        },
        "three axes": {"x": x.view(2, 3, -1).transpose(0, 1)},
    }
    for label, changed in forms.items():
        operands = {"x": x, "a": a, "b": b} | changed
        x_, a_, b_ = (operands.pop(key) for key in "xab")
        y = kron_matmul(x_, a_, b_, **operands, backend=machine.engine)
        hold(label, y, oracle(x_, a_, b_, **operands), terms(s), dtype)


@cases(
    "s",
    [
        *(on(gpu, s) for gpu in ON_GPU for s in SHAPES[1:4]),
        *(on(simulator, SHAPES[1]) for simulator in (TRITON, CUDA)),
    ],
)
def test_a_nan_stays_in_its_token(machine, s):
    x, a, b = machine.draw(s, 5, torch.float16)
    x[2] = torch.nan
    y = kron_matmul(x, a, b, backend=machine.engine)
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].isnan().any()


@machines(TRITON)
def test_the_choice_of_a_backend(machine):
    x, a, b = machine.draw(SHAPES[2], 3, torch.float16)
    if not machine.simulated:  # simulated tensors are on the CPU
        first = next(e for e in dispatch._order(x, a, b) if not dispatch.why_not(e, x, a, b))
        assert dispatch.choose("auto", x, (a, b)) == first
    with pytest.raises(ValueError, match="float64"):
        kron_matmul(x.double(), a.double(), b.double(), backend=machine.engine)
    y = kron_matmul(x.double(), a.double(), b.double())
    hold("float64 by another backend", y, oracle(x, a, b), terms(SHAPES[2]), torch.float64)


@cases(
    "dtype s",
    [
        *(
            on(machine, dtype, s, slow=machine.simulated or dtype != "float16")
            for machine in (*ON_GPU, TRITON)
            for s in (PRESETS["21x attention"], PRESETS["8x attention"])
            for dtype in DTYPES
        ),
        *(
            on(machine, dtype, SHAPES[8], slow=dtype != "float16")
            for machine in (*ON_GPU, TRITON)
            for dtype in DTYPES
        ),
        on(CUDA, "float16", SHAPES[1]),
    ],
)
def test_three_products_of_one_x(machine, dtype, s):
    check_qkv(s, 19, dtype, machine.engine, machine.device)


# --- gradients


@cases(
    "s needed",
    [
        on(machine, s, needed, slow=machine.simulated)
        for machine in (*ON_GPU, TRITON)
        for s in (SHAPES[2], SHAPES[5])
        for needed in ((True, False, False), (False, True, False), (False, False, True))
    ],
)
def test_only_the_gradients_that_are_needed(machine, s, needed):
    operands = machine.draw(s, 9, torch.float32)
    for t, n in zip(operands, needed, strict=True):
        t.requires_grad_(n)
    kron_matmul(*operands, backend=machine.engine).sum().backward()
    assert tuple(t.grad is not None for t in operands) == needed


@cases(
    "s tokens up down repeats",
    [
        *(on(gpu, PRESETS["8x attention"], 5000, *PAIRS["8x"], 10) for gpu in ON_GPU),
        on(TRITON, SHAPES[3], 70, *FEED_FORWARDS[0], 1, slow=True),
    ],
)
def test_the_same_bits_every_time(machine, s, tokens, up, down, repeats):
    """Of products, feed-forward blocks and their gradients."""
    dtype = torch.float16
    x, a, b = machine.draw(s, tokens, dtype)
    dy = machine.noise(dtype, tokens, s.out_features)
    hidden, _, _ = machine.draw(up, tokens // 4, dtype)
    first, second = machine.layer(up, dtype), machine.layer(down, dtype)
    back = machine.noise(dtype, tokens // 4, down.out_features)
    kernels = machine.kernels

    def run():
        return [
            kron_matmul(x, a, b, backend=machine.engine),
            *kernels.kron_matmul_backward(dy, x, a, b, [True] * 3),
            kernels.kron_feed_forward(hidden, first, "gelu", second, None),
            *kernels.kron_feed_forward_backward(back, hidden, first, "gelu", second, [True] * 6),
        ]

    expected = run()
    for i in range(repeats):
        same(f"run {i + 2}", run(), expected)


@machines(slow=(TRITON,))
def test_second_order_gradients(machine):
    x, a, b = (t.requires_grad_() for t in machine.draw(SHAPES[2], 3, torch.float32))

    def second(call, *operands):
        (g,) = torch.autograd.grad(call(*operands).square().sum(), operands[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), operands)

    got = second(lambda *o: kron_matmul(*o, backend=machine.engine), x, a, b)
    expected = second(reference.kron_matmul, *wide((x, a, b)))
    for label, g, other in zip("xab", got, expected, strict=True):
        close(label, g, other, 1e-4)


@machines(slow=(TRITON,))
def test_vmap_jvp_and_grad(machine):
    x, a, b = machine.draw(SHAPES[2], 3, torch.float32)

    def call(v):
        return kron_matmul(v, a, b, backend=machine.engine)

    ys = torch.vmap(call)(torch.stack([x, 2 * x]))
    close("vmap", ys[1], oracle(2 * x, a, b), 1e-5)
    _, tangent = torch.func.jvp(call, (x,), (2 * x,))
    close("jvp", tangent, oracle(2 * x, a, b), 1e-5)
    grad = torch.func.grad(lambda v: call(v).sum())(x)
    close("grad", grad, oracle(torch.ones_like(ys[0]), a.mT, b.mT), 1e-5)


@cases(
    "dtype",
    [
        on(machine, dtype, slow=machine.simulated)
        for machine in (*ON_GPU, TRITON)
        for dtype in ("bfloat16", "float16")
    ],
)
def test_autocast(machine, dtype):
    s = SHAPES[2]
    x, a, b = (t.requires_grad_() for t in machine.draw(s, 9, torch.float32))
    with torch.autocast(machine.device, dtype):
        y = kron_matmul(x, a, b, activation="gelu", backend=machine.engine)
    hold("y", y, oracle(*(t.to(dtype) for t in (x, a, b)), activation="gelu"), terms(s), dtype)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, a, b))
    exact = wide((x, a, b))
    reference.kron_matmul(*exact, activation="gelu").sum().backward()
    for label, t, other in zip("xab", (x, a, b), exact, strict=True):
        close(f"gradient of {label}", t.grad, other.grad, 16 * torch.finfo(dtype).eps)


# --- feed-forward blocks


def blocks():
    found = []
    for i, (up, down) in enumerate([*FEED_FORWARDS, *PAIRS.values()]):
        for (j, dtype), tokens in product(enumerate(DTYPES), (1, 5, 35, 1000)):
            activation = ACTIVATIONS[1 + (i + j + tokens) % 4]
            if tokens != 5:
                found += [
                    on(gpu, dtype, up, down, tokens, activation, slow=j > 0) for gpu in ON_GPU
                ]
            elif i < len(FEED_FORWARDS):
                found.append(on(TRITON, dtype, up, down, tokens, activation, slow=True))
    return [
        *found,
        on(TRITON, "float16", *FEED_FORWARDS[1], 5, "gelu"),
        on(CUDA, "float16", *FEED_FORWARDS[0], 19, "gelu"),
    ]


@cases("dtype up down tokens activation", blocks())
def test_feed_forward(machine, dtype, up, down, tokens, activation, record_property):
    # CUDA's kernels fuse blocks without ranks and with up to two vectors, and may fuse others.
    fused = up.rank == down.rank == 1 and min(up.n1, up.n2) <= 2
    meets = True if fused or machine.engine == "triton" else None
    at = {"meets": meets, "device": machine.device}
    met = check_feed_forward(up, down, tokens, dtype, activation, machine.engine, **at)
    record_property("meets in one kernel", met)


@machines(slow=(TRITON,))
def test_a_feed_forward_that_does_not_meet_goes_in_two_launches(machine):
    up, down = KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4)
    x, a1, b1 = machine.draw(up, 5, torch.float32)
    _, a2, b2 = machine.draw(down, 5, torch.float32)
    assert not machine.kernels.fuses((a1, b1, None), (a2, b2, None))
    y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend=machine.engine)
    hidden = oracle(x, a1, b1, activation="gelu")
    n = terms(up) + terms(down)
    hold("y", y, oracle(hidden, a2.double(), b2.double()), n, torch.float32)


# --- tables


@cases(
    "dtype rank size",
    [
        *(
            on(machine, dtype, rank, size, slow=machine.simulated)
            for machine in (ON_GPU[0], TRITON)
            for rank, size in ((1, 8), (2, 5), (1, 1))
            for dtype in ("float16", "bfloat16", "float32")
            if (machine, dtype, rank) != (TRITON, "float32", 2)
        ),
        on(TRITON, "float32", 2, 5),
    ],
)
def test_embedding_lookup_and_its_gradients(machine, dtype, rank, size):
    new = {"dtype": dtype, "device": machine.device}
    table = KroneckerEmbedding(41, 6 * size, size, rank, padding_idx=3, **new)
    ids = torch.randint(0, 41, (3, 7))
    ids[0, 0] = 3
    out = table(ids.to(machine.device))
    exact = wide((table.a, table.b))
    expected = F.embedding(ids, reference.materialize(*exact))
    hold("rows", out, expected, rank, dtype)
    dy = torch.randn_like(out)
    out.backward(dy)
    others = torch.autograd.grad(expected, exact, dy.cpu().double())
    others[0][:, 3] = 0  # the padding's row of a
    for label, grad, other in zip("ab", (table.a.grad, table.b.grad), others, strict=True):
        hold(label, grad, other, ids.numel() * 6 * size, dtype)


@only_triton
def test_an_id_outside_the_table_gives_nan(machine):
    table = KroneckerEmbedding(5, 24, 8, dtype=torch.float16, device=machine.device)
    with torch.no_grad():
        out = table(torch.tensor([4, 5, -1, 0], device=machine.device))
    assert out.isnan().all(-1).tolist() == [False, True, True, False]


@cases(
    "s",
    [*(on(gpu, DECODER) for gpu in ON_GPU), on(TRITON, KronShape(1000, 12, 1, 8), slow=True)],
)
def test_the_tied_decoder(machine, s):
    h, a, b = machine.draw(s, 35, torch.float16)
    y = kron_matmul(h, a, b, backend=machine.engine)
    hold("logits", y, oracle(h, a, b), terms(s), torch.float16)


# --- compilers


@cases(
    "training",
    [
        on(machine, training, slow=machine.simulated and training)
        for machine in (*ON_GPU, TRITON)
        for training in (False, True)
    ],
)
def test_torch_compile(machine, training):
    """One graph; without Inductor in the simulator, where it would compile for the CPU."""
    if not machine.simulated:
        pytest.importorskip("triton", reason="on a GPU torch.compile needs Triton")
    torch._dynamo.reset()
    s = SHAPES[2]
    call = torch.compile(
        lambda *o: kron_matmul(*o, activation="gelu", backend=machine.engine),
        fullgraph=True,
        backend="eager" if machine.simulated else "inductor",
    )
    for tokens in (5, 12):  # the second number compiles again, for any number
        x, a, b = (t.requires_grad_(training) for t in machine.draw(s, tokens, torch.float32))
        y = call(x, a, b)
        hold("y", y, oracle(x, a, b, activation="gelu"), terms(s), torch.float32)
        if training:
            grads = torch.autograd.grad(y.sum(), (x, a, b))
            exact = wide((x, a, b))
            loss = reference.kron_matmul(*exact, activation="gelu").sum()
            for label, g, other in zip("xab", grads, torch.autograd.grad(loss, exact), strict=True):
                close(f"gradient of {label}", g, other, 1e-4)
