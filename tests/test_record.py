"""The record of what was factored: its JSON values, those of earlier versions, and those that cannot be right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgery.errors import FileError
from surgery.sites import Entry, Record

RECORD = Record(
    {"lstm": Entry(("svd", (8,)), "lstm", "in_out"), "attn.in_proj_weight": Entry(("svd", (2,)))},
    (("a", "b"),),
    {"attn.in_proj_weight": ("in_proj_q", "in_proj_k")},
    {"lstm": {"recurrent": {"mode": "LSTM"}, "parts": {}}},
)


def test_sites_packed_weights_and_layers_may_have_one_name() -> None:
    assert Record.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD
    assert Record.from_json(Record().to_json()) == Record()


def test_a_record_of_an_earlier_version_is_read() -> None:
    sites = {
        "fc": {"factorization": "svd", "rank": [8], "weight": "fc.weight"},
        "attn.in_proj_weight": {"parts": ["in_proj_q", "in_proj_k"]},
        "lstm": {"recurrent": {"mode": "LSTM"}, "parts": {}},
    }
    found = Record.from_json({"version": 1, "sites": sites, "ties": [["a", "b"]]})
    fc = {"fc": Entry(("svd", (8,)), "fc.weight")}
    assert found == Record(fc, RECORD.ties, RECORD.packed, RECORD.layers)


@pytest.mark.parametrize("change", [{"sites": []}, {"packed": 3}, {"layers": None}, {"ties": {}}, {"ties": [[1]]}])
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FileError, match="damaged record"):
        Record.from_json(RECORD.to_json() | change)


def test_parts_that_are_no_list_are_left_out() -> None:
    assert Record.from_json({"version": 1, "sites": {}, "packed": {"a": 3, "b": ["q"]}}).packed == {"b": ("q",)}
