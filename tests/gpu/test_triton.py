"""Triton kernels: the PTX that the compiler makes of them, executed by a simulator of the GPU."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.func import vmap
from turns import in_turns

from benchmarks.gpu.cases import (
    ACTIVATIONS,
    DTYPES,
    FEED_FORWARDS,
    MIXED,
    PAIRS,
    PRESETS,
    SHAPES,
    SQUARES,
    SUMS,
    draw,
    name,
)
from benchmarks.gpu.checks import (
    check_feed_forward,
    check_forward,
    check_gradients,
    check_qkv,
    epilogue_of,
    hold,
    terms,
)
from kron_kernels import (
    KroneckerEmbedding,
    KronShape,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends.triton import configs as triton_launch
from kron_kernels.backends.triton import launch as triton_gpu

pytest.importorskip("triton")
from simulator import Device

from kron_kernels.backends.triton import forward as triton_forward

EVERY_SHAPE = [*MIXED, SQUARES[0], KronShape(20, 33, 70, 17)]

# Architecture and dtype. sm_90 has its own tensor-core instructions, for 16 bits most of all.
EVERY = [*((80, d) for d in DTYPES), (90, "float16"), (120, "float16")]
REST = [*((90, d) for d in DTYPES[1:]), (120, "tf32")]
SOME = [(80, "float16"), (80, "float32"), (90, "float16")]
OTHERS = [machine for machine in ((a, d) for a in (80, 90) for d in DTYPES) if machine not in SOME]
BOTH = [(80, "float16"), (90, "bfloat16")]
SWAPPED = [(80, "bfloat16"), (90, "float16")]
ARCHS = [("sm_80",), ("sm_90",)]


def machines(what, cases):
    return pytest.mark.parametrize(("gpu", "dtype", *what), cases, indirect=["gpu", "dtype"])


def archs(shapes, **more):
    cases = in_turns(ARCHS, shapes, **more)
    return pytest.mark.parametrize(("gpu", "s"), cases, indirect=["gpu"])


@pytest.fixture(autouse=True)
def _simulating(monkeypatch):
    """CPU tensors stand for a GPU's; the rule's tiles, whatever the machine has measured."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton_launch, "simulating", True)


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    with Device(int(str(request.param).removeprefix("sm_"))) as device:
        yield device


# --- forward


@machines(["s"], in_turns(EVERY, EVERY_SHAPE, each=2, rest=REST))
def test_forward_in_every_order_dtype_and_epilogue(s, dtype, gpu, request):
    turn = sum(map(ord, request.node.name)) + sum(s)
    check_forward(s, (1, 5, 19)[turn % 3], dtype, "triton", turn)


