"""From text to batches for stage 1: tokenised once, cut, paired and masked reproducibly."""

import gzip
import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from itertools import islice
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import BertForPreTraining, Trainer, TrainingArguments

from kroneckerbert.reproduction import corpus as module
from kroneckerbert.reproduction.corpus import (
    Corpus,
    MaskedCollator,
    describe_corpus,
    read_corpus,
    tokenise_corpus,
)

WORDS = [f"w{i}" for i in range(500)]
SPECIAL = PAD, UNK, CLS, SEP, MASK = range(5)


def make_tokenizer(words=WORDS, **options):
    return tiny_tokenizer(words, **{"model_max_length": 512, **options})


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def documents(*lengths: int) -> list[str]:
    """Every word of the first documents is a different one."""
    words = iter(WORDS * (1 + sum(lengths) // len(WORDS)))
    return [" ".join(islice(words, length)) for length in lengths]


def make_corpus(tmp_path, tokenizer, texts, max_length=12, **options) -> Corpus:
    tokenise_corpus(texts, tokenizer, tmp_path / "corpus", "test")
    return Corpus(tmp_path / "corpus", tokenizer, max_length, **options)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Tokenising


def test_documents_are_stored_one_after_another_without_special_tokens(tmp_path, tokenizer):
    texts = ["w0 w1", "", "w2 [SEP] W3", "  ", "w4"]
    summary = tokenise_corpus(texts, tokenizer, tmp_path / "corpus", "five lines")
    tokens = np.fromfile(tmp_path / "corpus" / "tokens.bin", np.uint16).tolist()
    offsets = np.fromfile(tmp_path / "corpus" / "offsets.bin", np.int64).tolist()
    assert tokens == [5, 6, 7, UNK, UNK, UNK, 8, 9]  # "[SEP]" is text: a bracket, a word, a bracket
    assert offsets == [0, 2, 7, 8]
    assert (summary["documents"], summary["tokens"], summary["source"]) == (3, 8, "five lines")
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text()) == summary


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    tokenizer = make_tokenizer([f"w{i}" for i in range(70_000)])
    corpus = make_corpus(tmp_path, tokenizer, ["w69999 w0"])
    assert corpus[0]["input_ids"] == [CLS, 70_004, 5, SEP]


def test_batches_of_documents_change_nothing_and_hold_no_more_than_one(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(module, "_BATCH", 3)
    texts, taken, sizes = documents(*[4] * 10), [], []

    def source():
        for text in texts:
            written = tmp_path / ".whole.kroneckerbert-partial" / "tokens.bin"
            sizes.append(written.stat().st_size if written.exists() else 0)
            taken.append(text)
            yield text

    tokenise_corpus(source(), tokenizer, tmp_path / "whole", "test")
    # By the time a document is asked for, all batches before its own are on the disk.
    assert sizes == [24 * (i // 3) for i in range(10)]
    corpus = Corpus(tmp_path / "whole", tokenizer)
    assert [item["input_ids"] for item in corpus] == [
        [CLS, *ids(tokenizer, text), SEP] for text in texts
    ]


def test_a_finished_folder_is_used_again_without_reading_a_text(tmp_path, tokenizer):
    def unread():
        raise AssertionError
        yield

    first = tokenise_corpus(["w0"], tokenizer, tmp_path / "corpus", "test")
    assert tokenise_corpus(unread(), tokenizer, tmp_path / "corpus", "test") == first


def test_another_source_or_tokenizer_is_named(tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    tokenise_corpus(["w0"], tokenizer, folder, "test")
    with pytest.raises(ValueError, match=r"corpus holds the corpus 'test', not 'other'; remove it"):
        tokenise_corpus(["w1"], tokenizer, folder, "other")
    cased = make_tokenizer([*WORDS, "a", "A"], do_lower_case=False)
    uncased = make_tokenizer([*WORDS, "a", "A"])
    tokenise_corpus(["w0"], cased, tmp_path / "cased", "test")
    for there, other in [(folder, cased), (tmp_path / "cased", uncased)]:
        with pytest.raises(
            ValueError, match=r"tokenised by a BertTokenizer with .* hash \w{12}, n"
        ):
            tokenise_corpus(["w0"], other, there, "test")
        with pytest.raises(ValueError, match="use the same vocabulary and options"):
            Corpus(there, other)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="use the same vocabulary"):
        Corpus(folder, tokenizer)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, tokenizer, monkeypatch, error):
    monkeypatch.setattr(module, "_BATCH", 1)

    def source():
        yield "w0"
        raise error

    with pytest.raises(error):
        tokenise_corpus(source(), tokenizer, tmp_path / "out" / "corpus", "test")
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path, tokenizer):
    out = tmp_path / "out" / "corpus"

    def source():
        yield from documents(module._BATCH)[0].split()  # a whole batch, which is written
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    process = multiprocessing.get_context("fork").Process(
        target=tokenise_corpus, args=(source(), tokenizer, out, "test")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in out.parent.iterdir()] == [".corpus.kroneckerbert-partial"]
    with pytest.raises(FileNotFoundError, match="holds no corpus; write one with tokenise_corpus"):
        Corpus(out, tokenizer)
    tokenise_corpus(["w2"], tokenizer, out, "test")
    assert [path.name for path in out.parent.iterdir()] == ["corpus"]
    assert [item["input_ids"] for item in Corpus(out, tokenizer)] == [[CLS, 7, SEP]]


def test_a_disk_that_refuses_to_grow_is_named_and_leaves_nothing(tmp_path, tokenizer):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"cannot write the corpus \(.*\); free space.*tokens\.bin"
        ):
            tokenise_corpus(documents(3000), tokenizer, tmp_path / "out" / "corpus", "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "config.json").touch()
    with pytest.raises(FileExistsError, match="holds a model"):
        tokenise_corpus(["w0"], tokenizer, tmp_path, "test")


def test_a_corpus_without_text_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="the corpus 'nothing' has no text"):
        tokenise_corpus(["", " "], tokenizer, tmp_path / "corpus", "nothing")
    assert not (tmp_path / "corpus").exists()


def test_a_file_cut_short_is_an_error(tmp_path, tokenizer):
    make_corpus(tmp_path, tokenizer, ["w0 w1"])
    (tmp_path / "corpus" / "tokens.bin").write_bytes(b"\0\0")
    with pytest.raises(OSError, match=r"tokens.bin must have 4 bytes, but has 2"):
        Corpus(tmp_path / "corpus", tokenizer)


# Sequences


def test_documents_are_cut_into_consecutive_segments(tmp_path, tokenizer):
    texts = documents(3, 25, 10, 11)
    expected = [
        [CLS, *ids(tokenizer, text)[start : start + 10], SEP]
        for text in texts
        for start in range(0, len(text.split()), 10)
    ]
    corpus = make_corpus(tmp_path, tokenizer, texts)
    assert [item["input_ids"] for item in corpus] == expected
    assert len(corpus) == len(expected) == 1 + 3 + 1 + 2
    assert corpus[-1] == corpus[6]
    with pytest.raises(IndexError):
        corpus[7]


@pytest.mark.parametrize(
    "lengths", [(1,), (10,), (10, 1), (9, 10), (20,), (5, 5, 1), (1,) * 30, (3, 25, 10, 11, 40)]
)
def test_packed_documents_are_one_text_with_separators(tmp_path, tokenizer, lengths):
    texts = documents(*lengths)
    stream = [token for text in texts for token in (*ids(tokenizer, text), SEP)][:-1]
    corpus = make_corpus(tmp_path, tokenizer, texts, pack=True)
    chunks = [stream[start : start + 10] for start in range(0, len(stream), 10)]
    for chunk in chunks:  # no two [SEP] side by side
        del chunk[-1 if chunk[-1] == SEP else len(chunk) :]
        del chunk[: chunk[0] == SEP]
    assert [item["input_ids"] for item in corpus] == [[CLS, *chunk, SEP] for chunk in chunks]


def test_half_of_the_pairs_continue_and_half_are_of_another_document(tmp_path, tokenizer):
    texts = [" ".join(WORDS[10 * i : 10 * i + 10]) for i in range(50)] * 20
    rows = [ids(tokenizer, text) for text in texts]
    corpus = make_corpus(tmp_path, tokenizer, texts, 13, pairs=True)
    assert len(corpus) == 1000
    cuts = set()
    for row, item in zip(rows, corpus, strict=True):
        tokens, types = np.array(item["input_ids"]), np.array(item["token_type_ids"])
        assert len(tokens) == len(types) == 13
        (first, *a, sep), (*b, last) = tokens[types == 0], tokens[types == 1]
        assert (first, sep, last) == (CLS, SEP, SEP)
        assert a == row[: len(a)]
        assert (
            b == row[len(a) :]
            if item["next_sentence_label"] == 0
            else b
            in ([*other[start : start + len(b)]] for other in rows[:50] for start in range(10))
        )
        cuts.add(len(a))
    labels = [item["next_sentence_label"] for item in corpus]
    assert 450 < sum(labels) < 550
    assert cuts == set(range(1, 10))


def test_the_other_document_is_never_the_same_and_a_lone_token_has_no_continuation(
    tmp_path, tokenizer
):
    corpus = make_corpus(tmp_path, tokenizer, ["w0", "w1 w2 w3 w4"] * 40, 13, pairs=True)
    even, odd = [corpus[i] for i in range(0, 80, 2)], [corpus[i] for i in range(1, 80, 2)]
    assert {item["next_sentence_label"] for item in even} == {1}
    assert {len(item["input_ids"]) for item in even} == {5}  # no longer than the true ones
    assert {item["next_sentence_label"] for item in odd} == {0, 1}
    two = tokenise_corpus(["w0 w1", "w2 w3"], tokenizer, tmp_path / "two", "test")
    assert two["documents"] == 2
    for seed in range(20):
        first, second = Corpus(tmp_path / "two", tokenizer, pairs=True, seed=seed)
        assert first["input_ids"][3] in ([6] if first["next_sentence_label"] == 0 else [7, 8])
        assert second["input_ids"][3] in ([8] if second["next_sentence_label"] == 0 else [5, 6])


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"pairs": True}])
def test_an_item_depends_on_seed_and_index_alone(tmp_path, tokenizer, options):
    corpus = make_corpus(tmp_path, tokenizer, documents(*range(1, 30)), **options)
    items = list(corpus)
    assert [corpus[i] for i in reversed(range(len(corpus)))] == items[::-1]
    again = Corpus(tmp_path / "corpus", tokenizer, 12, seed=1, **options)
    assert (list(again) == items) == ("pairs" not in options)


