"""Is my layer right? Planted mistakes are each named, and no right layer of any library is accused.

A planted mistake is one direction of the exercise's layer, written wrong: a row of ``PLANTED``, which is checked as a
layer of vectors and as one of images. Below them stand those that need a class, a spline or a flow.
"""

import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tyro
from nflows.transforms import CompositeTransform, Sigmoid, Transform
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as distributions
from torch.nn.functional import softsign

import adapters
from adapters import MaskedCouplingLayer, build_flow, check, checkerboard_mask, flow_names
from adapters.check import WrongLayer, fresh
from adapters.check.__main__ import main
from adapters.check.evidence import Evidence
from adapters.check.laws import LAWS
from adapters.imports import import_zuko
from adapters.layers.spline import MaskedSplineCouplingLayer, spline_parameters
from adapters.networks import MLP
from adapters.own import Network, Offer, load, make
from tests.counting import counted
from tests.examples import examples, models
from tests.students_layer import LAYER

Net = Callable[[Tensor], Tensor]
Direction = Callable[[Tensor, Tensor, Net, Net], tuple[Tensor, Tensor]]
SHAPES = {"vector": (4,), "image": (3, 4, 5)}


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def forward(z, b, s, t):
    """Equations 15 and 17."""
    return b * z + (1 - b) * (z * s(b * z).exp() + t(b * z)), total((1 - b) * s(b * z))


def inverse(z, b, s, t):
    """Equation 16, and minus 17."""
    return b * z + (1 - b) * ((z - t(b * z)) * (-s(b * z)).exp()), -total((1 - b) * s(b * z))


class Hand(nn.Module):
    """The exercise's layer, of two functions of z, b, s and t."""

    mask: Tensor
    scale_net: nn.Module
    translation_net: nn.Module

    def __init__(self, event_shape: tuple[int, ...], forward: Direction = forward, inverse: Direction = inverse):
        super().__init__()
        self.scale_net, self.translation_net = Network(Offer(event_shape), True), Network(Offer(event_shape), False)
        self.register_buffer("mask", checkerboard_mask(*event_shape))
        self.directions = forward, inverse

    def forward(self, z):
        return self.directions[0](z, self.mask, self.scale_net, self.translation_net)

    def inverse(self, z):
        return self.directions[1](z, self.mask, self.scale_net, self.translation_net)


def returning(log_det: Callable[[Tensor, Tensor], Tensor]) -> Direction:
    """``forward``, with another log-determinant: a function of b and s(b ⊙ z)."""
    return lambda z, b, s, t: (forward(z, b, s, t)[0], log_det(b, s(b * z)))


