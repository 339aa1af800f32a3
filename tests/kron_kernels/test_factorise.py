"""Factorised layers in place of other modules' dense ones, and back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    KroneckerSum,
    densify_,
    factorise_,
    nearest_kronecker,
)
from kron_kernels.modules import dense_layers, obstacles


class Conv1D(nn.Module):
    """As transformers': ``x @ weight + bias`` with ``weight (in, out)``."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


ONE, TWO = {"a_shape": [2, 3], "rank": 6}, {"a_shape": [8, 1], "rank": 1}


def test_layers_are_replaced_by_the_nearest_and_come_back():
    shared = nn.Linear(12, 12)
    net = nn.Sequential(nn.Embedding(9, 12), shared, Conv1D(8, 12), nn.Sequential(shared)).eval()
    net[3] = nn.Sequential(nn.Linear(8, 12), shared).eval()
    dense, x = copy.deepcopy(net), torch.arange(9)
    c = torch.diag(torch.logspace(0, -3, 12))
    factors = {
        "0": [{"a_shape": [9, 12]}],
        "1": [{"a_shape": [3, 4], "rank": 12}],
        "2": [ONE | {"rank": 2}, TWO],
        "3.0": None,
    }
    assert factorise_(net, factors, second_moments={"2": c}) is net
    table, linear, both, (kept, again) = net
    assert isinstance(table, KroneckerEmbedding) and isinstance(linear, KroneckerLinear)
    assert isinstance(both, KroneckerSum) and isinstance(kept, nn.Linear) and again is linear
    assert not any(m.training for m in net.modules())
    weight = dense[2].weight.mT

    def output_error(layer):
        return ((layer.to_linear().weight - weight) @ c.sqrt()).norm()

    parts = [((2, 3), 2), ((8, 1), 1)]
    same = nn.Linear(12, 8)
    same.load_state_dict({"weight": weight, "bias": dense[2].bias})
    plain = KroneckerSum.from_linear(same, parts)
    assert output_error(both) < output_error(plain)
    # The others are of full rank: with the sum out of the way nothing is lost.
    net[2] = dense[2]
    torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-4)
    net[2] = both
    expected = net(x)
    assert densify_(net) is net
    assert [type(m) for m in net[:3]] == [nn.Embedding, nn.Linear, nn.Linear]
    assert net[3][1] is net[1]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_the_module_itself_may_be_the_layer():
    dense = nn.Linear(12, 8)
    layer = factorise_(dense, {"": ONE})
    assert isinstance(layer, KroneckerLinear) and isinstance(dense, nn.Linear)
    a, b = nearest_kronecker(dense.weight, (2, 3), 6)
    assert torch.equal(layer.a, a) and torch.equal(layer.b, b)
    back = densify_(layer)
    torch.testing.assert_close(back(torch.ones(2, 12)), layer(torch.ones(2, 12)))
    assert densify_(dense) is dense and factorise_(dense, {"": None}) is dense


def frozen_in(module: nn.Module) -> dict[str, set[str]]:
    """The frozen parameters' names, by the layer that has them."""
    return {
        path: {n.rpartition(".")[2] for n, p in m.named_parameters() if not p.requires_grad}
        for path, m in module.named_children()
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_stay_frozen_there_and_back(frozen, grad):
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(12, 8),
            "sum": nn.Linear(12, 8),
            "conv": Conv1D(8, 12),
            "conv_sum": Conv1D(8, 12),
            "table": nn.Embedding(9, 12),
        }
    )
    for name in frozen:
        for layer in net.values():
            if name in layer._parameters:
                getattr(layer, name).requires_grad_(False)
    factors = {"linear": ONE, "sum": [ONE, TWO], "conv": ONE, "conv_sum": [ONE, TWO]}
    factors["table"] = {"a_shape": [9, 4]}
    before = frozen_in(net)
    with torch.set_grad_enabled(grad):
        factorise_(net, factors)
        for path, names in frozen_in(net).items():
            expected = {*"ab"} if "weight" in before[path] else set()
            assert names == expected | (before[path] & {"bias"})
        densify_(net)
    assert frozen_in(net) == before


