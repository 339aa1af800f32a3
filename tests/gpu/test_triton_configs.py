"""Triton's geometries, tiles, measured tables and refusals; without Triton or a GPU."""

import json
import sys
import types
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standin import cpu_as_gpu

from kron_kernels import KronShape, dispatch, explain_backends, kron_matmul
from kron_kernels.backends import gpu
from kron_kernels.backends.gpu import precision
from kron_kernels.backends.triton import configs, served
from kron_kernels.backends.triton.configs import GPU, Tile, geometry, power_of_two, rule

H100 = GPU("an H100", 132, 232448)
SIDES = st.integers(1, 500)
SHAPES = st.builds(KronShape, SIDES, SIDES, SIDES, SIDES, st.integers(1, 5))


@pytest.fixture
def on_gpu():
    with cpu_as_gpu():
        yield


@given(SHAPES)
def test_the_geometry_is_the_same_product_in_the_cheapest_order_that_fits(s):
    g = geometry(s)
    if g is None:
        # Both factors have a long side, or there are too many vectors for registers.
        assert min(max(s.m1, s.n1), max(s.m2, s.n2)) > 8
        return
    mix, dot = ((s.m2, s.n2), (s.m1, s.n1)) if g.inner else ((s.m1, s.n1), (s.m2, s.n2))
    assert ((g.O, g.U), (g.N, g.K), g.rank) == (mix, dot, s.rank)
    assert max(mix) <= 64
    assert g.transposed.transposed == g


@pytest.mark.parametrize(
    ("s", "inner", "mix_first"),
    [
        (KronShape(384, 384, 2, 2), True, True),
        (KronShape(384, 48, 2, 16), True, True),
        (KronShape(16, 2, 192, 384), False, False),
        (KronShape(2, 16, 384, 192), False, True),
    ],
)
def test_the_presets_mix_with_the_small_factor_on_the_cheaper_side(s, inner, mix_first):
    g = geometry(s)
    assert (g.inner, g.mix_first, g.by_dot) == (inner, mix_first, False)


@given(SHAPES, st.integers(1, 10**6), st.sampled_from([(2, False), (4, False), (4, True)]))
def test_a_program_has_room_for_the_tiles_of_the_rule(s, tokens, kind):
    g = geometry(s)
    if g is None:
        return
    t = rule(g, tokens, *kind, H100)
    sides = t.tokens, t.depth, t.columns, t.warps
    assert all(n == power_of_two(n) for n in sides) and t.tiles >= 1
    assert t.tokens * g.vectors >= 16 and t.depth >= 16 and t.columns >= 16
    sums = t.tokens * g.sums * t.columns * t.tiles * 4
    assert sums <= 96 * 1024 or t.tiles == 1
    assert (t.tiles - 1) * t.columns < g.N


def test_few_tokens_still_make_programs_for_every_multiprocessor():
    g = geometry(KronShape(384, 384, 2, 2))
    t = rule(g, 128, 2, False, H100)
    assert -(-128 // t.tokens) * -(-g.N // (t.columns * t.tiles)) >= 48
    assert rule(g, 10**6, 2, False, H100).tiles * 128 >= g.N  # x is read once


def test_a_measured_tile_overrides_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned")
    g, tile = geometry(KronShape(16, 2, 192, 384)), Tile(8, 32, 64, 1, 4, 3)
    try:
        path = configs.save(H100.name, {configs.key(g, 100, torch.float16): tile})
        assert json.loads(path.read_text()) and not list(path.parent.glob("*.tmp"))
        found = configs.tile(g, 128, torch.float16, False, H100)
        assert found == tile  # the same power of two of tokens
        assert configs.tile(g, 129, torch.float16, False, H100) != tile
        assert configs.tile(g, 128, torch.float32, False, H100) != tile
    finally:
        configs._table.cache_clear()


def test_a_missing_table_is_a_warning_once_for_each_gpu(tmp_path, monkeypatch):
    properties = types.SimpleNamespace(
        name="an H100", multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    x = types.SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    try:
        with pytest.warns(UserWarning, match=r"'an H100'.*python -m benchmarks.gpu --only tuning"):
            assert configs.device_of(x) == H100
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            configs.device_of(x)
    finally:
        configs._properties.cache_clear()
        configs._table.cache_clear()


def test_float32_follows_pytorchs_own_switch():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        (
            (torch.ones(1, 4), torch.ones(2, 2), torch.ones(2, 2)),
            "it runs on GPUs, and x is on cpu",
        ),
        ((torch.ones(1, 4, device="meta"),) * 3, "it runs on GPUs, and x is on meta"),
    ],
)
def test_on_a_cpu_it_is_refused_with_the_reason(operands, reason):
    assert served.why_not(*operands) == reason


