"""Whether a module's parameters may be read in place of a call of it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def unobserved(module: nn.Module) -> bool:
    """Whether a call of this module runs its class's ``forward`` and nothing else.

    False if any hook is set, on the module or globally, if the instance has its own ``forward`` (as
    accelerate's offloading sets), or after ``module.compile()``. ``nn.utils.prune`` and
    ``weight_norm`` are hooks.

    It asks what ``nn.Module.__call__`` asks. The caller must check the class.
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
