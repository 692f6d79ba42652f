"""Package map and the optional native build; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOTS = {"perturbcore": "perturbcore", "perturbcore.bindings": "bindings", "perturbcore.benches": "benches"}
ROOTS |= {f"perturbcore.kernels.{p.parent.name}": str(p.parent) for p in sorted(Path("kernels").glob("*/__init__.py"))}
OWN = [f"perturbcore.{p.parent.name}" for p in sorted(Path("perturbcore").glob("*/__init__.py"))]

setup(packages=[*ROOTS, *OWN], package_dir=ROOTS)
