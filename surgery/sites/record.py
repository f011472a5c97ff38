"""The record of what was factored in a model: one value for modules, graphs and files.

    {"version": 1, "ties": [["head.weight", "embed.weight"]],
     "sites":  {"fc": {"factorization": "svd", "rank": [8], "weight": "fc.weight", "stored": "out_in"}},
     "packed": {"attn.in_proj_weight": ["in_proj_q", "in_proj_k", "in_proj_v"]},
     "layers": {"lstm": {"recurrent": {...}, "parts": {...}}}}

A file may contain anything. Only this module reads a record from it. An entry that does not have this form is left out,
and ``check`` refuses a record that has one. Files of earlier versions have packed weights and layers among the sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from surgery.algebra import Layout
from surgery.errors import FileError
from surgery.factorizations import FACTORIZATIONS
from surgery.sites.flow import Origin

__all__ = ["Entry", "Record"]

_VERSION = 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """What is recorded of a factored site.

    ``origin`` has the factorization and the ranks of its factors. ``weight`` is the original name of its weight, and
    ``stored`` the layout in which that weight was stored. ``added`` says for each call whether the graph adds a
    computed bias after the chain. ``computed`` says how the graph computed the weight, as JSON values.
    """

    origin: Origin | None = None
    weight: str | None = None
    stored: Layout | None = None
    added: tuple[bool, ...] = ()
    computed: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        method = {} if self.origin is None else {"factorization": self.origin[0], "rank": list(self.origin[1])}
        names = {"weight": self.weight, "stored": self.stored, "computed": self.computed}
        said = {name: value for name, value in names.items() if value is not None}
        return method | said | ({"added": list(self.added)} if any(self.added) else {})

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Return the entry that JSON values describe; a field that does not have the form of an entry is left out."""
        said = value if isinstance(value, dict) else {}
        weight, stored, added = said.get("weight"), said.get("stored"), said.get("added")
        return cls(
            _read_origin(said.get("factorization"), said.get("rank")),
            weight if isinstance(weight, str) else None,
            stored if stored in ("out_in", "in_out") else None,
            tuple(value is True for value in added) if isinstance(added, list) else (),
            said.get("computed"),
        )


def _read_origin(method: Any, ranks: Any) -> Origin | None:
    whole = isinstance(ranks, list) and len(ranks) > 0 and all(type(rank) is int and rank > 0 for rank in ranks)
    return (method, tuple(ranks)) if isinstance(method, str) and method in FACTORIZATIONS and whole else None


@dataclass(frozen=True)
class Record:
    """The factored sites of a model by name, and the layers that were taken apart for them.

    ``ties`` are groups of names that stand for one parameter. ``packed`` has the parts of each packed weight, and
    ``layers`` describes the recurrent layers that have factored parts. ``constants`` says of nodes that held factored
    weights what they were, by the weight. ``damaged`` has the JSON values of entries without a readable origin.
    """

    sites: Mapping[str, Entry] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    damaged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origins(self) -> dict[str, Origin]:
        """The factorization and the ranks of each site for which they are known."""
        return {name: entry.origin for name, entry in self.sites.items() if entry.origin is not None}

    @property
    def factored(self) -> frozenset[str]:
        """The names of all sites and layers that are factored."""
        return frozenset((*self.sites, *self.layers))

    def __bool__(self) -> bool:
        """Whether anything is recorded of the model's structure."""
        return bool(self.sites or self.packed or self.layers)

    def with_site(self, name: str, entry: Entry) -> Record:
        """Return the record with an entry for a site."""
        return replace(self, sites={**self.sites, name: entry})

    def with_packed(self, name: str, parts: tuple[str, ...]) -> Record:
        """Return the record with the parts of a packed weight."""
        return replace(self, packed={**self.packed, name: parts})

    def with_layer(self, name: str, description: Any) -> Record:
        """Return the record with the description of a recurrent layer."""
        return replace(self, layers={**self.layers, name: description})

    def without_site(self, name: str) -> Record:
        """Return the record without the entry of a site."""
        return replace(self, sites=_except(self.sites, name))

    def without_packed(self, name: str) -> Record:
        """Return the record without the parts of a packed weight."""
        return replace(self, packed=_except(self.packed, name))

    def without_layer(self, name: str) -> Record:
        """Return the record without the description of a recurrent layer."""
        return replace(self, layers=_except(self.layers, name))

    def check(self) -> Record:
        """Return the record itself.

        Raises:
            FileError: a site has no known factorization, or no positive ranks.
        """
        for name, said in self.damaged.items():
            method, ranks = (said.get("factorization"), said.get("rank")) if isinstance(said, dict) else (None, None)
            allowed = f"one of {', '.join(FACTORIZATIONS)}, and positive ranks"
            raise FileError(f"has a record that says {method!r} at {ranks!r} of {name}", allowed=allowed)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values.

        >>> Record({"fc": Entry(("svd", (8,)))}).to_json()
        {'version': 1, 'sites': {'fc': {'factorization': 'svd', 'rank': [8]}}, 'ties': []}
        """
        sites = {name: entry.to_json() for name, entry in self.sites.items()}
        packed = {name: list(parts) for name, parts in self.packed.items()}
        others = {"packed": packed, "layers": dict(self.layers), "constants": dict(self.constants)}
        others = {key: rows for key, rows in others.items() if rows}
        return {"version": _VERSION, "sites": sites, "ties": [list(tie) for tie in self.ties], **others}

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Return the record that JSON values describe.

        Raises:
            FileError: the values are not a record, or the record has an unknown version.
        """
        if not isinstance(value, dict) or value.get("version") != _VERSION:
            raise FileError("has a record of factored layers that cannot be read", allowed=f"version {_VERSION}")
        ties = value.get("ties", [])
        tables = [value.get("sites"), *(value.get(key, {}) for key in ("packed", "layers", "constants"))]
        if not (all(isinstance(table, dict) for table in tables) and _are_ties(ties)):
            raise FileError("has a damaged record of factored layers", next_step="get the file again from its source")
        rows, parts, layers, constants = map(dict, tables)
        packed = {name: row for name, row in parts.items() if isinstance(row, list)}
        sites: dict[str, Entry] = {}
        damaged: dict[str, Any] = {}
        for name, row in rows.items():
            said = row if isinstance(row, dict) else {}
            # an earlier version had three forms of rows, told apart by their fields
            if "recurrent" in said:
                layers.setdefault(name, row)
            elif isinstance(said.get("parts"), list):
                packed.setdefault(name, said["parts"])
            else:
                sites[name] = Entry.from_json(row)
                if sites[name].origin is None:
                    damaged[name] = row
        named = {name: tuple(map(str, row)) for name, row in packed.items()}
        return cls(sites, tuple(map(tuple, ties)), named, layers, constants, damaged)


def _except(table: Mapping[str, _T], name: str) -> dict[str, _T]:
    return {key: value for key, value in table.items() if key != name}


def _are_ties(value: Any) -> bool:
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, list) and all(isinstance(name, str) for name in row) for row in rows)
