"""Distillation on tiny random BERTs: the loss against loops, the trainer against its traps."""

import collections
import copy
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    TrainerCallback,
)

from kroneckerbert.distillation import (
    TERMS,
    DistillationConfig,
    DistillationTrainer,
    attention_scores,
    cache,
    clock,
    distillation_terms,
    scores,
)
from kroneckerbert.distillation import trainer as trainer_module
from kroneckerbert.distillation.pairing import layer_pairs

LENGTHS = (7, 1, 4)  # real tokens of the three sequences of `padded_batch`
HEADS = (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForPreTraining,
)
LAYERWISE = ("embedding", "attention", "hidden", "logits", "labels")  # terms of models with heads
OPTIONAL = ("logits", "labels", "sentence", "relation")
ALL = {**dict.fromkeys(TERMS, 1.0), **dict.fromkeys(OPTIONAL)}


def bert(cls=BertModel, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "vocab_size": 40, "intermediate_size": 32}
    sizes |= {"num_labels": 2 if cls is BertForQuestionAnswering else 3}
    # Ten times the usual spread, or the scores of so narrow a model are all nearly 0.
    return tiny_bert(cls, **sizes | {"initializer_range": 0.2} | overrides)


def perturbed(teacher, by: float = 0.05):
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return student


def padded_batch(width: int = 8, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (len(LENGTHS), 8), generator=torch.Generator().manual_seed(2))
    ids = torch.nn.functional.pad(ids, (0, width - 8))
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids.where(mask == 1, padding), "attention_mask": mask}


def dataset(n: int = 16, length: int = 8, **columns) -> list[dict]:
    ids = torch.randint(1, 40, (n, length), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return [row | {k: v[i] for k, v in columns.items()} for i, row in enumerate(rows)]


def trainer(tmp_path, student, teacher, data=None, **options) -> DistillationTrainer:
    extra = {
        k: options.pop(k) for k in ("eval_dataset", "callbacks", "data_collator") if k in options
    }
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1} | options
    options = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True} | options
    args = DistillationConfig(output_dir=str(tmp_path), **options)
    return DistillationTrainer(student, teacher, args, train_dataset=data or dataset(), **extra)


def outputs(model, batch):
    with attention_scores(model):
        return model(**batch, output_hidden_states=True, output_attentions=True)


def terms(student, teacher, batch, weights=ALL, **options) -> dict[str, Tensor]:
    s, t = outputs(student, batch), outputs(teacher, batch)
    return distillation_terms(s, t, batch["attention_mask"], weights, **options)


def scores_by_hand(model, hidden_states) -> list[Tensor]:
    """Q Kᵀ / √d of every layer from the projections' own weights, (batch, heads, seq, seq)."""
    scores = []
    for layer, x in zip(model.base_model.encoder.layer, hidden_states[:-1], strict=True):
        attention = layer.attention.self
        q, k = (
            (x @ p.weight.mT + p.bias).unflatten(-1, (4, 4)).transpose(1, 2)
            for p in (attention.query, attention.key)
        )
        scores.append(q @ k.mT / math.sqrt(4))
    return scores


def log_histories(runs):
    return [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]


