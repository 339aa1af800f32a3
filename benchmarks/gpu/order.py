"""The order of the checks: what is learnt from them, soonest.

1. One case of every kernel, dtype, direction and engine.
2. One case of every other question: tails, strides, graphs, compilers, 2^31 entries.
3. All other cases, those that pytest's own runs leave out last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from kron_kernels.backends.cuda import FEW_TOKENS
from kron_kernels.backends.triton import configs
from kron_kernels.shapes import KronShape
from kron_kernels.testing.cases import DTYPES

# The functions of tests/gpu that launch every kernel, with the case's first shape as its product.
KERNELS = (
    "test_forward",
    "test_gradients",
    "test_feed_forward",
    "test_three_products_of_one_x",
    "test_embedding_lookup_and_its_gradients",
)
# Functions not named here come between the last two.
QUESTIONS = (
    "test_numbers_of_tokens",
    "test_operands_that_are_not_contiguous_or_not_aligned",
    "test_a_nan_stays_in_its_token",
    "test_the_same_bits_every_time",
    "test_a_cuda_graph_of_inference",
    "test_a_cuda_graph_of_training",
    "test_a_side_stream",
    "test_torch_compile",
    "test_torch_compile_of_modules",
    "test_more_than_32_bits_of_entries",
)


class Question(NamedTuple):
    """What a case answers: of all cases with the same question the first comes early."""

    function: str
    engine: str
    dtype: str
    kernel: str


def question(item: Any) -> Question:
    """Of a pytest item."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    function = getattr(item, "originalname", None) or item.name
    machine = given.get("machine")
    engine = getattr(machine, "engine", "")
    if function not in KERNELS:
        return Question(function, engine, "", "")
    dtype = given.get("dtype", "")
    shape = next((v for v in given.values() if isinstance(v, KronShape)), None)
    if shape is None:
        return Question(function, engine, dtype, "")
    if engine == "cuda":
        few = given.get("tokens", FEW_TOKENS + 1) <= FEW_TOKENS
        return Question(function, engine, dtype, "few tokens" if few else "tensor cores")
    return Question(function, engine, dtype, _triton_kernel(function, shape, dtype))


def _triton_kernel(function: str, shape: KronShape, dtype: str) -> str:
    """The kernel, or the part of it, that computes this product, as launch.py chooses it."""
    g = configs.geometry(shape)
    if g is None or function in ("test_feed_forward", "test_three_products_of_one_x"):
        return ""
    if g.by_dot:
        return "mix on tensor cores"
    if function == "test_gradients":
        g = g if g.mix_first else g.transposed
        width = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
        if g.dense_gradient_pays(width.itemsize, dtype == "float32"):
            return "by the dense gradient"
    return "mix in registers"


def ordered(items: Iterable[Any]) -> list[Any]:
    """The items in the order above; the same from every process that has the same items."""
    items = sorted(items, key=lambda item: item.get_closest_marker("slow") is not None)
    seen: set[Question] = set()

    def place(item: Any) -> tuple[int, float, int]:
        asked = question(item)
        first = asked not in seen
        seen.add(asked)
        slow = int(item.get_closest_marker("slow") is not None)
        if asked.function in KERNELS:
            dtype = DTYPES.index(asked.dtype) if asked.dtype in DTYPES else 0
            return (0, dtype, KERNELS.index(asked.function)) if first else (2, slow, 0)
        last = len(QUESTIONS) - 1
        turn = QUESTIONS.index(asked.function) if asked.function in QUESTIONS else last - 0.5
        return (1, turn, 0) if first else (2, slow, 1)

    places = [place(item) for item in items]
    return [items[i] for i in sorted(range(len(items)), key=places.__getitem__)]
