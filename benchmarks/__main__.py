"""Benchmarks: measure, write JSON, print tables, draw pictures.

Results go to benchmarks/results/here, which git ignores: they are this machine's. The results that
the documentation quotes are in benchmarks/results. Run nothing else meanwhile: other work that
takes time causes a warning.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import machine
from kroneckerbert.cli.shell import Commands, input_file, number
from kroneckerbert.files import writable_file

app = typer.Typer(
    cls=Commands,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HERE = machine.RESULTS / "here"
# Modules, whose results have their names, in the order of `report`; the first four are `all`.
MODULES = (
    *("layers", "model", "training", "memory", "threads", "int8"),
    *("eager_forms", "calls", "budgets", "starts", "study", "study_speed"),
    *("distillation_speed", "students", "adapters", "many_factors"),
)
ALL = MODULES[:4]

To = Annotated[Path, typer.Option(help="Folder for the results.")]
Threads = Annotated[int, number(int, "Threads of every contender.", 1, os.cpu_count() or 1)]
Quick = Annotated[bool, typer.Option("--quick", help="A tenth of the time and data; not to quote.")]
Teachers = Annotated[
    list[str], typer.Argument(metavar="NAME=FOLDER...", help="Sentence encoders with tokenizers.")
]
Data = Annotated[
    Path,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder with the tasks' tables and text: docs/benchmarks.md, Data, has their names.",
    ),
]
Folder = Annotated[Path, typer.Argument(help="Of results, as JSON.")]


@app.command()
def layers(
    only: Annotated[list[str] | None, typer.Option(help="A group of cells; repeatable.")] = None,
    match: Annotated[str, typer.Option(help="Regular expression, of '8x8 ⊗ 4x4, T=1'.")] = "",
    compare: Annotated[Path | None, input_file("Earlier results to compare with.")] = None,
    threads: Threads = 1,
    quick: Quick = False,
    to: To = HERE,
) -> None:
    """One layer: against dense, plain PyTorch and other libraries; scaling; roofline."""
    from benchmarks import layers as module

    if unknown := set(only or ()) - set(module.GROUPS):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(module.GROUPS)}")
    cells = [module.Cell(g, *cell) for g in only or module.DEFAULT for cell in module.GROUPS[g]]
    try:
        cells = [cell for cell in cells if re.search(match, str(cell))]
    except re.error as error:
        raise typer.BadParameter(f"{match!r} is not a regular expression: {error}") from error
    if not cells:
        raise typer.BadParameter(f"no cell matches {match!r}")
    then = None
    if compare:  # read before it may be overwritten
        with _reading(compare):
            then = module.rows_of(machine.read(compare))
            module.compare(then, then)
    name = "many_factors" if {cell.group for cell in cells} <= set(module.MANY) else "layers"
    measure(name, threads, quick, to, cells=cells)
    if then:
        now = module.rows_of(machine.read(to / f"{name}.json"))
        print("\n" + module.compare(now, then))


@app.command()
def model(
    batch: Annotated[list[int], number(int, "Sequences; repeatable.", 1)] = [1, 8],  # noqa: B006
    tokens: Annotated[list[int], number(int, "Of each; repeatable.", 1, 512)] = [16, 128, 512],  # noqa: B006
    only: Annotated[list[str] | None, typer.Option(help="A part; repeatable.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder with Wikipedia, instead of the demo's text."
        ),
    ] = None,
    threads: Threads = 1,
    quick: Quick = False,
    to: To = HERE,
) -> None:
    """BERT_BASE and MiniLM: dense in several runtimes, against KroneckerBERT."""
    from benchmarks import model as module

    parts = tuple(only or module.PARTS)
    if unknown := set(parts) - set(module.PARTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(module.PARTS)}")
    options = {"batch": batch, "tokens": tokens, "parts": parts, "data": data}
    measure("model", threads, quick, to, **options)


@app.command(name="threads")
def several_threads(
    most: Annotated[int, number(int, "The most threads.", 1, os.cpu_count() or 1)] = min(
        2, os.cpu_count() or 1
    ),
    quick: Quick = False,
    to: To = HERE,
) -> None:
    """BERT_BASE, one text: with 1, 2, 4, … threads, up to the most."""
    measure("threads", most, quick, to)


@app.command()
def int8(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """One layer in int8 against the same in float32."""
    measure("int8", threads, quick, to)


@app.command()
def training(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """A step of training BERT_BASE: dense against KroneckerBERT."""
    measure("training", threads, quick, to)


@app.command()
def memory(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Peak memory of that step, and of inference."""
    measure("memory", threads, quick, to)


