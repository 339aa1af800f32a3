"""The study's forms have one size, its jobs are done once, its rates are searched on both sides."""

import gzip
import json
import random

import pytest
import torch
from tiny import WORDS, tiny_batch, tiny_bert, tiny_tokenizer
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import machine, markdown, plots, study, study_speed
from benchmarks.study import forms, protocol
from benchmarks.study.jobs import Rows, lock
from kron_kernels import KroneckerSum
from kroneckerbert.distillation.signals import Interrupted

pytestmark = pytest.mark.usefixtures("small_machine")
WIDTHS = {"hidden_size": 64, "intermediate_size": 256}
STUDENTS = {(s.form, s.size): s for s in forms.students()}


@pytest.mark.parametrize("size", forms.SIZES)
def test_the_forms_of_a_size_have_its_parameters(size):
    torch.manual_seed(0)
    wide = {"hidden_size": 192, "intermediate_size": 768, "vocab_size": 300}
    teacher, batches = tiny_bert(**wide), [tiny_batch()]
    made = {form: s.make for (form, of), s in STUDENTS.items() if of == size}
    built = {
        form: make(teacher, batches)
        for form, make in made.items()
        if forms.PLANNED not in form and form not in forms.DENSE[size]  # by budget; MiniLM's widths
    }
    most = built[f"{forms.PAPER}, by weight"].num_parameters()
    for form, student in built.items():
        assert 0.85 * most < student.num_parameters() <= most, form
    mixed = built[forms.PLUS].get_submodule("encoder.layer.0.intermediate.dense")
    assert isinstance(mixed, KroneckerSum) and len(mixed.parts) == 2
    attention = built[forms.MIXED].get_submodule("encoder.layer.1.attention.self.query")
    feed_forward = built[forms.MIXED].get_submodule("encoder.layer.1.output.dense")
    assert attention.shape.is_low_rank and not feed_forward.shape.is_low_rank
    start = built[f"{forms.WORDS}, random start"].get_submodule("encoder.layer.0.output.dense")
    assert (start.a.std() * start.b.std()).item() < 0.1  # of N(0, 0.02²), not of the teacher's
    for form, student in built.items():  # what is timed has the size of what was trained
        row = {"layers": 2, "factors": student.config.kronecker_factors}
        again = forms.of_factors(teacher, row)
        assert again.num_parameters() == student.num_parameters(), form


def test_shallow_students_have_the_teachers_first_layers():
    teacher = tiny_bert(**WIDTHS)
    student = forms.dense_layers(1, 8)(teacher, [])
    assert student.config.num_hidden_layers == 1
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))


