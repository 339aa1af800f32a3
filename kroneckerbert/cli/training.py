"""Commands that train and evaluate: distill, evaluate, reproduce."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kroneckerbert.cli.shell import (
    MAX_SEED,
    choice,
    console,
    errors,
    input_file,
    names,
    number,
    regular,
    right,
)
from kroneckerbert.cli.sources import read_model, read_runnable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULT_MINUTES = 5.0
_CURVE = "curve.png"
_CHECKPOINT_SECONDS = 600.0  # a checkpoint of a BERT_BASE's student takes a second or two


def distill(
    teacher: Annotated[
        str, typer.Argument(help="The dense model; for a labelled table, fine-tuned on its task.")
    ],
    student: Annotated[str, typer.Argument(help="A folder written by 'compress' or 'distill'.")],
    out: Annotated[Path, typer.Argument(help="New folder for the trained student.")],
    data: Annotated[
        Path,
        input_file(
            "Plain text, one per line, or a table label<TAB>text[<TAB>second text]; may be .gz."
        ),
    ],
    minutes: Annotated[
        float | None,
        number(float, f"Training time; {_DEFAULT_MINUTES:g} if no limit is given.", above=True),
    ] = None,
    steps: Annotated[int | None, number(int, "Stop after this many steps.", 1)] = None,
    epochs: Annotated[
        float | None, number(float, "Stop after this many passes over the data.", above=True)
    ] = None,
    stage: Annotated[
        str | None,
        choice(
            "What to reproduce: layers, sentences (the vectors of a sentence encoder) or task (a "
            "labelled table). If unset: task for a table, sentences for the folders of two "
            "SentenceTransformers, else layers.",
            ("layers", "sentences", "task"),
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        input_file(
            "A table score<TAB>text<TAB>text on which a sentence encoder is scored as it trains."
        ),
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the teacher's outputs in, for later epochs and runs.",
            file_okay=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, number(int, "Texts per step; 32, and 64 for sentences, if unset.", 1)
    ] = None,
    learning_rate: Annotated[
        float | None,
        number(
            float,
            "Peak; if unset 1e-3, 4e-4 for sentences, 1e-4 for a task; short runs need less.",
            above=True,
        ),
    ] = None,
    max_length: Annotated[
        int | None, number(int, "Tokens kept of each text; 128 if unset.", 3)
    ] = None,
    seed: Annotated[int, number(int, "Seed for the order of the texts.", most=MAX_SEED)] = 0,
    embedding_weight: Annotated[
        float | None, number(float, "Weight of the relative squared error of the embeddings.")
    ] = None,
    attention_weight: Annotated[
        float | None, number(float, "Weight of the relative squared error of the attention scores.")
    ] = None,
    hidden_weight: Annotated[
        float | None, number(float, "Weight of the relative squared error of the layers' outputs.")
    ] = None,
    logits_weight: Annotated[
        float | None, number(float, "Weight of the logits' divergence.")
    ] = None,
    labels_weight: Annotated[float | None, number(float, "Weight of the task's own loss.")] = None,
    sentence_weight: Annotated[
        float | None, number(float, "Weight of the error of the sentence vectors.")
    ] = None,
    relation_weight: Annotated[
        float | None,
        number(float, "Weight of the squared error of the cosines of pairs of sentences."),
    ] = None,
) -> None:
    """Train a student to reproduce its teacher's outputs.

    Layer by layer on plain text (stage 1); or, of a sentence encoder, its vectors; or on a labelled
    table with the teacher fine-tuned on it (stage 2): a student without a classifier gets a copy of
    the teacher's. A weight that is unset has the stage's own value. OUT also gets the losses, as
    trainer_state.json and, if matplotlib is installed, as curve.png.

    A checkpoint is kept in OUT.training every ten minutes, and when Ctrl-C or SIGTERM stops the
    training after the current step: the same command continues from it, even if it was killed. A
    second Ctrl-C quits at once.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter(
            f"--steps {steps} and --epochs {epochs:g} are two lengths; give one."
        )

    from transformers.utils import logging

    from kroneckerbert.data import TextDataset, is_table, label_targets, read_lines, read_table
    from kroneckerbert.distillation import DistillationConfig, DistillationTrainer
    from kroneckerbert.distillation.clock import Checkpoints
    from kroneckerbert.distillation.heads import with_head_of
    from kroneckerbert.distillation.pooling import pair_evaluator, transformer_of
    from kroneckerbert.distillation.provenance import digest, identity
    from kroneckerbert.distillation.resuming import STATE, find, keep
    from kroneckerbert.distillation.signals import Interrupted, stoppable
    from kroneckerbert.files import replace_folder, writable_folder
    from kroneckerbert.loading import (
        check_source,
        copy_modules,
        is_sentence_folder,
        load_encoder,
        load_tokenizer,
    )
    from kroneckerbert.modeling_kroneckerbert import max_tokens, positions

    out = writable_folder(out)
    table = read_table(data) if is_table(data) else None
    texts = read_lines(data) if table is None else table.texts
    encoders = is_sentence_folder(teacher) and is_sentence_folder(student)
    stage = stage or ("task" if table else "sentences" if encoders else "layers")
    if (stage == "task") != (table is not None):
        raise typer.BadParameter(
            f"--stage {stage} needs {'a labelled table' if stage == 'task' else 'plain text'}, and "
            f"{data} is {'plain text' if table is None else 'a table'}."
        )
    if pairs is not None and not (stage == "sentences" and encoders):
        raise typer.BadParameter(
            "--pairs scores the vectors of a SentenceTransformer: teacher and student must be "
            "folders of one, and the stage sentences."
        )
    judged = None if pairs is None else pair_evaluator(read_table(pairs), pairs.name)
    if minutes is None and steps is None and epochs is None:
        minutes = _DEFAULT_MINUTES
    given: dict[str, Any] = {
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        "embedding_weight": embedding_weight,
        "attention_weight": attention_weight,
        "hidden_weight": hidden_weight,
        "logits_weight": logits_weight,
        "labels_weight": labels_weight,
        "sentence_weight": sentence_weight,
        "relation_weight": relation_weight,
        "teacher_cache": None if teacher_cache is None else str(teacher_cache),
    }
    if judged is not None:
        given |= {"eval_strategy": "steps", "eval_steps": 0.1 if minutes is None else 500}
    args = DistillationConfig.until(
        str(out),
        minutes=minutes,
        steps=steps,
        epochs=epochs,
        stage=stage,
        logging_first_step=True,
        logging_steps=10,
        **{name: value for name, value in given.items() if value is not None},
    )
    # By the names of this command's options: an error says which of them has changed.
    made_of = {
        "--data": digest(data.read_bytes()),
        "--minutes": minutes,
        "--steps": steps,
        "--epochs": epochs,
        "--batch-size": args.per_device_train_batch_size,
        "--learning-rate": args.learning_rate,
        "--max-length": max_length,
        "--seed": seed,
        "--stage": stage,
        **{f"--{name}-weight": weight for name, weight in args.weights.items()},
    }
    for name, source in {"teacher": teacher, "student": student}.items():
        check_source(source)
        made_of[name] = identity(source)
    kept = out.with_name(f"{out.name}.training")
    checkpoint, seconds = find(kept, made_of)

    logging.disable_progress_bar()  # of loading and saving, which take no time here
    read: Any = load_encoder if stage == "sentences" else read_model
    teacher_given, tokenizer = read(teacher), load_tokenizer(teacher)
    teacher_model = transformer_of(teacher_given).float()
    labels = None
    if table is None:
        student_given = read(student)
    else:
        labels = label_targets(table.labels, _classifier(teacher, teacher_model).config)
        student_given = with_head_of(teacher_model, student)
    student_model = transformer_of(student_given).float()
    longest = min(max_tokens(teacher_model, tokenizer), positions(student_model))
    max_length = max_length or min(128, longest)
    if max_length > longest:
        raise ValueError(
            f"--max-length {max_length} exceeds the {longest} positions of teacher and student."
        )
    texts_b = None if table is None else table.texts_b
    dataset = TextDataset(tokenizer, texts, texts_b, labels, max_length)

    # The folder is made before the training, which is wasted if nothing can be saved.
    with replace_folder(out) as folder:
        args.output_dir = str(folder)
        trainer = DistillationTrainer(
            student_given,
            teacher_given,
            args,
            evaluator=judged,
            train_dataset=dataset,
            processing_class=tokenizer,
        )

        def take(saved: Path) -> None:
            keep(kept, saved, made_of, time.monotonic() - start)

        trainer.add_callback(Checkpoints(_CHECKPOINT_SECONDS, take))
        if checkpoint is not None:
            errors.print(f"Continuing from {checkpoint}.", soft_wrap=True)
            trainer.count_as_spent(seconds)
        start = time.monotonic() - seconds
        with stoppable(trainer) as stop:
            trainer.train(None if checkpoint is None else str(checkpoint))
            elapsed = time.monotonic() - start
            step = trainer.state.global_step
            if stop.number is not None and step < trainer.state.max_steps:
                raise Interrupted(
                    stop.number,
                    f"Stopped after step {step}; the training is kept in {kept}, which you may "
                    "delete to start over.",
                )
            student_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            copy_modules(student, folder)
            trainer.state.save_to_json(str(folder / STATE))
            drawn = _curve(trainer.state.log_history, folder)
    shutil.rmtree(kept, ignore_errors=True)

    reports = [log for log in trainer.state.log_history if "loss" in log]
    first, last = reports[0], reports[-1]
    losses = Table("mean over steps", right("1"), right(f"last of {trainer.state.global_step:,}"))
    for name in (name for name in last if name.startswith("loss")):
        losses.add_row(name.replace("_", " "), f"{first[name]:.4g}", f"{last[name]:.4g}")
    scored = [log for log in trainer.state.log_history if any("cosine" in name for name in log)]
    for name in (name for name in (scored[-1] if scored else ()) if name.endswith("_cosine")):
        losses.add_row(
            name.removeprefix("eval_"), f"{scored[0][name]:.4f}", f"{scored[-1][name]:.4f}"
        )
    console.print(losses)
    console.print(
        f"Saved to {out} after {elapsed / 60:.1f} minutes, with the losses in {drawn}.",
        soft_wrap=True,
    )


