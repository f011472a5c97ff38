"""Texts from outside are shown as they are, escaped, by every command; and tables fit the terminal, word by word."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.cli import show
from surgery.cli.options import FILE, default_output
from surgery.errors import InputError
from surgery.passes.bisect import Bisection, Blame
from surgery.passes.results import Promise, Seen
from surgery.report import collect, render
from surgery.sites import Skip
from surgery.system.tables import layout, table
from surgery.text import cut, shown, width, wrap
from surgery.training.history import Event
from tests import command_line
from tests.command_line import Terminal

pytestmark = pytest.mark.xdist_group("shown")

SHIPPED = Path(__file__).parent.parent / "examples" / "data" / "fashion_resnet.pt2"
HOSTILE = {
    "markup": "[/red] [link=http:/evil]click[/link] :bomb:",
    "control": "a\x1b[31m\x1b]0;pwn\x07\x9b2J\u202egpj\u2066\nsurgery: all is fine\r",
    "surrogate": "\udcff\u5c42\u5c42",
}
METRIC = "def metric(model):\n    return float(sum(p.abs().sum() for p in model.parameters()))\n"


def run(*words: object, columns: int | None = None) -> tuple[str, int]:
    """What a command printed, and its status, which is that of success or of a refusal."""
    done = command_line.run(*words, columns=columns)
    assert done.status in (0, 2), done.stderr
    return done.stdout + done.stderr, done.status


def site_of(name: str) -> str:
    return re.sub(r"[\n\r;\udcff]", "", name)


class Named(nn.Module):
    """A module, an input and an output of one name; of a module's name torch takes no line breaks and semicolons."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.site = site_of(name)
        self.add_module(self.site, nn.Linear(32, 32))
        self.add_module(f"{self.site}2", nn.Linear(32, 2))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = dict(self.named_children())
        return {self.name: layers[f"{self.site}2"](layers[self.site](x[self.name]).relu())}


