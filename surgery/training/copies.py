"""Copies that follow a model, such as averages of its weights: how to recognise them, and where to find them."""

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
    """Whether a module has parameters of the same names and shapes as a model, and shares no tensor with it."""
    mine, others = dict(module.named_parameters()), dict(model.named_parameters())
    alike = mine.keys() == others.keys() and all(mine[name].shape == others[name].shape for name in mine)
    return alike and bool(mine) and not {id(p) for p in mine.values()} & {id(p) for p in others.values()}


def averages_of(values: Iterable[Any], model: nn.Module) -> Iterator[nn.Module]:
    """Yield the copies of a model that are inside the AveragedModels among some values."""
    for value in values:
        if isinstance(value, AveragedModel):
            inside = (module for module in value.module.modules() if type(module) is type(model))
            yield from (module for module in inside if is_copy(module, model))


def keeps_copy(value: Any, model: nn.Module) -> bool:
    """Whether a value copies the model without AveragedModel: a module, or tensors of the parameters' shapes.

    Nobody can know how such a copy is kept up to date, so a run cannot keep it in step with the model.
    """
    if isinstance(value, nn.Module) and not isinstance(value, AveragedModel):
        return any(type(module) is type(model) and is_copy(module, model) for module in value.modules())
    rows = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not all(isinstance(row, Tensor) for row in rows):
        return False
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    return len(shapes) > 1 and not _missing(shapes, [row.shape for row in rows])


def _missing(wanted: list[torch.Size], given: list[torch.Size]) -> list[torch.Size]:
    """Return the wanted shapes that are not given, counting repeats."""
    rest = list(given)
    return [shape for shape in wanted if shape not in rest or rest.remove(shape)]  # type: ignore[func-returns-value]


def inputs_for(copy: nn.Module, model: nn.Module, example_inputs: Any) -> Inputs:
    """Return a model's example inputs on the device and in the dtype of a copy of it."""
    mine, others = next(copy.parameters()), next(model.parameters())

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(mine.device, mine.dtype if leaf.dtype == others.dtype else leaf.dtype)

    converted: Inputs = pytree.tree_map(convert, normalise_inputs(example_inputs))
    return converted
