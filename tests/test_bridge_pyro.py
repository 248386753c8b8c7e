"""What is Pyro's and torch.distributions' own: caches, network evaluations, types, and what cannot be bridged."""

import copy
import pickle
import subprocess
import sys
import threading

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from nflows.transforms import InverseNotAvailable
from torch import nn
from torch.distributions import Independent, transforms
from torch.testing import assert_close

import adapters.bridges.pyro as bridge
import adapters.catalogue.pyro as catalogue
import tests.examples.pyro as examples
from adapters import as_flow, as_transform, build_flow, to_library
from adapters.bridges.common.context import one_width
from tests.counting import counted
from tests.laws import batch, context_for, randomise


def normal(*shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


@pytest.fixture(params=examples.MODELS)
def model(request):
    """A library flow and its bridged flow, randomised together in float64, an input and a context for them."""
    make, log_prob, event_shape, context_features, samples = examples.MODELS[request.param]
    torch.manual_seed(0)
    native = make()
    flow = randomise(as_flow(native)).eval()
    return native, flow, log_prob, batch(5, *event_shape), context_for(context_features, 5), samples


def test_a_flow_has_the_librarys_own_density(model):
    native, flow, log_prob, x, context, _ = model
    assert_close(flow.log_prob(x, context), log_prob(native, x, context))


def test_a_flow_samples_as_the_library_does(model):
    native, flow, log_prob, _, context, samples = model
    if not samples:
        with pytest.raises(InverseNotAvailable, match="Planar has no inverse, so this flow cannot sample"):
            flow.sample(2)
        return
    drawn, density = flow.sample_and_log_prob(6, context)
    leading = (6,) if context is None else (5, 6)
    assert drawn.shape == (*leading, *flow.event_shape) and drawn.dtype == torch.float64
    repeated = None if context is None else context.repeat_interleave(6, dim=0)
    assert_close(density.flatten(), log_prob(native, drawn.flatten(0, -2), repeated))
    if any(True for _ in flow.parameters()):
        assert flow.sample(2, context).requires_grad


def test_a_step_is_seen_by_the_next_call_with_the_same_tensor(model):
    _, flow, _, x, context, _ = model
    optimiser = torch.optim.SGD(flow.parameters(), lr=1e-5)
    before = flow.log_prob(x, context)
    before.sum().backward()
    optimiser.step()
    after = flow.log_prob(x, context)
    after.sum().backward()
    assert (after - before).abs().min() > 0
    assert_close(after, flow.log_prob(x.clone(), context), rtol=0, atol=0)


def test_a_flow_can_be_copied_after_a_call_and_saved(model):
    _, flow, _, x, context, _ = model
    expected = flow.log_prob(x, context)
    copied = copy.deepcopy(flow)
    assert_close(copied.log_prob(x, context), expected, rtol=0, atol=0)
    optimiser = torch.optim.SGD(copied.parameters(), lr=1e-5)
    copied.log_prob(x, context).sum().backward()
    optimiser.step()
    assert (copied.log_prob(x, context) - expected).abs().max() > 0
    assert_close(flow.log_prob(x, context), expected, rtol=0, atol=0)
    flow.load_state_dict(copied.state_dict())
    assert_close(flow.log_prob(x, context), copied.log_prob(x, context), rtol=0, atol=0)


def test_a_flow_can_be_cast(model):
    _, flow, _, x, context, samples = model
    flow.float()
    x, context = x.float(), None if context is None else context.float()
    assert flow.log_prob(x, context).dtype == torch.float32
    assert not samples or flow.sample(2, context).dtype == torch.float32


def test_what_the_library_kept_is_not_served():
    """A user's own call fills Pyro's cache: the bridge does not use it, nor leaves anything behind itself."""
    coupling = T.affine_coupling(4, [8])
    transform, x = as_transform(coupling), torch.randn(3, 4)
    coupling.inv(x)
    kept = coupling._cached_x_y
    with torch.no_grad():
        coupling.nn.layers[-1].bias.add_(1.0)
    assert_close(transform(x)[0], transform(x.clone())[0], rtol=0, atol=0)
    assert coupling._cached_x_y is kept
    copy.deepcopy(transform)
    unused = T.affine_coupling(4, [8])
    as_transform(unused)(x)
    copy.deepcopy(unused)
    assert unused._cached_x_y == (None, None) and unused._cached_log_scale is None


def flow_of(*parts):
    return as_flow(dist.TransformedDistribution(normal(4), list(parts)))


THREADED = {name: lambda name=name: build_flow(name, 4, layers=2, hidden_features=(8,)) for name in catalogue.FLOWS} | {
    "nested": lambda: flow_of(T.spline_coupling(4, 2, [8]), T.affine_autoregressive(4, [8], stable=True)),
    "in parts": lambda: flow_of(
        transforms.CatTransform(
            [T.affine_coupling(2, [8]), T.affine_autoregressive(2, [8]).inv], dim=-1, lengths=[2, 2]
        )
    ),
    "in the base": lambda: as_flow(
        dist.TransformedDistribution(dist.TransformedDistribution(normal(4), [T.affine_coupling(4, [8])]), [])
    ),
    "exported": lambda: flow_of(
        to_library("pyro", build_flow("pyro-maf", 4, layers=2, hidden_features=(8,)).transform)
    ),
    "conditioned": lambda: flow_of(
        to_library("torch", build_flow("pyro-affine", 4, 2, layers=2).transform).condition(torch.ones(2))
    ),
}


@pytest.mark.parametrize("name", THREADED)
def test_threads_get_their_own_answers(name):
    torch.manual_seed(0)
    flow = THREADED[name]().eval()
    batches = [torch.randn(5, 4) for _ in range(4)]
    with torch.no_grad():
        expected = [flow.log_prob(x) for x in batches]
    assert wrong_in_threads(lambda i: flow.log_prob(batches[i]), expected) == 0


@pytest.mark.parametrize("library", ["pyro", "torch"])
def test_threads_get_their_own_answers_of_an_export(library):
    torch.manual_seed(0)
    exported = to_library(library, build_flow("masked-affine", 4, layers=2, hidden_features=(8,)).transform)
    density = dist.TransformedDistribution(normal(4), [exported])
    batches = [torch.randn(5, 4) for _ in range(4)]
    with torch.no_grad():
        expected = [density.log_prob(x) for x in batches]
    assert wrong_in_threads(lambda i: density.log_prob(batches[i]), expected) == 0


def wrong_in_threads(compute, expected, repeats=40):
    """How many results are wrong when thread i computes ``compute(i)`` over and over, all threads at once."""
    wrong = []

    @torch.no_grad()
    def run(i):
        for _ in range(repeats):
            try:
                if not torch.allclose(compute(i), expected[i], rtol=1e-4, atol=1e-4):  # threads may round differently
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(expected))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return len(wrong)


