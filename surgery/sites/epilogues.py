"""Epilogues: which batch norm and which activation a runtime computes in one kernel with the calls of a site."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.sites.epilogue import Activation, BatchNorm, Neighbour
from surgery.sites.flow import Call, Flow, Other

__all__ = ["epilogues"]


def epilogues(flow: Flow, calls: tuple[Call, ...]) -> tuple[Neighbour, ...]:
    """Return a batch norm, an activation, or one after the other, if nothing else reads what the calls give.

    Calls of one site that are followed by different things have none.
    """
    found = {tuple(_after(flow, call.value)) for call in calls}
    return found.pop() if len(found) == 1 else ()


def _after(flow: Flow, value: int) -> Iterator[Neighbour]:
    user = flow.only_user(value)
    epilogue = _epilogue(flow, user)
    if isinstance(epilogue, BatchNorm):
        assert user is not None  # it has an epilogue
        yield epilogue
        epilogue = _epilogue(flow, flow.only_user(user))
    if isinstance(epilogue, Activation):
        yield epilogue


def _epilogue(flow: Flow, value: int | None) -> Neighbour | None:
    element = None if value is None else flow.at.get(value)
    return element.epilogue if isinstance(element, Other) else None
