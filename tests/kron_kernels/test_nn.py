"""Kronecker modules against equivalent dense layers."""

import copy
import io
import math
from functools import partial

import pytest
import torch
import watching
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KroneckerSum,
    KronShape,
)
from kron_kernels import nn as kron_nn
from kron_kernels.functional import kron_cross_entropy
from kron_kernels.reference import materialize
from kron_kernels.testing import assert_close
from kron_kernels.testing.cases import SHAPES, name

EMBEDDINGS = [(11, 12, 4, 1), (11, 12, 4, 3), (7, 6, 1, 2), (5, 8, 8, 1)]  # v, d, b_size, rank


SUMS = {
    "kronecker and low rank": (12, 10, [((2, 4), 2), ((10, 1), 3)]),
    "low rank first": (12, 10, [((1, 12), 2), ((5, 3), 1)]),
    "three": (12, 8, [((2, 4), 1), ((8, 1), 1), ((4, 2), 2)]),
    "one": (12, 10, [((2, 4), 2)]),
}


def linear_of(s: KronShape, **options) -> KroneckerLinear:
    return biased(KroneckerLinear(s.in_features, s.out_features, *s.part, **options))


def sum_of(case: str, **options) -> KroneckerSum:
    return biased(KroneckerSum(*SUMS[case], **options))


def biased(layer: nn.Module) -> nn.Module:
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def weight_of(layer: nn.Module) -> torch.Tensor:
    return sum(materialize(part.a, part.b) for part in getattr(layer, "parts", [layer]))


LAYERS = {name(s): partial(linear_of, s) for s in SHAPES}
LAYERS |= {case: partial(sum_of, case) for case in SUMS}


# --- KroneckerLinear and KroneckerSum


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_its_dense_layer_forward_and_backward(make, bias):
    layer = make(bias=bias, dtype=torch.float64)
    dense = layer.to_linear()
    assert (dense.bias is not None) == bias
    assert dense.weight.is_contiguous() and dense.weight.requires_grad
    torch.testing.assert_close(dense.weight.detach(), weight_of(layer).detach())
    for lead in [(), (0,), (4,), (2, 3), (2, 0, 3)]:
        x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(x))
    x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, layer.out_features, dtype=torch.float64)
    operands = x, *layer.parameters()
    grads = torch.autograd.grad(layer(x), operands, dy)
    expected = torch.autograd.grad(F.linear(x, weight_of(layer), layer.bias), operands, dy)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("s", SHAPES[1:6], ids=name)
def test_at_full_rank_a_dense_layer_survives_the_round_trip(s):
    dense = nn.Linear(s.in_features, s.out_features)
    before = copy.deepcopy(dense.state_dict())
    layer = KroneckerLinear.from_linear(dense, (s.m1, s.n1), min(s.m1 * s.n1, s.m2 * s.n2))
    back = layer.to_linear()
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=2e-6)
    assert torch.equal(back.bias, dense.bias) and back.bias is not dense.bias
    assert all(torch.equal(t, before[key]) for key, t in dense.state_dict().items())
    x = torch.randn(5, s.in_features)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_from_linear_passes_its_options_on():
    dense = nn.Linear(8, 6, bias=False)
    c = torch.diag(torch.logspace(0, -3, 8))
    layer = KroneckerLinear.from_linear(dense, (3, 2), 2, second_moment=c, backend="eager")
    assert layer.bias is None and layer.backend == "eager" and layer.rank == 2

    def output_error(layer):
        return ((layer.to_linear().weight - dense.weight) @ c.sqrt()).norm()

    assert output_error(layer) < output_error(KroneckerLinear.from_linear(dense, (3, 2), 2))


