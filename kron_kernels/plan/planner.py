"""The choice: solve, time what was chosen, solve again; then build and measure that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from kron_kernels.factorise import Entry, Terms
from kron_kernels.modules import (
    call,
    evaluating,
    observe_shapes,
    setting_of,
    totals_of,
    with_random_factors,
)
from kron_kernels.moments import second_moments
from kron_kernels.plan.budget import KEYS, check_arguments, limits_of
from kron_kernels.plan.candidates import candidates_of
from kron_kernels.plan.clock import MODULE_SECONDS, Clock, milliseconds
from kron_kernels.plan.layers import (
    Candidate,
    Target,
    check_weights,
    dense_candidate,
    entry_of,
    find_targets,
)
from kron_kernels.plan.result import LayerPlan, Plan, quantity
from kron_kernels.plan.solver import solve

Objective = Literal["error", "size", "latency"]

_ROUNDS = 6  # of building and measuring


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
            once), ``"bytes"`` of a safetensors file of them, ``"flops"`` and ``"latency"``
            (milliseconds) of one forward pass of ``inputs``; and ``"error"``, the mean relative
            squared error of the layers. All that are named are met together.
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
            outputs on them instead of its weight's. They must call every linear layer that
            ``inputs`` call and that may change. Positions that an ``"attention_mask"`` excludes do
            not count. An embedding's error remains its weight's.
        mix: Try sums of a Kronecker product and a low-rank part, too.
        keep_dense_if_slower: Where a factorised layer takes longer than the dense one here, keep
            the dense one, if the budget can be met so and ``objective`` is not ``"size"``.
        build: From the factorised layers' terms, by path, to such a module, whose factors may be
            anything: what is built and measured. By default a copy of ``module`` with its layers
            replaced.
        progress: Say on the standard error what is being done.

    Returns:
        What becomes of each layer, and what the whole then takes, measured.

    Raises:
        TypeError: If ``budget`` or ``layers`` is not a mapping from strings, a name not a string,
            or ``calibration`` one batch instead of several.
        ValueError: If the budget cannot be met, with what could be; for an argument that does not
            fit, with what would; or if a weight or calibration input is not finite.
    """
    check_arguments(budget, objective)
    say = partial(_say, progress)
    with evaluating(module), torch.no_grad():
        decided = {} if layers is None else layers
        targets = find_targets(module, names, decided, build is not None)
        say(f"{len(targets)} layers; a forward pass")
        observe_shapes(module, inputs, targets)
        check_weights(targets)
        dense = totals_of(module, inputs)
        time = partial(call, module, inputs)
        dense["latency"] = milliseconds({"dense": time}, MODULE_SECONDS)["dense"]
        limits = limits_of(budget, dense)
        moments = {} if calibration is None else second_moments(module, calibration, targets)
        for i, target in enumerate(targets):
            say(f"errors {i + 1} of {len(targets)}: {target.path}")
            target.candidates = candidates_of(target, moments.pop(target.path, None), mix)
        trial = build or partial(with_random_factors, module)
        planner = Planner(targets, dense, limits, objective, keep_dense_if_slower, say)
        return planner.run(module, inputs, trial, dict(budget))


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"plan: {text}", file=sys.stderr, flush=True)


class _Infeasible(Exception):
    pass


