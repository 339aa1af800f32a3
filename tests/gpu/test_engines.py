"""The kernels of every engine, held to float64: Triton's, and CUDA C++ in two forms.

Triton's PTX and nvcc's PTX run in the simulator. The CUDA sources also run in the emulator, which
is fast enough for many cases; test_cuda_sanitized.py runs those again under sanitizers.
"""

import random
import re
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from turns import in_turns, slow

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, reference
from kron_kernels.backends import BACKENDS, cuda
from kron_kernels.backends.triton import configs
from kron_kernels.testing.cases import (
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
from kron_kernels.testing.checks import (
    check_feed_forward,
    check_forward,
    check_gradients,
    check_qkv,
    hold,
    terms,
)

# Machines: stand-ins for a GPU (see conftest.py) and dtypes.
TRITON = [*(("triton-80", d) for d in DTYPES), ("triton-90", "float16"), ("triton-120", "float16")]
TRITON_REST = [*(("triton-90", d) for d in DTYPES[1:]), ("triton-120", "tf32")]
# sm_90 has its own tensor-core instructions, mainly for 16 bits.
TRITON_FEW = [("triton-80", "float16"), ("triton-80", "float32"), ("triton-90", "float16")]
TRITON_FEW_REST = [
    machine
    for machine in ((f"triton-{arch}", dtype) for arch in (80, 90) for dtype in DTYPES)
    if machine not in TRITON_FEW
]
TRITON_TWO = [("triton-80", "float16"), ("triton-90", "bfloat16")]
TRITON_TWO_REST = [("triton-80", "bfloat16"), ("triton-90", "float16")]
EMULATED = [("emulated", dtype) for dtype in DTYPES]
# nvcc takes half a minute for each dtype and architecture.
NVCC = [("nvcc-80", "float16")]
NVCC_REST = [
    *((f"nvcc-{arch}", "float16") for arch in (90, 120)),
    *(("nvcc-80", dtype) for dtype in ("bfloat16", "tf32", "float32")),
    ("nvcc-120", "tf32"),
]

TRITON_SHAPES = [*MIXED, SQUARES[0], KronShape(20, 33, 70, 17)]
# Simulated tokens are slow: smaller factors for the same tiles.
SMALL_SQUARES = [KronShape(16, 16, 24, 24), KronShape(20, 33, 7, 17)]
LAYERS = [*PRESETS.values(), *SUMS]


class Case(NamedTuple):
    s: KronShape
    tokens: int
    turn: int  # chooses the epilogue and the factors' strides

    def __str__(self) -> str:
        return f"{name(self.s)}-{self.tokens}"


def cases(shapes, *tokens, turn=None) -> list[Case]:
    """Each shape with one of these numbers of tokens in turn."""
    pairs = zip(shapes, cycle(tokens))
    return [Case(s, t, i if turn is None else turn) for i, (s, t) in enumerate(pairs)]


def rotated(engines, shapes, *tokens) -> list:
    """Each shape on each machine, which takes the numbers of tokens one place further on."""
    found = []
    for k, engine in enumerate(engines):
        k %= len(tokens)
        found += in_turns([engine], cases(shapes, *tokens[k:], *tokens[:k]), label=str)
    return found


def machines(*lists):
    lists = [case for each in lists for case in each]
    return pytest.mark.parametrize(("gpu", "dtype", "case"), lists, indirect=["gpu", "dtype"])


def on(*engines):
    return pytest.mark.parametrize("gpu", engines, indirect=True)


# --- one product


@machines(
    in_turns(TRITON, cases(TRITON_SHAPES, 1, 5, 19), rest=TRITON_REST, label=str),
    # The same shapes with other tokens, strides and epilogues.
    in_turns(
        TRITON[1:] + TRITON[:1],
        [Case(s, (5, 19, 1)[i % 3], i + 11) for i, s in enumerate(TRITON_SHAPES)],
        rest=TRITON_REST,
        label=str,
    ),
    in_turns(TRITON_TWO, cases(LAYERS, 35, turn=1), rest=TRITON_TWO_REST, label=str),
    in_turns(
        EMULATED,
        [
            # Coprime steps: every number of tokens with every epilogue.
            *(
                Case(s, t, 7 * i + j)
                for i, s in enumerate(MIXED)
                for j, t in enumerate((1, 5, 19, 200))
            ),
        ],
        each=len(EMULATED),
        label=str,
    ),
    rotated(EMULATED, LAYERS, 3, 16, 45),
    in_turns(
        NVCC,
        [
            *cases(MIXED + SMALL_SQUARES, 1, 5, 19, 40),
            *cases([*PRESETS.values(), SUMS[1]], 35, turn=1),
            *(
                Case(PRESETS[f"21x {layer}"], n, n)
                for n in (1, 2, 7)
                for layer in ("attention", "up")
            ),
        ],
        rest=NVCC_REST,
        label=str,
    ),
    in_turns([], cases(SUMS[::2], 35, turn=1), rest=NVCC + NVCC_REST, label=str),
)
def test_forward(gpu, dtype, case):
    check_forward(case.s, case.tokens, dtype, gpu.backend, case.turn)


RANDOM = [("emulated", seed) for seed in range(40)]
RANDOM += slow((f"triton-{(80, 90, 120)[seed % 3]}", seed) for seed in range(40))


@pytest.mark.parametrize(("gpu", "seed"), RANDOM, indirect=["gpu"])
def test_random_products_and_their_gradients(seed, gpu, monkeypatch):
    """Any sides, ranks, tokens, dtypes and epilogues; in the emulator on GPUs of any size."""
    draws = random.Random(seed)
    s = KronShape(*(draws.choice([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 40, 72]) for _ in range(4)))
    s = s._replace(rank=draws.choice([1, 1, 2, 3, 9]))
    tokens = draws.choice([1, 2, 7, 33, 130])
    dtype = draws.choice([torch.float16, torch.bfloat16, torch.float32])
    dense = draws.choice([True, False])
    monkeypatch.setattr(configs.Geometry, "dense_gradient_pays", lambda *_: dense)
    if gpu.backend == "cuda":
        gpu.device(draws.choice([1, 2, 40]), draws.choice([101376, 232448]))
    x, a, b = draw(s, 1, dtype)
    if reason := BACKENDS[gpu.backend].why_not(x, a, b):
        with pytest.raises(ValueError, match=re.escape(reason)):
            kron_matmul(x, a, b, backend=gpu.backend)
        assert gpu.backend == "cuda" and "sides of 64" in reason and "mix" in reason
        return
    check_forward(s, tokens, dtype, gpu.backend, seed)
    check_gradients(s, tokens, dtype, gpu.backend)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same numbers at a storage offset of one, where 16 bytes cannot be read at once."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


UNALIGNED = [PRESETS["8x attention"], PRESETS["21x attention"], PRESETS["21x up"]]
UNALIGNED += [SHAPES[3], SHAPES[8]]


@pytest.mark.parametrize("operand", range(5), ids=["x", "a", "b", "bias", "residual"])
@pytest.mark.parametrize(
    ("gpu", "case"),
    [
        *in_turns([("emulated",)], cases(UNALIGNED, 3) + cases(UNALIGNED, 40), label=str),
        *in_turns([("nvcc-80",)], cases(UNALIGNED[1:3], 9), label=str),
    ],
    indirect=["gpu"],
)
def test_operands_that_are_not_aligned(operand, case, gpu):
    s, dtype = case.s, torch.float16
    operands = [*draw(s, case.tokens, dtype), torch.randn(s.out_features).to(dtype)]
    operands.append(torch.randn(case.tokens, s.out_features).to(dtype))
    operands[operand] = shifted(operands[operand])
    x, a, b, bias, residual = operands
    y = kron_matmul(x, a, b, bias=bias, residual=residual, backend=gpu.backend)
    expected = reference.kron_matmul(x, a, b, bias=bias, residual=residual)
    hold("y", y, expected, terms(s), dtype)


@pytest.mark.parametrize("operand", range(4), ids=["dy", "x", "a", "b"])
@pytest.mark.parametrize("case", cases(UNALIGNED, 3) + cases(UNALIGNED, 40), ids=str)
@on("emulated")
def test_gradients_of_operands_that_are_not_aligned(operand, case, gpu):
    s, tokens = case.s, case.tokens
    operands = [torch.randn(tokens, s.out_features).half(), *draw(s, tokens, torch.float16)]
    operands[operand] = shifted(operands[operand])
    dy, x, a, b = operands
    grads = cuda.kron_matmul_backward(dy, x, a, b, [True] * 3)
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    others = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())
    for grad, other in zip(grads, others, strict=True):
        hold("gradient", grad, other, tokens * (terms(s) + s.m1 + s.m2), torch.float16)


