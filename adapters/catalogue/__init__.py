"""Named, ready-made flows of every library and of our own layers, all built by the same arguments, and anybody's own.

Each file in this folder has the flows of one library, or those of our own layers. The files are found by their
presence; ``specification`` says what one holds. A name with a colon, ``my_layer.py:MyLayer``, is of somebody's own
layer or flow: ``adapters.own`` says what that may be.

The arguments of ``build_flow`` are checked here, once, before anything is built: the kinds and ranges of all numbers,
and the masks.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral, Real
from types import ModuleType, NoneType
from typing import Any, TypeGuard, get_args

import torch
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor

from adapters import own
from adapters.bridges import Bridge, as_transform, bridges, check_installed, installed
from adapters.catalogue.specification import NativeFlow, Specification
from adapters.checks import shown
from adapters.discovery import failures, file_name, modules
from adapters.flow import Flow, StandardNormal
from adapters.masks import as_mask, check_mask, checkerboard_mask
from adapters.networks import check_activation

KINDS = {  # of each annotation of an option: the type that its value must have, and words for it
    float: (Real, "a number"),
    int: (Integral, "an integer"),
    str: (str, "a string"),
    bool: (bool, "True or False"),
}
LIMITS = {  # of each option: the range of its values, in words and as a test; any other number need only be finite
    "bins": ("at least 2", lambda value: value >= 2),
    "dropout": ("in [0, 1)", lambda value: 0 <= value < 1),
    "minimum": ("in (0, 1)", lambda value: 0 < value < 1),
} | dict.fromkeys(
    ("bound", "clamp", "degree", "eps", "scale_bound", "signal", "tail_bound"), ("positive", lambda value: value > 0)
)


def flow_names() -> list[str]:
    """Every name that ``build_flow`` knows: our own flows first, then the libraries', each in alphabetical order.

    The flows of a library that is not installed are left out. ``build_flow`` names the extra that installs it.

    >>> flow_names()[:3]
    ['masked-affine', 'masked-affine-textbook', 'masked-autoregressive']
    """
    return [name for name, (_, bridge) in _flows().items() if bridge is None or installed(bridge)]


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

    The initial weights are random; ``torch.manual_seed`` before the call makes them reproducible. They are drawn on the
    CPU, so that they are the same for any device, and then moved to torch's default device.

    Args:
        name: one of ``flow_names()``, or of your own layer or flow, ``my_module:MyLayer`` or ``my_file.py:MyLayer``,
            whose code is then imported. A stack is made of a layer: see ``adapters.own``.
        features: D, the width of the data, ``(batch, D)``.
        context_features: width of the context, ``(batch, context_features)``; ``None`` for an unconditional flow.
        layers: how many layers.
        hidden_features: widths of each conditioner's hidden layers.
        masks: the coupling layers' masks, of D entries each; 1 = unchanged. The layers take them in turn, from the
            noise side on. By default the alternating mask and its inverse. Autoregressive flows ignore them.
        activation: of the conditioners; a key of ``networks.ACTIVATIONS``.
        preprocess: a fixed transform between the data and the layers, e.g. ``Standardize.of(data)``. It stays on its
            device.
        options: arguments that only this kind of flow has (``bins``, ``tail_bound``, …): see ``flow_options``. A layer
            of your own has ``direction``, in which its ``forward`` runs: ``"noise-to-data"``, as the exercise's does,
            or ``"data-to-noise"``, as nflows' do.

    Raises:
        ValueError: for a name that is not known, a number out of its range, or masks that no layer can use; for a
            layer of your own that can't be called as a layer, saying what to write.
        TypeError: for an option that this kind of flow does not have, or an argument of the wrong kind.
        ImportError: for a library that is not installed, naming the extra that installs it; for a module of your own
            that can't be imported.

    >>> build_flow("masked-affine", features=2).sample(5).shape
    torch.Size([5, 2])
    """
    check_options(name, options)
    if not is_own(name):
        parameters = inspect.signature(_maker(name), eval_str=True).parameters
        options = {option: _option(parameters[option], value) for option, value in options.items()}
    features, layers = _count("features", features), _count("layers", layers)
    context_features = None if context_features is None else _count("context_features", context_features)
    hidden_features = _widths(hidden_features)
    check_activation(activation)
    _check_preprocess(preprocess, features)
    default = torch.empty(0).device
    with torch.device("cpu"):  # masks and permutations need values, which they would not have on the meta device
        masks = _cycle(masks, features, layers)
        specification = Specification(
            features, layers, hidden_features, context_features, masks, activation, preprocess
        )
        transform, base, chosen = _parts(name, specification, options)
    transform, base = transform.to(default), base.to(default)
    if preprocess is not None:
        transform = CompositeTransform([preprocess, transform])
    flow = Flow(transform, base, (features,), context_features)
    flow.blueprint = {
        "name": name,
        "features": features,
        "context_features": context_features,
        "layers": layers,
        "hidden_features": hidden_features,
        "masks": masks,
        "activation": activation,
        "preprocess": preprocess,
        **options,
        **chosen,
    }
    return flow


