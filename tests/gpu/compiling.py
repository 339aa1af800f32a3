"""Compilers' outputs, kept between runs and shared by all processes."""

import fcntl
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def digest(command: Sequence[str], sources: Iterable[Path]) -> str:
    """Identifies the output of a command by its words and the contents of its sources."""
    key = hashlib.sha256(repr(list(command)).encode())
    for path in sources:
        key.update(path.read_bytes() + b"\0")
    return key.hexdigest()[:20]


def made(output: Path, command: Sequence[str]) -> Path:
    """Run ``command -o output`` unless the file exists; one of several processes does it.

    Raises:
        RuntimeError: If the compiler fails, with its messages.
    """
    output.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(output.with_name(f"{output.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return output
        # A preloaded sanitizer would slow the compiler down.
        plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            partial = Path(folder, output.name)
            done = subprocess.run(
                [*command, "-o", str(partial)], capture_output=True, text=True, env=plain
            )
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
            partial.replace(output)
    return output