@pytest.mark.parametrize("s", [SHAPES[2], PRESETS["21x attention"]], ids=name)
@on("emulated")
def test_rows_that_are_not_contiguous(s, gpu):
    x, a, b = draw(s, 40, torch.float16)
    wide = torch.cat([x, x], 1)
    for rows in (wide[:, : s.in_features], x.T.contiguous().T, x[:1].expand(5, -1), x.flip(0)):
        y = kron_matmul(rows, a, b, backend=gpu.backend)
        hold("y", y, reference.kron_matmul(rows, a, b), terms(s), torch.float16)


@on("triton-80", "triton-90", "emulated")
def test_without_tokens_nothing_is_launched(gpu):
    backward = BACKENDS[gpu.backend].kron_matmul_backward
    for s in MIXED[:4]:
        x, a, b = draw(s, 0, torch.float16)
        with gpu.recorded() as launches:
            kron_matmul(x, a, b, backend=gpu.backend)
        assert not launches
        assert kron_matmul(x, a, b, backend=gpu.backend).shape == (0, s.out_features)
        with gpu.recorded() as launches:
            grads = backward(x.new_empty(0, s.out_features), x, a, b, [True] * 3)
        assert gpu.backend != "triton" or not launches
        for g, t in zip(grads, (x, a, b), strict=True):
            assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize(
    ("gpu", "case"),
    [
        *in_turns([("triton-80",), ("triton-90",)], cases(SHAPES, 5), label=str),
        *in_turns([("emulated",)], cases(SHAPES, 5) + cases(SHAPES, 40), label=str),
    ],
    indirect=["gpu"],
)
def test_a_nan_stays_in_its_token(case, gpu):
    x, a, b = draw(case.s, case.tokens, torch.float16)
    x[2] = torch.nan
    y = kron_matmul(x, a, b, backend=gpu.backend)
    assert y[2].isnan().all() and not y[[0, 1, *range(3, case.tokens)]].isnan().any()


