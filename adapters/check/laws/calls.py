"""Laws of a call: what comes back, and that it hangs on nothing but the row and its context."""

import torch
from torch import nn

from adapters.check.evidence import TRIP, Evidence
from adapters.check.laws.finding import REMARK, RIGHT, UNASKED, WRONG, Finding
from adapters.check.measure import EXACT, distance, one_by_one, points, same
from adapters.check.subject import FORWARD, INVERSE, Wrong, kind
from adapters.check.words import numbers, short, z_is

ALONE = 8  # rows at most that are tried by themselves
TO_DTYPE = "make new tensors like z: torch.zeros_like(z), z.new_zeros(len(z)), mask.to(z.dtype); leave out .float()"


def outputs(e: Evidence) -> Finding:
    """Either direction gives finite outputs of its inputs' shape and dtype, and does something."""
    for p in e.passes:
        direction = p.direction
        if direction == INVERSE and p.y.numel() == e.x.numel() and p.y.shape != e.x.shape:
            return Finding(WRONG, f"inverse returns {kind(p.y)}, where forward was given one of {tuple(e.x.shape)}")
        if p.y.numel() != p.x.numel() or len(p.y) != len(p.x):
            return Finding(WRONG, f"{direction} returns {kind(p.y)} for {kind(p.x)}")
        if p.y.dtype != p.x.dtype:
            return Finding(
                WRONG, f"{direction} returns {short(p.y.dtype)} for {short(p.x.dtype)}", "float32 inside", TO_DTYPE
            )
        if not p.y.isfinite().all():
            row = int((~p.y.flatten(1).isfinite()).any(1).nonzero()[0])
            return Finding(WRONG, f"at {z_is(p, row)} {direction} gives {numbers(p.y[row])}")
    if e.idle_mask and e.forward.kept.all():
        return Finding(REMARK, f"{e.idle_mask} is all ones: this layer changes nothing")
    parameters = e.subject.transform.parameters() if isinstance(e.subject.transform, nn.Module) else ()
    unchanged = e.forward.y.shape == e.x.shape and e.forward.kept.all() and e.steady
    if unchanged and any(one.requires_grad for one in parameters):
        remedy = "write equation 15 in forward, equation 16 in inverse, and equation 17 for both log-determinants"
        return Finding(
            WRONG, "forward(z) is z itself, whatever the parameters are", "the layer is the identity", remedy
        )
    if e.forward.y.shape != e.x.shape:
        return Finding(REMARK, f"forward turns {tuple(e.x.shape[1:])} into {tuple(e.forward.y.shape[1:])}")
    where = "in (0, 1)" if bool(((e.x > 0) & (e.x < 1)).all()) else "such as inverse gives"
    return Finding(RIGHT, f"inputs {where}, since others are not taken" if e.unit else "")


def log_det_shape(e: Evidence) -> Finding:
    """A log-determinant is ``(rows,)``, in its inputs' dtype."""
    for p in e.passes:
        found, rows = p.log_det, len(p.x)
        words = f"{p.direction} returns a log_det of shape {tuple(found.shape)}, where ({rows},) is wanted, one a row"
        if found.shape == (rows,):
            if found.isnan().any():
                row = int(found.isnan().nonzero()[0])
                words = f"at {z_is(p, row)} the log_det of {p.direction} is NaN"
                remedy = (
                    "take the logarithm of the absolute value: scale.abs().log(), or torch.linalg.slogdet of a matrix"
                )
                if not e.comes_back:  # it is the map, such as the wrong root of an equation
                    return Finding(WRONG, words)
                return Finding(WRONG, words, "log-determinant is not a number", remedy)
            if found.dtype == p.x.dtype:
                continue
            words = f"{p.direction} returns a log_det of {short(found.dtype)} for {short(p.x.dtype)}"
            return Finding(WRONG, words, "float32 inside", TO_DTYPE)
        remedy = "write s.flatten(1).sum(1), with (1 − b) ⊙ s for s: all dimensions but the first are summed"
        if found.shape == (rows, 1):
            return Finding(
                WRONG, words, "log-determinant of shape (n, 1)", "write log_det.squeeze(1), or .sum(1) without keepdim"
            )
        if found.dim() and found.shape[0] == rows:
            return Finding(WRONG, words, "log-determinant of the wrong event dimensions", remedy)
        if found.shape == p.x.shape[1:]:
            return Finding(
                WRONG, words, "log-determinant summed over the batch", f"it is summed along the rows: {remedy}"
            )
        if found.numel() == 1 and same(found.reshape(1).expand(rows), p.exact):
            remedy = "it is the same in all rows here: give each its own, log_det.expand(len(z))"
            return Finding(WRONG, words, "one log-determinant for all rows", remedy)
        if found.numel() == 1:
            mean = same(found, p.exact.mean()) or same(found, p.exact.mean() / p.x[0].numel())
            mistake = "log-determinant is a mean" if mean else "log-determinant summed over the batch"
            return Finding(WRONG, words, mistake, f"one number for all rows can be no row's own: {remedy}")
        return Finding(WRONG, words, "", remedy)
    return Finding(RIGHT)


