"""Every library that has a bridge, in and out: the same values, the same density, one network evaluation, clear errors.

A new file in adapters/bridges, and its examples in tests/examples, are held to all of it without a line changed here.
"""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import InverseNotAvailable, LULinear, SqueezeTransform
from nflows.transforms.base import InputOutsideDomain
from pyro.distributions import transforms as pyro_transforms
from torch import nn
from torch.testing import assert_close

from adapters import (
    FlowDistribution,
    MaskedCouplingLayer,
    as_flow,
    as_transform,
    build_flow,
    checkerboard_mask,
    flow_names,
    to_library,
)
from adapters.bridges import bridges, libraries
from adapters.discovery import file_name
from adapters.flow import Flow, StandardNormal
from adapters.networks import MLP
from tests.conftest import MISSING
from tests.counting import counted
from tests.examples import Example, Model, decoders, examples, models
from tests.laws import (
    assert_inputs_unchanged,
    batch,
    context_for,
    law_2_round_trip,
    law_3_direction,
    law_4_samples,
    law_5_context,
    randomise,
)

ROWS = 5


def library_of(name: str) -> str:
    """The bridge that an example or a model is of."""
    return name.partition(":")[0]


BRIDGES = {file_name(bridge): bridge for bridge in bridges()}
EXAMPLES = {name: example for name, example in examples().items() if library_of(name) in BRIDGES}
MODELS = models()


def bridge_of(library: str):
    return next(bridge for bridge in BRIDGES.values() if library in bridge.LIBRARIES)


def decode(library: str, exported, noise, context):
    """x and the log-determinant of noise → data, by the library's own call."""
    return decoders()[file_name(bridge_of(library))](exported, noise, context)


def layers(name: str, context_features: int | None = None):
    return build_flow(name, 4, context_features, layers=2, hidden_features=(8,)).transform


def image_coupling():
    mask = checkerboard_mask(4, 4).unsqueeze(0)
    networks = (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()) for _ in range(2))
    return MaskedCouplingLayer(*networks, mask)


# transforms of the hub, to be exported
HUB = {
    "packed": Example(lambda: layers("masked-affine"), (4,)),
    "spline": Example(lambda: layers("masked-spline"), (4,)),
    "autoregressive": Example(lambda: layers("nflows-maf"), (4,)),
    "context": Example(lambda: layers("masked-affine", 3), (4,), 3),
    "image": Example(image_coupling, (1, 4, 4)),
}
EXPORTS = [(name, library) for name in HUB for library in libraries()]


def made(example: Example):
    """The transform, an input and a context."""
    torch.manual_seed(0)
    transform = randomise(example.make()).eval()
    return transform, batch(ROWS, *example.event_shape), context_for(example.context_features, ROWS)


def exported(library: str, transform, example: Example):
    conditional = example.context_features is not None
    return to_library(library, transform, event_dim=len(example.event_shape), conditional=conditional)


def nflows_log_prob(transform, x, context):
    """Of an nflows flow around the transform."""
    return Flow(transform, StandardNormal(x.shape[1:]).to(x), x.shape[1:], context_width(context)).log_prob(x, context)


def context_width(context):
    return None if context is None else context.shape[1]


@pytest.fixture(params=EXPORTS, ids=lambda pair: "-".join(pair))
def export(request):
    """A transform of the hub, an input, a context, the transform exported, and the library's name."""
    name, library = request.param
    transform, x, context = made(HUB[name])
    return transform, x, context, exported(library, transform, HUB[name]), library


@pytest.fixture(params=MODELS)
def model(request):
    """A library's own flow, that flow as nflows', its entry in MODELS, an input and a context."""
    return made_model(request.param)


def made_model(name: str):
    entry = MODELS[name]
    torch.manual_seed(0)
    native = entry.make()
    flow = randomise(as_flow(native), scale=0.1).eval()
    return native, flow, entry, batch(ROWS, *entry.event_shape), context_for(entry.context_features, ROWS)


def is_weighted(module) -> bool:
    """Whether it is a linear or convolutional layer of a network, which runs once when its network does."""
    return isinstance(getattr(module, "weight", None), nn.Parameter)


# law 2 and law 3 of what goes out


def test_law_2_there_and_back_computes_the_same(export):
    transform, x, context, exported, _ = export
    law_2_round_trip(transform, as_transform(exported), x, context)


