"""Moments of an optimizer across a change of parameters ``W = W(F_1, ..., F_n)``, both ways, by the chain rule.

J = dW/dF is the Jacobian at the present factors. All in float64; no matrix of J is ever built: ``J^T u`` is one
backward pass through the composition, ``J x`` is the derivative of ``J^T u`` by u.

    gradients, down        m_F = J^T m_W: exact while the factors hold still
    gradients, back        the least m_W with J^T m_W = m_F (least squares where there is none)
    velocities, down       the least m_F with J m_F = m_W (least squares where there is none)
    velocities, back       m_W = J m_F: exact
    second moments, down   v_F = c (J^2)^T v_W, one number c for each factor: c = ||J^T m_W||^2 / 1^T (J^2)^T m_W^2
    second moments, back   v_W = J^2 ((v_F / c) / (J^2)^T 1) / (J^2 1)

An average of gradients that is scaled before it moves anything (Adam's first moment) is a gradient. One that is the
step itself (SGD's momentum) is a velocity: taken for a gradient it would move the product by ``J J^T m_W``, which may
be several times as fast as the weight moved before, since each factor moves the product on its own.

With c = 1 the rule for second moments is exact for gradients whose entries are independent with a mean of zero. They
are not: the gradient of a weight is a sum of few outer products, and factors lie along the large ones, so that v_F
comes out several times too small (`tools/bench_continuity.py` measures it). The first moment is such a gradient: c is
by how much it exceeds, in all, what independent entries would give.

``J^2`` has the squares of the entries of J. It is taken to be the Jacobian at the squared factors: the same where an
entry is one product (svd; tucker's core), and else without the cross terms, which have a mean of zero for factors of
random signs. Going back averages over the entries of factors, weighted by how much each tells of an entry of W: a
uniform variance comes back as it was.

What is least is found by conjugate gradients (``least_squares``); a step costs one backward pass and one derivative of
it. They end where what is still missing hardly moves the weight (nearly collinear components of cp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from surgery.training.least_squares import least_squares

__all__ = ["Compose", "Jacobian"]

Compose = Callable[[Sequence[Tensor]], Tensor]


class Jacobian:
    """The derivative of a composition by its factors, as products with it.

    ``compose`` maps the factors to the weight by differentiable tensor code; it is a polynomial that has each factor
    at most once in each term. Results are in float64.
    """

    def __init__(self, compose: Compose, factors: Sequence[Tensor]) -> None:
        self._compose = compose
        with torch.enable_grad():
            self._factors = [factor.detach().double().requires_grad_() for factor in factors]
            self._weight = compose(self._factors)
            self._probe = torch.zeros_like(self._weight, requires_grad=True)
            self._pulled = torch.autograd.grad(self._weight, self._factors, self._probe, create_graph=True)

    @property
    def weight(self) -> Tensor:
        """The composed weight."""
        return self._weight.detach()

    def pull(self, moment: Tensor) -> list[Tensor]:
        """Return ``J^T moment``, one tensor for each factor."""
        return list(torch.autograd.grad(self._weight, self._factors, moment.double(), retain_graph=True))

    def push(self, directions: Sequence[Tensor]) -> Tensor:
        """Return ``J directions``, of the shape of the weight."""
        wide = [direction.double() for direction in directions]
        pushed: Tensor = torch.autograd.grad(self._pulled, self._probe, wide, retain_graph=True)[0]
        return pushed

    def squared(self) -> Jacobian:
        """Return the Jacobian at the squared factors, which stands for the squares of its entries."""
        return Jacobian(self._compose, [factor.detach().square() for factor in self._factors])

    def pull_back(self, moments: Sequence[Tensor]) -> Tensor:
        """Return the least-norm tensor whose pull is nearest to the moments: exact where they are the pull of one.

        Near is measured in units of what each entry of a factor does to the weight, so that their scales do not matter.
        """
        told = self.squared().pull(torch.ones_like(self._weight))
        units = [torch.where(t > 0, t, 1).rsqrt() for t in told]

        def pull(row: Sequence[Tensor]) -> list[Tensor]:
            return _times(units, self.pull(row[0]))

        return least_squares(pull, lambda row: [self.push(_times(units, row))], _times(units, moments))[0]

    def push_back(self, change: Tensor) -> list[Tensor]:
        """Return the least-norm directions of the factors whose push is nearest to a change of the weight."""
        return least_squares(lambda row: [self.push(row)], lambda row: self.pull(row[0]), [change])

    def pull_squares(self, squares: Tensor, mean: Tensor) -> list[Tensor]:
        """Return the second moments of the factors' gradients, from the two moments of the weight's."""
        rows = self.squared()
        coherence = self._coherence(rows, mean)
        return [c * part for c, part in zip(coherence, rows.pull(squares), strict=True)]

    def pull_back_squares(self, squares: Sequence[Tensor], mean: Tensor) -> Tensor:
        """Return the second moment of the weight's gradient, from those of the factors' and from its mean."""
        rows = self.squared()
        told = rows.pull(torch.ones_like(self._weight))
        independent = [square.double() / c for square, c in zip(squares, self._coherence(rows, mean), strict=True)]
        shares = [_over(part, t) for part, t in zip(independent, told, strict=True)]
        return _over(rows.push(shares), rows.push([torch.ones_like(share) for share in shares]))

    def _coherence(self, rows: Jacobian, mean: Tensor) -> list[Tensor]:
        """Return c for each factor; 1 where the mean says nothing."""
        found = []
        for pulled, independent in zip(self.pull(mean), rows.pull(mean.double().square()), strict=True):
            energy, expected = pulled.square().sum(), independent.sum()
            found.append(torch.where((energy > 0) & (expected > 0), energy / expected, 1))
        return found


def _times(units: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [unit.to(tensor.dtype) * tensor for unit, tensor in zip(units, tensors, strict=True)]


def _over(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, values / torch.where(by > 0, by, 1), 0)
