"""The options of the scripts: parsed, checked, and parted into what decides the weights and what does not."""

import ast
import importlib
import itertools
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode

import pytest
import tyro

from adapters.check.__main__ import main as check_main
from runs import compare, mnist, toy
from runs.common import command_line
from runs.common.command_line import parse
from runs.common.options import (
    Checked,
    Deciding,
    EpochOptions,
    FlowOptions,
    ImageOptions,
    ImageRunOptions,
    TrainingOptions,
    check_load,
    flat,
    identity,
)
from tests.scripts import arguments

RUNS = Path(__file__).parent.parent / "runs"
SCRIPTS = [path.stem for path in sorted(RUNS.glob("[a-z]*.py"))]


@dataclass(frozen=True)
class Options(Checked):
    """All groups that scripts share."""

    images: ImageOptions = field(default_factory=ImageOptions)
    flow: FlowOptions = field(default_factory=lambda: FlowOptions(layers=3))
    training: EpochOptions = field(default_factory=lambda: EpochOptions(weight_decay=0.5))
    run: ImageRunOptions = field(default_factory=ImageRunOptions)

    def check(self) -> None:
        if self.training.epochs > 90 and self.images.limit is None:
            raise ValueError("so many epochs want a limit")
        if self.run.load is not None:
            check_load(self, "load", "out", "seed")


