"""The command line: compress, distil, evaluate and benchmark models from a shell.

Heavy imports are inside the commands, so that help and wrong options answer at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from kron_kernels.files import write_file
from kroneckerbert.cli.shell import MOST_SEED, Commands, choice, errors, input_file, number, regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT_MINUTES = 5.0
_FILE_WIDTH = 200
_CALIBRATION_TEXTS = 512

# Paths and messages may have brackets, which are no markup. A file or pipe has room for any table.
console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Calibration = Annotated[
    Path | None,
    input_file(
        "Text, one a line, or a table; may be .gz. Layers are then compared by their outputs on "
        "it, not by their weights."
    ),
]
Batch = Annotated[int, number(int, "Sequences in the pass that is timed.", 1)]
Tokens = Annotated[int, number(int, "Tokens in each sequence.", 1)]
# More threads than CPUs make nothing faster, and very many end the process.
Threads = Annotated[
    int | None, number(int, "CPU threads; PyTorch's choice unless given.", 1, os.cpu_count() or 1)
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers here, too.", dir_okay=False)
]


@app.callback(epilog="To see it all at work, on a real model, in some minutes: kroneckerbert demo")
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compress BERTs by Kronecker products, and teach the results what the originals knew.

    A model is a folder that save_pretrained wrote, or a name on the Hugging Face hub. The way from
    one to its small student: compress TEACHER STUDENT, then distill TEACHER STUDENT OUT --data
    TEXTS, then evaluate and benchmark.
    """


@app.command(epilog="Example: kroneckerbert plan TEACHER plan.json --budget latency=2x")
def plan(
    teacher: Annotated[str, typer.Argument(help="The dense model.")],
    out: Annotated[Path, typer.Argument(help="The plan's file (JSON), for compress --plan.")],
    budget: Annotated[
        list[str],
        typer.Option(
            help="What the student may take: parameters, bytes, flops or latency (ms), or the "
            "layers' mean relative squared error. As a number (bytes=12e6), as times less than "
            "the teacher (latency=2x) or as a share of it (parameters=12%). May be repeated; all "
            "are met.",
        ),
    ],
    objective: Annotated[
        str,
        choice(
            "What is least within the budget: error, size (parameters) or latency.",
            ("error", "size", "latency"),
        ),
    ] = "error",
    batch: Batch = 1,
    tokens: Tokens = 128,
    threads: Threads = None,
    calibration: Calibration = None,
    words: Annotated[bool, typer.Option(help="Allow factors of the word embeddings.")] = True,
    mix: Annotated[
        bool, typer.Option(help="Allow layers of a Kronecker product plus a low-rank part.")
    ] = True,
) -> None:
    """Choose shapes layer by layer for a budget, measured on this machine."""
    from kron_kernels.plan.budget import check_arguments
    from kroneckerbert.files import writable_file
    from kroneckerbert.planning import plan as plan_model

    limits = _limits(budget)
    check_arguments(limits, objective)
    texts = _texts(calibration)
    writable_file(out, _inputs(teacher, calibration))
    _use(threads)
    model = _on_gpu(_model(teacher))
    chosen = plan_model(
        model,
        limits,
        objective=objective,  # type: ignore[arg-type]  # a choice
        batch=batch,
        tokens=tokens,
        calibration=_batches(texts, model, teacher),
        words=words,
        mix=mix,
        progress=errors.is_terminal,
    )
    console.print(str(chosen), soft_wrap=True)  # before what may fail: a disk may be full
    chosen.save(out)
    console.print(f"Next: kroneckerbert compress {teacher} OUT --plan {out}", soft_wrap=True)