def is_own(name: Any) -> TypeGuard[str]:
    """Whether that is the name of somebody's own layer or flow, and none of the catalogue's.

    >>> is_own("my_layer.py:MyLayer"), is_own("masked-affine")
    (True, False)
    """
    return isinstance(name, str) and ":" in name


def flow_options(name: str) -> list[str]:
    """The names of the options that this kind of flow has, beyond the arguments that all flows have.

    Raises:
        ValueError: for a name that is not known.

    >>> flow_options("masked-spline")
    ['bins', 'tail_bound', 'minimum', 'net', 'dropout']
    """
    if is_own(name):
        return own.options_of(name)
    return [option for option in inspect.signature(_maker(name)).parameters if option != "specification"]


def defaults(name: str) -> dict[str, Any]:
    """The options of ``flow_options``, each with the value that it has unless another one is given.

    Raises:
        ValueError: for a name that is not known.

    >>> defaults("masked-affine")["dropout"]
    0.0
    """
    parameters = inspect.signature(_maker(name)).parameters
    return {option: parameters[option].default for option in flow_options(name)}


def library_of(name: str) -> str | None:
    """The library of that flow, by the name of its files here; ``None`` for a flow of our own layers.

    Raises:
        ValueError: for a name that is not known.

    >>> library_of("nflows-rqs"), library_of("masked-affine")
    ('nflows', None)
    """
    _maker(name)
    _, bridge = _flows()[name]
    return None if bridge is None else file_name(bridge)


def describe_flow(name: str) -> str:
    """One paragraph on a flow: which layers of which library it is made of, and what is particular about them.

    Raises:
        ValueError: for a name that is not known.

    >>> describe_flow("masked-affine")
    'Packed affine coupling layers: equations 15 to 17, fast.'
    """
    if is_own(name):
        return f"`{name}`, built by its own code."
    return " ".join((inspect.getdoc(_maker(name)) or "").split())


def check_options(name: str, options: dict) -> None:
    """Raise an error unless ``build_flow`` can build this flow, and the flow has these options.

    Raises:
        ValueError: for a name that is not known.
        ImportError: for a library that is not installed.
        TypeError: for an option that this kind of flow does not have, or an argument of ``build_flow`` among them.

    >>> check_options("masked-affine", {"layers": 5})
    Traceback (most recent call last):
    TypeError: layers is no option, but an argument of its own; masked-affine has the options: scale_bound, net, dropout
    """
    known = flow_options(name)
    listed = ", ".join(known) or "none"
    for option in options:
        if option in inspect.signature(build_flow).parameters:
            raise TypeError(f"{option} is no option, but an argument of its own; {name} has the options: {listed}")
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; it has: {listed}")
    if is_own(name):
        own.check_wants(name, {option: value for option, value in options.items() if option != "direction"})


def native_flows() -> dict[str, dict[str, Callable[..., NativeFlow]]]:
    """Affine coupling flows of each installed library, as its authors would build them, without a bridge.

    A benchmark times them beside ours.

    Returns:
        for each library, by the name of its file here: functions that make a flow, by name. The first is the usual one.
    """
    found = {}
    for module in modules(__name__):
        bridge = _bridge(module)
        if hasattr(module, "NATIVE_FLOWS") and (bridge is None or installed(bridge)):
            found[file_name(module)] = module.NATIVE_FLOWS
    return found


def _parts(name: str, specification: Specification, options: dict[str, Any]) -> tuple[Transform, Any, dict[str, Any]]:
    """The transform, data → noise, the base, and options that were chosen here and that a checkpoint is to keep."""
    if not is_own(name):
        base = StandardNormal([specification.features])
        return as_transform(_maker(name)(specification, **options)), base, {}
    offer = own.Offer(
        (specification.features,),
        specification.context_features,
        specification.hidden_features,
        specification.activation,
        specification.layers,
        specification.masks,
    )
    transform, base, direction = own.transform_and_base(name, offer, **options)
    own.check_context(name, Flow(transform, base, offer.event_shape, offer.context_features))
    return transform, base, {} if direction is None else {"direction": direction}


