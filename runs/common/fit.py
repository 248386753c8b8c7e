"""One training loop for every run: optimiser, schedule, clipping, averaging, checkpoints, resume, devices, processes.

``fit`` takes a module whose call on a batch gives a loss, and a function that gives the batch of a step. It knows
nothing of flows, images or Pyro.
"""

import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from adapters.checkpoint import write_atomically
from adapters.checks import check_positive
from runs.common.devices import PRECISIONS, can_fuse, make_accelerator, random_state, set_random_state
from runs.common.step import backward, faster_step, set_rate, update

STATE = "training.pt"
FORMAT = 1  # of that file
ASK_EVERY = 20  # steps; a device other than the CPU is asked for its losses once in so many: see ``fit``
SNAPSHOT_EVERY = 100  # steps; a loss that is not finite costs at most so many
AVERAGE_EVERY = 10  # steps; the moving average of the weights is moved once in so many, with the decay to that power


class NotFinite(RuntimeError):
    """The loss became NaN or infinite. The module then holds the last weights that gave a finite loss."""


@dataclass
class Fitted:
    """What came of a training.

    Attributes:
        losses: pairs (step, mean training loss since the last pair).
        validation: pairs (step, validation loss), with the averaged weights if there are any.
        steps: steps done, earlier parts of a resumed training included.
        seconds: time spent training, likewise, without start-up.
        interrupted: whether Ctrl-C ended it early.
        notes: what could not be had, e.g. why the step was not compiled.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup: share of the training over which the rate rises from 0 to its peak.
        decay: share of the training, at its end, over which the rate falls to 0 by half a cosine; all that is left
            after the warm-up by default.
        clip: the gradient's largest norm; ``None`` for no clipping.
        average: decay of the exponential moving average of the weights, which is what a training ends with; ``None``
            to end with the last weights.
        accumulate: batches whose gradients are added up to one step.
        precision: ``no`` (float32), ``bf16`` or ``fp16``: accelerate's mixed precision.
        validate_every: steps between validations; the weights of the best one are what a training ends with.
        patience: validations without an improvement that end a training early; ``None`` for no early end.
        seconds: end after so much training time even if steps are left, the schedule shortened to match.
        save_every: seconds between checkpoints.
        compile: run the step under ``torch.compile`` and, on CUDA, as one graph; the compiler's time is not counted.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.02
    decay: float = 1.0
    clip: float | None = 5.0
    average: float | None = None
    accumulate: int = 1
    precision: str = "no"
    validate_every: int = 1000
    patience: int | None = None
    seconds: float | None = None
    save_every: float = 60.0
    compile: bool = False

    def __post_init__(self):
        check_positive(steps=self.steps, lr=self.lr, accumulate=self.accumulate, validate_every=self.validate_every)
        check_positive(save_every=self.save_every)
        optional = {"clip": self.clip, "patience": self.patience, "seconds": self.seconds}
        check_positive(**{name: value for name, value in optional.items() if value is not None})
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, and finite, but is {self.weight_decay}")
        for name, share in (("warmup", self.warmup), ("decay", self.decay)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {share}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must lie between 0 and 1, not {self.average}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")

    def rate(self, progress: float) -> float:
        """The learning rate when the share ``progress`` of the training is done."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        held = max(self.warmup, 1 - self.decay)
        if progress <= held:
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - held) / (1 - held)))


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
    accelerator: Accelerator | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train the parameters of ``loss`` in place.

    With several processes each one computes the gradient of its own batches, the mean over processes is followed, and
    all processes see the same losses and the same time: they end at the same step. Only the first one writes.

    A CPU says each step's loss at once. Any other device works behind the program, which would have to wait for it, so
    it is asked once in ``ASK_EVERY`` steps. A loss that is not finite is then seen up to so many steps later. This
    costs the time of these steps and no more: the weights that the module ends with are from before that loss.

    The first Ctrl-C, or a scheduler's SIGTERM, ends the training after the step at hand; a second Ctrl-C, at once.

    Args:
        loss: ``loss(batch)`` is the scalar to minimise.
        batch: ``batch(i)`` is the i-th batch (i = 0, 1, …): one function of i and the random state, so that a resumed
            training sees the batches that an uninterrupted one would have seen. It is moved to the device for you.
        recipe: how to train.
        validate: the loss on held-out data; lower is better.
        describe: words for the progress bar, from a loss.
        observe: called before each step with the number of steps done, for pictures of the training.
        directory: where checkpoints go; ``None`` for none. One is written before the first step.
        resume: go on from the checkpoint in ``directory``.
        identity: what the training depends on beside the code (plain numbers, strings, lists); it is kept in the
            checkpoint, and a training of another identity is not resumed.
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
    how = {"betas": recipe.betas, "weight_decay": recipe.weight_decay, "fused": can_fuse(device)}
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, recipe.lr, **how))
    training = _Training(loss, parameters, optimizer, recipe, directory if accelerator.is_main_process else None)
    training.identity = identity
    if resume:
        training.load(directory)
    if not accelerator.is_main_process:  # what is random within the module (dropout) differs between processes
        torch.manual_seed(torch.initial_seed() + 1_000_003 * accelerator.process_index + training.fitted.steps)
    bar = tqdm(
        total=recipe.steps,
        initial=training.fitted.steps,
        disable=quiet or not accelerator.is_main_process,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
        smoothing=0.05,
        dynamic_ncols=True,
    )

    def say(text: str) -> None:
        if accelerator.is_main_process and not quiet:
            bar.write(text)

    if not resume and training.directory is not None:
        if said := set_aside(training.directory):
            say(said)
        training.save()

    def note(text: str) -> None:
        training.fitted.notes.append(text)
        say(text)

    if recipe.compile:
        say("compiling the training step, which takes a minute or so; Ctrl-C waits until it is done")

    def batches(step: int) -> list[Any]:
        return [_to(batch(step * recipe.accumulate + i), device) for i in range(recipe.accumulate)]

    interrupt = _Interrupt()

    def plain_step(batches: list[Any]) -> Tensor:
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
                try:
                    pending.append(take_step(batches(step)))
                except (RuntimeError, ValueError, AssertionError) as error:
                    if recipe.precision == "no":
                        raise
                    raise ValueError(
                        f"step {step + 1} fails in {recipe.precision}, which not every flow stands "
                        f"({str(error) or type(error).__name__}); precision no trains it in float32"
                    ) from error
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
                        value = training.validate(validate)  # else its batches would be compiled for, too
                    accelerator.log({"validation": value}, training.fitted.steps)
                    say(f"step {training.fitted.steps}: validation {describe(value)}")
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
        say(f"interrupted at step {training.fitted.steps}: ending with what is trained so far")
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


