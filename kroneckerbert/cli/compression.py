"""Commands that compress a model, report on it and convert it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kroneckerbert.cli.shell import (
    Batch,
    Calibration,
    JsonFile,
    Threads,
    Tokens,
    choice,
    console,
    errors,
    input_file,
    names,
    number,
    right,
    write_text,
)
from kroneckerbert.cli.sources import (
    calibration_batches,
    calibration_texts,
    existing,
    on_gpu,
    read_model,
    save,
    use_threads,
)


def plan(
    teacher: Annotated[str, typer.Argument(help="The dense model.")],
    out: Annotated[Path, typer.Argument(help="File for the plan (JSON), for compress --plan.")],
    budget: Annotated[
        list[str],
        typer.Option(
            help="Limit on parameters, bytes, flops, latency (ms) or error (the layers' "
            "weighed mean relative squared error): a number (bytes=12e6), a factor below the "
            "teacher (latency=2x) or a share of it (parameters=12%). May be repeated; all are met.",
        ),
    ],
    objective: Annotated[
        str,
        choice(
            "What to minimise within the budget: error, size (parameters) or latency.",
            ("error", "size", "latency"),
        ),
    ] = "error",
    batch: Batch = 1,
    tokens: Tokens = 128,
    threads: Threads = None,
    calibration: Calibration = None,
    words: Annotated[bool, typer.Option(help="Allow factors for the word embeddings.")] = True,
    mix: Annotated[
        bool, typer.Option(help="Allow layers made of a Kronecker product plus a low-rank part.")
    ] = True,
) -> None:
    """Choose factor shapes layer by layer for a budget, measured on this machine."""
    from kron_kernels.plan.budget import check_arguments
    from kroneckerbert.files import writable_file
    from kroneckerbert.planning import plan as plan_model

    limits = _limits(budget)
    check_arguments(limits, objective)
    texts = calibration_texts(calibration)
    writable_file(out, existing(teacher, calibration))
    use_threads(threads)
    model = on_gpu(read_model(teacher))
    chosen = plan_model(
        model,
        limits,
        objective=objective,  # type: ignore[arg-type]  # a choice
        batch=batch,
        tokens=tokens,
        calibration=calibration_batches(texts, model, teacher),
        words=words,
        mix=mix,
        progress=errors.is_terminal,
    )
    console.print(str(chosen), soft_wrap=True)  # before saving, which may fail: a full disk
    chosen.save(out)
    console.print(f"Next: kroneckerbert compress {teacher} OUT --plan {out}", soft_wrap=True)


def compress(
    teacher: Annotated[str, typer.Argument(help="The dense model, with or without a head.")],
    out: Annotated[Path, typer.Argument(help="New folder for the compressed model.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="The paper's shapes: kronecker-bert-5, -8, -19 or -21, the number being how many "
            "times smaller than BERT_BASE. +low-rank-words, -attention, -feed-forward or +low-rank "
            "after it gives those parts low rank of equal size; kronecker-bert-8+low-rank-words if "
            "unset."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        input_file("A file written by 'plan', instead of a preset."),
    ] = None,
    calibration: Calibration = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Refit each layer, biases included, on the calibration text; takes minutes.",
        ),
    ] = False,
) -> None:
    """Replace a dense model's weights by the nearest Kronecker products, to be distilled next."""
    from kron_kernels.plan import Plan
    from kroneckerbert import compress as compress_model
    from kroneckerbert.files import writable_folder
    from kroneckerbert.loading import load_tokenizer
    from kroneckerbert.presets import RECOMMENDED

    if sequential and calibration is None:
        raise typer.BadParameter("--sequential refits on text: give --calibration TEXTS as well.")
    out = writable_folder(out)
    texts = calibration_texts(calibration)
    shapes = Plan.load(plan) if plan else preset or RECOMMENDED
    model, tokenizer = read_model(teacher), load_tokenizer(teacher)
    student: Any = compress_model(
        model,
        shapes,
        calibration=calibration_batches(texts, model, teacher),
        sequential=sequential,
        progress=errors.is_terminal,
    )
    save(out, student, tokenizer, teacher)

    table = Table(names("model"), *map(right, ("parameters", "smaller")))
    for name, size in ((teacher, model.num_parameters()), (str(out), student.num_parameters())):
        table.add_row(name, f"{size:,}", f"{model.num_parameters() / size:.1f}x")
    console.print(table)
    console.print(f"Next: kroneckerbert distill {teacher} {out} OUT --data TEXTS", soft_wrap=True)


def report(
    model: Annotated[str, typer.Argument(help="A compressed model.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="The dense model it was made from, to measure errors against."),
    ] = None,
    batch: Batch = 1,
    tokens: Tokens = 128,
    threads: Threads = None,
    calibration: Calibration = None,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw them to this .png, .svg or .pdf.", dir_okay=False)
    ] = None,
) -> None:
    """Measure each layer: shapes, parameters, FLOPs, time, and error against the dense layer."""
    from kroneckerbert.files import writable_file
    from kroneckerbert.measure import report as measured

    if calibration is not None and teacher is None:
        raise typer.BadParameter("--calibration measures errors; give --teacher as well.")
    texts = calibration_texts(calibration)
    inputs = existing(model, teacher, calibration)
    if picture is not None:
        import matplotlib  # noqa: F401  fail now rather than after the measurement

        if picture.suffix.lower() not in (endings := (".png", ".svg", ".pdf")):
            raise typer.BadParameter(
                f"--picture {picture} must end in one of {', '.join(endings)}."
            )
        if json_file is not None and picture.resolve() == json_file.resolve():
            raise typer.BadParameter(f"--json and --picture are both {picture}; give two files.")
        writable_file(picture, inputs)
    if json_file is not None:
        writable_file(json_file, inputs)
    use_threads(threads)
    compressed = on_gpu(read_model(model))
    dense = None if teacher is None else on_gpu(read_model(teacher))
    batches = calibration_batches(texts, compressed, model)
    result = measured(compressed, dense, batch=batch, tokens=tokens, calibration=batches)
    console.print(str(result), soft_wrap=True)  # before saving, which may fail: a full disk
    if json_file is not None:
        write_text(json_file, result.to_json())
    if picture is not None:
        result.plot(picture)