def assert_same_weights(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# The loss


@torch.no_grad()
def naive_terms(student, teacher, batch, temperature) -> dict[str, float]:
    """Every sequence alone and unpadded through eager float64 models; then loops."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    for model in (student, teacher):
        model.config._attn_implementation = "eager"
    runs = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[: int(mask.sum())][None]
        s, t = (m(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
        scores = [scores_by_hand(m, o.hidden_states) for m, o in ((student, s), (teacher, t))]
        runs.append((s, t, scores))

    def mse(pairs) -> float:
        errors = torch.cat([(a - b).square().flatten() for a, b in pairs])
        return float(errors.sum() / len(errors))

    def kl(a, b) -> Tensor:
        a, b = log_softmax(a / temperature, -1), log_softmax(b / temperature, -1)
        return ((b.exp() * (b - a)).sum(-1) * temperature**2).flatten()

    total = {"embedding": mse([(s.hidden_states[0], t.hidden_states[0]) for s, t, _ in runs])}
    total["hidden"] = total["attention"] = 0.0
    for layer in range(2):
        total["hidden"] += mse(
            [(s.hidden_states[layer + 1], t.hidden_states[layer + 1]) for s, t, _ in runs]
        )
        total["attention"] += mse([(ours[layer], theirs[layer]) for _, _, (ours, theirs) in runs])
    names = [name for name in runs[0][0] if name.endswith("logits")]
    if names:
        means = [torch.cat([kl(s[n], t[n]) for s, t, _ in runs]).mean() for n in names]
        total["logits"] = float(sum(means) / (2 if "start_logits" in names else 1))
    return total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("cls", [BertModel, *HEADS])
def test_terms_are_means_over_real_positions_as_by_loops_in_float64(cls, temperature):
    teacher, student, batch = bert(cls), bert(cls, seed=1), padded_batch()
    got = terms(student, teacher, batch, temperature=temperature)
    want = naive_terms(student, teacher, batch, temperature)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("cls", HEADS)
def test_padding_changes_no_term(cls):
    teacher, student = bert(cls), bert(cls, seed=1)
    want = terms(student, teacher, padded_batch())
    for batch in (padded_batch(padding=17), padded_batch(width=13)):
        for name, value in terms(student, teacher, batch).items():
            torch.testing.assert_close(value, want[name], msg=name)


@pytest.mark.parametrize("cls", HEADS)
def test_a_student_identical_to_its_teacher_has_terms_of_exactly_zero(cls):
    teacher = bert(cls)
    got = terms(copy.deepcopy(teacher), teacher, padded_batch())
    assert {name: value.item() for name, value in got.items()} == dict.fromkeys(got, 0.0)
    assert set(got) == set(LAYERWISE) - {"labels"}


def test_a_regression_compares_logits_by_mean_squared_error():
    for options in ({"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}):
        teacher, student = (bert(BertForSequenceClassification, seed, **options) for seed in (0, 1))
        batch = padded_batch()
        got = terms(student, teacher, batch, problem_type=options.get("problem_type"))["logits"]
        want = (student(**batch).logits - teacher(**batch).logits).square().mean()
        torch.testing.assert_close(got, want)


def test_multi_label_logits_are_compared_label_by_label():
    teacher, student = (bert(BertForSequenceClassification, seed) for seed in (0, 1))
    batch = padded_batch()
    got = terms(student, teacher, batch, problem_type="multi_label_classification")["logits"]
    s, t = student(**batch).logits.double(), teacher(**batch).logits.double()
    p = t.sigmoid()
    want = p * (logsigmoid(t) - logsigmoid(s)) + (1 - p) * (logsigmoid(-t) - logsigmoid(-s))
    torch.testing.assert_close(got.double(), want.mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "term, reached, not_reached",
    [
        ("embedding", ["word_embeddings"], ["encoder", "pooler", "classifier"]),
        ("attention",
         ["word_embeddings", "0.output", "1.attention.self.query", "1.attention.self.key"],
         ["1.attention.self.value", "1.output", "pooler", "classifier"]),
        ("hidden",
         ["word_embeddings", "1.attention.self.value", "1.output"],
         ["pooler", "classifier"]),
        ("logits", ["word_embeddings", "1.output", "pooler", "classifier"], []),
        ("labels", ["word_embeddings", "1.output", "pooler", "classifier"], []),
    ],
)  # fmt: skip
def test_each_term_has_a_gradient_for_the_weights_it_depends_on(term, reached, not_reached):
    student = bert(BertForSequenceClassification, seed=1)
    batch = padded_batch() | {"labels": torch.tensor([0, 1, 2])}
    weights = dict.fromkeys(TERMS, 0.0) | {term: 1.0}
    got = terms(student, bert(BertForSequenceClassification), batch, weights)
    assert list(got) == [term]
    got[term].backward()
    for name, p in student.named_parameters():
        if any(part in name for part in reached):
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        if any(part in name for part in not_reached):
            assert p.grad is None, name


def test_multiple_choice_masks_are_flattened_as_the_model_flattens_them():
    teacher, student, batch = bert(), bert(seed=1), padded_batch()
    s, t = outputs(student, batch), outputs(teacher, batch)
    mask = batch["attention_mask"]
    want = distillation_terms(s, t, mask, ALL)
    assert distillation_terms(s, t, mask[None], ALL) == want


def test_a_mask_of_pairs_of_tokens_is_refused():
    teacher, batch = bert(), padded_batch()
    out = outputs(teacher, batch)
    with pytest.raises(
        ValueError, match=r"attention_mask must be .* = \(3, 8\), got \(3, 1, 8, 8\)"
    ):
        distillation_terms(out, out, torch.ones(3, 1, 8, 8), ALL)


# Attention scores


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_are_those_of_the_projections_and_outputs_those_of_eager(implementation):
    model, batch = bert(attn_implementation=implementation), padded_batch()
    got = outputs(model, batch)
    assert model.config._attn_implementation == implementation
    for mine, by_hand in zip(got.attentions, scores_by_hand(model, got.hidden_states), strict=True):
        assert mine.shape == (3, 4, 8, 8)
        torch.testing.assert_close(mine, by_hand)
    model.config._attn_implementation = "eager"
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[real], model(**batch).last_hidden_state[real])


def test_scores_are_not_computed_unless_asked_for():
    model, batch = bert(), padded_batch()
    with attention_scores(model):
        assert "attentions" not in model(**batch)
        matmuls = matmuls_in(lambda: model(**batch))
    assert matmuls_in(lambda: outputs(model, batch)) == matmuls + 2


def matmuls_in(call) -> int:
    with torch.profiler.profile() as profile:
        call()
    return sum(e.count for e in profile.key_averages() if e.key == "aten::bmm")


def test_a_default_model_has_an_attention_loss_and_stock_attentions_are_refused(tmp_path):
    student, teacher, batch = bert(seed=1), bert(), padded_batch()
    assert student.config._attn_implementation == "sdpa"
    run = trainer(tmp_path, student, teacher)
    run.train()
    assert all(log["loss_attention"] > 1e-3 for log in run.state.log_history[:-1])

    # Stock sdpa returns an empty tuple, over which a sum would be exactly 0.
    s, t = (
        m(**batch, output_attentions=True, output_hidden_states=True) for m in (student, teacher)
    )
    with pytest.raises(ValueError, match="must return attentions; got 0 and 0"):
        distillation_terms(s, t, batch["attention_mask"], ALL)


# The trainer


def test_logged_terms_add_up_to_the_logged_loss(tmp_path):
    student, teacher = bert(BertForMaskedLM, seed=1), bert(BertForMaskedLM)
    data = dataset(labels=torch.randint(40, (16, 8)))
    weights = dict(zip(LAYERWISE, (0.5, 2.0, 1.0, 3.0, 0.25), strict=True))
    run = trainer(
        tmp_path, student, teacher, data, gradient_accumulation_steps=2, logging_steps=2,
        **{f"{name}_weight": w for name, w in weights.items()},
    )  # fmt: skip
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        total = sum(w * log[f"loss_{name}"] for name, w in weights.items())
        assert log["loss"] == pytest.approx(total, rel=1e-5)


def test_layer_terms_are_relative_to_the_teachers_variances_in_the_first_step(tmp_path):
    student, teacher = bert(seed=1), bert()
    data = ragged(8)
    run = trainer(tmp_path, student, teacher, data, max_steps=1, gradient_accumulation_steps=2)
    before = copy.deepcopy(student)
    run.train()
    batch = padded(data)
    s, t = outputs(before, batch), outputs(teacher, batch)
    real = batch["attention_mask"].bool()
    pairs = (real[:, :, None] & real[:, None, :])[:, None].expand(-1, 4, -1, -1)
    kept = {
        "embedding": [(s.hidden_states[0][real], t.hidden_states[0][real])],
        "hidden": [
            (a[real], b[real])
            for a, b in zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
        ],
        "attention": [
            (a[pairs], b[pairs]) for a, b in zip(s.attentions, t.attentions, strict=True)
        ],
    }
    for name, layers in kept.items():
        want = sum((a - b).square().mean() / b.var(correction=0) for a, b in layers)
        assert run.state.log_history[0][f"loss_{name}"] == pytest.approx(want.item(), rel=1e-4)


def test_a_teacher_whose_states_are_all_alike_divides_by_one(tmp_path):
    teacher = bert()
    with torch.no_grad():
        teacher.embeddings.LayerNorm.weight.zero_()
        teacher.embeddings.LayerNorm.bias.fill_(3.0)
    run = trainer(tmp_path, bert(seed=1), teacher, max_steps=1)
    run.train()
    assert run._variances["hidden_states"][0] == 1
    assert math.isfinite(run.state.log_history[0]["loss"])


def test_a_term_that_is_nearly_all_of_the_loss_is_named_once(tmp_path):
    run = trainer(tmp_path, bert(seed=1), bert(), attention_weight=1000.0)
    with pytest.warns(
        UserWarning, match="% of the loss is the attention term.*Lower attention_we"
    ) as seen:
        run.train()
    assert len([w for w in seen if "of the loss" in str(w.message)]) == 1


@pytest.mark.parametrize("max_minutes", [None, 60.0])
def test_a_warm_up_takes_at_most_half_of_the_steps(max_minutes, tmp_path):
    options = {"max_steps": 4, "warmup_steps": 200, "max_minutes": max_minutes}
    run = trainer(tmp_path, bert(seed=1), bert(), logging_steps=1, **options)
    run.train()
    peak = run.args.learning_rate
    rates = [log["learning_rate"] for log in run.state.log_history if "loss" in log]
    assert rates == pytest.approx([0, peak / 2, peak, peak / 2], rel=1e-3)


def test_core_hours_go_on_in_a_resumed_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, bert(seed=1), bert(), **options).train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    found = json.loads(state.read_text())
    found["log_history"][-1]["core_hours"] = 5.0
    state.write_text(json.dumps(found))
    (tmp_path / "checkpoint-2" / "checksums.json").unlink()
    run = trainer(tmp_path, bert(seed=1), bert(), **options)
    with pytest.warns(UserWarning, match="has no checksums"):
        run.train(str(tmp_path / "checkpoint-2"))
    hours = [log["core_hours"] for log in run.state.log_history if "core_hours" in log]
    assert hours[-1] > hours[-2] >= 5.0


def test_a_term_of_weight_zero_is_not_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "attention_scores", None)  # calling it would raise
    seen = []
    student, teacher = bert(seed=1), bert()
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
    run = trainer(tmp_path, student, teacher, attention_weight=0.0, max_steps=1)
    run.train()
    assert "loss_attention" not in run.state.log_history[0]
    # The teacher's first pass is for its variances.
    assert [kw["output_attentions"] for kw in seen] == [False, False, False]


def test_evaluation_needs_no_labels_and_reports_every_term(tmp_path):
    student, teacher = bert(BertForMaskedLM, seed=1), bert(BertForMaskedLM)
    data = [{k: v[0] for k, v in padded_batch().items()}] * 3 + dataset(8)  # uneven last batch
    run = trainer(tmp_path, student, teacher, per_device_eval_batch_size=4, eval_dataset=data)
    metrics = run.evaluate()
    terms = [metrics[f"eval_loss_{name}"] for name in LAYERWISE if name != "labels"]
    assert metrics["eval_loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert "eval_loss_labels" not in metrics
    again = run.evaluate()  # the means are reset
    assert again["eval_loss_hidden"] == metrics["eval_loss_hidden"]


def test_predictions_are_the_students_logits_and_nothing_captured(tmp_path):
    teacher = bert(BertForSequenceClassification)
    student = perturbed(teacher)
    data = dataset(labels=torch.arange(16) % 3)
    run = trainer(tmp_path, student, teacher, data)
    prediction = run.predict(data)
    rows = torch.stack([row["input_ids"] for row in data])
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), student(rows).logits)
    assert prediction.label_ids.tolist() == [i % 3 for i in range(16)]


def test_stage_two_uses_logits_and_labels_and_lowers_the_loss(tmp_path):
    teacher = bert(BertForSequenceClassification)
    data = dataset(32, labels=torch.arange(32) % 3)
    run = trainer(
        tmp_path, perturbed(teacher, by=0.2), teacher, data, max_steps=30, learning_rate=1e-2
    )
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert {f"loss_{name}" for name in LAYERWISE} <= logs[0].keys()
    assert logs[-1]["loss"] < logs[0]["loss"] / 2
    assert logs[-1]["loss_logits"] < logs[0]["loss_logits"]


def test_a_span_task_trains_on_both_ends(tmp_path):
    student, teacher = bert(BertForQuestionAnswering, seed=1), bert(BertForQuestionAnswering)
    positions = torch.arange(16) % 8
    data = dataset(start_positions=positions, end_positions=positions)
    run = trainer(tmp_path, student, teacher, data)
    run.train()
    assert {f"loss_{name}" for name in LAYERWISE} <= run.state.log_history[0].keys()


def ragged(n: int = 32, **columns) -> list[dict]:
    """Rows of 1 to 8 tokens, so that batches differ in how much of them is real."""
    rows = dataset(n, **columns)
    for i, row in enumerate(rows):
        row["attention_mask"][1 + 5 * i % 8 :] = 0
    return rows


def token_labels(n: int = 32) -> Tensor:
    """Few, some rows without any, as masked language modelling has them."""
    labels = torch.randint(0, 3, (n, 8), generator=torch.Generator().manual_seed(4))
    chosen = torch.rand(n, 8, generator=torch.Generator().manual_seed(5)) < 0.15
    return labels.where(chosen, -100)


UNEVEN = {
    BertForSequenceClassification: lambda: {"labels": torch.arange(32) % 3},
    BertForTokenClassification: lambda: {"labels": token_labels()},
    BertForMaskedLM: lambda: {"labels": token_labels()},
    BertForPreTraining: lambda: {
        "labels": token_labels(),
        "next_sentence_label": torch.arange(32) % 2,
    },
    BertForQuestionAnswering: lambda: dict.fromkeys(
        ("start_positions", "end_positions"), torch.zeros(32, dtype=torch.long)
    ),
    BertModel: dict,
}
EXACT = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0, "max_steps": 3}


@pytest.mark.parametrize("cls", UNEVEN)
def test_accumulation_equals_one_large_batch_however_batches_differ(tmp_path, cls):
    teacher, runs = bert(cls), []
    for size in (16, 4, 1):
        run = trainer(
            tmp_path,
            perturbed(teacher),
            teacher,
            ragged(**UNEVEN[cls]()),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            **EXACT,
        )
        run.train()
        runs.append(run)
    for run in runs[1:]:
        # float32 sums of at most 1,024 terms in another order, over 3 steps.
        assert_same_weights(runs[0].model, run.model, rtol=2e-5, atol=2e-6)
        for a, b in zip(runs[0].state.log_history, run.state.log_history, strict=True):
            for name in (name for name in a if name.startswith("loss")):
                assert b[name] == pytest.approx(a[name], rel=2e-5, abs=1e-7), name


def test_a_students_layers_are_taught_by_the_layers_that_the_map_names():
    assert layer_pairs("uniform", 2, 6) == [3, 6]
    assert layer_pairs("uniform", 4, 6) == [2, 3, 5, 6]
    assert layer_pairs("uniform", 6, 6) == [1, 2, 3, 4, 5, 6]
    assert layer_pairs("first", 2, 6) == [1, 2]
    assert layer_pairs("last", 2, 6) == [5, 6]
    assert layer_pairs([6, 2, 2], 3, 6) == [6, 2, 2]
    for layers, depth, message in (
        ([0, 1], 2, "must name a layer of the teacher, 1 to 6"),
        ([1, 2], 3, "for each of the student's 3"),
        ("middle", 2, "must be a list or one of"),
        ("uniform", 7, "the student has 7 layers and the teacher 6"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_pairs(layers, depth, 6)


@pytest.mark.parametrize("layer_map, taught", [("uniform", 2), ("first", 1), ("1", 1), ([2], 2)])
def test_a_shallower_student_learns_from_the_mapped_layers_only(tmp_path, layer_map, taught):
    teacher = bert()
    student = bert(num_hidden_layers=1)  # the teacher's own beginning
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.embeddings.word_embeddings.weight.data += 0.01
    run = trainer(tmp_path, student, teacher, layer_map=layer_map, max_steps=1)
    run.train()
    student.eval()
    batch = padded_batch()
    want = terms(student, teacher, batch, layer_map=run.args.layer_map)
    s, t = outputs(student, batch), outputs(teacher, batch)
    real = batch["attention_mask"].bool()
    by_hand = (s.hidden_states[1] - t.hidden_states[taught])[real].square().mean()
    torch.testing.assert_close(want["hidden"], by_hand)


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """Rows of any length as a batch."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    return {k: pad(v) if v[0].ndim else torch.stack(v) for k, v in columns.items()}


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForQuestionAnswering])
def test_a_cached_teacher_teaches_like_the_teacher_itself(tmp_path, cls):
    # Wider than any length or number of layers, which no axis may be mistaken for.
    teacher, histories = bert(cls, num_hidden_layers=3), []
    data = ragged(**UNEVEN[cls]())
    for row in data:  # unpadded; batches are padded to the longest
        real = row["attention_mask"].bool()
        row |= {name: row[name][real] for name in ("input_ids", "attention_mask")}
    for cached in (None, tmp_path / "cache", tmp_path / "cache"):
        student = perturbed(teacher)
        if len(histories) == 2:
            teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked"))
        options = {"teacher_cache": cached and str(cached), "max_steps": 16}
        options["data_collator"] = padded
        run = trainer(tmp_path / "run", student, teacher, data, **options)
        run.train()
        histories.append(run.state.log_history)
    for log, one, two in zip(*histories, strict=True):
        assert {k: v for k, v in one.items() if "loss" in k} == {
            k: v for k, v in two.items() if "loss" in k
        }
        for name in (name for name in log if name.startswith("loss_")):
            # float16 rounds by 2**-12; an error of a tenth of the values becomes 1 % of its square.
            assert one[name] == pytest.approx(log[name], rel=1e-2), name


