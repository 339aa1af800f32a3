"""Saving that an interruption cannot harm, and errors of loading that name the damaged file."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_files import steps_until_it_survives
from tiny import tiny_bert
from transformers import AutoModel, BertModel
from transformers.utils import logging

from kroneckerbert import KroneckerBertModel, checkpoints, compress, modeling_kroneckerbert
from kroneckerbert.checkpoints import check_whole, finish, replacing_model


@pytest.fixture
def student():
    return compress(tiny_bert())


def run(code: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True
    )


LOAD = """
import sys
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code={trust})).__name__)
"""
WITHOUT = "import sys; sys.modules['kroneckerbert'] = None\n"


def test_without_the_package_the_error_says_what_to_install(student, tmp_path):
    student.save_pretrained(tmp_path)
    refused = "try:" + textwrap.indent(LOAD.format(trust=False), "    ")
    refused += "except ValueError as error: print(error)\n"
    done = run(WITHOUT + refused + LOAD.format(trust=True), tmp_path)
    assert "trust_remote_code=True" in done.stdout
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install 'kron-kernels[bert]'" in last and "import kroneckerbert" in last


def test_with_the_package_but_without_its_import_the_loader_imports_it(student, tmp_path):
    student.save_pretrained(tmp_path)
    done = run(LOAD.format(trust=True), tmp_path)
    assert done.stdout.split() == ["KroneckerBertModel"], done.stderr


def test_with_the_package_imported_nothing_asks_for_trust(student, tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    student.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=None)
    assert type(model) is type(student)


def test_a_loaded_model_is_saved_with_its_loader_again(student, tmp_path):
    student.save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("config.json", "load_kroneckerbert.py"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change(name: str, **fields):
    """Damage that sets fields of a JSON file."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return damage


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def drop_a_shard(folder):
    sorted(folder.glob("model-*"))[1].unlink()


def cut_the_last(pattern: str, length: int):
    def damage(folder):
        file = max(folder.glob(pattern))
        file.write_bytes(file.read_bytes()[:length])

    return damage


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"weight": print}, folder / "pytorch_model.bin")


DAMAGE = {  # to a folder, to one with shards; then the error
    "cut": (cut_the_last(WEIGHTS, 999), None, OSError, f"{WEIGHTS} is damaged or cut short"),
    "empty": (write(WEIGHTS, b""), None, OSError, f"{WEIGHTS} is damaged or cut short"),
    "lfs": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        None,
        OSError,
        f"{WEIGHTS} is Git LFS's pointer .* run git lfs pull",
    ),
    "pickle": (only_a_pickle, None, OSError, "has pickled weights that .* would run code"),
    "no shard": (None, drop_a_shard, OSError, "index.json names model-00002-of-.*, which is not"),
    "cut shard": (
        None,
        cut_the_last("model-*", -7),
        OSError,
        "model-00002-of-.* is damaged or cut short",
    ),
    "cut index": (None, write(INDEX, b"{"), OSError, f"{INDEX} is damaged: it is not JSON"),
    "no map": (None, write(INDEX, b"{}"), OSError, f"{INDEX} must map tensors to files"),
    "list of shards": (
        None,
        write(INDEX, b"[]"),
        OSError,
        f"{INDEX} is damaged: it must be an object",
    ),
    "cut config": (
        write("config.json", b"{"),
        None,
        OSError,
        "config.json is damaged: it is not JSON",
    ),
    "binary config": (
        write("config.json", b"\xff\xfe"),
        None,
        OSError,
        "config.json is damaged: it is not JSON",
    ),
    "null config": (
        write("config.json", b"null"),
        None,
        OSError,
        "config.json is damaged: it must be an object",
    ),
    "text for a number": (
        change("config.json", hidden_size="x"),
        None,
        ValueError,
        "no model can be made of the configuration of .*'hidden_size'.* correct its config.json",
    ),
    "no such dtype": (change("config.json", dtype="float13"), None, ValueError, "float13"),
}


