"""What a graph kind with computed weights knows beside its graph: their values, what is kept of them, and notes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import Node

from surgery.kinds.base import Found, GraphKind
from surgery.kinds.fx.computed import Values

__all__ = ["ComputedKind"]


class ComputedKind(GraphKind):
    """Base of the kinds in whose graphs weights are computed from parameters and constants."""

    @cached_property
    def values(self) -> Values:
        """The weights that were computed so far, by node."""
        return {}

    @cached_property
    def notes(self) -> dict[str, str]:
        """What the user should know of sites that were put back, by name."""
        return {}

    @cached_property
    def waiting(self) -> dict[str, Any]:
        """What is kept of the computed weights that stand as parameters while their chains are cut again, by name."""
        return {}

    def find(self) -> Found:
        """Return all sites, with the parameters of computed weights as the model has them."""
        found = super().find()
        surplus = sum(lifted.surplus for lifted in self.view.lifted.values())
        totals = replace(found.totals, parameters=found.totals.parameters + surplus)
        return replace(found, totals=totals)

    @abstractmethod
    def constants(self) -> Mapping[str, Tensor]:
        """Return all buffers and constants, by name."""

    @abstractmethod
    def constant(self, name: str, user: Node) -> Node:
        """Return a node that provides a buffer or a constant, placed so that it comes before ``user``."""
