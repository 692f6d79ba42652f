"""The same cases under pytest-benchmark: ``make bench``, with JSON and comparison to earlier runs."""

import pytest
import torch
from perturbcore.benches.registry import CASES
from perturbcore.benches.run import OURS, PEER_TOLERANCE, error


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    """One case, its problem and the float64 result, built once for all its implementations."""
    torch.set_num_threads(2)
    problem = request.param.build()
    return request.param, problem, problem.expected()


NAMES = list(dict.fromkeys([OURS, *(peer for case in CASES for peer in case.peers)]))


@pytest.mark.parametrize("name", NAMES)
def test_bench(benchmark, case, name):
    """Time one implementation of one case, after it has passed its check."""
    case, problem, expected = case
    if name not in (OURS, *case.peers):
        pytest.skip(f"{name} is no peer of {case.name}")
    calls = {OURS: problem.ours, **problem.peers}
    if name not in calls:
        pytest.skip(f"{name} is not installed")
    assert error(calls[name](), expected) <= (case.tolerance if name == OURS else PEER_TOLERANCE)
    benchmark.group, benchmark.extra_info["shape"] = case.name, case.shape
    benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
