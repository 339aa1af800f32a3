"""The command for GPU owners, ``python -m benchmarks.gpu``.

- ``__main__`` runs pytest for each section: the tests of tests/gpu that need a GPU, and
  ``measurements``, with the hooks of ``plugin``
- ``measurements`` times the ``workloads`` of all ``contenders`` and tunes the Triton kernels
  (``tuning``), both by ``timing``
- ``environment`` and ``report`` write down the machine and the results
"""
