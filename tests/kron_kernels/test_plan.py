"""The planner: budgets recomputed, errors and choices against brute force, a simulated clock."""

import copy
import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSum,
    decompose,
    densify_,
    factorise_,
    nearest_kronecker_sum,
)
from kron_kernels.decompose import dense_weight, shrunk
from kron_kernels.factors import entry_of, parse, random_layer
from kron_kernels.moments import second_moments
from kron_kernels.plan import LayerPlan, Plan, plan, planner, result, solver
from kron_kernels.plan import clock as clocks
from kron_kernels.plan.candidates import candidates_of
from kron_kernels.plan.layers import Candidate, Target, find_targets
from kron_kernels.plan.solver import solve
from kron_kernels.plan.spectra import spectra
from kron_kernels.timing import Timing

KRONECKER = (KroneckerLinear, KroneckerSum, KroneckerEmbedding)
WIDTH, HIDDEN, WORDS = 24, 48, 60
IDS = torch.arange(20).view(2, 10)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, attention_mask=None):
        return self.norm(x + self.down(self.up(x).relu()))


class Net(nn.Module):
    def __init__(self, blocks: int = 3):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 6)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for block in self.layer:
            x = block(x)
        return self.head(x[:, 0])


def milliseconds(layer: nn.Module) -> float:
    """Time on a machine where each parameter takes 1 µs, and starting each product 100 µs."""
    starts = 100 * len(getattr(layer, "parts", "1")) if isinstance(layer, KRONECKER) else 0
    return (sum(p.numel() for p in layer.parameters()) + starts) / 1000


def layers_of(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (*KRONECKER, nn.Linear, nn.Embedding)):
        return [module]
    return [layer for child in module.children() for layer in layers_of(child)]


class Clock:
    """Replaces ``interleaved``: returns simulated times, and records the calls."""

    def __init__(self):
        self.of, self.rest, self.surprise = milliseconds, 1.0, 1.0
        self.modules, self.layers = [], Counter()

    def __call__(self, calls, seconds=None, at_least=None):
        timings = {}
        for name, call in calls.items():
            module = call.args[0]
            layers = layers_of(module)
            ms = sum(map(self.of, layers))
            if layers != [module]:
                self.modules.append(module)
                factorised = any(isinstance(layer, KRONECKER) for layer in layers)
                ms = (ms + self.rest) * (self.surprise if factorised else 1.0)
            else:
                self.layers[repr(module)] += 1
            timings[name] = Timing(ms, ms, ms)
        return timings


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(clocks, "interleaved", fake)
    return fake


def totals(module: nn.Module, inputs) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "bytes": sum(p.numel() * p.element_size() + 160 for p in module.parameters()),
        "flops": counter.get_total_flops(),
    }


def weight_error(weight: torch.Tensor, entry, rounds: int = 0) -> float:
    """The relative squared error of the nearest sum of these terms, after rounds of refitting."""
    fitted = decompose._nearest(weight, parse(entry), None, max_iterations=rounds)
    off = weight - sum(dense_weight(a, b) for a, b in fitted)
    return (off.square().sum() / weight.square().sum()).item()


# --- budgets


