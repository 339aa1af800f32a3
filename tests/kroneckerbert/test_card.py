"""Model cards: metadata for the Hub, the numbers, and no trace of the machine."""

import platform
import socket

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from tiny import tiny_bert
from transformers import BertForSequenceClassification

from kroneckerbert import compress
from kroneckerbert.reproduction.card import Score, machine, model_card, without_paths


@pytest.fixture(scope="module")
def student():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 16}
    return compress(tiny_bert(BertForSequenceClassification, **sizes), "kronecker-bert-8")


@pytest.fixture
def facts() -> dict:
    timing = {"median": 4.0, "low": 3.5, "high": 5.0}
    return {
        "name": "small, sst2",
        "dense_parameters": 12_345,
        "recipe": {
            "teacher": "google-bert/bert-base-uncased",
            "student": {"preset": "kronecker-bert-8"},
            "seeds": [0, 1],
            "stage1": {
                "corpus": {"source": "wikimedia/wikipedia", "share": 0.1},
                "arguments": {"learning_rate": 0.001},
            },
            "fine_tuning": {"arguments": {"num_train_epochs": 3}},
            "stage2": {"batch_size": 32},
            "tasks": {"sst2": {"stage2": {"arguments": {"learning_rate": 0.0005}}}, "rte": {}},
            "card": {"license": "apache-2.0", "language": "en", "data": ["Wikipedia: CC BY-SA"]},
        },
        "scores": [
            Score("sst2", "validation", "accuracy", 92.5, {0: 90.0, 1: 91.0}, {"BERT_8": 91.1}),
            Score("imdb", "test", "accuracy", 88.0, {0: 80.0, 1: 84.0}, {}),
        ],
        "seed": 1,
        "latency": {
            "machine": "x86_64, AVX512",
            "threads": 2,
            "dtype": "float32",
            "tokens": 128,
            "milliseconds": {"1": {"teacher": timing | {"median": 8.0}, "student": timing}},
        },
    }


def test_the_hub_can_read_the_metadata(student, facts, tmp_path):
    model_card(student, **facts).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-classification"
    assert header["license"] == "apache-2.0" and header["language"] == "en"
    assert header["base_model"] == "google-bert/bert-base-uncased"
    assert header["datasets"] == ["wikimedia/wikipedia", "nyu-mll/glue", "stanfordnlp/imdb"]
    data = ModelCard.load(tmp_path / "README.md").data
    assert isinstance(data, ModelCardData) and data.model_name == "small, sst2"
    results = {result.dataset_name: result for result in data.eval_results}
    # Of this student, not of all seeds.
    assert results["sst2"].metric_value == 91.0 and results["imdb"].metric_value == 84.0
    assert results["sst2"].dataset_config == "sst2"
    assert results["imdb"].dataset_split == "test"


def test_the_text_has_the_numbers(student, facts):
    text = str(model_card(student, **facts))
    assert "90.50 ± 0.71 (90.00 to 91.00)" in text and "| 92.50 |" in text and "91.1" in text
    assert f"{sum(p.numel() for p in student.parameters()):,} parameters" in text
    assert "12,345" in text
    assert "| 1 | 8.00 (3.50 to 5.00) | 4.00 (3.50 to 5.00) | 2.00 |" in text
    assert "2 CPU threads" in text and "x86_64, AVX512" in text
    assert "8x2 ⊗ 4x8" in text and "word_embeddings` |" in text
    assert "import kroneckerbert" in text and "AutoModelForSequenceClassification" in text
    assert "- Wikipedia: CC BY-SA" in text
    assert "| stage 2, sst2 | batch_size 32, learning_rate 0.0005 |" in text
    assert "rte" not in text.split("## Hyper-parameters")[1].split("## Recipe")[0]
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == facts["recipe"]
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_the_card_reveals_nothing_of_the_machine(student, facts, tmp_path):
    facts["recipe"]["teacher"] = str(tmp_path / "my-bert")
    facts["recipe"]["stage1"]["corpus"]["source"] = "~/texts/all.txt.gz"
    facts["recipe"]["tasks"]["sst2"] = {"fine_tuning": {"model": "./tuned/sst2"}}
    card = model_card(student, **facts)
    text = str(card)
    for trace in (str(tmp_path), str(tmp_path.parent), "~/", "./tuned", socket.gethostname()):
        assert trace not in text
    assert "`my-bert`" in text and "all.txt.gz" in text
    assert card.data.base_model is None
    assert platform.node() not in machine()


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("wikimedia/wikipedia", "wikimedia/wikipedia"),
        ("package:kroneckerbert/demo/text/sentences.txt.gz",) * 2,
        ("/data/big/bert/", "bert"),
        ("C:\\models\\bert", "bert"),
        ("../bert", "bert"),
        ("a sentence / of words / here",) * 2,
        ("https://example.org/a/b",) * 2,
        ({"a": ["/x/y"], "b": 3}, {"a": ["y"], "b": 3}),
    ],
)
def test_paths_are_reduced_to_their_last_part(value, public):
    assert without_paths(value) == public


def test_a_card_of_stage_1_has_no_scores(student, facts):
    facts |= {"scores": (), "latency": None, "seed": None}
    text = str(model_card(student, **facts))
    assert "## Scores" not in text and "## Latency" not in text and "model-index" not in text


def test_one_seed_has_no_spread():
    assert str(Score("sst2", "validation", "accuracy", 92.5, {3: 90.0}, {})) == "90.00 (one seed)"
