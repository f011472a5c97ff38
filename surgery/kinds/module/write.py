"""Open modules: submodules are replaced, and the model stays of the user's own class.

What cannot be changed by replacing a submodule (functional calls in ``forward``) is skipped with that reason, and so is
what the model does not reach by its registered name: the changed model is run once, to see which chains run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from surgery.algebra.chain import Chain
from surgery.errors import InputError, SurgeryError
from surgery.kinds.base import Access, OpenModel
from surgery.kinds.fx.flow import Extras, make_flow
from surgery.kinds.fx.watch import run_once
from surgery.kinds.layers.carried import copy_module
from surgery.kinds.layers.edit import (
    Replaced,
    Shared,
    empty_known,
    find_known,
    fuse_modules,
    layers_of,
    restore_known,
    splice_modules,
    swap_references,
)
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.modules import is_operator_module, refuse_module, replace_module
from surgery.kinds.layers.recurrent import UnpackedRecurrent
from surgery.kinds.layers.tensors import count, key_of
from surgery.kinds.layers.unpacking import has_packed, pack_all, unpack_all
from surgery.kinds.module.capture import Captured, capture, has_lazy, trace_only
from surgery.kinds.module.run import ObservedModule
from surgery.kinds.observed import Observed
from surgery.sites.edit import Edit, Replace
from surgery.sites.flow import Flow, Tensors, Unseen
from surgery.sites.placement import FusableModule, Placement
from surgery.sites.site import Skip

__all__ = ["OpenModule", "run_chains"]


_UNSEEN = "no call of it is seen on the example inputs"


class OpenModule(OpenModel):
    """An open nn.Module."""

    def observe(self) -> Observed:
        """Return the model, with hooks on its submodules."""
        return ObservedModule(self._model, self.flow)

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], access: Access) -> None:
        self._model = model
        root = copy_module(model) if access.copies or (has_packed(model) and not access.inplace) else model
        self._inputs = (args, kwargs)
        self._holder = nn.ModuleList([root])  # in which the root can be replaced too, unless it is to stay the same
        self._packed = unpack_all(root if access.inplace else self._holder)
        self._root = self._holder[0]
        self._shared: Shared = {}
        self._replaced: Replaced = {}
        self._notes: dict[str, str] = {}
        self._dense: dict[str, tuple[tuple[str, ...], nn.Module, nn.Module]] = {}
        try:
            self._known, self._broken = find_known(self._root)
            self._captured = self._capture(known=access.known and bool(self._known))
        except BaseException:
            self.finish()  # the model may be the caller's own
            raise

    def _capture(self, *, known: bool) -> Captured | None:
        """Return the calls of the layers; of a model whose chains are known, only what costs little."""
        if not known:
            found: Captured | None = capture(self._root, *self._inputs)
        else:
            try:
                found = trace_only(self._root, *self._inputs)
            except SurgeryError:
                found = None
        return found

    @cached_property
    def flow(self) -> Flow:
        """The model as it was when it was opened."""
        layers = layers_of(self._root, alone=True, unseen=tuple(_unseen(self._root)))
        modules = self._root.named_modules(remove_duplicate=False)
        recorded = frozenset(name for name, module in modules if isinstance(module, Factored))
        if self._captured is None:  # only the chains that are modules are wanted
            chains = tuple(known.chain for known in self._known)
            tensors = Tensors({}, {})
            return Flow((), {}, tensors, {}, {}, layers=layers, chains=chains, broken=self._broken, proved=False)
        found = self._captured
        extras = Extras(self._known, found.chains, self._broken, layers, {}, recorded, found.proves)
        return make_flow(found.reader, found.shape, extras)

    def apply(self, edit: Edit) -> None:
        """Carry an edit out: replace modules, at all their names."""
        if isinstance(edit, Replace):
            self._replace(edit.placement, edit.chain)
        elif isinstance(edit.chain, FusableModule):
            known = next(known for known in self._known if known.chain.names == edit.chain.sites)
            self._replaced |= restore_known(self._root, known, edit.chain.operators, self._notes)
        else:
            self._replaced |= fuse_modules(self._root, edit.chain, self.flow.layers)

    def _replace(self, placement: Placement, chain: Chain) -> None:
        made = splice_modules(self._root, placement.site, chain, self._shared)
        self._replaced |= made
        for old, new in made.items():
            paths = tuple(path for path, m in self._root.named_modules(remove_duplicate=False) if m is new)
            self._dense[paths[0]] = (paths, old, new)

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know of layers that were put back, by name."""
        return self._notes

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers where chains stand, and return their sites by name."""
        for placement in placements:
            names = (placement.site.name, *placement.site.aliases)
            known = next(known for known in self._known if known.chain.names == names)
            self._replaced |= empty_known(self._root, known, placement.site.operator)
        return {placement.site.name: Placement(placement.site, ()) for placement in placements}

    def verify(self) -> dict[str, str]:
        """Run the changed model once, and put the layers of chains that do not run in it back; say why, by name."""
        swap_references(self._root, self._final())
        if not any(self._inputs) or not self._dense:
            return {}
        root = copy_module(self._root) if has_lazy(self._root) else self._root
        old = {name: dense for name, (_, dense, _) in self._dense.items()}
        reasons = run_chains(root, old, *self._inputs, put=self._put)
        for name in reasons:
            self._put(name, dense=True)
        return reasons

    def _put(self, name: str, *, dense: bool) -> None:
        """Put the layer or the chain at all names of a site."""
        paths, old, new = self._dense[name]
        for path in paths:
            replace_module(self._root, path, old if dense else new)
        swap_references(self._root, {new: old} if dense else {old: new})

    def _final(self) -> Mapping[nn.Module, nn.Module]:
        """Return what stands in the place of each replaced module in the end."""

        def last(module: nn.Module) -> nn.Module:
            while module in self._replaced:
                module = self._replaced[module]
            return module

        return {old: last(new) for old, new in self._replaced.items()}

    def finish(self) -> nn.Module:
        """Return the changed model, with packed weights where nothing has changed."""
        swap_references(self._root, self._final())
        pack_all(self._holder, self._packed)
        return self._holder[0]


def _unseen(root: nn.Module) -> Iterator[Unseen]:
    """Yield what to say of each layer that no call reaches: of operators, and of other layers with weights."""
    for path, module in root.named_modules():
        weight = module._parameters.get("weight")
        key = None if weight is None or is_lazy(weight) else key_of(weight)
        name = type(module).__name__
        if is_operator_module(module):
            yield Unseen(Skip(path, name, _UNSEEN, count(module)), key, operator=True)
        elif (reason := _refuse_whole(module)) is not None:
            yield Unseen(Skip(path, name, reason, count(module)), key, operator=False)


def _refuse_whole(module: nn.Module) -> str | None:
    """Return why a layer of another kind is no site; None for containers, of which the parts are looked at."""
    whole = type(module).__module__.startswith("torch.ao.nn") or not list(module.children())
    return refuse_module(module) if whole else None


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
