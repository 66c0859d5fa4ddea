"""`inspect`: what is in a model."""

from __future__ import annotations

from onnxslim_lab.commands.shared import Json, Model, out, print_json, progress


def inspect(model: Model, as_json: Json = False) -> None:
    """Show what is in a model: operators, parameters, multiply-accumulates, bytes, dynamic axes, warnings."""
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inspection import inspect as inspect_graph  # noqa: PLC0415

    with progress(as_json) as show:
        found = inspect_graph(Graph.load(model), show)
    if as_json:
        print_json(found.model_dump_json(indent=2))
    else:
        out.print(found.table())
