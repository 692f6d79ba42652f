"""Times, peak memory and the limits of the machine."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from perturbcore.benches.case import Work

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation over the rounds of a case: process CPU time and wall clock."""

    cpu: float
    wall: float
    fastest: float
    rounds: int

    def scaled(self, factor: float) -> Timing:
        """Return the timing of `factor` times the work."""
        return Timing(self.cpu * factor, self.wall * factor, self.fastest * factor, self.rounds)


def interleave(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """Time every call in turn, 5 to 50 rounds within about ``budget`` seconds, and return the medians."""
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < 5 or (rounds < 50 and time.perf_counter() < end):
        for name, call in calls.items():
            cpu_start, start = time.process_time(), time.perf_counter()
            call()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
        rounds += 1
    gc.enable()
    return {n: Timing(statistics.median(cpu[n]), statistics.median(wall[n]), min(wall[n]), rounds) for n in calls}


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return by how much a call raises the resident memory at its peak, results included; None where not on Linux."""
    if not STATUS.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


@numba.njit(parallel=True, fastmath=True, cache=True)
def _triad(a: Any, b: Any, c: Any) -> None:
    for i in numba.prange(a.size):
        a[i] = b[i] + np.float32(2) * c[i]


@numba.njit(parallel=True, fastmath=True, cache=True)
def _gather(table: Any, index: Any, sums: Any) -> None:
    for part in numba.prange(sums.shape[0]):
        total, own = sums[part], index[part]
        for e in range(0, own.size, 4):
            a, b, c, d = table[own[e]], table[own[e + 1]], table[own[e + 2]], table[own[e + 3]]
            for k in range(total.size):
                total[k] += a[k] + b[k] + c[k] + d[k]


def _fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


class Limits:
    """The most that this machine was seen to do with the threads in use."""

    def __init__(self) -> None:
        numba.set_num_threads(min(torch.get_num_threads(), numba.get_num_threads()))
        self.rates: dict[str, float] = {}  # bytes or operations a second, by name

    def _try(self, name: str, amount: float, call: Callable[[], object]) -> float:
        self.rates[name] = max(self.rates.get(name, 0.0), amount / _fastest(call))
        return self.rates[name]

    def triad(self) -> float:
        """Measure the bytes a second of a sum of two arrays too large for the caches."""
        a, b, c = np.ones((3, 1 << 24), np.float32)
        return self._try("triad, bytes/s", 3 * a.nbytes, lambda: _triad(a, b, c))

    def gemm(self) -> float:
        """Measure the float32 operations a second of a matrix product."""
        matrix = torch.randn(1024, 1024)
        return self._try("gemm, flop/s", 2 * 1024**3, lambda: matrix @ matrix)

    def gather(self, rows: int, row_bytes: int) -> float:
        """Measure the bytes a second of rows read at random from a table of ``rows`` rows."""
        table = np.ones((rows, row_bytes // 4), np.float32)
        per_part = max(4, 2**25 // row_bytes // 64 * 4)
        index = np.random.default_rng(0).integers(0, rows, (64, per_part), dtype=np.int32)
        sums = np.zeros((64, row_bytes // 4), np.float32)
        name = f"gather of {row_bytes} B rows from {rows}, bytes/s"
        return self._try(name, index.size * row_bytes, lambda: _gather(table, index, sums))

    def seconds(self, work: Work) -> float:
        """Measure anew, and return the time that the work would take at the best rates seen so far."""
        moving = work.gathered_bytes / self.gather(work.table_rows, work.row_bytes) if work.gathered_bytes else 0.0
        computing = work.flops / self.gemm() if work.flops else 0.0
        return max(moving, computing)
