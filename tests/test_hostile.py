"""Hostile and damaged files: loading one runs nothing, takes little, and ends in one clear error."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import resource
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.errors import CaptureError, FileError, InputError, SurgeryError, UnsafeFileError
from surgery.files.guard.expressions import NUMBER, TRUTH, check_expression
from surgery.files.guard.guards import check_guard
from surgery.files.load import load
from surgery.passes.preview import find_sites
from surgery.runtime.compare import compare
from tests.covering import ALL
from tests.hostile import ATTACKS, PROVEN, builder, payloads

SECONDS = 10.0  # many times what any of them takes
MEBIBYTES = 300
STRANGE: tuple[Any, ...] = (
    None,
    0,
    -1,
    3,
    2**62,
    2**63,
    True,
    "",
    "x",
    0.5,
    "NaN",
    [],
    {},
    [1],
    {"as_int": -1},
    {"as_none": True},
)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The marker that a payload would make, in a folder from which modules can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "marker"


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_runs(name: str, attacked: Path) -> None:
    file = attacked.with_name("model.pt2")
    file.write_bytes(ATTACKS[name](attacked))
    peak, start = _peak(), time.monotonic()
    with pytest.raises(FileError) as caught:
        load(file)
    assert not attacked.exists()
    assert time.monotonic() - start < SECONDS
    assert _peak() - peak < MEBIBYTES
    text = str(caught.value)
    assert text.isprintable()
    assert str(file) in text


@pytest.mark.parametrize("name", PROVEN)
def test_the_attack_works_on_torch_itself(name: str, attacked: Path) -> None:
    """The payloads are live: without the guard they run. A torch that closes one fails here, and may be celebrated."""
    raw = ATTACKS[name](attacked)
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(raw))
            program.module()(*program.example_inputs[0])
    finally:
        logging.disable(logging.NOTSET)
    assert attacked.exists()


@pytest.mark.parametrize("name", PROVEN)
def test_an_attack_that_would_run_is_called_unsafe(name: str, attacked: Path) -> None:
    file = attacked.with_name("model.pt2")
    file.write_bytes(ATTACKS[name](attacked))
    with pytest.raises(UnsafeFileError, match="--trust"):
        load(file)


def test_a_trusted_file_may_run(attacked: Path) -> None:
    file = attacked.with_name("module.pt")
    file.write_bytes(builder.saved(torch.nn.Linear(2, 3)))
    with pytest.raises(UnsafeFileError, match=r"Linear.*--trust"):
        load(file)
    assert isinstance(load(file, trust=True), torch.nn.Linear)


@pytest.mark.parametrize("name", ["huge sizes", "strides past the end", "claimed size", "twice", "traversal"])
def test_trust_does_not_lift_the_checks_of_corruption(name: str, attacked: Path) -> None:
    file = attacked.with_name("model.pt2")
    file.write_bytes(ATTACKS[name](attacked))
    with pytest.raises(FileError) as caught:
        load(file, trust=True)
    assert "--trust" not in str(caught.value)


def test_torch_cannot_fall_back_to_a_full_unpickler(attacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the guard let bad sample inputs pass, torch would not unpickle them."""
    file = attacked.with_name("model.pt2")
    file.write_bytes(payloads.pickled_samples(attacked))
    monkeypatch.setattr("surgery.files.guard.archive._check_samples", lambda data: None)
    with pytest.raises(FileError):
        load(file)
    assert not attacked.exists()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every string and number in parsed JSON, and of every key (a path that ends in True)."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                yield (*path, key, True)
            yield from _places(each, (*path, key))
    else:
        yield (*path, False)


