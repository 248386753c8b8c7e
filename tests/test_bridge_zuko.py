"""What is zuko's own: the state of the process, what is refused, how often networks run, what is read off a flow."""

import copy
import subprocess
import sys
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from nflows.transforms import CompositeTransform, InverseNotAvailable
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch import nn
from torch.testing import assert_close

from adapters import FlowDistribution, MaskedCouplingLayer, as_flow, as_transform, build_flow, half_mask, to_library
from adapters.bridges.zuko import ZukoTransform, native_log_prob
from adapters.imports import import_zuko
from adapters.networks import MLP
from adapters.parts import parts_of, transform_of
from tests.counting import counted
from tests.laws import batch, context_for, randomise

zuko = import_zuko()
flows, transforms, lazy = zuko.flows, zuko.transforms, zuko.lazy

SMALL = {"hidden_features": (8,)}


def ours(context_features=None):
    def layer(mask):
        return MaskedCouplingLayer(
            MLP(4, 4, (8,), context_features),
            MLP(4, 4, (8,), context_features),
            half_mask(4) if mask else 1 - half_mask(4),
        )

    transform = CompositeTransform([layer(0), layer(1)])
    randomise(transform)
    return transform


def constant(transform, *arguments, **options):
    return lazy.UnconditionalTransform(transform, *arguments, **options)


# -- the process -------------------------------------------------------------------------------------------------------

USE = """
import torch
from torch.distributions import Distribution, Normal
before = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
import adapters
flow = adapters.build_flow("zuko-nsf", 2)
flow.sample_and_log_prob(3)
exported = adapters.to_library("zuko", flow.transform)
from adapters.bridges.zuko import ZukoTransform, native_log_prob
from adapters.imports import import_zuko
native_log_prob(exported, torch.randn(3, 2))
zuko = import_zuko()
half_normal = zuko.distributions.Truncated(Normal(0.0, 1.0, validate_args=False), 0.0)
for native in (zuko.flows.BPF(2)(), zuko.flows.GMM(2)(), half_normal):
    native.log_prob(native.sample((5,)))
    native.expand((5,)).sample()
adapters.as_flow(zuko.flows.NSF(2, 3)).sample_and_log_prob(2, torch.randn(4, 3))
zuko.distributions.GeneralizedNormal(torch.tensor(2.0))
after = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
assert after == before, (before, after)
"""
VALIDATES = """
try:
    Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise SystemExit("a negative scale was accepted")
"""


def run(code):
    finished = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize(("first", "last"), [("", ""), ("import pyro", "import zuko"), ("", "import pyro")])
def test_arguments_are_validated_as_before(first, last):
    run(first + USE + last + VALIDATES)


def test_what_somebody_elses_import_left_is_kept():
    run("import zuko" + USE + "Normal(0.0, -1.0)")


# -- flows as they are in zuko -----------------------------------------------------------------------------------------

NATIVE = {
    "NICE": lambda c: flows.NICE(3, c, randmask=False, **SMALL),
    "RealNVP": lambda c: flows.RealNVP(3, c, **SMALL),
    "MAF": lambda c: flows.MAF(3, c, randperm=True, **SMALL),
    "NSF": lambda c: flows.NSF(3, c, passes=2, **SMALL),
    "SOSPF": lambda c: flows.SOSPF(3, c, **SMALL),
    "BPF": lambda c: flows.BPF(3, c, **SMALL),
    "NAF": lambda c: flows.NAF(3, c, network=SMALL, **SMALL),
    "UNAF": lambda c: flows.UNAF(3, c, network=SMALL, **SMALL),
    "GF": lambda c: flows.GF(3, c, **(SMALL if c else {})),
    "CNF": lambda c: flows.CNF(3, c, **SMALL),
    "GMM": lambda c: flows.GMM(3, c, **(SMALL if c else {})),
}


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", NATIVE)
def test_every_flow_of_zuko_scores_as_in_zuko(name, context_features):
    torch.manual_seed(0)
    native = NATIVE[name](context_features or 0).double()
    flow = as_flow(native)
    assert flow.event_shape == (3,) and flow.context_features == context_features
    assert {id(p) for p in flow.parameters()} == {id(p) for p in native.parameters()}
    x, context = batch(5, 3), context_for(context_features, 5)
    assert_close(flow.log_prob(x, context), native(context).log_prob(x), rtol=1e-12, atol=1e-12)
    samples = flow.sample(2, context)
    assert samples.shape == ((2, 3) if context is None else (5, 2, 3)) and samples.dtype == torch.float64
    assert_close(copy.deepcopy(flow).log_prob(x, context), flow.log_prob(x, context), rtol=0, atol=0)