def test_a_pickle_is_small_and_gives_the_same_items(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(5000, 5000), pairs=True)
    assert len(pickle.dumps(corpus)) < 2000
    assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 513}, "from 8 to the tokenizer's model_max_length = 512, got 513"),
        ({"max_length": 7}, "from 8 to .* got 7"),
        ({"pairs": True, "pack": True}, "set pack=False"),
        ({"pairs": True}, "at least 2 documents, but .*corpus has 1"),
    ],
)
def test_impossible_options_are_named(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make_corpus(tmp_path, tokenizer, ["w0 w1"], **{"max_length": 12, **options})


# Masks


def test_15_per_cent_are_masked_and_only_they_have_labels(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(*[30] * 400), 64, pack=True)
    items = list(corpus)
    batch = MaskedCollator(tokenizer)(items)
    rows = [torch.tensor(item["input_ids"]) for item in items]
    truth = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    masked = batch["labels"] != -100
    assert torch.equal(batch["labels"][masked], truth[masked])
    assert torch.equal(batch["input_ids"][~masked], truth[~masked])
    assert not (masked & (truth < len(SPECIAL))).any()
    words = (truth >= len(SPECIAL)).sum()
    assert masked.sum() / words == pytest.approx(0.15, abs=0.01)
    shown = batch["input_ids"][masked]
    assert (shown == MASK).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (shown == truth[masked]).float().mean() == pytest.approx(0.1, abs=0.03)


def test_masks_depend_on_the_batch_and_the_seed_alone(tmp_path, tokenizer, monkeypatch):
    items = list(make_corpus(tmp_path, tokenizer, documents(*[10] * 8)))
    collate = MaskedCollator(tokenizer)
    first = collate(items)
    collate(items[:4])
    torch.manual_seed(1)
    assert same(collate(items), first)
    assert same(pickle.loads(pickle.dumps(collate))(items), first)
    assert not torch.equal(MaskedCollator(tokenizer, seed=1)(items)["labels"], first["labels"])
    assert collate.generator is None  # or a spawned worker could not receive the collator
    with monkeypatch.context() as patch:  # the stock collator takes it for a worker
        patch.setattr(multiprocessing.current_process(), "name", "SpawnProcess-1")
        assert same(MaskedCollator(tokenizer)(items), first)
    turned = collate(items[::-1])["labels"].flip(0)  # another epoch's order
    assert not torch.equal(turned, first["labels"])


def test_a_batch_always_has_something_to_predict(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(*[1] * 20))
    for item in corpus:
        batch = MaskedCollator(tokenizer)([item])
        assert batch["labels"].tolist() == [[-100, item["input_ids"][1], -100]]
    unknown = MaskedCollator(tokenizer)([{"input_ids": [CLS, UNK, SEP]}])
    assert unknown["labels"].tolist() == [[-100] * 3]


def test_workers_give_the_same_items_as_the_main_process(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(*range(2, 22)), pairs=True)

    def batches(**options):
        options |= {"collate_fn": MaskedCollator(tokenizer), "generator": torch.Generator()}
        return list(DataLoader(corpus, batch_size=4, shuffle=True, **options))

    alone = batches()
    with_workers = batches(num_workers=2)
    assert len(alone) == len(with_workers) > 5
    assert all(map(same, alone, with_workers))


def tiny_model(tokenizer) -> BertForPreTraining:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 64}
    return tiny_bert(BertForPreTraining, **sizes)


