"""Profiles a graph with the profiler of ONNX Runtime: the time of every node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from spmdeploy.backends.onnxruntime_graph import Graph, import_onnxruntime, inference_session


def profiled_nodes(graph: Graph, provider: str, feed: Mapping[str, NDArray[Any]], runs: int) -> list[dict[str, Any]]:
    """The profiler's events for every node, in the order of execution.

    Args:
        graph: Path of an ONNX file, or its content.
        provider: ONNX Runtime's name of the execution provider.
        feed: Inputs of the graph by name.
        runs: Runs to profile, after one that is left out.

    Returns:
        Events with a name, `dur` in microseconds and `args`, among them op_name and, from ONNX Runtime 1.23 on,
        mem_bytes_in_use.
    """
    library = import_onnxruntime()
    with TemporaryDirectory() as folder:
        options = library.SessionOptions()
        options.enable_profiling = True
        options.log_severity_level = 3
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = inference_session(library, graph, options, [provider])
        for _ in range(runs + 1):
            session.run(["edited"], dict(feed))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    nodes = [event for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]
    nodes.sort(key=lambda event: float(event["ts"]))
    return nodes[len(nodes) // (runs + 1) :]
