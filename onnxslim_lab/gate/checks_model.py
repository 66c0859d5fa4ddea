"""Budgets on the file itself: interface, operators, types, target, origin of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import TensorProto, TypeProto

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import UnsupportedError, one_line, quote
from onnxslim_lab.gate.result import BudgetResult, Cause, Status
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.inputs.model_inputs import Shape, tensor_shape
from onnxslim_lab.inspection import constant_names
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.target_check import target_report

_SHOWN = 5  # names in a cause
_SATURATION = 32  # feeds on which saturating layers are looked for, with exact integers: slow


def check_interface(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether inputs and outputs are the baseline's: names, order, types, shapes, and open dimensions."""
    budgets = subject.config.budgets
    sides = (
        ("input", subject.baseline.input_types(), subject.candidate.input_types()),
        ("output", subject.baseline.output_types(), subject.candidate.output_types()),
    )
    if budgets.signature:
        problems = [text for what, old, new in sides for text in _signature(what, old, new)]
        yield _listed("signature", "interface", problems, "names, order, types and shapes are the baseline's")
    if budgets.dynamic_axes:
        problems = [text for what, old, new in sides for text in _open_axes(what, old, new)]
        yield _listed("dynamic_axes", "interface", problems, "open dimensions are the baseline's")


def _signature(what: str, old: dict[str, TypeProto], new: dict[str, TypeProto]) -> Iterator[tuple[str, str]]:
    """Yield (problem, name) for each difference."""
    before, after = list(old), list(new)
    for name in before:
        if name not in new:
            extra = [other for other in after if other not in old]
            became = f" (a new one is {quote(extra[0])})" if extra else ""
            yield f"{what} {quote(name)} is gone{became}", name
    for name in after:
        if name not in old:
            yield f"{what} {quote(name)} is new", name
    if set(before) == set(after) and before != after:
        place = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        yield (
            f"{what}s changed their order: {quote(after[place])} is where {quote(before[place])} was",
            after[place],
        )
    for name in before:
        if name in new and _text(old[name]) != _text(new[name]):
            yield f"{what} {quote(name)} was {_text(old[name])} and is {_text(new[name])}", name


def _text(kind: TypeProto) -> str:
    if kind.WhichOneof("value") != "tensor_type":
        return str(kind.WhichOneof("value") or "unknown").removesuffix("_type")
    name = TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()
    shape = tensor_shape(kind.tensor_type)
    sizes = "of any rank" if shape is None else f"[{', '.join('?' if s is None else str(s) for s in shape)}]"
    return f"{name} {sizes}"


def _open_axes(what: str, old: dict[str, TypeProto], new: dict[str, TypeProto]) -> Iterator[tuple[str, str]]:
    for name, kind in old.items():
        if name not in new:
            yield f"{what} {quote(name)} is gone", name
            continue
        before, after = _open(tensor_shape(kind.tensor_type)), _open(tensor_shape(new[name].tensor_type))
        if before != after:
            yield f"open dimensions of {what} {quote(name)} were {before} and are {after}", name


def _open(shape: Shape | None) -> str:
    if shape is None:
        return "of any rank"
    found = [str(axis) for axis, size in enumerate(shape) if not isinstance(size, int)]
    return f"axes {', '.join(found)}" if found else "none"


def _listed(key: str, kind: Cause, problems: Iterable[tuple[str, str]], good: str) -> BudgetResult:
    """Return a failure that names the first problems, or a pass."""
    found = list(problems)
    if not found:
        return BudgetResult(budget=key, kind=kind, status="pass", cause=good)
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    cause = "; ".join(text for text, _ in found[:_SHOWN]) + more
    where = tuple(name for _, name in found if name)
    return BudgetResult(budget=key, kind=kind, status="fail", cause=cause, where=where)


