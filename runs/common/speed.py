"""What flows cost: interleaved times, a step's memory, torch.compile, and how it all grows with D and with layers.

The yardstick is *bare*: forward, backward and Adam of the packed layers' conditioners alone, on inputs that ask for no
gradient. No coupling layer with these networks can be faster.
"""

import itertools
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from adapters.catalogue import native_flows
from adapters.catalogue.specification import NativeFlow
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from runs.common.contestants import build
from runs.common.devices import can_fuse, module_of
from runs.common.pictures import figures
from runs.common.results import where, write_metrics
from runs.common.step import COMPILE, WARMUP, GraphedStep, before_recording
from runs.common.timing import interleaved, ratio

SECONDS = 6.0  # of timing for each kind of call, all flows together, at least MIN_ROUNDS of them
MIN_ROUNDS, MAX_ROUNDS = 7, 200
SLOW = 1.0  # seconds a call; what is slower is timed once
WIDTHS = (2, 8, 32, 128, 512, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
BATCH = 128
KINDS = ("step", "log_prob", "sample")
BARE = "bare conditioners"
OURS = ("masked-affine", "masked-affine-textbook")  # the first is what the others are held against
NATIVE_FLOWS = {name: make for flows in native_flows().values() for name, make in flows.items()}


def training_step(parameters: Iterable[Tensor], loss: Callable[[], Tensor], fast: bool = False) -> Callable[[], Tensor]:
    """zero_grad, loss, backward and a step of fused Adam, as a function; the rate is next to nothing.

    ``fast`` is what ``--compile`` makes of a training: ``torch.compile`` and, on CUDA, one graph of the whole step.
    """
    parameters = list(parameters)
    device = parameters[0].device
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        parameters,
        1e-7,
        fused=can_fuse(device),
    )
    if fast:
        loss = torch.compile(loss, **COMPILE)

    def step(_: Sequence = ()) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    if not (fast and on_cuda):
        return step
    graphed = GraphedStep(step, lambda: before_recording(optimizer), lambda: None, _refuse, device)
    return lambda: graphed(())


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


