"""compress, decompress and the data-aware start."""

import copy

import pytest
import torch
from tiny import tiny_config
from torch.nn import Linear
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    FeatureExtractionPipeline,
)
from transformers.utils import logging

from kron_kernels import KroneckerLinear, densify_, nearest_kronecker
from kroneckerbert import (
    KroneckerBertConfig,
    KroneckerBertForMaskedLM,
    KroneckerBertForPreTraining,
    KroneckerBertForQuestionAnswering,
    KroneckerBertForSequenceClassification,
    KroneckerBertForTokenClassification,
    KroneckerBertModel,
    compress,
    decompress,
    plan,
    second_moments,
)
from kroneckerbert.calibration import refit
from kroneckerbert.fusion import KroneckerProjection

BASE = tiny_config(
    intermediate_size=128,
    initializer_range=0.1,
    id2label={0: "no", 1: "yes"},
    label2id={"no": 0, "yes": 1},
)
CLASSES = {
    BertModel: KroneckerBertModel,
    BertForMaskedLM: KroneckerBertForMaskedLM,
    BertForQuestionAnswering: KroneckerBertForQuestionAnswering,
    BertForSequenceClassification: KroneckerBertForSequenceClassification,
    BertForTokenClassification: KroneckerBertForTokenClassification,
    BertForPreTraining: KroneckerBertForPreTraining,
}
# With as many terms as the small side has entries a sum is exact.
EXACT = {
    "attention.self.query": {"a_shape": [16, 16], "rank": 4},
    "attention.self.key": {"a_shape": [2, 2], "rank": 4},
    "attention.self.value": {"a_shape": [16, 8], "rank": 8},
    "attention.output.dense": {"a_shape": [4, 1], "rank": 4},
    "intermediate.dense": {"a_shape": [8, 2], "rank": 16},
    "output.dense": {"a_shape": [2, 8], "rank": 16},
    "embeddings.word_embeddings": {"a_shape": [64, 8], "rank": 4},
}


def teacher(cls, **kwargs):
    model = cls(copy.deepcopy(BASE), **kwargs).eval()
    with torch.no_grad():  # biases and norms that a copy could lose unseen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batches(count: int = 1) -> list[dict[str, torch.Tensor]]:
    out = []
    for _ in range(count):
        ids = torch.randint(1, BASE.vocab_size, (4, 12))
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


