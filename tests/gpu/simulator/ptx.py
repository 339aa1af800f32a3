"""Parses PTX text into instructions."""

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .errors import SimulationError
from .formats import TYPES


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None  # predicate register, negated
    line: int
    source: str  # "file.py:12" or empty
    types: tuple[str, ...]  # the modifiers that are types

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.operands)}"


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclass
class Space:
    """Variables of one state space: their offsets and total size."""

    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, type_: str, count: int, alignment: int | None) -> None:
        width = TYPES[type_].itemsize
        alignment = alignment or width
        self.offsets[name] = -(-self.size // alignment) * alignment
        self.size = self.offsets[name] + width * count


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    block_limit: int | None  # maximum number of threads of a block,
    block_exact: bool  # or the exact number
    constants: dict[str, np.ndarray]  # the module's .global and .const variables, as bytes
    dynamic_shared: set[str]
    shared: Space
    local: Space = field(default_factory=Space)
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)  # brx.idx's lists of labels
    instructions: list[Instruction] = field(default_factory=list)


def split_operands(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def elements(operand: str) -> list[str]:
    """The registers of a vector operand {a, b}, or a plain operand itself."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


_VARIABLE = re.compile(
    r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(?P<space>global|const|shared|local)\s+"
    r"(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*\{?(?P<values>[^};]*)\}?)?\s*;"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.M)
_PARAMETER = re.compile(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?\s*$", re.S)
_TOKEN = re.compile(
    r"\s*(?:(?P<label>[\w$%.]+):(?!:)|(?P<open>\{)|(?P<close>\})"
    r"|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*"
    r"|(?P<statement>(?:[^;{}]|\{[^;{}]*\})*;))"
)
_STATEMENT = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z0-9_]+)((?:\.[\w:]+)*)\s*(.*)$", re.S)
_IDENTIFIER = re.compile(r"[%\w$.]+")
# .param variables belong to calls, which are errors when they are reached.
_IGNORED = (".pragma", ".file", ".section", ".param")


@lru_cache(maxsize=512)
def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    # Keep the line ends of comments, and with them the line numbers.
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    files = {
        number: os.path.basename(second or first) for number, first, second in _FILE.findall(text)
    }
    entries = list(_ENTRY.finditer(text))
    header = text[: entries[0].start()] if entries else ""
    constants, dynamic = {}, set()
    for found in _VARIABLE.finditer(header):
        if found["space"] in ("global", "const"):
            constants[found["name"]] = _initial_bytes(found)
        elif found["array"] and not found["count"]:
            dynamic.add(found["name"])
    kernels = {}
    for entry in entries:
        shared = Space()
        for found in _VARIABLE.finditer(header):
            if found["space"] == "shared" and found["name"] not in dynamic:
                _declare(shared, found)
        limit = re.search(r"\.(req|max)ntid\s+([\d,\s]+)", entry[3])
        kernel = Kernel(
            name=entry[1],
            parameters=_parameters(entry[2]),
            block_limit=int(np.prod([int(n) for n in limit[2].split(",")])) if limit else None,
            block_exact=bool(limit) and limit[1] == "req",
            constants=constants,
            dynamic_shared=dynamic,
            shared=shared,
        )
        _Body(kernel, files).parse(text, entry.end())
        kernels[kernel.name] = kernel
    return kernels


def _declare(space: Space, found: re.Match) -> None:
    alignment = int(found["alignment"]) if found["alignment"] else None
    space.add(found["name"], found["type"], int(found["count"] or 1), alignment)


def _initial_bytes(found: re.Match) -> np.ndarray:
    dtype = TYPES[found["type"]]
    values = []
    for value in (found["values"] or "").split(","):
        try:
            values.append(int(value, 0))
        except ValueError:
            continue  # an address or a nested list: reads as zero
    data = np.zeros(max(int(found["count"] or 1), len(values), 1), dtype)
    data[: len(values)] = values
    return data.view(np.uint8)


def _parameters(text: str) -> list[Parameter]:
    parameters, end = [], 0
    for declaration in split_operands(text):
        found = _PARAMETER.search(declaration)
        type_ = next(name for name in re.findall(r"\.(\w+)", found[1]) if name in TYPES)
        width = TYPES[type_].itemsize
        aligned = re.match(r"\s*\.align\s+(\d+)", found[1])
        alignment = int(aligned[1]) if aligned else width
        offset = -(-end // alignment) * alignment
        size = width * int(found[3] or 1)
        parameters.append(Parameter(found[2], type_, offset, size))
        end = offset + size
    return parameters


class _Body:
    """Parses a kernel's body; nested braces are scopes with their own registers."""

    def __init__(self, kernel: Kernel, files: dict[str, str]):
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = []
        self.scopes_seen = 0
        self.source = self.label = ""

    def parse(self, text: str, position: int) -> None:
        line, counted = 1, 0
        while True:
            token = _TOKEN.match(text, position)
            if token is None:
                near = text[position : position + 80].strip()
                raise SimulationError(f"{self.kernel.name}: cannot parse PTX near {near!r}")
            position = token.end()
            if token["statement"]:
                statement = token["statement"][:-1].strip()
                start = token.start("statement")
                line, counted = line + text.count("\n", counted, start), start
                if statement:
                    self._statement(statement, line)
            elif token["label"]:
                self.label = token["label"]
                self.kernel.labels[self.label] = len(self.kernel.instructions)
            elif token["line"]:
                self.source = f"{self.files.get(token['file'], '?')}:{token['line']}"
            elif token["open"]:
                self.scopes_seen += 1
                self.scopes.append({})
            elif self.scopes:
                self.scopes.pop()
            else:
                return

    def _statement(self, text: str, line: int) -> None:
        if text.startswith("."):
            self._directive(text)
            return
        found = _STATEMENT.match(text)
        if not found:
            raise SimulationError(f"{self.kernel.name}: PTX line {line}: cannot parse {text!r}")
        negated, predicate, opcode, modifiers, operands = found.groups()
        guard = (self._rename(predicate), negated == "!") if predicate else None
        parts = tuple(modifiers.split(".")[1:])
        self.kernel.instructions.append(
            Instruction(
                opcode,
                parts,
                tuple(split_operands(self._rename(operands))),
                guard,
                line,
                self.source,
                tuple(part for part in parts if part in TYPES),
            )
        )

    def _directive(self, text: str) -> None:
        if text.startswith(".reg"):
            type_, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
            for name in map(str.strip, names.split(",")):
                several = re.match(r"(.*)<(\d+)>$", name)
                count = range(int(several[2])) if several else ()
                for register in [f"{several[1]}{i}" for i in count] if several else [name]:
                    self._register(register, type_)
        elif found := _VARIABLE.match(text + ";"):
            _declare(self.kernel.shared if found["space"] == "shared" else self.kernel.local, found)
        elif text.startswith(".branchtargets"):
            self.kernel.targets[self.label] = split_operands(text.removeprefix(".branchtargets"))
        elif not text.startswith(_IGNORED):
            raise SimulationError(f"{self.kernel.name}: unknown directive {text!r}")

    def _register(self, name: str, type_: str) -> None:
        unique = name
        if self.scopes:
            unique = f"{name}@{self.scopes_seen}"
            self.scopes[-1][name] = unique
        self.kernel.registers[unique] = type_

    def _rename(self, text: str) -> str:
        if not self.scopes:
            return text

        def renamed(found: re.Match) -> str:
            name = found[0]
            return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

        return _IDENTIFIER.sub(renamed, text)
