"""What a flow says of any number there is: empty batches, NaN, ±inf, huge and tiny values, borders, extreme weights.

The fuzz takes hundreds of examples in the suite; thousands with
``FUZZ_EXAMPLES=5000 python -m pytest tests/test_numerics.py -k fuzz --hypothesis-show-statistics``.
"""

import math
import os
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st
from nflows.transforms import InverseNotAvailable
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline
from torch.nn.functional import pad
from torch.testing import assert_close

from adapters import build_flow, flow_names, half_mask, random_mask
from adapters.checks import naming_shape
from adapters.layers.autoregressive import AutoregressiveMLP, MaskedAutoregressiveLayer
from adapters.layers.histogram import MaskedHistogramCouplingLayer
from adapters.layers.packed import PackedAffineCouplingLayer
from adapters.layers.spline import MaskedSplineCouplingLayer
from adapters.networks import MLP
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from tests.examples import examples
from tests.laws import batch, context_for, randomise

OURS = [name for name in flow_names() if name.startswith("masked-")]
FUZZ = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NAN, INF = math.nan, math.inf


def small(name, features=4, context_features=None, **options):
    torch.manual_seed(0)
    return randomise(build_flow(name, features, context_features, layers=2, hidden_features=(8, 8), **options)).eval()


def preprocessings():
    return {
        "none": None,
        "standardize": Standardize(torch.zeros(4), torch.ones(4)),
        "logit": Logit(),
        "probit": Probit(),
        "marginals": Marginals(torch.tensor([[0.5, 0.2, 0.3]]).expand(4, 3)),
    }


# ---------------------------------------------------------------- empty batches


@pytest.mark.parametrize("name", flow_names())
def test_an_empty_batch_gives_an_empty_answer(name):
    flow, conditional = small(name), small(name, context_features=3)
    x, none = batch(0, 4), batch(0, 3)
    for log_prob in (flow.log_prob(x), conditional.log_prob(x, none)):
        assert log_prob.shape == (0,) and log_prob.dtype == torch.float64
        log_prob.sum().backward()
    assert flow.encode(x).shape == (0, 4)
    assert conditional.encode(x, none).shape == (0, 4)
    assert conditional.sample(2, none).shape == conditional.sample(3, none, batch_size=2)[:, 1:].shape == (0, 2, 4)
    samples, log_prob = conditional.sample_and_log_prob(2, none)
    assert samples.shape == (0, 2, 4) and log_prob.shape == (0, 2)


@pytest.mark.parametrize("preprocess", preprocessings())
@pytest.mark.parametrize("name", OURS)
def test_our_transforms_take_an_empty_batch_themselves(name, preprocess):
    transform = small(name, preprocess=preprocessings()[preprocess]).transform
    for function in (transform, transform.inverse):
        y, log_det = function(batch(0, 4))
        assert y.shape == (0, 4) and log_det.shape == (0,)


# ---------------------------------------------------------------- NaN and ±inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", flow_names())
def test_a_row_that_is_not_finite_spoils_no_other(name, bad):
    """In either direction. NaN gives NaN, ±inf NaN or the density 0, and the other rows' gradients are as they were."""
    flow, x, others = small(name), batch(5, 4), [0, 1, 3, 4]
    for column in range(4):
        spoiled = x.clone()
        spoiled[2, column] = bad
        log_prob = flow.log_prob(spoiled)
        assert_close(log_prob[others], flow.log_prob(x)[others])
        assert log_prob[2].isnan() or (bad != bad) < (log_prob[2] == -INF)
        made, log_det = flow.transform.inverse(spoiled)
        right, right_log_det = flow.transform.inverse(x)
        assert_close(made[others], right[others])
        assert_close(log_det[others], right_log_det[others])
        assert not made[2].isfinite().all() and (bad == bad or made[2].isnan().any())
    gradients = []
    for rows in (x.clone(), spoiled):
        log_prob = flow.log_prob(rows.requires_grad_())
        gradients.append(torch.autograd.grad(log_prob[others].sum(), rows)[0][others])
    assert_close(*gradients)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", flow_names())
