"""A model with its optimizer and everything else that depends on its parameters, so that all switch together.

Copies that follow a model, such as averages of its weights: how to recognise them, and where to find them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.passes.preview import find_sites
from surgery.passes.recompose import recompose
from surgery.passes.results import Change
from surgery.plans.plan import Plan
from surgery.sites import Site
from surgery.training.frobenius import FrobeniusDecay, can_decay
from surgery.training.optimizer import Exchange, exchange_parameters
from surgery.training.propose import sites_of
from surgery.training.ranks import Survey, hooked, untrained
from surgery.training.structure import TrainedSite, build
from surgery.training.switch import align_copy, fill_structure, set_format, switch_to_dense, switch_to_factors
from surgery.training.wrappers import agree, broadcast, group_of, rewrap, unwrap

__all__ = ["Trainee", "averages_of", "inputs_for", "is_copy", "keeps_copy"]


def is_copy(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module has parameters of the same names and shapes as a model, and shares no tensor with it."""
    mine, others = dict(module.named_parameters()), dict(model.named_parameters())
    alike = mine.keys() == others.keys() and all(mine[name].shape == others[name].shape for name in mine)
    return alike and bool(mine) and not {id(p) for p in mine.values()} & {id(p) for p in others.values()}


def averages_of(values: Iterable[Any], model: nn.Module) -> Iterator[nn.Module]:
    """Yield the copies of a model that are inside the AveragedModels among some values."""
    for value in values:
        if isinstance(value, AveragedModel):
            inside = (module for module in value.module.modules() if type(module) is type(model))
            yield from (module for module in inside if is_copy(module, model))


def keeps_copy(value: Any, model: nn.Module) -> bool:
    """Whether a value copies the model without AveragedModel: a module, or tensors of the parameters' shapes.

    Nobody can know how such a copy is kept up to date, so a run cannot keep it in step with the model.
    """
    if isinstance(value, nn.Module) and not isinstance(value, AveragedModel):
        return any(type(module) is type(model) and is_copy(module, model) for module in value.modules())
    rows = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not all(isinstance(row, Tensor) for row in rows):
        return False
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    return len(shapes) > 1 and not _missing(shapes, [row.shape for row in rows])


def _missing(wanted: list[torch.Size], given: list[torch.Size]) -> list[torch.Size]:
    """Return the wanted shapes that are not given, counting repeats."""
    # ``remove`` returns None: a shape that is given is taken out, and counts once. Example: of 3, 3, 5 wanted and 3, 5,
    # 5 given, one 3 is missing.
    rest = list(given)
    return [shape for shape in wanted if shape not in rest or rest.remove(shape)]  # type: ignore[func-returns-value]


def inputs_for(copy: nn.Module, model: nn.Module, example_inputs: Any) -> Inputs:
    """Return a model's example inputs on the device and in the dtype of a copy of it."""
    mine, others = next(copy.parameters()), next(model.parameters())

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(mine.device, mine.dtype if leaf.dtype == others.dtype else leaf.dtype)

    converted: Inputs = pytree.tree_map(convert, normalise_inputs(example_inputs))
    return converted


