"""The page of methods says what its script measured, and the script runs on any model. Nothing asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from examples import methods, methods_page
from examples.methods_page import Point, Report
from surgery.errors import InputError, Refusal
from surgery.plans.candidates import candidates_of

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = EXAMPLES / "methods.md"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 6 * 6, 12))
    program = torch.export.export(net, (torch.ones(1, 8, 6, 6),))
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def committed() -> Report:
    data = json.loads((EXAMPLES / "results" / "methods.json").read_text())
    return Report(**data | {"points": tuple(Point(**point) for point in data["points"])})


def test_the_page_is_short_and_has_what_was_measured() -> None:
    page, report = PAGE.read_text(), committed()
    assert len(page.splitlines()) <= 80
    assert methods_page.fill(page, methods_page.page_table(report)) == page
    assert (EXAMPLES / "results" / "methods.png").exists()


def test_every_method_is_on_the_page_and_was_measured() -> None:
    page, report = PAGE.read_text(), committed()
    assert all(f"| `{name}` |" in page for name in surgery.FACTORIZATIONS)
    assert {point.method for point in report.points} == set(surgery.FACTORIZATIONS)


@pytest.mark.parametrize("name", surgery.FACTORIZATIONS)
def test_a_sweep_rises_and_never_needs_more_than_dense(name: str) -> None:
    sites, _ = surgery.find_sites(nn.Sequential(nn.Conv2d(64, 48, 3, padding=1)), torch.ones(1, 64, 8, 8))
    candidates = candidates_of(sites[0], name)
    assert not isinstance(candidates, Refusal)
    [candidate] = candidates
    found = methods.sweep(candidate, 16)
    costs = [candidate.cost(ranks).macs for ranks in found]
    assert len(set(found)) == len(found) >= 3
    assert costs == sorted(costs)
    assert costs[-1] <= candidate.dense_cost.macs


@pytest.mark.parametrize("site", [None, "2"])
def test_the_script_measures_a_layer_and_writes_what_it_found(
    model: Path, site: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = PAGE.read_text(), model.parent / "out"
    arguments = ["--model", str(model), "--output", str(output), "--threads", "1", "--seconds", "0"]
    methods.main([*arguments, *(["--site", site] if site else [])])
    assert PAGE.read_text() == before
    assert (output / "methods.png").stat().st_size > 0
    report = json.loads((output / "methods.json").read_text())
    assert report["site"] == (site or "0")
    printed = capsys.readouterr().out
    for point in report["points"]:
        assert point["method"] in printed
        assert 0 <= point["error"] <= 1
        assert 0 < point["low"] <= point["high"]
    seen = {point["method"] for point in report["points"]} | {what.split()[0] for what in report["refused"]}
    assert seen == set(surgery.FACTORIZATIONS)


def test_an_unknown_site_is_refused_with_the_known_ones(model: Path) -> None:
    with pytest.raises(InputError, match="no site 'fc'") as caught:
        methods.main(["--model", str(model), "--site", "fc", "--output", str(model.parent)])
    assert caught.value.allowed == "0, 2"
