"""The plan: for each site a factorization and ranks, or the reason to stay dense; serialisable, editable, diffable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.factorizations import Ranks, named

__all__ = ["Decision", "Plan"]

_VERSION = 1


@dataclass(frozen=True)
class Decision:
    """What happens to one site.

    ``factorization`` and ``rank`` are None for a site that stays dense, and ``reason`` then says why. ``error`` is the
    predicted relative Frobenius error of the weight (for Tucker an upper bound). Parameters, MACs (all calls of one run) and
    latencies (seconds for all calls of one run) are those of the dense operator and of the chain; latencies are None unless
    they were measured.
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

    @property
    def dense(self) -> bool:
        """Whether the site stays as it is."""
        return self.factorization is None


@dataclass(frozen=True)
class Plan:
    """The frozen decision for a whole model: one Decision for each site, in graph order."""

    decisions: tuple[Decision, ...]
    ranks: str = ""

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
        for decision in self.decisions:
            if decision.site == site:
                return decision
        raise InputError(f"the plan has no site {site!r}", allowed=", ".join(d.site for d in self.decisions))

    def edit(
        self, site: str, *, factorization: str | None = None, rank: Ranks | int | None = None, reason: str = "by hand"
    ) -> Plan:
        """Return a plan in which one site has another rank, or stays dense if ``rank`` is None.

        The predictions for that site are dropped: they were made for the old choice.
        """
        old = self[site]
        if rank is None:
            new = Decision(site, reason=reason)
        else:
            name = factorization or old.factorization
            if name is None:
                raise InputError(f"{site} is dense in this plan", next_step="say factorization= as well")
            new = Decision(site, factorization=named(name).name, rank=(rank,) if isinstance(rank, int) else tuple(rank))
        return replace(self, decisions=tuple(new if d.site == site else d for d in self.decisions))

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
        return json.dumps({"surgery_plan": _VERSION, "ranks": self.ranks, "decisions": rows}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            InputError: the text is no plan; the message names the place.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"the plan is not JSON: {error}", next_step="write one with --save-plan") from None
        if (
            not isinstance(data, dict)
            or data.get("surgery_plan") != _VERSION
            or not isinstance(data.get("decisions"), list)
        ):
            raise InputError(
                "the file is not a plan",
                allowed=f'{{"surgery_plan": {_VERSION}, "decisions": [...]}}',
                next_step="write one with --save-plan",
            )
        decisions = tuple(_read_decision(row, index) for index, row in enumerate(data["decisions"]))
        sites = [d.site for d in decisions]
        if len(set(sites)) < len(sites):
            raise InputError(f"the plan names a site twice: {next(s for s in sites if sites.count(s) > 1)}")
        return cls(decisions, ranks=str(data.get("ranks", "")))

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan from a file; raises InputError as ``from_json``."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the plan {path}: {error}") from None
        return cls.from_json(text)


def _say(decision: Decision | None) -> str:
    if decision is None:
        return "absent"
    if decision.dense:
        return f"dense ({decision.reason})" if decision.reason else "dense"
    return f"{decision.factorization} {','.join(map(str, decision.rank or ()))}"


def _read_decision(row: Any, index: int) -> Decision:
    where = f"decision {index} of the plan"
    known = {f.name: f for f in fields(Decision)}
    if not isinstance(row, dict) or not isinstance(row.get("site"), str):
        raise InputError(f"{where} has no site name")
    if unknown := set(row) - set(known):
        raise InputError(f"{where} has an unknown field {sorted(unknown)[0]!r}", allowed=", ".join(known))
    rank = row.get("rank")
    if isinstance(rank, int):
        rank = [rank]
    if (rank is None) != (row.get("factorization") is None):
        raise InputError(f"{where} ({row['site']}) must have both a factorization and a rank, or none of them")
    if rank is not None:
        named(row["factorization"])
        if not isinstance(rank, list) or not all(isinstance(r, int) and r > 0 for r in rank):
            raise InputError(f"{where} ({row['site']}) has the rank {rank!r}", allowed="whole numbers above 0")
    return Decision(**{**row, "rank": None if rank is None else tuple(rank)})
