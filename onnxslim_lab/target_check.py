"""Check a model against a target: what it will not run, not fuse, or run slower than it could."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.profiles import Profile
from onnxslim_lab.quantization.operands import codes_shape
from onnxslim_lab.saturation import Saturation, find_saturation
from onnxslim_lab.targets.finding import Finding, Severity, merged
from onnxslim_lab.targets.fusing import explain
from onnxslim_lab.targets.group import Group
from onnxslim_lab.targets.qdq import is_dequantize, is_quantize, parameters
from onnxslim_lab.targets.report import TargetReport
from onnxslim_lab.targets.signed import breaks_loading

__all__ = ["Finding", "TargetReport", "check_target", "target_report"]

_CONTROL = frozenset({"If", "Loop", "Scan"})
_QOPERATORS = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
}  # slot of the weight
_SHOWN = 6  # channels named


def check_target(model: Graph, profile: Profile) -> list[Finding]:
    """Return what a target will not run, not fuse, or run badly, gravest first.

    Args:
        model: The main graph of a model, quantized or not; bodies and functions are walked.
        profile: The target.
    """
    return target_report(model, profile).findings


def target_report(
    model: Graph, profile: Profile, data: Dataset | None = None, *, progress: Progress = silent
) -> TargetReport:
    """Return the findings of `check_target` with the number of nodes that run in integers.

    Args:
        model: The main graph of a model.
        profile: The target.
        data: Feeds on which saturating layers are looked for, where the target saturates.
        progress: Told how many feeds are done.

    Raises:
        UnsupportedError: Data is given and the NumPy runtime lacks an operator of the model.
    """
    findings = [*_model_wide(model, profile)]
    groups = integer = 0
    for graph in model.walk():
        for node in graph.nodes:
            findings += _node(graph, node, profile)
            if profile.saturates and node.op_type in _QOPERATORS:
                findings += _saturating(graph, node, node.input[_QOPERATORS[node.op_type]], profile)
            if is_quantize(node) or is_dequantize(node):
                findings += _quantizer(graph, node, profile)
                continue
            group = Group(graph, node)
            found = [*explain(group, profile)]
            findings += found
            if group.activations and (group.quantizers or _is_layer(node, profile)):
                groups += 1
                integer += all(f.severity not in ("float", "fails") for f in found)
    if data is not None and profile.saturates:
        measured = _measured(find_saturation(model, data.feeds, progress=progress), profile)
        findings = [*measured, *(item for item in findings if item.kind != "saturation")]
    return TargetReport(
        target=profile.name,
        notice=profile.notice,
        data=data.source if data is not None else None,
        random=data is not None and data.random,
        groups=groups,
        integer=integer,
        findings=merged(findings),
    )


def _measured(results: Iterable[Saturation], profile: Profile) -> Iterator[Finding]:
    """Yield a finding for each layer that saturates on data, worst first."""
    for item in sorted(results, key=lambda result: -result.rate):
        if not item.clamped:
            continue
        channels = ", ".join(map(str, item.channels[:_SHOWN])) + (
            ", ..." if len(item.channels) > _SHOWN else ""
        )
        yield Finding(
            kind="saturation",
            severity="inaccurate",
            nodes=(item.node,),
            op_type=item.op_type,
            what=f"{item.rate:.2%} of its sums of two products exceed int16 on this data and are clamped on "
            f"{profile.name}: {item.wrong / item.rows:.1%} of its outputs change (channels {channels})",
            remedy="reduce_range=true (7-bit weights), or weights=uint8",
        )


def _is_layer(node: NodeProto, profile: Profile) -> bool:
    rule = profile.operators.get(node.op_type)
    return rule is not None and rule.form == "layer"


def _model_wide(model: Graph, profile: Profile) -> Iterator[Finding]:
    """Yield what is wrong with the opset and the shapes of the inputs."""
    opset, (lowest, highest) = model.opset(), profile.opsets
    if opset and not lowest <= opset <= highest:
        yield Finding(
            kind="opset",
            severity="fails",
            nodes=(),
            op_type="",
            what=f"{profile.name} reads opsets {lowest} to {highest}; the model has opset {opset}",
            remedy=f"convert the model to opset {highest if opset > highest else lowest}",
        )
    if profile.dynamic_shapes:
        return
    for name in model.inputs:
        shape = model.shape_of(name)
        if shape is not None and any(not isinstance(size, int) for size in shape):
            yield Finding(
                kind="dynamic-shape",
                severity="fails",
                nodes=(name,),
                op_type="",
                what=f"{profile.name} needs fixed shapes; an input has open dimensions",
                remedy="fix the sizes of the inputs",
            )


def _node(graph: Graph, node: NodeProto, profile: Profile) -> Iterator[Finding]:
    """Yield what is wrong with the operator itself."""
    name = node.name or next(filter(None, node.output), "")
    domain = domain_of(node.domain)

    def finding(kind: str, severity: Severity, what: str, remedy: str) -> Finding:
        return Finding(
            kind=kind, severity=severity, nodes=(name,), op_type=node.op_type, what=what, remedy=remedy
        )

    called = (domain, node.op_type) in {key[:2] for key in graph.root.functions} if domain else False
    if domain not in profile.domains and not called:
        yield finding(
            "domain",
            "fails",
            f"{profile.name} does not know the operator domain {domain}",
            "write it with ONNX's own operators (format=qdq)",
        )
    elif node.op_type in _CONTROL and not profile.control_flow:
        yield finding(
            "control-flow",
            "fails",
            f"{profile.name} runs no {node.op_type}",
            "inline-constant-if, if it is constant",
        )
    elif node.op_type in profile.refuses or (
        not domain and profile.runs is not None and node.op_type not in profile.runs
    ):
        yield finding(
            "operator",
            "fails",
            f"{profile.name} does not run {node.op_type}; it falls back to another provider or stops",
            "format=qdq"
            if node.op_type in _QOPERATORS or node.op_type.startswith("QLinear")
            else "replace it",
        )
    elif node.op_type in ("QLinearConv", "QLinearMatMul") and len(node.input) > 2:
        kind = graph.constant_type(node.input[2])
        told = TensorProto.DataType.Name(kind[0]).lower() if kind else ""
        if told in profile.slow_activations:
            yield finding(
                "signed",
                "slow",
                f"{node.op_type} with {told} activations is slow on {profile.name}",
                f"activations={profile.activations}, or format=qdq",
            )
    elif node.op_type == "ConvInteger" and profile.dynamic:
        yield finding(
            "dynamic",
            "slow",
            "dynamically quantized convolutions take 2 to 8 times as long as in float",
            "mode=static, or leave it in float",
        )


def _quantizer(graph: Graph, node: NodeProto, profile: Profile) -> Iterator[Finding]:
    """Yield what is wrong with a Q or DQ node itself: its type, zero point and opset."""
    found = parameters(graph, node)
    name = node.name or node.output[0]
    constant = is_dequantize(node) and codes_shape(graph, node.input[0]) is not None
    allowed = {*profile.weight_types, *profile.weight_only_types} if constant else {*profile.activation_types}
    known = (
        {*allowed, "int32"}
        if constant
        else {*allowed, *(t for r in profile.operators.values() for t in r.types)}
    )
    what = "weights" if constant else "activations"

    def finding(kind: str, severity: Severity, what: str, remedy: str) -> Finding:
        return Finding(
            kind=kind, severity=severity, nodes=(name,), op_type=node.op_type, what=what, remedy=remedy
        )

    if found.type_name and found.type_name not in known:
        runs_anyway = profile.is_onnxruntime or profile.name == "cuda"
        if not runs_anyway or constant:
            yield finding(
                "type",
                "slow" if runs_anyway else "fails",
                f"{profile.name} has no {found.type_name} {what}",
                f"{what}={profile.weights if constant else profile.activations}",
            )
        elif profile.name == "cuda":
            yield finding(
                "type",
                "slow",
                "its CUDA provider multiplies no integers: activations are quantized and dequantized in vain",
                "mode=weight-only, or target=tensorrt",
            )
    if profile.rewrites_signed and breaks_loading(graph, node):
        yield finding(
            "signed",
            "fails",
            "onnxruntime 1.31 does not load the model: it rewrites int8 to uint8 here and leaves the type named by "
            "output_dtype as it was (opset 21 and later)",
            f"activations={profile.activations}, or opset 20",
        )
    required = profile.symmetric_weights if constant else profile.symmetric_activations
    if required and found.type_name != "int32" and not found.symmetric:
        yield finding(
            "zero-point",
            "fails",
            f"{profile.name} wants zero points of 0 for {what}",
            "symmetric=true",
        )
    if constant and found.type_name in profile.slow_weights:
        yield finding(
            "unsigned-weights",
            "slow",
            f"{found.type_name} weights are slower than {profile.weights} ones on {profile.name}",
            f"weights={profile.weights}",
        )
    if constant and profile.saturates and found.type_name == "int8":
        yield from _saturating(graph, node, node.input[0], profile)


def _saturating(graph: Graph, node: NodeProto, weight: str, profile: Profile) -> Iterator[Finding]:
    """Yield a finding when two codes of a weight, times 255, can sum beyond int16."""
    codes = graph.constant(weight)
    if codes is None or codes.dtype != np.int8 or codes.ndim < 2 or codes.size < 2:
        return
    largest = np.sort(np.abs(codes.astype(np.int32)).reshape(-1))[-2:]
    if int(largest.sum()) * 255 <= np.iinfo(np.int16).max:
        return
    yield Finding(
        kind="saturation",
        severity="inaccurate",
        nodes=(node.name or node.output[0],),
        op_type=node.op_type,
        what=f"sums of two products can exceed int16 on {profile.name}, where they are clamped",
        remedy="reduce_range=true (7-bit weights) or weights=uint8; see which layers do on your data with --data",
    )
