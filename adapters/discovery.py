"""Bridges, layers and catalogue files are found by their presence in a folder: a new one is listed nowhere."""

import importlib
import pkgutil
from types import ModuleType

from adapters.imports import validation_unchanged

# The files that can't be imported, by module name, with the reason. None is tried twice.
_failed: dict[str, str] = {}


def modules(package: str) -> list[ModuleType]:
    """Every module of a package, in alphabetical order, imported.

    Its sub-packages are left out: they hold code that the modules share. A file that can't be imported is left out,
    too, so that somebody's unfinished one is no trouble to anybody else: ``failures`` says which, and why.

    >>> [module.__name__ for module in modules("adapters.layers")][:2]
    ['adapters.layers.autoregressive', 'adapters.layers.coupling']
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    names = [f"{package}.{module.name}" for module in found if not module.ispkg]
    with validation_unchanged():
        return [module for name in names if (module := _imported(name)) is not None]


def _imported(name: str) -> ModuleType | None:
    if name not in _failed:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            _failed[name] = f"{name} can't be imported ({type(error).__name__}: {error})"
    return None


def failures(package: str) -> list[str]:
    """For each file of a package that can't be imported, a sentence that says why.

    >>> failures("adapters.layers")
    []
    """
    modules(package)
    return [why for name, why in _failed.items() if name.startswith(f"{package}.")]


def file_name(module) -> str:
    """The name of a module's file: ``"zuko"`` for ``adapters.bridges.zuko``.

    A library's bridge, its catalogue and its examples are files of the same name.
    """
    return module.__name__.rpartition(".")[2]
