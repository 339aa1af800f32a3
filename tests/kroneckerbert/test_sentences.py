"""Sentences from documents, questions and tables."""

import gzip
import json

import pytest

from kroneckerbert.reproduction.sentences import TextFile, read_sentences


def test_documents_are_cut_tables_and_questions_read_and_repetitions_left_out(tmp_path):
    with gzip.open(tmp_path / "prose.txt.gz", "wt", encoding="utf-8") as file:
        file.write('It rains. "Does it?" she asked. He said: no! 3 men left\nToo\n' + "word " * 51)
    (tmp_path / "t.tsv").write_text("x\ttaken from x\tand a third field\ny\tnot from y\n")
    question = {"data": [{"paragraphs": [{"qas": [{"question": " is  it\\there? "}]}]}]}
    (tmp_path / "q.json").write_text(json.dumps(question, indent=1))
    (tmp_path / "more.txt").write_text("IT RAINS\nheld out, here\n")
    files = {
        "prose.txt.gz": TextFile(cut=True),
        "t.tsv": TextFile(without=["y"]),
        "q.json": TextFile(),
        "more.txt": TextFile(),
    }
    texts = read_sentences(files, tmp_path, held_out=["Held out here."])
    assert sorted(texts) == [
        '"Does it?" she asked.', "3 men left", "He said: no!", "It rains.", "is it\\there?",
        "taken from x",
    ]  # fmt: skip
    assert texts == read_sentences(files, tmp_path, held_out=["Held out here."])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "no tab", "line 1 has no tab"),
        ("a.json", "[]", "is not SQuAD's JSON"),
        ("a.json", '{"data": [{}]}', "is not SQuAD's JSON"),
        ("a.txt", "one", "have no text of 2 to 50 words"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sentences({name: TextFile()}, tmp_path)
