"""Which of all combinations are tried: each pair of values together in `make test`, all of them in `make laws`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet

ALL = bool(os.environ.get("SURGERY_LAWS"))  # as `make laws` sets it


def covering(kinds: Mapping[str, Sequence[str]], methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return rows (name, kind, method) in which each pair of values that can meet meets at least once.

    ``kinds`` are those of each name. Every name meets every method, so the rows are as few as can be. The kinds take
    turns along both, shifted by one from each name to the next, as in a Latin square: with the kinds a, b and three
    methods, the first name has a b a, the second b a b. That needs at least as many methods as kinds.
    """
    return [
        (name, own[(row + column) % len(own)], method)
        for row, (name, own) in enumerate(kinds.items())
        for column, method in enumerate(methods)
    ]


def tried(kinds: Mapping[str, Sequence[str]], methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the covering rows, or all rows where all laws are asked for."""
    if not ALL:
        return covering(kinds, methods)
    return [(name, kind, method) for name, own in kinds.items() for kind in own for method in methods]


def in_turns(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return as few rows as hold each value; all combinations where all laws are asked for."""
    if ALL:
        return list(product(*axes))
    return [tuple(axis[at % len(axis)] for axis in axes) for at in range(max(map(len, axes)))]


def grouped(*names: str) -> ParameterSet:
    """Return a parameter set for names of which the first is a network: one process takes all that are of one."""
    return pytest.param(*names, id="-".join(names), marks=pytest.mark.xdist_group(names[0]))
