"""Ready students, in this package: no hub and no download.

    encoder = kroneckerbert.load("minilm-8x")
    vectors = encoder.encode(["A text.", "Another one."])  # (2, 384), of unit length

Each is a folder here, written by the recipe of its name: ``kroneckerbert reproduce minilm-8x``.
``README.md`` in it is its card, ``student.json`` its scores and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kroneckerbert.files import damaged, read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ABOUT = "student.json"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """The names of the students in the package."""
    return sorted(path.parent.name for path in _HERE.glob(f"*/{ABOUT}"))


def path(name: str) -> str:
    """The folder of a student, which ``SentenceTransformer`` and ``AutoModel`` load as well.

    A string, since ``SentenceTransformer`` takes no ``Path``.

    Raises:
        ValueError: If the package has no student of this name.
    """
    if name not in names():
        raise ValueError(
            f"there is no student {name!r}; the package has {', '.join(names()) or 'none'}."
        )
    return str(_HERE / name)


def about(name: str) -> dict[str, Any]:
    """What a student is and does: parameters, bytes, scores and milliseconds, with its teacher's.

    Raises:
        ValueError: If the package has no student of this name.
    """
    return read_json(Path(path(name)) / ABOUT)


def load(name: str) -> SentenceEncoder:
    """A ready student by its name, or a sentence encoder from a folder.

    Raises:
        ValueError: If there is none of this name, or the folder's vectors are not unit means.
        OSError: If a file is missing or damaged.
    """
    if name not in names() and Path(name).is_dir():
        return SentenceEncoder(Path(name))
    return SentenceEncoder(Path(path(name)), name)


class SentenceEncoder:
    """A model whose sentence vectors are the means over its tokens, scaled to unit length.

    Args:
        folder: A saved model with its ``tokenizer.json``.
        name: Of a student of this package, whose remedy is another installation.

    Attributes:
        model: The transformers model, in evaluation mode.
        max_length: Tokens of a text that are read, special ones included.

    Raises:
        ValueError: If the folder is a SentenceTransformer's with other modules.
        OSError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, name: str | None = None):
        from tokenizers import Tokenizer

        from kroneckerbert.loading import load as load_model
        from kroneckerbert.modeling_kroneckerbert import positions
        from kroneckerbert.rebuilding import without_bars

        if problem := damaged(folder):
            remedy = "save the model again"
            if name is not None:
                remedy = "pip install --force-reinstall --no-deps kron-kernels"
            raise OSError(f"{problem}. To resolve: {remedy}.")
        _check_modules(folder)
        self.folder = folder
        with without_bars():
            self.model = load_model(folder, "AutoModel")
        self.max_length = positions(self.model)
        if (settings := folder / "sentence_bert_config.json").is_file():
            limit = read_json(settings).get("max_seq_length")
            self.max_length = min(self.max_length, limit or self.max_length)
        # Six times as fast to load as transformers' tokenizer of the same file.
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.max_length)
        self._tokenizer.no_padding()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder.name!r}, {type(self.model).__name__})"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """transformers' tokenizer of the same folder."""
        from kroneckerbert.loading import load_tokenizer

        return load_tokenizer(self.folder)

    def encode(self, texts: str | Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit vectors of texts: their dot products are cosine similarities.

        Args:
            texts: One text or several; what exceeds ``max_length`` tokens is left out.
            batch_size: Texts in a forward pass, batched by length.

        Returns:
            float32, shape ``(width,)`` for one text, ``(texts, width)`` for several.

        Raises:
            TypeError: If something is not a text.
            ValueError: If ``batch_size`` is not a positive integer.
        """
        import torch
        import torch.nn.functional as F

        from kron_kernels.modules import evaluating
        from kron_kernels.shapes import check_integer
        from kroneckerbert.data import by_length
        from kroneckerbert.modeling_kroneckerbert import mean_pooling

        batch_size = check_integer("batch_size", batch_size)
        given = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in given if not isinstance(text, str)]:
            raise TypeError(f"texts must be strings, got {wrong[0]!r:.80}.")
        model = self.model
        ids = [torch.tensor(e.ids) for e in self._tokenizer.encode_batch(given)]
        rows = torch.empty(len(given), model.config.hidden_size, device=model.device)
        order = by_length([len(row) for row in ids])
        pad = torch.nn.utils.rnn.pad_sequence
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = pad([ids[i] for i in chosen], True, model.config.pad_token_id or 0)
                lengths = torch.tensor([len(ids[i]) for i in chosen])
                mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long().to(model.device)
                hidden = model(input_ids=batch.to(model.device), attention_mask=mask)
                vectors = mean_pooling(hidden.last_hidden_state.float(), mask)
                rows[chosen] = F.normalize(vectors, dim=-1)
        return rows[0] if isinstance(texts, str) else rows

    def search(
        self, query: str, texts: Sequence[str], top: int = 5, vectors: Tensor | None = None
    ) -> list[tuple[float, int]]:
        """The texts nearest to a query: their cosine similarities and indices, the nearest first.

        Args:
            query: A text.
            texts: The texts to search.
            top: How many to return.
            vectors: Of the texts, if they are known.

        Raises:
            TypeError, ValueError: As ``encode``.
        """
        from kron_kernels.shapes import check_integer

        vectors = self.encode(texts) if vectors is None else vectors
        found = (vectors @ self.encode(query)).topk(min(check_integer("top", top), len(vectors)))
        return list(zip(found.values.tolist(), found.indices.tolist(), strict=True))


def _check_modules(folder: Path) -> None:
    """Refuse a SentenceTransformer whose vectors are not unit means over tokens."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    modules = json.loads(path.read_text("utf-8"))
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    means = kinds == ["Transformer", "Pooling", "Normalize"]
    if means:
        pooling = read_json(folder / modules[1]["path"] / "config.json")
        modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value}
        means = (modes or {f"pooling_mode_{pooling.get('pooling_mode')}_tokens"}) == {
            "pooling_mode_mean_tokens"
        }
    if not means:
        raise ValueError(
            f"{folder} has the modules {', '.join(kinds)}, not a mean over tokens and a "
            "normalisation; load it with sentence_transformers.SentenceTransformer."
        )
