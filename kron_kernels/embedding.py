"""The two ends of a table ``Σ_k A_k ⊗ b_k``: its rows, and the loss of its tied decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kron_kernels import ops
from kron_kernels.backends.triton import launch as triton_gpu
from kron_kernels.checks import is_plain
from kron_kernels.functional import kron_matmul, traced, transformed
from kron_kernels.shapes import check_integer


def kron_embedding(ids: Tensor, a: Tensor, b: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows ``ids (…)`` of the table of ``a (r, rows, d / n)`` and ``b (r, 1, n)``: ``(…, d)``.

    On a GPU one kernel does it, and an id that is no row gives NaN; elsewhere such an id raises.
    """
    if triton_gpu.why_not_embedding(a, b) is None and not _plain_is_best(a, b):
        return Embedding.apply(ids, a, b, padding_idx)
    terms = [
        (F.embedding(ids, table, padding_idx)[..., None] * row).flatten(-2)  # (…, d/n, n)
        for table, row in zip(a, b, strict=True)
    ]
    return sum(terms[1:], terms[0])


def _plain_is_best(a: Tensor, b: Tensor) -> bool:
    return transformed() or torch.compiler.is_compiling() or traced() or not is_plain((a, b))


class Embedding(torch.autograd.Function):
    """The lookup by Triton."""

    @staticmethod
    def forward(ctx, ids: Tensor, a: Tensor, b: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, a, b)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx % a.shape[1]
        return ops.kron_embedding(ids.reshape(-1), a, b).view(*ids.shape, a.shape[2] * b.shape[2])

    @staticmethod
    def backward(ctx, dy: Tensor):
        ids, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, a.shape[2], b.shape[2])  # (T, d/n, n)
        rows = a[:, ids.reshape(-1)]  # (r, T, d/n)
        da = db = None
        if ctx.needs_input_grad[1]:
            tables = [
                torch.ops.aten.embedding_dense_backward(
                    (dy @ row[0]), ids.reshape(-1), a.shape[1], ctx.padding_idx, False
                )
                for row in b
            ]
            da = torch.stack(tables)
        if ctx.needs_input_grad[2]:
            db = torch.einsum("tjp,ktj->kp", dy, rows)[:, None]
        return None, da, db, None


def kron_cross_entropy(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    tokens: int = 1024,
) -> Tensor:
    """Mean cross-entropy of the logits ``h Eᵀ + bias``, which exist for a few tokens at a time.

    What ``F.cross_entropy`` gives for all logits at once, in float32 for 16-bit inputs. A chunk's
    logits are computed again in the backward: at 30,522 rows and 32 x 128 tokens 500 MB of float32
    become 125 MB, and their gradient and softmax with them.

    Args:
        h: Hidden states ``(…, d)``.
        a: The table's left factor, ``(r, rows, d / n)``.
        b: The right one, ``(r, 1, n)``.
        labels: Rows, ``(…)``; those of ``ignore_index`` do not count.
        bias: Shape ``(rows,)``.
        ignore_index: Marks tokens without a label.
        tokens: How many go through at a time.

    Raises:
        ValueError: If labels and hidden states differ in number, or ``tokens`` is no positive
            integer.
    """
    if h.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have one entry for each hidden state, shape {tuple(h.shape[:-1])}, "
            f"got {tuple(labels.shape)}."
        )
    tokens = check_integer("tokens", tokens)

    def loss(h: Tensor, labels: Tensor) -> Tensor:
        logits = kron_matmul(h, a, b, bias=bias)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")

    parts = zip(h.flatten(0, -2).split(tokens), labels.flatten().split(tokens), strict=True)
    total = sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)
    return total / (labels != ignore_index).sum()
