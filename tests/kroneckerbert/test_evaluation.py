"""Metrics compared with numbers computed by hand."""

import math

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from kroneckerbert import compress, embed
from kroneckerbert.data import Table
from kroneckerbert.evaluation import evaluate, similarity

WORDS = ["zero", "one", "two", "three", "x", "y"]
SIZES = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(WORDS)


def bert(cls=BertModel, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return tiny_bert(cls, **SIZES | overrides)


class Oracle(nn.Module):
    """A head that predicts the label named by the second token."""

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    def forward(self, input_ids, **kwargs):
        word = input_ids[:, 1] - 5
        if self.num_labels == 1:
            return word[:, None].float()
        return torch.nn.functional.one_hot(word, self.num_labels).float()


def predicting(words: str, num_labels: int, labels: list, tokenizer) -> dict[str, float]:
    """Metrics of a model that predicts the labels named by the words, on texts of mixed lengths."""
    model = bert(BertForSequenceClassification, num_labels=num_labels)
    oracle = Oracle(num_labels)

    def forward(**batch):
        return type("Output", (), {"logits": oracle(**batch)})

    model.forward = forward
    texts = [f"{word} {'x ' * (5 * i % 7)}" for i, word in enumerate(words.split())]
    return evaluate(model, tokenizer, Table(labels, texts), batch_size=2)


def test_a_binary_classifier_has_the_f1_of_label_1(tokenizer):
    # 2 true positives, 1 false positive, 2 false negatives, 1 true negative
    metrics = predicting("one one one zero zero zero", 2, [1, 1, 0, 1, 1, 0], tokenizer)
    assert metrics == pytest.approx(
        {
            "accuracy": 3 / 6,
            "f1": 2 * 2 / (2 * 2 + 1 + 2),
            "matthews": (2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3),
        }
    )


def test_a_classifier_of_several_labels_has_the_mean_f1(tokenizer):
    metrics = predicting("zero one two two", 3, [0, 1, 2, 1], tokenizer)
    # By label: 1, 2/3, 2/3. Matthews in Gorodkin's form: c = 3 right of s = 4,
    # predicted (1, 1, 2) and true (1, 2, 1) times.
    matthews = (3 * 4 - (1 + 2 + 2)) / math.sqrt((16 - 6) * (16 - 6))
    expected = {"accuracy": 3 / 4, "f1": (1 + 2 / 3 + 2 / 3) / 3, "matthews": matthews}
    assert metrics == pytest.approx(expected)


def test_a_regression_has_the_correlations_of_its_predictions(tokenizer):
    metrics = predicting("zero one two three", 1, [0.0, 1.0, 8.0, 4.0], tokenizer)
    # Ranks 0 1 2 3 against 0 1 3 2; deviations (-1.5, -0.5, 0.5, 1.5), (-3.25, -2.25, 4.75, 0.75).
    assert metrics["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    covariance = 1.5 * 3.25 + 0.5 * 2.25 + 0.5 * 4.75 + 1.5 * 0.75
    squares = 3.25**2 + 2.25**2 + 4.75**2 + 0.75**2
    assert metrics["pearson"] == pytest.approx(covariance / math.sqrt(5 * squares))


def test_words_are_labels_by_label2id(tokenizer):
    model = bert(
        BertForSequenceClassification, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    texts = ["one x", "two", "three y y"]
    by_name = evaluate(model, tokenizer, Table(["yes", "no", "yes"], texts))
    assert by_name == evaluate(model, tokenizer, Table([1, 0, 1], texts))
    with pytest.raises(ValueError, match="no label 'maybe'"):
        evaluate(model, tokenizer, Table(["maybe"], ["one"]))


def test_predictions_do_not_depend_on_batches_and_the_mode_is_restored(tokenizer):
    model = bert(BertForSequenceClassification, num_labels=1).train()
    texts = ["one", "x y x y", "two three", "y", "x " * 99]  # the last is truncated
    table = Table([1.0, 2.0, 5.0, 3.0, 4.0], texts, texts[::-1])
    alone, together = (evaluate(model, tokenizer, table, batch_size=n) for n in (1, 5))
    assert alone == pytest.approx(together, abs=1e-5)
    assert model.training


def test_a_bare_encoder_is_evaluated_by_the_cosines_of_pairs(tokenizer):
    model = bert()
    table = Table([1, 5, 3], ["one x", "two", "x"], ["x", "two", "y y"])
    first, second = (embed(model, tokenizer, texts) for texts in (table.texts, table.texts_b))
    cosines = (first * second).sum(-1)
    expected = torch.corrcoef(torch.stack([cosines, torch.tensor([1.0, 5.0, 3.0])]))[0, 1]
    metrics = evaluate(model, tokenizer, table)
    assert metrics["pearson"] == pytest.approx(expected.item(), abs=1e-5)
    assert cosines.argmax() == 1  # a text with itself: ranks agree if the other two do
    assert metrics["spearman"] == pytest.approx(1.0 if cosines[2] > cosines[0] else 0.5, abs=1e-5)


def test_a_model_without_a_head_refuses_labels_it_cannot_predict(tokenizer):
    for table in (Table([1], ["one"]), Table(["yes"], ["one"], ["two"])):
        with pytest.raises(ValueError, match=r"BertModel has no head for labels.*second text"):
            evaluate(bert(), tokenizer, table)


def test_a_copy_is_similar_and_an_unrelated_model_is_not(tokenizer):
    teacher = bert()
    sentences = [" ".join(WORDS[i % 6 :] + WORDS[: i // 6]) for i in range(24)]
    same = similarity(teacher, teacher, tokenizer, sentences)
    assert same == pytest.approx({"cosine": 1.0, "ranking": 1.0}, abs=1e-5)
    stranger = similarity(bert(seed=1), teacher, tokenizer, sentences)
    assert abs(stranger["cosine"]) < 0.9
    assert stranger == similarity(bert(seed=1), teacher, tokenizer, sentences)  # the same pairs
    student = similarity(compress(teacher), teacher, tokenizer, sentences)
    assert stranger["cosine"] < student["cosine"] < 1


def test_ranking_ignores_a_rotation_that_the_cosine_sees(tokenizer, monkeypatch):
    rows = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    model, teacher = bert(), bert(seed=1)
    monkeypatch.setattr(
        "kroneckerbert.evaluation.embed", lambda m, *_, **__: -rows if m is model else rows
    )
    metrics = similarity(model, teacher, tokenizer, [*WORDS, "one x", "two x"])
    assert metrics == pytest.approx({"cosine": -1.0, "ranking": 1.0}, abs=1e-5)


def test_too_few_sentences_or_other_widths_cannot_be_compared(tokenizer):
    with pytest.raises(ValueError, match="2 different sentences"):
        similarity(bert(), bert(), tokenizer, ["one", "two", "two"])
    with pytest.raises(ValueError, match=r"hidden_size .* 16 and 8"):
        similarity(bert(), bert(hidden_size=8), tokenizer, ["one", "two", "three"])
