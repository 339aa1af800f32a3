"""Inference of a base model in one call of the compiled CPU kernels, when nobody watches.

A base model's forward decides at each call. It keeps a plan: the encoder, which reads the model's
tensors in place, and what the plan was made from: modules, hooks, parameters and their addresses.
A plan that no longer fits is made again. Everything else is left to the stock forward, which calls
the modules one by one and gives the same numbers.

At padding the hidden states are zero, where the stock forward computes something without meaning.
Only the first position of a sequence is computed even if it is padding: poolers read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from itertools import chain
from operator import attrgetter, getitem, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
    dispatch,
)
from kron_kernels.backends import abi, native
from kron_kernels.checks import is_plain
from kron_kernels.encoder import Encoder
from kroneckerbert.architectures import Architecture, Inputs, Unserved, architecture_of
from kroneckerbert.fusion import ACTIVATIONS, KroneckerProjection

_RECORDERS = "transformers.utils.output_capturing"
_PLAN = "_served_plan"  # a model's attribute
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Arguments that are followed, or ignored by every model here.
_FOLLOWED = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
}
_INTEGERS = (torch.int64, torch.int32)

# Attributes of modules that a plan reads.
_ATTRIBUTES = (
    "backend",
    "eps",
    "normalized_shape",
    "max_norm",
    "scaling",
    "num_attention_heads",
    "n_heads",
    "attention_head_size",
)
# Methods of stock classes, and functions of their files, that the encoder replaces.
_METHODS = (
    "forward",
    "feed_forward_chunk",
    "ff_chunk",
    "create_position_ids_from_input_ids",
    "create_position_ids_from_inputs_embeds",
    "compute_position_bias",
    "relative_position_bucket",
    "_create_attention_masks",
)
_FUNCTIONS = (
    "eager_attention_forward",
    "apply_chunking_to_forward",
    "create_bidirectional_mask",
    "create_position_ids_from_input_ids",
    "ALL_ATTENTION_FUNCTIONS",
)
_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)
_LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.Dropout,
    KroneckerLinear,
    KroneckerProjection,
    KroneckerSum,
    KroneckerEmbedding,
    *_QUANTIZED,
    QuantizedSum,
    *ACTIVATIONS,
)
_IDENTICAL = ["training", *_HOOKS]  # attributes that must stay the same objects
_WITHOUT_MODE = frozenset(_LAYERS) - {nn.Dropout}  # the same in training and evaluation
_call_module = nn.Module.__call__
# Implementations of attention that the encoder equals. None is each file's own function.
_ATTENTIONS = {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"], "eager": None}
_MASKS = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in _ATTENTIONS}

_hooks_of = itemgetter(*_HOOKS)
_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")


class Service:
    """Serves the models of one stock class.

    Args:
        dense: The stock class of a base model.
        architecture: Its architecture.
    """

    def __init__(self, dense: Any, architecture: Architecture):
        self.dense, self.architecture = dense, architecture
        self.arguments = list(inspect.signature(dense.forward).parameters)[1:]
        # What the encoder replaces, as it was before anyone could patch it.
        self.holders: list[Any] = []
        self.names: list[str] = []
        for cls in (*architecture.classes(dense), *_LAYERS):
            self._remember(cls, _METHODS)
        self._remember(inspect.getmodule(dense), _FUNCTIONS)
        self.functions = list(map(self._original, self.holders, self.names))

    def _remember(self, holder: Any, names: Iterable[str]) -> None:
        present = [name for name in names if hasattr(holder, name)]
        self.holders += [holder] * len(present)
        self.names += present

    @staticmethod
    def _original(holder: Any, name: str) -> Any:
        """The function of this name; None if it comes from elsewhere than the class."""
        function = getattr(holder, name)
        if not isinstance(holder, type):
            return function
        owner = next(cls for cls in holder.__mro__ if name in vars(cls))
        return function if function.__module__ == owner.__module__ else None

    def is_stock(self) -> bool:
        """Whether nobody has patched a class or a file."""
        return list(map(getattr, self.holders, self.names)) == self.functions

    def check_stock(self) -> None:
        """Raise unless ``is_stock``."""
        for holder, name, function in zip(self.holders, self.names, self.functions, strict=True):
            if getattr(holder, name) is not function:
                raise Unserved(f"{name} of {holder.__name__} was replaced")

    def prepare(self, model: Any, given: Mapping[str, Any]) -> _Call:
        """The arguments of the encoder for a call of the model.

        Raises:
            Unserved: If the stock forward must compute it.
        """
        _check_context(model)
        for name in given.keys() - _FOLLOWED:
            if given[name] is not None or name not in self.arguments:
                raise Unserved(f"it does not follow the argument {name}")
        mask = given.get("attention_mask")
        inputs = Inputs(
            *map(given.get, ("input_ids", "inputs_embeds", "position_ids", "token_type_ids"))
        )
        _check_inputs(inputs, mask)  # before the plan: on a GPU there is none, and a try takes 1 ms
        plan = _plan_of(model, self)
        embeddings = inputs.embeddings
        if embeddings is not None:
            _check_embeddings(embeddings, plan)
        if torch.is_grad_enabled() and any(map(_requires_grad, plan.parameters)):
            raise Unserved("a gradient may be needed; use torch.inference_mode()")
        hidden, as_tuple = _outputs(self.architecture, given, plan)
        ids = self.architecture.ids(model, inputs, plan.known_ids if plan.keeps_ids else None)
        if mask is not None and mask.dtype != torch.int64:
            mask = mask.ne(0).long()
        return _Call(plan.encoder, ids, mask, embeddings, inputs.shape[1], hidden, as_tuple)

    def result(self, model: Any, call: _Call) -> Any:
        """The output of the stock forward, with the encoder's hidden states."""
        states = call.encoder(
            call.ids,
            call.mask,
            call.embeddings,
            self.architecture.distance_bias(model, call.length),
            call.hidden,
        )
        last, pooler = states[-1], model._modules.get("pooler")
        output = self.architecture.output(last_hidden_state=last)
        pooled = None if pooler is None else pooler(last)
        if pooled is not None:
            output["pooler_output"] = pooled
        if call.hidden:
            output["hidden_states"] = tuple(states)
        if not call.as_tuple:
            return output
        if not self.architecture.older:
            return output.to_tuple()
        return last, pooled, *([output.hidden_states] if call.hidden else [])


