"""What is done to a model before its weights alone are quantized: constants are folded, so that weights show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.selection import find_targets, matches

if TYPE_CHECKING:
    from onnxslim_lab.passes.quantize import Quantize


def prepare_weights(model: Graph, step: Quantize, context: Context, outcome: Outcome) -> Quantize:
    """Simplify a model exactly; return the step with those of its patterns that still match something.

    Exporters compute weights from constants (the gates of an LSTM by Concat, a factor by Mul), and only what
    is constant can be quantized. Patterns are checked against the model as it came; operators named in
    `op_types` stay what they are.

    Args:
        model: The main graph, edited.
        step: The quantize pass.
        context: Of the pass.
        outcome: Receives one change for all edits.

    Raises:
        ParameterError: A pattern matches nothing in the model as it came.
    """
    from onnxslim_lab.passes.simplify import Simplify  # noqa: PLC0415 - passes import this package

    find_targets(model, Outcome(), step=step.pass_name(), include=step.include, exclude=step.exclude)
    exact = Simplify(skip=("fuse-linear",) if step.op_types else ())
    edits = len(exact.run(model, Context(seed=context.seed, memory=context.memory)).changes)
    if not edits:
        return step
    outcome.change(model.name or "model", f"simplified before quantization: {edits} exact edits")
    model.infer()
    known = layer_names(model)
    gone = [pattern for pattern in (*step.include, *step.exclude) if not matches(pattern, known)]
    for pattern in gone:
        outcome.refuse(model.name or "model", f"simplification removed all that pattern {pattern!r} matches")
    include = tuple(pattern for pattern in step.include if pattern not in gone)
    exclude = tuple(pattern for pattern in step.exclude if pattern not in gone)
    if step.include and not include:
        exclude = ("*",)  # nothing is left of what was asked for
    return step.model_copy(update={"include": include, "exclude": exclude})


def share_constants(model: Graph, context: Context) -> None:
    """Store once what the nodes of several weights have in common: shapes, shifts, equal scales."""
    from onnxslim_lab.passes.deduplicate import Deduplicate  # noqa: PLC0415 - passes import this package

    Deduplicate().run(model, Context(seed=context.seed, memory=context.memory))


def layer_names(model: Graph) -> set[str]:
    """Return every name of a layer or weight that a pattern can match."""
    outcome = Outcome()
    found = find_targets(model, outcome, step="quantize")
    names = {refusal.where for refusal in outcome.refusals}
    return names.union(*({layer.name, layer.node.name, layer.weight} for t in found for layer in t.layers))