class _Interrupt:
    """Notes the first Ctrl-C or SIGTERM instead of acting, so that no step is cut in two; a second Ctrl-C raises.

    Between ``hold`` and ``release`` a second one has to wait, too: the weights have changed, and their step does not
    count yet.
    """

    def __enter__(self) -> "_Interrupt":
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


def _agree(accelerator: Accelerator, losses: Tensor, seconds: float, stop: bool) -> tuple[list[float], float, bool]:
    """The losses as numbers, the time, and whether anyone was asked to stop: of several processes the mean, so that
    all of them decide alike. Here the program waits for the device."""
    if accelerator.num_processes == 1:
        return losses.tolist(), seconds, stop
    own = torch.cat((losses, losses.new_tensor([seconds, stop])))
    *values, seconds, stop = accelerator.reduce(own, "mean").tolist()
    return values, seconds, stop > 0


def _to(batch: Any, device: torch.device) -> Any:
    """On the device. Only CUDA is sure to have read the CPU's memory before that is used for something else."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    return tuple(None if part is None else _to(part, device) for part in batch)


class _Training:
    """The state of a training: everything that a checkpoint holds."""

    def __init__(self, module: nn.Module, parameters: list[Tensor], optimizer, recipe: Recipe, directory: Path | None):
        self.module = module
        self.parameters = parameters
        self.optimizer = optimizer
        self.recipe = recipe
        self.directory = directory
        self.fitted = Fitted()
        self.average = None if recipe.average is None else _copy(parameters)
        self.best = None
        self.best_validation = math.inf
        self.since_best = 0
        self.identity = None
        self.take_snapshot()
        self.trust([])

    def progress(self) -> float:
        share = self.fitted.steps / self.recipe.steps
        return share if self.recipe.seconds is None else min(1, max(share, self.fitted.seconds / self.recipe.seconds))

    def done(self) -> bool:
        patience = self.recipe.patience
        return self.progress() >= 1 or (patience is not None and self.since_best >= patience)

    def take_snapshot(self) -> None:
        """Keep the weights as they are before a step; they count once that step's loss is known: see ``trust``."""
        self.candidate = _copy(self.module.state_dict().values()), self.fitted.steps

    def trust(self, losses: list[float]) -> None:
        """Raise NotFinite, with the last good weights, unless all losses of the last steps are finite."""
        for step, value in enumerate(losses, self.fitted.steps - len(losses)):
            if not math.isfinite(value):
                if self.candidate[1] < step:
                    self.snapshot, self.snapshot_step = self.candidate
                self.restore_snapshot()
                raise NotFinite(
                    f"the loss became {value} at step {step + 1}; "
                    f"the weights of step {self.snapshot_step} are kept. "
                    f"A lower learning rate than {self.recipe.lr:g} or a smaller clip may help"
                )
        self.snapshot, self.snapshot_step = self.candidate

    def restore_snapshot(self) -> None:
        _write(self.module.state_dict().values(), self.snapshot)

    def average_weights(self) -> None:
        """Move the average; its decay grows from 0 as (1 + n) / (10 + n): the first weights are soon forgotten."""
        if self.average is None:
            return
        if self.fitted.steps < AVERAGE_EVERY:
            _write(self.average, self.parameters)
        elif self.fitted.steps % AVERAGE_EVERY == 0:
            n = self.fitted.steps / AVERAGE_EVERY
            decay = min(self.recipe.average**AVERAGE_EVERY, (1 + n) / (10 + n))
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    def validate(self, validate: Callable[[], float]) -> float:
        """Score the weights that the training would end with now, and keep them if they are the best so far."""
        current = _copy(self.parameters)
        try:
            if self.average is not None:
                _write(self.parameters, self.average)
            self.module.eval()
            value = validate()
            if not math.isfinite(value):
                self.restore_snapshot()
                current = _copy(self.parameters)
                raise NotFinite(
                    f"the validation loss became {value} at step {self.fitted.steps}; "
                    f"the weights of step {self.snapshot_step} are kept"
                )
            self.fitted.validation.append((self.fitted.steps, value))
            self.since_best += 1
            if value < self.best_validation:
                self.best, self.best_validation, self.since_best = _copy(self.parameters), value, 0
        finally:
            self.module.train()
            _write(self.parameters, current)
        return value

    def finish(self) -> None:
        """Leave the module with the best weights, else the averaged ones, else the last."""
        chosen = self.best if self.best is not None else self.average
        if chosen is not None:
            _write(self.parameters, chosen)

    def save(self, finished: bool = False) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.directory is None:
            return
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "best": self.best,
            "best_validation": self.best_validation,
            "since_best": self.since_best,
            "fitted": vars(self.fitted),
            "identity": self.identity,
            "random": torch.get_rng_state(),
            "device": self.parameters[0].device.type,
            "random_of_device": random_state(self.parameters[0].device),
        }
        state = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, state)
        payload = io.BytesIO()
        torch.save(state, payload)
        payload = payload.getvalue()
        header = {"format": FORMAT, "steps": self.fitted.steps, "finished": finished, "sha256": _sha256(payload)}
        content = json.dumps(header).encode() + b"\n" + payload
        write_atomically(self.directory / STATE, lambda path: path.write_bytes(content))

    def load(self, directory: Path) -> None:
        """Go on from the checkpoint in ``directory``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or belongs to another training or model.
        """
        path = check_resumable(directory)
        state = read_checkpoint(path)
        began = state["identity"]
        if began is not None and self.identity is not None and began != self.identity:
            changes = "; ".join(
                f"{name} was {began.get(name)}, not {self.identity.get(name)}"
                for name in {**began, **self.identity}
                if began.get(name) != self.identity.get(name)
            )
            raise ValueError(f"{path} belongs to another training: {changes}. Resume with the arguments it began with")
        device = self.parameters[0].device
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name in ("average", "best"):
                kept = state[name]
                if kept is not None and [tensor.shape for tensor in kept] != [one.shape for one in self.parameters]:
                    raise ValueError(f"{name} has other shapes")
                setattr(self, name, None if kept is None else [tensor.to(device) for tensor in kept])
            self.best_validation, self.since_best = state["best_validation"], state["since_best"]
            self.fitted = Fitted(**state["fitted"] | {"interrupted": False, "notes": []})
            torch.set_rng_state(state["random"])
            if state["device"] == device.type:  # another kind of device has another kind of state
                set_random_state(state["random_of_device"], device)
            for group in self.optimizer.param_groups:  # as it is without a graph
                group["lr"], group["capturable"] = float(group["lr"]), False
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path} belongs to another model; resume with the arguments it began with") from error
        self.take_snapshot()
        self.trust([])