@app.command(epilog="Example: kroneckerbert compress TEACHER STUDENT --preset kronecker-bert-21")
def compress(
    teacher: Annotated[str, typer.Argument(help="The dense model, with or without a head.")],
    out: Annotated[Path, typer.Argument(help="New folder for the compressed model.")],
    preset: Annotated[
        str,
        typer.Option(
            help="Shapes of the paper: kronecker-bert-5, -8, -19 or -21, so many times smaller "
            "than BERT_BASE."
        ),
    ] = "kronecker-bert-8",
    plan: Annotated[
        Path | None,
        input_file("What 'plan' wrote, instead of a preset."),
    ] = None,
    calibration: Calibration = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Refit layer by layer on the calibration text, biases too; takes minutes.",
        ),
    ] = False,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Give each product its weight's norm.")
    ] = False,
) -> None:
    """Replace a dense model's weights by the nearest Kronecker products. Distil the result."""
    from kron_kernels.plan import Plan
    from kroneckerbert import compress as compress_model
    from kroneckerbert.files import writable_folder

    if sequential and calibration is None:
        raise typer.BadParameter("--sequential refits on text: give --calibration TEXTS as well.")
    out = writable_folder(out)
    texts = _texts(calibration)
    shapes = preset if plan is None else Plan.load(plan)
    model, tokenizer = _model(teacher), _tokenizer(teacher)
    student: Any = compress_model(
        model,
        shapes,
        calibration=_batches(texts, model, teacher),
        sequential=sequential,
        rescale=rescale,
        progress=errors.is_terminal,
    )
    _save(out, student, tokenizer)

    table = Table(_names("model"), *map(_right, ("parameters", "smaller")))
    for name, size in ((teacher, model.num_parameters()), (str(out), student.num_parameters())):
        table.add_row(name, f"{size:,}", f"{model.num_parameters() / size:.1f}x")
    console.print(table)
    console.print(f"Next: kroneckerbert distill {teacher} {out} OUT --data TEXTS", soft_wrap=True)


@app.command(epilog="Example: kroneckerbert report STUDENT --teacher TEACHER --threads 1")
def report(
    model: Annotated[str, typer.Argument(help="A compressed model.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="The dense model that it is from, with which errors are measured."),
    ] = None,
    batch: Batch = 1,
    tokens: Tokens = 128,
    threads: Threads = None,
    calibration: Calibration = None,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw them here, as .png, .svg or .pdf.", dir_okay=False)
    ] = None,
) -> None:
    """Measure each layer: its shapes, parameters, FLOPs, time and error against the dense one's."""
    from kroneckerbert.files import writable_file
    from kroneckerbert.planning import report as measured

    if calibration is not None and teacher is None:
        raise typer.BadParameter("--calibration is for errors, which need --teacher as well.")
    texts = _texts(calibration)
    inputs = _inputs(model, teacher, calibration)
    if picture is not None:
        import matplotlib  # noqa: F401  missing after the measurement would be a pity

        if picture.suffix.lower() not in (endings := (".png", ".svg", ".pdf")):
            raise typer.BadParameter(
                f"--picture {picture} must end in one of {', '.join(endings)}."
            )
        if json_file is not None and picture.resolve() == json_file.resolve():
            raise typer.BadParameter(f"--json and --picture are one file, {picture}; give two.")
        writable_file(picture, inputs)
    if json_file is not None:
        writable_file(json_file, inputs)
    _use(threads)
    compressed = _on_gpu(_model(model))
    dense = None if teacher is None else _on_gpu(_model(teacher))
    batches = _batches(texts, compressed, model)
    result = measured(compressed, dense, batch=batch, tokens=tokens, calibration=batches)
    console.print(str(result), soft_wrap=True)  # before what may fail: a disk may be full
    if json_file is not None:
        _write(json_file, result.to_json())
    if picture is not None:
        result.plot(picture)


@app.command()
def decompress(
    model: Annotated[str, typer.Argument(help="A compressed model.")],
    out: Annotated[Path, typer.Argument(help="New folder for the dense one.")],
) -> None:
    """Write the stock dense model that computes the same, for tools that know only that."""
    from kroneckerbert import decompress as decompress_model
    from kroneckerbert.files import writable_folder

    out = writable_folder(out)
    tokenizer, dense = _tokenizer(model), decompress_model(_model(model))
    _save(out, dense, tokenizer)
    console.print(f"Saved a {type(dense).__name__} to {out}.", soft_wrap=True)