def test_a_flow_as_a_base_gives_no_stale_value():
    coupling = T.affine_coupling(4, [8])
    inner = dist.TransformedDistribution(normal(4), [coupling])
    flow, x = as_flow(dist.TransformedDistribution(inner, [])), torch.randn(3, 4)
    flow.log_prob(x).sum().backward()
    with torch.no_grad():
        coupling.nn.layers[-1].bias.add_(1.0)
    assert_close(flow.log_prob(x), flow.log_prob(x.clone()), rtol=0, atol=0)
    flow.log_prob(x).sum().backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.affine_coupling(4, [8]),
        lambda: T.spline_coupling(4, 2, [8]),
        lambda: T.affine_autoregressive(4, [8]).inv,
        lambda: T.ComposeTransform([T.affine_coupling(4, [8]), T.permute(4)]),
        lambda: T.conditional_affine_coupling(4, 2, [8]),
        lambda: T.conditional_spline(4, 2, [8]),
        lambda: T.conditional_householder(4, 2, [8]),
        lambda: T.conditional_matrix_exponential(4, 2, [8]),
        lambda: T.conditional_affine_autoregressive(4, 2, [8]).inv,
    ],
)
def test_a_network_runs_once_for_a_log_prob(make):
    transform = as_transform(make())
    (network,) = [module for module in transform.modules() if hasattr(module, "param_slices")]
    with counted() as calls:
        transform(torch.randn(3, 4), None if transform.context_features is None else torch.randn(3, 2))
    assert calls[network] == 1


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("library", ["pyro", "torch"])
def test_an_export_runs_once_for_a_log_prob_of_the_library(library, conditional):
    context = context_for(2, 5) if conditional else None
    flow = build_flow("masked-affine", 4, 2 if conditional else None, layers=1, hidden_features=(8,)).double()
    exported = to_library(library, flow.transform, conditional=conditional)
    x = batch(5, 4)
    with counted() as calls:
        log_prob = bridge.native_log_prob(exported, x, context)
    assert calls[flow.transform] == 1
    assert_close(log_prob, flow.log_prob(x, context))


