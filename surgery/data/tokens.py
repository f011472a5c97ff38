"""Token ids as JSON lines: one sample a line, a list of ids, or an object of lists by input name.

    [101, 7592, 102]
    {"input_ids": [101, 7592, 2088, 102], "token_type_ids": [0, 0, 0, 0]}

Shorter sequences are padded with zeros at the end, to the longest sequence or to the only length that the model takes.
Sequences longer than the model takes are cut. If the model has a mask and a line lacks it, the mask is made: ones for
tokens and zeros for padding, or the reverse where the mask's name means that. Inputs that the model requires and a line
lacks are made too: position_ids are 0, 1, 2, ..., and other inputs of the shape of the ids are zeros.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.data.masks import hides_with_ones, is_mask_name
from surgery.errors import FileError
from surgery.kinds.inputs import Declared, Signature
from surgery.system.opening import open_regular, shown_name, shown_path
from surgery.text import cut, first_line

__all__ = ["is_label", "partner_of", "read_tokens"]

_LINE = "a list of token ids, or an object of lists by input name, on each line"
_LABELS = {"label", "labels", "target", "targets", "y"}
_DECODER = "decoder_"
_MOST = 2**63
_LONG = 60  # characters shown of a value in a message
_MOST_TEXT = 1 << 26  # characters read from a file; as numbers they take about ten times the memory
_MOST_NUMBERS = 1 << 26  # in all samples of an input, after padding


def is_label(name: str) -> bool:
    """Return whether a name in a file is a name of labels. No model needs labels to run."""
    return name in _LABELS or name.endswith(("_label", "_labels"))


def partner_of(name: str, ids: str) -> str:
    """Return the name of the ids input whose tokens the input ``name`` marks; ``ids`` is the model's main one.

    >>> partner_of("attention_mask", "input_ids"), partner_of("decoder_attention_mask", "input_ids")
    ('input_ids', 'decoder_input_ids')
    """
    side = next((side for side in (_DECODER, "encoder_") if name.startswith(side)), None)
    return ids if side is None else f"{side}input_ids"


@dataclass(frozen=True)
class _Line:
    """The sequences of one sample by input name; ``where`` is the file and line, for messages."""

    where: str
    values: Mapping[str, list[int]]


@dataclass(frozen=True)
class _LineForm:
    """What the lines of a file must fit: the model's inputs, of which ``ids`` holds the token ids."""

    path: Path
    ids: str
    signature: Signature
    declared: Mapping[str, Declared]


def read_tokens(
    path: Path, signature: Signature, declared: Mapping[str, Declared], *, limit: int | None
) -> dict[str, Tensor]:
    """Return the first ``limit`` samples of a file: int64 tensors (samples, length) by input name.

    Raises:
        FileError: the file or a line cannot be used, or sequences differ in length and the model has no mask.
    """
    form = _LineForm(path, _ids_name(signature, declared), signature, declared)
    known = declared.get(form.ids)
    if known is not None and (known.dtype.is_floating_point or len(known.sizes) != 2):
        kind = str(known.dtype).removeprefix("torch.")
        what = f"{shown_path(path)}: holds token ids, but {form.ids} is {kind} with {len(known.sizes)} axes"
        raise FileError(what, next_step="give an .npz file of arrays by input name")
    lines = list(islice(_lines(form), limit))
    if not lines:
        raise FileError(f"{shown_path(path)}: holds no sample", allowed=_LINE)
    made = {name: _column(form, name, lines) for name in _wanted(form, lines)}
    for name in {form.ids, f"{_DECODER}input_ids"} & set(made):
        _check_padding(form, name, lines, made)
    return made


def _ids_name(signature: Signature, declared: Mapping[str, Declared]) -> str:
    names = signature.names
    if "input_ids" in names or not names:
        return "input_ids"
    # Preferred in this order: whole numbers by declaration, names like ids or tokens, any other input, a mask.
    free = [name for name in names if not is_mask_name(name) and "type" not in name and "position" not in name]
    whole = [name for name in free if name in declared and not declared[name].dtype.is_floating_point]
    return next(iter([*whole, *(name for name in free if "ids" in name or "token" in name), *free, *names]))