@pytest.mark.parametrize(("damage", "of_shards", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_the_damaged_file_of_a_folder_is_named(
    student, damage, of_shards, error, message, tmp_path
):
    student.save_pretrained(tmp_path, max_shard_size="20KB" if of_shards else "1GB")
    (damage or of_shards)(tmp_path)
    with pytest.raises(error, match=message) as caught:
        type(student).from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


class OfOnesOwn(KroneckerBertModel):
    def __init__(self, config):
        raise KeyError("a slip of the user's")


class Full(KroneckerBertModel):
    def __init__(self, config):
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Unreachable(KroneckerBertModel):
    def __init__(self, config):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (OfOnesOwn, {}, KeyError, '"a slip of the user\'s"'),
        (Full, {}, torch.OutOfMemoryError, "CUDA out of memory."),
        (Unreachable, {}, ConnectionResetError, "[Errno 104] Connection reset by peer"),
        (KroneckerBertModel, {"foo": 1}, TypeError, None),
        (KroneckerBertModel, {"dtype": "nonsense"}, Exception, None),
        (KroneckerBertModel, {"attn_implementation": "nonsense"}, Exception, None),
    ],
)
def test_errors_with_other_causes_than_the_files_pass_unchanged(
    student, tmp_path, cls, options, error, message
):
    student.save_pretrained(tmp_path)
    with pytest.raises(error) as caught:
        cls.from_pretrained(tmp_path, **options)
    assert "config.json" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert message in (None, str(caught.value))
    assert str(tmp_path) in caught.value.__notes__[0]
    if cls is KroneckerBertModel:  # the same error as from the stock class
        tiny_bert().save_pretrained(tmp_path)
        with pytest.raises(error) as stock:
            BertModel.from_pretrained(tmp_path, **options)
        assert type(caught.value) is type(stock.value)
        assert str(caught.value).replace("Kronecker", "") == str(stock.value)


def test_the_damaged_file_of_a_dense_folder_is_named(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    write(WEIGHTS, b"")(tmp_path)
    with pytest.raises(OSError, match=f"{WEIGHTS} is damaged or cut short"):
        compress(tmp_path)
    tiny_bert().save_pretrained(tmp_path)
    change("config.json", vocab_size=65)(tmp_path)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight \(64, 32\) instead of \(65, 32\)"
    ):
        compress(tmp_path)