def test_a_dense_weight_is_trained_if_one_of_its_factors_is():
    layer = KroneckerLinear(12, 8, (2, 3))
    layer.a.requires_grad_(False)
    assert layer.to_linear().weight.requires_grad
    layer.b.requires_grad_(False)
    assert not layer.to_linear().weight.requires_grad and layer.to_linear().bias.requires_grad


class Attention(nn.Module):
    """Layers whose weight is read by another module, tied or computed."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 24)
        self.words, self.decoder = nn.Embedding(9, 12), nn.Linear(12, 9)
        self.decoder.weight = self.words.weight
        self.sparse = nn.Embedding(9, 12, sparse=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})(12, 12)
        self.linear = nn.Linear(12, 12)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"mha.out_proj": ONE}, "MultiheadAttention reads its weight, which a factorised layer"),
        ({"encoder.linear1": ONE}, "TransformerEncoderLayer reads its weight, which a"),
        ({"decoder": ONE}, "'decoder' cannot be factorised: its weight is tied to that of words;"),
        ({"words": ONE}, "tied to that of decoder"),
        ({"sparse": {"a_shape": [9, 6]}}, "it has sparse, which a Kronecker embedding does not"),
        ({"normed": ONE}, "its weight is computed by a parametrization"),
        ({"own": ONE}, "its class, Own, has its own forward"),
        ({"linaer": ONE}, "factors has 'linaer', which is not a layer .* nearest are linear"),
        ({"linear": {"a_shape": [5, 1]}}, r"factors\['linear'\]: weight's 12 rows are not div"),
        ({"linear": {"shape": [3, 1]}}, r"factors\['linear'\] = .* must look like"),
        (
            {"linear": [ONE, {"a_shape": [2, 2], "rank": 5}]},
            r"factors\['linear'\]: .* use rank <= 4",
        ),
        ({"linear": ONE, "linaer": ONE}, "linaer"),
        ({"linear": ONE, "linaer": None}, "factors has 'linaer', .* nearest are linear"),
        ({"linear": 3}, r"factors\['linear'\] = 3 must look like"),
        ({"linear": {"a_shape": 4}}, "must look like .*: a_shape = 4 must be two integers"),
    ],
    ids=lambda v: None if isinstance(v, str) else next(iter(v)),
)
def test_a_layer_that_cannot_be_replaced_is_refused_and_nothing_changed(factors, message):
    net = Attention()
    before = [*net.modules()]
    with pytest.raises(ValueError, match=message):
        factorise_(net, factors)
    assert [*net.modules()] == before


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"1": torch.eye(12)}, "second_moments has '1', which is not a layer .* nearest are 0"),
        ({"0": torch.full((12, 12), torch.nan)}, "^0: second_moment must be real and finite"),
        ({"0": torch.eye(11)}, "^0: second_moment must be E"),
        ({"table": torch.eye(12)}, "second_moments has 'table', an nn.Embedding, .* leave it out"),
    ],
)
def test_second_moments_that_fit_no_layer_are_refused(moments, message):
    net = nn.ModuleDict({"0": nn.Linear(12, 8), "table": nn.Embedding(9, 12)})
    with pytest.raises(ValueError, match=message):
        factorise_(net, {"0": ONE, "table": {"a_shape": [9, 4]}}, second_moments=moments)
    factorise_(net, {"0": None}, second_moments={"0": torch.eye(12)})  # no harm


@pytest.mark.parametrize(
    ("factors", "moments", "message"),
    [
        (["0"], None, r"factors = \['0'\] must be a mapping, such as \{\"0\": "),
        ("0", None, "factors = '0' must be a mapping"),
        (None, None, "factors = None must be a mapping"),
        (
            SimpleNamespace(factors={}),
            None,
            "is a SimpleNamespace, .*; pass its .factors",
        ),
        ({0: ONE}, None, r"factors has the key 0, but keys must be strings: \{\"0\": "),
        ({None: ONE}, None, "factors has the key None, but keys must be strings"),
        ({"0": ONE}, [torch.eye(12)], r"second_moments = \[tensor\(\[\[1\., .*\s.* must be a"),
        ({"0": ONE}, {0: torch.eye(12)}, "second_moments has the key 0, but keys must be strings"),
        ({"0": ONE}, {"0": [1.0]}, "^0: second_moment must be a torch.Tensor, got list; use"),
        ({"0": [ONE, TWO]}, {"0": [1.0]}, "^0: second_moment must be a torch.Tensor, got list"),
    ],
    ids=range(10),
)
def test_an_argument_of_another_type_is_refused_with_an_example(factors, moments, message):
    with pytest.raises(TypeError, match=message):
        factorise_(nn.Sequential(nn.Linear(12, 8)), factors, second_moments=moments)


def test_a_weight_that_is_not_finite_is_refused_by_its_path():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(12, 8))
    with torch.no_grad():
        net[1].weight[0, 3] = torch.nan
    for terms in (ONE, [ONE, TWO]):
        with pytest.raises(ValueError, match=r"^1: weight has 1 entries that are NaN"):
            factorise_(net, {"1": terms})


class Readers(nn.Module):
    """Reads the weights of some of its layers, in ways found in real models."""

    def __init__(self, tensor_parallel: int = 1):
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.by_dtype, self.by_helper, self.plain, self.slow = (nn.Linear(12, 12) for _ in "0123")
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(12, 12)}) for _ in "01")
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(12, 12)), nn.Linear(12, 12))
        self.words = nn.Embedding(9, 12)
        nn.init.zeros_(self.plain.weight)

    def reset_parameters(self):
        nn.init.ones_(self.plain.weight)

    def forward(self, x, hidden=None):
        # self.plain.weight is only mentioned
        if hidden is not None:
            return hidden @ self.plain.weight
        x = self.plain(x.to(self.by_dtype.weight.dtype))
        for block in self.blocks:
            x = x @ block.fc.weight
        if self.tensor_parallel > 1:
            x = x @ self.slow.weight
        self.plain.scale = self.inner[0][0].weight.abs().max()
        return self._helper(x)

    def _helper(self, x):
        return torch.nn.functional.linear(x, self.by_helper.weight) @ self.words.weight.mT


class Aliases(nn.Module):
    """Reads weights through local names, loop variables and ``getattr``."""

    def __init__(self):
        super().__init__()
        names = ["local", "pair", "walrus", "got", "typed", "plain", "called"]
        for name in names:
            setattr(self, name, nn.Linear(12, 12))
        lists = ["looped", "counted", "zipped", "reverse", "sliced", "listed", "children_"]
        for name in lists:
            setattr(self, name, nn.ModuleList([nn.Linear(12, 12)]))
        self.table = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
        self.by_value = nn.ModuleDict({"fc": nn.Linear(12, 12)})
        self.by_item = nn.ModuleDict({"fc": nn.Linear(12, 12)})
        self.by_name = nn.ModuleDict({"fc": nn.Linear(12, 12)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(12, 12)})])

        self.by_attribute = nn.Sequential()
        self.by_attribute.fc = nn.Linear(12, 12)

    def forward(self, x, weight="fc"):
        local = self.local
        first, second = self.pair, self.plain
        typed: nn.Linear = self.typed
        x = x @ local.weight @ first.weight @ typed.weight
        x = x @ getattr(self.got, "weight") @ getattr(self.by_attribute, weight).weight  # noqa: B009
        if (inside := self.walrus) is not None:
            x = x @ inside.weight
        for layer in self.looped:
            x = nn.functional.linear(x, layer.weight)
        for _i, layer in enumerate(self.counted):
            x = x @ layer.weight
        for layer, _ in zip(self.zipped, x, strict=False):
            x = x @ layer.weight
        for layer in reversed(self.reverse):
            x = x @ layer.weight
        for layer in self.sliced[:3]:
            x = x @ layer.weight
        x = sum(x @ layer.weight for layer in self.listed)
        for layer in self.children_.children():
            x = x @ layer.weight
        for layer in self.by_value.values():
            x = x @ layer.weight
        for _, layer in self.by_item.items():
            x = x @ layer.weight
        for block in self.blocks:
            fc = block.fc
            x = x @ fc.weight
        called = self.called
        y = called(x)
        return second(x) @ y.weight @ self.table["a"].weight @ self.by_name[weight].weight


def test_a_weight_read_through_a_local_name_or_a_loop_is_found():
    net = Aliases()
    assert dense_layers(net).keys() - obstacles(net).keys() == {"plain", "called", "table.b"}


class Guarded(nn.Module):
    """Reads weights only if there are any, except for the last two layers."""

    def __init__(self):
        super().__init__()
        self.tested, self.negated, self.both, self.either, self.chosen, self.default = (
            nn.Linear(12, 12) for _ in "012345"
        )
        self.optional, self.tried, self.other, self.unguarded = (nn.Linear(12, 12) for _ in "0123")

    def forward(self, x):
        if hasattr(self.tested, "weight"):
            x = x.to(self.tested.weight.dtype)
        if not hasattr(self.negated, "weight"):
            pass
        elif self.negated.weight.requires_grad:
            x = x.to(self.negated.weight.dtype)
        if hasattr(self.both, "weight") and self.both.weight.dtype != x.dtype:
            x = x.to(self.both.weight.dtype)
        if not hasattr(self.either, "weight") or self.either.weight.is_cuda:
            x = x + 0
        x = x.to(self.chosen.weight.dtype if hasattr(self.chosen, "weight") else x.dtype)
        weight = getattr(self.default, "weight", None)
        if getattr(self.optional, "weight", None) is not None:
            x = x.to(self.optional.weight.dtype)
        try:
            x = x.to(self.tried.weight.dtype)
        except AttributeError:
            x = x.to(self.other.weight.dtype)
        if hasattr(self.other, "weight"):
            x = x.to(self.unguarded.weight.dtype)
        for layer in self.children():
            x = layer(x)
        return x if weight is None else x.to(weight.dtype)


def test_a_weight_read_only_if_it_exists_does_not_keep_a_layer_dense():
    net, x = Guarded(), torch.randn(2, 12)
    found = obstacles(net).keys()
    assert found == {"other", "unguarded"}
    others = {path: ONE | {"a_shape": [3, 4]} for path in net._modules if path not in found}
    assert factorise_(net, others)(x).shape == x.shape


READ = {"by_dtype", "by_helper", "blocks.0.fc", "blocks.1.fc", "inner.0.0", "words"}


@pytest.mark.parametrize(("setting", "slow"), [(1, set()), (2, {"slow"})])
def test_a_layer_whose_weight_its_owner_reads_is_refused(setting, slow):
    net = nn.Sequential(Readers(setting))
    reason = "Readers reads its weight, which a factorised layer does not have"
    assert obstacles(net) == {f"0.{path}": reason for path in READ | slow}
    with pytest.raises(ValueError, match=f"'0.by_helper' cannot be factorised: {reason}; leave it"):
        factorise_(net, {"0.plain": ONE, "0.by_helper": ONE})
    assert isinstance(net[0].plain, nn.Linear)


def test_an_owner_without_readable_source_does_not_keep_a_layer_dense():
    scope = {"nn": nn}
    exec("class Typed(nn.Sequential):\n    def forward(self, x): return self[0].weight", scope)
    line = {
        "forward": lambda self, x: (x, self[0].weight),  # no statement by itself
    }
    for owner in (scope["Typed"], type("Line", (nn.Sequential,), line)):
        assert not obstacles(owner(nn.Linear(12, 12)))


def test_a_layer_is_refused_if_any_of_its_owners_reads_it():
    net = nn.Sequential(nn.Linear(12, 12), Readers())
    net[1].by_dtype = net[0]
    assert "Readers reads its weight" in obstacles(net)["0"]


@pytest.mark.parametrize(
    "owner",
    [nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24), 1), nn.MultiheadAttention(12, 2)],
    ids=lambda m: type(m).__name__,
)
def test_torchs_own_readers_are_found(owner):
    assert obstacles(owner).keys() == dense_layers(owner).keys() != set()


def encoder(layer: dict, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, **layer)
    return nn.TransformerEncoder(layer, 2, **options).eval()


def test_torchs_encoder_is_factorised_without_its_fast_path():
    net, x, mask = encoder({}), torch.randn(2, 5, 12), torch.tensor([[0] * 5, [0, 0, 0, 1, 1]]) > 0
    factors = {f"layers.{i}.linear{j}": ONE for i in (0, 1) for j in (1, 2)}
    message = r"TransformerEncoderLayer reads its weight.*activation_relu_or_gelu = 0 .*use_nested"
    with pytest.raises(ValueError, match=message):
        factorise_(net, factors)
    dense = net(x, src_key_padding_mask=mask)
    for layer in net.layers:
        layer.activation_relu_or_gelu = 0
    with pytest.raises(ValueError, match=r"TransformerEncoder reads its weight.*use_nested_tensor"):
        factorise_(net, factors)
    net.use_nested_tensor = False
    slow = net(x, src_key_padding_mask=mask)
    torch.testing.assert_close(slow[~mask], dense[~mask])
    factorise_(net, factors)
    with torch.no_grad():
        few = net(x, src_key_padding_mask=mask)
    expected = densify_(net)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(few[~mask], expected[~mask])


def test_torchs_encoder_has_no_fast_path_for_some_activations():
    net = encoder({"activation": nn.functional.silu}, enable_nested_tensor=False)
    assert obstacles(net).keys() == {f"layers.{i}.self_attn.out_proj" for i in (0, 1)}


OTHERS = nn.ModuleDict(
    {
        "wide": nn.Conv2d(4, 6, 3),
        "narrow": nn.Conv2d(4, 6, 1),
        "strided": nn.Conv1d(4, 6, 1, stride=2),
        "transposed": nn.ConvTranspose2d(4, 6, 1),
        "rnn": nn.LSTM(4, 6),
        "attention": nn.MultiheadAttention(12, 2),
        "norm": nn.LayerNorm(12),
    }
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide", "of class Conv2d, with a kernel of 3x3, and only nn.Linear and nn.Embedding are"),
        (
            "narrow",
            r"can be replaced by nn.Linear\(4, 6\) with its weight.flatten\(1\), called on x",
        ),
        ("narrow.weight", "of class Conv2d, with a kernel of 1x1, and can be replaced"),
        ("strided", "of class Conv1d, with a kernel of 1, and only nn.Linear"),
        ("transposed", "of class ConvTranspose2d, with a kernel of 1x1, and only nn.Linear"),
        ("rnn", "of class LSTM, and only nn.Linear"),
        ("attention", "multiplies by its own in_proj_weight .four nn.Linear and F.scaled_dot"),
        ("attention.in_proj_weight", "of class MultiheadAttention, and multiplies by its own"),
        ("attention.out_proj", "MultiheadAttention reads its weight.* .four nn.Linear and F.scal"),
    ],
)
def test_layers_of_other_kinds_are_refused_with_a_way_out(name, message):
    with pytest.raises(
        ValueError, match=rf"'{name}'.* cannot be factorised: .*{message}.*leave it"
    ):
        factorise_(OTHERS, {name: ONE})


def test_a_convolution_with_a_kernel_of_one_is_the_linear_layer_that_its_refusal_names():
    conv, x = OTHERS["narrow"], torch.randn(2, 4, 3, 5)
    linear = nn.Linear(4, 6)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
    torch.testing.assert_close(linear(x.movedim(1, -1)).movedim(-1, 1), conv(x))


def scaled(cls: type[nn.Module]) -> type[nn.Module]:
    return type("Scaled", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


def of_class(cls):
    return lambda layer: setattr(layer, "__class__", cls)


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def part(change):
    return lambda layer: layer.parts.__setitem__(1, change(layer.parts[1]))


def in_place(change):
    def changed(layer):
        change(layer)
        return layer

    return changed


MAKE = {
    "linear": lambda: KroneckerLinear(12, 8, (2, 3)),
    "table": lambda: KroneckerEmbedding(9, 12, 3),
    "sum": lambda: KroneckerSum(12, 8, [((2, 3), 1), ((8, 1), 1)]),
}
OWN = "has its own forward, so its dense layer is unknown; remove it, or override to_"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("linear", of_class(scaled(KroneckerLinear)), f"^1.0: Scaled {OWN}linear"),
        ("table", of_class(scaled(KroneckerEmbedding)), f"^1.0: Scaled {OWN}embedding"),
        ("sum", of_class(scaled(KroneckerSum)), f"^1.0: Scaled {OWN}linear"),
        *((kind, replaced, f"^1.0: Kronecker\\w+ {OWN}") for kind in MAKE),
        ("sum", part(in_place(of_class(scaled(KroneckerLinear)))), f"^1.0: parts.1: Scaled {OWN}"),
        ("sum", part(in_place(replaced)), f"^1.0: parts.1: KroneckerLinear {OWN}"),
        ("sum", part(KroneckerLinear.to_linear), "^1.0: parts.1 is a Linear, but must be"),
        ("sum", part(lambda p: nn.Sequential(p, nn.Tanh())), "^1.0: parts.1 is a Sequential"),
    ],
)
def test_a_layer_that_computes_something_else_is_not_made_dense(kind, change, message):
    net = nn.Sequential(KroneckerLinear(12, 8, (2, 3)), nn.Sequential(MAKE[kind]()))
    change(net[1][0])
    before = [*net.modules()]
    with pytest.raises(ValueError, match=message):
        densify_(net)
    assert [*net.modules()] == before


def test_equivalent_subclasses_and_layers_with_hooks_can_be_made_dense():
    class Named(KroneckerLinear):
        """Without its own forward."""

    class Doubled(KroneckerLinear):
        """With its own forward, and the matching dense layer."""

        def forward(self, x):
            return 2 * super().forward(x)

        def to_linear(self):
            linear = super().to_linear()
            linear.weight.data.mul_(2)
            linear.bias.data.mul_(2)
            return linear

    net = nn.Sequential(Named(12, 8, (2, 3)), Doubled(8, 12, (2, 2)), MAKE["sum"]())
    net[2].parts[0].bias = nn.Parameter(torch.randn(8))
    for layer in net.modules():
        layer.register_forward_hook(lambda *_: None)
    for bias in (True, False):
        if not bias:
            net[2].bias = None
        x = torch.randn(3, 12)
        want = net(x)
        dense = densify_(copy.deepcopy(net))
        assert {type(m) for m in dense} == {nn.Linear}
        torch.testing.assert_close(dense(x), want)
    net[2].parts[0].bias = None
    assert densify_(net)[2].bias is None


def test_a_fused_block_is_not_taken_apart():
    block = KroneckerFeedForward(KroneckerLinear(8, 16, (2, 2)), KroneckerLinear(16, 8, (2, 2)))
    with pytest.raises(ValueError, match="0 is a KroneckerFeedForward, which reads the factors"):
        densify_(nn.Sequential(block))
