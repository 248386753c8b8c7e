"""sbi: builders for NPE, NLE and MarginalTrainer, their estimators' contract, and sbi's own estimators as flows."""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import ActNorm, CompositeTransform, Logit
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.testing import assert_close

from adapters import FlowDistribution, as_flow, as_transform, build_flow, flow_names, load_flow, save_flow, to_library
from adapters.bridges.sbi import import_sbi
from adapters.flow import Flow, StandardNormal
from tests.examples.sbi import estimator as sbi_estimator
from tests.laws import randomise

sbi = import_sbi()
from sbi.diagnostics import run_sbc  # noqa: E402  # after import_sbi, which keeps torch as it is
from sbi.diagnostics.lc2st import LC2ST_NF  # noqa: E402
from sbi.diagnostics.misspecification import calc_misspecification_logprob  # noqa: E402
from sbi.inference import NLE, NPE, NPE_A, NPE_B, NRE, EnsemblePosterior, MarginalTrainer  # noqa: E402
from sbi.inference.posteriors.posterior_parameters import (  # noqa: E402
    ImportanceSamplingPosteriorParameters,
    MCMCPosteriorParameters,
    RejectionPosteriorParameters,
    VIPosteriorParameters,
)
from sbi.neural_nets import likelihood_nn, marginal_nn  # noqa: E402
from sbi.neural_nets.factory import ZukoFlowType  # noqa: E402
from sbi.utils import BoxUniform, RestrictedPrior, get_density_thresholder  # noqa: E402

SMALL = {"layers": 2, "hidden_features": (8,)}
NAN = float("nan")
QUIET = {"show_progress_bars": False}
pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs")  # a test trains for a few only


@pytest.fixture(autouse=True)
def logs_elsewhere(tmp_path, monkeypatch):
    """sbi writes its logs to the working directory."""
    monkeypatch.chdir(tmp_path)


def simulations(n=100, parameters=2, width=3):
    """Parameters and what they give, neither of them standard."""
    theta = 2 + 3 * torch.randn(n, parameters)
    return theta, 5 * theta.sum(1, keepdim=True) + torch.arange(width) + torch.randn(n, width)


def conditional(name="masked-affine", features=2, context_features=3):
    return randomise(build_flow(name, features, context_features, **SMALL), scale=0.1).float()


def made(source="masked-affine", **options):
    """An estimator of that source, its parameters moved."""
    options = (SMALL if isinstance(source, str) else {}) | options
    return randomise(to_library("sbi", source, **options)(*simulations()), scale=0.1).float()


def quietly(trainer, theta, x, **options):
    inference = trainer(BoxUniform(-12 * torch.ones(2), 16 * torch.ones(2)), **QUIET, **options)
    return inference.append_simulations(theta, x)


# -- out: the estimator's contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", flow_names())
def test_every_flow_of_the_catalogue_is_a_density_estimator(name):
    theta, x = simulations()
    estimator = to_library("sbi", name, **SMALL)(theta, x)
    assert isinstance(estimator, sbi.ConditionalDensityEstimator)
    assert estimator.input_shape == (2,) and estimator.condition_shape == (3,)
    loss = estimator.loss(theta[:7], x[:7])
    assert loss.shape == (7,) and loss.dtype == torch.float32
    loss.mean().backward()
    assert all(p.grad is not None for p in estimator.parameters() if p.requires_grad)
    assert estimator.sample((4,), x[:3]).shape == (4, 3, 2)


@pytest.mark.parametrize("sample_shape", [(), (4,), (4, 5), (1,)])
def test_samples_belong_to_their_conditions(sample_shape):
    """The reshaping that sbi's own wrapper of nflows gets wrong: samples of one condition scored under another."""
    estimator, (_, x) = made(), simulations()
    with torch.no_grad():
        samples, log_prob = estimator.sample_and_log_prob(sample_shape, x[:3])
        assert samples.shape == (*sample_shape, 3, 2) and log_prob.shape == (*sample_shape, 3)
        assert estimator.sample(sample_shape, x[:3]).shape == samples.shape
        rows = estimator.log_prob(samples.reshape(-1, 3, 2), x[:3]).reshape(log_prob.shape)
        assert_close(rows, log_prob, atol=1e-3, rtol=1e-3)
        far = torch.stack((x.mean(0) - 100, x.mean(0) + 100))
        torch.manual_seed(3)
        both = estimator.sample((500,), far)
        for i in range(2):
            torch.manual_seed(4)
            alone = estimator.sample((500,), far[i : i + 1])[:, 0]
            assert_close(both[:, i].mean(0), alone.mean(0), atol=1.0, rtol=0.1)


def test_log_prob_broadcasts_inputs_and_conditions():
    estimator, (theta, x) = made(), simulations(12)
    expected = torch.stack([estimator.log_prob(theta[i : i + 1], x[i : i + 1])[0, 0] for i in range(12)])
    cases = {
        "pairs": (theta, x, expected[None]),
        "samples": (theta.reshape(3, 4, 2), x.reshape(3, 4, 3), expected.reshape(3, 4)),
        "one condition": (theta[:, None], x[:1], estimator.log_prob(theta, x[:1].expand(12, 3))[0][:, None]),
        "one input": (theta[:1], x, estimator.log_prob(theta[:1].expand(12, 2), x)),
    }
    for name, (inputs, conditions, wanted) in cases.items():
        found = estimator.log_prob(inputs, conditions)
        assert found.shape == wanted.shape, name
        assert_close(found, wanted, msg=name)
    assert_close(estimator.loss(theta, x), -expected)


CALLS = ["log_prob", "loss", "inverse_transform"]
REFUSED_PAIRS = {
    "input width": ((5, 1), (5, 3), ValueError, "Shape of input"),
    "condition width": ((5, 2), (5, 2), ValueError, "Shape of condition"),
    "rows": (
        (5, 2),
        (4, 3),
        ValueError,
        r"a batch of inputs of shape \(5,\) has no match in one of conditions of shape \(4,\)",
    ),
    "rows of samples": ((6, 5, 2), (4, 3), ValueError, r"inputs of shape \(6, 5\) .* conditions of shape \(4,\)"),
    "samples": ((6, 5, 2), (7, 5, 3), ValueError, r"inputs of shape \(6, 5\) .* conditions of shape \(7, 5\)"),
}


@pytest.mark.parametrize("call", CALLS)
def test_pairs_that_do_not_fit_are_refused(call):
    function = getattr(made(), call)
    for input_shape, condition_shape, kind, message in REFUSED_PAIRS.values():
        with pytest.raises(kind, match=message):
            function(torch.randn(input_shape), torch.randn(condition_shape))
    theta, x = simulations(5, width=2)
    function = getattr(to_library("sbi", "masked-affine", **SMALL)(theta, x), call)
    for wrong in ((theta.double(), x), (theta, x.double()), (theta.long(), x), (theta.tolist(), x), (theta, None)):
        with pytest.raises(TypeError, match="this flow is of torch.float32|must be a torch.Tensor"):
            function(*wrong)
    with pytest.raises(TypeError, match="this estimator is of torch.float32, its condition of torch.float64"):
        getattr(made(embedding_net=nn.Linear(3, 2)), call)(theta, torch.randn(5, 3).double())


