"""Everything is declared in pyproject.toml; this file will build the compiled kernels."""

from setuptools import setup

setup()
