"""Whether there is room for a model: about what work on it takes, and the refusal of too much before it is taken.

Reading a file takes three times its size: its bytes, the checked copy, the tensors. A pass holds the weights three
times: the model's, those of its copy, and the bytes that are written. Running the program takes some values as large as
its largest. Both are known from what the file says. It may say that a weight of four bytes is a matrix of 60,000 x
60,000 equal numbers: that counts as what it becomes when a pass touches it. What a solver needs comes on top, and is
checked site by site (``solvers/memory.py``).
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

_SHARE = 0.9
_COPIES = 3
_VALUES = 3


def check_room(need: int, memory: int | None) -> None:
    """Raise FileError if work needs more than ``memory`` bytes, or for None, nine tenths of what is available."""
    available = available_memory() if memory is None else memory
    allowed = available if available is None or memory is not None else int(available * _SHARE)
    if allowed is not None and need > allowed:
        said = "nine tenths of what is available" if memory is None else "as was asked for"
        raise FileError(
            f"needs about {count(need)}B of memory for work on it",
            allowed=f"{count(allowed)}B, {said}",
            next_step=f"pass --memory {_asked(need)} (in Python memory=...) to try it all the same",
        )


def _asked(need: int) -> str:
    return f"{math.ceil(need / 1e9)}G" if need > 1e9 else f"{math.ceil(need / 1e6)}M"


def file_need(size: int) -> int:
    """Return about how many bytes it takes to read a model file of so many bytes."""
    return _COPIES * size


def program_need(program: ExportedProgram) -> int:
    """Return about how many bytes it takes to hold, rewrite and run a program, from what it says of itself."""
    weights = [each for each in (*program.state_dict.values(), *program.constants.values()) if isinstance(each, Tensor)]
    held = sum(_bytes(each) for each in {_place(each): each for each in weights}.values())
    return _COPIES * held + _VALUES * max(map(_bytes, _values(program)), default=0)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The same for weights that are one."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.data_ptr() if plain else id(tensor)), tensor.shape, tensor.dtype


def _values(program: ExportedProgram) -> Iterator[Tensor]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "placeholder":  # weights, which are counted by themselves, and inputs, which are there
                    continue
                yield from (each for each in pytree.tree_leaves(node.meta.get("val")) if isinstance(each, Tensor))


def _bytes(tensor: Tensor) -> int:
    return math.prod(map(_size, tensor.shape)) * tensor.element_size()


def _size(size: int | torch.SymInt) -> int:
    hint = size if isinstance(size, int) else size.node.hint
    return 2 if hint is None else int(hint)
