"""The public functions: checks, a route from ``dispatch``, and a return for each route."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kron_kernels import autograd, dispatch, int8_products, ops
from kron_kernels.backends import COMPUTING, eager, native
from kron_kernels.checks import (
    Activation,
    Layer,
    Shaped,
    check_activation,
    check_layer,
    check_product,
    check_tensor,
    check_tensors,
    layer_of_three,
    named,
)
from kron_kernels.dispatch import BackendName
from kron_kernels.int8 import Int8Factor, are_floating
from kron_kernels.repeats import Repeats, call_key
from kron_kernels.shapes import check_integer

_matmuls, _qkvs, _blocks = Repeats(), Repeats(), Repeats()


def kron_matmul(
    x: Tensor,
    *factors: Tensor | Int8Factor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``y = act(x Wᵀ + bias) + residual`` with ``W = Σ_k A_k ⊗ B_k ⊗ …``, without forming W.

    For two factors, read a row of ``x`` as a row-major ``(n1, n2)`` matrix X: the row of y is
    ``Σ_k A_k X B_kᵀ``, read as row-major ``(m1, m2)``. (Papers that write ``vec(B X Aᵀ)`` stack
    columns; it is the same product.)

    Differentiable any number of times, in forward mode as well. Works under ``torch.vmap``,
    ``torch.compile(fullgraph=True)`` and ``torch.export``, on meta tensors, and under autocast,
    where it casts as ``F.linear`` does and leaves ``residual`` to PyTorch's type promotion.

    Args:
        x: Input of shape ``(…, n)``, ``n`` the product of the factors' columns. Real or complex
            floating point of 16 bits or more, any strides, any number of tokens including none.
        *factors: One or more, each ``(m_i, n_i)``, or ``(r, m_i, n_i)`` for a sum of r products
            (Kronecker rank r). Of x's dtype and device. The leading dimension is summed over; for
            a batch of factors, ``(batch, m_i, n_i)`` with a result for each, use
            ``torch.vmap(kron_matmul)``. One or two may be ``Int8Factor``, without gradients.
        bias: Shape ``(m,)``, ``m`` the product of the factors' rows.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: Shape ``(…, m)``, on x's device, added last.
        backend: ``"eager"`` is PyTorch on any device, ``"native"`` compiled code for CPUs,
            ``"triton"`` and ``"cuda"`` are kernels for GPUs in Triton and in CUDA C++. ``"auto"``
            takes one of the last three if it can serve the call, else eager. ``"native"`` takes up
            to 8 factors, the GPU kernels two. A backend asked for by name is never replaced;
            ``explain_backends`` says which can serve, and why the others cannot.

    Returns:
        Output of shape ``(…, m)``, of x's dtype (promoted with residual's). On a CPU, 16-bit
        inputs are multiplied and summed in float32.

    Raises:
        TypeError: If an operand is not a dense tensor.
        ValueError: If shapes, dtypes or devices do not fit, or the backend cannot serve the call.
    """
    if activation is not None:
        check_activation(activation)
    if not are_floating(factors):
        return int8_products.kron_matmul(x, factors, bias, activation, residual, backend)
    call = call_key((x, *factors, bias, residual), activation, backend)
    if call and (again := _matmuls.get(call)):
        return again(x, *factors, bias, residual)
    operands = [x, *factors, *_given(bias, residual)]
    observed = dispatch.is_observed(operands)
    if observed and not torch.compiler.is_compiling():
        check_tensors(x, factors, bias, residual)
    if dispatch.under_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        lowered = [dispatch.lowered(t, dtype) for t in (x, *factors)]
        with torch.autocast(x.device.type, enabled=False):  # autocast would lower float32 sums too
            return kron_matmul(
                *lowered,
                bias=None if bias is None else dispatch.lowered(bias, dtype),
                activation=activation,
                residual=residual,
                backend=backend,
            )
    checked = check_product(x, factors, bias, activation, residual)
    if residual is not None and residual.dtype != x.dtype:
        y = kron_matmul(x, *factors, bias=bias, activation=activation, backend=backend)
        return y + residual
    way, backend = dispatch.route_matmul(backend, x, checked, operands, observed)
    if way == "plain":
        return eager.plain_matmul(x, checked, bias, activation, residual)
    if way == "direct":
        if call and backend == "native":
            _matmuls.add(call, native.again_matmul(x, checked, bias, activation, residual))
        return COMPUTING[backend].kron_matmul(x, checked, bias, activation, residual)
    if way == "recorded":
        with dispatch.recorded("kron_matmul"):
            return COMPUTING[backend].kron_matmul(x, checked, bias, activation, residual)
    if len(checked) > 2:
        y = autograd.KronMatmulOfMany.apply(x, bias, *checked)
        return eager.epilogue(y, activation, residual)
    a, b = checked
    rows, last = _rows(x, residual)
    if way == "autograd":
        y = eager.epilogue(autograd.kron_matmul(rows, a, b, bias, backend), activation, last)
    else:
        y = ops.kron_matmul(rows, a, b, bias, activation, last, backend)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def kron_qkv(
    x: Tensor, query: Layer, key: Layer, value: Layer, *, backend: BackendName = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Three products of one x, such as an attention's; x is read once.

    Args:
        x: Shape ``(…, n)``.
        query: ``(a, b, bias)``: factors ``(m1, n1)`` and ``(m2, n2)``, or ``(r, …)`` for a sum of r
            products, and a bias ``(m1 * m2,)`` or None.
        key: The same for the second product.
        value: The same for the third product.
        backend: As for ``kron_matmul``.

    Returns:
        The results of three calls of ``kron_matmul``, with the same gradients and transforms.

    Raises:
        TypeError: As ``kron_matmul``.
        ValueError: As ``kron_matmul``, naming the layer.
    """
    layers = {"query": query, "key": key, "value": value}
    if any(map(_has_int8, layers.values())):
        q, k, v = int8_products.kron_qkv(x, layers, backend)
        return q, k, v
    call = call_key(_flat(x, layers), None, backend)
    if call and (again := _qkvs.get(call)):
        q, k, v = again(x, query, key, value)
        return q, k, v
    operands, observed = _operands(x, layers)
    way = "products"
    if not dispatch.in_products(x):
        checked = [check_layer(name, x, layer) for name, layer in layers.items()]
        way, backend = dispatch.route_qkv(backend, x, checked, operands, observed)
    if way == "products":
        ys = [
            named(name, kron_matmul, x, a, b, bias=bias, backend=backend)
            for name, (a, b, bias) in layers.items()
        ]
    elif way == "direct":
        if call and backend == "native":
            _qkvs.add(call, native.again_qkv(x, checked))
        ys = COMPUTING[backend].kron_qkv(x, checked)
    else:
        rows, _ = _rows(x)
        a, b, biases = zip(*checked, strict=True)
        ys = ops.kron_qkv(rows, a, b, biases, backend)
        if x.ndim != 2:
            ys = [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
    q, k, v = ys
    return q, k, v


def kron_feed_forward(
    x: Tensor,
    up: Layer,
    down: Layer,
    *,
    activation: Activation | None = "gelu",
    residual: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """``down(act(up(x))) + residual``: a feed-forward block that never stores its hidden vector.

    The compiled backends work on a block of tokens at a time. If ``up = (k x l) ⊗ B`` is cheaper
    contracted from the right and ``down = (l' x k) ⊗ B'`` from the left, as in KroneckerBERT, an
    entry of the hidden vector exists in a register only (native: in the first-level cache at most),
    also in the backward, which recomputes it. Otherwise it is in memory: native keeps a block of
    it, the others all of it, and every backend all of it while gradients wait for their backward.

    Args:
        x: Shape ``(…, n)``.
        up: ``(a, b, bias)``: factors ``(m1, n1)`` and ``(m2, n2)``, or ``(r, …)`` for a sum of r
            products, and a bias ``(m1 * m2,)`` or None.
        down: The same for the second layer, whose inputs are up's outputs.
        activation: Between the two, as for ``kron_matmul``; with None the block is two products.
        residual: Of the output's shape, added last.
        backend: As for ``kron_matmul``.

    Returns:
        Shape ``(…, m)``, of x's dtype (promoted with residual's).

    Raises:
        TypeError: As ``kron_matmul``.
        ValueError: As ``kron_matmul``, naming the layer, or if ``down`` does not take as many
            features as ``up`` gives.
    """
    if activation is not None:
        check_activation(activation)
    layers = {"up": up, "down": down}
    if _has_int8(up) or _has_int8(down):
        return int8_products.kron_feed_forward(x, up, down, activation, residual, backend)
    call = call_key((*_flat(x, layers), residual), activation, backend)
    if call and (again := _blocks.get(call)):
        return again(x, up, down, residual)
    operands, observed = _operands(x, layers, residual)
    way = "products"
    if not dispatch.in_products(x):
        up = check_layer("up", x, up, activation)
        hidden = Shaped((*x.shape[:-1], up[0].shape[1] * up[1].shape[1]), x.dtype, x.device)
        down = check_layer("down", hidden, down, residual=residual)
        if residual is not None and residual.dtype != x.dtype:
            return kron_feed_forward(x, up, down, activation=activation, backend=backend) + residual
        way, backend = dispatch.route_feed_forward(
            backend, x, up, activation, down, operands, observed
        )
    if way == "products":
        a, b, bias = up
        z = named(
            "up", kron_matmul, x, a, b, bias=bias, activation=activation, backend=backend
        )  # (…, hidden)
        a, b, bias = down
        return named("down", kron_matmul, z, a, b, bias=bias, residual=residual, backend=backend)
    assert activation is not None  # without one the route is products
    if way == "direct":
        if call and backend == "native":
            _blocks.add(call, native.again_feed_forward(x, up, activation, down, residual))
        return COMPUTING[backend].kron_feed_forward(x, up, activation, down, residual)
    rows, last = _rows(x, residual)
    if way == "autograd":
        y = autograd.FeedForward.apply(rows, *up, activation, *down, backend)
        y = eager.epilogue(y, None, last)
    else:
        y = ops.kron_feed_forward(rows, *up, activation, *down, last, backend)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def kron_embedding(ids: Tensor, a: Tensor, b: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows ``ids (…)`` of the table of ``a (r, rows, d / n)`` and ``b (r, 1, n)``: ``(…, d)``.

    An id outside the table gives NaN on a GPU, where one kernel does the lookup, and raises
    elsewhere.
    """
    if dispatch.route_embedding(a, b) != dispatch.PLAIN:
        return autograd.Embedding.apply(ids, a, b, padding_idx)
    terms = [
        (F.embedding(ids, table, padding_idx)[..., None] * row).flatten(-2)  # (…, d / n, n)
        for table, row in zip(a, b, strict=True)
    ]
    return sum(terms[1:], terms[0])


def kron_cross_entropy(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    tokens: int = 1024,
) -> Tensor:
    """Mean cross-entropy of the logits ``h Eᵀ + bias``, which exist for a few tokens at a time.

    Equal to ``F.cross_entropy`` of all logits at once, in float32 for 16-bit inputs. The backward
    computes a chunk's logits again: for 30,522 rows and 32 x 128 tokens, 500 MB of float32 become
    125 MB, and so do their gradient and softmax.

    Args:
        h: Hidden states ``(…, d)``.
        a: The table's left factor, ``(r, rows, d / n)``.
        b: The right one, ``(r, 1, n)``.
        labels: Rows, ``(…)``; those of ``ignore_index`` do not count.
        bias: Shape ``(rows,)``.
        ignore_index: Marks tokens without a label.
        tokens: Tokens in a chunk.

    Raises:
        ValueError: If labels and hidden states differ in number, or ``tokens`` is not a positive
            integer.
    """
    if h.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have one entry for each hidden state, shape {tuple(h.shape[:-1])}, "
            f"got {tuple(labels.shape)}."
        )
    tokens = check_integer("tokens", tokens)

    def loss(h: Tensor, labels: Tensor) -> Tensor:
        logits = kron_matmul(h, a, b, bias=bias)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")

    parts = zip(h.flatten(0, -2).split(tokens), labels.flatten().split(tokens), strict=True)
    total = sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)
    return total / (labels != ignore_index).sum()


