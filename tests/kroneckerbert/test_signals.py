"""Ctrl-C and SIGTERM: a stopped training is kept, and continues to the same result."""

import json
import multiprocessing
import os
import shlex
import shutil
import signal

import pytest
import torch
from commands import WORDS, fails, run, save, student_of, succeeds, weights
from transformers import TrainerCallback

from kroneckerbert.cli import training
from kroneckerbert.cli.sources import read_model
from kroneckerbert.distillation import DistillationTrainer
from kroneckerbert.distillation.signals import Stop, handled, interrupt
from kroneckerbert.loading import load_tokenizer


@pytest.fixture
def teacher(tmp_path):
    return save(tmp_path / "teacher", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def not_ignored():
    """Shells start background jobs, of which these tests may be one, without SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(WORDS[i:] + WORDS[: i % 5]) for i in range(8)))
    return path


@pytest.fixture
def interrupted(monkeypatch):
    """Sends signals at a step of the next training; returns the command's exit code and output."""

    def by(number: int, *arguments, step: int = 3, times: int = 1) -> tuple[int, str]:
        class Send(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step - 1:
                    for _ in range(times):
                        os.kill(os.getpid(), number)

        train = DistillationTrainer.train

        def training(self, *arguments, **options):
            self.add_callback(Send)
            return train(self, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(DistillationTrainer, "train", training)
            return run(*arguments)

    return by


def test_a_stopped_distillation_ends_with_the_same_weights(tmp_path, teacher, texts, interrupted):
    student, out, kept = student_of(teacher), tmp_path / "out", tmp_path / "out.training"
    options = ["--data", texts, "--epochs", 2, "--batch-size", 2, "--seed", 3]
    succeeds("distill", teacher, student, tmp_path / "whole", *options)
    command = [str(word) for word in ("distill", teacher, student, out, *options)]

    # In the first epoch of four steps, and again in the second.
    for number, step in ((signal.SIGINT, 3), (signal.SIGTERM, 6)):
        code, output = interrupted(number, *command, step=step)
        assert code == 128 + number
        assert f"Stopped after step {step}; the training is kept in {kept}" in output
        assert shlex.join(command) in output
        names = {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))}
        assert names == {"out.training"}

    assert f"Continuing from {kept}" in succeeds(*command)
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not kept.exists()


def train_and_be_killed(command) -> None:
    class At(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    train = DistillationTrainer.train
    training._CHECKPOINT_SECONDS = 0.0  # of this process, which will not outlive it

    def watched(self, *arguments, **options):
        self.add_callback(At)
        return train(self, *arguments, **options)

    DistillationTrainer.train = watched
    run(*command)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_distillation_goes_on_from_its_last_checkpoint(tmp_path, teacher, texts):
    student, out, kept = student_of(teacher), tmp_path / "out", tmp_path / "out.training"
    options = ["--data", texts, "--epochs", 2, "--batch-size", 2]
    succeeds("distill", teacher, student, tmp_path / "whole", *options)
    command = [str(word) for word in ("distill", teacher, student, out, *options)]
    process = multiprocessing.get_context("fork").Process(
        target=train_and_be_killed, args=(command,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and (kept / "checkpoint").is_dir()
    assert f"Continuing from {kept}" in succeeds(*command)
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not kept.exists()


def test_a_kept_training_needs_the_same_arguments_and_data(tmp_path, teacher, texts, interrupted):
    student, out, kept = student_of(teacher), tmp_path / "out", tmp_path / "out.training"
    options = ["--data", texts, "--steps", 5]
    command = ["distill", teacher, student, out]
    interrupted(signal.SIGINT, *command, *options)
    code, output = run(*command, *options, "--learning-rate", 0.01)
    assert code == 1 and "--learning-rate was 0.001 and is 0.01" in output and str(kept) in output
    code, output = run(*command, *options[:2], "--steps", 6)
    assert code == 1 and "--steps was 5 and is 6" in output
    texts.write_text(texts.read_text() + "\ngood")
    code, output = run(*command, *options)
    assert code == 1 and "data was" in output
    (kept / "made_of.json").write_text("[")
    code, output = run(*command, *options)
    assert code == 1 and "made_of.json is damaged" in output
    (kept / "made_of.json").unlink()
    code, output = run(*command, *options)
    assert code == 1 and f"{kept} is not an interrupted training of" in output
    assert not out.exists()


def test_a_damaged_training_names_the_folder_to_delete_then_starts_over(
    tmp_path, teacher, texts, interrupted
):
    student, out, kept = student_of(teacher), tmp_path / "out", tmp_path / "out.training"
    command = ["distill", teacher, student, out, "--data", texts, "--steps", 4]
    interrupted(signal.SIGINT, *command)
    clock, weights_file = kept / "clock.json", kept / "checkpoint" / "model.safetensors"
    whole = clock.read_text()
    for damage in ('{"seconds": "x"}', '{"seconds": null}', '{"seconds": NaN}', "{}", "[]", "["):
        clock.write_text(damage)
        assert str(clock) in fails(*command)
    clock.unlink()
    assert f"{clock} is missing; delete {kept}" in fails(*command)
    clock.write_text(whole)
    weights_file.write_bytes(b"")
    line = fails(*command)
    assert f"{weights_file} is damaged" in line and line.endswith(f"delete {kept} to start over.")
    shutil.rmtree(kept / "checkpoint")
    assert "Continuing" not in succeeds(*command)
    assert out.exists() and not kept.exists()


def test_time_continues_from_where_it_stopped(tmp_path, teacher, texts, interrupted):
    student, out = student_of(teacher), tmp_path / "out"
    command = ["distill", teacher, student, out, "--data", texts, "--minutes", 100]
    code, _ = interrupted(signal.SIGTERM, *command)
    assert code == 143
    clock = tmp_path / "out.training" / "clock.json"
    assert 0 < json.loads(clock.read_text())["seconds"] < 100
    clock.write_text('{"seconds": 6001}')
    assert "last of 4" in succeeds(*command)  # one more after the third


def test_a_second_signal_quits_at_once_and_keeps_nothing(tmp_path, teacher, texts, interrupted):
    student = student_of(teacher)
    before = set(tmp_path.iterdir())
    code, output = interrupted(
        *(signal.SIGINT, "distill", teacher, student, tmp_path / "out", "--data", texts),
        times=2,
    )
    assert code == 130 and "Interrupted.\n" in output
    assert set(tmp_path.iterdir()) == before


def test_a_signal_at_the_last_step_or_while_saving_loses_nothing(
    tmp_path, teacher, texts, interrupted, monkeypatch
):
    student = student_of(teacher)
    command = ["distill", teacher, student, tmp_path / "one", "--data", texts, "--steps", 2]
    assert interrupted(signal.SIGINT, *command, step=2)[0] == 0
    cls = type(read_model(str(student)))
    save_pretrained = cls.save_pretrained

    def saving(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return save_pretrained(self, *arguments, **options)

    monkeypatch.setattr(cls, "save_pretrained", saving)
    command[3] = tmp_path / "two"
    succeeds(*command)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("handler", "number", "survives"),
    [
        (Stop(), signal.SIGTERM, False),
        (Stop(), signal.SIGINT, True),  # the parent's step needs it
        (interrupt, signal.SIGTERM, False),
        (interrupt, signal.SIGINT, False),
    ],
)
def test_a_forked_child_does_not_take_signals_for_its_parent(handler, number, survives, capfd):
    with handled(handler):
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), number)
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (7 if survives else -number)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_any_command_ends_with_one_line_and_cleans_up(tmp_path, teacher, monkeypatch, number):
    before = set(tmp_path.iterdir())
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def save_pretrained(self, folder, **options):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(type(load_tokenizer(teacher)), "save_pretrained", save_pretrained)
    assert run("compress", teacher, tmp_path / "out") == (128 + number, "Interrupted.\n")
    assert set(tmp_path.iterdir()) == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
