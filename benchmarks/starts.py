"""How far a student gets without training: Van Loan, data-aware, SVD and mixed starts, equal size.

    python benchmarks/starts.py NAME=FOLDER … --data DIR [--json benchmarks/results/starts.json]
    python benchmarks/starts.py --table benchmarks/results/starts.json

A teacher is a folder with a sentence encoder and its tokenizer; the data directory has STS-B,
SST-2, TREC and plain text as tab-separated and text files (their names are below). All linear
layers of the encoder are replaced, each by factors of 1/c of its parameters (Kronecker ones of up
to 32 numbers more, low-rank ones of less than a rank's fewer); the embeddings stay. Then:

output     relative squared error of the last hidden states on held-out text, against the teacher's
STS-B      Spearman correlation of the cosine similarities with the scores of test pairs
SST-2      test accuracy of a linear head on the frozen mean-pooled embeddings, and
TREC       the same for six classes of questions
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from kroneckerbert import compress, embed, plan
from kroneckerbert.configuration_kroneckerbert import layout_of
from kroneckerbert.data import TextDataset, read_lines, read_table

RATIOS = (4, 8, 16)
EXCERPTS, EXCERPT_WORDS = 240, 60  # calibration text; as much again is held out
PAIRS, HEAD_ROWS, TEST_ROWS = 1379, 2000, 2000  # STS-B pairs; rows to train and test heads on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teachers", nargs="*", help="NAME=FOLDER")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/starts.json"))
    parser.add_argument("--table", type=Path, help="print the table of these results, and end")
    parser.add_argument("--starts", nargs="+", help="only these, by name")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--head-rows", type=int, default=HEAD_ROWS)
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS)
    parser.add_argument("--excerpts", type=int, default=EXCERPTS)
    args = parser.parse_args()
    if args.table:
        print_table(json.loads(args.table.read_text()))
        return
    results = json.loads(args.json.read_text()) if args.json.exists() else []
    for name, folder in (teacher.split("=", 1) for teacher in args.teachers):
        model = AutoModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        known, held_out = calibration(tokenizer, args.data, args.excerpts)
        tasks = Tasks(tokenizer, held_out, model, args)

        def record(ratio, start, student, seconds, name=name, tasks=tasks, model=model):
            row = {"teacher": name, "ratio": ratio, "start": start, "seconds": seconds}
            row |= {"kept": linears(student) / linears(model)} | tasks(student)
            row |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
            row |= {"machine": platform.machine(), "excerpts": args.excerpts}
            row |= {"pairs": args.pairs, "head_rows": args.head_rows, "test_rows": args.test_rows}
            same = (name, ratio, start)
            results[:] = [r for r in results if (r["teacher"], r["ratio"], r["start"]) != same]
            results.append(row)
            args.json.write_text(json.dumps(results, indent=1) + "\n")  # a long run may be cut off
            print(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )

        record(1, "teacher", model, 0.0)
        for ratio in args.ratios:
            for start, how in starts(model, ratio, known).items():
                if args.starts and start not in args.starts:
                    continue
                begin = time.perf_counter()
                student = how()
                record(ratio, start, student, time.perf_counter() - begin)
    print_table(results)


def starts(model: nn.Module, ratio: int, known: list) -> dict:
    """By name, functions that make a student of 1/ratio of the linear layers' parameters."""
    data = {"calibration": known}
    step = data | {"sequential": True}
    product, low_rank = kronecker(model, ratio), svd(model, ratio)
    # Half the parameters for a product, half for a low-rank part.
    both = {p: [kronecker(model, 2 * ratio)[p], svd(model, 2 * ratio)[p]] for p in product}

    def planned():
        kept = linears(model) / ratio
        rest = sum(p.numel() for p in model.parameters()) - linears(model)
        chosen = plan(
            model,
            {"parameters": int(kept + rest)},
            calibration=known,
            words=False,
            keep_dense_if_slower=False,
        )
        return compress(model, chosen, **step)

    return {
        "Van Loan": lambda: compress(model, product),
        "Kronecker, data-aware": lambda: compress(model, product, **data),
        "Kronecker, sequential": lambda: compress(model, product, **step),
        "SVD": lambda: compress(model, low_rank),
        "SVD, data-aware": lambda: compress(model, low_rank, **data),
        "SVD, sequential": lambda: compress(model, low_rank, **step),
        "Kronecker + SVD, sequential": lambda: compress(model, both, **step),
        "planned, sequential": planned,
    }


def kronecker(model: nn.Module, ratio: int) -> dict:
    """One term, the small factor on the left and as square as the ratio allows."""
    small = {4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (8, 4)}[ratio]
    return {
        path: {"a_shape": list(small if rows >= columns else small[::-1]), "rank": 1}
        for path, (rows, columns) in sizes(model).items()
    }


