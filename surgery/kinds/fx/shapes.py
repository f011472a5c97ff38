"""Shapes of a graph's values, found with fake tensors: without a real forward pass and memory for activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parameter import is_lazy

from surgery.algebra.operators import Shape
from surgery.errors import InputError
from surgery.kinds.layers.untouched import evaluation
from surgery.text import first_line

__all__ = ["fake_shapes", "lazy_shapes"]


class _Shapes(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[Node, Shape] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(int(size) for size in value.shape)
        return value


def lazy_shapes(module: GraphModule, inputs: Callable[[], tuple[Any, ...]]) -> Callable[[Node], Shape]:
    """Return a function from nodes to shapes; its first call runs ``fake_shapes``."""
    found: list[Callable[[Node], Shape]] = []

    def shape(node: Node) -> Shape:
        if not found:
            found.append(fake_shapes(module, inputs()))
        return found[0](node)

    return shape


def fake_shapes(module: GraphModule, inputs: tuple[Any, ...]) -> Callable[[Node], Shape]:
    """Run a graph on fake tensors and return the shape of each node's value.

    Raises:
        InputError: the graph does not accept the example inputs, or it has lazy layers, which the run would initialise.
    """
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise InputError("the model has lazy layers without weights", next_step="run the model once")
    # all sizes are numbers, but a loop whose number of steps depends on data needs an environment for symbols
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)

    def fake(value: Any) -> Any:
        plain = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return mode.from_tensor(value) if plain else value

    interpreter = _Shapes(module)
    try:
        with mode, torch.no_grad(), evaluation(module):
            interpreter.run(*torch.utils._pytree.tree_map(fake, inputs))
    except Exception as error:  # the graph may raise anything on inputs that do not fit
        what = f"the model does not accept the example inputs: {first_line(error)}"
        raise InputError(what, next_step="check their number, shapes and dtypes") from error
    return interpreter.shapes.__getitem__
