"""The covering array holds every pair, and no more rows than it has to."""

from __future__ import annotations

from itertools import combinations

from surgery.factorizations import FACTORIZATIONS
from tests.covering import covering
from tests.zoo import KINDS_OF

METHODS = list(FACTORIZATIONS)


def test_each_pair_that_can_meet_meets() -> None:
    rows = covering(KINDS_OF, METHODS)
    everything = [(name, kind, method) for name, own in KINDS_OF.items() for kind in own for method in METHODS]
    for first, second in combinations(range(3), 2):
        assert {(row[first], row[second]) for row in rows} == {(row[first], row[second]) for row in everything}


def test_there_are_as_few_rows_as_can_be() -> None:
    assert len(covering(KINDS_OF, METHODS)) == len(KINDS_OF) * len(METHODS)


def test_the_kinds_take_turns() -> None:
    rows = covering({"one": "ab", "two": "ab"}, ["x", "y", "z"])
    assert ["".join(kind for name, kind, _ in rows if name == wanted) for wanted in ("one", "two")] == ["aba", "bab"]
