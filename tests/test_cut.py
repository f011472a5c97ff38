"""Models are cut into stages that give the same bits in a row, and are joined again to what they were."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgery.kinds.base import Pieces
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import kind_of
from surgery.sites.network import Network
from tests.zoo import KINDS_OF, call, graph


def acyclic(network: Network, count: int, seed: int) -> list[int]:
    """A random stage of each operation: values go forward only, and what has to stay together does."""
    number_of = {at: at for at in range(len(network.operations))}
    for group in network.together:
        number_of |= dict.fromkeys(group, min(group))
    after: dict[int, set[int]] = {home: set() for home in number_of.values()}
    for at, operation in enumerate(network.operations):
        sources = (network.producer[value] for value in operation.reads if value in network.producer)
        after[number_of[at]] |= {number_of[s] for s in sources} - {number_of[at]}
    parts = _sorted_parts(after)
    draw = random.Random(seed)
    stages: dict[int, int] = {}
    for place, part in enumerate(parts):
        least = max((stages[s] for home in part for s in after[home] - set(part)), default=0)
        even = min(count - 1, place * count // len(parts))
        chosen = max(least, even if draw.random() < 0.8 else draw.randrange(count))
        stages |= dict.fromkeys(part, chosen)
    found = [stages[number_of[at]] for at in range(len(network.operations))]
    used = sorted(set(found))
    return [used.index(stage) for stage in found]


def _sorted_parts(after: dict[int, set[int]]) -> list[list[int]]:
    """Parts in an order in which each comes after those that it reads; what makes a cycle is one part.

    Parts that stay together for one reason can read each other. Tarjan's algorithm gives each part after its sources.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(home: int) -> None:
        index[home] = low[home] = len(index)
        stack.append(home)
        for source in sorted(after[home]):
            if source not in index:
                visit(source)
                low[home] = min(low[home], low[source])
            elif source in stack:
                low[home] = min(low[home], index[source])
        if low[home] == index[home]:
            at = stack.index(home)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for home in sorted(after):
        if home not in index:
            visit(home)
    return found


def run(kind: Any, pieces: Pieces, inputs: Any) -> Any:
    args, kwargs = normalise_inputs(inputs)
    known = dict(zip(pieces.inputs, kind.leaves(pieces, args, kwargs), strict=True))
    for piece in pieces.stages:
        given = kind.run_stage(piece.model, [known[name] for name in piece.inputs])
        assert len(given) == len(piece.outputs)
        known |= dict(zip(piece.outputs, given, strict=True))
    return kind.result(pieces, [known[name] for name in pieces.outputs])


def equal(first: Any, second: Any) -> bool:
    (a, spec), (b, other) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    same = (torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
    return spec == other and all(same)


def saved(pieces: Pieces) -> Pieces:
    """The same pieces after their programs were saved and loaded."""

    def again(program: ExportedProgram) -> ExportedProgram:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)

    stages = tuple(type(p)(again(p.model), p.inputs, p.outputs) for p in pieces.stages)
    return Pieces(stages, pieces.inputs, pieces.outputs, pieces.whole)


PROGRAMS = [(name, kind) for name, kinds in KINDS_OF.items() for kind in kinds if kind.startswith("program")]


@pytest.mark.parametrize(("name", "kind_name"), PROGRAMS)
def test_stages_of_a_program_give_the_same_bits_and_join_to_the_same_program(name: str, kind_name: str) -> None:
    program, inputs = graph(name, kind_name)
    kind = kind_of(program)
    cuttable = kind.cuttable(program, ((), {}))
    stages = acyclic(cuttable.network, 3, seed=len(name))
    pieces = cuttable.cut(stages)
    for each in (pieces, saved(pieces)):
        with torch.no_grad():
            assert equal(run(kind, each, inputs), call(program, inputs))
        joined = kind.join(each)
        check_same(joined, program)
        assert equal(call(joined, inputs), call(program, inputs))


def check_same(joined: ExportedProgram, program: ExportedProgram) -> None:
    def forms(graph_: Any) -> list[Any]:
        return [
            (n.name, n.op, str(n.target), str(n.args), str(n.kwargs), _form(n.meta.get("val")))
            for n in graph_.nodes
            if n.op != "output"
        ]

    assert forms(joined.graph) == forms(program.graph)
    assert joined.graph_signature == program.graph_signature
    assert list(joined.state_dict) == list(program.state_dict)
    assert all(torch.equal(joined.state_dict[n], t) for n, t in program.state_dict.items())
    assert list(joined.constants) == list(program.constants)
    assert str(joined.module_call_graph) == str(program.module_call_graph)
    assert joined.range_constraints == program.range_constraints
    assert joined._guards_code == program._guards_code
    assert joined.call_spec == program.call_spec
    assert equal(joined.example_inputs, program.example_inputs)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), str(tuple(value.shape)), str(value.stride())
    return [_form(each) for each in value] if isinstance(value, list | tuple) else str(value)
