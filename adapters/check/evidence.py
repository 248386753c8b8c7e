"""What all laws and mistakes are judged by: both directions of a layer at random parameters, which is its evidence."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from time import process_time
from typing import NamedTuple

import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.check.measure import LARGEST, distance, is_tame, move, own_tensors, points, same
from adapters.check.passes import Pass, equation_15, equation_16, shift_then_scale, watching
from adapters.check.subject import FORWARD, INVERSE, Hangs, NoInverse, Subject, Wrong

TRIP = 1e-4  # relative error of a round trip up to which it is one: some libraries search for their inverses
MOVED, HALVINGS = 0.3, 5  # standard deviation of what moves the parameters, and how often it may be halved
SETTLING = 30  # passes in training mode after which running statistics are near the data's
WIDE = 64  # of more coordinates, fewer rows are tried
THROUGH = 16  # of more coordinates, autograd does not go through the inverse: J is the inverse of forward's
PATIENCE = 1.0  # seconds of computing: an inverse that takes longer is called no more often than it must be
AGAIN = 16  # calls that must agree
OPPOSITE = r"inv|minus|transform|chang|complement|opposite|active|updat|not_"  # in names where 1 means transformed
WIDELY = (1.0, 3.0, 10.0, 100.0)  # sizes of the rows by which is found out what a direction can give at all


class Quadrature(NamedTuple):
    """How closely ∫p is compared with the share of the samples.

    Attributes:
        cells: along an axis.
        samples: draws; the tolerance grows where there are fewer, as their own error does.
        seconds: of computing, that a fiftieth of it may take; ∫p is not asked for where it takes longer.
    """

    cells: int = 300
    samples: int = 20_000
    seconds: float = 0.4


class Evidence:
    """A copy of the subject in float64, its parameters moved away from their start, and what it makes of a few rows.

    Many a layer begins as the identity, where much that is wrong does not show. Where the move makes it so steep that
    float64 itself would be at fault, it is halved. Running statistics, as of batch normalisation, first settle.

    Args:
        make: gives a new copy of the subject, in float64.
        event_shape, context_features: as for ``check``.
        may_lack_inverse: whether it is no mistake to have none, as for a flow that can only score.
        quadrature: how closely ∫p is looked at.

    Attributes:
        subject: the copy, in evaluation mode.
        x: rows for ``forward``; z: rows for ``inverse``; context: a row for each, or None.
        forward: what it makes of x.
        one_way: whether it has no inverse, rightly.
        slow: whether a call of its inverse takes so long that it is called as rarely as can be.
        unit: whether the rows lie in (0, 1), since others are not taken.
        narrow: up to so many coordinates, autograd goes through the inverse, too.
        lost: the share of z that need not come back from ``forward(inverse(z))``.
        box: corners of the part of the plane over which p is integrated; None for that which holds most samples.
    """

    one_way = slow = unit = False
    narrow, lost = THROUGH, 0.0
    box: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        make: Callable[[], Subject],
        event_shape: tuple[int, ...],
        context_features: int | None = None,
        may_lack_inverse: bool = False,
        quadrature: Quadrature | None = None,
    ):
        self.make, self.event_shape, self.size = make, event_shape, math.prod(event_shape)
        self.quadrature = quadrature or Quadrature()
        self.rows = 7 if self.size <= WIDE else 2
        while self.rows in (*event_shape, self.size):  # so that no dimension is taken for another
            self.rows += 1
        self.may_lack_inverse, self.context_features = may_lack_inverse, context_features
        self.context = None if context_features is None else points(self.rows, (context_features,), 3)

    def gather(self) -> None:
        """Run both directions, which all measures begin with.

        Raises:
            Wrong: if either can't be called.
        """
        self.look()
        if not self.forward.y.isfinite().all():
            self._look_where_inverse_ends()
        y = self.forward.y
        if y.numel() != self.x.numel() or not y.isfinite().all():
            return  # which the first law says
        start = process_time()
        try:
            self.back  # noqa: B018 (measured here, so that it may fail here)
        except NoInverse:
            self.one_way = self.may_lack_inverse
            if not self.one_way:
                raise
        self.slow = process_time() - start > PATIENCE
        if not (self.slow or self.comes_back):
            self._look_where_inverse_ends()
        if not self.one_way and (self.slow or self.size > self.narrow):
            self.back.undoes = self.forward

    def look(self) -> None:
        """Choose rows and parameters, and run forward."""
        self.x, self.z = points(self.rows, self.event_shape, 1), points(self.rows, self.event_shape, 2)
        try:
            self._move()
            if self.forward.y.isfinite().all():
                return
        except Hangs:
            raise
        except Wrong:
            pass
        self.x, self.unit = torch.sigmoid(self.x), True  # such as a logit's data
        with suppress(Wrong):
            self._move()
            if self.forward.y.isfinite().all():
                return
        self.x, self.unit = points(self.rows, self.event_shape, 1), False
        self._move()

    def _look_where_inverse_ends(self) -> None:
        """Take other rows for forward if these are not among its data, which are what inverse gives.

        A logit's data lie in (0, 1), a logarithm's are positive, and what such a layer makes of other numbers, if it
        takes them at all, is its own affair. It is right if forward undoes inverse. A forward whose outputs are cut
        off does not. Nor is it excused if it is smooth at all rows and none of them comes back, or if it takes a
        density's noise, which is any number.
        """
        if self.subject.is_flow and self.subject.scores == INVERSE:
            return
        with suppress(Wrong, RuntimeError):
            smooth = self.forward.y.shape == self.x.shape and self.forward.exact.isfinite().all()
            if smooth and not (distance(self.back.y, self.x) <= TRIP).any():
                return
        with suppress(Wrong, RuntimeError), torch.no_grad():
            noise = next((z for z in (self.z, self.z.sigmoid()) if self._is_undone(z)), None)
            if noise is None or self.gives(INVERSE, self.x):
                return
            unit, reached = self.x.sigmoid(), self.subject.run(INVERSE, noise.clone(), self.context)[0]
            self.x, self.z, self.unit = unit if self.gives(INVERSE, unit) else reached, noise, True
            self.forward = self.passed(FORWARD, self.x)
            self.__dict__.pop("back", None)  # which was inverse at the outputs before

    def _is_undone(self, z: Tensor) -> bool:
        """Whether forward undoes inverse at these rows."""
        x = self.subject.run(INVERSE, z.clone(), self.context)[0]
        again = self.subject.run(FORWARD, x, self.context)[0]
        return again.shape == z.shape and bool((distance(again, z) <= TRIP).all())

    def gives(self, direction: str, rows: Tensor) -> bool:
        """Whether every coordinate lies between the least and the largest of what that direction gives far and wide."""
        low, high = self.range_of(direction)
        return bool(((rows > low) & (rows < high)).all())

    @torch.no_grad()
    def range_of(self, direction: str) -> tuple[Tensor, Tensor]:
        """The least and the largest value of each coordinate that it gives to rows near and far; all, if it raises."""
        near = points(self.rows, self.event_shape, 4)
        found = []
        for x in (part for size in WIDELY for part in (size * near, size * near.abs())):
            with suppress(Wrong):
                found.append(self.subject.run(direction, x, self.context)[0])
        values = torch.cat([near[:0], *[y for y in found if y.shape == near.shape]])
        values = values[~values.flatten(1).isnan().any(1)]
        if not len(values):
            return torch.full_like(near[0], -math.inf), torch.full_like(near[0], math.inf)
        return values.amin(0), values.amax(0)

    def _move(self) -> None:
        for halving in range(HALVINGS + 1):
            self.scale = MOVED / 2**halving
            try:
                self.subject = self.moved()
                if self._tame():
                    return
            except Hangs:
                raise
            except Wrong:  # many a library's layer raises where it is too steep
                if halving == HALVINGS:
                    raise

    def moved(self, largest: float = MOVED) -> Subject:
        """A new copy at the same random parameters, or nearer to their start, settled, in evaluation mode."""
        subject = self.make()
        move(subject.module, min(self.scale, largest))
        settle(subject, self.x, self.context)
        subject.module.eval()
        return subject

    def _tame(self) -> bool:
        """Whether float64 can tell a right map from a wrong one here, in both directions."""
        self.forward = self.passed(FORWARD, self.x)
        if not _is_tame(self.forward):
            return False
        if self.forward.y.shape[1:].numel() == self.size:
            self.z = points(self.rows, tuple(self.forward.y.shape[1:]), 2)
        try:
            start = process_time()
            back = self.passed(INVERSE, self.z)
            through = self.size <= self.narrow and process_time() - start < PATIENCE
            return _is_tame(back) if through else bool((back.y.abs() <= LARGEST).all())
        except Hangs:
            raise
        except Wrong:  # there is none, or it takes other points
            return True

    def passed(self, direction: str, x: Tensor, undoes: Pass | None = None) -> Pass:
        """What that direction makes of x.

        Raises:
            Wrong: as ``Subject.run``.
        """

        def function(rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.subject.run(direction, rows, context)

        with torch.no_grad(), watching(self.subject.module, len(x)) as seen:
            y, log_det = function(x.clone(), self.context)
        return Pass(direction, x, self.context, y, log_det, seen, function, undoes)

    @property
    def passes(self) -> Iterator[Pass]:
        """Both directions at the same points: forward, then inverse at its outputs if there is an inverse."""
        yield self.forward
        if not self.one_way:
            yield self.back

    @property
    def repeatable(self) -> Iterator[Pass]:
        """Those of ``passes`` that may be called again and again."""
        yield self.forward
        if not (self.one_way or self.slow):
            yield self.back

    @cached_property
    def back(self) -> Pass:
        """inverse at forward's outputs."""
        return self.passed(INVERSE, self.forward.y)

    @cached_property
    def inverse(self) -> Pass:
        """inverse at rows of its own or, where it does not take them or need not, at forward's outputs."""
        try:
            found = self.passed(INVERSE, self.z)
        except Wrong:
            return self.back
        return found if found.y.isfinite().all() and not self._is_beyond(self.z) else self.back

    @torch.no_grad()
    def _is_beyond(self, z: Tensor) -> bool:
        """Whether forward, which inverse undoes, gives no such rows, so that what inverse makes of them says nothing.

        The inverse of a sigmoid may cut off what is not in (0, 1). But in a flow these rows are noise, and any number.
        """
        if self.subject.is_flow and self.subject.scores == FORWARD:
            return False
        try:
            return self.comes_back and not self._is_undone(z) and not self.gives(FORWARD, z)
        except (Wrong, RuntimeError):  # which the laws say
            return False

    @cached_property
    def forth(self) -> Pass:
        """forward at inverse's outputs."""
        return self.passed(FORWARD, self.inverse.y)

    @property
    def comes_back(self) -> bool:
        """Whether inverse undoes forward at x."""
        return self.one_way or same(self.back.y, self.x, TRIP)

    @cached_property
    def contradiction(self) -> str | None:
        """The direction whose map contradicts its log-determinant, where that is right for the map that it should be.

        It is where the two maps don't undo each other, although their log-determinants say so: one is minus the other
        at the two ends of a pass, and the other is right.
        """
        pairs = () if self.comes_back else ((self.forward, self.back), (self.inverse, self.forth))
        if not any(same(second.log_det, -first.log_det, TRIP) for first, second in pairs):
            return None
        inverse = self.inverse
        if self.back.undoes is not None and self.size <= WIDE and not self.slow:
            inverse = replace(inverse, undoes=None)  # J of its own, and not the inverse of forward's
        wrong = [p.direction for p in (self.forward, inverse) if not same(p.log_det, p.exact, TRIP)]
        return wrong[0] if len(wrong) == 1 else None

    @cached_property
    def suspect(self) -> str:
        """The direction to be mended where they don't undo each other: inverse, unless something says it is forward.

        That is its own log-determinant, or that inverse alone is one of the exercise's equations.
        """
        if self.contradiction:
            return self.contradiction
        nflows = isinstance(
            self.subject.transform, Transform
        )  # forward is data → noise there, and does not shift first
        forms = (equation_15, equation_16) if nflows else (equation_15, equation_16, shift_then_scale)
        forward = any(map(self.forward.networks, forms))
        inverse = any(map(self.back.networks, (equation_15, equation_16)))
        return FORWARD if inverse and not forward else INVERSE

    def at(self, direction: str) -> Pass:
        """The pass by which that direction's log-determinant is judged."""
        if direction == FORWARD:
            return self.forward
        return self.inverse if self.back.undoes is None else self.back

    @torch.no_grad()
    def again(self, p: Pass) -> Iterator[tuple[Tensor, Tensor]]:
        """What that pass's function gives in call after call: two may agree although a mask is drawn anew in each."""
        start = process_time()
        for _ in range(AGAIN):
            yield p.function(p.x.clone(), p.context)
            if process_time() - start > PATIENCE / 2:
                return

    @property
    def steady(self) -> bool:
        """Whether forward's outputs are the same in all of these."""
        return all(same(y, self.forward.y) for y, _ in self.again(self.forward))

    @cached_property
    def mask(self) -> tuple[str, Tensor] | None:
        """Name and flat values, true and false, of the layer's own mask, in which 1 means unchanged.

        One called mask or b is taken first. A mask under another name may mean something else: it is taken if the
        layer keeps just what it marks, or just what it does not, unless its name says that 1 means transformed there.
        """
        found = [(name, b.bool()) for name, b in self._own_masks() if not b.all()]
        if exact := [one for one in found if _is_exact(one[0])]:
            return exact[0]
        kept = self.forward.kept
        inverted = [one for one in found if torch.equal(~one[1], kept) and not re.search(OPPOSITE, one[0].lower())]
        return next((one for one in found if torch.equal(one[1], kept)), next(iter(inverted), None))

    @property
    def idle_mask(self) -> str:
        """The name of its mask if that is 1 everywhere, so that a right layer changes nothing; else nothing."""
        return next((name for name, b in self._own_masks() if _is_exact(name) and b.all()), "")

    def _own_masks(self) -> list[tuple[str, Tensor]]:
        """Name and flat values of all of the layer's own that is called a mask and fits an event, lists among it."""
        own = self.subject.transform
        lists = [
            (name, value) for name, value in getattr(own, "__dict__", {}).items() if isinstance(value, list | tuple)
        ]
        found = []
        for name, value in (*own_tensors(own), *lists):
            with suppress(TypeError, ValueError, RuntimeError):  # what is no tensor, or of another shape
                b = torch.as_tensor(value).detach()
                if is_mask(name, b) or (_is_exact(name) and bool((b == 1).all())):
                    b = b.squeeze(0) if b.dim() > len(self.event_shape) else b
                    flat = b.dim() == 1 and b.numel() == self.size
                    found.append((name, b if flat else b.expand(self.event_shape).flatten()))
        return found


