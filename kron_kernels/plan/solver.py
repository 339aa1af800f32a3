"""A multiple-choice knapsack: one candidate per layer, within several limits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def solve(
    goals: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
) -> list[int] | None:
    """Pick a candidate per layer: least total goal, with each total cost within its limit.

    Lagrange multipliers weigh the costs against the goal, and each layer then decides alone. The
    choices found while the multipliers are searched are repaired and improved by single and double
    exchanges. The result need not be optimal. If no choice is found, a depth-first search decides
    whether there is one; it gives up after 20,000 steps.

    Args:
        goals: ``goals[i][j]`` of candidate j of layer i.
        costs: ``costs[i][j][k]`` of the same candidate, for limit k.
        limits: Upper bounds of the total costs.

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
    # Units in which multipliers and violations compare: the largest possible saving.
    most_cost = cost.masked_fill(~real[..., None], -torch.inf).amax(1).sum(0)
    least_cost = cost.masked_fill(~real[..., None], torch.inf).amin(1).sum(0)
    unit = (most_cost - least_cost).clamp_min(1e-12 * most_cost.abs().clamp_min(1e-30))
    slack = 1e-9 * torch.maximum(limit.abs(), most_cost.abs()) / unit  # allows for rounding
    cost, limit = cost / unit, limit / unit + slack
    if (least_cost / unit > limit).any():
        return None
    search = _Search(goal, cost, limit)
    best, least = None, torch.inf
    for start in search.starts():
        choice = search.repaired(start)
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
        """Choices seen while searching the multipliers: the best six, and the nearest feasible."""
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
        # One limit at a time, by bisection on a logarithmic scale, three times in turn ...
        for _ in range(1 if len(weights) == 1 else 3):
            for k in range(len(weights)):
                low, high = -9.0, 6.0
                for _ in range(25):
                    middle = (low + high) / 2
                    weights[k] = self.scale * 10**middle
                    if visit(weights)[k] > 0:
                        low = middle
                    else:
                        high = middle
                weights[k] = 0.0
                weights[k] = self.scale * 10**high if visit(weights)[k] > 0 else 0.0
        # ... then all together, by steps along the violations.
        if len(weights) > 1:
            weights = weights.clamp_min(1e-6 * self.scale)
            for step in range(200):
                over = visit(weights)
                weights = weights * torch.exp((2.0 / (1 + step / 10)) * over.clamp(-1, 1))
        feasible = sorted((over, g, key) for key, (over, g, _) in seen.items() if over == 0)[:6]
        nearest = sorted((over, g, key) for key, (over, g, _) in seen.items() if over > 0)[:6]
        return [seen[key][2] for _, _, key in [*feasible, *nearest]]

    def repaired(self, choice: Tensor) -> Tensor | None:
        """Exchange candidates, at the best price in the goal, until no limit is violated."""
        choice = choice.clone()
        while True:
            totals = self.totals(choice)
            violation = (totals - self.limit).clamp_min(0).sum()
            if violation == 0:
                return choice
            after, change = self._exchanges(choice, totals)
            gained = violation - (after - self.limit).clamp_min(0).sum(-1)  # (L, J)
            good = (
                gained > 1e-10
            ) & change.isfinite()  # smaller gains are rounding, and could cycle
            if not good.any():
                return None
            price = torch.where(good, change.clamp_min(0) / gained, torch.inf)
            # The largest step among equal prices.
            cheap = price <= price.min() * (1 + 1e-12)
            at = torch.where(cheap, gained, -torch.inf).argmax()
            choice[at // price.shape[1]] = at % price.shape[1]

    def improved(self, choice: Tensor, pairs: bool) -> Tensor:
        """Exchange candidates, singly or in pairs, while that lowers the goal within the limits."""
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
        """The best two exchanges: the first lowers the goal, the second restores the limits."""
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
                least, to = both.min().item(), int(both.argmin())
                best = other.clone()
                best[to // columns] = to % columns
        return best

    def _exchanges(self, choice: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Total costs ``(L, J, K)`` and change of the goal ``(L, J)`` for each exchange."""
        now = self.cost[self.index, choice][:, None]
        change = self.goal - self.goal[self.index, choice][:, None]
        return totals + self.cost - now, change

    def any_choice(self) -> Tensor | None:
        """A choice within the limits, by depth-first search, the cheapest candidates first."""
        order = self.cost.sum(-1).masked_fill(~self.goal.isfinite(), torch.inf).argsort(stable=True)
        least = self.cost.masked_fill(~self.goal.isfinite()[..., None], torch.inf).amin(1)
        ahead = (
            least.flip(0).cumsum(0).flip(0).tolist()
        )  # (L, K), least costs of the layers from here on
        ahead.append([0.0] * len(self.limit))
        cost = self.cost.gather(1, order[..., None].expand_as(self.cost)).tolist()
        limit = self.limit.tolist()
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
                return order[self.index, torch.tensor(path)]
            else:
                path.append(0)
                spent.append(now)
        return None
