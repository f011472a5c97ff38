"""The report of a decomposition: what was done and why, as JSON values stored with the model, and as one HTML file.

collect(result) -> dict of JSON values -> attach to the model -> save, load -> read -> write as HTML
"""

from __future__ import annotations

from surgery.report.collect import attach, collect, read
from surgery.report.page import render, render_split, write

__all__ = ["attach", "collect", "read", "render", "render_split", "write"]
