"""Run `surgery.decompose(model)` on trained networks with the defaults: metric, speed-up, and what it reports.

    python tools/bench_safety.py --data FOLDER --json safety.json
    python tools/bench_safety.py --network minilm --no-promise

Each network is decomposed with the defaults: no calibration data, and example inputs only if it is an nn.Module. Its
metric (accuracy, cosine or agreement, as in `trained.py`) is measured on samples that it was not trained on. The
speed-up is that of whole models, interleaved; 1.00 if the original came back. A row that loses more than 0.01 is
marked. With `--no-promise` each network is also decomposed with ``ranks="measured"``, in columns of its own. The
seconds are those of a run that finds earlier latencies on disk.

Networks whose data or packages are not here are listed, each with what it needs.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.cost.base import make_backend
from surgery.passes.results import DecomposeResult
from surgery.runtime.bench import environment
from tools.trained import NETWORKS, Network, Unavailable, open_network, option_parser

LOST = 0.01  # a row that loses more of the metric is marked
DEFAULT, WITHOUT = "default", "no promise"


@dataclass(frozen=True)
class Row:
    """One network, decomposed in one way: its metric before and after, its speed-up, and the report on it."""

    network: str
    metric: str
    way: str
    before: float
    after: float
    speedup: float
    original: bool
    said: str
    seconds: float

    @property
    def lost(self) -> bool:
        """Whether the metric falls by more than LOST."""
        return self.before - self.after > LOST

    def cells(self) -> tuple[str, str]:
        """Return the metric after and the speed-up as text."""
        after = f"{self.after:.4f}"
        speedup = "1.00x, original" if self.original else f"{self.speedup:.2f}x"
        return f"[red]{after} LOST[/red]" if self.lost else after, speedup


def said_of(result: DecomposeResult[Any]) -> str:
    """Return the promise of a result, or else the number of factored sites; then the notes of changes."""
    promise = f"no promise; {len(result.changes)} factored" if result.promise is None else str(result.promise)
    notes = dict.fromkeys(change.note for change in result.changes if change.note)
    return "; ".join((promise, *notes))


def measure(network: Network, before: float, asked: dict[str, Any], seconds: float) -> Row:
    """Decompose a network with the defaults, and ``asked``; return its row."""
    start = time.perf_counter()
    result = network.decompose(**asked)
    taken = time.perf_counter() - start
    original = not result.changes
    speedup = 1.0 if original else network.speedup(result.model, seconds)
    after = network.score(result.model)
    way = WITHOUT if asked else DEFAULT
    return Row(network.name, network.metric, way, before, after, speedup, original, said_of(result), taken)


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print one line for each network; both ways side by side where both were tried."""
    both = any(row.way == WITHOUT for row in rows)
    names = ("after", "speed-up")
    without = [f"{name}, no promise" for name in names] if both else []
    table = Table("network", "metric", "before", *without, *names, "said", "seconds")
    for row in (row for row in rows if row.way == DEFAULT):
        other = [cell for r in rows if (r.network, r.way) == (row.network, WITHOUT) for cell in r.cells()]
        table.add_row(
            row.network, row.metric, f"{row.before:.4f}", *other, *row.cells(), escape(row.said), f"{row.seconds:.1f}"
        )
    console.print(table)
    for way in dict.fromkeys(row.way for row in rows):
        some = [row for row in rows if row.way == way]
        console.print(f"{way}: {sum(row.lost for row in some)} of {len(some)} networks lose more than {LOST:g}")


def main() -> None:
    """Decompose, measure, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    parser = option_parser(__doc__.splitlines()[0], networks="all that are available")
    parser.add_argument("--no-promise", action="store_true", help="also decompose with ranks=measured")
    options = parser.parse_args()
    console, rows, missing = Console(), [], []
    for name in options.network or NETWORKS:
        try:
            network = open_network(name, options)
        except Unavailable as error:
            missing.append(str(error))
            continue
        before = network.score(network.model)
        for asked in ({"ranks": "measured"}, {}) if options.no_promise else ({},):
            rows.append(measure(network, before, asked, options.seconds))
            console.print(f"{name} {rows[-1].way}: {rows[-1].seconds:.1f} s")
    show(console, rows)
    for text in missing:
        console.print(f"not available: {text}")
    where = environment(make_backend().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        values = {"rows": [asdict(row) for row in rows], "missing": missing, "environment": asdict(where)}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
