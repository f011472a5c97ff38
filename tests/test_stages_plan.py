"""The planning of stages: its laws over small random graphs, against every cut there is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import InputError
from surgery.sites.network import Network, Operation, Value
from surgery.stages.blocks import Blocks, blocks_of
from surgery.stages.bounds import crossing_bound, simple_bound
from surgery.stages.downsets import down_sets, optimum
from surgery.stages.dynamic import _MOST_CUTS, best_cut
from surgery.stages.loads import Loads
from surgery.stages.milp import program
from surgery.stages.orders import fiedler, orders
from surgery.stages.problem import Assignment, Problem
from surgery.stages.reduce import reduced
from surgery.stages.refine import refine
from surgery.stages.solve import solve


def network(seed: int, count: int, *, grouped: bool = False) -> Network:
    """Return a random graph whose operations read one to three values, and share some tensors."""
    draw = random.Random(seed)
    values, operations = [Value("x", 100)], []
    for number in range(count):
        reads = tuple(sorted({draw.randrange(len(values)) for _ in range(draw.randint(1, 3))}))
        tensors = (f"w{draw.randrange(count)}",)
        operations.append(Operation(f"o{number}", "op", reads, (len(values),), tensors))
        values.append(Value(f"v{number}", draw.randint(1, 60)))
    sizes = {f"w{number}": draw.randint(1, 90) for number in range(count)}
    together = (frozenset(draw.sample(range(count), 2)),) if grouped else ()
    return Network(tuple(operations), tuple(values), (0,), (count,), sizes, {"w0": "w1"}, together)


@st.composite
def problems(draw: st.DrawFn, most: int = 6) -> Problem:
    """Draw problems of at most ``most`` operations, of every balance, with and without relays."""
    count = draw(st.integers(3, most))
    made = network(draw(st.integers(0, 10**6)), count, grouped=draw(st.booleans()))
    seconds = tuple(draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    return Problem(
        made,
        tuple(float(one) for one in seconds),
        draw(st.integers(2, 3)),
        link=draw(st.sampled_from([None, 30.0])),
        balance=draw(st.sampled_from(["time", "params", "memory"])),
        relay=draw(st.booleans()),
        ties=draw(st.sampled_from(["copy", "together"])),
    )


def every_cut(problem: Problem, blocks: Blocks) -> list[Loads]:
    """Return all cuts into stages that have something each, and no value that goes back."""
    found = []
    for stages in itertools.product(range(problem.stages), repeat=len(blocks)):
        forward = all(stages[a] <= stages[b] for b, before in enumerate(blocks.before) for a in before)
        if forward and len(set(stages)) == problem.stages:
            found.append(Loads(problem, blocks, stages))
    return found


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_bound_is_below_every_cut_and_a_proven_cut_is_the_best(problem: Problem) -> None:
    blocks = blocks_of(problem)
    if problem.stages > len(blocks):
        with pytest.raises(InputError, match=rf"allowed: (1 to )?{len(blocks)} stages?\b"):
            solve(problem)
        return
    best = min(cut.score()[1] for cut in every_cut(problem, blocks))
    found = solve(problem)
    assert found.bound <= best * (1 + 1e-9)
    assert found.bottleneck >= best * (1 - 1e-9)
    assert not found.proven or found.bottleneck == pytest.approx(best)
    assert found.proven
    assert found.gap == 0
    assert found == solve(problem)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([None, 0.3, 3.0, 30.0]))
def test_what_crosses_around_blocks_bounds_every_cut(problem: Problem, link: float | None) -> None:
    problem = replace(problem, link=link)
    blocks = blocks_of(problem)
    scores = [cut.score()[1] for cut in every_cut(problem, blocks)]
    if scores:
        found = crossing_bound(problem, blocks, low=0.0, high=2 * max(scores))
        assert type(found) is float
        assert found <= min(scores) * (1 + 1e-6)


def test_the_fiedler_vector_of_two_rows_side_by_side_parts_them() -> None:
    operations = [Operation(str(at), "f", (at,), (at + 1,)) for at in (0, 1, 3, 4)]
    made = Network(tuple(operations), tuple(Value(f"v{at}", 1) for at in range(6)), (0, 3), (2, 5))
    found = fiedler(blocks_of(Problem(made, (1.0,) * 4, 2)))
    assert found == pytest.approx([-0.5, -0.5, 0.5, 0.5], abs=1e-3)


def row(*seconds: float) -> Network:
    operations = [Operation(str(at), "f", (at,), (at + 1,)) for at in range(len(seconds))]
    return Network(
        tuple(operations), tuple(Value(f"v{at}", 1) for at in range(len(seconds) + 1)), (0,), (len(seconds),)
    )


@pytest.mark.parametrize(
    ("seconds", "stages", "least"),
    [
        ((5.0, 9.0, 5.0), 2, 11.0),  # the longest has to be fed, and read
        ((0.5, 9.0, 5.0), 2, 10.5),  # or lies with what feeds it
        ((1.0,) * 10, 2, 5.5),  # each stage has a border; the optimum is 6
        ((1.0,) * 40, 4, 11.0),  # most have two; the optimum is 12
    ],
)
def test_the_link_is_part_of_the_bound(seconds: tuple[float, ...], stages: int, least: float) -> None:
    problem = Problem(row(*seconds), seconds, stages, link=1.0)
    assert crossing_bound(problem, blocks_of(problem), low=0.0, high=sum(seconds)) >= least * (1 - 1e-6)


@settings(max_examples=30, deadline=None)
@given(problems(5))
def test_down_sets_and_the_integer_program_agree_and_bound_every_cut(problem: Problem) -> None:
    blocks = blocks_of(problem)
    if problem.stages > len(blocks):
        return
    sets = down_sets(blocks, most=10**6)
    assert sets is not None
    found = optimum(problem, blocks, sets)
    assert found is not None
    bound, stages = program(problem, blocks, seconds=30)
    assert bound == pytest.approx(found.load, rel=1e-5)
    assert stages is not None
    scores = [cut.score()[1] for cut in every_cut(problem, blocks)]
    assert simple_bound(problem, blocks) <= found.load * (1 + 1e-9) <= min(scores) * (1 + 2e-9)
    assert found.load == pytest.approx(min(scores))
    assert found.load_of_fewer <= found.load
    assert Loads(problem, blocks, found.stage_of).score()[1] == pytest.approx(found.load)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sets(st.integers(0, 5)), st.sampled_from([0.0, 2.0, 1e9]))
def test_what_a_reduction_loses_is_at_most_what_it_says(problem: Problem, plain: set[int], loss: float) -> None:
    whole = problem.network
    made = [replace(each, tensors=()) if n in plain else each for n, each in enumerate(whole.operations)]
    problem = replace(problem, network=replace(whole, operations=tuple(made)))
    blocks = blocks_of(problem)
    smaller, lost = reduced(problem, loss=loss)
    few = blocks_of(smaller)
    assert lost <= loss
    if problem.stages > len(few):
        return
    sets = down_sets(few, most=10**6)
    assert sets is not None
    found = optimum(smaller, few, sets)
    assert found is not None
    best = min(cut.score()[1] for cut in every_cut(problem, blocks))
    assert found.load_of_fewer - lost <= best * (1 + 1e-9)


def test_a_reduction_takes_views_with_what_they_view_and_masks_with_their_first_reader() -> None:
    values = tuple(Value(f"v{n}", 8) for n in range(6))
    operations = (
        Operation("mask", "expand", (0,), (1,)),
        Operation("first", "linear", (0,), (2,), ("a",)),
        Operation("view", "view", (2,), (3,)),
        Operation("second", "attention", (3, 1), (4,), ("b",)),
        Operation("third", "attention", (4, 1), (5,), ("c",)),
    )
    made = Network(operations, values, (0,), (5,), {"a": 1, "b": 1, "c": 1})
    smaller, lost = reduced(Problem(made, (1.0, 9.0, 1.0, 9.0, 9.0), 2), loss=2.0)
    assert smaller.network.together == (frozenset({0, 3}), frozenset({1, 2}))
    assert lost == 2.0


def test_what_a_kernel_computes_at_no_cost_stays_with_it() -> None:
    rows = [("conv", 1.0), ("norm", 1e-12), ("relu", 1e-12), ("conv2", 1.0), ("relu2", 1e-12)]
    operations = tuple(Operation(name, name, (at,), (at + 1,)) for at, (name, _) in enumerate(rows))
    values = tuple(Value(f"v{at}", 8) for at in range(len(rows) + 1))
    made = Network(operations, values, (0,), (len(rows),))
    found = solve(Problem(made, tuple(time for _, time in rows), 2, link=1e3))
    assert found.stage_of == (0, 0, 0, 1, 1)
    assert found.proven


@settings(max_examples=40, deadline=None)
@given(problems(9), st.randoms(use_true_random=False))
def test_values_go_forward_groups_stay_whole_and_memory_is_kept(problem: Problem, draw: random.Random) -> None:
    if problem.stages > len(blocks_of(problem)):
        return
    free = solve(problem)
    smallest = solve(replace(problem, balance="memory", memory=None)).bottleneck
    limited = solve(replace(problem, memory=int(smallest)))
    for found in (free, limited):
        for operation, stage in zip(problem.network.operations, found.stage_of, strict=True):
            sources = [problem.network.producer[value] for value in operation.reads if value]
            assert all(found.stage_of[source] <= stage for source in sources)
        assert all(len({found.stage_of[one] for one in group}) == 1 for group in problem.network.together)
        assert set(found.stage_of) == set(range(problem.stages))
        assert sum(found.sent) <= sum(found.received)
        assert sum(found.sent) == sum(found.received) or not problem.relay
        assert problem.ties == "copy" or not found.repeated
        copies = sum(one.bytes * len(one.stages) for one in found.repeated)
        assert copies <= sum(found.tensors)
    assert max(limited.memory) <= smallest


@settings(max_examples=40, deadline=None)
@given(problems(12))
def test_the_loads_of_moved_blocks_are_those_counted_anew_and_moves_never_make_a_cut_worse(problem: Problem) -> None:
    blocks = blocks_of(problem)
    if problem.stages > len(blocks):
        return
    for _, order in orders(blocks, seeds=1):
        for relay in (False, True):
            stages = best_cut(replace(problem, relay=relay), blocks, order)
            assert stages is not None
            loads = Loads(problem, blocks, stages)
            before = loads.score()
            refine(loads, tries=3000)
            assert loads.score()[1] <= before[1] * (1 + 1e-9)
            anew = Loads(problem, blocks, loads.stage_of)
            assert loads.score() == pytest.approx(anew.score())
            assert all(loads.stage_of[a] <= loads.stage_of[b] for b, found in enumerate(blocks.before) for a in found)


@settings(max_examples=40, deadline=None)
@given(problems(9))
def test_dynamic_programming_is_at_least_as_good_as_every_cut_of_its_order(problem: Problem) -> None:
    blocks = blocks_of(problem)
    if problem.stages > len(blocks):
        return
    for _, order in orders(blocks, seeds=1):
        stages = best_cut(problem, blocks, order)
        assert stages is not None
        reached = Loads(problem, blocks, stages).score()[1]
        for cuts in itertools.combinations(range(1, len(order)), problem.stages - 1):
            other = [0] * len(order)
            for place, block in enumerate(order):
                other[block] = sum(place >= cut for cut in cuts)
            assert reached <= Loads(problem, blocks, other).score()[1] * (1 + 1e-9)


def test_too_little_memory_and_too_many_stages_say_what_would_do() -> None:
    made = network(0, 8)
    problem = Problem(made, (1.0,) * 8, 2, memory=1)
    with pytest.raises(InputError, match=r"memory of (\d+) bytes or more") as caught:
        solve(problem)
    smallest = int(str(caught.value.allowed).split()[2])
    assert max(solve(replace(problem, memory=smallest)).memory) <= smallest
    with pytest.raises(InputError, match="allowed: 1 to 8 stages"):
        solve(replace(problem, memory=None, stages=9))


def test_other_numbers_of_the_values_change_nothing() -> None:
    made, count = network(3, 9), 9
    moved = {value: (value * 3) % 10 for value in range(10)}
    again = Network(
        tuple(
            replace(one, reads=tuple(moved[v] for v in one.reads), gives=tuple(moved[v] for v in one.gives))
            for one in made.operations
        ),
        tuple(made.values[next(v for v in moved if moved[v] == new)] for new in range(10)),
        (moved[0],),
        (moved[count],),
        made.bytes_of,
        made.keys,
    )
    times = tuple(float(one % 4 + 1) for one in range(count))
    one, other = (solve(Problem(each, times, 3, link=30.0)) for each in (made, again))
    assert one.bottleneck == other.bottleneck
    assert one.bound == pytest.approx(other.bound)


def test_a_long_order_is_cut_at_fewer_places() -> None:
    count = _MOST_CUTS + 100
    made = network(5, count)
    times = (1.0,) * count
    found = solve(Problem(made, times, 3))
    assert found.bottleneck <= 1.02 * found.bound


def test_times_of_zero_have_no_gap_and_a_network_of_nothing_is_refused() -> None:
    made = network(1, 30)
    found = solve(Problem(made, (0.0,) * 30, 3))
    assert (found.gap, found.proven, found.bottleneck) == (0.0, True, 0.0)
    assert Assignment((), (), (), (), (), (), (1.0,), 0.0, False, "graph").gap is None
    with pytest.raises(InputError, match="a network without operations"):
        Problem(Network((), (), (), ()), (), 1)


def test_ties_that_leave_too_few_stages_are_named() -> None:
    operations = tuple(Operation(f"o{n}", "op", (n,), (n + 1,), ("w",)) for n in range(4))
    made = Network(operations, tuple(Value(f"v{n}", 4) for n in range(5)), (0,), (4,), {"w": 8})
    problem = Problem(made, (1.0,) * 4, 2, ties="together")
    with pytest.raises(InputError, match=r"allowed: 1 stage; .*ties=.copy. .*allows 4 stages"):
        solve(problem)
    assert solve(replace(problem, ties="copy")).repeated[0].stages == (0, 1)


def test_a_wide_graph_has_too_many_down_sets_and_a_proof_only_helps() -> None:
    made = network(7, 40)
    problem = Problem(made, tuple(float(one % 5 + 1) for one in range(40)), 4, link=30.0)
    assert down_sets(blocks_of(problem), most=1200) is None
    plain = solve(problem)
    assert plain == solve(problem)
    proved = solve(problem, prove_seconds=0.5)
    assert proved.bottleneck <= plain.bottleneck
    assert plain.bound <= proved.bound <= plain.bottleneck * (1 + 1e-9)
