"""Model surgery: decompose, recompose and time exported neural networks.

Exact where the algebra is exact, measured where it is not. Names are imported when they are first used, so that
``import surgery`` and ``surgery --help`` are instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.pretrained import watch_imports

if TYPE_CHECKING:
    from surgery.benchmark import bench as bench
    from surgery.chain import Chain as Chain
    from surgery.comparison import compare as compare
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.export import export_onnx as export_onnx
    from surgery.factorizations import FACTORIZATIONS as FACTORIZATIONS
    from surgery.fresh import time_apart as time_apart
    from surgery.fresh import time_batches as time_batches
    from surgery.loading import load as load
    from surgery.operators import Conv as Conv
    from surgery.operators import Embedding as Embedding
    from surgery.operators import Linear as Linear
    from surgery.passes.apply import apply as apply
    from surgery.passes.bisect import bisect as bisect
    from surgery.passes.decompose import decompose as decompose
    from surgery.passes.decompose import find_sites as find_sites
    from surgery.passes.decompose import plan as plan
    from surgery.passes.recompose import recompose as recompose
    from surgery.plans import Plan as Plan
    from surgery.pretrained import from_pretrained as from_pretrained
    from surgery.saving import save as save
    from surgery.training import ADMM as ADMM
    from surgery.training import LowRankTraining as LowRankTraining

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "ADMM": "surgery.training",
    "Chain": "surgery.chain",
    "Conv": "surgery.operators",
    "Embedding": "surgery.operators",
    "FACTORIZATIONS": "surgery.factorizations",
    "Linear": "surgery.operators",
    "LowRankTraining": "surgery.training",
    "Plan": "surgery.plans",
    "SurgeryError": "surgery.errors",
    "apply": "surgery.passes.apply",
    "bench": "surgery.benchmark",
    "bisect": "surgery.passes.bisect",
    "compare": "surgery.comparison",
    "decompose": "surgery.passes.decompose",
    "export_onnx": "surgery.export",
    "find_sites": "surgery.passes.decompose",
    "from_pretrained": "surgery.pretrained",
    "load": "surgery.loading",
    "plan": "surgery.passes.decompose",
    "recompose": "surgery.passes.recompose",
    "save": "surgery.saving",
    "time_apart": "surgery.fresh",
    "time_batches": "surgery.fresh",
}

__all__ = [*sorted(_HOMES), "__version__"]

watch_imports()  # so that transformers can load what was factored


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
