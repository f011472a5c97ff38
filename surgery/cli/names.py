"""File names from the command line, which are shown as they were typed: ``http://x`` does not become ``http:/x``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

__all__ = ["FILE", "TypedPath"]


class TypedPath(type(Path())):  # type: ignore[misc]
    """A path whose text is what was typed; paths that are made of it have the usual text."""

    typed = ""

    def __str__(self) -> str:
        return self.typed or super().__str__()

    def beside(self, name: str) -> TypedPath:
        """Return the path of another file in the same folder, as it would be typed."""
        found: TypedPath = self.with_name(name)
        if self.typed.endswith(self.name):
            found.typed = self.typed.removesuffix(self.name) + name
        return found


class _File(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TypedPath:
        if isinstance(value, TypedPath):
            return value
        text = os.fsdecode(super().convert(value, param, ctx))
        path = TypedPath(text)
        path.typed = text
        return path


FILE = _File()
