"""backend="auto" on a GPU whose kernels fail or are wrong, in the simulator."""

import warnings

import pytest
import torch
from machines import TRITON, ready

from kron_kernels import (
    KroneckerEmbedding,
    dispatch,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.backends import COMPUTING, EMBEDDING, guarded
from kron_kernels.backends.guarded import Guarded
from kron_kernels.backends.triton import launch
from kron_kernels.testing.cases import FEED_FORWARDS, SHAPES, draw
from kron_kernels.testing.checks import close, oracle

X, A, B = draw(SHAPES[2], 5, torch.float32)
UP, DOWN = FEED_FORWARDS[0]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """CPU tensors count as a GPU's, and "auto" takes Triton's kernels."""
    monkeypatch.setattr(dispatch, "_order", lambda *_: ("triton",))
    fresh = Guarded("triton", launch, replace=True)
    monkeypatch.setitem(COMPUTING, "triton or eager", fresh)
    for attribute in ("failed", "checked", "warned"):
        monkeypatch.setattr(EMBEDDING, attribute, set())
    with ready(TRITON):
        yield fresh


def failing(*args, **kwargs):
    raise RuntimeError("PassManager::run failed")


def layer(s):
    _, a, b = draw(s, 1, torch.float32)
    return a, b, torch.randn(s.out_features)


def plant(monkeypatch, fault):
    """Every function of the backend fails with this."""
    for name in ("kron_matmul", "kron_matmul_backward", "kron_qkv", "kron_embedding"):
        monkeypatch.setattr(launch, name, fault)
    for name in ("kron_feed_forward", "kron_feed_forward_backward"):
        monkeypatch.setattr(launch, name, fault)


CALLS = {
    "matmul": lambda backend: kron_matmul(X, A, B, activation="gelu", backend=backend),
    "operator": lambda backend: kron_matmul(X[None], A, B, backend=backend),
    "qkv": lambda backend: torch.stack(kron_qkv(X, *[(A, B, None)] * 3, backend=backend)),
    "block": lambda backend: kron_feed_forward(X[:, : UP.in_features], *BLOCK, backend=backend),
}
BLOCK = [layer(UP), layer(DOWN)]


@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_that_fails_is_replaced_once_with_a_warning(call, monkeypatch):
    expected = CALLS[call]("eager")
    plant(monkeypatch, failing)
    with pytest.warns(UserWarning, match="PassManager.*open an issue.*kron_kernels.doctor"):
        close("y", CALLS[call]("auto"), expected, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close("again", CALLS[call]("auto"), expected, 1e-6)
    with pytest.raises(RuntimeError, match="PassManager"):  # asked for by name, never replaced
        CALLS[call]("triton")


def test_only_calls_like_the_failing_one_are_replaced(on_triton, monkeypatch):
    right, calls = launch.kron_matmul, []

    def fails_in_half(x, *rest):
        calls.append(x.dtype)
        return failing() if x.dtype == torch.float16 else right(x, *rest)

    monkeypatch.setattr(launch, "kron_matmul", fails_in_half)
    halves = [t.half() for t in (X, A, B)]
    with pytest.warns(UserWarning, match="float16"):
        kron_matmul(*halves)
    kron_matmul(*halves)
    close("y", kron_matmul(X, A, B), oracle(X, A, B), 1e-5)
    assert calls == [torch.float16, torch.float32]


@pytest.mark.parametrize("kind", ["matmul", "block"])
def test_gradients_by_kernels_that_fail(kind, monkeypatch):
    def gradients(backend):
        leaves = [t.clone().requires_grad_() for t in (X[:, : UP.in_features], *BLOCK[0])]
        x, a, b, bias = leaves
        if kind == "matmul":
            y = kron_matmul(x, a, b, bias=bias, backend=backend)
        else:
            y = kron_feed_forward(x, (a, b, bias), BLOCK[1], backend=backend)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = gradients("eager")
    plant(monkeypatch, failing)
    with pytest.warns(UserWarning, match="PassManager") as caught:
        got = gradients("auto")
    forward, backward = (str(w.message).split()[0] for w in caught)
    assert backward == f"{forward}_backward"
    for i, (g, other) in enumerate(zip(got, expected, strict=True)):
        close(f"gradient {i}", g, other, 1e-5)


def test_a_lookup_by_a_kernel_that_fails(monkeypatch):
    table = KroneckerEmbedding(5, 24, 8)
    ids = torch.tensor([[4, 0], [-1, 5]])
    plant(monkeypatch, failing)
    with torch.no_grad(), pytest.warns(UserWarning, match="kron_embedding"):
        out = table(ids)
    dense = reference.materialize(table.a, table.b).detach()
    close("rows", out[0], dense[ids[0]], 1e-6)
    assert out[1].isnan().all()  # as by the kernel


def test_memory_and_a_lost_gpu_are_not_hidden(on_triton, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    plant(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        kron_matmul(X, A, B)
    plant(monkeypatch, failing)
    monkeypatch.setattr(guarded, "_in_order", lambda x: False)
    with pytest.raises(RuntimeError, match="PassManager"):
        kron_matmul(X, A, B)
    assert not on_triton.failed


# --- KRON_KERNELS_CHECK=1


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setattr(guarded, "CHECK", True)
    monkeypatch.setitem(COMPUTING, "triton", Guarded("triton", launch, replace=False))


@pytest.mark.usefixtures("checking")
def test_right_kernels_pass_the_check():
    x = X.clone().requires_grad_()
    kron_matmul(x, A, B, activation="gelu").sum().backward()
    block = [tuple(t.clone().requires_grad_() for t in layer) for layer in BLOCK]
    kron_feed_forward(x[:, : UP.in_features], *block).sum().backward()
    with torch.no_grad():
        kron_qkv(X, *[(A, B, None)] * 3)
        kron_matmul(*(t.half() for t in (X, A, B)), backend="triton")
        KroneckerEmbedding(5, 24, 8)(torch.tensor([4, 0]))


@pytest.mark.usefixtures("checking")
def test_a_wrong_number_is_never_silent(monkeypatch):
    right = launch.kron_matmul

    def wrong(*args):
        y = right(*args)
        y[1, 7] += 1
        return y

    monkeypatch.setattr(launch, "kron_matmul", wrong)
    with pytest.raises(RuntimeError, match=r"wrong here: result 0.*worst at \(1, 7\).*issue"):
        kron_matmul(X, A, B, backend="triton")
    expected = oracle(X, A, B)
    with pytest.warns(UserWarning, match=r"wrong here: .*worst at \(1, 7\)"):
        close("y", kron_matmul(X, A, B), expected, 1e-5)
    close("again", kron_matmul(X, A, B), expected, 1e-5)
