"""Models are cut into stages that give the same bits in a row, and are joined again to what they were."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Pieces
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import kind_of
from surgery.sites.network import Network
from tests.covering import ALL
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


def again(program: ExportedProgram) -> ExportedProgram:
    """The same program after it was saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def saved(pieces: Pieces) -> Pieces:
    """The same pieces after their programs were saved and loaded."""
    stages = tuple(type(p)(again(p.model), p.inputs, p.outputs) for p in pieces.stages)
    return Pieces(stages, pieces.inputs, pieces.outputs, pieces.whole)


def covered(wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Each network as one of the wanted kinds, which take turns; as all of them where all laws are asked for."""
    found = []
    for turn, (name, kinds) in enumerate(KINDS_OF.items()):
        own = [kind for kind in kinds if wanted(kind)]
        found += [(name, kind) for kind in (own if ALL else [own[turn % len(own)]])]
    return found


PROGRAMS = covered(lambda kind: kind.startswith("program"))


@pytest.mark.parametrize(("name", "kind_name"), PROGRAMS)
def test_stages_of_a_program_give_the_same_bits_and_join_to_the_same_program(name: str, kind_name: str) -> None:
    program, inputs = graph(name, kind_name)
    kind = kind_of(program)
    cuttable = kind.cuttable(program, ((), {}))
    stages = acyclic(cuttable.network, 3, seed=len(name))
    pieces, expected = cuttable.cut(stages), call(program, inputs)
    for each in (pieces, saved(pieces)) if ALL else (saved(pieces),):
        with torch.no_grad():
            assert equal(run(kind, each, inputs), expected)
        joined = kind.join(each)
        check_same(joined, program)
        assert equal(call(joined, inputs), expected)


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
        return str(value.dtype), str(tuple(value.shape))  # torch simplifies symbolic strides when it loads
    return [_form(each) for each in value] if isinstance(value, list | tuple) else str(value)


GRAPHS = covered(lambda kind: not kind.startswith("program"))


@pytest.mark.parametrize(("name", "kind_name"), GRAPHS)
def test_stages_of_a_graph_or_module_give_the_same_bits_and_share_its_parameters(name: str, kind_name: str) -> None:
    model, inputs = graph(name, kind_name)
    kind = kind_of(model)
    cuttable = kind.cuttable(model, normalise_inputs(inputs))
    pieces = cuttable.cut(acyclic(cuttable.network, 3, seed=len(name)))
    with torch.no_grad():
        assert equal(run(kind, pieces, inputs), call(model, inputs))
    own = {id(p) for p in model.parameters()}
    assert {id(p) for piece in pieces.stages for p in piece.model.parameters()} <= own
    assert kind.join(pieces) is model


class Learner(nn.Module):
    """Batch norm, dropout and an activation in place: what training mode and writes change."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.drop, self.leave = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.drop(self.relu(self.norm(self.enter(x))).mean((2, 3))))


def halves(network: Network) -> list[int]:
    return acyclic(network, 2, seed=1)


@pytest.mark.parametrize("traced", [True, False])
def test_training_through_stages_trains_the_module(traced: bool) -> None:
    model = Learner()
    if not traced:  # torch.fx's trace would not see a hook
        model.enter.register_forward_hook(lambda module, args, output: output)
    other, x = copy.deepcopy(model), torch.randn(6, 3, 8, 8)
    kind = kind_of(model)
    cuttable = kind.cuttable(model, ((x[:4],), {}))
    pieces = cuttable.cut(halves(cuttable.network))
    results = []
    for network, forward in ((other, other), (model, lambda x: run(kind, pieces, (x,)))):
        torch.manual_seed(1)
        out = forward(x)  # a batch of another size than the example's
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Counter(nn.Module):
    """A buffer that is read, changed and read again, an input that is an output, a constant, and an output twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, Any]:
        y = self.first(x + self.seen)
        self.seen.add_(1)
        z = self.second(y) * self.seen
        return {"x": x, "z": z, "again": (z, None, 3), "y": y}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own specs
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_buffer_that_changes_stays_in_one_stage_and_strange_outputs_come_back(decomposed: bool) -> None:
    inputs = torch.randn(2, 3), torch.ones(1)
    program = torch.export.export(Counter(), inputs)
    program = program.run_decompositions() if decomposed else program
    kind = kind_of(program)
    cuttable = kind.cuttable(program, ((), {}))
    readers = {n for n, operation in enumerate(cuttable.network.operations) if "seen" in operation.tensors}
    assert any(readers <= group for group in cuttable.network.together)
    pieces = cuttable.cut(halves(cuttable.network))
    assert len(pieces.stages) == 2
    for each in (pieces, saved(pieces)):
        joined = kind.join(each)
        check_same(joined, program)
        assert equal(run(kind, saved(each), inputs), call(again(program), inputs))


def test_ties_are_said_and_come_back() -> None:
    program, _ = graph("tied", "program")
    cuttable = kind_of(program).cuttable(program, ((), {}))
    keys = cuttable.network.keys
    assert keys["first.weight"] == keys["second.weight"] != keys["enter.weight"]
    joined = kind_of(program).join(saved(cuttable.cut(acyclic(cuttable.network, 4, seed=0))))
    assert joined.state_dict["first.weight"].data_ptr() == joined.state_dict["second.weight"].data_ptr()


def damaged(whole: dict[str, Any]) -> list[dict[str, Any]]:
    first, *rest = whole["operations"]
    call_of = whole["calls"][0]
    named = call_of | {"signature": call_of["signature"] | {"forward_arg_names": ["x):\n  import os\n#"]}}
    return [
        {},
        whole | {"operations": [*rest, first]},
        whole | {"operations": rest},
        whole | {"operations": [[first[0], 7], *rest]},
        whole | {"operations": [[first[0], -1], *rest]},
        whole | {"operations": [first, *whole["operations"]]},
        whole | {"operations": 3},
        whole | {"state": whole["state"][1:]},
        whole | {"state": [*whole["state"], "other"]},
        whole | {"ties": [["a", "b"]]},
        whole | {"ties": [[whole["state"][0], whole["state"][1]]]},
        whole | {"guards": ["__import__('os').system('true')"]},
        whole | {"calls": [named]},
        whole | {"calls": []},
        whole | {"signature": {"input_specs": [], "output_specs": []}},
    ]


def test_values_that_do_not_fit_the_stages_are_refused() -> None:
    program, _ = graph("mlp", "program")
    kind = kind_of(program)
    pieces = kind.cuttable(program, ((), {})).cut([0, 0, 1, 1, 1])
    whole = json.loads(json.dumps(pieces.whole))
    kind.join(Pieces(pieces.stages, pieces.inputs, pieces.outputs, whole))
    for each in damaged(whole):
        with pytest.raises(InputError):
            kind.join(Pieces(pieces.stages, pieces.inputs, pieces.outputs, each))


def test_stages_that_cannot_be_are_refused() -> None:
    program, _ = graph("mlp", "program")
    cuttable = kind_of(program).cuttable(program, ((), {}))
    for stages in ([0, 1], [1, 0, 1, 1, 1], [0, 0, 2, 2, 2]):
        with pytest.raises(InputError):
            cuttable.cut(stages)


class _Counted(dict[str, Any]):
    """JSON values that count how often their signature is looked up."""

    looks = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.looks += key == "signature"
        return super().get(key, default)


def test_what_is_said_of_the_whole_is_read_once_however_often_its_stages_run() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.ones(2, 4),))
    kind = kind_of(program)
    pieces = kind.cuttable(program, ((torch.ones(2, 4),), {})).cut([0, 1])
    said = _Counted(pieces.whole)
    pieces = Pieces(pieces.stages, pieces.inputs, pieces.outputs, said)
    for _ in range(3):
        run(kind, pieces, torch.ones(2, 4))
    assert said.looks == 1
