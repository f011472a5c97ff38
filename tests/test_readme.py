"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    printed = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        printed.append(capsys.readouterr().out)
    assert "DecomposeResult" in printed[0]
    assert float(printed[0].split()[-1]) < 1e-5
    assert "slowest stage" in printed[-1]
    assert printed[-1].endswith("True\n")
    assert (tmp_path / "fashion.decomposed.pt2").exists()


def test_the_code_of_the_architecture_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "architecture.md", "exec"), names)
    printed = capsys.readouterr().out.strip()
    assert f"`{printed}`" in text


def test_the_pages_name_files_that_exist() -> None:
    """Paths in backquotes, below the package where they name one of its rooms."""
    for page in ("docs/architecture.md", "CONTRIBUTING.md", "README.md"):
        named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", (ROOT / page).read_text())
        missing = [path for path in named if not (ROOT / path).exists() and not (ROOT / "surgery" / path).exists()]
        assert not missing, f"{page}: {missing}"
