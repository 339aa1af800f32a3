"""Export to ONNX Runtime, OpenVINO, torch.export and AOTInductor, with a check of the result.

The graphs are made by ``transformers.exporters`` from stock operators only: products by factors are
exported as the matrix products of plain PyTorch. An export needs neither of this project's packages
to run.
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
from kroneckerbert.serving import layer_by_layer

Format = Literal["onnx", "openvino", "torch_export", "aoti"]

# transformers' names of formats, where they differ; and the packages that write and run a format,
# all in the extra of the format's name.
_BACKENDS = {"torch_export": "dynamo"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
_RUN_CODE = {"dynamo": "torch_export", "aoti": "aoti"}  # on loading: a pickle, a library

# In units of float32's rounding, relative to an output's largest entry. Two orders of summation
# drift apart like a random walk: by √(n d) roundings after d sums of n terms, 500 for BERT_BASE
# (d = 84 products of mostly 768 to 3072 terms). This is twice that.
_ROUNDINGS = 2**10


@dataclass(frozen=True)
class Difference:
    """Difference of an export's output from PyTorch's, over all inputs of the check.

    Attributes:
        worst: The largest absolute difference of two entries.
        scale: The largest absolute entry of PyTorch's output.
        cosine: The smallest cosine similarity of the flattened outputs for one input.
    """

    worst: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class ExportResult:
    """Result of ``export``.

    Attributes:
        folder: The export, for ``load_exported``.
        format: The argument.
        quantize: The argument.
        bytes: Size of graph and weights.
        shapes: The inputs of the check, ``(batch, tokens)``.
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
    """Exporter to machine code for the model's device, by AOTInductor."""

    export_format = "aoti"

    @classmethod
    def save_program(cls, program: torch.export.ExportedProgram, path: str | Path) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        return torch._inductor.aoti_load_package(str(path))