def measure(
    calls: dict[str, Callable], device: torch.device, tries: int = 1
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Milliseconds of each call, all in turn, and what went wrong with those that could not be called."""
    first, failed = {}, {}
    for name, call in calls.items():
        try:
            first[name] = interleaved({name: call}, 1, device, warmup=tries)[name][0]
        except (Exception, SystemExit) as error:
            failed[name] = error
    quick = {name: calls[name] for name, ms in first.items() if ms < 1e3 * SLOW}
    rounds = round(1e3 * SECONDS / max(1e-3, sum(first[name] for name in quick)))
    times = interleaved(quick, min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)), device, warmup=2)
    return times | {name: [ms] for name, ms in first.items() if name not in quick}, failed


def peak_of_step(flow: nn.Module, x: Tensor) -> float:
    """MiB that a training step allocates at most, beyond what is there before it (parameters and Adam's moments)."""
    step = training_step(flow.parameters(), lambda: -flow.log_prob(x).mean())
    return peak(step, list(flow.parameters()))


def peak(step: Callable[[], None], parameters: list[Tensor]) -> float:
    """MiB that the second call of ``step`` allocates at most, on a CPU from the allocator's own record.

    NaN on a device that keeps no record of it.
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
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler greets and complains from C++, where only the file descriptor stops it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compile_gain(flow: nn.Module, x: Tensor) -> dict[str, float | str]:
    """How many times faster a step is under ``--compile``, and that step's milliseconds; or why it can't be."""

    def loss() -> Tensor:
        return -flow.log_prob(x).mean()

    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = training_step(flow.parameters(), loss, fast=True)
            if not torch.allclose(fast(), loss().detach(), atol=1e-3, rtol=1e-3):
                return {"failed": "another value"}
            times, failed = measure(
                {"eager": training_step(flow.parameters(), loss), "fast": fast}, x.device, tries=WARMUP + 1
            )
        if failed:
            raise next(iter(failed.values()))
    except Exception as error:  # whatever the compiler says
        return {"failed": type(error).__name__}
    return {"gain": 1 / ratio(times["fast"], times["eager"]), "ms": statistics.median(times["fast"])}


class Racer:
    """A flow ready to be timed: ``step`` trains, ``log_prob`` scores, ``sample`` draws, on a batch of its own.

    It is made on the default device: call it within ``with device:``.
    """

    def __init__(self, name: str, features: int, layers: int, hidden: Sequence[int], batch_size: int = BATCH):
        torch.manual_seed(0)
        mask = checkerboard_mask(features)
        masks = [mask if i % 2 else 1 - mask for i in range(layers)]
        x = torch.randn(batch_size, features)
        self.log_prob = self.sample = None
        if name == BARE:
            nets = nn.ModuleList(MLP(int(m.sum()), 2 * int((1 - m).sum()), hidden) for m in masks)
            inputs = [x[:, : net[0].in_features].contiguous() for net in nets]
            self.parameters = list(nets.parameters())
            self.loss = lambda: torch.stack([net(one).mean() for net, one in zip(nets, inputs, strict=True)]).sum()
        else:
            if name in NATIVE_FLOWS:
                timed = NATIVE_FLOWS[name](features, masks, tuple(hidden))
            else:
                flow = build(name, features, layers, hidden, masks)
                timed = NativeFlow(flow, flow.log_prob, flow.sample, list(flow.parameters()))
            self.parameters = timed.parameters
            self.loss = lambda: -timed.log_prob(x).mean()
            self.log_prob = torch.no_grad()(lambda: timed.log_prob(x))
            self.sample = torch.no_grad()(lambda: timed.sample(batch_size))
        self.step = training_step(self.parameters, self.loss)

    def fast_step(self) -> Callable[[], Tensor]:
        """The step as ``--compile`` makes it."""
        return training_step(self.parameters, self.loss, fast=True)


def contestants(flows: Sequence[str]) -> list[str]:
    """The names of all that are timed: ours, these flows of the catalogue, and the libraries' own."""
    return list(dict.fromkeys((*OURS, *flows, *NATIVE_FLOWS)))


def speed(
    flows: Sequence[str],
    layers: int,
    hidden: Sequence[int],
    compile: bool,
    out: Path,
    device: torch.device,
    features: int = 784,
) -> dict:
    """Print and write the times of all libraries' affine couplings, natively called, and how they grow."""
    names = contestants(flows)
    size = f"D={features}, {layers} layers, {'×'.join(map(str, hidden))}, batch {BATCH}"
    print(f"{size}, on {where(device)}")
    racers = make_racers([*names, BARE], features, layers, hidden, device)
    found = race(racers, device)
    ours = OURS[0]
    print(
        f"{'':<25}{'step ms':>9}{'/ bare':>8}{'ours /':>8}"
        + "".join(f"{k:>9}{'ours /':>8}" for k in KINDS[1:])
        + "    MiB"
    )
    for name, row in found.items():
        cells = f"{name:<25}{row['step_ms']:>9.2f}{row['step_to_bare']:>8.3f}{row['step_ours']:>8.3f}"
        for kind in KINDS[1:] if name != BARE else ():
            cells += f"{row[f'{kind}_ms']:>9.2f}{row[f'{kind}_ours']:>8.3f}"
        print(cells + f"{row['memory_mib']:>7.1f}" * (name != BARE))
    metrics = {"table": found}
    if compile:
        metrics["compiled"] = race_compiled(racers, device)
        print(f"\n{'--compile':<25}{'step ms':>9}{'/ bare':>8}{'ours /':>8}{'/ eager':>9}")
        for name, row in metrics["compiled"].items():
            if "failed" in row:
                print(f"{name:<25}can't be had: {row['failed']}")
            else:
                print(f"{name:<25}{row['ms']:>9.2f}{row['to_bare']:>8.3f}{row['ours']:>8.3f}{row['to_eager']:>9.3f}")
        print()
    metrics["width"] = {
        d: growth(names, d, 4, (64, 64), device) for d in tqdm(WIDTHS, desc="D", leave=False, disable=None)
    }
    metrics["depth"] = {
        n: growth(names, 2, n, (8, 8), device) for n in tqdm(DEPTHS, desc="layers", leave=False, disable=None)
    }
    print(f"{'per layer at D=2, ms':<25}" + f"{'step':>9}{'ours /':>8}")
    few, many = DEPTHS[0], DEPTHS[-1]
    per_layer = {n: (metrics["depth"][many][n]["ms"] - metrics["depth"][few][n]["ms"]) / (many - few) for n in names}
    for name, ms in per_layer.items():
        print(f"{name:<25}{ms:>9.3f}{per_layer[ours] / ms:>8.3f}")
    metrics["per_layer_ms"] = per_layer
    path = draw_growth(metrics, names, out)
    arguments = {
        "task": "speed",
        "flows": list(flows),
        "layers": layers,
        "hidden": list(hidden),
        "features": features,
        "device": str(device),
    }
    print(f"  {write_metrics(out, 'speed', arguments, 0, metrics)}\n  {path}")
    return metrics


def make_racers(
    names: Sequence[str], features: int, layers: int, hidden: Sequence[int], device: torch.device
) -> dict[str, Racer]:
    with device:  # what is made without saying where is made there
        return {name: Racer(name, features, layers, hidden) for name in names}


def race(racers: dict[str, Racer], device: torch.device) -> dict[str, dict[str, float]]:
    """A row of times and ratios for each, all timed in turn."""
    rows: dict[str, dict[str, float]] = {name: {} for name in racers}
    ours = OURS[0]
    for kind in KINDS:
        times, failed = measure(
            {name: call for name, racer in racers.items() if (call := getattr(racer, kind))}, device
        )
        if failed:
            name, error = next(iter(failed.items()))
            raise RuntimeError(f"{name}: {kind} fails: {error}") from error
        for name, each in times.items():
            rows[name][f"{kind}_ms"] = statistics.median(each)
            rows[name][f"{kind}_ours"] = ratio(times[ours], each)
            if kind == "step":
                rows[name]["step_to_bare"] = ratio(each, times[BARE])
    for name, racer in racers.items():
        rows[name]["memory_mib"] = peak(racer.step, racer.parameters)
    return rows


def race_compiled(racers: dict[str, Racer], device: torch.device) -> dict[str, dict]:
    """Each one's step under ``--compile``: milliseconds, and ratios to the bare conditioners', ours and its own step.

    The first two are made faster alike, and a ratio is NaN where that can't be; the last is the plain step, in turn.
    """
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._dynamo.config.patch(cache_size_limit=2 * len(racers)):
        warnings.simplefilter("ignore")
        calls = {}
        for name, racer in racers.items():
            calls |= {name: racer.fast_step(), f"{name}, plain": racer.step}
        times, failed = measure(calls, device, tries=WARMUP + 1)  # in the last one a graph is recorded
    rows = {}
    for name in racers:
        if name in failed:
            rows[name] = {"failed": type(failed[name]).__name__}
            continue
        each = times[name]
        rows[name] = {"ms": statistics.median(each), "to_eager": ratio(each, times[f"{name}, plain"])}
        rows[name]["to_bare"] = ratio(each, times.get(BARE, [math.nan] * len(each)))
        rows[name]["ours"] = ratio(times.get(OURS[0], [math.nan] * len(each)), each)
    return rows


def growth(
    names: Sequence[str], features: int, layers: int, hidden: Sequence[int], device: torch.device
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step, and its MiB."""
    racers = make_racers(names, features, layers, hidden, device)
    times, failed = measure({name: racer.step for name, racer in racers.items()}, device)
    if failed:
        raise next(iter(failed.values()))
    return {
        name: {"ms": statistics.median(each), "mib": peak(racers[name].step, racers[name].parameters)}
        for name, each in times.items()
    }


def draw_growth(metrics: dict, names: Sequence[str], out: Path) -> Path:
    """Step time and memory against D and against layers."""
    path = out / "growth.png"
    labels = {"ms": "training step (ms)", "mib": "memory of a step (MiB)"}
    axis_labels = {"width": "D (4 layers of 64×64)", "depth": "layers (D = 2, 8×8)"}
    with figures.figure(path, 2, 2, size=(8.6, 6), sharex="col") as (drawing, axes):
        for row, unit in zip(axes, labels, strict=True):
            for axis, sweep in zip(row, axis_labels, strict=True):
                for colour, name in zip(itertools.cycle(figures.MANY), names, strict=False):
                    xs = list(metrics[sweep])
                    ys = [metrics[sweep][x][name][unit] for x in xs]
                    ours = name in OURS
                    axis.plot(
                        xs, ys, "o-" if ours else ".-", color=figures.ACCENT if name == OURS[0] else colour,
                        linewidth=1.8 if ours else 1, markersize=3.5, label=name, zorder=3 if ours else 2,
                    )  # fmt: skip
                axis.set(yscale="log", ylabel=labels[unit] if axis is row[0] else "")
                axis.set_xscale("log", base=2)
                axis.set_xticks(xs, [str(x) for x in xs], fontsize=7)
                figures.log_ticks(axis.yaxis)
        for axis, label in zip(axes[1], axis_labels.values(), strict=True):
            axis.set_xlabel(label)
        drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return path
