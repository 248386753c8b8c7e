"""runs/compare.py --task npe: exact posteriors are exact, and flows of every kind are held to them. Of sbi."""

import math
import sys

import pytest
import torch
from torch.testing import assert_close

from adapters import as_flow, build_flow
from adapters.bridges.sbi import import_sbi
from runs.common import npe
from runs.common.comparison import Effort
from runs.common.pictures import figures
from runs.common.pictures.compare import draw_quality, training_curve
from runs.common.table import Table
from runs.common.timing import Stopwatch
from tests.scripts import run

sbi = import_sbi()

CPU = torch.device("cpu")
SEAMS = {"draw": False, "effort": Effort(Stopwatch(seconds=0.01, min_rounds=2), test_points=50)}


@pytest.fixture(autouse=True)
def few_observations(monkeypatch):
    """The classifier takes most of the time."""
    monkeypatch.setattr(npe, "OBSERVATIONS", 2)


@pytest.mark.parametrize("kind", [npe.TwoMoons, npe.LinearGaussian])
def test_the_exact_posterior_is_the_one_of_the_simulator(kind):
    """Of simulations from the prior, those near an observation have parameters with the moments of exact draws."""
    torch.manual_seed(0)
    theta = kind.prior.sample((1_000_000,))
    observation = kind.simulate(torch.tensor([[0.3, -0.2]]))[0]
    near = theta[(kind.simulate(theta) - observation).norm(dim=1) < 0.02]
    assert len(near) > 100

    def moments(draws):
        along, across = (draws @ torch.tensor([[1.0, -1.0], [1.0, 1.0]])).unbind(1)
        folded = along.abs()  # the two moons are mirror images: what is within one of them is seen
        return torch.stack([along.mean(), across.mean(), folded.mean(), along.std(), across.std(), folded.std()])

    error = 4 * near.std(0).max() / math.sqrt(len(near)) + 0.01
    assert (moments(near) - moments(kind.exact(observation, 100_000))).abs().max() < 2 * error
    elsewhere = kind.exact(observation - torch.tensor([0.3, 0.3]), 100_000)
    assert (moments(near) - moments(elsewhere)).abs().max() > 2 * error, "what is wrong must be seen"


