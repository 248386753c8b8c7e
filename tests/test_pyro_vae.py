"""The VAE, its priors and runs/pyro_vae.py: against closed forms, with every prior and library, and with bad input."""

import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from matplotlib.text import Text
from PIL import Image, ImageColor
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Distribution, MultivariateNormal, kl_divergence
from torch.testing import assert_close

from adapters import FlowDistribution, build_flow, load_flow
from adapters.elbo import ReparameterizedELBO
from adapters.preprocess import Standardize
from adapters.priors import FlowPrior, MixturePrior, StandardNormalPrior
from adapters.vae import VAE, Decoder, Encoder
from runs import pyro_vae
from runs.common import progress, scores
from runs.common.command_line import cli, was_interrupted
from runs.common.images import Batches, Images, binarize, threshold, warped
from runs.common.objectives import without_argument_checks
from runs.common.pictures.pyro_vae import VAERecord, figures, styles
from runs.common.recipe import Recipe
from runs.common.training_state import STATE, NotFinite
from runs.common.vae_benchmark import plain_loss, pyro_loss
from runs.common.vae_report import report
from tests.laws import batch, randomise
from tests.scripts import pictures_in, run

ROOT = Path(__file__).parent.parent
TINY = {
    "limit": 64, "epochs": 2, "batch_size": 32, "latent": 3, "layers": 2, "hidden": (8,), "width": (16,),
    "components": 5, "importance_samples": 4, "importance_images": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    pyro.clear_param_store()
    before = Distribution._validate_args
    yield
    assert Distribution._validate_args == before
    assert not pyro.get_param_store()
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(draw=False, **flags):
    """The script, tiny, on images of these tests' own, and no pictures unless asked for."""
    return run("pyro_vae", **TINY | flags, seams={"read": lambda dataset, data_dir: _images(), "draw": draw})


@pytest.fixture
def batches_seen(monkeypatch):
    """The batches of a tiny training, as they are before they are binarised: a list, and what to do at the i-th one."""

    def prepare(images, generator):
        if len(images) == TINY["batch_size"]:
            seen.append(images)
            at.pop(len(seen) - 1, lambda: None)()
        return threshold(images, generator)

    seen, at = [], {}
    monkeypatch.setitem(pyro_vae.BINARIZE, "threshold", prepare)
    return seen, at


def interrupt():
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


@cache
def _images():
    """Blobs at random places, as bytes."""
    generator = torch.Generator().manual_seed(0)
    place = 6 + 16 * torch.rand(240, 2, 1, 1, generator=generator)
    row, column = torch.arange(28.0)[:, None], torch.arange(28.0)
    squared = (row - place[:, 0]).square() + (column - place[:, 1]).square()
    images, labels = (255 * (-squared / 20).exp()).byte(), (place[:, 0, 0, 0] / 3).long()
    parts = [(images[rows], labels[rows]) for rows in torch.arange(240).split(80)]
    return Images(*(part for pair in parts for part in pair), tuple("0123456789"))


# The ELBO


class LinearDecoder(nn.Module):
    """p(x | z) = N(W z + b, σ² I)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.std = 0.3 * batch(5, 2), torch.full((5,), 0.5, dtype=torch.float64), 0.3

    def forward(self, z):
        return dist.Normal(z @ self.weight.T + self.bias, self.std).to_event(1)


class LinearEncoder(nn.Module):
    """The exact posterior under a prior N(mean, diag std²), its mean moved by ``error``."""

    latent = 2

    def __init__(self, decoder, mean, std, error=0.0):
        super().__init__()
        self.decoder, self.mean, self.error = decoder, mean, error
        precision = (std**-2).diag() + decoder.weight.T @ decoder.weight / decoder.std**2
        self.covariance = precision.inverse()
        self.shift = mean / std**2

    def exact(self, x):
        information = self.shift + (x - self.decoder.bias) @ self.decoder.weight / self.decoder.std**2
        return MultivariateNormal(information @ self.covariance, self.covariance)

    def forward(self, x):
        return dist.MultivariateNormal(self.exact(x).loc + self.error, self.covariance)


def linear_gaussian(prior, mean=(0.0, 0.0), std=(1.0, 1.0), error=0.0):
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    decoder = LinearDecoder()
    vae = VAE(prior(mean, std), LinearEncoder(decoder, mean, std, error), decoder)
    x = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = decoder.weight * std**2 @ decoder.weight.T + decoder.std**2 * torch.eye(5, dtype=torch.float64)
    evidence = MultivariateNormal(decoder.bias + decoder.weight @ mean, covariance).log_prob(x)
    return vae, x, evidence


def gaussian_flow(mean, std):
    """A flow that is the Gaussian with these moments: its layers start at the identity."""
    return build_flow("masked-affine", 2, layers=2, preprocess=Standardize(mean, std)).double()


LINEAR = {
    "gaussian": (lambda mean, std: StandardNormalPrior(2).double(), {}),
    "flow": (lambda mean, std: FlowPrior(gaussian_flow(mean, std)), {"mean": (0.5, -1.0), "std": (0.7, 1.5)}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_at_the_exact_posterior_every_elbo_is_the_exact_log_evidence(name):
    prior, moments = LINEAR[name]
    vae, x, evidence = linear_gaussian(prior, **moments)
    reconstruction, kl = vae.terms(x)
    assert_close(reconstruction - kl, evidence)
    assert_close(vae.log_weights(x, 3), evidence.expand(3, 7))
    for elbo in (
        Trace_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        RenyiELBO(alpha=0.0, num_particles=3),
    ):
        assert -elbo.loss(vae.model, vae.guide, x) == pytest.approx(evidence.sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_elsewhere_it_is_less_by_the_kl_and_importance_weighting_makes_up_for_it(name):
    prior, moments = LINEAR[name]
    vae, x, evidence = linear_gaussian(prior, error=0.2, **moments)
    torch.manual_seed(0)
    loss = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(vae.model, vae.guide, x)
    gap = kl_divergence(vae.encoder(x), vae.encoder.exact(x)).sum()
    assert gap > 0.5
    assert -loss == pytest.approx((evidence.sum() - gap).item(), abs=0.15)
    weighted = vae.log_weights(x, 4000).logsumexp(0) - math.log(4000)
    assert_close(weighted, evidence, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_the_runs_evaluation_is_that_elbo_and_that_gap(name):
    prior, moments = LINEAR[name]
    vae, x, evidence = linear_gaussian(prior, error=0.1, **moments)
    vae.register_parameter("device", nn.Parameter(torch.zeros(())))
    reconstruction, kl = scores.elbo_terms(vae, x, 1500)
    gap = kl_divergence(vae.encoder(x), vae.encoder.exact(x))
    assert_close(reconstruction - kl, evidence - gap, atol=0.05, rtol=0)
    assert_close(scores.importance_gaps(vae, x, 5000), gap, atol=0.05, rtol=0)
    assert scores.mean_elbo(vae, x) == scores.mean_elbo(vae, x)  # its noise is fixed


def a_vae(prior="flow", flow="masked-affine", posterior=False, latent=2, scale=0.3):
    torch.manual_seed(0)
    conditional = build_flow(flow, latent, 2 * latent, layers=2, hidden_features=(8,)) if posterior else None
    encoder = Encoder(latent, 6, (8,), flow=conditional)
    given = pyro_vae.Ingredients(
        latent,
        encoder,
        lambda: build_flow(flow, latent, layers=2, hidden_features=(8,)),
        (batch(4, 6) > 0).float(),
    )
    made = pyro_vae.PRIORS[prior](given)
    x = (batch(9, 6, seed=5) > 0).double()
    return randomise(VAE(made, encoder, Decoder(latent, 6, (8,))), scale=scale), x


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("prior", pyro_vae.PRIORS)
def test_gradients_reach_prior_encoder_and_decoder(prior, posterior):
    vae, x = a_vae(prior, posterior=posterior)
    Trace_ELBO()(vae.model, vae.guide)(x).backward()
    for name, weight in vae.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("prior", pyro_vae.PRIORS)
def test_every_prior_is_a_density_that_samples_and_an_elbo_of_every_kind(prior, posterior):
    vae, x = a_vae(prior, posterior=posterior, scale=0.1)
    edge = torch.linspace(-14, 14, 281, dtype=torch.float64)
    with torch.no_grad():
        p = vae.prior()
        assert p.batch_shape == () and p.event_shape == (2,) and p.sample((4,)).shape == (4, 2)
        assert (p.log_prob(torch.cartesian_prod(edge, edge)).exp().sum() * 0.1**2).item() == pytest.approx(1, abs=2e-3)
    torch.manual_seed(0)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(0)
    reconstruction, kl = vae.terms(x)
    assert -loss == pytest.approx((reconstruction - kl).sum().item(), rel=1e-9)
    for elbo in (TraceMeanField_ELBO(), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)):
        assert math.isfinite(elbo.loss(vae.model, vae.guide, x))
    assert vae.log_weights(x, 3).shape == (3, 9)


@pytest.mark.parametrize("flow", ["nflows-maf", "normflows-affine", "zuko-nsf", "pyro-spline", "freia-affine"])
def test_flows_of_every_library_serve_as_prior_and_posterior(flow):
    vae, x = a_vae(flow=flow, posterior=True)
    loss = Trace_ELBO()(vae.model, vae.guide)
    loss(x).backward()
    assert all(weight.grad is not None for weight in vae.prior.parameters())
    torch.manual_seed(0)
    expected = Trace_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(0)
    reconstruction, kl = vae.terms(x)
    assert -expected == pytest.approx((reconstruction - kl).sum().item(), rel=1e-6)


def test_a_flow_posterior_starts_as_the_gaussian_and_is_scored_right():
    torch.manual_seed(0)
    flow = build_flow("masked-affine", 2, 4, layers=2, hidden_features=(8,))
    encoder = Encoder(2, 6, (8,), flow=flow).double()
    plain = Encoder(2, 6, (8,)).double()
    plain.network = encoder.network
    x, z = batch(9, 6), batch(9, 2)
    assert_close(encoder(x).log_prob(z), plain(x).log_prob(z))
    randomise(flow)
    q = encoder(x)
    z = q.rsample()
    loc, log_scale = encoder.network(x).chunk(2, 1)
    context = torch.cat((loc, log_scale), 1)
    expected = FlowDistribution(flow, context).log_prob((z - loc) / log_scale.exp()) - log_scale.sum(1)
    assert_close(q.log_prob(z), expected)


def test_vae_of_the_exercise():
    vae = VAE(StandardNormalPrior(32), Encoder(32), Decoder(32))
    shapes = [tuple(weight.shape) for weight in vae.parameters() if weight.dim() == 2]
    assert shapes == [(512, 32), (512, 512), (784, 512), (512, 784), (512, 512), (64, 512)]
    assert any(isinstance(layer, nn.Dropout) for layer in Encoder(2, dropout=0.1).modules())


# Bad input


def test_images_outside_the_unit_interval_are_refused():
    vae, x = a_vae()
    for bad, values in [(255 * x, "0 to 255"), (x - 1, "-1 to 0"), (x * math.nan, "nan to nan")]:
        for call in (vae.terms, Trace_ELBO()(vae.model, vae.guide), lambda x: vae.log_weights(x, 2)):
            with pytest.raises(ValueError, match=rf"images must lie in \[0, 1\], but these have values from {values}"):
                call(bad)
    with pytest.raises(ValueError, match=r"must have the shape \(batch, pixels\), not \(9, 2, 3\)"):
        vae.terms(x.view(9, 2, 3))
    assert vae.terms(x / 2)[0].isfinite().all()  # grey is fine


def test_widths_that_differ_are_refused():
    encoder, decoder = Encoder(3), Decoder(3)
    for prior in (StandardNormalPrior(2), MixturePrior(2), FlowPrior(build_flow("masked-affine", 2, layers=1))):
        with pytest.raises(ValueError, match=r"the prior is over \(2,\), but the encoder's z has the shape \(3,\)"):
            VAE(prior, encoder, decoder)
    with pytest.raises(ValueError, match=r"context must have the shape|posterior's flow is over \(2,\)"):
        Encoder(3, flow=build_flow("masked-affine", 2, 6, layers=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "cauchy"}, "unknown prior 'cauchy'; known: gaussian, mog, vamp, flow, all"),
        ({"flow": "affine"}, "unknown flow 'affine'; known: masked-affine"),
        ({"binarize": "grey"}, "unknown binarize 'grey'; known: threshold, dynamic"),
        ({"posterior": "exact"}, "unknown posterior 'exact'; known: gaussian, flow"),
        ({"dataset": "CIFAR10"}, "unknown dataset 'CIFAR10'; known: MNIST"),
        ({"latent": 1}, "a coupling flow needs at least 2 features, not 1; an autoregressive one"),
        ({"latent": 1, "prior": "all"}, "a coupling flow needs at least 2 features, not 1"),
        ({"latent": 0}, "latent must be positive, not 0"),
        ({"width": (16, 0)}, r"width\[1\] must be positive, not 0"),
        ({"dropout": 1.0}, "dropout must lie between 0 and 1, not 1.0"),
        ({"importance_samples": 0}, "importance_samples must be positive, not 0"),
        ({"seeds": 0}, "seeds must be positive, not 0"),
        ({"seed": -1}, "seed must lie between 0 and"),
        ({"save_every": 0.0}, "save_every must be positive, not 0.0"),
        ({"average": 1.0}, "average must lie between 0 and 1, not 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, and finite, but is -1.0"),
        ({"clip": 0.0}, "clip must be positive, not 0.0"),
        ({"warmup": 1.5}, "warmup must lie between 0 and 1, not 1.5"),
        ({"decay": -0.1}, "decay must lie between 0 and 1, not -0.1"),
        ({"augment": -1.0}, "augment must be 0 .none. or positive, not -1.0"),
        ({"augment": math.nan}, "augment must be 0 .none. or positive, not nan"),
        ({"kl_warmup": -1.0}, "kl_warmup must be 0 .none. or positive, not -1.0"),
        ({"augment": 1.0, "seconds": 60.0}, "give epochs instead of seconds"),
        ({"precision": "int8"}, "unknown precision 'int8'; known: no, bf16, fp16"),
        ({"lr": math.nan}, "lr must be positive, not nan"),
        ({"options": {"bins": 4}}, "masked-affine has no option 'bins'"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message, tmp_path):
    seams = {"read": lambda *_: pytest.fail("noticed too late")}
    with pytest.raises((ValueError, TypeError), match=message):
        run("pyro_vae", **arguments, out=tmp_path / "new", seams=seams)
    assert not (tmp_path / "new").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run("pyro_vae", resume=True, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prior", ["gaussian", "flow"])
def test_nan_stops_with_the_step_and_keeps_the_last_good_state(prior, tmp_path):
    with pytest.raises(NotFinite, match=r"at step \d+; the weights of step \d+ are kept.*saved in .*vae.safetensors"):
        tiny(prior=prior, lr=1e30, epochs=20, out=tmp_path)
    weights = safetensors.torch.load_file(tmp_path / f"{prior}-0" / "vae.safetensors")
    assert len(weights) > 8 and all(weight.isfinite().all() for weight in weights.values())
    if prior == "flow":
        assert all(weight.isfinite().all() for weight in load_flow(tmp_path / "flow-0").parameters())


def test_command_line_says_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "runs/pyro_vae.py", "--prior", "nosuch"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: unknown prior 'nosuch'; known: gaussian, mog, vamp, flow, all\n"


# Runs


@pytest.mark.parametrize(
    ("prior", "options", "answer"),
    [
        ("gaussian", {}, "this is the prior to compare with"),
        ("flow", {"limit": None}, "with a Gaussian prior (-81.76)"),
        ("flow", {}, "--prior all trains the Gaussian prior too"),  # under --limit
        ("flow", {"limit": None, "binarize": "dynamic"}, "--prior all trains the Gaussian prior too"),
        ("flow", {"limit": None, "dataset": "KMNIST"}, "--prior all trains the Gaussian prior too"),
    ],
)
def test_the_first_question_always_has_an_answer(prior, options, answer, tmp_path, capsys):
    tiny(prior=prior, out=tmp_path, **options)
    printed = capsys.readouterr().out.split("Is the test ELBO better?")[1].split("Do prior")[0]
    assert answer in printed and printed.count("\n") == 2


def test_end_to_end_with_all_priors(tmp_path, capsys):
    metrics = tiny(draw=True, prior="all", seeds=2, out=tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["run"] == "pyro_vae" and record["metrics"] == metrics and list(metrics) == list(pyro_vae.PRIORS)
    for found in metrics.values():
        assert found["elbo"] == pytest.approx(found["reconstruction"] - found["kl"])
        assert found["log_likelihood"] > found["elbo"] and 0 <= found["prior_match"] <= 1
        assert found["importance_samples"] == 4 and found["steps"] == 4 and found["parameters"] > 0
        assert found["train_seconds"] > 0 and found["elbo_std"] > 0
    printed = capsys.readouterr().out
    assert "Is the test ELBO better?" in printed
    assert printed.count("the Gaussian prior\n") == len(metrics) - 1  # with itself it is not compared
    assert "Do prior and aggregate posterior match?" in printed and "± is the standard error over 2 seeds" in printed
    assert "64 test images; log_likelihood from 4 importance samples on 6 of them" in printed
    for prior, found in metrics.items():
        assert found["seeds"] == 2 and found["elbo_stderr"] == pytest.approx(found["elbo_std"] / 2**0.5)
        assert ("elbo_gain" in found) == (prior != "gaussian")
        if prior != "gaussian":
            assert found["elbo_gain"] == pytest.approx(found["elbo"] - metrics["gaussian"]["elbo"])
    names = [f"{kind}-{prior}" for kind in ("samples", "reconstructions", "match") for prior in pyro_vae.PRIORS]
    for picture in (*names, "elbo", "priors"):
        assert f"{picture}.png" in printed
        with Image.open(tmp_path / f"{picture}.png") as image:
            image.load()
    flow, again = load_flow(tmp_path), load_flow(tmp_path / "flow-0")
    z = torch.randn(5, 3)
    assert torch.equal(flow.log_prob(z), again.log_prob(z))
    assert not torch.equal(flow.log_prob(z), load_flow(tmp_path / "flow-1").log_prob(z))
    assert not list(tmp_path.glob(".*"))


class LaplacePrior(nn.Module):
    """A prior of a user's own."""

    def __init__(self, latent):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self):
        return dist.Laplace(0.0, self.log_scale.exp()).to_event(1)


