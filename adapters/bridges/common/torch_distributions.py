"""torch.distributions' objects as modules, and nflows' transforms as theirs: what the bridges of zuko and Pyro share.

torch's ``Transform`` and ``Distribution`` are no modules. ``Held`` makes one of them, so that their tensors move, train
and are saved like any others; ``TorchBase`` is a torch distribution as the base of an nflows ``Flow``;
``ExportedTransform`` is an nflows transform as torch's ``Transform``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import EllipsisType, FunctionType, MethodType

import nflows.distributions
import nflows.transforms
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

from adapters.bridges.common.exports import EventDim, check_event_dim
from adapters.checks import check_tensor
from adapters.flow import Flow
from adapters.last_result import LastResult

# Width of the context that something reads: None if it reads none, ... if it does not say.
Width = int | EllipsisType | None


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

    def forward(self, context: Tensor | None = None):
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


class TorchBase(nflows.distributions.Distribution):
    """A torch distribution as the base of an nflows ``Flow``, differentiable in its samples where torch's is.

    Args:
        source: a module whose call on a context (or None) gives the torch distribution.
        shape: shape of one sample.
    """

    def __init__(self, source: nn.Module, shape: torch.Size):
        super().__init__()
        self.source = source
        self.shape = torch.Size(shape)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        log_prob = self.source(context).log_prob(inputs)
        return _sum_rows(log_prob)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        distribution = self.source(context)
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        if context is None:
            return draw((num_samples,))
        if distribution.batch_shape + distribution.event_shape == self.shape:  # it does not depend on the context
            return draw((len(context), num_samples))
        return draw((num_samples,)).transpose(0, 1)


class ForeignFlow(Flow):
    """A ``Flow`` whose parts do not say what context they take: it is handed on unchecked."""

    def _check_context(self, context: Tensor | None) -> None:
        pass


class ExportedTransform(Transform, nn.Module):
    """An nflows transform as torch's: noise → data, or data → noise as zuko has it, with any leading dimensions.

    torch computes a log_prob by ``x = t.inv(y)`` and ``t.log_abs_det_jacobian(x, y)``. Both come of one pass: the
    inverse keeps its log-determinant for that next question, which takes it away, see ``LastResult``.

    Args:
        transform: an nflows transform, data → noise.
        event_dim: dimensions of one datum, which is noise of the same shape; or both shapes, the datum's and its
            noise's, if they differ.
        context: ``(*batch, C)``, broadcast with the batch of the input; ``None`` for no context.
        data_to_noise: which way ``__call__`` runs.

    Raises:
        TypeError, ValueError: for a wrong ``event_dim``, see ``check_event_dim``; in a call, for an input of fewer
            dimensions, a transform that changes the shape though nothing has said so, or a context that is missing or
            of another width, where the transform says which, or whose batch does not broadcast with the inputs.
    """

    bijective = True
    __hash__ = nn.Module.__hash__
    __repr__ = nn.Module.__repr__

    def __init__(
        self,
        transform: nflows.transforms.Transform,
        event_dim: EventDim,
        context: Tensor | None = None,
        data_to_noise: bool = False,
    ):
        check_event_dim(event_dim)
        super().__init__()
        self.transform = transform
        self.context = context
        self.data_to_noise = data_to_noise
        self.shapes = None if isinstance(event_dim, int) else tuple(map(torch.Size, event_dim))
        self.dimensions = (event_dim, event_dim) if self.shapes is None else tuple(map(len, self.shapes))
        ends = [constraints.independent(constraints.real, dimensions) for dimensions in self.dimensions]
        self.domain, self.codomain = ends if data_to_noise else reversed(ends)
        self.last = LastResult()

    @property
    def inv(self) -> Transform:
        """The other direction."""
        if self._inv is None:
            vars(self)["_inv"] = ExportedInverse(self)
        return self._inv

    def condition(self, context: Tensor) -> "ExportedTransform":
        """The same transform, of the same parameters, with this context."""
        conditioned = copy.copy(self)
        vars(conditioned).update(context=context, last=self.last.sibling(self.transform))
        return conditioned

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|det dy/dx|, from one pass."""
        return self._run(x, to_noise=self.data_to_noise)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._run(y, to_noise=not self.data_to_noise)
        self.last.keep(-log_det, self.transform, x, y, self.context)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known = self.last.take(self.transform, x, y, self.context)
        if known is not None:
            return known
        # data → noise is the direction that every transform of a flow has
        return self._run(x, to_noise=True)[1] if self.data_to_noise else -self._run(y, to_noise=True)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._shape_after(shape, to_noise=self.data_to_noise)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._shape_after(shape, to_noise=not self.data_to_noise)

    def _shape_after(self, shape: torch.Size, to_noise: bool) -> torch.Size:
        if self.shapes is None:
            return shape
        before, after = self.shapes if to_noise else reversed(self.shapes)
        cut = len(shape) - len(before)
        if cut < 0 or shape[cut:] != before:
            raise ValueError(f"this transform takes shapes that end in {tuple(before)}, not {tuple(shape)}")
        return torch.Size((*shape[:cut], *after))

    def with_cache(self, cache_size: int = 1) -> "ExportedTransform":
        """Itself: torch's cache knows nothing of parameters that change."""
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_inv": None}

    def _run(self, value: Tensor, to_noise: bool) -> tuple[Tensor, Tensor]:
        check_tensor(value, "the inputs of this transform")
        dimensions = self.dimensions[0 if to_noise else 1]
        if value.dim() < dimensions:
            raise ValueError(f"this transform takes inputs of at least {dimensions} dimensions, not {value.dim()}")
        batch, event = value.shape[: value.dim() - dimensions], value.shape[value.dim() - dimensions :]
        context = self.context
        if context is not None:
            check_tensor(context, "the context of this transform")
            batch = _broadcast(batch, context)
            context = context.expand(*batch, context.shape[-1]).reshape(math.prod(batch), context.shape[-1])
        flat = value
        if len(batch) != 1 or context is not None:
            flat = value.expand(*batch, *event).reshape(math.prod(batch), *event)
        try:
            outputs, log_det = (self.transform if to_noise else self.transform.inverse)(flat, context)
        except RuntimeError as error:  # from deep below, as of matrices whose shapes do not fit
            _explain(self.transform, context, error)
            raise
        if outputs.shape[1:] != (event if self.shapes is None else self.shapes[1 if to_noise else 0]):
            both = [tuple(event), tuple(outputs.shape[1:])]
            datum, noise = both if to_noise else reversed(both)
            raise ValueError(
                f"this transform makes noise of shape {noise} of a datum of shape {datum}: export the whole flow, "
                f"which knows both, or say so to to_library by event_dim=({datum}, {noise})"
            )
        if len(batch) == 1:
            return outputs, log_det
        return outputs.reshape(*batch, *outputs.shape[1:]), log_det.reshape(batch)


