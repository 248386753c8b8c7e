"""A device that isn't the CPU, for machines that have none: it computes on the CPU and is as strict as Apple's MPS.

``torch.device("pretend")`` is a device of PyTorch's own, registered through the place that it keeps for foreign
hardware. A tensor on it wraps a CPU tensor, and each operation runs on what is wrapped. What works here by accident
on a CPU, and fails on somebody's GPU or Mac, fails on it with the same words:

- an operation of its tensors and a CPU tensor (a CPU scalar, of no dimensions, may take part, as on every device);
- a CPU generator for its random numbers;
- float64, of which MPS has none;
- ``.numpy()`` and whatever else reads its memory.

``waits`` counts how often the program has asked for a value, which on real hardware waits until all that is queued is
done. ``Graph`` stands in for ``torch.cuda.CUDAGraph``: it records operations, and replays them on the same tensors.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # torch 2.10 or later
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)  # between devices, which is their purpose
# What a fallback for all does not serve: torch.tensor's copy, and what PyTorch makes by resizing an empty tensor.
BY_NAME = (
    aten.copy_.default, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m,
)  # fmt: skip
ASKS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
waits: Counter = Counter()
replays: list["Graph"] = []
present = False  # only the tests of devices have one: what looks for the fastest device must not find it elsewhere
_generators: WeakValueDictionary = WeakValueDictionary()  # by the address of what PyTorch hands on
missing: set = set()  # operations that this device has not, as Apple's MPS lacks some
_waits_forbidden = False
_recording: "Graph | None" = None
_registered: list[torch.library.Library] = []  # what is registered lasts as long as these


class OnPretend(Tensor):
    """A tensor on the pretend device. ``inner`` is the CPU tensor that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnPretend":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype as the {NAME} framework has none")
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_) -> str:
        return f"{self.inner!r} on {self.device}"

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, *args, **(kwargs or {}))


def forbid_waits(forbidden: bool) -> None:
    """As ``torch.cuda.set_sync_debug_mode("error")`` does."""
    global _waits_forbidden
    _waits_forbidden = forbidden


class Graph:
    """A stand-in for ``torch.cuda.CUDAGraph``: operations recorded without effect, replayed on the same tensors."""

    def __init__(self):
        self.operations: list = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, inputs: Any) -> None:
        """Note what the tensors hold before the recording touches them."""
        for leaf in tree_flatten(inputs)[0]:
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within, operations are noted; afterwards all is as if they had not run, as on a GPU."""
        global _recording
        random = torch.get_rng_state()
        _recording = self
        try:
            yield
        finally:
            _recording = None
            torch.set_rng_state(random)
            for storage, value in self.before.values():
                storage.copy_(value)

    def replay(self) -> None:
        replays.append(self)
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


Generator = torch.Generator


class _AnyGenerator(type(Generator)):
    """In ``torch.Generator``'s place the class must know every generator for one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Generator)


class OnPretendGenerator(Generator, metaclass=_AnyGenerator):
    """In ``torch.Generator``'s place: a source of random numbers on the pretend device, if it is made for that one."""

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def __new__(cls, device: Any = "cpu"):
        pretend = torch.device(device).type == NAME
        made = super().__new__(cls if pretend else Generator, "cpu" if pretend else device)
        if pretend:
            _generators[made._cdata] = made
        return made

    def __init__(self, device: Any = "cpu"):
        pass


@torch.compiler.disable
def _run(function, *args, **kwargs) -> Any:
    """One operation: check that all is on one device, run it on the CPU, and wrap what it gives."""
    target = kwargs.get("device")
    moves = function in MOVES or (
        target is not None and not any(isinstance(a, OnPretend) for a in tree_flatten(args)[0])
    )
    leaves = tree_flatten((args, kwargs))[0]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, OnPretend) and leaf.dim() > 0 and not moves:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"{leaf.device}! (when calling {function})"
            )
        if isinstance(leaf, Generator) and leaf._cdata not in _generators:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{leaf.device.type}'")
    to_cpu = function is aten._to_copy.default and target is not None and torch.device(target).type == "cpu"
    to_cpu |= function is aten.copy_.default and not isinstance(args[0], OnPretend)
    if function in ASKS or to_cpu:
        waits[str(function)] += 1
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
    if _waits_forbidden and (function in ASKS or to_cpu):
        raise RuntimeError(f"called a synchronizing operation ({function})")
    if function in missing:
        raise NotImplementedError(f"The operator {function} is not currently implemented for the {NAME} device")
    if _recording is not None:
        if function in ASKS or to_cpu:
            raise RuntimeError(f"operation not permitted when stream is capturing ({function})")
        _recording.keep((inner_args, inner_kwargs))
    result = function(*inner_args, **inner_kwargs)
    if to_cpu:
        return args[0] if function is aten.copy_.default else result
    known = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, OnPretend)}
    wrapped = tree_map(lambda leaf: _wrap(leaf, known), result)
    if _recording is not None:
        _recording.operations.append((function, inner_args, inner_kwargs, result))
    return wrapped


def _unwrap(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnPretend) else leaf


def _wrap(leaf: Any, known: dict[int, OnPretend]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else OnPretend(leaf)


class Module(backend_registration._DummyBackendModule if AVAILABLE else object):
    """What ``torch.get_device_module`` gives: the CPU's source of random numbers serves the pretend device, too."""

    def is_available(self) -> bool:
        return present

    def device_count(self) -> int:
        return int(present)

    def synchronize(self, device: Any = None) -> None:
        waits["synchronize"] += 1

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def register() -> None:
    """Make the device known to PyTorch, once for the process."""
    if hasattr(torch, NAME):
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    everything, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    for operation in BY_NAME:
        named.impl(operation, partial(_run, operation), "PrivateUse1")
    _registered.extend((everything, named))
