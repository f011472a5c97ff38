"""Hypergraphs, their partitions and predictions of hyperedges, in NumPy and SciPy alone.

    from surgery import hypergraph as hg

    h = hg.Hypergraph.from_edges([(0, 1, 2), (2, 3), (3, 4, 5)])
    hg.partition(h, 2).part, hg.fiedler(h).vector, hg.predict(h, [(0, 1, 3)])

Two methods by Maurya and Ravindran, by the eigenvectors of a tensor, stand beside the best known ones. They are here to
be measured, and lose: ``tools/bench_hypergraph.py`` prints by how much.
"""

from __future__ import annotations

from surgery.hypergraph.costs import OBJECTIVES, Cuts, Objective, cuts
from surgery.hypergraph.evaluation import Evaluation, Row, Split, evaluate, hold_out
from surgery.hypergraph.hypergraph import Hypergraph
from surgery.hypergraph.laplacian import Form, clique, pairs
from surgery.hypergraph.negatives import NEGATIVES, Negatives
from surgery.hypergraph.partitions import METHODS, Method, Partition, partition
from surgery.hypergraph.predictions import PREDICTORS, Predictor, predict
from surgery.hypergraph.vectors import VECTORS, Fiedler, Vector, fiedler

__all__ = [
    "METHODS",
    "NEGATIVES",
    "OBJECTIVES",
    "PREDICTORS",
    "VECTORS",
    "Cuts",
    "Evaluation",
    "Fiedler",
    "Form",
    "Hypergraph",
    "Method",
    "Negatives",
    "Objective",
    "Partition",
    "Predictor",
    "Row",
    "Split",
    "Vector",
    "clique",
    "cuts",
    "evaluate",
    "fiedler",
    "hold_out",
    "pairs",
    "partition",
    "predict",
]
