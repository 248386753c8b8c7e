"""A comparison's parts: every flow is built alike, checked, timed beside the others, trained, and scored."""

import math
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from adapters.check import Report
from adapters.check.subject import Wrong, same_grad_mode
from adapters.flow import Flow
from runs.common import gates
from runs.common.contestants import REFERENCE, build, footnote, match_parameters, mistakes_in_sampling, named_mistakes
from runs.common.cost import KINDS, TimedFlow, compile_gain, time_kind
from runs.common.devices import seeded
from runs.common.pictures.compare import save_learned
from runs.common.recipe import Recipe
from runs.common.results import parameter_count
from runs.common.scores import TEST_POINTS
from runs.common.table import Row, Table, new_row, number_with_digits
from runs.common.tasks import SPLINES, Task
from runs.common.timing import Stopwatch, ratio
from runs.common.training_state import Fitted, NotFinite

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

FAILURES = (Exception, SystemExit)  # of a user's or a library's code


class Unfit(RuntimeError):
    """A flow that can't be compared. The message is the whole reason, in words."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly flows are measured; a test spends less.

    Attributes:
        stopwatch: for how long each kind of call is timed.
        quadrature: how closely the gates look at ∫p.
        test_points: fresh points that a density in the plane is scored on.
        patience: seconds of CPU time that the check of a flow may take, and its score likewise.
    """

    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    quadrature: gates.Quadrature = gates.CLOSELY
    test_points: int = TEST_POINTS
    patience: float = 120.0


@contextmanager
def patiently(what: str, seconds: float) -> Iterator[None]:
    """Raise ``Unfit`` within as soon as that takes more CPU time than so many seconds.

    If that is caught within, it is raised again: every second, and at the end. Some inverses search for each of 784
    coordinates, one after the other, for hours. In a thread other than the main one, which may set no timer, nothing is
    raised.
    """

    late = []

    def give_up(*_) -> None:
        late.append(Unfit(f"{what} takes more than {seconds:g} s of CPU time"))
        raise late[-1]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with same_grad_mode():
        previous = signal.signal(signal.SIGPROF, give_up)
        signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.signal(signal.SIGPROF, previous)
    if late:
        raise late[-1]