def test_samples_of_wrong_conditions_are_refused():
    estimator, (_, x) = made(), simulations(5)
    for function in (estimator.sample, estimator.sample_and_log_prob):
        for wrong in (x[0], x[None]):
            with pytest.raises(ValueError, match=r"samples need conditions of shape \(batch, 3\), not \("):
                function((4,), wrong)
        with pytest.raises(ValueError, match="Shape of condition"):
            function((4,), x[:, :2])
        with pytest.raises(TypeError, match="the condition of this estimator must be a torch.Tensor"):
            function((4,), None)
        with pytest.raises(TypeError, match=r"sample_shape must be a tuple of integers, .*; give \(4,\)"):
            function(4, x)
        with pytest.raises(ValueError, match="must be a positive integer, not 0"):
            function((0,), x)


def test_an_empty_batch_gives_an_empty_answer():
    estimator, (theta, x) = made(), simulations(5)
    assert estimator.log_prob(theta[:0], x[:0]).shape == (1, 0) and estimator.loss(theta[:0], x[:0]).shape == (0,)
    assert estimator.sample((4,), x[:0]).shape == (4, 0, 2)
    assert [t.shape for t in estimator.sample_and_log_prob((4,), x[:0])] == [(4, 0, 2), (4, 0)]


def test_a_row_that_is_nan_harms_no_other():
    estimator, (theta, x) = made(), simulations(5)
    theta[1], x[3] = NAN, NAN
    assert estimator.log_prob(theta, x)[0].isnan().tolist() == [False, True, False, True, False]


def test_each_condition_is_embedded_once_however_many_inputs():
    rows = []

    class Counting(nn.Linear):
        def forward(self, input):
            rows.append(len(input))
            return super().forward(input)

    estimator, (_, x) = made(embedding_net=Counting(3, 5)), simulations()
    rows.clear()
    estimator.log_prob(torch.randn(50, 2, 2), x[:2])
    estimator.sample((50,), x[:2])
    assert rows == [2, 2]


