"""Check that a loaded program is consistent: its weights and its sample inputs must fit its graph.

torch also loads an archive whose weights have other sizes than its graph says, and fails later, elsewhere. These checks
cover what the passes rely on. Each weight exists, is dense, and has the sizes and the dtype that the graph declares.
The sample inputs are ``(args, kwargs)`` in the structure of the program's inputs, each a tensor or a number as in the
graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from surgery.errors import FileError
from surgery.text import cut, shown

__all__ = ["check_fit"]

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
