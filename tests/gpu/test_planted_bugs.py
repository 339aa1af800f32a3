"""The checks of the CUDA C++ kernels, checked: bugs planted in them are found."""

import ctypes
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import emulator
import pytest
import torch
from simulator.cuda import KERNELS, CudaDevice, serving, why_not

from benchmarks.gpu.cases import draw
from kron_kernels import KronShape, kron_feed_forward, kron_matmul, reference
from kron_kernels.backends import cuda as backend
from kron_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=str(emulator.why_not()))
needs_nvcc = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

UP, DOWN = KronShape(4, 2, 64, 64), KronShape(2, 4, 64, 64)
DTYPE = torch.float16


def product(s: KronShape, tokens: int = 70) -> Callable[[], None]:
    """Several warps below one another in a block, and an odd tail."""
    x, a, b = draw(s, tokens, DTYPE)
    bias = torch.randn(s.out_features).to(DTYPE)
    expected = reference.kron_matmul(x, a, b, bias=bias)

    def run() -> None:
        y = kron_matmul(x, a, b, bias=bias, backend="cuda")
        assert_close("y", y, expected, s.rank * (s.n1 + s.n2))

    return run


def gradients(s: KronShape, tokens: int = 70) -> Callable[[], None]:
    x, a, b = draw(s, tokens, DTYPE)
    dy = torch.randn(tokens, s.out_features).to(DTYPE)
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide, dy.double())

    def run() -> None:
        grads = backend.kron_matmul_backward(dy, x, a, b, [True] * 3)
        for grad, other in zip(grads, expected, strict=True):
            assert_close("gradient", grad, other, tokens * (s.n1 + s.n2 + s.m1 + s.m2))

    return run


def block(backward: bool, tokens: int = 150) -> Callable[[], None]:
    x, a1, b1 = draw(UP, tokens, DTYPE)
    _, a2, b2 = draw(DOWN, 1, DTYPE)
    bias = torch.randn(UP.out_features).to(DTYPE)
    dy = torch.randn(tokens, DOWN.out_features).to(DTYPE)
    wide = [t.double().requires_grad_() for t in (x, a1, b1, bias, a2, b2)]
    hidden = reference.kron_matmul(*wide[:3], bias=wide[3], activation="gelu")
    y = reference.kron_matmul(hidden, *wide[4:])
    expected = torch.autograd.grad(y, wide, dy.double()) if backward else [y.detach()]
    up, down = (a1, b1, bias), (a2, b2, None)

    def run() -> None:
        if backward:
            got = backend.kron_feed_forward_backward(dy, x, up, "gelu", down, [True] * 6)
        else:
            got = [kron_feed_forward(x, up, down, backend="cuda")]
        for one, other in zip(got, expected, strict=True):
            assert_close("block", one, other, tokens * 400 if backward else 200)

    return run


CALLS = {
    "mix last": lambda: product(UP),
    "mix first": lambda: product(DOWN),
    "interleaved": lambda: product(KronShape(64, 48, 2, 4)),
    "sums": lambda: product(KronShape(4, 2, 200, 96, 2), 21),
    "few tokens": lambda: product(DOWN, 5),
    "gradients": lambda: gradients(UP),
    "gradients, mix first": lambda: gradients(DOWN),
    "block": lambda: block(backward=False),
    "block's gradients": lambda: block(backward=True),
}

# ---- in nvcc's PTX


Bug = tuple[str, str]  # a pattern in a line of PTX, and what becomes of it


def mutants(call: Callable[[], None], kernel: str, bug: Bug, most: int) -> Iterator[bool]:
    """Whether each is found: one place of those changed that are executed, and match."""
    # A single multiprocessor: launches are not divided into blocks of a single warp.
    with CudaDevice(80, multiprocessors=1) as gpu:
        call()
    launch = next(one for one in gpu.launches if one.name.startswith(f"kron_{kernel}_"))
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

        with CudaDevice(80, edit, multiprocessors=1, statistics=False):
            try:
                call()
            except (RuntimeError, AssertionError):
                yield True
            else:
                yield False


