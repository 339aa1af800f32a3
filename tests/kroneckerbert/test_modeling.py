"""KroneckerBERT classes in the idiom of transformers: build, save, load, run."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open, save_file
from tiny import tiny_batch, tiny_config, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertPreTrainedModel,
    pipeline,
)

from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kroneckerbert import (
    KroneckerBertConfig,
    KroneckerBertForMaskedLM,
    KroneckerBertForQuestionAnswering,
    KroneckerBertForSequenceClassification,
    KroneckerBertForTokenClassification,
    KroneckerBertModel,
    embed,
    mean_pooling,
    measure,
    report,
    second_moments,
)
from kroneckerbert.data import Table
from kroneckerbert.evaluation import evaluate

BASE = tiny_config(
    intermediate_size=128,
    id2label={0: "a", 1: "b", 2: "c"},
    label2id={"a": 0, "b": 1, "c": 2},
)
CLASSES = {
    KroneckerBertModel: AutoModel,
    KroneckerBertForMaskedLM: AutoModelForMaskedLM,
    KroneckerBertForQuestionAnswering: AutoModelForQuestionAnswering,
    KroneckerBertForSequenceClassification: AutoModelForSequenceClassification,
    KroneckerBertForTokenClassification: AutoModelForTokenClassification,
}
QUERY = "encoder.layer.0.attention.self.query"
WORDS = "embeddings.word_embeddings"


def kronecker_config(**overrides) -> KroneckerBertConfig:
    return KroneckerBertConfig.preset("kronecker-bert-8", BASE, **overrides)


def build(cls):
    # More labels than start and end are an error of the stock head for questions.
    num_labels = 2 if cls is KroneckerBertForQuestionAnswering else 3
    return cls(kronecker_config(num_labels=num_labels)).eval()


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def all_finite(model) -> bool:
    return all(p.isfinite().all() for p in model.state_dict().values())


@pytest.fixture
def tokenizer():
    words = "the a cat dog sat ran on under mat tree . , big small"
    return tiny_tokenizer(words.split())


# Construction


def test_only_the_configured_modules_are_factorised():
    model = build(KroneckerBertForSequenceClassification)
    assert type(model.bert) is KroneckerBertModel
    kinds = {
        name.removeprefix("bert.")
        for name, module in model.named_modules()
        if isinstance(module, KroneckerLinear | KroneckerEmbedding)
    }
    assert kinds == set(model.config.kronecker_shapes())
    assert len(kinds) == 6 * 2 + 1
    assert type(model.bert.pooler.dense) is type(model.classifier) is torch.nn.Linear


@pytest.mark.parametrize("rank", [1, 4])
def test_products_of_new_factors_have_the_initializer_range(rank):
    factors = {
        "intermediate.dense": {"a_shape": [16, 16], "rank": rank},
        WORDS: {"a_shape": [64, 8], "rank": rank},
    }
    config = KroneckerBertConfig.from_dense(BASE, factors, initializer_range=0.05)
    weights, words = [], []
    for _ in range(20):
        model = KroneckerBertModel(config)
        layer = model.encoder.layer[1].intermediate.dense
        weights.append(layer.to_linear().weight)
        words.append(model.embeddings.word_embeddings.to_embedding().weight[1:])
        assert not layer.bias.any()
    assert torch.stack(weights).std().item() == pytest.approx(0.05, rel=0.15)
    assert torch.stack(words).std().item() == pytest.approx(0.05, rel=0.3)  # b has four entries
    assert not model.embeddings.word_embeddings(torch.tensor([0])).any()  # padding


@pytest.mark.parametrize("cls", CLASSES)
def test_every_weight_is_initialised(cls):
    assert all_finite(build(cls))


@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_initialises_every_missing_tensor(cls):
    # Past our own check: the loader itself must find our _init_weights.
    load = BertPreTrainedModel.from_pretrained.__func__
    model = load(cls, None, config=build(cls).config, state_dict={})
    assert all_finite(model)
    model = model.base_model
    factor_std = model.config.initializer_range**0.5
    assert model.get_submodule(QUERY).a.std().item() == pytest.approx(factor_std, rel=0.2)


def test_only_the_head_is_new_on_a_saved_encoder(tmp_path):
    encoder = build(KroneckerBertModel)
    encoder.save_pretrained(tmp_path)
    for cls in (KroneckerBertForSequenceClassification, KroneckerBertForMaskedLM):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert all_finite(model)
        assert info["missing_keys"]
        assert all(key.startswith(("classifier.", "cls.")) for key in info["missing_keys"])
        for name, tensor in model.bert.state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[name])


# What comes out


def test_sdpa_and_eager_agree():
    batch = tiny_batch()
    model = build(KroneckerBertModel)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**batch)[0], eager(**batch)[0])
    assert model(**batch, output_attentions=True).attentions == ()  # sdpa has none


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = tiny_batch() | {"labels": torch.tensor([0, 1, 2])}
    plain = build(KroneckerBertForSequenceClassification)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        model(**batch).loss.backward()
    assert checkpointed.bert.encoder.layer[0].gradient_checkpointing
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad)


def test_mean_pooling_ignores_padding():
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    pooled = mean_pooling(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0, :2].mean(0))
    assert not pooled[1].any()


def test_embeddings_of_sentences_do_not_depend_on_batch_or_order(tokenizer):
    model = build(KroneckerBertForMaskedLM).train()
    sentences = ["the cat sat on a mat .", "a dog", "the big dog ran under the small tree , ."]
    rows = embed(model, tokenizer, sentences, batch_size=2)
    assert rows.shape == (3, 32)
    assert model.bert.training
    assert not rows.is_inference()  # a classifier may be trained on them
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3))
    for sentence, row in zip(sentences, rows, strict=True):
        encoded = tokenizer(sentence, return_tensors="pt")
        hidden = model.eval().bert(**encoded).last_hidden_state
        torch.testing.assert_close(F.normalize(hidden.mean(1)[0], dim=-1), row)
    assert embed(model, tokenizer, []).shape == (0, 32)
    longer = embed(model, tokenizer, ["cat " * 100], normalize=False)  # truncated to 32
    assert longer.isfinite().all()
    with pytest.raises(TypeError, match="list of texts"):
        embed(model, tokenizer, "a dog")


@pytest.mark.parametrize("size", [-1, 0, 1.5, True, math.nan, "2", None])
def test_an_invalid_batch_size_is_refused(size, tokenizer):
    with pytest.raises(ValueError, match=r"batch_size = .* must be an integer of at least 1"):
        embed(build(KroneckerBertModel), tokenizer, ["a dog", "a cat"], batch_size=size)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, tokenizer: embed(model, tokenizer, ["a dog"]),
        lambda model, _: measure.latency({"one": model, "two": model.bert}, 1, 4, seconds=0.0),
        lambda model, _: report(model, tokens=4),
        lambda model, _: second_moments(model, [tiny_batch()], ["encoder.layer.0.output.dense"]),
        lambda model, tokenizer: evaluate(model, tokenizer, Table([1.0, 2.0], *[["a", "b"]] * 2)),
    ],
    ids=["embed", "latency", "report", "second_moments", "evaluate"],
)
def test_each_part_keeps_its_mode_even_after_an_error(run, fails, tokenizer, monkeypatch):
    """A frozen part in evaluation mode within a model that is trained, and the other way round."""
    monkeypatch.setattr("kroneckerbert.measure._LAYER_SECONDS", 0.0)
    monkeypatch.setattr("kroneckerbert.measure._MODEL_SECONDS", 0.0)
    model = build(KroneckerBertForMaskedLM).train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[1].eval().attention.train()
    before = {name: module.training for name, module in model.named_modules()}
    modes = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    if fails:
        layer = model.bert.encoder.layer[1].output
        layer.register_forward_pre_hook(lambda *_: pytest.fail("on purpose"))
        with pytest.raises(pytest.fail.Exception, match="on purpose"):
            run(model, tokenizer)
    else:
        run(model, tokenizer)
    assert modes and not any(modes)
    assert {name: module.training for name, module in model.named_modules()} == before


# Tied word embeddings


def assert_tied(model):
    words, decoder = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    assert decoder.a is words.a
    assert decoder.b is words.b
    assert decoder.bias is model.cls.predictions.bias


def test_the_decoder_is_tied_factor_by_factor_and_saved_once(tmp_path):
    model = build(KroneckerBertForMaskedLM)
    assert_tied(model)
    assert_tied(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert f"bert.{WORDS}.a" in names
    assert "cls.predictions.bias" in names
    assert not any("decoder" in name for name in names)
    assert_tied(KroneckerBertForMaskedLM.from_pretrained(tmp_path))


def test_the_tied_decoder_multiplies_by_the_embedding():
    model = build(KroneckerBertForMaskedLM)
    hidden = torch.randn(5, 32)
    table = model.bert.embeddings.word_embeddings.to_embedding().weight
    torch.testing.assert_close(model.cls.predictions.decoder(hidden), hidden @ table.T)


def test_the_shared_factors_get_the_gradients_of_lookup_and_decoder():
    tied, batch = build(KroneckerBertForMaskedLM), tiny_batch()
    untied = copy.deepcopy(tied)
    decoder = untied.cls.predictions.decoder
    decoder.a, decoder.b = (
        torch.nn.Parameter(decoder.a.clone()),
        torch.nn.Parameter(decoder.b.clone()),
    )
    for model in (tied, untied):
        model(**batch).logits.logsumexp(-1).sum().backward()
    table = tied.bert.embeddings.word_embeddings
    lookup = untied.bert.embeddings.word_embeddings
    for name in ("a", "b"):
        parts = getattr(lookup, name).grad, getattr(decoder, name).grad
        assert all(part.any() for part in parts)
        torch.testing.assert_close(getattr(table, name).grad, sum(parts))


def test_an_untied_decoder_stays_dense():
    model = KroneckerBertForMaskedLM(kronecker_config(tie_word_embeddings=False))
    assert type(model.cls.predictions.decoder) is torch.nn.Linear
    assert isinstance(model.bert.embeddings.word_embeddings, KroneckerEmbedding)


def test_a_dense_embedding_is_tied_as_in_stock_bert(tmp_path):
    config = KroneckerBertConfig.from_dense(BASE, {"intermediate.dense": {"a_shape": [8, 2]}})
    model = KroneckerBertForMaskedLM(config)
    words = model.bert.embeddings.word_embeddings
    assert model.cls.predictions.decoder.weight is words.weight
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    model = KroneckerBertForMaskedLM.from_pretrained(tmp_path)
    assert model(**tiny_batch()).logits.shape[-1] == 70


@pytest.mark.parametrize("mean", [True, False])
def test_the_vocabulary_grows_and_shrinks_at_its_end(mean, tmp_path):
    model = build(KroneckerBertForMaskedLM)
    batch = tiny_batch()
    before = model(**batch).logits
    old = model.bert.embeddings.word_embeddings.to_embedding().weight
    table = model.resize_token_embeddings(70, pad_to_multiple_of=16, mean_resizing=mean)
    assert table.num_embeddings == model.config.vocab_size == 80
    assert_tied(model)
    after = model(**batch).logits
    assert after.shape[-1] == 80
    assert torch.equal(after[..., :64], before)
    new = table.to_embedding().weight[64:]
    if mean:
        torch.testing.assert_close(new, old.mean(0).expand(16, -1))
    else:
        assert new.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)

    model.save_pretrained(tmp_path)
    again = KroneckerBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, after)
    model.resize_token_embeddings(64)
    assert torch.equal(model(**batch).logits, before)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_the_vocabulary_of_an_encoder_and_of_an_untied_model_grows():
    encoder = build(KroneckerBertForSequenceClassification)
    encoder.resize_token_embeddings(65)
    assert encoder(input_ids=torch.tensor([[64]])).logits.isfinite().all()
    untied = KroneckerBertForMaskedLM(kronecker_config(tie_word_embeddings=False))
    untied.resize_token_embeddings(65)
    assert untied(input_ids=torch.tensor([[64]])).logits.shape == (1, 1, 65)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(new_num_tokens=-1),
        dict(new_num_tokens=0),
        dict(new_num_tokens=60.0),
        dict(new_num_tokens=True),
        dict(new_num_tokens=math.nan),
        dict(new_num_tokens="60"),
        dict(new_num_tokens=60, pad_to_multiple_of=0),
        dict(new_num_tokens=60, pad_to_multiple_of=-8),
        dict(pad_to_multiple_of=8.0),
        dict(new_num_tokens=3),  # the padding's id is 5
    ],
    ids=str,
)
@pytest.mark.parametrize("words", ["dense", "factorised"])
def test_an_invalid_vocabulary_size_is_refused_and_changes_nothing(sizes, words, tied):
    config = kronecker_config(tie_word_embeddings=tied, pad_token_id=5)
    if words == "dense":
        config.kronecker_factors = {}
    model = KroneckerBertForMaskedLM(config)
    before, settings = tensors(model), config.to_dict()
    with pytest.raises(
        ValueError, match=r"must be an integer|leaves no row for the padding's id 5"
    ):
        model.resize_token_embeddings(**sizes)
    after = tensors(model)
    assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
    assert config.to_dict() == settings


@pytest.mark.parametrize("words", ["dense", "factorised"])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_parameters_stay_frozen_with_a_new_vocabulary(words, tied):
    config = kronecker_config(tie_word_embeddings=tied)
    if words == "dense":
        config.kronecker_factors = {}
    for frozen in ("word_embeddings", "decoder"):
        model = KroneckerBertForMaskedLM(config)
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)
        before = {name: p.requires_grad for name, p in tensors(model).items()}
        model.resize_token_embeddings(np.int64(65))
        after = {name: p.requires_grad for name, p in tensors(model).items()}
        assert after.keys() == before.keys()
        # Stock BERT puts the decoder's bias there when it grows.
        assert after | {"cls.predictions.bias": before["cls.predictions.bias"]} == before
        assert type(model.config.vocab_size) is int


# Saving and loading


@pytest.mark.parametrize("cls", CLASSES)
def test_a_saved_model_is_loaded_bit_for_bit(cls, tmp_path):
    model, batch = build(cls), tiny_batch()
    model.save_pretrained(tmp_path)
    expected = model(**batch)
    for loader in (cls, CLASSES[cls]):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is cls
        assert not any(info.values())
        assert not again.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        for x, y in zip(expected.to_tuple(), again(**batch).to_tuple(), strict=True):
            assert torch.equal(x, y)


def test_pipelines_take_a_path(tokenizer, tmp_path):
    encoder = build(KroneckerBertModel)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    features = pipeline("feature-extraction", model=str(tmp_path / "encoder"))("the cat sat")
    expected = encoder(**tokenizer("the cat sat", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), expected)

    classifier = build(KroneckerBertForSequenceClassification)
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    (answer,) = pipeline("text-classification", model=str(tmp_path / "classifier"))("a dog")
    assert answer["label"] in classifier.config.label2id


def test_half_precision_loads_and_runs(tmp_path):
    build(KroneckerBertModel).save_pretrained(tmp_path)
    model = KroneckerBertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.get_submodule(QUERY).a.dtype == torch.bfloat16
    assert model(**tiny_batch()).last_hidden_state.isfinite().all()


# Damaged and foreign checkpoints


def tamper(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def cast(state, name, dtype):
    state[name] = state[name].to(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"bert.{QUERY}.a"), rf"missing: bert\.{QUERY}\.a"),
        (lambda s: s.pop(f"bert.{WORDS}.b"), rf"missing: bert\.{WORDS}\.b"),
        (lambda s: s.pop("bert.embeddings.LayerNorm.weight"), r"missing: .*LayerNorm\.weight"),
        (
            lambda s: s.update({f"bert.{QUERY}.c": torch.ones(1)}),
            rf"unexpected: bert\.{QUERY}\.c",
        ),
        (lambda s: cast(s, f"bert.{QUERY}.a", torch.int32), rf"not of f.*{QUERY}\.a \(I32\)"),
        (lambda s: cast(s, f"bert.{QUERY}.a", torch.bool), rf"not of f.*{QUERY}\.a \(BOOL\)"),
        (lambda s: cast(s, f"bert.{WORDS}.b", torch.complex64), rf"not of f.*{WORDS}\.b \(C64\)"),
        (lambda s: s[f"bert.{QUERY}.b"][0, 0, 0].fill_(torch.nan), rf"{QUERY}\.b in .* has NaN"),
        (lambda s: s[f"bert.{WORDS}.a"][0, 3, 1].fill_(torch.inf), rf"{WORDS}\.a in .* has NaN"),
    ],
)
@pytest.mark.parametrize("cls", [KroneckerBertForMaskedLM, KroneckerBertModel])
def test_a_tampered_checkpoint_is_refused_with_the_tensors_name(cls, change, message, tmp_path):
    build(KroneckerBertForMaskedLM).save_pretrained(tmp_path)
    tamper(tmp_path, change)
    if cls is KroneckerBertModel:
        message = message.replace(r"bert\.", r"(bert\.)?")
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CLASSES[cls].from_pretrained(tmp_path, output_loading_info=True)


@pytest.mark.parametrize("ignored", [False, True])
def test_factors_of_another_shape_are_refused_even_if_mismatches_are_ignored(ignored, tmp_path):
    build(KroneckerBertModel).save_pretrained(tmp_path)
    other = KroneckerBertConfig.preset("kronecker-bert-21", BASE)
    with pytest.raises(ValueError, match=r"of another shape: embeddings.*\.a \(.*\) instead of \("):
        KroneckerBertModel.from_pretrained(tmp_path, config=other, ignore_mismatched_sizes=ignored)


def test_a_head_of_another_shape_is_drawn_only_on_request(tmp_path):
    build(KroneckerBertForSequenceClassification).save_pretrained(tmp_path)
    load = partial(KroneckerBertForSequenceClassification.from_pretrained, tmp_path, num_labels=5)
    message = r"classifier.weight \(3, 32\) instead of \(5, 32\).* ignore_mismatched_sizes=True"
    with pytest.raises(ValueError, match=message):
        load()
    assert load(ignore_mismatched_sizes=True).classifier.out_features == 5


def test_a_dense_checkpoint_is_refused_and_the_error_names_compress(tmp_path):
    BertForMaskedLM(BASE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"kroneckerbert\.compress"):
        KroneckerBertModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dense weights .* kroneckerbert\.compress"):
        KroneckerBertForMaskedLM.from_pretrained(tmp_path, config=kronecker_config())


# Full size


@pytest.mark.slow
def test_a_full_size_model_trains_a_step_and_is_loaded_again(tmp_path):
    model = KroneckerBertForSequenceClassification(KroneckerBertConfig.preset("kronecker-bert-21"))
    ids = torch.randint(1000, 30000, (2, 16))
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().bert.num_parameters() == 5_228_272
    model.save_pretrained(tmp_path)
    again = KroneckerBertForSequenceClassification.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # BLAS rounds by the alignment of its operands, and the file's is another.
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
