"""Layers with int8 weights: which are replaced, what they compute, and how they are kept."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from kron_kernels import (
    Int8Factor,
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KroneckerSum,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
    dequantize_,
    kron_matmul,
    quantize_,
)

QUANTIZED = QuantizedLinear, QuantizedSum, QuantizedEmbedding
LAYERS = {
    "dense": lambda **new: nn.Linear(40, 48, **new),
    "without bias": lambda **new: nn.Linear(40, 48, bias=False, **new),
    "product": lambda **new: KroneckerLinear(80, 96, (2, 2), **new),
    "terms": lambda **new: KroneckerLinear(96, 80, (40, 32), rank=3, **new),
    "low rank": lambda **new: KroneckerLinear(80, 96, (96, 1), rank=24, **new),
    "thin": lambda **new: KroneckerLinear(160, 96, (1, 160), rank=9, bias=False, **new),
    "sum": lambda **new: KroneckerSum(80, 96, [((2, 2), 1), ((96, 1), 24)], **new),
    "sum without bias": lambda **new: KroneckerSum(80, 96, [((2, 2), 2)], bias=False, **new),
}
TABLES = {
    "table": lambda **new: nn.Embedding(64, 24, padding_idx=3, **new),
    "factorised": lambda **new: KroneckerEmbedding(256, 32, 4, padding_idx=3, **new),
    "terms of a table": lambda **new: KroneckerEmbedding(128, 32, 2, rank=3, **new),
}


def made(name: str, **new) -> nn.Module:
    layer = (LAYERS | TABLES)[name](**new)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return layer


def weight_of(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, KroneckerEmbedding):
        return layer.to_embedding().weight
    return layer.to_linear().weight if hasattr(layer, "to_linear") else layer.weight


def int8_of(module: nn.Module) -> list[str]:
    return [path for path, m in module.named_modules() if isinstance(m, QUANTIZED)]


# --- one layer


@pytest.mark.parametrize("name", [*LAYERS, *TABLES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_and_its_floating_point_form_have_the_same_weights(name, dtype):
    layer = made(name, dtype=dtype).eval()
    before = copy.deepcopy(layer.state_dict())
    q = quantize_(layer)
    assert isinstance(q, QUANTIZED) and not q.training
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())
    assert not any(p.requires_grad for p in q.parameters())
    back = dequantize_(copy.deepcopy(q))
    assert type(back) is type(layer) and not back.training
    assert all(p.requires_grad and p.dtype == dtype for p in back.parameters())
    assert [p.shape for p in back.parameters()] == [p.shape for p in layer.parameters()]
    # Each entry is within half of its row's scale, and 16-bit ones are rounded once more.
    eps = torch.finfo(dtype).eps
    for p, other in zip(back.parameters(), layer.parameters(), strict=True):
        limit = p.abs().amax() * (0.5 / 127 + 2 * eps)
        assert (p - other).abs().max() <= limit * 1.001
    # What it was made of again gives the same integers, in float32.
    if dtype == torch.float32:
        again = quantize_(back)
        for key, t in q.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_is_its_products(name, dtype):
    layer = made(name, dtype=dtype)
    q = quantize_(layer)
    x = torch.randn(3, 5, layer.in_features).to(dtype)
    with torch.no_grad():
        y, exact = q(x), F.linear(x.double(), weight_of(layer.double()))
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    assert y.dtype == dtype and y.shape == exact.shape and not y.requires_grad
    # 1/254 of the largest entry of a vector and of a row, each about three times the RMS.
    size = exact.square().mean().sqrt()
    assert 1e-4 * size < (y - exact).square().mean().sqrt() < 0.03 * size
    parts = getattr(q, "parts", [q])
    products = sum(kron_matmul(x, *part.factors).double() for part in parts)
    expected = products if layer.bias is None else products + layer.bias.double()
    limit = 4 * torch.finfo(dtype).eps * (products.abs() + expected.abs() + 1)
    assert ((y.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_table_has_the_rows_of_the_floating_point_one(name, dtype):
    table = made(name, dtype=dtype)
    q = quantize_(table)
    assert (q.num_embeddings, q.embedding_dim) == (table.num_embeddings, table.embedding_dim)
    assert q.padding_idx == table.padding_idx
    exact = weight_of(dequantize_(copy.deepcopy(q).double())).detach()
    for ids in (
        torch.randint(0, table.num_embeddings, (3, 5)),
        torch.tensor([[0, table.num_embeddings - 1]], dtype=torch.int32),
        torch.tensor(3),
        torch.zeros(2, 0, dtype=torch.long),
    ):
        rows, expected = q(ids), F.embedding(ids, exact)
        assert rows.dtype == dtype and rows.shape == expected.shape
        # Products of the factors' entries are summed in float32, or in float64.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(rows.double(), expected, rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("name", TABLES)
def test_other_ids_are_refused_as_by_other_tables(name):
    q = quantize_(made(name))
    for ids in (torch.tensor([-1]), torch.tensor([q.num_embeddings])):
        with pytest.raises(IndexError):
            q(ids)
    for ids in (torch.tensor([True, False]), torch.tensor([1.0]), torch.tensor([1]).byte()):
        with pytest.raises(RuntimeError, match="Long, Int"):
            q(ids)


def test_a_padding_row_of_zeros_stays_one():
    table = nn.Embedding(64, 24, padding_idx=3)
    q = quantize_(table)
    assert q(torch.tensor(3)).tolist() == [0.0] * 24
    back = q.dequantized()
    back(torch.tensor([3, 4])).sum().backward()
    assert back.weight.grad[3].abs().sum() == 0 < back.weight.grad[4].abs().sum()


def test_parts_of_a_sum_keep_their_own_biases():
    layer = made("sum")
    for part in layer.parts:
        part.bias = nn.Parameter(torch.randn(96))
    x = torch.randn(4, 80)
    q = quantize_(layer)
    with torch.no_grad():
        y, without = q(x), sum(kron_matmul(x, *part.factors) for part in q.parts)
        expected = without + layer.bias + layer.parts[0].bias + layer.parts[1].bias
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        back = dequantize_(q)
    assert torch.equal(back.parts[1].bias, layer.parts[1].bias)


def test_a_layer_of_small_factors_may_be_made_and_computes_in_floating_point():
    layer = nn.Linear(5, 4)
    q = QuantizedLinear.of(layer)
    x = torch.randn(3, 5)
    torch.testing.assert_close(q(x), layer(x).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(q.dequantized().weight, layer.weight) and not list(q.state_dict())[2:]


def test_gradients_are_refused_with_the_remedy():
    for name in ("dense", "product", "sum"):
        q = quantize_(made(name))
        x = torch.randn(3, q.in_features, requires_grad=True)
        with pytest.raises(
            ValueError, match=r"call it under torch.no_grad\(\), or .*dequantize_ goe"
        ):
            q(x)
        with torch.no_grad():
            q(x)
    model = nn.Sequential(nn.Linear(4, 40), quantize_(nn.Linear(40, 40)))
    with pytest.raises(ValueError, match="no gradient"):
        model(torch.randn(2, 4))
    assert not model.requires_grad_(False)(torch.randn(2, 4)).requires_grad
    # The first parameter has the model's dtype, and the others can be trained.
    model = quantize_(nn.Sequential(nn.Embedding(64, 24), nn.Linear(24, 64))).half()
    assert next(model.parameters()).dtype == torch.float16
    model.requires_grad_()


def test_a_dequantised_layer_is_trained():
    for name in (*LAYERS, *TABLES):
        layer = dequantize_(quantize_(made(name)))
        is_table = name in TABLES
        x = torch.arange(8) if is_table else torch.randn(8, layer.in_features)
        optimizer = torch.optim.SGD(layer.parameters(), 0.01)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]


def test_what_is_printed():
    text = {
        "dense": "QuantizedLinear(weight=48x40 int8, bias=True)",
        "without bias": "QuantizedLinear(weight=48x40 int8, bias=False)",
        "product": "QuantizedLinear(a=2x2, b=48x40 int8, bias=True)",
        "low rank": "QuantizedLinear(a=24x96x1 int8, b=24x1x80 int8, bias=True)",
        "factorised": "QuantizedEmbedding(a=256x8 int8, b=1x4)",
        "terms of a table": "QuantizedEmbedding(a=3x128x16 int8, b=3x1x2)",
    }
    assert {name: repr(quantize_(made(name))) for name in text} == text


def test_compilers_and_autocast():
    model = quantize_(nn.Sequential(made("table"), nn.Linear(24, 80), made("sum"))).eval()
    assert int8_of(model) == ["0", "1", "2", "2.parts.0", "2.parts.1"]
    ids = torch.randint(0, 64, (3, 7))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)
    mixed = nn.Sequential(nn.Linear(4, 40), quantize_(nn.Linear(40, 80)), quantize_(made("sum")))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert mixed(torch.randn(3, 4)).dtype == torch.bfloat16


# --- which layers


def test_which_layers_are_large_enough():
    """1024 entries of a factor, and 8 columns that the product sums over."""
    for layer, is_replaced in (
        (nn.Linear(32, 32), True),
        (nn.Linear(31, 33), False),
        (nn.Linear(8, 128), True),
        (nn.Linear(7, 1000), False),
        (nn.Linear(65536, 1), True),
        (nn.Linear(65537, 1), False),
        (KroneckerLinear(64, 64, (2, 2)), True),
        (KroneckerLinear(60, 62, (2, 2)), False),
        (KroneckerLinear(64, 64, (32, 32)), True),
        (KroneckerLinear(64, 64, (64, 1), rank=16), True),
        (KroneckerLinear(64, 512, (512, 1), rank=7), False),  # few terms to sum over, small rows
        (KroneckerLinear(512, 64, (64, 1), rank=7), True),  # of rows
        (KroneckerSum(64, 64, [((2, 2), 1), ((64, 1), 2)]), True),
        (KroneckerSum(64, 64, [((8, 8), 1), ((64, 1), 2)]), False),
        (nn.Embedding(128, 8), True),
        (nn.Embedding(1000, 7), False),
        (KroneckerEmbedding(128, 16, 2), True),
        (KroneckerEmbedding(1000, 12, 2), False),
    ):
        assert isinstance(quantize_(layer), QUANTIZED) == is_replaced, layer


def test_of_a_sum_and_of_a_product_only_large_factors_are_int8():
    q = quantize_(KroneckerLinear(64, 64, (2, 2)))
    assert (q.a.dtype, q.b.dtype) == (torch.float32, torch.int8)
    assert q.b_scale.shape == (1, 32, 1)
    assert {n for n, _ in q.named_parameters()} == {"a", "bias"}
    q = quantize_(KroneckerLinear(512, 64, (64, 1), rank=7))
    assert (q.a.dtype, q.b.dtype) == (torch.float32, torch.int8)
    q = quantize_(KroneckerSum(64, 64, [((8, 8), 1), ((64, 1), 16)]))
    assert [p.a.dtype for p in q.parts] == [torch.float32, torch.int8]
    # Columns share their scales, rows of each term have their own.
    assert q.parts[1].a_scale.shape == (1, 64, 1) and q.parts[1].b_scale.shape == (16, 1, 1)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x):
        return x @ self.read.weight + self.called(x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnKronecker(KroneckerLinear):
    def forward(self, x):
        return super().forward(x) + 1


class Conv1D(nn.Module):  # as transformers has it
    def __init__(self, rows, columns):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(columns, rows)),
            nn.Parameter(torch.zeros(rows)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


def with_own_forward(layer):
    layer.forward = lambda x: x
    return layer


def tied(first, second, name):
    setattr(second, name, getattr(first, name))
    return nn.Sequential(first, second)


def sum_of_other_parts(part):
    layer = made("sum")
    layer.parts[0] = part
    return layer


STAY = {
    "read": (Reader, ["called"]),
    "own class": (lambda: nn.Sequential(OwnLinear(40, 40), nn.Linear(40, 40)), ["1"]),
    "own Kronecker class": (lambda: nn.Sequential(OwnKronecker(80, 80, (2, 2))), []),
    "own forward": (lambda: nn.Sequential(with_own_forward(made("product"))), []),
    "own forward of a table": (lambda: nn.Sequential(with_own_forward(made("factorised"))), []),
    "own forward of a part": (lambda: sum_of_other_parts(OwnKronecker(80, 96, (2, 2))), []),
    "another part": (lambda: sum_of_other_parts(nn.Linear(80, 96)), []),
    "tied": (lambda: tied(nn.Linear(40, 40), nn.Linear(40, 40), "weight"), []),
    "tied tables": (lambda: tied(nn.Embedding(64, 24), nn.Linear(24, 64), "weight"), []),
    "tied factors": (lambda: tied(made("product"), made("product"), "b"), []),
    "tied biases": (lambda: tied(nn.Linear(40, 40), nn.Linear(40, 40), "bias"), []),
    "attention": (lambda: nn.MultiheadAttention(64, 4), []),
    "fast path": (lambda: nn.TransformerEncoderLayer(32, 4, 64), []),
    "max_norm": (lambda: nn.Embedding(64, 24, max_norm=1.0), []),
    "Conv1D": (lambda: nn.Sequential(Conv1D(40, 40)), []),
    "convolution": (lambda: nn.Conv1d(64, 64, 3), []),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(40, 40))), []),
    "complex": (lambda: nn.Linear(40, 40, dtype=torch.complex64), []),
    "int8 already": (lambda: quantize_(nn.Linear(40, 40)), [""]),
    "nothing": (nn.Sequential, []),
}


@pytest.mark.parametrize("case", STAY)
def test_layers_that_cannot_be_replaced_stay(case):
    make, expected = STAY[case]
    module = make()
    kept = {p: m for p, m in module.named_modules() if p not in expected}
    replaced = quantize_(module)
    assert int8_of(replaced) == expected
    assert all(replaced.get_submodule(path) is m for path, m in kept.items())


def test_a_block_of_two_layers_computes_with_them():
    block = KroneckerFeedForward(
        KroneckerLinear(80, 160, (2, 2)), KroneckerLinear(160, 80, (2, 2)), "gelu"
    )
    x = torch.randn(3, 80)
    with torch.no_grad():
        exact = block(x, x)
        y = quantize_(block)(x, x)
    assert int8_of(block) == ["up", "down"]
    assert 0 < (y - exact).abs().max() < 0.1 * exact.abs().max()
    dequantize_(block)
    assert type(block.up) is KroneckerLinear
    block(x, x).sum().backward()


def test_a_layer_in_several_places_is_one_layer():
    layer = nn.Linear(40, 40)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(40, 40)})
    assert quantize_(model) is model
    assert model["a"] is model["b"][0] is not model["c"] and int8_of(model) == ["a", "c"]
    dequantize_(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0]


def test_hooks_are_lost_and_pruned_factors_are_those_of_the_moment():
    seen = []
    layer = nn.Linear(40, 40)
    layer.register_forward_hook(lambda *_: seen.append(1))
    quantize_(layer)(torch.randn(2, 40))
    assert not seen
    pruned = KroneckerLinear(80, 80, (2, 2))
    prune.random_unstructured(pruned, "b", amount=0.5)
    q = quantize_(nn.Sequential(pruned))[0]
    assert torch.equal(q.b == 0, q.dequantized().b == 0)
    assert (q.b == 0).sum() >= 800


def test_layers_are_kept_by_the_ends_of_their_names():
    def model():
        encoder = nn.ModuleDict({"up": nn.Linear(40, 40), "my_up": nn.Linear(40, 40)})
        return nn.ModuleDict({"encoder": encoder, "total": made("sum"), "up": nn.Linear(40, 40)})

    sums = ["total", "total.parts.0", "total.parts.1"]
    for keep, expected in (
        ((), ["encoder.up", "encoder.my_up", *sums, "up"]),
        (["up"], ["encoder.my_up", *sums]),
        (["encoder.up"], ["encoder.my_up", *sums, "up"]),
        (["parts.1"], ["encoder.up", "encoder.my_up", "up"]),  # a sum is kept as a whole
        (iter(["total", "my_up"]), ["encoder.up", "up"]),
    ):
        assert int8_of(quantize_(model(), keep=keep)) == expected
    module = model()
    with pytest.raises(
        ValueError, match=r"keep has 'pu', which is not a layer .* nearest are .*up"
    ):
        quantize_(module, keep=["up", "pu"])
    assert not int8_of(module)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(bad):
    model = nn.Sequential(nn.Linear(40, 40), made("sum"))
    with torch.no_grad():
        model[1].parts[1].b[3, 0, 4] = bad
    with pytest.raises(ValueError, match=r"1\.parts\.1\.b has 1 entries that are NaN or infinite"):
        quantize_(model)
    assert not int8_of(model)
    layer = nn.Linear(40, 40)
    layer.bias.data[0] = bad
    with pytest.raises(ValueError, match=r"^bias has 1 entries"):
        quantize_(layer)
    wide = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40, dtype=torch.float64))
    wide[1].weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match=r"1: the factor in float32 has 1 entries"):
        quantize_(wide)
    assert not int8_of(wide)


# --- how they are kept


@pytest.mark.parametrize("name", [*LAYERS, *TABLES])
def test_states_copies_and_pickles(name):
    q = quantize_(made(name))
    x = torch.arange(9) if name in TABLES else torch.randn(5, q.in_features)
    y, state = q(x), q.state_dict()
    assert not [key for key in state if key.endswith("like")]
    for key, t in state.items():
        scale = f"{key}_scale"
        assert (t.dtype == torch.int8) == (scale in state)
    other = quantize_(made(name))
    assert not torch.equal(other(x), y)
    other.load_state_dict(state)
    assert torch.equal(other(x), y)
    on_meta = quantize_(made(name, device="meta"))
    on_meta.load_state_dict(state, assign=True)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        torch.load(file, weights_only=False),
        copy.deepcopy(q).share_memory(),
        copy.deepcopy(q).train(),
    ):
        assert torch.equal(copied(x), y) and repr(copied) == repr(q)


@pytest.mark.parametrize("name", ["dense", "product", "sum", "table", "factorised"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_keep_their_bits_in_every_dtype(name, dtype):
    q = quantize_(made(name))
    before = {key: t.clone() for key, t in q.state_dict().items()}
    cast = copy.deepcopy(q).to(dtype)
    for key, t in cast.state_dict().items():
        if key.endswith("_scale") or t.dtype == torch.int8:
            assert torch.equal(t, before[key]) and t.dtype == before[key].dtype
        else:
            assert t.dtype == dtype
    x = torch.arange(9) if name in TABLES else torch.randn(5, q.in_features).to(dtype)
    assert cast(x).dtype == dtype
    back = cast.dequantized()
    assert all(p.dtype == dtype for p in back.parameters())
    again = cast.float()
    assert all(
        torch.equal(t, before[key]) for key, t in again.state_dict().items() if "scale" in key
    )


@pytest.mark.parametrize("name", ["dense", "sum", "factorised"])
def test_meta_and_empty_modules(name):
    q = quantize_(made(name))
    shapes = {key: (t.shape, t.dtype) for key, t in q.state_dict().items()}
    on_meta = copy.deepcopy(q).to("meta")
    assert all(t.is_meta for t in on_meta.state_dict().values())
    empty = on_meta.to_empty(device="cpu")
    assert {key: (t.shape, t.dtype) for key, t in empty.state_dict().items()} == shapes
    empty.load_state_dict(q.state_dict())
    x = torch.arange(9) if name in TABLES else torch.randn(5, q.in_features)
    assert torch.equal(empty(x), q(x))
    for m in empty.modules():
        if isinstance(m, QUANTIZED):
            m.reset_parameters()
    assert not empty(x).abs().sum()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_of_another_dtype_is_refused(strict, assign):
    layer = nn.Linear(40, 40)
    q = quantize_(nn.Sequential(layer))
    before, state = copy.deepcopy(q.state_dict()), q.state_dict()
    for wrong in (
        {f"0.{key}": t for key, t in layer.state_dict().items()}
        | {"0.weight_scale": q[0].weight_scale},
        state | {"0.weight": state["0.weight"].short()},
        state | {"0.weight_scale": state["0.weight_scale"].half()},
    ):
        with pytest.raises(
            RuntimeError, match=r"0\.weight.* is torch.*, but must be torch.*; load it into"
        ):
            q.load_state_dict(wrong, strict=strict, assign=assign)
        assert all(torch.equal(t, before[key]) for key, t in q.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_scale"):
        nn.Sequential(nn.Linear(40, 40)).load_state_dict(state)
    half = {key: t if "weight" in key else t.half() for key, t in state.items()}
    q.load_state_dict(half, strict=strict)  # a bias is cast, as in other modules


def test_a_wrong_shape_of_a_scale_is_refused():
    q = quantize_(nn.Linear(40, 48))
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        q.load_state_dict(q.state_dict() | {"weight_scale": torch.ones(40, 1)})
    q.weight_scale = torch.ones(1, 40)
    with pytest.raises(
        ValueError, match=r"scale must be float32 of shape \(1, 48, 1\) on cpu, got"
    ):
        q(torch.randn(2, 40))


def test_values_and_scales_are_read_at_each_call():
    q = quantize_(nn.Linear(40, 48, bias=False))
    x = torch.randn(2, 40)
    y = q(x)
    with torch.no_grad():
        q.weight_scale.mul_(2)
    assert torch.equal(q(x), 2 * y)
    q.weight = -q.weight
    assert torch.equal(q(x), -2 * y)
    assert type(q.factors[0]) is Int8Factor


def test_dequantising_leaves_other_modules():
    model = nn.Sequential(nn.Linear(4, 40), made("sum"), nn.ReLU(), made("table"))
    kept = model[0], model[2]
    quantize_(model)
    assert dequantize_(model) is model
    assert (model[0], model[2]) == kept and not int8_of(model)
    assert [type(m) for m in model[1].parts] == [KroneckerLinear] * 2
