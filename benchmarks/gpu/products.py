"""Checks of products and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.jobs import Place
from kron_kernels import dispatch, kron_matmul, reference
from kron_kernels.shapes import KronShape
from kron_kernels.testing.cases import FEED_FORWARDS, PAIRS, PRESETS, SHAPES
from kron_kernels.testing.checks import (
    arithmetic,
    check_forward,
    check_gradients,
    check_qkv,
    close,
    drawn,
    hold,
    layer,
    noise,
    oracle,
    require,
    same,
    terms,
    wide,
)


def forward(place: Place, s: KronShape, name: str, tokens: int, turn: int) -> None:
    with arithmetic(name) as dtype:
        drawn(place, s, 1, dtype)  # refused, if they are not served
        check_forward(s, tokens, dtype, place.engine, turn, place.device)


def numbers_of_tokens(place: Place) -> None:
    s, dtype = PRESETS["21x attention"], torch.float16
    if place.simulated:
        s = SHAPES[2]
    for tokens in (0, 1, 2, 3, 17) if place.simulated else (0, 1, 2, 3, 17, 33, 129, 1001, 8191):
        x, a, b = drawn(place, s, tokens, dtype)
        y = kron_matmul(x, a, b, backend=place.engine)
        hold(f"{tokens} tokens", y, oracle(x, a, b), terms(s), dtype)
        dy = torch.zeros_like(y)
        for g, t in zip(
            place.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3), (x, a, b), strict=True
        ):
            require(g.shape == t.shape and not g.any(), f"{tokens} tokens: gradient of zeros")


def strides(place: Place) -> None:
    """Operands that are not contiguous, or begin at an odd address."""
    s, dtype = SHAPES[2], torch.float16
    x, a, b = drawn(place, s, 6, dtype)
    residual, bias = noise(place, dtype, 6, s.out_features), noise(place, dtype, s.out_features)

    def odd(t: Tensor) -> Tensor:
        """At one entry behind a multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    forms = {
        "every second column of x": ({"x": torch.stack([x, x], 2)[..., 0]}, {}),
        "x by columns": ({"x": x.mT.contiguous().mT}, {}),
        "x at an odd address": ({"x": odd(x)}, {}),
        "factors at odd addresses": ({"a": odd(a), "b": odd(b)}, {}),
        "slices of factors": (
            {"a": torch.cat([a, a], 1)[:, : s.m1], "b": torch.cat([b, b], 2)[..., : s.n2]},
            {},
        ),
        "one row for all": ({"x": x[:1].expand(6, -1)}, {}),
        "bias and residual": (
            {},
            {"bias": bias[:1].expand(s.out_features), "residual": residual.mT.contiguous().mT},
        ),
        "both at odd addresses": ({}, {"bias": odd(bias), "residual": odd(residual)}),
    }
    for label, (changed, more) in forms.items():
        at = {"x": x, "a": a, "b": b} | changed
        y = kron_matmul(at["x"], at["a"], at["b"], **more, backend=place.engine)
        hold(label, y, oracle(at["x"], at["a"], at["b"], **more), terms(s), dtype)
    y = kron_matmul(x.view(2, 3, -1).transpose(0, 1), a, b, backend=place.engine)
    hold("three axes", y, oracle(x.view(2, 3, -1).transpose(0, 1), a, b), terms(s), dtype)


def nan_stays(place: Place) -> None:
    for s in SHAPES[1 : 2 if place.simulated else 4]:
        x, a, b = drawn(place, s, 5, torch.float16)
        x[2] = torch.nan
        y = kron_matmul(x, a, b, backend=place.engine)
        others = torch.cat([y[:2], y[3:]])
        require(y[2].isnan().all() and not others.isnan().any(), "a NaN left its token")


def dispatching(place: Place) -> None:
    """Who is taken, and what is refused by name."""
    x, a, b = drawn(place, SHAPES[2], 3, torch.float16)
    if not place.simulated:  # whose tensors are a CPU's
        order = dispatch._order(x, a, b)
        first = next(e for e in order if not dispatch.why_not(e, x, a, b))
        chosen = dispatch.choose("auto", x, (a, b))
        require(chosen == first, f"auto takes {chosen} and not {first}")
    try:
        kron_matmul(x.double(), a.double(), b.double(), backend=place.engine)
    except ValueError as error:
        require("float64" in str(error), str(error))
    else:
        raise AssertionError("float64 was not refused")
    y = kron_matmul(x.double(), a.double(), b.double())
    hold("float64 by another backend", y, oracle(x, a, b), terms(SHAPES[2]), torch.float64)


