"""Sums that stand in a file: they hold what was added, take memory only while they are open, and share one file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.data.collect import collect, with_sensitivity
from surgery.data.samples import read_calibration
from surgery.data.sums import SquareSum
from surgery.system.spill import LARGE, Spill

SIDE = 1024  # float64 of its square are above LARGE; its rows wait until there are 64


def test_large_sums_stand_in_a_file_and_small_ones_in_memory() -> None:
    spill = Spill()
    small, first, second = spill.zeros((3,)), spill.zeros((1, LARGE // 8 + 1)), spill.zeros((2, LARGE // 8))
    assert [one.in_file for one in (small, first, second)] == [False, True, True]
    for value, one in enumerate((small, first, second), start=1):
        one.opened().add_(value)
        one.opened().add_(value)
    assert [one.opened().unique().tolist() for one in (small, first, second)] == [[2.0], [4.0], [6.0]]


def test_without_room_for_a_file_sums_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    one = Spill().zeros((LARGE,))
    one.opened().add_(1.0)
    assert not one.in_file
    assert float(one.opened().sum()) == LARGE


def test_a_part_is_opened_alone_wherever_it_starts() -> None:
    spill, values = Spill(), torch.arange(LARGE // 8 + 700, dtype=torch.float64)
    for one in (spill.holding(values), Spill().holding(values[:3000])):
        one.part(700, (3, 5)).neg_()
        assert one.part(699, (4,)).tolist() == [699, -700, -701, -702]
        assert one.opened()[713:716].tolist() == [-713, -714, 715]


@pytest.mark.parametrize("size", [32, SIDE, SIDE + 40])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_a_sum_of_squares_is_that_of_all_rows(size: int, count: int) -> None:
    rows = torch.randn(2, 3 * count, size, dtype=torch.float64)
    total = SquareSum(2, size, Spill())
    for part in rows.split(count, 1):
        total.add(part)
    wanted = rows.mT @ rows
    for _ in range(2):  # to ask for it does not change it
        found = total.over(1)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
        assert torch.equal(total.diagonal(), found.diagonal(dim1=-2, dim2=-1))
    total.add_to(found)
    assert torch.equal(found, total.over(1) * 2)


def test_no_moment_of_a_large_site_is_held() -> None:
    """Moments are made anew each time, of sums that are not in memory; both times the same."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(SIDE, SIDE)).eval(), torch.randn(8, SIDE)
    samples = read_calibration(x, model)
    found = with_sensitivity(model, samples, collect(model, samples))
    one, other = found["0"], found["0"]
    assert one.sensitivity is not None
    assert other.sensitivity is not None
    assert torch.equal(one.second, other.second)
    assert torch.equal(one.sensitivity, other.sensitivity)
    assert one.metric.factors[0].data_ptr() != other.metric.factors[0].data_ptr()
    assert torch.allclose(one.second[0], (x.mT @ x / 8).double(), atol=1e-5)
