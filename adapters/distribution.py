"""A flow as a distribution, for Pyro and for torch: ``FlowDistribution``."""

import math
from typing import Any

import nflows.distributions
import torch
from nflows.distributions.mixture import MADEMoG
from nflows.flows import Flow
from nflows.transforms.base import InputOutsideDomain
from torch import Tensor
from torch.distributions import constraints

from adapters.bridges import as_flow
from adapters.bridges.common.tensors import like
from adapters.checks import check_no_labels, check_tensor, shown, sizes
from adapters.imports import validation_unchanged
from adapters.last_result import LastResult
from adapters.parts import base_of, context_width_of, embedding_of, event_shape_of, transform_of

with validation_unchanged():
    from pyro.distributions import TorchDistribution


class FlowDistribution(TorchDistribution):
    """log p(x | c) = log p_base(f(x; c)) + log|det J_f(x; c)|, as a distribution of Pyro and of torch.

    ``rsample`` is differentiable. ``log_prob`` evaluates each network once. Drawing a sample computes its log_prob,
    too, and keeps it for the next call of ``log_prob``. If that is about the same sample, as a guide's is in every
    ELBO, the networks are not evaluated again: see ``LastResult``.

    A distribution holds the flow itself, not a copy, and is cheap to make: make a new one in each call of a model. For
    Pyro's parameter store to train the flow, the model must call ``pyro.module("flow", flow)``, too.

    Args:
        flow: an nflows ``Flow``, or a flow of another library, which goes through ``as_flow``.
        context: c, ``(*batch, C)``. Its leading dimensions are the batch shape. ``None`` for an unconditional flow. The
            context of an estimator of sbi's ends in its condition's shape, be it of an image: ``(*batch, *shape)``.
        event_shape: shape of one datum; by default that of the flow, or else that of its base.
        support: where each coordinate of x may lie; by default all of ℝ.
        validate_args: whether to check context and values, as torch's own distributions do.

    Raises:
        TypeError: for a flow, context, shape, support or value of the wrong kind.
        ValueError: for a context that is given but not wanted, wanted but not given, or of another width; for an event
            shape that is not given and that neither the flow nor its base knows; in a call, for values of another event
            shape and, when validating, for values outside the support.
        nflows.transforms.InverseNotAvailable: when a flow is sampled whose transform has no inverse.
        NotImplementedError: when its base cannot draw samples.
        nflows.transforms.base.InputOutsideDomain: for values or noise outside the domain of a layer.

    >>> from adapters import build_flow
    >>> flow = build_flow("masked-affine", features=3, context_features=2)
    >>> p = FlowDistribution(flow, context=torch.randn(7, 2))
    >>> p.batch_shape, p.event_shape, p.log_prob(p.rsample((5,))).shape
    (torch.Size([7]), torch.Size([3]), torch.Size([5, 7]))
    """

    def __init__(
        self,
        flow: Flow,
        context: Tensor | None = None,
        *,
        event_shape: tuple[int, ...] | None = None,
        support: constraints.Constraint = constraints.real,
        validate_args: bool | None = None,
    ):
        self.flow = as_flow(flow)
        self.context = context
        self._context_dim = _check_context(self.flow, context)
        self._support, self._last = support, LastResult()
        if not isinstance(support, constraints.Constraint):
            raise TypeError(f"support must be a constraint of torch.distributions.constraints, not {shown(support)}")
        event_shape = _event_shape(self.flow) if event_shape is None else sizes(event_shape, "event_shape")
        batch_shape = torch.Size() if context is None else context.shape[: context.dim() - self._context_dim]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """What torch checks of the arguments: the context, if there is one, holds rows of real numbers."""
        return {} if self.context is None else {"context": constraints.independent(constraints.real, self._context_dim)}

    @property
    def support(self) -> constraints.Constraint:
        """Where x may lie: each of its coordinates as the argument ``support`` says."""
        return constraints.independent(self._support, len(self.event_shape))

    @property
    def has_rsample(self) -> bool:
        """Whether the base has differentiable samples: then so has the flow."""
        base = base_of(self.flow)
        source = getattr(base, "source", None)  # of a base that wraps a torch distribution, which may be discrete
        return source is None or source(self._rows(self.batch_shape)).has_rsample

    def expand(self, batch_shape, _instance=None) -> "FlowDistribution":
        """The same distribution with a larger batch shape, to which the context is expanded.

        Raises:
            ValueError: for a batch shape to which this one does not expand.
        """
        new: Any = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = sizes(batch_shape, "batch_shape")
        try:
            torch.empty(()).expand(self.batch_shape).expand(batch_shape)
        except RuntimeError:
            raise ValueError(f"a batch of {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}") from None
        new.flow, new._support, new._last, new._context_dim = self.flow, self._support, LastResult(), self._context_dim
        new.context = None if self.context is None else self._expanded(self.context, batch_shape)
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats: ``(*sample, *batch, *event)``, or what broadcasts with it, → ``(*sample, *batch)``."""
        check_tensor(value, "the values of this distribution")
        leading = value.shape[: max(0, value.dim() - len(self.event_shape))]
        if value.shape[len(leading) :] != self.event_shape:
            raise ValueError(f"values must end in the event shape {tuple(self.event_shape)}, not {tuple(value.shape)}")
        if self._validate_args and value.numel():
            self._validate_sample(value)
        kept = self._last.take(self.flow, value, self.context)
        if kept is not None:
            return kept
        batch = torch.broadcast_shapes(leading, self.batch_shape)
        rows = leading if self.context is None else batch  # without a context, each value is scored just once
        if math.prod(rows) == 0:
            return value.new_empty(batch)
        flat = value.expand(*rows, *self.event_shape).reshape(math.prod(rows), *self.event_shape)
        try:
            return self.flow.log_prob(flat, self._rows(rows)).reshape(rows).expand(batch)
        except InputOutsideDomain as error:
            raise _outside(error) from error

    def rsample(self, sample_shape=()) -> Tensor:
        """``(*sample, *batch, *event)``, differentiable in the flow's parameters and the context."""
        if not self.has_rsample:
            raise NotImplementedError("the base of this flow has no differentiable samples")
        return self._draw(sample_shape)

    @torch.no_grad()
    def sample(self, sample_shape=()) -> Tensor:
        """``(*sample, *batch, *event)``, without a graph."""
        return self._draw(sample_shape)

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def _draw(self, sample_shape) -> Tensor:
        shape = self._extended_shape(sizes(sample_shape, "sample_shape"))
        rows = shape[: len(shape) - len(self.event_shape)]
        count = int(math.prod(rows))  # while torch.jit traces, sizes are tensors
        weight = like(self.flow)
        if count == 0:
            return weight.new_empty(shape)
        context = embedding_of(self.flow)(self._rows(rows))
        base = base_of(self.flow)
        noise = _sample(base, count, context).to(weight)  # nflows' own normal draws float32 always
        log_prob = base.log_prob(noise, context)  # before the transform, which may overwrite its input
        try:
            x, log_det = transform_of(self.flow).inverse(noise, context)  # type: ignore[misc]
        except InputOutsideDomain as error:
            raise _outside(error) from error
        if x.shape[1:] != self.event_shape:
            raise ValueError(
                f"this flow's samples have the shape {tuple(x.shape[1:])}, not {tuple(self.event_shape)}: "
                "say so by event_shape"
            )
        x = x.reshape(shape)
        self._last.keep((log_prob - log_det).reshape(rows), self.flow, x, self.context)
        return x

    def _rows(self, batch: torch.Size) -> Tensor | None:
        """The context expanded to this batch shape, one row for each datum: ``(prod(batch), C)``."""
        if self.context is None:
            return None
        context = self._expanded(self.context, batch)
        return context.reshape(math.prod(batch), *context.shape[len(batch) :])

    def _expanded(self, context: Tensor, batch: torch.Size) -> Tensor:
        return context.expand(*batch, *context.shape[-self._context_dim :])