@pytest.mark.parametrize("kind", [npe.TwoMoons, npe.LinearGaussian])
def test_the_picture_of_the_exact_posterior_is_that_of_its_draws(kind):
    picture, pixel = torch.from_numpy(kind.true_picture()), 2 * kind.window / npe.PIXELS
    draws = kind.exact(torch.zeros(2), 200_000)
    bins = ((draws.flip(1) + kind.window) / (10 * pixel)).floor().long()  # of ten pixels; rows go along θ₂
    inside = ((bins >= 0) & (bins < npe.PIXELS // 10)).all(1)
    drawn = torch.zeros(npe.PIXELS // 10, npe.PIXELS // 10)
    drawn.index_put_(tuple(bins[inside].T), torch.tensor(1 / len(draws)), accumulate=True)
    exact = torch.nn.functional.avg_pool2d(picture[None].float(), 10)[0] * (10 * pixel) ** 2
    assert 0.99 < exact.sum() < 1.01 and inside.double().mean() > 0.99
    assert (exact - drawn).abs().max() < 0.004 < exact.max() / 5


def test_an_observation_that_nothing_gives_is_refused():
    with pytest.raises(ValueError, match="no parameters within the prior give x = "):
        npe.TwoMoons.exact(torch.ones(2), 10)


def test_two_moons_lie_on_either_side():
    torch.manual_seed(0)
    draws = npe.TwoMoons.exact(torch.zeros(2), 2000)
    assert (draws.abs() <= 1).all()
    assert abs((draws.sum(1) > 0).double().mean() - 0.5) < 0.05
    assert_close(draws.sum(1).abs().mean() / math.sqrt(2), torch.tensor(0.25 + 0.1 * 2 / math.pi), atol=0.01, rtol=0)


def test_hand_written_and_sbis_own_flows_are_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from adapters import build_flow\ndef flow(features): return build_flow('masked-affine', features)\n"
    (tmp_path / "unconditional.py").write_text(code)
    flows = ("masked-affine", "runs.common.npe:sbi_zuko_nsf", "zuko.flows:MAF", "unconditional:flow")
    options = {"budget": "3steps", "layers": 2, "hidden": (8,), "flows": flows, "out": tmp_path}
    rows = run("compare", task="npe", **options, seams=SEAMS)["npe"]
    for name in flows[:3]:
        (training,) = rows[name]["trainings"]
        assert not training["gate_failures"] and 0.5 < training["score"] <= 1
    assert "unconditional:flow: it takes no context of width 2" in rows["unconditional:flow"]["failed"]
    assert "C2ST (accuracy)" in (tmp_path / "compare.md").read_text()


def test_curves_and_scores_have_an_axis_each(tmp_path, monkeypatch):
    """A curve shows −log p, which may be negative, and a score is the share of a classifier's right answers."""
    drawings = []
    monkeypatch.setattr(sys.modules[figures.figure.__module__], "save", lambda drawing, path: drawings.append(drawing))
    training = {"budget": "1s", "seed": 0, "seconds": 1.0, "curve": [[0.1 * i, 3 - 0.5 * i] for i in range(11)]}
    found = {"masked-affine": 0.9, "zuko-nsf": 0.8}
    rows = {name: {"trainings": [training | {"score": score}]} for name, score in found.items()}
    draw_quality(Table({"task": "npe", "budget": ["1s"]}, rows), list(rows), tmp_path / "quality.png")
    (drawing,) = drawings
    scores, curves = drawing.axes[:2], drawing.axes[2:]
    assert all(0.7 < axis.get_ylim()[0] < 0.8 and 0.9 < axis.get_ylim()[1] < 1 for axis in scores)
    assert [len(axis.lines) for axis in curves] == [2, 2] and all(axis.get_ylim()[0] < -1 for axis in curves)
    assert "−log p (nats) of the training batches" in drawing.get_supxlabel()
    assert drawing.get_supylabel() == "C2ST (accuracy)"


def test_seeds_that_took_longer_are_on_one_curve():
    """Trainings of equal steps end at the mean time together: no curve jumps where the quickest seed ends."""
    trainings = [
        {
            "budget": "10steps",
            "seed": seed,
            "seconds": took,
            "score": 0.9,
            "curve": [[took * i / 10, -i] for i in range(11)],
        }
        for seed, took in ((0, 1.0), (1, 3.0))
    ]
    table = Table({"task": "npe", "budget": ["10steps"]}, {"masked-affine": {"trainings": trainings}})
    seconds, losses = training_curve(table, "masked-affine").T
    assert abs(seconds[-1] - 2) < 0.3 and (losses[1:] <= losses[:-1]).all()


@pytest.mark.parametrize("make", [npe.sbi_nsf, npe.sbi_zuko_nsf])
def test_sbis_own_flow_sees_no_data_before_it_trains(make):
    assert as_flow(make(2, 3, 2, (8, 8))).log_prob(torch.zeros(5, 2), torch.zeros(5, 3)).shape == (5,)


def test_training_brings_the_posterior_near():
    torch.manual_seed(0)
    task = npe.LinearGaussian(CPU, test_points=200, simulations=2000)
    flow = build_flow("masked-affine", 2, 2, layers=2, hidden_features=(16,), preprocess=task.preprocess)
    trial = task.trial(flow, 0)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(300):
        optimiser.zero_grad()
        trial.loss(trial.batch(step)).backward()
        optimiser.step()
    assert trial.score()[0] < 0.65
    assert trial.picture().shape == (npe.PIXELS, npe.PIXELS)


def test_without_sbi_its_extra_is_named(uninstall, tmp_path):
    uninstall("sbi")
    with pytest.raises(ImportError, match=r"sbi is not installed: pip install 'flow-adapters\[sbi\]'"):
        run("compare", task="npe", flows=("masked-affine",), out=tmp_path)