@pytest.mark.parametrize(
    "budget",
    [
        {"parameters": "2x"},
        {"parameters": 9000},
        {"bytes": "60%"},
        {"flops": "3x"},
        {"flops": 30_000.0},
        {"latency": "2x"},
        {"latency": 8},
        {"parameters": "50%", "flops": "4x"},
        {"parameters": "2x", "bytes": "2x", "flops": "2x", "latency": "1.8x", "error": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", ["error", "latency"])
def test_a_budget_is_met_by_the_factorised_module(budget, objective, clock):
    net = Net()
    dense = totals(net, IDS) | {"latency": clock.rest + sum(map(milliseconds, layers_of(net)))}
    made = plan(net, budget, IDS, objective=objective)
    student = factorise_(copy.deepcopy(net), made.factors)
    latency = clock.rest + sum(map(milliseconds, layers_of(student)))
    actual = totals(student, IDS) | {"latency": latency}
    for key, value in budget.items():
        if key == "error":
            assert made.totals["error"] <= value
            continue
        limit = value
        if isinstance(value, str):
            number = float(value[:-1])
            limit = dense[key] / number if value[-1] == "x" else dense[key] * number / 100
        assert actual[key] <= limit * (1 + 1e-9)
    for key, value in actual.items():
        assert made.totals[key]["planned"] == pytest.approx(value)
        assert made.totals[key]["dense"] == pytest.approx(dense[key])
    assert made.totals["latency"]["predicted"] == pytest.approx(latency)
    assert made.budget == budget and made.objective == objective
    assert made.totals["error"] > 0


def test_the_objectives_size_and_error_agree():
    net = Net()
    small = plan(net, {"error": 0.3}, IDS, objective="size")
    assert 0.2 < small.totals["error"] <= 0.3
    parameters = small.totals["parameters"]["planned"]
    assert parameters < small.totals["parameters"]["dense"]
    back = plan(net, {"parameters": parameters}, IDS, keep_dense_if_slower=False)
    assert back.totals["error"] <= small.totals["error"] * 1.02
    assert back.totals["parameters"]["planned"] <= parameters


def test_a_larger_budget_never_has_a_larger_error():
    net = Net()
    errors = [
        plan(net, {"flops": f"{n}x"}, IDS, keep_dense_if_slower=False).totals["error"]
        for n in (1, 1.5, 2, 4, 8)
    ]
    assert errors == sorted(errors) and errors[0] == 0.0 < errors[1]


def test_half_precision_counts_its_bytes():
    net = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 24)).bfloat16()
    made = plan(net, {"bytes": 3600}, torch.ones(2, 24).bfloat16())
    assert made.totals["bytes"]["planned"] <= 3600
    headers = made.totals["bytes"]["planned"] - 2 * made.totals["parameters"]["planned"]
    assert 0 < headers <= 1600 and headers % 160 == 0  # a file's, for each tensor
    assert made.setting["dtype"] == "bfloat16"


def test_tied_parameters_count_once_and_tied_layers_stay():
    net = nn.ModuleDict({"words": nn.Embedding(30, 24), "up": nn.Linear(24, 24)})
    net["decoder"] = nn.Linear(24, 30, bias=False)
    net["decoder"].weight = net["words"].weight
    net.forward = lambda ids: net["decoder"](net["up"](net["words"](ids)))
    made = plan(net, {"parameters": "90%"}, IDS)
    assert [row.path for row in made.layers] == ["up"]
    assert made.totals["parameters"]["dense"] == 30 * 24 + 24 * 24 + 24
    with pytest.raises(ValueError, match="'decoder' cannot be factorised: its weight is tied to"):
        plan(net, {"parameters": "90%"}, IDS, names=["decoder"])
    # A builder may tie the factors.
    built = []

    def build(factors):
        built.append(factors)
        return factorise_(copy.deepcopy(net), {k: v for k, v in factors.items() if k == "up"})

    plan(net, {"error": 0.5}, IDS, objective="size", names=["words"], build=build)
    assert built[0].keys() == {"words"}


# --- errors and candidates


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (30, 40), (13, 8)], ids=str)
def test_the_errors_of_candidates_are_those_of_the_nearest_factors(size):
    rows, columns = size
    layer = nn.Linear(columns, rows)
    # A spectrum that falls, as trained weights have, and so large that squares would overflow.
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(0, -2, columns)).mul_(1e25)
    target = Target("", layer, inputs=[(torch.Size([2, columns]), torch.float32)])
    dense, *candidates = candidates_of(target, None, mix=True)
    assert dense == Candidate((), rows * columns, 4 * rows * columns, 0.0)
    sorts = set()
    for c in candidates:
        entry = entry_of(c.shapes)
        wide = layer.weight.detach().double()
        assert c.error == pytest.approx(weight_error(wide, entry), rel=1e-3, abs=1e-5)
        made = random_layer(layer, c.shapes)
        assert c.parameters == sum(p.numel() for p in made.parameters()) - rows
        with FlopCounterMode(display=False) as counter:
            made(torch.ones(2, columns))
        assert c.flops <= counter.get_total_flops() <= 3 * c.flops
        assert c.parameters < dense.parameters
        low = [s.a_shape == (rows, 1) for s in c.shapes]
        sorts.add(tuple(low))
    assert {(False,), (True,)} <= sorts
    assert (False, True) in sorts
    without = candidates_of(target, None, mix=False)
    assert all(len(c.shapes) < 2 for c in without)


