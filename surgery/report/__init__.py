"""The report: what a decomposition did and why, as JSON values that travel with the model, and as one HTML file.

collect(result) -> dict of JSON values -> attach to the model -> save, load -> read -> write as HTML
"""

from __future__ import annotations

from surgery.report.collect import collect
from surgery.report.page import render, write
from surgery.report.record import attach, read

__all__ = ["attach", "collect", "read", "render", "write"]
