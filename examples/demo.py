"""The demo: the main commands of `surgery`, one after another, on the trained network in this repository.

    python examples/demo.py [--output FOLDER]

Each command is printed before it runs. The first decompose has no data, so it changes little and its promise holds for
made-up inputs only. The second has images to fit to; accuracy is measured on the other labelled images. At the end the
recomposed state dict is loaded into the original class.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in examples/ only

import surgery
from examples.fashion_resnet import build

HERE = Path(__file__).parent
MODEL = HERE / "data" / "fashion_resnet.pt2"
SAMPLE = HERE / "data" / "fashion_sample.npz"


def run(*words: str | Path) -> None:
    """Print a surgery command, run it, and stop if it fails."""
    print(f"\n$ surgery {shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "surgery", *map(str, words)], check=True)


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images to fit to, then other images and their labels."""
    with np.load(SAMPLE) as sample:
        images = torch.from_numpy(sample["images"]).float().div(255).unsqueeze(1)
        labels = torch.from_numpy(sample["labels"]).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:256]], images[order[256:]], labels[order[256:]]


def accuracy(model: torch.nn.Module) -> float:
    """Return the share of images that the model classifies correctly, among those that nothing is fitted to."""
    _, images, labels = split()
    with torch.no_grad():
        predictions = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((predictions == labels).double().mean())


def say_accuracy(name: str, model: torch.nn.Module) -> float:
    """Print and return the accuracy of a model."""
    share = accuracy(model)
    print(f"accuracy of {name} on images that nothing was fitted to: {100 * share:.2f} %")
    return share


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all written files")
    folder = parser.parse_args().output
    folder.mkdir(exist_ok=True)
    factored, recomposed = folder / "fashion.decomposed.pt2", folder / "fashion.recomposed.pt2"
    weights = folder / "fashion.recomposed.safetensors"
    careful, data = folder / "fashion.careful.pt2", folder / "calibration.npz"
    np.savez(data, images=split()[0].numpy())

    run("inspect", MODEL)
    run("decompose", MODEL, "-o", careful, "--ranks", "auto", "--force")
    before = say_accuracy("the original", surgery.load(MODEL).module())
    say_accuracy("the model that was factored without data", surgery.load(careful).module())
    run("decompose", MODEL, "-o", factored, "--calibration", data, "--target-speedup", "1.5", "--force")
    after = say_accuracy("the factored model", surgery.load(factored).module())
    print(f"change: {100 * (after - before):+.2f} points, without any retraining")

    exported, small, back_again = (folder / f"fashion{part}.onnx" for part in ("", ".small", ".back"))
    run("export", MODEL, "-o", exported, "--force")
    run("export", factored, "-o", folder / "fashion.decomposed.onnx", "--force")
    run("bench", "--apart", MODEL, factored)

    print("\nthe same on an ONNX file, which knows nothing of PyTorch:")
    run("decompose", exported, "-o", small, "--ranks", "energy=0.9", "--no-timing", "--force")
    run("recompose", small, "-o", back_again, "--force")
    run("compare", small, back_again)

    print("\nthe network in two stages, and joined again:")
    run("split", MODEL, "--stages", "2", "-o", folder / "fashion.stages", "--force")
    run("join", folder / "fashion.stages", "-o", folder / "fashion.joined.pt2", "--force")
    run("compare", MODEL, folder / "fashion.joined.pt2")

    run("recompose", factored, "-o", recomposed, "--state-dict", weights, "--force")
    run("compare", factored, recomposed)
    original_class = build()
    original_class.load_state_dict(load_file(weights), strict=True)
    print("\nthe recomposed state dict loads into the original class with strict=True")
    back = say_accuracy("the original class with recomposed weights", original_class.eval())
    print(f"the factored model's accuracy came back: {back - after == 0}")


if __name__ == "__main__":
    main()
