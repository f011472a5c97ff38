"""How a graph computes a value from parameters and constants alone, as plain values: read, run, and written again.

A recipe is a list of steps; each is a parameter, a buffer, or a call on the values of earlier steps:

    {"op": "parameter", "target": "conv.weight"}    {"op": "call_function", "target": "torch.ops.aten.mul.Tensor",
                                                     "args": {"tuple": [{"step": 0}, 2.0]}, "kwargs": {"dict": {}}}

The recipe of a program is JSON. A recipe in a file may call only the operators that the program in the file may call.
The recipe of a traced graph can also contain methods and other functions. They are kept as Python objects, in memory
only; no name in a file leads to them.

A weight that a graph computes from parameters and constants, as a value; and what the record keeps of it.

    conv(x, standardise(conv.weight) * conv.gain)  ->  conv(x, W)    with W as a parameter conv.weight, computed once

After W is factored, the record keeps the recipe, the names and the form of each parameter, and the numbers of all
parameters but the main one. The main parameter is as large as W; its numbers come from what the factors compose to.
"""

from __future__ import annotations

import base64
import math
import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from surgery.errors import Refusal
from surgery.files.guard.operators import PLAIN_OPERATORS, check_operator
from surgery.files.guard.rules import check_values

__all__ = [
    "KeptWeight",
    "KeptParameter",
    "Lifted",
    "Recipe",
    "keep",
    "leaves",
    "read_kept",
    "read_recipe",
    "run_recipe",
    "write_recipe",
]

Recipe = Sequence[Mapping[str, Any]]

# values that JSON does not have, by the word that marks them: {"dtype": "float32"} is torch.float32
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def read_recipe(nodes: Sequence[Node], leaf: Mapping[Node, tuple[str, str]]) -> list[dict[str, Any]] | Refusal:
    """Return the steps for nodes in graph order, or why there are none.

    ``leaf`` has ("parameter", name) or ("buffer", name) for the nodes that provide one.
    """
    place = {node: at for at, node in enumerate(nodes)}
    steps: list[dict[str, Any]] = []
    for node in nodes:
        if node in leaf:
            op, name = leaf[node]
            steps.append({"op": op, "target": name})
            continue
        # inputs are numbers of earlier steps, so the recipe does not depend on names of nodes
        target = _name_target(node)
        args, kwargs = _encode(tuple(node.args), place), _encode(dict(node.kwargs), place)
        for part in (target, args, kwargs):
            if isinstance(part, Refusal):
                return part
        steps.append({"op": node.op, "target": target, "args": args, "kwargs": kwargs})
    return steps


def _name_target(node: Node) -> Any:
    """Return an operator's name as in an archive; for a function or a method of tensors, the function itself."""
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        return Refusal("its weight is computed in a region with a graph of its own")
    if node.op == "call_method":
        found = getattr(Tensor, target, None)
        what = f"its weight is computed by {target}, which is not a method of tensors"
        return Refusal(what) if found is None else found
    if isinstance(target, OpOverload):
        return f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
    name = f"_operator.{target.__name__}" if getattr(target, "__module__", "") == "_operator" else ""
    return name if name in PLAIN_OPERATORS else target


