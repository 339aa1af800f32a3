"""The search: solve, time the choice, solve again; then build and measure the whole module."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from kron_kernels.decompose import check_finite
from kron_kernels.factorise import swap_
from kron_kernels.factors import Entry, Shapes, Term, entry_of, random_layer
from kron_kernels.modules import call, evaluating, flops_of, setting_of, watching
from kron_kernels.moments import check_batches, second_moments
from kron_kernels.plan.budget import KEYS, check_arguments, limits_of
from kron_kernels.plan.candidates import candidates_of
from kron_kernels.plan.clock import MODULE_SECONDS, Clock, milliseconds
from kron_kernels.plan.influence import Influences
from kron_kernels.plan.layers import Candidate, Target, find_targets, first_refused
from kron_kernels.plan.result import LayerPlan, Plan, describe, quantity
from kron_kernels.plan.solver import solve

Objective = Literal["error", "size", "latency"]

_ROUNDS = 6  # a module is built and measured at most this often
_TENSOR_HEADER = 160  # bytes at most of a tensor's name, dtype, shape and place in a file


def plan(
    module: nn.Module,
    budget: Mapping[str, float | str],
    inputs: Any,
    *,
    objective: Objective = "error",
    layers: Mapping[str, Entry | Term | None] | None = None,
    names: Iterable[str] | None = None,
    calibration: Iterable[Any] | None = None,
    mix: bool = True,
    keep_dense_if_slower: bool = True,
    build: Callable[[dict[str, Entry]], nn.Module] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose factors for a module's layers; the module is left as it is.

    Args:
        module: Any module; it is measured in evaluation mode, without gradients.
        budget: Limits for the factorised module, as numbers or relative to the dense one: ``"8x"``
            less or ``"50%"``. Of the whole module: ``"parameters"`` (tied ones once), ``"bytes"``
            of its safetensors file, ``"flops"`` and ``"latency"`` (milliseconds) of one forward
            pass of ``inputs``; and ``"error"``, the mean relative squared error of the layers, each
            weighed by what an error in it does to the module's output. All limits hold together.
        inputs: Inputs to measure with: a tensor, a tuple of positional arguments or a mapping of
            keyword arguments. Latency and FLOPs are for their tokens, device and dtype, and for the
            threads and the autocast mode at the time of the call.
        objective: What to minimise within the budget: ``"error"``, ``"size"`` (parameters) or
            ``"latency"``.
        layers: Decisions made beforehand: from the end of a layer's path, cut at a dot, to its
            terms ``[{"a_shape": [m1, n1], "rank": r}, …]``, or to None to keep it dense. The
            longest name that fits decides.
        names: Ends of the paths of the layers that may be factorised. By default every
            ``nn.Linear`` (and transformers' ``Conv1D``) that is not tied to another one;
            ``nn.Embedding`` only if named.
        calibration: Batches of real data, each like ``inputs``: errors are then those of the
            layers' outputs instead of their weights. They must reach every linear layer that
            ``inputs`` reach and that may change. Positions excluded by an ``"attention_mask"`` do
            not count. An embedding's error remains that of its weight.
        mix: Whether to try sums of a Kronecker product and a low-rank part.
        keep_dense_if_slower: Keep layers dense where factors are slower on this machine, if the
            budget can be met that way and ``objective`` is not ``"size"``.
        build: Makes the factorised module from the terms of its layers, by path. By default a copy
            of ``module`` with random factors in these layers.
        progress: Print progress on standard error.

    Returns:
        The choice for each layer, and the measured totals of the module built from it.

    Raises:
        TypeError: If ``budget`` or ``layers`` is not a mapping from strings, a name is not a
            string, or ``calibration`` is one batch instead of several.
        ValueError: If the budget cannot be met, an argument does not fit, or a weight or
            calibration input is not finite.
    """
    check_arguments(budget, objective)
    log = partial(print, "plan:", file=sys.stderr, flush=True) if progress else lambda text: None
    with evaluating(module), torch.no_grad():
        targets = find_targets(module, names, layers, allow_tied=build is not None)
        log(f"{len(targets)} layers; a forward pass")
        by_path = {t.path: t for t in targets}
        _observe_inputs(module, inputs, by_path)
        for target in targets:
            if target.may_change:
                check_finite(f"the weight of {target.path or 'the module'}", target.layer.weight)
        moments, known = {}, inputs
        if calibration is not None:
            check_batches(calibration)
            batches = list(calibration)
            known = batches[0] if batches else inputs
            moments = _moments(module, batches, targets)
        influences = Influences(module, known)
        for i, target in enumerate(targets):
            log(f"errors {i + 1} of {len(targets)}: {target.path}")
            moment = moments.pop(target.path, None)
            target.candidates = candidates_of(target, moment, mix)
            if target.may_change and target.inputs:
                influences.measure(target.path, target.layer, moment)
        for path, influence in influences.relative().items():
            by_path[path].influence = influence
        planner = Planner(module, inputs, build, budget, targets, objective, log)
        return planner.run(keep_dense_if_slower and objective != "size")


