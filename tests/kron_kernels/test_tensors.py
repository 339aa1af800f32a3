"""Operands that are not plain tensors: lazy views, subclasses, freed storage; and observers."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kron_kernels import (
    KroneckerEmbedding,
    KroneckerFeedForward,
    KroneckerLinear,
    dispatch,
    explain_backends,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
)
from kron_kernels.backends import native
from kron_kernels.testing import assert_close

BACKENDS = ["eager", *(["native"] if native._native else [])]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


MATMUL = {"x": draw(5, 12), "a": draw(2, 4, 3), "b": draw(2, 2, 4), "bias": draw(8)}
MATMUL["residual"] = draw(5, 8)
# up and down meet entry by entry, so that the fused kernels and their backward run.
BLOCK = {"x": draw(5, 12), "a1": draw(1, 4, 2), "b1": draw(1, 6, 6), "bias1": draw(24)}
BLOCK |= {"a2": draw(1, 2, 4), "b2": draw(1, 6, 6), "bias2": draw(12), "residual": draw(5, 12)}
QKV = {"x": draw(5, 12)} | {
    f"{name}{i}": draw(*shape)
    for i in range(3)
    for name, shape in (("a", (1, 4, 3)), ("b", (1, 2, 4)), ("bias", (8,)))
}


def matmul(x, a, b, bias, residual, **options):
    return kron_matmul(x, a, b, bias=bias, activation="relu", residual=residual, **options)


def matmul_of_three(x, a, b, bias, residual, **options):
    a = a[:1], torch.ones(1, 1, 1)
    return kron_matmul(x, *a, b[:1], bias=bias, residual=residual, **options)


def block(x, a1, b1, bias1, a2, b2, bias2, residual, **options):
    up, down = (a1, b1, bias1), (a2, b2, bias2)
    return kron_feed_forward(x, up, down, residual=residual, **options)


def qkv(x, *layers, **options):
    return torch.cat(kron_qkv(x, *(layers[i : i + 3] for i in (0, 3, 6)), **options), -1)


CALLS = {
    "matmul": (matmul, MATMUL),
    "three factors": (matmul_of_three, MATMUL),
    "block": (block, BLOCK),
    "qkv": (qkv, QKV),
}
ARGUMENTS = [(call, name) for call, (_, operands) in CALLS.items() for name in operands]


class Subclass(torch.Tensor):
    pass


def negated(t):
    """The same numbers, of which memory holds the negatives."""
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    return lazy


STRANGE = {
    "negated": negated,
    "negated, contiguous": lambda t: torch._neg_view(-t),
    "subclass": lambda t: t.clone().as_subclass(Subclass),
    "wrapper": lambda t: TwoTensor(t, t.clone()),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "inference": lambda t: torch.inference_mode()(lambda: t.clone())(),
    "buffer": lambda t: nn.Buffer(t.clone()),
}


def plain(t: torch.Tensor) -> torch.Tensor:
    if isinstance(t, TwoTensor):
        assert torch.equal(t.a, t.b)
        t = t.a
    return t.as_subclass(torch.Tensor).resolve_neg() if isinstance(t, Subclass) else t


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("call, name", ARGUMENTS)
def test_an_operand_of_any_kind_gives_the_result_of_its_numbers(call, name, kind, backend):
    function, operands = CALLS[call]
    strange = STRANGE[kind](operands[name])
    numbers = operands | ({name: torch.zeros_like(operands[name])} if "zeros" in kind else {})
    expected = function(*numbers.values(), backend=backend)
    given = list((operands | {name: strange}).values())
    if kind == "wrapper":  # operations take wrappers among themselves
        given = [TwoTensor(t, t.clone()) for t in operands.values()]
    with torch.no_grad():
        torch.testing.assert_close(plain(function(*given, backend=backend)), expected)
    if kind.startswith(("negated", "subclass")):
        wanted = [t.clone().requires_grad_() for t in operands.values()]
        function(*wanted, backend=backend).square().sum().backward()
        index = list(operands).index(name)
        leaf = operands[name].clone().requires_grad_()
        given = [t.clone().requires_grad_() for t in operands.values()]
        given[index] = STRANGE[kind](leaf)
        plain(function(*given, backend=backend)).square().sum().backward()
        torch.testing.assert_close(leaf.grad, wanted[index].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", range(5))
def test_a_lazily_conjugated_operand(position, backend):
    draws = [torch.complex(t, t.flip(-1)) for t in MATMUL.values()]
    given = list(draws)
    given[position] = torch.conj_physical(draws[position]).conj()
    assert given[position].is_conj()
    *factors, bias, residual = given
    *plain_factors, plain_bias, plain_residual = draws
    if backend != "eager":  # no compiled kernel is complex
        with pytest.raises(ValueError, match="cannot serve"):
            kron_matmul(*factors, bias=bias, residual=residual, backend=backend)
        return
    y = kron_matmul(*factors, bias=bias, residual=residual, backend=backend)
    expected = kron_matmul(*plain_factors, bias=plain_bias, residual=plain_residual)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("call, name", ARGUMENTS)
def test_an_operand_whose_storage_was_freed_is_refused(call, name, offset):
    if not native._native:
        pytest.skip("PyTorch's own operators read missing memory")
    function, operands = CALLS[call]
    if call == "three factors" and name in "ab":
        return  # torch itself slices no freed tensor
    freed = torch.cat([torch.zeros(offset), operands[name].flatten()])[offset:].view_as(
        operands[name]
    )
    freed.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ValueError, match="has no memory: its storage was freed"):
        function(*(operands | {name: freed}).values(), backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call, name", ARGUMENTS)
def test_an_operand_on_another_device_is_named(call, name, backend):
    function, operands = CALLS[call]
    operands = operands | {name: operands[name].to("meta")}
    with pytest.raises(ValueError, match=r"is on \w+ but x is on \w+; move one"):
        function(*operands.values(), backend="auto" if name == "x" else backend)


@pytest.mark.parametrize("call, name", ARGUMENTS)
def test_fake_tensors_among_real_ones_are_found(call, name):
    function, operands = CALLS[call]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(operands[name])
    with pytest.raises(Exception, match=r"[Ff]ake"):
        function(*(operands | {name: fake}).values())


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "must be a torch.Tensor, got NoneType."),
        ([1.0, 2.0], "must be a torch.Tensor, got list; use torch.as_tensor."),
        (3.5, "must be a torch.Tensor, got float"),
        (np.ones((4, 3), np.float32), "must be a torch.Tensor, got numpy.ndarray; use"),
        (torch.eye(4, 12).to_sparse(), r"has layout torch.sparse_coo, .* use .to_dense\(\)."),
        (torch.eye(4, 12).to_sparse_csr(), r"has layout torch.sparse_csr, .* use .to_dense\(\)."),
        (torch.eye(4, 12).to_mkldnn(), r"has layout torch._mkldnn, .* use .to_dense\(\)."),
        (
            torch.nested.nested_tensor([draw(2, 12), draw(3, 12)], layout=torch.jagged),
            "is a nested tensor, .* its .values()",
        ),
        (
            torch.nested.nested_tensor([draw(2, 12), draw(3, 12)], layout=torch.strided),
            "is a nested tensor, .* its .values()",
        ),
    ],
    ids=lambda v: getattr(type(v), "__name__", None) if not isinstance(v, str) else "",
)
@pytest.mark.parametrize("call, name", ARGUMENTS)
def test_other_than_dense_tensors_are_refused_by_name(call, name, value, message):
    function, operands = CALLS[call]
    if value is None and ("bias" in name or name == "residual"):
        return
    argument = {"x": "x", "a": "factor 0", "b": "factor 1"}.get(name.rstrip("0123"), "")
    if call == "three factors":
        if name in "ab":  # sliced by this test before it is passed on
            return
        argument = argument.replace("factor 1", "factor 2")
    with pytest.raises(TypeError, match=f"{argument or name.rstrip('0123')} {message}") as refusal:
        function(*(operands | {name: value}).values())
    if call in ("block", "qkv") and name[-1].isdigit():
        layers = {"block": ("", "up", "down"), "qkv": ("query", "key", "value")}[call]
        assert str(refusal.value).startswith(f"{layers[int(name[-1])]}: ")


def test_the_explanation_refuses_the_operands_that_kron_matmul_refuses():
    with pytest.raises(TypeError, match=r"factor 0 must be a torch\.Tensor, got list"):
        explain_backends(MATMUL["x"], [1.0])


@pytest.mark.parametrize("name, layer", [("up", 0), ("down", 1)])
@pytest.mark.parametrize("grads", [False, True])
def test_a_wrong_shape_in_a_block_names_its_layer(name, layer, grads):
    up, down = (tuple(BLOCK.values())[i : i + 3] for i in (1, 4))
    layers = [up, down]
    a, b, bias = layers[layer]
    layers[layer] = a, b, bias[:-1]
    x = BLOCK["x"].clone().requires_grad_(grads)
    with pytest.raises(ValueError, match=f"^{name}: bias must have shape"):
        kron_feed_forward(x, *layers)
    for wrong, kind in (((a, b), "tuple of 2"), (None, "NoneType"), (a, "Tensor"), (3, "int")):
        layers[layer] = wrong
        with pytest.raises(TypeError, match=rf"^{name} must be \(a, b, bias\), got a {kind}\."):
            kron_feed_forward(x, *layers)
    layers[layer] = a, b, bias
    with pytest.raises(TypeError, match=r"^residual must be a torch\.Tensor, got list"):
        kron_feed_forward(x, *layers, residual=[1])


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_without_an_activation(backend, grads, profiled):
    given = [t.clone().requires_grad_(grads) for t in BLOCK.values()]
    x, *layers, residual = given
    up, down = layers[:3], layers[3:]
    with torch.profiler.profile() if profiled else nullcontext():
        y = kron_feed_forward(x, up, down, activation=None, residual=residual, backend=backend)
    hidden = kron_matmul(x, *up[:2], bias=up[2])
    torch.testing.assert_close(y, kron_matmul(hidden, *down[:2], bias=down[2], residual=residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_whose_sides_are_long_but_whose_products_are_short(backend):
    x, a, b = draw(1, 10**6), draw(1, 10**6 // 2, 2), draw(1, 1, 10**6 // 2)
    with torch.no_grad():
        y = kron_matmul(x, a, b, backend=backend)
    assert_close("y", y, kron_matmul(x.double(), a.double(), b.double()), terms=10**6)


def test_none_is_refused_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        for x, a in ((None, MATMUL["a"]), (MATMUL["x"], None)):
            with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got NoneType"):
                kron_matmul(x, a, MATMUL["b"])


def test_autocast_is_found_on_a_device_that_the_quick_check_leaves_out():
    x = SimpleNamespace(is_cpu=False, device=torch.device("mps"))
    torch.set_autocast_enabled("mps", True)
    try:
        assert not torch._C._is_any_autocast_enabled()
        assert dispatch.under_autocast(x)
        assert not dispatch.under_autocast(torch.ones(1))
    finally:
        torch.set_autocast_enabled("mps", False)
    assert not dispatch.under_autocast(x)


# --- observers see every call


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", ["matmul", "block", "qkv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dispatch_mode_sees_a_call_without_gradients(call, backend):
    function, operands = CALLS[call]
    with torch.no_grad(), Log() as log:
        function(*operands.values(), backend=backend)
    assert log.seen


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grads", [False, True])
def test_a_profiler_sees_a_call_of_compiled_kernels(call, grads):
    function, operands = CALLS[call]
    given = [t.clone().requires_grad_(grads) for t in operands.values()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = function(*given, backend="native" if len(BACKENDS) > 1 and not grads else "auto")
    names = {event.key for event in profile.key_averages()}
    if len(BACKENDS) > 1:
        assert any(name.startswith("kron_kernels::kron_") for name in names), names
    torch.testing.assert_close(y.detach(), function(*operands.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_torch_jit_trace_records_products(call, grads, backend):
    function, operands = CALLS[call]
    given = tuple(t.clone().requires_grad_(grads) for t in operands.values())
    traced = torch.jit.trace(lambda *args: function(*args, backend=backend), given)
    for tokens in (5, 1, 9):
        others = [
            t[:1].repeat(tokens, 1) if name in ("x", "residual") else t
            for name, t in operands.items()
        ]
        torch.testing.assert_close(traced(*others), function(*others))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_torch_jit_trace_under_autocast(call):
    function, operands = CALLS[call]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = function(*operands.values(), backend="eager")
        given = dict(operands, x=operands["x"].bfloat16())  # as a product before it leaves it
        traced = torch.jit.trace(
            lambda *args: function(*args, backend="eager"), tuple(given.values()), check_trace=False
        )
    torch.testing.assert_close(traced(*given.values()), expected)  # the casts are recorded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_the_older_exporter_to_onnx_writes_products_of_its_input():
    onnxruntime = pytest.importorskip("onnxruntime")
    up, down = KroneckerLinear(12, 24, (4, 2)), KroneckerLinear(24, 12, (2, 4), rank=2)
    model = KroneckerFeedForward(up, down).requires_grad_(False).eval()
    file = io.BytesIO()
    torch.onnx.export(
        model, (draw(5, 12),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "t"}}
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    x = draw(3, 12)
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grads", [False, True])
def test_parameters_that_are_sharded_work_in_their_module_and_nowhere_else(process_group, grads):
    table = KroneckerEmbedding(30, 24, 4)
    layer = KroneckerLinear(24, 12, (4, 6))
    ids, x = torch.arange(5), draw(5, 24)
    rows, y = table(ids), layer(x)
    for module in (table, layer):
        fully_shard(module, mesh=process_group)
    register_fsdp_forward_method(table, "decode")
    with torch.set_grad_enabled(grads):
        torch.testing.assert_close(table(ids), rows)
        torch.testing.assert_close(table.decode(rows.detach()), table.decode(rows).detach())
        torch.testing.assert_close(layer(x), y)
        table.reshard(), layer.reshard()
        for call in (
            lambda: kron_matmul(x, layer.a, layer.b),
            lambda: kron_matmul(x, layer.a.to_local(), layer.b.to_local(), bias=layer.bias),
            lambda: KroneckerEmbedding.decode(table, x),
            lambda: kron_qkv(x, *[(layer.a, layer.b, None)] * 3),
        ):
            with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
                call()


@pytest.mark.parametrize("grads", [False, True])
def test_a_block_whose_layers_are_sharded(process_group, grads):
    block = KroneckerFeedForward(KroneckerLinear(12, 24, (4, 2)), KroneckerLinear(24, 12, (2, 4)))
    x = draw(5, 12)
    y = block(x)
    for layer in (block.up, block.down):
        fully_shard(layer, mesh=process_group)
    with torch.set_grad_enabled(grads):
        torch.testing.assert_close(block(x), y)
        torch.testing.assert_close(block(x, x), y + x)


def test_a_batch_of_factors_is_refused_with_the_remedy():
    x, a, b = draw(5, 2, 12), draw(5, 1, 4, 3), draw(5, 1, 2, 4)
    with pytest.raises(
        ValueError, match=r"got shape \(5, 1, 4, 3\); .* torch\.vmap\(kron_matmul\)"
    ):
        kron_matmul(x, a, b)
    y = torch.vmap(kron_matmul)(x, a, b)
    torch.testing.assert_close(y, torch.stack([kron_matmul(*t) for t in zip(x, a, b, strict=True)]))
