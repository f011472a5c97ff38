"""Follow the sizes through a program from a file, where an operator of it trusts them. Computes no numbers.

The sizes that a file claims are not believed: torch's own rules of shapes are applied from the inputs on, whose sizes
are held against the data. Only programs with operators of ``archive_rules.BY_SIZES`` are followed. Such a call must be
reached with sizes that fit; where something in front of it cannot be followed, it is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from surgery.archive_rules import BY_SIZES, UNKNOWN, Held, check_sizes
from surgery.errors import UnsafeFileError

__all__ = ["check_program_sizes"]


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
    return ""


def _trusting(module: torch.nn.Module) -> set[Node]:
    """The calls, also in regions, of operators that trust sizes."""
    graphs = [each.graph for each in module.modules() if isinstance(each, GraphModule)]
    return {node for graph in graphs for node in graph.nodes if _name(node.target) in BY_SIZES}


def _held(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_held(each) for each in value]
    if isinstance(value, Tensor):
        return Held(tuple(size if type(size) is int else str(size) for size in value.shape))
    return value if value is None or isinstance(value, bool | int | float) else UNKNOWN


class _Follower:
    """Runs a graph on tensors without data; ``None`` stands for what could not be followed."""

    def __init__(self) -> None:
        self.seen: set[Node] = set()

    def run(self, module: GraphModule, inputs: Sequence[Any]) -> Any:
        made: dict[Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
            elif node.op == "get_attr":
                found = getattr(module, str(node.target))
                made[node] = functools.partial(self._region, found) if isinstance(found, GraphModule) else None
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], lambda each: made[each])
            else:
                made[node] = self._call(node, made)
        return None

    def _region(self, module: GraphModule, *inputs: Any) -> Any:
        return self.run(module, inputs)

    def _call(self, node: Node, made: dict[Node, Any]) -> Any:
        if any(made[each] is None for each in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: made[each])
        target: Any = node.target
        if _name(target) in BY_SIZES:
            names = [each.name for each in target._schema.arguments]
            call = dict(zip(names, args, strict=False)) | kwargs
            check_sizes(_name(target), {key: _held(value) for key, value in call.items()})
            self.seen.add(node)
        try:
            return target(*args, **kwargs)
        except UnsafeFileError:
            raise
        except Exception:  # torch has no rule for it, or the call is wrong: what depends on it is not known
            return None


def check_program_sizes(program: ExportedProgram) -> None:
    """Refuse a program in which an operator would read past the end of a tensor.

    Raises UnsafeFileError where sizes do not fit, or cannot be followed.
    """
    trusting = _trusting(program.graph_module)
    if not trusting:
        return
    inputs = [node.meta.get("val") for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(inputs)
    follower = _Follower()
    if mode is not None:
        guards = 0 if mode.shape_env is None else len(mode.shape_env.guards)
        with mode, torch.no_grad():
            follower.run(program.graph_module, inputs)
        if mode.shape_env is not None and len(mode.shape_env.guards) > guards:
            follower.seen.clear()  # what was found holds for some sizes of the inputs alone
    if missed := sorted(_name(node.target) for node in trusting - follower.seen):
        raise UnsafeFileError(f"it calls {missed[0]!r}, and the sizes there cannot be followed")
