"""The options that several scripts share: declared, documented and checked once.

A script composes them in a frozen ``Options`` dataclass of its own, each with the script's own defaults. The names of
the fields are the names of the flags (``batch_size`` is ``--batch-size``), and the text below each field is its help.

What decides the weights is a type. Two trainings are the same if their ``Deciding`` options are: see ``identity``. All
other options say where and how a training is computed, kept, scored and shown.
"""

import math
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from adapters import build_flow, save_flow
from adapters.catalogue import check_options, is_own
from adapters.check.subject import said
from adapters.checks import check_positive
from adapters.flow import Flow
from adapters.own import DIRECTIONS, in_short
from runs.common.devices import choose_device
from runs.common.images import DATASETS
from runs.common.recipe import Recipe, check_recipe
from runs.common.results import open_directory, to_plain
from runs.common.training_state import STATE, check_resumable


@dataclass(frozen=True)
class Checked:
    """Options that check themselves when they are made: a subclass says how in ``check``.

    A ``ValueError`` is one clear line for the user. But tyro, which makes the options from a command line, would put a
    box of several lines around it. So while tyro is at work the checks wait, and run as soon as it is done.
    """

    _waiting: ClassVar["list[Checked] | None"] = None

    def __post_init__(self) -> None:
        if Checked._waiting is None:
            self.check()
        else:
            Checked._waiting.append(self)

    def check(self) -> None:
        """Raise a ValueError for a value that can't be right; its message names the option."""


@contextmanager
def checks_afterwards() -> Iterator[None]:
    """Options that are made within are checked at its end."""
    waiting: list[Checked] = []
    Checked._waiting = waiting
    try:
        yield
    finally:
        Checked._waiting = None
    for options in waiting:
        options.check()


@dataclass(frozen=True)
class Deciding(Checked):
    """Options that decide which weights a training ends with: to be resumed it must have the same ones."""


def flat(options: Checked) -> dict[str, Any]:
    """Each option by its own name, whatever group it stands in."""
    found = {}
    for field in fields(options):
        value = getattr(options, field.name)
        found |= flat(value) if isinstance(value, Checked) else {field.name: value}
    return found


def identity(options: Checked) -> dict[str, Any]:
    """What decides the weights, as plain data: the checkpoint keeps it, and ``fit`` compares it on ``--resume``."""
    groups = [getattr(options, field.name) for field in fields(options)]
    deciding = [flat(group) for group in groups if isinstance(group, Deciding)]
    return to_plain({name: value for group in deciding for name, value in group.items()})