def test_exports_are_the_librarys_types_and_come_back():
    transform = build_flow("masked-affine", 4, layers=1).transform
    exported = {
        "torch": to_library("torch", transform),
        "pyro": to_library("pyro", transform),
        "conditional": to_library("pyro", transform, conditional=True),
    }
    assert isinstance(exported["torch"], transforms.Transform) and exported["torch"].bijective
    assert isinstance(exported["pyro"], dist.TransformModule)
    assert isinstance(exported["conditional"], dist.ConditionalTransformModule)
    for export in exported.values():
        assert as_transform(export) is transform
        assert set(export.parameters()) == set(transform.parameters())
    assert as_transform(exported["pyro"].inv)(torch.zeros(1, 4))[0].shape == (1, 4)


def test_an_export_trains_as_a_pyro_prior():
    pyro.clear_param_store()
    flow = build_flow("masked-affine", 3, 2, layers=2, hidden_features=(8,))
    exported = to_library("pyro", flow.transform, conditional=True)
    data, context = torch.randn(16, 3) + 2, torch.randn(16, 2)

    def model():
        pyro.module("flow", exported)
        with pyro.plate("data", 16):
            pyro.sample(
                "x", dist.ConditionalTransformedDistribution(normal(3), [exported]).condition(context), obs=data
            )

    svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert losses[-1] > -flow.log_prob(data, context).sum().item()


def test_an_export_takes_any_batch_shape_and_broadcasts_its_context():
    flow = build_flow("masked-affine", 3, 2, layers=2, hidden_features=(8,)).double()
    randomise(flow)
    exported = to_library("pyro", flow.transform, conditional=True)
    x, context = batch(4, 5, 3), context_for(2, 5)
    log_prob = dist.ConditionalTransformedDistribution(normal(3), [exported]).condition(context).log_prob(x)
    assert log_prob.shape == (4, 5)
    assert_close(log_prob[2], flow.log_prob(x[2], context))
    assert exported.condition(context[0])(x).shape == (4, 5, 3)
    assert exported.condition(context[0])(x[0, 0]).shape == (3,)
    with pytest.raises(ValueError, match=r"a context of shape \(3, 2\) does not broadcast with a batch of \(4, 5\)"):
        exported.condition(context[:3])(x)
    with pytest.raises(ValueError, match="inputs of at least 1 dimensions, not 0"):
        exported.condition(context)(torch.tensor(0.0))


def test_an_export_names_a_wrong_context():
    transform = build_flow("pyro-affine", 3, 2, layers=1).transform
    exported, x = to_library("pyro", transform), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"give a context of shape \(batch, 2\)"):
        exported(x)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(batch, 2\), not \(4, 5\)"):
        exported.condition(torch.zeros(4, 5))(x)
    transform = build_flow("nflows-realnvp", 3, 2, layers=1, hidden_features=(8,)).transform
    exported = to_library("torch", transform)
    with pytest.raises(ValueError, match=r"give it a context of shape \(\*batch, 2\) by .condition"):
        exported.inv(x)
    with pytest.raises(ValueError, match=r"takes a context of shape \(\*batch, 2\), not \(4, 5\)"):
        exported.condition(torch.zeros(4, 5))(x)
    with pytest.raises(ValueError, match="event_dim must be at least 0, not -1"):
        to_library("torch", transform, event_dim=-1)


def test_an_export_conditioned_for_good_is_a_part_like_any_other():
    transform = randomise(build_flow("masked-affine", 3, 2, layers=1).transform)
    conditioned = to_library("torch", transform).condition(torch.ones(2, dtype=torch.float64))
    x, context = batch(4, 3), torch.ones(4, 2, dtype=torch.float64)
    bridged = as_transform(transforms.ComposeTransform([conditioned, T.permute(3, torch.tensor([2, 0, 1]))]))
    assert set(bridged.parameters()) == set(transform.parameters())
    y = x[:, [1, 2, 0]]
    assert_close(bridged(x), transform(y, context))
    assert_close(copy.deepcopy(bridged)(x), transform(y, context))