def _is_exact(name: str) -> bool:
    return name.lower().strip("_") in ("mask", "b")


def is_mask(name: str, value: Tensor) -> bool:
    """Whether a tensor of that name is a mask, of zeros and ones."""
    named = _is_exact(name) or "mask" in name.lower()
    return named and bool(((value == 0) | (value == 1)).all()) and value.unique().numel() == 2


def _is_tame(p: Pass) -> bool:
    try:
        return is_tame(p.y, p.jacobian if p.y.isfinite().all() and p.y.numel() == p.x.numel() else None)
    except RuntimeError:  # what autograd can't go through, the laws say
        return is_tame(p.y)


@torch.no_grad()
def settle(subject: Subject, x: Tensor, context: Tensor | None) -> None:
    """Pass the data through in training mode for as long as that changes a buffer.

    Which way a plain layer is given the data is not known: it is given them both ways.
    """
    subject.module.train()
    _settle(subject, subject.scores, x, context)
    if not (subject.is_flow or isinstance(subject.thing, Transform)):
        with suppress(Wrong):
            _settle(subject, INVERSE, x, context)


def _settle(subject: Subject, direction: str, x: Tensor, context: Tensor | None) -> None:
    for _ in range(SETTLING):
        before = [buffer.clone() for buffer in subject.module.buffers()]
        subject.run(direction, x.clone(), context)
        if all(map(torch.equal, before, subject.module.buffers())):
            return