def test_a_prior_of_ones_own_is_a_line_in_the_table(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(pyro_vae.PRIORS, "laplace", lambda given: LaplacePrior(given.latent))
        metrics = tiny(draw=True, prior="all", out=tmp_path)
        assert list(metrics) == [*pyro_vae.PRIORS] == ["gaussian", "mog", "vamp", "flow", "laplace"]
    printed = capsys.readouterr().out
    assert "laplace prior, seed 0" in printed and re.search(r"^laplace +-", printed, re.M)
    assert re.search(r"laplace \d+\.\d ± \d", printed) and re.search(r"  laplace: .* the Gaussian prior", printed)
    drawn = pictures_in(tmp_path)
    assert drawn.keys() == {"elbo.png", "priors.png"} | {
        f"{kind}-{prior}.png" for kind in ("samples", "reconstructions", "match") for prior in metrics
    }
    colours = {ImageColor.getrgb(colour) for _, colour in styles()[: len(metrics)]}
    with Image.open(tmp_path / "elbo.png") as image:
        shown = {colour[:3] for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    assert len(colours) == len(metrics) and colours <= shown
    run("pyro_vae", load=tmp_path, out=tmp_path / "again")  # where the table has no such line
    assert pictures_in(tmp_path / "again") == drawn


def test_a_prior_that_does_not_fit_is_refused_before_the_others_are_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(pyro_vae.PRIORS, "laplace", lambda given: LaplacePrior(given.latent + 1))
    with pytest.raises(ValueError, match=r"the prior is over \(4,\), but the encoder's z has the shape \(3,\)"):
        tiny(prior="all", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_there_is_a_look_for_each_of_many_priors():
    assert len(set(styles())) == len(styles()) >= 40


def test_the_pictures_of_a_run_are_drawn_again_without_training(tmp_path, capsys):
    tiny(draw=True, prior="flow", out=tmp_path / "run", latent=2)
    drawn = pictures_in(tmp_path / "run")
    assert len(drawn) == 4
    for name in drawn:
        (tmp_path / "run" / name).unlink()
    files = sorted((tmp_path / "run").rglob("*"))
    assert run("pyro_vae", load=tmp_path / "run", out=tmp_path / "elsewhere") == {}
    assert pictures_in(tmp_path / "elsewhere") == drawn and files == sorted((tmp_path / "run").rglob("*"))
    run("pyro_vae", load=tmp_path)  # the newest run below
    assert pictures_in(tmp_path / "run") == drawn
    assert capsys.readouterr().out.count("/match-flow.png\n") == 3


def test_what_a_load_can_not_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="--load trains nothing, so --epochs, --benchmark would be ignored"):
        run("pyro_vae", load=tmp_path, epochs=3, benchmark=True)
    for values in ({"priors": {"flow": {"title": "flow"}}}, {"priors": 3}, {}):
        torch.save({"kind": "VAERecord", "values": values}, tmp_path / "pictures.pt")
        with pytest.raises(ValueError, match="pictures.pt is damaged, or not of this version"):
            run("pyro_vae", load=tmp_path)


def test_the_classes_have_colours_of_their_own_and_the_pictures_a_legend(tmp_path, monkeypatch):
    tiny(prior="all", epochs=1, out=tmp_path)
    texts: dict[str, list[str]] = {}

    def look(drawing, path, **_):
        drawing.draw_without_rendering()
        texts[path.name] = [text.get_text() for text in drawing.findobj(Text) if text.get_text()]
        boxes = [text.get_window_extent() for text in drawing.legends[0].get_texts()] if drawing.legends else []
        boxes.sort(key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))

    monkeypatch.setattr(importlib.import_module("runs.common.pictures.figures"), "save", look)
    run("pyro_vae", load=tmp_path)
    assert len(set(figures.CLASSES)) == 10
    for name in ("priors.png", "match-flow.png"):
        assert {*"0123456789"} < {*texts[name]} and "first principal component" in texts[name]
        assert "aggregate posterior: z of test images" in texts[name]
    assert "draws of the prior" in texts["priors.png"] and "images decoded from such draws" in texts["priors.png"]
    elbos = [text for text in (*texts["priors.png"], *texts["elbo.png"]) if re.search(r"(ELBO|test) .\d", text)]
    assert len(elbos) == 2 * len(pyro_vae.PRIORS) and all("−" in text and "±" in text for text in elbos)


def test_scoring_shows_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0)
    tiny(prior="gaussian", out=tmp_path)
    shown = capsys.readouterr().err
    assert all(f"scoring: {what}" in shown for what in ("ELBO", "log p(x)", "prior and posterior"))


