"""What a run saves for its pictures, so that they can be drawn again without any training."""

import pickle
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from adapters.checkpoint import write_atomically
from runs.common.options import RunOptions
from runs.common.results import RECORD, newest_run, open_directory

# What is raised when a file is read that is damaged, or of another version.
DAMAGED = (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, pickle.UnpicklingError)


@dataclass
class Record(ABC):
    """All that the pictures of a run are drawn from: losses, densities, samples, latents, frames, …

    A subclass declares what its pictures need, as tensors on the CPU, numbers, strings, and tuples, lists and
    dictionaries of these; and it draws them in ``draw``, from nothing else. A dataclass among them comes back from the
    file as a dictionary.
    """

    @abstractmethod
    def draw(self, out: Path) -> list[Path]:
        """Draw every picture into the directory, and say where they are."""

    def save(self, directory: Path) -> Path:
        """Write it beside the run's other results, whole or not at all."""
        content = {"kind": type(self).__name__, "values": asdict(self)}
        return write_atomically(directory / RECORD, lambda unfinished: torch.save(content, unfinished))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The record of the run in that directory.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or another script's.
        """
        path = directory / RECORD
        if not path.is_file():
            raise FileNotFoundError(f"no {RECORD} in {directory}: give the directory of a run that has ended")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            kind, values = content["kind"], content["values"]
            if kind == cls.__name__:
                return cls(**values)
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged, or not of this version: run it again") from error
        raise ValueError(f"{path} is of a run of another script: its pictures are a {kind}, not a {cls.__name__}")


def draw_again(kind: type[Record], run: RunOptions) -> None:
    """Draw all pictures of the run in ``--load``, or of the newest run right below it, into ``--out`` or beside it."""
    assert run.load is not None
    directory = newest_run(run.load, RECORD)
    pictures = kind.load(directory).draw(open_directory(run.out or directory))
    print("\n".join([f"the pictures of {directory}", *(f"  {path}" for path in pictures)]))
