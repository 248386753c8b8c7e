"""FlowDistribution: torch's contract for distributions, its memo, and everything in Pyro that takes a distribution."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import nflows.distributions
import nflows.flows
import nflows.transforms
import pyro
import pyro.distributions as dist
import pytest
import torch
from nflows.distributions.mixture import MADEMoG
from nflows.distributions.uniform import BoxUniform
from nflows.nn.nets import ResidualNet
from nflows.transforms.base import InputOutsideDomain
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow
from pyro.infer.inspect import get_model_relations
from torch import nn
from torch.distributions import TransformedDistribution, constraints
from torch.testing import assert_close

from adapters import FlowDistribution, as_flow, as_transform, build_flow, flow_names, to_library
from adapters.flow import Flow
from adapters.imports import import_zuko
from adapters.networks import MLP
from adapters.preprocess import Logit
from tests.counting import counted
from tests.laws import batch, randomise

NAMES = ["masked-affine", "nflows-rqs", "normflows-affine", "zuko-nsf", "pyro-spline", "freia-affine"]


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def a_flow(name="masked-affine", features=2, context_features=None, **options):
    torch.manual_seed(0)
    options = {"layers": 2, "hidden_features": (8,)} | options
    return randomise(build_flow(name, features, context_features, **options)).eval()


def standard(features):
    """A flow that is N(0, I) exactly: its layers start at the identity."""
    return build_flow("masked-affine", features, layers=2, hidden_features=(8,)).double().eval()


class Constant(nn.Module):
    """A network without inputs."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self):
        return self.value


class Shift(nflows.transforms.Transform):
    """x ↦ x − a network's output, which each pass computes anew."""

    def __init__(self):
        super().__init__()
        self.network = Constant()

    def forward(self, inputs, context=None):
        return inputs - self.network(), inputs.new_zeros(len(inputs))

    def inverse(self, inputs, context=None):
        return inputs + self.network(), inputs.new_zeros(len(inputs))


def shifted_normal():
    return Flow(Shift(), nflows.distributions.StandardNormal([2]), (2,))


# The contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_features", [None, 3])
def test_densities_are_the_flows_own_with_any_leading_dimensions(name, context_features):
    flow = a_flow(name, 2, context_features)
    context = None if context_features is None else batch(4, 3)
    p = FlowDistribution(flow, context)
    assert p.batch_shape == (() if context is None else (4,)) and p.event_shape == (2,) and p.has_rsample
    for sample_shape in [(), (5,), (2, 3), (0,)]:
        x = p.rsample(sample_shape)
        assert x.shape == (*sample_shape, *p.batch_shape, 2) and x.dtype == torch.float64
        drawn, log_prob = p.log_prob(x), p.log_prob(x)
        assert log_prob.shape == x.shape[:-1]
        assert_close(drawn, log_prob, atol=1e-4, rtol=1e-4)
        rows = x.reshape(-1, 2)
        given = None if context is None else context.expand(*x.shape[:-1], 3).reshape(-1, 3)
        if len(rows):
            assert_close(log_prob.flatten(), flow.log_prob(rows, given))


def test_batched_contexts_stay_apart_and_broadcast():
    flow, context = a_flow(context_features=3), batch(4, 1, 3)
    p, x = FlowDistribution(flow, context), batch(5, 2)
    assert p.batch_shape == (4, 1) and p.log_prob(x).shape == (4, 5)
    one_by_one = [flow.log_prob(x, context[i].expand(5, 3)) for i in range(4)]
    assert_close(p.log_prob(x), torch.stack(one_by_one))
    samples = FlowDistribution(flow, 50 * torch.eye(3, dtype=torch.float64)).sample((4000,))
    each = [flow.sample(4000, 50 * torch.eye(3, dtype=torch.float64)[i : i + 1])[0].mean(0) for i in range(3)]
    assert_close(samples.mean(0), torch.stack(each), atol=0.3, rtol=0.1)


