"""Benchmarks measure correct results, name what they leave out, and refuse bad options early."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import adapters, calls, layers, machine, peers, plots, training

pytestmark = pytest.mark.usefixtures("small_machine")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_cell_is_measured_written_shown_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "SECONDS", 0.01)
    options = ["--only", "width", "--match", "^16x16", "--quick", "--to", str(tmp_path)]
    output = invoke("layers", *options)
    assert "16x16 ⊗ 16x16" in output and "x dense" in output
    results = machine.read(tmp_path / "layers.json")
    (row,) = results["rows"]
    assert set(row["us"]) == set(layers.SWEPT) and row["left_out"] == {}
    assert row["flops"] == 128 * 2 * 2 * 16**3 and row["sets"] == layers.ROTATED
    assert {"cpu", "flags", "threads", "gemm_gflops", "others_busy"} <= set(results["machine"])

    for name in ("auto", "dense"):  # a thousand times faster, beyond any noise
        row["us"][name] = [row["us"][name][0]] * 3
    row["us"]["auto"] = [us / 1000 for us in row["us"]["auto"]]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(results))
    output = invoke("layers", *options, "--compare", str(earlier))
    assert "DROP" in output and "1 drops" in output


def test_the_steps_of_a_call_are_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "SECONDS", 0.01)
    output = invoke("calls", "--quick", "--to", str(tmp_path))
    steps = [row["step"] for row in machine.read(tmp_path / "calls.json")["rows"]]
    assert steps[2:4] == ["kron_matmul, once more", "kron_matmul, for the first time"]
    assert all(step in output for step in steps)


def test_adapters_are_measured_with_and_without_peft(tmp_path, monkeypatch):
    for name, value in (("SECONDS", 0.01), ("WIDTHS", (64,)), ("FACTORS", (4, -1))):
        monkeypatch.setattr(adapters, name, value)
    monkeypatch.setattr(adapters, "RANK", 1)
    broken = dict.fromkeys(("peft", "lycoris", "lycoris.modules.lokr"))
    for modules in ({}, broken):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        output = invoke("adapters", "--to", str(tmp_path))
        rows = machine.read(tmp_path / "adapters.json")["rows"]
        assert [tuple(row["sides"]) for row in rows] == [(4, 16)] * 2 + [(8, 8)] * 2
        for row in rows:
            assert {adapters.FORMED, adapters.MERGED, adapters.OURS} <= set(row["ms"])
            for name in (adapters.PEFT, adapters.SERVED, adapters.LYCORIS):
                assert (name in row["ms"]) != (name in row["left_out"])
                assert not modules or name in row["left_out"]
        assert "forming the product" in output
    assert "PEFT left out: ModuleNotFoundError" in " ".join(output.split())


def test_a_wrong_adapter_is_left_out(monkeypatch):
    monkeypatch.setattr(adapters, "by_peft", lambda layer, *_: [layer, layer])
    row = adapters.measured(64, -1, 3, 0.01)
    assert row["left_out"][adapters.PEFT].startswith("AssertionError: PEFT")
    assert adapters.PEFT not in row["ms"] and adapters.OURS in row["ms"]


def test_a_drop_needs_disjoint_quartiles():
    def row(auto: list[float]) -> layers.Row:
        us = {"dense": [10.0] * 3, "auto": auto}
        cell = {"group": "width", "layers": "2x2 2x2", "tokens": 1}
        return layers.Row({**cell, "flops": 1, "us": us, "slow": [], "left_out": {}})

    then = [row([1.0, 0.9, 1.1])]
    assert "1 drops" in layers.compare([row([2.0, 1.9, 2.1])], then)
    assert "0 drops" in layers.compare([row([2.0, 1.0, 2.1])], then)
    assert "0 drops" in layers.compare(then, then)


def test_wrong_or_raising_contenders_are_left_out_with_the_reason():
    def wrong(x, *factors):
        return lambda: peers.einsum(x, *factors) + 1e-3

    def raising(x, *factors):
        raise RuntimeError("no kernel")

    library = peers.Library("a-package", "a_module", {"wrong": wrong, "raising": raising})
    row = layers.time_cell(layers.Cell("forward", "4x4 3x3", 5), [library], 0.001)
    assert row["left_out"]["raising"] == "RuntimeError: no kernel"
    assert row["left_out"]["wrong"].startswith("AssertionError")
    assert "wrong" not in row["us"] and "dense" in row["us"]


def test_a_missing_library_is_skipped_with_the_command_that_installs_it(monkeypatch):
    missing = peers.Library("not-there", "not_there", {})
    monkeypatch.setattr(peers, "LIBRARIES", [missing])
    found, lines = peers.installed()
    assert found == [] and "pip install not-there" in lines[0]


@pytest.mark.parametrize("group", ["training", "feed_forward", "bf16", "equal_size"])
def test_every_kind_of_cell_is_checked_and_measured(group):
    shapes = {"feed_forward": "4x2 6x6, 2x4 6x6"}.get(group, "4x2 6x6")
    row = layers.time_cell(layers.Cell(group, shapes, 7), [], 0.001)
    assert layers.Row(row).ours in row["us"] and "dense" in row["us"]
    assert row["left_out"] == {}


@pytest.mark.parametrize(
    "group, dtype", [*zip(layers.MANY, ("float64", "float64", "float32"), strict=True)]
)
def test_many_factors_are_checked_and_measured(group, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "SECONDS", 0.01)
    monkeypatch.setitem(layers.GROUPS, group, [("3x3 3x3 3x3", 5, dtype)])
    output = invoke("layers", "--only", group, "--to", str(tmp_path))
    assert "3 of 3x3" in output and (dtype in output or dtype == "float32")
    (row,) = machine.read(tmp_path / "many_factors.json")["rows"]
    assert {"auto", "torch: matmul per axis"} <= row["us"].keys() and row["left_out"] == {}
    assert not {"dense", "eager", "kron"} & row["us"].keys() and row["dtype"] == dtype
    assert "geometric means" in invoke("report", str(tmp_path))


def test_sets_of_operands_take_turns():
    call = layers.rotate([lambda i=i: i for i in range(3)])
    assert [call() for _ in range(4)] == [0, 1, 2, 0]


def test_a_busy_machine_is_warned_about_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 80.0)
    seconds = iter([0.0, 100.0])
    monkeypatch.setattr(machine, "_busy", lambda: next(seconds))
    with machine.recording(tmp_path / "results.json", 1):
        pass
    warnings = capsys.readouterr().err
    assert "takes 80% of the cores" in warnings and "measure again" in warnings
    written = machine.read(tmp_path / "results.json")
    assert written["machine"]["others_busy"] > machine.BUSY


def test_rows_are_on_disk_before_the_run_ends(tmp_path):
    path = tmp_path / "new" / "results.json"
    with pytest.raises(RuntimeError), machine.recording(path, 1, [{"n": 0}]) as record:
        record.add({"n": 1})
        raise RuntimeError("a long run is cut off")
    assert machine.read(path)["rows"] == [{"n": 0}, {"n": 1}]


def test_an_exponent_is_that_of_the_power_law():
    sizes = [2.0, 5.0, 11.0]
    assert layers.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)


def test_flops_and_bytes_of_a_cell():
    cell = layers.Cell("presets", "16x2 192x384", 10)
    assert cell.flops == 10 * 2 * (2 * 384 * 192 + 16 * 2 * 192)  # b first
    assert cell.dense_flops == 10 * 2 * 768 * 3072
    assert cell.entries == 16 * 2 + 192 * 384
    assert cell.bytes_moved == 4 * (10 * (768 + 3072) + cell.entries)


def test_our_gradients_are_compared_with_pytorchs_before_steps_are_timed(monkeypatch):
    tiny = {"input_ids": torch.arange(1, 21).view(2, 10), "labels": torch.tensor([0, 1])}
    monkeypatch.setattr(training, "batch_of", lambda *_: tiny)
    sizes = {"num_hidden_layers": 1, "vocab_size": 100}
    contenders = {name: training.model(name, **sizes) for name in training.CONTENDERS}
    training.check(contenders)
    broken = contenders["8x"].bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        broken.a *= 1.01
    with pytest.raises(AssertionError, match="8x"):
        training.check(contenders)


def test_committed_results_are_reported(tmp_path):
    output = invoke("report", "--pictures", str(tmp_path))
    assert "geometric means" in output
    for heading in (
        "BERT_BASE, median ms",
        "a step of training BERT_BASE",
        "peak memory of a training step",
        "budgets of plans",
        "encoder linears",
        "students of 21x, per cent",
        "a pass of distillation",
    ):
        assert heading in output
    pictures = {"speed", "scaling", "roofline", "layers", "model", "training", "forms"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in pictures)


def test_pictures_of_committed_results_go_to_the_documentation(tmp_path):
    assert machine.pictures_of(machine.RESULTS) == machine.PICTURES
    assert machine.pictures_of(tmp_path) == tmp_path
    assert plots.draw_all(tmp_path, tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("layers --threads 0", "'0' must be a whole number of at least 1"),
        ("layers --threads 1000000000", "'1000000000' must be a whole number of at least 1"),
        ("model --tokens 513", "'513' must be a whole number of at least 1 and at most 512"),
        ("model --batch x", "'x' must be a whole number"),
        ("model --only none", "none: there are sizes, sentences, minilm"),
        ("model --data missing", "missing"),
        ("threads --most 0", "'0' must be a whole number of at least 1"),
        ("threads --to list.json/x", "list.json/x"),
        ("targets empty", "empty has no results"),
        ("targets bad", "bad holds no results"),
        ("layers --match (", "'(' is not a regular expression"),
        ("layers --match 3x3", "no cell matches '3x3'"),
        ("layers --only none", "none: there are"),
        ("layers --compare list.json", "list.json holds no results of this benchmark"),
        ("layers --compare missing.json", "missing.json"),
        *((f"{verb} --to list.json/x", "list.json/x") for verb in command.ALL),
        ("eager-forms --to list.json/x", "list.json/x"),
        ("distillation-speed --to list.json/x", "list.json/x"),
        ("budgets MiniLM", "'MiniLM' must be NAME=FOLDER"),
        ("budgets a=b --to list.json/x", "list.json/x"),
        ("starts a=b --data missing", "missing"),
        ("study --data missing", "missing"),
        ("report empty", "empty has no results"),
        ("report bad", "bad/layers.json holds no results"),
        ("report full --pictures list.json/x", "cannot write list.json/x"),
        ("frobnicate", "No such command 'frobnicate'"),
    ],
)
def test_bad_options_are_refused_in_one_line_before_any_work(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad", "full"):
        (tmp_path / folder).mkdir()
    for file in ("list.json", "bad/layers.json", "bad/model.json", "full/layers.json"):
        (tmp_path / file).write_text("[1]")
    done = CliRunner().invoke(command.app, arguments.split())
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.output
    (line,) = [s for s in done.output.splitlines() if "Error" in s or "Traceback" in s]
    assert line.startswith("Error: ") and message in line and "This is a bug" not in line
