"""The paper's whole procedure from one recipe: start, stage 1, and every task for every seed.

    run("kronecker-bert-8", "output", data="glue", tasks=["sst2"])

What a run writes:

    corpus/                    the tokens of stage 1
    start/                     the student before training
    stage1/                    ... and after stage 1
    teacher/TASK/              the teacher, fine-tuned
    stage2/TASK/seed-N/        the students, with their cards
    scores/TASK/…/scores.json
    latency/latency.json
    recipe.yaml, results.json  what was done last, and all its numbers
    curves/                    the losses, term by term
    cache/TASK/                what the teacher says, where the recipe has cache_teacher
    training/                  checkpoints of what is not finished

A step's folder is there when all of it is, with ``made_of.json``: what it depends on. A run that is
started again takes what fits, goes on from the last checkpoint, and refuses what no longer fits.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

import kroneckerbert
from kron_kernels.plan import Plan
from kroneckerbert import measure
from kroneckerbert.conversion import compress
from kroneckerbert.data import Table, TextDataset, label_targets
from kroneckerbert.distillation import DistillationTrainer, resuming
from kroneckerbert.distillation.heads import with_head_of
from kroneckerbert.distillation.provenance import (
    MADE_OF,
    digest,
    identity,
    is_made_of,
    read_json,
    write_json,
)
from kroneckerbert.files import replace_folder, replacing_files, resolved, writable_folder
from kroneckerbert.loading import naming_source, read_config
from kroneckerbert.modeling_kroneckerbert import max_tokens
from kroneckerbert.reproduction import corpus, curves
from kroneckerbert.reproduction.card import Score, machine, model_card, without_paths
from kroneckerbert.reproduction.recipe import Latency, Recipe, Stage, Stage1, load, select
from kroneckerbert.reproduction.squad import Questions, SpanDataset
from kroneckerbert.reproduction.tasks import (
    TASKS,
    Task,
    compare,
    evaluate_task,
    match_labels,
    read_task,
)
from kroneckerbert.signals import Interrupted, stoppable

_PACKAGE = "package:"  # package:NAME/PATH is a file or folder in an installed package
# By the number of heads in stage 1.
_MODELS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining")
_HISTORY = "trainer_state.json"
# Beginnings of the arguments that no weight depends on.
_INDIFFERENT = (
    *("dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm"),
    *("logging_", "report_to", "run_name", "save_"),
)
_Metrics = dict[str, dict[str, float]]  # by name of the set, and of the metric
_Work = Callable[[Path, Path], None]
_FAR = timedelta(days=7)  # one process prepares, evaluates and measures while the others wait


def run(
    recipe: Recipe | str | Path,
    output: str | Path,
    data: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Do what a recipe says, or what is left of it; see the module's text for what is written.

    Under ``torchrun`` or ``accelerate launch`` every process calls it.

    Args:
        recipe: Or what ``kroneckerbert.reproduction.recipe.load`` takes.
        output: Folder for everything.
        data: Folder with the tasks' files, see ``kroneckerbert.reproduction.tasks.read_task``; None
            downloads them from the Hugging Face Hub.
        tasks: Those of the recipe to do; None is all.
        seeds: In place of the recipe's.

    Returns:
        What ``results.json`` says: ``parameters`` of ``teacher`` and ``student``; ``scores``, the
        fields of a ``kroneckerbert.reproduction.card.Score`` each; ``latency``, None if not
        measured.

    Raises:
        ValueError: If the recipe is wrong, does not fit the models, the data or the number of
            processes, or a folder was made by another recipe.
        TypeError: If a value of the recipe is of the wrong type.
        OSError: If something cannot be read or written.
        ImportError: If a package is missing.
        Interrupted: If SIGINT or SIGTERM came in a training of one process, which then keeps a
            checkpoint of its last step.
    """
    recipe = select(recipe if isinstance(recipe, Recipe) else load(recipe), tasks, seeds)
    with _quiet():
        return _Run(recipe, Path(output), data).run()