@pytest.mark.parametrize("side", ["left", "right"])
def test_spectra_by_partial_traces_are_those_of_the_rearranged_weight(side):
    w = torch.randn(24, 36)
    ps, qs = [1, 2, 3, 4, 6, 8, 12], [1, 2, 3, 4, 6, 9, 12]
    found = dict(spectra(w, side, ps, qs))
    assert found.keys() == set(itertools.product(ps, qs))
    for (p, q), spectrum in found.items():
        a_shape = (p, q) if side == "left" else (24 // p, 36 // q)
        (m1, n1), (m2, n2) = a_shape, (24 // a_shape[0], 36 // a_shape[1])
        r = w.double().view(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
        expected = torch.linalg.svdvals(r).square()
        spectrum = spectrum[: len(expected)]
        torch.testing.assert_close(spectrum, expected[: len(spectrum)], rtol=1e-4, atol=1e-4)


def calibrated(samples: int = 200):
    layer = nn.Linear(WIDTH, HIDDEN)
    x = torch.randn(samples, WIDTH) @ torch.randn(WIDTH, WIDTH) * torch.logspace(0, -2, WIDTH)
    return layer, x


def test_errors_with_calibration_are_those_of_the_layers_that_factorise_makes():
    layer, x = calibrated()
    target = Target("", layer, inputs=[(x.shape, x.dtype)])
    with torch.no_grad():
        moment = second_moments(layer, [x[:90], x[90:]], {"": layer})[""]
    torch.testing.assert_close(moment, x.mT @ x / len(x))
    candidates = candidates_of(target, moment, mix=True)[1:]
    w, c = layer.weight.detach().double(), shrunk(moment, 0.01)

    def output_error(fitted) -> float:
        off = w - sum(dense_weight(a, b) for a, b in fitted)
        return ((off @ c * off).sum() / (w @ c * w).sum()).item()

    better, sorts = 0, set()
    for candidate in candidates:
        made = copy.deepcopy(nn.Sequential(layer))
        factorise_(made, {"0": entry_of(candidate.shapes)}, second_moments={"0": moment})
        off = w - made[0].to_linear().weight.detach().double()
        error = ((off @ c * off).sum() / (w @ c * w).sum()).item()
        low = [s.a_shape == (HIDDEN, 1) for s in candidate.shapes]
        sorts.add(tuple(low))
        if low == [True]:
            assert candidate.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        elif low == [False]:  # five steps here, twenty there
            assert candidate.error == pytest.approx(error, rel=0.1, abs=1e-3), candidate
        else:  # an upper bound: factorise_ refits the parts to one another
            assert error <= 1.1 * candidate.error + 1e-3, candidate
        plain = output_error(nearest_kronecker_sum(w, [s.part for s in candidate.shapes]))
        assert candidate.error <= 1.01 * plain, candidate
        better += candidate.error < 0.9 * plain
    assert sorts == {(False,), (True,), (False, True)}
    assert better > len(candidates) / 2


@pytest.mark.parametrize("size", [(13, 7), (2, 2039)], ids=str)
def test_calibration_where_no_product_can_be_fitted(size):
    rows, columns = size  # prime; or the only products have 2039 unknowns
    layer = nn.Linear(columns, rows)
    target = Target("", layer, inputs=[(torch.Size([2, columns]), torch.float32)])
    moment = torch.eye(columns, dtype=torch.float64)
    dense, *others = candidates_of(target, moment, mix=True)
    assert not dense.shapes and all(s.is_low_rank for c in others for s in c.shapes)


def test_calibration_improves_the_choice():
    layer, x = calibrated(400)
    net = nn.Sequential(layer)
    errors = []
    for calibration in (None, iter([x])):
        made = plan(net, {"parameters": "3x"}, x[:4], calibration=calibration)
        moments = {"0": x.mT @ x} if calibration else None
        student = factorise_(copy.deepcopy(net), made.factors, second_moments=moments)
        with torch.no_grad():
            errors.append(((student(x) - net(x)).square().sum() / net(x).square().sum()).item())
    assert errors[1] < errors[0] and errors[1] <= made.totals["error"] * 1.1


def test_a_sum_is_chosen_where_the_weight_is_one():
    product = torch.kron(torch.randn(4, 2), torch.randn(12, 24))
    low = torch.randn(48, 3) @ torch.randn(3, 48)
    net = nn.Sequential(nn.Linear(48, 48))
    with torch.no_grad():
        net[0].weight.copy_(product / product.norm() + low / low.norm())
    mixed = plan(net, {"parameters": "3x"}, torch.ones(4, 48))
    terms = mixed.factors["0"]
    assert len(terms) == 2 and terms[1]["a_shape"] == [48, 1]
    single = plan(net, {"parameters": "3x"}, torch.ones(4, 48), mix=False)
    assert len(single.factors["0"]) == 1
    assert mixed.totals["error"] < 0.7 * single.totals["error"]
    weight = net[0].weight.detach().clone()
    student = factorise_(net, mixed.factors)
    assert isinstance(student[0], KroneckerSum)
    # factorise_ refits the parts to one another, which candidates do not.
    error = (student[0].to_linear().weight - weight).square().sum() / weight.square().sum()
    assert error <= mixed.totals["error"] * 1.001


# --- names and decisions


def test_every_linear_layer_by_default_and_others_by_name():
    net = Net(2)
    paths = [f"layer.{i}.{name}" for i in range(2) for name in ("up", "down")]
    made = plan(net, {"parameters": "1.2x"}, IDS)
    assert list(made.factors) == [*paths, "head", "unused"]
    assert list(plan(net, {"error": 0.1}, IDS, names=["up"]).factors) == [paths[0], paths[2]]
    made = plan(net, {"parameters": "1.2x"}, IDS, names=["words", "layer.1.up"])
    assert list(made.factors) == ["words", "layer.1.up"]
    table = plan(Net(), {"parameters": "1.1x"}, IDS, names=["words"]).factors["words"]
    ((a_shape, rank),) = [(t["a_shape"], t["rank"]) for t in table]
    assert a_shape[0] == WORDS and WIDTH % a_shape[1] == 0
    assert rank == 1 or a_shape[1] == 1  # a product, or low rank
    with pytest.raises(ValueError, match=r"names has 'layer.1.upp', .* nearest are layer.1.up,"):
        plan(net, {"error": 0.1}, IDS, names=["layer.1.upp"])


def test_the_error_of_a_table_is_that_of_the_nearest_one():
    net = Net(1)
    made = plan(net, {"parameters": "1.2x"}, IDS, names=["words"])
    entry = made.factors["words"]
    assert made.layers[0].error == pytest.approx(weight_error(net.words.weight, entry), rel=1e-3)


def test_a_table_is_not_compressed_more_than_the_whole_unless_it_has_to_be():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.words.weight[:, 1:] *= 1e-2  # nearly of rank 1: by errors, all else needs more
    names = ["words", "up", "down", "head", "unused"]
    found = plan(net, {"parameters": "2x"}, IDS, names=names)
    words = next(row for row in found.layers if row.path == "words")
    # The nearest of the ranks tried, which are 12 % apart.
    assert words.parameters >= 0.9 * words.parameters_dense / 2
    assert words.parameters < words.parameters_dense
    # Layers kept dense leave no room for it.
    kept = dict.fromkeys(["up", "down"])
    size = sum(p.numel() for p in net.parameters()) - WORDS * WIDTH + 100
    found = plan(net, {"parameters": size}, IDS, names=names, layers=kept)
    assert next(row for row in found.layers if row.path == "words").parameters <= 100


def test_decisions_are_kept_and_the_longest_name_decides():
    net, term = Net(), {"a_shape": [4, 2], "rank": 2}
    layers = {"up": term, "layer.1.up": None, "head": [{"a_shape": (2, 4)}, {"a_shape": [6, 1]}]}
    made = plan(net, {"parameters": "99%"}, IDS, layers=layers)
    assert made.factors["layer.0.up"] == made.factors["layer.2.up"] == [term]
    assert made.factors["layer.1.up"] is None
    assert made.factors["head"] == [{"a_shape": [2, 4], "rank": 1}, {"a_shape": [6, 1], "rank": 1}]
    by_path = {row.path: row for row in made.layers}
    assert by_path["layer.1.up"].reason == "as requested"
    for path in ("layer.0.up", "head"):
        weight = net.get_submodule(path).weight.detach()
        error = weight_error(weight, made.factors[path], rounds=20)
        assert by_path[path].error == pytest.approx(error, rel=1e-4)
    # A decision adds an unnamed layer, and holds although the layer is not called.
    table = {"words": {"a_shape": [WORDS, 6], "rank": 1}, "unused": {"a_shape": [2, 2], "rank": 1}}
    made = plan(net, {"error": 0.9}, IDS, layers=table, names=["head"])
    assert made.factors["words"] == [table["words"]] and made.factors["unused"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"upp": None}, r"layers has 'upp', which is not a layer .* nearest are up, "),
        (
            {"up": {"a_shape": [5, 2], "rank": 1}},
            r"layers\['up'\], for layer.0.up: weight's 48 rows are not divisible by .* 4 and 6",
        ),
        (
            {"layer.1.up": {"a_shape": [48, 1], "rank": 16}},
            r"for layer.1.up: rank 16 has 1,152 parameters, no fewer than the dense layer's 1,152; "
            r"lower the rank",
        ),
        ({"up": {"a_shape": [2, 2], "rank": 5}}, r"for layer.0.up: rank = 5, .* use rank <= 4"),
        ({"up": {"a_shape": [2], "rank": 1}}, r"layers\['up'\] = .* must look like \{\"a_shape\""),
        ({"up": {"a_shape": [2, True]}}, "must look like"),
        ({"up": []}, r"layers\['up'\] is an empty list; write None for a dense layer"),
        (
            {"words": {"a_shape": [30, 6]}},
            r"for each of its 60 rows; use a_shape = \[60, 6\]",
        ),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v),
)
def test_a_decision_that_does_not_fit_is_refused_with_the_layer_and_the_remedy(layers, message):
    with pytest.raises(ValueError, match=message):
        plan(Net(), {"parameters": "2x"}, IDS, layers=layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "2x"}, r"budget = '2x' must be a mapping, such as \{\"parameters\": \"8x\"\}"),
        ({"budget": None}, "budget = None must be a mapping"),
        ({"budget": {0: "2x"}}, "budget has the key 0, but keys must be strings"),
        ({"layers": ["up"]}, r"layers = \['up'\] must be a mapping, such as \{\"up\": "),
        ({"layers": []}, r"layers = \[\] must be a mapping"),
        ({"layers": {0: None}}, "layers has the key 0, but keys must be strings"),
        ({"names": [0]}, "names has 0, but must be strings, the ends of paths"),
        ({"names": 0}, "names = 0 must be a list of strings, the ends of paths"),
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_refused_with_an_example(change, message):
    with pytest.raises(TypeError, match=message):
        plan(
            Net(1), **{"budget": {"parameters": "2x"}, "inputs": IDS, "objective": "size"} | change
        )


