"""Whole models: contenders are what they are called, are checked, and are shown as measured."""

import json
import sys

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import contenders, machine, markdown, memory, model, sentences, targets, threads
from benchmarks.contenders import BY_LAYERS, INT8, LOW_RANK
from benchmarks.machine import DENSE
from benchmarks.training import PRESETS
from kron_kernels.backends import native
from kroneckerbert import KroneckerBertConfig
from kroneckerbert.serving import why_not

pytestmark = pytest.mark.usefixtures("small_machine")

# The vocabulary is that of the tokenizer.
SMALL = BertConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
)


def entries(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_low_rank_has_the_students_words_and_as_many_entries_as_whole_ranks_allow(preset):
    config = KroneckerBertConfig.preset(PRESETS[preset])
    shapes, layout = config.kronecker_shapes(), config.layout()
    factors = contenders.low_rank_factors(config)
    assert factors.keys() == shapes.keys()
    for path, ((of_preset,), (term,)) in zip(
        shapes, zip(shapes.values(), factors.values(), strict=True), strict=True
    ):
        if path == layout.table:
            assert (tuple(term["a_shape"]), term["rank"]) == of_preset.part
            continue
        rows, columns = layout.sizes[path]
        assert term["a_shape"] == [rows, 1]
        a, b = of_preset.m1 * of_preset.n1, of_preset.m2 * of_preset.n2
        assert term["rank"] == (a + b) // (rows + columns) > 0


def test_an_encoder_in_onnx_runtime_is_called_like_the_encoder(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    teacher = BertModel(SMALL).eval()
    runtime = contenders.InRuntime(teacher, tmp_path, 1)
    parameters = sum(p.numel() for p in teacher.parameters())
    assert parameters < runtime.bytes < 2 * parameters  # a byte each, and the graph
    ids, mask = torch.randint(1, 30000, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.inference_mode():
        expected = teacher(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found = runtime(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert torch.cosine_similarity(found, expected, -1).min() > 0.95
    assert runtime.base_model is runtime and runtime.config is teacher.config


def test_all_ways_of_a_student_compute_the_same_but_low_rank():
    ids = torch.randint(1, 30000, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        ours, by_layers, low_rank = (
            contenders.run_torch(contenders.module(name, SMALL), ids, mask).last_hidden_state[
                mask.bool()
            ]
            for name in ("8x", f"8x {BY_LAYERS}", f"8x {LOW_RANK}")
        )
    torch.testing.assert_close(ours, by_layers, rtol=1e-4, atol=1e-4)
    assert (ours - low_rank).abs().max() > 0.1


@pytest.mark.skipif(bool(native.why_not(torch.ones(1))), reason="no compiled kernels")
def test_the_engine_computes_students_but_not_by_layers():
    with torch.inference_mode():
        assert why_not(contenders.module("8x", SMALL)) is None
        assert why_not(contenders.module(f"8x {LOW_RANK}", SMALL)) is None
        assert "hook" in why_not(contenders.module(f"8x {BY_LAYERS}", SMALL))


def test_a_student_that_differs_from_pytorchs_operators_is_not_timed():
    student = contenders.module("8x", SMALL)
    contenders.check(student)
    layer = student.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda module, _, y: y * 1.01 if module.backend == "auto" else y)
    with pytest.raises(AssertionError, match="student"):
        contenders.check(student)


def test_a_missing_runtime_is_left_out_with_the_command_that_installs_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    names = ("dense openvino int8", DENSE)
    assert [*contenders.contenders(names, SMALL, tmp_path, 1)] == [DENSE]
    assert "pip install 'kron-kernels[openvino]'" in capsys.readouterr().err


def test_an_int8_that_is_far_off_is_not_timed():
    dense = contenders.module(DENSE, SMALL)
    ids = torch.randint(1, 30000, (1, 8))
    with torch.inference_mode():
        right = dense(ids).last_hidden_state
    contenders.compare(dense, {"right": lambda given: right}, contenders.feeds(ids))
    with pytest.raises(AssertionError, match="wrong"):
        contenders.compare(dense, {"wrong": lambda given: right.flip(0, 1)}, contenders.feeds(ids))


def test_sentences_are_real_spread_and_the_same_each_time():
    chosen = sentences.choose(sentences.source(None))
    assert chosen == sentences.choose(sentences.source(None))
    words = [len(sentence.split()) for sentence in chosen]
    assert len(set(chosen)) == sentences.COUNT
    assert min(words) >= sentences.LEAST and max(words) <= sentences.MOST
    assert max(words) > 2 * min(words)  # of mixed length


def test_a_text_with_too_few_sentences_is_refused(tmp_path):
    text = tmp_path / sentences.WIKIPEDIA.removesuffix(".gz")
    text.write_text("One of five whole words. Short one.\n" * 20)
    assert sentences.source(tmp_path).parent == tmp_path
    with pytest.raises(ValueError, match=r"has 20 sentences of 5 to 60 words; 32 are needed"):
        sentences.choose(text)


def test_whole_models_are_measured_written_and_shown(tmp_path, monkeypatch):
    names = (DENSE, INT8, "8x", f"8x {BY_LAYERS}")
    monkeypatch.setattr(model, "CONTENDERS", dict.fromkeys(model.CONTENDERS, names))
    monkeypatch.setattr(model, "BASES", dict.fromkeys(model.BASES, SMALL))
    monkeypatch.setattr(model, "SECONDS", 0.01)
    options = ["--batch", "2", "--tokens", "5", "--quick", "--to", str(tmp_path)]
    done = CliRunner().invoke(command.app, ["model", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = machine.read(tmp_path / "model.json")
    assert [row["model"] for row in results["rows"]] == [model.BERT] * 2 + [model.MINILM] * 2
    assert all(set(row["ms"]) == set(names) for row in results["rows"])
    real = model.sentences_row(results)
    assert real["batch"] == 32 < real["real_tokens"] < 32 * real["tokens"]
    shown = " ".join(done.output.split())  # without the table's line breaks
    assert "MiniLM, median ms" in shown and f"{real['real_tokens']} tokens" in shown


@pytest.mark.slow
@pytest.mark.skipif(not contenders.find_spec("openvino"), reason="needs the extra 'openvino'")
def test_openvino_computes_the_model_in_int8_in_both_ways(tmp_path):
    given = contenders.contender("dense openvino int8", SMALL, tmp_path / "a", 1)
    ids = torch.randint(1, 30000, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.inference_mode():
        expected = contenders.module(DENSE, SMALL)(ids, attention_mask=mask).last_hidden_state
    found = torch.from_numpy(given(ids, mask).copy())
    difference = (found - expected)[mask.bool()].abs().max()
    assert 1e-4 < difference < 0.1  # rounded to int8: float32 is within 1e-5


def test_a_turn_times_every_contender_with_the_given_threads(monkeypatch):
    monkeypatch.setattr(threads, "CONTENDERS", (DENSE, "8x"))
    monkeypatch.setattr(threads, "BASES", {model.BERT: SMALL})
    monkeypatch.setattr(threads, "_models", {})
    threads.prepare(1)
    assert torch.get_num_threads() == 1
    times = threads.turn(16, 0.01)
    assert times.keys() == {DENSE, "8x"} and all(ms > 0 for ms in times.values())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_is_of_the_second_call_and_has_what_was_freed():
    memory.peak_of_second(int)  # returns what others left
    sizes = iter([2**27, 2**26])  # bytes, above what malloc keeps
    before = memory.resident("VmRSS")
    peak = memory.peak_of_second(lambda: torch.ones(next(sizes) // 4).sum())
    assert 0.9 * 2**26 < peak - before < 1.5 * 2**26


# --- what is made of results


@pytest.fixture
def results(tmp_path):
    """A folder of results with round numbers."""
    facts = {
        "cpu": "a processor",
        "capability": "some",
        "threads": 1,
        "torch": "2",
        "date": "2026-01-01",
    }

    def write(name: str, rows: list[dict]) -> None:
        machine.write(tmp_path / f"{name}.json", {"machine": facts, "rows": rows})

    def ms(**of: float) -> dict:
        return {name.replace("_", " "): [value] * 3 for name, value in of.items()}

    sizes = [{"model": model.BERT, "batch": 1, "tokens": tokens} for tokens in (16, 128)]
    times = {DENSE: [200.0] * 3, INT8: [36.0] * 3} | ms(**{"21x": 10.0, "8x": 30.0})
    by_layers = {f"21x {BY_LAYERS}": [20.0] * 3, f"8x {BY_LAYERS}": [36.0] * 3}
    real = {"batch": 32, "tokens": 60, "real_tokens": 960, "text": "a text"}
    minilm = {"model": model.MINILM, "batch": 1, "tokens": 16}
    rows = [size | {"ms": times} for size in sizes]
    rows.append({"model": model.BERT} | real | {"ms": times | by_layers})
    rows.append(minilm | {"ms": {DENSE: [12.0] * 3, "8x": [2.0] * 3}})
    write("model", rows)
    one = {DENSE: 200.0, "8x": 30.0, "21x": 10.0}
    two = {DENSE: 100.0, "8x": 15.0, "21x": 8.0}
    write("threads", [{"batch": 1, "tokens": 16, "ms": {"1": one, "2": two}}])
    mb = {DENSE: 800, "8x": 100, "21x": 120, f"8x {BY_LAYERS}": 200, f"21x {BY_LAYERS}": 100}
    peaks = {name: {"peak": value, "states": 50} for name, value in mb.items()}
    write("memory", [{"work": "inference", "batch": 32, "tokens": 128, "mb": peaks}])
    return tmp_path


def test_targets_are_compared_with_results(results):
    by_name = {target.what: target for target in targets.targets(results)}

    def reached(start: str) -> tuple:
        (target,) = (t for what, t in by_name.items() if what.startswith(start))
        return target.measured, target.reached

    assert reached("21x, 1 x 16") == ((20.0, 3.6), "yes")
    assert reached("21x, 1 x 128") == ((20.0, 3.6), "yes")
    assert reached("8x, 1 x 16") == ((200 / 30, 1.2), "yes")
    assert reached("21x / 8x, 1 x 16") == ((1.25, 2.0), "**no**")
    assert reached("21x / 8x, 1 x 128") == (None, "not measured")
    assert reached("21x, 32 sentences") == ((2.0,), "yes")
    assert reached("8x, 32 sentences") == ((1.2,), "**no**")
    assert {t.aim for what, t in by_name.items() if "32 sentences" in what} == {(2,)}
    assert reached("MiniLM 8x, 1 x 16") == ((6.0,), "yes")
    assert reached("8x, peak") == ((0.5,), "yes")
    assert reached("21x, peak") == ((1.2,), "**no**")


def test_targets_of_one_thread_need_results_of_one_thread(results):
    path = results / "model.json"
    written = json.loads(path.read_text())
    written["machine"]["threads"] = 2
    path.write_text(json.dumps(written))
    of_one = [t for t in targets.targets(results) if "one thread" in t.what]
    assert len(of_one) == 5 and all(t.measured is None for t in of_one)


def test_every_result_is_shown_in_tables_pictures_and_markdown(results):
    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shown = " ".join(invoke("report", str(results)).split())
    assert "960 tokens and the rest padding" in shown and "inference, MB" in shown
    assert "1 x 16, 2 threads" in shown
    assert {path.name for path in results.glob("*.png")} == {"model.png"}
    pages = invoke("report", "--markdown", str(results))
    assert pages == "\n".join(markdown.tables(results))
    for row in (
        "| BERT_BASE: milliseconds (times faster than dense eager) "
        "| 1 x 16 tokens | 1 x 128 | 32 sentences |",
        "| **KroneckerBERT 21x** | 10.0 (20.0) | 10.0 (20.0) | 10.0 (20.0) |",
        "| dense, eager | 12.0 (1.0) |",
        "| **KroneckerBERT 8x** | 30.0 | 15.0 (2.00) |",
        "| 8x, layer by layer | 50 | 200 (4.0) |",
    ):
        assert f"{row}\n" in pages
    assert "| at most 1 | at most 0.5 | 1.20 | **no** |" in invoke("targets", str(results))
