"""Carry an optimizer's moments across a change of parameters ``W = W(F_1, ..., F_n)``, both ways, by the chain rule.

J = dW/dF is the Jacobian at the present factors. All is in float64. The matrix of J is never built: ``J^T u`` is one
backward pass through the composition, and ``J x`` is the derivative of ``J^T u`` by u.

    gradients, down        m_F = J^T m_W: exact while the factors hold still
    gradients, back        the least m_W with J^T m_W = m_F (least squares where there is none)
    velocities, down       the least m_F with J m_F = m_W (least squares where there is none)
    velocities, back       m_W = J m_F: exact
    second moments, down   v_F = c (J^2)^T v_W, one number c for each factor: c = ||J^T m_W||^2 / 1^T (J^2)^T m_W^2
    second moments, back   v_W = J^2 ((v_F / c) / (J^2)^T 1) / (J^2 1)

Adam's first moment is an average of gradients that is scaled before it moves anything: it is carried as a gradient.
SGD's momentum is the step itself: it is carried as a velocity. Carried as a gradient it would move the product by
``J J^T m_W``, which may be several times as fast as the weight moved before, since each factor moves the product.

With c = 1 the rule for second moments is exact if the entries of the gradient are independent with a mean of zero. They
are not: the gradient of a weight is a sum of few outer products, and the factors lie along the large ones, so v_F comes
out several times too small (`tools/bench_continuity.py` measures this). The first moment is an example of such a
gradient: c is the energy of its pull-back, divided by the energy that independent entries would give.

``J^2`` has the squares of the entries of J. It is approximated by the Jacobian at the squared factors. The two are the
same if each entry is one product (svd; tucker's core); otherwise the approximation leaves out the cross terms, which
have a mean of zero for factors of random signs. The way back averages over the entries of the factors, weighted by how
strongly each depends on an entry of W, so a uniform variance comes back unchanged.

Conjugate gradients (``least_squares``) find the least solutions; a step costs one backward pass and one derivative of
it. They end when the missing part hardly moves the weight (as with nearly collinear components of cp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from surgery.training.least_squares import least_squares

__all__ = ["Compose", "Jacobian"]

Compose = Callable[[Sequence[Tensor]], Tensor]


class Jacobian:
    """The derivative of a composition by its factors, as functions that multiply by it.

    ``compose`` maps the factors to the weight by differentiable tensor code. It must be a polynomial in which each term
    has each factor at most once. Results are in float64.

    >>> factors = [torch.tensor([[2.0]]), torch.tensor([[3.0]])]
    >>> jacobian = Jacobian(lambda pair: pair[0] @ pair[1], factors)  # W = a b, so dW = b da + a db
    >>> jacobian.push([torch.tensor([[1.0]]), torch.tensor([[10.0]])]).item()
    23.0
    >>> [part.item() for part in jacobian.pull(torch.tensor([[1.0]]))]
    [3.0, 2.0]
    """

    def __init__(self, compose: Compose, factors: Sequence[Tensor]) -> None:
        # The pull ``J^T p`` is linear in p, so the derivative of <J^T p, x> by p is ``J x``. Keep the pull as a graph
        # over a probe p of zeros, whose value does not matter.
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
        """Return ``J directions``, in the shape of the weight."""
        wide = [direction.double() for direction in directions]
        pushed: Tensor = torch.autograd.grad(self._pulled, self._probe, wide, retain_graph=True)[0]
        return pushed

    def squared(self) -> Jacobian:
        """Return the Jacobian at the squared factors, which approximates the squared entries of this one."""
        return Jacobian(self._compose, [factor.detach().square() for factor in self._factors])

    def pull_back(self, moments: Sequence[Tensor]) -> Tensor:
        """Return the least-norm tensor whose pull is nearest to the moments: an exact inverse if they are a pull.

        Distances are in units of each factor entry's effect on the weight, so the scales of the factors do not matter.
        """
        # With D = diag((J^2)^T 1)^(-1/2) this solves  min ||D (J^T m - moments)||.  The diagonal has the squared length
        # of each column of J, which is how far an entry of a factor moves the weight.
        told = self.squared().pull(torch.ones_like(self._weight))
        units = [torch.where(t > 0, t, 1).rsqrt() for t in told]

        def pull(row: Sequence[Tensor]) -> list[Tensor]:
            return _times(units, self.pull(row[0]))

        return least_squares(pull, lambda row: [self.push(_times(units, row))], _times(units, moments))[0]

    def push_back(self, change: Tensor) -> list[Tensor]:
        """Return the least-norm directions of the factors whose push is nearest to a given change of the weight."""
        return least_squares(lambda row: [self.push(row)], lambda row: self.pull(row[0]), [change])

    def pull_squares(self, squares: Tensor, mean: Tensor) -> list[Tensor]:
        """Return the second moments of the factors' gradients, from the second moment and mean of the weight's."""
        rows = self.squared()
        coherence = self._coherence(rows, mean)
        return [c * part for c, part in zip(coherence, rows.pull(squares), strict=True)]

    def pull_back_squares(self, squares: Sequence[Tensor], mean: Tensor) -> Tensor:
        """Return the second moment of the weight's gradient, from those of the factors' and the weight's mean."""
        # (v_F / c) / (J^2)^T 1 is the variance of a weight entry as each factor entry sees it. Its average over the
        # factor entries that reach a weight entry, with weights J^2, is v_W.
        rows = self.squared()
        told = rows.pull(torch.ones_like(self._weight))
        independent = [square.double() / c for square, c in zip(squares, self._coherence(rows, mean), strict=True)]
        shares = [_over(part, t) for part, t in zip(independent, told, strict=True)]
        return _over(rows.push(shares), rows.push([torch.ones_like(share) for share in shares]))

    def _coherence(self, rows: Jacobian, mean: Tensor) -> list[Tensor]:
        """Return c for each factor; 1 if the mean is zero."""
        found = []
        for pulled, independent in zip(self.pull(mean), rows.pull(mean.double().square()), strict=True):
            energy, expected = pulled.square().sum(), independent.sum()
            found.append(torch.where((energy > 0) & (expected > 0), energy / expected, 1))
        return found


def _times(units: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [unit.to(tensor.dtype) * tensor for unit, tensor in zip(units, tensors, strict=True)]


def _over(values: Tensor, by: Tensor) -> Tensor:
    # The inner ``where`` avoids 0 / 0, which would be NaN even where the outer one discards it.
    return torch.where(by > 0, values / torch.where(by > 0, by, 1), 0)
