"""nn.MultiheadAttention with its packed projections as modules of their own, so that each can be factored.

    q = Wq x + bq    k = Wk y + bk    v = Wv z + bv    out = Wo softmax(q kT / sqrt(D) + mask) v + bo

nn.MultiheadAttention keeps Wq, Wk and Wv (E, E) as the rows of one in_proj_weight (3E, E), which only a function reads.
UnpackedAttention calls them as in_proj_q, in_proj_k and in_proj_v. The cost in MACs is the same, in three products
instead of one; ``unpack`` and ``repack`` only copy, so they are exact, and the results are equal up to rounding.

Axes are counted from the ends, so the code does not depend on their number. With H heads of D features, both layouts,
(..., L, E) with the batch first and (L, ..., E) with the length first, become (..., H, L, D), batched or not, and
torch.fx can trace the code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from surgery.errors import InputError, Refusal
from surgery.kinds.layers.carried import carry, mark, refuse_carrying

__all__ = ["PROJECTIONS", "UnpackedAttention", "repack", "unpack"]

PROJECTIONS = ("in_proj_q", "in_proj_k", "in_proj_v")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _NoTensor:
    """Stands for in_proj_weight: any torch function that gets it raises a TypeError.

    It also switches off the packed kernel of nn.TransformerEncoderLayer and the nested tensors of
    nn.TransformerEncoder, which only that kernel accepts: both are not used for weights that override torch functions.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return NotImplemented


