"""Adapters that are Kronecker products, served without forming the product.

LoKr, of PEFT and of LyCORIS, and KronA add ``s (A ⊗ B)`` to a trained weight. Their libraries form
that matrix, as large as the weight, in each forward pass or once for good; here it is a product
that adds to the layer's result.

    serve_lokr(model)  # a model with LoKr adapters of PEFT; unserve_lokr(model) goes back
    a, b = lokr_factors(state, scale=alpha / r)  # one layer of a file
    layer = AdaptedLinear(linear, a, b)

Sources: LoKr, Yeh et al. 2024 (arXiv 2309.14859); KronA, Edalati et al. 2022 (arXiv 2212.10650).
PEFT and LyCORIS are never imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.checks import check_tensor
from kron_kernels.dispatch import BackendName
from kron_kernels.functional import kron_matmul
from kron_kernels.shapes import check_mapping

# The tensors of one layer. A half is whole, or a product of two; t2 is between the two of w2.
_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- Files


def lokr_factors(
    state: Mapping[str, Tensor | float], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The factors of one layer's LoKr: it changes the layer's weight ``(m, n)`` by ``A ⊗ B``.

    Halves of low rank are multiplied out, and the scale is multiplied into the factor with fewer
    entries. Differentiable in the tensors, which are returned themselves where nothing is to do.

    Args:
        state: The layer's tensors by the names that PEFT and LyCORIS give them, of floating point:
            ``lokr_w1 (m1, n1)``, or ``lokr_w1_a (m1, r)`` and ``lokr_w1_b (r, n1)``;
            ``lokr_w2 (m2, n2)``, or ``lokr_w2_a (m2, r)`` and ``lokr_w2_b (r, n2)``, or these with
            ``lokr_t2 (r, r)`` (Tucker) and ``lokr_w2_a (r, m2)``. Those of a convolution may have
            further sides of 1. LyCORIS adds the number ``alpha``. (PEFT 0.21 computes ``B ⊗ A`` in
            an ``nn.Conv1d`` whose w2 is whole; swap its results.)
        scale: s. By default LyCORIS' rule for ``alpha``: ``alpha / r``, and 1 where both halves are
            whole or ``alpha`` is 0. PEFT's files have no alpha: its scale is ``alpha / r`` of
            ``adapter_config.json`` for halves of any kind. A scale given here replaces the rule.

    Returns:
        ``(a, b)``: ``(m1, n1)`` and ``(m2, n2)``, with ``m1 m2 = m`` and ``n1 n2 = n``, of one
        dtype; for ``kron_matmul`` and ``AdaptedLinear``.

    Raises:
        TypeError: If the state is not a mapping from strings, or a value not a dense tensor.
        ValueError: If a tensor is missing, of the wrong shape or not of floating point, if a name
            is unknown (``dora_scale`` changes W0 as well), if the kernel of a convolution is larger
            than 1, or if there is neither ``alpha`` nor a scale.
    """
    check_mapping("state", state, '{"lokr_w1": w1, "lokr_w2": w2}')
    _check_names(state)
    ranks = [_check_half(state, name) for name in ("lokr_w2", "lokr_w1")]
    if scale is None:
        scale = _scale_by_alpha(state, max(ranks))
    return _multiplied(state, _finite("scale", scale))