def test_values_are_scored_once_where_they_broadcast():
    p = FlowDistribution(a_flow()).expand((3, 4))
    assert_close(p.log_prob(batch(2)), FlowDistribution(a_flow()).log_prob(batch(2)).expand(3, 4))


def test_expand():
    flow, context = a_flow(context_features=3), batch(4, 3)
    p = FlowDistribution(flow, context, validate_args=False).expand((5, 4))
    assert p.batch_shape == (5, 4) and p.sample((2,)).shape == (2, 5, 4, 2) and p._validate_args is False
    x = batch(5, 4, 2)
    assert_close(p.log_prob(x), FlowDistribution(flow, context).log_prob(x))
    assert FlowDistribution(a_flow()).expand((5, 4)).rsample().shape == (5, 4, 2)
    with pytest.raises(ValueError, match=r"a batch of \(4,\) does not expand to \(5,\)"):
        FlowDistribution(flow, context).expand((5,))
    masked = FlowDistribution(flow, context).mask(torch.tensor([True, False, True, False]))
    assert (masked.log_prob(x) == 0).sum() == 10
    assert FlowDistribution(flow, context).to_event(1).log_prob(x).shape == (5,)


def test_samples_have_a_graph_only_when_asked_for():
    flow, context = a_flow(context_features=3), batch(4, 3).requires_grad_()
    p = FlowDistribution(flow, context)
    assert not p.sample((5,)).requires_grad
    p.rsample((5,)).square().sum().backward()
    assert context.grad.abs().sum() > 0 and all(weight.grad is not None for weight in flow.parameters())
    x = FlowDistribution(flow, context.detach()).sample()
    flow.zero_grad()
    FlowDistribution(flow, context.detach()).log_prob(x).sum().backward()
    assert all(weight.grad is not None for weight in flow.parameters())


def test_a_sample_that_is_scored_has_the_total_gradient():
    """d/dθ E[log q(z)] through z and θ, the same with the memo and without."""
    flow, gradients = a_flow(), []
    for forget in (False, True):
        torch.manual_seed(1)
        p = FlowDistribution(flow)
        z = p.rsample((6,))
        p = FlowDistribution(flow) if forget else p
        gradients.append(torch.autograd.grad(p.log_prob(z).sum(), list(flow.parameters()), allow_unused=True))
    for kept, anew in zip(*gradients, strict=True):
        assert (kept is None) == (anew is None) or float((kept if anew is None else anew).abs().sum()) < 1e-9
        if kept is not None and anew is not None:
            assert_close(kept, anew)


def test_works_in_plain_torch():
    p = FlowDistribution(a_flow(features=3))
    assert isinstance(p, torch.distributions.Distribution)
    shifted = TransformedDistribution(p, [torch.distributions.AffineTransform(1.0, 2.0, event_dim=1)])
    x = shifted.rsample((4,))
    assert_close(shifted.log_prob(x), p.log_prob((x - 1) / 2) - 3 * math.log(2))
    both = torch.distributions.Independent(p.expand((5,)), 1)
    assert both.event_shape == (5, 3) and both.log_prob(both.sample((2,))).shape == (2,)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4)), FlowDistribution(a_flow(context_features=3), batch(4, 3))
    )
    assert mixture.log_prob(mixture.sample((6,))).shape == (6,)


