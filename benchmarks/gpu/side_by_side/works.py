"""What is compared: products, feed-forward blocks, three products of one x; and their oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = 65536
SIMULATED = (64, 128)  # tokens; the second where programs share them
SHAPES = ["384x384 2x2", "384x48 2x16", "16x2 192x384", "2x16 384x192", "8x2 384x384"]
SHAPES += ["2x8 384x384", "32x32 24x24", "64x64 12x12", "16x16 48x48"]
BF16 = ["384x384 2x2", "32x32 24x24"]
LABELS = {
    "384x384 2x2": "8x attention",
    "384x48 2x16": "21x attention",
    "8x2 384x384": "8x up",
    "2x8 384x384": "8x down",
    "16x2 192x384": "21x up",
    "2x16 384x192": "21x down",
    "8x2 384x384 2x8 384x384": "8x block",
    "16x2 192x384 2x16 384x192": "21x block",
    "3 x 384x384 2x2": "8x qkv",
    "3 x 384x48 2x16": "21x qkv",
}
FEW = (1, 16)  # tokens
_UNITS_OF_ERROR = 4  # a rounding of the result, one between the products, and the sums' own


@dataclass(frozen=True)
class Case:
    """``A (m1, n1) ⊗ B (m2, n2)``."""

    m1: int
    n1: int
    m2: int
    n2: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: str, dtype: torch.dtype) -> Case:
        a, b = (tuple(map(int, sides.split("x"))) for sides in shape.split())
        return cls(*a, *b, dtype)

    def __str__(self) -> str:
        return f"{self.m1}x{self.n1} {self.m2}x{self.n2} {str(self.dtype)[6:]}"

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """As LyCORIS names them: w1 (a, b), w2 (c, d)."""
        return self.m1, self.n1, self.m2, self.n2

    def operands(self, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy, x, a and b, of which products have entries of order 1."""
        draw = drawing(self.dtype, device)
        dy = draw(tokens, self.m1 * self.m2)
        x = draw(tokens, self.n1 * self.n2)
        return dy, x, draw(self.m1, self.n1, self.n1), draw(self.m2, self.n2, self.n2)


