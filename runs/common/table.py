"""The table of a comparison: what each training of each flow has given, in compare.json and, ranked, in compare.md."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs.common import gates
from runs.common.contestants import REFERENCE
from runs.common.cost import KINDS
from runs.common.ranking import LEVEL, rank_ranges
from runs.common.results import versions, write_text
from runs.common.tasks import SPLINES, TASKS, Task

TABLE, REPORT = "compare.json", "compare.md"
FORMAT = 2  # of compare.json; in the first one a flow had a single budget
WIDEST_CELL = 60  # characters; the reason why a flow has no score may be longer, and then pushes aside what follows
Row = dict[str, Any]  # as ``TRAININGS``, ``MEASURED`` and ``OPTIONAL`` below say


class Table:
    """What is known of each flow so far. A training that is done stays done when the comparison is resumed.

    Args:
        arguments: those that a comparison must be resumed with, as plain data.
        rows: what is known of each flow, by its name.
        library_versions: of all libraries in use.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        rows: dict[str, Row] | None = None,
        library_versions: dict[str, str] | None = None,
    ):
        self.arguments, self.rows = arguments, {} if rows is None else rows
        self.versions = versions() if library_versions is None else library_versions

    @property
    def task(self) -> type[Task]:
        return TASKS[self.arguments["task"]]

    @property
    def budgets(self) -> list[str]:
        """Of each training, the smallest first."""
        return self.arguments["budget"]

    # The file

    def save(self, directory: Path) -> None:
        record = {"format": FORMAT, "arguments": self.arguments, "versions": self.versions, "rows": self.rows}
        write_text(directory / TABLE, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path, remedy: str = "run it again") -> "Table":
        """The table of the comparison in that directory.

        Raises:
            ValueError: if the file is damaged or an earlier version's; ``remedy`` says what to do.
        """
        path = directory / TABLE
        try:
            record = json.loads(path.read_text())
            earlier = record.get("format") != FORMAT
            if not earlier:
                check_record(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
        if earlier:
            raise ValueError(f"{path} was written by another version of compare.py, and can't be read; {remedy}")
        return cls(record["arguments"], record["rows"], record["versions"])

    @classmethod
    def resume(cls, directory: Path, arguments: dict[str, Any]) -> "Table":
        """The table of a comparison that is to go on. What has failed in it is tried again: it may have been chance.

        Raises:
            ValueError: if it is damaged, an earlier version's, or of a comparison with other arguments.
        """
        table = cls.load(directory, "start again without --resume")
        began = table.arguments
        if began != arguments:
            changes = "; ".join(
                f"{key} was {in_words(began.get(key))}, not {in_words(value)}"
                for key, value in arguments.items()
                if began.get(key) != value
            )
            raise ValueError(
                f"{directory / TABLE} belongs to another comparison: {changes}. Resume with its own arguments"
            )
        for name, row in table.rows.items():
            if table.gate_failures(name) or ("failed" in row and not row["trainings"]):
                table.rows[name] = new_row()
            row.pop("failed", None)
        table.versions = versions()
        return table

    # The rows

    def trainings(self, name: str, budget: str) -> list[dict[str, Any]]:
        """Those of that flow that have had that budget, in the order of their seeds."""
        found = [training for training in self.rows[name]["trainings"] if training["budget"] == budget]
        return sorted(found, key=lambda training: training["seed"])

    def is_done(self, name: str, seed: int, budget: str) -> bool:
        return any(training["seed"] == seed for training in self.trainings(name, budget))

    def scores(self, name: str, budget: str) -> list[float]:
        return [training["score"] for training in self.trainings(name, budget)]

    def scored(self, name: str) -> bool:
        return bool(self.rows[name]["trainings"]) and "failed" not in self.rows[name]

    def gate_failures(self, name: str) -> str:
        """Which gates that flow has not passed, in words; empty if it has passed all."""
        row = self.rows[name]
        if "untrained" in row:
            return "; ".join(row["untrained"])
        failed = [training["gate_failures"] for training in row["trainings"] if training["gate_failures"]]
        return "; ".join(failed[0]) if failed else ""

    def ranked(self, names: Sequence[str]) -> list[str]:
        """Those flows, the best mean score at the longest budget first.

        A flow whose trainings have not come to that budget yet follows, by its score at the next one. Then come those
        that failed a gate, and last those that have no score.
        """
        sign = -1 if self.task.higher_is_better else 1

        def key(name: str) -> tuple[int, int, float]:
            if not self.scored(name):
                return (2 + ("failed" in self.rows[name]), 0, 0.0)
            means = [statistics.fmean(scores) if scores else None for scores in self._scores_by_budget(name)]
            place, mean = next((place, mean) for place, mean in enumerate(reversed(means)) if mean is not None)
            return (bool(self.gate_failures(name)), place, sign * mean)

        return sorted(names, key=key)

    def _scores_by_budget(self, name: str) -> list[list[float]]:
        return [self.scores(name, budget) for budget in self.budgets]

    def ranks(self, names: Sequence[str], budget: str) -> dict[str, tuple[int, int]]:
        """The best and the worst rank, at that budget, of each of those flows that is ranked and trained twice or more.

        See ``rank_ranges``.
        """
        sign = -1 if self.task.higher_is_better else 1
        scores = {
            name: [sign * score for score in self.scores(name, budget)]
            for name in names
            if self.scored(name) and not self.gate_failures(name)
        }
        return rank_ranges({name: values for name, values in scores.items() if len(values) > 1})

    def _are_all_alike(self, names: Sequence[str]) -> bool:
        """Whether there are ranks, and no two of the flows can be told apart at any budget."""
        found = [ranks for budget in self.budgets if len(ranks := self.ranks(names, budget)) > 1]
        return bool(found) and all(rank == (1, len(ranks)) for ranks in found for rank in ranks.values())

    # The table as text

    def columns(self) -> list[str]:
        measure = f"{self.task.measure} ({self.task.unit})"
        scores = [(f"{measure} after {budget}", "rank") for budget in self.budgets]
        times = [f"{kind} ms" for kind in KINDS]
        compiled = ["compiled"] * self.arguments["compile"]
        return ["flow", *itertools.chain(*scores), "parameters", *times, "MiB", *compiled]

    def cells(self, names: Sequence[str]) -> list[list[str]]:
        """What the rows of these flows say, in words and figures."""
        ranks = [self.ranks(names, budget) for budget in self.budgets]
        return [self._cells_of(name, [found.get(name) for found in ranks]) for name in names]

    def _cells_of(self, name: str, ranks: Sequence[tuple[int, int] | None]) -> list[str]:
        row, gate_failures = self.rows[name], self.gate_failures(name)
        if "failed" in row:
            return [name, f"failed: {row['failed']}"]
        if "untrained" in row:
            return [name, f"not trained: {gate_failures}"]
        if not row["trainings"]:
            return [name, "not trained yet"]
        scores = [self.score_in_words(name, budget) for budget in self.budgets]
        places = [rank_in_words(rank) for rank in ranks]
        if gate_failures:
            scores[0] = f"not ranked: {gate_failures} ({scores[0]})"
            places = ["none"] * len(places)
        times = [f"{row['times'][kind]['ms']:.2f} ({row['times'][kind]['ratio']:.2f})" for kind in KINDS]
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
        cells = [name, *itertools.chain(*zip(scores, places, strict=True)), f"{row['parameters']:,}", *times, memory]
        if compiled := row.get("compile"):
            cells.append(f"{compiled['gain']:.2f}" if "gain" in compiled else f"no: {compiled['failed']}")
        return cells

    def score_in_words(self, name: str, budget: str) -> str:
        """The mean over the seeds and its standard deviation; of a single seed, the score alone."""
        trainings = self.trainings(name, budget)
        if not trainings:
            return "not trained yet"
        scores = [training["score"] for training in trainings]
        if len(scores) == 1:
            return number_with_digits(scores[0], trainings[0]["stderr"])
        deviation = statistics.stdev(scores)
        mean = number_with_digits(statistics.fmean(scores), deviation)
        return f"{mean} ± {number_with_digits(deviation, deviation)}"

    def report(self, names: Sequence[str], out: Path) -> Path:
        """Print the ranking, and write it to ``compare.md`` with what was equal and what could not be made so."""
        ranked = self.ranked(names)
        columns, rows = self.columns(), self.cells(ranked)
        print("\n" + "\n".join(aligned([columns, *rows])))
        if self._are_all_alike(ranked):
            print("No two flows can be told apart by these trainings: more --seeds tell more.")
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        footnotes: list[str] = []
        for name, cells in zip(ranked, rows, strict=True):
            row = self.rows[name]
            notes = (note[:1].upper() + note[1:].rstrip(".") + "." for note in row.get("notes", ()))
            if text := " ".join(filter(None, (row.get("footnote"), *notes))):
                footnotes.append(f"{len(footnotes) + 1}. **{name}**: {text}")
                cells = [f"{name} [{len(footnotes)}]", *cells[1:]]
            lines.append(f"| {' | '.join(cells + [''] * (len(columns) - len(cells)))} |")
        paragraphs = [f"# {self.arguments['task']}", "\n".join(lines), *self.explanation(ranked), *footnotes]
        return write_text(out / REPORT, "\n\n".join(paragraphs) + "\n")

    def explanation(self, names: Sequence[str]) -> list[str]:
        """How to read the table, what was the same for all flows, and how they were checked: a paragraph each."""
        arguments, task, recipe = self.arguments, self.task, self.task.recipe
        hidden = "×".join(map(str, arguments["hidden"] or task.hidden))
        matched = {
            "width": f"hidden layers of {hidden} units",
            "parameters": f"as many parameters as {REFERENCE} with hidden layers of {hidden} units",
        }[arguments["match"]]
        return [
            self._explained_ranks(names),
            f"The same for all: {self._budgets_in_words()} for each training, batches of {task.batch_size}, AdamW with "
            f"a learning rate of {recipe['lr']:g} and the same schedule, which fits itself to the budget, averaged "
            f"weights, the same fixed preprocessing, {arguments['layers'] or task.layers} layers, {matched}, "
            "alternating masks (1 = unchanged; autoregressive flows have none), a fixed base N(0, I), data → noise in "
            f"one pass, and splines of {SPLINES['bins']} bins in [−{SPLINES['tail_bound']:g}, "
            f"{SPLINES['tail_bound']:g}].",
            f"{gates.IN_WORDS} After training this is done for the first seed.",
            "Times are wall-clock: medians of calls in turn (A B C A B C) in one process after a warm-up, of steps in "
            "training mode and of the rest in evaluation mode. In brackets they are given as a multiple of "
            f"{REFERENCE}'s. Memory is the most that a training step allocates.",
            ", ".join(f"{key} {value}" for key, value in self.versions.items()) + ".",
        ]

    def _budgets_in_words(self) -> str:
        """Such as *3 s and 10 s of one core's CPU time*."""
        last = self.budgets[-1]
        if last.endswith("steps"):
            return " and ".join(budget.removesuffix("steps") for budget in self.budgets) + " steps"
        seconds = " and ".join(f"{budget.removesuffix('s')} s" for budget in self.budgets)
        return f"{seconds} of {CLOCKS[self.arguments['clock']]}"

    def _explained_ranks(self, names: Sequence[str]) -> str:
        """What ± means, and what is known of the ranks."""
        found = [self.trainings(name, budget) for name in names if self.scored(name) for budget in self.budgets]
        found = [trainings for trainings in found if trainings]
        worst = max((training["stderr"] for trainings in found for training in trainings), default=0.0)
        points = (
            f"All scores are of the same test points. How much one flow's score depends on these points is not in the "
            f"±: its standard error over the points is at most {number_with_digits(worst, worst)} {self.task.unit}."
        )
        counts = sorted({len(trainings) for trainings in found}) or [0]
        if counts[-1] < 2:
            return (
                "Each flow is trained once, from one seed. Another seed gives another score, so the order of the rows "
                f"is that of these scores and no more: the ranks are not known. --seeds 5 makes them known. {points}"
            )
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        first = []
        for budget in self.budgets:
            if best := [name for name, (low, _) in self.ranks(names, budget).items() if low == 1]:
                first.append(f"After {budget} the first rank can't be denied to {', '.join(best)}.")
        return (
            f"Each score is the mean over {seeds} trainings from different seeds, ± the standard deviation from one "
            "training to another. Each rank is the range of those that these trainings can't exclude: one flow is "
            "better than another only where Welch's t-test between their trainings is significant after Holm's "
            "correction for all pairs of flows, so that all ranges of a column hold at once with a confidence of "
            f"{100 * (1 - LEVEL):g} % (Mogstad et al., Inference for Ranks, 2024). The order of the rows, by the mean, "
            f"says no more than these ranges do. {' '.join(first)} {points}"
        )


CLOCKS = {"cpu": "one core's CPU time", "wall": "wall-clock time"}


def new_row() -> Row:
    """A row of which nothing is known yet."""
    return {"trainings": []}


def rank_in_words(rank: tuple[int, int] | None) -> str:
    if rank is None:
        return "not known"
    low, high = rank
    return f"{low}" if low == high else f"{low}–{high}"


def number_with_digits(value: float, error: float) -> str:
    """The value with as many decimals as two digits of its error have, but at least two."""
    decimals = max(2, 1 - math.floor(math.log10(error))) if 0 < error < 1 else 2
    return f"{value:.{decimals}f}"


def in_words(argument: Any) -> str:
    return " ".join(map(str, argument)) if isinstance(argument, list) else str(argument)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and all others to the right under their heads."""
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [max(len(cell) for cell in column if len(cell) <= WIDEST_CELL) for column in columns]
    lines = []
    for first, *others in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *right]))
    return lines


# What compare.json must be

NUMBER, TEXTS, NONE = (int, float), [str], type(None)
ARGUMENTS = {
    "task": str,
    "budget": TEXTS,
    "match": str,
    "layers": (int, NONE),
    "hidden": (list, NONE),
    "compile": bool,
    "clock": str,
}
TRAININGS = [
    {
        "seed": int,
        "budget": str,
        "score": NUMBER,
        "stderr": NUMBER,
        "steps": int,
        "seconds": NUMBER,
        "curve": [[NUMBER]],
        "gates": {...: NUMBER},
        "gate_failures": TEXTS,
    }
]
TIMES = {kind: {"ms": NUMBER, "ratio": NUMBER} for kind in KINDS}
MEASURED = {"hidden": [int], "parameters": int, "footnote": str, "times": TIMES, "memory_mib": (*NUMBER, NONE)}
OPTIONAL = {"failed": str, "untrained": TEXTS, "notes": TEXTS}


def check_record(record: Any) -> None:
    """Raise a ValueError that names the entry unless that is what ``Table.save`` writes."""
    check_shape(record, {"arguments": ARGUMENTS, "versions": {...: str}, "rows": {...: {"trainings": TRAININGS}}}, "it")
    arguments = record["arguments"]
    if arguments["task"] not in TASKS:
        raise ValueError(f"its task is {arguments['task'][:40]!r}")
    if arguments["clock"] not in CLOCKS:
        raise ValueError(f"its clock is {arguments['clock'][:40]!r}")
    for name, row in record["rows"].items():
        known = MEASURED | OPTIONAL
        wanted = {key: kind for key, kind in known.items() if key in row and key != "times"}
        if row["trainings"]:
            wanted |= MEASURED
            if arguments["compile"]:
                failed = "failed" in row.get("compile", {})
                wanted["compile"] = {"failed": str} if failed else {"gain": NUMBER}
        check_shape(row, wanted, f"the row {name}")
        for training in row["trainings"]:
            if any(len(pair) != 2 for pair in training["curve"]):
                raise ValueError(f"the row {name}: a curve has points that are no pairs")


def check_shape(value: Any, wanted: Any, what: str) -> None:
    """Raise a ValueError unless ``value`` is of the type, or has the entries, that ``wanted`` says.

    ``wanted`` is a type, several, a list of what each entry is, or a dictionary of what the entries are that must be
    there; ``...`` stands for any key.
    """
    kind = type(wanted) if isinstance(wanted, dict | list) else wanted
    if not _is_a(value, kind):
        raise ValueError(f"{what} is {str(value)[:40]!r}, not what it should be")
    if isinstance(wanted, list):
        for i, entry in enumerate(value):
            check_shape(entry, wanted[0], f"{what}, entry {i}")
    elif isinstance(wanted, dict):
        for key in value if ... in wanted else wanted:
            if key not in value:
                raise ValueError(f"{what} lacks {key!r}")
            check_shape(value[key], wanted.get(key, wanted.get(...)), f"{what}, {key}")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether the value is of that type, where no boolean counts as an integer."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
