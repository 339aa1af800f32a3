"""Every command from end to end on tiny models, without a network."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import WORDS, fails, save, student_of, succeeds, time_briefly, weights
from rich.console import Console
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

import kroneckerbert
from kron_kernels.backends import abi
from kroneckerbert.cli import training
from kroneckerbert.cli.sources import read_model
from kroneckerbert.reproduction import curves


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models and texts that tests may read but not change."""
    place = tmp_path_factory.mktemp("place")
    student_of(save(place / "teacher"))
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    student_of(save(place / "classifier", BertForSequenceClassification, **names))
    rows = (" ".join(WORDS[i % 8 :] + WORDS[: i % 5]) for i in range(40))
    (place / "texts.txt").write_text("\n".join(rows))
    (place / "table.tsv").write_text("label\ttext\n" + "pos\tgood film\nneg\tthis is bad\n" * 8)
    return place


@pytest.fixture
def teacher(place) -> Path:
    return place / "teacher"


@pytest.fixture
def student(place) -> Path:
    return place / "teacher-student"


@pytest.fixture
def classifier(place) -> Path:
    return place / "classifier"


@pytest.fixture
def texts(place) -> Path:
    return place / "texts.txt"


@pytest.fixture
def table(place) -> Path:
    return place / "table.tsv"


@pytest.mark.parametrize(
    ("cls", "student"),
    [
        (BertModel, kroneckerbert.KroneckerBertModel),
        (BertForMaskedLM, kroneckerbert.KroneckerBertForMaskedLM),
        (BertForQuestionAnswering, kroneckerbert.KroneckerBertForQuestionAnswering),
        (BertForSequenceClassification, kroneckerbert.KroneckerBertForSequenceClassification),
    ],
)
def test_compress_saves_a_model_with_its_head_and_its_tokenizer(tmp_path, cls, student):
    source, out = save(tmp_path / "teacher", cls), tmp_path / "out"
    output = succeeds("compress", source, out, "--preset", "kronecker-bert-8")
    model = read_model(str(out))
    assert type(model) is student
    assert len(AutoTokenizer.from_pretrained(out)) == 13
    dense = read_model(str(source)).num_parameters()
    assert f"{dense:,}" in output and f"{model.num_parameters():,}" in output


def test_calibration_changes_the_start(tmp_path, teacher, texts):
    plain, calibrated, refitted = (tmp_path / name for name in ("plain", "moments", "refitted"))
    succeeds("compress", teacher, plain)
    succeeds("compress", teacher, calibrated, "--calibration", texts)
    succeeds("compress", teacher, refitted, "--calibration", texts, "--sequential")
    layer = "encoder.layer.0.intermediate.dense"
    states = [weights(folder) for folder in (plain, calibrated, refitted)]
    assert not torch.allclose(states[0][f"{layer}.a"], states[1][f"{layer}.a"])
    assert not torch.equal(states[1][f"{layer}.bias"], states[2][f"{layer}.bias"])
    assert "calibration" in fails("compress", teacher, tmp_path / "none", "--sequential")


def test_a_plan_is_made_shown_and_followed(tmp_path, teacher, texts, monkeypatch):
    time_briefly(monkeypatch)
    file = tmp_path / "plan.json"
    output = succeeds(
        *("plan", teacher, file, "--budget", "parameters=1.5x", "--budget", "flops=100%"),
        *("--objective", "size", "--batch", 2, "--tokens", 16, "--calibration", texts),
    )
    assert "embeddings.word_embeddings" in output and f"--plan {file}" in output
    out = tmp_path / "student"
    succeeds("compress", teacher, out, "--plan", file)
    student = read_model(str(out))
    assert student.config.plan.budget == {"parameters": "1.5x", "flops": "100%"}
    dense = sum(p.numel() for p in read_model(str(teacher)).parameters())
    assert sum(p.numel() for p in student.parameters()) <= dense / 1.5
    short = ("plan", teacher, file, "--tokens", 16, "--budget")
    assert "'parametres'" in fails(*short, "parametres=2x")
    assert "cannot be met" in fails(*short, "parameters=10")
    assert "tokens = 64 exceeds the 32 positions of this BertModel" in fails(
        *short, "flops=2x", "--tokens", 64
    )


