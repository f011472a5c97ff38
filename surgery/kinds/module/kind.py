"""The graph kind of nn.Modules: submodules are replaced, and the model stays the user's own class.

What cannot be changed by replacing a submodule (functional calls in ``forward``) is skipped with that reason, and so is
what the model does not reach by its registered name: the changed model is run once, to see which chains run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from surgery.algebra.chain import Chain
from surgery.errors import Refusal, SurgeryError
from surgery.kinds.base import AnyRun, Found, GraphKind
from surgery.kinds.fx.chains import ChainSpot
from surgery.kinds.fx.items import Item
from surgery.kinds.fx.view import Call, Spot
from surgery.kinds.layers.copying import copy_module
from surgery.kinds.layers.edit import (
    Replaced,
    Shared,
    fuse_modules,
    is_whole_sequential,
    refuse_hooks,
    refuse_outside,
    splice_modules,
    swap_references,
)
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.known import ModuleRun, empty_known, find_known, known_spots, put_back_known
from surgery.kinds.layers.modules import is_operator_module, refuse_module, replace_module
from surgery.kinds.layers.recurrent_forms import loop_of
from surgery.kinds.layers.tensors import count
from surgery.kinds.layers.unpacking import has_packed, pack_all, unpack_all
from surgery.kinds.module.capture import Captured, capture, has_lazy, trace_only
from surgery.kinds.module.probe import run_chains
from surgery.sites.epilogue import Loop
from surgery.sites.site import Skip

__all__ = ["ModuleKind"]

_UNSEEN = "no call of it is seen on the example inputs"
_UNPROVED = "neither torch.fx nor torch.export captures the model, so that nothing is known of its dataflow"


class ModuleKind(GraphKind):
    """Adapter of an nn.Module."""

    kind = "module"

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        copies: bool,
        inplace: bool,
        known: bool = False,
    ) -> None:
        root = copy_module(model) if copies or (has_packed(model) and not inplace) else model
        self._inputs = (args, kwargs)
        self._holder = nn.ModuleList([root])  # in which the root can be replaced too, unless it is to stay the same
        self._packed = unpack_all(root if inplace else self._holder)
        self._root = self._holder[0]
        self._shared: Shared = {}
        self._replaced: Replaced = {}
        self._notes: dict[str, str] = {}
        self._dense: dict[str, tuple[tuple[str, ...], nn.Module, nn.Module]] = {}
        try:
            self._runs, self._changed = find_known(self._root)
            self._captured = self._capture(known=known and bool(self._runs))
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
        if found is not None:
            self.view, self.shape = found.view, found.shape
        return found

    def find(self) -> Found:
        """Return all sites and skips, and the totals of the model; layers that nothing reaches are skips too."""
        found = super().find()
        named = {name for spot in found.spots for name in (spot.site.name, *spot.site.aliases)}
        named |= {skip.name for skip in found.skips}
        left = [*self._unreached(named), *self._changed]
        return replace(found, skips=(*found.skips, *left))

    def _unreached(self, named: set[str]) -> list[Skip]:
        """Return the layers of which nothing was said so far: those that no call reaches, and those of other kinds."""
        skips = []
        inside = tuple(f"{path}." for run in self._runs for path in run.sites)
        modules = dict(self._root.named_modules())
        said = {id(modules[name]._parameters.get("weight")) for name in named if name in modules}
        for path, module in modules.items():
            tied = module._parameters.get("weight") is not None and id(module._parameters["weight"]) in said
            if tied or path in named or path.startswith(inside) or any(name.startswith(f"{path}.") for name in named):
                continue
            if is_operator_module(module):
                skips.append(Skip(path, type(module).__name__, _UNSEEN, count(module)))
            elif (
                not any(path.startswith(f"{name}.") for name in named) and (reason := _refuse_whole(module)) is not None
            ):
                skips.append(Skip(path, type(module).__name__, reason, count(module)))
        return skips

    def chain_spots(self) -> tuple[list[ChainSpot], list[Skip]]:
        """Return the chains that decompose has made, and those that cannot be cut again."""
        assert self._captured is not None  # only recompose does without
        return known_spots(self._runs, self._captured.chains, self.shape)

    def loop(self, item: Any) -> Loop | None:
        """Return the loop of a recurrent layer in which an item runs, if any."""
        return loop_of(self._root, item.path)

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""
        made = splice_modules(self._root, spot, chain, self._shared)
        self._replaced |= made
        for old, new in made.items():
            paths = tuple(path for path, m in self._root.named_modules(remove_duplicate=False) if m is new)
            self._dense[paths[0]] = (paths, old, new)

    def put_back(self, run: AnyRun) -> None:
        """Put one operator where a run stands, at all its calls."""
        if isinstance(run, ModuleRun):
            self._replaced |= put_back_known(self._root, run, run.operators, self._notes)
        else:
            self._replaced |= fuse_modules(self._root, run)

    def known_runs(self) -> tuple[list[ModuleRun], list[Skip]]:
        """Return the chains that decompose has made."""
        return self._runs, self._changed

    def runs(self, *, everything: bool = False) -> tuple[list[AnyRun], list[Skip]]:
        """Return the runs that are provably one operator, and why others that look like it are not."""
        if self._captured is None:
            return list(self._runs), self._changed
        if not self._captured.proves:
            return list(self._runs), [*self._changed, *([] if self._runs else [Skip("model", "chain", _UNPROVED)])]
        return super().runs(everything=everything)

    def refuse_run(self, runs: Sequence[Sequence[Item]]) -> Refusal | None:
        """Refuse modules that are also called outside of the run, and reshapes that forward() makes itself."""
        for items in runs:
            paths = [str(item.path) for item in items]
            if any(item.path is None for item in items):
                return Refusal("a function in forward() is part of the chain; recompose an exported program instead")
            if not all(isinstance(item, Call) for item in items) and not is_whole_sequential(self._root, paths):
                return Refusal("its modules are not those of one nn.Sequential")
        hooked = refuse_hooks(self._root, runs)
        return hooked or super().refuse_run(runs) or refuse_outside(runs, self.view.calls)

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know of layers that were put back, by name."""
        return self._notes

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored, by what stands there."""
        modules = self._root.named_modules(remove_duplicate=False)
        return frozenset(name for name, module in modules if isinstance(module, Factored))

    def reopen(self, spots: Sequence[ChainSpot]) -> dict[str, Spot]:
        """Put an operator without numbers where each chain stands, and return the spots for splicing, by name."""
        for spot in spots:
            self._replaced |= empty_known(self._root, spot)
        return {spot.site.name: Spot(spot.site, ()) for spot in spots}

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


def _refuse_whole(module: nn.Module) -> str | None:
    """Return why a layer of another kind is no site; None for containers, of which the parts are looked at."""
    whole = type(module).__module__.startswith("torch.ao.nn") or not list(module.children())
    return refuse_module(module) if whole else None