@app.command(epilog="Example: kroneckerbert export STUDENT PROGRAM --format onnx --int8")
def export(
    model: Annotated[str, typer.Argument(help="A model, compressed or dense.")],
    out: Annotated[Path, typer.Argument(help="New folder for the program.")],
    format: Annotated[
        str,
        choice(
            "onnx, openvino, torch_export or aoti (compiled for this machine).",
            ("onnx", "openvino", "torch_export", "aoti"),
        ),
    ] = "onnx",
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Weights and products in 8 bits, for onnx; differences are only told."
        ),
    ] = False,
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="For inputs of one shape only: 2 sequences of 24 tokens each."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        number(
            float,
            "Largest accepted difference from PyTorch, as a share of the largest output; 1.2e-4 "
            "unless given.",
            above=True,
        ),
    ] = None,
) -> None:
    """Write a program that runs without this package, and check it against PyTorch."""
    from kroneckerbert.exporting import export as export_model
    from kroneckerbert.files import writable_folder

    out = writable_folder(out)
    result = export_model(
        _model(model),
        out,
        format=format,  # type: ignore[arg-type]  # a choice
        dynamic=not static,
        quantize="int8-dynamic" if int8 else None,
        tolerance=tolerance,
        tokenizer=_tokenizer(model),
    )
    console.print(str(result), soft_wrap=True)


