"""Transformers with Kronecker-factorised layers: stock classes whose modules are swapped.

``register`` makes the classes of an architecture, ``Kronecker<X>Config`` and a
``Kronecker<X>For…`` for each of its heads, and registers them with transformers' ``Auto`` classes.
It runs when an architecture is first used: making all classes would import every model of
transformers. Until then ``AutoConfig`` has the stand-ins of ``kroneckerbert/__init__.py``.
"""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    KronShape,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
)
from kron_kernels.factors import no_such_layer, random_layer, term_of
from kron_kernels.modules import evaluating
from kron_kernels.quantization import quantizable, quantized
from kron_kernels.readers import reader
from kron_kernels.shapes import check_integer
from kroneckerbert.checkpoints import LOADER, check_whole, replacing_model, write_loader
from kroneckerbert.configuration_kroneckerbert import (
    KroneckerConfig,
    kronecker_config,
    layout_of,
)
from kroneckerbert.fusion import fuse
from kroneckerbert.loading import check_loaded, naming_damage
from kroneckerbert.serving import served, without_plan

_AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
# Ends of errors about models that cannot be compressed.
FACTORISED = "it is factorised already; kroneckerbert.decompress(model) makes it dense again"
ELSEWHERE = "kron_kernels.factorise_(model, factors) factorises layers of any module in place"
_classes: dict[type, type] = {}  # from dense models and configurations to ours
_registering = threading.RLock()  # the first loads may be in several threads


