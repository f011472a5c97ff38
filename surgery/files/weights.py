"""Give the weights of a state dict to a module: one that was given, or one that a factory makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from surgery.errors import FileError, InputError, SurgeryError
from surgery.files.pretrained import note_record
from surgery.files.structure import give_structure, tie
from surgery.kinds.layers.carried import copy_module
from surgery.sites import Record
from surgery.system.importing import import_function
from surgery.text import first_line

__all__ = ["FACTORY", "cause", "with_weights"]

FACTORY = "pass --model package.module:factory (in Python model=...), a function that makes the module"
_NAMED = {"what": "has a model factory", "allowed": "package.module:factory, of a function or class"}
_SAMPLE_KEYS = 3


def _make(model: str | Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    try:
        made = (import_function(model, **_NAMED) if isinstance(model, str) else model)()
    except SurgeryError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"has a model factory {model!r} that failed: {cause(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"has a model factory {model!r} that returned a {type(made).__name__}", allowed="nn.Module")
    return made


def _sample(keys: list[str]) -> str:
    rest = f" and {len(keys) - _SAMPLE_KEYS} more" if len(keys) > _SAMPLE_KEYS else ""
    return ", ".join(keys[:_SAMPLE_KEYS]) + rest


def with_weights(
    model: str | Callable[[], nn.Module] | nn.Module | None, tensors: Mapping[str, Any], record: Record | None = None
) -> nn.Module:
    """Return the module that ``model`` is or makes, with these weights and factored layers, in evaluation mode.

    Raises:
        InputError: there is no model, or it cannot be made.
        FileError: the weights do not fit it.
    """
    if model is None:
        raise InputError("is a state dict: weights without a model", next_step=FACTORY)
    made = _make(model)
    if record is None or not record.sites:
        return _filled(made, tensors, record)
    given = isinstance(model, nn.Module)
    # A copy is checked first, so that a failure leaves ``made`` as it is.
    _filled(give_structure(copy_module(made), record.origins), tensors, record, fill=False)
    module = give_structure(made, record.origins)
    if given and module is not made:
        raise InputError(f"holds a model that consists of one {type(made).__name__}", next_step="give a factory")
    return _filled(module, tensors, record)


def _filled(module: nn.Module, tensors: Mapping[str, Any], record: Record | None, *, fill: bool = True) -> nn.Module:
    own = module.state_dict()
    faults = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": [
            f"{key} {_shape(tensors[key])} for {_shape(own[key])}"
            for key in own
            if key in tensors and _shape(tensors[key]) != _shape(own[key])
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {_sample(keys)}" for what, keys in faults.items() if keys)
        raise FileError(
            f"does not fit {type(module).__name__}: {listed}", next_step="pass the factory it was made with"
        )
    if fill:
        module.load_state_dict(dict(tensors), strict=True)
        tie(module, () if record is None else record.ties)
        note_record(module)
    return module.eval() if fill else module


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def cause(error: BaseException) -> str:
    """Return one line that says what the first error in the chain of causes was."""
    while error.__cause__ is not None:
        error = error.__cause__
    kind, said = type(error).__name__, first_line(error)[:160]
    return kind if said == kind else f"{kind}: {said}"
