"""The benchmarks: what is asked is measured, written as JSON, printed as tables and drawn.

Results go to benchmarks/results/here, which is not in git, for they are this machine's; those that
the documentation quotes lie in benchmarks/results. Nothing else should run meanwhile: a warning
says so if it does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import RESULTS
from kroneckerbert.cli.shell import Commands, input_file, number
from kroneckerbert.files import writable_file

app = typer.Typer(
    cls=Commands,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

To = Annotated[Path, typer.Option(help="Folder of the results.")]
Threads = Annotated[int, number(int, "Threads of every contender.", 1, os.cpu_count() or 1)]
VERBS = ("layers", "model", "training", "memory")
HERE = RESULTS / "here"
DOCS = RESULTS.parents[1] / "docs/assets"


@app.command()
def layers(
    threads: Threads = 1,
    only: Annotated[list[str] | None, typer.Option(help="A group of cells; repeatable.")] = None,
    match: Annotated[str, typer.Option(help="Of '8x8 ⊗ 4x4, T=1': a regular expression.")] = "",
    seconds: Annotated[float, number(float, "For each cell.")] = 1.5,
    compare: Annotated[Path | None, input_file("Earlier results to compare with.")] = None,
    to: To = HERE,
) -> None:
    """One layer: against dense, plain PyTorch and other libraries; scaling; roofline."""
    from benchmarks import layer_tables
    from benchmarks import layers as module

    if unknown := set(only or ()) - set(module.GROUPS):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(module.GROUPS)}")
    cells = [module.Cell(g, *cell) for g in only or module.DEFAULT for cell in module.GROUPS[g]]
    try:
        cells = [cell for cell in cells if re.search(match, str(cell))]
    except re.error as error:
        raise typer.BadParameter(f"{match!r} is no regular expression: {error}") from error
    if not cells:
        raise typer.BadParameter(f"no cell matches {match!r}")
    then = None
    if compare:  # before it may be overwritten
        with _reading(compare):
            then = [*map(layer_tables.Row, json.loads(compare.read_text())["rows"])]
            layer_tables.compare(then, then)
    results = module.run(cells, threads, seconds, writable_file(to / "layers.json"))
    report(to, ["layers"])
    if then:
        print("\n" + layer_tables.compare([*map(layer_tables.Row, results["rows"])], then))


@app.command()
def model(
    threads: Threads = 1,
    batch: Annotated[list[int], number(int, "Sequences; repeatable.", 1)] = [1, 8],  # noqa: B006
    tokens: Annotated[list[int], number(int, "Of each; repeatable.", 1, 512)] = [16, 128, 512],  # noqa: B006
    seconds: Annotated[float, number(float, "For each cell, at least.")] = 8.0,
    to: To = HERE,
) -> None:
    """BERT_BASE: dense in PyTorch, torch.compile and onnxruntime, against KroneckerBERT."""
    from benchmarks import model as module

    module.run(threads, batch, tokens, seconds, writable_file(to / "model.json"))
    report(to, ["model"])


@app.command()
def training(
    threads: Threads = 1,
    seconds: Annotated[float, number(float, "For each cell, at least.")] = 10.0,
    to: To = HERE,
) -> None:
    """A step of training BERT_BASE: dense against KroneckerBERT."""
    from benchmarks import training as module

    module.run(threads, module.SIZES, seconds, writable_file(to / "training.json"))
    report(to, ["training"])


@app.command()
def memory(threads: Threads = 1, to: To = HERE) -> None:
    """Peak memory of that step."""
    from benchmarks import memory as module

    module.run(threads, module.BATCHES, writable_file(to / "memory.json"))
    report(to, ["memory"])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def gpu(context: typer.Context) -> None:
    """Everything that wants a GPU; the options are those of python -m benchmarks.gpu."""
    sys.exit(subprocess.call([sys.executable, "-m", "benchmarks.gpu", *context.args]))


@app.command(name="all")
def everything(threads: Threads = 1, to: To = HERE) -> None:
    """Layers, model, training and memory, each in a process of its own; with a GPU, gpu."""
    import torch

    verbs = [[v, "--threads", str(threads), "--to", str(to)] for v in VERBS]
    if torch.cuda.is_available():
        verbs.append(["gpu"])
    failed = [
        verb
        for verb, *options in verbs
        if subprocess.call([sys.executable, "-m", "benchmarks", verb, *options])
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


@app.command(name="report")
def tables_and_pictures(
    folder: Annotated[Path, typer.Argument(help="With results as JSON.")] = RESULTS,
    pictures: Annotated[Path, typer.Option(help="Folder for the pictures.")] = DOCS,
) -> None:
    """The tables and pictures of results that are there; nothing is measured."""
    if not any(folder.glob("*.json")):
        raise FileNotFoundError(f"{folder} has no results, no .json; measure some first.")
    writable_file(pictures / "layers.png")
    report(folder, VERBS, pictures)


def report(folder: Path, verbs: Iterable[str], pictures: Path | None = None) -> None:
    """Print the verbs' tables; draw all pictures that the folder's results allow."""
    from benchmarks import layer_tables, memory, model, plots, training

    console = Console(width=150, highlight=False)
    modules = {"model": model, "training": training, "memory": memory}
    for verb in verbs:
        path = folder / f"{verb}.json"
        if not path.exists():
            continue
        with _reading(path):
            results = json.loads(path.read_text())
            told = (
                [layer_tables.report(results)]
                if verb == "layers"
                else [*modules[verb].tables(results)]
            )
        for table in told:
            print(table) if verb == "layers" else console.print(table)
    for picture in plots.draw_all(folder, pictures or folder):
        print(picture)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within, an error is one of a file of results that is none."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no results of this benchmark ({type(error).__name__}: {error}); measure "
            "them again."
        ) from error


if __name__ == "__main__":
    app()
