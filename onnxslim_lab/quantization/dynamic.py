"""Dynamic quantization: weights in 8 bits, activations quantized by their own range while the model runs.

    before  MatMul(x, w)
    after   xq, xs, xz = DynamicQuantizeLinear(x)
            Mul(Cast(MatMulInteger(xq, wq, xz)), Mul(xs, ws))

onnxruntime fuses these into DynamicQuantizeMatMul, or MatMulIntegerToFloat where several layers share xq;
format "microsoft" writes these operators. Weights of other layers are stored in 8 bits and computed with
in float. ONNX operators DynamicQuantizeLinear (opset 11), MatMulInteger and ConvInteger (opset 10).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.errors import ModelError, ParameterError
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.layers import Layer
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.quantization.microsoft import DOMAIN, import_domain
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight
from onnxslim_lab.quantization.types import find_type
from onnxslim_lab.quantization.weight_jobs import Job, WeightOnlyStep, make_job, select
from onnxslim_lab.quantization.weight_only import check_data, quantize_jobs
from onnxslim_lab.quantization.weight_rounding import Scheme
from onnxslim_lab.rewriting.removal import release

FIRST_OPSET = 11  # of DynamicQuantizeLinear
_SLOW_CONV = (
    "a convolution with dynamically quantized input is 2 to 8 times slower than in float: only its weights are "
    "quantized; name Conv in op_types to have it all the same, or use mode=static"
)


def apply_dynamic(model: Graph, step: WeightOnlyStep, context: Context) -> Outcome:
    """Let MatMul and Gemm quantize their inputs as they run; store the other layers' weights in 8 bits.

    Args:
        model: The main graph; bodies and functions are walked.
        step: The quantize pass; its granularity "block" counts as "channel".
        context: Its calibration is needed for rounding "gptq" and "adaround".

    Raises:
        ParameterError: A pattern or operator that matches nothing; a weight type that is not int8 or uint8;
            rounding "codebook", or one that needs data without any.
    """
    check_data(step, context)
    if step.rounding == "codebook":
        raise ParameterError(
            f"{step.pass_name()}: rounding=codebook is for mode=weight-only: products need codes"
        )
    profile = find_profile(step.target)
    kind = find_type("int8" if step.weights == "auto" else step.weights)
    if kind.name not in ("int8", "uint8"):
        raise ParameterError(
            f"{step.pass_name()}: weights={kind} is not possible with mode=dynamic; choose int8 or uint8"
        )
    outcome = Outcome()
    possible = select(model, step, Outcome())
    if any(layer.op_type in ("MatMul", "Gemm") for target in possible for layer in target.layers):
        _raise_opset(model, context, outcome)
    symmetric = step.symmetric if step.symmetric is not None else kind.signed
    jobs = []
    for target in select(model, step, outcome):
        job = make_job(target, step, kind, profile)
        if step.granularity == "block":
            job = replace(job, block=job.layout.shape[1])
        reasons = {_reason(layer, step, symmetric=symmetric) for layer in target.layers}
        if reasons == {""}:
            job = replace(job, form="dynamic")
        else:
            outcome.refuse(target.where, max(reasons))
        jobs.append(job)
    scheme = Scheme(step.rounding, symmetric=symmetric, reduce_range=profile.reduce_range)
    writer = _Writer(jobs, microsoft=step.format == "microsoft")
    quantize_jobs(model, jobs, scheme, context, outcome, writer.write)
    return outcome


def _reason(layer: Layer, step: WeightOnlyStep, *, symmetric: bool) -> str:
    """Return why a layer cannot have a dynamically quantized input, "" when it can."""
    if layer.stored.used_type != TensorProto.FLOAT:
        return "only its weights are quantized: DynamicQuantizeLinear takes float32 alone"
    if layer.graph.opset() < FIRST_OPSET:
        return f"only its weights are quantized: DynamicQuantizeLinear needs opset {FIRST_OPSET}: allow raising it"
    if layer.op_type == "Conv":
        if "Conv" not in step.op_types:
            return _SLOW_CONV
        return (
            ""
            if symmetric
            else "only its weights are quantized: ConvInteger takes one zero point; use symmetric"
        )
    plain = layer.slot == 1 and len(layer.kind.weight_shape) == 2 and not attribute(layer.node, "transA", 0)
    if layer.op_type in ("MatMul", "Gemm") and plain:
        return ""
    return f"only its weights are quantized: there is no integer product for this {layer.op_type}"


def _raise_opset(model: Graph, context: Context, outcome: Outcome) -> None:
    before = model.opset()
    if before >= FIRST_OPSET or not context.allow_opset_raise:
        return
    try:
        raise_opset(model, FIRST_OPSET)
    except ModelError as error:
        outcome.refuse(model.name, f"the opset stays at {before}: {error}")
    else:
        outcome.change(
            model.name, f"raised the opset from {before} to {FIRST_OPSET} for DynamicQuantizeLinear"
        )


@dataclass
class _Writer:
    """Writes layers one after the other; those that read the same value share its DynamicQuantizeLinear."""

    jobs: Sequence[Job]
    microsoft: bool
    quantized: dict[tuple[int, str], NodeProto] = field(default_factory=dict)
    readers: Counter[tuple[int, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for job in self.jobs:
            if job.form == "dynamic":
                self.readers.update((id(layer.graph), layer.node.input[0]) for layer in job.target.layers)

    def write(self, weight: QuantizedWeight) -> str:
        """Replace the layers that use the weight; return what was done."""
        graph, convolution = weight.graph, weight.layer.op_type == "Conv"
        scale, zero = (x.reshape(-1) for x in (weight.scales, weight.zero_points))
        if weight.per_tensor:
            scale, zero = weight.grid.scale, weight.grid.zero_point
        shape = weight.layer.kind.weight_shape
        codes = weight.codes.reshape(shape) if convolution else _by_column(weight)
        names = [graph.fresh_name(f"{weight.name}_{word}") for word in ("quantized", "zero_point")]
        graph.set_constant(names[0], codes, weight.kind.data_type)
        if weight.needs_zero_point:
            graph.set_constant(names[1], zero.reshape(-1)[0] if convolution else zero, weight.kind.data_type)
        else:
            names[1] = ""
        scales: dict[float, str] = {}
        for layer in weight.layers:
            alpha = float(attribute(layer.node, "alpha", 1.0)) if layer.op_type == "Gemm" else 1.0
            if alpha not in scales:
                scales[alpha] = graph.fresh_name(f"{weight.name}_scale")
                value = (scale * np.float32(alpha)).astype(np.float32)
                spatial = (-1, *(1,) * (len(shape) - 2)) if convolution and value.ndim else value.shape
                graph.set_constant(scales[alpha], value.reshape(spatial))
            self._replace(layer, names[0], scales[alpha], names[1])
        release(graph, [weight.name])
        return "input quantized as it runs"

    def _replace(self, layer: Layer, codes: str, scale: str, zero: str) -> None:
        """Replace one layer."""
        graph, node = layer.graph, layer.node
        x, read, outputs, label = node.input[0], node.input[1], list(node.output), node.name or node.output[0]
        bias = self._bias(layer, label)
        channels = layer.shape[1]
        conv = [item for item in node.attribute if layer.op_type == "Conv"]
        if self.microsoft and not conv:
            alone = self.readers[id(graph), x] == 1
            inside = bias if bias and graph.shape_of(bias) == (channels,) else ""
            graph.remove(node)
            if alone:
                inputs = [x, codes, scale, zero, inside]
            else:
                xq, xs, xz = self._quantized(graph, x).output
                inputs = [xq, codes, xs, scale, xz, zero, inside]
            while not inputs[-1]:
                inputs.pop()
            op_type = "DynamicQuantizeMatMul" if alone else "MatMulIntegerToFloat"
            made = graph.emit(op_type, inputs, outputs if inside == bias else 1, name=label, domain=DOMAIN)
            if inside != bias:
                graph.emit("Add", [made.output[0], bias], outputs, name=f"{label}_bias")
            import_domain(graph)
        else:
            xq, xs, xz = self._quantized(graph, x).output
            inputs = [xq, codes, xz, zero] if zero else [xq, codes, xz]
            is_conv = layer.op_type == "Conv"
            given = {item.name: attribute(node, item.name) for item in conv}
            graph.remove(node)
            product = graph.emit("ConvInteger" if is_conv else "MatMulInteger", inputs, name=label, **given)
            real = graph.emit("Cast", [product.output[0]], name=f"{label}_real", to=TensorProto.FLOAT)
            both = graph.emit("Mul", [xs, scale], name=f"{label}_scales")
            last = outputs if not bias else 1
            scaled = graph.emit("Mul", [real.output[0], both.output[0]], last, name=f"{label}_scaled")
            if bias:
                graph.emit("Add", [scaled.output[0], bias], outputs, name=f"{label}_bias")
        release(graph, [read])

    def _quantized(self, graph: Graph, value: str) -> NodeProto:
        """Return the DynamicQuantizeLinear of a value, one for all that read it in a graph."""
        key = id(graph), value
        if key not in self.quantized:
            self.quantized[key] = graph.emit("DynamicQuantizeLinear", [value], 3, name=f"{value}_quantize")
        return self.quantized[key]

    def _bias(self, layer: Layer, label: str) -> str:
        """Return the name of what the layer adds, as it is to be added: beta * C, or the bias by channel."""
        graph, name = layer.graph, layer.bias
        if not name:
            return ""
        if layer.op_type == "Conv":
            shape = graph.fresh_name(f"{label}_bias_shape")
            rank = len(layer.kind.weight_shape) - 2
            graph.set_constant(shape, np.array([-1, *(1,) * rank], np.int64))
            return str(graph.emit("Reshape", [name, shape], name=f"{label}_bias").output[0])
        beta = float(attribute(layer.node, "beta", 1.0))
        if beta == 1.0:
            return name
        factor = graph.fresh_name(f"{label}_beta")
        graph.set_constant(factor, np.array(beta, np.float32))
        return str(graph.emit("Mul", [name, factor], name=f"{label}_bias").output[0])


def _by_column(weight: QuantizedWeight) -> Array:
    """Return the codes as (in, out)."""
    one = weight.layout.shape[0] == 1
    return np.ascontiguousarray(weight.codes[0] if one else weight.codes[:, :, 0].T)
