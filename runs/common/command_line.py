"""From a command line to a script's ``main``, and its errors back to the user."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from runs.common.options import Checked, checks_afterwards

CHEQUERBOARD = "chequerboard"  # the one spelling that options show, beside those that they accept
OTHER_SPELLINGS = ("checker", "checkerboard", "checkered", "chequer", "chequered")
SPELLED = ("--data", "--mask", "--task")  # the options that may be asked for it
EMPTY_LINE = "\n\n"  # after the first sentence of a script's docstring: below it are its examples
INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
Options = TypeVar("Options", bound=Checked)


def cli(main: Callable[..., Any], kind: type[Checked], arguments: Sequence[str] | None = None) -> None:
    """Run ``main`` with the options that a command line asks for. A user's mistake is one clear line, no traceback.

    The exit status is 0 for a run that ended well and 1 after an error. After Ctrl-C it is 130, even if the run could
    still write down all that it had by then.

    Args:
        main, kind, arguments: as for ``run``.
    """
    try:
        figures = run(main, kind, arguments)
        if was_interrupted(figures):
            sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FLOW_ADAPTERS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(main: Callable[..., Any], kind: type[Checked], arguments: Sequence[str] | None = None, **seams: Any) -> Any:
    """What ``main`` returns for the options that a command line asks for.

    Args:
        main: the script's function, which takes all options as one object.
        kind: the class of that object.
        arguments: the words of the command line; by default those of this process.
        seams: other arguments of ``main``, which tests give.
    """
    description = (main.__doc__ or "").partition("\n")[0]
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(kind, words, description)
    except SystemExit:
        if {"-h", "--help"} & set(words):
            script = sys.modules[main.__module__].__doc__ or ""
            print(f"\nexamples, and what they give:\n\n{script.partition(EMPTY_LINE)[2].rstrip()}")
        raise
    return main(options, **seams)


def was_interrupted(figures: Any) -> bool:
    """Whether a run's figures say ``interrupted``: Ctrl-C or a scheduler ended a training before its time."""
    if not isinstance(figures, dict):
        return False
    return bool(figures.get("interrupted")) or any(map(was_interrupted, figures.values()))


def parse(kind: type[Options], arguments: Sequence[str] | None = None, description: str = "") -> Options:
    """The options that a command line asks for; by default that of this process.

    Raises:
        ValueError: for an option whose value can't be right.
        SystemExit: for ``--help``, for an unknown flag, or for a word where a number is wanted.
    """
    words = spelled(sys.argv[1:] if arguments is None else arguments)
    with checks_afterwards():
        return tyro.cli(kind, args=words, description=description, config=(tyro.conf.OmitArgPrefixes,))


def spelled(words: Sequence[str]) -> list[str]:
    """The words of a command line with every accepted spelling of the chequerboard as the options have it.

    >>> spelled(["--mask", "checker", "--data=checkerboard", "--out", "checker"])
    ['--mask', 'chequerboard', '--data=chequerboard', '--out', 'checker']
    """
    found = []
    for before, word in itertools.pairwise(["", *words]):
        option, equals, value = word.rpartition("=") if word.startswith(SPELLED) else (before, "", word)
        known = option in SPELLED and value in OTHER_SPELLINGS
        found.append(f"{option}=" * bool(equals) + CHEQUERBOARD if known else word)
    return found
