"""Warnings about a run that would leave its model factored although the user asked to recompose it."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

__all__ = ["NO_END", "Ending", "warn_of_no_end"]

NO_END = "LowRankTraining cannot know when to recompose: give epochs=, or call finish() when the training has ended"
_LEFT = "a LowRankTraining ended while its model was factored: call finish(), which recomposes the model"


@dataclass(eq=False)
class Ending:
    """Whether a run still has to recompose its model (``undone``); a separate object, so that it outlives the run."""

    undone: bool = False

    def watch(self, run: object) -> None:
        """Warn if the run is garbage-collected, or the interpreter ends, before the model is recomposed."""
        weakref.finalize(run, self._tell)

    def _tell(self) -> None:
        if self.undone:
            self.undone = False
            warnings.warn(_LEFT, UserWarning, stacklevel=2)


def warn_of_no_end(recompose_at: int | str | None, epochs: int | None) -> None:
    """Warn if only ``finish()`` can recompose the model of a run."""
    if recompose_at == "end" and epochs is None:
        warnings.warn(NO_END, UserWarning, stacklevel=3)
