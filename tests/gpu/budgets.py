"""Print the resources of the compiled kernels, and renew the budgets that the tests hold them to.

python tests/gpu/budgets.py triton --match "21x up" --arch 80 90
python tests/gpu/budgets.py cuda --write
"""

from __future__ import annotations

import argparse
from importlib import import_module

from static.budget import write_budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("triton", "cuda"))
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", nargs="*", help="such as 80, or gfx942; all by default")
    parser.add_argument("--write", action="store_true", help="renew the limits of these kernels")
    args = parser.parse_args()
    engine = import_module(f"static.{args.engine}_budget")
    if args.write and args.engine == "triton" and not engine.VERSION.startswith(engine.BUDGETED):
        parser.error(f"the limits are those of Triton {engine.BUDGETED}, not {engine.VERSION}")
    archs = [arch for arch in engine.ARCHS if not args.arch or str(arch) in args.arch]
    entries = []
    for row in engine.rows(args.match, archs):
        print(engine.show(row), flush=True)
        entries.append(engine.entry(row))
    if args.write:
        write_budget(engine.BUDGET, entries)


if __name__ == "__main__":
    main()
