"""sbi: any flow as the density estimator of simulation-based inference, and sbi's own estimators as flows.

sbi infers parameters θ from a simulation's result x. ``NPE`` learns the posterior p(θ | x), ``NLE`` the likelihood
p(x | θ), ``MarginalTrainer`` the evidence p(x). Each takes a *builder*: a function of the simulations which makes the
*estimator*, a module that scores and draws. In an estimator's words, ``input`` is what the density is of, and
``condition`` is what we call the context. Its tensors are of shape ``(sample, batch, *event)``, and nflows' of
``(batch, sample, *event)``; ``_conditional_estimator`` is the one place that turns one into the other.

sbi builds on nflows and zuko, so an estimator comes in by the bridge of the flow that is inside it.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import nflows.distributions
import torch
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from adapters.bridges.common.context import AnyContextFlow
from adapters.bridges.common.exports import EmbeddedContext, EventDim, whole_transform
from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.tensors import like
from adapters.bridges.zuko import import_zuko
from adapters.checks import shown
from adapters.flow import Flow, StandardNormal
from adapters.parts import base_of, embedding_of, event_shape_of, noise_shape_of, transform_of

PACKAGES = LIBRARIES = ("sbi",)
DISTRIBUTION = "sbi"
EXTRA = "sbi"

ROLES = {"posterior": "the prior's parameters", "likelihood": "the simulations"}  # what each density is of
Z_SCORES = (None, "none", "independent", "structured")
UNCONDITIONAL = "this flow is unconditional: it would ignore what NPE and NLE condition on"
Source = NflowsFlow | Transform | Callable[..., Any]


@cache
def import_sbi() -> ModuleType:
    """sbi's package of estimators, imported so that torch.distributions validates arguments as it did before.

    sbi imports zuko, which turns validation off unless ``import_zuko`` has imported it first.
    """
    import_zuko()
    from sbi.neural_nets import estimators

    return estimators


def transform_in(foreign: Any) -> Transform | None:
    """For a builder, the transform of the flow that it was made of.

    Raises:
        TypeError: for a builder that was made of a name or a factory, which has no flow before it is called.
    """
    if not isinstance(foreign, _builder()):
        return None
    source = _source_of(foreign)
    return source if isinstance(source, Transform) else whole_transform(source)


def flow_in(foreign: Any) -> NflowsFlow | None:
    """An estimator that has a flow of any library inside, such as sbi's ``maf`` and ``zuko_nsf``, or one made here.

    Its context is the estimator's condition as it is: z-scoring and embedding network are parts of the flow.

    Raises:
        TypeError: for a posterior, whose density is cut to the prior's support; for an estimator that holds no flow.
    """
    from adapters.bridges import as_flow

    estimators = import_sbi()
    if isinstance(foreign, _builder()):
        source = _source_of(foreign)
        return None if isinstance(source, Transform) else source
    if hasattr(foreign, "posterior_estimator"):
        raise TypeError(
            f"{type(foreign).__name__} is cut to the support of its prior, so it is no flow; its estimator is one: "
            "as_flow(posterior.posterior_estimator)"
        )
    if isinstance(foreign, estimators.UnconditionalDensityEstimator):
        return as_flow(foreign.net)
    if not isinstance(foreign, estimators.ConditionalDensityEstimator) or not isinstance(foreign.net, nn.Module):
        return None
    inner, embedding_net = as_flow(foreign.net), foreign.embedding_net
    transform, base = transform_of(inner), base_of(inner)
    shape = event_shape_of(inner) or foreign.input_shape
    if type(base) is nflows.distributions.StandardNormal:  # which draws float32 always
        base = StandardNormal(noise_shape_of(base)).to(like(inner))
    if not isinstance(embedding_net, nn.Identity):
        transform = EmbeddedContext(transform, embedding_net)
        if any(True for _ in base.parameters()):  # it may read the context
            base = EmbeddedBase(base, embedding_net)
    if len(foreign.condition_shape) == 1:
        return Flow(transform, base, shape, foreign.condition_shape[0])
    return AnyContextFlow(transform, base, shape, needs_context=True)


class EmbeddedBase(nflows.distributions.Distribution):
    """A conditional base with the embedding network of its flow, which maps the context before it is used."""

    def __init__(self, base: nflows.distributions.Distribution, embedding_net: nn.Module):
        super().__init__()
        self.base, self.embedding_net, self.shape = base, embedding_net, noise_shape_of(base)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return self.base.log_prob(inputs, self.embedding_net(context))

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self.base.sample(num_samples, self.embedding_net(context))


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> Any:
    """A builder of estimators with this transform and a standard normal base."""
    return flow_out(transform)


def flow_out(
    source: Source,
    *,
    estimates: str = "posterior",
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    embedding_net: nn.Module = nn.Identity(),  # noqa: B008  # it has no state
    **options: Any,
) -> Any:
    """A builder for ``NPE(prior, density_estimator=builder)``, for ``NLE`` or, of no context, ``MarginalTrainer``.

    Each call makes an estimator of its own, as sbi expects of a builder that it may call again to train from scratch:
    of a flow or a transform it takes a copy, as it is at that moment. ``as_flow(estimator)`` is the trained flow.

    Args:
        source: a flow; a transform, for a standard normal base; a name for ``build_flow``; or a factory, which is
            called with those of ``features=`` and ``context_features=`` that it takes, and returns a flow or a
            transform of any library.
        estimates: ``"posterior"``, for ``NPE``, or ``"likelihood"``, for ``NLE``.
        z_score_theta, z_score_x: how parameters and simulations are standardised, by sbi's own functions: each number
            for itself (``"independent"``), all alike (``"structured"``), or not at all (``"none"``).
        embedding_net: maps the condition, once standardised, to the flow's context. As in sbi, it is not copied.
        options: for a name or a factory: further arguments, such as ``layers``.

    Raises:
        TypeError, ValueError: for arguments that no estimator can be made of. When the builder is called: for a flow
            that is unconditional; for one whose context is not as wide as the embedded condition; for one of another
            shape than what it is to be the density of.
    """
    if estimates not in ROLES:
        raise ValueError(f"estimates must be 'posterior', for NPE, or 'likelihood', for NLE, not {shown(estimates)}")
    for name, z_score in {"z_score_theta": z_score_theta, "z_score_x": z_score_x}.items():
        if z_score not in Z_SCORES:
            raise ValueError(f"{name} must be 'independent', 'structured' or 'none', not {shown(z_score)}")
    if not isinstance(embedding_net, nn.Module):
        raise TypeError(f"embedding_net must be an nn.Module, not {shown(embedding_net)}")
    if isinstance(source, str):
        from adapters.catalogue import build_flow

        source = partial(build_flow, source, **options)
        if "masks" not in options:  # which would say how many features
            with torch.random.fork_rng(devices=[]):
                source(features=2, context_features=1)  # what is wrong with the options is said now
    elif options and isinstance(source, NflowsFlow | Transform):
        raise TypeError(f"a flow that is built already takes no {', '.join(options)}; give its name or a factory")
    elif options:
        source = partial(source, **options)
    z_scores = (z_score_theta, z_score_x) if estimates == "posterior" else (z_score_x, z_score_theta)
    return _builder()(source, estimates, *z_scores, embedding_net)


def native_log_prob(exported: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of an estimator with a standard normal base, without z-scoring."""
    transform, shape = transform_in(exported), inputs.shape[1:]
    assert transform is not None
    width = None if context is None else context.shape[1]
    flow = Flow(transform, StandardNormal(shape).to(inputs), shape, width)
    if context is None:
        return _unconditional_estimator()(flow, shape).log_prob(inputs).squeeze(0)
    return _conditional_estimator()(flow, nn.Identity(), shape, context.shape[1:]).log_prob(inputs, context).squeeze(0)


