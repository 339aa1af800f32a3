"""What every recipe's run shares: steps that are done once, resumed trainings, checks, cards.

A step's folder appears only when it is complete, with a record of its inputs in ``made_of.json``.
A restarted run reuses steps whose inputs are unchanged, resumes from the last checkpoint, and
refuses a folder whose inputs have changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments

from kron_kernels.files import write_file
from kron_kernels.plan import Plan
from kroneckerbert import measure
from kroneckerbert.conversion import compress
from kroneckerbert.distillation import SENTENCES, DistillationTrainer, resuming
from kroneckerbert.distillation.progress import show_progress
from kroneckerbert.distillation.provenance import (
    MADE_OF,
    identity,
    is_made_of,
    read_json,
    write_json,
)
from kroneckerbert.distillation.signals import Interrupted, stoppable
from kroneckerbert.files import replace_folder, resolved, writable_folder
from kroneckerbert.loading import copy_modules, load_tokenizer, without_weights
from kroneckerbert.loading import load as load_model
from kroneckerbert.modeling_kroneckerbert import max_tokens
from kroneckerbert.reproduction import curves
from kroneckerbert.reproduction.card import machine, model_card, without_paths
from kroneckerbert.reproduction.recipe import Latency, Recipe, Sentences, Stage

HISTORY = "trainer_state.json"
_PACKAGE = "package:"  # package:NAME/PATH is a path inside an installed package
# By the number of heads in stage 1.
_MODELS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining")
# Prefixes of the arguments that do not affect the weights.
_IRRELEVANT = (
    *("dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm"),
    *("logging_", "report_to", "run_name", "save_"),
)
_Work = Callable[[Path, Path], None]
_TIMEOUT = timedelta(days=7)  # one process prepares, evaluates and measures; the others wait


class Steps:
    """One recipe in one folder; a subclass has the order of the steps."""

    def __init__(self, recipe: Recipe, output: Path, data: str | Path | None):
        self.recipe, self.output, self.data = recipe, resolved(output), data
        # The first PartialState sets the timeout between processes. Without cpu=True on a machine
        # without GPUs, each process would take itself for the only one.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
        self.state, self.is_main, self.wait = state, state.is_main_process, state.wait_for_everyone
        alone = state.num_processes == 1  # a single process uses all visible GPUs
        self.devices = max(1, torch.cuda.device_count()) if alone else state.num_processes
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not self.is_main)
        self.print = console.print
        self.dense = located(recipe.teacher)
        self.kind = _MODELS[len(recipe.stage1.heads) if recipe.stage1 else 0]
        self.tokenizer = load_tokenizer(self.dense)

    def _check(self) -> None:
        """Resolve and print all arguments, and raise errors that would otherwise appear late."""
        recipe, state = self.recipe, self.state
        self.print(
            f"{recipe.description or 'A recipe'}\nTeacher {recipe.teacher}; to {self.output}\n"
            f"{state.num_processes} process(es) on {state.device.type}"
        )
        given = {"stage 1": recipe.stage1, "sentences": recipe.sentences}
        stages: dict[str, Stage] = {name: stage for name, stage in given.items() if stage}
        for name, task in recipe.tasks.items():
            if task.fine_tuning.model is None:
                stages[f"{name}, teacher"] = task.fine_tuning
            else:
                located(task.fine_tuning.model)
            stages[f"{name}, stage 2"] = task.stage2
        lengths = {"latency.tokens": recipe.latency.tokens} if recipe.latency else {}
        for name, stage in stages.items():
            lengths[f"{name}: max_length"] = stage.max_length
            args = self._arguments(stage, self.output)
            self.print(
                f"{name}: {stage.batch_size} rows a step = {self.devices} device(s) x "
                f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} "
                f"accumulated, learning rate {args.learning_rate:g}"
            )
        if recipe.student.plan is not None:
            Plan.load(recipe.student.plan)
        longest = max_tokens(without_weights(self.dense), self.tokenizer)
        for name, length in lengths.items():
            if length > longest:
                raise ValueError(f"{name} {length} exceeds the teacher's {longest}.")
        if self.is_main:
            writable_folder(self.output / "step")  # also creates the output folder

    def _arguments(self, stage: Stage, training: Path, **decided: Any) -> TrainingArguments:
        parts = self.devices * stage.arguments.get("gradient_accumulation_steps", 1)
        if stage.batch_size % parts:
            raise ValueError(
                f"batch_size {stage.batch_size} cannot be divided by {parts} = {self.devices} "
                "device(s) x gradient_accumulation_steps; change one of them."
            )
        gpu = torch.cuda.is_available()
        usual = {"use_cpu": not gpu, "dataloader_pin_memory": gpu, "save_total_limit": 1}
        # Unset, the bar follows transformers' verbosity, which a run lowers.
        usual |= {"logging_first_step": True, "disable_tqdm": False}
        if isinstance(stage, Sentences):
            usual |= {name: v for name, v in SENTENCES.items() if not name.startswith("per_")}
        return stage.arguments_class(
            output_dir=str(training),
            per_device_train_batch_size=stage.batch_size // parts,
            **usual | stage.arguments | decided,
        )

    def _step(
        self, name: str, made_of: dict, work: _Work, alone: bool = False, renew: bool = False
    ) -> Path:
        """The folder of a step, filled by ``work`` unless it is already complete.

        ``work`` receives the folder, and one for checkpoints that is deleted when the step is done.
        ``alone`` runs it on the main process only; ``renew`` repeats a step whose inputs changed.
        """
        folder, training = self.output / name, self.output / "training" / name
        made_of = json.loads(json.dumps(made_of))
        done = is_made_of(folder, made_of, renew)
        if not done:
            is_made_of(training, made_of, renew or _last_checkpoint(training) is None)
        self.wait()  # all processes must have looked before one writes
        if done:
            return folder
        self.print(f"- {name}")
        if self.is_main and not alone:
            training.mkdir(parents=True, exist_ok=True)
            write_json(training / MADE_OF, made_of)
        self.wait()
        if self.is_main:
            with replace_folder(folder) as new:
                work(new, training)
                write_json(new / MADE_OF, made_of)
            shutil.rmtree(training, ignore_errors=True)
        elif not alone:
            work(folder, training)  # writes nothing in this process
        self.wait()
        return folder

    def _start(self, about_text: dict[str, Any], texts: Callable[[], Dataset] | None) -> Path:
        """The compressed teacher, started on ``texts`` if the recipe calibrates."""
        given = self.recipe.student
        shapes: Any = given.preset or given.factors
        if given.plan is not None:
            shapes = Plan.load(given.plan)
        made_of: dict[str, Any] = {
            "teacher": identity(self.dense),
            "model": self.kind,
            "student": asdict(given) | {"plan": given.plan and shapes.factors},
        }
        if given.calibration:
            if texts is None:
                raise ValueError(
                    "student.calibration needs text: of stage1.corpus, sentences.texts or a task."
                )
            made_of |= about_text

        def work(folder: Path, _: Path) -> None:
            batches = None
            if given.calibration and texts:
                found: Any = texts()
                # Spread over the corpus: neighbouring texts are often about the same subject.
                chosen = range(0, len(found), max(1, len(found) // given.calibration))
                rows = Subset(found, chosen[: given.calibration])
                collate = DataCollatorWithPadding(self.tokenizer)
                batches = DataLoader(rows, batch_size=32, collate_fn=collate)
            student = compress(
                self._dense_model(), shapes, calibration=batches, sequential=given.sequential
            )
            self._save(student, folder)

        return self._step("start", made_of, work, alone=True)

    def _save(self, student: PreTrainedModel, folder: Path) -> None:
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if student is student.base_model:  # a classifier makes no sentence vectors
            copy_modules(self.dense, folder)

    def _dense_model(self) -> PreTrainedModel:
        """The teacher with the heads of stage 1, all of which its file must contain."""
        try:
            return load_model(self.dense, self.kind, dtype=torch.float32)
        except ValueError as error:
            raise ValueError(
                f"{error} If stage1.heads are missing, use stage1.heads=[] or another teacher."
            ) from error

    def _train(self, trainer: Trainer, folder: Path) -> None:
        training = trainer.args.output_dir
        last = _last_checkpoint(Path(training))
        if not isinstance(trainer, DistillationTrainer):  # which does both itself
            show_progress(trainer)
            if last and self.is_main:
                processes = trainer.args.world_size
                resuming.check(Path(last), range(processes), processes)
        with stoppable(trainer) as stop:
            trainer.train(resume_from_checkpoint=last)
            step = trainer.state.global_step
            if stop.number is not None and step < trainer.state.max_steps:
                raise Interrupted(stop.number, f"Stopped after step {step}, kept in {training}.")
            trainer.save_model(str(folder))  # in all processes: parameters may be sharded
        if self.is_main:
            (folder / "training_args.bin").unlink(missing_ok=True)  # contains local paths
            trainer.state.save_to_json(str(folder / HISTORY))

    def _latency(self, given: Latency, student: Path) -> dict[str, Any]:
        def work(folder: Path, _: Path) -> None:
            models = {
                name: load_model(source, "AutoModel", dtype=torch.float32).to(self.state.device)
                for name, source in (("teacher", self.dense), ("student", student))
            }
            before, times = torch.get_num_threads(), {}
            threads = given.threads or before
            torch.set_num_threads(threads)
            try:
                for batch in given.batch:
                    timings = measure.latency(models, batch, given.tokens, given.seconds)
                    times[batch] = {name: timing._asdict() for name, timing in timings.items()}
            finally:
                torch.set_num_threads(before)
            latency = {
                "machine": machine(),
                "threads": threads,
                "dtype": "int8"
                if models["student"].config.to_dict().get("kronecker_int8")
                else "float32",
                "tokens": given.tokens,
                "milliseconds": times,
            }
            write_json(folder / "latency.json", latency)

        made_of = {"student": identity(student), "latency": asdict(given), "machine": machine()}
        folder = self._step("latency", made_of, work, alone=True, renew=True)
        return read_json(folder / "latency.json")

    def _save_card(self, folder: Path, stage: str, **results: Any) -> None:
        model, recipe = without_weights(folder), self.recipe
        with torch.device("meta"):
            dense = model.dense_class(model.config.to_dense())
        form = recipe.student.preset or "Kronecker student"
        name = f"{form} of {without_paths(recipe.teacher)}, {stage}"
        size = measure.parameters(dense)
        card = model_card(model, name=name, dense_parameters=size, recipe=recipe.given, **results)
        write_file(folder / "README.md", str(card))

    def _save_curves(self, pictures: Mapping[str, Mapping[str, Path]]) -> None:
        """Draw the losses of trainings: by picture, then by training, their folders."""
        (self.output / "curves").mkdir(exist_ok=True)
        try:
            for name, folders in pictures.items():
                histories = {of: curves.read(folder / HISTORY) for of, folder in folders.items()}
                curves.save(histories, self.output / "curves" / f"{name}.png")
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing to draw
            self.print(f"No curves: {error}")


def located(source: str) -> str:
    """A hub name or local path, with ``package:NAME/PATH`` and ``~`` resolved."""
    if not source.startswith(_PACKAGE):
        source = os.path.expanduser(source)
        is_local = source.startswith((".", "/")) or source.count("/") > 1 or not source
        if is_local and not Path(source).exists():
            raise FileNotFoundError(
                f"{source!r} is not a file or folder; give an existing one, or a name on the hub."
            )
        return source
    name, _, path = source.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or find_spec(name) is None:
        raise ImportError(f"{source} needs the package {name}, which is not installed.", name=name)
    found = Path(str(resources.files(name))) / path
    if not found.exists():
        raise FileNotFoundError(f"{source} is not in the package {name}: there is no {found}.")
    return str(found)


def settings_of(stage: Stage) -> dict[str, Any]:
    """The settings of a stage that the weights depend on."""
    kept = {k: v for k, v in stage.arguments.items() if not k.startswith(_IRRELEVANT)}
    return asdict(stage) | {"arguments": kept}


def core_hours(trained: Path) -> float | None:
    """CPU time of a training, in hours; None if it reported nothing."""
    history = read_json(trained / HISTORY)["log_history"]
    hours = [report["core_hours"] for report in history if "core_hours" in report]
    return round(hours[-1], 2) if hours else None


def _last_checkpoint(training: Path) -> str | None:
    """The last complete checkpoint: Trainer writes its state after everything else."""
    whole = {
        int(step): path.parent
        for path in training.glob(f"checkpoint-*/{HISTORY}")
        if (step := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    return str(whole[max(whole)]) if whole else None
