"""build_flow: what it makes, whatever it is given; and the preprocessing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from torch.testing import assert_close

import adapters.catalogue
import adapters.layers
from adapters import build_flow, checkerboard_mask, flow_names, random_mask
from adapters.catalogue import _flows, describe_flow, flow_options
from adapters.masks import pyramid_masks
from adapters.networks import ConvNet
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from tests.laws import autograd_log_det, batch, randomise


def test_a_flow_is_an_nflows_flow_and_its_base_keeps_the_dtype():
    flow = build_flow("masked-affine", 3)
    assert isinstance(flow, NflowsFlow)
    assert flow.sample(2).dtype == torch.float32
    samples, log_prob = flow.double().sample_and_log_prob(2)
    assert samples.dtype == log_prob.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in flow_names() if name.startswith("masked")])
def test_autocast_leaves_the_arithmetic_on_data_in_their_precision(name):
    flow = randomise(build_flow(name, 4, layers=2, hidden_features=(8, 8)), scale=0.1).float()
    x = 2 * batch(200, 4).float()
    x[:4] = torch.tensor([4.0, -4.0, 3.9999, 0.0])[:, None]  # the ends of a spline's box
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = flow.log_prob(x)
        samples = flow.sample(20)
    assert log_prob.dtype == samples.dtype == torch.float32
    assert (log_prob - flow.log_prob(x)).abs().median() < 0.05
    log_prob.mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


def test_a_flow_that_cannot_be_built_here_is_not_listed(uninstall):
    uninstall("zuko")
    assert "nflows-rqs" in flow_names() and not [name for name in flow_names() if name.startswith("zuko")]
    for call in (build_flow, flow_options, describe_flow):
        with pytest.raises(ImportError, match=r"zuko is not installed: pip install 'flow-adapters\[zuko\]'"):
            call("zuko-nsf", 3) if call is build_flow else call("zuko-nsf")
    with pytest.raises(ValueError, match="unknown flow 'zuko-nfs'; known: masked-affine, "):
        build_flow("zuko-nfs", 3)


def test_a_library_is_imported_only_to_build_its_flows():
    program = """
import sys
from adapters import flow_names
from adapters.bridges import bridges
from adapters.catalogue import native_flows
flow_names(), native_flows()
assert not [bridge for bridge in bridges() if bridge.EXTRA and bridge.PACKAGES[0] in sys.modules]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_new_file_needs_no_flow_and_names_are_unique(tmp_path, monkeypatch):
    """A file without FLOWS is no trouble, one with some is found, and two flows of one name are refused."""
    for package in (adapters.layers, adapters.catalogue):
        directory = tmp_path / package.__name__
        directory.mkdir()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(directory)])
        (directory / "my_idea.py").write_text("def unfinished(): ...")
    mine = tmp_path / "adapters.catalogue" / "mine.py"
    mine.write_text("from adapters.catalogue.hand_written import masked_affine\nFLOWS = {'mine': masked_affine}")
    found = list(_flows.__wrapped__())
    assert found[5] == "mine" and found[:5] + found[6:] == list(_flows())
    mine.write_text("FLOWS = {'zuko-nsf': print}")
    del sys.modules["adapters.catalogue.mine"]
    with pytest.raises(ValueError, match="two flows are named 'zuko-nsf': in adapters.catalogue.zuko and .*mine"):
        _flows.__wrapped__()
    del sys.modules["adapters.catalogue.mine"], sys.modules["adapters.catalogue.my_idea"]


@pytest.mark.parametrize("name", flow_names())
def test_a_flow_is_built_under_any_default_device(name):
    arguments = (name, 4, 2, 2, (8, 8))
    masks, preprocess = [torch.tensor([1, 0, 0, 1])], Logit()
    with torch.device("meta"):
        for flow in (build_flow(*arguments), build_flow(*arguments, masks=masks, preprocess=preprocess)):
            assert {tensor.device.type for tensor in [*flow.parameters(), *flow.buffers()]} == {"meta"}
    assert build_flow(*arguments).log_prob(torch.zeros(3, 4), torch.zeros(3, 2)).isfinite().all()


def test_a_conditioner_is_on_the_default_device_wherever_its_masks_are():
    reads = checkerboard_mask(8, 8).flatten()
    with torch.device("meta"):
        network = ConvNet(reads, 1 - reads, 2, (4,), 3)
        assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"meta"}
        assert network(torch.randn(5, 32), torch.randn(5, 3)).shape == (5, 64)


def test_one_mask_is_as_good_as_another():
    """Bool, integer, list or array: the flow is the same."""
    x, plain = torch.randn(5, 4), [1, 0, 0, 1]
    kinds = [plain, torch.tensor(plain), torch.tensor(plain).bool(), np.array(plain), torch.tensor(plain).double()]
    for name in flow_names():
        densities = []
        for mask in kinds:
            torch.manual_seed(0)
            flow = build_flow(name, 4, layers=2, hidden_features=(8,), masks=[mask])
            densities.append(flow.log_prob(x))
        assert all(torch.equal(density, densities[0]) for density in densities)


def test_numpys_numbers_are_numbers():
    flow = build_flow(
        "masked-spline",
        np.int64(4),
        np.int32(2),
        np.int64(2),
        np.array([8, 8]),
        bins=np.int64(5),
        minimum=np.float32(0.01),
    )
    plain = {key: value for key, value in flow.blueprint.items() if key != "masks"}
    assert json.loads(json.dumps(plain)) == plain | {"hidden_features": [8, 8]}
    assert checkerboard_mask(np.int64(2), np.int64(3)).shape == (2, 3) and random_mask(np.int64(5)).shape == (5,)


