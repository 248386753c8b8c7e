"""What a run leaves behind: ``metrics.json`` beside its pictures and checkpoint, each written whole or not at all."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.bridges import bridges
from adapters.checkpoint import write_atomically
from runs.common.devices import module_of

METRICS = "metrics.json"
RECORD = "pictures.pt"  # what a run's pictures are drawn from: see pictures/record.py


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


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Within, no other process can claim that directory. However this process ends, its claim ends with it.

    Raises:
        RuntimeError: if another process has claimed it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: nobody can claim anything there
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"another run is writing to {directory}: wait until it has ended, or choose another --out"
                ) from None
        yield
    finally:
        os.close(descriptor)


def newest_run(directory: Path, *files: str) -> Path:
    """The directory itself if one of these files of a run is in it, or else that of the newest one right below it."""
    if any((directory / file).is_file() for file in files):
        return directory
    below = [path for file in files for path in directory.glob(f"*/{file}")]
    return max(below, key=lambda path: path.stat().st_mtime).parent if below else directory


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
    return write_text(out / METRICS, text + "\n")


def read_metrics(directory: Path, run: str) -> dict[str, Any]:
    """The figures that ``write_metrics`` has written of a run, ``None`` read as the NaN that it was.

    Args:
        directory: of the run.
        run: the script, or the part of it, that the figures must be of.

    Raises:
        ValueError: if the file is damaged, or another script's.
    """
    path = directory / METRICS
    try:
        record = json.loads(path.read_text())
        kind, metrics = record["run"], record["metrics"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not of this version: run it again") from error
    if kind != run:
        raise ValueError(f"{path} is of a run of {kind}, not of {run}")
    return with_nan(metrics)


def replacing_results(weights: Path, out: Path) -> Path:
    """Remove the metrics and the record of pictures that an earlier run has left in ``out``.

    To be called as soon as other weights have been written there: a run may end before it has results of its own, by a
    loss that is not finite, and an earlier run's would then stand beside weights that they do not belong to.

    Returns:
        the path of the weights, as it came.
    """
    found = [path for path in (out / METRICS, out / RECORD) if path.is_file()]
    for path in found:
        path.unlink()
    if found:
        print(f"removed from {out}, where other weights now are: {', '.join(path.name for path in found)}")
    return weights


def with_nan(record: Any) -> Any:
    """The same with NaN for each ``None``: see ``without_nan``."""
    if isinstance(record, dict):
        return {key: with_nan(value) for key, value in record.items()}
    return math.nan if record is None else record


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
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    module = module_of(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
