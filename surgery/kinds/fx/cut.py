"""The network of a torch graph, and what has to go from stage to stage when it is cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.nn import Module

from surgery.errors import InputError
from surgery.kinds.fx.nodes import function_name
from surgery.sites.network import Network, Operation, Value

__all__ = [
    "Border",
    "Facts",
    "borders",
    "check_stages",
    "checks",
    "copy_node",
    "is_operation",
    "joined",
    "make_network",
]


@dataclass(frozen=True, eq=False)
class Facts:
    """What a kind knows of the nodes of a graph, in addition to the graph itself.

    ``tensors`` gives the names of the parameters, buffers and constants that a node reads, ``size`` the bytes of its
    value, and ``macs`` its multiply-accumulates; ``sent`` says whether it can be sent to another stage. ``extra`` are
    values that an operation gives besides its own, and ``layer`` gives the module at a path, if nodes call modules.
    """

    tensors: Callable[[Node], Sequence[str]]
    size: Callable[[Node], int]
    macs: Callable[[Node], int]
    bytes_of: Mapping[str, int]
    keys: Mapping[str, Hashable]
    sent: Callable[[Node], bool]
    together: Sequence[Iterable[int]] = ()
    extra: Mapping[int, Sequence[Node]] = field(default_factory=dict)
    layer: Callable[[str], Module] | None = None


def is_operation(node: Node) -> bool:
    """Whether a node computes something."""
    return node.op in ("call_function", "call_module", "call_method")


def make_network(
    operations: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], facts: Facts
) -> tuple[Network, tuple[Node, ...]]:
    """Return the network of a graph, and the nodes of its values.

    Raises:
        InputError: the graph has no operations.
    """
    if not operations:
        raise InputError("the model has no operations, so it cannot be cut", allowed="models that compute something")
    gives = [(node, *facts.extra.get(at, ())) for at, node in enumerate(operations)]
    nodes = (*inputs, *(node for row in gives for node in row))
    numbers = {node: number for number, node in enumerate(nodes)}
    rows = tuple(
        Operation(
            node.name,
            _kind(node, facts.layer),
            tuple(numbers[other] for other in node.all_input_nodes if other in numbers),
            tuple(numbers[other] for other in row),
            tuple(facts.tensors(node)),
            facts.macs(node),
        )
        for node, row in zip(operations, gives, strict=True)
    )
    values = tuple(Value(node.name, facts.size(node)) for node in nodes)
    ends = tuple(numbers[node] for node in outputs)
    groups = joined([*facts.together, *_bound(operations, facts.sent)])
    network = Network(rows, values, tuple(range(len(inputs))), ends, facts.bytes_of, facts.keys, groups)
    return network, nodes


def _kind(node: Node, layer: Callable[[str], Module] | None) -> str:
    if node.op == "call_module" and layer is not None:
        return type(layer(str(node.target))).__name__
    return str(node.target.overloadpacket) if isinstance(node.target, OpOverload) else function_name(node)


def _bound(operations: Sequence[Node], sent: Callable[[Node], bool]) -> list[set[int]]:
    """Return groups of operations whose values cannot be sent: tuples, truths and other objects stay where they are."""
    numbers = {node: number for number, node in enumerate(operations)}
    return [
        {number, *(numbers[user] for user in node.users if user in numbers)}
        for node, number in numbers.items()
        if not sent(node)
    ]


def checks(operations: Sequence[Node]) -> list[set[int]]:
    """Return each operation that nothing reads, such as a check of inputs, with the next one: it makes no stage.

    What only such operations read goes with them.
    """
    last = len(operations) - 1
    idle: set[Node] = set()
    for node in reversed(operations):
        if idle.issuperset(node.users):
            idle.add(node)
    return [{at, at + 1 if at < last else max(0, last - 1)} for at, node in enumerate(operations) if node in idle]


def joined(groups: Iterable[Iterable[int]]) -> tuple[frozenset[int], ...]:
    """Return groups of at least two numbers; groups that share a number become one.

    >>> joined([{1, 2}, {4}, {5, 3}, {2, 3}])
    (frozenset({1, 2, 3, 5}),)
    """
    # Invariant: no two groups in ``found`` share a number. A new group takes in all those that it meets: {2,
    # 3} joins {1, 2} and {5, 3}.
    found: list[set[int]] = []
    for group in map(set, groups):
        apart = [other for other in found if not other & group]
        found = [*apart, group.union(*(other for other in found if other & group))]
    return tuple(frozenset(group) for group in found if len(group) > 1)


@dataclass(frozen=True)
class Border:
    """The values that a stage takes and gives, by number, in order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def check_stages(network: Network, stage_of: Sequence[int]) -> int:
    """Return the number of stages.

    Raises:
        InputError: there is not one stage for each operation, a stage is empty, a value would go to an earlier stage,
            or operations that have to stay together are apart.
    """
    if len(stage_of) != len(network.operations):
        raise InputError(f"stages for {len(stage_of)} operations", allowed=f"one for each of {len(network.operations)}")
    count = max(stage_of) + 1
    if set(stage_of) != set(range(count)):
        raise InputError(
            f"the stages {sorted(set(stage_of))}", allowed="numbers from 0 on, and no stage without operations"
        )
    for number, operation in enumerate(network.operations):
        for value in operation.reads:
            source = network.producer.get(value)
            if source is not None and stage_of[source] > stage_of[number]:
                what = f"{operation.name} in stage {stage_of[number]} reads a value of stage {stage_of[source]}"
                raise InputError(what, allowed="values of the same stage or an earlier one")
    for group in network.together:
        if len({stage_of[number] for number in group}) > 1:
            names = ", ".join(network.operations[number].name for number in sorted(group)[:3])
            raise InputError(
                f"{names} are in different stages", allowed="one stage for operations that share what they change"
            )
    return count


def borders(network: Network, stage_of: Sequence[int], idle: Iterable[int] = ()) -> list[Border]:
    """Return what each stage takes and gives: the inputs of the model first, each value once.

    ``idle`` are inputs of the model that no operation reads; stage 0 takes them, so that none is lost.
    """
    count = max(stage_of) + 1
    # A value goes from the stage that gives it to each stage that reads it, and does not pass through those in between.
    # Example: of stages 0, 1, 2, a value of stage 0 that 2 reads is an output of 0 and an input of 2 alone.
    inputs: list[set[int]] = [set(idle), *(set() for _ in range(1, count))]
    outputs: list[set[int]] = [set() for _ in range(count)]
    at = {value: stage_of[number] for value, number in network.producer.items()}
    for number, operation in enumerate(network.operations):
        for value in operation.reads:
            if at.get(value) != stage_of[number]:
                inputs[stage_of[number]].add(value)
                if value in at:
                    outputs[at[value]].add(value)
    for value in network.outputs:
        if value in at:
            outputs[at[value]].add(value)
    return [Border(tuple(sorted(i)), tuple(sorted(o))) for i, o in zip(inputs, outputs, strict=True)]


def copy_node(graph: Graph, node: Node, of: Callable[[Node], Node]) -> Node:
    """Copy a node to the end of another graph, under its own name; fx would rename a node ``input``."""
    copied = graph.node_copy(node, of)
    copied.name = node.name
    return copied
