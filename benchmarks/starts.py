"""How far a student gets without training: Van Loan, data-aware, SVD and mixed starts, equal size.

A teacher is a folder with a sentence encoder and its tokenizer; the folder of data has STS-B,
SST-2, TREC and plain text as tab-separated and text files (their names are below). Each linear
layer of the encoder is replaced by factors with 1/c of its parameters (Kronecker factors may have
32 numbers more, low-rank ones up to a rank's fewer); the embeddings stay. Then:

output     relative squared error of the last hidden states on held-out text, against the teacher's
STS-B      Spearman correlation of the cosine similarities with the scores of test pairs
SST-2      test accuracy of a linear head on the frozen mean-pooled embeddings, and
TREC       the same for six classes of questions

A row that the results already have, from as much data, is not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as Shown
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

from benchmarks import machine
from kroneckerbert import compress, embed, plan
from kroneckerbert.configuration_kroneckerbert import layout_of
from kroneckerbert.data import Table, TextDataset, read_lines, read_table

RATIOS = (4, 8, 16)
# Rows of data; a calibration excerpt has 60 words, and as many excerpts are held out.
ROWS = {"excerpts": 240, "pairs": 1379, "head_rows": 2000, "test_rows": 2000}
EXCERPT_WORDS = 60
METRICS = ("output", "STS-B", "SST-2", "TREC")
Batches = list[dict[str, Tensor]]


def run(path: Path, threads: int, effort: float, teachers: dict[str, str], data: Path) -> None:
    rows = {name: int(effort * count) for name, count in ROWS.items()}
    earlier = machine.read(path)["rows"] if path.exists() else []
    done = [key(row) for row in earlier if rows.items() <= row.items()]
    with machine.recording(path, threads, earlier) as record:
        for name, folder in teachers.items():
            model = AutoModel.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            known, held_out = calibration(tokenizer, data, rows["excerpts"])
            tasks = Tasks(tokenizer, held_out, model, data, rows)
            todo: list[tuple[int, str, Callable]] = [(1, "teacher", lambda model=model: model)]
            todo += [(r, s, make) for r in RATIOS for s, make in starts(model, r, known).items()]
            for ratio, start, make in todo:
                row = {"teacher": name, "ratio": ratio, "start": start}
                if key(row) in done:
                    continue
                machine.progress(f"starts: {name}, {ratio}x, {start}")
                begin = time.perf_counter()
                student = make()
                row |= {"seconds": time.perf_counter() - begin}
                row |= {"kept": linears(student) / linears(model)}
                record.rows = [other for other in record.rows if key(other) != key(row)]
                record.add(row | tasks.scores(student) | rows)


def key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["teacher"], row["ratio"], row["start"]


def starts(model: PreTrainedModel, ratio: int, known: Batches) -> dict[str, Callable]:
    """By name, functions that make a student with 1/ratio of the linear layers' parameters."""
    data = {"calibration": known}
    step = data | {"sequential": True}
    product, low_rank = kronecker(model, ratio), svd(model, ratio)
    # Half the parameters for a product, half for a low-rank part.
    both = {p: [kronecker(model, 2 * ratio)[p], svd(model, 2 * ratio)[p]] for p in product}

    def planned() -> PreTrainedModel:
        rest = sum(p.numel() for p in model.parameters()) - linears(model)
        budget = {"parameters": int(linears(model) / ratio + rest)}
        options = data | {"words": False, "keep_dense_if_slower": False}
        return compress(model, plan(model, budget, **options), **step)

    return {
        "Van Loan": partial(compress, model, product),
        "Kronecker, data-aware": partial(compress, model, product, **data),
        "Kronecker, sequential": partial(compress, model, product, **step),
        "SVD": partial(compress, model, low_rank),
        "SVD, data-aware": partial(compress, model, low_rank, **data),
        "SVD, sequential": partial(compress, model, low_rank, **step),
        "Kronecker + SVD, sequential": partial(compress, model, both, **step),
        "planned, sequential": planned,
    }


def kronecker(model: PreTrainedModel, ratio: int) -> dict[str, dict]:
    """One term, the small factor on the left and as square as the ratio allows."""
    small = {4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (8, 4)}[ratio]
    return {
        path: {"a_shape": list(small if rows >= columns else small[::-1]), "rank": 1}
        for path, (rows, columns) in sizes(model).items()
    }


