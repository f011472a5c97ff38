"""Batch norms as modules: which track statistics, and where these are."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["buffers_of", "is_tracked_norm"]


def is_tracked_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def buffers_of(root: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of the batch norm at a path."""
    return root.get_buffer(f"{path}.running_mean"), root.get_buffer(f"{path}.running_var")