class _Call(NamedTuple):
    encoder: Encoder
    ids: list[Tensor | None]  # (sequences, length) each
    mask: Tensor | None  # (sequences, length)
    embeddings: Tensor | None  # (sequences, length, width)
    length: int
    hidden: bool  # whether all hidden states are returned
    as_tuple: bool


def served(dense: Any) -> Callable | None:
    """A forward for the Kronecker form of a stock class; None if that is never served."""
    architecture = architecture_of(dense)
    if architecture is None or not all(architecture.classes(dense)):
        return None
    service = Service(dense, architecture)
    names = service.arguments

    @wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler must not follow the rest
            return dense.forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False))
        call = None
        if len(args) == len(given) and not given.keys() & kwargs.keys():
            with suppress(Unserved):
                call = service.prepare(self, given | kwargs)
        if call is None:
            return dense.forward(self, *args, **kwargs)
        if not torch.autograd._profiler_enabled():
            return service.result(self, call)
        with torch.profiler.record_function("kron_kernels::encoder"):
            return service.result(self, call)

    forward.service = service  # type: ignore[attr-defined]
    return forward


def why_not(model: Any, **inputs: Any) -> str | None:
    """Why a call of a model, made here and now, is not computed in one native call; or None.

    Its layers are then computed one by one. One that asks for ``backend="native"`` still gets the
    compiled kernels, or an error.

    Args:
        model: Any model; of a model with a head, the model without it counts.
        **inputs: Arguments of a call of the model without its head, if it depends on them.

    Returns:
        The end of a sentence, such as "encoder.layer.0.output has a hook".
    """
    base = getattr(model, "base_model", model)
    forwards = (vars(cls).get("forward") for cls in type(base).__mro__)
    service = next((f.service for f in forwards if hasattr(f, "service")), None)
    if service is None:
        return f"the compiled encoder does not compute a {type(base).__name__}"
    try:
        if inputs:
            service.prepare(base, inputs)
        else:
            _check_context(base)
            _plan_of(base, service)
    except Unserved as reason:
        return str(reason)
    return None