def test_copies_and_pickles_hold_their_own_flow():
    p = FlowDistribution(a_flow(context_features=3), batch(4, 3))
    x = p.rsample()
    for q in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert q.flow is not p.flow
        assert_close(q.log_prob(x), FlowDistribution(p.flow, p.context).log_prob(x))
    assert "batch_shape=(4,), event_shape=(2,)" in repr(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_flows_also_with_nflows_own_normal(dtype):
    flow = nflows.flows.Flow(a_flow().transform, nflows.distributions.StandardNormal([2])).to(dtype)
    p = FlowDistribution(flow)
    x = p.rsample((3,))
    assert x.dtype == p.log_prob(x).dtype == dtype
    assert FlowDistribution(build_flow("masked-affine", 2).to("meta")).sample((3,)).device.type == "meta"


def test_images_and_event_shapes_that_only_the_caller_knows():
    shift = nflows.transforms.PointwiseAffineTransform(1.0, 2.0)
    flow = nflows.flows.Flow(shift, nflows.distributions.StandardNormal([1, 4, 4]))
    assert FlowDistribution(flow).sample((3,)).shape == (3, 1, 4, 4)
    squeezed = nflows.flows.Flow(nflows.transforms.SqueezeTransform(), nflows.distributions.StandardNormal([4, 2, 2]))
    p = FlowDistribution(squeezed, event_shape=(1, 4, 4))
    x = p.sample((3,))
    assert x.shape == (3, 1, 4, 4) and p.log_prob(x.clone()).shape == (3,)
    with pytest.raises(ValueError, match=r"samples have the shape \(1, 4, 4\), not \(4, 2, 2\): say so by event_shape"):
        FlowDistribution(squeezed).sample()
    with pytest.raises(ValueError, match="neither the flow nor its base, Silent, says the shape"):
        FlowDistribution(nflows.flows.Flow(shift, type("Silent", (nflows.distributions.Distribution,), {})()))


def test_flows_of_the_libraries_are_taken_as_they_are():
    zuko = import_zuko()
    native = zuko.flows.NSF(2, transforms=1, hidden_features=(8,))
    p = FlowDistribution(native)
    x = p.sample((3,))
    assert_close(p.log_prob(x.clone()), native().log_prob(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError, match="is of no known library|is no flow"):
        FlowDistribution(nn.Linear(2, 2))


def test_a_base_without_differentiable_samples_says_so():
    base = torch.distributions.Independent(torch.distributions.VonMises(torch.zeros(2), torch.ones(2)), 1)
    flow = as_flow(TransformedDistribution(base, [torch.distributions.AffineTransform(0.0, 2.0)]))
    p = FlowDistribution(flow)
    assert not p.has_rsample and p.sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="no differentiable samples"):
        p.rsample()


def test_a_sample_is_scored_by_its_noise_though_a_transform_overwrites_it():
    class Doubled(nflows.transforms.Transform):
        def forward(self, inputs, context=None):
            return inputs / 2, inputs.new_full((len(inputs),), -2 * math.log(2))

        def inverse(self, inputs, context=None):
            return inputs.mul_(2), inputs.new_full((len(inputs),), 2 * math.log(2))

    p = FlowDistribution(nflows.flows.Flow(Doubled(), nflows.distributions.StandardNormal([2])))
    x = p.rsample((3,))
    assert_close(p.log_prob(x), p.log_prob(x.clone()))


def freia_block(name, **options):
    return getattr(pytest.importorskip("FrEIA.modules"), name)([(4,)], **options)


STATEFUL = {  # blocks of libraries that keep what they compute in themselves, or initialise themselves in a call
    "householder": lambda: freia_block("AllInOneBlock", subnet_constructor=MLP, learned_householder_permutation=4),
    "freia-actnorm": lambda: freia_block("ActNorm"),
    "normflows-actnorm": lambda: pytest.importorskip("normflows").flows.ActNorm(4),
}


# flows made of Pyro's own transforms are held to the same in test_bridge_pyro.py
@pytest.mark.parametrize("name", [*STATEFUL, *flow_names()])
def test_threads_get_their_own_answers(name):
    if name in STATEFUL:
        base = nflows.distributions.StandardNormal([4])
        p = FlowDistribution(randomise(nflows.flows.Flow(as_transform(STATEFUL[name]()), base)).eval())
    else:
        p = FlowDistribution(a_flow(name, 4))
    batches = [batch(8, 4, seed=i) for i in range(12)]
    expected = [p.log_prob(x) for x in batches]

    def draw_and_score(x):
        drawn = p.rsample((2,))
        return drawn, p.log_prob(drawn), p.log_prob(x)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(draw_and_score, batches))
    finally:
        sys.setswitchinterval(interval)
    for (drawn, log_prob, log_prob_of_data), right in zip(results, expected, strict=True):
        assert_close(log_prob_of_data, right)
        assert_close(log_prob, p.log_prob(drawn.detach()), atol=1e-5, rtol=1e-5)


