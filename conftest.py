"""Fixtures for the tests of both tests/ and benchmarks/, which do not import each other."""

pytest_plugins = ["machines"]  # tests/gpu/machines.py