def undoing(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Direction:
    """``inverse``, with other outputs where b = 0: a function of z', s and t."""

    def wrong(z, b, s, t):
        return b * z + (1 - b) * formula(z, s(b * z), t(b * z)), -total((1 - b) * s(b * z))

    return wrong


def redrawn(direction: Direction) -> Direction:
    return lambda z, b, s, t: direction(z, b.flatten()[torch.randperm(b.numel())].view_as(b), s, t)


def within_no_grad(network: Net) -> Net:
    def cut(z):
        with torch.no_grad():
            return network(z)

    return cut


def detached_output(z, b, s, t):
    y, log_det = forward(z, b, s, t)
    return y.detach(), log_det


def in_float32(direction: Direction) -> Direction:
    def rounded(z, b, s, t):
        y, log_det = direction(z, b, lambda x: s(x).float(), lambda x: t(x).float())
        return y.to(z.dtype), log_det.to(z.dtype)

    return rounded


def in_place(z, b, s, t):
    y, log_det = forward(z, b, s, t)
    z[...] = y
    return z, log_det


def off_by_a_tenth(z, b, s, t):
    y, log_det = forward(z, b, s, t)
    return y, log_det + 0.1


SIGN, BATCH, MEAN = (
    "wrong sign of the log-determinant",
    "log-determinant summed over the batch",
    "log-determinant is a mean",
)
OFF = "log-determinant is off by a constant factor"
EVENT, FACTOR, CUT = (
    "log-determinant of the wrong event dimensions",
    "the factor (1 − b) is missing",
    "detached, or under no_grad",
)

PLANTED = {  # what is wrong: forward, inverse, the mistake's name, and the equation it says
    "sign": (returning(lambda b, s: -total((1 - b) * s)), inverse, SIGN, 17),
    "sign of inverse": (forward, lambda *z: (inverse(*z)[0], -inverse(*z)[1]), SIGN, 17),
    "batch sum": (returning(lambda b, s: ((1 - b) * s).sum().expand(len(s))), inverse, BATCH, 17),
    "batch sum, a number": (returning(lambda b, s: ((1 - b) * s).sum()), inverse, BATCH, None),
    "sum over dimension 0": (returning(lambda b, s: ((1 - b) * s).sum(0)), inverse, BATCH, None),
    "mean": (returning(lambda b, s: ((1 - b) * s).flatten(1).mean(1)), inverse, MEAN, 17),
    "mean over rows": (returning(lambda b, s: total((1 - b) * s).mean().expand(len(s))), inverse, MEAN, 17),
    "mean, a number": (returning(lambda b, s: total((1 - b) * s).mean()), inverse, MEAN, None),
    "factor": (returning(lambda b, s: total(s)), inverse, FACTOR, 17),
    "factor in inverse": (forward, lambda *z: (inverse(*z)[0], -total(z[2](z[1] * z[0]))), FACTOR, 17),
    "factor in outputs": (
        lambda z, b, s, t: (b * z + z * s(b * z).exp() + t(b * z), total((1 - b) * s(b * z))),
        inverse,
        FACTOR,
        15,
    ),
    "b for 1 − b": (
        returning(lambda b, s: total(b * s)),
        inverse,
        "b stands where 1 − b should, in the log-determinant",
        17,
    ),
    "left out": (returning(lambda b, s: s.new_zeros(len(s))), inverse, "log-determinant is left out", 17),
    "not a logarithm": (
        returning(lambda b, s: total((1 - b) * s).exp()),
        inverse,
        "the determinant instead of its logarithm",
        None,
    ),
    "twice": (returning(lambda b, s: 2 * total((1 - b) * s)), inverse, OFF, 17),
    "a part of it": (returning(lambda b, s: 0.7 * total((1 - b) * s)), inverse, OFF, 17),
    "to base 2": (returning(lambda b, s: total((1 - b) * s) / math.log(2)), inverse, OFF, None),
    "scales summed": (
        returning(lambda b, s: total((1 - b) * s.exp())),
        inverse,
        "the scale is summed instead of its logarithm",
        17,
    ),
    "a sigmoid scale": (
        lambda z, b, s, t: (b * z + (1 - b) * (z * torch.sigmoid(s(b * z)) + t(b * z)), total((1 - b) * s(b * z))),
        lambda z, b, s, t: (b * z + (1 - b) * ((z - t(b * z)) / torch.sigmoid(s(b * z))), -total((1 - b) * s(b * z))),
        "log-determinant of another s than the one used",
        17,
    ),
    "clamped": (
        lambda z, b, s, t: (b * z + (1 - b) * forward(z, b, s, t)[0].clamp(-0.5, 0.5), forward(z, b, s, t)[1]),
        inverse,
        "outputs are cut off",
        None,
    ),
    "rounded": (
        lambda z, b, s, t: (b * z + (1 - b) * (100 * forward(z, b, s, t)[0]).round() / 100, forward(z, b, s, t)[1]),
        inverse,
        "outputs are cut off",
        None,
    ),
    "before tanh": (
        lambda z, b, s, t: (
            b * z + (1 - b) * (z * s(b * z).tanh().exp() + t(b * z)),
            total((1 - b) * s(b * z)),
        ),
        lambda z, b, s, t: inverse(z, b, lambda x: s(x).tanh(), t),
        "log-determinant of another s than the one used",
        17,
    ),
    "softsign, (1 − b) missing": (
        lambda z, b, s, t: (forward(z, b, lambda x: softsign(s(x)), t)[0], total(softsign(s(b * z)))),
        lambda z, b, s, t: inverse(z, b, lambda x: softsign(s(x)), t),
        FACTOR,
        17,
    ),
    "s at unchanged coordinates": (
        lambda z, b, s, t: (z * s(b * z).exp() + (1 - b) * t(b * z), total(s(b * z))),
        lambda z, b, s, t: ((z - (1 - b) * t(b * z)) * (-s(b * z)).exp(), -total(s(b * z))),
        FACTOR,
        15,
    ),
    "t at unchanged coordinates": (
        lambda z, b, s, t: (z * ((1 - b) * s(b * z)).exp() + t(b * z), total((1 - b) * s(b * z))),
        lambda z, b, s, t: ((z - t(b * z)) * ((b - 1) * s(b * z)).exp(), -total((1 - b) * s(b * z))),
        FACTOR,
        15,
    ),
    "networks see 1 − b": (
        lambda z, b, s, t: forward(z, b, lambda _: s((1 - b) * z), lambda _: t((1 - b) * z)),
        lambda z, b, s, t: inverse(z, b, lambda _: s((1 - b) * z), lambda _: t((1 - b) * z)),
        "the networks see unmasked z",
        15,
    ),
    "mask inverted": (
        lambda z, b, s, t: forward(z, 1 - b, s, t),
        lambda z, b, s, t: inverse(z, 1 - b, s, t),
        "the mask is inverted",
        15,
    ),
    "swapped in inverse": (
        forward,
        lambda z, b, s, t: inverse(z, 1 - b, s, t),
        "b and 1 − b are swapped between forward and inverse",
        16,
    ),
    "swapped in forward": (
        lambda z, b, s, t: forward(z, 1 - b, s, t),
        inverse,
        "b and 1 − b are swapped between forward and inverse",
        15,
    ),
    "drawn anew": (redrawn(forward), redrawn(inverse), "the mask is drawn anew at each call", None),
    "noise within": (
        lambda z, b, s, t: forward(z, b, s, lambda x: t(x) + torch.randn_like(x)),
        inverse,
        "random numbers within",
        None,
    ),
    "+s": (forward, undoing(lambda z, s, t: (z - t) * s.exp()), "inverse uses +s", 16),
    "t after scaling": (
        forward,
        undoing(lambda z, s, t: z * (-s).exp() - t),
        "inverse subtracts t after scaling",
        16,
    ),
    "+t": (forward, undoing(lambda z, s, t: (z + t) * (-s).exp()), "inverse adds t", 16),
    "no scale": (forward, undoing(lambda z, s, t: z - t), "inverse does not scale", 16),
    "forward again": (forward, forward, "inverse shifts and scales as forward does", 16),
    "unmasked": (
        lambda z, b, s, t: forward(z, b, lambda _: s(z), lambda _: t(z)),
        lambda z, b, s, t: inverse(z, b, lambda _: s(z), lambda _: t(z)),
        "the networks see unmasked z",
        15,
    ),
    "unmasked in inverse": (
        forward,
        lambda z, b, s, t: inverse(z, b, lambda _: s(z), lambda _: t(z)),
        "the networks see unmasked z",
        16,
    ),
    "the other half seen": (
        lambda z, b, s, t: forward(z, b, lambda _: s((1 - b) * z), lambda _: t((1 - b) * z)),
        lambda z, b, s, t: inverse(z, b, lambda _: s((1 - b) * z), lambda _: t((1 - b) * z)),
        "the networks see unmasked z",
        15,
    ),
    "direction": (inverse, forward, "the direction is data → noise where noise → data is expected", 15),
    "s under no_grad": (lambda z, b, s, t: forward(z, b, within_no_grad(s), t), inverse, CUT, None),
    "t detached in inverse": (forward, lambda z, b, s, t: inverse(z, b, s, lambda x: t(x).detach()), CUT, None),
    "log_det detached": (returning(lambda b, s: total((1 - b) * s).detach()), inverse, CUT, None),
    "output detached": (detached_output, inverse, CUT, None),
    "float32": (in_float32(forward), in_float32(inverse), "float32 inside", None),
    "float32 zeros": (returning(lambda b, s: torch.zeros(len(s))), inverse, "float32 inside", None),
    "unsummed": (returning(lambda b, s: (1 - b) * s), inverse, EVENT, None),
    "(n, 1)": (
        returning(lambda b, s: total((1 - b) * s)[:, None]),
        inverse,
        "log-determinant of shape (n, 1)",
        None,
    ),
    "in place": (in_place, inverse, "changes its input in place", None),
    "statistics of the batch": (
        lambda z, b, s, t: forward(z, b, s, lambda x: t(x) - x.std(0).sum()),
        lambda z, b, s, t: inverse(z, b, s, lambda x: t(x) - x.std(0).sum()),
        "statistics of the batch couple the rows",
        None,
    ),
    "not written": (
        lambda z, b, s, t: (z, z.new_zeros(len(z))),
        lambda z, b, s, t: (z, z.new_zeros(len(z))),
        "the layer is the identity",
        None,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_mistake_is_named(planted, shape):
    forward, inverse, mistake, equation = PLANTED[planted]
    report = check(Hand(SHAPES[shape], forward, inverse), SHAPES[shape])
    assert not report and report.mistakes == [mistake], f"\n{report}"
    if equation is not None:
        assert f"Equation {equation} of the exercise: " in str(report)
    with pytest.raises(WrongLayer, match="Wrong:"):
        report.raise_if_wrong()


def test_float32_inside_is_found_whatever_the_weights_are():
    """Its rounding shows less where the networks are flat."""
    forward, inverse, mistake, _ = PLANTED["float32"]
    for seed in range(12, 28):
        torch.manual_seed(seed)
        assert check(Hand((4,), forward, inverse), (4,)).mistakes == [mistake], seed


ONLY_OF_IMAGES = {
    "last dimension": lambda b, s: ((1 - b) * s).sum(-1),
    "first dimension": lambda b, s: ((1 - b) * s).sum(1),
    "height and width": lambda b, s: ((1 - b) * s).sum((2, 3)),
    "mean over pixels": lambda b, s: ((1 - b) * s).mean((2, 3)).sum(1),
    "one channel": lambda b, s: ((1 - b) * s)[:, 0].flatten(1).sum(1),
}


@pytest.mark.parametrize("planted", ONLY_OF_IMAGES)
def test_a_log_determinant_over_wrong_dimensions_of_an_image_is_named(planted):
    report = check(Hand(SHAPES["image"], returning(ONLY_OF_IMAGES[planted])), SHAPES["image"])
    assert report.mistakes == [EVENT], f"\n{report}"


@pytest.mark.parametrize("shape", SHAPES.values())
def test_what_no_usual_mistake_explains_is_measured_and_no_more(shape):
    report = check(Hand(shape, off_by_a_tenth), shape)
    assert report.broken[0] == "forward_log_det" and not report.mistakes
    assert "off by the same 0.1 in every row" in str(report) and "None of the usual mistakes explains" in str(report)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_the_exercises_layer_is_right(shape):
    report = check(Hand(shape), shape)
    assert report, report
    report.raise_if_wrong()
    assert "forward is equation 15" in str(report)


class Course(nn.Module):
    """The course's flow: a base and layers, noise → data, with its own log_prob and sample."""

    mean: Tensor

    def __init__(self, layers: list[nn.Module], features: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("mean", torch.zeros(features))

    def base(self):
        normal = torch.distributions.Normal(self.mean, torch.ones_like(self.mean))
        return torch.distributions.Independent(normal, 1)

    def forward(self, z):
        log_det = z.new_zeros(len(z))
        for layer in self.layers:
            z, step = layer(z)
            log_det = log_det + step
        return z, log_det

    def inverse(self, x):
        log_det = x.new_zeros(len(x))
        for layer in reversed(self.layers):
            x, step = layer.inverse(x)  # type: ignore[operator]
            log_det = log_det + step
        return x, log_det

    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return self.base().log_prob(z) + log_det

    def sample(self, sample_shape=(1,)):
        return self(self.base().sample(sample_shape))[0]


class WrongDirection(Course):
    def log_prob(self, x):
        z, log_det = self(x)
        return self.base().log_prob(z) + log_det


class WrongSign(Course):
    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return self.base().log_prob(z) - log_det


class NoLogDet(Course):
    def log_prob(self, x):
        return self.base().log_prob(self.inverse(x)[0])


class SummedInLogProb(Course):
    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return self.base().log_prob(z) + log_det.sum()


class Backwards(Course):
    """The same with ``forward`` data → noise and ``inverse`` noise → data, as the paper on Real NVP has it."""

    def forward(self, x):
        return super().inverse(x)

    def inverse(self, z):
        return super().forward(z)

    def log_prob(self, x):
        z, log_det = self(x)
        return self.base().log_prob(z) + log_det

    def sample(self, sample_shape=(1,)):
        return self.inverse(self.base().sample(sample_shape))[0]


class OfItsPrior(Course):
    """A base under another name, of each coordinate; samples by number."""

    base = None  # type: ignore[assignment]

    def __init__(self, layers: list[nn.Module], features: int = 2):
        super().__init__(layers, features)
        self.prior = torch.distributions.Normal(0.0, 1.0)

    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return self.prior.log_prob(z).sum(1) + log_det

    def sample(self, n: int):
        return self(torch.randn(n, len(self.mean)))[0]


class WithoutABase(OfItsPrior):
    """The standard normal's density written out."""

    def __init__(self, layers: list[nn.Module], features: int = 2):
        super().__init__(layers, features)
        del self.prior

    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return log_det - 0.5 * (z**2 + math.log(2 * math.pi)).sum(1)


RIGHT_FLOWS = (Course, Backwards, OfItsPrior, WithoutABase)
DIRECTION = "the direction is noise → data where data → noise is expected"


def normal(z: Tensor) -> Tensor:
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)


def drawn(flow, given) -> Tensor:
    return torch.randn(*(given if isinstance(given, tuple) else (given,)), len(flow.mean))


FAULTS_OF_FLOWS: dict[str, tuple[str, Callable, list[str]]] = {  # of which method, what it does, and its names
    "sign": (
        "log_prob",
        lambda flow, x: normal(flow.inverse(x)[0]) - flow.inverse(x)[1],
        ["wrong sign of the log-determinant"],
    ),
    "left out": ("log_prob", lambda flow, x: normal(flow.inverse(x)[0]), ["log-determinant is left out"]),
    "direction": ("log_prob", lambda flow, x: normal(flow(x)[0]) + flow(x)[1], [DIRECTION]),
    "samples of another base": ("sample", lambda flow, given: flow(2 * drawn(flow, given))[0], []),
    "samples of the base alone": ("sample", drawn, []),
    "samples the wrong way": (
        "sample",
        lambda flow, given: flow.inverse(drawn(flow, given))[0],
        ["sample runs data → noise"],
    ),
}


class ScaleAndShift(nn.Module):
    """z' = z exp(s) + t, of which not every other is nearly its own inverse."""

    def __init__(self, features: int):
        super().__init__()
        self.s = nn.Parameter(torch.full((features,), 0.5))
        self.t = nn.Parameter(torch.full((features,), 0.5))

    def forward(self, z):
        return z * self.s.exp() + self.t, self.s.sum().expand(len(z))

    def inverse(self, z):
        return (z - self.t) * (-self.s).exp(), -self.s.sum().expand(len(z))


DRAWS = {
    "coins": lambda features: torch.randint(0, 2, (features,)),
    "half of a permutation": lambda features: torch.randperm(features) % 2,
    "one coordinate": lambda features: nn.functional.one_hot(torch.randint(features, ()), features),
}


class DrawsMasks(nn.Module):
    """The exercise's layer with a mask of its own in each call."""

    def __init__(self, draw: Callable, features: int):
        super().__init__()
        self.draw, self.features = draw, features
        self.scale, self.translation = MLP(features, features), MLP(features, features)

    def forward(self, z):
        return forward(z, self.draw(self.features).to(z), self.scale, self.translation)

    def inverse(self, z):
        return inverse(z, self.draw(self.features).to(z), self.scale, self.translation)


class Shift(nn.Module):
    """A layer with nothing wrong: z' = z + t."""

    def __init__(self, features: int = 2):
        super().__init__()
        self.t = nn.Parameter(torch.zeros(features))

    def forward(self, z):
        return z + self.t, z.new_zeros(len(z))

    def inverse(self, z):
        return z - self.t, z.new_zeros(len(z))


class Scale(Shift):
    """z' = z ⊙ exp(t), of an image's channels, whose log-determinant counts each pixel."""

    pixels = True

    def __init__(self, features: int = 2):
        super().__init__(features)
        self.t = nn.Parameter(torch.zeros(features, 1, 1))

    def forward(self, z):
        return z * self.t.exp(), self.log_det(z)

    def inverse(self, z):
        return z * (-self.t).exp(), -self.log_det(z)

    def log_det(self, z):
        return (self.t.expand_as(z[0]) if self.pixels else self.t).sum().expand(len(z))


class ScaleOnce(Scale):
    pixels = False


class OnlyOutputs(Shift):
    def forward(self, z):  # type: ignore[override]
        return z + self.t


class ThreeOutputs(Shift):
    def forward(self, z):  # type: ignore[override]
        return z + self.t, z.new_zeros(len(z)), None


class NumberForLogDet(Shift):
    def forward(self, z):  # type: ignore[override]
        return z + self.t, 0.0


class Nothing(Shift):
    def forward(self, z):  # type: ignore[override]
        pass


class BoolMask(Hand):
    def __init__(self):
        super().__init__((2,))
        self.mask = self.mask.bool()


class Raises(Shift):
    def forward(self, z):
        return z @ self.t.expand(3, 3), 0


class Hangs(Shift):
    def inverse(self, z):
        while True:
            time.sleep(0.01)


class GivesNaN(Shift):
    def forward(self, z):
        return (z - 10).log(), z.new_zeros(len(z))


class Squeezes(Shift):
    def forward(self, z):
        y = (z + self.t).squeeze()
        return y, y.new_zeros(len(y))


class Flattens(Shift):
    def forward(self, z):
        return z.flatten()[:-1], z.new_zeros(len(z))


class NoInverse(nn.Module):
    def forward(self, z):
        return z, z.new_zeros(len(z))


class NoInverseOfNflows(Transform):
    def forward(self, inputs, context=None):
        return inputs, inputs.new_zeros(len(inputs))


class NoContext(Transform):
    def forward(self, inputs):  # type: ignore[override]
        return inputs, inputs.new_zeros(len(inputs))

    def inverse(self, inputs):  # type: ignore[override]
        return inputs, inputs.new_zeros(len(inputs))


class Backward(nn.Module):
    forward = backward = Raises.forward


class OfImages(nn.Module):
    def forward(self, z):
        _, _, height, width = z.shape
        return z, z.new_zeros(height * width)

    inverse = forward


class IgnoresContext(Shift):
    def forward(self, z, context=None):
        return super().forward(z)

    def inverse(self, z, context=None):
        return super().inverse(z)


class WantsContext(Shift):
    def forward(self, z, context):  # type: ignore[override]
        return super().forward(z)


class PlainMask(Shift):
    def __init__(self):
        super().__init__()
        self.mask = torch.tensor([1.0, 0.0])

    def forward(self, z):
        return z + (1 - self.mask) * self.t, z.new_zeros(len(z))

    def inverse(self, z):
        return z - (1 - self.mask) * self.t, z.new_zeros(len(z))


class OnTheCpu(Shift):
    def forward(self, z):
        return z + self.t * torch.tensor([1.0, 2.0], device="cpu").to(z.dtype), z.new_zeros(len(z))

    def inverse(self, z):
        return z - self.t * torch.tensor([1.0, 2.0], device="cpu").to(z.dtype), z.new_zeros(len(z))


class ComputedInInit(Shift):
    def __init__(self):
        super().__init__()
        self.scale = self.t.exp()


class Leaves(Shift):
    def forward(self, z):
        raise SystemExit(3)


class OfTheFirstContext(Shift):
    def __init__(self, mean: bool):
        super().__init__()
        self.mean = mean

    def shift(self, context):
        return self.t * (context.mean(0) if self.mean else context[0])[:2]

    def forward(self, z, context=None):  # type: ignore[override]
        return z + self.shift(context), z.new_zeros(len(z))

    def inverse(self, z, context=None):  # type: ignore[override]
        return z - self.shift(context), z.new_zeros(len(z))


class OtherInTraining(Shift):
    def forward(self, z):
        return super().forward(z)[0] + (1.0 if self.training else 0.0), z.new_zeros(len(z))


class ActNorm(nn.Module):
    """Scales by what the first batch that forward meets asks for; ``initialised`` is no buffer."""

    def __init__(self, inverse_too: bool = False):
        super().__init__()
        self.s, self.initialised, self.inverse_too = nn.Parameter(torch.zeros(2)), False, inverse_too

    def initialise(self, z):
        if not self.initialised:
            with torch.no_grad():
                self.s.copy_(-z.std(0).log())
            self.initialised = True

    def forward(self, z):
        self.initialise(z)
        return z * self.s.exp(), self.s.sum().expand(len(z))

    def inverse(self, z):
        if self.inverse_too:
            self.initialise(z)
        return z * (-self.s).exp(), -self.s.sum().expand(len(z))


def with_batch_norm(**options) -> nn.Module:
    layer = Hand((4,))
    layer.translation_net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16, **options), nn.Tanh(), nn.Linear(16, 4))
    return layer


NAMED = {  # what is wrong: the layer, its events' shape, the mistake
    "plain mask": (PlainMask, (2,), "a plain tensor instead of a buffer"),
    "a tensor of the CPU": (OnTheCpu, (2,), "a tensor stays on the CPU"),
    "BatchNorm": (lambda: with_batch_norm(track_running_stats=False), (4,), "BatchNorm couples the rows"),
    "ActNorm, inverse first": (ActNorm, (2,), "ActNorm was not initialised"),
    "ActNorm, loaded": (lambda: ActNorm(True), (2,), "ActNorm was not initialised"),
    "squeeze": (Squeezes, (2,), "squeeze removes the batch dimension"),
    "a scale of channels counted once": (lambda: ScaleOnce(3), (3, 4, 5), EVENT),
    "flow, direction": (
        lambda: WrongDirection([Hand((2,))]),
        (2,),
        "the direction is noise → data where data → noise is expected",
    ),
    "flow, sign": (lambda: WrongSign([Hand((2,))]), (2,), SIGN),
    "flow, no log-determinant": (lambda: NoLogDet([Hand((2,))]), (2,), "log-determinant is left out"),
    "flow, summed": (lambda: SummedInLogProb([Hand((2,))]), (2,), BATCH),
    "flow, its second layer": (
        lambda: Course([Hand((2,)), Hand((2,), *PLANTED["+s"][:2]), Hand((2,))]),
        (2,),
        "inverse uses +s",
    ),
    "nflows' flow, its second layer": (
        lambda: CompositeTransform([MaskedCouplingLayer(MLP(4, 4), MLP(4, 4), checkerboard_mask(4)), SplineSign()]),
        (4,),
        SIGN,
    ),
    "flow, a wrong layer": (lambda: Course([Hand((2,), *PLANTED["sign"][:2])]), (2,), SIGN),
}


class TrainedMask(Hand):
    """Its mask is a parameter of floats, which an optimiser would change."""

    def __init__(self):
        super().__init__((2,))
        mask = self.mask
        del self.mask
        self.mask = nn.Parameter(mask)


class InAList(Shift):
    """What it depends on is in a list: networks are not moved to float64, and parameters of float64 stay untrained."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = [hidden]

    def forward(self, z):
        return z + self.shift(z), z.new_zeros(len(z))

    def inverse(self, z):
        return z - self.shift(z), z.new_zeros(len(z))

    def shift(self, z):
        hidden = self.hidden[0]
        return self.t + (hidden(torch.zeros_like(z)) if isinstance(hidden, nn.Module) else hidden)


class NoConstant(Course):
    def log_prob(self, x):
        z, log_det = self.inverse(x)
        return log_det - 0.5 * (z**2).sum(1)


class InPlace(Shift):
    def forward(self, z):
        z += self.t
        return z, z.new_zeros(len(z))


NAMED |= {
    "mask trained": (TrainedMask, (2,), "the mask is a parameter, which training changes"),
    "modules in a list": (lambda: InAList(nn.Linear(2, 2)), (2,), "parameters in a Python list"),
    "parameters in a list": (
        lambda: InAList(nn.Parameter(torch.zeros(2, dtype=torch.float64))),
        (2,),
        "parameters in a Python list",
    ),
    "flow, no constant": (lambda: NoConstant([Hand((2,))]), (2,), "the base's normalising constant is missing"),
    "+=": (InPlace, (2,), "changes its input in place"),
}


@pytest.mark.parametrize("planted", NAMED)
def test_a_planted_mistake_in_a_class_is_named(planted):
    thing, shape, mistake = NAMED[planted]
    report = check(thing(), shape)
    assert not report and report.mistakes == [mistake], f"\n{report}"


ONE_LINE = {  # what is wrong: the layer, and a part of the one line that says so
    "only outputs": (
        OnlyOutputs,
        "forward returns a tensor of shape (7, 2), where a pair is wanted: write return outputs, log_det",
    ),
    "three outputs": (ThreeOutputs, "forward returns a tuple of 3, where a pair is wanted"),
    "a number": (
        NumberForLogDet,
        "forward returns a float as its log_det, where a tensor is wanted; for a constant write",
    ),
    "nothing": (Nothing, "forward returns None, where a pair is wanted"),
    "1 − b of a bool": (
        BoolMask,
        "Error: Subtraction, the `-` operator, with a bool tensor",
    ),
    "raises": (Raises, "return z @ self.t.expand(3, 3), 0)"),
    "leaves the program": (Leaves, "forward raises SystemExit: 3 (test_check.py, line "),
    "hangs": (
        Hangs,
        "inverse has not come back within 0.3 s: is there a loop that does not end? (test_check.py, line ",
    ),
    "NaN": (GivesNaN, "forward gives (nan, nan)"),
    "shape": (Flattens, "forward returns a tensor of shape (13,) for a tensor of shape (7, 2)"),
    "no inverse": (NoInverse, "it has no inverse: write def inverse(self, z, context=None)"),
    "no inverse, nflows": (NoInverseOfNflows, "it has no inverse: write def inverse(self, z, context=None)"),
    "no context, nflows": (
        NoContext,
        "forward takes no context, but nflows hands every transform a context: write def forward(",
    ),
    "a context that must be given": (
        WantsContext,
        "write def forward(self, z, context=None), or say --context-features",
    ),
    "another name": (
        Backward,
        "it has no inverse, but a method backward: if that is one, call it inverse; or else write",
    ),
    "of images": (OfImages, "; if it is for images, say their shape, as --shape 1 8 8"),
    "a mask of images": (lambda: Hand((1, 3, 4)), "; its mask is for events of shape (1, 3, 4): say --shape 1 3 4"),
    "a longer mask": (lambda: Hand((5,)), "; its mask is for events of shape (5,): say --features 5"),
    "no copies": (ComputedInInit, "it can't be copied"),
    "training": (OtherInTraining, "in training, ("),
}


@pytest.mark.parametrize("planted", ONE_LINE)
def test_what_can_not_be_called_is_one_line(planted):
    thing, words = ONE_LINE[planted]
    start = time.perf_counter()
    report = check(thing(), (2,), seconds=0.3)
    assert not report and len(report.broken) == 1 and not report.mistakes
    assert words in str(report), f"\n{report}"
    assert time.perf_counter() - start < 5


def clamped(direction: Direction, bound: float, data: bool = True) -> Direction:
    """Cut to ±bound, the direction's outputs or what it is given."""

    def wrong(z, b, s, t):
        y, log_det = direction(z if data else z.clamp(-bound, bound), b, s, t)
        return (y.clamp(-bound, bound) if data else y), log_det

    return wrong


def bounded_beside_the_mask(z, b, s, t):
    """s that the log-determinant does not follow where a coordinate is beyond 5."""
    y, log_det = forward(z, b, s, t)
    return y, torch.where(z.abs().flatten(1).amax(1) > 5, log_det.clamp(-0.01, 0.01), log_det)


RIGHT_NEAR_0 = {
    "outputs": (clamped(forward, 7), inverse),
    "outputs of inverse": (forward, clamped(inverse, 5)),
    "inputs": (clamped(forward, 7, data=False), inverse),
    "log-determinant": (bounded_beside_the_mask, inverse),
    "log-determinant of inverse": (
        forward,
        lambda z, b, s, t: (inverse(z, b, s, t)[0], inverse(z, b, s, t)[1] * (z.abs().flatten(1).amax(1) < 5)),
    ),
}


@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
@pytest.mark.parametrize("planted", RIGHT_NEAR_0)
def test_what_is_right_near_0_only_is_wrong(planted, shape):
    report = check(Hand(shape, *RIGHT_NEAR_0[planted]), shape)
    assert report.broken == ["far"] and report.mistakes == ["it is right near 0 only"], f"\n{report}"


def test_a_fault_further_out_is_a_remark():
    report = check(Hand((4,), clamped(forward, 15), clamped(inverse, 15)), (4,))
    assert report and "! all of this holds far from 0, too: at z = (" in str(report), f"\n{report}"


@pytest.mark.parametrize("mean", [False, True])
def test_a_context_of_another_row_is_named(mean):
    report = check(OfTheFirstContext(mean), (2,), context_features=3)
    assert report.mistakes == ["a row is given another row's context"], f"\n{report}"


def test_a_context_that_is_not_used_is_a_remark():
    report = check(IgnoresContext(), (2,), context_features=3)
    assert report and "! the answer depends on the context: neither outputs" in str(report), f"\n{report}"


def test_a_missing_context_is_one_line():
    report = check(Hand((2,)), (2,), context_features=3)
    assert "forward takes no context, but a context was asked for: write def forward(self, z, context=None)" in str(
        report
    )


def test_a_wrong_layer_inside_a_flow_is_pointed_at():
    wrong = Course([Hand((2,)), Hand((2,), *PLANTED["sign"][:2])])
    assert "In its part layers.1, a Hand." in str(check(wrong, (2,)))
    unexplained = str(check(Course([Hand((2,), off_by_a_tenth)]), (2,)))
    assert "The fault is in its part layers.0, a Hand." in unexplained


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("kind", RIGHT_FLOWS)
def test_a_right_flow_is_right_whatever_its_form(kind, features):
    report = check(kind([ScaleAndShift(features) for _ in range(2)], features), (features,))
    assert report and report.findings["samples"].verdict == "✓", f"\n{report}"


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("kind", [Course, OfItsPrior, WithoutABase])
@pytest.mark.parametrize("fault", FAULTS_OF_FLOWS)
def test_a_flow_whose_density_and_samples_differ_is_wrong(fault, kind, features):
    method, written, mistakes = FAULTS_OF_FLOWS[fault]
    wrong = type("Wrong", (kind,), {method: written})
    report = check(wrong([ScaleAndShift(features) for _ in range(2)], features), (features,))
    assert set(report.broken) <= {"samples", "mass"} and report.broken, f"\n{report}"
    assert report.mistakes == mistakes, f"\n{report}"


def test_a_layer_of_large_numbers_may_round_them_in_float32():
    layer = ScaleAndShift(3)
    layer.t.data.fill_(1e6)
    report = check(layer, (3,))
    assert report, f"\n{report}"


class Flattened(nn.Module):
    def forward(self, z):
        return z.flatten(1), z.new_zeros(len(z))

    def inverse(self, z):
        return z.view(len(z), 1, 2, 3), z.new_zeros(len(z))


def test_a_layer_that_changes_the_shape_takes_noise_of_its_outputs_shape():
    report = check(Flattened(), (1, 2, 3))
    assert report and "forward turns (1, 2, 3) into (6,)" in str(report), f"\n{report}"


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_mask_that_is_drawn_anew_is_named_in_few_coordinates_too(draw, layers, features):
    """Two draws may agree, and one may leave all unchanged."""
    redrawing = [DrawsMasks(DRAWS[draw], features) for _ in range(layers)]
    for thing in (Course(redrawing, features), redrawing[0]):
        report = check(thing, (features,))
        assert report.mistakes == ["the mask is drawn anew at each call"], f"\n{report}"


def test_a_wrong_layer_of_a_library_is_told_once():
    """A bridge wraps it, and its part is the layer itself."""
    normflows = pytest.importorskip("normflows")

    class Wrong(normflows.flows.Flow):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.zeros(2))

        def forward(self, z):
            return z * self.s.exp(), -self.s.sum().expand(len(z))

        def inverse(self, z):
            return z * (-self.s).exp(), -self.s.sum().expand(len(z))

    for thing in (Wrong(), normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [Wrong(), Wrong()])):
        report = check(thing, (2,))
        assert report.mistakes == ["wrong sign of the log-determinant"], f"\n{report}"
        assert str(report).count("n its part") <= 1, f"\n{report}"


