"""The whole encoder in one call against ``tests/encoders.py`` in float64."""

import random

import encoders
import pytest
import torch
from torch import Tensor

from kron_kernels.backends import abi, native
from kron_kernels.encoder import Embedding, Encoder, Layer, Linear, Norm

pytestmark = pytest.mark.skipif(abi.module is None, reason=abi.missing)

ACTIVATIONS = "gelu", "gelu_tanh", "relu", "silu"
KINDS = "dense", "product", "sum of products", "low rank", "product and low rank", "two shapes"


class Drawn:
    """Random layers; weights have about unit gain."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.chance, self.dtype = random.Random(seed), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (scale * drawn).to(self.dtype)

    def product(self, m: int, n: int, rank: int = 1) -> tuple[Tensor, Tensor]:
        m1, n1 = (self.chance.choice([d for d in range(1, s + 1) if s % d == 0]) for s in (m, n))
        scale = (rank * n) ** -0.25
        a = self.numbers(rank, m1, n1, scale=scale)
        b = self.numbers(rank, m // m1, n // n1, scale=scale)
        if self.chance.random() < 0.3:  # strides of a transposed factor
            a = a.mT.contiguous().mT
        return a, b

    def low_rank(self, m: int, n: int) -> tuple[Tensor, Tensor]:
        rank = self.chance.randint(1, 9)
        thin = self.numbers(rank, m, 1, scale=rank**-0.5), self.numbers(rank, 1, n, scale=n**-0.5)
        return thin if self.chance.random() < 0.7 else thin[::-1]

    def linear(self, kind: str, m: int, n: int) -> Linear:
        parts = {
            "dense": lambda: [(self.numbers(m, n, scale=n**-0.5),)],
            "product": lambda: [self.product(m, n)],
            "sum of products": lambda: [self.product(m, n, rank=3)],
            "low rank": lambda: [self.low_rank(m, n)],
            "product and low rank": lambda: [self.product(m, n), self.low_rank(m, n)],
            "two shapes": lambda: [self.product(m, n), self.product(m, n, rank=2)],
        }[kind]()
        return Linear(parts, self.numbers(m) if self.chance.random() < 0.8 else None)

    def norm(self, width: int) -> Norm:
        if self.chance.random() < 0.1:
            return Norm(None, None, 1e-5)
        return Norm(1 + self.numbers(width, scale=0.1), self.numbers(width), 1e-12)

    def feed_forward(self, kinds: list[str], width: int, hidden: int) -> tuple[Linear, Linear]:
        if self.chance.random() < 0.5:
            kind = self.chance.choice(kinds), self.chance.choice(kinds)
            return self.linear(kind[0], hidden, width), self.linear(kind[1], width, hidden)
        up = self.numbers(2, hidden // 4, 2), self.numbers(2, 4, width // 2, scale=width**-0.5)
        down = self.numbers(1, 2, hidden // 4), self.numbers(1, width // 2, 4, scale=hidden**-0.5)
        return Linear([up], self.numbers(hidden)), Linear([down], self.numbers(width))

    def layer(self, kinds: list[str], width: int, hidden: int) -> Layer:
        attention = [self.linear(self.chance.choice(kinds), width, width) for _ in range(4)]
        up, down = self.feed_forward(kinds, width, hidden)
        act = self.chance.choice(ACTIVATIONS)
        return Layer(*attention, self.norm(width), up, act, down, self.norm(width))

    def embedding(self, width: int, rows: int) -> Embedding:
        own = width if self.chance.random() < 0.8 else 12
        count = self.chance.randint(1, 3)
        c = self.chance.choice([d for d in range(1, own + 1) if own % d == 0])
        words = self.numbers(2, rows, c), self.numbers(2, 1, own // c)
        others = [(self.numbers(rows, own),) for _ in range(count - 1)]
        projection = None if own == width else self.linear("product", width, own)
        return Embedding([words, *others], self.norm(own), projection)


def drawn_encoder(seed: int, dtype: torch.dtype, kinds=KINDS, layers: int | None = None):
    """Arguments of an encoder, and how many rows its tables have."""
    drawn = Drawn(seed, dtype)
    heads = drawn.chance.choice([1, 2, 3])
    width = 2 * heads * drawn.chance.choice([2, 3, 8, 13])
    hidden = drawn.chance.choice([8, 48, 100])
    count = layers or drawn.chance.randint(1, 3)
    rows = 80
    many = [drawn.layer(list(kinds), width, hidden) for _ in range(count)]
    return drawn, (drawn.embedding(width, rows), many, heads, (width / heads) ** -0.5), rows


def drawn_batch(drawn: Drawn, tables: int, rows: int, sequences: int, length: int):
    ids = [
        torch.randint(0, rows, (sequences, length), generator=drawn.generator)
        for _ in range(tables)
    ]
    mask = torch.ones(sequences, length, dtype=torch.int64)
    kind = drawn.chance.choice(["none", "right", "left", "holes"])
    for row in mask:
        tokens = drawn.chance.randint(0, length)
        if kind == "right":
            row[tokens:] = 0
        elif kind == "left":
            row[:tokens] = 0
        elif kind == "holes":
            row[torch.rand(length, generator=drawn.generator) < 0.3] = 0
    return ids, None if kind == "none" else mask


def compare(arguments, ids, mask=None, **given) -> None:
    """Assert that all states are the oracle's, and the same bits for every number of threads."""
    oracle = encoders.Encoder(*arguments).double()
    wide = {k: v.double() for k, v in given.items() if v is not None}
    expected = oracle(ids, mask, **wide, all_states=True)
    found = at_threads(lambda: Encoder(*arguments)(ids, mask, **given, all_states=True))
    assert len(found[0]) == len(expected)
    # An element's error is a few roundings of numbers as large as the state, more in each layer: sums
    # of independent roundings grow with the square root of their number.
    unit = torch.finfo(found[0][0].dtype).eps
    inner = torch.finfo(torch.float64 if unit < 1e-10 else torch.float32).eps
    for i, (y, want) in enumerate(zip(found[0], expected, strict=True)):
        if not y.numel():
            assert y.shape == want.shape
            continue
        size = max(1.0, want.abs().max().item())
        bound = size * (unit + (i + 1) * 64 * inner)
        assert (y.double() - want).abs().max().item() <= bound, f"state {i}"
        for other in found[1:]:
            assert torch.equal(y, other[i]), f"state {i} depends on the number of threads"
    last = Encoder(*arguments)(ids, mask, **given)
    assert len(last) == 1 and torch.equal(last[0], found[-1][-1])


def at_threads(call) -> list:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call())
        return results
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=range(native._isa + 1), ids=lambda isa: native._ISAS[isa])
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "_isa", request.param)


@pytest.mark.parametrize("dtype", abi.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_random_encoders(isa, seed, dtype):
    drawn, arguments, rows = drawn_encoder(seed, dtype)
    sequences, length = drawn.chance.choice([(1, 1), (1, 16), (2, 7), (3, 33), (9, 20), (40, 3)])
    ids, mask = drawn_batch(drawn, len(arguments[0].tables), rows, sequences, length)
    given = {}
    if drawn.chance.random() < 0.4:
        given["distance_bias"] = drawn.numbers(arguments[2], 2 * length - 1)
    if drawn.chance.random() < 0.3:
        table = arguments[0].tables[0]
        width = table[0].shape[-1] * (table[1].shape[-1] if len(table) > 1 else 1)
        given["embeddings"] = drawn.numbers(sequences, length, width)
        ids[0] = None
    compare(arguments, ids, mask, **given)
