"""Reading files into batches, and errors of files that break the rules."""

import gzip

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from kroneckerbert.data import TextDataset, is_table, label_targets, read_lines, read_table


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(["a", "film", "good", "bad", "is", "this"], model_max_length=64)


def file(tmp_path, content: str | bytes, name: str = "data.txt"):
    path = tmp_path / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_lines_are_texts_whether_compressed_or_not(tmp_path, name):
    content = "\ufeffa film\r\n\n  good \n\u0085x\u2028y\nbad"  # only \n ends a line
    assert read_lines(file(tmp_path, content, name)) == ["a film", "good", "x\u2028y", "bad"]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (["1", "0"], [1, 0]),
        (["1", "0.5"], [1.0, 0.5]),
        (["NUM", "LOC"], ["NUM", "LOC"]),
        (["-1", "2e1"], [-1.0, 20.0]),
    ],
)
def test_labels_are_integers_floats_or_strings_as_the_whole_column_is(tmp_path, column, labels):
    table = read_table(file(tmp_path, f"{column[0]}\ta film\n\n{column[1]}\tbad\n"))
    assert table.labels == labels
    assert {type(label) for label in table.labels} == {type(labels[0])}
    assert (table.texts, table.texts_b, len(table)) == (["a film", "bad"], None, 2)


@pytest.mark.parametrize("name", ["data.tsv", "data.tsv.gz"])
def test_a_header_is_skipped_and_a_quotation_mark_is_text(tmp_path, name):
    path = file(tmp_path, 'Label\ttext\tother\n3.5\t"a film\tgood"\n', name)
    table = read_table(path)
    assert (table.labels, table.texts, table.texts_b) == ([3.5], ['"a film'], ['good"'])
    assert is_table(path)


def test_a_tab_in_the_first_line_marks_a_table(tmp_path):
    assert is_table(file(tmp_path, "\n1\ta film\n"))
    assert not is_table(file(tmp_path, "a film\n1\tb\n"))
    assert not is_table(file(tmp_path, ""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "1\ta\n\ngood\n",
            r"data.txt, line 3: 1 tab-separated field\(s\); a row is label<TAB>text",
        ),
        ("1\ta\n0\tb\tc\n", r"line 2: 3 fields, but the first row, line 1, has 2"),
        ("1\ta\nNEG\tb\n", r"line 2: label 'NEG' is a word, but the first, '1' in line 1, is not"),
        ("NEG\ta\nPOS\tb\n1\tc\n", r"line 3: label '1' is a number, but the first, 'NEG'"),
        ("1\ta\nnan\tb\n", r"line 2: label 'nan' must be a finite number"),
        ("1\ta\n\tb\n", r"line 2: the label is empty"),
        ("label\ttext\n", r"data.txt has no rows"),
        (b"1\ta\n0\t\xff\n", r"line 2: not UTF-8 .*convert the file"),
    ],
)
def test_a_broken_table_names_the_line_and_the_rule(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_table(file(tmp_path, content))


def test_a_file_without_text_or_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no text"):
        read_lines(file(tmp_path, "\n \n"))
    whole = gzip.compress(b"a film\n" * 1000)
    path = tmp_path / "cut.gz"
    for damaged in (whole[:-10], b"a film\n"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"cut.gz is not a gzip file, or is cut short"):
            read_lines(path)
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "absent")


def test_labels_become_training_targets():
    classifier = BertConfig(id2label={0: "NUM", 1: "LOC"}, label2id={"NUM": 0, "LOC": 1})
    assert label_targets(["LOC", "NUM"], classifier) == [1, 0]
    assert label_targets([1, 0], classifier) == [1, 0]
    assert label_targets([1, 0], BertConfig(num_labels=1)) == [1.0, 0.0]
    for labels, unknown in ((["LOC", "ABC"], "'ABC'"), ([0, 2], "2"), ([-1], "-1"), ([0.5], "0.5")):
        with pytest.raises(ValueError, match=rf"no label {unknown}; .* 0 to 1 .*NUM, LOC"):
            label_targets(labels, classifier)
    with pytest.raises(ValueError, match="words such as 'LOC', but the model is a regression"):
        label_targets(["LOC"], BertConfig(num_labels=1))


def test_rows_are_tokenised_with_their_labels_and_truncated(tokenizer):
    single = TextDataset(tokenizer, ["a film", "good " * 9], labels=[0, 1], max_length=5)
    assert len(single) == 2
    assert single[0] == {"input_ids": [2, 5, 6, 3], "labels": 0}
    assert single[1]["input_ids"] == [2, 7, 7, 7, 3]
    pair = TextDataset(tokenizer, ["a"], ["good"])
    assert pair[0] == {"input_ids": [2, 5, 3, 7, 3], "token_type_ids": [0, 0, 0, 1, 1]}
    tokenizer.sep_token = None  # like GPT-2's; its model would look segments up as words
    assert TextDataset(tokenizer, ["a"], ["good"])[0].keys() == {"input_ids"}
    for length in (0, -1, 8.0, True):
        with pytest.raises(ValueError, match=f"max_length = {length} must be an integer of at lea"):
            TextDataset(tokenizer, ["a"], max_length=length)
    with pytest.raises(ValueError, match="texts_b must have one entry for each text, got 1 for 2"):
        TextDataset(tokenizer, ["a", "film"], ["good"])
    with pytest.raises(ValueError, match="labels must have one entry for each text, got 3 for 2"):
        TextDataset(tokenizer, ["a", "film"], labels=[0, 1, 0])
    with pytest.raises(ValueError, match=r"must be numbers, got words; pass label_targets"):
        TextDataset(tokenizer, ["a"], labels=["LOC"])


def test_trainer_pads_masks_and_groups_rows_by_length(tmp_path, tokenizer):
    lengths = torch.randint(1, 40, (64,)).tolist()
    texts = [" ".join(["good"] * n) for n in lengths]
    data = TextDataset(tokenizer, texts, texts, labels=[0] * 64, max_length=64)
    args = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
        use_cpu=True,
    )
    trainer = Trainer(
        tiny_bert(BertForSequenceClassification),
        args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    real = padded = 0
    for batch in trainer.get_train_dataloader():
        assert batch["labels"].dtype == torch.long
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
        assert batch["token_type_ids"].max() == 1
        real += int(batch["attention_mask"].sum())
        padded += batch["attention_mask"].numel()
    assert real > 0.85 * padded  # 0.7 in random order


def test_rows_with_an_empty_text_are_skipped_and_counted(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("1\ta\tb\n0\t \tb\n1\tc\td\n0\te\t\n")
    with pytest.warns(UserWarning, match=r"2 row\(s\) with an empty text .* in line 2"):
        table = read_table(path)
    assert (table.labels, table.texts, table.texts_b) == ([1, 1], ["a", "c"], ["b", "d"])
    path.write_text("1\t\n")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no rows"):
        read_table(path)
