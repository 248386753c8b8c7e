"""The package as people meet it: ``python -m adapters``, ``help(adapters)`` and the version."""

import importlib
import importlib.metadata
import inspect
import pydoc
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import FunctionType

import pytest

import adapters
from adapters.__main__ import main
from adapters.bridges import bridges
from adapters.discovery import file_name
from adapters.flow import Flow

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "1", "--layers", "1", "--device", "cpu", "--out", "toy"]
METHODS = FunctionType | property | classmethod | staticmethod
# What users meet: every module beside these, whose names only the package itself uses.
INTERNAL = {"__init__", "__main__", "checks", "discovery", "imports", "normal", "own", "parts", "pipe", "words"}
PATHS = [path for folder in ("adapters", "adapters/layers") for path in sorted((ROOT / folder).glob("*.py"))]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PATHS if path.stem not in INTERNAL]


def public(name):
    """The public classes and functions that this module defines, by name."""
    module = importlib.import_module(name)
    for name, thing in vars(module).items():
        defined_here = getattr(thing, "__module__", None) == module.__name__
        if defined_here and not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield name, thing


def test_the_overview_names_every_flow_and_library(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*adapters.flow_names(), *map(file_name, bridges()), adapters.__version__))


def test_a_library_that_is_missing_says_how_to_install_it(capsys, uninstall):
    uninstall("zuko")
    assert main([]) == 0 and "pip install 'flow-adapters[zuko]'" in capsys.readouterr().out
    assert main(["zuko-nsf"]) == 1 and "pip install 'flow-adapters[zuko]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", adapters.flow_names())
def test_a_flow_is_described_with_its_options(name, capsys):
    assert main([name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: ") and len(shown.splitlines()[0]) > len(name) + 20


def test_a_mistake_is_one_line(capsys):
    assert main(["no-flow"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown flow 'no-flow'; known: masked-affine")
    assert main(["--no-option"]) == 2 and main(["--help"]) == 0


@pytest.mark.parametrize("words", [[], ["--help"], ["masked-affine-textbook", "zuko-naf"]])
def test_what_it_prints_fits_the_terminal(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(words)
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_a_reader_that_stops_reading_ends_the_program_quietly(tmp_path):
    """Like ``| head -1``, but at once: every program that there is writes to a pipe that was closed."""
    scripts = [path for path in sorted((ROOT / "runs").glob("*.py")) if path.stem != "__init__"]
    programs = [("run_path", str(path), ["--help"]) for path in scripts]
    programs += [("run_module", "adapters", []), ("run_module", "adapters.check", ["--help"])]
    programs += [
        ("run_module", "adapters.check", ["adapters:MaskedCouplingLayer"]),
        ("run_path", str(ROOT / "runs/toy.py"), TINY),
    ]
    program = f"""
import os, runpy, sys
read, write = os.pipe()
os.close(read)
for how, what, words in {programs!r}:
    os.dup2(write, 1)
    sys.argv = [what, *words]
    try:
        getattr(runpy, how)(what, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, 141), (what, words, end.code)  # 0: argparse itself gives up printing
    else:
        raise AssertionError((what, words))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version", "readme"]
    assert project["tool"]["hatch"]["version"]["path"] == "adapters/__init__.py"
    assert importlib.metadata.version("flow-adapters") == adapters.__version__


def test_the_distributions_have_what_they_need(tmp_path):
    """All files are in the source distribution, the tests and the READMEs' pictures too; the wheel has only what runs.

    Large files are empty here.
    """
    folders = [path for name in ("adapters", "runs", "tests") for path in (ROOT / name).rglob("*")]
    files = {path.relative_to(ROOT) for path in folders if path.is_file() and "__pycache__" not in path.parts}
    for path in files | {Path(name) for name in ("pyproject.toml", ".gitignore", "README.md", "LICENSE")}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"" if path.suffix in (".gz", ".png") else (ROOT / path).read_bytes())
    program = "from hatchling.build import *; print(build_sdist('dist')); print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    source, wheel = (tmp_path / "dist" / name for name in done.stdout.split())
    with tarfile.open(source) as archive:
        inside = {Path(name).relative_to(Path(name).parts[0]) for name in archive.getnames()}
    assert files - inside == set()
    with zipfile.ZipFile(wheel) as archive:
        inside = {Path(name) for name in archive.namelist() if ".dist-info" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        page = archive.read(metadata).decode()
    # On a package index no picture and no link leads nowhere, and each file that is linked is named.
    assert re.findall(r"\]\((?!https:|#)[^)]*\)|<img|</?p>", page) == []
    linked = re.findall(r'(?:\]\(|src=")((?:runs|tests)/[\w./-]+)', (ROOT / "README.md").read_text())
    assert linked and [name for name in linked if f"`{name}`" not in page] == []


def test_help_is_a_table_of_contents():
    shown = pydoc.plain(pydoc.render_doc(adapters))
    contents = inspect.getdoc(adapters) or ""
    assert contents.splitlines()[0] in shown
    for name in adapters.__all__:
        assert name in contents and inspect.getdoc(getattr(adapters, name))
    for word in contents.split():
        if word.startswith("adapters."):
            importlib.import_module(word.rstrip(":,"))


def test_every_public_name_has_an_example():
    """pytest runs them: see ``--doctest-modules`` in pyproject.toml."""
    assert [name for name in adapters.__all__ if ">>>" not in (inspect.getdoc(getattr(adapters, name)) or "")] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_of_a_module_has_an_example(name):
    assert [name for name, thing in public(name) if ">>>" not in (thing.__doc__ or "")] == []


def test_every_public_method_of_a_flow_has_an_example():
    methods = [name for name in vars(Flow) if not name.startswith("_")]
    assert {"log_prob", "sample", "encode", "transform", "base"} <= set(methods)
    assert [name for name in methods if ">>>" not in (getattr(Flow, name).__doc__ or "")] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_method_says_what_it_does(name):
    """Itself, or in the class of this package that declares it; what PyTorch says of every ``forward`` says nothing."""
    silent = []
    for kind in [thing for _, thing in public(name) if inspect.isclass(thing)]:
        ours = [vars(base) for base in kind.__mro__ if base.__module__.startswith("adapters")]
        for method, value in vars(kind).items():
            if not method.startswith("_") and isinstance(value, METHODS):
                silent += [] if any(getattr(base.get(method), "__doc__", None) for base in ours) else [(kind, method)]
    assert silent == []
