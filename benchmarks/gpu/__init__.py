"""What wants a GPU, and what can be said of GPU kernels without one.

With a GPU, or its simulator:

- ``__main__``: the command, ``python -m benchmarks.gpu``; ``jobs`` is what it runs, ``processes``
  how a crash or a hang costs one job only, ``report`` what it writes
- ``correctness``: which checks are made. ``products``, ``blocks`` and ``programs`` have them, and
  ``checks`` and ``cases`` what they share with the tests
- ``timing``: which cells are timed, and how; ``contenders``: who takes part; ``clocks``
- ``tune``: measures tiles for the Triton kernels, ``python -m benchmarks.tune``
- ``environment``: what the machine has

Without a GPU:

- ``static``: a compiled kernel read; ``bounds``: the least time that ``devices`` allow it
- ``triton_budget``, ``cuda_budget``: what the kernels may cost (``budget`` is what they share)
- ``side_by_side``: our kernels, LyCORIS's and dense layers by those bounds
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The simulator and the emulator live in tests/, which is no package.
if str(ROOT / "tests/gpu") not in sys.path:
    sys.path.append(str(ROOT / "tests/gpu"))
