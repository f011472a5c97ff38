"""Padding that a mask hides counts nowhere: not in moments, targets, sensitivity, nor the error on held-out samples."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from surgery.algebra import Conv, Geometry, Linear
from surgery.data.collect import collect, with_sensitivity
from surgery.data.masks import find_masks, is_mask_name, read_masks, visible_rows
from surgery.data.moments import Moments, read_columns
from surgery.data.samples import Calibration, read_calibration
from surgery.data.visible import VisibleRows
from surgery.errors import InputError
from surgery.kinds.registry import observe
from surgery.passes.decompose import decompose
from surgery.passes.evidence import HeldOut
from surgery.plans.goal import Goal
from tests.tolerances import tolerance

EXACT = tolerance(torch.float64, length=256, steps=8)
LENGTHS = (7, 3, 5, 1, 6, 2)
IDS, WIDTH, LONGEST = 30, 8, 7
KINDS = ["module", "graph", "program", "program-dynamic"]


class Encoder(nn.Module):
    """One block of a transformer with a head for each token and one for each sequence; ``flat`` has rows (N*T, d)."""

    def __init__(self, flat: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.flat = flat
        self.tokens, self.places = nn.Embedding(IDS, width), nn.Embedding(LONGEST, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        hidden = (attention_mask == 0).unsqueeze(1)
        scores = (self.q(x) @ self.k(x).mT).masked_fill(hidden, -1e30)
        x = x + self.o(torch.softmax(scores, -1) @ self.v(x))
        rows = x.flatten(0, 1) if self.flat else x
        rows = rows + self.down(torch.relu(self.up(rows)))
        y = rows.reshape(x.shape)
        return self.head(y), torch.tanh(self.pooler(y[:, 0]))


def encoder(**how: Any) -> Any:
    torch.manual_seed(0)
    return Encoder(**how).double().eval()


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 1, behind: int = 0) -> dict[str, Tensor]:
    """Ids that are ``behind`` where they are hidden (at random where that is -1), and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, IDS, (len(lengths), LONGEST), generator=generator)
    mask = torch.stack([(torch.arange(LONGEST) < length).long() for length in lengths])
    other = torch.randint(1, IDS, ids.shape, generator=generator) if behind < 0 else torch.full_like(ids, behind)
    return {"input_ids": torch.where(mask == 1, ids, other), "attention_mask": mask}


def as_kind(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> Any:
    if kind == "graph":
        return torch.fx.symbolic_trace(model)
    if kind == "program":
        return export(model, tuple(inputs.values()))
    if kind == "program-dynamic":
        sizes = {0: Dim("batch", min=2), 1: Dim("length", max=LONGEST)}
        return export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes))
    return model


def one_by_one(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[int, Tensor, Tensor]]:
    """The moments of the sequences without their padding, of all together."""
    parts: list[Mapping[str, Moments]] = []
    for ids, mask in zip(*inputs.values(), strict=True):
        length = int(mask.sum())
        given = {"input_ids": ids[:length].unsqueeze(0), "attention_mask": mask[:length].unsqueeze(0)}
        parts.append(collect(model, read_calibration(given, model)))
    found = {}
    for name in parts[0]:
        rows = [part[name] for part in parts]
        count = sum(row.count for row in rows)
        mean = torch.stack([row.count * row.mean for row in rows]).sum(0) / count
        found[name] = count, mean, torch.stack([row.count * row.second for row in rows]).sum(0) / count
    return found


