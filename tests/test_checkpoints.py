"""Saving that an interruption cannot harm; loading that helps those without the package."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertConfig, BertModel

from kroneckerbert import KroneckerBertModel, checkpoints, compress

CONFIG = BertConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return compress(BertModel(CONFIG).eval())


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


def cut_a_shard(folder):
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"weight": print}, folder / "pytorch_model.bin")


DAMAGE = {  # of a folder, of one with shards; then the error
    "empty": (write(WEIGHTS, b""), None, OSError, f"{WEIGHTS} is damaged or cut short"),
    "lfs": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        None,
        OSError,
        f"{WEIGHTS} is Git LFS's pointer .* run git lfs pull",
    ),
    "pickle": (only_a_pickle, None, OSError, "a pickle of more than tensors, which is not exec"),
    "no shard": (None, drop_a_shard, OSError, "index.json names model-00002-of-.*, which is not"),
    "cut shard": (None, cut_a_shard, OSError, "model-00002-of-.* is damaged or cut short"),
    "cut index": (None, write(INDEX, b"{"), OSError, f"{INDEX} is no JSON"),
    "no map": (None, write(INDEX, b"{}"), OSError, f"{INDEX} must map tensors to files"),
    "list of shards": (None, write(INDEX, b"[]"), OSError, f"{INDEX} must be an object"),
    "cut config": (write("config.json", b"{"), None, OSError, "config.json is no JSON"),
    "binary config": (write("config.json", b"\xff\xfe"), None, OSError, "config.json is no JSON"),
    "null config": (write("config.json", b"null"), None, OSError, "config.json must be an object"),
    "text for a number": (
        change("config.json", hidden_size="x"),
        None,
        ValueError,
        "no model can be made of the configuration of .*'hidden_size'.* correct its config.json",
    ),
    "no such activation": (
        change("config.json", hidden_act="nope"),
        None,
        ValueError,
        "no model can be made of the configuration of .*'nope'",
    ),
    "no such dtype": (change("config.json", dtype="float13"), None, ValueError, "float13"),
}


@pytest.mark.parametrize(("damage", "of_shards", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_told_by_its_file(student, damage, of_shards, error, message, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="20KB" if of_shards else "1GB")
    (damage or of_shards)(tmp_path)
    with pytest.raises(error, match=message) as caught:
        type(student).from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_damaged_dense_folder_is_told_by_its_file(tmp_path):
    BertModel(CONFIG).save_pretrained(tmp_path)
    write(WEIGHTS, b"")(tmp_path)
    with pytest.raises(OSError, match=f"{WEIGHTS} is damaged or cut short"):
        compress(tmp_path)
    BertModel(CONFIG).save_pretrained(tmp_path)
    change("config.json", vocab_size=65)(tmp_path)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight \(64, 32\) instead of \(65, 32\)"
    ):
        compress(tmp_path)


@pytest.mark.parametrize("source", ["./missing", "../missing", "/no/such", "a/b/c", "x/", "~/x"])
@pytest.mark.parametrize("load", [compress, KroneckerBertModel.from_pretrained])
def test_a_path_where_nothing_is_is_named(load, source):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(source)} is not there; give"):
        load(source)
    with pytest.raises(FileNotFoundError, match="missing is not there"):
        load(Path("missing"))


def test_a_file_is_no_folder(tmp_path):
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
    with pytest.raises(AttributeError, match="has no model or configuration FooConfig: another"):
        runpy.run_path(str(tmp_path / "load_kroneckerbert.py"))


def test_an_error_while_saving_leaves_the_old_checkpoint(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with torch.no_grad():
        student.embeddings.word_embeddings.a.zero_()

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "write_loader", fail)
    with pytest.raises(OSError, match="No space left"):
        student.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


KILLED = """
import sys, time
from transformers import AutoModel
import kroneckerbert
from kroneckerbert import checkpoints
model = AutoModel.from_pretrained(sys.argv[1])
for p in model.parameters():
    p.data.zero_()
def hang(*_):
    print("written", flush=True)
    time.sleep(60)
checkpoints.write_loader = hang
model.save_pretrained(sys.argv[1])
"""


def test_a_killed_save_leaves_the_old_checkpoint_and_the_next_one_cleans_up(student, tmp_path):
    student.save_pretrained(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = AutoModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), student.parameters()))
    assert (tmp_path / ".partial").exists()
    again.save_pretrained(tmp_path)
    assert not (tmp_path / ".partial").exists()


def test_other_files_stay_and_old_shards_go(student, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    student.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = AutoModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), student.parameters()))
    student.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*")) and not list(tmp_path.glob("*.index.json"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(student.state_dict())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(student, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write .* choose a folder"):
        student.save_pretrained(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; choose another name"):
        student.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write .* choose a folder"):
        student.save_pretrained(tmp_path / "file" / "below")
