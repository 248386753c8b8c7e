"""A comparison's parts: every flow is built alike, checked, timed beside the others, trained, and scored."""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from adapters.flow import Flow
from runs.common import gates
from runs.common.contestants import REFERENCE, build, footnote, match_parameters
from runs.common.cost import KINDS, TimedFlow, compile_gain, time_kind
from runs.common.devices import seeded
from runs.common.pictures.compare import save_learned
from runs.common.recipe import Recipe
from runs.common.results import parameter_count
from runs.common.scores import TEST_POINTS
from runs.common.table import Row, Table, new_row
from runs.common.tasks import SPLINES, Task
from runs.common.timing import Stopwatch, ratio
from runs.common.training_state import Fitted, NotFinite

FAILURES = (Exception, SystemExit)  # of a user's or a library's code


class Unfit(RuntimeError):
    """A flow that can't be compared. The message is the whole reason, in words."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly flows are measured; a test spends less.

    Attributes:
        stopwatch: for how long each kind of call is timed.
        quadrature: how closely ∫p is looked at.
        test_points: fresh points that a density in the plane is scored on.
    """

    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    quadrature: gates.Quadrature = field(default_factory=gates.Quadrature)
    test_points: int = TEST_POINTS


def parse_budget(budget: str) -> tuple[float, bool]:
    """The number, and whether it counts steps rather than seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|seconds|steps)?", budget.strip(), re.ASCII)
    steps = found is not None and found[2] == "steps"
    if found is None or not 0 < float(found[1]) <= 1e9 or (steps and "." in found[1]):
        shown = repr(budget) if len(budget) <= 20 else f"{budget[:20]!r}…"
        raise ValueError(f"budget must be seconds or steps, at most 10⁹, such as 30s or 2000steps, not {shown}")
    return float(found[1]), steps


def make_recipe(task: type[Task], budget: str, compile: bool) -> Recipe:
    """How every flow is trained on that task, in that budget."""
    amount, in_steps = parse_budget(budget)
    steps, seconds = (int(amount), None) if in_steps else (10**7, amount)
    return Recipe(steps=steps, seconds=seconds, validate_every=10**9, compile=compile, **task.recipe)


@dataclass
class Comparison:
    """What all flows of a comparison have in common. Whatever a flow does wrong is written in its own row.

    Attributes:
        task: data, loss and score.
        table: the rows.
        layers, hidden: the size of each flow. Where parameters are matched, the row says the flow's own hidden widths.
        directory: where the table and what is learned are kept.
        accelerator: where to compute.
        effort: how thoroughly.
    """

    task: Task
    table: Table
    layers: int
    hidden: tuple[int, ...]
    directory: Path
    accelerator: Accelerator
    effort: Effort

    def build(self, name: str, seed: int = 0, **changes: Any) -> Flow:
        """The flow of that name.

        Args:
            changes: what is not as the comparison has it: ``layers``, ``hidden_features`` or ``preprocess``.
        """
        torch.manual_seed(seed)
        task, hidden = self.task, tuple(self.table.rows.get(name, {}).get("hidden", self.hidden))
        size = {"layers": self.layers, "hidden_features": hidden, "preprocess": task.preprocess} | changes
        size["context_features"] = task.context_features
        return build(name, task.features, masks=task.masks, options=SPLINES, **size)

    def prepare(self, names: list[str], matched: bool) -> None:
        """A row for each flow, with its hidden widths, parameters and footnote; one that can't be built says why.

        A flow that fails a gate, with its parameters moved at random, says so: it will not be trained.

        Args:
            matched: whether all are to have as many parameters as ``REFERENCE`` rather than the same hidden widths.
        """
        target = None
        if matched:
            target = parameter_count(self.build(REFERENCE, hidden_features=self.hidden))
        with torch.no_grad(), seeded(0, self.task.device):
            points = self.task.vectors(100)
            if self.task.preprocess is not None:
                points = self.task.preprocess(points.cpu())[0]
        for name in tqdm(names, desc="checking", unit="flow", leave=False, disable=None):
            row = self.table.rows.setdefault(name, new_row())
            if "parameters" in row or "failed" in row:
                continue
            try:
                self._describe(name, row, target)
                if failed := gates.failures(
                    gates.check_moved(self.task.alone(self._small(name)), points, self.effort.quadrature)
                ):
                    row |= {"gate_failures": failed, "untrained": True}
            except FAILURES as error:
                row["failed"] = reason(error)

    def _describe(self, name: str, row: Row, target: int | None) -> None:
        hidden = self.hidden
        if target is not None and name != REFERENCE:
            hidden = match_parameters(lambda widths: self.build(name, hidden_features=widths), target, hidden)
        flow = self.build(name, hidden_features=hidden)
        if parameter_count(flow) == 0:
            raise Unfit("it has no parameters to train")
        row |= {"hidden": list(hidden), "parameters": parameter_count(flow)}
        row["footnote"] = footnote(name, flow, hidden, target)

    def _small(self, name: str) -> Flow:
        """The flow without preprocessing and of two layers only: they show what is wrong, and are less steep than many.

        A flow that can't be built so has all of its layers.
        """
        try:
            return self.build(name, layers=min(2, self.layers), preprocess=None)
        except FAILURES:
            return self.build(name, preprocess=None)

    def time(self, names: list[str], compile: bool) -> None:
        """Time a training step, log_prob and sampling of all flows in turn, A B C A B C, and the step's memory."""
        rows = {name: self.table.rows[name] for name in names}
        rows = {name: row for name, row in rows.items() if not row.keys() & {"failed", "untrained"}}
        if all("times" in row for row in rows.values()):
            return
        x, timed = self.task.vectors(self.task.batch_size), {}
        for name in dict.fromkeys((REFERENCE, *rows)):
            try:
                timed[name] = TimedFlow.of(self.task.alone(self.build(name).to(self.task.device)), x)
            except FAILURES as error:
                if name == REFERENCE:
                    raise
                rows[name]["failed"] = reason(error)
        for kind in tqdm(KINDS, desc="timing", unit="kind", leave=False, disable=None):
            times, failed = time_kind(kind, timed, self.task.device, self.effort.stopwatch)
            if REFERENCE in failed:
                raise failed[REFERENCE]
            for name, row in rows.items():
                if name in failed:
                    row.setdefault("failed", f"{kind}: {reason(failed[name])}")
                elif "failed" not in row:
                    found = {"ms": statistics.median(times[name]), "ratio": ratio(times[name], times[REFERENCE])}
                    row.setdefault("times", {})[kind] = found
        for name, row in rows.items():
            if "failed" in row:
                continue
            try:
                memory = timed[name].memory()
                row["memory_mib"] = memory if math.isfinite(memory) else None
                if compile:
                    row["compile"] = compile_gain(timed[name], self.task.device, self.effort.stopwatch)
            except FAILURES as error:
                row["failed"] = f"step: {reason(error)}"
        self.table.save(self.directory)

    def train(self, name: str, seed: int, recipe: Recipe, fit: Callable[..., Fitted]) -> None:
        """Train that flow with that seed, check it and score it, unless its row says that this is done or can't be."""
        row = self.table.rows[name]
        if "failed" in row or "untrained" in row or str(seed) in row["scores"]:
            return
        try:
            self._train(name, seed, row, recipe, fit)
        except FAILURES as error:
            row["failed"] = reason(error)
        self.table.save(self.directory)

    def _train(self, name: str, seed: int, row: Row, recipe: Recipe, fit: Callable[..., Fitted]) -> None:
        task = self.task
        flow = self.build(name, seed).to(task.device)
        trial = task.trial(flow, seed)
        fitted = fit(trial.loss, trial.batch, recipe, quiet=True, accelerator=self.accelerator)
        if fitted.interrupted:
            raise KeyboardInterrupt
        trial.loss.eval()
        self._check(task.alone(flow), seed, row)
        value, error = trial.score()
        if not math.isfinite(value):
            raise Unfit(f"its {task.measure} on the test data is {value}")
        if fitted.notes:
            row["notes"] = list(dict.fromkeys((*row.get("notes", ()), *fitted.notes)))
        if seed == 0:
            with torch.no_grad():
                save_learned(self.directory, name, trial.picture())
        pace, sign = fitted.seconds / fitted.steps, -1 if task.higher_is_better else 1
        row["curves"][str(seed)] = [(round(step * pace, 3), round(sign * loss, 5)) for step, loss in fitted.losses]
        row["scores"][str(seed)] = {"value": value, "stderr": error, "steps": fitted.steps, "seconds": fitted.seconds}

    def _check(self, flow: Flow, seed: int, row: Row) -> None:
        """Hold the trained flow to the gates; the row keeps the largest error over the seeds."""
        with seeded(seed, self.task.device):
            data = self.task.box is not None or self.task.features > 64  # where the data lie, or far too many numbers
            points = self.task.vectors(100) if data else flow.sample(100).detach()
        found = gates.check(flow, points, self.task.box, self.effort.quadrature)
        if failed := gates.failures(found):
            row["gate_failures"] = failed
        worst = row.setdefault("gates", {})
        worst |= {key: max(value, worst.get(key, 0.0)) for key, value in found.items() if math.isfinite(value)}


def reason(error: BaseException) -> str:
    """An error in one line, with its kind's name where it is not one of our own."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, NotFinite | Unfit) else f"{type(error).__name__}: {first}"
