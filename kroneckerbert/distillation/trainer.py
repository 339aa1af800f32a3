"""transformers' Trainer with the distance to a teacher as its loss."""

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from shutil import rmtree
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import ModelOutput
from transformers.utils.generic import find_labels
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from kroneckerbert.data import by_length
from kroneckerbert.distillation import cache, resuming
from kroneckerbert.distillation.clock import Deadline
from kroneckerbert.distillation.config import DistillationConfig
from kroneckerbert.distillation.pairing import (
    DETECTOR,
    check_pair,
    foreign_inputs,
    taken_inputs,
)
from kroneckerbert.distillation.pooling import Pooling, transformer_of
from kroneckerbert.distillation.progress import show_progress
from kroneckerbert.distillation.scores import attention_scores
from kroneckerbert.distillation.terms import (
    MEASURED,
    SENTENCE,
    TERMS,
    distillation_terms,
    moments_of,
    variances_of,
)
from kroneckerbert.files import put_in_place, read_json, write_checksums
from kroneckerbert.loading import is_sentence_transformer

# Heads with a label per token. Their loss is computed here, where the batch's share of all labels
# is known and a batch without labels does not divide by zero.
_TOKEN_LABELS = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification")

_LONE = 0.9  # share of the loss
_VARIANCES = "teacher_variances.json"  # in a checkpoint
_NO_ROWS: Any = []  # Trainer wants a data set to evaluate, an evaluator none


