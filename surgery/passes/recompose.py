"""recompose: find chains that are provably one operator, by dataflow, and put that operator back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from surgery.errors import only_own_errors
from surgery.files.load import GivenModel, model_of
from surgery.files.pretrained import note_record
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import check_inplace, open_model
from surgery.sites import Fusable, Fuse, Skip
from surgery.sites.fusable import fusable
from surgery.system.tables import table
from surgery.text import change, count, shown

__all__ = ["Fusion", "RecomposeResult", "recompose"]

_Result = TypeVar("_Result", covariant=True)


@dataclass(frozen=True)
class Fusion:
    """One chain of operators that became one operator; parameters before and after.

    ``note`` says what the user should know of it, as that parameters give a computed weight only nearly.
    """

    site: str
    operator: str
    parts: tuple[str, ...]
    parameters_before: int
    parameters: int
    note: str = ""


@dataclass(frozen=True, repr=False)
class RecomposeResult(Generic[_Result]):
    """The new model, each fused chain, and each chain that is not provably one operator, with its reason."""

    model: _Result
    changes: tuple[Fusion, ...]
    skips: tuple[Skip, ...]

    def __repr__(self) -> str:
        """Say in a few lines what was fused and what was not."""
        rows = [["site", "operator", "parts", "parameters", "change"]]
        for c in self.changes:
            rows.append(
                [c.site, c.operator, str(len(c.parts)), count(c.parameters), change(c.parameters_before, c.parameters)]
            )
        head = f"RecomposeResult: {len(self.changes)} chains fused, {len(self.skips)} refused"
        notes = [f"note: {c.site}: {c.note}" for c in self.changes if c.note]
        refused = [f"refused: {skip.name}: {skip.reason}" for skip in self.skips]
        return "\n".join([head, *([table(rows)] if self.changes else []), *map(shown, [*notes, *refused])])


@only_own_errors
def recompose(
    model: GivenModel | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    everything: bool = False,
    inplace: bool = False,
) -> RecomposeResult[GivenModel]:
    """Fuse every maximal chain that is provably one linear operator; exact up to the rounding of the dtype.

    Chains are found by dataflow (single-use values, no nonlinearity between), so that chains made by others fuse too.
    The original parameter names come back: from the record in a saved file, or from the names that decompose gives.
    A model that ``decompose`` has made comes back to its original architecture: chains that it had before are left
    alone, and listed.

    Args:
        model: an nn.Module, a GraphModule, an ExportedProgram, an onnx_ir.Model or an onnx.ModelProto, and the result
            is of the same kind; or the path of a file, as ``decompose`` takes it.
        example_inputs: needed only for an nn.Module that torch.fx cannot trace.
        everything: fuse also the chains that the original of a decomposed model had.
        inplace: change the given model itself (not possible for an exported program).

    Raises:
        InputError: arguments that cannot be used.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    model = model_of(model)
    if inplace:
        check_inplace(model)
    graph = open_model(
        model, normalise_inputs(example_inputs), copies=not inplace, inplace=inplace, known=not everything
    )
    chains, skips = fusable(graph.flow, everything=everything)
    for chain in chains:
        graph.apply(Fuse(chain))
    back = graph.finish()
    note_record(back)
    return RecomposeResult(back, tuple(_fusion(chain, graph.notes) for chain in chains), tuple(skips))


def _fusion(chain: Fusable, notes: Mapping[str, str]) -> Fusion:
    return Fusion(
        site=chain.sites[0],
        operator=chain.operators[0].description,
        parts=chain.weights,
        parameters_before=chain.parameters,
        parameters=chain.operators[0].parameters,
        note=notes.get(chain.sites[0], ""),
    )