@pytest.mark.parametrize(
    ("budget", "objective", "message"),
    [
        ({"size": 3}, "error", "budget has 'size', but can have parameters, bytes, flops, lat"),
        ({"parameters": "8"}, "error", r"budget\['parameters'\] = '8' must be a number, 'times "),
        ({"parameters": "0x"}, "error", "'times smaller' as in '8x', or a share as in '50%'"),
        ({"error": "2x"}, "error", r"budget\['error'\] = '2x' must be a number or a share"),
        ({"flops": True}, "error", "budget"),
        ({"latency": -1.0}, "error", "budget"),
        ({"latency": float("nan")}, "error", "budget"),
        ({"latency": 10**400}, "error", "must be a number, 'times smaller' as in '8x'"),
        ({"latency": float("inf")}, "error", r"budget\['latency'\] = inf must be a number"),
        ({}, "error", "the budget is empty, so every layer would stay dense"),
        ({"flops": 1}, "speed", "objective = 'speed' must be 'error', 'size' or 'latency'"),
    ],
    ids=str,
)
def test_a_malformed_budget_is_refused(budget, objective, message):
    with pytest.raises(ValueError, match=message):
        plan(Net(), budget, IDS, objective=objective)


def test_a_layer_that_is_not_called_stays_dense_with_the_reason():
    made = plan(Net(), {"parameters": "1.5x"}, IDS)
    (row,) = (row for row in made.layers if row.path == "unused")
    assert row.terms is None and row.flops == row.flops_dense == 0 and row.latency == 0
    assert row.reason == "not called with these inputs, kept dense"