def test_a_cache_is_refused_for_other_teachers_data_or_terms_and_for_random_masks(tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache"), "attention_weight": 0.0}
    teacher = bert()
    trainer(tmp_path / "run", perturbed(teacher), teacher, **cache).train()
    for change, different in (
        ({"teacher": bert(seed=5)}, "teacher"),
        ({"data": ragged()}, "data"),  # the same tokens, another mask
        ({"data": dataset(15)}, "data"),
        ({"attention_weight": 1.0}, "attentions"),
    ):
        other = change.pop("teacher", teacher)
        data = change.pop("data", dataset())
        run = trainer(tmp_path / "run", perturbed(other), other, data, **(cache | change))
        with pytest.raises(ValueError, match=rf"for other settings \(different: {different}"):
            run.train()

    class MaskedAnew(list):
        def __getitem__(self, i):
            self.reads = getattr(self, "reads", 0) + 1
            row = super().__getitem__(i)
            return row | {"input_ids": (row["input_ids"] + (self.reads > 56)) % 40}

    cache["teacher_cache"] = str(tmp_path / "masked")
    run = trainer(tmp_path / "run", perturbed(teacher), teacher, MaskedAnew(dataset()), **cache)
    with pytest.raises(ValueError, match=r"cannot be cached; unset teacher_cache"):
        run.train()


def test_a_cache_depends_on_data_and_teacher():
    rows = [{"input_ids": torch.arange(4), "token_type_ids": torch.zeros(4), "labels": 1}]
    before = cache.described(rows, {"labels"})
    assert cache.described([rows[0] | {"labels": 2}], {"labels"}) == before
    assert cache.described([rows[0] | {"token_type_ids": torch.ones(4)}], {"labels"}) != before
    assert cache.fingerprint(bert()) == cache.fingerprint(bert())
    assert cache.fingerprint(bert()) != cache.fingerprint(bert(hidden_act="relu"))
    assert cache.fingerprint(bert()) != cache.fingerprint(bert(seed=1))


def test_a_cache_of_rows_padded_on_the_left_is_refused(tmp_path):
    def left(rows: list[dict]) -> dict[str, Tensor]:
        ids = [torch.nn.functional.pad(row["input_ids"], (1, 0)) for row in rows]
        return {"input_ids": torch.stack(ids), "attention_mask": (torch.stack(ids) != 0).long()}

    options = {"teacher_cache": str(tmp_path / "cache"), "data_collator": left}
    with pytest.raises(ValueError, match=r"pad on the right"):
        trainer(tmp_path / "run", bert(seed=1), bert(), **options).train()


def test_a_cache_that_does_not_fit_the_disk_is_refused_before_it_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000))
    run = trainer(tmp_path / "run", bert(seed=1), bert(), teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"would take .* GB .* are free; unset teacher_cache"):
        run.train()
    assert not (tmp_path / "cache").exists()