THREE = [PRESETS["21x attention"], SHAPES[7]]


@machines(
    in_turns(TRITON_TWO, cases(THREE, 19), rest=TRITON_TWO_REST, label=str),
    in_turns(EMULATED[:1], cases(THREE, 2) + cases(THREE, 19), label=str),
    in_turns(NVCC, cases(THREE[:1], 19), rest=NVCC_REST, label=str),
)
def test_three_products_of_one_x_in_one_launch(case, dtype, gpu):
    with gpu.recorded() as launches:
        check_qkv(case.s, case.tokens, dtype, gpu.backend)
    assert len(launches) == 1


# --- gradients


@machines(
    in_turns(TRITON_FEW, cases(TRITON_SHAPES, 1, 21, 70), rest=TRITON_FEW_REST, label=str),
    # More tokens where that has one, and the kernel where it takes the dense way.
    in_turns(
        TRITON_FEW[1:] + TRITON_FEW[:1],
        [
            Case(s, (70, 1, 21)[i % 3], i + 2)
            for i, s in enumerate(TRITON_SHAPES)
            if i % 3 == 0 or i % 4 == 0
        ],
        rest=TRITON_FEW_REST,
        label=str,
    ),
    in_turns(TRITON_TWO, cases(PRESETS.values(), 35, turn=1), rest=TRITON_TWO_REST, label=str),
    rotated(EMULATED, MIXED, 1, 21, 170),
    rotated(EMULATED, PRESETS.values(), 45),
    in_turns(EMULATED, cases(SUMS, 45), label=str),
    in_turns(
        NVCC,
        cases(MIXED + SMALL_SQUARES, 70, 1, 21) + cases(PRESETS.values(), 35),
        rest=NVCC_REST,
        label=str,
    ),
    in_turns([], cases(SUMS, 35), rest=NVCC + NVCC_REST, label=str),
)
def test_gradients(case, dtype, gpu, monkeypatch):
    if case.s not in LAYERS:  # Triton's other way to the gradients, where it would not pay
        dense = case.turn % 4 == 0
        monkeypatch.setattr(configs.Geometry, "dense_gradient_pays", lambda *_: dense)
    check_gradients(case.s, case.tokens, dtype, gpu.backend)


@on("triton-80", "triton-90", "emulated")
def test_gradients_are_the_same_bits_every_time(gpu):
    backward = BACKENDS[gpu.backend].kron_matmul_backward
    s = SHAPES[3]
    x, a, b = draw(s, 150, torch.float16)
    dy = torch.randn(150, s.out_features).half()
    runs = []
    for seed in (1, 2):
        if hasattr(gpu, "seed"):
            gpu.seed(seed)  # another schedule of the threads
        runs.append(backward(dy, x, a, b, [True] * 3))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["dx", "da", "db"])
@pytest.mark.parametrize(
    ("gpu", "s"),
    [
        *in_turns([("triton-80",), ("triton-90",)], [SHAPES[2], SHAPES[5]]),
        *in_turns([("emulated",)], [SHAPES[2], SHAPES[5]]),
    ],
    indirect=["gpu"],
)
def test_only_the_needed_gradients_are_computed(s, needed, gpu):
    operands = draw(s, 30, torch.float32)
    for t, n in zip(operands, needed, strict=True):
        t.requires_grad_(bool(n))
    kron_matmul(*operands, backend=gpu.backend).sum().backward()
    assert [t.grad is not None for t in operands] == [bool(n) for n in needed]
    with gpu.recorded() as launches:
        BACKENDS[gpu.backend].kron_matmul_backward(
            torch.ones(30, s.out_features), *(t.detach() for t in operands), needed
        )
    if gpu.backend == "triton":
        assert len(launches) <= 1  # PyTorch computes the rest
    else:
        assert len(launches) == (1 if needed[0] else 2)  # a kernel, and the sum of its parts


