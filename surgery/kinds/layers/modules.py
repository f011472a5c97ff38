"""Read and build modules that are operators: nn.Linear, nn.Embedding, the nn.Conv family and GPT-2's Conv1D.

A subclass is an operator too, if its forward calls one operator on a weight of its own (see ``within``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from surgery.algebra import Conv, Embedding, Layout, Linear, Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.layers.around import inner_shape, read_within
from surgery.kinds.layers.layer_call import base_of
from surgery.kinds.layers.steps import is_link_module
from surgery.kinds.layers.tensors import conv_geometry, refuse_tensor, stored_weight
from surgery.kinds.layers.within import Within, within_of

__all__ = [
    "buffers_of",
    "build_module",
    "called_shape",
    "is_operator_module",
    "is_outlined",
    "is_tracked_norm",
    "read_module",
    "refuse_module",
    "replace_module",
    "stored_as",
    "weight_of",
    "weight_path",
]


_CONVS: dict[type[nn.Module], tuple[bool, int]] = {
    nn.Conv1d: (False, 1),
    nn.Conv2d: (False, 2),
    nn.Conv3d: (False, 3),
    nn.ConvTranspose1d: (True, 1),
    nn.ConvTranspose2d: (True, 2),
    nn.ConvTranspose3d: (True, 3),
}
_REASONS: dict[str, str] = {
    "EmbeddingBag": "bags of embeddings are not handled",
    "MultiheadAttention": "its projections are packed in one weight; factor the module or an exported program instead",
}


def _is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether a class is transformers' Conv1D, a linear layer that stores its weight as (in, out)."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_operator_module(module: nn.Module) -> bool:
    """Whether a module is an operator, by its class or by what its forward calls."""
    kind = type(module)
    return _is_exact(kind) or base_of(kind) is not None or isinstance(within_of(module), Within)


def _is_exact(kind: type[nn.Module]) -> bool:
    """Whether a class is exactly one of the known classes of operators, and not a subclass."""
    return kind in (nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding) or kind in _CONVS or _is_conv1d(kind)


def weight_path(module: nn.Module) -> str:
    """Return the path, below a module, of the parameter with the numbers of the operator's weight."""
    within = within_of(module)
    return within.weight if isinstance(within, Within) else "weight"


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter with the numbers of an operator's weight; None if the module has none."""
    path, _, name = weight_path(module).rpartition(".")
    return module.get_submodule(path)._parameters.get(name)


def called_shape(module: nn.Module, shape: Shape) -> Shape:
    """Return the input shape of a module's operator, for an input shape of the module.

    Raises:
        InputError: the module's forward does not run at that shape.
    """
    within = within_of(module)
    return inner_shape(module, within, shape) if isinstance(within, Within) else shape


def is_outlined(module: nn.Module) -> bool:
    """Whether a graph has the calls of the module's parts as an outline, in addition to the module's own call."""
    return getattr(module, "outlined", False)


def stored_as(kind: type[nn.Module]) -> Layout:
    """Return the layout in which a class of modules stores its weight, "out_in" or "in_out"."""
    return "in_out" if _is_conv1d(kind) else "out_in"


def read_module(module: nn.Module, *, detached: bool = True) -> Operator | Refusal:
    """Return the operator of a module of a known class, or why the module is not an operator.

    Unless ``detached``, the operator has the parameters themselves, and they are not checked; so torch.compile can
    trace this function.
    """
    # a layer with a weight that is not a plain parameter, or of a class that is not torch's, is read by following it
    own_weight = module._parameters.get("weight")
    if own_weight is None or not _is_exact(type(module)):
        within = within_of(module)
        if isinstance(within, Within):
            return (_refuse_parts(module, within) if detached else None) or read_within(module, within)
        if isinstance(within, Refusal):
            return within
    if own_weight is None:
        return Refusal("its weight is computed from other parameters (weight norm or another parametrization)")
    own_bias = module._parameters.get("bias")
    for name, tensor in (("weight", own_weight), ("bias", own_bias)):
        if detached and tensor is not None and (reason := refuse_tensor(tensor, name)) is not None:
            return Refusal(reason)
    weight: Tensor = own_weight.detach() if detached else own_weight
    bias = own_bias.detach() if detached and own_bias is not None else own_bias
    if isinstance(module, nn.Embedding):
        return _read_embedding(module, weight)
    if base_of(type(module)) not in _CONVS:
        return Linear(weight.t() if _is_conv1d(type(module)) else weight, bias=bias)
    conv: Any = module
    geometry = conv_geometry(
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        output_padding=conv.output_padding,
        transposed=conv.transposed,
        padding_mode=conv.padding_mode,
    )
    return geometry if isinstance(geometry, Refusal) else Conv(weight, geometry, conv.groups, bias=bias)


