"""The laws of the design over whole networks, on every graph kind: decompose, recompose, and what must not change.

Each combination is one test, with the laws as its subtests: they look at one factored model and one that was put back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra import relative_error
from surgery.errors import Refusal
from surgery.factorizations import FACTORIZATIONS, fitting
from surgery.files.load import load
from surgery.files.save import save
from surgery.kinds.layers.attention import UnpackedAttention
from surgery.kinds.layers.recurrent import UnpackedGRU, UnpackedLSTM
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.passes.recompose import RecomposeResult, recompose
from surgery.passes.results import DecomposeResult
from surgery.runtime.export import export_onnx
from surgery.sites import Site
from tests.covering import ALL, grouped, tried
from tests.tolerances import reduction, tolerance
from tests.zoo import KINDS_OF, ZOO, Inputs, call, graph

PAIRS = [grouped(name, kind) for name, kinds in KINDS_OF.items() for kind in kinds]
every_graph = pytest.mark.parametrize(("name", "kind"), PAIRS)
# "auto" mixes the methods; that it is exact and comes back is seen at full rank on every graph.
ROWS = [grouped(*row) for row in tried(KINDS_OF, [*["auto"] * ALL, *FACTORIZATIONS])]


def state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict if isinstance(model, ExportedProgram) else model.state_dict())


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state(model).items()}


def unique_parameters(model: Any) -> int:
    found = model.parameters()
    return sum({p.data_ptr(): p.numel() for p in found}.values())


def outputs(model: Any, inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]


def assert_same(actual: list[Tensor], expected: list[Tensor], sites: tuple[Site, ...], *, steps: int = 4) -> None:
    """Outputs agree to the dtype, given the longest sum and the number of operators in a row."""
    length = max([reduction(site.operator) for site in sites], default=1)
    allowed = tolerance(torch.float32, length=length, steps=steps * max(1, sum(site.calls for site in sites)))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert relative_error(a, e) <= allowed


def lower_ranks(sites: tuple[Site, ...], factorization: str = "auto") -> dict[str, tuple[int, ...]]:
    """Half of each full rank, for each site that a factorization fits."""
    ranks = {}
    for site in sites:
        fits = fitting(site.operator, factorization)
        if not isinstance(fits, Refusal):
            ranks[site.name] = tuple(math.ceil(r / 2) for r in fits[0].max_ranks(site.operator))
    return ranks


@functools.cache
def seen(name: str, kind: str) -> tuple[tuple[Site, ...], int]:
    """Return the sites of a graph, and the multiply-accumulates that are counted in a run."""
    model, inputs = graph(name, kind)
    return find_sites(model, inputs)[0], counted_macs(model, inputs)


@pytest.mark.law(3)
@every_graph
def test_full_rank_is_the_identity(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    sites, _ = find_sites(model, inputs)
    before = outputs(model, inputs)
    result = decompose(model, inputs, ranks="full")
    factored = {c.site for c in result.changes}
    assert factored | {s.name for s in result.skips} >= {s.name for s in sites}
    assert isinstance(result.model, torch.fx.GraphModule if isinstance(model, torch.fx.GraphModule) else type(model))
    assert_same(outputs(result.model, inputs), before, sites)
    assert_same(outputs(model, inputs), before, ())  # the given model is as it was
    back = recompose(result.model, inputs)
    assert {c.site for c in back.changes} >= factored
    assert shapes(back.model) == shapes(model)
    assert_same(outputs(back.model, inputs), before, sites, steps=8)


@dataclass(frozen=True)
class Factored:
    """A graph, what decompose made of it at lower ranks, and what recompose made of that."""

    name: str
    kind: str
    model: Any
    inputs: Inputs
    sites: tuple[Site, ...]
    factorization: str
    result: DecomposeResult[Any]
    back: RecomposeResult[Any]


@pytest.mark.parametrize(("name", "kind", "factorization"), ROWS)
def test_the_laws_of_a_factored_graph(name: str, kind: str, factorization: str, subtests: pytest.Subtests) -> None:
    model, inputs = graph(name, kind)
    sites, _ = seen(name, kind)
    ranks = lower_ranks(sites, factorization)
    if not ranks:
        assert all(isinstance(fitting(site.operator, factorization), Refusal) for site in sites)
        return
    result = decompose(model, inputs, ranks=ranks, factorization=factorization)
    assert len(result.changes) == len(ranks)
    it = Factored(name, kind, model, inputs, sites, factorization, result, recompose(result.model, inputs))
    for law in (the_method_is_the_one_asked_for, the_architecture_comes_back, costs_are_real, only_sites_change):
        with subtests.test(law.__name__):
            law(it)


def the_method_is_the_one_asked_for(it: Factored) -> None:
    plain = {c.factorization for c in it.result.changes if not c.note}
    assert it.factorization == "auto" or plain <= {it.factorization}
    noted = [(c.factorization, it.factorization) for c in it.result.changes if c.note]
    assert all(pair == ("tucker", "cp") for pair in noted)


def the_architecture_comes_back(it: Factored) -> None:
    assert shapes(it.back.model) == shapes(it.model)
    factored = outputs(it.result.model, it.inputs)
    assert_same(outputs(it.back.model, it.inputs), factored, it.sites)
    original, _ = ZOO[it.name]()
    trained = {k: v for k, v in state(it.back.model).items() if k in original.state_dict()}
    assert set(trained) == set(state(it.model)) & set(original.state_dict())
    original.load_state_dict({**original.state_dict(), **trained}, strict=True)
    assert_same(outputs(original, it.inputs), factored, it.sites)


def costs_are_real(it: Factored) -> None:
    result = it.result
    assert unique_parameters(it.model) == result.before.parameters
    assert unique_parameters(result.model) == result.after.parameters
    saved = seen(it.name, it.kind)[1] - counted_macs(result.model, it.inputs)
    assert saved == result.before.macs - result.after.macs
    for change, decision in zip(result.changes, [d for d in result.plan if not d.dense], strict=True):
        assert (change.parameters, change.macs) == (decision.parameters, decision.macs)


def recurrent_flops(
    x: Sequence[int], input_weight: Sequence[int], recurrent_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * x[0] * x[1] * (math.prod(input_weight) + math.prod(recurrent_weight))


def looped(model: Any) -> Any:
    loops = isinstance(model, ExportedProgram) and "scan" in str(model.graph)
    return Loops(model.module()).run if loops else model


def counted_macs(model: Any, inputs: Inputs) -> int:
    torch.backends.mha.set_fastpath_enabled(False)  # of which the counter sees nothing
    unknown = {torch.ops.aten.mkldnn_rnn_layer: recurrent_flops}
    try:
        with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
            call(looped(model), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


def only_sites_change(it: Factored) -> None:
    if not hasattr(it.model, "graph"):
        untouched_modules(it)
        return
    it.result.model.graph.lint()
    old = [(n.op, str(n.target)) for n in it.model.graph.nodes]
    new = [(n.op, str(n.target)) for n in it.result.model.graph.nodes]
    names = {c.site for c in it.result.changes}
    calls = sum(site.calls for site in it.sites if site.name in names)
    kept = [row for row in old if row in new]
    assert len(old) - len(kept) <= 4 * calls  # call, weight, bias, transpose
    words = ("conv", "linear", "mm", "matmul", "lstm.", "gru.", "getitem", "weight_norm")
    others = [row for row in old if not any(word in row[1] for word in words)]
    functions = [row for row in others if row[0] in ("call_function", "call_method", "output")]
    rest = iter(new)
    moved = [row for row in functions if "t.default" not in row[1] and "permute" not in row[1]]
    assert all(row in rest for row in moved), "the nodes outside of the sites stand in their old order"


UNPACKED = {nn.MultiheadAttention: UnpackedAttention, nn.LSTM: UnpackedLSTM, nn.GRU: UnpackedGRU}


def untouched_modules(it: Factored) -> None:
    changed = {c.site for c in it.result.changes}
    paths = {path for s in it.sites if s.name in changed for path in (s.name, *s.aliases)}
    new = dict(it.result.model.named_modules(remove_duplicate=False))
    for path, module in it.model.named_modules(remove_duplicate=False):
        if path not in paths and not any(path.startswith(f"{p}.") for p in paths):
            packed = any(p.startswith(f"{path}.{part}_") for p in paths for part in ("in_proj", "ih", "hh"))
            assert type(new[path]) is (UNPACKED[type(module)] if packed else type(module))
            for key, tensor in new[path].named_parameters(recurse=False):
                assert torch.equal(tensor, getattr(module, key))


class Loops(Interpreter):
    """Runs a loop over steps in Python, where the counter sees it."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.higher_order.scan:
            return super().call_function(target, args, kwargs)
        body, state, parts, others = args
        rows = []
        for step in zip(*parts, strict=True):
            *state, row = body(*state, *step, *others)
            rows.append(row)
        return [*state, torch.stack(rows)]


@pytest.mark.law(9)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("name", ["resnet-basic", "cnn-1d", "attention", "recurrent"])
def test_a_factored_program_is_saved_loaded_exported_and_fused(name: str, factorization: str, tmp_path: Path) -> None:
    program, inputs = graph(name, "program-dynamic")
    sites, _ = find_sites(program, inputs)
    ranks = lower_ranks(sites, factorization)
    result = decompose(program, inputs, ranks=ranks, factorization=factorization)
    expected = outputs(result.model, inputs)
    save(result.model, tmp_path / "factored.pt2")
    loaded = load(tmp_path / "factored.pt2")
    assert_same(outputs(loaded, inputs), expected, ())
    assert isinstance(inputs, tuple)
    larger = tuple(torch.cat([x] * 16) for x in inputs)  # torch guards that a batch is below 16 for some convolutions
    assert_same([torch.cat([y] * 16) for y in expected], outputs(loaded, larger), sites)
    assert_same(outputs(result.model, larger), outputs(loaded, larger), ())
    back = recompose(loaded)
    assert shapes(back.model) == shapes(program)
    assert export_onnx(loaded, tmp_path / "factored.onnx").relative_error < 1e-4
