"""The same fits to data on a program and on the ONNX file that it becomes: an ONNX file must lose no more.

    python tools/bench_onnx_module.py [--network cifar --data FOLDER] [--json FILE]

Both are decomposed to the same shares of their multiply-accumulates, with the same calibration samples. The table has
the metric on all other samples, and the loss of the file over that of the program. torch's exporter folds batch norms
into convolutions, so that both start from other weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.kinds.registry import kind_of
from surgery.runtime.bench import environment
from surgery.system.tables import table
from tools.trained import Network, Unavailable, open_network, option_parser, split

SHARES = (0.8, 0.65, 0.5)
SAMPLES = 256  # of calibration


def _score(network: Network, model: Any) -> float:
    """Return the metric of an ONNX model, whose outputs are a tuple."""
    module = kind_of(model).runnable(model)

    def run(*inputs: Tensor) -> Tensor:
        found: Tensor = module(*inputs)[0]
        return found

    found = [network.judge(run(*part.inputs.values()), part.inputs, part.expected) for part in network.parts()]
    return float(sum(float(each.sum()) for each in found) / len(network))


def measure(network: Network, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each share."""
    fitted, test = split(network, SAMPLES, seed=0)
    surgery.export_onnx(network.program, folder / "model.onnx")
    file: Any = surgery.load(folder / "model.onnx")
    original = test.score(network.program)
    rows = []
    for share in SHARES:
        asked: dict[str, Any] = {"ranks": f"keep_macs={share}", "calibration": fitted.inputs}
        program = test.score(network.decompose(**asked).model)
        onnx = _score(test, surgery.decompose(file, **asked).model)
        row = {"network": network.name, "share": share, "original": original, "program": program, "onnx": onnx}
        print(f"{network.name} at {share}: {program:.4f} as a program, {onnx:.4f} as a file", file=sys.stderr)
        rows.append(row)
    return rows


def main() -> None:
    """Measure the networks that were asked for, and print the table."""
    options = option_parser(__doc__.splitlines()[0]).parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own code
        for name in options.network or ["fashion"]:
            try:
                rows += measure(open_network(name, options), Path(folder))
            except Unavailable as missing:
                print(f"left out: {missing}")
    head = ["network", "MACs", "original", "program", "ONNX file", "loss of the file / of the program"]
    lines = [head]
    for row in rows:
        losses = [row["original"] - row[key] for key in ("onnx", "program")]
        ratio = f"{losses[0] / losses[1]:.2f}" if losses[1] > 0 else "-"
        scores = [f"{row[key]:.4f}" for key in ("original", "program", "onnx")]
        lines.append([row["network"], f"{row['share']:.0%}", *scores, ratio])
    where = environment(None)
    print(table(lines))
    print(where)
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": asdict(where), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
