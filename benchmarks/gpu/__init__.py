"""The command for GPU owners, ``python -m benchmarks.gpu``.

- ``__main__`` runs pytest for each section: the tests of tests/gpu that need a GPU, and
  ``measurements``, with the hooks of ``plugin``, within a time; ``order`` puts the checks in turn,
  and ``journal`` keeps each result when it is there
- ``measurements`` times the ``workloads`` of all ``contenders`` and ``models``, and tunes Triton's
  kernels (``tuning``), both by ``timing``, or in the simulator (``simulated``)
- ``environment``, ``failures`` and ``report`` write down the machine and the results
- ``bundle`` makes one file of all this, which ``carried`` runs elsewhere
"""

import time

STARTED = time.time()  # before torch is imported, which takes seconds of a limited time
