"""The report: what it holds, that it travels with the model, and that no name or number in it can do harm."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.export import ExportedProgram

import surgery
from surgery.cli import cli
from surgery.cost.timing import Samples
from surgery.errors import FileError, InputError
from surgery.passes.results import DecomposeResult, Promise, Search
from surgery.plans.choose import Trial
from surgery.report import attach, collect, read, render, write
from surgery.report.charts import ticks
from surgery.report.content import read_content
from surgery.runtime.bench import ModelComparison, ModelTiming, Timing, environment

EVIL = "--></title></style></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'`&amp;\u202e\x00\ud800"
PAGE = "html|head|meta|title|style|body|main|section|h1|h2|p|div|table|thead|tbody|tr|th|td|span|strong|details|summary"
DRAWING = "dl|dt|dd|svg|defs|clippath|g|rect|text|line|polyline|circle|wbr"


def program() -> ExportedProgram:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 12)).eval()
    return torch.export.export(model, (torch.zeros(1, 3, 8, 8),))


def decomposed() -> DecomposeResult[Any]:
    found = surgery.decompose(program(), ranks={"0": (8, 3), "3": None}, factorization="tucker")
    runs = [ModelTiming(name, Samples((2e-3 / n,) * 9)) for n, name in ((1, "a"), (2, "b"))]
    timing = Timing(tuple(runs), (ModelComparison("b", 2.0, 1.9, 2.1, "faster"),), environment(1))
    points = ((0.0, 1e-3), (0.01, 5e-4), (0.4, 1e-4))
    search = Search(points, points[1], (Trial(1e-4, 0.012, True),), (0.9, 0.89), timing, "latency")
    changes = tuple(replace(change, dense_latency=8e-4, latency=3e-4) for change in found.changes)
    return replace(found, changes=changes, promise=Promise("max_error", 0.02, 0.012, True), search=search)


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return collect(decomposed(), files=(Path("models/net.pt2"), None))


class Reader(HTMLParser):
    """Collects elements and texts, and checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(page: str) -> Reader:
    reader = Reader(page)
    assert all(re.fullmatch(f"{PAGE}|{DRAWING}", tag) for tag in reader.tags)
    assert not {name for name in reader.attributes if name.startswith("on") or name in ("href", "src", "style")}
    assert not re.search(r"\b(nan|inf)\b", page)
    page.encode()
    return reader


def test_page_says_what_was_done(full: dict[str, Any]) -> None:
    text = check_page(render(full)).text
    for said in (
        "1 layer was replaced",
        "2.00 times as fast",
        "kept",
        "at most 2 %",
        "1.2 %",
        "2 ms",
        "1 ms",
        "tucker",
    ):
        assert said in text
    assert "8, 3" in text
    assert "0.89" in text
    assert "everything else" in text
    assert environment(1).torch in text


def test_report_has_what_the_result_has(full: dict[str, Any]) -> None:
    result = decomposed()
    assert [change["site"] for change in full["changes"]] == [change.site for change in result.changes]
    assert full["before"]["macs"] == result.before.macs
    assert full["search"]["frontier"] == [list(point) for point in result.search.frontier]
    assert full["search"]["cost"] == "latency"
    assert full["timing"]["comparisons"][0]["speedup"] == 2.0
    assert surgery.Plan.from_json(json.dumps(full["plan"])).decisions == result.plan.decisions


def test_numbers_that_json_lacks_become_none() -> None:
    result = replace(decomposed(), promise=Promise("max_drop", 0.1, math.nan, False))
    assert collect(result)["promise"]["measured"] is None
    json.dumps(collect(result), allow_nan=False)


def test_it_travels_with_the_model(tmp_path: Path) -> None:
    result = decomposed()
    report = collect(result)
    attach(result.model, report)
    surgery.save(result.model, tmp_path / "a.pt2")
    loaded = surgery.load(tmp_path / "a.pt2")
    assert isinstance(loaded, ExportedProgram)
    assert read(loaded) == report
    back = surgery.recompose(loaded)  # the rest of the record is still there
    assert [change.site for change in back.changes] == ["0"]
    with pytest.raises(InputError, match="no report"):
        read(back.model)  # what it was about is gone
    with pytest.raises(InputError, match="no report"):
        read(surgery.decompose(loaded, ranks=2, include=["3"]).model)


def test_the_original_is_reported_too() -> None:
    same = surgery.decompose(program(), ranks={"0": None, "3": None})
    promise = Promise("target_speedup", 2.0, 1.0, False, "the original: nothing measured faster")
    report = collect(replace(same, promise=promise, search=Search()))
    text = check_page(render(report)).text
    assert "left exactly as it was" in text
    assert "not kept" in text


@pytest.mark.parametrize("timing", [None, "onnxruntime has no such operator"])
def test_without_latencies_work_is_shown(timing: str | None) -> None:
    plain = surgery.decompose(program(), ranks={"0": (8, 3), "3": None}, factorization="tucker")
    text = check_page(render(collect(plain, timing=timing))).text
    assert "Where the work goes" in text
    assert (timing or "") in text


