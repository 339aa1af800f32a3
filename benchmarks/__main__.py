"""The benchmarks: what is asked is measured, written as JSON, printed as tables and drawn.

Results go to benchmarks/results/here, which is not in git, for they are this machine's; those that
the documentation quotes lie in benchmarks/results. Nothing else should run meanwhile: a warning
says so if it does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import RESULTS

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

To = Annotated[Path, typer.Option(help="Folder of the results.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every contender.")]
VERBS = ("layers", "model", "training", "memory")
HERE = RESULTS / "here"
DOCS = RESULTS.parents[1] / "docs/assets"


@app.command()
def layers(
    threads: Threads = 1,
    only: Annotated[list[str] | None, typer.Option(help="A group of cells; repeatable.")] = None,
    match: Annotated[str, typer.Option(help="Of '8x8 ⊗ 4x4, T=1': a regular expression.")] = "",
    seconds: Annotated[float, typer.Option(help="For each cell.")] = 1.5,
    compare: Annotated[Path | None, typer.Option(help="Earlier results to compare with.")] = None,
    to: To = HERE,
) -> None:
    """One layer: against dense, plain PyTorch and other libraries; scaling; roofline."""
    from benchmarks import layer_tables
    from benchmarks import layers as module

    if unknown := set(only or ()) - set(module.GROUPS):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(module.GROUPS)}")
    cells = [module.Cell(g, *cell) for g in only or module.DEFAULT for cell in module.GROUPS[g]]
    cells = [cell for cell in cells if re.search(match, str(cell))]
    if not cells:
        raise typer.BadParameter(f"no cell matches {match!r}")
    then = json.loads(compare.read_text()) if compare else None  # may be overwritten below
    results = module.run(cells, threads, seconds, to / "layers.json")
    report(to, ["layers"])
    if then:
        rows = [[*map(layer_tables.Row, record["rows"])] for record in (results, then)]
        print("\n" + layer_tables.compare(*rows))


@app.command()
def model(
    threads: Threads = 1,
    batch: Annotated[list[int], typer.Option(help="Sequences; repeatable.")] = [1, 8],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="Of each; repeatable.")] = [16, 128, 512],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="For each cell, at least.")] = 8.0,
    to: To = HERE,
) -> None:
    """BERT_BASE: dense in PyTorch, torch.compile and onnxruntime, against KroneckerBERT."""
    from benchmarks import model as module

    module.run(threads, batch, tokens, seconds, to / "model.json")
    report(to, ["model"])


@app.command()
def training(
    threads: Threads = 1,
    seconds: Annotated[float, typer.Option(help="For each cell, at least.")] = 10.0,
    to: To = HERE,
) -> None:
    """A step of training BERT_BASE: dense against KroneckerBERT."""
    from benchmarks import training as module

    module.run(threads, module.SIZES, seconds, to / "training.json")
    report(to, ["training"])


@app.command()
def memory(threads: Threads = 1, to: To = HERE) -> None:
    """Peak memory of that step."""
    from benchmarks import memory as module

    module.run(threads, module.BATCHES, to / "memory.json")
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
        results = json.loads(path.read_text())
        if verb == "layers":
            print(layer_tables.report(results))
            continue
        for table in modules[verb].tables(results):
            console.print(table)
    for picture in plots.draw_all(folder, pictures or folder):
        print(picture)


if __name__ == "__main__":
    app()
