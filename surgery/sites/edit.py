"""Edits: what surgery wants of a graph, as values. A kind carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from surgery.algebra.chain import Chain
from surgery.sites.placement import Fusable, Placement

__all__ = ["Edit", "Fuse", "Replace"]


@dataclass(frozen=True, eq=False)
class Replace:
    """Put a chain where an operator stands, at all its calls."""

    placement: Placement
    chain: Chain


@dataclass(frozen=True, eq=False)
class Fuse:
    """Put the one operator that a chain is where the chain stands, at all its calls."""

    chain: Fusable


Edit: TypeAlias = Replace | Fuse
