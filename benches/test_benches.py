"""The same cases under pytest-benchmark: ``make bench``, with JSON and comparison to earlier runs."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from perturbcore.benches.case import Case, Outputs, Problem
from perturbcore.benches.registry import CASES
from perturbcore.benches.run import OURS, PEER_TOLERANCE, error


@functools.lru_cache(maxsize=1)
def built(case: Case) -> tuple[Problem, Outputs]:
    """Return the problem and its float64 result, kept while the implementations of one case are timed."""
    torch.set_num_threads(2)
    problem = case.build()
    return problem, problem.expected()


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in (OURS, *case.peers)],
)
def test_bench(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    """Time one implementation of one case, after it has passed its check."""
    problem, expected = built(case)
    calls = {OURS: problem.ours, **problem.peers}
    if name not in calls:
        pytest.skip(f"{name} is not installed")
    if name in problem.parts:
        expected = problem.parts[name].expected()
        benchmark.extra_info["timed_share"] = problem.parts[name].share
    assert error(calls[name](), expected) <= (case.tolerance if name == OURS else max(PEER_TOLERANCE, case.tolerance))
    benchmark.group, benchmark.extra_info["shape"] = case.name, case.shape
    benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
