"""Output folders: whole or not at all."""

import errno
from pathlib import Path

import pytest

from kroneckerbert.files import replace_folder, writable_folder


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
