"""Methods that override stock ones accept the same calls."""

import inspect

import pytest
from peft.tuners.lora import Linear as LoraLinear
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)

from kroneckerbert import DistillationTrainer, KroneckerBertForMaskedLM
from kroneckerbert.adapters import LoraKroneckerLinear
from kroneckerbert.distillation.clock import Checkpoints, Deadline
from kroneckerbert.distillation.progress import Bar, Lines
from kroneckerbert.reproduction.corpus import MaskedCollator

OURS = {
    KroneckerBertForMaskedLM: PreTrainedModel,
    DistillationTrainer: Trainer,
    Checkpoints: TrainerCallback,
    Deadline: TrainerCallback,
    Bar: ProgressCallback,
    Lines: PrinterCallback,
    MaskedCollator: DataCollatorForLanguageModeling,
    LoraKroneckerLinear: LoraLinear,
}


def overridden(ours: type, stock: type):
    for name, method in inspect.getmembers(stock, inspect.isroutine):
        own = getattr(ours, name)
        own, method = getattr(own, "__func__", own), getattr(method, "__func__", method)
        by_us = (getattr(own, "__module__", None) or "").startswith("kroneckerbert")
        if own is not method and by_us and not name.startswith("__"):
            yield name, own, method


@pytest.mark.parametrize("ours", OURS)
def test_overrides_accept_the_arguments_of_the_stock_method(ours):
    for name, own, stock in overridden(ours, OURS[ours]):
        ours_parameters = inspect.signature(own).parameters.values()
        kinds = {p.kind for p in ours_parameters}
        by_place = [
            p.name
            for p in ours_parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        by_name = {
            p.name: p.default
            for p in ours_parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        for place, p in enumerate(inspect.signature(stock).parameters.values()):
            where = f"{ours.__name__}.{name}({p.name})"
            if p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD:
                assert p.kind in kinds, where
            elif p.kind is p.POSITIONAL_OR_KEYWORD:
                if place < len(by_place):
                    assert by_place[place] == p.name, where
                else:
                    assert p.VAR_POSITIONAL in kinds and p.name not in by_name, where
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                if p.name in by_name:
                    assert by_name[p.name] == p.default or p.default is p.empty, where
                else:
                    assert p.VAR_KEYWORD in kinds, where
