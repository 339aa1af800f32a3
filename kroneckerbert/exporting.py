"""Models for other runtimes: ONNX Runtime, OpenVINO, torch.export and AOTInductor, each verified.

The graphs are those of ``transformers.exporters``. They hold stock operators only: a product by
factors is exported in the form that plain PyTorch computes it in, so that what runs the export
needs neither of this project's packages.
"""

from __future__ import annotations

import difflib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, PreTrainedTokenizerBase

try:
    from transformers.exporters import (
        DynamoExporter,
        ExportedModel,
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
        register_backend,
    )
    from transformers.exporters.auto import EXPORT_BACKENDS, get_exporter_class
    from transformers.exporters.runners.runner_dynamo import DynamoModelRunner
except ImportError as error:
    raise ImportError(
        f"exporting needs transformers.exporters as of transformers 5.23 ({error}): "
        "pip install -U 'transformers>=5.23'"
    ) from error

from kron_kernels.modules import evaluating
from kron_kernels.shapes import check_number
from kroneckerbert.files import CHECKSUMS, damaged, read_json, replace_folder, write_checksums

Format = Literal["onnx", "openvino", "torch_export", "aoti"]

# What transformers calls a format, where it has another name; and the packages that write and run
# one, all brought by the extra of the format's name.
_BACKENDS = {"torch_export": "dynamo"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
_RUN_CODE = {"dynamo": "torch_export", "aoti": "aoti"}  # when they are loaded: pickles, a library

# In units of float32's rounding, relative to an output's largest entry. Two orders of summation
# drift apart like a random walk: by √(n d) roundings after d sums of n terms, 500 for BERT_BASE
# (d = 84 products of mostly 768 to 3072 terms). This is twice that.
_ROUNDINGS = 2**10


@dataclass(frozen=True)
class Difference:
    """How far an output of the export is from PyTorch's, over all inputs that were tried.

    Attributes:
        worst: The largest absolute difference of two entries.
        scale: The largest absolute entry of PyTorch's output.
        cosine: The least cosine similarity of the outputs for one input, flattened.
    """

    worst: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how near it is to the model.

    Attributes:
        folder: Where it is, for ``load_exported``.
        format: As asked for.
        quantize: As asked for.
        bytes: Size of graph and weights.
        shapes: The inputs that were tried, ``(batch, tokens)``.
        differences: By the output's name.
    """

    folder: Path
    format: Format
    quantize: str | None
    bytes: int
    shapes: list[tuple[int, int]]
    differences: dict[str, Difference]

    def __str__(self) -> str:
        kind = self.format if self.quantize is None else f"{self.format}, {self.quantize}"
        shapes = ", ".join(f"{batch}x{tokens}" for batch, tokens in self.shapes)
        lines = [
            f"{self.folder}: {kind}, {self.bytes / 1e6:.2f} MB",
            f"run against PyTorch on batches of {shapes} tokens, with padding:",
        ]
        lines += [
            f"  {name}: at most {d.worst:.2g} apart, of entries up to {d.scale:.3g}"
            + f"; cosine similarity {d.cosine:.6f}" * (self.quantize is not None)
            for name, d in self.differences.items()
        ]
        return "\n".join(lines)


class AotiExporter(DynamoExporter):
    """Machine code for the model's device by AOTInductor, in the manner of transformers' own."""

    export_format = "aoti"

    @classmethod
    def save_program(cls, program: torch.export.ExportedProgram, path: str | Path) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        return torch._inductor.aoti_load_package(str(path))


class AotiRunner(DynamoModelRunner):
    """Runs a loaded package, which is bound to its device."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.metadata.export_device)

    @classmethod
    def from_program(cls, program: Any, metadata: Any, device: Any = None) -> AotiRunner:
        return cls(program, metadata)


if AotiExporter.export_format not in EXPORT_BACKENDS:
    register_backend(AotiExporter, AotiRunner)


def export(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    format: Format = "onnx",
    sample: Mapping[str, Tensor] | None = None,
    dynamic: bool = True,
    quantize: Literal["int8-dynamic"] | None = None,
    tolerance: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ExportResult:
    """Write a model for another runtime, and verify that it computes there what it does here.

    The new folder holds the program (``model.onnx`` and its weights ``model.onnx.data``,
    ``openvino_model.xml`` and ``.bin``, or ``model.pt2``), ``config.json`` and ``export.json``;
    ``load_exported`` runs it, and so does the bare runtime. A decoder is exported without its
    cache: it computes all logits of a sequence, for scoring, and generates slowly.

    Each time the folder's program is loaded and run on three batches: of the sample's size, of one
    sequence half as long, and of one more sequence than the sample; each with padding. Only then
    the folder takes its name; an error or an interruption leaves what was there.

    Args:
        model: Any model of transformers, dense or factorised, with any head; left as it is.
            Exported in evaluation mode.
        path: New folder, or one that an earlier call wrote.
        format: ``"onnx"`` runs in ONNX Runtime, ``"openvino"`` in OpenVINO, ``"torch_export"`` is a
            program for PyTorch, ``"aoti"`` machine code for the model's device by AOTInductor (it
            takes a C++ compiler and a minute or more).
        sample: Model inputs as a tokenizer returns them, each ``(batch, tokens)``, whose names
            become the graph's; random ids unless given.
        dynamic: Take any batch and any number of tokens, instead of the sample's alone.
        quantize: ``"int8-dynamic"``, for ONNX: weights in 8 bits, activations rounded to 8 bits at
            run time. The differences are then reported, not judged.
        tolerance: Largest accepted difference, as a part of the output's largest entry. The default
            is for float32: 1.2e-4, twice what the order of summation may do to a network of
            BERT_BASE's size.
        tokenizer: Saved in the same folder.

    Raises:
        ImportError: If a package is missing or too old, with the command that installs it.
        TypeError: If ``model`` is no ``PreTrainedModel``.
        ValueError: If an argument is out of range, or the export computes something else.
        FileExistsError: If ``path`` is not empty and was not written by this project.
    """
    if format not in get_args(Format):
        raise ValueError(f"format = {format!r} must be one of {', '.join(get_args(Format))}.")
    _check_packages(format)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"cannot export a {type(model).__name__}, only a PreTrainedModel; of a model with "
            "adapters, export what its merge_and_unload() returns."
        )
    if quantize not in (None, "int8-dynamic"):
        raise ValueError(f"quantize = {quantize!r} must be None or 'int8-dynamic'.")
    if quantize is not None and format != "onnx":
        raise ValueError(
            f"quantize = {quantize!r} is done by ONNX Runtime: use format='onnx', not {format!r}."
        )
    if tolerance is None:
        if model.dtype != torch.float32 and quantize is None:
            raise ValueError(
                f"the model is in {model.dtype}, where runtimes round in different places: export "
                "model.float(), or pass the tolerance that you accept."
            )
        tolerance = _ROUNDINGS * torch.finfo(torch.float32).eps
    tolerance = check_number("tolerance", tolerance)

    sample = _sample(model) if sample is None else _checked(sample, model)
    batch, tokens = _shape(sample)
    traced, *others = [sample]
    if dynamic:
        # Sizes 0 and 1 are special to torch.export, which would make constants of them.
        traced = _resized(sample, max(batch, 2), max(tokens - 1, 2))
        others = [_resized(sample, 1, max(tokens // 2, 1)), _resized(sample, batch + 1, tokens)]
    inputs = [_padded(x) for x in (sample, *others)]

    with evaluating(model), replace_folder(Path(path)) as folder:
        with _quiet():
            exported = _exported(model, traced, format, dynamic)
            if quantize is not None:
                _quantize(exported, traced)
            exported.save_pretrained(folder)
        size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".json")
        differences = _differences(model, folder, inputs)
        if quantize is None:
            _judge(differences, tolerance, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_checksums(folder)
    shapes = [_shape(x) for x in inputs]
    return ExportResult(Path(path), format, quantize, size, shapes, differences)


def load_exported(
    path: str | os.PathLike, *, trust_remote_code: bool = False, **options: Any
) -> ExportedModel:
    """What ``export`` wrote, ready to run: called as the model it came from, with tensors.

    All files are compared with the checksums that ``export`` wrote, in a second or two for a GB: a
    program whose weights changed on the disk would run and be wrong.

    Args:
        path: Its folder.
        trust_remote_code: Whether to load programs that run code of their own when they are loaded,
            those of ``"torch_export"`` and ``"aoti"``. For folders that you trust.
        **options: To ``transformers.exporters.ExportedModel.from_pretrained``: ``device``, and of
            the runtime, such as ``session_options=`` for ONNX Runtime and ``config=`` for OpenVINO,
            which computes in float32 unless this says otherwise.

    Returns:
        A callable; it returns a model output, of the fields that the model's had.

    Raises:
        FileNotFoundError: If the folder holds no export.
        OSError: If a file of it is missing, or not as ``export`` wrote it.
        ImportError: If the runtime is not installed, with the command that installs it.
        ValueError: If the program runs code when it is loaded, and ``trust_remote_code`` is false.
    """
    path = Path(path)
    if problem := damaged(path):
        raise OSError(
            f"{problem}. To resolve: export again, or, if it was changed on purpose, delete "
            f"{path / CHECKSUMS}."
        )
    if not (path / "export.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no exported model (no export.json); write one by "
            "kroneckerbert.exporting.export(model, path)."
        )
    try:
        format = read_json(path / "export.json", "export_format")["export_format"]
        if not isinstance(format, str):
            raise ValueError(f"export_format is {format!r}")
    except ValueError as error:
        raise _unreadable(path / "export.json", error) from error
    _check_packages(format)
    # As transformers does from 5.24 on; 5.23 loads them unasked.
    if format in _RUN_CODE and not trust_remote_code:
        raise ValueError(
            f"{path} holds a program of format {_RUN_CODE[format]!r}, which runs code when it is "
            "loaded: if you trust whoever wrote it, pass trust_remote_code=True."
        )
    if format == "openvino":
        # It would choose bfloat16 by itself where the CPU has it, and be half a percent off.
        options["config"] = {"INFERENCE_PRECISION_HINT": "f32", **options.get("config", {})}
    with _quiet():
        try:
            return ExportedModel.from_pretrained(
                path, trust_remote_code=trust_remote_code, **options
            )
        except (ImportError, TypeError):
            raise
        except Exception as error:  # each runtime has errors of its own
            if (path / CHECKSUMS).exists():  # then it is not the files
                raise
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> OSError:
    why = " ".join(str(error).split())
    return OSError(
        f"{path} cannot be read ({why}). To resolve: export again if it is damaged; this export "
        "has no checksums that would tell."
    )


def _check_packages(format: str) -> None:
    missing = [name for name in _PACKAGES.get(format, ()) if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format {format!r} needs {', '.join(missing)}: pip install 'kron-kernels[{format}]'",
            name=missing[0],
        )


def _exported(
    model: PreTrainedModel, sample: Mapping[str, Tensor], format: Format, dynamic: bool
) -> ExportedModel:
    backend = get_exporter_class(_BACKENDS.get(format, format))
    shapes = None
    if dynamic:
        tokens = _shape(sample)[1]
        # DYNAMIC rather than AUTO, which would quietly make a constant of what it cannot vary.
        vary = torch.export.Dim.DYNAMIC
        shapes = {
            name: {0: vary, 1: vary} if x.ndim > 1 and x.shape[1] == tokens else {0: vary}
            for name, x in sample.items()
        }
    config = backend.config_class(dynamic=dynamic, dynamic_shapes=shapes)
    exported = backend().export(model, {**sample, **_flags(model)}, config)
    if format == "onnx":
        # Without the traceback of every node, which is most of a small model and names folders.
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        ClearMetadataAndDocStringPass()(exported.program)
    return exported


def _quantize(exported: ExportedModel, sample: dict[str, Tensor]) -> None:
    from onnxscript import optimizer

    component = exported.components["model"]
    # Only products with a constant are quantised, which a factor's transpose is not before it is
    # folded: of a compressed BERT_BASE's 73 layers the dense pooler alone would be. The default
    # limits leave out large tensors.
    limits = {"input_size_limit": 2**62, "output_size_limit": 2**62}
    optimizer.fold_constants(component.program, **limits)
    optimizer.remove_unused_nodes(component.program)
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    component.program = quantizer.quantize(component.program, sample, exported.export_format)


@torch.inference_mode()
def _differences(
    model: PreTrainedModel, folder: Path, inputs: list[dict[str, Tensor]]
) -> dict[str, Difference]:
    exported = load_exported(folder, trust_remote_code=True)  # it has just been written
    found: dict[str, list[Difference]] = {}
    for x in inputs:
        expected = _tensors(model(**x, **_flags(model)))
        actual = _tensors(exported(**x))
        if list(actual) != list(expected):
            raise ValueError(f"the export returns {list(actual)}, the model {list(expected)}.")
        for name, right in expected.items():
            left = actual[name]
            if left.shape != right.shape:
                raise ValueError(
                    f"{name} of the export has shape {tuple(left.shape)} for a batch of "
                    f"{_shape(x)} tokens, the model's {tuple(right.shape)}."
                )
            left, right = left.double().flatten().cpu(), right.double().flatten().cpu()
            # Of a NaN nothing is smaller: `_judge` refuses it.
            worst, scale = (left - right).abs().max().item(), right.abs().max().item()
            cosine = torch.cosine_similarity(left, right, 0).item()
            found.setdefault(name, []).append(Difference(worst, scale, cosine))
    return {
        name: Difference(
            torch.tensor([d.worst for d in ds], dtype=torch.float64).max().item(),  # keeps a NaN
            max(d.scale for d in ds),
            min(d.cosine for d in ds),
        )
        for name, ds in found.items()
    }


def _judge(differences: Mapping[str, Difference], tolerance: float, format: Format) -> None:
    for name, d in differences.items():
        if not d.worst <= tolerance * d.scale:
            raise ValueError(
                f"the {format} export computes something else: {name} is up to {d.worst:.3g} off, "
                f"where {tolerance:.2g} of the largest entry, {d.scale:.3g}, is allowed; try "
                "another format or dynamic=False, or pass the tolerance that you accept."
            )


def _sample(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random ids, the mask, and the segments where the model tells several apart."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 512
    shape = 2, max(2, min(24, longest // 2))
    draws = torch.Generator().manual_seed(0)  # the global one is left alone
    ids = torch.randint(config.vocab_size, shape, generator=draws)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        sample["token_type_ids"] = torch.zeros_like(ids)
    return {name: x.to(model.device) for name, x in sample.items()}


def _checked(sample: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The sample on the model's device."""
    wrong = [name for name, x in sample.items() if not isinstance(x, Tensor) or x.ndim < 2]
    if wrong or not sample:
        raise ValueError(
            f"sample must hold tensors (batch, tokens), but {', '.join(wrong) or 'it'} "
            f"{'is not' if wrong else 'is empty'}; pass tokenizer(texts, return_tensors='pt')."
        )
    if "labels" in sample:
        raise ValueError("sample has labels, but no loss is exported; remove them.")
    taken = inspect.signature(model.forward).parameters
    if unknown := [name for name in sample if name not in taken]:
        nearest = difflib.get_close_matches(unknown[0], taken) or ["input_ids"]
        raise ValueError(
            f"sample has {unknown[0]!r}, which a {type(model).__name__} does not take; remove it, "
            f"or write one of {', '.join(nearest)}."
        )
    return {name: x.to(model.device) for name, x in sample.items()}


def _shape(sample: Mapping[str, Tensor]) -> tuple[int, int]:
    batch, tokens = next(iter(sample.values())).shape[:2]
    return batch, tokens


def _resized(sample: Mapping[str, Tensor], batch: int, tokens: int) -> dict[str, Tensor]:
    """The first tokens of the rows, which are repeated as needed."""
    whole = _shape(sample)[1]
    return {
        # Contiguous, or torch.export would expect strides such as these of later inputs.
        name: x[
            torch.arange(batch) % len(x), : tokens if x.shape[1] == whole else None
        ].contiguous()
        for name, x in sample.items()
    }


def _padded(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the last quarter of the first row masked, and nothing else."""
    mask = sample.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(sample)
    mask = torch.ones_like(mask)
    tokens = mask.shape[1]
    mask[0, tokens - tokens // 4 :] = 0
    return {**sample, "attention_mask": mask}


def _flags(model: PreTrainedModel) -> dict[str, Any]:
    """For the forward pass: no cache, which would be an output."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes_cache else {}


def _tensors(output: Any) -> dict[str, Tensor]:
    """All tensors of a model output, by name."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(at).strip(".[]'"): x for at, x in leaves if isinstance(x, Tensor)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print at each call; what goes wrong is an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
