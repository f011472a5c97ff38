"""Model surgery: decompose, recompose and time exported neural networks.

Exact where the algebra is exact, measured where it is not. Names are imported when they are first used, so that
``import surgery`` and ``surgery --help`` are instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.files.pretrained import watch_imports

if TYPE_CHECKING:  # the table below, for type checkers; a test compares the two
    from surgery.algebra.chain import Chain as Chain
    from surgery.algebra.operators import Conv as Conv
    from surgery.algebra.operators import Embedding as Embedding
    from surgery.algebra.operators import Geometry as Geometry
    from surgery.algebra.operators import Linear as Linear
    from surgery.algebra.operators import Operator as Operator
    from surgery.cost.base import Backend as Backend
    from surgery.cost.base import Comparison as Comparison
    from surgery.cost.base import ModelFile as ModelFile
    from surgery.cost.base import ModelTimes as ModelTimes
    from surgery.cost.base import NodeTimes as NodeTimes
    from surgery.cost.base import Seconds as Seconds
    from surgery.cost.base import make_backend as make_backend
    from surgery.cost.onnxruntime.backend import OnnxRuntime as OnnxRuntime
    from surgery.cost.timing import Budget as Budget
    from surgery.cost.timing import Samples as Samples
    from surgery.cost.timing import Speedup as Speedup
    from surgery.errors import CaptureError as CaptureError
    from surgery.errors import CheckError as CheckError
    from surgery.errors import FileError as FileError
    from surgery.errors import InputError as InputError
    from surgery.errors import RankError as RankError
    from surgery.errors import Refusal as Refusal
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.errors import UnsafeFileError as UnsafeFileError
    from surgery.factorizations import FACTORIZATIONS as FACTORIZATIONS
    from surgery.files.load import load as load
    from surgery.files.pretrained import from_pretrained as from_pretrained
    from surgery.files.save import save as save
    from surgery.passes.bisect import Bisection as Bisection
    from surgery.passes.bisect import Blame as Blame
    from surgery.passes.bisect import bisect as bisect
    from surgery.passes.decompose import decompose as decompose
    from surgery.passes.preview import apply as apply
    from surgery.passes.preview import find_sites as find_sites
    from surgery.passes.preview import plan as plan
    from surgery.passes.preview import preview as preview
    from surgery.passes.recompose import Fusion as Fusion
    from surgery.passes.recompose import RecomposeResult as RecomposeResult
    from surgery.passes.recompose import recompose as recompose
    from surgery.passes.results import Change as Change
    from surgery.passes.results import DecomposeResult as DecomposeResult
    from surgery.passes.results import Promise as Promise
    from surgery.passes.results import Search as Search
    from surgery.passes.results import Seen as Seen
    from surgery.plans.choose import Trial as Trial
    from surgery.plans.goal import Goal as Goal
    from surgery.plans.plan import Decision as Decision
    from surgery.plans.plan import Plan as Plan
    from surgery.runtime.bench import Environment as Environment
    from surgery.runtime.bench import ModelComparison as ModelComparison
    from surgery.runtime.bench import ModelTiming as ModelTiming
    from surgery.runtime.bench import Timing as Timing
    from surgery.runtime.bench import bench as bench
    from surgery.runtime.compare import Difference as Difference
    from surgery.runtime.compare import OutputDifference as OutputDifference
    from surgery.runtime.compare import compare as compare
    from surgery.runtime.export import ExportReport as ExportReport
    from surgery.runtime.export import export_onnx as export_onnx
    from surgery.runtime.fresh import time_apart as time_apart
    from surgery.runtime.fresh import time_batches as time_batches
    from surgery.sites.site import Site as Site
    from surgery.sites.site import Skip as Skip
    from surgery.sites.site import Totals as Totals
    from surgery.stages.bench import PipelineTiming as PipelineTiming
    from surgery.stages.report import Crossing as Crossing
    from surgery.stages.report import SplitReport as SplitReport
    from surgery.stages.report import StageReport as StageReport
    from surgery.stages.report import StripLayer as StripLayer
    from surgery.stages.split import Split as Split
    from surgery.stages.split import join as join
    from surgery.stages.split import load_split as load_split
    from surgery.stages.split import split as split
    from surgery.training import ADMM as ADMM
    from surgery.training import EpochRow as EpochRow
    from surgery.training import Event as Event
    from surgery.training import Forecast as Forecast
    from surgery.training import History as History
    from surgery.training import LowRankTraining as LowRankTraining

__version__ = "0.1.0"

# module -> the public names that come from it
_PUBLIC: dict[str, tuple[str, ...]] = {
    "surgery.algebra.chain": ("Chain",),
    "surgery.algebra.operators": ("Conv", "Embedding", "Geometry", "Linear", "Operator"),
    "surgery.cost.base": ("Backend", "Comparison", "ModelFile", "ModelTimes", "NodeTimes", "Seconds", "make_backend"),
    "surgery.cost.onnxruntime.backend": ("OnnxRuntime",),
    "surgery.cost.timing": ("Budget", "Samples", "Speedup"),
    "surgery.errors": (
        "CaptureError",
        "CheckError",
        "FileError",
        "InputError",
        "RankError",
        "Refusal",
        "SurgeryError",
        "UnsafeFileError",
    ),
    "surgery.factorizations": ("FACTORIZATIONS",),
    "surgery.files.load": ("load",),
    "surgery.files.pretrained": ("from_pretrained",),
    "surgery.files.save": ("save",),
    "surgery.passes.bisect": ("Bisection", "Blame", "bisect"),
    "surgery.passes.decompose": ("decompose",),
    "surgery.passes.preview": ("apply", "find_sites", "plan", "preview"),
    "surgery.passes.recompose": ("Fusion", "RecomposeResult", "recompose"),
    "surgery.passes.results": ("Change", "DecomposeResult", "Promise", "Search", "Seen"),
    "surgery.plans.choose": ("Trial",),
    "surgery.plans.goal": ("Goal",),
    "surgery.plans.plan": ("Decision", "Plan"),
    "surgery.runtime.bench": ("Environment", "ModelComparison", "ModelTiming", "Timing", "bench"),
    "surgery.runtime.compare": ("Difference", "OutputDifference", "compare"),
    "surgery.runtime.export": ("ExportReport", "export_onnx"),
    "surgery.runtime.fresh": ("time_apart", "time_batches"),
    "surgery.sites.site": ("Site", "Skip", "Totals"),
    "surgery.stages.bench": ("PipelineTiming",),
    "surgery.stages.report": ("Crossing", "SplitReport", "StageReport", "StripLayer"),
    "surgery.stages.split": ("Split", "join", "load_split", "split"),
    "surgery.training": ("ADMM", "EpochRow", "Event", "Forecast", "History", "LowRankTraining"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

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
