"""The table of a comparison: a row for each flow, kept in compare.json, ranked, and written down as compare.md."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from runs.common import gates
from runs.common.contestants import REFERENCE
from runs.common.cost import KINDS
from runs.common.results import versions, write_text
from runs.common.tasks import SPLINES, TASKS, Task

TABLE, REPORT = "compare.json", "compare.md"
Row = dict[str, Any]  # as ``ROW``, ``ONCE_TIMED`` and ``OPTIONAL`` below say


class Table:
    """The rows so far. A row that is done stays done when the comparison is resumed.

    Args:
        arguments: those that a comparison must be resumed with, as plain data.
        rows: by the flows' names.
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

    # The file

    def save(self, directory: Path) -> None:
        record = {"arguments": self.arguments, "versions": self.versions, "rows": self.rows}
        write_text(directory / TABLE, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path, remedy: str = "run it again") -> "Table":
        """The table of the comparison in that directory.

        Raises:
            ValueError: if the file is damaged; ``remedy`` says what to do.
        """
        path = directory / TABLE
        try:
            record = json.loads(path.read_text())
            check_record(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
        return cls(record["arguments"], record["rows"], record.get("versions", {}))

    @classmethod
    def resume(cls, directory: Path, arguments: dict[str, Any]) -> "Table":
        """The table of a comparison that is to go on. What has failed in it is tried again: it may have been chance.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or of a comparison with other arguments.
        """
        path = directory / TABLE
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: no {TABLE} in {directory}")
        table = cls.load(directory, "start again without --resume")
        began = table.arguments
        if began != arguments:
            changes = "; ".join(f"{k} was {began.get(k)}, not {v}" for k, v in arguments.items() if began.get(k) != v)
            raise ValueError(f"{path} belongs to another comparison: {changes}. Resume with its own arguments")
        for name, row in table.rows.items():
            if "gate_failures" in row or ("failed" in row and not row["scores"]):
                table.rows[name] = new_row()
            row.pop("failed", None)
        table.versions = versions()
        return table

    # The rows

    def scored(self, name: str) -> bool:
        return bool(self.rows[name]["scores"]) and "failed" not in self.rows[name]

    def ranked(self, names: list[str]) -> list[str]:
        """Best first; then those that failed a gate; last those that have no score."""
        sign = -1 if self.task.higher_is_better else 1

        def key(name: str) -> tuple[int, float]:
            row = self.rows[name]
            if not self.scored(name):
                return (2 + ("failed" in row), 0.0)
            return ("gate_failures" in row, sign * mean_score(row)[0])

        return sorted(names, key=key)

    def cells(self, name: str) -> list[str]:
        """What a row says, in words and figures."""
        row = self.rows[name]
        if "failed" in row:
            return [name, f"failed: {row['failed']}"]
        if "untrained" in row:
            return [name, f"not trained: {'; '.join(row['gate_failures'])}"]
        if not row["scores"]:
            return [name, "not trained yet"]
        value, error = mean_score(row)
        digits = max(2, 1 - math.floor(math.log10(error))) if 0 < error < 1 else 2
        score = f"{value:.{digits}f} ± {error:.{digits}f}"
        if "gate_failures" in row:
            score = f"not ranked: {'; '.join(row['gate_failures'])} ({score})"
        times = [f"{row['times'][kind]['ms']:.2f} ({row['times'][kind]['ratio']:.2f})" for kind in KINDS]
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
        cells = [name, score, f"{row['parameters']:,}", *times, memory]
        if compiled := row.get("compile"):
            cells.append(f"{compiled['gain']:.2f}" if "gain" in compiled else f"no: {compiled['failed']}")
        return cells

    def columns(self) -> list[str]:
        score = f"{self.task.measure} ({self.task.unit})"
        times = [f"{kind} ms" for kind in KINDS]
        return ["flow", score, "parameters", *times, "MiB", *["compiled"] * self.arguments["compile"]]

    # The table as text

    def header(self) -> str:
        return self._align(self.columns())

    def line(self, name: str) -> str:
        return self._align(self.cells(name))

    def _align(self, cells: list[str]) -> str:
        """Figures to the right under their columns' names, the flow's name and its score to the left."""
        left, right = (max(map(len, self.rows)), 20), (10, 15, 15, 17, 7, 16)
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, left, strict=False)]
        return " ".join(padded + [f"{cell:>{width}}" for cell, width in zip(cells[2:], right, strict=False)])

    def report(self, names: list[str], out: Path) -> Path:
        """Print the ranking, and write it to ``compare.md`` with what was equal and what could not be made so."""
        ranked = self.ranked(names)
        print("\n" + "\n".join([self.header(), *(self.line(name) for name in ranked)]))
        columns = self.columns()
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        footnotes: list[str] = []
        for name in ranked:
            cells, row = self.cells(name), self.rows[name]
            notes = (note[:1].upper() + note[1:].rstrip(".") + "." for note in row.get("notes", ()))
            if text := " ".join(filter(None, (row.get("footnote"), *notes))):
                footnotes.append(f"{len(footnotes) + 1}. **{name}**: {text}")
                cells[0] += f" [{len(footnotes)}]"
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
        what_was_equal = self.what_was_equal(max([1, *(len(self.rows[name]["scores"]) for name in names)]))
        text = [f"# {self.arguments['task']}", "", *lines, "", *what_was_equal, "", *footnotes, ""]
        return write_text(out / REPORT, "\n".join(text))

    def what_was_equal(self, seeds: int) -> list[str]:
        """What was the same for all flows, in words."""
        arguments, task, recipe = self.arguments, self.task, self.task.recipe
        hidden = "×".join(map(str, arguments["hidden"] or task.hidden))
        return [
            f"The same for all: {arguments['budget']} of training ({seeds} seed{'s' * (seeds > 1)}; ± is the standard "
            f"error), batch {task.batch_size}, AdamW at {recipe['lr']:g} with the same schedule, averaged weights, the "
            f"same fixed preprocessing, {arguments['layers'] or task.layers} layers, hidden widths {hidden} (matched: "
            f"{arguments['match']}), alternating masks (1 = unchanged; autoregressive flows have none), base N(0, I) "
            f"fixed, data → noise in one pass, splines of {SPLINES['bins']} bins in [−{SPLINES['tail_bound']:g}, "
            f"{SPLINES['tail_bound']:g}].",
            "",
            f"{gates.IN_WORDS} Times are medians of calls in turn (A B C A B C) in one process after a warm-up, steps "
            f"in training mode and the rest in evaluation mode, in brackets the ratio to {REFERENCE}; memory is the "
            "most that a training step allocates.",
            "",
            ", ".join(f"{key} {value}" for key, value in self.versions.items()) + ".",
        ]