class LosesSamples(Course):
    def sample(self, shape):
        x = super().sample(shape)
        x[::10] = math.nan
        return x


def test_samples_that_are_no_numbers_are_lost_mass():
    report = check(LosesSamples([Hand((2,))]), (2,))
    assert report.broken == ["mass"] and "∫p = " in report.findings["mass"].words, f"\n{report}"


class DropsOut(Hand):
    def forward(self, z):
        s, p, training = self.scale_net, 0.5, self.training
        return self.directions[0](z, self.mask, lambda x: nn.functional.dropout(s(x), p, training), s)


def with_random_slopes() -> nn.Module:
    layer = Hand((4,))
    layer.translation_net = nn.Sequential(nn.Linear(4, 16), nn.RReLU(), nn.Linear(16, 4))
    return layer


@pytest.mark.parametrize("make", [lambda: DropsOut((4,), inverse=lambda z, b, s, t: inverse(z, b, s, s)),
                                  with_random_slopes])  # fmt: skip
def test_random_numbers_in_training_only_are_a_remark(make):
    report = check(make(), (4,))
    assert report, f"\n{report}"
    assert "! training mode computes what evaluation mode does: training mode draws random numbers" in str(report)


class Remembers(Hand):
    """A call leaves what it computed, the gradients' graph with it or without."""

    def forward(self, z):
        y, self.last_log_det = super().forward(z)
        with torch.enable_grad():
            self.last_scale = self.scale_net(z)
        self.last_mean = y.detach().mean(0)
        return y, self.last_log_det


