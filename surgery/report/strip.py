"""The network as a strip of its layers, as SVG: how long each takes, where it is cut, and the bytes across.

Layers lie side by side in the order of the stages, each as wide as it takes seconds, so that stages of one length are
balanced. Beneath lies the profile: at each place, the bytes that a cut there would send. Units are those of ``charts``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from surgery.report.charts import drawing, ticks
from surgery.report.markup import Markup, shorten, tag
from surgery.stages.report import SplitReport, StripLayer
from surgery.text import seconds, size

__all__ = ["strip"]

_LEFT, _RIGHT, _WIDTH = 64.0, 24.0, 760.0
_GAP = 10.0  # between two stages
_TOP, _BAR = 34.0, 40.0
_NAMES = _TOP + _BAR + 18
_HIGH, _LOW, _HEIGHT = 128.0, 238.0, 262.0  # the profile's top and base, and the whole
_LETTER = 7.0  # the width of a letter, on the whole
_MOST_BLOCKS, _FEWEST = 16, 8  # names of modules, and letters of one that is cut
_TONES = 2


@dataclass(frozen=True)
class _Place:
    """A layer and where it is drawn."""

    layer: StripLayer
    left: float
    right: float


def strip(report: SplitReport) -> Markup:
    """Return the drawing; nothing where the report knows no layers."""
    if not report.layers:
        return Markup()
    places = _places(report.layers)
    parts = [
        *_stage_names(report, places),
        *(_layer(place) for place in places),
        *_blocks(places),
        *_profile(places),
        *_cuts(places),
    ]
    return drawing(parts, _HEIGHT, "The layers of the network, the stages, and the bytes between them")


def _places(layers: Sequence[StripLayer]) -> list[_Place]:
    """Return layers side by side, each as wide as its time, with gaps between stages; equally wide without times."""
    total = sum(layer.seconds for layer in layers)
    stages = len({layer.stage for layer in layers})
    room = _WIDTH - _LEFT - _RIGHT - _GAP * (stages - 1)
    found, at = [], _LEFT
    for before, layer in zip((None, *layers), layers, strict=False):
        if before is not None and before.stage != layer.stage:
            at += _GAP
        wide = room * (layer.seconds / total if total > 0 else 1 / len(layers))
        found.append(_Place(layer, at, at + wide))
        at += wide
    return found


def _stage_names(report: SplitReport, places: Sequence[_Place]) -> list[Markup]:
    found = []
    for stage, group in groupby(places, key=lambda place: place.layer.stage):
        left, right = _span(list(group))
        row = report.stages[stage]
        for text in (f"stage {stage}: {seconds(row.predicted_s)}", f"{stage}: {seconds(row.predicted_s)}", str(stage)):
            if len(text) * _LETTER <= right - left + _GAP:
                found.append(
                    tag("text", text, x=(left + right) / 2, y=_TOP - 10, text_anchor="middle", class_="strong")
                )
                break
    return found


def _span(places: Sequence[_Place]) -> tuple[float, float]:
    return places[0].left, places[-1].right


def _layer(place: _Place) -> Markup:
    layer, wide = place.layer, place.right - place.left
    said = f"{layer.name}: {seconds(layer.seconds)}, stage {layer.stage}"
    line = 0.5 if wide > 2 else 0.0  # the gap between two layers
    size = {"x": place.left + line, "y": _TOP, "width": max(0.2, wide - 2 * line), "height": _BAR}
    return tag("rect", tag("title", said), **size, class_=f"tone{layer.stage % _TONES}")


def _blocks(places: Sequence[_Place]) -> list[Markup]:
    """Return the names of modules beneath their layers: as deep as still gives few enough, where there is room."""
    runs: list[tuple[str, float, float]] = []
    deepest = max(len(_parts(place.layer.name)) for place in places)
    # Example of encoder.0.fc, encoder.1.fc and head: two names at depth 1, and at depth 2
    # encoder.0, encoder.1 and head.
    for depth in range(1, deepest + 1):
        deeper = [
            (key[1], *_span(list(group)))
            for key, group in groupby(places, key=lambda p: (p.layer.stage, ".".join(_parts(p.layer.name)[:depth])))
        ]
        if runs and len(deeper) > _MOST_BLOCKS:
            break
        runs = deeper
    found = []
    for name, left, right in runs:
        letters = int((right - left) / _LETTER)
        if letters >= min(_FEWEST, len(name)):
            found.append(tag("line", x1=left + 1, x2=right - 1, y1=_NAMES - 13, y2=_NAMES - 13, class_="grid"))
            text = shorten(name, letters)
            found.append(tag("text", text, x=(left + right) / 2, y=_NAMES, text_anchor="middle", class_="value"))
    return found


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part] or [name]


def _profile(places: Sequence[_Place]) -> list[Markup]:
    """Return the bytes that a cut at each place would send, as an area of steps, with its axis."""
    most = max(place.layer.bytes_after for place in places) or 1
    points = [(_LEFT, _LOW)]
    for place in places:
        high = _height(place.layer.bytes_after, most)
        # Beneath a layer lies what a cut before it would send; at its end is the step to what a cut behind it would.
        points += [(place.left, points[-1][1]), (place.right, points[-1][1]), (place.right, high)]
    points.append((points[-1][0], _LOW))
    grid = []
    for value in ticks(0.0, most, 3):
        at = _height(value, most)
        grid.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        grid.append(tag("text", size(value), x=_LEFT - 8, y=at + 4, text_anchor="end", class_="value"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    said = tag("text", "bytes that a cut would send", x=_LEFT, y=_HIGH - 10, class_="value")
    return [*grid, tag("polygon", points=line, class_="profile"), said]


def _height(value: float, most: float) -> float:
    return _LOW - (_LOW - _HIGH) * value / most


def _cuts(places: Sequence[_Place]) -> list[Markup]:
    """Return a line for each cut through all lanes, and what it sends."""
    most = max(place.layer.bytes_after for place in places) or 1
    found, free = [], -1.0
    for before, after in pairwise(places):
        if before.layer.stage == after.layer.stage:
            continue
        at, sent = (before.right + after.left) / 2, before.layer.bytes_after
        found.append(tag("line", x1=at, x2=at, y1=_TOP - 4, y2=_LOW, class_="limit"))
        found.append(tag("circle", cx=at, cy=_height(sent, most), r=4, class_="chosen"))
        text = size(sent)
        # A label that would run into the one before it is left out; its line and its point stay.
        left = at - len(text) * _LETTER / 2
        if left > free:
            found.append(tag("text", text, x=at, y=_LOW + 18, text_anchor="middle", class_="strong"))
            free = left + len(text) * _LETTER
    return found
