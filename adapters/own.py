"""Anybody's own flow: from a name such as ``my_layer.py:MyLayer`` to an nflows transform, data → noise, and a base.

The name is of a module or a file, and of something in it. That may be

- a layer's class, of which a stack is made, one layer for each mask: an nflows ``Transform``, one of any library, or a
  plain ``nn.Module`` whose ``forward`` and ``inverse`` return ``(outputs, log_det)``, as the exercise's layer does;
- a flow's class, or a function that makes a flow or a transform: if it takes ``masks`` or ``layers``, it makes all of
  the layers itself. A function that takes ``mask`` makes one layer, as a class does;
- a layer or a flow that is made already. Each flow gets a copy of it;
- a list of layers, from the noise side to the data side, or a function that gives one.

A class or a function is called with what it asks for by the names of its parameters: see ``Offer``. A flow may be of
any library, or the course's own, with ``base``, ``forward``, ``inverse``, ``log_prob`` and ``sample``.

Which way ``forward`` runs is known of a library's objects, and told by the ``log_prob`` of a flow. A layer alone is
asked whether it computes the exercise's equation 15, noise → data, or 16. If neither, nflows' convention holds for its
transforms, data → noise, and the exercise's for other modules. Inverted, an exact layer is an exact layer too.
"""

import copy
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nflows.flows
import torch
from nflows.distributions import Distribution
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from torch import Tensor, nn

from adapters.bridges.common.exports import whole_transform
from adapters.bridges.common.torch_base import TorchBase
from adapters.check.measure import move, same
from adapters.check.passes import Pass, equation_15, equation_16, watching
from adapters.check.subject import FORWARD, INVERSE, Subject, TookTooLong, Wrong, kind, known, said, time_limit
from adapters.flow import Flow, StandardNormal
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from adapters.parts import base_of

DIRECTIONS = NOISE_TO_DATA, DATA_TO_NOISE = "noise-to-data", "data-to-noise"
ALWAYS = ("features", "event_shape", "context_features", "hidden_features", "layers", "mask", "masks")
SIZES = ("features", "num_features", "dim", "D", "n_features", "input_dim", "in_features")
MASK = ("mask", "b")
SCALE = ("scale_net", "s_net", "net_s", "scale", "s")
TRANSLATION = ("translation_net", "t_net", "net_t", "translation", "t")
NETWORKS = (*SCALE, *TRANSLATION, "subnet_constructor", "transform_net_create_fn")
ROWS, SECONDS = 3, 8.0  # that a new layer is tried on, and that one call may take
MAKING = 20.0  # seconds that making it may take
MOVED = 0.02  # standard deviation of what moves its parameters, since many a layer starts at the identity
IMAGE = "begin forward and inverse with z = z.view({shape}), and return their outputs by .flatten(1)"


class Network(nn.Module):
    """A multilayer perceptron from an event, and a context if there is one, to an event; in tanh if it is to give s."""

    def __init__(self, offer: "Offer", bounded: bool):
        super().__init__()
        size = math.prod(offer.event_shape)
        self.mlp = MLP(size, size, offer.hidden_features, offer.context_features, offer.activation)
        self.bounded = bounded

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        answer = self.mlp(z.flatten(1), context).view_as(z)
        return answer.tanh() if self.bounded else answer


@dataclass(frozen=True)
class Offer:
    """What a class or a function may ask for by the names of its parameters.

    Attributes:
        event_shape: of one datum: ``(D,)``, or an image's.
        context_features: width of the context; ``None`` for none.
        hidden_features: widths of the hidden layers of its networks.
        activation: of these networks, by its name in ``networks.ACTIVATIONS``.
        layers: how many layers, if it makes all of them itself.
        masks: 1 = unchanged; the first is that of this layer. By default the chequerboard and its inverse.
    """

    event_shape: tuple[int, ...]
    context_features: int | None = None
    hidden_features: tuple[int, ...] = (16, 16)
    activation: str = "tanh"
    layers: int = 2
    masks: Sequence[Tensor] = ()

    def values(self) -> dict[str, Callable[[], Any]]:
        """For each name of a parameter, a function that makes the value."""
        size, width = math.prod(self.event_shape), self.context_features

        def masks() -> list[Tensor]:
            mask = checkerboard_mask(*self.event_shape)
            return [mask.clone() for mask in self.masks or (mask, 1 - mask)]

        def network(inputs: int, outputs: int) -> MLP:
            return MLP(inputs, outputs, self.hidden_features, width, self.activation)

        values: dict[str, Callable[[], Any]] = {
            "event_shape": lambda: self.event_shape,
            "shape": lambda: self.event_shape,
            "context_features": lambda: width,
            "context": lambda: width or 0,
            "hidden_features": lambda: self.hidden_features,
            "hidden": lambda: self.hidden_features[0],
            "layers": lambda: self.layers,
            "masks": masks,
            "activation": lambda: self.activation,
            "dims_in": lambda: [self.event_shape],
        }
        values |= dict.fromkeys(("subnet_constructor", "transform_net_create_fn"), lambda: network)
        values |= dict.fromkeys(MASK, lambda: masks()[0])
        values |= dict.fromkeys(SIZES, lambda: size)
        values |= dict.fromkeys(SCALE, lambda: Network(self, bounded=True))
        values |= dict.fromkeys(TRANSLATION, lambda: Network(self, bounded=False))
        return values

    def given(self, name: str, parameter: inspect.Parameter) -> bool:
        """Whether a parameter gets its value from here: what is required, and what always follows the data."""
        if name not in self.values():
            return False
        networks = name in NETWORKS and parameter.default is None
        context = name == "context" and self.context_features is not None
        return name in ALWAYS or networks or context or parameter.default is parameter.empty


