"""Hand-written and library flows on one task, each held to the same gates and given the same budget, in one table.

python runs/compare.py --task chequerboard
python runs/compare.py --task vae-prior --flows masked-affine nflows-affine zuko-realnvp --budget 120
python runs/compare.py --flows my_module:my_flow masked-affine    your own flow, beside the rest
python runs/compare.py --task speed    no training: training steps against the conditioners' own
"""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from adapters import flow_names
from adapters.checkpoint import write_atomically
from adapters.checks import check_positive
from adapters.flow import Flow
from runs.common import gates
from runs.common.command_line import cli
from runs.common.contestants import REFERENCE, WIDEST, build, check_contestants, footnote, match_parameters
from runs.common.devices import make_accelerator, seeded
from runs.common.fit import fit
from runs.common.options import check_known
from runs.common.pictures import figures
from runs.common.recipe import Recipe
from runs.common.results import open_directory, parameter_count, versions, where, write_text
from runs.common.scores import on_grid
from runs.common.speed import KINDS, compile_gain, measure, peak_of_step, speed, training_step
from runs.common.tasks import GRID, SPLINES, TASKS, Task
from runs.common.timing import ratio
from runs.common.training_state import NotFinite

RESULTS = Path("results/compare")
MATCHES = ("width", "parameters")
# Arguments that a resumed comparison may change: they leave the rows that are done as they are.
FREE = ("flows", "out", "resume", "seeds", "data_dir")
IMAGES = ("mnist", "vae-prior")
FAILURES = (Exception, SystemExit)  # of a user's or a library's code


class Unfit(RuntimeError):
    """A flow that can't be compared, for a reason that says all."""


