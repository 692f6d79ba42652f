"""The native library: it builds, loads, refuses bad arguments, and its kernels are right when run on a host shim."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perturbcore.bindings import native
from perturbcore.bindings.backend import BackendError

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
LAUNCH = re.compile(r"(\w+(?:<N>)?)<<<(.+), (\w+), 0, .+>>>\((.*)\);")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The library as setup.py builds it; the installed one, where there is one that is newer than its sources."""
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*.*"))
    if native.LIBRARY.exists() and native.LIBRARY.stat().st_mtime > newest:
        return native.LIBRARY
    folder = tmp_path_factory.mktemp("native")
    run(sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", folder, "build_cuda", PERTURBCORE_CUDA="1")
    return folder / "perturbcore" / "bindings" / "libperturbcore.so"


@needs_nvcc
def test_library_loads_with_the_version_and_functions_that_the_bindings_expect(built):
    assert native.why_unavailable(built) is None
    assert native.library(built).perturbcore_abi_version() == native.ABI_VERSION
    exported = set(re.findall(r"T (\w+)", run("nm", "-D", "--defined-only", built)))
    assert exported == set(native.SIGNATURES)


@needs_nvcc
def test_a_wrong_argument_and_a_missing_device_give_a_status(built):
    library = native.library(built)
    sizes = 4, 4, 8, 1, 3  # rows, columns, edges, batch, features
    pointers, workspace = (16, 16, None, None, 0, 16, 0, 16), library.perturbcore_spmm_workspace_size(4, 8, 1, 3)
    assert workspace > 0
    assert library.perturbcore_spmm_workspace_size(-1, 8, 1, 3) == 0
    assert library.perturbcore_spmm_f32(*pointers, -1, *sizes[1:], 16, workspace, None) == -1
    assert library.perturbcore_spmm_f32(None, *pointers[1:], *sizes, 16, workspace, None) == -2
    assert library.perturbcore_spmm_f32(*pointers, *sizes, 16, workspace - 1, None) == -4
    assert library.perturbcore_sddmm_f32(16, 16, 16, 5, 16, 0, 16, *sizes, 0, None) == -3
    assert b"stride" in library.perturbcore_error_string(-3)
    script = (
        "import sys, pathlib; from perturbcore.bindings import native; l = native.library(pathlib.Path(sys.argv[1]));"
        f"s = l.perturbcore_spmm_f32(*{pointers}, *{sizes}, 16, {workspace}, None);"
        "print(s, l.perturbcore_error_string(s).decode())"
    )
    status, text = run(sys.executable, "-c", script, built, CUDA_VISIBLE_DEVICES="").split(maxsplit=1)
    assert int(status) > 0
    assert re.search("no CUDA-capable device|driver", text)


@needs_gxx
def test_kernels_compute_the_right_values_and_stay_in_bounds(tmp_path):
    for source in CSRC.glob("*.cu"):
        code = LAUNCH.sub(r"launch_on_host(\2, \3, [=] { \1(\4); });", source.read_text())
        assert "<<<" not in code
        (tmp_path / source.name).with_suffix(".cpp").write_text(code.replace("cuda_runtime_api.h", "cuda_runtime.h"))
    library, sanitize = tmp_path / "host.so", ["-fsanitize=address", "-fno-omit-frame-pointer"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *sanitize]
    includes = ["-I", ROOT / "tests" / "cuda_on_host", "-I", CSRC / "include"]
    run("g++", *flags, *includes, *tmp_path.glob("*.cpp"), "-o", library)
    preload = run("g++", "-print-file-name=libasan.so").strip()
    check = ROOT / "tests" / "cuda_on_host" / "check.py"
    run(sys.executable, check, library, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")


@needs_gxx
@pytest.mark.parametrize("language", ["-std=c99 -xc", "-std=c++11 -xc++"])
def test_header_is_plain_c(language):
    run(
        "g++",
        *language.split(),
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "-fsyntax-only",
        CSRC / "include/perturbcore.h",
    )


def test_a_library_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(BackendError, match="was not built; reinstall perturbcore with PERTURBCORE_CUDA=1"):
        native.library(tmp_path / "absent.so")
    foreign = tmp_path / "foreign.so"
    foreign.write_text("no library")
    assert "cannot be loaded" in native.why_unavailable(foreign)
