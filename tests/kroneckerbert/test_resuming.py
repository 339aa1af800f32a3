"""Which checkpoint a training resumes from; missing and damaged files."""

import shutil
import subprocess

import pytest
from test_distillation import assert_same_weights, bert, dataset, launch, trainer
from test_files import steps_until_it_survives
from transformers import TrainerCallback

from kroneckerbert.distillation import resuming
from kroneckerbert.files import (
    CHECKSUMS,
    damaged,
    put_in_place,
    read_checksums,
    write_checksums,
)

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGES = {
    "a flipped bit": lambda b: (
        b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 4]) + b[len(b) // 2 + 1 :]
    ),
    "cut off": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
}


def run(folder, **options):
    return trainer(folder, bert(seed=1), bert(), dataset(), **(STEPS | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that saved checkpoints 2 and 4, and its student."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder)
    done.train()
    return folder, done.model


@pytest.fixture
def output(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def again(finished):
    """A trainer that refuses before any work, shared by many tests."""
    return run(finished[0])


def refused(again, output, match, wanted=True) -> str:
    again.args.output_dir = str(output)
    with pytest.raises(OSError, match=match) as caught:
        again.train(wanted)
    return str(caught.value)


def test_any_damage_to_any_file_is_found_with_the_last_complete_checkpoint(output, again):
    files = sorted(p.relative_to(output) for p in (output / "checkpoint-4").iterdir())
    assert {*NEEDED, "model.safetensors", "config.json", CHECKSUMS} <= {f.name for f in files}
    for file in files:
        whole = (output / file).read_bytes()
        for damage in DAMAGES.values():
            (output / file).write_bytes(damage(whole))
            message = refused(again, output, rf"{file} is damaged.*checkpoint-2 is complete")
            assert f"resume_from_checkpoint={str(output / 'checkpoint-2')!r}" in message
        if file.name != CHECKSUMS:
            (output / file).unlink()
            refused(again, output, rf"{file} is missing.*checkpoint-2 is complete")
            refused(again, output, rf"{file} is missing", wanted=str(output / "checkpoint-4"))
        (output / file).write_bytes(whole)
    shutil.rmtree(output / "checkpoint-2")
    (output / "checkpoint-4" / "optimizer.pt").unlink()
    refused(again, output, "no earlier one beside it is complete")


@pytest.mark.parametrize("name", [*NEEDED, "model.safetensors", "training_args.bin"])
def test_without_checksums_bad_files_are_still_found(output, again, name):
    """Checkpoints as earlier versions wrote them."""
    for step in (2, 4):
        (output / f"checkpoint-{step}" / CHECKSUMS).unlink()
    file = output / "checkpoint-4" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(again, output, rf"{name} is damaged.*checkpoint-2 is complete")
    if name in NEEDED:
        file.unlink()
        refused(again, output, rf"{name} is missing.*checkpoint-2 is complete")


def test_a_checkpoint_without_checksums_resumes_with_a_warning(output, finished):
    shutil.rmtree(output / "checkpoint-4")
    (output / "checkpoint-2" / CHECKSUMS).unlink()
    old = run(output)
    with pytest.warns(UserWarning, match="has no checksums"):
        old.train(True)
    assert_same_weights(old.model, finished[1], rtol=0, atol=0)
    assert damaged(output / "checkpoint-4") is None
    with pytest.raises(ValueError, match=r"checkpoint-4 is of another run: max_steps was 4"):
        run(output, max_steps=2).train(True)
    (output / "checkpoint-4" / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"another run: max_steps was 4 and is 2"):
        run(output, max_steps=2).train(True)


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tmp_path):
    run(tmp_path, save_only_model=True).train()
    with pytest.raises(OSError, match=r"optimizer.pt is missing \(save_only_model"):
        run(tmp_path, save_only_model=True).train(True)


def test_random_states_of_all_processes_are_required(output):
    checkpoint = output / "checkpoint-4"
    (checkpoint / CHECKSUMS).unlink()
    now = {}

    def start(of: int):
        return resuming.start(str(checkpoint), output, now, range(of), of)

    with pytest.raises(OSError, match=r"rng_state_0.pth is missing \(processes: 1 when .*, 2 now"):
        start(2)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.raises(OSError, match=r"rng_state_1.pth is missing \(processes: 1 when .*, 2 now"):
        start(2)
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    with pytest.warns(UserWarning, match="has no checksums"):
        assert start(2)[0] == str(checkpoint)
    with pytest.raises(OSError, match=r"rng_state.pth is missing \(processes: 2 when .*, 1 now"):
        start(1)


def test_a_missing_checkpoint_is_reported_with_the_existing_ones(output):
    with pytest.raises(FileNotFoundError, match=r"no folder True .*are: checkpoint-2, checkpoint"):
        run(output).train(resume_from_checkpoint="True")


def test_a_checkpoint_of_transformers_own_trainer_is_not_an_older_one(output, recwarn):
    (output / "checkpoint-4" / CHECKSUMS).unlink()
    resuming.check(output / "checkpoint-4", [0], 1)
    assert not recwarn.list


@pytest.mark.parametrize(
    "other",
    [
        {"max_steps": 3},
        {"num_train_epochs": 2, "max_steps": -1},
        {"learning_rate": 1e-4},
        {"seed": 7},
        {"hidden_weight": 2.0},
        {"per_device_train_batch_size": 2},
    ],
)
def test_a_run_with_other_settings_is_resumed_only_by_path(output, other):
    name, value = next(iter(other.items()))
    setting = {"per_device_train_batch_size": "rows_of_a_step"}.get(name, name)
    new = run(output, **other)
    with pytest.raises(ValueError, match=rf"is of another run: .*{setting} was .* and is {value}"):
        new.train(resume_from_checkpoint=True)
    assert new.state.global_step == 0
    if name == "max_steps":
        longer = run(output, max_steps=5)
        longer.train(str(output / "checkpoint-4"))
        assert longer.state.global_step == 5


class Killed(BaseException):
    pass


class KilledAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_a_new_run_resumes_its_own_checkpoint_not_an_older_longer_runs(output):
    options = {"max_steps": 3, "save_steps": 1}
    with pytest.raises(Killed):
        run(output, **options, callbacks=[KilledAfter(1)]).train()
    assert {p.name for p in output.iterdir()} == {f"checkpoint-{n}" for n in (1, 2, 4)}
    resumed = run(output, **options, callbacks=[KilledAfter(1)])
    with (
        pytest.warns(UserWarning, match=r"checkpoint-4 is of another run: max_steps.*ignored"),
        pytest.raises(Killed),  # at once, since it resumes from step 1
    ):
        resumed.train(resume_from_checkpoint=True)
    assert resumed._from == str(output / "checkpoint-1")


def test_the_latest_run_with_the_same_settings_is_resumed(output):
    with pytest.raises(Killed):
        run(output, callbacks=[KilledAfter(2)]).train()  # overwrites the older run's checkpoint-2
    again = run(output)
    again.train(resume_from_checkpoint=True)
    assert again._from == str(output / "checkpoint-2")
    numbers = {read_checksums(output / f"checkpoint-{step}")["run"] for step in (2, 4)}
    assert numbers == {again._run}  # a resumed run keeps its number
    assert resuming.last(output, again._settings) == output / "checkpoint-4"


def test_a_run_killed_while_a_checkpoint_replaces_one_of_its_name_keeps_one_of_them(tmp_path):
    out = tmp_path / "out"
    unfinished, place = out / resuming.UNFINISHED, out / "checkpoint-4"

    def start():
        shutil.rmtree(out, ignore_errors=True)
        for folder, text in ((place, "old"), (unfinished / place.name, "new")):
            folder.mkdir(parents=True)
            (folder / "weights").write_text(text)
            write_checksums(folder, run=5, settings={})

    start()
    for _ in steps_until_it_survives(
        lambda: put_in_place(unfinished / place.name, place, unfinished / "replaced")
    ):
        with pytest.raises(OSError, match=r"optimizer.pt is missing"):  # the toy run saves none
            resuming.start(True, out, {}, [0], 1)
        assert damaged(place) is None and (place / "weights").read_text() in ("old", "new")
        start()
    assert (place / "weights").read_text() == "new"


def test_damaged_outputs_of_a_cached_teacher_are_named(tmp_path):
    folder = tmp_path / "cache"

    def read():
        run(tmp_path / "out", teacher_cache=str(folder)).cache_teacher()

    read()
    files = [*folder.glob("*.bin"), folder / "about.json"]
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-2])
        with pytest.raises(OSError, match=rf"{file}, of the cached teacher's.*delete {folder}"):
            read()
        if file.suffix == ".bin":
            file.unlink()
            with pytest.raises(OSError, match=rf"{file}, of the cached teacher's.*delete {folder}"):
                read()
        file.write_bytes(whole)
    whole = files[-1].read_text()
    for damage in ("[]", "null", "{}", "[" * 10**5):
        files[-1].write_text(damage)
        with pytest.raises(
            OSError, match=rf"{files[-1]}, of the cached teacher's.*delete {folder}"
        ):
            read()
    files[-1].write_text(whole)
    read()


PROCESS = """
import os, sys
import test_resuming as t
run = t.run(sys.argv[1], callbacks=[t.KilledAfter(int(sys.argv[2]))])
try:
    run.train(resume_from_checkpoint=True)
except t.Killed:
    assert int(sys.argv[2]) == 3
except OSError as error:
    assert int(sys.argv[2]) == 0 and "rng_state_1.pth is missing" in str(error)
else:
    assert run.state.global_step == 4 and run._from.endswith("checkpoint-2")
"""


@pytest.mark.slow
def test_two_processes_resume_or_refuse_together(tmp_path):
    script, out = tmp_path / "process.py", tmp_path / "out"
    script.write_text(PROCESS)
    launch(2, script, out, 3)
    assert [p.name for p in out.iterdir()] == ["checkpoint-2"]
    launch(2, script, out, 9)
    assert damaged(out / "checkpoint-4") is None
    (out / "checkpoint-4" / "rng_state_1.pth").unlink()
    launch(2, script, out, 0)
    with pytest.raises(subprocess.CalledProcessError):  # one process has no part of their states
        launch(1, script, out, 9)
