"""What layers that stay float cost in time, from their sizes alone: the same on every machine and every run.

Products take longer in float; but in most models what costs more is that values on codes are converted, and
their channels reordered, in front of a float layer and again behind it. A convolution on codes whose result stays
float writes four bytes for one and adds its bias to them, but onnxruntime multiplies faster for it (see unrolling):
where the result is small beside the products, that saves time. The unit is the time that one
multiply-accumulate of a usual layer takes longer in float, on one thread of an x86 processor with VNNI
(0.016 ns there); benchmarks/float_islands.py and float_results.py measure the constants.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from onnxslim_lab.quantization.placement import Placement
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.static_layers import Key, StaticLayer

_WEIGHT = 15.0  # four bytes of it are read instead of one; less (from 6) where caches keep some of them
_ELEMENT = 60.0  # converted, one way
_CONVERSION = 200_000.0  # the call of its kernels
_RESULT = 80.0  # an element of a convolution on codes that stays float
_FASTER = 0.12  # saved by each of its multiply-accumulates


class FloatCost:
    """Tells what it costs to leave layers of a plan float.

    Args:
        plan: The plan as it is with nothing float; its ranges and weights do not matter. Values whose size it
            does not know cost the call of their conversion alone.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._layers = {layer.name: layer for layer in plan.layers}
        self._known: dict[tuple[frozenset[str], frozenset[Key]], float] = {}  # asked for under many ranges
        self._coded = self._converted(frozenset())

    def of(self, names: Collection[str]) -> float:
        """Return what leaving these layers float costs, and the sums and results that the plan has in float.

        In multiply-accumulates; negative where it saves time.
        """
        layers = sum(_products(self._layers[name]) for name in names)
        results = sum(self._result(self._layers[name]) for name in self._plan.summed.difference(names))
        return layers + results + self._converted(frozenset(names)) - self._coded

    def _result(self, planned: StaticLayer) -> float:
        elements = self._plan.elements.get(planned.layer.node.output[0], 0)
        return _RESULT * elements - _FASTER * (planned.macs or 0)

    def _converted(self, without: frozenset[str]) -> float:
        key = without, frozenset(self._plan.residuals)
        if key not in self._known:
            rounded = replace(self._plan, summed=set())  # what results cost includes their conversions
            values = [value for placed in rounded.placements(without) for value in converted(placed)]
            self._known[key] = sum(
                _CONVERSION + _ELEMENT * self._plan.elements.get(value, 0) for value in values
            )
        return self._known[key]


def _products(planned: StaticLayer) -> float:
    groups, outputs, _ = planned.layer.shape
    depthwise = groups > 1 and outputs == 1  # takes as long on codes
    return _WEIGHT * planned.layer.parameters + (0 if depthwise else planned.macs or 0)


def converted(placed: Placement) -> list[str]:
    """Return the values that are computed in float and read as codes, or come as codes and are read in float."""
    values = sorted({*placed.made, *placed.takers} - set(placed.constants))
    return [value for value in values if value not in placed.made or placed.read_in_float(value)]
