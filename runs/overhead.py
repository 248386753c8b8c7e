"""What a bridge costs: a training step of each library's own flow, called natively and through the hub.

python runs/overhead.py
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import nflows.flows
import torch
from torch import Tensor, nn

from adapters import as_flow, build_flow, to_library
from adapters.bridges import bridges, installed
from adapters.catalogue import native_flows
from adapters.checks import check_positive
from adapters.flow import StandardNormal
from adapters.masks import checkerboard_mask
from runs.common.command_line import cli
from runs.common.devices import can_fuse, device_of, make_accelerator
from runs.common.options import check_widths
from runs.common.results import open_directory, where, write_metrics
from runs.common.timing import interleaved, ratio


def main(
    features: int = 64,
    layers: int = 8,
    hidden: tuple[int, ...] = (128, 128),
    batch_size: int = 256,
    rounds: int = 100,
    out: Path = Path("results/overhead"),
    device: str = "auto",
) -> dict[str, float]:
    """Time a training step (log_prob, backward, Adam) of every library's flow, natively and as an nflows Flow.

    Both use the same parameters and are timed in turn in one process. Below it the other way: a masked-affine flow
    exported to the library, in the library's own density class, against the same flow in nflows.

    Args:
        features: D.
        layers: layers of each flow.
        hidden: widths of the conditioners' hidden layers.
        batch_size: rows of a batch.
        rounds: timed steps of each.
        out: directory for metrics.json.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
    """
    arguments = dict(locals())
    check_positive(features=features, layers=layers, batch_size=batch_size, rounds=rounds)
    check_widths(hidden=hidden)
    if features == 1:
        raise ValueError("features must be at least 2, not 1: a coupling layer needs a coordinate to read")
    place = make_accelerator(device).device
    open_directory(out)
    torch.manual_seed(0)
    x = torch.randn(batch_size, features).to(place)
    metrics = {}
    print(f"D={features}, {layers} layers, hidden {hidden}, batch {batch_size}, on {where(place)}")
    print("in: the library's flow as an nflows Flow / natively")
    for name, makers in native_flows().items():
        make = next(iter(makers.values()))
        with place:  # what is made without saying where is made there
            mask = checkerboard_mask(features)
            native = make(features, [mask if i % 2 else 1 - mask for i in range(layers)], hidden)
        ours = as_flow(native.flow)
        metrics[f"{name}_in"] = compare(
            name, ours, lambda ours=ours: ours.log_prob(x), lambda native=native: native.log_prob(x), rounds
        )
    print("out: an nflows flow in the library's own density class / in nflows")
    for bridge in filter(installed, bridges()):
        for name in bridge.LIBRARIES:
            flow = build_flow("masked-affine", features, layers=layers, hidden_features=hidden).to(place)
            exported = to_library(name, flow)
            plain = nflows.flows.Flow(flow.transform, StandardNormal([features]).to(place))

            def in_library(exported=exported, bridge=bridge) -> Tensor:
                return bridge.native_log_prob(exported, x)

            metrics[f"{name}_out"] = compare(name, flow, in_library, lambda plain=plain: plain.log_prob(x), rounds)
    write_metrics(out, "overhead", arguments, 0, metrics)
    print(f"figures in {out / 'metrics.json'}")
    return metrics


def compare(name: str, module: nn.Module, log_prob: Callable, peer: Callable, rounds: int) -> float:
    """Median ratio of a training step with ``log_prob`` to one with ``peer``, of the same parameters."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-5, fused=can_fuse(device_of(module)))

    def step(log_prob: Callable) -> None:
        optimizer.zero_grad()
        (-log_prob().mean()).backward()
        optimizer.step()

    times = interleaved({"ours": lambda: step(log_prob), "peer": lambda: step(peer)}, rounds, device_of(module))
    found = ratio(times["ours"], times["peer"])
    print(f"  {name:<12} {found:.3f}   ({statistics.median(times['peer']):.1f} ms)", flush=True)
    return found


if __name__ == "__main__":
    cli(main)
