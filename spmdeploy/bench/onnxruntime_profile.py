"""Where ONNX Runtime spends an edit, by part of the network."""

from __future__ import annotations

from spmdeploy.backends.base import Session
from spmdeploy.backends.onnxruntime_profile import profiled_nodes
from spmdeploy.bench.backends import graph_of
from spmdeploy.bench.profile import PROFILED_RUNS, Operation, Profile, group_by_layer
from spmdeploy.bench.workloads import EditBatch
from spmdeploy.bundle.bundle import Bundle


def profiled_in_onnxruntime(bundle: Bundle, session: Session, batch: EditBatch) -> Profile:
    """The graph that the session has loaded, opened once more with the profiler switched on."""
    record = graph_of(session, bundle)
    assert record is not None, session.backend
    provider = session.provider.partition(" ")[0]
    nodes = profiled_nodes(bundle.read_graph(record), provider, batch.named, PROFILED_RUNS)
    operations = [
        Operation(
            str(node["name"]).removesuffix("_kernel_time"), str(node["args"]["op_name"]), float(node.get("dur", 0))
        )
        for node in nodes
    ]
    held = [int(node["args"]["mem_bytes_in_use"]) for node in nodes if "mem_bytes_in_use" in node["args"]]
    return Profile(group_by_layer(operations, PROFILED_RUNS), max(held) - min(held) if held else None)