def test_a_context_that_is_not_finite_spoils_no_other(name, bad):
    flow, x, context, others = small(name, context_features=3), batch(5, 4), batch(5, 3), [0, 1, 3, 4]
    spoiled = context.clone()
    spoiled[2, 1] = bad
    assert_close(flow.log_prob(x, spoiled)[others], flow.log_prob(x, context)[others])
    assert_close(flow.decode(x, spoiled)[others], flow.decode(x, context)[others])
    if bad != bad:
        assert flow.log_prob(x, spoiled)[2].isnan() and flow.decode(x, spoiled)[2].isnan().any()


@pytest.mark.parametrize("name", [name for name in examples() if not name.startswith("hand_written:")])
def test_nan_in_a_row_spoils_no_other_in_the_libraries_layers(name):
    """An error, a wrong number, or, for an equation that is solved until every row is, a loop without an end."""
    example = examples()[name]
    torch.manual_seed(0)
    transform, others = randomise(example.make()).eval(), [0, 1, 3, 4]
    x, context = batch(5, *example.event_shape), context_for(example.context_features, 5)
    spoiled = x.clone()
    spoiled[2].flatten()[0] = NAN
    for function in (transform, transform.inverse):
        try:
            right, right_log_det = function(x.clone(), context)
        except InverseNotAvailable:
            continue
        if right.shape != x.shape:
            continue
        made, log_det = function(spoiled.clone(), context)
        assert_close(made[others], right[others])
        assert_close(log_det[others], right_log_det[others])
        assert made[2].isnan().any()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", flow_names())
def test_samples_are_finite_at_the_start_and_at_any_parameters(name, scale):
    torch.manual_seed(0)
    flow = build_flow(name, 3, layers=8, hidden_features=(8, 8)).eval()
    if scale is not None:
        randomise(flow, scale=scale).float()
    with torch.no_grad():
        samples, log_prob = flow.sample_and_log_prob(500)
    assert samples.isfinite().all() and log_prob.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("preprocess", preprocessings())
@pytest.mark.parametrize("name", OURS)
def test_our_flows_take_nan_and_inf_in_either_direction(name, preprocess, bad):
    """NaN gives NaN; ±inf has no density, or is refused where data have a range. Each row alone, gradients too."""
    flow, x = small(name, preprocess=preprocessings()[preprocess]), torch.rand(5, 4, dtype=torch.float64)
    spoiled, others = x.clone(), [0, 1, 3, 4]
    spoiled[2, 1] = bad
    if bad == bad and preprocess in ("logit", "probit", "marginals"):
        with pytest.raises(ValueError, match="takes data in"):
            flow.log_prob(spoiled)
    else:
        log_prob = flow.log_prob(spoiled.requires_grad_())
        assert_close(log_prob[others], flow.log_prob(x)[others])
        assert log_prob[2].isnan() if bad != bad else log_prob[2] == -INF
        (gradient,) = torch.autograd.grad(log_prob[others].sum(), spoiled)
        assert gradient[others].isfinite().all()
    noise = x.clone()
    noise[2, 1] = bad
    made, log_det = flow.transform.inverse(noise)
    right, right_log_det = flow.transform.inverse(x)
    assert_close(made[others], right[others])
    assert_close(log_det[others], right_log_det[others])
    assert bad == bad or made[2].isnan().any()


