"""The standard normal's quantile function Φ⁻¹, on every device."""

import torch
from torch import Tensor

# Wichura (1988), algorithm AS 241, function PPND7: in each of three ranges of p, Φ⁻¹ is a ratio of two polynomials. A
# tuple holds the coefficients of numerator and denominator, by rising powers: for p near ½, in the tails, and far out.
NEAR = (3.3871327179, 50.434271938, 159.29113202, 59.109374720), (1.0, 17.895169469, 78.757757664, 67.187563600)
TAIL = (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975)
FAR = (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635)


def ndtri(p: Tensor) -> Tensor:
    """Φ⁻¹(p) for each entry of p, of any shape.

    It is ``torch.special.ndtri``, or ``rational_ndtri`` on a device that does not have it, such as Apple's MPS.
    """
    try:
        return torch.special.ndtri(p)
    except NotImplementedError:
        return rational_ndtri(p)


def rational_ndtri(p: Tensor) -> Tensor:
    """Φ⁻¹(p) for p in (0, 1), to about 7 digits, by Wichura's algorithm AS 241."""
    q = p - 0.5
    near = q * _ratio(NEAR, 0.180625 - q * q)
    r = (-torch.minimum(p, 1 - p).clamp_min(torch.finfo(p.dtype).tiny).log()).sqrt()
    tail = torch.where(r <= 5, _ratio(TAIL, r - 1.6), _ratio(FAR, r - 5))
    return torch.where(q.abs() <= 0.425, near, torch.where(q < 0, -tail, tail))


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Tensor) -> Tensor:
    numerator, denominator = (_polynomial(powers, r) for powers in coefficients)
    return numerator / denominator


def _polynomial(coefficients: tuple[float, ...], r: Tensor) -> Tensor:
    total = torch.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * r + coefficient
    return total
