"""Follow sizes through a program from a file that calls operators which trust them. No tensor has data here.

The sizes that a file claims are not believed. They are computed by torch's own shape rules from the inputs on, whose
sizes were checked against the data. Only programs that call operators of ``rules.BY_SIZES`` are followed. Such a call
must get sizes that fit. It is refused if the sizes before it cannot be followed.

Check that a loaded program is consistent: its weights and its sample inputs must fit its graph.

torch also loads an archive whose weights have other sizes than its graph says, and fails later, elsewhere. These checks
cover what the passes rely on. Each weight exists, is dense, and has the sizes and the dtype that the graph declares.
The sample inputs are ``(args, kwargs)`` in the structure of the program's inputs, each a tensor or a number as in the
graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from surgery.errors import FileError, UnsafeFileError
from surgery.files.guard.rules import BY_SIZES, UNKNOWN, Held, check_sizes
from surgery.text import cut, shown

__all__ = ["check_fit", "check_program_sizes"]

_ATEN = torch.ops.aten
_LOOPS = frozenset(
    getattr(torch.ops.higher_order, name, None)
    for name in ("while_loop", "scan", "associative_scan", "map_impl", "map")
)
_CONVOLUTIONS = frozenset(
    [getattr(_ATEN, f"conv{n}d").default for n in (1, 2, 3)]
    + [_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input]
    + [_ATEN.convolution.default]
)


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
    return ""


def _nodes(module: torch.nn.Module) -> list[Node]:
    """Return all nodes of a program, with those in regions such as branches."""
    return [node for each in module.modules() if isinstance(each, GraphModule) for node in each.graph.nodes]


def _held(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_held(each) for each in value]
    if isinstance(value, Tensor):
        return Held(tuple(size if type(size) is int else str(size) for size in value.shape))
    return value if value is None or isinstance(value, bool | int | float) else UNKNOWN


def _is_not_one(guard: Any) -> bool:
    return guard.is_Relational and guard.rel_op in ("!=", ">") and guard.rhs == 1


class _Follower:
    """Runs a graph on tensors without data; ``None`` stands for a value that could not be followed.

    ``seen`` holds the calls whose sizes were checked for all inputs. The body of a loop is run once, which says nothing
    about the sizes in later iterations: calls in it are not added.

    A shape rule of torch that decides by a size adds a guard. From there on, the results may hold for some inputs only,
    and no call is added. The guard "not 1" is an exception, unless the program squeezes: it only decides whether an
    axis is broadcast, and what was found for other sizes holds for 1 too.
    """

    def __init__(self, sizes: ShapeEnv | None, *, squeezes: bool) -> None:
        self.seen: set[Node] = set()
        self._loops = 0  # how many loops are around the current call
        self._sizes, self._guards, self._squeezes = sizes, 0 if sizes is None else len(sizes.guards), squeezes

    def _holds(self) -> bool:
        """Whether the sizes found so far hold for all inputs."""
        added = [] if self._sizes is None else self._sizes.guards[self._guards :]
        return not added or (not self._squeezes and all(_is_not_one(each.expr) for each in added))

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
        if any(made[each] is None for each in node.all_input_nodes):  # nothing is known of a value that depends on one
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: made[each])
        target: Any = node.target
        if _name(target) in BY_SIZES:
            names = [each.name for each in target._schema.arguments]
            call = dict(zip(names, args, strict=False)) | kwargs
            check_sizes(_name(target), {key: _held(value) for key, value in call.items()})
            if self._holds() and not self._loops:  # else the check says nothing about some input or iteration
                self.seen.add(node)
        loop = target in _LOOPS
        self._loops += loop
        try:
            with self._undecided(target):
                return target(*args, **kwargs)
        except UnsafeFileError:
            raise
        except Exception:  # torch has no shape rule, or the call is wrong: values that depend on it are unknown
            return None
        finally:
            self._loops -= loop

    def _undecided(self, target: Any) -> AbstractContextManager[None]:
        """Return a context without guards for convolutions: they choose a kernel by sizes, never the result."""
        if self._sizes is None or target not in _CONVOLUTIONS:
            return nullcontext()
        return self._sizes.suppress_guards()


def check_program_sizes(program: ExportedProgram) -> None:
    """Check the calls of a program that would read past the end of a tensor if its sizes did not fit.

    Raises UnsafeFileError if the sizes of such a call do not fit, or cannot be followed.
    """
    # A call that trusts sizes and was never checked was not reached: the sizes before it could not be followed.
    nodes = _nodes(program.graph_module)
    trusting = {node for node in nodes if _name(node.target) in BY_SIZES}
    if not trusting:
        return
    inputs = [node.meta.get("val") for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(inputs)
    squeezes = any("squeeze" in _name(node.target).replace("unsqueeze", "") for node in nodes)
    follower = _Follower(None if mode is None else mode.shape_env, squeezes=squeezes)
    if mode is not None:
        with mode, torch.no_grad():
            follower.run(program.graph_module, inputs)
    if missed := sorted(_name(node.target) for node in trusting - follower.seen):
        raise UnsafeFileError(f"it calls {missed[0]!r}, and the sizes there cannot be followed")


_WEIGHTS = frozenset([InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR])
_AGAIN = "save it again with torch.export.save where it was made"


def check_fit(program: ExportedProgram) -> None:
    """Raise FileError if the weights or the sample inputs of a program do not fit its graph."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    weights = {**program.constants, **program.state_dict}
    for name, tensor in weights.items():
        _check_plain(f"the weight {cut(shown(name), 60)}", tensor)
    taken = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in _WEIGHTS:
            what = f"the weight {cut(shown(str(spec.target)), 60)}"
            _check_tensor(what, weights.get(str(spec.target)), values.get(spec.arg.name))
        elif spec.kind == InputKind.USER_INPUT:
            taken.append((spec.arg.name, values.get(spec.arg.name, getattr(spec.arg, "value", None))))
    if program.example_inputs is not None:
        _check_samples(program, taken)