def test_an_untrained_naf_of_many_layers_finds_a_datum_for_any_noise():
    """Its tails are flat, so that noise of a few standard deviations comes from far away."""
    torch.manual_seed(0)
    flow = build_flow("zuko-naf", 2, layers=16, hidden_features=(16, 16)).double().eval()
    noise = torch.tensor([[4.0, -4.0], [-4.0, 4.0], [4.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
    with torch.no_grad():
        x, _ = flow.transform.inverse(noise)
        assert_close(flow.transform(x)[0], noise, rtol=0, atol=1e-6)
    assert x.abs().max() > 1e6


# ---------------------------------------------------------------- the fuzz

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 4.0, -4.0, 4.7534243, -4.7534243, 1 - 2**-24, 1 + 2**-23]),
    st.builds(lambda sign, size: sign * 10.0**size, st.sampled_from([-1.0, 1.0]), st.integers(-46, 30)),
    st.floats(-30, 30, width=32),
)


@cache
def start(name, features, depth, masks, **options):
    """A flow and a copy of its parameters. To build one takes longer than to score with it."""
    generator = torch.Generator().manual_seed(7)
    random = random_mask(features, generator)
    masks = {
        "alternating": None,
        "random": (random, 1 - random),
        "half, always the same": (half_mask(features),),
        "none unchanged": (torch.zeros(features), random),
    }[masks]
    flow = build_flow(name, features, layers=depth, hidden_features=(8, 8), masks=masks, **options).double().eval()
    return flow, [parameter.detach().clone() for parameter in flow.parameters()]


@st.composite
def flows(draw, depths=(1, 2, 5, 100), scales=(1.0, 1.0, 5.0, 50.0)):
    """A flow of ours, with weights of any size, and the dtype that it computes in."""
    name, features = draw(st.sampled_from(OURS)), draw(st.sampled_from([1, 2, 3, 5, 1000]))
    if name != "masked-autoregressive":
        features = max(features, 2)
    depth = draw(st.sampled_from(depths)) if features < 1000 else 2
    masks = draw(st.sampled_from(["alternating", "random", "half, always the same", "none unchanged"]))
    options = draw(st.sampled_from([{}, {"scale_bound": None}])) if name == "masked-affine" else {}
    flow, parameters = start(name, features, depth, masks, **options)
    flow.to(draw(st.sampled_from([torch.float32, torch.float64]))).zero_grad()
    scale, generator = draw(st.sampled_from(scales)), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        for parameter, value in zip(flow.parameters(), parameters, strict=True):
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            parameter.copy_(scale * (value + 0.3 * noise))
    return flow


