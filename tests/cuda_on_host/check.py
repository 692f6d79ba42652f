"""Run the kernels of a library built on the host shim, in memory that AddressSanitizer watches; exit 0 if right."""

import ctypes
import itertools
import sys
from pathlib import Path

import numpy as np

from perturbcore.bindings import native

LIBRARY = native.library(Path(sys.argv[1]))
RNG = np.random.default_rng(0)


def address(array):
    return None if array is None else array.ctypes.data


def random_graph(rows, cols, degree, hub):
    degrees = RNG.poisson(degree, rows)
    degrees[rows // 2] += hub
    rowptr = np.concatenate([[0], degrees.cumsum()]).astype(np.int32)
    return rowptr, RNG.integers(0, cols, rowptr[-1], dtype=np.int32)


def spmm(rowptr, col, edge, weight, x):
    rows, edges, batch, (_, cols, features) = rowptr.size - 1, col.size, max(len(x), len(weight)), x.shape
    out = np.full((batch, rows, features), np.nan, np.float32)
    size = LIBRARY.perturbcore_spmm_workspace_size(rows, edges, batch, features)
    workspace = np.full(size, 255, np.uint8)  # NaN, wherever it is read unwritten
    status = LIBRARY.perturbcore_spmm_f32(
        *(address(rowptr), address(col), address(edge)),
        *(address(weight), edges if len(weight) > 1 else 0, address(x), cols * features if len(x) > 1 else 0),
        *(address(out), rows, cols, edges, batch, features, address(workspace), size, None),
    )
    assert status == 0
    return out


def sddmm(rowptr, col, a, b, results):
    rows, edges, (_, cols, features) = rowptr.size - 1, col.size, b.shape
    out = np.full((results, edges), np.nan, np.float32)
    status = LIBRARY.perturbcore_sddmm_f32(
        *(address(rowptr), address(col), address(a), rows * features if len(a) > 1 else 0),
        *(address(b), cols * features if len(b) > 1 else 0, address(out)),
        *(rows, cols, edges, max(len(a), len(b)), features, results < max(len(a), len(b)), None),
    )
    assert status == 0
    return out


def close(result, expected):
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0)))


def sums():
    # a hub over several segments, many empty rows, one row, no edge; features for each width of load, and tails
    graphs = [(7, 5, 1, 0), (30, 20, 2, 600), (400, 50, 0.1, 0), (1, 4, 0, 300), (3, 9, 0, 0)]
    for (rows, cols, degree, hub), (weights, batch), features in zip(
        graphs * 2, itertools.cycle([(1, 1), (2, 2), (1, 2), (2, 1)]), itertools.cycle([3, 65, 34, 68, 33, 64, 132])
    ):
        rowptr, col = random_graph(rows, cols, degree, hub)
        edge = RNG.permutation(col.size).astype(np.int32)
        weight = RNG.standard_normal((weights, col.size), dtype=np.float32)
        x = RNG.standard_normal((batch, cols, features), dtype=np.float32)
        message = weight[:, edge, None].astype(np.float64) * x[:, col]
        expected = np.zeros((len(message), rows, features))
        np.add.at(expected, (slice(None), np.repeat(np.arange(rows), np.diff(rowptr))), message)
        out = spmm(rowptr, col, edge, weight, x)
        close(out, expected)
        assert (spmm(rowptr, col, edge, weight, x) == out).all()


def products():
    for rows, cols, degree, features in [(7, 5, 1, 3), (40, 30, 2, 65), (3, 9, 0, 8)]:
        rowptr, col = random_graph(rows, cols, degree, 0)
        a = RNG.standard_normal((2, rows, features), dtype=np.float32)
        for batch in (2, 1):
            b = RNG.standard_normal((batch, cols, features), dtype=np.float32)
            expected = (a[:, np.repeat(np.arange(rows), np.diff(rowptr))].astype(np.float64) * b[:, col]).sum(-1)
            close(sddmm(rowptr, col, a, b, results=2), expected)
            close(sddmm(rowptr, col, a, b, results=1), expected.sum(0, keepdims=True))


def corrupt_indices():
    """Nothing outside the arrays is touched, whatever the indices hold: the sanitizer would end the process."""
    anything = np.iinfo(np.int32)
    for _ in range(3):
        rowptr, col, edge = (RNG.integers(anything.min, anything.max, n, np.int32) for n in (41, 99, 99))
        weight, x = np.ones((1, 99), np.float32), np.ones((1, 40, 5), np.float32)
        spmm(rowptr, col, edge, weight, x)
        sddmm(rowptr, col, x, x, results=1)
    rowptr, col = random_graph(40, 40, 4, 0)
    col[::2] = 40
    weight, x = np.ones((1, col.size), np.float32), np.ones((1, 40, 1), np.float32)
    assert spmm(rowptr, col, None, weight, x).sum() == col[1::2].size  # an index outside is skipped


def refusals():
    rowptr, col = random_graph(4, 4, 2, 0)
    x = np.ones((1, 4, 3), np.float32)
    size = LIBRARY.perturbcore_spmm_workspace_size(4, col.size, 1, 3)
    workspace, out = np.empty(size, np.uint8), np.empty_like(x)

    def status(**changes):
        given = {"rowptr": address(rowptr), "col": address(col), "edge": None, "weight": None, "weight_stride": 0}
        given |= {"x": address(x), "x_stride": 0, "out": address(out), "rows": 4, "cols": 4, "edges": col.size}
        given |= {"batch": 1, "features": 3, "workspace": address(workspace), "size": size, "stream": None}
        return LIBRARY.perturbcore_spmm_f32(*(given | changes).values())

    assert status() == 0
    assert status(rows=-1) == status(batch=2**31) == status(features=2**31 - 2, batch=2**31 - 2, edges=2**31 - 2) == -1
    assert status(rowptr=None) == status(x=None) == status(out=None) == status(workspace=None) == -2
    assert status(x_stride=11) == status(weight_stride=1) == status(x_stride=-12) == -3
    assert status(size=size - 1) == -4
    for code in range(-5, 2):
        text = ctypes.string_at(LIBRARY.perturbcore_error_string(code)).decode()
        assert len(text) > 5, code


sums()
products()
corrupt_indices()
refusals()
