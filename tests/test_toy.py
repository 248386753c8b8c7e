"""runs/toy.py, end to end and tiny, and its densities."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from adapters import flow_names, load_flow
from runs import toy
from runs.common.densities import DENSITIES, TwoGaussians
from runs.common.pictures import figures
from runs.common.pictures.toy import ToyRecord
from runs.common.results import RECORD
from runs.common.training_state import STATE, NotFinite
from tests.scripts import pictures_in, run

TINY = {"layers": 2, "hidden": (8,), "steps": 3, "batch_size": 16}


@pytest.mark.parametrize("data", DENSITIES)
def test_density_integrates_to_one_and_has_its_entropy(data):
    density = DENSITIES[data]()
    size = 1800
    edge = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 3 - 1  # (−1, 2), well beyond both densities
    log_p = density.log_prob(torch.cartesian_prod(edge, edge))
    p = log_p.exp() * (3 / size) ** 2
    assert_close(p.sum().item(), 1.0, atol=1e-9, rtol=0)
    assert_close(-torch.where(p > 0, p * log_p, 0).sum().item(), density.entropy, atol=1e-9, rtol=0)
    x = density.sample(50_000)
    assert_close(-density.log_prob(x).mean().item(), density.entropy, atol=0.02, rtol=0)


@pytest.mark.parametrize("data", DENSITIES)
def test_toy_end_to_end(data, tmp_path, capsys):
    metrics = run("toy", data=data, out=tmp_path, animate=True, **TINY)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["run"] == "toy" and record["arguments"]["data"] == data and record["versions"]["nflows"] == "0.14"
    assert record["metrics"] == metrics
    assert metrics["steps"] == 3 and metrics["kl_stderr"] > 0
    assert metrics["kl"] == pytest.approx(metrics["nll"] - metrics["nll_floor"])
    flow = load_flow(tmp_path)
    x = DENSITIES[data]().sample(20_000)
    assert -flow.log_prob(x).mean().item() == pytest.approx(metrics["nll"], abs=0.05)
    printed = capsys.readouterr().out
    for picture in ("densities.png", "training.png", "forming.gif"):
        assert picture in printed
        with Image.open(tmp_path / picture) as image:
            image.load()
            assert picture != "forming.gif" or getattr(image, "n_frames", 1) > 1


def test_a_short_training_is_scored_on_fewer_points(tmp_path, capsys):
    for steps, points in ((3, 10_000), (40, 16_384), (40, 12_000)):
        seams = {"draw": False} | ({"test_points": 12_000} if points == 12_000 else {})
        metrics = run("toy", out=tmp_path, **TINY | {"steps": steps, "batch_size": 4096}, seams=seams)
        assert metrics["test_points"] == points and f"on {points:,} fresh points" in capsys.readouterr().out


def test_what_lies_above_the_colours_is_said_in_words(tmp_path, monkeypatch):
    def look(drawing, path, **_):
        texts.append([axes.get_title() for axes in drawing.axes])

    texts: list[list[str]] = []
    run("toy", out=tmp_path, **TINY)
    monkeypatch.setattr(sys.modules[figures.figure.__module__], "save", look)  # not of what imports it later
    record = ToyRecord.load(tmp_path)
    for factor in (0.0, 1.5):
        record.learned_density = factor * record.true_density
        record.draw_densities(tmp_path / "densities.png")
    assert [any("light blue" in text for text in titles) for titles in texts] == [False, True]
    assert f"light blue:\nabove {record.top:.3g}" in texts[1]


def test_the_pictures_of_a_run_are_drawn_again_without_training(tmp_path, capsys):
    run("toy", out=tmp_path / "run", animate=True, **TINY)
    drawn = pictures_in(tmp_path / "run")
    assert len(drawn) == 3
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    for name in drawn:
        (tmp_path / "run" / name).unlink()
    assert run("toy", load=tmp_path / "run", out=tmp_path / "elsewhere") == {}
    assert pictures_in(tmp_path / "elsewhere") == drawn and not pictures_in(tmp_path / "run")
    run("toy", load=tmp_path)  # the newest run below
    assert pictures_in(tmp_path / "run") == drawn
    assert files == sorted(path.name for path in (tmp_path / "run").iterdir())
    printed = capsys.readouterr().out
    assert all(printed.count(f"/{name}\n") == 3 for name in drawn)


def test_what_a_load_can_not_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="--load trains nothing, so --lr, --seed would be ignored: leave them out"):
        run("toy", load=tmp_path, lr=1.0, seed=3)
    with pytest.raises(FileNotFoundError, match="no pictures.pt in .*: give the directory of a run that has ended"):
        run("toy", load=tmp_path)
    for content in (b"no", {"kind": "ToyRecord", "values": {"entropy": 1.0}}, {"kind": "ToyRecord"}, [1, 2]):
        torch.save(content, tmp_path / "pictures.pt")
        with pytest.raises(ValueError, match="pictures.pt is damaged, or not of this version"):
            run("toy", load=tmp_path)
    (tmp_path / "pictures.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="pictures.pt is damaged, or not of this version"):
        run("toy", load=tmp_path)
    torch.save({"kind": "VAERecord", "values": {}}, tmp_path / "pictures.pt")
    with pytest.raises(ValueError, match="of a run of another script: its pictures are a VAERecord, not a ToyRecord"):
        run("toy", load=tmp_path)


@pytest.mark.parametrize("flow", [name for name in flow_names() if name != "masked-affine"])
def test_every_flow_of_the_catalogue_swaps_in(flow, tmp_path):
    found = run("toy", flow=flow, out=tmp_path, **TINY, seams={"test_points": 1000, "draw": False})
    assert math.isfinite(found["kl"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "three-gaussians"}, "unknown data 'three-gaussians'; known: two-gaussians, chequerboard"),
        ({"flow": "affine"}, "unknown flow 'affine'; known: masked-affine"),
        ({"layers": 0}, "layers must be positive, not 0"),
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"batch_size": -4}, "batch_size must be positive, not -4"),
        ({"lr": math.nan}, "lr must be positive, not nan"),
        ({"seconds": 0.0}, "seconds must be positive, not 0.0"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("toy", **arguments, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be written to"):
        run("toy", out=tmp_path / "file", **TINY)


def test_command_line_says_a_mistake_in_one_line(tmp_path):
    script = Path(__file__).parent.parent / "runs/toy.py"
    done = subprocess.run(
        [sys.executable, script, "--flow", "nosuch"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: unknown flow 'nosuch'")
    assert len(done.stderr.splitlines()) == 1


def test_nan_keeps_the_last_good_weights(tmp_path):
    with pytest.raises(RuntimeError, match=r"at step \d+.*saved in .*flow.safetensors"):
        run("toy", out=tmp_path, **TINY | {"lr": 1e30, "steps": 50})
    assert all(parameter.isfinite().all() for parameter in load_flow(tmp_path).parameters())


def test_no_earlier_results_stand_beside_the_weights_of_a_run_that_ends_by_nan(tmp_path, capsys):
    run("toy", out=tmp_path, **TINY)
    assert (tmp_path / "metrics.json").is_file() and (tmp_path / RECORD).is_file()
    capsys.readouterr()
    with pytest.raises(NotFinite):
        run("toy", out=tmp_path, **TINY | {"lr": 1e30, "steps": 50})
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / RECORD).exists()
    assert "removed" in capsys.readouterr().out
    load_flow(tmp_path)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    def stops(self, n, sample=TwoGaussians.sample):
        drawn.append(n)
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return sample(self, n)

    drawn, arguments = [], {"steps": 20, "layers": 2, "hidden": (8,), "batch_size": 32}
    whole = run("toy", out=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(TwoGaussians, "sample", stops)
        assert run("toy", out=tmp_path / "parts", **arguments)["interrupted"]
    assert [path.parent.name for path in tmp_path.rglob(STATE)] == ["parts"]
    resumed = run("toy", out=tmp_path / "parts", resume=True, keep_state=True, **arguments)
    assert resumed["kl"] == whole["kl"] and resumed["steps"] == 20 and "interrupted" not in resumed
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: the run in .*whole has ended\. Without --resume"):
        run("toy", out=tmp_path / "whole", resume=True, **arguments)
    with pytest.raises(ValueError, match="belongs to another training: lr was 0.005, not 0.1"):
        run("toy", out=tmp_path / "parts", resume=True, lr=0.1, **arguments)


def test_a_kl_that_no_density_has_is_said_to_be_wrong(tmp_path, capsys, monkeypatch):
    impossible = {"nll": -7.0, "nll_floor": -1.3, "kl": -5.7, "kl_stderr": 0.1, "round_trip": 0.0}
    monkeypatch.setattr(toy, "score_density", lambda *_: impossible | {"round_trip_worst": 0.0})
    run("toy", out=tmp_path, **TINY, seams={"draw": False})
    assert "a KL below 0 can't be: log_prob is no density. Why? python -m adapters.check" in capsys.readouterr().out