def points(data, flow, values=VALUES, rows=4):
    features, dtype = flow.event_shape[0], next(flow.parameters()).dtype
    some = data.draw(st.lists(st.lists(values, min_size=5, max_size=5), min_size=rows, max_size=rows))
    return torch.tensor(some, dtype=torch.float64).repeat(1, features // 5 + 1)[:, :features].to(dtype)


@FUZZ
@given(data=st.data(), flow=flows(), autocast=st.booleans())
def test_fuzz_every_finite_point_has_a_density(data, flow, autocast):
    """log p is finite or −inf, never NaN, never +inf; where it is above −10⁶, its gradients are finite, too."""
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    x = points(data, flow)
    with precision:
        log_prob = flow.log_prob(x)
    assert not log_prob.isnan().any() and log_prob.max() < INF, (x[log_prob.isnan()], log_prob)
    x = x[log_prob > -1e6].requires_grad_()
    if len(x):
        with precision:
            flow.log_prob(x).sum().backward()
        assert x.grad.isfinite().all()
        for name, parameter in flow.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@FUZZ
@given(data=st.data(), flow=flows(depths=(1, 2, 5), scales=(0.3, 1.0)))
def test_fuzz_round_trip(data, flow):
    """x → noise → x: the error is what one rounding of the noise is magnified to, times a bounded factor."""
    x = points(data, flow, st.floats(-3, 3, width=32))
    with torch.no_grad():
        noise, _ = flow.transform(x)
        back, log_det = flow.transform.inverse(noise)
        rounding = torch.finfo(x.dtype).eps * (1 + noise.abs())
        moved = [flow.transform.inverse(noise + sign * rounding)[0] for sign in (-1, 1)]
    bounded = torch.stack(moved).isfinite().all(2).all(0)  # where it is so steep that a rounding leads to inf, all goes
    back, x, moved = back[bounded], x[bounded], [other[bounded] for other in moved]
    assert back.isfinite().all() and log_det[bounded].isfinite().all()
    if not len(x):
        return
    unavoidable = max((other - back).abs().max() for other in moved) + torch.finfo(x.dtype).eps
    factor = ((back - x).abs().max() / unavoidable).item()
    target(math.log10(factor + 1e-3), label="log10 of the round trip's error over that of one rounding")
    assert factor < 1e4


# ---------------------------------------------------------------- splines


def spline(knots, dtype=torch.float64, bins=8, **options):
    """An elementwise spline with these raw knots, ``(T, 3K − 1)``."""
    features = len(knots)
    layer = MaskedSplineCouplingLayer(MLP(0, knots.numel(), ()), torch.zeros(features), bins, **options).to(dtype)
    with torch.no_grad():
        layer.conditioner[-1].bias.copy_(knots.T.flatten())
    return layer


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 3, 8, 16])
def test_the_spline_is_nflows_where_nflows_has_an_answer(bins, inverse):
    knots = batch(6, 3 * bins - 1, seed=bins)
    layer, z = spline(knots, bins=bins), (2 * batch(200, 6)).clamp(-3.99, 3.99).requires_grad_()
    widths, heights, derivatives = knots.expand(200, -1, -1).split((bins, bins, bins - 1), dim=-1)
    theirs, their_log_det = rational_quadratic_spline(
        z, widths, heights, pad(derivatives, (1, 1)) + math.log(math.expm1(1 - 1e-3)), inverse, -4, 4, -4, 4
    )
    ours, log_det = (layer.inverse if inverse else layer)(z)
    assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert_close(log_det, their_log_det.sum(1), rtol=0, atol=1e-9)
    assert_close(
        torch.autograd.grad(log_det.sum() + ours.sum(), z),
        torch.autograd.grad(their_log_det.sum() + theirs.sum(), z),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("size", [5.0, 50.0, 1e4])
def test_a_spline_inverts_its_own_output_whatever_its_knots(size):
    """In float32, where the textbook's discriminant is negative by rounding."""
    generator = torch.Generator().manual_seed(0)
    layer = spline(size * torch.randn(200, 23, generator=generator), torch.float32)
    z = 2 * torch.randn(2000, 200, generator=generator)
    with torch.no_grad():
        y, log_det = layer(z)
        back, back_log_det = layer.inverse(y)
        again, _ = layer(back)
        exact, exact_log_det = layer.double()(z.double())
    for values in (y, log_det, back, back_log_det):
        assert values.isfinite().all()
    assert_close(again, y, rtol=0, atol=1e-2)
    assert_close(y.double(), exact, rtol=0, atol=1e-2)
    assert_close(log_det.double(), exact_log_det, rtol=0, atol=2.0)


def test_far_rows_of_a_float32_spline_flow_are_scored_as_in_float64():
    flow = small("masked-spline", 2)
    x = torch.tensor([1.0, 3.0, 10.0, 30.0]).repeat_interleave(2000)[:, None] * batch(8000, 2)
    with torch.no_grad():
        exact = flow.log_prob(x)
        log_prob = flow.float().log_prob(x.float())
    assert_close(log_prob.double(), exact, rtol=1e-4, atol=2e-2)


def test_impossible_splines_are_refused():
    mask = torch.zeros(1)
    for options, message in [
        ({"bins": 2.5}, "bins must be an integer, not 2.5"),
        ({"bins": 0}, "bins must be at least 2, not 0"),
        ({"tail_bound": INF}, "tail_bound must be positive and finite, not inf"),
        ({"tail_bound": NAN}, "tail_bound must be positive, not nan"),
        ({"minimum": 0.2, "bins": 5}, "5 bins of at least 0.2 each do not fit: minimum must be below 1 / bins"),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskedSplineCouplingLayer(MLP(0, 14), mask, **options)
    for bins in (2.5, 1):
        with pytest.raises((ValueError, TypeError), match="bins must be"):
            build_flow("masked-histogram", 2, bins=bins)
    assert MaskedSplineCouplingLayer(MLP(0, 14), mask, bins=np.int64(5)).bins == 5


# ---------------------------------------------------------------- histograms


def histogram(theta, dtype=torch.float64):
    bins, features = len(theta), theta.shape[1]
    layer = MaskedHistogramCouplingLayer(
        MLP(0, theta.numel(), ()), torch.zeros(features), torch.linspace(0, 1, bins + 1)[1:-1]
    )
    with torch.no_grad():
        layer.conditioner[-1].bias.copy_(theta.flatten())
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_a_histogram_has_no_empty_bin(size, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = histogram(size * torch.randn(16, 100, generator=generator), dtype)
    z = torch.cat((torch.randn(500, 100, generator=generator), torch.linspace(-6, 6, 500)[:, None].expand(-1, 100)))
    z = z.to(dtype).requires_grad_()
    for direction, opposite in ((layer, layer.inverse), (layer.inverse, layer)):
        y, log_det = direction(z)
        back, back_log_det = opposite(y)
        for values in (y, log_det, back, back_log_det, torch.autograd.grad(log_det.sum() + y.sum(), z)[0]):
            assert values.isfinite().all()
        if size == 1.0:  # further out Φ has too few digits left
            assert_close(back[z.abs() < 4], z[z.abs() < 4], rtol=0, atol=1e-6 if dtype == torch.float64 else 0.02)


def test_a_histogram_leaves_far_points_where_they_are():
    flow = small("masked-histogram", 2).float()
    log_prob = flow.log_prob(torch.tensor([[1e20, 0.0], [1e10, 0.0], [0.0, -1e30]]))
    assert log_prob[0] == -INF and log_prob[1].isfinite() and log_prob[2] == -INF


# ---------------------------------------------------------------- the borders of data that have a range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 0.01])
@pytest.mark.parametrize("kind", [Logit, Probit])
def test_the_unit_interval_takes_its_borders_and_what_it_makes_itself(kind, alpha, dtype):
    for high in (1.0, 256 / 255):
        transform = kind(alpha, high)
        x = torch.tensor([[0.0], [high], [high / 2]], dtype=dtype).requires_grad_()
        y, log_det = transform(x)
        assert y.isfinite().all() and log_det.isfinite().all()
        assert torch.autograd.grad(log_det.sum() + y.sum(), x)[0].isfinite().all()
        noise = torch.cat((torch.randn(1000, 1), torch.linspace(-12, 12, 2001)[:, None])).to(dtype)
        made, _ = transform.inverse(noise)
        y, log_det = transform(made)
        assert y.isfinite().all() and log_det.isfinite().all()
        reached = (noise.abs() < 4) & (alpha >= 1e-6)
        assert_close(y[reached], noise[reached], rtol=0, atol=0.02 if dtype == torch.float32 else 1e-6)


def test_marginals_take_what_they_make_themselves():
    marginals = Marginals(torch.tensor([[0.5, 0.2, 0.3], [1e-7, 0.9, 0.1]]), high=256 / 255)
    noise = torch.linspace(-12, 12, 2001)[:, None].expand(-1, 2)
    y, log_det = marginals(marginals.inverse(noise)[0])
    assert y.isfinite().all() and log_det.isfinite().all()
    edges = Marginals(torch.tensor([[5.0, 2.0, 3.0]])).edges(3)  # masses that do not add up to 1 are made to
    assert_close(edges, torch.tensor([[0.5, 0.7]], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["logit", "probit", "marginals"])
def test_data_out_of_range_are_refused_beside_a_nan(kind):
    transform = preprocessings()[kind]
    x = torch.full((3, 4), 0.5)
    x[0, 0] = NAN
    y, log_det = transform(x)
    assert y[0, 0].isnan() and log_det[0].isnan() and log_det[1:].isfinite().all()
    for wrong in (-5.0, 1.5, INF, -1e-3):
        x[1, 1] = wrong
        with pytest.raises(ValueError, match=r"this flow takes data in \[0, 1(\.0)?\], not in \["):
            transform(x)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, [1.0, INF], "std must be positive and finite, but holds inf"),
        (0.0, [1.0, -2.0], "std must be positive and finite, but holds -2"),
        (NAN, 1.0, "mean must be finite, but holds nan"),
    ],
)
def test_a_standardisation_by_what_is_no_number_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Standardize(torch.tensor(mean), torch.tensor(std))


# ---------------------------------------------------------------- samples in parts


@pytest.mark.parametrize("name", OURS)
def test_samples_in_parts_keep_each_context_in_its_row(name):
    flow, context = small(name, context_features=3), context_for(3, 5)
    with torch.no_grad():
        for size in (1, 4, 5, 10, 11):
            samples = flow.sample(10, context, batch_size=size)
            assert samples.shape == (5, 10, 4)
        # each sample, taken back with its row's context, is the base's noise: two contexts swapped would not be
        torch.manual_seed(3)
        samples = flow.sample(10, context, batch_size=4)
        torch.manual_seed(3)
        noise = torch.cat([flow.base.sample(n, context) for n in (4, 4, 2)], dim=1)
        again = flow.encode(samples.flatten(0, 1), context.repeat_interleave(10, dim=0))
    assert_close(again, noise.flatten(0, 1), rtol=0, atol=1e-5)
    assert small(name).sample(10, batch_size=4).shape == (10, 4)
    with pytest.raises(ValueError, match="batch_size must be a positive integer, not 0"):
        flow.sample(10, context, batch_size=0)


# ---------------------------------------------------------------- dtypes, devices and types


@pytest.mark.parametrize("name", flow_names())
def test_what_is_no_tensor_of_the_flows_dtype_is_named(name):
    flow, conditional = small(name).float(), small(name, context_features=3).float()
    x, context = torch.rand(5, 4), torch.rand(5, 3)
    calls = {
        "inputs": [lambda x: flow.log_prob(x), lambda x: flow.encode(x)],
        "context": [
            lambda c: conditional.log_prob(x, c),
            lambda c: conditional.sample(2, c),
            lambda c: conditional.sample_and_log_prob(2, c),
            lambda c: conditional.encode(x, c),
        ],
    }
    for role, value in {"inputs": x, "context": context}.items():
        for call in calls[role]:
            with pytest.raises(TypeError, match=f"{role} of this flow must be a torch.Tensor, not a numpy.ndarray"):
                call(value.numpy())
            with pytest.raises(TypeError, match=f"{role} of this flow must be a torch.Tensor, not a list"):
                call(value.tolist())
            with pytest.raises(ValueError, match=rf"this flow is on cpu, its {role} on meta: give {role}\.to"):
                call(value.to("meta"))
            for dtype in (torch.float64, torch.int64):
                try:  # torch may promote it, or a library convert it; if not, the error says what to do
                    call(value.to(dtype))
                except TypeError as error:
                    message = f"this flow is of torch.float32, its {role} of {dtype}: give {role}.to(torch.float32)"
                    assert message in str(error)


@pytest.mark.parametrize("preprocess", ["none", "logit", "marginals"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_our_flows_refuse_another_dtype(name, dtype, preprocess):
    flow = small(name, preprocess=preprocessings()[preprocess]).float()
    if (dtype, preprocess) != (torch.bfloat16, "marginals"):  # whose float32 tables make float32 of it
        with pytest.raises(TypeError, match=f"this flow is of torch.float32, its inputs of {dtype}"):
            flow.log_prob(torch.ones(5, 4).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        flow.log_prob(torch.rand(5, 4))


def test_a_flow_of_two_dtypes_says_so():
    flow = build_flow("masked-affine", 3, preprocess=Standardize.of(batch(10, 3)))
    with pytest.raises(
        TypeError, match=r"holds tensors of torch.float32 and of torch.float64.*flow.to\(torch.float32\)"
    ):
        flow.log_prob(torch.randn(4, 3))
    flow.to(torch.float32).log_prob(torch.randn(4, 3))


# ---------------------------------------------------------------- errors that are not about a shape


def test_only_an_error_about_the_inputs_shape_is_named_one():
    wrong = RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1")
    named = pytest.raises(ValueError, match=r"that layer does not take inputs of shape \(2, 3\)")
    with named, naming_shape(torch.ones(2, 3), "that layer"):
        raise wrong
    others = [
        (torch.ones(0, 3), RuntimeError("cannot reshape tensor of 0 elements into shape [0, -1]")),
        (torch.tensor([[NAN, 1.0]]), IndexError("index -1 is out of bounds for dimension 1 with size 9")),
        (torch.ones(2, 3), RuntimeError("vmap: It looks like you're calling .item() on a Tensor of this shape")),
        (torch.ones(2, 3), RuntimeError("a variable of shape [3] has been modified by an inplace operation")),
        (torch.ones(2, 3), RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")),
    ]
    for inputs, error in others:
        with pytest.raises(type(error)) as caught, naming_shape(inputs, "that layer"):
            raise error
        assert caught.value is error

    def inside(row):
        with naming_shape(row, "that layer"):
            raise wrong

    with pytest.raises(RuntimeError, match="The size of tensor a"):
        torch.func.vmap(inside)(torch.ones(2, 3))


# ---------------------------------------------------------------- devices


def test_an_autoregressive_layer_is_built_on_the_default_device():
    with torch.device("meta"):
        flow = build_flow("masked-autoregressive", 5, 2, layers=2)
        x, context = torch.empty(3, 5), torch.empty(3, 2)
        assert {tensor.device.type for tensor in (*flow.parameters(), *flow.buffers())} == {"meta"}
        assert flow.log_prob(x, context).device.type == flow.sample(4, context).device.type == "meta"


@pytest.mark.parametrize("preprocess", preprocessings())
@pytest.mark.parametrize("name", OURS)
def test_no_value_is_asked_for_in_a_call(name, preprocess):
    """On the meta device there are none: so nothing waits for a GPU, either, and no two devices meet."""
    flow = small(name, context_features=2, preprocess=preprocessings()[preprocess]).to("meta")
    x, context = torch.empty(3, 4, device="meta").double(), torch.empty(3, 2, device="meta").double()
    assert flow.log_prob(x, context).shape == (3,) and flow.sample(5, context).shape == (3, 5, 4)


def test_a_loaded_order_is_the_one_that_is_followed():
    saved, loaded = (MaskedAutoregressiveLayer(AutoregressiveMLP(torch.tensor(o))) for o in ([2, 0, 1], [0, 1, 2]))
    randomise(saved)
    loaded.double().load_state_dict(saved.state_dict())
    assert loaded.conditioner.sequence == [2, 0, 1]
    z = batch(4, 3)
    assert_close(loaded.inverse(loaded(z)[0])[0], z)


def test_a_scale_stays_within_float32s_range():
    layer = PackedAffineCouplingLayer(MLP(1, 2), torch.tensor([1.0, 0.0]), scale_bound=None)
    with torch.no_grad():
        layer.conditioner[-1].bias.copy_(torch.tensor([1e6, 0.0]))
    y, log_det = layer.inverse(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert log_det.tolist() == [-80.0, -80.0] and y.isfinite().all() and y[1, 1] > 0
    assert_close(layer(y)[0], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
