"""A weight that a graph computes from parameters and constants, as a value; and what the record keeps of it.

    conv(x, standardise(conv.weight) * conv.gain)  ->  conv(x, W)    with W as a parameter conv.weight, computed once

After W is factored, the record keeps the recipe, the names and the form of each parameter, and the numbers of all
parameters but the main one. The main parameter is as large as W; its numbers come from what the factors compose to.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from surgery.kinds.fx.recipe import Recipe

__all__ = ["Kept", "KeptParameter", "Lifted", "keep", "read_kept"]


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
class Kept:
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


def read_kept(entry: Any) -> Kept:
    """Return what a record keeps of a computed weight.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the entry has another form; files may contain anything.
    """
    parameters = {str(name): _read_parameter(row, name == entry["main"]) for name, row in entry["parameters"].items()}
    if entry["main"] not in parameters or not isinstance(entry["recipe"], list):
        raise ValueError("it has no main parameter or no recipe")
    return Kept(entry["recipe"], parameters, entry["main"])


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
