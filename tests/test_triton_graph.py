"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: hence a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
