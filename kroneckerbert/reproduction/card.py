"""The model card of a student: how it was made, what it scores and how to load it."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kroneckerbert.measure import model_bytes, parameters
from kroneckerbert.modeling_kroneckerbert import KroneckerPreTrainedModel
from kroneckerbert.reproduction.tasks import TASKS

# The Hub's metric names.
_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_PIPELINES = {
    "SequenceClassification": "text-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
}
_PACKAGES = ("kron-kernels", "torch", "transformers", "accelerate", "datasets")
_PAPER = "Tahaei et al., [KroneckerBERT](https://aclanthology.org/2022.naacl-main.154/), NAACL 2022"
_LOADING_VECTORS = """```sh
pip install 'kron-kernels[bert]'
```

```python
import kroneckerbert

encoder = kroneckerbert.load("FOLDER")
vectors = encoder.encode(["A text.", "Another one."])  # unit vectors, a row each
```

With sentence-transformers: `import kroneckerbert`, then `SentenceTransformer("FOLDER")`."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Score:
    """One metric of a student for every seed, with its teacher's and the paper's, in per cent.

    Args:
        task: Name of the evaluation set in ``kroneckerbert.reproduction.tasks.TASKS``.
        split: Split of that set.
        metric: One of the task's ``metrics``.
        teacher: The teacher's value.
        seeds: The student's values by seed.
        paper: The paper's values by model, where it reports any.
    """

    task: str
    split: str
    metric: str
    teacher: float
    seeds: Mapping[int, float]
    paper: Mapping[str, float]

    def __str__(self) -> str:
        """Mean ± standard deviation (minimum to maximum) over seeds."""
        values = list(self.seeds.values())
        if len(values) == 1:
            return f"{values[0]:.2f} (one seed)"
        spread = f"{min(values):.2f} to {max(values):.2f}"
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({spread})"


def machine() -> str:
    """The processor or GPU of this machine, without its host name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def model_card(
    model: KroneckerPreTrainedModel,
    *,
    name: str,
    dense_parameters: int,
    recipe: Mapping[str, Any],
    scores: Sequence[Score] = (),
    seed: int | None = None,
    latency: Mapping[str, Any] | None = None,
    vectors: Mapping[str, Mapping[str, float]] | None = None,
    core_hours: Mapping[str, float | None] | None = None,
) -> ModelCard:
    """A model card with the Hub's metadata, made without network access.

    Args:
        model: The student.
        name: Its name.
        dense_parameters: Number of parameters of its teacher, with the same head.
        recipe: See ``kroneckerbert.reproduction.recipe``. The card shows all of it, with paths
            reduced to their last part. Its ``card`` gives licence, language and data.
        scores: Rows of the table, in order.
        seed: The student's seed among those in ``scores``; the metadata has its scores.
        latency: As measured by ``reproduction.run``: ``machine``, ``threads``, ``tokens`` and, by
            batch size, ``milliseconds`` of ``teacher`` and ``student``.
        vectors: Of a sentence encoder: correlations on pairs of sentences, by model and set.
        core_hours: CPU time of the distillation, by stage.

    Returns:
        A card: ``str(card)`` is its text, ``card.save(path)`` writes it.
    """
    recipe = without_paths(recipe)
    about = recipe.get("card", {})
    teacher = recipe["teacher"]
    sizes = parameters(model), dense_parameters
    head = type(model).__name__.rpartition("For")[2]
    hub = [TASKS[score.task].hub["path"] for score in scores if score.task in TASKS]
    corpus = recipe.get("stage1", {}).get("corpus", {}).get("source", "")
    data = ModelCardData(
        model_name=name,
        base_model=teacher if _HUB_NAME.fullmatch(teacher) else None,
        datasets=list(dict.fromkeys(n for n in (corpus, *hub) if _HUB_NAME.fullmatch(n))) or None,
        library_name="transformers",
        pipeline_tag="sentence-similarity" if vectors else _PIPELINES.get(head),
        license=about.get("license"),
        language=about.get("language"),
        tags=["kronecker", "compression", "distillation"],
        eval_results=[
            _eval_result(score, score.seeds[seed])
            for score in scores
            if seed is not None and seed in score.seeds and score.task in TASKS
        ]
        or None,
    )
    sections = {
        f"# {name}": (
            f"A {type(model).__name__} with {sizes[0]:,} parameters, {sizes[1] / sizes[0]:.1f} "
            f"times fewer than the {sizes[1]:,} of its dense teacher, `{teacher}`. Its weights "
            f"are Kronecker products, after {_PAPER}.{_int8(model)}"
        ),
        "## Loading": _LOADING_VECTORS if vectors else _loading(head),
        "## Scores": _vector_scores(vectors) if vectors else _scores(scores, seed),
        "## Latency": _latency(latency),
        "## Shapes": _shapes(model),
        "## Limits": "\n".join(f"- {line}" for line in about.get("limits", ())),
        "## Data and licences": "\n".join(f"- {line}" for line in about.get("data", ())),
        "## Cost": _cost(core_hours or {}),
        "## Hyper-parameters": _hyper_parameters(recipe, {score.task for score in scores}),
        "## Recipe": f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        "## Versions": ", ".join(f"{name} {v}" for name in _PACKAGES if (v := _version(name))),
    }
    text = "\n\n".join(f"{heading}\n\n{body}" for heading, body in sections.items() if body)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def without_paths(value: Any) -> Any:
    """The value with every local path reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    is_path = isinstance(value, str) and (
        value.startswith(("/", "~", ".", "\\")) or value.count("/") > 1 or value[1:3] == ":\\"
    )
    if is_path and " " not in value and "://" not in value and not value.startswith("package:"):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _eval_result(score: Score, value: float) -> EvalResult:
    task = TASKS[score.task]
    return EvalResult(
        task_type="question-answering" if task.kind == "span" else "text-classification",
        dataset_type=task.hub["path"],
        dataset_name=score.task,
        dataset_config=task.hub.get("name"),
        dataset_split=task.splits[score.split],
        metric_type=_METRICS.get(score.metric, score.metric),
        metric_name=score.metric,
        metric_value=round(value, 4),
    )