def test_a_module_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer that can be factorised"):
        plan(nn.Sequential(nn.ReLU()), {"error": 0.1}, torch.ones(2, 3))


def test_layers_of_other_kinds_are_named_where_a_plan_lacks_layers():
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Conv1d(8, 8, 1))
    x = torch.ones(2, 4, 3)
    message = r"can be factorised: '0': .* Conv1d, with a kernel of 3.*; '2': .*nn.Linear\(8, 8\)"
    with pytest.raises(ValueError, match=message):
        plan(net, {"parameters": "2x"}, x)
    with pytest.raises(ValueError, match=r"names has '0', which cannot be factorised: .* Conv1d"):
        plan(net, {"parameters": "2x"}, x, names=["0"])
    with pytest.raises(ValueError, match=r"names=\['0'\] would factorise an nn.Embedding"):
        plan(nn.Sequential(nn.Embedding(9, 4)), {"parameters": "2x"}, torch.tensor([1]))
    net = nn.Sequential(nn.Conv1d(4, 64, 3), nn.Flatten(), nn.Linear(64, 8))
    with pytest.raises(ValueError, match=r"cannot be met: .* cannot be factorised: '0': .* Conv1d"):
        plan(net, {"parameters": "4x"}, x)


@pytest.mark.parametrize(
    "inputs", [IDS, (IDS,), {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": None}]
)
def test_inputs_are_a_tensor_a_tuple_or_a_mapping(inputs):
    made = plan(Net(1), {"parameters": "1.2x"}, inputs)
    assert "int64 (2, 10)" in made.setting["inputs"][0]
    (up,) = (row for row in made.layers if row.path == "layer.0.up")
    assert up.flops_dense == 2 * 20 * WIDTH * HIDDEN


def test_the_module_itself_may_be_the_layer():
    layer = nn.Linear(24, 48)
    made = plan(layer, {"parameters": "3x"}, torch.ones(5, 24))
    assert list(made.factors) == [""] and made.factors[""]
    student = factorise_(layer, made.factors)
    assert isinstance(student, KRONECKER) and student(torch.ones(5, 24)).shape == (5, 48)
    assert "(the module)" in str(made)


def test_a_layer_in_two_places_counts_once_and_by_all_its_calls():
    layer = nn.Linear(24, 24)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    made = plan(net, {"parameters": "2x"}, torch.ones(5, 24))
    (row,) = made.layers
    assert row.flops_dense == 2 * 2 * 5 * 24 * 24
    assert made.totals["parameters"]["dense"] == 24 * 24 + 24
    student = factorise_(net, made.factors)
    assert student[0] is student[2] and isinstance(student[0], KRONECKER)


def test_the_module_is_left_unchanged():
    net = Net().train()
    net.head.eval()
    before = copy.deepcopy(net.state_dict())
    plan(net, {"parameters": "1.5x"}, IDS, calibration=[IDS])
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert net.training and net.layer[0].up.training and not net.head.training
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(TypeError):
        plan(net, {"parameters": "1.5x"}, 3)
    assert net.training and not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "calibration is empty .* or leave it out"),
        (iter(()), ValueError, "calibration is empty"),
        ({"input_ids": IDS}, TypeError, r"one batch, a mapping; pass .* \[batch\]"),
        (IDS, TypeError, r"one batch, a tensor; pass .* \[batch\]"),
        (
            [{"input_ids": IDS, "attention_mask": 0 * IDS}],
            ValueError,
            "calibration gives layer.0.up no unmasked input",
        ),
        # Only the first block is reached.
        ([{"input_ids": IDS, "blocks": 1}], ValueError, "calibration gives layer.1.up no unm"),
        ([{"input_ids": IDS, "scale": 1e30}], ValueError, "the inputs of layer.0.up on calibrat"),
    ],
)
def test_calibration_that_leaves_layers_out_is_refused(calibration, error, message):
    class Partial(Net):
        def forward(self, input_ids, attention_mask=None, blocks=3, scale=1.0):
            x = self.words(input_ids) * scale
            for block in self.layer[:blocks]:
                x = block(x)
            return self.head(x[:, 0])

    with pytest.raises(error, match=message):
        plan(Partial(), {"parameters": "2x"}, IDS, calibration=calibration, names=["up"])
    if "layer.1.up" in message:  # layers that stay dense need no calibration
        dense = {"layer.1.up": None, "layer.2.up": None}
        options = {"calibration": calibration, "names": ["up"], "layers": dense}
        assert plan(Partial(), {"error": 0.9}, IDS, objective="size", **options).factors[
            "layer.0.up"
        ]