@pytest.mark.parametrize("source", ["./missing", "../missing", "{}/missing", "a/b/c", "x/", "~/x"])
@pytest.mark.parametrize("load", [compress, KroneckerBertModel.from_pretrained])
def test_a_missing_path_is_named(load, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = source.format(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(source)} is not a folder; give"):
        load(source)
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        load(Path("missing"))


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        compress(file)


def test_an_architecture_that_transformers_lacks_is_named(student, tmp_path):
    student.save_pretrained(tmp_path)
    change("config.json", model_type="kronecker_foo")(tmp_path)
    with pytest.raises(ValueError, match=r"kronecker_foo, and transformers .* has no foo: another"):
        compress(tmp_path)
    checkpoints.write_loader(tmp_path, "KroneckerFooConfig")
    with pytest.raises(AttributeError, match=r"no model or configuration FooConfig\. Another"):
        runpy.run_path(str(tmp_path / "load_kroneckerbert.py"))


def test_an_error_while_saving_leaves_the_old_checkpoint(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with torch.no_grad():
        student.embeddings.word_embeddings.a.zero_()

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(modeling_kroneckerbert, "write_loader", fail)
    with pytest.raises(OSError, match="No space left"):
        student.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


ONE, TWO, THREE = (0, 2, 3)


def files_of(version: str, shards: int, config: str | None = None) -> dict[str, str]:
    files = {"config.json": f"config {config or version}", "loader.py": "the same"}
    if shards == ONE:
        return files | {"model.safetensors": version}
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    index = json.dumps({"weight_map": {name: name for name in names}})
    return files | {name: f"{version} {name}" for name in names} | {INDEX: index}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def read_as_a_loader(folder) -> list[str]:
    """By the names and in the order of transformers, which knows nothing of a save in between."""
    config = (folder / "config.json").read_text()
    single = folder / "model.safetensors"
    if single.exists():
        return [config, single.read_text()]
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    return [config, *((folder / name).read_text() for name in names)]


OTHERS = {
    "model_ema.safetensors": "ema",
    "model_ema-00001-of-00002.safetensors": "ema",
    "model.fp16.safetensors": "half",
    "model.fp16-00001-of-00002.safetensors": "half",
    "model.safetensors.index.fp16.json": "half",
    "notes.txt": "mine",
}


@pytest.mark.parametrize(
    "old, new, same_config",
    [
        (None, ONE, False),
        (ONE, ONE, True),
        (ONE, ONE, False),
        (ONE, TWO, True),
        (TWO, ONE, False),
        (TWO, TWO, True),
        (THREE, TWO, False),
    ],
)
def test_a_save_killed_at_any_step_leaves_the_old_model_or_the_new_one(
    tmp_path, old, new, same_config
):
    before = {} if old is None else files_of("old", old, config="same" if same_config else None)
    after = files_of("new", new, config="same" if same_config else None)
    folder = tmp_path / "model"

    def save(files=after):
        with replacing_model(folder) as partial:
            put(partial, files)

    models = {}
    for name, files in (("old", before), ("new", after)):
        put(tmp_path / name, files)
        models[name] = read_as_a_loader(tmp_path / name) if files else None

    seen = set()

    def start():
        shutil.rmtree(folder, ignore_errors=True)
        put(folder, before | OTHERS)
        (folder / ".partial").mkdir()
        (folder / ".partial" / "mine").touch()

    start()
    for _ in steps_until_it_survives(save):
        try:
            found = read_as_a_loader(folder)
            assert found in models.values()
            seen.add("new" if found == models["new"] else "old")
        except FileNotFoundError:
            if old is not None:
                with pytest.raises(OSError, match=r"kroneckerbert\.checkpoints\.finish\("):
                    check_whole(folder)
            seen.add("between")
        finish(folder)  # loses nothing, wherever the save stopped
        try:
            assert read_as_a_loader(folder) in models.values()
        except FileNotFoundError:
            assert old is None
        save(files_of("third", ONE))
        assert read_as_a_loader(folder) == ["config third", "third"]
        assert {path.name for path in folder.iterdir()} == {
            *files_of("third", ONE),
            *OTHERS,
            ".partial",
        }
        start()
    assert read_as_a_loader(folder) == models["new"] and not check_whole(folder)
    assert all((folder / name).read_text() == text for name, text in OTHERS.items())
    assert (folder / ".partial" / "mine").exists()
    if same_config and old == new == ONE:
        assert seen == {"old", "new"}  # the most common save has no state in between


def test_an_interruption_waits_until_the_files_are_in_place(tmp_path, monkeypatch):
    put(tmp_path, files_of("old", TWO))
    replace, moved = os.replace, []

    def interrupted(*args):
        moved.append(args)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_model(tmp_path) as partial:
        put(partial, files_of("new", ONE))
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == files_of("new", ONE)


def test_finish_removes_nothing_outside_the_folder_and_names_a_damaged_index(tmp_path):
    put(tmp_path / "model", files_of("old", TWO))
    (tmp_path / "precious.safetensors").touch()
    whole = tmp_path / "model" / checkpoints._WHOLE
    put(whole, files_of("new", TWO))
    for content in ("[" * 10**5, "null", "[]", "{}", '{"weight_map": 3}', "{"):
        (whole / INDEX).write_text(content)
        for act in (finish, lambda folder: replacing_model(folder).__enter__()):
            with pytest.raises(OSError, match=rf"{INDEX} .*; remove {whole}"):
                act(tmp_path / "model")
    (whole / INDEX).write_text('{"weight_map": {"a": "../precious.safetensors"}}')
    finish(tmp_path / "model")
    assert (tmp_path / "precious.safetensors").exists()


def model_in(folder) -> tuple[str, str | None]:
    """A digest of the weights in a folder, and a field of its configuration."""
    model = AutoModel.from_pretrained(folder)
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest(), model.config.problem_type


def test_a_save_killed_at_any_step_leaves_the_old_model_or_the_new_one_or_says_so(
    student, tmp_path
):
    """Sizes are equal: weights of one model would load with the configuration of the other."""
    other = compress(tiny_bert())
    other.config.problem_type = "regression"
    student.save_pretrained(tmp_path / "old", max_shard_size="8KB")
    other.save_pretrained(tmp_path / "new", max_shard_size="12KB")
    models = [model_in(tmp_path / name) for name in ("old", "new")]
    folder = tmp_path / "model"

    def start():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)

    start()
    seen, before = [], {f.name: f.read_bytes() for f in folder.iterdir()}
    for _ in steps_until_it_survives(lambda: other.save_pretrained(folder, max_shard_size="12KB")):
        now = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
        if now == before and (folder / ".kroneckerbert-partial").exists():
            start()
            continue  # only the hidden folder has changed
        try:
            seen.append(models.index(model_in(folder)))
        except OSError as error:
            assert "kroneckerbert.checkpoints.finish(" in str(error)
            seen.append("says so")
            finish(folder)
            assert model_in(folder) == models[1]
        start()
    assert model_in(folder) == models[1]
    assert list(dict.fromkeys(seen)) == [0, "says so", 1]


@pytest.mark.slow
def test_a_save_killed_at_a_random_time_leaves_one_model_or_says_so(student, tmp_path):
    other = compress(tiny_bert())
    other.config.problem_type = "regression"
    for model, name in ((student, "old"), (student, "model"), (other, "new")):
        model.save_pretrained(tmp_path / name)
    models = [model_in(tmp_path / name) for name in ("old", "new")]
    folder = tmp_path / "model"

    def save_for_ever():
        for model, size in itertools.cycle(itertools.product((student, other), ("8KB", "1GB"))):
            model.save_pretrained(folder, max_shard_size=size)

    generator = random.Random(0)
    logging.disable_progress_bar()  # a killed child would keep their lock
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        time.sleep(generator.uniform(0.1, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            found = model_in(folder)
        except OSError as error:
            assert "kroneckerbert.checkpoints.finish(" in str(error)
            finish(folder)
            found = model_in(folder)
        assert found in models
    logging.enable_progress_bar()


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "12KB"}, {"variant": "fp16"}])
def test_a_save_removes_only_weights_of_its_own_variant(student, tmp_path, how):
    others = {
        "model_ema.safetensors",
        "model-best.safetensors",
        "model.bf16.safetensors",
        "model.bf16-00001-of-00002.safetensors",
        "model.safetensors.index.bf16.json",
        "model.safetensors.bak",
        ".partial",
    }
    others |= {"model.safetensors"} if how.get("variant") else {"model.fp16.safetensors"}
    for name in others:
        (tmp_path / name).mkdir() if name == ".partial" else (tmp_path / name).write_text("mine")
    (tmp_path / ".partial" / "notes").write_text("mine")
    for _ in range(2):
        student.save_pretrained(tmp_path, **how)
        for name in others - {".partial"}:
            assert (tmp_path / name).read_text() == "mine", name
        assert (tmp_path / ".partial" / "notes").read_text() == "mine"


