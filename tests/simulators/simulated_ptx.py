"""PTX executed by numpy: all threads at once, an instruction at a time, in the arithmetic that each one names.

Only what our kernels use; anything else is an error. Threads may part where some of them are done, and nowhere else.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_DTYPES: dict[str, Any] = {
    "u8": np.uint8,
    "u32": np.uint32,
    "u64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*\{(.*?)\n\}", re.DOTALL)
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a // b if a.dtype.kind == "u" else a / b,
    "rem": np.remainder,
    "min": np.minimum,
    "max": np.maximum,
    "mad": lambda a, b, c: a * b + c,
    "abs": np.abs,
}
_COMPARISONS = {"ge": np.greater_equal, "lt": np.less, "ne": np.not_equal}


class _Instruction(NamedTuple):
    guard: str | None
    operation: list[str]
    operands: list[str]


class Kernel(NamedTuple):
    """One entry of a module. parameters: (type, name)."""

    name: str
    parameters: list[tuple[str, str]]
    registers: dict[str, str]
    instructions: list[_Instruction]
    labels: dict[str, int]

    def values(self, places: Any) -> dict[str, int]:
        """What the array of pointers says that a launch passes."""
        kinds = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32}
        return {
            name: kinds[kind].from_address(place).value
            for (kind, name), place in zip(self.parameters, places, strict=True)
        }


def read_module(text: str) -> dict[str, Kernel]:
    """The kernels by name."""
    assert re.search(r"\.version \d\.\d\n\.target sm_\d\d\n\.address_size 64\n", text)
    return {name: _kernel(name, parameters, body) for name, parameters, body in _ENTRY.findall(text)}


def _kernel(name: str, parameters: str, body: str) -> Kernel:
    registers: dict[str, str] = {}
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in filter(None, map(str.strip, body.split("\n"))):
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif line.startswith(".reg"):
            kind, names = line.rstrip(";").removeprefix(".reg .").split(" ", 1)
            registers |= dict.fromkeys(names.split(", "), kind)
        else:
            assert line.endswith(";"), line
            guard, words = None, line[:-1]
            if words.startswith("@"):
                guard, words = words[1:].split(" ", 1)
            operation, _, operands = words.partition(" ")
            instructions.append(_Instruction(guard, operation.split("."), operands.split(", ") if operands else []))
    listed = [tuple(one.replace(".param .", "").split()) for one in parameters.split(", ")]
    return Kernel(name, [(kind, one) for kind, one in listed], registers, instructions, labels)


def execute(
    kernel: Kernel, values: dict[str, int], blocks: int, threads: int, view: Callable[[int, int], np.ndarray]
) -> None:
    """One launch. view: the bytes of device memory at an address, as many as asked for."""
    _Run(kernel, values, blocks, threads, view).run()


class _Run:
    def __init__(
        self, kernel: Kernel, values: dict[str, int], blocks: int, threads: int, view: Callable[[int, int], np.ndarray]
    ) -> None:
        self._kernel, self._values, self._view = kernel, values, view
        count = blocks * threads
        self._special = {
            "%ctaid.x": np.repeat(np.arange(blocks, dtype=np.uint32), threads),
            "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), blocks),
            "%ntid.x": np.full(count, threads, np.uint32),
        }
        self._registers = {name: np.zeros(count, _DTYPES[kind]) for name, kind in kernel.registers.items()}
        self._active = np.ones(count, np.bool_)

    def run(self) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self._kernel.instructions):
                guard, operation, operands = self._kernel.instructions[at]
                at += 1
                if operation == ["bra"]:
                    at = self._branch(str(guard), self._kernel.labels[operands[0]], at)
                elif operation != ["ret"]:
                    self._do(operation, operands)

    def _branch(self, guard: str, target: int, after: int) -> int:
        taken = self._registers[guard] & self._active
        if target < after and taken.any():
            assert taken[self._active].all(), "threads part in a loop"
            return target
        if target >= after:
            self._active &= ~taken
        return after

    def _do(self, operation: list[str], operands: list[str]) -> None:
        name, kind, (target, *sources) = operation[0], operation[-1], operands
        if name == "st":
            self._reach(target, kind)[...] = self._read(sources[0], kind)[self._active]
        elif operation[:2] == ["ld", "param"]:
            self._write(target, np.asarray(self._values[sources[0].strip("[]")]))
        elif operation[:2] == ["ld", "global"]:
            loaded = np.zeros(self._active.shape, _DTYPES[kind])
            loaded[self._active] = self._reach(sources[0], kind).read()
            self._write(target, loaded)
        elif name in ("mov", "cvta"):
            self._write(target, self._read(sources[0], kind))
        elif name == "cvt":
            self._write(target, self._read(sources[0], kind).astype(_DTYPES[operation[-2]]))
        elif name == "selp":
            *both, chosen = sources
            first, second = (self._read(one, kind) for one in both)
            self._write(target, np.where(self._registers[chosen], first, second))
        elif name == "setp":
            first, second = (self._read(one, kind) for one in sources)
            self._write(target, _COMPARISONS[operation[1]](first, second))
        else:
            wide = np.uint64 if "wide" in operation else _DTYPES[kind]
            values = [self._read(one, kind).astype(wide) for one in sources]
            result = _OPERATIONS[name](*values)
            assert result.dtype == wide, (operation, result.dtype)
            if kind in ("f32", "f64") and name in ("add", "sub", "mul", "div"):
                assert "rn" in operation, "arithmetic that may be fused"
            self._write(target, result)

    def _reach(self, operand: str, kind: str) -> _Reach:
        register, _, offset = operand.strip("[]").partition("+")
        return _Reach(self._registers[register][self._active] + np.uint64(offset or 0), _DTYPES[kind], self._view)

    def _read(self, operand: str, kind: str) -> np.ndarray:
        if operand in self._special:
            return self._special[operand]
        if operand in self._registers:
            return self._registers[operand]
        if operand[:2] in ("0f", "0d"):
            packed = bytes.fromhex(operand[2:])
            value = struct.unpack(">f" if operand[1] == "f" else ">d", packed)[0]
        else:
            value = int(operand)
        return np.full(self._active.shape, value, _DTYPES[kind])

    def _write(self, register: str, values: np.ndarray) -> None:
        kept = self._registers[register]
        kept[:] = np.where(self._active, values, kept)


class _Reach:
    """What the threads reach in device memory, each its own; in one allocation, aligned."""

    def __init__(self, addresses: np.ndarray, dtype: Any, view: Callable[[int, int], np.ndarray]) -> None:
        size = np.dtype(dtype).itemsize
        start = int(addresses.min())
        assert not (addresses % np.uint64(size)).any(), "misaligned"
        self._memory = view(start, int(addresses.max()) - start + size).view(dtype)
        self._places = (addresses - np.uint64(start)) // np.uint64(size)

    def read(self) -> np.ndarray:
        return self._memory[self._places]

    def __setitem__(self, _: Any, values: np.ndarray) -> None:
        assert len(np.unique(self._places)) == len(self._places), "two threads write to one place"
        self._memory[self._places] = values
