"""Which candidate each layer gets: within a loss of its own, or the whole model within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from onnxslim_lab.low_rank.sites import Candidate

Cost = Callable[[Candidate], float]


def cheapest_within(candidates: Sequence[Candidate], most: float, cost: Cost) -> Candidate | None:
    """Return the cheapest candidate whose loss is at most `most`; of equal ones the one that loses less."""
    good = [candidate for candidate in candidates if candidate.loss <= most]
    return min(good, key=lambda candidate: (cost(candidate), candidate.loss), default=None)


def frontier(candidates: Sequence[Candidate], whole: float, cost: Cost) -> list[Candidate]:
    """Return the candidates on the lower convex hull of loss over cost, costliest first.

    The hull begins at the layer as it is (cost `whole`, loss 0): steps along it cost more and more loss for
    each unit saved, so that the first are always the best to take.
    """
    ordered = sorted(candidates, key=lambda candidate: (-cost(candidate), candidate.loss))
    hull: list[Candidate] = []

    def slope(before: Candidate | None, after: Candidate) -> float:
        saved = (whole if before is None else cost(before)) - cost(after)
        return (after.loss - (0.0 if before is None else before.loss)) / saved if saved > 0 else float("inf")

    for candidate in ordered:
        while hull and slope(hull[-2] if len(hull) > 1 else None, hull[-1]) >= slope(hull[-1], candidate):
            hull.pop()
        if slope(hull[-1] if hull else None, candidate) < float("inf"):
            hull.append(candidate)
    return hull


def allocate(
    layers: Sequence[Sequence[Candidate]], wholes: Sequence[float], budget: float, costs: Sequence[Cost]
) -> list[Candidate | None]:
    """Return a candidate for each layer, or None to keep it, so that all together cost at most the budget.

    Steps down the layers' frontiers are taken in the order of loss for each unit saved, the cheapest first.
    The last step is replaced by the costliest candidate of its layer that still meets the budget. Where even
    all steps do not meet it, every layer gets its cheapest candidate on the frontier.

    Args:
        layers: Each layer's candidates.
        wholes: What each layer costs as it is.
        budget: What all may cost together.
        costs: Cost of a candidate of each layer.
    """
    hulls = [frontier(found, whole, cost) for found, whole, cost in zip(layers, wholes, costs, strict=True)]
    chosen: list[Candidate | None] = [None] * len(hulls)
    spent = float(sum(wholes))
    queue: list[tuple[float, int, int]] = []

    def push(layer: int, step: int) -> None:
        if step < len(hulls[layer]):
            after, before = hulls[layer][step], hulls[layer][step - 1] if step else None
            saved = (costs[layer](before) if before else wholes[layer]) - costs[layer](after)
            heapq.heappush(queue, ((after.loss - (before.loss if before else 0.0)) / saved, layer, step))

    for layer in range(len(hulls)):
        push(layer, 0)
    while spent > budget and queue:
        _, layer, step = heapq.heappop(queue)
        before = chosen[layer]
        rest = spent - (costs[layer](before) if before else wholes[layer])
        after = hulls[layer][step]
        if rest + costs[layer](after) <= budget:  # the last step: no further than needed
            fitting = [c for c in layers[layer] if rest + costs[layer](c) <= budget and c.loss <= after.loss]
            after = min(fitting, key=lambda c: c.loss)
        chosen[layer] = after
        spent = rest + costs[layer](after)
        push(layer, step + 1)
    return chosen
