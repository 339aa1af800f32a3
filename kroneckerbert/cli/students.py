"""Commands of the ready students: students, embed, search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kroneckerbert.cli.shell import console, input_file, names, number, right

_BEST = "minilm-8x"
Student = Annotated[
    str, typer.Option(help="A student listed by 'students', or a sentence encoder's folder.")
]


def students() -> None:
    """List the trained students included in the package."""
    from kroneckerbert import students as ready

    rows = {name: ready.about(name) for name in ready.names()}
    if not rows:
        console.print("This installation has none. A recipe makes one: kroneckerbert recipes")
        return
    sets = list(dict.fromkeys(s for row in rows.values() for s in row["scores"]["int8"]))
    table = Table(
        names("student"),
        *map(right, ("parameters", "MB", *sets)),
        caption="Spearman correlation on pairs of sentences (share of the teacher's)",
    )
    for name, row in rows.items():
        cells = []
        for of in sets:
            ours, teachers = row["scores"]["int8"][of], row["scores"]["teacher"][of]
            cells.append(f"{ours:.3f} ({ours / teachers:.0%})")
        size = f"{row['bytes'] / 1e6:.1f}"
        table.add_row(name, f"{row['parameters']['student']:,}", size, *cells)
    console.print(table)
    console.print('Next: kroneckerbert search FILE "a query"', soft_wrap=True)


def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts, in quotation marks.")] = None,
    file: Annotated[Path | None, input_file("More texts, one per line; may be .gz.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the vectors here, as NumPy's .npy; printed if unset."),
    ] = None,
    student: Student = _BEST,
) -> None:
    """Turn texts into unit vectors: one JSON list of numbers per text, or a .npy file."""
    from kroneckerbert.data import read_lines
    from kroneckerbert.files import writable_file

    given = [*(texts or ()), *(read_lines(file) if file else ())]
    if not given:
        raise typer.BadParameter("give texts, or --file with one text per line.")
    if out is not None:
        if out.suffix != ".npy":
            raise typer.BadParameter(f"--out {out} must end in .npy.")
        writable_file(out, [file] if file else [])
    from kroneckerbert.students import load

    vectors = load(student).encode(given)
    if out is None:
        for row in vectors.tolist():
            print(json.dumps([round(value, 6) for value in row]))
        return
    import numpy as np

    unfinished = out.with_name(f".{out.name}")
    try:
        with unfinished.open("wb") as opened:
            np.save(opened, vectors.numpy())
        unfinished.replace(out)
    except OSError as error:  # a full disk's error does not name it
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {out}: {error.strerror or error}.") from error
    console.print(f"Saved {len(given):,} vectors to {out}.", soft_wrap=True)


def search(
    file: Annotated[Path, typer.Argument(help="Texts, one per line; may be .gz.", exists=True)],
    query: Annotated[str, typer.Argument(help="What to look for, in quotation marks.")],
    top: Annotated[int, number(int, "Texts to show.", 1)] = 5,
    student: Student = _BEST,
) -> None:
    """Show the lines of a file that are nearest in meaning to a query."""
    from kroneckerbert.cli.shell import regular
    from kroneckerbert.data import read_lines

    regular(file)
    texts = read_lines(file)
    from kroneckerbert.students import load

    found = load(student).search(query, texts, top)
    table = Table(right("cosine"), right("text"), names(query))
    for similarity, index in found:
        table.add_row(f"{similarity:.3f}", f"{index + 1:,}", texts[index])
    console.print(table)