class Normed(Hand):
    def __init__(self, normed):
        super().__init__((2,))
        self.scale_net = nn.Sequential(normed(nn.Linear(2, 2)), nn.Tanh())


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.zeros(2))

    def forward(self, z):
        return z * self.t.exp(), self.t.sum().expand(z.shape[0])

    @torch.jit.export
    def inverse(self, z):
        return z * (-self.t).exp(), (-self.t.sum()).expand(z.shape[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normed(nn.utils.weight_norm),
        lambda: Normed(nn.utils.spectral_norm),
        lambda: torch.jit.script(Scripted()),
        lambda: Course([torch.jit.script(Scripted())]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_no_normed_or_scripted_layer_is_accused(make):
    report = check(make(), (2,))
    assert report, f"\n{report}"


def test_a_mask_of_ones_is_a_remark():
    layer = Hand((2,))
    layer.mask.fill_(1)
    report = check(layer, (2,))
    assert report and "mask is all ones: this layer changes nothing" in str(report), f"\n{report}"


def test_no_sigmoid_of_the_plane_is_accused():
    report = check(Elementwise(*CUT_OFF["sigmoid"]), (2,))
    assert report, f"\n{report}"


def test_what_a_call_leaves_behind_need_not_be_a_buffer():
    report = check(Remembers((4,)), (4,))
    assert report, f"\n{report}"


def test_batch_norm_in_training_is_a_remark():
    report = check(with_batch_norm(), (4,))
    assert report and report.mistakes == ["BatchNorm couples the rows"], f"\n{report}"


class SplineMistake(MaskedSplineCouplingLayer):
    def __init__(self):
        super().__init__(MLP(2, 2 * spline_parameters(4), (16,)), torch.tensor([0, 1, 0, 1]), bins=4)
        self.register_buffer("mask", torch.tensor([0.0, 1.0, 0.0, 1.0]))


class SplineSign(SplineMistake):
    def forward(self, z, context=None):
        y, log_det = super().forward(z, context)
        return y, -log_det


class SplineSum(SplineMistake):
    def forward(self, z, context=None):
        y, log_det = super().forward(z, context)
        return y, log_det.sum().expand(len(z))


class SplineMean(SplineMistake):
    def forward(self, z, context=None):
        y, log_det = super().forward(z, context)
        return y, log_det / 4


class SplineForwardTwice(SplineMistake):
    def inverse(self, z, context=None):
        return super().forward(z, context)


class SplineInverted(SplineMistake):
    def __init__(self):
        super().__init__()
        self.mask = 1 - self.mask


class SplineSwapped(SplineMistake):
    def inverse(self, z, context=None):
        y, log_det = super().inverse(z.flip(1), context)
        return y.flip(1), log_det


class SplineFloat32(SplineMistake):
    def couple(self, function, kept, changed, context):
        y, log_det = super().couple(function, kept.float().double(), changed.float().double(), context)
        return y.float().double(), log_det.float().double()


class SplineDetached(SplineMistake):
    def couple(self, function, kept, changed, context):
        parameters = self.conditioner(kept).detach()
        return function(changed, parameters)


class SplineRedrawn(SplineMistake):
    def forward(self, z, context=None):
        order = torch.randperm(4)
        y, log_det = super().forward(z[:, order], context)
        return y[:, order.argsort()], log_det


SPLINES = {
    SplineSign: SIGN,
    SplineSum: BATCH,
    SplineMean: MEAN,
    SplineForwardTwice: "inverse does what forward does",
    SplineInverted: "the mask is inverted",
    SplineSwapped: "b and 1 − b are swapped between forward and inverse",
    SplineFloat32: "float32 inside",
    SplineDetached: CUT,
    SplineRedrawn: "the mask is drawn anew at each call",
}


@pytest.mark.parametrize("layer", SPLINES)
def test_a_planted_mistake_in_a_spline_is_named(layer):
    report = check(layer(), (4,))
    assert not report and report.mistakes == [SPLINES[layer]], f"\n{report}"


SLOW = ("zuko:continuous-context", "zuko:continuous")  # whose solver takes ten seconds at their tolerances


@pytest.mark.parametrize("name", [name for name in examples() if name not in SLOW])
def test_no_example_is_accused(name):
    torch.manual_seed(0)
    example = examples()[name]
    report = check(example.make(), example.event_shape, example.context_features)
    assert report, f"\n{report}"


@pytest.mark.parametrize("name", [name for name in models() if name not in SLOW])
def test_no_model_of_a_library_is_accused(name):
    torch.manual_seed(0)
    model = models()[name]
    report = check(model.make(), model.event_shape, model.context_features)
    assert report, f"\n{report}"


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("name", flow_names())
def test_no_flow_of_the_catalogue_is_accused(name, context_features):
    torch.manual_seed(0)
    report = check(build_flow(name, 2, context_features, layers=2, hidden_features=(8, 8)), (2,), context_features)
    assert report, f"\n{report}"


class Elementwise(nn.Module):
    """f(z + t) with its inverse and log f', three functions, of which not all take every number."""

    def __init__(self, function, inverse, log_slope, features: int = 2):
        super().__init__()
        self.t, self.functions = nn.Parameter(torch.zeros(features)), (function, inverse, log_slope)

    def forward(self, z):
        return self.functions[0](z + self.t), self.functions[2](z + self.t).sum(1)

    def inverse(self, z):
        shifted = self.functions[1](z)
        return shifted - self.t, -self.functions[2](shifted).sum(1)


class Standardizing(nn.Module):
    """Noise → data: in training ``inverse``, which is given the data, takes their mean m and variance v."""

    m: Tensor
    v: Tensor

    def __init__(self, log_scale=lambda v: 0.5 * v.log(), only_in_training=True):
        super().__init__()
        self.t, self.log_scale, self.only_in_training = nn.Parameter(torch.zeros(2)), log_scale, only_in_training
        self.register_buffer("m", torch.zeros(2))
        self.register_buffer("v", torch.ones(2))

    def forward(self, z):
        return z * self.v.sqrt() + self.m + self.t, self.log_scale(self.v).sum().expand(len(z))

    def inverse(self, z):
        if self.training or not self.only_in_training:
            with torch.no_grad():
                self.m.copy_(0.9 * self.m + 0.1 * z.mean(0))
                self.v.copy_(0.9 * self.v + 0.3 * z.var(0))
        return (z - self.m - self.t) / self.v.sqrt(), -self.log_scale(self.v).sum().expand(len(z))


BOUNDED = {
    "tanh": (torch.tanh, torch.atanh, lambda x: 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))),
    "sigmoid": (torch.sigmoid, torch.logit, lambda x: nn.functional.logsigmoid(x) + nn.functional.logsigmoid(-x)),
    "exp": (torch.exp, torch.log, lambda x: x),
    "knots at 8": (lambda x: torch.where(x.abs() < 8, x, 2 * x - 8 * x.sign()),
                   lambda y: torch.where(y.abs() < 8, y, (y + 8 * y.sign()) / 2),
                   lambda x: torch.where(x.abs() < 8, 0.0 * x, 0.0 * x + math.log(2))),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_no_layer_of_a_part_of_the_plane_is_accused(name):
    report = check(Elementwise(*BOUNDED[name]), (2,))
    assert report, f"\n{report}"


class Named(Hand):
    """Its mask is called by another name, is a list or is broadcast; perhaps 1 means transformed there."""

    def __init__(self, name: str, mask, inverted: bool = False, event_shape: tuple[int, ...] = (4,)):
        super().__init__(event_shape)
        del self.mask
        self.name, self.inverted = name, inverted
        if isinstance(mask, Tensor):
            self.register_buffer(name, mask)
        else:
            setattr(self, name, mask)

    def kept(self, z):
        b = torch.as_tensor(getattr(self, self.name), dtype=z.dtype, device=z.device)
        return 1 - b if self.inverted else b

    def forward(self, z):
        return self.directions[0](z, self.kept(z), self.scale_net, self.translation_net)

    def inverse(self, z):
        return self.directions[1](z, self.kept(z), self.scale_net, self.translation_net)


class TwoMasks(Hand):
    """The other mask comes before ``mask``."""

    def __init__(self, other: str):
        super().__init__((4,))
        mask = self.mask
        del self.mask
        self.register_buffer(other, 1 - mask)
        self.register_buffer("mask", mask)


class Glow(nn.Module):
    """A convolution by LU with masks of triangles, which say nothing of what is unchanged."""

    l_mask: Tensor
    u_mask: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.w, self.s = nn.Parameter(torch.zeros(channels, channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("u_mask", torch.ones(channels, channels).triu(1))
        self.register_buffer("l_mask", self.u_mask.T.clone())

    def weight(self):
        one = torch.eye(len(self.s), dtype=self.s.dtype, device=self.s.device)
        return (self.w * self.l_mask + one) @ (self.w * self.u_mask + self.s.exp().diag())

    def forward(self, z):
        return torch.einsum("ij,njhw->nihw", self.weight(), z), (z[0, 0].numel() * self.s.sum()).expand(len(z))

    def inverse(self, z):
        return torch.einsum("ij,njhw->nihw", self.weight().inverse(), z), -self.forward(z)[1]


ALTERNATING, SQUARES, CHANNELS = checkerboard_mask(4), checkerboard_mask(1, 3, 4), checkerboard_mask(4, 1, 1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Named("transform_mask", ALTERNATING, True), (4,)),
        (lambda: Named("mask_changed", ALTERNATING, True), (4,)),
        (lambda: Named("conditioner_mask", ALTERNATING), (4,)),
        (lambda: Named("mask", [1, 0, 1, 0]), (4,)),
        (lambda: Named("mask", SQUARES[None], False, (2, 3, 4)), (2, 3, 4)),
        (lambda: Named("mask", CHANNELS, False, (4, 3, 4)), (4, 3, 4)),
        (lambda: TwoMasks("inverted_mask"), (4,)),
        (lambda: TwoMasks("one_minus_mask"), (4,)),
        (lambda: Glow(4), (4, 2, 2)),
    ],
)
def test_no_mask_of_another_name_or_shape_is_accused(make, shape):
    report = check(make(), shape)
    assert report, f"\n{report}"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Named("coupling_mask", ALTERNATING, True), (4,)),
        (lambda: Named("mask", [True, False, True, False], True), (4,)),
        (lambda: Named("mask", SQUARES, True, (2, 3, 4)), (2, 3, 4)),
        (lambda: Named("mask", SQUARES[None], True, (2, 3, 4)), (2, 3, 4)),
        (lambda: Named("b", CHANNELS, True, (4, 3, 4)), (4, 3, 4)),
    ],
)
def test_an_inverted_mask_is_named_whatever_its_shape(make, shape):
    report = check(make(), shape)
    assert report.mistakes == ["the mask is inverted"], f"\n{report}"


