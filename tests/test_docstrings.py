"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import surgery
from tools.source import Source

SOURCE = Source(Path(surgery.__file__).parent.parent)
SHOWN = [name for name, module in SOURCE.modules.items() if ">>>" in module.text]


@pytest.mark.parametrize("name", SHOWN)
def test_examples_give_what_they_say(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted or "doctest: +SKIP" in SOURCE.modules[name].text
    assert not done.failed