SOLVING = ("SOSPF", "BPF", "NAF", "UNAF", "GF", "CNF")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace` is deprecated")
@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("name", NATIVE)
def test_torch_jit_traces_a_flow_or_is_told_that_it_cannot(name, context_features):
    """In a model, as a prior or for data, and in a guide: with the value of the untraced one."""
    torch.manual_seed(0)
    flow = as_flow(NATIVE[name](context_features or 0))
    context = None if context_features is None else torch.randn(5, 2)
    data = torch.randn(5, 3)

    def prior(x=None):
        pyro.module("flow", flow)
        with pyro.plate("data", 5):
            return pyro.sample("x", FlowDistribution(flow, context), obs=x)

    def normal(x=None):
        with pyro.plate("data", 5):
            return pyro.sample("x", dist.Normal(torch.zeros(5, 3), 1.0).to_event(1), obs=x)

    for model, guide, arguments in ((prior, lambda x: None, (data,)), (prior, normal, ()), (normal, prior, ())):
        traced = JitTrace_ELBO(ignore_jit_warnings=True)
        pyro.clear_param_store()
        if name in SOLVING:
            message = "torch.jit cannot trace zuko's .*: take Trace_ELBO instead"
            # without validation, since a flow at its start may map no datum to the noise, and so give NaN
            with pytest.raises(NotImplementedError, match=message), pyro.validation_enabled(False):
                traced.loss_and_grads(model, guide, *arguments)
            continue
        traced.loss_and_grads(model, guide, *arguments)  # tracing itself draws samples
        values = []
        for elbo in (traced, Trace_ELBO()):
            torch.manual_seed(1)
            values.append(elbo.loss_and_grads(model, guide, *arguments))
        assert_close(*values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", ["NAF", "UNAF", "CNF"])
def test_gradients_reach_the_weights_in_eval_mode_too(name, mode):
    flow = as_flow(NATIVE[name](0).double()).train(mode)
    transform = transform_of(flow)
    noise = transform(batch(3, 3))[0].detach()  # a NAF that is not trained reaches little else
    for x in (transform.inverse(noise)[0], -flow.log_prob(batch(3, 3))):
        flow.zero_grad()
        x.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in transform.parameters())


def test_a_trainable_base_is_trained():
    base = lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, loc=torch.zeros(3), scale=torch.ones(3))
    flow = as_flow(lazy.Flow(flows.MAF(3, **SMALL).transform, base))
    before = flow.log_prob(torch.ones(4, 3))
    before.sum().backward()
    with torch.no_grad():
        base.loc += 0.01 * base.loc.grad
    assert torch.all(flow.log_prob(torch.ones(4, 3)) > before)


def test_a_flow_over_scalars():
    gamma = lazy.UnconditionalDistribution(torch.distributions.Gamma, torch.tensor(2.0), torch.tensor(1.0), buffer=True)
    native = lazy.Flow(constant(transforms.ExpTransform), gamma)
    flow = as_flow(native)
    assert flow.event_shape == ()
    assert_close(flow.log_prob(torch.ones(4)), native().log_prob(torch.ones(4)))
    assert flow.sample(5).shape == (5,)


def test_a_distribution_that_needs_no_call():
    native = flows.NSF(3, **SMALL).double()
    flow = as_flow(native())
    assert_close(flow.log_prob(batch(5, 3)), native().log_prob(batch(5, 3)))
    assert {id(p) for p in flow.parameters()} == {id(p) for p in native.parameters()}
    mixture = zuko.distributions.Mixture(
        zuko.distributions.DiagNormal(torch.zeros(2, 3), torch.ones(2, 3)), torch.zeros(2)
    )
    assert as_flow(mixture).sample(4).shape == (4, 3)


def test_a_chain_becomes_one_of_nflows_whose_parts_are_single_transforms():
    native = lazy.LazyComposedTransform(
        flows.GeneralCouplingTransform(4, 2, **SMALL),
        constant(transforms.SoftclipTransform, bound=50.0),
        lazy.LazyComposedTransform(flows.MaskedAutoregressiveTransform(4, 2, **SMALL)).inv,
        to_library("zuko", ours(context_features=2)).inv,
    ).double()
    x, context = batch(5, 4), batch(5, 2, seed=2)
    for lazy_transform in (native, native.inv):
        chain = as_transform(lazy_transform)
        assert isinstance(chain, CompositeTransform) and [type(part) for part in parts_of(chain)] == 4 * [ZukoTransform]
        y, log_det = chain(x, context)
        assert_close((y, log_det), lazy_transform(context).call_and_ladj(x))
        assert_close(chain.inverse(y, context), (x, -log_det))
    called = as_transform(flows.MAF(4, **SMALL).double().transform())
    assert isinstance(called, CompositeTransform) and {type(part) for part in parts_of(called)} == {ZukoTransform}
    assert_close(called.inverse(called(x)[0])[0], x)


def test_data_beyond_the_bounds_of_an_inverted_transform_have_no_density():
    """A part that runs backwards still scores data there, where nflows' ``InverseTransform`` of it would sample."""
    clip = constant(transforms.SoftclipTransform, bound=2.0)
    for inverted in (clip.inv, lazy.LazyComposedTransform(clip, constant(transforms.IdentityTransform)).inv):
        transform = as_transform(inverted)
        noise, log_det = transform(torch.tensor([[1.0], [3.0]]))
        assert noise.isfinite().all() and log_det[0].isfinite() and log_det[1] == -torch.inf
        assert_close(transform.inverse(noise[:1])[0], torch.tensor([[1.0]]))


def test_ones_of_a_mask_pass_unchanged():
    mask = torch.tensor([1, 0, 1, 0])
    x = batch(5, 4)
    z, _ = as_transform(flows.GeneralCouplingTransform(4, mask=mask, **SMALL)).double()(x)
    assert torch.equal(z == x, mask.bool().expand(5, 4))
    flow = build_flow("zuko-realnvp", 4, layers=1, masks=[mask.float()]).double()
    assert torch.equal(flow.encode(x) == x, mask.bool().expand(5, 4))


def test_nsf_has_the_bins_and_bound_it_is_asked_for():
    flow = build_flow("zuko-nsf", 2, layers=1, bins=5, tail_bound=2.5)
    chain: Any = flow.transform
    layer: Any = parts_of(chain)[0]
    spline = layer.lazy().meta(torch.zeros(1, 1)).base
    assert spline.bins == 5
    assert_close(spline.horizontal.max(), torch.tensor(2.5))
    outside = torch.tensor([[2.6, -2.6]])
    assert_close(flow.encode(outside), outside)


# -- how often networks run --------------------------------------------------------------------------------------------


def runs_of(networks, function):
    """How often each network runs in a call of the function: a set of one number if all run equally often."""
    with counted() as calls:
        function()
    return {calls[network] for network in networks}


@pytest.mark.parametrize("name", ["RealNVP", "MAF", "NSF", "BPF", "NAF", "SOSPF"])
def test_one_evaluation_of_each_network_per_log_prob(name):
    native = NATIVE[name](0)
    networks = [m for m in native.modules() if isinstance(m, zuko.nn.MaskedMLP | zuko.nn.MonotonicMLP | zuko.nn.MLP)]
    assert len(networks) >= 3
    flow = as_flow(native)
    assert runs_of(networks, lambda: flow.log_prob(torch.randn(5, 3))) == {1}


def test_one_evaluation_per_sample_of_a_coupling_and_one_per_pass_of_an_autoregressive_transform():
    for name, expected in (("RealNVP", 1), ("NSF", 2), ("MAF", 3)):
        native = NATIVE[name](0)
        networks = [layer.hyper for layer in native.transform.transforms]
        assert runs_of(networks, partial(as_flow(native).sample_and_log_prob, 4)) == {expected}, name


def test_an_inverted_transform_scores_as_cheaply_as_the_original_samples():
    couplings = flows.RealNVP(3, **SMALL).transform
    inverted = as_transform(couplings.inv)
    networks = [layer.hyper for layer in couplings.transforms]
    x = torch.randn(5, 3)
    assert runs_of(networks, lambda: inverted(x)) == {1}
    assert runs_of(networks, lambda: inverted.inverse(x)) == {1}
    assert_close(inverted(x), as_transform(couplings).inverse(x))


def test_one_evaluation_of_an_exported_transform_per_log_prob():
    transform = ours()
    networks = [m for m in transform.modules() if isinstance(m, MLP)]
    exported = to_library("zuko", transform)
    assert runs_of(networks, lambda: native_log_prob(exported, batch(5, 4))) == {1}


# -- out ---------------------------------------------------------------------------------------------------------------


def in_zuko(exported, features=4):
    normal = zuko.distributions.DiagNormal
    base = lazy.UnconditionalDistribution(normal, torch.zeros(features), torch.ones(features), buffer=True)
    return lazy.Flow([exported], base).double()


def test_an_exported_transform_comes_back_as_it_went():
    transform = ours()
    exported = to_library("zuko", transform)
    assert isinstance(exported, lazy.LazyTransform) and as_transform(exported) is transform
    wrapped = as_transform(lazy.LazyComposedTransform(exported))
    assert_close(wrapped(batch(5, 4)), transform(batch(5, 4)))
    assert_close(wrapped.inverse(batch(5, 4)), transform.inverse(batch(5, 4)))
    assert_close(as_transform(exported.inv)(batch(5, 4)), transform.inverse(batch(5, 4)))


def test_an_exported_transform_takes_any_leading_dimensions_and_contexts():
    transform = ours(context_features=2)
    flow = in_zuko(to_library("zuko", transform, conditional=True))
    x, context = batch(6, 5, 4), batch(5, 2, seed=2)
    log_prob = flow(context).log_prob(x)
    assert log_prob.shape == (6, 5)
    assert_close(log_prob[3], flow(context).log_prob(x[3]))
    assert_close(log_prob[:, 2], flow(context[2]).log_prob(x[:, 2]))
    samples, own = flow(context).rsample_and_log_prob((7,))
    assert samples.shape == (7, 5, 4)
    assert_close(own, flow(context).log_prob(samples))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) does not broadcast with a batch of \(5,\)"):
        flow(context_for(2, 3)).log_prob(x[0])


def test_an_exported_transform_is_trained_in_zuko():
    transform = ours()
    flow = in_zuko(to_library("zuko", transform))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = -flow().log_prob(batch(64, 4) * 3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {id(p) for p in transform.parameters()} == {id(p) for p in flow.parameters()}
    copied = copy.deepcopy(flow)
    assert_close(copied().log_prob(batch(5, 4)), flow().log_prob(batch(5, 4)))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, r"is conditional: give a context of shape \(batch, 2\)"),
        (torch.zeros(5, 3), r"takes inputs of shape \(batch, 2\), not \(5, 3\)"),
        (torch.zeros(2), r"takes inputs of shape \(batch, 2\), not \(2,\)"),
    ],
)
def test_wrong_contexts(context, message):
    flow = as_flow(flows.MAF(3, 2, **SMALL))
    for call in (flow.log_prob, transform_of(flow), transform_of(flow).inverse):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(5, 3), context)
    with pytest.raises(ValueError, match=message):
        flow.sample(3, context)


def test_wrong_batches_superfluous_contexts_and_wrong_events():
    flow = as_flow(flows.NSF(3, 2, **SMALL))
    with pytest.raises(ValueError, match="4 rows for 5 inputs"):
        transform_of(flow)(torch.zeros(5, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"\(batch, 3\), not \(5, 4\)"):
        flow.log_prob(torch.zeros(5, 4), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"GeneralCouplingTransform takes inputs of shape \(batch, 3\), not \(5, 4\)"):
        as_transform(flows.GeneralCouplingTransform(3, **SMALL))(torch.zeros(5, 4))
    for unconditional in (flows.NSF(3, **SMALL), flows.GF(3), flows.GMM(3), flows.CNF(3, **SMALL)):
        with pytest.raises(ValueError, match=r"unconditional, but a context of shape \(5, 2\) was given"):
            as_flow(unconditional).log_prob(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="do not agree about its width: 4, 2"):
        as_flow(lazy.Flow(flows.NSF(3, 2, **SMALL).transform, flows.GMM(3, 4)))


def test_random_log_determinants_are_refused():
    native = flows.CNF(3, exact=False, **SMALL)
    for estimated in (native.transform, native.transform(), native.transform.inv):
        with pytest.raises(ValueError, match="random estimate; build it with exact=True"):
            as_transform(estimated)
    with pytest.raises(ValueError, match="random estimate"):
        as_flow(native)


def test_transforms_that_are_no_bijections_are_refused():
    with pytest.raises(InverseNotAvailable, match="AbsTransform is no bijection"):
        as_transform(lazy.LazyComposedTransform(constant(transforms.AbsTransform)))


def test_a_flow_that_a_batch_of_contexts_is_bound_to_is_refused():
    with pytest.raises(ValueError, match=r"batch shape of \(5,\).*the lazy flow"):
        as_flow(flows.MAF(3, 2, **SMALL)(torch.zeros(5, 2)))


def test_transforms_are_no_flows_and_other_modules_neither():
    with pytest.raises(TypeError, match="is no flow"):
        as_flow(flows.MAF(3).transform)
    for no_transform in (flows.MAF(3), zuko.nn.MLP(2, 2)):
        with pytest.raises(TypeError, match="is no transform"):
            as_transform(no_transform)


# -- layers of one's own -----------------------------------------------------------------------------------------------


class Shift(lazy.LazyTransform):
    """A user's own lazy transform; nothing says that its context is 3 wide."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 3)

    def forward(self, c=None):
        return transforms.DependentTransform(transforms.AdditiveTransform(self.network(c)), 1)


def test_a_transform_of_ones_own_is_handed_its_context_unchecked():
    native = in_zuko(Shift(), features=3)
    flow = as_flow(native)
    x, context = batch(5, 3), context_for(3, 5)
    assert_close(flow.log_prob(x, context), native(context).log_prob(x))
    assert flow.sample(2, context).shape == (5, 2, 3)
    with pytest.raises(ValueError, match="4 rows for 5 inputs"):
        as_transform(Shift())(torch.zeros(5, 3), torch.zeros(4, 3))
    told = Shift()
    told.context_features = 3
    assert as_flow(in_zuko(told, features=3)).context_features == 3


def test_a_base_of_ones_own_says_how_wide_its_context_is():
    class Base(lazy.LazyDistribution):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(2, 3)

        def forward(self, c=None):
            return zuko.distributions.DiagNormal(self.network(c), torch.ones(3))

    base = Base()
    native = lazy.Flow(flows.MAF(3, 2, **SMALL).transform, base)
    assert as_flow(native).sample(4, torch.zeros(5, 2)).shape == (5, 4, 3)
    with pytest.raises(ValueError, match="give it an attribute context_features"):
        as_flow(base)
    base.context_features = 2
    assert as_flow(base).event_shape == (3,)


def test_another_network_in_the_place_of_zukos():
    native = flows.MAF(3, 2, **SMALL)
    native.transform.transforms[0].hyper = nn.Sequential(native.transform.transforms[0].hyper)
    assert as_flow(native).context_features == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["zuko-realnvp", "zuko-nsf", "zuko-maf", "zuko-bpf", "zuko-naf"])
def test_dtype_is_kept_and_one_feature_is_enough_for_autoregressive_flows(name, dtype):
    torch.manual_seed(0)
    for features in (1, 3):
        if features == 1 and name in ("zuko-realnvp", "zuko-nsf"):
            with pytest.raises(ValueError, match="at least 2 features"):
                build_flow(name, 1)
            continue
        flow = build_flow(name, features, 2, layers=2, hidden_features=(8,)).to(dtype)
        samples, log_prob = flow.sample_and_log_prob(4, torch.zeros(3, 2, dtype=dtype))
        assert samples.shape == (3, 4, features) and samples.dtype == log_prob.dtype == dtype
