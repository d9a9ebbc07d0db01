"""Roofline lower bound on latency, from counted work and the measured peak rates of the machine.

The bound is the larger of two times: the operations of the convolutions at the rate of a large matrix product, and the
smallest number of bytes to move (weights once, images in and out once) at the rate of a large copy. No backend sustains
either rate throughout. A backend that skips superfluous work or transforms convolutions may be faster than the bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from spmdeploy.bench.machine import usable_cores

MATRIX_SIDE = 2048
COPIED_BYTES = 256 << 20
"""Larger than any cache."""
BYTES_PER_PIXEL = 3 + 1 + 4 + 1 + 3
"""image, labels, instances and mask in, edited out."""


@dataclass(frozen=True)
class PeakRates:
    """Measured rates of one device in one precision."""

    device: str
    precision: str
    library: str
    """Library with the fastest matrix product."""
    gflops: float
    """Of a matrix product of `MATRIX_SIDE`, 2 operations per multiply-add."""
    copy_gb_per_second: float
    """Bytes read and written by a copy of `COPIED_BYTES`."""


@dataclass(frozen=True)
class RooflineBound:
    """Lower bound on the time of one call."""

    gflop: float
    """Counted operations of the plain generator, of the whole batch."""
    megabytes: float
    """Weights once, images in and out."""
    milliseconds: float
    bound_by: str
    """arithmetic or memory."""
    reached: float
    """bound / median: 1 = as fast as the counted work allows."""


def roofline_bound(
    gflop: float, weights_bytes: int, batch: int, size: int, rates: PeakRates, median: float
) -> RooflineBound:
    """The lower bound on the time of one call: the longer of its arithmetic and its memory traffic.

    Args:
        gflop: Operations of one edit, in 10^9.
        weights_bytes: Bytes of the weights, read once per call.
        batch: Images per call.
        size: Height and width of an image.
        rates: Measured peak rates of the device.
        median: Measured milliseconds of one call.
    """
    moved = weights_bytes + batch * size * size * BYTES_PER_PIXEL
    arithmetic = gflop * batch / rates.gflops * 1e3
    memory = moved / (rates.copy_gb_per_second * 1e9) * 1e3
    longest = max(arithmetic, memory)
    bound_by = "arithmetic" if arithmetic >= memory else "memory"
    return RooflineBound(round(gflop * batch, 3), round(moved / 1e6, 3), longest, bound_by, longest / median)


def numpy_rates(seconds: float) -> PeakRates:
    """Rates that numpy reaches on the usable cores, each measured for so many seconds."""
    matrix = np.random.default_rng(0).standard_normal((MATRIX_SIDE, MATRIX_SIDE), np.float32)
    product = np.empty_like(matrix)
    product_seconds = best_seconds(lambda: np.matmul(matrix, matrix, out=product), seconds)
    cores = len(usable_cores())
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    chunks = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    with ThreadPoolExecutor(cores) as pool:  # numpy copies without the interpreter's lock
        copy_seconds = best_seconds(lambda: list(pool.map(lambda chunk: np.copyto(*chunk), chunks)), seconds)
    return rates_from("cpu", "fp32", f"numpy {np.__version__}", product_seconds, copy_seconds)


def rates_from(device: str, precision: str, library: str, product_seconds: float, copy_seconds: float) -> PeakRates:
    """Peak rates from measured times.

    Args:
        device: cpu or cuda:N.
        precision: Of the matrix product.
        library: That computed it.
        product_seconds: Time of a matrix product of `MATRIX_SIDE`.
        copy_seconds: Time of a copy of `COPIED_BYTES`.
    """
    gflops = 2 * MATRIX_SIDE**3 / product_seconds / 1e9
    return PeakRates(device, precision, library, gflops, 2 * COPIED_BYTES / copy_seconds / 1e9)


def best_seconds(work: Callable[[], object], seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """The time of the shortest repetition, after one warm-up.

    Args:
        work: What is repeated.
        seconds: Time to repeat it for.
        wait: Blocks until the work is done.
    """
    work()
    wait()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


def fastest(rates: list[PeakRates]) -> PeakRates:
    """The faster product and the faster copy of the same device and precision."""
    best = max(rates, key=lambda it: it.gflops)
    copying = max(it.copy_gb_per_second for it in rates)
    return PeakRates(best.device, best.precision, best.library, best.gflops, copying)
