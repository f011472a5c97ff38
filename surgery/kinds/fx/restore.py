"""Restore a computed weight in the place of its chain: the nodes that compute it, and parameters from which they do.

The nodes cannot always compute the very weight that the factors compose to. Among a few simple choices for the
parameters, the one is taken whose computed weight is nearest:

    main parameter   the weight itself; or the inverse of the nodes, if they take each entry of the main parameter to
                     one entry of the weight, scaled and shifted (casts, constant scales, reshapes, sums with other
                     parameters)
    the others       as they were; or scaled so that the rows (columns, all) of the weight have the right length (gains,
                     the norms of weight norm)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from surgery.algebra import relative_error
from surgery.errors import UnsafeFileError
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recipe import KeptWeight, leaves, read_kept, run_recipe, write_recipe

__all__ = ["restore_computed"]

_MOST = 0.5  # relative error of a weight; farther from it than this, parameters no longer stand for it
_FAR = "no parameters give the composed weight; the relative error of the nearest is"
_BASE = 32  # places are written as digits in this base
_Numbers = Mapping[str, Tensor]


class _Kind(Protocol):
    """The part of an open graph that this module uses."""

    graph: Graph
    reader: Reader

    def add_parameter(self, names: Any, parameter: nn.Parameter) -> None: ...
    def parameter_node(self, name: str, user: Node) -> Node: ...
    def constant(self, name: str, user: Node) -> Node: ...
    def constants(self) -> Mapping[str, Tensor]: ...
    def stamp(self, node: Node, like: Node) -> None: ...


@dataclass(frozen=True, eq=False)
class _Maker:
    """Computes the weight from numbers for the parameters."""

    kept: KeptWeight
    constants: _Numbers
    module: Callable[[str], nn.Module] | None

    def __call__(self, numbers: _Numbers) -> Tensor:
        # operators of the recipe may write to their inputs
        copies = {name: tensor.clone() for name, tensor in {**self.constants, **numbers}.items()}
        return run_recipe(self.kept.recipe, copies, self.module)


def restore_computed(kind: _Kind, entry: Any, weight: Tensor, *, like: Node) -> tuple[Node | None, str]:
    """Write the nodes that compute a weight, add the parameters, and return the weight's node and a note.

    The nodes are inserted before ``like``. The note says how far the computed weight is from ``weight``, if the error
    is more than rounding. If the node is None, the weight has to become a parameter itself, and the note says why.
    """
    try:
        kept = read_kept(entry)
        constants = kind.constants()
        used = {name: constants[name] for name in leaves(kept.recipe, "buffer")}
        make = _Maker(kept, used, kind.reader.module)
        numbers, error = _nearest(make, weight)
    except UnsafeFileError:
        raise
    except Exception as problem:  # a record may contain anything, and operators may raise anything
        return None, f"its weight was computed, and is a parameter now: the record of that cannot be used ({problem})"
    if not error <= _MOST:
        return None, f"its weight was computed, and is a parameter now: {_FAR} {error:.1e}"
    names = {name: parameter.names for name, parameter in kept.parameters.items()}
    for name, parameter in kept.parameters.items():
        kind.add_parameter(names[name], nn.Parameter(numbers[name], requires_grad=parameter.trains))

    def leaf(op: str, name: str) -> Node:
        return kind.parameter_node(names[name][0], like) if op == "parameter" else kind.constant(name, like)

    made = write_recipe(kind.graph, kept.recipe, leaf, kind.stamp, like=like)
    exact = error <= (16 if weight.dtype.itemsize > 2 else 2) * torch.finfo(weight.dtype).eps
    note = f"its weight is computed; the restored parameters give it with a relative weight error of {error:.1e}"
    return made[-1], "" if exact else note


def _nearest(make: _Maker, weight: Tensor) -> tuple[_Numbers, float]:
    """Return the numbers for the parameters that give the nearest weight, and the relative error of that weight.

    Raises:
        ValueError: no numbers give a weight of this form.
    """
    best: tuple[_Numbers, float] | None = None
    for numbers in _choices(make, weight):
        error = _error(make, numbers, weight)
        if error == error and (best is None or error < best[1] / 2):  # earlier choices are simpler; NaN never counts
            best = numbers, error
    if best is None:
        raise ValueError("no parameters give a finite weight")
    return best


def _error(make: _Maker, numbers: _Numbers, weight: Tensor) -> float:
    made = make(numbers)
    if made.shape != weight.shape or made.dtype != weight.dtype:
        raise ValueError(f"it gives {list(made.shape)} of {made.dtype} for {list(weight.shape)} of {weight.dtype}")
    return relative_error(made, weight)


def _choices(make: _Maker, weight: Tensor) -> Iterator[_Numbers]:
    parameters, main = make.kept.parameters, make.kept.main
    others = {n: p.value.to(weight.device) for n, p in parameters.items() if p.value is not None}
    form = parameters[main]
    if torch.Size(form.shape).numel() != weight.numel():
        raise ValueError(f"{main} of shape {list(form.shape)} cannot give a weight of {weight.numel()} numbers")
    mains = [weight.reshape(form.shape).to(form.dtype)]
    inverse = _inverse(lambda value: make({**others, main: value}), weight, like=mains[0])
    # each choice for the main parameter is tried with the others as they were, and with the others scaled
    for value in (*([] if inverse is None else [inverse]), *mains):
        numbers = {**others, main: value.contiguous().clone()}
        yield numbers
        yield _scaled(make, numbers, weight)


def _inverse(make: Callable[[Tensor], Tensor], weight: Tensor, *, like: Tensor) -> Tensor | None:
    """Return w with ``make(w) == weight`` if make moves, scales and shifts single entries; else an estimate, or None.

    Such a make is make(w)[i] = scale[i] w[place[i]] + shift[i]: make(0) is the shift, make(1) - make(0) is the scale,
    and make of the numbers 0, 1, 2, ... tells the places. For make(w) = 2 w.t() + 1 the scale is 2, the shift is 1, and
    w = (weight - 1).t() / 2.
    """
    shift = make(torch.zeros_like(like)).double()
    scale = make(torch.ones_like(like)).double() - shift
    count = torch.arange(like.numel(), device=like.device)
    place = _places(lambda digits: ((make(digits.view_as(like).to(like)).double() - shift) / scale).flatten(), count)
    if place is None and weight.shape != like.shape:
        return None
    values = ((weight.double() - shift) / scale).flatten()
    if not bool(torch.isfinite(values).all()):
        return None
    found = torch.empty_like(values).index_copy_(0, count if place is None else place, values)
    return found.to(like.dtype).view_as(like)


def _places(moved: Callable[[Tensor], Tensor], count: Tensor) -> Tensor | None:
    """Return which of the numbers 0, 1, 2, ... in ``count`` ends up at each place; None if a number gets lost.

    The numbers are moved digit by digit in base 32, because half precision represents only small integers exactly.
    """
    # Example: 100 is moved as its digits 100 % 32 = 4 and 100 // 32 = 3, and is 4 + 3 * 32 again where they arrive.
    place, power = torch.zeros_like(count, dtype=torch.float64), 1
    while power < count.numel():
        place += moved(count // power % _BASE).round() * power
        power *= _BASE
    found = place.nan_to_num(-1, -1, -1).long()
    return found if torch.equal(found.sort().values, count) else None


def _scaled(make: _Maker, numbers: _Numbers, weight: Tensor) -> _Numbers:
    """Scale each parameter but the main one by least squares, as if the weight were proportional to it."""
    found = dict(numbers)
    for name in numbers:
        axes = _axes(numbers[name], weight)
        if name == make.kept.main or axes is None:
            continue
        made = make(found).double()
        # least squares for one number a: the sum of (a made - weight)^2 is least at a = <made, weight> / <made, made>
        along, squares = ((value.sum(axes) if axes else value) for value in (made * weight.double(), made * made))
        ratio = torch.where(squares > 0, along / squares, torch.ones_like(along))
        value = found[name].double() * ratio.view(found[name].shape)
        found[name] = value.to(found[name].dtype)
    return found


def _axes(tensor: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Return the axes of the weight along which a parameter does not vary; None if it fits no axis.

    A parameter fits if it broadcasts to the weight, or if it has one number for each entry of axis 0 or 1, or one at
    all.
    """
    every = range(weight.dim())
    sizes = zip(tensor.shape, weight.shape, strict=False)
    # (O, 1, 1, 1) is one number for each row; its axes are 1, 2 and 3
    if tensor.dim() == weight.dim() and all(own in (1, size) for own, size in sizes):
        return tuple(axis for axis in every if tensor.shape[axis] == 1)
    for axis in (0, 1):
        if tensor.numel() == weight.shape[axis]:
            return tuple(other for other in every if other != axis)
    return tuple(every) if tensor.numel() == 1 else None
