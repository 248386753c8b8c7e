"""Hand-written and library flows on one task, each held to the same gates and given the same budget, in one table.

python runs/compare.py --task chequerboard
python runs/compare.py --task vae-prior --flows masked-affine nflows-affine zuko-realnvp --budget 120
python runs/compare.py --flows my_module:my_flow masked-affine    your own flow, beside the rest
python runs/compare.py --task speed    no training: training steps against the conditioners' own
python runs/compare.py --load results/compare/chequerboard    draw that comparison's table and pictures again
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adapters import flow_names
from adapters.checks import check_positive
from runs.common.command_line import cli
from runs.common.comparison import Comparison, Effort, make_recipe, parse_budget
from runs.common.contestants import WIDEST, check_contestants
from runs.common.devices import make_accelerator
from runs.common.fit import fit
from runs.common.options import (
    Checked,
    Deciding,
    RunOptions,
    check_at_most,
    check_known,
    check_load,
    check_widths,
    identity,
)
from runs.common.pictures import compare as pictures
from runs.common.results import newest_run, open_directory, read_metrics, where
from runs.common.speed import measure_speed, show_speed
from runs.common.table import REPORT, TABLE, Row, Table
from runs.common.tasks import IMAGE_TASKS, TASKS, make_task
from runs.common.training_state import Fitted

RESULTS = Path("results/compare")
SPEED = "speed"
MATCHES = ("width", "parameters")


@dataclass(frozen=True)
class EqualOptions(Deciding):
    """What is equal for all flows. A comparison is resumed with the same of these."""

    task: str = "chequerboard"
    """two-gaussians, chequerboard, mnist, vae-prior, npe or npe-gaussian, or speed, which trains nothing."""

    budget: str = "30s"
    """of each training: 30s for so many seconds, or 2000steps."""

    match: str = "width"
    """width, all with the same hidden widths, or parameters, all with as many as masked-affine, within 2 %."""

    layers: int | None = None
    """layers of each flow; by default the task's own number."""

    hidden: tuple[int, ...] | None = None
    """hidden widths of the networks in each layer; by default the task's own."""

    limit: int | None = None
    """use only so many images, for a quick look."""

    def check(self) -> None:
        check_known((*TASKS, SPEED), task=self.task)
        check_known(MATCHES, match=self.match)
        parse_budget(self.budget)
        check_widths(hidden=self.hidden)
        check_at_most(WIDEST, **{f"hidden[{i}]": width for i, width in enumerate(self.hidden or ())})
        if self.layers is not None:
            check_positive(layers=self.layers)
            check_at_most(1000, layers=self.layers)
        if self.limit is not None:
            check_positive(limit=self.limit)
            check_has_images(self.task, "limit")
            if self.limit < (batch := TASKS[self.task].batch_size):
                raise ValueError(f"limit must be at least {batch}, the images of a batch, not {self.limit}")


@dataclass(frozen=True)
class ContestantOptions(Checked):
    """Who takes part, and how often. A resumed comparison may change this: the rows that are done stay as they are."""

    flows: tuple[str, ...] = ()
    """names of adapters.flow_names(), and your own as my_module:my_flow; by default the whole catalogue."""

    seeds: int = 1
    """trainings of each flow."""

    def check(self) -> None:
        check_positive(seeds=self.seeds)
        check_at_most(1000, seeds=self.seeds)
        check_contestants(self.flows)


@dataclass(frozen=True)
class CompareRunOptions(RunOptions):
    """Where a comparison computes, and where its data and results are."""

    out: Path | None = None
    """directory for compare.md, compare.json and figures; by default results/compare/TASK."""

    resume: bool = False
    """keep the rows that are done in that directory, after a crash or Ctrl-C, and try again those that failed."""

    load: Path | None = None
    """train nothing; draw the table and the pictures in this directory again, there or in --out."""

    compile: bool = False
    """train under torch.compile and, on CUDA, by one graph of the whole step, and time that step beside the plain one;
    the compiler takes about a minute a flow, which is not counted."""

    data_dir: Path | None = None
    """where MNIST is unpacked; by default the user's cache."""


