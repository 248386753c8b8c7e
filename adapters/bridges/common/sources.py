"""A flow for data of a given shape, of whatever a user gives: a flow, a transform, a factory, or a catalogue's name."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import Transform
from torch import nn

from adapters.flow import StandardNormal

Source = NflowsFlow | Transform | Callable[..., Any]


def source_of(given: Source | str, options: dict[str, Any]) -> Source:
    """What ``made`` can make flows of, after the first check: a name is now a factory, and a factory has its options.

    Raises:
        TypeError, ValueError: for a name that is not known; for options that do not fit it; for options of a flow or a
            transform, which is built already; for a factory that wants what it is not called with.
    """
    if isinstance(given, str):
        from adapters.catalogue import build_flow

        source = partial(build_flow, given, **options)
        if "masks" not in options:  # which would say how many features
            with torch.random.fork_rng(devices=[]):
                _called(source, features=2, context_features=1)  # what is wrong with the options is said now
        return source
    if options and isinstance(given, NflowsFlow | Transform):
        raise TypeError(f"a flow that is built already takes no {', '.join(options)}; give its name or a factory")
    source = partial(given, **options) if options else given
    if not isinstance(source, nn.Module):
        _check_factory(source)
    return source


def made(source: Source, shape: torch.Size, context_features: int | None) -> NflowsFlow:
    """A flow of its own for data of that shape: of a flow or a transform a copy, of a factory what it makes.

    A transform of any library gets a standard normal base.

    Raises:
        TypeError: for a factory that makes neither a flow nor a transform of a known library.
    """
    from adapters.bridges import as_flow, as_transform

    if isinstance(source, nn.Module):
        found = copy.deepcopy(source)
    else:
        found = _called(source, features=shape.numel(), context_features=context_features)
    try:
        return as_flow(found)
    except TypeError:
        return NflowsFlow(as_transform(found), StandardNormal(shape))


def _check_factory(make: Callable[..., Any]) -> None:
    """Raise a TypeError for a factory that can't be called with the names that ``_called`` knows and no others."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError as error:
        raise TypeError(f"a factory that takes no such options: {error}") from error
    wanted = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    known = ("features", "context_features", "context")
    if other := [name for name, one in wanted.items() if name not in known or one.kind is one.POSITIONAL_ONLY]:
        raise TypeError(
            f"a factory is called with features=… and context_features=…, but this one wants {', '.join(other)}: give "
            "a function of these two by name, such as lambda features, context_features: …"
        )


def _called(make: Callable[..., Any], features: int, context_features: int | None) -> Any:
    """What the factory makes, called with those of the two that it takes and that were not given already.

    zuko's flows call the width of the context ``context``, which is 0 for none.
    """
    parameters = inspect.signature(make).parameters
    offered: dict[str, int | None] = {"features": features, "context_features": context_features}
    if "context" in parameters and "context_features" not in parameters:
        offered = {"features": features, "context": context_features or 0}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    given = make.keywords if isinstance(make, partial) else {}
    return make(**{name: offered[name] for name in offered if name not in given and (takes_all or name in parameters)})
