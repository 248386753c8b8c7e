"""runs/compare.py: its gates catch wrong flows, matching matches, rows survive, and anybody's own flow takes part."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from adapters import build_flow, flow_names
from adapters.check.evidence import Quadrature
from adapters.check.subject import TookTooLong, time_limit
from runs import pyro_vae
from runs.common import contestants, gates, speed, tasks
from runs.common.comparison import Effort, Unfit, parse_budget, parse_budgets, patiently
from runs.common.cost import KINDS, TimedFlow, peak, time_kind
from runs.common.devices import make_accelerator
from runs.common.fit import fit
from runs.common.objectives import NegativeLogLikelihood
from runs.common.options import flat
from runs.common.pictures.compare import draw_quality, loss_axis, spread
from runs.common.recipe import Recipe
from runs.common.results import claimed, parameter_count, write_metrics
from runs.common.table import Table
from runs.common.tasks import DENSITY_TASKS, TASKS
from runs.common.timing import Stopwatch, ratio
from tests.scripts import pictures_in, run
from tests.students_layer import LAYER
from tests.test_own import COURSE

CPU = torch.device("cpu")
README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = {"task": "two-gaussians", "budget": "3steps", "layers": 2, "hidden": (8,)}
QUICK = Stopwatch(seconds=0.01, min_rounds=2)


def compare(**flags):
    """The rows that runs/compare.py returns; without pictures, and quickly timed, unless the seams say otherwise."""
    seams = {"draw": False, "effort": Effort(QUICK)} | flags.pop("seams", {})
    found = run("compare", seams={} if "load" in flags else seams, **flags)
    return found[flags["task"]] if flags.get("task") in TASKS else found


def scores(row):
    """Of each training, by its seed."""
    return {training["seed"]: training["score"] for training in row["trainings"]}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's own, which can then be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, code: (tmp_path / f"{name}.py").write_text(code)


def width_of(path):
    with Image.open(path) as image:
        return image.width


# Gates, of which tests/test_gates.py has more


WRONG = """
import torch
from adapters.networks import MLP
from adapters.preprocess import Standardize
class Wrong(Standardize):
    def __init__(self, features, mask):
        super().__init__(torch.zeros(features), torch.ones(features))
        self.shift = torch.nn.Parameter(torch.zeros(features))
    def forward(self, inputs, context=None):
        outputs, log_det = super().forward(inputs)
        return outputs + self.shift, log_det + self.shift.sum()
    def inverse(self, inputs, context=None):
        return super().inverse(inputs - self.shift)
"""


def test_a_flow_that_fails_a_gate_is_not_trained(tmp_path, own_module, capsys):
    own_module("wrong_one", WRONG)
    arguments = TINY | {"budget": "1steps", "flows": ("wrong_one:Wrong", "masked-affine"), "out": tmp_path / "out"}
    row = compare(**arguments)["wrong_one:Wrong"]
    last = capsys.readouterr().out.splitlines()[-3]
    words = "not trained: at z = (−0.44, −0.14) forward says "
    assert last.startswith("wrong_one:Wrong ") and words in last
    assert words in (tmp_path / "out/compare.md").read_text() and not row["trainings"]


LATER = """
import os
import torch
from adapters.preprocess import Standardize
class Later(Standardize):
    def __init__(self, features, mask):
        super().__init__(torch.zeros(features), torch.ones(features))
        self.shift = torch.nn.Parameter(torch.zeros(features))
        self.register_buffer("passes", torch.zeros(()))
    def forward(self, inputs, context=None):
        self.passes += self.training
        outputs, log_det = super().forward(inputs)
        return outputs + self.shift, log_det
    def inverse(self, inputs, context=None):
        outputs, log_det = super().inverse(inputs - self.shift)
        return outputs, log_det + 0.1 * (self.passes > 100) * ("RIGHT" not in os.environ)
"""


def test_a_flow_that_fails_a_gate_after_training_is_not_ranked(tmp_path, own_module, monkeypatch, capsys):
    """In the plane, too, the trained flow's samples are held against their log_prob."""
    own_module("later", LATER)
    arguments = TINY | {"budget": "120steps", "flows": ("later:Later", "masked-affine"), "out": tmp_path / "out"}
    rows = compare(**arguments)
    words = re.compile(r"not ranked: at z' = .* inverse says .*; off by the same 0.2 in every row \(and 1 more law is")
    assert words.search(capsys.readouterr().out) and words.search((tmp_path / "out/compare.md").read_text())
    wrong, right = (rows[name]["trainings"][0]["gates"]["samples"] for name in ("later:Later", "masked-affine"))
    assert wrong > 0.01 > 1e-6 > right
    monkeypatch.setenv("RIGHT", "1")
    rows = compare(**arguments, resume=True)
    assert [training["gate_failures"] for training in rows["later:Later"]["trainings"]] == [[]]


# Matching


@pytest.mark.parametrize(
    "name", [name for name in flow_names() if name not in ("nflows-realnvp", "nflows-maf", "normflows-maf")]
)
@pytest.mark.parametrize("features", [2, 32])
def test_parameters_are_matched_within_two_percent(name, features):
    def make(hidden):
        return build_flow(name, features, layers=2, hidden_features=hidden)

    target = parameter_count(build_flow("masked-affine", features, layers=2, hidden_features=(64, 64)))
    hidden = contestants.match_parameters(make, target, (64, 64))
    assert abs(parameter_count(make(hidden)) / target - 1) <= contestants.TOLERANCE, hidden