def test_an_export_scores_within_torch_func_and_inference_mode():
    transform = randomise(build_flow("masked-affine", 3, layers=1).transform)
    density, y = dist.TransformedDistribution(normal(3), [to_library("torch", transform)]), batch(4, 3)
    expected = density.log_prob(y)
    assert_close(torch.func.vmap(density.log_prob)(y[:, None]).squeeze(1), expected)
    with torch.inference_mode(), counted() as calls:
        assert_close(density.log_prob(y.clone()), expected)
    assert calls[transform] == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.planar(3),
        lambda: T.radial(3),
        lambda: T.polynomial(3),
        lambda: T.neural_autoregressive(3),
        lambda: T.block_autoregressive(3),
        lambda: T.conditional_planar(3, 2),
        lambda: T.conditional_radial(3, 2),
        lambda: T.conditional_neural_autoregressive(3, 2),
    ],
)
def test_a_one_way_transform_scores_as_its_inverse_only(make):
    native = make()
    with pytest.raises(InverseNotAvailable, match="cannot score a value that it did not sample itself"):
        as_transform(native)
    transform = randomise(as_transform(native.inv), scale=0.05)
    context = context_for(transform.context_features, 4)
    x = batch(4, 3)
    y, log_det = transform(x, context)
    for i in range(4):
        row = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=row: transform(v[None], c)[0][0], x[i])
        assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-5, rtol=1e-5)
    with pytest.raises(InverseNotAvailable, match="has no inverse, so this flow cannot sample"):
        transform.inverse(y, context)


def test_a_sylvester_transform_is_refused_for_its_log_determinant():
    """If this fails, Pyro has mended it: then it may be let in, as an inverse."""
    torch.manual_seed(0)
    sylvester, x = randomise(T.sylvester(3)), batch(1, 3)
    jacobian = torch.autograd.functional.jacobian(lambda v: sylvester(v[None])[0], x[0])
    log_det = sylvester.log_abs_det_jacobian(x, sylvester(x))[0]
    assert (torch.linalg.slogdet(jacobian).logabsdet - log_det).abs() > 1e-4
    with pytest.raises(ValueError, match="Sylvester has a wrong log-determinant in Pyro"):
        as_transform(T.sylvester(3).inv)
    with pytest.raises(InverseNotAvailable, match="Sylvester runs noise → data only"):
        as_transform(T.sylvester(3))


@pytest.mark.parametrize("make", [transforms.AbsTransform, transforms.SoftmaxTransform, T.Normalize])
def test_no_bijection(make):
    with pytest.raises(ValueError, match=f"{make.__name__} is no bijection, so no flow can use it"):
        as_transform(make())


def test_a_conditional_channel_permutation_is_refused():
    with pytest.raises(ValueError, match="no log-determinant for a batch of contexts"):
        as_transform(T.conditional_generalized_channel_permute(2, channels=3))


def test_a_constant_log_determinant_is_one_number_a_row():
    matrix = T.matrix_exponential(3, iterations=30)  # its log-determinant is 0-d
    log_det = as_transform(matrix)(torch.zeros(4, 3))[1]
    assert_close(log_det, -matrix.weights.trace().expand(4))


def test_the_inverse_of_a_conditional_composition_is_turned_round():
    parts = [
        T.conditional_affine_coupling(3, 2, [8]),
        T.permute(3, torch.tensor([2, 0, 1])),
        T.conditional_spline(3, 2),
    ]
    composed = dist.conditional.ConditionalComposeTransformModule(parts)
    transform, inverse = as_transform(composed), as_transform(composed.inv)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    assert_close(inverse(x, context), transform.inverse(x, context))
    assert_close(inverse(x, context)[0], composed.condition(context)(x))


def test_a_transform_may_change_the_shape():
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    native = dist.TransformedDistribution(base, [transforms.StickBreakingTransform()])
    flow, x = as_flow(native), native.sample((5,))
    assert flow.event_shape == (4,)
    assert_close(flow.log_prob(x), native.log_prob(x))
    native = dist.TransformedDistribution(normal(6), [T.affine_coupling(6), T.ReshapeTransform((6,), (2, 3))])
    flow, x = as_flow(native), torch.randn(5, 2, 3)
    assert flow.sample(4).shape == (4, 2, 3)
    assert_close(flow.log_prob(x), native.log_prob(x))


class ConditionalNormal(dist.ConditionalDistribution, nn.Module):
    def __init__(self, context_features, features):
        super().__init__()
        self.network = nn.Linear(context_features, features)
        self.features = features

    def condition(self, context):
        return dist.Normal(self.network(context), 1.0).to_event(1)


