"""Which channels of a group matter least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri

from onnxslim_lab.channels.allocation import Ranking
from onnxslim_lab.channels.groups import Group, Side
from onnxslim_lab.layers import Layer
from onnxslim_lab.second_order.choose import output_energy
from onnxslim_lab.second_order.obs import RAISES
from onnxslim_lab.statistics import Gram

Doubles = NDArray[np.float64]
Criterion = Literal["l1", "l2", "activation", "sensitivity", "obs"]
GramOf = Callable[[Layer], Gram]
_STEPS = 24  # rounds in which the channels of a group are removed; losses are computed anew after each


def by_magnitude(group: Group, criterion: Criterion) -> Ranking:
    """Rank by the part that a channel has in its layers' weights, all makers and readers added up.

    "l1" takes sums of magnitudes, "l2" sums of squares. Li et al., Pruning Filters for Efficient ConvNets,
    2017; over coupled layers: Fang et al., DepGraph, 2023.
    """
    shares = np.zeros(group.size)
    for side in (*group.makers, *group.readers):
        weights = np.abs(side.layer.matrix.astype(np.float64))
        weights = weights if criterion == "l1" else weights**2
        sums = weights.sum(axis=2 if side.members.ndim == 2 else (0, 1))
        shares += _gather(sums, side.members, group.size) / max(float(weights.sum()), np.finfo(float).tiny)
    return ranked(shares)


def by_activation(group: Group, energies: Sequence[tuple[Doubles, NDArray[np.int64]]]) -> Ranking:
    """Rank by the part of a channel in the energy of what the layers read.

    Args:
        group: The group.
        energies: For each reader the mean square of each place along an axis, and the channel it is, or -1.
    """
    shares = np.zeros(group.size)
    for squares, members in energies:
        shares += _gather(squares, members, group.size) / max(float(squares.sum()), np.finfo(float).tiny)
    return ranked(shares)


def below(group: Group, energies: Sequence[tuple[Doubles, NDArray[np.int64]]], threshold: float) -> Ranking:
    """Rank the channels whose root mean square is below a threshold wherever they are read, and no others."""
    largest = np.zeros(group.size)
    for squares, members in energies:
        places = np.bincount(members[members >= 0], minlength=group.size)
        mean = _gather(squares, members, group.size) / np.maximum(places, 1)
        np.maximum(largest, np.sqrt(mean), out=largest)
    order = np.argsort(largest, kind="stable") if energies else np.zeros(0, np.int64)
    order = order[largest[order] < threshold]
    return Ranking(order, largest[order])


def ranked(losses: Doubles) -> Ranking:
    """Return channels with independent losses in order."""
    order = np.argsort(losses, kind="stable")
    return Ranking(order, losses[order])


def _gather(values: Doubles, members: NDArray[np.int64], size: int) -> Doubles:
    kept = members.reshape(-1) >= 0
    return np.bincount(members.reshape(-1)[kept], values.reshape(-1)[kept], size).astype(np.float64)


def by_loss(group: Group, gram_of: GramOf, *, least: float, damping: float, memory: int) -> Ranking:
    """Rank by what a channel costs the outputs of its readers when all other weights are refitted.

    Removing the columns B of a layer raises |X dW|^2 by sum over rows of w_B inv(inv(H)_BB) w_B (optimal
    brain surgeon with the channel as block; H the covariance of the inputs, since the bias is refitted
    too), over the variance of its output. All rows lose the same columns. The inverse and the weights are
    updated after each round of removals; where the readers' matrices do not fit the memory all at once, or
    only the diagonal of H is known, each channel is looked at alone.

    Args:
        group: The group.
        gram_of: Gives the Gram matrix of a reader; it is used up.
        least: Part of the channels that is not ranked.
        damping: Part of the mean diagonal added to H.
        memory: Bytes of matrices to hold at a time.
    """
    steps = 1 if sum(_bytes(side.layer) for side in group.readers) > memory else _STEPS
    alone = np.zeros(group.size)
    readers = []
    for side in group.readers:
        gram = gram_of(side.layer)
        if not gram.matrix.any():  # no feed reaches it: all inputs are taken to have one energy
            gram = Gram(np.ones_like(gram.total), np.zeros_like(gram.total), 1)
        if not gram.full:
            energy = output_energy(side.layer.matrix, gram)
            weights = side.layer.matrix.astype(np.float64) ** 2
            column = (weights * np.asarray(gram.diagonal)[:, None]).sum(axis=(0, 1))
            alone += _gather(column, side.members, group.size) / max(energy, np.finfo(float).tiny)
            continue
        sums, means, count, energy = gram.xtx, gram.mean, gram.count, 0.0
        del gram
        for number, matrix in enumerate(side.layer.matrix.astype(np.float64)):
            _centre(sums[number], means[number], count)
            energy += float(np.einsum("oi,oi->", matrix @ sums[number], matrix))
        energy = max(energy, np.finfo(float).tiny)
        for number, matrix in enumerate(side.layer.matrix):
            reader = _Reader(matrix, inverse_in_place(sums[number], damping), side, group.size, energy)
            if steps == 1:
                alone += reader.losses(np.arange(group.size))
            else:
                readers.append(reader)
    if not readers:
        return ranked(alone)
    order: list[int] = []
    losses: list[float] = []
    left = np.arange(group.size)
    wanted = group.size - int(least * group.size)
    while len(order) < wanted:
        costs = alone[left] + sum(reader.losses(left) for reader in readers)
        count = min(max(1, group.size // steps), wanted - len(order))
        chosen = np.argsort(costs, kind="stable")[:count]
        order += left[chosen].tolist()
        losses += costs[chosen].tolist()
        for reader in readers:
            reader.remove(left[chosen])
        left = np.delete(left, chosen)
    return Ranking(np.array(order, np.int64), np.maximum.accumulate(losses))


def _bytes(layer: Layer) -> int:
    """Return what a reader takes while channels are removed from it."""
    groups, out, columns = layer.shape
    return 8 * groups * columns * (3 * columns + 2 * out)


def _centre(sums: Doubles, mean: Doubles, count: int) -> None:
    """Turn sums of x x^T into sums of (x - mean) (x - mean)^T, in place."""
    for row, value in enumerate(mean):
        sums[row] -= count * value * mean


def inverse_in_place(matrix: Doubles, damping: float) -> Doubles:
    """Return the inverse of a covariance (n, n) in its memory, `damped` first.

    Where rounding leaves it indefinite the diagonal is raised by a growing part of its mean, as in
    `onnxslim_lab.second_order.obs.inverse`.

    Raises:
        LinAlgError: A hundredth of the mean is not enough.
    """
    diagonal = np.einsum("ii->i", matrix)
    mean = float(diagonal.mean()) if diagonal.any() else 1.0
    diagonal[...] = np.where(diagonal > 0, diagonal, mean) + damping * mean
    before = diagonal.copy()
    for part in (0.0, *RAISES):
        diagonal[...] = before + part * float(before.mean())
        _, failed = dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
        if not failed:
            dpotri(matrix.T, lower=1, overwrite_c=1)
            for row in range(len(matrix)):
                matrix[row:, row] = matrix[row, row:]
            return matrix
        for row in range(len(matrix)):
            matrix[row, row + 1 :] = matrix[row + 1 :, row]
    raise np.linalg.LinAlgError("the covariance of a layer's inputs is not positive definite")


class _Reader:
    """One matrix that reads the channels of a group, with the inverse of the covariance of its inputs."""

    def __init__(
        self,
        matrix: NDArray[np.floating],
        inverse: Doubles,
        side: Side,
        size: int,
        energy: float,
    ) -> None:
        self._weights = matrix.astype(np.float64)
        self._inverse = inverse
        self._members = side.members
        self._size = size
        self._energy = energy

    def losses(self, channels: NDArray[np.int64]) -> Doubles:
        """Return the loss of each of these channels if it went next."""
        result = np.zeros(self._size)
        counts = np.bincount(self._members[self._members >= 0], minlength=self._size)
        order = np.argsort(self._members, kind="stable")
        ends = np.cumsum(counts) + int((self._members < 0).sum())
        for width in np.unique(counts[counts > 0]):
            own = np.flatnonzero(counts == width)
            columns = np.stack([order[ends[channel] - width : ends[channel]] for channel in own])
            blocks = np.linalg.inv(self._inverse[columns[:, :, None], columns[:, None, :]])
            weights = self._weights[:, columns].swapaxes(0, 1)  # (channels, out, width)
            result[own] = np.einsum("kob,kob->k", weights @ blocks, weights)
        return np.maximum(result[channels], 0.0) / self._energy

    def remove(self, channels: NDArray[np.int64]) -> None:
        """Remove channels, the other weights making good for it as far as they can."""
        gone = np.isin(self._members, channels)
        stays = ~gone
        block = np.linalg.solve(self._inverse[np.ix_(gone, gone)], self._inverse[np.ix_(gone, stays)])
        self._weights = self._weights[:, stays] - self._weights[:, gone] @ block
        self._inverse = self._inverse[np.ix_(stays, stays)] - self._inverse[np.ix_(stays, gone)] @ block
        self._members = self._members[stays]
