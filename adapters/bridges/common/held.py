"""torch's transforms and distributions as modules, so that their tensors move, train and are saved like any others."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property


class Held(nn.Module):
    """A thing made of torch's transforms and distributions as a module; calling it gives the thing.

    Modules inside it become submodules, leaf tensors that require a gradient become parameters (the very tensors) and
    other tensors buffers. What ``.to`` makes of them goes back into the thing.

    Some transforms keep something from their last call, which knows nothing of parameters that change or of other
    threads. Each call gives such a transform, and whatever it lies in, as a shallow copy: of the same tensors and
    modules, with nothing kept. Trained matrices that are to be triangular are cut to that there.

    Args:
        thing: a transform, a distribution or a list of them, modules or not.
        kinds: the classes to look into, beside lists, tuples, dictionaries, partial functions and methods.

    Attributes:
        caching: the transforms inside that keep something from their last call.

    Raises:
        ValueError: for a tensor computed from parameters: it would not follow them, and its graph is good for one
            backward pass only; for parameters that only a function inside it knows, where they cannot be found.
    """

    def __init__(self, thing, kinds: tuple[type, ...] = (Transform, Distribution)):
        super().__init__()
        self.thing, self.kinds, self.slots, self.plan = thing, kinds, [], None
        inside = [owner for owner, _ in _walk(thing, kinds) if isinstance(owner, Transform)]
        self.inverses = [transform for transform in inside if isinstance(transform, _InverseTransform)]
        self.caching = [transform for transform in inside if any(map(_is_cache, vars(transform)))]
        _clear_caches(self.caching)
        self._forget(Transform)
        _check_no_closures(thing, kinds)
        members = list(_members(thing, kinds))
        for _, _, name, value in members:
            if isinstance(value, nn.Module) and all(value is not module for module in self.modules()):
                self.add_module(name, value)
        known = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        for owner, key, name, value in members:
            if isinstance(value, Tensor) and id(value) not in known:
                self._register(owner, key, name, value)
        self._fill()

    def forward(self, context: Tensor | None = None) -> Any:
        """What it holds, to be run once. A context changes nothing."""
        return self.fresh()

    def fresh(self) -> Any:
        """What it holds, with nothing kept from an earlier call."""
        if self.plan is None:
            self.plan = _what_to_copy(self.thing, self.kinds)
        return _fresh(self.thing, self.plan, {})

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "plan": None}  # it knows things by their addresses

    def _register(self, owner, key, name: str, value: Tensor) -> None:
        leaf, geometry = value, None
        if value.grad_fn is not None:  # Normal(loc, 1.0) broadcasts its arguments: views of parameters are made anew
            leaf, geometry = value._base, (value.size(), value.stride(), value.storage_offset())
            if leaf is None or not leaf.is_leaf:
                raise ValueError(
                    f"{type(owner).__name__} holds a tensor ({key}) that was computed from parameters and would not "
                    "follow them; build it from the parameters themselves, or detach the tensor"
                )
        if leaf.requires_grad:
            leaf._is_param = True  # torch's own mark: a plain leaf tensor can then be registered without a copy
            self.register_parameter(name, leaf)
        else:
            self.register_buffer(name, leaf.contiguous())
        self.slots.append((owner, key, name, geometry))

    @torch.enable_grad()
    def _fill(self) -> None:
        """Put the registered tensors into the thing."""
        for owner, key, name, geometry in self.slots:
            tensor = getattr(self, name)
            _put(owner, key, tensor if geometry is None else tensor.as_strided(*geometry))

    def _forget(self, kind: type = object) -> None:
        """Drop what was computed on demand from the tensors, as ``Permute.inv_permutation``, where they may change."""
        slots = {(id(owner), key) for owner, key, _, _ in self.slots}
        for owner, key, _, value in list(_members(self.thing, self.kinds)):
            lazy = isinstance(getattr(type(owner), str(key), None), lazy_property)
            if lazy and isinstance(value, Tensor) and isinstance(owner, kind) and (id(owner), key) not in slots:
                del vars(owner)[key]

    def _apply(self, fn: Callable, recurse: bool = True) -> "Held":
        super()._apply(fn, recurse)
        _clear_caches(self.caching)
        self._forget()
        self._fill()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._fill()

    def __deepcopy__(self, memo: dict) -> "Held":
        """Views and caches cannot be copied, and an inverse forgets what it inverts: each is made anew in the copy."""
        _clear_caches(self.caching)
        for owner, key, _, geometry in self.slots:
            if geometry is not None:
                _put(owner, key, None)
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        for inverse, copied in zip(self.inverses, new.inverses, strict=True):
            copied._inv = copy.deepcopy(inverse._inv, memo)
        self._fill()
        new._fill()
        return new


def _clear_caches(transforms: Iterable[Transform]) -> None:
    """Forget what these transforms keep from their last call: ``_cached_x_y``, ``_cached_log_scale`` and so on."""
    for transform in transforms:
        vars(transform).update((key, _EMPTY.get(key)) for key in list(vars(transform)) if _is_cache(key))


_EMPTY = {"_cached_x_y": (None, None)}  # every other cache is None when it is empty


def _is_own_inverse(owner, key: str) -> bool:
    """Whether a transform keeps its own inverse there, which is made of it when asked for."""
    return key == "_inv" and isinstance(owner, Transform) and not isinstance(owner, _InverseTransform)


def _is_cache(key: str) -> bool:
    return key.startswith(("_cache", "_weight_cache")) and key != "_cache_size"


def _members(thing, kinds: tuple[type, ...]) -> Iterator[tuple]:
    """(owner, key, name, value) for every tensor and module inside the thing, down to modules of no kind of these."""
    for owner, path in _walk(thing, kinds):
        for key, value in _entries(owner):
            if isinstance(value, Tensor | nn.Module):
                yield owner, key, f"{path}{key}", value


def _check_no_closures(thing, kinds: tuple[type, ...]) -> None:
    """Raise a ValueError for trained tensors that only a function inside the thing knows, as one defined in another."""
    entries = ((owner, value) for owner, _ in _walk(thing, kinds) for _, value in _entries(owner))
    for owner, function in ((owner, value) for owner, value in entries if isinstance(value, FunctionType)):
        known = [cell.cell_contents for cell in function.__closure__ or ()]
        inside = [value for value, _ in _walk(known, (nn.Module, Tensor, *kinds))]
        if any(isinstance(value, nn.Module | Tensor) and _is_trained(value) for value in inside):
            raise ValueError(
                f"{type(owner).__name__} keeps what is trained inside a function, where it would be neither found nor "
                "saved; give the conditional or lazy transform that made it, and the context in each call"
            )


def _is_trained(thing: nn.Module | Tensor) -> bool:
    tensors = thing.parameters() if isinstance(thing, nn.Module) else (thing,)
    return any(tensor.requires_grad for tensor in tensors)


def _walk(thing, kinds: tuple[type, ...]) -> Iterator[tuple]:
    """The thing and everything inside it that may hold tensors, each with the path to it."""
    todo, seen = [(thing, "")], set()
    while todo:
        owner, path = todo.pop()
        if id(owner) not in seen:
            seen.add(id(owner))
            yield owner, path
            within = (*kinds, list, tuple, dict, partial, MethodType)
            todo += [(value, f"{path}{key}_") for key, value in _entries(owner) if isinstance(value, within)]


def _entries(owner) -> list[tuple]:
    match owner:
        case list() | tuple():
            return list(enumerate(owner))
        case dict():
            return list(owner.items())
        case partial():
            return [("func", owner.func), *enumerate(owner.args), *owner.keywords.items()]
        case MethodType():
            return [("self", owner.__self__)]
    state = vars(owner)
    for key, value in state.items():
        if type(value) is tuple and any(isinstance(entry, Tensor) for entry in value) and not _is_cache(key):
            state[key] = list(value)  # so that its tensors can be replaced
    return [(k, v) for k, v in state.items() if k not in ("_parameters", "_buffers") and not _is_cache(k)]


def _what_to_copy(thing, kinds: tuple[type, ...]) -> dict[int, tuple]:
    """What to copy so as to call the thing with no cache but a call's own: each by its address, with how to copy it.

    That is every transform that keeps something, everything with a trained triangular matrix, and whatever inside the
    thing holds one. How: the keys of its caches, the keys of what is to be copied with it, the names of what it
    computes on demand, which its copies share, and the keys of its triangular matrices.

    The last are those of ``LowerCholeskyAffine``, ``MultivariateNormal`` and their like: the whole matrix makes the
    samples, and its lower triangle alone scores them. Gradients through samples would fill the upper one.
    """
    within = (*kinds, list, tuple, dict, partial, MethodType)
    found: dict[int, tuple | None] = {}

    def visit(owner) -> bool:
        if id(owner) not in found:
            caches = [key for key in vars(owner) if _is_cache(key)] if isinstance(owner, Transform) else []
            found[id(owner)] = ()  # for now, so that a method bound to its owner finds that this is copied
            inner = [(key, value) for key, value in _entries(owner) if isinstance(value, within)]
            inner = [key for key, value in inner if not _is_own_inverse(owner, key) and visit(value)]
            lazy = [key for key in dir(type(owner)) if caches and isinstance(getattr(type(owner), key), lazy_property)]
            own = vars(owner) if isinstance(owner, Transform | Distribution) else {}
            triangles = [key for key in _TRIANGLES if getattr(own.get(key), "requires_grad", False)]
            found[id(owner)] = (caches, inner, lazy, triangles) if caches or inner or triangles else None
        return found[id(owner)] is not None

    visit(thing)
    return {address: how for address, how in found.items() if how is not None}


def _fresh(owner: Any, plan: dict[int, tuple], copies: dict) -> Any:
    """The owner itself, or its copy with empty caches if the plan, of ``_what_to_copy``, knows it."""
    if id(owner) not in plan or id(owner) in copies:
        return copies.get(id(owner), owner)
    caches, inner, lazy, triangles = plan[id(owner)]
    match owner:
        case list() | tuple():
            return type(owner)(_fresh(value, plan, copies) for value in owner)
        case dict():
            return {key: _fresh(value, plan, copies) for key, value in owner.items()}
        case MethodType():
            return MethodType(owner.__func__, _fresh(owner.__self__, plan, copies))
        case partial():
            function, *arguments = (_fresh(value, plan, copies) for value in (owner.func, *owner.args))
            return partial(function, *arguments, **{k: _fresh(v, plan, copies) for k, v in owner.keywords.items()})
    for key in lazy:
        with suppress(NotImplementedError):  # as torch's transforms without a sign raise
            getattr(owner, key)
    copied = copies[id(owner)] = object.__new__(type(owner))
    state = vars(copied)
    state.update(vars(owner))
    for key in caches:
        state[key] = _EMPTY.get(key)
    for key in inner:
        state[key] = _fresh(state[key], plan, copies)
    for key in triangles:
        state[key] = state[key].tril()
    if _is_own_inverse(owner, "_inv"):
        state["_inv"] = None
    return copied


_TRIANGLES = "scale_tril", "_unbroadcasted_scale_tril"


def _put(owner, key, value: Tensor) -> None:
    if isinstance(owner, partial):
        args, keywords = list(owner.args), dict(owner.keywords)
        (args if isinstance(key, int) else keywords)[key] = value
        owner.__setstate__((owner.func, tuple(args), keywords, owner.__dict__))
    elif isinstance(owner, list | dict):
        owner[key] = value
    else:
        vars(owner)[key] = value
