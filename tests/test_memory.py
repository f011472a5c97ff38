"""The estimate of a solver's memory grows with the weight, and what does not fit is refused with a reason."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import InputError
from surgery.factorizations import FACTORIZATIONS
from surgery.system import memory
from surgery.system.memory import check_memory, estimate

METHODS = st.sampled_from([*FACTORIZATIONS, "tt", "tr", "cp", "another"])
KERNELS = st.lists(st.integers(1, 300), min_size=3, max_size=5)


@given(METHODS, KERNELS, st.sampled_from([2, 4, 8]))
def test_an_estimate_has_room_for_copies_and_for_no_more_than_a_multiple(
    method: str, kernel: list[int], size: int
) -> None:
    weight = max(size, 4)
    for extent in kernel:
        weight *= extent
    assert 3 * weight < estimate(method, kernel, size) <= 12 * weight


@given(METHODS, KERNELS, st.integers(0, 4))
def test_an_estimate_grows_with_each_extent(method: str, kernel: list[int], axis: int) -> None:
    larger = list(kernel)
    larger[axis % len(kernel)] += 1
    assert estimate(method, larger, 4) > estimate(method, kernel, 4)


def test_the_long_side_costs_no_square() -> None:
    assert estimate("svd", (1, 8, 10**6), 4) < 5 * 8 * 8 * 10**6


def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "meminfo"
    path.write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", path)
    monkeypatch.setattr(memory, "_CONTAINERS", ((tmp_path / "max", tmp_path / "current"),))


def test_what_fits_passes_and_what_does_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(tmp_path, monkeypatch, "MemTotal:  9 kB\nMemAvailable:  2097152 kB\n")
    assert memory.available_memory() == 2**31
    check_memory(2**31, "svd of fc")
    with pytest.raises(InputError) as caught:
        check_memory(2**31 + 2**29, "svd of fc")
    assert caught.value.what == "svd of fc may need 2.5 GiB of memory"
    assert caught.value.allowed == "the 2.0 GiB available"
    assert "keep this site dense" in str(caught.value)


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(tmp_path, monkeypatch, "MemAvailable: 1024 kB\n")
    (tmp_path / "current").write_text("1000\n")
    for limit, available in (("max", 2**20), ("5000", 4000), ("10", 0)):
        (tmp_path / "max").write_text(f"{limit}\n")
        assert memory.available_memory() == available


def test_small_sizes_are_said_in_mebibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(tmp_path, monkeypatch, "MemAvailable: 1024 kB\n")
    with pytest.raises(InputError, match=r"may need 2 MiB of memory; allowed: the 1 MiB available"):
        check_memory(2**20 + 1, "svd of fc")


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n"])
def test_a_system_that_does_not_say_lets_everything_pass(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo(tmp_path, monkeypatch, text)
    assert memory.available_memory() is None
    check_memory(2**60, "svd of fc")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "there is none")
    assert memory.available_memory() is None
    check_memory(2**60, "svd of fc")


def test_this_system_has_some_memory() -> None:
    available = memory.available_memory()
    assert available is None or available > 0


def test_the_example_runs() -> None:
    assert doctest.testmod(memory).failed == 0


def test_a_container_gives_up_what_it_holds_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(tmp_path, monkeypatch, "MemAvailable:  2097152 kB\n")
    (tmp_path / "max").write_text(f"{2**30}\n")
    (tmp_path / "current").write_text(f"{2**29}\n")
    assert memory.available_memory() == 2**29
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**28}\n")
    assert memory.available_memory() == 2**29 + 2**28
    (tmp_path / "max").write_text("max\n")
    assert memory.available_memory() == 2**31
