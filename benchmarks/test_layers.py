"""KroneckerBERT's layers against the dense ones they replace, to compare between commits.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare

For a claim about speed use benchmarks/eager_forms.py, whose candidates take turns.
"""

import pytest
import torch

from kron_kernels import KroneckerLinear

LAYERS = {  # in_features, out_features, a_shape
    "8x attention": (768, 768, (384, 384)),
    "8x W1": (768, 3072, (8, 2)),
    "8x W2": (3072, 768, (2, 8)),
    "21x attention": (768, 768, (384, 48)),
    "21x W1": (768, 3072, (16, 2)),
    "21x W2": (3072, 768, (2, 16)),
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("kind", ["dense", "kronecker"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark, name, kind, tokens, mode):
    n, m, a_shape = LAYERS[name]
    layer = torch.nn.Linear(n, m) if kind == "dense" else KroneckerLinear(n, m, a_shape)
    x = torch.randn(tokens, n, requires_grad=mode == "training")
    benchmark.group = f"{name}, {tokens} tokens, {mode}, {torch.get_num_threads()} threads"

    def train():
        layer(x).sum().backward()

    if mode == "training":
        benchmark(train)
    else:
        with torch.inference_mode():
            benchmark(layer, x)
