"""Which layers to factorise, and how: by size, FLOPs, measured latency and error.

For each layer, candidates are shapes with a small left or right factor, low rank, and sums of the
two; their errors come from the spectra of small Gram matrices, without making the factors. A
multiple-choice knapsack takes one of each layer. Layers are timed only once they are chosen: until
then an optimistic bound stands for their time. What is planned is then built and measured.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kron_kernels.decompose import (
    dense_weight,
    is_low_rank,
    nearest_kronecker,
    nearest_kronecker_sum,
)
from kron_kernels.functional import kron_matmul
from kron_kernels.nn import (
    Dense,
    Entry,
    Terms,
    dense_of,
    factorisable,
    no_such_layer,
    random_layer,
    shapes_of,
    swap_,
    terms_of,
)
from kron_kernels.shapes import KronShape
from kron_kernels.timing import interleaved

Objective = Literal["error", "size", "latency"]

_SIDES = 16  # the small factor's sides at most
_B_SIZES = 32  # an embedding's b at most
_RANKS = (1, 2, 4, 8)
# Low rank is tried at these compressions, with ranks of multiples of 8 where that is possible.
_COMPRESSIONS = (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)
_BASES = 3  # Kronecker products that get a low-rank part
# A larger candidate must lower the error by this share of it. The errors of neighbours differ by
# less, and each that is kept may have to be timed.
_GAIN = 0.02
_ROWS = 256  # of inputs on which an output's error is measured
_SHRINKAGE = 0.01  # of second moments, as nearest_kronecker has it
_ROUNDS = 6  # of building and measuring
_LAYER_SECONDS, _MODULE_SECONDS = 0.05, 2.0  # of timing one candidate, and the whole


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; FLOPs and milliseconds are those of one forward pass.

    ``terms`` is None where the layer stays dense. ``reason`` says why it does, or that the
    factorised one is slower here. ``latency`` is None where nothing depended on it, so that it was
    not measured.
    """

    path: str
    rows: int
    columns: int
    terms: Entry | None
    parameters_dense: int
    parameters: int
    flops_dense: int
    flops: int
    latency_dense: float | None
    latency: float | None
    error: float
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """Terms of each layer, what they cost, and where that was measured; all values plain JSON.

    Attributes:
        factors: From each layer's path to its terms, or None for a dense one: what
            :func:`kron_kernels.factorise_` takes.
        layers: One :class:`LayerPlan` a layer.
        totals: Of the whole module, ``{"dense": …, "planned": …}`` each, measured on a module so
            built: ``parameters``, ``bytes`` of them, ``flops`` and ``latency`` (milliseconds) of a
            forward pass, the latter with ``"predicted"`` where layers were timed; and ``error``,
            the layers' mean relative squared error.
        setting: Where it was measured: device, dtype, threads, versions, and the inputs.
        budget: As it was asked for.
        objective: As it was asked for.
    """

    factors: dict[str, Entry | None]
    layers: list[LayerPlan]
    totals: dict[str, Any]
    setting: dict[str, Any]
    budget: dict[str, float | str]
    objective: str
    version: int = field(default=1)

    def to_json(self) -> str:
        """The plan as JSON, which :meth:`from_json` reads."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of this text.

        Raises:
            ValueError: If it is no plan, or one of another version.
        """
        told = json.loads(text)
        wanted = {f.name for f in fields(cls)}
        if not isinstance(told, dict) or told.keys() != wanted or told["version"] != 1:
            found = sorted(told) if isinstance(told, dict) else type(told).__name__
            raise ValueError(
                f"this is no plan of version 1: it has {found}, not {sorted(wanted)}; make it anew "
                "with kron_kernels.plan.plan."
            )
        return cls(**told | {"layers": [LayerPlan(**row) for row in told["layers"]]})

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, at once or not at all."""
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what :meth:`save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return _table(self)


def plan(
    module: nn.Module,
    budget: Mapping[str, float | str],
    inputs: Any,
    *,
    objective: Objective = "error",
    layers: Mapping[str, Entry | dict[str, Any] | None] | None = None,
    names: Iterable[str] | None = None,
    calibration: Iterable[Any] | None = None,
    mix: bool = True,
    keep_dense_if_slower: bool = True,
    build: Callable[[dict[str, Entry]], nn.Module] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose the factors of a module's layers; the module is left as it is.

    Args:
        module: Any module; it is measured in evaluation mode, without gradients.
        budget: What the factorised module may take, as a number or as a share of what the dense
            one does, ``"8x"`` less or ``"50%"``. Of the whole module: ``"parameters"`` (tied ones
            once), ``"bytes"`` of parameters, ``"flops"`` and ``"latency"`` (milliseconds) of one
            forward pass of ``inputs``; and ``"error"``, the mean relative squared error of the
            layers. All that are named are met together.
        inputs: What the module is called with: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments. Its tokens, device and dtype are those that latency and
            FLOPs are of; so are the threads and the autocast mode at the time.
        objective: What is minimised within the budget: ``"error"``, ``"size"`` (parameters) or
            ``"latency"``.
        layers: Decisions already made, from the end of a layer's path, cut at a dot, to its terms
            ``[{"a_shape": [m1, n1], "rank": r}, …]``, or to None, which keeps it dense. The longest
            name that fits decides.
        names: The layers that may be factorised, by the ends of their paths. By default every
            ``nn.Linear`` (and transformers' ``Conv1D``) that is not tied to another one;
            ``nn.Embedding`` only if named.
        calibration: Inputs, each like ``inputs``, of real data: the error is that of a layer's
            outputs on them instead of its weight's. Positions that an ``"attention_mask"`` excludes
            do not count. An embedding's error remains its weight's.
        mix: Try sums of a Kronecker product and a low-rank part, too.
        keep_dense_if_slower: Where a factorised layer takes longer than the dense one here, keep
            the dense one, if the budget can be met so and ``objective`` is not ``"size"``.
        build: From the factorised layers' terms, by path, to such a module, whose factors may be
            anything: what is built and measured. By default a copy of ``module`` with its layers
            replaced.
        progress: Say on the standard error what is being done.

    Raises:
        ValueError: If the budget cannot be met, with what could be; or for an argument that does
            not fit, with what would.
    """
    _check_arguments(budget, objective)
    say = partial(_say, progress)
    with _evaluation(module), torch.no_grad():
        targets = _targets(module, names, layers or {}, build is not None)
        say(f"{len(targets)} layers; a forward pass")
        _observe_shapes(module, inputs, targets)
        dense = _totals(module, inputs)
        time = partial(_call, module, inputs)
        dense["latency"] = interleaved({"dense": time}, seconds=_MODULE_SECONDS)["dense"].median
        limits = _limits(budget, dense)
        statistics = None if calibration is None else _statistics(module, calibration, targets)
        for i, target in enumerate(targets):
            say(f"errors {i + 1} of {len(targets)}: {target.path}")
            target.candidates = _candidates(target, statistics, mix)
            if statistics is not None:
                statistics.pop(target.path, None)
        trial = build or partial(_trial, module)
        planner = _Planner(targets, dense, limits, objective, keep_dense_if_slower, say)
        return planner.run(module, inputs, trial, dict(budget))