def test_the_inverse_transform_gives_the_noise_that_makes_the_sample():
    estimator, (theta, x) = made(), simulations(6)
    noise = estimator.inverse_transform(theta, x)
    assert noise.shape == theta.shape
    assert_close(estimator.inverse_transform(theta[:, None], x[:1])[:, 0], estimator.inverse_transform(theta, x[:1]))
    assert_close(estimator.net.decode(noise, estimator.embedding_net(x)), theta, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("z_score", ["none", None, "independent", "structured"])
def test_it_is_standardised_as_sbi_does(z_score):
    theta, x = simulations()
    flow = conditional()
    estimator = to_library("sbi", flow, z_score_theta=z_score, z_score_x=z_score)(theta, x)

    def standardised(data):
        if z_score == "independent":
            return (data - data.mean(0)) / data.std(0), data.std(0).log().sum()
        if z_score == "structured":
            std = data.std(1).mean()
            return (data - data.mean()) / std, data.shape[1] * std.log()
        return data, torch.zeros(())

    (u, log_scale), (v, _) = standardised(theta), standardised(x)
    assert_close(estimator.log_prob(theta, x)[0], flow.log_prob(u, v) - log_scale, atol=1e-4, rtol=1e-4)


def test_standardised_it_is_sbis_own_estimator():
    """sbi's own flow, without its z-scoring, which the builder then adds: with the same weights the same density."""
    for name in ("maf", "zuko_maf"):
        torch.manual_seed(1)
        whole = sbi_estimator(name, 2, (3,))
        torch.manual_seed(1)
        bare = sbi_estimator(name, 2, (3,), z_score_theta="none", z_score_x="none")
        torch.manual_seed(1)
        theta, x = 2 + 3 * torch.randn(50, 2), 5 * torch.randn(50, 3) - 1  # as sbi_estimator draws them
        found = to_library("sbi", as_flow(bare))(theta, x)
        assert_close(found.log_prob(theta, x), whole.log_prob(theta, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"]
)
def test_builders_and_estimators_are_copied_and_pickled(way):
    theta, x = simulations()
    for source in ("masked-affine", conditional(), conditional().transform):
        estimator = made(source)
        again = way(estimator)
        assert_close(again.log_prob(theta, x), estimator.log_prob(theta, x), rtol=0, atol=0)
        assert not {id(p) for p in again.parameters()} & {id(p) for p in estimator.parameters()}
        builder = to_library("sbi", source, **(SMALL if isinstance(source, str) else {}))
        assert way(builder)(theta, x).log_prob(theta, x).shape == (1, 100)
    marginal = to_library("sbi", "masked-affine", **SMALL)(x)
    assert_close(way(marginal).log_prob(x), marginal.log_prob(x), rtol=0, atol=0)


def test_it_moves_to_another_device(device):
    estimator, (theta, x) = made("masked-affine", embedding_net=nn.Linear(3, 2)), simulations(5)
    expected = estimator.log_prob(theta, x)
    estimator.to(device)
    assert_close(estimator.log_prob(theta.to(device), x.to(device)).cpu(), expected)
    assert estimator.sample((3,), x.to(device)).device.type == device.type
    theta, x = simulations(5, width=2)
    estimator = to_library("sbi", "masked-affine", **SMALL)(theta, x).to(device)
    with pytest.raises(ValueError, match="is trained on x given θ"):
        estimator.loss(x.to(device), theta.to(device))
    assert estimator.loss(theta.to(device), x.to(device)).device.type == device.type


# -- out: what a builder takes -----------------------------------------------------------------------------------------


def own_factory(features, context_features):
    import zuko

    return zuko.flows.NSF(features, context_features, transforms=2, hidden_features=(8,))


def mixture(features, context_features):
    import zuko

    layer = zuko.flows.MaskedAutoregressiveTransform(features, context_features, hidden_features=(8,))
    return zuko.lazy.Flow(layer, zuko.flows.GMM(features, context_features, hidden_features=(8,)))


def by_position(features, context_features, /):
    return conditional(features=features, context_features=context_features)


def zuko_class(**options):
    import zuko

    return partial(zuko.flows.NSF, transforms=2, hidden_features=(8,), **options)


SOURCES = {
    "flow": conditional,
    "zuko's class": zuko_class,
    "zuko's class with its context": lambda: zuko_class(context=3),
    "function of whatever it is given": lambda: lambda features, **others: conditional(features=features, **others),
    "transform": lambda: conditional().transform,
    "library's flow": lambda: as_flow(own_factory(2, 3)),
    "factory of a library's flow": lambda: own_factory,
    "factory of a transform": lambda: (
        lambda features, context_features: conditional(features=features, context_features=context_features).transform
    ),
    "conditional base": lambda: mixture,
    "class": lambda: partial(build_flow, "normflows-affine", **SMALL),
    "nflows' own with an embedding": lambda: NflowsFlow(
        conditional(context_features=4).transform, StandardNormal([2]), nn.Linear(3, 4)
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_builder_takes_a_flow_a_transform_or_a_factory(name):
    theta, x = simulations(400)
    inference = quietly(NPE, theta, x, density_estimator=to_library("sbi", SOURCES[name]()))
    before = to_library("sbi", SOURCES[name]())(theta, x).loss(theta, x).mean()
    estimator = inference.train(max_num_epochs=5, learning_rate=1e-2, training_batch_size=50)
    assert estimator.loss(theta, x).mean() < before
    samples, log_prob = estimator.sample_and_log_prob((4,), x[:3])
    assert_close(estimator.log_prob(samples, x[:3]), log_prob, atol=1e-3, rtol=1e-3)
    flow = as_flow(estimator)
    assert flow.event_shape == (2,) and flow.context_features == 3
    assert_close(flow.log_prob(theta, x), estimator.log_prob(theta, x)[0])
    assert inference.build_posterior().sample((5,), x=x[:1], **QUIET).shape == (5, 2)


def test_a_flow_of_images_and_a_condition_of_images():
    flow = as_flow(build_flow("masked-affine", 2, 5, **SMALL))
    embedding_net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(5))
    embedding_net(torch.randn(1, 1, 6, 6))
    theta, x = torch.randn(60, 2), torch.randn(60, 1, 6, 6)
    inference = quietly(NPE, theta, x, density_estimator=to_library("sbi", flow, embedding_net=embedding_net))
    estimator = inference.train(max_num_epochs=1)
    assert estimator.condition_shape == (1, 6, 6)
    assert estimator.sample((4,), x[:3]).shape == (4, 3, 2)
    assert_close(as_flow(estimator).log_prob(theta, x), estimator.log_prob(theta, x)[0])
    assert set(embedding_net.parameters()) <= set(estimator.parameters())  # as with sbi's own builders


def test_a_condition_that_is_no_vector_is_flattened():
    theta, x = torch.randn(60, 2), torch.randn(60, 2, 3)
    estimator = to_library("sbi", "masked-affine", **SMALL)(theta, x)
    assert estimator.log_prob(theta, x).shape == (1, 60)
    flow = as_flow(estimator)
    assert_close(flow.log_prob(theta, x), estimator.log_prob(theta, x)[0])
    assert "context 2×3" in repr(flow)
    with pytest.raises(TypeError, match=r"a context of this flow has the shape \(2, 3\), and pyro's are vectors"):
        to_library("pyro", flow)


def test_each_call_of_a_builder_makes_an_estimator_of_its_own():
    flow, (theta, x) = conditional(), simulations()
    builder = to_library("sbi", flow)
    first, second = builder(theta, x), builder(theta, x)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in (*second.parameters(), *flow.parameters())}
    assert_close(first.log_prob(theta, x), second.log_prob(theta, x), rtol=0, atol=0)
    inference = quietly(NPE, theta, x, density_estimator=builder)
    weights = [p.clone() for p in flow.parameters()]
    trained = inference.train(max_num_epochs=2)
    again = inference.train(max_num_epochs=1, retrain_from_scratch=True, force_first_round_loss=True)
    assert not any(p is q for p in trained.parameters() for q in again.parameters())
    assert all(map(torch.equal, weights, flow.parameters()))


def test_a_class_of_zukos_makes_a_marginal():
    _, x = simulations()
    assert to_library("sbi", zuko_class())(x).log_prob(x).shape == (100,)


def test_the_builder_hands_its_flow_back():
    flow = conditional()
    assert as_flow(to_library("sbi", flow)) is flow and as_transform(to_library("sbi", flow)) is flow.transform
    assert as_transform(to_library("sbi", flow.transform)) is flow.transform
    for function in (as_flow, as_transform):
        with pytest.raises(TypeError, match="was given a name or a factory, so it has no flow before it is called"):
            function(to_library("sbi", "masked-affine"))


# -- out: inference ----------------------------------------------------------------------------------------------------


def test_as_a_likelihood():
    theta, x = simulations(400, width=2)
    embedding_net = nn.Linear(2, 4)
    builder = to_library("sbi", "masked-affine", estimates="likelihood", embedding_net=embedding_net, **SMALL)
    inference = quietly(NLE, theta, x, density_estimator=builder)
    estimator = inference.train(max_num_epochs=3)
    assert estimator.input_shape == (2,) and set(embedding_net.parameters()) <= set(estimator.parameters())
    assert estimator.log_prob(x[:5], theta[:5]).shape == (1, 5)
    posterior = inference.build_posterior()
    assert posterior.potential(theta[:4], x=x[:3]).shape == (4,)  # three trials, independent of each other


def test_as_a_marginal():
    _, x = simulations(400)
    trainer = MarginalTrainer(to_library("sbi", "masked-affine", **SMALL), **QUIET).append_samples(x)
    estimator = trainer.train(max_num_epochs=3)
    assert isinstance(estimator, sbi.UnconditionalDensityEstimator)
    assert estimator.log_prob(x.reshape(4, 100, 3)).shape == (4, 100) and estimator.loss(x).shape == (400,)
    samples, log_prob = estimator.sample_and_log_prob((5, 2))
    assert samples.shape == (5, 2, 3) and estimator.sample((5, 2)).shape == (5, 2, 3)
    assert_close(estimator.log_prob(samples), log_prob, atol=1e-3, rtol=1e-3)
    assert_close(as_flow(estimator).log_prob(x), estimator.log_prob(x))


@pytest.mark.filterwarnings("ignore::UserWarning")  # sbi's, about a marginal that is hardly trained
def test_a_marginal_is_used_as_sbis_own():
    """sbi's test of misspecification, shapes, and what is differentiable."""
    _, x = simulations(60)
    ours = to_library("sbi", "masked-affine", **SMALL)(x)
    native = marginal_nn(ZukoFlowType.NSF, hidden_features=8, num_transforms=2)(x)
    for call in (
        lambda estimator: estimator.log_prob(x[:5]),
        lambda estimator: estimator.log_prob(x.reshape(4, 15, 3)),
        lambda estimator: estimator.log_prob(x[0]),
        lambda estimator: estimator.loss(x[:5]),
        lambda estimator: estimator.sample((4,)),
        lambda estimator: estimator.sample(()),
        lambda estimator: estimator.sample_and_log_prob((4, 2))[0],
        lambda estimator: estimator.sample_and_log_prob((4, 2))[1],
    ):
        found, expected = call(ours), call(native)
        assert found.shape == expected.shape and found.requires_grad == expected.requires_grad
    p_value, rejected = calc_misspecification_logprob(x, x.mean(0, keepdim=True) + 1000, ours)
    assert p_value == 0 and rejected


def test_in_rounds():
    """Sequential inference: the posterior of a round proposes the parameters of the next."""
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    builder = to_library("sbi", "masked-affine", **SMALL)
    inference, proposal, x_o = NPE(prior, density_estimator=builder, **QUIET), prior, torch.ones(1, 2)
    for _ in range(2):
        theta = proposal.sample((200,)) if proposal is prior else proposal.sample((200,), **QUIET)
        x = theta + 0.3 * torch.randn_like(theta)
        estimator = inference.append_simulations(theta, x, proposal=proposal).train(max_num_epochs=5)
        proposal = inference.build_posterior(estimator).set_default_x(x_o)
    assert proposal.sample((10,), **QUIET).shape == (10, 2)
    pickle.dumps(proposal)


@pytest.mark.parametrize(("trainer", "estimates"), [(NPE, "posterior"), (NLE, "likelihood")])
def test_a_linear_gaussian_model(trainer, estimates):
    """θ ~ N(50, 3² I) and x = 10 θ + N(0, 15² I), far from standard: the posterior is N(μ, 1.8 I).

    Its precision is 1/3² + (10/15)² = 1/1.8, and μ = 1.8 (50/3² + 10 x/15²).
    """
    prior = torch.distributions.MultivariateNormal(torch.full((2,), 50.0), 9 * torch.eye(2))
    theta = prior.sample((1000,))
    x = 10 * theta + 15 * torch.randn_like(theta)
    builder = to_library("sbi", "masked-affine", estimates=estimates, layers=2, hidden_features=(16,))
    inference = trainer(prior, density_estimator=builder, **QUIET).append_simulations(theta, x)
    estimator = inference.train(max_num_epochs=20, training_batch_size=100, learning_rate=1e-2)
    theta_o = torch.tensor([[46.0, 54.0]])
    posterior = inference.build_posterior().set_default_x(x_o := 10 * theta_o)
    mean, deviation = 1.8 * (50 / 9 + 10 * x_o[0] / 225), 1.8**0.5

    def check_moments(points, weights, mean, deviation):
        found = weights @ points
        covariance = (weights * (points - found).T) @ (points - found)
        assert_close(found / deviation, mean / deviation, atol=0.5, rtol=0)
        assert_close(covariance / deviation**2, torch.eye(2), atol=0.6, rtol=0)

    line = deviation * torch.linspace(-5, 5, 61)
    grid = mean + torch.cartesian_prod(line, line)
    check_moments(grid, posterior.potential(grid).detach().softmax(0), mean, deviation)

    pairs, condition = ((theta, x), x_o) if trainer is NPE else ((x, theta), theta_o)
    mean, deviation = (mean, deviation) if trainer is NPE else (x_o[0], 15.0)
    draws = estimator.sample((4000,), condition)[:, 0].detach()
    check_moments(draws, torch.full((4000,), 1 / 4000), mean, deviation)
    entropy = math.log(2 * math.pi * math.e * deviation**2)
    assert abs(estimator.loss(*pairs).mean().item() - entropy) < 0.3


# -- out: what sbi does with an estimator ------------------------------------------------------------------------------

FEW_STEPS = {"num_chains": 1, "warmup_steps": 2, "thin": 1}
PRIOR = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainers of a posterior and of a likelihood, by name, and the simulations that they have seen."""
    theta = PRIOR.sample((200,))
    x = theta + 0.5 * torch.randn_like(theta)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("logs"))
        for trainer, estimates in ((NPE, "posterior"), (NLE, "likelihood")):
            builder = to_library("sbi", "masked-affine", estimates=estimates, **SMALL)
            found[estimates] = trainer(PRIOR, density_estimator=builder, **QUIET).append_simulations(theta, x)
            found[estimates].train(max_num_epochs=3)
    return found, theta, x


def test_a_posterior_is_scored_drawn_from_and_maximised(trained):
    found, theta, x = trained
    posterior = found["posterior"].build_posterior().set_default_x(x[:1])
    estimator = posterior.posterior_estimator
    exact = as_flow(estimator).log_prob(theta, x[:1].expand(len(x), 2))
    assert_close(posterior.log_prob(theta, norm_posterior=False), exact)
    inside = posterior.leakage_correction(x[:1], num_rejection_samples=20_000)
    draws = as_flow(estimator).sample(20_000, x[:1])[0]
    assert_close(inside, PRIOR.support.check(draws).float().mean()[None], atol=0.03, rtol=0)
    assert_close(posterior.log_prob(theta), exact - inside.log(), atol=0.05, rtol=0)
    samples = posterior.sample_batched((300,), x=x[:3], **QUIET)
    assert samples.shape == (300, 3, 2) and PRIOR.support.check(samples).all()
    log_prob = posterior.log_prob_batched(samples, x=x[:3], norm_posterior=False)
    assert_close(log_prob[:, 1], posterior.log_prob(samples[:, 1], x=x[1:2], norm_posterior=False))
    best = posterior.map(num_iter=20, num_init_samples=50, num_to_optimize=5, **QUIET)
    assert posterior.log_prob(best).item() > posterior.log_prob(samples[:, 0]).mean()
    assert posterior.sample((5,), reject_outside_prior=False, **QUIET).shape == (5, 2)
    point = theta[:4].clone().requires_grad_()
    posterior.log_prob(point, norm_posterior=False, track_gradients=True).sum().backward()
    assert point.grad.abs().min() > 0


def test_a_likelihood_is_of_trials_that_do_not_depend_on_each_other(trained):
    found, theta, x = trained
    inference = found["likelihood"]
    flow = as_flow(inference.build_posterior().potential_fn.likelihood_estimator)
    potential = inference.build_posterior().potential(theta[:4], x=x[:3])
    pairs = flow.log_prob(x[:3].repeat(4, 1), theta[:4].repeat_interleave(3, 0)).reshape(4, 3)
    assert_close(potential, pairs.sum(1) + PRIOR.log_prob(theta[:4]))


WAYS = {
    "slice": MCMCPosteriorParameters(method="slice_np"),
    "slices": MCMCPosteriorParameters(method="slice_np_vectorized"),
    "NUTS": MCMCPosteriorParameters(method="nuts_pyro"),
    "rejection": RejectionPosteriorParameters(),
    "importance": ImportanceSamplingPosteriorParameters(),
    "variational": VIPosteriorParameters(),
}


@pytest.mark.parametrize("estimates", ["posterior", "likelihood"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sampling_works(trained, estimates, way):
    found, _, x = trained
    posterior = found[estimates].build_posterior(posterior_parameters=WAYS[way]).set_default_x(x[:1])
    if way == "variational":
        posterior.train(max_num_iters=3, quality_control=False, **QUIET)
        assert posterior.sample((4,)).shape == (4, 2)
        return
    steps = FEW_STEPS if isinstance(WAYS[way], MCMCPosteriorParameters) else {}
    samples = posterior.sample((4,), **steps, **QUIET)
    assert samples.shape == (4, 2) and PRIOR.support.check(samples).all()


def test_many_observations_are_sampled_at_once(trained):
    found, _, x = trained
    for inference in found.values():
        posterior = inference.build_posterior(posterior_parameters=WAYS["slices"])
        assert posterior.sample_batched((4,), x=x[:3], **FEW_STEPS, **QUIET).shape == (4, 3, 2)


@pytest.mark.filterwarnings("ignore:When the inference object is pickled")
def test_posteriors_and_trainers_are_pickled_and_go_on(trained):
    found, theta, x = trained
    posterior = found["posterior"].build_posterior().set_default_x(x[:1])
    again = pickle.loads(pickle.dumps(posterior))
    assert_close(again.potential(theta), posterior.potential(theta), rtol=0, atol=0)
    trainer = pickle.loads(pickle.dumps(found["posterior"]))
    trainer.train(max_num_epochs=5, resume_training=True)
    assert trainer.build_posterior().sample((3,), x=x[:1], **QUIET).shape == (3, 2)
    both = EnsemblePosterior([posterior, again]).set_default_x(x[:1])
    assert_close(both.log_prob(theta[:5]), posterior.log_prob(theta[:5]), atol=0.1, rtol=0)


@pytest.mark.filterwarnings("ignore:Number of")
def test_it_is_diagnosed(trained):
    """Simulation-based calibration, and the local test, which wants the noise of each pair."""
    found, theta, x = trained
    posterior = found["posterior"].build_posterior()
    ranks, _ = run_sbc(theta[:10], x[:10], posterior, num_posterior_samples=20, show_progress_bar=False)
    assert ranks.shape == (10, 2)
    test = LC2ST_NF(
        theta,
        x,
        posterior.sample_batched((1,), x=x, max_sampling_batch_size=100, **QUIET)[0],
        flow_inverse_transform=posterior.posterior_estimator.inverse_transform,
        flow_base_dist=torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        num_eval=50,
    )
    test.train_on_observed_data()
    draws = posterior.sample((50,), x=x[:1], **QUIET)
    assert 0 <= test.get_statistic_on_observed_data(theta_o=draws, x_o=x[:1]) <= 1


@pytest.mark.parametrize(
    ("trainer", "options"),
    [(NPE, {"use_combined_loss": True, "num_atoms": 5}), (NPE, {"retrain_from_scratch": True}), (NPE_B, {})],
    ids=["atoms", "from scratch", "importance weights"],
)
def test_later_rounds_of_every_kind(trainer, options):
    inference = trainer(PRIOR, density_estimator=to_library("sbi", "masked-affine", **SMALL), **QUIET)
    inference.append_simulations(theta := PRIOR.sample((100,)), theta + 0.5 * torch.randn_like(theta), proposal=PRIOR)
    inference.train(max_num_epochs=2)
    proposal = inference.build_posterior().set_default_x(torch.ones(1, 2))
    inference.append_simulations(theta := proposal.sample((100,), **QUIET), theta + 0.5, proposal=proposal)
    inference.train(max_num_epochs=2, **options)
    assert inference.build_posterior().sample((3,), x=torch.ones(1, 2), **QUIET).shape == (3, 2)


def test_rounds_whose_proposal_is_the_prior_cut_to_what_the_posterior_leaves():
    inference = NPE(PRIOR, density_estimator=to_library("sbi", "masked-affine", **SMALL), **QUIET)
    proposal, options = PRIOR, {}
    for _ in range(2):
        theta = proposal.sample((100,), **options)
        inference.append_simulations(theta, theta + 0.5 * torch.randn_like(theta))
        inference.train(max_num_epochs=2, force_first_round_loss=True)
        posterior = inference.build_posterior().set_default_x(torch.ones(1, 2))
        accept = get_density_thresholder(posterior, quantile=0.01, num_samples_to_estimate_support=200)
        proposal, options = RestrictedPrior(PRIOR, accept, sample_with="rejection"), QUIET
    assert posterior.sample((3,), **QUIET).shape == (3, 2)


@pytest.mark.parametrize("z_score", ["independent", "structured"])
def test_its_state_holds_all_that_it_knows(z_score):
    """Weights and standardisation: made of other simulations, an estimator with the same state is the same."""
    options = {"z_score_theta": z_score, "z_score_x": z_score, "embedding_net": nn.Linear(3, 4)}
    builder, (theta, x) = to_library("sbi", "masked-affine", **SMALL, **options), simulations()
    estimator, other = randomise(builder(theta, x), scale=0.1).float(), builder(theta - 7, x * 3)
    other.load_state_dict({name: value.clone() for name, value in estimator.state_dict().items()})
    assert_close(other.log_prob(theta, x), estimator.log_prob(theta, x), rtol=0, atol=0)


def test_it_trains_and_evaluates_in_its_modes():
    estimator, (theta, x) = made(embedding_net=nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))), simulations()
    estimator.train()
    assert not torch.equal(estimator.loss(theta, x), estimator.loss(theta, x))
    estimator.eval()
    assert torch.equal(estimator.loss(theta, x), estimator.loss(theta, x))


# -- out: what is refused ----------------------------------------------------------------------------------------------

BUILT_WRONG = {
    "unknown flow": (lambda: to_library("sbi", "masked-afine"), ValueError, "unknown flow 'masked-afine'; known: "),
    "unknown option": (
        lambda: to_library("sbi", "masked-affine", bins=3),
        TypeError,
        "masked-affine has no option 'bins'",
    ),
    "option of a flow": (
        lambda: to_library("sbi", conditional(), layers=3),
        TypeError,
        "a flow that is built already takes no layers; give its name or a factory",
    ),
    "estimates": (
        lambda: to_library("sbi", conditional(), estimates="evidence"),
        ValueError,
        "estimates must be 'posterior', for NPE, or 'likelihood', for NLE, not 'evidence'",
    ),
    "z-scoring": (
        lambda: to_library("sbi", conditional(), z_score_theta="transform_to_unconstrained"),
        ValueError,
        "z_score_theta must be 'independent', 'structured' or 'none', not 'transform_to_unconstrained'",
    ),
    "embedding": (
        lambda: to_library("sbi", conditional(), embedding_net=nn.Linear),
        TypeError,
        "embedding_net must be an nn.Module, not <class",
    ),
    "factory of other arguments": (
        lambda: to_library("sbi", lambda features, width: None),
        TypeError,
        "is called with features=… and context_features=…, but this one wants width: give a function of these two by",
    ),
    "option that a factory lacks": (
        lambda: to_library("sbi", own_factory, depth=3),
        TypeError,
        "a factory that takes no such options: partial object .*depth=3.* has incorrect arguments",
    ),
    "factory of positions": (
        lambda: to_library("sbi", by_position),
        TypeError,
        "but this one wants features, context_features: give a function of these two by name",
    ),
    "no factory": (lambda: to_library("sbi", print), TypeError, "but this one takes no features: give"),
    "a function of nothing": (
        lambda: to_library("sbi", lambda: conditional()),
        TypeError,
        "but this one takes no features: give lambda features, context_features: …, or, of a flow that is built",
    ),
    "network": (lambda: to_library("sbi", nn.Linear(2, 2)), TypeError, "to_library exports an nflows Transform, not"),
    "other library": (
        lambda: to_library("pyro", conditional(), embedding_net=nn.Linear(2, 2)),
        TypeError,
        r"to_library\('pyro', …\) takes no embedding_net",
    ),
    "name to another library": (lambda: to_library("pyro", "masked-affine"), TypeError, "not builtins.str; as_trans"),
}


@pytest.mark.parametrize("name", BUILT_WRONG)
def test_no_builder_is_made_of_what_makes_no_estimator(name):
    call, kind, message = BUILT_WRONG[name]
    with pytest.raises(kind, match=message):
        call()


class Squeezing(nn.Linear):
    """Right for many rows, but one loses its dimension."""

    def forward(self, input):
        return super().forward(input).squeeze()


REFUSED = {
    "context": (
        lambda: conditional(context_features=4),
        {},
        r"takes a context of 4 numbers, but the condition has 3, once embedded: build the flow with context_features=3",
    ),
    "embedded context": (conditional, {"embedding_net": nn.Linear(3, 5)}, "condition has 5, once embedded"),
    "embedding": (
        conditional,
        {"embedding_net": nn.Linear(4, 3)},
        r"network can't be given conditions of shape \(3,\)",
    ),
    "unconditional flow": (
        lambda: conditional(context_features=None),
        {},
        "this flow is unconditional: it would ignore what NPE and NLE condition on; build it with context_features=3",
    ),
    "unconditional transform": (
        lambda: build_flow("nflows-affine", 2, **SMALL).transform,
        {},
        "this flow is unconditional: it would ignore what NPE and NLE condition on",
    ),
    "transform that takes no context": (
        lambda: build_flow("masked-affine", 2, **SMALL).transform,
        {},
        "this flow is unconditional: it would ignore what NPE and NLE condition on; build its layers with a context",
    ),
    "unconditional factory": (
        lambda: lambda features: build_flow("masked-affine", features, **SMALL),
        {},
        "this flow is unconditional",
    ),
    "transform of another context": (
        lambda: conditional(context_features=4).transform,
        {},
        r"this flow does not take data of shape \(2,\) with a context of 3 numbers \(.*\): build its layers for both",
    ),
    "layer that takes no context": (
        lambda: CompositeTransform(
            [conditional().transform, as_transform(pyro_transforms.permute(2)), conditional().transform]
        ),
        {},
        r"\(Permute is unconditional, but a context of shape \(2, 3\) was given\): join that layer to the others",
    ),
    "domain": (
        lambda: CompositeTransform([Logit(), conditional().transform]),
        {"z_score_theta": "none"},
        r"the prior's parameters lie outside the domain of a layer of this flow, such as \[0, 1\] of a logit: put",
    ),
    "domain, once standardised": (
        lambda: CompositeTransform([Logit(), conditional().transform]),
        {},
        "outside the domain of a layer .* or give z_score_theta='none' if they lie there until they are standardised",
    ),
    "prior": (
        lambda: conditional(features=3),
        {},
        r"the prior's parameters have the shape \(2,\), but the flow is of data of shape \(3,\): build it with feat",
    ),
    "likelihood": (
        conditional,
        {"estimates": "likelihood"},
        r"the simulations have the shape \(3,\), but the flow is of data of shape \(2,\)",
    ),
    "name of other features": (
        lambda: "masked-affine",
        {"features": 4, "layers": 2},
        r"parameters have the shape \(2,\), but the flow is of data of shape \(4,\): build it with features=2",
    ),
    "name of another context": (
        lambda: "masked-affine",
        {"context_features": 4},
        "this flow takes a context of 4 numbers, but the condition has 3, once embedded",
    ),
    "name of other masks": (
        lambda: "masked-affine",
        {"masks": [torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 0, 1])]},
        r"each mask must have shape \(2,\), but one has \(4,\)",
    ),
    "factory of other features": (
        lambda: partial(build_flow, "masked-affine", features=4, **SMALL),
        {},
        r"parameters have the shape \(2,\), but the flow is of data of shape \(4,\): build it with features=2",
    ),
    "factory of another context": (
        lambda: lambda features: conditional(features=features, context_features=5),
        {},
        "this flow takes a context of 5 numbers, but the condition has 3, once embedded",
    ),
    "embedding of rows": (
        conditional,
        {"embedding_net": nn.Flatten(0)},
        r"the embedding network must return \(batch, numbers\), but of \(2, 3\) it returned \(6,\)",
    ),
    "embedding that squeezes": (
        conditional,
        {"embedding_net": Squeezing(3, 3)},
        r"the embedding network must return \(batch, numbers\), but of \(1, 3\) it returned \(3,\)",
    ),
    "embedding of two outputs": (
        conditional,
        {"embedding_net": nn.LSTM(3, 3)},
        r"the embedding network must return \(batch, numbers\), but of \(2, 3\) it returned tuple",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_simulations_is_refused_before_training(name):
    source, options, message = REFUSED[name]
    inference = quietly(NPE, *simulations(), density_estimator=to_library("sbi", source(), **options))
    with pytest.raises(ValueError, match=message):
        inference.train()


@pytest.mark.parametrize("name", flow_names())
def test_no_flow_of_other_widths_is_trained(name):
    """A flow says its widths. A transform fails when it is tried, or is seen to ignore the context."""
    theta, x = simulations()
    for features, context_features in ((3, 3), (4, 3), (2, 2), (2, 4), (2, None)):
        flow = build_flow(name, features, context_features, **SMALL)
        for source in (flow, flow.transform):
            with pytest.raises(
                ValueError, match="flow is of data of shape|takes a context of|does not take|unconditional"
            ):
                to_library("sbi", source)(theta, x)


REFUSED_SIMULATIONS = {
    "lists": ([[1.0, 2.0]], [[1.0]], TypeError, "theta must be a torch.Tensor, not a list"),
    "integers": (
        torch.ones(9, 2).long(),
        torch.ones(9, 3),
        TypeError,
        r"theta is of torch.int64.*: give theta.float\(\)",
    ),
    "integers in x": (
        torch.randn(9, 2),
        torch.ones(9, 3).long(),
        TypeError,
        r"x is of torch.int64.*: give x.float\(\)",
    ),
    "two dtypes": (
        torch.randn(9, 2),
        torch.randn(9, 3).double(),
        TypeError,
        "theta is of torch.float32, but x of torch.float64: give both as torch.float32",
    ),
    "one number": (
        torch.randn(9),
        torch.randn(9, 3),
        ValueError,
        r"theta must have the shape \(batch, numbers\), not \(9,\); give theta.unsqueeze\(1\)",
    ),
    "one number in x": (torch.randn(9, 2), torch.randn(9), ValueError, r"not \(9,\); give x.unsqueeze\(1\)"),
    "no numbers": (torch.randn(9, 2), torch.randn(9, 0), ValueError, r"x must have the shape .*, not \(9, 0\)"),
    "no simulations": (torch.randn(0, 2), torch.randn(0, 3), ValueError, r"theta must have the shape .*, not \(0, 2\)"),
    "one simulation": (
        torch.randn(1, 2),
        torch.randn(1, 3),
        ValueError,
        r"theta can't be standardised by 1 finite row, .*: simulate more, or give z_score_theta='none'",
    ),
    "unequal": (torch.randn(9, 2), torch.randn(8, 3), ValueError, "theta has 9 rows, but x has 8: give one x for each"),
    "NaN": (torch.full((9, 2), NAN), torch.randn(9, 3), ValueError, "theta has NaN or infinite values in 9 of 9 rows"),
    "infinite": (
        torch.tensor([[1.0, 2.0], [torch.inf, 1.0], [2.0, 2.0]]),
        torch.randn(3, 3),
        ValueError,
        "theta has NaN or infinite values in 1 of 3 rows: leave them out",
    ),
    "NaN in all of x": (
        torch.randn(9, 2),
        torch.full((9, 3), NAN),
        ValueError,
        "x can't be standardised by 0 finite rows",
    ),
    "images": (
        torch.randn(9, 2, 3),
        torch.randn(9, 3),
        ValueError,
        r"parameters have the shape \(2, 3\), but the flow is of data of shape \(6,\): give theta.flatten\(1\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED_SIMULATIONS)
def test_simulations_that_nothing_can_be_learned_from_are_refused(name):
    theta, x, kind, message = REFUSED_SIMULATIONS[name]
    with pytest.raises(kind, match=message):
        to_library("sbi", "masked-affine", **SMALL)(theta, x)


def test_what_a_density_is_of_must_be_finite_but_not_what_it_is_conditioned_on():
    """NaN in a condition may stand for what was not observed: sbi leaves it to the embedding network."""
    theta, x = simulations()
    x[3] = NAN
    with pytest.raises(ValueError, match="x has NaN or infinite values in 1 of 100 rows"):
        to_library("sbi", "masked-affine", estimates="likelihood", **SMALL)(theta, x)
    with pytest.raises(ValueError, match="x has NaN or infinite values in 1 of 100 rows"):
        to_library("sbi", "masked-affine", **SMALL)(x)

    class Known(nn.Module):
        def forward(self, x):
            return torch.cat((x.nan_to_num(), x.isnan().float()), 1)

    loss = to_library("sbi", "masked-affine", embedding_net=Known(), **SMALL)(theta, x).loss(theta, x)
    assert loss.isfinite().all()


@pytest.mark.parametrize("estimates", ["posterior", "likelihood"])
def test_one_number_for_all_needs_more_than_one(estimates):
    for name, widths in {"theta": (1, 3), "x": (2, 1)}.items():
        with pytest.raises(
            ValueError, match=rf"z_score_{name}='structured' takes .* only one number in the shape \(1,\)"
        ):
            options = {f"z_score_{name}": "structured", "estimates": estimates}
            to_library("sbi", "masked-autoregressive", **SMALL, **options)(*simulations(9, *widths))


@pytest.mark.parametrize("trainer", [NPE, NLE])
def test_two_simulations_are_too_few_to_standardise_by(trainer):
    """sbi keeps one of them for validation."""
    builder = to_library("sbi", "masked-affine", estimates="posterior" if trainer is NPE else "likelihood", **SMALL)
    with pytest.raises(ValueError, match="can't be standardised by 1 finite row"):
        quietly(trainer, *simulations(2), density_estimator=builder).train()


@pytest.mark.parametrize(
    ("trainer", "estimates", "other"), [(NPE, "likelihood", "posterior"), (NLE, "posterior", "likelihood")]
)
@pytest.mark.parametrize("width", [2, 3])
def test_an_estimator_of_the_other_density_is_not_trained(trainer, estimates, other, width):
    """Of one width, θ and x may change places unseen: standardised by each other's moments, the flow hardly learns."""
    builder = to_library("sbi", "masked-affine", estimates=estimates, **SMALL)
    inference = quietly(trainer, *simulations(width=width), density_estimator=builder)
    message = rf"is trained on . given .: give estimates='{other}'" if width == 2 else "Expected trailing dimensions"
    for resume in [False] if width == 3 else [False, True]:  # once more, of the estimator that there is now
        with pytest.raises((ValueError, RuntimeError), match=message):
            inference.train(max_num_epochs=1, resume_training=resume)


def test_estimators_that_are_given_other_data_than_they_were_made_of_train():
    """What is not surely wrong is not refused: θ that is x, pairs both ways round, and data never seen."""
    theta, x = simulations(width=2)
    builder = to_library("sbi", "masked-affine", **SMALL)
    for made_of, trained_on in {
        "the same": ((theta, theta), (theta, theta)),
        "both ways round": ((torch.cat((theta, x)), torch.cat((x, theta))), (x, theta)),
        "unseen": ((theta, x), (x + 1, theta)),
        "re-paired": ((theta, x), (x, theta.flip(0))),
        "none": ((theta, x), (x[:0], theta[:0])),
    }.values():
        assert builder(*made_of).loss(*trained_on).shape == (len(trained_on[0]),)
    assert builder(theta, x).loss(theta.view(4, 25, 2), x.view(4, 25, 2)).shape == (4, 25)
    assert builder(theta, x).loss(theta[0], x[0]).shape == ()
    estimator = builder(theta, x)
    estimator.loss(theta, x)
    assert estimator.loss(x, theta).shape == (100,)  # it has seen that all is well, and looks no more


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), None], ids=["copy", "pickle", "loss"]
)
def test_no_estimator_keeps_its_simulations(way):
    theta, x = simulations(10_000, width=2)
    estimator = to_library("sbi", "masked-affine", **SMALL)(theta, x)
    if way is None:
        estimator.loss(theta, x)
    else:
        estimator = way(estimator)
    assert estimator.made_of is None and len(pickle.dumps(estimator)) < theta.nbytes


