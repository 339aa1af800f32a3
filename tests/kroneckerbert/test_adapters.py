"""LoRA on Kronecker layers: targets, training, merging, saving and refusals."""

import copy
import importlib
import sys

import pytest
import torch
from tiny import tiny_config
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from kron_kernels import KroneckerEmbedding, KroneckerLinear, KroneckerSum
from kron_kernels.plan import Plan
from kron_kernels.testing import assert_close
from kroneckerbert import KroneckerBertConfig, KroneckerBertForSequenceClassification, compress

peft = pytest.importorskip("peft", reason="pip install 'kron-kernels[peft]'")

from kroneckerbert.adapters import (  # noqa: E402
    LoraKroneckerLinear,
    load_adapter,
    lora_config,
    merge_and_unload,
)

BASE = tiny_config(intermediate_size=128, num_labels=3)
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def model() -> KroneckerBertForSequenceClassification:
    # The query of one layer is a sum already, the key of one is dense.
    factors = KroneckerBertConfig.preset("kronecker-bert-8", BASE).kronecker_factors | {
        "layer.0.attention.self.query": [{"a_shape": [16, 16], "rank": 1}, {"a_shape": [4, 8]}],
        "layer.1.attention.self.key": None,
    }
    config = KroneckerBertConfig.from_dense(BASE, factors, initializer_range=0.2)
    return KroneckerBertForSequenceClassification(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(64, (4, 9)), "attention_mask": mask}


def adapted(model, names=("default",), **options) -> peft.PeftModel:
    """With adapters that change the outputs: B, which starts at zero, is drawn."""
    config = lora_config(model, **{"r": 3, "lora_alpha": 7, **options})
    wrapped = peft.get_peft_model(model, config, names[0])
    for name in names[1:]:
        other = {**options, "target_modules": config.target_modules, "r": 2}
        wrapped.add_adapter(name, lora_config(**other))
    for path, parameter in wrapped.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    wrapped.base_model.set_adapter(list(names))
    return wrapped.eval()


def layers(model) -> list[LoraKroneckerLinear]:
    return [m for m in model.modules() if isinstance(m, LoraKroneckerLinear)]


