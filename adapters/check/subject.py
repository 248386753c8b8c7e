"""Whatever people write as a layer or a flow, called in one way: ``forward`` and ``inverse`` of rows and contexts.

What is taken is an nflows ``Transform`` or ``Flow``; those of any library that has a bridge; a plain module or object
whose call and whose ``inverse`` return ``(outputs, log_det)``, as the exercise's layer does; and the course's ``Flow``,
which has ``forward`` and ``inverse`` (noise → data and back) and ``log_prob`` and ``sample`` beside them.
"""

import copy
import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from nflows.flows import Flow
from nflows.transforms import InverseNotAvailable, Transform
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from adapters.bridges import as_flow, as_transform
from adapters.bridges.common.exports import whole_transform
from adapters.parts import base_of, embedding_of

FORWARD, INVERSE = "forward", "inverse"
OTHER = {FORWARD: INVERSE, INVERSE: FORWARD}
WRITE_INVERSE = "write def inverse(self, z, context=None), which returns what forward was given, and minus its log_det"
BASES = ("base", "prior", "base_dist", "base_distribution", "distribution", "latent", "p_z", "q0")
OTHER_NAMES = ("backward", "reverse", "invert", "inv", "inverse_transform", "_inverse", "g", "decode")  # of an inverse


class Wrong(Exception):
    """A call that gave no answer, or none of the right kind: one sentence."""


class Hangs(Wrong):
    """A call that did not come back in time: it is not tried again."""


class NoInverse(Wrong):
    """There is none."""


class TookTooLong(BaseException):
    """Not an ``Exception``: the user's own ``except Exception`` must not swallow it."""