def test_annealing_hands_over_from_the_teacher_to_the_labels(tmp_path):
    teacher = bert(BertForSequenceClassification)
    data = dataset(labels=torch.arange(16) % 3)
    student = perturbed(teacher)
    run = trainer(tmp_path, student, teacher, data, teacher_annealing=True, labels_weight=2.0)
    run.train()
    for step, log in enumerate(log for log in run.state.log_history if "loss" in log):
        teaching = sum(log[f"loss_{name}"] for name in LAYERWISE if name != "labels")
        want = (1 - step / 4) * teaching + step / 4 * 2 * log["loss_labels"]
        assert log["loss"] == pytest.approx(want, rel=1e-4)


RESUMABLE = {
    "max_steps": 9, "save_strategy": "steps", "save_steps": 3, "student_dropout": True,
    "gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 3, "save_total_limit": 1,
}  # fmt: skip


def train_and_be_killed(folder, moment: str) -> None:
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    class At(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if moment == "between two batches" and state.global_step == 6:
                kill()

    run = trainer(folder, bert(seed=1), bert(), ragged(20), callbacks=[At()], **RESUMABLE)
    if moment == "while saving":
        save = run._save_optimizer_and_scheduler
        run._save_optimizer_and_scheduler = lambda to: kill() if "checkpoint-6" in to else save(to)
    run.train()


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    teacher, straight = bert(), bert(seed=1)
    # True begins a new run where there is none to resume.
    trainer(tmp_path / "straight", straight, teacher, ragged(20), **RESUMABLE).train(True)
    for moment, last in (("between two batches", 6), ("while saving", 3)):
        folder = tmp_path / moment
        # Forked: a fresh interpreter takes longer to import transformers than all else here.
        process = multiprocessing.get_context("fork").Process(
            target=train_and_be_killed, args=(folder, moment)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert [f.name for f in folder.glob("checkpoint-*")] == [f"checkpoint-{last}"]

        resumed = bert(seed=1)
        run = trainer(folder, resumed, teacher, ragged(20), **RESUMABLE)
        run.train(resume_from_checkpoint=True)
        assert run.state.global_step == 9
        assert_same_weights(straight, resumed, rtol=0, atol=0)
        assert [f.name for f in folder.iterdir()] == ["checkpoint-9"]


SAVED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def test_checkpoints_of_an_earlier_run_do_not_push_out_those_of_this(tmp_path):
    (tmp_path / "checkpoint-99").mkdir()
    os.utime(tmp_path / "checkpoint-99", (0, 0))
    trainer(tmp_path, bert(seed=1), bert(), **SAVED).train()
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    teacher, student = bert(), bert(seed=1)
    run = trainer(tmp_path, student, teacher, **SAVED)

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:  # no file may grow beyond 4 kB, and the weights do
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.add_callback(FillDisk())
    try:
        with pytest.raises(
            OSError, match=r"checkpoint 4 could not be saved .*checkpoint-2 is complete"
        ):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed, straight = bert(seed=1), bert(seed=1)
    trainer(tmp_path, resumed, teacher, **SAVED).train(resume_from_checkpoint=True)
    trainer(tmp_path / "straight", straight, teacher, **SAVED).train()
    assert_same_weights(straight, resumed, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path, where):
    student = bert(seed=1)

    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and where == "loss":
                student.encoder.layer[0].output.dense.bias.data[0] = math.inf

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and where == "weights":  # changed by the step, before saving
                student.encoder.layer[0].output.dense.bias.data[0] = math.nan

    message = "loss of step 4 is nan" if where == "loss" else "output.dense.bias is not finite"
    with pytest.raises(ValueError, match=rf"diverged: .*{message}.*checkpoint-2"):
        trainer(tmp_path, student, bert(), callbacks=[Diverge()], **SAVED).train()
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-2"]
    loaded = BertModel.from_pretrained(tmp_path / "checkpoint-2")
    assert all(p.isfinite().all() for p in loaded.parameters())


def test_the_teacher_is_neither_trained_nor_saved(tmp_path):
    teacher = bert(BertForSequenceClassification).train()
    before = copy.deepcopy(teacher.state_dict())
    run = trainer(
        tmp_path, bert(BertForSequenceClassification, seed=1), teacher,
        dataset(labels=torch.arange(16) % 3), save_strategy="steps", save_steps=4,
    )  # fmt: skip
    run.train()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_weights(saved, run.model, rtol=0, atol=0)
    files = {path.name for path in (tmp_path / "checkpoint-4").glob("*.safetensors")}
    assert files == {"model.safetensors"}


def test_the_saved_config_does_not_know_how_it_was_distilled(tmp_path):
    run = trainer(tmp_path, bert(seed=1), bert(), save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(tmp_path / "end")
    for folder in ("checkpoint-2", "end"):
        config = (tmp_path / folder / "config.json").read_text()
        assert scores._SCORES not in config
        assert json.loads(config)["hidden_dropout_prob"] == 0.1
        assert BertModel.from_pretrained(tmp_path / folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("student_dropout", [False, True])
def test_the_student_trains_in_training_mode_with_dropout_only_if_asked_for(
    tmp_path, student_dropout
):
    student = bert(seed=1)
    seen = []
    student.encoder.layer[1].output.dropout.register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.equal(args[0], out)))
    )
    data = dataset(4)
    run = trainer(
        tmp_path, student, bert(), data, max_steps=1, student_dropout=student_dropout,
        eval_dataset=data, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run.train()
    assert seen == [(True, not student_dropout), (False, True)]
    assert student.encoder.layer[1].output.dropout.p == 0.1


def test_a_head_with_its_own_loss_keeps_it(tmp_path):
    class Weighted(BertForTokenClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None:
                output.loss = 1000 * output.loss
            return output

    losses = []
    for cls in (BertForTokenClassification, Weighted):
        data = ragged(labels=token_labels())
        options = {"remove_unused_columns": False, "max_steps": 1}
        run = trainer(tmp_path, bert(cls, seed=1), bert(cls), data, **options)
        run.train()
        losses.append(run.state.log_history[0]["loss_labels"])
    assert losses[1] == pytest.approx(1000 * losses[0], rel=1e-4)


def test_attention_dropout_that_is_a_number_is_left_out_too(tmp_path):
    # Of one layer, transformers 5.13 refuses its own configuration.
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    sizes |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    model = ModernBertModel(ModernBertConfig(**sizes, intermediate_size=32, attention_dropout=0.5))
    model.train()
    ids = torch.arange(1, 9)[None]
    with trainer_module._without_dropout(model):
        assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_bfloat16_autocast_trains_with_a_float32_loss(tmp_path):
    teacher = bert(BertForSequenceClassification)
    data = dataset(32, labels=torch.arange(32) % 3)
    exact, mixed = (
        trainer(
            *(tmp_path, perturbed(teacher, 0.2), teacher, data),
            bf16=steps > 1, max_steps=steps, learning_rate=1e-2,
        )
        for steps in (1, 30)
    )  # fmt: skip
    dtypes = set()
    teacher.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, out: dtypes.add(out.dtype)
    )
    mixed.train()
    assert dtypes == {torch.bfloat16}  # the teacher too, which accelerate does not wrap
    exact.train()
    want, got = log_histories([exact, mixed])
    assert got[0] == pytest.approx(want[0], rel=0.02)
    assert got[-1] < got[0] / 2
    loss = mixed.compute_loss(mixed.model, padded_batch())
    assert loss.dtype == torch.float32


def test_columns_the_model_does_not_know_do_no_harm(tmp_path):
    data = dataset(idx=torch.arange(16), special_tokens_mask=torch.zeros(16, 8))
    losses = []
    for remove in (True, False):
        run = trainer(tmp_path, bert(seed=1), bert(), data, remove_unused_columns=remove)
        run.train()
        losses += log_histories([run])
    assert losses[0] == losses[1]


def test_the_clock_stops_training_as_a_planned_last_step_with_the_rate_at_zero(
    tmp_path, monkeypatch
):
    now = iter(range(1000))
    monkeypatch.setattr(clock, "monotonic", lambda: float(next(now)))  # a second a step
    run = trainer(
        tmp_path, bert(seed=1), bert(), max_steps=10**6, max_minutes=20 / 60, warmup_steps=0.1,
        save_strategy="steps", save_steps=10**5, learning_rate=1e-3,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 20
    assert set(run.lr_scheduler.get_last_lr()) == {0.0}
    assert (tmp_path / "checkpoint-20").is_dir()
    rates = [log["learning_rate"] for log in run.state.log_history if "loss" in log]
    assert rates[0] == 0 and max(rates) == rates[2] == pytest.approx(1e-3)  # a tenth is warm-up
    assert rates[2:] == pytest.approx([1e-3 * (20 - s) / 18 for s in range(2, 20)])


def test_a_warm_up_in_steps_takes_these_steps_under_the_clock(tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(clock, "monotonic", lambda: float(next(now)))  # a second a step
    run = trainer(
        tmp_path, bert(seed=1), bert(), max_steps=10**6, max_minutes=20 / 60, warmup_steps=15,
        learning_rate=1e-3,
    )  # fmt: skip
    run.train()
    rates = [log["learning_rate"] for log in run.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-3 * min(s / 15, (20 - s) / 20) for s in range(20)], rel=1e-4)


def test_steps_end_training_before_the_clock_with_the_usual_schedule(tmp_path):
    rates = []
    for minutes in (None, 60.0):
        run = trainer(tmp_path, bert(seed=1), bert(), max_minutes=minutes)
        run.train()
        assert run.state.global_step == 4
        rates.append([log["learning_rate"] for log in run.state.log_history if "loss" in log])
    assert rates[0] == rates[1]


def test_a_run_ends_by_minutes_steps_or_epochs_with_the_rate_of_its_stage(tmp_path):
    until = partial(DistillationConfig.until, str(tmp_path))
    timed, counted, passes = until(minutes=5), until(steps=7), until(minutes=5, epochs=0.5)
    assert (timed.max_minutes, timed.max_steps) == (5, 10**9)
    assert (counted.max_minutes, counted.max_steps) == (None, 7)
    assert (passes.max_minutes, passes.max_steps, passes.num_train_epochs) == (5, -1, 0.5)
    assert (timed.learning_rate, until(steps=1, stage="task").learning_rate) == (1e-3, 1e-4)
    assert until(steps=1, stage="task", learning_rate=2.0).learning_rate == 2.0
    vectors = until(steps=1, stage="sentences")
    assert {k: v for k, v in vectors.weights.items() if v} == {"sentence": 1.0, "relation": 10.0}
    with pytest.raises(ValueError, match="stage must be one of layers, task, sentences, got 'x'"):
        until(steps=1, stage="x")
    with pytest.raises(ValueError, match="give minutes, steps or epochs"):
        until()


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 41}, "agree on vocab_size, got 41 and 40"),
        ({"num_hidden_layers": 3}, "the student has 3 layers and the teacher 2"),
        ({"pad_token_id": 1}, "agree on pad_token_id, got 1 and 0"),
        ({"hidden_size": 8}, "agree on hidden_size, got 8 and 16"),
        ({"num_attention_heads": 2}, "agree on num_attention_heads, got 2 and 4"),
        ({"num_labels": 2}, "agree on num_labels, got 2 and 3"),
    ],
)
def test_a_student_that_does_not_match_its_teacher_is_refused(tmp_path, options, message):
    teacher = bert(BertForSequenceClassification)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, bert(BertForSequenceClassification, **options), teacher)