@pytest.mark.parametrize(
    ("best", "tried"), [(3, {2, 3, 4}), (6, {2, 3, 4, 5, 6}), (0, {0, 1, 2, 3, 4})]
)
def test_the_best_rate_has_worse_neighbours_or_is_the_last(best, tried):
    rates = protocol.SETTINGS["rates"]
    student, found = protocol.at_the_best_rate(rates.index, lambda at: -abs(at - best))
    assert student == best and max(found, key=found.__getitem__) == rates[best]
    assert {rates.index(rate) for rate in found} == tried


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A teacher and tables so small that a job takes seconds; two forms."""
    torch.manual_seed(0)
    teacher = tiny_bert(**WIDTHS)
    monkeypatch.setattr(protocol, "teacher", lambda: teacher)
    monkeypatch.setattr(protocol, "tokenizer", tiny_tokenizer)
    wanted = [(forms.WORDS, "8x"), (forms.LOW_RANK, "8x")]
    monkeypatch.setattr(study, "students", lambda: [STUDENTS[key] for key in wanted])
    settings = json.loads(json.dumps(protocol.SETTINGS))
    settings["texts"] |= {"files": {"some.txt.gz": {}}, "count": 60}
    settings["calibration"] = 20
    settings["distillation"]["steps"] = 3
    small = {"per_device_train_batch_size": 8, "warmup_steps": 1}
    settings["distillation"]["arguments"] |= small
    monkeypatch.setattr(protocol, "SETTINGS", settings)
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    data = tmp_path / "data"
    data.mkdir()
    for name in protocol._HELD_OUT:
        pair = name.startswith(("stsb", "mrpc"))
        rows = [[str(i % 2), text(5), *[text(6)] * pair] for i in range(24)]
        content = "".join("\t".join(row) + "\n" for row in rows)
        (data / f"{name}.tsv.gz").write_bytes(gzip.compress(content.encode()))
    lines = "".join(text(draw.randint(7, 9)) + "\n" for _ in range(90))
    (data / "some.txt.gz").write_bytes(gzip.compress(lines.encode()))
    protocol.table.cache_clear()
    yield data
    protocol.table.cache_clear()


def test_jobs_are_done_once_counted_timed_and_shown(small_study, tmp_path, monkeypatch):
    options = ["--data", str(small_study), "--work", str(tmp_path / "work"), "--to", str(tmp_path)]

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(command.app, [*arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    invoke("study", *options, "--seeds", "0")
    rows = machine.read(tmp_path / "study.json")["rows"]
    assert [study.key_of(row) for row in rows] == [
        ("teacher", "1x", 0),
        (forms.WORDS, "8x", 0),
        (forms.LOW_RANK, "8x", 0),
    ]
    for row in rows[1:]:
        assert set(row["scores"]) == set(protocol.TESTS) and row["steps"] == 3
        assert str(row["rate"]) == max(row["searched"], key=row["searched"].get)
        assert row["parameters"] < rows[0]["parameters"]

    def refuse(*_):
        raise AssertionError("a job was done again")

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "job", refuse)
        patch.setattr(protocol, "teachers_row", refuse)
        invoke("study", *options, "--seeds", "0")
    output = invoke("study", *options, "--seeds", "0", "--seeds", "1", "--only", forms.LOW_RANK)
    rows = machine.read(tmp_path / "study.json")["rows"]
    assert [study.key_of(row) for row in rows[3:]] == [(forms.LOW_RANK, "8x", 1)]
    assert "searched" not in rows[-1] and rows[-1]["rate"] == rows[2]["rate"]  # of its first seed
    assert "±" in output

    monkeypatch.setattr(study_speed, "SECONDS", 0.01)
    monkeypatch.setattr(study_speed, "TOKENS", 8)
    monkeypatch.setattr(study_speed.AutoModel, "from_pretrained", lambda _: protocol.teacher())
    monkeypatch.setattr(study_speed, "InRuntime", lambda teacher, *_: teacher)
    monkeypatch.setattr(
        study_speed.torch, "randint", lambda low, high, size: torch.ones(size).long()
    )
    invoke("study-speed", "--to", str(tmp_path))
    speeds = machine.read(tmp_path / "study_speed.json")["rows"]
    assert [row["form"] for row in speeds] == ["teacher", forms.WORDS, forms.LOW_RANK]
    assert speeds[1]["flops"] < speeds[0]["flops"]
    for table in markdown.tables(tmp_path):
        assert forms.WORDS in table or "21x" in table
    assert plots.draw_all(tmp_path, tmp_path) == [tmp_path / "forms.png"]


def test_forms_of_the_same_factors_are_timed_once():
    rows = [
        {"form": form, "size": "8x", "seed": seed, "layers": layers, "factors": {"words": rank}}
        for form, seed, layers, rank in (
            ("fitted", 0, 6, 4),
            ("random", 0, 6, 4),
            ("fitted", 1, 6, 4),
            ("shallow", 0, 1, 4),
            ("planned", 0, 6, 5),
            ("planned", 1, 6, 6),
        )
    ]
    first, names = study_speed.alike(rows)
    assert list(names.values()) == [["fitted", "random"], ["shallow"], ["planned"]]
    assert [row["form"] for row in first.values()] == ["fitted", "shallow", "planned"]


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "study.json"
    Rows(path, tmp_path, {"steps": 1}).add({"form": "a"}, {})
    assert Rows(path, tmp_path, {"steps": 1}).all() == [{"form": "a"}]
    with pytest.raises(ValueError, match=r"results of other settings \(steps\); give another --to"):
        Rows(path, tmp_path, {"steps": 2})


def test_a_job_that_another_process_does_is_left_to_it(tmp_path, monkeypatch, capsys):
    with lock(tmp_path / "a") as first, lock(tmp_path / "a") as second:
        assert first and not second
    with lock(tmp_path / "a") as again:
        assert again
    monkeypatch.setattr(protocol, "check", lambda _: None)
    with lock(tmp_path / "locks" / "teacher, 1x, 0"):
        study.run(tmp_path / "study.json", 1, 1.0, tmp_path, tmp_path, [0], study.TEACHER)
    assert "another process makes teacher, 1x, 0" in capsys.readouterr().err
    assert not (tmp_path / "study.json").exists()


def test_jobs_that_do_not_exist_are_refused_with_the_names_of_those_that_do(tmp_path):
    with pytest.raises(ValueError, match=r"no job has 'ranks'.*: teacher, 1x, 0"):
        study.run(tmp_path / "study.json", 1, 1.0, tmp_path, tmp_path, [0], "ranks")


def test_data_that_is_missing_is_named_whole(tmp_path):
    (tmp_path / "stsb_dev.tsv.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks stsb_test.tsv.gz, mrpc_train.*; docs/b"):
        study.run(tmp_path / "study.json", 1, 1.0, tmp_path, tmp_path, [0], None)


def test_a_job_that_is_interrupted_says_what_is_kept(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "check", lambda _: None)
    monkeypatch.setattr(protocol, "teachers_row", stop)
    with pytest.raises(Interrupted, match=r"Finished rows are in .*; teacher, 1x, 0 will begin"):
        study.run(tmp_path / "study.json", 1, 1.0, tmp_path, tmp_path, [0], None)


def test_a_student_by_way_of_another_waits_for_it(small_study, tmp_path, monkeypatch, capsys):
    late = next(s for s in forms.students() if s.after)
    monkeypatch.setattr(study, "students", lambda: [late])
    monkeypatch.setattr(protocol, "teachers_row", lambda _: {})
    study.run(tmp_path / "study.json", 1, 1.0, small_study, tmp_path / "work", [0], None)
    assert f"{late.form}, 21x, 0 waits for {forms.WORDS}, 8x" in capsys.readouterr().err
    assert len(machine.read(tmp_path / "study.json")["rows"]) == 1


def test_timing_without_the_study_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python -m benchmarks study` first"):
        study_speed.run(tmp_path / "study_speed.json", 1, 1.0)
