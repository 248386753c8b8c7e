"""The laws that every layer, every bridge and every flow of the catalogue is held to.

1. Contract: shapes, dtype and device; inverse and forward undo each other; both log-determinants are those of
   autograd's Jacobian; gradients reach every parameter; a ``state_dict`` carries the whole state; no input is changed.
2. Round trip: a transform that goes to a library and comes back computes what it computed before.
3. Direction: a library's own density, around the transform that it was given, is nflows' density. Laws 1 and 2 would
   hold for the inverse of a bijection, too.
4. Normalised: a density integrates to 1, and samples come with the log_prob that they have.
5. Context: two contexts give two densities, and a batch of contexts gives what the same contexts give one by one.
6. Device: on a device other than the CPU everything is computed, to the same numbers, and no tensor of the CPU is met.

The mathematics, autograd's Jacobian and the quadrature among it, is that of ``adapters.check.measure``.

They are checked in float64 (law 6 in float32), at parameters moved away from their start by ``randomise``, and again
after some training steps: a layer can be right at its start and wrong later. Each law is a function here, which raises
an ``AssertionError`` where it is broken. ``tests/test_laws.py`` applies them.
"""

import math
from collections.abc import Callable

import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.testing import assert_close

from adapters.check.laws.density import MASS
from adapters.check.measure import jacobian, log_abs_det, mass_error, move, one_by_one

Pass = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # a transform's forward or inverse


def law_1_contract(transform: Transform, x: Tensor, context: Tensor | None = None, tolerance: float = 1e-6) -> None:
    """Law 1, for a transform of all numbers, at the points x, ``(batch, *event)``, in both directions.

    The tolerance is of the round trip, which some libraries compute by bisection.
    """
    for function, back in ((transform, transform.inverse), (transform.inverse, transform)):
        transform.zero_grad()
        y, log_det = assert_inputs_unchanged(function, x, context)
        assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
        assert log_det.shape == x.shape[:1] and log_det.dtype == x.dtype and log_det.device == x.device
        assert not torch.allclose(x, y, atol=1e-3), "the transform is at the identity, where nothing is tested"
        again, back_log_det = back(y, context)
        assert_close(again, x, atol=tolerance, rtol=tolerance)
        assert_close(back_log_det, -log_det, atol=tolerance, rtol=tolerance)
        assert log_det.abs().min() > 1e-6, "the log-determinant is zero, where nothing is tested"
        assert_close(log_det, autograd_log_det(function, x, context), atol=1e-7, rtol=1e-6)
        (y.pow(2).sum() + log_det.sum()).backward()
        for name, parameter in transform.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"


def law_1_state_dict(module: nn.Module, made_anew: nn.Module, call: Callable) -> None:
    """Law 1, its part on the state: another module of the same kind, given the ``state_dict``, computes the same."""
    made_anew.load_state_dict(module.state_dict())
    assert_close(call(made_anew), call(module), rtol=0, atol=0)


def law_2_round_trip(transform: Transform, back: Transform, x: Tensor, context: Tensor | None = None) -> None:
    """Law 2: ``back``, which is ``as_transform(to_library(name, transform))``, computes what ``transform`` computes."""
    assert_close(back(x, context), transform(x, context))
    assert_close(back.inverse(x, context), transform.inverse(x, context))


def law_3_direction(flow: Flow, native_log_prob: Tensor, x: Tensor, context: Tensor | None = None) -> None:
    """Law 3: the density of x that a library's own flow class computes is the one that nflows' computes."""
    log_prob = flow.log_prob(x, context)
    assert log_prob.shape == x.shape[:1] and log_prob.dtype == x.dtype and log_prob.isfinite().all()
    assert_close(native_log_prob.to(log_prob), log_prob)


def law_4_normalised(flow: Flow, cells: int = 400, edge: float = 20.0) -> None:
    """Law 4, for a flow of two dimensions: ∫ exp(log_prob) = 1, by quadrature on a grid over [−edge, edge]²."""
    corner = torch.full((2,), edge, dtype=torch.float64)
    with torch.no_grad():
        total, error = mass_error(flow.log_prob, flow.sample(20_000), -corner, corner, cells)
    assert_close(total, 1.0, atol=2e-3, rtol=0)
    assert error < MASS, "the samples are not of this density"


def law_4_samples(
    flow: Flow, event_shape: tuple[int, ...], context: Tensor | None = None, tolerance: float = 1e-6
) -> None:
    """Law 4, its part on samples: ``sample_and_log_prob`` gives the ``log_prob`` of the samples that it gives."""
    number = 6
    samples, log_prob = assert_inputs_unchanged(lambda rows: flow.sample_and_log_prob(number, rows), context)
    leading = (number,) if context is None else (len(context), number)
    assert samples.shape == (*leading, *event_shape) and samples.dtype == log_prob.dtype == torch.float64
    repeated = None if context is None else context.repeat_interleave(number, dim=0)
    again = flow.log_prob(samples.reshape(-1, *event_shape), repeated)
    assert_close(log_prob, again.view(leading), atol=tolerance, rtol=tolerance)
    assert flow.sample(number, context).shape == samples.shape


