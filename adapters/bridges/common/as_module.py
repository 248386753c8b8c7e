"""torch's transforms and distributions as modules, so that their tensors move, train and are saved like any others."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

CONTAINERS = (list, tuple, dict, partial, MethodType)
TRIANGLES = "scale_tril", "_unbroadcasted_scale_tril"
EMPTY = {"_cached_x_y": (None, None)}  # every other cache is None when it is empty


class Place(NamedTuple):
    """Where a tensor lies, and under which name the module has registered it.

    Attributes:
        owner, key: it is the owner's attribute, entry or argument of this key.
        name: of the parameter or buffer.
        geometry: size, stride and offset, where it is a view of the parameter; else ``None``.
    """

    owner: Any
    key: Any
    name: str
    geometry: tuple | None


class AsModule(nn.Module):
    """A transform or distribution of torch as a module; calling it gives the transform or distribution.

    Modules inside it become submodules. Leaf tensors that require a gradient become parameters: these very tensors, not
    copies. Other tensors become buffers. When ``.to`` replaces a tensor, the new one is put where the old one was.

    Some transforms keep a result of their last call, which is wrong once parameters have changed or another thread has
    called them. So each call makes a shallow copy of such a transform, and of every object that holds it. The copies
    have the same tensors and modules, and keep nothing yet. In a copy, a trained matrix that is meant to be triangular
    is cut to its lower triangle.

    Args:
        native: a transform or distribution, itself a module or not.
        kinds: the classes whose attributes may hold tensors. Lists, tuples, dictionaries, partial functions and methods
            are always searched.

    Raises:
        ValueError: for a tensor that was computed from parameters, because it would not follow them, and its graph is
            good for one backward pass only; for parameters that lie inside a function, where they cannot be found.
    """

    def __init__(self, native: Any, kinds: tuple[type, ...] = (Transform, Distribution)):
        super().__init__()
        self.native, self.kinds = native, kinds
        self.places: list[Place] = []
        self.plan: dict[int, Copying] | None = None
        inside = [owner for owner, _ in _walk(native, kinds) if isinstance(owner, Transform)]
        self.inverses = [transform for transform in inside if isinstance(transform, _InverseTransform)]
        self.caching = [transform for transform in inside if any(map(_is_cache, vars(transform)))]
        _clear_caches(self.caching)
        self._forget(Transform)
        _check_no_closures(native, kinds)
        members = list(_members(native, kinds))
        for _, _, name, value in members:
            if isinstance(value, nn.Module) and all(value is not module for module in self.modules()):
                self.add_module(name, value)
        known = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        for owner, key, name, value in members:
            if isinstance(value, Tensor) and id(value) not in known:
                self._register(owner, key, name, value)
        self._fill()

    def forward(self, context: Tensor | None = None) -> Any:
        """The transform or distribution, whatever the context."""
        return self.fresh()

    def fresh(self) -> Any:
        """The transform or distribution, with nothing kept from an earlier call."""
        if self.plan is None:
            self.plan = _what_to_copy(self.native, self.kinds)
        return _fresh(self.native, self.plan, {})

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "plan": None}  # its keys are addresses, which differ in a copy

    def _register(self, owner, key, name: str, value: Tensor) -> None:
        """Make the tensor a parameter or a buffer. Of a view of a parameter, that parameter is registered."""
        leaf, geometry = value, None
        if value.grad_fn is not None:  # such as Normal(loc, 1.0), which holds a broadcast view of its parameter
            leaf, geometry = value._base, (value.size(), value.stride(), value.storage_offset())
            if leaf is None or not leaf.is_leaf:
                raise ValueError(
                    f"{type(owner).__name__} holds a tensor ({key}) that was computed from parameters and would not "
                    "follow them; build it from the parameters themselves, or detach the tensor"
                )
        if leaf.requires_grad:
            leaf._is_param = True  # torch's own mark: a plain leaf tensor can then be registered without a copy
            self.register_parameter(name, leaf)  # type: ignore[arg-type]
        else:
            self.register_buffer(name, leaf.contiguous())
        self.places.append(Place(owner, key, name, geometry))

    @torch.enable_grad()
    def _fill(self) -> None:
        """Put the registered tensors where they belong."""
        for owner, key, name, geometry in self.places:
            tensor = getattr(self, name)
            _put(owner, key, tensor if geometry is None else tensor.as_strided(*geometry))

    def _forget(self, kind: type = object) -> None:
        """Drop what objects of this class have computed on demand, such as ``Permute.inv_permutation``.

        It was computed from tensors that may have changed since, and is computed again when it is asked for.
        """
        registered = {(id(place.owner), place.key) for place in self.places}
        for owner, key, _, value in list(_members(self.native, self.kinds)):
            lazy = isinstance(getattr(type(owner), str(key), None), lazy_property)
            if lazy and isinstance(value, Tensor) and isinstance(owner, kind) and (id(owner), key) not in registered:
                del vars(owner)[key]

    def _apply(self, fn: Callable, recurse: bool = True) -> "AsModule":
        super()._apply(fn, recurse)
        _clear_caches(self.caching)
        self._forget()
        self._fill()
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._forget()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._fill()

    def __deepcopy__(self, memo: dict) -> "AsModule":
        """A copy in which views, caches and inverses are made anew.

        PyTorch copies no views of parameters, and a copied inverse of torch's forgets the transform that it inverts.
        """
        _clear_caches(self.caching)
        for place in self.places:
            if place.geometry is not None:
                _put(place.owner, place.key, None)
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        for inverse, copied in zip(self.inverses, new.inverses, strict=True):
            copied._inv = copy.deepcopy(inverse._inv, memo)
        self._fill()
        new._fill()
        return new


def _clear_caches(transforms: Iterable[Transform]) -> None:
    """Empty what these transforms keep from their last call: ``_cached_x_y``, ``_cached_log_scale`` and so on."""
    for transform in transforms:
        vars(transform).update((key, EMPTY.get(key)) for key in list(vars(transform)) if _is_cache(key))


def _is_own_inverse(owner, key: str) -> bool:
    """Whether this attribute is a transform's own inverse, which torch makes when it is first asked for."""
    return key == "_inv" and isinstance(owner, Transform) and not isinstance(owner, _InverseTransform)


