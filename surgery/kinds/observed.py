"""Run a model of any kind while observers see the inputs and outputs of its operators.

The model runs in evaluation mode, and without gradients unless the caller asks for them. The model itself is not
changed.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import InputError
from surgery.kinds.added import Added, Additions
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.around import watching
from surgery.kinds.layers.within import Within, within_of
from surgery.sites.find import find
from surgery.sites.flow import Call, Flow
from surgery.sites.placement import Found
from surgery.text import first_line

__all__ = ["Change", "Hooks", "Norm", "Observed", "See"]

See = Callable[[Tensor], None]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm: its name, its running mean and variance, and a function that shows its inputs to an observer.

    If a copy of the model runs, ``kept`` are the buffers of the model itself.
    """

    name: str
    mean: Tensor
    variance: Tensor
    watch: Callable[[See], None]
    kept: tuple[Tensor, Tensor] | None = None


class Observed(ABC):
    """A model that can be run while observers watch its calls; ``batch`` are the inputs of the current or last run."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._additions = Additions()
        self._follows = False
        self.batch: Inputs = (), {}

    @abstractmethod
    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the input of an operator's call, each time just before the operator uses it."""

    @abstractmethod
    def tap(self, call: Call, change: Change) -> None:
        """Replace each output of an operator's call by what ``change`` returns for it."""

    def find(self) -> Found:
        """Return the sites of the model; their calls can be watched."""
        return find(self.flow)

    @abstractmethod
    def norms(self) -> Sequence[Norm]:
        """Return all batch norms with running statistics, each once."""

    def follow(self, call: Call, see: Callable[[Tensor], Added], spoiled: Callable[[], None]) -> None:
        """Follow the output of a call to the tensor that is added to it, as in a residual connection.

        ``see`` gets each output of the call and returns a function. This function gets the tensor that is added to the
        output, and whether that tensor is itself the output of a followed call. ``spoiled`` is called if anything but
        one addition reads the output. ``follow`` replaces a tap of the same call.
        """

        def pass_on(y: Tensor) -> Tensor:
            with self._additions.paused():
                added = see(y)
            self._additions.follow(y, added, spoiled)
            return y

        self._follows = True
        self.tap(call, pass_on)

    @abstractmethod
    def forget(self) -> None:
        """Remove everything that watches, taps or follows a call."""

    @abstractmethod
    def execute(self, inputs: Inputs) -> Any:
        """Run the model once and return its outputs; raises whatever the model raises."""

    @property
    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the model runs on."""

    def run(self, inputs: Inputs, *, gradients: bool = False) -> Any:
        """Run the model once and return its outputs.

        With ``gradients``, torch records gradients of the tapped values; parameters get none in any case.

        Raises:
            InputError: the model does not run on these inputs.
        """
        self.batch = inputs
        try:
            # parameters are frozen even with gradients: only tapped values need them, and they cost memory
            with torch.set_grad_enabled(gradients), _frozen(self.parameters), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about its own internals
                with self._additions if self._follows else nullcontext():
                    output = self.execute(inputs)
                self._additions.give(output)
                return output
        except InputError:
            raise
        except Exception as error:  # a model may raise anything on inputs that do not fit
            what = f"the model does not run on the calibration inputs: {first_line(error)}"
            raise InputError(what, next_step="check their number, shapes and dtypes") from error


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no parameter require a gradient for a while."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


class Hooks:
    """The observers and taps of submodules, by path; ``additions`` do not see what an observer does with a value."""

    def __init__(self, additions: Additions) -> None:
        self._additions = additions
        self.watchers: dict[str, list[See]] = defaultdict(list)
        self.taps: dict[str, Change] = {}

    def watch(self, path: str, see: See) -> None:
        """Call ``see`` with each input of the module at a path."""
        if see not in self.watchers[path]:
            self.watchers[path].append(see)

    @contextmanager
    def on(self, root: nn.Module) -> Iterator[None]:
        """Register the hooks on the submodules of ``root`` for a while."""
        with ExitStack() as stack:
            for path in {**self.watchers, **self.taps}:
                layer, sees, change = root.get_submodule(path), self.watchers.get(path, []), self.taps.get(path)
                # a hook on a layer that does more sees the layer's input, not the operator's; so the forward itself is
                # watched
                within = within_of(layer)
                if isinstance(within, Within):
                    stack.enter_context(watching(layer, within, partial(self._show, sees), change))
                    continue
                if sees:
                    hook = layer.register_forward_pre_hook(self._hook(sees), with_kwargs=True)
                    stack.callback(hook.remove)
                if change is not None:
                    hook = layer.register_forward_hook(_output_hook(change), prepend=True)  # before the user's hooks
                    stack.callback(hook.remove)
            yield

    def _hook(self, sees: Iterable[See]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._show(sees, args[0] if args else kwargs["input"])

        return show

    def _show(self, sees: Iterable[See], value: Tensor) -> None:
        with self._additions.paused():
            for see in sees:
                see(value)


def _output_hook(change: Change) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, args, output: change(output)
