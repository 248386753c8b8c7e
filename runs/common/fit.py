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
MOST = 400  # numbers that a curve of losses has


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
    clock: Callable[[], float] = time.monotonic,
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
        clock: what tells the seconds of the recipe. With ``time.process_time`` a training on a single thread of a CPU
            is given as much computing as on an idle machine, however busy the machine is.

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
    where, save_weights = (directory, save_weights) if accelerator.is_main_process else (None, None)
    training = TrainingState(loss, parameters, optimizer, recipe, where, identity, save_weights)
    if resume:
        if directory is None:
            raise ValueError("resume needs the directory in which the training began")
        training.load(directory)
    if not accelerator.is_main_process:  # random numbers within the module (dropout) differ between processes
        torch.manual_seed(torch.initial_seed() + 1_000_003 * accelerator.process_index + training.fitted.steps)
    report = Report(training, recipe, describe, accelerator, quiet)
    if not resume and training.directory is not None:
        if message := set_aside(training.directory):
            report.write(message)
        training.save()
    if recipe.compile:
        report.write("compiling the training step, which takes a minute or so; Ctrl-C waits until it is done")

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
    try:
        with (
            interrupt,
            faster_step(
                plain_step, loss, module, optimizer, lambda: batches(0)[0], accelerator, interrupt.hold, report.note
            )
            if recipe.compile
            else nullcontext(plain_step) as take_step,
        ):
            report.bar.unpause()  # the compiler's time is not the training's
            started = saved = clock() - training.fitted.seconds
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
                    training.fitted.seconds = clock() - started
                due = validate is not None and training.fitted.steps % recipe.validate_every == 0
                report.step_done()
                if not (len(pending) == ask_every or due or training.done() or (alone and interrupt.asked)):
                    continue
                elapsed = clock() - started
                values, elapsed, stop = _agree(accelerator, torch.stack(pending), elapsed, interrupt.asked)
                pending = []
                training.trust(values)
                training.fitted.seconds = elapsed
                report.losses(values)
                if validate is not None and (due or training.done()):
                    with torch.compiler.set_stance("force_eager") if recipe.compile else nullcontext():
                        value = training.validate(validate)  # not compiled, which would take long for its batches
                    report.validation(value)
                if clock() - saved > recipe.save_every:
                    training.save()
                    saved = clock()
                if stop:
                    raise KeyboardInterrupt
            if interrupt.asked:  # in the last step, or in the validation after it
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        training.fitted.interrupted = True
        report.interrupted()
    finally:
        report.bar.close()
        accelerator.free_memory()  # which would keep this model and its optimiser for as long as it lives
    if pending:
        training.trust(torch.stack(pending).tolist())
    training.save(finished=not training.fitted.interrupted)
    validated = [step for step, _ in training.fitted.validation[-1:]] == [training.fitted.steps]
    if training.fitted.interrupted and validate is not None and not validated:
        training.validate(validate)  # only now: a resumed training must not see it
    training.finish()
    return training.fitted


class Report:
    """What a training shows while it runs, and the losses that its ``Fitted`` keeps.

    About twice in a second it shows and keeps one number, the mean of all losses since the last such number. Of a
    training it keeps ``MOST`` at most: where the machine stalls, each step takes so long, and its loss alone is noise.
    """

    def __init__(
        self,
        training: TrainingState,
        recipe: Recipe,
        describe: Callable[[float], str],
        accelerator: "Accelerator",
        quiet: bool,
    ):
        self.training, self.recipe, self.describe, self.accelerator = training, recipe, describe, accelerator
        self.visible = accelerator.is_main_process and not quiet
        self.window: list[float] = []  # the losses since the last number
        self.shown_at = 0.0  # the seconds of training at that number
        self.bar = tqdm(
            total=recipe.steps,
            initial=training.fitted.steps,
            disable=not self.visible,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
            smoothing=0.05,
            dynamic_ncols=True,
        )

    def write(self, text: str) -> None:
        if self.visible:
            self.bar.write(text)

    def note(self, text: str) -> None:
        """Write what could not be had, and keep it in the results."""
        self.training.fitted.notes.append(text)
        self.write(text)

    def step_done(self) -> None:
        self.bar.total = round(self.training.fitted.steps / self.training.progress())
        self.bar.update()

    def losses(self, values: list[float]) -> None:
        """Take the losses of the last steps, and show their mean if it is time to."""
        self.window += values
        fitted = self.training.fitted
        due = fitted.seconds - self.shown_at > 0.5 and len(self.window) >= self.bar.total / MOST
        if due or self.training.done():
            mean = self._mean_of_window()
            self.bar.set_postfix_str(self.describe(mean), refresh=False)
            rate = self.recipe.rate(self.training.progress())
            self.accelerator.log({"training": mean, "lr": rate}, fitted.steps)

    def validation(self, value: float) -> None:
        steps = self.training.fitted.steps
        self.accelerator.log({"validation": value}, steps)
        self.write(f"step {steps}: validation {self.describe(value)}")

    def interrupted(self) -> None:
        if self.window:
            self._mean_of_window()
        self.write(
            f"interrupted at step {self.training.fitted.steps}: ending with what is trained; --resume goes on from here"
        )

    def _mean_of_window(self) -> float:
        mean = sum(self.window) / len(self.window)
        self.training.fitted.losses.append((self.training.fitted.steps, mean))
        self.window, self.shown_at = [], self.training.fitted.seconds
        return mean


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