@class_on_demand
def _builder() -> type:
    import_sbi()
    from sbi.neural_nets.estimators.base import ConditionalEstimatorBuilder
    from sbi.utils import sbiutils

    class FlowBuilder(ConditionalEstimatorBuilder):
        """Makes estimators of one kind of flow: see ``flow_out``.

        Args:
            source: what the flow is, or what makes it.
            estimates: a key of ``ROLES``.
            z_score_input, z_score_condition: how to standardise what the density is of, and what it is conditioned on.
            embedding_net: maps the condition, once standardised, to the flow's context.
        """

        def __init__(
            self,
            source: Source,
            estimates: str,
            z_score_input: str | None,
            z_score_condition: str | None,
            embedding_net: nn.Module,
        ):
            self.source, self.estimates, self.embedding_net = source, estimates, embedding_net
            self.z_score_input, self.z_score_condition = z_score_input, z_score_condition

        def __call__(self, theta: Tensor, x: Tensor | None = None) -> nn.Module:
            """The estimator for these simulations, which tell the shapes, and which it standardises by.

            Args:
                theta: parameters, ``(batch, *event)``; for ``MarginalTrainer``, the simulations.
                x: the simulations, ``(batch, *event)``; ``None`` for ``MarginalTrainer``.
            """
            if x is None:
                flow, _ = self._flow(theta, None)
                return _unconditional_estimator()(flow, theta.shape[1:])
            inputs, conditions = (theta, x) if self.estimates == "posterior" else (x, theta)
            embedding_net = self.embedding_net.to(conditions.device)
            z_scored, structured = sbiutils.z_score_parser(self.z_score_condition)
            if z_scored:
                embedding_net = nn.Sequential(sbiutils.standardizing_net(conditions, structured), embedding_net)
            if _tried(embedding_net, conditions).dim() != 2:
                embedding_net = nn.Sequential(embedding_net, nn.Flatten())
            flow, own_embedding = self._flow(inputs, _tried(embedding_net, conditions))
            if not isinstance(own_embedding, nn.Identity):
                embedding_net = nn.Sequential(embedding_net, own_embedding)
            _check_reads_context(flow, inputs[:2], _tried(embedding_net, conditions))
            return _conditional_estimator()(flow, embedding_net, inputs.shape[1:], conditions.shape[1:])

        def _flow(self, inputs: Tensor, context: Tensor | None) -> tuple[Flow, nn.Module]:
            """The flow, its standardisation in front of it, and the embedding network that it may have of its own.

            Args:
                inputs: data of the flow, ``(batch, *event)``.
                context: some rows of its context, once embedded, ``(rows, C)``; ``None`` for no context.
            """
            shape, width = inputs.shape[1:], None if context is None else context.shape[1]
            if isinstance(self.source, nn.Module):
                made = copy.deepcopy(self.source)
            else:
                made = _call(self.source, features=shape.numel(), context_features=width)
            flow = _whole(made, shape).to(inputs)
            what = ROLES[self.estimates] if width is not None else "the simulations"
            _check_widths(flow, shape, width, what)
            transform, embedding_net = transform_of(flow), embedding_of(flow)
            z_scored, structured = sbiutils.z_score_parser(self.z_score_input)
            if z_scored:
                transform = CompositeTransform([sbiutils.standardizing_transform(inputs, structured), transform])
            if context is not None and not isinstance(embedding_net, nn.Identity):
                width = _tried(embedding_net, context).shape[1]
            return Flow(transform, base_of(flow), shape, width), embedding_net

    return FlowBuilder