class _Run:
    """One recipe, one folder; steps in the order in which they need one another."""

    def __init__(self, recipe: Recipe, output: Path, data: str | Path | None):
        self.recipe, self.output, self.data = recipe, resolved(output), data
        # The first of its kind decides how long processes wait for one another. Without being told
        # of the CPU, it would take each process for the only one.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_FAR)
        self.state, self.is_main, self.wait = state, state.is_main_process, state.wait_for_everyone
        alone = state.num_processes == 1  # then it uses all GPUs that it sees
        self.devices = max(1, torch.cuda.device_count()) if alone else state.num_processes
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not self.is_main)
        self.say = console.print
        self.dense = _located(recipe.teacher)
        self.kind = _MODELS[len(recipe.stage1.heads) if recipe.stage1 else 0]
        self.auto = getattr(transformers, self.kind)
        with naming_source(self.dense):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.dense, trust_remote_code=False
            )

    def run(self) -> dict[str, Any]:
        recipe, stage1 = self.recipe, self.recipe.stage1
        self._check()
        # What is missing is said now, not after the hours of stage 1.
        with self.state.main_process_first():  # it downloads for the others, too
            self.rows = {name: self._digests(name) for name in recipe.tasks}
        text = self._corpus(stage1) if stage1 else ""
        start = self._start(text)
        student = self._stage1(stage1, start, text) if stage1 else start
        scores: list[Score] = []
        students: list[tuple[str, int, Path]] = []
        for name in recipe.tasks:
            teacher = self._teacher(name)
            told = self._evaluated(name, "teacher", teacher)
            self._tell(_compared(told, {}), "teacher")
            ours = {}
            for seed in recipe.seeds:
                folder = self._stage2(name, teacher, student, seed)
                ours[seed] = self._evaluated(name, f"seed-{seed}", folder)
                students.append((name, seed, folder))
            compared = _compared(told, ours)
            self._tell(compared, "student")
            scores += compared
        latency = self._latency(recipe.latency, student) if recipe.latency else None
        if self.is_main:
            self._summarise(student, students, scores, latency)
        self.wait()
        return json.loads((self.output / "results.json").read_text())

    # What is known before any work

    def _check(self) -> None:
        """Resolve every argument, tell of them, and raise what would else come late."""
        recipe, state = self.recipe, self.state
        self.say(
            f"{recipe.description or 'A recipe'}\nTeacher {recipe.teacher}; to {self.output}\n"
            f"{state.num_processes} process(es) on {state.device.type}"
        )
        stages: dict[str, Stage] = {"stage 1": recipe.stage1} if recipe.stage1 else {}
        for name, task in recipe.tasks.items():
            if task.fine_tuning.model is None:
                stages[f"{name}, teacher"] = task.fine_tuning
            else:
                _located(task.fine_tuning.model)
            stages[f"{name}, stage 2"] = task.stage2
        lengths = {"latency.tokens": recipe.latency.tokens} if recipe.latency else {}
        for name, stage in stages.items():
            lengths[f"{name}: max_length"] = stage.max_length
            args = self._arguments(stage, self.output)
            self.say(
                f"{name}: {stage.batch_size} rows a step = {self.devices} device(s) x "
                f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} "
                f"accumulated, learning rate {args.learning_rate:g}"
            )
        if recipe.student.plan is not None:
            Plan.load(recipe.student.plan)
        longest = max_tokens(_without_weights(self.dense), self.tokenizer)
        for name, length in lengths.items():
            if length > longest:
                raise ValueError(f"{name} {length} exceeds the teacher's {longest}.")
        if self.is_main:
            writable_folder(self.output / "step")  # makes the output folder, too

    def _arguments(self, stage: Stage, training: Path, **decided: Any) -> TrainingArguments:
        parts = self.devices * stage.arguments.get("gradient_accumulation_steps", 1)
        if stage.batch_size % parts:
            raise ValueError(
                f"batch_size {stage.batch_size} cannot be divided by {parts} = {self.devices} "
                "device(s) x gradient_accumulation_steps; change one of them."
            )
        gpu = torch.cuda.is_available()
        usual = {"use_cpu": not gpu, "dataloader_pin_memory": gpu, "save_total_limit": 1}
        usual |= {"logging_first_step": True, "disable_tqdm": not sys.stderr.isatty()}
        return stage.arguments_class(
            output_dir=str(training),
            per_device_train_batch_size=stage.batch_size // parts,
            **usual | stage.arguments | decided,
        )

    def _sets(self, name: str) -> list[str]:
        """What a task's models are evaluated on."""
        also = self.recipe.evaluation.also
        return [name, *(other for other in TASKS[name].evaluated_on if other in also)]

    def _read(self, name: str, split: str) -> Table | Questions:
        try:
            return read_task(name, split, self.data)
        except OSError as error:
            message = str(error).rstrip(".")
            raise type(error)(
                f"{message}; or leave the task out with --task, or the set out of evaluation.also."
            ) from error

    def _digests(self, name: str) -> dict[str, str]:
        """What the data are, by set and split."""
        wanted = [(name, "train"), *((of, TASKS[of].evaluation) for of in self._sets(name))]
        return {
            f"{of} {split}": digest(repr(self._read(of, split)).encode(errors="surrogatepass"))
            for of, split in wanted
        }

    # Steps

    def _step(
        self, name: str, made_of: dict, work: _Work, alone: bool = False, renew: bool = False
    ) -> Path:
        """The folder of a step, which ``work`` fills unless it is there already.

        ``work`` gets the folder, and one for checkpoints, which goes when the step is done.
        ``alone`` leaves it to the main process; ``renew`` does again what no longer fits.
        """
        folder, training = self.output / name, self.output / "training" / name
        made_of = json.loads(json.dumps(made_of))
        done = is_made_of(folder, made_of, renew)
        if not done:
            is_made_of(training, made_of, renew or _last_checkpoint(training) is None)
        self.wait()  # until all know whether it is done
        if done:
            return folder
        self.say(f"- {name}")
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
            work(folder, training)  # which writes nothing here
        self.wait()
        return folder

    def _corpus(self, stage: Stage1) -> str:
        """What the tokens are of, once they are there."""
        how = asdict(stage.corpus)
        source, folder = _located(how.pop("source")), self.output / "corpus"
        what = corpus.describe_corpus(source, **how)
        if self.is_main:
            if not folder.exists():
                self.say(f"- corpus: {what}")
            texts = corpus.read_corpus(source, **how)
            corpus.tokenise_corpus(texts, self.tokenizer, folder, what)
        self.wait()
        return what

    def _texts(self, stage: Stage1, **options: Any) -> corpus.Corpus:
        return corpus.Corpus(self.output / "corpus", self.tokenizer, stage.max_length, **options)

    def _start(self, text: str) -> Path:
        told, stage1 = self.recipe.student, self.recipe.stage1
        shapes: Any = Plan.load(told.plan) if told.plan is not None else told.preset or told.factors
        made_of: dict[str, Any] = {
            "teacher": identity(self.dense),
            "model": self.kind,
            "student": asdict(told) | {"plan": told.plan and shapes.factors},
        }
        if stage1 and told.calibration:
            made_of |= {"corpus": text, "max_length": stage1.max_length}

        def work(folder: Path, _: Path) -> None:
            how: dict[str, Any] = {"sequential": told.sequential}
            if stage1 and told.calibration:
                texts = self._texts(stage1)
                # From all of it: neighbours are often about the same thing.
                chosen = range(0, len(texts), max(1, len(texts) // told.calibration))
                rows = Subset(texts, chosen[: told.calibration])
                collate = transformers.DataCollatorWithPadding(self.tokenizer)
                how["calibration"] = DataLoader(rows, batch_size=32, collate_fn=collate)
            compress(self._dense_model(), shapes, **how).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        return self._step("start", made_of, work, alone=True)

    def _dense_model(self) -> PreTrainedModel:
        """The teacher with the heads of stage 1, all of it from its file."""
        with naming_source(self.dense):
            model, info = self.auto.from_pretrained(
                self.dense, dtype=torch.float32, output_loading_info=True
            )
        # An encoder without its pooler is whole, unless pairs are predicted from it.
        pairs = self.kind == _MODELS[2]
        if missing := sorted(n for n in info["missing_keys"] if pairs or "pooler." not in n):
            raise ValueError(
                f"{self.recipe.teacher} has not the {len(missing)} tensors of stage1.heads, such "
                f"as {missing[0]}; use a checkpoint that has, or stage1.heads=[]."
            )
        return model.eval()

    def _stage1(self, stage: Stage1, start: Path, text: str) -> Path:
        told = _settings(stage)
        del told["corpus"]
        made_of = {"start": identity(start), "corpus": text, "stage1": told}

        def work(folder: Path, training: Path) -> None:
            args, teacher = self._arguments(stage, training), self._dense_model()
            if args.logits_weight == 0:  # then its heads, a word's size each, would work in vain
                teacher = teacher.base_model
            mask = corpus.MaskedCollator(self.tokenizer, seed=args.seed) if stage.heads else None
            student = self.auto.from_pretrained(start)
            texts = self._texts(stage, pairs="nsp" in stage.heads, pack=stage.pack)
            how = {"train_dataset": texts, "processing_class": self.tokenizer}
            trainer = DistillationTrainer(student, teacher, args, data_collator=mask, **how)
            self._train(trainer, folder)

        return self._step("stage1", made_of, work)

    def _teacher(self, name: str) -> str | Path:
        task, tuning = TASKS[name], self.recipe.tasks[name].fine_tuning
        if tuning.model is not None:
            return _located(tuning.model)
        made_of = {
            "teacher": identity(self.dense),
            "fine_tuning": _settings(tuning),
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            args = self._arguments(tuning, training)
            transformers.set_seed(args.seed)  # draws the head
            kind: dict[str, Any] = {"num_labels": 1} if task.kind == "regression" else {}
            if task.kind == "classification":
                names = dict(enumerate(task.labels))
                kind = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            model = _load(task, self.dense, **kind)
            rows = self._dataset(name, model, tuning.max_length)
            trainer = Trainer(model, args, train_dataset=rows, processing_class=self.tokenizer)
            self._train(trainer, folder)

        return self._step(f"teacher/{name}", made_of, work)

    def _stage2(self, name: str, teacher: str | Path, student: Path, seed: int) -> Path:
        stage = self.recipe.tasks[name].stage2
        made_of = {
            "student": identity(student),
            "teacher": identity(teacher),
            "stage2": _settings(stage),
            "seed": seed,
            "data": self.rows[name][f"{name} train"],
        }

        def work(folder: Path, training: Path) -> None:
            said = str(self.output / "cache" / name) if stage.cache_teacher else None
            args = self._arguments(stage, training, seed=seed, teacher_cache=said)
            tuned = _load(TASKS[name], teacher)
            rows = self._dataset(name, tuned, stage.max_length)
            model = with_head_of(tuned, student)
            how = {"train_dataset": rows, "processing_class": self.tokenizer}
            self._train(DistillationTrainer(model, tuned, args, **how), folder)

        return self._step(f"stage2/{name}/seed-{seed}", made_of, work)

    def _dataset(self, name: str, model: PreTrainedModel, max_length: int) -> Dataset:
        task, rows = TASKS[name], self._read(name, "train")
        if not isinstance(rows, Table):
            return SpanDataset(self.tokenizer, rows, max_length, min(128, max_length // 3))
        rows = match_labels(task, rows, model.config)
        labels = label_targets(rows.labels, model.config)
        return TextDataset(self.tokenizer, rows.texts, rows.texts_b, labels, max_length)

    def _train(self, trainer: Trainer, folder: Path) -> None:
        training = trainer.args.output_dir
        last = _last_checkpoint(Path(training))
        if last and self.is_main and not isinstance(trainer, DistillationTrainer):  # it does itself
            processes = trainer.args.world_size
            resuming.check(Path(last), range(processes), processes)
        with stoppable(trainer) as stop:
            trainer.train(resume_from_checkpoint=last)
            step = trainer.state.global_step
            if stop.number is not None and step < trainer.state.max_steps:
                raise Interrupted(stop.number, f"Stopped after step {step}, kept in {training}.")
            trainer.save_model(str(folder))  # by all processes: the parameters may be sharded
        if self.is_main:
            (folder / "training_args.bin").unlink(missing_ok=True)  # names this machine's folders
            trainer.state.save_to_json(str(folder / _HISTORY))

    def _evaluated(self, name: str, who: str, model: str | Path) -> _Metrics:
        rows = {key: value for key, value in self.rows[name].items() if not key.endswith(" train")}

        def work(folder: Path, _: Path) -> None:
            loaded = _load(TASKS[name], model).to(self.state.device).eval()
            size, scores = self.recipe.evaluation.batch_size, {}
            for other in self._sets(name):
                task = TASKS[other]
                data = self._read(other, task.evaluation)
                scores[other] = evaluate_task(loaded, self.tokenizer, task, data, size)
            write_json(folder / "scores.json", scores)

        made_of = {"model": identity(model), "data": rows}
        folder = self._step(f"scores/{name}/{who}", made_of, work, alone=True, renew=True)
        return read_json(folder / "scores.json")

    def _latency(self, told: Latency, student: Path) -> dict[str, Any]:
        def work(folder: Path, _: Path) -> None:
            models = {
                name: AutoModel.from_pretrained(source, dtype=torch.float32).to(self.state.device)
                for name, source in (("teacher", self.dense), ("student", student))
            }
            before, times = torch.get_num_threads(), {}
            threads = told.threads or before
            torch.set_num_threads(threads)
            try:
                for batch in told.batch:
                    found = measure.latency(models, batch, told.tokens, told.seconds)
                    times[batch] = {name: timing._asdict() for name, timing in found.items()}
            finally:
                torch.set_num_threads(before)
            how = {"threads": threads, "dtype": "float32", "tokens": told.tokens}
            latency = {"machine": machine(), **how, "milliseconds": times}
            write_json(folder / "latency.json", latency)

        made_of = {"student": identity(student), "latency": asdict(told), "machine": machine()}
        folder = self._step("latency", made_of, work, alone=True, renew=True)
        return read_json(folder / "latency.json")

    # Telling

    def _tell(self, scores: Sequence[Score], who: str) -> None:
        for score in scores:
            value = f"{score.teacher:.2f}" if who == "teacher" else score
            paper = ", ".join(f"{name} {number:g}" for name, number in score.paper.items())
            beside = f"   [paper: {paper}]" if paper else ""
            self.say(f"  {score.task} {score.split} {score.metric}, {who}: {value}{beside}")

    def _summarise(
        self, stage1: Path, students: list[tuple], scores: list[Score], latency: dict | None
    ) -> None:
        """Numbers, cards and curves, from what is on the disk."""
        dense, ours = (
            measure.parameters(_without_weights(source).base_model)
            for source in (self.dense, stage1)
        )
        results = {
            "parameters": {"teacher": dense, "student": ours},
            "scores": [asdict(score) | {"student": str(score)} for score in scores],
            "latency": latency,
        }
        text = yaml.safe_dump(self.recipe.given, sort_keys=False, allow_unicode=True)
        with replacing_files(self.output) as new:
            (new / "recipe.yaml").write_text(text, encoding="utf-8")
            write_json(new / "results.json", results)
        fewer = f"{dense / ours:.1f} times fewer (without heads)"
        self.say(f"{ours:,} parameters instead of {dense:,}, {fewer}")
        for batch, times in latency["milliseconds"].items() if latency else ():
            student, teacher = (times[name]["median"] for name in ("student", "teacher"))
            self.say(f"{student:.1f} ms instead of {teacher:.1f} at batch {batch}")
        pictures: dict[str, dict[str, Path]] = {}
        if self.recipe.stage1:
            self._save_card(stage1, "stage 1", latency=latency)
            pictures["stage1"] = {"stage 1": stage1}
        for name, seed, folder in students:
            of_task = [score for score in scores if score.task in self._sets(name)]
            self._save_card(folder, name, seed=seed, scores=of_task, latency=latency)
            pictures.setdefault(name, {})[f"seed {seed}"] = folder
        (self.output / "curves").mkdir(exist_ok=True)
        try:
            for name, folders in pictures.items():
                histories = {of: curves.read(folder / _HISTORY) for of, folder in folders.items()}
                curves.save(histories, self.output / "curves" / f"{name}.png")
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing to draw
            self.say(f"Curves are not drawn: {error}")
        self.say(f"Students, with their cards, are in {students[-1][2] if students else stage1}.")

    def _save_card(self, folder: Path, stage: str, **told: Any) -> None:
        model, recipe = _without_weights(folder), self.recipe
        with torch.device("meta"):
            dense = model.dense_class(model.config.to_dense())
        form = recipe.student.preset or "Kronecker student"
        name = f"{form} of {without_paths(recipe.teacher)}, {stage}"
        size = measure.parameters(dense)
        card = model_card(model, name=name, dense_parameters=size, recipe=recipe.given, **told)
        with replacing_files(folder) as new:
            card.save(new / "README.md")


def _compared(teacher: _Metrics, ours: Mapping[int, _Metrics]) -> list[Score]:
    """Metrics by set, of the teacher and by seed, beside the paper's."""
    scores = []
    for name, metrics in teacher.items():
        task = TASKS[name]
        by_seed = {seed: compare(task, told[name]) for seed, told in ours.items()}
        for metric, paper in compare(task, metrics).items():
            seeds = {seed: told[metric]["ours"] for seed, told in by_seed.items()}
            scores.append(Score(name, task.evaluation, metric, paper.pop("ours"), seeds, paper))
    return scores


def _load(task: Task, source: str | Path, **config: Any) -> PreTrainedModel:
    head = "QuestionAnswering" if task.kind == "span" else "SequenceClassification"
    auto = getattr(transformers, f"AutoModelFor{head}")
    with naming_source(source):
        return auto.from_pretrained(source, dtype=torch.float32, **config)


def _located(source: str) -> str:
    """Where a name, a path or ``package:NAME/PATH`` is."""
    if not source.startswith(_PACKAGE):
        source = os.path.expanduser(source)
        is_local = source.startswith((".", "/")) or source.count("/") > 1 or not source
        if is_local and not Path(source).exists():
            raise FileNotFoundError(
                f"{source!r} is no file or folder; give one that is there, or a name on the hub."
            )
        return source
    name, _, path = source.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or find_spec(name) is None:
        raise ImportError(f"{source} needs the package {name}, which is not installed.", name=name)
    found = Path(str(resources.files(name))) / path
    if not found.exists():
        raise FileNotFoundError(f"{source} is not in the package {name}: there is no {found}.")
    return str(found)


def _settings(stage: Stage) -> dict[str, Any]:
    """What of it the weights depend on."""
    kept = {k: v for k, v in stage.arguments.items() if not k.startswith(_INDIFFERENT)}
    return asdict(stage) | {"arguments": kept}


def _last_checkpoint(training: Path) -> str | None:
    """The last that is whole: Trainer writes its state after everything else."""
    whole = {
        int(step): path.parent
        for path in training.glob(f"checkpoint-*/{_HISTORY}")
        if (step := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    return str(whole[max(whole)]) if whole else None


def _without_weights(source: str | Path) -> PreTrainedModel:
    """The model that a name or folder holds, on the meta device: its sizes, at no cost."""
    config = read_config(source)
    name = (config.architectures or [""])[0]
    with naming_source(source), torch.device("meta"):
        if hasattr(kroneckerbert, name):
            return getattr(kroneckerbert, name)(config)
        return AutoModel.from_config(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars of loading and tables of what a new head lacks: that is as it should be."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