# Bad input


def plain(base, features=2):
    """nflows' own flow with another base."""
    return nflows.flows.Flow(nflows.transforms.ReversePermutation(features), base)


def test_bases_of_nflows_that_cannot_do_all_say_so():
    box = BoxUniform(torch.zeros(2), torch.ones(2))
    for take in (as_flow, FlowDistribution):
        with pytest.raises(TypeError, match="BoxUniform, is a torch distribution, not one of nflows'; use as_flow"):
            take(plain(box))
    reversal = to_library("torch", nflows.transforms.ReversePermutation(2))  # as the message says
    p = FlowDistribution(as_flow(TransformedDistribution(box, [reversal])))
    assert_close(p.log_prob(p.sample((3,))), torch.zeros(3))
    with pytest.raises(NotImplementedError, match="DiagonalNormal, the base of this flow, cannot draw samples"):
        FlowDistribution(plain(nflows.distributions.DiagonalNormal([2]))).sample()
    unconditional, conditional = (plain(MADEMoG(2, 8, width)) for width in (None, 3))
    p = FlowDistribution(unconditional, event_shape=(2,))
    assert p.log_prob(torch.ones(4, 2)).shape == (4,)
    with pytest.raises(NotImplementedError, match="MADEMoG draws samples only with a context"):
        p.sample()
    with pytest.raises(ValueError, match="unconditional, but a context of shape"):
        FlowDistribution(unconditional, torch.ones(4, 3), event_shape=(2,))
    with pytest.raises(ValueError, match=r"conditional: give a context of shape \(\*batch, 3\)"):
        FlowDistribution(conditional, event_shape=(2,))
    assert FlowDistribution(conditional, torch.ones(4, 3), event_shape=(2,)).sample().shape == (4, 2)


def test_what_lies_outside_a_layers_domain_is_refused_in_words():
    spline = nflows.transforms.PiecewiseQuadraticCouplingTransform([1, 0], lambda i, o: ResidualNet(i, o, 8))
    p = FlowDistribution(nflows.flows.Flow(spline, nflows.distributions.StandardNormal([2])))
    for call in (lambda: p.log_prob(torch.full((1, 2), 1.5)), lambda: p.sample((50,))):
        with pytest.raises(InputOutsideDomain, match=r"outside the domain of a layer of this flow, such as \[0, 1\]"):
            call()


def test_contexts_that_do_not_fit_are_refused():
    conditional, plain = a_flow(context_features=3), a_flow()
    with pytest.raises(ValueError, match=r"conditional: give a context of shape \(\*batch, 3\)"):
        FlowDistribution(conditional)
    with pytest.raises(ValueError, match=r"unconditional, but a context of shape \(4, 3\) was given"):
        FlowDistribution(plain, batch(4, 3))
    with pytest.raises(ValueError, match=r"must have the shape \(\*batch, 3\), not \(4, 2\)"):
        FlowDistribution(conditional, batch(4, 2))
    with pytest.raises(ValueError, match="Expected parameter context"):
        FlowDistribution(conditional, torch.full((4, 3), math.nan), validate_args=True)


