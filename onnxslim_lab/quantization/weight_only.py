"""Weight-only quantization: weights in few bits, activations in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxslim_lab.base import Change, Context, Outcome
from onnxslim_lab.encodings.stems import free_stems
from onnxslim_lab.errors import ModelError, ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.quantization import microsoft
from onnxslim_lab.quantization.quantized_weight import QuantizedWeight
from onnxslim_lab.quantization.weight_decoders import can_decode, decoder, narrowed, write_decoded
from onnxslim_lab.quantization.weight_forms import write_dequantized, write_fused, write_looked_up
from onnxslim_lab.quantization.weight_jobs import Job, WeightOnlyStep, make_job, select, weight_type
from onnxslim_lab.quantization.weight_metric import table_metric
from onnxslim_lab.quantization.weight_rounding import Scheme, needs_gram, rounded, shared_values, value_error
from onnxslim_lab.statistics import Gram, gram_source

_STEM = "q"  # of the names of what decodes a weight
_NARROW = 8  # bits of codes whose scales need no more than float16
_NODES_BYTES = 200  # of the nodes and names of a form, about
_NOT_FINITE = "the weight has NaN or infinite values: they have no code"
_OVERFLOW = "rounded to nearest: the squares of its inputs overflow"
_WRITERS = {
    "fused": write_fused,
    "looked up": write_looked_up,
    "dequantized": write_dequantized,
    "GatherBlockQuantized": microsoft.write_gather,
}


def apply_weight_only(model: Graph, step: WeightOnlyStep, context: Context) -> Outcome:
    """Quantize the selected weights of a whole model in place.

    Each stored weight is quantized once, however many layers use it, and written in the form that costs
    least to run (see weight_forms and weight_decoders). Two phases: all weights are rounded, with the
    activations of the model as it is, and then written.

    Args:
        model: The main graph; bodies and functions are walked.
        step: The quantize pass.
        context: Its calibration is needed for rounding "gptq" and "adaround".

    Raises:
        ParameterError: A pattern or operator that matches nothing; rounding that needs data without any; a
            type that weights cannot have.
    """
    check_data(step, context)
    profile = find_profile(step.target)
    kind = weight_type(step, profile)
    outcome = Outcome()
    targets = select(model, step, outcome)
    jobs = [make_job(target, step, kind, profile) for target in targets]
    if step.rounding != "codebook" and _raise_opset(model, jobs, context, outcome):
        targets = select(model, step, Outcome())  # the nodes are others now
        jobs = [make_job(target, step, kind, profile) for target in targets]
    if step.rounding == "codebook":
        _share(model, jobs, context, outcome)
        return outcome
    symmetric = step.symmetric if step.symmetric is not None else kind.signed
    quantize_jobs(model, jobs, Scheme(step.rounding, symmetric=symmetric), context, outcome)
    return outcome


def check_data(step: WeightOnlyStep, context: Context) -> None:
    """Raise ParameterError when the rounding needs calibration data and there is none."""
    if needs_gram(step.rounding) and context.calibration is None:
        raise ParameterError(
            f"{step.pass_name()}: rounding={step.rounding} needs calibration data: give data, or take rounding=nearest"
        )


def quantize_jobs(
    model: Graph,
    jobs: Sequence[Job],
    scheme: Scheme,
    context: Context,
    outcome: Outcome,
    dynamic: Callable[[QuantizedWeight], str] | None = None,
) -> None:
    """Round all weights, with the activations of the model as it is, then write them.

    Args:
        model: The main graph.
        jobs: What to quantize.
        scheme: How to round.
        context: Of the pass.
        outcome: Receives a change or a refusal for every job.
        dynamic: Writes a job of the form "dynamic" and returns what it did.
    """
    weights = list(_round(model, list(_affordable(jobs, outcome)), scheme, context, outcome))
    for stem, (job, weight) in zip(free_stems(model, _STEM), weights, strict=False):
        outcome.changes.append(_write(job, weight, stem, dynamic))


def _raise_opset(model: Graph, jobs: Sequence[Job], context: Context, outcome: Outcome) -> bool:
    """Raise the opset to what the forms need, if permitted; say so, or what is lost. Return whether it was."""
    low = [job for job in jobs if job.opset > job.target.layer.graph.opset()]
    if not low:
        return False
    needed, before = max(job.opset for job in low), model.opset()
    if not context.allow_opset_raise:
        outcome.refuse(
            model.name,
            f"the opset stays at {before}: {len(low)} weights are decoded at load instead, which takes as much "
            f"memory and time as float ones; DequantizeLinear of {low[0].kind} needs opset {needed}: allow raising it",
        )
        return False
    try:
        raise_opset(model, needed)
    except ModelError as error:
        outcome.refuse(
            model.name, f"the opset stays at {before}, {len(low)} weights are decoded at load: {error}"
        )
        return False
    outcome.change(model.name, f"raised the opset from {before} to {needed} for {low[0].kind} weights")
    return True


def _affordable(jobs: Sequence[Job], outcome: Outcome) -> Iterator[Job]:
    """Yield the jobs that make their weight smaller; an opset that is too low makes them decoders."""
    for job in jobs:
        target, graph = job.target, job.target.layer.graph
        before = (graph.constant_type(target.weight) or (0, (), 0))[2]
        scales = job.layout.shape[0] * job.layout.shape[2] * job.blocks if job.block else 1
        after = -(-target.size * job.kind.bits // 8) + scales * min(4, before // target.size)
        if after + _NODES_BYTES >= before:
            outcome.refuse(
                target.where,
                f"{job.kind} would not be smaller: {after} bytes with {scales} scales and about {_NODES_BYTES} of "
                f"nodes, the weight takes {before}",
            )
            continue
        if job.opset > graph.opset():
            job = Job(target, job.layout, job.kind, job.block, "decoded")  # noqa: PLW2901
        yield job


def _round(
    model: Graph, jobs: Sequence[Job], scheme: Scheme, context: Context, outcome: Outcome
) -> Iterator[tuple[Job, QuantizedWeight]]:
    """Yield each weight in codes; those that cannot be are refused."""
    for number, (job, found) in enumerate(_with_grams(model, jobs, scheme.rounding, context)):
        context.progress(number, len(jobs), f"round {job.target.where}")
        values = job.target.read()
        if not np.isfinite(values).all():
            outcome.refuse(job.target.where, _NOT_FINITE)
            continue
        gram, metric = found, None
        if found is not None and not np.isfinite(found.matrix).all():
            outcome.refuse(job.target.where, _OVERFLOW)
            gram = None
        if needs_gram(scheme.rounding) and found is None and job.block:
            metric = table_metric(model, job.target.layers, context)
        weight = rounded(values, job.target.layers, job.layout, job.kind, job.block, scheme, gram, metric)
        if job.form in ("decoded", "looked up") and job.kind.bits <= _NARROW:
            weight = narrowed(weight)
        if job.form == "decoded" and not can_decode(weight):
            opset = weight.graph.opset()
            outcome.refuse(
                job.target.where, f"{job.kind} cannot be decoded at opset {opset}: allow raising it"
            )
            continue
        yield job, weight


def _with_grams(
    model: Graph, jobs: Sequence[Job], rounding: str, context: Context
) -> Iterator[tuple[Job, Gram | None]]:
    """Yield every job with the Gram matrix of its layer, None where there is none or none is asked for."""
    sources: dict[int, Layer] = {}
    if rounding != "nearest" and context.calibration is not None:
        sources = {n: job.layout.source for n, job in enumerate(jobs) if job.layout.source is not None}
        sources = {n: layer for n, layer in sources.items() if gram_source(layer)}
    found: Iterator[tuple[Layer, Gram]] = iter(())
    if sources and context.calibration is not None:
        found = context.calibration.grams(model, list(sources.values()))
    for number, job in enumerate(jobs):
        yield job, next(found)[1] if number in sources else None


def _share(model: Graph, jobs: Sequence[Job], context: Context, outcome: Outcome) -> None:
    """Give each weight at most 2**bits values; storing indices and codebook is left to `encode`."""
    found = []
    for number, (job, gram) in enumerate(_with_grams(model, jobs, "codebook", context)):
        context.progress(number, len(jobs), f"share values of {job.target.where}")
        values = job.target.read()
        after = -(-values.size * job.kind.bits // 8) + (values.itemsize << job.kind.bits) + _NODES_BYTES
        if not np.isfinite(values).all():
            outcome.refuse(job.target.where, _NOT_FINITE)
        elif job.kind.bits > 8:
            outcome.refuse(
                job.target.where, f"a codebook of {job.kind.bits} bits; choose a type of at most 8"
            )
        elif after >= values.nbytes:
            outcome.refuse(
                job.target.where, f"codebook and indices would take {after} bytes, it takes {values.nbytes}"
            )
        else:
            found.append((job, values, shared_values(values, job.layout, job.kind.bits, gram)))
    if found:
        outcome.notices.append("codebooks become smaller when stored: let `encode` follow")
    for job, values, shared in found:
        job.target.write(shared)
        error = np.sum((shared.astype(np.float64) - values) ** 2)
        sqnr = _decibels(float(np.sum(values.astype(np.float64) ** 2)), float(error))
        outcome.changes.append(
            Change(
                job.target.where,
                f"rounded to a codebook of {2**job.kind.bits} values; `encode` stores it in {job.kind.bits} bits",
                weights=(job.target.weight,),
                bytes_before=values.nbytes,
                bytes_after=values.nbytes,
                detail={"bits": job.kind.bits, "sqnr_db": sqnr},
            )
        )


def _write(
    job: Job, weight: QuantizedWeight, stem: str, dynamic: Callable[[QuantizedWeight], str] | None
) -> Change:
    """Write one weight in its form; return what changed."""
    target = job.target
    before = (weight.graph.constant_type(target.weight) or (0, (), 0))[2]
    error = value_error(target.read(), weight)
    after, how = weight.payload() + _NODES_BYTES, _HOW.get(job.form, "")
    if job.form == "dynamic" and dynamic is not None:
        how = dynamic(weight)
    elif job.form == "decoded":
        after = decoder(weight, stem).size()
        write_decoded(weight, stem)
    elif job.form == "MatMulNBits":
        after = microsoft.product_bytes(weight) + _NODES_BYTES
        microsoft.write_matmul(weight, microsoft.INT8_ACTIVATIONS)
    else:
        _WRITERS[job.form](weight)
    per = "one scale" if not job.block else "a scale per channel"
    if job.blocks > 1:
        per = f"blocks of {job.block}"
    return Change(
        target.where,
        f"quantized to {job.kind}, {per}, {how}",
        weights=(target.weight,),
        bytes_before=before,
        bytes_after=after,
        detail={"bits": job.kind.bits, "block": job.block, "form": job.form, "sqnr_db": _decibels(*error)},
    )


def _decibels(signal: float, noise: float) -> float:
    """Return the signal-to-noise ratio in dB, at most 300."""
    return round(10 * math.log10(max(signal, 1e-30) / max(noise, signal * 1e-30, 1e-60)), 2)


_HOW = {
    "fused": "DequantizeLinear that fuses with the layer",
    "looked up": "codes looked up, then dequantized",
    "dequantized": "DequantizeLinear; onnxruntime's CPU provider runs it at every inference",
    "decoded": "decoded once at load",
    "MatMulNBits": "MatMulNBits",
    "GatherBlockQuantized": "GatherBlockQuantized",
}
