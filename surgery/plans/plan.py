"""The plan: for each site a factorization and ranks, or the reason to stay dense; serialisable, editable, diffable.

What makes plans: sites and evidence in, a plan out, before anything is built.

| planner | room | evidence |
|---|---|---|
| ``ByRule`` | plans | the totals of the model, and what measures latencies |
| ``ByPromise`` | passes | samples, and what fits, judges and times whole models on them |
| ``ForTraining`` | training | which sites train, and the seconds of their passes |

Each of them reports its steps to a ``Progress``.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.errors import FileError, InputError, RankError
from surgery.factorizations import FACTORIZATIONS, Ranks, named
from surgery.system.opening import read_regular, shown_path

__all__ = ["Decision", "Plan"]

_VERSION = 1
_MOST = 2**63 - 1  # what a tensor may have of anything
_LONGEST_FILE = 1 << 26
_RANKS = f"whole numbers from 1 to {_MOST}, as 16 or [16, 32]"
_FORM = f'{{"surgery_plan": {_VERSION}, "ranks": "...", "decisions": [{{"site": "...", ...}}, ...]}}'


@dataclass(frozen=True)
class Decision:
    """What happens to one site.

    ``factorization`` and ``rank`` are None for a site that stays dense, and ``reason`` then says why. ``error`` is the
    predicted relative Frobenius error of the weight (for Tucker an upper bound). Parameters, MACs and latencies are
    those of the dense operator and, if there is one, of the chain. MACs and latencies (seconds) are for all calls of
    one run; latencies are None unless they were measured. Sites of one ``joint`` group share all factors but the last,
    so they have the same factorization and rank; the shared parameters count for the first of them.
    """

    site: str
    factorization: str | None = None
    rank: Ranks | None = None
    reason: str | None = None
    error: float | None = None
    dense_parameters: int | None = None
    parameters: int | None = None
    dense_macs: int | None = None
    macs: int | None = None
    dense_latency: float | None = None
    latency: float | None = None
    joint: str | None = None

    @property
    def dense(self) -> bool:
        """Whether the site stays as it is."""
        return self.factorization is None

    def left_dense(self, reason: str) -> Decision:
        """Return the decision to leave the site as it is, for a reason, without what was predicted of a chain."""
        bare = replace(self, factorization=None, rank=None, joint=None, reason=reason, error=None)
        return replace(bare, parameters=None, macs=None, latency=None)


@dataclass(frozen=True)
class Plan:
    """The frozen decision for a whole model: one Decision for each site, in graph order.

    ``ranks`` is the rule or the goal that it was made for. ``held_out`` is the share of the calibration samples by
    which fits are judged; None is the usual one. A plan that keeps a promise has the share that the promise needs, so
    that it gives the same model when it is carried out again on the same samples.
    """

    decisions: tuple[Decision, ...]
    ranks: str = ""
    held_out: float | None = None

    def __iter__(self) -> Iterator[Decision]:
        """Iterate over the decisions."""
        return iter(self.decisions)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self.decisions)

    def __getitem__(self, site: str) -> Decision:
        """Return the decision for a site.

        Raises:
            InputError: the plan has no such site.
        """
        if site not in self._by_site:
            raise InputError(f"the plan has no site {site!r}", allowed=", ".join(self._by_site))
        return self._by_site[site]

    @cached_property
    def _by_site(self) -> Mapping[str, Decision]:
        return {decision.site: decision for decision in self.decisions}

    def edit(
        self, site: str, *, factorization: str | None = None, rank: Ranks | int | None = None, reason: str = "by hand"
    ) -> Plan:
        """Return a plan in which one site has another rank, or stays dense if ``rank`` is None.

        The predictions for that site are dropped: they were made for the old choice.

        Raises:
            InputError: the plan has no such site, no factorization for it, or a rank that is not one.
        """
        old = self[site]
        new = Decision(site, reason=reason)
        if rank is not None:
            ranks = list(rank) if isinstance(rank, tuple | list) else [rank]
            name = factorization or old.factorization
            if not _is_rank(ranks):
                raise RankError(f"rank {rank!r} for {site!r}", allowed=_RANKS, next_step="or None to keep it dense")
            if name is None:
                raise InputError(f"{site!r} is dense in this plan", next_step="say factorization= as well")
            new = Decision(site, factorization=named(name).name, rank=tuple(ranks))
        return self.replaced(new)

    def replaced(self, *decisions: Decision) -> Plan:
        """Return the plan with other decisions for some of its sites."""
        others = {decision.site: decision for decision in decisions}
        return replace(self, decisions=tuple(others.get(d.site, d) for d in self.decisions))

    def diff(self, other: Plan) -> list[str]:
        """Return one line for each site on which the two plans differ, as ``site: tucker 8,8 -> dense (reason)``."""
        mine = {d.site: d for d in self.decisions}
        theirs = {d.site: d for d in other.decisions}
        lines = []
        for site in [*mine, *(s for s in theirs if s not in mine)]:
            before, after = _say(mine.get(site)), _say(theirs.get(site))
            if before != after:
                lines.append(f"{site}: {before} -> {after}")
        return lines

    def to_json(self) -> str:
        """Return the plan as JSON text; fields that are None are left out."""
        rows = [{k: v for k, v in asdict(d).items() if v is not None} for d in self.decisions]
        share = {} if self.held_out is None else {"held_out": self.held_out}
        head = {"surgery_plan": _VERSION, "ranks": self.ranks}
        return json.dumps(head | share | {"decisions": rows}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            InputError: the text is not a plan; the message names the place.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the plan is not JSON: {error}", next_step="write one with --save-plan") from None
        if not isinstance(data, dict) or data.get("surgery_plan") != _VERSION or "decisions" not in data:
            raise InputError("the file is not a plan", allowed=_FORM, next_step="write one with --save-plan")
        rows, ranks = data["decisions"], data.get("ranks", "")
        if not isinstance(rows, list) or not isinstance(ranks, str):
            raise InputError("the plan has decisions that are not a list, or ranks that are not text", allowed=_FORM)
        share = data.get("held_out")
        if share is not None and not (isinstance(share, float) and 0 < share < 1):
            raise InputError(f"the plan has held_out {reprlib.repr(share)}", allowed="numbers between 0 and 1")
        decisions = tuple(_read_decision(row, index) for index, row in enumerate(rows))
        repeated = [site for site, times in Counter(d.site for d in decisions).items() if times > 1]
        if repeated:
            raise InputError(f"the plan names the site {repeated[0]!r} twice", next_step="remove one of the rows")
        return cls(decisions, ranks=ranks, held_out=share)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan from a file; raises FileError where it cannot be read, and InputError as ``from_json``."""
        try:
            text = read_regular(path, most=_LONGEST_FILE).decode()
        except UnicodeDecodeError as error:
            raise FileError(f"{shown_path(path)}: is not a plan: {error}", allowed="UTF-8 text") from None
        return cls.from_json(text)


