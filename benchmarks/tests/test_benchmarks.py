"""The benchmarks measure what is right and say what they leave out; pictures need JSON only."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import layer_tables, layers, machine, memory, model, peers, plots, training
from benchmarks.__main__ import app

COMMITTED = machine.RESULTS


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "gemm_rate", lambda: 80.0)
    monkeypatch.setattr(machine, "bandwidth", lambda: 20.0)
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 0.0)


def test_a_cell_is_measured_written_told_and_compared(tmp_path):
    options = ["--only", "width", "--match", "^16x16", "--seconds", "0.001", "--to", str(tmp_path)]
    told = invoke("layers", *options)
    assert "16x16 ⊗ 16x16" in told and "x dense" in told
    results = json.loads((tmp_path / "layers.json").read_text())
    (row,) = results["rows"]
    assert set(row["us"]) == set(layers.SWEPT) and row["left_out"] == {}
    assert row["flops"] == 128 * 2 * 2 * 16**3 and row["sets"] == layers.ROTATED
    assert {"cpu", "flags", "threads", "gemm_gflops", "others_busy"} <= set(results["machine"])

    for name in row["us"]:  # twice as slow as it was: a drop beyond any noise
        row["us"][name] = [us * (0.5 if name == "auto" else 1) for us in row["us"][name]]
    row["us"]["auto"] = row["us"]["auto"][:1] * 3
    row["us"]["dense"] = row["us"]["dense"][:1] * 3
    now, then = json.loads(json.dumps(row)), row
    now["us"]["auto"] = [2 * us for us in now["us"]["auto"]]
    told = layer_tables.compare([layer_tables.Row(now)], [layer_tables.Row(then)])
    assert "DROP" in told and "1 drops" in told


def test_groups_and_cells_that_are_not_there_are_named():
    runner = CliRunner()
    assert "no_such" in runner.invoke(app, ["layers", "--only", "no_such"]).output
    assert "no cell matches" in runner.invoke(app, ["layers", "--match", "3x3"]).output


def test_who_is_wrong_or_raises_is_left_out_with_the_reason(monkeypatch):
    def wrong(x, *factors):
        return lambda: peers.einsum(x, *factors) + 1e-3

    def raising(x, *factors):
        raise RuntimeError("no kernel")

    library = peers.Library("a-package", "a_module", {"wrong": wrong, "raising": raising})
    row = layers.measure(layers.Cell("forward", "4x4 3x3", 5), [library], 0.001)
    assert row["left_out"]["raising"] == "RuntimeError: no kernel"
    assert row["left_out"]["wrong"].startswith("AssertionError")
    assert "wrong" not in row["us"] and "dense" in row["us"]


def test_a_library_that_is_missing_is_skipped_with_a_word(monkeypatch):
    missing = peers.Library("not-there", "not_there", {})
    monkeypatch.setattr(peers, "LIBRARIES", [missing])
    found, words = peers.installed()
    assert found == [] and "pip install not-there" in words[0]


@pytest.mark.parametrize("group", ["training", "feed_forward", "bf16", "equal_size"])
def test_every_kind_of_cell_is_checked_and_measured(group):
    shapes = "4x2 6x6, 2x4 6x6" if group == "feed_forward" else "4x2 6x6"
    row = layers.measure(layers.Cell(group, shapes, 7), [], 0.001)
    assert layer_tables.Row(row).ours in row["us"] and "dense" in row["us"]
    assert row["left_out"] == {}


def test_sets_of_operands_take_turns():
    call = layers.rotate([lambda i=i: i for i in range(3)])
    assert [call() for _ in range(4)] == [0, 1, 2, 0]


def test_other_work_on_the_machine_is_told(monkeypatch, capsys):
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 80.0)
    seconds = iter([0.0, 100.0])
    monkeypatch.setattr(machine, "_busy", lambda: next(seconds))
    results = {"machine": {}}
    with machine.watched(results):
        pass
    told = capsys.readouterr().err
    assert "takes 80% of the cores" in told and "measure again" in told
    assert results["machine"]["others_busy"] > machine.BUSY


def test_an_exponent_is_that_of_the_power_law():
    sizes = [2.0, 5.0, 11.0]
    assert layer_tables.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)


def test_flops_and_bytes_of_a_cell():
    cell = layers.Cell("presets", "16x2 192x384", 10)
    assert cell.flops == 10 * 2 * (2 * 384 * 192 + 16 * 2 * 192)  # b first
    assert cell.dense_flops == 10 * 2 * 768 * 3072
    assert cell.entries == 16 * 2 + 192 * 384
    assert cell.bytes_moved == 4 * (10 * (768 + 3072) + cell.entries)


def test_our_gradients_are_held_to_pytorchs_before_steps_are_timed(monkeypatch):
    config = {"num_hidden_layers": 1, "vocab_size": 100}
    monkeypatch.setattr(training, "batch_of", lambda *_: _tiny_batch())
    contenders = {name: training.model(name, **config) for name in training.CONTENDERS}
    training.check(contenders)
    broken = contenders["8x"].bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        broken.a *= 1.01
    with pytest.raises(AssertionError, match="8x"):
        training.check(contenders)


def _tiny_batch():
    return {"input_ids": torch.arange(1, 21).view(2, 10), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("name", ["layers", "model", "training", "memory"])
def test_tables_of_the_committed_results(name):
    results = json.loads((COMMITTED / f"{name}.json").read_text())
    if name == "layers":
        assert "geometric means" in layer_tables.report(results)
    else:
        module = {"model": model, "training": training, "memory": memory}[name]
        assert all(table.row_count for table in module.tables(results))


def test_every_picture_is_drawn_from_the_committed_results(tmp_path):
    drawn = {path.stem for path in plots.draw_all(COMMITTED, tmp_path)}
    assert {"speed", "scaling", "roofline", "layers", "model", "training", "quality"} == drawn
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in drawn)


README = (COMMITTED.parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_of_layers_is_that_of_the_results():
    rows = map(layer_tables.Row, json.loads((COMMITTED / "layers.json").read_text())["rows"])
    told = {}
    for row in rows:
        if row.cell.group in ("presets", "feed_forward"):
            best = row.families().get("torch")
            cell = f"{row.speed('dense'):.1f}"
            told.setdefault(row.cell.layers, []).append(
                f"{cell} ({row.speed('dense', best):.1f})" if best else cell
            )
    assert len(told) == 8
    for cells in told.values():
        assert f"| {' | '.join(cells)} |" in README


def test_the_readmes_tables_of_models_are_those_of_the_results():
    cells = json.loads((COMMITTED / "model.json").read_text())["cells"]
    shown = {(1, 16), (1, 128), (1, 512), (8, 128)}
    for name in ("dense eager", "dense torch.compile", "8x", "21x", "dense onnxruntime int8"):
        times = [
            (cell["ms"][name][0], cell["ms"]["dense eager"][0] / cell["ms"][name][0])
            for cell in cells
            if (cell["batch"], cell["tokens"]) in shown
        ]
        told = (f"{ms:.{1 if ms < 100 else 0}f} ({ratio:.1f})" for ms, ratio in times)
        assert f"| {' | '.join(told)} |" in README
    steps = json.loads((COMMITTED / "training.json").read_text())["cells"]
    peaks = json.loads((COMMITTED / "memory.json").read_text())["cells"]
    peak = next(cell["mb"] for cell in peaks if cell["batch"] == 8)
    for name in training.CONTENDERS:
        ratios = [cell["ms"]["dense eager"][0] / cell["ms"][name][0] for cell in steps]
        told = [
            f"{cell['ms'][name][0]:.0f} ms ({r:.1f})" for cell, r in zip(steps, ratios, strict=True)
        ]
        less = peak["dense eager"]["peak"] / peak[name]["peak"]
        told.append(f"{peak[name]['peak']} MB ({less:.1f})")
        assert f"| {' | '.join(told)} |" in README
