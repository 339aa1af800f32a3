"""Questions from file to metric; an oracle in place of the model must score 100."""

import gzip
import json
import math
import string
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from transformers import BertForQuestionAnswering, BertModel, DataCollatorWithPadding

from kroneckerbert.reproduction.squad import (
    Question,
    SpanDataset,
    predict_spans,
    read_squad,
    squad_metrics,
)

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

TEXT = (
    "The Oil crisis of 1973 began in October (some say: in Café Zürich), when OPEC raised the "
    "price from $3 to $12 per barrel.  By the end of the embargo, in March 1974, it was 300% more."
)
ANSWERS = ["1973", "October", "Café Zürich", "OPEC", "$12 per barrel", "March 1974", "300%"]


def ask(number: int, question: str, *answers: str, context: str = TEXT) -> Question:
    return Question(str(number), question, context, answers, tuple(map(context.index, answers)))


QUESTIONS = [ask(i, f"which {i} ?", answer) for i, answer in enumerate(ANSWERS)]


@pytest.fixture
def tokenizer():
    """Letters and other signs, so that a word is many tokens."""
    signs = string.ascii_lowercase + string.digits
    pieces = [*signs, *("##" + c for c in signs), *string.punctuation, "which", "the", "barrel"]
    return tiny_tokenizer(pieces, model_max_length=512)


def model(tokenizer, positions: int = 64, cls=BertForQuestionAnswering):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    return tiny_bert(cls, num_hidden_layers=1, **sizes)


def oracle(tokenizer, questions, positions: int = 64, sure: float = 10.0):
    """A model whose logits are high at the first and the last token that training would name."""
    windows = SpanDataset(tokenizer, questions, positions, positions // 3)
    spans = {tuple(w["input_ids"]): (w["start_positions"], w["end_positions"]) for w in windows}
    assert len(spans) == len(windows)

    def forward(input_ids, attention_mask, **others):
        logits = torch.zeros(2, *input_ids.shape)
        for row, mask in enumerate(attention_mask.bool()):
            for which, position in enumerate(spans[tuple(input_ids[row][mask].tolist())]):
                logits[which, row, mask.nonzero()[position, 0]] = sure
        return type("Output", (), dict(zip(("start_logits", "end_logits"), logits, strict=True)))

    answering = model(tokenizer, positions)
    answering.forward = forward
    return answering


def write(tmp_path, content, name: str = "squad.json"):
    path = tmp_path / name
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def squad(*entries: dict, context: str = "a film is good") -> dict:
    return {"version": "1", "data": [{"paragraphs": [{"context": context, "qas": list(entries)}]}]}


def entry(answers: list[tuple[str, int]], id: str = "q", **others) -> dict:
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": id, "question": "what ?", "answers": found, **others}


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_both_versions_of_the_format_are_read(tmp_path, name):
    first = entry([("film", 2), ("a film", 0)])
    second = entry([], "r", is_impossible=True, plausible_answers=[{"text": "a"}])
    text = "a film is good"
    assert read_squad(write(tmp_path, squad(first, second), name)) == [
        Question("q", "what ?", text, ("film", "a film"), (2, 0)),
        Question("r", "what ?", text),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad(entry([("film", 3)])), r"json, question 'q': its text has 'ilm ' at character 3"),
        (squad(entry([("film", -1)])), "has '' at character -1, not the answer 'film'"),
        (squad(entry([("", 1)])), "has '' at character 1"),
        (squad(entry([]), context=" "), "question 'q': its text is empty"),
        (squad(entry([]), entry([])), "2 questions have the id 'q'"),
        (squad(), "squad.json has no questions"),
        ({"data": [{"paragraphs": [{"qas": [entry([])]}]}]}, r"KeyError: 'context'\); it must be"),
        ([], "not in SQuAD's format"),
        (b"{", "not in SQuAD's format .JSONDecodeError"),
        (b"\xff", "not in SQuAD's format .UnicodeDecodeError"),
    ],
)
def test_a_file_that_breaks_the_format_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_squad(write(tmp_path, content))


def test_a_damaged_or_missing_file_is_not_a_format_error(tmp_path):
    whole = gzip.compress(json.dumps(squad(*[entry([], str(i)) for i in range(99)])).encode())
    for damaged in (whole[:-20], b"{}"):
        path = tmp_path / "cut.json.gz"
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"cut.json.gz is not a gzip file, or is truncated"):
            read_squad(path)
    with pytest.raises(FileNotFoundError):
        read_squad(tmp_path / "absent.json")


