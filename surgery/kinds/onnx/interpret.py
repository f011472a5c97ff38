"""Run an ONNX graph in torch, node by node, so that its values are seen, replaced and differentiated.

Each node is a function of torch tensors from the table of operators. A node that has none there, or one that does not
know its attributes, runs by onnxruntime; no gradient leads through it. Nodes that read constants alone run once, when
the graph is read, but for those of calls, which may be watched. The bodies of If, Loop and Scan, and functions of the
model, are graphs of their own, which run in the same environment: values are objects, so that those of different graphs
never meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from surgery.kinds.onnx.one_node import OneNode, bodies_of, captured_by, is_used
from surgery.kinds.onnx.ops.said import Op, Said
from surgery.kinds.onnx.ops.table import OPS
from surgery.kinds.onnx.tensors import DTYPES, to_torch

__all__ = ["RANDOM", "Interpreter", "Observers"]

Env = dict[ir.Value, Any]
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
_SHAPED = ("RandomNormalLike", "RandomUniformLike")  # they read nothing but a shape
_QUANTIZE = ("QuantizeLinear", "DynamicQuantizeLinear")
_MOST_FOLDED = 2**20  # numbers of a value from constants alone, beyond those of its inputs, that are kept


class Observers:
    """What sees and replaces values while a graph runs.

    ``before`` has, by node, values that are shown just before the node runs; ``after`` has, by value, a function whose
    result stands in place of the value. The gates of a recurrent node are a value too.
    """

    def __init__(self) -> None:
        self.before: dict[ir.Node, list[tuple[ir.Value, Callable[[Any], None]]]] = defaultdict(list)
        self.after: dict[ir.Value, Callable[[Any], Any]] = {}


@dataclass(frozen=True, eq=False)
class _Step:
    """A node, the function that gives its outputs, and the values that nothing reads after it."""

    node: ir.Node
    run: Callable[[Env], Sequence[Any]]
    frees: tuple[ir.Value, ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """The steps of a graph that do not read constants alone."""

    inputs: Sequence[ir.Value]
    outputs: Sequence[ir.Value]
    steps: Sequence[_Step]


class Interpreter:
    """A graph that runs in torch; without ``in_torch``, onnxruntime runs every node that has no body.

    ``gates`` has the value that stands for the product of the input and the input weight of each recurrent node.
    ``calls`` are the nodes that run each time, also if they read constants alone.
    ``constants`` are the values that do not depend on inputs. ``elsewhere`` are the nodes that onnxruntime has run, and
    ``blocked`` those of them where gradients ended; ``is_random`` says whether the graph draws random numbers.
    """

    def __init__(
        self,
        model: ir.Model,
        gates: Mapping[ir.Node, ir.Value],
        *,
        calls: Collection[ir.Node] = (),
        in_torch: bool = True,
    ) -> None:
        self._model, self._gates, self._calls, self._in_torch = model, gates, calls, in_torch
        self._observers = Observers()
        self.constants: Env = {}
        self.elsewhere: set[ir.Node] = set()
        self.blocked: set[ir.Node] = set()
        self.is_random = False
        with torch.no_grad():
            self._main = self._plan(model.graph, model.opset_imports)

    def run(self, feeds: Mapping[ir.Value, Any], observers: Observers | None = None) -> tuple[Any, ...]:
        """Return the outputs: tensors, lists of them for sequences, and None for an optional value that is none."""
        self._observers = observers or Observers()
        return tuple(self._run(self._main, {**self.constants, **feeds}))

    def _run(self, plan: _Plan, env: Env) -> list[Any]:
        before, after = self._observers.before, self._observers.after
        for step in plan.steps:
            if step.node in before:
                for source, see in before[step.node]:
                    see(env[source])
            # zip ends with the outputs that the node was asked for
            for value, found in zip(step.node.outputs, step.run(env), strict=False):
                env[value] = after[value](found) if value in after else found
            for value in step.frees:
                env.pop(value, None)
        return [env[value] for value in plan.outputs]

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _plan(self, graph: ir.Graph, opsets: Mapping[str, int]) -> _Plan:
        for value in graph.initializers.values():
            if value.const_value is not None:
                self.constants[value] = _constant(value.const_value)
        made = []
        for node in graph:
            run = self._runner(node, opsets)
            if not self._fold(node, run):
                made.append((node, run))
        inputs = [value for value in graph.inputs if value not in self.constants]
        return _Plan(inputs, list(graph.outputs), _with_frees(made, inputs, graph.outputs))

    def _fold(self, node: ir.Node, run: Callable[[Env], Sequence[Any]]) -> bool:
        """Compute a node that reads constants alone, and return whether its outputs are constants now."""
        if node.op_type in RANDOM:
            self.is_random = True
            return False
        reads = [value for value in node.inputs if value is not None]
        if node in self._calls or bodies_of(node) or any(value not in self.constants for value in reads):
            return False
        try:
            found = run(self.constants)
        except Exception:  # it may never run, as in a body that is not chosen
            return False
        most = _MOST_FOLDED + sum(map(_numbers, (self.constants[value] for value in reads)))
        if sum(map(_numbers, found)) > most:
            return False
        self.constants.update(zip(node.outputs, found, strict=False))
        return True

    def _runner(self, node: ir.Node, opsets: Mapping[str, int]) -> Callable[[Env], Sequence[Any]]:
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            return self._function(node, function)
        plain = node.domain in ("", "ai.onnx")
        bodies: dict[str, Callable[[ir.Node, Mapping[str, int]], Callable[[Env], Sequence[Any]]]] = {
            "If": self._if,
            "Loop": self._loop,
            "Scan": self._scan,
        }
        opset = opsets.get("", opsets.get("ai.onnx", 1)) if plain else opsets.get(node.domain, 1)
        if plain and node.op_type in bodies and not (node.op_type == "Scan" and opset < 9):
            return bodies[node.op_type](node, opsets)
        if plain and node.op_type == "Constant" and (found := _value_of(node)) is not None:
            return lambda env: (found,)
        one = OneNode(node, opsets, self._model.ir_version, self.constants)
        name = node.op_type if plain else f"{node.domain}.{node.op_type}"
        # sequences have no other form than lists, in either way
        op = OPS.get(name) if self._in_torch or "Sequence" in name or "Optional" in name else None
        if op is None:
            return lambda env: self._by_onnxruntime(node, one, env)
        return self._by_torch(node, op, one, opset)

    def _by_torch(self, node: ir.Node, op: Op, one: OneNode, opset: int) -> Callable[[Env], Sequence[Any]]:
        inputs = list(node.inputs)

        gates = self._gates.get(node)

        def product(made: Tensor) -> Tensor:
            change = None if gates is None else self._observers.after.get(gates)
            return made if change is None else change(made)

        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        used = [at for at, value in enumerate(node.outputs, 1) if is_used(value)]
        said = Said(node.op_type, opset, attributes, max(used, default=1), len(node.outputs), product)

        def run(env: Env) -> Sequence[Any]:
            read = [None if value is None else env[value] for value in inputs]
            if all(value is None or isinstance(value, Tensor | list) for value in read):
                try:
                    found = op(said, *read)
                except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                    found = None  # a type that torch has no such function for; or onnxruntime will say what is wrong
                if found is not None:
                    return found if isinstance(found, tuple) else (found,)
            return self._by_onnxruntime(node, one, env)

        return run

    def _by_onnxruntime(self, node: ir.Node, one: OneNode, env: Env) -> Sequence[Any]:
        self.elsewhere.add(node)
        found = one.run(env)
        read = (env[value] for value in (*node.inputs, *captured_by(node)) if value is not None)
        if any(isinstance(value, Tensor) and value.requires_grad for value in read):
            floats = any(isinstance(value, Tensor) and value.is_floating_point() for value in found)
            if node.op_type not in _SHAPED and (floats or node.op_type in _QUANTIZE):
                self.blocked.add(node)
        return found

    # -- bodies -------------------------------------------------------------------------------------------------------

    def _function(self, node: ir.Node, function: ir.Function) -> Callable[[Env], Sequence[Any]]:
        body = _called(function, node)
        plan = self._plan(body.graph, body.opset_imports)

        def run(env: Env) -> Sequence[Any]:
            for at, value in enumerate(body.inputs):
                given = node.inputs[at] if at < len(node.inputs) else None
                env[value] = None if given is None else env[given]
            return self._run(plan, env)

        return run

    def _if(self, node: ir.Node, opsets: Mapping[str, int]) -> Callable[[Env], Sequence[Any]]:
        branches = {
            chosen: self._plan(node.attributes[name].as_graph(), opsets)
            for chosen, name in ((True, "then_branch"), (False, "else_branch"))
        }
        [condition] = node.inputs
        assert condition is not None
        return lambda env: self._run(branches[bool(env[condition])], env)

    def _loop(self, node: ir.Node, opsets: Mapping[str, int]) -> Callable[[Env], Sequence[Any]]:
        body = node.attributes["body"].as_graph()
        plan, states = self._plan(body, opsets), len(body.inputs) - 2

        def run(env: Env) -> Sequence[Any]:
            # A body takes (turn, going, states ...) and gives (going, states ..., rows ...); the rows
            # of all turns are stacked.
            limit, go, *carried = (None if value is None else env[value] for value in node.inputs)
            rows: list[list[Tensor]] = [[] for _ in body.outputs[1 + states :]]
            turn, going = 0, go is None or bool(go)
            while going and (limit is None or turn < int(limit)):
                env.update(zip(body.inputs, (torch.tensor(turn), torch.tensor(going), *carried), strict=True))
                again, *found = self._run(plan, env)
                turn, going, carried = turn + 1, bool(again), found[:states]
                for row, value in zip(rows, found[states:], strict=True):
                    row.append(value)
            return (*carried, *map(_stacked, rows, body.outputs[1 + states :]))

        return run

    def _scan(self, node: ir.Node, opsets: Mapping[str, int]) -> Callable[[Env], Sequence[Any]]:
        body = node.attributes["body"].as_graph()
        said = {name: attribute.value for name, attribute in node.attributes.items()}
        plan, scanned = self._plan(body, opsets), int(said["num_scan_inputs"])
        states = len(node.inputs) - scanned
        made = len(body.outputs) - states
        axes, ways = (said.get(f"scan_input_{name}", (0,) * scanned) for name in ("axes", "directions"))
        out_axes, out_ways = (said.get(f"scan_output_{name}", (0,) * made) for name in ("axes", "directions"))

        def run(env: Env) -> Sequence[Any]:
            after = self._observers.after
            given: list[Any] = [None if value is None else env[value] for value in node.inputs]
            carried = given[:states]
            taken = [
                x.flip(a).unbind(a) if w else x.unbind(a) for x, a, w in zip(given[states:], axes, ways, strict=True)
            ]
            rows: list[list[Tensor]] = [[] for _ in range(made)]
            for each in zip(*taken, strict=True):
                for value, row in zip(body.inputs, (*carried, *each), strict=True):
                    env[value] = after[value](row) if value in after else row
                found = self._run(plan, env)
                carried = found[:states]
                for row, value in zip(rows, found[states:], strict=True):
                    row.append(value)
            stacks = map(
                _stacked, (r[::-1] if w else r for r, w in zip(rows, out_ways, strict=True)), body.outputs[states:]
            )
            return (*carried, *(stack.movedim(0, a) for stack, a in zip(stacks, out_axes, strict=True)))

        return run


def _with_frees(
    made: Sequence[tuple[ir.Node, Callable[[Env], Sequence[Any]]]],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> list[_Step]:
    """Return the steps of nodes; each value is freed after the last node that reads it."""
    last: dict[ir.Value, int] = {}
    for at, (node, _) in enumerate(made):
        reads = (value for value in (*node.inputs, *captured_by(node)) if value is not None)
        last.update(dict.fromkeys([*node.outputs, *reads], at))
    # Values from outside of a body stay: its next turn reads them again.
    own = {*inputs, *(value for node, _ in made for value in node.outputs)} - set(outputs)
    frees: dict[int, list[ir.Value]] = defaultdict(list)
    for value, at in last.items():
        if value in own:
            frees[at].append(value)
    return [_Step(node, run, tuple(frees[at])) for at, (node, run) in enumerate(made)]


def _called(function: ir.Function, node: ir.Node) -> ir.Function:
    """Return the function for one call: its own values, and the call's attributes where the function refers to them."""
    body = function.clone()
    given = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
    given |= dict(node.attributes)
    for inner in body.all_nodes():
        for name, attribute in list(inner.attributes.items()):
            if attribute.is_ref():
                found = given.get(attribute.ref_attr_name or "")
                if found is None:
                    del inner.attributes[name]
                else:
                    inner.attributes[name] = ir.Attr(name, found.type, found.value)
    return body


