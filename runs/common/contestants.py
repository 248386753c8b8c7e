"""Who takes part in a comparison: flows of the catalogue, and anybody's own, each built to the same specification."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nflows.transforms import Transform
from torch import Tensor, nn

from adapters import build_flow, check
from adapters.catalogue import check_options, describe_flow, flow_options, is_own
from adapters.check.subject import Subject, Wrong, known
from adapters.flow import Flow
from adapters.own import SECONDS, Offer, layers_of, load, make
from runs.common.results import parameter_count

REFERENCE = "masked-affine"  # whose parameters the others match, and whose times the ratios are to
OURS = (REFERENCE, "masked-affine-textbook")  # the hand-written affine coupling layers
WIDEST = 2**17
TOLERANCE = 0.02  # of matched numbers of parameters


def check_contestants(names: Sequence[str], direction: str | None) -> None:
    """Raise a ValueError, TypeError or ImportError unless every name can be found and called as ``build`` calls it."""
    for name in names:
        check_options(name, {})
    if direction is not None and not any(map(is_own, names)):
        raise ValueError("direction is of your own layers, and none is among the flows: leave it out")


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
        name, features, layers, hidden_features, masks, preprocess, context_features: as for ``build_flow``.
        options: further options, of which each flow gets those that it has.
    """
    known = {key: value for key, value in (options or {}).items() if key in flow_options(name)}
    size = {"layers": layers, "hidden_features": hidden_features, "masks": masks, "preprocess": preprocess}
    return build_flow(name, features, context_features, **size, **known)


def named_mistakes(name: str, features: int, error: BaseException) -> list[str]:
    """What the check says is wrong with somebody's own layer that ``build`` has refused with that error, if it is that.

    A log-determinant of another shape, for example: ``build`` says what to write instead, the check what it is called.
    """
    if not (is_own(name) and isinstance(error.__cause__, Wrong)):
        return []
    with suppress(Exception):
        layers = layers_of(make(load(name), Offer((features,)), {}))
        return [reason for layer in layers for reason in check(layer, (features,)).reasons]
    return []


def mistakes_in_sampling(name: str, features: int, context_features: int | None = None) -> list[str]:
    """What the check says of the ``sample`` of somebody's own flow, which is trained and scored without it."""
    if not is_own(name):
        return []
    with suppress(Exception):
        thing = make(load(name), Offer((features,), context_features), {})
        own = Subject(known(thing), SECONDS)
        if own.is_flow and own.thing is thing:
            report = check(thing, (features,), context_features)
            return report.reasons if "samples" in report.broken else []
    return []


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
    text = describe_flow(name)
    if direction := flow.blueprint.get("direction") if is_own(name) else None:
        text += f" Its forward is taken as {direction}."
    if target is not None and abs(parameter_count(flow) / target - 1) > TOLERANCE:
        text += f" Its widths can't be chosen to match: {100 * (parameter_count(flow) / target - 1):+.0f} % parameters."
    elif target is not None and name != REFERENCE:
        text += f" Hidden widths {', '.join(map(str, hidden_features))} match the parameters."
    return text
