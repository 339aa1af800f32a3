"""What only the Triton kernels do: second-order gradients, embeddings, and their memory traffic.

test_engines.py has the checks of every engine.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from machines import needs_triton
from torch.func import vmap
from turns import in_turns

from kron_kernels import (
    KroneckerEmbedding,
    KronShape,
    kron_feed_forward,
    kron_matmul,
    kron_qkv,
    reference,
)
from kron_kernels.testing.cases import FEED_FORWARDS, PAIRS, PRESETS, SHAPES, draw
from kron_kernels.testing.checks import hold, terms

needs_triton()
from simulator import Device  # noqa: E402

from kron_kernels.backends.triton import forward, launch  # noqa: E402

ARCHS = [("triton-80",), ("triton-90",)]
either = pytest.mark.parametrize("gpu", ["triton-80", "triton-90"], indirect=True)


def archs(shapes):
    return pytest.mark.parametrize(("gpu", "s"), in_turns(ARCHS, shapes), indirect=["gpu"])


@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
def test_the_last_rows_of_more_than_32_bits_of_numbers(dtype, monkeypatch):
    """Only the last program runs: untouched memory is never allocated."""
    s = KronShape(64, 1, 64, 2)
    tokens = 2**19 + 3
    x = torch.zeros(tokens, 2, dtype=dtype)
    rows, a, b = draw(s, 3, dtype)
    x[-3:] = rows
    kernel, grids = forward.kron_matmul_kernel, []

    class Last:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[(1, *grid[1:])]

    def last(ptx: str) -> str:
        last = rf"mov.u32 \1, %ctaid.x;\nadd.u32 \1, \1, {grids[0][0] - 1};"
        return re.sub(r"mov\.u32\s+(%r\d+), %ctaid\.x;", last, ptx)

    monkeypatch.setattr(forward, "kron_matmul_kernel", Last())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with Device(80, edit=last):
        y = kron_matmul(x, a, b, backend="triton")
    assert y.numel() > 2**31
    hold("y", y[-3:], reference.kron_matmul(rows, a, b), terms(s), dtype)


@either
def test_second_order_gradients_and_vmap(gpu):
    s = SHAPES[2]
    x, a, b = (t.requires_grad_() for t in draw(s, 3, torch.float32))

    def second(call, *operands):
        (g,) = torch.autograd.grad(call(*operands).square().sum(), operands[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), operands)

    got = second(lambda *o: kron_matmul(*o, backend="triton"), x, a, b)
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    for label, g, other in zip("xab", got, second(reference.kron_matmul, *wide), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(g.double(), other, rtol=1e-3, atol=1e-4 * scale, msg=label)
    xs = torch.stack([x.detach(), 2 * x.detach()])
    ys = vmap(lambda v: kron_matmul(v, a.detach(), b.detach(), backend="triton"))(xs)
    torch.testing.assert_close(ys[1], 2 * ys[0])


@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize(("gpu", "pair"), [("triton-80", 0), ("triton-90", 1)], indirect=["gpu"])
def test_a_block_and_its_norm_in_one_launch(gpu, pair, dtype):
    """``LayerNorm(down(act(up(x))) + residual)``; y's columns are odd in the second pair."""
    up, down = FEED_FORWARDS[pair]
    x, a1, b1 = draw(up, 5, dtype)
    _, a2, b2 = draw(down, 1, dtype)
    width = down.out_features
    residual, gamma, beta = (torch.randn(size).to(dtype) for size in ((5, width), width, width))
    first, second = (a1, b1, torch.randn(up.out_features).to(dtype)), (a2, b2, None)
    y = launch.kron_feed_forward_norm(x, first, "gelu", second, residual, (gamma, beta, 1e-5))
    assert [one.name for one in gpu.launches] == ["feed_forward_kernel"]
    wide = [t.double() for t in (x, a1, b1, first[2], a2, b2, residual, gamma, beta)]
    hidden = reference.kron_matmul(*wide[:3], bias=wide[3], activation="gelu")
    exact = reference.kron_matmul(hidden, *wide[4:6]) + wide[6]
    exact = F.layer_norm(exact, (width,), *wide[7:], 1e-5)
    hold("y", y, exact, terms(up) + terms(down), dtype)


