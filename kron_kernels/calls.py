"""Whether reading a module's parameters can replace a call of the module."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def unobserved(module: nn.Module) -> bool:
    """Whether a call of this module runs its class's ``forward`` and nothing else.

    False if any hook is set, on the module or globally, such as those of ``nn.utils.prune`` and
    ``weight_norm``; if the instance has its own ``forward``, which accelerate's offloading sets; or
    after ``module.compile()``. These are the conditions in ``nn.Module.__call__``. The caller must
    check the class.
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