@app.command(
    epilog="Example: kroneckerbert distill TEACHER STUDENT OUT --data texts.txt.gz --minutes 60"
)
def distill(
    teacher: Annotated[
        str, typer.Argument(help="The dense model; for a table, fine-tuned on its task.")
    ],
    student: Annotated[str, typer.Argument(help="What 'compress' or 'distill' wrote.")],
    out: Annotated[Path, typer.Argument(help="New folder for the trained student.")],
    data: Annotated[
        Path,
        input_file(
            "Plain text, one a line, or a table label<TAB>text[<TAB>second text]; may be .gz."
        ),
    ],
    minutes: Annotated[
        float | None,
        number(
            float, f"Stop after so many; {_DEFAULT_MINUTES:g} if no limit is given.", above=True
        ),
    ] = None,
    steps: Annotated[int | None, number(int, "Stop after so many steps.", 1)] = None,
    epochs: Annotated[
        float | None, number(float, "Stop after so many passes over the data.", above=True)
    ] = None,
    batch_size: Annotated[int, number(int, "Texts per step.", 1)] = 32,
    learning_rate: Annotated[
        float | None,
        number(
            float,
            "Its highest value; 1e-3 on plain text, 1e-4 on a table, unless given.",
            above=True,
        ),
    ] = None,
    max_length: Annotated[
        int | None, number(int, "Tokens kept of each text; 128 unless given.", 3)
    ] = None,
    seed: Annotated[int, number(int, "Draws the order of the texts.", most=MOST_SEED)] = 0,
    embedding_weight: Annotated[
        float, number(float, "Share in the loss of the embeddings' squared error.")
    ] = 1.0,
    attention_weight: Annotated[
        float, number(float, "Of the attention scores' squared error.")
    ] = 1.0,
    hidden_weight: Annotated[
        float, number(float, "Of the squared error of the layers' outputs.")
    ] = 1.0,
    logits_weight: Annotated[
        float | None,
        number(float, "Of the logits' divergence; unless given, 1 where both have logits."),
    ] = None,
    labels_weight: Annotated[
        float | None,
        number(float, "Of the task's own loss; unless given, 1 where there are labels."),
    ] = None,
) -> None:
    """Train a student to compute what its teacher computes, layer by layer.

    Stage 1: plain text, and the pre-trained teacher. Stage 2: a labelled table, and the teacher
    fine-tuned on it; a student without its classifier gets a copy of it.

    Ctrl-C (or SIGTERM) ends it after the step at hand and keeps a checkpoint in OUT.training, from
    which the same command goes on. A second one quits at once.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter(
            f"--steps {steps} and --epochs {epochs:g} are two lengths; give one."
        )

    import torch

    from kroneckerbert.data import TextDataset, is_table, label_targets, read_lines, read_table
    from kroneckerbert.distillation import DistillationConfig, DistillationTrainer
    from kroneckerbert.distillation.heads import with_head_of
    from kroneckerbert.distillation.kept import find, keep
    from kroneckerbert.distillation.provenance import digest, identity
    from kroneckerbert.files import replace_folder, writable_folder
    from kroneckerbert.loading import naming_source
    from kroneckerbert.modeling_kroneckerbert import max_tokens, positions
    from kroneckerbert.signals import Interrupted, stoppable

    out = writable_folder(out)
    labelled = is_table(data)
    table = read_table(data) if labelled else None
    texts = table.texts if labelled else read_lines(data)
    if minutes is None and steps is None and epochs is None:
        minutes = _DEFAULT_MINUTES
    if learning_rate is None:
        learning_rate = 1e-4 if labelled else 1e-3
    options: dict[str, Any] = {
        "max_minutes": minutes,
        # Without a number of steps, more than any time or number of epochs can take.
        "max_steps": -1 if epochs is not None else steps or 10**9,
        "num_train_epochs": 1 if epochs is None else epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    weights: dict[str, Any] = {
        "embedding_weight": embedding_weight,
        "attention_weight": attention_weight,
        "hidden_weight": hidden_weight,
        "logits_weight": logits_weight,
        "labels_weight": labels_weight,
    }
    models = {"teacher": teacher, "student": student}
    # By the names of this command's options, for a message tells which of them has changed.
    made_of = {
        "--data": digest(data.read_bytes()),
        "--minutes": minutes,
        "--steps": steps,
        "--epochs": epochs,
        "--batch-size": batch_size,
        "--learning-rate": learning_rate,
        "--max-length": max_length,
        "--seed": seed,
        **{f"--{name.replace('_', '-')}": weight for name, weight in weights.items()},
    }
    for name, source in models.items():
        _check_source(source)
        made_of[name] = identity(source)
    kept = out.with_name(f"{out.name}.training")
    checkpoint, seconds = find(kept, made_of)

    teacher_model, tokenizer = _model(teacher).float(), _tokenizer(teacher)
    labels = None
    if labelled:
        labels = label_targets(table.labels, _classifier(teacher, teacher_model).config)
        with naming_source(student):
            student_model = with_head_of(teacher_model, student).float()
    else:
        student_model = _model(student).float()
    longest = min(max_tokens(teacher_model, tokenizer), positions(student_model))
    max_length = max_length or min(128, longest)
    if max_length > longest:
        raise ValueError(
            f"--max-length {max_length} exceeds the {longest} positions of teacher and student."
        )
    texts_b = table.texts_b if labelled else None
    dataset = TextDataset(tokenizer, texts, texts_b, labels, max_length)

    # The folder is made before the training: what cannot be saved is not worth the time.
    with replace_folder(out) as folder:
        trainer = DistillationTrainer(
            student_model,
            teacher_model,
            DistillationConfig(
                output_dir=str(folder),
                train_sampling_strategy="group_by_length",
                logging_first_step=True,
                logging_steps=10,
                dataloader_pin_memory=torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                **options,
                **weights,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        if checkpoint is not None:
            errors.print(f"Going on from {checkpoint}.", soft_wrap=True)
            trainer.count_as_spent(seconds)
        start = time.monotonic() - seconds
        with stoppable(trainer) as stop:
            trainer.train(None if checkpoint is None else str(checkpoint))
            elapsed = time.monotonic() - start
            step = trainer.state.global_step
            if stop.number is not None and step < trainer.state.max_steps:
                keep(kept, folder / f"checkpoint-{step}", made_of, elapsed)
                raise Interrupted(
                    stop.number,
                    f"Stopped after step {step}; the training is kept in {kept}, which you may "
                    "delete to begin anew.",
                )
            student_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    shutil.rmtree(kept, ignore_errors=True)

    reports = [log for log in trainer.state.log_history if "loss" in log]
    first, last = reports[0], reports[-1]
    losses = Table(
        "mean over steps",
        *(_right(heading) for heading in ("1", f"last of {trainer.state.global_step:,}")),
    )
    for name in (name for name in last if name.startswith("loss")):
        losses.add_row(name.replace("_", " "), f"{first[name]:.4g}", f"{last[name]:.4g}")
    console.print(losses)
    console.print(f"Saved to {out} after {elapsed / 60:.1f} minutes.", soft_wrap=True)


@app.command(epilog="Example: kroneckerbert evaluate STUDENT --teacher TEACHER --data texts.txt")
def evaluate(
    model: Annotated[str, typer.Argument(help="The model to evaluate.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Plain text, one a line, or a table label<TAB>text[<TAB>second text]; may be .gz. "
            "With --task, the task's file or a folder that has it; if it is not given, the task "
            "comes from the Hugging Face hub.",
            exists=True,
            callback=regular,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A task by name (sst2, stsb, squad, …): its labels and metrics, beside the "
            "paper's results."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of the task: train, validation (unless given) or test."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The model's teacher: a column of its own or, on plain text, what the model is "
            "compared with."
        ),
    ] = None,
    batch_size: Annotated[int, number(int, "Texts per forward pass.", 1)] = 32,
) -> None:
    """Measure a model on a task, a labelled table, or its likeness to its teacher on plain text."""
    from kroneckerbert.data import is_table, read_lines, read_table
    from kroneckerbert.evaluation import evaluate as evaluate_model
    from kroneckerbert.evaluation import similarity

    names = [model] if teacher is None else [model, teacher]
    if task is not None:
        _evaluate_task(names, task, split, data, batch_size)
        return
    if split is not None:
        raise typer.BadParameter("--split is of a task; give --task as well.")
    if data is None or data.is_dir():
        raise typer.BadParameter("--data must be a file, unless --task says what is in a folder.")
    labelled = is_table(data)
    if not labelled and teacher is None:
        raise ValueError(
            f"{data} is plain text, on which a model can only be compared with its teacher: add "
            "--teacher, or give a table label<TAB>text."
        )
    rows: Any = read_table(data) if labelled else read_lines(data)
    tokenizer = _tokenizer(model)
    models = [_on_gpu(_model(name)) for name in names]
    if labelled:
        columns = [evaluate_model(m, tokenizer, rows, batch_size) for m in models]
    else:
        columns = [similarity(models[0], models[1], tokenizer, rows)]
        names = [f"{model} to {teacher}"]
    table = Table(f"{len(rows):,} texts", *map(_right, names))
    for metric in columns[0]:
        table.add_row(metric, *(f"{column[metric]:.4f}" for column in columns))
    console.print(table)


def _evaluate_task(
    names: list[str], name: str, split: str | None, data: Path | None, batch_size: int
) -> None:
    """The task's metrics of each model, and what the paper reports, in per cent."""
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
    tokenizer = _tokenizer(names[0])
    columns = []
    for source in names:
        scores = evaluate_task(_on_gpu(_model(source)), tokenizer, task, rows, batch_size)
        columns.append(compare(task, scores, split))
    published = [key for told in columns[0].values() for key in told if key != "ours"]
    published = list(dict.fromkeys(published))
    headings = [*names, *(f"paper's {key}" for key in published)]
    table = Table(f"{name}, {len(rows):,} rows of {split}, per cent", *map(_right, headings))
    for metric, told in columns[0].items():
        cells = [f"{column[metric]['ours']:.2f}" for column in columns]
        cells += [f"{told[key]:g}" if key in told else "" for key in published]
        table.add_row(metric, *cells)
    console.print(table)


