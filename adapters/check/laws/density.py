"""Laws of a density: log_prob, the samples and ∫p belong together."""

import math
from contextlib import suppress
from time import process_time

import torch
from nflows.flows import Flow
from torch import Tensor

from adapters.check.laws.finding import RIGHT, UNASKED, WRONG, Finding
from adapters.check.measure import LARGEST, TRIP, Evidence, Quadrature, mass_error, relative, same, seeded, worst_of
from adapters.check.subject import FORWARD, INVERSE, NoInverse, Subject, Wrong, kind
from adapters.check.words import number, numbers, offset, smallest

MASS = 0.02  # of ``mass_error``, with as many samples as ``Quadrature`` has by itself
GENTLE = 0.1  # how far parameters are moved for ∫p, which a grid must resolve
TRIED = 2000  # draws that are timed first: ∫p takes fifty times as long


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
        noise, log_det = subject.run(subject.scores, x, context)
        base = subject.base_log_prob(noise, context)
    worst = 0.0
    if base is not None:
        errors = relative(claimed, base + log_det)
        worst = worst_of(errors)
        if not worst <= TRIP:
            row = smallest(x, errors, TRIP)
            words = f"at x = {numbers(x[row])} log_prob says {number(claimed[row])}, base and log-determinant "
            words += number((base + log_det)[row]) + offset(claimed - base - log_det)
            mistake, remedy = _density_mistake(subject, x, context, claimed, base, log_det)
            return Finding(WRONG, words, mistake, remedy, error=worst)
    if came is not None:
        errors = relative(came[near], claimed)
        worst = max(worst, worst_of(errors, e.lost))
        if not worst <= TRIP:
            row = smallest(x, errors, TRIP)
            words = f"at x = {numbers(x[row])} sample_and_log_prob says {number(came[near][row])}, log_prob "
            return Finding(WRONG, words + number(claimed[row]), error=worst)
    elif base is None:
        return Finding(UNASKED, "it does not show its base")
    return Finding(RIGHT, f"to {worst:.0e}", error=worst)


def _samples_of(subject: Subject, rows: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Samples, one for each row of the context if there is one, and the log_prob that comes with them, if any does."""
    if not isinstance(subject.thing, Flow):
        drawn = _drawing(subject).sample(rows, context)
        return drawn.double(), None
    number = rows if context is None else 1
    x, log_prob = subject.call("sample", subject.thing.sample_and_log_prob, number, context)
    x, log_prob = x.double(), log_prob.double()
    return (x, log_prob) if context is None else (x[:, 0], log_prob[:, 0])


def _density_mistake(
    subject: Subject, x: Tensor, context: Tensor | None, claimed: Tensor, base: Tensor, log_det: Tensor
) -> tuple[str, str]:
    """Which formula the log_prob of a flow follows instead."""
    right = "log p(x) = log p_base(z) + log|det J|, with both from inverse(x)"
    if same(claimed, base - log_det):
        return "wrong sign of the log-determinant", f"log_prob subtracts it: {right}"
    if same(claimed, base):
        return "log-determinant is left out", f"log_prob has no log-determinant: {right}"
    if same(claimed - base - log_det, claimed.new_full(claimed.shape, x[0].numel() * math.log(2 * math.pi) / 2)):
        return "the base's normalising constant is missing", "the standard normal's log-density has − (D/2) log 2π, too"
    other = INVERSE if subject.scores == FORWARD else FORWARD
    with torch.no_grad(), suppress(Wrong):
        z, other_log_det = subject.run(other, x, context)
        other_base = subject.base_log_prob(z, context)
        if other_base is not None and any(same(claimed, other_base + sign * other_log_det) for sign in (1, -1)):
            return "the direction is noise → data where data → noise is expected", f"log_prob calls {other}: {right}"
    if same(claimed, base + log_det.sum()) or same(claimed, (base + log_det).sum().expand_as(claimed)):
        return "log-determinant summed over the batch", right
    if same(claimed, base + log_det.mean()) or same(claimed, (base + log_det).mean().expand_as(claimed)):
        return "log-determinant is a mean", right
    return "", ""


def mass(e: Evidence) -> Finding:
    """∫p over parts of the plane is the share of the samples there; around a standard normal for a mere layer."""
    if e.event_shape != (2,) or e.unit or e.forward.y.shape != e.x.shape:
        return Finding(UNASKED, "∫p is asked for two coordinates only")
    subject = e.moved(GENTLE)
    drawing = _drawing(subject)
    scores, draws = (FORWARD, INVERSE) if subject.scores == FORWARD else (INVERSE, FORWARD)
    row = None if e.context is None else e.context[:1]

    def contexts(n: int) -> Tensor | None:
        return None if row is None else row.expand(n, -1)

    def log_prob(x: Tensor) -> Tensor:
        if subject.is_flow:
            return subject.log_prob(x, contexts(len(x)))
        noise, log_det = subject.run(scores, x, contexts(len(x)))
        return log_det - 0.5 * (noise**2).sum(1) - math.log(2 * math.pi)

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
