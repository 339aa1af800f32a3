"""What a training prints, and the speed that it reports."""

import re
import sys

import pytest
import torch
from tiny import tiny_bert
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kroneckerbert import DistillationConfig, DistillationTrainer
from kroneckerbert.distillation import progress

ROWS = [{"input_ids": torch.arange(1, 9)} for _ in range(10)]


def trained(tmp_path, callbacks=(), **options) -> DistillationTrainer:
    options = {"per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 6} | options
    options = {"disable_tqdm": False} | options  # unset, it follows transformers' verbosity
    options |= {"save_strategy": "no", "use_cpu": True}
    args = DistillationConfig(str(tmp_path), **options)
    run = DistillationTrainer(
        tiny_bert(),
        tiny_bert(),
        args,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[*callbacks],
    )
    with torch.no_grad():
        run.model.embeddings.word_embeddings.weight.normal_()
    run.metrics = run.train().metrics
    return run


class Slow(TrainerCallback):
    """The clock goes on by ``seconds`` in each step."""

    def __init__(self, monkeypatch, seconds: float):
        self.now = 0.0
        self.seconds = seconds
        for module in ("progress", "clock"):
            name = f"kroneckerbert.distillation.{module}.monotonic"
            monkeypatch.setattr(name, lambda: self.now)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += self.seconds


@pytest.mark.parametrize("off", [False, True])
def test_a_file_gets_a_line_for_each_report(tmp_path, capsys, monkeypatch, off):
    trained(
        tmp_path, [Slow(monkeypatch, 60.0)], eval_strategy="steps", eval_steps=3, disable_tqdm=off
    )
    output = capsys.readouterr()
    assert "%|" not in output.err and "{" not in output.out
    lines = output.out.splitlines()
    losses = r"loss [\d.e-]+, embedding [\d.e-]+, attention [\d.e-]+, hidden [\d.e-]+"
    for step, line in enumerate([line for line in lines if "eval" not in line][:6], 1):
        left = {6: "", 5: ", 60 s left"}.get(step, f", {6 - step} min left")
        assert re.fullmatch(rf"step {step} of 6{left}: {losses}, rate [\d.]+(e-\d+)?", line), line
    first = next(line for line in lines if "eval" in line)
    assert re.fullmatch(r"step 3 of 6, 3 min left: eval loss \S+, eval loss embedding .*", first)
    assert "second" not in first
    assert re.fullmatch(r"6 steps in \d+ s, \S+ steps a second, \S+ rows a second", lines[-1])


def test_reports_in_quick_succession_are_left_out_but_for_first_and_last(
    tmp_path, capsys, monkeypatch
):
    trained(tmp_path, [Slow(monkeypatch, 4.0)])
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert steps == ["1", "4", "6"]


def test_the_time_left_is_that_of_the_limit(tmp_path, capsys, monkeypatch):
    run = trained(tmp_path, [Slow(monkeypatch, 60.0)], max_minutes=3.5, max_steps=10**9)
    lines = capsys.readouterr().out.splitlines()
    # The deadline counts the time before the optimizer's step.
    starts = [line.partition(":")[0] for line in lines[:-1]]
    assert starts == [
        "step 1, 2 min left", "step 2, 90 s left", "step 3, 30 s left", "step 4 of 4"
    ]  # fmt: skip
    assert run.state.global_step == 4


def test_a_terminal_gets_a_bar_and_no_dictionaries(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trained(tmp_path, eval_strategy="steps", eval_steps=3)
    output = capsys.readouterr()
    assert "6/6" in output.err and "loss " in output.err and "{" not in output.out + output.err
    assert "step 3 of 6" in output.out + output.err and "eval loss" in output.out + output.err
    trained(tmp_path, max_minutes=5.0)
    shown = capsys.readouterr().err
    assert "of 300 s, step 6, loss" in shown and "/6 " not in shown


def test_printing_is_switched_off_as_in_transformers(tmp_path, capsys):
    args = DistillationConfig(str(tmp_path), disable_tqdm=True, use_cpu=True)
    run = DistillationTrainer(tiny_bert(), tiny_bert(seed=1), args, eval_dataset=ROWS)
    run.evaluate()
    assert capsys.readouterr().out.startswith("eval loss ")
    run.remove_callback(PrinterCallback)
    run.evaluate()
    assert capsys.readouterr().out == ""


def test_callbacks_of_the_users_own_stay(tmp_path, capsys):
    class Mine(PrinterCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            print("mine")

    args = TrainingArguments(str(tmp_path), disable_tqdm=True, use_cpu=True)
    run = Trainer(tiny_bert(), args, callbacks=[Mine()])
    progress.show_progress(run)
    run.log({"loss": 1.0, "learning_rate": 0.0})
    assert capsys.readouterr().out == "mine\nloss 1, rate 0\n"


@pytest.mark.parametrize("limit", [{}, {"max_minutes": 5.0}, {"max_minutes": 0.002}])
def test_the_speed_counts_the_rows_that_were_trained_on(tmp_path, limit):
    run = trained(
        tmp_path, **limit | ({"max_steps": 10**9} if limit == {"max_minutes": 0.002} else {})
    )
    steps = run.state.global_step
    rows = 10 * (steps // 3) + 4 * (steps % 3)  # an epoch: 4, 4 and 2
    seen = run.metrics["train_samples_per_second"] * run.metrics["train_runtime"]
    assert seen == pytest.approx(rows, rel=0.01)
    assert run.state.log_history[-1]["train_samples_per_second"] == pytest.approx(
        run.metrics["train_samples_per_second"]
    )
