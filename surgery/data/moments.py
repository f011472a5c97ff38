"""Second moments of operators' inputs, by which the error of an operator's *output* follows from its weights alone.

A column x holds the n values that one output is computed from: y = W x. The moments are m = E[x] and C = E[x x^T]. The
mean square of the output W x is tr(W C W^T), and the mean square of its error D x is tr(D C D^T) for D = W - W'.

    Linear      columns are tokens, n = I
    Conv        columns are the patches of each group, n = I K, in the order (channel, taps) of the kernel; padded as
                the operator pads, so that borders are included as they are
    Embedding   columns are one-hot, so C is diagonal: the share of each entry

If n is above a limit (lower for patches), C is approximated. For a convolution it becomes the Kronecker product of a
matrix of channels and a matrix of taps, each averaged over the other (Grosse and Martens 2016, arXiv 1602.01407, do so
for gradients). For a linear layer only the diagonal is kept.

The columns that an operator multiplies: tokens of a linear layer, patches of a convolution.

Patches are a strided view of the padded input. Only the patches at the chosen positions are copied. A transposed
convolution equals a plain one of stride 1 with the mirrored kernel, over an input that has stride - 1 zeros between its
values and d (k - 1) - padding zeros around them; its patches are those of the plain one, mirrored back.

    stride 2, 3 taps, padding 1    x = [a b]  ->  [0 a 0 b 0]  ->  patches, mirrored back: [0 a 0] [b 0 a] [0 b 0]

If samples have masks, positions are drawn among the visible ones. Masks apply to a convolution along time if it has as
many outputs as inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.algebra import Conv, Linear, Operator
from surgery.data.masks import visible_rows
from surgery.data.sums import DiagonalSum, SquareSum
from surgery.errors import InputError
from surgery.solvers.weighted import SecondMoment, times_rows
from surgery.system.spill import Spill

__all__ = ["Accumulator", "Columns", "Moments", "layout_bytes", "output_reader", "read_columns"]

_PATCHES = 2304  # the largest n of patches with one matrix: a 3x3 convolution of 256 channels


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of ``count`` columns that an operator reads: mean (groups, n), and C as a metric, both in float64.

    ``sensitivity`` G (groups, O, O) or, diagonal, (groups, O), where it was collected, says how much an error of the
    operator's output changes the model's output: by about tr(G E) for an error with second moment E.
    """

    count: int
    mean: Tensor
    metric: SecondMoment
    sensitivity: Tensor | None = None

    def narrow(self) -> Moments:
        """Return the moments in float32, which is enough to compare errors."""
        seen = None if self.sensitivity is None else self.sensitivity.float()
        return Moments(self.count, self.mean.float(), self.metric.narrow(), seen)

    @property
    def dense(self) -> bool:
        """Whether C is stored as one matrix (groups, n, n), and is neither approximated nor diagonal (embeddings)."""
        return self.metric.factors[0].shape[1:] == (self.mean.shape[1],) * 2

    @property
    def second(self) -> Tensor:
        """C as one tensor (groups, n, n), however it is stored."""
        groups, n = self.mean.shape
        return self.metric.times(torch.eye(n, dtype=self.mean.dtype, device=self.mean.device).expand(groups, n, n))

    def new_metric(self, *, centred: bool) -> SecondMoment:
        """Return the metric by which errors count, C or the covariance, in new tensors that may be changed."""
        return self.centred if centred else replace(self.metric, factors=tuple(f.clone() for f in self.metric.factors))

    @property
    def centred(self) -> SecondMoment:
        """The covariance ``C - m m^T``, by which errors count if a bias absorbs their mean; a new tensor each time."""
        # C = A (x) B with channels A and taps B: the mean, as a matrix M (channels, taps), is taken out of each factor:
        # A - M M^T / taps, and B tr(A) - M^T M, whose trace is then scaled to the number of taps again.
        taps = self.metric.taps
        if len(self.metric.factors) == 1:
            return SecondMoment((_centre(self.metric.factors[0], self.mean.unsqueeze(1)),), taps)
        channels, kernel = self.metric.factors
        mean = self.mean.unflatten(1, (-1, taps))
        scale = _trace(channels)
        channels = _centre(channels, mean.mT / math.sqrt(taps))
        kernel = _centre(kernel * scale, mean)
        return SecondMoment(
            (channels, kernel * (taps / _trace(kernel).clamp(min=torch.finfo(kernel.dtype).tiny))), taps
        )

    def centred_energy(self, difference: Tensor, sensitivity: Tensor | None = None) -> Tensor:
        """Return ``tr(D Cov D^T)`` of (groups, O, n), or ``tr(G D Cov D^T)`` with a sensitivity G."""
        if len(self.metric.factors) > 1:
            return self.centred.energy(difference, sensitivity)
        # Where C is one matrix, D C D^T - (D m)(D m)^T saves a covariance as large as C.
        shift = difference @ self.mean.unsqueeze(-1)
        other = shift if sensitivity is None else times_rows(sensitivity, shift)
        return (self.metric.energy(difference, sensitivity) - (shift * other).sum()).clamp(min=0)

    def output_error(self, difference: Tensor, kernel: Tensor, *, centred: bool = False) -> float:
        """Return the output's relative error ``sqrt(tr(D C D^T) / tr(W C W^T))``, of kernels (groups, O, I, *size).

        ``centred`` leaves the mean of D x out of the error, as a corrected bias does, but not out of the scale. The
        error is 0 if the kernel's output is 0.
        """
        metric = self.centred if centred else self.metric
        scale = self.metric.energy(kernel.detach().double().flatten(2))
        if not scale > 0:
            return 0.0
        return math.sqrt(float(metric.energy(difference.detach().double().flatten(2)) / scale))


