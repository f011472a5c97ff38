"""Estimate the memory that work on a model takes, and refuse a model that needs too much before it is read.

Reading a file takes three times its size: its bytes, the checked copy, and the tensors. A pass holds the weights three
times: in the model, in its copy, and as the bytes that are written. Running the program holds a few values, each at
most as large as the largest one. The file says all these sizes. It may declare a weight of four bytes as a matrix of
60,000 x 60,000 equal numbers; that counts with its full size, which a pass would allocate. The memory of a solver comes
on top, and is checked site by site (``system/memory.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgery.errors import FileError
from surgery.system.memory import available_memory
from surgery.text import count

__all__ = ["check_room", "file_need", "program_need"]

_SHARE = 0.9  # of the available memory
_COPIES = 3  # of the weights
_VALUES = 3  # of the largest size that a run holds at once


def check_room(need: int, memory: int | None) -> None:
    """Raise FileError if work needs more than ``memory`` bytes, by default nine tenths of what is available."""
    available = available_memory() if memory is None else memory
    allowed = available if available is None or memory is not None else int(available * _SHARE)
    if allowed is not None and need > allowed:
        limit = "nine tenths of what is available" if memory is None else "the given limit"
        raise FileError(
            f"needs about {count(need)}B of memory to work on",
            allowed=f"{count(allowed)}B, {limit}",
            next_step=f"pass --memory {_asked(need)} (in Python memory=...) to try it anyway",
        )


def _asked(need: int) -> str:
    return f"{math.ceil(need / 1e9)}G" if need > 1e9 else f"{math.ceil(need / 1e6)}M"


def file_need(size: int) -> int:
    """Return about how many bytes of memory it takes to read a model file of ``size`` bytes."""
    return _COPIES * size


def program_need(program: ExportedProgram) -> int:
    """Return about how many bytes it takes to hold, rewrite and run a program, by the sizes that it declares."""
    weights = [each for each in (*program.state_dict.values(), *program.constants.values()) if isinstance(each, Tensor)]
    held = sum(_bytes(each) for each in {_place(each): each for each in weights}.values())
    return _COPIES * held + _VALUES * max(map(_bytes, _values(program)), default=0)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is the same for weights which share one tensor."""
    # Memory identifies a tensor only if it has plain memory; any other is identified as an object.
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.data_ptr() if plain else id(tensor)), tensor.shape, tensor.dtype


def _values(program: ExportedProgram) -> Iterator[Tensor]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "placeholder":  # weights are counted separately, and inputs exist already
                    continue
                yield from (each for each in pytree.tree_leaves(node.meta.get("val")) if isinstance(each, Tensor))


def _bytes(tensor: Tensor) -> int:
    return math.prod(map(_size, tensor.shape)) * tensor.element_size()


def _size(size: int | torch.SymInt) -> int:
    hint = size if isinstance(size, int) else size.node.hint
    return 2 if hint is None else int(hint)