class DistillationTrainer(Trainer):
    """``Trainer`` whose loss is the distance to a teacher of the same widths.

    Args:
        model: The student; or a SentenceTransformer, whose transformer is then trained, in place,
            and saved in checkpoints.
        teacher: Moved to ``args.device`` in evaluation mode; never trained, wrapped or saved. It
            keeps its dtype unless ``args.teacher_dtype`` is set: bfloat16 halves its memory. Of a
            SentenceTransformer, the modules after the transformer make both models' sentence
            vectors, and are not trained; without one, the student's; else the mean over tokens.
        args: ``DistillationConfig``.
        evaluator: One of sentence-transformers' evaluators, or any function that takes the student
            as a SentenceTransformer and returns metrics by name. Called by each evaluation, with or
            without ``eval_dataset``.
        **trainer_kwargs: Other arguments of ``Trainer``.

    Each model receives the columns of the data that it would receive on its own, such as segments
    for a BERT teacher whose DistilBERT student has none. Both receive the same tokens.

    Every term is logged unweighted as ``loss_<term>``: the mean over processes since the last
    report; ``core_hours`` is the CPU time so far, of this process and of the runs it resumes.
    Evaluation reports ``eval_loss_<term>`` and needs no labels. A terminal shows a bar with the
    loss, a file a line with the time left, every ten seconds at most; with ``disable_tqdm``, lines,
    which ``remove_callback(PrinterCallback)`` switches off.

    The result of a step does not depend on how it is divided: each term is a mean over all tokens,
    pairs of tokens, rows or labels of the step, across batches and processes. A folder
    ``checkpoint-N`` is always complete, since it is renamed last; a diverging run saves none.

    Raises:
        ValueError: If the teacher shares parameters with the student; if the two differ in
            vocabulary, widths, heads or labels; at the first step, if a requested term cannot be
            computed, is not finite or has no gradient; at any step, if the loss is not finite.
    """

    # BERT's forward takes **kwargs, from which Trainer concludes that the loss is already divided
    # by the accumulation steps. It is not, and gradients would be too large by that factor.
    loss_is_scaled_for_ga = False

    args: DistillationConfig
    train_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        teacher: PreTrainedModel | nn.Module,
        args: DistillationConfig | None = None,
        evaluator: Callable[..., Mapping[str, float] | float] | None = None,
        **trainer_kwargs: Any,
    ):
        args = args or DistillationConfig()
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args must be a DistillationConfig, got {type(args).__name__}.")
        if args.label_smoothing_factor or trainer_kwargs.get("compute_loss_func"):
            raise ValueError(
                "The distillation loss replaces label_smoothing_factor and compute_loss_func: "
                "leave both unset."
            )
        given, pooled_by = model, teacher if is_sentence_transformer(teacher) else model
        model, teacher = transformer_of(model), transformer_of(teacher)
        if evaluator is not None:
            if not is_sentence_transformer(given):
                raise TypeError(
                    f"evaluator scores a SentenceTransformer, but the student is a "
                    f"{type(given).__name__}: compress a SentenceTransformer, and pass the result."
                )
            if trainer_kwargs.get("eval_dataset") is None:
                trainer_kwargs["eval_dataset"] = _NO_ROWS
        if is_sentence_transformer(given):
            trainer_kwargs.setdefault("processing_class", given.tokenizer)
        check_pair(model, teacher, args)
        super().__init__(model, args, **trainer_kwargs)
        self.evaluator, self._sentence_transformer = evaluator, given
        self._pooling = Pooling(pooled_by, args.device)
        self.model_accepts_loss_kwargs = False  # loss_is_scaled_for_ga before transformers 5.19
        dtype = getattr(torch, args.teacher_dtype) if args.teacher_dtype else None
        self.teacher = teacher.to(args.device, dtype).eval()
        self._targets = {*self.label_names, *find_labels(type(teacher)), cache.ROW}
        self._not_for_teacher = self._targets | foreign_inputs(teacher, self.model)
        self._not_for_student = {cache.ROW} | foreign_inputs(self.model, teacher)
        name, module = type(self.model).__name__, type(self.model).__module__
        self._token_labels = (
            name.endswith(_TOKEN_LABELS)
            and not name.endswith(DETECTOR)
            and module.startswith(("transformers.", "kroneckerbert."))  # other losses may differ
        )
        self._train_means, self._eval_means = _TermMeans(), _TermMeans()
        self._first_batch = True
        # Of the teacher's states and scores in the first step, by field, then by layer.
        self._variances: dict[str, Tensor] | None = None
        self._cache: cache.TeacherCache | None = None
        self._saving = self._warned = False
        self._rows: int | Tensor = 0  # seen by all processes since train() began
        self._started, self._hours = 0.0, 0.0  # of the process's CPU time, and of a resumed run's
        self._settings: dict[str, Any] = {}
        self._run, self._from = 0, None
        self._deadline = Deadline(args.max_minutes) if args.max_minutes is not None else None
        self.add_callback(_CoreHours(self))
        if self._deadline:
            self.add_callback(self._deadline)
        show_progress(self, self._deadline)  # reads the deadline, and so comes after it

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one in
                ``output_dir``, if any. True considers only runs with the present settings: rates,
                seeds, terms, steps or epochs, rows of the data and rows per step.
            trial: As for ``Trainer.train``.
            ignore_keys_for_eval: As for ``Trainer.train``.

        Raises:
            OSError: If a file of the checkpoint is missing or damaged; names the last complete
                checkpoint.
            ValueError: If the whole student is frozen, loss or parameters become non-finite, or
                all checkpoints in ``output_dir`` are of runs with other settings.
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "every parameter of the student is frozen, like those of the model that it was "
                "compressed from; call student.requires_grad_(True)."
            )
        self._begin(resume_from_checkpoint)
        self.cache_teacher()
        self._rows = 0
        with nullcontext() if self.args.student_dropout else _without_dropout(self.model):
            output = super().train(self._from, trial, ignore_keys_for_eval)
        self._check_parameters()
        return output

    def _begin(self, wanted: str | bool | None) -> None:
        """Choose run and checkpoint, in one process for all."""
        args, rows = self.args, self.train_dataset
        self._settings = resuming.settings(
            args.to_dict(),
            rows_of_data=len(rows) if isinstance(rows, cache.Rows) else None,
            rows_of_a_step=args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
        )
        found: list[Any] = [None]
        if args.process_index == 0:
            ranks = [0] if args.save_on_each_node else range(args.world_size)
            try:
                found[0] = resuming.start(
                    wanted, Path(args.output_dir), self._settings, ranks, args.world_size
                )
            except (OSError, ValueError) as error:
                found[0] = error
        if args.world_size > 1:
            broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        self._from, self._run = found[0]
        self._variances = None
        if self._from is not None and (path := Path(self._from) / _VARIANCES).exists():
            self._variances = {
                field: torch.tensor(values, device=args.device)
                for field, values in read_json(path).items()
            }

    def count_as_spent(self, seconds: float) -> None:
        """Subtract the time that a resumed run has already taken from ``max_minutes``."""
        if self._deadline is not None:
            self._deadline.spent = seconds

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._deadline is not None:
            warmup = min(self.args.warmup_steps, num_training_steps / 2)
            self._deadline.govern(scheduler, num_training_steps, warmup)
        return scheduler

    def _get_train_sampler(self, *args, **kwargs) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            return _GroupedByLength(sampler, self)
        return sampler

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | None]:
        """A step's batches and, instead of the number of labels, the sizes its terms divide by."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        if self._variances is None:
            self._measure(batches)
        sizes = torch.stack([self._sizes(batch) for batch in batches]).sum(0)
        sizes = self.accelerator.reduce(sizes.to(self.args.device), "sum")
        self._rows = self._rows + sizes[2].long()
        return batches, sizes

    def _sizes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Numbers of real tokens, pairs of them, rows and labels of a batch, shape ``(4,)``."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        lengths = (torch.ones_like(ids) if mask is None else mask != 0).sum(-1).float()
        labels = batch.get("labels")
        if labels is None:
            labels = ids.new_zeros(len(ids))  # one per row, such as a span
        elif getattr(self, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        counts = (lengths.sum(), lengths.square().sum(), len(ids), labels.ne(-100).sum())
        return torch.stack(
            [torch.as_tensor(n, dtype=torch.float, device=ids.device) for n in counts]
        )

    def training_step(self, *args, **kwargs) -> Tensor:
        with self._scores():  # including the backward: checkpointing repeats the forward
            loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._stop(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Σ weight * term; ``num_items_in_batch`` are the step's sizes from get_batch_samples."""
        weights = self.args.weights
        if self._first_batch:
            _let_record(self.model)
        if self._variances is None:  # an evaluation without training
            self._measure([inputs])
        shares = self._shares(inputs, num_items_in_batch)
        given = self._targets & inputs.keys()
        own = self._token_labels and weights["labels"] != 0 and "labels" in given
        own = own and given <= {"labels", "next_sentence_label", cache.ROW}
        not_for_student = self._not_for_student
        if own or weights["labels"] == 0:
            not_for_student = not_for_student | self._targets
        with self._scores():
            student = model(
                **_without(inputs, not_for_student), **self._captured(), return_dict=True
            )
            teacher = self._taught(inputs)
        if own:
            student["loss"] = _token_loss(student, inputs, shares)
            shares = shares | {"labels": 1.0}
        mask = _mask(inputs)
        if self._pools():
            student[SENTENCE] = self._pooling(student, mask)
            if SENTENCE not in teacher:  # the cache may have it
                teacher[SENTENCE] = self._pooling(teacher, mask)
        terms = distillation_terms(
            student,
            teacher,
            mask,
            weights,
            layer_map=self.args.layer_map,
            temperature=self.args.temperature,
            problem_type=getattr(self.model.config, "problem_type", None),
            shares=shares,
            variances=self._variances,
        )
        if self._first_batch:
            self._check_finite(terms)
            if model.training:
                self._check_gradients(terms)
                self._first_batch = False
        if model.training:
            # Trainer divides the step's loss by its number of batches: a plain mean.
            self._train_means.add(terms)
        else:  # eval_loss weights batches by their size
            self._eval_means.add(terms, weight=len(inputs["input_ids"]))
        loss = torch.stack(
            [
                (1.0 if weights[name] is None else weights[name]) * self._annealed(name) * term
                for name, term in terms.items()
            ]
        ).sum()
        if not return_outputs:
            return loss
        # Captured states are not predictions; Trainer would gather them.
        captured = ("hidden_states", "attentions", SENTENCE)
        return loss, type(student)(**{k: v for k, v in student.items() if k not in captured})

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Tensor]) -> ModelOutput:
        """The teacher's output for a batch, from the cache if that has it."""
        if self._cache is not None and cache.ROW in inputs:
            return self._cache(inputs[cache.ROW], inputs["input_ids"])
        # accelerate applies autocast to the student's forward only
        with self._scores(), self.accelerator.autocast():
            return self.teacher(
                **_without(inputs, self._not_for_teacher), **self._captured(), return_dict=True
            )

    def _measure(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Take the variances of the teacher's states and scores from a step's batches."""
        wanted = [field for field in MEASURED if self._captured()[f"output_{field}"]]
        sums: dict[str, Tensor] = {}
        for batch in batches if wanted else ():
            batch = self._prepare_inputs(dict(batch))
            output = self._taught(batch)
            for field in wanted:
                if output.get(field):  # the terms report a field that is not there
                    moments = moments_of(output[field], _mask(batch)).float()
                    sums[field] = sums.get(field, 0) + moments
        self._variances = {
            field: variances_of(self.accelerator.reduce(moments, "sum"))
            for field, moments in sums.items()
        }

    def _captured(self) -> dict[str, bool]:
        """The options of a forward pass that returns the fields of the terms."""
        weights = self.args.weights
        return {
            "output_hidden_states": weights["embedding"] != 0 or weights["hidden"] != 0,
            "output_attentions": weights["attention"] != 0,
        }

    def _pools(self) -> bool:
        """Whether a term compares sentence vectors."""
        weights = self.args.weights
        return weights["sentence"] != 0 or weights["relation"] != 0

    def _annealed(self, name: str) -> float:
        """The factor of a term's weight at this step."""
        if not self.args.teacher_annealing or not self.model.training:
            return 1.0
        share = min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        if self._deadline is not None:
            share = max(share, self._deadline.share)
        return share if name == "labels" else 1.0 - share

    def _shares(self, inputs: Mapping[str, Tensor], totals: Tensor | None) -> dict[str, float]:
        """Factors that turn means over this batch into its part of the means over the step.

        They undo the divisions by the number of batches (Trainer) and of processes (DDP).
        """
        kinds = ("tokens", "pairs", "rows", "labels")
        if totals is None:
            return dict.fromkeys(kinds, 1.0)
        parts = self.current_gradient_accumulation_steps * self.args.world_size
        sizes = self._sizes(inputs).to(totals.device)
        return dict(zip(kinds, parts * sizes / totals.clamp(min=1), strict=True))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | tuple | None, Tensor | tuple | None]:
        """Compute the loss without labels too; Trainer's own method would skip it."""
        inputs = self._prepare_inputs(inputs)
        labels = tuple(inputs[name] for name in self.label_names if name in inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        ignored = {"loss", *(ignore_keys or ())}
        logits = tuple(value for key, value in outputs.items() if key not in ignored)
        return loss, _alone(logits), _alone(labels)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # Trainer's samplers look at the first row.
        return (
            DataLoader(_NO_ROWS)
            if eval_dataset is _NO_ROWS
            else super().get_eval_dataloader(eval_dataset)
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._eval_means = _TermMeans()
        if dataloader.dataset is _NO_ROWS:
            output = EvalLoopOutput(None, None, {}, 0)
        else:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        for name, mean in self._eval_means.take(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_loss_{name}"] = mean
        if self.evaluator is not None:
            found = self.evaluator(self._sentence_transformer)
            scores = found if isinstance(found, Mapping) else {"evaluator": found}
            output.metrics.update({f"{metric_key_prefix}_{k}": float(v) for k, v in scores.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training report, not an evaluation or the final summary
            means = self._train_means.take(self.accelerator)
            logs.update({f"loss_{name}": mean for name, mean in means.items()})
            self._warn_of_a_lone_term(means)
            logs["core_hours"] = self._hours + process_time() / 3600 - self._started
        if "train_samples_per_second" in logs:
            # Trainer divides the rows of all planned steps, of which a limit of time has 10^9.
            logs["train_samples_per_second"] = round(int(self._rows) / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def _warn_of_a_lone_term(self, means: Mapping[str, float]) -> None:
        """Once: a term that is nearly all of the loss leaves the others no say."""
        weights = self.args.weights
        parts = {n: (1.0 if weights[n] is None else weights[n]) * v for n, v in means.items()}
        vectors = {"sentence", "relation"}  # two views of the same vectors
        largest = max(parts, key=parts.__getitem__)
        rest = {n for n in parts if n != largest and not {n, largest} <= vectors}
        share = parts[largest] / max(sum(parts.values()), 1e-30)
        if rest and share > _LONE and not self._warned:
            self._warned = True
            warnings.warn(
                f"{share:.0%} of the loss is the {largest} term, {means[largest]:.3g}: the others "
                f"hardly count. Lower {largest}_weight, now {parts[largest] / means[largest]:g}.",
                stacklevel=2,
            )

    # Checkpoints

    def _get_output_dir(self, trial: object) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / resuming.UNFINISHED if self._saving else folder)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """As Trainer's, but a checkpoint gets its name only when it is completely written."""
        self._check_parameters()
        folder = Path(self._get_output_dir(trial))
        self._saving = True
        unfinished = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        before = self.state.best_model_checkpoint
        try:
            if self.args.should_save:
                rmtree(unfinished, ignore_errors=True)  # left by a killed run
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if best := self.state.best_global_step:
                whole = folder / f"checkpoint-{best}"
                is_kept = whole.exists() or best == self.state.global_step
                self.state.best_model_checkpoint = str(whole) if is_kept else before
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / resuming.STATE))
                if self._variances is not None:
                    values = {field: v.tolist() for field, v in self._variances.items()}
                    (unfinished / name / _VARIANCES).write_text(json.dumps(values))
                write_checksums(unfinished / name, run=self._run, settings=self._settings)
                # An existing folder of this name is of an older run, or from before a resumption.
                put_in_place(unfinished / name, folder / name, unfinished / "replaced")
                unfinished.rmdir()
                # By time: the folder may contain higher steps of an earlier run.
                kept = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate_checkpoints(str(folder), *kept, use_mtime=True)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by library
            rmtree(unfinished, ignore_errors=True)
            last = self._last(folder)
            raise OSError(
                f"checkpoint {self.state.global_step} could not be saved ({error}). "
                f"{f'{last} is complete' if last else 'There is none before it'}: make room and "
                "start again with resume_from_checkpoint=True."
            ) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _last(self, folder: Path) -> Path | str | None:
        """This run's last checkpoint, or the one it was resumed from."""
        return resuming.last_of(folder, self._run) or self._from

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # uploads run in the background, and the folder will be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    # The cached teacher

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Trainer would keep only the student's columns.
        teachers = taken_inputs(self.teacher) - self._targets | {cache.ROW}
        self._signature_columns = sorted({*self._signature_columns, *teachers})

    def cache_teacher(self) -> None:
        """Fill ``args.teacher_cache`` with the teacher's outputs, unless it has them.

        ``train`` calls this first.

        Raises:
            TypeError: If the data cannot be read by row.
            ValueError: If the folder holds outputs of another teacher or for other data.
            OSError: If the disk has too little space.
        """
        if self.args.teacher_cache is None or self._cache is not None:
            return
        folder, rows = Path(self.args.teacher_cache), self.train_dataset
        if not isinstance(rows, cache.Rows):
            raise TypeError(
                f"teacher_cache needs training data with numbered rows, got {type(rows).__name__}; "
                "unset it for a stream."
            )
        about = cache.described(rows, without=self._targets)
        columns = set(rows[0]) if len(rows) else set()
        about["inputs"] = sorted(columns & taken_inputs(self.teacher) - self._not_for_teacher)
        about["teacher"] = cache.fingerprint(self.teacher)
        about["precision"] = self.accelerator.mixed_precision
        capture = self._captured()
        if self._pools():
            about["pooling"] = self._pooling.identity
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batches = DataLoader(
            Subset(self.train_dataset, by_length(about["lengths"])),
            self.args.per_device_eval_batch_size,
            collate_fn=collate,
        )

        @torch.no_grad()
        def teach(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            batch = self._prepare_inputs(_without(batch, self._not_for_teacher))
            with self._scores(), self.accelerator.autocast():
                output = self.teacher(**batch, **capture, return_dict=True)
            if self._pools():
                output[SENTENCE] = self._pooling(output, _mask(batch))
            return cache.captured(output)

        # local=False: machines may share the disk.
        with self.args.main_process_first(local=False, desc="computing the teacher's outputs"):
            if not cache.fits(folder, about, capture | {SENTENCE: self._pools()}):
                cache.write(folder, about, rows, batches, teach)
        self._cache = cache.TeacherCache(folder, self.args.device)
        self.train_dataset = cache.NumberedRows(rows)

    # Checks

    def _scores(self) -> AbstractContextManager:
        if self.args.attention_weight == 0:
            return nullcontext()
        return attention_scores(self.model, self.teacher)

    def _check_finite(self, terms: dict[str, Tensor]) -> None:
        bad = {name: term.item() for name, term in terms.items() if not torch.isfinite(term)}
        if not bad:
            return
        culprits = [
            f"{owner} parameter {name}"
            for owner, model in (("student", self.model), ("teacher", self.teacher))
            for name in _not_finite(model)
        ]
        cause = (
            f"Not finite: {', '.join(culprits[:5])}. Was everything loaded or initialised?"
            if culprits
            else "All parameters are finite: look at the batch (no real token? labels out of "
            "range?) and the precision (fp16 overflows where bf16 does not)."
        )
        raise ValueError(f"The terms of the first batch must be finite, got {bad}. {cause}")

    def _check_gradients(self, terms: dict[str, Tensor]) -> None:
        """Refuse terms without any gradient, which no learning curve would reveal."""
        if all(term.item() == 0 for term in terms.values()):
            raise ValueError(
                "all terms are 0: the student already computes what its teacher computes. Was it "
                "compressed?"
            )
        # This process's part of sharded parameters may have no gradient, and reentrant
        # checkpointing does not support torch.autograd.grad.
        whole = self.accelerator.distributed_type not in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        ) and not (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for name, term in terms.items():
            if term.item() == 0:  # the student is a copy of the teacher here
                continue
            moves = term.requires_grad
            if moves and whole:
                # 2 ** 16: small gradients would underflow in float16.
                gradients = torch.autograd.grad(
                    term * 2.0**16, parameters, retain_graph=True, allow_unused=True
                )
                moves = any(g is not None and bool(g.any()) for g in gradients)
            if not moves:
                raise ValueError(
                    f"the {name} term is {term.item():.3g} but moves no parameter of the student: "
                    f"unfreeze one that it depends on, or set {name}_weight=0."
                )

    def _check_parameters(self) -> None:
        if bad := _not_finite(self.model):
            self._stop(f"{bad[0]} is not finite after step {self.state.global_step}")

    def _stop(self, problem: str) -> None:
        last = self._last(Path(self.args.output_dir))
        raise ValueError(
            f"the training diverged: {problem}. Lower the learning rate, now "
            f"{self.args.learning_rate:g}, or train in float32 or bfloat16. "
            f"{f'The last good checkpoint is {last}.' if last else 'No checkpoint was saved.'}"
        )


class _CoreHours(TrainerCallback):
    """Reports go on counting where those of a resumed run ended."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        earlier = [log["core_hours"] for log in state.log_history if "core_hours" in log]
        self.trainer._hours = max(earlier, default=0.0)
        self.trainer._started = process_time() / 3600


class _GroupedByLength(Sampler):
    """Batches of similar lengths, in an order that depends on seed and epoch only.

    Trainer's own order depends on the global generator's state, which differs in a resumed run.
    """

    def __init__(self, sampler: LengthGroupedSampler, trainer: Trainer):
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        epoch = int(self.trainer.state.epoch or 0)
        self.sampler.generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return iter(self.sampler)


class _TermMeans:
    """Weighted means of the terms; the sums stay on the device until ``take``."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights = dict.fromkeys(TERMS, 0.0)

    def add(self, terms: dict[str, Tensor], weight: float = 1.0) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * term.detach()
            self._weights[name] += weight

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes of the computed terms; resets the sums."""
        zero = torch.zeros((), device=accelerator.device)
        sums = torch.stack([self._sums.get(name, zero) for name in TERMS])
        both = torch.stack([sums, sums.new_tensor(list(self._weights.values()))])
        self._clear()
        sums, weights = accelerator.reduce(both, "sum").tolist()
        return {n: s / w for n, s, w in zip(TERMS, sums, weights, strict=True) if w}


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates: list[tuple[nn.Module, str]] = [(module, "p") for module in dropouts]
    # ModernBERT and Llama store the attention's dropout rate as a number.
    name = "attention_dropout"
    rates += [(m, name) for m in model.modules() if isinstance(getattr(m, name, None), float)]
    before = [getattr(module, name) for module, name in rates]
    try:
        for module, name in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for (module, name), rate in zip(rates, before, strict=True):
            setattr(module, name, rate)


def _let_record(model: PreTrainedModel) -> None:
    """Let transformers record outputs of modules whose class FSDP2 has replaced."""
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None)
        # Older versions of transformers have a plain dict by class name.
        key = str(type(module)) if type(_CAN_RECORD_REGISTRY) is dict else module
        if isinstance(module, PreTrainedModel) and not _CAN_RECORD_REGISTRY.get(key):
            _CAN_RECORD_REGISTRY[key] = recorded


def _not_finite(model: nn.Module) -> list[str]:
    return [
        name
        for name, p in model.named_parameters()
        # This process's part of a sharded parameter.
        if not torch.isfinite(p.to_local() if hasattr(p, "to_local") else p).all()
    ]


def _token_loss(
    student: ModelOutput, inputs: Mapping[str, Tensor], shares: Mapping[str, float | Tensor]
) -> Tensor:
    """Cross-entropy over labelled tokens, plus next-sentence prediction's if it has labels."""
    logits = student["prediction_logits" if "prediction_logits" in student else "logits"]
    labels = inputs["labels"]
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = total / labels.ne(-100).sum().clamp(min=1) * shares["labels"]
    if "next_sentence_label" in inputs and "seq_relationship_logits" in student:
        pairs = student["seq_relationship_logits"].float()
        loss = loss + F.cross_entropy(pairs, inputs["next_sentence_label"]) * shares["rows"]
    return loss


def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """The attention mask, of ones if there is none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def _without(inputs: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in names}


def _alone(values: tuple) -> Any:
    """Predictions in Trainer's form: None, a single value, or a tuple."""
    return values if len(values) > 1 else next(iter(values), None)
