"""A student takes the head of its teacher's task."""

import pytest
import torch
from tiny import tiny_bert
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from kroneckerbert import compress
from kroneckerbert.distillation.heads import with_head_of

FACTORS = {"query": {"a_shape": [4, 4]}, "word_embeddings": {"a_shape": [64, 4]}}
IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize(
    "cls, options",
    [
        (BertForSequenceClassification, {"id2label": {0: "no", 1: "perhaps", 2: "yes"}}),
        (BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
        (BertForQuestionAnswering, {}),
        (BertForMaskedLM, {}),
    ],
)
def test_a_headless_student_gets_its_teachers_head_and_keeps_its_body(tmp_path, cls, options):
    body = compress(tiny_bert(BertModel), FACTORS)
    body.save_pretrained(tmp_path)
    teacher = tiny_bert(cls, **options)
    student = with_head_of(teacher, tmp_path).eval()
    assert type(student).__name__ == f"Kronecker{cls.__name__}"
    assert student.config.id2label == teacher.config.id2label
    assert student.config.problem_type == teacher.config.problem_type
    for name, p in student.named_parameters():
        mine, _, rest = name.partition("bert.")
        if not mine and not rest.startswith("pooler."):
            torch.testing.assert_close(p, body.get_parameter(rest), rtol=0, atol=0)
        else:
            torch.testing.assert_close(p, teacher.get_parameter(name), rtol=0, atol=0)
    if cls is BertForSequenceClassification:
        with torch.no_grad():
            pooled = torch.tanh(
                teacher.bert.pooler.dense(body(IDS).last_hidden_state[:, 0])
            )  # the teacher's fine-tuned pooler
            torch.testing.assert_close(student(IDS).logits, teacher.classifier(pooled))


def test_a_tied_decoder_does_not_bring_the_teachers_words(tmp_path):
    body = compress(tiny_bert(BertModel), {"query": {"a_shape": [4, 4]}})  # words stay dense
    body.save_pretrained(tmp_path)
    student = with_head_of(tiny_bert(BertForMaskedLM), tmp_path)
    words = body.embeddings.word_embeddings.weight
    torch.testing.assert_close(student.bert.embeddings.word_embeddings.weight, words)


def test_a_student_keeps_its_own_head(tmp_path):
    own = compress(tiny_bert(BertForSequenceClassification, num_labels=3), FACTORS)
    own.save_pretrained(tmp_path)
    teacher = tiny_bert(BertForSequenceClassification, num_labels=3)
    kept = with_head_of(teacher, tmp_path)
    torch.testing.assert_close(kept.classifier.weight, own.classifier.weight)


def test_a_teacher_without_a_head_is_refused(tmp_path):
    compress(tiny_bert(BertModel), FACTORS).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="a BertModel has no head to copy"):
        with_head_of(tiny_bert(BertModel), tmp_path)
