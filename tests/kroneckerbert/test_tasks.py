"""All sources of a task's rows, refusals, and the paper's numbers beside ours."""

import builtins
import gzip
import json
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from kroneckerbert.data import Table
from kroneckerbert.reproduction.squad import Question
from kroneckerbert.reproduction.tasks import TASKS, compare, evaluate_task, match_labels, read_task

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
WORDS = ["zero", "one", "two", "x", "y"]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(WORDS, model_max_length=32)


def model(cls=BertForSequenceClassification, **config):
    return tiny_bert(cls, num_hidden_layers=1, **config)


def write(folder, name: str, *rows: str):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    content = "".join(row + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def rows_of(table: Table) -> list[tuple]:
    columns = [table.labels, table.texts, *([] if table.texts_b is None else [table.texts_b])]
    return list(zip(*columns, strict=True))


def test_the_table_of_tasks_is_consistent():
    assert set(GLUE) < set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        assert (task.kind == "classification") == bool(task.labels)
        assert task.evaluation in task.splits
        for other in task.evaluated_on:
            assert TASKS[other].labels == task.labels
            assert TASKS[other].pairs == task.pairs
            assert "train" not in TASKS[other].splits
        for split, metric in task.paper:
            assert split in task.splits and metric in task.metrics


@pytest.mark.parametrize(
    ("split", "averages"), [("test", (79.5, 77.7, 74.2)), ("validation", (None, 80.9, 77.8))]
)
def test_the_papers_numbers_have_the_papers_averages(split, averages):
    names = [name for name in (*GLUE, "mnli_mismatched") if name != "wnli"]
    rows = [
        numbers for name in names for (s, _), numbers in TASKS[name].paper.items() if s == split
    ]
    assert len(rows) == 9
    for column, average in zip(zip(*rows, strict=True), averages, strict=True):
        assert average is None or mean(column) == pytest.approx(average, abs=0.051)


@pytest.mark.parametrize("name", ["dev.tsv", "val.tsv.gz", "validation.raw.tsv", "dev.raw.tsv.gz"])
def test_a_table_with_the_label_first(tmp_path, name):
    write(tmp_path, f"sst2_{name}", "1\tgood film", "0\tbad")
    assert rows_of(read_task("sst2", "validation", tmp_path)) == [(1, "good film"), (0, "bad")]


def test_words_and_numbers_are_the_same_labels(tmp_path):
    write(tmp_path, "trec_train.tsv", "NUM\thow far ?", "ABBR\twhat is IBM ?")
    write(tmp_path, "trec_test.tsv", "5\thow far ?", "0\twhat is IBM ?")
    train, test = (read_task("trec", split, str(tmp_path)) for split in ("train", "test"))
    assert train == test
    assert train.labels == [5, 0]
    write(tmp_path, "stsb_dev.tsv", "5\ta\tb", "3\ta\tc")
    labels = read_task("stsb", "validation", tmp_path).labels
    assert labels == [5.0, 3.0] and isinstance(labels[0], float)


def test_a_header_may_put_the_columns_anywhere(tmp_path):
    write(tmp_path, "rte_train.raw.tsv.gz", "sentence1\tsentence2\tlabel\tidx", "a\tb\t1\t0")
    write(tmp_path, "sst2_train.tsv", "label\tsentence", "1\tgood")
    assert rows_of(read_task("rte", "train", tmp_path)) == [(1, "a", "b")]
    assert rows_of(read_task("sst2", "train", tmp_path)) == [(1, "good")]


@pytest.mark.parametrize(
    ("name", "file", "rows", "expected"),
    [
        ("cola", "CoLA/train.tsv", ["gj04\t1\t\tThey left.", 'gj04\t0\t*\tThey "left'], None),
        ("sst2", "SST-2/train.tsv", ["sentence\tlabel", 'a "film \t1'], (1, 'a "film ')),
        (
            "mrpc",
            "MRPC/train.tsv",
            ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t70\t71\ta film\ta movie"],
            (1, "a film", "a movie"),
        ),
        (
            "stsb",
            "STS-B/train.tsv",
            [
                "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
                "0\tmain\tMSRvid\t2012\t1\tnone\tnone\ta plane\ta jet\t3.800",
            ],
            (3.8, "a plane", "a jet"),
        ),
        (
            "qqp",
            "QQP/train.tsv",
            [
                "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
                "1\t2\t3\twho ?\twhat ?\t0",
                "4\t5\t6\ttorn",
                "in two\twhat ?\t1",
            ],
            (0, "who ?", "what ?"),
        ),
        (
            "mnli",
            "MNLI/train.tsv",
            [
                "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
                "0\t1\tfiction\ta\tb\tneutral\tcontradiction",
            ],
            (2, "a", "b"),
        ),
        (
            "qnli",
            "QNLI/train.tsv",
            ["index\tquestion\tsentence\tlabel", "0\ta ?\tb\tnot_entailment"],
            (1, "a ?", "b"),
        ),
        (
            "rte",
            "RTE/train.tsv",
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment"],
            (0, "a", "b"),
        ),
        (
            "wnli",
            "WNLI/train.tsv",
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1"],
            (1, "a", "b"),
        ),
    ],
)
def test_the_archive_of_glue(tmp_path, name, file, rows, expected):
    write(tmp_path, file, *rows)
    expected = [expected] if expected else [(1, "They left."), (0, 'They "left')]
    assert rows_of(read_task(name, "train", tmp_path)) == expected


def test_the_two_validation_sets_of_mnli(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label"
    for which, label in (("matched", "neutral"), ("mismatched", "entailment")):
        write(tmp_path, f"MNLI/dev_{which}.tsv", header, f"0\ta\tb\tneutral\t{label}")
    assert read_task("mnli", "validation", tmp_path).labels == [1]
    assert read_task("mnli_mismatched", "validation", tmp_path).labels == [0]


def test_the_sets_that_are_out_of_distribution(tmp_path):
    write(tmp_path, "PAWS/test.tsv", "id\tsentence1\tsentence2\tlabel", "1\ta b\tb a\t0")
    header = "gold_label\tsentence1_parse\tsentence1\tsentence2\tpairID\theuristic"
    rows = ("non-entailment\t(a)\ta\tb\tex0\tsub", "entailment\t(a)\tc\td\tex1\tsub")
    write(tmp_path, "heuristics_evaluation_set.txt", header, *rows)
    write(tmp_path, "imdb_test.tsv", "neg\tbad<br />", "pos\tgood")
    assert rows_of(read_task("paws", "test", tmp_path)) == [(0, "a b", "b a")]
    assert rows_of(read_task("hans", "validation", tmp_path)) == [(1, "a", "b"), (0, "c", "d")]
    assert rows_of(read_task("imdb", "test", tmp_path)) == [(0, "bad<br />"), (1, "good")]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("squad", "squad_dev_v1.1.json.gz"),
        ("squad", "dev-v1.1.json"),
        ("squad_v2", "dev-v2.0.json"),
    ],
)
def test_questions(tmp_path, name, file):
    answers = [{"text": "x", "answer_start": 4}]
    paragraph = {"context": "one x", "qas": [{"id": "1", "question": "?", "answers": answers}]}
    write(tmp_path, file, json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    expected = [Question("1", "?", "one x", ("x",), (4,))]
    assert read_task(name, "validation", tmp_path) == expected


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("rte_dev.tsv", ["maybe\ta\tb"], "rte_dev.tsv, row 1: label 'maybe'; rte has entailment, "),
        ("rte_dev.tsv", ["1\ta\tb", "2\ta\tb"], "row 2: label 2; rte has"),
        ("rte_dev.tsv", ["0.5\ta\tb"], r"row 1: label 0\.5"),
        ("rte_dev.tsv", ["1\ta"], r"its rows have 1 text\(s\), but those of rte have 2"),
        ("rte_dev.tsv", ["1\ta\tb", "1\ta"], "line 2: 2 fields, but the first row"),
        ("rte_dev.tsv", [], "has no text"),
        ("RTE/dev.tsv", ["a\tb\tc\td\te"], "has 5 fields, .* header with sentence1, sentence2, la"),
        ("RTE/dev.tsv", ["sentence1\tsentence2\tlabel\tidx"], "has a header and no rows"),
        (
            "RTE/dev.tsv",
            ["sentence1\tsentence2\tlabel\tidx", "a\tb\t1\t0", "a\tb\t1"],
            r"row 2: 3 tab-separated field\(s\), but the columns are 4: sentence1",
        ),
    ],
)
def test_a_broken_file_names_the_row_and_the_rule(tmp_path, file, rows, message):
    write(tmp_path, file, *rows)
    with pytest.raises(ValueError, match=message):
        read_task("rte", "validation", tmp_path)


