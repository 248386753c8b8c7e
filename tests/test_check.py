"""Is my layer right? Planted mistakes are each named, and no right layer of any library is accused.

A planted mistake is one direction of the exercise's layer, written wrong: a row of ``PLANTED``, which is held against the
check as a layer of vectors and as one of images. Below them stand those that need a class, a spline or a flow.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adapters import check, checkerboard_mask
from adapters.check import WrongLayer
from adapters.check.loading import Network

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

    def __init__(self, event_shape: tuple[int, ...], forward: Direction = forward, inverse: Direction = inverse):
        super().__init__()
        self.scale_net, self.translation_net = Network(event_shape, None, True), Network(event_shape, None, False)
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
        return tuple(part.to(z.dtype) for part in direction(z, b, lambda x: s(x).float(), lambda x: t(x).float()))

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
    "twice": (returning(lambda b, s: 2 * total((1 - b) * s)), inverse, "log-determinant counted more than once", 17),
    "before tanh": (
        lambda z, b, s, t: (
            b * z + (1 - b) * (z * s(b * z).tanh().exp() + t(b * z)),
            total((1 - b) * s(b * z)),
        ),
        lambda z, b, s, t: inverse(z, b, lambda x: s(x).tanh(), t),
        "log-determinant of another s than the one used",
        17,
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
        lambda z, b, s, t: forward(z, b, s, lambda x: t(x) - x.mean(0).sum()),
        lambda z, b, s, t: inverse(z, b, s, lambda x: t(x) - x.mean(0).sum()),
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
        assert f"equation {equation}" in str(report)
    with pytest.raises(WrongLayer, match="Wrong:"):
        report.raise_if_wrong()


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
    assert "off by the same 0.1 in every row" in str(report) and "No usual mistake explains" in str(report)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_the_exercises_layer_is_right(shape):
    report = check(Hand(shape), shape)
    assert report, report
    report.raise_if_wrong()
    assert "forward is equation 15" in str(report)
