"""What makes plans: sites and evidence in, a plan out, before anything is built.

| planner | room | evidence |
|---|---|---|
| ``ByRule`` | plans | the totals of the model, and what measures latencies |
| ``ByPromise`` | passes | samples, and what fits, judges and times whole models on them |
| ``ForTraining`` | training | which sites train, and the seconds of their passes |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

from surgery.plans.plan import Plan
from surgery.sites.site import Site

__all__ = ["Planner", "Progress", "silent"]

Progress: TypeAlias = Callable[[str, int, int], None]
_Evidence = TypeVar("_Evidence", contravariant=True)


class Planner(Protocol[_Evidence]):
    """Decides for each site of a model what it becomes, by evidence; it changes nothing."""

    def plan(self, sites: Sequence[Site], evidence: _Evidence, /) -> Plan:
        """Return one decision for each site, in their order."""


def silent(step: str, done: int, total: int) -> None:
    """Report nothing."""
