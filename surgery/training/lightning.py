"""LowRankTraining as a callback of Lightning's Trainer.

Its checkpoints always hold the weights of the dense architecture, composed while the network is factored, so that
``load_from_checkpoint`` of the original class can read them. The factors are in the callback's own state in the
checkpoint. A fit from ``ckpt_path`` loads the dense weights, restores the run, and then loads the optimizer's state.

A checkpoint that is saved at the end of an epoch holds the weights that were scored in that epoch: the callback only
records the epoch there, and a switch that is due comes at the start of the next epoch.

Averages of the weights switch together with the network: those of ``WeightAveraging`` and ``EMAWeightAveraging``, in
any order of callbacks, and every other AveragedModel that a callback or the LightningModule holds.
``StochasticWeightAveraging`` and callbacks that copy the network in their own way are refused before the first epoch,
because nobody can know how to keep such copies up to date.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from surgery.errors import InputError
from surgery.training.dense_state import DenseStates
from surgery.training.low_rank import LowRankTraining
from surgery.training.trainee import averages_of, keeps_copy
from surgery.training.wrappers import NO_END, unwrap

try:
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise InputError(
        "surgery.training.lightning needs Lightning", next_step="pip install 'model-surgery[lightning]'"
    ) from error

__all__ = ["LowRankCallback"]


class LowRankCallback(Callback):
    """Decomposes a network inside a LightningModule partway through the fit, and recomposes it at the end.

        callback = LowRankCallback(images, module="model")
        Trainer(max_epochs=20, callbacks=[callback]).fit(module, loader)
        print(callback.run.history)

    While the network is factored, ``state_dict`` of the LightningModule holds the dense weights that the factors
    compose to. The seconds in the history do not include validation.

    Args:
        example_inputs: one training batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        module: the dotted name of the network in the LightningModule.
        monitor: the name of a logged metric to record as the accuracy in the history.
        mirrors: dotted names of modules in the LightningModule that are averages of the network and must switch with
            it; an AveragedModel is found without being named.
        options: the options of ``LowRankTraining``; ``epochs`` is the trainer's ``max_epochs`` unless it is given.

    Raises:
        InputError: from ``fit``: an argument is not allowed; there is more than one process; a callback keeps a copy
            of the network that cannot be kept up to date.
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        module: str = "model",
        monitor: str | None = None,
        mirrors: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._inputs, self._module, self._monitor, self._options = example_inputs, module, monitor, options
        self._mirrors = tuple(mirrors)
        self._run: LowRankTraining | None = None
        self._states: DenseStates | None = None
        self._saved: Mapping[str, Any] | None = None
        self._stage, self._validation = "", 0.0

    @property
    def run(self) -> LowRankTraining:
        """The run, with its history and plan.

        Raises:
            InputError: ``fit`` has not begun.
        """
        if self._run is None:
            raise InputError("the training has not begun", next_step="call trainer.fit first")
        return self._run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is a fit; only a fit continues the run that is in a checkpoint."""
        self._stage, self._saved = stage, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the run; if a state was loaded, restore it."""
        if trainer.world_size > 1:
            raise InputError(
                f"a Lightning fit over {trainer.world_size} processes",
                allowed="one",
                next_step="use LowRankTraining with DistributedDataParallel in a loop of your own",
            )
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        model = _network(pl_module, self._module)
        self._refuse_copies(trainer, unwrap(model))
        self._inputs = move_data_to_device(self._inputs, pl_module.device)
        optimizer = _optimizer_of(model, trainer.optimizers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NO_END)  # on_train_end calls finish()
            self._run = LowRankTraining(model, optimizer, self._inputs, **{"epochs": epochs, **self._options})
        self._states = DenseStates(self._run)
        self._add_mirrors(trainer, pl_module)
        if self._saved:
            self._run.load_state_dict(self._saved)
            # A mirror that the checkpoint does not have starts from the weights of the network.
            root, *copies = self._run.roots
            for copy, state in zip_longest(copies, self._saved.get("mirrors", ())):
                copy.load_state_dict(root.state_dict() if state is None else state)
            self._saved = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch if that is due after the last epoch; before the first, check the copies that other callbacks made."""
        if not len(self.run.history):
            self._refuse_copies(trainer, unwrap(self.run.model))
        self._add_mirrors(trainer, pl_module)
        self.run.begin_epoch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Subtract the time of the validation from the seconds of the epoch."""
        if self._run is not None:
            self._run.leave_out(time.perf_counter() - self._validation)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch; a switch that is due waits for the next epoch or for the end."""
        value = None if self._monitor is None else trainer.callback_metrics.get(self._monitor)
        self.run.note_epoch(trainer.current_epoch, accuracy=None if value is None else float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run."""
        self.run.finish()
        if self._states is not None:
            self._states.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run and of its mirrors, for a checkpoint."""
        if self._run is None or self._states is None:
            return {}
        with self._states.paused():
            return {**self._run.state_dict(), "mirrors": [copy.state_dict() for copy in self._run.roots[1:]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the run that ``fit`` will make."""
        self._saved = state_dict if self._stage == "fit" else None

    def _refuse_copies(self, trainer: Trainer, network: nn.Module) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name, value in vars(callback).items():
                if callback is not self and keeps_copy(value, network):
                    raise InputError(
                        f"{type(callback).__name__} keeps a copy of the network in {name!r}, which would go stale",
                        allowed="averages in an AveragedModel",
                        next_step="use WeightAveraging or EMAWeightAveraging",
                    )

    def _add_mirrors(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mirror the averages of the network, and make the states of the modules that hold them dense as well."""
        run, states = self.run, self._states
        if run.phase != "dense" or states is None:
            return
        network = unwrap(run.model)
        states.watch(pl_module)
        for name in self._mirrors:
            run.mirror(_network(pl_module, name))
        for average in _averages(trainer, pl_module):
            for copy in averages_of([average], network):
                run.mirror(copy)
                states.watch(average.module)


def _averages(trainer: Trainer, pl_module: LightningModule) -> Iterator[AveragedModel]:
    """Yield the averages that callbacks and the LightningModule hold."""
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
    yield from (value for value in (*held, *pl_module.modules()) if isinstance(value, AveragedModel))


def _network(pl_module: LightningModule, name: str) -> nn.Module:
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in pl_module.named_children())
        raise InputError(
            f"the LightningModule has no module {name!r}", allowed=known, next_step="say module= or mirrors="
        ) from None


def _optimizer_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the one optimizer that trains the model."""
    own = {id(parameter) for parameter in model.parameters()}
    found = [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
    if len(found) != 1:
        raise InputError(f"{len(found)} optimizers train the network", allowed="one")
    return found[0]
