"""The contenders of the layers' benchmark: dense, ours, plain PyTorch, and other libraries.

The extra ``bench`` installs the libraries, except FastKron, which would replace torch by a CUDA
build:

    pip install --no-deps pyfastkron

A contender takes ``x (T, n)`` and factors ``(m_i, n_i)``, does the preparation that a user does
once, and returns the call to time, whose result is a contiguous ``(T, m)``, or None where it does
not apply. ``forward``, ``training``, ``feed_forward``, ``equal_size`` and ``many_factors`` return
the calls by name, and a function that checks a result.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache, reduce
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_kernels import kron_feed_forward, kron_matmul
from kron_kernels.backends.eager import merge_small
from kron_kernels.reference import materialize
from kron_kernels.testing import assert_close

Call = Callable[[], Tensor]
Sides = list[tuple[int, int]]  # of the factors
LeftOut = dict[str, str]  # reasons by name
Calls = dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]
Problem = tuple[Calls, Callable[[str, Tensor | tuple[Tensor, ...]], None]]

DENSE_ENTRIES = 2**27  # a larger A ⊗ B, of 512 MB in float32, is not formed
TINY = 64  # entries of a factor that is applied entry by entry


# --- Plain PyTorch


def einsum(x: Tensor, *factors: Tensor) -> Tensor:
    """The definition in one line; in float64 it is the oracle of every measurement."""
    rows, columns = "abcdefgh"[: len(factors)], "ijklmnop"[: len(factors)]
    sides = ",".join(r + c for r, c in zip(rows, columns, strict=True))
    x = x.unflatten(1, [f.shape[1] for f in factors])
    return torch.einsum(f"t{columns},{sides}->t{rows}", x, *factors).flatten(1)


def matmul_per_axis(x: Tensor, *factors: Tensor) -> Tensor:
    y, done, left = x, len(x), x.shape[1]
    for f in factors:
        left //= f.shape[1]
        y = y.reshape(done, f.shape[1], left)
        y = y.squeeze(-1) @ f.mT if left == 1 else f @ y
        done *= f.shape[0]
    return y.reshape(len(x), -1)


def plain(x: Tensor, *factors: Tensor) -> dict[str, Call]:
    """Ways to write the product in PyTorch, by name."""
    calls = {
        "einsum": lambda: einsum(x, *factors),
        "matmul per axis": lambda: matmul_per_axis(x, *factors),
    }
    if len(factors) == 2:
        return calls | plain_of_two(x, *factors)
    merged = [f[0] for f in merge_small([f[None] for f in factors])]
    return calls | {"merged, matmul per axis": lambda: matmul_per_axis(x, *merged)}


def plain_of_two(x: Tensor, a: Tensor, b: Tensor) -> dict[str, Call]:
    """Of ``x (T, n1 n2)``, ``a (m1, n1)``, ``b (m2, n2)``."""
    (m1, n1), (m2, n2), t = a.shape, b.shape, len(x)
    x3 = x.view(t, n1, n2)

    def transposed_b_first() -> Tensor:
        z = (x.view(t * n1, n2) @ b.T).view(t, n1, m2).transpose(1, 2).reshape(t * m2, n1)
        return (z @ a.T).view(t, m2, m1).transpose(1, 2).reshape(t, -1)

    def transposed_a_first() -> Tensor:
        z = x3.transpose(1, 2).reshape(t * n2, n1) @ a.T
        return (z.view(t, n2, m1).transpose(1, 2).reshape(t * m1, n2) @ b.T).view(t, -1)

    def b_first() -> Tensor:
        z = (x.view(t * n1, n2) @ b.mT).view(t, n1, m2)
        return torch.bmm(a.expand(t, m1, n1), z).view(t, -1)

    def a_first() -> Tensor:
        z = torch.bmm(a.expand(t, m1, n1), x3)
        return (z.view(t * m1, n2) @ b.mT).view(t, -1)

    def slices_of_a() -> Tensor:
        rows = (x.view(t * n1, n2) @ b.T).view(t, n1, m2).unbind(1)
        y = x.new_empty(t, m1, m2)
        for i, out in enumerate(y.unbind(1)):
            torch.mul(rows[0], a[i, 0], out=out)
            for j in range(1, n1):
                out.addcmul_(rows[j], a[i, j])
        return y.view(t, -1)

    def slices_of_b() -> Tensor:
        columns = x3.unbind(2)
        mixed = (sum(b[p, q] * columns[q] for q in range(n2)) for p in range(m2))
        return torch.stack([z @ a.mT for z in mixed], 2).view(t, -1)

    forms = {
        "a @ (x @ bᵀ)": lambda: (a @ (x3 @ b.T)).view(t, -1),
        "(a @ x) @ bᵀ": lambda: ((a @ x3) @ b.T).reshape(t, -1),
        "transposed, b first": transposed_b_first,
        "transposed, a first": transposed_a_first,
        "bmm, b first": b_first,
        "bmm, a first": a_first,
    }
    if a.numel() <= TINY and not x.requires_grad:  # out= has no gradient
        forms["slices of a"] = slices_of_a
    if b.numel() <= TINY:
        forms["slices of b"] = slices_of_b
    return forms


# --- Libraries


def kron(x: Tensor, *factors: Tensor) -> Call | None:
    """Form the product on every call, as PEFT does."""
    if x.shape[1] * prod(f.shape[0] for f in factors) > DENSE_ENTRIES:
        return None
    return lambda: F.linear(x, reduce(torch.kron, factors))


def in_fastkron(x: Tensor) -> bool:
    """Whether FastKron has kernels for this call. Its backward is PyTorch's and is not timed."""
    return x.dtype in (torch.float32, torch.float64) and not x.requires_grad