# --- arguments

_KEYS = ("parameters", "bytes", "flops", "latency", "error")


def _check_arguments(budget: Mapping[str, float | str], objective: str) -> None:
    if objective not in ("error", "size", "latency"):
        raise ValueError(f"objective = {objective!r} must be 'error', 'size' or 'latency'.")
    if not budget and objective == "error":
        raise ValueError(
            "the budget is empty, within which every layer could stay dense; give one of "
            f"{', '.join(_KEYS)}, such as {{'parameters': '8x'}}, or another objective."
        )
    for key, value in budget.items():
        if key not in _KEYS:
            raise ValueError(f"budget has {key!r}, but can have {', '.join(_KEYS)}.")
        _limit(key, value, 1.0)


def _limit(key: str, value: float | str, dense: float) -> float:
    number: float | None = None
    if isinstance(value, str):
        text = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([x%])\s*", value)
        if text and text[1].count(".") < 2 and float(text[1]) > 0:
            share = 1 / float(text[1]) if text[2] == "x" else float(text[1]) / 100
            if key != "error" or text[2] == "%":  # the dense module has no error
                number = share * dense
    elif not isinstance(value, bool) and isinstance(value, int | float) and value >= 0:
        number = float(value)
    if number is None:
        raise ValueError(
            f"budget[{key!r}] = {value!r} must be a number"
            + ("" if key == "error" else ", 'times smaller' as in '8x',")
            + " or a share as in '50%'."
        )
    return number


def _limits(budget: Mapping[str, float | str], dense: Mapping[str, float]) -> dict[str, float]:
    return {key: _limit(key, value, dense.get(key, 1.0)) for key, value in budget.items()}


def _fits(name: str, path: str) -> bool:
    return f".{path}".endswith(f".{name}")


class _Candidate(NamedTuple):
    terms: Terms
    parameters: int
    flops: int  # of one forward pass
    error: float


