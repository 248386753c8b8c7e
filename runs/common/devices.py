"""Where a run computes: the device is chosen here, and whatever differs from one kind of device to another is here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

PRECISIONS = ("no", "bf16", "fp16")


def available_devices() -> list[str]:
    """Every device of this machine by the name that ``--device`` takes: ``cpu``, ``cuda:0``, ``mps``, …"""
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    for kind in ("cuda", "xpu", torch._C._get_privateuse1_backend_name()):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [f"{kind}:{i}" for i in range(module.device_count())]
    return found


def choose_device(name: str) -> torch.device | None:
    """The device of that name; ``None`` for ``auto``.

    Raises:
        ValueError: for a name that is no device's, or a device that this machine does not have: it lists those it has.
    """
    if name == "auto":
        return None
    found = available_devices()
    if name not in found and f"{name}:0" not in found:
        raise ValueError(f"no device {name!r} here; there are: auto, {', '.join(found)}")
    return torch.device(name)


def make_accelerator(device: str = "auto", precision: str = "no", **options) -> "Accelerator":
    """Device, precision and processes, as they were asked for, or else as accelerate finds them.

    On a machine without a GPU accelerate needs help: it would take each of torchrun's processes for the only one. Its
    own launcher starts a single process there, however many are asked for.

    Args:
        device: ``auto`` for the fastest that there is, or one of ``available_devices``, with or without its number.
        precision: ``no`` (float32), ``bf16`` or ``fp16``.
        options: of ``Accelerator``.

    Raises:
        ValueError: for a device that there is not, for one device number for several processes, or for a precision
            that the device does not compute in.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    chosen = choose_device(device)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and chosen is not None and chosen.index is not None:
        raise ValueError(
            f"--device {device} is one device for {os.environ['WORLD_SIZE']} processes: leave out the number"
        )
    if not several:
        if "MASTER_PORT" in os.environ:
            print("accelerate launch started only one process here; torchrun --nproc_per_node N starts several on CPUs")
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate would keep the first choice for ever
    no_gpu = available_devices() == ["cpu"]
    state = PartialState(cpu=several and (no_gpu or device == "cpu"))
    if chosen is not None and not several:
        state.device = chosen
        if chosen.index is not None and chosen.type in ("cuda", "xpu"):
            module_of(chosen).set_device(chosen)  # streams and graphs are made on the current device
    if precision == "fp16" and str(state.device) == "cpu":  # accelerate would train in float32 and not say so
        raise ValueError("precision fp16 can't be had on cpu; bf16 and no can")
    try:
        return Accelerator(mixed_precision=precision, **options)
    except ValueError as error:
        if precision == "no":
            raise
        raise ValueError(f"precision {precision} can't be had on {state.device} ({error}); precision no can") from error


def device_of(model: Any) -> torch.device:
    """Where a model computes: the device of a module's weights or buffers, or else its own attribute ``device``."""
    if isinstance(model, nn.Module):
        return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return model.device


def module_of(device: torch.device) -> Any:
    """PyTorch's functions for that kind of device, such as ``torch.cuda``."""
    return getattr(torch, device.type)


def can_fuse(device: torch.device) -> bool:
    """Whether PyTorch's Adam does its step in one pass there; on MPS it has since 2.5."""
    return device.type in _get_fused_kernels_supported_devices()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work that was queued for it. A CPU queues none."""
    if device.type != "cpu":
        module_of(device).synchronize()


def random_state(device: torch.device) -> Tensor | None:
    """The state of the device's own source of random numbers; ``None`` for a CPU, whose is ``torch.get_rng_state``."""
    return None if device.type == "cpu" else _of_one_device(module_of(device).get_rng_state, device)


def set_random_state(state: Tensor | None, device: torch.device) -> None:
    """Put the device's source of random numbers in that state, which ``random_state`` gave."""
    if state is not None and device.type != "cpu":
        _of_one_device(module_of(device).set_rng_state, device, state)


def _of_one_device(function, device: torch.device, *arguments):
    """MPS is a single device, and its functions take no number."""
    return function(*arguments) if device.type == "mps" else function(*arguments, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, random numbers begin at that seed, on the CPU and on the device; afterwards they go on as they were."""
    before, on_cpu = random_state(device), torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        set_random_state(before, device)


def peak_device_memory(device: torch.device) -> float | None:
    """The most memory of a GPU that this process has held so far, in MiB; ``None`` where there is no record of it."""
    if device.type not in ("cuda", "xpu"):
        return None
    return module_of(device).max_memory_allocated(device) / 2**20
