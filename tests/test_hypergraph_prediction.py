"""Predictions of hyperedges: scores by definition, and an evaluation that leaks nothing and treats ties fairly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from surgery.errors import InputError
from surgery.hypergraph import PREDICTORS, Hypergraph, evaluate, hold_out, pairs, predict
from surgery.hypergraph.evaluation import auc, r_precision
from surgery.hypergraph.negatives import NEGATIVES, sample
from tests.hypergraph_cases import by_chance, hypergraphs

METHODS = ["neighbours", "pairs", "katz", "resource", "hpra"]


@given(hypergraphs(sizes=(2, 3, 4)))
def test_scores_are_what_they_are_by_definition(h: Hypergraph) -> None:
    weights = pairs(h).toarray()
    degrees = weights.sum(axis=1)
    ties = (weights > 0).astype(float)
    sent = weights / np.where(degrees > 0, degrees, 1.0) @ weights.T
    step = weights * (0.5 / np.abs(np.linalg.eigvalsh(weights)).max())
    walks = np.linalg.inv(np.eye(h.nodes) - step) - np.eye(h.nodes)
    wanted = {"neighbours": ties @ ties, "pairs": weights, "resource": sent, "hpra": weights + sent, "katz": walks}
    candidates = [(0, 1), (2, 1, 3), (3, 0, 1, 2), (0, 1)]
    for method, matrix in wanted.items():
        mean = [np.mean([matrix[a, b] for i, a in enumerate(c) for b in c[i + 1 :]]) for c in candidates]
        assert_allclose(predict(h, candidates, method=method), mean, atol=1e-6)  # type: ignore[arg-type]


def test_the_tensor_scores_by_what_a_hyperedge_would_cost() -> None:
    h = by_chance(30, 4, 80, seed=0)
    inside, across = h.table()[:5], np.array([[0, 8, 15, 22], [3, 11, 19, 26]])
    found = predict(h, np.concatenate([inside, across]), method="tensor")
    assert (found <= 1e-12).all()
    with pytest.raises(InputError, match="size 4, as the hyperedges have"):
        predict(h, [(0, 1, 2)], method="tensor")


def test_candidates_are_checked() -> None:
    h = by_chance(12, 3, 20, seed=0)
    assert predict(h, []).shape == (0,)
    for candidates, said in (([(0, 0, 1)], "stands twice"), ([(0, 40)], "0 to 11"), ([(3,)], "two nodes or more")):
        with pytest.raises(InputError, match=said):
            predict(h, candidates)
    with pytest.raises(InputError, match="neighbours, pairs"):
        predict(h, [(0, 1)], method="luck")  # type: ignore[arg-type]


@given(hypergraphs(sizes=(2, 3), most=9), st.integers(0, 1000))
def test_what_is_held_out_is_gone_and_no_node_loses_all(h: Hypergraph, seed: int) -> None:
    try:
        split = hold_out(h, 0.3, rng=np.random.default_rng(seed))
    except InputError:
        return  # each hyperedge has a node of its own
    rows = [tuple(h.pins[a:b].tolist()) for a, b in zip(h.starts[:-1], h.starts[1:], strict=True)]
    train = split.train
    left = [tuple(train.pins[a:b].tolist()) for a, b in zip(train.starts[:-1], train.starts[1:], strict=True)]
    assert sorted([*left, *split.held_out]) == sorted(rows)
    assert ((train.degrees > 0) == (h.degrees > 0)).all()


def test_training_never_sees_a_hyperedge_that_was_held_out() -> None:
    # Each scorer is handed all that there is to see; a leak of a poisoned hyperedge would show in the scores.
    h = by_chance(40, 3, 160, seed=2)
    seen: list[tuple[Hypergraph, Sequence[Sequence[int]]]] = []

    def watching(train: Hypergraph, candidates: Sequence[Sequence[int]]) -> np.ndarray:
        seen.append((train, candidates))
        return predict(train, candidates)

    first = evaluate(h, {"watching": watching}, seeds=3)
    whole = {tuple(row) for row in h.table().tolist()}
    for train, candidates in seen:
        known = {tuple(row) for row in train.table().tolist()}
        held_out = [row for row in candidates if tuple(row) in whole]
        assert len(held_out) == first.held_out == len(candidates) // 2
        assert not known & {tuple(row) for row in candidates}
        assert known < whole
    # Poison: the weights of what is held out at a seed change nothing at that seed.
    chosen = hold_out(h, 0.1, rng=np.random.default_rng(0)).held_out
    poison = np.array([1e9 if tuple(row) in chosen else 1.0 for row in h.table().tolist()])
    poisoned = Hypergraph(h.pins.copy(), h.starts.copy(), poison, h.node_weights.copy())
    methods = [name for name in PREDICTORS if name != "tensor"]
    assert evaluate(h, methods, seeds=1) == evaluate(poisoned, methods, seeds=1)


@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_are_new_sets_of_their_size(kind: str) -> None:
    h = by_chance(40, 4, 90, seed=3)
    known = {tuple(row) for row in h.table().tolist()}
    found = sample(kind, h, 4, 30, known=known, rng=np.random.default_rng(0))  # type: ignore[arg-type]
    rows = {tuple(row) for row in found.tolist()}
    assert len(rows) == 30
    assert not rows & known
    assert all(len(set(row)) == 4 for row in rows)
    ties = pairs(h).toarray() > 0
    if kind == "motif":
        assert all(ties[list(row)][:, list(row)].any(axis=1).all() for row in rows)
    if kind == "clique":
        assert all(max(len(set(row) & set(other)) for other in known) == 3 for row in rows)


def test_too_few_negatives_are_said() -> None:
    h = Hypergraph.from_edges([(0, 1), (1, 2), (0, 2), (0, 3), (1, 3), (2, 3)])
    with pytest.raises(InputError, match="0 uniform negatives of size 2"):
        evaluate(h, ["pairs"])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=20))
def test_auc_counts_ties_half(rows: list[tuple[int, bool]]) -> None:
    scores, likely = np.array([s for s, _ in rows], float), np.array([y for _, y in rows])
    if likely.all() or not likely.any():
        return
    better = scores[likely][:, None] - scores[~likely][None, :]
    assert auc(scores, likely) == pytest.approx(((better > 0) + 0.5 * (better == 0)).mean())


def test_ties_are_ranked_by_chance_and_not_by_their_order() -> None:
    likely = np.arange(400) < 200
    assert 0.3 < r_precision(np.zeros(400), likely, rng=np.random.default_rng(0)) < 0.7
    assert r_precision(likely.astype(float), likely, rng=np.random.default_rng(0)) == 1


def test_an_evaluation_shows_chance_and_what_was_refused() -> None:
    rows = [(0, 1), (1, 2, 3), (2, 3, 4), (4, 5), (5, 6, 7), (0, 7), (1, 6, 7), (3, 5), (0, 2, 4), (1, 2, 3)]
    found = evaluate(Hypergraph.from_edges(rows), ["hpra", "tensor"], seeds=2, held_out=0.2)
    assert found.duplicates == 1
    assert {row.method for row in found.rows} == {"hpra", "random"}
    text = str(found)
    for said in (
        "1 duplicates dropped",
        "by chance AUC 0.500, R-precision 0.500",
        "random",
        "tensor: hyperedges of size",
    ):
        assert said in text
    again = evaluate(Hypergraph.from_edges(rows), ["hpra", "tensor"], seeds=2, held_out=0.2)
    assert again == found


def test_the_same_structure_is_found_by_pairs_and_not_by_chance() -> None:
    h = by_chance(60, 3, 61, seed=0)  # almost a ring
    found = evaluate(h, METHODS, seeds=3)  # type: ignore[arg-type]
    easy = {row.method: row.auc for row in found.rows if row.negatives == "uniform"}
    assert min(easy[name] for name in METHODS) > 0.9
    assert abs(easy["random"] - 0.5) < 0.35
