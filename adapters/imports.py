"""Imports that take no longer, and change no more, than what is used needs.

What takes long to import is imported when it is used. And no import of ours changes torch for the whole process.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from torch.distributions import Distribution


class Later:
    """A module that is imported when one of its attributes is first asked for.

    >>> fractions = Later("fractions")
    >>> fractions.Fraction(2, 4)
    Fraction(1, 2)
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = sys.modules.get(self._name)
        if module is None:
            with validation_unchanged():
                module = importlib.import_module(self._name)
        return getattr(module, attribute)


@contextmanager
def validation_unchanged() -> Iterator[None]:
    """Within, an import may switch torch's validation of arguments, as Pyro's does. Afterwards it is as it was."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def import_nflows() -> None:
    """Import the one file of nflows that imports matplotlib, without matplotlib.

    nflows' MADE imports ``matplotlib.pyplot`` and never uses it, which would take longer than all of nflows and this
    package together. While that file is imported, empty modules stand in for matplotlib, unless it is there already.
    """
    if "matplotlib" in sys.modules:
        return
    importlib.import_module("nflows.utils")  # which the file needs, so that nothing else is imported meanwhile
    matplotlib, pyplot = ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    vars(matplotlib)["pyplot"] = pyplot
    stand_ins = {module.__name__: module for module in (matplotlib, pyplot)}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("nflows.nn.nde.made")
    finally:
        for name in stand_ins:
            del sys.modules[name]


@cache
def import_zuko() -> ModuleType:
    """zuko, imported so that torch.distributions validates arguments as it did before.

    zuko turns validation off and empties ``arg_constraints`` for every distribution of torch. zuko's own distributions
    need that, since some set their parameters only after torch would have checked them: so they alone keep it. zuko
    also adds a method to torch's ``Transform``, ``call_and_ladj``. This one stays, as it changes nothing that torch
    does. If somebody else has imported zuko before, torch.distributions stays as that import left it.
    """
    before = {name: vars(Distribution)[name] for name in ("_validate_args", "arg_constraints")}
    try:
        import zuko
    finally:
        for name, value in before.items():
            setattr(Distribution, name, value)
    for kind in vars(zuko.distributions).values():
        if isinstance(kind, type) and kind.__module__ == zuko.distributions.__name__:
            kind._validate_args = False
            kind.arg_constraints = vars(kind).get("arg_constraints", {})
    return zuko


@cache
def import_sbi() -> ModuleType:
    """sbi's package of estimators, imported so that torch.distributions validates arguments as it did before.

    sbi imports zuko, which turns validation off unless ``import_zuko`` has imported it first.
    """
    import_zuko()
    from sbi.neural_nets import estimators

    return estimators
