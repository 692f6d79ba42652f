"""The architecture, checked over the syntax tree: who may import whom, and how light an import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = {"perturbcore": "perturbcore", "kernels": "perturbcore.kernels", "bindings": "perturbcore.bindings"}
STDLIB = set(sys.stdlib_module_names)

# layer: what it may import from perturbcore (prefixes), and from outside (None: anything).
FAMILY = {"torch", "numpy", "numba", "llvmlite", "triton"}
RULES: dict[str, tuple[set[str], set[str] | None]] = {
    "perturbcore.kernels": ({"perturbcore.kernels.common"}, FAMILY),
    "perturbcore.kernels.transport.emd": (
        {"perturbcore.kernels.common", "perturbcore.kernels.transport"},
        FAMILY | {"scipy", "ot"},
    ),
    "perturbcore.bindings": ({"perturbcore.bindings", "perturbcore.kernels"}, {"torch", "numpy", "scipy"}),
    "perturbcore.ops": ({"perturbcore.bindings"}, set()),
    "perturbcore.data": ({"perturbcore.data"}, None),
    "perturbcore.metrics": ({"perturbcore.metrics", "perturbcore.ops", "perturbcore.data"}, None),
    "perturbcore.training": ({"perturbcore.training"}, None),
    "perturbcore.retrieval": ({"perturbcore.ops", "perturbcore.training"}, {"torch", "numpy", "pandas"}),
    "perturbcore.models": (
        {
            "perturbcore.models",
            "perturbcore.training",
            "perturbcore.retrieval",
            "perturbcore.metrics",
            "perturbcore.ops",
            "perturbcore.data",
        },
        None,
    ),
    "perturbcore.report": (
        {"perturbcore.report", "perturbcore.metrics", "perturbcore.retrieval", "perturbcore.data"},
        None,
    ),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in TOP.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join([package, *(p for p in parts if p != "__init__")]), path))
    return found


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of everything a module imports, wherever in the file the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            # `from perturbcore import ops` imports perturbcore.ops
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "perturbcore" else {base}
    return found


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def layer(name: str) -> str | None:
    return max((r for r in RULES if within(name, {r})), key=len, default=None)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[m for m, _ in modules()])
def test_imports_point_downwards(name: str, path: Path) -> None:
    rule = layer(name)
    if rule is None:
        return
    inside, outside = RULES[rule]
    if rule == "perturbcore.kernels":
        inside = inside | {".".join(name.split(".")[:3])}
    for imported in imports(name, path):
        if within(imported, {"perturbcore"}):
            assert within(imported, inside), f"{name} imports {imported}, which lies above or beside it"
        elif outside is not None:
            assert imported.split(".")[0] in STDLIB | outside, f"{name} imports {imported}"


def test_anndata_stops_at_the_data_layer() -> None:
    above = {"perturbcore.data", "perturbcore.comparison", "perturbcore.cli"}
    # these hand AnnData through, and name it in hints
    typed_only = {"perturbcore.models", "perturbcore.metrics", "perturbcore.run_folder", "perturbcore.interchange"}
    for name, path in modules():
        if within(name, above):
            continue
        tree = ast.parse(path.read_text())
        if within(name, typed_only):
            hints = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
            for hint in hints:
                hint.body = [ast.Pass()]
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(within(n, {"anndata"}) for n in names), f"{name} imports anndata"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


def test_ops_import_is_light() -> None:
    heavy = {"anndata", "pandas", "ot", "numba", "triton", "scipy", "matplotlib", "typer", "rich"}
    assert not heavy & loaded_after("import perturbcore.ops")


def test_package_import_is_lazy() -> None:
    assert not {"torch", "anndata", "pandas", "numba", "numpy"} & loaded_after("import perturbcore")


def test_every_exported_name_exists() -> None:
    code = (
        "import importlib\n"
        "for m in ('', '.ops', '.data', '.metrics', '.models'):\n"
        "    module = importlib.import_module('perturbcore' + m)\n"
        "    assert module.__all__ and len(set(module.__all__)) == len(module.__all__), m\n"
        "    for name in module.__all__: getattr(module, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_the_name_kernels_is_left_to_others() -> None:
    """A folder without __init__.py loses to an installed package named `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd="/")
    assert "ModuleNotFoundError" in done.stderr
