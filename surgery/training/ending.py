"""Warnings of a run that would leave its model in factors though it was to be recomposed."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

__all__ = ["NO_END", "Ending", "warn_of_no_end"]

NO_END = "LowRankTraining cannot know when to recompose: give epochs=, or call finish() when the training has ended"
_LEFT = "a LowRankTraining has ended while its model is factored: call finish(), which recomposes it"


@dataclass(eq=False)
class Ending:
    """What a run leaves undone, kept apart from it: ``undone`` says whether its model is still to be recomposed."""

    undone: bool = False

    def watch(self, run: object) -> None:
        """Warn when the run is collected, or the interpreter ends, while something is undone."""
        weakref.finalize(run, self._tell)

    def _tell(self) -> None:
        if self.undone:
            self.undone = False
            warnings.warn(_LEFT, UserWarning, stacklevel=2)


def warn_of_no_end(recompose_at: int | str | None, epochs: int | None) -> None:
    """Warn if nothing but ``finish()`` can recompose the model of a run."""
    if recompose_at == "end" and epochs is None:
        warnings.warn(NO_END, UserWarning, stacklevel=3)
