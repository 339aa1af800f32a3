"""Our Triton and CUDA kernels, LyCORIS's and a dense GEMM through one mill, without a GPU.

``__main__`` says what is measured and how to read it; ``works`` what is compared; ``mill`` notes
what a call launches, ``costs`` bounds it; ``triton``, ``cuda`` and ``lycoris`` are the sides;
``rows`` and ``tables`` put them together.
"""

import os
import tempfile

# LyCORIS's choices are made anew and kept nowhere.
_CACHE = tempfile.TemporaryDirectory()
os.environ["LYCORIS_KERNEL_CACHE_DIR"] = _CACHE.name