WRONG = [
    ({"lr": 0.0}, "lr must be positive, not 0.0"),
    ({"batch_size": 0}, "batch_size must be positive, not 0"),
    ({"epochs": 0}, "epochs must be positive, not 0"),
    ({"seconds": 0.0}, "seconds must be positive, not 0.0"),
    ({"seed": -1}, "seed must lie between 0 and 2**63 - 1, not -1"),
    ({"weight_decay": -1.0}, "weight_decay must not be negative, and finite, but is -1.0"),
    ({"clip": 0.0}, "clip must be positive, not 0.0"),
    ({"average": 1.0}, "average must lie between 0 and 1, not 1.0"),
    ({"patience": 0}, "patience must be positive, not 0"),
    ({"precision": "fp8"}, "unknown precision 'fp8'; known: no, bf16, fp16"),
    ({"save_every": 0.0}, "save_every must be positive, not 0.0"),
    ({"device": "tpu"}, "no device 'tpu' here; there are: auto, cpu"),
    ({"flow": "maf"}, "unknown flow 'maf'; known: masked-affine,"),
    ({"layers": 0}, "layers must be positive, not 0"),
    ({"hidden": ()}, "hidden needs at least one width, e.g. --hidden 64 64"),
    ({"options": {"bins": 3}}, "masked-affine has no option 'bins'"),
    ({"dataset": "CIFAR"}, "unknown dataset 'CIFAR'; known: MNIST,"),
    ({"limit": 0}, "limit must be positive, not 0"),
    ({"epochs": 100}, "so many epochs want a limit"),
    ({"load": Path("run"), "lr": 0.5, "data_dir": Path("x")}, "--load trains nothing, so --lr, --data-dir would be"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_wrong_value_is_refused_by_the_same_words_from_the_command_line_and_from_python(given, message, capsys):
    """tyro would put a box around them, and exit."""
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        parse(Options, arguments(**given))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        groups = {name: changed(group, given) for name, group in vars(Options()).items()}
        Options(**groups)
    assert capsys.readouterr() == ("", "")
    assert parse(Options, []) == Options()  # one refusal leaves nothing behind for the next


def changed(group, given):
    return replace(group, **{name: value for name, value in given.items() if name in vars(group)})


def test_the_words_of_a_command_line_become_values_of_their_types():
    words = "--hidden 8 9 --options dropout 0.5 activation gelu --clip None --lr 1 --resume"
    found = parse(Options, words.split())
    assert found.flow.hidden == (8, 9) and found.flow.options == {"dropout": 0.5, "activation": "gelu"}
    assert found.training.clip is None and found.training.lr == 1.0 and found.run.resume
    assert found.flow.layers == 3 and found.training.weight_decay == 0.5  # the script's own defaults
    assert parse(Options, arguments(**flat(found))) == found


def test_what_decides_the_weights_is_a_type():
    found = identity(parse(Options, ["--hidden", "8", "--compile", "--device", "cpu", "--out", "x", "--limit", "9"]))
    assert found.keys() == {
        name for kind in (ImageOptions, FlowOptions, EpochOptions) for name in vars(kind())
    }  # fmt: skip
    assert found["hidden"] == [8] and found["limit"] == 9  # plain data, for the checkpoint


def test_a_recipe_has_the_options_of_training_and_run_and_what_is_known_later():
    run = ImageRunOptions(save_every=3.0, compile=True)
    recipe = EpochOptions(lr=0.5, clip=None, patience=4).recipe(run, steps=7, validate_every=2, betas=(0.1, 0.2))
    assert (recipe.lr, recipe.clip, recipe.patience, recipe.average) == (0.5, None, 4, 0.999)
    assert (recipe.save_every, recipe.compile, recipe.steps, recipe.validate_every) == (3.0, True, 7, 2)
    assert recipe.betas == (0.1, 0.2)
    assert TrainingOptions(seconds=2.0).recipe(run, steps=1).seconds == 2.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_stands_in_one_group_alone_and_says_what_it_is(script, capsys):
    kind = importlib.import_module(f"runs.{script}").Options
    options = kind()
    groups = list(vars(options).values())
    names = [name for group in groups for name in vars(group)]
    assert len(names) == len(set(names)) and flat(options).keys() == set(names)
    assert identity(options).keys() == {name for group in groups if isinstance(group, Deciding) for name in vars(group)}
    assert not {"device", "out", "resume", "load", "compile"} & identity(options).keys()
    with pytest.raises(SystemExit):
        parse(kind, ["--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        assert f" {flag} " in printed or f" {flag}, " in printed, flag
        text = printed.split(f" {flag}")[1].split("(default:")[0].split()
        assert len(text) > 2, f"{flag} has no help"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_examples_that_the_script_takes(script, capsys):
    module = importlib.import_module(f"runs.{script}")
    with pytest.raises(SystemExit):
        command_line.run(module.main, module.Options, ["--help"])
    _, found, shown = capsys.readouterr().out.partition("examples, and what they give:\n\n")
    examples = re.findall(r"^(\S.*)\n    (\S.*)$", re.sub(r" \\\n +", " ", shown), re.M)
    assert found and len(examples) == len(re.findall("^\\S", shown, re.M))
    for command, said in examples:
        assert f"runs/{script}.py" in command and len(said) > 10
        words = command.partition(f"{script}.py")[2].replace("my_layer.py:MyLayer", "masked-affine").split()
        parse(module.Options, words)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("script", [*SCRIPTS, "adapters.check"])
def test_help_fits_the_terminal_and_breaks_a_text_only_where_a_line_is_full(script, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", [f"runs/{script}.py"])
    with pytest.raises(SystemExit):
        if script in SCRIPTS:
            module = importlib.import_module(f"runs.{script}")
            command_line.run(module.main, module.Options, ["--help"])
        else:
            tyro.cli(check_main, prog="python -m adapters.check", args=["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert width < 80 or [line for line in lines if len(line) > width] == []
    box = mode(map(len, lines))
    boxed = [line[2:-2].rstrip() for line in lines if len(line) == box and line[:2] in ("│ ", "  ")]
    assert len(boxed) > 10 and width - 2 <= box <= width
    for line, below in itertools.pairwise(boxed):
        column = len(below) - len(below.lstrip())
        beside_a_flag = column and not line[:column].endswith("  ")  # which is too long for a text on its line
        if line.strip("─-") and below.strip("─-") and not beside_a_flag and not below.startswith(("-", "STR")):
            assert len(f"{line} {below.split()[0]}") > box - 4, f"{line}\n{below}"


def test_what_the_scripts_share_imports_no_script():
    scripts = {path.stem for path in RUNS.glob("*.py")} - {"__init__"}
    for path in (RUNS / "common").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            assert not {f"runs.{script}" for script in scripts} & set(found), path


@pytest.mark.parametrize("word", ["chequerboard", "checker", "checkerboard", "checkered", "chequer", "chequered"])
def test_the_chequerboard_may_be_spelled_otherwise(word):
    assert parse(mnist.Options, ["--mask", word]).flow.mask == "chequerboard"
    assert parse(toy.Options, [f"--data={word}"]).density.data == "chequerboard"
    assert parse(compare.Options, ["--task", word, "--out", word]).equal.task == "chequerboard"
    assert str(parse(compare.Options, ["--out", word]).run.out) == word