def inputs_kept(e: Evidence) -> Finding:
    """The tensor that is given is the same afterwards."""
    for p in e.repeatable:
        given = p.x.clone()
        p.function(given, e.context)
        if not torch.equal(given, p.x):
            row = int(distance(given, p.x).argmax())
            words = f"{z_is(p, row)} has become {numbers(given[row])} after {p.direction}"
            return Finding(
                WRONG,
                words,
                "changes its input in place",
                "write z = z.clone() first, and not z[…] = or z +=",
                ("twice", "rows", "gradients", "training", "copies", "precision"),
            )
    return Finding(RIGHT)


def twice(e: Evidence) -> Finding:
    """All calls agree in evaluation mode, also of a new layer, whichever direction is called first."""
    for p in e.repeatable:
        answers = (
            (what, found) for both in e.again(p) for what, found in zip(("outputs", "log_det"), both, strict=True)
        )
        for what, again in answers:
            before = p.y if what == "outputs" else p.log_det
            if not torch.allclose(again, before, rtol=EXACT, atol=EXACT, equal_nan=True):
                row = int(distance(again.reshape(len(p.x), -1), before.reshape(len(p.x), -1)).argmax())
                words = (
                    f"at {z_is(p, row)} {p.direction} gives {what} {numbers(before[row])}, then {numbers(again[row])}"
                )
                return Finding(WRONG, words)
    if e.one_way or e.slow:
        return Finding(RIGHT)
    first = e.make()
    first.module.eval()
    try:
        with torch.no_grad():
            before = first.run(INVERSE, e.z, e.context)[0]
            first.run(FORWARD, e.x, e.context)
            after = first.run(INVERSE, e.z, e.context)[0]
    except Wrong:
        return Finding(RIGHT)  # one that is not ready before its first training step
    if before.shape == after.shape and not torch.allclose(before, after, rtol=EXACT, atol=EXACT, equal_nan=True):
        row = int(distance(after, before).argmax())
        words = f"new, in evaluation mode, inverse gives {numbers(before[row])}, and once forward was called "
        words += numbers(after[row])
        remedy = "the first call of forward sets parameters from its data, which inverse did not wait for: do that in "
        remedy += "training mode only, or in whichever direction is called first"
        return Finding(WRONG, words, "ActNorm was not initialised", remedy)
    return Finding(RIGHT)


def rows_apart(e: Evidence) -> Finding:
    """Each row with its context gives alone what it gives among others."""
    for p in e.repeatable:
        for row, (y, log_det) in enumerate(one_by_one(p.function, p.x[:ALONE], e.context)):
            if y.shape[1:] != p.y.shape[1:]:
                words = f"{p.direction} returns {kind(y)} for one row alone"
                return Finding(
                    WRONG, words, "squeeze removes the batch dimension", "write squeeze(1), with the dimension"
                )
            for what, alone, among in (
                ("outputs", y[0], p.y[row]),
                ("log_det", log_det.reshape(-1), p.log_det[row : row + 1]),
            ):
                if alone.shape == among.shape and not torch.allclose(alone, among, rtol=TRIP, atol=TRIP):
                    words = f"at {z_is(p, row)} {p.direction} gives {what} {numbers(among)} among {len(p.x)} rows, "
                    words += f"{numbers(alone)} alone"
                    return Finding(WRONG, words)
    return Finding(RIGHT)


def context_used(e: Evidence) -> Finding:
    """Another context gives another answer; else a remark, since a permutation, say, has no use for one."""
    if e.context is None or e.context_features is None:
        return Finding(UNASKED, "it has no context")
    for p in e.repeatable:
        y, log_det = p.function(p.x.clone(), points(len(p.x), (e.context_features,), 7))
        if not (torch.equal(y, p.y) and torch.equal(log_det, p.log_det)):
            return Finding(RIGHT)
    return Finding(REMARK, "neither outputs nor log-determinants do: is it handed on to the networks?")