def test_a_limit_shrinks_the_evaluation_and_what_is_asked_for_stays(capsys):
    shrunk = {limit: pyro_vae.EvaluationOptions().completed(limit) for limit in (None, 60_000, 10_000, 3_000, 1_000, 5)}
    found = [(options.importance_images, options.importance_samples) for options in shrunk.values()]
    assert found == [(1_000, 500), (1_000, 500), (1_000, 500), (300, 150), (100, 50), (10, 50)]
    asked = pyro_vae.EvaluationOptions(importance_images=7, importance_samples=9)
    assert asked.completed(100) == asked == asked.completed(None)


def found(match, elbo=-80.0, gain=None, error=0.1):
    """Metrics of a prior, as far as the report needs them."""
    figures = {"elbo": elbo, "reconstruction": elbo + 20, "kl": 20.0, "log_likelihood": elbo + 5, "prior_match": match}
    errors = {f"{name}_stderr": 0.005 if name == "prior_match" else error for name in figures}
    compared = {} if gain is None else {"elbo_gain": gain, "elbo_gain_stderr": error}
    counts = {"seeds": 1, "test_images": 10_000, "importance_samples": 500, "importance_images": 1_000}
    return figures | errors | compared | counts


def test_priors_that_can_not_be_told_apart_are_named_together(capsys):
    metrics = {
        "gaussian": found(0.628), "mog": found(0.548, gain=2.7), "vamp": found(0.521, gain=0.1),
        "flow": found(0.550, gain=-4.8),
    }  # fmt: skip
    report(metrics, comparable=True)
    printed = capsys.readouterr().out
    assert "mixture: 2.70 ± 0.10 nats better than the Gaussian prior" in printed
    assert "Vamp: not told apart (+0.10 ± 0.10 nats) from the Gaussian prior" in printed
    assert "flow: 4.80 ± 0.10 nats worse than the Gaussian prior" in printed
    groups = printed.split("50: they match)\n")[1].splitlines()
    assert [group.strip() for group in groups] == [
        "Vamp 52.1 ± 0.5", "mixture 54.8 ± 0.5, flow 55.0 ± 0.5: within the error of each other",
        "Gaussian 62.8 ± 0.5", "the best match: Vamp",
    ]  # fmt: skip
    report({"mog": found(0.548), "flow": found(0.55)}, comparable=False)
    printed = capsys.readouterr().out
    assert "no prior matches better than another" in printed and "-81.76" not in printed
    report({"flow": found(0.55, elbo=-81.7)}, comparable=True)
    assert "flow: not told apart (+0.06 ± 0.10 nats) from the best published" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        {"prior": "vamp", "binarize": "dynamic"},
        {"prior": "mog", "latent": 2, "draw": True},
        {"prior": "gaussian", "latent": 1, "draw": True},
        {"posterior": "flow", "dropout": 0.2, "average": 0.99, "weight_decay": 1e-3, "clip": 5.0, "decay": 0.3},
        {"latent": 1, "flow": "nflows-maf", "draw": True},
        {"latent": 1, "flow": "masked-autoregressive", "posterior": "flow"},
        {"seconds": 0.01, "epochs": 100_000},
        {"precision": "bf16", "augment": 1.0},
        {"patience": 1, "lr": 1e-9, "epochs": 30, "prior": "gaussian"},
        *({"flow": name} for name in ("nflows-rqs", "normflows-affine", "zuko-nsf", "pyro-affine", "freia-affine")),
    ],
    ids=lambda arguments: "-".join(f"{name}={value}" for name, value in arguments.items()),
)
def test_every_option(arguments, tmp_path):
    metrics = tiny(out=tmp_path, **arguments)
    (found,) = metrics.values()
    assert math.isfinite(found["elbo"]) and (tmp_path / "flow.safetensors").exists() == ("flow" in metrics)