def test_a_student_that_shares_its_teachers_weights_is_refused(tmp_path):
    teacher = bert()
    with pytest.raises(ValueError, match=r"the same object; pass a copy.deepcopy"):
        trainer(tmp_path, teacher, teacher)
    student = bert(seed=1)
    student.embeddings = teacher.embeddings
    with pytest.raises(ValueError, match="training would change the teacher"):
        trainer(tmp_path, student, teacher)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_weight": -1.0}, "hidden_weight = -1.0 must be a finite number of at least 0"),
        ({"logits_weight": math.inf}, "logits_weight = inf must be a finite number"),
        ({"labels_weight": math.nan}, "labels_weight = nan must be a finite number"),
        ({f"{name}_weight": 0.0 for name in TERMS}, "All weights are 0"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"temperature": math.inf}, "temperature must be > 0 and finite, got inf"),
        ({"max_minutes": 0.0}, "max_minutes must be > 0 and finite, got 0.0"),
        ({"max_minutes": math.inf}, "max_minutes must be > 0 and finite, got inf"),
        ({"label_smoothing_factor": 0.1}, "leave both unset"),
        ({"max_minutes": 1.0, "lr_scheduler_type": "reduce_lr_on_plateau"}, "use lr_sch"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    if "lr_scheduler_type" in options:
        options = options | {"eval_strategy": "steps", "eval_dataset": dataset(4)}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, bert(seed=1), bert(), **options).train()


