"""Open modules: submodules are replaced, and the model keeps the user's own class.

A functional call in ``forward`` cannot be changed by replacing a submodule, so it is skipped with that reason. A layer
that the model does not reach by its registered name is skipped too; one run of the changed model shows which chains
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from surgery.algebra import Chain
from surgery.errors import InputError, SurgeryError
from surgery.kinds.base import Access, OpenModel
from surgery.kinds.fx.flow import Extras, make_flow
from surgery.kinds.fx.trace import run_once
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
from surgery.sites import Edit, Flow, FusableModule, Placement, Replace, Skip, Tensors, Unseen

__all__ = ["OpenModule", "run_chains"]


_UNSEEN = "no call of it is seen on the example inputs"


class OpenModule(OpenModel):
    """An open nn.Module."""

    def observe(self) -> Observed:
        """Return the model, to be run with hooks on its submodules."""
        return ObservedModule(self._model, lambda: self.flow)

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], access: Access) -> None:
        self._model = model
        root = copy_module(model) if access.copies or (has_packed(model) and not access.inplace) else model
        self._inputs = (args, kwargs)
        self._holder = nn.ModuleList([root])  # so that the root itself can be replaced, unless work is in place
        self._packed = unpack_all(root if access.inplace else self._holder)
        self._root = self._holder[0]
        self._shared: Shared = {}
        self._replaced: Replaced = {}
        self._notes: dict[str, str] = {}
        self._dense: dict[str, tuple[tuple[str, ...], nn.Module, nn.Module]] = {}
        try:
            self._known, self._broken = find_known(self._root)
        except BaseException:
            self.finish()  # the model may be the caller's own: it must not stay unpacked
            raise
        self._only_known = access.known and bool(self._known)

    def _capture(self) -> Captured | None:
        """Return the calls of the layers. If only known chains are wanted, only tracing is tried, since it is cheap."""
        if not self._only_known:
            try:
                return capture(self._root, *self._inputs)
            except BaseException:
                self.finish()
                raise
        # chains that are modules need no graph; but a trace is cheap, and shows chains of the user's own as well
        try:
            return trace_only(self._root, *self._inputs)
        except SurgeryError:
            return None

    @cached_property
    def flow(self) -> Flow:
        """The model as it is when this is read first. Replacing layers does not need it."""
        layers = layers_of(self._root, alone=True, unseen=tuple(_unseen(self._root)))
        modules = self._root.named_modules(remove_duplicate=False)
        recorded = frozenset(name for name, module in modules if isinstance(module, Factored))
        found = self._capture()
        if found is None:  # only the chains that are modules are known
            chains = tuple(known.chain for known in self._known)
            tensors = Tensors({}, {})
            return Flow((), {}, tensors, {}, {}, layers=layers, chains=chains, broken=self._broken, proved=False)
        extras = Extras(self._known, found.chains, self._broken, layers, {}, recorded, found.proves)
        return make_flow(found.reader, found.shape, extras)

    def apply(self, edit: Edit) -> None:
        """Carry out an edit: replace modules under all their names."""
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
        """What the user should know about recomposed layers, by name."""
        return self._notes

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put layers of zeros in the place of chains, and return their new placements by site name."""
        for placement in placements:
            names = (placement.site.name, *placement.site.aliases)
            known = next(known for known in self._known if known.chain.names == names)
            self._replaced |= empty_known(self._root, known, placement.site.operator)
        return {placement.site.name: Placement(placement.site, ()) for placement in placements}

    def verify(self) -> dict[str, str]:
        """Run the changed model once; restore the layers of chains that do not run, and return the reasons by name."""
        swap_references(self._root, self._final())
        if not any(self._inputs) or not self._dense:
            return {}
        # a run would give lazy layers their weights, which is the user's to do
        root = copy_module(self._root) if has_lazy(self._root) else self._root
        old = {name: dense for name, (_, dense, _) in self._dense.items()}
        reasons = run_chains(root, old, *self._inputs, put=self._put)
        for name in reasons:
            self._put(name, dense=True)
        return reasons

    def _put(self, name: str, *, dense: bool) -> None:
        """Put the original layer (``dense``) or the chain under all names of a site."""
        paths, old, new = self._dense[name]
        for path in paths:
            replace_module(self._root, path, old if dense else new)
        swap_references(self._root, {new: old} if dense else {old: new})

    def _final(self) -> Mapping[nn.Module, nn.Module]:
        """Return the module that finally stands in the place of each replaced module."""

        def last(module: nn.Module) -> nn.Module:
            while module in self._replaced:
                module = self._replaced[module]
            return module

        return {old: last(new) for old, new in self._replaced.items()}

    def finish(self) -> nn.Module:
        """Return the changed model; layers whose parts are whole are packed again."""
        swap_references(self._root, self._final())
        pack_all(self._holder, self._packed)
        return self._holder[0]