def test_a_mask_of_ones_is_known():
    for mask, name in ((torch.ones(2), "mask"), (torch.zeros(2), ""), (torch.tensor([1.0, 0.0]), "")):
        layer = Hand((2,))
        layer.mask = mask
        evidence = Evidence(lambda layer=layer: fresh(layer, 8.0), (2,))
        evidence.gather()
        assert evidence.idle_mask == name


def angle(x: Tensor) -> Tensor:
    """In [−π, π)."""
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi


CUT_OFF = {  # an inverse, or a logit, that clamps what the other direction never gives
    "sigmoid": (
        torch.sigmoid,
        lambda y: y.clamp(1e-6, 1 - 1e-6).logit(),
        BOUNDED["sigmoid"][2],
    ),
    "tanh": (torch.tanh, lambda y: y.clamp(-1 + 1e-6, 1 - 1e-6).atanh(), BOUNDED["tanh"][2]),
    "a steep sigmoid": (
        lambda x: torch.sigmoid(2 * x),
        lambda y: y.clamp(1e-6, 1 - 1e-6).logit() / 2,
        lambda x: BOUNDED["sigmoid"][2](2 * x) + math.log(2),
    ),
    "logit": (
        lambda x: x.clamp(1e-6, 1 - 1e-6).logit(),
        torch.sigmoid,
        lambda x: -(x.clamp(1e-6, 1 - 1e-6).log() + (1 - x.clamp(1e-6, 1 - 1e-6)).log()),
    ),
    "angle": (angle, angle, torch.zeros_like),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_what_the_other_direction_never_gives_may_be_cut_off(name):
    layer = Elementwise(*CUT_OFF[name], features=3)
    layer.t.requires_grad_(name != "logit")  # whose data lie in (0, 1) as they are
    report = check(layer, (3,))
    assert report, f"\n{report}"


@pytest.mark.parametrize("bound", [0.5, 3, 6])
@pytest.mark.parametrize("both", [True, False])
def test_what_is_cut_off_in_the_middle_of_the_data_is_wrong(bound, both):
    report = check(Hand((4,), clamped(forward, bound), clamped(inverse, bound) if both else inverse), (4,))
    assert not report and report.mistakes in (["outputs are cut off"], ["it is right near 0 only"]), f"\n{report}"


def test_a_map_of_a_square_that_cuts_off_the_rest_of_the_plane_is_wrong():
    """Normal noise lies there, too: z' = z (|z| + 3) / 6 maps (−3, 3) to itself."""
    cut = lambda f: lambda x: f(x.clamp(-3, 3))  # noqa: E731
    there, back = cut(lambda x: x * (x.abs() + 3) / 6), cut(lambda y: y.sign() * ((9 + 24 * y.abs()).sqrt() - 3) / 2)
    report = check(Elementwise(there, back, cut(lambda x: ((2 * x.abs() + 3) / 6).log())), (2,))
    assert report.broken == ["far"] and report.mistakes == ["it is right near 0 only"], f"\n{report}"


@pytest.mark.parametrize(
    "make",
    [
        distributions.ExpTransform,
        distributions.SigmoidTransform,
        distributions.TanhTransform,
        distributions.SoftplusTransform,
        lambda: distributions.PowerTransform(torch.tensor(2.0)),
        lambda: distributions.ComposeTransform([distributions.AffineTransform(1.0, 2.0), distributions.ExpTransform()]),
        lambda: distributions.ComposeTransform([distributions.ExpTransform(), distributions.AffineTransform(1.0, 2.0)]),
        lambda: Sigmoid(2, learn_temperature=True),
        lambda: import_zuko().flows.NCSF(2, transforms=1, hidden_features=(8, 8)),
    ],
)
def test_no_transform_of_a_part_of_the_plane_is_accused(make):
    for thing in (make(), make().inv) if hasattr(make(), "inv") else (make(),):
        for features in (2,) if type(thing).__module__.startswith("zuko") else (2, 3):
            report = check(thing, (features,))
            assert report, f"\n{report}"


@pytest.mark.parametrize("flow", ["GF", "BPF", "SOSPF", "UNAF"])
def test_no_inverse_that_searches_is_accused(flow):
    """It is as exact as the search is, about as exact as float32."""
    report = check(getattr(import_zuko().flows, flow)(2, transforms=1, hidden_features=(8, 8)), (2,))
    assert report, f"\n{report}"


def in_dtype(direction: Direction, dtype: torch.dtype) -> Direction:
    return lambda z, b, s, t: direction(
        z, b, lambda x: s(x).to(dtype).to(x.dtype), lambda x: t(x).to(dtype).to(x.dtype)
    )


@pytest.mark.parametrize("shape", SHAPES.values())
def test_fewer_digits_inside_are_found_in_either_direction(shape):
    for dtype, mistake in (
        (torch.float32, "float32 inside"),
        (torch.float16, "half precision inside"),
        (torch.bfloat16, "half precision inside"),
    ):
        both = check(Hand(shape, in_dtype(forward, dtype), in_dtype(inverse, dtype)), shape)
        assert both.mistakes == [mistake], f"\n{both}"
    report = check(Hand(shape, forward, in_dtype(inverse, torch.float32)), shape)
    assert report.mistakes == ["float32 inside"], f"\n{report}"


class OwnLogit(Elementwise):
    def __init__(self):
        super().__init__(torch.logit, torch.sigmoid, lambda x: -(x.log() + (1 - x).log()))
        self.t.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, z):
        y, log_det = super().forward(z)
        return y * self.scale, log_det + self.scale.abs().log().sum()

    def inverse(self, z):
        x, log_det = super().inverse(z / self.scale)
        return x, log_det - self.scale.abs().log().sum()


