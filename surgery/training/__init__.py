"""Training that decomposes the model partway through and recomposes it at the end."""

from __future__ import annotations

from surgery.training.admm import ADMM
from surgery.training.history import EpochRow, Event, History
from surgery.training.low_rank import LowRankTraining
from surgery.training.propose import Forecast, make_forecast

__all__ = ["ADMM", "EpochRow", "Event", "Forecast", "History", "LowRankTraining", "make_forecast"]
