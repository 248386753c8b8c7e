"""The laws: each measures one thing that a right layer has, and says the smallest counterexample that it found.

A law is a function of ``Evidence`` that returns a ``Finding``. To add one: write it, and a line in ``LAWS``.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import process_time
from typing import NamedTuple

import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.check.measure import (
    EXACT,
    LARGEST,
    TRIP,
    Evidence,
    Pass,
    Quadrature,
    distance,
    equation_15,
    equation_16,
    is_rounded,
    is_tame,
    jacobian,
    log_abs_det,
    mass_error,
    one_by_one,
    own_tensors,
    points,
    seeded,
)
from adapters.check.subject import FORWARD, INVERSE, Hangs, NoInverse, Subject, Wrong, is_theirs, kind, line_of
from adapters.check.words import number, numbers, short, smallest, some, z_is

RIGHT, WRONG, REMARK, UNASKED = "✓", "✗", "!", "·"
FLOAT32, STEEP = 1e-2, 1e-2  # relative difference of a float32 copy, and how it may grow with the norm of J
MASS = 0.02  # of ``mass_error``, with as many samples as ``Quadrature`` has by itself
ALONE = 8  # rows at most that are tried by themselves
RADII = (7.83, 3.91, 31.7, 15.9)  # the size of rows far from 0; none is a likely edge of a bin
FAR = 8  # up to this size a fault there is more than a remark
GENTLE = 0.1  # how far parameters are moved for ∫p, which a grid must resolve
TRIED = 2000  # draws that are timed first: ∫p takes fifty times as long
TO_DTYPE = "make new tensors like z: torch.zeros_like(z), z.new_zeros(len(z)), mask.to(z.dtype); leave out .float()"
NORMS = ("batchnorm", "dropout", "actnorm")  # parts that are meant to differ between training and evaluation


class Finding(NamedTuple):
    """How a law came out.

    Attributes:
        verdict: one of the four marks above.
        words: what was seen.
        mistake, remedy: where that alone tells it, which mistake it is, and what to write instead.
        explains: further laws that fail because of it.
        error: how far the law is from holding exactly, where that is one number.
    """

    verdict: str
    words: str = ""
    mistake: str = ""
    remedy: str = ""
    explains: tuple[str, ...] = ()
    error: float | None = None


class Law(NamedTuple):
    """Something that a right layer has.

    Attributes:
        name, title: for the program, and for people.
        measure: the law itself.
        needs: the laws without which this one would mean nothing.
    """

    name: str
    title: str
    measure: Callable[[Evidence], Finding]
    needs: tuple[str, ...] = ()


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
    parameters = e.subject.transform.parameters() if isinstance(e.subject.transform, nn.Module) else ()
    if any(one.requires_grad for one in parameters) and e.forward.y.shape == e.x.shape and e.forward.kept.all():
        remedy = "write equation 15 in forward, equation 16 in inverse, and equation 17 for both log-determinants"
        return Finding(
            WRONG, "forward(z) is z itself, whatever the parameters are", "the layer is the identity", remedy
        )
    if e.forward.y.shape != e.x.shape:
        return Finding(REMARK, f"forward turns {tuple(e.x.shape[1:])} into {tuple(e.forward.y.shape[1:])}")
    return Finding(RIGHT, "inputs in (0, 1), since others are not taken" if e.unit else "")


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
        if found.numel() == 1 and _close(found.reshape(1).expand(rows), p.exact):
            remedy = "it is the same in all rows here: give each its own, log_det.expand(len(z))"
            return Finding(WRONG, words, "one log-determinant for all rows", remedy)
        if found.numel() == 1:
            mean = _close(found, p.exact.mean()) or _close(found, p.exact.mean() / p.x[0].numel())
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
    """Two calls agree in evaluation mode, also of a new layer, whichever direction is called first."""
    for p in e.repeatable:
        for what, again in zip(("outputs", "log_det"), p.function(p.x.clone(), e.context), strict=True):
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
        worst = max(worst, _worst(errors, lost))
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
        errors = _relative(p.log_det, exact)
        worst = _worst(errors)
        if worst <= TRIP:
            return Finding(RIGHT, f"to {worst:.0e}", error=worst)
        row = smallest(p.x, errors, TRIP)
        words = f"at {z_is(p, row)} {direction} says {number(p.log_det[row])}, autograd's Jacobian {number(exact[row])}"
        return Finding(WRONG, words + _offset(p.log_det - exact), error=worst)

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


def gradients(e: Evidence) -> Finding:
    """Whatever moves an answer has a gradient from it."""
    named = [(name, p) for name, p in e.subject.module.named_parameters() if p.requires_grad]
    if not named:
        return Finding(UNASKED, "it has no parameters")
    used = set()
    for p in e.repeatable:
        for what in _answers(e, p):
            value = _answers(e, p)[what]
            total = (value * points(1, tuple(value.shape), 5)[0]).sum()
            found: Sequence[Tensor | None] = [None] * len(named)
            if total.requires_grad:
                found = torch.autograd.grad(total, [one for _, one in named], allow_unused=True)
            reached = [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found]
            used.update(name for (name, _), reaches in zip(named, reached, strict=True) if reaches)
            silent = [one for one, reaches in zip(named, reached, strict=True) if not reaches]
            if not (silent and _matters(e, p, what, [parameter for _, parameter in silent])):
                continue
            hidden = [name for name, parameter in silent if _matters(e, p, what, [parameter])]
            words = f"the {what} of {p.direction} changes with {some(hidden)}, but no gradient comes from there"
            remedy = (
                f"in {p.direction} something cuts the graph, detach(), no_grad(), .data, .item() or numpy: leave it out"
            )
            return Finding(WRONG, words, "detached, or under no_grad", remedy)
    unused = [name for name, _ in named if name not in used]
    if unused:
        return Finding(REMARK, f"nothing depends on {some(unused)}")
    return Finding(RIGHT)


def _answers(e: Evidence, p: Pass) -> dict[str, Tensor]:
    """What gradients are to come from."""
    y, log_det = p.function(p.x.clone(), e.context)
    answers = {"output": y, "log_det": log_det}
    if e.subject.is_flow and p.direction == FORWARD:
        answers["log_prob"] = e.subject.log_prob(p.x, e.context)
    return answers


@torch.no_grad()
def _matters(e: Evidence, p: Pass, what: str, parameters: list[nn.Parameter]) -> bool:
    """Whether moving these parameters a little changes that answer smoothly: a jump at a kink has no gradient."""
    generator, step = torch.Generator().manual_seed(6), 1e-4
    start = [parameter.clone() for parameter in parameters]
    moves = [step * torch.randn(q.shape, generator=generator, dtype=q.dtype) for q in parameters]
    answers = []
    for times in (-1, 1, 0):
        for parameter, old, move in zip(parameters, start, moves, strict=True):
            parameter.copy_(old + times * move)
        answers.append(_answers(e, p)[what])
    below, above, here = answers
    first, second = (above - below).abs(), (above + below - 2 * here).abs()
    return bool(((first > 1e-7) & (second < 0.1 * first)).any())


def training(e: Evidence) -> Finding:
    """Training mode and evaluation mode agree, but for parts that are meant to differ."""
    subject, random = e.moved(), torch.random.get_rng_state()
    subject.module.train()
    buffers = {name: buffer.clone() for name, buffer in subject.module.named_buffers()}
    meant = [
        f"{type(part).__name__}{f' ({name})' * bool(name)}"
        for name, part in subject.module.named_modules()
        if any(norm in type(part).__name__.lower() for norm in NORMS)
    ]
    try:
        for p in e.repeatable:
            try:
                with torch.no_grad():
                    y, log_det = subject.run(p.direction, p.x.clone(), e.context)
            except Wrong as error:
                if meant:
                    return Finding(REMARK, f"in training mode {error}, because of {meant[0]}: use eval() for it")
                return Finding(WRONG, f"in training mode {error}")
            if not (
                torch.allclose(y, p.y, rtol=TRIP, atol=TRIP)
                and torch.allclose(log_det, p.log_det, rtol=TRIP, atol=TRIP)
            ):
                if meant and "batchnorm" in meant[0].lower():
                    words = (
                        f"in training mode BatchNorm couples the rows: {meant[0]}. Use eval() to score and to sample"
                    )
                    return Finding(REMARK, words, "BatchNorm couples the rows")
                if meant:
                    return Finding(REMARK, f"training mode differs from evaluation, by {meant[0]}: use eval() to score")
                now = dict(subject.module.named_buffers())
                if updated := [name for name, buffer in buffers.items() if not torch.equal(buffer, now[name])]:
                    words = f"training mode differs from evaluation, and updates {some(updated)}: use eval() to score"
                    return Finding(REMARK, words)
                row = int(distance(y, p.y).argmax())
                words = f"at {z_is(p, row)} {p.direction} gives {numbers(y[row])} in training, "
                words += f"{numbers(p.y[row])} in evaluation"
                return Finding(WRONG, words)
    finally:
        torch.random.set_rng_state(random)
    return Finding(RIGHT)


def copies(e: Evidence) -> Finding:
    """A copy, and a new layer that loads the parameters, compute the same; every tensor belongs to them."""
    if hidden := in_a_list(e.subject):
        return hidden
    for name, part in theirs(e.subject):
        for attribute, value in own_tensors(part):
            if attribute in vars(part) and not isinstance(value, nn.Parameter):
                called = f"{name}.{attribute}" if name else attribute
                words = f"{called} is a plain tensor, which .to(device) leaves behind and state_dict leaves out"
                remedy = f"write self.register_buffer({attribute!r}, {attribute}) in __init__"
                return Finding(WRONG, words, "a plain tensor instead of a buffer", remedy, ("device",))
    state = e.subject.module.state_dict()
    other = e.make()
    try:
        other.module.load_state_dict(copy.deepcopy(state))
    except (RuntimeError, KeyError) as error:
        return Finding(WRONG, f"load_state_dict raises {' '.join(str(error).split())}")
    for what, twin in (("load_state_dict", other), ("deepcopy", _copy(e.subject))):
        twin.module.eval()
        with torch.no_grad():
            twin.run(FORWARD, 0.9 * e.x, e.context)  # other data than before, by which it might initialise itself
            y, log_det = twin.run(FORWARD, e.x.clone(), e.context)
        if not (torch.allclose(y, e.forward.y) and torch.allclose(log_det, e.forward.log_det)):
            row = int(distance(y, e.forward.y).argmax())
            words = f"at {z_is(e.forward, row)} it gives {numbers(e.forward.y[row])}, after {what} {numbers(y[row])}"
            changed = [key for key, value in other.module.state_dict().items() if not torch.equal(value, state[key])]
            if what == "load_state_dict" and changed:
                words += f"; the call has changed {some(changed)}"
                remedy = "what was loaded is initialised again from data: keep its flag as a buffer, "
                remedy += "self.register_buffer('initialised', torch.tensor(False))"
                return Finding(WRONG, words, "ActNorm was not initialised", remedy)
            return Finding(WRONG, words)
    return Finding(RIGHT)


def in_a_list(subject: Subject) -> Finding | None:
    """The finding that a list, a tuple or a dictionary of Python holds what parameters() does not see, if one does."""
    module = subject.module
    seen = {id(one) for one in (*module.modules(), *module.parameters(), *module.buffers())}
    for name, part in theirs(subject):
        for attribute, value in vars(part).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            hidden = [one for one in inside if isinstance(one, nn.Module | nn.Parameter) and id(one) not in seen]
            if attribute.startswith("_") or not hidden:
                continue
            called = f"{name}.{attribute}" if name else attribute
            words = f"{called} is a {type(value).__name__}: parameters(), .to(device) and state_dict don't look into it"
            remedy = "write nn.ModuleList for modules, nn.ParameterList for parameters"
            explains = "outputs", "precision", "device"
            return Finding(WRONG, words, "parameters in a Python list", remedy, explains)
    return None


def precision(e: Evidence) -> Finding:
    """float64 has no rounding of float32 in it, and a float32 copy says nearly the same."""
    for p in e.repeatable:
        if is_rounded(lambda x, p=p: p.function(x, e.context), p.x):
            words = f"given float64, {p.direction} has only the seven digits of float32"
            return Finding(WRONG, words, "float32 inside", TO_DTYPE)
    single = _in_float32(e.subject)
    context = None if e.context is None else e.context.float()
    for p in e.repeatable:
        with torch.no_grad():
            try:
                y, log_det = single.run(p.direction, p.x.float(), context)
            except Hangs as error:  # a search that is to be finer than float32 is
                return Finding(REMARK, f"in float32 {error}")
            except Wrong as error:
                return Finding(WRONG, f"in float32 {error}")
        if not y.dtype == log_det.dtype == torch.float32:
            found = y.dtype if y.dtype != torch.float32 else log_det.dtype
            return Finding(WRONG, f"{p.direction} returns {short(found)} for float32", "float64 inside", TO_DTYPE)
        errors = torch.maximum(distance(y, p.y), distance(log_det[:, None], p.log_det[:, None]))
        steep = torch.linalg.matrix_norm(p.jacobian, 2)
        if not (errors <= (FLOAT32 * STEEP * steep).clamp(min=FLOAT32)).all():
            row = int(errors.argmax())
            words = (
                f"at {z_is(p, row)} {p.direction} gives {numbers(p.y[row])} in float64, {numbers(y[row])} in float32"
            )
            return Finding(WRONG, words)
    return Finding(RIGHT)


def device(e: Evidence) -> Finding:
    """On torch's meta device, which has shapes and no values: what meets a tensor of the CPU there raises."""
    abroad = _copy(e.subject)
    context = None if e.context is None else e.context.to("meta")
    try:
        abroad.module.to("meta")
    except Exception:
        return Finding(UNASKED, "it can't be moved to the meta device")
    for p in e.repeatable:
        try:
            abroad.run(p.direction, p.x.to("meta"), context)
        except Wrong as error:
            if all(word in str(error) for word in ("device", "cpu")) and "meta tensor" not in str(error):
                words = (
                    f"on another device {p.direction} meets a tensor that stayed on the CPU{line_of(error.__cause__)}"
                )
                remedy = "make tensors like z, torch.zeros_like(z) or z.new_zeros(len(z)), and constants in __init__, "
                remedy += "by self.register_buffer"
                return Finding(WRONG, words, "a tensor stays on the CPU", remedy)
            return Finding(UNASKED, "it looks at values, which the meta device has not")
    return Finding(RIGHT)


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
        found = _far_off(e, x, None if e.context is None else e.context[row : row + 1], radius <= FAR)
        if found and radius <= FAR:
            remedy = (
                "something is cut off or wrapped round there, by clamp, where, remainder or a bound: bound s rather "
            )
            remedy += "than z, and let the inverse and the log-determinant follow whatever is cut"
            return Finding(WRONG, found, "it is right near 0 only", remedy)
        remark = remark or found
    return Finding(REMARK, remark) if remark else Finding(RIGHT)


