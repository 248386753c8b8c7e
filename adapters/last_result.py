"""A memo of the result of a module's last pass, for the call that tends to ask for it next: ``LastResult``."""

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


register_optimizer_step_post_hook(_count_step)  # fused optimisers change parameters without counting up their versions


class LastResult:
    """A memo of the second result of a module's last pass: the log-determinant or log-density beside its output.

    A pass that draws a sample also gives the sample's log-density, and a pass that inverts a transform its
    log-determinant. But torch's distributions and transforms return the output alone, and ask for the rest in a second
    call. So the pass may ``keep`` the rest, and the second call may ``take`` it, instead of evaluating the networks
    again.

    A kept result is given out once, to the next ``take`` only, and only if a new pass would give the very same:

    - ``take`` is about the same tensors (the same objects, not equal ones), which have not changed since;
    - the module has the same parameters, buffers and submodules, and none of the tensors has been changed in place or
      been given other ``.data``;
    - each submodule is in the same mode, training or evaluation, and gradients, inference mode and autocast are on or
      off as they were.

    A change in place is noticed by the version that autograd counts for each tensor. What is written *through*
    ``.data`` does not count, and is not noticed.

    The memo keeps no tensor alive but the result, and that no longer than the first of the tensors that it is about. A
    copy of a memo is empty, and so is one from a pickle.

    Args:
        parts: the module's parts, if they are known already; see ``sibling``.

    >>> layer, z, last = nn.Linear(2, 2), torch.ones(1, 2), LastResult()
    >>> last.keep(torch.tensor([0.5]), layer, z)
    >>> last.take(layer, z), last.take(layer, z)
    (tensor([0.5000]), None)
    >>> last.keep(torch.tensor([0.5]), layer, z)
    >>> z += 1  # now a new pass would give another result
    >>> print(last.take(layer, z))
    None
    """

    def __init__(self, parts: "_Parts | None" = None):
        self.parts = parts
        self.kept: _Kept | None = None

    def keep(self, result: Tensor, module: nn.Module, first: Tensor, *others: Tensor | None) -> None:
        """Keep the result of a pass of this module whose inputs or outputs are these tensors."""
        state = self._state(module, first, *others)
        if state is None:
            self.kept = None
            return
        this: weakref.ref[LastResult] = weakref.ref(self)
        uncounted = [tensor.clone() for tensor in state.uncounted]
        self.kept = _Kept(result, state._replace(uncounted=uncounted), weakref.ref(first, lambda _: _forget(this)))

    def take(self, module: nn.Module, first: Tensor, *others: Tensor | None) -> Tensor | None:
        """The kept result, if it is about these tensors and nothing has changed since; otherwise ``None``."""
        kept, self.kept = self.kept, None
        if kept is None or kept.first() is not first:
            return None
        state = self._state(module, first, *others)
        return kept.result if state is not None and state.equals(kept.state) else None

    def sibling(self, module: nn.Module) -> "LastResult":
        """An empty memo for the same module, which shares the list of the module's parts with this one."""
        with suppress(RuntimeError):  # as in _state
            if not torch.compiler.is_compiling():
                self._look_up(module)
        return LastResult(self.parts)

    def _look_up(self, module: nn.Module) -> tuple["_Parts", list[Tensor]]:
        """The module's parts and tensors. They are listed anew if the module is another one, or a part was replaced."""
        parts = self.parts
        tensors = None if parts is None else parts.found_in(module)
        if parts is None or tensors is None:
            parts = self.parts = _Parts(module)
            tensors = parts.tensors()
        return parts, tensors

    def _state(self, module: nn.Module, *about: Tensor | None) -> "_State | None":
        """Everything that a pass of the module at these tensors depends on; ``None`` where it can't be told."""
        if torch.compiler.is_compiling():
            return None
        given = [tensor for tensor in about if tensor is not None]
        counted = [tensor for tensor in given if not tensor.is_inference()]
        uncounted = [tensor for tensor in given if tensor.is_inference()]
        if any(tensor.is_cuda for tensor in uncounted) and torch.cuda.is_current_stream_capturing():
            return None  # while a graph is captured, no values can be compared
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
            return _State(parts, values, _references(given), uncounted)
        except RuntimeError:
            return None

    def __reduce__(self) -> tuple:
        return LastResult, ()


class _Parts:
    """A list of a module's submodules, parameters and buffers, which can tell whether one was replaced since.

    The submodules are held, the tensors by weak references only. As long as a weak reference lives, Python and PyTorch
    return the same one for the same object, so that two references are compared by ``is``.
    """

    def __init__(self, module: nn.Module):
        self.modules = [*module.modules()]
        self.children = [part._modules for part in self.modules]
        self.addresses = [*map(id, _values(self.children))]
        self.tensors_of_parts = [tensors for part in self.modules for tensors in (part._parameters, part._buffers)]
        tensors = self.tensors()
        self.references, self.views = _references(tensors), _views(tensors)

    def found_in(self, module: nn.Module) -> list[Tensor] | None:
        """The module's tensors, if it is the module that was listed and no part of it was replaced; else ``None``."""
        if self.modules[0] is not module or [*map(id, _values(self.children))] != self.addresses:
            return None
        tensors = self.tensors()
        found = _alike(_references(tensors), self.references) and _views(tensors) == self.views
        return tensors if found else None

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers. One that two submodules share comes twice."""
        return [tensor for tensor in _values(self.tensors_of_parts) if tensor is not None]


class _State(NamedTuple):
    """Everything that the result of a pass depends on.

    Attributes:
        parts: the module's parts. If one of them is replaced, this is another object.
        values: what is compared with ``==``: modes, versions and views.
        references: weak references to the tensors that the pass is about, as in ``_Parts``.
        uncounted: those of these tensors that were made in inference mode, whose versions autograd does not count. They
            are compared by value, so that a kept state has copies of them.
    """

    parts: _Parts
    values: list
    references: list[weakref.ref]
    uncounted: list[Tensor]

    def equals(self, other: "_State") -> bool:
        return (
            self.parts is other.parts
            and self.values == other.values
            and _alike(self.references, other.references)
            and all(map(torch.equal, self.uncounted, other.uncounted))
        )


class _Kept(NamedTuple):
    """A kept result, the state that it depends on, and a weak reference to the first tensor that it is about."""

    result: Tensor
    state: _State
    first: weakref.ref


def _forget(last: "weakref.ref[LastResult]") -> None:
    this = last()
    if this is not None:
        this.kept = None


def _references(tensors: list[Tensor]) -> list[weakref.ref]:
    """Weak references to the tensors and to their storages: setting ``.data`` gives a tensor another storage."""
    return [*map(weakref.ref, tensors), *map(weakref.ref, map(Tensor.untyped_storage, tensors))]


def _alike(these: list[weakref.ref], those: list[weakref.ref]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _views(tensors: list[Tensor]) -> list[list]:
    """For each tensor, which part of its storage it is, and whether its elements are in the usual order."""
    return [[*map(part, tensors)] for part in (Tensor.storage_offset, Tensor.numel, Tensor.is_contiguous)]


def _values(dictionaries: Iterable[dict]) -> Iterator:
    return chain.from_iterable(map(dict.values, dictionaries))


_training, _version, _requires_grad = map(attrgetter, ("training", "_version", "requires_grad"))
