"""Package map and the optional native build; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOTS = {"perturbcore": "perturbcore", "perturbcore.bindings": "bindings", "perturbcore.benches": "benches"}
ROOTS |= {f"perturbcore.kernels.{p.parent.name}": str(p.parent) for p in sorted(Path("kernels").glob("*/__init__.py"))}
OWN = [f"perturbcore.{p.parent.name}" for p in sorted(Path("perturbcore").glob("*/__init__.py"))]

# machine code for sm_80 and sm_90, and PTX for what comes after
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")
FLAGS = ("-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/include")


class BuildCuda(Command):
    """Compile csrc/ into one shared library beside the bindings.

    PERTURBCORE_CUDA=1 demands it, 0 forbids it; else it is built where nvcc is found, and a failure is only reported.
    """

    description = "compile the CUDA kernels"
    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None
        self.choice = os.environ.get("PERTURBCORE_CUDA")
        if self.choice not in (None, "0", "1"):
            raise SystemExit(f"PERTURBCORE_CUDA is {self.choice!r}; expected 0, 1 or nothing.")

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def library(self):
        folder = Path("bindings") if self.editable_mode else Path(self.build_lib, "perturbcore", "bindings")
        return folder / "libperturbcore.so"

    def run(self):
        self.library.unlink(missing_ok=True)
        nvcc = shutil.which("nvcc")
        if self.choice == "0" or (nvcc is None and self.choice is None):
            return
        if nvcc is None:
            raise SystemExit("PERTURBCORE_CUDA=1 needs nvcc, which is not on the PATH.")
        self.library.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode={architecture}" for architecture in ARCHITECTURES]
        command = [nvcc, *FLAGS, *targets, *map(str, sorted(Path("csrc").glob("*.cu"))), "-o", str(self.library)]
        self.announce(" ".join(command), level=2)
        if subprocess.run(command).returncode:
            if self.choice == "1":
                raise SystemExit("nvcc could not compile csrc/; its messages are above.")
            self.warn(
                "nvcc could not compile csrc/; going on without the native kernels (PERTURBCORE_CUDA=1 demands them)"
            )

    def get_source_files(self):
        return [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in {".cu", ".h"}]

    def get_outputs(self):
        return [str(self.library)] if self.library.exists() else []

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel that holds the shared library is for one platform, and for any Python."""

    def run(self):
        self.run_command("build")
        if self.get_finalized_command("build_cuda").get_outputs():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installs into the platform's own directory
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


build.sub_commands = [*build.sub_commands, ("build_cuda", None)]
setup(packages=[*ROOTS, *OWN], package_dir=ROOTS, cmdclass={"build_cuda": BuildCuda, "bdist_wheel": PlatformWheel})