@app.command(
    epilog="Example: kroneckerbert reproduce kronecker-bert-8 --task sst2 --data GLUE --output kb8"
)
def reproduce(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a name: see 'recipes'.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for everything; runs/RECIPE unless given.", file_okay=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the tasks' files; without it they come from the Hugging Face hub.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="One of the recipe's tasks; may be repeated. All unless given."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        number(int, "In place of the recipe's seeds of stage 2; may be repeated.", most=MOST_SEED),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another value for a key of the recipe: stage1.arguments.learning_rate=1e-4. May "
            "be repeated.",
        ),
    ] = None,
) -> None:
    """Run a recipe, or what is left of it: start, stage 1, teachers, stage 2, scores and cards.

    The same command goes on where a run was interrupted; Ctrl-C in a training of one process keeps
    its last step. For several GPUs: torchrun --nproc-per-node 4 -m kroneckerbert reproduce ..., or
    accelerate launch.
    """
    from kroneckerbert.reproduction.recipe import load
    from kroneckerbert.reproduction.run import run

    told = load(recipe, change or ())
    run(told, output or Path("runs") / Path(recipe).stem, data, task or None, seed or None)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from kroneckerbert.reproduction.recipe import shipped

    table = Table(_names("recipe"), _names("what it does"))
    for name, description in shipped().items():
        table.add_row(name, description)
    console.print(table)
    console.print("Next: kroneckerbert reproduce RECIPE --data DIR", soft_wrap=True)