def _observe_inputs(module: nn.Module, inputs: Any, by_path: Mapping[str, Target]) -> None:
    def note(path: str, x: Tensor) -> None:
        by_path[path].inputs.append((x.shape, x.dtype))

    with watching({path: t.layer for path, t in by_path.items()}, note):
        call(module, inputs)


def _moments(
    module: nn.Module, calibration: Iterable[Any], targets: Sequence[Target]
) -> dict[str, Tensor]:
    linears = [t for t in targets if not t.is_table]
    moments = second_moments(module, calibration, {t.path: t.layer for t in linears})
    for t in linears:
        # Falling back to the error of this layer's weight would mix two kinds of error in a plan.
        if t.path not in moments and t.inputs and t.may_change:
            raise ValueError(
                f"calibration gives {t.path or 'the module'} no unmasked input, although inputs "
                "reach it; pass batches with unmasked rows for it, or keep it dense with "
                f"layers={{{t.path!r}: None}}."
            )
    return moments


Choice = Sequence[Candidate]  # one for each target


def _nearest_size(candidates: Sequence[Candidate], size: float) -> int:
    """Of the candidates' numbers of parameters, the one nearest to ``size`` as a ratio."""
    return min((c.parameters for c in candidates), key=lambda own: abs(math.log(own / size)))


