"""A GPU of numpy: it executes, on the CPU, the PTX that Triton's compiler or nvcc emits.

    with Device(arch=80) as gpu:
        kernel[grid](tensor, ..., num_warps=4)  # Triton's whole pipeline, then the PTX, in place
    gpu.launches[0].traffic

The tensors are ordinary CPU tensors. What is wrong raises SimulationError from the launch, with
the kernel, the PTX line, the source line, the tensor, the CTA and the thread. Found are

- accesses beyond a tensor's storage, to shared or to local memory that is not there, through null
  pointers, and misaligned ones; reads of memory given to `Device.expect_written` before it is
  written;
- races between the warps of a CTA in shared memory, by vector clocks that barriers join; an
  asynchronous copy writes when it is waited for, and a wgmma reads until it is waited for;
- races between CTAs in global memory, where only atomics and ordered accesses may meet (a lock
  therefore needs `races=False`);
- cp.async's target read before the copy's wait; copies and wgmmas that nobody waits for;
- barriers that only a part of a warp reaches, that threads meet at different places, or that never
  complete; warp-wide instructions of incomplete warps; shuffles from inactive lanes.

Executed are the instructions that Triton 3.5 to 3.9 emit for sm_80 to sm_90 and sm_120: integer,
float, half, bfloat and packed arithmetic, loads and stores, atomics, shuffles, votes, cp.async,
ldmatrix, stmatrix, mma.sync (f16, bf16, tf32, int8) and wgmma (f16, bf16, tf32), with f32 sums.
Anything else is refused by name when it is reached, never skipped.

Floats follow PTX's rounding, but: an fma is rounded once from a float64 sum (twice in rare ties;
for f64 always twice), approximate functions give the exact value rounded, a tf32 operand loses its
lower 13 bits, and a matrix product sums in float32 in no particular order.

It proves nothing about
- weak memory: every access is seen by all at once, a missing fence is not noticed;
- threads of one warp racing with each other: they are in step until they branch;
- wgmma's registers: a result read before its wait is already there;
- ptxas: PTX is executed, not the machine code made of it;
- TMA, mbarrier, clusters, sm_100's tensor memory, products of fp8 and with f16 sums (refused);
- the tensor cores' own rounding; AMD's code, which is only compiled;
- time: it counts instructions, sectors and bank conflicts, and knows of no clock.

ptx parses; operands finds registers; floats, integers, bits, moves, conversions, loads, copies,
warps, matrix and wgmma make instructions executable, and register them by steps; machine holds a
batch of CTAs and scheduler runs it; access, races and traffic watch memory; launch runs a grid,
and driver is Triton's side.
"""

from .driver import Device
from .errors import SimulationError
from .launch import Launch, Structure, run_ptx

__all__ = ["Device", "Launch", "SimulationError", "Structure", "run_ptx"]
