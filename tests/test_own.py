"""Anybody's own layer or flow, in each form that people write: built, told which way it runs, trained, saved, refused.

Below them each script with one, and what an unfinished file in a folder of this package does to the others: nothing.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.testing import assert_close

from adapters import build_flow, check, discovery, flow_names, load_flow, save_flow
from adapters.catalogue import flow_options
from adapters.check.__main__ import main as check_command
from adapters.check.subject import Wrong
from adapters.own import DATA_TO_NOISE, NOISE_TO_DATA, Offer, in_short, make
from runs.common.images import Images
from tests.laws import randomise
from tests.scripts import pictures_in, run
from tests.students_layer import LAYER as STUDENTS_LAYER

LAYER = (
    STUDENTS_LAYER
    + """

class Turned(MyLayer):  # data → noise
    forward, inverse = MyLayer.inverse, MyLayer.forward


class OwnMask(MyLayer):  # with networks and a mask of its own
    def __init__(self, features, width=8):
        net = lambda: nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, features))
        super().__init__(nn.Sequential(net(), nn.Tanh()), net(), (torch.rand(features) > 0.5).float())


class Shift(nn.Module):  # of no known form
    def __init__(self, features):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(features))

    def forward(self, z):
        return z + self.by, z.new_zeros(len(z))

    def inverse(self, z):
        return z - self.by, z.new_zeros(len(z))


class Conditional(nn.Module):
    def __init__(self, features, context_features, mask):
        super().__init__()
        self.net = nn.Linear(features + (context_features or 0), 2 * features)
        self.register_buffer("mask", mask)

    def scale_shift(self, z, context):
        z = self.mask * z
        s, t = self.net(z if context is None else torch.cat((z, context), 1)).chunk(2, 1)
        return (1 - self.mask) * s.tanh(), (1 - self.mask) * t

    def forward(self, z, context=None):
        s, t = self.scale_shift(z, context)
        return z * s.exp() + t, s.sum(1)

    def inverse(self, z, context=None):
        s, t = self.scale_shift(z, context)
        return (z - t) * (-s).exp(), -s.sum(1)
"""
)

TRANSFORM = """
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from my_layer import MyLayer as Plain
from adapters import MaskedCouplingLayer, build_flow


class MyTransform(Transform):  # the exercise's, as an nflows Transform
    def __init__(self, scale_net, translation_net, mask):
        super().__init__()
        self.plain = Plain(scale_net, translation_net, mask)

    def forward(self, inputs, context=None):
        return self.plain(inputs)

    def inverse(self, inputs, context=None):
        return self.plain.inverse(inputs)


def make_layer(features, mask, scale_net, translation_net):
    return MaskedCouplingLayer(scale_net, translation_net, mask)


def make_flow(features, layers, context_features=None):
    return build_flow("masked-affine", features, context_features, layers=layers, hidden_features=(8,))


def make_transform(features, layers):
    return build_flow("masked-affine", features, layers=layers, hidden_features=(8,)).transform

"""

# The course's own file, its layer filled in, with a function that makes the flow.
COURSE = (
    LAYER
    + """
import torch.distributions as td


class GaussianBase(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.D = D
        self.mean = nn.Parameter(torch.zeros(self.D), requires_grad=False)
        self.std = nn.Parameter(2 * torch.ones(self.D), requires_grad=False)

    def forward(self):
        return td.Independent(td.Normal(loc=self.mean, scale=self.std), 1)


class Flow(nn.Module):
    def __init__(self, base, transformations):
        super().__init__()
        self.base = base
        self.transformations = nn.ModuleList(transformations)

    def forward(self, z):
        sum_log_det_J = 0
        for T in self.transformations:
            x, log_det_J = T(z)
            sum_log_det_J += log_det_J
            z = x
        return x, sum_log_det_J

    def inverse(self, x):
        sum_log_det_J = 0
        for T in reversed(self.transformations):
            z, log_det_J = T.inverse(x)
            sum_log_det_J += log_det_J
            x = z
        return z, sum_log_det_J

    def log_prob(self, x):
        z, log_det_J = self.inverse(x)
        return self.base().log_prob(z) + log_det_J

    def sample(self, sample_shape=(1,)):
        return self.forward(self.base().sample(sample_shape))[0]


class TurnedFlow(Flow):  # forward runs data → noise
    forward, inverse = Flow.inverse, Flow.forward

    def log_prob(self, x):
        z, log_det_J = self.forward(x)
        return self.base().log_prob(z) + log_det_J


class Wrong(Flow):
    def log_prob(self, x):
        z, log_det_J = self.inverse(x)
        return self.base().log_prob(z) - log_det_J


class Baseless(Flow):
    def __init__(self, base, transformations):
        super().__init__(base, transformations)
        del self.base
        self.base = base()


def net(features):
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, features), nn.Tanh())