def evaluate(
    model: Annotated[
        str, typer.Argument(help="The model to evaluate: saved, or exported to ONNX or OpenVINO.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Plain text, one per line, or a table label<TAB>text[<TAB>second text]; may be "
            ".gz. With --task, the task's file or the folder that holds it; if unset, the task is "
            "downloaded from the Hugging Face hub.",
            exists=True,
            callback=regular,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A task by name (sst2, stsb, squad, …): uses its labels and metrics, and shows "
            "the paper's results."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the task: train, validation (if unset) or test."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The model's teacher: evaluated as well or, on plain text, compared with the "
            "model."
        ),
    ] = None,
    batch_size: Annotated[int, number(int, "Texts per forward pass.", 1)] = 32,
) -> None:
    """Measure a model on a task or a labelled table, or its similarity to its teacher on text."""
    from kroneckerbert.data import is_table, read_lines, read_table
    from kroneckerbert.evaluation import evaluate as evaluate_model
    from kroneckerbert.evaluation import similarity
    from kroneckerbert.loading import load_tokenizer

    sources = [model] if teacher is None else [model, teacher]
    if task is not None:
        _evaluate_task(sources, task, split, data, batch_size)
        return
    if split is not None:
        raise typer.BadParameter("--split selects a split of a task; give --task as well.")
    if data is None or data.is_dir():
        raise typer.BadParameter("--data must be a file, unless --task names the file in a folder.")
    labelled = is_table(data)
    if not labelled and teacher is None:
        raise ValueError(
            f"{data} is plain text, on which a model can only be compared with a teacher: add "
            "--teacher, or give a table label<TAB>text."
        )
    rows: Any = read_table(data) if labelled else read_lines(data)
    tokenizer = load_tokenizer(model)
    models = [read_runnable(source) for source in sources]
    shown = errors.is_terminal
    if labelled:
        scores = [evaluate_model(m, tokenizer, rows, batch_size, shown) for m in models]
    else:
        scores = [similarity(models[0], models[1], tokenizer, rows, batch_size, shown)]
        sources = [f"{model} to {teacher}"]
    table = Table(names(f"{len(rows):,} texts"), *map(right, scores[0]))
    for source, row in zip(sources, scores, strict=True):
        table.add_row(source, *(f"{value:.4f}" for value in row.values()))
    console.print(table)


