import gzip
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbcore.data import DataError, GeneEmbedding, KnowledgeGraph, check_shared_names, identifier_kind


def edges(graph: KnowledgeGraph) -> list[tuple[str, str]]:
    return [(str(graph.nodes[s]), str(graph.nodes[d])) for s, d in zip(graph.src, graph.dst, strict=True)]


def chain() -> KnowledgeGraph:
    """A > B > C > D, and E alone."""
    return KnowledgeGraph.from_edges("chain", ["A", "B", "C"], ["B", "C", "D"], nodes=["E"])


def test_edges_are_canonical_whatever_their_order() -> None:
    graph = KnowledgeGraph(
        "g", ["C", "A", "B"], [0, 1, 1, 0], [1, 0, 2, 0], weight=[0.1, 0.2, 0.3, 0.4], sign=[1, -1, 0, 1]
    )
    assert list(graph.nodes) == ["A", "B", "C"]
    assert edges(graph) == [("C", "A"), ("A", "B"), ("A", "C"), ("C", "C")]
    np.testing.assert_allclose(graph.weight, [0.1, 0.3, 0.2, 0.4])
    np.testing.assert_array_equal(graph.sign, [1, 0, -1, 1])


def test_duplicates_keep_the_greatest_weight_and_only_an_undisputed_sign() -> None:
    graph = KnowledgeGraph.from_edges("g", list("AAAB"), list("BBBA"), weight=[0.1, 0.9, 0.5, 0.2], sign=[1, 1, 1, -1])
    assert edges(graph) == [("B", "A"), ("A", "B")]
    np.testing.assert_allclose(graph.weight, [0.2, 0.9])
    np.testing.assert_array_equal(graph.sign, [-1, 1])
    disputed = KnowledgeGraph.from_edges("g", list("AA"), list("BB"), sign=[1, -1])
    np.testing.assert_array_equal(disputed.sign, [0])


def test_undirected_graphs_hold_both_directions_once() -> None:
    graph = KnowledgeGraph.from_edges("g", list("ABC"), list("BAC"), weight=[0.3, 0.7, 1.0], directed=False)
    assert edges(graph) == [("B", "A"), ("A", "B"), ("C", "C")]
    np.testing.assert_allclose(graph.weight, [0.7, 0.7, 1.0])


def test_index_marks_missing_genes() -> None:
    np.testing.assert_array_equal(chain().index(["D", "A", "Z", "", "E"]), [3, 0, -1, -1, 4])
    assert KnowledgeGraph("empty", [], [], []).index(["A"]).tolist() == [-1]


def test_top_k_keeps_the_strongest_in_edges() -> None:
    graph = KnowledgeGraph.from_edges("g", list("ABCDAB"), list("EEEEFF"), weight=[0.1, 0.9, 0.5, 0.5, 0.3, 0.2])
    assert edges(graph.top_k(2)) == [("B", "E"), ("C", "E"), ("A", "F"), ("B", "F")]
    plain = KnowledgeGraph.from_edges("g", list("DCBA"), list("EEEE"))
    assert edges(plain.top_k(3)) == [("A", "E"), ("B", "E"), ("C", "E")]
    assert list(graph.top_k(1).nodes) == list(graph.nodes)
    with pytest.raises(DataError, match="positive"):
        graph.top_k(0)


def test_balls_walk_both_directions_and_skip_missing_genes() -> None:
    ptr, idx = chain().balls([("C",), ("A", "Z"), ("Z",), (), ("E",), ("A", "D")], 1)
    np.testing.assert_array_equal(ptr, [0, 3, 5, 5, 5, 6, 10])
    np.testing.assert_array_equal(idx, [1, 2, 3, 0, 1, 4, 0, 1, 2, 3])
    ptr, idx = chain().balls([("A",)], 0)
    np.testing.assert_array_equal(idx, [0])
    with pytest.raises(DataError, match="hops"):
        chain().balls([("A",)], -1)


def test_neighbourhood_is_induced() -> None:
    near = chain().neighbourhood(["A"], 2)
    assert list(near.nodes) == ["A", "B", "C"]
    assert edges(near) == [("A", "B"), ("B", "C")]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=25), st.integers(0, 4), st.integers(0, 7))
