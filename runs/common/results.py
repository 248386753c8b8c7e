"""What a run leaves behind: ``metrics.json`` beside its pictures and checkpoint, each written whole or not at all."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from adapters.bridges import bridges
from adapters.catalogue import check_options
from adapters.checkpoint import write_atomically
from adapters.checks import check_positive
from runs.common.devices import module_of

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def cli(main: Callable) -> None:
    """Run ``main`` with the command line's arguments; a mistake of the user's is one clear line, not a traceback.

    The exit status is 0, 1 after an error, and 130 after Ctrl-C, even if the run has ended well after it.
    """
    try:
        figures = tyro.cli(main, description=main.__doc__.partition("\n")[0])
        if was_interrupted(figures):
            sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FLOW_ADAPTERS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def was_interrupted(figures: Any) -> bool:
    """Whether a run's figures say ``interrupted``: Ctrl-C or a scheduler ended it early, if with all it had by then."""
    if not isinstance(figures, dict):
        return False
    return bool(figures.get("interrupted")) or any(map(was_interrupted, figures.values()))


def open_directory(out: Path) -> Path:
    """Make the run's directory, and make sure now, before any work, that results can be written there.

    Raises:
        OSError: if it can't be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {out} can't be written to ({error.strerror}); choose another directory") from error
    return out


def check_known(known: Collection[str], **values: str) -> None:
    """Raise a ValueError that lists what is known, unless every value is; the keyword is the name of the argument."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_widths(**widths: Collection[int] | None) -> None:
    """Raise a ValueError unless each is ``None``, or at least one width, all positive."""
    for name, given in widths.items():
        if given is not None and not given:
            raise ValueError(f"{name} needs at least one width, e.g. --{name} 64 64")
        check_positive(**{f"{name}[{i}]": width for i, width in enumerate(given or ())})


def check_at_most(most: int, **values: int) -> None:
    """Raise a ValueError for a number beyond what could ever end."""
    for name, value in values.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most:,}, not {value:,}")


def check_seed(seed: int) -> None:
    """Raise a ValueError unless PyTorch takes it for a seed of its own."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie between 0 and 2**63 - 1, not {seed}")


def check_flow(flow: str, options: dict[str, Any] | None) -> None:
    """Raise unless the catalogue has that flow, and the flow these options or ``activation``, which all have."""
    if "net" in (options or {}):
        raise ValueError(f"net is no option, but an argument of its own, where there is one: --net {options['net']}")
    check_options(flow, {name: value for name, value in (options or {}).items() if name != "activation"})


def to_plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, of nothing but numbers, strings, lists and dictionaries."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def parameter_count(module: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def peak_memory() -> float:
    """The most memory that this process has held so far, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def write_metrics(out: Path, run: str, arguments: dict[str, Any], seed: int, metrics: dict[str, Any]) -> Path:
    """Write ``metrics.json``: what was run, with what, and what came of it."""
    record = {
        "run": run,
        "arguments": arguments,
        "seed": seed,
        "versions": versions(),
        "metrics": metrics,
    }
    text = json.dumps(without_nan(record), indent=2, default=str, allow_nan=False)
    return write_text(out / "metrics.json", text + "\n")


def without_nan(record: Any) -> Any:
    """The same with ``None`` for each number that is not finite, since JSON has no word for these."""
    if isinstance(record, dict):
        return {key: without_nan(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [without_nan(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def write_text(path: Path, text: str) -> Path:
    """Write it, whole or not at all."""
    return write_atomically(path, lambda unfinished: unfinished.write_text(text))


def versions() -> dict[str, str]:
    """Python's and each installed library's version, the threads in use and the processor."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads()), "processor": _processor()}
    for name in ("torch", *(bridge.DISTRIBUTION for bridge in bridges()), "flow-adapters"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def where(device: torch.device) -> str:
    """The device in words, for a table's heading: a processor with its threads, or a GPU's name."""
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    module = module_of(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
