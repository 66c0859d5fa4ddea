"""Trying scales on quantized copies of a model: what counts is whether the outputs get better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_lab.base import Context
from onnxslim_lab.equalization.balance import Plan
from onnxslim_lab.equalization.region import Region
from onnxslim_lab.equalization.writing import write
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.output_loss import output_loss

if TYPE_CHECKING:
    from onnxslim_lab.passes.quantize import Quantize

_FEEDS = 32  # at most, that outputs are compared on
_GAIN = 0.9  # of the loss: what improves it less is chance


def keep_what_helps(
    model: Graph,
    plans: Sequence[Plan],
    regions_of: Callable[[Graph], Sequence[Region]],
    step: Quantize,
    context: Context,
    parts: int,
) -> tuple[float, float, list[Plan]]:
    """Undo the scales that do not lower the error of the quantized model's outputs.

    The regions are tried in parts, in their order: each part on top of what was kept, on a copy that is then
    quantized by means of most of the calibration data and judged by the rest: scales that suit the outliers of a few feeds
    help no others.

    Args:
        model: The main graph; not changed.
        plans: What was found for its regions; the scales of those that do not help become 1.
        regions_of: Returns the same regions, in the same order, of a copy of the model.
        step: How copies are quantized.
        context: Its calibration is what they are quantized and judged by.
        parts: In how many parts.

    Returns:
        The loss of the outputs without any scales, that with those kept, and the plans undone.
    """
    assert context.calibration is not None
    learned, judged = context.calibration.hold_back()
    reference = judged.outputs(model, limit=_FEEDS)

    def loss(kept: Sequence[int]) -> float:
        copy = model.copy()
        copy.infer()
        regions = regions_of(copy)
        write([Plan(regions[number], plans[number].logs, plans[number].steps) for number in kept])
        step.run(copy, Context(seed=context.seed, memory=context.memory, calibration=learned))
        return output_loss(reference, judged.outputs(copy, limit=_FEEDS))

    changed = [number for number, plan in enumerate(plans) if plan.logs.any()]
    kept: list[int] = []
    before = best = loss(kept) if changed else 0.0
    tried = 0
    for part in np.array_split(changed, min(parts, len(changed))) if changed else ():
        error = loss([*kept, *part])
        if error < best * _GAIN:
            kept, best = [*kept, *part], error
        tried += len(part)
        context.progress(tried, len(changed), "try scales")
    undone = [plans[number] for number in changed if number not in kept]
    for plan in undone:
        plan.logs = np.zeros_like(plan.logs)
    return before, best, undone
