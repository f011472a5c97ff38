"""How large the files of a model are."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_size"]


def model_size(path: Path) -> int:
    """Return how many bytes the files of a saved model take: of an ONNX model also those beside its own."""
    from surgery.files.guard.onnx import onnx_size

    return onnx_size(path) if path.suffix == ".onnx" else path.stat().st_size