# From a name to what it names


def load(name: str) -> Any:
    """The object that ``module:object`` or ``file.py:object`` names; the working directory is searched first.

    Raises:
        ValueError: for a name that names nothing.
        ImportError: for a module that can't be imported, with the error that it ended in.
    """
    module, _, attribute = name.rpartition(":")
    path = Path(module)
    if not attribute or not (path.suffix == ".py" or all(map(str.isidentifier, module.split(".")))):
        raise ValueError(f"{name!r} names no layer or flow; write my_layer:MyLayer, or my_layer.py:MyLayer")
    if path.suffix == ".py" and not path.is_file():
        raise ImportError(f"{name}: there is no file {module}")
    try:
        with _searched_first(str(path.resolve().parent) if path.suffix == ".py" else ""):
            found = _of_file(path.resolve()) if path.suffix == ".py" else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code does while it is read
        remedy = "run from the directory it is in" if isinstance(error, ModuleNotFoundError) else "mend it first"
        raise ImportError(f"{name}: {module} can't be imported ({said(error)}); {remedy}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {module} has no {part}{_what_it_has(found)}")
        found = getattr(found, part)
    return found


@contextmanager
def _searched_first(directory: str) -> Iterator[None]:
    """Search it for modules before all else within, and after all else from then on.

    The user's files may import each other at any time. Yet a ``zuko.py`` among them must not stand in for a library
    that this package imports later.
    """
    if directory in sys.path:
        yield
        return
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
        sys.path.append(directory)


def _what_it_has(module: Any) -> str:
    """The first few names that are defined there, for a message."""
    names = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = [name for name in names if not name.startswith("_")]
    return f"; it has {', '.join(public[:5])}{', …' if len(public) > 5 else ''}" if public else ""


_of_files: dict[Path, ModuleType] = {}


def _of_file(path: Path) -> ModuleType:
    """The file as a module by its own name, or another if that is taken: a file may be called ``copy.py``.

    As any module it is read once. Somebody may change it while a training goes on, which has to end with what it began.
    """
    if path not in _of_files:
        name = f"own_{path.stem}" if _is_taken(path) else path.stem
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        _of_files[path] = module
    return _of_files[path]


def _is_taken(path: Path) -> bool:
    """Whether a module of the file's name is imported already, or installed and may be imported later."""
    if path.stem in sys.modules:
        return True
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != path.parent]
    return importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is not None


def in_short(name: str) -> str:
    """The same name wherever the file lies: ``my_layer:MyLayer`` for ``../code/my_layer.py:MyLayer``."""
    module, colon, attribute = name.rpartition(":")
    return f"{Path(module).stem if module.endswith('.py') else module}{colon}{attribute}"


def options_of(name: str) -> list[str]:
    """What may be said to it beside what it is offered: ``direction``, and its other parameters.

    Raises:
        ValueError, ImportError: as ``load``; for what can make no flow.
        TypeError: if it does not say what it takes.
    """
    found = load(name)
    if not _is_maker(found):
        if not callable(found) and not is_list(found):
            raise ValueError(
                f"{name} is {kind(found)}; it must be a layer, a flow, or a class or function that makes one"
            )
        return ["direction"]
    offered = (*ALWAYS, "activation", "preprocess")
    return ["direction", *(parameter for parameter in _parameters(name, found)[0] if parameter not in offered)]


