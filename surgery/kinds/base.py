"""The interface of a kind of models: how a model is called and run, and what can be done with it once it is open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from surgery.kinds.inputs import Declared, Inputs, Signature
    from surgery.kinds.observed import Observed
    from surgery.sites.edit import Edit
    from surgery.sites.flow import Flow
    from surgery.sites.placement import Placement

__all__ = ["Access", "Kind", "OpenModel"]


@dataclass(frozen=True)
class Access:
    """What may be done with a model that is opened.

    ``copies`` says that a copy is changed, and ``inplace`` that the model itself is; with neither, nothing is changed.
    With ``known`` only the chains that decompose has made are wanted, if there are any: nothing is captured for them.
    """

    copies: bool = True
    inplace: bool = False
    known: bool = False


class Kind(ABC):
    """A kind of models: how one is opened, called and run. There is one row for each in ``registry.KINDS``."""

    name: ClassVar[str]
    models: ClassVar[type]  # whose instances it opens

    @abstractmethod
    def open(self, model: Any, inputs: Inputs, access: Access) -> OpenModel:
        """Open a model; ``inputs`` are example inputs, empty ones for none.

        Raises:
            InputError: the model does not run on the example inputs, or needs some.
            CaptureError: its graph cannot be captured.
        """

    def runnable(self, model: Any) -> nn.Module:
        """Return the module that runs a model."""
        found: nn.Module = model
        return found

    def program(self, model: Any) -> ExportedProgram | None:
        """Return the exported program that a model is, or None if it would have to be exported."""
        return None

    def tensors(self, model: Any) -> Mapping[str, Any]:
        """Return the parameters and buffers of a model by name."""
        return self.runnable(model).state_dict()

    def brought_inputs(self, model: Any, *, seed: int = 0) -> Inputs | None:
        """Return example inputs that a model brings along, or random ones of its shapes; None where it knows none."""
        return None

    def brings_inputs(self) -> bool:
        """Whether models of this kind always know inputs that they can be run on."""
        return False

    @abstractmethod
    def signature(self, model: Any, example: Inputs) -> Signature:
        """Return how a model is called."""

    @abstractmethod
    def declared_inputs(self, model: Any, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what is known of the inputs that are tensors, by name."""

    def fixed_batch(self, model: Any) -> int | None:
        """Return the only batch size that a model takes, or None if it takes any."""
        return None

    def refuse_inplace(self, model: Any) -> str | None:
        """Return why a model cannot be changed in place, or None."""
        return None

    def refuse_structure(self) -> str | None:
        """Return why a model cannot be given the structure of factored layers without numbers, or None."""
        return None

    def says_what_runs(self) -> bool:
        """Whether a model says itself which of its operators run; else a run has to show it."""
        return True


class OpenModel(ABC):
    """A model that was opened, to be read and changed.

    It owns what it changes: a copy of the model, unless the caller asks for in-place work. ``finish`` gives it back.
    """

    @abstractmethod
    def observe(self) -> Observed:
        """Return the open model to be run and watched."""

    @property
    @abstractmethod
    def flow(self) -> Flow:
        """The model as it was when it was opened, or last reopened."""

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Carry an edit out, at all calls that it concerns."""

    @abstractmethod
    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers where chains stand, and return their sites by name."""

    @abstractmethod
    def finish(self) -> Any:
        """Check the changed model and return it."""

    def verify(self) -> dict[str, str]:
        """See that all chains that were put in run; give those that do not up, and return why, by site."""
        return {}

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know of sites that were put back, by name."""
        return {}
