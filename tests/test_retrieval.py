"""The index of named vectors: found by hand, excluded by name and by row, refusals by name, the same after loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import normal
from safetensors.torch import save_file

import perturbcore as pc
from perturbcore.training import RunError

NAMES = ["A", "B", "C", "D"]
VECTORS = torch.tensor([[1.0, 0], [2, 1], [0, 3], [-1, 0]])


@pytest.fixture
def index():
    return pc.retrieval.Index(NAMES, VECTORS)


def test_nearest_by_hand(index):
    similarity, row = index.search(torch.tensor([[4.0, 0], [0, 0.5]]), 3)
    assert row.tolist() == [[0, 1, 2], [2, 1, 0]]
    torch.testing.assert_close(similarity, torch.tensor([[1, 2 / 5**0.5, 0], [1, 1 / 5**0.5, 0]]))
    assert similarity.dtype == torch.float32
    assert (len(index), repr(index)) == (4, "Index(4 x 2)")


@pytest.mark.parametrize(
    "exclude",
    [
        ["A", None],
        [0, -1],
        [["A"], []],
        [("A", "nobody"), "nobody"],
        [[np.int64(0), "A"], []],
        np.array([0, -1]),
        torch.tensor([[0, 0], [-1, -1]]),
    ],
)
def test_left_out_by_name_or_row(index, exclude):
    _, row = index.search(np.array([[1, 0], [1, 0]], np.float32), 2, exclude)
    assert row.tolist() == [[1, 2], [0, 1]]


def test_more_than_remain_is_refused(index):
    index.search(VECTORS[:1], 3, ["A"])
    with pytest.raises(ValueError, match="k is 4; of 4 rows of the bank, exclude leaves query 0 only 3"):
        index.search(VECTORS[:1], 4, ["A"])
    with pytest.raises(ValueError, match="k is 5, more than the 4 rows"):
        index.search(VECTORS[:1], 5)
    with pytest.raises(ValueError, match="exclude holds an index outside"):
        index.search(VECTORS[:1], 1, [4])
    with pytest.raises(ValueError, match=r"exclude has shape \[2"):
        index.search(VECTORS[:1], 1, ["A", "B"])
    with pytest.raises(ValueError, match=r"exclude is 'A'; expected one entry for each query, such as \['A'\]"):
        index.search(VECTORS[:1], 1, "A")
    with pytest.raises(ValueError, match="query has a value in row 0 that is not finite"):
        index.search(VECTORS[:1] * torch.inf, 1)


@pytest.mark.parametrize(
    ("names", "vectors", "message"),
    [
        (["A", "B", "A", "B"], VECTORS, r"'A', 'B' are given more than once"),
        (NAMES, VECTORS * torch.tensor([[1], [0], [1], [0]]), r"'B', 'D' have vectors of zeros, which point nowhere"),
        (NAMES, VECTORS / torch.tensor([[1], [1], [0], [1]]), r"'C' have vectors that are not finite"),
        (NAMES[:3], VECTORS, r"vectors has shape \[4, 2\]; expected \[3, D\], one row for each name"),
        (NAMES, VECTORS[:, 0], r"vectors has shape \[4\]"),
        (NAMES, VECTORS[:, :0], r"vectors has shape \[4, 0\]"),
        ([], VECTORS[:0], r"vectors has shape \[0, 2\]"),
        (NAMES, VECTORS.long(), r"vectors has dtype torch.int64; expected torch.float32 or"),
        (
            [f"g{i}" for i in range(9)],
            torch.zeros(9, 2),
            r"'g0', 'g1', 'g2', 'g3', 'g4' and 4 more have vectors of zer",
        ),
    ],
)
def test_refusals_name_the_rows(names, vectors, message):
    with pytest.raises(ValueError, match=message):
        pc.retrieval.Index(names, vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_after_loading(tmp_path, dtype):
    index = pc.retrieval.Index(np.array([f"g{i}" for i in range(30)]), normal(30, 8, dtype=dtype))
    index.save(tmp_path / "index.safetensors")
    loaded = pc.retrieval.Index.load(str(tmp_path / "index.safetensors"))
    assert loaded.names == index.names
    assert torch.equal(loaded.vectors, index.vectors)
    query = normal(5, 8)
    for one, other in zip(index.search(query, 7), loaded.search(query, 7), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        pc.retrieval.Index.load(tmp_path / "absent.safetensors")
    (tmp_path / "broken").write_bytes(b"\x80\x04pickle")
    with pytest.raises(RunError, match="cannot be read"):
        pc.retrieval.Index.load(tmp_path / "broken")
    save_file({"vectors": VECTORS}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match="is not an index"):
        pc.retrieval.Index.load(tmp_path / "other.safetensors")


def test_vectors_that_change_afterwards_do_not_change_the_index():
    vectors = VECTORS.clone()
    index = pc.retrieval.Index(NAMES, vectors)
    vectors.neg_()
    assert index.search(VECTORS[:1], 1)[1].tolist() == [[0]]