def test_data_in_the_unit_square_are_tried_where_others_give_nan():
    report = check(OwnLogit(), (2,))
    assert report and "inputs in (0, 1), since others are not taken" in str(report), f"\n{report}"


def test_running_statistics_settle_whichever_way_the_data_come():
    assert check(Standardizing(), (2,))
    report = check(Standardizing(torch.log), (2,))
    assert {"forward_log_det", "inverse_log_det"} <= set(report.broken), f"\n{report}"
    assert "! training mode computes what evaluation mode does" in str(check(Standardizing(), (2,)))
    report = check(Standardizing(only_in_training=False), (2,))
    assert report.mistakes == ["the layer changes itself at each call"], f"\n{report}"


class Matrix(nn.Module):
    def __init__(self, log_det):
        super().__init__()
        self.w, self.log_det = nn.Parameter(torch.tensor([[1.5, 0.2], [0.1, -0.7]])), log_det

    def forward(self, z):
        return z @ self.w.T, self.log_det(self.w, z)

    def inverse(self, z):
        return z @ self.w.inverse().T, -self.log_det(self.w, z)


@pytest.mark.parametrize(
    ("log_det", "mistakes"),
    [
        (lambda w, z: torch.linalg.slogdet(w).logabsdet.expand(len(z)), []),
        (lambda w, z: torch.linalg.slogdet(w).logabsdet, ["one log-determinant for all rows"]),
        (lambda w, z: w.det().log().expand(len(z)), ["log-determinant is not a number"]),
        (lambda w, z: w.diagonal().sum().expand(len(z)), ["the scale is summed instead of its logarithm"]),
        (lambda w, z: (w.det() + 0.1).expand(len(z)), []),
        (lambda w, z: 2 * torch.linalg.slogdet(w).logabsdet.expand(len(z)), [OFF]),
    ],
)
def test_a_constant_log_determinant_is_named_only_where_that_explains_it(log_det, mistakes):
    report = check(Matrix(log_det), (2,))
    assert report.mistakes == mistakes, f"\n{report}"


@pytest.mark.parametrize("layer", [lambda: Course([Hand((2,)), Hand((2,))]), lambda: Scale(2), Shift])
def test_no_other_right_layer_is_accused(layer):
    thing = layer()
    report = check(thing, (2, 3, 3) if isinstance(thing, Scale) else (2,))
    assert report, f"\n{report}"


def test_an_inverse_that_searches_does_not_fill_the_memory():
    """What its networks give is looked at, and not kept for each of the steps."""
    flow = build_flow("zuko-naf", 2, layers=1, hidden_features=(8, 8))
    evidence = Evidence(lambda: fresh(flow, 8.0), (2,))
    with counted() as calls:
        evidence.gather()
    often = max(calls.values())
    seen = Counter(name for p in (evidence.back, evidence.inverse) for name, _, _ in p.seen)
    assert often > 100 and seen and max(seen.values()) <= 10


def test_the_layer_and_the_random_numbers_stay_as_they_were():
    layer = Hand((2,))
    before, state = {key: value.clone() for key, value in layer.state_dict().items()}, torch.get_rng_state()
    assert check(layer, (2,)) and layer.training and layer.mask.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(TypeError, match="check judges an object, not the class Hand"):
        check(Hand, (2,))
    with pytest.raises(TypeError, match="event_shape must be a tuple of integers"):
        check(layer, 2)  # type: ignore[arg-type]


def test_check_is_the_function_and_the_package_too():
    assert callable(adapters.check) and adapters.check is check
    assert sys.modules["adapters.check"].check is check
    from adapters.check import laws

    assert adapters.check is check and laws.LAWS


MINE = (
    LAYER
    + """

class Sized(MyLayer):
    def __init__(self, features, width):
        net = lambda: nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, features), nn.Tanh())
        super().__init__(net(), net(), torch.arange(features) % 2)

def make(features, context_features=None):
    from adapters import MaskedCouplingLayer, build_flow
    return build_flow("masked-affine", features, context_features, layers=1, hidden_features=(8,))
"""
)