def fastkron_rows(x: Tensor, *factors: Tensor) -> Call | None:
    """``X (F ⊗ G ⊗ …)``, for which the factors are stored transposed."""
    from pyfastkron import fastkrontorch

    if not in_fastkron(x):
        return None
    transposed = [f.mT.contiguous() for f in factors]
    return lambda: fastkrontorch.gemkm(x, transposed)


def fastkron_columns(x: Tensor, *factors: Tensor) -> Call | None:
    """``(F ⊗ G ⊗ …) X``: other kernels, many times faster where a side is tiny."""
    from pyfastkron import fastkrontorch

    if not in_fastkron(x):
        return None
    return lambda: fastkrontorch.gekmm(list(factors), x.mT).mT.contiguous()


def lycoris(x: Tensor, *factors: Tensor) -> Call | None:
    from lycoris.functional.lokr import kron_bypass

    if len(factors) != 2:
        return None
    a, b = factors
    return lambda: kron_bypass(x, a, None, None, b, None, None)


def linear_operator(x: Tensor, *factors: Tensor) -> Call:
    from linear_operator.operators import KroneckerProductLinearOperator

    weight = KroneckerProductLinearOperator(*factors)
    return lambda: (weight @ x.mT).mT.contiguous()


def cola(x: Tensor, *factors: Tensor) -> Call:
    from cola.ops import Dense, Kronecker

    weight = Kronecker(*map(Dense, factors))
    return lambda: (weight @ x.mT).mT.contiguous()


class Library(NamedTuple):
    package: str
    module: str
    prepare: dict[str, Callable[..., Call | None]]
    pip: str = "pip install"


LIBRARIES = [
    Library(
        "pyfastkron",
        "pyfastkron.fastkrontorch",
        {"fastkron: rows": fastkron_rows, "fastkron: columns": fastkron_columns},
        pip="pip install --no-deps",
    ),
    Library("lycoris-lora", "lycoris.functional.lokr", {"lycoris": lycoris}),
    Library("linear_operator", "linear_operator.operators", {"linear_operator": linear_operator}),
    Library("cola-ml", "cola.ops", {"cola": cola}),
]


def installed() -> tuple[list[Library], list[str]]:
    """The libraries that can be imported, and a line for each that cannot."""
    found, missing = [], []
    for library in LIBRARIES:
        try:
            importlib.import_module(library.module)
        except Exception as error:  # a broken installation may raise anything
            why = f"{first_line(error)}; {library.pip} {library.package}"
            missing.append(f"{library.package} skipped: {why}")
        else:
            found.append(library)
    return found, missing


def versions(libraries: list[Library]) -> dict[str, str]:
    return {lib.package: importlib.metadata.version(lib.package) for lib in libraries}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]


# --- Problems


