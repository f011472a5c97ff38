"""EVBMF: how many singular values of a matrix stand above its noise, by empirical variational Bayes.

The matrix is V = B A^T + noise of variance s2, with L rows <= M columns (else transposed) and alpha = L / M; g_h are
its singular values and x_h = g_h^2 / (M s2). Maximising the evidence over the priors of B and A leaves, in closed form,

    tau(x)  = (x - (1 + alpha) + sqrt((x - (1 + alpha))^2 - 4 alpha)) / 2
    keep h  iff  x_h > x_ = (1 + t)(1 + alpha / t)
    where   Phi(t) + Phi(t / alpha) = 0,   Phi(z) = log(1 + z) / z - 1/2
    kept value  d_h = M s2 tau(x_h) / g_h

and s2 minimises  sum_h [x_h - log x_h]  +  sum_kept [log(tau_h + 1) + alpha log(tau_h / alpha + 1) - tau_h].
Public code puts t = 2.5129 sqrt(alpha), which is exact for alpha = 1 only; here t is solved for. The objective has a
concave kink wherever a value crosses the threshold, and hence many local minima. It is searched on a grid over its
bracket, and the lowest few minima are refined.

Example: a square matrix (alpha = 1) has t = 2.5129 and x_ = (1 + t)(1 + 1 / t) = 4.911. With 100 columns and noise of
variance 0.01, M s2 = 1, and singular values above sqrt(4.911) = 2.22 are kept. Noise alone reaches 2
(Marchenko-Pastur).

Nakajima, Sugiyama, Babacan and Tomioka, JMLR 14 (2013) 1-37; the closed forms and the bracket are those of Nakajima,
Tomioka, Sugiyama and Babacan, "Perfect Dimensionality Recovery by Variational Bayesian PCA", NIPS 2012.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from surgery.errors import InputError

__all__ = ["Evbmf", "evbmf", "evbmf_rank"]

Array = npt.NDArray[np.float64]

_RESOLUTION = 1e-5  # values below this share of the largest are rounding noise of float32 weights, or of their SVD
_GRID, _MINIMA, _ROUNDS = 256, 6, 5  # points over the bracket, minima refined, rounds that narrow each 8-fold
_CHUNK = 4_000_000  # grid points x singular values evaluated at once


@dataclass(frozen=True, eq=False)
class Evbmf:
    """What EVBMF says of one matrix: the kept singular values, shrunken and descending, and the noise variance."""

    values: Array
    noise_variance: float

    @property
    def rank(self) -> int:
        """Number of singular values above the noise."""
        return len(self.values)


def evbmf(values: Tensor | Array, rows: int, columns: int, *, sigma2: float | None = None) -> Evbmf:
    """Return the EVBMF solution for a rows x columns matrix with these singular values, in any order.

    Singular values that are not given count as 0. ``sigma2`` is the noise variance, if it is known. A matrix whose rank
    is low and exact has a noise variance of about 0 and keeps its values; a zero matrix has rank 0.

    Raises:
        InputError: values that are negative, not finite or more than min(rows, columns), or a negative ``sigma2``.

    >>> evbmf(np.array([90.0, 80.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0]), 8, 12).rank
    2
    """
    scaled, largest, noise = _solve(values, rows, columns, sigma2)
    if len(scaled) != 1:
        raise InputError(f"evbmf takes the values of one matrix, not of {len(scaled)}", next_step="use evbmf_rank")
    alpha, long_side = min(rows, columns) / max(rows, columns), max(rows, columns)
    kept = scaled[0][scaled[0] > _threshold(noise, alpha)[0]]
    # gamma tau(x) / x, where x = gamma^2 / sigma^2.
    shrunken = noise[0] * _tau(kept**2 / noise[0], alpha) / kept
    scale = float(largest[0])
    return Evbmf(shrunken * scale, float(noise[0]) / long_side * scale * scale)


def evbmf_rank(values: Tensor | Array, rows: int, columns: int, *, sigma2: float | None = None) -> int:
    """Return the EVBMF rank of a rows x columns matrix from its singular values (n,).

    For a batch (groups, n) this is the largest rank of all, because one rank for all groups has to hold each. Raises as
    ``evbmf`` does.
    """
    scaled, _, noise = _solve(values, rows, columns, sigma2)
    alpha = min(rows, columns) / max(rows, columns)
    return int((scaled > _threshold(noise, alpha)[:, None]).sum(1).max(initial=0))


def _checked(values: Tensor | Array, rows: int, columns: int, sigma2: float | None) -> Array:
    """Return the values as (groups, min(rows, columns)), descending."""
    singular = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    singular = np.atleast_2d(singular)
    size = min(rows, columns)
    if size < 1 or singular.ndim != 2 or singular.shape[1] > size:
        raise InputError(
            f"singular values of shape {tuple(np.shape(values))} do not fit a {rows}x{columns} matrix",
            allowed=f"(n,) or (groups, n) with n at most {max(size, 0)}",
        )
    if not np.isfinite(singular).all() or (singular < 0).any():
        raise InputError("singular values that are negative or not finite", next_step="repair the weight first")
    if sigma2 is not None and not (math.isfinite(sigma2) and sigma2 >= 0):
        raise InputError(f"a noise variance sigma2={sigma2!r}", allowed="numbers from 0, or None to estimate it")
    return np.pad(np.sort(singular)[:, ::-1], ((0, 0), (0, size - singular.shape[1])))


@functools.lru_cache(maxsize=4096)
def _edge(alpha: float) -> float:
    """Return x_, the least x that is kept; by bisection, since both terms fall in t and one is 0 at each end."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    # Phi falls and is 0 at 2.5129: at t = 2.5 alpha both terms are above 0, at t = 2.6 both are below. The middle is
    # the geometric one, since the bracket is wide for a small alpha.
    low, high = 2.5 * alpha, 2.6
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return (1 + low) * (1 + alpha / low)


