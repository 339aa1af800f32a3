"""Output is complete or absent whenever the process is killed, and damage is found."""

import errno
import io
import itertools
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from kron_kernels.files import sync, write_file
from kron_kernels.plan import Plan
from kroneckerbert.checkpoints import replacing_model
from kroneckerbert.files import (
    CHECKSUMS,
    damaged,
    read_checksums,
    read_json,
    replace_folder,
    writable_folder,
    write_checksums,
)
from kroneckerbert.measure import Report


def write(folder: Path, text: str) -> None:
    with replace_folder(folder) as new:
        (new / "weights").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_complete_at_the_end_and_leaves_nothing_beside_it(tmp_path):
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


def test_a_folder_with_other_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis").touch()
    with pytest.raises(FileExistsError, match="not written by kroneckerbert"):
        write(tmp_path, "1")
    assert names(tmp_path) == {"thesis"}


@pytest.mark.parametrize("check", [writable_folder, lambda folder: write(folder, "1")])
def test_a_place_that_cannot_be_written_is_refused_with_the_reason(check, tmp_path, monkeypatch):
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


def test_the_check_leaves_no_trace_and_accepts_only_new_and_empty_folders(tmp_path):
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
    """Let this many changes of the file system happen, and none after them, clean-up included."""
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
    """Kill the call after 0, 1, 2, … changes, until it ends by itself; yields its changes."""
    for after in itertools.count():
        try:
            with dying(after) as done:
                act()
        except Killed:
            yield done
            continue
        return


@pytest.mark.parametrize("earlier", [True, False])
def test_a_folder_killed_at_any_step_is_old_or_new_or_put_back(tmp_path, earlier):
    out = tmp_path / "out"

    def start():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if earlier:
            write(out, "1")

    start()
    for _ in steps_until_it_survives(lambda: write(out, "2")):
        if out.exists():
            assert (out / "weights").read_text() in "12"
        with pytest.raises(RuntimeError), replace_folder(out):
            raise RuntimeError  # the next call puts back or removes the remains, even if it fails
        assert names(tmp_path) in ({"out"},) if earlier else names(tmp_path) in (set(), {"out"})
        assert not out.exists() or (out / "weights").read_text() in "12"
        start()
    assert (out / "weights").read_text() == "2"


def written_by_replace_folder(tmp_path):
    write(tmp_path / "out", "1")


def written_by_replacing_model(tmp_path):
    with replacing_model(tmp_path) as partial:
        (partial / "model.safetensors").write_text("1")
        (partial / "config.json").write_text("{}")


@pytest.mark.parametrize("act", [written_by_replace_folder, written_by_replacing_model])
def test_bytes_are_on_the_disk_before_a_folder_is_renamed(act, tmp_path, monkeypatch):
    """A power failure may keep a rename and lose what was written before it."""
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
def test_a_replaced_file_keeps_its_mode_and_is_never_readable_by_more_users(
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

    def recorded(path, flags, *options):
        opened[Path(path).name] = flags & (os.O_RDONLY | os.O_RDWR | os.O_WRONLY)
        return open_(path, flags, *options)

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
        (b"", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"[]", r"it must be an object with fields, and is \[\]"),
        (b"null", "it must be an object with fields, and is None"),
        (b'{"a": 1}', "it lacks b, c"),
    ],
)
def test_json_must_be_an_object_with_the_fields(tmp_path, content, why):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: {why}"):
        read_json(path, "a", "b", "c")
    path.rename(tmp_path / CHECKSUMS)
    with pytest.raises(OSError, match=f"{tmp_path / CHECKSUMS} is damaged"):
        read_checksums(tmp_path)


def test_any_flipped_bit_any_cut_and_any_missing_file_is_found(tmp_path):
    (tmp_path / "a.bin").write_text("some bytes")
    (tmp_path / "b.json").write_text("{}")
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
