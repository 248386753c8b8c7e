"""One direction of a layer at a few rows: what came out, what was claimed, what is true, and what the networks did."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softsign
from torch.overrides import TorchFunctionMode

from adapters.check.measure import EXACT, Function, jacobian, log_abs_det, relative
from adapters.check.subject import Wrong

CALLS = 3  # of each network inside, that are looked at in one pass
EXP = "what torch.exp is given"


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
