"""Connected components: which of many numbered things are tied together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def components(count: int, links: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[int, Numbers]:
    """Return how many components there are, and the component of each of `count` things.

    Args:
        count: How many things.
        links: Pairs of arrays of equal size; each thing of the first is tied to the one at its place in the
            second.

    >>> components(4, [(np.array([0, 1]), np.array([2, 2]))])
    (2, array([0, 0, 0, 1]))
    """
    from scipy.sparse import coo_array  # noqa: PLC0415 - takes time that commands without it need not wait
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415 - likewise

    empty = np.zeros(0, np.int64)
    if not count:
        return 0, empty
    pairs = [*links]
    first, second = (np.concatenate([empty, *(pair[side].reshape(-1) for pair in pairs)]) for side in (0, 1))
    edges = coo_array((np.ones(first.size), (first, second)), shape=(count, count))
    found, labels = connected_components(edges, directed=False)
    return int(found), labels.astype(np.int64)
