"""KroneckerBERT's layers beside the dense ones they replace, to compare with earlier commits.

    pytest benchmarks/bench_layers.py -n0 --benchmark-autosave
    pytest benchmarks/bench_layers.py -n0 --benchmark-compare

One contender is timed after the other: for a claim about speed use ``python -m benchmarks layers``,
where they take turns.
"""

import pytest
import torch

from benchmarks.layers import PRESETS, Cell, rotate
from kron_kernels import KroneckerLinear
from kron_kernels.testing import assert_close

LAYERS = {shapes: Cell("presets", shapes, 1).sides[0] for shapes in PRESETS}
SETS = 4  # layers in rotation: their weights leave the caches between turns, as in a model


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("kind", ["dense", "kronecker"])
@pytest.mark.parametrize("shapes", LAYERS)
def test_layer(benchmark, shapes, kind, tokens, mode):
    (m1, n1), (m2, n2) = LAYERS[shapes]
    layers = [KroneckerLinear(n1 * n2, m1 * m2, (m1, n1)) for _ in range(SETS)]
    x = torch.randn(tokens, n1 * n2, requires_grad=mode == "training")
    dense = layers[0].to_linear().double()
    with torch.no_grad():
        assert_close("y", layers[0](x), dense(x.double()), n1 + n2)
    if kind == "dense":
        layers = [layer.to_linear() for layer in layers]

    def train(layer):
        layer(x).sum().backward()

    def infer(layer):
        with torch.inference_mode():
            layer(x)

    step = train if mode == "training" else infer
    benchmark.group = f"{shapes}, {tokens} tokens, {mode}, {torch.get_num_threads()} threads"
    benchmark(rotate([lambda layer=layer: step(layer) for layer in layers]))