def operands(sides: Sides, tokens: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x and factors of a product whose entries are of order 1."""
    factors = [(torch.randn(m, n) / n**0.5).to(dtype) for m, n in sides]
    return torch.randn(tokens, prod(n for _, n in sides)).to(dtype), factors


def contenders(
    x: Tensor, factors: list[Tensor], libraries: list[Library], left_out: LeftOut
) -> dict[str, Call]:
    """All except dense. The part of a name before a colon is a column of the table."""
    calls = {
        backend: lambda backend=backend: kron_matmul(x, *factors, backend=backend)
        for backend in ("auto", "eager", "native")
    }
    calls |= {f"torch: {name}": call for name, call in plain(x, *factors).items()}
    others = {"kron": kron}
    for library in libraries:
        others |= library.prepare
    for name, prepare in others.items():
        try:
            call = prepare(x, *factors)
        except Exception as error:
            left_out[name] = first_line(error)
        else:
            calls |= {} if call is None else {name: call}
    return calls


def forward(
    sides: Sides, tokens: int, dtype: torch.dtype, libraries: list[Library], left_out: LeftOut
) -> Problem:
    x, factors = operands(sides, tokens, dtype)
    calls = {}
    if prod(m * n for m, n in sides) <= DENSE_ENTRIES:
        weight = materialize(*factors)  # formed once: a dense layer would own it
        calls["dense"] = lambda: F.linear(x, weight)
    calls |= contenders(x, factors, libraries, left_out)
    if dtype != torch.float32:
        wide = [t.float() for t in (x, *factors)]
        calls["float32"] = lambda: kron_matmul(*wide)
    sample = torch.linspace(0, tokens - 1, min(tokens, 64)).long()

    def check(name: str, y: Tensor) -> None:
        assert len(y) == tokens, f"{len(y)} rows"
        expected = einsum(x[sample].double(), *(f.double() for f in factors))
        assert_close("y", y[sample], expected, x.shape[1])

    return calls, check


def peers_of_many(
    x: Tensor, factors: list[Tensor], libraries: list[Library], left_out: LeftOut
) -> Calls:
    """Ours, and what forms neither the product nor a part of it."""
    others = {"fastkron", "linear_operator", "cola"}
    names = {"auto", "torch: einsum", "torch: matmul per axis"}
    calls = contenders(x, factors, libraries, left_out)
    return {n: call for n, call in calls.items() if n in names or n.split(":")[0] in others}


def many_factors(
    sides: Sides, tokens: int, dtype: torch.dtype, libraries: list[Library], left_out: LeftOut
) -> Problem:
    """The oracle goes axis by axis: einsum may choose an order with huge intermediate results."""
    x, factors = operands(sides, tokens, dtype)
    sample = torch.linspace(0, tokens - 1, min(tokens, 16)).long()

    @cache
    def expected() -> Tensor:
        return matmul_per_axis(x[sample].double(), *(f.double() for f in factors))

    def check(name: str, y: Tensor) -> None:
        assert len(y) == tokens, f"{len(y)} rows"
        assert_close("y", y[sample], expected(), sum(n for _, n in sides), slack=16)

    return peers_of_many(x, factors, libraries, left_out), check


def many_factors_columns(
    sides: Sides, columns: int, dtype: torch.dtype, libraries: list[Library]
) -> Problem:
    """Vectors are columns of ``v (n, columns)``, as linear_operator and CoLA have them."""
    x, factors = operands(sides, columns, dtype)
    v = x.mT.contiguous()
    packages = {library.package for library in libraries}
    calls: Calls = {
        "auto": lambda: kron_matmul(v.mT, *factors).mT.contiguous(),
        "torch: matmul per axis": lambda: matmul_per_axis(v.mT, *factors).mT.contiguous(),
    }
    if "linear_operator" in packages:
        from linear_operator.operators import KroneckerProductLinearOperator

        weight = KroneckerProductLinearOperator(*factors)
        calls["linear_operator"] = lambda: weight.matmul(v)
    if "cola-ml" in packages:
        from cola.ops import Dense, Kronecker

        product = Kronecker(*map(Dense, factors))
        calls["cola"] = lambda: product @ v

    def check(name: str, y: Tensor) -> None:
        expected = matmul_per_axis(x[:16].double(), *(f.double() for f in factors))
        assert_close("y", y.mT[:16], expected, sum(n for _, n in sides), slack=16)

    return calls, check


def many_factors_training(
    sides: Sides, tokens: int, libraries: list[Library], left_out: LeftOut
) -> Problem:
    """y, and the gradients of ``sum(y * dy)`` by x and the factors."""
    x, factors = operands(sides, tokens, torch.float32)
    dy = torch.randn(tokens, prod(m for m, _ in sides))
    leaves = [t.requires_grad_() for t in (x, *factors)]
    calls = peers_of_many(x, factors, libraries, left_out)

    def step(name: str) -> tuple[Tensor, ...]:
        y = calls[name]()
        return y, *torch.autograd.grad(y, leaves, dy)

    @cache
    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_() for t in leaves]
        y = matmul_per_axis(*wide)
        return y.detach(), *torch.autograd.grad(y, wide, dy.double())

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        for i, (got, want) in enumerate(zip(result, expected(), strict=True)):
            terms = sum(m + n for m, n in sides) * (x.numel() if i > 1 else 1)
            assert_close(f"result {i}", got.detach(), want, terms, slack=16)

    return {name: lambda name=name: step(name) for name in calls}, check


def equal_size(sides: Sides, tokens: int) -> Problem:
    """Ours, dense, and another function: a low-rank product with no more parameters."""
    x, factors = operands(sides, tokens, torch.float32)
    weight = materialize(*factors)
    m, n = weight.shape
    rank = sum(f.numel() for f in factors) // (m + n)
    up, down = torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5
    calls: Calls = {
        "dense": lambda: F.linear(x, weight),
        "auto": lambda: kron_matmul(x, *factors),
        "low rank": lambda: F.linear(F.linear(x, down), up),
    }

    def check(name: str, y: Tensor) -> None:
        wide = up.double() @ down.double() if name == "low rank" else weight.double()
        assert_close("y", y, x.double() @ wide.T, n + rank)

    return calls, check


def training(sides: Sides, tokens: int, libraries: list[Library], left_out: LeftOut) -> Problem:
    """y, and the gradients of ``sum(y * dy)`` by x and the factors, or by x and W."""
    x, factors = operands(sides, tokens, torch.float32)
    weight = materialize(*factors)
    dy = torch.randn(tokens, len(weight))
    for t in (x, weight, *factors):
        t.requires_grad_()
    calls = {"dense": lambda: F.linear(x, weight), **contenders(x, factors, libraries, left_out)}
    leaves = {name: [x, *factors] for name in calls} | {"dense": [x, weight]}

    def step(name: str) -> tuple[Tensor, ...]:
        y = calls[name]()
        return y, *torch.autograd.grad(y, leaves[name], dy)

    def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, leaves, dy.double())

    @cache
    def expected(is_dense: bool) -> tuple[Tensor, ...]:
        wide, w, *fs = (t.detach().double().requires_grad_() for t in (x, weight, *factors))
        if is_dense:
            return gradients(F.linear(wide, w), wide, w)
        return gradients(einsum(wide, *fs), wide, *fs)

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        kinds = ("y", "dx", "dW") if name == "dense" else ("y", "dx", "da", "db")
        for kind, got, want in zip(kinds, result, expected(name == "dense"), strict=True):
            times = 1 if kind in ("y", "dx") else tokens
            assert_close(kind, got.detach(), want, max(weight.shape) * times)

    return {name: lambda name=name: step(name) for name in calls}, check


def feed_forward(up: Sides, down: Sides, tokens: int) -> Problem:
    """Linear, GELU, Linear, with biases."""
    x, (a1, b1) = operands(up, tokens, torch.float32)
    _, (a2, b2) = operands(down, tokens, torch.float32)
    w1, w2 = materialize(a1, b1), materialize(a2, b2)
    bias1, bias2 = torch.randn(len(w1)), torch.randn(len(w2))

    def dense(x: Tensor, w1: Tensor, bias1: Tensor, w2: Tensor, bias2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, bias1)), w2, bias2)

    def two_calls() -> Tensor:
        return kron_matmul(
            kron_matmul(x, a1, b1, bias=bias1, activation="gelu"), a2, b2, bias=bias2
        )

    calls = {"dense": lambda: dense(x, w1, bias1, w2, bias2), "two calls": two_calls}
    calls["feed_forward"] = lambda: kron_feed_forward(
        x, (a1, b1, bias1), (a2, b2, bias2), activation="gelu"
    )

    def check(name: str, y: Tensor) -> None:
        expected = dense(*(t.double() for t in (x, w1, bias1, w2, bias2)))
        assert_close("y", y, expected, len(w1) + len(w2))

    return calls, check
