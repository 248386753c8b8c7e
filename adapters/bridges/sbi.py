"""sbi: any flow as the density estimator of simulation-based inference, and sbi's own estimators as flows.

sbi infers parameters θ from a simulation's result x. ``NPE`` learns the posterior p(θ | x), ``NLE`` the likelihood
p(x | θ), ``MarginalTrainer`` the evidence p(x). Each takes a *builder*: a function of the simulations which makes the
*estimator*, a module that scores and draws. In an estimator's words, ``input`` is what the density is of, and
``condition`` is what we call the context. ``sbi_parts/estimators.py`` has the estimators that hold a flow.

sbi builds on nflows and zuko, so an estimator comes in by the bridge of the flow that is inside it.
"""

from typing import Any

import nflows.distributions
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from adapters.bridges.common.context import AnyContextFlow
from adapters.bridges.common.exports import EmbeddedBase, EmbeddedContext, EventDim, whole_transform
from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.simulations import (
    TRAINERS,
    Pairs,
    check_reads_context,
    check_simulations,
    check_widths,
    embedded,
)
from adapters.bridges.common.sources import Source, made, source_of
from adapters.bridges.common.tensors import like
from adapters.bridges.sbi_parts.estimators import conditional_estimator, unconditional_estimator
from adapters.checks import shown
from adapters.flow import Flow, StandardNormal
from adapters.imports import import_sbi
from adapters.parts import base_of, embedding_of, event_shape_of, noise_shape_of, transform_of

PACKAGES = LIBRARIES = ("sbi",)
DISTRIBUTION = "sbi"
EXTRA = "sbi"

ESTIMATES = {"posterior": ("theta", "x"), "likelihood": ("x", "theta")}  # what a density is of, and its condition
Z_SCORES = (None, "none", "independent", "structured")


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
        TypeError: for a posterior, whose density is cut to the prior's support; for an estimator that holds no flow, or
            whose density is not that of the flow which it holds.
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
    kinds = (estimators.ConditionalDensityEstimator, estimators.UnconditionalDensityEstimator)
    if not isinstance(foreign, kinds) or not isinstance(foreign.net, nn.Module):
        return None
    inner = as_flow(foreign.net)
    _check_scores_by_flow(foreign)
    if isinstance(foreign, estimators.UnconditionalDensityEstimator):
        return inner
    embedding_net = foreign.embedding_net
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
    return AnyContextFlow(transform, base, shape, needs_context=True, context_shape=foreign.condition_shape)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> Any:
    """A builder of estimators with this transform and a standard normal base."""
    return flow_out(transform)


def flow_out(
    source: Source | str,
    *,
    estimates: str = "posterior",
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    embedding_net: nn.Module = nn.Identity(),  # noqa: B008  # it has no state
    **options: Any,
) -> Any:
    """A builder for ``NPE(prior, density_estimator=builder)``, for ``NLE`` or, of no context, ``MarginalTrainer``.

    sbi's other trainers take no flow: NRE trains a classifier, NPE_A a mixture, FMPE and NPSE a vector field. (Given a
    flow, the last two say that the batch or the shape of the input does not match.)

    Each call makes an estimator of its own, as sbi expects of a builder that it may call again to train from scratch:
    of a flow or a transform it takes a copy, as it is at that moment. ``as_flow(estimator)`` is the trained flow.

    Args:
        source: a flow; a transform, for a standard normal base; a name for ``build_flow``; or a factory, which is
            called with those of ``features=`` and ``context_features=`` (or ``context=``, zuko's name) that it takes,
            and returns a flow or a transform of any library.
        estimates: ``"posterior"``, for ``NPE``, or ``"likelihood"``, for ``NLE``.
        z_score_theta, z_score_x: how parameters and simulations are standardised, by sbi's own functions: each number
            for itself (``"independent"``), all alike (``"structured"``), or not at all (``"none"``). Give ``"none"``
            for what the flow standardises already, be it by a preprocessing or, trained by sbi, of ``as_flow``.
        embedding_net: maps the condition, once standardised, to the flow's context. As in sbi, it is not copied.
        options: for a name or a factory: further arguments, such as ``layers``.

    Raises:
        TypeError, ValueError: for arguments that no estimator can be made of. When the builder is called: for a flow
            that is unconditional; for one whose context is not as wide as the embedded condition; for one of another
            shape than what it is to be the density of. When training begins: for ``estimates`` of the other trainer.
            (Of θ and x of different shapes sbi says it first, by "Expected trailing dimensions".)
    """
    if estimates not in ESTIMATES:
        raise ValueError(f"estimates must be 'posterior', for NPE, or 'likelihood', for NLE, not {shown(estimates)}")
    z_scores = {"theta": z_score_theta, "x": z_score_x}
    for name, z_score in z_scores.items():
        if z_score not in Z_SCORES:
            raise ValueError(f"z_score_{name} must be 'independent', 'structured' or 'none', not {shown(z_score)}")
    if not isinstance(embedding_net, nn.Module):
        raise TypeError(f"embedding_net must be an nn.Module, not {shown(embedding_net)}")
    return _builder()(source_of(source, options), estimates, z_scores, embedding_net)


