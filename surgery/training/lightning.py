"""LowRankTraining as a callback of Lightning's Trainer.

Its checkpoints have the weights of the dense architecture at any time, composed while the network is factored, so that
``load_from_checkpoint`` of the original class takes them. The callback's own state in them has the factors; a fit from
``ckpt_path`` loads the dense weights, then makes the run that it was, and then loads the optimizer's state as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.passes.recompose import recompose
from surgery.training.low_rank import LowRankTraining
from surgery.training.wrappers import unwrap

try:
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise InputError(
        "surgery.training.lightning needs Lightning", next_step="pip install 'model-surgery[lightning]'"
    ) from error

__all__ = ["LowRankCallback"]


class LowRankCallback(Callback):
    """Decomposes a network inside of a LightningModule in mid-fit, and recomposes it at the end.

        callback = LowRankCallback(images, module="model")
        Trainer(max_epochs=20, callbacks=[callback]).fit(module, loader)
        print(callback.run.history)

    Args:
        example_inputs: one batch for the network as in training: a tensor, a tuple of arguments, or a dict of keywords.
        module: the dotted name of the network in the LightningModule.
        monitor: the name of a logged metric that is the accuracy of the history.
        options: those of ``LowRankTraining``; ``epochs`` is the trainer's ``max_epochs`` unless it is given.

    Raises:
        InputError: from ``fit``, arguments that cannot be used; more than one process.
    """

    def __init__(
        self, example_inputs: Any, *, module: str = "model", monitor: str | None = None, **options: Any
    ) -> None:
        self._inputs, self._module, self._monitor, self._options = example_inputs, module, monitor, options
        self._run: LowRankTraining | None = None
        self._saved: Mapping[str, Any] | None = None

    @property
    def run(self) -> LowRankTraining:
        """The run, with its history and plan.

        Raises:
            InputError: there is none before ``fit``.
        """
        if self._run is None:
            raise InputError("the training has not begun", next_step="call trainer.fit first")
        return self._run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the run, or the one that was saved."""
        if trainer.world_size > 1:
            raise InputError(
                f"a Lightning fit over {trainer.world_size} processes",
                allowed="one",
                next_step="use LowRankTraining with DistributedDataParallel in a loop of your own",
            )
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        model = _network(pl_module, self._module)
        self._inputs = move_data_to_device(self._inputs, pl_module.device)
        optimizer = _optimizer_of(model, trainer.optimizers)
        self._run = LowRankTraining(model, optimizer, self._inputs, **{"epochs": epochs, **self._options})
        if self._saved:
            self._run.load_state_dict(self._saved)
            self._saved = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch of the run."""
        value = None if self._monitor is None else trainer.callback_metrics.get(self._monitor)
        self.run.end_epoch(trainer.current_epoch, accuracy=None if value is None else float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run."""
        self.run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, for a checkpoint."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the run that ``fit`` will make."""
        self._saved = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put weights of the dense architecture in the place of factors."""
        if self._run is None or self._run.phase != "factored":
            return
        root = unwrap(self._run.model)
        prefix = next(f"{name}." if name else "" for name, module in pl_module.named_modules() if module is root)
        rest = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(prefix)}
        dense = recompose(root, self._inputs).model.state_dict()
        checkpoint["state_dict"] = rest | {f"{prefix}{name}": value for name, value in dense.items()}


def _network(pl_module: LightningModule, name: str) -> nn.Module:
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in pl_module.named_children())
        raise InputError(
            f"the LightningModule has no module {name!r}", allowed=known, next_step="say module="
        ) from None


def _optimizer_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the one optimizer that trains the model."""
    own = {id(parameter) for parameter in model.parameters()}
    found = [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
    if len(found) != 1:
        raise InputError(f"{len(found)} optimizers train the network", allowed="one")
    return found[0]
