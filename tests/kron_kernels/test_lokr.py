"""Adapters against torch.kron in float64: states written by hand, and those of PEFT and LyCORIS."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kron_kernels import KroneckerLinear, QuantizedLinear, quantize_
from kron_kernels.adapters import (
    AdaptedLinear,
    lokr_factors,
    serve_lokr,
    split_lokr,
    unserve_lokr,
)
from kron_kernels.testing import assert_close

M1, N1, M2, N2, R = 3, 4, 6, 5, 2
WHOLE_1 = {"lokr_w1": (M1, N1)}
LOW_1 = {"lokr_w1_a": (M1, R), "lokr_w1_b": (R, N1)}
HALVES_2 = {
    "whole": {"lokr_w2": (M2, N2)},
    "low rank": {"lokr_w2_a": (M2, R), "lokr_w2_b": (R, N2)},
    "Tucker": {"lokr_t2": (R, R), "lokr_w2_a": (R, M2), "lokr_w2_b": (R, N2)},
    "convolution, whole": {"lokr_w2": (M2, N2, 1, 1)},
    "convolution, low rank": {"lokr_w2_a": (M2, R), "lokr_w2_b": (R, N2, 1, 1)},
    "convolution, Tucker": {
        "lokr_t2": (R, R, 1, 1),
        "lokr_w2_a": (R, M2),
        "lokr_w2_b": (R, N2),
    },
    "1-D convolution, whole": {"lokr_w2": (M2, N2, 1)},
}


def drawn(shapes: dict, dtype=torch.float32) -> dict:
    return {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}


def oracle(state: dict) -> torch.Tensor:
    """``w1 ⊗ w2`` of size (m, n) in float64, written apart from the code under test."""
    t = {key: value.double().flatten(1) for key, value in state.items() if key != "alpha"}
    w1 = t["lokr_w1"] if "lokr_w1" in t else torch.einsum("ir,rj->ij", *half(t, "lokr_w1"))
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("rs,ri,sj->ij", t["lokr_t2"], *half(t, "lokr_w2"))
    else:
        w2 = torch.einsum("ir,rj->ij", *half(t, "lokr_w2"))
    return torch.kron(w1.contiguous(), w2.contiguous())


def half(t: dict, name: str) -> tuple:
    return t[f"{name}_a"], t[f"{name}_b"]


def adapted(x, weight, bias, delta) -> torch.Tensor:
    """``x (W0 + delta)ᵀ + bias`` in float64."""
    wide = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double() + delta.double(), wide)


# --- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second", HALVES_2)
@pytest.mark.parametrize("first", [WHOLE_1, LOW_1], ids=["whole", "low rank"])
def test_factors_of_every_layout(first, second, dtype):
    state = drawn(first | HALVES_2[second], dtype)
    a, b = lokr_factors(state, scale=0.75)
    assert a.shape == (M1, N1) and b.shape == (M2, N2)
    assert a.dtype == b.dtype == dtype
    assert_close("A ⊗ B", torch.kron(a, b), 0.75 * oracle(state), R**4)


def test_the_scale_is_by_lycoris_rule_for_alpha():
    low, whole = WHOLE_1 | HALVES_2["low rank"], WHOLE_1 | HALVES_2["whole"]
    left = LOW_1 | HALVES_2["whole"]
    for shapes, alpha, scale in [
        (low, 3, 1.5),
        (low, torch.tensor(3.0, dtype=torch.float16), 1.5),
        (low, torch.tensor([-1.0]), -0.5),
        (low, 0, 1.0),  # LyCORIS: none given, so the rank
        (left, 3, 1.5),
        (LOW_1 | HALVES_2["Tucker"], 3, 1.5),
        (whole, 3, 1.0),
        (whole, torch.tensor(0.0), 1.0),
    ]:
        state = drawn(shapes)
        a, b = lokr_factors(state | {"alpha": alpha})
        assert_close("A ⊗ B", torch.kron(a, b), scale * oracle(state), R**4)
        a, b = lokr_factors(state | {"alpha": alpha}, scale=-2.0)
        assert_close("A ⊗ B", torch.kron(a, b), -2.0 * oracle(state), R**4)


def test_a_scale_of_zero_gives_zeros():
    a, b = lokr_factors(drawn(WHOLE_1 | HALVES_2["whole"]), scale=0)
    assert not torch.kron(a, b).any()


def test_whole_halves_are_returned_themselves_and_the_smaller_one_is_scaled():
    state = drawn({"lokr_w1": (2, 2), "lokr_w2": (5, 5)})
    a, b = lokr_factors(state, scale=1)
    assert a is state["lokr_w1"] and b is state["lokr_w2"]
    a, b = lokr_factors(state, scale=2)
    assert a is not state["lokr_w1"] and b is state["lokr_w2"]
    swapped = {"lokr_w1": state["lokr_w2"], "lokr_w2": state["lokr_w1"]}
    a, b = lokr_factors(swapped, scale=2)
    assert a is swapped["lokr_w1"] and b is not swapped["lokr_w2"]


def test_halves_of_two_dtypes_are_promoted_as_by_kron():
    state = drawn(WHOLE_1, torch.float16) | drawn(HALVES_2["whole"], torch.bfloat16)
    a, b = lokr_factors(state, scale=1)
    assert a.dtype == b.dtype == torch.kron(*state.values()).dtype == torch.float32
    assert_close("A ⊗ B", torch.kron(a, b), oracle(state), 1)


def test_factors_are_differentiable():
    state = drawn(LOW_1 | HALVES_2["low rank"], torch.float64)
    values = [t.requires_grad_() for t in state.values()]

    def factors(*values):
        return lokr_factors(dict(zip(state, values, strict=True)), scale=0.5)

    assert torch.autograd.gradcheck(factors, values)


def state_of(**changes) -> dict:
    """A good state, changed; None takes a tensor away."""
    state = drawn(LOW_1 | HALVES_2["low rank"]) | {"alpha": 1.0} | changes
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (state_of(lokr_w1_b=None), "both lokr_w1_a and lokr_w1_b; it has lokr_w1_a"),
        (state_of(lokr_w2_a=None, lokr_w2_b=None), "may have lokr_t2 with these; it has none"),
        (state_of(lokr_w1=torch.ones(M1, N1)), "it has lokr_w1, lokr_w1_a, lokr_w1_b"),
        (state_of(lokr_w2_a=None, lokr_t2=torch.ones(R, R)), "it has lokr_w2_b, lokr_t2"),
        (state_of(lokr_w1_b=torch.ones(R + 1, N1)), r"in all of lokr_w1_a \(3, 2\), lokr_w1_b"),
        (state_of(lokr_t2=torch.ones(R, R)), r"low rank must be the same .*lokr_w2_a \(6, 2\)"),
        (
            state_of(lokr_t2=torch.ones(R, R + 1), lokr_w2_a=torch.ones(R, M2)),
            r"low rank must be the same .*lokr_t2 \(2, 3\)",
        ),
        (state_of(lokr_w1_a=torch.ones(M1)), r"lokr_w1_a must be a matrix .* shape \(3,\)"),
        (state_of(lokr_w1_a=torch.ones(M1, 0)), r"every side at least 1, got shape \(3, 0\)"),
        (state_of(lokr_w2_b=torch.ones(R, N2).int()), "lokr_w2_b is torch.int32"),
        (state_of(lokr_w2_b=torch.ones(R, N2, 3, 3)), r"kernel of \(3, 3\).*merge this layer"),
        (state_of(dora_scale=torch.ones(18, 1)), "dora_scale.*merge this adapter"),
        (state_of(lora_up=torch.ones(1)), "'lora_up', which is no tensor of.*split_lokr"),
        (state_of(alpha=None), "no alpha, so a scale is needed.*adapter_config.json"),
        (state_of(alpha=float("nan")), "alpha = nan must be a finite number"),
        (state_of(alpha=torch.tensor([1.0, 2.0])), "alpha = tensor.* must be a finite number"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_a_lokr_layer_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        lokr_factors(state)


@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), "1", True, [1.0, 2.0]])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale = .* must be a finite number"):
        lokr_factors(state_of(), scale=scale)


def test_a_state_of_other_types_is_refused():
    with pytest.raises(TypeError, match=r"(?s)state = .* must be a mapping"):
        lokr_factors([torch.ones(2, 2)])
    with pytest.raises(TypeError, match=r"lokr_w1_a must be a torch.Tensor, got list"):
        lokr_factors(state_of(lokr_w1_a=[[1.0]]))


def test_a_file_is_divided_into_layers_and_others():
    tensors = {
        "base_model.model.encoder.query.lokr_w1": torch.ones(2, 2),
        "base_model.model.encoder.query.lokr_w2": torch.ones(3, 3),
        "base_model.model.classifier.weight": torch.ones(1),
        "lora_unet_mid.lokr_w1": torch.ones(2, 2),
        "lora_unet_mid.lokr_w2_a": torch.ones(2, 2),
        "lora_unet_mid.alpha": torch.tensor(1.0),
        "lora_unet_out.lora_up.weight": torch.ones(2, 2),
        "lora_unet_out.alpha": torch.tensor(1.0),
        "lora_unet_mid.bias": torch.ones(4),
        "lokr_w1": torch.ones(1, 1),
    }
    layers, others = split_lokr(tensors)
    assert {path: set(state) for path, state in layers.items()} == {
        "encoder.query": {"lokr_w1", "lokr_w2"},
        "lora_unet_mid": {"lokr_w1", "lokr_w2_a", "alpha", "bias"},  # lokr_factors names bias
        "": {"lokr_w1"},
    }
    assert set(others) == {
        "base_model.model.classifier.weight",
        "lora_unet_out.lora_up.weight",
        "lora_unet_out.alpha",
    }
    assert layers["encoder.query"]["lokr_w1"] is tensors["base_model.model.encoder.query.lokr_w1"]


@pytest.mark.parametrize("tensors", [{}, {"a.lora_A.weight": torch.ones(1)}])
def test_a_file_without_lokr_is_refused(tensors):
    with pytest.raises(ValueError, match=r"no LoKr layer: none of its .* another method"):
        split_lokr(tensors)


# --- one layer


@pytest.mark.parametrize("shape", [(7, 20), (2, 3, 20), (20,), (0, 20)], ids=str)
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_layer_adds_the_product(backend, dtype, bias, rank, shape):
    linear = nn.Linear(20, 18, bias, dtype=dtype)
    ranks = () if rank is None else (rank,)
    a, b = torch.randn(*ranks, M1, N1).to(dtype), torch.randn(*ranks, M2, N2).to(dtype)
    layer = AdaptedLinear(linear, a, b, -0.5, backend=backend)
    assert layer.a.shape == (rank or 1, M1, N1)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    terms = zip(a.view(-1, M1, N1).double(), b.view(-1, M2, N2).double(), strict=True)
    delta = -0.5 * sum(torch.kron(p, q) for p, q in terms)
    # A 16-bit result of the base layer is rounded before the product is added.
    assert_close("y", y, adapted(x, linear.weight, linear.bias, delta), 20 + 9 * (rank or 1))


@pytest.mark.parametrize(
    ("base", "adapter", "kept"),
    [
        (torch.float32, torch.float16, torch.float32),  # a file's 16 bits beside a model's 32
        (torch.bfloat16, torch.float32, torch.float32),  # what PEFT keeps
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_factors_keep_the_wider_dtype_and_results_the_base_layers(base, adapter, kept):
    linear = nn.Linear(20, 18, dtype=base)
    a, b = torch.randn(M1, N1).to(adapter), torch.randn(M2, N2).to(adapter)
    layer = AdaptedLinear(linear, a, b)
    assert layer.a.dtype == layer.b.dtype == kept
    x = torch.randn(5, 20).to(base)
    y = layer(x)
    assert y.dtype == base
    delta = torch.kron(a.double(), b.double())
    assert_close("y", y, adapted(x, linear.weight, linear.bias, delta), 29)


def test_the_backend_asked_for_is_used_or_refused():
    layer = AdaptedLinear(nn.Linear(20, 18), torch.ones(M1, N1), torch.ones(M2, N2), backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        layer(torch.ones(2, 20))
    layer = AdaptedLinear(nn.Conv1d(20, 18, 1), layer.a, layer.b, backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
        layer(torch.ones(2, 20, 3))


def test_the_base_layer_may_become_int8():
    layer = AdaptedLinear(nn.Linear(64, 64), torch.randn(8, 8), torch.randn(8, 8))
    x = torch.randn(5, 64)
    with torch.no_grad():
        y = layer(x)
        quantize_(layer)
        assert isinstance(layer.base_layer, QuantizedLinear)
        torch.testing.assert_close(layer(x), y, rtol=0.05, atol=0.05)


def test_strided_operands():
    linear = nn.Linear(20, 18)
    a, b = torch.randn(N1, M1).mT, torch.randn(M2, 2 * N2)[:, ::2]
    x = torch.randn(20, 6).mT
    y = AdaptedLinear(linear, a, b)(x)
    delta = torch.kron(a.double().contiguous(), b.double().contiguous())
    assert_close("y", y, adapted(x, linear.weight, linear.bias, delta), 29)


def test_adapters_over_adapters_and_over_kronecker_layers():
    base = KroneckerLinear(20, 18, (2, 10))
    pairs = [(torch.randn(3, 4), torch.randn(6, 5)), (torch.randn(9, 2), torch.randn(2, 10))]
    layer = AdaptedLinear(AdaptedLinear(base, *pairs[0]), *pairs[1])
    x, dense = torch.randn(6, 20), base.to_linear()
    delta = sum(torch.kron(a.double(), b.double()) for a, b in pairs)
    assert_close("y", layer(x), adapted(x, dense.weight, dense.bias, delta), 60)


def test_adapters_over_adapters_of_a_convolution():
    layer, x = nn.Conv2d(20, 18, 1), torch.randn(2, 20, 5, 18)  # as wide as the result is deep
    pairs = [(torch.randn(3, 4), torch.randn(6, 5)), (torch.randn(9, 2), torch.randn(2, 10))]
    served = AdaptedLinear(AdaptedLinear(layer, *pairs[0]), *pairs[1])
    delta = sum(torch.kron(a.double(), b.double()) for a, b in pairs).view_as(layer.weight)
    expected = F.conv2d(x.double(), layer.weight.double() + delta, layer.bias.double())
    assert_close("y", served(x), expected, 60)
    with pytest.raises(ValueError, match=r"base_layer's is \(18, 20\)"):
        AdaptedLinear(served, torch.ones(4, 4), torch.ones(4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("batch", [(2,), (), (0,)], ids=["images", "one image", "no image"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(9,), (5, 7), (2, 3, 4)], ids=["1-D", "2-D", "3-D"])
def test_convolutions_with_a_kernel_of_one(sizes, stride, batch, rank, dtype):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(sizes) - 1]
    layer = kind(20, 18, 1, stride, padding=0 if stride > 1 else "same", dtype=dtype)
    ranks = () if rank is None else (rank,)
    a, b = torch.randn(*ranks, M1, N1).to(dtype), torch.randn(*ranks, M2, N2).to(dtype)
    served = AdaptedLinear(layer, a, b, 0.5)
    x = torch.randn(*batch, 20, *sizes).to(dtype)
    y = served(x)
    terms = zip(a.view(-1, M1, N1).double(), b.view(-1, M2, N2).double(), strict=True)
    delta = 0.5 * sum(torch.kron(p, q) for p, q in terms).view_as(layer.weight)
    expected = convolve(x.double(), layer.weight.double() + delta, layer.bias.double(), stride)
    assert y.dtype == dtype
    assert_close("y", y, expected, 20 + 9 * (rank or 1))
    assert y.stride() == layer(x).stride() or not y.numel()


def test_images_with_channels_last_stay_so():
    layer = nn.Conv2d(20, 18, 1).to(memory_format=torch.channels_last)
    served = AdaptedLinear(layer, torch.randn(M1, N1), torch.randn(M2, N2))
    x = torch.randn(2, 20, 5, 7).to(memory_format=torch.channels_last)
    y = served(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, served(x.contiguous()))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradients(kind):
    options = {"dtype": torch.float64}
    linear = nn.Linear(20, 18, **options) if kind == "linear" else nn.Conv2d(20, 18, 1, **options)
    x = torch.randn(3, 20, **options) if kind == "linear" else torch.randn(2, 20, 2, 1, **options)
    a, b = torch.randn(M1, N1, **options), torch.randn(M2, N2, **options)
    for t in (x, a, b):
        t.requires_grad_()
    layer = AdaptedLinear(linear, a, b, 0.5)
    assert layer.a.requires_grad and layer.b.requires_grad
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(layer, {"a": a, "b": b}, (x,)),
        (x, layer.a, layer.b),
    )
    frozen = AdaptedLinear(linear, a.detach(), b.detach(), 0.5)
    assert not (frozen.a.requires_grad or frozen.b.requires_grad)
    assert torch.autograd.gradcheck(frozen, (x,))


class Largest(TorchDispatchMode):
    """The entries of the largest result of any operator that makes one, not a view."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.entries = max(self.entries, result.numel())
        return result