def test_a_base_may_read_the_context():
    base = ConditionalNormal(2, 3)
    coupling = T.conditional_affine_coupling(3, 2, [8])
    native = dist.ConditionalTransformedDistribution(base, [coupling, T.permute(3)])
    flow = randomise(as_flow(native))
    x, context = batch(5, 3), context_for(2, 5)
    assert flow.context_features == 2 and flow.event_shape == (3,)
    assert set(base.parameters()) <= set(flow.parameters())
    assert_close(flow.log_prob(x, context), native.condition(context).log_prob(x))
    drawn, log_prob = flow.sample_and_log_prob(7, context)
    assert_close(log_prob[2], flow.log_prob(drawn[2], context[2].expand(7, 2)))
    with pytest.raises(ValueError, match="give what reads it an attribute context_dim"):
        as_flow(dist.ConditionalTransformedDistribution(base, [T.permute(3)]))
    with torch.no_grad():
        base.network.weight.mul_(1e3)  # noise so far apart that samples of one context are none of another's
    noise = flow.base.sample(6, context)
    assert_close(noise, base.network(context)[:, None].expand(5, 6, 3), atol=10, rtol=0)
    base.context_dim = 2
    assert as_flow(dist.ConditionalTransformedDistribution(base, [T.permute(3)])).log_prob(x, context).shape == (5,)


def test_a_flow_conditioned_for_good_keeps_its_parameters():
    coupling = T.conditional_affine_coupling(4, 2, [8])
    native = dist.ConditionalTransformedDistribution(normal(4), [coupling]).condition(torch.ones(2))
    flow = randomise(as_flow(native))
    assert set(coupling.parameters()) == set(flow.parameters())
    assert_close(flow.log_prob(batch(5, 4)), native.log_prob(batch(5, 4)))


def test_independent_wrappers_are_part_of_the_datum():
    native = Independent(
        torch.distributions.TransformedDistribution(
            torch.distributions.Normal(torch.zeros(3), 1.0), [T.ExpTransform()]
        ),
        1,
    )
    x = torch.rand(5, 3)
    assert_close(as_flow(native).log_prob(x), native.log_prob(x))
    assert as_flow(native).event_shape == (3,)
    with pytest.raises(TypeError, match="is no flow"):
        as_flow(normal(3))
    with pytest.raises(TypeError, match="is no transform"):
        as_transform(normal(3))


@pytest.mark.parametrize(
    ("make", "features"),
    [
        (lambda: T.affine_coupling(4, [8]), 4),
        (lambda: T.conditional_affine_coupling(4, 2, [8]), 4),
        (lambda: T.spline_coupling(4, 2, [8]), 4),
        (lambda: T.affine_autoregressive(4, [8]), 4),
        (lambda: T.conditional_affine_autoregressive(4, 2, [8]), 4),
        (lambda: T.spline_autoregressive(4, [8]), 4),
        (lambda: T.spline(4), 4),
        (lambda: T.permute(4), 4),
        (lambda: T.batchnorm(4), 4),
    ],
)
def test_a_wrong_width_is_named(make, features):
    transform = as_transform(make())
    context = None if transform.context_features is None else torch.zeros(3, 2)
    for function in (transform, transform.inverse):
        with pytest.raises(ValueError, match=rf"takes {features} features, not an input of \(3, {features + 1}\)"):
            function(torch.zeros(3, features + 1), context)


