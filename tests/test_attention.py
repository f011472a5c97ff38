"""UnpackedAttention against nn.MultiheadAttention: the same results, gradients, parameters and surroundings."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import surgery
from surgery.errors import InputError, Refusal
from surgery.kinds.layers.attention import UnpackedAttention, repack, unpack
from surgery.kinds.layers.unpacking import pack_all, unpack_all
from tests.tolerances import assert_close, tolerance

M = TypeVar("M", bound=nn.Module)

WIDTH, HEADS, BATCH, TARGETS, SOURCES = 12, 4, 3, 5, 7
DTYPES = (torch.float32, torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 6, "vdim": 10},
    "kdim, no bias, bias_kv": {"kdim": 6, "bias": False, "add_bias_kv": True},
}
# masks by name: attn_mask, key_padding_mask; "each" is one mask for each head of each sequence
MASKS: dict[str, tuple[str | None, str | None]] = {
    "no mask": (None, None),
    "padding": (None, "bool"),
    "float padding": (None, "float"),
    "2-d": ("bool", None),
    "float 2-d": ("float", None),
    "3-d": ("each bool", None),
    "float 3-d": ("each float", None),
    "2-d and padding": ("bool", "bool"),
    "float 3-d and padding": ("each float", "float"),
    "causal": ("causal", None),
    "causal and padding": ("causal", "bool"),
}
WEIGHTS: tuple[dict[str, bool], ...] = ({"need_weights": False}, {}, {"average_attn_weights": False})
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[nn.MultiheadAttention, UnpackedAttention]:
    """Return an attention with biases that are not zero, and what unpack makes of it."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    unpacked = unpack(attention)
    assert isinstance(unpacked, UnpackedAttention)
    return attention, unpacked


def sequence(attention: nn.MultiheadAttention, length: int, width: int, *, batch: int | None) -> Tensor:
    shape = (length, width) if batch is None else (batch, length, width)
    x = torch.randn(shape, dtype=attention.out_proj.weight.dtype)
    return x if batch is None or attention.batch_first else x.transpose(0, 1)


def inputs(attention: nn.MultiheadAttention, *, batch: int | None, alone: bool = False) -> tuple[Tensor, ...]:
    """Return query, key and value: of two sequences, or the same tensor three times."""
    if alone:
        return (sequence(attention, SOURCES, WIDTH, batch=batch),) * 3
    widths = ((TARGETS, WIDTH), (SOURCES, attention.kdim), (SOURCES, attention.vdim))
    return tuple(sequence(attention, length, width, batch=batch) for length, width in widths)


