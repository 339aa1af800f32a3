"""Models so small that each test takes a moment, and their tokenizer."""

from collections.abc import Sequence

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
WORDS = ["a", "b", "c", "good", "bad", "film", "is", "this"]


def tiny_config(**overrides) -> BertConfig:
    return BertConfig(**SIZES | overrides)


def tiny_bert(cls: type = BertModel, **overrides):
    """A new model in evaluation mode; ``overrides`` are fields of its configuration."""
    return cls(tiny_config(**overrides)).eval()


def tiny_tokenizer(words: Sequence[str] = WORDS, **options) -> BertTokenizer:
    """A tokenizer of whole words, whose ids count from 5."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, **options)


def tiny_batch(rows: int = 3, tokens: int = 9, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random ids and their mask, both ``(rows, tokens)``; the first row is padded from 5 on."""
    ids = torch.randint(5, SIZES["vocab_size"], (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ids[mask == 0] = padding
    return {"input_ids": ids, "attention_mask": mask}


def exporting():
    """The module of exports; without it, or with too old a transformers, the test is skipped."""
    return pytest.importorskip(
        "kroneckerbert.exporting", reason="exports need transformers 5.23", exc_type=ImportError
    )