def check_load(options: Checked, *used: str) -> None:
    """Raise a ValueError if beside ``--load`` there is an option that a run without training would ignore.

    Args:
        used: names of the options that such a run makes use of.
    """
    defaults = flat(type(options)())
    changed = [name for name, value in flat(options).items() if name not in used and value != defaults[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        them = "it" if len(changed) == 1 else "them"
        raise ValueError(f"--load trains nothing, so {flags} would be ignored: leave {them} out")


NamesAndValues = Annotated[dict[str, bool | int | float | str] | None, tyro.conf.arg(metavar="[NAME VALUE ...]")]


@dataclass(frozen=True)
class FlowOptions(Deciding):
    """Which flow is trained, and how large it is."""

    flow: str = "masked-affine"
    """a name that python -m adapters lists, e.g. masked-spline, or your own, e.g. my_layer.py:MyLayer."""

    direction: str | None = None
    """the way of your own layer's forward: noise-to-data (equation 15) or data-to-noise; by default it is found out."""

    layers: int | None = None
    """layers of the flow."""

    hidden: tuple[int, ...] | None = None
    """widths of the hidden layers of each layer's networks."""

    options: NamesAndValues = None
    """what else build_flow takes for this flow, e.g. --options dropout 0.1 activation gelu."""

    def check(self) -> None:
        if self.direction is not None:
            check_known(DIRECTIONS, direction=self.direction)
        check_flow(self.flow, self._options())
        check_widths(hidden=self.hidden)
        if self.layers is not None:
            check_positive(layers=self.layers)

    def build(self, features: int, context_features: int | None = None, **others: Any) -> Flow:
        """That flow, of that size.

        Args:
            others: what the script decides without an option, such as ``masks`` and ``preprocess``.
        """
        options: dict[str, Any] = {"layers": self.layers, "hidden_features": self.hidden, **self._options()}
        return build_flow(self.flow, features, context_features, **options | others)

    def try_own(self, features: int, context_features: int | None = None, **others: Any) -> None:
        """Before any work: build somebody's own flow, call it, save it, and say which way it runs, or what is wrong.

        Whatever can't be trained or saved is one sentence now, and not after the training. A flow that breaks a law is
        trained all the same, after a warning. A flow of the catalogue needs no trial.

        Args:
            features, context_features, others: as for ``build``.
        """
        if not is_own(self.flow):
            return
        with torch.random.fork_rng([]), tempfile.TemporaryDirectory() as directory:
            try:
                flow = self.build(features, context_features, **others)
                x, context = torch.rand(8, features), None
                if context_features is not None:
                    context = torch.randn(8, context_features)
                flow.log_prob(x, context).mean().backward()
                flow.eval().sample(1, context)
                save_flow(flow, directory)
            except (ValueError, TypeError, OSError, ImportError, RuntimeError):
                raise
            except Exception as error:  # of the user's own code
                raise ValueError(f"{self.flow} raises {said(error)}") from error
        if direction := flow.blueprint.get("direction"):
            other = next(other for other in DIRECTIONS if other != direction)
            print(f"{self.flow}: its forward is taken as {direction}, --direction {other} turns it round")
        if wrong := self._what_is_wrong():
            print(
                f"warning: {self.flow} is wrong, so its figures can't be trusted: {'; '.join(wrong)}. "
                f"python -m adapters.check {self.flow} says more"
            )

    def _what_is_wrong(self) -> list[str]:
        """What the check says of a small flow, of two layers over two coordinates; nothing if it can't be so small."""
        from runs.common.contestants import mistakes_in_sampling
        from runs.common.gates import check_before_training

        with torch.random.fork_rng([]):
            try:
                flow = build_flow(self.flow, 2, layers=2, hidden_features=(16, 16), **self._options())
            except Exception:  # of a layer for images, for example
                return []
            return check_before_training(flow, 2).reasons or mistakes_in_sampling(self.flow, 2)

    def file_name(self) -> str:
        """The flow's name as part of a directory's: ``my_layer-MyLayer`` for ``code/my_layer.py:MyLayer``."""
        return in_short(self.flow).replace(":", "-")

    def _options(self) -> dict[str, Any]:
        return (self.options or {}) | ({} if self.direction is None else {"direction": self.direction})


@dataclass(frozen=True)
class ImageOptions(Deciding):
    """Which images there are to learn from."""

    dataset: str = "MNIST"
    """MNIST, FashionMNIST, KMNIST or QMNIST; all but MNIST are downloaded unless they are there."""

    limit: int | None = None
    """use only so many images of each split, for a quick look."""

    def check(self) -> None:
        check_known(DATASETS, dataset=self.dataset)
        if self.limit is not None:
            check_positive(limit=self.limit)


@dataclass(frozen=True)
class RunOptions(Checked):
    """Where a run computes, and where its results are. None of this changes what is learned."""

    out: Path | None = None
    """directory for metrics, pictures and checkpoints."""

    resume: bool = False
    """go on with the training in that directory, after a crash or Ctrl-C."""

    keep_state: bool = False
    """keep training.pt, several times as large as the weights, even after a run that has ended well."""

    load: Path | None = None
    """train nothing; draw the pictures of the run in this directory again, there or in --out."""

    device: str = "auto"
    """where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …"""

    compile: bool = False
    """make the training step faster by torch.compile and, on CUDA, by one graph of the whole step."""

    def check(self) -> None:
        choose_device(self.device)

    def directory(self, default: Path) -> Path:
        """The run's directory, made and written to; ``default`` unless ``--out`` names one.

        Raises:
            FileNotFoundError: if there is a training to be resumed there, and is none.
            OSError: if it can't be written to.
        """
        out = self.out or default
        if self.resume:
            check_resumable(out)
        return open_directory(out)

    def remove_states(self, *directories: Path) -> None:
        """Remove the checkpoints of trainings in these directories, whose run has ended well, unless they shall stay.

        To be called last: until a run has its results and pictures, ``--resume`` may still be needed.
        """
        if not self.keep_state:
            for directory in directories:
                (directory / STATE).unlink(missing_ok=True)


@dataclass(frozen=True)
class ImageRunOptions(RunOptions):
    """Where a run computes, and where its data and results are. None of this changes what is learned."""

    data_dir: Path | None = None
    """where the data sets are kept; by default the user's cache."""

    save_every: float = 60.0
    """seconds between checkpoints."""

    def check(self) -> None:
        super().check()
        check_recipe(vars(self))


@dataclass(frozen=True)
class TrainingOptions(Deciding):
    """How the weights are trained."""

    batch_size: int = 128
    """images in a batch, over all processes."""

    lr: float = 1e-3
    """peak learning rate of the optimiser."""

    seconds: float | None = None
    """end after so many seconds of training instead, if that comes first; the schedule is shortened to match."""

    seed: int = 0
    """the seed of weights, order and noise."""

    def check(self) -> None:
        check_positive(batch_size=self.batch_size)
        check_seed(self.seed)
        check_recipe(vars(self))

    def recipe(self, run: RunOptions, **others: Any) -> Recipe:
        """How ``fit`` trains, with these options and those of the run.

        Args:
            others: what the script has no option for, and what is known only now, such as ``steps``.
        """
        names = {field.name for field in fields(Recipe)}
        chosen: dict[str, Any] = {name: value for name, value in (vars(self) | vars(run)).items() if name in names}
        return Recipe(**chosen | others)


@dataclass(frozen=True)
class EpochOptions(TrainingOptions):
    """How the weights are trained, in passes over a data set."""

    epochs: int = 7
    """passes over the training images."""

    weight_decay: float = 0.0
    """the weight decay of the optimiser, AdamW."""

    clip: float | None = None
    """largest norm of the gradient; None for no clipping."""

    average: float | None = 0.999
    """decay per step of the moving average of the weights that is evaluated and saved; None for none."""

    patience: int | None = None
    """end after so many epochs without a better validation score."""

    precision: str = "no"
    """no (float32), bf16 or fp16, for the training."""

    def check(self) -> None:
        check_positive(epochs=self.epochs)
        super().check()


# Checks of single options


def check_known(known: Collection[str], **values: str) -> None:
    """Raise a ValueError that lists what is known, unless every value is; the keyword is the name of the argument."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_widths(**widths: Collection[int] | None) -> None:
    """Raise a ValueError unless each is ``None``, or at least one width, all positive."""
    for name, given in widths.items():
        if given is not None and not given:
            raise ValueError(f"{name} needs at least one width, e.g. --{name} 64 64")
        check_positive(**{f"{name}[{i}]": width for i, width in enumerate(given or ())})


def check_at_most(most: int, **values: int) -> None:
    """Raise a ValueError for a number beyond what could ever end."""
    for name, value in values.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most:,}, not {value:,}")


def check_none_or_positive(**values: float) -> None:
    """Raise a ValueError unless each value is 0, which stands for none, or positive and finite."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 (none) or positive, not {value}")


def check_seed(seed: int) -> None:
    """Raise a ValueError unless PyTorch takes it for a seed of its own."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie between 0 and 2**63 - 1, not {seed}")


def check_flow(flow: str, options: dict[str, Any] | None) -> None:
    """Raise unless the catalogue has that flow, and the flow these options or ``activation``, which all have."""
    options = options or {}
    if "net" in options:
        raise ValueError(f"net is no option, but an argument of its own, where there is one: --net {options['net']}")
    check_options(flow, {name: value for name, value in options.items() if name != "activation"})
