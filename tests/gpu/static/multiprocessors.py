"""What the hardware offers: published limits of GPUs and of their multiprocessors.

``MULTIPROCESSORS`` says how many blocks fit on one multiprocessor (SM; CU at AMD), ``DEVICES`` how
fast whole cards are at most; ``static`` reads the former, ``bounds`` the latter. Peak rates only:
no number here was measured, and a real kernel reaches none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks resident on one multiprocessor share.

    Registers are 32 bits wide and counted over all lanes. They lie in ``partitions`` equal parts,
    one for each scheduler, and a warp takes all of its own from one part, in whole units.
    """

    warp: int  # threads
    threads: int  # resident at once
    blocks: int  # resident at once
    shared: int  # bytes
    shared_per_block: int  # bytes that one block may ask for
    shared_unit: int  # bytes; what a block takes is rounded up to it
    shared_reserve: int  # bytes that the system takes for every block
    registers: int = 65536
    register_unit: int = 256  # a warp's registers are rounded up to it
    registers_per_thread: int = 255
    partitions: int = 4


def _nvidia(threads: int, blocks: int, shared: int) -> Multiprocessor:
    """From compute capability 8.0 on only these three differ; ``shared`` is in KiB."""
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


@dataclass(frozen=True)
class Device:
    """Peak rates of one card.

    ``tensor_tflops`` is the dense fp16 rate with float32 accumulation, which is what ``tl.dot``
    asks for; on GeForce cards it is half the rate with fp16 accumulation. The lanes are results
    per clock and SM: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic
    Instructions".
    """

    capability: int  # as in sm_80
    sms: int
    clock_ghz: float  # the highest that is published, as a bound from below needs it
    dram_gb_s: float
    l2_bytes_per_clock: int  # of the whole card
    tensor_tflops: float
    fp32_lanes: int  # per SM
    special_lanes: int  # per SM: exp2, log2, reciprocal, square root, sine


# NVIDIA publishes the width of the L2 cache for the A100 alone. For the others it is assumed that
# every SM takes at most 64 bytes a clock, which no cache can exceed: a weaker bound, still a bound.
_L2_PER_SM = 64

DEVICES: dict[str, Device] = {
    # SXM4 80 GB. "NVIDIA A100 Tensor Core GPU Architecture" whitepaper: SMs, clock, L2, tensor;
    # "NVIDIA A100" data sheet: DRAM.
    "A100": Device(80, 108, 1.41, 2039, 5120, 312, 64, 16),
    # SXM5 80 GB. "NVIDIA H100 Tensor Core GPU Architecture" whitepaper: SMs, tensor (at 1.83 GHz),
    # clock of the other units; "NVIDIA H100" data sheet: DRAM.
    "H100": Device(90, 132, 1.98, 3350, 132 * _L2_PER_SM, 989.4, 128, 16),
    # "NVIDIA Ada GPU Architecture" whitepaper, appendix on the GeForce RTX 4090.
    "RTX 4090": Device(89, 128, 2.52, 1008, 128 * _L2_PER_SM, 165.2, 128, 16),
    # "NVIDIA RTX Blackwell GPU Architecture" whitepaper, appendix on the GeForce RTX 5090.
    "RTX 5090": Device(120, 170, 2.407, 1792, 170 * _L2_PER_SM, 209.5, 128, 16),
    # "NVIDIA Ampere GA102 GPU Architecture" whitepaper, appendix on the GeForce RTX 3090.
    "RTX 3090": Device(86, 82, 1.695, 936, 82 * _L2_PER_SM, 71, 128, 16),
    # "NVIDIA HGX B200" data sheet, one of eight: DRAM, tensor, and the clock from its 75 TFLOP/s
    # of float32 over 148 · 128 · 2; the 148 SMs are what the driver reports (cudaDeviceProp).
    "B200": Device(100, 148, 1.98, 8000, 148 * _L2_PER_SM, 2250, 128, 16),
}
