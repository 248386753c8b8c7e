"""How fast affine coupling layers are: ours and each library's own, natively called, and how they grow.

The yardstick is *bare*: forward, backward and Adam of the packed layers' conditioners alone, on inputs that ask for no
gradient. No coupling layer with these networks can be faster.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adapters.catalogue import native_flows
from adapters.catalogue.specification import NativeFlow
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from runs.common.contestants import OURS, REFERENCE, build
from runs.common.cost import KINDS, TimedFlow, time_kind
from runs.common.pictures.speed import draw_growth
from runs.common.results import where, write_metrics
from runs.common.step import WARMUP
from runs.common.timing import Stopwatch, ratio

WIDTHS = (2, 8, 32, 128, 512, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
BATCH = 128
BARE = "bare conditioners"


def libraries_own() -> dict[str, Callable[..., NativeFlow]]:
    """The libraries' own flows by name, as their authors would build them."""
    return {name: make for flows in native_flows().values() for name, make in flows.items()}


def timed_names(flows: Sequence[str]) -> list[str]:
    """The names of all that are timed: ours, these flows of the catalogue, and the libraries' own."""
    return list(dict.fromkeys((*OURS, *flows, *libraries_own())))


def make_timed(
    names: Sequence[str], features: int, layers: int, hidden: Sequence[int], device: torch.device
) -> dict[str, TimedFlow]:
    """Each of these flows, or the bare conditioners, of that size, with a batch of standard normal rows."""
    made, native = {}, libraries_own()
    with device:  # what is made without saying where is made there
        mask = checkerboard_mask(features)
        masks = [mask if i % 2 else 1 - mask for i in range(layers)]
        for name in names:
            torch.manual_seed(0)
            x = torch.randn(BATCH, features)
            if name in native:
                made[name] = TimedFlow.native(native[name](features, masks, tuple(hidden)), x)
            elif name == BARE:
                made[name] = _bare_conditioners(x, masks, hidden)
            else:
                made[name] = TimedFlow.of(build(name, features, layers, hidden, masks), x)
    return made


def _bare_conditioners(x: Tensor, masks: Sequence[Tensor], hidden: Sequence[int]) -> TimedFlow:
    widths = [(int(mask.sum()), 2 * int((1 - mask).sum())) for mask in masks]
    nets = nn.ModuleList(MLP(read, predicted, hidden) for read, predicted in widths)
    inputs = [x[:, :read].contiguous() for read, _ in widths]
    return TimedFlow(
        nets,
        nets.parameters(),
        lambda: torch.stack([net(part).mean() for net, part in zip(nets, inputs, strict=True)]).sum(),
    )


