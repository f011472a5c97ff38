"""Calibration: what data say about a model's operators, and factors that are made for these data."""

from __future__ import annotations

from surgery.calibration.batch_norm import feeds_batch_norm, reestimate_batch_norm
from surgery.calibration.collect import collect
from surgery.calibration.factor import correct_bias, fit, output_error
from surgery.calibration.inputs import Calibration, read_calibration
from surgery.calibration.moments import Moments
from surgery.calibration.sensitivity import with_sensitivity

__all__ = [
    "Calibration",
    "Moments",
    "collect",
    "correct_bias",
    "feeds_batch_norm",
    "fit",
    "output_error",
    "read_calibration",
    "reestimate_batch_norm",
    "with_sensitivity",
]