@pytest.mark.parametrize("training", [False, True])
@on("triton-80", "triton-90", "emulated")
def test_the_compiler_keeps_the_kernels_in_one_graph(training, gpu):
    s = SHAPES[2]
    operands = [t.requires_grad_(training) for t in draw(s, 5, torch.float32)]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def call(*operands):
        return kron_matmul(*operands, activation="gelu", backend=gpu.backend)

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


class Block(NamedTuple):
    up: KronShape
    down: KronShape
    tokens: int
    turn: int  # chooses the activation and whether there is a bias
    meets: bool = True  # whether one kernel computes it

    @property
    def activation(self) -> str:
        _, *names = ACTIVATIONS
        return names[self.turn % len(names)]

    def __str__(self) -> str:
        return f"{name(self.up)}-{name(self.down)}-{self.activation}-{self.tokens}"


def blocks(pairs, tokens, turns) -> list[Block]:
    each = zip(pairs, cycle(tokens), cycle(turns))
    return [Block(*pair, t, turn) for pair, t, turn in each]


ODD = FEED_FORWARDS[1]  # three vectors: CUDA needs two launches
CUDA_BLOCKS = [
    FEED_FORWARDS[0],
    (KronShape(5, 2, 7, 9), KronShape(1, 5, 11, 7)),
    (KronShape(7, 1, 130, 72), KronShape(2, 7, 200, 130)),
    *PAIRS.values(),
]
GELU, RELU = 4, 2  # turns, both with a bias
# ReLU's gradient jumps at 0, where the rounding of tf32 decides: it has cases without tf32.
OTHERS = (3, 4, 5, 7, 8)
NOT_TF32 = [machine for machine in EMULATED if machine[1] != "tf32"]


@machines(
    in_turns(
        TRITON_FEW, blocks(FEED_FORWARDS, (1, 5, 19), OTHERS), rest=TRITON_FEW_REST, label=str
    ),
    in_turns(TRITON_FEW, [Block(*FEED_FORWARDS[2], 5, RELU)], label=str),
    in_turns(TRITON_TWO, blocks(PAIRS.values(), [35], [GELU]), rest=TRITON_TWO_REST, label=str),
    in_turns(EMULATED, blocks(CUDA_BLOCKS, (17, 33, 70), OTHERS), each=len(EMULATED), label=str),
    in_turns(NOT_TF32, [Block(*CUDA_BLOCKS[2], 70, RELU)], each=len(NOT_TF32), label=str),
    in_turns(
        NVCC,
        blocks(PAIRS.values(), [35], [GELU])
        + [Block(*ODD, t, turn, meets=False) for t, turn in ((1, 9), (5, 5), (19, 19))],
        rest=NVCC_REST,
        label=str,
    ),
)
def test_feed_forward_and_its_gradients(case, dtype, gpu):
    activation, bias = case.activation, bool(case.turn % 3)
    with gpu.recorded() as launches:
        check_feed_forward(*case[:3], dtype, activation, gpu.backend, bias, meets=case.meets)
    if case.meets:  # two products would have the right gradients, too
        assert any("feed_forward_backward" in name for name in launches)


@pytest.mark.parametrize(
    ("gpu", "up", "down"),
    [
        *(
            (gpu, KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4))
            for gpu in ("triton-80", "triton-90", "emulated")
        ),  # mixes on the right
        ("emulated", KronShape(4, 3, 12, 24), KronShape(3, 4, 24, 12)),  # three vectors
        ("emulated", KronShape(4, 2, 12, 24, 2), KronShape(2, 4, 24, 12, 2)),  # sums
    ],
    indirect=["gpu"],
)
def test_a_feed_forward_that_does_not_meet_takes_two_launches(up, down, gpu):
    x, a1, b1 = draw(up, 30, torch.float32)
    _, a2, b2 = draw(down, 5, torch.float32)
    layers = (a1, b1, None), (a2, b2, None)
    assert not BACKENDS[gpu.backend].fuses(*layers)
    with gpu.recorded() as launches:
        y = kron_feed_forward(x, *layers, backend=gpu.backend)
    assert len(launches) == 2
    hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
    hold("y", y, reference.kron_matmul(hidden, a2, b2), terms(up) + terms(down), torch.float32)