def test_balls_agree_with_breadth_first_search(pairs: list[tuple[int, int]], hops: int, start: int) -> None:
    names = [f"n{i}" for i in range(8)]
    graph = KnowledgeGraph("g", names, [s for s, _ in pairs], [d for _, d in pairs])
    reached = {start}
    for _ in range(hops):
        reached |= {d for s, d in pairs if s in reached} | {s for s, d in pairs if d in reached}
    ptr, idx = graph.balls([(names[start],)], hops)
    assert idx.tolist() == sorted(reached)
    assert ptr.tolist() == [0, len(reached)]


def test_shells_part_what_lies_downstream_from_the_rest() -> None:
    ptr, idx = chain().shells([("B",), ("Z",), ("A", "D", "Z")], 2)
    rows = [idx[start:end].tolist() for start, end in pairwise(ptr)]
    assert rows == [[2], [0], [3], [], [], [], [], [], [1], [2], [], []]
    ptr, idx = chain().shells([("B",)], 0)
    assert (ptr.tolist(), idx.tolist()) == ([0], [])
    assert chain().shells([], 2)[0].tolist() == [0]
    with pytest.raises(DataError, match="hops"):
        chain().shells([("A",)], -1)


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=25),
    st.integers(1, 4),
    st.lists(st.sets(st.integers(0, 7), max_size=3), max_size=3),
)
def test_shells_agree_with_breadth_first_search(
    pairs: list[tuple[int, int]], hops: int, starts: list[set[int]]
) -> None:
    names = [f"n{i}" for i in range(8)]
    graph = KnowledgeGraph("g", names, [s for s, _ in pairs], [d for _, d in pairs])
    expected = []
    for start in starts:
        near, reached = set(start), set(start)
        for _ in range(hops):
            far = near | {d for s, d in pairs if s in near} | {s for s, d in pairs if d in near}
            reached = reached | {d for s, d in pairs if s in reached}
            expected += [sorted((far - near) & reached), sorted(far - near - reached)]
            near = far
    ptr, idx = graph.shells([tuple(names[i] for i in start) for start in starts], hops)
    assert [idx[begin:end].tolist() for begin, end in pairwise(ptr)] == expected


def test_impossible_edges_are_refused() -> None:
    for arguments, message in (
        ({"src": [0, 2], "dst": [1, 1]}, "src names node 2 of 2 nodes"),
        ({"src": [0], "dst": [-1]}, "dst names node -1"),
        ({"src": [0, 1], "dst": [1]}, "one value per edge"),
        ({"src": [0.5], "dst": [1]}, "whole numbers"),
        ({"src": [0], "dst": [1], "weight": [-1.0]}, "at least 0"),
        ({"src": [0], "dst": [1], "weight": [np.nan]}, "finite"),
        ({"src": [0], "dst": [1], "sign": [2]}, "-1, 0 or"),
    ):
        with pytest.raises(DataError, match=message):
            KnowledgeGraph("g", ["A", "B"], **arguments)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="twice"):
        KnowledgeGraph("g", ["A", "A"], [], [])


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_tables_are_read_by_their_usual_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signed = KnowledgeGraph.read(
        write(tmp_path / "signed.csv.gz", "tf,target,sign\nA,B,activation\nB,NA,-1\nC,,1\nA,C,?\n")
    )
    assert signed.directed
    assert edges(signed) == [("A", "B"), ("A", "C"), ("B", "NA")]  # NA is a gene, an empty field is none
    np.testing.assert_array_equal(signed.sign, [1, 0, -1])
    assert "1 of 4 rows dropped" in capsys.readouterr().out
    weighted = KnowledgeGraph.read(write(tmp_path / "w.tsv", "protein1\tprotein2\tcombined_score\nA\tB\t900\n"))
    assert not weighted.directed
    assert edges(weighted) == [("B", "A"), ("A", "B")]
    np.testing.assert_array_equal(weighted.weight, [900, 900])
    assert "both directions made" in capsys.readouterr().out
    both = KnowledgeGraph.read(write(tmp_path / "s.csv", "source,target,weight\nA,B,-0.5\nA,C,2\n"), verbose=False)
    np.testing.assert_array_equal(both.sign, [-1, 1])
    np.testing.assert_allclose(both.weight, [0.5, 2])
    assert capsys.readouterr().out == ""


