"""What is needed to put the stages of a program together again, as JSON values; those of a file may say anything.

Signature and module calls have the form that torch.export writes into its files, and pass the same checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch._export.serde import schema
from torch.export import ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature

from surgery.errors import FileError, InputError
from surgery.files.guard.guards import check_guard
from surgery.files.guard.program import check_schema
from surgery.text import first_line

__all__ = ["Whole"]

_NEXT = "join the stages with the values that were written with them"


@dataclass(frozen=True, eq=False)
class Whole:
    """The order of a program's operations with their stages, and what no stage has.

    ``attributes`` are the nodes that read the graphs of regions, each with the number of the operation that it stands
    before. ``ties`` are groups of names in the state that are one tensor. ``kept`` are the JSON values of surgery.
    """

    signature: ExportGraphSignature
    calls: list[ModuleCallEntry]
    operations: list[tuple[str, int]]
    attributes: list[tuple[str, int]]
    state: list[str]
    constants: list[str]
    ties: list[list[str]]
    guards: list[str]
    kept: Any

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values.

        Raises:
            InputError: torch cannot write down what the program takes or returns, such as an object of a class that
                has no name for files.
        """
        from torch._export.serde import serialize  # with the compiler: half a second

        serializer = serialize.GraphModuleSerializer(self.signature, self.calls)
        try:
            signature = _plain(serializer.serialize_signature(self.signature))
            calls = _plain(serializer.serialize_module_call_graph(self.calls))
        except Exception as error:  # torch raises anything
            what = f"what the program takes or returns cannot be written to a file: {first_line(error)}"
            step = "register classes by torch.export.register_dataclass, with a serialized_type_name"
            raise InputError(what, next_step=step) from error
        return {
            "signature": signature,
            "calls": calls,
            "operations": [list(row) for row in self.operations],
            "attributes": [list(row) for row in self.attributes],
            **{name: getattr(self, name) for name in ("state", "constants", "ties", "guards", "kept")},
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Whole:
        """Return what JSON values say.

        Raises:
            InputError: they have another form, or could run code.
        """
        from torch._export.serde import serialize  # see above

        try:
            check_schema(schema.GraphSignature, said.get("signature"))
            check_schema(list[schema.ModuleCallEntry], said.get("calls"))
            signature = serialize._dict_to_dataclass(schema.GraphSignature, said["signature"])
            calls = [serialize._dict_to_dataclass(schema.ModuleCallEntry, call) for call in said["calls"]]
            reader = serialize.GraphModuleDeserializer()
            made = reader.deserialize_signature(signature), reader.deserialize_module_call_graph(calls)
        except FileError as error:
            raise InputError(
                f"the stages cannot be joined: {error.what}", allowed=error.allowed, next_step=_NEXT
            ) from None
        except Exception as error:
            raise InputError(f"the signature of the whole program cannot be read ({error})", next_step=_NEXT) from error
        if not made[1] or made[1][0].fqn or made[1][0].signature is None:
            raise InputError("the whole program does not say how it is called", next_step=_NEXT)
        names = (_names(said, "state"), _names(said, "constants"))
        rows = _rows(said, "operations"), _rows(said, "attributes")
        return cls(*made, *rows, *names, _ties(said), _guards(said), said.get("kept"))


def _plain(value: Any) -> Any:
    """Return the JSON values of a schema object; torch gives keys of a class of its own."""
    from torch._export.serde import serialize  # see above

    return json.loads(json.dumps(serialize._dataclass_to_dict(value)))


def _refuse(field: str, allowed: str) -> InputError:
    return InputError(f"the field {field!r} of the whole program", allowed=allowed, next_step=_NEXT)


def _names(said: Mapping[str, Any], field: str) -> list[str]:
    found = said.get(field)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found) or len(set(found)) != len(found):
        raise _refuse(field, "names, each once")
    return found


def _rows(said: Mapping[str, Any], field: str) -> list[tuple[str, int]]:
    found = said.get(field)
    pairs = isinstance(found, list) and all(isinstance(row, list) and len(row) == 2 for row in found)
    rows: list[tuple[Any, Any]] = [(row[0], row[1]) for row in found or ()] if pairs else [(None, None)]
    if not all(isinstance(name, str) and type(number) is int and number >= 0 for name, number in rows):
        raise _refuse(field, "pairs of a name and a number")
    if len({name for name, _ in rows}) != len(rows):
        raise _refuse(field, "each name once")
    return rows


def _ties(said: Mapping[str, Any]) -> list[list[str]]:
    found = said.get("ties")
    if not isinstance(found, list) or not all(isinstance(group, list) and group for group in found):
        raise _refuse("ties", "lists of names, none of them empty")
    state = set(_names(said, "state"))
    if not all(isinstance(name, str) and name in state for group in found for name in group):
        raise _refuse("ties", "names of the state")
    return found


def _guards(said: Mapping[str, Any]) -> list[str]:
    found = said.get("guards")
    if not isinstance(found, list) or not all(isinstance(guard, str) for guard in found):
        raise _refuse("guards", "comparisons as text")
    try:
        for guard in found:
            check_guard(guard)
    except FileError as error:
        raise InputError(
            f"a guard of the whole program: {error.what}", allowed=error.allowed, next_step=_NEXT
        ) from None
    return found