@pytest.mark.parametrize("name", ["nflows-realnvp", "nflows-maf", "normflows-maf"])
def test_networks_of_one_width_come_as_near_as_they_can_and_say_so(name):
    def make(hidden):
        return build_flow(name, 2, layers=2, hidden_features=hidden)

    target = parameter_count(build_flow("masked-affine", 2, layers=2, hidden_features=(64, 64)))
    hidden = contestants.match_parameters(make, target, (64, 64))
    error = abs(parameter_count(make(hidden)) / target - 1)
    for width in (hidden[0] - 1, hidden[0] + 1):
        assert abs(parameter_count(make((width, width))) / target - 1) >= error
    footnote = contestants.footnote(name, make(hidden), hidden, target)
    assert ("% parameters" in footnote) == (error > contestants.TOLERANCE)


# Rows


def test_the_whole_catalogue_has_its_rows_and_its_pictures(tmp_path, capsys):
    effort = Effort(QUICK, Quadrature(cells=80, samples=100), test_points=1000)
    rows = compare(**TINY, out=tmp_path, seams={"draw": True, "effort": effort})
    printed = capsys.readouterr().out
    assert list(rows) == flow_names() and not [row["failed"] for row in rows.values() if "failed" in row]
    for name in flow_names():
        assert printed.count(f"\n{name} ") == printed.count(f"\n{name}, 3steps, seed 0: KL ") == 1
        assert math.isfinite(scores(rows[name])[0]) and rows[name]["memory_mib"] > 0
    assert rows["masked-affine"]["times"]["step"]["ratio"] == 1
    for picture in ("gallery", "quality", "times"):
        assert width_of(tmp_path / f"{picture}.png") > 300
    text = (tmp_path / "compare.md").read_text()
    assert "at most 1.001" in text and "The same for all: 3 steps for each training" in text


