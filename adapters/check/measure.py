"""The few quantities that all laws and all mistakes are judged by: what came out, what was claimed, and what is true.

A ``Pass`` is one direction of a layer at a few rows: outputs y, the log-determinant that came with them, autograd's
Jacobian J and its log|det J|, and what each network inside was given and gave. ``Evidence`` holds the passes. Below
them are the measures themselves, functions of tensors, which comparisons and tests use as well: ``jacobian``,
``log_abs_det``, ``one_by_one``, ``distance``, ``roughness`` and ``mass_error``.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import process_time
from typing import Any, NamedTuple

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn.functional import softsign
from torch.overrides import TorchFunctionMode

from adapters.check.subject import FORWARD, INVERSE, Hangs, NoInverse, Subject, Wrong

EXACT = 1e-6  # relative error up to which two values that float64 gives are the same
TRIP = 1e-4  # of a round trip, likewise: some libraries search for their inverses
MOVED, HALVINGS = 0.3, 5  # standard deviation of what moves the parameters, and how often it may be halved
LARGEST, WORST = 1e3, 1e5  # |f(x)|, |J| and condition number of J up to which float64 tells right from wrong
SETTLING = 30  # passes in training mode after which running statistics are near the data's
WIDE = 64  # of more coordinates, fewer rows are tried
THROUGH = 16  # of more coordinates, autograd does not go through the inverse: J is the inverse of forward's
PATIENCE = 1.0  # seconds of computing: an inverse that takes longer is called no more often than it must be
AT_ONCE = 250_000  # numbers in one batch, of copies of a row, by which a Jacobian is found
ROUGH = 4e-3  # of ``roughness``: about 1e-6 in float64, up to 1.5e-3 for a search, 7e-3 to 0.1 where float32 is within
AGAIN = 16  # calls that must agree
OPPOSITE = r"inv|minus|transform|chang|complement|opposite|active|updat|not_"  # in names where 1 means transformed
CALLS = 3  # of each network inside, that are looked at in one pass
STEP = 1e-6  # h of ``roughness``
COARSE, COARSELY = 1e-3, 0.05  # h that shows half precision, and the roughness there; a smooth function has about h
LOW = (torch.float16, torch.bfloat16, torch.float32)  # dtypes of fewer digits than float64's
WIDELY = (1.0, 3.0, 10.0, 100.0)  # sizes of the rows by which is found out what a direction can give at all

EXP = "what torch.exp is given"
Function = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # rows and contexts to outputs and log-determinants


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


class Seen(NamedTuple):
    """What one network inside the layer was given and gave, and its name."""

    name: str
    given: Tensor
    gave: Tensor


class Logarithms(TorchFunctionMode):
    """Within, notes what exp is taken of and what log gives, for that many rows.

    Attributes:
        found: their names and values, of the first calls.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.found = rows, list[tuple[str, Tensor]]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("exp", "exp_") and args:
            self._note(EXP, args[0])
        answer = func(*args, **(kwargs or {}))
        if name == "log":
            self._note("what torch.log gives", answer)
        return answer

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.rows and len(self.found) < 2 * CALLS:
            self.found.append((name, value.clone()))