def test_a_wrong_context_is_named():
    transform, x = as_transform(T.conditional_spline(3, 2, [8])), torch.zeros(4, 3)
    for context, message in [
        (None, r"ConditionalSpline is conditional: give a context of shape \(batch, 2\)"),
        (torch.zeros(4, 3), r"the context of ConditionalSpline takes inputs of shape \(batch, 2\), not \(4, 3\)"),
        (torch.zeros(5, 2), "the context of ConditionalSpline has 5 rows for 4 inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            transform(x, context)
    with pytest.raises(ValueError, match=r"Spline is unconditional, but a context of shape \(4, 2\) was given"):
        as_transform(T.spline(3))(x, torch.zeros(4, 2))
    parts = [T.conditional_affine_coupling(4, 2, [8]), T.conditional_affine_coupling(4, 3, [8])]
    with pytest.raises(ValueError, match="do not agree about its width: 2, 3"):
        as_transform(dist.conditional.ConditionalComposeTransformModule(parts))


@pytest.mark.parametrize(
    ("widths", "expected"),
    [([], None), ([None], None), ([...], ...), ([None, ..., 2], 2), ([0, None], None), ([0, ...], None), ([3, 3], 3)],
)
def test_widths_of_a_context_agree(widths, expected):
    assert one_width(widths, "a context") == expected


@pytest.mark.parametrize("widths", [[2, 3], [0, 2], [..., 2, None, 0]])
def test_widths_of_a_context_that_do_not_agree_are_named(widths):
    with pytest.raises(ValueError, match="the parts of a context do not agree about its width: "):
        one_width(widths, "a context")


def test_a_chain_names_the_transform_that_cannot_take_what_it_is_given():
    chain = as_transform(transforms.ComposeTransform([T.affine_coupling(4, [8]), transforms.ExpTransform()]))
    with pytest.raises(ValueError, match=r"^AffineCoupling takes 4 features, not an input of \(3, 5\)"):
        chain(torch.ones(3, 5))
    with pytest.raises(ValueError, match="ExpTransform, AffineCoupling is unconditional, but a context"):
        chain(torch.ones(3, 4), torch.ones(3, 2))


class Several(dist.ConditionalTransform):
    """What a context makes of this is a composition, with an inverse in it."""

    context_dim = 3

    def condition(self, context):
        affine = transforms.AffineTransform(context, 2.0, event_dim=1)
        return transforms.ComposeTransform(
            [transforms.ExpTransform(), affine.inv, T.permute(3, torch.arange(3).flip(0))]
        )


def test_a_conditional_transform_may_make_a_composition():
    part, context = Several(), context_for(3, 4)
    transform = as_transform(dist.conditional.ConditionalComposeTransformModule([part, part]))
    z, conditioned = torch.rand(4, 3, dtype=torch.float64) / 8, part.condition(context)
    once = conditioned(z)
    x, log_det = transform.inverse(z, context)
    assert_close(x, conditioned(once))
    assert_close(log_det, conditioned.log_abs_det_jacobian(z, once) + conditioned.log_abs_det_jacobian(once, x))
    assert_close(transform(x, context), (z, -log_det))


@pytest.mark.parametrize("validates", [True, False])
def test_pyro_leaves_argument_validation_as_it_was(validates):
    """A copied torch inverse forgets what it inverts: copies must work all the same."""
    program = f"""
import copy, sys, torch
from torch.distributions import Distribution, SigmoidTransform, TransformedDistribution, Uniform
Distribution.set_default_validate_args({validates})
import adapters
logistic = TransformedDistribution(Uniform(torch.zeros(3), torch.ones(3)), [SigmoidTransform().inv])
flow = adapters.as_flow(TransformedDistribution(logistic, [SigmoidTransform()]))
assert torch.equal(copy.deepcopy(flow).log_prob(x := torch.rand(2, 3)), flow.log_prob(x))
adapters.build_flow("pyro-affine", 3, layers=1)
assert "pyro" in sys.modules and Distribution._validate_args is {validates}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["pyro-affine", "pyro-spline"])
@pytest.mark.parametrize("context_features", [None, 2])
def test_a_mask_is_followed(name, context_features):
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    flow = randomise(build_flow(name, 5, context_features, layers=1, hidden_features=(8,), masks=[mask]))
    x = batch(6, 5)
    z, _ = flow.transform(x, context_for(context_features, 6))
    assert torch.equal(z == x, mask.bool().expand(6, 5))


def test_maf_scores_in_one_pass():
    flow = build_flow("pyro-maf", 4, layers=1, hidden_features=(8,))
    (network,) = [module for module in flow.modules() if hasattr(module, "param_slices")]
    with counted() as calls:
        flow.log_prob(torch.randn(3, 4))
    assert calls[network] == 1
    with counted() as calls:
        flow.sample(2)
    assert calls[network] == 4
    with pytest.raises(ValueError, match="no narrower than the 4 features, not \\[3\\]"):
        build_flow("pyro-maf", 4, hidden_features=(3,))
    with pytest.raises(ValueError, match="at least 2 features, not 1"):
        build_flow("pyro-maf", 1)


def test_options_and_activation_reach_the_library():
    flow = build_flow("pyro-spline", 4, layers=1, bins=5, tail_bound=2.0, activation="tanh", order="linear")
    (coupling,) = [module for module in flow.modules() if isinstance(module, T.SplineCoupling)]
    assert (coupling.upper_spline.count_bins, coupling.upper_spline.bound) == (5, 2.0)
    assert isinstance(coupling.upper_spline.nn.f, nn.Tanh)
    with pytest.raises(ValueError, match="order must be 'linear' or 'quadratic', not 'cubic'"):
        build_flow("pyro-spline", 4, order="cubic")
    with pytest.raises(ValueError, match="at least one hidden layer, but hidden_features is empty"):
        build_flow("pyro-affine", 4, hidden_features=())


@pytest.fixture
def broadcast():
    """A base whose tensors are views of one trainable number each, the flow of it, and the two numbers."""
    loc, shift = torch.tensor(0.5, requires_grad=True), nn.Parameter(torch.zeros(1))
    base = dist.Normal(loc, torch.ones(3)).to_event(1)
    native = dist.TransformedDistribution(base, [transforms.AffineTransform(shift, 2.0, event_dim=1)])
    return native, as_flow(native), loc, shift


def test_views_of_parameters_follow_them(broadcast):
    native, flow, loc, shift = broadcast
    assert {id(loc), id(shift)} == {id(parameter) for parameter in flow.parameters()}
    x = torch.randn(4, 3)
    for _ in range(2):  # two backward passes
        flow.log_prob(x).sum().backward()
    expected = flow.log_prob(x)
    copied, restored = copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))
    for other in (copied, restored):
        assert_close(other.log_prob(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert (other.log_prob(x) - expected).abs().min() > 0
    assert_close(flow.log_prob(x), expected, rtol=0, atol=0)
    flow.load_state_dict(copied.state_dict())
    assert_close(flow.log_prob(x), copied.log_prob(x), rtol=0, atol=0)
    flow.double()
    assert_close(flow.log_prob(x.double()), copied.double().log_prob(x.double()))
    assert_close(native.log_prob(x.double()), flow.log_prob(x.double()))
    flow.zero_grad()
    flow.log_prob(x.double()).sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_a_tensor_computed_from_parameters_is_refused():
    log_scale = nn.Parameter(torch.zeros(3))
    base = dist.Normal(torch.zeros(3), log_scale.exp()).to_event(1)
    with pytest.raises(ValueError, match=r"Normal holds a tensor \(scale\) that was computed from parameters"):
        as_flow(dist.TransformedDistribution(base, [T.permute(3)]))


def test_what_is_derived_from_a_buffer_follows_it():
    first, second = (as_transform(T.permute(4, torch.tensor(order))) for order in ([1, 2, 3, 0], [3, 1, 0, 2]))
    x = torch.randn(2, 4)
    first(x)
    first.load_state_dict(second.state_dict())
    assert_close(first(x), second(x), rtol=0, atol=0)
    smooth = as_transform(T.DiscreteCosineTransform(smooth=1.0))
    y, _ = smooth(torch.randn(2, 4))
    assert_close(smooth.double().inverse(smooth(y.double())[0])[0], y.double())


def test_a_trained_triangular_matrix_stays_one():
    """What samples are made by is what they are scored by, whatever training has made of the matrix."""
    matrix = nn.Parameter(torch.eye(2) + 0.5)
    base = dist.MultivariateNormal(torch.zeros(2), scale_tril=matrix.tril().detach())
    base._unbroadcasted_scale_tril = matrix
    flow = as_flow(dist.TransformedDistribution(base, [T.LowerCholeskyAffine(torch.zeros(2), matrix)]))
    assert len(list(flow.parameters())) == 1
    x, log_prob = flow.sample_and_log_prob(100_000)
    x[:, 0].var().backward()
    assert matrix.grad[0, 1] == 0
    assert_close(flow.log_prob(x), log_prob)
    lower = matrix.detach().tril()
    assert_close(x.detach().T.cov(), (lower @ lower) @ (lower @ lower).T, rtol=0.05, atol=0.05)


def test_a_base_may_be_a_flow_with_inverses():
    logistic = dist.TransformedDistribution(
        dist.Uniform(torch.zeros(3), torch.ones(3)), [transforms.SigmoidTransform().inv]
    )
    flow = as_flow(dist.TransformedDistribution(logistic, [T.affine_coupling(3, [8])]))
    x = torch.randn(4, 3)
    expected = flow.log_prob(x)
    assert_close(copy.deepcopy(flow).log_prob(x), expected, rtol=0, atol=0)
    assert flow.double().sample(2).dtype == torch.float64
