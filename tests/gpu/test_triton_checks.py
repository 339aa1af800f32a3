"""The checks of the Triton kernels, checked: bugs planted in them are found."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from kron_kernels import KronShape, kron_feed_forward, kron_matmul, reference
from kron_kernels.backends.triton import configs as triton_launch
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import draw

pytest.importorskip("triton")
from simulator import Device, SimulationError

from kron_kernels.backends.triton import forward as triton_forward

UP, DOWN = KronShape(4, 2, 32, 64), KronShape(2, 4, 64, 32)
SQUARE = KronShape(16, 16, 32, 32)
TOKENS = 21  # an odd tail


@pytest.fixture(autouse=True)
def _simulating(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton_launch, "simulating", True)
    # The kernel, whether or not a plain product would be cheaper.
    monkeypatch.setattr(triton_launch.Geometry, "dense_gradient_pays", lambda *_: False)


def product(s: KronShape) -> Callable[[], None]:
    x, a, b = draw(s, TOKENS, torch.float16)
    bias = torch.randn(s.out_features).half()
    expected = reference.kron_matmul(x, a, b, bias=bias)

    def run() -> None:
        y = kron_matmul(x, a, b, bias=bias, backend="triton")
        assert_close("y", y, expected, s.n1 + s.n2)

    return run


def factor_gradients(s: KronShape) -> Callable[[], None]:
    x, a, b = draw(s, TOKENS, torch.float16)
    dy = torch.randn(TOKENS, s.out_features).half()
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(reference.kron_matmul(*wide), wide[1:], dy.double())

    def run() -> None:
        grads = triton_gpu.factor_gradients(dy, x, a, b, True, True)
        for grad, other in zip(grads, expected, strict=True):
            assert_close("gradient", grad, other, TOKENS * (s.n1 + s.n2 + s.m1 + s.m2))

    return run


def feed_forward() -> Callable[[], None]:
    x, a1, b1 = draw(UP, TOKENS, torch.float16)
    _, a2, b2 = draw(DOWN, 1, torch.float16)
    hidden = reference.kron_matmul(x, a1, b1, activation="gelu")
    expected = reference.kron_matmul(hidden, a2, b2)

    def run() -> None:
        y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend="triton")
        assert_close("y", y, expected, 100)

    return run


CALLS = {
    "registers": lambda: product(UP),
    "mix first": lambda: product(DOWN),
    "tensor cores": lambda: product(SQUARE),
    "pipelined": lambda: product(KronShape(4, 2, 32, 256)),
    "gradients of a mix": lambda: factor_gradients(UP),
    "gradients": lambda: factor_gradients(SQUARE),
    "block": feed_forward,
}


def mutants(call: Callable[[], None], arch: int, pattern: str, new: str) -> Iterator[bool]:
    """Whether each is found: the kernel's PTX with one place changed that matches the pattern."""
    with Device(arch) as gpu:
        call()
    places = len(re.findall(pattern, gpu.launches[0].asm["ptx"], re.M))
    for i in range(places):

        def edit(ptx: str, i: int = i) -> str:
            seen = iter(range(places))
            return re.sub(
                pattern, lambda m: m.expand(new) if next(seen) == i else m[0], ptx, flags=re.M
            )

        with Device(arch, edit=edit):
            try:
                call()
            except (SimulationError, AssertionError):
                yield True
            else:
                yield False


BARRIER = r"^\s*bar\.sync\s+0;", ""
WAIT = r"cp\.async\.wait_group\s+(0x0|0|1|2);", "cp.async.wait_group 9;"
MASK = r"@%p\d+ (st\.global)", r"\1"
TRANSPOSITION = r"(ldmatrix\S*?)\.trans", r"\1"
FRAGMENT = r"(mma\.sync\S*\s*\{[^}]*\},\s*\{ )(%r\d+), (%r\d+)", r"\1\3, \2"

# Kernel, bug, and in how many places at most it may be without effect.
PLANTED = [
    # A barrier that a later one makes unnecessary.
    *((kernel, "a barrier is dropped", BARRIER, 1) for kernel in CALLS),
    # Copies of one step are waited for together: of their waits the last counts.
    ("pipelined", "a wait for copies is dropped", WAIT, 4),
    ("registers", "the mask of a store is dropped", MASK, 0),
    ("mix first", "the mask of a store is dropped", MASK, 0),
    ("tensor cores", "a transposition is dropped", TRANSPOSITION, 0),
    ("gradients", "a transposition is dropped", TRANSPOSITION, 0),
    *((kernel, "fragments are swapped", FRAGMENT, 0) for kernel in CALLS if "mix" not in kernel),
]


@pytest.mark.parametrize(
    ("kernel", "bug", "unseen"),
    [pytest.param(kernel, bug, n, id=f"{kernel}: {text}") for kernel, text, bug, n in PLANTED],
)
def test_a_bug_planted_in_the_machine_code_is_found(kernel, bug, unseen):
    found = list(mutants(CALLS[kernel](), 80, *bug))
    assert found and found.count(False) <= unseen, f"{sum(found)} of {len(found)}"


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
def test_a_bug_planted_in_a_launch_is_found(kernel, bug, monkeypatch):
    launch = triton_forward.kron_matmul_kernel

    class Planted:
        def __getitem__(self, grid):
            def run(*arguments, **constants):
                arguments = list(arguments)
                bug(arguments, constants)
                launch[grid](*arguments, **constants)

            return run

    call = CALLS[kernel]()
    with Device(80):
        call()
        monkeypatch.setattr(triton_forward, "kron_matmul_kernel", Planted())
        with pytest.raises((SimulationError, AssertionError)):
            call()
