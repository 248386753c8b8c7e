"""Classes that derive from a library's, and so can exist only once that library has been imported."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def class_on_demand(make: Callable[[], type]) -> Callable[[], type]:
    """A decorator for a function that imports a library and returns a class that derives from one of the library's.

    The class is made in the first call, and the same one comes back in every other. Its objects can be pickled and
    copied: pickle, which looks for a class by its name in a module, finds this one by calling the function, so that an
    object can be loaded in a process that has not made the class yet.
    """

    @cache
    @wraps(make)
    def made() -> type:
        kind: Any = make()
        kind.__qualname__ = kind.__name__
        kind.__reduce__ = lambda self: (_new, (made,), self.__getstate__())
        return kind

    return made


def _new(made: Callable[[], Any]) -> Any:
    kind = made()
    return kind.__new__(kind)
