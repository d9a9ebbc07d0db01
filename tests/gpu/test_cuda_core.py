"""The simulated cuda.core offers nothing that the real one does not have, and the real one is called as it wants."""

from __future__ import annotations

import inspect

import pytest

from spmdeploy.gpu import cuda_core as ours
from tests.simulators.simulated_gpu import SimulatedGpu
from tests.simulators.simulated_packages import CudaBindings, simulated_cuda_core

core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")


def test_simulated_classes_compared_have_no_more_members_than_the_real() -> None:
    from cuda.core import graph

    simulated = simulated_cuda_core(SimulatedGpu())
    real = {name: getattr(core, name) for name in dir(core)} | {name: getattr(graph, name) for name in dir(graph)}
    classes = [value for value in vars(simulated).values() if isinstance(value, type)]
    for kind in (*classes, *simulated._graph_classes):
        members = {name for name in vars(kind) if not name.startswith("_")}
        assert members <= set(dir(real[kind.__name__])), kind
    assert core.LEGACY_DEFAULT_STREAM is not None and core.PER_THREAD_DEFAULT_STREAM is not None and core.launch


@pytest.mark.parametrize(
    ("kind", "method", "parameters"),
    [
        ("Buffer", "from_handle", ["ptr", "size"]),
        ("Buffer", "copy_from", ["src", "stream"]),
        ("Buffer", "fill", ["value", "stream"]),
        ("ObjectCode", "from_ptx", ["module"]),
        ("Device", "create_stream", ["options"]),
        ("Device", "create_event", ["options"]),
    ],
)
def test_real_method_inspected_has_the_parameters(kind: str, method: str, parameters: list[str]) -> None:
    assert set(parameters) <= set(inspect.signature(getattr(getattr(core, kind), method)).parameters)


def test_real_options_constructed_have_the_fields() -> None:
    assert core.StreamOptions(nonblocking=True).nonblocking and core.EventOptions(timing_enabled=True).timing_enabled
    config = core.LaunchConfig(grid=(3, 2), block=256)
    assert (config.grid, config.block) == ((3, 2, 1), (256, 1, 1))


def test_real_driver_functions_exist() -> None:
    from cuda.bindings import driver

    for name in vars(CudaBindings(SimulatedGpu())):
        assert hasattr(driver, name), name


def test_real_package_without_a_driver_raises_a_cuda_error() -> None:
    from spmdeploy.gpu.driver import visible_gpus

    try:
        visible_gpus()
    except OSError:
        with pytest.raises(OSError, match=r"cuInit with .*driver"):
            ours.CudaCore(0)
    else:
        pytest.skip("this machine has a driver")


def test_missing_function_of_the_messages_of_cuda_bindings_is_found() -> None:
    assert ours._missing_function('Function "cuNewest" not found') == "cuNewest"
    assert ours._missing_function("function cuNewest is not found") == "cuNewest"
    assert ours._missing_function("CUDA_ERROR_INVALID_VALUE") is None