@dataclass(frozen=True)
class Options(Checked):
    """Everything that a comparison can be asked for."""

    equal: EqualOptions = field(default_factory=EqualOptions)
    contestants: ContestantOptions = field(default_factory=ContestantOptions)
    run: CompareRunOptions = field(default_factory=CompareRunOptions)

    def check(self) -> None:
        if self.run.load is not None:
            check_load(self, "load", "out")
        if self.run.data_dir is not None:
            check_has_images(self.equal.task, "data_dir")
        if self.run.resume and self.equal.task == SPEED:
            raise ValueError("--resume: speed has no rows to keep; run it again without")


def check_has_images(task: str, option: str) -> None:
    """Raise a ValueError if that option is given to a task that has no images."""
    if task not in IMAGE_TASKS:
        raise ValueError(f"{option} is of the images of {' and '.join(IMAGE_TASKS)}; {task} has none: leave it out")


def main(
    options: Options, *, effort: Effort | None = None, fit: Callable[..., Fitted] = fit, draw: bool = True
) -> dict[str, Any]:
    """Train every flow alike, check it, time it beside the others, and rank those that pass.

    Args:
        options: what the command line asks for.
        effort: how thoroughly flows are measured.
        fit: trains one flow.
        draw: whether to draw the pictures.
    """
    equal, run = options.equal, options.run
    if run.load is not None:
        return show_again(run.load, run.out)
    accelerator = make_accelerator(run.device)
    device, out = accelerator.device, run.out or RESULTS / equal.task
    effort = effort or Effort()
    if equal.task == SPEED:
        size = equal.layers or 8, equal.hidden or (256, 256)
        flows = options.contestants.flows
        return measure_speed(flows, *size, run.compile, open_directory(out), device, stopwatch=effort.stopwatch)
    arguments = json.loads(json.dumps(identity(options))) | {"compile": run.compile, "device": str(device)}
    table = Table.resume(out, arguments) if run.resume else Table(arguments)
    task = make_task(equal.task, device, effort.test_points, run.data_dir, equal.limit)
    layers, hidden = equal.layers or task.layers, equal.hidden or task.hidden
    names, seeds = list(dict.fromkeys(options.contestants.flows or flow_names())), options.contestants.seeds
    print(
        f"{equal.task}: {len(names)} flows, {seeds} seed{'s' * (seeds > 1)} of {equal.budget} each, {layers} layers of "
        f"{'×'.join(map(str, hidden))}, {equal.match} matched, on {where(device)}"
    )
    comparison = Comparison(task, table, layers, hidden, open_directory(out), accelerator, effort)
    comparison.prepare(names, equal.match == "parameters")
    comparison.time(names, run.compile)

    print(table.header())
    recipe = make_recipe(type(task), equal.budget, run.compile)
    for name in tqdm(names, unit="flow", dynamic_ncols=True, disable=None):
        for seed in range(seeds):
            comparison.train(name, seed, recipe, fit)
        tqdm.write(table.line(name))
    table.save(out)
    show(table, names, out, out, draw)
    if not any(table.scored(name) for name in names):
        raise RuntimeError(f"no flow has a score: {out / REPORT} says why of each")
    return {name: table.rows[name] for name in names}


def show(table: Table, names: list[str], directory: Path, out: Path, draw: bool = True) -> None:
    """Print and write the ranking of these flows, and draw the pictures."""
    written = [table.report(names, out), directory / TABLE]
    if draw:
        written += pictures.draw(table, names, directory, out)
    print("\n".join(f"  {path}" for path in written))


def show_again(load: Path, out: Path | None) -> dict[str, Row]:
    """The same from a finished or interrupted comparison, in ``load`` or the newest one right below it."""
    directory = newest_run(load, TABLE, "metrics.json")
    if (directory / TABLE).is_file():
        table = Table.load(directory)
        show(table, list(table.rows), directory, open_directory(out or directory))
    elif (directory / "metrics.json").is_file():
        show_speed(read_metrics(directory, SPEED), open_directory(out or directory))
    else:
        raise FileNotFoundError(f"no {TABLE} in {load}: give the directory of a comparison")
    return {}


if __name__ == "__main__":
    cli(main, Options)
