"""Laws of a density: log_prob, the samples and ∫p belong together."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import process_time
from typing import Any, NamedTuple

import torch
from nflows.flows import Flow
from torch import Tensor

from adapters.check.evidence import TRIP, Evidence, Quadrature
from adapters.check.laws.finding import RIGHT, UNASKED, WRONG, Finding
from adapters.check.measure import LARGEST, mass_error, relative, same, seeded, worst_of
from adapters.check.subject import FORWARD, INVERSE, OTHER, Hangs, NoInverse, Subject, Wrong, kind
from adapters.check.words import number, numbers, offset, smallest

MASS = 0.02  # of ``mass_error``, with as many samples as ``Quadrature`` has by itself
GENTLE = 0.1  # how far parameters are moved for ∫p, which a grid must resolve
TRIED = 2000  # draws that are timed first: ∫p takes fifty times as long
COMPARED = 20_000  # samples that are compared with the base


def samples(e: Evidence) -> Finding:
    """log_prob(x) = log p_base(f(x)) + log|det J_f(x)| at the flow's own samples, and is what comes with them."""
    if not e.subject.is_flow:
        return Finding(UNASKED, "it is no flow, which would have samples")
    subject = e.moved(GENTLE)
    with torch.no_grad(), seeded():
        try:
            x, came = _samples_of(subject, e.rows, e.context)
        except NoInverse:
            return Finding(UNASKED, "it can't sample")
        if x.shape != e.x.shape:
            return Finding(WRONG, f"sample({e.rows}) returns {kind(x)}, where {tuple(e.x.shape)} is wanted")
        near = (x.abs() <= LARGEST).flatten(1).all(1)  # of samples far out, float64 can't tell
        if not near.any():
            return Finding(UNASKED, "its samples are too large to judge")
        x, context = x[near], None if e.context is None else e.context[near]
        claimed = subject.log_prob(x, context)
        readings = _readings(subject, x, context)
    best = min(readings, key=lambda reading: worst_of(relative(claimed, reading.log_prob)), default=None)
    worst = 0.0
    if best is not None:
        errors = relative(claimed, best.log_prob)
        worst = worst_of(errors)
        if not worst <= TRIP:
            first = readings[0]
            row = smallest(x, relative(claimed, first.log_prob), TRIP)
            words = f"at x = {numbers(x[row])} log_prob says {number(claimed[row])}, base and log-determinant "
            words += number(first.log_prob[row]) + offset(claimed - first.log_prob)
            mistake, remedy = _density_mistake(readings, x, claimed)
            if not mistake and first.base is None:
                return Finding(UNASKED, "it does not show its base")
            return Finding(WRONG, words, mistake, remedy, error=worst)
        subject.scores = best.direction
        if not isinstance(subject.thing, Flow) and (wrong := _sampler(subject, e, best)):
            return wrong
    if came is not None:
        errors = relative(came[near], claimed)
        worst = max(worst, worst_of(errors, e.lost))
        if not worst <= TRIP:
            row = smallest(x, errors, TRIP)
            words = f"at x = {numbers(x[row])} sample_and_log_prob says {number(came[near][row])}, log_prob "
            return Finding(WRONG, words + number(claimed[row]), error=worst)
    return Finding(RIGHT, f"to {worst:.0e}", error=worst)


class _Reading(NamedTuple):
    """One way to read a flow: which direction leads to the noise, and which base the noise has.

    Attributes:
        direction: forward or inverse.
        base: ``None`` for a standard normal that the flow does not show.
        base_log_prob, log_det: of each row.
    """

    direction: str
    base: Any
    base_log_prob: Tensor
    log_det: Tensor

    @property
    def log_prob(self) -> Tensor:
        return self.base_log_prob + self.log_det


def _readings(subject: Subject, x: Tensor, context: Tensor | None) -> list[_Reading]:
    """All ways to read it, the usual one first: of a library's flow one, of somebody's own either direction."""
    other = OTHER[subject.scores]
    directions = (subject.scores,) if isinstance(subject.thing, Flow) else (subject.scores, other)
    found = []
    for direction in directions:
        for base in subject.bases() or [None]:
            with suppress(Wrong if direction == other else Hangs):
                noise, log_det = subject.run(direction, x, context)
                with suppress(Exception):  # a part that has a log_prob, and is no base
                    log_prob = _normal(noise) if base is None else subject.base_log_prob(noise, context, base)
                    if isinstance(log_prob, Tensor) and log_prob.shape == log_det.shape:
                        found.append(_Reading(direction, base, log_prob, log_det))
    return found


