"""How many threads wait for work while a solver of small tensors calls NumPy, SciPy and torch in turn.

The wheels of NumPy and SciPy each bring an OpenBLAS with a pool of threads, and torch has a pool, too. Idle threads
spin for a while. If calls of all three alternate, the pools therefore take each other's cores: on two cores, CP of
small kernels then took up to 45 times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["one_pool", "torchs_threads"]


@contextmanager
def one_pool(*, one_thread: bool) -> Iterator[None]:
    """Use torch's pool of threads alone in the block; with ``one_thread``, use a single thread for everything.

    For small tensors a second thread costs more than it gains. Limits nest. Of several Python threads, the first to
    come sets the limits of NumPy and SciPy, and the others leave them as they are.
    """
    threads = torch.get_num_threads()
    with _openblas().limit(limits=1):
        try:
            if one_thread:
                torch.set_num_threads(1)
            yield
        finally:
            if one_thread:
                torch.set_num_threads(threads)


@contextmanager
def torchs_threads() -> Iterator[None]:
    """Let NumPy and SciPy use as many threads as torch does in the block, for a single large call."""
    with _openblas().limit(limits=torch.get_num_threads()):
        yield


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(prefix="libscipy_openblas")
