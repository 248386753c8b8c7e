"""What layers, flows, distributions, priors and preprocessing say of themselves: one short line each."""

import re

import pytest
import torch

from adapters import FlowDistribution, MaskedCouplingLayer, build_flow, checkerboard_mask, flow_names, half_mask
from adapters.networks import MLP
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from adapters.priors import FlowPrior, MixturePrior, StandardNormalPrior, VampPrior
from adapters.vae import Encoder
from adapters.words import mask_in_words
from tests.examples import examples

OURS = {name: example for name, example in examples().items() if name.startswith("hand_written:")}


def assert_one_short_line(thing: object) -> str:
    said = repr(thing)
    assert said.startswith(type(thing).__name__) and "\n" not in said and len(said) < 160, said
    return said


@pytest.mark.parametrize("name", flow_names())
@pytest.mark.parametrize("context_features", [None, 3])
def test_a_flow_of_the_catalogue(name, context_features):
    flow = build_flow(name, 4, context_features, layers=2, hidden_features=(8,))
    said = assert_one_short_line(flow)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    assert f"{name}, 2 layers, data 4" in said and f"{parameters:,} parameters" in said
    assert (f"context {context_features}" in said) == (context_features is not None)
    assert "\n" in repr(flow.transform)  # the tree is still to be had
    context = None if context_features is None else torch.zeros(5, context_features)
    assert_one_short_line(FlowDistribution(flow, context))
    assert_one_short_line(FlowPrior(flow))


@pytest.mark.parametrize("name", OURS)
def test_a_layer_of_ours(name):
    layer = OURS[name].make()
    if type(layer).__module__.startswith("adapters.layers") and not hasattr(layer, "_transforms"):
        assert "parameters" in assert_one_short_line(layer)
        assert_one_short_line(layer.to("meta"))


@pytest.mark.parametrize(
    "thing, words",
    [
        (Standardize(torch.zeros(784), torch.ones(784)), "Standardize(784)"),
        (Logit(1e-6, 2.0), "Logit([0, 2], alpha 1e-06)"),
        (Probit(), "Probit([0, 1], alpha 1e-06)"),
        (Marginals(torch.ones(784, 256)), "Marginals(784 features, 256 levels)"),
        (StandardNormalPrior(7), "StandardNormalPrior(latent 7)"),
        (MixturePrior(2, 10), "MixturePrior(latent 2, 10 components, 50 parameters)"),
        (VampPrior(Encoder(2, 5, (3,)), torch.ones(4, 5)), "VampPrior(4 pseudo-inputs, 58 parameters)"),
        (
            MaskedCouplingLayer(MLP(784, 784, (1,)), MLP(784, 784, (1,)), checkerboard_mask(28, 28)),
            "MaskedCouplingLayer(chequerboard 28×28, 392 of 784 unchanged, 4,706 parameters)",
        ),
    ],
)
def test_words(thing, words):
    assert assert_one_short_line(thing) == words


@pytest.mark.parametrize(
    "mask, words",
    [
        (checkerboard_mask(2), "chequerboard 2, 1 of 2 unchanged"),
        (1 - checkerboard_mask(4, 4), "inverse chequerboard 4×4, 8 of 16 unchanged"),
        (half_mask(6), "first half of 6, 3 of 6 unchanged"),
        (1 - half_mask(5), "second half of 5, 3 of 5 unchanged"),
        (torch.zeros(3), "elementwise 3"),
        (torch.tensor([[1, 1], [1, 0]]), "mask 2×2, 3 of 4 unchanged"),
        (torch.ones(5, device="meta"), "mask 5"),
    ],
)
def test_a_mask(mask, words):
    assert mask_in_words(mask) == words


def test_no_repr_lists_numbers():
    flow = build_flow("masked-affine", 784, layers=2, preprocess=Standardize(torch.zeros(784), torch.ones(784)))
    for thing in (flow, flow.transform, FlowDistribution(flow)):
        assert not re.search(r"\d\D+(\d+\.?\d*, ){9}", repr(thing))
