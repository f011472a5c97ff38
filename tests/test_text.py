"""First lines of errors, where a message has none as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.data.collect import collect, with_sensitivity
from surgery.data.samples import read_calibration
from surgery.errors import CaptureError, InputError, SurgeryError
from surgery.passes.metrics import scores_of
from surgery.runtime.compare import run_model
from surgery.runtime.export import export_onnx
from surgery.text import first_line

X = torch.zeros(4, 8)


@pytest.mark.parametrize("message", ["", " ", "\n", " \n\n"])
def test_an_error_that_says_nothing_gives_its_type(message: str) -> None:
    assert first_line(RuntimeError(message)) == "RuntimeError"


def test_the_first_line_that_says_anything() -> None:
    assert first_line(ValueError("\n  too long \nby far")) == "too long"


def fail(*args: Any) -> Tensor:
    raise RuntimeError


class Fails(nn.Module):
    """Fails without a word."""

    def forward(self, x: Tensor) -> Tensor:
        return fail(x)


class FailsInCapture(nn.Module):
    """Runs, but torch.export fails on it without a word."""

    def forward(self, x: Tensor) -> Tensor:
        return fail(x) if torch.compiler.is_exporting() else x


class FailsInBackward(nn.Module):
    """Runs, but its gradients fail without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(fail)
        return y


def differentiate() -> None:
    model = FailsInBackward()
    batches = read_calibration(X, model)
    with_sensitivity(model, batches, collect(model, batches))


FAILURES: dict[str, tuple[Callable[[], Any], type[SurgeryError], str]] = {
    "run": (lambda: run_model(Fails(), ((X,), {})), InputError, "does not run on these inputs: RuntimeError"),
    "metric": (lambda: scores_of(nn.Linear(8, 8), fail), InputError, "the metric failed: RuntimeError"),
    "gradients": (differentiate, InputError, "cannot be differentiated: RuntimeError"),
    "capture": (lambda: export_onnx(FailsInCapture(), "x.onnx", X), CaptureError, "cannot be captured: RuntimeError"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_without_a_word_is_our_error(where: str) -> None:
    run, kind, words = FAILURES[where]
    with pytest.raises(kind, match=words):
        run()
