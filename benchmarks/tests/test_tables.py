"""The tables of README and docs show the numbers of the committed results."""

import re
from collections import defaultdict
from statistics import geometric_mean

from benchmarks import layers, markdown, memory, students, training
from benchmarks.machine import DENSE, RESULTS, read

ROOT = RESULTS.parents[1]
PAGE = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
PAGES = ("students", "study", "kroneckerbert", "distillation")  # with tables, beside PAGE
PROSE = " ".join(PAGE.split())


def results(name: str) -> dict:
    return read(RESULTS / f"{name}.json")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def tables(page: str) -> list[list[list[str]]]:
    """Each table as its lines after the heading, each line as its cells."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.M)
    return [[cells(line) for line in text.splitlines()[2:]] for text in found]


def rows_after_label() -> set[tuple[str, ...]]:
    return {tuple(row[1:]) for table in tables(PAGE) for row in table}


def test_layers():
    shown = defaultdict(list)
    for row in layers.rows_of(results("layers"), "presets", "feed_forward"):
        best = row.families().get("torch")
        in_brackets = f" ({row.speed('dense', best):.1f})" if best else ""
        shown[row.cell.layers].append(f"{row.speed('dense'):.1f}{in_brackets}")
    assert len(shown) == 8
    blocks = [f"{size} feed-forward block in one call" for size in ("8x", "21x")]
    table = {row[0]: row[2:] for table in tables(PAGE) for row in table}
    for shapes, entries in shown.items():
        product = f"({shapes.replace(' ', ' ⊗ ')})"
        label = next((label for label in table if label.endswith(product)), None)
        assert table[label or blocks.pop(0)] == entries, shapes


def test_low_rank_of_equal_size():
    speeds = {"auto": defaultdict(list), "low rank": defaultdict(list)}
    for row in layers.rows_of(results("layers"), "equal_size"):
        for name, by_tokens in speeds.items():
            by_tokens[row.cell.tokens].append(row.speed("dense", name))
    for by_tokens in speeds.values():
        means = (f"{geometric_mean(values):.1f}" for values in by_tokens.values())
        assert tuple(means) in rows_after_label()


def test_whole_models():
    made = markdown.tables(RESULTS) + markdown.tables(RESULTS / "avx2")
    others = (ROOT / f"docs/{page}.md" for page in PAGES)
    pages = PAGE + "".join(page.read_text(encoding="utf-8") for page in others)
    assert made and all(table in pages for table in made), "\n".join(made)


def training_memory(batch: int) -> dict:
    rows = memory.rows_of(results("memory"), memory.TRAINING)
    return next(row["mb"] for row in rows if row["batch"] == batch)


def test_training():
    steps = results("training")["rows"]
    peak = training_memory(8)
    for name in training.CONTENDERS:
        times = [(row["ms"][name][0], row["ms"][DENSE][0]) for row in steps]
        entries = [f"{ms:.0f} ms ({dense / ms:.1f})" for ms, dense in times]
        less = peak[DENSE]["peak"] / peak[name]["peak"]
        entries.append(f"{peak[name]['peak']} MB ({less:.1f})")
        assert tuple(entries) in rows_after_label()


def test_memory_where_activations_are_most():
    peak = training_memory(32)
    dense, checkpointed, eight, twenty_one = (
        peak[name]["peak"] for name in (DENSE, "dense, checkpointing", "8x", "21x")
    )
    assert f"{eight} and {twenty_one} MB against {dense}, and {checkpointed} for dense" in PROSE


def test_other_libraries():
    rows = layers.rows_of(results("layers"), "forward")
    means = {name: f"{mean:.1f}x" for name, mean in layers.mean_speeds(rows).items()}
    means["torch"] = f"{geometric_mean(row.speed(row.families()['torch']) for row in rows):.2f}x"
    means["einsum"] = f"{geometric_mean(row.speed('torch: einsum') for row in rows):.1f}x"
    labels = {
        "dense": "dense `F.linear`",
        "einsum": "`torch.einsum`",
        "torch": "the fastest of ten PyTorch lines",
        "cola": "CoLA",
        "lycoris": "LyCORIS",
        "linear_operator": "linear_operator",
        "fastkron": "FastKron",
        "kron": "forming the product",
    }
    assert means.keys() == labels.keys()
    table = next(t for t in tables(PAGE) if t[0][0] == "**kron_kernels**")
    for name, label in labels.items():
        (speed,) = (row[1] for row in table if row[0].startswith(label))
        assert speed == means[name], label

    over = [(row.cell.tokens, row.speed(row.best_other)) for row in rows]
    mean, from_128 = (geometric_mean(s for t, s in over if t >= least) for least in (1, 128))
    slower = [tokens for tokens, speed in over if speed < 1 / 1.1]
    assert f"over {len(over)} cells" in PROSE
    assert f"{mean:.2f} times faster ({from_128:.2f} from 128 tokens on)" in PROSE
    counts = ", ".join(
        f"{slower.count(t)} of {t} token{'s' * (t > 1)}" for t in sorted(set(slower))
    )
    assert f"slower in {len(slower)} cells: {counts}." in PROSE


def within(part: list[str], whole: list[str]) -> bool:
    """Whether `part` can be made by leaving cells out."""
    rest = iter(whole)
    return all(cell in rest for cell in part)


def test_the_readme_has_rows_of_the_documentation():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = [
        row
        for table in tables(readme)
        for row in table
        if any(re.search(r"\d \(\d+\.\d\)$", cell) for cell in row)
    ]
    known = [row for table in tables(PAGE) for row in table]
    assert measured and all(any(within(row[1:], other[1:]) for other in known) for row in measured)


def test_the_readme_has_the_ready_students():
    shown = tables((ROOT / "README.md").read_text(encoding="utf-8"))
    rows = [tuple(row[1:]) for table in shown for row in table]
    heads, body = students.encoders(results("students"))
    columns = [heads.index(head) for head in ("MB", "STS-B", "texts/s")]
    for row in body:
        assert tuple(row[i].partition(" ")[0] for i in columns) in rows, row[0]