def _normal(noise: Tensor) -> Tensor:
    """The standard normal's log-density."""
    return -0.5 * (noise**2 + math.log(2 * math.pi)).flatten(1).sum(1)


def _sampler(subject: Subject, e: Evidence, reading: _Reading) -> Finding | None:
    """What is wrong with ``sample``: f(samples) must follow the base, whose draws they are compared with.

    Each coordinate has its Kolmogorov-Smirnov distance, the largest difference of the two distribution functions. One
    right sampler in ten million is above the limit.
    """
    subject = e.moved()
    drawing = _drawing(subject)
    context = _first_context(e)
    try:
        start = process_time()
        drawn = drawing.sample(TRIED, context(TRIED)).double()
        if process_time() - start < e.quadrature.seconds:
            drawn = drawing.sample(COMPARED, context(COMPARED)).double()
        n = len(drawn)
        base = torch.randn(n, *e.event_shape) if reading.base is None else reading.base.sample((n,))
        if base.shape != drawn.shape and reading.base is not None:
            base = reading.base.sample(drawn.shape)  # of each coordinate
        other = OTHER[reading.direction]
        distances = {}
        for direction in (reading.direction, other):
            noise = subject.run(direction, drawn, context(n))[0].flatten(1)
            noise = noise[noise.isfinite().all(1)]  # far out exp may overflow
            distances[direction] = _kolmogorov(noise, base.flatten(1).to(noise)) if len(noise) > 0.99 * n else math.inf
    except (Wrong, TypeError, AttributeError, RuntimeError):
        return None  # a base that draws in another way, say
    limit = math.sqrt(math.log(2e7 * base[0].numel()) / n)
    if distances[reading.direction] <= limit or distances[reading.direction] == math.inf:
        return None
    words = f"{reading.direction} makes noise of the samples that is not the base's"
    words += f": distribution functions differ by {distances[reading.direction]:.2f}, by chance less than {limit:.2f}"
    if distances[other] > limit:
        return Finding(WRONG, words, "", "")
    if reading.direction == INVERSE:
        remedy = "sample calls inverse: write self.forward(base.sample(…))[0], noise → data"
        return Finding(WRONG, words, "sample runs data → noise", remedy)
    remedy = "log_prob calls forward, and sample, too: log p(x) = log p_base(z) + log|det J|, with both from inverse(x)"
    return Finding(WRONG, words, "the direction is noise → data where data → noise is expected", remedy)


def _first_context(e: Evidence) -> Callable[[int], Tensor | None]:
    """A function that gives the first context to each of n rows; ``None`` where there is none."""
    return lambda n: None if e.context is None else e.context[:1].expand(n, -1)


def _kolmogorov(one: Tensor, other: Tensor) -> float:
    """The largest Kolmogorov-Smirnov distance of the columns of two samples."""
    worst = 0.0
    for a, b in zip(one.T, other.T, strict=True):
        both = torch.cat((a, b)).sort().values
        shares = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b)]
        worst = max(worst, (shares[0] - shares[1]).abs().max().item())
    return worst


