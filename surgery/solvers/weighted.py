"""Approximation in the norm of outputs. For inputs x with second moment C = E[x x^T] and a matrix D (m x n) on them

    E |D x|^2 = tr(D C D^T),        so that the error of W' in the place of W is |(W - W') C^(1/2)|_F.

Low rank has a closed form. For m <= n with the leading eigenvectors U (m x r) of ``W C W^T``, the best W' is the
projection ``U (U^T W)``. This is Eckart-Young for W C^(1/2), where C^(-1/2) cancels: no root or inverse of C is needed,
and in the rows kept, whatever C does not see stays as it was. For m > n with C = L L^T and the leading eigenvectors V
(n x r) of ``L^T W^T W L``, it is ``(W L V) (V^T L^-1)``. The cost is m n^2 + m^3, or m n^2 + n^3.

Any other structure: the kernel is linear in each of its factors, so that a truncated Gauss-Newton method (Nocedal and
Wright 2006, section 7.1) only needs products with the Jacobian J and its transpose. Automatic differentiation of the
function that builds the kernel gives them. Conjugate gradients solve ``J^T C J p = -J^T C (W' - W)`` for all factors at
once; then the longest of the steps p, p/2, p/4, ... that lowers the error is taken. Each iteration costs one product
with C, m n^2, and about four times what it costs to build the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.solvers.gram import leading_eigen

__all__ = [
    "Root",
    "SecondMoment",
    "add_ridge",
    "equal_norms",
    "low_rank",
    "refine",
    "root_of",
    "symmetric_root",
    "times_channels",
    "times_rows",
]

_NEXT_TO_NOTHING = 1e-12  # a ridge, relative to the mean of the diagonal
_HALVINGS = 6
_GAIN = 3e-3  # relative, of the squared error: a step that gains less is the last one


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """A second moment C (n x n) for each group of inputs, where column ``i * taps + k`` is channel i at kernel tap k.

    ``factors`` are one or two tensors, C or (channels, taps) with ``C = channels (x) taps``; each is (groups, m, m),
    or (groups, m) for a diagonal. Symmetric, positive semi-definite, float64.
    """

    factors: tuple[Tensor, ...]
    taps: int = 1

    def narrow(self) -> SecondMoment:
        """Return the metric in float32, enough to compare and improve errors by."""
        return replace(self, factors=tuple(factor.float() for factor in self.factors))

    def separated(self) -> SecondMoment:
        """Return the metric as channels (x) taps, each averaged over the other."""
        return self if self.taps == 1 else replace(self, factors=(self.channels, self.positions))

    def times(self, matrix: Tensor) -> Tensor:
        """Return ``M C`` for (groups, rows, n)."""
        if len(self.factors) == 1:
            return _times(matrix, self.factors[0])
        channels, taps = self.factors
        # Invariant: a row of M is an I x K matrix X, and (channels (x) taps) turns it into ``channels X taps``. The
        # taps multiply (g, rows * I, K), the channels (g, rows * K, I).
        split = matrix.unflatten(-1, (-1, self.taps))
        inner = _times(split.flatten(1, 2), taps).view_as(split)
        return _times(inner.mT.flatten(1, 2), channels).unflatten(1, (-1, self.taps)).mT.flatten(2)

    def energy(self, matrix: Tensor, sensitivity: Tensor | None = None) -> Tensor:
        """Return ``tr(M C M^T)``, or ``tr(G M C M^T)`` for G, dense or diagonal, of M (groups, rows, n)."""
        other = matrix if sensitivity is None else times_rows(sensitivity, matrix)
        return (self.times(matrix) * other).sum().clamp(min=0)

    def regularise(self, ridge: float) -> SecondMoment:
        """Add ``ridge * mean(diagonal) * identity`` in place, factor by factor; zero becomes the identity."""
        for factor in self.factors:
            add_ridge(factor, ridge)
        return self

    @property
    def channels(self) -> Tensor:
        """The second moment of the channels, averaged over the taps: (groups, I, I) or, diagonal, (groups, I)."""
        first, *rest = self.factors
        if rest or self.taps == 1:
            return first
        # The mean of the blocks on the diagonal of the taps. Example: of 2 channels and 9 taps,
        # (18, 18) is (2, 9, 2, 9).
        split = first.unflatten(1, (-1, self.taps)).unflatten(-1, (-1, self.taps))
        return torch.einsum("gikjk->gij", split) / self.taps

    @property
    def positions(self) -> Tensor:
        """The second moment of the taps (groups, K, K), of mean diagonal 1: summed over the channels."""
        first, *rest = self.factors
        if rest or self.taps == 1:
            return rest[0] if rest else first.new_ones(len(first), 1, 1)
        split = first.unflatten(1, (-1, self.taps)).unflatten(-1, (-1, self.taps))
        summed = torch.einsum("gikil->gkl", split)
        mean = summed.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return summed / mean.clamp(min=torch.finfo(summed.dtype).tiny)

    def whitened(self, inverse: Tensor) -> SecondMoment:
        """Return the metric of ``W (R (x) I)`` for the inverse ``R^-1``, (I, I) or (I,) in each group."""
        first, *rest = self.factors
        if first.dim() == 2:
            return replace(self, factors=(first * inverse**2, *rest))
        taps = 1 if rest else self.taps
        turned = inverse if inverse.dim() == 2 else inverse.mT
        # D C D^T = (D R) (R^-1 C R^-T) (D R)^T, where R stands for R (x) I: C R^-T first, then
        # its transpose times R^-T.
        half = times_channels(first, turned, taps)
        return replace(self, factors=(times_channels(half.mT, turned, taps), *rest))


def times_channels(matrix: Tensor, factor: Tensor, taps: int) -> Tensor:
    """Return ``M (F (x) I_taps)`` for (groups, rows, channels * taps), F dense or diagonal in each group."""
    split = matrix.unflatten(-1, (-1, taps))
    if factor.dim() == 2:
        return (split * factor[:, None, :, None]).flatten(2)
    return torch.einsum("grik,gij->grjk", split, factor).flatten(2)


def _times(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return the product in the dtype of the factor, given back in that of the matrix."""
    same = matrix.to(factor.dtype)
    return (same * factor.unsqueeze(1) if factor.dim() == 2 else same @ factor).to(matrix.dtype)