# At run time the base must not be PreTrainedModel: transformers takes the first one among the bases
# for the class that initialises, which must be the dense class.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class KroneckerPreTrainedModel(_Base):
    """The methods of every Kronecker model; its dense class comes next in its bases.

    Stock constructors end in ``post_init``, which draws and ties the weights. Modules are swapped
    just before, which covers construction, ``from_config`` and ``from_pretrained`` (on the meta
    device, at no cost).
    """

    config: KroneckerConfig
    dense_class: type[PreTrainedModel]
    _tied_weights_keys: dict[str, str] | None

    def post_init(self) -> None:
        if self.base_model is self:
            for path, shapes in self.config.kronecker_shapes().items():
                _replace(self, path, shapes)
            if self.config.kronecker_int8:
                _quantize(self)
            fuse(self)
        else:
            # transformers lets the nearest PreTrainedModel initialise a module: a dense encoder
            # would leave its factors as they were allocated.
            if not isinstance(self.base_model, KroneckerPreTrainedModel):
                setattr(self, self.base_model_prefix, _kronecker_encoder(self.base_model, self))
            self._tie_decoder()
        super().post_init()
        if self.config.kronecker_int8:
            self.requires_grad_(False).eval()

    def __getstate__(self) -> dict[str, Any]:
        return without_plan(super().__getstate__())  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on demand, and a new process has not made it yet.
        cls: Any = type(self)
        if _classes.get(cls.dense_class) is not cls:  # a user's subclass
            return super().__reduce_ex__(protocol)
        return _blank, (cls.dense_class, cls.config_class.dense_class), self.__getstate__()

    def _tie_decoder(self) -> None:
        """Give a tied decoder the word embeddings' factors: exact, cheaper, and saved once."""
        table = self.get_input_embeddings()
        keys = dict(self._tied_weights_keys or {})
        if not isinstance(table, KroneckerEmbedding) or not is_tied(self.config):
            return
        source = next(name for name, module in self.named_modules() if module is table)
        tied = [key for key, value in keys.items() if value == f"{source}.weight"]
        heads = [key.removesuffix(".weight") for key in tied]
        # transformers 5.13 names a head of DeBERTa that has no weight and gets the table itself.
        without = any(not hasattr(self.get_submodule(path), "weight") for path in heads)
        read = without or any(reader(self, path) for path in (source, *heads))
        for key in [] if read else tied:
            path = key.removesuffix(".weight")
            del keys[key]
            _replace(self, path, [KronShape.of(table.a, table.b)])
            # Patterns, hence the `$`: "decoder.b" would also match "decoder.bias".
            keys |= {f"{path}.{factor}$": f"{source}.{factor}$" for factor in "ab"}
        # DeBERTa's newer head gets the table itself.
        if read or (not tied and hasattr(self, "lm_predictions")):
            raise ValueError(
                f"{type(self).__name__} multiplies by the word embeddings' dense weight in its "
                f"head; keep them dense with kronecker_factors[{source.split('.', 1)[1]!r}] = None."
            )
        self._tied_weights_keys = {
            key if key.endswith("$") else f"{key}$": value if value.endswith("$") else f"{value}$"
            for key, value in keys.items()
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        try:
            super()._init_weights(module)
        except AttributeError:  # the class initialises layers inside of the module by their weight
            with _initialised_weights(module):
                super()._init_weights(module)
        if isinstance(module, KroneckerLinear | KroneckerSum | KroneckerEmbedding):
            # By torch.nn.init, which transformers guards: loaded tensors are left alone.
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, QuantizedLinear | QuantizedSum | QuantizedEmbedding):
            module.reset_parameters()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, with int8 weights, see ``transformers.PreTrainedModel``."""
        known = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return known
        kinds = QuantizedLinear | (QuantizedLinear if exclude_embeddings else QuantizedEmbedding)
        layers = (m for m in self.modules() if isinstance(m, kinds))
        return known + sum(
            b.numel() for m in layers for b in m.buffers(recurse=False) if b.dtype == torch.int8
        )

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, see ``nn.Module.train``.

        Raises:
            ValueError: If the model has int8 weights, which cannot be trained.
        """
        if mode:
            check_trainable(self)
        return super().train(mode)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save, see ``transformers.PreTrainedModel.save_pretrained``; always as safetensors.

        If it is killed at any moment, even by a power failure, the folder has the old model or the
        new one, or loading raises an error that says how to complete the new one. Other files in
        the folder stay, including the weights of other variants.

        Raises:
            OSError: If the folder cannot be written.
        """
        name = type(self.config).__name__
        self.config.auto_map = {"AutoConfig": f"{LOADER}.{name}"}
        options: dict[str, Any] = {
            "state_dict": state_dict,
            "max_shard_size": max_shard_size,
            "variant": variant,
            "token": token,
            "save_peft_format": save_peft_format,
            "save_original_format": save_original_format,
        }
        # Before 5.23 only the caller decides which process writes.
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if distributed_checkpoint or not saves:
            if distributed_checkpoint:
                options["distributed_checkpoint"] = True
            super().save_pretrained(
                save_directory, is_main_process, push_to_hub=push_to_hub, **options, **kwargs
            )
            return
        if push_to_hub:  # the stock method would not upload the loader
            commit = {k: kwargs.pop(k) for k in ("commit_message", "create_pr") if k in kwargs}
            repo = kwargs.pop("repo_id", Path(save_directory).name)
            repo = HfApi().create_repo(repo, exist_ok=True, token=token, **kwargs).repo_id
            kwargs = {}
        with replacing_model(save_directory) as folder:
            super().save_pretrained(folder, **options, **kwargs)
            write_loader(folder, name)
            written = os.listdir(folder)
        if push_to_hub:
            HfApi().upload_folder(
                repo_id=repo,
                folder_path=Path(save_directory),
                allow_patterns=written,
                token=token,
                **{"commit_message": "Upload model", **commit},
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, see ``transformers.PreTrainedModel.from_pretrained``.

        Raises:
            ValueError: If a tensor of the model without its head is missing, unexpected or of
                another shape, see ``kroneckerbert.loading.check_loaded``, a factor is NaN or
                infinite, or the checkpoint is a dense model. Also if the head has another shape,
                unless ``ignore_mismatched_sizes=True``, which draws a new one.
            OSError: If a file is missing or damaged, or the last save was killed while its files
                were moved into place.
        """
        source = pretrained_model_name_or_path
        if source is not None:
            check_whole(Path(source) / (kwargs.get("subfolder") or ""))
        config_class = None if kwargs.get("config") is not None else cls.config_class
        with naming_damage(source, config_class):
            # Mismatches are errors below; transformers would only log them.
            model, info = super().from_pretrained(
                source,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        check_loaded(model, info, source, ignore_mismatched_sizes)
        if model.config.kronecker_int8:
            model.requires_grad_(False)  # the loader makes new parameters
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Add or remove words at the end of the vocabulary: rows of A; b stays.

        Frozen parameters (``requires_grad``) stay frozen.

        Args:
            new_num_tokens: The new vocabulary's size; None keeps the present one.
            pad_to_multiple_of: Round the size up to a multiple of this.
            mean_resizing: Start new words at the mean of the old ones, instead of at random with
                standard deviation ``config.initializer_range``.

        Returns:
            The word embeddings.

        Raises:
            ValueError: If a size is not a positive integer, or leaves no row for the padding, or
                the model has int8 weights. The model is then unchanged.
        """
        if self.config.kronecker_int8:
            raise ValueError(
                f"this {type(self).__name__} has int8 weights, whose vocabulary cannot be resized; "
                "resize kroneckerbert.dequantize(model), and quantise the result."
            )
        table = self.get_input_embeddings()
        if new_num_tokens is not None:
            new_num_tokens = check_integer("new_num_tokens", new_num_tokens)
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = check_integer("pad_to_multiple_of", pad_to_multiple_of)
        padding = getattr(table, "padding_idx", None)
        if new_num_tokens is not None and padding is not None and new_num_tokens <= padding:
            raise ValueError(
                f"new_num_tokens = {new_num_tokens} leaves no row for the padding's id {padding}; "
                f"keep at least {padding + 1}."
            )
        # Stock resizing gives the decoder's bias its weight's requires_grad.
        trainable = {n: p.requires_grad for n, p in self.named_parameters(remove_duplicate=False)}
        if isinstance(table, KroneckerEmbedding):
            self._resize_factors(table, new_num_tokens, pad_to_multiple_of, mean_resizing)
        else:
            table = super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        for name, p in self.named_parameters(remove_duplicate=False):
            p.requires_grad_(trainable.get(name, p.requires_grad))
        return table

    def _resize_factors(
        self,
        table: KroneckerEmbedding,
        new_num_tokens: int | None,
        pad_to_multiple_of: int | None,
        mean_resizing: bool,
    ) -> None:
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = math.ceil(rows / pad_to_multiple_of) * pad_to_multiple_of
        if rows == table.num_embeddings:
            return

        _resize_rows(table, rows, None if mean_resizing else self.config.initializer_range)
        decoder = self.get_output_embeddings()
        if isinstance(decoder, KroneckerLinear):  # its rows come from tie_weights, below
            decoder.out_features = rows
            if decoder.bias is not None:
                old = decoder.bias
                new = nn.Parameter(F.pad(old.detach(), (0, rows - old.numel())))
                for module in self.modules():  # heads may hold the bias under a second name
                    names = [name for name, p in module._parameters.items() if p is old]
                    for name in names:
                        setattr(module, name, new)
            self.set_output_embeddings(decoder)
        elif decoder is not None:
            self.set_output_embeddings(
                self._get_resized_lm_head(decoder, rows, mean_resizing=mean_resizing)
            )
        entry = term_of(*KronShape.of(table.a, table.b).part)
        path = next(name for name, m in self.base_model.named_modules() if m is table)
        key = self.config.entry_of(path) or path
        self.config.kronecker_factors = {**self.config.kronecker_factors, key: entry}
        self.config.vocab_size = self.vocab_size = rows
        self.tie_weights()


def register(dense_config: type[PreTrainedConfig]) -> type[KroneckerConfig]:
    """Make the Kronecker classes of an architecture and register them with the ``Auto`` classes.

    Compressing or loading a model of transformers does it. Call it only for an architecture of your
    own, after its registration with ``AutoConfig`` and ``AutoModel``, before you load a model.

    Args:
        dense_config: The configuration class of the dense models, such as ``BertConfig``.

    Returns:
        The configuration class, such as ``KroneckerBertConfig``.
    """
    with _registering:
        if dense_config in _classes:
            return _classes[dense_config]
        config = kronecker_config(dense_config)
        globals()[config.__name__] = config  # where pickle looks for it
        config.__module__ = __name__
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in _AUTO_CLASSES:
            found = auto._model_mapping.get(dense_config, ())
            # transformers maps some configurations to the classes of another.
            models = [
                _kronecker_class(model, config)
                for model in (found if isinstance(found, tuple) else (found,))
                if getattr(model, "config_class", None) in (dense_config, None)
            ]
            if models:
                auto.register(config, models[0], exist_ok=True)
        _classes[dense_config] = config
        return config


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether a decoder shares the word embeddings' weight; False if the field is absent."""
    return getattr(config, "tie_word_embeddings", False)


def kronecker_class(
    model: PreTrainedModel, to: Literal["compress", "plan", "quantise"] = "compress"
) -> type[KroneckerPreTrainedModel]:
    """The class of the Kronecker form of a dense model; ``to`` is the caller's verb, for the error.

    Raises:
        TypeError: If there is none.
    """
    if reason := _no_class(model):
        raise TypeError(f"cannot {to} a {type(model).__name__}; {reason}.")
    return _kronecker_class(type(model), register(type(model.config)))


def _no_class(model: PreTrainedModel) -> str | None:
    """Why a model has no Kronecker form that could be saved and loaded, with the remedy."""
    config, name = type(model.config), type(model.config).__name__
    if isinstance(model, KroneckerPreTrainedModel):
        return FACTORISED
    if model.config.is_encoder_decoder:
        return f"it must be an encoder or a decoder, not an encoder-decoder; {ELSEWHERE}"
    found = AutoModel._model_mapping.get(config, None)
    if not isinstance(found, type):
        has = " and ".join(cls.__name__ for cls in found or ()) or "none"
        return f"AutoModel must have one class for a {name}, and has {has}; {ELSEWHERE}"
    needs = getattr(type(model), "config_class", None)  # custom code may lack it
    if needs not in (config, None):
        return f"its configuration must be a {needs.__name__}, got a {name}; {ELSEWHERE}"
    try:
        own = layout_of(model.base_model).sizes
        layout = register(config).from_dense(model.config, {}).layout()
    except NotImplementedError:
        return f"it must have word embeddings, where get_input_embeddings finds them; {ELSEWHERE}"
    except (AttributeError, TypeError) as error:
        return f"its layers cannot be listed ({error}); {ELSEWHERE}"
    if differing := own.items() ^ layout.sizes.items():
        path = min(path for path, _ in differing)
        return (
            f"its base_model must have the layers of the {found.__name__} that AutoModel makes of "
            f"its configuration, and differs in {path}; {ELSEWHERE}"
        )
    return None


def _kronecker_class(dense: type, config: type[KroneckerConfig]) -> type[KroneckerPreTrainedModel]:
    if dense not in _classes:
        namespace = {
            "__module__": __name__,
            "__doc__": f"``{dense.__name__}`` with factorised layers.",
            "config_class": config,  # otherwise transformers would use the annotation
            "dense_class": dense,
        }
        if forward := served(dense):
            namespace["forward"] = forward
        name = f"Kronecker{dense.__name__}"
        _classes[dense] = globals()[name] = type(name, (KroneckerPreTrainedModel, dense), namespace)
    return _classes[dense]


def _blank(dense: type, dense_config: type[PreTrainedConfig]) -> KroneckerPreTrainedModel:
    cls = _kronecker_class(dense, register(dense_config))
    return cls.__new__(cls)


def _kronecker_encoder(
    encoder: PreTrainedModel, model: KroneckerPreTrainedModel
) -> KroneckerPreTrainedModel:
    cls = _kronecker_class(type(encoder), type(model.config))
    takes_pooler = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    pooler = {"add_pooling_layer": encoder.pooler is not None} if takes_pooler else {}
    return cls(model.config, **pooler)


def check_trainable(model: PreTrainedModel) -> None:
    """Raise if the model has int8 weights.

    Raises:
        ValueError: With the remedy.
    """
    if getattr(model.config, "kronecker_int8", None):
        raise ValueError(
            f"this {type(model).__name__} has int8 weights, which cannot be trained; train "
            "kroneckerbert.dequantize(model), or the model that it was made of, and quantise the "
            "result."
        )


@contextmanager
def _initialised_weights(module: nn.Module) -> Iterator[None]:
    """Replaced layers in it have a ``weight`` that is marked as initialised, for the moment."""
    kinds = KroneckerLinear | KroneckerSum | KroneckerEmbedding
    kinds |= QuantizedLinear | QuantizedSum | QuantizedEmbedding
    layers = [m for m in module.modules() if isinstance(m, kinds) and not hasattr(m, "weight")]
    for layer in layers:
        weight = torch.empty(0)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        vars(layer)["weight"] = weight
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["weight"]


def _replace(model: nn.Module, path: str, shapes: Sequence[KronShape]) -> None:
    parent, _, child = path.rpartition(".")
    dense: Any = model.get_submodule(path)
    setattr(model.get_submodule(parent), child, random_layer(dense, shapes))


def _quantize(model: KroneckerPreTrainedModel) -> None:
    """Put int8 layers in the places that the configuration names."""
    layers = quantizable(model)
    for path in model.config.kronecker_int8:
        if path not in layers:
            raise ValueError(f"kronecker_int8 has {path!r}, {no_such_layer(path, layers)}")
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized(layers[path]))


