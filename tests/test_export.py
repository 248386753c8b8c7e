"""Our flows in torch.export, with a batch of any size, and in torch.func."""

import io

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close

from adapters import build_flow, flow_names
from adapters.finite import with_finite_rows
from adapters.preprocess import Logit, Marginals, Probit, Standardize
from tests.laws import autograd_log_det, randomise

OURS = [name for name in flow_names() if name.startswith("masked-")]
PREPROCESSINGS = {
    "standardize": lambda: Standardize(torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4)),
    "logit": Logit,
    "probit": Probit,
    "marginals": lambda: Marginals(torch.tensor([[0.5, 0.2, 0.3]]).expand(4, 3)),
}
CONDITIONAL = [(name, 3, None) for name in OURS]
PREPROCESSED = [("masked-affine", None, preprocess) for preprocess in PREPROCESSINGS]
PLAIN = [(name, None, None) for name in OURS]
NAMES = ("name", "context_features", "preprocess")


class Scored(nn.Module):
    """A flow as a module whose call scores."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context=None):
        return self.flow.log_prob(x, context)


class BothWays(Scored):
    """Scored, and, as if it were noise, turned into data."""

    def forward(self, x, context=None):
        return super().forward(x, context), self.flow.transform.inverse(x, context)


def build(name, context_features, preprocess):
    torch.manual_seed(0)
    made = PREPROCESSINGS[preprocess]() if preprocess else None
    layers = 2 if name == "masked-affine" and not preprocess else 1
    flow = build_flow(name, 4, context_features, layers=layers, hidden_features=(8,), preprocess=made)
    return randomise(flow).eval()


def arguments(rows, context_features):
    x = torch.rand(rows, 4, dtype=torch.float64)
    return (x,) if context_features is None else (x, torch.randn(rows, context_features, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.10's own load says so once
@pytest.mark.parametrize(NAMES, CONDITIONAL + PREPROCESSED)
def test_an_exported_flow_takes_any_batch(name, context_features, preprocess):
    module = BothWays(build(name, context_features, preprocess))
    given, rows = arguments(5, context_features), torch.export.Dim("rows")
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, given, dynamic_shapes=tuple({0: rows} for _ in given)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (2, 7, 64):
        given = arguments(count, context_features)
        assert_close(loaded(*given), module(*given))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # of a batch that vmap has laid out otherwise
@pytest.mark.parametrize(NAMES, PLAIN + CONDITIONAL + PREPROCESSED)
def test_a_flow_is_mapped_and_differentiated_by_torch_func(name, context_features, preprocess):
    flow = build(name, context_features, preprocess)
    given = arguments(6, context_features)

    def one(function):
        return lambda *row: function(*(value[None] for value in row))[0]

    x = given[0].clone().requires_grad_()
    log_prob = flow.log_prob(x, *given[1:])
    assert_close(vmap(one(flow.log_prob))(*given), log_prob)
    assert_close(vmap(grad(one(flow.log_prob)))(*given), torch.autograd.grad(log_prob.sum(), x)[0])
    jacobian = vmap(jacrev(one(flow.encode)))(*given)
    context = given[1] if context_features else None
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, autograd_log_det(flow.transform, given[0], context))
    noise = flow.encode(*given)
    made = vmap(one(lambda *row: flow.transform.inverse(*row)[0]))(noise, *given[1:])
    assert_close(made, given[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("preprocess", ["logit", "probit", "marginals"])
def test_where_no_value_can_be_asked_for_data_out_of_range_have_density_0(preprocess):
    flow = build("masked-affine", None, preprocess)
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.5]], dtype=torch.float64)
    exported = torch.export.export(Scored(flow), (x,)).module()
    mapped = vmap(lambda row: flow.log_prob(row[None])[0])
    for call in (exported, mapped):
        log_prob = call(x)
        assert log_prob[0].isfinite() and log_prob[1] == -torch.inf


@pytest.mark.parametrize("name", ["masked-affine-textbook", "masked-spline", "masked-histogram"])
def test_a_flow_compiles_as_one_graph(name):
    torch.compiler.reset()
    flow, (x,) = build(name, None, None), arguments(6, None)
    assert_close(torch.compile(Scored(flow), backend="eager", fullgraph=True)(x), flow.log_prob(x))


class Guarded(nn.Module):
    """What keeps rows that are not finite from a library."""

    def forward(self, x, context):
        return with_finite_rows(lambda x, context: (x * 2, x.sum(1) + context.sum(1)), x, context)


def test_rows_that_are_not_finite_are_kept_away_in_an_export_a_compiled_graph_and_a_map():
    module, rows = Guarded(), torch.export.Dim("rows")
    x, context = arguments(5, 2)
    x[2, 1], context[3, 0] = torch.nan, torch.inf
    right = module(x, context)
    assert right[1].isnan().tolist() == [False, False, True, True, False]
    exported = torch.export.export(module, arguments(7, 2), dynamic_shapes=({0: rows}, {0: rows})).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    mapped = vmap(lambda *row: tuple(part[0] for part in module(*(value[None] for value in row))))
    for call in (exported, compiled, mapped):
        assert_close(call(x, context), right, equal_nan=True)
