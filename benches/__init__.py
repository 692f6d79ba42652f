"""Benchmark cases, one module per op family and model, and the runner that interleaves them with their peers."""

from __future__ import annotations

import os
from collections.abc import Sequence

# OpenBLAS starts threads of its own inside a parallel kernel unless told not to before NumPy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks named on the command line and return the exit code; ``--help`` tells the options."""
    from perturbcore.benches.run import main

    return main(argv)