@pytest.mark.parametrize("std", [None, 0.02])
@pytest.mark.parametrize(
    "parts",
    [[((32, 32), 1)], [((32, 32), 8)], [((32, 32), 1), ((1024, 1), 8), ((64, 16), 2)]],
    ids=["rank 1", "rank 8", "sum"],
)
def test_entries_of_a_new_weight_have_the_given_standard_deviation(parts, std):
    if len(parts) == 1:
        layer = KroneckerLinear(1024, 1024, *parts[0])
    else:
        layer = KroneckerSum(1024, 1024, parts)
    if std is not None:
        layer.reset_parameters(std)
    weight, dense = layer.to_linear().weight, nn.Linear(1024, 8).weight
    assert weight.std().item() == pytest.approx(std or dense.std().item(), rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * weight.std().item()
    assert not layer.bias.any()


def test_every_parameter_is_written_by_reset_and_no_other_name_is_stored():
    layer = KroneckerLinear(12, 10, (2, 4), 3)
    assert list(layer.state_dict()) == ["a", "b", "bias"]
    assert [tuple(t.shape) for t in layer.parameters()] == [(3, 2, 4), (3, 5, 3), (10,)]
    assert layer.shape == KronShape(2, 4, 5, 3, 3)
    assert sum(t.numel() for t in layer.parameters()) == layer.shape.parameters + 10
    assert all(t.isfinite().all() for t in layer.parameters())
    assert "bias" not in KroneckerLinear(12, 10, (2, 4), bias=False).state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((768, 3072, (5, 2)), r"3072 rows are not divisible by a_shape\[0\] = 5; .* 4 and 6"),
        ((768, 3072, (16, 5)), r"768 columns are not divisible by a_shape\[1\] = 5; .* 4 and 6"),
        ((768, 768, (16, 2), 0), "at least one term; use rank=1"),
        ((-12, 768, (16, 2)), "in_features = -12 must be an integer of at least 1"),
        ((768, 0, (16, 2)), "out_features = 0 must be an integer of at least 1"),
    ],
    ids=["rows", "columns", "rank", "negative", "zero"],
)
def test_a_shape_that_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        KroneckerLinear(*call)
    with pytest.raises(ValueError, match=r"columns, 4 .* 3 = 12, got x of shape"):
        KroneckerLinear(12, 10, (2, 4))(torch.ones(2, 10))
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        KroneckerLinear(12, 10, (2, 4), backend="triton")(torch.ones(2, 12))


def test_a_sum_adds_within_the_products_and_the_kernel_that_can_comes_last(monkeypatch):
    layer, calls = sum_of("three"), []

    def spy(x, a, b, **options):
        calls.append((tuple(a.shape), options))
        return torch.zeros(*x.shape[:-1], 8)

    monkeypatch.setattr(kron_nn, "kron_matmul", spy)
    layer(torch.ones(2, 12))
    (first, no), (_, one), (last, two) = calls
    assert first == (1, 8, 1) and last == (2, 4, 2)  # low rank is two GEMMs, which add nothing
    assert no.get("residual") is None and one["residual"] is not None is not two["residual"]
    assert two["bias"] is layer.bias and "bias" not in no and "bias" not in one


@pytest.mark.parametrize("case", ["kronecker and low rank", "three"])
def test_a_sum_from_a_linear_layer_is_near_it_with_its_bias_and_options(case):
    n, m, parts = SUMS[case]
    dense = nn.Linear(n, m).eval()
    dense.weight.requires_grad_(False)
    c = torch.diag(torch.logspace(0, -3, n))
    layer = KroneckerSum.from_linear(dense, parts, backend="eager")
    assert layer.bias is not dense.bias and torch.equal(layer.bias, dense.bias)
    assert not layer.training
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"bias"}
    assert [part.backend for part in layer.parts] == ["eager"] * len(parts)
    assert [(part.shape.m1, part.shape.n1) for part in layer.parts] == [p[0] for p in parts]
    for p, s in zip(parts, layer.shapes, strict=True):
        single = KroneckerLinear.from_linear(dense, *p)
        off = layer.to_linear().weight - dense.weight
        assert off.norm() < (single.to_linear().weight - dense.weight).norm() and s.rank == p[1]
    aware = KroneckerSum.from_linear(dense, parts, second_moment=c)

    def output_error(layer):
        return ((layer.to_linear().weight - dense.weight) @ c.sqrt()).norm()

    assert output_error(aware) < output_error(layer)
    assert KroneckerSum.from_linear(nn.Linear(n, m, bias=False), parts).bias is None


