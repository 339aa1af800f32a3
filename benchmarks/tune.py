"""``python -m benchmarks.tune``: tiles for the Triton kernels, measured on this GPU."""

import sys

from benchmarks.gpu.tune import main

if __name__ == "__main__":
    sys.exit(main())
