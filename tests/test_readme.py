"""What the README shows must run, and every command it gives must be one that its script takes."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from runs.common.command_line import parse

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python runs/(\w+)\.py([^`#&|\n]*)", README)))


def test_the_examples_run_in_order():
    """In a process of their own: what they import changes it."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "self" not in block]
    assert len(blocks) >= 4
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "masked-affine" in done.stdout and done.stdout.count("True") == 3 and "False" not in done.stdout


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_the_commands_are_ones_the_scripts_take(script, arguments):
    module = importlib.import_module(f"runs.{script}")
    words = [word for word in shlex.split(arguments) if word != "--help"]
    if hasattr(module, "Options"):
        parse(module.Options, ["masked-affine" if word == "NAME" or ":" in word else word for word in words])
    else:
        tyro.cli(functools.wraps(module.main)(lambda **given: given), args=words)


def test_pictures_and_files_that_it_names_exist():
    root = Path(__file__).parent.parent
    named = re.findall(r'<img src="([^"]+)"', README) + re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    named += re.findall(r"^((?:adapters|runs|tests)/\S+)  ", README, re.M)
    assert named
    for name in named:
        assert (root / name).exists(), name


def test_every_script_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for script in (Path(__file__).parent.parent / "runs").glob("*.py"):
        if script.stem != "__init__":
            named = f"from runs import {script.stem}", f"runs.{script.stem} import", f'run("{script.stem}", '
            assert any(name in tests for name in named), script.name