def positions(model: PreTrainedModel) -> int:
    """The longest sequence that a model takes, in tokens, special ones included."""
    for name, module in model.base_model.named_modules():
        # RoBERTa and its descendants number positions from padding_idx + 1 on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return module.num_embeddings - module.padding_idx - 1
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None:
        raise TypeError(
            f"the configuration of this {type(model).__name__} has no max_position_embeddings, "
            "the longest sequence that it takes; set it."
        )
    return longest


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest sequence that both a model and its tokenizer take, in tokens."""
    return min(tokenizer.model_max_length, positions(model))


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens without padding: the usual sentence embedding.

    Args:
        last_hidden_state: Shape ``(batch, tokens, hidden)``.
        attention_mask: Shape ``(batch, tokens)``, zero at padding.

    Returns:
        Shape ``(batch, hidden)``; zero for rows of padding only.
    """
    mask = attention_mask[..., None].to(last_hidden_state.dtype)  # (batch, tokens, 1)
    # Counted in integers: a sum of ones in bfloat16 stops at 256.
    count = attention_mask.sum(-1, keepdim=True).clamp_min(1)  # (batch, 1)
    return (last_hidden_state * mask).sum(-2) / count


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    normalize: bool = True,
    progress: bool = False,
) -> Tensor:
    """Mean-pooled embeddings of sentences, with dropout off and little padding.

    Args:
        model: Any encoder, dense or Kronecker; a head is ignored.
        tokenizer: Its tokenizer; sentences are truncated to the longest that both take.
        sentences: The texts.
        batch_size: Sentences per forward pass, batched by length.
        normalize: Scale to unit length: dot products are then cosine similarities.
        progress: Whether to show a bar over the batches.

    Returns:
        Shape ``(len(sentences), hidden)``, float32, on the model's device, in the given order.

    Raises:
        TypeError: If ``sentences`` is one text.
        ValueError: If ``batch_size`` is not a positive integer.
    """
    if isinstance(sentences, str):
        raise TypeError(f"sentences must be a list of texts, got the text {sentences!r}.")
    batch_size = check_integer("batch_size", batch_size)
    encoder = model.base_model
    rows = torch.empty(len(sentences), encoder.config.hidden_size, device=encoder.device)
    if not sentences:
        return rows
    longest = max_tokens(encoder, tokenizer)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]), reverse=True)

    with evaluating(encoder):
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="embedding", disable=not progress):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [sentences[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(encoder.device)
            hidden = encoder(**batch).last_hidden_state
            rows[chosen] = mean_pooling(hidden.float(), batch["attention_mask"])
    return F.normalize(rows, dim=-1) if normalize else rows


@torch.no_grad()
def _resize_rows(table: KroneckerEmbedding, rows: int, std: float | None) -> None:
    """Cut or extend A: by its mean row, or by rows that give E = A ⊗ b entries of this ``std``."""
    rank, old_rows, columns = table.a.shape
    a = table.a[:, :rows]
    if rows > old_rows:
        # E is linear in A, so the mean of A's rows gives the mean of E's.
        new = table.a.mean(1, keepdim=True).expand(rank, rows - old_rows, columns)
        if std is not None:
            # Var E_ij = Var A · Σ_k b_kj², on average over j.
            new = torch.randn_like(new) * std / table.b.square().mean(-1).sum().sqrt()
        a = torch.cat([a, new], 1)
    table.a = nn.Parameter(a.clone())
    table.num_embeddings = rows


def __getattr__(name: str) -> Any:
    # Classes are made on demand, for users and for pickle.
    _, ours, dense_name = name.partition("Kronecker")
    if name != ours + dense_name or not dense_name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    dense: Any = getattr(transformers, dense_name, object)
    dense = dense if inspect.isclass(dense) else object
    if issubclass(dense, PreTrainedConfig):
        return register(dense)
    if issubclass(dense, PreTrainedModel):
        return _kronecker_class(dense, register(dense.config_class))
    raise AttributeError(
        f"there is no {name}: transformers {transformers.__version__} has no model or "
        f"configuration {dense_name}. Another version may have it; an architecture of your own "
        "must be registered first, see kroneckerbert.register."
    )
