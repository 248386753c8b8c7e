"""The masked autoregressive layer against its equations, one coordinate after another, and its network's masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from adapters import build_flow
from adapters.layers.autoregressive import AutoregressiveMLP, MaskedAutoregressiveLayer
from tests.laws import batch, randomise


def layer_of(order, **options):
    return randomise(MaskedAutoregressiveLayer(AutoregressiveMLP(torch.tensor(order), **options)))


@settings(deadline=None, max_examples=25)
@given(order=st.integers(1, 7).flatmap(lambda d: st.permutations(range(d))), seed=st.integers(0, 99))
def test_the_equations_coordinate_by_coordinate(order, seed):
    D = len(order)
    layer = layer_of(order, hidden_features=(9, 8))
    z = batch(3, D, seed=seed)
    known, total = torch.zeros_like(z), torch.zeros(3, dtype=z.dtype)
    for d in order:
        s, t = layer.conditioner(known).chunk(2, dim=1)
        s = layer.scale_bound[d] * s[:, d].tanh()
        known = known.index_copy(1, torch.tensor([d]), (z[:, d] * s.exp() + t[:, d])[:, None])
        total = total + s
    z_prime, log_det = layer(z)
    assert_close(z_prime, known, rtol=0, atol=1e-12)
    assert_close(log_det, total, rtol=0, atol=1e-12)
    again, minus = layer.inverse(known)
    assert_close(again, z, rtol=0, atol=1e-10)
    assert_close(minus, -total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context_features", [None, 3])
def test_sampling_takes_the_arithmetic_of_one_pass(context_features):
    network = randomise(AutoregressiveMLP(torch.randperm(12), 2, (32, 20, 40), context_features))
    layer, z, context = MaskedAutoregressiveLayer(network), batch(5, 12), batch(5, context_features or 0)
    given = (z,) if context_features is None else (z, context)
    operations = {}
    for name in ("forward", "inverse"):
        with FlopCounterMode(display=False) as counter:
            getattr(layer, name)(*given)
        operations[name] = counter.get_total_flops()
    assert 0 < operations["forward"] <= operations["inverse"]


def test_an_order_is_saved_with_the_weights():
    saved, loaded = layer_of([2, 0, 1]), layer_of([0, 1, 2])
    loaded.load_state_dict(saved.state_dict())
    z = batch(4, 3)
    assert_close(loaded(z)[0], saved(z)[0], rtol=0, atol=0)


def test_a_network_without_hidden_layers():
    layer, z = layer_of([1, 2, 0], hidden_features=()), batch(4, 3)
    assert_close(layer.inverse(layer(z)[0])[0], z)


def test_dropout_drops_the_same_units_for_all_coordinates():
    torch.manual_seed(0)
    layer = layer_of([0, 1, 2], hidden_features=(6,), dropout=0.5).train()
    z, seen = batch(2, 3), []
    layer.conditioner[2].register_forward_hook(lambda module, args, output: seen.append(output))
    layer(z)
    assert sum(each.shape[1] for each in seen) == 6  # each unit is drawn once


@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("context_features", [None, 2])
def test_outputs_read_all_coordinates_before_them_and_no_others(order, context_features):
    D = len(order)
    network = randomise(AutoregressiveMLP(torch.tensor(order), 3, (24, 16), context_features, "tanh"))
    x, context = batch(D), batch(context_features or 0)

    def outputs(x, context):
        given = (x[None],) if context_features is None else (x[None], context[None])
        return network(*given)[0].view(3, D).sum(0)

    by_x, by_context = jacobian(outputs, (x, context))
    place = torch.tensor(order).argsort()
    assert torch.equal(by_x != 0, place[:, None] > place)
    assert (by_context != 0).all()  # the first coordinate's outputs, too, which read nothing else


def test_no_hidden_unit_is_wasted():
    for network in (
        AutoregressiveMLP(torch.arange(5), hidden_features=(8, 9)),
        AutoregressiveMLP(torch.arange(5), 2, (2,)),
    ):
        for layer in list(network)[:-1:2]:
            assert layer.mask.any(1).all()  # sees a coordinate
        assert network[-1].mask.any(0).all()  # and is seen


def test_the_order_turns_from_layer_to_layer():
    flow = randomise(build_flow("masked-autoregressive", 4, layers=2))
    x = batch(4)
    assert (jacobian(lambda x: flow.transform(x[None])[0][0], x) != 0).all()
    flow = randomise(build_flow("masked-autoregressive", 4, layers=1))
    assert (jacobian(lambda x: flow.transform(x[None])[0][0], x).triu(1) == 0).all()


def test_the_catalogues_options_reach_the_layers():
    flow = build_flow("masked-autoregressive", 3, layers=2, dropout=0.25, scale_bound=0.5)
    assert {module.p for module in flow.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    bounds = [module.scale_bound for module in flow.modules() if isinstance(module, MaskedAutoregressiveLayer)]
    assert len(bounds) == 2 and all((bound == 0.5).all() for bound in bounds)


def test_under_autocast_only_the_network_is_less_precise():
    layer = randomise(MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3)))).float()
    x = batch(5, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, log_det = layer.inverse(x)
        s, _ = layer.conditioner(x).float().chunk(2, dim=1)
    assert_close(log_det, -(layer.scale_bound * s.tanh()).sum(1), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        z_prime, log_det = layer(x)
        s, t = layer.conditioner(z_prime).float().chunk(2, dim=1)
    assert z_prime.dtype == log_det.dtype == torch.float32
    assert_close(log_det, (layer.scale_bound * s.tanh()).sum(1), rtol=0, atol=0.05)  # other sums, rounded otherwise
    assert_close(z_prime, x * (layer.scale_bound * s.tanh()).exp() + t, rtol=0.05, atol=0.05)


def test_it_starts_at_the_identity_and_learns_what_coupling_of_one_layer_cannot():
    flow = build_flow("masked-autoregressive", 3, layers=1)
    x = batch(4, 3).float()
    assert_close(flow.transform(x)[0], x)
    # x_2 given x_1 given x_0, each curved: one autoregressive layer is exact where one coupling layer is not
    torch.manual_seed(0)
    found = {}
    for name in ("masked-autoregressive", "masked-affine"):
        flow = build_flow(name, 3, layers=1, hidden_features=(32, 32))
        optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
        for step in range(601):
            u = torch.randn(2000 if step == 600 else 256, 3)
            x1 = u[:, 1] + u[:, 0] ** 2 / 2
            x = torch.stack((u[:, 0], x1, u[:, 2] + 2 * x1.sin()), 1)
            loss = -flow.log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = loss.item() - 0.5 * u.square().sum(1).mean().item() - 1.5 * torch.log(torch.tensor(2 * torch.pi))
    assert found["masked-autoregressive"] < 0.05 < 0.2 < found["masked-affine"]


@pytest.mark.parametrize("order", [[1, 2], [0, 0], [[0, 1]], []])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(ValueError, match="order must hold each of 0 to D . 1 once"):
        AutoregressiveMLP(torch.tensor(order, dtype=torch.long))


def test_mistakes_are_named():
    layer = MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3)))
    with pytest.raises(ValueError, match="this layer"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="conditioner"):
        MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3), 1)).inverse(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="conditioner"):
        MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3), 1))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="context must have 0 features, not 2"):
        layer(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="context must have 2 features, not 0"):
        MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3), context_features=2))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="scale_bound must be positive, not 0"):
        MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3)), 0)
    with pytest.raises(ValueError, match="unknown activation 'sine'"):
        AutoregressiveMLP(torch.arange(3), activation="sine")