def test_a_sum_survives_its_state_a_copy_and_a_description():
    layer, other = sum_of("three"), sum_of("three")
    keys = ["bias", *(f"parts.{i}.{f}" for i in range(3) for f in "ab")]
    assert list(layer.state_dict()) == keys
    assert sum(p.numel() for p in layer.parameters()) == 8 + sum(s.parameters for s in layer.shapes)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 12)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "in_features=12, out_features=8, bias=True" in repr(layer)
    assert "rank=2" in repr(layer)
    with pytest.raises(ValueError, match="parts is empty, but a sum needs"):
        KroneckerSum(12, 8, [])
    with pytest.raises(ValueError, match=r"8 rows are not divisible by a_shape\[0\] = 3"):
        KroneckerSum(12, 8, [((3, 2), 1)])


# --- layers that read the factors of inner ones


def block_of() -> KroneckerFeedForward:
    return KroneckerFeedForward(KroneckerLinear(12, 24, (6, 3)), KroneckerLinear(24, 12, (3, 6)))


def by_calls(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, KroneckerFeedForward):
        return layer.down(F.gelu(layer.up(x)))
    return sum(part(x) for part in layer.parts) + layer.bias


OWNERS = [
    *((block_of, path) for path in ("up", "down")),
    *((lambda: sum_of("three"), f"parts.{i}") for i in range(3)),
]
each_owner = pytest.mark.parametrize(
    ("make", "path"), OWNERS, ids=["up", "down", "low rank", "first part", "last part"]
)


@pytest.mark.filterwarnings("ignore:.*non-full backward hook")
@pytest.mark.parametrize("kind", watching.ALL)
@each_owner
def test_hooks_on_an_inner_layer_run(make, path, kind):
    layer, x, seen = make(), torch.randn(3, 12, requires_grad=True), []
    want = by_calls(layer, x)
    with watching.ALL[kind](layer.get_submodule(path), seen):
        y = layer(x)
        y.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(y, want)


class Doubled(KroneckerLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer: nn.Module) -> nn.Module:
    layer.__class__ = Doubled
    return layer


def with_bias(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return layer


CHANGES = {
    "pruned": lambda layer: prune.random_unstructured(layer, "a", 0.5),
    "old weight norm": lambda layer: weight_norm(layer, "b"),
    "parametrized": lambda layer: parametrizations.weight_norm(layer, "a"),
    "a subclass": doubled,
    "wrapped": lambda layer: nn.Sequential(layer, nn.Tanh()),
    "dense": lambda layer: layer.to_linear(),
    "biased": with_bias,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@each_owner
def test_an_inner_layer_that_computes_something_else_is_called(make, path, change):
    layer, x = make(), torch.randn(3, 12)
    parent, _, last = path.rpartition(".")
    setattr(layer.get_submodule(parent), last, CHANGES[change](layer.get_submodule(path)))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        want = by_calls(layer, x)
        optimizer.zero_grad()
        y = layer(x)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), by_calls(layer, x))


@pytest.mark.parametrize("make", [block_of, lambda: sum_of("three")], ids=["block", "sum"])
def test_a_patched_class_is_called(make, monkeypatch):
    layer, x, forward = make(), torch.randn(3, 12), KroneckerLinear.forward
    monkeypatch.setattr(KroneckerLinear, "forward", lambda self, x: 2 * forward(self, x))
    torch.testing.assert_close(layer(x), by_calls(layer, x))


def test_a_sum_whose_parts_must_all_be_called():
    for bias in (True, False):
        layer, x = sum_of("three", bias=bias), torch.randn(3, 12)
        want = layer(x)
        for part in layer.parts:
            part.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("called", [(), (0,), (0, 1, 2)], ids=str)