class Planner:
    """Chooses a candidate for each target, and measures the module that is built from them."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        build: Callable[[dict[str, Entry]], nn.Module] | None,
        budget: Mapping[str, float | str],
        targets: Sequence[Target],
        objective: str,
        log: Callable[[str], None],
    ):
        self.module, self.inputs, self.build = module, inputs, build
        self.budget, self.targets, self.objective, self.log = budget, targets, objective, log
        self.clock = Clock()
        self.influence = sum(t.influence for t in targets)
        self.dense = self._totals(module)
        calls = {"dense": partial(call, module, inputs)}
        self.dense["latency"] = milliseconds(calls, MODULE_SECONDS)["dense"]
        self.limits = limits_of(budget, self.dense)

    def run(self, keep_dense: bool) -> Plan:
        """Search, with slower layers kept dense where the budget allows."""
        self.keep_dense = keep_dense
        self.timed = keep_dense or "latency" in self.limits or self.objective == "latency"
        if self.timed:
            self.log("timing dense layers")
            self.clock.measure((t, ()) for t in self.targets)
        self._protect_tables()
        allowed, given_up = dict(self.limits), False
        best: Choice | None = None
        measured: dict[tuple, dict[str, float]] = {}
        met, missed = 0.0, float("inf")  # allowed latencies with which the limit was met, or not
        for _ in range(_ROUNDS):
            choice = self._choose(allowed)
            if choice is None:
                if best is not None or given_up:
                    break
                choice, given_up = self._closest(), True
            key = tuple(choice)
            if key not in measured:
                measured[key] = self._measure(choice)
            actual, predicted = measured[key], self._predict(choice)
            over = {k for k, limit in self.limits.items() if actual[k] > limit}
            if not over and (best is None or self._goal(choice) < self._goal(best)):
                best = choice
            # Sizes and FLOPs will be off by the same amount next time.
            for k in self.limits.keys() & {"parameters", "bytes", "flops"}:
                allowed[k] = self.limits[k] - (actual[k] - predicted[k])
            # Latency by the same factor, with a margin of 2 % for the clock; or else halfway
            # between a value that was too much and one that was not.
            if "latency" in self.limits:
                if "latency" in over:
                    missed = min(missed, allowed["latency"])
                else:
                    met = max(met, allowed["latency"])
                goal = 0.98 * self.limits["latency"] * predicted["latency"] / actual["latency"]
                is_new = met < goal < missed or missed == float("inf")
                allowed["latency"] = goal if is_new else (met + missed) / 2
            if not over and self._uses_its_time(actual):
                break
        if best is None:
            self._refuse(measured.values())
        return self._result(best, measured[tuple(best)])

    def _uses_its_time(self, actual: Mapping[str, float]) -> bool:
        """Whether no better choice can be expected from the rest of the allowed latency."""
        if "latency" not in self.limits or self.objective == "latency":
            return True
        return actual["latency"] > 0.93 * self.limits["latency"]

    # Choosing

    def _protect_tables(self) -> None:
        """Compress no table more than the whole, if the budget can be met so.

        Later layers can make up for one another's errors, but not for what a table has dropped. By
        errors alone MiniLM's words got rank 11 of a budget of 1.44 M parameters. With ranks 11, 17,
        23 and 30 a student's STS-B was 0.60, 0.69, 0.73 and 0.72 at the start; after training, 0.69
        with 11 and 0.76 with 23. The rule gives the rank tried that is nearest to 24.
        """
        sizes = self.limits.keys() & {"parameters", "bytes"}
        if not sizes:
            return
        before = [t.candidates for t in self.targets]
        share = min(self.limits[k] / self.dense[k] for k in sizes)
        for t in self.targets:
            if t.is_table and not t.decided:
                least = _nearest_size(t.candidates, max(share * t.dense.parameters, 1.0))
                t.candidates = [c for c in t.candidates if c.parameters >= least]
        if self._solve(self.limits) is None:
            for t, candidates in zip(self.targets, before, strict=True):
                t.candidates = candidates

    def _choose(self, allowed: Mapping[str, float]) -> Choice | None:
        """The best choice within these limits, all timed if times matter; None without a choice."""
        solve_once = self._solve_keeping_dense if self.keep_dense else self._solve
        return self._until_timed(partial(solve_once, allowed))

    def _until_timed(self, choose: Callable[[], Choice | None]) -> Choice | None:
        """Choose again until all layers of the choice are timed, if times matter."""
        while True:
            choice = choose()
            wanted: list[tuple[Target, Shapes]] = []
            if choice is not None and self.timed:
                picked = zip(self.targets, choice, strict=True)
                wanted = [
                    (t, c.shapes) for t, c in picked if self.clock.known_of(t, c.shapes) is None
                ]
            if not wanted:
                return choice
            self.log(f"timing {len({(t.kind, shapes) for t, shapes in wanted})} kinds of layers")
            self.clock.measure(wanted)

    def _solve_keeping_dense(self, allowed: Mapping[str, float]) -> Choice | None:
        """Without candidates slower than dense, except for as few kinds as the budget needs.

        The kinds that lose least time come first.
        """
        loss = {}
        for t in self.targets:
            slower = [self._loss(t, c) for c in t.candidates if self._loss(t, c) > 0]
            if slower and not t.decided:
                loss[t.kind] = min(slower)
        kinds = sorted(loss, key=loss.__getitem__)
        choice = self._solve(allowed, kinds)
        if choice is not None or not kinds:
            return choice
        if self._solve(allowed) is None:
            return None
        kept = list(kinds)
        for kind in kinds:
            kept.remove(kind)
            if self._solve(allowed, kept) is not None:
                break
        needed = [k for k in kinds if k not in kept]
        for kind in reversed(needed):  # the last one may have made earlier ones unnecessary
            if self._solve(allowed, [*kept, kind]) is not None:
                kept.append(kind)
        return self._solve(allowed, kept)

    def _loss(self, target: Target, c: Candidate) -> float:
        """Milliseconds by which it is slower than dense, 0 if unknown."""
        dense = self.clock.known_of(target, ())
        known = self.clock.known_of(target, c.shapes)
        if dense is None or known is None or not c.shapes:
            return 0.0
        return max(known - dense, 0.0)

    def _solve(
        self,
        allowed: Mapping[str, float],
        dense_kinds: Collection[str] = (),
        objective: str | None = None,
    ) -> Choice | None:
        """The best choice within these limits; slower candidates of ``dense_kinds`` are left out.

        Unknown times count with their lower bounds.
        """
        rows = [
            [
                c
                for c in t.candidates
                if t.decided or t.kind not in dense_kinds or not self._loss(t, c) > 0
            ]
            for t in self.targets
        ]
        pairs = list(zip(self.targets, rows, strict=True))
        goal = objective or self.objective
        goals = [[self._cost(t, c, goal) for c in row] for t, row in pairs]
        costs = [[[self._cost(t, c, k) for k in allowed] for c in row] for t, row in pairs]
        found = solve(goals, costs, [allowed[k] - self._rest(k) for k in allowed])
        return None if found is None else [row[j] for row, j in zip(rows, found, strict=True)]

    def _cost(self, target: Target, c: Candidate, key: str) -> float:
        match key:
            case "parameters" | "size":
                return c.parameters
            case "bytes":
                return c.parameters * target.layer.weight.element_size()
            case "flops":
                return c.flops
            case "latency":
                return self.clock.bound(target, c)
        return target.influence * c.error / self.influence

    def _cost_of(self, choice: Choice, key: str) -> float:
        return sum(self._cost(t, c, key) for t, c in zip(self.targets, choice, strict=True))

    def _goal(self, choice: Choice) -> float:
        return self._cost_of(choice, self.objective)

    def _rest(self, key: str) -> float:
        """The part of the dense module's total that is not in the targets."""
        if key == "error":
            return 0.0
        return max(self.dense[key] - self._cost_of([t.dense for t in self.targets], key), 0.0)

    def _predict(self, choice: Choice) -> dict[str, float]:
        keys = [k for k in KEYS if k != "latency" or self.timed]
        return {k: self._rest(k) + self._cost_of(choice, k) for k in keys}

    def _closest(self) -> Choice:
        """The choice nearest to a budget that seems out of reach: estimates may be wrong."""
        binding = [k for k in self.limits if self._solve({k: self.limits[k]}) is None]
        key = binding[0] if binding else next(iter(self.limits))
        others = {k: v for k, v in self.limits.items() if k not in binding}
        choice = self._until_timed(
            lambda: self._solve(others, objective=key) or self._solve({}, objective=key)
        )
        assert choice is not None  # there always is one without limits
        return choice

    # Measuring

    def _measure(self, choice: Choice) -> dict[str, float]:
        """Totals of the module that is built from this choice."""
        self.log("building and measuring the whole")
        picked = zip(self.targets, choice, strict=True)
        factors = {t.path: entry for t, c in picked if (entry := entry_of(c.shapes))}
        if self.build is None:
            built = swap_(
                copy.deepcopy(self.module), factors, lambda _, *layer: random_layer(*layer)
            )
        else:
            built = self.build(factors)
        modules = {"dense": self.module, "planned": built.eval()}
        calls = {name: partial(call, m, self.inputs) for name, m in modules.items()}
        actual, times = self._totals(built), milliseconds(calls, MODULE_SECONDS)
        # Relative to the first time of the dense module: the machine may have slowed down since.
        actual["latency"] = self.dense["latency"] * times["planned"] / times["dense"]
        return actual | {"error": self._cost_of(choice, "error")}

    def _totals(self, module: nn.Module) -> dict[str, float]:
        parameters = list(module.parameters())  # tied ones once
        return {
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() + _TENSOR_HEADER for p in parameters),
            "flops": flops_of(module, self.inputs),
        }

    def _refuse(self, measured: Iterable[Mapping[str, float]]) -> NoReturn:
        def excess(actual: Mapping[str, float]) -> float:
            return max(actual[k] / max(limit, 1e-30) for k, limit in self.limits.items())

        actual = min(measured, key=excess)
        reasons = []
        for k, limit in self.limits.items():
            if actual[k] > limit:
                rest = "" if k == "error" else f", {quantity(k, self._rest(k))} of it elsewhere"
                reasons.append(
                    f"{k} is to be at most {quantity(k, limit)} ({self.budget[k]!r}), but the "
                    f"nearest plan found has {quantity(k, actual[k])} (dense: "
                    f"{quantity(k, self.dense.get(k, 0.0))}{rest} than in the {len(self.targets)} "
                    f"layer{'s' * (len(self.targets) > 1)} that may be factorised)"
                )
        refused = first_refused(self.module, allow_tied=self.build is not None)
        raise ValueError(
            f"the budget cannot be met: {'; '.join(reasons)}. Raise the limit, name more layers "
            "(embeddings are only factorised if named), or drop another limit or decision."
            f"{f' These cannot be factorised: {refused}.' if refused else ''}"
        )

    # The result

    def _result(self, choice: Choice, actual: Mapping[str, float]) -> Plan:
        free = (self._solve(self.limits) if self.keep_dense else None) or choice
        rows = [
            LayerPlan(
                path=t.path,
                rows=t.size[0],
                columns=t.size[1],
                terms=entry_of(c.shapes),
                parameters_dense=t.dense.parameters,
                parameters=c.parameters,
                flops_dense=t.dense.flops,
                flops=c.flops,
                latency_dense=self.clock.known_of(t, ()) if self.timed else None,
                latency=self.clock.known_of(t, c.shapes) if self.timed else None,
                error=c.error,
                reason=self._reason(t, c, other),
            )
            for t, c, other in zip(self.targets, choice, free, strict=True)
        ]
        totals: dict[str, Any] = {
            k: {"dense": self.dense[k], "planned": actual[k]}
            for k in ("parameters", "bytes", "flops", "latency")
        }
        totals["latency"]["predicted"] = self._predict(choice).get("latency")
        totals["error"] = actual["error"]
        setting = setting_of(self.module) | {"inputs": describe(self.inputs)}
        factors = {row.path: row.terms for row in rows}
        return Plan(factors, rows, totals, setting, dict(self.budget), self.objective)

    def _reason(self, target: Target, chosen: Candidate, free: Candidate) -> str | None:
        """Why a layer is dense, or that its factors are slower.

        Args:
            target: The layer.
            chosen: The choice for it.
            free: The choice if slower layers need not be dense.
        """
        dense = self.clock.known_of(target, ()) or 0.0

        def slower(c: Candidate) -> str:
            loss = self._loss(target, c)
            return f"slower here ({dense + loss:.3g} ms against {dense:.3g})" if loss else ""

        if chosen.shapes:
            return slower(chosen) or None
        if target.decided:
            return "as requested"
        if not target.inputs:
            return "not called with these inputs, kept dense"
        if len(target.candidates) == 1:
            return "no shape has fewer parameters"
        return f"{slower(free)}, kept dense" if slower(free) else "the budget is met without it"
