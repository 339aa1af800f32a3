"""Ways to observe or replace a module's call, for tests of code that bypasses it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as hooks


@contextmanager
def _hook(register: Callable) -> Iterator[None]:
    handle = register()
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _own_forward(module: nn.Module, seen: list) -> Iterator[None]:
    """Replace the module's forward, as accelerate's hooks do."""
    forward = module.forward

    def watched(*args, **kwargs):
        seen.append(module)
        return forward(*args, **kwargs)

    module.forward = watched
    try:
        yield
    finally:
        del module.forward


def _watch(register: Callable) -> Callable:
    """For a register function of one module, or of all modules."""

    def watching(module: nn.Module, seen: list):
        def hook(called, *_):
            if called is module:
                seen.append(module)

        if register.__name__.startswith("register_module"):
            return _hook(lambda: register(hook))
        return _hook(lambda: register(module, hook))

    return watching


FORWARD = {
    "forward": _watch(nn.Module.register_forward_hook),
    "forward pre": _watch(nn.Module.register_forward_pre_hook),
    "all forward": _watch(hooks.register_module_forward_hook),
    "all forward pre": _watch(hooks.register_module_forward_pre_hook),
    "own forward": _own_forward,
}
BACKWARD = {
    "backward": _watch(nn.Module.register_backward_hook),
    "full backward": _watch(nn.Module.register_full_backward_hook),
    "full backward pre": _watch(nn.Module.register_full_backward_pre_hook),
    "all full backward": _watch(hooks.register_module_full_backward_hook),
    "all full backward pre": _watch(hooks.register_module_full_backward_pre_hook),
}
ALL = FORWARD | BACKWARD
