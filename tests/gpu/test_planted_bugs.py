"""The checks themselves, checked: bugs planted in the kernels of every engine are found."""

import ctypes
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import emulator
import pytest
import torch
from compiling import digest
from machines import needs_triton
from simulator import SimulationError
from simulator.cuda import KERNELS, CudaDevice, serving, why_not

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, reference
from kron_kernels.backends import BACKENDS
from kron_kernels.backends.triton import configs
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import draw

needs_emulator = pytest.mark.skipif(bool(emulator.why_not()), reason=str(emulator.why_not()))
no_nvcc = emulator.why_not() or why_not()
needs_nvcc = pytest.mark.skipif(bool(no_nvcc), reason=str(no_nvcc))

DTYPE = torch.float16
FINDINGS = SimulationError, RuntimeError, AssertionError
Call = Callable[[], None]


@pytest.fixture(autouse=True)
def _triton_computes_gradients_with_its_kernel(monkeypatch):
    monkeypatch.setattr(configs.Geometry, "dense_gradient_pays", lambda *_: False)


# --- calls that check their results


def product(backend: str, s: KronShape, tokens: int) -> Call:
    x, a, b = draw(s, tokens, DTYPE)
    bias = torch.randn(s.out_features).to(DTYPE)
    expected = reference.kron_matmul(x, a, b, bias=bias)

    def run() -> None:
        y = kron_matmul(x, a, b, bias=bias, backend=backend)
        assert_close("y", y, expected, s.rank * (s.n1 + s.n2))

    return run


def gradients(backend: str, s: KronShape, tokens: int, needed=(True, True, True)) -> Call:
    x, a, b = draw(s, tokens, DTYPE)
    dy = torch.randn(tokens, s.out_features).to(DTYPE)
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())

    def run() -> None:
        grads = BACKENDS[backend].kron_matmul_backward(dy, x, a, b, needed)
        for grad, other, wanted in zip(grads, expected, needed, strict=True):
            if wanted:
                assert_close("gradient", grad, other, tokens * (s.n1 + s.n2 + s.m1 + s.m2))

    return run


def block(backend: str, up: KronShape, down: KronShape, tokens: int, backward=False) -> Call:
    x, a1, b1 = draw(up, tokens, DTYPE)
    _, a2, b2 = draw(down, 1, DTYPE)
    bias = torch.randn(up.out_features).to(DTYPE)
    dy = torch.randn(tokens, down.out_features).to(DTYPE)
    wide = [t.double().requires_grad_() for t in (x, a1, b1, bias, a2, b2)]
    hidden = reference.kron_matmul(*wide[:3], bias=wide[3], activation="gelu")
    y = reference.kron_matmul(hidden, *wide[4:])
    expected = torch.autograd.grad(y, wide, dy.double()) if backward else [y.detach()]
    layers = (a1, b1, bias), (a2, b2, None)

    def run() -> None:
        if backward:
            backward_of = BACKENDS[backend].kron_feed_forward_backward
            got = backward_of(dy, x, layers[0], "gelu", layers[1], [True] * 6)
        else:
            got = [kron_feed_forward(x, *layers, backend=backend)]
        for one, other in zip(got, expected, strict=True):
            assert_close("block", one, other, tokens * 400 if backward else 100)

    return run


# Triton: an odd tail of tokens in small factors.
T_UP, T_DOWN = KronShape(4, 2, 32, 64), KronShape(2, 4, 64, 32)
SQUARE = KronShape(16, 16, 32, 32)
# CUDA: several warps below one another in a block, and an odd tail.
UP, DOWN = KronShape(4, 2, 64, 64), KronShape(2, 4, 64, 64)
ODD = KronShape(5, 3, 44, 40)  # three vectors a token, which leave one row of 16 without any
CALLS = {
    "triton": {
        "registers": lambda: product("triton", T_UP, 21),
        "mix first": lambda: product("triton", T_DOWN, 21),
        "tensor cores": lambda: product("triton", SQUARE, 21),
        "pipelined": lambda: product("triton", KronShape(4, 2, 32, 256), 21),
        "gradients of a mix": lambda: gradients("triton", T_UP, 21, (False, True, True)),
        "gradients": lambda: gradients("triton", SQUARE, 21, (False, True, True)),
        "block": lambda: block("triton", T_UP, T_DOWN, 21),
    },
    "cuda": {
        "mix last": lambda: product("cuda", UP, 70),
        "mix first": lambda: product("cuda", DOWN, 70),
        "interleaved": lambda: product("cuda", KronShape(64, 48, 2, 4), 70),
        "sums": lambda: product("cuda", KronShape(4, 2, 200, 96, 2), 21),
        "few tokens": lambda: product("cuda", DOWN, 5),
        "gradients": lambda: gradients("cuda", UP, 70),
        "gradients, mix first": lambda: gradients("cuda", DOWN, 70),
        "block": lambda: block("cuda", UP, DOWN, 150),
        "block's gradients": lambda: block("cuda", UP, DOWN, 150, backward=True),
        "odd": lambda: product("cuda", ODD, 70),
        "odd gradients": lambda: gradients("cuda", ODD, 300),
    },
}


