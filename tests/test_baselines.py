"""The five baselines: values by hand, honest choices, refusals."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from perturbcore.data import Condition, GeneEmbedding, KnowledgeGraph, MissingInput, Perturbation, Scale, Screen, Split
from perturbcore.models import BASELINES, load
from perturbcore.models.linear import GeneVectors, LinearResponse, Rows, adjacency_vectors, fit_ridge, left_out_with
from perturbcore.training import RunError

A, B, C, D, AB = (Perturbation(genes) for genes in (("A",), ("B",), ("C",), ("D",), ("A", "B")))
EFFECT = {A: [1.0, 0, 0], B: [0, 2.0, 0], C: [1.0, 2.0, 0], D: [0, 0, 3.0], AB: [1.0, 2.0, 0]}
VECTORS = GeneEmbedding("toy", ["A", "B", "C"], np.array([[1.0, 0], [0, 1], [1, 1]], np.float32))


@pytest.fixture
def screen():
    """Two lines; a response is its effect, doubled in line y; no noise."""
    rows, obs = [], []
    for line, base, gain in (("x", 1.0, 1.0), ("y", 2.0, 2.0)):
        for perturbation, effect in [(Perturbation(), [0, 0, 0]), *EFFECT.items()]:
            rows += [base + gain * np.array(effect)] * 2
            obs += [(str(perturbation), line)] * 2
    adata = anndata.AnnData(
        np.array(rows, np.float32),
        obs=pd.DataFrame(obs, columns=["perturbation", "line"], index=[f"c{i}" for i in range(len(obs))]),
        var=pd.DataFrame(index=["g1", "g2", "g3"]),
    )
    scale = Scale("log1p", None)
    return Screen(adata, scale, perturbation_key="perturbation", control_label="control", context_key="line")


def split(train, val, test):
    return Split("by hand", 0, *(tuple(Condition(*c) for c in part) for part in (train, val, test)))


def responses(model, screen, asked):
    """Predicted pseudobulk responses [P, G] of "line::label" conditions."""
    adata = model.predict(screen, asked)
    deltas = []
    for name in asked:
        line, label = name.split("::")
        cells = (adata.obs["line"] == line) & (adata.obs["perturbation"] == label)
        deltas.append(adata.X[cells.to_numpy()].mean(axis=0) - (1.0 if line == "x" else 2.0))
    return np.asarray(np.stack(deltas)).reshape(len(asked), -1)


SEEN = split([("x", A), ("x", B), ("y", A), ("y", B)], [("x", C)], [("x", AB), ("y", C), ("x", D), ("y", D)])
ASKED = ["x::A+B", "y::C", "x::D"]
MEAN_X, MEAN_Y = np.array([2, 4, 0]) / 3, np.array([1.0, 2.0, 0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("control_mean", [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("perturbation_mean", [MEAN_X, MEAN_Y, MEAN_X]),
        ("additive", [[1, 2, 0], [1, 2, 0], MEAN_X]),  # A + B; C as seen in line x; D never seen
    ],
)
def test_values_by_hand(screen, name, expected):
    model = BASELINES[name]().fit(screen, SEEN, progress=False)
    np.testing.assert_allclose(responses(model, screen, ASKED), expected, atol=1e-5)


def test_perturbation_mean_of_an_unseen_context_is_that_of_all(screen):
    only_x = split([("x", A), ("x", B)], [("x", C)], [("y", A)])
    model = BASELINES["perturbation_mean"]().fit(screen, only_x, progress=False)
    np.testing.assert_allclose(responses(model, screen, ["y::D"]), [MEAN_X], atol=1e-5)


def test_additive_names_what_it_had_to_replace(screen, capsys):
    adata = BASELINES["additive"]().fit(screen, SEEN, progress=False).predict(screen, ["x::D", "x::A"])
    assert set(adata.obs["fallback"]) == {"", "D was never perturbed alone: perturbation mean"}
    assert "falls back for 1 of 2 perturbations, such as D: D was never perturbed alone" in capsys.readouterr().err


def test_nearest_neighbour_takes_the_nearest_of_the_context(screen):
    model = BASELINES["nearest_neighbour"](embedding=VECTORS).fit(screen, SEEN, progress=False)
    model.k = 1
    np.testing.assert_allclose(responses(model, screen, ["x::A", "y::B"]), [[1, 0, 0], [0, 4, 0]], atol=1e-5)


def test_a_perturbation_without_direction_is_no_neighbour(screen):
    vectors = GeneEmbedding("toy", ["A", "B", "C"], np.array([[0.0, 0], [0, 1], [-1, -1]], np.float32))
    model = BASELINES["nearest_neighbour"](embedding=vectors).fit(screen, SEEN, progress=False)
    model.k = 2  # of B and C alone: A has cosine 0, more than C
    np.testing.assert_allclose(responses(model, screen, ["x::A+B"]), [[0.5, 2, 0]], atol=1e-5)


def test_ridge_recovers_a_linear_response(screen):
    linear = split([("x", A), ("x", B)], [("x", C)], [("x", AB)])
    model = BASELINES["ridge"](embedding=VECTORS).fit(screen, linear, progress=False)
    model.fitted, _ = fit_ridge(model._rows(), model.responses, np.arange(3))
    found = responses(model, screen, ["x::A+B"])
    assert np.abs(found - [[1, 2, 0]]).max() < 0.5
    assert found[0, 1] > found[0, 0] > abs(found[0, 2]) - 1e-9


@pytest.mark.parametrize("contexts", [1, 2])
def test_left_out_predictions_are_those_of_a_fit_without_the_group(contexts):
    random = np.random.default_rng(0)
    n = 12
    rows = Rows(random.normal(size=(n, 4)), np.array([f"c{i % contexts}" for i in range(n)]), np.ones(n))
    y, groups = random.normal(size=(n, 5)), np.arange(n) // 2
    fitted, left_out = fit_ridge(rows, y, groups, intercept=10.0)
    for group in range(6):
        keep = groups != group
        kernel = lambda a, b: (  # noqa: E731
            (a.vectors @ b.vectors.T) / fitted.scale * ((a.context[:, None] == b.context) if fitted.per_context else 1)
            + 10.0 * ((a.context[:, None] == b.context) + 1)
        )
        inner, outer = rows.at(np.flatnonzero(keep)), rows.at(np.flatnonzero(~keep))
        alpha = np.linalg.solve(kernel(inner, inner) + fitted.strength * np.eye(keep.sum()), y[keep])
        np.testing.assert_allclose(left_out[~keep], kernel(outer, inner) @ alpha, atol=1e-8)


def test_a_prediction_without_some_rows_is_that_of_a_fit_to_the_others():
    random = np.random.default_rng(1)
    rows, new = (Rows(random.normal(size=(n, 3)), np.full(n, "c"), np.ones(n)) for n in (9, 2))
    y = random.normal(size=(9, 4))
    fitted, _ = fit_ridge(rows, y, np.arange(9), intercept=10.0)
    left_out = np.zeros((2, 9), bool)
    left_out[0, [1, 4, 5]] = True
    keep = np.flatnonzero(~left_out[0])
    inner = rows.at(keep)
    kernel = lambda a, b: a.vectors @ b.vectors.T / fitted.scale + 20.0  # noqa: E731
    alpha = np.linalg.solve(kernel(inner, inner) + fitted.strength * np.eye(len(keep)), y[keep])
    found = fitted.without(left_out, new)
    np.testing.assert_allclose(found[0], (kernel(new, inner) @ alpha)[0], atol=1e-8)
    np.testing.assert_allclose(found[1], fitted(new)[1], atol=1e-12)


def test_what_is_left_out_is_as_new_as_the_test():
    train = SEEN.train
    assert left_out_with(train, [Condition("x", D)]) == ["A", "B", "A", "B"]
    assert left_out_with(train, [Condition("z", A)]) == ["x", "x", "y", "y"]
    assert left_out_with(train, [Condition("x", A)]) == ["x::A", "x::B", "y::A", "y::B"]
    assert left_out_with(train[:2], [Condition("z", A)]) == ["x::A", "x::B"]


def test_what_shares_a_gene_is_told_apart_from_what_the_vectors_say(screen):
    singles = split([("x", A), ("x", B), ("y", A), ("y", B)], [("x", C)], [("x", AB)])
    fitted, sharing, others = LinearResponse.fit(screen, singles, GeneVectors(VECTORS, None))
    np.testing.assert_allclose(sharing, 0, atol=1e-6)  # no two of the training perturbations share a gene
    assert others.shape == (4, 3)
    sharing, others = fitted([Condition("x", AB), Condition("x", C)], np.array([-1, -1]))
    np.testing.assert_allclose(others[0], 0, atol=1e-6)  # nothing but A and B was measured
    np.testing.assert_allclose(
        others[0] + sharing[0], fitted.ridge(fitted.ridge.rows.at(np.array([0, 1]))).sum(0), atol=1e-5
    )
    np.testing.assert_allclose(sharing[1], 0, atol=1e-6)


def test_neighbours_in_an_unseen_context_are_chosen_across_contexts(screen):
    new = split([("x", A), ("x", B), ("y", B), ("y", C)], [("x", C)], [("z", A)])
    model = BASELINES["nearest_neighbour"](embedding=VECTORS).fit(screen, new, progress=False)
    assert model.k == 1  # the same perturbation in the other line is nearest


def test_adjacency_vectors_stand_in_for_an_embedding(screen):
    graph = KnowledgeGraph("ring", ["A", "B", "C", "D"], [0, 1, 2, 3, 0], [1, 2, 3, 0, 2], directed=False)
    vectors = adjacency_vectors(graph, 3)
    assert vectors.shape == (4, 3)
    assert np.isfinite(vectors).all()
    model = BASELINES["ridge"](graph=graph).fit(screen, SEEN, progress=False)
    assert model.notes["gene vectors"] == "SVD of ring"


def test_what_has_a_vector_of_zeros_is_near_to_nothing(screen):
    zeros = GeneEmbedding("toy", [*VECTORS.genes, "D"], np.vstack([VECTORS.vectors, [[0, 0]]]))
    model = BASELINES["nearest_neighbour"](embedding=zeros).fit(screen, SEEN, progress=False)
    adata = model.predict(screen, ["x::D"])
    assert set(adata.obs["fallback"]) == {"no vector for one of its genes: perturbation mean"}
    np.testing.assert_allclose(responses(model, screen, ["x::D"]), [MEAN_X], atol=1e-5)
    for some in (GeneEmbedding("zeros", VECTORS.genes, VECTORS.vectors * 0), GeneEmbedding("other", ["D"], [[1.0, 0]])):
        with pytest.raises(MissingInput, match="None of the training perturbations has a gene vector"):
            BASELINES["nearest_neighbour"](embedding=some).fit(screen, SEEN, progress=False)


@pytest.mark.parametrize("name", ["nearest_neighbour", "ridge"])
def test_without_vectors_the_mean_is_named_and_strict_refuses(screen, name):
    model = BASELINES[name](embedding=VECTORS).fit(screen, SEEN, progress=False)
    np.testing.assert_allclose(responses(model, screen, ["x::D"]), [MEAN_X], atol=1e-5)
    strict = BASELINES[name](embedding=VECTORS, strict=True).fit(screen, SEEN, progress=False)
    with pytest.raises(MissingInput, match="no vector"):
        strict.predict(screen, ["x::D"])
    with pytest.raises(MissingInput, match="embedding or a knowledge graph"):
        BASELINES[name]().fit(screen, SEEN, progress=False)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_save_and_load_predict_the_same(screen, name, tmp_path):
    model = BASELINES[name](embedding=VECTORS).fit(screen, SEEN, progress=False, run_dir=tmp_path)
    loaded = load(tmp_path)
    first, second = (m.predict(screen, ASKED, n_cells=3, seed=1) for m in (model, loaded))
    np.testing.assert_array_equal(np.asarray(first.X), np.asarray(second.X))
    with pytest.raises(RunError, match="already holds a run"):
        model.fit(screen, SEEN, progress=False, run_dir=tmp_path)


def test_only_the_same_fit_is_resumed_and_only_a_fit(screen, tmp_path):
    def resume(folder, embedding=VECTORS, split=SEEN, seed=0, **options):
        model = BASELINES["ridge"](embedding=embedding, **options)
        return model.fit(screen, split, run_dir=folder, seed=seed, resume=True, progress=False)

    first = resume(tmp_path / "new")
    again = resume(tmp_path / "new")
    np.testing.assert_array_equal(first.predict(screen, ASKED).X, again.predict(screen, ASKED).X)
    toy = GeneEmbedding("toy", VECTORS.genes, 2 * VECTORS.vectors)
    graph = KnowledgeGraph("g", ["A", "B"], [0], [1])
    for options, difference in (
        ({"seed": 1}, "seed was 0, is 1$"),
        ({"strict": True}, "config.strict was False, is True$"),
        ({"embedding": toy}, r"embedding was 'toy \w{16}', is 'toy \w{16}'$"),
        ({"graph": graph}, r"graph was None, is 'g \w{16}'$"),
        ({"split": split([("x", A)], [("y", C)], [("x", D)])}, r"split was '\w{16}', is '\w{16}'$"),
    ):
        with pytest.raises(RunError, match=difference):
            resume(tmp_path / "new", **options)
    (tmp_path / "manifest.json").write_text("of something else")
    with pytest.raises(RunError, match="no fit to go on with"):
        resume(tmp_path)


def test_a_direction_that_never_trained_is_a_fallback_of_all_that_learn(screen, capsys):
    labels = screen.adata.obs["perturbation"].to_numpy()
    options = {"perturbation_key": "perturbation", "control_label": "control", "context_key": "line"}
    mixed = Screen(screen.adata, screen.scale, **options, direction=np.where(labels == "D", 1, -1))
    missing = "activation was never trained on: what repression or knock-out does stands in"
    for name, kind in BASELINES.items():
        predicted = kind(embedding=VECTORS).fit(mixed, SEEN, progress=False).predict(mixed, ["x::A+B", "x::D"])
        told = predicted.uns["fallback"].get("D", "")
        assert told.endswith(missing) == (name != "control_mean")
        assert "A+B" not in predicted.uns["fallback"]
    assert missing in capsys.readouterr().err
    strict = BASELINES["perturbation_mean"](strict=True).fit(mixed, SEEN, progress=False)
    with pytest.raises(MissingInput, match=missing):
        strict.predict(mixed, ["x::D"])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_test_responses_change_nothing(screen, name):
    other = screen.adata.copy()
    for condition in SEEN.test:
        other.X[screen.cells(condition)] += 5
    options = {"perturbation_key": "perturbation", "control_label": "control", "context_key": "line"}
    changed = Screen(other, screen.scale, **options)
    first, second = (BASELINES[name](embedding=VECTORS).fit(s, SEEN, progress=False) for s in (screen, changed))
    np.testing.assert_array_equal(first.predict(screen, ASKED).X, second.predict(screen, ASKED).X)


def test_unknown_options_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"no option 'strictt'.*Did you mean 'strict'"):
        BASELINES["ridge"](strictt=True)
    with pytest.raises(ValueError, match="no preset 'papper'"):
        BASELINES["ridge"](preset="papper")
