"""The recipes in the package, and the reading of YAML; no transformers, so a list is quick."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent / "recipes"


def shipped() -> dict[str, str]:
    """Name and description of each recipe included in the package."""
    return {
        path.stem: from_yaml(path.read_text(encoding="utf-8"), path.name)["description"]
        for path in sorted(RECIPES.glob("*.yaml"))
    }


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as in YAML 1.2; YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def from_yaml(text: str | bytes, source: str | Path) -> Any:
    """The value of a YAML text; errors begin with its source.

    Raises:
        ValueError: If it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    # ValueError: an impossible date or number. RecursionError: endless nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
