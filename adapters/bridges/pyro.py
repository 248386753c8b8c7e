"""Pyro and torch.distributions: their transforms and transformed distributions in, any transform out, for both.

Both run noise → data and list the noise side first. ``TorchTransform`` adapts one transform. A composition becomes a
``Chain`` of these, in the opposite order.

A context has the shape ``(batch, width)``. The shape of a datum is a distribution's batch shape and event shape
together.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from nflows.transforms import InverseNotAvailable, Transform
from pyro import distributions as pyro_distributions
from pyro.distributions import transforms as pyro_transforms
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalDistribution,
    ConditionalTransform,
    ConditionalTransformedDistribution,
    ConditionalTransformModule,
    ConstantConditionalDistribution,
    ConstantConditionalTransform,
    _ConditionalInverseTransformModule,
)
from pyro.distributions.torch_transform import TransformModule
from pyro.distributions.transforms.matrix_exponential import ConditionedMatrixExponential
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from pyro.distributions.transforms.spline import ConditionedSpline
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution
from torch.distributions import transforms as torch_transforms
from torch.overrides import TorchFunctionMode

from adapters.bridges.common.as_module import AsModule
from adapters.bridges.common.bounds import Limits, bounds, within
from adapters.bridges.common.chain import Chain, Leaf
from adapters.bridges.common.context import Width
from adapters.bridges.common.exported_transform import ExportedTransform
from adapters.bridges.common.exports import EventDim, check_shapes_known
from adapters.bridges.common.tensors import like, per_row
from adapters.bridges.common.torch_base import TorchBase
from adapters.checks import check_enough_rows
from adapters.flow import Flow

PACKAGES = ("pyro", "torch.distributions")
LIBRARIES = ("pyro", "torch")
DISTRIBUTION = "pyro-ppl"
EXTRA = None

# Objects that may hold tensors: torch's, which are no modules, and Pyro's, which give such an object for a context.
KINDS = (torch_transforms.Transform, Distribution, ConditionalTransform, ConditionalDistribution)

# Transforms that run noise → data only: Pyro scores a value by remembering how it was made.
ONE_WAY = (
    pyro_transforms.BlockAutoregressive,
    pyro_transforms.ConditionalNeuralAutoregressive,
    pyro_transforms.ConditionalPlanar,
    pyro_transforms.ConditionalRadial,
    pyro_transforms.NeuralAutoregressive,
    pyro_transforms.Polynomial,
    pyro_transforms.Sylvester,
    ConditionedPlanar,
    ConditionedRadial,
)
# Transforms that assert something of all rows together, so that a row that is not finite fails the whole batch.
SPLINES = (
    pyro_transforms.ConditionalSpline,
    pyro_transforms.ConditionalSplineAutoregressive,
    pyro_transforms.SplineAutoregressive,
    pyro_transforms.SplineCoupling,
    ConditionedSpline,
)
# Transforms whose outputs have another shape than their inputs.
RESHAPING = (
    pyro_transforms.CorrLCholeskyTransform,
    pyro_transforms.SimplexToOrderedTransform,
    torch_transforms.CorrCholeskyTransform,
    torch_transforms.ReshapeTransform,
    torch_transforms.StickBreakingTransform,
)


class TorchTransform(Leaf):
    """One transform t of torch or Pyro, which runs noise → data, as an nflows one: ``forward`` runs t⁻¹, data → noise.

    Many a transform keeps what its value and its log-determinant share. Each log-determinant is asked for right after
    the value, so that a network runs only once. But what a transform keeps may be outdated, once parameters have
    changed or another thread has called it. So each pass runs a copy of its own, which has the same parameters.

    The log-determinant of an elementwise transform is summed over the datum. A conditional transform is conditioned on
    the context anew in every call.

    Pyro's ``BatchNorm`` has hidden state. In training, data → noise, it normalises by the batch at hand and updates its
    running statistics. Noise → data it uses these statistics, so that only in evaluation mode one direction is the
    other's inverse. Pyro's ``MatrixExponential`` is a truncated series, and its inverse is as exact as that series.

    Args:
        part: t, which is neither a composition nor the inverse of another transform.
        backwards: whether the flow holds t's inverse. Then ``forward`` runs t itself.

    Raises:
        InverseNotAvailable: for a transform without the direction data → noise.
        ValueError: for one that is no bijection; in a call, for an input of another width.
    """

    def __init__(self, part: Any, backwards: bool):
        super().__init__()
        _check_usable(part, backwards)
        self.name = _name(part)
        self.part = AsModule(part, KINDS)
        self.backwards = backwards
        self.reads_context = isinstance(part, ConditionalTransform)
        self.context_width = _width(part)
        self.is_bounded = not self.reads_context and any(map(bounds, (part.domain, part.codomain)))
        self.features = _features(part)
        self.has_inverse = not backwards or _has_inverse(part)
        self.keeps_shape = not _changes_shape(part)
        self.takes_any_row = not isinstance(part, SPLINES)

    def run(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        if self.features is not None and inputs.shape[-1] != self.features:
            raise ValueError(f"{self.name} takes {self.features} features, not an input of {tuple(inputs.shape)}")
        steps = self._steps(context)
        outputs, changes = inputs, []
        for part, backwards in reversed(steps) if to_noise else steps:
            outputs, change = self._step(part, backwards == to_noise, outputs, to_noise)
            changes.append(change)
        if self.keeps_shape and outputs.shape != inputs.shape:
            raise ValueError(f"{self.name} does not take inputs of shape {tuple(inputs.shape)}")
        return outputs, changes[0] if len(changes) == 1 else sum(changes, inputs.new_zeros(len(inputs)))

    def _steps(self, context: Tensor | None) -> list[tuple[Any, bool]]:
        """The transforms to run, each with whether it runs backwards: t, or what t consists of under this context."""
        part = self.part.fresh()
        if not self.reads_context:
            return [(part, self.backwards)]
        steps = list(_parts(part.condition(context), self.backwards))
        for step, _ in steps:
            if isinstance(step, ConditionedMatrixExponential) and callable(step.weights):
                step.weights = step.weights()  # otherwise the network would run again for the log-determinant
        return steps

    def _step(self, part: Any, called: bool, value: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
        """The part at the value if it is ``called``, or else its inverse, and the log-determinants ``(batch,)``."""
        change = partial(_change, part, called)
        return within(_limits(part, called), value, scoring, change) if self.is_bounded else change(value)


class ConditionedBase(AsModule):
    """A ``ConditionalDistribution`` of Pyro; calling it on a context gives the distribution."""

    def forward(self, context: Tensor | None = None) -> Distribution:
        return self.fresh().condition(context)


def transform_in(foreign: Any) -> Transform | None:
    """A transform, conditional or not. For an exported transform, the one that was exported.

    Raises:
        InverseNotAvailable, ValueError: as ``TorchTransform``.
    """
    foreign = foreign.export if isinstance(foreign, ConditionalExport) else foreign
    if isinstance(foreign, ExportedTransform):
        if foreign.context is None:
            return foreign.transform
        foreign = foreign.inv if foreign.data_to_noise else foreign
    return _chain([foreign]) if isinstance(foreign, torch_transforms.Transform | ConditionalTransform) else None


def flow_in(foreign: Any) -> Flow | None:
    """A ``TransformedDistribution`` of torch or Pyro, or Pyro's ``ConditionalTransformedDistribution``, with its base.

    Raises:
        ValueError: for a tensor in it that was computed from parameters; for a base that reads a context, if nothing
            says its width; and as ``TorchTransform``.
    """
    while isinstance(foreign, Independent):
        foreign = foreign.base_dist
    if not isinstance(foreign, TransformedDistribution | ConditionalTransformedDistribution):
        return None
    base = foreign.base_dist
    if isinstance(base, ConstantConditionalDistribution):
        base = base.base_dist
    transform = _chain(foreign.transforms, [_width(base)])
    source = (ConditionedBase if isinstance(base, ConditionalDistribution) else AsModule)(base, KINDS)
    width = transform.context_features
    if width is ...:
        raise ValueError(
            "nothing says how wide a context this distribution takes; give what reads it an attribute context_dim"
        )
    if isinstance(foreign, ConditionalTransformedDistribution):  # it has no shape until it is given some context
        with torch.no_grad():
            foreign = foreign.condition(like(nn.ModuleList([transform, source])).new_zeros(width or 0))
    return Flow(transform, TorchBase(source, _shape(foreign.base_dist)), _shape(foreign), width)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool):
    """torch's ``Transform``; for Pyro its ``TransformModule`` or, conditional, its ``ConditionalTransformModule``.

    torch knows no conditional transforms. What is exported to torch has the method ``condition(context)`` nevertheless.

    Raises:
        ValueError: for a transform that changes the shape, if nothing says the shapes.
    """
    check_shapes_known(transform, event_dim)
    if library == "torch":
        return ExportedTransform(transform, event_dim)
    return (ConditionalExport if conditional else Export)(transform, event_dim)


def native_log_prob(exported: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of a ``TransformedDistribution``: Pyro's, or torch's if the transform was exported to torch."""
    shape = inputs.shape[1:]
    base = Independent(Normal(inputs.new_zeros(shape), inputs.new_ones(shape)), len(shape))
    if isinstance(exported, ConditionalTransform):
        return ConditionalTransformedDistribution(base, [exported]).condition(context).log_prob(inputs)
    exported = exported if context is None else exported.condition(context)
    kind = TransformedDistribution
    if isinstance(exported, TransformModule):
        kind = pyro_distributions.TransformedDistribution  # pyright: ignore[reportAttributeAccessIssue]  # made by a loop
    return kind(base, [exported]).log_prob(inputs)


