"""Named, ready-made flows of every library and of our own layers, each asked for in the same words."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache

from nflows.transforms import CompositeTransform, Transform
from torch import Tensor

from adapters.flow import Flow, StandardNormal
from adapters.masks import checkerboard_mask
from adapters.networks import check_activation
from adapters.registry import Specification, modules


def flow_names() -> list[str]:
    """Every name that ``build_flow`` knows, hand-written layers first, each part in alphabetical order.

    >>> flow_names()[:3]
    ['masked-affine', 'masked-affine-textbook', 'masked-autoregressive']
    """
    return list(_flows())


def build_flow(
    name: str,
    features: int,
    context_features: int | None = None,
    layers: int = 8,
    hidden_features: Sequence[int] = (64, 64),
    masks: Sequence[Tensor] | None = None,
    activation: str = "relu",
    preprocess: Transform | None = None,
    **options,
) -> Flow:
    """The flow of that name: ``layers`` layers of that kind between the data and a standard normal N(0, I).

    ``torch.manual_seed`` before the call decides the initial weights.

    Args:
        name: one of ``flow_names()``.
        features: D, the width of the data, ``(batch, D)``.
        context_features: width of the context, ``(batch, context_features)``; ``None`` for an unconditional flow.
        layers: how many layers.
        hidden_features: widths of each conditioner's hidden layers.
        masks: the coupling layers' masks of D entries, 1 = unchanged, used in turn from the noise side on; by default
            the alternating mask and its inverse. Autoregressive flows have no use for them.
        activation: of the conditioners; a key of ``networks.ACTIVATIONS``.
        preprocess: a fixed transform data → input of the flow, e.g. ``Standardize.of(data)``.
        options: what this kind of flow has beyond that (``bins``, ``tail_bound``, …): see its docstring.

    Raises:
        ValueError: for a name that is not known, or numbers that are not positive.
        TypeError: for an option that this kind of flow does not have.

    >>> build_flow("masked-affine", features=2).sample(5).shape
    torch.Size([5, 2])
    """
    hidden_features = (hidden_features,) if isinstance(hidden_features, int) else tuple(hidden_features)
    for option in options:
        if option not in flow_options(name):
            known = ", ".join(flow_options(name)) or "none"
            raise TypeError(f"{name} has no option {option!r}; it has: {known}")
    _check_counts(features=features, layers=layers, context_features=context_features)
    _check_counts(**{f"hidden_features[{i}]": width for i, width in enumerate(hidden_features)})
    check_activation(activation)
    masks = _cycle(masks, features, layers)
    specification = Specification(features, layers, hidden_features, context_features, masks, activation, preprocess)
    transform = _maker(name)(specification, **options)
    if preprocess is not None:
        transform = CompositeTransform([preprocess, transform])
    flow = Flow(transform, StandardNormal([features]), (features,), context_features)
    flow.recipe = {
        "name": name,
        "features": features,
        "context_features": context_features,
        "layers": layers,
        "hidden_features": hidden_features,
        "masks": masks,
        "activation": activation,
        "preprocess": preprocess,
        **options,
    }
    return flow


def flow_options(name: str) -> list[str]:
    """The options that this kind of flow has beyond what all have.

    Raises:
        ValueError: for a name that is not known.

    >>> flow_options("masked-spline")
    ['bins', 'tail_bound', 'minimum', 'net', 'dropout']
    """
    return [option for option in inspect.signature(_maker(name)).parameters if option != "specification"]


def describe_flow(name: str) -> str:
    """Which layers of which library this is, and how it differs from the others: one paragraph.

    Raises:
        ValueError: for a name that is not known.

    >>> describe_flow("masked-affine")
    'Packed affine coupling layers: equations 15 to 17, fast.'
    """
    return " ".join(inspect.getdoc(_maker(name)).split())


def _maker(name: str) -> Callable[..., Transform]:
    if name not in _flows():
        raise ValueError(f"unknown flow {name!r}; known: {', '.join(flow_names())}")
    return _flows()[name]


@cache
def _flows() -> dict[str, Callable[..., Transform]]:
    found = {}
    for package in ("adapters.layers", "adapters.bridges"):
        found |= sorted(flow for module in modules(package) for flow in module.FLOWS.items())
    return found


def _cycle(masks: Sequence[Tensor] | None, features: int, layers: int) -> tuple[Tensor, ...]:
    if masks is None:
        mask = checkerboard_mask(features)
        masks = (mask, 1 - mask)
    for mask in masks:
        if mask.shape != (features,):
            raise ValueError(f"each mask must have shape ({features},), but one has {tuple(mask.shape)}")
    return tuple(masks[i % len(masks)] for i in range(layers))


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be a positive integer, not {count!r}")
