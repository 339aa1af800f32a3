"""Lets the GPU backends take CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from kron_kernels.backends import gpu


@contextmanager
def cpu_as_gpu(arch: int = 80) -> Iterator[None]:
    """CPU tensors count as those of a GPU of this compute capability."""
    with (
        patch.object(gpu, "on_gpu", lambda x: x.is_cpu),
        patch.object(gpu, "capability", lambda index: divmod(arch, 10)),
    ):
        yield