class Export(ExportedTransform, TransformModule):
    __doc__ = ExportedTransform.__doc__
    __hash__ = ExportedTransform.__hash__


class ConditionalExport(ConditionalTransformModule):
    """An nflows transform as a conditional one of Pyro's: ``condition(context)`` gives a torch transform."""

    bijective = True

    def __init__(self, transform: Transform, event_dim: EventDim):
        super().__init__()
        self.export = Export(transform, event_dim)
        self.domain, self.codomain = self.export.domain, self.export.codomain

    def condition(self, context: Tensor) -> ExportedTransform:
        return self.export.condition(context)


def _chain(transforms: Iterable, widths_of_base: Iterable[Width] = ()) -> Chain:
    """The transforms, noise side first, as one transform of nflows."""
    parts = [part for transform in transforms for part in _parts(transform)]
    return Chain([TorchTransform(part, backwards) for part, backwards in reversed(parts)], widths_of_base)


def _parts(transform: Any, backwards: bool = False) -> Iterator[tuple[Any, bool]]:
    """The single transforms, noise side first, each with whether it runs backwards (noise → data by its inverse)."""
    match transform:
        case torch_transforms.ComposeTransform():
            parts = transform.parts
        case ConditionalComposeTransformModule():
            parts = transform.transforms
        case torch_transforms.IndependentTransform():
            parts = [transform.base_transform]
        case ConstantConditionalTransform():
            parts = [transform.transform]
        case torch_transforms._InverseTransform() | _ConditionalInverseTransformModule():
            yield from _parts(transform.inv, not backwards)
            return
        case _:
            yield transform, backwards
            return
    for part in reversed(parts) if backwards else parts:
        yield from _parts(part, backwards)


