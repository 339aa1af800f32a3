"""Unlabelled text for stage 1, tokenised once to files that may be larger than memory.

    texts = read_corpus("wikimedia/wikipedia", "20231101.en", share=0.1)
    source = describe_corpus("wikimedia/wikipedia", "20231101.en", share=0.1)
    tokenise_corpus(texts, tokenizer, folder, source)

    trainer = DistillationTrainer(
        student,
        teacher,
        train_dataset=Corpus(folder, tokenizer, pairs=True),
        data_collator=MaskedCollator(tokenizer),
    )

A folder contains the token ids of all documents, their offsets, and a description:

    tokens.bin     uint16, or uint32 for larger vocabularies; no special tokens
    offsets.bin    int64, documents + 1; document d is tokens[offsets[d]:offsets[d + 1]]
    corpus.json    source, tokenizer, counts
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from kron_kernels.shapes import check_integer
from kroneckerbert.data import numbered_lines
from kroneckerbert.files import replace_folder, writable_folder

_BATCH = 1000  # documents tokenised at a time
_PROBE = "A naïve TEST, it's 2x-y; 中文"  # tokenizer options on case, accents, punctuation, CJK


def read_corpus(
    source: str | Path, config: str | None = None, *, share: float = 1.0, seed: int = 0
) -> Iterator[str]:
    """Yield the documents of a file, a folder or a Hub dataset.

    Args:
        source: A UTF-8 file with one document per line, plain or ``.gz``; a folder, whose ``.txt``
            and ``.gz`` files are read in order of name; otherwise a Hub dataset with a column
            ``text``, such as ``wikimedia/wikipedia``, whose split ``train`` is streamed.
        config: Configuration of the Hub dataset, such as ``20231101.en``.
        share: Fraction of the documents to keep; a smaller share is a subset of a larger one.
        seed: Seed of the choice.

    Raises:
        ValueError: If ``share`` is not in (0, 1], the folder has no such file, a line is not UTF-8
            or the dataset lacks the configuration or the column.
        OSError: If a file or the Hub cannot be read.
        ImportError: If a Hub dataset is requested and ``datasets`` is not installed.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    texts: Iterator[str]
    if files := _text_files(source):
        texts = (line.strip() for path in files for _, line in numbered_lines(path))
    else:
        texts = _hub_texts(str(source), config)
    draw = random.Random(seed).random
    return (text for text in texts if draw() < share)


def describe_corpus(
    source: str | Path, config: str | None = None, *, share: float = 1.0, seed: int = 0
) -> str:
    """Describe what ``read_corpus`` reads, for the ``source`` of ``tokenise_corpus``.

    Files are identified by name and size: a folder may move but not change.
    """
    files = _text_files(source)
    size = sum(path.stat().st_size for path in files)
    name = f"{Path(source).name} ({len(files)} files, {size} bytes)" if files else str(source)
    return ", ".join(filter(None, [name, config, f"share {share:g} by seed {seed}"]))