def test_windows_overlap_by_the_stride_and_cover_the_text(tokenizer):
    [question] = [ask(0, "which ?", "barrel")]
    stride = 9
    whole = SpanDataset(tokenizer, [question])[0]["input_ids"]
    head, text = whole[:4], whole[4:-1]  # [CLS] which ? [SEP] ... [SEP]
    covered = []
    for window in SpanDataset(tokenizer, [question], max_length=30, stride=stride):
        ids = window["input_ids"]
        assert (ids[:4], ids[-1]) == (head, whole[-1])
        assert len(ids) == 30 or window["input_ids"][-2] == text[-1]
        assert window["token_type_ids"] == [0] * 4 + [1] * (len(ids) - 4)
        assert not covered or covered[-stride:] == ids[4 : 4 + stride]
        covered += ids[4 + stride * bool(covered) : -1]
    assert covered == text


def test_the_answer_is_trained_where_a_window_holds_all_of_it(tokenizer):
    question = ask(0, "which ?", "$12 per barrel")
    answer = tokenizer("$12 per barrel", add_special_tokens=False)["input_ids"]
    held = 0
    for window in SpanDataset(tokenizer, [question], max_length=30, stride=10):
        first, last = window["start_positions"], window["end_positions"]
        ids = window["input_ids"]
        runs = [ids[i : i + len(answer)] for i in range(len(ids))]
        if answer in runs:
            held += 1
            assert ids[first : last + 1] == answer
        else:
            assert (first, last) == (0, 0)
    assert held >= 1
    assert "start_positions" not in SpanDataset(tokenizer, [question], train=False)[0]


def test_answers_at_the_edge_of_tokens_and_none(tokenizer):
    text = "a b,c"
    questions = [
        Question("0", "which", text, (" b",), (1,)),
        Question("1", "which", text, ("c",), (4,)),
        Question("2", "which", text, (",",), (3,)),
        Question("3", "which", text),
    ]
    windows = SpanDataset(tokenizer, questions)  # [CLS] which [SEP] a b , c [SEP]
    spans = [(window["start_positions"], window["end_positions"]) for window in windows]
    assert spans == [(4, 4), (6, 6), (5, 5), (0, 0)]


def test_batches_are_padded_as_the_trainer_does(tokenizer):
    questions = [ask(0, "which ?", "film", context="a film"), ask(1, "the ?", "1973")]
    dataset = SpanDataset(tokenizer, questions)
    batch = DataCollatorWithPadding(tokenizer)([dataset[0], dataset[1]])
    assert batch["input_ids"].dtype == batch["start_positions"].dtype == torch.long
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    output = model(tokenizer, positions=512)(**batch)
    assert output.loss.isfinite()


def test_a_long_question_leaves_room_for_the_text(tokenizer):
    question = ask(0, "which " * 500, "barrel", context="the " * 40 + "barrel")
    assert all(len(w["input_ids"]) <= 40 for w in SpanDataset(tokenizer, [question], 40, 13))
    whole = SpanDataset(tokenizer, [question])[0]["input_ids"]
    assert whole.count(tokenizer.convert_tokens_to_ids("which")) == 64
    with pytest.raises(ValueError, match=r"max_length 128 has no room .* the 128 tokens it shares"):
        SpanDataset(tokenizer, [question], 128, 128)
    for sizes, name in (((64.0, 8), "max_length"), ((64, -1), "stride"), ((64, 8.5), "stride")):
        with pytest.raises(ValueError, match=f"{name} = .* must be an integer of at least"):
            SpanDataset(tokenizer, [question], *sizes)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("positions", [48, 64, 512])
@pytest.mark.parametrize("null_threshold", [None, 0.0])
def test_an_oracle_answers_everything(tokenizer, positions, null_threshold, padding_side):
    tokenizer.padding_side = padding_side
    answering = oracle(tokenizer, QUESTIONS, positions).train()
    answers = predict_spans(answering, tokenizer, QUESTIONS, 3, null_threshold)
    assert answers == {str(i): answer for i, answer in enumerate(ANSWERS)}
    assert squad_metrics(answers, QUESTIONS) == {"exact_match": 100, "f1": 100}
    assert answering.training


def test_no_answer_is_a_matter_of_the_threshold(tokenizer):
    questions = [*QUESTIONS, Question("none", "the ?", TEXT)]
    answering = oracle(tokenizer, questions, sure=10.0)  # [CLS] leads by 20 where there is none
    for threshold, is_empty in ((0.0, True), (19.9, True), (20.1, False), (None, False)):
        answers = predict_spans(answering, tokenizer, questions, 4, threshold)
        assert (answers.pop("none") == "") == is_empty
        assert list(answers.values()) == ANSWERS