def test_a_weight_that_is_not_finite_is_refused_by_its_path():
    net = Net()
    with torch.no_grad():
        net.unused.weight.fill_(torch.inf)  # never called, so that it stays dense
        net.layer[1].down.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of layer.1.down has 1 entries that are NaN"):
        plan(net, {"parameters": "2x"}, IDS)


def test_weights_of_any_scale_are_planned_alike():
    net, errors = nn.Linear(WIDTH, HIDDEN).double(), []
    for scale in (1.0, 2.0**600, 2.0**-600, 2.0**-600):
        with torch.no_grad():
            net.weight.mul_(scale)
        (target,) = find_targets(net)
        target.inputs.append((torch.Size((2, WIDTH)), torch.float64))
        errors.append({c.shapes: c.error for c in candidates_of(target, None, mix=True)})
    assert errors == errors[:1] * 4 and len(errors[0]) > 5


# --- time


def test_a_layer_slower_than_dense_stays_dense_with_the_reason(clock):
    """Small layers lose, large ones gain: 1 ms to start a product of factors."""
    clock.of = lambda m: milliseconds(m) + (1.0 if isinstance(m, KRONECKER) else 0.0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 480), nn.Linear(480, 24))
    # So near a product that it would be the first.
    with torch.no_grad():
        net[0].weight.copy_(torch.kron(torch.randn(4, 4), torch.randn(6, 6)))
    budget, x = {"parameters": "1.2x"}, torch.ones(4, 24)
    made = plan(net, budget, x)
    assert made.factors["0"] is None and any(made.factors.values())
    reason = made.layers[0].reason
    assert reason.startswith("slower here (1.") and reason.endswith("ms against 0.6), kept dense")
    assert made.layers[0].latency == made.layers[0].latency_dense
    for row in made.layers:
        assert row.terms is None or row.latency < row.latency_dense
    # Asked not to, or where only that meets the budget, it is factorised.
    free = plan(net, budget, x, keep_dense_if_slower=False)
    assert free.factors["0"] is not None and free.totals["error"] <= made.totals["error"]
    forced = plan(net, {"parameters": 1500}, x)
    assert forced.factors["0"] is not None
    assert forced.layers[0].reason.startswith("slower here (1.")
    size = plan(net, {"error": 0.5}, x, objective="size")
    assert size.factors["0"] is not None


def test_layers_are_timed_once_and_only_if_they_are_chosen_or_may_be(clock):
    plan(Net(6), {"latency": "2x"}, IDS)
    factorised = {r: n for r, n in clock.layers.items() if "Kronecker" in r and "dense" not in r}
    assert factorised and set(factorised.values()) == {1}
    clock.layers.clear()
    made = plan(Net(6), {"parameters": "2x"}, IDS, keep_dense_if_slower=False)
    assert not clock.layers
    assert made.layers[0].latency is None and made.totals["latency"]["predicted"] is None
    assert made.totals["latency"]["planned"] > 0  # the whole is measured in any case


def test_layers_of_unlike_inputs_are_timed_apart(clock):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.many, self.one = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.one(self.many(x)[:, 0])

    clock.of = lambda m: 1.0
    made = plan(Two(), {"error": 0.0}, torch.ones(4, 10, 24), objective="latency")
    assert [row.flops_dense for row in made.layers] == [2 * 40 * 576, 2 * 4 * 576]
    assert clock.layers[repr(nn.Linear(24, 24))] == 2


@pytest.mark.parametrize("surprise", [0.6, 1.0, 1.5])
def test_the_built_module_is_measured_and_the_choice_corrected(surprise, clock):
    clock.surprise = surprise
    net = Net()
    dense = clock.rest + sum(map(milliseconds, layers_of(net)))
    made = plan(net, {"latency": "1.5x"}, IDS)
    latency = made.totals["latency"]
    assert latency["planned"] <= dense / 1.5 * (1 + 1e-9)
    assert latency["planned"] == pytest.approx(latency["predicted"] * surprise)
    student = factorise_(copy.deepcopy(net), made.factors)
    actual = (clock.rest + sum(map(milliseconds, layers_of(student)))) * surprise
    assert actual == pytest.approx(latency["planned"])
    assert actual > 0.75 * dense / 1.5, "time was left for more accurate layers"


