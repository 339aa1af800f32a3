"""Output: whole or not at all, whenever the process is killed; and damage that is found."""

import errno
import io
import itertools
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

import kroneckerbert.files
from kron_kernels.files import sync, write_file
from kron_kernels.plan import Plan
from kroneckerbert.checkpoints import weights_last
from kroneckerbert.files import (
    CHECKSUMS,
    damaged,
    finish,
    is_between,
    read_checksums,
    replace_folder,
    replacing_files,
    writable_folder,
    write_checksums,
)
from kroneckerbert.reporting import Report


def write(folder: Path, text: str) -> None:
    with replace_folder(folder) as new:
        (new / "weights").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_whole_at_the_end_and_nothing_is_left_beside_it(tmp_path):
    out = tmp_path / "deep" / "out"
    with replace_folder(out) as new:
        (new / "weights").write_text("1")
        assert not out.exists()
        assert new.parent == out.parent  # one file system, so that a rename is enough
    assert (out / "weights").read_text() == "1"
    assert names(out.parent) == {"out"}


def test_an_earlier_output_is_replaced_with_everything_in_it(tmp_path):
    out = tmp_path / "out"
    write(out, "1")
    (out / "more").touch()
    write(out, "2")
    assert (out / "weights").read_text() == "2"
    assert "more" not in names(out)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_within_leaves_the_old_state(tmp_path, error, earlier):
    out = tmp_path / "out"
    if earlier:
        write(out, "1")
    with pytest.raises(error), replace_folder(out) as new:
        (new / "weights").write_text("half")
        raise error
    assert names(tmp_path) == ({"out"} if earlier else set())
    assert not earlier or (out / "weights").read_text() == "1"


def test_a_failure_of_the_last_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "1")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith("-partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(out, "2")
    assert (out / "weights").read_text() == "1"
    assert names(tmp_path) == {"out"}


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    out = tmp_path / "out"
    context = replace_folder(out)
    (context.__enter__() / "weights").write_text("half")  # and never left
    assert len(names(tmp_path)) == 1
    write(out, "1")
    assert names(tmp_path) == {"out"}
    assert (out / "weights").read_text() == "1"


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path):
    out = tmp_path / "out"
    write(out, "1")
    out.rename(tmp_path / ".out.kroneckerbert-old")
    with pytest.raises(RuntimeError), replace_folder(out):
        raise RuntimeError
    assert (out / "weights").read_text() == "1"
    assert names(tmp_path) == {"out"}


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis").touch()
    with pytest.raises(FileExistsError, match="not written by kroneckerbert"):
        write(tmp_path, "1")
    assert names(tmp_path) == {"thesis"}


@pytest.mark.parametrize("check", [writable_folder, lambda folder: write(folder, "1")])
def test_a_place_that_cannot_take_a_folder_is_refused_with_the_reason(check, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match="is a file"):
        check(file)
    with pytest.raises(OSError, match=r"cannot write .*out: Not a directory .*choose"):
        check(file / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OSError, match="the current folder"):
        check(Path())

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match=r"cannot write .*new: Read-only file system"):
        check(tmp_path / "new")


