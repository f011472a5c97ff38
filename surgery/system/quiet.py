"""Silence the libraries that speak of themselves: warnings of deprecations, and lines in logs beside an exception."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

_LOUD = ("torch", "torch.onnx", "torch.export", "torch._export", "torch._subclasses", "onnxscript", "onnx_ir")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of torch and its exporters; what goes wrong is raised as well."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