def test_bert_for_pre_training_takes_a_batch(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(5, 9, 30), pairs=True)
    batch = MaskedCollator(tokenizer)(list(corpus))
    assert set(batch) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "labels",
        "next_sentence_label",
    }
    assert tiny_model(tokenizer)(**batch).loss.isfinite()


def test_a_resumed_run_sees_the_batches_and_masks_of_an_uninterrupted_one(tmp_path, tokenizer):
    corpus = make_corpus(tmp_path, tokenizer, documents(*range(2, 18)), pairs=True)

    def batches(resume):
        model, seen = tiny_model(tokenizer), []
        keep = lambda _, args, inputs: seen.append(inputs)  # noqa: E731
        model.register_forward_pre_hook(keep, with_kwargs=True)
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, args, train_dataset=corpus, data_collator=MaskedCollator(tokenizer)
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen

    whole = batches(None)
    resumed = batches(str(tmp_path / "run" / "checkpoint-4"))
    assert len(resumed) == len(whole) - 4 > len(corpus) // 4
    assert all(map(same, whole[4:], resumed))
    assert "next_sentence_label" in whole[0]


# Sources


def test_files_and_folders_are_read_line_by_line(tmp_path):
    folder = tmp_path / "news"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("one\n\n two \n")
    (folder / "deep" / "c.gz").write_bytes(gzip.compress(b"three\n"))
    (folder / "readme.md").write_text("not this")
    assert list(read_corpus(folder)) == ["one", "two", "three"]
    assert list(read_corpus(folder / "deep" / "c.gz")) == ["three"]
    assert describe_corpus(
        folder, share=0.1
    ) == "news (2 files, {} bytes), share 0.1 by seed 0".format(
        sum(path.stat().st_size for path in (folder / "b.txt", folder / "deep" / "c.gz"))
    )