def drawing(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """Draws tensors, of which so many terms are summed; ``meta`` and ``empty`` ones have no values.

    Memory of an empty one that nobody touches is not there.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        if device in ("meta", "empty"):
            where = "cpu" if device == "empty" else "meta"
            return torch.empty(sizes[:2], dtype=dtype, device=where)
        *shape, terms = sizes if len(sizes) == 3 else (*sizes, 1)
        return (torch.randn(shape, generator=generator) / terms**0.5).to(dtype)

    return draw


@dataclass(frozen=True)
class FeedForward:
    """Two layers that meet, with biases."""

    up: Case
    down: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    def __str__(self) -> str:
        up, down = (str(layer).rsplit(" ", 1)[0] for layer in (self.up, self.down))
        return f"{up} {down} {str(self.dtype)[6:]}"

    def operands(self, tokens: int, device: str) -> tuple[Tensor, ...]:
        """dy, x, and a, b and bias of either layer."""
        draw, up, down = drawing(self.dtype, device), self.up, self.down
        layers = [
            layer
            for c in (up, down)
            for layer in (draw(c.m1, c.n1, c.n1), draw(c.m2, c.n2, c.n2), draw(1, c.m1 * c.m2)[0])
        ]
        return draw(tokens, down.m1 * down.m2), draw(tokens, up.n1 * up.n2), *layers


@dataclass(frozen=True)
class Three:
    """Three products of one x, with biases."""

    layer: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    def __str__(self) -> str:
        return f"3 x {self.layer}"

    def operands(self, tokens: int, device: str) -> tuple[Tensor, ...]:
        """x, and a, b and bias of each."""
        draw, c = drawing(self.dtype, device), self.layer
        layers = [
            layer
            for _ in range(3)
            for layer in (draw(c.m1, c.n1, c.n1), draw(c.m2, c.n2, c.n2), draw(1, c.m1 * c.m2)[0])
        ]
        return draw(tokens, c.n1 * c.n2), *layers


Work = Case | FeedForward | Three
Call = Callable[..., Any]  # of the operands


def layers_of(work: Work) -> list[Case]:
    if isinstance(work, Case):
        return [work]
    return [work.layer] * 3 if isinstance(work, Three) else [work.up, work.down]


def our_call(engine: Any, work: Work, direction: str) -> Call:
    """What the operators launch with this backend, without the operators around it."""

    def forward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (engine.kron_matmul(x, (a[None], b[None])),)

    def backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        dx, da, db = engine.kron_matmul_backward(dy, x, a[None], b[None], [True] * 3)
        return dx, da[0], db[0]

    def layers(operands: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        each = zip(*[iter(operands)] * 3, strict=True)
        return [(a[None], b[None], bias) for a, b, bias in each]

    def block(dy: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        up, down = layers(operands)
        return (engine.kron_feed_forward(x, up, "gelu", down, None),)

    def block_backward(dy: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        up, down = layers(operands)
        grads = engine.kron_feed_forward_backward(dy, x, up, "gelu", down, [True] * 6)
        return tuple(g[0] if g.dim() == 3 else g for g in grads)

    def three(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(engine.kron_qkv(x, layers(operands)))

    if isinstance(work, Three):
        return three
    calls = (forward, backward) if isinstance(work, Case) else (block, block_backward)
    return calls[direction == "backward"]


def title(work: Work, direction: str) -> str:
    shape, dtype = str(work).rsplit(" ", 1)
    return " ".join(filter(None, (LABELS.get(shape), shape, dtype, direction)))


def matches(text: str, work: Work, direction: str) -> bool:
    """Whether the words of a text are all in the title."""
    return set(text.split()) <= set(title(work, direction).split())


def works() -> Iterator[tuple[Work, str]]:
    """All that is compared, and in which direction."""
    cases = [Case.of(shape, torch.float16) for shape in SHAPES]
    cases += [Case.of(shape, torch.bfloat16) for shape in BF16]
    for case in cases:
        yield from ((case, "forward"), (case, "backward"))
    for up, down in (("8x2 384x384", "2x8 384x384"), ("16x2 192x384", "2x16 384x192")):
        block = FeedForward(Case.of(up, torch.float16), Case.of(down, torch.float16))
        yield from ((block, "forward"), (block, "backward"))
    for shape in SHAPES[:2]:
        yield Three(Case.of(shape, torch.float16)), "forward"


def expected(work: Work, direction: str, tokens: int) -> tuple[Tensor, ...]:
    """In float64, by torch.kron."""
    operands = [t.double() for t in work.operands(tokens, "cpu")]
    if isinstance(work, Three):
        x, *layers = operands
        each = zip(*[iter(layers)] * 3, strict=True)
        return tuple(x @ torch.kron(a, b).T + bias for a, b, bias in each)
    dy, x, *layers = operands
    inputs = [x, *layers[:5]]
    if direction == "backward":
        inputs = [t.requires_grad_() for t in inputs]
    if isinstance(work, Case):
        y = inputs[0] @ torch.kron(*inputs[1:3]).T
    else:
        x, a1, b1, bias, a2, b2 = inputs
        hidden = torch.nn.functional.gelu(x @ torch.kron(a1, b1).T + bias)
        y = hidden @ torch.kron(a2, b2).T + layers[5]
    return (y,) if direction == "forward" else torch.autograd.grad(y, inputs, dy)


def errors(
    result: tuple[Tensor, ...], case: Work, direction: str, tokens: int = SIMULATED[0]
) -> list[float]:
    """Of every output the error's RMS over the output's, in units of the dtype's epsilon."""
    found = []
    for got, want in zip(result, expected(case, direction, tokens), strict=True):
        assert got.dtype == case.dtype and got.shape == want.shape
        error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        found.append(error.item() / torch.finfo(case.dtype).eps)
    if not max(found) <= _UNITS_OF_ERROR:
        raise AssertionError(f"{case} {direction}: errors of {found} units")
    return found
