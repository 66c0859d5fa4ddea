"""Which nodes must stay float32 so that the model loads and its outputs stay: found by running it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onnxslim_lab.base import Change
from onnxslim_lab.errors import LabError, SessionError, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import OutputError, compare_outputs
from onnxslim_lab.precision.measure import Outputs, rank_by_error, worst
from onnxslim_lab.precision.model import Anatomy, Item
from onnxslim_lab.precision.writer import STORE_ABOVE, plan_of, write
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.statistics import Calibration

INTERPRETED = 1  # feeds to run on the NumPy runtime
SAME = 0.99999  # agreement of the two runtimes on the original
SAVES = 0.9  # of the bytes, at most, are to be left for arithmetic in 16 bits to be given up
CAUTION = 0.5  # of the loss allowed, once nodes return to float32: other data loses more


@dataclass
class Trial:
    """A converted copy and how it did.

    Attributes:
        model: The copy.
        changes: A change for each weight.
        score: Least agreement of an output with the original's; -1 where it became infinite or NaN.
        output: The output of that score.
        errors: All outputs.
        refused: onnxruntime's words when it does not load or run, else "".
    """

    model: Graph
    changes: list[Change]
    score: float = 1.0
    output: str = ""
    errors: list[OutputError] = field(default_factory=list)
    refused: str = ""


class Search:
    """Converts copies of a model and runs them on the data.

    Args:
        anatomy: The model; the reasons found are written into its items.
        calibration: The data and the means to run it.
        target: The least agreement of every output with the original's.
        limit: Feeds to compare on.
    """

    def __init__(self, anatomy: Anatomy, calibration: Calibration, target: float, limit: int = 8) -> None:
        self.anatomy, self.target = anatomy, target
        self.calibration, self.limit = calibration, limit
        self.reference: Outputs = calibration.outputs(anatomy.model, limit=limit)
        self.exact = self._interpreted(anatomy.model)
        if self.exact and worst(compare_outputs(self.reference[:INTERPRETED], self.exact))[0] < SAME:
            self.exact = (
                None  # it draws random numbers, or the runtimes disagree on it: not for here to settle
            )

    def best(self) -> Trial:
        """Return the first conversion that loads and reaches the target, with as few nodes kept as it takes.

        First the fewest nodes without which onnxruntime loads it; then, ranked by the error they add, the
        fewest nodes with which every output agrees. When these are so many that the file is much larger than
        with all arithmetic in float32 and all weights in 16 bits, that is done instead.
        """
        trial = self.attempt()
        if trial.refused:
            trial = self._loadable(trial)
        if not trial.refused and trial.score < self.target:
            stored = self.attempt([item for item in self.anatomy.items if item.low], whole=False)
            whole = {item.number for item in self.anatomy.items if item.whole}
            trial = self._accurate(trial)
            if stored.score >= self.target and stored.model.file_bytes() < SAVES * trial.model.file_bytes():
                trial = stored
                for item in self.anatomy.items:
                    item.whole = item.number in whole
                    if item.low:
                        item.keep(
                            "the fewest bytes come of storing weights in 16 bits and computing in float32"
                        )
        return trial

    def attempt(self, kept: Sequence[Item] = (), *, whole: bool = True, judge: bool = True) -> Trial:
        """Convert a copy with some more nodes kept and run it, on one feed only when it is not judged."""
        numbers = {item.number for item in kept}
        plan = plan_of(self.anatomy, kept=numbers, whole=numbers if whole else ())
        model = self.anatomy.model.copy()
        trial = Trial(model, write(model, self.anatomy, plan))
        try:
            outputs = self.calibration.outputs(model, limit=self.limit if judge else 1)
        except SessionError as error:
            trial.refused, trial.score = str(error), -1.0
        else:
            if not judge:
                return trial
            trial.errors = compare_outputs(self.reference, outputs)
            trial.score, trial.output = worst(trial.errors)
            if self.exact and trial.score >= self.target:
                rounded = self._interpreted(model)
                if rounded is not None:
                    trial.score, trial.output = min(
                        (trial.score, trial.output), worst(compare_outputs(self.exact, rounded))
                    )
        return trial

    def _interpreted(self, model: Graph) -> Outputs | None:
        """Return the outputs on the NumPy runtime, which rounds where the model says so.

        onnxruntime computes much of a float16 model in float32 and leaves out roundings in between, which a
        processor with float16 arithmetic does not. None where operators are missing.
        """
        feeds = itertools.islice(self.calibration.data.feeds, min(INTERPRETED, self.limit))
        try:
            interpreter = Interpreter(model)
            return [interpreter.run(feed) for feed in feeds]
        except LabError:
            return None

    def _loadable(self, trial: Trial) -> Trial:
        """Keep the fewest nodes without which the model loads."""
        low = [item for item in self.anatomy.items if item.low]
        if self.attempt(low, whole=False, judge=False).refused:
            return trial
        culprits = fewest(low, lambda kept: not self.attempt(kept, whole=False, judge=False).refused)
        for item in culprits:
            item.keep(f"with it in {self.anatomy.half.name} the model does not load: {trial.refused[:200]}")
        return self.attempt()

    def _accurate(self, trial: Trial) -> Trial:
        """Keep the fewest nodes, the worst first, with which the target is reached."""
        touched = [item for item in self.anatomy.items if item.low or self._reads_stored(item)]
        ranked = rank_by_error(
            self.anatomy, trial.model, touched, self.calibration, exact=self.exact is not None
        )
        bad, good, best = 0, len(ranked), None
        step = max(1, len(ranked) // 64)
        while bad + 1 < good:
            middle = min(bad + step, good - 1) if best is None else (bad + good) // 2
            found = self.attempt(ranked[:middle])
            if not found.refused and found.score >= 1 - CAUTION * (1 - self.target):
                good, best = middle, found
            else:
                bad, step = middle, 2 * step
        best = best or self.attempt(ranked)
        name, half = quote(trial.output), self.anatomy.half.name
        for item in ranked[:good]:
            item.keep(f"output {name} agrees to {trial.score:.6f} only with it in {half}", whole=True)
            item.whole = True
        return best

    def _reads_stored(self, item: Item) -> bool:
        """Whether a float32 node reads weights stored in 16 bits."""
        return not item.whole and any(
            self.anatomy.is_constant(value) and self.anatomy.size(value) >= STORE_ABOVE
            for value, _ in self.anatomy.inputs(item)
        )


def fewest(items: Sequence[Item], works: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """Return few items whose keeping works, given that keeping all of them does (delta debugging).

    >>> fewest([1, 2, 3, 4, 5], lambda kept: {2, 5} <= set(kept))
    [2, 5]
    """

    def reduce(some: list[Item], base: list[Item]) -> list[Item]:
        if len(some) == 1:
            return some
        half = len(some) // 2
        first, second = some[:half], some[half:]
        for part in (first, second):
            if works([*base, *part]):
                return reduce(part, base)
        kept = reduce(first, [*base, *second])
        return [*kept, *reduce(second, [*base, *kept])]

    return reduce(list(items), []) if items else []