def parse_budget(budget: str) -> tuple[float, bool]:
    """The number, and whether it counts steps rather than seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|seconds|steps)?", budget.strip(), re.ASCII)
    steps = found is not None and found[2] == "steps"
    if found is None or not 0 < float(found[1]) <= 1e9 or (steps and "." in found[1]):
        shown = repr(budget) if len(budget) <= 20 else f"{budget[:20]!r}…"
        raise ValueError(f"budget must be seconds or steps, at most 10⁹, such as 30s or 2000steps, not {shown}")
    return float(found[1]), steps


def parse_budgets(budgets: Sequence[str]) -> list[str]:
    """The budgets in one spelling, 30s or 2000steps, each once, the smallest first.

    Raises:
        ValueError: if there is none, one is no budget, or seconds and steps are mixed.
    """
    if not budgets:
        raise ValueError("budget needs at least one, such as --budget 3s 10s")
    parsed = sorted(set(map(parse_budget, budgets)))
    if len({in_steps for _, in_steps in parsed}) > 1:
        raise ValueError(f"the budgets must all be seconds or all be steps, not {' '.join(budgets)}")
    return [f"{amount:.12g}{'steps' if in_steps else 's'}" for amount, in_steps in parsed]


def make_recipe(task: type[Task], budget: str, compile: bool) -> Recipe:
    """How every flow is trained on that task, in that budget."""
    amount, in_steps = parse_budget(budget)
    steps, seconds = (int(amount), None) if in_steps else (10**7, amount)
    return Recipe(steps=steps, seconds=seconds, validate_every=10**9, compile=compile, **task.recipe)


def counts_cpu_time(device: torch.device) -> bool:
    """Whether the seconds of a training are CPU time, which other processes on the machine do not take away.

    This is fair where a flow computes on a single thread. Several threads would each add their own time, and a GPU's
    time is not the processor's.
    """
    return device.type == "cpu" and torch.get_num_threads() == 1


@dataclass
class Comparison:
    """What all flows that are compared on one task have in common. What a flow does wrong is written in its own row.

    Attributes:
        task: the data, the loss and the score.
        table: the rows.
        layers, hidden: the size of each flow. Where parameters are matched, the row has the flow's own hidden widths.
        directory: where the table and the pictures of what is learned are kept.
        accelerator: where to compute.
        effort: how thoroughly flows are measured.
        direction: in which the forward of somebody's own layers runs; ``None`` where they are asked.
    """

    task: Task
    table: Table
    layers: int
    hidden: tuple[int, ...]
    directory: Path
    accelerator: "Accelerator"
    effort: Effort
    direction: str | None = None

    def build(self, name: str, seed: int = 0, **changes: Any) -> Flow:
        """The flow of that name.

        Args:
            changes: what is not as the comparison has it: ``layers``, ``hidden_features`` or ``preprocess``.
        """
        torch.manual_seed(seed)
        task, hidden = self.task, tuple(self.table.rows.get(name, {}).get("hidden", self.hidden))
        size = {"layers": self.layers, "hidden_features": hidden, "preprocess": task.preprocess} | changes
        size["context_features"] = task.context_features
        options = SPLINES | ({} if self.direction is None else {"direction": self.direction})
        return build(name, task.features, masks=task.masks, options=options, **size)

    def prepare(self, names: list[str], matched: bool) -> None:
        """A row for each flow, with its hidden widths, parameters and footnote; one that can't be built says why.

        A flow that breaks a law, with its parameters moved at random, says which: it will not be trained.

        Args:
            matched: whether all are to have as many parameters as ``REFERENCE`` rather than the same hidden widths.
        """
        target = None
        if matched:
            target = parameter_count(self.build(REFERENCE, hidden_features=self.hidden))
        for name in tqdm(names, desc="checking", unit="flow", leave=False, disable=None):
            row = self.table.rows.setdefault(name, new_row())
            if "parameters" in row or "failed" in row:
                continue
            try:
                self._describe(name, row, target)
                with patiently("its check", self.effort.patience):
                    small = self.task.alone(self._small(name))
                    report = gates.check_before_training(small, self.task.features, self.effort.quadrature)
                    wrong = report.reasons or mistakes_in_sampling(name, self.task.features, self.task.context_features)
                if wrong:
                    row["untrained"] = wrong
            except FAILURES as error:
                if mistakes := named_mistakes(name, self.task.features, error):
                    row["untrained"] = mistakes
                else:
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
            limited = partial(patiently, f"a {kind} of one batch", self.effort.patience)
            times, failed = time_kind(kind, timed, self.task.device, self.effort.stopwatch, limited)
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

    def train(self, name: str, seed: int, budget: str, fit: Callable[..., Fitted]) -> str | None:
        """Train that flow with that seed in that budget, hold it to the gates, score it, and save the table.

        Returns:
            what came of it in words; ``None`` if the row says already that this is done, or that it can't be.
        """
        row = self.table.rows[name]
        if "failed" in row or "untrained" in row or self.table.is_done(name, seed, budget):
            return None
        try:
            training = self._train(name, seed, budget, fit)
        except FAILURES as error:
            row["failed"] = found = reason(error)
        else:
            row["trainings"].append(training)
            found = f"{self.task.measure} {number_with_digits(training['score'], training['stderr'])}"
            found += "".join(f", {failure}" for failure in training["gate_failures"])
        self.table.save(self.directory)
        return f"{name}, {budget}, seed {seed}: {found}"

    def _train(self, name: str, seed: int, budget: str, fit: Callable[..., Fitted]) -> dict[str, Any]:
        """One training as the table keeps it."""
        task, device, compile = self.task, self.task.device, self.table.arguments["compile"]
        recipe = make_recipe(type(task), budget, compile)
        flow = self.build(name, seed).to(device)
        trial = task.trial(flow, seed)
        clock = time.process_time if counts_cpu_time(device) else time.monotonic
        fitted = fit(trial.loss, trial.batch, recipe, quiet=True, accelerator=self.accelerator, clock=clock)
        if fitted.interrupted:
            raise KeyboardInterrupt
        trial.loss.eval()
        report = None
        if seed == 0:  # a check may take longer than a short training
            with patiently("its check", self.effort.patience):
                report = self._checked(task.alone(flow))
        with patiently("its score", self.effort.patience):
            value, stderr = trial.score()
        if not math.isfinite(value):
            raise Unfit(f"its {task.measure} on the test data is {value}")
        if fitted.notes:
            row = self.table.rows[name]
            row["notes"] = list(dict.fromkeys((*row.get("notes", ()), *fitted.notes)))
        if seed == 0:  # the longest budget comes last, so that its picture stays
            with torch.no_grad(), patiently("its picture", self.effort.patience):
                save_learned(self.directory, name, trial.picture())
        pace, sign = fitted.seconds / fitted.steps, -1 if task.higher_is_better else 1
        return {
            "seed": seed,
            "budget": budget,
            "score": value,
            "stderr": stderr,
            "steps": fitted.steps,
            "seconds": fitted.seconds,
            "curve": [[round(step * pace, 3), round(sign * loss, 5)] for step, loss in fitted.losses],
            "gates": {} if report is None else gates.errors(report),
            "gate_failures": [] if report is None else report.reasons,
        }

    def _checked(self, flow: Flow) -> Report:
        """The trained flow, held against the laws."""
        task = self.task
        with seeded(0, task.device):
            data = task.box is not None or task.features > 64  # where the data lie, or far too many numbers
            points = task.vectors(100) if data else flow.sample(100).detach()
        return gates.check_after_training(flow, points, task.box, self.effort.quadrature)


def reason(error: BaseException) -> str:
    """An error in one line, with its kind's name where it is not one of our own."""
    first = (str(error).splitlines() or [""])[0]
    ours = isinstance(error, NotFinite | Unfit) or isinstance(error.__cause__, Wrong)
    return first if ours else f"{type(error).__name__}: {first}"
