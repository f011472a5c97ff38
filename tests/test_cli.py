"""The command line end to end on the shipped network: outputs, files, errors and exit statuses."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

import surgery
from examples.fashion_resnet import build
from surgery.cli import show
from tests import command_line

MODEL = Path(__file__).parent.parent / "examples" / "data" / "fashion_resnet.pt2"

pytestmark = pytest.mark.xdist_group("cli")


def run(*words: object, status: int = 0) -> command_line.Done:
    done = command_line.run(*words)
    assert done.status == status, done.stderr
    return done


def test_the_module_is_the_command(tmp_path: Path) -> None:
    plans = [tmp_path / "a.json", tmp_path / "b.json"]
    for plan, reason in zip(plans, ("one", "another"), strict=True):
        plan.write_text(json.dumps({"surgery_plan": 1, "decisions": [{"site": "stem.conv", "reason": reason}]}))
    words = ("plan", "diff", *map(str, plans))
    done = subprocess.run([sys.executable, "-m", "surgery", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stem.conv" in done.stdout
    assert done.stdout == run(*words).stdout


def test_inspect_json() -> None:
    found = json.loads(run("inspect", MODEL, "--json").stdout)
    assert set(found) == {"sites", "skips", "totals"}
    assert sum(site["macs"] for site in found["sites"]) == found["totals"]["macs"]
    assert found["sites"][0]["name"] == "stem.conv"


def test_input_shape_changes_costs() -> None:
    one = json.loads(run("inspect", MODEL, "--json", "--input-shape", "1,1,28,28").stdout)
    four = json.loads(run("inspect", MODEL, "--json", "--input-shape", "4,1,28,28").stdout)
    assert four["totals"]["macs"] == 4 * one["totals"]["macs"]


def _held(path: Path) -> dict[str, bytes]:
    """What an archive holds, but for the record of how it was made, and the number that torch computes from it."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith(("/surgery.json", "/serialization_id"))]
        return {name: archive.read(name) for name in names}


def test_decompose_recompose_round_trip(tmp_path: Path) -> None:
    factored, back, weights = tmp_path / "a.pt2", tmp_path / "b.pt2", tmp_path / "b.safetensors"
    plan = tmp_path / "plan.json"
    words = ("decompose", MODEL, "-o", factored, "--ranks", "energy=0.8", "--no-timing", "--save-plan", plan, "--json")
    done = json.loads(run(*words).stdout)
    assert done["changes"]
    assert done["after"]["parameters"] < done["before"]["parameters"]
    again = tmp_path / "again.pt2"
    run("decompose", MODEL, "-o", again, "--plan", plan, "--no-timing")
    assert _held(again) == _held(factored)
    run("recompose", factored, "-o", back, "--state-dict", weights)
    assert json.loads(run("compare", factored, back, "--json").stdout)["relative"] < 1e-5
    build().load_state_dict(load_file(weights), strict=True)
    run("decompose", MODEL, "-o", factored, "--ranks", "8", status=2)  # it exists


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run("decompose", MODEL, "-o", tmp_path / "a.pt2", "--ranks", "16", "--dry-run", "--no-timing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "no-such-file.pt2"),
        ("inspect", __file__),
        ("decompose", MODEL, "-o", "/no/such/folder/a.pt2"),
        ("decompose", MODEL, "--dry-run", "--ranks", "energy=7"),
        ("decompose", MODEL, "--dry-run", "--ranks", "many"),
        ("decompose", MODEL, "--dry-run", "--no-timing", "--ranks", "8", "--factorization", "cpp"),
        ("decompose", MODEL, "--dry-run", "--no-timing", "--ranks", "8", "--exclude", "nothing*"),
        ("inspect", MODEL, "--input-shape", "1,3,28,28"),
        ("inspect", MODEL, "--input-shape", "1,x"),
        ("export", MODEL),
        ("decompose", MODEL, "--bogus"),
    ],
    ids=lambda words: " ".join(Path(str(w)).name for w in words),
)
def test_bad_input_is_one_line_and_status_2(words: tuple[object, ...]) -> None:
    assert run(*words, status=2).stderr.strip()


def _steps(path: Path) -> set[str]:
    """The names of steps that a file reports: calls with a word and two numbers of what calls itself so."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = [c for c in calls if ast.unparse(c.func).split(".")[-1] in ("progress", "report") and len(c.args) == 3]
    return {str(c.args[0].value) for c in called if isinstance(c.args[0], ast.Constant)}


def test_each_step_has_words() -> None:
    used = set().union(*map(_steps, Path(surgery.__file__).parent.rglob("*.py")))
    assert used == set(show.STEPS)
