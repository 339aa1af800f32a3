"""One sentence for whatever is wrong with the files of a model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


@contextmanager
def reading(source: str | os.PathLike) -> Iterator[None]:
    """Within, an error of reading a model's files names the model, and what to do.

    transformers takes what JSON says as it comes, so that a wrong value may end as any exception:
    a KeyError, a ZeroDivisionError, a RecursionError, one of PyTorch's.

    Args:
        source: The model's name or folder.

    Raises:
        OSError: If the files are damaged or cannot be read.
        ValueError: If they say what no model can be made of.
        TypeError: As it comes from within, naming the model.
    """
    try:
        yield
    except (ImportError, MemoryError):  # what is missing is not in the files
        raise
    except SafetensorError as error:
        raise OSError(f"the weights of {source} are damaged ({error}); copy them again.") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise OSError(
            f"{source} has pickled weights that are damaged, or would run code when they are read; "
            "get it as safetensors, or load it where you trust it and save it again with "
            "model.save_pretrained(folder)."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{source} has a JSON file that is nested too deeply to be read."
        ) from error
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"the weights of {source} have not the shapes of its config.json; save the model "
                "again."
            ) from error
        kinds = (OSError, ValueError, TypeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        if kind is not None and str(source) in str(error):
            raise
        what = f"{type(error).__name__}: {error}" if kind is None else error
        raise (kind or ValueError)(
            f"{source} cannot be loaded ({what}); check its config.json and its tokenizer's files, "
            "or save it again."
        ) from error
