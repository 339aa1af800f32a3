"""Shapes and operands that every test draws alike; the benchmarks have them too."""

from kron_kernels.testing.cases import SHAPES, draw, name

__all__ = ["SHAPES", "draw", "name"]