def device(backend: str, edit: Callable[[str], str] | None = None):
    if backend == "cuda":
        # One multiprocessor: launches are not divided into blocks of a single warp.
        return CudaDevice(80, edit, multiprocessors=1, statistics=False)
    needs_triton()
    from simulator import Device

    return Device(80, edit=edit, statistics=False)


# --- in the machine code


Bug = tuple[str, str]  # a pattern in a line of PTX, and its replacement


def mutants(backend: str, call: Call, kernel: str, bug: Bug, most: int) -> Iterator[bool]:
    """Whether each mutant is found: one executed line that matches the pattern is changed."""
    with device(backend) as gpu:
        call()
    launch = next(one for one in gpu.launches if one.name.startswith(kernel))
    lines = launch.asm["ptx"].split("\n")
    places = [
        i for i in sorted(launch.lines) if launch.lines[i] and re.search(bug[0], lines[i - 1])
    ]
    for place in places[:: -(-len(places) // most)]:

        def edit(ptx: str, place: int = place) -> str:
            lines = ptx.split("\n")
            if f".entry {launch.name}(" in ptx:
                lines[place - 1] = re.sub(*bug, lines[place - 1], count=1)
            return "\n".join(lines)

        with device(backend, edit):
            try:
                call()
            except FINDINGS:
                yield True
            else:
                yield False


BARRIER = r"bar\.sync\s+0;", ""
WAIT = r"cp\.async\.wait_group\s+\w+;", ""
MASK = r"@%p\d+ (st\.global)", r"\1"
TRANSPOSITION = r"(ldmatrix\S*?)\.trans", r"\1"
LEFT = r"(mma\.sync\S*\s*\{[^}]*\},\s*\{ *)(%r\d+), *(%r\d+)", r"\1\3, \2"
RIGHT = r"(mma\.sync\S*\s*\{[^}]*\},\s*\{[^}]*\},\s*\{ *)(%r\d+), *(%r\d+)", r"\1\3, \2"

TRITONS = list(CALLS["triton"])
# Call, kernel, and how many barriers may be redundant:
# - the one after the mix is loaded, if the mix comes last: the product's barriers precede its use;
# - the one before slabs become stages, if a block has only one tile of columns;
# - the one before the left operand is filled again, if a block has only one part of the tokens, or
#   for any further one.
BARRIERS = [
    ("mix last", "kron_forward", 3),
    ("mix first", "kron_forward", 2),
    ("interleaved", "kron_forward", 2),
    ("sums", "kron_forward", 2),
    ("few tokens", "kron_few_tokens", 0),
    ("gradients", "kron_mix_gradient", 3),
    ("gradients", "kron_dot_gradient", 0),
    ("gradients", "kron_sum_parts", 0),
    ("gradients", "kron_forward", 2),
    ("gradients, mix first", "kron_mix_gradient", 3),
    # The last one, after which the block ends.
    ("block", "kron_feed_forward", 1),
    # Two in succession: before the next part of the tokens, and before the sums are added up.
    ("block's gradients", "kron_feed_forward_backward", 2),
]
TENSOR = [
    (call, kernel) for call, kernel, n in BARRIERS if "few" not in kernel and "sum" not in kernel
]
TRANSPOSING = [
    ("gradients", "kron_forward"),
    ("gradients", "kron_dot_gradient"),
    ("gradients, mix first", "kron_mix_gradient"),
    ("block's gradients", "kron_feed_forward_backward"),
]
# Backend, call, kernel, bug, and how many mutants at most may have no effect.
PLANTED = [
    # A later barrier may make one redundant.
    *(("triton", call, "", "a barrier is dropped", BARRIER, 1) for call in TRITONS),
    # Triton waits for all copies of a step: only the last of these waits matters.
    ("triton", "pipelined", "", "a wait for copies is dropped", WAIT, 4),
    ("triton", "registers", "", "the mask of a store is dropped", MASK, 0),
    ("triton", "mix first", "", "the mask of a store is dropped", MASK, 0),
    ("triton", "tensor cores", "", "a transposition is dropped", TRANSPOSITION, 0),
    ("triton", "gradients", "", "a transposition is dropped", TRANSPOSITION, 0),
    *(
        ("triton", call, "", "left fragments are swapped", LEFT, 0)
        for call in TRITONS
        if "mix" not in call
    ),
    *(("cuda", call, kernel, "a barrier is dropped", BARRIER, n) for call, kernel, n in BARRIERS),
    *(("cuda", *one, "a wait for copies is dropped", WAIT, 0) for one in TENSOR),
]
# At a few places by default, and at more with -m slow.
SAMPLED = [
    *(("cuda", *one, "left fragments are swapped", LEFT, 0) for one in TENSOR),
    *(("cuda", *one, "a transposition is dropped", TRANSPOSITION, 0) for one in TRANSPOSING),
]
SLOW = [*SAMPLED, *(("cuda", *one, "right fragments are swapped", RIGHT, 0) for one in TENSOR)]


@pytest.mark.parametrize(
    ("backend", "call", "kernel", "bug", "unseen", "most"),
    [
        pytest.param(
            *(backend, call, kernel, bug, unseen, most + unseen),
            id=f"{backend}, {call} {kernel}: {text}, {most + unseen} places at most",
            marks=[*marks, *([needs_nvcc] if backend == "cuda" else [])],
        )
        for planted, most, marks in (
            (PLANTED, 3, []),
            (PLANTED, 99, [pytest.mark.slow]),
            (SAMPLED, 2, []),
            (SLOW, 8, [pytest.mark.slow]),
        )
        for backend, call, kernel, text, bug, unseen in planted
    ],
)
def test_a_bug_planted_in_the_machine_code_is_found(backend, call, kernel, bug, unseen, most):
    found = list(mutants(backend, CALLS[backend][call](), kernel, bug, most))
    assert found and found.count(False) <= unseen, f"{sum(found)} of {len(found)}"


# --- in a launch


def one_token_more(arguments, constants):
    arguments[6] += 1


def factor_transposed(arguments, constants):
    arguments[11], arguments[12] = arguments[12], arguments[11]


def one_column_less(arguments, constants):
    constants["K"] -= 1


def other_activation(arguments, constants):
    constants["ACTIVATION"] = "gelu"


def other_side(arguments, constants):
    constants["INNER"] = not constants["INNER"]


@pytest.mark.parametrize(
    "bug", [one_token_more, factor_transposed, one_column_less, other_activation, other_side]
)
@pytest.mark.parametrize("kernel", ["registers", "mix first"])
def test_a_bug_planted_in_a_launch_of_triton_is_found(kernel, bug, monkeypatch):
    call = CALLS["triton"][kernel]()
    with device("triton"):
        from kron_kernels.backends.triton import forward

        launch = forward.kron_matmul_kernel

        class Planted:
            def __getitem__(self, grid):
                def run(*arguments, **constants):
                    arguments = list(arguments)
                    bug(arguments, constants)
                    launch[grid](*arguments, **constants)

                return run

        call()
        monkeypatch.setattr(forward, "kron_matmul_kernel", Planted())
        with pytest.raises(FINDINGS):
            call()


class Changed(CudaDevice):
    """A device whose kernels get another number of tokens than the host passed."""

    def __init__(self, tokens: int, extra: int):
        super().__init__(80, multiprocessors=1)
        self.tokens, self.extra = tokens, extra

    def launch(self, name, grid, threads, shared, arguments):
        words = memoryview(bytearray(arguments)).cast("q")
        for i, word in enumerate(words):
            if word == self.tokens:
                words[i] += self.extra
        return super().launch(name, grid, threads, shared, bytes(words))


@needs_nvcc
@pytest.mark.parametrize("extra", [1, -1])
@pytest.mark.parametrize(
    ("call", "tokens"),
    [("mix last", 70), ("mix first", 70), ("sums", 21), ("gradients", 70), ("block", 150)],
)
def test_another_number_of_tokens_is_found(call, tokens, extra):
    """One token too many is accessed beyond a tensor; with one too few, results are missing."""
    call = CALLS["cuda"][call]()
    with device("cuda"):
        call()
    with Changed(tokens, extra), pytest.raises(FINDINGS):
        call()


# --- in the sources: all bugs at once, one of which a variable enables. The emulator runs the host
# compiler's output, the simulator nvcc's.

BOTH, EMULATOR, SIMULATOR = ("emulator", "simulator"), ("emulator",), ("simulator",)
# A bug, the call that has it, the tools that must find it, the file, the text and its replacement,
# in which PLANTED is the condition.
SOURCES = [
    (
        "copies are not waited for",
        *("mix first", BOTH, "product.h"),
        *("copies_wait<0>();", "if (!PLANTED) copies_wait<0>();"),
    ),
    (
        "a step is multiplied before it is complete",
        *("mix first", BOTH, "product.h"),
        *("__syncthreads(); // the step", "if (!PLANTED) __syncthreads(); // the step"),
    ),
    (
        "the stages become slabs too early",
        *("mix first", BOTH, "product.h"),
        *("__syncthreads(); // the stages", "if (!PLANTED) __syncthreads(); // the stages"),
    ),
    (
        # The simulator runs a warp's threads in step.
        "lanes read a slab without waiting for the others",
        *("mix last", EMULATOR, "forward.h"),
        *("__syncwarp();", "if (!PLANTED) __syncwarp();"),
    ),
    (
        # Without a sanitizer the host does not notice accesses beyond a tensor.
        "tokens beyond the end are read",
        *("mix first", SIMULATOR, "left.h"),
        *("token < source.live", "(PLANTED || token < source.live)"),
    ),
    (
        "tokens beyond the end are written",
        *("mix first", SIMULATOR, "forward.h"),
        *(
            "min(rows.tokens, live - before)",
            "PLANTED ? rows.tokens : min(rows.tokens, live - before)",
        ),
    ),
    (
        "columns beyond the end are written",
        *("odd", SIMULATOR, "epilogue.h"),
        *(">= piece.columns", ">= piece.columns + (PLANTED ? 64 : 0)"),
    ),
    (
        "the mix is transposed",
        *("mix last", BOTH, "forward.h"),
        *("a.mix.output", "(PLANTED ? a.mix.input : a.mix.output)"),
    ),
    (
        "rows of no token are summed",
        *("odd gradients", BOTH, "gradient.h"),
        *("if (rows.spare)", "if (rows.spare && !PLANTED)"),
    ),
    (
        "the last part is not summed",
        *("odd gradients", BOTH, "gradient.h"),
        *("part < a.shares", "part + PLANTED < a.shares"),
    ),
    (
        "the activation's slope is left out",
        *("block's gradients", BOTH, "feed_forward.h"),
        *("sum * slope", "sum * (PLANTED ? 1.f : slope)"),
    ),
]
VARIABLE = """
#if defined(KRON_EMULATED)
__attribute__((visibility("default"))) inline int kron_planted = 0;
#else
__device__ int kron_planted = 0;
#endif
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A copy of the sources with all bugs."""
    csrc = tmp_path_factory.mktemp("planted") / "csrc"
    shutil.copytree(KERNELS.parents[1], csrc, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    for number, (text, _, _, file, old, new) in enumerate(SOURCES, 1):
        path = csrc / "cuda" / file
        source = path.read_text()
        assert old in source, f"{text}: {file} has changed"
        path.write_text(source.replace(old, new.replace("PLANTED", f"(kron_planted == {number})")))
    arguments = csrc / "cuda" / "arguments.h"
    arguments.write_text(arguments.read_text() + VARIABLE)
    return csrc / "cuda" / "kernels.cu"


@pytest.fixture(scope="module")
def emulated(planted) -> emulator.Emulator:
    """The module with the planted kernels for float16."""
    first, *others = emulator.project()
    assert "-DKRON_MATH=float16" in first.flags
    contents = digest([], sorted(planted.parent.iterdir()))  # its headers differ
    flags = f"{first.flags} -DKRON_PLANTED=0x{contents[:12]}"
    return emulator.load((first._replace(source=planted, flags=flags), *others))


def bugs_for(finder: str):
    return pytest.mark.parametrize(
        ("number", "call"),
        [
            pytest.param(number, call, id=text)
            for number, (text, call, finders, *_) in enumerate(SOURCES, 1)
            if finder in finders
        ],
    )


@pytest.mark.slow
@needs_emulator
@bugs_for("emulator")
def test_a_bug_planted_in_the_sources_is_found_by_the_emulator(number, call, emulated):
    call, which = CALLS["cuda"][call](), ctypes.c_int.in_dll(emulated.library, "kron_planted")
    with serving(emulated):
        call()
        which.value = number
        try:
            with pytest.raises((RuntimeError, AssertionError)):
                for seed in range(8):  # orders of the threads
                    emulated.seed(seed)
                    call()
        finally:
            which.value = 0
            emulated.seed(0)


@pytest.mark.slow
@needs_nvcc
@bugs_for("simulator")
def test_a_bug_planted_in_the_sources_is_found_by_the_simulator(number, call, planted):
    def edit(ptx: str) -> str:
        ptx, places = re.subn(r"(\.u32 kron_planted)( = \d+)?;", rf"\1 = {chosen};", ptx)
        assert places <= 1
        return ptx

    call, chosen = CALLS["cuda"][call](), 0
    with CudaDevice(80, edit, source=planted) as gpu:
        call()
        assert any("kron_planted" in launch.asm["ptx"] for launch in gpu.launches)
        chosen = number
        with pytest.raises((RuntimeError, AssertionError)):
            call()
