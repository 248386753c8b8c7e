"""From a command line to a script's ``main``, and its errors back to the user."""

import ast
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from adapters.pipe import until_nobody_reads
from runs.common.options import Checked, checks_afterwards

CHEQUERBOARD = "chequerboard"  # the one spelling that options show, beside those that they accept
OTHER_SPELLINGS = ("checker", "checkerboard", "checkered", "chequer", "chequered")
SPELLED = ("--data", "--mask", "--task")  # the options that may be asked for it
EMPTY_LINE = "\n\n"  # after the first sentence of a script's docstring: below it are its examples
INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
INDENT = "    "
Options = TypeVar("Options", bound=Checked)
registry = ConstructorRegistry()


def cli(main: Callable[..., Any], kind: type[Checked], arguments: Sequence[str] | None = None) -> None:
    """Run ``main`` with the options that a command line asks for. A user's mistake is one clear line, no traceback.

    The exit status is 0 for a run that ended well and 1 after an error. After Ctrl-C it is 130, even if the run could
    still write down all that it had by then. When nobody reads what it prints, it ends: see ``until_nobody_reads``.

    Args:
        main, kind, arguments: as for ``run``.
    """
    try:
        with until_nobody_reads():
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
            print(f"\nexamples, and what they give:\n\n{examples(script, shutil.get_terminal_size().columns)}")
        raise
    return main(options, **seams)


def examples(docstring: str, width: int) -> str:
    """The commands in a script's docstring, and below each what it gives. A shell takes a command over several lines.

    >>> print(examples("Fit a flow.\\n\\npython runs/toy.py --steps 200 --layers 8    a quick look", width=32))
    python runs/toy.py --steps 200 \\
            --layers 8
        a quick look
    """
    lines = []
    for line in docstring.partition(EMPTY_LINE)[2].strip().splitlines():
        command, said = re.split("  +", line)
        if len(command) > width:
            parts = textwrap.wrap(command, width - 2, subsequent_indent=2 * INDENT, break_on_hyphens=False)
            command = " \\\n".join(parts)
        lines += [command, textwrap.fill(said, width, initial_indent=INDENT, subsequent_indent=INDENT)]
    return "\n".join(lines)


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
    with checks_afterwards(), registry:
        return tyro.cli(kind, args=words, description=description, config=(tyro.conf.OmitArgPrefixes,))


@registry.struct_rule
def _with_whole_texts(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro makes options. Its own rule is the same, but for the text below a field.

    tyro breaks a text wherever its next line begins with anything but a letter, and a line in a class begins with its
    indentation. So here each text is one line, which tyro breaks where the terminal ends.
    """
    if not (isinstance(info.type, type) and issubclass(info.type, Checked)):
        return None
    types = get_type_hints(info.type, include_extras=True)
    values = info.default if isinstance(info.default, info.type) else info.type()
    texts = {name: text for base in reversed(info.type.__mro__) for name, text in _texts(base).items()}
    names = [field.name for field in fields(info.type)]
    found = (
        StructFieldSpec(name=name, type=types[name], default=getattr(values, name), helptext=texts.get(name))
        for name in names
    )
    return StructConstructorSpec(instantiate=info.type, fields=tuple(found))


def _texts(kind: type) -> dict[str, str]:
    """The text below each field in a class's own source, on one line."""
    return _texts_in(kind.__module__).get(kind.__name__, {}) if issubclass(kind, Checked) else {}


@cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    """The same of all classes in a module, which is read just once."""
    found: dict[str, dict[str, str]] = {}
    parts = ast.parse(inspect.getsource(sys.modules[module])).body
    for kind in [part for part in parts if isinstance(part, ast.ClassDef)]:
        for pair in itertools.pairwise(kind.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found.setdefault(kind.name, {})[name] = " ".join(text.split())
    return found


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
