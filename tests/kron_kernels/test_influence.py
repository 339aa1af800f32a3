"""How much a plan lets each layer's error weigh."""

import pytest
import torch
from torch import nn

from kron_kernels.plan import plan
from kron_kernels.plan.influence import Influences
from kron_kernels.plan.layers import find_targets


class Pair(nn.Module):
    """Two layers of equal weights whose outputs are added, the second's times a constant."""

    def __init__(self, second: float):
        super().__init__()
        self.first, self.second, self.by = nn.Linear(64, 64), nn.Linear(64, 64), second
        self.unused = nn.Linear(64, 64)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x):
        return {"y": (self.first(x) + self.by * self.second(x),), "rows": torch.arange(len(x))}


def of(module: nn.Module, inputs, **moments) -> dict[str, float]:
    influences = Influences(module, inputs)
    for path, layer in module.named_children():
        influences.measure(path, layer, moments.get(path))
    return influences.relative()


@pytest.mark.parametrize("by", [0.5, 3.0])
def test_an_influence_is_the_energy_of_the_change_in_the_output(by):
    pair, x = Pair(by), torch.randn(50, 64)
    with torch.no_grad():
        before = pair(x)["y"][0]
        found = of(pair, x)
        assert torch.equal(pair(x)["y"][0], before)  # the module is as it was
    assert found["second"] / found["first"] == pytest.approx(by**2, rel=1e-4)
    assert found["unused"] == 1.0
    assert (found["first"] + found["second"]) / 2 == pytest.approx(1.0)


@pytest.mark.parametrize("sides", [(64, 24), (24, 64)], ids=str)
def test_the_error_is_that_of_low_rank_nearest_in_the_outputs(sides):
    """Of a single layer the output's relative change is the layer's own error."""
    torch.manual_seed(0)
    m, n = sides
    layer = nn.Linear(n, m, bias=False)
    x = torch.randn(5000, n) * torch.logspace(0, -2, n)
    moment = x.mT @ x / len(x)
    for given in (moment, None):
        influences = Influences(layer, x if given is not None else torch.randn(5000, n))
        with torch.no_grad():
            influences.measure("", layer, given)
        # 1 % of the mean variance is added to the moment; 5,000 samples estimate it to 3 %.
        assert influences.found[""] == pytest.approx(1.0, rel=0.05)


def test_tables_are_looked_up_and_outputs_at_padding_do_not_count():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.up = nn.Embedding(50, 16), nn.Linear(16, 16)

        def forward(self, ids, attention_mask):
            y = self.words(ids)
            return y + 1e3 * (1 - attention_mask)[..., None] * self.up(y)

    net, ids, mask = Padded(), torch.arange(50)[None], torch.ones(1, 50)
    with torch.no_grad():
        mask[:, 40:] = 0
        masked = of(net, {"ids": ids, "attention_mask": mask})
        bare = Influences(net, {"ids": ids, "attention_mask": mask})
        bare.mask = None
        bare.clean = bare._outputs()
        for path, layer in net.named_children():
            bare.measure(path, layer, None)
    assert masked["up"] == 1.0  # no change is seen: only padding would show it
    assert bare.found["up"] > 0.1


@pytest.mark.parametrize("output", [torch.arange(3), None, torch.zeros(2, 3)])
def test_without_a_change_of_an_output_all_layers_weigh_the_same(output):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.second(self.first(x))
            return output

    assert of(Silent(), torch.randn(2, 4)) == {"first": 1.0, "second": 1.0}


def test_weights_at_the_ends_of_their_range_and_zeros_have_an_influence():
    for scale in (1e30, 1e-30, 0.0):
        net = Pair(2.0)
        with torch.no_grad():
            for layer in (net.first, net.second):
                layer.weight.mul_(scale)
                layer.bias.zero_()
        found = of(net, torch.randn(5, 64))
        expected = 1.0 if scale == 0.0 else 4.0
        assert found["second"] / found["first"] == pytest.approx(expected, rel=1e-3)


def test_a_plan_spends_its_parameters_where_an_error_does_most():
    torch.manual_seed(0)
    pair = Pair(10.0)
    made = plan(pair, {"parameters": "50%"}, torch.randn(50, 64), keep_dense_if_slower=False)
    parameters = {row.path: row.parameters for row in made.layers}
    errors = {row.path: row.error for row in made.layers}
    assert parameters["second"] > 2 * parameters["first"]
    assert errors["second"] < errors["first"]
    with torch.no_grad():
        influence = of(pair, torch.randn(50, 64))
    weighed = sum(errors[path] * influence[path] for path in ("first", "second"))
    everything = influence["first"] + influence["second"] + 1.0  # of the layer that is not called
    assert made.totals["error"] == pytest.approx(weighed / everything, rel=0.1)


def test_targets_weigh_one_before_they_are_measured():
    assert {t.influence for t in find_targets(Pair(1.0))} == {1.0}