def test_warped_images_move_by_draws_of_their_own_and_no_further_than_said():
    images = torch.zeros(2_000, 28, 28, dtype=torch.uint8)
    images[:, 13:15, 13:15] = 200
    assert_close(warped(images, 0.0), images.float(), rtol=0, atol=0.01)
    one, again, other = (warped(images, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    where = torch.arange(28.0)
    centre = torch.stack([(one.sum(axis) * where).sum(1) / one.sum((1, 2)) for axis in (1, 2)], 1) - 13.5
    assert centre.abs().max() < 1.15 and centre.mean(0).abs().max() < 0.05  # a pixel, turned and stretched
    assert (centre.amax(0) > 0.9).all() and (centre.amin(0) < -0.9).all()
    bar = torch.zeros(2_000, 28, 28)
    bar[:, 13:15, 2:26] = 1.0

    def slope_and_area(bars):
        columns = bars[:, :, [8, 20]]
        heights = (columns * where[:, None]).sum(1) / columns.sum(1)
        return (heights[:, 1] - heights[:, 0]) / 12, bars.sum((1, 2)) / 48

    slope, area = slope_and_area(warped(bar, 1.0, torch.Generator().manual_seed(0)))
    upright, _ = slope_and_area(warped(bar.mT, 1.0, torch.Generator().manual_seed(0)).mT)
    for found, most in ((slope.atan().rad2deg(), 6), (slope + upright, 0.06), (area.sqrt().log(), 0.06)):
        assert found.max() == pytest.approx(most, rel=0.15) and found.min() == pytest.approx(-most, rel=0.15)
    assert (warped(torch.ones(9, 28, 28), 5.0)[:, 0, 0] < 1).any()  # what moves in is black


def test_augmentation_follows_the_rate():
    augment = pyro_vae.augmentation(0.5, Recipe(steps=1, lr=0.1, warmup=0.2, decay=0.4), epochs=5)
    images = _images().train[:9]
    for epoch, amount in ((0, 0), (0.5, 0.25), (1, 0.5), (3, 0.5), (3.5, 0.4267767), (4, 0.25), (5, 0)):
        found, expected = (
            change(images, argument, torch.Generator().manual_seed(0))
            for change, argument in ((augment, epoch), (warped, amount))
        )
        assert_close(found, expected)


def test_a_training_sees_images_that_are_changed_while_the_rate_is_high(batches_seen, tmp_path):
    metrics = tiny(out=tmp_path, augment=1.0, epochs=5, warmup=0.2, decay=0.4)
    assert metrics["flow"]["steps"] == 10
    as_they_are = {tuple(image.flatten().tolist()) for image in _images().train[:64].round()}
    changed = [
        sum(tuple(image.flatten().round().int().tolist()) not in as_they_are for image in images)
        for images in batches_seen[0]
        if images.is_floating_point()
    ]
    assert len(changed) == 10 and changed[0] == 0 and min(changed[2:6]) == 32
    seen = len(batches_seen[0])
    tiny(out=tmp_path, epochs=5)
    assert not any(images.is_floating_point() for images in batches_seen[0][seen:])


def test_the_kls_weight_rises_over_the_warmup(tmp_path):
    rising = pyro_vae.VAETrainingOptions(kl_warmup=2.5)
    assert [rising.kl_weight(epoch) for epoch in (0, 1, 2, 2.5, 9)] == [1e-3, 0.4, 0.8, 1, 1]
    assert pyro_vae.VAETrainingOptions().kl_weight(0) == 1
    arguments = {"prior": "gaussian", "epochs": 60, "lr": 5e-3}
    plain = tiny(out=tmp_path / "plain", **arguments)["gaussian"]
    warmed = tiny(out=tmp_path / "warmed", kl_warmup=1e6, **arguments)["gaussian"]
    assert warmed["kl"] > 2 * plain["kl"]  # next to no weight all along


def test_the_picture_shows_no_loss_in_which_the_kl_weighs_less(tmp_path):
    for kl_warmup, shown in ((0.0, [8]), (2.0, [8]), (4.5, [])):
        tiny(prior="flow", epochs=4, kl_warmup=kl_warmup, out=tmp_path)
        assert [step for step, _ in VAERecord.load(tmp_path).priors["flow"].losses] == shown


def test_a_weight_of_the_kl_weighs_the_kl_alone():
    vae = VAE(StandardNormalPrior(2), Encoder(2, 5, (4,)), Decoder(2, 5, (4,)))
    x = torch.rand(7, 5).round()
    torch.manual_seed(0)
    reconstruction, kl = vae.terms(x)
    for weight in (0.3, torch.tensor(2.0)):
        torch.manual_seed(0)
        assert_close(-Trace_ELBO()(vae.model, vae.guide)(x, weight), (reconstruction - weight * kl).sum())
    with pytest.raises(ValueError, match="scale > 0"):
        Trace_ELBO()(vae.model, vae.guide)(x, 0.0)


def test_training_improves_the_elbo_and_dynamic_binarisation_is_fresh(tmp_path):
    short = tiny(prior="gaussian", epochs=1, out=tmp_path / "short")["gaussian"]
    long = tiny(prior="gaussian", epochs=60, lr=5e-3, out=tmp_path / "long")["gaussian"]
    assert long["elbo"] > short["elbo"] + 50
    grey = torch.full((4, 28, 28), 128, dtype=torch.uint8)
    assert threshold(grey).eq(1).all() and threshold(grey - 1).eq(0).all()
    batches = Batches(grey, None, 4, 0, prepare=binarize)
    assert batches(0)[0].mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(batches(0)[0], batches(1)[0]) and torch.equal(batches(0)[0], batches(0)[0])


def test_resumed_training_ends_where_an_uninterrupted_one_does(batches_seen, tmp_path):
    arguments = {"prior": "flow", "epochs": 5, "dropout": 0.2, "kl_warmup": 4.0}
    tiny(out=tmp_path / "whole", **arguments)
    seen, at = batches_seen
    at[len(seen) + 5] = interrupt
    assert tiny(out=tmp_path / "parts", **arguments)["flow"]["steps"] == 6
    with pytest.raises(ValueError, match="belongs to another training: dropout was 0.2, not 0.3"):
        tiny(out=tmp_path / "parts", resume=True, **arguments | {"dropout": 0.3})
    tiny(out=tmp_path / "parts", resume=True, importance_samples=3, **arguments)  # which does not touch the weights
    whole, parts = (
        safetensors.torch.load_file(tmp_path / name / "flow-0" / "vae.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(tmp_path.rglob(STATE))  # both have ended
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: the run in .*parts has ended\. Without --resume"):
        tiny(out=tmp_path / "parts", resume=True, **arguments)
    tiny(out=tmp_path / "kept", keep_state=True, **arguments)
    tiny(out=tmp_path / "kept", keep_state=True, resume=True, seeds=2, **arguments)
    assert len(list(tmp_path.rglob(STATE))) == 2


def test_two_processes_train_one_prior_after_the_other(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["runs/pyro_vae.py", "--prior", "flow", "--seeds", "2", "--limit", "64", "--batch-size", "32"]
    command += ["--epochs", "2", "--width", "8", "--latent", "3", "--layers", "2", "--hidden", "8"]
    command += ["--importance-samples", "2", "--importance-images", "4", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("elbo -") == 2
    assert math.isfinite(json.loads((tmp_path / "metrics.json").read_text())["metrics"]["flow"]["elbo_std"])


def test_two_samples_are_told_apart_if_they_differ():
    torch.manual_seed(0)
    one, same, other = torch.randn(2000, 3), torch.randn(2000, 3), torch.randn(2000, 3) + torch.tensor([5.0, 0, 0])
    assert scores.two_sample_accuracy(one, same) == pytest.approx(0.5, abs=0.05)
    assert scores.two_sample_accuracy(one, other) > 0.97


def test_a_constant_rate_and_one_that_decays_at_the_end():
    constant = Recipe(steps=100, lr=0.1, warmup=0.0, decay=0.0)
    assert [constant.rate(share) for share in (0, 0.5, 1)] == [0.1] * 3
    late = Recipe(steps=100, lr=0.1, warmup=0.0, decay=0.2)
    assert late.rate(0.8) == 0.1 and late.rate(0.9) == pytest.approx(0.05) and late.rate(1) == pytest.approx(0)
    with pytest.raises(ValueError, match="decay must lie between 0 and 1, not 2"):
        Recipe(steps=100, decay=2)


def test_the_benchmark_compares_the_same_elbo(tmp_path):
    flags = {key: TINY[key] for key in ("latent", "layers", "hidden", "width", "batch_size")}
    found = run("pyro_vae", benchmark=True, prior="gaussian", out=tmp_path / "new", **flags, seams={"rounds": 2})
    assert found.keys() == {"step_ratio", "pyro_ms", "plain_ms"} and found["step_ratio"] > 0
    assert not (tmp_path / "new").exists()
    vae = randomise(pyro_vae.ModelOptions(latent=3, layers=2, hidden=(8,), width=(8,)).vae("flow", torch.zeros(1, 784)))
    x = threshold(_images().test[:9]).double()
    losses = []
    for make in (pyro_loss, plain_loss):
        torch.manual_seed(0)
        loss = make(vae, x)()
        losses.append((loss, *torch.autograd.grad(loss, list(vae.parameters()))))
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("found", [True, False])
def test_argument_checks_are_left_as_they_were(found, monkeypatch):
    """torch.compile, for one, switches torch's off and not Pyro's."""
    monkeypatch.setattr(Distribution, "_validate_args", found)
    of_pyro = pyro.distributions.is_validation_enabled()
    with pytest.raises(KeyError), without_argument_checks():
        assert not Distribution._validate_args and not pyro.distributions.is_validation_enabled()
        raise KeyError
    assert Distribution._validate_args is found and pyro.distributions.is_validation_enabled() == of_pyro


def test_ctrl_c_ends_the_run_after_the_prior_at_hand_and_is_not_compared(batches_seen, tmp_path, capsys):
    batches_seen[1][8] = interrupt  # in the third of six steps under the second prior
    metrics = tiny(draw=True, prior="all", epochs=3, out=tmp_path)
    assert list(metrics) == ["gaussian", "mog"] and metrics["mog"]["interrupted"] and was_interrupted(metrics)
    assert "interrupted" not in metrics["gaussian"] and metrics["mog"]["steps"] < metrics["gaussian"]["steps"]
    printed = capsys.readouterr().out
    assert "mixture (interrupted)" in printed and "the Gaussian prior\n" not in printed
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"]["mog"]["interrupted"] is True and len(list(tmp_path.rglob(STATE))) == 2
    whole = tiny(prior="all", epochs=3, out=tmp_path, resume=True)
    assert list(whole) == list(pyro_vae.PRIORS) and not was_interrupted(whole)
    assert {found["steps"] for found in whole.values()} == {metrics["gaussian"]["steps"]}
    assert not list(tmp_path.rglob(STATE))


def test_the_command_line_says_that_it_was_interrupted():
    with pytest.raises(SystemExit) as stopped:
        cli(lambda options: {"flow": {"elbo": 1.0, "interrupted": True}}, pyro_vae.Options, [])
    assert stopped.value.code == 130


def test_the_elbo_that_stays_on_the_device_is_pyros():
    vae = VAE(MixturePrior(2, 3), Encoder(2, 9, (8,)), Decoder(2, 9, (8,)))
    x = torch.rand(5, 9)
    for kwargs in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}):
        found = []
        for elbo in (Trace_ELBO, ReparameterizedELBO):
            torch.manual_seed(0)
            loss = elbo(**kwargs)(vae.model, vae.guide)(x, 0.5)
            found.append((loss, *torch.autograd.grad(loss, list(vae.parameters()))))
        assert_close(found[0], found[1])


def test_a_guide_that_is_not_reparameterised_is_left_to_pyro():
    weight = torch.tensor(0.3, requires_grad=True)

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(weight))

    found = []
    for elbo in (Trace_ELBO, ReparameterizedELBO):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(elbo().differentiable_loss(model, guide), weight))
    torch.manual_seed(0)
    Trace_ELBO()._get_trace(model, guide, (), {})  # the look at the guide has drawn once
    assert_close(found[1], torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide), weight))
    assert found[0][0] != 0