def test_law_3_the_librarys_own_density_is_nflows(export):
    transform, x, context, exported, library = export
    with counted() as calls:
        native = bridge_of(library).native_log_prob(exported, x, context)
    assert native.shape == (ROWS,) and native.dtype == x.dtype
    assert_close(native, nflows_log_prob(transform, x, context))
    runs = {calls[module] for module in calls if is_weighted(module)}
    assert runs <= {1}, "one network evaluation is enough for a log_prob"


def test_law_3_noise_to_data(export):
    transform, noise, context, exported, library = export
    assert_close(decode(library, exported, noise, context), transform.inverse(noise, context))


def test_training_an_export_trains_the_original(export):
    transform, x, context, exported, library = export
    before = nflows_log_prob(transform, x, context)
    optimiser = torch.optim.Adam(transform.parameters(), lr=0.01)
    for _ in range(2):  # a second backward pass: no graph may be kept
        optimiser.zero_grad()
        native = bridge_of(library).native_log_prob(exported, x, context)
        native.mean().neg().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in transform.parameters())
        optimiser.step()
    after = nflows_log_prob(transform, x, context)
    assert (after - before).abs().min() > 1e-6
    assert_close(bridge_of(library).native_log_prob(exported, x, context), after)


def test_an_export_can_be_copied_after_a_call(export):
    _, x, context, exported, library = export
    density = bridge_of(library).native_log_prob
    before = density(exported, x, context)
    clone = copy.deepcopy(exported)
    for parameter in as_transform(clone).parameters():
        parameter.data.add_(0.1)
    assert_close(density(exported, x, context), before, rtol=0, atol=0)
    assert (density(clone, x, context) - before).abs().min() > 1e-6


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("library", ["nflows", "normflows", "freia"])
def test_an_export_can_be_pickled_after_a_call(library, name):
    transform, x, context = made(HUB[name])
    native = exported(library, transform, HUB[name])
    density = bridge_of(library).native_log_prob
    before = density(native, x, context)
    assert_close(density(pickle.loads(pickle.dumps(native)), x, context), before, rtol=0, atol=0)


def test_another_process_unpickles_an_export(tmp_path):
    """One that has imported neither this package nor the libraries."""
    for library in ("normflows", "freia"):
        torch.save(exported(library, made(HUB["packed"])[0], HUB["packed"]), tmp_path / library)
    program = """
import sys, torch
for library in ("normflows", "freia"):
    print(torch.load(f"{sys.argv[1]}/{library}", weights_only=False).transform(torch.ones(1, 4).double())[1].item())
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    expected = made(HUB["packed"])[0](torch.ones(1, 4).double())[1].item()
    assert [float(line) for line in result.stdout.split()] == [pytest.approx(expected)] * 2


@pytest.mark.parametrize("library", [library for library in ("zuko", "pyro", "torch") if library in libraries()])
def test_leading_batch_dimensions(library):
    """The libraries whose transforms take any batch shape take it from us; the context broadcasts with it."""
    for name in ("packed", "image", "context"):
        transform, _, _ = made(HUB[name])
        event = HUB[name].event_shape
        noise, context = batch(2, 3, *event), context_for(HUB[name].context_features, 3)
        x, log_det = decode(library, exported(library, transform, HUB[name]), noise, context)
        rows = None if context is None else context.expand(2, *context.shape).flatten(0, 1)
        expected, expected_log_det = transform.inverse(noise.flatten(0, 1), rows)
        assert_close(x, expected.view_as(noise))
        assert_close(log_det, expected_log_det.view(2, 3))


@pytest.mark.parametrize(("inner", "outer"), list(itertools.product(libraries(), repeat=2)))
def test_chains_of_libraries(inner, outer):
    transform, x, _ = made(HUB["packed"])
    chain = as_transform(to_library(outer, as_transform(to_library(inner, transform))))
    assert_close(chain(x), transform(x))
    assert_close(chain.inverse(x), transform.inverse(x))


FIRSTS = {  # of each library, its first example without a context and its first with one
    (library_of(name), example.context_features is not None): name for name, example in reversed(EXAMPLES.items())
}


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("name", FIRSTS.values())
def test_a_librarys_own_layer_is_scored_by_every_other_library(name, library):
    """Unlike the chain above, nothing here is unwrapped on the way: foreign layer → nflows → another library."""
    transform, x, context = made(EXAMPLES[name])
    native = bridge_of(library).native_log_prob(exported(library, transform, EXAMPLES[name]), x, context)
    assert_close(native, nflows_log_prob(transform, x, context))


def is_differentiable(model: Model) -> bool:
    """Whether a gradient goes through a sample to the parameters."""
    flow = as_flow(model.make()).double()
    if not flow.sample(3).requires_grad:
        return False
    flow.sample(3).sum().backward()
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())


def keeps_float64(model: Model) -> bool:
    flow = as_flow(model.make()).double()
    samples, log_prob = flow.sample_and_log_prob(3)
    return samples.dtype == log_prob.dtype == flow.log_prob(samples).dtype == torch.float64


def bridge_table() -> list[str]:
    """The README's table of what goes where, found by doing it."""
    rows = ["| | layer in | out as | whole model | conditional | image | differentiable sample | float64 |"]
    rows.append("|---|" + "---|" * (rows[0].count("|") - 2))
    for name, bridge in BRIDGES.items():
        if name == "nflows" or name in MISSING:  # the hub itself, or not installed
            continue
        torch.manual_seed(0)
        transforms, models = (
            [entry for key, entry in entries.items() if library_of(key) == name] for entries in (EXAMPLES, MODELS)
        )
        sampled = [model for model in models if model.samples and model.context_features is None]
        transform, x, _ = made(HUB["packed"])
        outs = [f'`"{o}"`' for o in bridge.LIBRARIES if as_transform(to_library(o, transform))(x)[0].shape == x.shape]
        columns = [
            bool(transforms),
            ", ".join(outs),
            bool(models),
            any(entry.context_features is not None for entry in transforms + models),
            any(len(entry.event_shape) == 3 for entry in transforms + models),
            any(map(is_differentiable, sampled)),
            all(map(keeps_float64, sampled)),
        ]
        cells = [c if isinstance(c, str) else "yes" if c else "no" for c in columns]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def test_the_readmes_table_is_true():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for row in bridge_table():
        assert row in readme, "\n".join(bridge_table())


