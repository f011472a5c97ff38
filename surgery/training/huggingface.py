"""LowRankTraining as a callback of the Trainer of Hugging Face transformers.

Its checkpoints always hold the weights of the dense architecture, composed while the model is factored, so that
``from_pretrained`` of the original class can read them. The Trainer loads a checkpoint before any callback can give the
model its factored structure. So the factors and the state of their optimizer are in ``low_rank_training.pt`` in the
checkpoint's folder, and the Trainer's own ``optimizer.pt`` fits the dense architecture too, without any state.
Callback and Trainer together then continue the run.

The weights that were scored are the weights that are saved: the switch comes at the end of an epoch, before the Trainer
evaluates and saves. With ``load_best_model_at_end``, a model that is still factored is recomposed before the best
weights are loaded into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.passes.recompose import recompose
from surgery.training.low_rank import LowRankTraining
from surgery.training.wrappers import unwrap

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import OPTIMIZER_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
    from transformers.utils.import_utils import is_accelerate_available

    if not is_accelerate_available():
        raise ImportError("accelerate")
except ImportError as error:
    raise InputError(
        "surgery.training.huggingface needs transformers and accelerate",
        next_step="pip install 'model-surgery[huggingface]'",
    ) from error

__all__ = ["STATE_NAME", "LowRankCallback"]

STATE_NAME = "low_rank_training.pt"


class LowRankCallback(TrainerCallback):
    """Decomposes the model of a Trainer partway through the training, and recomposes it at the end.

        callback = LowRankCallback({"pixel_values": images})
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        print(callback.run.history)

    To switch an average of the weights as well, call ``callback.run.mirror(average)`` in ``on_train_begin`` of a
    callback that comes after this one.

    Args:
        example_inputs: one training batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        options: the options of ``LowRankTraining``; ``epochs`` is the Trainer's number of epochs unless it is given.

    Raises:
        InputError: from ``train``: an argument is not allowed; there is more than one process or device; this callback
            did not save the checkpoint to resume from, or the checkpoint is not in ``output_dir``.
    """

    def __init__(self, example_inputs: Any, **options: Any) -> None:
        self._inputs, self._options = example_inputs, options
        self._run: LowRankTraining | None = None
        self._sizes: list[int] = []

    @property
    def run(self) -> LowRankTraining:
        """The run, with its history and plan.

        Raises:
            InputError: ``train`` has not begun.
        """
        if self._run is None:
            raise InputError("the training has not begun", next_step="call trainer.train first")
        return self._run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the run; on resuming, load its state from the checkpoint."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise InputError(
                "a Trainer over several processes or devices",
                allowed="one",
                next_step="use LowRankTraining with DistributedDataParallel in a loop of your own",
            )
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # inside accelerate's
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        options = {"epochs": state.num_train_epochs, **self._options}
        self._run = LowRankTraining(model, optimizer, self._inputs, **options)
        if state.global_step:
            self._run.load_state_dict(_read(_folder(args, state)))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the epoch, which leaves out the evaluation and the saving before it."""
        self.run.begin_epoch()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch of the run."""
        self.run.end_epoch(max(0, round(state.epoch or 0) - 1))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run."""
        self.run.finish()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state of the run to a checkpoint, and make its other files fit the dense architecture."""
        folder = _folder(args, state)
        torch.save(self.run.state_dict(), folder / STATE_NAME)
        if self.run.phase != "factored":
            return
        _save_dense(self.run, self._inputs, folder)
        if (folder / OPTIMIZER_NAME).exists():
            torch.save(_without_state(self.run.optimizer, self._sizes), folder / OPTIMIZER_NAME)


def _save_dense(run: LowRankTraining, example_inputs: Any, folder: Path) -> None:
    """Write the dense weights over the factors, in the file format that the Trainer chose for them."""
    dense: Any = recompose(unwrap(run.model), example_inputs).model
    if hasattr(dense, "save_pretrained"):
        dense.save_pretrained(folder)
        return
    state = {name: value.contiguous() for name, value in dense.state_dict().items()}
    if (folder / SAFE_WEIGHTS_NAME).exists():
        save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if (folder / WEIGHTS_NAME).exists():
        torch.save(state, folder / WEIGHTS_NAME)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / STATE_NAME
    if not file.exists():
        raise InputError(
            f"there is no {file}", next_step="resume from a checkpoint in output_dir that this callback has saved"
        )
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def _without_state(optimizer: Optimizer, sizes: list[int]) -> dict[str, Any]:
    """Return a state dict with the optimizer's options for groups of these sizes, and without state."""
    # Parameters are numbered through all groups. Example of groups of 2 and 3: 0, 1 and 2, 3, 4.
    groups, first = [], 0
    for group, size in zip(optimizer.state_dict()["param_groups"], sizes, strict=True):
        options = {key: value for key, value in group.items() if key != "param_names"}
        groups.append({**options, "params": list(range(first, first + size))})
        first += size
    return {"state": {}, "param_groups": groups}
