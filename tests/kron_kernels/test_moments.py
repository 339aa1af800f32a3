"""Second moments of layer inputs against a record of all inputs."""

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kron_kernels.modules import watching
from kron_kernels.moments import second_moments

WIDTH = 6


class Reads(nn.Module):
    """Layers that read one tensor, the same one after a write, or several."""

    def __init__(self):
        super().__init__()
        for name in ("query", "key", "written", "twice", "again", "pooled", "unused"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x, attention_mask=None):
        x = x.clone()
        y = self.query(x) + self.key(x) + self.again(x)
        x.mul_(2).add_(1)
        y = y + self.written(input=x)
        y = self.twice(y) + self.twice(y)
        return self.again(y) + self.pooled(y[:, 0])[:, None]


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_moments_are_those_of_all_rows_that_each_layer_reads(masked, mode):
    net = Reads().train()
    layers = dict(net.named_children())
    batches = [{"x": torch.randn(4, n, WIDTH)} for n in (5, 3)]
    rows = defaultdict(list)
    for batch in batches:
        mask = torch.ones(batch["x"].shape[:2], dtype=torch.int64)
        if masked:
            mask[1, 2:] = 0
            batch["attention_mask"] = mask

        def record(name, x, mask=mask):
            rows[name].append(x[mask.bool()] if x.ndim == 3 else x.clone())

        with watching(layers, record), torch.no_grad():
            net(batch["x"])
    with mode():
        found = second_moments(net, batches, layers)
    assert found.keys() == layers.keys() - {"unused"}
    for name, moment in found.items():
        x = torch.cat(rows[name])
        torch.testing.assert_close(moment, x.mT @ x / len(x))
    if mode is nullcontext:
        assert found["query"] is found["key"] is not found["again"]
    assert net.training and not any(layer._forward_pre_hooks for layer in layers.values())


def test_no_batch_and_one_batch_and_infinite_inputs_are_refused():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    layers = {"0": net[0]}
    with pytest.raises(ValueError, match="calibration is empty"):
        second_moments(net, iter(()), layers)
    for batch in (torch.ones(2, WIDTH), {"input": torch.ones(2, WIDTH)}):
        with pytest.raises(TypeError, match=r"calibration is one batch, .*\[batch\]"):
            second_moments(net, batch, layers)
    with pytest.raises(ValueError, match="the inputs of 0 on calibration are NaN"):
        second_moments(net, [torch.full((2, WIDTH), torch.inf)], layers)
