"""How the command line ends: the status and the one line, whatever interrupts it, goes wrong or takes no output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.covering import ALL

ROOT = Path(__file__).parent.parent
KILLS = 6 if ALL else 3
_COMMAND = """
import gc, os, signal, sys, time
from pathlib import Path
import click
from surgery.cli import main
from surgery.cli.group import cli
from surgery.system.writing import text_writer, write_together

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(100000))

def write():
    write_together([(Path(name), text_writer("x")) for name in ("a", "b")])

def swallow():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except BaseException:
        pass

@click.command()
def own():
    {body}

cli.add_command(own)
sys.argv = ["surgery", "own"]
main()
"""


def run(body: str, folder: Path, shell: str = "", **variables: str) -> tuple[int, str]:
    """Run the command line with a command of this body; return the status and what it wrote on standard error."""
    script = folder / "script.py"
    script.write_text(_COMMAND.format(body=body))
    line = f'exec "{sys.executable}" "{script}" {shell}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_is_told_with_what_was_written(name: str, tmp_path: Path) -> None:
    sent = f"os.kill(os.getpid(), signal.{name}); time.sleep(10)"
    assert run(sent, tmp_path) == (130, "surgery: interrupted; nothing was written")
    gone = "from surgery.system.scratch import scratch_folder\n    with scratch_folder() as f: os.chdir(f); write(); "
    assert run(f"{gone}{sent}", tmp_path) == (130, "surgery: interrupted; nothing was written")
    assert run(f"write(); {sent}", tmp_path) == (130, "surgery: interrupted; a and b were written")


def test_an_interrupt_is_not_lost_where_it_is_swallowed(tmp_path: Path) -> None:
    for body in ("swallow()", "Deleted(); time.sleep(10)"):
        assert run(body, tmp_path) == (130, "surgery: interrupted; nothing was written"), body


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    ignoring = f'-c "import signal, runpy; signal.signal(1, signal.SIG_IGN); runpy.run_path({str(tmp_path)!r})"'
    (tmp_path / "__main__.py").write_text(_COMMAND.format(body="os.kill(os.getpid(), signal.SIGHUP)"))
    done = subprocess.run(
        ["bash", "-c", f'exec "{sys.executable}" {ignoring}'],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "surgery: standard output takes nothing: No space left on device; a and b were written"),
        ("2>/dev/full", 0, ""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_take_nothing(shell: str, status: int, said: str, unbuffered: str, tmp_path: Path) -> None:
    body = "write(); click.echo('x')"
    assert run(body, tmp_path, shell, PYTHONUNBUFFERED=unbuffered) == (status, said)
    assert (tmp_path / "a").read_bytes() == b"x"  # and nothing that was to be printed


def test_letters_that_a_stream_does_not_know_are_escaped(tmp_path: Path) -> None:
    assert run("print('\\u2192 \\udcff')", tmp_path, "1>&2", PYTHONIOENCODING="ascii") == (0, r"\u2192 \udcff")


@pytest.mark.parametrize("body", ["1 / 0", "raise EOFError('x')", "raise OSError(28, 'x')", "[][0]"])
def test_what_nobody_thought_of_is_one_line_with_a_hint(body: str, tmp_path: Path) -> None:
    status, said = run(body, tmp_path)
    assert status == 1
    assert said.startswith("surgery: internal error: ")
    assert "report it" in said
    assert "SURGERY_DEBUG=1" in said
    assert len(said.splitlines()) == 1
    status, said = run(body, tmp_path, SURGERY_DEBUG="1")
    assert status == 1
    assert "Traceback" in said


def test_errors_of_usage_are_escaped(tmp_path: Path) -> None:
    status, said = run("raise click.UsageError('a\\x07')", tmp_path)
    assert status == 2
    assert said.endswith(r"Error: a\x07")


def test_no_memory_is_no_bug(tmp_path: Path) -> None:
    assert run("raise MemoryError", tmp_path) == (2, "surgery: there is not enough memory; nothing was written")


def test_files_are_old_or_new_after_kills() -> None:
    """The small version of what the tool does by the hundred."""
    line = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", str(KILLS)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{KILLS} kills, 0 handled badly\n")