def _is_cache(key: str) -> bool:
    return key.startswith(("_cache", "_weight_cache")) and key != "_cache_size"


def _members(native: Any, kinds: tuple[type, ...]) -> Iterator[tuple[Any, Any, str, Tensor | nn.Module]]:
    """(owner, key, name, value) for every tensor and module inside. Modules of other classes are not searched."""
    for owner, path in _walk(native, kinds):
        for key, value in _entries(owner):
            if isinstance(value, Tensor | nn.Module):
                yield owner, key, f"{path}{key}", value


def _check_no_closures(native: Any, kinds: tuple[type, ...]) -> None:
    """Raise a ValueError if a function inside holds trained tensors as variables of the function that defined it."""
    entries = ((owner, value) for owner, _ in _walk(native, kinds) for _, value in _entries(owner))
    for owner, function in ((owner, value) for owner, value in entries if isinstance(value, FunctionType)):
        known = [cell.cell_contents for cell in function.__closure__ or ()]
        inside = [value for value, _ in _walk(known, (nn.Module, Tensor, *kinds))]
        if any(isinstance(value, nn.Module | Tensor) and _is_trained(value) for value in inside):
            raise ValueError(
                f"{type(owner).__name__} keeps what is trained inside a function, where it would be neither found nor "
                "saved; give the conditional or lazy transform that made it, and the context in each call"
            )


def _is_trained(value: nn.Module | Tensor) -> bool:
    tensors = value.parameters() if isinstance(value, nn.Module) else (value,)
    return any(tensor.requires_grad for tensor in tensors)