def test_report_prints_and_draws_every_layer(tmp_path, teacher, student, texts, monkeypatch):
    time_briefly(monkeypatch)
    numbers, picture = tmp_path / "report.json", tmp_path / "report.png"
    output = succeeds(
        *("report", student, "--teacher", teacher, "--tokens", 16, "--calibration", texts),
        *("--json", numbers, "--picture", picture, "--threads", 1),
    )
    assert "the whole model" in output and "output error" in output
    rows = json.loads(numbers.read_text())["layers"]
    assert all(row["weight_error"] > 0 for row in rows) and picture.stat().st_size > 5000
    assert "compress it first" in fails("report", teacher)


def test_decompress_writes_a_stock_model(tmp_path, teacher, student):
    dense = tmp_path / "dense"
    assert "BertModel" in succeeds("decompress", student, dense)
    assert json.loads((dense / "config.json").read_text())["model_type"] == "bert"
    assert "factors" not in (dense / "config.json").read_text()
    ids = torch.tensor([[2, 5, 6, 3]])
    torch.testing.assert_close(
        read_model(str(dense))(ids)[0], read_model(str(student))(ids)[0], rtol=1e-4, atol=1e-5
    )
    assert "cannot decompress" in fails("decompress", teacher, tmp_path / "none")


def test_export_writes_a_program_and_reports_its_accuracy(tmp_path, student, monkeypatch):
    tiny.exporting()
    out = tmp_path / "program"
    output = succeeds("export", student, out, "--format", "torch_export", "--static")
    assert "run against PyTorch on batches of 2x16 tokens" in output and list(out.rglob("*.pt2"))
    assert "exists" in fails("export", student, out)
    assert "format" in fails("export", student, tmp_path / "none", "--format", "onyx")
    calls = []
    monkeypatch.setattr(
        "kroneckerbert.exporting.export", lambda *_, **options: calls.append(options)
    )
    succeeds("export", student, tmp_path / "onnx", "--int8", "--tolerance", 0.1)
    kept = {name: calls[0][name] for name in ("format", "dynamic", "quantize", "tolerance")}
    assert kept == {
        "format": "onnx",
        "dynamic": True,
        "quantize": "int8-dynamic",
        "tolerance": 0.1,
    }


