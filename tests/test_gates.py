"""What a flow is held to in ``compare.py``: no wrong one is trained or ranked, and no right one is kept from it.

The mistakes that ``tests/test_check.py`` plants in a layer are met again here, in a flow, as ``compare.py`` builds one.
"""

import math

import pytest
import torch
from nflows.transforms import BatchNorm, CompositeTransform, Transform

from adapters import build_flow, flow_names
from adapters.flow import Flow, StandardNormal
from adapters.preprocess import Standardize
from runs.common.gates import check_after_training, check_before_training, errors
from tests.laws import randomise
from tests.test_check import EVENT, NAMED, ONE_LINE, ONLY_OF_IMAGES, PLANTED, SHAPES, SPLINES, Hand, returning

# Before training


class InFlow(Transform):
    """A layer as the exercise has it, noise → data, of events of any shape, as a transform of a flow of vectors."""

    def __init__(self, layer, event_shape):
        super().__init__()
        self.layer, self.event_shape = layer, event_shape

    def forward(self, inputs, context=None):
        return self.flat(self.layer.inverse, inputs)

    def inverse(self, inputs, context=None):
        return self.flat(self.layer, inputs)

    def flat(self, function, vectors):
        outputs, log_det = function(vectors.view(len(vectors), *self.event_shape))
        return outputs.view_as(vectors), log_det


def report_of(layer, event_shape):
    """What is found before any training of a flow of that layer."""
    transform = layer if isinstance(layer, Transform) else InFlow(layer, event_shape)
    features = math.prod(event_shape)
    flow = Flow(CompositeTransform([transform]), StandardNormal([features]), (features,))
    return check_before_training(flow, features)


EITHER_WAY = "direction"  # such a layer has a density, too, in a flow that turns it round


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("planted", [name for name in PLANTED if name != EITHER_WAY])
def test_no_planted_mistake_is_trained(planted, shape):
    forward, inverse, mistake, equation = PLANTED[planted]
    report = report_of(Hand(shape, forward, inverse), shape)
    assert not report, f"\n{report}"
    assert report.reasons[0] == mistake + f" (equation {equation})" * (equation is not None), report.reasons


@pytest.mark.parametrize("planted", ONLY_OF_IMAGES)
def test_no_mistake_in_an_images_log_determinant_is_trained(planted):
    report = report_of(Hand(SHAPES["image"], returning(ONLY_OF_IMAGES[planted])), SHAPES["image"])
    assert not report and EVENT in report.reasons[0], f"\n{report}"


WITH_A_DENSITY_OF_THEIR_OWN = (
    "flow, direction",
    "flow, sign",
    "flow, no log-determinant",
    "flow, summed",
    "flow, no constant",
)
CLASSES = {name: entry[:2] for name, entry in NAMED.items() if name not in WITH_A_DENSITY_OF_THEIR_OWN}
NOT_WRONG_HERE = "a number", "a context that must be given"  # 0.0, added to others' log-determinants, does no harm
CLASSES |= {name: (layer, (2,)) for name, (layer, _) in ONE_LINE.items() if name not in ("hangs", *NOT_WRONG_HERE)}
CLASSES |= {layer.__name__: (layer, (4,)) for layer in SPLINES}


@pytest.mark.parametrize("planted", CLASSES)
def test_no_planted_class_is_trained(planted):
    layer, shape = CLASSES[planted]
    report = report_of(layer(), shape)
    assert not report and report.reasons, f"\n{report}"


class Squashed(Transform):
    """Onto (−2, 2) only: the noise beyond is of no datum."""

    def forward(self, inputs, context=None):
        return 1.2 * torch.tanh(inputs), (1.2 / torch.cosh(inputs) ** 2).log().sum(1)

    def inverse(self, inputs, context=None):
        outputs = torch.atanh((inputs / 1.2).clamp(-1 + 1e-9, 1 - 1e-9))
        return outputs, -self.forward(outputs)[1]


class Base(StandardNormal):
    wrong = ""

    def _log_prob(self, inputs, context):
        return super()._log_prob(inputs, context) + (math.log(0.95) if self.wrong == "mass" else 0)

    def _sample(self, num_samples, context):
        return super()._sample(num_samples, context) * (0.9 if self.wrong == "narrow" else 1)