def new_row() -> Row:
    """A row of which nothing is known yet."""
    return {"scores": {}, "curves": {}}


def mean_score(row: Row) -> tuple[float, float]:
    """Mean over the seeds and its standard error; of a single seed, the score's own."""
    scores = list(row["scores"].values())
    values = [score["value"] for score in scores]
    if len(values) == 1:
        return values[0], scores[0]["stderr"]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


# What compare.json must be

NUMBER, TEXTS, NONE = (int, float), [str], type(None)
ARGUMENTS = {"task": str, "budget": str, "match": str, "layers": (int, NONE), "hidden": (list, NONE), "compile": bool}
TIMES = {kind: {"ms": NUMBER, "ratio": NUMBER} for kind in KINDS}
ONCE_TIMED = {"hidden": [int], "parameters": int, "footnote": str, "times": TIMES, "memory_mib": (*NUMBER, NONE)}
ROW = {
    "scores": {...: {"value": NUMBER, "stderr": NUMBER, "steps": int, "seconds": NUMBER}},
    "curves": {...: [[NUMBER]]},
}
OPTIONAL = {"failed": str, "untrained": bool, "gate_failures": TEXTS, "notes": TEXTS, "gates": {...: NUMBER}}


def check_record(record: Any) -> None:
    """Raise a ValueError that names the entry unless that is what ``Table.save`` writes."""
    check_shape(record, {"arguments": ARGUMENTS, "rows": {...: dict}}, "it")
    if record["arguments"]["task"] not in TASKS:
        raise ValueError(f"its task is {record['arguments']['task'][:40]!r}")
    for name, row in record["rows"].items():
        what = f"the row {name}"
        scored = bool(row.get("scores"))
        check_shape(row, ROW | (ONCE_TIMED if scored else {}), what)
        known = ONCE_TIMED | OPTIONAL | {"compile": dict}
        check_shape(row, {key: kind for key, kind in known.items() if key in row and key != "times"}, what)
        if record["arguments"].get("compile") and scored:
            compiled = "failed" not in row.get("compile", {})
            check_shape(row, {"compile": {"gain": NUMBER} if compiled else {"failed": str}}, what)
        for curve in row["curves"].values():
            if any(len(pair) != 2 for pair in curve):
                raise ValueError(f"{what}: a curve has points that are no pairs")


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
