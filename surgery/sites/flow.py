"""The flow: what surgery knows of a graph, as plain values. Kinds of models read it; find, fusable and recut use it.

Every value in a graph has a number, in the order in which values are computed. A convolution, a batch norm, and the sum
of both with the input are

    Other(value=0)                                    the input
    Call(value=1, source=0, weight="conv.weight")     an operator on a value
    Other(value=2, epilogue=BatchNorm())              what surgery does not change
    Sum(value=3, terms=(2, 0))                        the sum of two values

Parameters are known by their names and keys: names have one key if they stand for the same memory, as tied weights do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Layout, Operator, Shape
from surgery.algebra.steps import Link
from surgery.sites.epilogue import Loop, Neighbour
from surgery.sites.site import Skip

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

# what the parameter with a weight's numbers is called: as such, and by torch's weight norm and parametrizations
_PARAMETRIZED = (".parametrizations.weight.original", ".parametrizations.weight.original1")
_WEIGHTS = (".weight", ".weight_v", ".weight_orig", *_PARAMETRIZED)


def site_name(parameter: str) -> str:
    """Return the name of the site of a weight: its path without a final ``.weight``, or what torch computes it from."""
    for suffix in _WEIGHTS:
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return parameter


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator on ``source``, by a module (at ``path``) or by a function.

    ``weight`` and ``bias`` are names of parameters. Where the graph computes the bias, ``computed_bias`` is its value,
    and the operator has none. ``stored`` is the layout of the weight. A call may span several values: ``inside`` has
    those before ``value``, and ``reader`` is the one that reads the weight. A module may do more than its operator:
    ``last`` says that the operator comes last, and ``surplus`` counts parameters beside those of the operator.
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

    @property
    def values(self) -> tuple[int, ...]:
        """All values of the call, in order."""
        return (*self.inside, self.value)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Itself: each element of a chain has calls."""
        return (self,)

    @property
    def step(self) -> Operator:
        """The operator as a step of a chain."""
        return self.operator

    @property
    def user(self) -> int:
        """The value for which the weight is read."""
        return self.value if self.reader is None else self.reader


@dataclass(frozen=True, eq=False)
class Reshape:
    """A reshape, a transpose, or the addition of a bias: a step of a chain without a weight matrix.

    ``path`` is that of its module, if it is one, and ``bias`` the name of the parameter that is added.
    """

    value: int
    source: int
    step: Link
    path: str | None = None
    bias: str | None = None

    @property
    def values(self) -> tuple[int, ...]:
        """Its one value."""
        return (self.value,)

    @property
    def calls(self) -> tuple[Call, ...]:
        """None."""
        return ()


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of two values."""

    value: int
    terms: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Other:
    """Any other value; ``epilogue`` says that a runtime may compute it in one kernel with what it reads."""

    value: int
    epilogue: Neighbour | None = None


Element: TypeAlias = Call | Reshape | Sum | Other


@dataclass(frozen=True, eq=False)
class Left:
    """What was left alone in a graph, and for which values."""

    skip: Skip
    values: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The parameters: the key and the size of each name, and the values for which each key is read.

    ``computed`` are weights that the graph computes; they count as one parameter each, and ``surplus`` is how many more
    numbers they are computed from.
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
        """Number of all parameters, each counted once."""
        return sum({self.keys[name]: size for name, size in self.sizes.items()}.values()) + self.surplus

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return all names of the parameter of a name."""
        return self.names[self.keys[name]]


@dataclass(frozen=True, eq=False)
class Unseen:
    """A layer of the model that no call may have reached: what to say of it then.

    ``key`` is that of its weight. ``operator`` says that it is a layer with an operator; what is said of any other
    holds unless a layer around it was named.
    """

    skip: Skip
    key: Key | None
    operator: bool


@dataclass(frozen=True, eq=False)
class Layers:
    """What is known of modules, by path, where the graph calls them.

    ``children`` has the paths of all children of each plain container. ``bound`` says why a module cannot become part
    of another: a hook, parameters of its own. ``alone`` says that nothing but modules can be changed.
    """

    children: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bound: Mapping[str, str | None] = field(default_factory=dict)
    alone: bool = False
    unseen: tuple[Unseen, ...] = ()


@dataclass(frozen=True, eq=False)
class ModuleChain:
    """A chain that stands in the model as a module, or as several with the same weights and a bias each.

    ``names`` are the paths of the modules, and ``chains`` what each computes; ``weights`` are the names of the factors.
    ``calls`` are the calls that were seen, each by the value that it gives.
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

    ``users`` are the values that are computed from each value. ``shapes`` has the shape of each value, ``input_shapes``
    of what the operator of a call reads, and ``macs`` the multiply-accumulates of a value that is not a call's; they
    are worked out when they are asked for. ``labels`` are the graph's own names of values. ``origins`` says what made
    the factors of a site, and ``recorded`` are all sites that are known to be factored, origins or not. ``broken`` are
    chains that were changed so that they are none. ``proved`` is false where calls were only seen in a run.
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

    @cached_property
    def at(self) -> Mapping[int, Element]:
        """The element that gives each value."""
        return {element.value: element for element in self.elements}

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """All calls of operators, in order."""
        return tuple(element for element in self.elements if isinstance(element, Call))

    def only_user(self, value: int) -> int | None:
        """Return the one value that is computed from a value, or None if there is none or more than one."""
        users = self.users.get(value, frozenset())
        return next(iter(users)) if len(users) == 1 else None
