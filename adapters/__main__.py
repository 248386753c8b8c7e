"""``python -m adapters``: what is installed, and which flows there are; ``python -m adapters NAME`` describes one."""

import importlib.metadata
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence

import adapters
from adapters.bridges import Bridge, bridges, check_installed
from adapters.catalogue import defaults, describe_flow, library_of
from adapters.discovery import file_name
from adapters.pipe import until_nobody_reads

USAGE = """usage: python -m adapters [NAME ...]

With no name: what is installed, and the names of all flows, by library.
With names: what these flows are, and the options that they have.

examples, and what they give:

python -m adapters
    versions and names
python -m adapters masked-spline
    that flow's layers in words, and its options with their defaults
python -m adapters.check my_layer.py:MyLayer
    is a layer of yours right?"""


def overview() -> str:
    """The versions of this package, Python, PyTorch and the libraries, and the flows of each."""
    versions = {"adapters": adapters.__version__, "python": platform.python_version(), "torch": _version("torch")}
    lines = [f"{name:10} {version}" for name, version in versions.items()]
    lines += [f"{file_name(bridge):10} {_state(bridge)}" for bridge in bridges()]
    by_library: dict[str, list[str]] = {}
    for name in adapters.flow_names():
        by_library.setdefault(library_of(name) or "hand-written", []).append(name)
    lines += ["", "flows, for build_flow and --flow:"]
    for library, names in by_library.items():
        lines += _wrapped(", ".join(names), f"  {library:12} ", " " * 15)
    return "\n".join([*lines, "", "python -m adapters NAME describes one of them."])


def description(name: str) -> str:
    """A flow's layers in words, and its options with their defaults.

    Raises:
        ValueError: for a name that is not known.
        ImportError: for a library that is not installed.

    >>> print(description("masked-affine").splitlines()[0])
    masked-affine: Packed affine coupling layers: equations 15 to 17, fast.
    """
    options = [f"  {option} = {default!r}" for option, default in defaults(name).items()] or ["  none"]
    return "\n".join(
        [
            *_wrapped(f"{name}: {describe_flow(name)}"),
            "",
            "options, beside features, layers, hidden_features and build_flow's others:",
            *options,
            "",
            f'build_flow("{name}", features=2)',
            f"python runs/toy.py --flow {name}",
        ]
    )


def main(words: Sequence[str]) -> int:
    """Print what is asked for; the exit status is 1 for a name that is not known."""
    if any(word.startswith("-") for word in words):
        print(USAGE)
        return 0 if words[0] in ("-h", "--help") else 2
    try:
        print("\n\n".join(map(description, words)) if words else overview())
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """The lines of a text in this terminal, the first one after ``first``, the others after ``rest``."""
    width = shutil.get_terminal_size().columns
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _state(bridge: Bridge) -> str:
    try:
        check_installed(bridge)
    except ImportError as error:
        return str(error).partition(" is ")[2]
    return _version(bridge.DISTRIBUTION)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    with until_nobody_reads():
        sys.exit(main(sys.argv[1:]))
