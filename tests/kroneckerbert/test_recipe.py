"""A recipe from end to end on tiny models: its steps, and those it skips or resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import fails, save, succeeds
from safetensors.torch import load_file
from tiny import WORDS, exporting, tiny_tokenizer
from transformers import BertForPreTraining, Trainer, TrainingArguments

import kroneckerbert
from kroneckerbert import DistillationConfig
from kroneckerbert.cli.sources import read_model
from kroneckerbert.distillation.signals import Interrupted
from kroneckerbert.reproduction import curves, recipe, steps
from kroneckerbert.reproduction import run as reproduction
from kroneckerbert.reproduction.tasks import own_task

GLUE = {"mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """No pictures, a third of a tiny run's time; only the fixture `finished` draws them."""
    stand_in = SimpleNamespace(read=curves.read, save=lambda *_: None)
    monkeypatch.setattr(steps, "curves", stand_in)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A teacher with the heads of pre-training, text, and the files of sst2, imdb and stsb."""
    folder = tmp_path_factory.mktemp("sources")
    save(folder / "bert", BertForPreTraining)
    tiny_tokenizer(model_max_length=32).save_pretrained(folder / "bert")
    rows = (" ".join(WORDS[i % 8 :] + WORDS[: i % 5]) for i in range(40))
    data = folder / "data"
    data.mkdir()
    (data / "texts.txt").write_text("\n".join(rows))
    for name in ("sst2_train", "sst2_dev", "imdb_test"):
        (data / f"{name}.tsv").write_text("1\tgood film\n0\tthis is bad\n" * 8)
    for name in ("stsb_train", "stsb_dev"):
        (data / f"{name}.tsv").write_text("5\ta film\tthis film\n1.5\tgood\tbad a\n0\ta\tb\n" * 4)
    for name in ("train-v1.1", "dev-v1.1"):
        question = {"id": "1", "question": "is this ?"}
        question["answers"] = [{"text": "good", "answer_start": 7}]
        paragraph = {"context": "a film good this is bad", "qas": [question]}
        content = {"version": "1.1", "data": [{"title": "", "paragraphs": [paragraph]}]}
        (data / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def given(sources) -> dict:
    few = {"logging_steps": 1, "save_steps": 2, "disable_tqdm": True}
    return {
        "description": "a tiny one",
        "teacher": str(sources / "bert"),
        "student": {"preset": "kronecker-bert-8", "calibration": 8},
        "seeds": [0, 1],
        "stage1": {
            "corpus": {"source": "texts.txt"},
            "heads": ["mlm", "nsp"],
            "max_length": 16,
            "batch_size": 8,
            "arguments": {"max_steps": 6, "logits_weight": 0, **few},
        },
        "fine_tuning": {
            "max_length": 16,
            "batch_size": 4,
            "arguments": {"max_steps": 5, "learning_rate": 1e-3, **few},
        },
        "stage2": {"max_length": 16, "batch_size": 4, "arguments": {"max_steps": 5, **few}},
        "tasks": {"sst2": {"stage2": {"arguments": {"learning_rate": 1e-4}}}},
        "evaluation": {"also": ["imdb"]},
        "latency": {"tokens": 8, "seconds": 0.01, "threads": 1},
        "card": {"license": "mit", "language": "en", "data": ["words: public domain"]},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[n]) for n, p in ours.items())


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> Path:
    """The output of the tiny recipe, run without interruption."""
    output = tmp_path_factory.mktemp("finished") / "out"
    reproduction.run(recipe.parse(given.__wrapped__(sources)), output, sources / "data")
    return output


# Sentence encoders


@pytest.fixture
def vectors(tmp_path_factory) -> dict:
    teacher = tmp_path_factory.mktemp("teacher")
    save(teacher, hidden_size=64, intermediate_size=128)  # factors that are large enough for int8
    return {
        "description": "a tiny encoder",
        "teacher": str(teacher),
        "student": {"preset": "kronecker-bert-8", "calibration": 8, "sequential": True},
        "sentences": {
            "texts": {"data/texts.txt": {"cut": True}, "data/train-v1.1.json": {}},
            "pairs": {"stsb": "data/stsb_dev.tsv"},
            "max_length": 16,
            "batch_size": 4,
            "arguments": {"max_steps": 6, "logging_steps": 1, "save_steps": 2},
        },
        "card": {"license": "apache-2.0", "data": ["of no one"], "limits": ["of no use"]},
    }


def test_an_encoder_is_made_scored_quantised_and_described(sources, vectors, tmp_path):
    results = reproduction.run(recipe.parse(vectors), tmp_path, sources)
    assert set(results["scores"]) == {"teacher", "student", "int8"}
    assert results["core_hours"] is not None
    texts = (tmp_path / "texts" / "texts.txt").read_text().splitlines()
    assert len(texts) > 20 and not {"a film", "this film", "bad a"} & set(texts)
    student = tmp_path / "student"
    assert json.loads((student / "student.json").read_text()) == results
    encoder = kroneckerbert.load(str(student))
    assert encoder.model.config.kronecker_int8
    card = (student / "README.md").read_text()
    for text in (
        "a tiny encoder",
        "sentence-similarity",
        "of no use",
        "kroneckerbert.load",
        "Core-hours of",
    ):
        assert text in card
    before = load_file(student / "model.safetensors")
    reproduction.run(recipe.parse(vectors), tmp_path, sources)  # nothing is done again
    after = load_file(student / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"sst2": {}}}, "a recipe with sentences has no stage1 and no tasks"),
        ({"sentences": {"texts": {}}}, "names no file"),
        (
            {"sentences": {"texts": {"a.txt": {"cuts": True}}}},
            "did you mean sentences.texts.a.txt.cut",
        ),
    ],
)
def test_a_recipe_of_an_encoder_that_cannot_work_is_refused(vectors, change, message):
    with pytest.raises(ValueError, match=message):
        recipe.parse(vectors | change)


def test_calibration_without_text_is_refused(vectors, tmp_path):
    del vectors["sentences"]
    with pytest.raises(ValueError, match=r"student\.calibration needs text"):
        reproduction.run(recipe.parse(vectors), tmp_path)


def test_an_encoder_needs_the_data_folder(vectors, tmp_path):
    with pytest.raises(ValueError, match="give --data DIR"):
        reproduction.run(recipe.parse(vectors), tmp_path)


# Tasks of one's own


@pytest.fixture
def own(vectors, sources, tmp_path_factory) -> list[str]:
    """Arguments of ``reproduce`` for a task of words as labels."""
    folder = tmp_path_factory.mktemp("own")
    rows = "".join(
        f"{label}\t{text}\n" for label, text in (("up", "good film"), ("down", "bad")) * 8
    )
    for name in ("train", "test"):
        (folder / f"my-{name}.tsv").write_text(rows)
    few = "{max_steps: 2, logging_steps: 1}"
    return [
        *("reproduce", "own-task", "--teacher", vectors["teacher"]),
        *("--train", str(folder / "my-train.tsv"), "--test", str(folder / "my-test.tsv")),
        *("--set", f"stage2.arguments={few}", "--set", f"fine_tuning.arguments={few}"),
        *("--set", "stage2.max_length=16", "--set", "fine_tuning.max_length=16"),
        *("--set", "latency=null"),
    ]


def test_a_task_of_ones_own_is_taught_distilled_quantised_and_scored(own, vectors, tmp_path):
    modules = [{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"}]
    (Path(vectors["teacher"]) / "modules.json").write_text(json.dumps(modules))
    output = succeeds(*own, "--output", tmp_path, "--set", "deployment.export=null")
    assert "my_train test accuracy, int8" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(s["task"], s["metric"]) for s in results["scores"]] == [("my_train", "accuracy")]
    assert "accuracy" in results["deployed"]["my_train/seed-0"]["int8"]["my_train"]
    assert set(results["core_hours"]) == {"my_train/seed-0"}
    student = tmp_path / "stage2" / "my_train" / "seed-0"
    assert set(read_model(str(student)).config.label2id) == {"up", "down"}
    assert read_model(str(tmp_path / "int8" / "my_train" / "seed-0")).config.kronecker_int8
    assert "my_train" in (student / "README.md").read_text()
    # The teacher's folder is a sentence encoder's; a classifier's is not.
    assert (tmp_path / "start" / "modules.json").exists()
    assert not (tmp_path / "int8" / "my_train" / "seed-0" / "modules.json").exists()


def test_a_small_table_is_passed_over_until_it_gave_the_least_steps(own, tmp_path):
    own += ["--set", "fine_tuning.arguments={num_train_epochs: 1, logging_steps: 1}"]
    own += ["--set", "fine_tuning.batch_size=4", "--set", "fine_tuning.least_steps=6"]
    own += ["--set", "deployment={}"]
    output = succeeds(*own, "--output", tmp_path)
    assert "2 passes over 16 rows, for 8 steps" in output
    state = json.loads((tmp_path / "teacher" / "my_train" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_a_missing_exporter_is_named_before_anything_is_trained(own, monkeypatch, tmp_path):
    monkeypatch.setitem(exporting()._PACKAGES, "onnx", ("no_such_exporter",))
    message = fails(*own, "--output", tmp_path)
    assert "needs no_such_exporter: pip install 'kron-kernels[onnx]'" in message
    assert not (tmp_path / "start").exists()


@pytest.mark.slow
def test_an_exported_student_is_scored_too(own, tmp_path):
    exporting()
    pytest.importorskip("onnxruntime")
    output = succeeds(*own, "--output", tmp_path, "--set", "deployment.int8=false")
    assert "my_train test accuracy, onnx" in output
    program = tmp_path / "export" / "my_train" / "seed-0" / "program"
    test = own[own.index("--test") + 1]
    student = tmp_path / "stage2" / "my_train" / "seed-0"
    one, two = (
        re.findall(r"\d\.\d{4}", succeeds("evaluate", folder, "--data", test))
        for folder in (program, student)
    )
    assert one == two and len(one) == 3


@pytest.mark.parametrize(
    ("train", "test", "metric", "message"),
    [
        ("0\ta\n2\tb\n", "0\ta\n", None, "integers from 0 without gaps"),
        ("0\ta\n", "0\ta\tb\n", None, "both have one text a row"),
        ("0.5\ta\n", "0.1\ta\n", "f1", "f1 is of classes, but the labels .* are fractions"),
        ("x\ta\n", "y\ta\n", "spearman", "spearman is of numbers, .* are words"),
        ("x\ta\n", "1\ta\n", None, "must all be words, or all be numbers"),
    ],
)
def test_labels_that_fit_no_metric_are_refused(tmp_path, train, test, metric, message):
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / name).write_text(rows)
    with pytest.raises(ValueError, match=message):
        own_task("mine", "train", "test", metric, tmp_path)


def test_the_metric_follows_from_the_labels(tmp_path):
    for rows, metric, kind, found in (
        ("0\ta\n1\tb\n", None, "classification", "accuracy"),
        ("1\ta\n5\tb\n", "spearman", "regression", "spearman"),
        ("1.5\ta\n5\tb\n", None, "regression", "spearman"),
        ("x\ta\ny\tb\n", "f1", "classification", "f1"),
    ):
        (tmp_path / "t").write_text(rows)
        task = own_task("mine", "t", "t", metric, tmp_path)
        assert (task.kind, task.metrics) == (kind, (found,))


def test_an_own_task_is_refused_with_half_its_tables_or_a_papers_name(given):
    for tasks in ({"mine": {"train": "a.tsv"}}, {"sst2": {"train": "a", "test": "b"}}):
        with pytest.raises(ValueError, match="a task of your own has train and test"):
            recipe.parse(given | {"tasks": tasks})
    with pytest.raises(ValueError, match=r"deployment\.export must be one of onnx, openvino"):
        recipe.parse(given | {"deployment": {"export": "aoti"}})


# What a recipe may be


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_is_valid(name, tmp_path):
    loaded = recipe.load(name)
    assert loaded.description
    source = loaded.stage1.corpus.source if loaded.stage1 else ""
    if source.startswith("package:"):
        assert Path(steps.located(source)).is_file()
    for cls, stage in [
        (DistillationConfig, loaded.stage1 or loaded.sentences or loaded.stage2),
        *((DistillationConfig, task.stage2) for task in loaded.tasks.values()),
        *((TrainingArguments, task.fine_tuning) for task in loaded.tasks.values()),
    ]:
        cls(output_dir=str(tmp_path), **stage.arguments)
    if name.startswith("kronecker-bert"):
        assert loaded.student.preset == name
        assert set(loaded.tasks) == GLUE | {"squad", "squad_v2"}
        assert loaded.tasks["squad_v2"].stage2.max_length == 384


def test_shipped_learning_rates_are_those_of_table_8():
    eight, twenty_one = (recipe.load(f"kronecker-bert-{n}").tasks for n in (8, 21))

    def rates(tasks):
        return {name: tasks[name].stage2.arguments["learning_rate"] for name in GLUE}

    assert rates(eight) == dict.fromkeys(GLUE, 1e-4) | {"cola": 5e-5, "rte": 1e-5}
    assert rates(twenty_one) == dict.fromkeys(GLUE, 5e-4) | {"qqp": 1e-4, "rte": 5e-5}


def test_accelerate_can_read_the_launchers():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(recipe.__file__).parent / "recipes" / "accelerate"
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    kinds = {name: config.distributed_type.value for name, config in configs.items()}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED"}
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["deepspeed-zero2"].deepspeed_config["zero_stage"] == 2


def test_changes_reach_any_key(tmp_path, given):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(given))
    changes = ["stage1.arguments.learning_rate=2e-4", "tasks.rte={}", "seeds=[3]", "latency="]
    loaded = recipe.load(path, changes)
    assert loaded.stage1.arguments["learning_rate"] == 2e-4
    assert loaded.tasks["rte"].stage2.batch_size == 4
    assert loaded.seeds == [3] and loaded.latency is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stge1={}", "stge1 is unknown; did you mean stage1?"),
        ("stage1.arguments.lerning_rate=1", "did you mean stage1.arguments.learning_rate?"),
        ("tasks.sst2.stage2.arguments.epochs=1", "tasks.sst2.stage2.arguments.epochs is unknown"),
        ("tasks.sst3={}", "did you mean tasks.sst2?"),
        ("student.preset=kronecker-bert-7", "kronecker-bert-7 is unknown; did you mean"),
        ("student.factors={}", "student has preset and factors; give one"),
        ("stage1.batch_size=many", "stage1.batch_size must be int, got 'many'"),
        ("stage1.batch_size=0", "batch_size of at least 1 and a max_length of at least 8; got 0"),
        ("stage2.arguments.learning_rate=fast", "must be float, got 'fast'"),
        ("seeds=[1, 1]", "seeds must be different numbers, at least one; got [1, 1]"),
        ("seeds=7", "seeds must be list[int], got 7"),
        ("stage1.heads=[nsp]", "stage1.heads must be [], [mlm] or [mlm, nsp]; got ['nsp']"),
        ("stage1.arguments.output_dir=x", "cannot be set here: run chooses it"),
        ("stage2.arguments.seed=1", "stage2.arguments.seed cannot be set here: write seeds"),
        ("evaluation.also=[imbd]", "did you mean evaluation.also: imdb?"),
        ("student.sequential", "a key and its value, such as stage1.arguments.learning_rate=1e-4"),
        ("teacher.name=x", "which has no keys"),
        ("teacher=", "teacher is missing; a recipe needs it"),
        ("stage1=3", "stage1 must be a mapping with corpus, heads, pack"),
        ("latency.seconds=0", "seconds above 0"),
    ],
)
def test_an_error_names_the_wrong_key_and_the_remedy(tmp_path, given, change, message):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises((ValueError, TypeError)) as caught:
        recipe.load(path, [change])
    assert message in str(caught.value)


def test_other_files_than_recipes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one of .*kronecker-bert-21"):
        recipe.load("absent")
    path = tmp_path / "own.yaml"
    path.write_text("- a list")
    with pytest.raises(TypeError, match="must be a mapping"):
        recipe.load(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        recipe.load(path)


# What a run does


def test_a_run_does_everything(finished):
    for name in ("start", "stage1", "teacher/sst2", "stage2/sst2/seed-0", "stage2/sst2/seed-1"):
        assert (finished / name / "model.safetensors").exists(), name
        assert not (finished / name / "training_args.bin").exists()
    assert not list((finished / "training").rglob("checkpoint-*"))
    results = json.loads((finished / "results.json").read_text())
    assert results["parameters"]["teacher"] > results["parameters"]["student"]
    assert results["latency"]["milliseconds"]["1"]["student"]["median"] > 0
    scores = {(score["task"], score["metric"]): score for score in results["scores"]}
    assert set(scores) == {("sst2", "accuracy"), ("imdb", "accuracy")}
    assert set(scores["sst2", "accuracy"]["seeds"]) == {"0", "1"}
    assert "±" in scores["sst2", "accuracy"]["student"]
    assert scores["sst2", "accuracy"]["paper"] == {
        "KroneckerBERT_8": 91.1,
        "KroneckerBERT_21": 88.9,
    }
    first, second = (finished / f"stage2/sst2/seed-{seed}" for seed in (0, 1))
    assert not same(first, second)
    for name in ("stage1", "stage2/sst2/seed-0", "stage2/sst2/seed-1"):
        card = (finished / name / "README.md").read_text()
        assert card.startswith("---\n") and "license: mit" in card
        assert str(finished.parents[1]) not in card
        assert ("± 0" in card) == (name != "stage1")
    for picture in ("stage1", "sst2"):
        assert (finished / "curves" / f"{picture}.png").stat().st_size > 5000
    history = curves.read(first)
    assert {"loss_embedding", "loss_attention", "loss_hidden", "loss_logits", "loss_labels"} <= set(
        history[0]
    )


def test_a_second_run_does_nothing_and_a_new_seed_only_its_own(
    finished, sources, given, tmp_path, capsys
):
    before = files(finished)
    capsys.readouterr()
    reproduction.run(recipe.parse(given), finished, sources / "data")
    output = capsys.readouterr().out
    assert files(finished) == before
    assert not [line for line in output.splitlines() if line.startswith("- ")]
    # The teacher's score is output before its student's, and the processes before everything.
    assert output.index("process(es)") < output.index(
        "sst2, stage 2: 4 rows a step = 1 device(s) x 4"
    )
    assert output.index("accuracy, teacher") < output.index("accuracy, student")
    reproduction.run(recipe.parse(given), finished, sources / "data", seeds=[5])
    new = files(finished).keys() - before.keys()
    assert new == {finished / "stage2/sst2/seed-5/model.safetensors"}


def test_a_changed_recipe_reports_the_change_and_the_folder_to_delete(finished, sources, given):
    given["stage1"]["arguments"]["learning_rate"] = 0.5
    with pytest.raises(ValueError) as caught:
        reproduction.run(recipe.parse(given), finished, sources / "data")
    message = str(caught.value)
    assert "stage1.arguments.learning_rate was not set and is 0.5" in message
    assert f"Delete {finished / 'stage1'}" in message


def test_changed_evaluations_are_repeated(finished, sources, given):
    before = files(finished)
    given["evaluation"] = {}
    given["stage1"]["arguments"]["logging_steps"] = 3  # no weight depends on it
    results = reproduction.run(recipe.parse(given), finished, sources / "data")
    assert {score["task"] for score in results["scores"]} == {"sst2"}
    assert files(finished) == before


def test_regressions_spans_own_teachers_caches_and_no_stage_1(finished, sources, given, tmp_path):
    del given["stage1"], given["latency"]
    given["student"] = {"factors": {"intermediate.dense": {"a_shape": [8, 1]}}}
    given["evaluation"] = {}
    given["seeds"] = [0]
    given["tasks"] = {
        "sst2": {"fine_tuning": {"model": str(finished / "teacher/sst2")}},
        "stsb": {"stage2": {"cache_teacher": True}},
        "squad": {"stage2": {"max_length": 32}, "fine_tuning": {"max_length": 32}},
    }
    results = reproduction.run(recipe.parse(given), tmp_path / "out", sources / "data")
    assert results["latency"] is None
    assert {s["task"] for s in results["scores"]} == {"sst2", "stsb", "squad"}
    assert (tmp_path / "out/cache/stsb/about.json").exists()
    assert not (tmp_path / "out/teacher/sst2").exists()


# What stops a run


def test_missing_inputs_are_reported_before_any_work(sources, given, tmp_path):
    output = tmp_path / "out"

    def message(data=sources / "data", **changes) -> str:
        with pytest.raises((ValueError, OSError, ImportError)) as caught:
            reproduction.run(recipe.parse(given | changes), output, data)
        assert not (output / "start").exists()
        return str(caught.value)

    error = message(tasks={"rte": {}})
    assert "rte_train.tsv" in error and "leave out the task" in error
    assert "sst2" in message(data=None) and "--data DIR" in message(data=None)
    assert "is not a file or folder" in message(teacher="./absent/bert")
    assert "absent_package" in message(teacher="package:absent_package/model")
    assert "max_length 64 exceeds the teacher's 32" in message(
        stage2=given["stage2"] | {"max_length": 64}
    )
    arguments = given["stage1"]["arguments"] | {"gradient_accumulation_steps": 3}
    assert "batch_size 8 cannot be divided by 3" in message(
        stage1=given["stage1"] | {"arguments": arguments}
    )
    output = tmp_path / "file"
    output.write_text("not a folder")
    assert f"cannot write {output}" in message()


def test_heads_that_the_teacher_lacks_are_refused(finished, sources, given, tmp_path):
    given["teacher"] = str(finished / "teacher/sst2")
    with pytest.raises(ValueError, match=r"Tensors missing: .*stage1\.heads"):
        reproduction.run(recipe.parse(given), tmp_path / "out", sources / "data")


KILLED = """
    import os, signal, sys
    from kroneckerbert.reproduction import run as reproduction
    from transformers import Trainer
    name, output, data, training, step = sys.argv[1:]
    take = Trainer.training_step
    def last_step(self, *args, **kwargs):
        if training in self.args.output_dir and self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **kwargs)
    Trainer.training_step = last_step
    reproduction.run(name, output, data)
