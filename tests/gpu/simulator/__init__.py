"""A GPU in numpy: executes the PTX of Triton's compiler or of nvcc on the CPU.

    with Device(arch=80) as gpu:
        kernel[grid](tensor, ..., num_warps=4)  # compiled by Triton, executed in place
    gpu.launches[0].traffic

The tensors are ordinary CPU tensors. A finding raises SimulationError from the launch, with the
kernel, PTX line, source line, tensor, CTA and thread. The simulator finds

- accesses outside a tensor's storage, outside shared or local memory, through null pointers, and
  misaligned ones;
- races between the warps of a CTA in shared memory, by vector clocks that barriers join; an
  asynchronous copy counts as a write when it is waited for, a wgmma as a read until then;
- races between CTAs in global memory, where only atomics and ordered accesses may overlap (a lock
  therefore needs `races=False`);
- reads of cp.async's target before the copy's wait; copies and wgmmas without a wait;
- barriers that only part of a warp reaches, that threads reach at different places, or that never
  complete; warp-wide instructions in incomplete warps; shuffles from inactive lanes.

It executes the instructions that Triton 3.4 to 3.9 emit for sm_80 to sm_90 and sm_120: integer,
float, half, bfloat and packed arithmetic, loads and stores, atomics, shuffles, votes, cp.async,
ldmatrix, stmatrix, mma.sync and wgmma (f16, bf16, tf32) with f32 sums. Any other instruction is an
error when it is reached.

Floats are rounded as PTX defines, with these exceptions: an fma is rounded once from a float64 sum
(twice in rare ties; for f64 always twice), approximate functions return the exact value rounded, a
tf32 operand loses its lower 13 bits, and a matrix product sums in float32 in any order.

It shows nothing about
- weak memory: all threads see every access at once, so a missing fence is not found;
- races between the threads of a warp: they run in step until they branch;
- wgmma's registers: a result is available before its wait;
- ptxas: it executes PTX, not machine code;
- TMA, mbarrier, clusters, sm_100's tensor memory, products of fp8 or with f16 sums (errors);
- the tensor cores' own rounding; AMD's code, which is only compiled;
- time: it counts instructions, sectors and bank conflicts, not cycles.

ptx parses. operands resolves registers. floats, integers, bits, moves, conversions, loads, copies,
warps, matrix and wgmma implement instructions, and register them in steps. machine holds a batch of
CTAs, and scheduler runs it. access, races and traffic check and count memory accesses. launch runs
a grid. driver is the front end for Triton, cuda that for the CUDA C++ kernels.
"""

from .driver import Device
from .errors import SimulationError
from .launch import Launch, Structure, run_ptx

__all__ = ["Device", "Launch", "SimulationError", "Structure", "run_ptx"]
