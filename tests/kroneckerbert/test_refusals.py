"""Bad input to every command: a one-line error that names it, before any work."""

import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import typer
from commands import WORDS, fails, run, save, succeeds, time_briefly
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from kron_kernels import doctor
from kroneckerbert.cli.app import app
from kroneckerbert.cli.shell import number

# Does not exist: an error that names it came too late, after reading the model.
MODEL = "./no-such-model"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher, a student, a classifier and texts, which no test may change."""
    place = tmp_path_factory.mktemp("place")
    save(place / "teacher", num_hidden_layers=1)
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    save(place / "classifier", BertForSequenceClassification, num_hidden_layers=1, **names)
    succeeds("compress", place / "teacher", place / "student")
    (place / "texts.txt").write_text("\n".join(" ".join(WORDS[i:]) for i in range(8)))
    (place / "table.tsv").write_text("pos\tgood film\nneg\tthis is bad\n" * 4)
    return place


def commands(place: Path) -> dict[str, list]:
    return {
        "plan": ["plan", MODEL, place / "plan.json", "--budget", "latency=2x"],
        "report": ["report", MODEL],
        "export": ["export", MODEL, place / "out"],
        "distill": ["distill", MODEL, MODEL, place / "out", "--data", place / "texts.txt"],
        "evaluate": ["evaluate", MODEL, "--teacher", MODEL, "--data", place / "texts.txt"],
        "benchmark": ["benchmark", MODEL],
        "reproduce": ["reproduce", "minilm-minutes"],
        "demo": ["demo"],
    }


COUNTS = {
    "plan": ("--batch", "--tokens", "--threads"),
    "report": ("--batch", "--tokens", "--threads"),
    "distill": ("--steps", "--batch-size", "--max-length"),
    "evaluate": ("--batch-size",),
    "benchmark": ("--batch", "--tokens", "--threads"),
}
AMOUNTS = {
    "export": ("--tolerance",),
    "distill": (
        *("--minutes", "--epochs", "--learning-rate", "--embedding-weight", "--attention-weight"),
        *("--hidden-weight", "--logits-weight", "--labels-weight"),
    ),
    "benchmark": ("--seconds",),
    "demo": ("--minutes",),
}
SEEDS = dict.fromkeys(("distill", "reproduce", "demo"), ("--seed",))


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (command, option, values)
        for options, values in (
            (COUNTS, ("0", "nan", "9" * 30)),
            (AMOUNTS, ("-1", "inf", "nan")),
            (SEEDS, ("", str(2**32))),
        )
        for command, names in options.items()
        for option in names
    ],
)
def test_a_number_out_of_range_is_refused(place, command, option, values):
    for value in values:
        code, output = run(*commands(place)[command], option, value)
        assert code == 2
        assert f"Error: Invalid value for '{option}': {value!r} must be a" in output
        assert output.endswith(f"{command} --help.\n")


@settings(max_examples=50, deadline=None)
@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_a_number_is_in_range_or_refused(text):
    for kind, least, above in ((int, 1, False), (float, 0, False), (float, 0, True)):
        parse = number(kind, "", least, above=above).parser
        try:
            value = parse(text)
        except typer.BadParameter as error:
            assert repr(text) in str(error)
        else:
            assert type(value) is kind and least <= value <= 10**9 and not (above and value == 0)


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("plan", "--objective", "speed", "'speed' must be one of error, size, latency"),
        ("export", "--format", "", "'' must be one of onnx, openvino, torch_export, aoti"),
        ("plan", "--budget", "error=nan", "budget['error'] = nan must be a number"),
        ("plan", "--budget", "bytes=inf", "budget['bytes'] = inf must be a number"),
        ("plan", "--budget", "bytes=1e999x", "budget['bytes'] = '1e999x' must be a number"),
        ("plan", "--budget", "flops=-1", "budget['flops'] = -1.0 must be a number"),
        ("benchmark", "--frobnicate", "1", "No such option"),
        ("evaluate", "--task", "sst3", "there is no task 'sst3'"),
        ("reproduce", "--set", "seeds=[", "is not YAML"),
        ("reproduce", "--set", "seeds=&a [*a]", "minilm-minutes: seeds must be"),
        ("reproduce", "--set", "stage1.batch_size=x", "minilm-minutes: stage1.batch_size must be"),
        *(
            ("reproduce", "--set", f"{key}={value}", f"minilm-minutes: {key} must be")
            for key, value in (
                ("seeds", "[-1]"),
                ("student.calibration", -1),
                ("stage1.corpus.share", ".nan"),
                ("stage1.arguments.learning_rate", ".inf"),
                ("stage1.arguments.learning_rate", -1),
                ("stage1.arguments.gradient_accumulation_steps", 0),
                ("evaluation.batch_size", 0),
                ("latency.seconds", ".inf"),
                ("latency.tokens", 0),
                ("latency.threads", 10**9),
            )
        ),
    ],
)
def test_an_invalid_option_is_refused_before_any_work(
    place, monkeypatch, command, option, value, expected
):
    monkeypatch.chdir(place)
    assert expected in fails(*commands(place)[command], option, value)


def test_a_wrong_global_option_is_one_line_and_no_arguments_show_the_help():
    named = (": --frobnicate", " '--frobnicate'")  # by typer, and by click with typer 0.19
    assert fails("--frobnicate") in {f"Error: No such option{n}; see root --help." for n in named}
    code, output = run()
    assert code == 2 and "COMMAND" in output and "Error" not in output


# Files that are read


@pytest.fixture(scope="module")
def damaged(place) -> dict[str, Path]:
    """Unusable files, by their fault."""
    folder = place / "damaged"
    folder.mkdir()
    contents = {
        "empty": b"",
        "binary": b"\x89\xff\x00" * 99,
        "utf16": "good\tfilm\n".encode("utf-16"),
        "deep.json": b"[" * 1200,
        "list.json": b"[1]",
        "number.json": b"5",
        "cut.gz": b"\x1f\x8b\x08",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    paths = [folder / "missing", folder / ("long" * 99), *folder.iterdir()]
    devices = [path for path in map(Path, ("/dev/null", "/proc/self/mem")) if path.exists()]
    return {path.stem: path for path in [*paths, *devices, Path("")]}


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", MODEL, "out", "--plan"),
        ("compress", MODEL, "out", "--calibration"),
        ("distill", MODEL, MODEL, "out", "--data"),
        ("evaluate", MODEL, "--task", "squad", "--data"),
        ("reproduce",),
    ],
)
def test_an_unreadable_input_file_is_named(damaged, place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    for kind, path in damaged.items():
        # As text, JSON is no worse than other text.
        if kind in ("deep", "list", "number") and (arguments[0], arguments[-1]) in (
            ("compress", "--calibration"),
            ("distill", "--data"),
        ):
            continue
        line = fails(*arguments, path)
        assert str(path) in line and MODEL not in line, line


@pytest.mark.parametrize(
    "changed",
    [
        {"factors": [1]},
        {"factors": None},
        {"layers": 5},
        {"layers": [5]},
        {"layers": [{"path": "x"}]},
        {"totals": []},
        {"budget": "x"},
        {"objective": 3},
        {"version": 2},
    ],
)
def test_an_invalid_plan_is_named(tmp_path, changed):
    plan = {"factors": {}, "layers": [], "totals": {}, "setting": {}, "budget": {}}
    plan |= {"objective": "error", "version": 1}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | changed))
    line = fails("compress", MODEL, tmp_path / "out", "--plan", path)
    assert f"{path}: this is not a plan" in line


# Files that are written


@pytest.mark.parametrize(
    "command",
    [
        ("plan", MODEL, "OUT", "--budget", "latency=2x"),
        ("report", MODEL, "--json", "OUT"),
        ("report", MODEL, "--picture", "OUT.png"),
        ("benchmark", MODEL, "--json", "OUT"),
        ("compress", MODEL, "OUT"),
        ("decompress", MODEL, "OUT"),
        ("export", MODEL, "OUT"),
        ("distill", MODEL, MODEL, "OUT", "--data", "texts.txt"),
        ("demo", "--output", "OUT"),
    ],
)
def test_an_unwritable_output_is_reported_before_any_work(place, tmp_path, command):
    shutil.copy(place / "texts.txt", tmp_path / "texts.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "full.png").mkdir()
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    for name in ("full", "texts.txt/below", "loop", "long" * 99):
        words = [w.replace("OUT", str(tmp_path / name)) for w in command]
        words = [str(place / w) if w == "texts.txt" else w for w in words]
        line = fails(*words)
        assert str(tmp_path / name) in line and MODEL not in line, line
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"file"}


def test_a_plan_is_written_to_a_pipe_like_other_results(place, tmp_path, monkeypatch):
    time_briefly(monkeypatch)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    succeeds("plan", place / "teacher", pipe, "--budget", "parameters=1.5x", "--tokens", 8)
    reader.join(10)
    assert "factors" in json.loads(read[0]) and pipe.is_fifo()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["distill", MODEL, MODEL, "out", "--data", "texts.txt", "--steps", 2, "--epochs", 1],
            "are two lengths",
        ),
        (["plan", MODEL, "plan.json", "--budget", "foo"], "quantity and its limit"),
        (
            ["plan", MODEL, "p", "--budget", "bytes=1", "--budget", "bytes=2"],
            "two limits of 'bytes'",
        ),
        (["evaluate", MODEL, "--data", "texts.txt", "--split", "test"], "give --task as well"),
        (["evaluate", MODEL], "--data must be a file"),
        (["compress", MODEL, "out", "--sequential"], "give --calibration"),
        (["report", MODEL, "--calibration", "texts.txt"], "--teacher"),
        (["report", MODEL, "--json", "x.png", "--picture", "x.png"], "give two files"),
        (["report", MODEL, "--picture", "x.foo"], "x.foo must end in one of .png, .svg, .pdf"),
        (["benchmark", MODEL, MODEL], "named twice"),
    ],
)
def test_options_that_do_not_go_together_end_with_status_2(place, monkeypatch, words, expected):
    monkeypatch.chdir(place)
    code, output = run(*words)
    assert code == 2 and expected in output and output.startswith("Error: ")


def test_an_input_is_not_overwritten(place, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (teacher, student):
        shutil.copytree(place / folder.name, folder)
    texts = tmp_path / "texts.txt"
    shutil.copy(place / "texts.txt", texts)
    plan = ["plan", teacher, "--budget", "latency=2x", "--calibration", texts]
    for words in (
        [*plan, teacher / "config.json"],
        [*plan, texts],
        ["report", student, "--json", student / "config.json"],
        ["report", student, "--teacher", teacher, "--json", teacher / "model.safetensors"],
        ["benchmark", teacher, student, "--json", student / "tokenizer.json"],
    ):
        before = Path(words[-1]).read_bytes()
        assert "would be overwritten" in fails(*words)
        assert Path(words[-1]).read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_loses_no_numbers(place):
    code, output = run(
        *("benchmark", place / "teacher", "--tokens", 8, "--batch", 1, "--seconds", 0),
        *("--json", "/dev/full"),
    )
    assert code == 1 and "median time" in output
    assert "Error: cannot write /dev/full: No space left on device." in output


# Models


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("config.json", b"[" * 1200),
        ("config.json", {"hidden_size": 32}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"hidden_size": -16}),
        ("config.json", {"hidden_size": 2**40}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"hidden_act": "none such"}),
        ("config.json", {"num_hidden_layers": 2}),
        ("config.json", {"architectures": {"a": 1}}),
        ("config.json", {"architectures": [5]}),
        ("config.json", {"architectures": ["Trainer"]}),
        ("config.json", {"architectures": ["GPT2Model"]}),
        ("config.json", {"model_type": "none such"}),
        ("config.json", {"model_type": "t5"}),
        ("config.json", {"id2label": 5}),
        ("config.json", {"dtype": "float99"}),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 99),
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", pickle.dumps(print)),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b"[" * 1200),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"[" * 1200),
    ],
)
def test_a_model_with_a_bad_file_is_named(place, tmp_path, file, content):
    model = tmp_path / "model"
    shutil.copytree(place / "teacher", model)
    path = model / file
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    if file.startswith(("pytorch", "model.")):
        (model / "model.safetensors").unlink()
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)
    line = fails("compress", model, tmp_path / "out")
    assert str(model) in line and ("Error: " not in line[7:] or "RuntimeError" not in line[:20])
    assert file != "pytorch_model.bin" or "safetensors" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", [None, 5, "", [1], "none such"])
def test_running_code_from_a_folder_is_never_offered(place, tmp_path, found):
    model = tmp_path / "model"
    shutil.copytree(place / "student", model)
    config = json.loads((model / "config.json").read_text()) | {"model_type": found}
    (model / "config.json").write_text(json.dumps(config))
    code, output = run("report", model)
    assert code == 1 and output.startswith(f"Error: {model} ") and str(found) in output
    assert output.count("\n") == 1 and "custom code" not in output


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"hidden_size": 32}, "has no dense embeddings.word_embeddings of 13x16"),
        ({"intermediate_size": 64}, "has no dense encoder.layer.0.intermediate.dense of 32x16"),
    ],
)
def test_another_teacher_than_the_students_is_refused(place, tmp_path, sizes, expected):
    other = save(tmp_path / "other", num_hidden_layers=1, **sizes)
    assert expected in fails("report", place / "student", "--teacher", other, "--tokens", 8)


def test_a_student_with_a_damaged_shape_or_fewer_positions_is_refused(place, tmp_path):
    short = save(tmp_path / "short", num_hidden_layers=1, max_position_embeddings=8)
    command = ["distill", place / "classifier", short, tmp_path / "out", "--steps", 1]
    command += ["--data", place / "table.tsv"]
    assert "exceeds the 8 positions" in fails(*command, "--max-length", 16)
    config = short / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 13', '"vocab_size": 12'))
    line = fails(*command)
    assert str(short) in line and "of another shape" in line


def test_the_doctor_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--verbose"])
    assert end.value.code == 2 and "--verbose" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_named_as_the_cause(place, tmp_path):
    small = save(tmp_path / "small", num_hidden_layers=1, vocab_size=6)
    command = ["evaluate", small, "--teacher", place / "teacher", "--data", place / "texts.txt"]
    assert "tokenizer of another model" in fails(*command)


# Unusable input


def test_out_of_memory_names_the_remedy(place, monkeypatch):
    def allocate(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr("kroneckerbert.measure.latency", allocate)
    line = fails("benchmark", place / "teacher", "--tokens", 8)
    assert "not enough memory" in line and "a smaller batch" in line


def test_a_bug_says_how_to_get_the_traceback(place, monkeypatch):
    def broken(*arguments):
        raise KeyError("x")

    monkeypatch.setattr("kroneckerbert.measure.latency", broken)
    command = ["benchmark", place / "teacher", "--tokens", 8]
    code, output = run(*command)
    assert code == 1 and "Error: KeyError: 'x'" in output and "kroneckerbert --debug" in output
    with pytest.raises(KeyError):
        run("--debug", *command)


def test_an_ascii_terminal_gets_a_table(place, monkeypatch):
    time_briefly(monkeypatch)
    result = CliRunner(charset="ascii").invoke(
        app, ["report", str(place / "student"), "--tokens", "8", "--batch", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "2x2" in result.output


def test_a_closed_pipe_prints_no_error(place, monkeypatch):
    def closed(*arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("kroneckerbert.measure.latency", closed)
    assert run("benchmark", place / "teacher", "--tokens", 8) == (1, "")
