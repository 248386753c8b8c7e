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
from adapters.checks import check_positive
from adapters.flow import Flow
from runs.common import figures, gates
from runs.common.contestants import REFERENCE, build, check_contestants, footnote, match_parameters
from runs.common.devices import make_accelerator
from runs.common.fit import NotFinite, Recipe, fit
from runs.common.results import check_known, cli, open_directory, parameter_count, versions, where, write_text
from runs.common.speed import KINDS, compile_gain, measure, peak_of_step, speed, training_step
from runs.common.tasks import SPLINES, TASKS, Task
from runs.common.timing import ratio

RESULTS = Path("results/compare")
MATCHES = ("width", "parameters")
# Arguments that a resumed comparison may change: they leave the rows that are done as they are.
FREE = ("flows", "out", "resume", "seeds", "data_dir")


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
        resume: keep the rows that are done in that directory, after a crash or Ctrl-C.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
    """
    arguments = {name: value for name, value in locals().items() if name not in FREE}
    check_known((*TASKS, "speed"), task=task)
    check_known(MATCHES, match=match)
    check_positive(seeds=seeds)
    given = {"layers": layers, "limit": limit, **{f"hidden[{i}]": width for i, width in enumerate(hidden or ())}}
    check_positive(**{name: value for name, value in given.items() if value is not None})
    amount, by_steps = parse_budget(budget)
    check_contestants(flows)
    out = out or RESULTS / task
    accelerator = make_accelerator(device)
    if task == "speed":
        return speed(flows, layers or 8, hidden or (256, 256), compile, open_directory(out), accelerator.device)
    arguments["device"] = str(accelerator.device)
    table = Table(out, json.loads(json.dumps(arguments)), resume)
    images = {} if task in ("two-gaussians", "chequerboard") else {"data_dir": data_dir, "limit": limit}
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
            if "failed" in row or str(seed) in row["scores"]:
                continue
            try:
                run_one(chosen, name, shape | {"hidden_features": widths[name]}, recipe, seed, row, out, accelerator)
            except Exception as error:  # whatever a flow does wrong is its row's affair, not the table's
                row["failed"] = reason(error)
            table.save()
        tqdm.write(table.line(name, chosen))
    table.finish(names, chosen, seeds)
    pictures = draw(table, names, chosen, out)
    print("\n".join(f"  {path}" for path in (out / "compare.md", out / "compare.json", *pictures)))
    return {name: table.rows[name] for name in names}


def parse_budget(budget: str) -> tuple[float, bool]:
    """The number, and whether it counts steps rather than seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|seconds|steps)?", budget.strip())
    if found is None or not float(found[1]) > 0 or (found[2] == "steps" and "." in found[1]):
        raise ValueError(f"budget must be seconds or steps, such as 30s or 2000steps, not {budget!r}")
    return float(found[1]), found[2] == "steps"


def reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, NotFinite) else f"{type(error).__name__}: {first}"


def prepare(task: Task, names: list[str], shape: dict, match: str, table: "Table") -> dict[str, tuple[int, ...]]:
    """A row for each flow, with its hidden widths, parameters and footnote; one that can't be built says why."""
    widths: dict[str, tuple[int, ...]] = {}

    def make(name: str, hidden: tuple[int, ...]) -> Flow:
        torch.manual_seed(0)
        return build(name, task.features, shape["layers"], hidden, task.masks, task.preprocess, SPLINES)

    target = parameter_count(make(REFERENCE, shape["hidden_features"])) if match == "parameters" else None
    for name in names:
        row = table.rows.setdefault(name, {"scores": {}, "curves": {}})
        widths[name] = tuple(row.get("hidden", shape["hidden_features"]))
        if "parameters" in row or "failed" in row:
            continue
        try:
            if target is not None and name != REFERENCE:
                widths[name] = match_parameters(lambda hidden, name=name: make(name, hidden), target, widths[name])
            flow = make(name, widths[name])
            row |= {"hidden": list(widths[name]), "parameters": parameter_count(flow)}
            row["footnote"] = footnote(name, flow, widths[name], target)
        except Exception as error:
            row["failed"] = reason(error)
    return widths