def test_a_layer_in_autocast_gives_the_lower_dtype_as_linear_does(called):
    single, layer, x = linear_of(KronShape(2, 4, 4, 3)), sum_of("three"), torch.randn(3, 12)
    for i in called:
        layer.parts[i].register_forward_hook(lambda *_: None)
    for module in (single, layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            assert y.dtype == module.to_linear()(x).dtype == torch.bfloat16
            y.float().sum().backward()
        torch.testing.assert_close(y.float(), module(x), rtol=2e-2, atol=2e-2)
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([((2, 4), 1, 2)], r"parts\[0\] = \(\(2, 4\), 1, 2\) must be \(a_shape, rank\): \(\(16, "),
        ([((2, 4), 1), 3], r"parts\[1\] = 3 must be \(a_shape, rank\)"),
        ([{"a_shape": (2, 4), "rank": 1}], r"parts\[0\] = \{'a_shape': .* must be \(a_shape, rank"),
        (((2, 4), 1), r"parts\[1\] = 1 must be \(a_shape, rank\)"),
        (3, r"parts = 3 must be a list of \(a_shape, rank\)"),
        (None, "parts = None must be a list"),
        ("ab", "parts = 'ab' must be a list"),
        (iter(()), "parts is empty, but a sum needs at least one"),
    ],
    ids=range(8),
)
def test_parts_that_are_not_pairs_are_refused(parts, message):
    for call in (
        lambda: KroneckerSum(12, 10, parts),
        lambda: KroneckerSum.from_linear(nn.Linear(12, 10), parts),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_parts_may_be_a_generator():
    linear, parts = nn.Linear(12, 10), SUMS["low rank first"][2]
    want = KroneckerSum.from_linear(linear, parts).state_dict()
    got = KroneckerSum.from_linear(linear, (part for part in parts)).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert len(KroneckerSum(12, 10, iter(parts)).parts) == 2


def test_a_residual_of_another_shape_is_refused_by_all_paths_of_a_block():
    block, x = block_of(), torch.randn(3, 12)
    for _ in range(2):
        torch.testing.assert_close(block(x, residual=x), by_calls(block, x) + x)
        with pytest.raises(ValueError, match=r"residual must have y's shape \(3, 12\)"):
            block(x, residual=x[:1])
        with pytest.raises(TypeError, match=r"residual must be a torch.Tensor, got list; use"):
            block(x, residual=x.tolist())
        block.up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="activation must be None or one of gelu"):
        KroneckerFeedForward(block.up, block.down, "swish")


BACKENDS = {  # the block's, up's and down's, to those of the calls
    ("auto", "auto", "auto"): ["auto"],
    ("eager", "auto", "auto"): ["eager"],
    ("auto", "eager", "eager"): ["eager"],
    ("eager", "eager", "auto"): ["eager"],
    ("auto", "eager", "auto"): ["eager", "auto"],
    ("native", "auto", "eager"): ["native", "eager"],
    ("eager", "native", "native"): ["native"],
}


@pytest.mark.parametrize("given", BACKENDS, ids=" ".join)
def test_a_block_and_its_layers_use_their_own_backends(given, monkeypatch):
    block, x, used = block_of(), torch.randn(3, 12), []
    want = by_calls(block, x)
    block.backend, block.up.backend, block.down.backend = given

    def spy(function):
        def called(*args, **options):
            used.append(options["backend"])
            return function(*args, **options)

        return called

    monkeypatch.setattr(kron_nn, "kron_feed_forward", spy(kron_nn.kron_feed_forward))
    monkeypatch.setattr(kron_nn, "kron_matmul", spy(kron_nn.kron_matmul))
    torch.testing.assert_close(block(x), want)
    assert used == BACKENDS[given]
    block.down.backend = "triton"  # not available here
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        block(x)


# --- KroneckerEmbedding


