"""Encoders as graphs of fixed shapes; on the CPU by the same code, a graph is the call itself."""

from collections import Counter

import pytest
import torch
from machines import TRITON, ready, simulated
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, DistilBertConfig, RobertaConfig

import kroneckerbert
from kron_kernels import dispatch, gpu_encoder
from kron_kernels.encoder import Linear
from kroneckerbert import KroneckerBertConfig, capture
from kroneckerbert.serving import layer_by_layer

SIZES = {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 384, "vocab_size": 320}


def student(name="Bert", config=BertConfig, preset="kronecker-bert-21", layers=2, **sizes):
    sizes = SIZES | {"num_hidden_layers": layers} | sizes
    kind = getattr(kroneckerbert, f"Kronecker{name}Config")
    model = getattr(kroneckerbert, f"Kronecker{name}Model")
    torch.manual_seed(0)
    made = model(kind.preset(preset, config(**sizes))).eval()
    for p in made.parameters():  # norms and biases are not ones and zeros
        p.data += 0.02 * torch.randn_like(p)
    return made


@pytest.mark.parametrize(
    ("name", "config", "preset"),
    [
        ("Bert", BertConfig, "kronecker-bert-21"),
        ("Bert", BertConfig, "kronecker-bert-8"),
        ("Bert", BertConfig, "kronecker-bert-5"),
        ("Roberta", RobertaConfig, "kronecker-bert-8"),
        ("DistilBert", DistilBertConfig, "kronecker-bert-21"),
    ],
)
def test_it_gives_the_model_s_states_in_any_bucket(name, config, preset):
    model = student(name, config, preset)
    run = capture(model, [(2, 8), (4, 16), (1, 32)])
    for batch, length in ((2, 8), (1, 5), (3, 16), (1, 30), (1, 1)):
        ids = torch.randint(3, 300, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, (length + 1) // 2 :] = 0
        ids[mask == 0] = model.config.pad_token_id
        for given in (mask, None):
            with torch.no_grad(), layer_by_layer():
                expected = model(ids, attention_mask=given).last_hidden_state
            got = run(ids, given)
            assert got.shape == expected.shape
            seen = mask.bool() if given is not None else torch.ones_like(mask).bool()
            torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    model = student()
    run = capture(model, [(2, 8)])
    with pytest.raises(ValueError, match=r"\(3, 8\) fit none .* \[\(2, 8\)\]; capture a larger"):
        run(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="training mode"):
        capture(student().train(), [(2, 8)])
    with pytest.raises(ValueError, match="shapes must have"):
        capture(model, [])
    with pytest.raises(ValueError, match="KroneckerBertForMaskedLM cannot be captured"):
        config = KroneckerBertConfig.preset("kronecker-bert-21", **SIZES, num_hidden_layers=1)
        capture(kroneckerbert.KroneckerBertForMaskedLM(config).eval(), [(2, 8)])


# Operators of PyTorch that launch nothing.
VIEWS = (
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "detach", "alias", "expand", "t"),
    *("transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "split", "unbind"),
    *("empty", "new_empty", "empty_like"),
)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.found[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


def test_a_layer_of_21x_is_five_launches(monkeypatch):
    """Of PyTorch's operators, and of kernels in the simulator, which are not executed."""
    monkeypatch.setattr(dispatch, "_order", lambda *_: ("triton",))
    counts = []
    with ready(TRITON):
        pass  # skips without Triton
    with simulated("triton") as gpu:
        gpu.execute = False
        for layers in (1, 3):
            run = capture(student(layers=layers).half(), [(2, 8)])
            gpu.launches.clear()
            # Not by run: in its inference mode PyTorch's operators are not taken apart.
            with Counting() as counting, torch.no_grad():
                run.buckets[2, 8].replay()
            ours = Counter(launch.name for launch in gpu.launches)
            others = {k: n for k, n in counting.found.items() if n and not k.startswith("kron_")}
            counts.append(Counter(others) + ours)
    one, three = counts
    each = {name: (n - one[name]) / 2 for name, n in three.items() if n > one[name]}
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    expected = {"kron_matmul_kernel": 2, "feed_forward_kernel": 1, "native_layer_norm": 1}
    assert each == expected | {attention: 1}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_activation_is_of_the_sum_and_the_residual_is_added_to_it(count, activation, residual):
    torch.manual_seed(0)
    x, y0 = torch.randn(5, 12).double(), torch.randn(5, 6).double() if residual else None
    products = [(torch.randn(1, 2, 3).double(), torch.randn(1, 3, 4).double()) for _ in "ab"]
    parts = [*products, (torch.randn(6, 12).double(),)][-count:]
    bias = torch.randn(6).double()
    w = sum(torch.kron(p[0][0], p[1][0]) if len(p) == 2 else p[0] for p in parts)
    expected = x @ w.mT + bias
    expected = expected if activation is None else torch.nn.functional.gelu(expected)
    expected = expected if y0 is None else expected + y0
    found = gpu_encoder.linear(x, Linear(parts, bias), y0, activation)
    torch.testing.assert_close(found, expected)
