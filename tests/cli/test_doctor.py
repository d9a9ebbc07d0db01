"""The command `doctor`."""

from __future__ import annotations

from typing import Any


def test_doctor_lists_onnxruntime_on_cpu_as_usable(run: Any) -> None:
    result = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in result.json["findings"]}
    assert result.code == 0 and findings["onnxruntime on cpu"]["usable"]
    assert "onnxruntime on cpu   usable" in run("doctor").out
