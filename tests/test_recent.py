"""What is remembered stays within its bytes, and the longest unused goes first."""

from __future__ import annotations

from surgery.system.recent import Recent


def test_the_longest_unused_goes_first() -> None:
    held, made = Recent[str, bytes](100, len), list[str]()

    def get(key: str, size: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return bytes(size)

        return held.get(key, make)

    first = get("a", 40)
    get("b", 40)
    assert get("a", 40) is first
    get("c", 40)  # "b" was not used since, and goes
    assert get("a", 40) is first
    get("b", 40)
    assert made == ["a", "b", "c", "b"]


def test_the_latest_stays_whatever_it_takes() -> None:
    held = Recent[str, bytes](10, len)
    one = held.get("a", lambda: bytes(40))
    assert held.get("a", bytes) is one
