"""How many threads wait for work beside a solver of small tensors, which calls NumPy, SciPy and torch in turn.

The wheels of NumPy and SciPy have an OpenBLAS of their own each, with a pool of threads of its own, as torch has. They
wait by spinning for a while, so that where calls of all three alternate the pools take each other's cores: on two cores
CP of small kernels then took up to 45 times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["one_pool"]


@contextmanager
def one_pool(*, one_thread: bool) -> Iterator[None]:
    """Within it torch's pool of threads is the only one, or there is none: ``one_thread`` does all.

    A second thread costs small tensors more than it does for them. Limits nest; of several threads of Python the one
    that came first sets NumPy's and SciPy's, and the others leave them as they are.
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


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(prefix="libscipy_openblas")