def command(directory, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(adapters.__file__).parents[1])}
    line = [sys.executable, "-m", "adapters.check", *arguments]
    return subprocess.run(line, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_command_says_what_is_wrong_and_where(tmp_path):
    (tmp_path / "mine.py").write_text(MINE.replace("torch.exp(-s)", "torch.exp(+s)"))
    done = command(tmp_path, "mine:MyLayer")
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert "Inverse uses +s" in done.stdout and "Equation 16" in done.stdout and "mine.py, line 17" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine.py:MyLayer", "--shape", "1", "4", "4"], "events of shape (1, 4, 4)"),
        (["mine:Sized", "--features", "3", "--arguments", "width", "5"], "3 coordinates"),
        (["mine:make", "--context-features", "3"], "a context of 3"),
        (["adapters:MaskedCouplingLayer", "--context-features", "2"], "Right: "),
        (["masked-affine", "--features", "3", "--arguments", "scale_bound", "None"], "3 coordinates"),
    ],
)
def test_the_command_makes_what_is_asked_for(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    sys.modules.pop("mine", None)
    assert tyro.cli(main, args=arguments) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine", "write my_layer:MyLayer"),
        ("no_such:Layer", "no_such can't be imported"),
        ("no_such.py:Layer", "there is no file no_such.py"),
        ("adapters:Nothing", "adapters has no Nothing"),
    ],
)
def test_a_name_that_names_nothing_is_one_line(name, words):
    with pytest.raises((ValueError, ImportError), match=words):
        load(name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["masked-afine"], "unknown flow 'masked-afine'; known: masked-affine, "),
        (["mine.py"], "'mine.py' names no layer or flow; write my_layer:MyLayer"),
        (["masked-affine", "--shape", "1", "4", "4"], "masked-affine is a flow of vectors: give --features 16 instead"),
        (["masked-affine", "--arguments", "bins", "4"], "masked-affine has no option 'bins'; it has: scale_bound"),
    ],
)
def test_what_the_command_can_make_nothing_of_is_one_line(capsys, arguments, words):
    assert tyro.cli(main, args=arguments) == 1
    told = capsys.readouterr().out
    assert words in told and told.count("\n") == 1


def test_what_a_class_wants_and_is_not_offered_is_one_line():
    with pytest.raises(TypeError, match=r"Hungry wants hunger: say --arguments hunger VALUE"):
        make(type("Hungry", (), {"__init__": lambda self, hunger: None}), Offer((2,)), {}, "--arguments")
    with pytest.raises(TypeError, match=r"Shift has no argument width; it has features"):
        make(Shift, Offer((2,)), {"width": 3})


def test_every_law_has_a_title_and_needs_what_comes_before():
    names = [law.name for law in LAWS]
    assert all(law.title and set(law.needs) <= set(names[: names.index(law.name)]) for law in LAWS)


class OneConvolution(nn.Module):
    """Of an image: one network gives s and t, in the halves of its channels."""

    mask: Tensor

    def __init__(self, height: int, width: int):
        super().__init__()
        self.register_buffer("mask", checkerboard_mask(1, height, width))
        self.network = nn.Conv2d(1, 2, 3, padding=1)

    def s_and_t(self, z):
        s, t = self.network(self.mask * z).chunk(2, 1)
        return (1 - self.mask) * s.tanh(), (1 - self.mask) * t

    def forward(self, z):
        s, t = self.s_and_t(z)
        return z * s.exp() + t, total(s)

    def inverse(self, z):
        s, t = self.s_and_t(z)
        return (z - t) * (-s).exp(), -total(s)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4), (1, 2)])
def test_s_and_t_of_one_network_are_told_apart_whatever_the_size(shape):
    report = check(OneConvolution(*shape), (1, *shape))
    assert report and "forward is equation 15" in str(report), f"\n{report}"


def doing(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Direction:
    """``forward``, with other outputs where b = 0: a function of z, s and t."""
    return lambda z, b, s, t: (b * z + (1 - b) * formula(z, s(b * z), t(b * z)), total((1 - b) * s(b * z)))


class ShiftFirst(nn.Module):
    """z' = (z + t) ⊙ exp(s), as in Glow, which knows no networks; ``undo`` is a function of z', exp(s) and t."""

    def __init__(self, undo):
        super().__init__()
        self.s, self.t, self.undo = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), undo

    def forward(self, z):
        return (z + self.t) * self.s.exp(), self.s.sum().expand(len(z))

    def inverse(self, z):
        return self.undo(z, self.s.exp(), self.t), -self.s.sum().expand(len(z))


class Autoregressive(nn.Module):
    """z'_i = z_i exp(s_i) + t_i, where s_i and t_i are functions of z_1 to z_(i−1); ``undo`` as above."""

    def __init__(self, undo=lambda z, a, t: (z - t) / a, turned: bool = False, do=lambda z, a, t: z * a + t):
        super().__init__()
        self.weight, self.turned = nn.Parameter(0.3 * torch.randn(2, 4, 4)), turned
        self.undo, self.do = undo, do

    def s_and_t(self, z):
        of_s, of_t = self.weight.tril(-1)
        return (z @ of_s.T).tanh() + 0.1, z @ of_t.T

    def along(self, z):
        s, t = self.s_and_t(z)
        return self.do(z, s.exp(), t), total(s)

    def against(self, z):
        x = torch.zeros_like(z)
        for _ in range(4):
            s, t = self.s_and_t(x)
            x = self.undo(z, s.exp(), t)
        return x, -total(self.s_and_t(x)[0])

    def forward(self, z):
        return (self.against if self.turned else self.along)(z)

    def inverse(self, z):
        return (self.along if self.turned else self.against)(z)


class OfNflows(Transform):
    """``forward`` is data → noise, as there."""

    mask: Tensor

    def __init__(self, forward: Direction, inverse: Direction):
        super().__init__()
        self.scale_net, self.translation_net = Network(Offer((4,)), True), Network(Offer((4,)), False)
        self.register_buffer("mask", checkerboard_mask(4))
        self.directions = forward, inverse

    def forward(self, inputs, context=None):
        return self.directions[0](inputs, self.mask, self.scale_net, self.translation_net)

    def inverse(self, inputs, context=None):  # type: ignore[override]
        return self.directions[1](inputs, self.mask, self.scale_net, self.translation_net)


class OfTorch(torch.distributions.Transform):
    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self):
        super().__init__()
        self.w = torch.tensor([0.5, -0.3])

    def _call(self, x):
        return x * self.w.exp() + 1

    def _inverse(self, y):
        return (y - 1) * self.w.exp()

    def log_abs_det_jacobian(self, x, y):
        return self.w.sum().expand(x.shape[:-1])


def test_a_transform_of_torchs_is_told_in_its_own_words():
    assert "which is the transform's own _inverse" in " ".join(str(check(OfTorch(), (2,))).split())


MAPS = {  # what is wrong: the layer, its features, and the mistake; the log-determinants are right
    "shift first, +s": (lambda: ShiftFirst(lambda z, a, t: z * a - t), 3, "inverse uses +s"),
    "shift first, +t": (lambda: ShiftFirst(lambda z, a, t: z / a + t), 3, "inverse adds t"),
    "shift first, the order, of which either may be meant": (lambda: ShiftFirst(lambda z, a, t: (z - t) / a), 3, None),
    "autoregressive, +s": (lambda: Autoregressive(lambda z, a, t: (z - t) * a), 4, "inverse uses +s"),
    "autoregressive, t after": (
        lambda: Autoregressive(lambda z, a, t: z / a - t),
        4,
        "inverse subtracts t after scaling",
    ),
    "autoregressive, turned, +s": (lambda: Autoregressive(lambda z, a, t: (z - t) * a, True), 4, "forward uses +s"),
    "autoregressive, −s": (lambda: Autoregressive(do=lambda z, a, t: z / a + t), 4, "forward uses −s"),
    "forward −s": (lambda: Hand((4,), doing(lambda z, s, t: z * (-s).exp() + t)), 4, "forward uses −s"),
    "forward −t": (lambda: Hand((4,), doing(lambda z, s, t: z * s.exp() - t)), 4, "forward subtracts t"),
    "forward s": (lambda: Hand((4,), doing(lambda z, s, t: z * s + t)), 4, "forward multiplies by s"),
    "nflows, forward +s": (
        lambda: OfNflows(undoing(lambda z, s, t: (z - t) * s.exp()), forward),
        4,
        "forward uses +s",
    ),
    "nflows, forward +t": (
        lambda: OfNflows(undoing(lambda z, s, t: (z + t) * (-s).exp()), forward),
        4,
        "forward adds t",
    ),
    "nflows, forward t after": (
        lambda: OfNflows(undoing(lambda z, s, t: z * (-s).exp() - t), forward),
        4,
        "forward subtracts t after scaling",
    ),
    "nflows, inverse −s": (
        lambda: OfNflows(inverse, doing(lambda z, s, t: z * (-s).exp() + t)),
        4,
        "inverse uses −s",
    ),
    "torch, _inverse +s": (OfTorch, 2, "forward uses +s"),
}


@pytest.mark.parametrize("planted", MAPS)
def test_where_the_maps_disagree_no_right_log_determinant_is_blamed(planted):
    thing, features, mistake = MAPS[planted]
    report = check(thing(), (features,))
    assert "round_trip" in report.broken and report.mistakes == [mistake] * bool(mistake), f"\n{report}"


@pytest.mark.parametrize(
    "layer", [lambda: ShiftFirst(lambda z, a, t: z / a - t), Autoregressive, lambda: Autoregressive(turned=True)]
)
def test_no_right_layer_beside_them_is_accused(layer):
    thing = layer()
    report = check(thing, (3 if isinstance(thing, ShiftFirst) else 4,))
    assert report, f"\n{report}"


def test_a_sign_that_is_wrong_beside_a_wrong_inverse_is_still_named():
    def wrong(z, b, s, t):
        y, log_det = undoing(lambda z, s, t: z * (-s).exp() - t)(z, b, s, t)
        return y, -log_det

    report = check(Hand((4,), forward, wrong), (4,))
    assert report.mistakes[0] == "inverse subtracts t after scaling" and "Equation 16" in str(report), f"\n{report}"


