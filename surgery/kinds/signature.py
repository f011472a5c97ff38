"""How a model is called: how many of an item's values are its inputs, of what names, types and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, normalise_inputs

__all__ = ["Declared", "Signature"]


@dataclass(frozen=True)
class Signature:
    """The names of a model's inputs in order, of which the first ``positional`` cannot be given by name.

    ``taken`` is how many values of a sequence are inputs: what follows is labels. ``required`` are inputs that must be
    there; ``open_ended`` models take other names too.
    """

    names: tuple[str, ...]
    taken: int
    required: frozenset[str]
    positional: int = 0
    open_ended: bool = False

    def arrange(self, item: Any) -> Inputs:
        """Return one item of the user's as inputs ``(args, kwargs)``, without labels.

        Raises:
            InputError: too few values, or names that the model does not have.
        """
        if isinstance(item, Mapping):
            return self._by_name(item)
        args, kwargs = normalise_inputs(item)
        if isinstance(item, Tensor) or kwargs:
            return args, kwargs
        if len(args) < len(self.required):
            what = f"a calibration input has {len(args)} values"
            raise InputError(what, allowed=f"{', '.join(self.names)}, and labels, which are left out")
        return args[: self.taken], {}

    def _by_name(self, item: Mapping[Any, Any]) -> Inputs:
        _, given = normalise_inputs(item)
        if len(given) == 1 and len(self.required) == 1 and not set(given) & set(self.names) and not self.open_ended:
            return tuple(given.values()), {}  # one array, one input: its name says nothing
        missing = [name for name in self.names if name in self.required and name not in given]
        if missing:
            what = f"the calibration inputs have no {', '.join(missing)} (they have {', '.join(given) or 'none'})"
            raise InputError(what, allowed=", ".join(self.names))
        first = self.names[: self.positional]
        known = given if self.open_ended else {name: given[name] for name in self.names if name in given}
        args = tuple(known[name] for name in first if name in known)
        return args, {name: value for name, value in known.items() if name not in first}


@dataclass(frozen=True)
class Declared:
    """What is known of an input: its dtype, its sizes (None where they may vary), and how many ids it knows, if any.

    ``shape`` is that of the example inputs, with the names of sizes that vary where there are names. ``longest`` is the
    largest size that the second axis may have, where there is a limit.
    """

    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    shape: tuple[int | str, ...]
    ids: int | None = None
    longest: int | None = None
