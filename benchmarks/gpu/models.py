"""Whole models as contenders: a student on our kernels and on PyTorch's, and dense BERT_BASE."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.contenders import Contender, Workload, compiled
from kron_kernels.testing import assert_close

PRESETS = {"8x": "kronecker-bert-8", "21x": "kronecker-bert-21"}
COMPILED = (128, 4096)  # tokens
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}  # in the simulator
SMALL |= {"intermediate_size": 128, "vocab_size": 320}


def model_contenders(
    workload: Workload, device: str, dtype: torch.dtype, left_out: dict[str, str]
) -> dict[str, Contender]:
    """A forward without gradients, or a step of AdamW, of ``tokens / length`` sequences."""
    from transformers import BertConfig, BertModel

    from kroneckerbert import KroneckerBertConfig, KroneckerBertModel, capture

    simulated = device == "cpu"
    base = BertConfig(**(SMALL if simulated else {}))
    config = KroneckerBertConfig.preset(PRESETS[workload.label], base)
    batch = workload.tokens // workload.length
    ids = torch.randint(1, base.vocab_size, (batch, workload.length), device=device)
    training = workload.kind.endswith("training")

    def placed(model: nn.Module) -> nn.Module:
        return model.to(device, dtype).train(training)

    def fresh(cls: Any, config: Any) -> nn.Module:
        torch.manual_seed(0)
        return placed(cls(config, add_pooling_layer=False))

    student, plain = (fresh(KroneckerBertModel, config) for _ in range(2))
    on_eager(plain)
    dense = fresh(BertModel, base)
    models = {"student": student, "student eager": plain, "dense": dense}
    # Inductor takes half a minute for each, and twice that for a training step.
    if workload.tokens in COMPILED and not simulated and not training:
        for name in ("student eager", "dense"):
            models[f"{name} compiled"] = compiled(models[name])
    expected = exact(plain, ids)
    made = {}
    if not training:
        run_captured = capture(student, [(batch, workload.length)])
        check = partial(check_states, expected, config)
        made["student captured"] = Contender(partial(run_captured, ids), check)
    for name, model in models.items():
        step = partial(run, model, ids)
        if training:
            step = partial(train, model, optimizer(model), ids)
        own = name.startswith("student")
        check = partial(check_states, expected if own and not training else None, config)
        made[name] = Contender(step, check)
    return made


def on_eager(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "eager"


@torch.no_grad()
def exact(model: nn.Module, ids: Tensor) -> Tensor:
    """A few sequences' states in float32 by PyTorch's operators."""
    dtype = next(model.parameters()).dtype
    was = model.training
    states = model.float().eval()(ids[:4]).last_hidden_state
    model.to(dtype).train(was)
    return states


@torch.no_grad()
def run(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).last_hidden_state


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def train(model: nn.Module, steps: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One step; the loss needs no labels and reaches every layer."""
    states = model(ids).last_hidden_state
    states.float().square().mean().backward()
    steps.step()
    steps.zero_grad()
    return states.detach()


def check_states(expected: Tensor | None, config: Any, states: Tensor) -> None:
    """A student's states agree with its own in float32; of others, and in training, are finite."""
    if not states.isfinite().all():
        raise AssertionError("states: NaN or infinite")
    if expected is None:
        return
    # Each layer rounds its states twice more.
    slack = 8 * (2 * config.num_hidden_layers) ** 0.5
    width = config.hidden_size + config.intermediate_size
    assert_close("states", states[:4], expected.double(), width, slack=slack)