def _far_off(e: Evidence, x: Tensor, context: Tensor | None, near: bool) -> str:
    """What is wrong at that one row; empty where nothing is, and where it is too steep or flat for float64 to tell."""
    try:
        with torch.no_grad():
            y, log_det = e.forward.function(x.clone(), context)
        slopes = jacobian(e.forward.function, x, context)
        if not (is_tame(y, slopes) and log_det.shape == (1,)):
            return ""
        exact, z = log_abs_det(slopes), f"z = {numbers(x)}"
        underflow = not (near or exact.isfinite())  # of tanh, say
        if not (underflow or torch.equal(log_det, exact) or _relative(log_det, exact) <= TRIP):
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
    if not (underflow or torch.equal(log_det, -exact) or _relative(log_det, -exact) <= TRIP):
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
                tanh = ": end the network of s in tanh, as exercise 2.5 says" * bool(theirs(e.subject) and p.seen)
                remarks.append(f"at z = {what} {p.direction} is no longer finite{tanh}")
                break
    return Finding(REMARK, remarks[0]) if remarks else Finding(RIGHT)


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
        errors = _relative(claimed, base + log_det)
        worst = _worst(errors)
        if not worst <= TRIP:
            row = smallest(x, errors, TRIP)
            words = f"at x = {numbers(x[row])} log_prob says {number(claimed[row])}, base and log-determinant "
            words += number((base + log_det)[row]) + _offset(claimed - base - log_det)
            mistake, remedy = _density_mistake(subject, x, context, claimed, base, log_det)
            return Finding(WRONG, words, mistake, remedy, error=worst)
    if came is not None:
        errors = _relative(came[near], claimed)
        worst = max(worst, _worst(errors, e.lost))
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


