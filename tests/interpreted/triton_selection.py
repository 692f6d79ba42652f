"""Gates and choice among candidates in Triton against the reference; run by test_triton_graph.py in its own process."""

import functools

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference, normals

from perturbcore import ops
from perturbcore.kernels.selection import select_triton_gpu

# more than one block of candidates, of features, of cells; one of each; none
SIZES = [(2, 3, 17, 5), (1, 1, 1, 1), (1, 2, 3, 66), (1, 33, 2, 3), (0, 2, 3, 2), (1, 0, 3, 2), (1, 2, 0, 2)]


def operands(batch, size, number, width):
    triple = 3 * width
    shapes = (batch, size, width), (batch, width), (batch, number, width), (triple,), (triple,)
    maps = (width, triple), (width,), (2, width), (2,), (width, triple), (width,)
    return [t if t.dim() != 2 else t * t.shape[1] ** -0.5 for t in normals(*shapes, *maps)]


def select(**options):
    return lambda cells, pert, cand, *params: ops.gumbel_select(cells, pert, cand, ops.SelectParams(*params), **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gumbel_select(size, dtype):
    agrees_with_the_reference(select(seed=3, dropout=0.3), operands(*size), dtype)


@pytest.mark.parametrize("scale", ["set_std", "learned"])
def test_gumbel_select_soft_and_without_noise(scale):
    agrees_with_the_reference(select(scale=scale, hard=False, tau=0.8), operands(2, 3, 5, 4), torch.float64)


def test_noise_that_is_given():
    (noise,) = normals((2, 3, 5))
    agrees_with_the_reference(select(noise=noise), operands(2, 3, 5, 4), torch.float64)
    agrees_with_the_reference(functools.partial(ops.gumbel_sigmoid, noise=noise), normals((2, 3, 5)), torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 300), (0, 3), (3, 0)])
@pytest.mark.parametrize("seed", [None, -1, 2**40 + 3])
@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_sigmoid(shape, seed, hard):
    for dtype in DTYPES:
        agrees_with_the_reference(functools.partial(ops.gumbel_sigmoid, seed=seed, hard=hard), normals(shape), dtype)


def test_nan_stays_nan_in_a_hard_gate():
    with ops.backend("triton"):
        assert ops.gumbel_sigmoid(torch.tensor([float("nan")])).isnan().all()


def test_sizes_reach_beyond_one_block():
    for tile in (select_triton_gpu.TILE, select_triton_gpu.TILE_BACKWARD):
        assert SIZES[0][2] > tile["BLOCK_K"]
        assert SIZES[2][3] > tile["BLOCK_H"]
    assert SIZES[3][1] > select_triton_gpu.CELLS
