"""Selects the backend for a CPU: bf16 in OpenVINO where it is faster and its golden edits pass, else ONNX Runtime.

The choice depends on the processor, the installed packages and the bundle alone, so that runs on one machine choose
alike; nothing is timed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from spmdeploy.backends.base import OpenedBackend
from spmdeploy.backends.graph_cache import cache_key, open_cached
from spmdeploy.backends.openvino import OpenVinoSession, bf16_support, open_openvino
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import SpmDeployError

_PROOF = "golden.json"


def open_proved_bf16(bundle: Bundle, on_loading: Callable[[], None] = lambda: None) -> tuple[OpenedBackend | None, str]:
    """Open OpenVINO in bf16 if the golden edits then stay within the limits.

    They are repeated once for a bundle, processor and version of OpenVINO; the result is kept in the graph cache.

    Returns:
        The session, or None; and why.
    """
    feature, problem = bf16_support()
    if problem:
        return None, problem
    try:
        opened = open_openvino(bundle, "cpu", "bf16", on_loading)
        session = opened.session
        assert isinstance(session, OpenVinoSession)
        problems, largest = _golden_result(session, bundle)
    except SpmDeployError as exc:
        return None, exc.problem
    if problems:
        session.close()
        return None, f"golden edits differ: {problems}"
    proof = f"golden edits differ by at most {largest} gray levels"
    return opened, f"faster by {feature}; {session.read_back}; {proof}"


def _golden_result(session: OpenVinoSession, bundle: Bundle) -> tuple[str, int]:
    """What is wrong with the golden edits, and their largest difference; from the cache where it is known."""

    def measure(folder: Path | None = None) -> tuple[str, int]:
        from spmdeploy.backends.verify import verify  # a known result needs no images

        results = verify(session, bundle)
        problems = "; ".join(f"{result.name}: {problem}" for result in results for problem in result.problems)
        largest = max(result.deviation.max_grey for result in results)
        if folder is not None:
            (folder / _PROOF).write_text(json.dumps({"problems": problems, "max_grey": largest}), encoding="utf-8")
        return problems, largest

    def read(folder: Path) -> tuple[str, int]:
        known = json.loads((folder / _PROOF).read_text(encoding="utf-8"))
        return str(known["problems"]), int(known["max_grey"])

    sums = hashlib.sha256(bundle.sums).hexdigest()
    return open_cached(cache_key("golden edits", session.provider, session.precision, sums), read, measure, measure)
