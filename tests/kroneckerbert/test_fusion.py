"""Fused blocks and projections equal calls of their parts, and call parts that need it."""

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
import watching
from accelerate import cpu_offload
from test_architectures import CONFIGS, ENCODER, batch, each_architecture, outputs, teacher
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    IBertConfig,
    IBertModel,
    MobileBertConfig,
    MobileBertModel,
    MPNetConfig,
    XmodConfig,
    XmodModel,
)
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer, BertOutput
from transformers.models.distilbert.modeling_distilbert import FFN
from transformers.models.mpnet.modeling_mpnet import MPNetLayer

from kron_kernels import KroneckerLinear, kron_feed_forward, kron_qkv
from kroneckerbert import compress, decompress, fusion
from kroneckerbert.configuration_kroneckerbert import layout_of

HALVES = ("intermediate", "output")
INSIDE = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
PROJECTIONS = [f"attention.self.{name}" for name in ("query", "key", "value")]


def factorised(module: nn.Module, **options) -> nn.Module:
    """The module with its linear layers factorised, and fused."""
    for path, m in list(module.named_modules()):
        if type(m) is nn.Linear:
            parent, _, name = path.rpartition(".")
            shape = (m.out_features // 4, m.in_features // 4)
            layer = KroneckerLinear(m.in_features, m.out_features, shape, 2, **options)
            nn.init.normal_(layer.bias)
            setattr(module.get_submodule(parent), name, layer)
    fusion.fuse(module)
    return module.eval()


def bert_layer(cls: type = BertLayer, **options) -> nn.Module:
    return factorised(cls(BertConfig(**ENCODER, attn_implementation="eager", **options), 0))


def mpnet_layer() -> nn.Module:
    return factorised(MPNetLayer(MPNetConfig(**ENCODER)))


def ffn() -> nn.Module:
    return factorised(FFN(DistilBertConfig(dim=32, hidden_dim=64, n_heads=4)))


@pytest.fixture(params=[bert_layer, mpnet_layer], ids=["bert", "mpnet"])
def layer(request):
    return request.param()


@pytest.fixture
def calls(monkeypatch):
    """Name and backend of each fused call."""
    seen = []

    def spy(name, function):
        def counted(*args, **options):
            seen.append((name, options.get("backend")))
            return function(*args, **options)

        monkeypatch.setattr(fusion, name, counted)

    spy("kron_feed_forward", kron_feed_forward)
    spy("kron_qkv", kron_qkv)
    return seen


def feed_forward(layer, x):
    """The block by calls of its parts, as in transformers."""
    up, act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
    y = layer.output.dropout(layer.output.dense(act(up(x))))
    return layer.output.LayerNorm(y + x)


def result(layer, x):
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def expected(layer, x):
    return feed_forward(layer, layer.attention(x)[0])


def assert_stepwise(layer, calls, x=None):
    x = torch.randn(2, 5, 32) if x is None else x
    want = expected(layer, x)
    calls.clear()
    torch.testing.assert_close(result(layer, x), want)
    assert not [name for name, _ in calls if name == "kron_feed_forward"]


# --- parts that must be called


def test_a_block_and_an_attention_are_fused(layer, calls):
    x = torch.randn(2, 5, 32)
    want = expected(layer, x)
    torch.testing.assert_close(result(layer, x), want)
    assert calls == [("kron_feed_forward", "auto")]
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(result(layer, x), want)
    assert calls == [("kron_qkv", "auto"), ("kron_feed_forward", "auto")]
    assert type(layer).__name__ in ("BertLayer", "MPNetLayer"), "found by name"


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_every_activation_of_the_kernels_is_fused(activation, calls):
    layer, x = bert_layer(hidden_act=activation), torch.randn(2, 5, 32)
    torch.testing.assert_close(result(layer, x), expected(layer, x))
    assert calls == [("kron_feed_forward", "auto")]
    assert_stepwise(bert_layer(hidden_act="tanh"), calls)


def test_dropout_is_applied_in_training(layer, calls):
    layer.train()
    x, gradients = torch.randn(2, 5, 32), []
    for forward in (result, expected):
        torch.manual_seed(1)
        y = forward(layer, x)
        gradients += torch.autograd.grad(y.pow(3).sum(), layer.output.dense.b)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert calls == [("kron_feed_forward", "auto")]


@pytest.mark.filterwarnings("ignore:.*non-full backward hook")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", watching.ALL)
@pytest.mark.parametrize("make", [bert_layer, mpnet_layer, ffn])
def test_hooks_and_replaced_forwards_of_parts_are_called(make, kind):
    module, x = make(), torch.randn(2, 5, 32)
    want = result(module, x)
    parts = (*HALVES, *INSIDE, "output.dropout", "output.LayerNorm")
    if make is ffn:
        parts = ("lin1", "activation", "lin2", "dropout")
    for path in parts:
        seen = []
        with watching.ALL[kind](module.get_submodule(path), seen):
            y = result(module, x)
            y.sum().backward()
        assert len(seen) == 1, path
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("kind", watching.FORWARD)
def test_hooks_and_replaced_forwards_of_projections_are_called(kind):
    layer, x = bert_layer(), torch.randn(2, 5, 32)
    with torch.no_grad():
        want = result(layer, x)
        for path in PROJECTIONS:
            seen = []
            with watching.FORWARD[kind](layer.get_submodule(path), seen):
                torch.testing.assert_close(result(layer, x), want)
            assert len(seen) == 1, path


class Doubled(KroneckerLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def pruned(layer):
    prune.random_unstructured(layer, "a", 0.5)


def normed(layer):
    weight_norm(layer, "b")


def parametrized(layer):
    parametrizations.weight_norm(layer, "a")


def doubled(layer):
    layer.__class__ = Doubled


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("path", [INSIDE[0], INSIDE[2], *PROJECTIONS])
@pytest.mark.parametrize(
    "change", [pruned, normed, parametrized, doubled], ids=lambda change: change.__name__
)
def test_factors_that_are_computed_at_each_call_are_not_fused(change, path, calls):
    layer, x = bert_layer(), torch.randn(2, 5, 32)
    change(layer.get_submodule(path))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        want = expected(layer, x)
        y = result(layer, x)
        torch.testing.assert_close(y, want)
        optimizer.zero_grad()
        y.sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(result(layer, x), expected(layer, x))
    assert ("kron_feed_forward" if "dense" in path else "kron_qkv") not in dict(calls)


def test_a_patched_class_is_called(layer, calls, monkeypatch):
    x = torch.randn(2, 5, 32)
    half = next(c for c in type(layer.output).__mro__ if "forward" in vars(c))
    for cls in (KroneckerLinear, type(layer.intermediate.intermediate_act_fn), nn.Dropout, half):
        with monkeypatch.context() as patch:
            forward = cls.forward
            patch.setattr(cls, "forward", lambda self, *args, f=forward: 2 * f(self, *args))
            with torch.no_grad():
                if cls is half:
                    y = layer.attention(x)[0]
                    h = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(y))
                    torch.testing.assert_close(result(layer, x), layer.output(h, y))
                else:
                    torch.testing.assert_close(result(layer, x), expected(layer, x))


def test_parameters_that_accelerate_loads_for_each_call(layer):
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = result(layer, x)
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert layer.output.dense.a.is_meta
        torch.testing.assert_close(result(layer, x), want)


def test_a_compiler_sees_the_fused_block(layer):
    x, targets = torch.randn(2, 5, 32), []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(result, fullgraph=True, backend=backend)(layer, x)
        torch.testing.assert_close(y, expected(layer, x))
    assert "kron_kernels.kron_feed_forward.default" in targets


def test_dropout_in_evaluation_is_applied(layer):
    """As in Monte Carlo estimates of uncertainty."""
    layer.output.dropout.train()
    torch.manual_seed(1)
    want = expected(layer, torch.ones(2, 5, 32))
    torch.manual_seed(1)
    torch.testing.assert_close(result(layer, torch.ones(2, 5, 32)), want)


# --- replaced and shared halves


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("training", [False, True])
def test_a_half_that_two_blocks_share(name, training, layer):
    other = copy.deepcopy(layer)
    for p in other.parameters():
        nn.init.normal_(p)
    setattr(layer, name, getattr(other, name))
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(training):
        for either in (layer, other, layer):
            torch.testing.assert_close(result(either, x), expected(either, x))


@pytest.mark.parametrize("name", HALVES)
def test_a_new_half_and_a_wrapped_one(name, calls):
    x, config = torch.randn(2, 5, 32), BertConfig(**ENCODER)
    layer = bert_layer()
    setattr(layer, name, {"intermediate": BertIntermediate, "output": BertOutput}[name](config))
    assert_stepwise(layer.eval(), calls, x)

    class Wrapped(nn.Module):
        def __init__(self, half):
            super().__init__()
            self.inner = half

        def forward(self, *args):
            return 2 * self.inner(*args)

    layer = bert_layer()
    setattr(layer, name, Wrapped(getattr(layer, name)))
    y = layer.attention(x)[0]
    torch.testing.assert_close(result(layer, x), layer.output(layer.intermediate(y), y))


def test_a_factorised_half_of_the_same_class_is_fused(calls):
    layer = bert_layer()
    layer.intermediate = factorised(BertIntermediate(BertConfig(**ENCODER)))
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(result(layer, x), expected(layer, x))
    assert calls == [("kron_feed_forward", "auto")]


def replica_of(module, change):
    """Like nn.parallel.replicate, on one device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child, change))
    for name, p in module._parameters.items():
        setattr(replica, name, None if p is None else change(p))
    return replica


def test_replicas_use_their_own_parameters(layer):
    x = torch.randn(2, 5, 32)
    other = copy.deepcopy(layer)
    for p in other.parameters():
        p.data.mul_(1.5)
    replica = replica_of(layer, lambda p: p * 1.5)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(result(replica, x), result(other, x))
            torch.testing.assert_close(result(layer, x), expected(layer, x))
    result(replica, x).sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "dense" in n)


def test_a_shallow_copy_with_another_half(layer):
    other = copy.copy(layer)
    other._modules = dict(layer._modules)
    other.intermediate = copy.deepcopy(layer.intermediate)
    nn.init.normal_(other.intermediate.dense.b)
    x = torch.randn(2, 5, 32)
    for either in (layer, other):
        torch.testing.assert_close(result(either, x), expected(either, x))
    assert not torch.equal(result(other, x), result(layer, x))


# --- the layers' backends


def test_the_layers_backend_is_passed_on(layer, calls):
    for m in layer.modules():
        if isinstance(m, KroneckerLinear):
            m.backend = "eager"
    with torch.no_grad():
        result(layer, torch.randn(2, 5, 32))
    assert calls == [("kron_qkv", "eager"), ("kron_feed_forward", "eager")]
    block = ffn()
    block.lin1.backend = block.lin2.backend = "eager"
    calls.clear()
    block(torch.randn(2, 5, 32))
    assert calls == [("kron_feed_forward", "eager")]


@pytest.mark.parametrize("path", [INSIDE[0], INSIDE[2], *PROJECTIONS])
def test_layers_with_different_backends_run_separately(path, calls):
    layer = bert_layer()
    layer.get_submodule(path).backend = "triton"  # not available here
    with torch.no_grad(), pytest.raises(ValueError, match="backend='triton' cannot serve"):
        result(layer, torch.randn(2, 5, 32))
    assert ("kron_feed_forward" if "dense" in path else "kron_qkv") not in dict(calls)


# --- outputs that are computed ahead


def test_nothing_is_computed_ahead_by_a_layer_alone():
    attention = bert_layer().attention.self
    h = torch.randn(2, 5, 32)
    with torch.no_grad():
        attention.query(h)
    assert attention.key(h).grad_fn is not None
    for change in (
        lambda: h.mul_(2),
        lambda: attention.key.a.mul_(2),
        lambda: attention.key.a.data.mul_(2),
        lambda: setattr(attention.key.b, "data", torch.randn_like(attention.key.b)),
        lambda: attention.load_state_dict({k: -v for k, v in attention.state_dict().items()}),
    ):
        with torch.no_grad():
            attention.query(h)
            change()
            want = F.linear(h, *attention.key.to_linear().parameters())
            torch.testing.assert_close(attention.key(h), want)


class Attention(nn.Module):
    """An attention that calls a test's function between its projections."""

    def __init__(self, between, width: int = 32):
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.key, self.value = nn.Linear(width, 32), nn.Linear(width, 8)
        self.between = between

    def forward(self, x, other=None):
        q = self.query(x)
        z = x if other is None else other
        with self.between(self, z) or torch.no_grad():
            return q, self.key(z), self.value(z)


def test_a_failed_call_keeps_no_tensor():
    def fail(attention, x):
        raise ValueError("between")

    attention, x = factorised(Attention(fail)), torch.randn(2, 5, 32)
    kept = weakref.ref(x)
    with torch.no_grad(), pytest.raises(ValueError, match="between"):
        attention(x)
    del x
    assert kept() is None


def test_changes_between_the_projections_count():
    def write(attention, x):
        x.mul_(2)

    def differentiate(attention, x):
        return torch.enable_grad()

    attention = factorised(Attention(write))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = attention.query(x), attention.key(2 * x), attention.value(2 * x)
        for y, z in zip(attention(x), want, strict=True):
            torch.testing.assert_close(y, z)
    attention.between = differentiate
    with torch.no_grad():
        assert factorised(Attention(differentiate))(x)[1].requires_grad


@pytest.mark.parametrize("width", [32, 8])
def test_keys_of_another_input_are_computed_from_it(width, calls):
    attention = factorised(Attention(lambda *_: None, width))
    x, z = torch.randn(2, 5, 32), torch.randn(2, 5, width)
    with torch.inference_mode():
        for _ in range(3):
            q, k, v = attention(x, z)
            torch.testing.assert_close(q, F.linear(x, *attention.query.to_linear().parameters()))
            torch.testing.assert_close(k, F.linear(z, *attention.key.to_linear().parameters()))
            torch.testing.assert_close(v, F.linear(z, *attention.value.to_linear().parameters()))
    assert len(calls) <= 1, "computed in vain at most once"


def test_two_threads_in_one_attention(calls):
    """Both compute queries before either computes keys."""
    barrier = threading.Barrier(2, timeout=30)

    def wait(attention, x):
        barrier.wait()

    attention = factorised(Attention(wait))
    inputs, outputs = torch.randn(2, 3, 5, 32).unbind(), {}

    def run(i):
        with torch.no_grad():
            outputs[i] = attention(inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        for y, m in zip(outputs[i], attention.children(), strict=True):
            torch.testing.assert_close(y, F.linear(x, *m.to_linear().parameters()))
    assert len(calls) == 2


# --- other forwards


class Between(BertLayer):
    """Something between the halves."""

    def feed_forward_chunk(self, attention_output):
        hidden = torch.tanh(self.intermediate(attention_output))
        return self.output(hidden, attention_output)


class Twice(BertLayer):
    def feed_forward_chunk(self, x):
        return self.output(self.intermediate(x), self.output(self.intermediate(x), x))


class Leaking(BertLayer):
    def feed_forward_chunk(self, x):
        hidden = self.intermediate(x)
        self.seen = hidden
        return self.output(hidden, x)


class Unscaled(BertIntermediate):
    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x) * 2)


