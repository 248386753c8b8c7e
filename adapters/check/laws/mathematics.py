"""Laws of the map: a bijection, its two log-determinants, its mask, and the exercise's equations."""

import math
from collections.abc import Callable

import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.check.evidence import TRIP, Evidence
from adapters.check.laws.finding import REMARK, RIGHT, UNASKED, WRONG, Finding
from adapters.check.measure import WORST, distance, is_tame, jacobian, log_abs_det, relative, worst_of
from adapters.check.passes import equation_15, equation_16
from adapters.check.subject import FORWARD, INVERSE, Wrong, kind
from adapters.check.words import number, numbers, offset, smallest, z_is

RADII = (7.83, 3.91, 31.7, 15.9)  # the size of rows far from 0; none is a likely edge of a bin
FOUND = 1e-5  # how far off an inverse may be that searches; forward's slopes make more of it
FAR = 8  # up to this size a fault there is more than a remark


def round_trip(e: Evidence) -> Finding:
    """f⁻¹(f(x)) = x and f(f⁻¹(z)) = z."""
    if e.one_way:
        return Finding(REMARK, "it has no inverse, so that it can only be run one way")
    worst = 0.0
    for first, second, lost in ((e.forward, e.back, 0.0), (e.inverse, e.forth, e.lost)):
        if second.y.shape != first.x.shape:
            return Finding(
                WRONG, f"{second.direction} returns {kind(second.y)}, {first.direction} took {kind(first.x)}"
            )
        errors = distance(second.y, first.x)
        if second is e.forth and not worst_of(errors, lost) <= TRIP:
            errors = errors / (FOUND * torch.linalg.matrix_norm(second.jacobian, 2) / TRIP).clamp(min=1)
        worst = max(worst, worst_of(errors, lost))
        if not worst <= TRIP:
            row = smallest(first.x, errors, TRIP)
            between = f"{first.direction} gives {numbers(first.y[row])}, of which {second.direction} makes"
            return Finding(WRONG, f"at {z_is(first, row)} {between} {numbers(second.y[row])}", error=worst)
    return Finding(RIGHT, f"to {worst:.0e}", error=worst)


def log_det(direction: str) -> Callable[[Evidence], Finding]:
    """What comes with f is log|det J_f|; likewise with f⁻¹."""

    def measure(e: Evidence) -> Finding:
        if e.one_way and direction == INVERSE:
            return Finding(UNASKED, "it has no inverse")
        p = e.at(direction)
        try:
            exact = p.exact
        except RuntimeError as error:
            return Finding(WRONG, f"autograd can't go through {direction}: {' '.join(str(error).split())}")
        errors = relative(p.log_det, exact)
        worst = worst_of(errors)
        if worst <= TRIP:
            return Finding(RIGHT, f"to {worst:.0e}", error=worst)
        row = smallest(p.x, errors, TRIP)
        words = f"at {z_is(p, row)} {direction} says {number(p.log_det[row])}, autograd's Jacobian {number(exact[row])}"
        return Finding(WRONG, words + offset(p.log_det - exact), error=worst)

    return measure


def mask_kept(e: Evidence) -> Finding:
    """Where b = 1, either direction gives what it was given."""
    if e.mask is None or e.one_way:
        return Finding(UNASKED, "it has no mask of its own")
    name, b = e.mask
    for p in (e.forward, e.inverse):
        if p.y.shape != p.x.shape:
            return Finding(UNASKED, "the shape changes")
        if (b & ~p.kept).any():
            x, y = p.flat
            i = int((b & ~p.kept).nonzero()[0])
            row = int((y - x)[:, i].abs().argmax())
            words = f"{name}[{i}] is 1, and yet {p.direction} makes {number(y[row, i])} of {number(x[row, i])} there"
            return Finding(WRONG, words)
    return Finding(RIGHT)


def equations(e: Evidence) -> Finding:
    """Of a layer in the exercise's form, which is one with a mask, an s and a t."""
    if e.mask is None or e.one_way or not (~e.forward.kept).any():
        return Finding(UNASKED, "it is no masked affine coupling layer")
    if e.forward.networks(equation_15):
        return Finding(RIGHT, "forward is equation 15, noise → data")
    if not e.forward.networks(equation_16):
        return Finding(UNASKED, "its s and t are not seen")
    if isinstance(e.subject.transform, Transform):
        return Finding(RIGHT, "forward is equation 16, data → noise, as nflows has it")
    return Finding(
        WRONG, "forward computes equation 16, data → noise; the exercise's forward is equation 15, noise → data"
    )