def test_wrong_shapes_and_contexts_are_refused():
    plain, conditional = build_flow("masked-affine", 3, layers=1), build_flow("masked-affine", 3, 2, layers=1)
    x = torch.randn(5, 3)
    for wrong in (torch.randn(5, 4), torch.randn(3), torch.randn(5, 3, 1)):
        with pytest.raises(ValueError, match=r"this flow takes inputs of shape \(batch, 3\), not"):
            plain.log_prob(wrong)
    with pytest.raises(ValueError, match=r"unconditional, but a context of shape \(5, 2\) was given"):
        plain.log_prob(x, torch.randn(5, 2))
    for call in (conditional.log_prob, lambda _: conditional.sample(2), lambda _: conditional.sample_and_log_prob(2)):
        with pytest.raises(ValueError, match=r"conditional: give a context of shape \(batch, 2\)"):
            call(x)
    with pytest.raises(ValueError, match=r"context of this flow takes inputs of shape \(batch, 2\), not \(5, 3\)"):
        conditional.log_prob(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match="the context of this flow has 4 rows for 5 inputs"):
        conditional.log_prob(x, torch.randn(4, 2))


@pytest.mark.parametrize(
    "transform",
    [
        Standardize(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])),
        Logit(0.01, 2),
        Probit(0.01, 2),
        Marginals(torch.tensor([[0.5, 0.2, 0.3], [0.01, 0.9, 0.09]]), high=2),
    ],
)
def test_preprocessing_log_det_is_autograds(transform):
    transform = transform.double()
    x = torch.rand(6, 2, dtype=torch.float64) * 2
    y, log_det = transform(x)
    assert_close(log_det, autograd_log_det(transform, x, None))
    back, inverse_log_det = transform.inverse(y)
    assert_close(back, x)
    assert_close(inverse_log_det, -log_det)


def test_standardize_gives_zero_mean_and_unit_deviation():
    data = 3 * batch(500, 2) + 7
    y, _ = Standardize.of(data)(data)
    assert_close(y.mean(0), torch.zeros(2, dtype=y.dtype), atol=1e-9, rtol=0)
    assert_close(y.std(0), torch.ones(2, dtype=y.dtype))


def test_marginals_alone_are_the_histograms_of_each_pixel():
    """A flow at the identity behind them has density Π_d mass_d(level) / width: the independent pixels' own."""
    levels = torch.tensor([[0, 3], [0, 1], [2, 3], [0, 3]])
    marginals = Marginals.of(levels, number=4, high=1.0, prior=1.0)
    masses = marginals.arguments["masses"]
    assert_close(masses.sum(1), torch.ones(2))
    assert masses[0].argmax() == 0 and masses[1].argmax() == 3 and masses[0, 0] > 0.6
    for name in ("masked-histogram", "masked-affine"):
        flow = build_flow(name, 2, layers=2, preprocess=marginals).double()
        x = (levels + torch.tensor([0.2, 0.9])).double() / 4
        expected = (4 * masses.double().gather(1, levels.T)).log().sum(0)
        assert_close(flow.log_prob(x), expected, atol=1e-4, rtol=0)


def test_edges_group_the_levels_about_equally():
    """The first level is heavier than its share, so it stands alone; the others share what is left."""
    masses = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05], [0.5, 0.1, 0.1, 0.2, 0.1]])
    edges = Marginals(masses).edges(3)
    assert_close(edges, torch.tensor([[0.7, 0.9], [0.5, 0.7]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_image_stacks_samples_have_the_density_they_come_with():
    """Marginals, pyramid and histograms in float32, as runs/mnist.py stacks them; both networks."""
    torch.manual_seed(0)
    levels = torch.randint(0, 256, (50, 64)) * (torch.rand(50, 64) < 0.3)
    masks = pyramid_masks(8, 8)
    for net in ("mlp", "conv"):
        flow = build_flow(
            "masked-histogram", 64, None, len(masks), (8,), masks, preprocess=Marginals.of(levels), net=net, bins=6
        )
        randomise(flow, scale=0.1).float()
        samples, log_prob = flow.sample_and_log_prob(40)
        assert samples.min() >= 0 and samples.max() <= 256 / 255 + 1e-3
        assert_close(flow.log_prob(samples.clamp(0, 256 / 255)), log_prob, atol=0.05, rtol=0)


def test_bad_preprocessing_is_refused():
    with pytest.raises(ValueError, match=r"masses must be positive and of shape \(D, L\), not \(1, 2\)"):
        Marginals(torch.tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"takes data in \[0, 1\], not in \[0.5, 1.5\]"):
        Marginals(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))(torch.tensor([[0.5, 1.5]]))
    with pytest.raises(ValueError, match="std must be positive and finite, but holds 0"):
        Standardize(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="alpha must lie in"):
        Logit(0.5)
    with pytest.raises(ValueError, match="high must be positive"):
        Logit(high=0)
    with pytest.raises(ValueError, match=r"this flow takes data in \[0, 1.0\], not in \[-1, 0.5\]"):
        Logit()(torch.tensor([[-1.0, 0.5]]))