def test_the_product_is_never_formed():
    linear, x = nn.Linear(256, 256), torch.randn(4, 256)
    state = drawn({"lokr_w1": (16, 16), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)})
    with torch.no_grad(), Largest() as used:
        layer = AdaptedLinear(linear, *lokr_factors(state, scale=2.0))
        layer(x)
    assert 4 * 256 <= used.entries < 256 * 256 / 8
    with Largest() as used:
        torch.kron(layer.a[0], layer.b[0])
    assert used.entries >= 256 * 256


def test_nan_and_infinities_come_out():
    linear, x = nn.Linear(20, 18), torch.randn(4, 20)
    a, b = torch.randn(M1, N1), torch.randn(M2, N2)
    for value in (float("nan"), float("inf")):
        b[0, 0] = value
        y = AdaptedLinear(linear, a, b)(x).view(4, M1, M2)
        assert not y[:, :, 0].isfinite().any() and y[:, :, 1:].isfinite().all()


def test_a_layer_is_saved_copied_moved_and_compiled():
    layer = AdaptedLinear(nn.Linear(20, 18), torch.randn(M1, N1), torch.randn(M2, N2)).eval()
    assert set(layer.state_dict()) == {"a", "b", "base_layer.weight", "base_layer.bias"}
    x = torch.randn(5, 20)
    with torch.no_grad():
        y = layer(x)
        other = AdaptedLinear(nn.Linear(20, 18), torch.zeros(M1, N1), torch.zeros(M2, N2))
        other.load_state_dict(layer.state_dict())
        for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same(x), y)
        assert layer.double()(x.double()).dtype == torch.float64
        compiled = torch.compile(layer.float(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        autocast = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = layer(x)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), autocast, rtol=0.05, atol=0.2)
    assert "in_features=4*5, out_features=3*6, rank=1" in repr(layer)


