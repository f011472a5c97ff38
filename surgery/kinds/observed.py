"""Run a model of any kind while observers see the inputs and outputs of its operators.

The model runs in evaluation mode, and without gradients unless the caller asks for them. The model itself is not
changed.

The other branch of a residual connection: the tensor that is added to a site's output, seen while a model runs.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.around import watching
from surgery.kinds.layers.within import Within, within_of
from surgery.sites import Call, Flow, Found
from surgery.sites.find import find
from surgery.text import first_line

__all__ = ["Added", "Additions", "OutputChange", "Hooks", "Norm", "Observed", "See", "calibrating"]

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_VIEW = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default)

Added = Callable[[Tensor, bool], None]


@dataclass(eq=False)
class _Followed:
    """A followed value: ``add`` is called with a tensor that is added to it, ``spoil`` if anything else reads it."""

    shape: torch.Size
    add: Added
    spoil: Callable[[], None]
    added: bool = False


class Additions(TorchDispatchMode):
    """A mode that follows values and tells which of them only an addition reads, once, with a tensor of their shape.

    The mode sees the operators that torch runs, so it works for modules, interpreted graphs and functions alike. Views
    of a value that keep its memory (view, alias) are followed too. A value that is transposed or sliced first counts as
    read by something else.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._followed: Any = WeakIdKeyDictionary()
        self._paused = False

    def follow(self, value: Tensor, add: Added, spoil: Callable[[], None]) -> None:
        """Call ``add`` with the tensor that is added to a value, and ``spoil`` if anything else reads the value.

        The tensor comes in the shape of the value. ``add`` also gets whether this tensor is itself a followed value.
        """
        self._followed[value] = _Followed(value.shape, add, spoil)

    def give(self, output: Any) -> None:
        """Spoil the followed values in a model's output: the caller reads them."""
        for _, followed in self._read((output,), {}):
            followed.spoil()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore everything for a while: the observer, not the model, handles the values now."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what it does to the values that are followed."""
        # A followed value has at most one good end: one plain addition of its own shape. Each other read spoils it,
        # except for a view, which is followed in its place: for y = site(x).view(n, c); y + r, the tensor r is seen.
        kwargs = kwargs or {}
        # looked up before the operator runs, as it may write to its inputs
        read = [] if self._paused or not self._followed else self._read(args, kwargs)
        if func in _ADD and kwargs.get("alpha", 1) == 1 and _alike(args):
            for value, followed in read:
                self._see(followed, args[1] if value is args[0] else args[0])
            if func is torch.ops.aten.add_.Tensor:  # the tensor holds the sum from now on
                self._followed.pop(args[0], None)
            read = []
        result = func(*args, **kwargs)
        for _, followed in read:
            if func in _VIEW:
                self._followed[result] = followed
            else:
                followed.spoil()
        return result

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, _Followed]]:
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return [(tensor, self._followed[tensor]) for tensor in tensors if tensor in self._followed]

    def _see(self, followed: _Followed, other: Tensor) -> None:
        if followed.added:
            followed.spoil()
        else:
            followed.added = True
            followed.add(other.reshape(followed.shape), other in self._followed)


def _alike(args: Sequence[Any]) -> bool:
    return len(args) == 2 and all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape


See = Callable[[Tensor], None]
OutputChange = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm: its name, its running mean and variance, and a function that shows its inputs to an observer.

    If a copy of the model runs, ``keep`` puts mean and variance as they are now into the model itself.
    """

    name: str
    mean: Tensor
    variance: Tensor
    watch: Callable[[See], None]
    keep: Callable[[], None] | None = None


class Observed(ABC):
    """A model that can be run while observers watch its calls; ``batch`` are the inputs of the current or last run."""

    def __init__(self, flow: Callable[[], Flow]) -> None:
        self._flow = flow  # reading a flow takes longer than many runs, and not all that is watched is a site
        self._additions = Additions()
        self._follows = False
        self.batch: Inputs = (), {}

    @abstractmethod
    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the input of an operator's call, each time just before the operator uses it."""

    @abstractmethod
    def tap(self, call: Call, change: OutputChange) -> None:
        """Replace each output of an operator's call by what ``change`` returns for it."""

    def find(self) -> Found:
        """Return the sites of the model; their calls can be watched.

        Raises:
            InputError: the model does not run on the inputs that it was opened with.
        """
        with calibrating():
            return find(self._flow())

    @property
    def differentiable(self) -> bool:
        """Whether gradients led from the outputs to what is tapped in all runs so far."""
        return True

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
def calibrating() -> Iterator[None]:
    """Say of inputs that do not fit that they are the calibration inputs: a model is observed on them alone."""
    try:
        yield
    except InputError as error:
        what = f"the calibration inputs cannot be used: {error.what}"
        raise InputError(what, allowed=error.allowed, next_step="check their number, shapes and dtypes") from error


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
        self.taps: dict[str, OutputChange] = {}

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


def _output_hook(change: OutputChange) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, args, output: change(output)
