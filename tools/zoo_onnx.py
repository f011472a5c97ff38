"""The laws on real ONNX files of others: full rank gives the same outputs, and recompose gives the file back.

    python tools/zoo_onnx.py --data FOLDER [--files FOLDER] [--only NAME...] [--json FILE]

``--data`` has ``onnx_files.py``, which fetches the files to the folder of ``--files`` and makes their inputs. All
outputs are those of saved files, run by onnxruntime. For each file the table has

    sites     the sites
    skips     the places that are left alone
    silent    the nodes that multiply by a weight, but that neither a site nor a skip stands for (``onnx_products.py``)
    full      the relative error of the outputs at full ranks
    back      the relative error of the outputs after recompose
    rounding  what the outputs change by if all inputs and weights move by their rounding: errors near this are rounding
    weights   whether the recomposed file has the weights of the original, by name and shape
    others    the nodes that are no part of a site, and that the factored or the recomposed file does not have as they
              were
    valid     whether onnx's checker and onnxruntime take both files
    find, all the seconds to find the sites, and to do everything

A file keeps the laws if both errors are at most four times the rounding, and everything else is as it should be. What
is not so, and a file on which something fails, is listed below the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import AttributeProto, TensorProto, numpy_helper
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.algebra import relative_error
from surgery.cost.base import make_backend
from surgery.errors import SurgeryError
from surgery.kinds.registry import kind_of
from surgery.runtime.bench import environment
from surgery.runtime.compare import run_model
from surgery.sites import Site
from surgery.system.tables import table
from tools.onnx_products import Product, products, silent
from tools.real_onnx import chosen, open_files, option_parser

LEAST = 1e-5  # of float32, whose outputs may move by this where the inputs are whole numbers and few weights move
TIMES = 4  # times what rounding does: chains round more often than operators
VAGUE = 1e-3  # rounding that leaves nothing to compare
MOVE = 1e-6  # by what inputs and weights move to see what rounding does: a few units in the last place of float32
_Inputs = dict[str, Tensor]
_Node = tuple[Any, ...]


@dataclass
class Row:
    """What one file showed; ``failed`` is the failure, if there was one, and ``seconds`` are for everything."""

    file: str
    sites: int = 0
    skips: int = 0
    nodes: int = 0
    silent: list[str] = field(default_factory=list)
    full: float = 0.0
    back: float = 0.0
    rounding: float = 0.0
    weights: bool = True
    others: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    find: float = 0.0
    seconds: float = 0.0
    failed: str = ""

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        allowed = max(LEAST, TIMES * self.rounding)
        found = [self.failed] if self.failed else []
        found += [f"no site and no skip stands for {node}" for node in self.silent]
        for name, error in (("at full ranks", self.full), ("after recompose", self.back)):
            found += [] if error <= allowed else [f"an error of {error:.1e} {name}; rounding explains {allowed:.1e}"]
        found += [] if self.weights else ["recompose gives other weights"]
        return [*found, *(f"changed: {node}" for node in self.others), *self.invalid]


def examine(row: Row, path: Path, inputs: _Inputs | None) -> None:
    """Fill the row of a file; without inputs nothing is run."""
    model: Any = surgery.load(path)
    before = onnx.load(path)
    start = time.perf_counter()
    sites, skips = surgery.find_sites(model, inputs)
    row.find = time.perf_counter() - start
    found = products(before)
    row.sites, row.skips, row.nodes = len(sites), len(skips), len(found)
    row.silent = list(map(str, silent(found, sites, skips)))
    made = surgery.decompose(model, inputs, ranks="full").model
    back = surgery.recompose(made, inputs).model
    row.weights = _weights(back) == _weights(model)
    own = _own(before, found, sites)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [_outputs(path, inputs)]
        for name, changed in (("factored", made), ("recomposed", back)):
            file = Path(folder) / f"{name}.onnx"
            surgery.save(changed, file)
            row.invalid += _invalid(file, name)
            row.others += _others(before, onnx.load(file), own, name)
            outputs.append(_outputs(file, inputs))
        row.others += _counts(before, onnx.load(file))
    row.full, row.back = (_error(each, outputs[0]) for each in outputs[1:])
    if inputs is not None:
        moved = ir.serde.deserialize_model(_moved(before))
        row.rounding = _error(_floats(run_model(moved, ((), _moved_inputs(inputs)))), outputs[0])


def _outputs(path: Path, inputs: _Inputs | None) -> list[Tensor]:
    return [] if inputs is None else _floats(run_model(surgery.load(path), ((), inputs)))


def _floats(found: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in wanted]:
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _invalid(path: Path, name: str) -> list[str]:
    """Return what onnx's checker has against a file; onnxruntime runs it, or it fails."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [f"onnx's checker refuses the {name} file: {_short(error)}"]
    return []


def _weights(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in kind_of(model).tensors(model).items()}


# -- what rounding does -----------------------------------------------------------------------------------------------


def _moved_inputs(inputs: _Inputs) -> _Inputs:
    """Return the inputs with all floats moved; those that are whole numbers may stand for classes, and stay."""
    generator, moved = torch.Generator().manual_seed(0), dict(inputs)
    for name, value in inputs.items():
        if value.is_floating_point() and not torch.equal(value, value.round()):
            moved[name] = value * (1 + MOVE * torch.randn(value.shape, generator=generator))
    return moved


