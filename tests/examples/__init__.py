"""Transforms and flows to hold against the laws: one file for each library, and one for our own layers.

A file, found by its presence, may have

- ``EXAMPLES``, of names: ``Example``, a transform;
- ``MODELS``, of names: ``Model``, a library's own flow;
- ``decode(exported, noise, context)``, which every library must have: x and log|det| of noise → data, by the library's
  own call of a transform that ``to_library`` made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from nflows.transforms import Transform
from torch import Tensor

from adapters.discovery import file_name, modules


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


def examples() -> dict[str, Example]:
    """Every example, by file and name: ``zuko:coupling``."""
    return _found("EXAMPLES")


def models() -> dict[str, Model]:
    """Every model, by file and name: ``zuko:realnvp``."""
    return _found("MODELS")


def decoders() -> dict[str, Callable]:
    """Of each library, by its bridge's name, its own call noise → data."""
    return {file_name(module): module.decode for module in modules(__name__) if hasattr(module, "decode")}


def _found(attribute: str) -> dict:
    return {
        f"{file_name(module)}:{name}": entry
        for module in modules(__name__)
        for name, entry in getattr(module, attribute, {}).items()
    }