class AotiRunner(DynamoModelRunner):
    """Runner of a loaded package, which is bound to its device."""

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
    """Write a model for another runtime, and check that it computes the same there.

    The new folder has the program (``model.onnx`` and its weights ``model.onnx.data``,
    ``openvino_model.xml`` and ``.bin``, or ``model.pt2``), ``config.json`` and ``export.json``. It
    is run by ``load_exported`` or by the bare runtime. A decoder is exported without its cache: it
    computes all logits of a sequence, which is for scoring; generation is slow.

    Every export is loaded and run on three padded batches: of the sample's size, of one sequence
    half as long, and of one more sequence than the sample. Only then does the folder get its name;
    an error or an interruption leaves the old folder.

    Args:
        model: Any model of transformers, dense or factorised, with any head. It is exported in
            evaluation mode and left unchanged.
        path: New folder, or one from an earlier call.
        format: ``"onnx"`` for ONNX Runtime, ``"openvino"`` for OpenVINO, ``"torch_export"`` for
            PyTorch, ``"aoti"`` for machine code for the model's device by AOTInductor (which needs
            a C++ compiler and a minute or more).
        sample: Model inputs as a tokenizer returns them, each ``(batch, tokens)``; their names
            become the graph's. Random ids unless given.
        dynamic: Accept any batch size and number of tokens, not only the sample's.
        quantize: ``"int8-dynamic"``, for ONNX: weights in 8 bits, activations rounded to 8 bits at
            run time. Differences are then reported but not checked.
        tolerance: Largest accepted difference, relative to the output's largest entry. The default,
            for float32, is 1.2e-4: twice the effect of the order of summation in a network of
            BERT_BASE's size.
        tokenizer: Saved in the same folder.

    Raises:
        ImportError: If a package is missing or too old, with the command that installs it.
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If an argument is out of range, or the export computes something else.
        FileExistsError: If ``path`` is not empty and was not written by this project.
    """
    if format not in get_args(Format):
        raise ValueError(f"format = {format!r} must be one of {', '.join(get_args(Format))}.")
    check_packages(format)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"cannot export a {type(model).__name__}, only a PreTrainedModel; of a model with "
            "adapters, export what its merge_and_unload() returns."
        )
    if getattr(model.config, "kronecker_int8", None):
        raise ValueError(
            f"the {type(model).__name__} has int8 weights, which other runtimes multiply in their "
            "own way: export the model that it was made of with quantize='int8-dynamic', or "
            "kroneckerbert.dequantize(model)."
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
    """An exported model, ready to run: it is called with tensors, like the original model.

    All files are compared with their checksums, which takes a few seconds per GB: a program with
    damaged weights would run and be wrong.

    Args:
        path: The folder that ``export`` wrote.
        trust_remote_code: Load programs that run code on loading, ``"torch_export"`` and
            ``"aoti"``. Only for folders that you trust.
        **options: For ``transformers.exporters.ExportedModel.from_pretrained``: ``device``, and
            options of the runtime, such as ``session_options=`` for ONNX Runtime and ``config=``
            for OpenVINO, whose default precision is float32 here.

    Returns:
        A callable; it returns a model output with the fields of the model's output.

    Raises:
        FileNotFoundError: If the folder has no export.
        OSError: If a file is missing or damaged.
        ImportError: If the runtime is not installed, with the command that installs it.
        ValueError: If the program runs code on loading, and ``trust_remote_code`` is false.
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
    check_packages(format)
    # transformers refuses them as well from 5.24 on.
    if format in _RUN_CODE and not trust_remote_code:
        raise ValueError(
            f"{path} holds a program of format {_RUN_CODE[format]!r}, which runs code when it is "
            "loaded: if you trust whoever wrote it, pass trust_remote_code=True."
        )
    if format == "openvino":
        # By default it computes in bfloat16 if the CPU has it, with errors of half a percent.
        options["config"] = {"INFERENCE_PRECISION_HINT": "f32", **options.get("config", {})}
    with _quiet():
        try:
            return ExportedModel.from_pretrained(
                path, trust_remote_code=trust_remote_code, **options
            )
        except (ImportError, TypeError):
            raise
        except Exception as error:  # each runtime has its own errors
            if (path / CHECKSUMS).exists():  # the files are not the cause
                raise
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> OSError:
    why = " ".join(str(error).split())
    return OSError(
        f"{path} cannot be read ({why}). To resolve: export again if it is damaged; without "
        "checksums that is not known."
    )


def check_packages(format: str) -> None:
    """Raise an ImportError that names the extra, if a package of this format is missing."""
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
        # Not AUTO, which silently makes constants of sizes that cannot vary.
        vary = torch.export.Dim.DYNAMIC
        shapes = {
            name: {0: vary, 1: vary} if x.ndim > 1 and x.shape[1] == tokens else {0: vary}
            for name, x in sample.items()
        }
    config = backend.config_class(dynamic=dynamic, dynamic_shapes=shapes)
    exported = backend().export(model, {**sample, **_flags(model)}, config)
    if format == "onnx":
        # Tracebacks of all nodes are most of a small model's file, and name local folders.
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        ClearMetadataAndDocStringPass()(exported.program)
    return exported


def _quantize(exported: ExportedModel, sample: dict[str, Tensor]) -> None:
    from onnxscript import optimizer

    component = exported.components["model"]
    # Only products with a constant are quantised, and a factor's transpose is one only after it is
    # folded: without folding, one of a compressed BERT_BASE's 73 layers is, the dense pooler. The
    # default limits exclude large tensors.
    limits = {"input_size_limit": 2**62, "output_size_limit": 2**62}
    optimizer.fold_constants(component.program, **limits)
    optimizer.remove_unused_nodes(component.program)
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    component.program = quantizer.quantize(component.program, sample, exported.export_format)


@torch.inference_mode()
def _differences(
    model: PreTrainedModel, folder: Path, inputs: list[dict[str, Tensor]]
) -> dict[str, Difference]:
    exported = load_exported(folder, trust_remote_code=True)  # just written by us
    found: dict[str, list[Difference]] = {}
    for x in inputs:
        with layer_by_layer():  # an export computes padding, too
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
            # A NaN compares false with any tolerance: `_judge` refuses it.
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
    """Random ids, the mask, and segments if the model has more than one type."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 512
    shape = 2, max(2, min(24, longest // 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
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
    """The sample with this many rows, repeated as needed, cut to this many tokens."""
    whole = _shape(sample)[1]
    return {
        # Contiguous: torch.export would require the strides of a slice of all later inputs.
        name: x[
            torch.arange(batch) % len(x), : tokens if x.shape[1] == whole else None
        ].contiguous()
        for name, x in sample.items()
    }


def _padded(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sample with only the last quarter of the first row masked."""
    mask = sample.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(sample)
    mask = torch.ones_like(mask)
    tokens = mask.shape[1]
    mask[0, tokens - tokens // 4 :] = 0
    return {**sample, "attention_mask": mask}


def _flags(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of the forward pass that turn off the cache, which would be an output."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes_cache else {}


def _tensors(output: Any) -> dict[str, Tensor]:
    """All tensors of a model output, by name."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(at).strip(".[]'"): x for at, x in leaves if isinstance(x, Tensor)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress prints, warnings and logs of the exporters; failures raise exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