def layers(features, masks):
    return [MyLayer(net(features), net(features), mask) for mask in masks]


def make_flow(features, masks, kind=Flow):
    return kind(GaussianBase(features), layers(features, masks))


def make_turned(features, masks):
    return make_flow(features, masks, TurnedFlow)


def make_wrong(features, masks):
    return make_flow(features, masks, Wrong)


def make_baseless(features, masks):
    return make_flow(features, masks, Baseless)


flow = make_flow(2, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])


class Flip(nn.Module):  # without parameters
    def forward(self, z):
        return z.flip(1), z.new_zeros(len(z))

    inverse = forward


class OneWidth(MyLayer):  # whose hidden layer has one width
    def __init__(self, features, mask, /, hidden_features: int = 5):
        one = nn.Sequential(nn.Linear(features, hidden_features), nn.Linear(hidden_features, features))
        bounded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(features, features)), nn.Tanh())
        super().__init__(bounded, one, mask)


def make_list(features, masks):
    return [Flip(), *layers(features, masks)]


def make_module_list(features, masks):
    return nn.ModuleList(layers(features, masks))


listed = nn.Sequential(*make_list(2, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]))
"""
)

FORMS = {
    "my_layer.py:MyLayer": NOISE_TO_DATA,
    "my_layer:MyLayer": NOISE_TO_DATA,
    "my_layer.py:Turned": DATA_TO_NOISE,
    "my_layer.py:OwnMask": NOISE_TO_DATA,
    "my_layer.py:Shift": NOISE_TO_DATA,
    "my_layer.py:Conditional": NOISE_TO_DATA,
    "my_transform.py:MyTransform": NOISE_TO_DATA,
    "my_transform:make_layer": NOISE_TO_DATA,
    "my_transform:make_transform": DATA_TO_NOISE,
    "my_transform:make_flow": None,
    "course.py:make_flow": None,
    "course.py:make_turned": None,
    "course.py:flow": None,
    "course.py:OneWidth": NOISE_TO_DATA,
    "course.py:make_list": NOISE_TO_DATA,
    "course.py:make_module_list": NOISE_TO_DATA,
    "course.py:listed": NOISE_TO_DATA,
    "adapters:MaskedCouplingLayer": NOISE_TO_DATA,
    "nflows.transforms:LULinear": DATA_TO_NOISE,
    "normflows.flows:MaskedAffineFlow": None,
    "zuko.flows:NICE": None,
    "FrEIA.modules:AllInOneBlock": None,
    "pyro.distributions.transforms:affine_autoregressive": None,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A fresh directory with a student's files, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    for name, code in {"my_layer": LAYER, "my_transform": TRANSFORM, "course": COURSE}.items():
        Path(f"{name}.py").write_text(code)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()
    AcceleratorState._reset_state(reset_partial_state=True)


def written(code: str, name: str = "wrong") -> str:
    """The name of the class ``Layer`` in a new file of that code."""
    Path(f"{name}.py").write_text(code)
    return f"{name}.py:Layer"


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")  # by FrEIA and nflows
@pytest.mark.parametrize("name", FORMS)
def test_every_form_makes_a_right_flow_that_comes_back(name, here):
    flow = randomise(build_flow(name, 2, layers=3, hidden_features=(8,)), scale=0.2)
    assert flow.blueprint.get("direction") == FORMS[name]
    check(flow, (2,)).raise_if_wrong()
    loaded = load_flow(save_flow(flow, here / "saved"), maker=name)
    x = torch.rand(5, 2).double()
    assert_close(loaded.log_prob(x), flow.eval().log_prob(x), atol=0, rtol=0)


def test_masks_are_given_from_the_noise_side_on_and_two_flows_share_no_weights(here):
    masks = [torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 1.0])]
    for name in ("my_layer.py:MyLayer", "my_layer.py:Turned"):
        flow = build_flow(name, 3, layers=3, masks=masks)
        found = [value for key, value in flow.state_dict().items() if key.endswith("mask")]
        assert all(map(torch.equal, found, masks[::-1])), "the data side's comes first"
    made_once = build_flow("course.py:flow", 2), build_flow("course.py:flow", 2)
    first, second = (next(flow.parameters()) for flow in made_once)
    assert first is not second


def test_the_direction_may_be_said(here):
    said = randomise(build_flow("my_layer.py:MyLayer", 2, layers=2, direction=DATA_TO_NOISE))
    assert said.blueprint["direction"] == DATA_TO_NOISE
    check(said, (2,)).raise_if_wrong()
    x = torch.rand(4, 2).double()
    layers = [module for module in said.modules() if type(module).__name__ == "MyLayer"]
    assert_close(said.encode(x), layers[1](layers[0](x)[0])[0])
    with pytest.raises(ValueError, match="course.py:make_flow: it says itself which way it runs: leave out direction"):
        build_flow("course.py:make_flow", 2, direction=NOISE_TO_DATA)
    with pytest.raises(ValueError, match="unknown direction 'up'; known: noise-to-data, data-to-noise"):
        build_flow("my_layer.py:MyLayer", 2, direction="up")


def test_a_context_reaches_the_networks_that_are_given_and_ones_own(here):
    for name in ("my_layer.py:Conditional", "adapters:MaskedCouplingLayer", "my_transform:make_flow"):
        flow = randomise(build_flow(name, 3, 2, layers=2), scale=0.2)
        check(flow, (3,), context_features=2).raise_if_wrong()


def test_the_networks_have_the_widths_and_the_activation_that_are_asked_for():
    flow = build_flow("adapters:MaskedCouplingLayer", 3, layers=1, hidden_features=(5, 7), activation="gelu")
    linear = [module.out_features for module in flow.modules() if isinstance(module, torch.nn.Linear)]
    assert linear == [5, 7, 3] * 2 and any(isinstance(module, torch.nn.GELU) for module in flow.modules())


def test_options_are_its_other_parameters(here):
    assert flow_options("my_layer.py:OwnMask") == ["direction", "width"]
    assert build_flow("my_layer.py:OwnMask", 3, width=5).transform.state_dict()
    with pytest.raises(TypeError, match="my_layer.py:OwnMask has no option 'depth'; it has: direction, width"):
        build_flow("my_layer.py:OwnMask", 3, depth=5)


def test_a_file_that_changes_while_it_trains_is_saved_as_it_began(here):
    flow = build_flow("my_layer.py:MyLayer", 2, layers=1)
    (here / "my_layer.py").write_text("def half an edit")
    save_flow(flow, here / "saved")
    assert load_flow(here / "saved", maker="my_layer.py:MyLayer").sample(2).shape == (2, 2)


def test_a_file_is_known_by_its_name_wherever_it_lies(here):
    save_flow(build_flow("my_layer.py:MyLayer", 2, layers=1), here / "saved")
    load_flow(here / "saved", maker=str(here / "my_layer.py:MyLayer"))
    load_flow(here / "saved", maker="my_layer:MyLayer")
    assert in_short("../code/my_layer.py:MyLayer") == in_short("my_layer:MyLayer") == "my_layer:MyLayer"
    for maker in (None, "my_layer.py:Turned", "other.py:MyLayer"):
        with pytest.raises(ValueError, match="saved with a maker|was made by 'my_layer.py:MyLayer', not by"):
            load_flow(here / "saved", maker=maker)


@pytest.mark.parametrize("name", ["copy", "this"])  # imported already, and not yet
@pytest.mark.parametrize("asked", ["{}.py:MyLayer", "my_layer.py:MyLayer", "my_layer:MyLayer"])
def test_a_file_may_have_the_name_of_a_module(name, asked, here, capsys):
    Path(f"{name}.py").write_text(LAYER)
    assert build_flow(asked.format(name), 2, layers=1).sample(2).shape == (2, 2)
    assert not str(importlib.import_module(name).__file__).startswith(str(here))
    assert sys.path[0] != str(here)


def test_the_check_goes_through_a_list(here, capsys):
    assert check_command("course.py:listed") == 0
    assert capsys.readouterr().out.count("Right: ") == 3


def test_a_list_has_layers_and_no_flow(here):
    Path("lists.py").write_text("from course import *\nnone = []\ntwo = [flow, flow]")
    for name, words in {"none": "it is a list of no layers", "two": "a flow is among its layers"}.items():
        with pytest.raises(ValueError, match=f"lists.py:{name}: {words}"):
            build_flow(f"lists.py:{name}", 2)


# What can't be a layer: one sentence that says what to write

MISTAKES = {
    "no inverse": (("def inverse(", "def inverted("), "it has no inverse: write def inverse(self, z, context=None)"),
    "a log_det of shape (n, 1)": (
        ("s.sum(1)", "s.sum(1, keepdim=True)"),
        r"forward returns a log_det of shape (3, 1), where (3,) is wanted, one a row: write log_det.squeeze(1), or",
    ),
    "a log_det of every coordinate": (("s.sum(1)", "s"), "returns a log_det of shape (3, 4), where (3,) is wanted"),
    "no pair": (
        ("z * s.exp() + t, s.sum(1)", "z * s.exp() + t"),
        "forward returns a tensor of shape (3, 4), where a pair",
    ),
    "a number for the log_det": (("t, s.sum(1)", "t, 0"), "forward returns a int as its log_det, where a tensor is"),
    "another shape": (("z * s.exp() + t,", "(z * s.exp() + t)[:, :2],"), "forward returns outputs of shape (3, 2) for"),
    "a stub": (
        ("z * s.exp() + t, s.sum(1)", "z, s.sum(1)"),
        "forward(z) is z itself, whatever its parameters are: write",
    ),
    "no module": (("(Base)", "()"), "a Layer has no parameters to train: derive its class from nn.Module"),
    "hidden networks": (
        ("2 * features)", "2 * features).requires_grad_(False)"),
        "it has no parameters to train: keep",
    ),
    "an image": (
        ("z = z", "z = torch.nn.functional.conv2d(z, torch.ones(1, 1, 1, 1))"),
        "it takes images of shape (1, 2, 2), and is given vectors of 4: begin forward and inverse with z = z.view(",
    ),
    "a mask of bools": (
        ("self.mask = mask", "self.mask = mask.bool()"),
        "Error: Subtraction, the `-` operator, with a bool tensor is not supported.",
    ),
    "super().__init__() forgotten": (("super().__init__()", "pass"), "making it raises AttributeError: cannot assign"),
    "an error in its making": (("super()", "{}['a']; super()"), "making it raises KeyError: 'a' (wrong.py, line 17: "),
    "lazy modules": (("nn.Linear(features, 2", "nn.LazyLinear(2"), "its lazy modules have no sizes before they are"),
    "old weight normalisation": (
        ("nn.Linear(features, 2 * features)", "old(nn.Linear(features, 2 * features))"),
        "it can't be copied (RuntimeError: Only",
    ),
    "what nobody offers": (
        ("features, mask", "features, mask, hunger"),
        "wants hunger: say --options hunger VALUE",
    ),
}
RIGHT = """
import torch
from torch import nn
from nflows.transforms import Transform
Base = KIND


