"""The kind of torch.export's programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from surgery.kinds.base import Access, Kind
from surgery.kinds.inputs import Declared, Inputs, Signature
from surgery.kinds.program.inputs import declared_inputs, fixed_batch, program_inputs, read_signature
from surgery.kinds.program.write import OpenProgram

__all__ = ["ProgramKind"]


class ProgramKind(Kind):
    """ExportedPrograms: their ATen nodes are rewritten in a new program."""

    name = "program"
    models = ExportedProgram
    label = "torch.export.ExportedProgram"

    def open(self, model: ExportedProgram, inputs: Inputs, access: Access) -> OpenProgram:
        """Open a program; the program itself is never changed."""
        return OpenProgram(model, *inputs)

    def runnable(self, model: ExportedProgram) -> nn.Module:
        """Return the module of a program."""
        return model.module()

    def program(self, model: ExportedProgram) -> ExportedProgram | None:
        """Return the program itself."""
        return model

    def tensors(self, model: ExportedProgram) -> Mapping[str, Any]:
        """Return the state of a program."""
        return model.state_dict

    def brought_inputs(self, model: ExportedProgram, *, seed: int = 0) -> Inputs | None:
        """Return the example inputs of a program, or else random ones."""
        return program_inputs(model, seed=seed)

    def brings_inputs(self) -> bool:
        """Return True: a program has example inputs, or declares shapes for random ones."""
        return True

    def signature(self, model: ExportedProgram, example: Inputs) -> Signature:
        """Return how a program is called."""
        return read_signature(model)

    def declared_inputs(self, model: ExportedProgram, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what the program says about its inputs."""
        return declared_inputs(model, signature)

    def fixed_batch(self, model: ExportedProgram) -> int | None:
        """Return the only batch size that a program accepts, or None."""
        return fixed_batch(model)

    def refuse_inplace(self, model: ExportedProgram) -> str | None:
        """Refuse, since a changed program is always a new program."""
        return "an exported program cannot be changed in place"

    def refuse_structure(self) -> str | None:
        """Refuse, since the chains of a program are nodes and not layers."""
        return "a graph"
