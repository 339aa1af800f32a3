"""Resources of the compiled Triton kernels for every GPU generation; needs no GPU.

KroneckerBERT's layers are compiled as a large batch would run them. ``triton_budget.json`` has the
limits, made from the output of Triton 3.9. With other Tritons from 3.8 on the tests hold the
kernels to no spills instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from simulator import Device
from torch.torch_version import TorchVersion

from kron_kernels import KroneckerEmbedding, KronShape, kron_feed_forward, kron_matmul, kron_qkv
from kron_kernels.backends.triton import launch
from kron_kernels.testing.cases import PRESETS, SQUARES
from static.reading import Static, static_report

BUDGET = Path(__file__).with_name("triton_budget.json")
BUDGETED = "3.9"  # the Triton of the limits; others take up to a third more registers
VERSION = TorchVersion(triton.__version__)
ARCHS = (80, 86, 89, 90, 100, 120, "gfx942")
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
TOKENS = 256  # enough for the tiles of a large batch on the simulated two multiprocessors

LAYERS = PRESETS | {"square": SQUARES[0]}


def operands(s: KronShape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    sizes = (TOKENS, s.in_features), (s.rank, s.m1, s.n1), (s.rank, s.m2, s.n2), (s.out_features,)
    return tuple(torch.zeros(size, dtype=dtype) for size in sizes)


def cases() -> Iterator[tuple[str, str, Callable[[torch.dtype], object]]]:
    """Name of a layer, of the operation, and the call."""
    for layer, s in LAYERS.items():

        def forward(dtype: torch.dtype, s: KronShape = s) -> None:
            x, a, b, bias = operands(s, dtype)
            kron_matmul(x, a, b, bias=bias, backend="triton")

        def factors(dtype: torch.dtype, s: KronShape = s) -> None:
            x, a, b, _ = operands(s, dtype)
            launch.factor_gradients(x.new_zeros(TOKENS, s.out_features), x, a, b, True, True)

        def inputs(dtype: torch.dtype, s: KronShape = s) -> None:
            x, a, b, _ = operands(s.transposed, dtype)
            kron_matmul(x, a.mT.contiguous().mT, b.mT.contiguous().mT, backend="triton")

        yield layer, "forward", forward
        yield layer, "dX", inputs
        if layer != "8x attention":  # its gradient is PyTorch's matrix product
            yield layer, "dA, dB", factors

    for size in ("8x", "21x"):
        up, down = LAYERS[f"{size} up"], LAYERS[f"{size} down"]

        def layers(dtype: torch.dtype, up: KronShape = up, down: KronShape = down):
            x, a1, b1, c1 = operands(up, dtype)
            _, a2, b2, c2 = operands(down, dtype)
            return x, (a1, b1, c1), (a2, b2, c2)

        def feed_forward(dtype: torch.dtype, layers=layers) -> None:
            kron_feed_forward(*layers(dtype), backend="triton")

        def backward(dtype: torch.dtype, layers=layers) -> None:
            x, first, second = layers(dtype)
            launch.kron_feed_forward_backward(x, x, first, "gelu", second, [True] * 6)

        yield f"{size} block", "forward", feed_forward
        yield f"{size} block", "backward", backward

    def qkv(dtype: torch.dtype) -> None:
        x, a, b, bias = operands(LAYERS["21x attention"], dtype)
        kron_qkv(x, *[(a, b, bias)] * 3, backend="triton")

    def lookup(dtype: torch.dtype) -> None:
        with torch.no_grad():
            KroneckerEmbedding(100, 768, 8, dtype=dtype)(torch.zeros(TOKENS, dtype=torch.int64))

    yield "21x QKV", "forward", qkv
    yield "embedding", "forward", lookup


def compiled(call: Callable[[torch.dtype], object], arch: int | str, dtype: torch.dtype) -> Static:
    """Static report of the kernel that a call launches."""
    with Device(arch, execute=False, shared=SHARED[arch]) as device:
        call(dtype)
    (kernel,) = device.launches
    return static_report(kernel.asm, arch, kernel.num_warps, kernel.shared)


def rows(
    match: str = "", archs: Sequence[int | str] = ARCHS, dtype: torch.dtype = torch.float16
) -> Iterator[dict[str, object]]:
    """Reports of the cases whose name contains ``match``, as rows of a budget."""
    for layer, action, call in cases():
        if match in f"{layer} {action}":
            for arch in archs:
                found = compiled(call, arch, dtype)
                wide = sum(n for bits, n in found.global_loads.items() if bits >= 128)
                yield {"kernel": f"{layer} {action}", "wide_loads": wide, **vars(found)}


def entry(row: dict[str, object]) -> dict[str, object]:
    """Limits for later compilations of the same case: this row's resources, and no spills."""
    return {
        "match": {"kernel": row["kernel"], "arch": row["arch"]},
        "max": {
            # AMD's compiler has no room for a feed-forward block; nothing there is tuned yet.
            "spill_loads": row["spill_loads"] if row["arch"] == "gfx942" else 0,
            "spill_stores": row["spill_stores"] if row["arch"] == "gfx942" else 0,
            "registers": row["registers"],
            "shared": row["shared"],
        },
        "min": {
            "blocks_per_sm": row["blocks_per_sm"],
            "tensor": row["tensor"].total(),
            "wide_loads": row["wide_loads"],
        },
    }


def show(row: dict[str, object]) -> str:
    return (
        f"{row['kernel']:22} {row['arch']!s:7} registers {row['registers']:3}  "
        f"spills {row['spill_loads']}/{row['spill_stores']}  shared {row['shared']:6}  "
        f"{row['warps']} warps x {row['blocks_per_sm']:2} blocks  "
        f"tensor {row['tensor'].total():3}  loads by bits {dict(row['global_loads'])}"
    )