def _say(decision: Decision | None) -> str:
    if decision is None:
        return "absent"
    if decision.dense:
        return f"dense ({decision.reason})" if decision.reason else "dense"
    shared = f" joint with {decision.joint}" if decision.joint and decision.joint != decision.site else ""
    return f"{decision.factorization} {','.join(map(str, decision.rank or ()))}{shared}"


def _read_decision(row: Any, index: int) -> Decision:
    where = f"decision {index} of the plan"
    if not isinstance(row, dict) or not isinstance(row.get("site"), str):
        raise InputError(f"{where} has no site name", allowed=_FORM)
    where += f" ({reprlib.repr(row['site'])})"
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise InputError(f"{where} has an unknown field {unknown[0]!r}", allowed=", ".join(_FIELDS))
    for name, value in row.items():
        allowed, fits = _FIELDS[name]
        if value is not None and not fits(value):
            raise InputError(f"{where} has the {name} {reprlib.repr(value)}", allowed=allowed)
    rank = row.get("rank")
    if (rank is None) != (row.get("factorization") is None):
        raise InputError(f"{where} has only one of factorization and rank", allowed="both, or none of them")
    if rank is not None:
        rank = (rank,) if isinstance(rank, int) else tuple(rank)
    return Decision(**{**row, "rank": rank})


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _is_rank(value: Any) -> bool:
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(_is_whole(row, least=1) for row in rows)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and 0 <= value <= _MOST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_factorization(value: Any) -> bool:
    return isinstance(value, str) and value in FACTORIZATIONS


_TEXT = ("text", _is_text)
_COUNT = (f"whole numbers from 0 to {_MOST}", _is_whole)
_NUMBER = (f"numbers from 0 to {_MOST}", _is_number)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "site": _TEXT,
    "factorization": (", ".join(FACTORIZATIONS), _is_factorization),
    "rank": (_RANKS, _is_rank),
    "reason": _TEXT,
    "error": _NUMBER,
    "dense_parameters": _COUNT,
    "parameters": _COUNT,
    "dense_macs": _COUNT,
    "macs": _COUNT,
    "dense_latency": _NUMBER,
    "latency": _NUMBER,
    "joint": _TEXT,
}
