"""README, CONTRIBUTING and docs/: their code runs; their links, commands and names exist."""

import gzip
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels.plan import clock
from kron_kernels.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("kron_kernels", "kroneckerbert", "benchmarks")
APPS = {"kroneckerbert": "kroneckerbert.cli.app", "benchmarks": "benchmarks.__main__"}
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
# Pages whose code takes more than five seconds on one core; so does every example.
SLOW = {
    "README.md",
    *(f"docs/{page}.md" for page in ("deploying", "kroneckerbert", "own-models", "training")),
}
WORDS = [*map(str, range(10)), *"abcdefghijklmnopqrstuvwxyz", "text", "this", "is", "and", "that"]

WRITTEN = {".md", ".py", ".h", ".cpp", ".cu", ".cuh", ".yaml"}

FENCE = re.compile(r"^( *)```+ *(\w*)[^\n]*\n(.*?)^\1```+ *$", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Fenced code in these languages, each with the number of the line above it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, code = match.groups()
        if language in languages:
            lines = [line.removeprefix(indent) for line in code.splitlines(keepends=True)]
            found.append((text.count("\n", 0, match.start(3)), "".join(lines)))
    return found


# --- words


def test_the_words_of_the_style_section_are_used_nowhere():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    start = contributing.index("A test looks for these words")
    section = contributing[start:].split("\n\n")[0]
    words = re.findall(r"`([^`]+)`", section.replace("\n", " "))
    assert len(words) > 10
    search = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.I)
    folders = (*OURS, "csrc", "docs", "tests")
    sources = [p for f in folders for p in (ROOT / f).rglob("*.*") if p.suffix in WRITTEN]
    found = []
    for path in [*sources, ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name(path)}:{number}: {m[0]}" for m in search.finditer(line)]
    assert not found


# --- code


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import


@pytest.fixture
def _flops_for_milliseconds(monkeypatch):
    """Plans time by counting FLOPs: they meet budgets of latency on any machine, however busy."""

    def count(calls, seconds=0.0, at_least=0):
        times = {}
        for key, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            times[key] = Timing(*[1e-3 + counter.get_total_flops() / 1e6] * 3)
        return times

    monkeypatch.setattr(clock, "interleaved", count)


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """Names that pages use without defining them: a model, its tokenizer, texts, batches."""
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    from kroneckerbert.data import TextDataset

    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(vocabulary), model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,  # plans measure 128 tokens
    )
    teacher = BertModel(config).eval()
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "path/to/a/model")
    texts = [" ".join(WORDS[i % 17 :][: 5 + i % 9]) for i in range(40)]
    for file in ("texts.txt", "one-text-a-line.txt"):
        (tmp_path / file).write_text("\n".join(texts))
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    for file, rows in (("train.tsv", texts), ("test.tsv", texts[::3])):
        labelled = (f"{'long' if len(text) > 18 else 'short'}\t{text}\n" for text in rows)
        (tmp_path / file).write_text("".join(labelled))
    return {
        "__name__": "__main__",
        "teacher": teacher,
        "tokenizer": tokenizer,
        "texts": TextDataset(tokenizer, texts),
        "first": texts[:9],
        "second": texts[9:18],
        "scores": [float(i) for i in range(9)],
        "batches": [tokenizer(texts[i::4], padding=True, return_tensors="pt") for i in range(4)],
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (name(page) in SLOW))
        for page in PAGES
        if blocks(page, "python")
    ],
)
@pytest.mark.usefixtures("_flops_for_milliseconds")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, names):
    for line, code in blocks(page, "python"):
        # Empty lines in front give a traceback the page's line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=name)
def test_an_example_runs(script, tmp_path):
    pytest.importorskip("transformers")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()


def test_every_example_is_on_the_page_of_examples():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert [s for s in EXAMPLES if f"examples/{s.name}" not in page] == []


