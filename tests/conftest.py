"""Without normflows, zuko or FrEIA, which are optional, the tests of that library are skipped, and no other.

A test is skipped if it fails because a library is missing *and* the missing library's name stands in the test's own
name, parameters or source. What names no missing library must pass without it: so a needless import is still found.

Every test draws the same random numbers whenever it runs, in whatever order. ``TEST_SEED=1 pytest`` draws others.
"""

import importlib.util
import inspect
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that run tests side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that the tests start
    torch.set_num_threads(1)

from adapters.bridges import bridges, installed
from adapters.discovery import file_name
from tests import pretend

if pretend.AVAILABLE:
    pretend.register()  # before the first backward pass of the process, in which autograd counts the devices

TEST_SEED = int(os.environ.get("TEST_SEED", "0"))
settings.register_profile("repeatable", derandomize=True)
if not TEST_SEED and "FUZZ_EXAMPLES" not in os.environ:
    settings.load_profile("repeatable")

MISSING = {
    file_name(bridge): f"pip install 'flow-adapters[{bridge.EXTRA}]'" for bridge in bridges() if not installed(bridge)
}
collect_ignore = [  # files that import a missing library as a whole
    file.name for file in Path(__file__).parent.glob("*.py") for name in MISSING if f"\n{name} = " in file.read_text()
]


def pytest_configure(config):
    """With ``-n``, let a process that has no tests left take some over from another: a few take twenty seconds."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.fixture
def device(monkeypatch):
    """A device that isn't the CPU."""
    if not pretend.AVAILABLE:  # with the newest versions, which .ci/run tries first, nothing is skipped
        pytest.skip("this PyTorch takes no device written in Python (2.10 does)")
    monkeypatch.setattr(torch, "Generator", pretend.OnPretendGenerator)
    monkeypatch.setattr(pretend, "present", True)
    pretend.waits.clear()
    yield torch.device("pretend")
    from accelerate.state import AcceleratorState  # here, since only some tests need it and its import takes long

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def uninstall(monkeypatch):
    """``uninstall("zuko")``: for the rest of the test these packages are not installed, as far as Python can find."""
    find_spec = importlib.util.find_spec
    missing: set[str] = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
    )
    return lambda *packages: missing.update(packages)


def seed_of(name: str) -> int:
    """The seed from which the test of that name draws its random numbers."""
    return (zlib.crc32(name.encode()) + TEST_SEED) % 2**32


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    seed = seed_of(item.nodeid)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return (yield from _skip_what_needs_a_missing_library(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_what_needs_a_missing_library(item))


def _skip_what_needs_a_missing_library(item):
    try:
        return (yield)
    except ImportError:
        text = f"{item.nodeid}\n{inspect.getsource(item.obj) if item.obj else ''}".lower()
        for library, remedy in MISSING.items():
            if library in text:  # it can't be tried without; with all libraries, as .ci/run has them, none is skipped
                pytest.skip(f"needs {library}: {remedy}")
        raise