def logits(model, batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).logits


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of sums: two layers of products of up to 128 terms."""
    assert_close(name, actual, expected.double(), terms=2 * 6 * 128, scale=1.0)


def test_all_linear_is_every_linear_layer_but_the_head(model):
    found = lora_config(model).target_modules

    linear = KroneckerLinear | KroneckerSum | nn.Linear
    outside = {
        n for n, m in model.bert.named_modules() if isinstance(m, linear) and "parts" not in n
    }
    assert found == {f"bert.{name}" for name in outside}
    assert QUERY in found and "bert.pooler.dense" in found and "classifier" not in found
    assert len(found) == 2 * 6 + 1


def test_all_linear_of_an_adapted_model_is_the_same_layers(model):
    first = lora_config(model)
    inner = peft.get_peft_model(model, first).base_model.model

    assert lora_config(inner).target_modules == first.target_modules


def test_all_linear_needs_a_model():
    with pytest.raises(ValueError, match=r"lora_config\(model\).*target_modules=\['query'"):
        lora_config()


def test_layers_by_name(model):
    wrapped = peft.get_peft_model(model, lora_config(target_modules=["query"], r=2))

    assert [m.out_features for m in layers(wrapped)] == [32, 32]


def test_adapters_add_their_product(model):
    layer = layers(adapted(model, use_rslora=True, lora_bias=True))[0]
    nn.init.normal_(layer.lora_B["default"].bias)
    x = torch.randn(5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]

    added = 7 / 3**0.5 * (x @ a.mT @ b.weight.mT + b.bias)
    assert_same("y", layer(x), layer.base_layer(x) + added)


def test_adapters_learn_and_nothing_else_does(model, batch):
    wrapped = peft.get_peft_model(model, lora_config(model, r=4, lora_dropout=0.1))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam((p for p in wrapped.parameters() if p.requires_grad), lr=1e-2)
    labels = torch.tensor([0, 1, 2, 1])

    def loss():
        return wrapped(**batch, labels=labels).loss

    first = loss().item()
    wrapped.train()
    for _ in range(60):
        loss().backward()
        graded = {name for name, p in wrapped.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()

    assert graded == {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert wrapped.eval() and loss().item() < 0.5 * first
    after = model.state_dict()
    assert all(torch.equal(after[name], old) for name, old in before.items() if "lora_" not in name)


def test_dropout_applies_to_the_adapters_only(model):
    torch.manual_seed(1)
    layer = layers(adapted(model, lora_dropout=0.5))[0].train()
    x = torch.randn(5, 32)

    assert not torch.equal(layer(x), layer(x))
    layer.set_adapter([])
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(model, batch, safe):
    wrapped = adapted(model, ("one", "two"))
    expected = logits(wrapped, batch)
    plain = [layer.base_layer for layer in layers(wrapped)]

    wrapped.merge_adapter(safe_merge=safe)

    merged = [layer.base_layer for layer in layers(wrapped)]
    assert all(isinstance(layer, KroneckerSum) for layer in merged)
    assert [p.shape.rank for p in merged[0].parts] == [1, 1, 3 + 2]
    assert merged[0].parts[0].a is plain[0].parts[0].a  # shared, not copied
    assert_same("logits", logits(wrapped, batch), expected)

    wrapped.unmerge_adapter()
    assert all(now.base_layer is p for now, p in zip(layers(wrapped), plain, strict=True))
    # peft unmerges the dense key by subtraction, hence not exactly.
    assert_same("unmerged", logits(wrapped, batch), expected)


def test_merging_one_after_the_other(model):
    layer = layers(adapted(model, ("one", "two")))[-1]
    x = torch.randn(5, layer.in_features)
    expected, base = layer(x), layer.base_layer

    layer.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="Already following adapters"):
        layer.merge(adapter_names=["two"])

    assert layer.merged_adapters == ["one", "two"]
    assert_same("y", layer(x), expected)
    layer.unmerge()
    assert layer.base_layer is base and not layer.merged


def test_disabled_adapters_are_absent(model, batch):
    expected = logits(model, batch)
    wrapped = adapted(model)
    assert not torch.allclose(logits(wrapped, batch), expected, atol=1e-3)

    with wrapped.disable_adapter():
        assert_same("logits", logits(wrapped, batch), expected)


def test_merge_and_unload_gives_a_model_that_saves_and_loads(model, batch, tmp_path):
    expected_type = type(model)
    wrapped = adapted(model, lora_bias=True)
    for layer in layers(wrapped):
        nn.init.normal_(layer.lora_B["default"].bias)
    expected = logits(wrapped, batch)

    merged = merge_and_unload(wrapped)

    assert type(merged) is expected_type and not layers(merged)
    assert not any("lora" in name for name in merged.state_dict())
    assert isinstance(merged.bert.encoder.layer[1].attention.self.key, nn.Linear)
    sums = [m for m in merged.modules() if isinstance(m, KroneckerSum)]
    assert len(sums) == 11 and all(s.parts[-1].shape.n1 == 1 for s in sums)
    assert_same("merged", logits(merged, batch), expected)

    merged.save_pretrained(tmp_path)
    again = expected_type.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(merged, batch))


@pytest.mark.parametrize("dense_class", [BertModel, BertForSequenceClassification])
def test_a_planned_model_saves_and_loads_when_it_is_merged(dense_class, batch, tmp_path):
    names = ("attention.self.query", "intermediate.dense")
    prefix = "bert." if dense_class is BertForSequenceClassification else ""
    factors = {
        f"{prefix}encoder.layer.{i}.{name}": [{"a_shape": [4, 4], "rank": 2}]
        for i in range(2)
        for name in names
    }
    planned = Plan(factors, [], {}, {}, {}, "error")
    student = compress(dense_class(BASE).eval(), planned)
    merged = merge_and_unload(adapted(student))
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert sum(isinstance(m, KroneckerSum) for m in again.modules()) == 4
    with torch.inference_mode():
        assert torch.equal(again(**batch)[0], merged(**batch)[0])


def test_a_bias_that_is_trained_is_still_so_when_merged(model):
    wrapped = adapted(model, lora_bias=True)
    for name, p in wrapped.named_parameters():
        p.requires_grad_(name.endswith("base_layer.bias"))
    merged = merge_and_unload(wrapped)
    sums = [m for m in merged.modules() if isinstance(m, KroneckerSum)]
    assert sums and all(
        {n for n, p in m.named_parameters() if p.requires_grad} == {"bias"} for m in sums
    )


def test_adapters_save_and_load(model, batch, tmp_path):
    base = copy.deepcopy(model)
    wrapped = adapted(model)
    wrapped.save_pretrained(tmp_path)

    loaded = load_adapter(base, tmp_path).eval()

    assert len(layers(loaded)) == 11
    assert torch.equal(logits(loaded, batch), logits(wrapped, batch))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = load_adapter(copy.deepcopy(merge_and_unload(loaded)), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, _ in again.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_the_dtype_of_their_layer(model, dtype):
    """peft reads the dtype of a dense weight: without one, a second adapter stays in float32."""
    model = model.to(dtype)
    wrapped = peft.get_peft_model(model, lora_config(model), autocast_adapter_dtype=False)
    wrapped.add_adapter("two", lora_config(target_modules=["query"], r=2))

    layer = wrapped.get_submodule(f"base_model.model.{QUERY}")
    assert layer.lora_A["default"].weight.dtype == dtype
    layer.merge()
    assert {p.dtype for p in layer.base_layer.parameters()} == {dtype}


def test_safe_merge_refuses_nan(model):
    layer = layers(adapted(model))[0]
    base = layer.base_layer
    layer.lora_B["default"].weight.data[0, 0] = float("nan")

    with pytest.raises(ValueError, match="default has NaN"):
        layer.merge(safe_merge=True)
    assert layer.base_layer is base and not layer.merged


def test_variants_that_read_the_dense_weight_are_refused(model):
    with pytest.raises(ValueError, match=r"'pissa' starts from the dense weight.*'gaussian'"):
        peft.get_peft_model(model, lora_config(model, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(model, lora_config(target_modules=["value"], use_dora=True))


def test_embeddings_are_refused(model):
    assert isinstance(model.get_input_embeddings(), KroneckerEmbedding)
    with pytest.raises(ValueError, match=r"word_embeddings is a KroneckerEmbedding.*leave it out"):
        peft.get_peft_model(model, lora_config(target_modules=["word_embeddings"]))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "kroneckerbert.adapters")
    with pytest.raises(ImportError, match=r"pip install 'kron-kernels\[peft\]'"):
        importlib.import_module("kroneckerbert.adapters")
