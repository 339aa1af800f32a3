"""Which checks are made: the kernels of both engines, held to a float64 oracle on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.blocks import (
    cross_entropy,
    embedding,
    feed_forward,
    feed_forward_in_two,
    many_rows_of_a_table,
    tied_decoder,
    unknown_ids,
)
from benchmarks.gpu.jobs import Job, Place
from benchmarks.gpu.products import (
    autocast,
    beyond_32_bits,
    dispatching,
    forward,
    gradients,
    gradients_that_are_needed,
    nan_stays,
    numbers_of_tokens,
    products_of_one_x,
    same_bits,
    second_order,
    strides,
    transforms,
)
from benchmarks.gpu.programs import (
    compiled,
    compiled_module,
    graph_of_inference,
    graph_of_training,
    out_of_memory,
    second_gpu,
    side_stream,
)
from kron_kernels import KronShape
from kron_kernels.testing.cases import (
    ACTIVATIONS,
    DTYPES,
    FEED_FORWARDS,
    MIXED,
    PAIRS,
    PRESETS,
    SHAPES,
    SQUARES,
    SUMS,
    name,
)

# Those of modules that take an engine by themselves, and those of kernels that only Triton has.
BY_ITSELF = (cross_entropy, compiled_module)
TRITONS = (embedding, unknown_ids, many_rows_of_a_table)


def correctness_jobs(place: Place) -> list[Job]:
    few = place.simulated and place.quick
    jobs = [*_shape_jobs(place), *(_few_jobs() if few else _other_jobs(place))]
    by_cuda = _simulated_cuda_jobs() if place.simulated else jobs
    by_itself = [job for job in jobs if _check(job) in BY_ITSELF]
    return [*of_engine("triton", jobs), *of_engine("cuda", by_cuda), *by_itself]


def of_engine(engine: str, jobs: Sequence[Job]) -> list[Job]:
    others = BY_ITSELF if engine == "triton" else BY_ITSELF + TRITONS
    return [
        Job(f"{engine}: {job.group}", f"{engine}: {job.name}", job.run, engine)
        for job in jobs
        if _check(job) not in others
    ]


def _check(job: Job) -> Callable[..., Any]:
    return getattr(job.run, "func", job.run)


def _simulated_cuda_jobs() -> list[Job]:
    """Of each kind a few, all in float16: nvcc takes half a minute for a dtype, once."""
    (up, down), s, new = FEED_FORWARDS[0], SHAPES[1], {"name": "float16"}
    block = partial(feed_forward, up=up, down=down, tokens=19, activation="gelu", **new)
    few, more = (
        Job(
            "forward",
            f"forward {name(s)}, float16, {tokens} tokens",
            partial(forward, s=s, tokens=tokens, turn=tokens, **new),
        )
        for tokens in (3, 19)  # without and with tensor cores
    )
    return [
        few,
        more,
        Job(
            "gradients",
            f"gradients {name(s)}, float16, 19 tokens",
            partial(gradients, s=s, tokens=19, **new),
        ),
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("query, key, value", "query, key, value", partial(products_of_one_x, s=s, **new)),
        Job("feed-forward", "feed-forward", block),
    ]


def _shape_jobs(place: Place) -> list[Job]:
    """Forward and gradients of every shape and dtype; a quick run takes dtypes in turn."""
    mixed = [*MIXED, *SQUARES, KronShape(20, 33, 70, 17)]
    shapes = [*mixed, *PRESETS.values(), *SUMS]
    if place.simulated:
        shapes = [SHAPES[1], SHAPES[8]] if place.quick else mixed
    jobs = []
    for i, s in enumerate(shapes):
        for j, dtype in enumerate(DTYPES):
            if place.quick and (i + j) % 4:
                continue
            turn = 7 * i + j
            some = (5,) if place.simulated else ((1, 19, 300)[turn % 3], 35)
            for t in some:
                jobs.append(
                    Job(
                        "forward",
                        f"forward {name(s)}, {dtype}, {t} tokens",
                        partial(forward, s=s, name=dtype, tokens=t, turn=turn + t),
                    )
                )
            tokens = 9 if place.simulated else (1, 70, 1000)[turn % 3]
            jobs.append(
                Job(
                    "gradients",
                    f"gradients {name(s)}, {dtype}, {tokens} tokens",
                    partial(gradients, s=s, name=dtype, tokens=tokens),
                )
            )
    return jobs


def _few_jobs() -> list[Job]:
    """One of each kind, with small sizes, and all that the simulator must leave out."""
    up, down = FEED_FORWARDS[1]
    return [
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("forward", "backends", dispatching),
        Job(
            "query, key, value",
            "query, key, value",
            partial(products_of_one_x, s=SHAPES[8], name="float16"),
        ),
        Job(
            "feed-forward",
            "feed-forward",
            partial(feed_forward, up=up, down=down, name="float16", tokens=5, activation="gelu"),
        ),
        Job("tables", "embedding", partial(embedding, rank=2, size=5, name="float32")),
        Job("tables", "ids that are no rows", unknown_ids),
        *_device_jobs(),
    ]


def _device_jobs() -> list[Job]:
    big = PRESETS["8x up"], PRESETS["8x down"]
    return [
        Job("tables", "chunked cross-entropy", cross_entropy),
        Job("programs", "torch.compile, inference", partial(compiled, training=False)),
        Job("programs", "torch.compile of modules", compiled_module),
        Job("programs", "CUDA graph of inference", graph_of_inference),
        Job("programs", "CUDA graph of training", graph_of_training),
        Job("programs", "a side stream", side_stream),
        Job("programs", "a second GPU", second_gpu),
        Job("programs", "out of memory", out_of_memory),
        Job("size", "y of more than 2^31 entries", partial(beyond_32_bits, s=big[0])),
        Job("size", "x of more than 2^31 entries", partial(beyond_32_bits, s=big[1])),
        Job(
            "size",
            "gradients of more than 2^31 entries",
            partial(beyond_32_bits, s=big[1], backward=True),
        ),
        Job("size", "a lookup of more than 2^31 entries", many_rows_of_a_table),
    ]


def _other_jobs(place: Place) -> list[Job]:
    quick = place.quick
    jobs = [
        Job("forward", "numbers of tokens", numbers_of_tokens),
        Job("forward", "strides", strides),
        Job("forward", "a NaN stays in its token", nan_stays),
        Job("forward", "backends", dispatching),
        Job("gradients", "those that are needed", gradients_that_are_needed),
        Job("gradients", "the same bits every time", same_bits),
        Job("gradients", "second order", second_order),
        Job("programs", "vmap, jvp, grad", transforms),
        Job("programs", "torch.compile, training", partial(compiled, training=True)),
        Job("feed-forward", "feed-forward in two launches", feed_forward_in_two),
        Job("tables", "ids that are no rows", unknown_ids),
        Job("tables", "tied decoder", tied_decoder),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        label = f"autocast to {str(dtype)[6:]}"
        jobs.append(Job("programs", label, partial(autocast, dtype=dtype)))
    for s in (PRESETS["21x attention"], SHAPES[8], PRESETS["8x attention"]):
        for dtype in DTYPES[: 1 if quick else 4]:
            run = partial(products_of_one_x, s=s, name=dtype)
            jobs.append(Job("query, key, value", f"{name(s)}, {dtype}", run))
    for i, (up, down) in enumerate([*FEED_FORWARDS, *([] if place.simulated else PAIRS.values())]):
        for j, dtype in enumerate(DTYPES[: 1 if quick else 4]):
            for tokens in (5,) if place.simulated else (1, 35, 1000):
                activation = ACTIVATIONS[1 + (i + j + tokens) % 4]
                more = {"name": dtype, "tokens": tokens, "activation": activation}
                label = f"{name(up)}, {name(down)}, {dtype}, {activation}, {tokens} tokens"
                run = partial(feed_forward, up=up, down=down, **more)
                jobs.append(Job("feed-forward", label, run))
    for rank, size in ((1, 8), (2, 5), (1, 1)):
        for dtype in ("float16", "bfloat16", "float32"):
            run = partial(embedding, rank=rank, size=size, name=dtype)
            jobs.append(Job("tables", f"embedding, rank {rank}, {size} wide, {dtype}", run))
    return [*jobs, *_device_jobs()]