def explain(model: Any, **inputs: Any) -> str:
    """How a call of a model, made here and now, is computed on this machine, in one line.

    Without inputs, the answer is about a call in inference that gives ids, and a mask if need be.

    Args:
        model: Any model of transformers.
        **inputs: Arguments of a call of the model without its head.
    """
    if reason := why_not(model, **inputs):
        return f"layer by layer: {reason}"
    return f"the whole encoder in one call of the compiled kernels ({native.instruction_set()})"


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Leave every call in this context to the stock forward, which computes padding as well."""
    before = _layer_by_layer.set(True)
    try:
        yield
    finally:
        _layer_by_layer.reset(before)


def without_plan(attributes: dict[str, Any]) -> dict[str, Any]:
    """A model's attributes to copy or save: another model must not have its plan."""
    return {name: value for name, value in attributes.items() if name != _PLAN}


# --- conditions of a call


_layer_by_layer: ContextVar[bool] = ContextVar("layer_by_layer", default=False)


def _check_context(model: Any) -> None:
    if _layer_by_layer.get():
        raise Unserved("layer_by_layer() asks for it")
    if model.__dict__["training"]:
        raise Unserved("it is in training mode; call model.eval()")
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        raise Unserved("a mode watches PyTorch's operators or functions")
    if torch._C._get_tracing_state() is not None:
        raise Unserved("it is traced")
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
        raise Unserved("autocast is on")
    if dispatch.transformed():
        raise Unserved("it is under a transform of torch.func, or forward-mode differentiation")
    if torch_module._has_any_global_hook():
        raise Unserved("all modules have a hook")
    if nn.Module.__call__ is not _call_module:
        raise Unserved("__call__ of Module was replaced")


def _check_inputs(inputs: Inputs, mask: Any) -> None:
    ids, embeddings, positions, types = inputs
    tensors = [t for t in (*inputs, mask) if t is not None]
    if (ids is None) == (embeddings is None):
        raise Unserved("it needs either input_ids or inputs_embeds")
    if not is_plain(tensors) or not all(t.is_cpu for t in tensors):
        raise Unserved("its inputs must be dense tensors on the CPU")
    if (ids.ndim != 2) if embeddings is None else (embeddings.ndim != 3):
        raise Unserved("its inputs must be sequences")
    shape = inputs.shape
    if 0 in shape:
        raise Unserved("there are no tokens")
    if mask is not None and mask.shape != shape:
        raise Unserved(f"attention_mask must have shape {shape}, and has {tuple(mask.shape)}")
    for name, t in (("position_ids", positions), ("token_type_ids", types)):
        if t is not None and (t.ndim != 2 or t.shape[1] != shape[1] or len(t) not in (1, shape[0])):
            raise Unserved(f"{name} must have shape {shape}, and has {tuple(t.shape)}")
    if any(t is not None and t.dtype not in _INTEGERS for t in (ids, positions, types)):
        raise Unserved("ids must be int64 or int32")


def _check_embeddings(embeddings: Tensor, plan: _Plan) -> None:
    if embeddings.dtype != plan.dtype or embeddings.shape[2] != plan.width:
        raise Unserved(f"inputs_embeds must be {plan.dtype}, of width {plan.width}")
    if torch.is_grad_enabled() and embeddings.requires_grad:
        raise Unserved("inputs_embeds may need a gradient; use torch.inference_mode()")


