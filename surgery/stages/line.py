"""The best cuts of one order of operations, by dynamic programming over the places where it may be cut.

``best[k][j]`` is the least cost of the dearest stage when the first ``j`` operations make ``k`` stages:
``best[k][j] = min over i of max(best[k - 1][i], cost(i, j))``, with ``cost`` the seconds of the operations ``i`` to
``j - 1`` and of what comes in and goes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from surgery.errors import InputError
from surgery.sites.network import Network

__all__ = ["cut_in_line"]

_Costs = npt.NDArray[np.float64]


def cut_in_line(network: Network, costs: _Costs, groups: Sequence[frozenset[int]], stages: int) -> tuple[int, ...]:
    """Return the stage of each operation; ``costs[i, j]`` is that of a stage of the operations from i to before j.

    Raises:
        InputError: there are not so many places to cut at, or each such stage costs infinitely much.
    """
    count = len(network.operations)
    free = [at for at in range(1, count) if not any(min(g) < at <= max(g) for g in groups if g)]
    if stages > len(free) + 1:
        what = f"{stages} stages of {count} operations, of which some have to stay together"
        raise InputError(what, allowed=f"1 to {len(free) + 1}")
    places = np.array([0, *free, count])
    own = costs[np.ix_(places, places)]
    best, back = own[0], []
    for _ in range(1, stages):
        both = np.maximum(best[:, None], own)
        back.append(both.argmin(axis=0))
        best = both.min(axis=0)
    if not np.isfinite(best[-1]):
        raise InputError(f"no {stages} stages are small enough", next_step="allow more memory, or more stages")
    cuts, at = [], len(places) - 1
    for row in reversed(back):
        at = int(row[at])
        cuts.append(int(places[at]))
    return tuple(sum(number >= cut for cut in cuts) for number in range(count))
