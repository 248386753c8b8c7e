"""Hand-written and library flows on one task, each held to the same gates and given the same budget, in one table.

python runs/compare.py                                          21 flows on the chequerboard, 30 s each: 14 min
python runs/compare.py --flows my_layer.py:MyLayer masked-affine --budget 100steps    your own layer; a quick look
python runs/compare.py --task all --seeds 5 --budget 3s 10s     every task, with the ranks' uncertainty: 2 h
python runs/compare.py --task all --seeds 5 --budget 3s 10s --resume    go on with it after an interruption
python runs/compare.py --task vae-prior --flows masked-affine zuko-realnvp --budget 120s    as priors of a VAE
python runs/compare.py --task speed                             no training: steps against the networks' own
python runs/compare.py --load results/compare/chequerboard      draw that comparison's table and pictures again
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from adapters import flow_names
from adapters.checks import check_positive
from adapters.own import DIRECTIONS
from runs.common.command_line import cli
from runs.common.comparison import Comparison, Effort, counts_cpu_time, parse_budgets
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
from runs.common.results import claimed, open_directory, read_metrics, where
from runs.common.speed import measure_speed, show_speed
from runs.common.table import REPORT, TABLE, Row, Table
from runs.common.tasks import DENSITY_TASKS, IMAGE_TASKS, TASKS, make_task
from runs.common.training_state import Fitted

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

RESULTS = Path("results/compare")
SPEED, ALL = "speed", "all"
MATCHES = ("width", "parameters")


@dataclass(frozen=True)
class EqualOptions(Deciding):
    """What is equal for all flows. A comparison is resumed with the same of these."""

    task: str = "chequerboard"
    """two-gaussians, chequerboard, mnist, vae-prior, or all of these; npe or npe-gaussian (posteriors, with sbi); or
    speed, which trains nothing."""

    budget: tuple[str, ...] = ("30s",)
    """of each training: 30s for so many seconds, or 2000steps; several, as in --budget 3s 10s, for trainings of each.
    On a single thread of a CPU (OMP_NUM_THREADS=1) seconds are of CPU time, which other processes don't take away."""

    match: str = "width"
    """width, all with the same hidden widths, or parameters, all with as many as masked-affine, within 2 %."""

    layers: int | None = None
    """layers of each flow; by default the task's own number."""

    hidden: tuple[int, ...] | None = None
    """hidden widths of the networks in each layer; by default the task's own."""

    limit: int | None = None
    """use only so many images, for a quick look."""

    def check(self) -> None:
        check_known((*TASKS, SPEED, ALL), task=self.task)
        check_known(MATCHES, match=self.match)
        parse_budgets(self.budget)
        check_widths(hidden=self.hidden)
        check_at_most(WIDEST, **{f"hidden[{i}]": width for i, width in enumerate(self.hidden or ())})
        if self.layers is not None:
            check_positive(layers=self.layers)
            check_at_most(1000, layers=self.layers)
        if self.limit is not None:
            check_positive(limit=self.limit)
            check_has_images(self.task, "limit")
            if self.limit < (batch := max(TASKS[name].batch_size for name in IMAGE_TASKS)):
                raise ValueError(f"limit must be at least {batch}, the images of a batch, not {self.limit}")


@dataclass(frozen=True)
class ContestantOptions(Checked):
    """Who takes part, and how often. A resumed comparison may change this: the rows that are done stay as they are."""

    flows: tuple[str, ...] = ()
    """names that python -m adapters lists, and your own as my_layer.py:MyLayer or my_module:my_flow; by default the
    whole catalogue."""

    direction: str | None = None
    """in which the forward of your own layers runs, noise-to-data or data-to-noise; by default each is asked whether it
    computes equation 15 or 16."""

    seeds: int = 1
    """trainings of each flow in each budget; with two or more, how far apart the flows' ranks are is known."""

    def check(self) -> None:
        check_positive(seeds=self.seeds)
        check_at_most(1000, seeds=self.seeds)
        if self.direction is not None:
            check_known(DIRECTIONS, direction=self.direction)
        check_contestants(self.flows, self.direction)