def _constant(tensor: ir.TensorProtocol) -> Any:
    """Return the numbers of a tensor; texts as an array, and of a type that torch does not have, the tensor itself."""
    try:
        if tensor.dtype is ir.DataType.STRING:  # as onnxruntime gives and takes texts
            texts = [text.decode() for text in tensor.numpy().reshape(-1).tolist()]
            return np.array(texts, dtype=object).reshape(tensor.shape.numpy())
        return to_torch(tensor)
    except (TypeError, UnicodeDecodeError):
        return tensor


def _value_of(node: ir.Node) -> Any:
    """Return the value of a Constant node; None if it is written in a form that is left to onnxruntime."""
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        return _constant(attribute.value)
    kinds = {"value_float": torch.float32, "value_floats": torch.float32, "value_int": torch.int64}
    kind = {**kinds, "value_ints": torch.int64}.get(name)
    return None if kind is None else torch.tensor(attribute.value, dtype=kind)


def _numbers(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def _stacked(rows: list[Tensor], declared: ir.Value) -> Tensor:
    """Return rows as one tensor; without any, one of the declared type and shape, with 0 for unknown sizes."""
    if rows:
        return torch.stack(rows)
    sizes = [] if declared.shape is None else [size if isinstance(size, int) else 0 for size in declared.shape]
    return torch.zeros(0, *sizes, dtype=DTYPES.get(declared.dtype or ir.DataType.FLOAT, torch.float32))