def test_invalid_scores_are_refused(tmp_path):
    header = "sentence1\tsentence2\tscore\tid"
    for score in ("high", "nan"):
        write(tmp_path, "stsb_train.tsv", header, f"a\tb\t{score}\t0")
        with pytest.raises(ValueError, match=f"label '{score}'; stsb has finite numbers"):
            read_task("stsb", "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("sst2", "SST-2/test.tsv", ["index\tsentence", "0\ta film"]),
        ("cola", "CoLA/test.tsv", ["index\tsentence", "0\tThey left."]),
        ("qqp", "QQP/test.tsv", ["id\tquestion1\tquestion2", "0\twho ?\twhat ?"]),
        ("rte", "rte_test.tsv", ["-1\ta\tb"]),
        ("stsb", "stsb_test.tsv", ["-1.0\ta\tb"]),
    ],
)
def test_test_sets_without_labels_send_to_validation(tmp_path, name, file, rows):
    write(tmp_path, file, *rows)
    with pytest.raises(ValueError, match=r"has no labels: GLUE .*; use validation"):
        read_task(name, "test", tmp_path)


def test_a_missing_file_is_reported_with_the_names_tried(tmp_path):
    write(tmp_path, "sst2_train.tsv", "1\tgood")
    (tmp_path / "other").mkdir()
    looked_for = r"sst2_dev.tsv, sst2_val.tsv, .*, SST-2/dev.tsv, .*; the folder has other, sst2_t"
    with pytest.raises(
        FileNotFoundError, match=rf"has no validation split of sst2; .*{looked_for}"
    ):
        read_task("sst2", "validation", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent has no .*; the folder has no files"):
        read_task("squad", "train", tmp_path / "absent")


def test_an_unknown_task_or_split_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no task 'sst'; the tasks are cola, sst2"):
        read_task("sst", "train", tmp_path)
    with pytest.raises(ValueError, match="trec has no split 'validation'; it has train, test"):
        read_task("trec", "validation", tmp_path)
    with pytest.raises(ValueError, match="hans has no split 'train'; it has validation"):
        read_task("hans", "train", tmp_path)


class Rows(list):
    """As a ``datasets.Dataset``: rows by iteration, columns by name."""

    def __getitem__(self, column: str):
        return [row[column] for row in self]


def hub(monkeypatch, rows):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if isinstance(rows, Exception):
            raise rows
        return Rows(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_hub(monkeypatch):
    asked = hub(monkeypatch, [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}])
    assert rows_of(read_task("mnli_mismatched", "validation")) == [(2, "a", "b")]
    assert asked == [("nyu-mll/glue", {"name": "mnli", "split": "validation_mismatched"})]
    answers = {"text": ["a"], "answer_start": [0]}
    row = {"id": "1", "title": "", "question": "?", "context": "a", "answers": answers}
    hub(monkeypatch, [row])
    assert read_task("squad", "train") == [Question("1", "?", "a", ("a",), (0,))]
    hub(monkeypatch, [{"sentence": "a", "label": -1, "idx": 0}])
    with pytest.raises(ValueError, match=r"nyu-mll/glue has no labels: .*use validation"):
        read_task("sst2", "test")


def test_without_network_or_datasets_the_remedy_is_a_folder(monkeypatch):
    for error in (ConnectionError("offline"), RuntimeError("no scripts")):
        hub(monkeypatch, error)
        with pytest.raises(
            OSError, match=r"nyu-mll/glue cannot be .* \(.*Error: .*\); .* --data DIR"
        ) as caught:
            read_task("rte", "train")
        assert caught.value.__cause__ is error
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'kron-kernels\[data\]', or .* --data DIR"):
        read_task("rte", "train")


def test_labels_are_those_of_the_model():
    rte, table = TASKS["rte"], Table([0, 1], ["a", "b"], ["c", "d"])
    turned = BertConfig(id2label={0: "NOT_ENTAILMENT", 1: "Entailment"})
    turned.label2id = {"NOT_ENTAILMENT": 0, "Entailment": 1}
    assert match_labels(rte, table, turned).labels == [1, 0]
    assert match_labels(rte, table, BertConfig()) == table
    number = Table([0.5], ["a"], ["b"])
    assert match_labels(TASKS["stsb"], number, BertConfig(num_labels=1)) == number


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("hans", ["entailment", "neutral", "contradiction"]),
        ("rte", ["yes", "no"]),
        ("mnli", ["LABEL_0", "LABEL_1"]),
        ("mnli", ["LABEL_0"]),
        ("stsb", ["LABEL_0", "LABEL_1"]),
    ],
)
def test_other_labels_than_the_models_are_refused(name, labels):
    config = BertConfig(
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )
    with pytest.raises(ValueError, match=f"labels are {labels[0]}.*, but those of {name} are"):
        match_labels(TASKS[name], Table([0], ["a"], ["b"]), config)