def old(net):  # keeps a tensor that it computes from weights, as torch's first weight_norm did
    del net._parameters["weight"]
    net.weight_v = nn.Parameter(torch.ones(8, 4))
    net.weight = 2 * net.weight_v
    return net


class Layer(Base):
    def __init__(self, features, mask):
        super().__init__()
        self.net = nn.Linear(features, 2 * features)
        self.mask = mask

    def scale_shift(self, z):
        s, t = self.net(self.mask * z.flatten(1)).chunk(2, 1)
        return ((1 - self.mask) * s).tanh().view_as(z), ((1 - self.mask) * t).view_as(z)

    def forward(self, z, context=None):
        z = z
        s, t = self.scale_shift(z)
        return z * s.exp() + t, s.sum(1)

    def inverse(self, z, context=None):
        s, t = self.scale_shift(z)
        return (z - t) * (-s).exp(), -s.sum(1)
"""


@pytest.mark.parametrize("kind", ["nn.Module", "Transform"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_can_not_be_a_layer_says_what_to_write(mistake, kind, here):
    (old, new), sentence = MISTAKES[mistake]
    name = written(RIGHT.replace("KIND", kind).replace(old, new))
    with pytest.raises((ValueError, TypeError)) as raised:
        build_flow(name, 4, layers=2)
    assert sentence in str(raised.value) and str(raised.value).startswith("wrong.py:Layer")
    assert "\n" not in str(raised.value)


def test_what_a_context_wants_is_said(here):
    without = RIGHT.replace("self, z, context=None", "self, z")
    assert build_flow(written(without.replace("KIND", "nn.Module"), "plain"), 4, layers=2).sample(2).shape == (2, 4)
    with pytest.raises(ValueError, match=r"forward takes no context, but nflows hands .*: write def forward"):
        build_flow(written(without.replace("KIND", "Transform"), "transform"), 4)
    with pytest.raises(ValueError, match=r"forward takes no context, but a context was asked for: write def forward"):
        build_flow("plain.py:Layer", 4, 2)
    with pytest.raises(ValueError, match="takes a context, and its density is the same for any: hand the context to"):
        build_flow(written(RIGHT.replace("KIND", "Transform"), "deaf"), 4, 2)
    with pytest.raises(ValueError, match="forward raises ValueError: the network MLP with a context of shape"):
        build_flow("my_transform:make_transform", 4, 2)


def test_what_is_wrong_in_the_courses_flow_is_said(here):
    with pytest.raises(ValueError, match=r"course.py:make_wrong: its log_prob.x. is neither base.*: write return self"):
        build_flow("course.py:make_wrong", 2)
    with pytest.raises(ValueError, match="its base is a Independent: keep it as self.base, an nn.Module whose call"):
        build_flow("course.py:make_baseless", 2)
    with pytest.raises(TypeError, match="course.py:Flow wants base: .* or name a function that makes it"):
        build_flow("course.py:Flow", 2)
    with pytest.raises(ValueError, match=r"course.py:flow: .*"):
        build_flow("course.py:flow", 3)


# The scripts

QUICK = {"layers": 2, "hidden": (8,)}


def _images() -> Images:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randint(256, (64, 28, 28), generator=generator).byte(), torch.arange(64) % 10) for _ in range(3)]
    return Images(*(part for pair in parts for part in pair), tuple("0123456789"))


def _toy(**flags):
    return run("toy", seams={"test_points": 500}, **{"steps": 3, "batch_size": 16} | QUICK | flags)


def _mnist(**flags):
    tiny = {"epochs": 1, "batch_size": 32, "samples": 4} | QUICK
    return run("mnist", seams={"read": lambda *_: _images()}, **tiny | flags)


def _vae(**flags):
    tiny = {"epochs": 1, "batch_size": 32, "latent": 3, "width": (16,), "importance_samples": 2, "importance_images": 3}
    return run("pyro_vae", seams={"read": lambda *_: _images()}, **tiny | QUICK | flags)


@pytest.mark.parametrize("name", ["my_layer.py:MyLayer", "my_layer.py:Turned", "course.py:flow"])
def test_toy_trains_saves_resumes_and_draws_again(name, here, capsys):
    figures = _toy(flow=name, keep_state=True)
    out = here / "results/toy" / f"two-gaussians-{in_short(name).replace(':', '-')}"
    printed = capsys.readouterr().out
    assert (f"{name}: its forward is taken as {FORMS[name]}, --direction " in printed) == (FORMS[name] is not None)
    assert load_flow(out, maker=name).sample(2).shape == (2, 2)
    drawn = pictures_in(out)
    assert _toy(flow=name, resume=True)["kl"] == figures["kl"]
    run("toy", load=out)
    assert drawn and pictures_in(out).keys() == drawn.keys()


@pytest.mark.parametrize("script", [_toy, _mnist, _vae], ids=lambda script: script.__name__)
def test_a_wrong_layer_is_trained_after_a_warning_that_names_its_mistake(script, here, capsys):
    (here / "wrong.py").write_text(LAYER.replace(", -((1 - b)", ", ((1 - b)"))
    script(flow="wrong.py:MyLayer", out=here / "wrong")
    printed = capsys.readouterr().out
    assert "warning: wrong.py:MyLayer is wrong, so its figures can't be trusted: wrong sign of the log-det" in printed
    script(flow="my_layer.py:MyLayer", out=here / "right")
    assert "warning" not in capsys.readouterr().out


def test_a_training_is_not_resumed_in_the_other_direction(here):
    _toy(flow="my_layer.py:MyLayer", keep_state=True)
    with pytest.raises(ValueError, match="belongs to another training: direction was None, not data-to-noise"):
        _toy(flow="my_layer.py:MyLayer", direction=DATA_TO_NOISE, resume=True)


@pytest.mark.parametrize("mask", ["chequerboard", "random", "pyramid"])
def test_mnist_gives_the_masks_that_are_asked_for(mask, here):
    name = "my_layer.py:MyLayer"
    _mnist(flow=name, mask=mask, out=here / "run")
    flow = load_flow(here / "run", maker=name)
    wanted = importlib.import_module("runs.mnist").MASKS[mask](2, 0)[:2]
    found = [value for key, value in flow.state_dict().items() if key.endswith("layer.mask")]
    assert len(found) == 2 and all(map(torch.equal, found, wanted[::-1]))


def test_mnist_draws_and_resumes_a_layer_with_a_mask_of_its_own(here):
    name = "my_layer.py:OwnMask"
    figures = _mnist(flow=name, out=here / "run", keep_state=True)
    assert _mnist(flow=name, out=here / "run", resume=True)["bits_per_dim"] == figures["bits_per_dim"]
    drawn = pictures_in(here / "run")
    run("mnist", load=here / "run", samples=4)
    assert drawn and pictures_in(here / "run").keys() == drawn.keys()
    with pytest.raises(ValueError, match="saved with a maker: .*to a script say it by --flow, beside --load"):
        run("mnist", load=here / "run", samples=3)
    run("mnist", load=here / "run", samples=3, flow=name)
    assert "samples.png" in pictures_in(here / "run/again")


def test_mnist_conditions_the_layer_that_takes_a_context_and_refuses_the_other(here):
    _mnist(flow="my_layer.py:Conditional", conditional=True, out=here / "run")
    assert load_flow(here / "run", maker="my_layer.py:Conditional").context_features == 10
    with pytest.raises(ValueError, match="my_layer.py:MyLayer: forward takes no context, but a context was asked for"):
        _mnist(flow="my_layer.py:MyLayer", conditional=True, out=here / "new")
    assert not (here / "new").exists()


def test_the_vae_has_it_as_prior_and_as_posterior(here):
    name = "my_layer.py:Conditional"
    _vae(flow=name, prior="flow", posterior="flow", keep_state=True)
    out = here / "results/pyro_vae/flow-my_layer-Conditional"
    assert load_flow(out, maker=name).sample(2).shape == (2, 3)
    _vae(flow=name, prior="flow", posterior="flow", resume=True)
    run("pyro_vae", load=out)
    with pytest.raises(ValueError, match="my_layer.py:MyLayer: forward takes no context, but a context was asked for"):
        _vae(flow="my_layer.py:MyLayer", posterior="flow", out=here / "new")
    assert not (here / "new").exists()


def test_compare_has_a_row_for_a_file_elsewhere(here):
    (here / "code").mkdir()
    (here / "my_layer.py").rename(here / "code/their_layer.py")
    name = "code/their_layer.py:MyLayer"
    tiny = {"task": "two-gaussians", "budget": "3steps", "layers": 2, "hidden": (8,), "out": here / "out"}
    rows = run("compare", flows=(name, "masked-affine"), direction=DATA_TO_NOISE, **tiny)["two-gaussians"]
    assert rows[name]["trainings"] and "Its forward is taken as data-to-noise." in rows[name]["footnote"]
    assert pictures_in(here / "out")


READS = {"read": lambda *_: pytest.fail("data were loaded")}


@pytest.mark.parametrize("script", ["toy", "mnist", "pyro_vae"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (RIGHT.replace("KIND", "Transform").replace("def inverse(", "def inverted("), "it has no inverse: write"),
        (RIGHT.replace("KIND", "nn.Module").replace("t, s.sum(1)", "t + 1 / 0, 0"), "forward raises ZeroDivisionE"),
        (
            RIGHT.replace("KIND", "nn.Module").replace("super()", "1 / 0; super()"),
            "ZeroDivisionError: division by zero",
        ),
        ("import torch, no_such_module", "can't be imported (ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_mistake_is_one_sentence_before_data_are_loaded(script, code, words, here):
    name = written(code)
    with pytest.raises((ValueError, ImportError)) as raised:
        run(script, flow=name, out=here / "new", seams={} if script == "toy" else READS)
    assert words in str(raised.value) and name in str(raised.value) and "\n" not in str(raised.value)
    assert not (here / "new").exists()


def test_what_could_not_be_saved_is_said_before_the_training(here):
    name = written(RIGHT.replace("KIND", "nn.Module").replace("z = z", "self.calls = getattr(self, 'calls', 0) + 1"))
    with pytest.raises(ValueError, match="this flow can't be saved: .*calls is 1"):
        _toy(flow=name, out=here / "new")
    assert not (here / "new").exists()


def test_a_direction_is_of_ones_own_layer_alone():
    with pytest.raises(TypeError, match="masked-affine has no option 'direction'"):
        run("toy", direction=NOISE_TO_DATA)
    with pytest.raises(ValueError, match="unknown direction 'back'; known: noise-to-data, data-to-noise"):
        run("toy", flow="my_layer.py:MyLayer", direction="back")


# Unfinished files in the folders that are searched

FOLDERS = ("adapters.layers", "adapters.catalogue", "adapters.bridges", "tests.examples")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_can_be_imported(folder):
    assert not discovery.failures(folder), "\n".join(discovery.failures(folder))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("code", ["", "x = 1", "def half(", "import no_such_module", "1 / 0", "raise SystemExit(3)"])
def test_an_unfinished_file_is_no_trouble_to_others(folder, code, tmp_path, monkeypatch):
    package = importlib.import_module(folder)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(discovery, "_failed", {})
    before = flow_names()
    (tmp_path / "unfinished.py").write_text(code)
    importlib.import_module("adapters.catalogue")._flows.cache_clear()
    try:
        if folder != "adapters.bridges" or code not in ("", "x = 1"):  # of which a bridge's absent names are asked for
            assert flow_names() == before
        failed = [f"{folder}.unfinished can't be imported"] * (code not in ("", "x = 1"))
        assert [why.partition(" (")[0] for why in discovery.failures(folder)] == failed
        if failed and folder == "adapters.catalogue":
            with pytest.raises(ValueError, match="unknown flow 'mine'; .*; adapters.catalogue.unfinished can't be"):
                build_flow("mine", 2)
    finally:
        sys.modules.pop(f"{folder}.unfinished", None)
        importlib.import_module("adapters.catalogue")._flows.cache_clear()


def test_a_class_that_hangs_is_one_line(monkeypatch):
    def endless():
        while True:
            pass

    monkeypatch.setattr("adapters.own.MAKING", 0.2)
    with pytest.raises(Wrong, match=r"making it has not come back within 0\.2 s: is there a loop that does not end\?"):
        make(endless, Offer((2,)), {})
