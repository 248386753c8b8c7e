"""build_flow, save_flow and load_flow: what they make, keep and refuse."""

import json

import pytest
import safetensors.torch
import torch
from nflows.flows import Flow as NflowsFlow
from torch.testing import assert_close

from adapters import build_flow, flow_names, load_flow, random_mask, save_flow
from adapters.masks import pyramid_masks
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from tests.laws import autograd_log_det, batch, randomise


@pytest.mark.parametrize("name", flow_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_flow_comes_back_the_same(name, dtype, tmp_path):
    masks = [random_mask(4), random_mask(4), random_mask(4)]
    data = batch(50, 4).float()
    flow = build_flow(name, 4, 2, 3, (8, 8), masks, "tanh", preprocess=Standardize.of(data))
    randomise(flow).to(dtype)
    random_state = torch.get_rng_state()
    save_flow(flow, tmp_path / "run")
    loaded = load_flow(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), random_state), "loading must leave the random state alone"
    x, context = data.to(dtype), batch(50, 2, seed=3).to(dtype)
    assert_close(loaded.log_prob(x, context), flow.log_prob(x, context), atol=0, rtol=0)
    assert loaded.sample(3, context).dtype == dtype
    save_flow(loaded, tmp_path / "again")
    assert (tmp_path / "again/flow.safetensors").read_bytes() == (tmp_path / "run/flow.safetensors").read_bytes()


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


def test_bad_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no flow.safetensors in"):
        load_flow(tmp_path)
    path = save_flow(build_flow("masked-affine", 2, layers=2), tmp_path)
    whole = path.read_bytes()
    for kept in (0, 5, 200, len(whole) - 3):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="damaged or truncated"):
            load_flow(tmp_path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no flow's recipe"):
        load_flow(tmp_path)
    path.write_bytes(whole)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    safetensors.torch.save_file(tensors, path, {"recipe": json.dumps(recipe | {"hidden_features": [5]})})
    with pytest.raises(ValueError, match="are those of another flow than masked-affine"):
        load_flow(tmp_path)


def test_a_flow_that_no_recipe_rebuilds_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="only a flow made by build_flow"):
        save_flow(NflowsFlow(None, None), tmp_path)

    class MyTransform(Standardize):
        pass

    flow = build_flow("masked-affine", 2, preprocess=MyTransform(torch.zeros(2), torch.ones(2)))
    with pytest.raises(TypeError, match="preprocess of Standardize, Logit, Probit, Marginals, not MyTransform"):
        save_flow(flow, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "masked-afine"}, ValueError, "unknown flow 'masked-afine'; known: masked-affine, "),
        ({"features": 0}, ValueError, "features must be a positive integer, not 0"),
        ({"layers": 0}, ValueError, "layers must be a positive integer, not 0"),
        ({"layers": 2.5}, ValueError, "layers must be a positive integer, not 2.5"),
        ({"hidden_features": (8, -1)}, ValueError, r"hidden_features\[1\] must be a positive integer, not -1"),
        ({"context_features": 0}, ValueError, "context_features must be a positive integer, not 0"),
        ({"activation": "rellu"}, ValueError, "unknown activation 'rellu'; known: relu, "),
        ({"masks": [torch.ones(3)]}, ValueError, r"each mask must have shape \(4,\), but one has \(3,\)"),
        ({"bins": 8}, TypeError, "masked-affine has no option 'bins'; it has: scale_bound, net, dropout"),
        ({"features": 1}, ValueError, "a coupling flow needs at least 2 features, not 1"),
        ({"name": "masked-spline", "bins": 1}, ValueError, "bins must be at least 2, not 1"),
        ({"name": "nflows-maf", "hidden_features": (8, 9)}, ValueError, r"\(8, 9\) must all be equal"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        build_flow(**{"name": "masked-affine", "features": 4, **arguments})


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
