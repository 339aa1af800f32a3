"""KroneckerBertConfig: presets, validation, saving."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig

from kron_kernels import KronShape
from kroneckerbert import KroneckerBertConfig, KroneckerBertModel
from kroneckerbert.presets import PRESETS


def parameters(config: KroneckerBertConfig, pooler: bool) -> int:
    with torch.device("meta"):
        return KroneckerBertModel(config, add_pooling_layer=pooler).num_parameters()


@pytest.mark.parametrize(
    ("name", "without_pooler", "with_pooler"),
    [
        ("kronecker-bert-8", 14_063_624, 14_654_216),
        ("kronecker-bert-21", 4_637_680, 5_228_272),
        ("kronecker-bert-5", 20_171_916, 20_762_508),
        ("kronecker-bert-19", 5_674_256, 6_264_848),
    ],
)
def test_a_preset_at_bert_base_has_the_published_number_of_parameters(
    name, without_pooler, with_pooler
):
    config = KroneckerBertConfig.preset(name)
    assert parameters(config, pooler=False) == without_pooler
    assert parameters(config, pooler=True) == with_pooler


def test_a_scaled_preset_keeps_the_small_factors():
    base = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=1)
    layer = "encoder.layer.0."

    shapes = KroneckerBertConfig.preset("kronecker-bert-8", base).kronecker_shapes()
    for linear in ("self.query", "self.key", "self.value", "output.dense"):
        assert shapes[f"{layer}attention.{linear}"] == [KronShape(192, 192, 2, 2)]
    assert shapes[f"{layer}intermediate.dense"] == [KronShape(8, 2, 192, 192)]
    assert shapes[f"{layer}output.dense"] == [KronShape(2, 8, 192, 192)]
    assert shapes["embeddings.word_embeddings"] == [KronShape(30522, 48, 1, 8)]

    shapes = KroneckerBertConfig.preset("kronecker-bert-21", base).kronecker_shapes()
    assert shapes[f"{layer}attention.self.key"] == [KronShape(192, 24, 2, 16)]
    assert shapes[f"{layer}intermediate.dense"] == [KronShape(16, 2, 96, 192)]
    assert shapes["embeddings.word_embeddings"] == [KronShape(30522, 24, 1, 16)]

    shapes = KroneckerBertConfig.preset("kronecker-bert-5", base).kronecker_shapes()
    assert shapes[f"{layer}intermediate.dense"] == [KronShape(192, 192, 8, 2, rank=4)]
    assert shapes["embeddings.word_embeddings"] == [KronShape(30522, 32, 1, 12)]


def test_a_scaled_preset_has_the_parameters_of_its_shapes():
    base = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    layer = 4 * (192**2 + 4) + 2 * (16 + 192**2) + (9 * 384 + 4 * 384)  # factors, biases and norms
    embeddings = 30522 * 48 + 8 + (512 + 2 + 2) * 384
    config = KroneckerBertConfig.preset("kronecker-bert-8", base)
    assert parameters(config, pooler=False) == embeddings + 6 * layer


@pytest.mark.parametrize("name", PRESETS)
def test_the_second_feed_forward_weight_has_the_first_ones_shapes_transposed(name):
    shapes = KroneckerBertConfig.preset(name).kronecker_shapes()
    w1, w2 = (shapes[f"encoder.layer.3.{n}"] for n in ("intermediate.dense", "output.dense"))
    assert w2 == [shape.transposed for shape in w1]


def test_suffixes_give_low_rank_of_at_most_the_parameters_of_the_products():
    products = KroneckerBertConfig.preset("kronecker-bert-8").kronecker_shapes()
    everything = ["words", "attention", "feed-forward"]
    for names in (["words"], ["words", "attention"], ["feed-forward"], everything):
        name = "".join(f"+low-rank-{n}" for n in names)
        shapes = KroneckerBertConfig.preset(f"kronecker-bert-8{name}").kronecker_shapes()
        for path, (shape,) in shapes.items():
            parts = {"embeddings": "words", "attention": "attention"}
            part = next((parts[key] for key in parts if key in path), "feed-forward")
            (product,) = products[path]
            if part not in names:
                assert shape == product
                continue
            one = shape.out_features + shape.in_features  # parameters of a rank
            assert shape.is_low_rank
            assert product.parameters - one < shape.parameters <= product.parameters
    assert shapes == KroneckerBertConfig.preset("kronecker-bert-8+low-rank").kronecker_shapes()


def test_an_unknown_suffix_is_refused():
    with pytest.raises(ValueError, match=r"ends in \+big; there are \+low-rank-words, "):
        KroneckerBertConfig.preset("kronecker-bert-8+low-rank-words+big")


def test_the_default_is_an_ordinary_dense_bert():
    config = KroneckerBertConfig()
    assert config.kronecker_factors == {}
    assert config.kronecker_shapes() == {}
    assert parameters(config, pooler=True) == 109_482_240


def test_all_other_fields_carry_over_from_the_base():
    base = BertConfig(
        vocab_size=100,
        num_hidden_layers=3,
        hidden_dropout_prob=0.3,
        pad_token_id=7,
        id2label={0: "no", 1: "yes", 2: "perhaps"},
        label2id={"no": 0, "yes": 1, "perhaps": 2},
        attn_implementation="eager",
        finetuning_task="mnli",  # a field that transformers does not declare
    )
    before = base.to_dict()
    config = KroneckerBertConfig.preset("kronecker-bert-21", base)
    assert base.to_dict() == before
    for field in ("vocab_size", "num_hidden_layers", "pad_token_id", "id2label", "label2id"):
        assert getattr(config, field) == getattr(base, field)
    assert config.hidden_dropout_prob == 0.3
    assert config.finetuning_task == "mnli"
    assert config._attn_implementation == "eager"
    assert config.model_type == "kronecker_bert"


def test_overrides_win_over_the_base():
    config = KroneckerBertConfig.preset(
        "kronecker-bert-8",
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=5,
        vocab_size=50,
    )
    assert config.num_labels == len(config.id2label) == 5
    assert config.kronecker_shapes()["embeddings.word_embeddings"] == [KronShape(50, 8, 1, 8)]
    assert config.kronecker_shapes()["encoder.layer.0.intermediate.dense"][0].m2 == 32


def test_a_configuration_survives_disk_dict_and_deepcopy(tmp_path):
    config = KroneckerBertConfig.preset("kronecker-bert-5", num_labels=3)
    config.save_pretrained(tmp_path)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() | {
        "id2label": {str(i): label for i, label in config.id2label.items()}
    }
    for other in (
        KroneckerBertConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        KroneckerBertConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
    ):
        assert type(other) is KroneckerBertConfig
        other.name_or_path = config.name_or_path  # where it was read from
        assert other.to_dict() == config.to_dict()
        assert other.kronecker_shapes() == config.kronecker_shapes()


def test_entries_are_copied_and_completed():
    given = {"intermediate.dense": {"a_shape": (8, 2)}}
    config = KroneckerBertConfig(kronecker_factors=given)
    assert config.kronecker_factors == {"intermediate.dense": {"a_shape": [8, 2], "rank": 1}}
    assert given == {"intermediate.dense": {"a_shape": (8, 2)}}
    config.kronecker_factors["intermediate.dense"]["rank"] = 3
    assert KroneckerBertConfig().kronecker_factors == {}


def test_the_longest_name_decides_and_none_means_dense():
    config = KroneckerBertConfig(
        num_hidden_layers=2,
        kronecker_factors={
            "output.dense": {"a_shape": [2, 8]},
            "attention.output.dense": None,
            "layer.1.output.dense": {"a_shape": [4, 4], "rank": 2},
            "bert.encoder.layer.0.attention.self.key": {"a_shape": [2, 2]},
        },
    )
    assert config.kronecker_shapes() == {
        "encoder.layer.0.attention.self.key": [KronShape(2, 2, 384, 384)],
        "encoder.layer.0.output.dense": [KronShape(2, 8, 384, 384)],
        "encoder.layer.1.output.dense": [KronShape(4, 4, 192, 768, rank=2)],
    }


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"attention.self.qurey": None}, "'attention.self.qurey'.* attention.self.query"),
        ({"self.query_": {"a_shape": [2, 2]}}, "not a layer that can be factorised"),
        ({"uery": {"a_shape": [2, 2]}}, "not a layer that can be factorised"),  # not cut at a dot
        ({"layer.12.output.dense": None}, "not a layer .* the nearest are layer"),
        ({"pooler.dense": {"a_shape": [2, 2]}}, "not a layer that can be factorised"),
        ({"intermediate.dense": 3}, r"= 3 must look like \{"),
        ({"intermediate.dense": {"rank": 3}}, "must look like"),
        ({"intermediate.dense": {"a_shape": [8, 2], "rnk": 3}}, "'rnk': 3} must look like"),
        ({"intermediate.dense": []}, "is an empty list; write None for a dense layer"),
        ({"intermediate.dense": {"a_shape": [8]}}, r"must look like .* two integers \(m1, n1\)"),
        ({"intermediate.dense": {"a_shape": "8x2"}}, "'8x2' must be two integers"),
        (
            {"intermediate.dense": {"a_shape": [8, 0]}},
            r"a_shape\[1\] = 0 is the factor.s columns, at least 1",
        ),
        ({"intermediate.dense": {"a_shape": [8, 2.0]}}, r"a_shape\[1\] = 2.0 must be an integer"),
        ({"intermediate.dense": {"a_shape": [8, 2], "rank": True}}, "rank = True must be an inte"),
        ({"intermediate.dense": {"a_shape": [8, 2], "rank": 0}}, "rank = 0, .* use rank=1"),
        ({"intermediate.dense": {"a_shape": [5, 2]}}, "3072 rows .* 5; nearest .* 4 and 6"),
        ({"intermediate.dense": {"a_shape": [8, 7]}}, "768 columns .* 7; nearest"),
        ({"word_embeddings": {"a_shape": [2, 96]}}, r"use a_shape = \[30522, 96\]"),
    ],
)
def test_a_wrong_entry_is_refused_with_the_remedy(factors, message):
    with pytest.raises(ValueError, match=message):
        KroneckerBertConfig(kronecker_factors=factors)


@pytest.mark.parametrize("factors", ["oops", {3: None}])
def test_a_wrong_type_is_refused_by_transformers(factors):
    with pytest.raises(StrictDataclassFieldValidationError, match="kronecker_factors"):
        KroneckerBertConfig(kronecker_factors=factors)


@pytest.mark.parametrize(
    "change",
    [
        {"kronecker_factors": {"attention.self.qurey": None}},
        {"kronecker_factors": {"intermediate.dense": {"a_shape": [5, 2]}}},
        {"hidden_size": 60},
    ],
)
def test_a_change_after_construction_is_checked_when_the_model_is_built(change):
    config = KroneckerBertConfig.preset("kronecker-bert-8", num_hidden_layers=1)
    for field, value in change.items():
        setattr(config, field, value)
    with torch.device("meta"), pytest.raises(ValueError, match="kronecker_factors"):
        KroneckerBertModel(config)


def test_an_unknown_preset_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="'kronecker-bert-9'; there are kronecker-bert-8, "):
        KroneckerBertConfig.preset("kronecker-bert-9")


def test_a_misspelt_override_is_refused():
    with pytest.raises(TypeError, match=r"'hiden_size' is not a field .*'hidden_size'"):
        KroneckerBertConfig.preset("kronecker-bert-8", hiden_size=64)


def test_a_preset_refuses_widths_that_its_small_factors_do_not_divide():
    with pytest.raises(ValueError, match="word_embeddings has 312 columns, not divisible by 16"):
        KroneckerBertConfig.preset("kronecker-bert-21", BertConfig(hidden_size=312))


def test_a_dense_configuration_is_refused_with_the_way_to_compress(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type = 'bert'.*kroneckerbert\.compress"):
        KroneckerBertConfig.from_pretrained(tmp_path)
