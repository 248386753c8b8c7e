"""Timing functions against each other in one process, in turn, A B C A B C …: a drifting machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from runs.common.devices import can_fuse, synchronize
from runs.common.step import COMPILE, GraphedStep, before_recording

RATE = 1e-7  # of the steps that are timed: next to nothing, so that every one of them does the same work


def training_step(parameters: Iterable[Tensor], loss: Callable[[], Tensor], fast: bool = False) -> Callable[[], Tensor]:
    """zero_grad, loss, backward and a step of fused Adam, as one function, which gives the loss.

    Args:
        parameters: what Adam changes.
        loss: the scalar to minimise.
        fast: make the step what ``--compile`` makes of a training's: under ``torch.compile`` and, on CUDA, as one
            graph. The returned function raises a RuntimeError if there can't be a graph.
    """
    parameters = list(parameters)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, RATE, fused=can_fuse(device))
    if fast:
        loss = torch.compile(loss, **COMPILE)

    def step(_: Sequence = ()) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    if not fast or device.type != "cuda":
        return step
    graphed = GraphedStep(step, lambda: before_recording(optimizer), lambda: None, _refuse, device)
    return lambda: graphed(())


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round, after ``warmup`` rounds that don't count.

    A call is over when the device has done what it was asked for.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


@dataclass(frozen=True)
class Stopwatch:
    """For how long functions are timed.

    Attributes:
        seconds: of timing, all functions together, if that makes ``min_rounds`` to ``max_rounds`` rounds.
        slow: seconds; a function that takes longer is timed once.
    """

    seconds: float = 6.0
    min_rounds: int = 7
    max_rounds: int = 200
    slow: float = 1.0

    def measure(
        self,
        functions: Mapping[str, Callable[[], object]],
        device: torch.device,
        warmup: int = 1,
        limited: Callable[[], AbstractContextManager] = nullcontext,
    ) -> tuple[dict[str, list[float]], dict[str, BaseException]]:
        """Milliseconds of each call, all in turn, and the errors of those that can't be called.

        Args:
            functions: what is timed.
            device: where they compute.
            warmup: calls of each one before the call that says how slow it is.
            limited: within what these first calls are made, which may raise if they take too long.
        """
        first: dict[str, float] = {}
        failed: dict[str, BaseException] = {}
        for name, function in functions.items():
            try:
                with limited():
                    first[name] = interleaved({name: function}, 1, device, warmup)[name][0]
            except (Exception, SystemExit) as error:  # of a user's or a library's code
                failed[name] = error
        quick = {name: functions[name] for name, ms in first.items() if ms < 1e3 * self.slow}
        rounds = round(1e3 * self.seconds / max(1e-3, sum(first[name] for name in quick)))
        times = interleaved(quick, min(self.max_rounds, max(self.min_rounds, rounds)), device, warmup=2)
        return times | {name: [ms] for name, ms in first.items() if name not in quick}, failed


def ratio(times: list[float], peer: list[float]) -> float:
    """The median over the rounds of a / b, each pair timed one right after the other.

    Where one of the two was timed once, being slow, it is the ratio of the medians.
    """
    if len(times) != len(peer):
        return statistics.median(times) / statistics.median(peer)
    return statistics.median(a / b for a, b in zip(times, peer, strict=True))