BARRIER = r"bar\.sync\s+0;", ""
WAIT = r"cp\.async\.wait_group\s+\d+;", ""
TRANSPOSITION = r"(ldmatrix\S*?)\.trans", r"\1"
LEFT = r"(mma\.sync\S*\s*\{[^}]*\},\s*\{)(%r\d+), *(%r\d+)", r"\1\3, \2"
RIGHT = r"(mma\.sync\S*\s*\{[^}]*\},\s*\{[^}]*\},\s*\{)(%r\d+), *(%r\d+)", r"\1\3, \2"

# Call, kernel, and how many barriers may be without effect:
# - the one after the mix is loaded, where the mix comes last: the product's come before its use;
# - the one before slabs become stages, where a block has one tile of columns only;
# - the one before the left operand is filled anew, where a block has one part of the tokens only,
#   and wherever that before it is.
BARRIERS = [
    ("mix last", "forward", 3),
    ("mix first", "forward", 2),
    ("interleaved", "forward", 2),
    ("sums", "forward", 2),
    ("few tokens", "few_tokens", 0),
    ("gradients", "mix_gradient", 3),
    ("gradients", "dot_gradient", 0),
    ("gradients", "sum_parts", 0),
    ("gradients", "forward", 2),
    ("gradients, mix first", "mix_gradient", 3),
    # The last one, after which the block ends.
    ("block", "feed_forward", 1),
    # Two follow one another: before the next part of the tokens, and before the sums are added up.
    ("block's gradients", "feed_forward_backward", 2),
]
TENSOR = [(call, kernel) for call, kernel, _ in BARRIERS if not kernel.startswith(("few", "sum"))]
TRANSPOSING = [
    ("gradients", "forward"),
    ("gradients", "dot_gradient"),
    ("gradients, mix first", "mix_gradient"),
    ("block's gradients", "feed_forward_backward"),
]
PLANTED = [
    *((call, kernel, "a barrier is dropped", BARRIER, 99, n) for call, kernel, n in BARRIERS),
    *((call, kernel, "a wait for copies is dropped", WAIT, 99, 0) for call, kernel in TENSOR),
    *((call, kernel, "left fragments are turned", LEFT, 2, 0) for call, kernel in TENSOR),
    *(
        (call, kernel, "a transposition is dropped", TRANSPOSITION, 2, 0)
        for call, kernel in TRANSPOSING
    ),
]
MORE = [
    *((call, kernel, "left fragments are turned", LEFT, 8, 0) for call, kernel in TENSOR),
    *((call, kernel, "right fragments are turned", RIGHT, 8, 0) for call, kernel in TENSOR),
    *(
        (call, kernel, "a transposition is dropped", TRANSPOSITION, 8, 0)
        for call, kernel in TRANSPOSING
    ),
]


@needs_nvcc
@pytest.mark.parametrize(
    ("call", "kernel", "bug", "most", "unseen"),
    [
        pytest.param(
            *(call, kernel, bug, most, unseen),
            id=f"{call}, {kernel}: {text}, {most} places at most",
            marks=marks,
        )
        for planted, marks in ((PLANTED, ()), (MORE, pytest.mark.slow))
        for call, kernel, text, bug, most, unseen in planted
    ],
)
def test_a_bug_planted_in_the_machine_code_is_found(call, kernel, bug, most, unseen):
    found = list(mutants(CALLS[call](), kernel, bug, most))
    assert found and found.count(False) <= unseen, f"{sum(found)} of {len(found)}"


# ---- in a launch


class Changed(CudaDevice):
    """A device that gets another number of tokens than the host meant."""

    def __init__(self, tokens: int, more: int):
        super().__init__(80, multiprocessors=1)
        self.tokens, self.more = tokens, more

    def launch(self, name, grid, threads, shared, arguments):
        words = memoryview(bytearray(arguments)).cast("q")
        for i, word in enumerate(words):
            if word == self.tokens:
                words[i] += self.more
        return super().launch(name, grid, threads, shared, bytes(words))


@needs_nvcc
@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize(
    ("call", "tokens"),
    [("mix last", 70), ("mix first", 70), ("sums", 21), ("gradients", 70), ("block", 150)],
)
def test_another_number_of_tokens_is_found(call, tokens, more):
    """A token too many is read or written beyond a tensor; one too few is left out."""
    call = CALLS[call]()
    with CudaDevice(80, multiprocessors=1):
        call()
    with Changed(tokens, more), pytest.raises((RuntimeError, AssertionError)):
        call()


