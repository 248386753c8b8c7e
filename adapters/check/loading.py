"""From ``my_layer:MyLayer`` on a command line to a layer: found, imported, and made with what it asks for."""

import ast
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from adapters.check.subject import said
from adapters.masks import checkerboard_mask
from adapters.networks import MLP

WIDTH = 16  # of the networks that a layer is given


class Network(nn.Module):
    """A small network from an event, and a context if there is one, to an event; in tanh if it is to give s."""

    def __init__(self, event_shape: tuple[int, ...], context_features: int | None, bounded: bool):
        super().__init__()
        size = math.prod(event_shape)
        self.mlp = MLP(size, size, (WIDTH,), context_features, "tanh")
        self.bounded = bounded

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        answer = self.mlp(z.flatten(1), context).view_as(z)
        return answer.tanh() if self.bounded else answer


def load(name: str) -> Any:
    """The object that ``module:object`` or ``file.py:object`` names; the working directory is searched first.

    Raises:
        ValueError: for a name that names nothing.
        ImportError: for a module that can't be imported, with the error that it ended in.
    """
    module, colon, attribute = name.rpartition(":")
    path = Path(module)
    if not colon or not attribute or not module:
        raise ValueError(f"{name!r} names no layer; write my_layer:MyLayer, or my_layer.py:MyLayer")
    if path.suffix == ".py":
        if not path.is_file():
            raise ImportError(f"{name}: there is no file {module}")
        sys.path.insert(0, str(path.resolve().parent))
    elif "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = _of_file(path) if path.suffix == ".py" else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code does while it is read
        remedy = "run from the directory it is in" if isinstance(error, ModuleNotFoundError) else "mend it first"
        raise ImportError(f"{name}: {module} can't be imported ({said(error)}); {remedy}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
            raise ValueError(f"{name}: {module} has no {part}" + (f"; it has {', '.join(public)}" if public else ""))
        found = getattr(found, part)
    return found


def _of_file(path: Path) -> ModuleType:
    """The file as a module by its own name, or another if that is taken: a file may be called ``copy.py``."""
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_to_check"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def make(
    found: Any, event_shape: tuple[int, ...], context_features: int | None, arguments: dict[str, str] | None = None
) -> Any:
    """The layer itself: an object as it is; what a class or a function gives, called with what it asks for by name.

    Args:
        found: as ``load`` gives it.
        arguments: for parameters of other names, as Python writes their values, or plain words.

    Raises:
        TypeError: if it asks for something that is not offered, or an argument is not one of its own.
    """
    values = {key: _value(value) for key, value in (arguments or {}).items()}
    if not isinstance(found, type) and not inspect.isfunction(found) and not _is_partial(found):
        if values:
            raise TypeError(f"{_name(found)} is made already, and takes no arguments")
        return found
    parameters = inspect.signature(found).parameters
    named = {key: one for key, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    offered = _offered(event_shape, context_features)
    if other := [key for key in values if key not in named and len(named) == len(parameters)]:
        raise TypeError(f"{_name(found)} has no argument {other[0]}; it has {', '.join(named) or 'none'}")
    given = dict(values)
    for key, one in named.items():
        if key in values:
            continue
        if key in offered and (one.default is one.empty or key in ALWAYS):
            given[key] = offered[key]()
        elif one.default is one.empty:
            raise TypeError(f"{_name(found)} wants {key}: say --arguments {key} VALUE, or give it a default")
    return found(**given)


ALWAYS = ("features", "event_shape", "context_features")  # even where they have a default


def _offered(event_shape: tuple[int, ...], context_features: int | None) -> dict[str, Callable[[], Any]]:
    """What is handed to parameters of these names."""
    size = math.prod(event_shape)

    def mask() -> Tensor:
        return checkerboard_mask(*event_shape)

    def network(bounded: bool) -> Callable[[], nn.Module]:
        return lambda: Network(event_shape, context_features, bounded)

    offered: dict[str, Callable[[], Any]] = {
        "event_shape": lambda: event_shape,
        "shape": lambda: event_shape,
        "context_features": lambda: context_features,
        "context": lambda: context_features or 0,
        "hidden_features": lambda: (WIDTH, WIDTH),
        "hidden": lambda: WIDTH,
        "layers": lambda: 2,
        "mask": mask,
        "b": mask,
        "masks": lambda: [mask(), 1 - mask()],
        "transform_net_create_fn": lambda: lambda inputs, outputs: MLP(inputs, outputs, (WIDTH,), context_features),
    }
    offered |= dict.fromkeys(
        ("features", "num_features", "dim", "D", "n_features", "input_dim", "in_features"), lambda: size
    )
    offered |= dict.fromkeys(("scale_net", "s_net", "net_s", "scale", "s"), network(True))
    offered |= dict.fromkeys(("translation_net", "t_net", "net_t", "translation", "t"), network(False))
    return offered


def _value(text: str) -> Any:
    """``3``, ``[1, 2]``, ``None`` as Python reads them; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_partial(found: Any) -> bool:
    return callable(found) and not hasattr(found, "inverse") and not isinstance(found, nn.Module)


def _name(found: Any) -> str:
    return getattr(found, "__name__", type(found).__name__)