def _sample(base: nflows.distributions.Distribution, count: int, context: Tensor | None) -> Tensor:
    """``count`` samples of the base; with a context, which has ``count`` rows, one sample for each row."""
    name = type(base).__name__
    if isinstance(base, MADEMoG) and context is None:
        raise NotImplementedError(f"nflows' {name} draws samples only with a context, so this flow can only score")
    try:
        return base.sample(count) if context is None else base.sample(1, context).squeeze(1)
    except NotImplementedError as error:
        raise NotImplementedError(str(error) or f"{name}, the base of this flow, cannot draw samples") from error


def _outside(error: InputOutsideDomain) -> InputOutsideDomain:
    """nflows' error of this kind has no message: the same error with one."""
    return InputOutsideDomain(
        str(error)
        or "a value lies outside the domain of a layer of this flow, such as [0, 1] of a spline with tails=None; if it "
        "comes from the base, give the flow a base on that domain"
    )


def _check_context(flow: Flow, context: Tensor | None) -> int:
    """How many dimensions a row of the context has: one, unless the flow says more. A wrong context is an error."""
    width = getattr(flow, "context_features", ...)  # only our own Flow has the attribute
    if context is not None:
        check_tensor(context, "the context of this distribution")
    base = base_of(flow)
    if isinstance(base, MADEMoG) and isinstance(embedding_of(flow), torch.nn.Identity):
        width = context_width_of(base)  # without a check, it would silently ignore a missing context
    if width is None and context is not None:
        raise ValueError(f"this flow is unconditional, but a context of shape {tuple(context.shape)} was given")
    row = (width,) if isinstance(width, int) else getattr(flow, "context_shape", None) if width is ... else None
    expected = "C" if row is None else ", ".join(map(str, row))
    if row is not None and context is None:
        raise ValueError(f"this flow is conditional: give a context of shape (*batch, {expected})")
    if context is not None and (context.dim() == 0 or (row is not None and context.shape[-len(row) :] != row)):
        if isinstance(width, int):
            check_no_labels(context, width, "the context")
        raise ValueError(f"the context must have the shape (*batch, {expected}), not {tuple(context.shape)}")
    return 1 if row is None else len(row)


def _event_shape(flow: Flow) -> torch.Size:
    shape = event_shape_of(flow)
    if shape is None:
        base = type(base_of(flow)).__name__
        raise ValueError(f"neither the flow nor its base, {base}, says the shape of one datum: give an event_shape")
    return shape