@pytest.mark.parametrize("cls", [Between, Twice, Leaking])
def test_a_layer_with_another_forward_is_not_fused(cls, calls):
    layer, x = bert_layer(cls), torch.randn(2, 5, 32)
    torch.testing.assert_close(
        layer(x), cls.feed_forward_chunk(layer, layer.attention(x)[0]), rtol=0, atol=0
    )
    assert not calls


def test_a_forward_that_changes_later_is_not_fused(calls, monkeypatch):
    layer, x = bert_layer(), torch.randn(2, 5, 32)
    want = Between.feed_forward_chunk(layer, layer.attention(x)[0])
    for target in (layer, BertLayer):
        with monkeypatch.context() as patch:
            chunk = Between.feed_forward_chunk
            patch.setattr(
                target, "feed_forward_chunk", chunk.__get__(layer) if target is layer else chunk
            )
            torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    layer.intermediate.__class__ = Unscaled
    torch.testing.assert_close(
        layer(x), layer.feed_forward_chunk(layer.attention(x)[0]), rtol=0, atol=0
    )
    assert not calls
    block = ffn()
    block.ff_chunk = lambda x: x + 1
    assert torch.equal(block(x), x + 1) and not calls


ODD = {
    "MobileBERT, whose values are wider than its keys": MobileBertModel(
        MobileBertConfig(**ENCODER, embedding_size=32, intra_bottleneck_size=16)
    ),
    "I-BERT, whose layers take a scale besides": IBertModel(IBertConfig(**ENCODER)),
    "X-MOD, whose halves take a language besides": XmodModel(
        XmodConfig(**ENCODER, languages=["en"], default_language="en")
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_architectures_with_other_blocks(name):
    model = ODD[name].eval()
    layout = layout_of(model)
    factors = {
        path: {"a_shape": [rows // 4, columns // 4], "rank": 2}
        for path, (rows, columns) in layout.sizes.items()
        if path != layout.table and "adapter" not in path
    }
    student = compress(model, factors)
    ids = torch.randint(5, 60, (2, 9))
    want = decompress(student)(ids)[0]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(student(ids)[0], want.detach(), rtol=1e-4, atol=1e-4)


# --- copies and pickles


def kinds(model) -> list[type]:
    return [type(m) for m in model.modules()]


@each_architecture
def test_copies_and_pickles_are_fused_and_independent(name):
    student = compress(teacher(AutoModel._model_mapping[type(CONFIGS[name])], name))
    inputs = batch(student)
    want = outputs(student, inputs)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copies = [loaded, copy.deepcopy(student)]
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    for other in copies:
        assert torch.equal(outputs(other, inputs), want)
        assert kinds(other) == kinds(student)
        assert type(other.config) is type(student.config)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_layer_and_a_block_can_be_pickled_alone(protocol, layer, calls):
    x = torch.randn(2, 5, 32)
    for module in (layer, ffn()):
        other = pickle.loads(pickle.dumps(module, protocol))
        assert kinds(other) == kinds(module)
        torch.testing.assert_close(result(other, x), result(module, x), rtol=0, atol=0)
    assert len(calls) == 4


def test_a_class_derived_from_a_fused_one_is_kept(layer):
    """FSDP2 makes such classes."""
    layer.__class__ = derived = type("Sharded", (type(layer),), {})
    assert type(copy.deepcopy(layer)) is derived
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(result(layer, x), expected(layer, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # from transformers' own masks
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_torch_jit_trace_records_a_student():
    student = compress(BertModel(BertConfig(**ENCODER)).eval(), "kronecker-bert-8")
    student.requires_grad_(False)
    student.config.return_dict = False
    ids = torch.randint(5, 60, (2, 7))
    with torch.no_grad():
        traced = torch.jit.trace(student, (ids,))  # compares two recordings
        for tokens in (7, 3):
            torch.testing.assert_close(traced(ids[:, :tokens])[0], student(ids[:, :tokens])[0])