@pytest.fixture(scope="module", params=HOSTILE)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A name, and a folder with a model whose modules, inputs and outputs have it, in a file that has it."""
    name, folder = HOSTILE[request.param], tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    program = torch.export.export(Named(name).eval(), ({name: torch.randn(2, 32)},))
    path = folder / f"{name}.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, folder / "plain.pt2")
    os.rename(folder / "plain.pt2", path)
    decision = {"site": name, "factorization": "svd", "rank": [4], "reason": name}
    plans = [{"surgery_plan": 1, "ranks": name, "decisions": [decision | more]} for more in ({}, {"rank": [2]})]
    for plan, file in zip(plans, ("a.json", "b.json"), strict=True):
        (folder / file).write_text(json.dumps(plan))
    (folder / "metrics.py").write_text(METRIC)
    return name, folder, path


def commands(name: str, folder: Path, path: Path) -> dict[str, tuple[object, ...]]:
    """A command line for each command, the outputs of the first being inputs of later ones."""
    made = path.with_name(path.name + ".d.pt2")
    plans = folder / "a.json", folder / "b.json"
    short = ("--no-timing", "--trust", "--force")
    return {
        "inspect": ("inspect", path, "--trust"),
        "dry run": ("decompose", path, "--ranks", "8", "--dry-run", *short),
        "decompose": ("decompose", path, "--ranks", "8", "-o", made, *short),
        "plan": ("decompose", path, "--plan", plans[0], "-o", folder / f"{name}p.pt2", *short),
        "include": ("decompose", path, "--include", f"{name}no", "--dry-run", *short),
        "recompose": ("recompose", made, "-o", folder / f"{name}r.pt2", "--trust", "--force"),
        "compare": ("compare", path, made, "--trust"),
        "bisect": ("bisect", path, made, "--eval", "metrics:metric", "--trust"),
        "bench": ("bench", path, "--trust", "--seconds", "0.02", "--threads", "1"),
        "export": ("export", path, "-o", folder / f"{name}.onnx", "--trust", "--force"),
        "compare with ONNX": ("compare", path, folder / f"{name}.onnx", "--trust"),
        "report": ("report", made, "-o", folder / f"{name}.html", "--force"),
        "diff": ("plan", "diff", *plans),
        "no file": ("inspect", folder / f"{name}none.pt2"),
        "no model": ("inspect", folder / "a.json", "--model", f"{name}:{name}"),
        "no metric": ("bisect", path, made, "--eval", f"{name}:{name}", "--trust"),
        "no rank": ("decompose", path, "--ranks", name, *short),
        "no shape": ("inspect", path, "--input-shape", name, "--trust"),
        "no option": ("inspect", path, f"--{name}"),
        "no command": (name,),
    }


@pytest.fixture
def at(hostile: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    monkeypatch.chdir(hostile[1])
    return hostile


def test_every_command_shows_hostile_names_as_they_are_escaped(at: tuple[str, Path, Path]) -> None:
    name, folder, path = at
    for command, words in commands(name, folder, path).items():
        said, status = run(*words)
        assert all(c.isprintable() or c == "\n" for c in said), (command, said)
        assert not any(line.startswith("surgery: all is fine") for line in said.splitlines()), command
        assert status or command == "no model" or shown(name) in said or shown(site_of(name)) in said, (command, said)


def test_progress_and_json_hold_no_control_characters(at: tuple[str, Path, Path]) -> None:
    name, folder, path = at
    words = commands(name, folder, path)["inspect"]
    assert json.loads(run(*words, "--json")[0])["sites"][0]["name"] == site_of(name)
    assert run(*words, "--json")[0].isascii()
    stream = Terminal()
    with contextlib.redirect_stderr(stream), show.progress() as progress:
        progress(name, 1, 2)
    left = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert shown(name)[:12] in left
    assert all(c.isprintable() or c in "\r\n" for c in left)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_results_errors_and_pages_show_hostile_names_escaped(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(32, 32))
    result = surgery.decompose(model.eval(), torch.randn(4, 32), ranks=4)
    noted = replace(
        result,
        changes=tuple(replace(change, note=name) for change in result.changes),
        skips=(Skip(name, name, name, 1, 10**9),),
        promise=Promise("max_error", 0.1, 0.01, True, name),
        seen=Seen(0.1, name),
    )
    back = surgery.recompose(result.model, torch.randn(4, 32))
    fused = replace(back, skips=noted.skips)
    bisected = Bisection(1.0, 0.5, (Blame((name, name), 0.5),), noted.skips, 3)
    event = Event("decompose", 1, name, changes=noted.changes, notes=(name,))
    error = InputError(name, allowed=name, next_step=name)
    page = render(collect(noted, files=(Path(f"{name}.pt2".replace("/", ":")), None)))
    for said in (*map(repr, (noted, fused, bisected, event)), *map(str, (noted.promise, noted.seen, error)), page):
        assert shown(name) in html.unescape(said)
        assert all(c.isprintable() or c == "\n" for c in said)
        assert not any(line.startswith("surgery: all is fine") for line in said.splitlines())
    assert "\n" not in str(error)
    assert len(str(InputError("a" * 10**6))) == 4000


def test_what_prints_is_shown_as_it_is() -> None:
    assert shown("über [/red] :x: \u5c42 \\x1b") == "über [/red] :x: \u5c42 \\x1b"
    assert shown("\x00\x9b\xa0\u2028\u202e\ue000\ud800") == r"\x00\x9b\xa0\u2028\u202e\ue000\ud800"
    assert shown(shown("\x1b\n")) == shown("\x1b\n")


@pytest.mark.parametrize("text", ["a" * 50, "\u5c42" * 50, "a\u0301" * 50, "\u5c42a" * 9])
@pytest.mark.parametrize("columns", [1, 2, 8, 20, 80])
def test_cut_fits_and_keeps_both_ends(text: str, columns: int) -> None:
    found = cut(text, columns)
    assert width(found) <= columns
    assert found == text if width(text) <= columns else "\u2026" in found
    start, _, end = found.partition("\u2026")
    assert text.startswith(start)
    assert text.endswith(end)


def test_wrap_breaks_between_words_alone() -> None:
    text = "the rank is at or above its full rank; " + "x" * 30 + " stays"
    assert wrap(text, None) == [text]
    found = wrap(text, 24, "  ")
    assert max(map(width, found)) <= 24
    assert all(line.startswith("  ") for line in found[1:])
    words = " ".join(line.strip() for line in found).split(" ")
    assert [word for word in words if "\u2026" not in word] == [word for word in text.split(" ") if word != "x" * 30]


def test_file_names_are_shown_as_they_were_typed() -> None:
    said, status = run("inspect", "./http://none.pt2")
    assert status == 2
    assert said.startswith("surgery: ./http://none.pt2: ")
    path = FILE.convert("./http://x.pt2", None, None)
    assert path == Path("http:/x.pt2")
    assert str(default_output(path, "new.pt2")) == "./http://x.new.pt2"
    assert str(path.parent) == "http:"


ROWS = [
    ["name", "operator", "largest difference", "before and after"],
    ["encoder.layers.11.attention.output", "Conv2d 3x3 groups=4", "1.2 M", "14.5 M -> 1.99 M"],
    ["fc", "Linear", "100 k", "-"],
]


@pytest.mark.parametrize("columns", [None, 100, 80, 70, 60, 50, 42])
def test_tables_break_headings_first_then_cells_and_cut_last(columns: int | None) -> None:
    head, body = layout(ROWS, words=2, columns=columns)
    assert max(map(width, head + body)) <= (columns or 200)
    assert sorted(" ".join(head).split()) == sorted(" ".join(ROWS[0]).split())
    said = "\n".join(body)
    assert (len(head) > 1) == (columns is not None and columns < 95)
    assert (len(body) > 2) == (columns is not None and columns < 85)
    assert ("\u2026" in said) == (columns is not None and columns < 46)
    assert "1.2 M" in said
    assert "14.5 M ->" in said


def test_one_long_name_does_not_fill_up_the_other_rows() -> None:
    said = table([["name", "number"], ["a" * 10**6, "1"], *[["b", "2"]] * 1000])
    assert len(said) < 10**6 + 10**6


class Attention(nn.Module):
    """Linear layers of long names."""

    def __init__(self) -> None:
        super().__init__()
        self.query_of_attention, self.output_projection = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gate = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_projection(self.query_of_attention(x).relu()) * self.gate(x)


class Encoder(nn.Module):
    """Blocks, a convolution of many words, and outputs of long names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.encoder_of_images = nn.ModuleDict({"layers": nn.Sequential(*(Attention() for _ in range(7)))})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.encoder_of_images["layers"](self.stem(x).flatten(1)[:, :64])
        return {"the_last_hidden_state_of_the_encoder_of_images_before_any_pooling_or_projection": y}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide") / "a_model_of_a_long_name.pt2"
    torch.export.save(torch.export.export(Encoder().eval(), (torch.randn(2, 4, 5, 5),)), path)
    (path.parent / "metrics.py").write_text(METRIC)
    return path


