"""What every way of measuring shares: the model, the feeds, the means to run them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnxslim_lab.base import Progress
from onnxslim_lab.graph import Graph
from onnxslim_lab.sessions import Runner
from onnxslim_lab.worker.messages import Value

Feeds = Sequence[dict[str, Value]]


def sample_count(model: Graph, feed: Mapping[str, Value]) -> int:
    """Return the number of samples of a feed: the first size of its first input with axes."""
    for name in model.inputs:
        value = feed.get(name)
        if isinstance(value, np.ndarray) and value.ndim:
            return int(value.shape[0])
    return 1


class OverFeeds:
    """A model and the feeds to measure it on.

    Args:
        runner: Runs the model.
        model: The main graph.
        feeds: The data.
        memory: Bytes to use.
        progress: Called after each feed.
    """

    def __init__(self, runner: Runner, model: Graph, feeds: Feeds, memory: int, progress: Progress) -> None:
        self._runner = runner
        self._model = model
        self._feeds = feeds
        self._memory = memory
        self._progress = progress

    def _numbered(
        self, numbers: Iterable[int] | None = None, what: str = "", of: int | None = None
    ) -> Iterator[tuple[int, dict[str, Value], int]]:
        """Yield the number, the inputs and the samples of feeds, as Runner.measure takes them.

        Args:
            numbers: Those of the feeds; None: all.
            what: What to show as progress; "" for none.
            of: The number of feeds to show; by default that of `numbers`.
        """
        chosen = range(len(self._feeds)) if numbers is None else list(numbers)
        for done, number in enumerate(chosen):
            feed = self._feeds[number]
            yield number, feed, sample_count(self._model, feed)
            if what:
                at = done if of is None else number
                self._progress(at + 1, len(chosen) if of is None else of, what)
