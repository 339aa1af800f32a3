"""Base models are served in one call when nobody watches, with the stock model's numbers."""

import copy
import functools
import gc
import inspect
import io
import pickle
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
import watching
from test_architectures import CONFIGS as ALL_CONFIGS
from test_architectures import heads
from tiny import SIZES, tiny_tokenizer
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CamembertConfig,
    DebertaV2Config,
    XLMRobertaConfig,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kroneckerbert
from kron_kernels import KroneckerLinear
from kron_kernels.testing import assert_close
from kroneckerbert import compress, decompress, explain, fusion, serving
from kroneckerbert.configuration_kroneckerbert import layout_of

SERVED = ("bert", "roberta", "distilbert", "mpnet", "electra")
CONFIGS = {name: ALL_CONFIGS[name] for name in SERVED} | {
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "camembert": CamembertConfig(**SIZES),
}
# Entries of kronecker_factors for a layer of these rows and columns.
LAYERS = {
    "one term": lambda m, n: {"a_shape": [m // 4, n // 4]},
    "terms": lambda m, n: {"a_shape": [m // 4, n // 8], "rank": 3},
    "sum": lambda m, n: [{"a_shape": [2, 4]}, {"a_shape": [m, 1], "rank": 5}],
    "low rank": lambda m, n: {"a_shape": [m, 1], "rank": 7},
    "dense": lambda m, n: None,
}
# Rows of a batch, 1 for a token.
MASKS = {
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9, [1] + [0] * 8],
    "left": [[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1] * 4 + [0], [1] * 9],
    "ones": [[1] * 9] * 3,
    "none": None,
}
# Terms summed along two layers, and embeddings: each linear layer's, and 9 keys.
TERMS = 2 * (5 * 32 + 64 + 9) + 3 * 32


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """One entry for each call of the encoder."""
    seen = []

    class Counted(serving.Encoder):
        def __call__(self, *args, **kwargs):
            seen.append(self)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(serving, "Encoder", Counted)
    return seen


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def student(name: str = "bert", kind: str = "one term", cls=None, **overrides):
    """A model of random weights, with biases and norms that show."""
    base = copy.deepcopy(CONFIGS[name])
    for field, value in overrides.items():
        setattr(base, field, value)
    config_class = kroneckerbert.register(type(base))
    dense = AutoModel._model_mapping[type(base)]
    with torch.device("meta"):
        layout = layout_of(dense(base))
    kinds = list(LAYERS) if kind == "mixed" else [kind]
    factors = {}
    for i, (path, (m, n)) in enumerate(layout.sizes.items()):
        entry = LAYERS[kinds[i % len(kinds)]](m, n)
        if path == layout.table:
            entry = entry and {"a_shape": [m, n // 4], "rank": 2}
        if entry:
            factors[path] = entry
    config = config_class.from_dense(base, factors, initializer_range=0.2)
    model = getattr(kroneckerbert, f"Kronecker{(cls or dense).__name__}")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(model, mask="right", rows: int = 3, tokens: int = 9) -> dict:
    ids = torch.randint(5, 64, (rows, tokens))
    if MASKS.get(mask) is None:
        return {"input_ids": ids}
    mask = torch.tensor(MASKS[mask])
    return {"input_ids": ids.masked_fill(mask == 0, padding(model)), "attention_mask": mask}


def padding(model) -> int:
    return model.config.pad_token_id or 0


def oracle(model):
    """The stock model, in float64, with products formed."""
    return decompress(model).double()


def hold(actual, expected, inputs, terms: int = TERMS):
    """Outputs are equal, at tokens, and those of padding are zero."""
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    mask = inputs.get("attention_mask")
    for name, value in expected.items():
        for i, (x, y) in enumerate(zip(tensors(actual[name]), tensors(value), strict=True)):
            assert x.shape == y.shape
            if mask is not None and y.shape[:2] == mask.shape:
                assert not x[:, 1:][mask[:, 1:] == 0].any()
                x, y = x[mask != 0], y[mask != 0]
            assert_close(f"{name} {i}", x, y, terms)


def tensors(value):
    return value if isinstance(value, tuple) else (value,)


def assert_served(model, calls, inputs=None):
    inputs = batch(model) if inputs is None else inputs
    calls.clear()
    actual = model(**inputs)
    assert len(calls) == 1, serving.why_not(model, **inputs)
    assert serving.why_not(model, **inputs) is None
    hold(actual, oracle(model)(**inputs), inputs)


def assert_unserved(model, calls, reason: str, inputs=None, expected=None, **options):
    """The stock path computes the call, and the reason has these words."""
    inputs = batch(model) if inputs is None else inputs
    if expected is None:
        expected = oracle(model)(**inputs, **options)
    calls.clear()
    found = serving.why_not(model, **inputs, **options)
    assert found and reason in found, found
    assert found in explain(model, **inputs, **options)
    actual = model(**inputs, **options)
    assert not calls
    mask = inputs.get("attention_mask")
    x, y = actual[0].detach(), expected[0]
    if mask is not None and mask.shape == y.shape[:2]:
        x, y = x[mask != 0], y[mask != 0]
    assert_close(reason, x, y, TERMS)
    return actual


# --- numbers


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_of_each_architecture(name, mask, calls):
    model = student(name, "mixed")
    inputs = batch(model, mask)
    actual = model(**inputs, output_hidden_states=True)
    assert len(calls) == 1
    hold(actual, oracle(model)(**inputs, output_hidden_states=True), inputs)


@pytest.mark.parametrize("kind", [*LAYERS, "mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_kind_of_layer(name, kind, calls):
    assert_served(student(name, kind), calls)


@pytest.mark.parametrize(
    ("name", "cls"),
    [(n, c) for n in SERVED for c in heads(n)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_head(name, cls, calls):
    model = student(name, cls=cls)
    inputs = batch(model)
    expected = inputs
    if "MultipleChoice" in cls.__name__:
        expected = inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
    actual, expected = model(**inputs), oracle(model)(**inputs)
    assert len(calls) == 1
    hold_at_tokens(actual, expected, inputs)


def hold_at_tokens(actual, expected, inputs):
    """As ``hold``, of a head, which computes something of the padding's zeros."""
    assert list(actual) == list(expected)
    mask = inputs["attention_mask"]
    for name, y in expected.items():
        x = actual[name]
        if y.shape[:2] == mask.shape:
            x, y = x[mask != 0], y[mask != 0]
        assert_close(name, x, y, TERMS + 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_each_dtype(name, dtype, calls):
    model = student(name, "mixed").to(dtype)
    inputs = batch(model)
    actual = model(**inputs, output_hidden_states=True)
    assert len(calls) == 1
    assert actual.last_hidden_state.dtype == dtype
    hold(actual, oracle(model)(**inputs, output_hidden_states=True), inputs)


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.float32, torch.uint8])
def test_masks_of_other_dtypes(kind, calls):
    model = student()
    inputs = batch(model, "left")
    assert_served(model, calls, inputs | {"attention_mask": inputs["attention_mask"].to(kind)})


@pytest.mark.parametrize("name", CONFIGS)
def test_other_arguments(name, calls):
    model = student(name)
    inputs = batch(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = torch.randint(2, 20, ids.shape)
    types = torch.randint(0, CONFIGS[name].type_vocab_size if has_types(model) else 2, ids.shape)
    for other in (
        {"position_ids": positions},
        {"position_ids": positions[:1]},
        {"token_type_ids": types},
        {"token_type_ids": types[:1], "position_ids": positions},
        {"input_ids": ids.int(), "position_ids": positions.int(), "token_type_ids": types.int()},
        {"input_ids": ids.int()},
        {"input_ids": ids[:, ::2], "attention_mask": mask[:, ::2]},
        {"input_ids": ids.t().contiguous().t()},
        {"input_ids": ids[:, :1], "attention_mask": mask[:, :1]},
        {"input_ids": ids[:1, :1], "attention_mask": None},
    ):
        given = inputs | other
        actual = model(**given)
        expected = oracle(model)(**given)
        given = {k: v for k, v in given.items() if v is not None}
        hold(actual, expected, given)
    assert len(calls) == 10
    hold(model(ids, mask), oracle(model)(ids, mask), inputs)  # by position
    assert len(calls) == 11


def has_types(model) -> bool:
    return "token_type_embeddings" in model.embeddings._modules


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_instead_of_ids(name, calls):
    model = student(name)
    mask = torch.tensor(MASKS["right"])
    given = torch.randn(3, 9, model.embeddings.word_embeddings.embedding_dim)
    actual = model(inputs_embeds=given, attention_mask=mask)
    assert len(calls) == 1
    expected = oracle(model)(inputs_embeds=given.double(), attention_mask=mask)
    hold(actual, expected, {"attention_mask": mask})


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_tuples_and_hidden_states(name, pooler, calls):
    model = student(name)
    if not pooler and "pooler" in model._modules:
        model.pooler = None
    stock = type(model).dense_class.forward
    inputs = batch(model, "ones")
    for options in (
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
        {"return_dict": None, "output_hidden_states": None},
        {"return_dict": True, "output_hidden_states": False, "output_attentions": False},
    ):
        calls.clear()
        actual, expected = model(**inputs, **options), stock(model, **inputs, **options)
        assert len(calls) == 1
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        same_structure(actual, expected)
    model.config.output_hidden_states = True
    model.config.return_dict = False
    for options in ({}, {"output_hidden_states": None, "return_dict": None}):
        calls.clear()
        same_structure(model(**inputs, **options), stock(model, **inputs, **options))
        assert len(calls) == 1


def same_structure(actual, expected):
    if expected is None:
        assert actual is None
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        same_structure(list(actual.values()), list(expected.values()))
    else:
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            same_structure(x, y)


def test_feed_forward_in_chunks_has_the_same_numbers(calls):
    assert_served(student(chunk_size_feed_forward=3), calls)


def test_a_sequence_of_padding_only_is_finite(calls):
    model = student()
    inputs = batch(model, "ones")
    inputs["attention_mask"][1] = 0
    actual = model(**inputs).last_hidden_state
    assert len(calls) == 1
    assert actual.isfinite().all()
    assert not actual[1, 1:].any()
    whole = model(input_ids=inputs["input_ids"][::2]).last_hidden_state
    torch.testing.assert_close(actual[::2], whole)


@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0)])
def test_an_empty_batch(shape, calls):
    model = student()
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    assert "no tokens" in serving.why_not(model, **inputs)
    with pytest.raises((IndexError, RuntimeError)):  # stock models refuse them
        model(**inputs)
    assert not calls


# --- who watches


def encoder_of(model):
    return model.transformer if "transformer" in model._modules else model.encoder


@pytest.mark.filterwarnings("ignore:.*non-full backward hook")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", watching.ALL)
@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet"])
def test_hooks_and_replaced_forwards_are_called(name, kind, calls):
    model = student(name)
    inputs, stock = batch(model), oracle(model)
    expected = stock(**inputs)
    assert_served(model, calls, inputs)  # now it has a plan
    skipped = {p for p in model.modules() if isinstance(p, nn.ModuleList)}
    for module in model.modules():
        seen = []
        if module in skipped or ("pooler" in model._modules and module in model.pooler.modules()):
            continue
        with watching.ALL[kind](module, seen):
            words = "hook" if "own" not in kind else "own forward"
            assert_unserved(model, calls, words, inputs, expected)
        if kind in watching.FORWARD:
            assert seen
        if module is model.embeddings.word_embeddings:
            break
    for path in ("layer.1", "layer.0"):
        for module in encoder_of(model).get_submodule(path).modules():
            with watching.ALL[kind](module, []):
                assert_unserved(model, calls, words, inputs, expected)
    assert_served(model, calls, inputs)


def test_a_hook_in_a_new_dictionary_is_called(calls):
    """As set by code that clears hooks by giving a module new, empty dictionaries."""
    model = student()
    assert_served(model, calls)
    norm = model.encoder.layer[0].output.LayerNorm
    norm._forward_hooks = type(norm._forward_hooks)()
    assert_served(model, calls)
    handle = norm.register_forward_hook(lambda *_: None)
    assert_unserved(model, calls, "encoder.layer.0.output.LayerNorm has a hook")
    handle.remove()
    assert_served(model, calls)


def test_hooks_of_the_pooler_are_called(calls):
    model, seen = student(), []
    with watching.FORWARD["forward"](model.pooler, seen):
        assert_served(model, calls)
    assert len(seen) == 1


def test_a_hook_that_no_method_registered_is_called(calls):
    model = student()
    inputs = batch(model)
    assert_served(model, calls, inputs)  # now it has a plan
    seen: list[None] = []
    dense = model.encoder.layer[0].intermediate.dense
    dense._forward_hooks[0] = lambda *given: seen.append(None)
    model(**inputs)
    assert seen and len(calls) == 1
    assert "has a hook" in serving.why_not(model)


def test_recorders_of_transformers_do_not_stop_the_encoder(calls):
    model = student(_attn_implementation="eager")
    assert_served(model, calls)
    actual = assert_unserved(model, calls, "attentions", output_attentions=True)
    assert len(actual.attentions) == 2
    assert any(m._forward_hooks for m in model.modules())
    assert_served(model, calls)
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert_unserved(model, calls, "encoder.layer.0 has a hook")
    handle.remove()
    assert_served(model, calls)


class Doubled(KroneckerLinear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: prune.random_unstructured(m, "a", 0.5), "hook"),
        (lambda m: parametrizations.weight_norm(m, "a"), "must be"),
        (lambda m: setattr(m, "__class__", Doubled), "is a Doubled"),
        (lambda m: m.compile(backend="eager"), "is compiled"),
    ],
    ids=["pruned", "parametrized", "subclass", "compiled"],
)
def test_layers_that_compute_something_else(change, reason, calls):
    model = student()
    inputs = batch(model)
    assert_served(model, calls, inputs)
    change(model.encoder.layer[1].intermediate.dense)
    expected = type(model).dense_class.forward(model, **inputs)
    assert_unserved(model, calls, reason, inputs, expected=[expected[0].double()])


@pytest.mark.parametrize(
    ("path", "module", "reason"),
    [
        ("encoder.layer.0.output.dropout", nn.Identity(), "is a Identity"),
        ("encoder.layer.0.output.dropout", nn.LayerNorm(32), "must be a Dropout"),
        ("encoder.layer.1.intermediate.intermediate_act_fn", nn.Tanh(), "is a Tanh"),
        ("encoder.layer.1.attention.self.query", nn.Bilinear(1, 1, 1), "is a Bilinear"),
        ("embeddings.word_embeddings", nn.Embedding(64, 32, max_norm=0.1), "max_norm"),
        ("encoder.layer.1.other", nn.Linear(1, 1), "other parts than usual: other"),
        ("encoder.layer", nn.ModuleList(), "no layers"),
    ],
)
def test_other_modules(path, module, reason, calls):
    model = student()
    assert_served(model, calls)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.eval())
    assert reason in explain(model)
    if "Bilinear" not in reason:
        model(**batch(model))
        assert len(calls) == 1


def test_new_layers_of_known_kinds_are_served(calls):
    model = student()
    assert_served(model, calls)
    layer = model.encoder.layer[1]
    new = nn.Linear(32, 32)
    inputs = batch(model)
    before = model(**inputs)[0]
    layer.attention.self.value = new
    calls.clear()
    actual = model(**inputs)[0]
    assert len(calls) == 1
    assert not torch.allclose(before, actual)
    expected = type(model).dense_class.forward(model, **inputs)[0]
    mask = inputs["attention_mask"] != 0
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_adapters(calls):
    peft = pytest.importorskip("peft")
    model = student()
    adapted = peft.get_peft_model(
        model, kroneckerbert.lora_config(model, r=2, init_lora_weights=False)
    ).eval()
    assert "query is a" in serving.why_not(model)
    inputs = batch(model)
    y = adapted(**inputs)[0]
    with adapted.disable_adapter():
        assert not torch.allclose(y, adapted(**inputs)[0], atol=1e-3)
    assert not calls
    merged = kroneckerbert.merge_and_unload(adapted).eval()
    z = merged(**inputs)[0]
    assert len(calls) == 1
    mask = inputs["attention_mask"] != 0
    torch.testing.assert_close(y[mask], z[mask], rtol=1e-4, atol=1e-5)


def test_gradients_and_training(calls):
    model, inputs = student(), batch(student())
    with torch.enable_grad():
        y = assert_unserved(model, calls, "gradient may be needed", inputs)
        y[0].sum().backward()
        assert model.embeddings.word_embeddings.a.grad is not None
        model.requires_grad_(False)
        assert_served(model, calls, inputs)
        norm = model.encoder.layer[1].output.LayerNorm.weight.requires_grad_()
        assert_unserved(model, calls, "gradient may be needed", inputs)
        norm.requires_grad_(False)
        ready = {"inputs_embeds": torch.randn(1, 4, 32)}
        calls.clear()
        model(**ready)
        assert len(calls) == 1
        ready["inputs_embeds"].requires_grad_()
        y = model(**ready)[0]
        assert y.requires_grad
        assert len(calls) == 1
    assert_served(model, calls, inputs)
    dropout = model.encoder.layer[0].attention.self.dropout
    dropout.train()
    assert "dropout is in training mode" in serving.why_not(model)
    model(**inputs)
    model.train()
    assert "training mode" in serving.why_not(model)
    model(**inputs)
    assert len(calls) == 1
    assert_served(model.eval(), calls, inputs)


@contextmanager
def _patched(owner, name, value):
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_and_transforms(calls):
    model = student()
    inputs = batch(model)
    expected = oracle(model)(**inputs)
    assert_served(model, calls, inputs)
    for mode, reason in ((Watching(), "mode watches"), (Dispatching(), "mode watches")):
        with mode:
            assert_unserved(model, calls, reason, inputs, expected)
    with torch.autocast("cpu", torch.bfloat16):
        calls.clear()
        assert "autocast" in serving.why_not(model)
        model(**inputs)
        assert not calls
    with torch.autocast("cuda", enabled=False):
        assert_served(model, calls, inputs)
    with torch.autograd.forward_ad.dual_level():
        assert_unserved(model, calls, "forward-mode", inputs, expected)
    calls.clear()
    ids = inputs["input_ids"]

    def run(i):
        return model(i[None]).last_hidden_state[0]

    y = torch.vmap(run)(ids)
    assert not calls
    torch.testing.assert_close(y, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_compilers_tracers_and_exporters(calls):
    model = student()
    inputs = batch(model)
    expected = model(**inputs)[0]
    mask = inputs["attention_mask"] != 0
    calls.clear()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs)[0]
    exported = torch.export.export(model, (), inputs).module()(**inputs)[0]
    traced = torch.jit.trace(model, tuple(inputs.values()), strict=False, check_trace=False)(
        *inputs.values()
    )
    assert not calls
    for y in (compiled, exported, traced["last_hidden_state"]):
        torch.testing.assert_close(y[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.LayerNorm, "forward"),
        (nn.Dropout, "forward"),
        (KroneckerLinear, "forward"),
        (BertModel, "forward"),
        ("BertLayer", "forward"),
        ("BertLayer", "feed_forward_chunk"),
        ("BertSelfAttention", "forward"),
        ("BertEmbeddings", "forward"),
        (None, "eager_attention_forward"),
        (nn.Module, "__call__"),
    ],
)
def test_patched_classes_and_files(owner, name, calls):
    model = student()
    inputs = batch(model)
    expected = oracle(model)(**inputs)
    file = inspect.getmodule(BertModel)
    owner = file if owner is None else getattr(file, owner) if isinstance(owner, str) else owner
    original = vars(owner)[name]
    seen = []

    @functools.wraps(original)
    def patched(*args, **kwargs):
        seen.append(name)
        return original(*args, **kwargs)

    model.config._attn_implementation = "eager"
    assert_served(model, calls, inputs)
    with _patched(owner, name, patched):
        assert_unserved(model, calls, "was replaced", inputs, expected)
        assert seen
        with pytest.MonkeyPatch.context() as patch:  # a model that was never served
            fresh = copy.deepcopy(model)
            patch.setattr(fresh, "training", False)
            assert "was replaced" in serving.why_not(fresh)
    assert_served(model, calls, inputs)


def test_other_attentions(calls):
    model = student()
    assert_served(model, calls)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", lambda *args, **kwargs: before(*args, **kwargs))
    try:
        assert_unserved(model, calls, "must be stock sdpa or eager")
    finally:
        AttentionInterface.register("sdpa", before)
    assert_served(model, calls)
    model.set_attn_implementation("eager")
    assert_served(model, calls)
    model.set_attn_implementation("flex_attention")
    assert "'flex_attention'" in serving.why_not(model)


def test_arguments_that_are_not_followed(calls):
    model = student()
    inputs = batch(model)
    four = inputs["attention_mask"][:, None, None, :].bool().expand(-1, 1, 9, -1)
    given = {"input_ids": inputs["input_ids"], "attention_mask": four}
    assert_unserved(model, calls, "attention_mask must have shape", given)
    assert_unserved(model, calls, "argument is_causal", inputs, is_causal=False)
    assert_unserved(model, calls, "output_hidden_states=1", inputs, output_hidden_states=1)
    assert_served(model, calls, inputs | {"past_key_values": None, "use_cache": True})


def test_a_decoder_is_not_served(calls):
    model = student(is_decoder=True)
    assert_unserved(model, calls, "causal", batch(model, "ones"))


@pytest.mark.parametrize("name", ["deberta-v2", "modernbert", "gpt2"])
def test_other_architectures(name):
    model = compress(AutoModel.from_config(ALL_CONFIGS[name]), {}).eval()
    assert f"does not compute a {type(model).__name__}" in explain(model)
    assert isinstance(ALL_CONFIGS["deberta-v2"], DebertaV2Config)


def test_dense_models_of_transformers_are_not_served():
    assert "does not compute a BertModel" in explain(BertModel(BertConfig(**SIZES)))


def test_a_profiler_sees_the_encoder(calls):
    model = student()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch(model))
    assert len(calls) == 1
    assert "kron_kernels::encoder" in [event.key for event in profile.key_averages()]


# --- bad inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_inputs_raise(name):
    model = student(name)
    inputs = batch(model, "ones")
    ids = inputs["input_ids"]
    for wrong in (64, -1):
        bad = ids.clone()
        bad[1, 2] = wrong
        with pytest.raises(IndexError):
            model(input_ids=bad)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids.repeat(1, 8))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, position_ids=torch.full_like(ids, 40))
    for shape in ((2, 9), (3, 8), (3, 10)):
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, 0] = 0  # transformers drops a mask of ones without a look at its shape
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="specify"):
        model(attention_mask=torch.ones(3, 9))
    with pytest.raises(TypeError):
        model(ids, input_ids=ids)


