"""Whole encoders of BERT's kind, as they are run: dense in several runtimes, and students.

A contender's name is a subject and a way to run it, such as "dense onnxruntime int8". A preset's
name without a way is its student as a user gets it, in the engine. "by layers" is the same student
layer by layer, because a hook watches a module; "low rank" is a student in the engine with the same
words, whose layers have the largest ranks that need no more parameters. "int8" is a model with int8
weights in the engine, the dense one as well. Weights are random.

Every student is compared with itself on PyTorch's operators, every export with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

from benchmarks import machine, openvino_int8
from benchmarks.openvino_int8 import Feeds
from benchmarks.training import PRESETS, on_backend
from kron_kernels.factors import term_of
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved
from kroneckerbert import KroneckerBertConfig, KroneckerBertModel, explain, export, quantize

# Of ids (batch, tokens) and, of a padded batch, its mask.
Call = Callable[[Tensor, Tensor | None], Any]

BY_LAYERS, LOW_RANK, IN_INT8 = "by layers", "low rank", "int8"
LOW_RANK_IN_INT8 = f"{LOW_RANK} {IN_INT8}"
EAGER = ("", "eager", BY_LAYERS, LOW_RANK, IN_INT8, LOW_RANK_IN_INT8)
INT8 = "dense onnxruntime int8"


def contenders(
    names: tuple[str, ...], base: BertConfig, folder: Path, threads: int
) -> dict[str, Call]:
    """By name. One whose package is missing is left out, with a message."""
    torch._dynamo.config.cache_size_limit = 64
    found = {}
    for name in names:
        if "openvino" in name and find_spec("openvino") is None:
            machine.progress(f"{name} is left out: pip install 'kron-kernels[openvino]'")
            continue
        machine.progress(f"contender: {name}")
        found[name] = contender(name, base, folder / name.replace(" ", "-"), threads)
    return found


def contender(name: str, base: BertConfig, folder: Path, threads: int) -> Call:
    """Exports are written to ``folder``."""
    subject, _, way = name.partition(" ")
    if way in EAGER:
        model = module(name, base)
        with torch.inference_mode():
            machine.progress(f"  computed {explain(model)}")
        return partial(run_torch, model)
    model = module(f"{subject} eager", base)
    if way == "torch.compile":
        return partial(run_torch, torch.compile(model, dynamic=False))
    return session(model, folder, way, threads)


def module(name: str, base: BertConfig) -> nn.Module:
    """A contender that PyTorch runs without compiling it; a student is checked."""
    torch.manual_seed(0)
    if name.endswith(f" {IN_INT8}"):
        return quantize(module(name.removesuffix(f" {IN_INT8}"), base))
    subject, _, way = name.partition(" ")
    if subject == "dense":
        return BertModel(base, add_pooling_layer=False).eval()
    config = KroneckerBertConfig.preset(PRESETS[subject], base)
    if way == LOW_RANK:
        config = KroneckerBertConfig.from_dense(base, low_rank_factors(config))
    student = KroneckerBertModel(config, add_pooling_layer=False).eval()
    check(student)
    if way == BY_LAYERS:
        student.embeddings.LayerNorm.register_forward_hook(lambda *_: None)
    return student


def low_rank_factors(config: KroneckerBertConfig) -> dict[str, Any]:
    """The same words, and each layer of the largest rank that needs no more parameters."""
    layout, factors = config.layout(), {}
    for path, shapes in config.kronecker_shapes().items():
        rows, columns = layout.sizes[path]
        entries = sum(s.rank * (s.m1 * s.n1 + s.m2 * s.n2) for s in shapes)
        term = term_of((rows, 1), entries // (rows + columns))
        factors[path] = [term_of(*shapes[0].part)] if path == layout.table else [term]
    return factors


def check(student: nn.Module) -> None:
    """Compare a student with itself on PyTorch's operators, on a padded batch."""
    ids = torch.randint(1, student.config.vocab_size, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, 16:] = 0
    with torch.inference_mode():
        ours, eager = (
            run_torch(on_backend(student, backend), ids, mask).last_hidden_state[mask.bool()]
            for backend in ("auto", "eager")
        )
    on_backend(student, "auto")
    config = student.config
    sums = config.num_hidden_layers * config.intermediate_size
    assert_close("student", ours, eager.double(), sums)


def run_torch(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Any:
    return model(ids) if mask is None else model(ids, attention_mask=mask)


def session(model: nn.Module, folder: Path, way: str, threads: int) -> Call:
    """The model in another runtime, in the fastest of that one's versions, timed at 1 x 128."""
    random = [feeds(torch.randint(1, model.config.vocab_size, (1, 128))) for _ in range(2)]
    quantize: Any = "int8-dynamic" if way == "onnxruntime int8" else None
    print(export(model, folder, quantize=quantize), flush=True)
    file = next(folder.rglob("*.onnx"))
    if way == "openvino int8":
        versions = openvino_int8.versions(file, random, threads)
        compare(model, versions, random[0])
    else:
        versions = onnxruntime_versions(file, threads)
    times = interleaved({name: partial(run, random[0]) for name, run in versions.items()}, 3.0)
    fastest = versions[min(times, key=lambda name: times[name].median)]
    return lambda ids, mask=None: fastest(feeds(ids, mask))


class InRuntime(nn.Module):
    """A dense encoder in int8 in ONNX Runtime, to be called like the encoder."""

    def __init__(self, encoder: PreTrainedModel, folder: Path, threads: int) -> None:
        super().__init__()
        self.run = session(encoder, folder, "onnxruntime int8", threads)
        self.bytes = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        self.config, self.device = encoder.config, encoder.device

    @property
    def base_model(self) -> Self:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Tensor) -> Any:
        states, *_ = self.run(input_ids, attention_mask)
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))


def onnxruntime_versions(file: Path, threads: int) -> dict[str, Callable[[Feeds], Any]]:
    """With and without the fusion of skip connections and layer norms, slow on some CPUs."""
    import onnxruntime

    versions = {}
    for disabled in ("", "SkipLayerNormFusion"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin after a run would slow the contender that follows.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if disabled:
            options.add_session_config_entry("optimization.disable_specified_optimizers", disabled)
        opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [put.name for put in opened.get_inputs()]
        versions[disabled] = partial(run_session, opened, names)
    return versions


def run_session(session: Any, names: Sequence[str], given: Feeds) -> Any:
    return session.run(None, {name: given[name] for name in names})


def compare(model: nn.Module, versions: dict[str, Callable[[Feeds], Any]], given: Feeds) -> None:
    """Print how near int8 comes to PyTorch, as ``export`` does; far off is an error."""
    with torch.inference_mode():
        expected = model(torch.from_numpy(given["input_ids"])).last_hidden_state.flatten()
    for name, run in versions.items():
        found = torch.as_tensor(run(given)).flatten()
        cosine = torch.cosine_similarity(found.double(), expected.double(), 0).item()
        print(f"OpenVINO int8, {name}: cosine similarity {cosine:.6f}", flush=True)
        assert cosine > 0.9, (name, cosine)


def feeds(ids: Tensor, mask: Tensor | None = None) -> Feeds:
    words = ids.numpy()
    return {
        "input_ids": words,
        "attention_mask": np.ones_like(words) if mask is None else mask.numpy(),
        "token_type_ids": np.zeros_like(words),
    }