def quantize(
    model: Annotated[str, typer.Argument(help="A compressed model, or a dense one.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model with int8 weights.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer to leave in floating point: the end of its path, such as output.dense. "
            "May be repeated."
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        number(
            float,
            "Leave layers with a larger relative squared error in floating point: of their outputs "
            "on the calibration text, or of their weight without text.",
            above=True,
        ),
    ] = None,
    calibration: Calibration = None,
) -> None:
    """Write a model with int8 weights, for inference: a quarter of the size, faster on CPUs."""
    from kroneckerbert import quantize as quantize_model
    from kroneckerbert import rounding_errors
    from kroneckerbert.files import writable_folder
    from kroneckerbert.loading import load_tokenizer
    from kroneckerbert.measure import model_bytes

    out = writable_folder(out)
    texts = calibration_texts(calibration)
    floating, tokenizer = read_model(model), load_tokenizer(model)
    batches = calibration_batches(texts, floating, model)
    errors_found = rounding_errors(floating, batches)
    limited = {} if max_error is None else {"max_error": max_error, "calibration": batches}
    int8 = quantize_model(floating, keep=keep or [], **limited)
    save(out, int8, tokenizer, model)

    table = Table(names("layers with the largest errors"), *map(right, ("weight", "worst row")))
    table.add_column("output", justify="right")
    table.add_column("stored as")
    done = set(int8.config.kronecker_int8)
    for e in errors_found[:5]:
        output = "" if e.output_error is None else f"{e.output_error:.1e}"
        cells = f"{e.weight_error:.1e}", f"{e.row_error:.1e} (row {e.row})", output
        table.add_row(e.path, *cells, "int8" if e.path in done else "floating point")
    console.print(table)
    sizes = model_bytes(floating) / 1e6, model_bytes(int8) / 1e6
    console.print(
        f"{len(done)} layers in int8: {sizes[0]:.1f} MB became {sizes[1]:.1f} MB, in {out}.",
        soft_wrap=True,
    )


def decompress(
    model: Annotated[str, typer.Argument(help="A compressed model.")],
    out: Annotated[Path, typer.Argument(help="New folder for the dense model.")],
) -> None:
    """Write the equivalent stock dense model, for tools that support only that."""
    from kroneckerbert import decompress as decompress_model
    from kroneckerbert.files import writable_folder
    from kroneckerbert.loading import load_tokenizer

    out = writable_folder(out)
    tokenizer, dense = load_tokenizer(model), decompress_model(read_model(model))
    save(out, dense, tokenizer, model)
    console.print(f"Saved a {type(dense).__name__} to {out}.", soft_wrap=True)


def export(
    model: Annotated[str, typer.Argument(help="A model, compressed or dense.")],
    out: Annotated[Path, typer.Argument(help="New folder for the program.")],
    format: Annotated[
        str,
        choice(
            "onnx, openvino, torch_export, aoti (compiled for this machine), or native (the "
            "encoder without its head, for C++).",
            ("onnx", "openvino", "torch_export", "aoti", "native"),
        ),
    ] = "onnx",
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Weights and products in 8 bits, for onnx; differences are reported, not checked.",
        ),
    ] = False,
    static: Annotated[
        bool,
        typer.Option("--static", help="Fix the input shape: 2 sequences of 24 tokens each."),
    ] = False,
    tolerance: Annotated[
        float | None,
        number(
            float,
            "Largest accepted difference from PyTorch, relative to the largest output; 1.2e-4 "
            "if unset.",
            above=True,
        ),
    ] = None,
) -> None:
    """Write a program that runs without this package, checked against PyTorch."""
    from kroneckerbert.files import writable_folder
    from kroneckerbert.loading import load_tokenizer

    out = writable_folder(out)
    if format == "native":
        from kroneckerbert.encoder_file import save_encoder

        if int8 or static or tolerance is not None:
            raise typer.BadParameter(
                "--format native has one form: leave out --int8, --static and --tolerance."
            )
        file = save_encoder(read_model(model), out, tokenizer=load_tokenizer(model))
        console.print(f"Saved the encoder to {file}.", soft_wrap=True)
        return
    from kroneckerbert.exporting import export as export_model

    result = export_model(
        read_model(model),
        out,
        format=format,  # type: ignore[arg-type]  # a choice
        dynamic=not static,
        quantize="int8-dynamic" if int8 else None,
        tolerance=tolerance,
        tokenizer=load_tokenizer(model),
    )
    console.print(str(result), soft_wrap=True)


def _limits(texts: list[str]) -> dict[str, float | str]:
    """``["latency=2x", "bytes=12e6"]`` as ``{"latency": "2x", "bytes": 12e6}``."""
    limits: dict[str, float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"--budget {text!r} must be a quantity and its limit, such as latency=2x."
            )
        if key in limits:
            raise typer.BadParameter(
                f"--budget has two limits of {key!r}, {limits[key]} and {value}."
            )
        try:
            limits[key] = float(value)
        except ValueError:
            limits[key] = value
    return limits
