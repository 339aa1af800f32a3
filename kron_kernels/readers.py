"""Find layers whose weight another module reads, in that module's source code.

Such a layer must stay dense, since a factorised one has no ``weight``. A list of classes would
become outdated and a trial run needs inputs, so this parses ``forward`` and the methods it calls.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

Chain = tuple[str, ...]  # ("self", "layers", "*", "linear1") for self.layers[0].linear1


def reader(module: nn.Module, path: str) -> str | None:
    """The class name of a module around a layer that reads the layer's weight, if any.

    Args:
        module: Any module.
        path: Path of the layer in it.
    """
    names = path.split(".")
    for depth in reversed(range(len(names))):
        owner = module.get_submodule(".".join(names[:depth]))
        if not _without_fast_path(owner) and any(
            _leads_to(chain, names[depth:]) for chain in _reads(owner)
        ):
            return type(owner).__name__
    return None


def _without_fast_path(owner: Any) -> bool:
    """Whether it is one of PyTorch's encoders, and its fast path, which reads weights, is off."""
    forward = type(owner).forward
    if forward is nn.TransformerEncoderLayer.forward:
        return not owner.activation_relu_or_gelu  # nor is there one for other activations
    return forward is nn.TransformerEncoder.forward and not owner.use_nested_tensor


def _leads_to(chain: Chain, below: list[str]) -> bool:
    """Whether a chain read in a method of a module may be the layer at this path below it."""
    root, *found = chain
    # `self.wo` is exact; any other variable may be any module below.
    exact = root == "self"
    end = below if exact else below[-len(found) :]
    return len(found) == len(end) > 0 and all(
        f == name or (f == "*" and (exact or name.isdecimal()))
        for f, name in zip(found, end, strict=True)
    )


def _reads(owner: nn.Module) -> Iterator[Chain]:
    """The chains whose weight its methods read."""
    # mypy considers classes unhashable.
    for method in _methods(type(owner)):  # type: ignore[arg-type]
        known = dict.fromkeys(_optional(method.args), None) | {"self": owner}
        nodes = [*_reachable(method, known)]
        names = _Names(nodes)
        for node in nodes:
            if (value := _read(node)) is not None:
                yield from names.chains(value)


@cache
def _methods(cls: type[nn.Module]) -> list[ast.FunctionDef]:
    """``forward`` and the methods that it may call, if they mention a weight."""
    trees: list[ast.FunctionDef] = []
    names = ["forward"]
    for name in names:  # grows in the loop
        method = getattr(cls, name, None)
        if not inspect.isfunction(method) or method is getattr(nn.Module, name, None):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
            mentioned = re.search(r"\bweight\b", source)
            tree = ast.parse(source).body[0] if mentioned else None
        except (OSError, TypeError, SyntaxError):  # interactive, compiled, or a lambda
            continue
        names += [n for n in re.findall(r"\bself\.(\w+)", source) if n not in names]
        if isinstance(tree, ast.FunctionDef):
            trees.append(tree)
    return trees


def _optional(args: ast.arguments) -> list[str]:
    """The arguments with default None."""
    last = [*args.posonlyargs, *args.args][-len(args.defaults) :] if args.defaults else []
    last += args.kwonlyargs
    pairs = zip(last, [*args.defaults, *args.kw_defaults], strict=True)
    return [a.arg for a, d in pairs if isinstance(d, ast.Constant) and d.value is None]


def _read(node: ast.AST) -> ast.expr | None:
    """``x`` in ``x.weight`` and ``getattr(x, "weight")``; not in ``getattr`` with a default."""
    match node:
        case ast.Attribute(value, "weight", ast.Load()):
            return value
        case ast.Call(ast.Name("getattr"), [value, ast.Constant("weight")]):
            return value
    return None


