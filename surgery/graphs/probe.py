"""What is reported happened: run a changed module once, and see which of its chains run.

A model may reach a layer by other ways than by its name: through a closure, or a method that it kept. What took the
layer's place is then never called. One run on the example inputs tells; the chains that it does not reach give way to
their layers again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch import nn

from surgery.errors import InputError
from surgery.graphs.recurrent import UnpackedRecurrent
from surgery.graphs.watch import run_once

__all__ = ["run_chains"]

_UNREACHED = "the model does not call it by its registered name, and what would take its place does not run"


class _Put(Protocol):
    def __call__(self, name: str, *, dense: bool) -> None: ...


def run_chains(
    root: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], *, put: _Put
) -> dict[str, str]:
    """Return why chains have to give way to their layers, by name; ``put`` exchanges the two in the root.

    It costs one forward pass, unless the changed model raises an error: then chains are tried one after another.
    """
    try:
        reached = _run(root, names, args, kwargs)
    except InputError:
        return _failing(root, names, args, kwargs, put)
    return {name: _UNREACHED for name in names if name not in reached}


def _run(root: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Run the model; return the names of chains that were called.

    A part of a recurrent layer runs with it: a hook on the part would keep it from torch's kernel.
    """
    reached: set[str] = set()
    handles = []
    for name in names:
        parent = root.get_submodule(name.rpartition(".")[0])
        module = parent if isinstance(parent, UnpackedRecurrent) else root.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, a, n=name: reached.add(n)))
    try:
        run_once(root, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _failing(
    root: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], put: _Put
) -> dict[str, str]:
    """Return which chains a model does not run with: all are taken out, and come back one by one."""
    reasons: dict[str, str] = {}
    for name in names:
        put(name, dense=True)
    run_once(root, args, kwargs)  # if the model does not run without any either, its inputs are wrong
    good: list[str] = []
    for name in names:
        put(name, dense=False)
        try:
            reached = _run(root, [*good, name], args, kwargs)
        except InputError as error:
            reasons[name] = f"the model does not run with it factored: {error.what.partition(': ')[2]}"
            put(name, dense=True)
            continue
        if name in reached:
            good.append(name)
        else:
            reasons[name] = _UNREACHED
    return reasons
