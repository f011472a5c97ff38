"""The words of a report: the sentences at its top, values with their units, and the glossary."""

from __future__ import annotations

from pathlib import PurePath

from surgery.report.content import Content, KeptRow, Latency
from surgery.report.markup import shorten
from surgery.sites import left_alone
from surgery.text import FAR, seconds, size

__all__ = [
    "GLOSSARY",
    "bytes_text",
    "milliseconds",
    "percent",
    "promise_sentences",
    "seen_sentence",
    "summary",
    "title",
]

GLOSSARY = (
    ("layer, site", "a place in the network that multiplies by a table of learned numbers, its weight"),
    (
        "factored",
        "one large table is replaced by two to four smaller tables, used one after another, whose product is nearly "
        "the same",
    ),
    ("rank", "how wide the passage between the small tables is: a lower rank is faster and less exact"),
    ("method", "how a weight is factored, for example svd, tucker or cp; every method gives ordinary layers"),
    ("MACs", "multiply-accumulates: the number of products that the network computes for one input"),
    ("latency", "the time of one run, measured with onnxruntime on the machine named above"),
    (
        "95 % interval",
        "measured times vary; if the measurement were repeated, nearly all speed-ups would lie in this interval",
    ),
    ("weight error", "how far the product of the small tables is from the weight, relative to the weight"),
    ("output error", "how far the network's answers are from those of the original, relative to their size"),
    (
        "share of the output error",
        "how much a layer adds to the output error, estimated from how sensitive the output is to it",
    ),
    ("left alone", "a layer that stays as it was, because changing it would not pay or would cost too much accuracy"),
)


def milliseconds(value: float | None) -> str:
    """Return a duration with a unit; a dash for None."""
    return "\u2013" if value is None else "0" if value <= 0 else seconds(value).replace("us", "\u00b5s")


def percent(value: float | None) -> str:
    """Return a share as a percentage of three digits; a dash for None."""
    return "\u2013" if value is None else f"{100 * value:.3g} %"


def bytes_text(value: float | None) -> str:
    """Return a size with a unit; a dash for None."""
    return "\u2013" if value is None else size(value)


def title(content: Content) -> str:
    """Return the title of the page."""
    name = PurePath(content.source).name
    return f"Report on {shorten(name, 80)}" if name else "Report on a decomposed model"


def summary(content: Content) -> str:
    """Return in a few sentences what was done, what it gains, and whether the promise is kept.

    If most of the model was left alone, the first sentence says so, with what to do about it.
    """
    left = left_alone(content.left, content.before.macs, exported=content.source.endswith(".pt2"))
    return _done(content) if left is None else f"{left}. {_done(content)}"


def _done(content: Content) -> str:
    promise = content.promise
    told = "" if promise is None else f" The promise is {'kept' if promise.kept else 'not kept'}."
    found = len(content.replaced)
    if not found:
        return f"The model was left exactly as it was: no change was found that pays and does what was asked for.{told}"
    what = f"{found} {'layer was' if found == 1 else 'layers were'} replaced by cheaper ones"
    gains = [_speed(content.latency)] if content.latency else []
    before, after = content.before.parameters, content.after.parameters
    if before and after is not None:
        gains.append(f"{'it' if gains else 'the model'} has {_fewer(before, after)} parameters")
    return f"{what}{': ' * bool(gains)}{' and '.join(gains)}.{told}"


def _speed(latency: Latency) -> str:
    times = f"{milliseconds(latency.before)} \u2192 {milliseconds(latency.after)}"
    if latency.verdict == "faster":
        speedup = f"{latency.low:.1f} to {latency.high:.1f}" if latency.unsure else f"{latency.speedup:.2f}"
        return f"the model is {speedup} times as fast as before on this machine ({times} a run)"
    if latency.verdict == "slower":
        return f"the model is slower than before on this machine ({times} a run)"
    return f"the model is about as fast as before on this machine ({times} a run)"


def _fewer(before: float, after: float) -> str:
    share = 100 * (after / before - 1)
    return f"{abs(share):.0f} % {'more' if share > 0 else 'fewer'}"


def seen_sentence(seen: tuple[float, str]) -> str:
    """Return a sentence with the output error and the inputs it was measured on, and a warning if it is large."""
    error, what = seen
    far = " The outputs are no longer those of the original." if error > FAR else ""
    return f"The output error is {percent(error)}, measured on {what}.{far}"


def promise_sentences(promise: KeptRow, metrics: tuple[float, float] | None) -> tuple[str, str]:
    """Return two sentences: what was promised, and what was measured."""
    asked, measured = {
        "max_error": (
            f"The output error is at most {percent(promise.limit)}.",
            f"Measured {percent(promise.measured)} on samples that the layers were not fitted to.",
        ),
        "max_drop": (
            f"The metric falls by at most {promise.limit:.4g}.",
            f"Measured a change of {-promise.measured:+.4g}"
            + (f", from {metrics[0]:.4g} to {metrics[1]:.4g}." if metrics else "."),
        ),
        "target_speedup": (
            f"The model is at least {promise.limit:.3g} times as fast.",
            f"Measured {promise.measured:.2f} times as fast.",
        ),
    }[promise.kind]
    return asked, f"{measured.removesuffix('.')} ({promise.note})." if promise.note else measured