def test_a_prior_of_another_width_is_refused_when_its_parameters_come():
    """sbi shows no prior to a builder: simulations of other parameters train, as with sbi's own estimators."""
    prior, (theta, x) = BoxUniform(-torch.ones(3), torch.ones(3)), simulations()
    for trainer, estimates, message in (
        (NPE, "posterior", "Shape of input"),
        (NLE, "likelihood", "Shape of condition"),
    ):
        builder = to_library("sbi", "masked-affine", estimates=estimates, **SMALL)
        inference = trainer(prior, density_estimator=builder, **QUIET).append_simulations(theta, x)
        inference.train(max_num_epochs=1)
        posterior = inference.build_posterior().set_default_x(x[:1])
        with pytest.raises(ValueError, match=message):
            posterior.potential(prior.sample((4,)))


def test_a_conditional_flow_is_no_marginal():
    with pytest.raises(ValueError, match="of a context of 3 numbers, and MarginalTrainer conditions on nothing"):
        to_library("sbi", conditional())(simulations()[0])


@pytest.mark.parametrize(
    ("trainer", "argument", "message"),
    [(NPE_A, "density_estimator", "a trainer that wants num_components, as NPE_A does,"), (NRE, "classifier", "NRE ")],
)
def test_trainers_of_something_else_say_that_they_take_no_flow(trainer, argument, message):
    builder = to_library("sbi", "masked-affine", **SMALL)
    inference = trainer(PRIOR, **{argument: builder}, **QUIET).append_simulations(*simulations())
    with pytest.raises(TypeError, match=f"{message}.* takes no flow: use NPE, NLE or MarginalTrainer"):
        inference.train(max_num_epochs=1)


