"""Our Triton and CUDA kernels, those of LyCORIS and a dense GEMM, through one mill, without a GPU.

    pip install triton einops toml tqdm safetensors
    pip install --no-deps lycoris-lora==4.1.3
    TRITON_DEFAULT_FP_FUSION=1 python -m benchmarks.gpu.side_by_side --json side_by_side.json
    python -m benchmarks.gpu.side_by_side --match "384x384 2x2" --arch 80
    python -m benchmarks.gpu.side_by_side --reuse side_by_side.json  # our halves anew: minutes
    python -m benchmarks.gpu.side_by_side --cuda-only --match "8x attention forward" --arch 80

The CUDA kernels take nvcc and a C++ compiler. The last command prints each of their launches; with
``--json`` it writes all rows, of which only theirs are new.

Nothing here is calibrated on hardware and nothing is a time. All are compiled for the architecture,
executed by the PTX simulator of the tests, and held to a float64 oracle on few tokens; their counts
are those of ``TOKENS`` tokens, and ``bounds.lower_bound`` makes bounds of them that only rank.
A call's bound is the sum over its launches. What PyTorch computes around the kernels (the sums over
partial gradients; LyCORIS's own products in some compositions) is counted on every side as if it
ran at the peak of DRAM or of the tensor cores: too cheap, and its instructions not at all. Our CUDA
kernels leave it nothing but casts. Spills are in the report, but not in the bound.

How counts are carried over, of what Triton compiles: a dry run at ``TOKENS`` tokens on tensors
without memory compiles the same call and gives the grids. Launches whose grid grows with the tokens
scale with it. Others, whose programs share the tokens, run on two token counts: that tells a
program's part from a token's.

Our CUDA kernels are launched as they are at ``TOKENS`` tokens, with the card's multiprocessors and
shared memory, which their tile rule looks at; of each launch one or two blocks are executed. What a
block does is the same in all blocks that go as often round their loop over tokens, so

- a forward scales with its blocks, and these with the tokens;
- a gradient's blocks are as many as the multiprocessors allow and do not grow with the tokens; a
  block costs ``α + β rounds``, and how often each goes round is read from the launch's arguments.
  Blocks that go round more often than others are in ``tail``, filled in order into whatever block
  ends first;
- ``sum_parts`` costs what the blocks before it leave, by multiprocessors and not by tokens.

DRAM is counted alike: operands once, and what is written, partial sums too.

LyCORIS chooses by timing: an analytic model ranks, a shortlist is timed, and so are the ways to
compose a call (``tiled``, ``gemm``, ``atomic``; backward ``gemm``, ``atomic``, ``dxn``, ``apply``).
Here its own planner and its own shortlist run with the published rates of the device, and our bound
takes the place of the clock, so it gets the best that our cost model sees. Compositions wholly of
PyTorch are no kernels and left out. Its public ``kron_bypass`` takes no factor with a side over
128; the kernels do, and are called directly. ``atomic`` adds up gradients in no fixed order, and
the bound counts an atomic as a store; all that we launch is deterministic. It has neither
feed-forward blocks nor several products of one x.

Columns: bytes is 32 times the sectors of loads, stores and atomics a token; instructions are warp
instructions of PTX a token, without moves, where no side has a product by PyTorch; bound is in
microseconds at ``TOKENS`` tokens. Of ``FEW`` tokens, where bounds mean nothing, both our engines'
launches, multiprocessors at work, bytes moved, and the instructions of a launch's busiest block,
summed over launches: of all its warps, and of one of them on average.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from benchmarks.gpu import ROOT
from benchmarks.gpu.side_by_side.costs import compact
from benchmarks.gpu.side_by_side.cuda import compile_ahead
from benchmarks.gpu.side_by_side.mill import GPUS
from benchmarks.gpu.side_by_side.rows import few_tokens, side_by_side
from benchmarks.gpu.side_by_side.tables import (
    METRICS,
    print_few,
    print_launches,
    print_row,
    print_summary,
)
from benchmarks.gpu.side_by_side.works import FEW, LABELS, TOKENS, matches, works
from kron_kernels.backends.triton import launch as triton_gpu

RESULTS = ROOT / "benchmarks" / "results" / "gpu_side_by_side.json"


def digest(folder: Path, pattern: str) -> str:
    """Which version of our kernels was weighed, also where it is not committed."""
    sources = sorted(folder.glob(pattern))
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--reuse", type=Path, help="take LyCORIS's half from these results")
    parser.add_argument("--match", default="", help="only cases with these words: 8x up backward")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument(
        "--cuda-only",
        action="store_true",
        help="weigh our CUDA kernels only, print their launches; with --json also all rows",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    knobs.language.default_fp_fusion = True  # whatever the environment says

    source = options.reuse or (RESULTS if options.cuda_only else None)
    old = json.loads(source.read_text()) if source else {"rows": []}
    known = {(row["case"], row["arch"], row["direction"]): row for row in old["rows"]}
    chosen = [one for one in works() if matches(options.match, *one)]
    compile_ahead(options.arch, {str(work.dtype)[6:] for work, _ in chosen})
    if options.cuda_only and not options.json:
        for arch in options.arch:
            for work, direction in chosen:
                print_launches(work, arch, direction, known.get((str(work), arch, direction), {}))
        return

    names = ("torch", "triton", "lycoris-lora")
    results: dict[str, Any] = {
        "about": "uncalibrated lower bounds that only rank; see benchmarks/gpu/side_by_side",
        "tokens": TOKENS,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "our_kernels": digest(Path(triton_gpu.__file__).parent, "*.py"),
        "cuda_kernels": digest(ROOT / "csrc" / "cuda", "*"),
        "rows": [],
        "few_tokens": [],
    }
    if options.cuda_only:
        results["our_kernels"] = old["our_kernels"]

    def keep() -> None:
        if options.json:
            options.json.write_text(compact(results))

    header = " | ".join(f"{metric:>20}" for metric in METRICS)
    print(f"{'LyCORIS/Triton/CUDA':<50} {'sm':<2} {'':<8} {header} | dense | least bound")
    for arch in options.arch:
        for work, direction in chosen:
            began = time.monotonic()
            half = known.get((str(work), arch, direction), {})
            row = side_by_side(work, arch, direction, half, options.cuda_only)
            row["seconds_of_simulation"] = round(time.monotonic() - began, 1)
            results["rows"].append(row)
            print_row(row)
            keep()
    for arch in options.arch:
        for work, direction in chosen:
            preset = str(work).rsplit(" ", 1)[0] in LABELS and work.dtype == torch.float16
            for tokens in FEW if preset and direction == "forward" else ():
                results["few_tokens"].append(few_tokens(work, arch, tokens))
                print_few(results["few_tokens"][-1])
                keep()
    print_summary(results["rows"])


if __name__ == "__main__":
    main()