def main(
    task: str = "chequerboard",
    flows: tuple[str, ...] = (),
    budget: str = "30s",
    seeds: int = 1,
    match: str = "width",
    layers: int | None = None,
    hidden: tuple[int, ...] | None = None,
    compile: bool = False,
    limit: int | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> dict[str, dict]:
    """Train every flow alike, check it, time it beside the others, and rank those that pass.

    Args:
        task: two-gaussians, chequerboard, mnist, vae-prior, or speed, which trains nothing.
        flows: names of adapters.flow_names(), and your own as my_module:my_flow; by default the whole catalogue.
        budget: of each training: 30s for so many seconds, or 2000steps.
        seeds: trainings of each flow.
        match: width, all with the same hidden widths, or parameters, all with as many as masked-affine, within 2 %.
        layers: layers of each flow; where the default is None, it is the task's.
        hidden: hidden widths of each conditioner.
        compile: train under torch.compile and, on CUDA, by one graph of the whole step, and time that step beside the
            plain one; the compiler takes about a minute a flow, which is not counted.
        limit: use only so many images, for a quick look.
        data_dir: where MNIST is unpacked; by default the user's cache.
        out: directory for compare.md, compare.json and figures; by default results/compare/TASK.
        resume: keep the rows that are done in that directory, after a crash or Ctrl-C, and try again those that failed.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
    """
    arguments = {name: value for name, value in locals().items() if name not in FREE}
    check_known((*TASKS, "speed"), task=task)
    check_known(MATCHES, match=match)
    check_numbers(task, seeds, layers, hidden, limit, data_dir)
    amount, by_steps = parse_budget(budget)
    check_contestants(flows)
    out = out or RESULTS / task
    accelerator = make_accelerator(device)
    if task == "speed":
        if resume:
            raise ValueError("--resume: speed has no rows to keep; run it again without")
        return speed(flows, layers or 8, hidden or (256, 256), compile, open_directory(out), accelerator.device)
    arguments["device"] = str(accelerator.device)
    table = Table(out, json.loads(json.dumps(arguments)), resume)
    images = {"data_dir": data_dir, "limit": limit} if task in IMAGES else {}
    chosen = TASKS[task](accelerator.device, **images)
    shape = {"layers": layers or chosen.layers, "hidden_features": hidden or chosen.hidden}
    open_directory(out)
    names = list(dict.fromkeys(flows or flow_names()))
    print(
        f"{task}: {len(names)} flows, {seeds} seed{'s' * (seeds > 1)} of {budget} each, {shape['layers']} layers of "
        f"{'×'.join(map(str, shape['hidden_features']))}, {match} matched, on {where(accelerator.device)}"
    )
    widths = prepare(chosen, names, shape, match, table)
    time_all(chosen, shape, widths, table, compile)
    print(table.header(chosen))
    recipe = Recipe(
        steps=int(amount) if by_steps else 10**7, seconds=None if by_steps else amount, validate_every=10**9,
        compile=compile, **chosen.recipe,
    )  # fmt: skip
    for name in tqdm(names, unit="flow", dynamic_ncols=True, disable=None):
        row = table.rows[name]
        for seed in range(seeds):
            if "failed" in row or "untrained" in row or str(seed) in row["scores"]:
                continue
            try:
                run_one(chosen, name, shape | {"hidden_features": widths[name]}, recipe, seed, row, out, accelerator)
            except FAILURES as error:  # whatever a flow does wrong is its row's affair, not the table's
                row["failed"] = reason(error)
            table.save()
        tqdm.write(table.line(name, chosen))
    table.finish(names, chosen, seeds)
    pictures = draw(table, names, chosen, out)
    print("\n".join(f"  {path}" for path in (out / "compare.md", out / "compare.json", *pictures)))
    if not any(table.scored(name) for name in names):
        raise RuntimeError(f"no flow has a score: {out / 'compare.md'} says why of each")
    return {name: table.rows[name] for name in names}


def check_numbers(
    task: str, seeds: int, layers: int | None, hidden: tuple[int, ...] | None, limit: int | None, data_dir: Path | None
) -> None:
    """Raise a ValueError unless the numbers make sense for that task."""
    if hidden == ():
        raise ValueError("hidden needs at least one width, such as 64 64")
    widths = {f"hidden[{i}]": width for i, width in enumerate(hidden or ())}
    given = {"seeds": seeds, "layers": layers, "limit": limit, **widths}
    given = {name: value for name, value in given.items() if value is not None}
    check_positive(**given)
    most = {"seeds": 1000, "layers": 1000, "limit": math.inf, **dict.fromkeys(widths, WIDEST)}
    for name, value in given.items():
        if value > most[name]:
            raise ValueError(f"{name} must be at most {most[name]:,}, not {value:,}")
    if task not in IMAGES:
        for name, value in (("limit", limit), ("data_dir", data_dir)):
            if value is not None:
                raise ValueError(f"{name} is of the images of {' and '.join(IMAGES)}; {task} has none: leave it out")
    elif limit is not None and limit < TASKS[task].batch_size:
        raise ValueError(f"limit must be at least {TASKS[task].batch_size}, the images of a batch, not {limit}")


def parse_budget(budget: str) -> tuple[float, bool]:
    """The number, and whether it counts steps rather than seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|seconds|steps)?", budget.strip(), re.ASCII)
    steps = found is not None and found[2] == "steps"
    if found is None or not 0 < float(found[1]) <= 1e9 or (steps and "." in found[1]):
        shown = repr(budget) if len(budget) <= 20 else f"{budget[:20]!r}…"
        raise ValueError(f"budget must be seconds or steps, at most 10⁹, such as 30s or 2000steps, not {shown}")
    return float(found[1]), steps


def reason(error: BaseException) -> str:
    """An error in one line, with its kind's name where it is not one of our own."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, (NotFinite, Unfit)) else f"{type(error).__name__}: {first}"


def prepare(task: Task, names: list[str], shape: dict, match: str, table: "Table") -> dict[str, tuple[int, ...]]:
    """A row for each flow, with its hidden widths, parameters and footnote; one that can't be built says why.

    So does one that fails a gate at parameters that are moved: it is not trained.
    """
    widths: dict[str, tuple[int, ...]] = {}

    def make(name: str, hidden: tuple[int, ...], layers: int = shape["layers"], preprocess=task.preprocess) -> Flow:
        torch.manual_seed(0)
        return build(name, task.features, layers, hidden, task.masks, preprocess, SPLINES)

    target = parameter_count(make(REFERENCE, shape["hidden_features"])) if match == "parameters" else None
    with torch.no_grad():
        points = task.vectors(100)
        points = points if task.preprocess is None else task.preprocess(points.cpu())[0]
    for name in tqdm(names, desc="checking", unit="flow", leave=False, disable=None):
        row = table.rows.setdefault(name, {"scores": {}, "curves": {}})
        widths[name] = tuple(row.get("hidden", shape["hidden_features"]))
        if "parameters" in row or "failed" in row:
            continue
        try:
            if target is not None and name != REFERENCE:
                widths[name] = match_parameters(lambda hidden, name=name: make(name, hidden), target, widths[name])
            flow = make(name, widths[name])
            if parameter_count(flow) == 0:
                raise Unfit("it has no parameters to train")
            row |= {"hidden": list(widths[name]), "parameters": parameter_count(flow)}
            row["footnote"] = footnote(name, flow, widths[name], target)
            try:  # two layers show what is wrong with one, and are less steep than many
                flow = make(name, widths[name], min(2, shape["layers"]), None)
            except FAILURES:
                flow = make(name, widths[name], preprocess=None)
            if failed := gates.failures(gates.check_moved(flow, points)):
                row |= {"gate_failures": failed, "untrained": True}
        except FAILURES as error:
            row["failed"] = reason(error)
    return widths


def time_all(task: Task, shape: dict, widths: dict[str, tuple[int, ...]], table: "Table", compile: bool) -> None:
    """Time a training step, log_prob and sampling of all flows in turn, A B C A B C, and the step's memory.

    The step is timed in training mode, log_prob and sampling as they are used, in evaluation mode.
    """
    wanted = [name for name in widths if not table.rows[name].keys() & {"failed", "untrained"}]
    if all("times" in table.rows[name] for name in wanted):
        return
    x, flows, calls = task.vectors(task.batch_size), {}, {kind: {} for kind in KINDS}
    for name in dict.fromkeys((REFERENCE, *wanted)):
        torch.manual_seed(0)
        hidden = widths.get(name, shape["hidden_features"])
        try:
            flow = build(name, task.features, shape["layers"], hidden, task.masks, task.preprocess, SPLINES)
            flow.to(task.device)
            calls["step"][name] = training_step(flow.parameters(), lambda flow=flow: -flow.log_prob(x).mean())
            calls["log_prob"][name] = torch.no_grad()(lambda flow=flow: flow.log_prob(x))
            calls["sample"][name] = torch.no_grad()(lambda flow=flow: flow.sample(len(x)))
            flows[name] = flow
        except FAILURES as error:
            if name == REFERENCE:
                raise
            table.rows[name]["failed"] = reason(error)
    for kind in tqdm(KINDS, desc="timing", unit="kind", leave=False, disable=None):
        for flow in flows.values():
            flow.train(kind == "step")
        times, failed = measure({name: calls[kind][name] for name in flows}, task.device)
        if REFERENCE in failed:
            raise failed[REFERENCE]
        for name in wanted:
            row = table.rows[name]
            if name in failed:
                row.setdefault("failed", f"{kind}: {reason(failed[name])}")
            elif "failed" not in row:
                found = {"ms": statistics.median(times[name]), "ratio": ratio_of(times[name], times[REFERENCE])}
                row.setdefault("times", {})[kind] = found
    for name in wanted:
        row, flow = table.rows[name], flows.get(name)
        if "failed" in row:
            continue
        try:
            memory = peak_of_step(flow.train(), x)
            row["memory_mib"] = memory if math.isfinite(memory) else None
            if compile:
                row["compile"] = compile_gain(flow, x)
        except FAILURES as error:
            row["failed"] = f"step: {reason(error)}"
    table.save()


def ratio_of(times: list[float], peer: list[float]) -> float:
    """Round by round where there are as many; of the medians where one was too slow for as many rounds."""
    return ratio(times, peer) if len(times) == len(peer) else statistics.median(times) / statistics.median(peer)


def run_one(
    task: Task, name: str, shape: dict, recipe: Recipe, seed: int, row: dict, out: Path, accelerator: Accelerator
) -> None:
    """Train that flow with that seed, check it, score it."""
    torch.manual_seed(seed)
    flow = build(name, task.features, masks=task.masks, preprocess=task.preprocess, options=SPLINES, **shape)
    flow = flow.to(task.device)
    trial = task.trial(flow, seed)
    sign = -1 if task.higher_is_better else 1
    fitted = fit(trial.loss, trial.batch, recipe, quiet=True, accelerator=accelerator)
    if fitted.interrupted:
        raise KeyboardInterrupt
    trial.loss.eval()
    with seeded(seed, task.device):
        wide = task.box is not None or task.features > 64
        points = task.vectors(100) if wide else flow.sample(100).detach()
    found = gates.check(flow, points, task.box)
    if failed := gates.failures(found):
        row["gate_failures"] = failed
    worst = row.setdefault("gates", {})
    worst |= {key: max(value, worst.get(key, 0.0)) for key, value in found.items() if math.isfinite(value)}
    value, error = trial.score()
    if not math.isfinite(value):
        raise Unfit(f"its {task.measure} on the test data is {value}")
    pace = fitted.seconds / fitted.steps
    if fitted.notes:
        row["notes"] = list(dict.fromkeys((*row.get("notes", ()), *fitted.notes)))
    if seed == 0:
        with torch.no_grad():
            picture = trial.picture()
        write_atomically(learned(out, name), lambda path: save_picture(path, picture))
    row["curves"][str(seed)] = [(round(step * pace, 3), round(sign * loss, 5)) for step, loss in fitted.losses]
    row["scores"][str(seed)] = {"value": value, "stderr": error, "steps": fitted.steps, "seconds": fitted.seconds}


def learned(out: Path, name: str) -> Path:
    return out / "learned" / f"{name.replace(':', '.')}.npy"


class Table:
    """The rows so far, kept in compare.json: a row that is done stays done."""

    def __init__(self, out: Path, arguments: dict, resume: bool):
        self.path, self.out, self.arguments = out / "compare.json", out, arguments
        self.rows: dict[str, dict] = {}
        self.versions = versions()
        if not resume:
            return
        if not self.path.is_file():
            raise FileNotFoundError(f"nothing to resume: no compare.json in {out}")
        try:
            found = json.loads(self.path.read_text())
            began, self.rows = found["arguments"], found["rows"]
            check_record(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); start again without --resume") from error
        if began != arguments:
            changes = "; ".join(f"{k} was {began.get(k)}, not {v}" for k, v in arguments.items() if began.get(k) != v)
            raise ValueError(f"{self.path} belongs to another comparison: {changes}. Resume with its own arguments")
        for name, row in self.rows.items():  # what failed may have failed for a passing reason
            if "gate_failures" in row or ("failed" in row and not row["scores"]):
                self.rows[name] = {"scores": {}, "curves": {}}
            row.pop("failed", None)

    def scored(self, name: str) -> bool:
        return bool(self.rows[name]["scores"]) and "failed" not in self.rows[name]

    def save(self) -> None:
        record = {"arguments": self.arguments, "versions": self.versions, "rows": self.rows}
        write_text(self.path, json.dumps(record, indent=1) + "\n")

    def ranked(self, names: list[str], task: Task) -> list[str]:
        """Best first; then those that failed a gate, then those that failed."""
        sign = -1 if task.higher_is_better else 1

        def key(name: str) -> tuple:
            row = self.rows[name]
            if not self.scored(name):
                return (2 + ("failed" in row), 0.0)
            return ("gate_failures" in row, sign * score(row)[0])

        return sorted(names, key=key)

    def cells(self, name: str, task: Task) -> list[str]:
        row = self.rows[name]
        if "failed" in row:
            return [name, f"failed: {row['failed']}"]
        if "untrained" in row:
            return [name, f"not trained: {'; '.join(row['gate_failures'])}"]
        value, error = score(row)
        digits = max(2, 1 - math.floor(math.log10(error))) if 0 < error < 1 else 2
        figure = f"{value:.{digits}f} ± {error:.{digits}f}"
        if "gate_failures" in row:
            figure = f"not ranked: {'; '.join(row['gate_failures'])} ({figure})"
        times = [f"{row['times'][kind]['ms']:.2f} ({row['times'][kind]['ratio']:.2f})" for kind in KINDS]
        compiled = row.get("compile")
        cells = [name, figure, f"{row['parameters']:,}", *times]
        cells.append("" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}")
        if compiled is not None:
            cells.append(f"{compiled['gain']:.2f}" if "gain" in compiled else f"no: {compiled['failed']}")
        return cells

    def columns(self, task: Task) -> list[str]:
        compiled = ["compiled"] * self.arguments["compile"]
        return [
            "flow",
            f"{task.measure} ({task.unit})",
            "parameters",
            "step ms",
            "log_prob ms",
            "sample ms",
            "MiB",
            *compiled,
        ]

    def header(self, task: Task) -> str:
        return self._align(self.columns(task))

    def line(self, name: str, task: Task) -> str:
        return self._align(self.cells(name, task))

    def _align(self, cells: list[str]) -> str:
        """Figures to the right under their columns' names, the flow's name and its score to the left."""
        left, right = (max(map(len, self.rows)), 20), (10, 15, 15, 17, 7, 16)
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, left, strict=False)]
        return " ".join(padded + [f"{cell:>{width}}" for cell, width in zip(cells[2:], right, strict=False)])

    def finish(self, names: list[str], task: Task, seeds: int) -> None:
        """Print the ranking, and write it with what was equal and what could not be made so."""
        self.save()
        ranked = self.ranked(names, task)
        print("\n" + "\n".join([self.header(task), *(self.line(name, task) for name in ranked)]))
        columns = self.columns(task)
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        notes = []
        for name in ranked:
            cells = self.cells(name, task)
            noted = (note[:1].upper() + note[1:].rstrip(".") + "." for note in self.rows[name].get("notes", ()))
            said = [self.rows[name].get("footnote", ""), *noted]
            if any(said):
                notes.append(f"{len(notes) + 1}. **{name}**: {' '.join(filter(None, said))}")
                cells[0] += f" [{len(notes)}]"
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
        text = "\n".join([f"# {self.arguments['task']}", "", *lines, "", *fairness(self, task, seeds), "", *notes, ""])
        write_text(self.out / "compare.md", text)