def split_lokr(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The LoKr layers of a file of PEFT or LyCORIS, and everything else in it.

    Args:
        tensors: All tensors of the file by name, such as
            ``base_model.model.encoder.query.lokr_w1`` (PEFT) and ``lora_unet_mid_attn.lokr_w2_a``
            (LyCORIS).

    Returns:
        ``(layers, others)``. ``layers`` has a ``state`` for ``lokr_factors`` by the name before its
        last point, without PEFT's ``base_model.model.``. LyCORIS writes a layer's path with
        underscores for points, after a prefix. ``others`` has what is left, which an adapted model
        needs as well: other algorithms, and PEFT's ``modules_to_save``.

    Raises:
        TypeError: If it is not a mapping from strings.
        ValueError: If it has no LoKr layer.
    """
    check_mapping("tensors", tensors, '{"query.lokr_w1": w1, "query.lokr_w2": w2}')
    divided = {key: key.rpartition(".")[::2] for key in tensors}
    owners = {owner for owner, name in divided.values() if name in _PARTS}
    if not owners:
        example = next(iter(tensors), "no tensor")
        raise ValueError(
            f"the file has no LoKr layer: none of its {len(tensors)} names ({example}, …) ends in "
            f"{', '.join(_PARTS)}; was it saved by another method?"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, (owner, name) in divided.items():
        if owner in owners:
            path = owner.removeprefix("base_model.model.")
            layers.setdefault(path, {})[name] = tensors[key]
    return layers, {key: tensors[key] for key, (owner, _) in divided.items() if owner not in owners}


def _check_names(state: Mapping[str, Any]) -> None:
    for name in state:
        if name == "dora_scale":
            raise ValueError(
                "state has dora_scale: the weight is divided by norms of W0 + A ⊗ B, which must be "
                "formed for that; merge this adapter in its own library."
            )
        if name not in (*_PARTS, "alpha"):
            raise ValueError(
                f"state has {name!r:.80}, which is no tensor of a LoKr layer; they are "
                f"{', '.join(_PARTS)} and alpha. A whole file is divided by split_lokr."
            )


def _check_half(state: Mapping[str, Any], name: str) -> int:
    """The rank of w1 or w2; 0 for one that is whole."""
    pair = [f"{name}_a", f"{name}_b"]
    core = ["lokr_t2"] if name == "lokr_w2" else []
    given = [key for key in (name, *pair, *core) if key in state]
    if given not in ([name], pair, [*pair, *core]):
        tucker = ", and may have lokr_t2 with these" if core else ""
        raise ValueError(
            f"state must have either {name}, or both {' and '.join(pair)}{tucker}; "
            f"it has {', '.join(given) or 'none of them'}."
        )
    for key in given:
        _check_matrix(key, state[key])
    if len(given) == 1:
        return 0
    left, right, *between = (state[key].shape for key in given)
    rank = right[0]
    sides = [left[0], *between[0][:2]] if between else [left[1]]
    if any(side != rank for side in sides):
        shapes = ", ".join(f"{key} {tuple(state[key].shape)}" for key in given)
        raise ValueError(f"the low rank must be the same in all of {shapes}; is the file whole?")
    return rank


def _check_matrix(name: str, t: Any) -> None:
    check_tensor(name, t)
    if not t.is_floating_point():
        raise ValueError(f"{name} is {t.dtype}, but must be of floating point; use .float().")
    if t.ndim < 2 or 0 in t.shape:
        raise ValueError(
            f"{name} must be a matrix with every side at least 1, got shape {tuple(t.shape)}; is "
            "the file whole?"
        )
    if any(side != 1 for side in t.shape[2:]):
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} is of a convolution with a kernel of "
            f"{tuple(t.shape[2:])}, and only one of 1 is a matrix product; merge this layer in its "
            "own library."
        )


def _scale_by_alpha(state: Mapping[str, Any], rank: int) -> float:
    if "alpha" not in state:
        raise ValueError(
            "state has no alpha, so a scale is needed: PEFT's is alpha / r of adapter_config.json, "
            "KronA's its s; scale=1.0 takes A ⊗ B as it is."
        )
    alpha = _finite("alpha", state["alpha"])
    return alpha / rank if rank and alpha else 1.0


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # torch's are RuntimeErrors
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} = {value!r:.80} must be a finite number.")
    return number


def _multiplied(state: Mapping[str, Any], scale: float) -> tuple[Tensor, Tensor]:
    """The factors of checked tensors, times the scale."""
    w1, w2 = state.get("lokr_w1"), state.get("lokr_w2")
    if w1 is None:
        w1 = state["lokr_w1_a"] @ state["lokr_w1_b"]
    if w2 is None:
        left, right = _matrix(state["lokr_w2_a"]), _matrix(state["lokr_w2_b"])
        if "lokr_t2" in state:
            left = left.mT @ _matrix(state["lokr_t2"])
        w2 = left @ right
    return _scaled(_matrix(w1), _matrix(w2), scale)


def _matrix(t: Tensor) -> Tensor:
    """``(m, n)`` of a tensor that may have further sides of 1."""
    return t.flatten(1) if t.ndim > 2 else t


def _scaled(w1: Tensor, w2: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The factors of ``scale (w1 ⊗ w2)``, of one dtype."""
    if w1.dtype != w2.dtype:  # as torch.kron promotes them
        dtype = torch.promote_types(w1.dtype, w2.dtype)
        w1, w2 = w1.to(dtype), w2.to(dtype)
    if scale != 1:
        if w1.numel() <= w2.numel():
            w1 = w1 * scale
        else:
            w2 = w2 * scale
    return w1, w2


# --- One layer


class AdaptedLinear(nn.Module):
    """``y = base_layer(x) + s x (Σ_k A_k ⊗ B_k)ᵀ`` in one call after the base layer's.

    The parameters are ``a (rank, m1, n1)``, times s, and ``b (rank, m2, n2)``. They have the
    ``requires_grad`` of the tensors given, and at least the precision of the base layer's weight.
    The result has the dtype of the base layer's. Several adapters of a layer: adapt the result
    again, or stack factors of equal shapes to ``(rank, …)``.

    Args:
        base_layer: ``nn.Linear``, a ``KroneckerLinear``, or another module from ``(…, n)`` to
            ``(…, m)``; or a convolution from n to m channels with a kernel of 1, without padding
            and groups.
        a: ``(m1, n1)``, or ``(rank, m1, n1)`` for a sum. ``lokr_factors`` returns both.
        b: ``(m2, n2)`` or ``(rank, m2, n2)``, with ``m1 m2 = m`` and ``n1 n2 = n``.
        scale: s, the adapter's strength; negative to take its change away.
        backend: Passed to ``kron_matmul``.

    Raises:
        TypeError: If a factor is not a dense tensor.
        ValueError: If the factors do not fit one another or the base layer, or the base layer is
            another convolution.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        *,
        backend: BackendName = "auto",
    ):
        super().__init__()
        for name, t in (("a", a), ("b", b)):
            check_tensor(name, t)
            if t.ndim not in (2, 3) or 0 in t.shape or not t.is_floating_point():
                raise ValueError(
                    f"{name} must be (m, n) or (rank, m, n), of floating point and with every side "
                    f"at least 1, got {t.dtype} of shape {tuple(t.shape)}."
                )
        factors = [t if t.ndim == 3 else t[None] for t in (a, b)]
        (rank, m1, n1), (rank2, m2, n2) = (t.shape for t in factors)
        if rank != rank2:
            raise ValueError(f"a and b must have one Kronecker rank, got {rank} and {rank2}.")
        inner: Any = base_layer
        while isinstance(getattr(inner, "base_layer", None), nn.Module):  # ours, or PEFT's
            inner = inner.base_layer
        if reason := _why_not(inner):
            raise ValueError(f"base_layer cannot be adapted: {reason}.")
        rows, columns = (
            getattr(inner, f"{side}_features", getattr(inner, f"{side}_channels", None))
            for side in ("out", "in")
        )
        self.in_features, self.out_features = n1 * n2, m1 * m2
        if (rows, columns) not in ((None, None), (self.out_features, self.in_features)):
            raise ValueError(
                f"the factors are of a weight ({m1} * {m2}, {n1} * {n2}) = ({m1 * m2}, {n1 * n2}), "
                f"but base_layer's is ({rows}, {columns}); is the adapter of another layer?"
            )
        self.base_layer, self.backend = base_layer, backend
        self.stride = tuple(inner.stride) if isinstance(inner, _CONVOLUTIONS) else None
        dtype = torch.promote_types(a.dtype, b.dtype)
        weight = next(filter(Tensor.is_floating_point, base_layer.parameters()), a)
        like: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, dtype)}
        left, right = (t.detach().to(**like) for t in factors)
        left, right = _scaled(left, right, _finite("scale", scale))
        self.a, self.b = nn.Parameter(left, a.requires_grad), nn.Parameter(right, b.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, n)`` to ``y (…, m)``; images ``(…, n, height, width)`` for a convolution."""
        y = self.base_layer(x)
        return _added(y, x, self.a, self.b, self.stride, self.backend).to(y.dtype)

    def extra_repr(self) -> str:
        (rank, m1, n1), (_, m2, n2) = self.a.shape, self.b.shape
        return f"in_features={n1}*{n2}, out_features={m1}*{m2}, rank={rank}"


def _why_not(layer: nn.Module) -> str | None:
    """Why no matrix can be added to this layer's, as the end of a sentence, or None."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.RNNBase):
        return f"it is of class {type(layer).__name__}, which is not a product by one matrix"
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    if any(side != 1 for side in layer.kernel_size):
        return f"its kernel is {tuple(layer.kernel_size)}, and only one of 1 is a matrix product"
    if layer.groups != 1:
        return f"it has {layer.groups} groups, each with a matrix of its own"
    if not isinstance(layer.padding, str) and any(layer.padding):
        return f"it has a padding of {tuple(layer.padding)} around a kernel of 1"
    return None


def _added(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    stride: tuple[int, ...] | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``y + x (Σ_k A_k ⊗ B_k)ᵀ``, in y's dtype promoted with a's; with a convolution's stride."""
    if x.dtype != a.dtype:  # PEFT keeps adapters in float32 beside 16-bit weights
        x = x.to(a.dtype)
    if stride is None:
        return kron_matmul(x, a, b, residual=y, backend=backend)
    channels = -1 - len(stride)
    steps: Any = (..., *(slice(None, None, step) for step in stride))
    x = x[steps]
    wide = a.dtype in (torch.float32, torch.float64) and y.dtype == a.dtype
    if backend == "auto" and wide and y.is_contiguous():
        return _added_to_channels(y, x, a, b, channels)
    x, last = (t.movedim(channels, -1) for t in (x, y))  # (…, height, width, channels)
    out = kron_matmul(x, a, b, residual=last, backend=backend).movedim(-1, channels)
    # The layout of the convolution's result: channels last in memory if x has them so.
    return out.contiguous() if y.is_contiguous() else out


def _added_to_channels(y: Tensor, x: Tensor, a: Tensor, b: Tensor, channels: int) -> Tensor:
    """``_added`` for images with their channels first in memory, from the left, in PyTorch.

    With the channels moved last, copies of x, y and the result would take more time than forming
    the product: 16x16 ⊗ 20x20 on images of 64 x 64, the convolution's 10 ms included, 25 ms instead
    of 13, and 21 by PEFT (one thread, AVX2).
    """
    a, b = (t if t.ndim == 3 else t[None] for t in (a, b))
    (rank, m1, n1), (_, m2, n2) = a.shape, b.shape
    images, pixels = math.prod(y.shape[:channels]), math.prod(y.shape[channels:][1:])
    z = b.reshape(rank * m2, n2) @ x.reshape(images, n1, n2, pixels)  # (…, n1, rank * m2, pixels)
    z = z.view(images, n1 * rank, m2 * pixels)
    a = a.permute(1, 2, 0).reshape(m1, n1 * rank).expand(images, -1, -1)
    return torch.baddbmm(y.view(images, m1, m2 * pixels), a, z).view(y.shape)


# --- A model with PEFT


def serve_lokr(model: nn.Module) -> dict[str, str]:
    """Compute the LoKr adapters of a model without forming their products, in place.

    The layers stay PEFT's, with PEFT's parameters and names: adapters can be added, scaled,
    switched, disabled, merged, trained, saved and deleted as before, and count at once. Only the
    computation of a layer changes. PEFT's own is used where adapters are disabled or merged, and
    in training mode with ``rank_dropout`` or ``module_dropout``. (Without these, PEFT still draws a
    random number for each layer in training; a served layer draws none.)

    Args:
        model: With LoKr adapters of PEFT 0.14 or later: of ``peft.get_peft_model``,
            ``PeftModel.from_pretrained``, ``inject_adapter_in_model``, or a part of such a model.

    Returns:
        The layers that PEFT still computes, by path, each with the reason: layers other than
        ``nn.Linear`` and ``nn.Conv2d`` with a kernel of 1, without padding and groups, and layers
        with a forward of their own.

    Raises:
        ValueError: If the model has no LoKr layer.
    """
    # A model with LoKr layers has imported PEFT.
    lokr = sys.modules.get("peft.tuners.lokr.layer")
    found, left = False, {}
    for path, layer in model.named_modules():
        if isinstance(layer, _Served):
            found = True
        elif lokr and isinstance(layer, lokr.LoKrLayer):
            found = True
            if "forward" in vars(layer) or layer.__class__.__module__ != lokr.__name__:
                left[path] = f"it has a forward of its own, of {type(layer).__name__}"
            elif not isinstance(layer, (lokr.Linear, lokr.Conv2d)):
                # In version 0.21 its Conv1d takes whole halves in the other order, low rank not.
                left[path] = f"it is a {type(layer).__name__}"
            elif reason := _why_not(layer.get_base_layer()):
                left[path] = reason
            else:
                peft_class: Any = type(layer)
                layer.__class__ = _served(peft_class)
    if not found:
        raise ValueError(
            f"the {type(model).__name__} has no LoKr layer of PEFT; load the adapter with "
            "PeftModel.from_pretrained first, or use AdaptedLinear for factors from elsewhere."
        )
    return left


def unserve_lokr(model: nn.Module) -> None:
    """Let PEFT compute the LoKr adapters of a model again; undoes ``serve_lokr``, in place.

    Args:
        model: Any model; one that is not served is left as it is.
    """
    for layer in model.modules():
        if isinstance(layer, _Served):
            layer.__class__ = layer.peft_class


class _Served(nn.Module):
    """Before a LoKr class of PEFT, in the bases of the class that ``_served`` makes."""

    peft_class: type
    convolves: bool
    # Of PEFT's layer:
    base_layer: nn.Module
    get_base_layer: Callable[[], Any]
    active_adapters: list[str]
    scaling: dict[str, float]
    rank_dropout: dict[str, float]
    module_dropout: dict[str, float]
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or (self.training and self._drops()):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        stride = self.get_base_layer().stride if self.convolves else None
        for name in self.active_adapters:
            if state := self._state(name):
                # At every call, since PEFT may have changed them, even through `.data`, which no
                # version counter sees. For an entry of w2, w2_a w2_b has r multiply-adds, and the
                # product some min(m1, n1) for each token.
                a, b = _multiplied(state, self.scaling[name])
                y = _added(y, x, a, b, stride)
        return y.to(x.dtype)

    def _state(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of an adapter; none where it leaves this layer out."""
        parts = ((part, getattr(self, part)) for part in _PARTS)
        return {part: tensors[adapter] for part, tensors in parts if adapter in tensors}

    def _drops(self) -> bool:
        names = self.active_adapters
        return any(d.get(name) for d in (self.rank_dropout, self.module_dropout) for name in names)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on demand, and pickle looks classes up by name.
        return _new_served, (self.peft_class,), self.__dict__


@cache
def _served(peft_class: Any) -> type[_Served]:
    convolves = peft_class.__name__ != "Linear"
    own = {"peft_class": peft_class, "convolves": convolves, "__module__": __name__}
    return type(f"Served{peft_class.__name__}", (_Served, peft_class), own)


def _new_served(peft_class: Any) -> _Served:
    cls = _served(peft_class)
    return cls.__new__(cls)
