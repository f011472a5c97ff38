"""Unwrap and wrap a model that trains: torch.compile's wrapper and DistributedDataParallel.

A compiled model stays the same object, and is compiled again at its next run. DistributedDataParallel puts hooks on the
parameters that it is given, so a switch makes a new one with the same settings. The new wrapper sends nothing at its
start, because the new parameters are already alike in all processes. The old wrapper can no longer run, since it would
not synchronise the new parameters.

Warnings about a run that would leave its model factored although the user asked to recompose it.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from surgery.errors import InputError

__all__ = ["NO_END", "Ending", "agree", "broadcast", "group_of", "rewrap", "unwrap", "warn_of_no_end"]

_BUFFERS = "forward_sync_buffers"  # the name since torch 2.13, which warns of the one before
_KEPT = (
    "device_ids",
    "output_device",
    "dim",
    _BUFFERS if _BUFFERS in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers.

    Raises:
        InputError: it is not a module, or its parameters are shards, as with FSDP.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a model to train is a {type(model).__name__}",
            allowed="nn.Module, which has gradients",
            next_step="train the module that a file came from; decompose with calibration data fits a file without",
        )
    while (inner := _inside(model)) is not None:
        model = inner
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise InputError(
            "the model is sharded (FSDP)",
            allowed="plain modules, torch.compile, DistributedDataParallel",
            next_step="decompose it before fully_shard",
        )
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DistributedDataParallel):
        return model.module
    inner = getattr(model, "_orig_mod", None)  # torch.compile's; importing its class would import the whole compiler
    return inner if isinstance(inner, nn.Module) else None


def rewrap(model: nn.Module) -> nn.Module:
    """Return the model in wrappers like its present ones, made ready for the parameters that it has now."""
    inner = _inside(model)
    if inner is None:
        return model
    fresh = rewrap(inner)
    if isinstance(model, DistributedDataParallel):
        return _distributed(model, fresh)
    torch.compiler.reset()
    return model if fresh is inner else type(model)(fresh, model.dynamo_ctx)


def _distributed(old: DistributedDataParallel, inner: nn.Module) -> DistributedDataParallel:
    kept: dict[str, Any] = {name: getattr(old, name) for name in _KEPT if hasattr(old, name)}
    del old.reducer
    megabytes = old.bucket_bytes_cap / 1024**2
    return DistributedDataParallel(inner, bucket_cap_mb=megabytes, init_sync=False, **kept)


def group_of(model: nn.Module) -> Any:
    """Return the process group of a distributed model; None for any other model."""
    inside: nn.Module | None = model
    while inside is not None:
        if isinstance(inside, DistributedDataParallel):
            return inside.process_group
        inside = _inside(inside)
    return None


def agree(value: Any, group: Any) -> Any:
    """Return the value of rank 0 of the group; the value itself without a group."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def broadcast(parameters: Iterable[nn.Parameter], optimizer: Optimizer, group: Any) -> None:
    """Copy parameters and their optimizer state from rank 0 to the whole group; without a group do nothing."""
    if group is None:
        return
    source = dist.get_global_rank(group, 0)
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for tensor in (parameter.data, *(value for value in state.values() if isinstance(value, Tensor))):
            # Collectives take contiguous memory alone, and a channels_last weight is not contiguous.
            whole = tensor.contiguous()
            dist.broadcast(whole, src=source, group=group)
            tensor.copy_(whole)


NO_END = "LowRankTraining cannot know when to recompose: give epochs=, or call finish() when the training has ended"
_LEFT = "a LowRankTraining ended while its model was factored: call finish(), which recomposes the model"


@dataclass(eq=False)
class Ending:
    """Whether a run still has to recompose its model (``undone``); a separate object, so that it outlives the run."""

    undone: bool = False

    def watch(self, run: object) -> None:
        """Warn if the run is garbage-collected, or the interpreter ends, before the model is recomposed."""
        weakref.finalize(run, self._tell)

    def _tell(self) -> None:
        if self.undone:
            self.undone = False
            warnings.warn(_LEFT, UserWarning, stacklevel=2)


def warn_of_no_end(recompose_at: int | str | None, epochs: int | None) -> None:
    """Warn if only ``finish()`` can recompose the model of a run."""
    if recompose_at == "end" and epochs is None:
        warnings.warn(NO_END, UserWarning, stacklevel=3)
