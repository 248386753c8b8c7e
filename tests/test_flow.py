"""The public face of a flow: its two parts, data → noise and back, and what is refused on the way."""

import re

import nflows.flows
import numpy as np
import pytest
import torch
from nflows.transforms import CompositeTransform, InverseNotAvailable, MultiscaleCompositeTransform, SqueezeTransform
from pyro.distributions import ConditionalTransformModule, TransformModule
from torch import nn
from torch.testing import assert_close

from adapters import as_flow, as_transform, build_flow, flow_names, to_library
from adapters.bridges import bridges, installed
from adapters.flow import Flow, StandardNormal
from adapters.parts import embedding_of
from tests.laws import batch, context_for, randomise
from tests.test_bridges import MODELS


def small(name="masked-affine", context_features=None):
    torch.manual_seed(0)
    return randomise(build_flow(name, 4, context_features, layers=2, hidden_features=(8,)), scale=0.1).eval()


def squeezed():
    """Images ``(1, 4, 4)`` as noise ``(16,)``."""
    transform = MultiscaleCompositeTransform(1)
    transform.add_transform(SqueezeTransform(), (4, 2, 2))
    return Flow(transform, StandardNormal([16]), (1, 4, 4)).double()


class Embedded(Flow):
    """A flow that sees its context of width 6 through a network."""

    def __init__(self, flow):
        nflows.flows.Flow.__init__(self, flow.transform, flow.base, nn.Linear(6, flow.context_features).double())
        self.event_shape, self.context_features = flow.event_shape, 6


FLOWS = {
    **{name: lambda name=name: small(name) for name in flow_names()},
    **{f"{name}, conditional": lambda name=name: small(name, 3) for name in flow_names()},
    "of another shape": squeezed,
    "embedded": lambda: Embedded(small(context_features=3)),
}


@pytest.mark.parametrize("name", FLOWS)
def test_encode_and_decode_are_the_transform_and_its_inverse(name):
    flow = FLOWS[name]()
    x, context = batch(5, *flow.event_shape), context_for(flow.context_features, 5)
    given = embedding_of(flow)(context)
    noise = flow.encode(x, context)
    assert_close(noise, flow.transform(x, given)[0], rtol=0, atol=0)
    assert_close(flow.log_prob(x, context), flow.base.log_prob(noise, given) + flow.transform(x, given)[1])
    assert_close(flow.decode(noise, context), flow.transform.inverse(noise, given)[0], rtol=0, atol=0)
    assert_close(flow.decode(noise, context), x, rtol=0, atol=1e-4)
    assert_close(flow.transform_to_noise(x, context), noise, rtol=0, atol=0)
    none = None if context is None else context[:0]
    assert flow.encode(x[:0], none).shape == (0, *noise.shape[1:])
    assert flow.decode(noise[:0], none).shape == (0, *flow.event_shape)


@pytest.mark.parametrize("name", MODELS)
def test_a_flow_of_any_library_has_them_and_goes_out_to_every_library(name):
    torch.manual_seed(0)
    model = MODELS[name]
    flow = as_flow(randomise(model.make()).eval() if isinstance(model.make(), nn.Module) else model.make())
    flow = flow.double().eval()
    x, context = batch(4, *model.event_shape), context_for(model.context_features, 4)
    if name.endswith("circular"):
        x = x.clamp(-1, 1)
    noise = flow.encode(x, context)
    assert_close(noise, flow.transform(x, context)[0])
    if model.samples:
        assert_close(flow.decode(noise, context), flow.transform.inverse(noise, context)[0])
    else:
        with pytest.raises(InverseNotAvailable):
            flow.decode(noise, context)
    for library in (library for bridge in filter(installed, bridges()) for library in bridge.LIBRARIES):
        exported = to_library(library, flow)
        back = as_transform(exported)
        assert_close(back(x, context)[0], noise)
        if library == "pyro":
            assert isinstance(exported, TransformModule if context is None else ConditionalTransformModule)
        if noise.shape == x.shape:
            bridge = next(bridge for bridge in bridges() if library in bridge.LIBRARIES)
            expected = nflows.flows.Flow(back, StandardNormal(x.shape[1:]).double()).log_prob(x, context)
            assert_close(bridge.native_log_prob(exported, x, context), expected)


@pytest.mark.parametrize("call", ["encode", "decode", "log_prob", "transform_to_noise"])
def test_each_call_checks_what_it_is_given(call):
    plain, conditional, other = small().float(), small(context_features=3).float(), squeezed().float()
    role, what = ("noise", "decode of this flow") if call == "decode" else ("inputs", "this flow")
    x, context = batch(5, 4).float(), batch(5, 3).float()
    refused = [
        (plain, (x.tolist(),), TypeError, f"the {role} of this flow must be a torch.Tensor, not a list"),
        (plain, (np.ones((5, 4)),), TypeError, f"the {role} of this flow must be a torch.Tensor, not a numpy.ndarray"),
        (plain, (x.double(),), TypeError, rf"its {role} of torch.float64: give {role}.to\(torch.float32\)"),
        (plain, (x.long(),), TypeError, rf"its {role} of torch.int64: give {role}.to\(torch.float32\)"),
        (plain, (x.to("meta"),), ValueError, f"this flow is on cpu, its {role} on meta"),
        (plain, (x[0],), ValueError, rf"{what} takes inputs of shape \(batch, 4\), not \(4,\)"),
        (plain, (x[:, :3],), ValueError, rf"{what} takes inputs of shape \(batch, 4\), not \(5, 3\)"),
        (plain, (x[:0, :3],), ValueError, rf"{what} takes inputs of shape \(batch, 4\), not \(0, 3\)"),
        (plain, (x, context), ValueError, r"unconditional, but a context of shape \(5, 3\) was given"),
        (conditional, (x,), ValueError, r"this flow is conditional: give a context of shape \(batch, 3\)"),
        (conditional, (x, context[:4]), ValueError, "the context of this flow has 4 rows for 5 inputs"),
        (conditional, (x, context[:, :2]), ValueError, r"the context of this flow takes .* \(batch, 3\), not \(5, 2\)"),
        (conditional, (x, context.numpy()), TypeError, "the context of this flow must be a torch.Tensor"),
        (conditional, (x, context.double()), TypeError, "this flow is of torch.float32, its context of torch.float64"),
        (conditional, (x, context.to("meta")), ValueError, "this flow is on cpu, its context on meta"),
    ]
    shapes = [(16,), (1, 4, 4)]  # of its noise, and of its data
    right, wrong = shapes if call == "decode" else reversed(shapes)
    expected = ", ".join(map(str, ("batch", *right)))
    message = re.escape(f"{what} takes inputs of shape ({expected}), not {(5, *wrong)}")
    refused.append((other, (batch(5, *wrong),), ValueError, message))
    for flow, given, kind, message in refused:
        with pytest.raises(kind, match=message):
            getattr(flow, call)(*given)


def test_a_part_is_replaced_where_it_is_kept():
    flow, other, x = small(), small("nflows-rqs"), batch(5, 4)
    names = set(other.state_dict())
    flow.transform, flow.base = other.transform, other.base
    assert flow.transform is other.transform and flow.base is other.base
    assert set(flow.state_dict()) == names
    assert_close(flow.log_prob(x), other.log_prob(x), rtol=0, atol=0)
    flow.transform = CompositeTransform([])
    assert_close(flow.encode(x), x)
