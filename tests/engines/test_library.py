"""Importing engine libraries that are installed, missing or broken."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from spmdeploy.engines import library as engine_library
from spmdeploy.engines.library import import_engine_library, is_installed, local_gpu, local_host
from spmdeploy.engines.record import Gpu
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.driver import GpuFacts


def test_import_engine_library_missing_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UnavailableError, match="tensorrt cannot be imported") as caught:
        import_engine_library("tensorrt")
    assert "spmdeploy[tensorrt]" in str(caught.value.hint) and "JetPack" in str(caught.value.hint)
    with pytest.raises(UnavailableError, match="tensorrt-rtx cannot be imported") as caught:
        import_engine_library("tensorrt-rtx")
    assert "spmdeploy[tensorrt-rtx]" in str(caught.value.hint)


def test_import_engine_library_broken_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open\n shared object file")

    monkeypatch.setattr(engine_library.importlib, "import_module", fail)
    with pytest.raises(UnavailableError, match=r"libnvinfer\.so\.10: cannot open shared object file"):
        import_engine_library("tensorrt")
    assert local_host().versions == {}


def test_local_host_describes_libraries_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1", __spec__="here"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(engine_library, "gpu_facts", lambda device: GpuFacts(f"GPU {device}", "8.6", "13.0", None))
    host = local_host(1)
    assert host.versions == {"tensorrt": "10.16.1"} and host.gpu == Gpu("GPU 1", "8.6")
    assert is_installed("tensorrt")


def test_local_gpu_without_a_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int) -> GpuFacts:
        raise OSError("no NVIDIA driver")

    monkeypatch.setattr(engine_library, "gpu_facts", fail)
    assert local_gpu() is None