def test_values_are_checked_as_torch_checks_them():
    p = FlowDistribution(a_flow(), validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([[0.0, math.nan]], dtype=torch.float64))
    off = FlowDistribution(a_flow(), validate_args=False)
    assert off.log_prob(torch.tensor([[0.0, math.nan]], dtype=torch.float64)).isnan().all()
    for q in (p, off):
        with pytest.raises(ValueError, match=r"end in the event shape \(2,\), not \(5, 1\)"):
            q.log_prob(batch(5, 1))
    unit = a_flow(preprocess=Logit(1e-6))
    unit = FlowDistribution(unit, support=constraints.unit_interval, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        unit.log_prob(batch(3, 2) + 5)
    assert unit.support.check(unit.sample((50,))).all()


def test_import_leaves_the_process_as_it_was():
    program = """
import sys
from torch.distributions import Distribution
Distribution.set_default_validate_args({})
import adapters, adapters.vae
assert not {{"zuko", "normflows", "FrEIA"}} & set(sys.modules) and Distribution._validate_args is {}
"""
    subprocess.run([sys.executable, "-c", program.format(False, False)], check=True)  # Pyro switches it on


# One pass for a sample and its log_prob; that it is never stale is in test_last_result.py


def test_networks_run_once():
    flow = shifted_normal()
    network, p = flow.transform.network, FlowDistribution(flow)
    with counted() as calls:
        p.log_prob(batch(3, 2))
    assert calls[network] == 1
    with counted() as calls:
        x = p.rsample((3,))
        log_prob = p.log_prob(x)
    assert calls[network] == 1, "one pass is enough for both"
    assert_close(log_prob, FlowDistribution(flow).log_prob(x))
    with counted() as calls:
        p.log_prob(x)
    assert calls[network] == 1, "the log_prob of a sample is given out once"


def test_nothing_is_kept_that_has_another_graph_or_mode():
    p = FlowDistribution(shifted_normal())
    x = p.sample((3,))  # without a graph, while the log_prob asked for has one
    assert p.log_prob(x).requires_grad
    x = p.rsample((3,))
    p.flow.transform.network.requires_grad_(False)
    assert_close(torch.autograd.grad(p.log_prob(x).sum(), x)[0], -x)  # as frozen weights have it
    x = p.sample((3,))
    p.flow.eval()
    with counted() as calls:
        p.log_prob(x)
    assert calls[p.flow.transform.network] == 1
    with torch.inference_mode():
        x = p.sample((3,))
        x.mul_(2)
        assert_close(p.log_prob(x), FlowDistribution(p.flow).log_prob(x))


def test_two_samples_are_not_confused():
    flow = a_flow()
    p = FlowDistribution(flow)
    first, second = p.rsample((3,)), p.rsample((3,))
    for x in (first, second):
        assert_close(p.log_prob(x), flow.log_prob(x))


def test_torch_func_goes_through():
    flow = a_flow()
    log_prob = torch.func.vmap(lambda x: FlowDistribution(flow, validate_args=False).log_prob(x))(batch(5, 2))
    assert_close(log_prob, flow.log_prob(batch(5, 2)))


# Pyro


def model(flow, x):
    """A flow as prior: z ~ flow, x ~ N(z, 1)."""
    pyro.module("prior", flow)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", FlowDistribution(flow))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(flow, x):
    """A conditional flow as amortised guide: z ~ flow(· | x)."""
    pyro.module("posterior", flow)
    with pyro.plate("data", len(x)):
        pyro.sample("z", FlowDistribution(flow, x))


def pair():
    prior, posterior, x = a_flow(), a_flow(context_features=2), batch(6, 2)
    return (lambda x: model(prior, x)), (lambda x: guide(posterior, x)), prior, posterior, x


ELBOS = {
    "trace": Trace_ELBO(),
    "particles": Trace_ELBO(num_particles=3),
    "vectorized": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "mean-field": TraceMeanField_ELBO(),
    "mean-field-vectorized": TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "graph": TraceGraph_ELBO(),
    "enum": TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "renyi": RenyiELBO(alpha=0.5, num_particles=3),
    "renyi-vectorized": RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("name", ELBOS)
def test_every_elbo_trains_prior_and_guide(name):
    p, q, prior, posterior, x = pair()
    loss = ELBOS[name].loss_and_grads(p, q, x)
    assert math.isfinite(loss)
    for flow in (prior, posterior):
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in flow.parameters())
        assert any(weight.grad.abs().sum() > 0 for weight in flow.parameters())


@pytest.mark.parametrize("name", ["trace", "vectorized", "mean-field"])
def test_an_elbo_is_the_one_written_by_hand(name):
    p, q, prior, posterior, x = pair()
    particles = ELBOS[name].num_particles
    torch.manual_seed(3)
    loss = ELBOS[name].loss(p, q, x)
    torch.manual_seed(3)
    with torch.no_grad():
        posterior_of_x = FlowDistribution(posterior, x).expand((particles, 6) if particles > 1 else (6,))
        z = posterior_of_x.rsample()
        terms = FlowDistribution(prior).log_prob(z) + dist.Normal(z, 1.0).to_event(1).log_prob(x)
        by_hand = -(terms - posterior_of_x.log_prob(z)).sum() / particles
    assert loss == pytest.approx(by_hand.item(), rel=1e-9)


def test_an_elbo_evaluates_the_guide_once():
    flow = shifted_normal()
    prior = a_flow()

    def q(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", FlowDistribution(flow))

    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        with counted() as calls:
            elbo.differentiable_loss(lambda x: model(prior, x), q, batch(6, 2)).backward()
        assert calls[flow.transform.network] == 1


@pytest.mark.parametrize("context_features", [None, 2])
def test_jit_trace_elbo(context_features):
    """Compiled code reads weights that pass through the parameter store: ``pyro.module`` returns the flow to use."""
    prior, posterior, x = a_flow(), a_flow(context_features=context_features), batch(6, 2)

    def p(x):
        flow = pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", FlowDistribution(flow))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def q(x):
        flow = pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", FlowDistribution(flow, None if context_features is None else x))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.trace")  # newer versions of torch deprecate it
        svi = SVI(p, q, pyro.optim.Adam({"lr": 1e-2}), JitTrace_ELBO(ignore_jit_warnings=True))
        losses = [svi.step(x) for _ in range(40)]
        before = [weight.clone() for weight in (*prior.parameters(), *posterior.parameters())]
        losses += [svi.step(batch(6, 2)) for _ in range(40)]
    assert all(map(math.isfinite, losses)) and sum(losses[-10:]) < sum(losses[:10])
    after = [*prior.parameters(), *posterior.parameters()]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_svi_fits_a_likelihood():
    """A flow as likelihood, and subsampling: the plate's scale makes up for the rows left out."""
    flow, x = standard(2), 3 + batch(40, 2)

    def p(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("x", FlowDistribution(flow), obs=x[rows])

    trace = poutine.trace(p).get_trace(x)
    trace.compute_log_prob()
    rows = trace.nodes["data"]["value"]
    assert_close(trace.nodes["x"]["log_prob_sum"], 4 * flow.log_prob(x[rows]).sum())
    svi = SVI(p, lambda x: None, pyro.optim.Adam({"lr": 3e-2}), Trace_ELBO())
    before = -flow.log_prob(x).mean()
    for _ in range(60):
        svi.step(x)
    assert -flow.log_prob(x).mean() < before - 2


def test_conditional_likelihood_in_nested_plates():
    flow, given, x = a_flow(context_features=3), batch(4, 1, 3), batch(4, 5, 2)

    def p():
        with pyro.plate("columns", 5, dim=-1), pyro.plate("rows", 4, dim=-2):
            return pyro.sample("x", FlowDistribution(flow, given))

    assert p().shape == (4, 5, 2)
    trace = poutine.trace(poutine.condition(p, {"x": x})).get_trace()
    assert_close(trace.log_prob_sum(), FlowDistribution(flow, given).log_prob(x).sum())


def test_enumerated_contexts():
    """A mixture of flows, its components summed out: log Σ_k π_k p(x | c_k)."""
    flow, contexts, x = a_flow(context_features=3), batch(4, 3), batch(5, 2)

    @config_enumerate
    def p():
        with pyro.plate("data", 5):
            k = pyro.sample("k", dist.Categorical(torch.ones(4, dtype=torch.float64)))
            pyro.sample("x", FlowDistribution(flow, contexts[k]), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(p, lambda: None)
    each = FlowDistribution(flow, contexts[:, None]).log_prob(x)
    assert -loss == pytest.approx((each.logsumexp(0) - math.log(4)).sum().item())


def test_predictive():
    prior, posterior = a_flow(), a_flow(context_features=2)

    def p(x=None):
        with pyro.plate("data", 6):
            z = pyro.sample("z", FlowDistribution(prior))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for parallel in (False, True):
        drawn = Predictive(p, num_samples=3, parallel=parallel)()
        assert drawn["z"].shape == drawn["x"].shape == (3, 6, 2)
    drawn = Predictive(p, guide=lambda x=None: guide(posterior, batch(6, 2)), num_samples=3)()
    assert drawn["x"].shape == (3, 6, 2)


def latent_model(flow):
    """z ~ flow, y ~ N(z, 1), for one y."""

    def p(y):
        z = pyro.sample("z", FlowDistribution(flow))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    return p


@pytest.mark.parametrize("kind", ["normal", "flow", "our-flow"])
def test_autoguides(kind):
    """With a flow that is N(0, I) the posterior is N(y / 2, 1/2)."""
    p, y = latent_model(standard(2).float()), torch.tensor([2.0, -1.0])
    auto = {
        "normal": lambda: AutoNormal(p),
        "flow": lambda: AutoNormalizingFlow(p, lambda features: dist.transforms.affine_autoregressive(features, [8])),
        "our-flow": lambda: AutoNormalizingFlow(
            p, lambda features: to_library("pyro", build_flow("masked-affine", features, layers=2).transform)
        ),
    }[kind]()
    svi = SVI(p, auto, pyro.optim.Adam({"lr": 5e-2}), Trace_ELBO(num_particles=8, vectorize_particles=kind == "normal"))
    for _ in range(150 if kind == "normal" else 60):
        svi.step(y)
    drawn = torch.stack([auto(y)["z"] for _ in range(300)])
    assert_close(drawn.mean(0), y / 2, atol=0.3, rtol=0)


def test_nuts():
    p, y = latent_model(standard(2)), torch.tensor([2.0, -1.0], dtype=torch.float64)
    mcmc = MCMC(NUTS(p), num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run(y)
    drawn = mcmc.get_samples()["z"]
    assert drawn.dtype == torch.float64
    assert_close(drawn.mean(0), y / 2, atol=0.25, rtol=0)
    assert_close(drawn.var(0), torch.full((2,), 0.5, dtype=torch.float64), atol=0.25, rtol=0)


def test_condition_scores_the_value_given():
    flow, z = a_flow(), batch(2)
    trace = poutine.trace(poutine.condition(latent_model(flow), {"z": z})).get_trace(batch(2))
    trace.compute_log_prob()
    assert_close(trace.nodes["z"]["log_prob"], FlowDistribution(flow).log_prob(z))
    assert trace.nodes["z"]["value"] is z


def test_render_model():
    p, _, _, _, x = pair()
    relations = get_model_relations(p, model_args=(x,))
    assert relations["sample_dist"] == {"z": "FlowDistribution", "x": "Normal"}
    assert relations["sample_sample"]["x"] == ["z"] and relations["observed"] == ["x"]
    assert "FlowDistribution" in pyro.render_model(p, model_args=(x,), render_distributions=True).source