def _kind(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path without list positions and names of values."""
    before = ("", *path)
    return tuple("*" if type(key) is int or last == "tensor_values" else key for last, key in pairwise(before))


def _put(value: Any, path: tuple[Any, ...], text: Any) -> None:
    *parents, key, is_key = path
    for parent in parents:
        value = value[parent]
    value[text if is_key else key] = value.pop(key) if is_key else text


def _payloads(marker: Path) -> list[str]:
    code, quoted = builder.touch_unquoted(marker), builder.touch(marker)
    broken = [f"x, y={code}", f'x"), {code}, ("', f"' and {quoted} and '", f'" + {code} + "', f"x\n{code}"]
    return [code, quoted, *broken, f"x; {code}", f"x={code}"]


@pytest.mark.parametrize("name", [builder.MODEL, builder.WEIGHTS, builder.CONSTANTS])
def test_no_string_of_an_archive_reaches_an_interpreter(name: str, attacked: Path) -> None:
    """Code in the place of each string: it is refused, or the program that loads does not run it when it is used."""
    parsed = json.loads(builder.entries(builder.honest())[name])
    kinds = {_kind(path): path for path in _places(parsed)}  # one of each kind is enough
    payloads = _payloads(attacked)
    for number, path in enumerate(kinds.values()):
        changed = copy.deepcopy(parsed)
        _put(changed, path, payloads[number % len(payloads)])
        file = attacked.with_name("model.pt2")
        file.write_bytes(builder.edited({name: json.dumps(changed).encode()}))
        with contextlib.suppress(SurgeryError):
            program = load(file)
            assert isinstance(program, torch.export.ExportedProgram)
            with contextlib.suppress(Exception):
                program.module()(*builder.inputs())
        assert not attacked.exists(), path


def test_no_value_of_an_archive_ends_in_a_failure_of_ours(tmp_path: Path) -> None:
    """A strange value in the place of each: loading refuses it, or what loads is looked at and run as any other."""
    file = tmp_path / "model.pt2"
    for name in (builder.MODEL, builder.WEIGHTS, builder.CONSTANTS):
        parsed = json.loads(builder.entries(builder.honest())[name])
        kinds = {_kind(path): path for path in _places(parsed) if not path[-1]}
        for number, path in enumerate(kinds.values()):
            changed = copy.deepcopy(parsed)
            _put(changed, path, STRANGE[number % len(STRANGE)])
            file.write_bytes(builder.edited({name: json.dumps(changed).encode()}))
            with contextlib.suppress(InputError, CaptureError):
                program = load(file)
                assert isinstance(program, torch.export.ExportedProgram)
                find_sites(program)
                compare(program, program)


@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")  # of torch, which saves it
def test_a_weight_that_is_larger_than_it_is_stored_needs_room(tmp_path: Path) -> None:
    """A row that stands for 4096 rows takes next to nothing in the file, and 64 MiB when a pass touches it."""
    layer = nn.Linear(4096, 4096, bias=False)
    layer.weight = nn.Parameter(torch.ones(1, 4096).expand(4096, 4096))
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(layer.eval(), (torch.ones(1, 4096),)), file)
    assert file.stat().st_size < 2**20
    with pytest.raises(FileError, match=r"needs about 201 MB of memory.*allowed: 100 MB.*--memory 202M"):
        load(file, memory=10**8)
    assert isinstance(load(file, memory=10**9), torch.export.ExportedProgram)


def test_a_file_that_is_larger_than_the_room_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(builder.honest())
    with pytest.raises(FileError, match=r"of memory.*allowed: 1 kB"):
        load(file, memory=1000)


# -- damage ------------------------------------------------------------------------------------------------------------


def _weights(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    tensors = {**program.state_dict, **program.constants}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], str]:
    file = tmp_path_factory.mktemp("damage") / "model.pt2"
    file.write_bytes(builder.honest())
    program = load(file)
    assert isinstance(program, torch.export.ExportedProgram)
    return file, _weights(program), str(program.graph)


def _load_damaged(raw: bytes, expected: tuple[Path, dict[str, torch.Tensor], str]) -> None:
    file, weights, graph = expected
    file.write_bytes(raw)
    try:
        program = load(file)
    except SurgeryError:
        return
    assert isinstance(program, torch.export.ExportedProgram)
    found = _weights(program)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert str(program.graph) == graph
    assert program.graph_module.meta["surgery"] == {"passes": ["decompose"]}


_damage = settings(max_examples=150 if ALL else 60, phases=[Phase.explicit, Phase.generate])


def _flipped(raw: bytes, position: int) -> bytes:
    damaged = bytearray(raw)
    damaged[position // 8 % len(raw)] ^= 1 << position % 8
    return bytes(damaged)


@_damage
@given(position=st.integers(0, 10**9))
def test_a_flipped_bit_never_changes_a_weight(
    position: int, expected: tuple[Path, dict[str, torch.Tensor], str]
) -> None:
    _load_damaged(_flipped(builder.honest(), position), expected)


def test_a_flipped_bit_in_the_directory_never_changes_a_weight(
    expected: tuple[Path, dict[str, torch.Tensor], str],
) -> None:
    """The directory holds what no checksum covers: a sample of its bits, more of them at its end."""
    raw = builder.honest()
    start, end, stop = raw.index(b"PK\1\2") * 8, (len(raw) - 22) * 8, len(raw) * 8
    near, last = (151, 3) if ALL else (449, 7)
    for position in [*range(start, end, near), *range(end, stop, last)]:
        _load_damaged(_flipped(raw, position), expected)


@_damage
@given(length=st.integers(0, 10**9))
def test_a_truncated_file_is_refused(length: int, expected: tuple[Path, dict[str, torch.Tensor], str]) -> None:
    file, _, _ = expected
    raw = builder.honest()
    file.write_bytes(raw[: length % len(raw)])
    with pytest.raises(FileError):
        load(file)


def test_a_flipped_bit_in_a_state_dict_never_changes_a_weight(tmp_path: Path) -> None:
    raw = builder.saved(torch.nn.Linear(4, 4).state_dict())
    file = tmp_path / "model.pt"
    file.write_bytes(raw)
    module = load(file, model=lambda: torch.nn.Linear(4, 4))
    assert isinstance(module, torch.nn.Linear)
    for position in range(0, len(raw) * 8, 97):
        file.write_bytes(_flipped(raw, position))
        try:
            found = load(file, model=lambda: torch.nn.Linear(4, 4))
        except SurgeryError:
            continue
        assert isinstance(found, torch.nn.Linear)
        assert torch.equal(found.weight, module.weight)
        assert torch.equal(found.bias, module.bias)


# -- the two grammars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s7', integer=True)), Integer(-1))",
        "FloorDiv(Add(Symbol('s77', positive=True, integer=True), Integer(1)), Integer(2))",
        "GreaterThan(Symbol('u0', integer=True), Integer(2))",
        "Pow(Symbol('s1', integer=True), Integer(-1))",
        "Pow(ToFloat(Symbol('s1', integer=True)), Float('0.5', precision=53))",
        "2*s0 + 1",
        "Max(1, s0//2, u3 % 4)",
        "Min(Integer(32), FloorDiv(Mul(Integer(-1), PythonMod(Symbol('s4', positive=True, integer=True), s1)), s2))",
        "TruncToInt(Mul(Float('0.7', precision=53), ToFloat(Symbol('s9', positive=True, integer=True))))",
        "Where(And(Lt(s0, s1), Ne(s1, 3)), s0, Rational(1, 2))",
        "+".join(f"s{i}" for i in range(40)),
    ],
)
def test_shape_expressions_pass(text: str) -> None:
    check_expression(text, TRUTH if text.startswith("Greater") else NUMBER)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "Symbol('s0').free_symbols",
        "Symbol('evil')",
        "Symbol('s0', cls=Dummy)",
        "(lambda: 0)()",
        "[s0 for s0 in ()]",
        "Integer('__import__(1)')",
        "Float('__import__(1)')",
        "f'{s0}'",
        "s0 if s1 else s2",
        "s0 + #",
        "s0\n+ 1",
        "Pow(s0, s1)",
        "Pow(Pow(s0 + 1, 16), 16)",
        "Pow(2, Rational(1, 2))",
        "sqrt(2)",
        "oo",
        "hn1",
        "s0 + true",
        "Lt(s0, s1) + 1",
        "Max(s0)",
        "Symbol('s0', commutative=False)",
        "Symbol('s0', integer=False)",
        "Float('1e999')",
        "LShift(1, s0)",
        "Mul(" + ", ".join(f"Add(s{i}, 1)" for i in range(11)) + ")",
        "*".join(["9223372036854775807"] * 32 + ["s0"] * 40),
        "Max(" + ", ".join(f"s{i}" for i in range(13)) + ")",
        "+".join(f"s{i}" for i in range(60)),
        "Abs(" * 51 + "s0" + ")" * 51,
        "exec(s0)",
        "",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(UnsafeFileError):
        check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] == 4",
        "L['d']['q'][0].size()[0] == L['x'].size()[0]",
        "((4*(L['x'].size()[0] // 2)) % (2*L['x'].size()[0])) == 0",
        "1 + L['n'] >= 2",
        "math.isnan(L['f'])",
        "L['flag'] == True and L['data'].feature.stride()[0] != 1",
        "max(2, L['x'].size(0)) <= 2*L['y'].size()[1]**2",
        "L['mode'] == 'nearest'",
        "8*L['n'] >= 2 and L['n'] != L['x'].size()[0]",
        "math.trunc(0.7*torch.sym_float(L['x'].size()[1])) != 0",
        "(3*math.ceil((1 + (L['x'].size()[0] // 4)) / 2)) == 0",
        "max(1, L['x'].size()[0])*L['x'].stride()[0]*L['x'].numel() < 9223372036854775807",
    ],
)
def test_guards_pass(text: str) -> None:
    check_guard(text, numbers=frozenset(["L['n']"]))


@pytest.mark.parametrize(
    "text",
    [
        "exec('1')",
        "L['x'].__class__",
        "L['x'].size.__globals__",
        "L['x'].tofile('a')",
        "torch.load('a')",
        "torch.sym_max.__globals__",
        "math.__loader__",
        "(lambda: 0)()",
        "[i for i in L]",
        "L['a\"b'] == 1",
        "L[L['x']] == 1",
        "10**10000000 == 1",
        "9**4**4**4**4**4**4**4 == 1",
        "round(1, -1000000000) == 0",
        "'a' * 9 == 'b'",
        "'%9d' % 1 == 'b'",
        "L['mode'] * 9 == 'b'",
        "L['mode'] % 9 == 'b'",
        "L['x'].size() * 9 == 1",
        "L['x'] * L['y'] == 1",
        "L['x'] == L['y']",
        "abs(L['x']) == 1",
        "L['x'].size() == 1",
        "L['x'].size(0, 1) == 1",
        "L['x'].size()[L['n']] == 1",
        "1 in L['x']",
        "1 is 2",
        "~1 == 2",
        "max(1) == 1",
        "torch.sym_sum(1) == 1",
        "9223372036854775808 == 1",
        "not " * 120 + "1",
        "1 << 1000000000",
        "L['x'] == 1 #",
        "(x := 1)",
        "open == 1",
        "",
    ],
)
def test_other_guards_are_refused(text: str) -> None:
    with pytest.raises(UnsafeFileError):
        check_guard(text)


@given(st.text(alphabet="Ls0123456789_.()[]'\",+-*/%=<> mathtorchexecimportlambda:", max_size=40))
@settings(max_examples=300)
def test_the_grammars_never_fail_in_another_way(text: str) -> None:
    for check in (check_expression, check_guard):
        with contextlib.suppress(UnsafeFileError):
            check(text)


def test_the_builder_makes_archives_that_load_when_nothing_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(builder.edited({}))
    program = load(file)
    assert isinstance(program, torch.export.ExportedProgram)
    program.module()(*builder.inputs())
