"""What the last pass of a module has found, for the question that tends to follow it: ``LastResult``."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)  # fused optimisers change parameters, but count no version of them


class LastResult:
    """What the last pass of a module has found beside its output, until somebody asks for it.

    Whoever draws a sample knows its log-density from the same pass, and whoever inverts a transform its
    log-determinant; but torch asks for these afterwards, in a call of its own. So the pass may ``keep`` what it has
    found, and the call may ``take`` it instead of passing everything through the networks again.

    It is given out once, to the next question alone, and only if the pass would give the very same again:

    - the question is about the same tensors (the same objects, not equal ones), which have not changed since;
    - the module holds the same parameters, buffers and submodules, and none of the tensors has been changed in place or
      been given other ``.data``;
    - each submodule is in the same mode, training or evaluation, and gradients, inference mode and autocast are on or
      off as they were.

    Changes in place are seen as autograd counts them: what is written *through* ``.data`` is not.

    It keeps no tensor alive but the result, and that no longer than the first of the tensors asked about. A copy, as
    one from a pickle, starts with nothing kept.

    Args:
        parts: of the module, where they are known already; see ``sibling``.
    """

    def __init__(self, parts: "Parts | None" = None):
        self.parts = parts
        self.kept: Kept | None = None

    def keep(self, result: Tensor, module: nn.Module, first: Tensor, *others: Tensor | None) -> None:
        """Keep the result of a pass of this module at, or to, these tensors."""
        state = self._state(module, first, *others)
        if state is None:
            self.kept = None
            return
        this: weakref.ref[LastResult] = weakref.ref(self)
        uncounted = [tensor.clone() for tensor in state.uncounted]
        self.kept = Kept(result, state._replace(uncounted=uncounted), weakref.ref(first, lambda _: _forget(this)))

    def take(self, module: nn.Module, first: Tensor, *others: Tensor | None) -> Tensor | None:
        """What was kept, if these are the tensors that it is about and nothing has changed; else ``None``."""
        kept, self.kept = self.kept, None
        if kept is None or kept.first() is not first:
            return None
        state = self._state(module, first, *others)
        return kept.result if state is not None and state.equals(kept.state) else None

    def sibling(self, module: nn.Module) -> "LastResult":
        """An empty one for the same module, whose parts it need not look up again."""
        with suppress(RuntimeError):  # as in _state
            if not torch.compiler.is_compiling():
                self._look_up(module)
        return LastResult(self.parts)

    def _look_up(self, module: nn.Module) -> tuple["Parts", list[Tensor]]:
        """The module's parts and tensors; looked up anew for another module, or where a part has been replaced."""
        parts = self.parts
        tensors = None if parts is None else parts.found_in(module)
        if parts is None or tensors is None:
            parts = self.parts = Parts(module)
            tensors = parts.tensors()
        return parts, tensors

    def _state(self, module: nn.Module, *about: Tensor | None) -> "State | None":
        """All that a pass of the module at these tensors depends on; ``None`` where nothing can tell."""
        if torch.compiler.is_compiling():
            return None
        given = [tensor for tensor in about if tensor is not None]
        counted = [tensor for tensor in given if not tensor.is_inference()]
        uncounted = [tensor for tensor in given if tensor.is_inference()]
        if any(tensor.is_cuda for tensor in uncounted) and torch.cuda.is_current_stream_capturing():
            return None  # where no value can be compared
        device = given[0].device.type
        try:  # a tensor within torch.func has no storage, and a parameter made in inference mode no version
            parts, inside = self._look_up(module)
            values = [
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
                _optimizer_steps,
                [*map(_training, parts.modules)],
                [*map(_version, inside), *map(_version, counted)],
                [*map(_requires_grad, inside), *map(_requires_grad, given)],
                [tensor.is_leaf for tensor in given],
                _views(given),
            ]
            return State(parts, values, _references(given), uncounted)
        except RuntimeError:
            return None

    def __reduce__(self) -> tuple:
        return LastResult, ()


class Parts:
    """A module's submodules, parameters and buffers, as they were found: these very objects, with this very memory.

    It holds on to the submodules, but to the tensors by weak references only. As long as such a reference lives, Python
    and PyTorch give the same one for the same object, and no other object takes its place.
    """

    def __init__(self, module: nn.Module):
        self.modules = [*module.modules()]
        self.children = [part._modules for part in self.modules]
        self.addresses = [*map(id, _values(self.children))]
        self.held = [held for part in self.modules for held in (part._parameters, part._buffers)]
        tensors = self.tensors()
        self.references, self.views = _references(tensors), _views(tensors)

    def found_in(self, module: nn.Module) -> list[Tensor] | None:
        """The tensors, if this module has these very parts still."""
        if self.modules[0] is not module or [*map(id, _values(self.children))] != self.addresses:
            return None
        tensors = self.tensors()
        found = _alike(_references(tensors), self.references) and _views(tensors) == self.views
        return tensors if found else None

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers; what two submodules share comes twice."""
        return [tensor for tensor in _values(self.held) if tensor is not None]


class State(NamedTuple):
    """All that a pass depends on.

    Attributes:
        parts: the module's. Others have taken their place as soon as one of them is another object.
        values: what is compared as numbers: modes, versions, views.
        references: to the tensors asked about, as in ``Parts``.
        uncounted: those of them made in inference mode, whose changes autograd does not count; copies where it is kept.
    """

    parts: Parts
    values: list
    references: list[weakref.ref]
    uncounted: list[Tensor]

    def equals(self, other: "State") -> bool:
        return (
            self.parts is other.parts
            and self.values == other.values
            and _alike(self.references, other.references)
            and all(map(torch.equal, self.uncounted, other.uncounted))
        )


class Kept(NamedTuple):
    """A result, what it depends on, and the first of the tensors that it is about."""

    result: Tensor
    state: State
    first: weakref.ref


def _forget(last: "weakref.ref[LastResult]") -> None:
    this = last()
    if this is not None:
        this.kept = None


def _references(tensors: list[Tensor]) -> list[weakref.ref]:
    """Weak references to the tensors and to their memory, which ``.data`` may replace."""
    return [*map(weakref.ref, tensors), *map(weakref.ref, map(Tensor.untyped_storage, tensors))]


def _alike(these: list[weakref.ref], those: list[weakref.ref]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _views(tensors: list[Tensor]) -> list[list]:
    """Which part of its memory each tensor is, and whether in the usual order."""
    return [[*map(part, tensors)] for part in (Tensor.storage_offset, Tensor.numel, Tensor.is_contiguous)]


def _values(dictionaries: Iterable[dict]) -> Iterator:
    return chain.from_iterable(map(dict.values, dictionaries))


_training, _version, _requires_grad = map(attrgetter, ("training", "_version", "requires_grad"))