def test_probing_a_flow_leaves_no_trace():
    """Layers that initialise themselves on their first batch do so in training, not while the builder looks."""
    theta, x = simulations()
    embedding_net = nn.BatchNorm1d(3)
    layers = CompositeTransform([ActNorm(2), conditional().transform])
    estimator = to_library("sbi", layers, embedding_net=embedding_net)(theta, x)
    assert embedding_net.num_batches_tracked == 0
    assert not any(module.initialized for module in estimator.modules() if isinstance(module, ActNorm))


# -- in ----------------------------------------------------------------------------------------------------------------

OWN = ["maf", "maf_rqs", "nsf", "made", "zuko_bpf", "zuko_maf", "zuko_nsf", "zuko_ncsf", "zuko_nice", "zuko_gf"]
OWN += ["zuko_naf", "zuko_unaf", "zuko_sospf"]


@pytest.mark.parametrize("name", OWN)
def test_sbis_own_estimators_score_as_in_sbi(name):
    native = sbi_estimator(name, 2, (3,), embedding_net=nn.Linear(3, 4))
    flow, (theta, x) = as_flow(native), simulations()
    assert isinstance(flow, Flow) and flow.event_shape == (2,) and flow.context_features == 3
    assert_close(flow.log_prob(theta, x), native.log_prob(theta, x)[0], atol=1e-5, rtol=1e-4)
    assert {id(p) for p in flow.parameters()} == {id(p) for p in native.parameters()}
    samples, log_prob = flow.sample_and_log_prob(3, x[:4])
    assert samples.shape == (4, 3, 2) and log_prob.shape == (4, 3)
    p = FlowDistribution(flow, x[:4], validate_args=False)
    assert p.batch_shape == (4,) and p.sample((5,)).shape == (5, 4, 2)