def law_5_context(flow: Flow, x: Tensor, contexts: Tensor) -> None:
    """Law 5, on densities: each row's context decides its density, whatever the other rows of the batch are."""
    together = assert_inputs_unchanged(flow.log_prob, x, contexts)
    assert_close(together, torch.cat([*one_by_one(flow.log_prob, x, contexts)]), atol=1e-6, rtol=1e-6)
    assert flow.log_prob(x[:1].expand_as(x), contexts).diff().abs().min() > 1e-6, "two contexts give one density"


def law_5_samples(flow: Flow, contexts: Tensor) -> None:
    """Law 5, on samples, several for each context: each is made with its own row's context, not with another one's."""
    number = 7
    torch.manual_seed(3)
    samples = flow.sample(number, contexts)
    torch.manual_seed(3)
    noise = flow.base.sample(number, contexts)
    repeated = contexts.repeat_interleave(number, dim=0)
    assert_close(flow.transform(samples.flatten(0, 1), repeated)[0], noise.flatten(0, 1), atol=1e-5, rtol=1e-5)


def law_6_device(transform: Transform, device: torch.device, x: Tensor, context: Tensor | None = None) -> None:
    """Law 6: both directions of a float32 transform give on the device what they give on the CPU. It is moved there."""
    expected = [function(x, context) for function in (transform, transform.inverse)]
    transform.to(device)
    x, context = x.to(device), None if context is None else context.to(device)
    for function, results in zip((transform, transform.inverse), expected, strict=True):
        y, log_det = function(x, context)
        assert y.device.type == log_det.device.type == device.type
        assert_close((y.detach().cpu(), log_det.detach().cpu()), tuple(result.detach() for result in results))
        (y.sum() + log_det.sum()).backward()


# What the laws are checked with


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The module in float64, trained parameters moved by N(0, scale²): nothing passes because it is the identity."""
    move(module.double(), scale, seed)
    return module


def train(flow: Flow, event_shape: tuple[int, ...], context_features: int | None = None, steps: int = 5) -> Flow:
    """The flow in float64, after some steps of Adam on standard normal data."""
    flow.double()
    parameters = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        flow.log_prob(batch(32, *event_shape, seed=9), context_for(context_features, 32)).mean().neg().backward()
        optimiser.step()
    return flow


def batch(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in float64, the same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context_for(features: int | None, rows: int, seed: int = 2) -> Tensor | None:
    """A context of that many rows, the same in each call; ``None`` for a transform that takes none."""
    return None if features is None else batch(rows, features, seed=seed)


def assert_inputs_unchanged(function: Callable, *inputs: Tensor | None):
    """What the function returns, after a check that it has changed none of the tensors that it was given."""
    given = [None if tensor is None else tensor.clone() for tensor in inputs]
    returned = function(*given)
    for tensor, before in zip(given, inputs, strict=True):
        assert tensor is None or torch.equal(tensor, before), "the call has changed its inputs"
    return returned


def autograd_log_det(function: Pass, x: Tensor, context: Tensor | None) -> Tensor:
    """log|det J| of ``function(x, context) -> (y, log_det)`` at each row, from autograd's Jacobian."""
    return log_abs_det(jacobian(function, x, context))


def numbers_of_rows(event_shape: tuple[int, ...], context_features: int | None = None) -> list[int]:
    """Numbers of rows that coincide with something, and 5, which mostly does not."""
    return sorted({1, 5, *event_shape, math.prod(event_shape), context_features or 1})


def assert_rows_apart(function: Callable, inputs: Tensor, context: Tensor | None, tolerance: float = 1e-6) -> None:
    """``function(inputs, context)``, a tensor or two, is what it gives for each row by itself."""
    alone = list(one_by_one(function, inputs, context))
    together = function(inputs, context)
    if isinstance(together, Tensor):
        together, alone = (together,), [(each,) for each in alone]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert whole.shape[0] == len(inputs)
        assert_close(whole, torch.cat(parts), atol=tolerance, rtol=tolerance, equal_nan=True)


def assert_rows_apart_both_ways(
    forward: Pass, inverse: Pass | None, x: Tensor, context: Tensor | None, tolerance: float = 1e-6
) -> None:
    """``assert_rows_apart`` of a pass, and of the one back if there is one, with one log-determinant for each row."""
    assert_rows_apart(forward, x, context, tolerance)
    noise, log_det = forward(x, context)
    assert log_det.shape == x.shape[:1]
    if inverse is not None:
        assert_rows_apart(inverse, noise, context, tolerance)
        assert inverse(noise, context)[1].shape == x.shape[:1]
