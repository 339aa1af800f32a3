"""What a newer torch or transformers passes to a method of theirs, ours in its place must take."""

import importlib
import inspect
import pkgutil
from inspect import Parameter

import pytest

import kron_kernels
import kroneckerbert

OURS = ("kron_kernels", "kroneckerbert")


def classes():
    for package in (kron_kernels, kroneckerbert):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name in ("kroneckerbert.__main__", "kron_kernels._native"):
                continue
            try:
                found = vars(importlib.import_module(module.name)).values()
            except ImportError:  # of an extra, or of Triton
                continue
            yield from (c for c in found if inspect.isclass(c) and c.__module__ == module.name)


def overrides():
    """Our function and the one of torch, transformers or Python that it stands for."""
    for cls in classes():
        for name, ours in vars(cls).items():
            for base in cls.__mro__[1:]:
                if base.__module__.split(".")[0] not in OURS and name in vars(base):
                    pair = [getattr(f, "__func__", f) for f in (ours, vars(base)[name])]
                    if all(map(inspect.isfunction, pair)) and name != "__init__":
                        yield pytest.param(*pair, id=f"{cls.__name__}.{name}")
                    break


@pytest.mark.parametrize(("ours", "theirs"), list(overrides()))
def test_an_override_takes_every_named_argument_of_what_it_overrides(ours, theirs):
    taken = inspect.signature(ours).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in taken.values()):
        return
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = inspect.signature(theirs).parameters
    wanted = {name for name, p in named.items() if p.kind not in variable and name != "self"}
    assert wanted <= set(taken)
