"""Teach a compressed BERT to compute what its teacher computes, layer by layer.

The student has the teacher's depth and widths, so its layer l answers to the teacher's layer l
without projections (Tahaei et al., NAACL 2022, Eq. 14):

    embedding   MSE(E_S, E_T)             output of the embedding layer
    attention   Σ_l MSE(O_l_S, O_l_T)     scores O = QKᵀ/√d, before the mask and the softmax (Eq. 9)
    hidden      Σ_l MSE(H_l_S, H_l_T)     output of layer l
    logits      KL(T ‖ S) · T²            the paper gives no formula; MSE for a regression
    labels      the student's own supervised loss

Stage 1 is a bare model or one with the language-modelling head on unlabelled text; stage 2 is the
task, with the fine-tuned teacher. Both are the same trainer: a term that model or batch cannot
give does not apply.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import monotonic

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_callback import ProgressCallback
from transformers.utils import ModelOutput
from transformers.utils.generic import find_labels

TERMS = ("embedding", "attention", "hidden", "logits", "labels")

_SCORES = "sdpa_with_scores"


def _sdpa_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    output_attentions: bool = False,  # not passed on: sdpa would warn that it cannot
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """SDPA's output, and ``query @ keyᵀ * scaling`` in the place of the attention weights."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output, (query * scaling) @ key.mT if output_attentions else None


AttentionInterface.register(_SCORES, _sdpa_with_scores)
AttentionMaskInterface.register(_SCORES, sdpa_mask)


