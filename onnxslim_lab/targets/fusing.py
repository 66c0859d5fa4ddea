"""Whether the nodes between DequantizeLinear and QuantizeLinear run in integers on a target, and why not.

The rules are those of onnxruntime's selectors, with what differs between targets taken from the profile;
targets whose compilers are closed are held to the same rules with the data of their documentation.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxslim_lab.graph import attribute, domain_of
from onnxslim_lab.targets.finding import Finding
from onnxslim_lab.targets.group import Group
from onnxslim_lab.targets.model import Operator, Profile
from onnxslim_lab.targets.qdq import is_float, is_redundant, parameters
from onnxslim_lab.targets.weight_rules import weight_only_problems, weight_problems

_TRANSPARENT = frozenset({"Identity", "Dropout", "Cast"})  # vanish, or end the quantized part on purpose
_OPERANDS = {"unary": (0,), "same": (0,), "reads": (0,), "select": (1, 2), "layer": (0, 1)}


def explain(group: Group, profile: Profile) -> Iterator[Finding]:
    """Yield what keeps a node from running in integers although Q and DQ stand around it."""
    rule = profile.operators.get(group.node.op_type) if not domain_of(group.node.domain) else None
    if not group.activations:
        yield from weight_only_problems(group, profile)
    elif rule is None:
        yield from _island(group, profile)
    elif rule.form == "layer" or group.quantizers or rule.form == "reads":
        found = next(_broken(group, rule, profile), None) or next(_unfused(group, rule, profile), None)
        if found is not None:
            yield found
        elif rule.avoid:
            yield group.finding(
                "avoid", "inaccurate", rule.avoid, "leave it in float: exclude it in quantize"
            )


def _island(group: Group, profile: Profile) -> Iterator[Finding]:
    """Yield a finding for a node without integer form that stands alone between DQ and Q."""
    node, graph = group.node, group.graph
    floats = [
        name
        for slot, name in enumerate(node.input)
        if name
        and not graph.is_constant(name)
        and is_float(graph, name)
        and slot not in group.dequantizers.keys() - group.activations.keys()
    ]
    fed = len(group.activations) == len(floats)
    if not group.quantizers or not fed or node.op_type in _TRANSPARENT or domain_of(node.domain):
        return
    if any(end.others for end in group.endings):
        return
    if node.op_type in ("Relu", "Clip") and len(group.quantizers) == 1:
        same = parameters(graph, group.activations[0]).equals(parameters(graph, group.quantizers[0]))
        if same and is_redundant(graph, node, group.quantizers[0]):
            return
        yield group.finding(
            "island",
            "float",
            "stands between its own DequantizeLinear and QuantizeLinear: every value is quantized twice",
            "quantize once, behind it: the layer before it absorbs it when the range starts or ends there",
        )
        return
    yield group.finding(
        "island",
        "float",
        f"{profile.name} has no integer {node.op_type}: it runs in float between DequantizeLinear and "
        "QuantizeLinear",
        "leave it in float: quantize neither its input nor its output (exclude it in quantize)",
    )


def _broken(group: Group, rule: Operator, profile: Profile) -> Iterator[Finding]:
    """Yield what makes the target refuse the model, stop, or compute something else."""
    graph, node = group.graph, group.node
    if graph.root.opset() < rule.breaks_below:
        yield group.finding(
            "opset",
            "fails",
            f"{node.op_type} takes no integers below opset {rule.breaks_below}, yet {profile.name} fuses it",
            f"raise the opset to {rule.breaks_below} or leave it in float: exclude it in quantize",
        )
    operands = [*group.activations.values(), *group.quantizers]
    if rule.form in ("binary", "variadic", "select"):
        operands += group.dequantizers.values()
    wide = [quantizer for quantizer in operands if (parameters(graph, quantizer).axis) is not None]
    if wide and rule.form not in ("same", "reads"):
        yield group.finding(
            "per-channel",
            "fails",
            "an operand that is not a layer's weight has a scale for each channel: the fused operator takes one "
            "scale only (onnxruntime 1.32 computes it in float)",
            "quantize activations per tensor",
        )
    if rule.form == "layer" and 1 in group.dequantizers and 1 not in group.activations:
        yield from weight_problems(group, profile)


def _unfused(group: Group, rule: Operator, profile: Profile) -> Iterator[Finding]:
    """Yield what makes the target run the node in float."""
    graph, node = group.graph, group.node
    if graph.root.opset() < rule.since:
        yield group.finding(
            "opset",
            "float",
            f"integers from opset {rule.since} on; the model has opset {graph.root.opset()}",
            f"raise the opset to {rule.since}",
        )
    slots = _OPERANDS.get(rule.form, tuple(range(len(node.input))))
    for slot in slots:
        if slot < len(node.input) and node.input[slot] and slot not in group.dequantizers:
            constant = graph.is_constant(node.input[slot])
            if not (rule.form == "layer" and constant and rule.float_weight):
                yield group.finding(
                    "operand",
                    "float",
                    f"its {'constant ' if constant else ''}input {slot} is not quantized while others are",
                    "quantize all its inputs or none",
                )
    bias = node.input[2] if rule.form == "layer" and len(node.input) > 2 else ""
    if bias and 2 not in group.dequantizers and not graph.is_constant(bias):
        yield group.finding("bias", "float", "its bias is computed", "make the bias a constant")
    yield from _types(group, rule, profile)
    yield from _attributes(group, profile)
    yield from _after(group, rule, profile)
    if rule.form == "same":
        yield from _moved(group)


def _types(group: Group, rule: Operator, profile: Profile) -> Iterator[Finding]:
    """Yield types that the target does not run in integers."""
    graph = group.graph
    allowed = rule.types or profile.activation_types
    inputs = group.activations if rule.form == "layer" else group.dequantizers
    declared = {parameters(graph, node).type_name for node in (*inputs.values(), *group.quantizers)}
    for name in sorted(declared - set(allowed)):
        yield group.finding(
            "type",
            "float",
            f"{profile.name} has no {name} {group.node.op_type}",
            f"activations={profile.activations}",
        )
    rewrites = profile.rewrites_signed
    names = group.types(inputs, rewrites_signed=rewrites)
    if rewrites and "int8" in declared and "int8" in names and (rule.form == "layer" or len(names) > 1):
        yield group.finding(
            "signed",
            "float",
            f"{profile.name} runs it on uint8, to which int8 is rewritten only where one node reads it",
            f"activations={profile.activations}",
        )
    elif len(names) > 1:
        yield group.finding(
            "type",
            "float",
            f"its operands are quantized to different types ({', '.join(sorted(names))})",
            f"quantize all of them to {profile.activations}",
        )
    if rule.form == "layer" and 1 in group.dequantizers and 1 not in group.activations:
        weight = parameters(graph, group.dequantizers[1]).type_name
        if weight not in (rule.weights or profile.weight_types):
            yield group.finding(
                "type",
                "float",
                f"{profile.name} has no {group.node.op_type} with quantized activations and {weight} weights",
                f"weights={profile.weights}, or mode=weight-only",
            )
        elif not profile.rewrites_signed and "int8" in names and weight == "uint8":
            yield group.finding(
                "type", "float", "signed activations do not go with unsigned weights", "weights=int8"
            )


def _attributes(group: Group, profile: Profile) -> Iterator[Finding]:
    node = group.node
    if not profile.is_onnxruntime:
        return
    factors = {attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)}
    if node.op_type == "Gemm" and len(node.input) > 2 and factors != {1.0}:
        yield group.finding("attribute", "float", "alpha or beta is not 1", "fold them into weight and bias")
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        yield group.finding(
            "attribute",
            "float",
            "only mode nearest runs in integers",
            "leave it in float: exclude it in quantize",
        )


def _after(group: Group, rule: Operator, profile: Profile) -> Iterator[Finding]:
    """Yield what keeps the output from being quantized in the same operator."""
    if rule.form == "reads":
        return
    for end in group.endings:
        clip = end.clip
        if clip is not None and clip.op_type not in profile.absorbs:
            if not end.quantizers:
                yield group.finding(
                    "clip",
                    "float",
                    f"the {clip.op_type} after it is not followed by QuantizeLinear",
                    f"quantize the output of the {clip.op_type}",
                )
            elif rule.form == "same":
                yield group.finding("clip", "float", f"a {clip.op_type} stands before Q", "move it in front")
            elif not is_redundant(group.graph, clip, end.quantizers[0]):
                yield group.finding(
                    "clip",
                    "float",
                    f"the {clip.op_type} after it cuts inside the quantized range",
                    f"let the range of the output end where the {clip.op_type} does (zero_point at its end)",
                )
        elif not end.quantizers:
            if not rule.float_output:
                yield group.finding(
                    "float-output",
                    "float",
                    "its output is not quantized, and without that it does not run in integers",
                    "quantize its output, or leave its input in float",
                )
        elif not end.fusable:
            what = (
                "several QuantizeLinear read"
                if len(end.quantizers) > 1
                else "float nodes or the caller also read"
            )
            yield group.finding(
                "float-output",
                "float",
                f"{what} its output",
                "let one QuantizeLinear read it and all others its DequantizeLinear",
            )


def _moved(group: Group) -> Iterator[Finding]:
    """Yield the difference between what goes in and what comes out of an operator that moves values."""
    graph = group.graph
    if 0 not in group.dequantizers:
        return
    before = parameters(graph, group.dequantizers[0])
    for quantizer in group.quantizers:
        after = parameters(graph, quantizer)
        if before.axis is not None or after.axis is not None:
            yield group.finding("per-channel", "float", "scales per channel around it", "quantize per tensor")
        elif not before.equals(after):
            yield group.finding(
                "parameters",
                "float",
                "it only moves values, yet scale or zero point differ before and after it",
                "use the scale and zero point of its input for its output",
            )