@pytest.mark.parametrize("points", [[[0.5, 1.0], [0.9, 0.5]], [[0.0, 1.0], [0.0, 1.0]], [[0.1, 0.0], [0.2, 0.0]]])
def test_odd_frontiers_are_drawn(full: dict[str, Any], points: list[list[float]]) -> None:
    search = {**full["search"], "frontier": points, "chosen": None}
    assert "What was possible" in check_page(render({**full, "search": search})).text


def every_text(value: Any) -> Any:
    """Return a report in which each text is hostile but those that decide what is shown."""
    if isinstance(value, dict):
        return {k: v if k in ("kind", "cost") else every_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [every_text(item) for item in value]
    return EVIL + value if isinstance(value, str) else value


def test_hostile_names_stay_text(full: dict[str, Any]) -> None:
    hostile = every_text(full)
    hostile["environment"] = {EVIL: EVIL}
    page = render(hostile)
    text = check_page(page).text
    assert "<script" not in page
    assert "<img" not in page
    assert "<script>alert(1)</script>" in text
    assert not {"\u202e", "\x00", "\ud800"} & set(page)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*found, *(place for key, item in items for place in places(item, (*path, key)))]


SAMPLE = collect(decomposed())
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**40), 0])
    | st.floats()
    | st.just(EVIL)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(places(SAMPLE)), JSON)
def test_any_value_anywhere_gives_a_page_or_one_clear_error(place: tuple[Any, ...], value: Any) -> None:
    report = deepcopy(SAMPLE)
    inner: Any = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    said = ""
    try:
        check_page(render(report))
    except InputError as error:
        said = str(error)
    assert len(said) < 400
    assert "\n" not in said


@pytest.mark.parametrize("value", [True, "3", math.inf, [1], 10**31])
def test_no_number_is_taken_on_trust(full: dict[str, Any], value: Any) -> None:
    report = deepcopy(full)
    report["before"]["macs"] = value
    with pytest.raises(InputError, match=r"report\.before\.macs"):
        read_content(report)
    with pytest.raises(InputError, match=r"^[^\n]*environment[^\n]*$"):
        read_content({**full, "environment": {"a\nb": [value]}})


@given(st.floats(-1e30, 1e30), st.floats(0, 1e30))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 9
    slack = 1e-5 * max(abs(low), abs(low + width)) + 1e-12
    assert all(low - slack <= tick <= low + width + slack for tick in found)


def many(full: dict[str, Any], names: list[str]) -> str:
    report = deepcopy(full)
    report["changes"] = [{**full["changes"][0], "site": name} for name in names]
    return check_page(render(report)).text


def test_layers_of_a_block_share_a_bar_where_there_are_many(full: dict[str, Any]) -> None:
    text = many(full, [f"stage{i % 2}.{i // 2}.conv" for i in range(60)])
    assert "stage1 (30)" in text
    assert "36 others" in many(full, [f"layer{i}" for i in range(60)])
    assert " others" not in many(full, [f"layer{i}" for i in range(24)])


def test_write_is_whole_or_not_there(tmp_path: Path, full: dict[str, Any]) -> None:
    page = tmp_path / "report.html"
    write(full, page)
    assert page.read_text(encoding="utf-8") == render(full)
    with pytest.raises(FileError):
        write(full, page, force=False)
    with pytest.raises(InputError):
        write({**full, "changes": 3}, tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_command_writes_the_page(tmp_path: Path) -> None:
    result = decomposed()
    model = tmp_path / "net.pt2"
    surgery.save(result.model, model)
    assert "no report" in str(run("report", model).exception)
    attach(result.model, collect(result))
    surgery.save(result.model, model)
    assert run("report", model).output.strip() == f"wrote {tmp_path / 'net.report.html'}"
    assert isinstance(run("report", model).exception, FileError)  # it is there already
    assert run("report", model, "--force").exception is None
    assert "file size" not in (tmp_path / "net.report.html").read_text()  # that of the original is not known
    shown = json.loads(run("report", model, "--json").output)
    assert shown["after"]["file_size"] == model.stat().st_size
    assert shown["changes"] == collect(result)["changes"]


def test_plan_diff(tmp_path: Path) -> None:
    plan = surgery.plan(program(), ranks=4)
    (tmp_path / "a.json").write_text(plan.to_json())
    (tmp_path / "b.json").write_text(plan.edit("0", rank=None).to_json())
    assert run("plan", "diff", tmp_path / "a.json", tmp_path / "a.json").output == "the plans are equal\n"
    output = run("plan", "diff", tmp_path / "a.json", tmp_path / "b.json").output
    assert re.fullmatch(r"0: tucker 4,3 -> dense \(by hand\)\n", output)
    assert json.loads(run("plan", "diff", tmp_path / "a.json", tmp_path / "b.json", "--json").output)["equal"] is False
    assert isinstance(run("plan", "diff", tmp_path / "a.json", __file__).exception, InputError)
