"""A model as it was given, or the one in its file: every public function that reads a model takes the path of one."""

from __future__ import annotations

import os
from typing import Any, cast

from typing_extensions import TypeVar

from surgery.files.load import load
from surgery.kinds.registry import Model, kind_of

__all__ = ["GivenModel", "model_of"]

GivenModel = TypeVar("GivenModel", bound=Model, default=Any)  # Any is what a path gives: its file says which kind


def model_of(model: GivenModel | str | os.PathLike[str]) -> GivenModel:
    """Return a model as it is, or the one in the file at a path, as ``load`` opens it without trust.

    Raises:
        InputError: it is neither a model nor a path.
        FileError: as ``load``.
    """
    if isinstance(model, str | os.PathLike):
        return cast(GivenModel, load(model))
    kind_of(model)
    return model
