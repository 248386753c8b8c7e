"""What a flow has to pass before its figures count: it inverts, its log-determinant is right, its density is one."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from adapters.flow import Flow

ROUND_TRIP = 1e-3  # largest |x − f⁻¹(f(x))| / (1 + |x|)
LOG_DET = 1e-3  # nats, beside autograd's
MASS = 0.02  # |∫_box p − share of the samples in the box|
AGREEMENT = 1e-2  # nats: log_prob of samples, beside the one that they come with
GRID, SAMPLES = 500, 20_000  # cells along an axis, and draws, for ∫p
LIMITS = {"round_trip": ROUND_TRIP, "log_det": LOG_DET, "mass": MASS, "agreement": AGREEMENT}


def check(flow: Flow, x: Tensor, box: tuple[float, float] | None = None) -> dict[str, float]:
    """The errors that ``LIMITS`` bounds, of a copy in float64, at the parameters it has.

    The copy is on the CPU, since not every device has float64.

    Args:
        flow: over vectors of D coordinates.
        x: data, ``(n, D)``; wide data are tried at a few points only, since a Jacobian takes D backward passes.
        box: for D = 2, the interval that along either axis holds nearly all of the data: ∫p over it is compared with
            the share of the flow's own samples in it, so that mass outside does no harm and lost mass is seen.
    """
    twin = copy.deepcopy(flow).cpu().double().eval()
    x = x.cpu().double()
    wide = x.shape[1] > 64
    with torch.no_grad():
        some = x[:8] if wide else x[:1000]
        noise = twin._transform(some)[0]
        error = (twin._transform.inverse(noise)[0] - some).abs() / (1 + some.abs())
    found = {"round_trip": _worst(error), "log_det": log_det_error(twin._transform, x[: 1 if wide else 8])}
    if x.shape[1] == 2 and box is not None:
        found["mass"] = mass_error(twin, box)
    else:
        with torch.no_grad():
            samples, log_prob = twin.sample_and_log_prob(4 if wide else 100)
            found["agreement"] = _worst((twin.log_prob(samples) - log_prob).abs())
    return found


def failures(found: dict[str, float]) -> list[str]:
    """Words for every gate that was not passed; NaN passes none."""
    names = {"round_trip": "round trip", "log_det": "log-determinant", "mass": "∫p", "agreement": "sample/log_prob"}
    return [f"{names[key]} off by {error:.1e}" for key, error in found.items() if not error <= LIMITS[key]]


def log_det_error(transform: Callable, x: Tensor) -> float:
    """The largest difference in nats between log|det J| as returned and as autograd has it."""
    with torch.no_grad():
        _, log_det = transform(x)
    errors = []
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: transform(row.unsqueeze(0))[0].squeeze(0), row)
        errors.append((torch.linalg.slogdet(jacobian).logabsdet - value).abs())
    return _worst(torch.stack(errors))


@torch.no_grad()
def mass_error(flow: Flow, box: tuple[float, float]) -> float:
    """|∫_box p − share of the samples in the box|, by the midpoint rule on a grid of ``GRID``² cells."""
    low, high = box
    centre = low + (high - low) * (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    grid = torch.cartesian_prod(centre, centre)
    density = torch.cat([flow.log_prob(chunk).exp() for chunk in grid.split(50_000)])
    drawn = flow.sample(SAMPLES)
    inside = ((drawn >= low) & (drawn <= high)).all(1).double().mean()
    return abs(density.mean() * (high - low) ** 2 - inside).item()


def _worst(errors: Tensor) -> float:
    """The largest; NaN if any is."""
    return errors.max().item() if not errors.isnan().any() else float("nan")
