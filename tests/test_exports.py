"""What goes out to zuko, Pyro and torch: whole flows, transforms that change the shape, copies and pickles."""

import copy
import pickle
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import (
    CompositeTransform,
    InverseTransform,
    MultiscaleCompositeTransform,
    SqueezeTransform,
    Transform,
)
from torch import nn
from torch.testing import assert_close

from adapters import MaskedCouplingLayer, as_flow, as_transform, build_flow, to_library
from adapters.bridges import bridges, libraries
from adapters.flow import Flow, StandardNormal
from adapters.networks import MLP
from tests.laws import batch, context_for, randomise
from tests.test_bridges import image_coupling

LIKE_TORCH = [library for library in ("torch", "pyro", "zuko") if library in libraries()]


def flow_in(library, exported, noise_shape):
    """The library's own flow around the export and a standard normal."""
    base = dist.Normal(torch.zeros(noise_shape).double(), 1.0).to_event(len(noise_shape))
    if library == "zuko":
        from adapters.imports import import_zuko

        lazy = import_zuko().lazy
        normal = import_zuko().distributions.DiagNormal
        zero = torch.zeros(noise_shape).double()
        return lazy.Flow(
            exported, lazy.UnconditionalDistribution(normal, zero, zero + 1, len(noise_shape), buffer=True)
        )
    if isinstance(exported, dist.ConditionalTransformModule):
        return dist.ConditionalTransformedDistribution(base, [exported])
    kind = torch.distributions if library == "torch" else dist
    return kind.TransformedDistribution(base, [exported])


def distribution(library, flow, context=None):
    if library == "zuko":
        return flow(context)
    return flow if context is None else flow.condition(context)


# -- whole flows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("context_features", [None, 2])
def test_a_whole_flow_is_exported_as_its_transform(library, context_features):
    flow = randomise(build_flow("masked-affine", 4, context_features, layers=2, hidden_features=(8,)))
    exported = to_library(library, flow)
    assert as_transform(exported) is flow.transform
    bridge = next(bridge for bridge in bridges() if library in bridge.LIBRARIES)
    x, context = batch(5, 4), context_for(context_features, 5)
    assert_close(bridge.native_log_prob(exported, x, context), flow.log_prob(x, context))
    if library == "pyro":
        kind = dist.TransformModule if context_features is None else dist.ConditionalTransformModule
        assert isinstance(exported, kind)


@pytest.mark.parametrize("library", libraries())
def test_an_embedding_network_goes_out_with_its_flow(library):
    inner = build_flow("masked-affine", 4, 3, layers=2, hidden_features=(8,))
    flow = randomise(NflowsFlow(inner.transform, inner.base, nn.Linear(6, 3)))
    exported = to_library(library, flow)
    bridge = next(bridge for bridge in bridges() if library in bridge.LIBRARIES)
    x, context = batch(5, 4), context_for(6, 5)
    assert_close(bridge.native_log_prob(exported, x, context), flow.log_prob(x, context))
    assert {id(p) for p in as_transform(exported).parameters()} == {id(p) for p in flow.parameters()}


@pytest.mark.parametrize("library", libraries())
def test_no_circle_of_errors(library):
    """What an error names as the way is one."""
    flow = build_flow("masked-affine", 4, layers=1)
    with pytest.raises(TypeError, match="is no transform but a whole flow, .*; its transform is flow.transform$"):
        as_transform(flow)
    native = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.permute(3)])
    with pytest.raises(TypeError, match="as_transform makes one .*transform, and as_flow makes an nflows Flow"):
        to_library(library, native)
    to_library(library, as_flow(native))
    for wrong in (-1, 1.5, True, "3", ((3,),), (3, 1)):
        with pytest.raises((TypeError, ValueError), match="event_dim"):
            to_library(library, flow.transform, event_dim=wrong)


# -- transforms that change the shape ----------------------------------------------------------------------------------