@pytest.mark.parametrize(
    ("base", "a", "b", "message"),
    [
        (nn.Linear(20, 18), (3, 4), (6, 4), r"weight \(3 \* 6, 4 \* 4\) = \(18, 16\).* \(18, 20\)"),
        (nn.Linear(18, 20), (3, 4), (6, 5), "is the adapter of another layer"),
        (nn.Linear(20, 18), (2, 3, 4), (6, 5), "one Kronecker rank, got 2 and 1"),
        (nn.Linear(20, 18), (4,), (6, 5), r"a must be .* got torch.float32 of shape \(4,\)"),
        (nn.Linear(20, 18), (3, 4), (6, 0), r"b must be .* at least 1"),
        (nn.Conv2d(20, 18, 3), (3, 4), (6, 5), r"its kernel is \(3, 3\)"),
        (nn.Conv2d(20, 18, 1, groups=2), (3, 4), (6, 5), "it has 2 groups"),
        (nn.Embedding(18, 20), (3, 4), (6, 5), "it is of class Embedding, which is not a product"),
        (nn.LSTM(20, 18), (3, 4), (6, 5), "it is of class LSTM, which is not a product"),
        (nn.Conv2d(20, 18, 1, padding=1), (3, 4), (6, 5), r"padding of \(1, 1\)"),
        (nn.Conv2d(20, 12, 1), (3, 4), (6, 5), r"base_layer's is \(12, 20\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(base, a, b, message):
    with pytest.raises(ValueError, match=message):
        AdaptedLinear(base, torch.ones(a), torch.ones(b))


def test_factors_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"a must be a torch.Tensor, got list"):
        AdaptedLinear(nn.Linear(4, 4), [[1.0]], torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"a must be .* got torch.int64"):
        AdaptedLinear(nn.Linear(4, 4), torch.ones(2, 2).long(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="scale = nan must be a finite number"):
        AdaptedLinear(nn.Linear(4, 4), torch.ones(2, 2), torch.ones(2, 2), float("nan"))


# --- models with PEFT


def test_a_model_without_lokr_is_refused_and_peft_is_not_imported():
    program = """
import sys, torch
from kron_kernels.adapters import serve_lokr, unserve_lokr
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
unserve_lokr(model)
try:
    serve_lokr(model)
except ValueError as error:
    assert "the Sequential has no LoKr layer" in str(error) and "AdaptedLinear" in str(error)
else:
    raise AssertionError("nothing was raised")
assert not {"peft", "lycoris", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Net(nn.Module):
    """Linear layers, convolutions that can and cannot be served, and a head that is saved whole."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(20, 48)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.padded = nn.Conv2d(8, 6, 1, padding=1)
        self.line = nn.Conv1d(12, 10, 1, 2)
        self.head = nn.Linear(50, 4)

    def forward(self, x):  # (batch, 20)
        y = self.up(x).tanh().view(-1, 6, 2, 4)
        y = self.wide(self.pointwise(y).tanh()).tanh()  # (batch, 8, 2, 4)
        y = self.padded(y).view(-1, 12, 12)[..., :10]
        return self.head(self.line(y).tanh().flatten(1))


TARGETS = ["up", "pointwise", "wide", "padded", "line"]


def lokr(**options):
    peft = pytest.importorskip("peft")
    defaults = {"target_modules": TARGETS, "r": 2, "alpha": 3, "init_weights": False}
    return peft.LoKrConfig(**defaults | options)


def net(**options):
    """Net with adapters, in evaluation mode."""
    config = lokr(**options)
    import peft

    return peft.get_peft_model(Net(), config).eval()


X = torch.linspace(-2, 2, 5 * 20).view(5, 20).sin()


def same_numbers(model, x=X) -> torch.Tensor:
    """Served and PEFT's results agree, and with PEFT's in float64; the served ones."""
    wide = copy.deepcopy(model)
    unserve_lokr(wide)
    wide = wide.double()
    with torch.no_grad():
        y = model(x)
        assert_close("y", y, wide(x.double()), 200)
    return y


def served_layers(model) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, m in model.named_modules()
        if type(m).__name__.startswith("Served")
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decompose_both": True, "r": 1},
        {"decompose_factor": 2, "use_effective_conv2d": True},
        {"r": 64},  # whole halves, with a scale of alpha / r all the same
        {"alpha": 0},
        {"init_weights": "lycoris"},
        {"init_weights": True},
        {"rank_pattern": {"up": 5}, "alpha_pattern": {"pointwise": 7}},
        {"rank_dropout": 0.5, "module_dropout": 0.5},
    ],
    ids=str,
)
def test_a_served_model_gives_pefts_numbers_and_goes_back(options):
    model = net(**options)
    before, names = model(X), set(model.state_dict())
    left = serve_lokr(model)
    assert left == {
        "base_model.model.wide": "its kernel is (3, 3), and only one of 1 is a matrix product",
        "base_model.model.padded": "it has a padding of (1, 1) around a kernel of 1",
        "base_model.model.line": "it is a Conv1d",
    }
    assert served_layers(model) == {"up", "pointwise"}
    served = same_numbers(model)
    assert set(model.state_dict()) == names
    assert serve_lokr(model) == left  # again
    assert torch.equal(model(X), served)
    unserve_lokr(model)
    assert not served_layers(model)
    assert torch.equal(model(X), before)
    unserve_lokr(model)
    assert torch.equal(model(X), before)


def test_a_served_layer_forms_no_product():
    model = nn.Sequential(nn.Linear(256, 256))
    model = pytest.importorskip("peft").get_peft_model(model, lokr(target_modules=["0"])).eval()
    x = torch.randn(4, 256)
    entries = []
    for change in (serve_lokr, unserve_lokr):
        change(model)
        with torch.no_grad(), Largest() as used:
            model(x)
        entries.append(used.entries)
    served, pefts = entries
    assert served < 256 * 256 / 8 and pefts >= 256 * 256


def test_adapters_are_switched_scaled_disabled_and_merged_while_served():
    model = net()
    base = copy.deepcopy(model).unload()(X)
    serve_lokr(model)
    first = same_numbers(model)
    model.add_adapter("second", lokr(target_modules=["up", "line"], r=3, decompose_factor=4))
    model.add_adapter("third", lokr(target_modules=["head"], r=3))
    assert {path.rpartition(".")[2] for path in serve_lokr(model)} == {"wide", "padded", "line"}
    assert served_layers(model) == {"up", "pointwise", "head"}
    assert torch.equal(same_numbers(model), first)
    model.set_adapter("second")
    second = same_numbers(model)
    model.base_model.set_adapter(["default", "second", "third"])
    both = same_numbers(model)
    layer = model.base_model.model.up
    layer.set_scale("second", 5.0)
    scaled = same_numbers(model)
    layer.unscale_layer()
    with model.disable_adapter():
        assert torch.equal(same_numbers(model), base)
    assert torch.equal(same_numbers(model), both)
    model.merge_adapter(["default"])
    merged = same_numbers(model)  # of a layer with merged adapters PEFT leaves out the others
    model.unmerge_adapter()
    torch.testing.assert_close(same_numbers(model), both)
    with torch.no_grad():
        layer.lokr_w1["default"].data *= 2
    changed = same_numbers(model)
    results = [base, first, second, both, scaled, merged, changed]
    for i, y in enumerate(results):
        assert not any(torch.allclose(y, other, atol=1e-3) for other in results[:i])
    model.set_adapter("default")
    model.delete_adapter("second")
    same_numbers(model)
    merged = model.merge_and_unload()
    assert not served_layers(merged)
    assert type(merged.up) is nn.Linear


def test_modules_to_save_are_pefts():
    model = net(target_modules=["up"], modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(3)
    assert serve_lokr(model) == {}
    same_numbers(model)


@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
def test_dropout_in_training_is_pefts(dropout):
    model = net(**{dropout: 0.5}).train()
    torch.manual_seed(1)
    expected = model(X)
    serve_lokr(model)
    for seed, same in ((1, True), (2, False)):
        torch.manual_seed(seed)
        assert torch.equal(model(X), expected) is same


def test_gradients_are_pefts_in_training():
    model = net(target_modules=["up", "pointwise"], r=1).double().train()
    x = X.double().requires_grad_()
    gradients = []
    for change in (serve_lokr, unserve_lokr):
        change(model)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(model(x).square().sum(), leaves))
    assert len(gradients[0]) == 1 + 2 * 3
    for ours, pefts in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, pefts, rtol=1e-10, atol=1e-12)
        assert pefts.any()
    serve_lokr(model)
    assert torch.autograd.gradcheck(model.eval(), (x[:1].detach().requires_grad_(),))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits_beside_adapters_of_either_dtype(adapters):
    model = net(target_modules=["up", "pointwise"]).bfloat16()
    for name, p in model.named_parameters():
        if "lokr" in name:
            p.data = p.data.to(adapters)
    serve_lokr(model)
    y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16
    unserve_lokr(model)
    exact = copy.deepcopy(model).double()(X.double())
    ours, pefts = ((out - exact).norm() for out in (y, model(X.bfloat16())))
    assert ours < 1.5 * pefts  # of the same roundings