def beyond_32_bits(place: Place, s: KronShape, backward: bool = False) -> None:
    """More than 2^31 entries in y, or in x, seen at the first and last rows."""
    tokens = 2**31 // max(s.in_features, s.out_features) + 1000
    size = 2e-9 * tokens * (s.in_features + s.out_features)
    place.needs_memory((2.2 if backward else 1.2) * size + 1)
    _, a, b = drawn(place, s, 1, torch.float16)
    x = torch.randn(tokens, s.in_features, device=place.device, dtype=torch.float16)
    ends = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=place.device)
    y = kron_matmul(x, a, b, backend=place.engine)
    hold("y", y[ends], oracle(x[ends], a, b), terms(s), torch.float16)
    require(not y[-5000:].isnan().any() and not y[:5000].isnan().any(), "rows were not written")
    if not backward:
        return
    # Only the ends have gradients: those of the factors are the ends' as well.
    y.zero_()
    y[ends] = noise(place, torch.float16, 5, s.out_features)
    got = place.kernels.kron_matmul_backward(y, x, a, b, [True] * 3)
    some = wide((x[ends], a, b))
    expected = torch.autograd.grad(reference.kron_matmul(*some), some, y[ends].cpu().double())
    for label, g, other in zip(("dx", "da", "db"), (got[0][ends], *got[1:]), expected, strict=True):
        scale = other.square().mean().sqrt().item() + 1
        hold(label, g, other, 5 * (s.m1 + s.m2 + terms(s)), torch.float16, scale=scale)


def products_of_one_x(place: Place, s: KronShape, name: str) -> None:
    with arithmetic(name) as dtype:
        drawn(place, s, 1, dtype)
        check_qkv(s, 19, dtype, place.engine, place.device)


def gradients(place: Place, s: KronShape, name: str, tokens: int) -> None:
    with arithmetic(name) as dtype:
        drawn(place, s, 1, dtype)
        check_gradients(s, tokens, dtype, place.engine, place.device)


def gradients_that_are_needed(place: Place) -> None:
    for s in (SHAPES[2], SHAPES[5]):
        for needed in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            operands = drawn(place, s, 9, torch.float32)
            for t, n in zip(operands, needed, strict=True):
                t.requires_grad_(bool(n))
            kron_matmul(*operands, backend=place.engine).sum().backward()
            got = [t.grad is not None for t in operands]
            require(got == [bool(n) for n in needed], f"asked for {needed}, got {got}")


def same_bits(place: Place) -> None:
    """Forward, gradients and the feed-forward block, again and again."""
    small = place.simulated
    s, tokens = (SHAPES[3], 70) if small else (PRESETS["8x attention"], 5000)
    up, down = FEED_FORWARDS[0] if small else PAIRS["8x"]
    x, a, b = drawn(place, s, tokens, torch.float16)
    dy = noise(place, torch.float16, tokens, s.out_features)
    first, _, _ = drawn(place, up, tokens // 4, torch.float16)
    one, two = (layer(place, side, torch.float16) for side in (up, down))
    back = noise(place, torch.float16, tokens // 4, down.out_features)

    def run() -> list[Tensor]:
        return [
            kron_matmul(x, a, b, backend=place.engine),
            *place.kernels.kron_matmul_backward(dy, x, a, b, [True] * 3),
            place.kernels.kron_feed_forward(first, one, "gelu", two, None),
            *place.kernels.kron_feed_forward_backward(back, first, one, "gelu", two, [True] * 6),
        ]

    expected = run()
    for i in range(1 if small else 10):
        same(f"time {i + 2}", run(), expected)


def second_order(place: Place) -> None:
    x, a, b = (t.requires_grad_() for t in drawn(place, SHAPES[2], 3, torch.float32))

    def second(call: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(call(*operands).square().sum(), operands[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), operands)

    got = second(lambda *o: kron_matmul(*o, backend=place.engine), x, a, b)
    expected = second(reference.kron_matmul, *wide((x, a, b)))
    for label, g, other in zip("xab", got, expected, strict=True):
        close(label, g, other, 1e-4)


def transforms(place: Place) -> None:
    x, a, b = drawn(place, SHAPES[2], 3, torch.float32)
    xs = torch.stack([x, 2 * x])
    ys = torch.vmap(lambda v: kron_matmul(v, a, b, backend=place.engine))(xs)
    close("vmap", ys[1], oracle(2 * x, a, b), 1e-5)
    _, tangent = torch.func.jvp(
        lambda v: kron_matmul(v, a, b, backend=place.engine), (x,), (2 * x,)
    )
    close("jvp", tangent, oracle(2 * x, a, b), 1e-5)
    grad = torch.func.grad(lambda v: kron_matmul(v, a, b, backend=place.engine).sum())(x)
    close("grad", grad, oracle(torch.ones_like(ys[0]), a.mT, b.mT), 1e-5)


def autocast(place: Place, dtype: torch.dtype) -> None:
    s = SHAPES[2]
    x, a, b = (t.requires_grad_() for t in drawn(place, s, 9, torch.float32))
    with torch.autocast(place.device, dtype):
        y = kron_matmul(x, a, b, activation="gelu", backend=place.engine)
    hold("y", y, oracle(*(t.to(dtype) for t in (x, a, b)), activation="gelu"), terms(s), dtype)
    y.float().sum().backward()
    require(all(t.grad.dtype == torch.float32 for t in (x, a, b)), "gradients are not float32")
    exact = wide((x, a, b))
    reference.kron_matmul(*exact, activation="gelu").sum().backward()
    for label, t, other in zip("xab", (x, a, b), exact, strict=True):
        close(f"gradient of {label}", t.grad, other.grad, 16 * torch.finfo(dtype).eps)
