"""Saving a model into a folder such that a loader never finds parts of two models."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kron_kernels.files import sync
from kroneckerbert.files import naming_output, read_json, sync_all

# Saved with every model. Without this package transformers knows none of its model types: it asks
# for trust_remote_code=True, and then runs this.
LOADER = "load_kroneckerbert"
_LOADER_TEXT = '''"""Loads the class {name} from the package kroneckerbert."""

try:
    import kroneckerbert
except ImportError as error:
    raise ImportError(
        "this is a Kronecker-factorised model: pip install 'kron-kernels[bert]', "
        "then import kroneckerbert before loading it"
    ) from error

{name} = kroneckerbert.{name}
'''
_PARTIAL, _WHOLE = ".kroneckerbert-partial", ".kroneckerbert-whole"
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<variant>.+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(\.(?P<variant>.+))?\.json")


def write_loader(folder: Path, config_name: str) -> None:
    """Write the module that loads the configuration, or says how to install this package."""
    (folder / f"{LOADER}.py").write_text(_LOADER_TEXT.format(name=config_name))


@contextmanager
def replacing_model(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; move the model saved there into ``folder`` on success.

    Loaders find weights by an entry, ``model.safetensors`` or the index of the shards. Where one
    rename of the entry is not enough, the complete temporary folder is first renamed to a name that
    says so; from then on ``finish`` completes the save, however often the process is killed.
    Before, the old model is untouched.

    Of the old weights those of the same variant are removed (``model.fp16.safetensors`` for
    ``variant="fp16"``). All other files stay.

    Args:
        folder: Made if it is absent.

    Raises:
        OSError: If the folder cannot be written.
    """
    if not os.fspath(folder):  # Path("") is the current folder
        raise FileNotFoundError("the folder's name is empty; give one, or '.' for this folder.")
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder.")
    partial, whole = folder / _PARTIAL, folder / _WHOLE
    with naming_output(folder):
        folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    with naming_output(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        sync_all(partial)
        entries = _entries(partial)
        changed = [path.name for path in partial.iterdir() if not _same(path, folder / path.name)]
        obsolete = {path.name for entry in entries for path in _obsolete(folder, entry)}
        if len(changed) == 1 and obsolete <= set(changed):
            os.replace(partial / changed[0], folder / changed[0])
            sync(folder)
        else:
            partial.rename(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        sync(folder)
        finish(folder)
    except KeyboardInterrupt:
        finish(folder)
        raise


def finish(folder: str | os.PathLike) -> None:
    """Complete a save that was killed while the new files were moved into ``folder``, if any.

    The old entry goes first and the new one comes last: in between there is no model, which every
    loader reports. Each step can be repeated.

    Raises:
        OSError: If a file cannot be moved, or the new index of shards is damaged.
    """
    folder = Path(folder)
    whole = folder / _WHOLE
    if not whole.is_dir():
        return
    entries = _entries(whole)
    obsolete = [path for entry in entries for path in _obsolete(folder, entry)]
    for path in obsolete:
        path.unlink(missing_ok=True)
    sync(folder)
    new = sorted(whole.iterdir(), key=lambda path: (path in entries, path.name))
    for path in new:
        if path in entries:
            sync(folder)
        os.replace(path, folder / path.name)
    sync(folder)
    shutil.rmtree(whole, ignore_errors=True)


def check_whole(folder: str | os.PathLike) -> None:
    """Raise if a killed save left a folder between the old and the new model.

    Raises:
        OSError: With the call that completes the save. Loading does not call it: a reader may not
            be allowed to write.
    """
    whole = Path(folder) / _WHOLE
    try:
        unfinished = any(whole.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # another process may be finishing the save
        unfinished = False
    if unfinished:
        raise OSError(
            f"the last save in {folder} was killed while its files were moved into place. Nothing "
            "is lost: unless a process is saving there now, call "
            f"kroneckerbert.checkpoints.finish({os.fspath(folder)!r}), or save there again; then "
            "load it."
        )


def _entries(folder: Path) -> list[Path]:
    """The files by which loaders find weights; one, unless another model was saved beside it."""
    return [path for path in sorted(folder.iterdir()) if (m := _weights(path)) and not m["shard"]]


def _obsolete(folder: Path, entry: Path) -> list[Path]:
    """The old weights to remove before the files of a new ``entry`` move into ``folder``.

    That is every file of its variant but the new shards, some of which may be there already.
    """
    new, shards = _weights(entry), set()
    if entry.suffix == ".json":
        try:
            shards = set(read_json(entry, "weight_map")["weight_map"].values())
        except (AttributeError, TypeError, ValueError) as error:
            raise OSError(
                f"{entry} is not a shard index ({error}); remove {entry.parent} and save again."
            ) from error
    old = [
        path
        for path in sorted(folder.iterdir())
        if (m := _weights(path))
        and path.is_file()
        and (m["stem"], m["variant"]) == (new["stem"], new["variant"])
        and path.name not in shards
    ]
    return sorted(old, key=lambda path: bool(_weights(path)["shard"]))  # entries first


def _weights(path: Path) -> dict[str, str | None]:
    """Stem, variant and shard of a file of weights, or of an index; empty for any other file."""
    if m := _WEIGHTS.fullmatch(path.name) or _INDEX.fullmatch(path.name):
        return {"shard": None, **m.groupdict()}
    return {}


def _same(new: Path, old: Path) -> bool:
    # Weights count as new without a comparison, which would read all of them.
    return not _weights(new) and old.is_file() and filecmp.cmp(new, old, shallow=False)