# --- changes of a served model


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_changes_of_weights_count(name, calls):
    model = student(name, "mixed")
    assert_served(model, calls)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert_served(model, calls)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    assert_served(model, calls)
    other = {key: value * 0.9 for key, value in model.state_dict().items()}
    model.load_state_dict(other)
    assert_served(model, calls)
    model.load_state_dict({key: value * 0.9 for key, value in other.items()}, assign=True)
    assert_served(model, calls)
    layer = encoder_of(model).layer[1]
    layer.output.dense, layer.intermediate.dense.bias = (
        copy.deepcopy(layer.output.dense),
        nn.Parameter(torch.randn(64)),
    )
    layer.output.dense.bias.add_(1)
    assert_served(model, calls)
    model.double()
    assert model(**batch(model))[0].dtype == torch.float64
    assert_served(model.float(), calls)
    layer.output.LayerNorm.eps = 0.5
    mask = batch(model)
    calls.clear()
    actual = model(**mask)[0]
    assert len(calls) == 1
    expected = type(model).dense_class.forward(model, **mask)[0]
    chosen = mask["attention_mask"] != 0
    torch.testing.assert_close(actual[chosen], expected[chosen], rtol=1e-4, atol=1e-5)


def test_changes_of_buffers_count(calls):
    model = student(type_vocab_size=2)
    inputs = batch(model, "ones")

    def hold_stock():
        calls.clear()
        for _ in range(2):
            expected = type(model).dense_class.forward(model, **inputs)[0]
            torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2

    hold_stock()
    model.embeddings.token_type_ids[:, 3:] = 1
    hold_stock()
    model.embeddings.token_type_ids.data = model.embeddings.token_type_ids.flip(1)
    hold_stock()
    model.embeddings.position_ids = model.embeddings.position_ids.flip(1).contiguous()
    hold_stock()
    del model.embeddings._buffers["position_ids"]
    assert "position_ids is not a buffer" in serving.why_not(model, **inputs)