def check_operators(subject: Subject) -> Iterator[BudgetResult]:
    """Yield verdicts on operators, domains, opset, types of weights, and the target's profile."""
    budgets, candidate = subject.config.budgets, subject.candidate
    functions = {(domain_of(key[0]), key[1]) for key in candidate.functions}
    nodes = [(node, domain_of(node.domain)) for graph in candidate.walk() for node in graph.nodes]
    nodes = [(node, domain) for node, domain in nodes if (domain, node.op_type) not in functions]
    if budgets.operators is not None:
        allowed = set(budgets.operators)
        odd = [
            (f"operator {one_line(name)} of node {quote(node.name)} is not allowed", node.name)
            for node, domain in nodes
            if (name := f"{domain}.{node.op_type}" if domain else node.op_type) not in allowed
            and f"ai.onnx.{node.op_type}" not in (allowed if not domain else ())
        ]
        yield _listed("operators", "target", odd, "all operators are allowed")
    if budgets.domains is not None:
        allowed = {"", *map(domain_of, budgets.domains)}
        odd = [
            (f"node {quote(node.name)} is of the domain {quote(domain)}", node.name)
            for node, domain in nodes
            if domain not in allowed
        ]
        yield _listed("domains", "target", odd, "all operator domains are allowed")
    if budgets.opset is not None:
        opset = candidate.opset()
        least, most = budgets.opset.least or 0, budgets.opset.most or opset
        good = not opset or least <= opset <= most
        status: Status = "pass" if good else "fail"
        cause = f"opset {opset}; allowed are {least or 'any'} to {budgets.opset.most or 'any'}"
        yield BudgetResult(budget="opset", kind="target", status=status, cause=cause, observed=opset)
    if budgets.dtypes is not None:
        yield _listed("dtypes", "target", _odd_types(candidate, budgets.dtypes), "all types are allowed")
    if budgets.target is not None:
        yield _target(subject, budgets.target)


def _odd_types(candidate: Graph, allowed: Iterable[str]) -> Iterator[tuple[str, str]]:
    known = {name.lower() for name in allowed}
    known |= {"float"} if "float32" in known else set()
    for graph in candidate.walk():
        for name in constant_names(graph):
            kind = TensorProto.DataType.Name((graph.constant_type(name) or (0,))[0]).lower()
            shape = (graph.constant_type(name) or (0, (), 0))[1]
            if kind not in known and len(shape) > 1:  # scales, shapes and bounds are no weights
                yield f"weight {quote(name)} is {kind}", name


def _target(subject: Subject, name: str) -> BudgetResult:
    profile = find_profile(name)
    data = None
    if not subject.data.random and not subject.problem:
        data = Dataset(subject.feeds[:_SATURATION], None, subject.data.source)
    try:
        report = target_report(subject.candidate, profile, data, progress=subject.progress)
    except UnsupportedError:  # the NumPy runtime lacks an operator: saturation is not measured
        report = target_report(subject.candidate, profile, progress=subject.progress)
    grave = [item for item in report.findings if item.severity in ("fails", "inaccurate")]
    if (
        data is None or report.data is None
    ):  # without data every int8 weight might saturate: that is no verdict
        maybe = [item for item in grave if item.kind == "saturation"]
        grave = [item for item in grave if item.kind != "saturation"]
        if maybe and not grave:
            cause = f"{maybe[0].what}: real data would tell whether they do"
            return BudgetResult(budget="target", kind="target", status="undecided", cause=cause)
    problems = [
        (
            f"{item.severity}: {', '.join(map(quote, item.nodes[:3]))} {item.op_type}: {item.what}",
            item.nodes[0],
        )
        if item.nodes
        else (f"{item.severity}: {item.what}", "")
        for item in grave
    ]
    return _listed("target", "target", problems, f"{profile.name} runs it")


def check_data(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether the data is real."""
    if subject.config.budgets.real_data:
        bad = subject.data.random
        cause = "outputs were computed on random data: give --data" if bad else f"data: {subject.data.source}"
        status: Status = "fail" if bad else "pass"
        yield BudgetResult(
            budget="real_data", kind="origin", status=status, cause=cause, samples=len(subject.feeds)
        )
