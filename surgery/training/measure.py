"""Measured seconds of a forward and a backward pass in torch: of an operator, of its chains, and of whole models.

Passes run at the real batch shape, in training mode and in a given memory format, interleaved with those that they are
compared with. On a CPU a factored convolution may take several times as long as the dense one in the default format,
and a small part of it in ``channels_last``, so a time means nothing without its format. The global random state is left
as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.algebra import Chain, Form, Operator, Shape
from surgery.cost.timing import Budget, Samples, interleave
from surgery.kinds.inputs import Inputs, random_tensor
from surgery.kinds.layers.factored import build_steps
from surgery.kinds.layers.modules import build_module

__all__ = ["PassTimer", "has_formats", "time_models"]

_Key = tuple[Form, tuple[tuple[Form, ...], ...], Shape]  # forms of the operator and of each chain, input shape

_SITE = Budget(seconds=0.15, min_rounds=3, max_rounds=50, warmup_rounds=1)
_MODEL = Budget(seconds=0.6, min_rounds=1, max_rounds=20, warmup_rounds=1)  # one round of long passes tells enough


def has_formats(operators: Sequence[Operator]) -> bool:
    """Whether any operator is a convolution over two dimensions; all other operators have one memory format."""
    return any(operator.spatial_dims == 2 for operator in operators)


@dataclass(frozen=True, eq=False)
class PassTimer:
    """Times operators against chains, each combination of forms once; ``channels_last`` is the memory format."""

    channels_last: bool = False
    _known: dict[_Key, tuple[Samples, ...]] = field(default_factory=dict, repr=False)

    def compare(self, dense: Operator, chains: Sequence[Chain], shape: Shape) -> tuple[Samples, ...]:
        """Return the times of the operator and then of each chain; the chains may be on the meta device."""
        forms = tuple(tuple(operator.form for operator in chain.operators) for chain in chains)
        key = (dense.form, forms, shape)
        if key not in self._known:
            steps: list[Operator | Chain] = [dense, *chains]
            with torch.random.fork_rng():
                self._known[key] = interleave([self._pass(step, dense, shape) for step in steps], _SITE)
        return self._known[key]

    def _pass(self, step: Operator | Chain, dense: Operator, shape: Shape) -> Callable[[], object]:
        device, dtype = dense.weight.device, dense.weight.dtype
        like = nn.Linear(1, 1, device=device, dtype=dtype)
        step = step.to(device="meta")
        module = nn.Sequential(*build_steps(step, like)) if isinstance(step, Chain) else build_module(step, like)
        _fill(module.to_empty(device=device))
        x = _input(dense, shape).to(device)
        if self.channels_last and x.dim() == 4:
            module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x.requires_grad_(x.is_floating_point())
        return _run_pass(module, ((x,), {}))


def time_models(models: Sequence[nn.Module], inputs: Inputs) -> tuple[Samples, ...]:
    """Return the times of a forward and backward pass of each model; give copies, because their buffers change."""
    with torch.random.fork_rng():
        return interleave([_run_pass(model.train(), inputs) for model in models], _MODEL)


def _run_pass(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    args, kwargs = inputs
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    leaves = [leaf for leaf in args if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run() -> None:
        with torch.enable_grad():
            # autograd.grad leaves no gradients in the parameters, as backward would
            outputs = [leaf for leaf in pytree.tree_leaves(_plain(module(*args, **kwargs))) if _differentiable(leaf)]
            torch.autograd.grad(outputs, [*trained, *leaves], [_ones(y) for y in outputs], allow_unused=True)
        if outputs and outputs[0].is_cuda:
            torch.cuda.synchronize()

    return run


def _plain(output: Any) -> Any:
    """Return an output in a form that pytree knows: transformers returns mappings of its own classes."""
    return dict(output) if isinstance(output, Mapping) else output


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _ones(output: Tensor) -> Tensor:
    return torch.ones_like(output)


def _fill(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=max(1, parameter[0].numel()) ** -0.5)  # 1 / sqrt(fan-in): values stay near 1


def _input(dense: Operator, shape: Shape) -> Tensor:
    if dense.reads_indices:
        return torch.randint(dense.in_channels, shape)
    return random_tensor(shape, dense.weight.dtype)