@dataclass(frozen=True)
class CompareRunOptions(RunOptions):
    """Where a comparison computes, and where its data and results are."""

    out: Path | None = None
    """directory for compare.md, compare.json and figures; by default results/compare/TASK. With --task all it has a
    directory for each task."""

    resume: bool = False
    """keep the trainings that are done in that directory, after a crash or Ctrl-C, and try again those that failed."""

    load: Path | None = None
    """train nothing; draw the table and the pictures in this directory, or in those right below it, again, there or in
    --out."""

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
    if task not in (*IMAGE_TASKS, ALL):
        raise ValueError(f"{option} is of the images of {' and '.join(IMAGE_TASKS)}; {task} has none: leave it out")


def main(
    options: Options, *, effort: Effort | None = None, fit: Callable[..., Fitted] = fit, draw: bool = True
) -> dict[str, Any]:
    """Train all flows alike, check and time them, and rank those that pass.

    Args:
        options: what the command line asks for.
        effort: how thoroughly flows are measured.
        fit: trains one flow.
        draw: whether to draw the pictures.

    Returns:
        the rows of each task: what ``compare.json`` keeps of each flow.
    """
    run, task, effort = options.run, options.equal.task, effort or Effort()
    if run.load is not None:
        return show_again(run.load, run.out)
    accelerator = make_accelerator(run.device)
    out = run.out or (RESULTS if task == ALL else RESULTS / task)
    if task == SPEED:
        size = options.equal.layers or 8, options.equal.hidden or (256, 256)
        flows, device = options.contestants.flows, accelerator.device
        return measure_speed(flows, *size, run.compile, open_directory(out), device, stopwatch=effort.stopwatch)
    directories = {name: out / name for name in DENSITY_TASKS} if task == ALL else {task: out}
    if run.resume and not any((directory / TABLE).is_file() for directory in directories.values()):
        raise FileNotFoundError(f"nothing to resume: no {TABLE} in {', '.join(map(str, directories.values()))}")
    names = list(dict.fromkeys(options.contestants.flows or flow_names()))
    with ExitStack() as claims:
        tables = {}
        for name, directory in directories.items():
            tables[name] = open_table(only(options, name), directory, accelerator, claims)
        comparisons = [
            open_comparison(only(options, name), directories[name], table, accelerator, effort)
            for name, table in tables.items()
        ]
        for comparison in comparisons:
            comparison.prepare(names, options.equal.match == "parameters")
            comparison.time(names, run.compile)
        train_all(comparisons, names, options.contestants.seeds, fit)
        for comparison in comparisons:
            show(comparison.table, names, comparison.directory, comparison.directory, draw)
    for comparison in comparisons:
        if not any(map(comparison.table.scored, names)):
            raise RuntimeError(f"no flow has a score: {comparison.directory / REPORT} says why of each")
    return {name: {flow: table.rows[flow] for flow in names} for name, table in tables.items()}


def only(options: Options, task: str) -> Options:
    """The same options for that task alone: what it has of them is equal however it was asked for."""
    limit = options.equal.limit if task in IMAGE_TASKS else None
    budgets = tuple(parse_budgets(options.equal.budget))
    data_dir = options.run.data_dir if task in IMAGE_TASKS else None
    return replace(
        options,
        equal=replace(options.equal, task=task, limit=limit, budget=budgets),
        run=replace(options.run, data_dir=data_dir),
    )