def _encode(value: Any, place: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"step": place[value]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    # each container is a dict with its kind as the only key, since JSON has no tuples, slices or infinities
    if isinstance(value, tuple | list | slice):
        given = [value.start, value.stop, value.step] if isinstance(value, slice) else value
        parts = [_encode(part, place) for part in given]
        refused = next((part for part in parts if isinstance(part, Refusal)), None)
        kind = "slice" if isinstance(value, slice) else "tuple" if isinstance(value, tuple) else "list"
        return refused or {kind: parts}
    if isinstance(value, dict):
        named = {str(key): _encode(part, place) for key, part in value.items()}
        refused = next((part for part in named.values() if isinstance(part, Refusal)), None)
        return refused or {"dict": named}
    if value is Ellipsis:
        return {"ellipsis": True}
    for name, cls in _KINDS.items():
        if isinstance(value, cls):
            return {name: str(value).removeprefix("torch.")}
    return Refusal(f"its weight is computed with a {type(value).__name__} among the arguments")


def _decode(value: Any, made: Sequence[Any]) -> Any:
    if not isinstance(value, Mapping):
        return value
    # a mapping has one key, the kind of the value
    ((kind, inner),) = value.items()
    if kind == "step":
        return made[inner]
    if kind == "dict":
        return {key: _decode(part, made) for key, part in inner.items()}
    if kind in ("tuple", "list", "slice"):
        parts = [_decode(part, made) for part in inner]
        return parts if kind == "list" else tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "device":
        return torch.device(inner)
    if kind in _KINDS:
        found = getattr(torch, inner)
        if not isinstance(found, _KINDS[kind]):
            raise ValueError(f"{inner} is not a {kind}")
        return found
    return Ellipsis if kind == "ellipsis" else float(inner)


def _resolve(target: Any) -> Any:
    """Return the operator of a name; a target that is not a name is returned as it is.

    Raises:
        UnsafeFileError: a program may not call the operator of this name.
    """
    if not isinstance(target, str):
        return target
    check_operator(target)
    if target.startswith("_operator."):
        return getattr(python_operator, target.removeprefix("_operator."))
    _, _, namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def leaves(recipe: Recipe, op: str) -> list[str]:
    """Return the names of a recipe's parameters or buffers, each once; ``op`` is "parameter" or "buffer"."""
    return list(dict.fromkeys(str(step["target"]) for step in recipe if step["op"] == op))


def run_recipe(
    recipe: Recipe, tensors: Mapping[str, Tensor], module: Callable[[str], nn.Module] | None = None
) -> Tensor:
    """Return the value of the last step, without gradients; ``module`` returns the submodule at a path.

    Raises:
        UnsafeFileError: a step calls an operator that a program may not call.
        Exception: whatever the steps raise on these tensors.
    """
    made: list[Any] = []
    with torch.no_grad():
        for step in recipe:
            op, target = step["op"], step["target"]
            if op in ("parameter", "buffer"):
                made.append(tensors[target])
                continue
            args, kwargs = _decode(step["args"], made), _decode(step["kwargs"], made)
            # all names are resolved through check_operator before anything is called
            callee = _callee(op, target, module)
            if op == "call_function" and isinstance(target, str):
                # names are checked when they are resolved; the values of arguments can be checked only here
                check_values(target, args, kwargs)
            made.append(callee(*args, **kwargs))
    value = made[-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"it is a {type(value).__name__}, not a tensor")
    return value


def _callee(op: str, target: Any, module: Callable[[str], nn.Module] | None) -> Callable[..., Any]:
    if op == "call_module" and module is not None:
        return module(target)
    if op == "call_function" or (op == "call_method" and not isinstance(target, str)):
        return _resolve(target)
    raise ValueError(f"{op} of {target} is not a step")  # a file may contain anything


def write_recipe(
    graph: Graph, recipe: Recipe, leaf: Callable[[str, str], Node], stamp: Callable[[Node, Node], None], *, like: Node
) -> list[Node]:
    """Insert the steps before ``like`` and return their nodes.

    ``leaf`` returns the nodes of parameters and buffers. ``stamp`` is called with each new node and ``like``.
    """
    made: list[Node] = []
    for step in recipe:
        op, target = step["op"], step["target"]
        if op in ("parameter", "buffer"):
            made.append(leaf(op, target))
            continue
        args, kwargs = _decode(step["args"], made), _decode(step["kwargs"], made)
        if op == "call_function":
            target = _resolve(target)
        elif op == "call_method":
            target = target.__name__
        with graph.inserting_before(like):
            made.append(graph.create_node(op, target, args, kwargs))
        stamp(made[-1], like)
    return made


@dataclass(frozen=True, eq=False)
class Lifted:
    """A computed weight, with its ``name`` as a parameter and its ``value``.

    ``node`` is the node that gives the weight to the calls. ``own`` are the nodes that only serve to compute the
    weight, in graph order. ``parameters`` are the parameters that it is computed from, and ``names`` has all names of
    each. ``main`` is the name of the parameter that is as large as the weight.
    """

    name: str
    node: Node
    own: tuple[Node, ...]
    recipe: Recipe
    parameters: Mapping[str, Tensor]
    names: Mapping[str, tuple[str, ...]]
    main: str
    value: nn.Parameter

    @property
    def surplus(self) -> int:
        """Number of entries of the parameters that the weight is computed from, less the number of its own entries."""
        return sum(tensor.numel() for tensor in self.parameters.values()) - self.value.numel()


@dataclass(frozen=True, eq=False)
class KeptParameter:
    """A parameter to be restored; ``value`` is None for the main parameter."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool
    value: Tensor | None


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """What the record keeps of a computed weight: the recipe, and the parameters by their names in the recipe."""

    recipe: Recipe
    parameters: Mapping[str, KeptParameter]
    main: str


def keep(lifted: Lifted) -> dict[str, Any]:
    """Return what is kept, as JSON values; the recipe of a traced graph may also contain functions themselves."""
    return {
        "recipe": list(lifted.recipe),
        "main": lifted.main,
        "parameters": {
            name: {
                "names": list(lifted.names[name]),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "trains": tensor.requires_grad,
                "value": None if name == lifted.main else _numbers(tensor),
            }
            for name, tensor in lifted.parameters.items()
        },
    }


def read_kept(entry: Any) -> KeptWeight:
    """Return what a record keeps of a computed weight.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the entry has another form; files may contain anything.
    """
    parameters = {str(name): _read_parameter(row, name == entry["main"]) for name, row in entry["parameters"].items()}
    if entry["main"] not in parameters or not isinstance(entry["recipe"], list):
        raise ValueError("it has no main parameter or no recipe")
    return KeptWeight(entry["recipe"], parameters, entry["main"])


def _read_parameter(row: Mapping[str, Any], is_main: bool) -> KeptParameter:
    dtype, shape = getattr(torch, row["dtype"]), torch.Size(row["shape"])
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or any(size < 0 for size in shape):
        raise ValueError(f"{row['dtype']} {row['shape']} is not a parameter")
    names = tuple(map(str, row["names"]))
    value = None if is_main else _read_numbers(row["value"], dtype, shape)
    return KeptParameter(names, tuple(shape), dtype, bool(row["trains"]), value)


def _numbers(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return base64.b64encode(bytes(plain.tolist())).decode("ascii")


def _read_numbers(text: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    numbers = bytearray(base64.b64decode(text, validate=True))
    if len(numbers) != shape.numel() * dtype.itemsize:
        raise ValueError(f"{len(numbers)} bytes are not a tensor of shape {list(shape)} and {dtype}")
    return torch.frombuffer(numbers, dtype=dtype).view(shape) if numbers else torch.empty(shape, dtype=dtype)
