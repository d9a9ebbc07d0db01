"""The plugin provider of ONNX Runtime: what it is asked, and what is said where it cannot be used.

The CPU provider, which ONNX Runtime lists as a device too, stands in for the plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends import onnxruntime_rtx as rtx
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import ParityLimits, read_golden
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import BundleError, UnavailableError, UsageError, VerificationError

pytestmark = pytest.mark.skipif(
    not hasattr(onnxruntime, "register_execution_provider_library"), reason="ONNX Runtime before 1.24"
)


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    rtx._devices.cache_clear()
    yield
    rtx._devices.cache_clear()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with a GPU and the package, whose provider is that of the CPU. What it was asked."""
    asked: list[Any] = []
    module = ModuleType(rtx.MODULE)
    module.__spec__ = ModuleSpec(rtx.MODULE, None)
    module.get_ep_name = lambda: "CPUExecutionProvider"  # type: ignore[attr-defined]
    module.get_library_path = lambda: "/there/libplugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, rtx.MODULE, module)
    monkeypatch.setattr(rtx, "visible_gpus", lambda: 1)
    monkeypatch.setattr(rtx, "_ENTRIES", {})  # the CPU provider may not exclude the CPU
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *arguments: asked.append(arguments))
    return asked


def test_open_edits_and_refines_as_onnxruntime_does(street_bundle: Path, plugin: list[Any]) -> None:
    bundle = open_bundle(street_bundle)
    opened = open_backend(bundle, rtx.NAME, "cuda:0")
    session = opened.session
    assert plugin == [("CPUExecutionProvider", "/there/libplugin.so")]
    assert (session.backend, session.device, session.precision) == (rtx.NAME, "cuda:0", "fp16")
    assert opened.choices == (f"backend {rtx.NAME}: as asked; its golden edits passed just now",)
    golden = read_golden(bundle, bundle.manifest.golden[0])
    plain = open_backend(bundle, "onnxruntime", "cpu", "fp16").session
    assert np.array_equal(session.run(golden.inputs), plain.run(golden.inputs))
    assert session.refines and isinstance(session, OnnxRuntimeSession)
    refined = session.refine(golden.inputs, golden.coarse)
    assert np.array_equal(refined, plain.refine(golden.inputs, golden.coarse))
    assert rtx.check_onnxruntime_rtx().usable and len(plugin) == 1  # registered once in a process


def test_open_with_wrong_results_is_refused(
    street_bundle: Path, plugin: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = ParityLimits(max_grey=-1, mean_grey=-1, min_psnr_db=999)
    monkeypatch.setattr("spmdeploy.backends.verify.limits_of", lambda bundle, precision: impossible)
    with pytest.raises(VerificationError, match="onnxruntime-rtx gives wrong results"):
        open_backend(open_bundle(street_bundle), rtx.NAME)


def test_open_of_another_gpu_is_refused(street_bundle: Path, plugin: list[Any]) -> None:
    with pytest.raises(UnavailableError, match=r"has no cuda:3, but cuda:0"):
        open_backend(open_bundle(street_bundle), rtx.NAME, "cuda:3")


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"precision": "fp32"}])
def test_open_on_the_cpu_or_in_fp32_is_refused(options: dict[str, str], street_bundle: Path, plugin: list[Any]) -> None:
    with pytest.raises(UsageError):
        open_backend(open_bundle(street_bundle), rtx.NAME, **options)


def test_open_without_the_graph_names_the_command(street_bundle: Path, plugin: list[Any], tmp_path: Path) -> None:
    slim = tmp_path / "slim.spm"
    assert cli.main(["bundle", "slim", str(street_bundle), str(slim), "--keep", "fp32"]) == 0
    with pytest.raises(BundleError, match="no graph 'edit' in fp16") as caught:
        open_backend(open_bundle(slim), rtx.NAME)
    assert f"add it: spmdeploy export {slim} --output NEW.spm" in str(caught.value.hint)


def no_driver() -> int:
    raise OSError("no NVIDIA driver (libcuda.so.1: cannot open shared object file)")


def does_not_load(*_: Any) -> None:
    raise RuntimeError("Failed to load library with error: libnvidia-ml.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("target", "replacement", "problem"),
    [
        (rtx, {"visible_gpus": no_driver}, r"needs an NVIDIA GPU: no NVIDIA driver \(libcuda"),
        (onnxruntime, {"register_execution_provider_library": does_not_load}, "does not load: .*libnvidia-ml"),
        (onnxruntime, {"get_ep_devices": lambda: []}, "lists no GPU, the driver shows 1"),
    ],
)
def test_edit_where_it_cannot_be_used_exits_4(
    target: Any,
    replacement: dict[str, Any],
    problem: str,
    plugin: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in replacement.items():
        monkeypatch.setattr(target, name, value)
    sample = SAMPLE_EDITS[0]
    files = ["edit", sample.photo, "--labels", sample.labels, "--mask", sample.mask]
    options = ["--output", tmp_path / "edited.png", "--backend", rtx.NAME]
    assert cli.main([str(argument) for argument in (*files, *options)]) == 4
    with pytest.raises(UnavailableError, match=problem):
        rtx._devices(onnxruntime)
    found = rtx.check_onnxruntime_rtx()
    assert not found.usable and found.remedy and not (tmp_path / "edited.png").exists()


def test_older_onnxruntime_is_named(plugin: list[Any]) -> None:
    with pytest.raises(UnavailableError, match=r"needs ONNX Runtime 1\.24 or newer, here 1\.23\.2"):
        rtx._devices(_Old())


class _Old:
    __version__ = "1.23.2"


def test_missing_package_names_the_command(street_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, rtx.MODULE, None)
    with pytest.raises(UnavailableError, match=f"needs the package {rtx.MODULE}") as caught:
        open_backend(open_bundle(street_bundle), rtx.NAME)
    assert caught.value.exit_code == 4 and caught.value.hint == rtx.INSTALL
    found = rtx.check_onnxruntime_rtx()
    assert not found.usable and rtx.INSTALL in str(found.remedy)
