"""Bridges, layers and catalogue files are found by their presence in a folder: a new one is listed nowhere."""

import importlib
import pkgutil
from types import ModuleType

from adapters.imports import validation_unchanged


def modules(package: str) -> list[ModuleType]:
    """Every module of a package, in alphabetical order, imported.

    Its sub-packages are left out: they hold code that the modules share.

    >>> [module.__name__ for module in modules("adapters.layers")][:2]
    ['adapters.layers.autoregressive', 'adapters.layers.coupling']
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    with validation_unchanged():
        return [importlib.import_module(f"{package}.{module.name}") for module in found if not module.ispkg]


def file_name(module) -> str:
    """The name of a module's file: ``"zuko"`` for ``adapters.bridges.zuko``.

    A library's bridge, its catalogue and its examples are files of the same name.
    """
    return module.__name__.rpartition(".")[2]
