"""How tests run a script: from keywords, through the same parsing as a command line."""

import importlib
from pathlib import Path
from typing import Any

from runs.common import command_line


def arguments(**flags: Any) -> list[str]:
    """What a user types for these options: ``hidden=(8, 8), animate=True`` is ``--hidden 8 8 --animate``."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts = [word for pair in value.items() for word in pair] if isinstance(value, dict) else value
            words += [f"--{flag}", *map(str, parts if isinstance(parts, tuple | list) else (parts,))]
    return words


def run(script: str, *, seams: dict[str, Any] | None = None, **flags: Any) -> Any:
    """What ``runs/<script>.py`` returns for these options.

    Args:
        script: its name, such as ``toy``.
        seams: arguments of its ``main`` that are no options, for smaller and quicker tests.
        flags: its options, by the names of the flags.
    """
    module = importlib.import_module(f"runs.{script}")
    options = getattr(module, "Options", None)
    return command_line.run(module.main, options, arguments(**flags), **(seams or {}))


def pictures_in(directory: Path) -> dict[str, bytes]:
    """The pictures in a directory by their names, as they are on disk."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix in (".png", ".gif")}
