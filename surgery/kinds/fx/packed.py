"""The packed projections of attention in graphs of functions: unpacked when a graph is opened, packed again at the end.

    linear(x, in_proj_weight (3E, I), in_proj_bias)  <->  cat(linear(x, q), linear(x, k), linear(x, v)) + in_proj_bias

The rows of in_proj_weight become the parameters in_proj_q.weight, in_proj_k.weight and in_proj_v.weight, so that each
is a site. Packing gives the original call, name and shape again; the record of the packed weight says where to pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node

from surgery.algebra import Linear
from surgery.kinds.fx.functional import is_aten
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.write import FunctionEdits
from surgery.kinds.layers.attention import PROJECTIONS
from surgery.kinds.layers.tensors import key_of
from surgery.kinds.layers.unpacking import part_weights
from surgery.sites import Call

__all__ = ["pack", "unpack"]

_CATS = (torch.cat, torch.ops.aten.cat.default)
_SUMS = (torch.add, torch.ops.aten.add.Tensor)


def unpack(kind: FunctionEdits) -> bool:
    """Unpack each packed projection whose weight only one call uses; return whether there was one.

    Cross attention splits the packed weight itself before it uses the parts; this is left alone.
    """
    calls = [call for call in kind.reader.packed_calls if _is_alone(kind, call)]
    for call in calls:
        _unpack_call(kind, call)
    return bool(calls)


def _is_alone(kind: FunctionEdits, call: Call) -> bool:
    tensor = kind.reader.parameters[call.weight]
    key = key_of(tensor)
    # parts of a weight that is tied, or read by another node, would come apart
    alone = kind.reader.uses[key] == {kind.node(call.value)} and len(kind.reader.names[key]) == 1
    alone = alone and call.computed_bias is None and call.weight not in kind.reader.lifted
    return alone and isinstance(call.operator, Linear) and call.stored == "out_in" and tensor.shape[0] % 3 == 0


def _unpack_call(kind: FunctionEdits, call: Call) -> None:
    tensor, source = kind.reader.parameters[call.weight], kind.node(call.source)
    old = kind.node(call.value)
    rows = []
    # rows [0, E) are q, [E, 2E) are k and [2E, 3E) are v; they are copied, so they can be factored one by one
    for name, weight in zip(part_weights(call.weight), tensor.detach().chunk(3), strict=True):
        kind.add_parameter([name], nn.Parameter(weight.clone(), requires_grad=tensor.requires_grad))
        rows.append(kind.insert(Linear(weight), source, (name, None), like=old, stored="out_in"))
    with kind.graph.inserting_before(old):
        # the bias stays whole and is added to the concatenation, as it was added to the product
        node = kind.graph.call_function(_CATS[is_aten(old)], (rows, -1))
    kind.stamp(node, old)
    if call.bias is not None:
        node = kind.write_sum(node, kind.parameter_node(call.bias, old), like=old)
    kind.drop_parameter(call.weight)
    kind.replace(old, node)
    kind.sweep()
    kind.record = kind.record.with_packed(call.weight, PROJECTIONS)


def pack(kind: FunctionEdits) -> None:
    """Pack the projections again wherever all three parts are single linear layers."""
    if not kind.record.packed:
        return
    reader = kind.look()
    calls = {reader.node(value): call for value, call in reader.calls.items()}
    for node in [node for node in kind.graph.nodes if node.target in _CATS]:
        rows = node.args[0]
        if isinstance(rows, list | tuple) and len(rows) == len(PROJECTIONS) and all(row in calls for row in rows):
            _pack_rows(kind, reader, node, [calls[row] for row in rows])


def _pack_rows(kind: FunctionEdits, reader: Reader, node: Node, calls: Sequence[Call]) -> None:
    nodes = [reader.node(call.value) for call in calls]
    names = [call.weight for call in calls]
    packed = next((name for name in kind.record.packed if part_weights(name) == names), None)
    # three dense layers of one value, without biases, that only this concatenation reads, under the names that unpack
    # gave them
    plain = all(call.bias is None for call in calls) and all(len(row.users) == 1 for row in nodes)
    if packed is None or not plain or len({call.source for call in calls}) > 1:
        return
    weights = [reader.parameters[name] for name in names]
    rows, source = torch.cat(weights).detach(), reader.node(calls[0].source)
    kind.add_parameter([packed], nn.Parameter(rows, requires_grad=weights[0].requires_grad))
    last, bias = _with_bias(reader, node, f"{packed.removesuffix('weight')}bias")
    new = kind.insert(Linear(rows), source, (packed, bias), like=last, stored="out_in", style=nodes[0])
    kind.replace(last, new)
    for old in (*([node] if last is not node else []), *reversed(nodes)):
        kind.graph.erase_node(old)
    for name in names:
        kind.drop_parameter(name)
    kind.sweep()
    kind.record = kind.record.without_packed(packed)


def _with_bias(reader: Reader, node: Node, name: str) -> tuple[Node, str | None]:
    """Return the addition of the packed bias to a node, and the bias's name; ``(node, None)`` if there is none."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _SUMS and len(users[0].args) == 2:
        other = users[0].args[1]
        if isinstance(other, Node) and reader.providers.get(other) == name:
            return users[0], name
    return node, None