def _flat(x: Tensor, layers: dict[str, Layer]) -> list[Tensor | None]:
    """x and ``a, b, bias`` of each layer, which must be three values."""
    operands: list[Tensor | None] = [x]
    for name, layer in layers.items():
        operands += layer_of_three(name, layer)
    return operands


def _operands(
    x: Tensor, layers: dict[str, Layer], residual: Tensor | None = None
) -> tuple[list[Tensor], bool]:
    """All tensors of a fused call, which must be dense, and whether it is observed."""
    operands = [x, *_given(residual)]
    for a, b, bias in layers.values():
        operands += a, b, *_given(bias)
    observed = dispatch.is_observed(operands)
    if observed and not torch.compiler.is_compiling():
        for name, (a, b, bias) in layers.items():
            named(name, check_tensors, x, (a, b), bias)
        if residual is not None:
            check_tensor("residual", residual)
    return operands, observed


def _has_int8(layer: Layer) -> bool:
    return isinstance(layer, tuple | list) and not are_floating(tuple(layer))


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _rows(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``(…, n)`` and ``(…, m)`` as ``(T, n)`` and ``(T, m)``."""
    if x.ndim == 2:
        return x, residual
    last = None if residual is None else residual.reshape(-1, residual.shape[-1])
    return x.reshape(-1, x.shape[-1]), last