class Planner:
    """Solve, measure what was chosen, solve again; then build, measure that, and correct."""

    def __init__(
        self,
        targets: Sequence[Target],
        dense: Mapping[str, float],
        limits: Mapping[str, float],
        objective: str,
        keep_dense_if_slower: bool,
        say: Callable[[str], None],
    ):
        self.targets, self.dense, self.limits, self.objective = targets, dense, limits, objective
        self.keep_dense = keep_dense_if_slower and objective != "size"
        self.timed = self.keep_dense or "latency" in limits or objective == "latency"
        self.clock, self.say = Clock(), say
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
        given_up = False
        met, missed = 0.0, float("inf")  # latencies allowed with which the budget was met, or not
        for _ in range(_ROUNDS):
            try:
                chosen = self._choose(allowed)
            except _Infeasible:
                if best is not None or given_up:
                    break
                chosen, given_up = self._closest(), True
            key = tuple(chosen)
            if key not in tried:
                tried[key] = self._measured(chosen, module, inputs, build)
            actual, predicted = tried[key], self._predicted(chosen)
            over = {k for k, limit in self.limits.items() if actual[k] > limit}
            if not over and (best is None or self._goal(chosen) < self._goal(best)):
                best = chosen
            # Sizes and FLOPs are off by the same amount next time; time by the same factor, or
            # else half the way between what was too much and what was not, 2 % kept for the clock.
            for k in self.limits.keys() & {"parameters", "bytes", "flops"}:
                allowed[k] = self.limits[k] - (actual[k] - predicted[k])
            if "latency" in self.limits:
                if "latency" in over:
                    missed = min(missed, allowed["latency"])
                else:
                    met = max(met, allowed["latency"])
                goal = 0.98 * self.limits["latency"] * predicted["latency"] / actual["latency"]
                between = met < goal < missed or missed == float("inf")
                allowed["latency"] = goal if between else (met + missed) / 2
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

    def _untimed(self, chosen: Sequence[int]) -> list[tuple[Target, Terms]]:
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
        kinds = sorted(loss, key=loss.__getitem__)
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

    def _loss(self, target: Target, c: Candidate) -> float:
        """Milliseconds that it is slower than dense, 0 if that is not known."""
        dense = self.clock.known_of(target, ())
        known = self.clock.known_of(target, c.terms)
        if dense is None or known is None or not c.terms:
            return 0.0
        return max(known - dense, 0.0)

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

    def _goal_of(self, target: Target, c: Candidate, objective: str) -> float:
        key = {"size": "parameters"}.get(objective, objective)
        return self._cost(target, c, key)

    def _goal(self, chosen: Sequence[int]) -> float:
        picked = zip(self.targets, chosen, strict=True)
        return sum(self._goal_of(t, t.candidates[j], self.objective) for t, j in picked)

    def _cost(self, target: Target, c: Candidate, key: str) -> float:
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
        dense = sum(self._cost(t, dense_candidate(t), key) for t in self.targets)
        return 0.0 if key == "error" else max(self.dense[key] - dense, 0.0)

    def _predicted(self, chosen: Sequence[int]) -> dict[str, float]:
        picked = [(t, t.candidates[j]) for t, j in zip(self.targets, chosen, strict=True)]
        keys = [k for k in KEYS if k != "latency" or self.timed]
        return {k: self._rest(k) + sum(self._cost(t, c, k) for t, c in picked) for k in keys}

    def _closest(self) -> list[int]:
        """What comes nearest to a budget that seems too small: rests and sums of times may err."""
        binding = [k for k in self.limits if self._solve({k: self.limits[k]}, ()) is None]
        key = binding[0] if binding else next(iter(self.limits))
        others = {k: v for k, v in self.limits.items() if k not in binding}
        while True:
            goal = {"parameters": "size"}.get(key, key)
            chosen = self._solve(others, (), goal) or self._solve({}, (), goal)
            assert chosen is not None  # without limits there is a choice
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
        entries = {t.path: entry for t, c in picked if (entry := entry_of(c.terms))}
        trial = build(entries).eval()
        actual = totals_of(trial, inputs)
        calls = {"dense": partial(call, module, inputs), "planned": partial(call, trial, inputs)}
        times = milliseconds(calls, MODULE_SECONDS)
        # By the ratio, in the unit of the first time: the machine may have slowed since.
        ratio = times["planned"] / times["dense"]
        actual["latency"] = self.dense["latency"] * ratio
        return actual | {"error": self._predicted(chosen)["error"]}

    def _refuse(self, tried: Mapping[tuple, Mapping[str, float]], budget: Mapping) -> NoReturn:
        def excess(actual: Mapping[str, float]) -> float:
            return max(actual[k] / max(limit, 1e-30) for k, limit in self.limits.items())

        actual = min(tried.values(), key=excess)
        told = []
        for k, limit in self.limits.items():
            if actual[k] > limit:
                rest = "" if k == "error" else f", {quantity(k, self._rest(k))} of it elsewhere"
                told.append(
                    f"{k} is to be at most {quantity(k, limit)} ({budget[k]!r}), but the nearest "
                    f"plan found has {quantity(k, actual[k])} (dense: "
                    f"{quantity(k, self.dense.get(k, 0.0))}{rest} than in the {len(self.targets)} "
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
            c, dense = t.candidates[j], dense_candidate(t)
            factors[t.path] = entry = entry_of(c.terms)
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
        return Plan(factors, rows, totals, setting_of(module, inputs), budget, self.objective)

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
