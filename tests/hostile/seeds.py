"""Honest files, as few and as small as command lines need to go wrong on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.hostile.command_lines import CommandLines

__all__ = ["write_seeds"]

FACTORY = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))\n"


def write_seeds(folder: Path, command_lines: CommandLines) -> Path:
    """A small model, one of 6 MB, both factored too, and a state dict with its factory; return the folder."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    large = nn.Sequential(nn.Linear(500, 1500), nn.ReLU(), nn.Linear(1500, 500))
    torch.save(small.state_dict(), folder / "sd.pt")
    (folder / "factory.py").write_text(FACTORY)
    for name, model, width, rank in (("mlp", small, 8, 2), ("big", large, 500, 300)):
        torch.export.save(torch.export.export(model.eval(), (torch.randn(2, width),)), folder / f"{name}.pt2")
        words = ("decompose", f"{name}.pt2", "-o", f"{name}.dec.pt2", "--ranks", str(rank), "--no-timing")
        done = command_lines.run(folder, *words)
        assert not done.faults(allowed=(0,)), done
    return folder