def check_wants(name: str, options: dict[str, Any]) -> None:
    """Raise a TypeError if it asks for something that is neither offered nor among the options."""
    found = load(name)
    if _is_maker(found):
        _arguments(name, found, Offer((2,)), options, "--options")


# From what it names to layers


def make(found: Any, offer: Offer, arguments: dict[str, Any], flag: str = "--options") -> Any:
    """The object itself: as it is if it is one already, or what a class or a function gives, called as it asks.

    Args:
        found: as ``load`` gives it.
        offer: what it may ask for.
        arguments: values of its parameters, of whatever name.
        flag: by which a command line gives arguments, for messages.

    Raises:
        TypeError: if it asks for something that is not offered, or an argument is not one of its own.
        Wrong: for whatever it raises itself.
    """
    if not _is_maker(found):
        if arguments:
            raise TypeError(f"{_name(found)} is made already, and takes no arguments")
        return found
    given = _arguments(_name(found), found, offer, arguments, flag)
    parameters = _parameters(_name(found), found)[0].values()
    in_order = [given.pop(one.name) for one in parameters if one.kind is one.POSITIONAL_ONLY and one.name in given]
    try:
        with time_limit(MAKING):
            return found(*in_order, **given)
    except TookTooLong:
        raise Wrong(f"making it has not come back within {MAKING:g} s: is there a loop that does not end?") from None
    except (Exception, SystemExit) as error:  # of the user's own code
        raise Wrong(f"making it raises {said(error)}") from error


def _arguments(name: str, found: Callable, offer: Offer, arguments: dict[str, Any], flag: str) -> dict[str, Any]:
    named, takes_any = _parameters(name, found)
    if other := [key for key in arguments if key not in named and not takes_any]:
        raise TypeError(f"{name} has no argument {other[0]}; it has {', '.join(named) or 'none'}")
    values, given = offer.values(), dict(arguments)
    for key, parameter in named.items():
        if key in arguments:
            continue
        if offer.given(key, parameter):
            given[key] = values["hidden" if _is_one_width(key, parameter) else key]()
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"{name} wants {key}: say {flag} {key} VALUE, or give it a default, or name a function that makes it "
                "from what is at hand: features, mask or masks, layers, scale_net, translation_net, hidden_features, "
                "context_features"
            )
    return given


def _is_one_width(name: str, parameter: inspect.Parameter) -> bool:
    """Whether ``hidden_features`` is one integer there, rather than the widths of all hidden layers."""
    return name == "hidden_features" and (parameter.annotation in (int, "int") or isinstance(parameter.default, int))


