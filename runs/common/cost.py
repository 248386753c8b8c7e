"""What a flow costs: the time of a training step, of log_prob and of sampling, and the memory that a step allocates."""

import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adapters.catalogue.specification import NativeFlow
from adapters.flow import Flow
from runs.common.devices import module_of
from runs.common.step import WARMUP
from runs.common.timing import Stopwatch, ratio, training_step

KINDS = ("step", "log_prob", "sample")


class TimedFlow:
    """A flow and a batch, ready to be timed in each of ``KINDS``.

    Each is timed in the mode in which it is used: a step in training mode, log_prob and sampling in evaluation mode. A
    layer may compute something else in training, where batch normalisation, for one, can't be inverted.

    Attributes:
        parameters: what a step changes.
        loss: −mean log p of the batch.
        calls: what is timed, by kind.
    """

    def __init__(self, flow: Any, parameters: Iterable[Tensor], loss: Callable[[], Tensor]):
        self.flow, self.parameters, self.loss = flow, list(parameters), loss
        self.calls: dict[str, Callable[[], object]] = {"step": training_step(self.parameters, loss)}

    @classmethod
    def native(cls, native: NativeFlow, x: Tensor) -> "TimedFlow":
        """A flow that is called by functions of its own, on the batch ``(n, D)``."""
        timed = cls(native.flow, native.parameters, lambda: -native.log_prob(x).mean())
        timed.calls["log_prob"] = torch.no_grad()(lambda: native.log_prob(x))
        timed.calls["sample"] = torch.no_grad()(lambda: native.sample(len(x)))
        return timed

    @classmethod
    def of(cls, flow: Flow, x: Tensor) -> "TimedFlow":
        """A flow as ``build_flow`` makes it, on the batch ``(n, D)``."""
        return cls.native(NativeFlow(flow, flow.log_prob, flow.sample, list(flow.parameters())), x)

    def train(self, mode: bool = True) -> "TimedFlow":
        """Training or evaluation mode, where the flow has such modes: Pyro's distributions have none."""
        if isinstance(self.flow, nn.Module):
            self.flow.train(mode)
        return self

    def memory(self) -> float:
        """MiB that a training step allocates at most, beyond parameters and Adam's moments, which are there before."""
        return peak(self.train().calls["step"], self.parameters)

    def fast_step(self) -> Callable[[], Tensor]:
        """A training step as ``--compile`` makes it."""
        return training_step(self.parameters, self.loss, fast=True)


def time_kind(
    kind: str,
    flows: dict[str, TimedFlow],
    device: torch.device,
    stopwatch: Stopwatch,
    limited: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, list[float]], dict[str, BaseException]]:
    """Milliseconds of one of ``KINDS``, of all flows that have it, in turn, and the errors of those that fail.

    The first calls of each are made within ``limited()``, which may raise if they take too long.
    """
    timed = {name: flow.train(kind == "step") for name, flow in flows.items() if kind in flow.calls}
    return stopwatch.measure({name: flow.calls[kind] for name, flow in timed.items()}, device, limited=limited)


def peak(step: Callable[[], object], parameters: list[Tensor]) -> float:
    """The most memory that the second call of ``step`` has allocated at any moment, in MiB.

    On a CPU PyTorch's profiler records it. It is NaN on a device that keeps no record of its memory.
    """
    step()
    for parameter in parameters:
        parameter.grad = None
    device = parameters[0].device
    if device.type != "cpu":
        module = module_of(device)
        if not hasattr(module, "reset_peak_memory_stats"):
            return math.nan
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        step()
        return (module.max_memory_allocated(device) - before) / 2**20
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    allocated = largest = 0
    kineto: Any = record.profiler  # has no types
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()  # negative where memory is freed
            largest = max(largest, allocated)
    return largest / 2**20


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Within, nothing is written to stderr. The profiler writes there from C++, past Python's ``sys.stderr``."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compile_gain(flow: TimedFlow, device: torch.device, stopwatch: Stopwatch) -> dict[str, float | str]:
    """How many times as fast a step is under ``--compile``, and its milliseconds; or why it can't be compiled."""
    flow.train()
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = flow.fast_step()
            if not torch.allclose(fast(), flow.loss().detach(), atol=1e-3, rtol=1e-3):
                return {"failed": "another value"}
            eager = training_step(flow.parameters, flow.loss)
            times, failed = stopwatch.measure({"eager": eager, "fast": fast}, device, WARMUP + 1)
        if failed:
            raise next(iter(failed.values()))
    except Exception as error:  # whatever the compiler says
        return {"failed": type(error).__name__}
    return {"gain": 1 / ratio(times["fast"], times["eager"]), "ms": statistics.median(times["fast"])}