class Subject:
    """A layer or a flow that is to be judged.

    Attributes:
        thing: what the user gave, or what a bridge made of it.
        module: the same as a module, whose parameters are moved; without any, if the thing is no module.
        is_flow: whether it has a density of its own.
        scores: the direction in which a density is computed, data → noise, as far as that is known.
    """

    def __init__(self, thing: Any, seconds: float):
        self.thing, self.seconds = thing, seconds
        self.module = thing if isinstance(thing, nn.Module) else nn.Module()
        self.is_flow = callable(getattr(thing, "log_prob", None)) and callable(getattr(thing, "sample", None))
        self.scores = FORWARD if isinstance(thing, Flow | Transform) or not self.is_flow else INVERSE
        self.transform: Any = whole_transform(thing) if isinstance(thing, Flow) else thing

    def function(self, direction: str) -> Callable:
        """The method of that name; of a module its call, so that hooks are called."""
        return self.transform if direction == FORWARD else self.transform.inverse

    def run(self, direction: str, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(outputs, log_det)`` of that direction.

        Raises:
            Wrong: if it raises, hangs, or returns anything else than two tensors.
        """
        answer = self.call(direction, self.function(direction), *self._given(x, context))
        if not (isinstance(answer, tuple | list) and len(answer) == 2):
            raise Wrong(
                f"{direction} returns {kind(answer)}, where a pair is wanted: write return outputs, log_det, with a "
                "log-determinant for each row"
            )
        for part, called in zip(answer, ("outputs", "log_det"), strict=True):
            if not isinstance(part, Tensor):
                raise Wrong(
                    f"{direction} returns {kind(part)} as its {called}, where a tensor is wanted"
                    + ("; for a constant write z.new_zeros(len(z))" if called == "log_det" else "")
                )
        return answer[0], answer[1]

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        answer = self.call("log_prob", self.thing.log_prob, *self._given(x, context))
        if not isinstance(answer, Tensor) or answer.shape != x.shape[:1]:
            raise Wrong(f"log_prob returns {kind(answer)}, where one number for each row is wanted, ({len(x)},)")
        return answer

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """n draws, each with its own row of the context if there is one; n is given as a shape, or else as a number."""
        sample = self.thing.sample
        if isinstance(self.thing, Flow):
            draws = self.call("sample", sample, *self._given(1 if context is not None else n, context))
            return draws if context is None else draws[:, 0]
        try:
            draws = self.call("sample", sample, *self._given((n,), context))
        except Wrong as error:
            if not isinstance(error.__cause__, TypeError):
                raise
            try:
                draws = self.call("sample", sample, *self._given(n, context))
            except Wrong:
                raise error from None
        if not isinstance(draws, Tensor):
            raise Wrong(f"sample returns {kind(draws)}, where a tensor is wanted")
        return draws

    def copy(self) -> "Subject":
        return Subject(twin(self.thing, left_behind=True), self.seconds)

    def in_float32(self) -> "Subject":
        """A copy in that dtype."""
        twin = self.copy()
        twin.module.float()
        return twin

    def theirs(self) -> list[tuple[str, nn.Module]]:
        """Those modules inside whose class is written in the user's own file."""
        found = []
        for name, part in self.module.named_modules():
            module = sys.modules.get(type(part).__module__)
            if is_theirs(getattr(module, "__file__", None)):
                found.append((name, part))
        return found

    def bases(self) -> list[Any]:
        """What may be the flow's base: whatever it holds that has a ``log_prob``, those with a usual name first."""
        if isinstance(self.thing, Flow):
            return [base_of(self.thing)]
        found = []
        for name in dict.fromkeys((*BASES, *vars(self.thing), *self.module._modules)):
            base = getattr(self.thing, name, None)
            if name in BASES and callable(base) and not hasattr(base, "log_prob"):
                with suppress(Exception):
                    base = base()  # the course's: a module whose call gives torch's distribution
            if callable(getattr(base, "log_prob", None)):
                found.append(base)
        return found

    def base_log_prob(self, noise: Tensor, context: Tensor | None = None, base: Any = None) -> Tensor | None:
        """log-density of the noise under that base, by default the first; ``None`` if the flow does not show one."""
        base = next(iter(self.bases()), None) if base is None else base
        if base is None:
            return None
        if isinstance(self.thing, Flow):
            return base.log_prob(noise, context=embedding_of(self.thing)(context))
        found = base.log_prob(noise)
        return found.flatten(1).sum(1) if found.shape == noise.shape else found  # of each coordinate

    def call(self, name: str, function: Callable, *given: Any) -> Any:
        """``function`` of what is given, within the time limit; a ``Wrong`` sentence for what goes wrong in it."""
        try:
            with time_limit(self.seconds):
                return function(*given)
        except TookTooLong:
            raise Hangs(
                f"{name} has not come back within {self.seconds:g} s: is there a loop that does not end?{line_of()}"
            ) from None
        except (InverseNotAvailable, NotImplementedError) as error:
            if not _is_stub(error):  # but raised by PyTorch, as of 1 − b where b is a bool
                raise Wrong(f"{name} raises {said(error)}") from error
            if name not in (INVERSE, "sample"):
                raise Wrong(f"{name} is not written yet") from None
            raise NoInverse(f"it has no inverse: {WRITE_INVERSE}") from None
        except (Exception, SystemExit) as error:
            raise Wrong(f"{name} raises {said(error)}") from error

    def _given(self, x: Any, context: Tensor | None) -> tuple:
        return (x,) if context is None else (x, context)

    def explain_signatures(self, context_features: int | None) -> None:
        """Raise ``Wrong`` unless both directions can be called as they will be.

        nflows' own flows and composites always hand a context on, be it None.
        """
        if any(nn.parameter.is_lazy(one) for one in self.module.parameters()):
            raise Wrong("its lazy modules have no sizes before they are called: write nn.Linear(features, …) in full")
        if not callable(self.transform):
            raise Wrong(f"{kind(self.thing)} can't be called: write def forward(self, z), which returns z', log_det")
        if not callable(getattr(self.transform, INVERSE, None)):
            other = next((name for name in OTHER_NAMES if callable(getattr(self.transform, name, None))), "")
            called = f", but a method {other}: if that is one, call it inverse; or else" if other else ":"
            raise NoInverse(f"it has no inverse{called} {WRITE_INVERSE}")
        always = isinstance(self.transform, Transform)
        for direction in (FORWARD, INVERSE):
            function = getattr(self.transform, direction, self.transform)
            if (context_features is not None or always) and not _takes(function, 2):
                remedy = f"write def {direction}(self, z, context=None)"
                why = "nflows hands every transform a context" if always else "a context was asked for"
                raise Wrong(f"{direction} takes no context, but {why}: {remedy}")
            if context_features is None and not _takes(function, 1):
                raise Wrong(
                    f"{direction} can't be called with z alone, because its other arguments have no default: "
                    f"write def {direction}(self, z, context=None), or say --context-features"
                )


def twin(thing: Any, left_behind: bool = False) -> Any:
    """A deep copy, also where ``weight_norm`` or ``spectral_norm`` keeps a weight that is computed before each call.

    Args:
        left_behind: whether to copy what else was computed and kept, as a constant, which a call may have left.
    """
    memo = {}
    for part in thing.modules() if isinstance(thing, nn.Module) else ():
        hooks = getattr(part, "_forward_pre_hooks", {}).values()
        normed = {hook.name for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)}
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf and (left_behind or name in normed):
                memo[id(value)] = value.detach()
    return copy.deepcopy(thing, memo)