@pytest.mark.parametrize("z_score", ["none", "independent", "structured"])
@pytest.mark.parametrize("name", ["maf", "zuko_nsf"])
def test_sbis_own_estimators_go_out_again(name, z_score):
    """In, out and in once more: standardised once, by sbi's own."""
    options = {"z_score_theta": z_score, "z_score_x": z_score, "embedding_net": nn.Linear(3, 4)}
    native, (theta, x) = sbi_estimator(name, 2, (3,), **options), simulations()
    again = to_library("sbi", as_flow(native), z_score_theta="none", z_score_x="none")(theta, x)
    expected = native.log_prob(theta, x)
    assert_close(again.log_prob(theta, x), expected, atol=1e-4, rtol=1e-4)
    assert_close(as_flow(again).log_prob(theta, x), expected[0], atol=1e-4, rtol=1e-4)


def test_an_estimator_on_the_priors_support():
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    native = sbi_estimator("zuko_nsf", 2, (3,), z_score_theta="transform_to_unconstrained", x_dist=prior)
    theta, (_, x) = prior.sample((100,)), simulations()
    flow = as_flow(native)
    assert_close(flow.log_prob(theta, x), native.log_prob(theta, x)[0], atol=1e-4, rtol=1e-4)
    assert flow.sample(100, x[:1]).abs().max() <= 1


