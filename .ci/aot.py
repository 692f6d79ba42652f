"""Compile every GPU kernel ahead of time, without a GPU, and hold what each needs to its budget in kernels.json.

python .ci/aot.py            exits 1 where a kernel needs more than its budget, or has none
python .ci/aot.py --write    sets the budgets to what the kernels need now
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perturbcore.kernels.common import triton_gpu as common
from perturbcore.kernels.graph import gate_triton_gpu as gate
from perturbcore.kernels.graph import gated_pool_triton_gpu as pool
from perturbcore.kernels.graph import gatv2_triton_gpu as gatv2
from perturbcore.kernels.graph import masked_spmm_triton_gpu as masked
from perturbcore.kernels.graph import triton_gpu as graph
from perturbcore.kernels.selection import select_triton_gpu as choice
from perturbcore.kernels.selection import sigmoid_triton_gpu as sigmoid
from perturbcore.kernels.selection import topk_triton_gpu as topk
from perturbcore.kernels.transport import energy_triton_gpu as energy
from perturbcore.kernels.transport import pairs_triton_gpu as pairs
from perturbcore.kernels.transport import sinkhorn_triton_gpu as sinkhorn
from perturbcore.kernels.transport import wasserstein_triton_gpu as wasserstein

ROOT = Path(__file__).parent.parent
BUDGET = Path(__file__).with_name("kernels.json")
ARCHITECTURES = (80, 90)
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

WIDTHS = (
    "features",
    "hidden",
    "channels",
    "width",
    "a_stride",
    "b_stride",
    "x_stride",
)  # multiples of 16 where it matters
CSR = {"rowptr": "*i32", "col": "*i32"}
SPMM = CSR | {"edge": "*i32", "weight": "*fp32", "x": "*fp32", "out": "*fp32"}
SIZES = dict.fromkeys(("num_rows", "num_edges", "features", "terms"), "i32")
BLOCKS = {"ACCUMULATOR": tl.float32, "BLOCK_E": graph.BLOCK_EDGES}
SDDMM = CSR | {"a": "*fp32", "b": "*fp32", "out": "*fp32"} | SIZES | {"a_stride": "i32", "b_stride": "i32"}
SHAPE = dict.fromkeys(("num_rows", "num_edges", "heads", "channels"), "i32") | {"negative_slope": "fp64"}
GATV2 = {
    "forward": (gatv2._gatv2_fwd_kernel, (*CSR, "u", "v", "att", "y", "lse")),
    "attention": (gatv2._gatv2_attention_kernel, (*CSR, "u", "v", "att", "lse", "attention")),
    "by destination": (
        gatv2._gatv2_bwd_destination_kernel,
        (*CSR, "u", "v", "att", "y", "lse", "grad", "centre", "grad_v", "grad_att"),
    ),
    "by source": (
        gatv2._gatv2_bwd_source_kernel,
        ("t_rowptr", "t_col", "u", "v", "att", "lse", "grad", "centre", "grad_u"),
    ),
}
# gated pooling: the kernel, its tensors of floats, of integers, its sizes and other numbers, its constants
SLOPE = {"negative_slope": "fp64"}
CURVE = {"key_low": "i64", "key_high": "i64", "tau": "fp64", "shift": "fp64"}
SEEDED = {"SEEDED": True, "HARD": True, "WEIGHTED": True, "BLOCK": gate.BLOCK}
SUM = (("weight", "x", "out"), ("ptr", "other"), ("others", "entries", "features"), SLOPE)
POOL: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], tuple[str, ...], dict[str, str], dict[str, Any]]] = {
    "score": (
        *(pool._dense_score_kernel, ("a", "q", "w", "score"), (), ("queries", "nodes", "hidden"), SLOPE, pool.TILE),
    ),
    "gate": (gate._gate_kernel, ("score", "gate", "share"), (), ("pairs", "nodes"), CURVE, SEEDED),
    "gate backward": (
        *(gate._gate_bwd_kernel, ("score", "pull", "grad_size", "grad_gate", "grad_score"), ()),
        *(("pairs", "nodes", "queries"), CURVE, SEEDED),
    ),
    "sum": (
        *(pool._dense_sum_kernel, ("weight", "own", "x", "out"), ()),
        *(("rows", "others", "hidden", "row_stride", "other_stride"), SLOPE, pool.SUMS | {"CHUNK": pool.CHUNK}),
    ),
    "ragged score": (
        *(pool._ragged_product_kernel, ("x", "own", "w", "out"), ("row", "idx")),
        *(("queries", "nodes", "pairs", "features"), SLOPE, pool.PAIRS),
    ),
    "ragged gate": (gate._gate_kernel, ("score", "gate", "share"), ("row", "idx"), ("pairs", "nodes"), CURVE, SEEDED),
    "ragged sum": (pool._ragged_sum_kernel, *SUM, pool.PAIRS),
    "ragged sum by node": (*(pool._ragged_sum_kernel, ("own", *SUM[0]), ("order", *SUM[1]), *SUM[2:], pool.PAIRS),),
}
# message passing among selected nodes: the kernel, its int32 and floating tensors; with lists also these two
MASKED_SIZES = dict.fromkeys(("nodes", "edges", "queries", "entries"), "i64")
LISTS = {"place": "*i32", "query": "*i64", "node": "*i64"}
MASKED = {
    "gather": (masked._gather_kernel, ("ptr", "index", "edge"), ("weight", "mask", "values", "out"), ("rows", "terms")),
    "mask backward": (
        masked._mask_bwd_kernel,
        ("rowptr", "col", "t_rowptr", "t_col", "t_perm"),
        ("weight", "mask", "x", "grad", "grad_x", "grad_mask"),
        (),
    ),
    "weight backward": (masked._weight_bwd_kernel, ("row", "col"), ("mask", "x", "grad", "grad_weight"), ()),
}
# pairs of rows of two clouds: the kernel, its tensors of the input's type and of float64, other arguments, constants
PAIRS = dict.fromkeys(("rows", "columns", "features"), "i32")
STRIDES = {
    name: dict.fromkeys((f"{name}_batch", f"{name}_row", f"{name}_column"), "i32") for name in ("weight", "cost")
}
TRANSPORT: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], dict[str, str], dict[str, Any]]] = {
    "energy": (
        *(energy._distance_kernel, ("x", "y", "weight"), ("total",)),
        *(PAIRS | {"weight_batch": "i32", "weight_row": "i32", "scale": "fp64"}, pairs.BLOCKS | {"KEEP": True}),
    ),
    "pull": (
        *(pairs._pull_kernel, ("weight", "x", "y", "up", "grad"), ()),
        *(PAIRS | STRIDES["weight"], pairs.BLOCKS | {"ADD": True}),
    ),
    "cost": (sinkhorn._cost_kernel, ("x", "y"), ("cost",), PAIRS, pairs.BLOCKS | {"ROOT": True}),
    "softmin": (
        *(sinkhorn._softmin_kernel, (), ("cost", "height", "out")),
        *({"rows": "i32", "columns": "i32", "eps": "fp64"} | STRIDES["cost"], sinkhorn.TILE),
    ),
}
DRAW = {"key_low": "i64", "key_high": "i64", "row": "*i64", "column": "*i64", "out": "*fp32", "size": "i32"}

# name: kernel, types of its arguments, constants, warps; the configurations that the launchers use
Configuration = tuple[Any, dict[str, str], dict[str, Any], int]
CONFIGURATIONS: dict[str, Configuration] = {
    "draw": (common._draw_kernel, DRAW, {"LOGISTIC": True, "BLOCK": common.BLOCK}, 4),
}
for size in (64, 128):
    CONFIGURATIONS[f"sddmm d={size}"] = (graph._sddmm_kernel, SDDMM, BLOCKS | {"BLOCK_D": size}, graph.WARPS)
    for name, permuted in (("spmm", False), ("spmm transposed", True)):
        types = SPMM | SIZES | {"weight_stride": "i32", "x_stride": "i32"}
        constants = BLOCKS | {"WEIGHTED": True, "PERMUTED": permuted, "BLOCK_D": size}
        CONFIGURATIONS[f"{name} d={size}"] = (graph._spmm_fwd_kernel, types, constants, graph.WARPS)
for name, (kernel, tensors) in GATV2.items():
    for number, channels in (("fp32", 32), ("fp32", 128), ("fp64", 128)):
        types = {tensor: "*i32" if tensor.endswith(("rowptr", "col")) else f"*{number}" for tensor in tensors} | SHAPE
        constants = gatv2.blocks(channels)
        warps = constants.pop("num_warps")
        CONFIGURATIONS[f"gatv2 {name} {number} c={channels}"] = (kernel, types, constants, warps)
for name, (kernel, floats, integers, sizes, numbers, constants) in POOL.items():
    for number in ("fp32", "fp64"):
        types = (
            dict.fromkeys(floats, f"*{number}")
            | dict.fromkeys(integers, "*i64")
            | dict.fromkeys(sizes, "i32")
            | numbers
        )
        absent = {a: None for a in kernel.arg_names if a not in types and a not in constants}
        CONFIGURATIONS[f"gated_pool {name} {number}"] = (kernel, types, constants | absent, 4)


for name, (kernel, integers, floats, sizes) in MASKED.items():
    for form, lists in (("", {}), ("lists ", LISTS)):
        for number in ("fp32", "fp64"):
            types = dict.fromkeys(integers, "*i32") | dict.fromkeys(floats, f"*{number}") | MASKED_SIZES
            types |= dict.fromkeys((*sizes, "features"), "i32") | {
                a: t for a, t in lists.items() if a in kernel.arg_names
            }
            tile = masked.WEIGHTS if kernel is masked._weight_bwd_kernel else masked.blocks(128)
            constants = tile | {"SHARED": not lists}
            warps = constants.pop("num_warps")
            absent = {a: None for a in kernel.arg_names if a not in types and a not in constants}
            CONFIGURATIONS[f"masked_spmm {form}{name} {number}"] = (kernel, types, constants | absent, warps)
types = {"query": "*i64", "node": "*i64", "place": "*i32"} | MASKED_SIZES
del types["edges"]
CONFIGURATIONS["masked_spmm places"] = (masked._enter_kernel, types, {"BLOCK": masked.BLOCK_ENTRIES}, 4)
for name, (kernel, own, exact, numbers, constants) in TRANSPORT.items():
    for number, kind in (("fp32", tl.float32), ("fp64", tl.float64)):
        types = dict.fromkeys(own, f"*{number}") | dict.fromkeys(exact, "*fp64") | numbers
        typed = {"NUMBER": kind} if "NUMBER" in kernel.arg_names else {}
        CONFIGURATIONS[f"transport {name} {number}"] = (kernel, types, constants | typed, pairs.WARPS)

# the nearest rows: cosines in float64 of rows of either type
for number in ("fp32", "fp64"):
    types = {"unit": "*fp64", "norm": "*fp64", "rows": f"*{number}", "cosine": f"*{number}", "exclude": "*i64"}
    types |= dict.fromkeys(("queries", "number", "features", "excluded"), "i32") | {"first": "i64"}
    CONFIGURATIONS[f"cosine_topk {number}"] = (topk._cosine_kernel, types, topk.BLOCKS, topk.WARPS)

# per-gene distances: the places of one side against the other, and their sum
SORTED = {"x_group": "*i64", "x_ptr": "*i64", "y_ptr": "*i64"}
SORTED_SIZES = dict.fromkeys(("x_rows", "y_rows", "groups", "sides", "genes"), "i32")
for number in ("fp32", "fp64"):
    values = dict.fromkeys(("x", "y", "cost", "slope", "p"), f"*{number}")
    for name, power, shares in (("p=1", 1, False), ("p=2", 2, False), ("p=1.5", 0, False), ("p=1, weighted", 1, True)):
        ends = dict.fromkeys(("x_ends", "y_ends"), "*fp64" if shares else f"*{number}")
        constants = wasserstein.TILE | {"P": power, "WEIGHTED": shares}
        types = values | SORTED | ends | SORTED_SIZES
        CONFIGURATIONS[f"wasserstein_1d {name} {number}"] = (
            wasserstein._places_kernel,
            types,
            constants,
            wasserstein.WARPS,
        )
    types = {"cost": f"*{number}", "ptr": "*i64", "value": f"*{number}", "rows": "i32", "genes": "i32"}
    CONFIGURATIONS[f"wasserstein_1d sum {number}"] = (
        wasserstein._sum_kernel,
        types,
        wasserstein.SUM,
        wasserstein.WARPS,
    )

# choice among candidates: the kernel, its tensors, its sizes, other arguments, constants
KEYS = {"key_low": "i64", "key_high": "i64"}
TRIPLE = ("cells", "pert", "cand", "total", "bias", "mean", "rstd", "A2")
SUMMED = ("from_cells", "from_cand", "from_params", "from_mean", "from_rstd")
DROPPED = {"drop": "i32", "share": "fp64"} | KEYS
CHOICE: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], dict[str, str], dict[str, Any]]] = {
    "gumbel_select score": (
        *(choice._score_kernel, (*TRIPLE, "a2", "logits"), ("size", "number", "width")),
        *(DROPPED, choice.TILE | {"DROPPING": True}),
    ),
    "gumbel_select score backward": (
        *(choice._score_bwd_kernel, (*TRIPLE, "grad", *SUMMED), ("batch", "size", "number", "width")),
        *(DROPPED, choice.TILE_BACKWARD | {"DROPPING": True, "CELLS": choice.CELLS}),
    ),
    "gumbel_sigmoid": (
        *(sigmoid._gates_kernel, ("logits", "gates"), ("size", "columns"), {"tau": "fp64"} | KEYS),
        {"noise": None, "SEEDED": True, "HARD": True, "BLOCK": sigmoid.BLOCK},
    ),
    "gumbel_sigmoid backward": (
        *(sigmoid._gates_bwd_kernel, ("logits", "grad", "out"), ("size", "columns"), {"tau": "fp64"} | KEYS),
        {"noise": None, "SEEDED": True, "BLOCK": sigmoid.BLOCK},
    ),
}
for name, (kernel, floats, sizes, others, constants) in CHOICE.items():
    for number in ("fp32", "fp64"):
        types = dict.fromkeys(floats, f"*{number}") | dict.fromkeys(sizes, "i32") | others
        CONFIGURATIONS[f"{name} {number}"] = (kernel, types, constants, choice.WARPS)


def usage(binary: Path, architecture: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what each kernel of a cubin or shared library needs: registers and bytes a thread, shared bytes a block."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-arch", f"sm_{architecture}", "-res-usage", str(binary)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, registers, stack, shared, local in USAGE.findall(printed):
        registers = -(-int(registers) // 8) * 8  # what the hardware sets aside
        yield name, {"registers": registers, "stack": int(stack) + int(local), "shared": int(shared)}


def triton_kernels(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Compile each configuration for each architecture and yield what it needs."""
    binary = folder / "kernel.cubin"
    for name, (kernel, types, constants, warps) in CONFIGURATIONS.items():
        position = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
        source = ASTSource(
            fn=kernel,
            signature={argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
            constexprs={position[argument]: value for argument, value in constants.items()},
            attrs={
                position[a]: [["tt.divisibility", 16]] for a, kind in types.items() if a in WIDTHS or kind[0] == "*"
            },
        )
        for architecture in ARCHITECTURES:
            compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
            binary.write_bytes(compiled.asm["cubin"])
            [(_, needs)] = usage(binary, architecture)
            # shared memory is asked for at launch, so the binary does not know it
            yield f"triton {name} sm_{architecture}", needs | {"shared": compiled.metadata.shared}


def native_kernels(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Build the native library and yield what each of its kernels needs."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder), "build_cuda"]
    subprocess.run(command, check=True, cwd=ROOT)
    for architecture in ARCHITECTURES:
        for mangled, needs in usage(folder / "perturbcore" / "bindings" / "libperturbcore.so", architecture):
            name, width = re.search(r"\d([a-z_]+)(?:ILi(\d)E)?E", mangled.split("_cu_", 1)[1][8:]).groups()
            yield f"native {name}{f'<{width}>' if width else ''} sm_{architecture}", needs


def main() -> int:
    """Compare with the budget, or write it."""
    with tempfile.TemporaryDirectory() as name:
        needed = dict(triton_kernels(Path(name)))
        if shutil.which("nvcc"):
            needed |= native_kernels(Path(name))
        else:
            print("nvcc not found: the native kernels were not compiled")
    if "--write" in sys.argv[1:]:
        BUDGET.write_text("{\n" + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in needed.items()) + "\n}\n")
        return 0
    budget, failed = json.loads(BUDGET.read_text()), False
    for name, needs in needed.items():
        allowed = budget.get(name, {})
        over = [
            f"{what} {value} > {allowed.get(what)}" for what, value in needs.items() if value > allowed.get(what, -1)
        ]
        failed |= bool(over)
        print(f"{name:48}", *(f"{what} {value:6}" for what, value in needs.items()), *over, sep="  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
