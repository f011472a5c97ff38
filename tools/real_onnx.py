"""ONNX files of others, for the tools that try them: what the module ``onnx_files.py`` of a folder has.

``onnx_files.py`` knows real files of packages by name, fetches them, makes inputs for them, and scores changed files.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Files", "Run", "chosen", "open_files", "option_parser"]

Run = Callable[[dict[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]]


@dataclass(frozen=True)
class Files:
    """The files that ``onnx_files.py`` knows, by name; ``module`` is that module."""

    module: Any

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return list(self.module.FILES)

    def metric(self, name: str) -> str:
        """Return what the score of a file is."""
        return str(self.module.FILES[name].metric)

    def path(self, name: str) -> Path:
        """Return the path of a file, which is fetched the first time."""
        return Path(self.module.path(name))

    def inputs(self, name: str, count: int, seed: int) -> list[dict[str, Tensor]]:
        """Return ``count`` inputs of one sample each, by name; the same for the same seed. Trees have none."""
        if not self.module.FILES[name].feed:
            return []
        feeds = self.module.inputs(name, count, seed)
        return [{key: torch.from_numpy(np.array(value)) for key, value in feed.items()} for feed in feeds]

    def score(self, name: str, run: Run, count: int | None, split: str = "test") -> float:
        """Return the score of what runs a changed file, on ``count`` inputs of a split; higher is better."""
        return float(self.module.score(name, run, split, count))


def option_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all tools on these files share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="the folder of onnx_files.py")
    parser.add_argument("--files", type=Path, help="where the files are, or are fetched to  [default: its own]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files by name  [default: all]")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def open_files(options: argparse.Namespace) -> Files:
    """Return the files for the options of ``option_parser``."""
    source = options.data / "onnx_files.py"
    if not source.is_file():
        raise SystemExit(f"{options.data} has no onnx_files.py: give --data the folder of that file")
    if options.files is not None:
        os.environ["ONNX_FILES"] = str(options.files)  # where its functions look for the files
    spec = importlib.util.spec_from_file_location("onnx_files", source)
    assert spec is not None and spec.loader is not None, "a Python file has a loader"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_files"] = module
    spec.loader.exec_module(module)
    return Files(module)


def chosen(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the names that were asked for, or all; an unknown one ends the program."""
    if unknown := [name for name in only or () if name not in names]:
        raise SystemExit(f"--only {unknown[0]}: no such file; there are {', '.join(names)}")
    return list(only or names)
