"""Compile spmdeploy/gpu/kernels.cu to kernels.ptx with NVRTC from PyPI. Needs neither a GPU nor the CUDA toolkit.

    pip install nvidia-cuda-nvrtc-cu12==12.0.140
    python tools/compile_kernels.py

A driver loads PTX of its own CUDA version and of older ones. NVRTC 12.0 writes PTX ISA 8.0, which every driver for
CUDA 12.0 or newer takes (JetPack 6 has 12.2 to 12.6), for compute capability 7.0 and newer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "spmdeploy" / "gpu" / "kernels.cu"
NVRTC = "12.0.140"
OPTIONS = ("--gpu-architecture=compute_70", "--fmad=false", "--std=c++14")


def main() -> int:
    """Writes the PTX next to the source."""
    SOURCE.with_suffix(".ptx").write_bytes(compile_ptx(SOURCE.read_bytes(), nvrtc_library()))
    return 0


def nvrtc_library() -> Path:
    """The library of the installed package. Raises FileNotFoundError naming the package."""
    package = importlib.util.find_spec("nvidia.cuda_nvrtc")
    for folder in (package.submodule_search_locations or []) if package else []:
        for pattern in ("lib/libnvrtc.so.12", "bin/nvrtc64_12*.dll"):
            for path in Path(folder).glob(pattern):
                return path
    raise FileNotFoundError(f"NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12=={NVRTC}")


def compile_ptx(source: bytes, library: Path) -> bytes:
    """PTX of a CUDA C++ source, a line feed at its end. Raises RuntimeError with the compiler's messages."""
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None))
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    log = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if failed:
        raise RuntimeError(log.decode())
    ptx = _output(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return ptx.strip(b"\0\n") + b"\n"


def _output(get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(get(program, text))
    return text.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC failed with error {code}")


if __name__ == "__main__":
    sys.exit(main())