def _refuse_parts(module: nn.Module, within: Within) -> Refusal | None:
    own = dict(module.named_parameters(remove_duplicate=False))
    reasons = (refuse_tensor(own[name]) for name in sorted(within.names) if name in own)
    return next((Refusal(reason) for reason in reasons if reason is not None), None)


def _read_embedding(module: nn.Embedding, weight: Tensor) -> Operator | Refusal:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return Refusal("it renormalises its rows, or has gradients of its own (max_norm, scale_grad_by_freq, sparse)")
    return Embedding(weight, padding_index=module.padding_idx)


def refuse_module(module: nn.Module) -> str | None:
    """Return why a leaf module with matrix weights is not a site, or None if it has no such weights."""
    name = type(module).__name__
    if is_link_module(module) or is_outlined(module) or "surgery_steps" in vars(module):
        return None  # the reasons for a chain are given elsewhere
    if name in _REASONS:
        return _REASONS[name]
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "it is quantized; change the model before it is quantized"
    if any(map(is_lazy, module.parameters(recurse=False))):
        return "its weight is not made yet; run the model once"
    if isinstance(within := within_of(module), Refusal):
        return within.reason
    if is_parametrized(module):
        return "its weight is computed from other parameters (weight norm or another parametrization)"
    # norms may have weights of two axes and more, but they are not products with a matrix
    norms = nn.LayerNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm | nn.GroupNorm
    if isinstance(module, norms) or not any(p.dim() > 1 for p in module.parameters() if not is_lazy(p)):
        return None
    return f"{name} is not handled yet"


def build_module(
    operator: Operator, like: nn.Module, *, last: bool = True, kind: type[nn.Module] | None = None
) -> nn.Module:
    """Return a module for an operator, with the training flag of ``like``.

    Its class is ``kind``, or the class of ``like``, if that class can hold the operator; otherwise it is torch's own.
    """
    kwargs: dict[str, Any] = {"bias": operator.bias is not None, "device": "meta", "dtype": operator.weight.dtype}
    module: nn.Module
    kind = kind or type(like)
    stored: Layout = "out_in"
    if isinstance(operator, Conv):
        module = _build_conv(operator, kwargs)
    elif isinstance(operator, Embedding):
        del kwargs["bias"]
        module = nn.Embedding(operator.in_channels, operator.out_channels, operator.padding_index, **kwargs)
    # transformers' Conv1D always has a bias
    elif last and _is_conv1d(kind) and operator.bias is not None:
        made: Any = kind
        module, stored = made(operator.out_channels, operator.in_channels), "in_out"
    elif last and kind is NonDynamicallyQuantizableLinear:
        module = kind(operator.in_channels, operator.out_channels, **kwargs)
    else:
        module = nn.Linear(operator.in_channels, operator.out_channels, **kwargs)
    module.weight = nn.Parameter(_own(stored_weight(operator, stored)))
    if operator.bias is not None:
        module.bias = nn.Parameter(_own(operator.bias))
    return module.train(like.training)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _build_conv(conv: Conv, kwargs: dict[str, Any]) -> nn.Module:
    g = conv.geometry
    # modules are made on the meta device and get their tensors afterwards, so that no numbers are drawn at random
    kind: Callable[..., nn.Module] = next(k for k, v in _CONVS.items() if v == (g.transposed, g.dims))
    if g.transposed:
        kwargs["output_padding"] = g.output_padding
    padding = tuple(before for before, _ in g.padding) if g.symmetric else "same"
    return kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=g.stride,
        padding=padding,
        dilation=g.dilation,
        groups=conv.groups,
        padding_mode=g.padding_mode,
        **kwargs,
    )


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of the one at a dotted path."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent).register_module(name, new)


def is_tracked_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def buffers_of(root: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of the batch norm at a path."""
    return root.get_buffer(f"{path}.running_mean"), root.get_buffer(f"{path}.running_var")