def test_a_model_made_in_inference_mode(calls):
    with torch.inference_mode():
        model = student(type_vocab_size=2)
        inputs = batch(model, "ones")
        before = model(**inputs)[0]
        model.embeddings.token_type_ids[:, 3:] = 1
        after = model(**inputs)[0]
        assert len(calls) == 2
        assert not torch.allclose(before, after)
        expected = type(model).dense_class.forward(model, **inputs)[0]
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**inputs)[0].clone(), after.clone())


def test_resized_and_tied_words(calls):
    cls = next(c for c in heads("bert") if c.__name__ == "BertForMaskedLM")
    for kind in ("one term", "dense"):
        model = student("bert", kind, cls)
        model(**batch(model))
        model.resize_token_embeddings(80)
        inputs = batch(model)
        inputs["input_ids"][1, 1] = 79
        calls.clear()
        actual = model(**inputs)
        assert len(calls) == 1
        hold_at_tokens(actual, oracle(model)(**inputs), inputs)


def test_a_new_parameter_of_one_entry_is_noticed(calls):
    """Lists compare it by value."""
    model = student()
    dense = model.encoder.layer[0].output.dense
    new = KroneckerLinear(64, 32, (32, 64)).eval()  # b is 1 x 1
    model.encoder.layer[0].output.dense = new
    assert new.b.numel() == 1
    model(**batch(model))
    new.b = nn.Parameter(new.b.detach().clone())
    inputs = batch(model)
    model(**inputs)
    new.b.mul_(3)
    expected = type(model).dense_class.forward(model, **inputs)[0]
    chosen = inputs["attention_mask"] != 0
    torch.testing.assert_close(model(**inputs)[0][chosen], expected[chosen], rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
    assert dense is not new


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_have_their_own_plan(how, calls):
    model = student()
    assert_served(model, calls)
    assert serving._PLAN in vars(model)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = {
            "deepcopy": copy.deepcopy,
            "copy": copy.copy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }[how](model)
    assert serving._PLAN not in vars(other)
    assert not [key for key in model.state_dict() if "plan" in key]
    if how != "copy":
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert_served(other, calls)
    assert_served(model, calls)
    replica = model._replicate_for_data_parallel()
    replica._modules = dict(model._modules)
    torch.testing.assert_close(replica(**batch(model, "ones"))[0].isfinite().all().item(), True)
    assert vars(replica)[serving._PLAN] is not vars(model)[serving._PLAN]


def test_a_plan_keeps_no_model_alive(calls):
    model = student()
    model(**batch(model))
    weights = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(model)]
    calls.clear()
    gc.disable()
    try:
        del model
        assert not [ref for ref in weights if ref() is not None]
    finally:
        gc.enable()


