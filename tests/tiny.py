"""Models so small that each test takes a moment, and their tokenizer."""

from collections.abc import Sequence

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