def tokenise_corpus(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, folder: str | Path, source: str
) -> dict[str, int | str | dict[str, str]]:
    """Write the tokens of documents to a folder, unless an earlier call has done so.

    Reads 1,000 documents at a time, and none if the folder is complete. A run that fails or is
    killed leaves no folder that looks complete. Processes must not write the same folder at the
    same time: under ``Trainer``, use ``with args.main_process_first():``.

    Args:
        texts: The documents; those without tokens are skipped.
        tokenizer: Special tokens that occur in a text are tokenised as ordinary text.
        folder: A new or empty folder, or one that an earlier call filled.
        source: A description of the texts, see ``describe_corpus``.

    Returns:
        The content of ``corpus.json``: source, tokenizer, dtype, numbers of documents and tokens.

    Raises:
        ValueError: If the texts contain no token, or the folder holds documents of another source
            or ids of another tokenizer.
        FileExistsError: If the folder holds something else.
        OSError: If it cannot be written, for example because the disk is full.
    """
    folder = Path(folder)
    if (folder / "corpus.json").exists():
        summary = _read_summary(folder, tokenizer)
        if summary["source"] != source:
            raise ValueError(
                f"{folder} holds the corpus {summary['source']!r}, not {source!r}; remove it or "
                "choose another folder."
            )
        return summary

    writable_folder(folder)  # replace_folder alone would overwrite a model
    largest = max(tokenizer.get_vocab().values())
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    documents = tokens = 0
    with replace_folder(folder) as new:
        _append(new / "offsets.bin", np.zeros(1, "<i8"))
        texts = iter(texts)
        while batch := list(islice(texts, _BATCH)):
            rows = tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning that documents exceed the model's maximum length
            )["input_ids"]
            rows = [row for row in rows if row]
            ends = tokens + np.cumsum([len(row) for row in rows], dtype="<i8")
            _append(new / "tokens.bin", np.fromiter(chain.from_iterable(rows), dtype))
            _append(new / "offsets.bin", ends)
            documents += len(rows)
            tokens = int(ends[-1]) if rows else tokens
        if not tokens:
            raise ValueError(f"the corpus {source!r} has no text; it needs at least one document.")
        summary = {
            "source": source,
            "tokenizer": _identity(tokenizer),
            "dtype": dtype.str,
            "documents": documents,
            "tokens": tokens,
        }
        (new / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class Corpus(Dataset):
    """Sequences of a tokenised corpus for ``Trainer``, unpadded and unmasked.

    Item i is ``[CLS] segment [SEP]``. Each document is cut into segments of ``max_length`` tokens,
    special tokens included; its last segment may be shorter.

    With ``pack`` the documents are joined with ``[SEP]`` and then cut: all sequences but the last
    are full, which needs no padding but lets tokens attend across documents.

    With ``pairs`` item i is ``[CLS] A [SEP] B [SEP]`` for BERT's next-sentence prediction: a
    segment cut in two at a random place. In half of the items B is replaced by as many tokens of
    another document; ``next_sentence_label`` is then 1, else 0.

    An item depends only on the folder, these arguments and i. The files are memory-mapped: worker
    processes share them, and only 8 bytes per document are held in memory.

    Args:
        folder: A folder written by ``tokenise_corpus``.
        tokenizer: The tokenizer that it was written with.
        max_length: Maximum tokens of a sequence, at least 8; the paper's stage 1 uses 512.
        pairs: Whether to make pairs.
        pack: Whether to join documents.
        seed: Seed of the pairs.

    Raises:
        ValueError: If the tokenizer is another one, lacks ``[CLS]`` or ``[SEP]``, or has a smaller
            ``model_max_length``; if ``pairs`` is combined with ``pack`` or there is one document.
        OSError: If the folder holds no corpus, or an incomplete one.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        *,
        pairs: bool = False,
        pack: bool = False,
        seed: int = 0,
    ):
        if not 8 <= check_integer("max_length", max_length) <= tokenizer.model_max_length:
            raise ValueError(
                f"max_length must be from 8 to the tokenizer's model_max_length = "
                f"{tokenizer.model_max_length}, got {max_length}."
            )
        if pairs and pack:
            raise ValueError(
                "pairs=True needs separate documents, which packing joins; set pack=False."
            )
        self._cls, self._sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        if self._cls is None or self._sep is None:
            raise ValueError(
                f"{type(tokenizer).__name__} lacks [CLS] or [SEP], which every sequence needs; use "
                "a tokenizer of the BERT family."
            )
        self.folder = Path(folder).resolve()
        self.summary = _read_summary(self.folder, tokenizer)
        if pairs and self.summary["documents"] < 2:
            raise ValueError(
                f"pairs=True needs at least 2 documents, but {folder} has 1. Each line of a text "
                "file is a document."
            )
        self.pairs, self.pack, self.seed = pairs, pack, seed
        self._room = max_length - (3 if pairs else 2)
        self._open()

    def _open(self) -> None:
        self._tokens = np.memmap(self.folder / "tokens.bin", self.summary["dtype"], mode="r")
        self._offsets = np.memmap(self.folder / "offsets.bin", "<i8", mode="r")
        if self.pack:  # positions of the [SEP] after each document in the joined text
            self._ends = self._offsets[1:] + np.arange(self.summary["documents"])
            self._length = -(-int(self._ends[-1]) // self._room)
        else:  # number of segments up to and including each document
            self._ends = np.cumsum(-(-np.diff(self._offsets) // self._room))
            self._length = int(self._ends[-1])

    # Pickling a memmap would copy the whole file.
    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if not isinstance(v, np.ndarray)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        index = range(self._length)[index]  # IndexError past the end ends a for loop
        if self.pack:
            return {"input_ids": [self._cls, *self._packed(index).tolist(), self._sep]}
        document = int(np.searchsorted(self._ends, index, side="right"))
        before = self._ends[document - 1] if document else 0
        start, stop = self._offsets[document : document + 2]
        start += (index - before) * self._room
        segment = self._tokens[start : min(start + self._room, stop)]
        if self.pairs:
            return self._pair(index, document, segment)
        return {"input_ids": [self._cls, *segment.tolist(), self._sep]}

    def _packed(self, index: int) -> np.ndarray:
        start = index * self._room
        stop = min(start + self._room, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, (start, stop))
        tokens = self._tokens[start - first : stop - last]
        places = self._ends[first:last] - start - np.arange(last - first)
        # No [SEP] at either end, next to the sequence's own special tokens.
        inner = (places > 0) & (places < len(tokens))
        return np.insert(tokens, places[inner], self._sep)

    def _pair(self, index: int, document: int, segment: np.ndarray) -> dict[str, list[int] | int]:
        rng = np.random.default_rng((self.seed, index))
        cut = rng.integers(1, max(len(segment), 2))
        a, b = segment[:cut].tolist(), segment[cut:].tolist()
        is_random = rng.random() < 0.5 or not b
        if is_random:
            # From another document, and as long as the true part: the length reveals nothing.
            other = rng.integers(self.summary["documents"] - 1)
            start, stop = self._offsets[other + (other >= document) :][:2]
            length = max(len(b), 1)
            start += rng.integers(max(stop - start - length, 0) + 1)
            b = self._tokens[start : min(start + length, stop)].tolist()
        return {
            "input_ids": [self._cls, *a, self._sep, *b, self._sep],
            "token_type_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1),
            "next_sentence_label": int(is_random),
        }


@dataclass
class MaskedCollator(DataCollatorForLanguageModeling):
    """``DataCollatorForLanguageModeling`` whose masks depend only on the batch and the seed.

    A resumed run, on any number of workers, thus sees the same masks as an uninterrupted one.
    Shuffling changes the batches, and with them a text's mask in every epoch; only an identical
    batch, such as a single sequence, is masked the same way again. (The stock collator draws from
    one stream per worker, which restarts with every process.)

    At least one token per batch is masked, since the mean loss over none is NaN.

    The arguments are the stock collator's. Other fields of an item, such as
    ``next_sentence_label``, are passed through.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """

    seed: int = 0

    def create_rng(self, return_tensors: str | None = None) -> None:
        """Do nothing: the stock stream is not needed, and fails under other launchers."""

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask=None, offset_mapping=None
    ) -> tuple[Tensor, Tensor]:
        digest = hashlib.blake2b(b"%d " % self.seed + inputs.numpy().tobytes(), digest_size=8)
        self.generator: torch.Generator | None = torch.Generator()
        self.generator.manual_seed(int.from_bytes(digest.digest()))
        special = torch.isin(inputs, torch.tensor(self.tokenizer.all_special_ids))
        inputs, labels = super().torch_mask_tokens(inputs, special, offset_mapping)
        if (labels == -100).all() and not special.all():
            maskable = (~special).nonzero()
            one = tuple(maskable[torch.randint(len(maskable), (), generator=self.generator)])
            labels[one], inputs[one] = inputs[one].clone(), self.tokenizer.mask_token_id
        self.generator = None  # generators cannot be sent to spawned workers
        return inputs, labels


def _text_files(source: str | Path) -> list[Path]:
    """The files of a local source; empty for a Hub dataset."""
    path = Path(source)
    if not path.is_dir():
        return [path] if path.exists() else []
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".gz") and p.is_file())
    if not files:
        raise ValueError(f"{path} has no .txt or .gz file; a corpus has one document per line.")
    return files


def _hub_texts(name: str, config: str | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
        from huggingface_hub.errors import HTTPError  # whichever HTTP library it uses
    except ImportError as error:
        raise ImportError(
            f"{name} is not a file or folder; to read it from the Hub, "
            "pip install 'kron-kernels[data]'."
        ) from error
    try:
        for row in load_dataset(name, config, split="train", streaming=True):
            if "text" not in row:
                raise ValueError(
                    f"the dataset {name} must have a column 'text', it has {', '.join(row)}; write "
                    "its texts to a file with one document per line."
                )
            yield row["text"] or ""
    except (OSError, HTTPError) as error:
        raise OSError(
            f"{name} is not a file or folder, and cannot be read from the Hub ({error}); give a "
            "local text file with one document per line."
        ) from error


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Class name, for messages, and a hash of the vocabulary and a sample tokenisation."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    digest = hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "sha256": digest}


def _read_summary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict:
    """corpus.json, after checking it against the tokenizer and the sizes of the files."""
    path = folder / "corpus.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no corpus; write one with tokenise_corpus.")
    summary = json.loads(path.read_text())
    was, now = summary["tokenizer"], _identity(tokenizer)
    if was["sha256"] != now["sha256"]:
        raise ValueError(
            f"{folder} was tokenised by a {was['class']} with the vocabulary hash "
            f"{was['sha256'][:12]}, not by this {now['class']} with {now['sha256'][:12]}; use the "
            "same vocabulary and options, or tokenise to another folder."
        )
    sizes = {
        "tokens.bin": summary["tokens"] * np.dtype(summary["dtype"]).itemsize,
        "offsets.bin": 8 * (summary["documents"] + 1),
    }
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise OSError(
                f"{folder / name} must have {size} bytes, but has {found}: it was changed or "
                "truncated. Remove the folder and tokenise again."
            )
    return summary


def _append(path: Path, values: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(values.tobytes())
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the corpus ({error.strerror}); free space or choose another disk",
            str(path),
        ) from error
