"""What README.md and runs/README.md show must run, and every command, file and picture that they name must exist."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.bridges import libraries
from runs.common import command_line

ROOT = Path(__file__).parent.parent
README, RESULTS = DOCUMENTS = ROOT / "README.md", ROOT / "runs/README.md"
EXERCISES = ["2.1", "2.2", "2.3", "2.4", "2.5", "2.6"]
FRAGMENT = "def forward("  # a code block that begins so is a method without its class
# What the reader has and a test has not, with what stands for it here.
READERS_OWN = {
    "NAME": "masked-affine",
    "my_layer:SoftsignCoupling": "masked-affine",
    "my_layer.py:MyLayer": "masked-affine",
    "cuda:1": "cpu",
}
PROMISES = ROOT / "tests/README.md"
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands(text: str) -> list[tuple[str, str]]:
    """The script and the arguments of each ``python runs/….py …`` in a text, over the lines that a backslash joins."""
    return re.findall(r"python runs/(\w+)\.py([^`#&|\n]*)", re.sub(r"\\\n\s*", "", text))


def rows(text: str) -> list[list[str]]:
    """The cells of each table row in a text, without the row of dashes."""
    lines = [line.replace(r"\|", "¦") for line in text.splitlines() if line.startswith("|") and "|---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def flags(text: str) -> Iterator[tuple[str, str]]:
    """Flags that a table changes in the command that the text last gave: a script, and the flags."""
    script = ""
    for line in text.splitlines():
        script = (commands(line) or [(script, "")])[-1][0]
        if line.startswith("|"):
            yield from ((script, code) for code in re.findall(r"`(--[^`]*)`", line))


def section(title: str) -> str:
    """The part of README.md under the heading that contains ``title``."""
    (found,) = [part for part in re.split(r"^## ", README.read_text(), flags=re.M) if title in part.partition("\n")[0]]
    return found


def parse(script: str, arguments: str) -> None:
    """Let a script's own parser read its arguments; it ends with ``SystemExit`` or an error at what it doesn't take."""
    module = importlib.import_module(f"runs.{script}")
    words = [word for word in shlex.split(arguments) if word != "--help"]
    command_line.parse(module.Options, [READERS_OWN.get(word, word) for word in words])


@each_document
def test_each_example_runs_by_itself(document):
    """A reader may copy any of them alone. They run in a process of their own: what they import changes it."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    blocks = [block for block in blocks if not block.startswith(FRAGMENT)]
    assert blocks
    alone = f"for block in {blocks!r}:\n    exec(block, {{'__name__': '__main__'}})"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checked = "\n".join(blocks).count("print(torch.allclose(")
    assert done.stdout.splitlines().count("True") == checked and "False" not in done.stdout, done.stdout


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document.read_text())})
CHANGES = sorted(set(flags(RESULTS.read_text())))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS + CHANGES)
def test_the_commands_are_ones_the_scripts_take(script, arguments):
    parse(script, arguments)


def test_the_commands_that_ci_runs_stand_on_lines_of_their_own():
    wanted = re.findall(r'command_of "([^"]+)"', (ROOT / ".ci/run").read_text())
    assert wanted
    for command in wanted:
        assert command in README.read_text().splitlines(), command


@each_document
def test_what_it_links_to_exists(document):
    """Pictures and links are relative to the document; a link to a section is a heading of the file it leads to."""
    text = document.read_text()
    named = re.findall(r'<img src="([^"]+)"', text) + re.findall(r"\[[^]]*\]\(([^)]+)\)", text)
    named = [name for name in named if "://" not in name]
    assert named
    for name in named:
        path, _, anchor = name.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, name


@pytest.mark.parametrize("document", [*DOCUMENTS, PROMISES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_it_names_exist(document):
    """In the text as ``path/to/file.py``, in "Where things are" at the start of a line: from the project's root."""
    text = document.read_text()
    named = re.findall(r"`((?:adapters|runs|tests|\.ci)/[\w./]+)`", text)
    named += re.findall(r"^((?:adapters|runs|tests)/\S+)  ", text, re.M)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_picture_is_shown():
    shown = "".join(document.read_text() for document in DOCUMENTS)
    for picture in (ROOT / "runs/pictures").iterdir():
        assert f"pictures/{picture.name}" in shown, picture.name


def test_every_script_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for script in (ROOT / "runs").glob("*.py"):
        if script.stem != "__init__":
            named = f"from runs import {script.stem}", f"runs.{script.stem} import", f'run("{script.stem}", '
            assert any(name in tests for name in named), script.name


def test_the_exercises_table_has_a_row_for_each_item():
    assert [row[0] for row in rows(section("The exercise sheet"))[1:]] == EXERCISES


@pytest.mark.parametrize("item", EXERCISES)
def test_the_exercises_table_names_code_tests_command_picture_and_answer(item):
    (row,) = [row for row in rows(section("The exercise sheet")) if row[0] == item]
    _, files, command, picture, answer = row
    paths = re.findall(r"`([^`]+\.py)`", files)
    assert any(path.startswith("tests/test_") for path in paths), files
    for path in paths:
        assert (ROOT / path).exists(), path
    pytests = re.findall(r"pytest (tests/\w+\.py) -k (\w+)", command)
    for path, name in pytests:
        assert re.search(rf"def test_\w*{name}", (ROOT / path).read_text()), command
    for script, arguments in commands(command):
        parse(script, arguments)
    assert pytests or commands(command), command
    assert picture.startswith("none") == (not commands(command)) and (picture.startswith("none") or ".png" in picture)
    assert answer.endswith(".")


@pytest.mark.parametrize("library", libraries())
def test_the_bridge_table_names_every_library(library):
    """The table is the one place outside a library's own files that knows it by name."""
    assert f'"{library}"' in section("Any flow of any library"), (
        f'add a row for "{library}" to the table of bridges in README.md'
    )