@app.command(epilog="Example: kroneckerbert benchmark TEACHER STUDENT --batch 1 --threads 1")
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Models; the first is the reference.")],
    batch: Annotated[
        list[int] | None,
        number(int, "Sequences per pass; may be repeated. 1 and 32 unless given.", 1),
    ] = None,
    tokens: Tokens = 128,
    threads: Threads = None,
    seconds: Annotated[
        float, number(float, "To measure for, for each batch size, all models together.")
    ] = 5.0,
    json_file: JsonFile = None,
) -> None:
    """Compare models' parameters, bytes, FLOPs and latencies, with ratios to the first."""
    import torch

    from kroneckerbert.files import writable_file
    from kroneckerbert.measure import bytes_on_disk, flops, latency, parameters

    if len(set(models)) < len(models):
        raise typer.BadParameter(f"a model is named twice in {', '.join(models)}.")
    batch = batch or [1, 32]
    if json_file is not None:
        writable_file(json_file, _inputs(*models))
    _use(threads)
    loaded = {name: _on_gpu(_model(name)) for name in models}
    timings = {size: latency(loaded, size, tokens, seconds) for size in batch}
    numbers: dict[str, dict[str, Any]] = {
        name: {
            "parameters": parameters(model),
            "bytes": bytes_on_disk(_folder(name)),
            "flops": flops(model, 1, tokens),
            "latency_ms": {size: timings[size][name]._asdict() for size in batch},
        }
        for name, model in loaded.items()
    }
    where = {
        "device": str(next(iter(loaded.values())).device),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "torch": torch.__version__,
    }
    reference = numbers[models[0]]
    table = Table(
        _names("model"),
        *map(_right, ("parameters", "MB", "GFLOPs")),
        *(_right(f"ms at batch {size}") for size in batch),
        caption=f"{tokens} tokens, {where['threads']} threads, {where['device']}. Weights on disk; "
        f"FLOPs of one sequence; median time and quartiles. (times less than {models[0]})",
    )
    for name, row in numbers.items():
        cells = [
            _ratio(f"{row[key] / unit:,.{digits}f}", row[key], reference[key])
            for key, unit, digits in (("parameters", 1, 0), ("bytes", 1e6, 1), ("flops", 1e9, 2))
        ]
        for size in batch:
            t = timings[size][name]
            cell = _ratio(f"{t.median:.2f}", t.median, timings[size][models[0]].median)
            cells.append(f"{cell}\n{t.low:.2f}-{t.high:.2f}")
        table.add_row(name, *cells)
    console.print(table)  # before what may fail: a disk may be full
    if json_file is not None:
        _write(json_file, json.dumps({**where, "models": numbers}, indent=2))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, numbers and pictures.")] = Path(
        "kroneckerbert-demo"
    ),
    minutes: Annotated[float, number(float, "Of training, for each of two students.")] = 4.0,
    seed: Annotated[int, number(int, "Draws whatever is random.", most=MOST_SEED)] = 0,
) -> None:
    """Compress, distil, evaluate and benchmark a real teacher; it and its texts are installed."""
    from kroneckerbert import demo as demonstration

    demonstration.run(output, minutes, seed)


def _limits(texts: list[str]) -> dict[str, float | str]:
    """``["latency=2x", "bytes=12e6"]`` as ``{"latency": "2x", "bytes": 12e6}``."""
    limits: dict[str, float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"--budget {text!r} must be a quantity and its limit: latency=2x."
            )
        if key in limits:
            raise typer.BadParameter(
                f"--budget has two limits of {key!r}, {limits[key]} and {value}."
            )
        try:
            limits[key] = float(value)
        except ValueError:
            limits[key] = value
    return limits


