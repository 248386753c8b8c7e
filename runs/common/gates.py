"""What a flow has to pass before its figures count: it inverts, its log-determinant is right, its density is one.

Samples are drawn, and log_prob of them is held against the log_prob that they come with, in any dimension. In the plane
their share of each region is held against the integral of p over it, too.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nflows.distributions import Distribution
from torch import Tensor

from adapters.flow import Flow
from runs.common.devices import seeded

# |x − f⁻¹(f(x))| / (1 + |x|), the largest; and |z − f(f⁻¹(z))| / (1 + |z|) of nine in ten draws from the base
ROUND_TRIP = 1e-4
LOG_DET = 1e-4  # nats, of either direction, beside autograd's of the forward one
AGREEMENT = 1e-3  # nats: log_prob of samples, beside the one that they come with
MASS = 0.02  # |∫p − share of the samples|, over the worst of many rectangles
PRECISION = 1e-3  # |f(x + h) − 2 f(x) + f(x − h)| beside |f(x + h) − f(x − h)|: h in float64, 1e-7 / h in float32
LIMITS = {
    "round_trip": ROUND_TRIP,
    "log_det": LOG_DET,
    "inverse_log_det": LOG_DET,
    "agreement": AGREEMENT,
    "precision": PRECISION,
    "mass": MASS,
    "base": MASS,
}
WORDS = {
    "round_trip": "round trip",
    "log_det": "log-determinant",
    "inverse_log_det": "inverse log-determinant",
    "agreement": "sample/log_prob",
    "precision": "float64 (float32 within?)",
    "mass": "∫p",
    "base": "∫p of the base",
}
CPU = torch.device("cpu")
STEP = 1e-6  # h
MOVED = 0.3  # standard deviation of what moves the parameters of a flow that is not trained yet
HALVINGS = 5  # of it at most
LARGEST, WORST = 1e4, 1e6  # |f(x)| and condition number of the Jacobian up to which float64 tells right from wrong
CELLS = 20  # along an axis, into which ∫p is parted
SETTLING = 30  # passes in training mode after which running statistics are near the data's


class Quadrature(NamedTuple):
    """How closely ∫p is compared with the share of the samples.

    Attributes:
        grid: points along an axis, a multiple of ``CELLS``.
        samples: draws from a flow.
        base_samples: draws from a base.
    """

    grid: int = 500
    samples: int = 20_000
    base_samples: int = 40_000


def check(
    flow: Flow, x: Tensor, box: tuple[float, float] | None = None, quadrature: Quadrature | None = None
) -> dict[str, float]:
    """The errors that ``LIMITS`` bounds, of a copy in float64, at the parameters it has.

    The copy is on the CPU, since not every device has float64. Random numbers go on afterwards as they were.

    Args:
        flow: over vectors of D coordinates.
        x: data, ``(n, D)``; wide data are tried at a few points only, since a Jacobian takes D backward passes.
        box: for D = 2, the interval that along either axis holds nearly all of the data: ∫p over its parts is compared
            with the share of the flow's own samples there, so that mass outside does no harm and lost mass is seen.
        quadrature: how closely.
    """
    quadrature = quadrature or Quadrature()
    with seeded(0, CPU):
        flow = _in_float64(flow).eval()
        found = _errors(flow, _passes(flow, _first_rows(x)))
        if _wide(x):  # one of 784 pixels may come back in the next bin of its histogram; ``check_moved`` holds it
            del found["inverse_log_det"]
        if box is not None:
            low, high = (torch.full((2,), end, dtype=torch.float64) for end in box)
            found["mass"] = mass_error(flow, low, high, quadrature.samples, quadrature.grid)
    return found


def check_moved(flow: Flow, x: Tensor, quadrature: Quadrature | None = None) -> dict[str, float]:
    """The same of a flow that is not trained yet, its parameters moved by N(0, 0.3²), its precision and its base's ∫p.

    Many a flow begins as the identity, where much that is wrong does not show: hence the move. It is halved where it
    makes the flow so steep that float64 itself would be at fault, which autograd's Jacobian tells. Running statistics,
    as those of batch normalisation, first settle on the data.

    Args:
        flow: over vectors of D coordinates, without preprocessing.
        x: data as they come out of the preprocessing, ``(n, D)``.
        quadrature: how closely the base's ∫p is looked at.
    """
    quadrature = quadrature or Quadrature()
    with seeded(0, CPU):
        x = _first_rows(x)
        moved, found = _moved_as_far_as_it_goes(flow, x)
        found["precision"] = precision_error(moved.transform, x[:8])
        if x.shape[1] == 2:
            found["base"] = base_error(moved.base, quadrature)
    return found


def _moved_as_far_as_it_goes(flow: Flow, x: Tensor) -> tuple[Flow, dict[str, float]]:
    """A copy in float64 whose parameters are moved, and its errors."""
    for halving in range(HALVINGS + 1):
        moved, last = _in_float64(flow), halving == HALVINGS
        _move(moved, MOVED / 2**halving)
        try:
            _settle(moved.train(), x)
            passes = _passes(moved.eval(), x)
            found = _errors(moved, passes)
        except Exception:  # many a library's layer raises where it is too steep
            if last:
                raise
        else:
            if last or passes.well_conditioned():
                return moved, found
    raise AssertionError("the last try returns or raises")


def failures(found: dict[str, float]) -> list[str]:
    """Words for every gate that was not passed; NaN passes none."""
    return [f"{WORDS[key]} off by {error:.1e}" for key, error in found.items() if not error <= LIMITS[key]]


def _in_float64(flow: Flow) -> Flow:
    return copy.deepcopy(flow).cpu().double()


def _first_rows(x: Tensor) -> Tensor:
    return x[: 100 if x.shape[1] <= 8 else 8].cpu().double()  # an inverse that searches is slow where there are many


def _move(flow: Flow, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, flow.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def _settle(flow: Flow, x: Tensor) -> None:
    """Pass the data through for as long as that changes a buffer."""
    for _ in range(SETTLING):
        before = [buffer.clone() for buffer in flow.buffers()]
        flow.encode(x)
        if all(map(torch.equal, before, flow.buffers())):
            return


class _Passes(NamedTuple):
    """What a flow makes of data x, and of noise z drawn from its base.

    Attributes:
        x, noise, log_det: data, f(x), and log|det J_f(x)| as returned.
        again, inverse_log_det: f⁻¹(f(x)), and what came with it.
        z, z_log_prob: draws from the base, and their log_prob as it comes with them.
        samples, samples_log_det: f⁻¹(z), and what came with it.
        jacobians: ``(k, D, D)``, autograd's of f at the first rows of x.
    """

    x: Tensor
    noise: Tensor
    log_det: Tensor
    again: Tensor
    inverse_log_det: Tensor
    z: Tensor
    z_log_prob: Tensor
    samples: Tensor
    samples_log_det: Tensor
    jacobians: Tensor

    def well_conditioned(self) -> bool:
        """Whether float64 can tell a right map from a wrong one here."""
        if not all((values.abs() <= LARGEST).all() for values in (self.noise, self.samples, self.jacobians)):
            return False
        return bool((torch.linalg.cond(self.jacobians) <= WORST).all())


def _passes(flow: Flow, x: Tensor) -> _Passes:
    transform: Any = flow.transform  # nflows says of a transform's call that it never returns
    n = len(x)
    with torch.no_grad():
        noise, log_det = transform(x)
        z, z_log_prob = flow.base.sample_and_log_prob(n)
        inverted, inverted_log_det = transform.inverse(torch.cat((noise, z)))  # at once: some search for it
    jacobians: list[Tensor] = [  # of each row alone: what depends on its neighbours is seen
        torch.autograd.functional.jacobian(lambda row: transform(row.unsqueeze(0))[0].squeeze(0), row)
        for row in x[: 1 if _wide(x) else 8]
    ]
    return _Passes(
        x, noise, log_det, inverted[:n], inverted_log_det[:n], z, z_log_prob, inverted[n:], inverted_log_det[n:],
        torch.stack(jacobians),
    )  # fmt: skip


@torch.no_grad()
def _errors(flow: Flow, passes: _Passes) -> dict[str, float]:
    """All but ∫p."""
    exact = torch.linalg.slogdet(passes.jacobians).logabsdet
    back = _distance(flow.encode(passes.samples), passes.z)
    gap = (flow.log_prob(passes.samples) - (passes.z_log_prob - passes.samples_log_det)).abs()
    gap = gap[back <= ROUND_TRIP]  # the others are where the preprocessing saturates, as Φ does far out
    most = torch.sort(back).values[math.ceil(0.9 * len(back)) - 1]
    return {
        "round_trip": _worst(torch.cat((_distance(passes.again, passes.x), most.reshape(1)))),
        "log_det": _worst((passes.log_det[: len(exact)] - exact).abs()),
        "inverse_log_det": _worst((passes.inverse_log_det[: len(exact)] + exact).abs()),
        "agreement": _worst(gap) if len(gap) else 0.0,  # none returned: the round trip fails
    }


@torch.no_grad()
def precision_error(transform: Callable, x: Tensor) -> float:
    """How rough outputs and log-determinant are over steps of ``STEP``: the median over the points, for kinks' sake.

    Of a smooth function the second difference is about h² and the first one h. Where float32 is within, either has
    its rounding, 1e-7.
    """
    step = STEP * torch.randn_like(x)
    (below, low), (here, middle), (above, high) = (transform(x + k * step) for k in (-1, 0, 1))
    rough = (above - 2 * here + below).norm(dim=1) / ((above - below).norm(dim=1) + STEP)
    rough_log_det = (high - 2 * middle + low).abs() / ((high - low).abs() + STEP)
    return max(rough.median().item(), rough_log_det.median().item())


def base_error(base: Distribution, quadrature: Quadrature) -> float:
    """``mass_error`` of a base, over all but the outermost of its samples."""
    with torch.no_grad():
        drawn = base.sample(quadrature.base_samples)
    low, high = torch.quantile(drawn, torch.tensor([1e-3, 1 - 1e-3], dtype=drawn.dtype), dim=0)
    return mass_error(base, low, high, quadrature.base_samples, quadrature.grid)


@torch.no_grad()
def mass_error(density: Flow | Distribution, low: Tensor, high: Tensor, samples: int, grid: int) -> float:
    """The largest |∫p − share of the samples| over rectangles that begin at ``low`` and end within the box.

    ∫p is by the midpoint rule on a grid of ``grid``² cells, which are smaller towards the borders.

    Args:
        density: in the plane.
        low, high: corners of the box, ``(2,)``.
        samples: how many to draw.
        grid: cells along an axis, a multiple of ``CELLS``.
    """
    middles = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    weights = 6 * middles * (1 - middles) / grid
    points = low + (high - low) * _finer_at_the_ends(torch.cartesian_prod(middles, middles))
    values = torch.cat([density.log_prob(chunk).exp() for chunk in points.split(50_000)]).reshape(grid, grid)
    values = values * weights * weights[:, None] * (high - low).prod()
    parts = grid // CELLS
    mass = values.reshape(CELLS, parts, CELLS, parts).sum((1, 3))
    drawn = density.sample(samples)
    edges = _finer_at_the_ends(torch.arange(CELLS + 1, dtype=torch.float64) / CELLS)
    place = torch.bucketize(((drawn - low) / (high - low)).contiguous(), edges, right=True) - 1
    place = place[((place >= 0) & (place < CELLS)).all(1)]
    share = torch.bincount(place @ torch.tensor([CELLS, 1]), minlength=CELLS**2).reshape(CELLS, CELLS) / len(drawn)
    return _worst((mass - share).cumsum(0).cumsum(1).abs())


def _finer_at_the_ends(u: Tensor) -> Tensor:
    """Equal steps in [0, 1] → steps that are small at both ends, where a density may rise steeply, as behind Φ⁻¹."""
    return u**2 * (3 - 2 * u)


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each row, the largest |found − wanted| / (1 + |wanted|)."""
    return ((found - wanted).abs() / (1 + wanted.abs())).amax(1)


def _wide(x: Tensor) -> bool:
    return x.shape[1] > 64


def _worst(errors: Tensor) -> float:
    """The largest; NaN if any is."""
    return errors.max().item() if not errors.isnan().any() else math.nan
