"""What a flow has to pass before its figures count: it inverts, its log-determinant is right, its density is one."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from nflows.distributions import Distribution
from torch import Tensor

from adapters.flow import Flow
from runs.common.devices import seeded

ROUND_TRIP = (
    1e-4  # largest |x − f⁻¹(f(x))| / (1 + |x|), and of nine in ten draws from the base |z − f(f⁻¹(z))| likewise
)
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
GRID, CELLS = 500, 20  # along an axis, for ∫p and for its rectangles
SAMPLES, BASE_SAMPLES = 20_000, 40_000
SETTLING = 30  # passes in training mode after which running statistics are near the data's


def check(flow: Flow, x: Tensor, box: tuple[float, float] | None = None) -> dict[str, float]:
    """The errors that ``LIMITS`` bounds, of a copy in float64, at the parameters it has.

    The copy is on the CPU, since not every device has float64. Random numbers go on afterwards as they were.

    Args:
        flow: over vectors of D coordinates.
        x: data, ``(n, D)``; wide data are tried at a few points only, since a Jacobian takes D backward passes.
        box: for D = 2, the interval that along either axis holds nearly all of the data: ∫p over its parts is compared
            with the share of the flow's own samples there, so that mass outside does no harm and lost mass is seen.
    """
    with seeded(0, CPU):
        twin = _twin(flow).eval()
        found = _errors(twin, _passes(twin, _few(x)))
        if _wide(x):  # of 784 pixels one comes back in the next bin of its histogram; before training it is held
            del found["inverse_log_det"]
        if box is not None:
            low, high = (torch.full((2,), end, dtype=torch.float64) for end in box)
            found["mass"] = mass_error(twin, low, high, SAMPLES)
    return found


def check_moved(flow: Flow, x: Tensor) -> dict[str, float]:
    """The same of a flow that is not trained yet, its parameters moved by N(0, 0.3²), its precision and its base's ∫p.

    Many a flow begins as the identity, where much that is wrong does not show. Where that move makes it so steep that
    float64 itself would be at fault, which autograd's Jacobian tells, it is halved. Running statistics, as of
    batch normalisation, first settle on the data.

    Args:
        flow: over vectors of D coordinates, without preprocessing.
        x: data as they come out of the preprocessing, ``(n, D)``.
    """
    with seeded(0, CPU):
        x = _few(x)
        for halving in range(HALVINGS + 1):
            twin = _twin(flow)
            _move(twin, MOVED / 2**halving)
            try:
                _settle(twin.train(), x)
                passes = _passes(twin.eval(), x)
                found = _errors(twin, passes)
            except Exception:  # many a library's layer raises where it is too steep
                if halving == HALVINGS:
                    raise
            else:
                if passes.tame():
                    break
        found["precision"] = precision_error(twin.transform, x[:8])
        if x.shape[1] == 2:
            found["base"] = base_error(twin.base)
    return found


def failures(found: dict[str, float]) -> list[str]:
    """Words for every gate that was not passed; NaN passes none."""
    return [f"{WORDS[key]} off by {error:.1e}" for key, error in found.items() if not error <= LIMITS[key]]


def _twin(flow: Flow) -> Flow:
    return copy.deepcopy(flow).cpu().double()


def _few(x: Tensor) -> Tensor:
    return x[: 100 if x.shape[1] <= 8 else 8].cpu().double()  # searching inverses are slow where there are many


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

    def tame(self) -> bool:
        """Whether float64 can tell a right map from a wrong one here."""
        if not all((values.abs() <= LARGEST).all() for values in (self.noise, self.samples, self.jacobians)):
            return False
        return bool((torch.linalg.cond(self.jacobians) <= WORST).all())


def _passes(flow: Flow, x: Tensor) -> _Passes:
    transform, n = flow.transform, len(x)
    with torch.no_grad():
        noise, log_det = transform(x)
        z, z_log_prob = flow.base.sample_and_log_prob(n)
        inverted, inverted_log_det = transform.inverse(torch.cat((noise, z)))  # at once: some search long for it
    jacobians = [  # of each row alone: what depends on its neighbours is seen
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


def base_error(base: Distribution) -> float:
    """``mass_error`` of a base, over all but the outermost of its samples."""
    with torch.no_grad():
        drawn = base.sample(BASE_SAMPLES)
    ends = torch.quantile(drawn, torch.tensor([1e-3, 1 - 1e-3], dtype=drawn.dtype), dim=0)
    return mass_error(base, *ends, BASE_SAMPLES)


@torch.no_grad()
def mass_error(density: Flow | Distribution, low: Tensor, high: Tensor, samples: int) -> float:
    """The largest |∫p − share of the samples| over rectangles that begin at ``low`` and end within the box.

    ∫p is by the midpoint rule on a grid of ``GRID``² cells, smaller towards the borders.

    Args:
        low, high: corners of the box, ``(2,)``.
        samples: how many to draw.
    """
    middles = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    weights = 6 * middles * (1 - middles) / GRID
    grid = low + (high - low) * _crowded(torch.cartesian_prod(middles, middles))
    values = torch.cat([density.log_prob(chunk).exp() for chunk in grid.split(50_000)]).reshape(GRID, GRID)
    values = values * weights * weights[:, None] * (high - low).prod()
    parts = GRID // CELLS
    mass = values.reshape(CELLS, parts, CELLS, parts).sum((1, 3))
    drawn = density.sample(samples)
    edges = _crowded(torch.arange(CELLS + 1, dtype=torch.float64) / CELLS)
    place = torch.bucketize(((drawn - low) / (high - low)).contiguous(), edges, right=True) - 1
    place = place[((place >= 0) & (place < CELLS)).all(1)]
    share = torch.bincount(place @ torch.tensor([CELLS, 1]), minlength=CELLS**2).reshape(CELLS, CELLS) / len(drawn)
    return _worst((mass - share).cumsum(0).cumsum(1).abs())


def _crowded(u: Tensor) -> Tensor:
    """From [0, 1] onto itself, crowded at both ends, where a density may rise steeply: with Φ⁻¹ before it, say."""
    return u**2 * (3 - 2 * u)


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each row, the largest |found − wanted| / (1 + |wanted|)."""
    return ((found - wanted).abs() / (1 + wanted.abs())).amax(1)


def _wide(x: Tensor) -> bool:
    return x.shape[1] > 64


def _worst(errors: Tensor) -> float:
    """The largest; NaN if any is."""
    return errors.max().item() if not errors.isnan().any() else math.nan