# ---- in the sources: all at once, of which a variable chooses one. The emulator runs what the
# host's compiler makes of them, the simulator what nvcc does.

ODD = KronShape(5, 3, 44, 40)  # three vectors a token, which leave one row of 16 without any
BOTH, EMULATOR, SIMULATOR = ("emulator", "simulator"), ("emulator",), ("simulator",)
# A bug; the call that has it; who is to find it; the file; what is there; what becomes of it, where
# PLANTED says whether.
SOURCES = [
    (
        "copies are not waited for",
        *("mix first", BOTH, "product.h"),
        *("copies_wait<0>();", "if (!PLANTED) copies_wait<0>();"),
    ),
    (
        "a step is multiplied before all of it is there",
        *("mix first", BOTH, "product.h"),
        *("__syncthreads(); // the step", "if (!PLANTED) __syncthreads(); // the step"),
    ),
    (
        "the stages become slabs too early",
        *("mix first", BOTH, "product.h"),
        *("__syncthreads(); // the stages", "if (!PLANTED) __syncthreads(); // the stages"),
    ),
    (
        # In the simulator a warp's threads are in step.
        "a slab is read by lanes that did not wait for the others",
        *("mix last", EMULATOR, "forward.h"),
        *("__syncwarp();", "if (!PLANTED) __syncwarp();"),
    ),
    (
        # Without a sanitizer the host does not notice what is read or written beyond a tensor.
        "tokens are read that there are not",
        *("mix first", SIMULATOR, "left.h"),
        *("token < source.live", "(PLANTED || token < source.live)"),
    ),
    (
        "tokens are written that there are not",
        *("mix first", SIMULATOR, "forward.h"),
        *(
            "min(rows.tokens, live - before)",
            "PLANTED ? rows.tokens : min(rows.tokens, live - before)",
        ),
    ),
    (
        "columns are written that there are not",
        *("odd", SIMULATOR, "epilogue.h"),
        *(">= piece.columns", ">= piece.columns + (PLANTED ? 64 : 0)"),
    ),
    (
        "the mix is transposed",
        *("mix last", BOTH, "forward.h"),
        *("a.mix.output", "(PLANTED ? a.mix.input : a.mix.output)"),
    ),
    (
        "rows of no token count",
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
CALLS |= {
    "odd": lambda: product(ODD),
    "odd gradients": lambda: gradients(ODD, 300),
}
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
    digest = hashlib.sha256()
    for file in sorted(planted.parent.iterdir()):
        digest.update(file.read_bytes())
    first, *others = emulator.project()
    assert "-DKRON_MATH=float16" in first.flags
    flags = f"{first.flags} -DKRON_PLANTED=0x{digest.hexdigest()[:12]}"  # headers of its own
    return emulator.load((first._replace(source=planted, flags=flags), *others))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "call"),
    [
        pytest.param(number, call, id=text)
        for number, (text, call, who, *_) in enumerate(SOURCES, 1)
        if "emulator" in who
    ],
)
def test_a_bug_planted_in_the_sources_is_found_by_the_emulator(number, call, emulated):
    call, which = CALLS[call](), ctypes.c_int.in_dll(emulated.library, "kron_planted")
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
@pytest.mark.parametrize(
    ("number", "call"),
    [
        pytest.param(number, call, id=text)
        for number, (text, call, who, *_) in enumerate(SOURCES, 1)
        if "simulator" in who
    ],
)
def test_a_bug_planted_in_the_sources_is_found_by_the_simulator(number, call, planted):
    def edit(ptx: str) -> str:
        ptx, places = re.subn(r"(\.u32 kron_planted)( = \d+)?;", rf"\1 = {chosen};", ptx)
        assert places <= 1
        return ptx

    call, chosen = CALLS[call](), 0
    with CudaDevice(80, edit, source=planted) as gpu:
        call()
        assert any("kron_planted" in launch.asm["ptx"] for launch in gpu.launches)
        chosen = number
        with pytest.raises((RuntimeError, AssertionError)):
            call()