def known(thing: Any) -> Any:
    """The thing as nflows' ``Flow`` or ``Transform`` where a bridge knows it, or else the thing itself.

    Raises:
        Wrong: if a bridge knows it, and that it can't be right.
    """
    for convert in (as_flow, as_transform):
        try:
            return convert(thing)
        except TypeError:
            continue
        except (ValueError, InverseNotAvailable) as error:
            raise Wrong(said(error)) from error
    return thing


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TookTooLong`` within, after that time; no limit where a program has no alarm, as outside its main thread.

    An alarm that was set already, as a test runner's, is given back.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TookTooLong

    with same_grad_mode():
        before = signal.signal(signal.SIGALRM, stop)
        remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, remaining)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def same_grad_mode() -> Iterator[None]:
    """Afterwards gradients are on again if they were before.

    A signal may raise anywhere, also where ``torch.no_grad()`` is about to end, and would leave them off for good.
    """
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


def kind(thing: Any) -> str:
    """What it is, in a message."""
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return "None" if thing is None else f"a {type(thing).__name__}"


def said(error: BaseException) -> str:
    """An error on one line, with the line of the user's own code that it comes from."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(message)}{message}{line_of(error)}"


def _is_stub(error: Exception) -> bool:
    """Whether somebody raised it in Python, for what is not written yet: torch raises it too, as for 1 − b of bools."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return not line or line.startswith("raise")


def place(thing: Any, method: str) -> str:
    """``forward (my_layer.py, line 12)``, or only the name where there is no source."""
    function = getattr(type(thing), method, None)
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]  # type: ignore[arg-type]
    except (OSError, TypeError):
        return method
    return f"{method} ({Path(file or '').name}, line {line})" if is_theirs(file) else method


def is_theirs(file: str | None) -> bool:
    """Whether a file is the user's own, rather than of an installed package or of this one."""
    packages = (
        Path(torch.__file__).parents[1],
        Path(__file__).parents[1],
        Path(sys.prefix),
        Path(inspect.__file__).parent,
    )
    return bool(file) and not file.startswith("<") and not any(p in Path(file).resolve().parents for p in packages)


def line_of(error: BaseException | None = None) -> str:
    """Where it was raised; now, if there is no error at hand but the one that is being handled."""
    error = sys.exc_info()[1] if error is None else error
    frames = (
        [frame for frame in traceback.extract_tb(error.__traceback__) if is_theirs(frame.filename)] if error else []
    )
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _takes(function: Callable, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # a built-in that does not say
        return True
    return True