def _int8(model: KroneckerPreTrainedModel) -> str:
    count = len(model.config.kronecker_int8)
    size = model_bytes(model) / 1e6
    return f" The large factors of {count} layers are int8: {size:.1f} MB." if count else ""


def _loading(head: str) -> str:
    auto = f"AutoModelFor{head}" if head in _PIPELINES or head == "PreTraining" else "AutoModel"
    return (
        "```sh\npip install 'kron-kernels[bert]'\n```\n\n"
        "```python\n"
        "import kroneckerbert  # registers the classes\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        "```"
    )


def _vector_scores(vectors: Mapping[str, Mapping[str, float]]) -> str:
    sets = list(next(iter(vectors.values())))
    rows = [[name, *(f"{scores[of]:.4f}" for of in sets)] for name, scores in vectors.items()]
    return (
        "Spearman correlation of the labels of pairs of sentences with the cosines of their "
        f"vectors; one seed.\n\n{_table(['model', *sets], rows)}"
    )


def _scores(scores: Sequence[Score], seed: int | None) -> str:
    if not scores:
        return ""
    published = list(dict.fromkeys(name for score in scores for name in score.paper))
    seeds = list(dict.fromkeys(n for score in scores for n in score.seeds))
    headings = ["set", "split", "metric", "teacher", *(f"seed {n}" for n in seeds), "all seeds"]
    headings += [f"paper's {name}" for name in published]
    rows = [
        [
            *(score.task, score.split, score.metric, f"{score.teacher:.2f}"),
            *(f"{score.seeds[n]:.2f}" if n in score.seeds else "" for n in seeds),
            str(score),
            *(f"{score.paper[name]:g}" if name in score.paper else "" for name in published),
        ]
        for score in scores
    ]
    return (
        f"In per cent; over seeds, mean ± standard deviation (minimum to maximum). This model has "
        f"seed {seed}. Seeds differ in stage 2 only: start, stage 1 and teacher are shared."
        f"\n\n{_table(headings, rows)}"
    )


def _latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return ""
    rows = []
    for batch, times in latency["milliseconds"].items():
        teacher, student = times["teacher"], times["student"]
        spans = [f"{t['median']:.2f} ({t['low']:.2f} to {t['high']:.2f})" for t in times.values()]
        rows.append([str(batch), *spans, f"{teacher['median'] / student['median']:.2f}"])
    return (
        f"Milliseconds per forward pass of {latency['tokens']} tokens, median and quartiles; "
        f"{latency['machine']}, {latency['threads']} CPU threads, {latency['dtype']}.\n\n"
        + _table(["batch", *times, "times faster"], rows)
    )


def _cost(core_hours: Mapping[str, float | None]) -> str:
    known = [f"{stage} {hours:.2f}" for stage, hours in core_hours.items() if hours is not None]
    return (
        f"Core-hours of training, without the cached outputs of the teacher: {', '.join(known)}."
        if known
        else ""
    )


def _shapes(model: KroneckerPreTrainedModel) -> str:
    """One row per entry of the configuration, with the shapes of the first module it matches."""
    shapes = model.config.kronecker_shapes()
    rows: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for path, terms in shapes.items():
        entry = model.config.entry_of(path) or path
        counts[entry] = counts.get(entry, 0) + 1
        factors = " + ".join(
            f"{f'{s.rank} of ' * (s.rank > 1)}{s.m1}x{s.n1} ⊗ {s.m2}x{s.n2}" for s in terms
        )
        s = terms[0]
        rows.setdefault(entry, [f"`{entry}`", f"{s.m1 * s.m2}x{s.n1 * s.n2}", factors])
    table = [[*row, str(counts[entry])] for entry, row in rows.items()]
    return _table(["layers", "weight", "A ⊗ B", "number"], table) + "\n\nEverything else is dense."


def _hyper_parameters(recipe: Mapping[str, Any], tasks: set[str]) -> str:
    """The settings of the stages, one row each."""
    stages = {"stage 1": recipe.get("stage1") or {}, "sentences": recipe.get("sentences") or {}}
    for task in [name for name in recipe.get("tasks", {}) if name in tasks]:
        own = recipe["tasks"][task] or {}
        for key, name in (("fine_tuning", "teacher"), ("stage2", "stage 2")):
            shared, special = recipe.get(key) or {}, own.get(key) or {}
            arguments = {**shared.get("arguments", {}), **special.get("arguments", {})}
            stages[f"{name}, {task}"] = {**shared, **special, "arguments": arguments}
    rows = []
    for name, stage in stages.items():
        plain = {k: v for k, v in stage.items() if k not in ("arguments", "corpus", "texts")}
        if given := {**plain, **stage.get("arguments", {})}:
            rows.append([name, ", ".join(f"{key} {value}" for key, value in given.items())])
    return _table(["stage", "settings other than defaults"], rows) if rows else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
