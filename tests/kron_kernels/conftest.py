"""Tests run with each backend of a CPU, and with each instruction set of the compiled one."""

import pytest
import torch
from engines import EAGER, NATIVE, SETS, backend_of


@pytest.fixture(params=SETS)
def isa(request, monkeypatch) -> str:
    """The instruction set that native uses."""
    backend_of(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["eager", *SETS])
def backend(request, monkeypatch) -> str:
    """A backend's name; native comes once for each instruction set."""
    return backend_of(request.param, monkeypatch)


@pytest.fixture(params=[*EAGER, *NATIVE])
def engine(request, monkeypatch) -> tuple[str, torch.dtype]:
    """A backend's name and a dtype that it supports."""
    name, dtype = request.param
    return backend_of(name, monkeypatch), dtype


def pytest_make_parametrize_id(config, val, argname):
    if argname == "engine":
        return f"{val[0]}-{str(val[1])[6:]}"
    return None