def test_named_columns_go_before_usual_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "source,target,source_gene,target_locus,sign\nAccB,accB,accB,b1,-1\n")
    graph = KnowledgeGraph.read(path, source="source_gene", target="target_locus", sign=None, verbose=False)
    assert edges(graph) == [("b1", "accB"), ("accB", "b1")]


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("t.csv", "x,y\nA,B\n", {}, "no column with a usual name of the source gene"),
        ("t.csv", "source,y\nA,B\n", {}, "usual name of the target gene"),
        ("t.csv", "source,target\nA,B\n", {"source": "sourse"}, "Did you mean 'source'"),
        ("t.csv", "source,target\nA,B\n", {"target": "source"}, "the same column"),
        ("t.csv", "source,target,sign\nA,B,often\n", {}, "such as 'often'"),
        ("t.csv", "source,target,weight\nA,B,high\n", {}, "such as 'high'"),
        ("t.csv", "source,target,sign,weight\nA,B,1,-2\n", {}, "is negative where no sign says"),
        ("t.csv", "source,target\nA,\n", {}, "no row with both"),
        ("t.csv", "", {}, "Cannot read the table"),
        ("t.csv.gz", "", {}, "Cannot read the table|no column|no row"),
        ("t.docx", "A B", {}, "of no known kind"),
        ("t.gmt", "set only\n", {}, "Line 1 of"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, text: str, arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        KnowledgeGraph.read(write(tmp_path / name, text), **arguments)


def test_a_missing_or_truncated_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        KnowledgeGraph.read(tmp_path / "none.csv")
    whole = gzip.compress(b"source,target\n" + b"A,B\n" * 1000)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="Cannot read"):
        KnowledgeGraph.read(tmp_path / "cut.csv.gz")


def test_gene_sets_join_their_members(tmp_path: Path) -> None:
    path = write(tmp_path / "sets.gmt", "one\turl\tA\tB\tC\ntwo\turl\tB\tC\nbig\turl\t" + "\t".join("ABCDEF") + "\n")
    graph = KnowledgeGraph.from_gene_sets("s", {"one": ("A", "B", "C"), "two": ("B", "C")})
    weight = dict(zip(edges(graph), graph.weight, strict=True))
    assert weight == pytest.approx(
        {(a, b): 1.5 if {a, b} == {"B", "C"} else 0.5 for a in "ABC" for b in "ABC" if a != b}
    )
    read = KnowledgeGraph.read(path, verbose=False)
    assert (read.num_nodes, read.num_edges) == (6, 30)
    capped = KnowledgeGraph.from_gene_sets("s", {"one": tuple("ABC"), "big": tuple("ABCDEF")}, max_size=3)
    assert (capped.num_nodes, capped.num_edges) == (6, 6)
    with pytest.raises(DataError, match="join no genes"):
        KnowledgeGraph.from_gene_sets("s", {"one": ("A",)})


def test_names_of_another_kind_are_refused_in_words() -> None:
    ensembl = [f"ENSG{i:011d}" for i in range(5)]
    assert identifier_kind(ensembl) == "Ensembl ids"
    assert identifier_kind([f"{name}.2" for name in ensembl]) == "Ensembl ids"
    assert identifier_kind(["7157", "1017"]) == "Entrez ids"
    assert identifier_kind(["TP53", "ENSA"]) == "gene symbols"
    assert identifier_kind([f"9606.ENSP{i:011d}" for i in range(5)]) == "Ensembl ids"
    check_shared_names(["TP53", "X"], ["TP53"], "graph")
    check_shared_names([], ["TP53"], "graph")
    with pytest.raises(DataError, match=r"by Ensembl ids \(ENSG0.*the graph by gene symbols \(TP53"):
        check_shared_names(ensembl, ["TP53", "KLF1"], "graph")
    with pytest.raises(DataError, match="same species"):
        check_shared_names(["tp53"], ["TP53"], "graph")


