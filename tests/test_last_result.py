"""What is kept of a pass is given out for the next question alone, and never when it has gone stale."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import nflows.transforms
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from adapters import FlowDistribution, as_transform, to_library
from adapters.bridges import libraries
from adapters.flow import Flow, StandardNormal
from adapters.last_result import LastResult
from tests.laws import batch


class Scaled(nflows.transforms.Transform):
    """x ↦ scale · x of everything that a pass may depend on: weight, buffer, modes, modules, context."""

    def __init__(self, context_features=None):
        super().__init__()
        self.context_features = context_features
        self.inner, self.empty = nn.Linear(3, 3), nn.Module()
        self.register_buffer("buffer", torch.rand(3) + 0.5)
        self.passes = 0

    def scale(self, inputs, context):
        scale = self.inner.weight[0] * self.buffer * (2 if self.training else 1) * (3 if self.inner.training else 1)
        scale = scale + sum(self.empty.buffers(), 0.0) + sum(self.empty.parameters(), 0.0)
        scale = torch.mm(inputs.new_ones(1, 1), scale[None])  # in bfloat16 under autocast
        return scale if context is None else scale * context.exp()

    def forward(self, inputs, context=None):
        self.passes += 1
        scale = self.scale(inputs, context)
        return inputs * scale, scale.abs().log().sum(1).expand(len(inputs))

    def inverse(self, inputs, context=None):
        self.passes += 1
        scale = self.scale(inputs, context)
        return inputs / scale, -scale.abs().log().sum(1).expand(len(inputs))


class Asked(NamedTuple):
    """A user of ``LastResult``: what is first asked for, and the question that follows.

    Attributes:
        holder: a ``FlowDistribution`` or an exported transform.
        transform: the flow's transform.
        first: makes a sample, or an inverse: the tensors of the question.
        then: asks for the log-density or the log-determinant at these.
        anew: the same with nothing kept.
        context: the very tensor that it reads; ``None`` for none.
    """

    holder: Any
    transform: Scaled
    first: Callable[[], tuple]
    then: Callable[..., torch.Tensor]
    anew: Callable[..., torch.Tensor]
    context: torch.Tensor | None


def made(user, conditional, dtype=torch.float64):
    torch.manual_seed(0)
    transform = Scaled(3 if conditional else None).to(dtype)
    flow = Flow(transform, StandardNormal([3]).to(dtype), (3,), transform.context_features)
    context = batch(4, 3, seed=5).to(dtype) if conditional else None
    if user == "distribution":
        p = FlowDistribution(flow, context, validate_args=False)

        def anew(x):
            return FlowDistribution(p.flow, p.context, validate_args=False).log_prob(x)

        shape = () if conditional else (4,)
        return Asked(p, transform, lambda: (p.rsample(shape),), lambda x: p.log_prob(x), anew, context)

    def exported():
        out = to_library(user, flow)
        if user == "zuko":
            return out(context)
        return out if context is None else out.condition(context)

    t, given = exported(), batch(4, 3).to(dtype)

    def first():
        y = given.clone()
        return t.inv(y), y

    def anew(x, y):
        other = exported()
        other.transform = t.transform
        return other.log_abs_det_jacobian(x, y)

    return Asked(t, transform, first, lambda x, y: t.log_abs_det_jacobian(x, y), anew, context)


USERS = ["distribution", *(library for library in ("torch", "pyro", "zuko") if library in libraries())]
EVERY_USER = pytest.mark.parametrize("user", USERS)
CONTEXTS = pytest.mark.parametrize("conditional", [False, True], ids=["plain", "conditional"])


def weight(asked):
    return asked.transform.inner.weight


def new_weight():
    return nn.Parameter(torch.randn(3, 3, dtype=torch.float64))


def free_first(asked, replace):
    """So that the new tensor may come to lie where the old one lay."""
    for _ in range(20):
        replace(asked)


def replaced_parameter(asked):
    del asked.transform.inner.weight
    asked.transform.inner.weight = new_weight()


def replaced_data(asked):
    weight(asked).data = torch.empty(0)
    weight(asked).data = torch.randn(3, 3, dtype=torch.float64)


def fused_step(asked):
    weight(asked).grad = torch.ones_like(weight(asked))
    torch.optim.Adam([weight(asked)], 0.1, fused=True).step()


def other_transform(asked):
    other = Scaled(asked.transform.context_features).double()
    if isinstance(asked.holder, FlowDistribution):
        asked.holder.flow.transform = other
    else:
        asked.holder.transform = other


def other_flow(asked):
    if isinstance(asked.holder, FlowDistribution):
        flow, width = asked.holder.flow, asked.transform.context_features
        asked.holder.flow = Flow(Scaled(width).double(), flow.base, (3,), width)
    else:
        asked.holder.transform = Scaled(asked.transform.context_features).double()


CHANGES = {
    "a parameter, in place": lambda a: weight(a).mul_(2),
    "a parameter's data": lambda a: setattr(weight(a), "data", torch.randn(3, 3, dtype=torch.float64)),
    "a parameter's data, freed first": lambda a: free_first(a, replaced_data),
    "a parameter's data, as another view": lambda a: setattr(weight(a), "data", weight(a).data.T),
    "a parameter's data, elsewhere in its memory": lambda a: setattr(weight(a), "data", weight(a).data.flip(0)),
    "a parameter": lambda a: setattr(a.transform.inner, "weight", new_weight()),
    "a parameter, freed first": lambda a: free_first(a, replaced_parameter),
    "a loaded state": lambda a: a.transform.load_state_dict({k: v + 1 for k, v in a.transform.state_dict().items()}),
    "another dtype and back": lambda a: a.transform.float().double(),
    "a fused step": fused_step,
    "a module": lambda a: setattr(a.transform, "inner", nn.Linear(3, 3).double()),
    "the transform": other_transform,
    "the flow": other_flow,
    "a buffer, in place": lambda a: a.transform.buffer.mul_(2),
    "a buffer": lambda a: setattr(a.transform, "buffer", torch.rand(3, dtype=torch.float64)),
    "a buffer's data": lambda a: setattr(a.transform.buffer, "data", torch.rand(3, dtype=torch.float64)),
    "a new buffer": lambda a: a.transform.empty.register_buffer("new", torch.ones(3, dtype=torch.float64)),
    "a new parameter": lambda a: a.transform.empty.register_parameter(
        "new", nn.Parameter(torch.ones(3, dtype=torch.float64))
    ),
    "its mode": lambda a: a.transform.eval(),
    "a part's mode": lambda a: a.transform.inner.eval(),
}


@EVERY_USER
@CONTEXTS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_given_out(user, conditional, grad, change):
    asked = made(user, conditional)
    with torch.set_grad_enabled(grad):
        about = asked.first()
        with torch.no_grad():
            CHANGES[change](asked)
        log_det = asked.then(*about)
        assert_close(log_det, asked.anew(*about), rtol=0, atol=0)
        assert log_det.requires_grad == grad
        passes = asked.transform.passes
        asked.then(*asked.first())  # what comes after the change is kept again
    if change not in ("the transform", "the flow"):  # which have other passes
        assert asked.transform.passes == passes + 1


@EVERY_USER
@CONTEXTS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_without_a_change_there_is_one_pass_for_both(user, conditional, grad):
    asked = made(user, conditional)
    with torch.set_grad_enabled(grad):
        about = asked.first()
        log_det = asked.then(*about)
    assert asked.transform.passes == 1
    assert_close(log_det, asked.anew(*about), rtol=1e-12, atol=1e-12)
    asked.then(*about)
    assert asked.transform.passes == 3, "it is given out once"


@EVERY_USER
@CONTEXTS
def test_the_tensors_asked_about_are_the_very_same_and_unchanged(user, conditional):
    asked = made(user, conditional)
    with torch.no_grad():
        for change in ("value", "copy", "shape", "another question", "context", "context's data"):
            *values, last = about = asked.first()
            if change == "value":
                last.mul_(2)
            elif change == "copy":
                about = *values, last.clone().mul_(2)
            elif change == "shape":
                last.data = last.data.flip(0)
            elif change == "another question":
                asked.transform.buffer.mul_(2)
                asked.first()
            elif conditional and change == "context":
                asked.context.add_(1)
            elif conditional:
                asked.context.data = asked.context.data + 1
            passes = asked.transform.passes
            assert_close(asked.then(*about), asked.anew(*about), rtol=1e-12, atol=1e-12)
            assert asked.transform.passes == passes + (2 if conditional or "context" not in change else 1)


@EVERY_USER
@CONTEXTS
def test_gradients_are_those_asked_for(user, conditional):
    asked = made(user, conditional)
    with torch.no_grad():
        about = asked.first()
    assert asked.then(*about).requires_grad
    about = asked.first()
    with torch.no_grad():
        assert not asked.then(*about).requires_grad
    about = asked.first()
    weight(asked).requires_grad_(False)
    passes = asked.transform.passes
    asked.then(*about)
    assert asked.transform.passes == passes + 1
    weight(asked).requires_grad_()
    about = asked.first()
    x, *y = about
    if x._base is not None:  # a view, as samples are, which cannot be detached
        return
    x.detach_().requires_grad_()  # a leaf now, which the graph it came with does not know
    passes = asked.transform.passes
    asked.then(x, *y)
    assert asked.transform.passes == passes + 1


@EVERY_USER
@CONTEXTS
def test_inference_mode_counts_no_changes_but_they_are_seen(user, conditional):
    asked = made(user, conditional)
    with torch.inference_mode():
        about = asked.first()
        assert_close(asked.then(*about), asked.anew(*about), rtol=1e-12, atol=1e-12)
        assert asked.transform.passes == 2, "one for both, and one anew"
        about = asked.first()
        about[-1].mul_(2)
        assert_close(asked.then(*about), asked.anew(*about), rtol=0, atol=0)
        about = asked.first()
    with torch.no_grad():
        assert not asked.then(*about).is_inference()


@EVERY_USER
@CONTEXTS
def test_autocast_is_as_it_was(user, conditional):
    asked = made(user, conditional, torch.float32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            about = asked.first()
        assert_close(asked.then(*about), asked.anew(*about), rtol=0, atol=0)


@EVERY_USER
def test_no_tensor_is_kept_alive_without_need(user):
    asked = made(user, False)
    about = asked.first()
    graph = weakref.ref(asked.transform.buffer)
    asked.transform.buffer = torch.ones(3, dtype=torch.float64)
    kept = weakref.ref(last_of(asked).kept.result)
    with torch.no_grad():
        asked.then(*about)
    gc.collect()
    assert kept() is None, "what was asked for, or has gone stale, is gone"
    del about
    gc.collect()
    assert graph() is None
    with torch.no_grad():
        about = asked.first()
    kept = weakref.ref(last_of(asked).kept.result)
    del about
    gc.collect()
    assert kept() is None and last_of(asked).kept is None, "nobody can ask about it any more"


def last_of(asked):
    return next(value for value in vars(asked.holder).values() if isinstance(value, LastResult))


@EVERY_USER
@CONTEXTS
@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))],
    ids=["copy", "deep", "pickle"],
)
def test_copies_keep_nothing_of_their_originals(way, user, conditional):
    asked = made(user, conditional)
    about = tuple(tensor.detach() for tensor in asked.first())
    asked.then(*about)
    about = asked.first()
    copied = way(asked.holder)
    last = next(value for value in vars(copied).values() if isinstance(value, LastResult))
    if way is not copy.copy:
        assert last.kept is None and last is not last_of(asked)
    ask = copied.log_prob if user == "distribution" else copied.log_abs_det_jacobian
    assert_close(ask(*about), asked.anew(*about), rtol=1e-12, atol=1e-12)


@EVERY_USER
@CONTEXTS
def test_threads_get_their_own_answers(user, conditional):
    asked = made(user, conditional)

    def ask(_):
        with torch.no_grad():
            about = asked.first()
            return asked.then(*about), asked.anew(*about)

    with ThreadPoolExecutor(4) as pool:
        for log_det, right in pool.map(ask, range(100)):
            assert_close(log_det, right, rtol=1e-12, atol=1e-12)


@EVERY_USER
def test_where_nothing_can_tell_nothing_is_kept(user):
    asked = made(user, False)
    about = tuple(tensor.detach() for tensor in asked.first())

    def both(*values):
        asked.first()
        return asked.then(*values)

    expected = asked.anew(*about)
    assert_close(
        torch.func.vmap(both, randomness="different")(*(tensor[:, None] for tensor in about)).squeeze(1), expected
    )
    parameters = dict(asked.transform.named_parameters())

    def of_parameters(parameters):
        with torch.nn.utils.stateless._reparametrize_module(asked.transform, parameters):
            return asked.then(*asked.first()).sum()

    gradients = torch.func.grad(of_parameters)(parameters)
    assert gradients["inner.weight"].isfinite().all()
    with FakeTensorMode(allow_non_fake_inputs=True):
        log_det = asked.then(*asked.first())
        assert log_det.shape == (4,)
    torch.compiler.reset()
    assert_close(torch.compile(both, backend="eager")(*about), expected)


@pytest.mark.parametrize("library", libraries())
def test_every_export_follows_its_transform(library):
    """Those of libraries that ask for value and log-determinant in one call keep nothing, but are held to the same."""
    from adapters.bridges import bridges

    bridge = next(bridge for bridge in bridges() if library in bridge.LIBRARIES)
    for change in CHANGES.values():
        transform, x = Scaled().double(), batch(4, 3)
        flow = Flow(transform, StandardNormal([3]).double(), (3,))
        exported = to_library(library, flow)
        bridge.native_log_prob(exported, x)
        with torch.no_grad():
            if change not in (other_transform, other_flow):
                change(Asked(exported, transform, *[None] * 4))
            assert_close(bridge.native_log_prob(exported, x), flow.log_prob(x))
        assert as_transform(exported) is transform