def _check_plain(what: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        found = f"{tensor.layout}, on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise FileError(f"{what} is not a plain tensor ({found})", allowed="dense tensors with data", next_step=_AGAIN)


def _check_tensor(what: str, tensor: Any, value: Any) -> None:
    _check_plain(what, tensor)
    if not isinstance(value, Tensor):
        raise FileError(f"{what} is a tensor, and its graph takes none there", next_step=_AGAIN)
    # A symbolic size of the graph fits any size of the weight.
    sizes = zip(tensor.shape, value.shape, strict=False)
    fits = tensor.dim() == value.dim() and all(not isinstance(want, int) or want == size for size, want in sizes)
    if not fits or tensor.dtype != value.dtype:
        wanted = f"{_show(value)}, as its graph says"
        raise FileError(f"{what} is {_show(tensor)}", allowed=wanted, next_step=_AGAIN)


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _check_samples(program: ExportedProgram, taken: list[tuple[str, Any]]) -> None:
    samples = program.example_inputs
    if not (isinstance(samples, tuple | list) and len(samples) == 2):
        raise _malformed(type(samples).__name__)
    args, kwargs = samples
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise _malformed(f"({type(args).__name__}, {type(kwargs).__name__})")
    leaves = list(_leaves(tuple(args), kwargs, program.call_spec.in_spec))
    if len(leaves) != len(taken):
        raise FileError(f"it has {len(leaves)} sample inputs", allowed=f"{len(taken)}, as its graph says")
    for leaf, (name, value) in zip(leaves, taken, strict=True):
        what = f"the sample input {cut(shown(name), 60)}"
        if isinstance(value, Tensor):
            _check_tensor(what, leaf, value)
        elif not isinstance(leaf, _kinds(value)):
            raise FileError(f"{what} is a {type(leaf).__name__}", allowed=type(value).__name__, next_step=_AGAIN)


def _kinds(value: Any) -> type | tuple[type, ...]:
    if isinstance(value, int | torch.SymInt):
        return int
    return float if isinstance(value, torch.SymFloat) else type(value)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], wanted: pytree.TreeSpec | None) -> Iterable[Any]:
    """Return the leaves of the sample inputs in the order in which the program takes them."""
    # The program names its keyword inputs in order; the file may hold them in another order.
    order = wanted.child(1).context if wanted is not None and wanted.num_children == 2 else None
    if isinstance(order, list) and set(order) == set(kwargs):
        kwargs = {name: kwargs[name] for name in order}
    leaves, found = pytree.tree_flatten((args, kwargs))
    if wanted is not None and found != wanted:
        what = f"its sample inputs have the structure {cut(shown(str(found)), 80)}"
        raise FileError(" ".join(what.split()), allowed="the structure of its inputs", next_step=_AGAIN)
    return leaves


def _malformed(found: str) -> FileError:
    return FileError(f"its sample inputs are {found}", allowed="(args, kwargs)", next_step=_AGAIN)