def test_a_term_asked_for_by_its_weight_is_computed_or_refused(tmp_path):
    run = trainer(tmp_path, bert(seed=1), bert(), logits_weight=1.0)
    with pytest.raises(ValueError, match=r"logits_weight = 1.0, but .* no logits in common"):
        run.train()
    student, teacher = bert(BertForMaskedLM, seed=1), bert(BertForMaskedLM)
    with pytest.raises(ValueError, match=r"labels_weight = 1.0, but the student returned no loss"):
        trainer(tmp_path, student, teacher, labels_weight=1.0).train()
    trainer(tmp_path, student, bert(), max_steps=1).train()  # unset, they do not apply
    features = {f"{name}_weight": 0.0 for name in ("embedding", "attention", "hidden")}
    with pytest.raises(ValueError, match="No term applies"):
        trainer(tmp_path, bert(seed=1), bert(), **features).train()


def test_a_term_that_moves_nothing_is_refused_at_the_first_step(tmp_path):
    student = bert(seed=1)
    for p in student.embeddings.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match=r"embedding term .* no parameter .*embedding_weight=0"):
        trainer(tmp_path, student, bert()).train()
    trainer(tmp_path, student, bert(), embedding_weight=0.0).train()
    with pytest.raises(ValueError, match="all terms are 0: the student already computes"):
        trainer(tmp_path, copy.deepcopy(bert()), bert()).train()
    with pytest.raises(
        ValueError, match=r"every parameter .* frozen.* student.requires_grad_\(True\)"
    ):
        trainer(tmp_path, bert(seed=1).requires_grad_(False), bert()).train()
    # What is not compressed begins at 0, and is held there.
    student = bert()
    student.encoder.layer[0].output.dense.bias.data += 0.1
    run = trainer(tmp_path, student, bert())
    run.train()
    assert run.state.log_history[0]["loss_embedding"] == 0


