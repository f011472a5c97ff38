"""What a kind of models is: something that reads a flow from a model, and carries edits of it out.

A kind owns the model that it changes: a copy, unless the caller asks for in-place work. ``finish`` gives it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from surgery.sites.edit import Edit
from surgery.sites.find import find
from surgery.sites.flow import Flow
from surgery.sites.fusable import fusable
from surgery.sites.placement import Found, Fusable, Placement
from surgery.sites.site import Skip

__all__ = ["Kind"]


class Kind(ABC):
    """An open model; one subclass for each kind of models."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def flow(self) -> Flow:
        """The model as it was when it was opened, or last reopened."""

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Carry an edit out, at all calls that it concerns."""

    @abstractmethod
    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers where chains stand, and return their sites by name."""

    @abstractmethod
    def finish(self) -> Any:
        """Check the changed model and return it."""

    def verify(self) -> dict[str, str]:
        """See that all chains that were put in run; give those that do not up, and return why, by site."""
        return {}

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know of sites that were put back, by name."""
        return {}

    def find(self) -> Found:
        """Return all sites and skips, and the totals of the model; chains whose making is known are sites too."""
        return find(self.flow)

    def fusable(self, *, everything: bool = False) -> tuple[list[Fusable], list[Skip]]:
        """Return the chains that are provably one operator, and why others that look like it are not."""
        return fusable(self.flow, everything=everything)