def _centre(factor: Tensor, rows: Tensor) -> Tensor:
    """Return the factor, dense or diagonal, minus ``rows^T rows`` for rows (groups, r, m)."""
    if factor.dim() == 2:
        return factor - rows.square().sum(1)
    return torch.baddbmm(factor, rows.mT, rows, alpha=-1)  # whose only memory is that of the result


def _trace(factor: Tensor) -> Tensor:
    return _diagonal(factor).sum(-1)[:, None, None]


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1)


def _whole(columns: int, taps: int, limit: int) -> bool:
    """Whether C is stored as one matrix; for larger patches a matrix costs more than it improves."""
    return columns <= (min(limit, _PATCHES) if taps > 1 else limit)


def layout_bytes(operator: Operator, limit: int) -> int:
    """Return the bytes that an operator's C takes if a matrix may have at most ``limit`` columns."""
    groups, _, channels, *size = operator.kernel.shape
    taps = math.prod(size)
    n = channels * taps
    if operator.reads_indices:
        return 8 * n
    if _whole(n, taps, limit):
        return 8 * groups * n * n
    return 8 * groups * ((channels**2 if channels <= limit else channels) + (taps**2 if taps > 1 else 0))


class Accumulator:
    """Sums the moments of one operator's columns over all its calls.

    ``limit`` is the largest n, or number of channels, for which a matrix is stored. At most ``rows`` columns of each
    input are used, at random positions that ``seed`` decides. Large sums stand in the file of ``spill``.
    """

    def __init__(self, operator: Operator, *, limit: int, rows: int, seed: int = 0, spill: Spill | None = None) -> None:
        groups, _, channels, *size = operator.kernel.shape
        self._operator, self._rows = operator.to(device="meta"), rows
        self._taps, self.count = math.prod(size), 0
        n = channels * self._taps
        self._whole = _whole(n, self._taps, limit)
        self._generator = torch.Generator().manual_seed(seed)
        self._mean = torch.zeros(groups, n, dtype=torch.float64, device=operator.weight.device)
        # ``_first`` sums x x^T: as one matrix, as its diagonal, or for channels alone, in which case ``_second`` sums
        # the same for taps.
        wide = channels if operator.reads_indices or channels > limit else 0
        side = n if self._whole else channels
        spill, device = spill or Spill(), self._mean.device
        self._first = DiagonalSum(groups, side, device) if wide else SquareSum(groups, side, spill, device)
        split = not self._whole and self._taps > 1
        self._second = SquareSum(groups, self._taps, spill, device) if split else None

    def add(self, x: Tensor, masks: Sequence[Tensor] = ()) -> None:
        """Add the columns of one input of the operator at the positions that the masks (N, T) show."""
        if self._operator.reads_indices:
            visible = visible_rows(masks, x.shape)
            x = x.flatten() if visible is None else x.flatten()[visible]
            shares = torch.bincount(x, minlength=self._mean.shape[1]).to(torch.float64)
            assert isinstance(self._first, DiagonalSum)
            self._first.add_shares(shares)
            self._mean += shares
            self.count += x.numel()
            return
        for block in read_columns(self._operator, x, rows=self._rows, generator=self._generator, masks=masks):
            self._add_block(block)

    def _add_block(self, block: Columns) -> None:
        """Add (groups, rows, n)."""
        self.count += block.shape[1]
        self._mean += block.sum(1, dtype=torch.float64)
        if self._whole:
            self._first.add(block)
            return
        # C is the Kronecker product of two factors: x as X (channels, taps) adds X X^T to one and X^T X to the other.
        # (g, rows, I, K); the channels see rows of I, one for each tap, and the taps rows of K, one for each channel.
        split = block.unflatten(2, (-1, self._taps))
        self._first.add(split.mT.flatten(1, 2))
        if self._second is not None:
            self._second.add(split.flatten(1, 2))

    def check(self) -> None:
        """Check that there are moments of what was added.

        Raises:
            InputError: nothing was added, or values are not finite.
        """
        if not self.count:
            raise InputError("no calibration input reached the operator")
        # A square is not finite wherever a value is not, or its square is not.
        if not bool(torch.isfinite(self._mean).all()) or not bool(torch.isfinite(self._first.diagonal()).all()):
            raise InputError("its inputs have values that are not finite", next_step="check the data")

    def moments(self) -> Moments:
        """Return the moments of all that was added; raises as ``check`` does."""
        self.check()
        if self._second is None:
            factors: tuple[Tensor, ...] = (self._first.over(self.count),)
        else:
            tiny = torch.finfo(torch.float64).tiny
            # tr(A (x) B) = tr(A) tr(B). A is averaged over the taps and tr(B) is K, so that the product has the mean
            # square of a column. Example: columns of mean square 18 at 9 taps have tr(A) = 2 and tr(B) = 9.
            channels, taps = self._first.over(self.count * self._taps), self._second.over(1)
            factors = channels, taps * (self._taps / _trace(taps).clamp(min=tiny))
        return Moments(self.count, self._mean / self.count, SecondMoment(factors, self._taps))


Columns = Tensor  # (groups, rows, n): each row holds one column x of n values, in the kernel's order (channel, taps)
_BLOCK = 2**22  # numbers in one block


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
    # Inputs and outputs are read in two calls: the same generator state and the same number of places choose alike.
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
        # (rows, g I, *taps) -> (rows, g, I, *taps) -> (rows, g, n) -> (g, rows, n)
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
        # Example of 3 taps with dilation 2: windows of 5, of which the places 0, 2 and 4 are taps.
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x