@pytest.mark.skipif(abi.module is None, reason=str(abi.missing))
def test_export_for_cpp_writes_the_encoder_and_the_tokenizer(tmp_path, student, teacher):
    out = tmp_path / "native"
    output = succeeds("export", student, out, "--format", "native")
    assert f"Saved the encoder to {out / 'encoder.safetensors'}" in output
    assert {"encoder.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    options = ["--format", "native", "--int8"]
    assert "leave out --int8" in fails("export", student, tmp_path / "none", *options)
    output = fails("export", teacher, tmp_path / "none", "--format", "native")
    assert "does not compute a BertModel" in output


def test_distilling_on_text_raises_the_similarity(tmp_path, teacher, student, texts):
    options = ["--data", texts, "--epochs", 10, "--batch-size", 8]
    output = succeeds("distill", teacher, student, tmp_path / "out", *options)
    assert "loss hidden" in output and "last of 50" in output

    def cosine(folder):
        output = succeeds("evaluate", folder, "--data", texts, "--teacher", teacher)
        (line,) = [line for line in output.splitlines() if f"{folder} to {teacher}" in line]
        return float(line.split("│")[2])

    assert cosine(student) < cosine(tmp_path / "out") < 1
    assert "losses in trainer_state.json and curve.png" in output
    assert (tmp_path / "out" / "curve.png").stat().st_size > 5000
    assert len(curves.read(tmp_path / "out")) == 7  # the first step, every tenth, the summary
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 13


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_distilling_on_a_table_gives_a_student_without_a_classifier_the_teachers(
    tmp_path, classifier, table, cls
):
    student = classifier.with_name("classifier-student")
    if cls is not BertForSequenceClassification:
        student = student_of(save(tmp_path / "bare", cls, seed=1))
    out = tmp_path / "out"
    output = succeeds("distill", classifier, student, out, "--data", table, "--steps", 2)
    assert "loss labels" in output and "loss logits" in output
    model = read_model(str(out))
    assert type(model) is kroneckerbert.KroneckerBertForSequenceClassification
    assert model.config.label2id == {"neg": 0, "pos": 1}
    # After two small steps it is still the teacher's.
    taught = read_model(str(classifier))
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        torch.testing.assert_close(
            model.state_dict()[name], taught.state_dict()[name], atol=1e-3, rtol=0
        )
    assert "accuracy" in succeeds("evaluate", out, "--data", table, "--teacher", classifier)


def test_distilling_stops_by_the_clock_and_is_weighted_by_its_options(
    tmp_path, teacher, student, texts
):
    options = ["--minutes", 0.01, "--attention-weight", 0, "--embedding-weight", 0]
    output = succeeds("distill", teacher, student, tmp_path / "out", "--data", texts, *options)
    assert re.search(r"after \d+\.\d minutes", output)  # and not after its 10**9 steps
    assert "loss hidden" in output and "loss attention" not in output


def test_another_seed_gives_another_student(tmp_path, teacher, student, texts):
    # test_signals has equal weights for equal seeds.
    options = ["--data", texts, "--steps", 3, "--batch-size", 4, "--seed"]
    for seed in (0, 1):
        succeeds("distill", teacher, student, tmp_path / str(seed), *options, seed)
    first, second = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert not all(torch.equal(p, second[name]) for name, p in first.items())


def test_evaluating_a_task_reads_files_and_folders_and_shows_the_papers_numbers(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = "1\tgood film\n0\tthis is bad\n" * 8
    for name in ("sst2_dev.tsv", "imdb_test.tsv"):
        (folder / name).write_text(rows)
    names = {"id2label": {0: "negative", 1: "positive"}}
    names["label2id"] = {"negative": 0, "positive": 1}
    classifier = save(tmp_path / "classifier", BertForSequenceClassification, **names)
    student = student_of(classifier)
    of_folder = succeeds(
        "evaluate", student, "--task", "sst2", "--data", folder, "--teacher", classifier
    )
    assert "16 rows of validation" in of_folder and "91.1" in of_folder
    of_file = succeeds("evaluate", student, "--task", "sst2", "--data", folder / "sst2_dev.tsv")
    cells = [
        next(line for line in output.splitlines() if str(student) in line).split("│")[2]
        for output in (of_folder, of_file)
    ]
    assert cells[0].strip() == cells[1].strip()
    assert "test" in succeeds("evaluate", student, "--task", "imdb", "--data", folder)
    assert "there is no task 'sst3'" in fails("evaluate", student, "--task", "sst3")
    assert "has no split 'new'" in fails("evaluate", student, "--task", "sst2", "--split", "new")
    assert "rte_dev.tsv" in fails("evaluate", student, "--task", "rte", "--data", folder)
    assert "--data must be a file" in fails("evaluate", student, "--data", folder)
    assert "--data must be a file" in fails("evaluate", student)


def test_recipes_are_listed_and_run(tmp_path, monkeypatch):
    output = succeeds("recipes")
    for name in ("kronecker-bert-8", "kronecker-bert-21", "minilm-minutes"):
        assert name in output
    calls = []
    monkeypatch.setattr(
        "kroneckerbert.reproduction.run.run", lambda *arguments: calls.append(arguments)
    )
    options = ["--task", "rte", "--task", "sst2", "--seed", 3, "--set", "stage2.max_length=64"]
    succeeds("reproduce", "kronecker-bert-8", *options, "--data", tmp_path)
    recipe, *others = calls[0]
    assert recipe.tasks["rte"].stage2.max_length == 64
    assert others == [Path("runs/kronecker-bert-8"), tmp_path, ["rte", "sst2"], [3]]
    succeeds("reproduce", "minilm-minutes", "--output", tmp_path / "out")
    assert calls[1][1:] == (tmp_path / "out", None, None, None)
    assert "one of kronecker-bert-21" in fails("reproduce", "absent")
    line = fails("reproduce", "minilm-minutes", "--set", "stage1.arguments.lr=1")
    assert "stage1.arguments.lr is unknown" in line


def test_benchmark_states_threads_and_writes_the_printed_numbers(tmp_path, teacher, student):
    numbers = tmp_path / "deep" / "numbers.json"
    options = ["--batch", 1, "--batch", 2, "--tokens", 8, "--threads", 1, "--seconds", 0.01]
    output = succeeds("benchmark", teacher, student, *options, "--json", numbers)
    assert "8 tokens, 1 threads, cpu" in output
    data = json.loads(numbers.read_text())
    assert data["threads"] == 1
    dense, small = (data["models"][str(folder)] for folder in (teacher, student))
    for key in ("parameters", "bytes", "flops"):
        assert dense[key] > small[key] > 0
        assert f"({dense[key] / small[key]:.1f}x)" in output
    assert f"{small['parameters']:,}" in output
    for size in ("1", "2"):
        assert small["latency_ms"][size]["low"] <= small["latency_ms"][size]["high"]


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("kroneckerbert.demo.run", lambda *arguments: calls.append(arguments))
    succeeds("demo")
    succeeds("demo", "--output", tmp_path, "--minutes", 0.5, "--seed", 3)
    assert calls == [(Path("kroneckerbert-demo"), 4.0, 0), (tmp_path, 0.5, 3)]


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, teacher, texts):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "kroneckerbert.evaluation", raising=False)
    monkeypatch.delattr(kroneckerbert, "evaluation", raising=False)
    line = fails("evaluate", teacher, "--data", texts, "--teacher", teacher)
    assert line == "Error: this command needs torchmetrics: pip install 'kron-kernels[bert]'"