@dataclass(eq=False)
class _Target:
    """A layer that may be factorised."""

    path: str
    layer: Dense
    decided: bool = False  # by ``layers``
    terms: Terms = ()  # if decided
    inputs: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)  # of each call
    candidates: list[_Candidate] = field(default_factory=list)

    @cached_property
    def size(self) -> tuple[int, int]:
        rows, columns = dense_of(self.layer).shape
        return rows, columns

    @property
    def embedding(self) -> bool:
        return isinstance(self.layer, nn.Embedding)

    @cached_property
    def tokens(self) -> int:
        ids = self.embedding
        return sum(shape.numel() // (1 if ids else shape[-1]) for shape, _ in self.inputs)

    @cached_property
    def kind(self) -> str:
        """Equal for layers that take equal time."""
        bias = getattr(self.layer, "bias", None) is not None
        layer = type(self.layer).__name__
        return str((layer, self.size, bias, self.layer.weight.dtype, self.inputs))


def _targets(
    module: nn.Module,
    names: Iterable[str] | None,
    decided: Mapping[str, Entry | dict[str, Any] | None],
    allow_tied: bool,
) -> list[_Target]:
    plain, named = factorisable(module), factorisable(module, allow_tied)
    chosen = {p for p, (m, why) in plain.items() if not why and not isinstance(m, nn.Embedding)}
    if names is not None:
        chosen, names = set(), [names] if isinstance(names, str) else list(names)
        for name in names:
            fitting = [path for path in named if _fits(name, path)]
            if not fitting:
                raise ValueError(f"names has {name!r}, {no_such_layer(name, named)}")
            chosen.update(fitting)
    decisions = {name: terms_of(e, f"layers[{name!r}]") for name, e in decided.items()}
    for name, terms in decisions.items():
        fitting = [path for path in named if _fits(name, path)]
        if not fitting:
            raise ValueError(f"layers has {name!r}, {no_such_layer(name, named)}")
        chosen.update(path for path in fitting if terms)
    targets = []
    for path, (layer, reason) in named.items():
        name = max((n for n in decisions if _fits(n, path)), key=len, default=None)
        if path not in chosen:
            continue
        if reason:
            raise ValueError(f"{path!r} cannot be factorised: {reason}; leave it out.")
        target = _Target(path, layer, name is not None, decisions.get(name, ()))
        if target.terms:
            _check_decision(target, f"layers[{name!r}], for {path or 'the module'}")
        targets.append(target)
    if not targets:
        raise ValueError(
            "the module has no layer that could be factorised: no nn.Linear that is called and not "
            "tied to another; name an nn.Embedding in names, or nothing can be planned."
        )
    return targets


def _check_decision(target: _Target, what: str) -> None:
    shapes = shapes_of(target.layer, target.terms, what)
    parameters, dense = sum(s.parameters for s in shapes), target.layer.weight.numel()
    if parameters >= dense:
        raise ValueError(
            f"{what}: {_terms_text(target.size, target.terms)} has {parameters:,} parameters, no "
            f"fewer than the dense layer's {dense:,}; lower the rank, choose another a_shape, or "
            "write None for a dense layer."
        )


# --- what the module does with inputs


def _call(module: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


@contextmanager
def _evaluation(module: nn.Module):
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in training:
            m.training = mode


@contextmanager
def _hooked(targets: Sequence[_Target], hook: Callable[[_Target, Tensor], None]):
    def of(target):
        return lambda _, args, kwargs: hook(
            target, args[0] if args else next(iter(kwargs.values()))
        )

    handles = [t.layer.register_forward_pre_hook(of(t), with_kwargs=True) for t in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_shapes(module: nn.Module, inputs: Any, targets: Sequence[_Target]) -> None:
    with _hooked(targets, lambda target, x: target.inputs.append((x.shape, x.dtype))):
        _call(module, inputs)


def _totals(module: nn.Module, inputs: Any) -> dict[str, float]:
    """Parameters, their bytes, and FLOPs of a forward pass of the whole module."""
    with FlopCounterMode(display=False) as counter:
        _call(module, inputs)
    parameters = list(module.parameters())  # tied ones once
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "flops": counter.get_total_flops(),
    }


def _trial(module: nn.Module, factors: Mapping[str, Entry]) -> nn.Module:
    return swap_(copy.deepcopy(module), factors, random_layer)


# --- calibration


class _Statistics:
    """``E[x xᵀ]`` of a layer's inputs, and some of these inputs."""

    def __init__(self, columns: int, device: torch.device):
        self.moment = torch.zeros(columns, columns, device=device)
        self.count, self.samples = 0, []

    def add(self, x: Tensor) -> None:
        x = x.float()
        self.moment.addmm_(x.mT, x)
        self.count += x.shape[0]
        # Evenly spread, and of all batches in the end.
        step = max(1, x.shape[0] // 64)
        self.samples.append(x[::step][:64].clone())

    @property
    def rows(self) -> Tensor:
        rows = torch.cat(self.samples)
        return rows[torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long().to(rows.device)]

    def shrunk(self) -> Tensor:
        """``E[x xᵀ]`` of mean variance 1, shrunk as :func:`nearest_kronecker` does."""
        c = self.moment / self.moment.diagonal().mean().clamp_min(1e-30)
        c.diagonal().add_(_SHRINKAGE)
        return c


def _statistics(
    module: nn.Module, calibration: Iterable[Any], targets: Sequence[_Target]
) -> dict[str, _Statistics]:
    linears = [t for t in targets if not t.embedding]
    found = {t.path: _Statistics(t.size[1], t.layer.weight.device) for t in linears}
    for batch in calibration:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def add(target: _Target, x: Tensor, mask: Tensor | None = mask) -> None:
            real = mask is not None and mask.shape == x.shape[:-1]
            found[target.path].add(x[mask.bool()] if real else x.flatten(0, -2))

        with _hooked(linears, add):
            _call(module, batch)
    for t in linears:
        # A layer that was not called has no outputs to err in: it stays dense, or has its weight's.
        if not found[t.path].count:
            del found[t.path]
    return found


# --- candidates and their errors


def _candidates(
    target: _Target, statistics: Mapping[str, _Statistics] | None, mix: bool
) -> list[_Candidate]:
    """The dense layer first, then what may take its place, or what was decided alone."""
    rows, columns = target.size
    dense_flops = 0 if target.embedding else 2 * rows * columns * target.tokens
    dense = _Candidate((), rows * columns, dense_flops, 0.0)
    if target.decided:
        if not target.terms:
            return [dense]
        known = None if statistics is None else statistics.get(target.path)
        return [_priced(target, target.terms, _error_of(target, known))]
    if not target.inputs:
        return [dense]
    w = dense_of(target.layer).detach().float()
    w = w / w.abs().max().clamp_min(torch.finfo(w.dtype).tiny)
    known = None if statistics is None else statistics.get(target.path)
    groups = [_table_errors(w)] if target.embedding else _linear_errors(w, known, mix)
    kept = [dense]
    for group in groups:
        priced = (_priced(target, terms, error) for terms, error in group.items())
        kept += _thinned([c for c in priced if c.parameters < dense.parameters])
    return kept


def _priced(target: _Target, terms: Terms, error: float) -> _Candidate:
    rows, columns = target.size
    shapes = [KronShape.split(rows, columns, *term) for term in terms]
    flops = 0 if target.embedding else sum(s.flops for s in shapes) * target.tokens
    return _Candidate(terms, sum(s.parameters for s in shapes), flops, error)


def _thinned(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """Those that none with fewer parameters and FLOPs comes near in error."""
    kept: list[_Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.parameters, c.flops, c.error, c.terms)):
        if all(c.error < (1 - _GAIN) * k.error for k in kept if k.flops <= c.flops):
            kept.append(c)
    return kept


Errors = dict[Terms, float]


def _table_errors(w: Tensor) -> Errors:
    """Of an embedding ``w (v, d)`` as ``(v, d / b_size) ⊗ (1, b_size)``, rank 1."""
    rows, dim = w.shape
    errors = {}
    for (_, b), spectrum in _spectra(w, "right", [1], _divisors(dim, _B_SIZES)):
        errors[((rows, dim // b), 1),] = _dropped(spectrum, 1)
    return errors


def _linear_errors(w: Tensor, known: _Statistics | None, mix: bool) -> list[Errors]:
    """Of a small left factor, of a small right one, of low rank, and of sums."""
    m, n = w.shape
    c = None if known is None else known.shrunk()
    half = None if c is None else _root(c)  # (n, n), half @ half.mT = C
    left, right = (_product_errors(w, side, known, c) for side in ("left", "right"))
    # E = 0 is what has nothing to gain from a further part.
    low = _low_rank_errors(w if half is None else w @ half, m, n)
    groups = [left, right, low]
    if mix:
        groups.append({})
        energy = (w if half is None else w @ half).square().sum().item()
        for terms in _bases({**left, **right}, m, n):
            ((a_shape, rank),) = terms
            rest = w - dense_weight(*_product(w, a_shape, rank, c))
            rest = rest if half is None else rest @ half
            share = rest.square().sum().item() / max(energy, 1e-30)
            for (low_term,), error in _low_rank_errors(rest, m, n).items():
                groups[-1][(*terms, low_term)] = share * error
    return groups


def _bases(errors: Errors, m: int, n: int) -> list[Terms]:
    """The products that explain most beyond their share of the parameters."""

    def gain(item: tuple[Terms, float]) -> float:
        ((a_shape, rank),), error = item
        return 1 - error - KronShape.split(m, n, a_shape, rank).parameters / (m * n)

    best = sorted(errors.items(), key=gain, reverse=True)
    shapes: dict[tuple[int, int], Terms] = {}
    for terms, _ in best:
        shapes.setdefault(terms[0][0], terms)
        if len(shapes) == _BASES:
            break
    return list(shapes.values())


def _low_rank_errors(w: Tensor, m: int, n: int) -> Errors:
    gram = w @ w.mT if m <= n else w.mT @ w
    spectrum = torch.linalg.eigvalsh(gram.double() if len(gram) <= 256 else gram).flip(0)
    full = m * n / (m + n)  # the rank that has as many parameters as the dense layer
    errors = {}
    for compression in _COMPRESSIONS:
        rank = int(full / compression)
        rank -= rank % 8 if rank > 16 else 0
        if 1 <= rank < full:
            errors[((m, 1), rank),] = _dropped(spectrum, rank)
    return errors


def _product_errors(w: Tensor, side: str, known: _Statistics | None, c: Tensor | None) -> Errors:
    m, n = w.shape
    ps, qs = _divisors(m, _SIDES), _divisors(n, _SIDES)
    errors: Errors = {}

    def note(p: int, q: int, spectrum: Tensor) -> None:
        most = min(p * q, m * n // (p * q))
        for rank in _RANKS:
            if p * q > 1 and rank <= most:
                a_shape = (p, q) if side == "left" else (m // p, n // q)
                s = KronShape.split(m, n, a_shape, rank)
                if s.parameters < m * n and not is_low_rank(s):
                    errors[(a_shape, rank),] = _dropped(spectrum, rank)

    if c is None:
        for (p, q), spectrum in _spectra(w, side, ps, qs):
            note(p, q, spectrum)
        return errors
    for q in qs:
        roots = _separable_roots(c, q if side == "left" else n // q)
        for (p, _), spectrum in _spectra(_whitened(w, *roots), side, ps, [q]):
            note(p, q, spectrum)
    # The separable metric ranks them; those that lead are measured.
    leading = _thinned(
        _Candidate(terms, s.parameters, s.flops, error)
        for terms, error in errors.items()
        for s in [KronShape.split(m, n, *terms[0])]
    )
    y = known.rows @ w.mT
    scale = y.square().sum().clamp_min(1e-30)
    measured = {}
    for terms, *_ in leading:
        a, b = _product(w, *terms[0], c)
        off = y - kron_matmul(known.rows, a, b)
        measured[terms] = (off.square().sum() / scale).item()
    return measured


def _spectra(w: Tensor, side: str, ps: Sequence[int], qs: Sequence[int]):
    """Eigenvalues, descending, of the Gram matrix over a small factor's entries, for each (p, q).

    Only for the largest p and q is it a product with w: a divisor's is a partial trace of it.
    """
    left = side == "left"
    for top_p in _tops(ps):
        for top_q in _tops(qs):
            gram = _gram(w, side, top_p, top_q)
            for p in ps:
                for q in qs:
                    owner = (
                        next(t for t in _tops(ps) if t % p == 0),
                        next(t for t in _tops(qs) if t % q == 0),
                    )
                    if owner == (top_p, top_q):
                        i, j = top_p // p, top_q // q
                        sides = (p, i, q, j) if left else (i, p, j, q)
                        trace = "aibjcidj->abcd" if left else "iajbicjd->abcd"
                        part = torch.einsum(trace, gram.view(*sides, *sides))
                        part = part.reshape(p * q, p * q)
                        yield (p, q), torch.linalg.eigvalsh(part).flip(0)


def _gram(w: Tensor, side: str, p: int, q: int) -> Tensor:
    m, n = w.shape
    if side == "left":
        r = w.reshape(p, m // p, q, n // q).permute(0, 2, 1, 3).reshape(p * q, -1)
    else:
        r = w.reshape(m // p, p, n // q, q).permute(1, 3, 0, 2).reshape(p * q, -1)
    return (r @ r.mT).double()


def _dropped(spectrum: Tensor, rank: int) -> float:
    """The share of the squares that ``rank`` terms leave, of eigenvalues in descending order."""
    spectrum = spectrum.double().clamp_min(0)
    total = spectrum.sum().item()
    return spectrum[rank:].sum().item() / total if total > 0 else 0.0


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _tops(divisors: Sequence[int]) -> list[int]:
    """Those that divide no other."""
    return [d for d in divisors if not any(e > d and e % d == 0 for e in divisors)]


def _root(c: Tensor) -> Tensor:
    """Lower triangular L with ``L Lᵀ = C``; C has been shrunk, so that rounding cannot break it."""
    return torch.linalg.cholesky(c.double()).float()


def _separable_roots(c: Tensor, n1: int) -> tuple[Tensor, Tensor]:
    """Roots of ``C1 (n1, n1)`` and ``C2`` whose product is near C: its partial traces."""
    n2 = len(c) // n1
    blocks = c.view(n1, n2, n1, n2)
    c1 = torch.einsum("aibi->ab", blocks) / n2
    c2 = torch.einsum("iaib->ab", blocks) / n1
    # tr(C1 ⊗ C2) = tr C1 tr C2 is to be tr C.
    return _root(c1), _root(
        c2 / c2.diagonal().mean() * (c.diagonal().mean() / c1.diagonal().mean())
    )


def _whitened(w: Tensor, root1: Tensor, root2: Tensor) -> Tensor:
    """``W (L1 ⊗ L2)``."""
    m, n = w.shape
    blocks = w.reshape(m * len(root1), len(root2)) @ root2
    return torch.einsum("mab,ac->mcb", blocks.view(m, len(root1), len(root2)), root1).reshape(m, n)


def _product(
    w: Tensor, a_shape: tuple[int, int], rank: int, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors nearest in the weight, or in the separable metric next to C."""
    if c is None:
        return nearest_kronecker(w, a_shape, rank)
    root1, root2 = _separable_roots(c, a_shape[1])
    a, b = nearest_kronecker(_whitened(w, root1, root2), a_shape, rank)
    a = torch.linalg.solve_triangular(root1, a, upper=False, left=False)
    return a, torch.linalg.solve_triangular(root2, b, upper=False, left=False)


def _error_of(target: _Target, known: _Statistics | None) -> float:
    """Of the terms that were decided."""
    w = dense_of(target.layer).detach().float()
    c = None if known is None else known.moment / known.count
    fitted = nearest_kronecker_sum(w, target.terms, second_moment=c)
    if known is None:
        rest = w - sum(dense_weight(a, b) for a, b in fitted)
        return (rest.square().sum() / w.square().sum().clamp_min(1e-30)).item()
    y = known.rows @ w.mT
    off = y - sum(kron_matmul(known.rows, a, b) for a, b in fitted)
    return (off.square().sum() / y.square().sum().clamp_min(1e-30)).item()


# --- latency


class _Clock:
    """Milliseconds of layers by kind and terms, measured when asked for."""

    def __init__(self):
        self.known: dict[str, dict[Terms, float]] = defaultdict(dict)
        self.rate = 0.0  # FLOPs per millisecond, the best that was seen

    def measure(self, wanted: Iterable[tuple[_Target, Terms]]) -> None:
        """Those not measured yet, each beside its dense layer, whose first time is the unit."""
        by_kind: dict[str, tuple[_Target, set[Terms]]] = {}
        for target, terms in wanted:
            by_kind.setdefault(target.kind, (target, set()))[1].add(terms)
        for kind, (target, asked) in by_kind.items():
            known = self.known[kind]
            new = sorted(asked - known.keys() - {()})
            if (not new and () in known) or not target.inputs:
                continue
            layers = {(): target.layer} | {t: random_layer("", target.layer, t) for t in new}
            found = dict.fromkeys(layers, 0.0)
            for shape, dtype in target.inputs:
                x = _input_like(target, shape, dtype)
                calls = {_name(t): partial(_call, layer.eval(), x) for t, layer in layers.items()}
                seconds = _LAYER_SECONDS * len(calls) / len(target.inputs)
                timings = interleaved(calls, seconds=seconds)
                for t in layers:
                    found[t] += timings[_name(t)].median
            known.setdefault((), found[()])
            # A clock that drifts; by more than 2 it is another process, which disturbs a GEMM on
            # all cores hundreds of times as much as a small product on one.
            scale = min(max(known[()] / found[()], 0.5), 2.0)
            for t in new:
                known[t] = found[t] * scale
            self._note_rates(target, known)

    def _note_rates(self, target: _Target, known: Mapping[Terms, float]) -> None:
        for c in target.candidates:
            if c.terms in known:
                self.rate = max(self.rate, c.flops / known[c.terms])

    def known_of(self, target: _Target, terms: Terms) -> float | None:
        return 0.0 if not target.inputs else self.known[target.kind].get(terms)

    def bound(self, target: _Target, c: _Candidate) -> float:
        """Its time, or less than that if it was not measured."""
        known = self.known_of(target, c.terms)
        return c.flops / self.rate if known is None and self.rate else known or 0.0


def _name(terms: Terms) -> str:
    return str(terms) if terms else "dense"


def _input_like(target: _Target, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    device = target.layer.weight.device
    if target.embedding:
        return torch.randint(target.size[0], shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


# --- the choice


class _Infeasible(Exception):
    pass


class _Planner:
    """Solve, measure what was chosen, solve again; then build, measure that, and correct."""

    def __init__(
        self,
        targets: Sequence[_Target],
        dense: Mapping[str, float],
        limits: Mapping[str, float],
        objective: str,
        keep_dense_if_slower: bool,
        say: Callable[[str], None],
    ):
        self.targets, self.dense, self.limits, self.objective = targets, dense, limits, objective
        self.keep_dense = keep_dense_if_slower and objective != "size"
        self.timed = self.keep_dense or "latency" in limits or objective == "latency"
        self.clock, self.say = _Clock(), say
        if self.timed:
            say("timing dense layers")
            self.clock.measure((t, ()) for t in targets)

    def run(
        self,
        module: nn.Module,
        inputs: Any,
        build: Callable[[dict[str, Entry]], nn.Module],
        budget: dict[str, float | str],
    ) -> Plan:
        allowed, best, tried = dict(self.limits), None, {}
        for _ in range(_ROUNDS):
            try:
                chosen = self._choose(allowed)
            except _Infeasible:
                if best is not None or tried:
                    break
                chosen = self._closest()
            key = tuple(chosen)
            if key in tried:
                break
            tried[key] = actual = self._measured(chosen, module, inputs, build)
            over = {k: actual[k] for k in self.limits if actual[k] > self.limits[k]}
            if not over and (best is None or self._goal(chosen) < self._goal(best)):
                best = chosen
            # What was measured stands for the prediction, with 2 % kept for the clock.
            predicted = self._predicted(chosen)
            for k in self.limits.keys() - {"error"}:
                if k == "latency":
                    slack = 0.98 if k in over else 1.0
                    scaled = slack * self.limits[k] * predicted[k] / actual[k]
                    allowed[k] = min(scaled, allowed[k]) if k in over else scaled
                else:
                    allowed[k] = self.limits[k] - (actual[k] - predicted[k])
            if not over and ("latency" not in self.limits or self._full(actual)):
                break
        if best is None:
            self._refuse(tried, budget)
        return self._plan(best, tried[tuple(best)], inputs, module, budget)

    def _full(self, actual: Mapping[str, float]) -> bool:
        """Whether little of the time is left, or nothing could be gained from it."""
        return actual["latency"] > 0.93 * self.limits["latency"] or self.objective == "latency"

    # Choosing

    def _choose(self, allowed: Mapping[str, float]) -> list[int]:
        """A candidate of each layer, all timed if times matter."""
        while True:
            chosen = self._keeping_dense(allowed) if self.keep_dense else self._solve(allowed, ())
            if chosen is None:
                raise _Infeasible
            wanted = self._untimed(chosen)
            if not wanted:
                return chosen
            self.say(f"timing {len({(t.kind, terms) for t, terms in wanted})} kinds of layers")
            self.clock.measure(wanted)

    def _untimed(self, chosen: Sequence[int]) -> list[tuple[_Target, Terms]]:
        if not self.timed:
            return []
        picked = ((t, t.candidates[j].terms) for t, j in zip(self.targets, chosen, strict=True))
        return [(t, terms) for t, terms in picked if self.clock.known_of(t, terms) is None]

    def _keeping_dense(self, allowed: Mapping[str, float]) -> list[int] | None:
        """Without what is slower than dense; where the budget needs it, of as few kinds as can be.

        The kinds that lose least time come first.
        """
        loss = {}
        for t in self.targets:
            slower = [self._loss(t, c) for c in t.candidates if self._loss(t, c) > 0]
            if slower and not t.decided:
                loss[t.kind] = min(slower)
        kinds = sorted(loss, key=loss.get)
        chosen = self._solve(allowed, kinds)
        if chosen is not None or not kinds:
            return chosen
        if self._solve(allowed, ()) is None:
            return None
        kept = list(kinds)
        for kind in kinds:
            kept.remove(kind)
            if self._solve(allowed, kept) is not None:
                break
        needed = [k for k in kinds if k not in kept]
        for kind in reversed(needed):  # some of those before may not have been necessary
            if self._solve(allowed, [*kept, kind]) is not None:
                kept.append(kind)
        return self._solve(allowed, kept)

    def _loss(self, target: _Target, c: _Candidate) -> float:
        """Milliseconds that it is slower than dense, 0 if that is not known."""
        dense = self.clock.known_of(target, ())
        known = self.clock.known_of(target, c.terms)
        unknown = dense is None or known is None or not c.terms
        return 0.0 if unknown else max(known - dense, 0.0)

    def _solve(
        self, allowed: Mapping[str, float], dense_kinds: Iterable[str], objective: str = ""
    ) -> list[int] | None:
        objective, dense_kinds = objective or self.objective, set(dense_kinds)
        rows, goals, costs = [], [], []
        for t in self.targets:
            some = [
                j
                for j, c in enumerate(t.candidates)
                if t.decided or t.kind not in dense_kinds or not self._loss(t, c) > 0
            ]
            rows.append(some)
            goals.append([self._goal_of(t, t.candidates[j], objective) for j in some])
            costs.append([[self._cost(t, t.candidates[j], k) for k in allowed] for j in some])
        room = [allowed[k] - self._rest(k) for k in allowed]
        chosen = solve(goals, costs, room)
        return None if chosen is None else [r[j] for r, j in zip(rows, chosen, strict=True)]

    def _goal_of(self, target: _Target, c: _Candidate, objective: str) -> float:
        key = {"size": "parameters"}.get(objective, objective)
        return self._cost(target, c, key)

    def _goal(self, chosen: Sequence[int]) -> float:
        picked = zip(self.targets, chosen, strict=True)
        return sum(self._goal_of(t, t.candidates[j], self.objective) for t, j in picked)

    def _cost(self, target: _Target, c: _Candidate, key: str) -> float:
        match key:
            case "parameters":
                return c.parameters
            case "bytes":
                return c.parameters * target.layer.weight.element_size()
            case "flops":
                return c.flops
            case "latency":
                return self.clock.bound(target, c)
        return c.error / len(self.targets)

    def _rest(self, key: str) -> float:
        """What is not of these layers."""
        dense = sum(self._cost(t, _dense_of(t), key) for t in self.targets)
        return 0.0 if key == "error" else max(self.dense[key] - dense, 0.0)

    def _predicted(self, chosen: Sequence[int]) -> dict[str, float]:
        picked = [(t, t.candidates[j]) for t, j in zip(self.targets, chosen, strict=True)]
        keys = [k for k in _KEYS if k != "latency" or self.timed]
        return {k: self._rest(k) + sum(self._cost(t, c, k) for t, c in picked) for k in keys}

    def _closest(self) -> list[int]:
        """What comes nearest to a budget that seems too small: rests and sums of times may err."""
        binding = [k for k in self.limits if self._solve({k: self.limits[k]}, ()) is None]
        key = binding[0] if binding else next(iter(self.limits))
        others = {k: v for k, v in self.limits.items() if k not in binding}
        while True:
            goal = {"parameters": "size"}.get(key, key)
            chosen = self._solve(others, (), goal) or self._solve({}, (), goal)
            wanted = self._untimed(chosen)
            if not wanted:
                return chosen
            self.clock.measure(wanted)

    # Measuring

    def _measured(
        self,
        chosen: Sequence[int],
        module: nn.Module,
        inputs: Any,
        build: Callable[[dict[str, Entry]], nn.Module],
    ) -> dict[str, float]:
        self.say("building and measuring the whole")
        picked = [(t, t.candidates[j]) for t, j in zip(self.targets, chosen, strict=True)]
        trial = build({t.path: _entry(c.terms) for t, c in picked if c.terms}).eval()
        actual = _totals(trial, inputs)
        calls = {"dense": partial(_call, module, inputs), "planned": partial(_call, trial, inputs)}
        timings = interleaved(calls, seconds=_MODULE_SECONDS)
        # By the ratio, in the unit of the first time: the machine may have slowed since.
        ratio = timings["planned"].median / timings["dense"].median
        actual["latency"] = self.dense["latency"] * ratio
        return actual | {"error": self._predicted(chosen)["error"]}

    def _refuse(self, tried: Mapping[tuple, Mapping[str, float]], budget: Mapping) -> None:
        def excess(actual: Mapping[str, float]) -> float:
            return max(actual[k] / max(limit, 1e-30) for k, limit in self.limits.items())

        actual = min(tried.values(), key=excess)
        told = []
        for k, limit in self.limits.items():
            if actual[k] > limit:
                rest = "" if k == "error" else f", {_quantity(k, self._rest(k))} of it elsewhere"
                told.append(
                    f"{k} is to be at most {_quantity(k, limit)} ({budget[k]!r}), but the nearest "
                    f"plan found has {_quantity(k, actual[k])} (dense: "
                    f"{_quantity(k, self.dense.get(k, 0.0))}{rest} than in the {len(self.targets)} "
                    "layers that may be factorised)"
                )
        raise ValueError(
            f"the budget cannot be met: {'; '.join(told)}. Allow more of it, name more layers "
            "(embeddings are only factorised if named), or drop another limit or decision."
        )

    # Telling

    def _plan(
        self,
        chosen: Sequence[int],
        actual: Mapping[str, float],
        inputs: Any,
        module: nn.Module,
        budget: dict[str, float | str],
    ) -> Plan:
        reasons = self._reasons(chosen)
        rows, factors = [], {}
        for t, j, reason in zip(self.targets, chosen, reasons, strict=True):
            c, dense = t.candidates[j], _dense_of(t)
            factors[t.path] = entry = _entry(c.terms)
            times = [
                self.clock.known_of(t, terms) if self.timed else None for terms in ((), c.terms)
            ]
            rows.append(
                LayerPlan(
                    path=t.path,
                    rows=t.size[0],
                    columns=t.size[1],
                    terms=entry,
                    parameters_dense=dense.parameters,
                    parameters=c.parameters,
                    flops_dense=dense.flops,
                    flops=c.flops,
                    latency_dense=times[0],
                    latency=times[1],
                    error=c.error,
                    reason=reason,
                )
            )
        predicted = self._predicted(chosen)
        totals: dict[str, Any] = {
            k: {"dense": self.dense[k], "planned": actual[k]}
            for k in ("parameters", "bytes", "flops", "latency")
        }
        totals["latency"]["predicted"] = predicted.get("latency")
        totals["error"] = actual["error"]
        return Plan(factors, rows, totals, _setting(module, inputs), budget, self.objective)

    def _reasons(self, chosen: Sequence[int]) -> list[str | None]:
        """Why a layer is dense, or what is to be said against its factors."""
        free = self._solve(self.limits, ()) or chosen if self.keep_dense else chosen
        reasons = []
        for t, j, k in zip(self.targets, chosen, free, strict=True):
            slower, loss = (self._loss(t, t.candidates[i]) for i in (k, j))
            dense = self.clock.known_of(t, ()) or 0.0
            if t.candidates[j].terms:
                told = f"slower here ({dense + loss:.3g} ms against {dense:.3g})"
                reason = told if loss else None
            elif t.decided:
                reason = "as asked"
            elif not t.inputs:
                reason = "not called with these inputs, kept dense"
            elif len(t.candidates) == 1:
                reason = "no shape has fewer parameters"
            elif slower:
                reason = f"slower here ({dense + slower:.3g} ms against {dense:.3g}), kept dense"
            else:
                reason = "the budget is met without it"
            reasons.append(reason)
        return reasons


def _dense_of(target: _Target) -> _Candidate:
    rows, columns = target.size
    flops = 0 if target.embedding else 2 * rows * columns * target.tokens
    return _Candidate((), rows * columns, flops, 0.0)


def _entry(terms: Terms) -> Entry | None:
    return [{"a_shape": list(shape), "rank": rank} for shape, rank in terms] or None


# --- multiple-choice knapsack


def solve(
    goals: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
) -> list[int] | None:
    """One candidate of each layer, of least total goal with each total cost within its limit.

    Lagrange multipliers weigh the costs against the goal, so that each layer decides alone; the
    choices that they pass through are repaired and improved by single and double exchanges. Not
    proven optimal; but if nothing is found a search decides whether there is anything (and gives up
    after 20,000 steps, more than few layers can take).

    Args:
        goals: ``goals[i][j]`` of layer i's candidate j.
        costs: ``costs[i][j][k]`` of it, of sort k.
        limits: Of sort k in total.

    Returns:
        The candidates' indices, or None if no choice is within the limits.
    """
    if not goals or any(not row for row in goals):
        return [] if not goals else None
    layers, most, sorts = len(goals), max(map(len, goals)), len(limits)
    goal = torch.full((layers, most), torch.inf, dtype=torch.float64)
    cost = torch.zeros(layers, most, sorts, dtype=torch.float64)
    for i, row in enumerate(goals):
        goal[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        cost[i, : len(row)] = torch.tensor(costs[i], dtype=torch.float64).view(len(row), sorts)
    limit = torch.tensor(limits, dtype=torch.float64)
    real = goal.isfinite()
    # In units of what there is to save, so that multipliers and violations compare.
    most_cost = cost.masked_fill(~real[..., None], -torch.inf).amax(1).sum(0)
    least_cost = cost.masked_fill(~real[..., None], torch.inf).amin(1).sum(0)
    unit = (most_cost - least_cost).clamp_min(1e-12 * most_cost.abs().clamp_min(1e-30))
    slack = 1e-9 * torch.maximum(limit.abs(), most_cost.abs()) / unit  # of rounding
    cost, limit = cost / unit, limit / unit + slack
    if (least_cost / unit > limit).any():
        return None
    search = _Search(goal, cost, limit)
    best, least = None, torch.inf
    for choice in search.starts():
        choice = search.repaired(choice)
        if choice is not None:
            choice = search.improved(choice, pairs=False)
            if (total := search.total_goal(choice)) < least - 1e-15:
                best, least = choice, total
    best = search.any_choice() if best is None else best
    return None if best is None else search.improved(best, pairs=True).tolist()


class _Search:
    def __init__(self, goal: Tensor, cost: Tensor, limit: Tensor):
        self.goal, self.cost, self.limit = goal, cost, limit  # (L, J), (L, J, K), (K,)
        self.index = torch.arange(len(goal))
        finite = goal.isfinite()
        spread = goal.masked_fill(~finite, 0).amax(1) - goal.masked_fill(~finite, torch.inf).amin(1)
        self.scale = max(spread.sum().item(), 1e-12)

    def total_goal(self, choice: Tensor) -> float:
        return self.goal[self.index, choice].sum().item()

    def totals(self, choice: Tensor) -> Tensor:
        return self.cost[self.index, choice].sum(0)

    def starts(self) -> list[Tensor]:
        """Choices along the way of the multipliers: the best few, and the nearest to feasible."""
        seen: dict[tuple, tuple[float, float, Tensor]] = {}

        def visit(weights: Tensor) -> Tensor:
            choice = (self.goal + self.cost @ weights).argmin(1)
            over = self.totals(choice) - self.limit
            key = tuple(choice.tolist())
            if key not in seen:
                seen[key] = over.clamp_min(0).sum().item(), self.total_goal(choice), choice
            return over

        weights = torch.zeros_like(self.limit)
        if not (visit(weights) > 0).any():
            return [next(iter(seen.values()))[2]]
        # One sort at a time, by bisection on a logarithmic scale, a few times round ...
        for _ in range(1 if len(weights) == 1 else 4):
            for k in range(len(weights)):
                low, high = -9.0, 6.0
                for _ in range(40):
                    middle = (low + high) / 2
                    weights[k] = self.scale * 10**middle
                    if visit(weights)[k] > 0:
                        low = middle
                    else:
                        high = middle
                weights[k] = 0.0
                weights[k] = self.scale * 10**high if visit(weights)[k] > 0 else 0.0
        # ... and all together, by steps along the violations.
        if len(weights) > 1:
            weights = weights.clamp_min(1e-6 * self.scale)
            for step in range(200):
                over = visit(weights)
                weights = weights * torch.exp((2.0 / (1 + step / 10)) * over.clamp(-1, 1))
        feasible = sorted((g, key) for key, (over, g, _) in seen.items() if over == 0)[:6]
        nearest = sorted((over, g, key) for key, (over, g, _) in seen.items() if over > 0)[:6]
        return [seen[key][2] for *_, key in [*feasible, *nearest]]

    def repaired(self, choice: Tensor) -> Tensor | None:
        """Exchanges that lower the violation most for what they cost in the goal, until it is 0."""
        choice = choice.clone()
        while True:
            totals = self.totals(choice)
            violation = (totals - self.limit).clamp_min(0).sum()
            if violation == 0:
                return choice
            after, change = self._exchanges(choice, totals)
            gained = violation - (after - self.limit).clamp_min(0).sum(-1)  # (L, J)
            good = (gained > 1e-15) & change.isfinite()
            if not good.any():
                return None
            price = torch.where(good, change.clamp_min(0) / gained, torch.inf)
            # Of equal prices the largest step.
            cheap = price <= price.min() * (1 + 1e-12)
            at = torch.where(cheap, gained, -torch.inf).argmax()
            choice[at // price.shape[1]] = at % price.shape[1]

    def improved(self, choice: Tensor, pairs: bool) -> Tensor:
        """While an exchange within the limits, or two together, lower the goal."""
        choice = choice.clone()
        for _ in range(10 * len(choice) + 100):
            totals = self.totals(choice)
            after, change = self._exchanges(choice, totals)
            fits = (after <= self.limit).all(-1)
            single = torch.where(fits, change, torch.inf)
            if single.min() < -1e-12 * self.scale:
                at = single.argmin()
                choice[at // single.shape[1]] = at % single.shape[1]
                continue
            pair = self._pair(choice, change) if pairs else None
            if pair is None:
                break
            choice = pair
        return choice

    def _pair(self, choice: Tensor, change: Tensor) -> Tensor | None:
        """The best of two exchanges, the first of which gains what the second may pay for."""
        columns = change.shape[1]
        firsts = change.flatten().argsort(stable=True)[:64].tolist()
        best, least = None, -1e-12 * self.scale
        for at in firsts:
            i, j = divmod(at, columns)
            if not change[i, j] < 0:
                break
            other = choice.clone()
            other[i] = j
            after, second = self._exchanges(other, self.totals(other))
            both = torch.where((after <= self.limit).all(-1), second + change[i, j], torch.inf)
            both[i] = torch.inf
            if both.min() < least:
                least, to = both.min().item(), both.argmin().item()
                best = other.clone()
                best[to // columns] = to % columns
        return best

    def _exchanges(self, choice: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Total costs ``(L, J, K)`` and the goal's change ``(L, J)`` of each single exchange."""
        now = self.cost[self.index, choice][:, None]
        change = self.goal - self.goal[self.index, choice][:, None]
        return totals + self.cost - now, change

    def any_choice(self) -> Tensor | None:
        """Some choice within the limits, by depth first."""
        least = self.cost.masked_fill(~self.goal.isfinite()[..., None], torch.inf).amin(1)
        ahead = least.flip(0).cumsum(0).flip(0)  # (L, K), of the layers from here on
        ahead = torch.cat([ahead, torch.zeros_like(ahead[:1])]).tolist()
        cost, limit = self.cost.tolist(), self.limit.tolist()
        counts = self.goal.isfinite().sum(1).tolist()
        path, spent, steps = [0], [[0.0] * len(limit)], 0
        while path and steps < 20_000:
            steps += 1
            i = len(path) - 1
            if path[i] >= counts[i]:
                path.pop()
                spent.pop()
                if path:
                    path[-1] += 1
                continue
            now = [s + c for s, c in zip(spent[i], cost[i][path[i]], strict=True)]
            if any(s + a > m for s, a, m in zip(now, ahead[i + 1], limit, strict=True)):
                path[i] += 1
            elif i + 1 == len(counts):
                return torch.tensor(path)
            else:
                path.append(0)
                spent.append(now)
        return None


# --- telling


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"plan: {text}", file=sys.stderr, flush=True)


def _setting(module: nn.Module, inputs: Any) -> dict[str, Any]:
    first = next(module.parameters())
    device = first.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or str(device),
        "dtype": str(first.dtype)[6:],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "inputs": _described(inputs),
    }


def _described(inputs: Any) -> list[str]:
    if isinstance(inputs, Mapping):
        return [f"{key} {_described((value,))[0]}" for key, value in inputs.items()]
    told = []
    for value in inputs if isinstance(inputs, tuple) else (inputs,):
        if isinstance(value, Tensor):
            told.append(f"{str(value.dtype)[6:]} {tuple(value.shape)}")
        else:
            told.append(type(value).__name__)
    return told


def _terms_text(size: tuple[int, int], terms: Terms) -> str:
    rows, columns = size
    told = []
    for (m1, n1), rank in terms:
        s = KronShape.split(rows, columns, (m1, n1), rank)
        product = f"{s.m1}x{s.n1} ⊗ {s.m2}x{s.n2}"
        one = f"{rank} of {product}" if rank > 1 else product
        told.append(f"rank {rank}" if is_low_rank(s) else one)
    return " + ".join(told) or "dense"


def _quantity(key: str, value: float) -> str:
    if key == "latency":
        return f"{value:.3g} ms"
    if key == "error":
        return f"{value:.3g}"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g}"


def _table(plan: Plan) -> str:
    head = ["layer", "weight", "terms", "parameters", "of dense", "ms", "dense", "error", ""]
    lines = [head]
    for path, rows in _grouped(plan.layers):
        first = rows[0]
        terms = _terms_text((first.rows, first.columns), terms_of(first.terms))
        times = [
            "" if None in (row := [getattr(r, k) for r in rows]) else f"{sum(row) / len(row):.3g}"
            for k in ("latency", "latency_dense")
        ]
        lines.append(
            [
                path or "(the module)",
                f"{first.rows}x{first.columns}",
                terms,
                _quantity("parameters", first.parameters),
                f"{first.parameters / first.parameters_dense:.1%}",
                *times,
                f"{sum(r.error for r in rows) / len(rows):.3f}",
                first.reason or "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numbers = range(3, 8)
    text = [
        "  ".join(
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    text.append("")
    for key in ("parameters", "bytes", "flops", "latency"):
        total = plan.totals[key]
        dense, planned = (_quantity(key, total[k]) for k in ("dense", "planned"))
        times = total["dense"] / total["planned"] if total["planned"] else 1.0
        line = f"{key:11}{dense:>10} -> {planned:>10}  ({times:.2f}x less)"
        if total.get("predicted") is not None:
            line += f", {_quantity(key, total['predicted'])} predicted"
        text.append(line)
    text.append(f"{'error':11}{'':10}    {plan.totals['error']:>10.3f}  (mean of the layers)")
    budget = ", ".join(f"{k} {v}" for k, v in plan.budget.items()) or "none"
    setting = plan.setting
    text.append(
        f"budget: {budget}; least {plan.objective}. Measured on {setting['device']}, "
        f"{setting['dtype']}, {setting['threads']} threads, torch {setting['torch']} "
        f"({setting['cpu_capability']}), with {'; '.join(setting['inputs'])}"
    )
    return "\n".join(text)


def _grouped(layers: Sequence[LayerPlan]) -> list[tuple[str, list[LayerPlan]]]:
    """Rows that are equal but for a number in their path and their error, under one path each."""
    groups: dict[tuple, list[LayerPlan]] = defaultdict(list)
    for row in layers:
        pattern = re.sub(r"\d+", "*", row.path)
        reason = re.sub(r"[\d.]+(e-?\d+)?", "", row.reason or "")
        groups[pattern, row.rows, row.columns, json.dumps(row.terms), reason].append(row)
    told = []
    for (pattern, *_), rows in groups.items():
        numbers = [[int(n) for n in re.findall(r"\d+", r.path)] for r in rows]
        parts = pattern.split("*")
        path = parts[0]
        for i, part in enumerate(parts[1:]):
            path += _ranges(sorted({n[i] for n in numbers})) + part
        told.append((path, rows))
    return told


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,5``"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