def test_a_builder_gets_the_factors_and_its_module_is_measured():
    net, built = Net(1), []

    def build(factors):
        built.append(factors)
        student = factorise_(copy.deepcopy(net), factors)
        student.more = nn.Parameter(torch.zeros(1000))
        return student

    made = plan(net, {"parameters": "1.2x"}, IDS, build=build)
    assert all(entry for factors in built for entry in factors.values())
    kept = {path: entry for path, entry in made.factors.items() if entry}
    assert kept in built and len(built) > 1, "the first had no room for what the builder adds"
    parameters = made.totals["parameters"]
    assert parameters["planned"] <= parameters["dense"] / 1.2
    student = factorise_(copy.deepcopy(net), made.factors)
    assert parameters["planned"] == 1000 + sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize(
    ("budget", "numbers"),
    [
        (
            {"parameters": "50x"},
            [r"at most 177.2 \('50x'\)", r"has 2.238 k \(dense: 8.*k of it elsewhere"],
        ),
        (
            {"latency": 0.5},
            [
                r"at most 0.5 ms \(0.5\)",
                r"nearest plan found has \d",
                r" ms of it elsewhere than in the 7 layers",
            ],
        ),
        ({"flops": 10, "error": 0.9}, [r"flops is to be at most 10 \(10\)", "7 layers"]),
        ({"flops": "2x", "error": 0.0}, ["to be at most"]),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest_plan(budget, numbers):
    net = Net()
    net.unused = nn.Identity()
    with pytest.raises(ValueError, match="the budget cannot be met") as refusal:
        plan(net, budget, IDS)
    for number in numbers:
        assert re.search(number, str(refusal.value)), number


def test_a_latency_that_cannot_be_met_is_refused_with_the_fastest_plan(clock):
    clock.surprise = 1.7
    with pytest.raises(
        ValueError, match=r"at most 6.88 ms \('1.5x'\), .* plan found has 7\.\d+ ms"
    ):
        plan(Net(), {"latency": "1.5x"}, IDS)


def test_with_the_real_clock(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(clocks, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(planner, "MODULE_SECONDS", 0.0)
    made = plan(Net(1), {"parameters": "1.2x"}, IDS)
    for row in made.layers:
        assert row.path == "unused" or (row.latency > 0 and row.latency_dense > 0)
        assert row.terms is None or row.latency is not None
    latency = made.totals["latency"]
    assert min(latency["dense"], latency["planned"], latency["predicted"]) > 0


# --- the solver


def brute(goals, costs, limits):
    best = None
    for choice in itertools.product(*[range(len(g)) for g in goals]):
        picked = [costs[i][j] for i, j in enumerate(choice)]
        if all(sum(c[k] for c in picked) <= m for k, m in enumerate(limits)):
            goal = sum(goals[i][j] for i, j in enumerate(choice))
            best = goal if best is None else min(best, goal)
    return best


@pytest.mark.parametrize("sorts", [1, 2, 3])
@pytest.mark.parametrize("correlated", [True, False])
def test_the_choice_is_within_one_layer_of_the_best_and_found_if_there_is_one(sorts, correlated):
    draw = random.Random(sorts)
    found = exact = 0
    for _ in range(40):
        goals, costs = [], []
        for i in range(draw.randint(1, 5)):
            shares = [1.0, *(draw.random() for _ in range(draw.randint(0, 5)))]
            if correlated:  # more parameters, FLOPs and time, less error
                goals.append([(1 - f) * draw.uniform(0.7, 1.1) for f in shares])
                costs.append([[1e6 * (1 + i) * f * draw.uniform(0.8, 1.2)] * sorts for f in shares])
            else:
                goals.append([draw.random() for _ in shares])
                costs.append([[draw.random() for _ in range(sorts)] for _ in shares])
        limits = []
        for k in range(sorts):
            least, most = (sum(f(c[k] for c in row) for row in costs) for f in (min, max))
            limits.append(least + (most - least) * draw.uniform(0.05, 0.9))
        best, choice = brute(goals, costs, limits), solve(goals, costs, limits)
        assert (choice is None) == (best is None)
        if choice is None:
            continue
        for k, limit in enumerate(limits):
            spent = sum(costs[i][j][k] for i, j in enumerate(choice))
            assert spent <= limit * (1 + 1e-8)
        goal = sum(goals[i][j] for i, j in enumerate(choice))
        assert best - 1e-9 <= goal <= best + max(max(g) - min(g) for g in goals)
        assert choice == solve(goals, costs, limits)
        found, exact = found + 1, exact + (goal <= best + 1e-9)
    assert found >= 10 and exact >= 0.9 * found


def test_a_choice_that_only_the_search_finds(monkeypatch):
    """Each single exchange that helps one sort of cost hurts the other."""
    goals = [[0.0, 1.0]] * 4
    costs = [[[0, 3], [3, 0]], [[0, 3], [3, 0]], [[0, 5], [5, 0]], [[0, 5], [5, 0]]]
    monkeypatch.setattr(solver._Search, "starts", lambda self: [])
    choice = solve(goals, costs, [8, 8])
    assert choice is not None and sum(choice) == 2
    assert solve(goals, costs, [8, 7]) is None
    assert solve([[0.0], []], [[[1]], []], [5]) is None and solve([], [], [1]) == []


def test_many_layers_use_their_budget():
    draw = random.Random(0)
    shares = [2**-k for k in range(8)]
    goals = [[(1 - f) * draw.uniform(0.8, 1.2) for f in shares] for _ in range(72)]
    costs = [[[f * size] for f in shares] for size in draw.choices([1, 4], k=72)]
    limit = 0.4 * sum(c[0][0] for c in costs)
    choice = solve(goals, costs, [limit])
    spent = sum(costs[i][j][0] for i, j in enumerate(choice))
    assert 0.99 * limit <= spent <= limit * (1 + 1e-9)


# --- the plan as an object


@pytest.fixture(scope="module")
def made() -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "interleaved", Clock())
        torch.manual_seed(0)
        return plan(Net(4), {"parameters": "1.6x", "flops": 1e6}, IDS, names=["up", "words"])


def test_a_plan_survives_json_and_the_disk(made, tmp_path):
    text = made.to_json()
    assert Plan.from_json(text) == made and json.loads(text)["factors"] == made.factors
    assert isinstance(Plan.from_json(text).layers[0], LayerPlan)
    path = tmp_path / "plan.json"
    path.write_text("old")
    made.save(path)
    assert Plan.load(path) == made and [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(AttributeError):
        made.objective = "size"


def test_json_that_is_not_a_plan_is_refused(made):
    values = json.loads(made.to_json())
    for wrong in ([], {}, values | {"version": 2}, values | {"surplus": 1}):
        with pytest.raises(ValueError, match="this is not a plan of version 1"):
            Plan.from_json(json.dumps(wrong))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("totals", {}),
        ("totals.parameters", 3),
        ("totals.latency.planned", "x"),
        ("setting", {}),
        ("setting.inputs", None),
        ("layers.0", 3),
        ("layers.0.surplus", 3),
        ("layers.0.parameters", "x"),
        ("layers.0.parameters_dense", 0),
        ("layers.0.path", None),
        ("layers.0.rows", 1.5),
        ("layers.0.terms", 3),
        ("layers.0.terms", [{"a_shape": [7, 5], "rank": 1}]),
        ("layers.0.error", None),
        ("layers.0.latency", "x"),
        ("layers.0.reason", 3),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_printed_is_refused(place, value, made):
    values = json.loads(made.to_json())
    *path, last = place.split(".")
    inner = values
    for key in path:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[int(last) if last.isdecimal() else last] = value
    with pytest.raises(ValueError, match="not a plan: its table cannot be made of its values"):
        Plan.from_json(json.dumps(values))


def test_the_table_shows_equal_layers_in_one_row_with_their_totals(made):
    text = str(made)
    lines = text.splitlines()
    assert all(len(line) <= 200 for line in lines)
    ups = [row for row in made.layers if row.path.endswith("up")]
    shown = [line for line in lines if line.startswith("layer.")]
    assert len(shown) == len({json.dumps(row.terms) for row in ups})
    if len(shown) == 1:
        assert shown[0].startswith("layer.0-3.up ")
    assert f"{WORDS}x{WIDTH}" in text and "least error" in text and "parameters 1.6x" in text
    for key in ("parameters", "bytes", "flops", "latency", "error"):
        assert any(line.startswith(key) for line in lines)
    assert torch.__version__ in text and "int64 (2, 10)" in text
    many = result._grouped([LayerPlan(f"a.{i}.b", 2, 2, None, *[0] * 7) for i in (0, 1, 2, 5)])
    assert [path for path, _ in many] == ["a.0-2,5.b"]


def test_factorise_makes_the_plan_and_densify_undoes_it(made):
    torch.manual_seed(0)
    net = Net(4)
    student = factorise_(copy.deepcopy(net), made.factors)
    for path, entry in made.factors.items():
        layer = student.get_submodule(path)
        assert isinstance(layer, KRONECKER) == (entry is not None)
    again = densify_(copy.deepcopy(student))
    assert not any(isinstance(m, KRONECKER) for m in again.modules())
    torch.testing.assert_close(again(IDS), student(IDS), rtol=1e-4, atol=1e-5)


def test_progress_is_printed_only_on_request(capsys):
    plan(Net(1), {"parameters": "1.2x"}, IDS)
    assert capsys.readouterr() == ("", "")
    plan(Net(1), {"parameters": "1.2x"}, IDS, progress=True)
    printed = capsys.readouterr()
    assert not printed.out and "errors 1 of 4: layer.0.up" in printed.err