def test_a_served_model_is_copied_pickled_and_saved_as_pefts(tmp_path):
    model = net()
    model.save_pretrained(tmp_path / "pefts")
    serve_lokr(model)
    y = model(X)
    model.save_pretrained(tmp_path / "served")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("pefts", "served")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert served_layers(other) == served_layers(model)
        assert torch.equal(other(X), y)
        with torch.no_grad():  # it has its own adapters
            other.base_model.model.up.lokr_w1["default"].zero_()
        assert not torch.equal(other(X), y)
        unserve_lokr(other)
        assert not served_layers(other) and served_layers(model)
    assert torch.equal(model(X), y)


def test_a_served_model_is_compiled():
    model = net(target_modules=["up", "pointwise"])
    serve_lokr(model)
    with torch.no_grad():
        compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), model(X))
        model.base_model.model.up.set_scale("default", 4.0)
        torch.testing.assert_close(compiled(X), model(X))


def test_a_layer_with_its_own_forward_is_left_alone():
    model = net()
    layer = model.base_model.model.up
    layer.forward = lambda x: layer.base_layer(x) * 2
    y = model(X)
    assert "forward of its own" in serve_lokr(model)["base_model.model.up"]
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize(
    "options",
    [{}, {"r": 64}, {"decompose_both": True, "r": 1, "decompose_factor": 2}],
    ids=str,
)
def test_the_file_of_peft_gives_its_model_without_it(tmp_path, options):
    model = net(target_modules=["up", "pointwise"], modules_to_save=["head"], **options)
    expected = copy.deepcopy(model).double()(X.double())
    plain = copy.deepcopy(model).unload()  # PEFT's own base model
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    layers, others = split_lokr(load_file(tmp_path / "adapter_model.safetensors"))
    assert set(layers) == {"up", "pointwise"}
    assert {name.rpartition(".")[2] for name in others} == {"weight", "bias"}
    config = model.peft_config["default"]
    for path, state in layers.items():
        a, b = lokr_factors(state, scale=config.alpha / config.r)
        plain.set_submodule(path, AdaptedLinear(plain.get_submodule(path), a, b))
    assert_close("y", plain(X), expected, 200)


