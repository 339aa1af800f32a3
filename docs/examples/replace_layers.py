"""Replace the linear layers of a torch model: by hand, by data, by a plan. Needs only torch."""

import copy

import torch
from torch import nn

import kron_kernels as kk
from kron_kernels.plan import plan
from kron_kernels.timing import interleaved

torch.manual_seed(0)
torch.set_num_threads(1)  # for steadier times
model = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).eval()

# A layer's inputs are rarely white noise: here 384 features of 64 sources, and some noise.
sources = torch.randn(64, 384)
inputs = torch.randn(4096, 64) @ sources / 8 + 0.1 * torch.randn(4096, 384)
train, test = inputs.split(2048)


@torch.no_grad()
def second_moments() -> dict[str, torch.Tensor]:
    """E[x xᵀ] of the inputs of both linear layers."""
    hidden = model[:2](train)
    return {"0": train.T @ train / len(train), "2": hidden.T @ hidden / len(hidden)}


moments = second_moments()
shapes = {"0": {"a_shape": [4, 2], "rank": 2}, "2": {"a_shape": [2, 4], "rank": 2}}
models = {
    "dense": model,
    "nearest weights": kk.factorise_(copy.deepcopy(model), shapes),
    "nearest outputs": kk.factorise_(copy.deepcopy(model), shapes, second_moments=moments),
}

# Or let `plan` choose: it measures on this machine, with errors on the data.
chosen = plan(model, {"parameters": "4x"}, test[:128], calibration=train.split(512))
print(chosen, "\n")
planned = kk.factorise_(copy.deepcopy(model), chosen.factors, second_moments=moments)
models["planned"] = planned

with torch.no_grad():
    expected = model(test)
    calls = {name: lambda m=m: m(test[:128]) for name, m in models.items()}
    times = interleaved(calls, seconds=1)
    print(f"{'128 tokens':18}{'parameters':>12}{'ms':>8}{'faster':>8}{'error':>8}")
    for name, m in models.items():
        error = (m(test) - expected).square().sum() / expected.square().sum()
        size, ms = sum(p.numel() for p in m.parameters()), times[name].median
        faster = times["dense"].median / ms
        print(f"{name:18}{size:12,}{ms:8.2f}{faster:7.1f}x{error:8.3f}")
