"""Training that decomposes the model partway through and recomposes it at the end."""

from __future__ import annotations

from surgery.training.admm import ADMM
from surgery.training.forecast import Forecast, make_forecast
from surgery.training.history import EpochRow, Event, History
from surgery.training.low_rank import LowRankTraining

__all__ = ["ADMM", "EpochRow", "Event", "Forecast", "History", "LowRankTraining", "make_forecast"]
