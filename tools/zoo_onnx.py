"""The laws on real ONNX files of others: full rank gives the same outputs, and recompose gives the file back.

    python tools/zoo_onnx.py --data FOLDER --to FOLDER [--file NAME]... [--json FILE]

``--data`` has ``onnx_files.py``, which fetches the files to the folder of ``--to`` and makes their inputs. For each
file the table has the sites and the places left alone, the seconds to find them, and

    full      the relative error of the outputs at full ranks
    back      the relative error of the outputs after recompose
    rounding  what the outputs change by if all inputs move by a millionth: errors near this are rounding
    names     whether the recomposed file has the weights of the original, by name and shape
    nodes     whether it has the same operators; a weight in a Constant node comes back as an initializer
    valid     whether onnx's checker takes the factored and the recomposed file

A file on which something fails is listed with the failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.algebra import relative_error
from surgery.cost.base import make_backend
from surgery.kinds.registry import kind_of
from surgery.runtime.bench import environment
from surgery.runtime.compare import run_model


@dataclass(frozen=True)
class Row:
    """What one file showed; ``failed`` is the failure, if there was one."""

    file: str
    sites: int = 0
    skips: int = 0
    seconds: float = 0.0
    full: float = 0.0
    back: float = 0.0
    rounding: float = 0.0
    names: bool = False
    nodes: bool = False
    valid: bool = False
    failed: str = ""

    @property
    def good(self) -> bool:
        """Whether all laws hold: errors are below 1e-4, or below ten times what rounding explains."""
        allowed = max(1e-4, 10 * self.rounding)
        return not self.failed and max(self.full, self.back) <= allowed and self.names and self.valid


def _outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = run_model(model, ((), inputs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in wanted]:
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value * (1 + 1e-6 * torch.randn(value.shape, generator=generator)) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _valid(model: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        surgery.save(model, path)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except onnx.checker.ValidationError:
            return False
    return True


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in kind_of(model).tensors(model).items()}


def _kinds(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph if node.op_type != "Constant")


def examine(name: str, path: Path, inputs: dict[str, Tensor] | None) -> Row:
    """Return what a file shows; without ``inputs``, its own shapes are used."""
    try:
        model: Any = surgery.load(path)
        start = time.perf_counter()
        sites, skips = surgery.find_sites(model, inputs)
        seconds = time.perf_counter() - start
        if inputs is None or not sites:
            unchanged = surgery.decompose(model, inputs, ranks="full").model if inputs is not None else model
            same = _shapes(unchanged) == _shapes(model)
            return Row(name, len(sites), len(skips), seconds, names=same, nodes=same, valid=_valid(unchanged))
        before = _outputs(model, inputs)
        made = surgery.decompose(model, inputs, ranks="full").model
        back = surgery.recompose(made, inputs).model
        return Row(
            name,
            len(sites),
            len(skips),
            seconds,
            _error(_outputs(made, inputs), before),
            _error(_outputs(back, inputs), before),
            _error(_outputs(model, _moved(inputs)), before),
            _shapes(back) == _shapes(model),
            _kinds(back) == _kinds(model),
            _valid(made) and _valid(back),
        )
    except Exception as error:  # whatever goes wrong is what this tool is to show
        return Row(name, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table, and how many files keep the laws."""
    table = Table("file", "sites", "skips", "find", "full", "back", "rounding", "names", "nodes", "valid")
    for row in rows:
        if row.failed:
            table.add_row(row.file, row.failed)
            continue
        marks = ["yes" if value else "[red]no[/red]" for value in (row.names, row.nodes, row.valid)]
        errors = [f"{value:.1e}" for value in (row.full, row.back, row.rounding)]
        table.add_row(row.file, str(row.sites), str(row.skips), f"{row.seconds:.2f} s", *errors, *marks)
    console.print(table)
    console.print(f"{sum(row.good for row in rows)} of {len(rows)} files keep all laws")


def main() -> None:
    """Examine the files, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of onnx_files.py")
    parser.add_argument("--to", type=Path, required=True, help="where the files are, or are fetched to")
    parser.add_argument("--file", action="append", help="a file by its name; all unless given")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("onnx_files", options.data / "onnx_files.py")
    assert spec is not None and spec.loader is not None, "a Python file has a loader"  # noqa: PT018
    files: Any = importlib.util.module_from_spec(spec)
    sys.modules["onnx_files"] = files
    spec.loader.exec_module(files)
    os.environ["ONNX_FILES"] = str(options.to)  # where its functions look for the files
    rows = []
    for name in options.file or list(files.FILES):
        feeds = files.inputs(name, 1, 0)[0] if files.FILES[name].feed else None
        inputs = None if feeds is None else {key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()}
        rows.append(examine(name, Path(files.path(name, options.to)), inputs))
    console = Console()
    show(console, rows)
    where = environment(make_backend().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        values = {"files": [asdict(row) for row in rows], "environment": asdict(where)}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