def native_log_prob(exported: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of an estimator with a standard normal base, without z-scoring."""
    transform, shape = transform_in(exported), inputs.shape[1:]
    assert transform is not None
    width = None if context is None else context.shape[1]
    flow = Flow(transform, StandardNormal(shape).to(inputs), shape, width)
    if context is None:
        return unconditional_estimator()(flow, shape).log_prob(inputs)
    return conditional_estimator()(flow, nn.Identity(), shape, context.shape[1:]).log_prob(inputs, context).squeeze(0)


@class_on_demand
def _builder() -> type:
    import_sbi()
    from sbi.neural_nets.estimators.base import ConditionalEstimatorBuilder
    from sbi.utils.sbiutils import standardizing_net, standardizing_transform

    class FlowBuilder(ConditionalEstimatorBuilder):
        """Makes estimators of one kind of flow: see ``flow_out``.

        Args:
            source: what the flow is, or what makes it.
            estimates: a key of ``ESTIMATES``.
            z_scores: how ``"theta"`` and ``"x"`` are standardised, each one of ``Z_SCORES``.
            embedding_net: maps the condition, once standardised, to the flow's context.
        """

        def __init__(self, source: Source, estimates: str, z_scores: dict[str, str | None], embedding_net: nn.Module):
            self.source, self.estimates, self.z_scores, self.embedding_net = source, estimates, z_scores, embedding_net

        def __call__(self, theta: Tensor, x: Tensor | None = None, **others: Any) -> nn.Module:
            """The estimator for these simulations, which tell the shapes, and which it standardises by.

            Args:
                theta: parameters, ``(batch, *event)``; for ``MarginalTrainer``, the simulations.
                x: the simulations, ``(batch, *event)``; ``None`` for ``MarginalTrainer``.
                others: what no flow can be told, such as how many components a mixture has.

            Raises:
                TypeError: for ``others``; see ``check_simulations`` and ``flow_out`` for all else.
            """
            if others:
                raise TypeError(f"a trainer that wants {', '.join(others)}, as NPE_A does, takes no flow: {TRAINERS}")
            if x is None:
                check_simulations({"x": theta}, "x", self.z_scores)
                flow = self._made("x", theta, None)
                return unconditional_estimator()(self._standardised(flow, "x", theta, None), theta.shape[1:])
            of, given = ESTIMATES[self.estimates]
            data = {"theta": theta, "x": x}
            check_simulations(data, of, self.z_scores)
            inputs, conditions = data[of], data[given]
            networks = [self.embedding_net.to(conditions.device)]
            if self.z_scores[given] not in (None, "none"):
                networks.insert(0, standardizing_net(conditions, self.z_scores[given] == "structured"))
            if embedded(nn.Sequential(*networks), conditions).dim() > 2:
                networks.append(nn.Flatten())
            flow = self._made(of, inputs, embedded(nn.Sequential(*networks), conditions).shape[1])
            if not isinstance(embedding_of(flow), nn.Identity):
                networks.append(embedding_of(flow))
            embedding_net = nn.Sequential(*networks) if len(networks) > 1 else networks[0]
            context = embedded(embedding_net, conditions)
            flow = self._standardised(flow, of, inputs, context.shape[1])
            check_reads_context(flow, of, inputs[:2], context)
            estimator = conditional_estimator()(flow, embedding_net, inputs.shape[1:], conditions.shape[1:])
            if inputs.shape == conditions.shape:  # otherwise sbi finds out that they are the wrong way round
                estimator.made_of = Pairs(of, inputs, conditions)
            return estimator

        def _made(self, of: str, inputs: Tensor, width: int | None) -> NflowsFlow:
            """The flow for data like ``inputs`` and a context of that width."""
            shape = inputs.shape[1:]
            flow = made(self.source, shape, width).to(inputs)
            check_widths(flow, of, shape, width)
            return flow

        def _standardised(self, flow: NflowsFlow, of: str, inputs: Tensor, width: int | None) -> Flow:
            """The same flow of data that are not standardised, without the embedding network that it may have."""
            transform = transform_of(flow)
            if self.z_scores[of] not in (None, "none"):
                standardise = standardizing_transform(inputs, self.z_scores[of] == "structured")
                transform = CompositeTransform([standardise, transform])
            return Flow(transform, base_of(flow), inputs.shape[1:], width)

    return FlowBuilder


def _check_scores_by_flow(estimator: Any) -> None:
    """Raise a TypeError unless ``log_prob`` is one of those that are known to give the density of the flow inside.

    Any other may transform the input first, or be a sum of several densities.
    """
    estimators = import_sbi()
    known = [estimators.NFlowsFlow, estimators.ZukoFlow, estimators.ZukoUnconditionalFlow]
    known += [conditional_estimator(), unconditional_estimator()]
    if not any(type(estimator).log_prob is kind.log_prob for kind in known):
        part = "continuous_net" if isinstance(estimator, estimators.MixedDensityEstimator) else "net"
        raise TypeError(
            f"{type(estimator).__name__} has a log_prob of its own, so the flow inside is of another density: if that "
            f"is what you want, give as_flow(estimator.{part})"
        )


def _source_of(builder: Any) -> NflowsFlow | Transform:
    """What a builder was made of; a TypeError for a name or a factory."""
    if isinstance(builder.source, NflowsFlow | Transform):
        return builder.source
    raise TypeError(
        "this builder was given a name or a factory, so it has no flow before it is called: "
        "as_flow(builder(theta, x)), or build_flow"
    )
