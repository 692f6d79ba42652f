"""The native CUDA library, loaded with ctypes; its C interface is csrc/include/perturbcore.h."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from perturbcore.bindings.backend import BackendError
from perturbcore.kernels.graph.structure import spmm_batch

ABI_VERSION = 1
LIBRARY = Path(__file__).with_name("libperturbcore.so")

INDICES, STRIDED = [c_void_p], [c_void_p, c_int64]
SIGNATURES = {
    "perturbcore_abi_version": (c_int, []),
    "perturbcore_error_string": (c_char_p, [c_int]),
    "perturbcore_spmm_workspace_size": (c_size_t, [c_int64] * 4),
    "perturbcore_spmm_f32": (
        c_int,
        [*INDICES * 3, *STRIDED * 2, c_void_p, *[c_int64] * 5, c_void_p, c_size_t, c_void_p],
    ),
    "perturbcore_sddmm_f32": (c_int, [*INDICES * 2, *STRIDED * 2, c_void_p, *[c_int64] * 5, c_int, c_void_p]),
}


@functools.cache
def library(path: Path = LIBRARY) -> ctypes.CDLL:
    """Return the native library, its functions' types declared; raise BackendError where it cannot be used."""
    if not path.exists():
        raise BackendError(
            f"The native library {path} was not built; reinstall perturbcore with PERTURBCORE_CUDA=1 and nvcc."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"The native library {path} cannot be loaded: {error}.") from error
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise BackendError(
                f"The native library {path} has no {name}; it is of another version: reinstall perturbcore."
            )
        function.restype, function.argtypes = result, arguments
    version = loaded.perturbcore_abi_version()
    if version != ABI_VERSION:
        raise BackendError(
            f"The native library {path} has interface {version}, expected {ABI_VERSION}: reinstall perturbcore."
        )
    return loaded


def why_unavailable(path: Path = LIBRARY) -> str | None:
    """Return why the native library cannot be used, or None where it can."""
    try:
        library(path)
    except BackendError as error:
        return str(error)
    return None


def _call(name: str, device: torch.device, *arguments: object) -> None:
    """Call a function on the current stream of ``device`` and raise RuntimeError on any status but success."""
    with torch.cuda.device(device):
        status = getattr(library(), name)(*arguments, torch.cuda.current_stream().cuda_stream)
    if status:
        raise RuntimeError(f"{name}: {library().perturbcore_error_string(status).decode()} (status {status}).")


def _strided(values: Tensor | None) -> tuple[int | None, int]:
    """Return the address of the first batch element and the elements between two of them: 0 where all share one."""
    if values is None:
        return None, 0
    return values.data_ptr(), values.stride(0) if values.shape[0] > 1 else 0


def _float32(name: str, values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        raise BackendError(
            f"Backend 'cuda' computes in float32; {name} is {values.dtype}. Convert it, or choose 'triton'."
        )
    return values.contiguous()


def _int32(name: str, index: Tensor, device: torch.device) -> Tensor:
    if index.dtype != torch.int32 or index.device != device:
        raise ValueError(f"{name} is {index.dtype} on {index.device}; expected torch.int32 on {device}.")
    return index.contiguous()


def _spmm(rowptr: Tensor, col: Tensor, edge: Tensor | None, weight: Tensor | None, x: Tensor, batch: int) -> Tensor:
    x = _float32("x", x)
    weight = None if weight is None else _float32("weight", weight)
    rows, edges, (_, cols, features) = rowptr.numel() - 1, col.numel(), x.shape
    out = x.new_empty(batch, rows, features)
    workspace = x.new_empty(library().perturbcore_spmm_workspace_size(rows, edges, batch, features), dtype=torch.uint8)
    rowptr, col = _int32("rowptr", rowptr, x.device), _int32("col", col, x.device)
    edge = None if edge is None else _int32("t_perm", edge, x.device)
    _call(
        "perturbcore_spmm_f32",
        x.device,
        *(rowptr.data_ptr(), col.data_ptr(), None if edge is None else edge.data_ptr()),
        *_strided(weight),
        *_strided(x),
        out.data_ptr(),
        *(rows, cols, edges, batch, features),
        *(workspace.data_ptr(), workspace.numel()),
    )
    return out


def _sddmm(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, batch: int, results: int) -> Tensor:
    a, b = _float32("a", a), _float32("b", b)
    rows, edges = rowptr.numel() - 1, col.numel()
    out = a.new_empty(results, edges)
    rowptr, col = _int32("rowptr", rowptr, a.device), _int32("col", col, a.device)
    _call(
        "perturbcore_sddmm_f32",
        a.device,
        *(rowptr.data_ptr(), col.data_ptr()),
        *_strided(a),
        *_strided(b),
        out.data_ptr(),
        *(rows, b.shape[1], edges, batch, a.shape[2]),
        results != batch,
    )
    return out


def spmm(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, weight: Tensor | None, x: Tensor
) -> Tensor:
    """Return y[b, i] = Σ over edges e: j → i of weight[b, e] · x[b, j], float32 [B, N, D].

    Arguments as in ``perturbcore.kernels.graph.reference.spmm``. Beside the output it takes a workspace of
    (N + E) / 256 rows of B · D floats. An index out of range is skipped: to refuse it would be to wait for the device.
    """
    batch = spmm_batch(rowptr, col, weight, x)
    return _spmm(rowptr, col, None, weight, x, batch)


def spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    grad: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weight``, in their shapes, from ``grad`` [B, N, D]; empty if not needed."""
    batch = spmm_batch(rowptr, col, weight, x, t_perm, grad)
    spmm_batch(t_rowptr, t_col, weight, x, t_perm, grad)
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = _spmm(t_rowptr, t_col, t_perm, weight, grad, batch)
        grad_x = grad_x if x.shape[0] == grad.shape[0] else grad_x.sum(0, keepdim=True)
    if need_weight and weight is not None:
        grad_weight = _sddmm(rowptr, col, grad, x, batch, weight.shape[0])
    return grad_x, grad_weight