def mask(kind: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return a mask that leaves each row its first source."""
    if kind is None:
        return None
    if kind == "causal":
        return torch.ones(shape).triu(1).bool()
    if "float" in kind:
        return torch.randn(shape, dtype=dtype)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden


def calls(dtype: torch.dtype, *, batch: int | None, targets: int) -> Iterator[dict[str, Any]]:
    """Yield the keyword arguments of a call for each kind of mask and of weights."""
    for (name, (attn, padding)), weights in itertools.product(MASKS.items(), WEIGHTS):
        heads = ((batch or 1) * HEADS,) if attn and "each" in attn else ()
        yield {
            "attn_mask": mask(attn, (*heads, targets, SOURCES), dtype),
            "key_padding_mask": mask(padding, (SOURCES,) if batch is None else (batch, SOURCES), dtype),
            "is_causal": "causal" in name,
            **weights,
        }


def allowed(dtype: torch.dtype) -> float:
    """Two projections, the scores and their product with the values, in any order of summation."""
    return tolerance(dtype, length=WIDTH + SOURCES + 2, steps=4)


def assert_same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    """Assert equal outputs and equal weights, or no weights in both."""
    assert (actual[1] is None) == (expected[1] is None)
    for a, b in zip(actual, expected, strict=True):
        if a is not None and b is not None:
            assert_close(a, b, allowed(b.dtype))


@dtypes
@pytest.mark.parametrize("batch", [BATCH, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@options
def test_results_are_those_of_the_original(
    kwargs: dict[str, Any], batch_first: bool, batch: int | None, dtype: torch.dtype
) -> None:
    attention, unpacked = make(dtype, batch_first=batch_first, **kwargs)
    for alone in (False, True) if attention._qkv_same_embed_dim else (False,):
        given = inputs(attention, batch=batch, alone=alone)
        for call in calls(dtype, batch=batch, targets=SOURCES if alone else TARGETS):
            assert_same(unpacked.train()(*given, **call), attention.train()(*given, **call))
            with torch.no_grad():
                assert_same(unpacked.eval()(*given, **call), attention.eval()(*given, **call))


@settings(max_examples=50)
@given(
    batch=st.none() | st.integers(1, 4),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 5),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    widths=st.tuples(st.none() | st.integers(1, 9), st.none() | st.integers(1, 9)),
    flags=st.fixed_dictionaries({k: st.booleans() for k in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}),
    need_weights=st.booleans(),
)
def test_any_shape(
    batch: int | None,
    heads: int,
    head_dim: int,
    lengths: tuple[int, int],
    widths: tuple[int | None, int | None],
    flags: dict[str, bool],
    need_weights: bool,
) -> None:
    kdim, vdim = widths
    attention = nn.MultiheadAttention(heads * head_dim, heads, kdim=kdim, vdim=vdim, dtype=torch.float64, **flags)
    shapes = ((lengths[0], attention.embed_dim), (lengths[1], attention.kdim), (lengths[1], attention.vdim))
    given_ = [sequence(attention, length, width, batch=batch) for length, width in shapes]
    unpacked = unpacked_of(attention)
    actual = unpacked(*given_, need_weights=need_weights)
    expected = attention(*given_, need_weights=need_weights)
    length = heads * head_dim + sum(lengths) + (kdim or 0) + (vdim or 0)
    assert_close(actual[0], expected[0], tolerance(torch.float64, length=length, steps=4))
    assert repack(unpacked).state_dict().keys() == attention.state_dict().keys()


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_with_nothing_to_attend_to(need_weights: bool) -> None:
    attention, unpacked = make(batch_first=True)
    hidden = torch.zeros(SOURCES, SOURCES, dtype=torch.bool)
    hidden[2] = True
    for batch in (BATCH, None):
        x = inputs(attention, batch=batch, alone=True)
        kwargs = {"attn_mask": hidden, "need_weights": need_weights}
        torch.testing.assert_close(unpacked(*x, **kwargs), attention(*x, **kwargs), equal_nan=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_drops_the_same(need_weights: bool, batch_first: bool) -> None:
    attention, unpacked = make(dropout=0.3, batch_first=batch_first)
    given = inputs(attention, batch=BATCH)
    results = []
    for module in (unpacked, attention):
        torch.manual_seed(7)
        results.append(module(*given, need_weights=need_weights))
    assert_same(results[0], results[1])
    unpacked.eval()
    assert_same(unpacked(*given), attention.eval()(*given))


@options
def test_gradients_are_those_of_the_original(kwargs: dict[str, Any]) -> None:
    attention, unpacked = make(torch.float64, **kwargs)
    unpacked = copy.deepcopy(unpacked)
    given = inputs(attention, batch=BATCH)
    for module in (attention, unpacked):
        module(*given, need_weights=False)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in unpacked.parameters())
    expected = {name: parameter.grad for name, parameter in attention.named_parameters()}
    for name, parameter in repack_gradients(unpacked).items():
        assert_close(parameter, gradient_of(expected[name]), 10 * allowed(torch.float64))


def gradient_of(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def repack_gradients(unpacked: UnpackedAttention) -> dict[str, Tensor]:
    """Return the gradients under the names of the original."""
    gradients = copy.deepcopy(unpacked)
    for new, old in zip(gradients.parameters(), unpacked.parameters(), strict=True):
        new.data = gradient_of(old.grad)
    return {name: parameter.detach() for name, parameter in repack(gradients).named_parameters()}


@options
def test_unpack_leaves_the_original_alone(kwargs: dict[str, Any]) -> None:
    attention, unpacked = make(**kwargs)
    before = copy.deepcopy(attention.state_dict())
    attributes = dict(vars(nn.MultiheadAttention(WIDTH, HEADS, **kwargs)))
    assert vars(attention).keys() == attributes.keys()
    assert [name for name, _ in unpacked.named_children()] == ["in_proj_q", "in_proj_k", "in_proj_v", "out_proj"]
    assert unpacked.out_proj is attention.out_proj
    assert unpacked.in_proj_bias is attention.in_proj_bias
    assert unpacked.bias_k is attention.bias_k
    assert sum(p.numel() for p in unpacked.parameters()) == sum(p.numel() for p in attention.parameters())
    with torch.no_grad():
        unpacked.in_proj_q.weight.zero_()
    torch.testing.assert_close(attention.state_dict(), before, rtol=0, atol=0)


def test_the_state_dict_has_the_projections() -> None:
    names = {f"in_proj_{part}.weight" for part in "qkv"}
    assert make()[1].state_dict().keys() == names | {"in_proj_bias", "out_proj.weight", "out_proj.bias"}


@dtypes
@pytest.mark.parametrize("trains", [True, False])
@options
def test_repack_is_the_original(kwargs: dict[str, Any], trains: bool, dtype: torch.dtype) -> None:
    attention, unpacked = make(dtype, dropout=0.1, batch_first=True, **kwargs)
    attention.requires_grad_(trains).eval()
    with torch.no_grad():
        unpacked = copy.deepcopy(unpacked_of(attention))
    again = repack(unpacked)
    assert type(again) is nn.MultiheadAttention
    assert type(again.out_proj) is NonDynamicallyQuantizableLinear
    assert list(again.state_dict()) == list(attention.state_dict())
    assert list(again._parameters) == list(attention._parameters)
    torch.testing.assert_close(again.state_dict(), attention.state_dict(), rtol=0, atol=0)
    assert {p.requires_grad for m in (unpacked, again) for p in m.parameters()} == {trains}
    assert not any(m.training for m in (*unpacked.modules(), *again.modules()))
    assert again._qkv_same_embed_dim == attention._qkv_same_embed_dim
    plain = {k: v for k, v in vars(attention).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(again).items() if not k.startswith("_")} == plain
    fresh = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **kwargs)
    fresh.load_state_dict(again.state_dict(), strict=True)


def test_attributes_buffers_and_hooks_go_along() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    attention.note = "kept"  # type: ignore[assignment]  # torch has tensors and modules alone in mind
    attention.register_buffer("steps", torch.zeros(3), persistent=False)
    seen: list[nn.Module] = []
    attention.register_forward_hook(lambda module, *_: seen.append(module))
    unpacked = unpack(attention)
    assert isinstance(unpacked, UnpackedAttention)
    again = repack(unpacked)
    x = torch.randn(SOURCES, BATCH, WIDTH)
    for module in (unpacked, again):
        assert vars(module)["note"] == "kept"
        assert tuple(module.get_buffer("steps").shape) == (3,)
        assert "steps" not in module.state_dict()
        module(x, x, x)
    assert [type(module) for module in seen] == [UnpackedAttention, nn.MultiheadAttention]


def test_a_plain_output_projection_gets_its_class_back() -> None:
    attention, unpacked = make()
    plain = nn.Linear(WIDTH, WIDTH)
    plain.load_state_dict(attention.out_proj.state_dict())
    unpacked.add_module("out_proj", plain)
    again = repack(unpacked)
    assert type(again.out_proj) is NonDynamicallyQuantizableLinear
    assert again.out_proj.weight is plain.weight
    torch.testing.assert_close(again.state_dict(), attention.state_dict(), rtol=0, atol=0)


def low_rank(inner: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner, bias=False), nn.Linear(inner, WIDTH, bias=False))


@pytest.mark.parametrize("name", ["in_proj_q", "in_proj_k", "in_proj_v", "out_proj"])
def test_any_module_may_stand_for_a_projection(name: str) -> None:
    attention, unpacked = make(torch.float64, kdim=6, vdim=10)
    unpacked = copy.deepcopy(unpacked)
    chain = low_rank(3, getattr(unpacked, name).in_features).double()
    setattr(unpacked, name, chain)
    dense = copy.deepcopy(attention)
    weight = {"in_proj_q": "q_proj_weight", "in_proj_k": "k_proj_weight", "in_proj_v": "v_proj_weight"}.get(name)
    with torch.no_grad():
        (dense.out_proj.weight if weight is None else getattr(dense, weight)).copy_(chain[1].weight @ chain[0].weight)
        if weight is None:
            dense.out_proj.bias.zero_()
    given = inputs(attention, batch=BATCH)
    assert_same(unpacked(*given), dense(*given))
    with pytest.raises(InputError, match=f"cannot hold {name}, Sequential.*plain nn.Linear.*recompose it first"):
        repack(unpacked)


def half(unpacked: UnpackedAttention) -> None:
    unpacked.in_proj_k.half()


def frozen(unpacked: UnpackedAttention) -> None:
    unpacked.in_proj_v.requires_grad_(False)


def biased(unpacked: UnpackedAttention) -> None:
    unpacked.in_proj_k = nn.Linear(WIDTH, WIDTH)


def narrow(unpacked: UnpackedAttention) -> None:
    unpacked.in_proj_q = nn.Linear(WIDTH - 1, WIDTH, bias=False)


def normed(unpacked: UnpackedAttention) -> None:
    nn.utils.parametrizations.weight_norm(unpacked.in_proj_q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, "cannot be rows of one parameter"),
        (frozen, "one requires_grad for all three"),
        (biased, r"in_proj_k, Linear\(.*bias=True\).*no bias"),
        (narrow, r"in_features=11.*\(12, 12\)"),
        (normed, "in_proj_q, ParametrizedLinear"),
    ],
)
def test_repack_says_what_it_cannot_hold(change: Callable[[UnpackedAttention], None], message: str) -> None:
    unpacked = make()[1]
    change(unpacked)
    with pytest.raises(InputError, match=message):
        repack(unpacked)


class Own(nn.MultiheadAttention):
    pass


class Wrapped(nn.Module):
    """An adapter around a linear layer that shows its weight, as PEFT's do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias


def patched(attention: nn.MultiheadAttention) -> None:
    vars(attention)["forward"] = lambda *_: None


def wrapped(attention: nn.MultiheadAttention) -> None:
    attention.add_module("out_proj", Wrapped(attention.out_proj))


def parametrized(attention: nn.MultiheadAttention) -> None:
    nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")


def hooked(attention: nn.MultiheadAttention) -> None:
    del attention.in_proj_weight
    attention.in_proj_weight_v = nn.Parameter(torch.zeros(3 * WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (patched, "has its own forward"),
        (wrapped, "its out_proj is a Wrapped"),
        (parametrized, "weight norm or another parametrization"),
        (hooked, "weight norm or another parametrization"),
    ],
)
def test_unpack_refuses_what_computes_otherwise(change: Callable[[nn.MultiheadAttention], None], reason: str) -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    change(attention)
    refusal = unpack(attention)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


@pytest.mark.parametrize("attention", [Own(WIDTH, HEADS), make()[1]], ids=["own class", "unpacked"])
def test_unpack_refuses_subclasses(attention: nn.MultiheadAttention) -> None:
    refusal = unpack(attention)
    assert isinstance(refusal, Refusal)
    assert "it is a subclass" in refusal.reason


def test_wrong_calls_fail() -> None:
    attention, unpacked = make(batch_first=True)
    x = inputs(attention, batch=BATCH, alone=True)
    with pytest.raises(InputError, match="give attn_mask too"):
        unpacked(*x, is_causal=True)
    for batch in (1, BATCH):
        x = inputs(attention, batch=batch, alone=True)
        wrong: dict[str, Tensor] = {
            "attn_mask": torch.zeros(BATCH, SOURCES, SOURCES),
            "key_padding_mask": torch.zeros(BATCH + 1, SOURCES),
        }
        for (name, tensor), need_weights in itertools.product(wrong.items(), (True, False)):
            with pytest.raises(RuntimeError):
                unpacked(*x, **{name: tensor}, need_weights=need_weights)
    with pytest.raises(TypeError, match="_NoTensor"):
        nn.functional.linear(x[0], unpacked.in_proj_weight)


def unpacked_of(attention: nn.MultiheadAttention) -> UnpackedAttention:
    unpacked = unpack(attention)
    assert isinstance(unpacked, UnpackedAttention)
    return unpacked


def swap(module: M) -> M:
    """Return a copy with each attention unpacked."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, unpack(child))
    assert any(isinstance(m, UnpackedAttention) for m in module.modules())
    return module


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, dtype=torch.float64, **kwargs)


def decoder_layer() -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "encoder layer": (lambda: encoder_layer(dropout=0.0), 1),
    "encoder layer, norm first": (lambda: encoder_layer(dropout=0.0, norm_first=True), 1),
    "decoder layer": (decoder_layer, 2),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(dropout=0.0), 2), 1),
}


@pytest.mark.parametrize(("build", "arity"), LAYERS.values(), ids=LAYERS)
def test_inside_transformers(build: Callable[[], nn.Module], arity: int) -> None:
    model = build()
    swapped = swap(model)
    x = [torch.randn(BATCH, SOURCES, WIDTH, dtype=torch.float64) for _ in range(arity)]
    close = 10 * allowed(torch.float64)
    assert_close(swapped.train()(*x), model.train()(*x), close)
    assert_close(swapped.eval()(*x), model.eval()(*x), close)
    with torch.no_grad():
        assert_close(swapped(*x), model(*x), close)
        hidden = torch.ones(SOURCES, SOURCES).triu(1).bool()
        assert_close(swapped(*x, hidden), model(*x, hidden), close)


@pytest.mark.parametrize("grad", [True, False])
def test_padding_inside_an_encoder_does_not_nest(grad: bool) -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    swapped = swap(model)
    x = torch.randn(BATCH, SOURCES, WIDTH, dtype=torch.float64)
    padding = torch.arange(SOURCES) >= torch.tensor([[SOURCES], [4], [2]])
    with torch.set_grad_enabled(grad):
        actual = swapped(x, src_key_padding_mask=padding)
    expected = model(x, src_key_padding_mask=padding)
    assert_close(actual[~padding], expected[~padding], 10 * allowed(torch.float64))


def test_an_encoder_can_be_made_of_it() -> None:
    layer = encoder_layer(dropout=0.0)
    model, swapped = nn.TransformerEncoder(layer, 2).eval(), nn.TransformerEncoder(swap(layer), 2).eval()
    x = torch.randn(BATCH, SOURCES, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert_close(swapped(x), model(x), 10 * allowed(torch.float64))


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Masked(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, hidden: Tensor, padding: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x, attn_mask=hidden, key_padding_mask=padding)
        return output + weights.mean()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["plain", "no bias", "bias_kv and zero_attn"])
def test_torch_fx_traces_it(name: str, batch_first: bool) -> None:
    attention, unpacked = make(batch_first=batch_first, **OPTIONS[name])
    model = Model(unpacked).eval()
    graph = torch.fx.symbolic_trace(model)
    graph.graph.lint()
    called = [str(node.target) for node in graph.graph.find_nodes(op="call_module")]
    assert called == [f"attention.{part}" for part in ("in_proj_q", "in_proj_k", "in_proj_v", "out_proj")]
    for batch in (2, 5, None):
        x = sequence(attention, 9, WIDTH, batch=batch)
        assert_close(graph(x), Model(attention)(x), allowed(torch.float32))


@pytest.mark.parametrize("name", ["plain", "no bias", "bias_kv and zero_attn"])
def test_torch_export_takes_it(name: str) -> None:
    attention, unpacked = make(batch_first=True, **OPTIONS[name])
    batch, length = Dim("batch"), Dim("length")
    x = torch.randn(BATCH, SOURCES, WIDTH)
    program = torch.export.export(Model(unpacked), (x,), dynamic_shapes=({0: batch, 1: length},))
    x = torch.randn(5, 9, WIDTH)
    assert_close(program.module()(x), Model(attention)(x), allowed(torch.float32))
    assert "attention.in_proj_k.weight" in program.state_dict


def test_torch_export_takes_masks() -> None:
    attention, unpacked = make(batch_first=True)
    batch, length = Dim("batch"), Dim("length")
    hidden = torch.ones(SOURCES, SOURCES).triu(1).bool()
    shapes = ({0: batch, 1: length}, {0: length, 1: length}, {0: batch, 1: length})
    example = (torch.randn(BATCH, SOURCES, WIDTH), hidden, torch.zeros(BATCH, SOURCES, dtype=torch.bool))
    program = torch.export.export(Masked(unpacked), example, dynamic_shapes=shapes)
    padding = torch.arange(4) >= torch.tensor([[4], [3]])
    x = (torch.randn(2, 4, WIDTH), hidden[:4, :4], padding)
    assert_close(program.module()(*x), Masked(attention)(*x), allowed(torch.float32))


def test_torch_export_takes_an_encoder() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x = torch.randn(BATCH, SOURCES, WIDTH, dtype=torch.float64)
    program = torch.export.export(swap(model), (x,), dynamic_shapes=({0: Dim("batch")},))
    assert_close(program.module()(x[:2]), model(x[:2]), 10 * allowed(torch.float64))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@options
def test_copies(kwargs: dict[str, Any], clone: Callable[[nn.Module], UnpackedAttention]) -> None:
    attention, unpacked = make(**kwargs)
    again = clone(unpacked)
    given = inputs(attention, batch=BATCH)
    torch.testing.assert_close(again(*given), unpacked(*given), rtol=0, atol=0)
    assert list(again.state_dict()) == list(unpacked.state_dict())
    assert list(repack(again).state_dict()) == list(attention.state_dict())
    moved = clone(unpacked).double()
    assert repack(moved).out_proj.weight.dtype == torch.float64


def test_half_precision_and_autocast() -> None:
    attention, unpacked = make(torch.bfloat16, batch_first=True)
    x = inputs(attention, batch=BATCH)
    assert_close(unpacked(*x)[0], attention(*x)[0], tolerance(torch.bfloat16, steps=5))
    attention, unpacked = make(batch_first=True)
    x = inputs(attention, batch=BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.zeros(TARGETS, SOURCES, dtype=torch.bool)
        for need_weights in (True, False):
            kwargs = {"attn_mask": hidden, "need_weights": need_weights}
            actual, expected = unpacked(*x, **kwargs)[0], attention(*x, **kwargs)[0]
            assert_close(actual, expected, tolerance(torch.bfloat16, steps=5))


def test_attention_with_a_tied_packed_weight_is_left_alone() -> None:
    pair = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    pair[1].in_proj_weight = pair[0].in_proj_weight
    originals = unpack_all(pair)
    assert [type(module) for module in pair] == [nn.MultiheadAttention, nn.MultiheadAttention, UnpackedAttention]
    pack_all(pair, originals)
    assert {type(module) for module in pair} == {nn.MultiheadAttention}
    assert pair[1].in_proj_weight is pair[0].in_proj_weight


class Projected(nn.Module):
    """Only the projections of attention, as a call of its packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.attention.in_proj_weight)


def test_projections_that_read_other_values_stay_apart() -> None:
    """A graph may be edited between decompose and recompose: then no one product gives them all."""
    x = torch.randn(2, 5, WIDTH)
    made = surgery.decompose(torch.fx.symbolic_trace(Projected().eval()), x, ranks={"attention.in_proj_q": 2}).model
    assert "attention.in_proj_weight" in dict(surgery.recompose(made, x).model.named_parameters())
    keys = next(node for node in made.graph.nodes if "in_proj_k" in str(node.args))
    with made.graph.inserting_before(keys):
        keys.replace_input_with(keys.args[0], made.graph.call_function(torch.neg, (keys.args[0],)))
    made.recompile()
    torch.testing.assert_close(surgery.recompose(made, x).model(x), made(x))
