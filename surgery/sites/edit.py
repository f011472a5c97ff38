"""Edits: the changes that surgery wants in a graph, as values. A kind of models carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from surgery.algebra.chain import Chain
from surgery.sites.placement import Fusable, Placement

__all__ = ["Edit", "Fuse", "Replace"]


@dataclass(frozen=True, eq=False)
class Replace:
    """Replace an operator by a chain, at all calls of the operator."""

    placement: Placement
    chain: Chain


@dataclass(frozen=True, eq=False)
class Fuse:
    """Replace a chain by the one operator that it composes to, at all calls of the chain."""

    chain: Fusable


Edit: TypeAlias = Replace | Fuse
