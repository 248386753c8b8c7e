"""Classes that derive from a library's, and so can exist only once that library has been imported."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def class_on_demand(make: Callable[[], type]) -> Callable[[], type]:
    """A decorator for a function that imports a library and returns a class that derives from one of the library's.

    The first call makes the class, and every later call returns the same class.

    Its objects can be pickled and copied. Usually pickle finds a class by its name in a module, which fails for a class
    that is not made yet. For this one pickle calls the function, so that any process can load such an object.
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