@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (2, 0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("sizes", EMBEDDINGS, ids=str)
def test_a_table_is_its_dense_table(sizes, shape):
    table = KroneckerEmbedding(*sizes, dtype=torch.float64)
    v, d, *_ = sizes
    dense = table.to_embedding()
    torch.testing.assert_close(dense.weight.detach(), materialize(table.a, table.b).detach())
    for dtype in (torch.int64, torch.int32):
        ids = torch.randint(v, shape, dtype=dtype)
        rows = table(ids)
        assert rows.shape == (*shape, d)
        torch.testing.assert_close(rows, dense(ids))


@pytest.mark.parametrize("sizes", EMBEDDINGS, ids=str)
def test_the_tied_decoder_is_exact(sizes):
    table = KroneckerEmbedding(*sizes, dtype=torch.float64)
    v, d, *_ = sizes
    weight, bias = table.to_embedding().weight, torch.randn(v, dtype=torch.float64)
    for lead in [(), (4,), (0, 2), (2, 3)]:
        h = torch.randn(*lead, d, dtype=torch.float64)
        torch.testing.assert_close(table.decode(h), h @ weight.mT)
        torch.testing.assert_close(table.decode(h, bias), h @ weight.mT + bias)


@pytest.mark.parametrize("sizes", EMBEDDINGS, ids=str)
def test_gradients_of_lookup_and_decoder_are_those_of_the_dense_table(sizes):
    table = KroneckerEmbedding(*sizes, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 3], [1, 4, 0]])
    dy = torch.randn(2, 3, sizes[0], dtype=torch.float64)
    grads = torch.autograd.grad(table.decode(table(ids)), (table.a, table.b), dy)
    a, b = (t.detach().clone().requires_grad_() for t in (table.a, table.b))
    weight = materialize(a, b)
    expected = torch.autograd.grad(weight[ids] @ weight.mT, (a, b), dy)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("b_size", [1, 4, 12])
def test_at_full_rank_a_dense_table_survives_the_round_trip(b_size):
    dense = nn.Embedding(13, 12, padding_idx=2)
    table = KroneckerEmbedding.from_embedding(dense, b_size, b_size)
    back = table.to_embedding()
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=2e-6)
    assert back.padding_idx == 2 and not table(torch.tensor(2)).any()


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_the_padding_row_starts_at_zero_and_gets_no_gradient_from_the_lookup(padding_idx):
    table = KroneckerEmbedding(6, 8, 2, 2, padding_idx=padding_idx)
    ids = torch.arange(6)
    rows = table(ids)
    assert not rows[padding_idx].any() and rows[1].all()
    rows.sum().backward()
    used = table.a.grad.abs().sum((0, 2)) > 0
    assert not used[padding_idx] and used.sum() == 5


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("std", [1.0, 0.02])
def test_entries_of_a_new_table_have_the_given_standard_deviation(rank, std):
    table = KroneckerEmbedding(1024, 1024, 32, rank)
    if std != 1.0:
        table.reset_parameters(std)
    # 32 entries of b make a wide spread between draws: compare with that of the drawn b.
    size = (table.a.var((1, 2)) * table.b.square().mean((1, 2))).sum().sqrt().item()
    assert table.to_embedding().weight.std().item() == pytest.approx(size, rel=0.1)
    assert size == pytest.approx(std, rel=0.5)


def test_a_b_size_that_does_not_divide_or_an_unknown_id_is_refused():
    with pytest.raises(
        ValueError, match=r"embedding_dim = 12 is not divisible by b_size = 5; .* are 4 and 6"
    ):
        KroneckerEmbedding(7, 12, 5)
    for b_size in (0, -3):
        with pytest.raises(ValueError, match="is not divisible by b_size"):
            KroneckerEmbedding(7, 12, b_size)
    with pytest.raises(IndexError):
        KroneckerEmbedding(7, 12, 4)(torch.tensor([7]))


@pytest.mark.parametrize("std", [math.nan, math.inf, -1.0, "1", 10**400, torch.ones(2)], ids=str)
def test_a_standard_deviation_that_is_not_a_finite_number_is_refused(std):
    for layer in (
        KroneckerLinear(6, 4, (2, 3)),
        KroneckerSum(6, 4, [((2, 3), 1), ((4, 1), 1)]),
        KroneckerEmbedding(7, 12, 4),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="must be a finite number of at least 0"):
            layer.reset_parameters(std)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("rank", [0, -1])
