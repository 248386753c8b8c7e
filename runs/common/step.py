"""One training step, and what makes it cheaper: ``torch.compile`` and, on CUDA, one graph of the whole step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from runs.common.devices import random_state, set_random_state

# How a step is compiled. At each call the compiler asks whether anything has changed that it took for granted. It need
# not ask so of torch's own modules inside a flow, of which a training changes the weights alone: that is 1 % of a step.
COMPILE: dict[str, Any] = {
    "dynamic": False,
    "options": {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe},
}
WARMUP = 3  # steps before one is recorded: in them the libraries choose their algorithms and allocate what lasts


def backward(module: nn.Module, optimizer: Any, batches: Sequence[Any], accelerator: Accelerator) -> Tensor:
    """Leave the mean gradient over the batches; the mean of their losses, on the device: nothing here waits for it."""
    optimizer.zero_grad()
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with accelerator.no_sync(module) if i < len(batches) - 1 else nullcontext():
            loss = module(batch)
            accelerator.backward(loss / len(batches))
        total += loss.detach() / len(batches)
    return total


def update(parameters: Sequence[Tensor], optimizer: Any, clip: float | None, accelerator: Accelerator) -> None:
    """Clip the gradient, and follow it."""
    if clip is not None:
        accelerator.clip_grad_norm_(parameters, clip)
    optimizer.step()


def set_rate(optimizer, rate: float) -> None:
    """Set the learning rate; where it is a tensor, a graph reads it from there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Recorded(NamedTuple):
    """A recorded step, the tensors that it reads its batches from, and the one that it leaves its loss in."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Tensor


class GraphedStep:
    """A step that is recorded once, as a CUDA graph, and replayed: the GPU is handed one launch instead of hundreds.

    The first calls run the step as it is, the last of them held to wait for nothing; then one records it. From then on
    a call copies its tensors to where the recorded step reads them. A step that can't be recorded goes on as it is.

    Args:
        step: a function of batches (tensors, ``None``, and tuples and lists of them) that gives a tensor. It reads no
            value of a tensor, and what else it needs stays in its place: weights, the optimiser's state, the rate.
        forget: is called before the recording: see ``before_recording``.
        hold: is called before each replay, in which the weights change.
        say: is told, in one line, why the step can't be recorded.
        device: the CUDA device that the step runs on.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Any]], Tensor],
        forget: Callable[[], None],
        hold: Callable[[], None],
        say: Callable[[str], None],
        device: torch.device,
    ):
        self.step, self.forget, self.hold, self.say, self.device = step, forget, hold, say, device
        self.calls, self.waits = 0, False
        self.recorded: Recorded | None = None

    def _tried(self, batches: Sequence[Any]) -> Tensor:
        """The step as it is, in which CUDA raises if anything waits: a recording that fails can't be undone on all
        versions of PyTorch, so it is not begun. A step cut short so is done again."""
        mode, random = torch.cuda.get_sync_debug_mode(), (torch.get_rng_state(), random_state(self.device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._beside_the_default_stream(batches)
        except RuntimeError as error:
            self.waits = True
            self.say(f"the step runs without a CUDA graph: {_reason(error)}")
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
        """The step as it is, on another stream, as CUDA wants it before a recording."""
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
            self.say(f"the step runs without a CUDA graph: {_reason(error.__context__ or error)}")
            self.forget()
        else:
            self.recorded = Recorded(graph, inputs, output)


def can_be_graphed(accelerator: Accelerator) -> bool:
    """On CUDA, by one process, and not in fp16, whose loss scale is read in every step."""
    return (
        accelerator.device.type == "cuda" and accelerator.num_processes == 1 and accelerator.mixed_precision != "fp16"
    )


def before_recording(optimizer: Any) -> None:
    """Drop the gradients, which a graph keeps in memory of its own, and let it hold the optimiser's step."""
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
    accelerator: Accelerator,
    hold: Callable[[], None],
    say: Callable[[str], None],
) -> Iterator[Callable[[Sequence[Any]], Tensor]]:
    """Within, ``step`` as fast as this device allows: compiled and, by one process on CUDA, as one graph.

    Args:
        step: zero_grad, forward, backward and update, on a list of batches.
        loss: the objective, and ``module``, the same as accelerate has prepared it.
        optimizer: the step's own.
        batch: makes any batch, on the device, for the compiler to try.
        accelerator: for device, precision and processes.
        hold: is called before the weights change by a graph.
        say: is told, in one line each, what can't be had.
    """
    device = accelerator.device
    with compiled(loss, lambda: accelerator.backward(module(batch())), device) as failed:
        if failed is not None:
            say(f"the step is not compiled: {failed}")
        if can_be_graphed(accelerator):
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
            step = GraphedStep(step, lambda: before_recording(optimizer), hold, say, device)
        yield step


@contextmanager
def compiled(loss: nn.Module, try_it: Callable[[], object], device: torch.device) -> Iterator[str | None]:
    """Within, the objective runs under ``torch.compile``; the value is ``None``, or the reason why it does not.

    The compiler works at once, in a try that leaves no trace: neither in gradients and buffers nor in the random
    numbers to come. What can't be compiled runs as it is.

    Args:
        loss: the objective. It is compiled in place, so that its names and its ``state_dict`` stay. If it has
            ``compiled_parts``, a list of modules, only these are.
        try_it: runs the objective forward and backward, once.
        device: where it runs.
    """
    parts = getattr(loss, "compiled_parts", [loss])
    buffers = [tensor.clone() for tensor in loss.buffers()]
    random, on_device = torch.get_rng_state(), random_state(device)
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._dynamo.reset()  # else the objectives of one process after another would count as variants of one
                for part in parts:
                    part.compile(**COMPILE)
                try_it()
            failed = None
        except Exception as error:  # whatever a compiler says: there are many, and the training can do without
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
    first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first.strip()}"
