"""The factorizations, by name: one file and one row for each."""

from __future__ import annotations

from surgery.algebra import Operator
from surgery.errors import InputError, Refusal
from surgery.factorizations.base import SOLVERS, Factorization, Ranks, Spectrum
from surgery.factorizations.cp import Cp
from surgery.factorizations.depthwise import Depthwise
from surgery.factorizations.spatial import Spatial
from surgery.factorizations.svd import Svd
from surgery.factorizations.tr import Tr
from surgery.factorizations.tt import Tt
from surgery.factorizations.tucker import Tucker

__all__ = ["FACTORIZATIONS", "SOLVERS", "Factorization", "Ranks", "Spectrum", "fitting", "named"]

FACTORIZATIONS: dict[str, Factorization] = {
    "tucker": Tucker(),
    "svd": Svd(),
    "spatial": Spatial(),
    "depthwise": Depthwise(),
    "cp": Cp(),
    "tt": Tt(),
    "tr": Tr(),
}


def named(name: str) -> Factorization:
    """Return the factorization of this name.

    Raises:
        InputError: the name is not that of a factorization.
    """
    if name not in FACTORIZATIONS:
        raise InputError(f"unknown factorization {name!r}", allowed=", ".join(FACTORIZATIONS))
    return FACTORIZATIONS[name]


def fitting(operator: Operator, name: str = "auto") -> list[Factorization] | Refusal:
    """Return the factorizations that fit the operator, the preferred one first; or why none of them does.

    ``name`` narrows the choice to one factorization; "auto" admits the automatic ones.
    """
    choice = [f for f in FACTORIZATIONS.values() if f.automatic] if name == "auto" else [named(name)]
    refusals = {f.name: f.refuse(operator) for f in choice}
    fits = [f for f in choice if refusals[f.name] is None]
    if fits:
        return fits
    return Refusal("; ".join(f"{key}: {refusal.reason}" for key, refusal in refusals.items() if refusal is not None))
