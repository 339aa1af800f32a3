"""The whole encoder in one call against ``tests/encoders.py`` in float64."""

import random
from typing import get_args

import encoders
import pytest
import torch
from engines import at_threads
from torch import Tensor

from kron_kernels.backends import abi, native
from kron_kernels.checks import Activation
from kron_kernels.encoder import Embedding, Encoder, Layer, Linear, Norm

pytestmark = pytest.mark.skipif(abi.module is None, reason=abi.missing)

ACTIVATIONS = get_args(Activation)
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
    # An element's error is a few roundings of numbers as large as the state, more in each layer:
    # sums of independent roundings grow with the square root of their number.
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


@pytest.mark.parametrize("dtype", abi.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(16))
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


def base_encoder(attention, up, down) -> Encoder:
    """An encoder of BERT_BASE's size with factors of these shapes, to ask how it is divided."""

    def linear(shapes) -> Linear:
        factors = tuple(torch.zeros(1, 1, 1).expand(1, *shape) for shape in shapes)
        rows = factors[0].shape[1] * factors[1].shape[1]
        return Linear([factors], torch.zeros(rows))

    norm = Norm(torch.ones(768), torch.zeros(768), 1e-12)
    layers = [
        Layer(*[linear(attention)] * 4, norm, linear(up), "gelu", linear(down), norm)
        for _ in range(12)
    ]
    words = torch.zeros(1, 1, 1).expand(1, 30522, 48), torch.zeros(1, 1, 16)
    return Encoder(Embedding([words], norm, None), layers, 12, 0.125)


SHAPES = {
    "8x": [((384, 384), (2, 2)), ((8, 2), (384, 384)), ((2, 8), (384, 384))],
    "21x": [((384, 48), (2, 16)), ((16, 2), (192, 384)), ((2, 16), (384, 192))],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("sequences", "length", "useful"),
    [(1, 1, 2), (1, 16, 4), (1, 128, 8), (1, 512, 32), (32, 128, 64)],
)
def test_the_division_of_work(shapes, sequences, length, useful, monkeypatch):
    """The busiest thread has a fair share, for as many threads as the work is worth."""
    encoder = base_encoder(*shapes)
    lanes = 64 // 4  # of the widest vectors
    tokens = sequences * (length + lanes)
    before = None
    for threads in (1, 2, 4, 8, 16, 64):
        monkeypatch.setattr(native, "_threads", lambda threads=threads: threads)
        found = encoder.division(sequences, length)
        assert found.teams * found.workers <= threads
        assert found.share >= 1 / threads
        assert found.share * min(threads, useful) <= 1.25
        assert before is None or found.share <= before + 1e-9, "more threads have more to do"
        before = found.share
        # States, queries, keys, values and, in parts, what the parts share; the rest for a thread.
        assert found.scratch <= 4 * (6 * 768 * tokens + threads * 12000 * 3 * lanes)
        assert found.stages <= (2 if found.parts == 1 else 10)


def test_a_thread_computes_whole_sequences_in_the_memory_of_a_few(monkeypatch):
    encoder = base_encoder(*SHAPES["8x"])
    monkeypatch.setattr(native, "_threads", lambda: 2)
    small, large = encoder.division(8, 128), encoder.division(64, 128)
    assert (small.teams, large.teams) == (2, 2)
    assert large.scratch < 1.1 * small.scratch


def test_an_id_that_is_no_row_is_named():
    drawn, arguments, rows = drawn_encoder(0, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, 2, 5)
    encoder = Encoder(*arguments)
    for wrong in (rows, -1):
        bad = [ids[0].clone(), *ids[1:]]
        bad[0][1, 3] = wrong
        with pytest.raises(IndexError, match=rf"table 0 must be 0 to {rows - 1}.*got {wrong}"):
            encoder(bad)
        # At padding nothing is looked up.
        mask = torch.ones(2, 5, dtype=torch.int64)
        mask[1, 3] = 0
        encoder(bad, mask)


@pytest.mark.parametrize(("sequences", "length"), [(0, 5), (2, 0)])
def test_empty_batches(sequences, length):
    drawn, arguments, rows = drawn_encoder(1, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, sequences, length)
    (y,) = Encoder(*arguments)(ids)
    assert y.shape[:2] == (sequences, length)


def test_padding_only_gives_zeros():
    drawn, arguments, rows = drawn_encoder(2, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, 2, 5)
    states = Encoder(*arguments)(ids, torch.zeros(2, 5, dtype=torch.int64), all_states=True)
    assert all(not state.any() for state in states)


def test_nan_and_infinity_stay_in_their_sequence(isa):
    drawn, arguments, rows = drawn_encoder(3, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, 3, 9)
    x = Encoder(*arguments)(ids, all_states=True)[0]
    width = arguments[0].tables[0][0].shape[-1] * arguments[0].tables[0][1].shape[-1]
    given = drawn.numbers(3, 9, width)
    clean = Encoder(*arguments)([None, *ids[1:]], embeddings=given)[0]
    for value in (torch.nan, torch.inf):
        broken = given.clone()
        broken[1, 4, 0] = value
        y = Encoder(*arguments)([None, *ids[1:]], embeddings=broken)[0]
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert x.isfinite().all()


def test_weights_are_read_at_each_call():
    drawn, arguments, rows = drawn_encoder(4, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, 2, 5)
    encoder = Encoder(*arguments)
    before = encoder(ids)[0]
    arguments[1][0].down.parts[0][0].mul_(2)
    after = encoder(ids)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, Encoder(*arguments)(ids)[0])


def test_tensors_of_two_dtypes_are_refused():
    _, (embedding, layers, heads, scale), _ = drawn_encoder(5, torch.float32)
    _, (_, others, *_), _ = drawn_encoder(5, torch.float64)
    with pytest.raises(ValueError, match="one dtype"):
        Encoder(embedding, [*layers, *others], heads, scale)


def test_sizes_that_do_not_fit_are_refused():
    drawn, (embedding, layers, heads, scale), rows = drawn_encoder(6, torch.float32)
    wrong = layers[0]._replace(up=Linear([(drawn.numbers(7, 3),)], None))
    ids, _ = drawn_batch(drawn, len(embedding.tables), rows, 2, 5)
    with pytest.raises(ValueError, match="size does not fit"):
        Encoder(embedding, [wrong], heads, scale)(ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": torch.ones(2, 5)}, r"mask must be torch.int64 \(2, 5\).*float32"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.int64)},
            r"mask must be torch.int64 \(2, 5\).*\(2, 4\)",
        ),
        ({"embeddings": torch.ones(2, 5, 3)}, "embeddings must be torch.float32"),
        ({"distance_bias": torch.ones(1, 3)}, "distance_bias must be torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(given, message):
    drawn, arguments, rows = drawn_encoder(7, torch.float32)
    ids, _ = drawn_batch(drawn, len(arguments[0].tables), rows, 2, 5)
    encoder = Encoder(*arguments)
    with pytest.raises(ValueError, match=message):
        encoder(ids, **given)
    with pytest.raises(ValueError, match=r"ids of table 0 must be torch\.int64"):
        encoder([ids[0].int(), *ids[1:]])
    with pytest.raises(ValueError, match="there must be ids for"):
        encoder([*ids, ids[0]])