def predicts_the_second_token(model):
    """Replace the model's forward: the class is the one the first word names."""

    def forward(input_ids, **others):
        word = input_ids[:, 1] - 5
        one_hot = torch.nn.functional.one_hot(word, len(WORDS)).float()
        logits = word[:, None].float() if model.num_labels == 1 else one_hot[:, : model.num_labels]
        return SimpleNamespace(logits=logits)

    model.forward = forward
    return model


def test_every_task_reports_its_own_metrics(tokenizer):
    first = ["zero", "one x", "one", "one y"]
    for name, task in TASKS.items():
        if task.kind == "span":
            continue
        n = len(task.labels) or 1
        labels = [0, 1, 1, 0] if task.labels else [0.0, 1.0, 2.0, 3.0]
        table = Table(labels, first, ["x"] * 4 if task.pairs else None)
        scores = evaluate_task(
            predicts_the_second_token(model(num_labels=n)), tokenizer, task, table, batch_size=3
        )
        assert tuple(scores) == task.metrics, name
        expected = {"accuracy": 0.75, "f1": 0.8, "matthews": 1 / 3**0.5}
        expected |= {"pearson": 0.6**0.5, "spearman": 0.6**0.5}
        assert scores == pytest.approx({m: expected[m] for m in scores}, abs=1e-5), name


