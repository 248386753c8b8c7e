"""Any transform or flow of any library, as nflows' and back. One file here per library; its presence registers it.

A bridge is a module with

- ``PACKAGES``: the packages whose classes it knows, e.g. ``("zuko",)``; it imports none of them when it is imported;
- ``LIBRARIES``: the names that ``to_library`` takes for it; ``EXTRA``: the extra of this package that installs them;
- ``transform_in(thing)`` → nflows ``Transform`` data → noise, or ``None`` for a thing that is no transform;
- ``flow_in(thing)`` → ``adapters.flow.Flow``, or ``None`` for a thing that is no flow;
- ``transform_out(transform, library, event_dim, conditional)`` → the library's own transform type;
- ``native_log_prob(exported, inputs, context)`` → log-density of the library's own flow class around an exported
  transform and a standard normal: what the tests hold against nflows' (law 3);
- ``EXAMPLES``, ``MODELS`` and ``FLOWS``: see ``adapters.registry``.
"""

import importlib.util
from types import ModuleType

from nflows.flows import Flow
from nflows.transforms import Transform

from adapters.bridges import nflows as hub
from adapters.registry import modules


def as_transform(thing) -> Transform:
    """A transform of any of the libraries as an nflows ``Transform``, data → noise; nflows' own are handed back.

    The result computes what ``thing`` computes, with its parameters (not copies): training one trains the other.

    Raises:
        TypeError: if ``thing`` is of no known library, or no transform.
        nflows.transforms.InverseNotAvailable, ValueError: from the bridge, for a transform that no flow can use.
    """
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


def to_library(library: str, transform: Transform, *, event_dim: int = 1, conditional: bool = False):
    """An nflows ``Transform`` (data → noise) as that library's own transform type, for its own flow class.

    The result holds ``transform`` as a submodule wherever the library's type is a module: training it there trains it
    here.

    Args:
        library: one of ``libraries()``.
        transform: what to export.
        event_dim: dimensions of one datum: 1 for vectors, 3 for images.
        conditional: whether it takes a context: Pyro has two types for the two cases; the others ignore it.

    Raises:
        ValueError: for a library that is not known.
        ImportError: for one that is not installed, naming the extra that installs it.
        TypeError: if ``transform`` is not an nflows ``Transform``.
    """
    bridge = next((bridge for bridge in bridges() if library in bridge.LIBRARIES), None)
    if bridge is None:
        raise ValueError(f"unknown library {library!r}; known: {', '.join(libraries())}")
    if not isinstance(transform, Transform):
        raise TypeError(f"to_library exports an nflows Transform, not {_name(transform)}; as_transform makes one")
    _check_installed(bridge)
    return bridge.transform_out(transform, library, event_dim, conditional)


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
        if not _installed(bridge)
    )
    raise TypeError(
        f"{_name(thing)} is of no known library; known: {known}" + (f"; not installed: {missing}" if missing else "")
    )


def _check_installed(bridge: ModuleType) -> None:
    if not _installed(bridge):
        name = bridge.__name__.rpartition(".")[2]
        raise ImportError(f"{name} is not installed: pip install 'flow-adapters[{bridge.EXTRA}]'")


def _installed(bridge: ModuleType) -> bool:
    return importlib.util.find_spec(bridge.PACKAGES[0]) is not None


def _name(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