class Flatten(Transform):
    """A datum of any shape as a vector, by someone's own hand."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, inputs, context=None):
        return inputs.flatten(1), inputs.new_zeros(len(inputs))

    def inverse(self, inputs, context=None):
        return inputs.unflatten(1, self.shape), inputs.new_zeros(len(inputs))


def multiscale():
    transform = MultiscaleCompositeTransform(2, split_dim=1)
    shape = transform.add_transform(SqueezeTransform(), (4, 2, 2))
    transform.add_transform(CompositeTransform([]), shape)
    return CompositeTransform([image_coupling(), transform])


def flat():
    return CompositeTransform([image_coupling(), Flatten(1, 4, 4), build_flow("masked-affine", 16, layers=1).transform])


CHANGES = {
    "flat": (flat, (1, 4, 4), (16,)),
    "squeeze": (lambda: CompositeTransform([image_coupling(), SqueezeTransform()]), (1, 4, 4), (4, 2, 2)),
    "multiscale": (multiscale, (1, 4, 4), (16,)),
}


@pytest.mark.parametrize("library", LIKE_TORCH)
@pytest.mark.parametrize("name", CHANGES)
def test_a_transform_may_change_the_shape(name, library):
    make, datum, noise = CHANGES[name]
    torch.manual_seed(0)
    flow = Flow(randomise(make()), StandardNormal(noise).double(), datum)
    x = batch(5, *datum)
    for exported in (to_library(library, flow), to_library(library, flow.transform, event_dim=(datum, noise))):
        native = flow_in(library, exported, noise)
        density = distribution(library, native)
        assert tuple(density.event_shape) == datum and tuple(density.batch_shape) == ()
        assert_close(density.log_prob(x), flow.log_prob(x))
        assert density.sample((2, 3)).shape == (2, 3, *datum)
        assert density.log_prob(density.sample((2, 3))).shape == (2, 3)
        assert tuple(density.expand((2,)).sample().shape) == (2, *datum)
        back = as_flow(native)
        assert tuple(back.event_shape) == datum
        assert_close(back.log_prob(x), flow.log_prob(x))
        assert back.sample(2).shape == (2, *datum)
        assert as_transform(exported) is flow.transform


@pytest.mark.parametrize("library", LIKE_TORCH)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_shape_that_nobody_told_is_refused(name, library):
    make, datum, noise = CHANGES[name]
    if name != "flat":  # a layer of nflows', which is known at once
        with pytest.raises(ValueError, match="Transform changes the shape of a datum: export the whole flow"):
            to_library(library, make(), event_dim=len(datum))
        return
    exported = to_library(library, make().double(), event_dim=len(datum))
    transform = exported(None) if library == "zuko" else exported.inv
    with pytest.raises(ValueError) as error:
        transform(batch(5, *datum))
    assert f"makes noise of shape {noise} of a datum of shape {datum}: export the whole flow" in str(error.value)
    assert f"event_dim=({datum}, {noise})" in str(error.value)


@pytest.mark.parametrize("library", LIKE_TORCH)
def test_changes_of_shape_that_undo_each_other_need_not_be_told(library):
    squeeze = SqueezeTransform()
    transform = CompositeTransform([squeeze, InverseTransform(squeeze), image_coupling()]).double()
    exported, x = to_library(library, transform, event_dim=3), batch(5, 1, 4, 4)
    flow = Flow(transform, StandardNormal((1, 4, 4)), (1, 4, 4))
    assert_close(native_log_prob(library, exported, x, None), flow.log_prob(x))
    stick_breaking = as_transform(dist.transforms.StickBreakingTransform())
    with pytest.raises(ValueError, match="StickBreakingTransform changes the shape of a datum"):
        to_library(library, stick_breaking)
    assert_close(
        as_transform(to_library(library, stick_breaking, event_dim=((4,), (3,)))).inverse(batch(5, 3)),
        stick_breaking.inverse(batch(5, 3)),
    )


# -- copies and pickles ------------------------------------------------------------------------------------------------

COPIES = pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))], ids=["copy", "pickle"]
)


def native_log_prob(library, exported, x, context):
    bridge = next(bridge for bridge in bridges() if library in bridge.LIBRARIES)
    return bridge.native_log_prob(exported, x, context)


def made_exports():
    """Each library's export of a flow, with and without a context, after a call of it."""
    for library in LIKE_TORCH:
        for context_features in (None, 2):
            flow = randomise(build_flow("masked-affine", 4, context_features, layers=2, hidden_features=(8,)))
            exported, x, context = to_library(library, flow), batch(5, 4), context_for(context_features, 5)
            yield library, exported, x, context, native_log_prob(library, exported, x, context).detach()


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))], ids=["copy", "pickle"]
)
def test_exports_are_copied_and_pickled(way):
    for library, exported, x, context, expected in made_exports():
        copied = way(exported)
        assert type(copied) is type(exported)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in exported.parameters()}
        for again in (copied, way(copied)):
            assert_close(native_log_prob(library, again, x, context), expected, rtol=0, atol=0)
            assert type(as_transform(again)) is type(as_transform(exported))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.1)
        assert (native_log_prob(library, copied, x, context) - expected).abs().min() > 1e-6
        assert_close(native_log_prob(library, exported, x, context), expected, rtol=0, atol=0)


@pytest.mark.parametrize("library", LIKE_TORCH)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))], ids=["copy", "pickle"]
)
def test_the_inverse_of_an_export_and_a_flow_around_it_are_copied(way, library):
    """torch's own inverse forgets what it inverts when it is copied."""
    flow = randomise(build_flow("masked-affine", 4, layers=2, hidden_features=(8,)))
    inverse = to_library(library, flow).inv
    native = flow_in(library, inverse, (4,))
    x = batch(5, 4)
    expected = distribution(library, native).log_prob(x)
    assert_close(distribution(library, way(native)).log_prob(x), expected, rtol=0, atol=0)
    assert_close(as_transform(way(inverse))(x), flow.transform.inverse(x))
    bridged = way(as_flow(native))
    assert_close(bridged.log_prob(x), expected)


def test_exports_are_pickled_for_another_process():
    code = (
        "import pickle, sys, torch\n"
        "for library, exported, x, context, expected in pickle.load(sys.stdin.buffer):\n"
        "    from tests.test_exports import native_log_prob\n"
        "    torch.testing.assert_close(native_log_prob(library, exported, x, context), expected, rtol=0, atol=0)\n"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(list(made_exports())), check=True)


def test_freia_asks_an_export_for_the_shape_of_its_outputs_once():
    """A copy is run to tell it, which would cost more than a training step if each new network asked again."""
    from FrEIA.framework import SequenceINN

    calls = []

    class Counted(MaskedCouplingLayer):
        def forward(self, z, context=None):
            calls.append(len(z))
            return super().forward(z, context)

    exported = to_library("freia", Counted(MLP(2, 2), MLP(2, 2), torch.tensor([1.0, 0.0])))
    for _ in range(3):
        network = SequenceINN(2)
        network.append(exported.placed)
    assert calls == [1]