def test_spans_end_behind_their_start_and_within_thirty_tokens(tokenizer):
    question = Question("0", "which", " ".join(string.ascii_lowercase * 2))
    answering = model(tokenizer, 512)

    def predicted(starts: dict[int, float], ends: dict[int, float]) -> str:
        def forward(input_ids, **others):
            logits = torch.zeros(2, *input_ids.shape)
            for which, peaks in enumerate((starts, ends)):
                for position, height in peaks.items():
                    logits[which, 0, position] = height
            names = ("start_logits", "end_logits")
            return type("Output", (), dict(zip(names, logits, strict=True)))

        answering.forward = forward
        return predict_spans(answering, tokenizer, [question])["0"]

    # Text begins at the token 3: [CLS] which [SEP] a b c ...
    assert predicted({5: 9.0}, {7: 9.0}) == "c d e"
    assert predicted({5: 9.0}, {4: 9.0, 6: 1.0}) == "c d"  # not backwards
    assert predicted({3: 9.0}, {32: 9.0}) == " ".join((string.ascii_lowercase * 2)[:30])
    assert predicted({3: 9.0}, {33: 9.0, 4: 1.0}) == "a b"  # 31 tokens
    assert predicted({1: 9.0, 4: 1.0}, {2: 9.0, 4: 1.0}) == "b"  # not the question


def test_a_model_without_a_head_for_spans_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a BertModel has no head for spans"):
        predict_spans(model(tokenizer, cls=BertModel), tokenizer, QUESTIONS)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": 2.5}, {"max_length": -1}, {"null_threshold": math.nan}],
)
def test_numbers_that_would_give_no_answers_are_refused(wrong, tokenizer):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        predict_spans(model(tokenizer), tokenizer, QUESTIONS, **wrong)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("October", ["October 1973", "october"], 1, 1),
        ("the  Oil-crisis!", ["oilcrisis"], 1, 1),  # punctuation goes without leaving a space
        ("in October 1973", ["October 1973"], 0, 0.8),  # precision 2/3, recall 1
        ("oil oil oil", ["oil price"], 0, 0.4),  # one shared: precision 1/3, recall 1/2
        ("1974", ["1973"], 0, 0),
        ("", ["1973"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("1973", [], 0, 0),
        ("1973", ["the", "1973"], 1, 1),  # an answer of articles alone is none
        ("", ["the"], 1, 1),
    ],
)
def test_metrics_are_those_of_the_official_script(prediction, answers, exact, f1):
    question = ask(0, "?", *answers, context=" ".join(["x", *answers]))
    metrics = squad_metrics({"0": prediction}, [question])
    assert metrics == {"exact_match": 100 * exact, "f1": pytest.approx(100 * f1)}


def test_metrics_agree_with_torchmetrics_where_it_has_them():
    from torchmetrics.functional.text import squad as reference

    predictions = ["1973", "in October", "the Café", "OPEC raised the price", "", "May 1974", "300"]
    ours = squad_metrics({str(i): text for i, text in enumerate(predictions)}, QUESTIONS)
    theirs = reference(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)],
        [
            {"id": q.id, "answers": {"text": list(q.answers), "answer_start": list(q.starts)}}
            for q in QUESTIONS
        ],
    )
    assert ours == {name: pytest.approx(value.item()) for name, value in theirs.items()}


def test_every_question_needs_a_prediction():
    with pytest.raises(ValueError, match="6 of 7 questions have no prediction, such as '1'"):
        squad_metrics({"0": ""}, QUESTIONS)
    with pytest.raises(ValueError, match="there are no questions"):
        squad_metrics({}, [])


@pytest.mark.skipif(not (DATA / "squad_dev_v1.1.json.gz").exists(), reason="needs the data")
def test_an_oracle_answers_the_real_questions(tokenizer):
    questions = read_squad(DATA / "squad_dev_v1.1.json.gz")
    assert len(questions) == 10570
    sample = questions[::300]
    answering = oracle(tokenizer, sample, positions=384)
    metrics = squad_metrics(predict_spans(answering, tokenizer, sample, 16), sample)
    # Letters are long: an answer of more than 30 of them cannot be given.
    short = sum(
        len(tokenizer(q.answers[0], add_special_tokens=False)["input_ids"]) <= 30 for q in sample
    )
    assert metrics["exact_match"] >= 100 * short / len(sample)
