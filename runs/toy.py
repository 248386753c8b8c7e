"""Fit a flow to one of the exercise's two toy densities, and show how well it did.

python runs/toy.py                                              exercise 2.4, under half a minute of training
python runs/toy.py --data chequerboard --flow masked-spline     its optional part: KL 0.0042 nats, 3 min
python runs/toy.py --flow my_layer.py:MyLayer --steps 200       your own layer; a quick look, seconds
python runs/toy.py --load results/toy                           draw the pictures of the newest run again
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters import save_flow
from adapters.catalogue import flow_options
from runs.common.command_line import cli
from runs.common.densities import DENSITIES
from runs.common.devices import make_accelerator
from runs.common.fit import fit
from runs.common.objectives import NegativeLogLikelihood
from runs.common.options import (
    Checked,
    Deciding,
    FlowOptions,
    NamesAndValues,
    RunOptions,
    TrainingOptions,
    check_known,
    check_load,
    flat,
    identity,
)
from runs.common.pictures.record import draw_again
from runs.common.pictures.toy import Camera, ToyRecord
from runs.common.results import parameter_count, replacing_results, write_metrics
from runs.common.scores import TEST_POINTS, score_density

RESULTS = Path("results/toy")
LEAST_POINTS = 10_000  # for the score: a tenth of those that the training has seen, but no fewer
AFFINE = {
    "two-gaussians": {"layers": 12, "hidden": (32, 32), "steps": 4000, "options": {}},
    "chequerboard": {"layers": 12, "hidden": (64, 64, 64), "steps": 12_000, "options": {}},
}
SPLINE = {"layers": 4, "hidden": (128, 128, 128), "steps": 8000, "options": {"bins": 16, "minimum": 1e-5}}


@dataclass(frozen=True)
class DensityOptions(Deciding):
    """What is to be learned."""

    data: str = "two-gaussians"
    """two-gaussians or chequerboard, the exercise's figure 1."""

    def check(self) -> None:
        check_known(DENSITIES, data=self.data)


@dataclass(frozen=True)
class ToyFlowOptions(FlowOptions):
    """Which flow is trained, and how large it is. What is None becomes what suits the density and the kind of flow."""

    layers: int | None = None
    """layers of the flow; by default 12, and 4 for flows with bins. What else is None is chosen likewise."""

    options: NamesAndValues = None
    """what this kind of flow has beyond that, e.g. --options bins 16 tail_bound 5."""


@dataclass(frozen=True)
class ToyTrainingOptions(TrainingOptions):
    """How the weights are trained."""

    steps: int | None = None
    """optimiser steps; by default 4,000 or, on the chequerboard, 12,000, and 8,000 for flows with bins."""

    batch_size: int = 1024
    """fresh samples a step."""

    lr: float = 5e-3
    """peak learning rate of the optimiser."""

    seed: int = 0
    """the seed of weights and samples."""


@dataclass(frozen=True)
class ToyRunOptions(RunOptions):
    """Where a run computes, and where its results are. None of this changes what is learned."""

    out: Path | None = None
    """directory for metrics, pictures and checkpoint; by default results/toy/DATA-FLOW."""

    animate: bool = False
    """also draw the density forming, as a GIF."""


@dataclass(frozen=True)
class Options(Checked):
    """Everything that a run can be asked for."""

    density: DensityOptions = field(default_factory=DensityOptions)
    flow: ToyFlowOptions = field(default_factory=ToyFlowOptions)
    training: ToyTrainingOptions = field(default_factory=ToyTrainingOptions)
    run: ToyRunOptions = field(default_factory=ToyRunOptions)

    def check(self) -> None:
        if self.run.load is not None:
            check_load(self, "load", "out")

    def completed(self) -> "Options":
        """The same, with what each kind of flow needs, chosen by its KL on fresh points, in place of None.

        Affine maps want layers, the more the harder the density. Splines want few layers, deep networks, many bins, and
        no minimum that would blunt an edge or fill a gap.
        """
        known = flow_options(self.flow.flow)
        suited: dict[str, Any] = SPLINE if "bins" in known else AFFINE[self.density.data]
        suited = suited | {"options": {name: value for name, value in suited["options"].items() if name in known}}

        def complete(group: Any) -> Any:
            missing = {name: suited[name] for name, value in vars(group).items() if value is None and name in suited}
            return replace(group, **missing)

        return replace(self, flow=complete(self.flow), training=complete(self.training))


def main(options: Options, *, test_points: int = TEST_POINTS, draw: bool = True) -> dict[str, float]:
    """Fit a flow to a toy density by maximum likelihood on fresh samples.

    Args:
        options: what the command line asks for.
        test_points: fresh points that the score is taken on, at most: a short training is scored on fewer.
        draw: whether to draw the pictures.
    """
    if options.run.load is not None:
        draw_again(ToyRecord, options.run)
        return {}
    options = options.completed()
    recipe = options.training.recipe(options.run, betas=(0.9, 0.99), average=0.999)
    options.flow.try_own(2)
    accelerator = make_accelerator(options.run.device)
    true = DENSITIES[options.density.data](accelerator.device)
    torch.manual_seed(options.training.seed)
    flow = options.flow.build(2, preprocess=true.preprocess()).to(accelerator.device)
    out = options.run.directory(RESULTS / f"{options.density.data}-{options.flow.file_name()}")
    print(
        f"{options.flow.flow}: {options.flow.layers} layers, {parameter_count(flow):,} parameters, "
        f"on {options.density.data}, on {accelerator.device}"
    )

    camera = Camera(flow, recipe.steps) if options.run.animate else None
    fitted = fit(
        NegativeLogLikelihood(flow),
        lambda step: true.sample(options.training.batch_size),
        recipe,
        describe="NLL {:.4f} nats".format,
        observe=camera,
        directory=out,
        resume=options.run.resume,
        identity=identity(options),
        save_weights=lambda: replacing_results(save_flow(flow, out), out),
        accelerator=accelerator,
    )
    replacing_results(save_flow(flow.eval(), out), out)

    seen = fitted.steps * options.training.batch_size
    test_points = min(test_points, max(LEAST_POINTS, seen // 10))
    metrics = score_density(flow, true, test_points) | {"parameters": parameter_count(flow)} | fitted.metrics()
    write_metrics(out, "toy", flat(options), options.training.seed, metrics)
    print(
        f"nll {metrics['nll']:.4f}   nll_floor {metrics['nll_floor']:.4f}   "
        f"kl {metrics['kl']:.5f} ± {metrics['kl_stderr']:.5f} nats   ({fitted.seconds:.0f} s of training)\n"
        f"round trip: median {metrics['round_trip']:.1e}, worst {metrics['round_trip_worst']:.1e}   "
        f"(all of it on {test_points:,} fresh points{', as suits so short a training' * (test_points < TEST_POINTS)})"
    )

    if metrics["kl"] < -5 * metrics["kl_stderr"]:
        print(f"a KL below 0 can't be: log_prob is no density. Why? python -m adapters.check {options.flow.flow}")
    if camera is not None:
        camera.take()  # the end, and all there is after a resumed run that was done
    record = ToyRecord.of(flow, true, fitted.losses, [] if camera is None else camera.frames)
    record.save(out)
    if draw:
        print("\n".join(f"  {path}" for path in record.draw(out)))
    if not fitted.interrupted:
        options.run.remove_states(out)
    return metrics


if __name__ == "__main__":
    cli(main, Options)
