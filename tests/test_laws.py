"""The laws of ``tests/laws.py``, for every example of every layer and bridge and every flow of the catalogue.

A new file in tests/examples or adapters/catalogue is held to them without a line changed here. What else a bridge does,
such as the export of images and a library's own models, is held to the same laws in ``tests/test_bridges.py``.
"""

import copy
from functools import cache

import pytest
import torch
from nflows.transforms import Transform
from torch.testing import assert_close

from adapters import as_transform, build_flow, flow_names, to_library
from adapters.bridges import bridges, installed
from adapters.flow import Flow, StandardNormal
from tests.examples import examples
from tests.laws import (
    batch,
    context_for,
    law_1_contract,
    law_1_state_dict,
    law_2_round_trip,
    law_3_direction,
    law_4_normalised,
    law_4_samples,
    law_5_context,
    law_5_samples,
    law_6_device,
    randomise,
    train,
)

ROWS = 4
EXAMPLES = examples()
CONTEXT = 3  # width of the context of the conditional flows

trained_or_not = pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
conditional_or_not = pytest.mark.parametrize("context_features", [None, CONTEXT])
each_flow = pytest.mark.parametrize("name", flow_names())


@cache
def example(name: str, trained: bool = False) -> Transform:
    """An example, randomised or trained as the transform of a flow. No test changes it."""
    entry = EXAMPLES[name]
    torch.manual_seed(0)
    transform = entry.make()
    if not trained:
        return randomise(transform).eval()
    flow = Flow(transform, StandardNormal(entry.event_shape), entry.event_shape, entry.context_features)
    return train(flow, entry.event_shape, entry.context_features).transform.eval()


@cache
def flow(name: str, features: int, context_features: int | None, trained: bool) -> Flow:
    """A flow of the catalogue, randomised or trained. No test changes it."""
    torch.manual_seed(0)
    flow = build_flow(name, features, context_features, layers=3, hidden_features=(8, 8))
    trained_flow = train(flow, (features,), context_features) if trained else randomise(flow, scale=0.1)
    return trained_flow.eval()


def inputs_of(name: str):
    """An input and a context for an example."""
    return batch(ROWS, *EXAMPLES[name].event_shape), context_for(EXAMPLES[name].context_features, ROWS)


# Laws of transforms


@trained_or_not
@pytest.mark.parametrize("name", EXAMPLES)
def test_law_1_contract(name, trained):
    law_1_contract(example(name, trained), *inputs_of(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_law_1_state_dict(name):
    torch.manual_seed(5)
    made_anew = EXAMPLES[name].make().double().eval()
    law_1_state_dict(
        example(name), made_anew, lambda transform: torch.cat([*map(torch.flatten, transform(*inputs_of(name)))])
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_copy_after_a_call_computes_the_same(name):
    transform, inputs = example(name), inputs_of(name)
    y = transform(*inputs)
    assert_close(copy.deepcopy(transform)(*inputs), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("hand_written:")])
def test_law_6_device(name, device):  # in float32, for which other examples' tolerances are too fine
    x, context = inputs_of(name)
    transform = copy.deepcopy(example(name)).float()
    law_6_device(transform, device, x.float(), None if context is None else context.float())


# Laws of flows


@each_flow
def test_law_1_contract_of_a_flow(name):
    law_1_contract(flow(name, 4, CONTEXT, True).transform, 1.5 * batch(ROWS, 4), context_for(CONTEXT, ROWS))


@each_flow
def test_laws_2_and_3_of_a_flow_in_every_library(name):
    conditional, x, context = flow(name, 4, CONTEXT, True), batch(ROWS, 4), context_for(CONTEXT, ROWS)
    for bridge in filter(installed, bridges()):
        for library in bridge.LIBRARIES:
            exported = to_library(library, conditional.transform, event_dim=1, conditional=True)
            law_2_round_trip(conditional.transform, as_transform(exported), x, context)
            law_3_direction(conditional, bridge.native_log_prob(exported, x, context), x, context)


@each_flow
def test_law_4_normalised(name):
    cells = 1000 if name == "masked-histogram" else 400  # whose density has edges, for which a grid must be fine
    law_4_normalised(flow(name, 2, None, False), cells)


@conditional_or_not
@trained_or_not
@each_flow
def test_law_4_samples(name, trained, context_features):
    law_4_samples(flow(name, 4, context_features, trained), (4,), context_for(context_features, 5))


@trained_or_not
@each_flow
def test_law_5_context(name, trained):
    conditional, contexts = flow(name, 4, CONTEXT, trained), context_for(CONTEXT, 5)
    law_5_context(conditional, batch(5, 4), contexts)
    law_5_samples(conditional, contexts)


@each_flow
def test_a_seed_gives_the_same_flow(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_flow(name, 3, layers=2, hidden_features=(8, 8)).parameters()])

    assert torch.equal(weights(4), weights(4))
    assert not torch.equal(weights(4), weights(5))