def _offset(offsets: Tensor) -> str:
    """What is said where all rows are off by one number."""
    same = len(offsets) > 1 and (offsets - offsets[0]).abs().max() < EXACT
    return f"; off by the same {number(offsets[0])} in every row" if same else ""


def _worst(errors: Tensor, lost: float = 0.0) -> float:
    """The largest but for that share of them; infinite where it is NaN."""
    ordered = errors.nan_to_num(math.inf, math.inf).sort().values
    return ordered[math.ceil((1 - lost) * len(ordered)) - 1].item()


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).abs() / (1 + wanted.abs())


def _density_mistake(
    subject: Subject, x: Tensor, context: Tensor | None, claimed: Tensor, base: Tensor, log_det: Tensor
) -> tuple[str, str]:
    """Which formula the log_prob of a flow follows instead."""
    right = "log p(x) = log p_base(z) + log|det J|, with both from inverse(x)"
    if _close(claimed, base - log_det):
        return "wrong sign of the log-determinant", f"log_prob subtracts it: {right}"
    if _close(claimed, base):
        return "log-determinant is left out", f"log_prob has no log-determinant: {right}"
    if _close(claimed - base - log_det, claimed.new_full(claimed.shape, x[0].numel() * math.log(2 * math.pi) / 2)):
        return "the base's normalising constant is missing", "the standard normal's log-density has − (D/2) log 2π, too"
    other = INVERSE if subject.scores == FORWARD else FORWARD
    with torch.no_grad(), suppress(Wrong):
        z, other_log_det = subject.run(other, x, context)
        other_base = subject.base_log_prob(z, context)
        if other_base is not None and any(_close(claimed, other_base + sign * other_log_det) for sign in (1, -1)):
            return "the direction is noise → data where data → noise is expected", f"log_prob calls {other}: {right}"
    if _close(claimed, base + log_det.sum()) or _close(claimed, (base + log_det).sum().expand_as(claimed)):
        return "log-determinant summed over the batch", right
    if _close(claimed, base + log_det.mean()) or _close(claimed, (base + log_det).mean().expand_as(claimed)):
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


