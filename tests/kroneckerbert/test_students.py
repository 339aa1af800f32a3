"""The students in the package, and encoders from folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, succeeds
from tiny import tiny_bert, tiny_tokenizer

import kroneckerbert
from kroneckerbert import compress, embed, students
from kroneckerbert.files import write_checksums
from kroneckerbert.loading import load_tokenizer

EXAMPLES = Path(__file__).parent / "students"
each_student = pytest.mark.parametrize("name", students.names())
TEXTS = ["a good film", "this is bad", "b", "a b c a b c good bad film is this"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny student."""
    path = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    factors = {"intermediate.dense": {"a_shape": [4, 2]}}
    compress(tiny_bert(initializer_range=0.2), factors).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    write_checksums(path)
    return path


# What the package has


@each_student
def test_a_student_embeds_as_when_it_was_made(name):
    stored = json.loads((EXAMPLES / f"{name}.json").read_text())
    encoder = kroneckerbert.load(name)
    floating = embed(kroneckerbert.dequantize(encoder.model), encoder.tokenizer, stored["texts"])
    # Four digits are stored.
    torch.testing.assert_close(floating, torch.tensor(stored["float32"]), rtol=0, atol=6e-5)
    # Sums of int8 are exact, but the last bit of a float32 sum, which instruction sets round
    # differently, can move an activation by a step: cosine 0.9997 between AVX2 and baseline
    # x86-64. From float32 it is 0.9993.
    int8 = encoder.encode(stored["texts"])
    cosines = torch.cosine_similarity(int8, torch.tensor(stored["int8"]), dim=-1)
    assert cosines.min() > 0.999


@each_student
def test_a_student_ranks_pairs_and_its_files_are_complete(name):
    encoder, about = kroneckerbert.load(name), students.about(name)
    pairs = [
        (5, "A man is playing a guitar.", "Someone plays the guitar."),
        (4, "The market fell on Monday.", "Shares dropped at the start of the week."),
        (3, "The dog runs on the beach.", "A dog plays in the water."),
        (1, "A woman is cooking.", "A woman reads a book."),
        (0, "The match was cancelled.", "Three cats sleep on a sofa."),
    ]
    first, second = (encoder.encode([pair[i] for pair in pairs]) for i in (1, 2))
    cosines = (first * second).sum(-1)
    assert cosines[:3].min() > cosines[3:].max()
    card = (Path(students.path(name)) / "README.md").read_text()
    for text in ("CC BY-SA", "## Limits", f"{about['scores']['int8']['stsb']:.4f}"):
        assert text in card
    assert about["parameters"]["student"] < about["parameters"]["teacher"] / 6
    assert sum(f.stat().st_size for f in Path(students.path(name)).rglob("*")) < 6e6


@each_student
def test_sentence_transformers_loads_a_student(name):
    sentences = pytest.importorskip("sentence_transformers")
    texts = ["A short text.", "Another one, which is a little longer."]
    model = sentences.SentenceTransformer(students.path(name), device="cpu")
    torch.testing.assert_close(
        torch.from_numpy(model.encode(texts)), kroneckerbert.load(name).encode(texts),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_a_name_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no student 'minilm-9x'; the package has"):
        kroneckerbert.load("minilm-9x")


# Encoders


def test_vectors_are_those_of_embed(folder):
    encoder = kroneckerbert.load(str(folder))
    want = embed(encoder.model, load_tokenizer(folder), TEXTS)
    torch.testing.assert_close(encoder.encode(TEXTS, batch_size=2), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder.encode(TEXTS[0]), want[0], rtol=1e-5, atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode(["", "good " * 100]).isfinite().all()  # truncated at 32 positions
    for wrong in ([None], [b"a"], 3):
        with pytest.raises(TypeError):
            encoder.encode(wrong)


def test_search_finds_a_text_by_itself(folder):
    encoder = kroneckerbert.load(str(folder))
    found = encoder.search("this is bad", TEXTS, top=2)
    assert found[0] == (pytest.approx(1, abs=1e-5), 1)
    assert len(encoder.search("b", TEXTS, top=9)) == 4


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, folder, file, monkeypatch):
    here = tmp_path / "here" / "tiny"
    shutil.copytree(folder, here)
    (here / students.ABOUT).write_text("{}")
    monkeypatch.setattr(students, "_HERE", here.parent)
    content = bytearray((here / file).read_bytes())
    content[len(content) // 2] ^= 1
    (here / file).write_bytes(content)
    with pytest.raises(OSError, match=rf"{file} is damaged.*pip install --force-reinstall"):
        kroneckerbert.load("tiny")
    (here / file).unlink()
    with pytest.raises(OSError, match=rf"{file} is missing.*pip install --force-reinstall"):
        kroneckerbert.load("tiny")
    with pytest.raises(OSError, match="save the model again"):
        kroneckerbert.load(str(here))


def test_another_pooling_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Transformer, Pooling, not a mean"):
        kroneckerbert.load(str(tmp_path))
    modules.append(modules[1] | {"path": "2_Normalize", "type": "x.Normalize"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    for settings, accepted in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False),
        ({"pooling_mode_mean_tokens": True}, True),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode": "cls"}, False),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        if accepted:
            kroneckerbert.load(str(tmp_path))
        else:
            with pytest.raises(ValueError, match="SentenceTransformer"):
                kroneckerbert.load(str(tmp_path))


# Commands


def test_embed_prints_vectors_or_writes_them(tmp_path, folder):
    lines = succeeds("embed", *TEXTS[:2], "--student", folder).splitlines()
    want = kroneckerbert.load(str(folder)).encode(TEXTS)
    got = torch.tensor([json.loads(line) for line in lines])
    torch.testing.assert_close(got, want[:2], rtol=0, atol=1e-6)
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    texts.write_text("\n".join(TEXTS[1:]))
    succeeds("embed", TEXTS[0], "--file", texts, "--out", out, "--student", folder)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), want)
    assert "give texts" in fails("embed", "--student", folder)
    assert "must end in .npy" in fails("embed", "a", "--out", texts, "--student", folder)
    assert texts.read_text().startswith(TEXTS[1])


def test_search_shows_the_nearest_lines(tmp_path, folder):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    output = succeeds("search", texts, "this is bad", "--top", 1, "--student", folder)
    assert "this is bad" in output and "1.000" in output and "a good film" not in output


def test_students_are_listed():
    output = succeeds("students")
    assert all(name in output for name in students.names())