def _parameters(name: str, found: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Those that have names, and whether it takes others too."""
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:
        raise TypeError(f"{name} does not say what it takes; wrap it in a function of features") from None
    named = {key: one for key, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    return named, len(named) < len(parameters)


def _is_maker(found: Any) -> bool:
    """Whether it is to be called for a layer or a flow, rather than one itself."""
    if isinstance(found, type) or inspect.isfunction(found):
        return True
    return callable(found) and not hasattr(found, INVERSE) and not isinstance(found, nn.Module)


def _name(found: Any) -> str:
    return getattr(found, "__name__", type(found).__name__)


def _parts(name: str, offer: Offer, arguments: dict[str, Any]) -> list[Any]:
    """The layers, from the noise side to the data side, or whatever is the whole transform or flow alone."""
    found = load(name)
    first = make(found, offer, arguments)
    if is_list(first):
        return [known(_copy(part)) for part in first]
    if not _is_maker(found):
        return [_copy(first)]
    parameters = _parameters(name, found)[0].keys()
    one_layer = isinstance(found, type) or not parameters.isdisjoint((*MASK, *SCALE, *TRANSLATION))
    if not one_layer or not parameters.isdisjoint(("layers", "masks")) or _is_flow(first):
        return [first]
    others = (replace(offer, masks=[*offer.masks[i:], *offer.masks[:i]]) for i in range(1, offer.layers))
    return [first, *(make(found, other, arguments) for other in others)]


def is_list(thing: Any) -> bool:
    """Whether it is several layers; torch's ``Sequential`` is too, which can't itself be a layer."""
    return isinstance(thing, list | tuple | nn.ModuleList) or type(thing) is nn.Sequential


def layers_of(thing: Any) -> list[Any]:
    """The layers of a list; anything else alone."""
    return list(thing) if is_list(thing) else [thing]


def _copy(thing: Any) -> Any:
    try:
        return copy.deepcopy(thing)
    except Exception as error:
        raise Wrong(
            f"it can't be copied ({said(error)}): keep nothing in it that __init__ computes from weights"
        ) from error


def _is_flow(thing: Any) -> bool:
    return isinstance(known(thing), nflows.flows.Flow) or Subject(thing, SECONDS).is_flow


# From layers to a transform and a base


class OwnTransform(Transform):
    """A module whose ``forward`` and ``inverse`` return ``(outputs, log_det)``, and may know nothing of a context."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._pair(self.layer, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inverse: Any = self.layer.inverse
        return self._pair(inverse, inputs, context)

    @staticmethod
    def _pair(function: Callable, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, log_det = function(inputs) if context is None else function(inputs, context)
        return outputs, log_det


class OwnBase(nn.Module):
    """The course's base, a module whose call gives a torch distribution, which no context changes."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, context: Tensor | None) -> torch.distributions.Distribution:
        return self.base()


def transform_and_base(
    name: str, offer: Offer, direction: str | None = None, **arguments: Any
) -> tuple[Transform, Distribution, str | None]:
    """The whole transform, data → noise, its base, and the direction of ``forward`` where that had to be chosen.

    Args:
        name: as for ``load``.
        offer: what it may ask for; an event is a vector.
        direction: one of ``DIRECTIONS``, in which the ``forward`` of a layer runs; by default it is asked.
        arguments: of its other parameters.

    Raises:
        ValueError, TypeError, ImportError: one sentence that says what to write instead.
    """
    if direction not in (None, *DIRECTIONS):
        raise ValueError(f"unknown direction {direction!r}; known: {', '.join(DIRECTIONS)}")
    with _sentences(name):
        parts = _parts(name, offer, arguments)
        if not parts:
            raise Wrong("it is a list of no layers")
        if len(parts) > 1 and any(map(_is_flow, parts)):
            raise Wrong("a flow is among its layers, which has a base of its own: give its transform")
        first, base, chosen = known(parts[0]), StandardNormal(offer.event_shape), None
        if isinstance(first, nflows.flows.Flow):
            transforms, base = [whole_transform(first)], base_of(first)
        elif isinstance(first, Transform) and first is not parts[0]:  # of a library that has a bridge
            transforms = [known(part) for part in parts]
        else:
            tried = _tried(parts, offer)
            transforms = [part if isinstance(part, Transform) else OwnTransform(part) for part in parts]
            if tried.subject.is_flow:
                base, found = _base_of_the_courses(parts[0], offer.event_shape), tried.direction()
            else:
                found = chosen = direction or tried.direction()
            if found == NOISE_TO_DATA:
                transforms = [InverseTransform(transform) for transform in transforms]
        if direction is not None and chosen is None:
            raise Wrong("it says itself which way it runs: leave out direction")
    whole = transforms[0] if len(transforms) == 1 else CompositeTransform(transforms[::-1])
    return whole, base, chosen


def check_context(name: str, flow: Flow) -> None:
    """Raise a ValueError unless the flow's density follows the context that it is to take, if there is one."""
    if flow.context_features is None:
        return
    with _sentences(name), torch.random.fork_rng([]), torch.no_grad():
        twin = copy.deepcopy(flow).eval()
        move(twin, MOVED)
        x = torch.rand(ROWS, *flow.event_shape)
        contexts = torch.randn(2, ROWS, flow.context_features)
        try:
            one, other = (twin.log_prob(x, context) for context in contexts)
        except Exception as error:
            raise Wrong(f"it takes no context of width {flow.context_features} ({said(error)})") from error
        if torch.equal(one, other):
            raise Wrong("it takes a context, and its density is the same for any: hand the context to its networks")


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turn ``Wrong`` into a ValueError that begins with the name."""
    try:
        yield
    except Wrong as error:
        raise ValueError(f"{name}: {error}") from error


def _base_of_the_courses(flow: Any, event_shape: tuple[int, ...]) -> Distribution:
    base = getattr(flow, "base", None)
    if not isinstance(base, nn.Module) or not isinstance(base(), torch.distributions.Distribution):
        raise Wrong(
            f"its base is {kind(base)}: keep it as self.base, an nn.Module whose call, base(), gives a torch "
            "distribution over events, such as Independent(Normal(…), 1)"
        )
    if (shape := base().event_shape) != torch.Size(event_shape):
        if base().batch_shape + shape == torch.Size(event_shape):
            raise Wrong(f"its base gives a log-density for each coordinate: write Independent(…, {len(event_shape)})")
        raise Wrong(f"its base is of events {tuple(shape)}, and the data of {event_shape}: ask for features and use it")
    return TorchBase(OwnBase(base), torch.Size(event_shape))


def _tried(parts: list[Any], offer: Offer) -> "_Tried":
    """Of all parts, tried, one that tells the direction: of random masks in the plane, every fourth is all ones."""
    tried = [_Tried(part, offer) for part in parts]
    if not any(one.trained for one in tried):
        raise Wrong("it has no parameters to train: keep its networks as attributes, or in an nn.ModuleList")
    moving = [one for one in tried if not one.forward.kept.all()]
    if not moving:
        raise Wrong(
            "forward(z) is z itself, whatever its parameters are: write equation 15 in forward, 16 in inverse, and 17 "
            "for both log-determinants"
        )
    return next((one for one in moving if not one.subject.is_flow and one.equation()), moving[0])


class _Tried:
    """A copy of a layer or of the course's flow, its parameters moved a little, and what it makes of a few rows.

    Raises:
        Wrong: unless both directions can be called, and give what they must.
    """

    def __init__(self, thing: Any, offer: Offer):
        if not isinstance(thing, nn.Module):
            if not hasattr(thing, FORWARD):
                Subject(thing, SECONDS).explain_signatures(offer.context_features)
            raise Wrong(f"{kind(thing)} has no parameters to train: derive its class from nn.Module")
        self.trained = any(parameter.requires_grad for parameter in thing.parameters())
        self.subject = Subject(_copy(thing).eval(), SECONDS)
        self.subject.explain_signatures(offer.context_features)
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            move(self.subject.module, MOVED)
            x = torch.randn(ROWS, *offer.event_shape)
            self.context = None if offer.context_features is None else torch.randn(ROWS, offer.context_features)
            self.forward = self._pass(FORWARD, x)
            self.inverse = self._pass(INVERSE, x)

    def direction(self) -> str:
        """Which way ``forward`` runs: as ``log_prob`` says, as the equations say, or else as is usual."""
        if self.subject.is_flow:
            return self._direction_of_log_prob()
        return self.equation() or (DATA_TO_NOISE if isinstance(self.subject.thing, Transform) else NOISE_TO_DATA)

    def equation(self) -> str | None:
        """The direction that the exercise's equations tell, if ``forward`` computes one of them."""
        for equation, direction in ((equation_15, NOISE_TO_DATA), (equation_16, DATA_TO_NOISE)):
            if self.forward.networks(equation):
                return direction
        return None

    @torch.no_grad()
    def _direction_of_log_prob(self) -> str:
        """That in which log_prob(x) is the base's of the noise plus the log-determinant."""
        wanted = self.subject.log_prob(self.forward.x, self.context)
        for tried, direction in ((self.inverse, NOISE_TO_DATA), (self.forward, DATA_TO_NOISE)):
            base = self.subject.base_log_prob(tried.y, self.context)
            if base is not None and same(base + tried.log_det, wanted, 1e-4):
                return direction
        raise Wrong(
            "its log_prob(x) is neither base().log_prob(z) + log_det with z, log_det = inverse(x), nor the same with "
            "forward(x): write return self.base().log_prob(z) + log_det"
        )

    def _pass(self, direction: str, x: Tensor) -> Pass:
        def function(rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.subject.run(direction, rows, context)

        with watching(self.subject.module, len(x)) as seen:
            try:
                y, log_det = function(x.clone(), self.context)
            except Wrong as error:
                self._check_image(function, x)
                raise error
        if y.shape != x.shape:
            raise Wrong(
                f"{direction} returns outputs of shape {tuple(y.shape)} for {tuple(x.shape)}: outputs are as the inputs"
            )
        if log_det.shape != (ROWS,):
            raise Wrong(
                f"{direction} returns a log_det of shape {tuple(log_det.shape)}, where ({ROWS},) is wanted, one a row: "
                f"write {'log_det.squeeze(1), or .sum(1) without keepdim' if log_det.shape == (ROWS, 1) else '.sum(1)'}"
            )
        return Pass(direction, x, self.context, y, log_det, seen, function)

    def _check_image(self, function: Callable, x: Tensor) -> None:
        """Raise ``Wrong`` with its own sentence for a layer that takes square images rather than vectors."""
        side = math.isqrt(x[0].numel())
        if side < 2 or side**2 != x[0].numel():
            return
        for shape in ((1, side, side), (side, side)):
            try:
                y, _ = function(x.view(-1, *shape), self.context)
            except Wrong:
                continue
            if y.shape[1:] == shape:
                remedy = IMAGE.format(shape=", ".join(map(str, (-1, *shape))))
                raise Wrong(f"it takes images of shape {shape}, and is given vectors of {x[0].numel()}: {remedy}")