def test_the_check_leaves_no_trace_and_takes_new_and_empty_folders_only(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert writable_folder(tmp_path / name) == tmp_path / name
    assert names(tmp_path) == {"empty"}
    write(tmp_path / "empty", "1")
    with pytest.raises(FileExistsError, match="is not empty"):
        writable_folder(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").touch()
    with pytest.raises(FileExistsError, match="holds a model"):
        writable_folder(tmp_path / "empty")


# Killed at every change of the file system


class Killed(BaseException):
    pass


@contextmanager
def dying(after: int):
    """Let so many changes of the file system happen, and none after them, clean-up included."""
    done = []

    def or_die(call, changes=lambda *_, **__: True):
        def wrapped(*args, **kwargs):
            if changes(*args, **kwargs):
                if len(done) == after:
                    raise Killed
                done.append(call.__name__)
            return call(*args, **kwargs)

        return wrapped

    def writes(path, mode="r", *_, **__):
        return "r" not in mode

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, or_die(getattr(os, name)))
        patch.setattr(io, "open", or_die(io.open, writes))
        patch.setattr("builtins.open", io.open)
        yield done


def steps_until_it_survives(act):
    """Call it killed after 0, 1, 2, … changes, until it ends by itself; at each, what it did."""
    for after in itertools.count():
        try:
            with dying(after) as done:
                act()
        except Killed:
            yield done
            continue
        return


ONE, TWO, THREE = (0, 2, 3)


def files_of(version: str, shards: int, config: str | None = None, variant="") -> dict[str, str]:
    told = {"config.json": f"config {config or version}", "loader.py": "the same"}
    if shards == ONE:
        return told | {f"model{variant}.safetensors": version}
    names = [f"model{variant}-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    index = f"model.safetensors.index{variant}.json"
    return told | {name: f"{version} {i}" for i, name in enumerate(names)} | {index: str(shards)}


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
    shards = int((folder / "model.safetensors.index.json").read_text())
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
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
        with replacing_files(folder, weights_last) as partial:
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
            assert not is_between(folder)
            seen.add("new" if found == models["new"] else "old")
        except FileNotFoundError:
            assert is_between(folder) or old is None
            seen.add("between")
        finish(folder)  # which loses nothing, however far it was
        try:
            assert read_as_a_loader(folder) in models.values()
        except FileNotFoundError:
            assert old is None
        save(files_of("third", ONE))
        assert read_as_a_loader(folder) == ["config third", "third"]
        assert names(folder) == {*files_of("third", ONE), *OTHERS, ".partial"}
        start()
    assert read_as_a_loader(folder) == models["new"]
    assert all((folder / name).read_text() == text for name, text in OTHERS.items())
    assert (folder / ".partial" / "mine").exists()
    if same_config and old == new == ONE:
        assert seen == {"old", "new"}  # the most common save has no state in between


def test_a_variant_replaces_its_own_weights_only(tmp_path):
    put(tmp_path, files_of("base", TWO) | files_of("half", THREE, variant=".fp16"))
    with replacing_files(tmp_path, weights_last) as partial:
        put(partial, files_of("new", ONE, variant=".fp16"))
    wanted = files_of("base", TWO) | files_of("new", ONE, variant=".fp16")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == wanted


def test_an_interruption_while_files_take_their_places_comes_after_it(tmp_path, monkeypatch):
    put(tmp_path, files_of("old", TWO))
    replace, moved = os.replace, []

    def interrupted(*args):
        moved.append(args)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_files(tmp_path, weights_last) as partial:
        put(partial, files_of("new", ONE))
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == files_of("new", ONE)


def test_a_folder_killed_at_any_step_is_the_old_one_or_the_new_one_or_is_put_back(tmp_path):
    out = tmp_path / "out"

    def start():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(out, "1")

    start()
    for _ in steps_until_it_survives(lambda: write(out, "2")):
        if out.exists():
            assert (out / "weights").read_text() in "12"
        with pytest.raises(RuntimeError), replace_folder(out):
            raise RuntimeError
        assert (out / "weights").read_text() in "12"
        assert names(tmp_path) == {"out"}
        start()
    assert (out / "weights").read_text() == "2"


def written_by_replace_folder(tmp_path):
    write(tmp_path / "out", "1")


def written_by_replacing_files(tmp_path):
    with replacing_files(tmp_path) as partial:
        (partial / "weights").write_text("1")


@pytest.mark.parametrize("act", [written_by_replace_folder, written_by_replacing_files])
def test_bytes_are_on_the_disk_before_a_folder_takes_its_name(act, tmp_path, monkeypatch):
    """After a loss of power a rename may be there without what was written before it."""
    on_disk, sizes = [], {}
    monkeypatch.setattr(os, "fsync", lambda handle: on_disk.append(os.fstat(handle).st_ino))
    rename = os.rename

    def recorded(source, target):
        inodes = [f.stat().st_ino for f in Path(source).iterdir()] + [os.stat(source).st_ino]
        sizes[str(target)] = set(inodes) <= set(on_disk)
        rename(source, target)

    monkeypatch.setattr(os, "rename", recorded)
    act(tmp_path)
    assert list(sizes.values()) == [True]
    assert tmp_path.stat().st_ino in on_disk  # the names, too


# One file


WRITERS = {
    "write_file": write_file,
    "a plan": lambda path, text: Plan.save(Mock(to_json=lambda: text), path),
    "a report": lambda path, text: Report.save(Mock(to_json=lambda: text), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_killed_at_any_step_is_the_old_one_or_the_new_one(writer, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    for _ in steps_until_it_survives(lambda: WRITERS[writer](path, "new")):
        assert path.read_text().strip() in ("old", "new")
        path.write_text("old")
    assert path.read_text().strip() == "new"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_file_that_is_replaced_keeps_its_mode_and_is_never_open_to_more(
    mode, tmp_path, monkeypatch
):
    path, modes = tmp_path / "out.json", set()
    path.write_text("old")
    path.chmod(mode)
    monkeypatch.setattr(os, "fsync", lambda handle: modes.add(os.fstat(handle).st_mode & 0o777))
    write_file(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == mode
    assert modes == {mode, tmp_path.stat().st_mode & 0o777}


def test_a_file_is_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses others."""
    opened, open_ = {}, os.open

    def recorded(path, flags, *more):
        opened[Path(path).name] = flags & (os.O_RDONLY | os.O_RDWR | os.O_WRONLY)
        return open_(path, flags, *more)

    monkeypatch.setattr(os, "open", recorded)
    (tmp_path / "file").write_text("1")
    sync(tmp_path / "file")
    sync(tmp_path)
    assert opened == {"file": os.O_RDWR, tmp_path.name: os.O_RDONLY}


def test_a_file_is_written_through_a_link_and_to_a_pipe(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    write_file("/dev/null", "new")
    assert not Path("/dev/null").is_file()


# Checksums


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"[]", r"it must be an object with fields, and is \[\]"),
        (b"null", "it must be an object with fields, and is None"),
        (b'{"a": 1}', "it lacks b, c"),
    ],
)
def test_json_is_an_object_with_the_fields_that_are_read(tmp_path, content, why):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: {why}"):
        kroneckerbert.files.read_json(path, "a", "b", "c")
    path.rename(tmp_path / CHECKSUMS)
    with pytest.raises(OSError, match=f"{tmp_path / CHECKSUMS} is damaged"):
        read_checksums(tmp_path)


def test_any_flipped_bit_any_cut_and_any_missing_file_is_found(tmp_path):
    put(tmp_path, {"a.bin": "some bytes", "b.json": "{}"})
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.bin").write_bytes(bytes(3))
    assert damaged(tmp_path) is None and read_checksums(tmp_path) is None
    write_checksums(tmp_path, run=5)
    assert damaged(tmp_path) is None and read_checksums(tmp_path)["run"] == 5
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        for i in range(0, 8 * len(whole), 29):
            bits = bytearray(whole)
            bits[i // 8] ^= 1 << i % 8
            path.write_bytes(bits)
            assert f"{path} is damaged" in damaged(tmp_path)
        for end in {*range(0, len(whole), 7), len(whole) - 1}:
            path.write_bytes(whole[:end])
            assert f"{path} is damaged" in damaged(tmp_path)
        path.unlink()
        assert path.name == CHECKSUMS or f"{path} is missing" == damaged(tmp_path)
        path.write_bytes(whole)
    (tmp_path / "README.md").touch()
    assert damaged(tmp_path) is None


@pytest.mark.parametrize(
    "plan",
    [
        '{"remove": ["../precious"], "move": []}',
        '{"remove": [], "move": ["/precious"]}',
        '{"remove": [".."], "move": []}',
        '{"remove": [7], "move": []}',
        '{"remove": []}',
        '{"remove": "ab", "move": []}',
        "[" * 10**5,
        "null",
        "[]",
        "{",
    ],
)
def test_a_folder_from_elsewhere_removes_nothing_outside_it(tmp_path, plan):
    (tmp_path / "precious").touch()
    waiting = tmp_path / "model" / kroneckerbert.files._WHOLE
    waiting.mkdir(parents=True)
    (waiting / kroneckerbert.files._PLAN).write_text(plan)
    for act in (finish, lambda folder: replacing_files(folder).__enter__()):
        with pytest.raises(OSError, match=rf"^{waiting}/.plan.json is damaged.*; remove {waiting}"):
            act(tmp_path / "model")
    assert (tmp_path / "precious").exists()