def _lines(form: _LineForm) -> Iterator[_Line]:
    """Yield the lines that are not blank, parsed and checked one by one."""
    left = _MOST_TEXT
    with open_regular(form.path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for number in count(1):
            where = f"{shown_path(form.path)}, line {number}"
            try:
                # One character more than is left shows that the file is too long, before a line
                # without an end fills memory.
                text = lines.readline(left + 1)
            except (OSError, UnicodeDecodeError) as error:
                what = f"{shown_path(form.path)}: cannot be read: {first_line(error)}"
                raise FileError(what, allowed="UTF-8 text") from error
            left -= len(text)
            if left < 0:
                raise FileError(f"{where}: passes {_MOST_TEXT} characters", next_step="give fewer or shorter samples")
            if not text:
                return
            if text.strip():
                yield _line(form, where, text)


def _line(form: _LineForm, where: str, text: str) -> _Line:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: is not JSON: {first_line(error)}", allowed=_LINE) from error
    if isinstance(value, list):
        value = {form.ids: value}
    if not isinstance(value, dict):
        raise FileError(f"{where}: is {_kind(value)}", allowed=_LINE)
    names, required = form.signature.names, form.signature.required
    # Labels are skipped, unless the model cannot run without them.
    values = {name: found for name, found in value.items() if not is_label(name) or name in required}
    for name in values:
        if name not in names and not form.signature.open_ended:
            raise FileError(f"{where}: the model has no input {shown_name(name)}", allowed=", ".join(names))
    if form.ids not in values:
        raise FileError(f"{where}: has no {form.ids}", allowed=_LINE)
    line = _Line(where, {name: _sequence(form, where, name, found) for name, found in values.items()})
    for name, found in line.values.items():
        other = partner_of(name, form.ids)
        if other in line.values and len(found) != len(line.values[other]):
            what = f"{where}: {shown_name(name)} has {len(found)} values, {other} has {len(line.values[other])}"
            raise FileError(what, allowed="equal numbers")
    return line


def _sequence(form: _LineForm, where: str, name: str, value: Any) -> list[int]:
    """Return a checked list of whole numbers, 0 or more; a mask may hold true and false instead."""
    allowed = "a list of whole numbers, 0 or more"
    if not isinstance(value, list):
        raise FileError(f"{where}: {shown_name(name)} is {_kind(value)}", allowed=allowed)
    if not value:
        raise FileError(
            f"{where}: {shown_name(name)} is empty", allowed=f"{allowed}, at least one", next_step="leave the line out"
        )
    kinds = int | bool if is_mask_name(name) else int
    ids = form.declared[name].ids if name in form.declared else None
    for item in value:
        if not isinstance(item, kinds) or (isinstance(item, bool) and kinds is int):
            raise FileError(f"{where}: {shown_name(name)} holds {_kind(item)}", allowed=allowed)
        if not 0 <= item < _MOST:
            raise FileError(f"{where}: {shown_name(name)} holds {_kind(item)}", allowed=allowed)
        if ids is not None and item >= ids:
            allowed = f"0 to {ids - 1}, which the model knows"
            raise FileError(f"{where}: {shown_name(name)} holds {item}", allowed=allowed, next_step="use its tokenizer")
    return [int(item) for item in value]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list in a list"
    if isinstance(value, dict):
        return "an object"
    return f"the text {cut(json.dumps(value), _LONG)}" if isinstance(value, str) else cut(json.dumps(value), _LONG)


def _wanted(form: _LineForm, lines: list[_Line]) -> list[str]:
    """Return the names of the inputs that the lines give or that are made from them."""
    given = {name for line in lines for name in line.values}
    wanted = []
    for name in form.signature.names or given:
        if name in given or _is_made(form, name, lines):
            wanted.append(name)
        elif name in form.signature.required:
            if not _can_be_made(form, name):
                what = f"{shown_path(form.path)}: has no {shown_name(name)}, which the model needs"
                raise FileError(what, next_step=f'add "{name}" to each line, or give an .npz file')
            wanted.append(name)
    return [*wanted, *(given - set(wanted))]


def _is_made(form: _LineForm, name: str, lines: list[_Line]) -> bool:
    """Whether a mask (samples, length) is made: the model requires it, or there is padding to hide."""
    other = partner_of(name, form.ids)
    lengths = {len(line.values[other]) for line in lines if other in line.values}
    if not is_mask_name(name) or not lengths or (name in form.declared and len(form.declared[name].sizes) != 2):
        return False
    return name in form.signature.required or min(lengths) < _length(form, name, lines)


def _can_be_made(form: _LineForm, name: str) -> bool:
    """Whether an input that is not a mask has the shape of the ids in the model's example inputs."""
    ids, own = form.declared.get(form.ids), form.declared.get(name)
    alike = ids is not None and own is not None and ids.shape == own.shape and not own.dtype.is_floating_point
    return alike and not is_mask_name(name) and not name.startswith(_DECODER)


def _column(form: _LineForm, name: str, lines: list[_Line]) -> Tensor:
    """Return one input of all lines, (samples, length)."""
    other = partner_of(name, form.ids)
    length = _length(form, name, lines)
    if len(lines) * length > _MOST_NUMBERS:
        what = f"{shown_path(form.path)}: {shown_name(name)} would have {len(lines)} samples of {length} numbers"
        raise FileError(what, allowed=f"{_MOST_NUMBERS} numbers", next_step="give fewer or shorter samples")
    # Padding must be hidden: a mask that hides with ones is padded with ones, and everything else with zeros.
    pad = 1 if is_mask_name(name) and hides_with_ones(name) else 0
    # Example of 5 6 among lines of four: ids 5 6 0 0, a mask that is made 1 1 0 0, one that hides with ones 0 0 1 1.
    rows = []
    for line in lines:
        if name in line.values:
            row = line.values[name]
        elif is_mask_name(name) and other in line.values:
            row = [1 - pad] * len(line.values[other])
        elif name.endswith("position_ids"):
            row = list(range(length))
        elif name != other and _can_be_made(form, name):
            row = []
        else:
            raise FileError(
                f"{line.where}: has no {shown_name(name)}, which other lines have",
                allowed="the same inputs on each line",
            )
        rows.append([*row, *[pad] * (length - len(row))][:length])
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _length(form: _LineForm, name: str, lines: list[_Line]) -> int:
    """Return the only length that the model takes; else the longest sequence's, at most what the model takes."""
    other = partner_of(name, form.ids)
    found = [form.declared[at] for at in (name, other) if at in form.declared]
    for known in found:
        if len(known.sizes) == 2 and (size := known.sizes[1]) is not None:
            return size
    lengths = [len(line.values[at]) for line in lines for at in (other, name) if at in line.values]
    return min([max(lengths), *(known.longest for known in found if known.longest is not None)])


def _check_padding(form: _LineForm, name: str, lines: list[_Line], made: Mapping[str, Tensor]) -> None:
    """Raise FileError where sequences were padded or cut and the model has no mask: it would read padding as tokens."""
    if any(is_mask_name(other) and partner_of(other, form.ids) == name for other in made):
        return
    lengths = [len(line.values[name]) for line in lines if name in line.values]
    width = made[name].shape[1]
    if min(lengths) < width:
        what = f"{shown_path(form.path)}: {name} has {min(lengths)} to {max(lengths)} tokens a line"
        what += ", and the model has no mask"
        what += "" if max(lengths) == width else f", and takes {width}"
        other = f"join texts to {width} tokens"
        if form.signature.open_ended:
            other = 'add "attention_mask" to each line if it takes one'
        raise FileError(what, allowed="sequences of one length", next_step=f"cut all to one length, or {other}")
