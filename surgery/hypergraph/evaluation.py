"""Measure how well hyperedges are predicted, on hyperedges that were held out; nothing of them leaks, by construction.

For each seed a share of the distinct hyperedges is held out, such that no node loses all that it has. A predictor gets
two things: the hypergraph of the others, and the candidates: held-out hyperedges and sets of the same sizes that are no
hyperedges at all, in an order by chance. Everything that a predictor computes, and what negatives grow along,
comes from the first of these. All predictors get the same.

    AUC           the chance that a hyperedge scores above a negative; ties count half. By chance 0.5.
    R-precision   the share of hyperedges among the highest scores, as many as there are hyperedges; ties in an order by
                  chance. By chance the share of hyperedges among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.special import stdtrit

from surgery.errors import InputError, Refusal
from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.negatives import NEGATIVES, Negatives, sample
from surgery.hypergraph.predictions import PREDICTORS, Predictor, predict
from surgery.hypergraph.ragged import bounds

__all__ = ["Evaluation", "Row", "Score", "Split", "auc", "evaluate", "hold_out", "r_precision"]

Score: TypeAlias = Callable[[Hypergraph, Sequence[Sequence[int]]], Floats]
RANDOM = "random"


@dataclass(frozen=True)
class Row:
    """One predictor against one kind of negatives: means over the seeds, and half the width of their 95 % intervals.

    ``margin`` and ``r_margin`` are infinite for one seed.
    """

    method: str
    negatives: Negatives
    auc: float
    margin: float
    r_precision: float
    r_margin: float


@dataclass(frozen=True)
class Evaluation:
    """The rows, among them "random", whose scores are chance; ``refused`` has the methods that could not be used.

    ``distinct`` counts the hyperedges, ``duplicates`` those that stood twice and were merged before, ``held_out`` the
    hyperedges to predict at each seed. ``chance`` is the R-precision to expect of chance.
    """

    rows: tuple[Row, ...]
    refused: Mapping[str, Refusal]
    distinct: int
    duplicates: int
    held_out: int
    seeds: int
    chance: float

    def __str__(self) -> str:
        lines = [
            f"{self.held_out} of {self.distinct} distinct hyperedges held out ({self.duplicates} duplicates dropped), "
            f"{self.seeds} seeds; by chance AUC 0.500, R-precision {self.chance:.3f}",
            f"{'method':<14}{'negatives':<11}{'AUC':>15}{'R-precision':>18}",
        ]
        for row in self.rows:
            first = f"{row.auc:.3f} +- {row.margin:.3f}"
            second = f"{row.r_precision:.3f} +- {row.r_margin:.3f}"
            lines.append(f"{row.method:<14}{row.negatives:<11}{first:>15}{second:>18}")
        return "\n".join([*lines, *(f"{name}: {refusal.reason}" for name, refusal in self.refused.items())])


@dataclass(frozen=True, eq=False)
class Split:
    """The hypergraph that predictors see, and the hyperedges that it lacks, in ascending order of their nodes."""

    train: Hypergraph
    held_out: tuple[tuple[int, ...], ...]


def evaluate(
    h: Hypergraph,
    methods: Sequence[Predictor] | Mapping[str, Score] = PREDICTORS,
    *,
    negatives: Sequence[Negatives] = ("uniform", "motif"),
    held_out: float = 0.1,
    ratio: int = 1,
    seeds: int = 5,
) -> Evaluation:
    """Return how well each method tells held-out hyperedges of two or more nodes from negatives.

    ``methods`` are names, or functions by name that return a score for each candidate given the training hypergraph and
    the candidates. ``ratio`` is the number of negatives for each hyperedge. A method that refuses the hypergraph is
    listed with its reason. Raises ``InputError`` for a share that leaves nothing on one side, and where there are too
    few negatives.

    >>> h = Hypergraph.from_edges([(i, i + 1, i + 2) for i in range(40)])
    >>> found = evaluate(h, ["pairs"], seeds=2)
    >>> found.held_out, [row.method for row in found.rows]
    (4, ['pairs', 'random', 'pairs', 'random'])
    """
    unknown = [kind for kind in negatives if kind not in NEGATIVES]
    if unknown or seeds < 1 or ratio < 1:
        what = f"negatives {unknown[0]!r}" if unknown else f"seeds {seeds}, ratio {ratio}"
        raise InputError(what, allowed=", ".join(NEGATIVES) if unknown else "1 or more of each")
    scores = dict(methods) if isinstance(methods, Mapping) else {name: _by_name(name) for name in methods}
    refused: dict[str, Refusal] = {}
    found: dict[tuple[str, Negatives], list[tuple[float, float]]] = {}
    count = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        split = hold_out(h, held_out, rng=rng)
        count = len(split.held_out)
        for kind in negatives:
            candidates, likely = _candidates(h, split, kind, ratio, rng)
            for name, score in scores.items():
                if name in refused:
                    continue
                try:
                    given = _given(score(split.train, candidates), name, len(candidates))
                except InputError as error:
                    refused[name] = Refusal(str(error))
                    continue
                found.setdefault((name, kind), []).append((auc(given, likely), r_precision(given, likely, rng=rng)))
            given = rng.random(len(candidates))
            found.setdefault((RANDOM, kind), []).append((auc(given, likely), r_precision(given, likely, rng=rng)))
    shown = [(name, kind) for kind in negatives for name in [*scores, RANDOM] if name not in refused]
    rows = tuple(_row(name, kind, found[name, kind]) for name, kind in shown)
    return Evaluation(rows, refused, h.edges, h.merged, count, seeds, 1 / (1 + ratio))


def _given(scores: Floats, name: str, count: int) -> Floats:
    found = np.asarray(scores, np.float64)
    if found.shape != (count,) or np.isnan(found).any():
        raise InputError(f"scores of {name!r} of shape {found.shape}", allowed=f"({count},), none of them NaN")
    return found


def _by_name(name: Predictor) -> Score:
    if name not in PREDICTORS:
        raise InputError(f"method {name!r}", allowed=", ".join(PREDICTORS))
    return lambda train, candidates: predict(train, candidates, method=name)


def hold_out(h: Hypergraph, share: float, *, rng: np.random.Generator) -> Split:
    """Return the hypergraph without a share of its hyperedges of two or more nodes, chosen by chance.

    A hyperedge stays if one of its nodes would be left without any. Raises ``InputError`` if none can be held out.
    """
    if not 0 < share < 1:
        raise InputError(f"a held-out share of {share}", allowed="above 0, below 1")
    wide = np.flatnonzero(h.sizes > 1)
    wanted = max(1, round(share * len(wide)))
    # Invariant: ``left`` counts the hyperedges that each node still has, and is never 0 by what was taken. Example of
    # the triangle 01, 12, 02: once 01 is taken, nodes 0 and 1 have one left, and both others stay.
    left = np.bincount(h.pins, minlength=h.nodes)
    rows = {int(e): h.pins[h.starts[e] : h.starts[e + 1]] for e in wide}
    taken: list[int] = []
    for edge in rng.permutation(wide).tolist():
        if len(taken) < wanted and (left[rows[edge]] > 1).all():
            left[rows[edge]] -= 1
            taken.append(edge)
    if not taken:
        raise InputError("no hyperedge can be held out: each has a node of its own", allowed="a denser hypergraph")
    kept = np.ones(h.edges, bool)
    kept[taken] = False
    return Split(h.subset(kept), tuple(tuple(rows[edge].tolist()) for edge in sorted(taken)))


def _candidates(
    h: Hypergraph, split: Split, kind: Negatives, ratio: int, rng: np.random.Generator
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return hyperedges and negatives in an order by chance, and which are hyperedges."""
    ends = bounds(h.sizes)
    known = {tuple(h.pins[ends[e] : ends[e + 1]].tolist()) for e in range(h.edges)}
    rows = list(split.held_out)
    sizes, counts = np.unique([len(row) for row in rows], return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        drawn = sample(kind, split.train, size, ratio * count, known=known, rng=rng)
        rows += [tuple(row) for row in drawn.tolist()]
    # The hyperedges came first, so that a place in ``rows`` below their number marks one.
    order = rng.permutation(len(rows))
    return [rows[i] for i in order], order < len(split.held_out)


def auc(scores: Floats, likely: Integers | np.ndarray) -> float:
    """Return the share of pairs of a hyperedge and a negative in which the hyperedge scores higher; ties count half.

    >>> auc(np.array([1.0, 1.0, 0.0]), np.array([True, False, False]))
    0.75
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # the mean rank of equal scores, from 1 on
    # Mann-Whitney: the hyperedges' ranks, less what they would be if all stood last, count the pairs that they win.
    # Example of scores 1 (a hyperedge), 1, 0: ranks 2.5, 2.5, 1, and (2.5 - 1) / (1 * 2) = 0.75.
    yes = int(np.sum(likely))
    return float((rank[likely].sum() - yes * (yes + 1) / 2) / (yes * (len(scores) - yes)))


def r_precision(scores: Floats, likely: np.ndarray, *, rng: np.random.Generator) -> float:
    """Return the share of hyperedges among the highest scores, as many as there are hyperedges; ties by chance."""
    order = np.lexsort((rng.random(len(scores)), -scores))
    return float(likely[order[: int(np.sum(likely))]].mean())


def _row(name: str, kind: Negatives, found: Sequence[tuple[float, float]]) -> Row:
    (first, margin), (second, r_margin) = (_interval(np.array(side)) for side in zip(*found, strict=True))
    return Row(name, kind, first, margin, second, r_margin)


def _interval(values: Floats) -> tuple[float, float]:
    """Return the mean, and half the width of Student's 95 % interval around it."""
    count = len(values)
    if count < 2:
        return float(values.mean()), float("inf")
    return float(values.mean()), float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count))