def times_rows(factor: Tensor, matrix: Tensor) -> Tensor:
    """Return ``F M`` for (groups, rows, n), F dense or diagonal in each group."""
    return matrix * factor.unsqueeze(-1) if factor.dim() == 2 else factor @ matrix


def add_ridge(factor: Tensor, ridge: float) -> Tensor:
    """Add ``ridge * mean(diagonal) * identity`` in place, and return the factor; zero becomes the identity."""
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, ridge * mean, 1)
    return factor


@dataclass(frozen=True, eq=False)
class Root:
    """R with ``R R^T = M`` for a moment M: a lower triangle, a symmetric root, or the diagonal (groups, m) of one.

    They differ by an orthogonal matrix, so that the singular values of anything multiplied by them are the same.
    """

    matrix: Tensor
    triangular: bool = False

    @property
    def turned(self) -> Tensor:
        """R^T."""
        return self.matrix.mT if self.matrix.dim() == 3 else self.matrix

    def solve(self, matrix: Tensor) -> Tensor:
        """Return ``R^-1 X`` for X (groups, m, n)."""
        if self.matrix.dim() == 2:
            return matrix / self.matrix.unsqueeze(-1)
        if self.triangular:
            return torch.linalg.solve_triangular(self.matrix, matrix, upper=False)
        solved: Tensor = torch.linalg.solve(self.matrix, matrix)
        return solved

    def solve_turned(self, matrix: Tensor) -> Tensor:
        """Return ``R^-T X`` for X (groups, m, n)."""
        if not self.triangular:
            return self.solve(matrix)  # R is symmetric
        return torch.linalg.solve_triangular(self.matrix.mT, matrix, upper=True)

    @property
    def inverse(self) -> Tensor:
        """R^-1."""
        if self.matrix.dim() == 2:
            return 1 / self.matrix
        one = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return self.solve(one.expand_as(self.matrix))


def symmetric_root(moment: Tensor, ridge: float) -> Root:
    """Return the symmetric root of ``moment + ridge * mean(diagonal)``.

    Eigenvalues that rounding made negative are raised to the ridge.
    """
    if moment.dim() == 2:
        return Root(add_ridge(moment.clamp(min=0), ridge).sqrt())
    values, vectors = torch.linalg.eigh(moment)
    values = add_ridge(values.clamp(min=0), ridge).sqrt().unsqueeze(-2)
    return Root((vectors * values) @ vectors.mT)