def svd(model: nn.Module, ratio: int) -> dict:
    """As many terms as 1/ratio of the parameters allows."""
    return {
        path: {"a_shape": [rows, 1], "rank": rows * columns // ratio // (rows + columns)}
        for path, (rows, columns) in sizes(model).items()
    }


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    layout = layout_of(model)
    return {path: size for path, size in layout.sizes.items() if path != layout.table}


def linears(model: nn.Module) -> int:
    """Parameters of the encoder's linear layers, without biases, whatever form they have."""
    dense = sum(rows * columns for rows, columns in sizes(model).values())
    if hasattr(model.config, "kronecker_factors"):
        shapes = model.config.kronecker_shapes().values()
        return dense + sum(s.parameters for terms in shapes for s in terms)
    return dense


class Tasks:
    """The measurements of one student."""

    def __init__(self, tokenizer, held_out: list, teacher: nn.Module, args: argparse.Namespace):
        self.tokenizer, self.held_out = tokenizer, held_out
        self.target = [hidden(teacher, batch) for batch in held_out]
        data = args.data
        self.pairs = spread(read_table(data / "stsb_test.tsv.gz"), args.pairs)
        self.tasks = {
            name: (
                spread(read_table(data / f"{file}_train.tsv.gz"), args.head_rows),
                spread(read_table(data / f"{file}_test.tsv.gz"), args.test_rows),
            )
            for name, file in (("SST-2", "sst2"), ("TREC", "trec"))
        }

    def __call__(self, model: nn.Module) -> dict[str, float]:
        wrong = whole = 0.0
        for batch, target in zip(self.held_out, self.target, strict=True):
            wrong += (hidden(model, batch) - target).square().sum().item()
            whole += target.square().sum().item()
        first, second = (
            embed(model, self.tokenizer, t) for t in (self.pairs.texts, self.pairs.texts_b)
        )
        scores = torch.tensor(self.pairs.labels).float()
        row = {
            "output": wrong / whole,
            "STS-B": spearman_corrcoef((first * second).sum(-1), scores).item(),
        }
        for name, (train, test) in self.tasks.items():
            row[name] = accuracy(*(self._features(model, table) for table in (train, test)))
        return row

    def _features(self, model: nn.Module, table) -> tuple[torch.Tensor, torch.Tensor]:
        words = sorted(set(table.labels))
        labels = torch.tensor([words.index(label) for label in table.labels])
        return embed(model, self.tokenizer, table.texts), labels


def accuracy(train: tuple, test: tuple) -> float:
    """Of a linear head: softmax regression to convergence, the ridge chosen on a fifth."""
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    fifth = torch.arange(len(x)) % 5 == 0

    def fit(x, y, ridge):
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def loss():
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(layer(x), y) + ridge * layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return layer

    def right(layer, x, y):
        return (layer(x).argmax(-1) == y).float().mean().item()

    ridges = (1e-4, 1e-3, 1e-2)
    best = max(ridges, key=lambda r: right(fit(x[~fifth], y[~fifth], r), x[fifth], y[fifth]))
    return right(fit(x, y, best), x_test, y_test)


def calibration(tokenizer, data: Path, excerpts: int) -> tuple[list, list]:
    """Batches to calibrate on, and others: every 37th paragraph's first words."""
    lines = read_lines(data / "wikipedia_squad_train.txt.gz")[::37]
    texts = [" ".join(line.split()[:EXCERPT_WORDS]) for line in lines][: 2 * excerpts]
    collate = DataCollatorWithPadding(tokenizer)
    dataset = TextDataset(tokenizer, texts, max_length=128)
    rows = [dataset[i] for i in range(len(dataset))]
    known, held_out = rows[::2], rows[1::2]
    return tuple(
        [dict(collate(part[i : i + 16])) for i in range(0, len(part), 16)]
        for part in (known, held_out)
    )


@torch.no_grad()
def hidden(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def spread(table, rows: int):
    """Rows spread evenly over the table."""
    rows = min(rows, len(table))
    chosen = [i * len(table) // rows for i in range(rows)]
    columns = (table.labels, table.texts, table.texts_b)
    return type(table)(*(None if c is None else [c[i] for i in chosen] for c in columns))


def print_table(results: list[dict]) -> None:
    console = Console(width=120)
    for teacher in dict.fromkeys(row["teacher"] for row in results):
        rows = [row for row in results if row["teacher"] == teacher]
        table = Table(title=f"{teacher}: encoder linears c times smaller, no training")
        for heading in ("c", "start", "kept", "output error", "STS-B", "SST-2", "TREC"):
            table.add_column(heading, justify="left" if heading == "start" else "right")
        before = None
        for row in rows:
            if row["ratio"] != before:
                table.add_section()
            before = row["ratio"]
            cells = (f"{row[key]:.3f}" for key in ("output", "STS-B", "SST-2", "TREC"))
            table.add_row(str(row["ratio"]), row["start"], f"{row['kept']:.4f}", *cells)
        console.print(table)


if __name__ == "__main__":
    main()