def test_a_table_without_terms_is_refused(rank):
    with pytest.raises(ValueError, match="use rank=1"):
        KroneckerEmbedding(7, 12, 4, rank)


# --- both, as modules


class Model(nn.Module):
    """A table, a layer of two terms and the tied decoder."""

    def __init__(self, **new):
        super().__init__()
        self.words = KroneckerEmbedding(11, 12, 4, 2, padding_idx=0, **new)
        self.mix = KroneckerLinear(12, 12, (3, 2), 2, **new)

    def forward(self, ids):
        return self.words.decode(self.mix(self.words(ids)))


IDS = torch.tensor([[1, 2, 0], [10, 3, 3]])


def test_the_state_and_the_module_survive_a_file():
    model, other = Model(), Model()
    keys = ["words.a", "words.b", "mix.a", "mix.b", "mix.bias"]
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not torch.equal(model(IDS), other(IDS))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(IDS), other(IDS))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(IDS), model(IDS))


def test_a_deep_copy_shares_nothing():
    model = Model()
    expected = model(IDS)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(IDS), expected) and not model(IDS).any()


def test_a_model_is_built_without_memory_and_filled_later():
    with torch.device("meta"):
        model = Model()
    assert all(p.is_meta for p in model.parameters())
    assert Model(device="meta")(IDS.to("meta")).shape == (2, 3, 11)
    assert model.mix.to_linear().weight.is_meta and model.words.to_embedding().weight.is_meta
    source = Model()
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(IDS), source(IDS))
    empty = Model(device="meta").to_empty(device="cpu")
    for module in (empty.words, empty.mix):
        module.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_an_argument_and_a_conversion(dtype):
    model = Model(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(IDS).dtype == dtype
    assert model.mix.to_linear().weight.dtype == dtype
    assert {p.dtype for p in Model().to(torch.float64).parameters()} == {torch.float64}
    layer = KroneckerLinear(12, 10, (2, 4), 2, dtype=torch.complex64)
    x = torch.randn(3, 12, dtype=torch.complex64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_rounding_of_the_dense_function(dtype):
    s = KronShape(6, 4, 5, 8, 3)
    layer = linear_of(s, dtype=dtype)
    wide = copy.deepcopy(layer).double().to_linear()
    x = torch.randn(200, s.in_features).to(dtype)
    assert_close("y", layer(x), wide(x.double()), terms=1)  # one rounding, and that of the bias
    table = KroneckerEmbedding(50, 24, 4, 3, dtype=dtype)
    ids = torch.randint(50, (200,))
    dense = copy.deepcopy(table).double().to_embedding()
    assert_close("rows", table(ids), dense(ids), terms=1)
    h = torch.randn(200, 24).to(dtype)
    assert_close("logits", table.decode(h), h.double() @ dense.weight.mT, terms=1)
    converted = KroneckerLinear.from_linear(layer.to_linear(), (6, 4), 3)
    assert converted.a.dtype == dtype


def test_half_precision_trains():
    model = Model(dtype=torch.bfloat16)
    model(IDS).float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_a_model_learns():
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of sums in place
def test_functional_call_and_transforms_see_the_parameters():
    model = Model(dtype=torch.float64)
    doubled = {key: 2 * p.detach() for key, p in model.named_parameters()}

    def loss(state, ids):
        return torch.func.functional_call(model, state, (ids,)).square().sum()

    other = copy.deepcopy(model)
    other.load_state_dict(doubled)
    expected = other(IDS).square().sum()
    torch.testing.assert_close(loss(doubled, IDS), expected)
    expected.backward()
    grads = torch.func.grad(loss)(doubled, IDS)
    for key, p in other.named_parameters():
        torch.testing.assert_close(grads[key], p.grad)
    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(doubled, IDS)
    for key, grad in grads.items():
        torch.testing.assert_close(per_sample[key].sum(0), grad)


def test_compile_sees_the_whole_graph():
    model = Model()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS[:1, :2]):
        model.zero_grad()
        compiled.zero_grad()
        expected, y = model(ids), compiled(ids)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for p, other in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, other.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_that_is_passed_in_is_written_to(mode):
    model = Model()
    h, bias, ids = torch.randn(2, 3, 12), torch.randn(11), IDS.clone()
    kept = [t.clone() for t in (h, bias, ids, *model.parameters())]
    with mode():
        y = model.mix(h)
        y += 1  # the result is the caller's own
        model.words(ids).mul_(2)
        logits = model.words.decode(h, bias)
        logits.zero_()
    for t, before in zip((h, bias, ids, *model.parameters()), kept, strict=True):
        assert torch.equal(t, before)


def test_frozen_factors_take_no_gradient():
    model = Model()
    model.mix.a.requires_grad_(False)
    model(IDS).sum().backward()
    assert model.mix.a.grad is None and model.mix.b.grad is not None
    frozen = Model().requires_grad_(False)
    assert not frozen(IDS).requires_grad


def test_a_parametrized_factor_is_used():
    layer = KroneckerLinear(12, 10, (2, 4))
    nn.utils.parametrizations.weight_norm(layer, "a")
    x = torch.randn(3, 12)
    with torch.no_grad():
        before = layer(x) - layer.bias
        layer.parametrizations.a.original0.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * before)


