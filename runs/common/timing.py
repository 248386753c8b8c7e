"""Timing functions against each other in one process, in turn, A B C A B C …: a drifting machine hits all alike."""

import statistics
import time
from collections.abc import Callable

import torch

from runs.common.devices import synchronize


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round, after ``warmup`` rounds that don't count.

    A call is over when the device has done what it was asked for.
    """
    times = {name: [] for name in functions}
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def ratio(times: list[float], peer: list[float]) -> float:
    """The median over the rounds of a / b, each pair timed one right after the other."""
    return statistics.median(a / b for a, b in zip(times, peer, strict=True))
