"""runs/compare.py: its gates catch wrong flows, matching matches, rows survive, and anybody's own flow takes part."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from nflows.transforms import CompositeTransform
from PIL import Image

from adapters import build_flow, flow_names
from adapters.flow import Flow, StandardNormal
from adapters.preprocess import Standardize
from runs import compare, pyro_vae
from runs.common import contestants, gates, speed, tasks
from runs.common.fit import Fitted
from runs.common.results import parameter_count
from tests.laws import randomise

CPU = torch.device("cpu")
README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = {"task": "two-gaussians", "budget": "3steps", "layers": 2, "hidden": (8,)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "MIN_ROUNDS", 2)


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *_: [])


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
    return kind(CompositeTransform([bent, flow._transform]), StandardNormal([features]), (features,))


@pytest.mark.parametrize(
    ("features", "wrong", "kind", "caught"),
    [
        (2, "", Flow, []),
        (2, "log_det", Flow, ["log-determinant off by 1.0e-01", "∫p off by"]),
        (2, "inverse", Flow, ["round trip off by"]),
        (2, "", Lossy, ["∫p off by"]),
        (80, "", Flow, []),
        (80, "log_det", Flow, ["log-determinant off by 1.0e-01", "sample/log_prob off by"]),
        (80, "inverse_log_det", Flow, ["sample/log_prob off by 1.0e-01"]),
    ],
)
def test_gates_catch_a_wrong_flow_and_no_other(features, wrong, kind, caught):
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(1000, features)
    found = gates.failures(gates.check(planted(features, wrong, kind), x, (-4.0, 5.0) if features == 2 else None))
    assert len(found) == len(caught) and all(any(word in one for one in found) for word in caught), found


def test_nan_passes_no_gate():
    assert gates.failures({"round_trip": math.nan, "log_det": 0.0}) == ["round trip off by nan"]


def test_a_flow_that_fails_a_gate_is_shown_and_not_ranked(tmp_path, own_module, monkeypatch, capsys, without_pictures):
    own_module(
        "wrong_one",
        "from adapters.preprocess import Standardize\nimport torch\n"
        "class Wrong(Standardize):\n"
        "    def __init__(self, features):\n        super().__init__(torch.zeros(features), torch.ones(features))\n"
        "    def forward(self, inputs, context=None):\n"
        "        outputs, log_det = super().forward(inputs)\n        return outputs, log_det + 5.0\n",
    )
    monkeypatch.setattr(compare, "fit", lambda *_, **__: Fitted(steps=1, seconds=1.0))  # it has no parameters
    monkeypatch.setattr(compare, "training_step", lambda *_: lambda: None)
    monkeypatch.setattr(compare, "peak_of_step", lambda *_: 0.0)
    compare.main(**TINY, flows=("wrong_one:Wrong", "masked-affine"), out=tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-3]
    assert last.startswith("wrong_one:Wrong ") and "not ranked: log-determinant off by 1.0e+01" in last
    assert "not ranked" in (tmp_path / "out/compare.md").read_text()


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


def test_the_whole_catalogue_has_its_rows_and_its_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gates, "GRID", 80)
    monkeypatch.setattr(gates, "SAMPLES", 100)
    rows = compare.main(**TINY, out=tmp_path)
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


def test_finished_rows_survive_an_interruption(tmp_path, monkeypatch, without_pictures):
    run_one, ran = compare.run_one, []

    def interrupted(task, name, *rest):
        if name == "nflows-affine" and len(ran) < 3:
            raise KeyboardInterrupt
        ran.append((name, rest[2]))
        run_one(task, name, *rest)

    monkeypatch.setattr(compare, "run_one", interrupted)
    flows = ("masked-affine", "zuko-realnvp", "nflows-affine")
    with pytest.raises(KeyboardInterrupt):
        compare.main(**TINY, flows=flows, out=tmp_path)
    done = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert set(done["masked-affine"]["scores"]) == {"0"} and not done["nflows-affine"]["scores"]
    ran.append("resumed")
    rows = compare.main(**TINY, flows=flows, out=tmp_path, resume=True, seeds=2)
    assert ran[:2] == [("masked-affine", 0), ("zuko-realnvp", 0)]
    assert ran[3:] == [("masked-affine", 1), ("zuko-realnvp", 1), ("nflows-affine", 0), ("nflows-affine", 1)]
    assert rows["masked-affine"]["scores"]["0"] == done["masked-affine"]["scores"]["0"]
    assert rows["masked-affine"]["times"] == done["masked-affine"]["times"]
    with pytest.raises(ValueError, match="budget was 3steps, not 4steps"):
        compare.main(**TINY | {"budget": "4steps"}, out=tmp_path, resume=True)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        compare.main(**TINY, out=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        compare.main(**TINY, out=tmp_path / "new", resume=True)


def test_one_failing_flow_is_a_row_that_says_why(tmp_path, own_module, without_pictures, capsys):
    own_module(
        "failing",
        "from adapters import build_flow\n"
        "def at_once(features):\n    raise ZeroDivisionError('in my code')\n"
        "def later(features):\n    flow = build_flow('masked-affine', features)\n"
        "    flow._transform.forward = lambda *_: 1 / 0\n    return flow\n"
        "def wants(features, width):\n    pass\n"
        "def text(features):\n    return 'a flow'\n",
    )
    names = ("failing:at_once", "failing:later", "failing:wants", "failing:text", "masked-affine")
    rows = compare.main(**TINY, flows=names, out=tmp_path / "out")
    assert rows["failing:at_once"]["failed"] == "ZeroDivisionError: in my code"
    assert rows["failing:later"]["failed"] == "step: ZeroDivisionError: division by zero"
    assert "wants width; it may only want features, " in rows["failing:wants"]["failed"]
    assert "builtins.str is of no known library" in rows["failing:text"]["failed"]
    assert math.isfinite(rows["masked-affine"]["scores"]["0"]["value"])
    assert "failed: ZeroDivisionError: in my code" in (tmp_path / "out/compare.md").read_text()


def test_the_readmes_own_layer_gets_its_row(tmp_path, monkeypatch, without_pictures):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class SoftsignCoupling" in block
    ]
    assert len(code.splitlines()) <= 25
    (tmp_path / "my_layer.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    rows = compare.main(**TINY | {"layers": 4}, flows=("my_layer:SoftsignCoupling", "masked-affine"), out=tmp_path)
    row = rows["my_layer:SoftsignCoupling"]
    assert math.isfinite(row["scores"]["0"]["value"]) and "gate_failures" not in row
    assert row["parameters"] == 4 * parameter_count(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 4)))


def test_a_librarys_own_class_is_a_factory(tmp_path, without_pictures):
    rows = compare.main(**TINY, flows=("zuko.flows:MAF",), out=tmp_path)
    assert math.isfinite(rows["zuko.flows:MAF"]["scores"]["0"]["value"])


@pytest.mark.parametrize("task", ["mnist", "vae-prior"])
def test_image_tasks(task, tmp_path, monkeypatch):
    arguments = TINY | {"task": task, "limit": 200, "flows": ("masked-affine", "zuko-realnvp"), "match": "parameters"}
    rows = compare.main(**arguments, out=tmp_path)
    values = [row["scores"]["0"]["value"] for row in rows.values()]
    assert all(map(math.isfinite, values)) and (tmp_path / "gallery.png").exists()
    assert (max(values) < 0) == (task == "vae-prior")


def test_a_flow_prior_is_trained_as_its_own_run_trains_it():
    defaults = inspect.signature(pyro_vae.main).parameters
    assert tasks.VaePrior.recipe == {name: defaults[name].default for name in tasks.VaePrior.recipe}
    assert {"lr", "warmup", "decay", "average", "clip"} <= set(tasks.VaePrior.recipe)


def test_better_scores_are_ranked_first():
    class Up(tasks.Toy):
        higher_is_better = True

    table = compare.Table.__new__(compare.Table)
    table.rows = {
        name: {"scores": {"0": {"value": value, "stderr": 0.1}}}
        for name, value in zip("abc", (-3, -1, -2), strict=True)
    }
    assert table.ranked(list("abc"), Up("two-gaussians", CPU)) == ["b", "c", "a"]
    assert table.ranked(list("abc"), tasks.Toy("two-gaussians", CPU)) == ["a", "c", "b"]
    table.rows["a"]["gate_failures"] = ["round trip"]
    table.rows["b"]["failed"] = "why"
    assert table.ranked(list("abc"), tasks.Toy("two-gaussians", CPU)) == ["c", "a", "b"]


# Speed


def test_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "WIDTHS", (2, 4))
    monkeypatch.setattr(speed, "DEPTHS", (1, 2))
    found = speed.speed(("freia-affine",), 2, (4, 4), False, tmp_path, CPU, features=6)
    assert set(found["table"]) == {*speed.OURS, *speed.LIBRARIES, "freia-affine", speed.BARE}
    assert found["table"][speed.BARE]["step_to_bare"] == found["table"]["masked-affine"]["step_ours"] == 1
    assert "per layer at D=2" in capsys.readouterr().out and width_of(tmp_path / "growth.png") > 300


def test_memory_counts_what_a_step_allocates():
    weight = torch.zeros(1, requires_grad=True)
    assert 4 <= speed.peak(lambda: (weight * torch.ones(2**20)).sum().backward(), [weight]) < 20

    def hold_three() -> None:
        [torch.ones(2**20) for _ in range(3)]

    assert 12 <= speed.peak(hold_three, [weight]) < 13


def test_slow_calls_are_timed_once_and_failing_ones_named(monkeypatch):
    monkeypatch.setattr(speed, "SLOW", 0.0)
    times, failed = speed.measure({"slow": lambda: None, "fails": lambda: 1 / 0}, CPU)
    assert len(times["slow"]) == 1 and isinstance(failed["fails"], ZeroDivisionError)
    assert compare.ratio_of([4.0], [1.0, 2.0, 3.0]) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "cifar"}, ValueError, "unknown task 'cifar'; known: two-gaussians, "),
        ({"flows": ("masked-afine",)}, ValueError, "unknown flow 'masked-afine'; known: .* my_module:my_flow"),
        ({"flows": ("no_such_module:flow",)}, ImportError, "no_such_module can't be imported"),
        ({"flows": ("math:no_such_flow",)}, ValueError, "math has no no_such_flow"),
        ({"flows": ("math:pi",)}, ValueError, "math:pi is a float; a flow is made by"),
        ({"budget": "soon"}, ValueError, "budget must be seconds or steps, such as 30s or 2000steps, not 'soon'"),
        ({"budget": "0s"}, ValueError, "budget must be"),
        ({"match": "depth"}, ValueError, "unknown match 'depth'; known: width, parameters"),
        ({"seeds": 0}, ValueError, "seeds must be positive, not 0"),
        ({"hidden": (8, 0)}, ValueError, r"hidden\[1\] must be positive, not 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare.main(**arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", speed.LIBRARIES)
def test_a_librarys_samples_are_of_the_density_that_it_scores(name):
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0])
    native = speed.LIBRARIES[name](2, [mask, 1 - mask, mask], (8,))
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
