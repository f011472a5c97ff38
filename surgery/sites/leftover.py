"""One sentence for a model that is mostly left alone: what share, the main reason, and what to do about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

__all__ = ["left_alone"]

_MOST = 0.5
_CHOSEN = re.compile(r"excluded|not included|kept dense by|ranks do not name it|in the plan")

_EXPORT = "export the model with torch.export and give the program, or its .pt2 file, in its place"
# words of a reason -> what to do about it; the first row that matches counts
_STEPS: tuple[tuple[str, str], ...] = (
    (r"computed by the graph", _EXPORT),
    (r"quantiz", "change the model before it is quantized"),
    (r"run the model once", "run the model once, and factor it then"),
    (r"no call of it is seen|do not reach|reaches it", "give example inputs with which the model runs these layers"),
    (r"the promise", "promise less (a larger max_error, a lower target_speedup)"),
    (r"would cost|full rank", "ask for lower ranks, or for a method that fits these layers better"),
    (r"measured|costs less|needs fewer", "leave these layers as they are, or try another factorization for them"),
    (r"exported program|is computed|its forward|more than its input|is not handled", _EXPORT),
    (r"patched|hook|compiled|held in|is the parameter", _EXPORT),
    (r"before it is exported|changed before|recompose", "do what the reason says, and factor the model again"),
)
_OTHER = "see the reasons of the places that are left alone"


class _Place(Protocol):
    @property
    def reason(self) -> str: ...

    @property
    def macs(self) -> float | None: ...


def left_alone(places: Iterable[_Place], macs: float | None, *, exported: bool = False) -> str | None:
    """Return one sentence if most of a model's ``macs`` are in places that are left alone; None otherwise.

    Places that the caller chose to leave do not count. Reasons that differ only in numbers are one reason. The sentence
    never suggests an export if the model is ``exported`` already.
    """
    groups: dict[str, list[_Place]] = defaultdict(list)
    for place in places:
        if place.macs and not _CHOSEN.search(place.reason):
            # "full rank would cost 12 MACs" and "full rank would cost 34 MACs" are one reason
            groups[re.sub(r"\d[\d.]*", "#", place.reason)].append(place)
    costs = {key: sum(place.macs or 0 for place in group) for key, group in groups.items()}
    if not macs or sum(costs.values()) <= _MOST * macs:
        return None
    main = max(costs, key=lambda key: costs[key])
    group, reason = groups[main], groups[main][0].reason
    layers = "1 layer" if len(group) == 1 else f"{len(group)} layers"
    step = next((step for words, step in _STEPS if re.search(words, reason)), _OTHER)
    step = _OTHER if exported and step == _EXPORT else step
    share = min(100 * sum(costs.values()) / macs, 100)
    return f"{share:.0f} % of the MACs are left alone: mostly because {_short(reason)} ({layers}); {step}"


def _short(reason: str) -> str:
    """Return a reason without its advice (after the semicolon) and without brackets at its end."""
    return re.sub(r"\s*\([^()]*\)$", "", reason.split(";")[0])