def _unseen(root: nn.Module) -> Iterator[Unseen]:
    """Yield the skips to report for layers that no call reaches: for operators, and for other layers with weights."""
    for path, module in root.named_modules():
        weight = module._parameters.get("weight")
        key = None if weight is None or is_lazy(weight) else key_of(weight)
        name = type(module).__name__
        if is_operator_module(module):
            yield Unseen(Skip(path, name, _UNSEEN, count(module)), key, operator=True)
        elif (reason := _refuse_whole(module)) is not None:
            yield Unseen(Skip(path, name, reason, count(module)), key, operator=False)


def _refuse_whole(module: nn.Module) -> str | None:
    """Return why a layer of another kind is not a site; None for containers, whose parts are looked at instead."""
    whole = type(module).__module__.startswith("torch.ao.nn") or not list(module.children())
    return refuse_module(module) if whole else None


_UNREACHED = "the model does not call it by its registered name, so a chain in its place would not run"


class _Put(Protocol):
    def __call__(self, name: str, *, dense: bool) -> None: ...


def run_chains(
    root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], *, put: _Put
) -> dict[str, str]:
    """Return the reasons why chains have to give way to their original layers, by name.

    ``dense`` has the original layer of each chain, which must not run any more. ``put`` exchanges a chain and its layer
    in the root. This takes one forward pass, unless the changed model raises an error; then the chains are tried one
    after another.

    Raises:
        InputError: the model does not run without any chain either.
    """
    try:
        reached = _run(root, dense, args, kwargs)
    except InputError:
        return _failing(root, dense, args, kwargs, put)
    return {name: _UNREACHED for name in dense if name not in reached}


def _run(root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Run the model; return the names of the chains that were called while their original layers were not.

    The hook for a part of a recurrent layer is on the layer: a hook on the part would keep it from torch's kernel.
    """
    reached: set[str] = set()
    kept: set[str] = set()
    handles = []
    for name, layer in dense.items():
        see = _seer(name, layer, reached, kept)
        parent = root.get_submodule(name.rpartition(".")[0])
        # both hooks are needed: a model may call the chain in one place, and in another the old layer, which it kept
        module = parent if isinstance(parent, UnpackedRecurrent) else root.get_submodule(name)
        handles += [module.register_forward_pre_hook(see), layer.register_forward_pre_hook(see)]
    try:
        run_once(root, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return reached - kept


def _seer(name: str, layer: nn.Module, reached: set[str], kept: set[str]) -> Callable[[nn.Module, Any], None]:
    """Return one hook for both a layer and the chain in its place, which share one dictionary of hooks."""

    def see(module: nn.Module, args: Any) -> None:
        (kept if module is layer else reached).add(name)

    return see


def _failing(
    root: nn.Module, dense: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], put: _Put
) -> dict[str, str]:
    """Return the reasons for the chains with which a model does not run: all are removed, then added one by one."""
    reasons: dict[str, str] = {}
    for name in dense:
        put(name, dense=True)
    run_once(root, args, kwargs)  # if the model does not run without any chain, its inputs are wrong
    # chains that ran stay in while the next ones are tried, so that the final model has run with all of them
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