def test_embedding_lookup_never_invents_a_vector(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", genes=np.array(["B", "A"]), embedding=np.array([[1, 2], [3, 4]], np.float64))
    embedding = GeneEmbedding.read(tmp_path / "e.npz")
    vectors, found = embedding.lookup(["A", "Z", "B"])
    assert (vectors.dtype, embedding.dim) == (np.float32, 2)
    np.testing.assert_array_equal(found, [True, False, True])
    np.testing.assert_array_equal(vectors[found], [[3, 4], [1, 2]])
    assert np.isnan(vectors[~found]).all()


def test_embeddings_come_from_tables_and_plain_pickles(tmp_path: Path) -> None:
    write(tmp_path / "e.csv", "gene,0,1\nA,1,2\nNA,3,4.5\n")
    table = GeneEmbedding.read(tmp_path / "e.csv")
    assert list(table.genes) == ["A", "NA"]
    lists, arrays = {"A": [1.0, 2.0], "NA": [3.0, 4.5]}, {"A": np.array([1, 2.0]), "NA": np.array([3, 4.5])}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        # Before protocol 3 an array holds a call to a codec, which is refused like any other.
        for values in (lists, arrays) if protocol >= 3 else (lists,):
            (tmp_path / "e.pickle").write_bytes(pickle.dumps(values, protocol))
            np.testing.assert_array_equal(GeneEmbedding.read(tmp_path / "e.pickle").vectors, table.vectors)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"A": Evil()}))
    with pytest.raises(DataError, match=r"it would load posix\.mkdir|nt\.mkdir"):
        GeneEmbedding.read(tmp_path / "e.pkl")
    assert not (tmp_path / "evil").exists()
    np.savez(tmp_path / "e.npz", genes=np.array([Evil()], object), embedding=np.zeros((1, 2)))
    with pytest.raises(DataError, match="Cannot read"):
        GeneEmbedding.read(tmp_path / "e.npz")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("genes", "vectors", "message"),
    [
        (["A", "A"], np.ones((2, 2)), "more than once: A"),
        (["A"], np.ones((2, 2)), "one row of numbers per gene"),
        (["A"], np.ones(1), "one row of numbers per gene"),
        (["A", "B"], np.array([[1.0], [np.nan]]), "non-finite numbers for 1 genes: B"),
        (["A"], np.array([["x"]]), "not numbers"),
    ],
)
def test_bad_embeddings_are_refused(genes: list[str], vectors: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        GeneEmbedding("e", genes, vectors)


def test_bad_embedding_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", vectors=np.ones((1, 2)))
    with pytest.raises(DataError, match="needs arrays"):
        GeneEmbedding.read(tmp_path / "e.npz")
    with pytest.raises(DataError, match="holds text in columns b"):
        GeneEmbedding.read(write(tmp_path / "e.csv", "gene,a,b\nA,1,x\n"))
    for table in ("0,1\n0.5,2\n0.25,3\n", "gene,0\nA,1\n,2\n"):
        with pytest.raises(DataError, match="must name a gene in every row"):
            GeneEmbedding.read(write(tmp_path / "e.csv", table))
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"A": [1.0], "B": [1.0, 2.0]}))
    with pytest.raises(DataError, match="one length"):
        GeneEmbedding.read(tmp_path / "e.pkl")
    (tmp_path / "e.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="dict of gene"):
        GeneEmbedding.read(tmp_path / "e.pkl")
    (tmp_path / "e.pkl").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no plain pickle"):
        GeneEmbedding.read(tmp_path / "e.pkl")


DATA = Path(os.environ.get("PERTURBCORE_DATA", ""))
real = pytest.mark.skipif(
    not os.environ.get("PERTURBCORE_DATA"), reason="PERTURBCORE_DATA names no folder of real tables"
)


@real
@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "arguments", "genes", "num_edges"),
    [
        ("networks/collectri_human.csv.gz", {}, None, 43178),
        ("networks/dorothea_abc_human.csv.gz", {}, None, 13223),
        ("networks/trrust_v2_human.csv.gz", {}, None, 8427),
        ("networks/string_v12_human_no_textmining.csv.gz", {}, 17288, 2 * 174962),
        ("ecoli/trn_regulondb_ecocyc.csv.gz", {"source": "source_gene", "target": "target_locus"}, None, None),
        ("gene_sets/msigdb_hallmark_human.gmt.gz", {}, None, None),
    ],
)
def test_real_tables_are_read(file: str, arguments: dict, genes: int | None, num_edges: int | None) -> None:
    graph = KnowledgeGraph.read(DATA / file, **arguments, verbose=False)
    assert genes is None or graph.num_nodes == genes
    assert num_edges is None or graph.num_edges == num_edges
    assert graph.directed != file.startswith(("networks/string", "gene_sets"))


@real
@pytest.mark.data
def test_real_embeddings_are_read() -> None:
    assert GeneEmbedding.read(DATA / "gene_text/gene_text_lsa128.npz").vectors.shape == (17375, 128)
    assert GeneEmbedding.read(DATA / "gene_text/genept_ada002_adamson86.npz").dim == 1536