@functools.cache
def _moments_without_padding(flat: bool) -> dict[str, tuple[int, Tensor, Tensor]]:
    return one_by_one(encoder(flat=flat), batch())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_moments_of_padded_sequences_are_those_without_padding(flat: bool, kind: str) -> None:
    inputs = batch()
    expected = _moments_without_padding(flat)
    model = as_kind(encoder(flat=flat), kind, inputs)
    found = collect(model, read_calibration(inputs, model, inputs, batch_size=4 if kind != "program" else 32))
    assert set(found) >= {"tokens", "q", "o", "up", "down", "pooler", "head"}
    for name in set(found) - {"places"}:
        count, mean, second = expected[name]
        assert found[name].count == count == (len(LENGTHS) if name == "pooler" else sum(LENGTHS))
        torch.testing.assert_close(found[name].mean, mean, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(found[name].second, second, rtol=EXACT, atol=EXACT)


def bits(found: Any) -> list[Tensor]:
    return [part for m in found.values() for part in (m.mean, m.second, m.sensitivity) if part is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_what_is_hidden_does_not_matter(flat: bool, kind: str) -> None:
    """Other ids there change no moment, no sensitivity and no error."""
    model = as_kind(encoder(flat=flat), kind, batch())
    changed = as_kind(encoder(flat=flat), "module", batch())
    with torch.no_grad():
        changed.down.weight[0] += 0.1
        changed.tokens.weight[0] += 9.0  # id 0 is hidden alone
    results, errors = [], []
    for behind in (0, -1):
        samples = read_calibration(batch(behind=behind), model, batch())
        results.append(bits(with_sensitivity(model, samples, collect(model, samples))))
        errors.append(HeldOut(model, samples).error(changed))
    assert len(results[0]) > 2 * 8
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    assert errors[0] == pytest.approx(errors[1], rel=EXACT)
    assert errors[0][0] > 0


def test_without_the_mask_it_would_matter() -> None:
    model = encoder()
    samples = [replace(read_calibration(batch(behind=at), model), masks=()) for at in (0, -1)]
    one, other = (bits(with_sensitivity(model, each, collect(model, each))) for each in samples)
    assert not all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_changes_no_bit(kind: str) -> None:
    inputs = batch((LONGEST,) * 6)
    model = as_kind(encoder(), kind, inputs)
    samples = read_calibration(inputs, model, inputs)
    leaves = [torch.cat([leaf]) for leaf in samples.leaves]
    plain = Calibration(tuple(leaves), samples.sampled, samples.structure, samples.batch_size, samples.exact)
    assert all(samples.visible(one) == () for one in samples)
    found = [bits(with_sensitivity(model, one, collect(model, one))) for one in (samples, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    changed = encoder()
    with torch.no_grad():
        changed.down.weight[0] += 0.1
    assert HeldOut(model, samples).error(changed) == HeldOut(model, plain).error(changed)


def test_positions_are_drawn_among_the_visible_ones() -> None:
    mask = batch()["attention_mask"].bool()
    x = torch.where(mask, 1.0, float("nan")).unsqueeze(-1) * torch.arange(1.0, 43.0).view(6, 7, 1)
    for shape in ((6, 7, 1), (42, 1)):
        for rows in (5, 1000):
            generator = torch.Generator().manual_seed(0)
            layer = Linear(torch.zeros(2, 1))
            found = torch.cat(
                list(read_columns(layer, x.view(shape), rows=rows, generator=generator, masks=(mask,))), 1
            )
            assert found.shape == (1, min(rows, sum(LENGTHS)), 1)
            assert found.flatten().unique().numel() == found.numel()
            assert not found.isnan().any()


@pytest.mark.parametrize(("padding", "count"), [(1, sum(LENGTHS)), (0, len(LENGTHS) * (LONGEST - 2))])
def test_convolutions_along_time_leave_out_hidden_outputs_where_lengths_are_kept(padding: int, count: int) -> None:
    mask = batch()["attention_mask"].bool()
    conv = Conv(torch.zeros(2, 4, 3), Geometry((1,), ((padding, padding),), (1,), (0,)))
    x = torch.randn(6, 4, LONGEST)
    found = list(read_columns(conv, x, rows=1000, generator=torch.Generator(), masks=(mask,)))
    assert sum(block.shape[1] for block in found) == count


# --- orders of rows --------------------------------------------------------------------------------------------------


class Ordered(nn.Module):
    """A linear layer on rows in some order, between an embedding and the output (N, T, d)."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.there, self.back = there, back
        self.tokens, self.linear = nn.Embedding(IDS, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.back(self.linear(self.there(x)), x)


ORDERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], bool]] = {
    "rows": (lambda x: x, lambda y, x: y, True),
    "flat": (lambda x: x.flatten(0, 1), lambda y, x: y.view_as(x), True),
    "time-first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1), True),
    "time-first-flat": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, x: y.view(x.shape[1], x.shape[0], -1).transpose(0, 1),
        True,
    ),
    "backwards": (lambda x: x.flip(0), lambda y, x: y.flip(0), False),
    "heads": (lambda x: x.unsqueeze(1).expand(-1, 7, -1, -1), lambda y, x: y.mean(1), False),
}


@pytest.mark.parametrize("lengths", [LENGTHS, (*LENGTHS, 4)], ids=["batch-6", "batch-of-the-length"])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_another_order_are_never_taken_for_hidden_ones(order: str, lengths: tuple[int, ...]) -> None:
    """Of seven samples of length seven no shape tells the order."""
    torch.manual_seed(0)
    there, back, known = ORDERS[order]
    model, inputs = Ordered(there, back).eval(), batch(lengths)
    given = {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}
    found = collect(model, read_calibration(given, model))
    every = inputs["input_ids"].numel() * (7 if order == "heads" else 1)
    assert found["linear"].count == (sum(lengths) if known else every)
    assert found["tokens"].count == sum(lengths)


class Torch(nn.Module):
    """A block of torch's, whose attention has rows time first, and flattens them so."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.tokens = nn.Embedding(IDS, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 12, batch_first=batch_first)

    def forward(self, ids: Tensor, key_padding_mask: Tensor) -> Any:
        x = self.tokens(ids if self.batch_first else ids.T)
        y = self.block(x, src_key_padding_mask=key_padding_mask)
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("count", [1, 6, LONGEST])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["module", "program"])
def test_rows_with_positions_in_front_are_hidden_too(kind: str, batch_first: bool, count: int) -> None:
    torch.manual_seed(0)
    lengths = (3, *LENGTHS)[:count]
    inputs = batch(lengths)
    given = {"ids": inputs["input_ids"], "key_padding_mask": inputs["attention_mask"] == 0}
    model = as_kind(Torch(batch_first).eval(), kind, given)
    found = collect(model, read_calibration(given, model))
    assert len(found) == 7
    assert all(m.count == sum(lengths) for m in found.values())


@pytest.mark.parametrize("kind", ["module", "program-dynamic"])
def test_the_same_positions_are_seen_of_a_model_and_of_a_changed_one(kind: str) -> None:
    inputs = batch()
    model = as_kind(encoder(), kind, inputs)
    changed = decompose(model, inputs, ranks={"up": 4, "*": None}).model
    samples = read_calibration(inputs, model, inputs, batch_size=4)
    observed = observe(model, next(iter(samples)))
    spots = {spot.site.name: spot for spot in observed.find().placements}
    visible = VisibleRows(observed, samples, spots.values())
    seen: list[list[tuple[Tensor, ...]]] = []
    for one in (observed, observe(changed, next(iter(samples)))):
        seen.append([])
        spot = next(spot for spot in one.find().placements if spot.site.name == "head")
        visible.watch(one, spot, lambda x, masks: seen[-1].append(tuple(masks)))
        for inputs_ in samples:
            one.run(inputs_)
    assert len(seen[0]) == len(seen[1]) == 2
    for one_, other in zip(*seen, strict=True):
        assert len(one_) == len(other) == 1
        assert torch.equal(one_[0], other[0])


# --- what a mask is --------------------------------------------------------------------------------------------------


def test_names_of_masks() -> None:
    names = ("mask", "attention_mask", "decoder_attention_mask", "input_mask", "key_padding_mask", "Mask")
    assert all(map(is_mask_name, names))
    others = ("head_mask", "cross_attn_head_mask", "token_type_ids", "bool_masked_pos", "global_attention_mask")
    assert not any(map(is_mask_name, (*others, "padding_mask", "input_ids", "special_tokens_mask")))


MASK = batch()["attention_mask"]
IDS_ = batch()["input_ids"]


@pytest.mark.parametrize(
    ("mask", "beside", "found"),
    [
        (MASK, IDS_, True),
        (MASK.bool(), IDS_, True),
        (MASK.float(), IDS_, True),
        (MASK.int() * 3, IDS_, True),
        (MASK, torch.randn(6, 7, 5), True),
        (torch.ones_like(MASK), IDS_, False),  # it hides nothing
        (MASK.float() * 0.5, IDS_, False),
        ((1.0 - MASK) * -1e4, IDS_, False),  # it is added to scores
        (torch.zeros(6, 7), IDS_, False),
        (MASK - 1, IDS_, False),
        (MASK, torch.randn(6, 5), False),
        (MASK[:, None, None], IDS_, False),
        (MASK, None, False),
    ],
)
def test_values_of_masks(mask: Tensor, beside: Tensor | None, found: bool) -> None:
    assert bool(find_masks(["x", "mask"], [beside, mask])) == found
    assert not find_masks(["x", "y"], [beside, mask])


def test_of_two_masks_of_one_length_what_either_shows_is_visible() -> None:
    other = batch((1, 7, 7, 1, 6, 2))["attention_mask"]
    masks = find_masks(["input_ids", "attention_mask", "decoder_attention_mask"], [IDS_, MASK, other])
    assert [mask.place for mask in masks] == [1, 2]
    (shown,) = read_masks(masks, [IDS_, MASK, other])
    assert torch.equal(shown, (MASK + other) > 0)


def test_masks_are_known_by_place_by_name_and_inside_an_argument() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return self.inner(**inputs)

    for model, given in ((encoder(), batch()), (encoder(), [tuple(batch().values())]), (Nested(), [(batch(),)])):
        samples = read_calibration(given, model, batch_size=4)
        (args, kwargs), *_ = samples
        assert torch.equal(samples.visible((args, kwargs))[0], MASK[:4].bool())
        assert samples.split()[0].masks == samples.masks


def test_a_mask_in_the_manner_of_torch_hides_with_ones() -> None:
    inverted = {"ids": IDS_, "key_padding_mask": MASK == 0}
    assert torch.equal(read_calibration(inverted, Torch()).visible(((), inverted))[0], MASK.bool())


def test_rows_by_shape() -> None:
    mask = MASK.bool()
    shapes: dict[tuple[int, ...], Tensor] = {(6, 7): mask, (42,): mask, (6, 7, 2): mask.repeat_interleave(2, 1)}
    for shape, rows in shapes.items():
        found = visible_rows((mask[:, :3], mask), shape)
        assert found is not None
        assert torch.equal(found, rows.flatten())
    for shape in ((7, 6), (6,), (6, 4, 7), (6, 7, 7), (41,), (1, 7)):
        assert visible_rows((mask,), shape) is None


def test_samples_without_a_visible_position_are_left_out() -> None:
    model, lengths = encoder(), (7, 0, 3, 0)
    samples = read_calibration(batch(lengths), model)
    assert samples.count == 2
    assert collect(model, samples)["q"].count == 10
    with pytest.raises(InputError, match=r"attention_mask hides all positions of all 2 calibration samples"):
        read_calibration(batch((0, 0)), model)
    # of samples that come so, the site is told
    leaves = tuple(batch((0, 0)).values())
    hidden = replace(samples, leaves=leaves)
    with pytest.raises(InputError, match="no calibration input reached"):
        collect(model, hidden)
    some = replace(samples, leaves=tuple(batch(lengths).values()))
    assert collect(model, some)["q"].count == 10


# --- held-out outputs ------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """Outputs of every layout, from ids; the width is the length of sequences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, Encoder(width=LONGEST)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens, pooled = self.inner(input_ids, attention_mask)
        shown = attention_mask == 1
        outputs = {
            "tokens": tokens,
            "scores": tokens[..., 0],
            "filled": tokens[..., 0].masked_fill(~shown, -1e9),
            "pooled": pooled,
            "first": tokens[:, 0],
            "time-first": tokens.transpose(0, 1),
        }
        return outputs[self.kind]


@pytest.mark.parametrize("lengths", [LENGTHS, (*LENGTHS, 4)], ids=["batch-6", "batch-of-the-length"])
@pytest.mark.parametrize("kind", ["tokens", "scores", "filled", "pooled", "first", "time-first"])
def test_the_error_leaves_out_hidden_outputs_and_counts_others_whole(kind: str, lengths: tuple[int, ...]) -> None:
    """A pooled output as wide as sequences are long has no hidden positions."""
    torch.manual_seed(0)
    model = Outputs(kind).double().eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.inner.down.weight[0] += 0.3
    inputs = batch(lengths, behind=-1)
    y, z = model(**inputs).detach(), changed(**inputs).detach()
    if kind in ("tokens", "scores", "filled"):
        mask = inputs["attention_mask"] == 1
        y, z = y[mask], z[mask]
    expected = float((z - y).norm() / y.norm())
    samples = read_calibration(inputs, model)
    assert HeldOut(model, samples).error(changed)[0] == pytest.approx(expected, rel=EXACT)


def test_hidden_outputs_that_are_not_finite_do_not_matter() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x).masked_fill((mask == 0).unsqueeze(-1), -float("inf"))

    torch.manual_seed(0)
    model, x = Infinite(), torch.randn(6, 7, 3)
    assert HeldOut(model, read_calibration({"x": x, "mask": MASK}, model)).error(model) == (0.0, 0.0)


def test_a_promise_is_kept_on_visible_positions() -> None:
    model, lengths = encoder(), LENGTHS * 4
    found = decompose(model, batch(lengths), calibration=batch(lengths), ranks=Goal.error(0.3, cost="params"))
    assert found.promise is not None
    assert found.promise.kept
    assert isinstance(as_kind(model, "program", batch()), ExportedProgram)
