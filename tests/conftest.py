"""One thread, one seed, one Hypothesis profile, and a cache folder of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # pytest-xdist runs several workers; more threads each only get in each other's way

# Derandomised, so that a red run is red again; HYPOTHESIS_PROFILE=hunt looks for new counterexamples.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=100, suppress_health_check=_SLOW)
settings.register_profile("hunt", deadline=None, max_examples=2000, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests off the user's cache of measured latencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("surgery-cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
