"""Rank selection: rules, EVBMF, budgets for a whole model, and the plans that they make."""

from __future__ import annotations

from surgery.ranks.auto import AUTO_ENERGY, Auto, Comparison, Latencies
from surgery.ranks.budget import Keep
from surgery.ranks.named import PerSite
from surgery.ranks.planning import Progress, complete_plan, make_plan
from surgery.ranks.quality import Energy, Fixed, Full, RankRule, Vbmf
from surgery.ranks.rules import RankSpec, parse_ranks
from surgery.ranks.vbmf import Evbmf, evbmf, evbmf_rank

__all__ = [
    "AUTO_ENERGY",
    "Auto",
    "Comparison",
    "Energy",
    "Evbmf",
    "Fixed",
    "Full",
    "Keep",
    "Latencies",
    "PerSite",
    "Progress",
    "RankRule",
    "RankSpec",
    "Vbmf",
    "complete_plan",
    "evbmf",
    "evbmf_rank",
    "make_plan",
    "parse_ranks",
]