class OneNetwork(nn.Module):
    """A masked layer with one network for both, of which ``split`` makes s and t; three parts of it may be wrong."""

    mask: Tensor

    def __init__(self, split, features: int = 4, log_det=lambda b, s: total((1 - b) * s), do=forward, undo=inverse):
        super().__init__()
        self.register_buffer("mask", checkerboard_mask(features))
        self.weight, self.scale = nn.Parameter(0.3 * torch.randn(2 * features, features)), nn.Parameter(torch.ones(1))
        self.network = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 2 * features))
        self.split, self.log_det, self.do, self.undo = split, log_det, do, undo

    def forward(self, z):
        y, _ = self.do(z, self.mask, lambda x: self.split(self, x)[0], lambda x: self.split(self, x)[1])
        return y, self.log_det(self.mask, self.split(self, self.mask * z)[0])

    def inverse(self, z):
        y, _ = self.undo(z, self.mask, lambda x: self.split(self, x)[0], lambda x: self.split(self, x)[1])
        return y, -self.log_det(self.mask, self.split(self, self.mask * z)[0])


def halves(of_s: Callable[[OneNetwork, Tensor], Tensor]):
    """s is a function of the layer and the first half of what its network gives; t is the second."""

    def split(layer, z):
        first, second = layer.network(z).chunk(2, 1)
        return of_s(layer, first), second

    return split


SPLITS = {
    "alternating": lambda layer, z: layer.network(z).view(len(z), -1, 2).unbind(2),
    "a learned bound": halves(lambda layer, s: layer.scale * s.tanh()),
    "twice tanh": halves(lambda layer, s: 2 * s.tanh()),
    "clamped": halves(lambda layer, s: s.clamp(-0.3, 2)),
    "an arcus tangent": halves(lambda layer, s: 0.6 * s.atan()),
    "the logarithm of a scale": halves(lambda layer, s: torch.sigmoid(s + 2).log()),
    "no modules": lambda layer, z: (z @ layer.weight[:4].T.sin(), z @ layer.weight[4:].T),
}
B_FOR_1_B = "b stands where 1 − b should, in the log-determinant"


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_factor_is_named_however_s_is_computed(split):
    assert check(OneNetwork(SPLITS[split]), (4,))
    for log_det, mistake in ((lambda b, s: total(s), FACTOR), (lambda b, s: total(b * s), B_FOR_1_B)):
        report = check(OneNetwork(SPLITS[split], log_det=log_det), (4,))
        assert report.mistakes == [mistake] and "Equation 17" in str(report), f"\n{report}"
    if split != "no modules":  # where t is not seen
        report = check(OneNetwork(SPLITS[split], do=PLANTED["factor in outputs"][0]), (4,))
        assert report.mistakes == [FACTOR] and "Equation 15" in str(report), f"\n{report}"


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "no modules"])
def test_the_direction_to_mend_is_known_however_s_is_computed(split):
    forward_adds = OneNetwork(SPLITS[split], do=doing(lambda z, s, t: z * s.exp() - t))
    inverse_adds = OneNetwork(SPLITS[split], undo=undoing(lambda z, s, t: (z + t) * (-s).exp()))
    shifts_first = doing(lambda z, s, t: (z + t) * s.exp())
    assert check(OneNetwork(SPLITS[split], do=shifts_first, undo=undoing(lambda z, s, t: z * (-s).exp() - t)), (4,))
    also_adds = OneNetwork(SPLITS[split], do=shifts_first, undo=undoing(lambda z, s, t: z * (-s).exp() + t))
    assert check(also_adds, (4,)).mistakes == ["inverse adds t"]
    assert check(forward_adds, (4,)).mistakes == ["forward subtracts t"]
    assert check(inverse_adds, (4,)).mistakes == ["inverse adds t"]


class Halves(nn.Module):
    """The second half is scaled and shifted by what a network of ``given`` says, a function of both halves and context.

    In inverse it is of ``given_back``.
    """

    def __init__(self, given, given_back=None, width: int = 2, undo=lambda z, s, t: (z - t) * (-s).exp()):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 4))
        self.given, self.given_back, self.undo = given, given_back or given, undo

    def forward(self, z, context=None):
        first, second = z.chunk(2, 1)
        s, t = self.network(self.given(first, second, context)).chunk(2, 1)
        return torch.cat((first, second * s.exp() + t), 1), s.sum(1)

    def inverse(self, z, context=None):
        first, second = z.chunk(2, 1)
        s, t = self.network(self.given_back(first, second, context)).chunk(2, 1)
        return torch.cat((first, self.undo(second, s, t)), 1), -s.sum(1)


SEES = {  # what the network sees that it should not
    "all of z": (lambda: Halves(lambda a, b, c: torch.cat((a, b), 1), width=4), None),
    "all of z, and the context": (lambda: Halves(lambda *given: torch.cat(given, 1), width=7), 3),
    "the context, and all of z": (lambda: Halves(lambda a, b, c: torch.cat((c, b, a), 1), width=7), 3),
    "all of z in inverse only": (
        lambda: Halves(lambda a, b, c: torch.cat((a, 0 * b, c), 1), lambda *given: torch.cat(given, 1), 7),
        3,
    ),
    "the half that changes": (lambda: Halves(lambda a, b, c: b), None),
    "the half that changes, and the context": (lambda: Halves(lambda a, b, c: torch.cat((b, c), 1), width=5), 3),
}


@pytest.mark.parametrize("planted", SEES)
def test_a_network_that_sees_what_changes_is_named(planted):
    thing, width = SEES[planted]
    report = check(thing(), (4,), width)
    assert report.mistakes == ["the networks see unmasked z"], f"\n{report}"
    assert "gives network " in str(report), f"\n{report}"


class MasksItself(nn.Module):
    """A network that may be given all of z: it looks at a part of it."""

    def __init__(self, kept: Tensor):
        super().__init__()
        self.kept, self.linear = nn.Buffer(kept.float()), nn.Linear(4, 4)

    def forward(self, z):
        return self.linear(z * self.kept).tanh()


class Made(nn.Module):
    """s and t of an autoregressive layer, each of the coordinates before its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(4, 4))

    def forward(self, z):
        return (z @ self.weight.tril(-1).T).sin()


class OfMade(Autoregressive):
    """The same with networks, which are rightly given all of z, and whose first s and t are 0."""

    def __init__(self, undo=lambda z, a, t: (z - t) / a):
        super().__init__(undo)
        self.of_s, self.of_t = Made(), Made()
        del self.weight

    def s_and_t(self, z):
        return self.of_s(z), self.of_t(z)


def test_a_network_that_masks_what_it_is_given_is_not_blamed_for_another_mistake():
    layer = Hand(
        (4,),
        lambda z, b, s, t: forward(z, b, lambda _: s(z), lambda _: t(z)),
        lambda z, b, s, t: undoing(lambda z, s, t: (z - t) * s.exp())(z, b, lambda _: s(z), lambda _: t(z)),
    )
    layer.scale_net, layer.translation_net = MasksItself(layer.mask), MasksItself(layer.mask)
    assert check(layer, (4,)).mistakes == ["inverse uses +s"]
    assert check(OfMade(), (4,))
    assert check(OfMade(lambda z, a, t: (z - t) * a), (4,)).mistakes == ["inverse uses +s"]


def test_a_map_that_is_not_triangular_is_not_told_that_its_scale_is_another():
    class Mixes(Autoregressive):
        def s_and_t(self, z):
            of_s, of_t = self.weight
            return (z @ of_s.T).tanh() + 0.1, z @ of_t.T

    report = check(Mixes(), (4,))
    assert report.broken and not report.mistakes, f"\n{report}"


class Additive(nn.Module):
    """A masked layer without s: z' = z + (1 − b) ⊙ t(b ⊙ z); ``undo`` is a function of z' and (1 − b) ⊙ t."""

    mask: Tensor

    def __init__(self, undo):
        super().__init__()
        self.network, self.undo = MLP(4, 4), undo
        self.register_buffer("mask", checkerboard_mask(4))

    def shift(self, z):
        return (1 - self.mask) * self.network(self.mask * z)

    def forward(self, z):
        return z + self.shift(z), z.new_zeros(len(z))

    def inverse(self, z):
        return self.undo(z, self.shift(z)), z.new_zeros(len(z))


def test_a_layer_without_s_is_not_told_of_s():
    assert check(Additive(lambda z, t: z - t), (4,))
    report = check(Additive(lambda z, t: z + t), (4,))
    assert report.mistakes == ["inverse adds t"] and "it adds t, as forward does: subtract it" in str(report)
    assert "exp" not in str(report), f"\n{report}"
    report = check(Additive(lambda z, t: z), (4,))
    assert report.mistakes == ["inverse returns its input"], f"\n{report}"


class Square(nn.Module):
    """z' = (z + 9 + t)², of which ``inverse`` may take the wrong root, and log_det the logarithm of what is below 0."""

    def __init__(self, root: int, sign: int):
        super().__init__()
        self.t, self.root, self.sign = nn.Parameter(torch.zeros(2)), root, sign

    def forward(self, z):
        return (z + 9 + self.t) ** 2, (2 * self.sign * (z + 9 + self.t)).log().sum(1)

    def inverse(self, z):
        x = self.root * z.sqrt() - 9 - self.t
        return x, -(2 * (x + 9 + self.t)).log().sum(1)


def test_no_absolute_value_is_advised_where_the_map_itself_is_wrong():
    named = check(Square(1, -1), (2,))
    assert named.mistakes == ["log-determinant is not a number"], f"\n{named}"
    report = check(Square(-1, 1), (2,))
    assert {"log_det_shape", "round_trip"} <= set(report.broken) and not report.mistakes, f"\n{report}"
    assert "absolute" not in str(report), f"\n{report}"


class ShiftFirstSign(ShiftFirst):
    def forward(self, z):
        y, log_det = super().forward(z)
        return y, -log_det


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (lambda: Hand((4,), PLANTED["sign"][0]), 4),
        (lambda: ShiftFirstSign(lambda z, a, t: z / a - t), 3),
    ],
)
def test_a_wrong_sign_is_answered_by_what_to_do(layer, features):
    report = check(layer(), (features,))
    assert report.mistakes == [SIGN], f"\n{report}"
    assert "change its sign, to that of forward's own Jacobian" in " ".join(str(report).split()), f"\n{report}"
