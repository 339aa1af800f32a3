"""Compress, save, load, decompress and refit every architecture with every head."""

import copy
import inspect
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import SIZES as ENCODER
from tiny import tiny_batch, tiny_bert
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertPreTrainedModel

import kroneckerbert
from kron_kernels import KroneckerEmbedding, KroneckerLinear, KroneckerSum, factorise_
from kroneckerbert import calibration, compress, decompress, modeling_kroneckerbert
from kroneckerbert.calibration import refit
from kroneckerbert.configuration_kroneckerbert import layout_of

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bert": BertConfig(**ENCODER),
    "roberta": RobertaConfig(**ENCODER),
    "distilbert": DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
    ),
    "mpnet": MPNetConfig(**ENCODER),
    "electra": ElectraConfig(**ENCODER, embedding_size=16),
    "deberta-v2": DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
    ),
    "modernbert": ModernBertConfig(
        **ENCODER, pad_token_id=0, global_attn_every_n_layers=2, local_attention=8
    ),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0
    ),
    "llama": LlamaConfig(
        **COMMON,
        intermediate_size=64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
}


def heads(name: str) -> list[type]:
    """The dense classes of an architecture's heads."""
    config = kroneckerbert.register(type(CONFIGS[name]))
    return sorted(
        (
            dense
            for dense, ours in modeling_kroneckerbert._classes.items()
            if getattr(ours, "config_class", None) is config
        ),
        key=lambda cls: cls.__name__,
    )


ALL = [(name, cls) for name in CONFIGS for cls in heads(name)]
each_head = pytest.mark.parametrize(
    ("name", "cls"), ALL, ids=[f"{name}-{cls.__name__}" for name, cls in ALL]
)
each_architecture = pytest.mark.parametrize("name", CONFIGS)


