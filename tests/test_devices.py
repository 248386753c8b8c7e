"""Every script and flow on a device that isn't the CPU: the pretend one of tests/pretend.py."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adapters import FlowDistribution, build_flow, flow_names
from adapters.check.evidence import Quadrature
from adapters.normal import rational_ndtri
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from adapters.vae import VAE, Decoder, Encoder
from runs import pyro_vae
from runs.common import densities, step
from runs.common.comparison import Effort
from runs.common.devices import make_accelerator
from runs.common.fit import ASK_EVERY, SNAPSHOT_EVERY, fit
from runs.common.objectives import NegativeELBO, NegativeLogLikelihood, without_argument_checks
from runs.common.recipe import Recipe
from runs.common.speed import measure_speed
from runs.common.timing import Stopwatch
from runs.common.training_state import NotFinite
from tests import pretend
from tests.laws import randomise
from tests.scripts import run

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")]


def test_the_device_is_as_strict_as_it_says(device):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="same device.*pretend:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.tensor([0, 1])]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=device, generator=torch.Generator())
    with pytest.raises(TypeError, match="float64"):
        x.double()
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        x.numpy()
    assert (x * torch.tensor(2.0) + torch.ones(3).to(device)).tolist() == [3.0] * 3  # scalars may, and moves
    assert pretend.waits


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", flow_names())
def test_a_flow_computes_there_what_it_computes_on_the_cpu(name, context_features, device):
    flow = build_flow(name, 3, context_features, layers=2, hidden_features=(8,))
    randomise(flow).float()
    x = torch.randn(5, 3)
    context = None if context_features is None else torch.randn(5, 2)
    expected = flow.log_prob(x, context)
    flow, x = flow.to(device), x.to(device)
    context = None if context is None else context.to(device)
    found = flow.log_prob(x, context)
    assert found.device.type == "pretend" and torch.equal(found.detach().cpu(), expected.detach())
    found.mean().backward()
    samples, log_prob = flow.sample_and_log_prob(2, context)
    assert samples.device.type == log_prob.device.type == "pretend"
    p = FlowDistribution(flow, context)
    assert p.log_prob(p.rsample((2,))).device.type == "pretend"


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_a_density_draws_there_and_scores_in_float64_on_the_cpu(name, device):
    density = densities.DENSITIES[name](device)
    x = density.sample(50)
    assert x.device.type == "pretend" and x.dtype == torch.float32
    log_prob = density.log_prob(x)
    assert log_prob.device.type == "cpu" and log_prob.dtype == torch.float64 and log_prob.isfinite().all()


TOY = {"steps": 3, "layers": 2, "hidden": (8,), "batch_size": 16}
MNIST = {"limit": 40, "epochs": 1, "batch_size": 20, "layers": 2, "hidden": (8,), "samples": 4, "importance": 2}
VAE_RUN = {
    "limit": 40, "epochs": 1, "batch_size": 20, "latent": 2, "layers": 2, "hidden": (8,), "width": (8,),
    "components": 3, "importance_samples": 4, "importance_images": 5,
}  # fmt: skip
COMPARE = {"budget": "2steps", "layers": 2, "hidden": (8,)}
SCRIPTS = {
    "toy": ("toy", TOY | {"animate": True}),
    "toy-spline": ("toy", TOY | {"data": "chequerboard", "flow": "masked-spline"}),
    "mnist": ("mnist", MNIST),
    "mnist-conditional": ("mnist", MNIST | {"conditional": True, "mask": "random", "preprocess": "logit"}),
    "mnist-histogram": ("mnist", MNIST | {"mask": "pyramid", "flow": "masked-histogram", "layers": None}),
    "mnist-conv": ("mnist", MNIST | {"net": "conv", "preprocess": "affine", "hidden": (4,), "accumulate": 2}),
    "vae-all": ("pyro_vae", VAE_RUN | {"prior": "all", "augment": 1.0, "kl_warmup": 0.5}),
    "vae-posterior": ("pyro_vae", VAE_RUN | {"posterior": "flow", "latent": 3, "binarize": "dynamic"}),
    "compare-toy": ("compare", COMPARE | {"task": "two-gaussians", "flows": ("masked-spline", "zuko-nsf")}),
    "compare-mnist": ("compare", COMPARE | {"task": "mnist", "limit": 200, "flows": ("masked-affine",)}),
    "compare-vae": ("compare", COMPARE | {"task": "vae-prior", "limit": 200, "flows": ("masked-affine",)}),
}  # fmt: skip

QUICK = Stopwatch(seconds=0.01, min_rounds=2)
SEAMS = {  # smaller figures, the same for both devices
    "toy": {"test_points": 500},
    "compare": {"effort": Effort(QUICK, Quadrature(cells=20, samples=50), test_points=500)},
}


def untimed(figures):
    """The figures of a run without those that depend on the clock or on the machine's memory."""
    timed = ("second", "share", "memory", "times", "curve", "mib", "device")
    if isinstance(figures, dict):
        return {key: untimed(value) for key, value in figures.items() if not any(word in key for word in timed)}
    if isinstance(figures, list):
        return [untimed(value) for value in figures]
    return figures


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_figures_on_every_device(name, tmp_path):
    script, arguments = SCRIPTS[name]
    figures = {}
    for where in ("cpu", "pretend"):
        figures[where] = untimed(run(script, seams=SEAMS.get(script), **arguments, out=tmp_path / where, device=where))
    assert json.dumps(figures["pretend"], default=str) == json.dumps(figures["cpu"], default=str)
    assert "failed" not in json.dumps(figures["cpu"], default=str)