# what comes in: the whole models of each library


def test_law_3_a_models_density_is_the_librarys(model):
    native, flow, entry, x, context = model
    with counted() as calls:
        expected = entry.log_prob(native, x, context)
    with counted() as our_calls:
        law_3_direction(flow, expected, x, context)
    for network in filter(is_weighted, our_calls):
        assert our_calls[network] <= max(1, calls[network]), "more network evaluations than the library itself needs"


def test_law_4_a_models_samples_have_the_log_prob_they_come_with(model):
    _, flow, entry, _, context = model
    if not entry.samples:
        with pytest.raises((InverseNotAvailable, NotImplementedError, ValueError)):
            flow.sample(3, context)
        return
    law_4_samples(flow, entry.event_shape, context, tolerance=1e-5)


def test_law_1_no_call_of_a_model_changes_its_inputs(model):
    _, flow, entry, x, context = model
    assert_inputs_unchanged(flow.log_prob, x, context)
    if entry.samples:
        assert_inputs_unchanged(flow.transform.inverse, flow.transform(x, context)[0].detach(), context)
        assert_inputs_unchanged(lambda rows: flow.sample_and_log_prob(3, rows), context)


def test_law_4_a_models_sample_is_scored_as_any_other_value(model):
    """What a distribution remembers of its own sample is what it computes for a copy of it."""
    _, flow, entry, _, context = model
    if not entry.samples:
        return
    p = FlowDistribution(flow, context, validate_args=False)
    for x in (p.sample((3,)), p.rsample((3,)) if p.has_rsample else p.sample((2,))):
        assert_close(p.log_prob(x), p.log_prob(x.clone()), atol=1e-5, rtol=1e-5)


def test_law_5_contexts_of_a_model(model):
    _, flow, _, x, context = model
    if context is None:
        return
    law_5_context(flow, x, context)


def test_a_model_trains_with_no_stale_value(model):
    native, flow, entry, x, context = model
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        return
    before = flow.log_prob(x, context)
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        flow.log_prob(x, context).mean().neg().backward()
        assert all(p.grad is not None for p in parameters)
        optimiser.step()
    after = flow.log_prob(x, context)
    assert (after - before).abs().max() > 1e-6
    assert_close(entry.log_prob(native, x, context).to(after), after)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_state_dict_round_trips(name):
    _, flow, entry, x, context = made_model(name)
    torch.manual_seed(5)
    other = as_flow(entry.make()).double().eval()
    other.load_state_dict(flow.state_dict())
    assert_close(other.log_prob(x, context), flow.log_prob(x, context), rtol=0, atol=0)