class ExportedInverse(_InverseTransform):
    """The other direction of an ``ExportedTransform``. A copy of it still knows what it inverts, unlike torch's own."""

    def __getstate__(self) -> dict:
        return dict(self.__dict__)


def rows(log_det: Tensor, inputs: Tensor, event_dim: int) -> Tensor:
    """A transform's log-determinants at ``inputs`` ``(batch, …)``, as ``(batch,)``.

    torch's have one entry for each of the inputs' dimensions left of ``event_dim``, or broadcast to that if constant;
    its ``StackTransform`` forgets to sum over the datum's.
    """
    return _sum_rows(log_det.expand(inputs.shape[: max(log_det.dim(), inputs.dim() - event_dim)]))


Limits = tuple[float | Tensor | None, float | Tensor | None]


def bounds(constraint: constraints.Constraint) -> Limits | None:
    """The lower and the upper bound of every number by itself; ``None`` for a constraint of no such kind."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    limits = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    return None if limits == (None, None) else limits


def within(limits: Limits | None, values: Tensor, scoring: bool, function: Callable) -> tuple[Tensor, Tensor]:
    """``function(values)``, outputs and log-determinants ``(batch,)``, of values that lie beyond no bound.

    Rows in which one does are ``nowhere``. Neither a bound itself nor NaN lies beyond.
    """
    if limits is None:
        return function(values)
    lower, upper = limits
    if upper is None:
        beyond, inside = values < lower, lower + 1.0
    elif lower is None:
        beyond, inside = values > upper, upper - 1.0
    else:
        beyond, inside = (values < lower) | (values > upper), (lower + upper) / 2
    outputs, log_det = function(torch.where(beyond, inside, values))
    return nowhere(beyond, outputs, log_det, scoring)


def nowhere(beyond: Tensor, outputs: Tensor, log_det: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    """Rows in which something is marked become data of density 0 (noise 0, log|det| −∞), or no datum (NaN)."""
    rows = beyond.reshape(len(beyond), -1).any(1)
    every = rows.view(-1, *[1] * (outputs.dim() - 1))
    if scoring:
        return outputs.masked_fill(every, 0.0), log_det.masked_fill(rows, -math.inf)
    return outputs.masked_fill(every, math.nan), log_det.masked_fill(rows, math.nan)


def one_width(widths: Iterable[Width], what: str) -> Width:
    """The one width among those of a flow's parts; a ValueError if two of them differ."""
    known = [width for width in dict.fromkeys(widths) if width is not ...]
    if len(known) > 1:
        raise ValueError(f"the parts of {what} do not agree about its width: {', '.join(map(str, known))}")
    return known[0] if known else ...


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


def _explain(transform: nn.Module, context: Tensor | None, error: RuntimeError) -> None:
    """Raise a ValueError instead if some part of the transform says that it takes another context."""
    widths = (getattr(module, "context_features", None) for module in transform.modules())
    width = next((width for width in widths if width is not None), None)
    if not isinstance(width, int):
        return
    if context is None:
        raise ValueError(
            f"this transform is conditional: give it a context of shape (*batch, {width}) by .condition(context)"
        ) from error
    if context.shape[-1] != width:
        raise ValueError(
            f"this transform takes a context of shape (*batch, {width}), not {tuple(context.shape)}"
        ) from error


def _sum_rows(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).sum(1)


def _broadcast(batch: torch.Size, context: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(batch, context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"a context of shape {tuple(context.shape)} does not broadcast with a batch of {tuple(batch)}"
        ) from None


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


def _fresh(owner, plan: dict[int, tuple], copies: dict):
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
