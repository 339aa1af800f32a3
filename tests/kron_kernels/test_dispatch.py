"""Routes and backends, sizes and costs, the public names, and what an import needs."""

import importlib.metadata
import importlib.resources
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kron_kernels
from kron_kernels import KronShape, dispatch, explain_backends, kron_matmul
from kron_kernels.backends import abi, native
from kron_kernels.reference import materialize
from kron_kernels.testing.cases import SHAPES, draw, name

BACKENDS = get_args(dispatch.BackendName)
OPERANDS = draw(SHAPES[1], dtype=torch.float32)
X, *FACTORS = OPERANDS


# --- routes

NATIVE = "native" if native._native else "eager"
LAYER = (*draw(KronShape(4, 3, 2, 4), 5, torch.float32)[1:], torch.ones(8))
UP, DOWN = (
    (*draw(s, 0, torch.float32)[1:], None) for s in (KronShape(4, 2, 6, 6), KronShape(2, 4, 6, 6))
)
LOW = torch.ones(3, 8, 1), torch.ones(3, 1, 12), None


def routes(backend="auto", tokens=5, activation="gelu", needs_grad=False, layer=LAYER, up=UP):
    """The routes of a product, of three products of one x, and of a block."""
    x = torch.ones(tokens, 12, requires_grad=needs_grad)
    operands = [x, *layer[:2], *up[:2], *DOWN[:2]]
    observed = dispatch.is_observed(operands)
    return (
        dispatch.route_matmul(backend, x, layer[:2], operands, observed),
        dispatch.route_qkv(backend, x, [layer] * 3, operands, observed),
        dispatch.route_feed_forward(backend, x, up, activation, DOWN, operands, observed),
    )


def ways(*args, **options):
    return [way for way, _ in routes(*args, **options)]


def test_the_route_of_eager():
    assert ways("eager") == ["plain", "operator", "operator"]
    assert ways("eager", tokens=10**5) == ["operator"] * 3
    assert ways("eager", needs_grad=True) == ["autograd", "products", "products"]
    with torch.no_grad():
        assert ways("eager", needs_grad=True) == ["plain", "operator", "operator"]


@pytest.mark.skipif(NATIVE == "eager", reason="the kernels are not compiled")
def test_the_route_of_compiled_kernels():
    assert routes() == (("direct", "native"),) * 3
    assert ways(needs_grad=True) == ["autograd", "products", "autograd"]
    assert ways(activation=None)[2] == "products"
    assert routes(layer=LOW, up=LOW) == (("plain", "eager"), *[("products", "auto")] * 2)
    assert ways("native", layer=LOW, up=LOW) == ["direct"] * 3
    with torch.profiler.profile():
        assert ways() == ["operator"] * 3
        x, *factors = torch.ones(1, 8), *torch.ones(3, 1, 2, 2)
        assert dispatch.route_matmul("auto", x, factors, [x], False)[0] == "recorded"
    with FlopCounterMode(display=False):
        assert ways() == ["operator"] * 3
    with torch.autograd.forward_ad.dual_level():
        assert ways() == ["autograd", "products", "products"]


