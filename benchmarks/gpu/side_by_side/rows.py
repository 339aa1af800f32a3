"""A row: every side's cost of one call. A row of few tokens: what our engines launch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from simulator import Launch

from benchmarks.gpu.bounds import FREE
from benchmarks.gpu.devices import DEVICES
from benchmarks.gpu.side_by_side.costs import microseconds, operation_part
from benchmarks.gpu.side_by_side.cuda import cuda_checked, cuda_device, sampled, unserved
from benchmarks.gpu.side_by_side.lycoris import their_half
from benchmarks.gpu.side_by_side.mill import GPUS, Mill, Operation
from benchmarks.gpu.side_by_side.triton import checked, pretending
from benchmarks.gpu.side_by_side.works import TOKENS, Call, Case, Work, errors, layers_of, our_call
from kron_kernels.backends import cuda as cuda_gpu
from kron_kernels.backends.triton import launch as triton_gpu


def dense(work: Work, arch: int, direction: str) -> dict[str, Any]:
    """The floor of dense layers: of each product, compulsory DRAM or FLOPs at their peak."""
    parts = []
    for layer in layers_of(work):
        m, n = layer.m1 * layer.m2, layer.n1 * layer.n2
        each = Operation("mm", 2 * (TOKENS * (m + n) + m * n), 2 * TOKENS * m * n)
        parts += [operation_part(arch, each)] * (1 if direction == "forward" else 2)
    return {"microseconds": microseconds(parts), "limiter": parts[0].limiter}


def side_by_side(
    work: Work, arch: int, direction: str, old: dict[str, Any], cuda_only: bool
) -> dict[str, Any]:
    """One row of the results; LyCORIS's half from an old row, where there is one.

    If only our CUDA kernels are weighed, what Triton's cost is from the old row too.
    """
    row = {"case": str(work), "arch": arch, "direction": direction}
    row["ours"] = cuda_only and old.get("ours")
    if not row["ours"]:
        row["ours"] = checked(our_call(triton_gpu, work, direction), work, arch, direction)
    row["cuda"] = cuda_checked(work, arch, direction)
    row["dense"] = dense(work, arch, direction)
    if not isinstance(work, Case):
        return row | {"theirs": None}  # it has neither
    if old:
        return row | {key: value for key, value in old.items() if key.startswith("their")}
    return row | their_half(work, arch, direction)


def few_tokens(work: Work, arch: int, tokens: int) -> dict[str, Any]:
    """What both our engines launch for few tokens, forward, where bounds mean nothing."""
    engines = {"triton": triton_gpu} | ({} if unserved(work) else {"cuda": cuda_gpu})
    row: dict[str, Any] = {"case": str(work), "arch": arch, "tokens": tokens}
    for name, engine in engines.items():
        call = our_call(engine, work, "forward")
        row[name] = of_few_tokens(engine, call, work, arch, tokens)
    return row


def of_few_tokens(engine: Any, call: Call, work: Work, arch: int, tokens: int) -> dict[str, Any]:
    sms = DEVICES[GPUS[arch]].sms
    operands = work.operands(tokens, "cpu")

    @contextmanager
    def device() -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if engine is cuda_gpu:
                yield stack.enter_context(cuda_device(arch))
            else:
                stack.enter_context(pretending(arch, sms))
                yield stack.enter_context(Mill(arch))

    with device() as gpu:
        result = call(*operands)
    errors(result, work, "forward", tokens)

    def some(launch: Launch, _: list) -> list[int]:
        blocks = math.prod(launch.grid)
        return sorted({0, blocks // 2, blocks - 1})

    with sampled(some) as samples, device():
        call(*operands)
    launches = [
        {
            "name": launch.name,
            "blocks": math.prod(launch.grid),
            "warps": launch.num_warps,
            "bytes": 32 * (launch.traffic["load_sectors"] + launch.traffic["store_sectors"]),
            "instructions_of_a_block": max(
                sum(n for code, n in counts[0].items() if not FREE.match(code))
                for counts in blocks.values()
            ),
        }
        for launch, blocks in zip(gpu.launches, samples, strict=True)
    ]
    path = [one["instructions_of_a_block"] for one in launches]
    warps = [one["warps"] for one in launches]
    return {
        "launches": len(launches),
        "multiprocessors_at_work": min(min(sms, one["blocks"]) for one in launches),
        "bytes": sum(one["bytes"] for one in launches),
        "instructions_of_the_busiest_blocks": sum(path),
        "of_a_warp_of_theirs": sum(p / w for p, w in zip(path, warps, strict=True)),
        "kernels": launches,
    }
