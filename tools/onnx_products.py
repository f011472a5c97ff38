"""Count the nodes of an ONNX file that multiply by weights, from the protobuf alone, and those that no report names.

Nothing here uses surgery's reader, so that it can be checked against it. A value is constant if it is an initializer,
the output of a Constant node, or computed from constants alone. A constant is a weight if it has two axes or more, of
floats or of quantized numbers; one that is computed is a weight if it comes from one. Nodes are found in the graph, in
the bodies of If, Loop and Scan, and in the model's own functions, once for each call of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, TensorProto

from surgery.sites import Site, Skip, site_name

__all__ = ["Product", "products", "silent"]

_ITEMS: dict[str, tuple[int, ...]] = {  # where an operator of ONNX's own multiplies by what it reads
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "DeformConv"), (0, 1)),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2)),
    **{"Gather": (0,), "QLinearConv": (3,), "QLinearMatMul": (0, 3), "Einsum": tuple(range(9))},
}
_PLAIN = ("", "ai.onnx")
_TREES = "ai.onnx.ml"  # its operators multiply by no matrix
_MEASURES = ("Shape", "Size")  # read a constant, but not its numbers
_MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast")  # the same numbers
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
_NUMBERS = {
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16),
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4),
}


@dataclass(frozen=True)
class _Constant:
    """What is known of a constant: whether it is a weight; ``root`` is its own name if it is not computed."""

    weight: bool
    root: str | None


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a weight: its names, the weights that it reads as they are stored, and its place.

    ``computed`` says that it reads a weight that other nodes compute from constants; ``where`` is the path of bodies
    and functions around it, empty in the graph itself.
    """

    op_type: str
    domain: str
    name: str
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    computed: bool
    where: str

    def __str__(self) -> str:
        """Say what node it is."""
        kind = self.op_type if self.domain in _PLAIN else f"{self.domain}.{self.op_type}"
        reads = [*self.weights, *(["a computed weight"] if self.computed else [])]
        place = f" in {self.where}" if self.where else ""
        return f"{kind} {self.name or self.outputs[0]}{place} (reads {', '.join(reads)})"


_Known = Mapping[str, _Constant]


def products(model: onnx.ModelProto) -> list[Product]:
    """Return all nodes that multiply by weights, in order."""
    return list(_Walk(model).graph(model.graph, {}, ""))


class _Walk:
    """Walks through the graphs of a model; ``known`` are the constants that can be seen from where it is."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._functions = {(f.domain, f.name): f for f in model.functions}

    def graph(self, graph: onnx.GraphProto, outer: _Known, where: str) -> Iterator[Product]:
        """Yield the products of a graph, and of what is inside of it."""
        shadowed = {value.name for value in graph.input}
        known = {name: constant for name, constant in outer.items() if name not in shadowed}
        known |= {tensor.name: _constant(tensor, tensor.name) for tensor in graph.initializer}
        known |= {s.values.name: _Constant(len(s.dims) > 1, s.values.name) for s in graph.sparse_initializer}
        yield from self._nodes(graph.node, known, where)

    def _nodes(self, nodes: Sequence[onnx.NodeProto], known: dict[str, _Constant], where: str) -> Iterator[Product]:
        for node in nodes:
            found = _value_of(node, known)
            if found is not None:
                known |= {name: found for name in node.output if name}
                continue
            for name in node.output:
                known.pop(name, None)
            product = self._product(node, known, where)
            if product is not None:
                yield product
            yield from self._inside(node, known, where)

    def _inside(self, node: onnx.NodeProto, known: _Known, where: str) -> Iterator[Product]:
        path = f"{where}/{node.op_type} {node.name or ''.join(node.output[:1])}"
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from self.graph(graph, known, f"{path}.{attribute.name}")
        function = self._functions.get((node.domain, node.op_type))
        if function is not None:
            given = zip(function.input, node.input, strict=False)
            yield from self._nodes(function.node, {own: known[name] for own, name in given if name in known}, path)

    def _product(self, node: onnx.NodeProto, known: _Known, where: str) -> Product | None:
        plain = node.domain in _PLAIN
        if node.domain == _TREES or (node.domain, node.op_type) in self._functions:
            return None
        # an operator of another domain may do anything with a weight: it counts
        places = _ITEMS.get(node.op_type, ()) if plain else range(len(node.input))
        read = [known[node.input[at]] for at in places if at < len(node.input) and node.input[at] in known]
        weights = [constant for constant in read if constant.weight]
        if not weights:
            return None
        roots = tuple(constant.root for constant in weights if constant.root is not None)
        computed = any(constant.root is None for constant in weights)
        return Product(node.op_type, node.domain, node.name, tuple(node.output), roots, computed, where)


def _constant(tensor: TensorProto, name: str) -> _Constant:
    return _Constant(len(tensor.dims) > 1 and tensor.data_type in _NUMBERS, name)


def _value_of(node: onnx.NodeProto, known: _Known) -> _Constant | None:
    """Return what a node computes if that is constant; None if it depends on the inputs, or is random."""
    if node.op_type == "Constant" and node.domain in _PLAIN:
        tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        return _constant(tensors[0], node.output[0]) if tensors else _Constant(False, node.output[0])
    reads = [name for name in node.input if name]
    bodies = any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute)
    if bodies or not reads or node.op_type in _RANDOM or any(name not in known for name in reads):
        return None
    if node.op_type in _MOVES:
        return known[reads[0]]
    return _Constant(node.op_type not in _MEASURES and any(known[name].weight for name in reads), None)


def silent(found: Sequence[Product], sites: Sequence[Site], skips: Sequence[Skip]) -> list[Product]:
    """Return the products that neither a site nor a skip stands for.

    A site stands for as many nodes that read its weight as it has calls. A skip stands for the node that it is named
    after, or for all nodes that read the weight that it is named after.
    """
    calls = Counter({name: site.calls for site in sites for name in (site.name, *site.aliases)})
    by_weight, by_node = {skip.name for skip in skips}, Counter(skip.name for skip in skips)
    left = []
    for product in found:
        weights = [site_name(weight) for weight in product.weights]
        called = next((name for name in weights if calls[name] > 0), None)
        named = next((name for name in (product.name, *product.outputs) if name and by_node[name] > 0), None)
        if called is not None:
            calls[called] -= 1
        elif named is not None:
            by_node[named] -= 1
        elif not by_weight.intersection(weights):
            left.append(product)
    return left
