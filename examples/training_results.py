"""Results of `train_faster.py`: a JSON file of all runs, a table of means, and a plot of accuracy against seconds."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from surgery.system.machine import cpu_name
from surgery.system.tables import table

__all__ = ["ORDER", "Result", "Task", "plot", "read_results", "summary", "write_results"]

ORDER = ("dense", "surgery", "compressed", "paper", "pufferfish")


@dataclass(frozen=True)
class Task:
    """The settings that all ways to train share."""

    network: str
    data: str
    images: int
    epochs: int
    width: int
    rate: float


@dataclass(frozen=True)
class Result:
    """One run: seconds after each epoch, test accuracy at the same times, and notes on its switch."""

    config: str
    seed: int
    task: Task
    epochs: int
    seconds: list[float]
    accuracy: list[float]
    notes: str = ""


def read_results(path: Path) -> list[Result]:
    """Return the runs of earlier calls."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())["runs"]
    return [Result(**{**row, "task": Task(**row["task"])}) for row in rows]


def write_results(path: Path, results: list[Result]) -> None:
    """Write all runs, with the versions and the machine that made them."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**versions, **machine, "runs": [asdict(result) for result in results]}, indent=1) + "\n"
    )


def summary(results: list[Result]) -> str:
    """Return the table of means over the seeds."""
    rows = [["way", "seeds", "epochs", "seconds", "times shorter", "accuracy", "points lost"]]
    means = {
        config: (
            statistics.fmean(r.seconds[-1] for r in results if r.config == config),
            statistics.fmean(r.accuracy[-1] for r in results if r.config == config),
        )
        for config in ORDER
        if any(r.config == config for r in results)
    }
    seconds, best = means.get("dense", next(iter(means.values())))
    for config, (time_taken, share) in means.items():
        runs = [r for r in results if r.config == config]
        epochs = ",".join(str(e) for e in sorted({r.epochs for r in runs}))
        numbers = [f"{time_taken:.1f}", f"{seconds / time_taken:.2f}", f"{100 * share:.2f} %"]
        rows.append([config, str(len(runs)), epochs, *numbers, f"{100 * (best - share):+.2f}"])
    return table(rows)


def plot(results: list[Result], path: Path) -> None:
    """Draw accuracy against seconds, with a line for each run and a colour for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="test accuracy")
    for at, config in enumerate(ORDER):
        for index, run in enumerate([r for r in results if r.config == config]):
            name = config if index == 0 else None
            axes.plot(run.seconds, run.accuracy, color=f"C{at}", alpha=0.7, label=name)
            axes.plot(run.seconds[-1], run.accuracy[-1], "o", color=f"C{at}")
    ends, highest = [r.accuracy[-1] for r in results], max(max(r.accuracy) for r in results)
    axes.set_ylim(max(0.0, min(ends) - 0.1), min(1.0, highest + 0.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
