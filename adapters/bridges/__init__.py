"""Any transform or flow of any library, as nflows' and back. One file here per library; its presence registers it.

A bridge is a module with

- ``PACKAGES``: the packages whose classes it knows, e.g. ``("zuko",)``; it imports none of them when it is imported;
- ``LIBRARIES``: the names that ``to_library`` takes for it; ``EXTRA``: the extra of this package that installs them;
- ``transform_in(thing)`` → nflows ``Transform`` data → noise, or ``None`` for a thing that is no transform;
- ``flow_in(thing)`` → ``adapters.flow.Flow``, or ``None`` for a thing that is no flow;
- ``transform_out(transform, library, event_dim, conditional)`` → the library's own transform type, where ``event_dim``
  is the number of a datum's dimensions or, where they differ, the shapes of a datum and of its noise;
- ``native_log_prob(exported, inputs, context)`` → log-density of the library's own flow class around an exported
  transform and a standard normal: what the tests hold against nflows' (law 3);
- ``EXAMPLES``, ``MODELS`` and ``FLOWS``: see ``adapters.registry``.
"""

from types import ModuleType

from nflows.flows import Flow
from nflows.transforms import Transform

from adapters.bridges import nflows as hub
from adapters.checks import shown
from adapters.exports import EventDim, check_event_dim, event_dim_of, reads_context, whole_transform
from adapters.registry import check_installed, installed, modules


def as_transform(thing) -> Transform:
    """A transform of any of the libraries as an nflows ``Transform``, data → noise; nflows' own are handed back.

    The result computes what ``thing`` computes, with its parameters (not copies): training one trains the other.

    Raises:
        TypeError: if ``thing`` is of no known library, or no transform.
        nflows.transforms.InverseNotAvailable, ValueError: from the bridge, for a transform that no flow can use.
    """
    if isinstance(thing, Flow):
        raise TypeError(
            f"{_name(thing)} is no transform but a whole flow, as as_flow takes; its transform is flow._transform"
        )
    bridge = hub if isinstance(thing, Transform) else _bridge_of(thing)
    transform = bridge.transform_in(thing)
    if transform is None:
        raise TypeError(f"{_name(thing)} is no transform; as_flow takes whole flows")
    return transform


def as_flow(thing) -> Flow:
    """A flow of any of the libraries, transform and base, as an nflows ``Flow``; nflows' own are handed back.

    Raises:
        TypeError: if ``thing`` is of no known library, or no flow.
        ValueError: from the bridge, for a flow that cannot be right.
    """
    bridge = hub if isinstance(thing, Flow | Transform) else _bridge_of(thing)
    flow = bridge.flow_in(thing)
    if flow is None:
        raise TypeError(f"{_name(thing)} is no flow; as_transform takes transforms, which a Flow joins to a base")
    return flow


def to_library(library: str, thing: Transform | Flow, *, event_dim: EventDim | None = None, conditional: bool = False):
    """An nflows ``Transform`` (data → noise) as that library's own transform type, for its own flow class.

    Of a whole ``Flow`` this is its transform; the base is left to the library's own flow. The result holds the
    transform as a submodule wherever the library's type is a module: training it there trains it here.

    Args:
        library: one of ``libraries()``.
        thing: what to export.
        event_dim: dimensions of one datum: 1 for vectors, as by default, 3 for images; or, for a transform that changes
            the shape, the shapes of a datum and of its noise. A flow says it itself.
        conditional: whether it takes a context: Pyro has two types for the two cases; the others ignore it. A flow
            says it itself.

    Raises:
        ValueError: for a library that is not known; for a wrong ``event_dim``.
        ImportError: for one that is not installed, naming the extra that installs it.
        TypeError: if ``thing`` is neither an nflows ``Transform`` nor a ``Flow``.
    """
    bridge = next((bridge for bridge in bridges() if library in bridge.LIBRARIES), None)
    if bridge is None:
        raise ValueError(f"unknown library {shown(library)}; known: {', '.join(libraries())}")
    if not isinstance(thing, Transform | Flow):
        raise TypeError(
            f"to_library exports an nflows Transform, not {_name(thing)}; as_transform makes one of another library's "
            "transform, and as_flow makes an nflows Flow, whose transform to_library exports, of another library's flow"
        )
    check_installed(bridge)
    if isinstance(thing, Flow):
        event_dim = event_dim_of(thing) if event_dim is None else event_dim
        conditional = conditional or reads_context(thing)
        thing = whole_transform(thing)
    event_dim = 1 if event_dim is None else event_dim
    check_event_dim(event_dim)
    return bridge.transform_out(thing, library, event_dim, conditional)


def bridges() -> list[ModuleType]:
    """Every bridge there is a file for."""
    return modules(__name__)


def libraries() -> list[str]:
    """Every name that ``to_library`` takes."""
    return [library for bridge in bridges() for library in bridge.LIBRARIES]


def _bridge_of(thing) -> ModuleType:
    """The bridge that knows the most derived class of ``thing`` that any bridge knows."""
    for kind in type(thing).__mro__:
        for bridge in bridges():
            if any(f"{kind.__module__}.".startswith(f"{package}.") for package in bridge.PACKAGES):
                return bridge
    known = ", ".join(package for bridge in bridges() for package in bridge.PACKAGES)
    missing = ", ".join(
        f"{bridge.__name__.rpartition('.')[2]} (pip install 'flow-adapters[{bridge.EXTRA}]')"
        for bridge in bridges()
        if not installed(bridge)
    )
    raise TypeError(
        f"{_name(thing)} is of no known library; known: {known}" + (f"; not installed: {missing}" if missing else "")
    )


def _name(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