def _samples_of(subject: Subject, rows: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Samples, one for each row of the context if there is one, and the log_prob that comes with them, if any does."""
    if not isinstance(subject.thing, Flow):
        drawn = _drawing(subject).sample(rows, context)
        return drawn.double(), None
    number = rows if context is None else 1
    x, log_prob = subject.call("sample", subject.thing.sample_and_log_prob, number, context)
    x, log_prob = x.double(), log_prob.double()
    return (x, log_prob) if context is None else (x[:, 0], log_prob[:, 0])


def _density_mistake(readings: Sequence[_Reading], x: Tensor, claimed: Tensor) -> tuple[str, str]:
    """Which formula the log_prob of a flow follows instead, by any reading; the usual direction is tried first."""
    right = "log p(x) = log p_base(z) + log|det J|, with both from inverse(x)"
    usual = readings[0].direction
    constant = claimed.new_full(claimed.shape, x[0].numel() * math.log(2 * math.pi) / 2)
    for direction, _, base, log_det in readings:
        if direction != usual:
            if any(same(claimed, base + sign * log_det) for sign in (1, -1)):
                mistake = "the direction is noise → data where data → noise is expected"
                return mistake, f"log_prob calls {direction}: {right}"
            continue
        if same(claimed, base - log_det):
            return "wrong sign of the log-determinant", f"log_prob subtracts it: {right}"
        if same(claimed, base):
            return "log-determinant is left out", f"log_prob has no log-determinant: {right}"
        if same(claimed - base - log_det, constant):
            missing = "the standard normal's log-density has − (D/2) log 2π, too"
            return "the base's normalising constant is missing", missing
        if same(claimed, base + log_det.sum()) or same(claimed, (base + log_det).sum().expand_as(claimed)):
            return "log-determinant summed over the batch", right
        if same(claimed, base + log_det.mean()) or same(claimed, (base + log_det).mean().expand_as(claimed)):
            return "log-determinant is a mean", right
    return "", ""


def mass(e: Evidence) -> Finding:
    """∫p over parts of the plane is the share of the samples there; around a standard normal for a mere layer."""
    if e.event_shape != (2,) or e.unit or e.forward.y.shape != e.x.shape:
        return Finding(UNASKED, "∫p is asked for two coordinates only")
    if not (e.subject.is_flow or e.one_way) and e.inverse is e.back:
        return Finding(UNASKED, "it does not take all of the plane")
    subject = e.moved(GENTLE)
    drawing = _drawing(subject)
    scores, draws = (FORWARD, INVERSE) if subject.scores == FORWARD else (INVERSE, FORWARD)
    row, contexts = None if e.context is None else e.context[:1], _first_context(e)

    def log_prob(x: Tensor) -> Tensor:
        if subject.is_flow:
            return subject.log_prob(x, contexts(len(x)))
        noise, log_det = subject.run(scores, x, contexts(len(x)))
        return log_det + _normal(noise)

    def draw(n: int) -> Tensor:
        if not subject.is_flow:
            noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=e.x.dtype)
            return subject.run(draws, noise, contexts(n))[0]
        if row is None:
            return drawing.sample(n).to(e.x.dtype)
        return drawing.call("sample", drawing.thing.sample, n, row)[0].to(e.x.dtype)

    cells, number_drawn, seconds = e.quadrature
    tolerance = MASS * max(1.0, (Quadrature().samples / number_drawn) ** 0.5)
    with torch.no_grad(), seeded():
        try:
            start = process_time()
            few = draw(min(TRIED, number_drawn))
            log_prob(few[few.isfinite().all(1)])
            if process_time() - start > seconds:
                return Finding(UNASKED, "∫p would take too long")
            drawn = draw(number_drawn)
        except Wrong as error:
            return Finding(UNASKED, str(error))
        finite = drawn.isfinite().all(1)
        if not finite.any() or not (finite.all() or subject.is_flow):
            return Finding(UNASKED, "it does not take all of the plane")
        low, high = e.box or torch.quantile(drawn[finite], torch.tensor([1e-3, 1 - 1e-3], dtype=drawn.dtype), dim=0)
        total, error = mass_error(log_prob, drawn, low, high, cells)
        if error > tolerance:
            coarse, _ = mass_error(log_prob, drawn, low, high, 2 * cells // 3)
            if abs(coarse - total) > tolerance / 4:
                return Finding(UNASKED, "its density is too sharp for a grid")
    if error <= tolerance:
        return Finding(RIGHT, f"to {error:.0e}", error=error)
    inside = ((drawn >= low) & (drawn <= high)).all(1).double().mean().item()
    words = f"∫p = {total:.3f} over a box that holds {inside:.3f} of the samples, and parts differ by {error:.3f}"
    return Finding(WRONG, words, error=error)


def _drawing(subject: Subject) -> Subject:
    """What is to sample: many a base draws float32, whatever it was made of, which our own and nflows' flows take."""
    return subject if isinstance(subject.thing, Flow) else subject.in_float32()
