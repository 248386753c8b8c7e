"""How files make themselves known: each layer and bridge may carry an ``EXAMPLES`` and a ``FLOWS``, found by presence.

``EXAMPLES: dict[str, Example]`` are transforms that the tests hold against the laws.
``MODELS: dict[str, Model]``, in a bridge, are whole models of the library, scored by the library's own code.
``FLOWS: dict[str, Callable[[Specification, …], Transform]]`` are the flows of ``build_flow``: each makes the transform
data → noise that the specification asks for.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from nflows.transforms import Transform
from torch import Tensor


class Example(NamedTuple):
    """A transform to hold against the laws: how to make it, and the shapes it takes."""

    make: Callable[[], Transform]
    event_shape: tuple[int, ...]
    context_features: int | None = None


class Model(NamedTuple):
    """A library's own flow, base and all, to hold ``as_flow`` of it against what the library itself computes.

    Attributes:
        make: makes the library's flow.
        log_prob: ``log_prob(flow, x, context)`` is the library's own log-density, ``(batch, *event)`` → ``(batch,)``.
        event_shape: shape of one datum.
        context_features: width of the context; ``None`` for an unconditional flow.
        samples: whether it can draw samples.
    """

    make: Callable[[], Any]
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    event_shape: tuple[int, ...]
    context_features: int | None = None
    samples: bool = True


@dataclass(frozen=True)
class Specification:
    """What every flow of the catalogue is asked for alike, so that a comparison is fair.

    Attributes:
        features: D, the width of the data.
        layers: how many layers.
        hidden_features: widths of each conditioner's hidden layers.
        context_features: width of the context; ``None`` for an unconditional flow.
        masks: one mask of D entries a layer, from the noise side to the data side; 1 = unchanged. Floats, on the CPU.
        activation: name of the conditioners' activation, a key of ``networks.ACTIVATIONS``.
        preprocess: the fixed transform between the data and these layers, if there is one.
    """

    features: int
    layers: int
    hidden_features: tuple[int, ...]
    context_features: int | None
    masks: tuple[Tensor, ...]
    activation: str
    preprocess: Transform | None = None

    @property
    def coupling_masks(self) -> tuple[Tensor, ...]:
        """The masks; a ValueError if there is only one coordinate, and so nothing to couple it with."""
        if self.features == 1:
            raise ValueError(
                "a coupling flow needs at least 2 features, not 1; "
                "an autoregressive one, such as masked-autoregressive, takes 1"
            )
        return self.masks

    @property
    def network(self) -> dict:
        """The keywords of ``networks.MLP`` that follow from the specification."""
        return {
            "hidden_features": self.hidden_features,
            "context_features": self.context_features,
            "activation": self.activation,
        }


def modules(package: str) -> list[ModuleType]:
    """Every module of ``adapters.layers`` or ``adapters.bridges``, in alphabetical order."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path)]


def flows(*packages: str) -> dict[str, tuple[Callable[..., Transform], ModuleType]]:
    """The flows of every module that has any, each with its module; each package's in alphabetical order.

    Raises:
        ValueError: if two modules give their flows the same name.
    """
    found = {}
    for package in packages:
        own = [
            (name, make, module) for module in modules(package) for name, make in getattr(module, "FLOWS", {}).items()
        ]
        for name, make, module in sorted(own, key=lambda flow: flow[0]):
            if name in found:
                raise ValueError(f"two flows are named {name!r}: in {found[name][1].__name__} and {module.__name__}")
            found[name] = make, module
    return found


def installed(module: ModuleType) -> bool:
    """Whether the library that this bridge is for can be imported; a hand-written layer needs none."""
    return all(importlib.util.find_spec(package) is not None for package in getattr(module, "PACKAGES", ())[:1])


def check_installed(module: ModuleType) -> None:
    """Raise an ImportError that names the extra unless ``installed``."""
    if not installed(module):
        name = module.__name__.rpartition(".")[2]
        raise ImportError(f"{name} is not installed: pip install 'flow-adapters[{module.EXTRA}]'")