# --- links


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs derive them from ASCII text."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    counted: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?)#* *$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        found.add(f"{slug}-{counted[slug]}" if counted[slug] else slug)
        counted[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"``.*?``|`[^`]*`", "", text, flags=re.S)
    broken = []
    for target in re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        known = file.suffix != ".md" or not anchor or (file.exists() and anchor in anchors(file))
        if not file.exists() or not known:
            broken.append(target)
        elif page.parent != ROOT and not file.resolve().is_relative_to(ROOT / "docs"):
            broken.append(f"{target} is outside docs, so not on the site")
    assert not broken


# --- commands


def commands(page: Path) -> Iterator[list[str]]:
    """The words of a page's shell commands, in blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    shell = [code for _, code in blocks(page, "sh", "bash", "shell")]
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    lines = [line for code in shell for line in code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(" ".join(code.split()) for code in inline)]:
        if not re.search(r"\b(kroneckerbert|python|torchrun) ", line):
            continue
        for part in re.split(r"&&|\||;", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue  # a part of something else
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def options_of(words: Iterable[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--\w", word)]


def unknown(words: list[str]) -> list[str]:
    """Modules, verbs and options of a command that do not exist."""
    if "-m" in words[:-1]:
        at = words.index("-m") + 1
        if words[at] in APPS:
            words = words[at:]
        elif words[at].split(".")[0] in OURS:
            return unknown_to_files(words[at], words[at + 1 :])
    if words[0] in APPS:
        return unknown_to_app(*words)
    if words[0] == "python" and words[1:] and words[1].endswith(".py"):
        return unknown_to_files(words[1].removesuffix(".py"), words[2:])
    return []


def unknown_to_app(program: str, verb: str = "", *words: str) -> list[str]:
    import typer

    verbs = typer.main.get_command(import_module(APPS[program]).app).commands
    if not re.fullmatch("[a-z][a-z-]*", verb):  # an option of the program, or an ellipsis
        return []
    if verb not in verbs:
        return [verb]
    own = {"--help"}.union(*([*p.opts, *p.secondary_opts] for p in verbs[verb].params))
    extra = verbs[verb].context_settings.get("ignore_unknown_options", False)
    return [] if extra else [option for option in options_of(words) if option not in own]


def unknown_to_files(program: str, words: list[str]) -> list[str]:
    """A script or module that does not exist, or options that no string in its sources names."""
    sources = sources_of(program.replace("/", "."))
    if not sources:
        return [program]
    for package, names in re.findall(r"^from (benchmarks[\w.]*) import ([\w, ]+)", sources, re.M):
        sources += "".join(sources_of(f"{package}.{name}") for name in names.split(", "))
        sources += sources_of(package)
    return [option for option in options_of(words) if f'"{option}"' not in sources]


def sources_of(module: str) -> str:
    stem = ROOT / module.replace(".", "/")
    files = [stem.with_suffix(".py"), *stem.glob("*.py")]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page):
    pytest.importorskip("typer")
    pytest.importorskip("transformers")
    wrong = {shlex.join(words): found for words in commands(page) if (found := unknown(words))}
    assert not wrong


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for page in PAGES:
        for asked in re.findall(r"(?:\.|kron-kernels)\[([\w,-]+)\]", page.read_text("utf-8")):
            assert set(asked.split(",")) <= extras.keys(), page


# --- the site


@pytest.mark.parametrize(
    "package",
    [
        *("kron_kernels", "kroneckerbert"),
        *(f"kroneckerbert.{name}" for name in ("distillation", "data", "evaluation")),
    ],
)
def test_every_public_name_is_in_the_api(package):
    pytest.importorskip("transformers")
    page = (ROOT / f"docs/api/{package.removeprefix('kroneckerbert.')}.md").read_text("utf-8")
    names = import_module(package).__all__
    assert [n for n in names if not re.search(rf"\b{n}\b", page)] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".ci/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img)[^>]* src="(https?:[^"]*)', html), page
        assert not re.findall(r'<link[^>]* href="(https?:[^"]*\.css[^"]*)', html), page