def test_what_is_no_flow_of_sbis_is_refused():
    for native in (sbi_estimator("mdn", 2, (3,)), nn.Sequential(sbi_estimator("maf", 2, (3,)))):
        with pytest.raises(TypeError, match="is no flow|is of no known library"):
            as_flow(native)
    theta, x = simulations()
    inference = quietly(NPE, theta, x, density_estimator=to_library("sbi", "masked-affine", **SMALL))
    inference.train(max_num_epochs=1)
    with pytest.raises(TypeError, match=r"is cut to the support of its prior.*as_flow\(posterior.posterior_estimator"):
        as_flow(inference.build_posterior())


def with_a_log_prob_of_its_own(kind):
    """An estimator of that kind for positive data: its flow is of their logarithm."""

    class OfLogarithm(kind):
        def log_prob(self, input, condition):
            return super().log_prob(input.log(), condition) - input.log().sum(-1)

    estimator = (
        made() if kind is type(made()) else sbi_estimator("maf" if kind is sbi.NFlowsFlow else "zuko_nsf", 2, (3,))
    )
    estimator.__class__ = OfLogarithm
    return estimator


class Direct(sbi.ConditionalDensityEstimator):
    """As sbi's guide to custom estimators makes one, of a flow without an embedding network."""

    def log_prob(self, input, condition):
        return self.net.log_prob(2 * input, condition) + math.log(4)

    def loss(self, input, condition):
        return -self.log_prob(input, condition)

    def sample(self, sample_shape, condition):
        raise NotImplementedError  # sbi's class wants the method; as_flow refuses before anything is drawn


