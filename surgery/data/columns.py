"""The columns that an operator multiplies: tokens of a linear layer, patches of a convolution.

Patches are a strided view of the padded input. Only the patches at the chosen positions are copied. A transposed
convolution equals a plain one of stride 1 with the mirrored kernel, over an input that has stride - 1 zeros between its
values and d (k - 1) - padding zeros around them; its patches are those of the plain one, mirrored back.

    stride 2, 3 taps, padding 1    x = [a b]  ->  [0 a 0 b 0]  ->  patches, mirrored back: [0 a 0] [b 0 a] [0 b 0]

If samples have masks, positions are drawn among the visible ones. Masks apply to a convolution along time if it has as
many outputs as inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.algebra.operators import Conv, Linear, Operator
from surgery.data.masks import visible_rows
from surgery.errors import InputError

__all__ = ["Columns", "output_reader", "read_columns"]

Columns = Tensor  # (groups, rows, n): each row holds one column x of n values, in the kernel's order (channel, taps)
_BLOCK = 2**24  # numbers in one block


def read_columns(
    operator: Operator, x: Tensor, *, rows: int, generator: torch.Generator, masks: Sequence[Tensor] = ()
) -> Iterator[Columns]:
    """Yield at most ``rows`` columns of one input of a linear layer or a convolution, in blocks of bounded size.

    Columns have the dtype of the input, or float32 for half precisions. Positions are drawn without repetition among
    the positions that the ``masks`` (N, T) show; the same masks and generator state give the same positions.

    Raises:
        InputError: the operator is of another kind.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(operator, Linear):
        tokens = x.reshape(-1, x.shape[-1])
        visible = visible_rows(masks, x.shape[:-1])
        for chosen in _choose(len(tokens), rows, generator, width=tokens.shape[1], visible=visible):
            yield tokens[chosen].unsqueeze(0)
    elif isinstance(operator, Conv):
        yield from _patches(operator, x, rows, generator, masks)
    else:
        raise InputError(f"a {type(operator).__name__} has no columns to read", allowed="Linear, Conv")


def output_reader(
    operator: Operator, y: Tensor, *, rows: int, generator: torch.Generator, masks: Sequence[Tensor] = ()
) -> Callable[[Tensor], Tensor]:
    """Return a function that reads the rows of an output which belong to the columns that ``read_columns`` yields.

    The function takes any value with the shape of ``y``, and returns (groups, rows, outputs of a group) in the order
    and the dtype of the columns. The generator must be in the state that it had for ``read_columns``, and the other
    arguments must be the same.
    """
    dims = operator.spatial_dims

    def positions(value: Tensor) -> Tensor:
        value = value.detach()
        value = value if value.dtype == torch.float64 else value.float()
        return (value if value.dim() == dims + 2 else value.unsqueeze(0)).movedim(1, -1) if dims else value

    shape = positions(y).shape[:-1]
    visible = visible_rows(masks, shape) if dims < 2 else None
    chosen = torch.cat(list(_choose(shape.numel(), rows, generator, width=1, visible=visible)))

    def read(value: Tensor) -> Tensor:
        tokens = positions(value).reshape(shape.numel(), -1)
        return tokens[chosen].unflatten(1, (operator.kernel.shape[0], -1)).transpose(0, 1)

    return read


def _choose(
    total: int, rows: int, generator: torch.Generator, *, width: int, visible: Tensor | None
) -> Iterator[Tensor]:
    places = torch.arange(total, device="cpu") if visible is None else visible.cpu().nonzero().flatten()
    if len(places) > rows:
        places = places[torch.randperm(len(places), generator=generator, device="cpu")[:rows]]
    yield from places.split(max(1, _BLOCK // width))


def _patches(
    conv: Conv, x: Tensor, rows: int, generator: torch.Generator, masks: Sequence[Tensor]
) -> Iterator[Columns]:
    dims = conv.geometry.dims
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mirrored = conv.geometry.transposed
    view = _stuffed_view(conv, x) if mirrored else _view(conv, x)
    view = view.movedim(1, 1 + dims)  # (batch, *positions, channels, *taps)
    positions = view.shape[: 1 + dims]
    width = view.shape[1 + dims :].numel()
    visible = visible_rows(masks, positions) if dims == 1 else None
    for chosen in _choose(positions.numel(), rows, generator, width=width, visible=visible):
        patches = view[torch.unravel_index(chosen, positions)]
        patches = patches.flip(list(range(-dims, 0))) if mirrored else patches
        yield patches.unflatten(1, (conv.groups, -1)).flatten(2).transpose(0, 1)


def _view(conv: Conv, x: Tensor) -> Tensor:
    """Return (batch, channels, *positions, *taps)."""
    g = conv.geometry
    if g.padded:
        mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
        x = F.pad(x, [side for pair in reversed(g.padding) for side in pair], mode=mode)
    return _windows(x, conv.kernel_size, g.stride, g.dilation)


def _stuffed_view(conv: Conv, x: Tensor) -> Tensor:
    """Return the same for a transposed convolution, from the input with zeros between and around its values."""
    g = conv.geometry
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], g.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    places = [slice(None), slice(None), *(slice(None, None, s) for s in g.stride)]
    stuffed[tuple(places)] = x
    # padding p of a transposed convolution removes p outputs on each side: span - p zeros are left to add.
    spans = [d * (k - 1) for d, k in zip(g.dilation, conv.kernel_size, strict=True)]
    sides = zip(spans, g.padding, g.output_padding, strict=True)
    pads = [(span - before, span - after + extra) for span, (before, after), extra in sides]
    padded = F.pad(stuffed, list(itertools.chain.from_iterable(reversed(pads))))
    return _windows(padded, conv.kernel_size, (1,) * g.dims, g.dilation)


def _windows(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    # Each unfold moves one axis of windows to the end; every d-th element of a window is a tap.
    for dim, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x
