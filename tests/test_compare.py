"""runs/compare.py: its gates catch wrong flows, matching matches, rows survive, and anybody's own flow takes part."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from nflows.transforms import CompositeTransform, Transform
from PIL import Image

from adapters import build_flow, flow_names
from adapters.flow import Flow, StandardNormal
from adapters.networks import MLP
from adapters.preprocess import Standardize
from runs import pyro_vae
from runs.common import contestants, gates, speed, tasks
from runs.common.comparison import Effort, parse_budget
from runs.common.cost import KINDS, peak, time_kind
from runs.common.fit import fit
from runs.common.options import flat
from runs.common.pictures.compare import draw_curves, loss_axis
from runs.common.results import parameter_count, write_metrics
from runs.common.table import Table
from runs.common.timing import Stopwatch, ratio
from tests.laws import randomise
from tests.scripts import pictures_in, run

CPU = torch.device("cpu")
README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = {"task": "two-gaussians", "budget": "3steps", "layers": 2, "hidden": (8,)}
QUICK = Stopwatch(seconds=0.01, min_rounds=2)


def compare(**flags):
    """What runs/compare.py returns; without pictures, and quickly timed, unless the seams say otherwise."""
    seams = {"draw": False, "effort": Effort(QUICK)} | flags.pop("seams", {})
    return run("compare", seams={} if "load" in flags else seams, **flags)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's own, which can then be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, code: (tmp_path / f"{name}.py").write_text(code)


def width_of(path):
    with Image.open(path) as image:
        return image.width


# Gates


class Bent(Standardize):
    """Wrong in one way."""

    wrong = ""

    def forward(self, inputs, context=None):
        outputs, log_det = super().forward(inputs, context)
        return outputs, log_det + 0.1 * (self.wrong == "log_det")

    def inverse(self, inputs, context=None):
        outputs, log_det = super().inverse(inputs, context)
        return outputs + 0.1 * (self.wrong == "inverse"), log_det + 0.1 * (self.wrong == "inverse_log_det")


class Lossy(Flow):
    """A density that integrates to 0.9."""

    def log_prob(self, inputs, context=None):
        return super().log_prob(inputs, context) + math.log(0.9)


def planted(features, wrong="", kind=Flow):
    bent = Bent(torch.full((features,), 0.3), torch.full((features,), 0.5))
    bent.wrong = wrong
    flow = randomise(build_flow("masked-affine", features, layers=2, hidden_features=(8,))).float()
    return kind(CompositeTransform([bent, flow.transform]), StandardNormal([features]), (features,))


@pytest.mark.parametrize(
    ("features", "wrong", "kind", "caught"),
    [
        (2, "", Flow, []),
        (2, "log_det", Flow, ["log-determinant off by 1.0e-01", "sample/log_prob off by 1.0e-01", "∫p off by"]),
        (2, "inverse", Flow, ["round trip off by", "∫p off by"]),
        (2, "inverse_log_det", Flow, ["inverse log-determinant off by 1.0e-01", "sample/log_prob off by 1.0e-01"]),
        (2, "", Lossy, ["sample/log_prob off by", "∫p off by"]),
        (80, "", Flow, []),
        (80, "log_det", Flow, ["log-determinant off by 1.0e-01", "sample/log_prob off by"]),
        (80, "inverse_log_det", Flow, ["sample/log_prob off by 1.0e-01"]),
    ],
)
def test_gates_catch_a_wrong_flow_and_no_other(features, wrong, kind, caught):
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(1000, features)
    found = gates.failures(gates.check(planted(features, wrong, kind), x, (-4.0, 5.0) if features == 2 else None))
    assert len(found) == len(caught) and all(any(failure.startswith(word) for failure in found) for word in caught), (
        found
    )


class Coupling(Transform):
    """An affine coupling layer that begins as the identity, wrong in one way that only shows away from there."""

    wrong = ""

    def __init__(self, features, mask, hidden_features=(8,)):
        super().__init__()
        self.net = MLP(features, 2 * features, hidden_features)
        for parameter in self.net[-1].parameters():
            torch.nn.init.zeros_(parameter)
        self.register_buffer("mask", mask)

    def scale_shift(self, z):
        h = self.net.float()((self.mask * z).float()).to(z) if self.wrong == "float32" else self.net(self.mask * z)
        s, t = h.chunk(2, dim=1)
        s = torch.tanh(s)
        log_det = (s if self.wrong == "unmasked" else (1 - self.mask) * s).sum(1)
        if self.wrong == "mean":
            log_det = log_det / s.shape[1]
        if self.wrong == "summed":
            log_det = log_det.sum().expand(len(z))
        return (1 - self.mask) * s, (1 - self.mask) * t, log_det

    def forward(self, inputs, context=None):
        s, t, log_det = self.scale_shift(inputs)
        return inputs * s.exp() + t, -log_det if self.wrong == "sign" else log_det

    def inverse(self, inputs, context=None):
        s, t, log_det = self.scale_shift(inputs)
        return (inputs - t) * (-s).exp(), log_det if self.wrong in ("sign", "inverse") else -log_det


class Squashed(Transform):
    """Onto (−2, 2) only: the noise beyond is of no datum."""

    def forward(self, inputs, context=None):
        return 1.2 * torch.tanh(inputs), (1.2 / torch.cosh(inputs) ** 2).log().sum(1)

    def inverse(self, inputs, context=None):
        outputs = torch.atanh((inputs / 1.2).clamp(-1 + 1e-9, 1 - 1e-9))
        return outputs, -self.forward(outputs)[1]


class Base(StandardNormal):
    wrong = ""

    def _log_prob(self, inputs, context):
        return super()._log_prob(inputs, context) + (math.log(0.95) if self.wrong == "mass" else 0)

    def _sample(self, num_samples, context):
        return super()._sample(num_samples, context) * (0.9 if self.wrong == "narrow" else 1)


def moved(wrong="", base="", extra=()):
    base_ = Base([2])
    base_.wrong = base
    layers = [Coupling(2, mask) for mask in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))]
    for layer in layers:
        layer.wrong = wrong
    return Flow(CompositeTransform([*layers, *extra]), base_, (2,))


@pytest.mark.parametrize(
    ("flow", "caught"),
    [
        ({}, ""),
        ({"wrong": "sign"}, "log-determinant off by"),
        ({"wrong": "inverse"}, "inverse log-determinant off by"),
        ({"wrong": "summed"}, "log-determinant off by"),
        ({"wrong": "mean"}, "log-determinant off by"),
        ({"wrong": "unmasked"}, "log-determinant off by"),
        ({"wrong": "float32"}, "float64 (float32 within?) off by"),
        ({"base": "mass"}, "∫p of the base off by"),
        ({"base": "narrow"}, "∫p of the base off by"),
        ({"extra": (Squashed(),)}, "round trip off by"),
    ],
)
def test_what_does_not_show_at_the_identity_is_caught_before_any_training(flow, caught):
    torch.manual_seed(0)
    flow = moved(**flow)
    before, state = torch.get_rng_state(), [parameter.clone() for parameter in flow.parameters()]
    found = gates.failures(gates.check_moved(flow, torch.randn(100, 2)[:50]))
    assert any(failure.startswith(caught) for failure in found) if caught else not found, found
    assert all(map(torch.equal, state, flow.parameters()))
    torch.set_rng_state(before)
    x = torch.randn(100, 2)
    after = torch.get_rng_state()
    gates.check_moved(flow, x)
    gates.check(flow, x)
    assert torch.equal(after, torch.get_rng_state())  # a training's random numbers are its own


@pytest.mark.parametrize("name", flow_names())
def test_no_right_flow_fails_a_gate(name):
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0])
    flow = build_flow(name, 2, layers=2, hidden_features=(64, 64), masks=(mask, 1 - mask))
    found = gates.check_moved(flow, torch.randn(100, 2))
    assert not gates.failures(found), found
    if not name.startswith("zuko-"):  # whose inverse is a search
        assert max(value for key, value in found.items() if key not in ("base", "precision")) < 1e-5, found


def test_nan_passes_no_gate():
    assert gates.failures({"round_trip": math.nan, "log_det": 0.0}) == ["round trip off by nan"]


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
    assert last.startswith("wrong_one:Wrong ") and "not trained: log-determinant off by" in last
    assert "not trained: log-det" in (tmp_path / "out/compare.md").read_text() and not row["scores"]


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
    words = "not ranked: inverse log-determinant off by 2.0e-01; sample/log_prob off by 2.0e-01 ("
    assert words in capsys.readouterr().out and words in (tmp_path / "out/compare.md").read_text()
    assert rows["later:Later"]["gates"]["agreement"] == pytest.approx(0.2)
    monkeypatch.setenv("RIGHT", "1")
    rows = compare(**arguments, resume=True)
    assert "gate_failures" not in rows["later:Later"] and rows["later:Later"]["scores"]


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
    said = contestants.footnote(name, make(hidden), hidden, target)
    assert ("% parameters" in said) == (error > contestants.TOLERANCE)


# Rows


def test_the_whole_catalogue_has_its_rows_and_its_pictures(tmp_path, capsys):
    effort = Effort(QUICK, gates.Quadrature(grid=80, samples=100), test_points=1000)
    rows = compare(**TINY, out=tmp_path, seams={"draw": True, "effort": effort})
    printed = capsys.readouterr().out
    assert list(rows) == flow_names() and not [row["failed"] for row in rows.values() if "failed" in row]
    for name in flow_names():
        assert printed.count(f"\n{name} ") == 2
        assert math.isfinite(rows[name]["scores"]["0"]["value"]) and rows[name]["memory_mib"] > 0
    assert rows["masked-affine"]["times"]["step"]["ratio"] == 1
    for picture in ("gallery", "quality", "times"):
        assert width_of(tmp_path / f"{picture}.png") > 300
    text = (tmp_path / "compare.md").read_text()
    assert "at most 1.001" in text and "The same for all: 3steps of training" in text


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
    assert [set(row["scores"]) for row in done.values()] == [{"0"}, {"0"}, set()] and list(done) == list(flows)
    capsys.readouterr()
    compare(load=tmp_path, out=tmp_path / "so far")
    assert re.search(r"\nnflows-affine +not trained yet", capsys.readouterr().out)
    rows = compare(**TINY, flows=flows, out=tmp_path, resume=True, seeds=2, seams={"fit": counted})
    assert len(trained) == 2 + 4 and all(set(row["scores"]) == {"0", "1"} for row in rows.values())
    for name in flows[:2]:
        assert rows[name]["scores"]["0"] == done[name]["scores"]["0"] and rows[name]["times"] == done[name]["times"]
    assert "3steps of training (2 seeds; ± is" in (tmp_path / "compare.md").read_text()
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
    assert rows["failing:at_once"]["failed"] == "ZeroDivisionError: in my code"
    assert rows["failing:later"]["failed"] == "ZeroDivisionError: division by zero"
    assert rows["failing:leaves"]["failed"] == "SystemExit: no data"
    assert rows["failing:fixed"]["failed"] == "it has no parameters to train"
    assert "builtins.str is of no known library" in rows["failing:text"]["failed"]
    assert math.isfinite(rows["masked-affine"]["scores"]["0"]["value"])
    assert "failed: ZeroDivisionError: in my code" in (tmp_path / "out/compare.md").read_text()


def test_the_readmes_own_layer_gets_its_row(tmp_path, monkeypatch):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class SoftsignCoupling" in block
    ]
    assert len(code.splitlines()) <= 25
    (tmp_path / "my_layer.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    rows = compare(**TINY | {"layers": 4}, flows=("my_layer:SoftsignCoupling", "masked-affine"), out=tmp_path)
    row = rows["my_layer:SoftsignCoupling"]
    assert math.isfinite(row["scores"]["0"]["value"]) and "gate_failures" not in row
    assert row["parameters"] == 4 * parameter_count(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 4)))


def test_a_librarys_own_class_is_a_factory(tmp_path):
    rows = compare(**TINY, flows=("zuko.flows:MAF",), out=tmp_path)
    assert math.isfinite(rows["zuko.flows:MAF"]["scores"]["0"]["value"])


@pytest.mark.parametrize("task", ["mnist", "vae-prior"])
def test_image_tasks(task, tmp_path):
    arguments = TINY | {"task": task, "limit": 200, "flows": ("masked-affine", "zuko-realnvp"), "match": "parameters"}
    rows = compare(**arguments, out=tmp_path, seams={"draw": True})
    values = [row["scores"]["0"]["value"] for row in rows.values()]
    assert all(map(math.isfinite, values)) and (tmp_path / "gallery.png").exists()
    assert (max(values) < 0) == (task == "vae-prior")


def test_a_flow_prior_is_trained_as_its_own_run_trains_it():
    defaults = flat(pyro_vae.Options())
    assert tasks.VaePrior.recipe == {name: defaults[name] for name in tasks.VaePrior.recipe}
    assert {"lr", "warmup", "decay", "average", "clip"} <= set(tasks.VaePrior.recipe)


def test_better_scores_are_ranked_first():
    def ranked(task):
        return Table({"task": task}, rows).ranked(list("abc"))

    rows = {
        name: {"scores": {"0": {"value": value, "stderr": 0.1}}}
        for name, value in zip("abc", (-3, -1, -2), strict=True)
    }
    assert ranked("vae-prior") == ["b", "c", "a"] and ranked("two-gaussians") == ["a", "c", "b"]
    rows["a"]["gate_failures"] = ["round trip"]
    rows["b"]["failed"] = "why"
    assert ranked("two-gaussians") == ["c", "a", "b"]


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
    assert compare(**arguments)["passing:flow"]["failed"] == "MemoryError: for now"
    assert compare(**arguments, resume=True)["passing:flow"]["failed"] == "MemoryError: for now"
    monkeypatch.delenv("OUT_OF_MEMORY")
    rows = compare(**arguments, resume=True)
    assert "failed" not in rows["passing:flow"] and rows["passing:flow"]["scores"]["0"]["steps"] == 3


def test_that_every_flow_failed_is_the_last_word(tmp_path, own_module):
    own_module("hopeless", "def flow(features):\n    raise OSError('gone')\n")
    with pytest.raises(RuntimeError, match="no flow has a score: .*compare.md says why of each"):
        compare(**TINY, flows=("hopeless:flow",), out=tmp_path / "out")
    assert "failed: OSError: gone" in (tmp_path / "out/compare.md").read_text()


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
    assert "failed" not in row and "gate_failures" not in row and row["times"]["sample"]["ms"] > 0, row


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
    with pytest.raises(ValueError, match="--load trains nothing, so --budget, --flows would be ignored: leave it out"):
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
    (tmp_path / "compare.json").write_text('{"arguments": {"task": "cifar"}, "rows": {}}')
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


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "",
        lambda record: "{",
        lambda record: "3",
        lambda record: "null",
        lambda record: "[]",
        lambda record: "[" * 100_000,
        lambda record: '{"arguments": 3, "rows": {}}',
        lambda record: record.pop("arguments") and None,
        lambda record: record.pop("rows") and None,
        lambda record: record.update(rows=[]),
        lambda record: record["rows"].update({"masked-affine": 3}),
        lambda record: record["rows"].update({"masked-affine": {}}),
        lambda record: row_of(record).update(scores=3),
        lambda record: row_of(record).update(scores={"0": 3}),
        lambda record: row_of(record).update(scores={"0": {"value": "low"}}),
        lambda record: row_of(record)["scores"]["0"].pop("stderr") and None,
        lambda record: row_of(record).pop("times") and None,
        lambda record: row_of(record)["times"].pop("sample") and None,
        lambda record: row_of(record)["times"]["step"].update(ms="slow"),
        lambda record: row_of(record).update(parameters="many"),
        lambda record: row_of(record).update(parameters=None),
        lambda record: row_of(record).pop("memory_mib") and None,
        lambda record: row_of(record).update(hidden=3),
        lambda record: row_of(record).update(hidden=["wide"]),
        lambda record: row_of(record).pop("curves") and None,
        lambda record: row_of(record).update(curves={"0": [[1]]}),
        lambda record: row_of(record).update(curves={"0": [[1, "x"]]}),
        lambda record: row_of(record).update(gate_failures="all"),
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
    rows = {"a": {"curves": {"0": [[0.5 + i, loss] for i, loss in enumerate(losses)]}}}
    assert width_of(draw_curves(Table({"task": "two-gaussians"}, rows), ["a"], tmp_path / "quality.png")) > 300
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
        ({"flows": ("math:pi",)}, ValueError, "math:pi is a float; a flow is made by"),
        ({"budget": "soon"}, ValueError, "budget must be seconds or steps, .* such as 30s or 2000steps, not 'soon'"),
        ({"flows": (":flow",)}, ValueError, "':flow' names no flow; write my_module:my_flow"),
        ({"flows": ("math:",)}, ValueError, "'math:' names no flow"),
        ({"flows": ("./mine.py:flow",)}, ValueError, "names no flow; write my_module:my_flow"),
        ({"flows": ("",)}, ValueError, "unknown flow ''; known: "),
        ({"flows": ("torch.nn:Linear",)}, TypeError, "torch.nn:Linear wants in_features, out_features; it may only"),
        ({"flows": ("builtins:dict",)}, TypeError, "builtins:dict does not say what it takes; wrap it in a function"),
        ({"flows": ("bad_syntax:flow",)}, ImportError, "bad_syntax can't be imported .SyntaxError: .* mend it first"),
        ({"flows": ("bad_import:flow",)}, ImportError, "bad_import can't be imported .ZeroDivisionError: division by"),
        ({"flows": ("bad_exit:flow",)}, ImportError, "bad_exit can't be imported .SystemExit: 3.; mend it first"),
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
