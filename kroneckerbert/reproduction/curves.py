"""Plot the learning curves of a distillation, term by term.

curves.save({"seed 0": curves.read("out/checkpoint-500")}, "curves.png")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def read(source: str | os.PathLike) -> list[dict]:
    """The log history in a ``trainer_state.json``, or in the one in a checkpoint's folder.

    Raises:
        ValueError: If the file is something else.
        OSError: If it cannot be read.
    """
    path = Path(source)
    path = path / "trainer_state.json" if path.is_dir() else path
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        if not all(isinstance(report, dict) for report in history):
            raise TypeError("its log_history must be a list of reports")
        return history
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a trainer_state.json ({type(error).__name__}: {error}); give one, or a "
            "checkpoint's folder."
        ) from error


def save(log_histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike):
    """Plot the loss and each of its terms over the steps, one panel each, on a log scale.

    The faint line shows the reports, each a mean over the steps since the last; the strong line is
    their running mean; dots are evaluations.

    Args:
        log_histories: ``trainer.state.log_history`` by name in the legend.
        path: A file ending in .png, .svg or .pdf.

    Raises:
        ValueError: If no history contains a loss.
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # needs no window system
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib: pip install 'kron-kernels[demo]'", name="matplotlib"
        ) from error
    reports = [report for history in log_histories.values() for report in history]
    # In the first report's order: the loss, then its terms.
    keys = [key.removeprefix("eval_") for report in reports for key in report]
    terms = [k for k in dict.fromkeys(keys) if k == "loss" or k.startswith("loss_")]
    if not terms:
        raise ValueError(
            f"the histories of {', '.join(log_histories) or 'no run'} have no loss to draw; train "
            "for at least logging_steps, or set logging_first_step."
        )
    columns = 2 if len(terms) in (2, 4) else min(3, len(terms))
    rows = -(-len(terms) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, term in zip(panels, terms, strict=False):
        for i, history in enumerate(log_histories.values()):
            colour = f"C{i % 10}"
            steps, values = _points(history, term)
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=1.5)
            axes.plot(*_points(history, f"eval_{term}"), "o", color=colour, markersize=3)
        axes.set(title=term.replace("_", " "), yscale="log")
        axes.tick_params(labelbottom=True)  # panels above a gap in the last row would lose them
        axes.grid(alpha=0.3)
    for axes in panels[len(terms) :]:
        axes.set_axis_off()
    figure.supxlabel("step")
    if len(log_histories) > 1:
        strong = panels[0].lines[1::3]
        characters = 6 + max(map(len, log_histories))  # per entry, at about 12 per inch
        fitting = max(1, min(5, int(12 * 3.6 * columns / characters)))
        figure.legend(strong, list(log_histories), loc="outside upper center", ncols=fitting)
    figure.savefig(path, dpi=150)


def _points(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(log["step"], log[key]) for log in history if log.get(key, 0) > 0]  # a log scale
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the reports; fewer at the ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