class _Names:
    """The chains that a method's local names may refer to."""

    def __init__(self, nodes: list[ast.AST]):
        self._of: dict[str, set[Chain]] = defaultdict(set)
        for node in nodes:
            match node:
                case ast.Assign(targets, value):
                    for target in targets:
                        self._assign(target, value)
                case ast.AnnAssign(target, value=ast.expr() as value) | ast.NamedExpr(
                    target, value
                ):
                    self._assign(target, value)
                case ast.For(target, each) | ast.comprehension(target, each):
                    self._loop(target, each)

    def chains(self, node: ast.expr) -> set[Chain]:
        """The chains that an expression may be."""
        match node:
            case ast.Name(name):
                return self._of.get(name) or {(name,)}
            case ast.Attribute(value, name):
                return {(*chain, name) for chain in self.chains(value)}
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name)), *_]):
                return {(*chain, name) for chain in self.chains(value)}
            case ast.Subscript(value, ast.Slice()):
                return self.chains(value)
            case ast.Subscript(value, ast.Constant(str(name))):
                return {(*chain, name) for chain in self.chains(value)}
            case ast.Subscript(value) | ast.Call(ast.Name("getattr"), [value, _, *_]):
                return {(*chain, "*") for chain in self.chains(value)}
        return {(ast.unparse(node),)}

    def _bind(self, target: ast.expr, chains: set[Chain]) -> None:
        if isinstance(target, ast.Name):
            # A name that may also be something unknown remains a variable.
            self._of[target.id] |= {c if c[0] == "self" else (target.id,) for c in chains}

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Tuple(targets) | ast.List(targets), ast.Tuple(values) | ast.List(values):
                for one, other in zip(targets, values, strict=False):
                    self._assign(one, other)
            case _:
                # `x = x[0]` could be expanded without end.
                own = any(
                    isinstance(n, ast.Name) and n.id == ast.unparse(target) for n in ast.walk(value)
                )
                self._bind(target, {("",)} if own else self.chains(value))

    def _loop(self, target: ast.expr, each: ast.expr) -> None:
        match each, target:
            case ast.Call(ast.Name("enumerate"), [inner, *_]), ast.Tuple([_, item]):
                self._loop(item, inner)
            case ast.Call(ast.Name("zip"), inners), ast.Tuple(items):
                for item, inner in zip(items, inners, strict=False):
                    self._loop(item, inner)
            case ast.Call(ast.Name("reversed" | "list" | "tuple"), [inner]), _:
                self._loop(target, inner)
            case ast.Call(ast.Attribute(inner, "values" | "children"), []), _:
                self._loop(target, inner)
            case (
                ast.Call(ast.Attribute(inner, "items" | "named_children"), []),
                ast.Tuple([_, item]),
            ):
                self._loop(item, inner)
            case ast.Tuple(values) | ast.List(values), _:
                for value in values:
                    self._assign(target, value)
            case _:
                self._bind(target, {(*chain, "*") for chain in self.chains(each)})


def _reachable(
    node: ast.AST, known: dict[str, Any], guarded: frozenset[str] = frozenset()
) -> Iterator[ast.AST]:
    """The nodes of a tree, without branches that settings or missing arguments rule out.

    For example BLOOM reads weights only ``if self.pretraining_tp > 1 and self.slow_but_exact``, and
    DeBERTa unless ``query_states is None``. Also without reads guarded by ``hasattr(x, "weight")``
    or ``except AttributeError``, which happen only where there is a weight.
    """
    child: ast.AST
    value = _read(node)
    if value is None or ast.unparse(value) not in guarded:
        yield node
    match node:
        case ast.If(test) if (taken := _value(test, known)) is not None:
            for child in node.body if taken else node.orelse:
                yield from _reachable(child, known, guarded)
        case ast.If(test) | ast.IfExp(test):
            yield from _reachable(test, known, guarded)
            for branch, holds in ((node.body, True), (node.orelse, False)):
                for child in branch if isinstance(branch, list) else [branch]:
                    yield from _reachable(child, known, guarded | _with_weight(test, holds))
        case ast.BoolOp(op, operands):
            for operand in operands:
                yield from _reachable(operand, known, guarded)
                guarded |= _with_weight(operand, isinstance(op, ast.And))
        case ast.Try(handlers=handlers):
            caught = any(
                h.type is None or "AttributeError" in ast.unparse(h.type) for h in handlers
            )
            for child in ast.iter_child_nodes(node):
                for found in _reachable(child, known, guarded):
                    if not (caught and child in node.body and _read(found) is not None):
                        yield found
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _reachable(child, known, guarded)


def _with_weight(test: ast.expr, holds: bool) -> frozenset[str]:
    """The expressions that have a weight if this condition is true, or if it is false."""
    match test:
        case ast.Call(ast.Name("hasattr"), [value, ast.Constant("weight")]) if holds:
            return frozenset({ast.unparse(value)})
        case ast.Compare(
            ast.Call(ast.Name("getattr"), [value, ast.Constant("weight"), ast.Constant(None)]),
            [ast.IsNot() | ast.Is() as op],
            [ast.Constant(None)],
        ) if holds == isinstance(op, ast.IsNot):
            return frozenset({ast.unparse(value)})
        case ast.UnaryOp(ast.Not(), operand):
            return _with_weight(operand, not holds)
        case ast.BoolOp(op, operands) if holds == isinstance(op, ast.And):
            return frozenset[str]().union(*(_with_weight(o, holds) for o in operands))
    return frozenset()


_PLAIN = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
    *(ast.Attribute, ast.expr_context, ast.Constant),
)


def _value(test: ast.expr, known: dict[str, Any]) -> bool | None:
    """The value of a condition on known names only; None for any other."""
    for node in ast.walk(test):
        is_known = isinstance(node, ast.Name) and node.id in known
        if not (is_known or isinstance(node, _PLAIN)) or getattr(node, "attr", "") == "training":
            return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {}, known))
    except Exception:  # it may read an attribute not set yet
        return None