def test_fused_calls_are_products_where_each_product_must_decide():
    x = torch.ones(1)
    assert not dispatch.in_products(x) and dispatch.in_products(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.in_products(x)
    assert dispatch.route_embedding(*FACTORS) == dispatch.PLAIN  # without a GPU


# --- backends


def test_without_the_compiled_module_the_reason_is_that():
    program = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name == "kron_kernels._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch, kron_kernels
print(kron_kernels.explain_backends(torch.ones(2), torch.ones(1, 2)))
"""
    printed = python("-c", program)
    assert "the compiled module is missing (No module named 'kron_kernels._native')" in printed
    folder = re.escape(str(Path(kron_kernels.__file__).parent))
    assert re.search(
        rf"with a C\+\+17 compiler on the PATH, reinstall kron_kernels \({folder}\)", printed
    )


def test_a_source_folder_in_front_of_the_installed_package_is_named(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(kron_kernels.__file__).parent, clone / "kron_kernels", ignore=unbuilt)
    (site / "kron_kernels").mkdir(parents=True)
    (site / "kron_kernels" / "_native.abi3.so").touch()
    (site / "kron_kernels-0.1.0.dist-info").mkdir()
    (site / "kron_kernels-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kron-kernels\nVersion: 0.1.0\n"
    )
    # The finder of an editable installation would find the module of this checkout.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
        "from kron_kernels.backends import abi; print(abi.missing)"
    )
    paths = os.pathsep.join([str(clone), str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith(
        f"this is the source folder {clone / 'kron_kernels'}, and the installed package is "
        f"{site / 'kron_kernels'}: start Python in another folder"
    ), done.stdout + done.stderr


def test_a_module_compiled_for_another_interface_is_refused(monkeypatch):
    header = Path(__file__).parents[2] / "csrc" / "kron.h"
    assert f"KRON_ABI = {abi.ABI} }}" in header.read_text()
    for number in (None, abi.ABI - 1, abi.ABI + 1):
        module = types.ModuleType("kron_kernels._native")
        module.__file__ = "old.so"
        if number is not None:
            module.abi = number
        monkeypatch.setitem(sys.modules, "kron_kernels._native", module)
        monkeypatch.setattr(kron_kernels, "_native", module, raising=False)
        loaded, reason = abi._load()
        assert loaded is None
        assert reason == (
            f"old.so was built for ABI {number or 0}, but this kron_kernels needs ABI {abi.ABI}; "
            "reinstall kron_kernels"
        )


def test_a_second_import_works_like_the_first():
    program = """
import importlib, sys
import torch, kron_kernels, kron_kernels.ops

def product():
    import kron_kernels
    x, a = torch.ones(40, 6, requires_grad=True), torch.ones(1, 4, 2)
    y = kron_kernels.kron_matmul(x, a, torch.ones(1, 2, 3))
    y.sum().backward()
    return y.sum().item(), x.grad.sum().item()

first = product()
importlib.reload(kron_kernels.ops)
importlib.reload(kron_kernels)
assert product() == first
for name in [name for name in sys.modules if name.startswith("kron_kernels")]:
    del sys.modules[name]
import kron_kernels
assert product() == first
"""
    python("-c", program)


def test_eager_takes_every_call():
    for operands in (
        draw(SHAPES[2], 0, torch.complex64),
        [t.to("meta") for t in OPERANDS],
        [torch.ones(2, 24), *(torch.ones(2, n) for n in (2, 3, 4))],
    ):
        assert dispatch.why_not("eager", *operands) is None
        assert kron_matmul(*operands, backend="eager").shape[0] == operands[0].shape[0]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "auto"])
def test_a_backend_asked_for_by_name_is_used_or_refused_never_replaced(backend):
    reason = dispatch.why_not(backend, *OPERANDS)
    if reason is None:
        assert dispatch.choose(backend, X, FACTORS) == backend
        kron_matmul(*OPERANDS, backend=backend)
        return
    for call in (
        lambda: dispatch.choose(backend, X, FACTORS),
        lambda: kron_matmul(*OPERANDS, backend=backend),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        assert str(refusal.value) == f"backend={backend!r} cannot serve this call: {reason}."


@pytest.mark.parametrize(
    "s", [KronShape(24, 1, 1, 18, 3), KronShape(1, 18, 24, 1, 3), KronShape(9, 1, 1, 8)], ids=name
)
def test_auto_leaves_low_rank_to_the_two_gemms_of_eager(s):
    x, a, b = draw(s, dtype=torch.float32)
    assert dispatch.choose("auto", x, (a, b)) == "eager"
    assert dispatch.choose("auto", x, (a[0], b[0])) == "eager"
    assert dispatch.choose("auto", X, FACTORS, (a, b)) == "eager"  # a block is of one backend
    line = explain_backends(x, a, b).splitlines()[-1]
    assert line.startswith(f"eager   ready: low rank, {s.rank}: two GEMMs")
    assert f'"auto" takes; {s.flops:,} FLOPs' in line
    for backend in BACKENDS[1:]:  # asked for by name it is used
        if dispatch.why_not(backend, x, a, b) is None:
            assert dispatch.choose(backend, x, (a, b)) == backend
    assert "low rank" not in explain_backends(*OPERANDS)
    assert "A first, then B" in explain_backends(*OPERANDS)


def test_the_error_of_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"backend='mkl' cannot serve .* it does not exist"
    ) as refusal:
        dispatch.choose("mkl", X, FACTORS)
    assert all(backend in str(refusal.value) for backend in BACKENDS)


def test_reasons_are_the_end_of_a_sentence():
    for backend in (*BACKENDS[1:], "mkl"):
        reason = dispatch.why_not(backend, *OPERANDS)
        assert reason is None or (reason[0].islower() and reason[-1] not in ".\n"), reason


@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_the_explanation_has_a_line_a_backend_with_its_reason(s):
    x, a, b = draw(s, dtype=torch.float32)
    lines = explain_backends(x, a, b).splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(BACKENDS[1:])
    for line in lines:
        backend, text = line.split(maxsplit=1)
        reason = dispatch.why_not(backend, x, a, b)
        assert text == reason or (reason is None and text.startswith("ready"))


def test_the_explanation_takes_the_operands_that_kron_matmul_takes():
    x, a, b = OPERANDS
    assert explain_backends(x, a[0], b[0]) == explain_backends(x, a, b)
    for factors in [(torch.ones(3, 4),), [torch.ones(70, 70)] * 3, (torch.ones(2, 3, 4),)]:
        n = torch.Size([f.shape[-1] for f in factors]).numel()
        assert "eager" in explain_backends(torch.ones(1, n), *factors)
    with pytest.raises(ValueError, match="got x of shape"):
        explain_backends(torch.ones(1, 5), a, b)


# --- shapes


@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_sizes_are_those_of_the_factors_and_of_the_materialised_weight(s):
    _, a, b = draw(s)
    weight = materialize(a, b)
    assert weight.shape == (s.out_features, s.in_features)
    assert s.parameters == a.numel() + b.numel()
    assert KronShape.of(a, b) == s
    assert KronShape.of(a[0], b[0]) == s._replace(rank=1)
    assert KronShape.split(*weight.shape, (s.m1, s.n1), s.rank) == s
    assert KronShape.of(a.mT, b.mT) == s.transposed and s.transposed.transposed == s
    assert KronShape.of(b, a) == s.swapped and s.swapped.swapped == s


@pytest.mark.parametrize("first", ["kron_kernels", "torch.utils.flop_counter"])
def test_our_operators_are_counted_whichever_is_imported_first(first):
    program = f"""
import importlib, {first}
import kron_kernels, torch, torch.utils.flop_counter as counting

def counted():
    with counting.FlopCounterMode(display=False) as counter:
        kron_kernels.kron_matmul(torch.ones(3, 12), torch.ones(2, 4), torch.ones(5, 3))
    return counter.get_total_flops()

flops = kron_kernels.KronShape(2, 4, 5, 3).flops * 3
assert counted() == flops, (counted(), flops)
importlib.reload(kron_kernels.ops)  # registers nothing twice
assert counted() == flops, (counted(), flops)
"""
    python("-c", program)


def test_the_package_waits_for_one_import_with_one_finder():
    program = """
import importlib, sys
before = len(sys.meta_path)
import kron_kernels
importlib.reload(kron_kernels.ops)
assert len(sys.meta_path) == before + 1
"""
    python("-c", program)


@pytest.mark.parametrize("s", SHAPES, ids=name)
def test_costs_are_those_of_the_products_and_the_order_is_the_cheaper(s):
    x, a, b = draw(s, 3, torch.float32)
    x = x.unflatten(-1, (s.n1, s.n2))
    counted = {}
    for order in ("b_first", "a_first"):
        with FlopCounterMode(display=False) as counter:
            for a_k, b_k in zip(a, b, strict=True):
                _ = a_k @ (x @ b_k.mT) if order == "b_first" else (a_k @ x) @ b_k.mT
        counted[order] = counter.get_total_flops() / 3
        assert counted[order] == 2 * s.multiply_adds(order)
    assert s.flops == min(counted.values()) == counted[s.order]
    # B ⊗ A is the same work with the roles exchanged.
    assert s.swapped.multiply_adds("a_first") == s.multiply_adds("b_first")


def test_the_orders_of_the_papers_shapes_differ_sevenfold():
    up, down = KronShape(16, 2, 192, 384), KronShape(2, 16, 384, 192)
    assert (up.order, down.order) == ("b_first", "a_first")
    assert up.multiply_adds("a_first") > 7 * up.multiply_adds("b_first")
    # BERT_BASE's linear layers at 128 tokens, 21x smaller: 1.403 GFLOP by the paper's Eq. 7, which
    # counts 2n - 1 for a sum of n products.
    square = KronShape(384, 48, 2, 16)
    assert 12 * 128 * (4 * square.flops + up.flops + down.flops) == pytest.approx(1.403e9, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            (3072, 768, (5, 2)),
            "weight's 3072 rows are not divisible by a_shape[0] = 5; nearest divisors are 4 and 6.",
        ),
        (
            (7, 768, (2, 2)),
            "weight's 7 rows are not divisible by a_shape[0] = 2; nearest divisors are 1 and 7.",
        ),
        (
            (4, 6, (2, 12)),
            "weight's 6 columns are not divisible by a_shape[1] = 12; nearest divisor is 6.",
        ),
        (
            (4, 6, (0, 2)),
            "a_shape[0] = 0 is the factor's rows, at least 1.",
        ),
        ((4, 6, (2, 2), 0), "rank = 0, but a sum needs at least one term; use rank=1."),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v),
)
def test_a_split_that_leaves_a_rest_names_the_nearest_divisors(call, message):
    with pytest.raises(ValueError) as refusal:
        KronShape.split(*call)
    assert str(refusal.value) == message


# --- the public face

PUBLIC_FUNCTIONS = (
    kron_matmul,
    kron_kernels.kron_qkv,
    kron_kernels.kron_feed_forward,
    kron_kernels.nearest_kronecker,
    kron_kernels.nearest_kronecker_sum,
    kron_kernels.factorise_,
    kron_kernels.densify_,
    explain_backends,
)


def test_every_public_name_has_a_docstring():
    assert sorted(kron_kernels.__all__) == kron_kernels.__all__
    for public in kron_kernels.__all__:
        thing = getattr(kron_kernels, public)
        assert thing.__module__.startswith("kron_kernels.")
        first = (inspect.getdoc(thing) or "").partition("\n")[0]
        assert len(first) > 30 and first[-1] in ".:", public
        if inspect.isclass(thing):
            methods = [m for key, m in vars(thing).items() if not key.startswith("_")]
            methods = [getattr(m, "__func__", m) for m in methods if not isinstance(m, property)]
            for method in filter(inspect.isfunction, methods):
                overrides = method.__name__ in ("forward", "extra_repr")
                assert overrides or inspect.getdoc(method), f"{public}.{method.__name__}"


def test_arguments_in_a_docstring_are_those_of_the_signature():
    for f in PUBLIC_FUNCTIONS:
        documented = inspect.getdoc(f).partition("Args:\n")[2].partition("\n\n")[0]
        for parameter in inspect.signature(f).parameters:
            assert f"    {parameter}: " in documented or f"*{parameter}: " in documented, parameter


def test_the_version_is_that_of_the_distribution():
    assert kron_kernels.__version__ == importlib.metadata.version("kron-kernels")


def test_the_package_has_types_for_type_checkers():
    assert importlib.resources.files("kron_kernels").joinpath("py.typed").is_file()
    for f in PUBLIC_FUNCTIONS:
        annotated = [p.annotation for p in inspect.signature(f).parameters.values()]
        assert inspect.Parameter.empty not in annotated
        assert inspect.signature(f).return_annotation is not inspect.Signature.empty


# --- fresh processes


def python(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_doctor_reports_the_backends_of_this_machine():
    printed = python("-m", "kron_kernels.doctor")
    for word in ("torch", torch.__version__, kron_kernels.__version__, "eager"):
        assert word in printed
    assert all(f"{backend} " in printed for backend in BACKENDS[1:])
    assert "Traceback" not in printed and "None" not in printed
    assert all(shape in printed for shape in ("8x attention", "21x feed-forward down"))


OPTIONAL = ["triton", "transformers", "numpy", "scipy", "accelerate", "datasets", "matplotlib"]


def test_a_fresh_process_needs_only_torch():
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
import torch  # and everything that it imports itself
for package in {OPTIONAL!r}:
    sys.modules[package] = None  # an import of it now fails
import kron_kernels
x, a, b = torch.ones(3, 12), torch.ones(2, 4, requires_grad=True), torch.ones(5, 3)
kron_kernels.kron_matmul(x, a, b, activation="gelu").sum().backward()
table = kron_kernels.KroneckerEmbedding(7, 12, 4)
layer = kron_kernels.KroneckerLinear.from_linear(torch.nn.Linear(12, 10), (2, 4))
layer(table(torch.tensor([1, 2]))).sum().backward()
from kron_kernels import adapters, doctor, reference, testing
from kron_kernels.plan import plan
net, rows = torch.nn.Sequential(torch.nn.Linear(24, 24)), torch.ones(2, 24)
made = plan(net, {{"parameters": "3x"}}, rows, calibration=[rows], keep_dense_if_slower=False)
assert str(made) and kron_kernels.factorise_(net, made.factors)(rows).shape == (2, 24)
testing.assert_close("y", layer(x), reference.kron_matmul(x, layer.a, layer.b, bias=layer.bias), 7)
assert adapters.AdaptedLinear(layer, torch.ones(2, 4), torch.ones(5, 3))(x).shape == (3, 10)
assert "eager" in doctor.report()
print("ran")
"""
    assert python("-c", program) == "ran\n"


def test_an_import_brings_in_nothing_heavy_that_torch_does_not():
    heavy = ["transformers", "triton", "torch._dynamo", "torch._inductor", "torch.onnx", "scipy"]
    program = """
import sys, torch
before = set(sys.modules)
import kron_kernels
print(*(set(sys.modules) - before))
"""
    brought = python("-c", program).split()
    assert "kron_kernels.functional" in brought
    for package, module in itertools.product(heavy, brought):
        assert module != package and not module.startswith(package + "."), module
    ours = [m for m in brought if m.split(".")[0] not in ("kron_kernels", "torch")]
    assert all(m.split(".")[0] in sys.stdlib_module_names for m in ours), ours
