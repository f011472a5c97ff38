"""Shapes of a graph's values by fake tensors: no real forward pass, no memory for activations."""

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
    """Return a function from nodes to shapes that runs ``fake_shapes`` when it is first asked."""
    found: list[Callable[[Node], Shape]] = []

    def shape(node: Node) -> Shape:
        if not found:
            found.append(fake_shapes(module, inputs()))
        return found[0](node)

    return shape


def fake_shapes(module: GraphModule, inputs: tuple[Any, ...]) -> Callable[[Node], Shape]:
    """Run a graph on fake tensors and return the shape of each node's value.

    Raises:
        InputError: the graph does not accept the example inputs, or has lazy layers that would get their weights here.
    """
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise InputError("the model has lazy layers without weights", next_step="run the model once")
    # loops whose number of steps depends on data need an environment for symbols, though all sizes are numbers
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