def _inputs(*sources: str | Path | None) -> list[Path]:
    return [Path(source) for source in sources if source is not None]


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text + "\n")
    except OSError as error:  # which does not name the file if the disk is full
        raise OSError(f"cannot write {path}: {error.strerror}.") from error


def _model(source: str) -> PreTrainedModel:
    """A saved model in the class that its configuration names, every weight of it from the file."""
    import transformers

    import kroneckerbert
    from kroneckerbert.loading import load, naming_source, read_config

    _check_source(source)
    # Bars and reports of weights; what matters of these is an error below.
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with naming_source(source):
        config = read_config(source)
    if config.is_encoder_decoder:
        raise TypeError(f"{source} has an encoder and a decoder; give a model with one of them.")
    # Checkpoints of bare encoders may name no class.
    name = (config.architectures or ["AutoModel"])[0]
    model_class: Any = getattr(kroneckerbert, name, None) or getattr(transformers, name, None)
    if not hasattr(model_class, "from_pretrained"):
        raise TypeError(
            f"{source} is a {name} ({config.model_type}), which is no model of this version of "
            f"transformers ({transformers.__version__})."
        )
    with naming_source(source):
        return load(model_class, source).eval()


def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from kroneckerbert.loading import naming_source

    _check_source(source)
    absent = OSError(
        f"{source} has no tokenizer; save it there with tokenizer.save_pretrained({source!r})."
    )
    with naming_source(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            if any(Path(source).glob("tokenizer*")):  # then it is damaged
                raise
            raise absent from error
    # transformers makes up a vocabulary of special tokens where it finds none.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise absent
    return tokenizer


def _check_source(source: str) -> None:
    # The hub's "owner/name" has no other form; its client would complain about that alone.
    is_local = not source or source.startswith((".", "~", "/")) or source.count("/") > 1
    if (is_local or os.path.isfile(source)) and not os.path.isdir(source):
        raise FileNotFoundError(
            f"{source or repr(source)} is not a folder; give a saved model's, or a hub name."
        )
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise FileNotFoundError(
            f"{source} holds no model, for it has no config.json; give a folder that "
            "save_pretrained wrote."
        )


def _folder(source: str) -> Path:
    """Where a model's files are, in the hub's cache if it came from there."""
    from transformers.utils import cached_file

    return Path(cached_file(source, "config.json")).parent


def _use(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _save(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from kroneckerbert.files import replace_folder

    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _texts(path: Path | None) -> list[str] | None:
    """What a file of calibration text has; read before models are, which takes longer."""
    from kroneckerbert.data import is_table, read_lines, read_table

    if path is None:
        return None
    return read_table(path).texts if is_table(path) else read_lines(path)


def _batches(texts: list[str] | None, model: PreTrainedModel, source: str) -> Any:
    """Calibration text as inputs of a model, by the tokenizer at ``source``."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    from kroneckerbert.data import TextDataset
    from kroneckerbert.modeling_kroneckerbert import max_tokens

    if texts is None:
        return None
    tokenizer = _tokenizer(source)
    # From the whole file: neighbours are often about the same thing.
    texts = texts[:: max(1, len(texts) // _CALIBRATION_TEXTS)][:_CALIBRATION_TEXTS]
    dataset = TextDataset(tokenizer, texts, max_length=min(128, max_tokens(model, tokenizer)))
    return DataLoader(dataset, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))


def _classifier(source: str, model: PreTrainedModel) -> PreTrainedModel:
    from kroneckerbert.evaluation import classifies_sequences

    if not classifies_sequences(model):
        raise TypeError(
            f"{source} is a {type(model).__name__}, but a table's labels need a teacher that was "
            "fine-tuned on them, a model for sequence classification; for stage 1 give plain text."
        )
    return model


def _on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    import torch

    return model.cuda() if torch.cuda.is_available() else model


def _names(heading: str) -> Column:
    return Column(heading, overflow="fold")


def _right(heading: str) -> Column:
    return Column(heading, justify="right", overflow="fold")


def _ratio(text: str, value: float, reference: float) -> str:
    """A cell with the factor by which it is below the reference."""
    return f"{text} ({reference / value:.1f}x)" if value and reference else text