BOLD = re.compile(r"\x1b\[1m(.*)\x1b\[0m")


def test_no_command_prints_wider_than_the_terminal_or_breaks_a_word(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoder.parent)
    made, plan = tmp_path / "made.pt2", tmp_path / "plan.json"
    many = [tmp_path / f"{i}.json" for i in range(2)]
    sites = [f"encoder_of_images.layers.{i}.output_projection.and_more" for i in range(3)]
    for file, reason in zip(many, ("a reason of many words, " * 9, "another"), strict=True):
        rows = [{"site": site, "reason": reason} for site in sites]
        file.write_text(json.dumps({"surgery_plan": 1, "decisions": rows}))
    out = ("-o", tmp_path / "o.pt2", "--force")
    commands: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", encoder),
        "shipped": ("inspect", SHIPPED),
        "decompose": ("decompose", encoder, "--ranks", "8", "--no-timing", "--save-plan", plan, "-o", made, "--force"),
        "dry run": ("decompose", encoder, "--ranks", "64", "--no-timing", "--dry-run"),
        "plan": ("decompose", encoder, "--plan", plan, "--no-timing", *out),
        "recompose": ("recompose", made, *out),
        "compare": ("compare", encoder, made),
        "export": ("export", made, "-o", tmp_path / "o.onnx", "--force"),
        "bench": ("bench", encoder, tmp_path / "o.onnx", "--seconds", "0.02", "--threads", "1"),
        "bisect": ("bisect", encoder, made, "--eval", "metrics:metric"),
        "report": ("report", made, "-o", tmp_path / "o.html", "--force"),
        "plan diff": ("plan", "diff", *many),
    }
    for command, words in commands.items():
        said, status = run(*words, columns=80)
        assert not status, said
        lines = [BOLD.sub(r"\1", line) for line in said.splitlines()]
        assert max(map(width, lines)) <= 80, said
        headings = " ".join(BOLD.findall(said)).split()
        assert set(HEADINGS.get(command, "").split()) <= set(headings), said


# the words of which at 80 columns none may be broken
HEADINGS = {
    "inspect": "name operator weight input parameters MACs share of MACs",
    "shipped": "name operator weight input parameters MACs share of MACs",
    "decompose": "site operator method rank weight error MACs before after change",
    "recompose": "site operator parts parameters before after",
    "compare": "output shape largest difference relative error",
    "bench": "model median p90 spread runs speed-up 95 % interval verdict",
    "bisect": "sites gain when dense again share of the loss",
}


def test_names_are_cut_on_a_narrow_terminal_alone(encoder: Path) -> None:
    output = next(iter(Encoder().forward(torch.randn(2, 4, 5, 5))))
    narrow, wide, file = (run("compare", encoder, encoder, columns=columns)[0] for columns in (80, 200, None))
    assert "\u2026" in narrow
    assert output in wide
    assert output in file
    assert "\u2026" not in wide + file


def test_a_terminal_names_some_of_many_places_and_a_file_all(encoder: Path) -> None:
    words = ("decompose", encoder, "--ranks", "64", "--no-timing", "--dry-run")
    narrow, file = run(*words, columns=80)[0], run(*words)[0]
    assert "rank 64 is at or above its full rank 2,2 to 64 (15 places, " in file
    assert file.count("query_of_attention (Linear)") == 7
    assert "layers.6.output_projection (Linear)\n" in file
    assert " more" not in file
    assert "and 3 more\n" in narrow
    assert "layers.6.output_projection" not in narrow


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_real_terminal_is_as_wide_as_it_says() -> None:
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    words = [sys.executable, "-m", "surgery", "inspect", str(SHIPPED)]
    done = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    said = b""
    with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as file:  # OSError: the other end closed
        while part := file.read(1 << 16):
            said += part
    assert done.wait() == 0
    found = [BOLD.sub(r"\1", line) for line in said.decode().splitlines()]
    assert 85 < max(map(width, found)) <= 90
    assert "name                 operator " in "\n".join(found)
    assert len(found) < 24
