"""Training in low rank in a user's loop: scalers, averages, Frobenius decay, memory formats, history, wrong options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from surgery.algebra import Chain, Linear, relative_error
from surgery.errors import InputError
from surgery.training import LowRankTraining
from surgery.training.frobenius import product_gradients
from tests.tolerances import tolerance
from tests.training_cases import FULL, OPTIMIZERS, RANKS, Net, batch, loss_of, make_run, train


def hidden_chain(pair: Sequence[Tensor]) -> Chain:
    """The chain of the two factors of the layer ``hidden``."""
    return Chain((Linear(pair[0]), Linear(pair[1])))


def test_a_gradient_scaler_and_clipping_work_across_the_switch() -> None:
    run = make_run("adamw", recompose_at=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for epoch in range(3):
        for step in range(3):
            run.optimizer.zero_grad()
            scaler.scale(loss_of(run.model, batch(seed=step))).backward()
            scaler.unscale_(run.optimizer)
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            assert bool(torch.isfinite(norm))
            scaler.step(run.optimizer)
            scaler.update()
        run.end_epoch(epoch)
    assert [row.steps for row in run.history] == [3, 3, 3]


def test_an_average_of_the_weights_goes_along() -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run = LowRankTraining(
        model, optimizer, batch(torch.float64)[0], decompose_at=1, ranks={**FULL, "head": None}, recompose_at=2
    )
    run.mirror(average)
    x = batch(torch.float64, seed=7)[0]
    for epoch in range(2):
        for seed in range(4):
            train(run, steps=1, seed=seed)
            average.update_parameters(run.model)
        before = average.eval()(x).detach()
        run.end_epoch(epoch)
        # one Gauss-Newton step from the model's factors: what is left is the product of two small changes
        assert relative_error(average.eval()(x), before) <= (1e-2 if epoch == 0 else 1e-12)
        shapes = [value.shape for value in average.module.state_dict().values()]
        assert shapes == [value.shape for value in run.model.state_dict().values()]
    late = make_run()
    train(late)
    late.end_epoch(0)
    with pytest.raises(InputError):
        late.mirror(Net())


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frobenius_decay_decays_the_product(optimizer: str, closure: bool) -> None:
    """With gradients of zero, a step is ``F - lr wd J^T W``, whether the optimizer couples its decay or not."""
    run = make_run(optimizer, dtype=torch.float64, ranks={"hidden": 3}, frobenius_decay=True)
    train(run)
    run.end_epoch(0)
    hidden, group = run.model.hidden, run.optimizer.param_groups[0]
    run.optimizer.state.clear()
    factors = [hidden[0].weight, hidden[1].weight]
    before = [factor.detach().clone() for factor in factors]
    decays = product_gradients(before, hidden_chain)

    def gradients() -> float:
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return 0.0

    if closure:
        run.optimizer.zero_grad()
        run.optimizer.step(gradients)
    else:
        gradients()
        run.optimizer.step()
    for factor, start, decay in zip(factors, before, decays, strict=True):
        expected = start - group["lr"] * group["weight_decay"] * decay
        assert relative_error(factor, expected) <= tolerance(torch.float64, length=64, steps=8)
    run.finish()
    assert not run.optimizer._optimizer_step_pre_hooks


def test_frobenius_decay_is_found_anew_now_and_then() -> None:
    """In between, what it changes in a gradient stays as it was; after an epoch it is found anew."""
    run = make_run(dtype=torch.float64, ranks={"hidden": 3})
    train(run)
    run.end_epoch(0)
    group, factors = run.optimizer.param_groups[0], [run.model.hidden[0].weight, run.model.hidden[1].weight]
    group["momentum"] = 0.0

    def change() -> list[Tensor]:
        decays = product_gradients(factors, hidden_chain)
        return [decay - factor.detach() for factor, decay in zip(factors, decays, strict=True)]

    first = change()
    for wanted in (first, first, None):
        if wanted is None:
            run.end_epoch(1)
            wanted = change()
        before = [factor.detach().clone() for factor in factors]
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        for factor, start, part in zip(factors, before, wanted, strict=True):
            expected = start - group["lr"] * group["weight_decay"] * (start + part)
            assert relative_error(factor, expected) <= tolerance(torch.float64, length=64, steps=8)


class OwnSGD(torch.optim.SGD):
    """An optimizer that is none of torch's."""


@pytest.mark.parametrize(("kind", "fused"), [(torch.optim.SGD, True), (OwnSGD, False)])
def test_where_the_decay_is_not_known_it_is_that_of_the_factors(kind: type[torch.optim.SGD], fused: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=fused)
    settings: dict[str, Any] = {"decompose_at": 1, "ranks": RANKS, "recompose_at": None}
    with pytest.raises(InputError, match="fused" if fused else "OwnSGD"):
        LowRankTraining(model, optimizer, batch()[0], frobenius_decay=True, **settings)
    run = LowRankTraining(model, optimizer, batch()[0], **settings)
    train(run)
    run.end_epoch(0)
    train(run)
    assert run.phase == "factored"
    assert not optimizer._optimizer_step_pre_hooks


def test_history_shows_what_happened(tmp_path: object) -> None:
    run = make_run(recompose_at=2)
    for epoch in range(3):
        train(run)
        run.end_epoch(epoch, accuracy=0.5 + 0.1 * epoch)
    text = repr(run.history)
    assert "decompose after epoch 1" in text
    assert "recompose after epoch 2" in text
    assert [row.phase for row in run.history] == ["dense", "factored", "recomposed"]
    errors = {change.site: change.error for change in run.history.events[0].changes}
    assert set(errors) == {"first", "second", "hidden"}
    assert all(0 < error < 1 for error in errors.values())
    run.history.plot(f"{tmp_path}/history.png")
    with pytest.raises(InputError):
        type(run.history)().plot(f"{tmp_path}/none.png")


def test_channels_last_weights_stay_so() -> None:
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of modules, torch types it for four axes by position alone
    optimizer = OPTIMIZERS["adam"](model.parameters())
    run = LowRankTraining(model, optimizer, batch()[0], decompose_at=1, ranks=RANKS, recompose_at=2, memory_format=None)
    for epoch in range(2):
        train(run)
        run.end_epoch(epoch)
        weights = [p for p in model.parameters() if p.dim() == 4]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        moments: list[Tensor] = [optimizer.state[w]["exp_avg"] for w in weights]
        assert all(m.stride() == w.stride() for m, w in zip(moments, weights, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"decompose_at": 0}, {"recompose_at": "never"}, {"recompose_at": 1}, {"epochs": -1}, {"memory_format": "nhwc"}],
)
def test_wrong_options_are_one_clear_error(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        make_run(**options)  # type: ignore[arg-type]