@class_on_demand
def _conditional_estimator() -> type:
    class ConditionalFlowEstimator(import_sbi().ConditionalDensityEstimator):
        """A flow as sbi's conditional density estimator.

        Args:
            flow: its context is the embedded condition.
            embedding_net: maps conditions ``(rows, *condition_shape)`` to ``(rows, C)``.
            input_shape, condition_shape: of one datum, and of what it is conditioned on.
        """

        def __init__(self, flow: Flow, embedding_net: nn.Module, input_shape: torch.Size, condition_shape: torch.Size):
            super().__init__(flow, input_shape, condition_shape)
            self._embedding_net = embedding_net

        @property
        def embedding_net(self) -> nn.Module:
            return self._embedding_net

        def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
            """``([sample,] batch, *event)`` of either, which broadcast with each other → ``(sample, batch)``."""
            self._check_input_shape(input)
            input = input if input.dim() > len(self.input_shape) + 1 else input.unsqueeze(0)
            return self._of_pairs(self.net.log_prob, input, condition)

        def loss(self, input: Tensor, condition: Tensor) -> Tensor:
            """−log p of each pair: ``(batch, *event)`` of either → ``(batch,)``."""
            return -self.log_prob(input, condition).squeeze(0)

        def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
            """The noise of the inputs, ``(*batch, *event)``, of which sbi's tests of calibration ask the density."""
            return self._of_pairs(self.net.encode, input, condition)

        def sample(self, sample_shape: torch.Size, condition: Tensor) -> Tensor:
            """Conditions ``(batch, *event)`` → ``(*sample_shape, batch, *event)``."""
            shape = torch.Size(sample_shape)
            samples = self.net.sample(shape.numel(), self._embedded(condition))
            return samples.transpose(0, 1).reshape(*shape, -1, *self.input_shape)

        def sample_and_log_prob(self, sample_shape: torch.Size, condition: Tensor) -> tuple[Tensor, Tensor]:
            """Samples, as ``sample`` gives them, and log p of each, ``(*sample_shape, batch)``, of the same pass."""
            shape = torch.Size(sample_shape)
            samples, log_prob = self.net.sample_and_log_prob(shape.numel(), self._embedded(condition))
            samples, log_prob = samples.transpose(0, 1), log_prob.transpose(0, 1)
            return samples.reshape(*shape, -1, *self.input_shape), log_prob.reshape(*shape, -1)

        def _of_pairs(self, function: Callable, input: Tensor, condition: Tensor) -> Tensor:
            """``function(inputs, contexts)`` for each pair; every condition is embedded once, however many inputs."""
            context = self._embedded(condition)
            rows = torch.broadcast_shapes(input.shape[: input.dim() - len(self.input_shape)], context.shape[:-1])
            inputs = input.expand(*rows, *self.input_shape).reshape(-1, *self.input_shape)
            found = function(inputs, context.expand(*rows, context.shape[-1]).reshape(-1, context.shape[-1]))
            return found.reshape(*rows, *found.shape[1:])

        def _embedded(self, condition: Tensor) -> Tensor:
            """``(*batch, *condition_shape)`` → ``(*batch, C)``."""
            self._check_condition_shape(condition)
            batch = condition.shape[: condition.dim() - len(self.condition_shape)]
            context = self._embedding_net(condition.reshape(-1, *self.condition_shape))
            return context.reshape(*batch, context.shape[1])

    return ConditionalFlowEstimator


