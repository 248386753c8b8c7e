"""What a run leaves behind: ``metrics.json`` beside its pictures and checkpoint, each written whole or not at all."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.bridges import bridges
from adapters.checkpoint import write_atomically
from runs.common.devices import module_of


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


def newest_run(directory: Path, file: str) -> Path:
    """The directory itself if that file of a run is in it, or else the last run right below it that wrote one."""
    below = sorted(directory.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    return below[-1].parent if below and not (directory / file).is_file() else directory


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