def test_labels_in_another_order_are_refused(tmp_path):
    names = ("bad", "fair", "good")

    def named(order):
        labels = {i: names[k] for i, k in enumerate(order)}
        seed = order[0]
        return bert(BertForSequenceClassification, seed=seed, id2label=labels, label2id=None)

    with pytest.raises(ValueError, match=r"order of labels, got \['good', 'bad', 'fair'\] and"):
        trainer(tmp_path, named((2, 0, 1)), named((0, 1, 2)))
    trainer(tmp_path, named((2, 0, 1)), bert(BertForSequenceClassification))  # LABEL_0, …: unnamed


def test_a_term_that_is_not_finite_is_named_at_the_first_step(tmp_path):
    student, teacher = bert(seed=1), bert()
    teacher.encoder.layer[1].output.dense.bias.data[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"'hidden': nan.*teacher parameter encoder.layer.1.output.dense.bias"
    ):
        trainer(tmp_path, student, teacher).train()


SHARDED = """
import copy, sys, torch
import test_distillation as t
from kroneckerbert import compress
from kroneckerbert.distillation.trainer import _let_record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
teacher = t.bert(intermediate_size=64)
student = compress(teacher, {
    "query": {"a_shape": [4, 4], "rank": 2}, "word_embeddings": {"a_shape": [40, 4], "rank": 1},
    "intermediate.dense": {"a_shape": [8, 2]}, "output.dense": {"a_shape": [2, 8]}}).train()
batch = t.padded_batch()

def step(model):
    torch.manual_seed(0)
    want = t.outputs(teacher, batch)
    terms = t.distillation_terms(t.outputs(model, batch), want, batch["attention_mask"], t.ALL)
    loss = sum(terms.values())
    loss.backward()
    return loss

whole = copy.deepcopy(student)
loss = step(whole)
for part in (*student.encoder.layer, student):
    fully_shard(part, mesh=mesh)
_let_record(student)
torch.testing.assert_close(step(student), loss)
for (name, p), q in zip(student.named_parameters(), whole.parameters(), strict=True):
    if q.grad is not None:
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
torch.distributed.destroy_process_group()
"""


