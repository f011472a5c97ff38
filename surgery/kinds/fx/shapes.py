"""Shapes of a graph's values by fake tensors: no real forward pass, no memory for activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parameter import is_lazy

from surgery.algebra.operators import Shape
from surgery.errors import InputError
from surgery.text import first_line

__all__ = ["evaluation", "fake_shapes", "kept_buffers", "kept_random", "kept_state", "lazy_shapes", "untouched"]


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, and give each its own training flag back afterwards.

    The flags are set one by one: modules that torch.export made refuse ``eval()``.
    """
    flags = {m: m.training for m in module.modules()}
    for m in flags:
        m.training = False
    try:
        yield
    finally:
        for m, training in flags.items():
            m.training = training


def kept_random(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Give the random states that a model may use back: that of the CPU, and those of its devices."""
    found = {parameter.device for parameter in root.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=[device.index for device in found])


@contextlib.contextmanager
def kept_buffers(root: nn.Module) -> Iterator[None]:
    """Give buffers that the model writes to their numbers back."""
    kept = [(b, b._version, b.detach().clone()) for b in root.buffers() if not b.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, numbers in kept:
                if buffer._version != version:
                    buffer.copy_(numbers)


@contextlib.contextmanager
def kept_state(root: nn.Module) -> Iterator[None]:
    """Give a model the state back that it keeps itself: attributes, entries of lists and dicts, buffers, counters.

    A tracer leaves its proxies there, and a run what it counts.
    """
    kept = [(module, dict(vars(module)), _entries(module)) for module in root.modules()]
    try:
        with kept_buffers(root):
            yield
    finally:
        for module, own, entries in kept:
            _restore(vars(module), own)
            for value, before in entries:
                if isinstance(value, dict):
                    _restore(value, before)
                elif isinstance(value, list):
                    value[:] = before


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Give a module its own state and its random numbers back, as ``kept_state`` does; programs keep none."""
    if not isinstance(model, nn.Module):
        yield
        return
    with kept_random(model), kept_state(model):
        yield


def _entries(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the lists and dicts among a module's attributes, each with a copy of its entries."""
    return [(value, type(value)(value)) for value in vars(module).values() if type(value) in (list, dict)]


def _restore(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give a dict its entries back, where they are others."""
    same = list(map(id, value.values())) == list(map(id, before.values())) and len(value) == len(before)
    if not same:
        value.clear()
        value.update(before)


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
