"""Fit a flow to one of the exercise's two toy densities, and show how well it did.

python runs/toy.py
python runs/toy.py --data chequerboard --flow masked-spline
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adapters import build_flow, save_flow
from adapters.catalogue import flow_options
from adapters.checks import check_positive
from adapters.flow import Flow
from runs.common import figures
from runs.common.densities import DENSITIES, Density, divergence
from runs.common.devices import device_of, make_accelerator
from runs.common.fit import Fitted, NotFinite, Recipe, check_resumable, fit
from runs.common.results import (
    check_flow,
    check_seed,
    check_widths,
    cli,
    open_directory,
    parameter_count,
    to_plain,
    write_metrics,
)

TEST_POINTS = 100_000
# Arguments that a resumed training may change: they don't touch the weights, or their rounding alone.
FREE = ("out", "animate", "resume", "device", "compile")

AFFINE = {
    "two-gaussians": {"layers": 12, "hidden": (32, 32), "steps": 4000, "options": {}},
    "chequerboard": {"layers": 12, "hidden": (64, 64, 64), "steps": 12_000, "options": {}},
}
SPLINE = {"layers": 4, "hidden": (128, 128, 128), "steps": 8000, "options": {"bins": 16, "minimum": 1e-5}}


def defaults(data: str, flow: str) -> dict:
    """What each kind of flow needs, chosen by its KL on fresh points.

    Affine maps want layers, the more the harder the density. Splines want few layers, deep networks, many bins, and no
    minimum that would blunt an edge or fill a gap.
    """
    known = flow_options(flow)
    if "bins" not in known:
        return AFFINE[data]
    return SPLINE | {"options": {key: value for key, value in SPLINE["options"].items() if key in known}}


class NegativeLogLikelihood(nn.Module):
    """−mean log p(x) in nats: what maximum likelihood minimises."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def main(
    data: str = "two-gaussians",
    flow: str = "masked-affine",
    layers: int | None = None,
    hidden: tuple[int, ...] | None = None,
    steps: int | None = None,
    batch_size: int = 1024,
    lr: float = 5e-3,
    options: dict[str, int | float] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    out: Path | None = None,
    animate: bool = False,
    resume: bool = False,
    device: str = "auto",
    compile: bool = False,
) -> dict[str, float]:
    """Fit a flow to a toy density by maximum likelihood on fresh samples.

    Args:
        data: two-gaussians or chequerboard.
        flow: any name of adapters.flow_names(), e.g. masked-affine, masked-spline, nflows-rqs.
        layers: layers of the flow; where the default is None, it is what suits the density and the kind of flow.
        hidden: widths of the hidden layers of each layer's networks.
        steps: optimiser steps.
        batch_size: fresh samples a step.
        lr: peak learning rate.
        options: what this kind of flow has beyond that, e.g. --options bins 16 tail_bound 5.
        seconds: end after so much training time instead, if that comes first; the schedule is shortened to match.
        seed: of weights and samples.
        out: directory for metrics, pictures and checkpoint; by default results/toy/DATA-FLOW.
        animate: also draw the density forming, as a GIF.
        resume: go on with the training in that directory, after a crash or Ctrl-C.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
        compile: make the training step faster by torch.compile and, on CUDA, by one graph of the whole step.
    """
    arguments = dict(locals())
    if data not in DENSITIES:
        raise ValueError(f"unknown data {data!r}; known: {', '.join(DENSITIES)}")
    check_flow(flow, options)
    check_widths(hidden=hidden)
    check_seed(seed)
    arguments |= {key: value for key, value in defaults(data, flow).items() if arguments[key] is None}
    layers, hidden, steps, options = (arguments[key] for key in ("layers", "hidden", "steps", "options"))
    check_positive(batch_size=batch_size)
    recipe = Recipe(steps=steps, lr=lr, betas=(0.9, 0.99), average=0.999, seconds=seconds, compile=compile)
    accelerator = make_accelerator(device)
    true = DENSITIES[data](accelerator.device)
    torch.manual_seed(seed)
    model = build_flow(flow, 2, layers=layers, hidden_features=hidden, preprocess=true.preprocess(), **options)
    model = model.to(accelerator.device)
    out = out or Path("results/toy") / f"{data}-{flow}"
    if resume:
        check_resumable(out)
    out = open_directory(out)
    parameters = parameter_count(model)
    print(f"{flow}: {layers} layers, {parameters:,} parameters, on {data}, on {accelerator.device}")

    frames: list[Tensor] = []
    try:
        fitted = fit(
            NegativeLogLikelihood(model),
            lambda step: true.sample(batch_size),
            recipe,
            describe="NLL {:.4f} nats".format,
            observe=_camera(model, frames, steps) if animate else None,
            directory=out,
            resume=resume,
            identity=to_plain({name: value for name, value in arguments.items() if name not in FREE}),
            accelerator=accelerator,
        )
    except NotFinite as error:
        raise NotFinite(f"{error}. They are saved in {save_flow(model, out)}") from error
    model.eval()
    save_flow(model, out)
    metrics = evaluate(model, true) | {
        "parameters": parameters,
        "steps": fitted.steps,
        "train_seconds": round(fitted.seconds, 2),
    }
    if fitted.interrupted:
        metrics["interrupted"] = True
    pictures = draw(model, true, fitted, out)
    if animate:
        frames.append(on_grid(model, 150))  # the end, and all there is after a resumed run that was done
        pictures.append(_film(frames, true, out))
    write_metrics(out, "toy", arguments, seed, metrics)
    print(
        f"nll {metrics['nll']:.4f}   nll_floor {metrics['nll_floor']:.4f}   "
        f"kl {metrics['kl']:.5f} ± {metrics['kl_stderr']:.5f} nats   ({fitted.seconds:.0f} s of training)"
    )
    print(f"round trip: median {metrics['round_trip']:.1e}, worst of {TEST_POINTS:,} {metrics['round_trip_worst']:.1e}")
    print("\n".join(f"  {path}" for path in pictures))
    return metrics


