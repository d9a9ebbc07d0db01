"""kernels.cu compiled for the host against numpy, bit for bit, and kernels.ptx against the compiler."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.backends.device_pyramid import TILE
from spmdeploy.gpu.device import KERNELS
from spmdeploy.imaging.resize import canvas_taps, resize_canvas
from spmdeploy.tiling.letterbox import pad_by_reflection
from tests.simulators.simulated_gpu import host_kernels

ROOT = Path(__file__).parents[2]
PTX = ROOT / "spmdeploy/gpu/kernels.ptx"
SIZE = 8


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    """tools/compile_kernels.py."""
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "tools/compile_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ptx_recompiled_is_what_is_committed(compiler: ModuleType) -> None:
    try:
        library = compiler.nvrtc_library()
    except FileNotFoundError as exc:
        pytest.skip(str(exc))
    if importlib.metadata.version("nvidia-cuda-nvrtc-cu12") != compiler.NVRTC:
        pytest.skip(f"another NVRTC than {compiler.NVRTC} is installed, which writes other PTX")
    assert compiler.compile_ptx(compiler.SOURCE.read_bytes(), library) == PTX.read_bytes()


def test_ptx_committed_is_for_old_drivers_and_has_all_kernels() -> None:
    lines = PTX.read_text().splitlines()
    assert ".version 8.0" in lines and ".target sm_70" in lines and "fma" not in PTX.read_text()
    assert [line for line in lines if line.startswith(".visible .entry")] == [
        f".visible .entry {name}(" for name in KERNELS
    ]


@pytest.mark.parametrize("target", ["sm_75", "sm_87", "sm_90", "sm_120"])
def test_ptx_committed_assembles(target: str, tmp_path: Path) -> None:
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("ptxas is missing, which comes with the CUDA toolkit")
    subprocess.run([assembler, "-arch", target, "-o", str(tmp_path / "kernels.cubin"), str(PTX)], check=True)


def launch(name: str, threads: int, *arguments: np.ndarray | int, blocks_y: int = 1) -> None:
    values: list[Any] = [
        ctypes.c_void_p(value.ctypes.data) if isinstance(value, np.ndarray) else ctypes.c_int32(value)
        for value in arguments
    ]
    host_kernels()(name, -(-threads // 256), blocks_y, 256, values)


def tile_records(**fields: list[Any]) -> np.ndarray:
    records = np.zeros(len(next(iter(fields.values()))), TILE)
    records["neighbors"]["slot"] = -1
    for name, values in fields.items():
        records[name] = values
    return records


def test_tile_record_in_numpy_has_the_size_in_c() -> None:
    assert TILE.itemsize == 4 * (9 + 2 * 3)


@pytest.mark.parametrize(("rows", "columns"), [(SIZE, SIZE), (3, 5), (1, 2), (1, 1)])
def test_cut_beyond_the_canvas_continues_by_reflection(rows: int, columns: int) -> None:
    canvas = np.random.default_rng(0).random((20, 30, 3), np.float32)
    sources = [(2, 3), (20 - rows, 30 - columns)]
    records = tile_records(
        source_top=[top for top, _ in sources],
        source_left=[left for _, left in sources],
        source_rows=[rows] * 2,
        source_columns=[columns] * 2,
    )
    out = np.zeros((2, SIZE, SIZE, 3), np.float32)
    launch("cut", SIZE * SIZE * 3, out, canvas, records, 30, SIZE, blocks_y=2)
    for tile, (top, left) in zip(out, sources, strict=True):
        expected = pad_by_reflection(canvas[top : top + rows, left : left + columns], SIZE, SIZE)
        assert np.array_equal(tile, expected)


@settings(max_examples=40, deadline=None)
@given(
    have=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scale=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
    beyond=st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)),
    seed=st.integers(0, 9),
)
def test_resample_of_both_axes_is_pillows(
    have: tuple[int, int], scale: tuple[float, float], beyond: tuple[float, float], seed: int
) -> None:
    """Columns first, whichever axis shrinks more."""
    source = np.random.default_rng(seed).uniform(0, 255, (*have, 3)).astype(np.float32)
    rows, columns = (max(there + more, 0.5) for there, more in zip(have, beyond, strict=True))
    height, width = (max(round(part * by), 1) for part, by in zip((rows, columns), scale, strict=True))
    first, weights = canvas_taps(have[1], columns, width)
    wide = np.zeros((have[0], width, 3), np.float32)
    numbers = (weights.shape[1], have[1] - 1, have[1] * 3, 3, width, 0, wide.size)
    launch("resample", wide.size, wide, source, first, np.ascontiguousarray(weights), *numbers)
    first, weights = canvas_taps(have[0], rows, height)
    out = np.zeros((height, width, 3), np.float32)
    numbers = (weights.shape[1], have[0] - 1, 0, width * 3, height, 1, out.size)
    launch("resample", out.size, out, wide, first, np.ascontiguousarray(weights), *numbers)
    assert np.array_equal(out, resize_canvas(source, height, width, rows, columns))


def batch_of_tiles(count: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {
        "kept": random.random((5, SIZE, SIZE, 3), np.float32) * 255,
        "images": random.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8),
        "masks": random.integers(0, 2, (count, SIZE, SIZE), np.uint8),
        "rows": random.random((2, SIZE), np.float32),
        "columns": random.random((2, SIZE), np.float32),
        "records": tile_records(top=[0, 0, 5], left=[0, 6, 4], row=[0, 0, 1], column=[0, 1, 0], slot=[4, 0, 2]),
    }


def test_blend_of_overlapping_tiles_is_numpys_in_their_order() -> None:
    batch = batch_of_tiles()
    canvas = np.random.default_rng(3).random((11, 13, 3), np.float32)  # the last tiles reach beyond it
    expected = canvas.copy()
    for n, tile in enumerate(batch["records"]):
        shown = expected[tile["top"] : tile["top"] + SIZE, tile["left"] : tile["left"] + SIZE]
        height, width = shown.shape[:2]
        weights = np.outer(batch["rows"][tile["row"]], batch["columns"][tile["column"]])[:height, :width, None]
        masked = batch["masks"][n, :height, :width, None] != 0
        added = shown + weights * batch["kept"][tile["slot"], :height, :width]
        shown[:] = np.where(masked, added, batch["images"][n, :height, :width])
    names = ("kept", "images", "masks", "rows", "columns", "records")
    launch("blend", 11 * 13, canvas, *(batch[name] for name in names), 3, 13, 0, 0, 13, SIZE, 11 * 13)
    assert np.array_equal(canvas, expected)


def test_blend_of_a_box_leaves_the_rest() -> None:
    batch = batch_of_tiles(1)
    canvas = np.zeros((12, 12, 3), np.float32)
    batch["records"][0]["top"], batch["records"][0]["left"] = 3, 2
    names = ("kept", "images", "masks", "rows", "columns", "records")
    launch("blend", SIZE * SIZE, canvas, *(batch[name] for name in names), 1, 12, 3, 2, SIZE, SIZE, SIZE * SIZE)
    outside = np.ones((12, 12), bool)
    outside[3 : 3 + SIZE, 2 : 2 + SIZE] = False
    assert not canvas[outside].any() and canvas[~outside].any()


def test_compare_with_neighbors_is_the_mean_difference_under_the_mask() -> None:
    batch = batch_of_tiles()
    records = batch["records"]
    records[1]["neighbors"][0] = (4, 0, 6)
    records[2]["neighbors"][0] = (4, 5, 4)
    records[2]["neighbors"][1] = (0, 5, -2 + SIZE)
    plane = np.random.default_rng(4).random((13, 14), np.float32)
    expected = plane.copy()
    for n, tile in enumerate(records):
        for slot, down, right in tile["neighbors"]:
            if slot >= 0:
                both = np.s_[: SIZE - down, : SIZE - right]
                mine, theirs = batch["kept"][tile["slot"]], batch["kept"][slot]
                distance = np.abs(mine[both] - theirs[down:, right:]).mean(axis=2)
                distance[batch["masks"][n][both] == 0] = 0
                top, left = tile["top"], tile["left"]
                expected[top : top + SIZE - down, left : left + SIZE - right] += distance
    launch("compare", 13 * 14, plane, batch["kept"], batch["masks"], records, 3, 14, 0, 0, 14, SIZE, 13 * 14)
    assert np.array_equal(plane, expected)