def theirs(subject: Subject) -> list[tuple[str, nn.Module]]:
    """Those modules inside whose class is written in the user's own file."""
    found = []
    for name, part in subject.module.named_modules():
        module = sys.modules.get(type(part).__module__)
        if is_theirs(getattr(module, "__file__", None)):
            found.append((name, part))
    return found


def _copy(subject: Subject) -> Subject:
    return Subject(copy.deepcopy(subject.thing), subject.seconds)


def _in_float32(subject: Subject) -> Subject:
    twin = _copy(subject)
    twin.module.float()
    return twin


def _drawing(subject: Subject) -> Subject:
    """What is to sample: many a base draws float32, whatever it was made of, which our own and nflows' flows take."""
    return subject if isinstance(subject.thing, Flow) else _in_float32(subject)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(found, wanted, rtol=EXACT, atol=EXACT))


LOG_DETS = ("outputs", "log_det_shape", "inputs", "twice", "rows")
LAWS = (
    Law("outputs", "forward and inverse give outputs like their inputs", outputs),
    Law("log_det_shape", "and one log-determinant for each row", log_det_shape, ("outputs",)),
    Law("inputs", "no call changes its input", inputs_kept, ("outputs",)),
    Law("twice", "the same answer twice", twice, ("outputs", "log_det_shape")),
    Law("rows", "rows, and their contexts, don't mix", rows_apart, ("outputs", "log_det_shape", "twice")),
    Law("context", "the answer depends on the context", context_used, ("outputs", "log_det_shape", "twice")),
    Law("mask", "positions where the mask is 1 come through unchanged", mask_kept, ("outputs", "twice")),
    Law("round_trip", "inverse undoes forward, and forward inverse", round_trip, ("outputs", "twice", "rows")),
    Law("forward_log_det", "forward's log-determinant is autograd's", log_det(FORWARD), LOG_DETS),
    Law("inverse_log_det", "inverse's log-determinant is autograd's", log_det(INVERSE), LOG_DETS),
    Law("equations", "forward and inverse are equations 15 and 16", equations, (*LOG_DETS, "mask", "round_trip")),
    Law("gradients", "gradients reach every parameter", gradients, ("outputs", "log_det_shape", "twice")),
    Law(
        "training",
        "training mode computes what evaluation mode does",
        training,
        ("outputs", "log_det_shape", "twice", "rows"),
    ),
    Law("copies", "state_dict and deepcopy carry all of it", copies, ("outputs", "log_det_shape", "twice")),
    Law("precision", "float64 throughout, and float32 agrees", precision, LOG_DETS),
    Law("device", "all tensors move with the layer", device, ("outputs", "log_det_shape")),
    Law(
        "far",
        "all of this holds far from 0, too",
        far,
        (*LOG_DETS, "round_trip", "forward_log_det", "inverse_log_det"),
    ),
    Law("extremes", "extreme inputs", extremes, ("outputs", "log_det_shape", "twice")),
    Law("samples", "samples carry their log_prob", samples, (*LOG_DETS, "round_trip")),
    Law("mass", "∫p = 1, and p is the samples' density", mass, (*LOG_DETS, "round_trip")),
)