@pytest.mark.parametrize(
    ("s", "dtype", "reason"),
    [
        (KronShape(100, 100, 100, 100), torch.float16, "both factors are large"),
        (KronShape(2, 2, 2, 2, 17), torch.float16, "up to 16 products, and the Kronecker rank is"),
        (KronShape(2, 2, 2, 2), torch.float64, "kernels for float16, bfloat16, float32"),
    ],
)
@pytest.mark.usefixtures("on_gpu")
def test_unsupported_calls_are_refused_with_the_reason(s, dtype, reason, monkeypatch):
    monkeypatch.setattr(served, "why_no_triton", lambda: None)
    x = torch.ones(1, s.in_features, dtype=dtype)
    a = torch.ones(s.rank, s.m1, s.n1, dtype=dtype)
    b = torch.ones(s.rank, s.m2, s.n2, dtype=dtype)
    assert reason in served.why_not(x, a, b)
    assert f"triton  {served.why_not(x, a, b)}" in explain_backends(x, a, b)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        kron_matmul(x, a, b, backend="triton")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton cannot be imported (import of triton halted; None in sys.modules); pip "
         "install triton"),
        # 3.4 compiles wrong sums.
        ("2.1.0", "it needs Triton 3.5 or later, and 2.1.0 is installed; pip install -U triton"),
        ("3.4.0", "it needs Triton 3.5 or later, and 3.4.0 is installed; pip install -U triton"),
        ("3.5.0", None),
        ("3.5.0+git1b0418a9", None),
        ("3.10.0", None),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("on_gpu")
def test_a_triton_that_compiles_wrong_code_is_refused(version, reason, monkeypatch):
    triton = version and types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(dispatch, "_order", lambda *_: ("triton",))  # the order on a GPU
    served.why_no_triton.cache_clear()
    try:
        operands = torch.ones(1, 4), torch.ones(2, 2), torch.ones(2, 2)
        assert served.why_not(*operands) == reason
        assert served.why_not_embedding(torch.ones(1, 2, 2), torch.ones(1, 1, 2)) == reason
        chosen = dispatch.choose("auto", operands[0], operands[1:])
        assert chosen == ("eager" if reason else "triton")
        if reason:
            assert f"triton  {reason}" in explain_backends(*operands)
            with pytest.raises(ValueError, match="backend='triton' cannot serve this call: "):
                kron_matmul(*operands, backend="triton")
    finally:
        served.why_no_triton.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((7, 5), "3.9.0", "it needs compute capability 8.0, and a GPU is older"),
        ((8, 0), "3.5.1", None),
        ((9, 0), "3.6.0", None),
        ((10, 0), "3.6.0", "it needs Triton 3.7 or later, and 3.6.0 is installed; pip install -U "
         "triton"),
        ((10, 3), "3.7.1", None),
        ((12, 0), "3.6.0", None),
    ],
)  # fmt: skip
def test_gpus_and_tritons_that_do_not_work_together_are_refused(
    capability, version, reason, monkeypatch
):
    monkeypatch.setattr(gpu, "capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert served._too_old(0) == reason
