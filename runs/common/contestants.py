"""Who takes part in a comparison: flows of the catalogue, and anybody's own, each built to the same specification.

A name with a colon, ``my_module:my_flow``, is a dotted path to

- a function that gives a flow or a transform of any library. It is called with those of ``features=``, ``layers=``,
  ``hidden_features=`` and ``masks=`` that it takes, and with ``context_features=`` if the task has a context. A
  library's own class is such a function: ``zuko.flows:NAF``;
- or a subclass of nflows' ``Transform``, whose ``forward`` runs data → noise. A stack of its layers is made, one for
  each mask; each is called with those of ``features=``, ``hidden_features=`` and ``mask=`` that it takes.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from adapters import as_flow, as_transform, build_flow, flow_names
from adapters.catalogue import describe_flow, flow_options
from adapters.flow import Flow, StandardNormal
from adapters.parts import base_of, transform_of
from runs.common.results import parameter_count

REFERENCE = "masked-affine"  # whose parameters the others match, and whose times the ratios are to
OURS = (REFERENCE, "masked-affine-textbook")  # the hand-written affine coupling layers
WIDEST = 2**17
TOLERANCE = 0.02  # of matched numbers of parameters


def check_contestants(names: Sequence[str]) -> None:
    """Raise a ValueError, TypeError or ImportError unless every name can be found and called as ``build`` calls it."""
    for name in names:
        if ":" in name:
            make = load(name)
            _arguments(
                name,
                make,
                ("features", "hidden_features", "mask" if _is_layer(make) else "masks", "layers", "context_features"),
            )
        elif name not in flow_names():
            raise ValueError(
                f"unknown flow {name!r}; known: {', '.join(flow_names())}, and your own as my_module:my_flow"
            )


def load(name: str) -> Callable:
    """The object that ``module:object`` names; the working directory is searched first."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ValueError(f"{name!r} names no flow; write my_module:my_flow")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code does while it is read
        remedy = "run from the directory it is in" if isinstance(error, ImportError) else "mend it first"
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"{name}: {module} can't be imported ({message}); {remedy}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {module} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}; a flow is made by a function or a class")
    return found


def build(
    name: str,
    features: int,
    layers: int,
    hidden_features: Sequence[int],
    masks: Sequence[Tensor],
    preprocess: Transform | None = None,
    options: dict[str, Any] | None = None,
    context_features: int | None = None,
) -> Flow:
    """The flow of that name.

    Args:
        name: of the catalogue, or the path of somebody's own.
        features, layers, hidden_features, masks, preprocess, context_features: as for ``build_flow``; an own flow gets
            those it takes.
        options: further options, of which each flow of the catalogue gets those that it has.

    Raises:
        TypeError, ValueError: if what the user's own factory takes or gives is not what it should be.
    """
    if ":" not in name:
        known = {key: value for key, value in (options or {}).items() if key in flow_options(name)}
        size = {"layers": layers, "hidden_features": hidden_features, "masks": masks, "preprocess": preprocess}
        return build_flow(name, features, context_features, **size, **known)
    make = load(name)
    masks = [masks[i % len(masks)] for i in range(layers)]
    size: dict[str, Any] = {"features": features, "hidden_features": tuple(hidden_features)}
    if context_features is not None:
        size["context_features"] = context_features
        if _is_layer(make) or "context_features" not in _arguments(name, make, (*size, "layers", "masks")):
            raise TypeError(f"this task conditions on {context_features} numbers: {name} must take context_features=")
    if _is_layer(make):
        made = CompositeTransform([_call(name, make, size | {"mask": mask}) for mask in reversed(masks)])
    else:
        made = _call(name, make, size | {"layers": layers, "masks": masks})
    try:
        flow = as_flow(made)
        transform, base = transform_of(flow), base_of(flow)
    except TypeError:
        transform, base = as_transform(made), StandardNormal([features])
    if preprocess is not None:
        transform = CompositeTransform([preprocess, transform])
    return Flow(transform, base, (features,), context_features)


def _is_layer(make: Callable) -> bool:
    return inspect.isclass(make) and issubclass(make, Transform)


def _call(name: str, make: Callable, offered: dict[str, Any]) -> Any:
    return make(**{key: offered[key] for key in _arguments(name, make, offered)})


def _arguments(name: str, make: Callable, offered: Iterable[str]) -> list[str]:
    """Those of the arguments that are offered which ``make`` takes; a TypeError if it needs others."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:
        raise TypeError(f"{name} does not say what it takes; wrap it in a function of features") from None
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {key: parameter.default for key, parameter in parameters.items() if parameter.kind not in unnamed}
    if unmet := [key for key, default in named.items() if default is inspect.Parameter.empty and key not in offered]:
        raise TypeError(f"{name} wants {', '.join(unmet)}; it may only want {', '.join(offered)}")
    return [key for key in offered if key in named]


def match_parameters(
    make: Callable[[tuple[int, ...]], nn.Module], target: int, hidden_features: Sequence[int]
) -> tuple[int, ...]:
    """Hidden widths at which ``make(widths)`` has about ``target`` parameters: all equal, or one of them different.

    The number of parameters grows with the widths, so a common width is found by bisection. If the flow takes unequal
    widths, the first or the last one is then changed to come closer. If the widths of a flow do not change its number
    of parameters, they are returned as they are.
    """
    depth = len(hidden_features)

    def error(widths: tuple[int, ...]) -> float:
        try:
            return parameter_count(make(widths)) / target - 1
        except ValueError:
            if len(set(widths)) == 1:  # narrower than this flow takes
                return -1.0
            raise

    def bisect(place: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The widths on either side of the target, of those that ``place`` makes of one number."""
        low, high = 1, 2
        while error(place(high)) < 0 and high < WIDEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if error(place(middle)) >= 0 else (middle, high)
        return [place(low), place(high)]

    if error((1,) * depth) == error((1000,) * depth):
        return tuple(hidden_features)
    found = bisect(lambda width: (width,) * depth)
    below = found[0]
    if depth > 1 and min(abs(error(widths)) for widths in found) > TOLERANCE / 4:
        with suppress(ValueError):  # a network of one width
            found += bisect(lambda width: (width, *below[1:]))
            found += bisect(lambda width: (*below[:-1], width))
    return min(found, key=lambda widths: abs(error(widths)))


def footnote(name: str, flow: Flow, hidden_features: Sequence[int], target: int | None) -> str:
    """What could not be made equal for this flow: what the catalogue says of it, and what matching left over."""
    text = describe_flow(name) if ":" not in name else f"`{name}`, built by its own code; its base is its own."
    if target is not None and abs(parameter_count(flow) / target - 1) > TOLERANCE:
        text += f" Its widths can't be chosen to match: {100 * (parameter_count(flow) / target - 1):+.0f} % parameters."
    elif target is not None and name != REFERENCE:
        text += f" Hidden widths {', '.join(map(str, hidden_features))} match the parameters."
    return text
