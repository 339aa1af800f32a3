"""Published limits of a multiprocessor (SM; at AMD a CU), and how many a card has."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Resources that the resident blocks of a multiprocessor share.

    Registers are 32 bits wide and counted over all lanes. Each of the ``partitions`` schedulers
    has an equal part of them, and a warp takes its registers from one part, in whole units.
    """

    warp: int  # threads
    threads: int  # resident at once
    blocks: int  # resident at once
    shared: int  # bytes
    shared_per_block: int  # bytes that one block may ask for
    shared_unit: int  # bytes; a block's share is rounded up to it
    shared_reserve: int  # bytes reserved by the system for every block
    registers: int = 65536
    register_unit: int = 256  # a warp's registers are rounded up to it
    registers_per_thread: int = 255
    partitions: int = 4


def _nvidia(threads: int, blocks: int, shared: int) -> Multiprocessor:
    """From compute capability 8.0 on only these three limits differ; ``shared`` is in KiB."""
    return Multiprocessor(
        warp=32,
        threads=threads,
        blocks=blocks,
        shared=shared * KIB,
        shared_per_block=(shared - 1) * KIB,
        shared_unit=128,
        shared_reserve=KIB,
    )


# NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability";
# units of allocation: cuda_occupancy.h of the CUDA toolkit.
# AMD: CDNA 3 ISA reference guide (512 vector registers for each of a SIMD's 64 lanes, in units of
# 8; 64 KiB of LDS) and LLVM's AMDGPU backend (8 waves for each of 4 SIMDs, LDS in units of 512).
MULTIPROCESSORS: dict[int | str, Multiprocessor] = {
    80: _nvidia(threads=2048, blocks=32, shared=164),
    86: _nvidia(threads=1536, blocks=16, shared=100),
    89: _nvidia(threads=1536, blocks=24, shared=100),
    90: _nvidia(threads=2048, blocks=32, shared=228),
    100: _nvidia(threads=2048, blocks=32, shared=228),
    120: _nvidia(threads=1536, blocks=24, shared=100),
    "gfx942": Multiprocessor(
        warp=64,
        threads=4 * 8 * 64,
        blocks=32,
        shared=64 * KIB,
        shared_per_block=64 * KIB,
        shared_unit=512,
        shared_reserve=0,
        registers=4 * 512 * 64,
        register_unit=8 * 64,
        registers_per_thread=512,
    ),
}


# Multiprocessors of one card of each generation: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
CARDS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
