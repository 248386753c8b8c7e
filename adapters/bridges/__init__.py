"""Any transform or flow of any library, as nflows' and back. One file here per library; its presence registers it.

``Bridge`` says what such a file must have. What bridges share is in ``common``.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Protocol, cast

from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor

from adapters.bridges import nflows as hub
from adapters.bridges.common.exports import EventDim, check_event_dim, event_dim_of, reads_context, whole_transform
from adapters.checks import shown
from adapters.discovery import failures, file_name, modules


class Bridge(Protocol):
    """What a file of this package must have: the names by which it and its library are known, and four functions.

    A bridge imports its library only when it is asked to convert something, so that a library that is not installed
    is no trouble to anybody else.

    A library whose own type is a whole density, base and all, has a fifth function, ``flow_out(source, **options)``.
    ``to_library`` hands it the flow as it is, or the name or factory of one, and its options.

    Attributes:
        PACKAGES: the packages whose classes it knows, e.g. ``("zuko",)``. The library is installed if the first one is.
        LIBRARIES: the names that ``to_library`` takes for it.
        DISTRIBUTION: the name that installs the library, e.g. ``"pyro-ppl"``, whose version a run notes down.
        EXTRA: the extra of this package that installs it; ``None`` if it always is.
    """

    __name__: str
    PACKAGES: tuple[str, ...]
    LIBRARIES: tuple[str, ...]
    DISTRIBUTION: str
    EXTRA: str | None

    def transform_in(self, foreign: Any, /) -> Transform | None:
        """A transform of the library as an nflows one, data → noise; ``None`` for what is no transform."""
        ...

    def flow_in(self, foreign: Any, /) -> Flow | None:
        """A flow of the library, transform and base, as ``adapters.flow.Flow``; ``None`` for what is no flow."""
        ...

    def transform_out(self, transform: Transform, library: str, event_dim: EventDim, conditional: bool, /) -> Any:
        """The library's own transform type, with the transform inside.

        Args:
            transform: data → noise.
            library: which one of ``LIBRARIES``.
            event_dim: dimensions of one datum or, where they differ, the shapes of a datum and of its noise.
            conditional: whether it takes a context.
        """
        ...

    def native_log_prob(self, exported: Any, inputs: Tensor, context: Tensor | None = None, /) -> Tensor:
        """The log-density ``(batch,)`` of the library's own flow class: an exported transform on a standard normal.

        The tests hold it against nflows' (law 3), and ``runs/overhead.py`` times it.
        """
        ...


def as_transform(foreign) -> Transform:
    """A transform of any of the libraries as an nflows ``Transform``, data → noise; nflows' own are handed back.

    The result computes what the library's transform computes, with the same parameters, which are not copied: training
    one trains the other.

    Raises:
        TypeError: if ``foreign`` is of no known library, or no transform.
        nflows.transforms.InverseNotAvailable, ValueError: from the bridge, for a transform that no flow can use.

    >>> import torch
    >>> exp = as_transform(torch.distributions.transforms.ExpTransform())  # noise → data
    >>> noise, log_det = exp(torch.ones(1, 2))  # data → noise, the logarithm
    >>> noise
    tensor([[0., 0.]])
    """
    if isinstance(foreign, Flow):
        its = "flow.transform" if hasattr(foreign, "transform") else "adapters.parts.transform_of(flow)"  # nflows' own
        raise TypeError(f"{_name(foreign)} is no transform but a whole flow, as as_flow takes; its transform is {its}")
    bridge = hub if isinstance(foreign, Transform) else _bridge_of(foreign)
    transform = bridge.transform_in(foreign)
    if transform is None:
        raise TypeError(f"{_name(foreign)} is no transform; as_flow takes whole flows")
    return transform


def as_flow(foreign) -> Flow:
    """A flow of any of the libraries, transform and base, as an nflows ``Flow``; nflows' own are handed back.

    Of every other library this is an ``adapters.flow.Flow``, which also has ``encode``, ``decode``, ``transform`` and
    ``base``. nflows' own class has ``transform_to_noise`` for ``encode``, and none of the others: for all of them, make
    it an ``adapters.flow.Flow`` of the same transform and base.

    Raises:
        TypeError: if ``foreign`` is of no known library, or no flow.
        ValueError: from the bridge, for a flow that cannot be right.

    >>> import torch
    >>> from torch.distributions import Independent, LogNormal
    >>> theirs = Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1)
    >>> flow, x = as_flow(theirs), torch.rand(5, 2)
    >>> torch.allclose(flow.log_prob(x), theirs.log_prob(x), atol=1e-5)
    True
    """
    bridge = hub if isinstance(foreign, Flow | Transform) else _bridge_of(foreign)
    flow = bridge.flow_in(foreign)
    if flow is None:
        raise TypeError(f"{_name(foreign)} is no flow; as_transform takes transforms, which a Flow joins to a base")
    return flow


def to_library(
    library: str,
    flow_or_transform: Transform | Flow | str | Callable[..., Any],
    *,
    event_dim: EventDim | None = None,
    conditional: bool = False,
    **options: Any,
):
    """An nflows ``Transform`` (data → noise) as that library's own transform type, for its own flow class.

    Of a whole ``Flow`` only the transform is exported, since the library's own flow class brings a base of its own.
    Wherever the library's type is a module, the result holds the transform as a submodule: training it there trains it
    here.

    Only sbi takes a flow with its base. ``to_library("sbi", flow)`` is what ``NPE(prior, density_estimator=…)`` wants.
    Instead of a flow, it may be given a name of ``build_flow``, or a factory: see ``adapters.bridges.sbi.flow_out``.

    Args:
        library: one of ``libraries()``.
        flow_or_transform: what to export.
        event_dim: how many dimensions one datum has: 1 for vectors, which is the default, or 3 for images. For a
            transform that changes the shape, the shapes of a datum and of its noise. A flow knows this itself.
        conditional: whether the transform takes a context. Pyro has a type for either case, and the other libraries
            ignore this argument. A flow knows this itself.
        options: of that library, such as sbi's ``embedding_net``. Most libraries have none.

    Raises:
        ValueError: for a library that is not known; for a wrong ``event_dim``.
        ImportError: for one that is not installed, naming the extra that installs it.
        TypeError: if ``flow_or_transform`` is nothing that this library can be given; for an option that it has not.

    >>> import torch
    >>> from adapters import build_flow
    >>> flow, x = build_flow("masked-affine", 2), torch.rand(5, 2)
    >>> normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> theirs = torch.distributions.TransformedDistribution(normal, [to_library("torch", flow)])
    >>> torch.allclose(theirs.log_prob(x), flow.log_prob(x), atol=1e-5)
    True
    """
    bridge = next((bridge for bridge in bridges() if library in bridge.LIBRARIES), None)
    if bridge is None:
        raise ValueError(f"unknown library {shown(library)}; known: {', '.join(libraries())}")
    flow_out = getattr(bridge, "flow_out", None)
    made_later = flow_out is not None and (isinstance(flow_or_transform, str) or _is_factory(flow_or_transform))
    if flow_out is not None and not made_later and _is_maker(flow_or_transform):
        raise TypeError(
            "a factory is called with features=… and context_features=…, but this one takes no features: give "
            "lambda features, context_features: …, or, of a flow that is built already, the flow itself"
        )
    if not (made_later or isinstance(flow_or_transform, Transform | Flow)):
        raise TypeError(
            f"to_library exports an nflows Transform, not {_name(flow_or_transform)}; as_transform makes one of "
            "another library's transform, and as_flow makes an nflows Flow, whose transform to_library exports, of "
            "another library's flow"
        )
    check_installed(bridge)
    if flow_out is not None:
        check_event_dim(1 if event_dim is None else event_dim)
        return flow_out(flow_or_transform, **options)
    if options:
        raise TypeError(f"to_library({library!r}, …) takes no {', '.join(options)}")
    if shape := getattr(flow_or_transform, "context_shape", None):
        raise TypeError(
            f"a context of this flow has the shape {tuple(shape)}, and {library}'s are vectors; "
            "FlowDistribution(flow, context) takes it"
        )
    if isinstance(flow_or_transform, Flow):
        event_dim = event_dim_of(flow_or_transform) if event_dim is None else event_dim
        conditional = conditional or reads_context(flow_or_transform)
        flow_or_transform = whole_transform(flow_or_transform)
    event_dim = 1 if event_dim is None else event_dim
    check_event_dim(event_dim)
    return bridge.transform_out(cast(Transform, flow_or_transform), library, event_dim, conditional)


def bridges() -> list[Bridge]:
    """All bridges: the files of this package.

    Raises:
        TypeError: for a file that lacks one of the names that ``Bridge`` lists.
    """
    return [_checked(module) for module in modules(__name__)]


def libraries() -> list[str]:
    """Every name that ``to_library`` takes."""
    return [library for bridge in bridges() for library in bridge.LIBRARIES]


def installed(bridge: Bridge) -> bool:
    """Whether the bridge's library can be imported."""
    return importlib.util.find_spec(bridge.PACKAGES[0]) is not None


