"""What fits are made from and judged by: samples, of which some are held out, or inputs that are made up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.data.samples import Calibration
from surgery.data.standin import GLANCE, stand_in
from surgery.errors import InputError, Refusal
from surgery.kinds.registry import Model
from surgery.passes.held_out import HeldOut
from surgery.passes.original import Original
from surgery.passes.promised import Seen
from surgery.passes.site_data import SiteData, gather
from surgery.plans.planner import Progress

__all__ = ["PROMISED_SHARE", "Evidence", "glance", "read_evidence", "split_samples"]

PROMISED_SHARE = 0.25  # of the samples, to judge by where an error is promised: its confidence limit needs them
_SHARE, _ENOUGH = 0.125, 16  # share of the samples to judge by else, or as many samples, if that is more


def split_samples(samples: Calibration, share: float | None = None) -> tuple[Calibration, Calibration]:
    """Return samples to fit to, and others to judge by; both are all of them where they are too few for two parts.

    The more there are to fit to, the better is the fit. By default an eighth is to judge by, or as many more as make
    sixteen, but no more than a quarter.
    """
    few = min(PROMISED_SHARE, max(_SHARE, _ENOUGH / samples.count))
    try:
        return samples.split(few if share is None else share)
    except InputError:
        return samples, samples


@dataclass(frozen=True, eq=False)
class Evidence:
    """The model, samples to judge changed models by, and what other samples say of its sites.

    ``data`` is None where nothing is known of the sites. ``made_up`` says what the samples are if they are not the
    user's: nothing is fitted to these, since a fit would be near to the original on them alone. Where the samples were
    too few for two parts, those to judge by are ``fitted_to`` as well.
    """

    model: Model
    judging: Calibration
    data: SiteData | None
    made_up: str = ""
    fitted_to: bool = False

    @property
    def fit_to(self) -> SiteData | None:
        """What chains are fitted to, if they are."""
        return None if self.made_up else self.data

    @cached_property
    def held_out(self) -> HeldOut:
        """The original's outputs on the samples to judge by."""
        return HeldOut(self.model, self.judging)

    @property
    def what(self) -> str:
        """What the samples to judge by are, in words."""
        if self.made_up:
            return self.made_up
        count = self.held_out.count
        samples = f"{count} calibration sample{'' if count == 1 else 's'}"
        return f"{samples} that chains were fitted to, too few to hold any out" if self.fitted_to else samples

    def see(self, changed: Any) -> Seen:
        """Return how far the outputs of a changed model are from the original's."""
        return Seen(self.held_out.error(changed)[0], self.what)


def read_evidence(
    original: Original,
    samples: Calibration,
    sites: Collection[str],
    progress: Progress,
    *,
    share: float | None = None,
    made_up: str = "",
) -> Evidence:
    """Return the evidence of samples for some sites; ``share`` of them is to judge by."""
    fit, judging = split_samples(samples, share)
    data = gather(original, fit, sites, progress)
    return Evidence(original.model, judging, data, made_up, fitted_to=judging is fit)


def glance(original: Original, progress: Progress) -> Evidence | None:
    """Return what little made-up inputs can show of a changed model; None where none can be made."""
    made = stand_in(original.model, original.inputs, original.found, effort=GLANCE, progress=progress)
    if isinstance(made, Refusal):
        return None
    evidence = Evidence(original.model, made.samples, None, made.what)
    try:
        _ = evidence.held_out
    except InputError:  # no output of numbers
        return None
    return evidence
