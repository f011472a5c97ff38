"""Run a function in two processes that meet over gloo; a server that has imported what they need forks them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining
from torch.multiprocessing.spawn import start_processes

import surgery.passes.decompose
import surgery.stages.distributed
import surgery.training.admm
import surgery.training.low_rank  # noqa: F401

__all__ = ["WORLD", "together", "two_processes"]

WORLD = 2
_WAIT = datetime.timedelta(seconds=60)  # for the other process

two_processes = pytest.mark.xdist_group("two processes")  # one worker takes these tests, and starts one server


def together(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``work(rank, folder)`` in two processes; what it raises in one of them is raised here."""
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(_join, args=(work, folder), nprocs=WORLD, start_method="forkserver")


def _join(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meet = f"file://{folder / 'meet'}"  # they find each other by a file, and take no port by number
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD, timeout=_WAIT)
    try:
        work(rank, folder)
    finally:
        dist.destroy_process_group()
