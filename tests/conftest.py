"""One thread, one seed, one Hypothesis profile, a cache folder of our own, and how much of the laws is tried."""

from __future__ import annotations

import gc
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.covering import ALL
from tests.hostile import command_lines as hostile
from tests.hostile.seeds import write_seeds

torch.set_num_threads(1)  # pytest-xdist runs several workers; more threads each only get in each other's way

# Derandomised, so that a red run is red again; HYPOTHESIS_PROFILE=hunt looks for new counterexamples.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
_EXAMPLES = 100 if ALL else 40
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=_EXAMPLES, suppress_health_check=_SLOW)
settings.register_profile("hunt", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


gc.disable()  # the collection of tests makes many objects and no garbage; see below


def pytest_collection_finish() -> None:
    """Leave what stays for good, modules and tests, out of every search for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[None]:
    """Likewise what the tests of a file have imported, and the networks that they share."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests off the user's cache of measured latencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("surgery-cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def command_lines() -> Iterator[hostile.CommandLines]:
    """What runs command lines in processes of their own."""
    with hostile.serving() as server:
        yield server


@pytest.fixture(scope="session")
def _seeds(command_lines: hostile.CommandLines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeds(tmp_path_factory.mktemp("seeds"), command_lines)


@pytest.fixture
def seeds(_seeds: Path, tmp_path: Path) -> Path:
    """A folder with the honest files, which are links to one copy of them."""
    folder = tmp_path / "folder"
    shutil.copytree(_seeds, folder, copy_function=os.link)
    return folder


_SHARE = 4  # of the cases of a law, one in so many is tried unless its marker says another number


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out most of what crosses all cases with all methods: it is many minutes, and `make laws` has it.

    Each law is tried on other cases, so that each case is tried by some.
    """
    if ALL:
        return
    laws = defaultdict(list)
    for item in items:
        if item.get_closest_marker("law"):
            laws[item.nodeid.partition("[")[0]].append(item)
    dropped = set()
    for name, group in laws.items():
        share = max(mark.args[0] if mark.args else _SHARE for mark in group[0].iter_markers("law"))
        if len(group) > share:
            first = zlib.crc32(name.encode()) % share
            dropped |= {item for i, item in enumerate(group) if i % share != first}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]