def test_shards_of_a_variant_replace_its_single_file_and_back(student, tmp_path):
    student.save_pretrained(tmp_path)
    base = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        student.embeddings.word_embeddings.a.mul_(2)
    for size in ("1GB", "12KB", "8KB", "1GB"):
        student.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
        again = AutoModel.from_pretrained(tmp_path, variant="fp16")
        assert all(map(torch.equal, again.parameters(), student.parameters()))
        assert (tmp_path / "model.safetensors").read_bytes() == base
    assert {f.name for f in tmp_path.glob("*.fp16*")} == {"model.fp16.safetensors"}


def test_the_third_argument_is_the_state_as_in_the_stock_method(student, tmp_path):
    state = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    student.save_pretrained(tmp_path, True, dict(state))
    again = AutoModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), state.values()))


def test_the_loader_is_uploaded_with_the_model(student, tmp_path, monkeypatch):
    hub = Mock()
    monkeypatch.setattr(modeling_kroneckerbert, "HfApi", lambda: hub)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    student.save_pretrained(tmp_path / "out", push_to_hub=True, private=True, token="t")
    hub.create_repo.assert_called_once_with("out", exist_ok=True, token="t", private=True)
    uploaded = hub.upload_folder.call_args.kwargs
    names = ["config.json", "load_kroneckerbert.py", "model.safetensors"]
    assert sorted(uploaded["allow_patterns"]) == names
    assert uploaded["folder_path"] == tmp_path / "out" and AutoModel.from_pretrained(
        tmp_path / "out"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(student, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write .* choose a name"):
        student.save_pretrained(tmp_path)


def test_a_file_instead_of_the_folder_is_named(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; choose another name"):
        student.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write .* choose a name"):
        student.save_pretrained(tmp_path / "file" / "below")


def test_a_folder_without_a_name_is_refused(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"name is empty; give one, or '\.'"):
        student.save_pretrained("")
    assert not list(tmp_path.iterdir())


def test_a_save_that_ends_while_a_reader_looks_is_no_error(tmp_path, monkeypatch):
    (tmp_path / ".kroneckerbert-whole").mkdir()

    def removed(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "iterdir", removed)
    check_whole(tmp_path)
