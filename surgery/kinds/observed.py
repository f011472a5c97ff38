"""A model that is run while something watches what its operators read and give, whatever its kind.

It is always in evaluation mode and without gradients, unless they are asked for. The model itself is not changed.
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
    """A batch norm: its name, its running mean and variance, and what shows its inputs.

    ``kept`` are the buffers of the model, where those that run are copies of them.
    """

    name: str
    mean: Tensor
    variance: Tensor
    watch: Callable[[See], None]
    kept: tuple[Tensor, Tensor] | None = None


class Observed(ABC):
    """A model that can be run while something watches its calls; ``batch`` is what it runs on, or has run on last."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._additions = Additions()
        self._follows = False
        self.batch: Inputs = (), {}

    @abstractmethod
    def watch(self, call: Call, see: See) -> None:
        """Show ``see`` the input of an operator's call, each time just before it is used."""

    @abstractmethod
    def tap(self, call: Call, change: Change) -> None:
        """Put what ``change`` returns in the place of each output of an operator's call."""

    def find(self) -> Found:
        """Return the sites of the model, whose calls can be watched."""
        return find(self.flow)

    @abstractmethod
    def norms(self) -> Sequence[Norm]:
        """Return the batch norms with running statistics, each once."""

    def follow(self, call: Call, see: Callable[[Tensor], Added], spoiled: Callable[[], None]) -> None:
        """Call ``see`` with each output of a call; what ``see`` returns is called with what is added to that output.

        It is also told whether that is the output of a call that is followed, too.
        ``spoiled`` is called if anything but the addition reads the output. Takes the place of a tap.
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
        """Let nothing watch, tap or follow a call any more."""

    @abstractmethod
    def execute(self, inputs: Inputs) -> Any:
        """Run the model once; whatever it raises comes through."""

    @property
    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that it runs on."""

    def run(self, inputs: Inputs, *, gradients: bool = False) -> Any:
        """Run the model once, and return its outputs; ``gradients`` are those of what is tapped, not of parameters.

        Raises:
            InputError: the model does not take these inputs.
        """
        self.batch = inputs
        try:
            with torch.set_grad_enabled(gradients), _frozen(self.parameters), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
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
    """Let no parameter ask for a gradient."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


class Hooks:
    """What is to be shown of submodules and changed in them, by path; additions do not see who it is shown to."""

    def __init__(self, additions: Additions) -> None:
        self._additions = additions
        self.watchers: dict[str, list[See]] = defaultdict(list)
        self.taps: dict[str, Change] = {}

    def watch(self, path: str, see: See) -> None:
        """Show ``see`` what the module at a path reads."""
        if see not in self.watchers[path]:
            self.watchers[path].append(see)

    @contextmanager
    def on(self, root: nn.Module) -> Iterator[None]:
        """Have the hooks on a module for a while."""
        with ExitStack() as stack:
            for path in {**self.watchers, **self.taps}:
                layer, sees, change = root.get_submodule(path), self.watchers.get(path, []), self.taps.get(path)
                within = within_of(layer)
                if isinstance(within, Within):
                    stack.enter_context(watching(layer, within, partial(self._show, sees), change))
                    continue
                if sees:
                    hook = layer.register_forward_pre_hook(self._hook(sees), with_kwargs=True)
                    stack.callback(hook.remove)
                if change is not None:
                    hook = layer.register_forward_hook(_output_hook(change), prepend=True)  # before those of the user
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
