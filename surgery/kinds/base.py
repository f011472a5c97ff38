"""What a kind of models is: something that reads a flow from a model, and carries edits of it out.

A kind owns the model that it changes: a copy, unless the caller asks for in-place work. ``finish`` gives it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.export import ExportedProgram

from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.kinds.signature import Declared, Signature
from surgery.sites.edit import Edit
from surgery.sites.find import find
from surgery.sites.flow import Flow
from surgery.sites.fusable import fusable
from surgery.sites.placement import Found, Fusable, Placement
from surgery.sites.site import Skip

__all__ = ["Access", "Kind"]


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
    """An open model; one subclass for each kind of models."""

    name: ClassVar[str]
    models: ClassVar[type]  # whose instances it opens

    @classmethod
    @abstractmethod
    def open_model(cls, model: Any, inputs: Inputs, access: Access) -> Kind:
        """Open a model; ``inputs`` are example inputs, empty ones for none.

        Raises:
            InputError: the model does not run on the example inputs, or needs some.
            CaptureError: its graph cannot be captured.
        """

    @classmethod
    def runnable(cls, model: Any) -> nn.Module:
        """Return the module that runs a model."""
        found: nn.Module = model
        return found

    @classmethod
    def program(cls, model: Any) -> ExportedProgram | None:
        """Return the exported program that a model is, or None if it would have to be exported."""
        return None

    @classmethod
    def tensors(cls, model: Any) -> Mapping[str, Any]:
        """Return the parameters and buffers of a model by name."""
        return cls.runnable(model).state_dict()

    @classmethod
    def brought_inputs(cls, model: Any, *, seed: int = 0) -> Inputs | None:
        """Return example inputs that a model brings along, or random ones of its shapes; None where it knows none."""
        return None

    @classmethod
    def brings_inputs(cls) -> bool:
        """Whether models of this kind always know inputs that they can be run on."""
        return False

    @classmethod
    @abstractmethod
    def signature(cls, model: Any, example: Inputs) -> Signature:
        """Return how a model is called."""

    @classmethod
    @abstractmethod
    def declared_inputs(cls, model: Any, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what is known of the inputs that are tensors, by name."""

    @classmethod
    def fixed_batch(cls, model: Any) -> int | None:
        """Return the only batch size that a model takes, or None if it takes any."""
        return None

    @classmethod
    def refuse_inplace(cls, model: Any) -> str | None:
        """Return why a model cannot be changed in place, or None."""
        return None

    @classmethod
    def refuse_structure(cls) -> str | None:
        """Return why a model cannot be given the structure of factored layers without numbers, or None."""
        return None

    @classmethod
    def says_what_runs(cls) -> bool:
        """Whether a model says itself which of its operators run; else a run has to show it."""
        return True

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

    def find(self) -> Found:
        """Return all sites and skips, and the totals of the model; chains whose making is known are sites too."""
        return find(self.flow)

    def fusable(self, *, everything: bool = False) -> tuple[list[Fusable], list[Skip]]:
        """Return the chains that are provably one operator, and why others that look like it are not."""
        return fusable(self.flow, everything=everything)
