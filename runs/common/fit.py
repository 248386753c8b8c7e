"""One training loop for every run: optimiser, schedule, clipping, averaging, checkpoints, resume, devices, processes.

``fit`` takes a module whose call on a batch gives a loss, and a function that gives the batch of a step. It knows
nothing of flows, images or Pyro. What a training keeps from step to step stands in ``training_state``.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from runs.common.devices import can_fuse, make_accelerator
from runs.common.recipe import Recipe
from runs.common.step import backward, faster_step, set_rate, update
from runs.common.training_state import Fitted, TrainingState, set_aside

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

ASK_EVERY = 20  # steps; a device other than the CPU is asked for its losses once in so many: see ``fit``
SNAPSHOT_EVERY = 100  # steps; a loss that is not finite costs at most so many


def fit(
    loss: nn.Module,
    batch: Callable[[int], Any],
    recipe: Recipe,
    *,
    validate: Callable[[], float] | None = None,
    describe: Callable[[float], str] = "loss {:.4f}".format,
    observe: Callable[[int], None] | None = None,
    directory: Path | None = None,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    save_weights: Callable[[], Path] | None = None,
    accelerator: "Accelerator | None" = None,
    quiet: bool = False,
) -> Fitted:
    """Train the parameters of ``loss`` in place.

    With several processes each one computes the gradient of its own batches, and the optimiser gets the mean over the
    processes. All processes see the same losses and the same time, so that they end at the same step. Only the first
    one writes files.

    On a CPU each loss is read at once. Any other device computes while the program runs ahead, and reading a loss would
    make the program wait. So losses are read once in ``ASK_EVERY`` steps. A loss that is not finite may then be seen up
    to that many steps late. This costs the time of these steps and no more: the weights that the module ends with are
    from before that loss.

    The first Ctrl-C, or a scheduler's SIGTERM, ends the training after the current step. A second Ctrl-C ends it at
    once.

    Args:
        loss: ``loss(batch)`` is the scalar to minimise.
        batch: ``batch(i)`` is the i-th batch, i = 0, 1, …, which is moved to the device for you. It may depend on
            nothing but i and the random state: a resumed training then sees the same batches as an uninterrupted one.
        recipe: how to train.
        validate: the loss on held-out data; lower is better.
        describe: words for the progress bar, from a loss.
        observe: called before each step with the number of steps done, for pictures of the training.
        directory: where checkpoints go; ``None`` for none. One is written before the first step.
        resume: go on from the checkpoint in ``directory``.
        identity: what the training depends on beside the code, as plain numbers, strings and lists. The checkpoint
            keeps it, and a training with another identity is not resumed.
        save_weights: called when the loss stops being finite, once the module has its last good weights again. It
            writes them to a file, and returns the file's path.
        accelerator: device, precision and processes; by default one made from the recipe.
        quiet: show no progress bar, for one of many short trainings.

    Raises:
        NotFinite: when the loss stops being finite, naming the step.
        FileNotFoundError, ValueError: when there is nothing to resume, or what there is belongs to another training.
        ValueError: when a step fails in mixed precision.
    """
    accelerator = accelerator or make_accelerator(precision=recipe.precision)
    device = accelerator.device
    module = accelerator.prepare(loss)
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    adamw = {"betas": recipe.betas, "weight_decay": recipe.weight_decay, "fused": can_fuse(device)}
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, recipe.lr, **adamw))
    if not accelerator.is_main_process:
        save_weights = None
    where = directory if accelerator.is_main_process else None
    training = TrainingState(loss, parameters, optimizer, recipe, where, identity, save_weights)
    if resume:
        if directory is None:
            raise ValueError("resume needs the directory in which the training began")
        training.load(directory)
    if not accelerator.is_main_process:  # random numbers within the module (dropout) differ between processes
        torch.manual_seed(torch.initial_seed() + 1_000_003 * accelerator.process_index + training.fitted.steps)
    bar = _progress_bar(recipe, training.fitted.steps, shown=accelerator.is_main_process and not quiet)

    def write(text: str) -> None:
        if accelerator.is_main_process and not quiet:
            bar.write(text)

    if not resume and training.directory is not None:
        if message := set_aside(training.directory):
            write(message)
        training.save()

    def note(text: str) -> None:
        training.fitted.notes.append(text)
        write(text)

    if recipe.compile:
        write("compiling the training step, which takes a minute or so; Ctrl-C waits until it is done")

    def batches(step: int) -> list[Any]:
        return [_to(batch(step * recipe.accumulate + i), device) for i in range(recipe.accumulate)]

    interrupt = Interrupt()

    def plain_step(batches: Sequence[Any]) -> Tensor:
        loss = backward(module, optimizer, batches, accelerator)
        interrupt.hold()
        update(parameters, optimizer, recipe.clip, accelerator)
        return loss

    ask_every = 1 if device.type == "cpu" else ASK_EVERY
    alone = accelerator.num_processes == 1
    pending: list[Tensor] = []  # losses that have not been read yet
    window: list[float] = []  # losses since the last ones shown
    try:
        with (
            interrupt,
            faster_step(plain_step, loss, module, optimizer, lambda: batches(0)[0], accelerator, interrupt.hold, note)
            if recipe.compile
            else nullcontext(plain_step) as take_step,
        ):
            bar.unpause()  # the compiler's time is not the training's
            started = saved = shown = time.monotonic() - training.fitted.seconds
            while not training.done():
                step = training.fitted.steps
                if observe is not None:
                    observe(step)
                if step % SNAPSHOT_EVERY == 0:
                    training.take_snapshot()
                set_rate(optimizer, recipe.rate(training.progress()))
                with _explained_in_mixed_precision(recipe.precision, step + 1):
                    pending.append(take_step(batches(step)))
                training.average_weights()
                training.fitted.steps += 1
                interrupt.release()
                if alone:
                    training.fitted.seconds = time.monotonic() - started
                due = validate is not None and training.fitted.steps % recipe.validate_every == 0
                bar.total = round(training.fitted.steps / training.progress())
                bar.update()
                if not (len(pending) == ask_every or due or training.done() or (alone and interrupt.asked)):
                    continue
                elapsed = time.monotonic() - started
                values, elapsed, stop = _agree(accelerator, torch.stack(pending), elapsed, interrupt.asked)
                pending = []
                training.trust(values)
                training.fitted.seconds = elapsed
                window += values
                if elapsed + started - shown > 0.5 or training.done():
                    mean = sum(window) / len(window)
                    bar.set_postfix_str(describe(mean), refresh=False)
                    training.fitted.losses.append((training.fitted.steps, mean))
                    rate = recipe.rate(training.progress())
                    accelerator.log({"training": mean, "lr": rate}, training.fitted.steps)
                    shown, window = elapsed + started, []
                if validate is not None and (due or training.done()):
                    with torch.compiler.set_stance("force_eager") if recipe.compile else nullcontext():
                        value = training.validate(validate)  # not compiled, which would take long for its batches
                    accelerator.log({"validation": value}, training.fitted.steps)
                    write(f"step {training.fitted.steps}: validation {describe(value)}")
                if time.monotonic() - saved > recipe.save_every:
                    training.save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
            if interrupt.asked:  # in the last step, or in the validation after it
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        training.fitted.interrupted = True
        training.fitted.losses += [(training.fitted.steps, sum(window) / len(window))] if window else []
        write(f"interrupted at step {training.fitted.steps}: ending with what is trained so far")
    finally:
        bar.close()
    if pending:
        training.trust(torch.stack(pending).tolist())
    training.save(finished=not training.fitted.interrupted)
    validated = [step for step, _ in training.fitted.validation[-1:]] == [training.fitted.steps]
    if training.fitted.interrupted and validate is not None and not validated:
        training.validate(validate)  # only now: a resumed training must not see it
    training.finish()
    return training.fitted


def _progress_bar(recipe: Recipe, done: int, shown: bool) -> tqdm:
    return tqdm(
        total=recipe.steps,
        initial=done,
        disable=not shown,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
        smoothing=0.05,
        dynamic_ncols=True,
    )


@contextmanager
def _explained_in_mixed_precision(precision: str, step: int) -> Iterator[None]:
    """Say of a step that fails in mixed precision that this may be why: not every library computes in it."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        if precision == "no":
            raise
        raise ValueError(
            f"step {step} fails in {precision}, which not every flow stands "
            f"({str(error) or type(error).__name__}); precision no trains it in float32"
        ) from error


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM instead of acting, so that no step is cut in two; a second Ctrl-C raises.

    Between ``hold`` and ``release`` a second Ctrl-C has to wait, too. There the weights have changed already, but
    their step has not been counted yet.
    """

    def __enter__(self) -> "Interrupt":
        self.asked = self.held = self.late = False
        self.in_charge = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        if self.in_charge:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        if self.in_charge:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT:  # a launcher passes Ctrl-C on as a SIGTERM: that is no second one
            self.late = True
            if not self.held:
                raise KeyboardInterrupt
        self.asked = True

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        if self.late:
            raise KeyboardInterrupt


def _agree(accelerator: "Accelerator", losses: Tensor, seconds: float, stop: bool) -> tuple[list[float], float, bool]:
    """The losses as numbers, the time, and whether any process was asked to stop.

    Here the program waits for the device. With several processes the losses and the time are means over them, so that
    all processes decide alike.
    """
    if accelerator.num_processes == 1:
        return losses.tolist(), seconds, stop
    own = torch.cat((losses, losses.new_tensor([seconds, stop])))
    mean = accelerator.reduce(own, "mean")
    assert isinstance(mean, Tensor)  # as what went in
    *values, seconds, stop = mean.tolist()
    return values, seconds, stop > 0


def _to(batch: Any, device: torch.device) -> Any:
    """The batch on the device. The copy runs in the background on CUDA only.

    Other devices may read the CPU's memory late, when it holds something else already.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    return tuple(None if part is None else _to(part, device) for part in batch)
