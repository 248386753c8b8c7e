"""What a bridge costs: a training step of each library's own flow, called natively and through the hub.

python runs/overhead.py
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import nflows.flows
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from adapters import as_flow, build_flow, to_library
from adapters.bridges import bridges
from adapters.bridges.nflows import nflows_mask
from adapters.bridges.zuko import import_zuko
from adapters.checks import check_positive
from adapters.flow import StandardNormal
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from runs.common.results import cli, open_directory, versions, write_metrics
from runs.common.timing import interleaved, ratio


def main(
    features: int = 64,
    layers: int = 8,
    hidden: tuple[int, ...] = (128, 128),
    batch_size: int = 256,
    rounds: int = 100,
    out: Path = Path("results/overhead"),
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
    """
    arguments = dict(locals())
    check_positive(features=features, layers=layers, batch_size=batch_size, rounds=rounds)
    open_directory(out)
    torch.manual_seed(0)
    x = torch.randn(batch_size, features)
    masks = [checkerboard_mask(features) if i % 2 else 1 - checkerboard_mask(features) for i in range(layers)]
    metrics = {}
    print(f"D={features}, {layers} layers, hidden {hidden}, batch {batch_size}, {torch.get_num_threads()} threads")
    print("in: the library's flow as an nflows Flow / natively")
    for name, make in NATIVE.items():
        flow, log_prob = make(features, masks, hidden)
        ours = as_flow(flow)
        metrics[f"{name}_in"] = compare(name, ours, lambda ours=ours: ours.log_prob(x), lambda f=log_prob: f(x), rounds)
    print("out: an nflows flow in the library's own density class / in nflows")
    for bridge in bridges():
        for name in bridge.LIBRARIES:
            flow = build_flow("masked-affine", features, layers=layers, hidden_features=hidden)
            exported = to_library(name, flow._transform)
            plain = nflows.flows.Flow(flow._transform, StandardNormal([features]))

            def native(exported=exported, bridge=bridge) -> Tensor:
                return bridge.native_log_prob(exported, x)

            metrics[f"{name}_out"] = compare(name, flow, native, lambda plain=plain: plain.log_prob(x), rounds)
    write_metrics(out, "overhead", arguments, 0, metrics)
    print(f"processor {versions()['processor']}; figures in {out / 'metrics.json'}")
    return metrics


def compare(name: str, module: nn.Module, log_prob: Callable, peer: Callable, rounds: int) -> float:
    """Median ratio of a training step with ``log_prob`` to one with ``peer``, of the same parameters."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-5, fused=True)

    def step(log_prob: Callable) -> None:
        optimizer.zero_grad()
        (-log_prob().mean()).backward()
        optimizer.step()

    times = interleaved({"ours": lambda: step(log_prob), "peer": lambda: step(peer)}, rounds)
    found = ratio(times["ours"], times["peer"])
    print(f"  {name:<12} {found:.3f}   ({statistics.median(times['peer']):.1f} ms)", flush=True)
    return found


def normflows_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]):
    from normflows import NormalizingFlow
    from normflows.distributions import DiagGaussian
    from normflows.flows import MaskedAffineFlow

    layers = [MaskedAffineFlow(m, MLP(features, features, hidden), MLP(features, features, hidden)) for m in masks]
    flow = NormalizingFlow(DiagGaussian(features, trainable=False), layers)
    return flow, flow.log_prob


def zuko_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]):
    flow = import_zuko().flows.RealNVP(features, transforms=len(masks), hidden_features=hidden)
    return flow, lambda x: flow().log_prob(x)


def pyro_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]):
    import pyro.distributions as dist
    from pyro.distributions.transforms import Permute, affine_coupling

    transforms = []
    for _ in masks:
        transforms += [affine_coupling(features, hidden_dims=list(hidden)), Permute(torch.arange(features).flip(0))]
    base = Independent(Normal(torch.zeros(features), torch.ones(features)), 1)
    flow = dist.TransformedDistribution(base, transforms)

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()  # what every training loop in Pyro has to do
        return flow.log_prob(x)

    return flow, log_prob


def freia_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]):
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import RNVPCouplingBlock

    flow = SequenceINN(features)
    for _ in masks:
        flow.append(RNVPCouplingBlock, subnet_constructor=lambda i, o: MLP(i, o, hidden))
    base = StandardNormal([features])

    def log_prob(x: Tensor) -> Tensor:
        noise, log_det = flow(x)
        return base.log_prob(noise) + log_det

    return flow, log_prob


def nflows_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]):
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    layers = [AffineCouplingTransform(nflows_mask(mask), lambda i, o: MLP(i, o, hidden)) for mask in masks]
    flow = nflows.flows.Flow(CompositeTransform(layers), StandardNormal([features]))
    return flow, flow.log_prob


NATIVE = {
    "nflows": nflows_flow,
    "normflows": normflows_flow,
    "zuko": zuko_flow,
    "pyro": pyro_flow,
    "freia": freia_flow,
}

if __name__ == "__main__":
    cli(main)