def _outputs(
    architecture: Architecture, given: Mapping[str, Any], plan: _Plan
) -> tuple[bool, bool]:
    """Whether to return all hidden states, and a tuple."""
    hidden = given.get("output_hidden_states", plan.output_hidden_states)
    as_dict = given.get("return_dict", plan.return_dict)
    if architecture.older:  # None is the configuration's
        hidden = plan.output_hidden_states if hidden is None else hidden
        as_dict = plan.return_dict if as_dict is None else as_dict
    if given.get("output_attentions"):
        raise Unserved("it does not return attentions")
    if not (hidden is None or isinstance(hidden, bool)):
        raise Unserved(f"it does not follow output_hidden_states={hidden!r}")
    return bool(hidden), as_dict is False or (architecture.older and not as_dict)


# --- plans


def _plan_of(model: Any, service: Service) -> _Plan:
    own = model.__dict__
    plan = own.get(_PLAN)
    if plan is None or not plan.fits(own):
        own.pop(_PLAN, None)  # its tensors may be the last of their kind
        plan = own[_PLAN] = _Plan(model, service)
    return plan


class _Plan:
    """The encoder of a model, and what it was made from.

    It refers to no model, and so keeps none alive.

    Raises:
        Unserved: If the model's modules must be called, in its present state.
    """

    def __init__(self, model: Any, service: Service):
        own, architecture = model.__dict__, service.architecture
        if abi.module is None:
            raise Unserved(abi.missing)
        self.service = service
        service.check_stock()
        if watch := _watch(own):
            raise Unserved(f"it {watch}")
        self._read_config(model.config)
        modules = architecture.modules(model)
        self.modules = modules
        self.attributes = [module.__dict__ for module in modules]
        self._check_modules(model)

        children_of = [own["_modules"], *(m._modules for m in modules if m._modules)]
        parameters_of = [m._parameters for m in modules if m._parameters]
        scales_of = [m._buffers for m in modules if type(m) in _QUANTIZED]
        self.contents = [*children_of, *parameters_of, *scales_of, *_hook_dicts(self.attributes)]
        self.kept = _values(self.contents)  # so that no other object gets their addresses
        self.identities = self._identities()
        self.parameters = [p for p in _values(parameters_of) if p is not None]
        self.scales = [b for b in _values(scales_of) if b is not None]
        self.read_of, self.read_names, self.read = _items(
            (attributes, name)
            for attributes in self.attributes
            for name in _ATTRIBUTES
            if name in attributes
        )

        self._check_parameters()
        self.buffers_of = model.embeddings._buffers
        self.buffers = list(self.buffers_of.values())
        self._check_buffers()
        # Of a model that was made in inference mode, nobody knows whether they have changed.
        self.keeps_ids = not any(b.is_inference() for b in self.buffers)
        self.versioned = self.buffers if self.keeps_ids else []
        self.versions = list(map(_version, self.versioned))
        self.tensors = [*self.parameters, *self.scales, *self.buffers]
        self.layouts = abi.layouts(self.tensors)
        self.known_ids: dict[int, list[Tensor]] = {}
        parts = architecture.parts(model)
        self.width = model.embeddings.word_embeddings.embedding_dim
        try:
            self.encoder = Encoder(*parts)
        except (TypeError, ValueError) as error:
            raise Unserved(str(error).removesuffix(".")) from None

    def fits(self, own: dict[str, Any]) -> bool:
        """Whether the model with these attributes is still as it was.

        Comparisons run in C: 270 parameters and 224 modules take 0.08 ms. Lists compare by identity
        first. Other tensors raise an error, but for those of one entry, which compare by value: if
        that is the same, so is the result.
        """
        try:
            return (
                own["_modules"] is self.contents[0]
                and not _is_watched(own)
                and list(self.config.values()) == self.configured
                and self._identities() == self.identities
                and list(self.buffers_of.values()) == self.buffers
                and list(map(_version, self.versioned)) == self.versions
                and abi.layouts(self.tensors) == self.layouts
                and list(map(getitem, self.read_of, self.read_names)) == self.read
                and self.service.is_stock()
                and self._attention_fits()
            )
        except (AttributeError, KeyError, RuntimeError):
            return False  # something was deleted, or a tensor compared with another one

    def _identities(self) -> bytes:
        return abi.module.identities(self.modules, self.attributes, _IDENTICAL, self.contents)

    def _attention_fits(self) -> bool:
        name = self.attention
        return (
            name in _ATTENTIONS
            and ALL_ATTENTION_FUNCTIONS.get(name) is _ATTENTIONS[name]
            and ALL_MASK_ATTENTION_FUNCTIONS.get(name) is _MASKS[name]
        )

    def _read_config(self, config: Any) -> None:
        self.config = config.__dict__
        self.configured = list(self.config.values())
        self.attention = config._attn_implementation
        if not self._attention_fits():
            raise Unserved(f"its attention is {self.attention!r}, and must be stock sdpa or eager")
        if getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
            raise Unserved("its attention is causal")
        if config.output_attentions:
            raise Unserved("it does not return attentions")
        self.output_hidden_states = config.output_hidden_states
        self.return_dict = config.return_dict

    def _check_modules(self, model: Any) -> None:
        for module, own in zip(self.modules, self.attributes, strict=True):
            reason = _watch(own)
            if own["training"] and type(module) not in _WITHOUT_MODE:
                reason = "is in training mode"
            if reason:
                path = next(path for path, m in model.named_modules() if m is module)
                raise Unserved(f"{path} {reason}")

    def _check_parameters(self) -> None:
        self.dtype = next(p.dtype for p in self.parameters if p.is_floating_point())
        if self.dtype not in abi.DTYPES:
            raise Unserved(f"its parameters are {self.dtype}")
        for p in self.parameters:
            if not p.is_cpu:
                raise Unserved(f"it runs on CPUs, and has parameters on {p.device}")
            if p.dtype not in (self.dtype, torch.int8):
                raise Unserved(f"it has parameters of {self.dtype} and {p.dtype}")
            if not is_plain([p]):
                raise Unserved(f"it has a parameter of class {type(p).__name__}")
            if p.numel() and not p.untyped_storage().nbytes():
                raise Unserved("it has parameters whose memory was freed")

    def _check_buffers(self) -> None:
        for b in self.buffers:
            if not is_plain([b]) or not b.is_cpu:
                raise Unserved("its embeddings have a buffer that is not an ordinary tensor")


