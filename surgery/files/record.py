"""The record of a module: its factored layers, in enough detail to give a fresh module the same structure."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.tensors import key_of
from surgery.sites import Entry, Record

__all__ = ["record_of"]


def record_of(model: nn.Module) -> Record:
    """Return the record of a module: its factored layers by name, and the groups of parameters that are tied."""
    sites = {
        name: Entry(module.surgery_origin)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Factored) and module.surgery_origin is not None
    }
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[key_of(parameter)].append(name)
    return Record(sites, tuple(tuple(names) for names in groups.values() if len(names) > 1))