@dataclass
class Pass:
    """One direction at rows x.

    Attributes:
        direction: forward or inverse.
        x, context, y, log_det: what it was given and gave, ``(rows, *event_shape)`` and ``(rows,)``.
        seen: what each network inside was given and gave.
        function: maps rows and their contexts to ``(y, log_det)``.
        undoes: the pass whose outputs these rows are, for an inverse that autograd is not to go through.
    """

    direction: str
    x: Tensor
    context: Tensor | None
    y: Tensor
    log_det: Tensor
    seen: list[Seen]
    function: Function = field(repr=False)
    undoes: "Pass | None" = field(default=None, repr=False)

    @cached_property
    def jacobian(self) -> Tensor:
        """J of each row, ``(rows, D, D)``: autograd's, or the inverse of autograd's J of the pass that this undoes."""
        if self.undoes is not None:
            return torch.linalg.pinv(self.undoes.jacobian)  # which a singular one has, too
        return jacobian(self.function, self.x, self.context)

    @cached_property
    def slopes(self) -> Tensor:
        """J by central differences, which see what a ``detach`` hides from autograd."""
        columns, step = [], 1e-5  # where float64's rounding comes to about 1e-11
        with torch.no_grad():
            for unit in torch.eye(self.x[0].numel(), dtype=self.x.dtype).view(-1, *self.x.shape[1:]):
                above, below = (self.function(self.x + h * unit, self.context)[0] for h in (step, -step))
                columns.append((above - below).flatten(1) / (2 * step))
        return torch.stack(columns, 2)

    @cached_property
    def exact(self) -> Tensor:
        """log|det J| of each row, by autograd."""
        return log_abs_det(self.jacobian) if self.undoes is None else -self.undoes.exact

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """x and y, ``(rows, D)``."""
        return self.x.flatten(1), self.y.flatten(1)

    @cached_property
    def kept(self) -> Tensor:
        """Of each coordinate, whether it came out as it went in, in all rows."""
        x, y = self.flat
        return (x - y).abs().le(EXACT).all(0)

    @cached_property
    def line(self) -> tuple[Tensor, Tensor]:
        """a and t, ``(rows, D)``, of y = a ⊙ x + t: what each y_i is as a function of x_i alone, if that is a line."""
        a = self.jacobian.diagonal(dim1=1, dim2=2)
        x, y = self.flat
        return a, y - a * x

    @cached_property
    def gave(self) -> list[tuple[str, Tensor]]:
        """All that may be s or t, by name, ``(rows, D)``: whatever a network gave, whole or in halves of its own."""
        found = []
        for name, _, value in self.seen:
            flat = value.flatten(1)
            found += [(name, part) for part in self._of_the_event(flat)]
            parts = [part for dim in {1, value.dim() - 1} for part in value.chunk(2, dim)]
            parts += [flat[:, ::2], flat[:, 1::2]]  # one after the other along a dimension, or alternating in the last
            found += [
                (f"half of {name}", fitting)
                for part in parts
                if 2 * part.numel() == value.numel()
                for fitting in self._of_the_event(part.flatten(1))
            ]
        found += [(f"{f.__name__} of {name}", f(value)) for f in (torch.tanh, softsign) for name, value in found]
        for name, value in self.logarithms:
            for part in self._of_the_event(value.flatten(1)):
                found += [(name, part), (f"minus {name}", -part)]  # as of exp(−s)
        return found

    @cached_property
    def logarithms(self) -> list[tuple[str, Tensor]]:
        """What exp is taken of and what log gives, in one more call: one may be s, however it is computed."""
        with suppress(Wrong), torch.no_grad(), Logarithms(len(self.x)) as noted:
            self.function(self.x.clone(), self.context)
        return noted.found

    def _of_the_event(self, values: Tensor) -> list[Tensor]:
        """These values of each row in the event's size, zero where they are for the changed coordinates only."""
        if values.shape[1] == self.kept.numel():
            return [values]
        changed = ~self.kept
        if values.shape[1] != changed.sum():
            return []
        return [values.new_zeros(len(values), self.kept.numel()).masked_scatter(changed, values)]

    def networks(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
        """Whether y = formula(x, s, t) on the changed coordinates, s and t being two of what the networks gave."""
        x, y = (flat[:, ~self.kept] for flat in self.flat)
        if not self.gave:
            return False
        values = torch.stack([value[:, ~self.kept] for _, value in self.gave])
        for i, s in enumerate(values):
            fits = (relative(formula(x, s, values), y) <= EXACT).flatten(1).all(1)
            fits[i] = False
            if fits.any():
                return True
        return False


def equation_15(z: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return z * s.exp() + t


def equation_16(z: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return (z - t) * (-s).exp()


def shift_then_scale(z: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """As in Glow."""
    return (z + t) * s.exp()


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
        if not (self.one_way or self.slow or self._comes_back()):
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
        off does not.
        """
        with suppress(Wrong, RuntimeError), torch.no_grad():
            noise = next((z for z in (self.z, self.z.sigmoid()) if self._is_undone(z)), None)
            if noise is None or self.gives(INVERSE, self.x):
                return
            unit, reached = self.x.sigmoid(), self.subject.run(INVERSE, noise.clone(), self.context)[0]
            self.x, self.z, self.unit = unit if self.gives(INVERSE, unit) else reached, noise, True
            self.forward = self.passed(FORWARD, self.x)
            self.__dict__.pop("back", None)  # which was inverse at the outputs before

    def _comes_back(self) -> bool:
        """Whether inverse undoes forward."""
        return self.back.y.shape == self.x.shape and bool((distance(self.back.y, self.x) <= TRIP).all())

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

        The inverse of a sigmoid may cut off what is not in (0, 1).
        """
        try:
            return self._comes_back() and not self._is_undone(z) and not self.gives(FORWARD, z)
        except (Wrong, RuntimeError):  # which the laws say
            return False

    @cached_property
    def forth(self) -> Pass:
        """forward at inverse's outputs."""
        return self.passed(FORWARD, self.inverse.y)

    @cached_property
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


def is_tame(y: Tensor, jacobians: Tensor | None = None) -> bool:
    """Whether float64 can tell a right map from a wrong one by its outputs y and its Jacobians there."""
    if not (y.isfinite().all() and (y.abs() <= LARGEST).all()):
        return False
    if jacobians is None:
        return True
    stretched = torch.linalg.svdvals(jacobians)
    low, high = stretched[:, -1], stretched[:, 0]
    return bool((high <= LARGEST).all() and (high <= WORST * low)[low > 0].all())  # singular is not steep, but wrong


def jacobian(function: Function, x: Tensor, context: Tensor | None = None) -> Tensor:
    """J of each row by autograd, ``(rows, D, D)``, of a function that computes each row of y from its own row alone.

    Each row is copied D times, and the i-th copy is asked for the derivatives of y_i: one pass backward serves all.
    """
    size = x[0].numel()
    row, coordinate = torch.cartesian_prod(torch.arange(len(x)), torch.arange(size)).unbind(1)
    found = []
    for rows, coordinates in zip(
        row.split(max(1, AT_ONCE // size)), coordinate.split(max(1, AT_ONCE // size)), strict=True
    ):
        with torch.enable_grad():
            z = x[rows].detach().requires_grad_()
            y = function(z.clone(), None if context is None else context[rows])[0].flatten(1)
            wanted = y.gather(1, coordinates[:, None]).sum()
            slopes = torch.autograd.grad(wanted, z, allow_unused=True)[0] if wanted.requires_grad else None
        found.append(torch.zeros_like(z) if slopes is None else slopes)
    return torch.cat(found).detach().reshape(len(x), size, size)


def log_abs_det(jacobians: Tensor) -> Tensor:
    """log|det J| of each, ``(rows, D, D)`` → ``(rows,)``."""
    return torch.linalg.slogdet(jacobians).logabsdet


def one_by_one(function: Callable, x: Tensor, context: Tensor | None = None) -> Iterator:
    """What the function gives for each row by itself, with its own row of the context."""
    for row in range(len(x)):
        yield function(x[row : row + 1].clone(), None if context is None else context[row : row + 1])


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Within, random numbers of the CPU begin at that seed; afterwards they go on as before, as other devices' do."""
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)


def points(rows: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, made short to read: hundredths, none of which is a likely edge of a bin."""
    normal = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((normal * 20).round() * 5 + 1) / 100


def move(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Add N(0, scale²) to every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


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


@contextmanager
def watching(module: nn.Module, rows: int) -> Iterator[list[Seen]]:
    """What each module inside is given and gives in its first calls, where both are one tensor with as many rows.

    What a parametrization makes of a weight is no answer to rows. An inverse that searches calls its networks so often
    that all of it would fill the memory.
    """
    seen: list[Seen] = []
    calls: Counter[str] = Counter()

    def watch(name: str) -> Callable:
        def note(_, given: tuple, gave) -> None:
            calls[name] += 1
            if calls[name] > CALLS:
                return
            tensors = given and isinstance(given[0], Tensor) and isinstance(gave, Tensor)
            if tensors and given[0].dim() > 1 and gave.dim() > 1 and len(given[0]) == len(gave) == rows:
                seen.append(Seen(name, given[0].clone(), gave.clone()))

        return note

    parts = [(name, part) for name, part in module.named_modules() if name]
    handles = [
        part.register_forward_hook(watch(name))
        for name, part in parts
        if not isinstance(part, torch.jit.ScriptModule)  # which takes no hooks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def own_tensors(thing) -> list[tuple[str, Tensor]]:
    """The tensors that an object itself holds, not its submodules: parameters, buffers and plain attributes."""
    kept = {**getattr(thing, "_parameters", {}), **getattr(thing, "_buffers", {}), **getattr(thing, "__dict__", {})}
    return [(name, value) for name, value in kept.items() if isinstance(value, Tensor)]


def same(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> bool:
    """Whether all values agree, relative to their sizes; nothing agrees with NaN, infinity or another shape."""
    if found.shape != wanted.shape or not wanted.isfinite().all():
        return False
    return bool((relative(found, wanted) <= tolerance).all())


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """|found − wanted| / (1 + |wanted|) of each value."""
    return (found - wanted).abs() / (1 + wanted.abs())


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each row, the largest such error; NaN where anything is NaN."""
    return relative(found, wanted).flatten(1).amax(1)


def worst_of(errors: Tensor, lost: float = 0.0) -> float:
    """The largest but for that share of them; infinite where it is NaN."""
    ordered = errors.nan_to_num(math.inf, math.inf).sort().values
    return ordered[math.ceil((1 - lost) * len(ordered)) - 1].item()


@torch.no_grad()
def roughness(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, step: float = STEP) -> float:
    """How rough outputs and log-determinant are over steps of h: the median over the rows, for kinks' sake.

    Of a smooth function, |f(x + h) − 2 f(x) + f(x − h)| is about h² and |f(x + h) − f(x − h)| about h. Where float32 is
    within, either has its rounding, 1e-7.
    """
    move = step * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    (below, low), (here, middle), (above, high) = (function(x + k * move) for k in (-1, 0, 1))
    below, here, above = below.flatten(1), here.flatten(1), above.flatten(1)
    rough = (above - 2 * here + below).norm(dim=1) / ((above - below).norm(dim=1) + step)
    rough_log_det = (high - 2 * middle + low).abs() / ((high - low).abs() + step)
    return max(rough.median().item(), rough_log_det.median().item())


def is_rounded(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> str:
    """The dtype of fewer digits that x goes through on its way, if its rounding shows in the answers; else nothing.

    What float32 makes rough is smoother over steps ten times as long, where what is rough because it is steep, as some
    splines are, is rougher. Half precision is a staircase that small steps don't see. A search that ends within its
    tolerance is as rough as float32, and yet float64 throughout.
    """
    rough = roughness(function, x)
    if rough > ROUGH and roughness(function, x, 10 * STEP) < rough / 2:
        return _dtype_within(function, x)
    with suppress(Wrong):  # longer steps may leave what it takes
        if roughness(function, x, COARSE) > COARSELY:
            return _dtype_within(function, x, (torch.float16, torch.bfloat16))
    return ""


class _Lower(TorchFunctionMode):
    """Within, notes the sums of all tensors of some dtypes that functions of torch are given or give."""

    def __init__(self, dtypes: tuple[torch.dtype, ...]):
        super().__init__()
        self.dtypes, self.found = dtypes, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for value in (*args, *(answer if isinstance(answer, tuple) else (answer,))):
            if isinstance(value, Tensor) and value.dtype in self.dtypes:
                self.found.append((value.dtype, value.double().sum().item()))
        return answer


@torch.no_grad()
def _dtype_within(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, dtypes: tuple[torch.dtype, ...] = LOW
) -> str:
    """The first of these dtypes in which a function computes something that depends on x; empty if there is none.

    A table of float32 that is the same for all x has no part in how rough its answers are.
    """
    found = []
    for rows in (x, x + 0.1):
        try:
            with _Lower(dtypes) as lower:
                function(rows)
        except (Wrong, RuntimeError):  # what can't be watched
            return ""
        found.append(lower.found)
    return next((str(here[0]).removeprefix("torch.") for here, there in zip(*found, strict=False) if here != there), "")


@torch.no_grad()
def mass_error(
    log_prob: Callable[[Tensor], Tensor], drawn: Tensor, low: Tensor, high: Tensor, cells: int
) -> tuple[float, float]:
    """∫p over a box in two dimensions, and the largest |∫p − share of draws| over the rectangles from its corner.

    Mass outside the box does no harm, and lost mass is seen. ∫p is by the midpoint rule, on cells that are small where
    there are many draws.

    Args:
        log_prob: of ``(n, 2)``.
        drawn: samples, ``(n, 2)``.
        low, high: corners of the box, ``(2,)``.
        cells: how many along an axis.
    """
    inside = drawn[((drawn >= low) & (drawn <= high)).all(1)]
    even = torch.linspace(0, 1, cells // 2 + 1, dtype=drawn.dtype)
    edges = [
        torch.cat((start + (end - start) * even, torch.quantile(column, even[1:-1]))).sort().values
        for start, end, column in zip(low, high, inside.unbind(1), strict=True)
    ]
    middles, widths = zip(*[((edge[1:] + edge[:-1]) / 2, edge.diff()) for edge in edges], strict=True)
    values = torch.cat([log_prob(chunk).exp() for chunk in torch.cartesian_prod(*middles).split(50_000)])
    mass = values.view(len(widths[0]), -1) * widths[0][:, None] * widths[1]
    place = [
        (torch.bucketize(c.contiguous(), e) - 1).clamp(min=0) for c, e in zip(inside.unbind(1), edges, strict=True)
    ]
    share = torch.bincount(place[0] * mass.shape[1] + place[1], minlength=mass.numel()).view_as(mass) / len(drawn)
    errors = (mass - share).cumsum(0).cumsum(1).abs()
    return mass.sum().item(), errors.max().item() if not errors.isnan().any() else math.nan
