"""Distillation of sentence vectors: terms against loops, SentenceTransformers, killed runs."""

import copy
import multiprocessing
import os
import signal

import pytest
import torch
from commands import fails, succeeds
from tiny import tiny_bert, tiny_tokenizer
from torch.nn.functional import cosine_similarity, normalize
from transformers import BertForMaskedLM, BertModel, TrainerCallback

from kroneckerbert import compress
from kroneckerbert.data import TextDataset
from kroneckerbert.distillation import (
    TERMS,
    DistillationConfig,
    DistillationTrainer,
    distillation_terms,
)
from kroneckerbert.distillation.pooling import Pooling

TEXTS = [f"{a} {b} film is {c}" for a in ("a", "this") for b in "abc" for c in ("good", "bad", "b")]
SENTENCES = {
    "embedding_weight": 0.0, "attention_weight": 0.0, "hidden_weight": 0.0,
    "sentence_weight": 1.0, "relation_weight": 10.0,
}  # fmt: skip
ONLY = dict.fromkeys(TERMS, 0.0)
FACTORS = {"intermediate.dense": {"a_shape": [4, 2]}, "output.dense": {"a_shape": [2, 4]}}


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory):
    """The transformer, a first-token pooling, a projection and a normalisation."""
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tiny_bert(initializer_range=0.2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformer = models.Transformer(str(folder), max_seq_length=16)
    pooling = models.Pooling(32, pooling_mode="cls")
    torch.manual_seed(1)
    parts = [transformer, pooling, models.Dense(32, 8), models.Normalize()]
    return SentenceTransformer(modules=parts, device="cpu")


def distiller(folder, student, teacher, texts=TEXTS, **options) -> DistillationTrainer:
    extra = {k: options.pop(k) for k in ("evaluator", "callbacks") if k in options}
    given = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
    given |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    args = DistillationConfig(output_dir=str(folder), **given | SENTENCES | options)
    rows = TextDataset(tiny_tokenizer(), texts, max_length=16)
    extra.setdefault("processing_class", tiny_tokenizer())
    return DistillationTrainer(student, teacher, args, train_dataset=rows, **extra)


def vectors(rows: int = 5, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# The terms


@pytest.mark.parametrize("unit", [True, False])
def test_the_terms_are_those_of_loops_in_float64(unit):
    s, t = vectors(seed=1), 3 * vectors(seed=2)
    if unit:
        s, t = normalize(s, dim=-1), normalize(t, dim=-1)
    outputs = {"sentence_embedding": s}, {"sentence_embedding": t}
    weights = ONLY | {"sentence": 1.0, "relation": 1.0}
    got = distillation_terms(*outputs, torch.ones(5, 3), weights)
    s, t = s.double(), t.double()
    n = len(s)
    error = sum((s[i] - t[i]).norm() ** 2 / (2 * t[i].norm() ** 2) for i in range(n)) / n
    if unit:
        torch.testing.assert_close(error, 1 - cosine_similarity(s, t).mean())
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    relation = sum(
        (cosine_similarity(s[i], s[j], 0) - cosine_similarity(t[i], t[j], 0)) ** 2 for i, j in pairs
    ) / len(pairs)
    assert set(got) == {"sentence", "relation"}
    assert got["sentence"].item() == pytest.approx(error.item(), rel=1e-5)
    assert got["relation"].item() == pytest.approx(relation.item(), rel=1e-5)


def test_a_single_row_has_no_relations_and_a_zero_vector_no_infinity():
    weights = ONLY | {"sentence": 1.0, "relation": 1.0}
    zero = {"sentence_embedding": torch.zeros(1, 4)}
    got = distillation_terms(zero, zero, torch.ones(1, 3), weights)
    assert {name: term.item() for name, term in got.items()} == {"sentence": 0.0, "relation": 0.0}


def test_outputs_without_vectors_are_refused():
    with pytest.raises(ValueError, match="must return sentence_embedding"):
        distillation_terms({}, {}, torch.ones(1, 3), ONLY | {"relation": 1.0})


# Pooling


def test_the_vectors_are_those_that_the_sentence_transformer_encodes(sentence_transformer):
    batch = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = sentence_transformer[0].auto_model(**batch)
    got = Pooling(sentence_transformer, torch.device("cpu"))(output, batch["attention_mask"])
    want = sentence_transformer.encode(TEXTS, convert_to_tensor=True)
    assert got.shape == (len(TEXTS), 8)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_without_modules_vectors_are_unit_means_over_real_tokens():
    model = tiny_bert()
    batch = tiny_tokenizer()(["good", "a bad film"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    got = Pooling(model, torch.device("cpu"))(output, batch["attention_mask"])
    rows = zip(output.last_hidden_state, batch["attention_mask"], strict=True)
    means = [normalize(h[: int(mask.sum())].mean(0), dim=-1) for h, mask in rows]
    torch.testing.assert_close(got, torch.stack(means))


# The command line, on folders


def test_commands_keep_a_sentence_transformers_modules(tmp_path, sentence_transformer):
    from sentence_transformers import SentenceTransformer

    teacher, small, trained, int8, texts, pairs = (
        tmp_path / name for name in ("teacher", "small", "trained", "int8", "t.txt", "pairs.tsv")
    )
    sentence_transformer.save(str(teacher))
    texts.write_text("\n".join(TEXTS))
    pairs.write_text("".join(f"{i}\t{TEXTS[i]}\t{TEXTS[-i]}\n" for i in range(1, 9)))
    succeeds("compress", teacher, small)
    output = succeeds(
        *("distill", teacher, small, trained, "--data", texts, "--steps", 8, "--pairs", pairs),
        *("--teacher-cache", tmp_path / "cache"),
    )
    assert "loss sentence" in output and "loss hidden" not in output
    assert "pairs_spearman_cosine" in output
    succeeds("quantize", trained, int8)
    for folder in (small, trained, int8):
        loaded = SentenceTransformer(str(folder), device="cpu")
        assert [type(part).__name__ for part in loaded] == [
            "Transformer", "Pooling", "Dense", "Normalize",
        ]  # fmt: skip
        assert loaded.encode(TEXTS).shape == (len(TEXTS), 8)
    assert "is plain text" in fails(
        *("distill", teacher, small, tmp_path / "none", "--data", texts, "--stage", "task")
    )
    succeeds("decompress", small, tmp_path / "dense")
    assert "folders of one" in fails(
        *("distill", teacher, small, tmp_path / "none", "--data", texts, "--pairs", pairs),
        *("--stage", "layers"),
    )


# The trainer


def test_a_sentence_transformer_learns_its_teachers_vectors(tmp_path, sentence_transformer):
    student = compress(sentence_transformer, FACTORS)
    before = (student.encode(TEXTS) * sentence_transformer.encode(TEXTS)).sum(-1).mean()
    dense = copy.deepcopy(student[2].state_dict())
    asked = []

    def evaluator(model):
        asked.append(model is student)
        return {"score": 0.5}

    run = distiller(
        tmp_path, student, sentence_transformer, max_steps=40, evaluator=evaluator,
        eval_strategy="steps", eval_steps=20,
    )  # fmt: skip
    run.train()
    after = (student.encode(TEXTS) * sentence_transformer.encode(TEXTS)).sum(-1).mean()
    assert after > before + 0.5 * (1 - before)
    assert asked == [True, True]
    assert [log["eval_score"] for log in run.state.log_history if "eval_score" in log] == [0.5] * 2
    torch.testing.assert_close(student[2].state_dict(), dense)  # only the transformer is trained


def test_a_number_is_an_evaluators_score_and_rows_are_evaluated_as_well(
    tmp_path, sentence_transformer
):
    student = compress(sentence_transformer, FACTORS)
    run = distiller(tmp_path, student, sentence_transformer, evaluator=lambda model: 0.25)
    assert run.evaluate()["eval_evaluator"] == 0.25
    run.eval_dataset = run.train_dataset
    metrics = run.evaluate()
    assert metrics["eval_evaluator"] == 0.25 and metrics["eval_loss_sentence"] > 0


def test_cached_vectors_teach_like_the_teacher(tmp_path, sentence_transformer):
    histories = []
    for cached in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        student = compress(sentence_transformer, FACTORS)
        run = distiller(tmp_path / "run", student, sentence_transformer, teacher_cache=cached)
        run.train()
        histories.append([log for log in run.state.log_history if "loss" in log])
    files = {path.name for path in (tmp_path / "cache").iterdir()}
    assert files == {"about.json", "input_ids.bin", "sentence_embedding.bin", ".kroneckerbert"}
    # float16 rounds a unit vector's error by 2**-11.
    for log, one, two in zip(*histories, strict=True):
        losses = [{k: v for k, v in run.items() if "loss" in k} for run in (one, two)]
        assert losses[0] == losses[1]
        assert one["loss_sentence"] == pytest.approx(log["loss_sentence"], abs=1e-3)
    mean = distiller(
        tmp_path / "run", compress(tiny_bert(), FACTORS), tiny_bert(), teacher_cache=cached
    )
    with pytest.raises(ValueError, match=r"for other settings \(different: .*pooling"):
        mean.train()


def test_models_with_heads_are_refused(tmp_path):
    student, teacher = tiny_bert(BertForMaskedLM), tiny_bert(BertForMaskedLM)
    with pytest.raises(ValueError, match="models without heads"):
        distiller(tmp_path, student, teacher, logits_weight=0.0).train()


def test_an_evaluator_needs_a_sentence_transformer(tmp_path):
    with pytest.raises(TypeError, match="compress a SentenceTransformer"):
        distiller(tmp_path, tiny_bert(), tiny_bert(), evaluator=len)


RESUMABLE = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
    "train_sampling_strategy": "group_by_length",
}  # fmt: skip


def start() -> tuple[BertModel, BertModel]:
    torch.manual_seed(0)
    teacher = tiny_bert(initializer_range=0.2)
    return compress(teacher, FACTORS), teacher


def train_and_be_killed(folder) -> None:
    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    student, teacher = start()
    cache = str(folder / "cache")
    distiller(
        folder / "run", student, teacher, callbacks=[At()], teacher_cache=cache, **RESUMABLE
    ).train()


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    straight, teacher = start()
    distiller(
        tmp_path / "straight", straight, teacher, teacher_cache=str(tmp_path / "own"), **RESUMABLE
    ).train()
    process = multiprocessing.get_context("fork").Process(
        target=train_and_be_killed, args=(tmp_path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    resumed, teacher = start()
    run = distiller(
        tmp_path / "run", resumed, teacher, teacher_cache=str(tmp_path / "cache"), **RESUMABLE
    )
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)
