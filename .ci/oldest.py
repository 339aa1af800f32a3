"""Writes the lower bounds of pyproject.toml as constraints; prints pip's arguments, one a line.

    python .ci/oldest.py CONSTRAINTS

The arguments install what the extra ``test`` does, without what exports need.
"""

import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

EXPORTS = {"onnx", "openvino"}  # they need a newer transformers than the rest
FREE = {"triton"}  # torch's CUDA builds bring the one that they need


def main(constraints: Path) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = {
        name: [Requirement(line) for line in lines]
        for name, lines in project["optional-dependencies"].items()
    }
    found = [Requirement(line) for line in project["dependencies"]]
    names, tools = ["test"], []
    for name in names:  # grows
        for needed in extras[name]:
            if needed.name == project["name"]:
                names += sorted(needed.extras - EXPORTS - {*names})
            else:
                found.append(needed)
                tools += [str(needed)] * (name == "test")
    lowest = {r.name: s.version for r in found for s in r.specifier if s.operator in (">=", "==")}
    pins = [f"{name}=={version}" for name, version in lowest.items() if name not in FREE]
    constraints.write_text("\n".join([*pins, ""]))
    print("-e", f".[{','.join(names[1:])}]", *tools, sep="\n")


main(Path(sys.argv[1]))
