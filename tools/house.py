"""Print the structure of this checkout, or of several side by side, with the goals: sizes, imports, journeys, tests.

    python tools/house.py [--at TREE]... [--json] [--tests] [--no-journeys]

Fan-out counts the modules of the package that a module imports, including imports inside functions and for type
checkers. The closure of a module counts the modules that are loaded when it is imported, with itself and the packages,
without imports inside functions. A journey counts the files in which a function runs. ``--tests`` runs the tests of
each tree and prints their time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from tools.source import Module, Source

__all__ = ["GOALS", "measure", "table"]

Figure: TypeAlias = float | str
HERE = Path(__file__).resolve().parent
JOURNEYS = ("decompose-module", "decompose-program", "recompose")
BASES = ("surgery.kinds.base", "surgery.graphs.kind")  # the second is its name in older trees
GOALS = {
    "mean fan-out": "<= 3",
    "largest file, lines": "<= 400",
    "largest function, lines": "<= 60",
    "import closure of the kinds' base": "<= 12",
    "modules at the root": "<= 3",
    "arguments of the widest public function": "<= 12",
    **{f"files of the journey {name}": "<= 40" for name in JOURNEYS},
}


def measure(tree: Path, *, journeys: bool = True, tests: bool = False) -> dict[str, Figure]:
    """Return the figures of a tree."""
    source = Source(tree)
    modules = list(source.modules.values())
    figures = _sizes(modules, source) | _imports(source)
    figures["arguments of the widest public function"] = _widest(source)
    lines = sum(module.lines for module in modules)
    figures["share of lines with a comment"] = f"{sum(m.comment_lines for m in modules) / lines:.1%}"
    if journeys:
        figures |= {f"files of the journey {name}": _journey(tree, name) for name in JOURNEYS}
    figures["test functions"] = _count_tests(tree / "tests")
    return figures | (_run_tests(tree) if tests else {})


def _sizes(modules: Sequence[Module], source: Source) -> dict[str, Figure]:
    largest = max(modules, key=lambda module: module.lines)
    name, function = max(source.functions.items(), key=lambda pair: pair[1].lines)
    return {
        "files": len(modules),
        "lines": sum(module.lines for module in modules),
        "median file, lines": statistics.median(module.lines for module in modules),
        "largest file, lines": f"{largest.lines} ({_short(largest.name)})",
        "functions": len(source.functions),
        "median function, lines": statistics.median(f.lines for f in source.functions.values()),
        "largest function, lines": f"{function.lines} ({_short(name)})",
    }


def _imports(source: Source) -> dict[str, Figure]:
    fan_outs = {name: len(source.imports(name)) for name in source.modules}
    base = next((name for name in BASES if name in source.modules), None)
    figures: dict[str, Figure] = {
        "mean fan-out": round(statistics.mean(fan_outs.values()), 2),
        "largest fan-out": "{1} ({0})".format(*max(((_short(n), f) for n, f in fan_outs.items()), key=lambda p: p[1])),
    }
    if base:
        figures["import closure of the kinds' base"] = len(source.closure(base))
    if "surgery.passes.decompose" in source.modules:
        figures["import closure of passes.decompose"] = len(source.closure("surgery.passes.decompose"))
    return figures | {"modules at the root": len(source.at_the_root)}


def _widest(source: Source) -> str:
    found = source.public_functions()
    name = max(found, key=lambda key: found[key].parameters, default="")
    return f"{found[name].parameters} ({name})" if name else "0"


def _short(name: str) -> str:
    return name.removeprefix("surgery.")


def _journey(tree: Path, name: str) -> Figure:
    command = [sys.executable, str(HERE / "journeys.py"), name]
    environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2][:60]
    return len(json.loads(done.stdout.splitlines()[-1]))


def _count_tests(folder: Path) -> int:
    return sum(len(re.findall(r"^def test_", path.read_text(), re.MULTILINE)) for path in folder.rglob("*.py"))


def _run_tests(tree: Path) -> dict[str, Figure]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--numprocesses", "2"]
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return {"tests run": done.stdout.strip().rpartition("\n")[2], "seconds": round(time.perf_counter() - start)}


def table(columns: dict[str, dict[str, Figure]]) -> str:
    """Return the figures of several trees as a table, with one column for each tree and the goals."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    cells = [["", *columns, "goal"]]
    cells += [[name, *(str(f.get(name, "-")) for f in columns.values()), GOALS.get(name, "")] for name in names]
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at", action="append", type=Path, help="a checkout; this one unless given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tests", action="store_true", help="run the tests too, which takes minutes")
    parser.add_argument("--no-journeys", action="store_true", help="run nothing of the package")
    options = parser.parse_args()
    trees = options.at or [HERE.parent]
    found = {str(t): measure(t, journeys=not options.no_journeys, tests=options.tests) for t in trees}
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main()