def test_a_saved_run_draws_there_too(tmp_path):
    run("mnist", **MNIST, out=tmp_path, device="cpu")
    run("mnist", load=tmp_path, samples=5, device="pretend")
    assert (tmp_path / "again" / "samples.png").is_file()


def test_costs_are_timed_there(device, tmp_path, capsys):
    found = measure_speed(
        (), 2, (4,), False, tmp_path, device, features=6, widths=(2, 4), depths=(1, 2), stopwatch=QUICK
    )
    assert found["table"]["masked-affine"]["step_ms"] > 0
    arguments = {"features": 4, "layers": 2, "hidden": (8,), "batch_size": 8, "rounds": 2}
    assert run("overhead", **arguments, out=tmp_path / "overhead", device="pretend")["zuko_in"] > 0
    sizes = {"latent": 2, "layers": 2, "hidden": (4,), "width": (4,)}
    found = run("pyro_vae", benchmark=True, device="pretend", **sizes, seams={"rounds": 2})
    assert found["step_ratio"] > 0 and pretend.waits["synchronize"] > 50
    assert capsys.readouterr().out.count("on pretend") == 2


# The step


OURS = [name for name in flow_names() if name.startswith("masked")]
PREPROCESS = {
    "standardize": lambda: Standardize(torch.zeros(4), torch.ones(4)),
    "logit": Logit,
    "probit": Probit,
    "marginals": lambda: Marginals(torch.rand(4, 256) + 0.1),
}


def steps(loss, batch, accelerator=None, **recipe):
    recipe = {"steps": 2 * ASK_EVERY, "clip": 1.0, "average": 0.9} | recipe
    return fit(loss, batch, Recipe(**recipe), quiet=True, accelerator=accelerator or make_accelerator("pretend"))


@pytest.mark.parametrize("preprocess", PREPROCESS)
@pytest.mark.parametrize("flow", OURS)
def test_a_step_does_not_wait_for_the_device(flow, preprocess, device):
    made = build_flow(flow, 4, layers=2, hidden_features=(8,), preprocess=PREPROCESS[preprocess]())
    steps(NegativeLogLikelihood(made), lambda step: torch.rand(16, 4, device=device))
    assert dict(pretend.waits) == {"tolist": 2}  # once in ASK_EVERY steps, for all their losses


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
@pytest.mark.parametrize("prior", pyro_vae.PRIORS)
def test_a_step_of_the_vae_does_not_wait_for_the_device(prior, posterior, device):
    def flow(context_features=None):
        return build_flow("masked-affine", 2, context_features, layers=2, hidden_features=(8,))

    encoder = Encoder(2, 9, (8,), flow=flow(4) if posterior == "flow" else None)
    made = pyro_vae.PRIORS[prior](pyro_vae.Ingredients(2, encoder, flow, torch.rand(3, 9)))
    loss = NegativeELBO(VAE(made, encoder, Decoder(2, 9, (8,))))
    with without_argument_checks():
        steps(loss, lambda step: (torch.rand(16, 9, device=device), torch.tensor(0.5)))
    assert dict(pretend.waits) == {"tolist": 2}


class Noisy(nn.Module):
    """|w − batch|² and some dropout."""

    def __init__(self, bad_at=None):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.bad_at = math.inf if bad_at is None else bad_at

    def forward(self, batch):
        self.calls += 1
        gap = nn.functional.dropout(self.w - batch, 0.3, self.training).square().sum()
        return torch.where(self.calls > self.bad_at, torch.nan, gap)


def noise(step):
    return torch.randn(3)


def test_a_loss_that_is_not_finite_is_found_though_it_is_asked_for_later(device):
    plain = Noisy()
    steps(plain, lambda step: torch.ones(3), steps=SNAPSHOT_EVERY + 30, average=None)
    loss = Noisy(bad_at=SNAPSHOT_EVERY + 3)
    with pytest.raises(NotFinite, match=f"at step {SNAPSHOT_EVERY + 4}; the weights of step {SNAPSHOT_EVERY} are kept"):
        steps(loss, lambda step: torch.ones(3), steps=SNAPSHOT_EVERY + 30, average=None)
    assert loss.w.isfinite().all().item() and loss.calls.item() == SNAPSHOT_EVERY
    loss = Noisy(bad_at=3)
    with pytest.raises(NotFinite, match="at step 4; the weights of step 0 are kept"):
        steps(loss, lambda step: torch.ones(3))
    assert loss.w.tolist() == [0, 0, 0]