def check_resumable(directory: Path) -> Path:
    """The checkpoint in ``directory``, or a FileNotFoundError."""
    path = directory / STATE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no {STATE} in {directory}")
    return path


def set_aside(directory: Path) -> str | None:
    """Keep an unfinished training's checkpoint from being overwritten by a new one; words for what was done, if any."""
    path = directory / STATE
    if not path.is_file():
        return None
    header = _header(path)
    if header is not None and (header["finished"] or header["steps"] == 0):
        return None
    kept = next(kept for i in itertools.count(1) if not (kept := path.with_name(f"training-{i}.pt")).exists())
    os.replace(path, kept)
    steps = "damaged" if header is None else f"at step {header['steps']:,}"
    return f"an unfinished training ({steps}) was in {directory}: it is kept as {kept.name}; --resume goes on with one"


def _header(path: Path) -> dict | None:
    """The first line of a checkpoint; ``None`` if it is not as ``save`` writes it."""
    with open(path, "rb") as file:
        return _parse_header(file.readline(1000))


def _parse_header(line: bytes) -> dict | None:
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT and isinstance(header["steps"], int) and isinstance(header["finished"], bool)
        return header if known and isinstance(header["sha256"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save`` has written, to the bit, or a ValueError.

    The file is opened once: a training that still runs may put the next
    checkpoint in its place meanwhile, and the two must not be mixed.
    """
    damaged = f"{path} is damaged, or not of this version; start again without --resume"
    with open(path, "rb") as file:
        header, payload = _parse_header(file.readline(1000)), file.read()
    if header is None or _sha256(payload) != header["sha256"]:
        raise ValueError(damaged)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception:  # torch's own words advise to switch off what keeps a file's code from running
        state = None
    kinds = {"identity": dict | None, "fitted": dict, "best_validation": float, "since_best": int}
    if (
        not isinstance(state, dict)
        or not all(name in state and isinstance(state[name], kind) for name, kind in kinds.items())
        or not isinstance(state["fitted"].get("steps"), int)
    ):
        raise ValueError(damaged)
    return state


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _copy(tensors) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _write(targets, sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
