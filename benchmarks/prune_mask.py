"""Compare `prune` with torch.nn.utils.prune.global_unstructured(L1Unstructured): the masks, the seconds.

    python benchmarks/prune_mask.py [WEIGHTS]        needs torch (pip install torch)

Weights are drawn so that no two have the same magnitude: torch does not say which of two equals goes.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from onnxslim_lab.floats import Array, blocks, kth_magnitude
from onnxslim_lab.second_order.magnitude import zero_upto, zeros_wanted

FRACTIONS = (0.05, 0.5, 0.777, 0.92, 0.999)


def draw(elements: int, seed: int) -> list[Array]:
    """Return three float32 matrices of about so many elements, all magnitudes different."""
    generator = np.random.default_rng(seed)
    magnitudes = np.arange(1, elements + 1, dtype=np.uint32) * np.uint32((127 << 23) // (elements + 1))
    generator.shuffle(magnitudes)
    signed = magnitudes.view(np.float32) * generator.choice(np.array([-1, 1], np.float32), elements)
    cuts = (0, elements // 10, elements // 2, elements)
    return [signed[start:end] for start, end in pairwise(cuts)]


def ours(weights: list[Array], fraction: float) -> list[Array]:
    """Return the masks (True stays) of one global threshold."""
    key, ties = 0, zeros_wanted(fraction, sum(weight.size for weight in weights))

    def read() -> Iterator[Array]:
        for weight in weights:
            yield from blocks(weight)

    if ties:
        key, ties = kth_magnitude(read, ties, wide=False)
    masks = []
    for weight in weights:
        pruned, ties = zero_upto(weight, key, ties, wide=False)
        masks.append(pruned != 0)
    return masks


def main() -> int:
    """Print one line per fraction; return 1 when a mask differs."""
    try:
        torch: Any = importlib.import_module("torch")
        prune: Any = importlib.import_module("torch.nn.utils.prune")
    except ImportError:
        print("torch is not installed: nothing compared")
        return 0
    elements = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    failed = 0
    for number, fraction in enumerate(FRACTIONS):
        weights = draw(elements, number)
        layers = []
        for weight in weights:
            layer = torch.nn.Linear(weight.size, 1, bias=False)
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight[None].copy()))
            layers.append(layer)
        started = time.perf_counter()
        prune.global_unstructured(
            [(layer, "weight") for layer in layers], pruning_method=prune.L1Unstructured, amount=fraction
        )
        between = time.perf_counter()
        masks = ours(weights, fraction)
        ended = time.perf_counter()
        same = all(
            np.array_equal(layer.weight_mask.numpy()[0] != 0, mask)
            for layer, mask in zip(layers, masks, strict=True)
        )
        failed |= not same
        verdict = "identical masks" if same else "MASKS DIFFER"
        print(
            f"{elements} weights, {fraction}: {verdict}; torch {between - started:.3f} s, ours {ended - between:.3f} s"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