@pytest.fixture
def graphs(monkeypatch):
    """CUDA's graphs, streams and all, on the pretend device; the compiler says that it can't."""
    monkeypatch.setattr(step, "can_be_graphed", lambda accelerator: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: pretend.forbid_waits(mode == "error"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", pretend.Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph.recorded())
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    pretend.replays.clear()
    return pretend.replays


@pytest.mark.parametrize("recipe", [{}, {"clip": None, "average": None}, {"accumulate": 2}, {"weight_decay": 0.1}])
def test_a_graph_trains_as_the_step_that_it_records(recipe, graphs):
    trained = []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = Noisy()
        fitted = steps(loss, noise, lr=0.1, compile=compile, **recipe)
        starts = [0, *(step for step, _ in fitted.losses)]  # a mean is over as many steps as half a second has had
        total = sum(mean * (end - start) for start, (end, mean) in zip(starts, fitted.losses, strict=False))
        trained.append([*loss.w.tolist(), loss.calls.item(), total])
    assert fitted.notes == [] and len(graphs) == 2 * ASK_EVERY - step.WARMUP
    assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)


def test_a_training_by_a_graph_is_resumed_and_stops_at_nan(graphs, tmp_path):
    def train(directory, stop_at=None, resume=False):
        def batch(i):
            if i == stop_at:
                raise KeyboardInterrupt
            return noise(i)

        loss = Noisy()
        recipe = Recipe(steps=50, lr=0.1, average=0.9, compile=True)
        accelerator = make_accelerator("pretend")
        fitted = fit(loss, batch, recipe, directory=directory, resume=resume, quiet=True, accelerator=accelerator)
        return loss.w.tolist(), fitted

    torch.manual_seed(0)
    whole, _ = train(tmp_path / "whole")
    torch.manual_seed(0)
    _, fitted = train(tmp_path / "parts", stop_at=20)
    assert fitted.interrupted and fitted.steps == 20
    resumed, _ = train(tmp_path / "parts", resume=True)
    assert resumed == whole
    loss = Noisy(bad_at=30)
    with pytest.raises(NotFinite, match="at step 31; the weights of step 0 are kept"):
        steps(loss, lambda step: torch.ones(3), compile=True)
    assert loss.w.tolist() == [0, 0, 0]


def test_what_can_not_be_recorded_or_compiled_trains_all_the_same_and_says_so(graphs, capsys, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(nn.Module, "compile", no_compiler)

    class Asks(Noisy):
        def forward(self, batch):
            return super().forward(batch) * (1 + 0 * batch.sum().item())

    trained = []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = Asks()
        fitted = fit(loss, noise, Recipe(steps=30, lr=0.1, compile=compile), accelerator=make_accelerator("pretend"))
        trained.append(loss.w.tolist())
    assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)
    assert not graphs
    first, second = fitted.notes
    assert first == "the step is not compiled: RuntimeError: no C++ compiler was found"
    assert second.startswith("the step runs without a CUDA graph: RuntimeError: called a synchronizing operation")
    printed = capsys.readouterr().out.splitlines()
    assert printed.count(first) == printed.count(second) == 1


# What is asked for and can't be had


@pytest.mark.parametrize("script", ["toy", "mnist", "pyro_vae", "compare", "overhead"])
def test_a_device_that_is_not_there_is_named_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong in ("cuda", "cuda:1", "tpu", "pretend:7"):
        with pytest.raises(ValueError, match=f"no device '{wrong}' here; there are: auto, cpu, pretend:0"):
            run(script, device=wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_precision_that_the_device_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision fp16 can't be had on cpu; bf16 and no can"):
        run("mnist", **MNIST, device="cpu", precision="fp16", out=tmp_path)


def test_several_processes_take_no_single_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="pretend:0 is one device for 2 processes: leave out the number"):
        make_accelerator("pretend:0")


@pytest.mark.parametrize("name", ["toy-spline", "mnist", "mnist-histogram"])
def test_where_a_device_lacks_an_operation_there_is_another_way(name, tmp_path, monkeypatch):
    """Apple's MPS has no Φ⁻¹."""
    script, arguments = SCRIPTS[name]
    expected = untimed(run(script, seams=SEAMS.get(script), **arguments, out=tmp_path / "cpu", device="cpu"))
    monkeypatch.setattr(pretend, "missing", {torch.ops.aten.special_ndtri.default})
    found = untimed(run(script, seams=SEAMS.get(script), **arguments, out=tmp_path / "pretend", device="pretend"))
    key = "kl" if "kl" in expected else "bits_per_dim"
    assert found[key] == pytest.approx(expected[key], abs=1e-3)


def test_the_quantile_function_has_seven_digits_and_its_gradient():
    tails = torch.logspace(-37, -1, 1000, dtype=torch.float64)
    p = torch.cat((tails, torch.linspace(0.01, 0.99, 999, dtype=torch.float64), 1 - tails[tails > 1e-12]))
    assert_close(rational_ndtri(p), torch.special.ndtri(p), rtol=2e-7, atol=2e-7)
    p = p[(p > 1e-30) & (p < 1 - 1e-6)].float().requires_grad_()
    slopes = [torch.autograd.grad(function(p).sum(), p)[0] for function in (rational_ndtri, torch.special.ndtri)]
    assert_close(*slopes, rtol=1e-4, atol=0)
