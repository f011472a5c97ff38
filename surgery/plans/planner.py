"""What makes plans: sites and evidence in, a plan out, before anything is built.

| planner | room | evidence |
|---|---|---|
| ``ByRule`` | plans | the totals of the model, and what measures latencies |
| ``ByPromise`` | passes | samples, and what fits, judges and times whole models on them |
| ``ForTraining`` | training | which sites train, and the seconds of their passes |

Each of them reports its steps to a ``Progress``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "silent"]

Progress: TypeAlias = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """Report nothing."""
