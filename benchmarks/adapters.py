"""A linear layer with a LoKr adapter: by PEFT, by forming the product, merged, and by ours.

The adapters have the sides that PEFT chooses, near the square root ("-1") or with w1 8 x 8 ("8"),
and rank 8. In inference, float32. Contenders compute the layer and its adapter, except two that
compute alone what the adapter adds. "merged" is one dense layer, without an adapter to switch: the
bound for the others. Layers are in rotation, as in a model. PEFT and LyCORIS are left out where
they are missing: pip install "kron-kernels[peft,bench]".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.peers import first_line
from benchmarks.training import medians, rounded
from kron_kernels import kron_matmul
from kron_kernels.adapters import AdaptedLinear, lokr_factors, serve_lokr
from kron_kernels.testing import assert_close
from kron_kernels.timing import interleaved

WIDTHS, FACTORS, TOKENS = (768, 1024, 2048, 4096), (-1, 8), (128, 1)
RANK, ALPHA = 8, 16.0
SECONDS = 10.0
ENTRIES, MOST = 2**24, 8  # of the weights in rotation, 64 MB; and sets of them
FORMED, MERGED, OURS = "forming the product", "merged", "AdaptedLinear"
ALONE_FORMED, ALONE = "the adapter alone: formed", "the adapter alone: kron_matmul"
PEFT, SERVED, LYCORIS = "PEFT", "PEFT, serve_lokr", "LyCORIS, bypass"
Call = Callable[[Tensor], Tensor]


def run(path: Path, threads: int, effort: float) -> None:
    with machine.recording(path, threads) as record:
        for width in WIDTHS:
            for factor in FACTORS:
                for tokens in TOKENS:
                    machine.progress(f"adapters: {width}, factor {factor}, {tokens} tokens")
                    record.add(measured(width, factor, tokens, effort * SECONDS))


@torch.inference_mode()
def measured(width: int, factor: int, tokens: int, seconds: float) -> dict[str, Any]:
    """A row: times of the contenders whose result is right, and reasons of those left out."""
    torch.manual_seed(0)
    left_out: dict[str, str] = {}
    sets = max(1, min(MOST, ENTRIES // width**2))
    layers = [contenders(width, factor, left_out) for _ in range(sets)]
    x = torch.randn(tokens, width)
    calls = {}
    for name in layers[0]:
        turns = [layer[name] for layer in layers if name in layer]
        calls[name] = _rotate(turns, x)
    times = interleaved(calls, seconds)
    sides = sides_of(width, factor)
    facts = {"width": width, "factor": factor, "sides": sides, "tokens": tokens, "sets": sets}
    return facts | {"ms": rounded(times), "left_out": left_out}


def contenders(width: int, factor: int, left_out: dict[str, str]) -> dict[str, Call]:
    """Calls by name of one layer and its adapter, each with the right result."""
    layer = nn.Linear(width, width)
    m1, m2 = sides_of(width, factor)
    state = {
        "lokr_w1": torch.randn(m1, m1) / m1**0.5,
        "lokr_w2_a": torch.randn(m2, RANK) / RANK**0.5,
        "lokr_w2_b": torch.randn(RANK, m2) / m2**0.5,
    }
    scale = ALPHA / RANK
    w1, w2 = state["lokr_w1"], state["lokr_w2_a"] @ state["lokr_w2_b"]
    merged = copy.deepcopy(layer)
    merged.weight.add_(torch.kron(w1, w2), alpha=scale)
    a, b = lokr_factors(state, scale=scale)
    found: dict[str, Call] = {
        FORMED: lambda x: layer(x) + F.linear(x, torch.kron(w1, w2) * scale),
        MERGED: merged,
        OURS: AdaptedLinear(layer, a, b),
        ALONE_FORMED: lambda x: F.linear(x, torch.kron(w1, w2) * scale),
        ALONE: lambda x: kron_matmul(x, a, b),
    }
    for names, make in (((PEFT, SERVED), by_peft), ((LYCORIS,), by_lycoris)):
        try:
            found |= dict(zip(names, make(layer, state, factor), strict=True))
        except Exception as error:  # a broken installation may raise anything
            left_out |= dict.fromkeys(names, first_line(error))
    x = torch.randn(8, width)
    wide = [t.double() for t in (w1, w2)]
    adapter = F.linear(x.double(), scale * torch.kron(*wide))
    both = copy.deepcopy(layer).double()(x.double()) + adapter
    for name, call in list(found.items()):
        expected = adapter if name in (ALONE_FORMED, ALONE) else both
        try:
            assert_close(name, call(x), expected, width)
        except AssertionError as error:
            left_out[name] = first_line(error)
            del found[name]
    return found


def by_peft(layer: nn.Linear, state: dict[str, Tensor], factor: int) -> list[Call]:
    """PEFT's layer, and the same served by us."""
    from peft import LoKrConfig, inject_adapter_in_model

    config = LoKrConfig(r=RANK, alpha=ALPHA, decompose_factor=factor, target_modules=["0"])
    models = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(1, 1))
        model[0] = layer  # the weight is shared by all contenders
        model = inject_adapter_in_model(config, model).eval()
        for name, t in state.items():
            getattr(model[0], name)["default"].copy_(t)
        models.append(model)
    assert not serve_lokr(models[1])
    return [model[0] for model in models]


def by_lycoris(layer: nn.Linear, state: dict[str, Tensor], factor: int) -> list[Call]:
    """Its module in bypass mode, which does not form the product."""
    from lycoris.modules.lokr import LokrModule

    options: Any = {"lora_dim": RANK, "alpha": ALPHA, "factor": factor, "bypass_mode": True}
    module = LokrModule("layer", layer, **options).eval()
    for name, t in state.items():
        getattr(module, name).copy_(t)
    return [module]


def sides_of(width: int, factor: int) -> tuple[int, int]:
    """Sides of the square w1 and w2: the factor's, or the two nearest to the square root."""
    first = factor
    if factor == -1:
        first = max(n for n in range(1, int(width**0.5) + 1) if width % n == 0)
    return first, width // first


def _rotate(layers: list[Call], x: Tensor) -> Callable[[], Tensor]:
    turns = cycle(layers)
    return lambda: next(turns)(x)


def gain(row: dict[str, Any], name: str) -> float:
    """How many times a contender is as fast as forming the product."""
    ms = medians(row)
    return ms[ALONE_FORMED if name == ALONE else FORMED] / ms[name]


def tables(results: dict[str, Any]) -> list[Table]:
    title = machine.title(results["machine"])
    shown = []
    for tokens in dict.fromkeys(row["tokens"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["tokens"] == tokens]
        heads = (f"{row['width']}, {'x'.join(map(str, row['sides']))}" for row in rows)
        what = f"a layer with LoKr, 1 x {tokens} tokens, ms (times faster than {FORMED})"
        table = machine.table(f"{what}\n{title}", ("width, sides of w1 x w2", *heads), left=("",))
        names = dict.fromkeys(name for row in rows for name in row["ms"])
        for name in sorted(names, key=(ALONE_FORMED, ALONE).__contains__):
            table.add_row(name, *(_cell(row, name) for row in rows))
        missing = {n: why for row in rows for n, why in row["left_out"].items()}
        table.caption = "; ".join(f"{name} left out: {why}" for name, why in missing.items())
        shown.append(table)
    return shown


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["ms"]:
        return "–"
    ms = f"{medians(row)[name]:.3g}"
    return ms if name in (FORMED, ALONE_FORMED) else f"{ms} ({gain(row, name):.1f})"