def test_errors_are_one_line_with_a_remedy(tmp_path, teacher, student, classifier, texts, table):
    out = tmp_path / "out"
    broken = tmp_path / "broken.tsv"
    broken.write_text("pos\tgood\nneg\n")
    for arguments, message in (
        (["compress", tmp_path / "absent", out], "absent is not a folder"),
        (["compress", "absent", out], ""),  # transformers' own message: offline, not cached
        (["compress", teacher, out, "--preset", "big"], "no preset is named 'big'; there are"),
        (["compress", student, out], "cannot compress a KroneckerBertModel"),
        (["compress", teacher, student], "holds a model; remove it or choose another"),
        (["compress", teacher, texts], "texts.txt is a file"),
        (["evaluate", student, "--data", texts], "add --teacher, or give a table"),
        (["evaluate", classifier, "--data", broken], "broken.tsv, line 2: 1 tab-separated field"),
        (["evaluate", teacher, "--data", table], "BertModel has no head for labels"),
        (
            ["benchmark", teacher, "--tokens", 33],
            f"tokens = 33 exceeds the 32 positions of {teacher}",
        ),
    ):
        assert message in fails(*arguments)
    for arguments, message in (
        (
            [teacher, student, out, "--data", texts, "--max-length", 33],
            "--max-length 33 exceeds the 32 positions of teacher and student",
        ),
        ([teacher, student, out, "--data", table], "fine-tuned on them"),
        (
            [classifier, student, out, "--data", broken],
            "broken.tsv, line 2",
        ),
    ):
        assert message in fails("distill", *arguments)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_without_vocabulary_or_with_damaged_weights_is_refused(tmp_path):
    bare = save(tmp_path / "bare", with_tokenizer=False)
    assert "bare has no tokenizer; save it there" in fails("compress", bare, tmp_path / "out")
    file = bare / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged or cut" in fails("compress", bare, tmp_path / "out")


def test_missing_weights_are_an_error(tmp_path):
    teacher = save(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (teacher / "config.json").write_text(json.dumps(config))
    line = fails("compress", teacher, tmp_path / "out")
    assert "of this BertForSequenceClassification. Tensors missing: classifier.bias, " in line
    config["vocab_size"] += 1
    (teacher / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    line = fails("compress", teacher, tmp_path / "out")
    assert "Tensors of another shape: embeddings.word_embeddings.weight (" in line


def test_a_save_that_fails_leaves_nothing_half_written(
    tmp_path, teacher, student, texts, monkeypatch
):
    out = tmp_path / "out"

    def full(self, folder, *args, **kwargs):
        (Path(folder) / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", full)
    assert "No space left" in fails("compress", teacher, out)
    options = ["--data", texts, "--steps", 1]
    assert "No space left" in fails("distill", teacher, student, out, *options)
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_is_not_saved(tmp_path, teacher, student, texts):
    out = tmp_path / "out"
    options = ["--data", texts, "--steps", 20, "--learning-rate", 1e9]
    assert "the training diverged" in fails("distill", teacher, student, out, *options)
    assert not out.exists()


def test_the_module_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("kroneckerbert", run_name="__main__")
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert "Usage: kroneckerbert [OPTIONS] COMMAND" in output
    for name in ("compress", "distill", "evaluate", "benchmark", "reproduce", "recipes", "demo"):
        assert name in output


def test_evaluating_shows_a_bar_on_a_terminal_only(teacher, student, texts, monkeypatch, capfd):
    command = ("evaluate", student, "--data", texts, "--teacher", teacher)
    quiet = succeeds(*command)
    monkeypatch.setattr(training, "errors", Console(force_terminal=True))
    shown = succeeds(*command) + capfd.readouterr().err
    assert "embedding: 100%" in shown and "%" not in quiet
