"""A pipeline: steps in threads of their own, each on its core. While one is at an item, the one before is at the next.

No more than ``flight`` inputs are under way at a time. That bounds every queue between two steps, so that nobody waits
to put something into one, and the pipeline can be closed at any time: each thread ends after the step that it is at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeAlias

from surgery.errors import InputError
from surgery.system.machine import pin_thread

__all__ = ["Pipeline", "Step"]

Step: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class _Failed:
    """What a step raised, on its way to the caller."""

    error: BaseException


class _End:
    """What tells a thread to end."""


class Pipeline(AbstractContextManager["Pipeline"]):
    """Functions of one argument that run one after another on each item, all at the same time on different items.

    ``cores`` has the number of the core of each step, None for any. Step ``i + 1`` gets what step ``i`` returned. At
    most ``flight`` items are under way, by default two for each step. To leave the ``with`` block ends the threads.

    >>> with Pipeline([lambda x: x + 1, lambda x: 2 * x]) as pipeline:
    ...     list(pipeline.map(range(3)))
    [2, 4, 6]
    """

    def __init__(
        self, steps: Sequence[Step], *, cores: Sequence[int | None] | None = None, flight: int | None = None
    ) -> None:
        cores = [None] * len(steps) if cores is None else cores
        if not steps or len(cores) != len(steps):
            raise InputError(f"{len(steps)} steps on {len(cores)} cores", allowed="one or more, a core for each")
        if flight is not None and flight < 1:
            raise InputError(f"flight={flight}", allowed="1 or more")
        self.flight = flight or 2 * len(steps)
        self._closing = threading.Event()
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(len(steps) + 1)]
        self._threads = [
            threading.Thread(target=self._work, args=(number, step, core), daemon=True, name=f"stage{number}")
            for number, (step, core) in enumerate(zip(steps, cores, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def map(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield what the last step returns for each item, in order; raise what a step raised, and close.

        Raises:
            InputError: the pipeline is closed.
        """
        if self._closing.is_set():
            raise InputError("the pipeline is closed", next_step="make a new one")
        try:
            yield from self._map(items)
        except BaseException:  # an error, Ctrl-C, or a caller that wants no more
            self.close()
            raise

    def _map(self, items: Iterable[Any]) -> Iterator[Any]:
        # Invariant: ``under_way`` inputs were put in whose results were not taken, never more than ``flight``.
        under_way = 0
        for item in items:
            if under_way == self.flight:
                yield self._next()
                under_way -= 1
            self._queues[0].put(item)
            under_way += 1
        for _ in range(under_way):
            yield self._next()

    def _next(self) -> Any:
        found = self._queues[-1].get()
        if isinstance(found, _Failed):
            raise found.error
        return found

    def close(self) -> None:
        """End the threads, each after the step that it is at; what is under way is lost."""
        self._closing.set()
        for queue in self._queues[:-1]:
            queue.put(_End())
        for thread in self._threads:
            thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, number: int, step: Step, core: int | None) -> None:
        if core is not None:
            pin_thread(core)
        source, target = self._queues[number : number + 2]
        while not isinstance(item := source.get(), _End) and not self._closing.is_set():
            # A failure goes through the later steps in its place, so that the results before it
            # still come out, in order.
            if not isinstance(item, _Failed):
                try:
                    item = step(item)
                except BaseException as error:  # whatever it is, the caller gets it
                    item = _Failed(error)
            target.put(item)