@contextmanager
def attention_scores(*models: PreTrainedModel) -> Iterator[None]:
    """Within, ``model(..., output_attentions=True)`` returns the scores before mask and softmax.

    ``attentions[l]`` is ``Q Kᵀ / √d`` of layer l, ``(batch, heads, queries, keys)``, padding
    included; outputs are computed by SDPA whatever the model was set to before. (Stock ``sdpa``
    returns an empty tuple, ``eager`` the probabilities, which are dropped out in training.)
    Under activation checkpointing the backward belongs inside too: it runs the layers again.
    """
    # Not set_attn_implementation: it decides by reading the source file of the model's class.
    configs = [model.config for model in models]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _SCORES
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def distillation_terms(
    student: ModelOutput,
    teacher: ModelOutput,
    attention_mask: Tensor,
    weights: Mapping[str, float | None],
    *,
    temperature: float = 1.0,
    problem_type: str | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss, each a float32 scalar before its weight, by name.

    Padding takes no part: ``embedding`` and ``hidden`` are means over real tokens x width,
    ``attention`` over real query x real key pairs x heads; tokens' logits over real tokens, a
    span's start and end over real positions. ``attention`` and ``hidden`` are sums over layers.

    Args:
        student: Output with the fields its terms need: ``hidden_states`` for embedding and hidden,
            ``attentions`` under ``attention_scores`` for attention, ``*logits``, ``loss``.
        teacher: The teacher's output for the same batch.
        attention_mask: ``(batch, sequence)``, non-zero where the token is real; a multiple-choice
            ``(batch, choices, sequence)`` is flattened as the model flattens it.
        weights: Weight of every name in ``TERMS``. A term of weight 0 is not computed; ``None``
            asks for it only where the outputs have what it needs.
        temperature: T, by which logits are divided; their KL divergence is scaled by T².
        problem_type: As in the config: ``"regression"`` compares logits by MSE (so does a single
            logit), ``"multi_label_classification"`` label by label.

    Raises:
        ValueError: If a term asked for is missing from an output, no term is left, or shapes do
            not match.
    """
    real = attention_mask.reshape(-1, attention_mask.shape[-1]).bool()
    terms = {}
    if weights["embedding"] != 0 or weights["hidden"] != 0:
        states = _layer_pairs("hidden_states", student, teacher)
        if states[0][0].shape[:2] != real.shape:
            raise ValueError(
                f"attention_mask must be (batch, sequence) = {tuple(states[0][0].shape[:2])}, got "
                f"{tuple(attention_mask.shape)}: the loss needs to know which tokens are real."
            )
        if weights["embedding"] != 0:
            terms["embedding"] = _hidden_mse(*states[0], real)
        if weights["hidden"] != 0:
            terms["hidden"] = torch.stack([_hidden_mse(s, t, real) for s, t in states[1:]]).sum()
    if weights["attention"] != 0:
        scores = _layer_pairs("attentions", student, teacher)
        terms["attention"] = torch.stack([_scores_mse(s, t, real) for s, t in scores]).sum()
    if weights["logits"] != 0:
        names = [name for name in student if name.endswith("logits") and name in teacher]
        if names:
            divergences = [
                _divergence(name, student[name], teacher[name], real, temperature, problem_type)
                for name in names
            ]
            # A span's two ends are averaged, two heads are added, as in the models' own losses.
            total = torch.stack(divergences).sum()
            terms["logits"] = total / 2 if "start_logits" in names else total
        elif weights["logits"] is not None:
            raise ValueError(
                f"logits_weight = {weights['logits']}, but student and teacher have no logits in "
                f"common: their outputs are {list(student)} and {list(teacher)}. Give both the "
                "task's head, or set logits_weight=0."
            )
    if weights["labels"] != 0:
        if student.get("loss") is not None:
            terms["labels"] = student["loss"].float().mean()  # DataParallel: one per replica
        elif weights["labels"] is not None:
            raise ValueError(
                f"labels_weight = {weights['labels']}, but the student returned no loss: give it a "
                "head and the batch labels, or set labels_weight=0."
            )
    if not terms:
        raise ValueError(
            "No term applies: the weights of embedding, attention and hidden are 0, and there are "
            "no logits in common and no labels. Set one of the weights, or give both models heads."
        )
    return terms


def _layer_pairs(
    field: str, student: ModelOutput, teacher: ModelOutput
) -> list[tuple[Tensor, Tensor]]:
    """The layers' tensors side by side: none missing, for an empty zip is a loss of exactly 0."""
    s, t = student.get(field) or (), teacher.get(field) or ()
    if not s or len(s) != len(t):
        raise ValueError(
            f"student and teacher must return the same number of {field}, at least one; got "
            f"{len(s)} and {len(t)}. Depths must be equal, and attention layers must call the "
            "function that config._attn_implementation names."
        )
    return list(zip(s, t, strict=True))


def _hidden_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens and width of (batch, sequence, width)."""
    error = (s.float() - t.float()).masked_fill(~real[..., None], 0)
    return error.square().sum() / (real.sum() * s.shape[-1])


def _scores_mse(s: Tensor, t: Tensor, real: Tensor) -> Tensor:
    """Mean over real pairs and heads of (batch, heads, queries, keys)."""
    pairs = real[:, None, :, None] & real[:, None, None, :]
    error = (s.float() - t.float()).masked_fill(~pairs, 0)
    return error.square().sum() / (pairs.sum() * s.shape[1])


def _divergence(
    name: str, s: Tensor, t: Tensor, real: Tensor, temperature: float, problem_type: str | None
) -> Tensor:
    """Mean KL(t ‖ s) T²: soft cross-entropy less the teacher's entropy, so 0 when they agree."""
    if s.shape != t.shape:
        raise ValueError(f"{name} of student and teacher differ: {s.shape} and {t.shape}.")
    if s.ndim == 3:  # one distribution for each token, so rows of the real ones
        s, t = s[real], t[real]
    s, t = s.float(), t.float()
    if problem_type == "regression" or s.shape[-1] == 1:
        return F.mse_loss(s, t)
    s, t = s / temperature, t / temperature
    if name in ("start_logits", "end_logits"):  # a distribution over positions
        lowest = torch.finfo(s.dtype).min / 2  # -inf would give 0 * nan
        s, t = s.masked_fill(~real, lowest), t.masked_fill(~real, lowest)
    elif problem_type == "multi_label_classification":  # sigmoid(z) = softmax([z, 0])
        s, t = F.pad(s[..., None], (0, 1)), F.pad(t[..., None], (0, 1))
    log_s, log_t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
    return divergence * temperature**2


@dataclass
class DistillationArguments(TrainingArguments):
    """``TrainingArguments`` with the weights of the loss; defaults are the paper's stage 1.

    The paper's own stage 1 has no logits term: set ``logits_weight=0`` to follow it to the letter
    with a language-modelling head (which also saves two softmaxes over the vocabulary).

    Raises:
        ValueError: If a weight is negative or all are 0, or temperature or max_minutes is not
            positive.
    """

    embedding_weight: float = field(
        default=1.0, metadata={"help": "Weight of the embeddings' MSE."}
    )
    attention_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pre-softmax attention scores' MSE."}
    )
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the layers' MSE."})
    logits_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the logits' divergence. Unset: 1 where both have logits."},
    )
    labels_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the supervised loss. Unset: 1 where there are labels."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits; their divergence is scaled by its square."},
    )
    student_dropout: bool = field(
        default=False,
        metadata={
            "help": "Train with the student's dropout. Off, because the teacher has none: to match "
            "its features through dropout leaves a floor of noise that short runs never pass."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this long, if steps last, counted from each start "
            "or resumption. The learning rate follows the share of time or of steps, whichever is "
            "ahead, so it still decays to zero."
        },
    )

    learning_rate: float = field(
        default=1e-3, metadata={"help": "1e-3 in stage 1; 1e-5 to 5e-4 later."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of warm-up, or a share of all steps if below 1."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Sequences per step."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory; on where there is a GPU to copy to."},
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between reports, or a share of all steps if below 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in self.weights.items():
            if weight is not None and not weight >= 0:
                raise ValueError(f"{name}_weight must be >= 0, got {weight}.")
        if all(weight == 0 for weight in self.weights.values()):
            raise ValueError("All weights are 0: nothing would be learnt. Set one of them.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(
                f"max_minutes must be > 0, got {self.max_minutes}; leave it unset for no limit."
            )

    @property
    def weights(self) -> dict[str, float | None]:
        """Weight of every term; None is 1 where the term applies."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}


class DistillationTrainer(Trainer):
    """``Trainer`` whose loss is the distance to a teacher of the same depth and widths.

    Args:
        model: The student.
        teacher: Put in evaluation mode and on ``args.device``; never trained, wrapped or saved.
            Dtype as you please: bfloat16 halves its memory.
        args: ``DistillationArguments``.
        **trainer_kwargs: Anything else ``Trainer`` takes.

    Every term is logged as ``loss_<term>``, before its weight: the mean since the last report,
    over processes; evaluation reports ``eval_loss_<term>``, and needs no labels. With gradient
    accumulation every micro-batch counts the same, however much of it is padding.

    Raises:
        ValueError: If the teacher shares parameters with the student, if the two do not match
            layer by layer, or, at the first step, if a term asked for cannot be computed or is
            not finite.
    """

    # BERT's forward takes **kwargs, from which Trainer concludes that the loss is already divided
    # by the accumulation steps. It is not: gradients would be that many times too large.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillationArguments | None = None,
        **trainer_kwargs,
    ):
        args = args or DistillationArguments()
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"args must be DistillationArguments, got {type(args).__name__}.")
        if args.label_smoothing_factor or trainer_kwargs.get("compute_loss_func"):
            raise ValueError(
                "The distillation loss replaces label_smoothing_factor and compute_loss_func: "
                "leave both unset."
            )
        _check_pair(model, teacher)
        super().__init__(model, args, **trainer_kwargs)
        self.model_accepts_loss_kwargs = False  # loss_is_scaled_for_ga, for transformers < 5.19
        self.teacher = teacher.to(args.device).eval()
        self._not_for_teacher = {*self.label_names, *find_labels(type(teacher))}
        self._train_means, self._eval_means = _TermMeans(), _TermMeans()
        self._first_batch = True
        self._deadline = _Deadline(args.max_minutes) if args.max_minutes is not None else None
        if self._deadline:
            self.add_callback(self._deadline)
            if not args.disable_tqdm:
                self.remove_callback(ProgressCallback)
                self.add_callback(_TimeBar(self._deadline))

    def train(self, *args, **kwargs):
        """Train; raises ValueError if the student has a parameter that is not finite at the end."""
        with nullcontext() if self.args.student_dropout else _without_dropout(self.model):
            output = super().train(*args, **kwargs)
        if bad := _not_finite(self.model):
            raise ValueError(
                f"the training diverged: {bad[0]} is not finite; lower the learning rate, now "
                f"{self.args.learning_rate:g}."
            )
        return output

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if (deadline := self._deadline) is not None:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"max_minutes needs a schedule that is a function of the step, got "
                    f"{type(scheduler).__name__}; use lr_scheduler_type='linear' or 'cosine'."
                )
            scheduler.lr_lambdas = [
                lambda step, rate=rate: rate(max(step, deadline.share * num_training_steps))
                for rate in scheduler.lr_lambdas
            ]
        return scheduler

    def training_step(self, *args, **kwargs) -> Tensor:
        with self._scores():  # the backward too: activation checkpointing runs the forward again
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Σ weight * term. ``num_items_in_batch`` is not used: terms are means of their own."""
        weights = self.args.weights
        features = {k: v for k, v in inputs.items() if k not in self._not_for_teacher}
        capture = {
            "output_hidden_states": weights["embedding"] != 0 or weights["hidden"] != 0,
            "output_attentions": weights["attention"] != 0,
            "return_dict": True,
        }
        with self._scores():
            student = model(**(inputs if weights["labels"] != 0 else features), **capture)
            # accelerate wraps the student's forward only, so the teacher is told of autocast here
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**features, **capture)
        mask = inputs.get("attention_mask")
        terms = distillation_terms(
            student,
            teacher,
            torch.ones_like(inputs["input_ids"]) if mask is None else mask,
            weights,
            temperature=self.args.temperature,
            problem_type=getattr(self.model.config, "problem_type", None),
        )
        if self._first_batch:
            self._check_finite(terms)
            self._first_batch = False
        if model.training:
            self._train_means.add(terms)
        else:  # eval_loss weighs batches by their size
            self._eval_means.add(terms, weight=len(inputs["input_ids"]))
        loss = torch.stack(
            [terms[n] if weights[n] is None else weights[n] * terms[n] for n in terms]
        ).sum()
        if not return_outputs:
            return loss
        # What was captured for the loss is no prediction, and Trainer would gather it.
        captured = ("hidden_states", "attentions")
        return loss, type(student)(**{k: v for k, v in student.items() if k not in captured})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | tuple | None, Tensor | tuple | None]:
        """Trainer's own computes no loss for a batch without labels; this loss needs none."""
        inputs = self._prepare_inputs(inputs)
        labels = tuple(inputs[name] for name in self.label_names if name in inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        ignored = {"loss", *(ignore_keys or ())}
        logits = tuple(value for key, value in outputs.items() if key not in ignored)
        return loss, _alone(logits), _alone(labels)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_means = _TermMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, mean in self._eval_means.take(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_loss_{name}"] = mean
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a report of training, not of an evaluation or the closing summary
            means = self._train_means.take(self.accelerator)
            logs.update({f"loss_{name}": mean for name, mean in means.items()})
        super().log(logs, start_time)

    def _scores(self) -> AbstractContextManager:
        if self.args.attention_weight == 0:
            return nullcontext()
        return attention_scores(self.model, self.teacher)

    def _check_finite(self, terms: dict[str, Tensor]) -> None:
        bad = {name: term.item() for name, term in terms.items() if not torch.isfinite(term)}
        if not bad:
            return
        culprits = [
            f"{who} parameter {name}"
            for who, model in (("student", self.model), ("teacher", self.teacher))
            for name in _not_finite(model)
        ]
        cause = (
            f"Not finite: {', '.join(culprits[:5])}. Was everything loaded or initialised?"
            if culprits
            else "All parameters are finite: look at the batch (no real token? labels out of "
            "range?) and the precision (fp16 overflows where bf16 does not)."
        )
        raise ValueError(f"The terms of the first batch must be finite, got {bad}. {cause}")


class _TermMeans:
    """Weighted means of the terms; the sums stay on the device, unread, until taken."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None
        self._weights = [0.0] * len(TERMS)

    def add(self, terms: dict[str, Tensor], weight: float = 1.0) -> None:
        zero = next(iter(terms.values())).new_zeros(())
        sums = weight * torch.stack([terms.get(name, zero).detach() for name in TERMS])
        self._sums = sums if self._sums is None else self._sums + sums
        self._weights = [
            w + weight * (n in terms) for n, w in zip(TERMS, self._weights, strict=True)
        ]

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, of the terms that were computed; starts anew."""
        weights = torch.tensor(self._weights, device=accelerator.device)
        sums = torch.zeros_like(weights) if self._sums is None else self._sums
        self._clear()
        sums, weights = accelerator.reduce(torch.stack([sums, weights]), "sum").tolist()
        return {n: s / w for n, s, w in zip(TERMS, sums, weights, strict=True) if w}


class _Deadline(TrainerCallback):
    """The share of the time that is spent; at 1 the step being taken becomes the last."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.share = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = monotonic()
        self.share = 0.0

    # Before the optimizer's step, so that the schedule's step that follows sees the share.
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        share = (monotonic() - self.start) / self.seconds
        if args.world_size > 1:  # one clock for all, or they would stop at different steps
            share = broadcast(torch.tensor(share, device=args.device)).item()
        self.share = min(share, 1.0)
        if share >= 1:  # as if planned: Trainer evaluates, saves and stops as after any last step
            state.max_steps = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= self.share >= 1  # time ends between two reports


class _TimeBar(ProgressCallback):
    """Trainer's own bar, in seconds of the budget in place of steps that will not be taken."""

    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            layout = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}"
            self.training_bar = tqdm(
                total=self.deadline.seconds, bar_format=layout, dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.training_bar.n = self.deadline.share * self.deadline.seconds
            self.training_bar.set_postfix_str(f"step {state.global_step}")


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def _not_finite(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]


def _alone(values: tuple) -> object:
    """As Trainer hands on predictions: None, the only one, or a tuple of several."""
    return values if len(values) > 1 else next(iter(values), None)


def _check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if student is teacher:
        raise ValueError("student and teacher are the same object; pass a copy.deepcopy of one.")
    owned = {id(p): name for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        if id(p) in owned:
            raise ValueError(
                f"The student's {name} is the teacher's {owned[id(p)]}: training would change the "
                "teacher. Build the student from copy.deepcopy(teacher)."
            )
    for name in ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"):
        s, t = getattr(student.config, name), getattr(teacher.config, name)
        if s != t:
            raise ValueError(
                f"student and teacher must agree on {name}, got {s} and {t}: layers are "
                "matched one to one, without projections. Compress this teacher, or choose its own."
            )
    # Only classes with a classifier have the attribute; a config has num_labels in any case.
    s, t = getattr(student, "num_labels", None), getattr(teacher, "num_labels", None)
    if s is not None and t is not None and s != t:
        raise ValueError(
            f"student and teacher must agree on num_labels, got {s} and {t}: load both with the "
            "task's num_labels."
        )