@pytest.mark.parametrize(
    ("base", "extra", "broken"),
    [
        ("", (), []),
        ("mass", (), ["mass"]),
        ("narrow", (), ["mass"]),
        ("", (Squashed(),), ["round_trip", "inverse_log_det"]),
    ],
)
def test_a_wrong_base_and_a_map_that_is_not_onto_are_not_trained(base, extra, broken):
    flow = build_flow("masked-affine", 2, layers=2, hidden_features=(8,))
    wrong = Base([2])
    wrong.wrong = base
    flow = Flow(CompositeTransform([flow.transform, *extra]), wrong, (2,))
    before, parameters = torch.get_rng_state(), [parameter.clone() for parameter in flow.parameters()]
    report = check_before_training(flow, 2)
    assert report.broken == broken, f"\n{report}"
    assert torch.equal(before, torch.get_rng_state()) and all(map(torch.equal, parameters, flow.parameters()))


@pytest.mark.parametrize("name", flow_names())
def test_every_flow_of_the_catalogue_is_trained(name):
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0])
    flow = build_flow(name, 2, layers=2, hidden_features=(16, 16), masks=(mask, 1 - mask))
    report = check_before_training(flow, 2)
    assert report and report.reasons == [], f"\n{report}"


# After training


class Bent(Standardize):
    """Wrong in one way."""

    wrong = ""

    def forward(self, inputs, context=None):
        outputs, log_det = super().forward(inputs, context)
        return outputs, log_det + 0.1 * (self.wrong == "log_det")

    def inverse(self, inputs, context=None):
        outputs, log_det = super().inverse(inputs, context)
        return outputs + 0.1 * (self.wrong == "inverse"), log_det + 0.1 * (self.wrong == "inverse_log_det")


class Lossy(Flow):
    """A density that integrates to 0.9."""

    def log_prob(self, inputs, context=None):
        return super().log_prob(inputs, context) + math.log(0.9)


def planted(features, wrong="", kind=Flow):
    bent = Bent(torch.full((features,), 0.3), torch.full((features,), 0.5))
    bent.wrong = wrong
    flow = randomise(build_flow("masked-affine", features, layers=2, hidden_features=(8,))).float()
    return kind(CompositeTransform([bent, flow.transform]), StandardNormal([features]), (features,))


@pytest.mark.parametrize(
    ("features", "wrong", "kind", "broken"),
    [
        (2, "", Flow, []),
        (2, "log_det", Flow, ["forward_log_det", "samples", "mass"]),
        (2, "inverse", Flow, ["round_trip"]),
        (2, "inverse_log_det", Flow, ["inverse_log_det", "samples"]),
        (2, "", Lossy, ["samples", "mass"]),
        (80, "", Flow, []),
        (80, "log_det", Flow, ["forward_log_det", "samples"]),
        (80, "inverse_log_det", Flow, ["samples"]),
    ],
)
def test_what_is_wrong_with_a_trained_flow_is_found(features, wrong, kind, broken):
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(1000, features)
    flow, state = planted(features, wrong, kind), torch.get_rng_state()
    report = check_after_training(flow, x, (-4.0, 5.0) if features == 2 else None)
    assert torch.equal(state, torch.get_rng_state())  # a training's random numbers are its own
    assert report.broken == broken, f"\n{report}"
    assert set(errors(report)) >= set(broken)
    assert all(error < 1e-6 for law, error in errors(report).items() if law not in ("mass", *broken))


def test_a_trained_flow_with_batch_normalisation_is_right_in_evaluation_mode():
    torch.manual_seed(0)
    flow = planted(2)
    flow = Flow(CompositeTransform([flow.transform, BatchNorm(2)]), flow.base, (2,))
    x = 0.3 + 0.5 * torch.randn(1000, 2)
    for part in x.split(100):
        flow.log_prob(part)
    assert flow.training and check_after_training(flow, x, (-4.0, 5.0)) and flow.training


def test_nan_breaks_every_law():
    flow = planted(2)
    with torch.no_grad():
        next(flow.parameters()).fill_(math.nan)
    report = check_after_training(flow, torch.randn(50, 2))
    assert report.broken == ["outputs"] and "nan" in report.reasons[0]