def launch(processes: int, script: Path, *arguments: object) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=180, env=environment)


@pytest.mark.slow
def test_parameters_in_shards_have_the_gradients_of_whole_ones(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch(2, tmp_path / "sharded.py")


PROCESS = """
import sys, torch
import test_distillation as t
torch.set_num_threads(1)
student = t.bert(seed=1)
minutes = float(sys.argv[3]) or None
run = t.trainer(sys.argv[1], student, t.bert(), t.ragged(32), optim="sgd", max_grad_norm=0.0,
                learning_rate=0.1, max_minutes=minutes, max_steps=10**6 if minutes else 4,
                per_device_train_batch_size=8 // int(sys.argv[2]), eval_dataset=t.dataset(8))
run.train()
metrics = run.evaluate()
assert bool(minutes) == (run.state.global_step != 4)
if run.is_world_process_zero():
    logs = [log for log in run.state.log_history if "loss" in log]
    torch.save((student.state_dict(), logs, metrics), sys.argv[1] + "/result.pt")
"""


@pytest.mark.slow
def test_two_processes_train_and_report_as_one(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)

    def run(processes: int, minutes: float = 0.0):
        out = tmp_path / str(processes)
        out.mkdir(exist_ok=True)
        launch(processes, tmp_path / "process.py", out, processes, minutes)
        return torch.load(out / "result.pt")

    (one, one_logs, one_metrics), (two, two_logs, two_metrics) = run(1), run(2)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)
    for a, b in zip(one_logs, two_logs, strict=True):
        for name in ("loss", "loss_embedding", "loss_attention", "loss_hidden"):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
    assert two_metrics["eval_loss_hidden"] == pytest.approx(
        one_metrics["eval_loss_hidden"], rel=1e-4
    )
    run(2, minutes=0.02)  # one clock: both stop at the same step