def far(e: Evidence) -> Finding:
    """Log-determinants and round trip hold as well at rows whose coordinates are R/2 to R in size, R about 4 to 32.

    Beyond 8 it is a remark: many a right layer saturates there, or searches for its inverse only so far.
    """
    if e.unit:
        return Finding(UNASKED, "inputs outside (0, 1) are not taken")
    remark = ""
    for row in range(len(e.x)):
        near, radius = e.x[row : row + 1], RADII[row % len(RADII)]
        x = radius / 2 * (near.sign() + near / near.abs().max())
        context = None if e.context is None else e.context[row : row + 1]
        found = _far_off(e, x, context, radius <= FAR)
        if found and radius <= FAR and _is_no_datum(e, x, context):
            low, high = e.range_of(INVERSE)
            edge = 0.05 * (high - low)
            found = _far_off(e, x.clamp(low + edge, high - edge), context, True)
        if found and radius <= FAR:
            remedy = (
                "something is cut off or wrapped round there, by clamp, where, remainder or a bound: bound s rather "
            )
            remedy += "than z, and let the inverse and the log-determinant follow whatever is cut"
            return Finding(WRONG, found, "it is right near 0 only", remedy)
        remark = remark or found
    return Finding(REMARK, remark) if remark else Finding(RIGHT)


def _is_no_datum(e: Evidence, x: Tensor, context: Tensor | None) -> bool:
    """Whether inverse, which forward undoes there, gives no such row: an angle that is out of (−π, π), for instance.

    What is wrapped round keeps its slopes there. What is cut off has lost them, and with them the data that lie there,
    unless it says so itself by a log-determinant of −∞, which is density 0.
    """
    if e.one_way or e.slow or e.gives(INVERSE, x):
        return False
    try:
        exact = log_abs_det(jacobian(e.forward.function, x, context))
        with torch.no_grad():
            y, log_det = e.subject.run(FORWARD, x.clone(), context)
            if exact == -math.inf < log_det:
                return False
            again = e.subject.run(FORWARD, e.subject.run(INVERSE, y.clone(), context)[0], context)[0]
    except Wrong:
        return False
    return bool(distance(again, y) <= TRIP)


def _far_off(e: Evidence, x: Tensor, context: Tensor | None, near: bool) -> str:
    """What is wrong at that one row; empty where nothing is, and where it is too steep or flat for float64 to tell."""
    try:
        with torch.no_grad():
            y, log_det = e.forward.function(x.clone(), context)
        slopes = jacobian(e.forward.function, x, context)
        if not (is_tame(y, slopes) and log_det.shape == (1,)):
            return ""
        if 0 < torch.linalg.svdvals(slopes).min() < 1 / WORST:  # a sigmoid that is all but 0 or 1
            return ""
        exact, z = log_abs_det(slopes), f"z = {numbers(x)}"
        underflow = not (near or exact.isfinite())  # of tanh, say
        if not (underflow or torch.equal(log_det, exact) or relative(log_det, exact) <= TRIP):
            return f"at {z} forward says {number(log_det)}, autograd's Jacobian {number(exact)}"
        if e.one_way or e.slow:
            return ""
        with torch.no_grad():
            back, log_det = e.subject.run(INVERSE, y.clone(), context)
    except Wrong:
        return ""  # what raises there is a remark of another law
    if underflow and not back.isfinite().all():
        return ""
    if not distance(back, x) <= TRIP:
        return f"at {z} forward gives {numbers(y)}, of which inverse makes {numbers(back)}"
    if not (underflow or torch.equal(log_det, -exact) or relative(log_det, -exact) <= TRIP):
        return f"at z' = {numbers(y)} inverse says {number(log_det)}, autograd's Jacobian {number(-exact)}"
    return ""


def extremes(e: Evidence) -> Finding:
    """At 0, ±30 and ±1000 all stays finite; else a remark, since many a right layer overflows."""
    remarks = []
    for p in e.repeatable:
        for x, what in ((torch.zeros_like(p.x), "0"), (30 * torch.sign(p.x), "±30"), (1000 * torch.sign(p.x), "±1000")):
            if e.unit or (p.y.shape != p.x.shape):
                break
            try:
                with torch.no_grad():
                    y, log_det = p.function(x, e.context)
            except Wrong as error:
                remarks.append(f"at z = {what} {error}")
                break
            if not (y.isfinite().all() and log_det.isfinite().all()):
                tanh = ": end the network of s in tanh, as exercise 2.5 says" * bool(e.subject.theirs() and p.seen)
                remarks.append(f"at z = {what} {p.direction} is no longer finite{tanh}")
                break
    return Finding(REMARK, remarks[0]) if remarks else Finding(RIGHT)