@app.command()
def eager_forms(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """The eager backend's choice of form against every form that PyTorch offers."""
    measure("eager_forms", threads, quick, to)


@app.command()
def calls(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Where the time of one token's call goes, in Python."""
    measure("calls", threads, quick, to)


@app.command()
def budgets(teachers: Teachers, threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Budgets of plans, and measurements of the saved and reloaded students."""
    measure("budgets", threads, quick, to, teachers=_folders(teachers))


@app.command()
def starts(
    teachers: Teachers, data: Data, threads: Threads = 1, quick: Quick = False, to: To = HERE
) -> None:
    """Quality of students without training, by the start that made them."""
    measure("starts", threads, quick, to, teachers=_folders(teachers), data=data)


@app.command()
def study(
    data: Data,
    work: Annotated[
        Path, typer.Option(help="Folder for locks, the text, the teacher's vectors and students.")
    ] = Path("build/study"),
    seeds: Annotated[list[int], number(int, "Of the jobs; repeatable.", 0)] = [0],  # noqa: B006
    only: Annotated[
        str | None,
        typer.Option(
            help="Only jobs with this in their name, 'FORM, SIZE, SEED', with FORM and SIZE as in "
            "the tables: 'low-rank words, 21x, 0' is one row, 'teacher' another."
        ),
    ] = None,
    threads: Threads = 1,
    to: To = HERE,
) -> None:
    """Forms of students compared after distillation; hours. Start it once for each core.

    A job whose row is in the results is not repeated, so give a folder without them to reproduce a
    row. `report FOLDER` prints what there is.
    """
    measure("study", threads, False, to, data=data, work=work, seeds=seeds, only=only)


@app.command()
def study_speed(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Milliseconds of the study's students; after `study`, with its results in the folder."""
    measure("study_speed", threads, quick, to)


@app.command()
def distillation_speed(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Tokens per second in distillation."""
    measure("distillation_speed", threads, quick, to)


@app.command()
def students(
    data: Data,
    tasks: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Output of reproduce minilm-tasks."),
    ] = None,
    threads: Threads = 1,
    quick: Quick = False,
    to: To = HERE,
) -> None:
    """The ready students beside their teacher: scores, first vector, texts a second."""
    measure("students", threads, quick, to, data=data, tasks=tasks)


@app.command()
def adapters(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """A layer with a LoKr adapter: by PEFT, by forming the product, merged, and ours."""
    measure("adapters", threads, quick, to)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def gpu(context: typer.Context) -> None:
    """Everything that needs a GPU; the options are those of python -m benchmarks.gpu."""
    sys.exit(subprocess.call([sys.executable, "-m", "benchmarks.gpu", *context.args]))


@app.command()
def fit_gelu() -> None:
    """Fit the coefficients of GELU in csrc/cpu/activation.h."""
    from benchmarks import fit_gelu as module

    module.run()


@app.command(name="all")
def everything(threads: Threads = 1, quick: Quick = False, to: To = HERE) -> None:
    """Layers, model, training and memory, each in a new process; with a GPU, gpu."""
    import torch

    options = ["--threads", str(threads), "--to", str(to), *["--quick"] * quick]
    verbs = [[verb, *options] for verb in ALL] + [["gpu"]] * torch.cuda.is_available()
    command = [sys.executable, "-m", "benchmarks"]
    if failed := [verb for verb, *rest in verbs if subprocess.call([*command, verb, *rest])]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


@app.command(name="report")
def tables_and_pictures(
    folder: Folder = machine.RESULTS,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Only tables of whole models, as the pages have them."),
    ] = False,
) -> None:
    """Print the tables and draw the pictures of results; nothing is measured."""
    _check_folder(folder)
    if markdown:
        from benchmarks import markdown as module

        with _reading(folder):
            print("\n".join(module.tables(folder)), end="")
        return
    if pictures:
        writable_file(pictures / "layers.png")
    report(folder, MODULES, pictures)


@app.command(name="targets")
def reached(folder: Folder = machine.RESULTS) -> None:
    """Print what the engine is to reach, and what was measured."""
    from benchmarks import targets as module

    _check_folder(folder)
    with _reading(folder):
        print(module.table(folder), end="")


def measure(verb: str, threads: int, quick: bool, to: Path, **options: Any) -> None:
    """Run a module's benchmark, then print its tables and draw the pictures."""
    path = writable_file(to / f"{verb}.json")
    import_module(f"benchmarks.{verb}").run(path, threads, 0.1 if quick else 1.0, **options)
    report(to, [verb])


def report(folder: Path, verbs: Iterable[str], pictures: Path | None = None) -> None:
    """Print the tables of these results; draw all pictures that the folder's results allow."""
    from benchmarks import plots

    console = Console(width=200, markup=False, highlight=False)
    for verb in verbs:
        path = folder / f"{verb}.json"
        if path.exists():
            with _reading(path):
                tables = import_module(f"benchmarks.{verb}").tables(machine.read(path))
            for table in tables:
                console.print(table)
    for picture in plots.draw_all(folder, pictures or machine.pictures_of(folder)):
        print(picture)


def _check_folder(folder: Path) -> None:
    if not any(folder.glob("*.json")):
        raise FileNotFoundError(f"{folder} has no results, no .json; measure some first.")


def _folders(teachers: list[str]) -> dict[str, str]:
    if wrong := [teacher for teacher in teachers if not re.fullmatch("[^=]+=.+", teacher)]:
        raise typer.BadParameter(f"{wrong[0]!r} must be NAME=FOLDER")
    return dict(teacher.split("=", 1) for teacher in teachers)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors into one error: the file holds no results."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no results of this benchmark ({type(error).__name__}: {error}); measure "
            "them again."
        ) from error


if __name__ == "__main__":
    app()