def _maker(name: str) -> Callable[..., Any]:
    if not isinstance(name, str) or name not in _flows():
        known = ", ".join(flow_names())
        also = "".join(f"; {why}" for why in failures(__name__))
        raise ValueError(f"unknown flow {shown(name)}; known: {known}, and your own as my_module:my_flow{also}")
    make, bridge = _flows()[name]
    if bridge is not None:
        check_installed(bridge)
    return make


@cache
def _flows() -> dict[str, tuple[Callable[..., Any], Bridge | None]]:
    """For each name, the function that makes the flow, and the bridge of its library: ``None`` for our own layers.

    Raises:
        ValueError: if two files give their flows the same name.
    """
    found, files = {}, {}
    for module in modules(__name__):
        for name, make in getattr(module, "FLOWS", {}).items():
            if name in found:
                raise ValueError(f"two flows are named {name!r}: in {files[name]} and {module.__name__}")
            found[name], files[name] = (make, _bridge(module)), module.__name__
    return dict(sorted(found.items(), key=lambda flow: (flow[1][1] is not None, flow[0])))


def _bridge(module: ModuleType) -> Bridge | None:
    """The bridge of the library that a catalogue file is for; ``None`` for a file of our own layers."""
    return next((bridge for bridge in bridges() if file_name(bridge) == file_name(module)), None)


def _cycle(masks: Sequence[Tensor] | None, features: int, layers: int) -> tuple[Tensor, ...]:
    """One mask for each layer, each of floats on the CPU."""
    if masks is None:
        mask = checkerboard_mask(features)
        masks = (mask, 1 - mask)
    elif isinstance(masks, str) or not hasattr(masks, "__iter__"):
        raise TypeError(f"masks must be a list of masks, not {shown(masks)}")
    else:
        masks = tuple(_mask(mask, features) for mask in masks)
    if not masks:
        raise ValueError("masks is empty: give at least one mask, or None for the alternating mask and its inverse")
    return tuple(masks[i % len(masks)] for i in range(layers))


def _mask(mask: Tensor, features: int) -> Tensor:
    mask = as_mask(mask)
    if mask.shape != (features,):
        raise ValueError(f"each mask must have shape ({features},), but one has {tuple(mask.shape)}")
    if mask.is_meta:
        raise ValueError("a mask on the meta device has no values: make the masks on the CPU")
    if features > 1:  # with one coordinate there is nothing to couple, and only flows that use no mask can be built
        check_mask(mask)
    return mask.float().cpu()


def _check_preprocess(preprocess: Transform | None, features: int) -> None:
    if preprocess is None:
        return
    if not isinstance(preprocess, Transform):
        raise TypeError(
            "preprocess must be an nflows Transform, such as adapters.preprocess.Standardize.of(data), "
            f"not {preprocess.__name__ if isinstance(preprocess, type) else type(preprocess).__name__}"
        )
    for value in getattr(preprocess, "arguments", {}).values():
        if isinstance(value, Tensor) and value.numel() > 1 and len(value) != features:
            raise ValueError(f"preprocess is of data with {len(value)} coordinates, but features is {features}")


def _option(parameter: inspect.Parameter, value):
    """The value of this option, checked against its annotation and ``LIMITS``, as plain Python for a checkpoint."""
    name, kinds = parameter.name, get_args(parameter.annotation) or (parameter.annotation,)
    kind = next((kind for kind in KINDS if kind in kinds), None)
    if kind is None or (value is None and NoneType in kinds):
        return value
    wanted, words = KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {words}, not {shown(value)}")
    value = kind(value)
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    limits, within = LIMITS.get(name, ("", lambda _: True))
    if not within(value):
        raise ValueError(f"{name} must be {limits}, not {value!r}")
    return value


def _widths(hidden_features: Sequence[int]) -> tuple[int, ...]:
    widths = (hidden_features,) if isinstance(hidden_features, Integral) else hidden_features
    if isinstance(widths, str) or not hasattr(widths, "__iter__"):
        raise TypeError(f"hidden_features must be a list of widths, such as (64, 64), not {hidden_features!r}")
    return tuple(_count(f"hidden_features[{i}]", width) for i, width in enumerate(widths))


def _count(name: str, count: Any) -> int:
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name} must be a positive integer, not {shown(count)}")
    return int(count)
