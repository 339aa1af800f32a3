"""Whether a module's parameters may be read in place of a call of it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def unobserved(module: nn.Module) -> bool:
    """Whether a call of this module runs its class's ``forward`` and nothing else.

    Not so with a hook of any kind, on it or on all modules, nor if the module has a ``forward`` of
    its own (accelerate moves parameters by one, other tools replace the computation) or was
    compiled by ``module.compile()``. ``nn.utils.prune`` and ``weight_norm`` are hooks.

    It asks what ``nn.Module.__call__`` asks. Whether the class is one whose forward the caller
    knows is for the caller to say.
    """
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or torch_module._has_any_global_hook()
    )