class UnpackedAttention(nn.MultiheadAttention):
    """Attention that calls ``in_proj_q``, ``in_proj_k``, ``in_proj_v`` and ``out_proj``, modules on (..., features).

    ``unpack`` makes it. The projections have no bias: ``in_proj_bias`` (3E,) stays one parameter. All other attributes
    and parameters, the training flag and the hooks are those of the original attention; out_proj and the biases are the
    same objects. Each of the four modules may be replaced by one that maps the same widths, such as low-rank factors.
    """

    in_proj_weight: Any = _NoTensor()
    in_proj_q: nn.Module
    in_proj_k: nn.Module
    in_proj_v: nn.Module

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        carry(self, attention, own=[*attention._parameters, *attention._modules])
        packed = ("in_proj_weight", *_SEPARATE)  # kept as None, so that repack finds the order of the parameters
        self._parameters = {k: None if k in packed else v for k, v in attention._parameters.items()}
        self._modules = _projections(attention) | attention._modules

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and the attention weights (None unless needed), as nn.MultiheadAttention does.

        Shapes: query (N, L, E), key (N, S, kdim), value (N, S, vdim) where ``batch_first``, else with the first two
        axes swapped, or all without N; key_padding_mask (N, S); attn_mask (L, S) or (N * heads, L, S); the weights
        (N, L, S), or (N, heads, L, S) where they are not averaged.

        Raises:
            InputError: is_causal without attn_mask.
        """
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask, and there is none", next_step="give attn_mask too")
        # q (..., H, L, D), k and v (..., H, S, D); the steps are those of nn.MultiheadAttention, so results agree with
        # its own
        q = self._heads(self.in_proj_q(query), 0)
        k = self._lengthened(self._heads(self.in_proj_k(key), 1), self.bias_k)
        v = self._lengthened(self._heads(self.in_proj_v(value), 2), self.bias_v)
        # torch's attention uses the hint in the place of the mask in this case only; in all others it needs the mask
        # itself
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k, query.dtype)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            mixed, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        # (..., H, L, D) back to (..., L, H, D) or (L, ..., H, D), whose last two axes are the features
        return self.out_proj(mixed.movedim(-2, self._length_axis).flatten(-2)), weights

    @property
    def _length_axis(self) -> int:
        """The axis of the sequence once the features are split into heads."""
        return -3 if self.batch_first else 0

    def _heads(self, x: Tensor, part: int) -> Tensor:
        """Add a projection's third of the bias and split into heads: (..., H, L, D)."""
        # (N, L, E) -> (N, L, H, D) -> (N, H, L, D), and (L, N, E) -> (L, N, H, D) -> (N, H, L, D)
        if self.in_proj_bias is not None:
            x = x + self.in_proj_bias[part * self.embed_dim : (part + 1) * self.embed_dim]
        return x.unflatten(-1, (self.num_heads, self.head_dim)).movedim(self._length_axis, -2)

    def _lengthened(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the rows of add_bias_kv and of add_zero_attn to keys or values (..., H, S, D)."""
        if bias is not None:
            # (1, 1, E) is split into heads, (H, 1, D), and repeated for the batch
            row = bias.view(self.num_heads, 1, self.head_dim)
            x = torch.cat([x, row.expand(x.shape[:-2] + row.shape[-2:])], -2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what both masks add to the scores (..., H, L, S); the appended keys are never masked."""
        parts = []
        if attn_mask is not None:
            # a mask (N * heads, L, S) has one matrix for each sample and head; a mask (L, S) serves all
            leading = q.shape[:-2] if attn_mask.dim() == 3 else torch.Size()
            parts.append(_additive(attn_mask, dtype).reshape(leading + attn_mask.shape[-2:]))
        if padding is not None:
            parts.append(_additive(padding, dtype)[..., None, None, :])
        if not parts:
            return None
        # both masks are added up at their own sizes before the appended keys get zeros
        appended = (self.bias_k is not None) + self.add_zero_attn
        whole = F.pad(parts[0] if len(parts) == 1 else parts[0] + parts[1], (0, appended))
        return whole.expand(q.shape[:-1] + k.shape[-2:-1])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask (true: do not attend) into a mask to add to the scores; return other masks as they are."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Return attention's values (..., L, D) and weights (..., L, S)."""
    # (..., H, L, D) @ (..., H, D, S) -> (..., H, L, S)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights


def unpack(attention: nn.MultiheadAttention) -> UnpackedAttention | Refusal:
    """Return the attention with its projections as modules, or why it must stay as it is.

    The argument is not changed. Only its three projection weights are copied; all else is shared.

    Example:
        >>> attention = nn.MultiheadAttention(16, 4)
        >>> [name for name, _ in unpack(attention).named_children()]
        ['in_proj_q', 'in_proj_k', 'in_proj_v', 'out_proj']
    """
    kind, own = type(attention).__name__, attention._parameters
    parametrized = torch.nn.utils.parametrize.is_parametrized(attention)
    if not parametrized and (type(attention) is not nn.MultiheadAttention or "forward" in vars(attention)):
        return Refusal(
            f"{kind} may compute something other than nn.MultiheadAttention: it is a subclass or has its own forward"
        )
    if parametrized or (own.get("in_proj_weight") is None and any(own.get(name) is None for name in _SEPARATE)):
        return Refusal("its weights are computed from other parameters (weight norm or another parametrization)")
    # UnpackedAttention calls out_proj, so a forward of its own, which nn.MultiheadAttention ignores, would run
    if getattr(type(attention.out_proj), "forward", None) is not nn.Linear.forward:
        reads = "but nn.MultiheadAttention reads its weight and bias without calling it"
        return Refusal(f"its out_proj is a {type(attention.out_proj).__name__}, {reads}")
    reason = refuse_carrying(attention)
    return UnpackedAttention(attention) if reason is None else Refusal(reason)


def repack(attention: UnpackedAttention) -> nn.MultiheadAttention:
    """Return an nn.MultiheadAttention with the projections as one weight again: the inverse of ``unpack``.

    Parameters have the names, shapes and order of the original class. The argument is not changed; all but
    in_proj_weight is shared with it.

    Raises:
        InputError: a projection is not a plain nn.Linear of the original shape, or in_proj_q, in_proj_k and in_proj_v
            cannot be one parameter: they have a bias, or differ in dtype, device or requires_grad.
    """
    e = attention.embed_dim
    widths = (e, attention.kdim, attention.vdim)
    weights = [_plain(attention, name, n).weight for name, n in zip(PROJECTIONS, widths, strict=True)]
    out_proj = _as_out_proj(_plain(attention, "out_proj", e))
    new: nn.MultiheadAttention = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
    nn.Module.__init__(new)
    carry(new, attention, own=[*attention._parameters, *attention._modules])
    same = attention._qkv_same_embed_dim
    packed: dict[str, Any] = {"in_proj_weight": _one(weights)} if same else dict(zip(_SEPARATE, weights, strict=True))
    new._parameters = {name: packed.get(name, tensor) for name, tensor in attention._parameters.items()}
    children = {name: module for name, module in attention._modules.items() if name not in PROJECTIONS}
    new._modules = children | {"out_proj": out_proj}
    return new


def _projections(attention: nn.MultiheadAttention) -> dict[str, nn.Module | None]:
    """Copy the rows of the packed weight, or the three weights of the kdim/vdim form, into modules."""
    packed = attention._parameters["in_proj_weight"]
    sources: list[Tensor] = [getattr(attention, name) if packed is None else packed for name in _SEPARATE]
    parts = sources if packed is None else packed.detach().chunk(3)
    linears = [_linear(part, source).train(attention.training) for part, source in zip(parts, sources, strict=True)]
    return dict(zip(PROJECTIONS, linears, strict=True))


def _linear(weight: Tensor, source: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=source.requires_grad)
    mark(linear.weight, source)
    return linear


def _plain(attention: UnpackedAttention, name: str, width: int) -> nn.Linear:
    """Return a projection if nn.MultiheadAttention can hold it; else raise InputError."""
    module, bias_too = getattr(attention, name), name == "out_proj"
    weight = module._parameters.get("weight") if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) else None
    shape = (attention.embed_dim, width)
    if weight is None or weight.shape != shape or (module.bias is not None and not bias_too):
        raise InputError(
            f"nn.MultiheadAttention cannot hold {name}, {type(module).__name__}({module.extra_repr()})",
            allowed=f"a plain nn.Linear with a weight {shape}{'' if bias_too else ' and no bias'}",
            next_step="recompose it first",
        )
    return module


def _one(weights: list[Tensor]) -> nn.Parameter:
    """Return three weights as the rows of one parameter; raise InputError if they cannot be one."""
    kinds = {(weight.dtype, weight.device, weight.requires_grad) for weight in weights}
    if len(kinds) > 1:
        raise InputError(
            f"{', '.join(PROJECTIONS)} cannot be rows of one parameter",
            allowed="one dtype, one device and one requires_grad for all three",
        )
    whole = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=weights[0].requires_grad)
    mark(whole, weights[0])
    return whole


def _as_out_proj(linear: nn.Linear) -> NonDynamicallyQuantizableLinear:
    """Return a linear layer as the class that dynamic quantization leaves alone.

    nn.MultiheadAttention needs this class, because it reads the weight without calling the layer.
    """
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return linear
    new = NonDynamicallyQuantizableLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    new.weight, new.bias = linear.weight, linear.bias
    carry(new, linear)
    return new.train(linear.training)