def _walk(native: Any, kinds: tuple[type, ...]) -> Iterator[tuple[Any, str]]:
    """``native`` and all objects inside it that may hold tensors, each with the path to it."""
    todo, seen = [(native, "")], set()
    while todo:
        owner, path = todo.pop()
        if id(owner) not in seen:
            seen.add(id(owner))
            yield owner, path
            inside = [(value, f"{path}{key}_") for key, value in _entries(owner)]
            todo += [(value, path) for value, path in inside if isinstance(value, (*kinds, *CONTAINERS))]


def _entries(owner: Any) -> list[tuple[Any, Any]]:
    """(key, value) of all entries of a container or attributes of an object, but for a module's own tensors."""
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


class Copying(NamedTuple):
    """How to copy an object so that the copy keeps nothing from earlier calls.

    Attributes:
        caches: the keys of its caches, which are emptied.
        inner: the keys of the objects inside it that are copied, too.
        lazy: the names of properties that it computes on demand. They are computed before copying, so that all copies
            share them.
        triangles: the keys of trained matrices that are cut to their lower triangle, such as a ``MultivariateNormal``
            has. torch samples with the whole matrix, but scores with its lower triangle alone. Gradients through
            samples would make the upper triangle differ from 0.
    """

    caches: list[str]
    inner: list
    lazy: list[str]
    triangles: list[str]


def _what_to_copy(native: Any, kinds: tuple[type, ...]) -> dict[int, Copying]:
    """The objects that must be copied so that a call finds nothing kept: by their addresses, how each is copied.

    They are the transforms that keep something, the objects with a trained triangular matrix, and all objects inside
    ``native`` that hold one of these.
    """
    found: dict[int, Copying | None] = {}

    def visit(owner: Any) -> bool:
        if id(owner) not in found:
            caches = [key for key in vars(owner) if _is_cache(key)] if isinstance(owner, Transform) else []
            found[id(owner)] = Copying(
                [], [], [], []
            )  # for now, because an object may hold a method that is bound to it
            inside = [(key, value) for key, value in _entries(owner) if isinstance(value, (*kinds, *CONTAINERS))]
            inner = [key for key, value in inside if not _is_own_inverse(owner, key) and visit(value)]
            lazy = [key for key in dir(type(owner)) if caches and isinstance(getattr(type(owner), key), lazy_property)]
            own = vars(owner) if isinstance(owner, Transform | Distribution) else {}
            triangles = [key for key in TRIANGLES if getattr(own.get(key), "requires_grad", False)]
            found[id(owner)] = Copying(caches, inner, lazy, triangles) if caches or inner or triangles else None
        return found[id(owner)] is not None

    visit(native)
    return {address: how for address, how in found.items() if how is not None}


def _fresh(owner: Any, plan: dict[int, Copying], copies: dict[int, Any]) -> Any:
    """A copy of the owner with empty caches if the plan has an entry for it, else the owner itself."""
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
        with suppress(NotImplementedError):  # torch's transforms without a sign raise it
            getattr(owner, key)
    copied = copies[id(owner)] = object.__new__(type(owner))
    state = vars(copied)
    state.update(vars(owner))
    for key in caches:
        state[key] = EMPTY.get(key)
    for key in inner:
        state[key] = _fresh(state[key], plan, copies)
    for key in triangles:
        state[key] = state[key].tril()
    if _is_own_inverse(owner, "_inv"):
        state["_inv"] = None
    return copied


def _put(owner: Any, key: Any, value: Tensor | None) -> None:
    """Set the owner's attribute, entry or argument of this key."""
    if isinstance(owner, partial):
        arguments: dict[Any, Any] = {**dict(enumerate(owner.args)), **owner.keywords, key: value}
        positional = tuple(arguments.pop(i) for i in range(len(owner.args)))
        owner.__setstate__((owner.func, positional, arguments, vars(owner)))  # type: ignore[attr-defined]
    elif isinstance(owner, list | dict):
        owner[key] = value
    else:
        vars(owner)[key] = value