def teacher(cls, name):
    # Wide enough that an activation's curvature and a lost bias would show.
    config = copy.deepcopy(CONFIGS[name])
    config.initializer_range = 0.1
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(model, rows: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    inputs = tiny_batch(rows, tokens, model.config.pad_token_id or 0)
    if "MultipleChoice" in type(model).__name__:
        inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
    return inputs


def exact(model) -> dict:
    """Factors that represent every weight; a kron and a low-rank part in the first linear."""
    encoder = model.base_model
    factors, layout = {}, layout_of(encoder)
    for path, (rows, columns) in layout.sizes.items():
        if path == layout.table:
            factors[path] = {"a_shape": [rows, columns // 4], "rank": 4}
        elif factors and len(factors) > 1:
            factors[path] = {"a_shape": [rows // 4, columns // 4], "rank": 16}
        else:
            factors[path] = [
                {"a_shape": [2, 2], "rank": 4},
                {"a_shape": [rows, 1], "rank": min(rows, columns)},
            ]
    return factors


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_frozen_parameters_and_modes_are_kept_there_and_back(name):
    words = ("ForMaskedLM", "LMHeadModel", "ForCausalLM")
    model = teacher(next(cls for cls in heads(name) if cls.__name__.endswith(words)), name)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    student = compress(model, exact(model))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in student.named_parameters():
        source = re.sub(r"(\.parts\.\d+)?\.[ab]$", ".weight", name)
        assert p.requires_grad is trained[source], name
    back = decompress(student)
    assert {name: p.requires_grad for name, p in back.named_parameters()} == trained
    for path, module in model.named_modules():
        for other in (student, back):
            assert other.get_submodule(path).training is module.training, path


def outputs(model, inputs):
    """The logits or hidden states, with zeros at padding, where they have no meaning."""
    with torch.no_grad():
        out = model(**inputs)
    y = out.logits if hasattr(out, "logits") else out[0]
    mask = inputs["attention_mask"]
    if y.shape[:2] != mask.shape:
        return y
    return y * mask.view(*mask.shape, *[1] * (y.ndim - 2)).to(y.dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_has_its_heads(name):
    names = {cls.__name__ for cls in heads(name)}
    assert len(names) >= 5, names
    assert any(n.endswith("ForSequenceClassification") for n in names)
    assert any(n.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")) for n in names)


@each_head
def test_a_student_of_full_rank_equals_its_teacher_saved_and_dense_again(name, cls, tmp_path):
    model = teacher(cls, name)
    inputs = batch(model)
    want = outputs(model, inputs)
    student = compress(model, exact(model))
    assert type(student).__name__ == f"Kronecker{cls.__name__}"
    assert student.config.model_type == f"kronecker_{name.replace('-', '_')}"
    kinds = {type(m) for m in student.base_model.modules()}
    assert {KroneckerLinear, KroneckerSum, KroneckerEmbedding} <= kinds
    assert not layout_of(student.base_model).sizes
    torch.testing.assert_close(outputs(student, inputs), want, rtol=1e-3, atol=1e-4)

    student.save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.kronecker_factors == student.config.kronecker_factors
    state, saved = student.state_dict(), again.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in state)
    # To the last bit but for heads of one column, whose order of summing depends on alignment.
    torch.testing.assert_close(
        outputs(again, inputs), outputs(student, inputs), rtol=1e-6, atol=1e-6
    )

    dense = decompress(student)
    assert type(dense) is cls and type(dense.config) is type(CONFIGS[name])
    torch.testing.assert_close(outputs(dense, inputs), want, rtol=1e-3, atol=1e-4)


@each_architecture
def test_hidden_states_and_attentions_are_as_many_as_in_the_stock_model(name):
    model = teacher(AutoModel._model_mapping[type(CONFIGS[name])], name)
    model.set_attn_implementation("eager")
    student = compress(model)
    inputs = batch(model) | {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        stock, ours = model(**inputs), student(**inputs)
    assert len(stock.hidden_states) == 3 and len(stock.attentions) == 2
    for kind in ("hidden_states", "attentions"):
        assert [t.shape for t in ours[kind]] == [t.shape for t in stock[kind]]


@each_architecture
def test_a_preset_factorises_every_layer_and_the_words(name):
    model = teacher(AutoModel._model_mapping[type(CONFIGS[name])], name)
    student = compress(model, "kronecker-bert-8")
    assert layout_of(student).sizes.keys() <= {
        "embeddings_project"
    }  # ELECTRA's, which the paper does not know
    assert student.num_parameters() < model.num_parameters()


@each_architecture
def test_a_tied_decoder_shares_the_factors_and_grows_with_the_vocabulary(name, tmp_path):
    cls = next(
        c for c in heads(name) if c.__name__.endswith(("MaskedLM", "CausalLM", "LMHeadModel"))
    )
    student = compress(teacher(cls, name))
    decoder, table = student.get_output_embeddings(), student.get_input_embeddings()
    assert isinstance(decoder, KroneckerLinear)
    assert decoder.a is table.a and decoder.b is table.b
    assert outputs(student, batch(student)).shape[-1] == 64
    student.resize_token_embeddings(70)
    torch.manual_seed(0)
    inputs = batch(student)
    assert outputs(student, inputs).shape[-1] == 70
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.get_output_embeddings().a is again.get_input_embeddings().a
    assert torch.equal(outputs(again, inputs), outputs(student, inputs))


def test_a_head_that_reads_the_dense_table_says_to_keep_it():
    config = copy.deepcopy(CONFIGS["deberta-v2"])
    config.legacy = False
    model = DebertaV2ForMaskedLM(config).eval()
    with pytest.raises(ValueError, match=r"keep them dense with .*word_embeddings.* = None"):
        compress(model)
    if any("lm_head" in key for key in model._tied_weights_keys):
        pytest.skip("transformers 5.13 loads no such model: it ties a weight that does not exist")
    factors = {"intermediate.dense": {"a_shape": [8, 2]}}
    assert outputs(compress(model, factors), batch(model)).shape == (3, 9, 64)


@each_architecture
def test_refitting_layer_by_layer_lowers_the_error_of_the_output(name):
    model = teacher(AutoModel._model_mapping[type(CONFIGS[name])], name)
    batches = [batch(model, rows=16) for _ in range(8)]
    factors = {
        path: e for path, e in exact(model).items() if "mb" not in path and "wte" not in path
    }
    for entry in factors.values():
        for term in entry if isinstance(entry, list) else [entry]:
            term["rank"] = 2
    starts = {
        "weight": compress(model, factors),
        "data": compress(model, factors, calibration=batches),
        "sequential": compress(model, factors, calibration=batches, sequential=True),
    }
    fresh = batch(model, rows=16)
    mask = fresh["attention_mask"].bool()
    target = outputs(model, fresh)[mask]
    errors = {
        k: (outputs(m, fresh)[mask] - target).square().mean().item() for k, m in starts.items()
    }
    assert errors["sequential"] < 0.9 * errors["weight"], errors
    assert all(p.isfinite().all() for p in starts["sequential"].parameters())


def test_refitting_runs_each_block_as_often_whatever_their_number():
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_hidden_layers = 5
    model = BertModel(config).eval()
    student = compress(model, exact(model))
    calls = []
    for i, layer in enumerate(student.encoder.layer):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    refit(student, model, [batch(model)])
    # To find the groups, to record the calls, up to each of four groups, and, but for the last, on.
    assert [calls.count(i) for i in range(5)] == [7, 7, 7, 7, 6]


def from_the_embeddings(model, factors, batches, monkeypatch):
    """The result where the student is always run from its inputs."""
    with monkeypatch.context() as patched:
        patched.setattr(calibration._Blocks, "_advance", lambda *_: False)
        return compress(model, factors, calibration=batches, sequential=True)


@pytest.mark.parametrize("name", ["dense blocks", "a convolution between blocks"])
def test_blocks_are_run_as_the_model_runs_them(name, monkeypatch):
    base = "deberta-v2" if "convolution" in name else "bert"
    config = copy.deepcopy(CONFIGS[base])
    config.num_hidden_layers = 4
    if base == "deberta-v2":
        config.conv_kernel_size, config.conv_act = 3, "gelu"
    config.initializer_range = 0.3
    model = AutoModel.from_config(config).eval()
    factors = exact(model)
    for path, entry in list(factors.items()):
        if ".1." in path or ".2." in path:
            factors[path] = None
        elif not isinstance(entry, list):
            entry["rank"] = 1
    batches = [batch(model, rows=8) for _ in range(3)]
    got = compress(model, factors, calibration=batches, sequential=True)
    want = from_the_embeddings(model, factors, batches, monkeypatch)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    # The same sums, in float32 and in the same order.
    torch.testing.assert_close(outputs(got, inputs)[real], outputs(want, inputs)[real])


def test_refitting_does_not_change_an_exact_student():
    model = teacher(MPNetModel, "mpnet")
    batches = [batch(model, rows=16) for _ in range(4)]
    student = compress(model, exact(model), calibration=batches, sequential=True)
    inputs = batch(model)
    torch.testing.assert_close(
        outputs(student, inputs), outputs(model, inputs), rtol=1e-3, atol=1e-4
    )


def test_sequential_fits_constant_inputs():
    """Their variance comes out a little above or below 0, as rounding has it."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = teacher(RobertaModel, "roberta")
        norm = model.embeddings.LayerNorm
        with torch.no_grad():
            norm.weight[3], norm.bias[3] = 0.0, 100.1
        batches = [{"input_ids": torch.randint(5, 64, (8, 8))} for _ in range(5)]
        student = compress(model, exact(model), calibration=batches, sequential=True)
        assert all(p.isfinite().all() for p in student.parameters())


def test_sequential_needs_inputs():
    with pytest.raises(ValueError, match="pass calibration=batches"):
        compress(teacher(GPT2Model, "gpt2"), sequential=True)


T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
DECODER = COMMON | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
OLD_DECODER = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (32,),
    "conv_stride": (2,),
    "conv_kernel": (3,),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
# Beyond the nine: each compresses, with every layer that may be, or says why it cannot.
OTHERS = {
    "XLMRobertaForMaskedLM": (ENCODER, None),
    "CamembertForTokenClassification": (ENCODER, None),
    "AlbertForSequenceClassification": (ENCODER | {"embedding_size": 16}, None),
    "ErnieForQuestionAnswering": (ENCODER, None),
    "DebertaModel": (ENCODER, None),
    "RemBertModel": (ENCODER | {"input_embedding_size": 16}, None),
    "RoFormerForMaskedLM": (ENCODER | {"embedding_size": 32}, None),
    "FNetModel": (ENCODER, None),
    "LongformerModel": (ENCODER | {"attention_window": 4}, None),
    "XLMModel": ({"vocab_size": 64, "emb_dim": 32, "n_layers": 1, "n_heads": 4}, None),
    "CLIPTextModel": (ENCODER, None),
    "Qwen3ForCausalLM": (DECODER, None),
    "Llama4TextModel": (DECODER | {"num_local_experts": 2, "intermediate_size_mlp": 64}, None),
    "BloomForCausalLM": ({"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}, None),
    "GPTJModel": (OLD_DECODER | {"rotary_dim": 4}, None),
    "MambaModel": (COMMON | {"state_size": 4}, None),
    "RwkvModel": (COMMON | {"context_length": 16}, None),
    "MobileBertForMaskedLM": (
        ENCODER | {"embedding_size": 16, "intra_bottleneck_size": 16},
        r"keep them dense with kronecker_factors\['embeddings.word_embeddings'\] = None",
    ),
    "MambaForCausalLM": (COMMON | {"state_size": 4}, "dense weight in its head; keep them dense"),
    "T5Model": (T5, "cannot compress a T5Model; .* not an encoder-decoder"),
    "T5EncoderModel": (T5, "must have the layers of the T5Model .* differs in decoder"),
    "UMT5EncoderModel": (T5, "not an encoder-decoder; kron_kernels.factorise_"),
    "DPRQuestionEncoder": (ENCODER, "must have the layers of the DPRQuestionEncoder"),
    "FunnelModel": (
        {"vocab_size": 64, "block_sizes": [1], "d_model": 32, "n_head": 4, "d_head": 8},
        "AutoModel must have one class for a FunnelConfig, and has FunnelModel and FunnelBase",
    ),
    "BlipTextModel": (ENCODER, "one class for a BlipTextConfig, and has none"),
    "CanineModel": (ENCODER, "must have word embeddings, where get_input_embeddings finds them"),
    "Wav2Vec2Model": (SPEECH, "must have word embeddings"),
    "WavLMModel": (SPEECH, "must have word embeddings"),
}


def other(name: str):
    cls = getattr(transformers, name)
    return cls(cls.config_class(**OTHERS[name][0])).eval()


def low_rank(model) -> dict:
    """Small factors for every layer."""
    layout = layout_of(model.base_model)
    return {
        path: {"a_shape": [rows, 4 if path == layout.table else 1]}
        for path, (rows, _) in layout.sizes.items()
    }


@pytest.mark.parametrize("name", [name for name, (_, message) in OTHERS.items() if not message])
def test_another_architecture_compresses_and_its_student_runs(name):
    model = other(name)
    factors = low_rank(model)
    student = compress(model, factors)
    made = {type(m) for m in student.base_model.modules()}
    assert KroneckerLinear in made and len(factors) > 1
    ids = torch.randint(5, 60, (2, 8))
    for mode in (True, False):
        student.train(mode)
        assert student(input_ids=ids)[0].isfinite().all()


def test_a_class_may_initialise_the_weights_of_layers_inside_a_module(monkeypatch):
    """As CLIP's does in transformers 5.13."""
    base = BertPreTrainedModel._init_weights

    def initialise(self, module):
        base(self, module)
        if isinstance(module, BertLayer):
            torch.nn.init.ones_(module.intermediate.dense.weight)
            torch.nn.init.ones_(module.output.dense.bias)

    monkeypatch.setattr(BertPreTrainedModel, "_init_weights", initialise)
    student = compress(tiny_bert())
    layer = student.encoder.layer[0]
    student._init_weights(layer)
    assert not hasattr(layer.intermediate.dense, "weight") and layer.output.dense.bias.eq(1).all()


@pytest.mark.parametrize("name", [name for name, (_, message) in OTHERS.items() if message])
def test_an_architecture_that_cannot_be_compressed_is_refused_with_the_reason(name):
    model = other(name)
    try:
        factors = low_rank(model)
    except NotImplementedError:
        factors = {}
    error = ValueError if "keep them dense" in OTHERS[name][1] else TypeError
    with pytest.raises(error, match=OTHERS[name][1]):
        compress(model, factors)


@pytest.mark.parametrize(
    ("name", "layer", "owner"),
    [
        ("MambaModel", "dt_proj", "MambaMixer"),
        ("RwkvModel", "attention.output", "RwkvModel"),
        ("Llama4TextModel", "embed_tokens", "Llama4TextModel"),
    ],
)
def test_a_layer_whose_weight_another_module_reads_is_refused(name, layer, owner):
    model = other(name)
    if name == "MambaModel" and "self.dt_proj(" in inspect.getsource(type(model.layers[0].mixer)):
        pytest.skip("the mixer of transformers 5.13 calls this layer")
    with pytest.raises(ValueError, match=f"{layer}', but .*{layer} cannot .*: {owner} reads its"):
        compress(model, {layer: {"a_shape": [2, 2]}})
    assert type(compress(model, {layer: None})).__name__ == f"Kronecker{name}"


def test_factorise_accepts_models_that_compress_refuses():
    model = other("T5EncoderModel")
    wo = "encoder.block.0.layer.1.DenseReluDense.wo"
    with pytest.raises(ValueError, match=r"T5DenseActDense reads its weight.*leave it out"):
        factorise_(model, {wo: {"a_shape": [2, 2]}})
    factorise_(model, {wo.replace(".wo", ".wi"): {"a_shape": [2, 2]}})
    assert model(input_ids=torch.randint(5, 60, (2, 8)))[0].isfinite().all()


# How a fresh process may come to load a model.
LAZY = "\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
BY_AUTO = """
import transformers
assert not {"datasets", "typer", "matplotlib"} & set(sys.modules)
def load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    _, found, head = config.architectures[0].partition("For")
    return getattr(transformers, f"AutoModel{found}{head}").from_pretrained(folder)
"""
WAYS = {
    "kroneckerbert first": "import sys, kroneckerbert" + LAZY + BY_AUTO,
    "transformers first": "import sys, transformers, kroneckerbert" + BY_AUTO,
    "auto classes first": "import sys\nfrom transformers import AutoModel\nimport kroneckerbert"
    + BY_AUTO,
    "pickle": """
import sys, torch  # and nothing of ours
def load(folder):
    return torch.load(f"{folder}/student.pt", weights_only=False)
""",
    "pickled configuration": """
import pickle, sys, safetensors.torch
def load(folder):
    from transformers import AutoModel
    with open(f"{folder}/config.pkl", "rb") as file:
        config = pickle.load(file)
    _, found, head = config.architectures[0].partition("For")
    auto = AutoModel
    if found:
        import transformers
        auto = getattr(transformers, f"AutoModelFor{head}")
    model = auto.from_config(config).eval()
    safetensors.torch.load_model(model, f"{folder}/model.safetensors")
    return model
""",
}
FRESH = """
import torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = load(folder)
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], torch.load(f"{folder}/outputs.pt")), folder
    print(type(model).__name__)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of saved students, by class: every architecture, and four that are not well known."""
    bare = [(AutoModel._model_mapping[type(config)], name) for name, config in CONFIGS.items()]
    # AutoModelFor… loads these. The last bit of a choice's score depends on the memory's alignment.
    found = [cls for cls in heads("bert") if "For" in cls.__name__ and "Choice" not in cls.__name__]
    students = [compress(teacher(*each)) for each in [(cls, "bert") for cls in found] + bare]
    for name in list(OTHERS)[:4]:  # with heads
        students.append(compress(other(name), low_rank(other(name))))
    found = {}
    for student in students:
        folder = tmp_path_factory.mktemp("student")
        student.save_pretrained(folder)
        torch.save(student, folder / "student.pt")
        (folder / "config.pkl").write_bytes(pickle.dumps(student.config))
        inputs = batch(student)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            torch.save(student(**inputs)[0], folder / "outputs.pt")
        found[type(student).__name__] = str(folder)
    return found


FAST = ("kroneckerbert first", "pickle")  # each takes seconds


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w in FAST else [pytest.mark.slow]) for w in WAYS]
)
def test_a_fresh_process_loads_every_architecture_bit_for_bit(way, folders):
    # The order of imports is the same question for all architectures; two of them answer it.
    of_all = way in ("kroneckerbert first", "pickle")
    names = list(folders)[0 if of_all else -2 :]
    done = subprocess.run(
        [sys.executable, "-c", WAYS[way] + FRESH, *(folders[name] for name in names)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


def test_model_types_are_stand_ins_until_their_classes_are_used():
    before = CONFIG_MAPPING["kronecker_nystromformer"]
    config = AutoConfig.for_model("kronecker_nystromformer", **ENCODER)
    made = CONFIG_MAPPING["kronecker_nystromformer"]
    assert type(config) is made is kroneckerbert.KroneckerNystromformerConfig is not before
    assert type(before.from_dict(config.to_dict())) is made
    assert AutoModel._model_mapping[made] is kroneckerbert.KroneckerNystromformerModel
    assert kroneckerbert.KroneckerNystromformerForQuestionAnswering.config_class is made
    with pytest.raises(AttributeError, match="no model or configuration NystrmformerModel"):
        _ = kroneckerbert.KroneckerNystrmformerModel
    assert not hasattr(before, "__wrapped__") and not hasattr(kroneckerbert, "Kronecker")


def test_a_checkpoint_is_safetensors_with_a_loader(tmp_path):
    student = compress(teacher(MPNetModel, "mpnet"))
    student.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "load_kroneckerbert.py",
    }
    assert load_file(tmp_path / "model.safetensors").keys() == student.state_dict().keys()
