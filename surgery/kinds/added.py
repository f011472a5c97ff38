"""The other branch of a residual connection: the tensor that is added to a site's output, seen while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Added", "Additions"]

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_VIEW = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default)

Added = Callable[[Tensor, bool], None]


@dataclass(eq=False)
class _Followed:
    """A followed value: ``add`` is called with a tensor that is added to it, ``spoil`` if anything else reads it."""

    shape: torch.Size
    add: Added
    spoil: Callable[[], None]
    added: bool = False


class Additions(TorchDispatchMode):
    """A mode that follows values and tells which of them only an addition reads, once, with a tensor of their shape.

    The mode sees the operators that torch runs, so it works for modules, interpreted graphs and functions alike. Views
    of a value that keep its memory (view, alias) are followed too. A value that is transposed or sliced first counts as
    read by something else.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._followed: Any = WeakIdKeyDictionary()
        self._paused = False

    def follow(self, value: Tensor, add: Added, spoil: Callable[[], None]) -> None:
        """Call ``add`` with the tensor that is added to a value, and ``spoil`` if anything else reads the value.

        The tensor comes in the shape of the value. ``add`` also gets whether this tensor is itself a followed value.
        """
        self._followed[value] = _Followed(value.shape, add, spoil)

    def give(self, output: Any) -> None:
        """Spoil the followed values in a model's output: the caller reads them."""
        for _, followed in self._read((output,), {}):
            followed.spoil()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore everything for a while: the observer, not the model, handles the values now."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what it does to the values that are followed."""
        # A followed value has at most one good end: one plain addition of its own shape. Each other read spoils it,
        # except for a view, which is followed in its place: for y = site(x).view(n, c); y + r, the tensor r is seen.
        kwargs = kwargs or {}
        # looked up before the operator runs, as it may write to its inputs
        read = [] if self._paused or not self._followed else self._read(args, kwargs)
        if func in _ADD and kwargs.get("alpha", 1) == 1 and _alike(args):
            for value, followed in read:
                self._see(followed, args[1] if value is args[0] else args[0])
            if func is torch.ops.aten.add_.Tensor:  # the tensor holds the sum from now on
                self._followed.pop(args[0], None)
            read = []
        result = func(*args, **kwargs)
        for _, followed in read:
            if func in _VIEW:
                self._followed[result] = followed
            else:
                followed.spoil()
        return result

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, _Followed]]:
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return [(tensor, self._followed[tensor]) for tensor in tensors if tensor in self._followed]

    def _see(self, followed: _Followed, other: Tensor) -> None:
        if followed.added:
            followed.spoil()
        else:
            followed.added = True
            followed.add(other.reshape(followed.shape), other in self._followed)


def _alike(args: Sequence[Any]) -> bool:
    return len(args) == 2 and all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape
