"""The bench runner: a ratio only for work that was checked, floors held, peers that are absent named."""

import json
from typing import ClassVar

import pytest
import torch

from perturbcore.benches import adapert, main, ptrag, run
from perturbcore.benches.case import Case, Part, Problem, Work
from perturbcore.benches.measure import Timing, peak_bytes


class Limits:
    """One operation a second."""

    rates: ClassVar[dict] = {}

    def triad(self):
        pass

    def seconds(self, work):
        return work.flops


@pytest.fixture(autouse=True)
def no_memory_measured(monkeypatch):
    monkeypatch.setattr(run, "peak_bytes", lambda call: None)  # it collects garbage, which here is most of the time


def result(ours, peer, **case):
    right = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    problem = Problem(
        lambda: (torch.tensor(ours),), {"peer": lambda: (torch.tensor(peer),)}, lambda: right, Work(flops=1)
    )
    return run.run_case(Case("op", "graph", "N=2", lambda: problem, ("peer", "absent"), **case), Limits(), budget=0)


def test_a_passed_check_gives_a_ratio_and_judges_the_floor():
    case = result([1.0, 2.0], [1.0, 2.0], floors={"peer": 1e-9})
    assert case["rows"]["peer"]["ratio"] > 0
    assert "time floor 1e-09x met" in run.describe(case)
    assert "time floor 1e+09x MISSED" in run.describe(result([1.0, 2.0], [1.0, 2.0], floors={"peer": 1e9}))


@pytest.mark.parametrize("wrong", [[1.0, 2.1], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_no_ratio_is_told_where_either_side_is_wrong(wrong):
    for pair in ((wrong, [1.0, 2.0]), ([1.0, 2.0], wrong)):
        case = result(*pair, floors={"peer": 1e-9})
        assert "ratio" not in case["rows"]["peer"]
        assert "CHECK FAILED" in run.describe(case)
        assert "floor" not in run.describe(case)


@pytest.mark.parametrize(("got", "passes"), [(0.0, True), (float("nan"), False), (1e-30, False)])
def test_every_tensor_is_checked_also_where_zeros_are_expected(got, passes):
    right = (torch.tensor([1.0]), torch.tensor([0.0]))
    assert (run.error((right[0], torch.tensor([got])), right) <= 1e-5) == passes
    assert (run.error((torch.tensor([got]), right[0]), right[::-1]) <= 1e-5) == passes


def test_the_machine_is_described_where_linux_does_not_describe_it(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CPUINFO", tmp_path / "cpuinfo")
    assert isinstance(run.machine(Limits())["cpu"], str)


def test_the_time_of_a_part_is_scaled_to_the_whole_and_its_row_says_so(monkeypatch):
    both = Timing(cpu=1.0, wall=2.0, fastest=1.0, rounds=5)
    monkeypatch.setattr(run, "interleave", lambda calls, budget: dict.fromkeys(calls, both))
    right, first = torch.tensor([1.0, 2.0]), torch.tensor([1.0])
    for part, ratio in ((first, 4.0), (first + 1, None)):
        problem = Problem(
            lambda: (right,),
            {"peer": lambda part=part: (part,)},
            lambda: (right,),
            Work(flops=1),
            {"peer": Part(0.25, lambda: (first,))},
        )
        case = run.run_case(Case("op", "graph", "N=2", lambda problem=problem: problem, ("peer",)), Limits(), budget=0)
        assert case["rows"]["peer"]["wall_s"] == 8.0
        assert case["rows"]["peer"].get("ratio") == ratio
        assert "scaled from 25.00% of the work" in run.describe(case)


def test_absent_peers_are_named():
    assert "absent               skipped: not installed" in run.describe(result([1.0, 2.0], [1.0, 2.0]))


def test_peak_memory_sees_what_is_freed_before_the_call_ends():
    if (peak := peak_bytes(lambda: float(torch.ones(5_000_000).sum()))) is not None:
        assert 19e6 < peak < 40e6


def test_list_and_unknown_names(capsys):
    assert main(["--list", "--case", "gatv2"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    with pytest.raises(SystemExit) as stop:
        main(["--case", "nonsense"])
    assert stop.value.code == 2
    assert "spmm/5k" in capsys.readouterr().err


def test_json_goes_to_stdout_and_a_failed_check_to_the_exit_code(capsys, monkeypatch):
    wrong = Problem(lambda: (torch.ones(2),), {}, lambda: (torch.zeros(2) + 2,), Work(flops=1))
    monkeypatch.setattr(run, "select", lambda names: [Case("op", "graph", "N=2", lambda: wrong, ())])
    monkeypatch.setattr(run, "Limits", Limits)
    assert main(["--json", "--budget", "0"]) == 1
    assert json.loads(capsys.readouterr().out)["cases"][0]["rows"]["perturbcore"]["passed"] is False


SMALL = adapert.Size(
    nodes=200, edges=1500, with_text=150, text=16, genes=100, perturbed=16, batch=16, unseen=20, alone=3
)


def test_adapert_and_its_peer_take_the_same_step():
    problem = adapert.build_step(SMALL)
    ours, peer = problem.ours(), problem.peers[adapert.EAGER]()
    assert run.error(ours, peer) < 1e-4
    assert run.error(ours, problem.expected()) < 5e-3


def test_adapert_and_its_peer_predict_the_same():
    problem = adapert.build_predict(SMALL)
    assert run.error(problem.ours(), problem.expected()) < 1e-5
    assert run.error(problem.peers[adapert.ALONE](), problem.parts[adapert.ALONE].expected()) < 1e-5


FEW = ptrag.Size(
    perturbed=20,
    genes=30,
    text=12,
    sets=3,
    loaded=5,
    options=tuple({"width": 16, "k": 5, "set_size": 8, "layers": 1, "heads": 2, "head_dim": 4, "hidden": 8}.items()),
)


@pytest.mark.parametrize("freeze", [False, True])
def test_ptrag_and_its_peer_take_the_same_step(freeze):
    problem = ptrag.build_step(FEW, freeze)
    assert run.error(problem.peers[ptrag.EAGER](), problem.expected()) < 1e-4
    assert run.error(problem.ours(), problem.expected()) < 1e-4


def test_ptrag_loads_what_its_peer_loads():
    problem = ptrag.build_loader(FEW)
    for call in (problem.ours, problem.peers[ptrag.LOADER]):
        assert run.error(call(), problem.expected()) == 0
