"""The flow: what surgery knows of a graph, as plain values. A kind of models reads it; find, fusable and recut use it.

Each value in a graph has a number, in the order in which values are computed. A convolution, a batch norm after it, and
the sum of that norm with the input are

    Other(value=0)                                    the input
    Call(value=1, source=0, weight="conv.weight")     an operator on a value
    Other(value=2, epilogue=BatchNorm())              a value that surgery does not change
    Sum(value=3, terms=(2, 0))                        the sum of two values

A parameter has names and one key. Two names have the same key if they stand for the same memory, as tied weights do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from surgery.algebra import Chain, Layout, Link, Operator, Shape
from surgery.sites.site import Epilogue, Loop, Skip

__all__ = [
    "Call",
    "Element",
    "Flow",
    "Key",
    "Layers",
    "Left",
    "ModuleChain",
    "Origin",
    "Other",
    "Reshape",
    "Sum",
    "Tensors",
    "Unseen",
    "site_name",
]

Key: TypeAlias = Hashable
Origin: TypeAlias = tuple[str, tuple[int, ...]]  # a factorization and its ranks

# how the name of the parameter with a weight's numbers ends: plainly, by torch's weight norm, and by parametrizations
_PARAMETRIZED = (".parametrizations.weight.original", ".parametrizations.weight.original1")
_WEIGHTS = (".weight", ".weight_v", ".weight_orig", *_PARAMETRIZED)


def site_name(parameter: str) -> str:
    """Return the name of a weight's site: the parameter's path without the ending that says it is a weight.

    >>> site_name("conv.weight"), site_name("conv.parametrizations.weight.original1"), site_name("table")
    ('conv', 'conv', 'table')
    """
    for suffix in _WEIGHTS:
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return parameter


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator on ``source``, by a module (at ``path``) or by a function.

    ``weight`` and ``bias`` are names of parameters. Where the graph computes the bias, ``computed_bias`` is the number
    of that value, and the operator has no bias. ``stored`` is the layout of the weight, and ``view`` says what the
    graph does to the parameter before; calls with equal views read the same numbers. A call may span several values:
    ``inside`` has those before ``value``, and ``reader`` is the value that reads the weight. ``loop`` is the loop of a
    recurrent layer around the call. A module may do more than its operator: ``last`` says that the operator comes last,
    and ``surplus`` counts the parameters that the module has in addition to the operator's.
    """

    value: int
    source: int
    operator: Operator
    weight: str
    bias: str | None = None
    stored: Layout = "out_in"
    path: str | None = None
    computed_bias: int | None = None
    inside: tuple[int, ...] = ()
    reader: int | None = None
    loop: Loop | None = None
    last: bool = True
    surplus: int = 0
    view: Hashable = ()

    @property
    def values(self) -> tuple[int, ...]:
        """All values of the call, in order."""
        return (*self.inside, self.value)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The call itself, so that every part of a chain can be asked for its calls."""
        return (self,)

    @property
    def step(self) -> Operator:
        """The operator as a step of a chain."""
        return self.operator

    @property
    def user(self) -> int:
        """The value that reads the weight."""
        return self.value if self.reader is None else self.reader


@dataclass(frozen=True, eq=False)
class Reshape:
    """A reshape, a transpose, or the addition of a bias: a step of a chain without a weight matrix.

    ``path`` is the path of the module, if a module does it. ``bias`` is the name of the parameter that is added. A
    reshape may span several values: ``inside`` has those before ``value``.
    """

    value: int
    source: int
    step: Link
    path: str | None = None
    bias: str | None = None
    inside: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """All values of the reshape, in order."""
        return (*self.inside, self.value)

    @property
    def calls(self) -> tuple[Call, ...]:
        """No calls: a reshape has none."""
        return ()


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of two values."""

    value: int
    terms: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Other:
    """Any other value; ``epilogue`` is set if a runtime may compute it in one kernel with the operator before it."""

    value: int
    epilogue: Epilogue | None = None


Element: TypeAlias = Call | Reshape | Sum | Other


