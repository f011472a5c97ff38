"""Copies of a model that follow it, as averages of its weights: what is one, and where they are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from surgery.kinds.inputs import Inputs, normalise_inputs

__all__ = ["averages_of", "inputs_for", "is_copy", "keeps_copy"]


def is_copy(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module has the names and shapes of a model's parameters, each as a tensor of its own."""
    mine, others = dict(module.named_parameters()), dict(model.named_parameters())
    alike = mine.keys() == others.keys() and all(mine[name].shape == others[name].shape for name in mine)
    return alike and bool(mine) and not {id(p) for p in mine.values()} & {id(p) for p in others.values()}


def averages_of(values: Iterable[Any], model: nn.Module) -> Iterator[nn.Module]:
    """Yield the copies of a model inside of the AveragedModels among some values."""
    for value in values:
        if isinstance(value, AveragedModel):
            inside = (module for module in value.module.modules() if type(module) is type(model))
            yield from (module for module in inside if is_copy(module, model))


def keeps_copy(value: Any, model: nn.Module) -> bool:
    """Whether a value is a copy of the model that is no AveragedModel, or a row of tensors of its parameters' shapes.

    Nobody can know how such a copy is kept up to date, so that it cannot be taken along.
    """
    if isinstance(value, nn.Module) and not isinstance(value, AveragedModel):
        return any(type(module) is type(model) and is_copy(module, model) for module in value.modules())
    rows = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not all(isinstance(row, Tensor) for row in rows):
        return False
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    return len(shapes) > 1 and not _missing(shapes, [row.shape for row in rows])


def _missing(wanted: list[torch.Size], given: list[torch.Size]) -> list[torch.Size]:
    """Return the shapes that are wanted and not given, each as often as it is."""
    rest = list(given)
    return [shape for shape in wanted if shape not in rest or rest.remove(shape)]  # type: ignore[func-returns-value]


def inputs_for(copy: nn.Module, model: nn.Module, example_inputs: Any) -> Inputs:
    """Return example inputs of a model for a copy of it, which may be on another device or in another dtype."""
    mine, others = next(copy.parameters()), next(model.parameters())

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(mine.device, mine.dtype if leaf.dtype == others.dtype else leaf.dtype)

    converted: Inputs = pytree.tree_map(convert, normalise_inputs(example_inputs))
    return converted