NUMBER, TEXTS = (int, float), [str]
TIMES = {kind: {"ms": NUMBER, "ratio": NUMBER} for kind in KINDS}
ONCE_TIMED = {"hidden": [int], "parameters": int, "footnote": str, "times": TIMES, "memory_mib": (*NUMBER, type(None))}
ROW = {
    "scores": {...: {"value": NUMBER, "stderr": NUMBER, "steps": int, "seconds": NUMBER}},
    "curves": {...: [[NUMBER]]},
}
OPTIONAL = {"failed": str, "untrained": bool, "gate_failures": TEXTS, "notes": TEXTS, "gates": {...: NUMBER}}


def check_record(record: dict) -> None:
    """Raise a ValueError that names the entry unless that is what ``Table.save`` writes."""
    check_shape(record, {"arguments": {}, "rows": {...: dict}}, "it")
    for name, row in record["rows"].items():
        what = f"the row {name}"
        scored = bool(row.get("scores"))
        check_shape(row, ROW | (ONCE_TIMED if scored else {}), what)
        known = ONCE_TIMED | OPTIONAL | {"compile": dict}
        check_shape(row, {key: kind for key, kind in known.items() if key in row and key != "times"}, what)
        if record["arguments"].get("compile") and scored:
            gained = "failed" not in row.get("compile", {})
            check_shape(row, {"compile": {"gain": NUMBER} if gained else {"failed": str}}, what)
        for curve in row["curves"].values():
            if any(len(pair) != 2 for pair in curve):
                raise ValueError(f"{what}: a curve has points that are no pairs")