class Trainee:
    """The model in training: ``to_factors`` and ``to_dense`` switch it, ``restore`` makes a structure to load into.

    ``model`` has the user's wrappers; ``root`` is the module inside them. ``record`` lists the factored sites, and is
    empty while the model is dense. ``plan`` is the last plan carried out. ``channels_last`` is the memory format of 4-d
    weights. ``mirrors`` are the copies that switch with the model.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, inputs: Any, *, frobenius_decay: bool | None) -> None:
        self.model, self.optimizer, self.inputs = model, optimizer, inputs
        self.record: tuple[TrainedSite, ...] = ()
        self.plan = Plan(())
        weights = [parameter for parameter in unwrap(model).parameters() if parameter.dim() == 4]
        self.channels_last = any(not weight.is_contiguous() for weight in weights)
        self.mirrors: list[nn.Module] = []
        if frobenius_decay is None:
            frobenius_decay = can_decay(optimizer)
        self._decay = FrobeniusDecay(optimizer) if frobenius_decay else None

    @property
    def root(self) -> nn.Module:
        """The module inside all wrappers."""
        return unwrap(self.model)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the module as it is now."""
        return sites_of(self.root, self.inputs)

    @property
    def leads(self) -> bool:
        """Whether this process decides for its group: it runs alone, or is rank 0."""
        group = group_of(self.model)
        return group is None or group.rank() == 0

    def agree(self, value: Any) -> Any:
        """Return the value that the leading process gives."""
        return agree(value, group_of(self.model))

    def survey(self) -> Survey:
        """Return the sites of the module as it is now, and which of them cannot be trained in factors."""
        sites, skips = find_sites(self.root, self.inputs)
        names = [skip.name for skip in skips]
        return Survey(sites, untrained(self.root, self.optimizer, sites), hooked(self.root, names))

    def mirror(self, copy: nn.Module) -> None:
        """Add a dense copy that switches with the model; adding it twice changes nothing.

        Raises:
            InputError: it is not a copy of the model.
        """
        inner = unwrap(copy.module if isinstance(copy, AveragedModel) else copy)
        if not is_copy(inner, self.root):
            raise InputError("mirror() needs a copy of the model", next_step="give a deep copy or an AveragedModel")
        if all(inner is not known for known in self.mirrors):
            self.mirrors.append(inner)

    def use_format(self, channels_last: bool) -> None:
        """Set the memory format of the model's and the mirrors' 4-d weights; False leaves them as they are."""
        self.channels_last = channels_last
        for module in (self.root, *self.mirrors):
            set_format(module, channels_last)

    def to_factors(self, plan: Plan) -> tuple[tuple[Change, ...], list[str]]:
        """Factor the sites of a plan; return the changes, and notes on state that could not be carried over."""
        root = self.root
        record, self.plan, changes, exchanges = switch_to_factors(root, self.inputs, plan, self.sites)
        notes = self._become(record, exchanges)
        for copy in self.mirrors:
            align_copy(copy, inputs_for(copy, root, self.inputs), self.plan, root, record)
        self.use_format(self.channels_last)
        return changes, notes

    def to_dense(self) -> list[str]:
        """Compose all factored sites; return notes on state that could not be carried over."""
        exchanges = switch_to_dense(self.root, self.inputs, self.record)
        notes = self._become((), exchanges)
        for copy in self.mirrors:
            recompose(copy, inputs_for(copy, self.root, self.inputs), inplace=True)
        self.use_format(self.channels_last)
        return notes

    def restore(self, plan: Plan, *, factored: bool) -> None:
        """Give a dense model the structure of a plan, without any state, for a checkpoint to fill."""
        self.plan = plan
        if factored:
            record, exchanges = fill_structure(self.root, self.inputs, plan)
            self._become(record, exchanges, carry=False)
            for copy in self.mirrors:
                build(copy, inputs_for(copy, self.root, self.inputs), plan)
        self.use_format(self.channels_last)

    def end_epoch(self) -> None:
        """Drop what a run that is resumed from here would not have, so that both go on identically."""
        if self._decay is not None:
            self._decay.renew()

    def release(self) -> None:
        """Remove the hooks from the optimizer."""
        if self._decay is not None:
            self._decay.remove()

    def _become(
        self, record: tuple[TrainedSite, ...], exchanges: Sequence[Exchange], *, carry: bool = True
    ) -> list[str]:
        """Update the optimizer, the wrappers and the decay to the parameters that the module has now."""
        # The first broadcast makes the new values alike, so that every process computes state from the same factors;
        # the second makes that state alike.
        root, group = self.root, group_of(self.model)
        set_format(root, self.channels_last)
        new = [parameter for exchange in exchanges for parameter in exchange.new]
        broadcast(new, self.optimizer, group)
        notes = exchange_parameters(self.optimizer, exchanges, carry=carry)
        broadcast(new, self.optimizer, group)
        self.model, self.record = rewrap(self.model), record
        if self._decay is not None:
            self._decay.watch([site.bind_chain(root) for site in record])
        return notes