def svd(model: PreTrainedModel, ratio: int) -> dict[str, dict]:
    """As many terms as 1/ratio of the parameters allows."""
    return {
        path: {"a_shape": [rows, 1], "rank": rows * columns // ratio // (rows + columns)}
        for path, (rows, columns) in sizes(model).items()
    }


def sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    layout = layout_of(model)
    return {path: size for path, size in layout.sizes.items() if path != layout.table}


def linears(model: PreTrainedModel) -> int:
    """Parameters of the encoder's linear layers, dense or factorised, without biases."""
    dense = sum(rows * columns for rows, columns in sizes(model).values())
    if not hasattr(model.config, "kronecker_factors"):
        return dense
    shapes = model.config.kronecker_shapes().values()
    return dense + sum(s.parameters for terms in shapes for s in terms)


class Tasks:
    """The measurements of one student."""

    def __init__(
        self, tokenizer: Any, held_out: Batches, teacher: nn.Module, data: Path, rows: dict
    ) -> None:
        self.tokenizer, self.held_out = tokenizer, held_out
        self.target = [hidden(teacher, batch) for batch in held_out]
        self.pairs = spread(read_table(data / "stsb_test.tsv.gz"), rows["pairs"])
        self.tasks = {
            name: (
                spread(read_table(data / f"{file}_train.tsv.gz"), rows["head_rows"]),
                spread(read_table(data / f"{file}_test.tsv.gz"), rows["test_rows"]),
            )
            for name, file in (("SST-2", "sst2"), ("TREC", "trec"))
        }

    def scores(self, model: nn.Module) -> dict[str, float]:
        wrong = whole = 0.0
        for batch, target in zip(self.held_out, self.target, strict=True):
            wrong += (hidden(model, batch) - target).square().sum().item()
            whole += target.square().sum().item()
        first, second = (
            embed(model, self.tokenizer, t) for t in (self.pairs.texts, self.pairs.texts_b)
        )
        labels = torch.tensor(self.pairs.labels).float()
        correlation = spearman_corrcoef((first * second).sum(-1), labels).item()
        row = {"output": wrong / whole, "STS-B": correlation}
        for name, tables in self.tasks.items():
            row[name] = accuracy(*(self._features(model, table) for table in tables))
        return row

    def _features(self, model: nn.Module, table: Table) -> tuple[Tensor, Tensor]:
        words = sorted(set(table.labels))
        labels = torch.tensor([words.index(label) for label in table.labels])
        return embed(model, self.tokenizer, table.texts), labels


def accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Of a linear head: softmax regression to convergence, the ridge chosen on a fifth."""
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    fifth = torch.arange(len(x)) % 5 == 0

    def fit(x: Tensor, y: Tensor, ridge: float) -> nn.Linear:
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(layer(x), y) + ridge * layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return layer

    def correct(layer: nn.Linear, x: Tensor, y: Tensor) -> float:
        return (layer(x).argmax(-1) == y).float().mean().item()

    ridges = (1e-4, 1e-3, 1e-2)
    best = max(ridges, key=lambda r: correct(fit(x[~fifth], y[~fifth], r), x[fifth], y[fifth]))
    return correct(fit(x, y, best), x_test, y_test)


def calibration(tokenizer: Any, data: Path, excerpts: int) -> tuple[Batches, Batches]:
    """Batches to calibrate on, and held-out ones: the first words of every 37th paragraph."""
    lines = read_lines(data / "wikipedia_squad_train.txt.gz")[::37]
    texts = [" ".join(line.split()[:EXCERPT_WORDS]) for line in lines][: 2 * excerpts]
    collate = DataCollatorWithPadding(tokenizer)
    dataset = TextDataset(tokenizer, texts, max_length=128)
    rows = [dataset[i] for i in range(len(dataset))]
    known, held_out = (
        [dict(collate(part[i : i + 16])) for i in range(0, len(part), 16)]
        for part in (rows[::2], rows[1::2])
    )
    return known, held_out


@torch.no_grad()
def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def spread(table: Table, rows: int) -> Table:
    """Rows spread evenly over the table."""
    rows = min(rows, len(table))
    chosen = [i * len(table) // rows for i in range(rows)]
    columns = (table.labels, table.texts, table.texts_b)
    return type(table)(*(None if c is None else [c[i] for i in chosen] for c in columns))


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table."""
    body = [
        [row["teacher"], str(row["ratio"]), row["start"], *(f"{row[m]:.3f}" for m in METRICS)]
        for row in results["rows"]
    ]
    return ["teacher", "c", "start", "output error", *METRICS[1:]], body


def tables(results: dict[str, Any]) -> list[Shown]:
    title = "encoder linears c times smaller, no training"
    return [machine.filled(title, *summary(results), left=("teacher", "start"))]
