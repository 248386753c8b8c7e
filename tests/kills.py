"""Kill a training again and again, most of the time in the middle of a write, and go on with it: the same bits.

python -m tests.kills 100    that many kills
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from runs.common.devices import make_accelerator
from runs.common.fit import fit
from runs.common.recipe import Recipe
from runs.common.training_state import STATE

STEPS = 120


def train(directory: Path) -> list[float]:
    """A training that writes a checkpoint at every step, with noise of its own; the weights that it ends with."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Walk()
    recipe = Recipe(steps=STEPS, lr=0.1, average=0.9, validate_every=7, save_every=1e-9)
    fit(
        module,
        lambda step: torch.randn(3),
        recipe,
        validate=lambda: module.w.square().sum().item(),
        directory=directory,
        resume=(directory / STATE).is_file(),
        quiet=True,
        accelerator=make_accelerator("cpu"),
    )
    return module.w.tolist()


class Walk(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.ballast = nn.Parameter(torch.zeros(100_000))  # a write takes a while

    def forward(self, batch):
        return nn.functional.dropout(self.w - batch, 0.3).square().sum() + self.ballast[0]


def killed(directory: Path, after: float) -> bool:
    """Train in a process of its own; whether it was still at it when it was killed."""
    child = os.fork()
    if child == 0:
        train(directory)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def main(kills: int) -> int:
    """Kill that many times, then let it end. How many of the kills hit; a RuntimeError if the bits differ."""
    chance, hits = random.Random(0), 0
    with tempfile.TemporaryDirectory() as directory:
        parts, whole = Path(directory) / "parts", Path(directory) / "whole"
        parts.mkdir()
        for _ in range(kills):
            hits += killed(parts, chance.uniform(0.02, 0.25))
        resumed, expected = train(parts), train(whole)
        if resumed != expected:
            raise RuntimeError(f"after {hits} kills the weights are {resumed}, not {expected}")
        left = [path.name for path in parts.iterdir() if path.name != STATE and "unfinished" not in path.name]
        if left:
            raise RuntimeError(f"files were left: {left}")
    return hits


if __name__ == "__main__":
    print(f"{main(int(sys.argv[1]))} kills hit, and the weights are the same to the bit")
