"""Draw a planted partition along its Fiedler vectors, as SVG: what each method has to cut, and where it does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surgery import hypergraph as hg
from surgery.hypergraph.moves import Limits
from surgery.hypergraph.partitions import sweep
from surgery.report.markup import Markup, tag
from tools.hypergraph_cases import planted

__all__ = ["picture"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760.0, 250.0, 60.0, 74.0, 16.0
_COLOURS = ("#2468b2", "#d9822b")
_STYLE = "font:13px system-ui,'DejaVu Sans',sans-serif;background:#fff"
_LEGEND = "grey: hyperedges cut after each node; red: where that is least with both sides within 3 % of half the nodes"
_INK, _SOFT, _LINE = "#1d2733", "#5b6775", "#dde3ea"


def picture(nodes: int = 200, size: int = 4, *, noise: float = 0.6, seed: int = 1) -> Markup:
    """Return two charts, one a vector: the nodes in the vector's order, its entries, and the cut at each place.

    Colours are the planted halves. The grey curve is the cut of all places, and the vertical line the place of the
    least within 3 % of balance.
    """
    h, half = planted(nodes, size, 3 * nodes, noise=noise, seed=seed)
    methods: dict[str, hg.Vector] = {
        "clique expansion": "clique",
        "Laplacian tensor": "tensor" if size % 2 == 0 else "absolute",
    }
    planted_cut = hg.cuts(h, half).hyperedges
    charts = [
        _chart(h, half, hg.fiedler(h, method), name, _TOP + i * (_HEIGHT + _GAP))
        for i, (name, method) in enumerate(methods.items())
    ]
    head = f"{h.nodes} nodes in two planted halves (the colours), {h.edges} hyperedges of {size}; "
    head += f"the halves cut {planted_cut}"
    height = _TOP + 2 * (_HEIGHT + _GAP)
    return tag(
        "svg",
        tag("title", "A planted partition along two Fiedler vectors"),
        tag("rect", x=0, y=0, width=_WIDTH, height=height, fill="#fff"),
        tag("text", head, x=16, y=24, fill=_INK, font_weight="600"),
        tag("text", _LEGEND, x=16, y=44, fill=_SOFT, font_size="12"),
        *charts,
        viewBox=f"0 0 {_WIDTH:g} {height:g}",
        width=_WIDTH,
        height=height,
        style=_STYLE,
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


def _chart(h: hg.Hypergraph, half: NDArray[np.int64], found: hg.Fiedler, name: str, top: float) -> Markup:
    side = 1.0 if found.vector @ (half - half.mean()) >= 0 else -1.0  # one half to the right in all charts
    vector = side * np.sqrt(h.nodes) * found.vector
    part, cut = sweep(h, vector, Limits("cut", np.full(2, 1.03 * h.nodes / 2)))
    right = float(np.mean(part == half))
    order = np.argsort(vector, kind="stable")
    low, high = float(vector.min()), float(vector.max())

    def x(place: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 70) * place / (h.nodes - 1)

    def y(value: float) -> float:
        return top + 24 + (_HEIGHT - 60) * (high - value) / (high - low)

    line = x(float((part == part[order[0]]).sum()) - 0.5)
    dots = [
        tag("circle", cx=f"{x(place):.1f}", cy=f"{y(float(vector[node])):.1f}", r=3, fill=_COLOURS[half[node]])
        for place, node in enumerate(order.tolist())
    ]
    cuts = _cuts_along(h, order)
    base, scale = top + _HEIGHT - 36, (_HEIGHT - 60) / max(float(cuts.max()), 1.0)
    curve = " ".join(f"{x(i + 0.5):.1f},{base - scale * c:.1f}" for i, c in enumerate(cuts.tolist()))
    said = f"{name}: cuts {cut:.0f}, {max(right, 1 - right):.1%} of the nodes right; {found.kind}"
    return tag(
        "g",
        tag("text", said, x=16, y=top + 6, fill=_INK),
        tag("line", x1=_LEFT, x2=_WIDTH - 70, y1=y(0), y2=y(0), stroke=_LINE),
        tag("polyline", points=curve, fill="none", stroke="#9aa5b1", stroke_width=1.5),
        tag("line", x1=line, x2=line, y1=top + 18, y2=base, stroke="#c0392b", stroke_dasharray="5 4"),
        *dots,
        tag("text", "entries", x=16, y=y(0) + 4, fill=_SOFT, font_size="12"),
        tag("text", f"cut, up to {cuts.max():.0f}", x=x(h.nodes / 5) - 8, y=base - scale * cuts[h.nodes // 5] - 8,
            fill=_SOFT, font_size="12", text_anchor="end"),
        tag("text", "nodes in the vector's order", x=x(h.nodes / 2), y=base + 20, fill=_SOFT, font_size="12",
            text_anchor="middle"),
    )  # fmt: skip


def _cuts_along(h: hg.Hypergraph, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weight of the hyperedges that are cut after each node of an order but the last."""
    rank = np.empty(h.nodes, np.int64)
    rank[order] = np.arange(h.nodes)
    rows = rank[h.table()]
    change = np.bincount(rows.min(axis=1), h.weights, minlength=h.nodes)
    return np.cumsum(change - np.bincount(rows.max(axis=1), h.weights, minlength=h.nodes))[:-1]