@torch.no_grad()
def evaluate(flow: Flow, true: Density) -> dict[str, float]:
    """KL(true ‖ flow) and the NLL on fresh points, in nats, and the error of x → noise → x.

    nll = entropy + kl.
    """
    points = true.sample(TEST_POINTS)
    kl, stderr = divergence(true, flow.log_prob, points)
    errors = []
    for x in points.split(10_000):
        errors.append((flow.decode(flow.encode(x)) - x).abs().amax(1))
    error = torch.cat(errors).cpu()
    return {
        "nll": true.entropy + kl,
        "nll_floor": true.entropy,
        "kl": kl,
        "kl_stderr": stderr,
        "round_trip": error.median().item(),
        "round_trip_worst": error.max().item(),
    }


def draw(flow: Flow, true: Density, fitted: Fitted, out: Path) -> list[Path]:
    """The densities and samples side by side, and the training curve."""
    top = on_grid(true).max()
    densities = out / "densities.png"
    with figures.figure(densities, 2, 2, size=(6.6, 6)) as (drawing, axes):
        figures.density(axes[0, 0], on_grid(true), top, "true density")
        image = figures.density(axes[0, 1], on_grid(flow), top, "learned density")
        drawing.colorbar(image, ax=axes[0], shrink=0.85, label="density")
        with torch.no_grad():
            figures.scatter(axes[1, 0], true.sample(6000).cpu().numpy(), "samples of the true density")
            figures.scatter(axes[1, 1], flow.sample(6000).cpu().numpy(), "samples of the flow")
    training = out / "training.png"
    with figures.figure(training, size=(6, 3)) as (_, axes):
        steps, losses = zip(*fitted.losses, strict=True) if fitted.losses else ((0,), (true.entropy,))
        figures.curve(axes, steps, losses, smooth=min(9, 1 + len(losses) // 3), label="training NLL")
        axes.axhline(true.entropy, color=figures.ACCENT, linewidth=1, linestyle="--", label="entropy: the floor")
        lowest, highest = np.quantile(losses, [0, 0.98])
        margin = 0.1 * (highest - true.entropy)
        axes.set(xlabel="step", ylabel="NLL (nats)", ylim=(min(lowest, true.entropy) - margin, highest + margin))
        axes.legend()
    return [densities, training]


@torch.no_grad()
def on_grid(density: Flow | Density, size: int = 250) -> np.ndarray:
    """The density at the centres of a ``size × size`` grid over (0, 1)²."""
    centre = (torch.arange(size) + 0.5) / size
    x, y = torch.meshgrid(centre, centre, indexing="xy")
    points = torch.stack((x.flatten(), y.flatten()), 1).to(device_of(density))
    return density.log_prob(points).exp().view(size, size).cpu().numpy()


def _camera(flow: Flow, frames: list[np.ndarray], steps: int, count: int = 60):
    """An observer that takes ``count`` pictures of the learned density, early ones closer together."""
    when = {round((i / count) ** 2 * steps) for i in range(count)}

    def observe(step: int) -> None:
        if step in when:
            training = flow.training
            frames.append(on_grid(flow.eval(), 150))
            flow.train(training)

    return observe


def _film(frames: list[np.ndarray], true: Density, out: Path) -> Path:
    path = out / "forming.gif"
    figures.save_animation(path, frames, on_grid(true).max())
    return path


if __name__ == "__main__":
    cli(main)