def test_a_stale_plan_is_dropped(calls):
    model = student()
    assert_served(model, calls)
    model.to("meta")
    assert "parameters on meta" in serving.why_not(model)
    assert serving._PLAN not in vars(model)


def test_mixed_dtypes_are_not_served(calls):
    model = student()
    model.encoder.layer[1].output.LayerNorm.double()
    assert "parameters of torch.float32 and torch.float64" in serving.why_not(model)


def test_two_threads(calls):
    model = student("bert", "mixed")
    inputs = [batch(model, mask) for mask in ("right", "left", "holes", "ones")]
    expected = [model(**given)[0] for given in inputs]
    errors = []

    def run(turn):
        try:
            with torch.no_grad():
                for i in range(40):
                    if i % 10 == 0 and turn == 0:
                        vars(model).pop(serving._PLAN, None)
                    k = (i + turn) % len(inputs)
                    torch.testing.assert_close(model(**inputs[k])[0], expected[k])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- who uses it


def test_the_forward_looks_like_the_stock_one():
    for name in CONFIGS:
        cls = type(student(name))
        assert inspect.signature(cls.forward) == inspect.signature(cls.dense_class.forward)
        assert cls.forward.__doc__ == cls.dense_class.forward.__doc__


def test_pipelines_auto_classes_and_sentence_transformers(tmp_path, calls):
    sentences = pytest.importorskip("sentence_transformers")
    model = student()
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_served(loaded, calls)
    calls.clear()
    words = ["a good film", "b"]
    vectors = kroneckerbert.embed(loaded, tokenizer, words, normalize=False)
    assert len(calls) == 1
    encoder = sentences.SentenceTransformer(str(tmp_path), device="cpu")
    calls.clear()
    torch.testing.assert_close(torch.tensor(encoder.encode(words)), vectors, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    classify = pipeline("text-classification", model=head, tokenizer=tokenizer, device="cpu")
    calls.clear()
    assert len(classify(words)) == 2
    assert len(calls) == 2


def test_explain_and_report(monkeypatch):
    model = student()
    assert "in one call" in explain(model)
    assert "in one call" in explain(model, **batch(model))
    monkeypatch.setattr("kroneckerbert.measure._MODEL_SECONDS", 0.01)
    monkeypatch.setattr("kroneckerbert.measure._LAYER_SECONDS", 0.001)
    report = kroneckerbert.report(model, tokens=8)
    assert report.encoder == explain(model)
    assert "one call of the" in str(report)
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert "encoder.layer.0 has a hook" in str(kroneckerbert.report(model, tokens=8))


def test_a_missing_module_is_the_reason(monkeypatch, calls):
    model = student()
    monkeypatch.setattr("kron_kernels.backends.abi.module", None)
    monkeypatch.setattr("kron_kernels.backends.abi.missing", "there is no compiler")
    assert explain(model) == "layer by layer: there is no compiler"


# --- backends


def test_a_layers_backend_is_obeyed(calls):
    model = student()
    inputs = batch(model)
    assert_served(model, calls, inputs)
    dense = model.encoder.layer[1].output.dense
    dense.backend = "eager"
    assert_unserved(model, calls, "encoder.layer.1.output.dense asks for backend='eager'", inputs)
    dense.backend = "native"
    assert_served(model, calls, inputs)
    dense.backend = "cuda"
    with pytest.raises(ValueError, match="backend='cuda' cannot serve"):
        model(**inputs)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("paths", ["attention.self", "intermediate output", "everything"])
def test_a_backend_by_name_is_granted_or_refused_in_fused_blocks(paths, gradients):
    model = student()
    layer, x = model.encoder.layer[0], torch.randn(2, 5, 32)
    chosen = [
        m
        for path, m in layer.named_modules()
        if isinstance(m, KroneckerLinear)
        and (paths == "everything" or path.startswith(tuple(paths.split())))
    ]
    assert chosen
    with torch.set_grad_enabled(gradients):
        for m in chosen:
            m.backend = "cuda"
        with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
            layer(x)
        for i, m in enumerate(chosen):
            m.backend = "cuda" if i == len(chosen) - 1 else "auto"
        with pytest.raises(ValueError, match="backend='cuda' cannot serve this call"):
            layer(x)
        for m in chosen:
            m.backend = "native"
        want = layer(x)
        for m in chosen:
            m.backend = "eager"
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    assert fusion.KroneckerProjection in [type(m) for m in layer.modules()]