@machines(["s"], in_turns(BOTH, [*PRESETS.values(), *SUMS], rest=SWAPPED))
def test_forward_of_the_presets(s, dtype, gpu):
    x, a, b = draw(s, 35, dtype)
    more = epilogue_of(s, 35, dtype, 1)
    y = kron_matmul(x, a, b, **more, backend="triton")
    hold("y", y, reference.kron_matmul(x, a, b, **more), terms(s), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_drawn_products_and_their_gradients(seed, monkeypatch):
    """Any sides, ranks, tokens, dtypes and epilogues, on any of the architectures."""
    draws = random.Random(seed)
    s = KronShape(*(draws.choice([1, 2, 3, 5, 8, 9, 16, 17, 31, 40]) for _ in range(4)))
    s = s._replace(rank=draws.choice([1, 1, 2, 3]))
    tokens, dtype = draws.choice([1, 2, 7, 33]), draws.choice([torch.float16, torch.bfloat16])
    dense = draws.choice([True, False])
    monkeypatch.setattr(triton_launch.Geometry, "dense_gradient_pays", lambda *_: dense)
    with Device(draws.choice([80, 90, 120])):
        check_forward(s, tokens, dtype, "triton", seed)
        check_gradients(s, tokens, dtype, "triton")


def test_no_tokens_is_no_launch(gpu):
    for s in SHAPES[:4]:
        x, a, b = draw(s, 0, torch.float16)
        assert kron_matmul(x, a, b, backend="triton").shape == (0, s.out_features)
        grads = triton_gpu.kron_matmul_backward(x.new_empty(0, s.out_features), x, a, b, [True] * 3)
        assert all(
            g.shape == t.shape and not g.any() for g, t in zip(grads, (x, a, b), strict=True)
        )
    assert not gpu.launches


@archs(SHAPES)
def test_a_nan_stays_in_its_token(s, gpu):
    x, a, b = draw(s, 5, torch.float16)
    x[2] = torch.nan
    y = kron_matmul(x, a, b, backend="triton")
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
def test_the_last_rows_of_more_than_32_bits_of_numbers(dtype, monkeypatch):
    """Only the last program runs: memory that nobody touches is not really there."""
    s = KronShape(64, 1, 64, 2)
    tokens = 2**19 + 3
    x = torch.zeros(tokens, 2, dtype=dtype)
    rows, a, b = draw(s, 3, dtype)
    x[-3:] = rows
    launch, grids = triton_forward.kron_matmul_kernel, []

    class Last:
        def __getitem__(self, grid):
            grids.append(grid)
            return launch[(1, *grid[1:])]

    def last(ptx: str) -> str:
        last = rf"mov.u32 \1, %ctaid.x;\nadd.u32 \1, \1, {grids[0][0] - 1};"
        return re.sub(r"mov\.u32\s+(%r\d+), %ctaid\.x;", last, ptx)

    monkeypatch.setattr(triton_forward, "kron_matmul_kernel", Last())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with Device(80, edit=last):
        y = kron_matmul(x, a, b, backend="triton")
    assert y.numel() > 2**31
    hold("y", y[-3:], reference.kron_matmul(rows, a, b), terms(s), dtype)


@machines(["s"], in_turns(BOTH, [PRESETS["21x attention"], SHAPES[7]], rest=SWAPPED))
def test_three_products_of_one_x(s, dtype, gpu):
    check_qkv(s, 19, dtype, "triton")
    assert len(gpu.launches) == 1


# --- gradients


@machines(["s"], in_turns(SOME, EVERY_SHAPE, rest=OTHERS))
def test_gradients_in_every_order_and_dtype(s, dtype, gpu, request, monkeypatch):
    turn = sum(map(ord, request.node.name))
    # Either way to the gradients of a small mix, whichever would pay.
    monkeypatch.setattr(triton_launch.Geometry, "dense_gradient_pays", lambda *_: turn % 3 == 0)
    tokens = (1, 21, 70)[turn % 3]
    check_gradients(s, tokens, dtype, "triton")


@machines(["s"], in_turns(BOTH, PRESETS.values(), rest=SWAPPED))
def test_gradients_of_the_presets(s, gpu, dtype):
    check_gradients(s, 35, dtype, "triton")


def test_gradients_are_the_same_bits_every_time(gpu):
    x, a, b = draw(SHAPES[3], 150, torch.float16)
    dy = torch.randn(150, SHAPES[3].out_features).half()
    first, second = (triton_gpu.kron_matmul_backward(dy, x, a, b, [True] * 3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["dx", "da", "db"])
@archs([SHAPES[2], SHAPES[5]])
def test_only_the_gradients_that_are_needed(s, needed, gpu):
    operands = draw(s, 9, torch.float32)
    for t, n in zip(operands, needed, strict=True):
        t.requires_grad_(bool(n))
    kron_matmul(*operands, backend="triton").sum().backward()
    assert [t.grad is not None for t in operands] == [bool(n) for n in needed]
    assert len(gpu.launches) <= 2  # forward, and at most one kernel of the backward


def test_second_order_gradients_and_vmap(gpu):
    s = SHAPES[2]
    x, a, b = (t.requires_grad_() for t in draw(s, 3, torch.float32))

    def second(call, *operands):
        (g,) = torch.autograd.grad(call(*operands).square().sum(), operands[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), operands)

    got = second(lambda *o: kron_matmul(*o, backend="triton"), x, a, b)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    for label, g, other in zip("xab", got, second(reference.kron_matmul, *wide), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(g.double(), other, rtol=1e-3, atol=1e-4 * scale, msg=label)
    xs = torch.stack([x.detach(), 2 * x.detach()])
    ys = vmap(lambda v: kron_matmul(v, a.detach(), b.detach(), backend="triton"))(xs)
    torch.testing.assert_close(ys[1], 2 * ys[0])


@pytest.mark.parametrize("training", [False, True])
def test_a_compiler_keeps_the_kernels_in_one_graph(training, gpu):
    s = SHAPES[2]
    operands = [t.requires_grad_(training) for t in draw(s, 5, torch.float32)]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def call(*operands):
        return kron_matmul(*operands, activation="gelu", backend="triton")

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y = torch.compile(call, fullgraph=True, backend=compiler)(*operands)
    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = reference.kron_matmul(*wide, activation="gelu")
    hold("y", y, expected, terms(s), torch.float32)
    assert len(graphs) == 1 and "kron_kernels.kron_matmul" in graphs[0]
    if training:
        grads = torch.autograd.grad(y.sum(), operands)
        assert "kron_kernels.kron_matmul_backward" in graphs[1]
        for grad, other in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
            hold("gradient", grad, other, 5 * terms(s) * s.m1 * s.m2, torch.float32)


# --- feed-forward


def names(shapes: tuple[KronShape, ...]) -> str:
    return "-".join(map(name, shapes))


@machines(["shapes"], in_turns(SOME, FEED_FORWARDS, rest=OTHERS, label=names))
def test_feed_forward_and_its_gradients(shapes, dtype, gpu, request):
    turn = sum(map(ord, request.node.name))
    activation = ACTIVATIONS[1 + turn % 4]
    check_feed_forward(*shapes, (1, 5, 19)[turn % 3], dtype, activation, "triton", bool(turn % 3))


@machines(["shapes"], in_turns(BOTH, PAIRS.values(), rest=SWAPPED, label=names))
def test_feed_forward_of_the_presets(shapes, gpu, dtype):
    check_feed_forward(*shapes, 35, dtype, "gelu", "triton")


def test_a_feed_forward_that_does_not_meet_goes_in_two_launches(gpu):
    up, down = KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4)
    x, a1, b1 = draw(up, 5, torch.float32)
    _, a2, b2 = draw(down, 5, torch.float32)
    assert not triton_gpu.fuses((a1, b1, None), (a2, b2, None))
    y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend="triton")
    hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
    hold("y", y, reference.kron_matmul(hidden, a2, b2), terms(up) + terms(down), torch.float32)
    assert len(gpu.launches) == 2


# --- embedding


@machines(["table"], in_turns([(80, "float32"), *BOTH], [(1, 8), (2, 5), (1, 1)], label=str))
def test_embedding_lookup_and_its_gradients(table, dtype, gpu):
    rank, size = table
    table = KroneckerEmbedding(41, 6 * size, size, rank, padding_idx=3, dtype=dtype)
    ids = torch.randint(0, 41, (3, 7))
    ids[0, 0] = 3
    out = table(ids)
    assert gpu.launches[0].name == "embedding_kernel"
    wide = [p.detach().double().requires_grad_() for p in (table.a, table.b)]
    dense = reference.materialize(*wide)
    expected = F.embedding(ids, dense)
    hold("rows", out, expected, rank, dtype)
    dy = torch.randn_like(out)
    out.backward(dy)
    others = torch.autograd.grad(expected, wide, dy.double())
    others[0][:, 3] = 0
    for label, grad, other in zip("ab", (table.a.grad, table.b.grad), others, strict=True):
        hold(label, grad, other, ids.numel() * 6 * size, dtype)


def test_an_id_that_is_no_row_gives_nan_and_reads_nothing(gpu):
    table = KroneckerEmbedding(5, 24, 8, dtype=torch.float16)
    with torch.no_grad():
        out = table(torch.tensor([4, 5, -1, 0]))
    assert out.isnan().all(-1).tolist() == [False, True, True, False]


def test_the_tied_decoder(gpu):
    s = KronShape(1000, 12, 1, 8)
    h, a, b = draw(s, 3, torch.float16)
    hold(
        "logits",
        kron_matmul(h, a, b, backend="triton"),
        reference.kron_matmul(h, a, b),
        terms(s),
        torch.float16,
    )


# --- traffic


def moved(launch) -> int:
    """Bytes that a launch reads and writes."""
    return 32 * (launch.traffic["load_sectors"] + launch.traffic["store_sectors"])


def layer_of(s: KronShape, tokens: int):
    x, a, b = draw(s, tokens, torch.float16)
    return x, (a, b, torch.zeros(s.out_features, dtype=torch.float16))


@archs(PRESETS.values())
def test_a_product_moves_what_it_must(s, gpu):
    """x and y once, the factors and the bias once for a program."""
    x, (a, b, bias) = layer_of(s, 64)
    kron_matmul(x, a, b, bias=bias, backend="triton")
    (launch,) = gpu.launches
    programs = launch.grid[0] * launch.grid[1]
    least = 64 * (s.in_features + s.out_features) + programs * (s.parameters + s.out_features)
    assert moved(launch) <= 1.1 * 2 * least


def test_three_products_of_one_x_move_what_they_must(gpu):
    s = PRESETS["21x attention"]
    x, layer = layer_of(s, 64)
    kron_qkv(x, layer, layer, layer, backend="triton")
    (launch,) = gpu.launches
    least = 64 * s.in_features
    least += 3 * (64 * s.out_features + launch.grid[0] * (s.parameters + s.out_features))
    # The mixes are read for each of three pieces of x, from the L1 cache.
    assert moved(launch) <= 1.15 * 2 * least


# The bias of the wider hidden vector is read by each of eight warps, from the L1 cache.
@pytest.mark.parametrize(("gpu", "size"), in_turns(ARCHS, PAIRS, label=str), indirect=["gpu"])
def test_a_feed_forward_block_moves_what_it_must(size, gpu):
    (up, down), most = PAIRS[size], {"8x": 1.1, "21x": 1.2}[size]
    x, first = layer_of(up, 64)
    kron_feed_forward(x, first, layer_of(down, 1)[1], backend="triton")
    (launch,) = gpu.launches
    least = 64 * (up.in_features + down.out_features)
    least += launch.grid[0] * sum(s.parameters + s.out_features for s in (up, down))
    assert moved(launch) <= most * 2 * least