# --- modules of LyCORIS


@pytest.mark.parametrize("convolves", [False, True], ids=["linear", "convolution"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 4},
        {"factor": 4, "decompose_both": True, "lora_dim": 1},
        {"full_matrix": True},
        {"lora_dim": 1000},
        {"unbalanced_factorization": True},
        {"use_scalar": True},
        {"rs_lora": True},
        {"alpha": 0},
        {"use_tucker": True},
    ],
    ids=str,
)
def test_the_state_of_lycoris_gives_its_layer(options, convolves):
    lokr_module = pytest.importorskip("lycoris.modules.lokr")
    base = nn.Conv2d(48, 60, 1) if convolves else nn.Linear(48, 60)
    defaults = {"lora_dim": 2, "alpha": 3}
    module = lokr_module.LokrModule("lora_unet_mid", base, 1.0, **defaults | options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(2, 48, 3, 4) if convolves else torch.randn(5, 48)
    layers, _ = split_lokr({f"lora_unet_mid.{k}": v for k, v in module.state_dict().items()})
    a, b = lokr_factors(layers["lora_unet_mid"])
    y = AdaptedLinear(base, a, b)(x)
    wide = module.double()
    wide.org_module[0].double()
    expected = wide(x.double())
    assert_close("y", y.double().float(), expected.detach(), 200)
