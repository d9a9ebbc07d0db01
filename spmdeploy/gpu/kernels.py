"""The arithmetic between the levels of a cascade, for the GPU: cut, resample, blend, compare.

PTX, which the driver itself compiles for whatever GPU it drives: an edge device has no compiler and no other library
for such. Every operation is named with its rounding, so that none is fused, and the results are numpy's bit for bit.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any, ClassVar

from spmdeploy.gpu.driver import Driver

THREADS = 256
"""In a block."""

_POINTER, _NUMBER = ctypes.c_uint64, ctypes.c_uint32


class DeviceKernels:
    """The kernels, loaded into the current context. Raises CudaFailure, also later, in every method.

    A picture is float32 (rows, columns, 3) in device memory without gaps; a thread does one of its numbers.
    """

    _PARAMETERS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cut": (_POINTER,) * 2 + (_NUMBER,) * 7,
        "resample": (_POINTER,) * 4 + (_NUMBER,) * 7,
        "blend": (_POINTER,) * 6 + (_NUMBER,) * 5,
        "compare": (_POINTER,) * 4 + (_NUMBER,) * 7,
    }

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._module = ctypes.c_void_p()
        driver.call("cuModuleLoadData", byref(self._module), ctypes.c_char_p(PTX.encode()))
        self._functions = {}
        for name in self._PARAMETERS:
            self._functions[name] = ctypes.c_void_p()
            driver.call(
                "cuModuleGetFunction", byref(self._functions[name]), self._module, ctypes.c_char_p(name.encode())
            )

    def launch(self, name: str, threads: int, stream: int, *arguments: int) -> None:
        """Queues a kernel; its last parameter is the number of threads, which is not among `arguments`."""
        kinds = self._PARAMETERS[name]
        values = [kind(value) for kind, value in zip(kinds, (*arguments, threads), strict=True)]
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        blocks = -(-threads // THREADS)
        shape = (blocks, 1, 1, THREADS, 1, 1, 0)
        self._driver.call("cuLaunchKernel", self._functions[name], *shape, ctypes.c_void_p(stream), places, None)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queues zeros."""
        place, count = ctypes.c_uint64(address), ctypes.c_size_t(size)
        self._driver.call("cuMemsetD8Async", place, ctypes.c_ubyte(0), count, ctypes.c_void_p(stream))

    def copy(self, address: int, source: int, size: int, stream: int) -> None:
        """Queues a copy inside the device."""
        places = ctypes.c_uint64(address), ctypes.c_uint64(source)
        self._driver.call("cuMemcpyDtoDAsync_v2", *places, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def close(self) -> None:
        """In the same context. Safe to call twice."""
        module, self._module = self._module, ctypes.c_void_p()
        if module:
            self._driver.call("cuModuleUnload", module)


# cut(out, canvas, width, top, left, rows, columns, size, count)
#   out[y, x] = canvas[top + mirrored(y, rows), left + mirrored(x, columns)], out being size by size
# resample(out, source, first, weights, taps, last, row, inner, length, clip, count)
#   out[a, m, c] = sum over k of weights[m, k] * source[a * row + min(first[m] + k, last) * inner + c], in float64;
#   a runs over what is left of count, m over length, c over inner. clip: whether to keep it in 0..255.
# blend(canvas, picture, image, mask, down, right, width, top_left, columns, size, count)
#   canvas[y, x] = mask[y, x] ? canvas[y, x] + down[y] * right[x] * picture[y, x] : image[y, x], for
#   x < columns and as many rows as count holds; canvas (and plane) are `width` wide and begin at the pixel `top_left`,
#   the others are size wide.
# compare(plane, picture, other, mask, width, top_left, down, right, columns, size, count)
#   plane[y, x] += mask[y, x] ? mean over the channels of |picture[y, x] - other[down + y, right + x]| : 0
_HEAD = """
.version 6.0
.target sm_70
.address_size 64
"""

# What thread it is, in %i; the last parameter is the number of threads.
_BEGIN = """
    mov.u32 %a, %ctaid.x;
    mov.u32 %b, %ntid.x;
    mov.u32 %i, %tid.x;
    mad.lo.u32 %i, %a, %b, %i;
    ld.param.u32 %a, [count];
    setp.ge.u32 %p, %i, %a;
    @%p bra DONE;
"""

_REGISTERS = """
    .reg .pred %p;
    .reg .u32 %a, %b, %c, %d, %e, %f, %i, %x, %y, %k, %m, %n;
    .reg .u64 %at, %to, %from, %more;
    .reg .f32 %u, %v, %w;
    .reg .f64 %s, %t, %g;
"""


def _kernel(name: str, parameters: str, body: str) -> str:
    """parameters: names, those of 64 bits (addresses) before a bar."""
    pointers, numbers = (part.split() for part in parameters.split("|"))
    listed = [f".param .u64 {one}" for one in pointers] + [f".param .u32 {one}" for one in (*numbers, "count")]
    return f".visible .entry {name}({', '.join(listed)})\n{{{_REGISTERS}{_BEGIN}{body}\nDONE:\n    ret;\n}}\n"


def _element(register: str, base: str, index: str, size: int) -> str:
    """The address of an element: of the parameter `base`, at the number in the register `index`."""
    return f"""
    ld.param.u64 {register}, [{base}];
    cvta.to.global.u64 {register}, {register};
    mul.wide.u32 %at, {index}, {size};
    add.u64 {register}, {register}, %at;
"""


def _mirrored(register: str, length: str) -> str:
    """Continues 0..length-1 by mirroring; the outermost pixel is not repeated, a single one is."""
    return f"""
    ld.param.u32 %n, [{length}];
    add.u32 %n, %n, %n;
    sub.u32 %n, %n, 2;
    max.u32 %m, %n, 1;
    rem.u32 {register}, {register}, %m;
    sub.u32 %m, %n, {register};
    min.u32 {register}, {register}, %m;
"""


# %c: the channel, %x and %y: the pixel of a picture as wide as the parameter `columns` says.
def _pixel(columns: str) -> str:
    return f"""
    rem.u32 %c, %i, 3;
    div.u32 %x, %i, 3;
    ld.param.u32 %a, [{columns}];
    div.u32 %y, %x, %a;
    rem.u32 %x, %x, %a;
"""


_CUT = (
    _pixel("size")
    + _mirrored("%y", "rows")
    + _mirrored("%x", "columns")
    + """
    ld.param.u32 %a, [top];
    add.u32 %y, %y, %a;
    ld.param.u32 %a, [left];
    add.u32 %x, %x, %a;
    ld.param.u32 %a, [width];
    mad.lo.u32 %x, %y, %a, %x;
    mad.lo.u32 %x, %x, 3, %c;
"""
    + _element("%from", "canvas", "%x", 4)
    + _element("%to", "out", "%i", 4)
    + """
    ld.global.f32 %u, [%from];
    st.global.f32 [%to], %u;
"""
)

_RESAMPLE = (
    """
    ld.param.u32 %d, [inner];
    rem.u32 %c, %i, %d;
    div.u32 %x, %i, %d;
    ld.param.u32 %a, [length];
    div.u32 %y, %x, %a;
    rem.u32 %x, %x, %a;
    ld.param.u32 %a, [row];
    mad.lo.u32 %y, %y, %a, %c;
    ld.param.u32 %e, [taps];
    ld.param.u32 %f, [last];
"""
    + _element("%from", "first", "%x", 4)
    + """
    ld.global.u32 %b, [%from];
    mul.lo.u32 %x, %x, %e;
"""
    + _element("%more", "weights", "%x", 8)
    + """
    mov.f64 %s, 0d0000000000000000;
    mov.u32 %k, 0;
TAP:
    add.u32 %m, %b, %k;
    min.u32 %m, %m, %f;
    mad.lo.u32 %m, %m, %d, %y;
"""
    + _element("%from", "source", "%m", 4)
    + """
    ld.global.f32 %u, [%from];
    cvt.f64.f32 %t, %u;
    ld.global.f64 %g, [%more];
    mul.rn.f64 %t, %t, %g;
    add.rn.f64 %s, %s, %t;
    add.u64 %more, %more, 8;
    add.u32 %k, %k, 1;
    setp.lt.u32 %p, %k, %e;
    @%p bra TAP;
    cvt.rn.f32.f64 %u, %s;
    max.f32 %v, %u, 0f00000000;
    min.f32 %v, %v, 0f437F0000;
    ld.param.u32 %a, [clip];
    setp.ne.u32 %p, %a, 0;
    selp.f32 %u, %v, %u, %p;
"""
    + _element("%to", "out", "%i", 4)
    + """
    st.global.f32 [%to], %u;
"""
)

_BLEND = (
    _pixel("columns")
    + _element("%from", "down", "%y", 4)
    + """
    ld.global.f32 %w, [%from];
"""
    + _element("%from", "right", "%x", 4)
    + """
    ld.global.f32 %u, [%from];
    mul.rn.f32 %w, %w, %u;
    ld.param.u32 %a, [size];
    mad.lo.u32 %d, %y, %a, %x;
    mad.lo.u32 %e, %d, 3, %c;
    ld.param.u32 %a, [width];
    mad.lo.u32 %f, %y, %a, %x;
    ld.param.u32 %a, [top_left];
    add.u32 %f, %f, %a;
    mad.lo.u32 %f, %f, 3, %c;
"""
    + _element("%from", "picture", "%e", 4)
    + """
    ld.global.f32 %u, [%from];
    mul.rn.f32 %u, %w, %u;
"""
    + _element("%to", "canvas", "%f", 4)
    + """
    ld.global.f32 %v, [%to];
    add.rn.f32 %u, %v, %u;
"""
    + _element("%from", "image", "%e", 1)
    + """
    ld.global.u8 %a, [%from];
    cvt.rn.f32.u32 %v, %a;
"""
    + _element("%from", "mask", "%d", 1)
    + """
    ld.global.u8 %a, [%from];
    setp.ne.u32 %p, %a, 0;
    selp.f32 %u, %u, %v, %p;
    st.global.f32 [%to], %u;
"""
)

_COMPARE = (
    """
    ld.param.u32 %a, [columns];
    div.u32 %y, %i, %a;
    rem.u32 %x, %i, %a;
    ld.param.u32 %a, [size];
    mad.lo.u32 %d, %y, %a, %x;
    ld.param.u32 %b, [down];
    add.u32 %e, %y, %b;
    ld.param.u32 %b, [right];
    add.u32 %f, %x, %b;
    mad.lo.u32 %e, %e, %a, %f;
    ld.param.u32 %a, [width];
    mad.lo.u32 %f, %y, %a, %x;
    ld.param.u32 %a, [top_left];
    add.u32 %f, %f, %a;
"""
    + _element("%from", "picture", "%d", 12)
    + _element("%more", "other", "%e", 12)
    + """
    ld.global.f32 %u, [%from];
    ld.global.f32 %v, [%more];
    sub.rn.f32 %u, %u, %v;
    abs.f32 %w, %u;
    ld.global.f32 %u, [%from+4];
    ld.global.f32 %v, [%more+4];
    sub.rn.f32 %u, %u, %v;
    abs.f32 %u, %u;
    add.rn.f32 %w, %w, %u;
    ld.global.f32 %u, [%from+8];
    ld.global.f32 %v, [%more+8];
    sub.rn.f32 %u, %u, %v;
    abs.f32 %u, %u;
    add.rn.f32 %w, %w, %u;
    div.rn.f32 %w, %w, 0f40400000;
"""
    + _element("%from", "mask", "%d", 1)
    + """
    ld.global.u8 %a, [%from];
    setp.ne.u32 %p, %a, 0;
    selp.f32 %w, %w, 0f00000000, %p;
"""
    + _element("%to", "plane", "%f", 4)
    + """
    ld.global.f32 %u, [%to];
    add.rn.f32 %u, %u, %w;
    st.global.f32 [%to], %u;
"""
)

PTX = _HEAD + "".join(
    (
        _kernel("cut", "out canvas | width top left rows columns size", _CUT),
        _kernel("resample", "out source first weights | taps last row inner length clip", _RESAMPLE),
        _kernel("blend", "canvas picture image mask down right | width top_left columns size", _BLEND),
        _kernel("compare", "plane picture other mask | width top_left down right columns size", _COMPARE),
    )
)
