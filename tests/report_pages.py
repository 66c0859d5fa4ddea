"""Sources for the tests of the report page, with every section filled and with hostile names."""

from gate_reports import HOSTILE, item, report

from onnxslim_lab.bench_report import BenchReport, ModelTimes, OperatorTimes
from onnxslim_lab.quantization.causes import Cause
from onnxslim_lab.quantization.sensitivity import LayerReport, SensitivityReport, Suggestion
from onnxslim_lab.report import (
    ChangeReport,
    Coverage,
    DataReport,
    MetricReport,
    OutputReport,
    RefusalReport,
    Report,
    StepReport,
    Verdict,
)
from onnxslim_lab.report_page import Sources

DATA = DataReport(source="test.npz", random=False, samples=200)
NAMES = ("conv1", "conv2", "conv10", "fc")


def change(where, what="edited", before=1000, after=400, **detail):
    """Return one edit."""
    return ChangeReport(
        where=where,
        what=what,
        bytes_before=before,
        bytes_after=after,
        nonzeros_before=None,
        nonzeros_after=None,
        detail={name.replace("_", " ") if "error" in name else name: v for name, v in detail.items()},
    )


def step(name, before, after, changes=(), refusals=(), status="measured", weights=1.0):
    """Return one step."""
    return StepReport(
        name=name,
        text=f"{name}:seed=1",
        exact=False,
        seconds=0.5,
        bytes_before=before,
        bytes_after=after,
        nodes_before=9,
        nodes_after=12,
        coverage=Coverage(weights=weights, macs=None),
        verdict=Verdict(status=status, reason=""),
        changes=tuple(changes),
        refusals=tuple(RefusalReport(where=w, reason=r) for w, r in refusals),
    )


def run(names=NAMES, source="models/net.onnx"):
    """Return a run of three steps over layers of these names; sizes rise with the position."""
    pruned = [
        change(n, "zeroed most", 1000 * (i + 1), 1000 * (i + 1), sparsity=0.9 - 0.1 * (i % 9))
        for i, n in enumerate(names)
    ]
    shared = [
        change(n, "shared", 1000 * (i + 1), 100 * (i + 1), bits=4, sqnr_db=20.0 + i)
        for i, n in enumerate(names)
    ]
    factored = [change(names[0], "written as two", 9000, 300, rank=7, output_error=0.0123)]
    left = [(n, "too small to pay") for n in names]
    output = OutputReport(
        name=names[0], max_abs=0.5, relative=0.012, sqnr_db=38.25, cosine=0.9991, exact_mismatches=3
    )
    return Report(
        tool_version="1.2.3",
        source=source,
        bytes_before=1_234_567,
        bytes_after=98_765,
        nodes_before=9,
        nodes_after=12,
        seconds=3.5,
        data=DATA,
        steps=(
            step("prune", 1_234_567, 1_234_567, pruned),
            step("share", 1_234_567, 1_240_000, shared),
            step("encode", 1_240_000, 98_000, factored, left, "passed", weights=0.75),
        ),
        final=Verdict(status="measured", reason="", outputs=(output,)),
        engines=Verdict(status="passed", reason="the engines agree"),
        metrics=(
            MetricReport(
                name="top1",
                original=0.98,
                result=0.975,
                difference=-0.005,
                low=-0.012,
                high=0.002,
                method="paired",
                samples=200,
            ),
        ),
        notices=(f"notice about {names[0]}",),
    )


def gate(names=NAMES):
    """Return a gate with one budget that failed, one undecided and one passed for every name."""
    return report(
        *(
            item(
                f"output_error.{name}",
                status,
                "quality",
                f"because of {name}",
                observed=0.02,
                limit=0.01,
                where=(name,),
            )
            for name in names
            for status in ("fail", "undecided", "pass")
        )
    )


def bench(path="small.onnx"):
    """Return times of two models."""

    def times(name, median):
        return ModelTimes(
            path=name,
            file_bytes=1000,
            load_seconds=0.01,
            peak_bytes=None,
            model_bytes=2_500_000,
            median_seconds=median,
            low_seconds=median * 0.9,
            high_seconds=median * 1.3,
            slowest=[],
            seconds=tuple(median * (0.9 + 0.013 * (i * 7 % 31)) for i in range(40)),
        )

    return BenchReport(
        machine="a machine",
        onnxruntime="1.99",
        provider="CPUExecutionProvider",
        threads=1,
        data=DATA,
        pairs=40,
        block=3,
        first=times("net.onnx", 0.002),
        second=times(path, 0.0015),
        ratio=0.75,
        low=0.71,
        high=0.8,
        verdict="faster",
        operators=[OperatorTimes(op_type="Conv", first=0.001, second=0.0005)],
    )


def sensitivity(names=NAMES):
    """Return layers that cost less and less."""
    layers = [
        LayerReport(
            name=name,
            op_type="Conv",
            macs_share=0.25,
            alone_db=20.0 + 3 * i,
            without_db=25.0,
            gain_db=1.0,
            output="logits",
            causes=[
                Cause(kind="coarse-weights", part="weight", share=10 ** -(2 + i), what="rounding"),
                Cause(kind="coarse-codes", part="input", share=10 ** -(3 + i), what="codes"),
            ],
            remedy=f"-p 'quantize:exclude=[{name}]'",
        )
        for i, name in enumerate(names)
    ]
    return SensitivityReport(
        model="main",
        steps=["quantize"],
        data=DATA,
        judged=8,
        all_db=18.0,
        sliced={},
        layers=layers,
        suggestion=Suggestion(layers=[names[0]], macs_share=0.1, sqnr_db=24.5, command="-p quantize"),
    )


def full(names=NAMES, source="models/net.onnx"):
    """Return sources with everything but the comparison and the model's own record."""
    return Sources(run(names, source), None, gate(names), bench(source), sensitivity(names))


# JSON of a report holds no lone surrogates: only the gate's texts let them in, escaped.
NASTY = [name for name in HOSTILE if "\ud800" not in name] + ["<b>bold</b>", "<a href='http://e'>&lt;</a>"]


def hostile():
    """Return sources in which every text that a model sets is hostile."""
    return full(NASTY, HOSTILE[0] + HOSTILE[2])
