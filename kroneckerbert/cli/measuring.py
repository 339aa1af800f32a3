"""Commands that measure models: benchmark, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kroneckerbert.cli.shell import (
    MAX_SEED,
    JsonFile,
    Threads,
    Tokens,
    console,
    names,
    number,
    right,
    write_text,
)
from kroneckerbert.cli.sources import existing, on_gpu, read_model, use_threads


def benchmark(
    models: Annotated[list[str], typer.Argument(help="Models; the first is the reference.")],
    batch: Annotated[
        list[int] | None,
        number(int, "Sequences per pass; may be repeated. 1 and 32 if unset.", 1),
    ] = None,
    tokens: Tokens = 128,
    threads: Threads = None,
    seconds: Annotated[
        float, number(float, "Measuring time per batch size, all models together.")
    ] = 5.0,
    json_file: JsonFile = None,
) -> None:
    """Compare parameters, bytes, FLOPs and latencies of models, with ratios to the first."""
    import torch
    from transformers.utils import cached_file

    from kroneckerbert.files import writable_file
    from kroneckerbert.measure import bytes_on_disk, flops, latency, parameters

    if len(set(models)) < len(models):
        raise typer.BadParameter(f"a model is named twice: {', '.join(models)}; name each once.")
    batch = batch or [1, 32]
    if json_file is not None:
        writable_file(json_file, existing(*models))
    use_threads(threads)
    loaded = {name: on_gpu(read_model(name)) for name in models}
    timings = {size: latency(loaded, size, tokens, seconds) for size in batch}
    numbers: dict[str, dict[str, Any]] = {
        name: {
            "parameters": parameters(model),
            "bytes": bytes_on_disk(Path(cached_file(name, "config.json")).parent),  # or hub cache
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
        names("model"),
        *map(right, ("parameters", "MB", "GFLOPs")),
        *(right(f"ms at batch {size}") for size in batch),
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
    console.print(table)  # before saving, which may fail: a full disk
    if json_file is not None:
        write_text(json_file, json.dumps({**where, "models": numbers}, indent=2))


def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, numbers and pictures.")] = Path(
        "kroneckerbert-demo"
    ),
    minutes: Annotated[float, number(float, "Training time for each of two students.")] = 4.0,
    seed: Annotated[int, number(int, "Seed of everything random.", most=MAX_SEED)] = 0,
) -> None:
    """Compress, distil, evaluate and benchmark an installed teacher, without a network."""
    from kroneckerbert.demo import run

    run(output, minutes, seed)


def _ratio(text: str, value: float, reference: float) -> str:
    """The text of a cell, with the factor by which its value is below the reference."""
    return f"{text} ({reference / value:.1f}x)" if value and reference else text
