"""Full and read-only disks, caches of any make, users without a home, full streams: commands end clearly."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.command_lines import ROOT, CommandLines

pytestmark = pytest.mark.xdist_group("command lines")

OLD = b"the old file, whole" * 100
MEASURES = ("decompose", "mlp.pt2", "--dry-run", "--ranks", "2")  # latencies, and writes nothing else


def _mount(*words: str) -> None:
    """Skip the test where it cannot: mounting needs root, and Linux."""
    done = subprocess.run(["bash", "-c", 'mount "$@"', "mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")


@pytest.fixture
def disk(seeds: Path) -> Iterator[Path]:
    """A disk of 2 MB among the honest files: too small for what is made of ``big``."""
    path = seeds / "disk"
    path.mkdir()
    _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


# -- disks -------------------------------------------------------------------------------------------------------------

WRITERS = {
    "decompose": "decompose big.pt2 --ranks 300 --no-timing -o disk/out",
    "recompose": "recompose big.dec.pt2 -o disk/out",
    "export": "export big.pt2 -o disk/out",
    "state dict": "recompose big.dec.pt2 -o new.pt2 --state-dict disk/out",
}


@pytest.mark.law(4)
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_what_was_there(
    name: str, old: bool, disk: Path, seeds: Path, command_lines: CommandLines
) -> None:
    if old:
        (disk / "out").write_bytes(OLD)
    done = command_lines.run(seeds, *WRITERS[name].split(), *["--force"] * old)
    assert not done.faults(allowed=(2,)), done
    assert f"no space left on the disk at {disk}" in done.stderr
    assert [path.read_bytes() for path in disk.iterdir()] == [OLD] * old


def test_a_full_folder_of_temporary_files_is_named(disk: Path, seeds: Path, command_lines: CommandLines) -> None:
    done = command_lines.run(seeds, "export", "big.pt2", "-o", "o.onnx", TMPDIR=str(disk))
    assert not done.faults(allowed=(2,)), done
    assert "no space left" in done.stderr
    assert "TMPDIR" in done.stderr


READ_ONLY = [
    "decompose mlp.pt2 --ranks 2 --no-timing -o disk/new",
    "decompose mlp.pt2 --ranks 2 --no-timing --force -o disk/old",
    "decompose mlp.pt2 --ranks 2 --no-timing --dry-run --save-plan disk/new",
    "report mlp.dec.pt2 -o disk/new",
    "export mlp.pt2 -o disk/new",
]


def test_a_read_only_disk_is_named(disk: Path, seeds: Path, command_lines: CommandLines) -> None:
    (disk / "old").write_bytes(OLD)
    _mount("-o", "remount,ro", str(disk))
    for line in READ_ONLY:
        done = command_lines.run(seeds, *line.split())
        assert not done.faults(allowed=(2,)), done
        assert "disk" in done.stderr
    done = command_lines.run(seeds, *MEASURES, SURGERY_CACHE=str(disk / "cache"))
    assert not done.faults(allowed=(0,), notes=1), done


# -- caches ------------------------------------------------------------------------------------------------------------


def _sql(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return make


def _cut_off(path: Path) -> None:
    _sql("CREATE TABLE latencies (key TEXT PRIMARY KEY, fields TEXT)")(path)
    os.truncate(path, 5000)


def _folder_is_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"x")


# tests/test_cost.py has more; each of these is met by a whole command
CACHES: dict[str, Callable[[Path], object]] = {
    "empty folder": lambda path: None,
    "cut off": _cut_off,
    "folder is a file": _folder_is_a_file,
    "view": _sql("CREATE VIEW latencies AS SELECT 'a' AS key, 'b' AS fields"),
}


@pytest.mark.law
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_any_make_is_used_or_done_without(name: str, seeds: Path, command_lines: CommandLines) -> None:
    cache = seeds / "cache"
    cache.mkdir()
    CACHES[name](cache / "latencies.sqlite3")
    done = command_lines.run(seeds, *MEASURES, SURGERY_CACHE=str(cache))
    assert not done.faults(allowed=(0,), notes=name != "empty folder"), done


TINY = '{"dense_s": 5e-324, "chain_s": 5e-324, "speedup": 1e308, "low": 1e308, "high": 1e308, "verdict": "faster"}'


@pytest.mark.parametrize("fields", [TINY, b"\xff" * 50_000_000], ids=["tiny", "long"])
def test_rows_that_nobody_has_measured_do_no_harm(
    fields: str | bytes, seeds: Path, command_lines: CommandLines
) -> None:
    words = ("decompose", "big.pt2", "--dry-run", "--ranks", "auto")
    variables: dict[str, Any] = {"SURGERY_CACHE": str(seeds / "cache")}
    assert not command_lines.run(seeds, *words, **variables).faults(allowed=(0,))
    with contextlib.closing(sqlite3.connect(seeds / "cache" / "latencies.sqlite3")) as connection, connection:
        assert connection.execute("UPDATE latencies SET fields = ?", (fields,)).rowcount
    done = command_lines.run(seeds, *words, **variables)
    assert not done.faults(allowed=(0,), notes=1), done


PLACES: dict[str, dict[str, Any]] = {
    "no home": {"HOME": "/proc/nowhere", "SURGERY_CACHE": None, "XDG_CACHE_HOME": None},
    "home is a file": {"HOME": "/etc/passwd", "SURGERY_CACHE": None, "XDG_CACHE_HOME": None},
    "long name": {"SURGERY_CACHE": "/proc/" + "x" * 5000},
    "relative name": {"SURGERY_CACHE": "cache/deep/er"},
}


@pytest.mark.law
@pytest.mark.parametrize("name", PLACES)
def test_a_cache_in_any_place_is_used_or_done_without(name: str, seeds: Path, command_lines: CommandLines) -> None:
    done = command_lines.run(seeds, *MEASURES, **PLACES[name])
    assert not done.faults(allowed=(0,), notes=name != "relative name"), done


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_user_without_a_home(seeds: Path, command_lines: CommandLines) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(seeds / "mlp.pt2", folder)
        unset: dict[str, Any] = dict.fromkeys(("HOME", "SURGERY_CACHE", "XDG_CACHE_HOME"))
        done = command_lines.run(folder, *MEASURES, user=54321, **unset)
        assert not done.faults(allowed=(0,), notes=1), done


# -- streams -----------------------------------------------------------------------------------------------------------

FULL = "surgery: standard output takes nothing: No space left on device; nothing was written\n"
STREAMS = {
    "inspect mlp.pt2 | true": (1, ""),
    "inspect mlp.pt2 > /dev/full": (1, FULL),
    "inspect mlp.pt2 --json > /dev/full": (1, FULL),
}


@pytest.mark.law(2)
@pytest.mark.parametrize("line", STREAMS)
def test_tables_for_streams_that_take_nothing(line: str, seeds: Path) -> None:
    """Of a real start, as of ``tests/test_ending.py``, here with what commands print."""
    shell = ["bash", "-c", f'set -o pipefail; "{sys.executable}" -m surgery {line}']
    done = subprocess.run(shell, cwd=seeds, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == STREAMS[line]
