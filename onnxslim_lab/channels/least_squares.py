"""Least squares from sums over rows: weights near others that meet outputs best, with a bias that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsymm, dsyrk
from scipy.linalg.lapack import dposv

from onnxslim_lab.low_rank.bases import shrinkage

Array = NDArray[Any]
Doubles = NDArray[np.float64]
BLOCK = 2 << 20  # bytes of rows in float64 at a time
FACTORS = (1.0, 10.0, 100.0, 1000.0)  # of the damping that are tried


@dataclass(eq=False)
class Sums:
    """Sums over pairs of rows: x that is multiplied, t that shall come out.

    Attributes:
        own: Sum of x x^T, (groups, n, n), the upper triangle where there is one group; with a bias x ends in 1.
        goal: Sum of t x^T, (groups, out, n).
        shifts: Whether there is a bias.
        rows: How many there were.
    """

    own: Doubles
    goal: Doubles
    shifts: bool
    rows: int = 0

    @classmethod
    def empty(cls, groups: int, out: int, columns: int, *, shifts: bool) -> Sums:
        """Return the sums over no rows."""
        size = columns + shifts
        own = np.zeros((groups, size, size), order="C")
        return cls(own, np.zeros((groups, out, size)), shifts)

    @staticmethod
    def bytes_needed(groups: int, out: int, columns: int, *, held: bool = False) -> int:
        """Return the bytes that summing up and solving take; more with rows that are held back."""
        size = columns + 1
        matrices = (1 if groups == 1 else 3) + 2 * held
        return 8 * groups * (size * size * matrices + (6 if held else 3) * out * size) + 4 * BLOCK

    def add(self, x: Array, t: Array) -> None:
        """Add rows x (groups, rows, columns) and t (groups, rows, out)."""
        groups, rows, columns = x.shape
        self.rows += rows
        step = max(1, BLOCK // (8 * groups * (columns + 1)))
        for start in range(0, rows, step):
            part = x[:, start : start + step].astype(np.float64)
            if self.shifts:
                part = np.concatenate([part, np.ones((*part.shape[:2], 1))], axis=2)
            wanted = np.asarray(t[:, start : start + step], np.float64)
            self.goal[...] += wanted.swapaxes(1, 2) @ part
            if groups == 1:
                dsyrk(1.0, part[0].T, beta=1.0, c=self.own[0].T, lower=1, overwrite_c=1)
            else:
                self.own[...] += part.swapaxes(1, 2) @ part

    def copy(self) -> Sums:
        """Return a copy."""
        return Sums(self.own.copy(), self.goal.copy(), self.shifts, self.rows)

    def merge(self, other: Sums) -> None:
        """Add the rows of other sums."""
        self.own += other.own
        self.goal += other.goal
        self.rows += other.rows

    def error(self, weights: Doubles, bias: Doubles) -> float:
        """Return sum |W x + b - t|^2 less what is the same for all weights."""
        whole = np.concatenate([weights, bias[..., None]], axis=2) if self.shifts else weights
        total = 0.0
        for own, goal, part in zip(self.own, self.goal, whole, strict=True):
            met = dsymm(1.0, own.T, part.T, lower=1).T
            total += float(np.einsum("oi,oi->", met - 2 * goal, part))
        return total

    def solve(self, prior: Array, damping: float) -> tuple[Doubles, Doubles]:
        """Return weights (groups, out, columns) and biases (groups, out), 0 without; uses the sums up.

        They minimise sum |W x + b - t|^2 + pull |W - prior|^2, with `damping` times the mean energy of a column
        as pull; columns that are always zero keep the prior.

        Raises:
            LinAlgError: The sums are not positive definite.
        """
        groups, out, columns = prior.shape
        energy = np.einsum("gii->gi", self.own)[:, :columns].mean(axis=1)
        pull = np.where(energy > 0, damping * energy, 1.0)
        found = np.zeros(self.goal.shape)
        for group in range(groups):
            own, right = self.own[group], self.goal[group].copy()
            diagonal = own.reshape(-1)[:: len(own) + 1]
            diagonal[:columns] += pull[group]
            diagonal[columns:] += 1e-12 * np.maximum(1.0, diagonal[columns:])
            right[:, :columns] += pull[group] * prior[group]
            _, solved, failed = dposv(own.T, right.T, lower=1, overwrite_a=1, overwrite_b=1)
            if failed:
                raise np.linalg.LinAlgError("the sums over the data are not positive definite")
            found[group] = solved.T
        return found[..., :columns], found[..., columns] if self.shifts else np.zeros((groups, out))


def fitted(sums: Sums, held: Sums | None, prior: Array, damping: float) -> tuple[Doubles, Doubles]:
    """Return weights and biases as `Sums.solve`, with the damping that serves rows which were held back.

    Few rows show few directions, and weights that fit them alone may be worse than the prior: that is kept
    where none of the dampings is better. Uses the sums up.

    Args:
        sums: Over the rows to fit.
        held: Over the others; None where all are in `sums`: the damping is then what suits so many rows.
        prior: Weights (groups, out, columns).
        damping: The least one.
    """
    if held is None or not held.rows or not sums.rows:
        if held is not None:
            sums.merge(held)
        return sums.solve(prior, max(damping, shrinkage(sums.rows, prior.shape[2])))
    as_it_is = np.asarray(prior, np.float64), np.zeros(prior.shape[:2])
    tried = [(held.error(*as_it_is), 0.0)]
    dampings = [damping * factor for factor in FACTORS]
    tried += [(held.error(*sums.copy().solve(prior, each)), each) for each in dampings]
    best = min(tried)[1]
    if not best:
        return as_it_is
    sums.merge(held)
    return sums.solve(prior, best)