@dataclass(frozen=True, eq=False)
class Left:
    """A skip, with the values in the graph that it is about."""

    skip: Skip
    values: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The parameters: ``keys`` and ``sizes`` by name, and the values that read each parameter (``uses``), by key.

    ``computed`` names the weights that the graph computes; each counts as one parameter. ``surplus`` is the number of
    entries that the graph computes these weights from, less the number of entries that these weights have.
    """

    keys: Mapping[str, Key]
    sizes: Mapping[str, int]
    uses: Mapping[Key, frozenset[int]] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()
    surplus: int = 0

    @cached_property
    def names(self) -> Mapping[Key, tuple[str, ...]]:
        """All names of each parameter, in the order of the state dict."""
        names: dict[Key, list[str]] = defaultdict(list)
        for name, key in self.keys.items():
            names[key].append(name)
        return {key: tuple(row) for key, row in names.items()}

    @cached_property
    def total(self) -> int:
        """Number of entries of all parameters; a tied parameter counts once."""
        return sum({self.keys[name]: size for name, size in self.sizes.items()}.values()) + self.surplus

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return all names of the parameter that has this name."""
        return self.names[self.keys[name]]


@dataclass(frozen=True, eq=False)
class Unseen:
    """A layer of the model with the skip to report if no call reaches the layer.

    ``key`` is the key of its weight. ``operator`` says whether the layer is an operator. The skip of any other layer is
    dropped if a layer around it is already a site or a skip.
    """

    skip: Skip
    key: Key | None
    operator: bool


@dataclass(frozen=True, eq=False)
class Layers:
    """What is known of the modules that a graph calls, by path.

    ``children`` has the paths of all children of each plain container. ``bound`` says why a module cannot be fused with
    others: it has a hook, or parameters of its own. ``alone`` says that only modules can be changed, not function
    calls. ``unseen`` are the layers to report if no call reaches them.
    """

    children: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bound: Mapping[str, str | None] = field(default_factory=dict)
    alone: bool = False
    unseen: tuple[Unseen, ...] = ()


@dataclass(frozen=True, eq=False)
class ModuleChain:
    """A chain that stands in the model as one module, or as several modules with the same weights and a bias each.

    ``names`` are the paths of the modules, and ``chains`` has the chain of each module. ``weights`` are the names of
    the factors, and ``keys`` their keys. ``calls`` are the values that the calls seen in the graph give.
    """

    names: tuple[str, ...]
    chains: tuple[Chain, ...]
    weights: tuple[str, ...]
    keys: tuple[Key, ...]
    calls: tuple[int, ...] = ()
    loop: Loop | None = None


@dataclass(frozen=True, eq=False)
class Flow:
    """A graph as surgery sees it.

    ``users`` has the values that are computed from each value. Three mappings are computed on demand: ``shapes`` has
    the shape of each value, ``input_shapes`` the input shape of the operator of each call, and ``macs`` the
    multiply-accumulates of each value that is not a call's. ``labels`` are the graph's own names of values. ``chains``
    are the chains that stand as modules, and ``broken`` reports modules that are not chains any more because they were
    changed. ``origins`` has the factorization and the ranks of factored sites. ``recorded`` names all sites that are
    known to be factored, with or without an origin. ``proved`` is false if calls were only seen in a run, so that
    nothing is known of the dataflow between them. ``runs`` says of calls whether the example inputs reach them; a call
    of which nothing is said always runs. ``any_padding`` says that a convolution of the graph may pad both
    sides of an axis unequally, which torch's arguments cannot say.
    """

    elements: tuple[Element, ...]
    users: Mapping[int, frozenset[int]]
    tensors: Tensors
    shapes: Mapping[int, Shape]
    input_shapes: Mapping[int, Shape]
    macs: Mapping[int, int] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    left: tuple[Left, ...] = ()
    layers: Layers = field(default_factory=Layers)
    chains: tuple[ModuleChain, ...] = ()
    broken: tuple[Skip, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)
    recorded: frozenset[str] = frozenset()
    proved: bool = True
    runs: Mapping[int, bool] = field(default_factory=dict)
    any_padding: bool = False

    @cached_property
    def at(self) -> Mapping[int, Element]:
        """The element that gives each value."""
        return {element.value: element for element in self.elements}

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """All calls of operators, in order."""
        return tuple(element for element in self.elements if isinstance(element, Call))

    def running(self, calls: Iterable[Call]) -> tuple[Call, ...]:
        """Return those of the calls that the example inputs reach; a branch that is not taken costs nothing."""
        return tuple(call for call in calls if self.runs.get(call.value, True))

    def only_user(self, value: int) -> int | None:
        """Return the one value that is computed from a value; None unless there is exactly one."""
        users = self.users.get(value, frozenset())
        return next(iter(users)) if len(users) == 1 else None