def test_a_model_can_be_copied_after_a_call(model):
    _, flow, _, x, context = model
    before = flow.log_prob(x, context)
    clone = copy.deepcopy(flow)
    assert_close(clone.log_prob(x, context), before, rtol=0, atol=0)
    trained = [p for p in clone.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.mul_(1.1).add_(0.1)
    assert_close(flow.log_prob(x, context), before, rtol=0, atol=0)
    assert not trained or (clone.log_prob(x, context) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_dtype(name):
    entry = MODELS[name]
    torch.manual_seed(0)
    flow = as_flow(entry.make()).eval()
    solver = any(getattr(module, "atol", 1.0) < 1e-7 for module in flow.modules())  # finer than float32: never done
    for dtype in (torch.float64,) if solver else (torch.float32, torch.float64):
        flow.to(dtype)
        context = context_for(entry.context_features, ROWS)
        context = None if context is None else context.to(dtype)
        assert flow.log_prob(batch(ROWS, *entry.event_shape).to(dtype), context).dtype == dtype
        if entry.samples:
            assert flow.sample(2, context).dtype == dtype


# the catalogue


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("name", flow_names())
def test_one_network_evaluation_for_a_log_prob(name, context_features):
    torch.manual_seed(0)
    flow = build_flow(name, 4, context_features, layers=2, hidden_features=(8, 8))
    with counted() as calls:
        flow.log_prob(torch.randn(ROWS, 4), None if context_features is None else torch.randn(ROWS, 3))
    networks = [module for module in flow.modules() if is_weighted(module)]
    assert networks and all(calls[network] == 1 for network in networks)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in flow_names()
        if name.startswith(("freia-", "normflows-"))
        and (name != "normflows-rqs" or torch.__version__ >= (2, 10))  # earlier ones can't trace its boolean indices
    ],
)
def test_a_compiled_flow_and_an_exported_one_compute_the_same(name, monkeypatch):
    distribution = torch.distributions.Distribution
    monkeypatch.setattr(distribution, "_validate_args", distribution._validate_args)  # torch.compile switches it off

    class LogProb(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = build_flow(name, 4, layers=2, hidden_features=(8,)).eval()

        def forward(self, x):
            return self.flow.log_prob(x)

    module, x = LogProb(), torch.randn(ROWS, 4)
    expected = module(x)
    torch._dynamo.reset()
    assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    program = torch.export.export(module, (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(x), expected)


# what is refused


def check_refusals(flow, x, context):
    wide = (*x.shape[:-1], x.shape[-1] + 1)
    with pytest.raises(ValueError, match=rf"not \({', '.join(map(str, wide))}\)"):
        flow.log_prob(batch(*wide), context)
    if context is None:
        with pytest.raises(ValueError, match=rf"context of shape \({ROWS}, 2\) was given"):
            flow.log_prob(x, batch(ROWS, 2))
        return
    width = context.shape[1]
    for call in (flow.log_prob, lambda _: flow.sample(2), lambda _: flow.sample_and_log_prob(2)):
        with pytest.raises(ValueError, match=rf"context of shape \(batch, {width}\)"):
            call(x)
    with pytest.raises(ValueError, match=rf"not \({ROWS}, {width + 1}\)"):
        flow.log_prob(x, batch(ROWS, width + 1))
    with pytest.raises(ValueError, match=rf"{ROWS - 1} rows for {ROWS} inputs"):
        flow.log_prob(x, context[1:])


def test_a_model_refuses_wrong_shapes_and_contexts(model):
    _, flow, _, x, context = model
    check_refusals(flow, x, context)


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("name", flow_names())
def test_a_catalogue_flow_refuses_wrong_shapes_and_contexts(name, context_features):
    flow = build_flow(name, 4, context_features, layers=2, hidden_features=(8, 8)).double()
    check_refusals(flow, batch(ROWS, 4), context_for(context_features, ROWS))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_transform_refuses_wrong_contexts(name):
    example = EXAMPLES[name]
    transform, x, context = made(example)
    if context is None:
        with pytest.raises(ValueError, match=rf"context of shape \({ROWS}, 2\) was given"):
            transform(x, batch(ROWS, 2))
        return
    for wrong in (None, batch(ROWS, context.shape[1] + 1), context[1:]):
        named = r"context of shape \(batch, " if wrong is None else rf"{len(wrong)} rows|\({ROWS}, {wrong.shape[1]}\)"
        with pytest.raises(ValueError, match=named):
            transform(x, wrong)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_transform_names_the_shape_of_inputs_that_do_not_fit(name, direction):
    example = EXAMPLES[name]
    transform, _, context = made(example)
    wrong = batch(ROWS, *example.event_shape[:-1], example.event_shape[-1] + 1)
    try:
        outputs, _ = getattr(transform, direction)(wrong, context)
    except ValueError as error:
        assert str(wrong.shape[-1]) in str(error)
    else:
        assert len(example.event_shape) == 3 and outputs.shape == wrong.shape, "only convolutions take any width"


def test_things_of_no_library_are_refused():
    for function in (as_transform, as_flow):
        with pytest.raises(TypeError, match="builtins.object is of no known library; known: ") as error:
            function(object())
        assert all(package in str(error.value) for bridge in BRIDGES.values() for package in bridge.PACKAGES)
    with pytest.raises(TypeError, match="is no flow; as_transform takes transforms"):
        as_flow(LULinear(3))
    with pytest.raises(TypeError, match="to_library exports an nflows Transform, not .*Linear; as_transform makes one"):
        to_library(libraries()[0], nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"unknown library 'tensorflow'; known: {', '.join(libraries())}"):
        to_library("tensorflow", LULinear(3))


@pytest.mark.parametrize("name", [name for name, bridge in BRIDGES.items() if bridge.EXTRA])
def test_a_library_that_is_not_installed_is_named_with_its_extra(name, uninstall):
    bridge = BRIDGES[name]
    uninstall(*bridge.PACKAGES)
    for library in bridge.LIBRARIES:
        with pytest.raises(
            ImportError, match=rf"{name} is not installed: pip install 'flow-adapters\[{bridge.EXTRA}\]'"
        ):
            to_library(library, LULinear(3))
    with pytest.raises(TypeError, match=rf"not installed: .*{name} \(pip install 'flow-adapters\[{bridge.EXTRA}\]'\)"):
        as_transform(object())


def test_the_process_is_left_as_it_was_found():
    for library in set(libraries()) - set(MISSING):
        to_library(library, LULinear(3))
    with pytest.raises(ValueError, match="Expected parameter scale"):
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


# traps of one library


def normflows():
    pytest.importorskip("normflows")
    from normflows import flows

    return flows


def test_normflows_refuses_what_is_no_exact_bijection():
    flows = normflows()
    with pytest.raises(ValueError, match="Residual cannot score data: its log-determinant is a random estimate"):
        as_transform(flows.Residual(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="BatchNorm normalises by the batch at hand"):
        as_transform(flows.Reverse(flows.BatchNorm()))
    with pytest.raises(InverseNotAvailable, match="Planar runs noise → data only"):
        as_transform(flows.Planar(3))
    with pytest.raises(InverseNotAvailable, match="Planar has no inverse, so this flow cannot sample"):
        as_transform(flows.Reverse(flows.Planar(3))).inverse(torch.randn(2, 3))
    with pytest.raises(ValueError, match="Split takes or gives two tensors at an end"):
        as_transform(flows.Split())
    with pytest.raises(ValueError, match=r"takes 3 features, not inputs of shape \(5, 4\)"):
        as_transform(flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1])))(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"takes 4 features, not inputs of shape \(5, 8, 2, 2\)"):
        as_transform(flows.Composite([flows.GlowBlock(4, 8, use_lu=False), flows.Squeeze()]))(torch.randn(5, 2, 4, 4))
    with pytest.raises(ValueError, match="do not agree about its width: 2, 3"):
        layers = [flows.MaskedAffineAutoregressive(4, 8, context_features=width) for width in (2, 3)]
        as_transform(flows.Composite(layers))


