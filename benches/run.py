"""The runner: ours and the peers in one process, in turn, doing the same work; no ratio without a passed check."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perturbcore.benches.case import Case, Outputs
from perturbcore.benches.measure import Limits, interleave, peak_bytes
from perturbcore.benches.registry import select

OURS = "perturbcore"
CPUINFO = Path("/proc/cpuinfo")
PEER_TOLERANCE = 1e-3  # a peer must do the same work; that it is less exact is its own affair


def error(outputs: Outputs, expected: Outputs) -> float:
    """Return the largest error over all tensors, each relative to the largest absolute value expected of it.

    NaN where a tensor holds one; where only zeros are expected, anything else is an error beyond any tolerance.
    """
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        return float("inf")
    errors = [
        (got.double() - right).abs().max() / right.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        for got, right in zip(outputs, expected, strict=True)
    ]
    return float(torch.stack(errors).max())  # Python's own max would pass over NaN


def run_case(case: Case, limits: Limits, budget: float) -> dict[str, Any]:
    """Check, measure and compare one case; where a check fails its row says so and carries no ratio."""
    problem = case.build()
    calls: dict[str, Callable[[], Outputs]] = {OURS: problem.ours, **problem.peers}
    expected = problem.expected()
    errors = {name: error(call(), expected) for name, call in calls.items() if name not in problem.parts}
    del expected
    errors |= {name: error(calls[name](), part.expected()) for name, part in problem.parts.items()}
    allowed = {name: case.tolerance if name == OURS else max(PEER_TOLERANCE, case.tolerance) for name in calls}
    passed = {name: errors[name] <= allowed[name] for name in calls}  # false for NaN
    peaks = {
        name: min((peak_bytes(call) for _ in range(5)), key=lambda peak: peak or 0) for name, call in calls.items()
    }
    limits.seconds(problem.work)  # before and after, in case other processes were busy once
    timings = interleave(calls, budget)
    least = limits.seconds(problem.work)
    rows: dict[str, dict[str, Any]] = {}
    for name, timed in timings.items():
        share = problem.parts[name].share if name in problem.parts else 1.0
        timing = timed.scaled(1 / share)
        row: dict[str, Any] = {"error": errors[name], "passed": passed[name], "peak_bytes": peaks[name]}
        row |= {"wall_s": timing.wall, "wall_min_s": timing.fastest, "cpu_s": timing.cpu}
        if share < 1:
            row["timed_share"] = share
        if name == OURS:
            row["share_of_limit"] = least / timing.wall
        elif passed[name] and passed[OURS]:
            row["ratio"], row["ratio_cpu"] = timing.wall / timings[OURS].wall, timing.cpu / timings[OURS].cpu
            ours, theirs = peaks[OURS], peaks[name]
            if ours and theirs:
                row["memory_ratio"] = theirs / ours
            floors = {"ratio": case.floors.get(name), "memory_ratio": case.memory_floors.get(name)}
            row["floors"] = {
                key: {"floor": floor, "met": row[key] >= floor} for key, floor in floors.items() if floor and key in row
            }
        rows[name] = row
    absent = [peer for peer in case.peers if peer not in problem.peers]
    rounds = timings[OURS].rounds
    return {
        "name": case.name,
        "family": case.family,
        "shape": case.shape,
        "rounds": rounds,
        "rows": rows,
        "absent": absent,
    }


def machine(limits: Limits) -> dict[str, Any]:
    """Describe where the figures were taken."""
    described = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []  # only Linux has it
    models = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "idle threads": os.environ.get("OMP_WAIT_POLICY", "as OpenMP has it"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numba", "numpy", "scipy")},
        "limits": limits.rates,
    }


def describe(result: dict[str, Any]) -> str:
    """Return the lines that a reader sees of one case."""
    lines = [f"{result['name']}: {result['shape']} ({result['rounds']} rounds)"]
    for name, row in result["rows"].items():
        peak = "" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / 2**20:7.1f} MB"
        line = f"  {name:20} {row['wall_s'] * 1e3:9.2f} ms  cpu {row['cpu_s'] * 1e3:9.2f} ms  {peak}"
        if not row["passed"]:
            line += f"  CHECK FAILED: error {row['error']:.1e}; no ratio"
        elif name == OURS:
            line += f"  error {row['error']:.1e}, {row['share_of_limit']:.0%} of the machine's limit"
        if "ratio" in row:
            memory = f", memory {row['memory_ratio']:.1f}x" if "memory_ratio" in row else ""
            line += f"  {row['ratio']:.1f}x (cpu {row['ratio_cpu']:.1f}x{memory})"
            for key, floor in row["floors"].items():
                what = "time" if key == "ratio" else "memory"
                line += f"  {what} floor {floor['floor']:g}x {'met' if floor['met'] else 'MISSED'}"
        if "timed_share" in row:
            line += f"  (scaled from {row['timed_share']:.2%} of the work; peak as measured)"
        lines.append(line)
    lines += [f"  {peer:20} skipped: not installed" for peer in result["absent"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks named on the command line; return 1 where a check failed, 2 where a name is unknown."""
    parser = argparse.ArgumentParser(prog="perturbcore bench", description=__doc__)
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only cases with NAME in their name; repeatable"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads for both sides (default: 2)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing for each case (default: 10)")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON; the table goes to stderr")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    given = parser.parse_args(argv)
    try:
        cases = select(given.case or [""])
    except ValueError as unknown:
        parser.error(str(unknown))
    if given.list:
        print("\n".join(f"{case.name:14} {case.shape}; against {', '.join(case.peers)}" for case in cases))
        return 0
    torch.set_num_threads(given.threads)
    table = sys.stderr if given.json else sys.stdout
    limits, results = Limits(), []
    limits.triad()
    for case in cases:
        results.append(run_case(case, limits, given.budget))
        print(describe(results[-1]), file=table, flush=True)
    described = machine(limits)
    print("limits: " + "; ".join(f"{name} {rate:.3g}" for name, rate in limits.rates.items()), file=table)
    if given.json:
        print(json.dumps({"machine": described, "cases": results}, indent=1))
    return int(any(not row["passed"] for result in results for row in result["rows"].values()))