def time_all(task: Task, shape: dict, widths: dict[str, tuple[int, ...]], table: "Table", compile: bool) -> None:
    """Time a training step, log_prob and sampling of all flows in turn, A B C A B C, and the step's memory."""
    wanted = [name for name in widths if "failed" not in table.rows[name]]
    if all("times" in table.rows[name] for name in wanted):
        return
    x, flows = task.vectors(task.batch_size), {}
    for name in dict.fromkeys((REFERENCE, *wanted)):
        torch.manual_seed(0)
        hidden = widths.get(name, shape["hidden_features"])
        try:
            flows[name] = build(name, task.features, shape["layers"], hidden, task.masks, task.preprocess, SPLINES)
            flows[name].to(task.device)
        except Exception as error:
            table.rows[name]["failed"] = reason(error)
    calls: dict[str, dict] = {kind: {} for kind in KINDS}
    for name, flow in flows.items():
        calls["step"][name] = training_step(flow.parameters(), lambda flow=flow: -flow.log_prob(x).mean())
        calls["log_prob"][name] = torch.no_grad()(lambda flow=flow: flow.log_prob(x))
        calls["sample"][name] = torch.no_grad()(lambda flow=flow: flow.sample(len(x)))
    for kind in tqdm(KINDS, desc="timing", unit="kind", leave=False, disable=None):
        times, failed = measure(calls[kind], task.device)
        for name in widths:
            row = table.rows[name]
            if name in failed:
                row.setdefault("failed", f"{kind}: {reason(failed[name])}")
            elif "failed" not in row:
                found = {"ms": statistics.median(times[name]), "ratio": ratio_of(times[name], times[REFERENCE])}
                row.setdefault("times", {})[kind] = found
    for name, row in table.rows.items():
        if name in flows and "failed" not in row:
            row["memory_mib"] = peak_of_step(flows[name], x)
            if compile:
                row["compile"] = compile_gain(flows[name], x)
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
    points = task.vectors(1000) if task.box is not None or task.features > 64 else flow.sample(100).detach()
    found = gates.check(flow, points, task.box)
    row["gates"] = {key: max(value, row.get("gates", {}).get(key, value)) for key, value in found.items()}
    if failed := gates.failures(found):
        row["gate_failures"] = failed
    value, error = trial.score()
    pace = fitted.seconds / fitted.steps
    if fitted.notes:
        row["notes"] = fitted.notes
    row["curves"][str(seed)] = [(round(step * pace, 3), round(sign * loss, 5)) for step, loss in fitted.losses]
    row["scores"][str(seed)] = {"value": value, "stderr": error, "steps": fitted.steps, "seconds": fitted.seconds}
    if seed == 0:
        (out / "learned").mkdir(exist_ok=True)
        with torch.no_grad():
            np.save(out / "learned" / f"{name.replace(':', '.')}.npy", trial.picture())


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
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); start again without --resume") from error
        if began != arguments:
            changes = "; ".join(f"{k} was {began.get(k)}, not {v}" for k, v in arguments.items() if began.get(k) != v)
            raise ValueError(f"{self.path} belongs to another comparison: {changes}. Resume with its own arguments")

    def save(self) -> None:
        record = {"arguments": self.arguments, "versions": self.versions, "rows": self.rows}
        write_text(self.path, json.dumps(record, indent=1) + "\n")

    def ranked(self, names: list[str], task: Task) -> list[str]:
        """Best first; then those that failed a gate, then those that failed."""
        sign = -1 if task.higher_is_better else 1

        def key(name: str) -> tuple:
            row = self.rows[name]
            if "failed" in row or not row["scores"]:
                return (2, 0.0)
            return ("gate_failures" in row, sign * score(row)[0])

        return sorted(names, key=key)

    def cells(self, name: str, task: Task) -> list[str]:
        row = self.rows[name]
        if "failed" in row:
            return [name, f"failed: {row['failed']}"]
        value, error = score(row)
        digits = max(2, 1 - math.floor(math.log10(error))) if 0 < error < 1 else 2
        figure = f"{value:.{digits}f} ± {error:.{digits}f}"
        if "gate_failures" in row:
            figure = f"not ranked: {'; '.join(row['gate_failures'])} ({figure})"
        times = [f"{row['times'][kind]['ms']:.2f} ({row['times'][kind]['ratio']:.2f})" for kind in KINDS]
        compiled = row.get("compile")
        cells = [name, figure, f"{row['parameters']:,}", *times, f"{row['memory_mib']:.1f}"]
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
            if "footnote" in self.rows[name]:
                notes.append(f"{len(notes) + 1}. **{name}**: {self.rows[name]['footnote']}")
                cells[0] += f" [{len(notes)}]"
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
        text = "\n".join([f"# {self.arguments['task']}", "", *lines, "", *fairness(self, task, seeds), "", *notes, ""])
        write_text(self.out / "compare.md", text)


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
        f"Gates, in float64 after training: round trip {gates.ROUND_TRIP:g}, log-determinant beside autograd's "
        f"{gates.LOG_DET:g}, ∫p {gates.MASS:g}, log_prob of samples {gates.AGREEMENT:g}. Who fails one is not ranked. "
        "Times are medians of calls in turn (A B C A B C) in one process after a warm-up, in brackets the ratio to "
        f"{REFERENCE}; memory is the most that a training step allocates.",
        "",
        ", ".join(f"{key} {value}" for key, value in table.versions.items()) + ".",
    ]