def _evaluate_task(
    models: list[str], name: str, split: str | None, data: Path | None, batch_size: int
) -> None:
    """Print the task's metrics of each model beside the paper's results, in per cent."""
    from kroneckerbert.loading import load_tokenizer
    from kroneckerbert.reproduction.tasks import (
        compare,
        evaluate_task,
        find_task,
        read_file,
        read_task,
    )

    task = find_task(name)
    split = split or task.evaluation
    if data is not None and data.is_file():
        rows = read_file(task, data)
    else:
        rows = read_task(name, split, data)
    tokenizer = load_tokenizer(models[0])
    table = Table(
        names(f"{name}, {len(rows):,} rows of {split}, per cent"), *map(right, task.metrics)
    )
    for source in models:
        runnable = read_runnable(source)
        scores = evaluate_task(runnable, tokenizer, task, rows, batch_size, errors.is_terminal)
        compared = compare(task, scores, split)
        table.add_row(source, *(f"{metric['ours']:.2f}" for metric in compared.values()))
    for key in dict.fromkeys(key for row in compared.values() for key in row if key != "ours"):
        cells = (f"{row[key]:g}" if key in row else "" for row in compared.values())
        table.add_row(f"paper's {key}", *cells)
    console.print(table)


def reproduce(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a name listed by 'recipes'.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Output folder; runs/RECIPE if unset.", file_okay=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the tasks' files; if unset, they are downloaded from the hub.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="One of the recipe's tasks; may be repeated. All if unset."),
    ] = None,
    train: Annotated[
        Path | None,
        input_file(
            "Of a task of your own: the table label<TAB>text[<TAB>second text] to train on."
        ),
    ] = None,
    test: Annotated[Path | None, input_file("And the one to evaluate on.")] = None,
    metric: Annotated[
        str | None,
        choice(
            "Of a task of your own: its metric; accuracy or spearman, by the labels, if unset.",
            ("accuracy", "f1", "matthews", "pearson", "spearman"),
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Replaces the recipe's teacher.")] = None,
    seed: Annotated[
        list[int] | None,
        number(int, "Replaces the recipe's seeds of stage 2; may be repeated.", most=MAX_SEED),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a key of the recipe: stage1.arguments.learning_rate=1e-4. May be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Run a recipe: initial student, distillation, scores and model cards.

    For a task of your own: kroneckerbert reproduce own-task --train TABLE --test TABLE. It
    fine-tunes the teacher, distils a student, makes it int8, exports it and scores all four.

    The same command resumes an interrupted run; Ctrl-C during a training in one process keeps its
    last step. For several GPUs: torchrun --nproc-per-node 4 -m kroneckerbert reproduce ..., or
    accelerate launch.
    """
    from kroneckerbert.reproduction.recipe import load
    from kroneckerbert.reproduction.run import run

    changes = list(change or ())
    if (train is None) != (test is None) or (metric is not None and train is None):
        raise typer.BadParameter("a task of your own needs both --train and --test.")
    if train is not None and test is not None:
        files = {"train": str(train.resolve()), "test": str(test.resolve()), "metric": metric}
        name = re.sub(r"\W", "_", train.name.partition(".")[0])
        changes.append(f"tasks={json.dumps({name: files})}")
    if teacher is not None:
        changes.append(f"teacher={json.dumps(teacher)}")
    out = output or Path("runs") / Path(recipe).stem
    run(load(recipe, changes), out, data, task or None, seed or None)


def recipes() -> None:
    """List the recipes included in the package."""
    from kroneckerbert.reproduction.shipped import shipped

    table = Table(names("recipe"), names("description"))
    for name, description in shipped().items():
        table.add_row(name, description)
    console.print(table)
    console.print("Next: kroneckerbert reproduce RECIPE --data DIR", soft_wrap=True)


def _curve(history: list[dict[str, float]], folder: Path) -> str:
    """Draw the losses if matplotlib is installed; the names of the files that have them."""
    from kroneckerbert.distillation.resuming import STATE
    from kroneckerbert.reproduction import curves

    try:
        curves.save({"": history}, folder / _CURVE)
    except ImportError:
        return STATE
    return f"{STATE} and {_CURVE}"


def _classifier(source: str, model: PreTrainedModel) -> PreTrainedModel:
    from kroneckerbert.evaluation import classifies_sequences

    if not classifies_sequences(model):
        raise TypeError(
            f"{source} is a {type(model).__name__}, but a labelled table needs a teacher that was "
            "fine-tuned on them, a model for sequence classification; for stage 1 give plain text."
        )
    return model