def check_shape(value, wanted, what: str) -> None:
    """Raise a ValueError unless ``value`` is of the type, or has the entries, that ``wanted`` says.

    ``wanted`` is a type, several, a list of what each entry is, or a dictionary of what the entries are that must be
    there; ``...`` stands for any key.
    """
    kind = type(wanted) if isinstance(wanted, (dict, list)) else wanted
    if not isinstance(value, kind) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{what} is {str(value)[:40]!r}, not what it should be")
    if isinstance(wanted, list):
        for i, one in enumerate(value):
            check_shape(one, wanted[0], f"{what}, entry {i}")
    elif isinstance(wanted, dict):
        for key in value if ... in wanted else wanted:
            if key not in value:
                raise ValueError(f"{what} lacks {key!r}")
            check_shape(value[key], wanted.get(key, wanted.get(...)), f"{what}, {key}")


def score(row: dict) -> tuple[float, float]:
    """Mean over the seeds and its standard error; of one seed, the score's own."""
    values = [one["value"] for one in row["scores"].values()]
    if len(values) == 1:
        return values[0], next(iter(row["scores"].values()))["stderr"]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def fairness(table: Table, task: Task, seeds: int) -> list[str]:
    """What was the same for all, in words."""
    given, recipe = table.arguments, task.recipe
    hidden = "×".join(map(str, given["hidden"] or task.hidden))
    return [
        f"The same for all: {given['budget']} of training ({seeds} seed{'s' * (seeds > 1)}; ± is the standard error), "
        f"batch {task.batch_size}, AdamW at {recipe['lr']:g} with the same schedule, averaged weights, the same fixed "
        f"preprocessing, {given['layers'] or task.layers} layers, hidden widths {hidden} (matched: {given['match']}), "
        "alternating masks (1 = unchanged; autoregressive flows have none), base N(0, I) fixed, data → noise in one "
        f"pass, splines of {SPLINES['bins']} bins in [−{SPLINES['tail_bound']:g}, {SPLINES['tail_bound']:g}].",
        "",
        f"Gates, in float64, both before training, on two layers with parameters moved by N(0, {gates.MOVED:g}²) (less "
        f"where that is too steep), and after it: round trip {gates.ROUND_TRIP:g}, both directions' log-determinants "
        f"beside autograd's {gates.LOG_DET:g}, log_prob of samples {gates.AGREEMENT:g}, no float32 within "
        f"({gates.PRECISION:g}), in the plane ∫p {gates.MASS:g}. Who fails one before is not trained, who fails one "
        "after is not ranked. Times are medians of calls in turn (A B C A B C) in one process after a warm-up, steps "
        "in training mode and the rest in evaluation mode, in brackets the ratio to "
        f"{REFERENCE}; memory is the most that a training step allocates.",
        "",
        ", ".join(f"{key} {value}" for key, value in table.versions.items()) + ".",
    ]