def root_of(make: Callable[[], Tensor], ridge: float) -> Root:
    """Return the triangle of ``moment + ridge * mean(diagonal)``; the symmetric root if that is not definite.

    Cholesky gives it without eigenvalues, in the memory of the moment: ``make`` makes a new one, or a copy.
    """
    moment = make()
    if moment.dim() == 2:
        return symmetric_root(moment, ridge)
    # The transpose is the same matrix, in the order of LAPACK, which then needs no copy of its own.
    lower = add_ridge(moment, ridge).mT
    info = torch.empty(lower.shape[:-2], dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return symmetric_root(make(), ridge) if bool(info.any()) else Root(lower, triangular=True)


def low_rank(matrix: Tensor, rank: int, metric: SecondMoment) -> tuple[Tensor, Tensor]:
    """Return (left, right), (g, m, rank) and (g, rank, n), whose product is nearest to the matrix under the metric.

    Both are in float64, and balanced: the square root of each singular value of the product is on both sides.
    """
    matrix = matrix.double()
    if matrix.shape[-2] <= matrix.shape[-1] or len(metric.factors) > 1:
        # U of W C W^T, (m, n) (n, n) (n, m): the vectors of the left side, which is the shorter one.
        basis = leading_eigen(metric.times(matrix) @ matrix.mT, rank)[1]
        return _balanced(basis, basis.mT @ matrix)
    (moment,) = metric.factors
    if moment.dim() == 2:
        root = moment.sqrt().unsqueeze(1)
        basis = leading_eigen((matrix * root).mT @ (matrix * root), rank)[1]
        return _balanced((matrix * root) @ basis, basis.mT / root)
    lower = root_of(moment.clone, _NEXT_TO_NOTHING)
    # V of L^T W^T W L, (n, n). What V selects of W L goes back through L^-1: (m, r) (r, n).
    seen = matrix @ lower.matrix
    basis = leading_eigen(seen.mT @ seen, rank)[1]
    return _balanced(seen @ basis, lower.solve_turned(basis).mT)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    # left right = Q (R right), and with the eigenvectors V of (R right) (R right)^T it is (Q V) (V^T R right): the rows
    # of the second are orthogonal, and their norms are the singular values.
    basis, rest = torch.linalg.qr(left)
    right = rest @ right
    vectors = torch.linalg.eigh(right @ right.mT).eigenvectors.flip(-1)
    right = vectors.mT @ right
    values = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    root = torch.where(values > 0, values, 1).sqrt()
    return (basis @ vectors) * root.mT, right / root


def refine(
    build: Callable[[Sequence[Tensor]], Tensor],
    factors: Sequence[Tensor],
    target: Tensor,
    metric: SecondMoment,
    *,
    steps: int = 4,
    iterations: int = 8,
) -> list[Tensor]:
    """Return factors whose kernel is nearer to a target under a metric; factors of equal norms converge faster.

    ``build`` makes the kernel (g, O, I, *size) of the factors and is linear in each; all have one dtype. There are at
    most ``steps`` Gauss-Newton steps of at most ``iterations`` conjugate gradients each. The error never grows.
    """
    factors = list(factors)
    error = float(metric.energy((build(factors) - target).flatten(2)))
    for _ in range(steps):
        step = _gauss_newton(build, factors, target, metric, iterations)
        before = error
        for halving in range(_HALVINGS):
            moved = [f + s / 2**halving for f, s in zip(factors, step, strict=True)]
            found = float(metric.energy((build(moved) - target).flatten(2)))
            if found < error:
                factors, error = moved, found
                break
        if not error < (1 - _GAIN) * before:
            break
    return factors


def _gauss_newton(
    build: Callable[[Sequence[Tensor]], Tensor],
    factors: Sequence[Tensor],
    target: Tensor,
    metric: SecondMoment,
    iterations: int,
) -> list[Tensor]:
    """Return the step of truncated conjugate gradients."""
    # ``pulled`` is J^T dual, which is linear in ``dual``; so its derivative along a direction is J direction.
    # Invariant of the loop: residual = -J^T C (W' - W) - J^T C J step, orthogonal to those before it. Example in one
    # factor with J = 2, C = 1 and W' - W = 3: residual -6, curvature 4, so that one iteration gives the step -1.5,
    # and W' + J step = W.
    with torch.enable_grad():
        leaves = [factor.detach().requires_grad_() for factor in factors]
        image = build(leaves)
        dual = torch.zeros_like(image, requires_grad=True)
        pulled = torch.autograd.grad(image, leaves, dual, create_graph=True)

    def pull(kernel: Tensor) -> list[Tensor]:
        weighted = metric.times(kernel.flatten(2)).view_as(kernel)
        return list(torch.autograd.grad(image, leaves, weighted, retain_graph=True))

    residual = [-part for part in pull(image.detach() - target)]
    step, direction = [torch.zeros_like(part) for part in residual], residual
    size = first = _dot(residual, residual)
    for _ in range(iterations):
        # The sizes are squares: the residual has fallen to a thousandth.
        if size <= 1e-6 * first:
            break
        (pushed,) = torch.autograd.grad(pulled, dual, direction, retain_graph=True)
        curved = pull(pushed)
        length = size / max(_dot(direction, curved), torch.finfo(torch.float64).tiny)
        step = [s + length * d for s, d in zip(step, direction, strict=True)]
        residual = [r - length * c for r, c in zip(residual, curved, strict=True)]
        before, size = size, _dot(residual, residual)
        direction = [r + (size / before) * d for r, d in zip(residual, direction, strict=True)]
    return step


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))


def equal_norms(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return factors of one product, scaled to the geometric mean of their norms."""
    norms = torch.stack([torch.linalg.vector_norm(factor) for factor in factors])
    if not bool((norms > 0).all()):
        return list(factors)
    mean = norms.log().mean().exp()
    return [factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True)]
