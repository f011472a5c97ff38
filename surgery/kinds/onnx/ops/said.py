"""What a node says of its operator: attributes, version, and how many outputs are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Op", "Said", "axes_of", "ints", "wrapped"]


def _same(product: Tensor) -> Tensor:
    return product


@dataclass(frozen=True, eq=False)
class Said:
    """What a node says; of its ``named`` outputs, those up to the last that is used count as ``outputs``.

    ``product`` gets the gates of a recurrent layer, as its input and its input weight give them, and returns what
    stands for them, so that they can be seen and replaced as the output of a linear layer.
    """

    op_type: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int = 1
    named: int = 1
    product: Callable[[Tensor], Tensor] = _same

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default if the node has none of that name."""
        return self.attributes.get(name, default)


# A function of an operator gets what the node says and its inputs, None for one that is left out. It returns the output
# or a tuple of outputs; None if it does not know these attributes, so that onnxruntime has to run the node.
Op = Callable[..., Any]


def ints(value: Any) -> list[int]:
    """Return the whole numbers of an attribute or of a tensor with one axis."""
    return [int(each) for each in value.flatten().tolist()] if isinstance(value, Tensor) else [int(e) for e in value]


def axes_of(said: Said, given: Tensor | None, dims: int) -> list[int] | None:
    """Return the axes that an input or, in older versions, an attribute names, counted from the first; None if none."""
    value = said.get("axes") if given is None else given
    return None if value is None else [axis % max(1, dims) for axis in ints(value)]


def wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices in which negative ones count from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)
