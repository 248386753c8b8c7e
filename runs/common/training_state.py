"""The state of a training: its weights, the best and the averaged ones, and the checkpoint that keeps it all.

A checkpoint is written whole or not at all, and a damaged one is refused: see ``TrainingState.save``.
"""

import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adapters.checkpoint import write_atomically
from runs.common.devices import random_state, set_random_state
from runs.common.recipe import Recipe
from runs.common.results import METRICS

STATE = "training.pt"
FORMAT = 2  # of that file
AVERAGE_EVERY = 10  # steps between two moves of the weights' moving average, whose decay is taken to that power


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

    def metrics(self) -> dict[str, Any]:
        """What a run's metrics say of its training."""
        cut_short = {"interrupted": True} if self.interrupted else {}
        return {"steps": self.steps, "train_seconds": round(self.seconds, 2)} | cut_short


class TrainingState:
    """The state of a training: everything that a checkpoint holds."""

    def __init__(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: Any,
        recipe: Recipe,
        directory: Path | None,
        identity: dict[str, Any] | None,
        save_weights: Callable[[], Path] | None,
    ):
        self.module = module
        self.parameters = parameters
        self.optimizer = optimizer
        self.scaler = getattr(optimizer, "scaler", None)  # the factor on losses in fp16, which accelerate adapts
        self.recipe = recipe
        self.directory = directory
        self.identity = identity
        self.save_weights = save_weights
        self.fitted = Fitted()
        self.average = None if recipe.average is None else _copy(parameters)
        self.best: list[Tensor] | None = None
        self.best_validation = math.inf
        self.since_best = 0
        self.take_snapshot()
        self.trust([])

    def progress(self) -> float:
        share = self.fitted.steps / self.recipe.steps
        return share if self.recipe.seconds is None else min(1, max(share, self.fitted.seconds / self.recipe.seconds))

    def done(self) -> bool:
        patience = self.recipe.patience
        return self.progress() >= 1 or (patience is not None and self.since_best >= patience)

    def take_snapshot(self) -> None:
        """Copy the weights before a step. The copy counts as good once that step's loss is known: see ``trust``."""
        self.candidate = _copy(self.module.state_dict().values()), self.fitted.steps

    def trust(self, losses: list[float]) -> None:
        """Count the snapshot as good if the losses of the last steps are finite; else restore the last good weights.

        Raises:
            NotFinite: if one of the losses is not finite.
        """
        for step, value in enumerate(losses, self.fitted.steps - len(losses)):
            if not math.isfinite(value):
                if self.candidate[1] < step:
                    self.snapshot, self.snapshot_step = self.candidate
                advice = f"A lower learning rate than {self.recipe.lr:g} or a smaller clip may help"
                raise self.not_finite(f"the loss became {value} at step {step + 1}", advice)
        self.snapshot, self.snapshot_step = self.candidate

    def not_finite(self, what: str, *advice: str) -> NotFinite:
        """Go back to the last weights that gave a finite loss, save them, and say so in an error."""
        _write(self.module.state_dict().values(), self.snapshot)
        parts = [f"{what}; the weights of step {self.snapshot_step} are kept", *advice]
        if self.save_weights is not None:
            parts.append(f"They are saved in {self.save_weights()}")
        return NotFinite(". ".join(parts))

    def average_weights(self) -> None:
        """Move the average towards the weights. So that it soon forgets the first ones, its decay grows from 0.

        After n moves the decay is (1 + n) / (10 + n), until that exceeds the recipe's.
        """
        if self.average is None or self.recipe.average is None:
            return
        if self.fitted.steps < AVERAGE_EVERY:
            _write(self.average, self.parameters)
        elif self.fitted.steps % AVERAGE_EVERY == 0:
            n = self.fitted.steps / AVERAGE_EVERY
            decay = min(self.recipe.average**AVERAGE_EVERY, (1 + n) / (10 + n))
            current = [parameter.detach() for parameter in self.parameters]
            torch._foreach_lerp_(self.average, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def validate(self, validate: Callable[[], float]) -> float:
        """Score the weights that the training would end with now, and keep them if they are the best so far."""
        current = _copy(self.parameters)
        try:
            if self.average is not None:
                _write(self.parameters, self.average)
            self.module.eval()
            value = validate()
            if not math.isfinite(value):
                error = self.not_finite(f"the validation loss became {value} at step {self.fitted.steps}")
                current = _copy(self.parameters)
                raise error
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
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
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
            if self.scaler is not None and state.get("scaler") is not None:
                self.scaler.load_state_dict(state["scaler"])
            for name in ("average", "best"):
                kept = state[name]
                if kept is not None and [tensor.shape for tensor in kept] != [
                    parameter.shape for parameter in self.parameters
                ]:
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


def check_resumable(directory: Path, training: str = "") -> Path:
    """The checkpoint of a training in ``directory``, or in the directory of that name below it.

    Raises:
        FileNotFoundError: if there is none, because the run has ended well or for another reason.
    """
    path = directory / training / STATE
    if path.is_file():
        return path
    if (directory / METRICS).is_file():
        raise FileNotFoundError(
            f"nothing to resume: the run in {directory} has ended. Without --resume it starts anew, and --load "
            f"{directory} draws its pictures again; with --keep-state a run can be resumed after its end, too"
        )
    raise FileNotFoundError(f"nothing to resume: no {STATE} in {path.parent}")


def set_aside(directory: Path) -> str | None:
    """Rename the checkpoint of an unfinished training, which a new one would overwrite; say so if there was one."""
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
    with path.open("rb") as file:
        return _parse_header(file.readline(1000))


def _parse_header(line: bytes) -> dict | None:
    try:
        header = json.loads(line)
        known = header["format"] == FORMAT and isinstance(header["steps"], int) and isinstance(header["finished"], bool)
        return header if known and isinstance(header["sha256"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that ``save`` has written; a ValueError unless every bit of it is as it was.

    The file is opened once: a training that still runs may put the next checkpoint in its place meanwhile, and the two
    must not be mixed.
    """
    damaged = f"{path} is damaged, or not of this version; start again without --resume"
    with path.open("rb") as file:
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


def _copy(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _write(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