def _values(dictionaries: Iterable[dict[Any, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _items(places: Iterable[tuple[dict[str, Any], str]]) -> tuple[list, list, list]:
    """The dictionaries, keys and values of these places."""
    found = list(places)
    dictionaries, names = [d for d, _ in found], [name for _, name in found]
    return dictionaries, names, list(map(getitem, dictionaries, names))


def _hook_dicts(attributes: Iterable[dict[str, Any]]) -> Iterator[dict[int, Any]]:
    return chain.from_iterable(map(_hooks_of, attributes))


def _is_watched(own: dict[str, Any]) -> bool:
    """Whether a call of the module with these attributes runs more than its class's forward."""
    return any(_hooks_of(own)) or "forward" in own or "_compiled_call_impl" in own


def _watch(own: dict[str, Any]) -> str | None:
    """What a call of the module with these attributes runs besides its class's forward."""
    if not all(map(_is_recorder, _values(_hooks_of(own)))):
        return "has a hook"
    if "forward" in own:
        return "has its own forward"
    return "is compiled" if "_compiled_call_impl" in own else None


def _is_recorder(hook: Any) -> bool:
    """Whether a hook is of transformers' recorders of hidden states and attentions.

    A model that has once returned such outputs keeps them. In other calls they do nothing.
    """
    name = getattr(hook, "__name__", None)
    return name == "output_capturing_hook" and hook.__module__ == _RECORDERS
