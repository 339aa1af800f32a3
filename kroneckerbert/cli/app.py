"""The command ``kroneckerbert``: compress, distil, evaluate and benchmark models from a shell."""

from __future__ import annotations

from typing import Annotated

import typer

from kroneckerbert.cli import compression, measuring, students, training
from kroneckerbert.cli.shell import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog="To see everything at work on a real model, in minutes: kroneckerbert demo")
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compress BERT models with Kronecker products, and distil them from the originals.

    A model is a folder written by save_pretrained, or a name on the Hugging Face hub. To make a
    small student: compress TEACHER STUDENT, then distill TEACHER STUDENT OUT --data TEXTS, then
    evaluate and benchmark.
    """


# In the order of the help.
for command, example in (
    (compression.plan, "plan TEACHER plan.json --budget latency=2x"),
    (compression.compress, "compress TEACHER STUDENT --preset kronecker-bert-21"),
    (compression.quantize, "quantize STUDENT INT8 --calibration texts.txt"),
    (compression.report, "report STUDENT --teacher TEACHER --threads 1"),
    (compression.decompress, "decompress STUDENT DENSE"),
    (compression.export, "export STUDENT PROGRAM --format onnx --int8"),
    (training.distill, "distill TEACHER STUDENT OUT --data texts.txt.gz --minutes 60"),
    (training.evaluate, "evaluate STUDENT --teacher TEACHER --data texts.txt"),
    (training.reproduce, "reproduce kronecker-bert-8 --task sst2 --data GLUE --output kb8"),
    (training.recipes, "recipes"),
    (students.students, "students"),
    (students.embed, 'embed "some text"'),
    (students.search, 'search texts.txt "a query"'),
    (measuring.benchmark, "benchmark TEACHER STUDENT --batch 1 --threads 1"),
    (measuring.demo, "demo --minutes 4"),
):
    app.command(epilog=f"Example: kroneckerbert {example}")(command)
