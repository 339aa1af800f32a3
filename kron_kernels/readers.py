"""Layers whose weight another module reads: found in that module's source.

Such a module works with a dense layer only: a factorised one has no ``weight``. A list of classes
would age, and a trial needs inputs, so that the methods behind ``forward`` are read instead.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn


def reader(module: nn.Module, path: str) -> str | None:
    """The class of a module around a layer that reads the layer's weight, if one does.

    Args:
        module: Any module.
        path: Where the layer is in it.
    """
    names = path.split(".")
    for depth in reversed(range(len(names))):
        owner = module.get_submodule(".".join(names[:depth]))
        below = tuple("*" if name.isdecimal() else name for name in names[depth:])
        for root, *found in _reads(owner):
            # `self.wo.weight` is exact; behind another variable is some module below.
            chain = tuple(found)
            if chain == below if root == "self" else chain and below[-len(chain) :] == chain:
                return type(owner).__name__
    return None


def _reads(owner: nn.Module) -> Iterator[list[str]]:
    """``["self", "layers", "*", "linear1"]`` for each ``self.layers[0].linear1.weight``."""
    # mypy has it that a class is not hashable.
    for method in _methods(type(owner)):  # type: ignore[arg-type]
        known = dict.fromkeys(_optional(method.args), None) | {"self": owner}
        for node in _reachable(method, known):
            if not isinstance(node, ast.Attribute) or node.attr != "weight":
                continue
            if isinstance(node.ctx, ast.Load):
                yield re.sub(r"\[[^]]*\]", ".*", ast.unparse(node.value)).split(".")


@cache
def _methods(cls: type[nn.Module]) -> list[ast.FunctionDef]:
    """``forward`` and the methods that it may call, as far as they mention a weight."""
    trees: list[ast.FunctionDef] = []
    names = ["forward"]
    for name in names:  # which grows
        method = getattr(cls, name, None)
        if not inspect.isfunction(method) or method is getattr(nn.Module, name, None):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
            tree = ast.parse(source).body[0] if ".weight" in source else None
        except (OSError, TypeError, SyntaxError):  # from an interpreter, compiled, or a lambda
            continue
        names += [n for n in re.findall(r"\bself\.(\w+)", source) if n not in names]
        if isinstance(tree, ast.FunctionDef):
            trees.append(tree)
    return trees


def _optional(args: ast.arguments) -> list[str]:
    """The arguments that are None unless given."""
    last = [*args.posonlyargs, *args.args][-len(args.defaults) :] if args.defaults else []
    last += args.kwonlyargs
    pairs = zip(last, [*args.defaults, *args.kw_defaults], strict=True)
    return [a.arg for a, d in pairs if isinstance(d, ast.Constant) and d.value is None]


def _reachable(node: ast.AST, known: dict[str, Any]) -> Iterator[ast.AST]:
    """The nodes of a tree without branches that settings or missing arguments rule out.

    BLOOM, for one, reads weights only ``if self.pretraining_tp > 1 and self.slow_but_exact``, and
    DeBERTa unless ``query_states is None``.
    """
    yield node
    children: Iterator[ast.AST] | list[ast.stmt] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and (taken := _value(node.test, known)) is not None:
        children = node.body if taken else node.orelse
    for child in children:
        yield from _reachable(child, known)


_PLAIN = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
    *(ast.Attribute, ast.expr_context, ast.Constant),
)


def _value(test: ast.expr, known: dict[str, Any]) -> bool | None:
    """The value of a condition on nothing but what is known, None of any other."""
    for node in ast.walk(test):
        is_known = isinstance(node, ast.Name) and node.id in known
        if not (is_known or isinstance(node, _PLAIN)) or getattr(node, "attr", "") == "training":
            return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {}, known))
    except Exception:  # what it reads may not be there yet
        return None