def test_the_printed_form_shows_the_sizes_of_the_factors():
    assert repr(KroneckerLinear(768, 3072, (16, 2), 4, bias=False)) == (
        "KroneckerLinear(in_features=2*384, out_features=16*192, rank=4, bias=False)"
    )
    assert repr(KroneckerEmbedding(30522, 768, 8)) == "KroneckerEmbedding(30522, 96*8, rank=1)"


# --- the tied decoder's loss


@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_cross_entropy_in_chunks_is_that_of_all_logits(tokens, generator):
    table = KroneckerEmbedding(23, 12, 4, rank=2, dtype=torch.float64)
    h = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(23, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 23, (3, 5), generator=generator)
    labels[0, :2] = -100
    operands = h, table.a, table.b, bias
    loss = kron_cross_entropy(h, table.a, table.b, labels, bias=bias, tokens=tokens)
    expected = F.cross_entropy(table.decode(h, bias).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(table.cross_entropy(h, labels, bias), expected)
    for got, other in zip(
        torch.autograd.grad(loss, operands), torch.autograd.grad(expected, operands), strict=True
    ):
        torch.testing.assert_close(got, other)


def test_cross_entropy_of_16_bit_logits_is_summed_in_float32():
    table = KroneckerEmbedding(23, 12, 4, dtype=torch.bfloat16)
    loss = table.cross_entropy(torch.randn(7, 12).bfloat16(), torch.arange(7))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_cross_entropy_refuses_labels_and_sizes_that_do_not_fit():
    table = KroneckerEmbedding(23, 12, 4)
    with pytest.raises(ValueError, match=r"one entry for each hidden state, shape \(2, 3\)"):
        table.cross_entropy(torch.ones(2, 3, 12), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens = 0 must be an integer of at least 1"):
        kron_cross_entropy(
            torch.ones(3, 12), table.a, table.b, torch.zeros(3, dtype=torch.int64), tokens=0
        )


@pytest.mark.parametrize("path", ["fused", "two backends", "called"])
@pytest.mark.parametrize("grads", [False, True])
def test_a_block_without_an_activation(path, grads):
    up, down = KroneckerLinear(12, 24, (4, 2)), KroneckerLinear(24, 12, (2, 4))
    block = KroneckerFeedForward(up, down, None).requires_grad_(grads)
    x = torch.randn(5, 12)
    expected = down(up(x)) + x
    if path == "two backends":
        up.backend = "eager"
    if path == "called":
        up.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x, x), expected)
