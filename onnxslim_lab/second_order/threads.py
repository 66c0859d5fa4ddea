"""Rows of a layer are independent problems: solved side by side, each with one BLAS thread.

The number of threads then changes the time and no bit of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits


def in_parallel(work: Callable[[int, int], None], rows: int, most: int) -> None:
    """Call work(start, stop) for ranges that cover all rows, at most `most` (and at least one) in each."""
    most = max(1, most)
    starts = range(0, rows, most)
    threads = min(len(starts), os.cpu_count() or 1)
    with threadpool_limits(1, user_api="blas"):
        if threads < 2:
            for start in starts:
                work(start, min(start + most, rows))
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, start, min(start + most, rows)) for start in starts]:
                done.result()
