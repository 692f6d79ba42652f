"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: hence a process of its own."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perturbcore.bindings import backend

pytest.importorskip("triton")


def test_in_the_interpreter(tmp_path):
    tests = (Path(__file__).parent / "interpreted").glob("triton_*.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *map(str, tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch):
    current = []
    monkeypatch.setattr(backend, "_launcher", lambda op, name, device: lambda x: list(current))
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext(current.append(where)))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    assert backend._launch("spmm", "cuda", x) == [torch.device("cuda:1")]
    assert backend._launch("spmm", "cpu", torch.empty(2)) == [torch.device("cuda:1")]  # and nothing for others
