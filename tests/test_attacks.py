"""Crafted files on the command line: nothing of them runs, and each ends soon, in one line, without litter."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.hostile.command_lines import CommandLines, Done
from tests.hostile.crafted import CRAFTED, MARKER

pytestmark = pytest.mark.xdist_group("command lines")


@pytest.mark.law(8)
@pytest.mark.parametrize("name", CRAFTED)
def test_no_file_harms(name: str, seeds: Path, command_lines: CommandLines) -> None:
    for line in CRAFTED[name](seeds):
        done = command_lines.run(seeds, *line.split(" "))
        assert not done.faults(), done
        assert not (seeds / MARKER).exists()


def test_an_honest_file_is_refused_nothing(seeds: Path, command_lines: CommandLines) -> None:
    lines = ["inspect mlp.pt2", "compare mlp.pt2 mlp.dec.pt2", "report mlp.dec.pt2 -o o.html"]
    lines += ["decompose mlp.pt2 -o o.pt2 --ranks 2 --no-timing"]
    for line in lines:
        done = command_lines.run(seeds, *line.split(" "))
        assert not done.faults(allowed=(0,)), done
        assert done.stdout


FACTORIES = {
    "while True: pass": "ended by SIGXCPU",
    "os.kill(os.getpid(), 11)": "ended by SIGSEGV",
    "os.write(2, b'note')": "1 lines on standard error",
    "os.write(2, b'a\\nb'); raise OSError": "2 lines on standard error",
    "print('\\x1b[2J')": "control characters",
    "open('x.tmp', 'w')": "left x.tmp",
    "open('x', 'w'); raise OSError": "left x",
    "raise KeyboardInterrupt": "status 130",
}


@pytest.mark.law(4)
@pytest.mark.parametrize("body", FACTORIES)
def test_what_goes_wrong_is_seen(body: str, seeds: Path, command_lines: CommandLines) -> None:
    text = f"import os\nfrom factory import make as honest\ndef make():\n    {body}\n    return honest()\n"
    (seeds / "bad.py").write_text(text)
    words = ("inspect", "sd.pt", "--model", "bad:make", "--input-shape", "2,8")
    assert FACTORIES[body] in command_lines.run(seeds, *words, seconds=1).faults()


def test_a_failure_of_ours_and_much_memory_are_seen() -> None:
    assert Done((), 1, "", "Traceback", 9999).faults() == ["status 1", "a failure of ours", "9999 MiB of memory"]
    assert Done((), -signal.SIGALRM, "", "", 1).faults() == ["ended by SIGALRM"]