TABLES = in_turns(
    [("triton-80", "float32"), ("triton-80", "float16"), ("triton-90", "bfloat16")],
    [(1, 8), (2, 5), (1, 1)],
    label=str,
)


@pytest.mark.parametrize(("gpu", "dtype", "table"), TABLES, indirect=["gpu", "dtype"])
def test_embedding_lookup_and_its_gradients(table, dtype, gpu):
    rank, size = table
    table = KroneckerEmbedding(41, 6 * size, size, rank, padding_idx=3, dtype=dtype)
    ids = torch.randint(0, 41, (3, 7))
    ids[0, 0] = 3
    out = table(ids)
    assert gpu.launches[0].name == "embedding_kernel"
    wide = [p.detach().double().requires_grad_() for p in (table.a, table.b)]
    dense = reference.materialize(*wide)
    expected = F.embedding(ids, dense)
    hold("rows", out, expected, rank, dtype)
    dy = torch.randn_like(out)
    out.backward(dy)
    others = torch.autograd.grad(expected, wide, dy.double())
    others[0][:, 3] = 0
    for label, grad, other in zip("ab", (table.a.grad, table.b.grad), others, strict=True):
        hold(label, grad, other, ids.numel() * 6 * size, dtype)


@either
def test_an_id_out_of_range_gives_nan_and_reads_nothing(gpu):
    table = KroneckerEmbedding(5, 24, 8, dtype=torch.float16)
    with torch.no_grad():
        out = table(torch.tensor([4, 5, -1, 0]))
    assert out.isnan().all(-1).tolist() == [False, True, True, False]


@either
def test_the_tied_decoder(gpu):
    s = KronShape(1000, 12, 1, 8)
    h, a, b = draw(s, 3, torch.float16)
    hold(
        "logits",
        kron_matmul(h, a, b, backend="triton"),
        reference.kron_matmul(h, a, b),
        terms(s),
        torch.float16,
    )


# --- traffic


def moved(launch) -> int:
    """Bytes that a launch reads and writes."""
    return 32 * (launch.traffic["load_sectors"] + launch.traffic["store_sectors"])


def layer_of(s: KronShape, tokens: int):
    x, a, b = draw(s, tokens, torch.float16)
    return x, (a, b, torch.zeros(s.out_features, dtype=torch.float16))


@archs(PRESETS.values())
def test_a_product_moves_the_minimum_of_bytes(s, gpu):
    """x and y once, the factors and the bias once for a program."""
    x, (a, b, bias) = layer_of(s, 64)
    kron_matmul(x, a, b, bias=bias, backend="triton")
    (launch,) = gpu.launches
    programs = launch.grid[0] * launch.grid[1]
    least = 64 * (s.in_features + s.out_features) + programs * (s.parameters + s.out_features)
    assert moved(launch) <= 1.1 * 2 * least


@either
def test_three_products_of_one_x_move_the_minimum_of_bytes(gpu):
    s = PRESETS["21x attention"]
    x, layer = layer_of(s, 64)
    kron_qkv(x, layer, layer, layer, backend="triton")
    (launch,) = gpu.launches
    least = 64 * s.in_features
    least += 3 * (64 * s.out_features + launch.grid[0] * (s.parameters + s.out_features))
    # The mixes are read for each of three pieces of x, from the L1 cache.
    assert moved(launch) <= 1.15 * 2 * least


# The bias of the wider hidden vector is read by each of eight warps, from the L1 cache.
@pytest.mark.parametrize(("gpu", "size"), in_turns(ARCHS, PAIRS, label=str), indirect=["gpu"])
def test_a_feed_forward_block_moves_the_minimum_of_bytes(size, gpu):
    (up, down), most = PAIRS[size], {"8x": 1.1, "21x": 1.2}[size]
    x, first = layer_of(up, 64)
    kron_feed_forward(x, first, layer_of(down, 1)[1], backend="triton")
    (launch,) = gpu.launches
    least = 64 * (up.in_features + down.out_features)
    least += launch.grid[0] * sum(s.parameters + s.out_features for s in (up, down))
    assert moved(launch) <= most * 2 * least