def normflows_model(event, *layers):
    import normflows

    return as_flow(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(event, trainable=False), layers))


@pytest.mark.parametrize(
    "kind", ["CircularCoupledRationalQuadraticSpline", "CircularAutoregressiveRationalQuadraticSpline"]
)
def test_normflows_circular_splines_are_the_identity_beyond_their_bound(kind):
    layer = getattr(normflows(), kind)
    flow = normflows_model(3, layer(3, 1, 8, [0]))
    normal = StandardNormal([3])
    for x in (5.1, 1e6):
        x = torch.tensor([[x, 0.0, 0.0]])
        assert_close(flow.log_prob(x), normal.log_prob(x))
    assert flow.log_prob(torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])).isnan().tolist() == [True, False]
    torch.manual_seed(0)
    layers = layer(2, 1, 8, [0, 1], tail_bound=2.0), layer(2, 1, 8, [1], tail_bound=1.0)
    flow = randomise(normflows_model(2, *layers), scale=0.1)
    edge = torch.linspace(-7.98, 7.98, 400, dtype=torch.float64)  # the density jumps between two of these
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(edge, edge)).exp().sum() * (edge[1] - edge[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_normflows_corrections_hold_for_classes_derived_from_a_spline():
    class Own(normflows().neural_spline.coupling.PiecewiseRationalQuadraticCDF):
        pass

    x = 5 * batch(ROWS, 2).sign()
    y, log_det = as_transform(Own([2], tails=["circular", "circular"], tail_bound=2.0)).double()(x)
    assert_close(y, x)
    assert_close(log_det, torch.zeros_like(log_det))
    with pytest.raises(InputOutsideDomain, match="Own with tails=None"):
        as_transform(Own([2])).double()(x)


def test_normflows_splines_take_sharp_knots_in_float32_and_rows_that_are_not_finite():
    """Where normflows itself raises an empty AssertionError: rounding, or a NaN, makes its discriminant negative."""
    flows = normflows()
    for seed in range(4):
        spline = flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF([8], 8, tails="linear", tail_bound=4.0)
        transform = as_transform(randomise(spline, seed, scale=5.0).float())
        z = 2 * torch.randn(5000, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            x, log_det = transform.inverse(transform(z)[0])
            assert x.dtype == log_det.dtype == torch.float32 and x.isfinite().all() and log_det.isfinite().all()
    coupling = randomise(flows.CoupledRationalQuadraticSpline(2, 1, 8, num_context_channels=2)).float()
    transform, z, context = as_transform(coupling), torch.randn(4, 2), torch.randn(4, 2)
    for direction in (transform, transform.inverse):
        right = direction(z, context)
        for lost in (math.nan, math.inf):
            given = z.clone()
            given[1, 0] = lost
            for value, expected in zip(direction(given, context), right, strict=True):
                assert value[1].isnan().any() or lost == math.inf
                assert_close(value[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-5, rtol=1e-4)
    transform.inverse(given, context)[0].nansum().backward()
    assert coupling.prqct.transform_net.final_layer.weight.grad.abs().sum() > 0


def test_normflows_layers_say_where_they_are_defined():
    flows = normflows()
    transform = as_transform(flows.CoupledRationalQuadraticSpline(2, 1, 8, tails=None))
    for direction in (transform, transform.inverse):
        with pytest.raises(
            InputOutsideDomain, match=r"tails=None maps \[0, 1\] to itself, but got values from 0.5 to 1.5"
        ):
            direction(torch.tensor([[0.5, 1.5]]))
    # the coordinates that condition the others go through no spline here
    coupling = flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling
    one_sided = as_transform(coupling(torch.tensor([1, 0]), lambda i, o: ResidualNet(i, o, 8)))
    assert one_sided(torch.tensor([[0.5, 1.5]]))[0].isfinite().all()
    with pytest.raises(InputOutsideDomain, match="from 1.5 to 1.5"):
        one_sided(torch.tensor([[1.5, 0.5]]))
    for layer in (flows.PeriodicWrap([0], 3.0), flows.PeriodicShift([0], 3.0, 0.5)):
        flow = normflows_model(2, layer)
        x = torch.tensor([[1.0, 0.0]])
        assert_close(flow.log_prob(x + torch.tensor([6.0, 0.0])), flow.log_prob(x))
        with pytest.raises(InputOutsideDomain, match="takes noise within ±3.0, not 4: give its coordinates a base"):
            flow.transform.inverse(torch.tensor([[4.0, 0.0]]))


def test_normflows_composites_are_taken_apart_and_other_containers_are_not_trusted():
    flows = normflows()
    from normflows.transforms import Shift

    class Own(flows.Composite):
        pass

    class Container(flows.Flow):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, z):
            return self.layer(z)

        def inverse(self, z):
            return self.layer.inverse(z)

    x = batch(ROWS, 2)
    assert_inputs_unchanged(as_transform(Own([Shift(), Shift()])), x)
    with pytest.raises(ValueError, match="Container runs normflows' CircularCoupledRationalQuadraticSpline itself"):
        as_transform(Container(flows.CircularCoupledRationalQuadraticSpline(2, 1, 8, [0])))

    class InPlace(flows.Flow):
        def forward(self, z):
            return z.mul_(2), z.new_zeros(len(z)) + z[0].numel() * math.log(2)

        def inverse(self, z):
            return z.div_(2), z.new_zeros(len(z)) - z[0].numel() * math.log(2)

    for inner in (InPlace(), Shift()):
        transform = as_transform(Container(inner))
        assert_inputs_unchanged(transform, x)
        assert_inputs_unchanged(transform.inverse, x)


def test_normflows_layers_between_a_split_and_a_merge_are_the_block_that_they_make():
    flows = normflows()
    network = nn.Linear(2, 4)
    parts = flows.Split(), flows.AffineCoupling(network), flows.Merge()
    for block, chain in (
        (flows.AffineCouplingBlock(network), flows.Composite(parts)),
        (flows.Reverse(flows.AffineCouplingBlock(network)), flows.Reverse(flows.Composite(parts))),
    ):
        block, chain = as_transform(block).double(), as_transform(chain).double()
        x = batch(ROWS, 4)
        assert_close(chain(x), block(x))
        assert_close(chain.inverse(x), block.inverse(x))


def test_normflows_multiscale_flow_is_exported_with_both_shapes():
    pytest.importorskip("normflows")
    flow = randomise(as_flow(MODELS["normflows:MultiscaleFlow"].make())).eval()
    with pytest.raises(ValueError, match="normflows' MultiscaleFlow changes the shape of a datum"):
        to_library("torch", flow.transform, event_dim=3)
    with pytest.raises(
        ValueError, match=r"decode of this flow takes inputs of shape \(batch, 16\), not \(5, 1, 4, 4\)"
    ):
        flow.decode(batch(ROWS, 1, 4, 4))
    exported, noise = to_library("torch", flow), batch(ROWS, 16)
    assert exported.inverse_shape((ROWS, 1, 4, 4)) == (ROWS, 16)
    assert_close(exported(noise), flow.decode(noise))


def normflows_actnorm():
    return normflows().ActNorm(3)


def normflows_inverted_actnorm():
    return normflows().Reverse(normflows_actnorm())


def freia_actnorm():
    modules = pytest.importorskip("FrEIA.modules")
    return modules.ActNorm([(3,)])


@pytest.mark.parametrize("make", [normflows_actnorm, normflows_inverted_actnorm, freia_actnorm])
def test_an_actnorm_initialises_from_training_data_only(make):
    x = 5 + 3 * batch(200, 3)
    transform = as_transform(make()).double()
    assert_close(transform.inverse(x)[0], x)  # noise
    assert_close(transform.eval()(x)[0], x)
    y, _ = transform.train()(x)
    assert_close(y.std(0), torch.ones(3, dtype=x.dtype), atol=1e-4, rtol=0)
    assert_close(transform(2 * x)[0].std(0), 2 * torch.ones(3, dtype=x.dtype), atol=1e-3, rtol=0)


def pyro_batchnorm():
    return pyro_transforms.BatchNorm(3)


@pytest.mark.parametrize("make", [normflows_actnorm, normflows_inverted_actnorm, freia_actnorm, pyro_batchnorm])
def test_one_row_does_not_make_a_normalisation_nan_for_good(make):
    transform = as_transform(make()).double().train()
    with pytest.raises(ValueError, match=r"a mean and a standard deviation from the batch .* or call eval\(\)"):
        transform(batch(1, 3))
    assert all(tensor.isfinite().all() for tensor in transform.state_dict().values())
    assert transform.eval()(batch(1, 3))[1].isfinite().all()
    transform.train()(batch(200, 3))
    assert transform.eval()(batch(1, 3))[1].isfinite().all()


def test_freia_refuses_what_is_no_exact_bijection():
    modules = pytest.importorskip("FrEIA.modules")
    with pytest.raises(
        ValueError, match="IResNetLayer is no layer of a flow: its log-determinant is a random estimate"
    ):
        as_transform(modules.IResNetLayer([(3,)]))
    with pytest.raises(ValueError, match="Split has 1 inputs, 2 outputs"):
        as_transform(modules.Split([(4,)]))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(batch, 4\), not \(5, 3\)"):
        as_transform(modules.NICECouplingBlock([(4,)], subnet_constructor=MLP))(torch.randn(5, 3))


def test_freia_takes_an_export_that_changes_the_shape():
    framework = pytest.importorskip("FrEIA.framework")
    network = framework.SequenceINN(1, 4, 4)
    network.append(to_library("freia", SqueezeTransform()).placed)
    flow, x = as_flow(network), torch.randn(ROWS, 1, 4, 4)
    assert_close(flow.log_prob(x), StandardNormal([1, 4, 4]).log_prob(x))
    assert flow.sample(3).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("block", ["Flatten", "HaarDownsampling"])
def test_freia_networks_that_change_the_shape_are_exported_with_both_shapes(block):
    modules, framework = pytest.importorskip("FrEIA.modules"), pytest.importorskip("FrEIA.framework")
    network = framework.SequenceINN(1, 4, 4)
    network.append(getattr(modules, block))
    flow, x = as_flow(network), torch.randn(ROWS, 1, 4, 4)
    with pytest.raises(ValueError, match="FrEIA's SequenceINN changes the shape of a datum: export the whole flow"):
        to_library("torch", flow.transform, event_dim=3)
    assert_close(as_transform(to_library("torch", flow))(x), flow.transform(x))


def test_freia_blocks_and_networks_that_users_write():
    modules, framework = pytest.importorskip("FrEIA.modules"), pytest.importorskip("FrEIA.framework")

    class Container(modules.InvertibleModule):
        def __init__(self, kind):
            super().__init__([(4,)])
            self.block = kind([(4,)])

        def forward(self, x, c=None, rev=False, jac=True):
            x[0].mul_(0.5 if rev else 2)
            x, log_det = self.block(x, rev=rev)
            return x, log_det + (-4 if rev else 4) * math.log(2)

        def output_dims(self, dims):
            return dims

    with pytest.raises(ValueError, match="Container runs FrEIA's LearnedElementwiseScaling itself"):
        as_transform(Container(modules.LearnedElementwiseScaling))
    container, x = as_transform(Container(modules.ActNorm)).double(), batch(50, 4)
    assert_inputs_unchanged(container.inverse, x)
    assert_inputs_unchanged(container.eval(), x)
    assert_close(container(x)[0], 2 * x)  # still as it was
    assert_close(container.train()(x)[0].std(0), torch.ones(4, dtype=x.dtype))

    class Own(framework.SequenceINN):
        def forward(self, x, c=None, rev=False, jac=True):
            return super().forward(x, c, rev, jac)

    torch.manual_seed(0)
    network = Own(4)
    for key in (1, 0):
        network.append(modules.GLOWCouplingBlock, cond=key, cond_shape=(key + 1,), subnet_constructor=MLP)
    flow = randomise(as_flow(network))
    x, context = batch(ROWS, 4), batch(ROWS, 3)
    noise, log_det = network(x, [context[:, :1], context[:, 1:]])
    assert_close(flow.log_prob(x, context), StandardNormal([4]).log_prob(noise) + log_det)


def test_normflows_layers_take_an_empty_batch():
    flows = normflows()
    checkerboard = flows.AffineCouplingBlock(nn.Conv2d(1, 2, 3, padding=1), split_mode="checkerboard")
    for layer, shape in ((flows.CoupledRationalQuadraticSpline(2, 1, 8), (2,)), (checkerboard, (1, 4, 4))):
        transform = as_transform(layer)
        for direction in (transform, transform.inverse):
            outputs, log_det = direction(torch.ones(0, *shape))
            assert outputs.shape == (0, *shape) and log_det.shape == (0,)


def test_freia_blocks_take_an_empty_batch():
    modules, framework = pytest.importorskip("FrEIA.modules"), pytest.importorskip("FrEIA.framework")
    network = framework.SequenceINN(1, 4, 4)
    network.append(modules.HaarDownsampling)
    network.append(modules.AllInOneBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    noise, log_det = as_transform(network)(torch.ones(0, 1, 4, 4))
    assert noise.shape == (0, 4, 2, 2) and log_det.shape == (0,)


def test_freia_a_copy_of_an_actnorm_keeps_what_it_has_loaded():
    transform = as_transform(freia_actnorm()).double()
    transform(5 + 3 * batch(200, 3))
    clone = copy.deepcopy(as_transform(freia_actnorm()).double())
    clone.load_state_dict(transform.state_dict())
    x = batch(ROWS, 3)
    assert_close(clone(x), transform(x))


def test_freia_learned_householder_block_can_be_copied_after_a_call():
    modules = pytest.importorskip("FrEIA.modules")
    block = modules.AllInOneBlock([(4,)], subnet_constructor=MLP, learned_householder_permutation=2)
    transform = as_transform(block)
    y, log_det = transform(torch.randn(5, 4))
    assert_close(transform.inverse(y)[1], -log_det)
    assert_close(copy.deepcopy(transform)(torch.ones(5, 4)), transform(torch.ones(5, 4)))