@class_on_demand
def _unconditional_estimator() -> type:
    class FlowEstimator(import_sbi().UnconditionalDensityEstimator):
        """A flow as sbi's density estimator without a condition."""

        def log_prob(self, input: Tensor) -> Tensor:
            """``([sample,] batch, *event)`` → ``(sample, batch)``."""
            self._check_input_shape(input)
            rows = input.shape[: input.dim() - len(self.input_shape)]
            return self.net.log_prob(input.reshape(-1, *self.input_shape)).reshape(rows if len(rows) > 1 else (1, -1))

        def loss(self, input: Tensor) -> Tensor:
            """−log p: ``(batch, *event)`` → ``(batch,)``."""
            return -self.log_prob(input).squeeze(0)

        def sample(self, sample_shape: torch.Size) -> Tensor:
            """``(*sample_shape, *event)``."""
            shape = torch.Size(sample_shape)
            return self.net.sample(shape.numel()).reshape(*shape, *self.input_shape)

        def sample_and_log_prob(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
            """Samples, and log p of each, ``(*sample_shape,)``, of the same pass."""
            shape = torch.Size(sample_shape)
            samples, log_prob = self.net.sample_and_log_prob(shape.numel())
            return samples.reshape(*shape, *self.input_shape), log_prob.reshape(shape)

    return FlowEstimator


def _source_of(builder: Any) -> NflowsFlow | Transform:
    """What a builder was made of; a TypeError for a name or a factory."""
    if isinstance(builder.source, NflowsFlow | Transform):
        return builder.source
    raise TypeError(
        "this builder was given a name or a factory, so it has no flow before it is called: "
        "as_flow(builder(theta, x)), or build_flow"
    )


def _call(make: Callable[..., Any], **offered: int | None) -> Any:
    """What the factory makes, called with those of the arguments that it takes."""
    parameters = inspect.signature(make).parameters.values()
    names = {parameter.name for parameter in parameters}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return make(**{name: value for name, value in offered.items() if takes_all or name in names})


def _whole(made: Any, shape: torch.Size) -> NflowsFlow:
    """A flow of any library; or a transform of any, with a standard normal base for data of that shape."""
    from adapters.bridges import as_flow, as_transform

    try:
        return as_flow(made)
    except TypeError:
        return NflowsFlow(as_transform(made), StandardNormal(shape))


@torch.no_grad()
def _tried(embedding_net: nn.Module, conditions: Tensor) -> Tensor:
    """The first two conditions embedded. A copy is tried, since a network may keep statistics of what it is given.

    Raises:
        ValueError: if the network does not take them.
    """
    try:
        return copy.deepcopy(embedding_net).eval()(conditions[:2])
    except RuntimeError as error:
        shape = tuple(conditions.shape[1:])
        raise ValueError(f"the embedding network can't be given conditions of shape {shape} ({error})") from error


def _check_widths(flow: NflowsFlow, shape: torch.Size, width: int | None, what: str) -> None:
    """Raise a ValueError if the flow is known to be of data of another shape, or to take another context."""
    known = event_shape_of(flow)
    if known is not None and known != shape:
        raise ValueError(
            f"{what} have the shape {tuple(shape)}, but the flow is of data of shape {tuple(known)}: build it with "
            f"features={shape.numel()}"
        )
    takes = getattr(flow, "context_features", ...)
    if takes is ... or takes == width:
        return
    if takes is None:
        raise ValueError(f"{UNCONDITIONAL}; build it with context_features={width}")
    if width is None:
        raise ValueError(
            f"this flow is conditional, of a context of {takes} numbers, and MarginalTrainer conditions on nothing"
        )
    raise ValueError(
        f"this flow takes a context of {takes} numbers, but the condition has {width}, once embedded: build the flow "
        f"with context_features={width}, or give an embedding_net that returns {takes}"
    )


@torch.enable_grad()
def _check_reads_context(flow: Flow, inputs: Tensor, context: Tensor) -> None:
    """Raise a ValueError unless the density depends on the context, as far as autograd can see.

    A copy is asked, since a layer may take its first batch to initialise itself.
    """
    flow, context = copy.deepcopy(flow).eval(), context.detach().requires_grad_()
    remedy = f"build its layers with a context of {context.shape[1]} numbers"
    try:
        log_prob = flow.log_prob(inputs, context)
    except (RuntimeError, ValueError, TypeError) as error:
        try:
            flow.transform(inputs)
        except Exception:
            raise ValueError(f"this flow takes another context ({error}); {remedy}") from error
        raise ValueError(f"{UNCONDITIONAL}; {remedy}") from error
    if not log_prob.requires_grad or torch.autograd.grad(log_prob.sum(), context, allow_unused=True)[0] is None:
        raise ValueError(f"{UNCONDITIONAL}; {remedy}")