def draw(table: Table, names: list[str], task: Task, out: Path) -> list[Path]:
    """All pictures."""
    done = [name for name in table.ranked(names, task) if table.scored(name)]
    if not done:
        return []
    drawers = {
        "gallery": lambda path: draw_gallery(table, done, task, path),
        "quality": lambda path: draw_curves(table, done, task, path),
        "times": lambda path: draw_times(table, done, path),
    }
    for picture, drawer in drawers.items():
        drawer(out / f"{picture}.png")
    return [out / f"{picture}.png" for picture in drawers]


def save_picture(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:  # of a path without .npy NumPy makes another one
        np.save(file, values)


def read_picture(path: Path) -> np.ndarray | None:
    """What was learned, as it was kept; ``None`` if it is not there or damaged."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = values.ndim == 2 and values.size and values.dtype.kind in "fiu" and np.isfinite(values).all()
    return values if good else None


def draw_gallery(table: Table, names: list[str], task: Task, path: Path) -> None:
    """A panel for each flow, best first: the density that it learned, or its samples."""
    panels = [(name, read_picture(learned(path.parent, name))) for name in names]
    if task.box is not None:
        panels.insert(0, ("true density", on_grid(task.true, GRID).numpy()))
    columns = min(range(4, 8), key=lambda n: -len(panels) % n)  # as full a last row as can be
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    how = {"cmap": "gray", "vmin": 0, "vmax": 1}
    if task.box is not None:
        how = {"cmap": figures.DENSITY, "vmin": 0, "vmax": 1.3 * panels[0][1].max(), "origin": "lower"}
    with figures.figure(path, rows, columns, size=(1.6 * columns, 1.98 * rows), squeeze=False) as (drawing, axes):
        drawing.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.02, wspace=0.02)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (name, values) in zip(axes.flat, panels, strict=False):
            if values is None:
                axis.text(0.5, 0.5, "no picture kept", ha="center", va="center", fontsize=7, color=figures.FAINT)
            else:
                axis.imshow(values, interpolation="nearest", **how)
            title = name if name not in table.rows else f"{name}\n{score(table.rows[name])[0]:#.3g} {task.unit}"
            if "gate_failures" in table.rows.get(name, {}):
                title = f"{name}\nfails a gate"
            axis.set_title(title, fontsize=7.5, pad=3)


def draw_curves(table: Table, names: list[str], task: Task, path: Path, shown: int = 8) -> None:
    """Training loss against time, the first seed's: the best few by name, the others faint."""
    with figures.figure(path, size=(6.4, 3.8)) as (_, axes):
        seen = []
        for place, name in reversed(list(enumerate(names))):
            curve = np.array(table.rows[name]["curves"].get("0", []))
            if not len(curve):
                continue
            seconds, losses = curve.T
            half = max(1, len(losses) // 30)
            smooth = [np.median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
            seen += smooth[half:]
            style = {"color": figures.MANY[place], "label": name} if place < shown else {"color": "#d5dadd"}
            if name == REFERENCE:
                style["color"] = figures.ACCENT
            width = 1.8 if name.startswith("masked") else 1
            axes.plot(seconds, smooth, linewidth=width, zorder=3 - place / 100, **style)
        seen = np.array(seen)
        positive = seen[seen > 0]  # an estimate of a small KL may be negative, which no logarithmic axis shows
        if task.measure == "KL" and len(positive):
            high = np.quantile(positive, 0.97)
            low = max(positive.min(), high / 1000)
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(low / 1.1, 1.1 * high)
            figures.log_ticks(axes.yaxis)
        elif len(seen):  # the first steps of some are far off, and would hide the rest
            low, high = np.quantile(seen, (0, 0.97) if not task.higher_is_better else (0.03, 1))
            margin = 0.04 * (high - low) or 1.0
            axes.set_ylim(low - margin, high + margin)
        axes.set(xlabel="seconds of training", ylabel=f"{task.measure} of the batches ({task.unit})")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_times(table: Table, names: list[str], path: Path) -> None:
    """Step, log_prob and sample time on logarithmic axes, fastest step first."""
    names = sorted(names, key=lambda name: table.rows[name]["times"]["step"]["ms"])
    with figures.figure(path, 1, 3, size=(8.4, 0.21 * len(names) + 0.9), sharey=True) as (_, axes):
        for axis, kind in zip(axes, KINDS, strict=True):
            axis.set(title=f"{kind} (ms)", xscale="log", yticks=range(len(names)), yticklabels=names)
            for place, name in enumerate(names):
                value = table.rows[name]["times"][kind]["ms"]
                colour = figures.ACCENT if name.startswith("masked") else figures.INK
                axis.axhline(place, color="#e6e9eb", linewidth=0.6, zorder=0)
                axis.plot(value, place, "o", color=colour, markersize=4.5)
                axis.annotate(
                    f"{value:.3g}" if value < 1000 else f"{value:,.0f}", (value, place), (5, 0),
                    textcoords="offset points", va="center", fontsize=6, color=colour,
                )  # fmt: skip
            axis.tick_params(axis="y", length=0)
            axis.margins(x=0.18)
            figures.log_ticks(axis.xaxis)
        axes[0].set_ylim(len(names) - 0.4, -0.6)


if __name__ == "__main__":
    cli(main)
