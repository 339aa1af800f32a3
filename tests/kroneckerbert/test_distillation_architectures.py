"""Every architecture as teacher and student: the scores that are compared, and a short training."""

import copy
import math

import pytest
import torch
from test_architectures import CONFIGS, ENCODER, teacher
from test_distillation import LENGTHS, outputs, terms
from test_distillation import trainer as tiny_trainer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DebertaConfig,
    ElectraForPreTraining,
    PreTrainedModel,
    RemBertConfig,
    RemBertModel,
    XLMRobertaConfig,
)

from kron_kernels.modules import linear_weight
from kroneckerbert import compress, decompress
from kroneckerbert.configuration_kroneckerbert import layout_of
from kroneckerbert.distillation import (
    TERMS,
    DistillationConfig,
    DistillationTrainer,
    attention_scores,
    distillation_terms,
    scores,
)
from kroneckerbert.fusion import KroneckerProjection

MORE = {
    "xlm-roberta": XLMRobertaConfig(**ENCODER),
    "deberta": DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
}
NAMES = (*CONFIGS, *MORE)
HOOKED = ("mpnet", "deberta-v2", "deberta")  # they do not call the attention interface
LAYERWISE = ("embedding", "attention", "hidden", "logits", "labels")  # terms of models with heads
each_architecture = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _all_architectures(monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(CONFIGS, name, config)  # where `teacher` looks


def dense(name: str, auto: type = AutoModel) -> PreTrainedModel:
    return teacher(auto._model_mapping[type(CONFIGS[name])], name)


def factorised(model: PreTrainedModel) -> PreTrainedModel:
    """A Kronecker student with an error in every linear layer; words stay dense."""
    layout = layout_of(model.base_model)
    factors = {
        path: {"a_shape": [rows // 4, columns // 4], "rank": 2}
        for path, (rows, columns) in layout.sizes.items()
        if path != layout.table
    }
    return compress(model, factors).eval()


def batch(width: int = 8, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(5, 64, (len(LENGTHS), 8), generator=torch.Generator().manual_seed(2))
    ids = nn.functional.pad(ids, (0, width - 8))
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids.where(mask == 1, padding), "attention_mask": mask}


def real_pairs(inputs: dict[str, Tensor]) -> Tensor:
    real = inputs["attention_mask"].bool()
    return (real[:, None, :, None] & real[:, None, None, :]).expand(-1, 4, -1, -1)


def captured(model: PreTrainedModel, inputs: dict[str, Tensor]):
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def trainer(tmp_path, student, teacher, **options) -> DistillationTrainer:
    padding = teacher.config.pad_token_id or 0
    ids = torch.randint(5, 64, (16, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    rows = zip(ids.where(mask == 1, padding), mask, torch.arange(16) % 2, strict=True)
    data = [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]
    options = {"max_steps": 2, "per_device_train_batch_size": 16} | options
    return tiny_trainer(tmp_path, student, teacher, data, **options)


# Inputs

SEGMENTS = {"bert": True, "electra": True, "deberta-v2": True}  # RoBERTa has but one, as published
ENCODERS = (*SEGMENTS, "roberta", "distilbert", "mpnet", "modernbert")


def encoder(name: str) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS[name])
    config.pad_token_id = 1  # the same for both
    if hasattr(config, "type_vocab_size"):
        config.type_vocab_size = 2 if name in SEGMENTS else 1
    return AutoModel.from_config(config).eval()


def segments(length: int) -> list[int]:
    return [int(2 * i >= length) for i in range(length)]


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """The columns that the trainer has left, and a mask."""
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    fill = {"input_ids": 1, "token_type_ids": 0}
    out = {
        name: nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill[name])
        if name in fill
        else torch.stack(column)
        for name, column in columns.items()
    }
    return out | {"attention_mask": (out["input_ids"] != 1).long()}


def pair_trainer(tmp_path, student: str, teacher: str, **options):
    """Of text pairs, with the inputs and outputs of each of the two models."""
    models = {"student": encoder(student), "teacher": encoder(teacher)}
    calls: list[tuple[str, dict, tuple[Tensor, ...]]] = []
    names = {"input_ids", "attention_mask", "token_type_ids", "teacher_row"}
    for role, model in models.items():

        def keep(_, args, kwargs, output, role=role):
            given = {name: value for name, value in kwargs.items() if name in names}
            calls.append((role, given, output.hidden_states))

        model.register_forward_hook(keep, with_kwargs=True)
    lengths = (8, 6, 3, 7)
    data = [
        {"input_ids": torch.randint(5, 64, (n,)).tolist(), "token_type_ids": segments(n)}
        for n in lengths
    ]
    weights = {f"{term}_weight": float(term == "hidden") for term in TERMS}
    options = {"max_steps": 1, "disable_tqdm": True, "use_cpu": True} | weights | options
    args = DistillationConfig(
        str(tmp_path / "run"), report_to="none", save_strategy="no", **options
    )
    datasets = {"train_dataset": data, "eval_dataset": data, "data_collator": padded}
    return DistillationTrainer(*models.values(), args, **datasets), models, calls


def check_calls(calls, models, expected: list[str]) -> None:
    """Each model got its own inputs, and the teacher returned its usual outputs."""
    assert [role for role, *_ in calls] == expected
    for role, given, states in list(calls):
        model = models[role]
        ids = given["input_ids"]
        own = {"input_ids": ids, "attention_mask": (ids != 1).long()}
        if model.config.model_type in SEGMENTS:
            rows = [segments(n) for n in own["attention_mask"].sum(1).tolist()]
            own["token_type_ids"] = torch.tensor(
                [row + [0] * (ids.shape[1] - len(row)) for row in rows]
            )
        assert given.keys() == own.keys(), role
        assert all(torch.equal(given[name], own[name]) for name in own), role
        if role == "teacher":
            with torch.no_grad():
                expected_states = model(**own, output_hidden_states=True).hidden_states
            assert all(map(torch.equal, states, expected_states))
    calls.clear()


@pytest.mark.parametrize("teacher", ENCODERS)
@pytest.mark.parametrize("student", ENCODERS)
def test_each_model_gets_its_own_inputs(student, teacher, tmp_path):
    run, models, calls = pair_trainer(tmp_path, student, teacher)
    (batch,) = run.get_train_dataloader()
    run.compute_loss(run.model, batch)
    check_calls(calls, models, ["teacher", "student", "teacher"])  # first for its variances


def test_so_they_do_in_training_evaluation_and_prediction_and_from_a_cache(tmp_path):
    run, models, calls = pair_trainer(tmp_path, "distilbert", "bert")
    run.train()
    check_calls(calls, models, ["teacher", "student", "teacher"])
    run.evaluate()
    check_calls(calls, models, ["student", "teacher"])
    run.predict(run.eval_dataset)
    check_calls(calls, models, ["student", "teacher"])
    cached = {"teacher_cache": str(tmp_path / "cache")}
    run, models, calls = pair_trainer(tmp_path, "distilbert", "bert", **cached)
    run.train()
    check_calls(calls, models, ["teacher", "student"])


# Training


@each_architecture
def test_all_terms_are_finite_and_the_loss_falls(name, tmp_path):
    teacher = dense(name, AutoModelForSequenceClassification)
    run = trainer(tmp_path, factorised(teacher), teacher, max_steps=8, learning_rate=1e-2)
    run.train()  # checks at the first step that every term moves a parameter
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 8
    for log in logs:
        assert all(math.isfinite(log[f"loss_{term}"]) for term in LAYERWISE), log
    assert logs[0]["loss_attention"] > 1e-4
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert logs[-1]["loss_attention"] < logs[0]["loss_attention"]


@each_architecture
def test_sentence_vectors_are_distilled(name, tmp_path):
    teacher = dense(name)
    weights = dict.fromkeys(("embedding_weight", "attention_weight", "hidden_weight"), 0.0)
    weights |= {"sentence_weight": 1.0, "relation_weight": 10.0}
    run = trainer(
        tmp_path, factorised(teacher), teacher, max_steps=8, learning_rate=1e-2, **weights
    )
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert logs[-1]["loss_sentence"] < 0.9 * logs[0]["loss_sentence"]
    assert math.isfinite(logs[-1]["loss_relation"])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_presets_train_too(name, tmp_path):
    teacher = dense(name, AutoModelForSequenceClassification)
    run = trainer(tmp_path, compress(teacher, "kronecker-bert-8"), teacher, max_steps=1)
    run.train()
    assert all(math.isfinite(run.state.log_history[0][f"loss_{term}"]) for term in LAYERWISE)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mpnet"])  # not supported
def test_activation_checkpointing_gives_the_same_gradients(name, tmp_path):
    teacher, grads = dense(name, AutoModelForSequenceClassification), []
    for checkpointing in (False, True):
        student = factorised(teacher)
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable = "activation_checkpointing_enable"  # transformers >= 5.23 deprecates the other
            getattr(student, enable, student.gradient_checkpointing_enable)()
        run = trainer(tmp_path, student, teacher)
        run.current_gradient_accumulation_steps = 1
        run.training_step(student, next(iter(run.get_train_dataloader())))
        grads.append({path: p.grad for path, p in student.named_parameters()})
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, msg=path)
    assert not scores._projected


# The scores


def heads(x: Tensor, size: int = 8) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    y = x @ linear_weight(module).mT
    return y if module.bias is None else y + module.bias


def by_hand_mpnet(model, states):
    for layer, x in zip(model.encoder.layer, states, strict=True):
        attention = layer.attention.attn
        q, k = (heads(linear(p, x)) for p in (attention.q, attention.k))
        yield q @ k.mT / math.sqrt(8)


def by_hand_deberta_v2(model, states):
    for layer, x in zip(model.encoder.layer, states, strict=True):
        attention = layer.attention.self
        q, k = (heads(linear(p, x)) for p in (attention.query_proj, attention.key_proj))
        yield q @ k.mT / math.sqrt(8 * 3)


def by_hand_deberta(model, states):
    for layer, x in zip(model.encoder.layer, states, strict=True):
        attention = layer.attention.self
        # Rows of the weight: for each head its queries, keys and values.
        q, k, _ = attention.in_proj.weight.unflatten(0, (4, 3, 8)).unbind(1)
        q, k = ((x @ w.flatten(0, 1).mT) for w in (q, k))
        yield heads(q + attention.q_bias) @ heads(k).mT / math.sqrt(8 * 3)


def by_hand_gpt2(model, states):
    for layer, x in zip(model.h, states, strict=True):
        q, k, _ = linear(layer.attn.c_attn, layer.ln_1(x)).chunk(3, dim=-1)
        yield (heads(q) @ heads(k).mT / math.sqrt(8)).tril()


def by_hand_llama(model, states):
    for layer, x in zip(model.layers, states, strict=True):
        x, attention = layer.input_layernorm(x), layer.self_attn
        q, k = (rotated(heads(linear(p, x))) for p in (attention.q_proj, attention.k_proj))
        yield (q @ k.repeat_interleave(2, dim=1).mT / math.sqrt(8)).tril()


def rotated(x: Tensor) -> Tensor:
    """Each pair of the two halves' entries turned by its position's angle."""
    angles = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


BY_HAND = {
    "mpnet": by_hand_mpnet,
    "deberta-v2": by_hand_deberta_v2,
    "deberta": by_hand_deberta,
    "gpt2": by_hand_gpt2,
    "llama": by_hand_llama,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_those_of_the_projections(name, training):
    model = dense(name).double()
    student = factorised(model)
    for mine, weights in ((model, model), (student, decompress(student))):
        mine.train(training)
        with torch.set_grad_enabled(training):  # inference has its own, fused path
            got = outputs(mine, batch())
            want = by_hand(name, weights, got.hidden_states)
        assert [tuple(scores.shape) for scores in got.attentions] == [(3, 4, 8, 8)] * 2
        # Llama's angles are float32.
        tolerance = 1e-6 if name == "llama" else 1e-12
        real = real_pairs(batch())
        for a, b in zip(got.attentions, want, strict=True):
            torch.testing.assert_close(a[real], b[real], rtol=tolerance, atol=tolerance)
            assert a.requires_grad == training


def by_hand(name: str, model, states) -> list[Tensor]:
    return list(BY_HAND[name](model, states[:-1]))


def test_the_fused_inference_of_mpnet_is_among_these_tests():
    student = factorised(dense("mpnet"))
    assert isinstance(student.encoder.layer[0].attention.attn.q, KroneckerProjection)


@each_architecture
def test_their_softmax_is_the_attention_of_the_stock_model(name):
    config = copy.deepcopy(CONFIGS[name])
    if name in ("deberta", "deberta-v2"):
        config.relative_attention = False  # positions have their own scores; the scale stays
    model = type(dense(name))(config).eval()
    model.load_state_dict(dense(name).state_dict(), strict=False)
    if name == "mpnet":
        nn.init.zeros_(model.encoder.relative_attention_bias.weight)
    scores = outputs(model, batch()).attentions
    model.config._attn_implementation = "eager"
    real, pairs = batch()["attention_mask"].bool(), real_pairs(batch())
    hidden = []
    for mine, stock in zip(scores, captured(model, batch()).attentions, strict=True):
        seen = pairs & (stock > 0)
        rows = real[:, None].expand(-1, 4, -1)
        attended = mine.masked_fill(~seen, -torch.inf)[rows].softmax(-1)
        torch.testing.assert_close(attended, stock[rows], rtol=1e-4, atol=1e-6)
        assert not mine[pairs & ~seen].any()
        hidden.append(int((pairs & ~seen)[:, 0].sum()))
    causal = 21 + 0 + 6  # pairs whose key is after the query, of 7, 1 and 4 tokens
    # ModernBERT's second layer looks four tokens to either side: of seven, three pairs are farther.
    expected = {"gpt2": [causal] * 2, "llama": [causal] * 2, "modernbert": [0, 6]}
    assert hidden == expected.get(name, [0, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "modernbert"])
def test_keys_out_of_sight_are_zero_without_padding_too(name):
    inputs = batch() | {"attention_mask": torch.ones(3, 8, dtype=torch.long)}
    last = outputs(dense(name), inputs).attentions[-1]
    distance = torch.arange(8)[:, None] - torch.arange(8)
    sight = distance.abs() <= 4 if name == "modernbert" else distance >= 0
    assert not last[..., ~sight].any()
    assert last[..., sight].all()


@each_architecture
def test_outputs_are_those_without_the_context(name):
    model = dense(name)
    real = batch()["attention_mask"].bool()
    want = model(**batch()).last_hidden_state[real]
    torch.testing.assert_close(outputs(model, batch()).last_hidden_state[real], want)


@each_architecture
def test_the_attention_term_has_its_own_gradients(name):
    model = dense(name)
    student = factorised(model)
    weights = dict.fromkeys(TERMS, 0.0) | {"attention": 1.0}
    s, t = outputs(student, batch()), outputs(model, batch())
    loss = distillation_terms(s, t, batch()["attention_mask"], weights)["attention"]
    loss.backward()
    projections = ("query", "q", "q_lin", "q_proj", "query_proj", "in_proj", "c_attn", "Wqkv")
    factors = [
        p
        for path, p in student.named_parameters()
        if any(f".{part}.{factor}" in f".{path}" for part in projections for factor in "ab")
    ]
    assert len(factors) >= 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)


@each_architecture
def test_padding_changes_no_term(name):
    model = dense(name)
    student = factorised(model)
    padding = model.config.pad_token_id or 0
    want = terms(student, model, batch(padding=padding))
    assert set(want) == {"embedding", "attention", "hidden"}
    for inputs in (batch(padding=17), batch(width=13, padding=padding)):
        for term, value in terms(student, model, inputs).items():
            torch.testing.assert_close(value, want[term], rtol=1e-5, atol=1e-7, msg=term)


@each_architecture
def test_a_student_identical_to_its_teacher_has_terms_of_exactly_zero(name):
    model = dense(name, AutoModelForSequenceClassification)
    for either in (model, factorised(model)):
        got = terms(copy.deepcopy(either), either, batch())
        assert set(got) == set(LAYERWISE) - {"labels"}
        assert all(value.item() == 0 for value in got.values()), got


# The context


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@each_architecture
def test_everything_is_restored_after_an_error(name):
    model = dense(name)
    stock = captured(model, batch())
    before = model.config._attn_implementation, hooks(model)
    with pytest.raises(KeyError), attention_scores(model, factorised(model)):
        captured(model, batch())
        raise KeyError
    assert (model.config._attn_implementation, hooks(model)) == before
    assert not scores._projected
    after = captured(model, batch())
    assert len(after.attentions) == len(stock.attentions)
    for a, b in zip(after.attentions, stock.attentions, strict=True):
        assert torch.equal(a, b)


def test_scores_of_an_attention_that_someone_derived_are_not_guessed():
    model = dense("mpnet")
    for module in list(model.modules()):
        if type(module).__name__ == "MPNetSelfAttention":
            module.__class__ = type("OfOnesOwn", (type(module),), {})
    with pytest.raises(ValueError, match="cannot be read"), attention_scores(model):
        pass


@pytest.mark.parametrize("name", HOOKED)
def test_a_context_within_a_context_changes_nothing(name):
    model = dense(name)
    want = outputs(model, batch()).attentions
    with attention_scores(model):
        registered = hooks(model)
        with attention_scores(model):
            assert hooks(model) == registered
        again = captured(model, batch()).attentions
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    assert hooks(model) == 0


@pytest.mark.parametrize("name", HOOKED)
def test_the_remains_of_a_failed_call_are_forgotten(name):
    model, failing = dense(name), batch()
    want = outputs(model, batch()).attentions
    attention = next(m for m in model.modules() if type(m) in scores._PROJECTIONS)
    failing["input_ids"] = failing["input_ids"].flip(0)

    def fail(*_):
        raise ArithmeticError

    with attention_scores(model):
        handle = attention.dropout.register_forward_pre_hook(fail)  # after the projections
        with pytest.raises(ArithmeticError):
            captured(model, failing)
        handle.remove()
        again = captured(model, batch()).attentions
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("name", HOOKED)
def test_scores_are_not_computed_unless_asked_for(name, monkeypatch):
    model = dense(name)
    with attention_scores(model):
        monkeypatch.setattr(scores, "_heads", None)  # calling it would raise
        assert model(**batch()).get("attentions") is None
    assert not scores._projected


def test_a_model_whose_scores_cannot_be_read_is_refused_and_trains_without_them(tmp_path):
    model = RemBertModel(RemBertConfig(**ENCODER)).eval()
    student = compress(model, {"intermediate.dense": {"a_shape": [8, 2]}})
    with pytest.raises(ValueError, match=r"RemBertModel cannot be read.*attention_weight=0"):
        trainer(tmp_path, student, model, labels_weight=0).train()
    run = trainer(tmp_path, student, model, attention_weight=0, labels_weight=0)
    run.train()
    assert math.isfinite(run.state.log_history[0]["loss_hidden"])


def test_electras_detector_trains_on_its_labels_and_has_no_distribution_to_compare(tmp_path):
    model = teacher(ElectraForPreTraining, "electra")
    with pytest.raises(ValueError, match=r"not a distribution: set logits_weight=0"):
        trainer(tmp_path, factorised(model), model)
    run = trainer(tmp_path, factorised(model), model, logits_weight=0.0)
    for row in run.train_dataset:
        row["labels"] = torch.ones(8)
    run.train()
    assert "loss_labels" in run.state.log_history[0]