def open_table(options: Options, directory: Path, accelerator: "Accelerator", claims: ExitStack) -> Table:
    """The table of one task: that in the directory if it is to be resumed, or else a new one.

    The directory is claimed, so that no second comparison writes there meanwhile. A table that is there already and not
    to be resumed is kept under another name.
    """
    device = accelerator.device
    clock = "cpu" if counts_cpu_time(device) else "wall"
    arguments = json.loads(json.dumps(identity(options)))
    arguments |= {"compile": options.run.compile, "device": str(device), "clock": clock}
    path = directory / TABLE
    claims.enter_context(claimed(open_directory(directory)))
    if options.run.resume and path.is_file():
        return Table.resume(directory, arguments)
    if path.is_file():
        kept = next(kept for i in itertools.count(1) if not (kept := directory / f"compare-{i}.json").exists())
        os.replace(path, kept)
        print(f"the comparison that was in {path} is kept as {kept.name}")
    table = Table(arguments)
    table.save(directory)  # so that it can be resumed, however early it is cut short
    return table


def open_comparison(
    options: Options, directory: Path, table: Table, accelerator: "Accelerator", effort: Effort
) -> Comparison:
    """The comparison on one task, with its data; a line says what it is."""
    equal, seeds = options.equal, options.contestants.seeds
    task = make_task(equal.task, accelerator.device, effort.test_points, options.run.data_dir, equal.limit)
    layers, hidden = equal.layers or task.layers, equal.hidden or task.hidden
    flows = len(set(options.contestants.flows or flow_names()))
    print(
        f"{equal.task}: {flows} flows, {seeds} seed{'s' * (seeds > 1)} of {' and '.join(equal.budget)} each, {layers} "
        f"layers of {'×'.join(map(str, hidden))}, {equal.match} matched, on {where(accelerator.device)}"
    )
    direction = options.contestants.direction
    return Comparison(task, table, layers, hidden, directory, accelerator, effort, direction)


def train_all(comparisons: Sequence[Comparison], names: Sequence[str], seeds: int, fit: Callable[..., Fitted]) -> None:
    """Train every flow with every seed in every budget, on every task.

    The first seed of all flows comes before the second one of any: whatever else the machine has to do slows all flows
    alike, and what is done when it is interrupted is a fair comparison already.
    """
    jobs = [
        (comparison, name, seed, budget)
        for seed in range(seeds)
        for comparison in comparisons
        for budget in comparison.table.budgets
        for name in names
    ]
    with tqdm(jobs, unit="training", dynamic_ncols=True, disable=None) as bar:
        try:
            for comparison, name, seed, budget in bar:
                if found := comparison.train(name, seed, budget, fit):
                    of_task = f"{comparison.table.arguments['task']}, " if len(comparisons) > 1 else ""
                    bar.write(of_task + found)
        except KeyboardInterrupt:
            bar.close()
            print("all trainings that have ended are kept; --resume goes on with the others", file=sys.stderr)
            raise


def show(table: Table, names: list[str], directory: Path, out: Path, draw: bool = True) -> None:
    """Print and write the ranking of these flows, and draw the pictures."""
    written = [table.report(names, out), directory / TABLE]
    if draw:
        written += pictures.draw(table, names, directory, out)
    print("\n".join(f"  {path}" for path in written))


def show_again(load: Path, out: Path | None) -> dict[str, dict[str, Row]]:
    """The same from comparisons that are finished or interrupted: that in ``load``, or all of those right below it."""
    directories = [load] if has_results(load) else sorted(filter(has_results, load.glob("*")))
    if not directories:
        raise FileNotFoundError(f"no {TABLE} in {load}: give the directory of a comparison")
    for directory in directories:
        target = directory if out is None else out / directory.name if len(directories) > 1 else out
        if (directory / TABLE).is_file():
            table = Table.load(directory)
            show(table, list(table.rows), directory, open_directory(target))
        else:
            show_speed(read_metrics(directory, SPEED), open_directory(target))
    return {}


def has_results(directory: Path) -> bool:
    """Whether a comparison, or the speed task, has left its figures there."""
    return (directory / TABLE).is_file() or (directory / "metrics.json").is_file()


if __name__ == "__main__":
    cli(main, Options)
