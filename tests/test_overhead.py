"""runs/overhead.py, tiny, and the timing that it and the comparison stand on."""

import time

import pytest
import torch

from adapters.bridges import bridges, installed
from adapters.catalogue import native_flows
from runs.common.timing import interleaved, ratio
from tests.scripts import run

CPU = torch.device("cpu")


def test_every_library_is_timed_both_ways(tmp_path):
    metrics = run("overhead", features=4, layers=2, hidden=(8,), batch_size=8, rounds=2, out=tmp_path)
    assert set(metrics) == {f"{name}_in" for name in native_flows()} | {
        f"{name}_out" for bridge in filter(installed, bridges()) for name in bridge.LIBRARIES
    }
    assert all(found > 0 for found in metrics.values()) and (tmp_path / "metrics.json").is_file()


def test_timing_is_in_turn_and_its_ratio_pairwise():
    calls = []

    def call(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    times = interleaved(
        {"a": lambda: call("a", 0.004), "b": lambda: call("b", 0.001)}, 3, torch.device("cpu"), warmup=1
    )
    assert calls == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]
    assert min(times["a"]) >= 4 and ratio([4.0, 8.0, 9.0], [2.0, 2.0, 3.0]) == 3.0


def test_numbers_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="rounds must be positive, not 0"):
        run("overhead", rounds=0, out=tmp_path)
