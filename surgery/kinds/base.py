"""The interface of a kind of models: how a model is called, run and opened, and how an open model is changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from surgery.kinds.inputs import Declared, Inputs, Signature
    from surgery.kinds.observed import Observed
    from surgery.sites import Edit, Flow, Placement
    from surgery.sites.network import Network

__all__ = ["Access", "Cuttable", "Kind", "OpenModel", "Piece", "Pieces"]


@dataclass(frozen=True)
class Access:
    """What may be done with a model that is opened.

    With ``copies``, a copy is changed; with ``inplace``, the model itself is changed; with neither, nothing is changed.
    With ``known``, only the chains that decompose made are wanted, if there are any, so that the model need not be
    captured.
    """

    copies: bool = True
    inplace: bool = False
    known: bool = False


@dataclass(frozen=True, eq=False)
class Piece:
    """One stage of a model, a model itself, with the names of the values that it takes and gives, in order.

    A stage takes its inputs by position. The names are those of the whole model's values.
    """

    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Pieces:
    """A model taken apart: its stages in order, and the names of its own inputs and outputs, in order.

    Inputs and outputs are leaves: a tuple that is an input has one name for each of its tensors. ``whole`` has the JSON
    values that are needed to put the stages together again, and to call them as the model is called.
    """

    stages: tuple[Piece, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    whole: Mapping[str, Any]


class Kind(ABC):
    """A kind of models: how such a model is opened, called and run. Each kind has one row in ``registry.KINDS``."""

    name: ClassVar[str]
    models: ClassVar[type]  # the class of the models of this kind
    label: ClassVar[str]  # what messages call that class
    is_onnx: ClassVar[bool] = False  # whether the models are ONNX models already, so that none is exported

    @abstractmethod
    def open(self, model: Any, inputs: Inputs, access: Access) -> OpenModel:
        """Open a model; ``inputs`` are example inputs, ``((), {})`` if there are none.

        Raises:
            InputError: the model does not run on the example inputs, or it needs example inputs and has none.
            CaptureError: its graph cannot be captured.
        """

    def runnable(self, model: Any) -> nn.Module:
        """Return the module that runs a model."""
        found: nn.Module = model
        return found

    def program(self, model: Any) -> ExportedProgram | None:
        """Return the model if it is an exported program; None if it would have to be exported."""
        return None

    def as_onnx(self, model: Any) -> Any:
        """Return the model as an ``onnx_ir.Model``, if ``is_onnx``; None if it has to be exported."""
        return None

    def kept(self, model: Any) -> Any:
        """Return the JSON values of surgery that are kept with a model, in memory and in its file; None for none."""
        return None

    def keep(self, model: Any, values: Mapping[str, Any]) -> None:
        """Keep JSON values with a model, in place of those that it has.

        Raises:
            InputError: models of this kind have no place for them.
        """
        raise InputError(f"a {self.label} has no place for a report", next_step="export it with torch.export first")

    def tensors(self, model: Any) -> Mapping[str, Any]:
        """Return the parameters and buffers of a model by name."""
        return self.runnable(model).state_dict()

    def parts(self, model: Any) -> Mapping[str, Any]:
        """Return the weights of a model by name; of those that are taken apart while it is open, the parts."""
        return self.tensors(model)

    def exchanged(self, model: Any, parts: Mapping[str, Any]) -> Any:
        """Return a copy of a model with other numbers for some of its parts; None if its module can be changed."""
        return None

    def brought_inputs(self, model: Any, *, seed: int = 0) -> Inputs | None:
        """Return the model's own example inputs, or random ones of the shapes it declares; None if it has neither."""
        return None

    def brings_inputs(self) -> bool:
        """Whether ``brought_inputs`` always returns inputs for models of this kind."""
        return False

    @abstractmethod
    def signature(self, model: Any, example: Inputs) -> Signature:
        """Return how a model is called."""

    @abstractmethod
    def declared_inputs(self, model: Any, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return dtype, sizes and limits of the inputs that are tensors, by name."""

    def output_names(self, model: Any) -> tuple[str, ...] | None:
        """Return the names that a model gives to its outputs, in order; None if it gives them none."""
        return None

    def fixed_batch(self, model: Any) -> int | None:
        """Return the only batch size that a model accepts, or None if it accepts any."""
        return None

    def refuse_inplace(self, model: Any) -> str | None:
        """Return why a model cannot be changed in place, or None if it can."""
        return None

    def refuse_structure(self) -> str | None:
        """Return why models of this kind cannot get factored layers without numbers, as for a checkpoint, or None."""
        return None

    def says_what_runs(self) -> bool:
        """Whether the model itself tells which of its operators run; if not, a run has to show it."""
        return True

    def cuttable(self, model: Any, inputs: Inputs) -> Cuttable:
        """Open a model to be cut into stages; the model stays as it is. ``inputs`` are as in ``open``.

        Raises:
            InputError: the model does not run on the example inputs, or it needs example inputs and has none.
            CaptureError: its graph cannot be captured.
        """
        raise InputError(f"a {self.label} cannot be split", next_step="export it with torch.export first")

    def join(self, pieces: Pieces) -> Any:
        """Return the model that was taken apart: its graph, its names, and the numbers that its stages have now.

        Raises:
            InputError: the pieces do not fit each other.
        """
        raise InputError(f"a {self.label} cannot be joined", next_step="export it with torch.export first")

    def stages_of(self, pieces: Pieces) -> list[Any]:
        """Return the stages of a model of this kind.

        Raises:
            InputError: there are none, or one of them is of another kind.
        """
        found = [piece.model for piece in pieces.stages]
        if not found or not all(isinstance(model, self.models) for model in found):
            said = ", ".join(type(model).__name__ for model in found) or "none"
            raise InputError(f"the stages are {said}", allowed=self.label, next_step="join stages made together")
        return found

    def leaves(self, pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call of the whole model in the order of ``pieces.inputs``.

        Raises:
            InputError: they are not those that the model takes.
        """
        raise NotImplementedError

    def run_stage(self, model: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run a stage on its inputs, in order, and return its outputs, in order."""
        raise NotImplementedError

    def result(self, pieces: Pieces, leaves: Sequence[Any]) -> Any:
        """Return what the whole model returns, made of its outputs in the order of ``pieces.outputs``."""
        raise NotImplementedError


class Cuttable(ABC):
    """A model that is open to be cut into stages."""

    @property
    @abstractmethod
    def network(self) -> Network:
        """The operations of the model, in the order of its graph."""

    @abstractmethod
    def cut(self, stage_of: Sequence[int]) -> Pieces:
        """Return the stages, given the number of the stage of each operation; no value may go to an earlier stage.

        A stage has exactly the values as inputs and outputs that have to be sent. A tensor that is read in several
        stages is in each of them.
        """


class OpenModel(ABC):
    """A model that is open for reading and changing.

    It works on a copy of the model, unless the caller asks for in-place work. ``finish`` returns the changed model.
    """

    @abstractmethod
    def observe(self) -> Observed:
        """Return the open model in a form that can be run and watched."""

    @property
    @abstractmethod
    def flow(self) -> Flow:
        """The model as it is when this is read first after it was opened, or reopened. Read it before edits that fuse.

        Edits that replace need no flow: what was found in the same model, opened earlier, has the same numbers.
        """

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Carry out an edit at all calls that it concerns."""

    @abstractmethod
    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers in the place of chains, and return their new placements by site name."""

    @abstractmethod
    def finish(self) -> Any:
        """Check the changed model and return it."""

    def verify(self) -> dict[str, str]:
        """Check that all new chains run; undo those that do not, and return the reasons by site name."""
        return {}

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know about recomposed sites, by name."""
        return {}