def test_finished_rows_survive_an_interruption(tmp_path, capsys):
    trained = []

    def counted(*arguments, **options):
        trained.append(options)
        return fit(*arguments, **options)

    def interrupted(*arguments, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    flows = ("masked-affine", "zuko-realnvp", "nflows-affine")
    with pytest.raises(KeyboardInterrupt):
        compare(**TINY, flows=flows, out=tmp_path, seams={"fit": interrupted})
    done = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [set(scores(row)) for row in done.values()] == [{0}, {0}, set()] and list(done) == list(flows)
    capsys.readouterr()
    compare(load=tmp_path, out=tmp_path / "so far")
    assert re.search(r"\nnflows-affine +not trained yet", capsys.readouterr().out)
    rows = compare(**TINY, flows=flows, out=tmp_path, resume=True, seeds=2, seams={"fit": counted})
    assert len(trained) == 2 + 4 and all(set(scores(row)) == {0, 1} for row in rows.values())
    for name in flows[:2]:
        assert scores(rows[name])[0] == scores(done[name])[0] and rows[name]["times"] == done[name]["times"]
    assert "Each score is the mean over 2 trainings from different seeds" in (tmp_path / "compare.md").read_text()
    with pytest.raises(ValueError, match="budget was 3steps, not 4steps"):
        compare(**TINY | {"budget": "4steps"}, out=tmp_path, resume=True)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        compare(**TINY, out=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        compare(**TINY, out=tmp_path / "new", resume=True)


def test_one_failing_flow_is_a_row_that_says_why(tmp_path, own_module, capsys):
    own_module(
        "failing",
        "from adapters import build_flow\n"
        "def at_once(features):\n    raise ZeroDivisionError('in my code')\n"
        "def later(features):\n    flow = build_flow('masked-affine', features)\n"
        "    flow.transform.forward = lambda *_, **__: 1 / 0\n    return flow\n"
        "def leaves(features):\n    raise SystemExit('no data')\n"
        "def fixed(features):\n    return build_flow('masked-affine', features).requires_grad_(False)\n"
        "def text(features):\n    return 'a flow'\n",
    )
    names = ("failing:at_once", "failing:later", "failing:leaves", "failing:fixed", "failing:text", "masked-affine")
    rows = compare(**TINY, flows=names, out=tmp_path / "out")
    assert rows["failing:at_once"]["failed"].startswith(
        "failing:at_once: making it raises ZeroDivisionError: in my code (failing.py, line 3"
    )
    assert rows["failing:later"]["untrained"][0].startswith("forward raises ZeroDivisionError: division by zero (")
    assert rows["failing:leaves"]["failed"].startswith("failing:leaves: making it raises SystemExit: no data (")
    assert rows["failing:fixed"]["failed"] == "it has no parameters to train"
    assert rows["failing:text"]["untrained"][0].startswith("a str can't be called: write def forward(self, z)")
    assert math.isfinite(scores(rows["masked-affine"])[0])
    assert "making it raises ZeroDivisionError: in my code" in (tmp_path / "out/compare.md").read_text()


def test_the_readmes_own_layer_gets_its_row(tmp_path, monkeypatch):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class MyLayer" in block]
    assert len(code.splitlines()) <= 25
    (tmp_path / "readmes_layer.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    rows = compare(**TINY | {"layers": 4}, flows=("readmes_layer.py:MyLayer", "masked-affine"), out=tmp_path)
    row = rows["readmes_layer.py:MyLayer"]
    assert math.isfinite(scores(row)[0]) and not row["trainings"][0]["gate_failures"]
    network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 2))
    assert row["parameters"] == 4 * 2 * parameter_count(network)


WRONG_SAMPLER = """

class SamplesTheWrongWay(Flow):
    def sample(self, sample_shape=(1,)):
        return self.inverse(self.base().sample(sample_shape))[0]


def make_wrong_sampler(features, masks):
    return make_flow(features, masks, SamplesTheWrongWay)
"""


def test_a_flow_whose_own_sample_is_wrong_is_not_trained(tmp_path, monkeypatch):
    (tmp_path / "whole_flow.py").write_text(COURSE + WRONG_SAMPLER)
    monkeypatch.chdir(tmp_path)
    names = ("whole_flow.py:make_flow", "whole_flow.py:make_wrong_sampler")
    right, wrong = compare(**TINY, flows=names, out=tmp_path).values()
    assert math.isfinite(scores(right)[0])
    assert not wrong["trainings"] and wrong["untrained"][0] == "sample runs data → noise"


def test_a_librarys_own_class_is_a_factory(tmp_path):
    rows = compare(**TINY, flows=("zuko.flows:MAF",), out=tmp_path)
    assert math.isfinite(scores(rows["zuko.flows:MAF"])[0])


@pytest.mark.parametrize("task", ["mnist", "vae-prior"])
def test_image_tasks(task, tmp_path):
    arguments = TINY | {"task": task, "limit": 200, "flows": ("masked-affine", "zuko-realnvp"), "match": "parameters"}
    rows = compare(**arguments, out=tmp_path, seams={"draw": True})
    values = [scores(row)[0] for row in rows.values()]
    assert all(map(math.isfinite, values)) and (tmp_path / "gallery.png").exists()
    assert (max(values) < 0) == (task == "vae-prior")


def test_a_flow_prior_is_trained_as_its_own_run_trains_it():
    defaults = flat(pyro_vae.Options())
    assert tasks.VaePrior.recipe == {name: defaults[name] for name in tasks.VaePrior.recipe}
    assert {"lr", "warmup", "decay", "average", "clip"} <= set(tasks.VaePrior.recipe)


def trained(*values, budget="1s", curve=()):
    """A row with a training from each seed."""
    common = {"budget": budget, "stderr": 0.1, "seconds": 1.0, "steps": 1, "gates": {}, "gate_failures": []}
    found = [common | {"seed": seed, "score": value, "curve": list(curve)} for seed, value in enumerate(values)]
    return {"trainings": found}


def test_better_scores_are_ranked_first():
    def ranked(task):
        return Table({"task": task, "budget": ["1s"]}, rows).ranked(list("abc"))

    rows = {name: trained(value) for name, value in zip("abc", (-3, -1, -2), strict=True)}
    assert ranked("vae-prior") == ["b", "c", "a"] and ranked("two-gaussians") == ["a", "c", "b"]
    rows["a"]["trainings"][0]["gate_failures"] = ["round trip"]
    rows["b"]["failed"] = "why"
    assert ranked("two-gaussians") == ["c", "a", "b"]


# Seeds and budgets


class Stops:
    """Trains as ``fit`` does, notes the order, and is interrupted at a given training."""

    def __init__(self, at=10**9):
        self.at, self.clocks = at, []

    def __call__(self, *arguments, clock, **options):
        self.clocks.append(clock)
        if len(self.clocks) > self.at:
            raise KeyboardInterrupt
        return fit(*arguments, clock=clock, **options)


def test_one_command_trains_every_seed_and_budget_of_every_task_and_goes_on(tmp_path, capsys):
    common = {"task": "all", "budget": ("4steps", "2steps"), "seeds": 2, "layers": 2, "hidden": (8,), "limit": 200}
    common |= {"flows": ("masked-affine", "nflows-affine"), "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(**common, seams={"fit": Stops(at=18)})
    assert "all trainings that have ended are kept; --resume goes on" in capsys.readouterr().err
    done = {task: json.loads((tmp_path / task / "compare.json").read_text())["rows"] for task in DENSITY_TASKS}
    order = [(training["seed"], training["budget"]) for training in done["mnist"]["masked-affine"]["trainings"]]
    assert order == [(0, "2steps"), (0, "4steps")]  # the first seed of all tasks comes before the second of any
    assert [len(row["trainings"]) for row in done["two-gaussians"].values()] == [3, 3]
    rest = Stops()
    rows = compare(**common, resume=True, seams={"fit": rest, "draw": True})
    assert len(rest.clocks) == 32 - 18 and list(rows) == list(DENSITY_TASKS)
    for task in DENSITY_TASKS:
        assert [len(row["trainings"]) for row in rows[task].values()] == [4, 4]
        kept = done[task]["masked-affine"]["trainings"]
        assert scores(rows[task]["masked-affine"])[0] == pytest.approx(kept[1]["score"])
        assert width_of(tmp_path / task / "quality.png") > 300
    text = (tmp_path / "mnist/compare.md").read_text()
    assert "NLL (bits/dim) after 2steps | rank | NLL (bits/dim) after 4steps | rank" in text
    assert compare(**TINY | {"task": "mnist", "budget": ("2steps", "4steps"), "limit": 200}, flows=common["flows"],
                   out=tmp_path / "mnist", resume=True)["masked-affine"] == rows["mnist"]["masked-affine"]  # fmt: skip
    capsys.readouterr()
    compare(load=tmp_path, out=tmp_path / "again")
    assert all((tmp_path / "again" / task / "compare.md").is_file() for task in DENSITY_TASKS)


def test_ranks_are_claimed_only_where_the_seeds_show_them():
    def table(**rows):
        return Table({"task": "two-gaussians", "budget": ["1s", "2s"]} | EQUAL, rows)

    once = table(a=trained(1.0), b=trained(2.0))
    assert once.ranks("ab", "1s") == {} and "the ranks are not known" in once.explanation("ab")[0]
    good, bad, same = trained(1.0, 1.1, 0.9), trained(9.0, 9.1, 8.9), trained(1.05, 1.0, 0.95)
    several = table(a=good, b=bad, c=same, d=trained(5.0))
    assert several.ranks("abcd", "1s") == {"a": (1, 2), "b": (3, 3), "c": (1, 2)} and not several.ranks("abcd", "2s")
    text = several.explanation("abcd")[0]
    assert "over 1 to 3 trainings" in text and "After 1s the first rank can't be denied to a, c." in text
    bad["trainings"][1]["gate_failures"] = ["round trip off by 1.0e+00"]
    assert "b" not in several.ranks("abcd", "1s")
    assert several.score_in_words("a", "1s") == "1.00 ± 0.10" and several.score_in_words("a", "2s") == "not trained yet"


EQUAL = {"match": "width", "layers": None, "hidden": None, "compile": False, "clock": "cpu"}


def test_budgets_have_one_spelling_and_one_unit():
    assert parse_budgets(("10 s", "3", "3s", "0.5seconds")) == ["0.5s", "3s", "10s"]
    assert parse_budgets(("20 steps",)) == ["20steps"] and parse_budgets(("1000000000 s",)) == ["1000000000s"]
    with pytest.raises(ValueError, match="must all be seconds or all be steps, not 3s 10steps"):
        parse_budgets(("3s", "10steps"))
    with pytest.raises(ValueError, match="budget needs at least one"):
        parse_budgets(())


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.monotonic)])
def test_seconds_are_of_cpu_time_where_one_thread_computes(threads, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    training = Stops()
    compare(**TINY | {"budget": "0.05s"}, flows=("masked-affine",), out=tmp_path, seams={"fit": training})
    assert training.clocks == [clock]
    said = "0.05 s of one core's CPU time" if threads == 1 else "0.05 s of wall-clock time"
    assert said in (tmp_path / "compare.md").read_text()


def test_a_training_ends_by_the_clock_that_it_is_given():
    flow, ticks = build_flow("masked-affine", 2, layers=1, hidden_features=(4,)), itertools.count()
    recipe, options = Recipe(steps=10**6, seconds=100), {"quiet": True, "accelerator": make_accelerator("cpu")}
    loss = NegativeLogLikelihood(flow)
    fitted = fit(loss, lambda step: torch.randn(8, 2), recipe, clock=lambda: float(next(ticks)), **options)
    assert 10 < fitted.steps < 100 <= fitted.seconds


# What is kept


def test_a_new_comparison_keeps_the_table_that_is_there(finished, tmp_path, capsys):
    damaged(finished, tmp_path / "out", lambda record: None)
    before = (tmp_path / "out/compare.json").read_text()
    compare(**TINY, flows=("masked-affine",), out=tmp_path / "out")
    assert (
        tmp_path / "out/compare-1.json"
    ).read_text() == before and "kept as compare-1.json" in capsys.readouterr().out


def test_a_table_of_an_earlier_version_is_refused_clearly(finished, tmp_path):
    damaged(finished, tmp_path / "out", lambda record: record.pop("format") and None)
    words = r"compare\.json was written by another version of compare\.py, and can't be read; "
    with pytest.raises(ValueError, match=words + "start again without --resume"):
        compare(**TINY, flows=("masked-affine",), out=tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match=words + "run it again"):
        compare(load=tmp_path / "out")


def test_two_comparisons_never_write_to_one_directory(finished, tmp_path):
    damaged(finished, tmp_path / "out", lambda record: None)
    before = (tmp_path / "out/compare.json").read_bytes()
    with claimed(tmp_path / "out"), pytest.raises(RuntimeError, match="another run is writing to .*out: wait until"):
        compare(**TINY, flows=("masked-affine",), out=tmp_path / "out")
    assert (tmp_path / "out/compare.json").read_bytes() == before
    with claimed(tmp_path / "out"):  # it ends with the run
        pass


@pytest.mark.parametrize("where", ["check", "score", "picture", "write"])
def test_ctrl_c_at_any_moment_loses_nothing_that_was_saved(where, tmp_path, monkeypatch):
    flows = ("masked-affine", "nflows-affine")
    compare(**TINY, flows=flows[:1], out=tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = (tmp_path / "compare.json").read_text()
    module, name = {
        "check": (gates, "check_after_training"),
        "score": (tasks, "divergence"),
        "picture": (tasks, "on_grid"),
        "write": (os, "fsync"),
    }[where]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, name, interrupted)
        compare(**TINY, flows=flows, out=tmp_path, resume=True)
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert rows["masked-affine"]["trainings"] == json.loads(before)["rows"]["masked-affine"]["trainings"]
    rows = compare(**TINY, flows=flows, out=tmp_path, resume=True)
    assert all(set(scores(row)) == {0} for row in rows.values())
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_a_flow_that_can_not_be_checked_in_time_says_so(tmp_path, own_module):
    own_module(
        "slow",
        "from adapters import build_flow\nfrom adapters.flow import Flow\n"
        "def flow(features):\n"
        "    flow = build_flow('masked-affine', features)\n"
        "    def search(*_, **__):\n        while True:\n            pass\n"
        "    flow.transform.inverse = search\n"
        "    return flow\n",
    )
    effort = Effort(QUICK, patience=0.5)
    out = {"out": tmp_path / "out", "seams": {"effort": effort}}
    rows = compare(**TINY, flows=("slow:flow", "masked-affine"), **out)
    assert rows["slow:flow"]["failed"] == "its check takes more than 0.5 s of CPU time" and scores(
        rows["masked-affine"]
    )
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_names_at_the_ends_of_curves_are_moved_apart():
    assert spread([0.5, 0.1], 0.1) == [0.5, 0.1]
    assert spread([0.5, 0.5, 0.52], 0.1) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([1.0, 0.95, 0.2], 0.1) == pytest.approx([1.0, 0.9, 0.2])


# Wrong flows, damaged files


def test_a_passing_failure_is_tried_again_when_resumed(tmp_path, own_module, monkeypatch):
    own_module(
        "passing",
        "import os\nfrom adapters import build_flow\n"
        "def flow(features, layers):\n"
        "    if 'OUT_OF_MEMORY' in os.environ:\n        raise MemoryError('for now')\n"
        "    return build_flow('masked-affine', features, layers=layers)\n",
    )
    arguments = TINY | {"flows": ("passing:flow", "masked-affine"), "out": tmp_path / "out"}
    monkeypatch.setenv("OUT_OF_MEMORY", "1")
    assert compare(**arguments)["passing:flow"]["failed"].count("making it raises MemoryError: for now")
    assert compare(**arguments, resume=True)["passing:flow"]["failed"].count("making it raises MemoryError: for now")
    monkeypatch.delenv("OUT_OF_MEMORY")
    rows = compare(**arguments, resume=True)
    assert "failed" not in rows["passing:flow"] and rows["passing:flow"]["trainings"][0]["steps"] == 3


@pytest.mark.parametrize(
    ("log_det", "mistake"),
    [
        (".sum()", "log-determinant summed over the batch"),
        (".mean()", "log-determinant is a mean"),
        (".flatten(1).sum(1, keepdim=True)", "log-determinant of shape (n, 1)"),
        ("", "log-determinant of the wrong event dimensions"),
        (".flatten(1).mean(1)", "log-determinant is a mean (equation 17)"),
        (".flatten(1).sum(1).mul(-1)", "wrong sign of the log-determinant (equation 17)"),
    ],
)
def test_the_table_names_the_mistake_of_a_students_layer(tmp_path, own_module, log_det, mistake, capsys):
    layer = LAYER.replace(".flatten(1).sum(1)", log_det)
    assert layer != LAYER
    own_module(tmp_path.name, layer)  # a name of its own: a module is imported once
    name = f"{tmp_path.name}:MyLayer"
    row = compare(**TINY, flows=(name, "masked-affine"), out=tmp_path / "out")[name]
    assert row["untrained"] == [mistake] and not row["trainings"]
    assert f"not trained: {mistake}\n" in capsys.readouterr().out


def test_a_comparison_cut_short_before_its_first_training_is_resumed(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("runs.common.comparison.Comparison.prepare", interrupt)
        compare(**TINY, flows=("masked-affine",), out=tmp_path)
    rows = compare(**TINY, flows=("masked-affine",), out=tmp_path, resume=True)
    assert rows["masked-affine"]["trainings"][0]["steps"] == 3 and not (tmp_path / "compare-1.json").exists()


def test_that_no_flows_can_be_told_apart_is_said(tmp_path, own_module, capsys):
    own_module(
        "twin",
        "from adapters import build_flow\n"
        "def flow(features, layers, hidden_features, masks):\n"
        "    size = {'layers': layers, 'hidden_features': hidden_features, 'masks': masks}\n"
        "    return build_flow('masked-affine', features, **size)\n",
    )
    words = "No two flows can be told apart by these trainings: more --seeds tell more."
    compare(**TINY, flows=("masked-affine", "twin:flow"), seeds=2, out=tmp_path / "twins")
    assert words in capsys.readouterr().out
    compare(**TINY, flows=("masked-affine", "nflows-affine"), seeds=2, out=tmp_path / "others")
    assert words not in capsys.readouterr().out


def test_a_call_that_takes_hours_is_given_up():
    def for_hours():
        while True:
            pass

    timed = TimedFlow.of(build_flow("masked-affine", 2), torch.randn(4, 2))
    timed.calls["sample"] = for_hours
    flows = {"slow": timed, "quick": TimedFlow.of(build_flow("masked-affine", 2), torch.randn(4, 2))}
    times, failed = time_kind("sample", flows, torch.device("cpu"), QUICK, lambda: patiently("a sample", 0.3))
    assert "a sample takes more than 0.3 s of CPU time" in str(failed["slow"]) and set(times) == {"quick"}


@pytest.mark.parametrize("limited", [lambda: time_limit(0.2), lambda: patiently("it", 0.2)])
def test_a_time_limit_leaves_gradients_on(limited):
    """Its signal may raise while ``torch.no_grad()`` ends, which then does not switch them on again."""
    with pytest.raises((TookTooLong, Unfit)), limited():
        torch.set_grad_enabled(False)
        while True:
            pass
    assert torch.is_grad_enabled()


def test_that_every_flow_failed_is_the_last_word(tmp_path, own_module):
    own_module("hopeless", "def flow(features):\n    raise OSError('gone')\n")
    with pytest.raises(RuntimeError, match="no flow has a score: .*compare.md says why of each"):
        compare(**TINY, flows=("hopeless:flow",), out=tmp_path / "out")
    assert "making it raises OSError: gone" in (tmp_path / "out/compare.md").read_text()


NORMED = """
from adapters import build_flow
from adapters.flow import Flow, StandardNormal
from nflows.transforms import BatchNorm, CompositeTransform
def flow(features, layers):
    inner = build_flow("masked-affine", features, layers=layers).transform
    return Flow(CompositeTransform([inner, BatchNorm(features)]), StandardNormal([features]), (features,))
"""


def test_batch_normalisation_is_timed_as_it_is_used(tmp_path, own_module):
    own_module("normed", NORMED)
    rows = compare(**TINY | {"budget": "300steps"}, flows=("normed:flow",), out=tmp_path / "out")
    row = rows["normed:flow"]
    assert "failed" not in row and not row["trainings"][0]["gate_failures"] and row["times"]["sample"]["ms"] > 0, row


def test_steps_are_timed_in_training_mode_and_the_rest_in_evaluation_mode(own_module):
    """In training mode nflows' batch normalisation has no inverse, and scoring would change its running statistics."""
    own_module("normed", NORMED)
    timed = speed.make_timed(["normed:flow", speed.BARE, *speed.libraries_own()], 4, 2, (8,), CPU)
    flow = timed["normed:flow"].flow
    for kind in KINDS:
        before = [buffer.clone() for buffer in flow.buffers()]
        times, failed = time_kind(kind, timed, CPU, QUICK)
        assert not failed and times.keys() == timed.keys() - ({speed.BARE} if kind != "step" else set())
        assert all(map(torch.equal, before, flow.buffers())) == (kind != "step")


def test_what_could_not_be_had_is_a_footnote(tmp_path):
    def noting(*arguments, **options):
        fitted = fit(*arguments, **options)
        fitted.notes.append("the step is not compiled: SomeError")
        return fitted

    compare(**TINY, flows=("masked-affine",), out=tmp_path, seeds=2, seams={"fit": noting})
    (line,) = [line for line in (tmp_path / "compare.md").read_text().splitlines() if line.startswith("1. ")]
    assert line.endswith("fast. The step is not compiled: SomeError.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    compare(**TINY, flows=("masked-affine", "nflows-affine"), out=out, seams={"draw": True})
    return out


def test_a_comparison_is_shown_again_without_training(finished, tmp_path, capsys):
    shown = pictures_in(finished), (finished / "compare.md").read_text()
    assert shown[0].keys() == {"gallery.png", "quality.png", "times.png"}
    damaged(finished, tmp_path / "run", lambda record: record.update(versions={"torch": "2"}))
    before = (tmp_path / "run/compare.json").read_bytes()
    for name in (*shown[0], "compare.md"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert compare(load=tmp_path / "run", out=tmp_path / "elsewhere") == {}
    text = (tmp_path / "elsewhere/compare.md").read_text()
    assert (
        text.partition("python 3")[0] == shown[1].partition("python 3")[0].replace("\n\npython", "\n")
        or "torch 2." in text
    )
    assert pictures_in(tmp_path / "elsewhere") == shown[0] and not pictures_in(tmp_path / "run")
    compare(load=tmp_path)  # the newest one below
    assert pictures_in(tmp_path / "run") == shown[0] and (tmp_path / "run/compare.md").read_text() == text
    assert (tmp_path / "run/compare.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.count("\nmasked-affine ") == 2 and printed.count("/times.png\n") == 2


def test_what_a_load_can_not_show_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="--load trains nothing, so --budget, --flows would be ignored: leave them out"
    ):
        compare(load=tmp_path, budget="3s", flows=("masked-affine",))
    with pytest.raises(FileNotFoundError, match=r"no compare.json in .*: give the directory of a comparison"):
        compare(load=tmp_path)
    (tmp_path / "metrics.json").write_text('{"run": "toy", "metrics": {}}')
    with pytest.raises(ValueError, match="metrics.json is of a run of toy, not of speed"):
        compare(load=tmp_path)
    for content in ("{", "[]", '{"run": "speed"}'):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match="metrics.json is damaged, or not of this version: run it again"):
            compare(load=tmp_path)
    (tmp_path / "compare.json").write_text('{"format": 2, "arguments": {"task": "cifar"}, "versions": {}, "rows": {}}')
    with pytest.raises(ValueError, match=r"compare.json is damaged \(it, arguments lacks 'budget'\); run it again"):
        compare(load=tmp_path)


def damaged(finished, out, change):
    """A copy of that comparison whose compare.json is changed."""
    shutil.copytree(finished, out)
    record = json.loads((out / "compare.json").read_text())
    text = change(record)
    (out / "compare.json").write_text(text if isinstance(text, str) else json.dumps(record))


def row_of(record):
    return record["rows"]["masked-affine"]


def training_of(record):
    return row_of(record)["trainings"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "",
        lambda record: "{",
        lambda record: "3",
        lambda record: "null",
        lambda record: "[]",
        lambda record: "[" * 100_000,
        lambda record: record.update(arguments=3),
        lambda record: record.pop("arguments") and None,
        lambda record: record.pop("versions") and None,
        lambda record: record.pop("rows") and None,
        lambda record: record.update(rows=[]),
        lambda record: record["arguments"].update(clock="sundial"),
        lambda record: record["rows"].update({"masked-affine": 3}),
        lambda record: record["rows"].update({"masked-affine": {}}),
        lambda record: row_of(record).update(trainings=3),
        lambda record: row_of(record).update(trainings=[3]),
        lambda record: training_of(record).update(score="low"),
        lambda record: training_of(record).update(seed=None),
        lambda record: training_of(record).pop("stderr") and None,
        lambda record: training_of(record).pop("budget") and None,
        lambda record: row_of(record).pop("times") and None,
        lambda record: row_of(record)["times"].pop("sample") and None,
        lambda record: row_of(record)["times"]["step"].update(ms="slow"),
        lambda record: row_of(record).update(parameters="many"),
        lambda record: row_of(record).update(parameters=None),
        lambda record: row_of(record).pop("memory_mib") and None,
        lambda record: row_of(record).update(hidden=3),
        lambda record: row_of(record).update(hidden=["wide"]),
        lambda record: training_of(record).pop("curve") and None,
        lambda record: training_of(record).update(curve=[[1]]),
        lambda record: training_of(record).update(curve=[[1, "x"]]),
        lambda record: training_of(record).update(gate_failures="all"),
        lambda record: row_of(record).update(untrained="all"),
        lambda record: row_of(record).update(notes=[3]),
        lambda record: row_of(record).update(failed=3),
        lambda record: row_of(record).update(footnote=None),
    ],
)
def test_a_damaged_record_is_one_clear_error(change, finished, tmp_path):
    damaged(finished, tmp_path / "out", change)
    with pytest.raises(ValueError, match=r"compare\.json is damaged \(.*\); start again without --resume"):
        compare(**TINY, flows=("masked-affine",), out=tmp_path / "out", resume=True)


def test_a_gallery_is_drawn_without_the_pictures_that_are_lost(finished, tmp_path):
    damaged(finished, tmp_path / "out", lambda record: None)
    (tmp_path / "out/learned/masked-affine.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "out/learned/nflows-affine.npy").unlink()
    (tmp_path / "out/gallery.png").unlink()
    compare(load=tmp_path / "out")
    assert width_of(tmp_path / "out/gallery.png") > 300


def test_a_picture_is_written_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    damaged(finished, tmp_path / "out", lambda record: None)
    before = (tmp_path / "out/times.png").read_bytes()

    def dies(figure, path, **options):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(load=tmp_path / "out")
    assert (tmp_path / "out/times.png").read_bytes() == before and not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("losses", [(-0.01, -0.02, -0.01), (1.0, 0.1, -0.02), (1.0, 1e-9, 0.1), (0.0, 0.0, 0.0), ()])
def test_a_negative_estimate_breaks_no_picture(losses, tmp_path):
    row = trained(losses[-1] if losses else 0.1, curve=[[0.5 + i, loss] for i, loss in enumerate(losses)])
    table = Table({"task": "two-gaussians", "budget": ["1s"]}, {"a": row})
    assert width_of(draw_quality(table, ["a"], tmp_path / "quality.png")) > 300
    logarithmic, limits = loss_axis(losses, divergence=True, higher_is_better=False)
    assert logarithmic == any(loss > 0 for loss in losses) and (limits is None) == (not losses)
    if limits is not None:
        low, high = limits
        assert low < high and (not logarithmic or (low > 0 and high / low < 2000))


# Speed


def test_speed(tmp_path, capsys):
    found = speed.measure_speed(
        ("freia-affine",), 2, (4, 4), False, tmp_path, CPU, features=6, widths=(2, 4), depths=(1, 2), stopwatch=QUICK
    )
    assert set(found["table"]) == {*contestants.OURS, *speed.libraries_own(), "freia-affine", speed.BARE}
    assert found["table"][speed.BARE]["step_to_bare"] == found["table"]["masked-affine"]["step_ours"] == 1
    printed, drawn = capsys.readouterr().out, pictures_in(tmp_path)
    assert "per layer at D=2" in printed and width_of(tmp_path / "growth.png") > 300
    (tmp_path / "growth.png").unlink()
    compare(load=tmp_path)
    assert pictures_in(tmp_path) == drawn
    lines = printed.splitlines()[1:]  # all but the heading, and the line of metrics.json
    assert capsys.readouterr().out.splitlines() == [line for line in lines if not line.endswith("metrics.json")]


def test_what_no_device_can_tell_is_nan_and_is_shown_so(tmp_path, capsys):
    """JSON has no NaN: it is written as null, and read again."""
    row = {f"{kind}_{what}": 1.0 for kind in KINDS for what in ("ms", "ours")} | {"step_to_bare": 1.0}
    metrics = {
        "table": {"masked-affine": row | {"memory_mib": math.nan}},
        "compiled": {"masked-affine": {"ms": 1.0, "to_eager": 1.0, "to_bare": math.nan, "ours": 1.0}},
        "width": {2: {"masked-affine": {"ms": 1.0, "mib": math.nan}}},
        "depth": {1: {"masked-affine": {"ms": 1.0, "mib": math.nan}}},
        "per_layer_ms": {"masked-affine": 0.5},
    }
    write_metrics(tmp_path, "speed", {}, 0, metrics)
    compare(load=tmp_path)
    assert capsys.readouterr().out.count(" nan") == 2 and width_of(tmp_path / "growth.png") > 300


def test_memory_counts_what_a_step_allocates():
    weight = torch.zeros(1, requires_grad=True)
    assert 4 <= peak(lambda: (weight * torch.ones(2**20)).sum().backward(), [weight]) < 20

    def hold_three() -> None:
        [torch.ones(2**20) for _ in range(3)]

    assert 12 <= peak(hold_three, [weight]) < 13


def test_slow_calls_are_timed_once_and_failing_ones_named():
    times, failed = Stopwatch(slow=0.0).measure({"slow": lambda: None, "fails": lambda: 1 / 0}, CPU)
    assert len(times["slow"]) == 1 and isinstance(failed["fails"], ZeroDivisionError)
    assert ratio([4.0], [1.0, 2.0, 3.0]) == 2


@pytest.mark.parametrize(
    "budget", ["soon", "0s", "inf", "nan", "-3s", "1e400s", "9" * 400 + "s", "2.5steps", "", "1e9s", "2000000000steps"]
)
def test_a_budget_is_seconds_or_steps(budget):
    shown = re.escape(repr(budget) if len(budget) < 20 else repr(budget[:20]) + "…")
    with pytest.raises(ValueError, match=f"budget must be seconds or steps, at most 10⁹, .* 2000steps, not {shown}"):
        parse_budget(budget)
    assert parse_budget("30") == parse_budget(" 30 s") == (30.0, False) and parse_budget("7steps") == (7.0, True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "cifar"}, ValueError, "unknown task 'cifar'; known: two-gaussians, "),
        ({"flows": ("masked-afine",)}, ValueError, "unknown flow 'masked-afine'; known: .* my_module:my_flow"),
        ({"flows": ("no_such_module:flow",)}, ImportError, "no_such_module can't be imported"),
        ({"flows": ("math:no_such_flow",)}, ValueError, "math has no no_such_flow"),
        ({"flows": ("math:pi",)}, ValueError, "math:pi is a float; it must be a layer, a flow, or a class or"),
        ({"budget": "soon"}, ValueError, "budget must be seconds or steps, .* such as 30s or 2000steps, not 'soon'"),
        ({"flows": (":flow",)}, ValueError, "':flow' names no layer or flow; write my_layer:MyLayer"),
        ({"flows": ("math:",)}, ValueError, "'math:' names no layer or flow"),
        ({"flows": ("./mine.py:flow",)}, ImportError, "./mine.py:flow: there is no file ./mine.py"),
        ({"flows": ("masked-affine",), "direction": "noise-to-data"}, ValueError, "direction is of your own layers"),
        ({"direction": "forwards"}, ValueError, "unknown direction 'forwards'; known: noise-to-data, data-to-noise"),
        ({"flows": ("",)}, ValueError, "unknown flow ''; known: "),
        ({"flows": ("torch.nn:Linear",)}, TypeError, "torch.nn:Linear wants out_features: .* or give it a default"),
        ({"flows": ("builtins:dict",)}, TypeError, "builtins:dict does not say what it takes; wrap it in a function"),
        ({"flows": ("bad_syntax:flow",)}, ImportError, "bad_syntax can't be imported .SyntaxError: .* mend it first"),
        ({"flows": ("bad_import:flow",)}, ImportError, "bad_import can't be imported .ZeroDivisionError: division by"),
        ({"flows": ("bad_exit:flow",)}, ImportError, "bad_exit can't be imported .SystemExit: 3 .*; mend it first"),
        ({"seeds": 10**11}, ValueError, "seeds must be at most 1,000, not 100,000,000,000"),
        ({"seeds": -1}, ValueError, "seeds must be positive, not -1"),
        ({"layers": 0}, ValueError, "layers must be positive, not 0"),
        ({"layers": 10**9}, ValueError, "layers must be at most 1,000, not 1,000,000,000"),
        ({"hidden": ()}, ValueError, "hidden needs at least one width, e.g. --hidden 64 64"),
        ({"hidden": (10**9,)}, ValueError, r"hidden\[0\] must be at most 131,072, not 1,000,000,000"),
        ({"task": "mnist", "limit": 5}, ValueError, "limit must be at least 128, the images of a batch, not 5"),
        ({"task": "vae-prior", "limit": 127}, ValueError, "limit must be at least 128, the images of a batch, not 127"),
        ({"limit": 200}, ValueError, "limit is of the images of mnist and vae-prior; chequerboard has none: leave it"),
        ({"data_dir": Path("data")}, ValueError, "data_dir is of the images of mnist and vae-prior"),
        ({"task": "speed", "limit": 200}, ValueError, "limit is of the images of mnist and vae-prior; speed has none"),
        ({"task": "speed", "resume": True}, ValueError, "speed has no rows to keep"),
        ({"device": "tpu"}, ValueError, "no device 'tpu' here; there are: auto, cpu"),
        ({"resume": True}, FileNotFoundError, "nothing to resume: no compare.json in"),
        ({"match": "depth"}, ValueError, "unknown match 'depth'; known: width, parameters"),
        ({"seeds": 0}, ValueError, "seeds must be positive, not 0"),
        ({"hidden": (8, 0)}, ValueError, r"hidden\[1\] must be positive, not 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(arguments, error, message, tmp_path, own_module):
    for name, code in {"bad_syntax": "def flow(:", "bad_import": "1 / 0", "bad_exit": "raise SystemExit(3)"}.items():
        own_module(name, code)
    with pytest.raises(error, match=message):
        compare(**arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("task", ["chequerboard", "speed"])
def test_an_out_that_is_a_file_is_named_before_any_work(task, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--out .*file can't be written to .*; choose another directory"):
        compare(task=task, out=tmp_path / "file")


@pytest.mark.parametrize("name", speed.libraries_own())
def test_a_librarys_samples_are_of_the_density_that_it_scores(name):
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0])
    native = speed.libraries_own()[name](2, [mask, 1 - mask, mask], (8,))
    with torch.no_grad():
        for parameter in native.parameters:
            parameter.add_(0.2 * torch.randn_like(parameter))
        axis = torch.linspace(-15, 15, 1201)  # 40 points a unit
        grid = native.log_prob(torch.cartesian_prod(axis, axis)).nan_to_num(-math.inf)  # normflows overflows far out
        assert (mass := grid.exp().sum().item() / 40**2) == pytest.approx(1, abs=0.01), mass
        samples = native.sample(40_000)
        samples = samples[0] if isinstance(samples, tuple) else samples  # normflows gives the log_prob too
        negative_entropy = (grid.exp() * grid).nan_to_num().sum().item() / 40**2
        assert native.log_prob(samples).mean().item() == pytest.approx(negative_entropy, abs=0.04)