"""


def test_a_stopped_run_resumes_from_its_last_step_to_the_same_weights(
    finished, sources, given, tmp_path, monkeypatch
):
    output, name = tmp_path / "out", "stage2/sst2/seed-1"
    shutil.copytree(finished, output)
    shutil.rmtree(output / name)
    training_step = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Interrupted) as stop:
        patched.setattr(Trainer, "training_step", stopped)
        reproduction.run(recipe.parse(given), output, sources / "data")
    kept = output / "training" / name
    assert stop.value.number == signal.SIGTERM
    assert stop.value.kept == f"Stopped after step 3, kept in {kept}."
    assert (kept / "checkpoint-3").is_dir() and not (output / name).exists()
    reproduction.run(recipe.parse(given), output, sources / "data")
    assert same(output / name, finished / name)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(finished, sources, given, tmp_path):
    path, output = tmp_path / "own.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(given))
    for training in ("stage1", "teacher", "stage2/sst2/seed-0"):
        arguments = [path, output, sources / "data", f"training/{training}", 3]
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == -9, process.stderr
        assert list((output / "training").rglob("checkpoint-2")), process.stdout
    reproduction.run(recipe.load(path), output, sources / "data")
    for name in ("stage1", "teacher/sst2", "stage2/sst2/seed-0", "stage2/sst2/seed-1"):
        assert same(output / name, finished / name), name


@pytest.mark.slow
def test_two_processes_share_a_step(finished, sources, given, tmp_path):
    # Without masks and dropout, which are drawn for each process's own batch.
    given["stage1"]["heads"] = []
    given["tasks"] = {"sst2": {"fine_tuning": {"model": str(finished / "teacher/sst2")}}}
    given["seeds"] = [0]
    reproduction.run(recipe.parse(given), tmp_path / "one", sources / "data")
    path, output = tmp_path / "own.yaml", tmp_path / "two"
    path.write_text(yaml.safe_dump(given))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
    ]
    command = ["-m", "kroneckerbert", "reproduce", path, "--output", output]
    process = subprocess.run(
        [*launch, *map(str, command), "--data", str(sources / "data")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=180,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.count("8 rows a step = 2 device(s) x 4 rows x 1 accumulated") == 1
    for name in ("stage1", "stage2/sst2/seed-0"):
        one, two = (weights(tmp_path / folder / name) for folder in ("one", "two"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
    assert not list(output.rglob("training/**/checkpoint-*"))


# Curves


def test_curves_have_a_panel_for_each_term(tmp_path, monkeypatch):
    history = [{"step": s, "loss": 1 / s, "loss_hidden": 2 / s} for s in range(1, 30)]
    history += [
        {"step": 30, "eval_loss": 0.1, "eval_loss_hidden": 0.2},
        {"step": 30, "train_loss": 1},
    ]
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self)
    )
    curves.save({"seed 0": history, "seed 1": history[:10]}, tmp_path / "curves.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["loss", "loss hidden"]
    assert all(axes.get_yscale() == "log" and len(axes.lines) == 6 for axes in panels)
    assert drawn[0].legends[0].texts[1].get_text() == "seed 1"


def test_curves_without_a_loss_or_matplotlib_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no loss to draw"):
        curves.save({"run": [{"step": 1, "epoch": 1}]}, tmp_path / "curves.png")
    for text in ("{}", "[]", '{"log_history": [1]}', '{"log_history": 1}', "[" * 2000, ""):
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a trainer_state\.json"):
            curves.read(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"kron-kernels\[demo\]"):
        curves.save({"run": [{"step": 1, "loss": 1}]}, tmp_path / "curves.png")


def test_a_recipe_documents_its_fields():
    for field in fields(recipe.Recipe):
        assert f"{field.name}:" in recipe.Recipe.__doc__