def _change(part: Any, called: bool, value: Tensor) -> tuple[Tensor, Tensor]:
    """The part or its inverse at the value, and its log-determinants ``(batch,)``.

    A part keeps its last x and y. For these very tensors it also knows what the log-determinant needs.
    """
    x, y = (value, part(value)) if called else (_inverse(part, value), value)
    log_det = per_row(part.log_abs_det_jacobian(x, y), x, part.domain.event_dim)
    return (y, log_det) if called else (x, -log_det)


def _inverse(part: Any, y: Tensor) -> Any:
    """x for y. Pyro's autoregressive inverse starts from zeros of torch's default dtype; here they have y's dtype."""
    if isinstance(part, pyro_transforms.BatchNorm) and part.training:
        check_enough_rows(y, "Pyro's BatchNorm")
    if y.dtype == torch.get_default_dtype() or not isinstance(part, pyro_transforms.AffineAutoregressive):
        return part._inv_call(y)
    with _Zeros(y.dtype):
        return part._inv_call(y)


class _Zeros(TorchFunctionMode):
    """Within, ``torch.zeros`` gives this dtype unless it is told another."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.zeros:
            kwargs.setdefault("dtype", self.dtype)
        return function(*args, **kwargs)


def _check_usable(part: Any, backwards: bool) -> None:
    """Raise for a transform that is no bijection, that Pyro computes wrongly, or that cannot run data → noise."""
    if isinstance(part, pyro_transforms.ConditionalGeneralizedChannelPermute):
        raise ValueError(
            f"{_name(part)} has no log-determinant for a batch of contexts: Pyro takes the diagonal of one matrix"
        )
    if isinstance(part, pyro_transforms.Sylvester) and backwards:
        raise ValueError(
            "Sylvester has a wrong log-determinant in Pyro: that of x + A tanh(Bx + b), while its value is "
            "x + Aᵀ tanh(Bᵀx + b)"
        )
    if not isinstance(part, ConditionalTransform) and not part.bijective:
        raise ValueError(f"{_name(part)} is no bijection, so no flow can use it")
    if not backwards and not _has_inverse(part):
        raise InverseNotAvailable(
            f"{_name(part)} runs noise → data only and cannot score a value that it did not sample itself; "
            "its .inv makes a flow that scores, and cannot sample"
        )


def _has_inverse(part: Any) -> bool:
    no_inverse = torch_transforms.Transform._inverse
    return not isinstance(part, ONE_WAY) and getattr(type(part), "_inverse", None) is not no_inverse


def _changes_shape(part: Any) -> bool:
    return part.shapes is not None if isinstance(part, ExportedTransform) else isinstance(part, RESHAPING)


def _limits(part: Any, called: bool) -> Limits | None:
    """The bounds of the part's inputs if it is called, or else of its inverse's inputs."""
    if isinstance(part, pyro_transforms.ELUTransform) and not called:
        return -1.0, None  # Pyro declares its values to be positive, which is wrong
    return bounds(part.domain if called else part.codomain)


def _width(part: Any) -> Width:
    """Width of the context that a transform or distribution reads: its own ``context_dim``, or its network's."""
    if not isinstance(part, ConditionalTransform | ConditionalDistribution):
        return None
    network = getattr(part, "nn", None)
    declared = getattr(part, "context_dim", None) or getattr(network, "context_dim", None)
    return declared or (network.input_dim if isinstance(network, DenseNN) else ...)


def _features(part: Any) -> int | None:
    """Size of the last dimension of the values, if the transform's attributes tell it."""
    if isinstance(part, pyro_transforms.SplineCoupling):
        return part.split_dim + part.upper_spline.input_dim
    if isinstance(part, pyro_transforms.AffineCoupling | pyro_transforms.ConditionalAffineCoupling):
        conditional = isinstance(part, pyro_transforms.ConditionalAffineCoupling)
        dim = part.kwargs.get("dim", -1) if conditional else part.dim
        return part.split_dim + part.nn.param_dims[0] if dim == -1 and hasattr(part.nn, "param_dims") else None
    if isinstance(part, pyro_transforms.Permute):
        return len(part.permutation) if part.dim == -1 else None
    for owner in (part, getattr(part, "arn", None), getattr(part, "nn", None)):
        features = getattr(owner, "input_dim", None)
        if isinstance(features, int) and not isinstance(owner, DenseNN):
            return features
    return None


def _shape(distribution: Distribution) -> torch.Size:
    return distribution.batch_shape + distribution.event_shape


def _name(part: Any) -> str:
    return type(part).__name__