def mixed_estimator():
    theta, x = simulations()
    return likelihood_nn("mnle", hidden_features=8, num_transforms=2)(
        theta, torch.cat((x[:, :2], (x[:, 2:] > 0).float()), 1)
    )


OF_ANOTHER_DENSITY = {
    "sbi's nflows": (lambda: with_a_log_prob_of_its_own(sbi.NFlowsFlow), "net"),
    "sbi's zuko": (lambda: with_a_log_prob_of_its_own(sbi.ZukoFlow), "net"),
    "ours": (lambda: with_a_log_prob_of_its_own(type(made())), "net"),
    "direct": (lambda: Direct(conditional(), torch.Size([2]), torch.Size([3])), "net"),
    "mixed": (mixed_estimator, "continuous_net"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # sbi's, about categories
@pytest.mark.parametrize("name", OF_ANOTHER_DENSITY)
def test_an_estimator_of_another_density_than_its_flow_is_refused(name):
    make, part = OF_ANOTHER_DENSITY[name]
    estimator = make()
    with pytest.raises(TypeError, match=rf"has a log_prob of its own, so .*: .* give as_flow\(estimator.{part}\)$"):
        as_flow(estimator)
    assert isinstance(as_flow(getattr(estimator, part)), NflowsFlow)


def test_a_subclass_that_leaves_log_prob_as_it_is_comes_in():
    estimator, (theta, x) = sbi_estimator("zuko_nsf", 2, (3,)), simulations()
    estimator.__class__ = type("WithALossOfItsOwn", (type(estimator),), {"loss": lambda self, input, condition: None})
    assert_close(as_flow(estimator).log_prob(theta, x), estimator.log_prob(theta, x)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "source", ["maf", "zuko_maf", to_library("sbi", "masked-affine", **SMALL)], ids=["maf", "zuko_maf", "ours"]
)
def test_a_trained_posterior_is_a_prior_in_pyro(source):
    theta, x = simulations(300)
    estimator = quietly(NPE, theta, x, density_estimator=source).train(max_num_epochs=1)
    flow, x_o = as_flow(estimator), x[0]
    guide_flow = build_flow("masked-affine", 2, **SMALL)

    def model(y):
        z = pyro.sample("z", FlowDistribution(flow, x_o, validate_args=False))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.module("guide", guide_flow)
        pyro.sample("z", FlowDistribution(guide_flow))

    pyro.clear_param_store()
    step = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step
    assert all(torch.isfinite(torch.tensor(step(torch.zeros(2)))) for _ in range(3))
    prior = FlowDistribution(flow, x_o)
    assert_close(prior.log_prob(theta[:5]), estimator.log_prob(theta[:5, None], x_o[None])[:, 0])


class MeanOverTrials(nn.Linear):
    """A network that takes any leading dimensions, and so would not notice which of them are the trials."""

    def forward(self, x):
        return super().forward(x).mean(-2)


@pytest.mark.parametrize("embedding_net", [MeanOverTrials(2, 4), nn.Sequential(nn.Flatten(), nn.Linear(10, 4))])
@pytest.mark.parametrize("make", ["maf", "zuko_nsf", "ours"])
def test_a_posterior_of_several_trials_is_a_distribution(make, embedding_net):
    """Its context is the condition, of shape (5, 2) here: the batch shape is what stands before that."""
    theta, x = torch.randn(20, 2), torch.randn(20, 5, 2)
    if make == "ours":
        estimator = to_library("sbi", "masked-affine", embedding_net=embedding_net, **SMALL)(theta, x)
    else:
        estimator = sbi_estimator(make, 2, (5, 2), embedding_net=embedding_net)
    flow = as_flow(estimator)
    one, many = FlowDistribution(flow, x[0]), FlowDistribution(flow, x)
    assert one.batch_shape == () and many.batch_shape == (20,)
    expected = estimator.log_prob(theta, x)[0]
    assert_close(many.log_prob(theta), expected)
    assert_close(one.log_prob(theta[0]), expected[0])
    assert_close(FlowDistribution(flow, x.reshape(4, 5, 5, 2)).log_prob(theta.reshape(4, 5, 2)), expected.view(4, 5))
    assert_close(one.expand((3, 20)).log_prob(theta), one.log_prob(theta).expand(3, 20))
    assert_close(many.expand((3, 20)).log_prob(theta), expected.expand(3, 20))
    samples = many.sample((3,))
    assert samples.shape == (3, 20, 2) and one.sample().shape == (2,)
    assert_close(many.log_prob(samples), estimator.log_prob(samples, x), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"give a context of shape \(\*batch, 5, 2\)"):
        FlowDistribution(flow)
    with pytest.raises(ValueError, match=r"give a context of shape \(batch, 5, 2\)"):
        flow.log_prob(theta)
    for wrong in (x[0, 0], x[:, :4], x.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"context must have the shape \(\*batch, 5, 2\), not"):
            FlowDistribution(flow, wrong)
        with pytest.raises(ValueError, match=r"the context of this flow takes inputs of shape \(batch, 5, 2\), not"):
            flow.sample(3, wrong)


def make_sbi(name, features, width):
    """The maker of a checkpoint: an estimator of that kind and shape, whatever its weights and its standardisation."""
    return sbi_estimator(name, features, (width,))


def make_ours(name, features, width):
    return to_library("sbi", name, **SMALL)(torch.randn(9, features), torch.randn(9, width))


@pytest.mark.parametrize(
    ("maker", "name"), [("make_sbi", "maf"), ("make_sbi", "zuko_nsf"), ("make_ours", "masked-affine")]
)
def test_a_trained_estimator_is_saved_and_loaded(maker, name, tmp_path):
    theta, x = simulations(300)
    make = globals()[maker]
    estimator = quietly(NPE, theta, x, density_estimator=lambda theta, x: make(name, 2, 3)).train(max_num_epochs=1)
    where = f"{__name__}:{maker}"
    save_flow(as_flow(estimator), tmp_path, where, {"name": name, "features": 2, "width": 3})
    torch.manual_seed(7)
    loaded = load_flow(tmp_path, where)
    assert_close(loaded.log_prob(theta, x), estimator.log_prob(theta, x)[0], rtol=0, atol=0)
