"""The training loop on a problem whose answer is known."""

import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.testing import assert_close

from adapters import build_flow
from runs.common.devices import make_accelerator
from runs.common.fit import MOST, fit
from runs.common.objectives import NegativeLogLikelihood
from runs.common.recipe import Recipe
from runs.common.training_state import STATE, NotFinite, TrainingState, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")


class Quadratic(nn.Module):
    """|w − batch|², least at w = the batches' mean."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        return (self.w - batch).pow(2).sum()


TARGET = torch.tensor([1.0, -2.0, 0.5])


def noisy(step):
    return TARGET + torch.randn(3)


def test_finds_the_minimum_and_reports():
    module = Quadratic()
    seen = []
    fitted = fit(module, lambda step: TARGET, Recipe(steps=400, lr=0.1), observe=seen.append)
    assert_close(module.w.detach().cpu(), TARGET, atol=1e-3, rtol=0)
    assert fitted.steps == 400 and fitted.seconds > 0 and not fitted.interrupted
    assert fitted.losses[-1][0] == 400 and seen == list(range(400))


def test_a_failure_in_mixed_precision_says_so():
    class Strict(Quadratic):
        def forward(self, batch):
            product = torch.mm(self.w[None], batch[:, None])
            if product.dtype != torch.float32:
                raise AssertionError
            return product.sum()

    fit(Strict(), noisy, Recipe(steps=1, lr=0.1))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first precision for the process
    with pytest.raises(ValueError, match=r"step 1 fails in bf16.*AssertionError.*precision no"):
        fit(Strict(), noisy, Recipe(steps=1, lr=0.1, precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_average_is_steadier_than_the_last_weights():
    def error(average):
        torch.manual_seed(0)
        module = Quadratic()
        fit(module, noisy, Recipe(steps=3000, lr=0.05, average=average, warmup=1.0))
        return (module.w.detach().cpu() - TARGET).norm()

    assert error(0.99) < 0.5 * error(None)


def test_average_of_a_few_steps_is_the_last_weights():
    def weights(average):
        module = Quadratic()
        fit(module, lambda step: TARGET, Recipe(steps=3, lr=0.1, average=average))
        return module.w.detach()

    assert weights(None).norm() > 0
    assert_close(weights(0.999), weights(None))


def test_rate_rises_and_falls():
    recipe = Recipe(steps=10, lr=2.0, warmup=0.1)
    assert recipe.rate(0) == 0 and recipe.rate(0.05) == pytest.approx(1.0)
    assert recipe.rate(0.1) == pytest.approx(2.0) and recipe.rate(1.0) == pytest.approx(0.0)
    assert recipe.rate(0.55) == pytest.approx(1.0)


def test_accumulated_batches_give_the_gradient_of_the_whole():
    def weights(batches, accumulate):
        module = Quadratic()
        fit(module, lambda i: batches[i], Recipe(steps=2, lr=0.1, accumulate=accumulate, warmup=0.5))
        return module.w.detach()

    torch.manual_seed(0)
    halves = torch.randn(4, 3)
    whole = halves.view(2, 2, 3).mean(1)
    assert_close(weights(halves, 2), weights(whole, 1))


def test_validation_keeps_the_best_weights_and_ends_early():
    module = Quadratic()
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    at_best = []

    def validate():
        score = next(scores)
        if score == 1.0:
            at_best.append(module.w.detach().clone())
        return score

    fitted = fit(module, noisy, Recipe(steps=1000, lr=0.1, validate_every=10, patience=3), validate=validate)
    assert fitted.steps == 50 and [step for step, _ in fitted.validation] == [10, 20, 30, 40, 50]
    assert_close(module.w.detach(), at_best[0], atol=0, rtol=0)


def test_loss_that_is_not_finite_stops_with_the_step_and_keeps_good_weights():
    module = Quadratic()

    def batch(step):
        return TARGET if step < 250 else torch.full((3,), math.nan)

    with pytest.raises(NotFinite, match="became nan at step 251; the weights of step 200 are kept"):
        fit(module, batch, Recipe(steps=400, lr=0.1))
    assert module.w.isfinite().all() and module.w.norm() > 1


def test_seconds_end_the_training_with_its_schedule():
    fitted = fit(Quadratic(), lambda step: TARGET, Recipe(steps=10**9, lr=0.1, seconds=0.5))
    assert 0 < fitted.steps < 10**9 and 0.4 < fitted.seconds < 5


def test_resumed_training_ends_bit_identical(tmp_path):
    recipe = Recipe(steps=60, lr=0.1, average=0.99, validate_every=7)

    def train(directory, stop_at=None, resume=False):
        module = Quadratic()

        def batch(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return noisy(step)

        def validate():
            return (module.w.detach().cpu() - TARGET).norm().item()

        return module, fit(module, batch, recipe, validate=validate, directory=directory, resume=resume)

    torch.manual_seed(0)
    whole, _ = train(tmp_path / "whole")
    torch.manual_seed(0)
    _, first = train(tmp_path / "parts", stop_at=33)
    assert first.interrupted and first.steps == 33
    torch.manual_seed(99)
    resumed, second = train(tmp_path / "parts", resume=True)
    assert second.steps == 60 and not second.interrupted
    assert torch.equal(resumed.w, whole.w)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume: no training.pt"):
        fit(Quadratic(), noisy, Recipe(steps=2), directory=tmp_path, resume=True)
    (tmp_path / "training.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="training.pt is damaged"):
        fit(Quadratic(), noisy, Recipe(steps=2), directory=tmp_path, resume=True)
    fit(Quadratic(), noisy, Recipe(steps=2), directory=tmp_path)
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(nn.Linear(2, 2), noisy, Recipe(steps=2), directory=tmp_path, resume=True)


def test_interrupted_validation_does_not_touch_the_training(tmp_path):
    """While it is validated, the module holds the averaged weights."""
    recipe = Recipe(steps=20, lr=0.1, average=0.9, validate_every=10)

    def train(directory, interrupt=False, resume=False):
        module, calls = Quadratic(), []

        def validate():
            calls.append(1)
            if interrupt and len(calls) == 1:
                raise KeyboardInterrupt
            return -float(len(calls))

        fitted = fit(module, noisy, recipe, validate=validate, directory=directory, resume=resume)
        return module.w.detach(), fitted

    torch.manual_seed(0)
    whole, _ = train(tmp_path / "whole")
    torch.manual_seed(0)
    _, first = train(tmp_path / "parts", interrupt=True)
    assert first.interrupted and first.steps == 10 and len(first.validation) == 1
    resumed, _ = train(tmp_path / "parts", resume=True)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_step_and_a_second_ctrl_c_does_not(number):
    before = signal.getsignal(number)

    def batch(step, times=1):
        if step == 4:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return TARGET

    fitted = fit(Quadratic(), batch, Recipe(steps=50))
    assert fitted.interrupted and fitted.steps == 5 and signal.getsignal(number) == before
    fitted = fit(Quadratic(), lambda step: batch(step, times=2), Recipe(steps=50))
    assert fitted.interrupted and fitted.steps == (4 if number == signal.SIGINT else 5)


def test_training_can_be_resumed_from_its_first_moment_and_only_with_its_own_identity(tmp_path):
    def batch(step):
        assert (tmp_path / STATE).exists()
        raise KeyboardInterrupt

    assert fit(Quadratic(), batch, Recipe(steps=3), directory=tmp_path, identity={"seed": 0}).steps == 0
    with pytest.raises(ValueError, match="belongs to another training: seed was 0, not 1"):
        fit(Quadratic(), noisy, Recipe(steps=3), directory=tmp_path, resume=True, identity={"seed": 1})
    assert fit(Quadratic(), noisy, Recipe(steps=3), directory=tmp_path, resume=True, identity={"seed": 0}).steps == 3


@pytest.mark.parametrize(
    "numbers", [{"steps": 0}, {"steps": 5, "lr": -1.0}, {"steps": 5, "accumulate": 0}, {"steps": 5, "clip": 0.0}]
)
def test_numbers_must_be_positive(numbers):
    with pytest.raises(ValueError, match="must be positive, not"):
        Recipe(**numbers)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, batch):
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()


def test_a_compiled_step_trains_as_the_plain_one_and_is_resumed(tmp_path, capsys):
    def train(compile, **options):
        torch.manual_seed(0)
        module = Small()
        recipe = Recipe(steps=30, lr=0.01, average=0.9, compile=compile)
        fitted = fit(module, lambda step: torch.randn(16, 3), recipe, **options)
        return module, fitted

    plain, _ = train(False)
    compiled, fitted = train(True, directory=tmp_path)
    assert fitted.notes == [] and "compiling" in capsys.readouterr().out
    assert compiled._compiled_call_impl is None and not any("_orig" in name for name in compiled.state_dict())
    for expected, found in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        assert_close(expected, found, rtol=1e-3, atol=1e-4)  # the buffers, too: compiling has not counted as a step
    again, _ = train(True, directory=tmp_path, resume=True)
    assert_close(again.state_dict(), compiled.state_dict())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    fit(Quadratic(), noisy, Recipe(steps=5, lr=0.1, average=0.9), directory=directory, identity={"a": 1})
    return (directory / STATE).read_bytes()


def _with(content, **changes):
    """The same checkpoint with other entries, and a right checksum."""
    header, _, payload = content.partition(b"\n")
    state = torch.load(io.BytesIO(payload), weights_only=True)
    for name, value in changes.items():
        if value is ...:
            del state[name]
        else:
            state[name] = value
    return _sealed(state, json.loads(header))


def _sealed(state, header):
    payload = io.BytesIO()
    torch.save(state, payload)
    header = header | {"sha256": hashlib.sha256(payload.getvalue()).hexdigest()}
    return json.dumps(header).encode() + b"\n" + payload.getvalue()


class Planted:
    """A pickle that would run code."""

    def __reduce__(self):
        return (pytest.fail, ("code has run from a file",))


HEADER = {"format": 2, "steps": 5, "finished": True}
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"x",
    "no header": lambda content: content.partition(b"\n")[2],
    "header of another format": lambda content: content.replace(b'"format": 2', b'"format": 9'),
    "header without steps": lambda content: content.replace(b'"steps"', b'"stops"'),
    "header of a number": lambda content: b"3\n" + content,
    "text": lambda content: b"a training",
    "a pickle": lambda content: pickle.dumps({"module": 1}),
    "a pickle that runs code": lambda content: _sealed({"identity": None, "module": Planted()}, HEADER),
    "a list": lambda content: _sealed([1, 2], HEADER),
    "nothing": lambda content: _sealed(None, HEADER),
    **{f"no {name}": lambda content, name=name: _with(content, **{name: ...}) for name in (
        "module", "optimizer", "average", "best", "best_validation", "since_best", "fitted", "identity", "random",
        "random_of_device",
    )},
    **{f"{name} is a word": lambda content, name=name: _with(content, **{name: "word"}) for name in (
        "module", "optimizer", "average", "fitted", "identity", "random",
    )},
    "other weights": lambda content: _with(content, module={"v": torch.zeros(3)}),
    "wider weights": lambda content: _with(content, module={"w": torch.zeros(4)}),
    "a wider average": lambda content: _with(content, average=[torch.zeros(4)]),
    "steps of a word": lambda content: _with(content, fitted={"steps": "five"}),
    "unknown field": lambda content: _with(content, fitted={"laps": 5}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(damage, checkpoint, tmp_path):
    (tmp_path / STATE).write_bytes(DAMAGES[damage](checkpoint))
    with pytest.raises(ValueError, match=r"training\.pt (is damaged|belongs to another)") as refused:
        fit(
            Quadratic(), noisy, Recipe(steps=9, lr=0.1, average=0.9), directory=tmp_path, resume=True, identity={"a": 1}
        )
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(checkpoint, tmp_path):
    chance = random.Random(0)
    for _ in range(60):
        content = bytearray(checkpoint)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / STATE).write_bytes(content)
        module, recipe = Quadratic(), Recipe(steps=9, lr=0.1, average=0.9)
        try:
            fit(module, noisy, recipe, directory=tmp_path, resume=True, identity={"a": 1})
        except ValueError:
            continue
        assert json.loads(content.partition(b"\n")[0]) | {"steps": 5, "finished": True} == json.loads(
            checkpoint.partition(b"\n")[0]
        )  # of the header, what nothing is computed from


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_one_of_the_two(checkpoint, tmp_path):
    """A training may still be running while another program looks at how far it is."""
    newer = tmp_path / "newer"

    class Replaced(type(tmp_path)):
        """A file in whose place a newer one is put as soon as it is open."""

        def open(self, *arguments, **options):
            file = super().open(*arguments, **options)
            newer.write_bytes(_with(checkpoint, fitted={"steps": 6}))
            os.replace(newer, self)
            return file

    (tmp_path / STATE).write_bytes(checkpoint)
    path = Replaced(tmp_path / STATE)
    assert read_checkpoint(path)["fitted"]["steps"] == 5
    assert read_checkpoint(path)["fitted"]["steps"] == 6


def test_a_resumed_training_in_fp16_goes_on_with_its_loss_scale(tmp_path):
    """accelerate's optimiser holds the scale; here a CPU's, since fp16 itself wants a GPU."""

    def state():
        module = Quadratic()
        optimizer = torch.optim.AdamW(module.parameters())
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return TrainingState(module, list(module.parameters()), optimizer, Recipe(steps=9), tmp_path, None, None)

    first, second = state(), state()
    first.scaler.scale(torch.zeros(()))  # which makes the scale
    first.scaler.update(2.0)
    first.save()
    second.load(tmp_path)
    assert second.scaler.get_scale() == 2.0


def test_a_forgotten_resume_loses_nothing(tmp_path, capsys):
    recipe = Recipe(steps=20, lr=0.1)

    def stops(step):
        if step == 7:
            raise KeyboardInterrupt
        return noisy(step)

    fit(Quadratic(), stops, recipe, directory=tmp_path)
    first = (tmp_path / STATE).read_bytes()
    for i in (1, 2):
        fit(Quadratic(), stops, recipe, directory=tmp_path)
        message = f"an unfinished training (at step 7) was in {tmp_path}: it is kept as training-{i}.pt"
        assert message in capsys.readouterr().out
    assert (tmp_path / "training-1.pt").read_bytes() == first
    fit(Quadratic(), noisy, recipe, directory=tmp_path)  # ends well: nothing of it need be kept
    capsys.readouterr()
    fit(Quadratic(), noisy, recipe, directory=tmp_path)
    assert "unfinished" not in capsys.readouterr().out


def test_a_second_ctrl_c_waits_until_the_step_counts(tmp_path):
    class Twice(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            if fitting and len(seen) == 4:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)

    seen, fitting = [], True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Twice)
        torch.manual_seed(0)
        module = Quadratic()
        fitted = fit(module, noisy, Recipe(steps=50, lr=0.1), directory=tmp_path, observe=seen.append)
    assert fitted.interrupted and fitted.steps == 4
    header, _, payload = (tmp_path / STATE).read_bytes().partition(b"\n")
    state = torch.load(io.BytesIO(payload), weights_only=True)
    assert json.loads(header)["steps"] == state["fitted"]["steps"] == state["optimizer"]["state"][0]["step"] == 4


def test_ctrl_c_in_the_last_validation_is_not_swallowed():
    def validate():
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    assert fit(Quadratic(), noisy, Recipe(steps=3, lr=0.1, validate_every=3), validate=validate).interrupted


def test_a_validation_that_is_not_finite_stops_with_good_weights():
    module = Quadratic()
    with pytest.raises(NotFinite, match="the validation loss became nan at step 4; the weights of step 0 are kept"):
        fit(module, noisy, Recipe(steps=9, lr=0.1, validate_every=4), validate=lambda: math.nan)
    assert module.w.tolist() == [0, 0, 0]


def test_kills_cost_no_bit():
    """``python -m tests.kills 100`` does it a hundred times."""
    done = subprocess.run([sys.executable, "-m", "tests.kills", "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "kills hit, and the weights are the same to the bit" in done.stdout, done.stderr


def test_a_training_that_is_over_is_not_kept_in_memory():
    """A comparison trains hundreds of flows with one accelerator, which keeps whatever it has prepared."""
    accelerator = make_accelerator("cpu")
    loss = NegativeLogLikelihood(build_flow("masked-affine", 2, layers=1, hidden_features=(4,)))
    fit(loss, lambda step: torch.randn(8, 2), Recipe(steps=2), quiet=True, accelerator=accelerator)
    kept = weakref.ref(loss)
    del loss
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_a_curve_has_few_points_however_slow_the_machine_is(seconds):
    """Where each step takes a second, the losses of single steps would be noise, and as many as there are steps."""
    loss = NegativeLogLikelihood(build_flow("masked-affine", 2, layers=1, hidden_features=(4,)))
    ticks = itertools.count()
    clock = lambda: seconds * next(ticks)  # noqa: E731
    fitted = fit(loss, lambda step: torch.zeros(2, 2), Recipe(steps=1000), quiet=True, clock=clock)
    steps = [step for step, _ in fitted.losses]
    assert steps[-1] == 1000
    assert all(b - a >= 1000 / MOST for a, b in itertools.pairwise([0, *steps[:-1]]))  # the last one takes what is left