def test_labels_follow_the_models_own_order(tokenizer):
    table = Table([0, 1], ["zero", "one"], ["x", "x"])
    turned = model(id2label={0: "not_entailment", 1: "entailment"})
    turned.config.label2id = {"not_entailment": 0, "entailment": 1}
    for name, accuracy in (("rte", 0.0), ("wnli", 1.0)):  # the same words in another order
        scores = evaluate_task(predicts_the_second_token(turned), tokenizer, TASKS[name], table)
        assert scores == {"accuracy": accuracy}


def test_spans_are_evaluated_by_the_rules_of_their_version(tokenizer):
    answering = model(BertForQuestionAnswering)

    def forward(input_ids, **others):
        logits = torch.zeros(input_ids.shape)
        logits[:, 0], logits[:, 4] = 2.0, 1.0  # [CLS] one [SEP] zero x
        return SimpleNamespace(start_logits=logits, end_logits=logits)

    answering.forward = forward
    questions = [Question("1", "one", "zero x", ("x",), (5,)), Question("2", "one", "zero y")]
    scores = evaluate_task(answering, tokenizer, TASKS["squad"], questions[:1])
    assert scores == {"exact_match": 100, "f1": 100}
    scores = evaluate_task(answering, tokenizer, TASKS["squad_v2"], questions)
    assert scores == {"exact_match": 50, "f1": 50}


def test_a_model_without_the_head_is_refused(tokenizer):
    bare = model(BertModel)
    with pytest.raises(ValueError, match="a BertModel has no head for the labels of rte"):
        evaluate_task(bare, tokenizer, TASKS["rte"], Table([0], ["a"], ["b"]))
    with pytest.raises(ValueError, match="a BertModel has no head for spans"):
        evaluate_task(bare, tokenizer, TASKS["squad"], [Question("1", "?", "x")])
    table = Table([1.0, 2.0, 3.0], ["x", "y", "one"], ["x", "one", "two"])
    assert set(evaluate_task(bare, tokenizer, TASKS["stsb"], table)) == {"pearson", "spearman"}


def test_scores_stand_beside_the_papers():
    assert compare(TASKS["mrpc"], {"f1": 0.9, "accuracy": 0.85}, "test") == {
        "f1": {
            "ours": 90.0,
            "BERT_BASE": 87.9,
            "KroneckerBERT_8": 88.5,
            "KroneckerBERT_21": 87.1,
        },
        "accuracy": {"ours": 85.0},
    }
    assert compare(TASKS["squad"], {"exact_match": 70.0}) == {
        "exact_match": {
            "ours": 70.0,
            "BERT_BASE": 80.5,
            "KroneckerBERT_8": 78.1,
            "KroneckerBERT_21": 70.7,
        }
    }
    hans = {"ours": 50.0, "BERT_BASE": 50.7, "KroneckerBERT_8": 50.4}
    assert compare(TASKS["hans"], {"accuracy": 0.5}) == {"accuracy": hans}
    assert compare(TASKS["wnli"], {"accuracy": 0.5}) == {"accuracy": {"ours": 50.0}}


@pytest.mark.skipif(not DATA.exists(), reason="needs the data")
@pytest.mark.parametrize(
    ("name", "split", "rows", "labels"),
    [
        ("cola", "validation", 527, {0, 1}),
        ("sst2", "test", 1821, {0, 1}),
        ("mrpc", "validation", 500, {0, 1}),
        ("stsb", "validation", 1500, None),
        ("rte", "train", 2490, {0, 1}),
        ("trec", "train", 5452, set(range(6))),
    ],
)
def test_the_real_files(name, split, rows, labels):
    table = read_task(name, split, DATA)
    assert len(table) == rows
    assert (table.texts_b is not None) == TASKS[name].pairs
    assert labels is None or set(table.labels) == labels
    assert labels is not None or 0 <= min(table.labels) < max(table.labels) <= 5
