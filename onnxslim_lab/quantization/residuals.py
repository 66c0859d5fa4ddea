"""Sums of residual connections in float: each layer's contribution is rounded once, their sum never again.

before: s2 = Add(codes of s1, codes of r2)      s1 = Add(codes of s0, codes of r1)
after:  s2 = Add(s1, codes of r2), float        every s on codes for the layers that read it, and for these alone

On codes, every Add rounds the whole sum of all that came before it once more. The Add itself has no products
that integers would make faster.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxslim_lab.base import Context
from onnxslim_lab.components import components
from onnxslim_lab.graph import is_op
from onnxslim_lab.quantization.float_choice import Choice, Price
from onnxslim_lab.quantization.float_weights import loss_without
from onnxslim_lab.quantization.output_loss import Judge
from onnxslim_lab.quantization.placement import Placement
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.static_layers import Key
from onnxslim_lab.statistics.collected import node_place

_MOST = 12  # chains that are tried


def residual_chains(placed: Placement) -> list[list[NodeProto]]:
    """Return the chains of two and more Adds on codes of which each reads the sum before it."""
    on_codes = {id(node) for takers in placed.takers.values() for node, _ in takers}
    adds = [node for node in placed.graph.nodes if id(node) in on_codes and is_op(node, "Add")]
    number = {node.output[0]: place for place, node in enumerate(adds)}
    links = [
        (np.array([number[name]]), np.array([place]))
        for place, node in enumerate(adds)
        for name in node.input
        if name in number
    ]
    count, labels = components(len(adds), links)
    chains = [
        [node for node, label in zip(adds, labels, strict=True) if label == one] for one in range(count)
    ]
    return [chain for chain in chains if len(chain) > 1]


def residual_sums(plan: Plan, without: Collection[str] = ()) -> list[frozenset[Key]]:
    """Return where the sums of each chain of a plan are, when all layers but some run on codes."""
    return [
        frozenset(node_place(placed.graph, node) for node in chain)
        for placed in plan.placements(without)
        for chain in residual_chains(placed)
    ]


def float_residuals(judge: Judge, choice: Choice, price: Price, context: Context) -> Choice:
    """Let those chains of sums stay float that are worth their time, beside a choice of layers.

    Args:
        judge: Measures the loss; its plan is edited.
        choice: What stays float.
        price: Weighs the loss against time.
        context: Its progress is told.

    Returns:
        The choice, with the loss that is left.
    """
    plan = judge.plan
    chains = residual_sums(plan, choice.names)
    best = price.of(choice.after, choice.names)
    for number, chain in enumerate(chains[:_MOST]):
        context.progress(number + 1, min(len(chains), _MOST), "float sums of residual connections")
        plan.residuals |= chain
        after = loss_without(judge, choice.names, coded=choice.coded)
        here = price.of(after, choice.names)
        if here < best:
            best, choice = here, replace(choice, after=after)
        else:
            plan.residuals -= chain
    return choice