def draw(table: Table, names: list[str], task: Task, out: Path) -> list[Path]:
    done = [
        name for name in table.ranked(names, task) if table.rows[name]["scores"] and "failed" not in table.rows[name]
    ]
    if not done:
        return []
    return [draw_gallery(table, done, task, out), draw_curves(table, done, task, out), draw_times(table, done, out)]


def draw_gallery(table: Table, names: list[str], task: Task, out: Path) -> Path:
    """A panel for each flow, best first: the density that it learned, or its samples."""
    path = out / "gallery.png"
    panels = [(name, np.load(out / "learned" / f"{name.replace(':', '.')}.npy")) for name in names]
    if task.box is not None:
        from runs.toy import on_grid

        panels.insert(0, ("true density", on_grid(task.true, len(panels[0][1]))))
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
            axis.imshow(values, interpolation="nearest", **how)
            title = name if name not in table.rows else f"{name}\n{score(table.rows[name])[0]:#.3g} {task.unit}"
            if "gate_failures" in table.rows.get(name, {}):
                title = f"{name}\nfails a gate"
            axis.set_title(title, fontsize=7.5, pad=3)
    return path


def draw_curves(table: Table, names: list[str], task: Task, out: Path, shown: int = 8) -> Path:
    """Training loss against time, the first seed's: the best few by name, the others faint."""
    path = out / "quality.png"
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
        if not task.higher_is_better and task.measure == "KL":
            axes.set_yscale("log")
            figures.log_ticks(axes.yaxis)
        if seen:  # the first steps of some are far off, and would hide the rest
            low, high = np.quantile(seen, (0, 0.97) if not task.higher_is_better else (0.03, 1))
            margin = 0.04 * (high - low)
            axes.set_ylim(*(low / 1.1, high) if axes.get_yscale() == "log" else (low - margin, high + margin))
        axes.set(xlabel="seconds of training", ylabel=f"{task.measure} of the batches ({task.unit})")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return path


def draw_times(table: Table, names: list[str], out: Path) -> Path:
    """Step, log_prob and sample time on logarithmic axes, fastest step first."""
    path = out / "times.png"
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
    return path


if __name__ == "__main__":
    cli(main)