def _moved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with all weights of floats moved."""
    moved, rng = onnx.ModelProto(), np.random.default_rng(0)
    moved.CopyFrom(model)
    for tensor in _tensors(moved.graph):
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE) and len(tensor.dims) > 1:
            numbers = numpy_helper.to_array(tensor)
            noise = 1 + MOVE * rng.standard_normal(numbers.shape)
            tensor.CopyFrom(numpy_helper.from_array((numbers * noise).astype(numbers.dtype), tensor.name))
    return moved


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


# -- what else has changed --------------------------------------------------------------------------------------------


def _own(model: onnx.ModelProto, found: Sequence[Product], sites: Sequence[Site]) -> set[str]:
    """Return the outputs of the nodes that belong to sites: products, and the additions of biases to them."""
    names = {end for site in sites for name in (site.name, *site.aliases) for end in (name, f"{name}.weight")}
    own = {product.outputs[0] for product in found if names.intersection(product.weights)}
    nodes = list(_all_nodes(model.graph))
    own |= {n.output[0] for n in nodes if n.op_type == "Add" and own.intersection(n.input)}
    return own | {n.output[0] for n in nodes if n.op_type == "Constant" and n.output[0] in names}


def _others(before: onnx.ModelProto, after: onnx.ModelProto, own: set[str], name: str) -> list[str]:
    """Return the nodes that are no part of a site, and that a changed file does not have as they were."""
    kept = _nodes(after)
    lost = [output for output, node in _nodes(before).items() if output not in own and kept.get(output) != node]
    return [f"{before_type} {output} in the {name} file" for output, before_type in _types(before, lost)]


def _counts(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Return the operators of which a recomposed file has more nodes than the original, or fewer."""
    nodes = [list(_all_nodes(model.graph)) for model in (before, after)]
    counts = [Counter(n.op_type for n in row) for row in nodes]
    names = sorted(counts[0].keys() | counts[1].keys())
    return [f"{n}, {counts[0][n]} to {counts[1][n]} nodes" for n in names if counts[0][n] != counts[1][n]]


def _nodes(model: onnx.ModelProto) -> dict[str, _Node]:
    """Return all there is to a node but its inputs, which may have new names, by its first output."""
    return {node.output[0]: (len(node.input), *_node(node)) for node in _all_nodes(model.graph)}


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of all bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _all_nodes(inner)


def _node(node: onnx.NodeProto) -> _Node:
    said = sorted((attribute.name, _value(attribute)) for attribute in node.attribute)
    return (node.op_type, node.domain, node.name, tuple(node.output), tuple(said))


def _value(attribute: AttributeProto) -> Any:
    """Return the value of an attribute; tensors may be stored in other ways, and a body may declare more types."""
    if attribute.type == AttributeProto.TENSOR:
        return _numbers(attribute.t)
    if attribute.type == AttributeProto.GRAPH:
        return tuple(value.name for value in (*attribute.g.input, *attribute.g.output))  # its nodes are in the list
    return attribute.SerializeToString(deterministic=True)


def _numbers(tensor: TensorProto) -> _Node:
    return (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())


def _types(model: onnx.ModelProto, outputs: Sequence[str]) -> list[tuple[str, str]]:
    kinds = {node.output[0]: node.op_type for node in _all_nodes(model.graph)}
    return [(output, kinds[output]) for output in outputs]


# -- the table --------------------------------------------------------------------------------------------------------


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:300]


def show(rows: Sequence[Row]) -> None:
    """Print the table, what is not as it should be, and how many files keep the laws."""
    heads = ("file", "sites", "skips", "silent", "full", "back", "rounding", "weights", "others", "valid")
    cells = [[*heads, "find", "all"]]
    for row in rows:
        errors = [f"{value:.1e}" for value in (row.full, row.back, row.rounding)]
        marks = ["yes" if row.weights else "NO", str(len(row.others)), "NO" if row.invalid else "yes"]
        shown = [str(row.sites), str(row.skips), str(len(row.silent)), *errors, *marks]
        shown = ["failed", *["-"] * 8] if row.failed else shown
        cells.append([row.file, *shown, f"{row.find:.2f} s", f"{row.seconds:.1f} s"])
    print(table(cells))
    for row in rows:
        for fault in row.faults:
            print(f"{row.file}: {fault}")
        if row.rounding > VAGUE and row.sites:
            print(f"{row.file}: note: these inputs say little, since rounding alone changes the outputs so much")
    sites, nodes, unnamed = (sum(each) for each in zip(*((r.sites, r.nodes, len(r.silent)) for r in rows), strict=True))
    print(f"{nodes} nodes multiply by weights, {unnamed} of them unnamed; {sites} sites")
    print(f"{sum(not row.faults for row in rows)} of {len(rows)} files keep all laws")


def main() -> None:
    """Examine the files, one after another, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    options = option_parser((__doc__ or "").splitlines()[0]).parse_args()
    files = open_files(options)
    rows = []
    where = environment(make_backend().threads)
    for name in chosen(options.only, files.names):
        print(name, file=sys.stderr, flush=True)
        rows.append(row := Row(name))
        start = time.perf_counter()
        try:
            inputs = files.inputs(name, 1, 0)
            examine(row, files.path(name), inputs[0] if inputs else None)
        except SurgeryError as error:
            row.failed = f"refused: {_short(error)}"
        except Exception as error:  # whatever goes wrong is what this tool is to show
            row.failed = f"{type(error).__name__}: {_short(error)}"
        row.seconds = time.perf_counter() - start
        if options.json:  # as soon as it is known
            values = {"files": [asdict(row) for row in rows], "environment": asdict(where)}
            options.json.write_text(json.dumps(values, indent=2) + "\n")
    show(rows)
    print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, onnx {onnx.__version__}")


if __name__ == "__main__":
    main()
