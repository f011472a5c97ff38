"""The list of operators that a file may call: complete, of no forbidden form, enough for real models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop

from surgery.errors import FileError, UnsafeFileError
from surgery.files.guard.operators import GROUPS, REFUSED_CORE, check_operator, group_of, overloads
from surgery.files.guard.rules import Held, check_sizes, check_values
from surgery.files.load import load
from tests import zoo
from tests.hostile import builder
from tools.architectures import TORCHVISION
from tools.check_operators import operators, refused


def _overload(target: str) -> Any:
    *_, namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _core() -> list[str]:
    """The functional overloads that torch says are Core ATen."""
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or packet.endswith("_backward"):
            continue
        target = f"torch.ops.aten.{packet}.{overload or 'default'}"
        if hasattr(getattr(torch.ops.aten, packet), overload or "default"):
            operator = _overload(target)
            if torch.Tag.core in operator.tags and not operator._schema.is_mutable:
                found.append(target)
    return found


def test_each_functional_operator_of_core_aten_is_listed_or_refused_with_a_reason() -> None:
    """A new torch that adds one fails here: put it on the list once ``tools/check_operators.py --fuzz`` has seen it."""
    core = _core()
    assert len(core) > 150
    missing = [target for target in core if not group_of(target) and target.split(".")[3] not in REFUSED_CORE]
    assert not missing
    assert REFUSED_CORE.keys() <= {target.split(".")[3] for target in core}


def test_each_listed_name_stands_for_something() -> None:
    import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed  # noqa: F401

    listed = {target.split(".", 2)[2] for target in overloads()}
    for group in GROUPS.values():
        for name in group.names:
            full = f"{group.namespace}.{name}"
            assert full in listed or any(each.startswith(f"{full}.") for each in listed), full


def test_no_name_is_listed_twice() -> None:
    names = [f"{group.namespace}.{name}" for group in GROUPS.values() for name in group.names]
    assert len(set(names)) == len(names)


def test_no_listed_operator_has_a_forbidden_form() -> None:
    asked = GROUPS["in place"].names
    for target in overloads():
        name = target.split(".")[3]
        schema = _overload(target)._schema
        written = [each.name for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        assert written == (["self"] if name in asked else []), target
        assert not name.endswith("_backward"), target
        assert not re.search(r"unsafe|alias_?$|resize|set_$|sparse|storage(?!_offset)|file", name) or name in (
            "_unsafe_view", "_unsafe_index", "alias",
        ), target  # fmt: skip
        assert not any(each.name in ("out", "filename") for each in schema.arguments), target


@pytest.mark.parametrize(
    "target",
    [f"torch.ops.aten.{name}" for name in (
        "_reshape_alias.default", "_sparse_coo_tensor_unsafe.default", "_remove_batch_dim.default", "remainder.int",
        "relu.out", "max_pool2d_with_indices_backward.default", "resize_.default", "set_.source_Tensor",
        "as_strided_.default", "to.prim_dtype", "add.t", "sum.dim_DimnameList", "warn.default", "from_file.default",
        "relu.Nothing", "nothing.default", "linear.__class__",
    )] + ["torch.ops.prims.as_strided.default", "torch.ops.prims.copy_to.default", "os.system", "math.prod", ""],
)  # fmt: skip
def test_what_is_not_on_the_list_is_refused(target: str) -> None:
    with pytest.raises(UnsafeFileError, match="known to be safe"):
        check_operator(target)


@pytest.mark.law
@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("kind", ["program", "program-dynamic"])
def test_what_torch_export_writes_for_the_zoo_is_listed(name: str, kind: str) -> None:
    assert not refused(operators(zoo.graph(name, kind)[0]))


@pytest.mark.parametrize("name", TORCHVISION)
def test_what_torch_export_writes_for_networks_of_torchvision_loads(name: str, tmp_path: Path) -> None:
    model, inputs = TORCHVISION[name]()
    torch.export.save(zoo.export(model, inputs), tmp_path / "model.pt2")
    assert isinstance(load(tmp_path / "model.pt2"), torch.export.ExportedProgram)


class _Sizes(nn.Module):
    """Arithmetic on dynamic sizes, in a branch too, and a view with strides of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        y = x.new_ones(count**2 // 2 + count % 3, 4) * (count * 2)
        y = torch.cond(x.sum() > 0, lambda t: t * t.shape[0], lambda t: t + t.shape[0] ** 2, (y,))
        return y.sum() + x.as_strided((2, 2), (1, 1)).sum() + torch.full((3, 5), 2.0).sum()


def test_arithmetic_on_sizes_loads_and_runs(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=3, max=64)
    program = torch.export.export(_Sizes(), (torch.ones(4, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    assert isinstance(loaded, torch.export.ExportedProgram)
    x = torch.rand(5, 4)
    assert torch.equal(loaded.module()(x), _Sizes()(x))


TENSOR = {"as_tensor": {"name": "p_linear_weight"}}
SIZE = {"as_sym_int": {"as_name": "made"}}


def _number(value: int) -> dict[str, Any]:
    return {"as_int": value}


def _node(target: str, *arguments: dict[str, Any], names: str = "", kinds: int = 1, **more: Any) -> dict[str, Any]:
    named = [*names.split(), *[""] * len(arguments)]
    inputs = [{"name": name, "arg": arg, "kind": kinds} for name, arg in zip(named, arguments, strict=False)]
    outputs = more.get("outputs", [SIZE])
    return {"target": target, "inputs": inputs, "outputs": outputs, "metadata": {}, "name": None} | more


ATEN = "torch.ops.aten"
FULL: dict[str, Any] = {"outputs": [{"as_tensor": {"name": "p_linear_weight"}}]}
HOSTILE = {
    "power": [_node("_operator.pow", _number(10), _number(10**9))],
    "power of a size": [_node("_operator.pow", _number(10), {"as_sym_int": {"as_name": "nothing"}})],
    "shift": [_node("_operator.lshift", _number(1), _number(10**9))],
    "divisor 0": [_node("_operator.floordiv", _number(1), _number(0))],
    "remainder by 0": [_node("_operator.mod", _number(1), _number(0))],
    "quotient by 0": [_node("_operator.truediv", _number(1), _number(0))],
    "list times number": [_node("_operator.mul", {"as_ints": [1, 2]}, _number(10**9))],
    "text times number": [_node("_operator.mul", {"as_string": "ab"}, _number(10**9))],
    "format": [_node("_operator.mod", {"as_string": "%9999999999d"}, _number(1))],
    "value that was not made": [_node("_operator.add", _number(1), {"as_sym_int": {"as_name": "nothing"}})],
    "list as a size": [_node(f"{ATEN}.split.Tensor", TENSOR, _number(1), names="self split_size")],
    "tuple as a size": [_node("torch.ops.higher_order.map_impl", TENSOR, is_hop_single_tensor_return=True)],
    "growing numbers": [_node("_operator.mul", _number(3), _number(3))] + [
        _node("_operator.mul", *[{"as_sym_int": {"as_name": f"made{'x' * i}"}}] * 2,
              outputs=[{"as_sym_int": {"as_name": f"made{'x' * (i + 1)}"}}]) for i in range(40)
    ],
    "gap": [_node(f"{ATEN}.sum.dim_IntList", TENSOR, {"as_bool": True}, names="self keepdim", **FULL)],
    "twice": [_node(f"{ATEN}.relu.default", TENSOR, TENSOR, names="self self", **FULL)],
    "no such argument": [_node(f"{ATEN}.relu.default", TENSOR, names="other", **FULL)],
    "other sizes": [_node(f"{ATEN}.full.default", {"as_ints": [1 << 15, 1 << 15]}, _number(1), names="size fill_value",
                          **FULL)],
    "strides": [_node(f"{ATEN}.as_strided.default", TENSOR, {"as_ints": [2]}, {"as_ints": [1 << 60]},
                      names="self size stride", **FULL)],
    "negative strides": [_node(f"{ATEN}.as_strided.default", TENSOR, {"as_ints": [2]}, {"as_ints": [-1]},
                               names="self size stride", **FULL)],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_arguments_that_an_operator_would_trust_are_refused(name: str, tmp_path: Path) -> None:
    def change(program: Any) -> None:
        builder.graph(program)["nodes"][0:0] = HOSTILE[name]

    (tmp_path / "model.pt2").write_bytes(builder.with_json(builder.MODEL, change))
    with pytest.raises(FileError, match=r"it calls|its call|it takes"):
        load(tmp_path / "model.pt2")


def test_what_is_known_of_a_weight_counts() -> None:
    target = f"{ATEN}._weight_norm.default"
    check_sizes(target, {"v": Held((3, 2)), "g": Held((3, 1))})
    with pytest.raises(UnsafeFileError, match="empty"):
        check_sizes(target, {"v": Held((0, 2)), "g": Held((3, 1))})


IMAGE = torch.ones(1, 2, 4, 4)
LONG = (1 << 63) - 1
TRUSTED = {
    "replication_pad2d.default": ((IMAGE, [1, 1, 0, 0]), (IMAGE, [LONG, LONG, 0, 0])),
    "pad.default": ((IMAGE, [1, 1], "replicate"), (IMAGE, [LONG, LONG], "replicate")),
    "_upsample_bilinear2d_aa.default": ((IMAGE, [8, 2], False, 2.0, 0.5), (IMAGE, [300, 4], False, 2e-6, 1.0)),
    "_fft_r2c.default": ((IMAGE, [2, 3], 0, True), (IMAGE, [2, 7], 0, True)),
    "_fft_c2c.default": ((IMAGE, [3], 0, True), (IMAGE, [3, 3], 0, True)),
    "_fft_c2r.default": ((IMAGE, [3], 0, 7), (IMAGE, [3], 0, 8)),
}


@pytest.mark.parametrize("name", TRUSTED)
def test_what_a_kernel_does_not_compare_is_compared(name: str) -> None:
    honest, hostile = TRUSTED[name]
    check_values(f"{ATEN}.{name}", honest, {})
    with pytest.raises(UnsafeFileError, match="it calls"):
        check_values(f"{ATEN}.{name}", hostile, {})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch to itself
@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)])
def test_norms_of_each_sample_load_with_any_batch(layer: nn.Module, tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Conv2d(4, 8, 3), layer).eval(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.ones(2, 4, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    x = torch.rand(3, 4, 8, 8)
    loaded = load(tmp_path / "model.pt2")
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert torch.allclose(loaded.module()(x), model(x), atol=1e-5)


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = torch.zeros((), dtype=torch.int64)
        found: torch.Tensor = while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, self.norm(y)), (count, x))[1]
        return found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch to itself
def test_sizes_are_not_believed_in_a_loop(tmp_path: Path) -> None:
    """Its body is followed once, and what goes around may grow with each pass."""
    program = torch.export.export(_Loop().eval(), (torch.ones(2, 4),))
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    with pytest.raises(UnsafeFileError, match="cannot be followed"):
        load(tmp_path / "model.pt2")


def test_a_recipe_is_held_to_the_same() -> None:
    check_values("_operator.mul", (torch.ones(2), 3), {})
    check_values("_operator.getitem", ((torch.ones(2), torch.ones(2)), 1), {})
    check_values(f"{ATEN}._weight_norm.default", (torch.ones(3, 2), torch.ones(3, 1)), {})
    for target, args in {
        "_operator.pow": (10, 10**9),
        "_operator.mul": ([1], 10**9),
        f"{ATEN}._weight_norm.default": (torch.ones(0), torch.ones(1)),
        f"{ATEN}.as_strided.default": (torch.ones(1), [2], [1 << 60]),
    }.items():
        with pytest.raises(UnsafeFileError, match="it calls"):
            check_values(target, args, {})
