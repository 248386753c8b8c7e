"""The number of rows of a batch changes nothing: no result is misread because two sizes happen to be the same.

A batch is put through whole and row by row, for numbers of rows that coincide with other sizes: 1, where everything
broadcasts, those of the datum and of the context, and the number of all coordinates. The sweeps over
all layers of the libraries do the same.
"""

import pytest
import torch

from adapters import as_flow, build_flow, flow_names
from tests.examples import examples, models
from tests.laws import (
    assert_rows_apart,
    assert_rows_apart_both_ways,
    batch,
    context_for,
    numbers_of_rows,
    randomise,
)

EXAMPLES, MODELS = examples(), models()
SOLVED = "continuous"  # what an adaptive solver computes depends on the whole batch, within its tolerance
CONTEXT = 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if SOLVED not in name])
@torch.no_grad()
def test_of_an_example(name, dtype):
    entry = EXAMPLES[name]
    torch.manual_seed(0)
    transform = randomise(entry.make(), scale=0.1).eval().to(dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    for rows in numbers_of_rows(entry.event_shape, entry.context_features):
        context = context_for(entry.context_features, rows)
        context = None if context is None else context.to(dtype)
        x = batch(rows, *entry.event_shape).to(dtype)
        assert_rows_apart_both_ways(transform, transform.inverse, x, context, tolerance)


@pytest.mark.parametrize("name", [name for name in MODELS if SOLVED not in name])
@torch.no_grad()
def test_of_a_model(name):
    entry = MODELS[name]
    torch.manual_seed(0)
    flow = randomise(as_flow(entry.make()), scale=0.1).eval()
    for rows in numbers_of_rows(entry.event_shape, entry.context_features):
        x, context = batch(rows, *entry.event_shape), context_for(entry.context_features, rows)
        assert_rows_apart(flow.log_prob, x, context)
        if entry.samples:
            assert_rows_apart(flow.decode, flow.encode(x, context), context)
            leading = (rows,) if context is None else (rows, rows)  # as many samples as contexts
            samples, log_prob = flow.sample_and_log_prob(rows, context)
            assert samples.shape == (*leading, *entry.event_shape) and log_prob.shape == leading


@pytest.mark.parametrize("context_features", [None, CONTEXT])
@pytest.mark.parametrize("name", flow_names())
@torch.no_grad()
def test_of_a_flow_of_the_catalogue(name, context_features):
    torch.manual_seed(0)
    flow = randomise(build_flow(name, 2, context_features, layers=2, hidden_features=(4, 4)), scale=0.1).eval()
    for rows in numbers_of_rows((2,), context_features):
        x, context = batch(rows, 2), context_for(context_features, rows)
        assert_rows_apart(flow.log_prob, x, context)
        assert_rows_apart_both_ways(flow.transform, flow.transform.inverse, x, context)
