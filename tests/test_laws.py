"""The laws of the project, for every example of every layer and bridge and every flow of the catalogue.

A new file in tests/examples or adapters/catalogue is held to them without a line changed here.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

from adapters import build_flow, flow_names
from tests.examples import examples
from tests.laws import assert_inputs_unchanged, autograd_log_det, batch, context_for, randomise

ROWS = 4
EXAMPLES = examples()


@pytest.fixture(params=EXAMPLES)
def case(request):
    """A randomised transform, an input and a context for it."""
    example = EXAMPLES[request.param]
    torch.manual_seed(0)
    transform = randomise(example.make()).eval()
    return transform, batch(ROWS, *example.event_shape), context_for(example.context_features, ROWS)


def test_law_1_shapes_and_dtype(case):
    transform, x, context = case
    for function in (transform, transform.inverse):
        y, log_det = function(x, context)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert log_det.shape == (ROWS,) and log_det.dtype == x.dtype


def test_law_1_inverse_undoes_forward(case):
    transform, x, context = case
    y, log_det = transform(x, context)
    assert not torch.allclose(x, y, atol=1e-3), "the example is at the identity, where nothing is tested"
    back, inverse_log_det = transform.inverse(y, context)
    assert_close(back, x, atol=1e-6, rtol=1e-6)
    assert_close(inverse_log_det, -log_det, atol=1e-6, rtol=1e-6)
    assert_close(transform(transform.inverse(x, context)[0], context)[0], x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_law_1_log_det_is_autograds(case, direction):
    transform, x, context = case
    function = getattr(transform, direction)
    _, log_det = function(x, context)
    assert log_det.abs().min() > 1e-6
    assert_close(log_det, autograd_log_det(function, x, context), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_law_1_no_call_changes_its_inputs(case, direction):
    transform, x, context = case
    assert_inputs_unchanged(getattr(transform, direction), x, context)


def test_law_1_gradients_reach_every_parameter(case):
    transform, x, context = case
    for function in (transform, transform.inverse):
        transform.zero_grad()
        y, log_det = function(x, context)
        (y.pow(2).sum() + log_det.sum()).backward()
        for name, parameter in transform.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_law_1_state_dict_round_trips(case, request):
    transform, x, context = case
    torch.manual_seed(5)
    other = EXAMPLES[request.node.callspec.params["case"]].make().double().eval()
    other.load_state_dict(transform.state_dict())
    assert_close(other(x, context), transform(x, context), rtol=0, atol=0)


def test_law_1_deepcopy_after_a_call(case):
    transform, x, context = case
    y = transform(x, context)
    assert_close(copy.deepcopy(transform)(x, context), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", flow_names())
def test_law_4_density_integrates_to_one(name):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 2, layers=3, hidden_features=(8, 8)), scale=0.1).eval()
    edge = torch.linspace(-20, 20, 1001 if name == "masked-histogram" else 401, dtype=torch.float64)  # it has edges
    grid = torch.cartesian_prod(edge, edge)
    with torch.no_grad():
        mass = sum(flow.log_prob(part).exp().sum() for part in grid.split(250_000)) * (edge[1] - edge[0]) ** 2
    assert_close(mass.item(), 1.0, atol=2e-3, rtol=0)


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("name", flow_names())
def test_law_4_samples_have_the_log_prob_they_come_with(name, context_features):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 4, context_features, layers=3, hidden_features=(8, 8)), scale=0.1).eval()
    context = context_for(context_features, 5)
    samples, log_prob = flow.sample_and_log_prob(6, context)
    repeated = None if context is None else context.repeat_interleave(6, dim=0)
    leading = (6,) if context is None else (5, 6)
    assert samples.shape == (*leading, 4) and samples.dtype == torch.float64
    assert_close(log_prob, flow.log_prob(samples.reshape(-1, 4), repeated).view(leading), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", flow_names())
def test_law_1_after_training_steps(name):
    torch.manual_seed(0)
    flow = build_flow(name, 4, 3, layers=3, hidden_features=(8, 8)).double()
    optimiser = torch.optim.Adam(flow.parameters(), 0.02)
    for _ in range(10):
        optimiser.zero_grad()
        flow.log_prob(batch(32, 4, seed=9), context_for(3, 32)).mean().neg().backward()
        optimiser.step()
    transform, x, context = flow.transform, 1.5 * batch(ROWS, 4), context_for(3, ROWS)
    for function, back in ((transform, transform.inverse), (transform.inverse, transform)):
        y, log_det = function(x, context)
        assert_close(log_det, autograd_log_det(function, x, context), atol=1e-7, rtol=1e-6)
        again, back_log_det = back(y, context)
        assert_close(again, x, atol=1e-6, rtol=1e-6)
        assert_close(back_log_det, -log_det, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", flow_names())
def test_law_5_contexts_differ_and_batch_alike(name):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 4, 3, layers=3, hidden_features=(8, 8)), scale=0.1).eval()
    x, contexts = batch(5, 4), context_for(3, 5)
    together = flow.log_prob(x, contexts)
    one_by_one = torch.cat([flow.log_prob(x[i : i + 1], contexts[i : i + 1]) for i in range(5)])
    assert_close(together, one_by_one)
    same_x = flow.log_prob(x[:1].expand(5, 4), contexts)
    assert same_x.diff().abs().min() > 1e-6
    torch.manual_seed(3)
    samples = flow.sample(7, contexts)
    assert_close(
        flow.transform(samples[2], contexts[2:3].expand(7, 3))[0],
        _base_noise(flow, contexts)[2],
        atol=1e-6,
        rtol=1e-6,
    )


def _base_noise(flow, contexts):
    torch.manual_seed(3)
    return flow.base.sample(7, contexts)


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("name", flow_names())
def test_law_1_no_call_of_a_flow_changes_its_inputs(name, context_features):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 4, context_features, layers=2, hidden_features=(8, 8)), scale=0.1).eval()
    x, context = batch(ROWS, 4), context_for(context_features, ROWS)
    for call in (flow.log_prob, flow.transform.inverse):
        assert_inputs_unchanged(call, x, context)
    for call in (flow.sample, flow.sample_and_log_prob):
        assert_inputs_unchanged(lambda rows, call=call: call(3, rows), context)


@pytest.mark.parametrize("name", flow_names())
def test_a_seed_gives_the_same_flow(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_flow(name, 3, layers=2, hidden_features=(8, 8)).parameters()])

    assert torch.equal(weights(4), weights(4))
    assert not torch.equal(weights(4), weights(5))


@pytest.mark.parametrize("name", flow_names())
def test_gradients_reach_every_parameter_of_a_flow(name):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 4, 2, layers=2, hidden_features=(8, 8)))
    flow.log_prob(batch(16, 4), context_for(2, 16)).sum().backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