@pytest.mark.parametrize("cls", CLASSES)
def test_at_full_kronecker_rank_the_student_equals_its_teacher(cls):
    model, batch = teacher(cls), batches()[0]
    student = compress(model, KroneckerBertConfig.from_dense(model.config, EXACT))
    assert type(student) is CLASSES[cls]
    for ours, theirs in zip(
        student(**batch, output_hidden_states=True).to_tuple(),
        model(**batch, output_hidden_states=True).to_tuple(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_teacher_is_left_as_it_was_and_shares_nothing(cls):
    model = teacher(cls)
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    student = compress(model)
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.fill_(7.0)
    assert type(model) is cls
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_factors_are_the_nearest_and_everything_else_is_copied():
    model = teacher(BertForSequenceClassification)
    student = compress(model, "kronecker-bert-21")
    ours, theirs = student.state_dict(), model.state_dict()
    name = "bert.encoder.layer.1.intermediate.dense"
    a, b = nearest_kronecker(theirs[f"{name}.weight"], (16, 2))
    assert torch.equal(ours[f"{name}.a"], a)
    assert torch.equal(ours[f"{name}.b"], b)
    common = ours.keys() & theirs.keys()
    assert len(common) == len(theirs) - (6 * 2 + 1)
    for name in common:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_preset_takes_labels_and_fields_from_the_teacher():
    model = teacher(BertForSequenceClassification)
    model.config.problem_type = "single_label_classification"
    for config in ("kronecker-bert-8", KroneckerBertConfig.preset("kronecker-bert-8", BASE)):
        student = compress(model, config)
        assert student.config.id2label == {0: "no", 1: "yes"}
        assert student.config.label2id == {"no": 0, "yes": 1}
        assert student.config.problem_type == "single_label_classification"
        assert student.config.vocab_size == 64


def test_a_given_configuration_is_kept_except_for_the_labels():
    config = KroneckerBertConfig.preset("kronecker-bert-8", BASE, hidden_dropout_prob=0.25)
    config.id2label = {0: "x", 1: "y", 2: "z"}
    student = compress(teacher(BertForSequenceClassification), config)
    assert student.config.hidden_dropout_prob == 0.25
    assert student.dropout.p == 0.25
    assert student.classifier.out_features == 2
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    assert student.config is not config


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_mode_and_attention_are_kept(dtype, training):
    model = teacher(BertForMaskedLM).to(dtype).train(training)
    model.set_attn_implementation("eager")
    student = compress(model)
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert all(module.training is training for module in student.modules())
    assert student.config._attn_implementation == "eager"
    assert student(**batches()[0]).logits.isfinite().all()


@pytest.mark.parametrize("pooler", [True, False])
def test_a_student_has_a_pooler_exactly_if_its_teacher_has(pooler):
    student = compress(teacher(BertModel, add_pooling_layer=pooler))
    assert (student.pooler is not None) is pooler
    assert (decompress(student).pooler is not None) is pooler


def test_the_decoder_of_a_student_is_tied_unless_its_teachers_is_not():
    tied = compress(teacher(BertForMaskedLM))
    assert tied.cls.predictions.decoder.a is tied.bert.embeddings.word_embeddings.a
    model = BertForMaskedLM(BertConfig(**BASE.to_dict() | {"tie_word_embeddings": False}))
    untied = compress(model)
    assert torch.equal(untied.cls.predictions.decoder.weight, model.cls.predictions.decoder.weight)


@pytest.mark.parametrize("cls", CLASSES)
def test_decompress_gives_the_stock_class_and_the_same_outputs(cls, tmp_path):
    student, batch = compress(teacher(cls)), batches()[0]
    dense = decompress(student)
    assert type(dense) is cls
    assert type(dense.config) is BertConfig
    assert dense.config.model_type == "bert"
    assert not hasattr(dense.config, "kronecker_factors")
    torch.testing.assert_close(dense(**batch)[0], student(**batch)[0], rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(**batch)[0], dense(**batch)[0])


def test_decompress_refuses_a_layer_with_its_own_forward():
    student = compress(teacher(BertModel))
    layer = student.encoder.layer[1].attention.self.query
    assert type(layer) is KroneckerProjection  # its forward computes the same
    assert type(densify_(copy.deepcopy(student)).encoder.layer[1].attention.self.query) is Linear
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    for undo in (decompress, densify_):
        with pytest.raises(ValueError, match=r"^encoder.layer.1.attention.self.query: Kronecker"):
            undo(student)


@pytest.mark.parametrize("cls", CLASSES)
def test_models_in_folders_keep_their_class_and_outputs(cls, tmp_path):
    model, batch = teacher(cls), batches()[0]
    model.save_pretrained(tmp_path / "dense")
    expected = compress(model)(**batch)[0]
    for source in (tmp_path / "dense", str(tmp_path / "dense")):
        student = compress(source)
        assert type(student) is CLASSES[cls]
        assert torch.equal(student(**batch)[0], expected)
    student.save_pretrained(tmp_path / "student")
    again = CLASSES[cls].from_pretrained(tmp_path / "student")
    assert torch.equal(again(**batch)[0], expected)


def test_a_model_that_is_not_a_dense_transformer_is_refused():
    with pytest.raises(TypeError, match=r"Linear is not a transformers model.* kron_kernels\.plan"):
        compress(torch.nn.Linear(2, 2))
    student = compress(teacher(BertModel))
    with pytest.raises(TypeError, match="it is factorised already"):
        compress(student)
    with pytest.raises(TypeError, match="cannot decompress a BertModel"):
        decompress(teacher(BertModel))


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def adapted(model):
    peft = pytest.importorskip("peft")
    # Not by model.add_adapter: transformers 5.24 asks there for a PEFT that is not out yet.
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)


def quantised(model):
    model.hf_quantizer = object()
    return model


def int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


class FullyShardedDataParallel(torch.nn.Module):
    """Like torch's, which needs processes."""

    __module__ = "torch.distributed.fsdp"


class Linear4bit(torch.nn.Linear):
    """Like bitsandbytes', which may be absent."""

    __module__ = "bitsandbytes.nn"


def four_bits(model):
    model.encoder.layer[1].output.dense = Linear4bit(128, 32)
    return model


class Int8Tensor(torch.Tensor):
    """Like torchao's, which may be absent."""

    __module__ = "torchao.quantization"


def of_int8_tensors(model):
    weight = model.pooler.dense.weight.detach().as_subclass(Int8Tensor)
    model.pooler.dense.weight = torch.nn.Parameter(weight)
    return model


def pipe(model):
    made = object.__new__(FeatureExtractionPipeline)  # without a tokenizer
    made.model = model
    return made


WRAPPED = {  # wrapper, remedy and, for an attribute, its Python expression
    "peft": (lora, r"adapters; pass model\.merge_and_unload\(\)", "merge_and_unload()"),
    "adapter inside": (adapted, "query .*has adapters in it; merge them", None),
    "DataParallel": (torch.nn.DataParallel, "pass model.module", "module"),
    "torch.compile": (torch.compile, "pass model._orig_mod", "_orig_mod"),
    "TorchScript": (lambda m: torch.jit.script(torch.nn.Linear(2, 2)), "TorchScript", None),
    "FSDP": (lambda m: FullyShardedDataParallel(), "before you shard it", None),
    "pipeline": (pipe, r"pass pipeline\.model", "model"),
    "quantiser": (quantised, "quantised; load it without quantization_config", None),
    "int8": (int8, r"\(Linear\) is quantised; pass the model of floating", None),
    "bitsandbytes": (four_bits, r"layer.1.output.dense \(Linear4bit\) is quantised", None),
    "torchao": (of_int8_tensors, r"dense.weight \(Int8Tensor\) is quantised", None),
    "class": (type, "type; it is a class; pass a model", None),
    "configuration": (lambda m: m.config, "BertConfig; it is not a model; pass a loaded one", None),
    "student": (compress, "already; kroneckerbert.decompress", None),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("wrap", "message", "remedy"), WRAPPED.values(), ids=WRAPPED)
def test_a_wrapper_or_a_changed_model_is_refused_with_the_remedy(wrap, message, remedy):
    model = teacher(BertModel)
    wrapped = wrap(model)
    with pytest.raises(TypeError, match=f"cannot compress .*{message}"):
        compress(wrapped)
    with pytest.raises(TypeError, match=f"cannot plan .*{message}"):
        plan(wrapped, {"parameters": "2x"})
    if remedy:
        assert type(compress(eval(f"wrapped.{remedy}"))) is KroneckerBertModel


def test_a_users_class_is_not_mistaken_for_a_wrapper_of_its_name():
    class Pipeline(torch.nn.Sequential):
        pass

    class SentenceTransformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(8, 8)

    factors = {"0": {"a_shape": [2, 2]}, "dense": {"a_shape": [2, 2]}}
    for module, name in ((Pipeline(torch.nn.Linear(8, 8)), "0"), (SentenceTransformer(), "dense")):
        student = compress(module, {name: factors[name]})
        assert isinstance(student.get_submodule(name), KroneckerLinear)
        with pytest.raises(TypeError, match="it must be a dense transformer"):
            plan(module, {"parameters": "2x"})


def test_plan_refuses_a_name():
    with pytest.raises(TypeError, match=r"class str; .* loaded one, such as AutoModel.from_pre"):
        plan("folder", {"parameters": "2x"})


def test_a_configuration_that_does_not_fit_is_refused_with_the_remedy():
    model = teacher(BertModel)
    with pytest.raises(ValueError, match=r"hidden_size = 64 instead of 32.*from_dense"):
        compress(model, KroneckerBertConfig.preset("kronecker-bert-8", BASE, hidden_size=64))
    with pytest.raises(TypeError, match="object of class int; write KroneckerBertConfig"):
        compress(model, 3)
    with pytest.raises(ValueError, match="no preset is named"):
        compress(model, "kronecker-bert-9")


def test_a_weight_that_is_not_finite_is_refused():
    model = teacher(BertModel)
    model.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    for calibration in (None, batches()):
        with pytest.raises(ValueError, match=r"of encoder.layer.0.output.dense has 1 entries"):
            compress(model, calibration=calibration)


def test_compressing_is_silent_without_progress(capfd):
    logging.enable_progress_bar()  # other tests may have turned them off
    model = teacher(BertForMaskedLM)
    capfd.readouterr()
    compress(model)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    compress(model, progress=True)
    assert "factorising" in capfd.readouterr().err


# The data-aware start


def test_second_moments_are_those_of_the_inputs_without_padding():
    model, data = teacher(BertForMaskedLM).train(), batches(3)
    data[2] |= {"attention_mask": torch.ones(4, 12), "labels": torch.zeros(4)}
    names = ["attention.self.key", "attention.self.query", "intermediate.dense"]
    names = [f"encoder.layer.1.{name}" for name in names]
    moments = second_moments(model, [*data[:2], {**data[2], "attention_mask": None}], names)
    assert model.bert.training
    assert not model.bert.encoder.layer[1].intermediate.dense._forward_pre_hooks

    model.eval()
    rows = []
    for batch in data:
        batch.pop("labels", None)  # the model without its head takes none
        states = model.bert(**batch, output_hidden_states=True).hidden_states
        rows.append(states[1][batch["attention_mask"].bool()])
    rows = torch.cat(rows)
    torch.testing.assert_close(moments[names[0]], rows.mT @ rows / len(rows))
    assert moments[names[0]] is moments[names[1]]
    assert moments[names[2]].shape == (32, 32)


def test_second_moments_of_unknown_layers_or_infinite_inputs_are_refused():
    model = teacher(BertModel)
    query = "encoder.layer.0.attention.self.query"
    for name, message in (
        ("encoder.layer.0.attention.self.qurey", f"qurey', which is not a layer .* {query}"),
        ("embeddings.word_embeddings", "which is not a layer .* nearest are"),
        ("encoder", "which is not a layer .* nearest are"),
    ):
        with pytest.raises(ValueError, match=message):
            second_moments(model, batches(), [name])
    with pytest.raises(TypeError, match=r"calibration is one batch, a mapping; .* \[batch\]"):
        second_moments(model, batches()[0], [query])
    model.embeddings.LayerNorm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=f"the inputs of {query} on calibration are NaN"):
        compress(model, calibration=batches())
    with pytest.raises(ValueError, match=f"the inputs of {query} on calibration are NaN"):
        refit(compress(teacher(BertModel)), model, batches())


def test_the_data_aware_start_lowers_the_error_of_every_layers_outputs():
    model, data = teacher(BertForSequenceClassification), batches(8)
    plain, aware = compress(model), compress(model, calibration=data)
    linears = [n for n in plain.config.kronecker_shapes() if n.startswith("encoder.")]
    moments = second_moments(model, data, linears)

    def error(student, name: str) -> float:
        weight = model.bert.get_submodule(name).weight
        difference = weight - student.bert.get_submodule(name).to_linear().weight
        return ((difference @ moments[name]) * difference).sum().item()

    for name in linears:
        assert error(aware, name) < error(plain, name), name
    words = "bert.embeddings.word_embeddings.a"
    assert torch.equal(aware.state_dict()[words], plain.state_dict()[words])


def test_calibration_may_be_a_generator_but_not_empty():
    model, data = teacher(BertModel), batches(2)
    one, other = compress(model, calibration=data), compress(model, calibration=iter(data))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(ValueError, match="no batch with a token"):
        compress(model, calibration=[])