def _threshold(noise: Array, alpha: float) -> Array:
    """Return the singular value that those to keep must exceed, for each matrix; ``noise`` is M s2 here and below."""
    return np.sqrt(noise * _edge(alpha))


def _tau(x: Array, alpha: float) -> Array:
    centred = x - (1 + alpha)
    return (centred + np.sqrt(np.maximum(centred**2 - 4 * alpha, 0))) / 2


def _solve(values: Tensor | Array, rows: int, columns: int, sigma2: float | None) -> tuple[Array, Array, Array]:
    """Return the singular values (groups, n) over the largest of each group, that one, and M s2 on the same scale."""
    singular = _checked(values, rows, columns, sigma2)
    largest = singular[:, 0]
    scale = np.where(largest > 0, largest, 1)
    scaled = singular / scale[:, None]
    alpha = min(rows, columns) / max(rows, columns)
    # With this noise the threshold is _RESOLUTION: nothing below it is ever kept.
    floor = _RESOLUTION**2 / _edge(alpha)
    if sigma2 is not None:
        deviation = math.sqrt(sigma2 * max(rows, columns))
        return scaled, largest, np.maximum(np.minimum(deviation / np.maximum(scale, 1e-100), 1e100) ** 2, floor)
    step = max(1, _CHUNK // (_GRID * singular.shape[1]))
    parts = [_minimise(scaled[i : i + step] ** 2, alpha, floor) for i in range(0, len(scaled), step)]
    return scaled, largest, np.concatenate([np.empty(0), *parts])


def _minimise(squares: Array, alpha: float, floor: float) -> Array:
    """Return the noise of least free energy for squares (groups, L) whose largest is 1 (or 0); at least ``floor``."""
    # Invariant: all candidates lie in the bracket [low, high] of log noise, and each round looks at 17 points around
    # each of the lowest minima so far, at an eighth of the distance of the round before. Example: a bracket of
    # length 2.55 has grid points 0.01 apart, and after 5 rounds the minimum is known to 0.01 / 8^5 = 3e-7.
    size, edge = squares.shape[1], _edge(alpha)
    most = math.ceil(size / (1 + alpha)) - 1  # no solution keeps more values than this
    # At most ``most`` values are kept. So the noise is at least what puts the largest of the tail at the threshold, and
    # the mean of the tail; it is at most the mean of all squares. Example of squares 1, 0.04, 0.04, 0.04 with alpha =
    # 1: one is kept, and M s2 is between max(0.04 / 4.91, 0.04) = 0.04 and 0.28.
    tail = squares[:, most:]
    low = np.log(np.maximum(np.maximum(tail[:, 0] / edge, tail.mean(1)), floor))[:, None]
    high = np.maximum(np.log(np.maximum(squares.mean(1), floor))[:, None], low)
    if most == 0:
        return np.exp(high[:, 0])
    points = low + (high - low) * np.linspace(0, 1, _GRID)
    energy = _free_energy(points, squares, most, alpha)
    padded = np.pad(energy, ((0, 0), (1, 1)), constant_values=np.inf)
    hollow = (energy <= padded[:, :-2]) & (energy <= padded[:, 2:])
    order = np.argsort(np.where(hollow, energy, np.inf), axis=1)[:, :_MINIMA]
    centre = np.take_along_axis(points, order, axis=1)
    width = (high - low)[..., None] / (_GRID - 1)
    for _ in range(_ROUNDS):
        local = np.clip(centre[..., None] + width * np.linspace(-1, 1, 17), low[..., None], high[..., None])
        energy = _free_energy(local.reshape(len(local), -1), squares, most, alpha).reshape(local.shape)
        centre = np.take_along_axis(local, energy.argmin(2)[..., None], axis=2)[..., 0]
        width = width / 8
    best = energy.min(2).argmin(1)
    return np.exp(centre[np.arange(len(centre)), best])


def _free_energy(log_noise: Array, squares: Array, most: int, alpha: float) -> Array:
    """Return the objective (groups, points) without its terms that are the same for each noise."""
    noise = np.exp(log_noise)
    # sum (x - log x) with x = squares / noise, but for sum log squares, which no noise changes.
    energy = squares.sum(1)[:, None] / noise + squares.shape[1] * log_noise
    x = np.maximum(squares[:, None, :most] / noise[..., None], _edge(alpha))  # at the edge what follows is 0
    tau = _tau(x, alpha)
    return energy + (np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau).sum(2)