def measure_speed(
    flows: Sequence[str],
    layers: int,
    hidden: Sequence[int],
    compile: bool,
    out: Path,
    device: torch.device,
    *,
    features: int = 784,
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Print and write the times of all libraries' affine couplings, natively called, and how they grow.

    Args:
        flows: names of the catalogue that are timed beside them.
        layers, hidden: layers, and hidden widths of the conditioners.
        compile: time the step under ``--compile`` too.
        out: directory for metrics.json and the figure.
        device: where to compute.
        features: D of the table.
        widths: D of the figure's left half, at 4 layers of 64×64.
        depths: layers of its right half, at D = 2 and 8×8.
        stopwatch: for how long each kind of call is timed.
    """
    stopwatch = stopwatch or Stopwatch()
    names = timed_names(flows)
    print(f"D={features}, {layers} layers, {'×'.join(map(str, hidden))}, batch {BATCH}, on {where(device)}")
    timed = make_timed([*names, BARE], features, layers, hidden, device)
    metrics: dict[str, Any] = {"table": time_in_turn(timed, device, stopwatch)}
    print(*time_lines(metrics["table"]), sep="\n")
    if compile:
        metrics["compiled"] = time_compiled(timed, device, stopwatch)
        print("", *compiled_lines(metrics["compiled"]), "", sep="\n")
    metrics["width"] = {
        d: time_steps(make_timed(names, d, 4, (64, 64), device), device, stopwatch)
        for d in tqdm(widths, desc="D", leave=False, disable=None)
    }
    metrics["depth"] = {
        n: time_steps(make_timed(names, 2, n, (8, 8), device), device, stopwatch)
        for n in tqdm(depths, desc="layers", leave=False, disable=None)
    }
    few, many = depths[0], depths[-1]
    taken = {n: metrics["depth"][many][n]["ms"] - metrics["depth"][few][n]["ms"] for n in names}
    metrics["per_layer_ms"] = {name: ms / (many - few) for name, ms in taken.items()}
    print(*per_layer_lines(metrics["per_layer_ms"]), sep="\n")
    arguments = {
        "task": "speed", "flows": list(flows), "layers": layers, "hidden": list(hidden), "features": features,
        "device": str(device),
    }  # fmt: skip
    path = write_metrics(out, "speed", arguments, 0, metrics)
    print(f"  {path}\n  {draw_growth(metrics, out)}")
    return metrics


def show_speed(metrics: dict[str, Any], out: Path) -> None:
    """Print the tables of a finished measurement again, and draw its figure again."""
    print(*time_lines(metrics["table"]), sep="\n")
    if "compiled" in metrics:
        print("", *compiled_lines(metrics["compiled"]), "", sep="\n")
    print(*per_layer_lines(metrics["per_layer_ms"]), sep="\n")
    print(f"  {draw_growth(metrics, out)}")


def time_in_turn(
    timed: dict[str, TimedFlow], device: torch.device, stopwatch: Stopwatch
) -> dict[str, dict[str, float]]:
    """For each flow: milliseconds of each kind of call, ratios to the reference and the bare conditioners, and MiB."""
    rows: dict[str, dict[str, float]] = {name: {} for name in timed}
    for kind in KINDS:
        times, failed = time_kind(kind, timed, device, stopwatch)
        if failed:
            name, error = next(iter(failed.items()))
            raise RuntimeError(f"{name}: {kind} fails: {error}") from error
        for name, milliseconds in times.items():
            rows[name][f"{kind}_ms"] = statistics.median(milliseconds)
            rows[name][f"{kind}_ours"] = ratio(times[REFERENCE], milliseconds)
            if kind == "step":
                rows[name]["step_to_bare"] = ratio(milliseconds, times[BARE])
    for name, flow in timed.items():
        rows[name]["memory_mib"] = flow.memory()
    return rows


def time_compiled(timed: dict[str, TimedFlow], device: torch.device, stopwatch: Stopwatch) -> dict[str, dict[str, Any]]:
    """Each flow's step under ``--compile``: its milliseconds, and how it compares with other steps.

    ``to_bare`` and ``ours`` compare with the bare conditioners and with ours, which are compiled, too; they are NaN if
    those can't be compiled. ``to_eager`` compares with the flow's own plain step. All are timed in turn.
    """
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._dynamo.config.patch(cache_size_limit=2 * len(timed)):
        warnings.simplefilter("ignore")
        calls = {}
        for name, flow in timed.items():
            calls |= {name: flow.train().fast_step(), f"{name}, plain": flow.calls["step"]}
        times, failed = stopwatch.measure(calls, device, WARMUP + 1)  # in the last one a graph is recorded
    rows: dict[str, dict[str, Any]] = {}
    for name in timed:
        if name in failed:
            rows[name] = {"failed": type(failed[name]).__name__}
            continue
        each = times[name]
        rows[name] = {"ms": statistics.median(each), "to_eager": ratio(each, times[f"{name}, plain"])}
        rows[name]["to_bare"] = ratio(each, times.get(BARE, [math.nan] * len(each)))
        rows[name]["ours"] = ratio(times.get(REFERENCE, [math.nan] * len(each)), each)
    return rows


def time_steps(timed: dict[str, TimedFlow], device: torch.device, stopwatch: Stopwatch) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step, and its MiB."""
    times, failed = time_kind("step", timed, device, stopwatch)
    if failed:
        raise next(iter(failed.values()))
    return {name: {"ms": statistics.median(each), "mib": timed[name].memory()} for name, each in times.items()}


# The tables, from what is saved


def time_lines(table: dict[str, dict[str, float]]) -> Iterator[str]:
    """Times, and how they compare with the bare conditioners' and with ours."""
    yield (
        f"{'':<25}{'step ms':>9}{'/ bare':>8}{'ours /':>8}"
        + "".join(f"{kind:>9}{'ours /':>8}" for kind in KINDS[1:])
        + "    MiB"
    )
    for name, row in table.items():
        cells = f"{name:<25}{row['step_ms']:>9.2f}{row['step_to_bare']:>8.3f}{row['step_ours']:>8.3f}"
        for kind in KINDS[1:] if name != BARE else ():
            cells += f"{row[f'{kind}_ms']:>9.2f}{row[f'{kind}_ours']:>8.3f}"
        yield cells + f"{row['memory_mib']:>7.1f}" * (name != BARE)


def compiled_lines(compiled: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Steps under ``--compile``."""
    yield f"{'--compile':<25}{'step ms':>9}{'/ bare':>8}{'ours /':>8}{'/ eager':>9}"
    for name, row in compiled.items():
        if "failed" in row:
            yield f"{name:<25}can't be had: {row['failed']}"
        else:
            yield f"{name:<25}{row['ms']:>9.2f}{row['to_bare']:>8.3f}{row['ours']:>8.3f}{row['to_eager']:>9.3f}"


def per_layer_lines(per_layer: dict[str, float]) -> Iterator[str]:
    """What one more layer costs."""
    yield f"{'per layer at D=2, ms':<25}{'step':>9}{'ours /':>8}"
    for name, ms in per_layer.items():
        yield f"{name:<25}{ms:>9.3f}{per_layer[REFERENCE] / ms:>8.3f}"
