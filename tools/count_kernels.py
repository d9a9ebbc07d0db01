"""Counts kernels, convolutions, cross-stream waits and signals of engines, from TensorRT-RTX's own list of layers.

Builds on the CPU, for batches of one. No GPU is needed.

    python tools/count_kernels.py [BUNDLE] [--graph edit --graph picture] [--precision fp16] [--target sm89]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import spmdeploy  # noqa: E402
from spmdeploy.bundle.bundle import open_bundle  # noqa: E402
from spmdeploy.engines.builder import BuildLog, BuildRequest, build_engine  # noqa: E402
from spmdeploy.engines.library import import_engine_library  # noqa: E402
from spmdeploy.engines.progress import BuildMonitor  # noqa: E402
from spmdeploy.engines.record import BatchRange  # noqa: E402

_LAYER = re.compile(r"^Name: .*?, LayerType: (\w+), ", re.MULTILINE)
_SYNCHRONIZATION = ("wait", "signal")
_CONVOLUTIONS = ("correlation", "runtime_fusion")
"""Convolutions alone, and fused with what follows them."""


def count_layers(text: str) -> dict[str, int]:
    """Counts of a list of layers, as the builder logs it.

    Returns:
        kernels (everything but waits and signals), convolutions (among them those fused with what follows them), waits
        and signals between streams.
    """
    kinds = Counter(_LAYER.findall(text))
    return {
        "kernels": sum(count for kind, count in kinds.items() if kind not in _SYNCHRONIZATION),
        "convolutions": sum(kinds[kind] for kind in _CONVOLUTIONS),
        "fused convolutions": kinds[_CONVOLUTIONS[1]],
        "waits": kinds["wait"],
        "signals": kinds["signal"],
    }


class _Messages(BuildLog):
    """Keeps the messages that hold layers, which are verbose and not written to files."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), Path(os.devnull))
        self.layers: list[str] = []

    def __call__(self, severity: str, text: str) -> None:
        super().__call__(severity, text)
        if "LayerType: " in text:
            self.layers.append(text)


def count_graph(graph: Path, target: str) -> dict[str, int]:
    """Builds an ONNX graph for one compute capability, as sm89, and counts."""
    messages = _Messages()
    request = BuildRequest(graph, (BatchRange(1, 1, 1),), (target,))
    build_engine(import_engine_library("tensorrt-rtx"), request, messages, BuildMonitor(lambda status, seconds: None))
    return count_layers("\n".join(messages.layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=spmdeploy.default_model(), help="A bundle folder.")
    parser.add_argument("--graph", action="append", help="May be repeated. Default: edit and picture.")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--target", default="sm89", help="Compute capability.")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    for name in options.graph or ("edit", "picture"):
        path = bundle.path_of_graph(bundle.graph(name, options.precision))
        print(json.dumps({"graph": name, "precision": options.precision, **count_graph(path, options.target)}))


if __name__ == "__main__":
    main()
