"""From a command line to a script's ``main``, and its errors back to the user."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from runs.common.options import Checked, checks_afterwards

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
Options = TypeVar("Options", bound=Checked)


def cli(main: Callable[..., Any], kind: type[Checked] | None = None) -> None:
    """Run ``main`` with the command line's arguments; a mistake of the user's is one clear line, not a traceback.

    The exit status is 0, 1 after an error, and 130 after Ctrl-C, even if the run has ended well after it.
    """
    try:
        figures = run(main, kind)
        if was_interrupted(figures):
            sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FLOW_ADAPTERS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(
    main: Callable[..., Any], kind: type[Checked] | None = None, arguments: Sequence[str] | None = None, **seams: Any
) -> Any:
    """What ``main`` returns for the options that a command line asks for.

    Args:
        main: of a script: it takes its options, all in one.
        kind: the class of these options; ``None`` for a ``main`` with a parameter for each option.
        arguments: the words of the command line; by default those of this process.
        seams: what else ``main`` takes, beside its options: for tests.
    """
    description = (main.__doc__ or "").partition("\n")[0]
    if kind is None:
        return tyro.cli(main, args=arguments, description=description)
    return main(parse(kind, arguments, description), **seams)


def was_interrupted(figures: Any) -> bool:
    """Whether a run's figures say ``interrupted``: Ctrl-C or a scheduler ended it early, if with all it had by then."""
    if not isinstance(figures, dict):
        return False
    return bool(figures.get("interrupted")) or any(map(was_interrupted, figures.values()))


def parse(kind: type[Options], arguments: Sequence[str] | None = None, description: str = "") -> Options:
    """The options that a command line asks for; by default that of this process.

    Raises:
        ValueError: for an option whose value can't be right.
        SystemExit: for ``--help``, for an unknown flag, or for a word where a number is wanted.
    """
    with checks_afterwards():
        return tyro.cli(kind, args=arguments, description=description, config=(tyro.conf.OmitArgPrefixes,))
