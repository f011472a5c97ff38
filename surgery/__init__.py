"""Model surgery: decompose, recompose and time exported neural networks.

Exact where the algebra is exact, measured where it is not. Names are imported when they are first used, so that
``import surgery`` and ``surgery --help`` are instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.files.pretrained import watch_imports

if TYPE_CHECKING:
    from surgery.algebra.chain import Chain as Chain
    from surgery.algebra.operators import Conv as Conv
    from surgery.algebra.operators import Embedding as Embedding
    from surgery.algebra.operators import Linear as Linear
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.factorizations import FACTORIZATIONS as FACTORIZATIONS
    from surgery.files.load import load as load
    from surgery.files.pretrained import from_pretrained as from_pretrained
    from surgery.files.save import save as save
    from surgery.passes.apply import apply as apply
    from surgery.passes.bisect import bisect as bisect
    from surgery.passes.decompose import decompose as decompose
    from surgery.passes.decompose import find_sites as find_sites
    from surgery.passes.decompose import plan as plan
    from surgery.passes.recompose import recompose as recompose
    from surgery.plans.plan import Plan as Plan
    from surgery.runtime.bench import bench as bench
    from surgery.runtime.compare import compare as compare
    from surgery.runtime.export import export_onnx as export_onnx
    from surgery.runtime.fresh import time_apart as time_apart
    from surgery.runtime.fresh import time_batches as time_batches
    from surgery.training import ADMM as ADMM
    from surgery.training import LowRankTraining as LowRankTraining

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "ADMM": "surgery.training",
    "Chain": "surgery.algebra.chain",
    "Conv": "surgery.algebra.operators",
    "Embedding": "surgery.algebra.operators",
    "FACTORIZATIONS": "surgery.factorizations",
    "Linear": "surgery.algebra.operators",
    "LowRankTraining": "surgery.training",
    "Plan": "surgery.plans.plan",
    "SurgeryError": "surgery.errors",
    "apply": "surgery.passes.apply",
    "bench": "surgery.runtime.bench",
    "bisect": "surgery.passes.bisect",
    "compare": "surgery.runtime.compare",
    "decompose": "surgery.passes.decompose",
    "export_onnx": "surgery.runtime.export",
    "find_sites": "surgery.passes.decompose",
    "from_pretrained": "surgery.files.pretrained",
    "load": "surgery.files.load",
    "plan": "surgery.passes.decompose",
    "recompose": "surgery.passes.recompose",
    "save": "surgery.files.save",
    "time_apart": "surgery.runtime.fresh",
    "time_batches": "surgery.runtime.fresh",
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
