"""What is reported happened: run a changed module once, and see which of its chains run.

A model may reach a layer by other ways than by its name: through a closure, or a method that it kept. What took the
layer's place is then never called. One run on the example inputs tells; the chains that it does not reach give way to
their layers again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from surgery.errors import InputError
from surgery.kinds.fx.watch import run_once
from surgery.kinds.layers.recurrent import UnpackedRecurrent

__all__ = ["run_chains"]

_UNREACHED = "the model does not call it by its registered name, and what would take its place does not run"


class _Put(Protocol):
    def __call__(self, name: str, *, dense: bool) -> None: ...


def run_chains(
    root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], *, put: _Put
) -> dict[str, str]:
    """Return why chains have to give way to their layers, by name; ``put`` exchanges the two in the root.

    ``dense`` has the layers, which are not to run any more.

    It costs one forward pass, unless the changed model raises an error: then chains are tried one after another.
    """
    try:
        reached = _run(root, dense, args, kwargs)
    except InputError:
        return _failing(root, dense, args, kwargs, put)
    return {name: _UNREACHED for name in dense if name not in reached}


def _run(root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Run the model; return the names of chains that were called, and whose layers were not.

    A part of a recurrent layer runs with it: a hook on the part would keep it from torch's kernel.
    """
    reached: set[str] = set()
    kept: set[str] = set()
    handles = []
    for name, layer in dense.items():
        see = _seer(name, layer, reached, kept)
        parent = root.get_submodule(name.rpartition(".")[0])
        module = parent if isinstance(parent, UnpackedRecurrent) else root.get_submodule(name)
        handles += [module.register_forward_pre_hook(see), layer.register_forward_pre_hook(see)]
    try:
        run_once(root, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return reached - kept


def _seer(name: str, layer: nn.Module, reached: set[str], kept: set[str]) -> Callable[[nn.Module, Any], None]:
    """Return a hook for both a layer and what stands in its place: their hooks are in one dictionary."""

    def see(module: nn.Module, args: Any) -> None:
        (kept if module is layer else reached).add(name)

    return see


def _failing(
    root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], put: _Put
) -> dict[str, str]:
    """Return which chains a model does not run with: all are taken out, and come back one by one."""
    reasons: dict[str, str] = {}
    for name in dense:
        put(name, dense=True)
    run_once(root, args, kwargs)  # if the model does not run without any either, its inputs are wrong
    good: dict[str, nn.Module] = {}
    for name, layer in dense.items():
        put(name, dense=False)
        try:
            reached = _run(root, {**good, name: layer}, args, kwargs)
        except InputError as error:
            reasons[name] = f"the model does not run with it factored: {error.what.partition(': ')[2]}"
            put(name, dense=True)
            continue
        if name in reached:
            good[name] = layer
        else:
            reasons[name] = _UNREACHED
            put(name, dense=True)
    return reasons