def check_installed(bridge: Bridge) -> None:
    """Raise an ImportError that names the extra unless ``installed``."""
    if not installed(bridge):
        raise ImportError(f"{file_name(bridge)} is not installed: pip install 'flow-adapters[{bridge.EXTRA}]'")


def _checked(module: ModuleType) -> Bridge:
    wanted = [*inspect.get_annotations(Bridge), *(name for name in vars(Bridge) if not name.startswith("_"))]
    if missing := [name for name in wanted if not hasattr(module, name)]:
        raise TypeError(f"{module.__file__} is no bridge without {', '.join(missing)}: see adapters.bridges.Bridge")
    return cast(Bridge, module)


def _bridge_of(foreign) -> Bridge:
    """The bridge that knows the most derived class of ``foreign`` that any bridge knows."""
    known_bridges = bridges()
    for kind in type(foreign).__mro__:
        for bridge in known_bridges:
            if any(f"{kind.__module__}.".startswith(f"{package}.") for package in bridge.PACKAGES):
                return bridge
    known = ", ".join(package for bridge in known_bridges for package in bridge.PACKAGES)
    missing = ", ".join(
        f"{file_name(bridge)} (pip install 'flow-adapters[{bridge.EXTRA}]')"
        for bridge in known_bridges
        if not installed(bridge)
    )
    also = (f"; not installed: {missing}" if missing else "") + "".join(f"; {why}" for why in failures(__name__))
    raise TypeError(f"{_name(foreign)} is of no known library; known: {known}{also}")


def _is_factory(thing: Any) -> bool:
    """Whether it is a function, or a class, that is called with the ``features`` of a flow."""
    try:
        return callable(thing) and "features" in inspect.signature(thing).parameters
    except ValueError:  # of a function that does not say what it takes
        return False


def _is_maker(thing: Any) -> bool:
    """Whether it is a function or a class, of whatever arguments."""
    return inspect.isroutine(thing) or isinstance(thing, type | partial)


def _name(foreign) -> str:
    return f"{type(foreign).__module__}.{type(foreign).__qualname__}"
