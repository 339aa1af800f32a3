"""Checks of the feed-forward block, and of tables: embedding, tied decoder, cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.gpu.cases import DECODER
from benchmarks.gpu.checks import (
    arithmetic,
    check_feed_forward,
    close,
    drawn,
    hold,
    oracle,
    require,
    terms,
    wide,
)
from benchmarks.gpu.jobs import Place
from kron_kernels import KroneckerEmbedding, kron_feed_forward, kron_matmul, reference
from kron_kernels.shapes import KronShape


def feed_forward(
    place: Place, up: KronShape, down: KronShape, name: str, tokens: int, activation: str
) -> dict[str, bool]:
    with arithmetic(name) as dtype:
        for s in (up, down):
            drawn(place, s, 1, dtype)
        # CUDA's meet in one kernel without ranks and up to two vectors, and otherwise in two.
        few = up.rank == down.rank == 1 and min(up.n1, up.n2) <= 2
        meets = True if few or place.engine == "triton" else None
        more = {"meets": meets, "device": place.device}
        met = check_feed_forward(up, down, tokens, dtype, activation, place.engine, **more)
    return {"meet": met}


def feed_forward_in_two(place: Place) -> None:
    up, down = KronShape(24, 24, 4, 2), KronShape(24, 24, 2, 4)
    x, a1, b1 = drawn(place, up, 5, torch.float32)
    _, a2, b2 = drawn(place, down, 5, torch.float32)
    require(
        not place.kernels.fuses((a1, b1, None), (a2, b2, None)), "these factors should not meet"
    )
    y = kron_feed_forward(x, (a1, b1, None), (a2, b2, None), backend=place.engine)
    hidden = oracle(x, a1, b1, activation="gelu")
    n = terms(up) + terms(down)
    hold("y", y, oracle(hidden, a2.double(), b2.double()), n, torch.float32)


def embedding(place: Place, rank: int, size: int, name: str) -> None:
    with arithmetic(name) as dtype:
        new = {"dtype": dtype, "device": place.device}
        table = KroneckerEmbedding(41, 6 * size, size, rank, padding_idx=3, **new)
        ids = torch.randint(0, 41, (3, 7))
        ids[0, 0] = 3
        out = table(ids.to(place.device))
        exact = wide((table.a, table.b))
        expected = F.embedding(ids, reference.materialize(*exact))
        hold("rows", out, expected, rank, dtype)
        dy = torch.randn_like(out)
        out.backward(dy)
        others = torch.autograd.grad(expected, exact, dy.cpu().double())
        others[0][:, 3] = 0
        for label, grad, other in zip("ab", (table.a.grad, table.b.grad), others, strict=True):
            hold(label, grad, other, ids.numel() * 6 * size, dtype)


def unknown_ids(place: Place) -> None:
    table = KroneckerEmbedding(5, 24, 8, dtype=torch.float16, device=place.device)
    with torch.no_grad():
        out = table(torch.tensor([4, 5, -1, 0], device=place.device))
    got = out.isnan().all(-1).tolist()
    require(got == [False, True, True, False], f"NaN in rows {got}")


def many_rows_of_a_table(place: Place) -> None:
    size, columns = 8, 96
    tokens = 2**31 // (size * columns) + 1000
    place.needs_memory(1.2 * 2e-9 * tokens * size * columns + 1)
    table = KroneckerEmbedding(1000, size * columns, size, device=place.device, dtype=torch.float16)
    ids = torch.randint(0, 1000, (tokens,), device=place.device)
    with torch.no_grad():
        y = table(ids)
    ends = torch.tensor([0, tokens // 2, tokens - 1], device=place.device)
    dense = reference.materialize(table.a.detach().cpu().double(), table.b.detach().cpu().double())
    hold("rows", y[ends], dense[ids[ends].cpu()], 1, torch.float16)


def tied_decoder(place: Place) -> None:
    s = KronShape(1000, 12, 1, 8) if place.simulated else DECODER
    h, a, b = drawn(place, s, 35, torch.float16)
    y = kron_matmul(h, a, b, backend=place.engine)
    hold("logits", y, oracle(h, a, b), terms(s), torch.float16)


def cross_entropy(place: Place) -> None:
    place.needs_gpu("the loss takes the backend by itself, which for a CPU's tensors is native")
    table = KroneckerEmbedding(1000, 96, 8, device=place.device)
    table.reset_parameters(0.1)
    h = torch.randn(3, 700, 96, device=place.device).requires_grad_()  # three pieces
    labels = torch.randint(0, 1000, (3, 700), device=place.device)
    labels[1, :50] = -100
    loss = table.cross_entropy(h, labels)
    grads = torch.autograd.grad(loss, (h, table.a, table.b))
    exact = wide((h, table.a, table.b))
    logits = F.linear(exact[0], reference.materialize(*exact[1:])).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.cpu().flatten())
    close("loss", loss, expected, 1e-5)
    for label, g, other in zip("hab", grads, torch.autograd.grad(expected, exact), strict=True):
        close(f"gradient of {label}", g, other, 1e-4)
    with torch.no_grad():
        low = table.half().cross_entropy(h.half(), labels)
    close("loss in float16", low, expected, 1e-2)
