"""The record of what is factored in a module, as JSON values: enough to give a fresh module the same structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.errors import FileError
from surgery.factorizations import FACTORIZATIONS, Ranks
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.tensors import key_of

__all__ = ["Record", "record_of"]

_VERSION = 1


@dataclass(frozen=True)
class Record:
    """The factorization and the ranks of each factored layer, by name, and names of tensors that are one."""

    sites: Mapping[str, tuple[str, Ranks]]
    ties: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values.

        >>> Record({"fc": ("svd", (8,))}).to_json()
        {'version': 1, 'sites': {'fc': {'factorization': 'svd', 'rank': [8]}}, 'ties': []}
        """
        sites = {name: {"factorization": f, "rank": list(ranks)} for name, (f, ranks) in self.sites.items()}
        return {"version": _VERSION, "sites": sites, "ties": [list(names) for names in self.ties]}

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Return the record that JSON values say.

        Raises:
            FileError: they are no record, or one of a version that is not known.
        """
        if not isinstance(value, dict) or value.get("version") != _VERSION:
            raise FileError("has a record of factored layers that cannot be read", allowed=f"version {_VERSION}")
        sites, ties = value.get("sites"), value.get("ties", [])
        if not isinstance(sites, dict) or not isinstance(ties, list) or not all(map(_is_tie, ties)):
            raise FileError("has a damaged record of factored layers", next_step="get the file again from its source")
        return cls({str(name): _origin(name, entry) for name, entry in sites.items()}, tuple(map(tuple, ties)))


def _is_tie(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _origin(name: str, entry: Any) -> tuple[str, Ranks]:
    method, ranks = (entry.get("factorization"), entry.get("rank")) if isinstance(entry, dict) else (None, None)
    whole = isinstance(ranks, list) and len(ranks) > 0 and all(type(rank) is int and rank > 0 for rank in ranks)
    if not isinstance(method, str) or method not in FACTORIZATIONS or not isinstance(ranks, list) or not whole:
        allowed = f"one of {', '.join(FACTORIZATIONS)}, and positive ranks"
        raise FileError(f"has a record that says {method!r} at {ranks!r} of {name}", allowed=allowed)
    return method, tuple(ranks)


def record_of(model: nn.Module) -> Record:
    """Return the record of a module: its factored layers, and which entries of its state are one tensor."""
    sites = {
        name: module.surgery_origin
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Factored) and module.surgery_origin is not None
    }
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[key_of(parameter)].append(name)
    return Record(sites, tuple(tuple(names) for names in groups.values() if len(names) > 1))
