"""What a bridge costs: a training step of each library's own flow, called natively and through the hub.

python runs/overhead.py                 each library's step through its bridge, as a multiple of its native one
python runs/overhead.py --rounds 10     a quick look
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapters import as_flow, build_flow, to_library
from adapters.bridges import bridges, installed
from adapters.catalogue import native_flows
from adapters.checks import check_positive
from adapters.flow import StandardNormal
from adapters.masks import checkerboard_mask
from runs.common.command_line import cli
from runs.common.devices import choose_device, make_accelerator
from runs.common.options import Checked, check_widths, flat
from runs.common.results import open_directory, to_plain, where, write_metrics
from runs.common.timing import interleaved, ratio, training_step


@dataclass(frozen=True)
class SizeOptions(Checked):
    """How large the flows are, and how long they are timed."""

    features: int = 64
    """D, how many numbers a row of the data has."""

    layers: int = 8
    """layers of each flow."""

    hidden: tuple[int, ...] = (128, 128)
    """widths of the conditioners' hidden layers."""

    batch_size: int = 256
    """rows of a batch."""

    rounds: int = 100
    """timed steps of each flow."""

    def check(self) -> None:
        check_positive(features=self.features, layers=self.layers, batch_size=self.batch_size, rounds=self.rounds)
        check_widths(hidden=self.hidden)
        if self.features == 1:
            raise ValueError("features must be at least 2, not 1: a coupling layer needs a coordinate to read")


@dataclass(frozen=True)
class PlaceOptions(Checked):
    """Where the flows compute, and where the figures are."""

    out: Path = Path("results/overhead")
    """directory for metrics.json."""

    device: str = "auto"
    """where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …"""

    def check(self) -> None:
        choose_device(self.device)


@dataclass(frozen=True)
class Options(Checked):
    """Everything that can be asked for."""

    size: SizeOptions = field(default_factory=SizeOptions)
    place: PlaceOptions = field(default_factory=PlaceOptions)


class Pair(NamedTuple):
    """Two ways to score the same batch by the same parameters.

    Attributes:
        library: whose bridge is between the two.
        module: holds the parameters.
        bridged: log_prob through the bridge.
        direct: log_prob without it.
    """

    library: str
    module: nn.Module
    bridged: Callable[[], Tensor]
    direct: Callable[[], Tensor]


def main(options: Options) -> dict[str, float]:
    """Time a training step of every library's flow, natively and as an nflows Flow.

    A step is log_prob, backward and Adam's. Both use the same parameters and are timed in turn in one process. Below it
    the other way: a masked-affine flow exported to the library, in the library's own density class, against the same
    flow in nflows.
    """
    size, out = options.size, options.place.out
    device = make_accelerator(options.place.device).device
    open_directory(out)
    torch.manual_seed(0)
    x = torch.randn(size.batch_size, size.features).to(device)
    print(f"D={size.features}, {size.layers} layers, hidden {size.hidden}, batch {size.batch_size}, on {where(device)}")
    metrics = {}
    print("in: the library's flow as an nflows Flow / natively")
    for pair in imported(size, x):
        metrics[f"{pair.library}_in"] = compare(pair, size.rounds, device)
    print("out: an nflows flow in the library's own density class / in nflows")
    for pair in exported(size, x):
        metrics[f"{pair.library}_out"] = compare(pair, size.rounds, device)
    write_metrics(out, "overhead", to_plain(flat(options)), 0, metrics)
    print(f"figures in {out / 'metrics.json'}")
    return metrics


def imported(size: SizeOptions, x: Tensor) -> Iterator[Pair]:
    """Each library's own flow as an nflows Flow, and natively."""
    for name, makers in native_flows().items():
        make = next(iter(makers.values()))
        with x.device:  # what is made without saying where is made there
            mask = checkerboard_mask(size.features)
            native = make(size.features, [mask if i % 2 else 1 - mask for i in range(size.layers)], size.hidden)
        flow = as_flow(native.flow)
        yield Pair(name, flow, partial(flow.log_prob, x), partial(native.log_prob, x))


def exported(size: SizeOptions, x: Tensor) -> Iterator[Pair]:
    """A flow of ours in each library's own density class, and in nflows."""
    from nflows.flows import Flow as NflowsFlow  # after adapters, which imports it without matplotlib

    for bridge in filter(installed, bridges()):
        for name in bridge.LIBRARIES:
            flow = build_flow("masked-affine", size.features, layers=size.layers, hidden_features=size.hidden)
            flow.to(x.device)
            library_flow = to_library(name, flow)
            plain = NflowsFlow(flow.transform, StandardNormal([size.features]).to(x.device))
            yield Pair(name, flow, partial(bridge.native_log_prob, library_flow, x), partial(plain.log_prob, x))


def compare(pair: Pair, rounds: int, device: torch.device) -> float:
    """Median ratio of a training step through the bridge to one without it."""
    parameters = list(pair.module.parameters())
    steps = {name: training_step(parameters, loss_of(getattr(pair, name))) for name in ("bridged", "direct")}
    times = interleaved(steps, rounds, device)
    found = ratio(times["bridged"], times["direct"])
    print(f"  {pair.library:<12} {found:.3f}   ({statistics.median(times['direct']):.1f} ms)", flush=True)
    return found


def loss_of(log_prob: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """−mean log p."""
    return lambda: -log_prob().mean()


if __name__ == "__main__":
    cli(main, Options)