def test_a_share_is_a_fixed_subset_that_grows(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(map(str, range(2000))))
    tenth, half = (list(read_corpus(path, share=share)) for share in (0.1, 0.5))
    assert list(read_corpus(path, share=0.1)) == tenth
    assert set(tenth) < set(half)
    assert 150 < len(tenth) < 250
    assert set(read_corpus(path, share=0.1, seed=1)) != set(tenth)


def test_a_source_is_read_lazily(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"one\n\xff\n")
    texts = read_corpus(path)
    assert next(texts) == "one"
    with pytest.raises(ValueError, match=r"corpus.txt, line 2: not UTF-8"):
        next(texts)


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        read_corpus(tmp_path, share=0)
    with pytest.raises(ValueError, match=r"has no .txt or .gz file"):
        read_corpus(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`."""
    fake = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_dataset_of_the_hub_is_streamed(hub):
    def load_dataset(*args, **options):
        assert args == ("wikimedia/wikipedia", "20231101.en")
        assert options == {"split": "train", "streaming": True}
        return ({"title": "t", "text": text} for text in ["one\ntwo", None, "three"])

    hub.load_dataset = load_dataset
    texts = read_corpus("wikimedia/wikipedia", "20231101.en")
    assert list(texts) == ["one\ntwo", "", "three"]
    described = describe_corpus("wikimedia/wikipedia", "20231101.en", share=0.1)
    assert described == "wikimedia/wikipedia, 20231101.en, share 0.1 by seed 0"


def test_a_hub_out_of_reach_or_without_text_is_named(hub, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no network")

    hub.load_dataset = unreachable
    with pytest.raises(OSError, match=r"a/b is not a file .* \(no network\); give a local text"):
        next(read_corpus("a/b"))
    hub.load_dataset = lambda *args, **options: [{"title": "t", "body": "b"}]
    with pytest.raises(ValueError, match="a/b must have a column 'text', it has title, body"):
        next(read_corpus("a/b"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'kron-kernels\[data\]'"):
        next(read_corpus("a/b"))
