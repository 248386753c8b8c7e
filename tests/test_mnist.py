"""runs/mnist.py, end to end and tiny, its bits per dimension, its batches and its data sets."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.distributions import Normal
from torch.testing import assert_close

from adapters import build_flow, load_flow, save_flow
from adapters.masks import pyramid_masks
from adapters.preprocess import Standardize
from runs.common import images as images_module
from runs.common import progress
from runs.common.images import (
    HIGH,
    MD5,
    Batches,
    bits_per_dim,
    class_context,
    dequantize,
    load_images,
    standardize,
    unpack_mnist,
)
from runs.common.objectives import BitsPerDim
from runs.common.pictures.mnist import MnistRecord, nearest_images
from runs.common.results import RECORD
from runs.common.samples import base_noise, slerp
from runs.common.scores import EVALUATION_SEED, log_likelihoods, score_images
from runs.common.training_state import STATE, NotFinite, read_checkpoint
from tests import scripts
from tests.scripts import pictures_in

ROOT = Path(__file__).parent.parent
TINY = {"limit": 64, "epochs": 2, "batch_size": 32, "layers": 2, "hidden": (8,), "samples": 12}
PICTURES = ("samples", "training", "progress", "interpolations", "neighbours", "classes")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    unpack_mnist(directory / "MNIST" / "raw")
    return directory


@pytest.fixture
def run(data_dir):
    """The script, tiny, with the data read only once and no pictures unless asked for."""

    def call(draw=False, **flags):
        return scripts.run("mnist", seams={"read": lambda *_: _cached_images(data_dir), "draw": draw}, **TINY | flags)

    yield call
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first precision for the process


@cache
def _cached_images(data_dir):
    return load_images(data_dir=data_dir)


def gaussian_flow(mean, std):
    """A flow that is the Gaussian with these moments: its layers start at the identity."""
    return build_flow("masked-affine", len(mean), layers=2, preprocess=Standardize(mean, std)).eval()


# Bits per dimension


def test_uniform_pixels_cost_eight_bits():
    dimensions = 784
    assert bits_per_dim(dimensions * math.log(HIGH), dimensions) == pytest.approx(8)


def test_scores_are_those_of_a_density_known_in_closed_form():
    images = torch.randint(256, (6, 2, 2), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6, 0.5]), torch.tensor([0.02, 0.1, 0.2, 0.3])
    x = dequantize(images, torch.Generator().manual_seed(EVALUATION_SEED))
    exact = Normal(mean, std).log_prob(x).sum(1)
    flow = gaussian_flow(mean, std)
    assert_close(log_likelihoods(flow, images, None), exact, atol=1e-3, rtol=1e-5)
    expected = -exact.mean() / (4 * math.log(2)) + math.log2(255)
    assert_close(BitsPerDim(flow)((x, None)).detach(), expected)


def test_importance_weighting_approaches_the_discrete_probability():
    images = torch.randint(115, 141, (20, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normal = Normal(torch.full((4,), 0.5, dtype=torch.float64), 0.02)  # so narrow that the noise within a bin matters
    edge = images.flatten(1).double() / 255
    exact = (255 * (normal.cdf(edge + 1 / 255) - normal.cdf(edge))).log().sum(1)
    flow = gaussian_flow(torch.full((4,), 0.5), torch.full((4,), 0.02))
    scores = {draws: log_likelihoods(flow, images, None, draws).double() for draws in (1, 2000)}
    assert (scores[2000] - exact).abs().max() < 0.05 < (scores[1] - exact).abs().max()
    assert scores[1].mean() < scores[2000].mean()


def test_processes_score_with_the_noise_of_one():
    images = torch.randint(256, (9, 2, 2), dtype=torch.uint8)
    flow = gaussian_flow(torch.full((4,), 0.5), torch.full((4,), 0.1))
    parts = [log_likelihoods(flow, images, None, share=(k, 2)) for k in (0, 1)]
    whole = log_likelihoods(flow, images, None)
    assert_close(parts[0], whole[0::2])
    assert_close(parts[1], whole[1::2])


def test_only_what_takes_long_shows_a_bar(capsys, monkeypatch):
    images, flow = torch.zeros(9, 2, 2, dtype=torch.uint8), gaussian_flow(torch.zeros(4), torch.ones(4))
    log_likelihoods(flow, images, None, draws=3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "DELAY", 0)
    log_likelihoods(flow, images, None, draws=3)
    assert "scoring" in capsys.readouterr().err
    log_likelihoods(flow, images, None, share=(1, 2))  # of several processes the first one alone
    assert capsys.readouterr() == ("", "")


# Data


def test_dequantisation_is_uniform_within_each_level():
    images = torch.arange(256, dtype=torch.uint8).repeat(400).view(100, 32, 32)
    x = dequantize(images)
    assert x.shape == (100, 1024) and x.min() >= 0 and x.max() <= HIGH
    noise = 255 * x - images.flatten(1)
    assert noise.min() > -1e-4 and noise.max() < 1 + 1e-4
    assert_close(noise.mean().item(), 0.5, atol=0.005, rtol=0)
    assert_close(noise.var().item(), 1 / 12, atol=0.002, rtol=0)
    assert not torch.equal(x, dequantize(images))


def test_batches_are_functions_of_seed_and_number_and_an_epoch_sees_each_image_once():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None].expand(10, 2, 2)
    labels = class_context(torch.arange(10))
    batches, again = Batches(images, labels, 3, seed=5), Batches(images, labels, 3, seed=5)
    assert batches.per_epoch == 3
    seen = [batches(i) for i in range(6)]
    for i in (4, 0, 5, 1):
        assert torch.equal(again(i)[0], seen[i][0]) and torch.equal(again(i)[1], seen[i][1])
    for x, context in seen:
        assert torch.equal((255 * x).floor()[:, 0], context.argmax(1).float())
    first, second = (torch.cat([(255 * x[:, 0]).floor() for x, _ in part]) for part in (seen[:3], seen[3:]))
    assert len(first.unique()) == len(second.unique()) == 9 and not torch.equal(first, second)
    assert not torch.equal(Batches(images, None, 3, seed=6)(0)[0], seen[0][0])
    assert Batches(images, None, 3, seed=5)(0)[1] is None


def test_processes_share_a_batch():
    images = torch.randint(256, (40, 2, 2), dtype=torch.uint8)
    whole = Batches(images, None, 12, seed=0)(2)[0]
    parts = [Batches(images, None, 12, seed=0, share=(k, 3))(2)[0] for k in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="batch_size 12 can't be shared evenly by 5 processes"):
        Batches(images, None, 12, seed=0, share=(0, 5))


def test_affine_preprocessing_standardises():
    images = torch.randint(256, (7000, 2, 2), dtype=torch.uint8)
    images[:, 0, 0] = 0
    transform = standardize(images.flatten(1))
    x = dequantize(images)
    y, log_det = transform(x)
    assert_close(y.mean().item(), 0.0, atol=1e-3, rtol=0)
    assert_close(y.std().item(), 1.0, atol=1e-3, rtol=0)
    jacobian = torch.autograd.functional.jacobian(lambda one: transform(one[None])[0][0], x[0])
    assert_close(log_det[0], jacobian.slogdet()[1])


def test_embedded_mnist_is_split_and_repaired(data_dir):
    images = _cached_images(data_dir)
    assert (len(images.train), len(images.validation), len(images.test)) == (55_000, 5_000, 10_000)
    assert images.train.dtype == torch.uint8 and images.classes == tuple("0123456789")
    damaged = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    unpack_mnist(damaged.parent)
    assert damaged.read_bytes() == content


def test_damaged_embedded_file_is_named(tmp_path):
    embedded = tmp_path / "embedded"
    shutil.copytree(images_module.EMBEDDED, embedded)
    packed = embedded / "t10k-labels-idx1-ubyte.gz"
    for damage in (packed.read_bytes()[:500], b"nonsense"):
        packed.write_bytes(damage)
        with pytest.raises(OSError, match="t10k-labels-idx1-ubyte.gz is missing or damaged"):
            unpack_mnist(tmp_path / "raw", embedded)
    packed.write_bytes((embedded / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(OSError, match="has the MD5 sum"):
        unpack_mnist(tmp_path / "raw", embedded)


def test_data_dir_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--data-dir: .*raw can't be made"):
        load_images(data_dir=tmp_path / "file")


def fake_fashion(directory, data_dir, damage=lambda name, content: content):
    """MNIST's test files, twice, where torchvision looks for FashionMNIST's."""
    raw = directory / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MD5:
        content = (data_dir / "MNIST" / "raw" / name.replace("train", "t10k")).read_bytes()
        (raw / name).write_bytes(damage(name, content))
    return directory


def test_other_data_sets_are_read_from_disk(tmp_path, data_dir):
    images = load_images("FashionMNIST", fake_fashion(tmp_path, data_dir))
    assert len(images.train) == 5_000 and len(images.test) == 10_000 and images.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda name, content: content[:5000], id="truncated"),
        pytest.param(lambda name, content: b"", id="empty"),
        pytest.param(lambda name, content: b"nonsense" * 100, id="corrupt"),
        pytest.param(lambda name, content: content[:-1] + b"\xff" if "labels" in name else content, id="label-255"),
        pytest.param(
            lambda name, content: content[:4] + b"\x00\x00\x00\x05" + content[8:13] if "labels" in name else content,
            id="few-labels",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_bad_files_are_an_error_that_says_what_to_do(damage, tmp_path, data_dir):
    fake_fashion(tmp_path, data_dir, damage)
    with pytest.raises(OSError, match="FashionMNIST could not be read from.*if a file there is damaged, delete it"):
        load_images("FashionMNIST", tmp_path)


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    def download(self):
        raise RuntimeError("no connection")

    monkeypatch.setattr(datasets.KMNIST, "download", download)
    with pytest.raises(OSError, match=r"KMNIST could not be .*\(no connection\). Check the connection"):
        load_images("KMNIST", tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'torchvision'"), "needs torchvision: pip install"),
        (RuntimeError("operator torchvision::nms does not exist"), "does not fit torch .*torchvision::nms"),
        (AttributeError("partially initialized module 'torchvision'"), "does not fit torch"),
    ],
)
def test_torchvision_that_is_missing_or_does_not_fit(error, message, monkeypatch, tmp_path):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=message):
        load_images(data_dir=tmp_path)


# Runs


@pytest.mark.parametrize("conditional", [False, True])
def test_end_to_end(conditional, run, data_dir, tmp_path, capsys):
    metrics = run(draw=True, conditional=conditional, importance=2, out=tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["run"] == "mnist" and record["metrics"] == metrics and record["arguments"]["limit"] == 64
    assert metrics["steps"] == 4 and metrics["parameters"] > 0
    assert metrics["bits_per_dim"] == pytest.approx(bits_per_dim(metrics["nll"], 784))
    assert metrics["bits_per_dim_importance"] < metrics["bits_per_dim"] and metrics["importance_samples"] == 2
    assert metrics["bits_per_dim_stderr"] > 0 and metrics["images_per_second"] > 0
    assert 0 < metrics["data_share"] < 1 and metrics["peak_memory_mib"] > 100
    printed = capsys.readouterr().out
    for picture in PICTURES[: None if conditional else -1]:
        assert f"{picture}.png" in printed
        with Image.open(tmp_path / f"{picture}.png") as image:
            image.load()
    assert (tmp_path / "classes.png").exists() == conditional
    flow = load_flow(tmp_path).eval()
    images = _cached_images(data_dir).first(64)
    assert score_images(flow, images.test, images.test_labels)["nll"] == pytest.approx(metrics["nll"], rel=1e-5)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": "random"},
        {"mask": "pyramid", "layers": None},
        {"mask": "pyramid", "layers": None, "preprocess": "marginals", "flow": "masked-histogram"},
        {"preprocess": "marginals", "net": "conv"},
        {"preprocess": "marginals", "net": "conv", "conditional": True, "flow": "masked-histogram"},
        {"preprocess": "affine"},
        {"flow": "masked-spline", "options": {"bins": 4}},
        {"flow": "masked-affine-textbook", "preprocess": "none"},
        {"flow": "nflows-affine"},
        {"options": {"dropout": 0.1, "activation": "gelu"}},
        {"accumulate": 2, "average": None, "clip": None},
        {"precision": "bf16"},
        {"seconds": 0.01, "epochs": 100_000},
        {"patience": 1, "lr": 1e-9, "average": None, "epochs": 30},
    ],
    ids=lambda arguments: "-".join(f"{name}={value}" for name, value in arguments.items() if name != "options"),
)
def test_every_option(arguments, run, data_dir, tmp_path):
    metrics = run(out=tmp_path, **arguments)
    flow = load_flow(tmp_path).eval()
    masks = flow.blueprint["masks"]
    assert len(masks) == (TINY | arguments)["layers"] or len(masks) == len(pyramid_masks(28, 28))
    images = _cached_images(data_dir).first(64)
    assert score_images(flow, images.test, images.test_labels)["nll"] == pytest.approx(metrics["nll"], rel=1e-4)


def test_one_image_is_enough(run, tmp_path):
    run(draw=True, limit=1, batch_size=1, samples=1, importance=1, out=tmp_path)
    assert pictures_in(tmp_path).keys() == {f"{name}.png" for name in ("samples", "training", "progress", "neighbours")}


def test_random_masks_are_saved_and_follow_the_seed(run, tmp_path):
    masks = []
    for seed, out in [(3, "a"), (3, "b"), (4, "c")]:
        run(mask="random", seed=seed, out=tmp_path / out)
        masks.append(torch.stack(load_flow(tmp_path / out).blueprint["masks"]))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1]) and masks[0].sum(1).tolist() == [392, 392]


def test_tracker_gets_the_curves(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(track="tensorboard", out=tmp_path)
    events = EventAccumulator(str(tmp_path / "mnist")).Reload()
    assert {"training", "validation"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation")] == [2, 4]


@pytest.mark.parametrize("conditional", [False, True])
def test_the_pictures_of_a_run_are_drawn_again_without_training(conditional, run, tmp_path, capsys):
    directory = tmp_path / "runs" / "one"
    run(draw=True, conditional=conditional, seed=3, temperature=0.7, out=directory)
    drawn = pictures_in(directory)
    assert drawn.keys() == {f"{name}.png" for name in PICTURES[: None if conditional else -1]}
    for name in drawn:
        (directory / name).unlink()
    own = {"samples": TINY["samples"], "seed": 3, "temperature": 0.7}
    assert scripts.run("mnist", load=tmp_path / "runs", out=tmp_path / "drawn", **own) == {}  # the newest run below
    assert pictures_in(tmp_path / "drawn") == drawn and not pictures_in(directory)
    scripts.run("mnist", load=directory, **own)
    assert pictures_in(directory) == drawn and not (directory / "again").exists()
    assert capsys.readouterr().out.count("12 samples of") == 2


@pytest.mark.parametrize(
    "other", [{"samples": 5}, {"temperature": 0.5}, {"seed": 1}], ids=lambda other: next(iter(other))
)
def test_other_samples_of_a_run_overwrite_none_of_its_pictures(other, run, tmp_path, capsys):
    run(draw=True, conditional=True, out=tmp_path)
    drawn = pictures_in(tmp_path)
    scripts.run("mnist", load=tmp_path, **{"samples": TINY["samples"]} | other)
    again = pictures_in(tmp_path / "again")
    assert pictures_in(tmp_path) == drawn and again.keys() == drawn.keys()
    anew = {name for name in drawn if again[name] != drawn[name]}
    assert anew == ({"samples.png"} if "samples" in other else {"samples.png", "classes.png"})
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'again' / 'samples.png'}" in printed
    assert "the run's own samples are those of --samples 12 --temperature 1.0 --seed 0\n" in printed


def test_a_limit_means_fewer_samples_and_a_load_means_the_runs_own_number(run, tmp_path, capsys):
    metrics = run(draw=True, samples=None, out=tmp_path)
    assert metrics["test_images"] == 64 and "--limit 64: 64 test images, 25 samples" in capsys.readouterr().out
    drawn = pictures_in(tmp_path)
    scripts.run("mnist", load=tmp_path)
    assert pictures_in(tmp_path) == drawn and not (tmp_path / "again").exists()
    assert len(MnistRecord.load(tmp_path).samples) == 25


def test_making_images_shows_its_progress(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0)
    run(out=tmp_path)
    assert "making images" in capsys.readouterr().err


def test_a_flow_whose_training_left_no_record_is_sampled(run, tmp_path):
    with pytest.raises(NotFinite, match=r"at step \d+.*saved in .*flow.safetensors"):
        run(out=tmp_path, conditional=True, lr=1e30, weight_decay=0.0, epochs=20)
    assert all(parameter.isfinite().all() for parameter in load_flow(tmp_path).parameters())  # the last good weights
    assert not (tmp_path / RECORD).exists()
    scripts.run("mnist", load=tmp_path, samples=5)
    assert pictures_in(tmp_path / "again").keys() == {"samples.png", "classes.png"}


def test_temperature_scales_the_noise():
    hot, cold = (base_noise(50, temperature, seed=0) for temperature in (1.0, 0.5))
    assert torch.equal(cold, 0.5 * hot) and hot.std().item() == pytest.approx(1, abs=0.02)


def test_slerp_stays_on_the_sphere():
    a, b = torch.randn(2, 784)
    share = torch.linspace(0, 1, 5)[:, None]
    path = slerp(a, b * a.norm() / b.norm(), share)
    assert_close(path.norm(dim=1), a.norm().expand(5))
    assert_close(path[0], a)


def test_neighbours_are_the_nearest():
    train = torch.randint(256, (50, 784), dtype=torch.uint8)
    distances, indices = nearest_images(train[[7, 31]] / 255, train, 3)
    assert indices[:, 0].tolist() == [7, 31] and torch.all(distances[:, 0] < 1e-2) and torch.all(distances[:, 1] > 1)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "chess"}, "unknown mask 'chess'; known: chequerboard, random, pyramid"),
        ({"flow": "affine"}, "unknown flow 'affine'; known: masked-affine"),
        ({"net": "resnet"}, "unknown net 'resnet'; known: mlp, conv"),
        ({"dataset": "CIFAR10"}, "unknown dataset 'CIFAR10'; known: MNIST, FashionMNIST"),
        ({"preprocess": "whiten"}, "unknown preprocess 'whiten'; known: none, affine, logit, marginals"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known: no, bf16, fp16"),
        ({"net": "conv", "flow": "nflows-rqs"}, "net conv is for hand-written flows; nflows-rqs has its own networks"),
        ({"layers": 0}, "layers must be positive, not 0"),
        ({"hidden": (8, -1)}, r"hidden\[1\] must be positive, not -1"),
        ({"epochs": 0}, "epochs must be positive, not 0"),
        ({"batch_size": -4}, "batch_size must be positive, not -4"),
        ({"lr": math.nan}, "lr must be positive, not nan"),
        ({"seconds": 0.0}, "seconds must be positive, not 0"),
        ({"patience": 0}, "patience must be positive, not 0"),
        ({"samples": 0}, "samples must be positive, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0"),
        ({"limit": 0}, "limit must be positive, not 0"),
        ({"importance": -1}, "must not be negative"),
        ({"average": 1.5}, "average must lie between 0 and 1, not 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, and finite, but is -1.0"),
        ({"track": "paper"}, "unknown track 'paper'; known: .*tensorboard"),
        ({"options": {"bins": 4}}, "masked-affine has no option 'bins'"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message, tmp_path):
    read = {"read": lambda *_: pytest.fail("images were loaded")}
    with pytest.raises((ValueError, TypeError), match=message):
        scripts.run("mnist", seams=read, **arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 65}, "batch_size 65 is more than the 64 training images"),
        ({"accumulate": 5}, "accumulate 5 is more than the 4 batches of the training"),
    ],
)
def test_mistakes_are_named_before_training(arguments, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(**arguments, out=tmp_path)
    assert not (tmp_path / STATE).exists()


def test_directories_that_do_not_serve_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be written to"):
        scripts.run("mnist", out=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        scripts.run("mnist", resume=True, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match=r"no flow.safetensors in .*: give the directory that a run wrote"):
        scripts.run("mnist", load=tmp_path)
    save_flow(build_flow("masked-affine", 2, layers=1), tmp_path / "toy")
    with pytest.raises(ValueError, match=r"not one of runs/mnist.py: its data have shape \(2,\)"):
        scripts.run("mnist", load=tmp_path / "toy")


# Interruptions and processes


def trained(directory):
    return load_flow(directory).state_dict()


def assert_same(weights, others):
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_ctrl_c_ends_cleanly_and_can_be_resumed(run, tmp_path, monkeypatch, capfd):
    arguments = {"epochs": 10, "options": {"dropout": 0.3}}
    run(out=tmp_path / "whole", **arguments)

    def interrupting(self, i, call=Batches.__call__):
        if i == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", interrupting)
        metrics = run(out=tmp_path / "parts", **arguments)
    assert metrics["steps"] == 8 and math.isfinite(metrics["bits_per_dim"])
    assert "interrupted at step 8" in "".join(capfd.readouterr()) and (tmp_path / "parts" / "metrics.json").exists()
    with pytest.raises(ValueError, match=r"belongs to another training: lr was 0.001, not 0.5\. Resume"):
        run(out=tmp_path / "parts", resume=True, lr=0.5, **arguments)
    assert [path.parent.name for path in tmp_path.rglob(STATE)] == ["parts"]
    run(out=tmp_path / "parts", resume=True, samples=3, **arguments)
    assert not list(tmp_path.rglob(STATE))
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: the run in .*parts has ended\. Without --resume"):
        run(out=tmp_path / "parts", resume=True, **arguments)
    assert_same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def command(out, data_dir, *more):
    tiny = ["--limit", "64", "--batch-size", "32", "--layers", "2", "--hidden", "8", "--options", "dropout", "0.3"]
    return [ROOT / "runs/mnist.py", *tiny, "--out", out, "--data-dir", data_dir, *more]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_killed_training_resumes_to_the_same_weights(run, tmp_path, data_dir):
    arguments = {"epochs": 200, "options": {"dropout": 0.3}}
    out = tmp_path / "killed"
    script = command(out, data_dir, "--epochs", "200", "--save-every", "1e-3")
    with subprocess.Popen(
        [sys.executable, *script], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and steps_of(out) < 10:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 10 <= steps_of(out) < 400
    assert not (out / "metrics.json").exists()
    run(out=out, resume=True, **arguments)
    run(out=tmp_path / "whole", **arguments)
    assert_same(trained(out), trained(tmp_path / "whole"))


def steps_of(out):
    path = out / STATE
    return read_checkpoint(path)["fitted"]["steps"] if path.exists() else -1


def test_two_processes_have_the_gradients_of_one(run, tmp_path, data_dir):
    """The first moment of Adam after one step is a tenth of the gradient."""
    single = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--keep-state", "--epochs", "1", "--options", "activation", "relu", "dropout", "0.0", "--batch-size", "64"]
    done = subprocess.run(
        [*single, *command(tmp_path / "two", data_dir, *more)],
        env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_dim") == 1
    run(out=tmp_path / "one", keep_state=True, epochs=1, batch_size=64, options={"activation": "relu", "dropout": 0.0})
    one, two = (read_checkpoint(tmp_path / name / STATE) for name in ("one", "two"))
    assert one["fitted"]["steps"] == two["fitted"]["steps"] == 1
    for index, state in one["optimizer"]["state"].items():
        assert_close(two["optimizer"]["state"][index]["exp_avg"], state["exp_avg"], atol=1e-7, rtol=1e-4)
    assert any(state["exp_avg"].abs().max() > 1e-4 for state in one["optimizer"]["state"].values())
    assert one["fitted"]["validation"][0][1] == pytest.approx(two["fitted"]["validation"][0][1], rel=1e-6)


def test_command_line_says_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "runs/mnist.py", "--mask", "nosuch"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False,
    )  # fmt: skip
    assert (
        done.returncode == 1 and done.stderr == "error: unknown mask 'nosuch'; known: chequerboard, random, pyramid\n"
    )
