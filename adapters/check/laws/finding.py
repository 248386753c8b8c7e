"""What a law is, and what it says."""

from collections.abc import Callable
from typing import NamedTuple

from adapters.check.evidence import Evidence

RIGHT, WRONG, REMARK, UNASKED = "✓", "✗", "!", "·"


class Finding(NamedTuple):
    """How a law came out.

    Attributes:
        verdict: one of the four marks above.
        words: what was seen.
        mistake, remedy: where that alone tells it, which mistake it is, and what to write instead.
        explains: further laws that fail because of it.
        error: how far the law is from holding exactly, where that is one number.
    """

    verdict: str
    words: str = ""
    mistake: str = ""
    remedy: str = ""
    explains: tuple[str, ...] = ()
    error: float | None = None


class Law(NamedTuple):
    """Something that a right layer has.

    Attributes:
        name, title: for the program, and for people.
        measure: the law itself.
        needs: the laws without which this one would mean nothing.
    """

    name: str
    title: str
    measure: Callable[[Evidence], Finding]
    needs: tuple[str, ...] = ()
