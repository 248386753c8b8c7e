"""One training step, and what makes it cheaper: ``torch.compile`` and, on CUDA, one graph of the whole step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from runs.common.devices import random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

# How a step is compiled. In each call a compiled function checks whether anything has changed that the compiler took
# for granted. It need not check torch's own modules in a flow, since a training changes only their weights: this saves
# 1 % of a step.
COMPILE: dict[str, Any] = {
    "dynamic": False,
    "options": {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe},
}
WARMUP = 3  # steps before one is recorded, in which CUDA's libraries choose algorithms and allocate their memory


def backward(module: nn.Module, optimizer: Any, batches: Sequence[Any], accelerator: "Accelerator") -> Tensor:
    """Compute the mean gradient over the batches, and return the mean of their losses, a tensor on the device.

    Nothing here waits for the device.
    """
    optimizer.zero_grad()
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with accelerator.no_sync(module) if i < len(batches) - 1 else nullcontext():
            loss = module(batch)
            accelerator.backward(loss / len(batches))
        total += loss.detach() / len(batches)
    return total


def update(parameters: Sequence[Tensor], optimizer: Any, clip: float | None, accelerator: "Accelerator") -> None:
    """Clip the gradient, and let the optimiser change the parameters."""
    if clip is not None:
        accelerator.clip_grad_norm_(parameters, clip)
    optimizer.step()


def set_rate(optimizer, rate: float) -> None:
    """Set the learning rate. If it is a tensor, a recorded graph reads it, so its value is changed in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Recorded(NamedTuple):
    """A recorded step, with the tensors that it reads its batches from and the tensor that it writes its loss to."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Tensor


class GraphedStep:
    """A step that is recorded once, as a CUDA graph, and replayed: the GPU is handed one launch instead of hundreds.

    The first calls run the step as it is. The last of these also checks that the step never waits for the GPU, which
    a graph can't do. The next call records the step. From then on a call copies its batches to the memory that the
    recorded step reads, and replays it. A step that can't be recorded goes on running as it is.

    Args:
        step: a function of batches (tensors, ``None``, and tuples and lists of them) that gives a tensor. It must not
            read a tensor's value into Python. Whatever else it uses must stay at its place in memory: the weights, the
            optimiser's state and the learning rate.
        forget: called before the recording: see ``before_recording``.
        hold: called before each replay, in which the weights change.
        note: called with one line that says why the step can't be recorded.
        device: the CUDA device that the step runs on.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Any]], Tensor],
        forget: Callable[[], None],
        hold: Callable[[], None],
        note: Callable[[str], None],
        device: torch.device,
    ):
        self.step, self.forget, self.hold, self.note, self.device = step, forget, hold, note, device
        self.calls, self.waits = 0, False
        self.recorded: Recorded | None = None

    def _tried(self, batches: Sequence[Any]) -> Tensor:
        """Run the step as it is, while CUDA raises an error if anything in it waits for the GPU.

        Such a step is not recorded, since not all versions of PyTorch recover from a recording that fails. It is run
        once more from its beginning, because the error has cut it short.
        """
        mode, random = torch.cuda.get_sync_debug_mode(), (torch.get_rng_state(), random_state(self.device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._beside_the_default_stream(batches)
        except RuntimeError as error:
            self.waits = True
            self.note(f"the step runs without a CUDA graph: {_reason(error)}")
            torch.set_rng_state(random[0])
            set_random_state(random[1], self.device)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return self.step(batches)

    def __call__(self, batches: Sequence[Any]) -> Tensor:
        self.calls += 1
        if self.calls < WARMUP:
            return self._beside_the_default_stream(batches)
        if self.calls == WARMUP:
            return self._tried(batches)
        if self.calls == WARMUP + 1 and not self.waits:
            self._record(batches)
        values = tree_flatten(batches)[0]
        if self.recorded is None or list(map(_shape, values)) != list(map(_shape, self.recorded.inputs)):
            return self.step(batches)
        for static, value in zip(self.recorded.inputs, values, strict=True):
            if static is not None:
                static.copy_(value)
        self.hold()
        self.recorded.graph.replay()
        return self.recorded.output.clone()

    def _beside_the_default_stream(self, batches: Sequence[Any]) -> Tensor:
        """Run the step as it is on another stream, which CUDA requires before a recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            output = self.step(batches)
        torch.cuda.current_stream().wait_stream(side)
        return output

    def _record(self, batches: Sequence[Any]) -> None:
        leaves, shape = tree_flatten(batches)
        inputs = [None if leaf is None else leaf.clone() for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        self.forget()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # back to it, come what may
                output = self.step(tree_unflatten(inputs, shape))
        except Exception as error:  # any operation that can't be recorded, of any library
            self.note(f"the step runs without a CUDA graph: {_reason(error.__context__ or error)}")
            self.forget()
        else:
            self.recorded = Recorded(graph, inputs, output)


def can_be_graphed(accelerator: "Accelerator") -> bool:
    """Whether a step can be a CUDA graph: on CUDA, by one process, and not in fp16, which reads its loss scale."""
    return (
        accelerator.device.type == "cuda" and accelerator.num_processes == 1 and accelerator.mixed_precision != "fp16"
    )


def before_recording(optimizer: Any) -> None:
    """Drop the gradients, as a graph allocates its own, and tell the optimiser that its step will be recorded."""
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["capturable"] = True


@contextmanager
def faster_step(
    step: Callable[[Sequence[Any]], Tensor],
    loss: nn.Module,
    module: nn.Module,
    optimizer: Any,
    batch: Callable[[], Any],
    accelerator: "Accelerator",
    hold: Callable[[], None],
    note: Callable[[str], None],
) -> Iterator[Callable[[Sequence[Any]], Tensor]]:
    """Within, ``step`` as fast as this device allows: compiled and, by one process on CUDA, as one graph.

    Args:
        step: zero_grad, forward, backward and update, on a list of batches.
        loss: the objective.
        module: the objective as accelerate has prepared it.
        optimizer: the step's own.
        batch: makes a batch on the device, with which the compiler works.
        accelerator: for device, precision and processes.
        hold: called before a graph changes the weights.
        note: called with one line for each of these two that can't be had, which says why.
    """
    device = accelerator.device
    with compiled(loss, lambda: accelerator.backward(module(batch())), device) as failed:
        if failed is not None:
            note(f"the step is not compiled: {failed}")
        if can_be_graphed(accelerator):
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
            step = GraphedStep(step, lambda: before_recording(optimizer), hold, note, device)
        yield step


@contextmanager
def compiled(loss: nn.Module, try_it: Callable[[], object], device: torch.device) -> Iterator[str | None]:
    """Within, the objective runs under ``torch.compile``. The value is ``None``, or the reason why it does not.

    The compiler works at once, in a trial run. The trial leaves gradients, buffers and the state of the random numbers
    as they were. An objective that can't be compiled runs as it is.

    Args:
        loss: the objective. It is compiled in place, so that the names in its ``state_dict`` stay. If it has an
            attribute ``compiled_parts``, a list of modules, only these are compiled.
        try_it: runs the objective forward and backward once.
        device: where it runs.
    """
    parts = getattr(loss, "compiled_parts", [loss])
    buffers = [tensor.clone() for tensor in loss.buffers()]
    random, on_device = torch.get_rng_state(), random_state(device)
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._dynamo.reset()  # otherwise the process's next objective would count as a variant of this one
                for part in parts:
                    part.compile(**COMPILE)
                try_it()
            failed = None
        except Exception as error:  # compilers fail in many ways, and the training can do without one
            for part in parts:
                part._compiled_call_impl = None
            failed = _reason(error)
        finally:  # after a Ctrl-C, too
            with torch.no_grad():
                for tensor, value in zip(loss.buffers(), buffers, strict=True):
                    tensor.copy_(value)
            loss.zero_grad()
            torch.set_rng_state(random)
            set_random_state(on_device, device)
        yield failed
    finally:
        for part in parts:
            part._compiled_call_impl = None


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _reason(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first.strip()}"
