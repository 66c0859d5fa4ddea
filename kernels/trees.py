"""ai.onnx.ml: ensembles of decision trees, evaluated for all rows and trees at once, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxslim_lab.kernels.kept import kept
from onnxslim_lab.kernels.registry import Array

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
"""Comparisons of a branch, at the numbers that TreeEnsemble gives them; LEAF comes after them here."""
LEAF = len(MODES)
_COMPARE = (np.less_equal, np.less, np.greater_equal, np.greater, np.equal, np.not_equal)
_PLACES = 1 << 21  # rows times trees walked at once
_FEW = 1 << 16  # rows times nodes compared, or votes added, where NumPy's calls cost more than their work
_TABLE = 1 << 18  # nodes times targets whose sums are kept


@dataclass(frozen=True)
class Forest:
    """Trees as arrays over all their nodes.

    Attributes:
        mode: Number of the comparison in MODES, or LEAF.
        feature, split: What is compared.
        true, false: Next node.
        missing_true: Whether NaN goes to `true`.
        roots: First node of every tree.
        members: Node -> the values a BRANCH_MEMBER node looks for.
        leaf_of: Votes that the leaf of a node casts: first and one past the last, (nodes, 2).
        targets, weights: The votes.
    """

    mode: Array
    feature: Array
    split: Array
    true: Array
    false: Array
    missing_true: Array
    roots: Array
    members: dict[int, Array]
    leaf_of: Array
    targets: Array
    weights: Array

    def leaves(self, rows: Array) -> Array:
        """Return the leaf that every row reaches in every tree: (N, T).

        Raises:
            ValueError: A walk does not end: the nodes form a cycle.
        """
        kinds = self.kinds
        one = len(kinds) == 1 and kinds[0] < len(_COMPARE) and rows.shape[1] > self.last_feature
        if one and 0 < len(rows) * len(self.mode) <= _FEW:
            return np.array([self._jump(row, _COMPARE[kinds[0]]) for row in rows])
        here = np.broadcast_to(self.roots, (len(rows), len(self.roots))).copy()
        open_rows, open_trees = np.nonzero(self.mode[here] != LEAF)
        node = here[open_rows, open_trees]
        for _ in range(len(self.mode)):
            if not len(node):
                return here
            value = rows[open_rows, self.feature[node]]
            follows = self._holds(value, node, kinds)
            follows |= np.isnan(value) & self.missing_true[node]
            node = np.where(follows, self.true[node], self.false[node])
            here[open_rows, open_trees] = node
            inner = self.mode[node] != LEAF
            open_rows, open_trees, node = open_rows[inner], open_trees[inner], node[inner]
        if len(node):
            raise ValueError("the nodes of a tree form a cycle")
        return here

    @cached_property
    def kinds(self) -> list[int]:
        """Numbers of the comparisons that occur."""
        kinds: list[int] = np.unique(self.mode[self.mode != LEAF]).tolist()
        return kinds

    @cached_property
    def last_feature(self) -> int:
        """The greatest feature compared."""
        return int(self.feature[self.mode != LEAF].max(initial=-1))

    @cached_property
    def _ways(self) -> tuple[Array, Array, Array, int, bool]:
        """Features, next nodes where they hold and where not (a leaf's is itself), depth, any missing_true."""
        leaf, own = self.mode == LEAF, np.arange(len(self.mode))
        true, false = np.where(leaf, own, self.true), np.where(leaf, own, self.false)
        depth, level = 0, np.unique(self.roots)
        while len(level := level[~leaf[level]]):
            level = np.unique(np.concatenate((true[level], false[level])))
            depth += 1
            if depth > len(own):
                raise ValueError("the nodes of a tree form a cycle")
        return np.where(leaf, 0, self.feature), true, false, depth, bool(self.missing_true.any())

    def _jump(self, row: Array, compare: np.ufunc) -> Array:
        """Return the leaf that one row reaches in every tree: all nodes are compared before any is walked."""
        feature, true, false, depth, missing = self._ways
        value = row.take(feature)
        follows = compare(value, self.split)
        if missing and np.isnan(row).any():
            follows |= np.isnan(value) & self.missing_true
        following = np.where(follows, true, false)
        node = self.roots
        for _ in range(depth):
            node = following.take(node)
        return np.asarray(node)

    def _holds(self, value: Array, node: Array, kinds: list[int]) -> Array:
        """Return where the comparison of a node holds for a value."""
        split = self.split[node]
        if len(kinds) == 1 and kinds[0] < len(_COMPARE):
            return np.asarray(_COMPARE[kinds[0]](value, split))
        result = np.zeros(len(value), np.bool_)
        mode = self.mode[node]
        for kind in kinds:
            chosen = mode == kind
            if kind < len(_COMPARE):
                result[chosen] = _COMPARE[kind](value[chosen], split[chosen])
                continue
            for place in np.unique(node[chosen]).tolist():
                same = node == place
                result[same] = np.isin(value[same], self.members[place])
        return result

    @cached_property
    def _sums(self) -> Array:
        """The sum of the votes of every node for every target that has some: (nodes, targets)."""
        width = int(self.targets.max(initial=0)) + 1
        first, count = self.leaf_of[:, 0], self.leaf_of[:, 1] - self.leaf_of[:, 0]
        node = np.repeat(np.arange(len(count)), count)
        vote = np.arange(len(node)) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)
        flat = node * width + self.targets[vote]
        return np.bincount(flat, self.weights[vote], len(count) * width).reshape(-1, width)

    def votes(self, rows: Array, targets: int, aggregate: str) -> Array:
        """Return the weights voted for, added up or as `aggregate` says: (N, targets), 0 without a vote.

        Sums are taken in float64.

        Raises:
            ValueError: The aggregate function is unknown.
        """
        if aggregate not in {"SUM", "AVERAGE", "MIN", "MAX"}:
            raise ValueError(f"aggregate_function {aggregate!r} is not SUM, AVERAGE, MIN or MAX")
        few = len(rows) * len(self.roots) * targets <= _FEW and len(self.mode) * targets <= _TABLE
        if few and aggregate in {"SUM", "AVERAGE"} and targets == int(self.targets.max(initial=0)) + 1:
            sums = self._sums.take(self.leaves(rows), 0).sum(1)
            return np.asarray(sums / max(len(self.roots), 1) if aggregate == "AVERAGE" else sums)
        start = {"MIN": np.inf, "MAX": -np.inf}.get(aggregate, 0.0)
        total = np.full((len(rows), targets), start)
        voted = np.zeros((len(rows), targets), np.bool_)
        step = max(_PLACES // max(len(self.roots), 1), 1)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            self._collect(rows[part], total[part], voted[part], aggregate)
        if aggregate == "AVERAGE":
            total /= max(len(self.roots), 1)
        return np.where(voted, total, 0.0)

    def _collect(self, rows: Array, total: Array, voted: Array, aggregate: str) -> None:
        """Put the votes for some rows into `total` and `voted`."""
        reached = self.leaf_of[self.leaves(rows)]
        count = reached[..., 1] - reached[..., 0]
        for place in range(int(count.max(initial=0))):
            who, tree = np.nonzero(count > place)
            vote = reached[who, tree, 0] + place
            flat = who * total.shape[1] + self.targets[vote]
            weight = self.weights[vote]
            voted.reshape(-1)[flat] = True
            if aggregate in {"MIN", "MAX"}:
                better = np.minimum if aggregate == "MIN" else np.maximum
                better.at(total.reshape(-1), flat, weight)
            else:
                total += np.bincount(flat, weight, total.size).reshape(total.shape)


def numbered(keys: Array, wanted: Array) -> Array:
    """Return where the wanted keys stand among the keys.

    Raises:
        ValueError: One is not there.
    """
    order = np.argsort(keys, kind="stable")
    place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = order[place]
    if len(wanted) and not np.array_equal(keys[found], wanted):
        raise ValueError("a node that is referred to does not exist")
    return np.asarray(found)


def grown(nodes: dict[str, Any], votes: dict[str, Any], splits: Array, weights: Array) -> Forest:
    """Return the forest of TreeEnsembleClassifier or -Regressor attributes.

    Args:
        nodes: The attributes `nodes_*` by the rest of their names.
        votes: `treeids`, `nodeids` and `ids` of the class_* or target_* attributes.
        splits: nodes_values, as float32 or float64.
        weights: class_weights or target_weights.

    Raises:
        ValueError: A node refers to one that does not exist, or a mode is unknown.
    """
    trees, ids = (np.array(nodes[name], np.int64) for name in ("treeids", "nodeids"))
    unit = int(ids.max(initial=0)) + 1
    keys = trees * unit + ids
    number = {name: code for code, name in enumerate((*MODES, "LEAF"))}
    unknown = set(nodes["modes"]) - set(number)
    if unknown:
        raise ValueError(f"nodes_modes {sorted(unknown)} are unknown")
    mode = np.array([number[name] for name in nodes["modes"]], np.int64)
    branch = mode != LEAF
    true, false = (np.zeros(len(ids), np.int64) for _ in range(2))
    for following, name in ((true, "truenodeids"), (false, "falsenodeids")):
        wanted = trees * unit + np.array(nodes[name], np.int64)
        following[branch] = numbered(keys, wanted[branch])
    missing = np.array(nodes["missing_value_tracks_true"] or np.zeros(len(ids)), np.bool_)
    voters = np.array(votes["treeids"], np.int64) * unit + np.array(votes["nodeids"], np.int64)
    place = numbered(keys, voters)
    order = np.argsort(place, kind="stable")
    leaf_of = np.searchsorted(place[order], np.arange(len(ids))[:, None] + np.array([0, 1]))
    leaf_of[branch] = 0
    _, first = np.unique(trees, return_index=True)
    feature = np.array(nodes["featureids"], np.int64)
    targets = np.array(votes["ids"], np.int64)[order]
    roots = np.sort(first)
    return Forest(
        mode,
        feature,
        splits,
        true,
        false,
        missing,
        roots,
        {},
        leaf_of,
        targets,
        weights[order].astype(np.float64),
    )


@kept
def planted(
    *,
    leaf_targetids: Sequence[int],
    leaf_weights: Array,
    membership_values: Array | None,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_missing_value_tracks_true: Sequence[int] | None,
    nodes_modes: Array,
    nodes_splits: Array,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    tree_roots: Sequence[int],
) -> Forest:
    """Return the forest of TreeEnsemble's attributes: the leaves follow the inner nodes."""
    inner, leaves = len(nodes_featureids), len(leaf_targetids)
    filling = np.zeros(leaves, np.int64)
    mode = np.concatenate((nodes_modes.reshape(-1).astype(np.int64), filling + LEAF))
    ways = []
    for ids, ends in ((nodes_truenodeids, nodes_trueleafs), (nodes_falsenodeids, nodes_falseleafs)):
        following = np.array(ids, np.int64) + inner * np.array(ends, np.int64)
        ways.append(np.concatenate((following, filling)))
    missing = np.zeros(inner + leaves, np.bool_)
    missing[:inner] = nodes_missing_value_tracks_true or False
    values = np.zeros(0) if membership_values is None else membership_values.reshape(-1)
    sets = np.split(values, np.flatnonzero(np.isnan(values)))
    nodes = np.flatnonzero(mode == MODES.index("BRANCH_MEMBER")).tolist()
    members = {node: found[~np.isnan(found)] for node, found in zip(nodes, sets, strict=False)}
    own = np.arange(inner + leaves)[:, None] - inner + np.array([0, 1])
    own[:inner] = 0
    return Forest(
        mode=mode,
        feature=np.concatenate((np.array(nodes_featureids, np.int64), filling)),
        split=np.concatenate((nodes_splits.reshape(-1), filling.astype(nodes_splits.dtype))),
        true=ways[0],
        false=ways[1],
        missing_true=missing,
        roots=np.array(tree_roots, np.int64),
        members=members,
        leaf_of=own,
        targets=np.array(leaf_targetids, np.int64),
        weights=leaf_weights.reshape(-1).astype(np.float64),
    )
