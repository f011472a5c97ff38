"""Compare plain with data-aware factors by accuracy without retraining, at equal ranks, on the shipped network.

    python tools/bench_calibration.py --json calibration.json
    python tools/bench_calibration.py --quick          # one method and one size

The images of the shipped sample are split: some calibrate, without their labels, and the others measure. A row has the
same ranks in all columns. `error` is the relative error of the logits to those of the original network. Seconds cover
calibration and factoring.

    plain        the factors nearest to the weights
    plain + BN   the same, with batch-norm statistics estimated anew
    data         the factors nearest in output, weighted by the gradients; batch norms correct the means
    data x 4     the same in four groups, each fitted on the inputs it receives after the earlier groups are factored
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.data.batch_norm import reestimate_batch_norm
from surgery.data.samples import Calibration, read_calibration
from surgery.errors import RankError
from surgery.passes.decompose import decompose
from surgery.passes.preview import plan
from surgery.plans.plan import Plan

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
METHODS = ("svd", "tucker", "spatial", "tt")
SHARES = (0.3, 0.2, 0.15, 0.1)


@dataclass(frozen=True)
class Row:
    """One way to factor at one set of ranks: accuracy and relative error of the logits on images never seen."""

    method: str
    keep_params: float
    way: str
    accuracy: float
    error: float
    seconds: float


@dataclass(frozen=True)
class Setting:
    """The network, its calibration images, and its logits of the test images."""

    program: ExportedProgram
    calibration: Calibration
    images: Tensor
    labels: Tensor

    def judge(self, program: ExportedProgram) -> tuple[float, float]:
        """Return accuracy, and the relative error of the logits."""
        logits, original = (run(model, self.images) for model in (program, self.program))
        right = (logits.argmax(1) == self.labels).double().mean()
        return float(right), float((logits - original).norm() / original.norm())


def run(program: ExportedProgram, images: Tensor) -> Tensor:
    """Return the logits."""
    module = program.module()
    with torch.no_grad():
        return torch.cat([module(batch) for batch in images.split(250)])


def load(samples: int, seed: int) -> Setting:
    """Load the shipped network, and split the sample of test images."""
    with np.load(DATA / "fashion_sample.npz") as sample:
        images = torch.from_numpy(sample["images"]).float().div(255).unsqueeze(1)
        labels = torch.from_numpy(sample["labels"]).long()
    program = surgery.load(DATA / "fashion_resnet.pt2")
    assert isinstance(program, ExportedProgram)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    calibration = read_calibration(images[order[:samples]], program)
    rest = order[samples:]
    return Setting(program, calibration, images[rest], labels[rest])


def ways(setting: Setting, chosen: Plan) -> dict[str, Callable[[], ExportedProgram]]:
    """Return what makes the factored network in each way."""

    def plain() -> ExportedProgram:
        return decompose(setting.program, ranks=chosen).model

    def plain_bn() -> ExportedProgram:
        model = plain()
        reestimate_batch_norm(model, setting.calibration)
        return model

    def data(groups: int) -> ExportedProgram:
        return decompose(setting.program, ranks=chosen, calibration=setting.calibration, groups=groups).model

    return {"plain": plain, "plain + BN": plain_bn, "data": lambda: data(1), "data x 4": lambda: data(4)}


def measure(setting: Setting, method: str, share: float) -> list[Row]:
    """Return the rows of one method at one size; none where the size cannot be met."""
    try:
        chosen = plan(setting.program, ranks=f"keep_params={share}", factorization=method)
    except RankError as error:
        print(f"{method} at {share}: {error}", file=sys.stderr)
        return []
    rows = []
    for way, make in ways(setting, chosen).items():
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        rows.append(Row(method, share, way, *setting.judge(model), seconds))
        print(f"{method} {share:g} {way}: {100 * rows[-1].accuracy:.2f} %", file=sys.stderr, flush=True)
    return rows


def show(rows: list[Row], original: float) -> None:
    """Print the table."""
    table = Table(title=f"accuracy without retraining (original {100 * original:.2f} %)")
    for column in ("method", "keep_params", "way", "accuracy %", "error", "seconds"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or (rows[i + 1].method, rows[i + 1].keep_params) != (row.method, row.keep_params)
        numbers = f"{100 * row.accuracy:.2f}", f"{row.error:.3f}", f"{row.seconds:.1f}"
        table.add_row(row.method, f"{row.keep_params:g}", row.way, *numbers, end_section=last)
    Console(width=110).print(table)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--quick", action="store_true", help="one method and one size")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    setting = load(options.samples, options.seed)
    original, _ = setting.judge(setting.program)
    grid = [("svd", 0.2)] if options.quick else [(method, share) for method in METHODS for share in SHARES]
    rows = [row for method, share in grid for row in measure(setting, method, share)]
    show(rows, original)
    if options.json:
        found = {"original": original, "samples": options.samples, "seed": options.seed}
        options.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
