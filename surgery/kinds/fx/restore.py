"""A computed weight put back where its chain stood: the nodes that compute it, and parameters that give it.

The weight that the factors compose to is not always one that the nodes can give. Of simple choices for the parameters
those count that give the nearest weight:

    main parameter   the weight itself; or what the nodes make the weight of, if each entry of it goes to one entry of
                     the weight, scaled and shifted (casts, constant scales, reshapes, sums with other parameters)
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

from surgery.algebra.chain import relative_error
from surgery.errors import UnsafeFileError
from surgery.kinds.fx.lifted import Kept, read_kept
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recipe import leaves, run_recipe, write_recipe

__all__ = ["restore_computed"]

_BASE = 32  # of the digits of places
_Numbers = Mapping[str, Tensor]


class _Kind(Protocol):
    """What is used of a graph kind here."""

    graph: Graph
    reader: Reader

    def add_parameter(self, names: Any, parameter: nn.Parameter) -> None: ...
    def parameter_node(self, name: str, user: Node) -> Node: ...
    def constant(self, name: str, user: Node) -> Node: ...
    def constants(self) -> Mapping[str, Tensor]: ...
    def stamp(self, node: Node, like: Node) -> None: ...


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes the weight from numbers for the parameters."""

    kept: Kept
    constants: _Numbers
    module: Callable[[str], nn.Module] | None

    def __call__(self, numbers: _Numbers) -> Tensor:
        copies = {name: tensor.clone() for name, tensor in {**self.constants, **numbers}.items()}
        return run_recipe(self.kept.recipe, copies, self.module)


def restore_computed(kind: _Kind, entry: Any, weight: Tensor, *, like: Node) -> tuple[Node | None, str]:
    """Write the nodes before ``like``, add the parameters, and return the node of the weight with a note.

    The note says how far the weight is from the one that was given, if it is more than rounding; with no node, why the
    weight has to stand as a parameter.
    """
    try:
        kept = read_kept(entry)
        constants = kind.constants()
        used = {name: constants[name] for name in leaves(kept.recipe, "buffer")}
        make = _Maker(kept, used, kind.reader.module)
        numbers, error = _nearest(make, weight)
    except UnsafeFileError:
        raise
    except Exception as problem:  # a record may say anything, and operators may raise anything
        return None, f"its weight was computed, and stands as it is: the record of that cannot be used ({problem})"
    names = {name: parameter.names for name, parameter in kept.parameters.items()}
    for name, parameter in kept.parameters.items():
        kind.add_parameter(names[name], nn.Parameter(numbers[name], requires_grad=parameter.trains))

    def leaf(op: str, name: str) -> Node:
        return kind.parameter_node(names[name][0], like) if op == "parameter" else kind.constant(name, like)

    made = write_recipe(kind.graph, kept.recipe, leaf, kind.stamp, like=like)
    exact = error <= (16 if weight.dtype.itemsize > 2 else 2) * torch.finfo(weight.dtype).eps
    note = f"its weight is computed; the parameters put back give it with a relative weight error of {error:.1e}"
    return made[-1], "" if exact else note


def _nearest(make: _Maker, weight: Tensor) -> tuple[_Numbers, float]:
    """Return the numbers that give the nearest weight, and its relative error.

    Raises:
        ValueError: no numbers give a weight of this form.
    """
    best: tuple[_Numbers, float] | None = None
    for numbers in _choices(make, weight):
        error = _error(make, numbers, weight)
        if error == error and (best is None or error < best[1] / 2):  # earlier ones are simpler
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
        raise ValueError(f"{main} of shape {list(form.shape)} is no weight of {weight.numel()} numbers")
    mains = [weight.reshape(form.shape).to(form.dtype)]
    inverse = _inverse(lambda value: make({**others, main: value}), weight, like=mains[0])
    for value in (*([] if inverse is None else [inverse]), *mains):
        numbers = {**others, main: value.contiguous().clone()}
        yield numbers
        yield _scaled(make, numbers, weight)


def _inverse(make: Callable[[Tensor], Tensor], weight: Tensor, *, like: Tensor) -> Tensor | None:
    """Return w with ``make(w) == weight`` if make moves, scales and shifts single entries; else what is near, or None.

    make(w)[i] = scale[i] w[place[i]] + shift[i]:  make(0) is the shift, make(1) - make(0) the scale, and the numbers
    0, 1, 2, ... show the places. For make(w) = 2 w.t() + 1 the scale is 2, the shift 1, and w = (weight - 1).t() / 2.
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
    """Return where each of the numbers 0, 1, 2, ... in ``count`` is moved to, digit by digit; None if they get lost.

    Half precision has few exact integers, so that numbers are shown as digits.
    """
    place, power = torch.zeros_like(count, dtype=torch.float64), 1
    while power < count.numel():
        place += moved(count // power % _BASE).round() * power
        power *= _BASE
    found = place.nan_to_num(-1, -1, -1).long()
    return found if torch.equal(found.sort().values, count) else None


def _scaled(make: _Maker, numbers: _Numbers, weight: Tensor) -> _Numbers:
    """Scale each of the other parameters, as if the weight were in proportion to it, to the least squares fit."""
    found = dict(numbers)
    for name in numbers:
        axes = _axes(numbers[name], weight)
        if name == make.kept.main or axes is None:
            continue
        made = make(found).double()
        along, squares = ((value.sum(axes) if axes else value) for value in (made * weight.double(), made * made))
        ratio = torch.where(squares > 0, along / squares, torch.ones_like(along))
        value = found[name].double() * ratio.view(found[name].shape)
        found[name] = value.to(found[name].dtype)
    return found


def _axes(tensor: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Return the axes of the weight over which a parameter is one number: it broadcasts, or has as many as an axis."""
    every = range(weight.dim())
    sizes = zip(tensor.shape, weight.shape, strict=False)
    if tensor.dim() == weight.dim() and all(own in (1, size) for own, size in sizes):
        return tuple(axis for axis in every if tensor.shape[axis] == 1)
    for axis in (0, 1):
        if tensor.numel() == weight.shape[axis]:
            return tuple(other for other in every if other != axis)
    return tuple(every) if tensor.numel() == 1 else None
