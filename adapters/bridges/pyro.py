"""Pyro and torch.distributions: their transforms and transformed distributions in, any transform out, for both.

Both run noise → data and list the noise side first; ``TorchTransform`` turns that round. It asks each transform for its
log-determinant right after its value, while the transform still keeps what both share, so that a network runs once.
What a transform keeps knows nothing of parameters that have changed, nor of threads: each pass has copies of its own.

A context has the shape ``(batch, width)``. A datum of a distribution is its batch and event shape together.
"""

import sys
from collections.abc import Iterator
from functools import cache, partial

import torch
from nflows.transforms import InverseNotAvailable, Transform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution, transforms
from torch.overrides import TorchFunctionMode

from adapters.bridges.common.bounds import Limits, bounds, within
from adapters.bridges.common.context import Width, one_width
from adapters.bridges.common.exported_transform import ExportedTransform
from adapters.bridges.common.exports import EventDim, check_shapes_known
from adapters.bridges.common.held import Held
from adapters.bridges.common.tensors import per_row
from adapters.bridges.common.torch_base import TorchBase
from adapters.checks import check_context, naming_shape
from adapters.finite import finite_rows
from adapters.flow import Flow

PACKAGES = ("pyro", "torch.distributions")
LIBRARIES = ("pyro", "torch")
DISTRIBUTION = "pyro-ppl"
EXTRA = None

# Pyro's transforms that run noise → data only: they score a value by remembering how they made it.
ONE_WAY = {
    "BlockAutoregressive",
    "ConditionalNeuralAutoregressive",
    "ConditionalPlanar",
    "ConditionalRadial",
    "NeuralAutoregressive",
    "ConditionedPlanar",
    "Polynomial",
    "ConditionedRadial",
    "Sylvester",
}


class TorchTransform(Transform):
    """Transforms f₁ … f_n of torch or Pyro, noise side first, as one: x = f_n(… f₁(z)); ``forward`` runs x ↦ z.

    Elementwise transforms are summed over the datum. Those with ``condition`` are conditioned on the context, anew in
    every call. Compositions and inverses are taken apart.

    Pyro's ``BatchNorm`` has hidden state: data → noise it normalises, in training, by the batch at hand, and updates
    its running statistics; noise → data it uses the latter, so that it has an inverse in eval mode only. Its
    ``MatrixExponential`` is a truncated series, with an inverse as exact as that.

    Args:
        parts: the transforms.
        context_features: width of the context, where something beside the transforms, such as a base, reads one.

    Raises:
        InverseNotAvailable: for a transform without the direction data → noise; in ``inverse``, without the other one.
        ValueError: for one that is no bijection; in a call, for a context that is missing, superfluous or of another
            shape, or an input of another width.
    """

    def __init__(self, parts: list, context_features: Width = None):
        super().__init__()
        steps = [step for part in parts for step in _steps(part)]
        _check_bijective(steps)
        self.name = ", ".join(dict.fromkeys(_name(part) for part, _ in steps)) or "an empty composition"
        self.parts = Held([part for part, _ in steps], _kinds())
        self.backwards = [backwards for _, backwards in steps]
        self.one_way = [_name(part) for part, backwards in steps if backwards and not _has_inverse(part)]
        widths = [context_features, *(_context_of(part) for part, _ in steps)]
        self.context_features = one_width(widths, f"the context of {self.name}")
        self.features = next((width for width in (_features(part) for part, _ in reversed(steps)) if width), None)
        self.keeps_shape = not any(_changes_shape(part) for part, _ in steps)
        self.takes_any_row = not any("Spline" in _name(part) for part, _ in steps)  # Pyro's assert something of them
        self.bounded = [
            not _reads_context(part) and any(map(bounds, (part.domain, part.codomain))) for part, _ in steps
        ]

    @finite_rows
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, to_noise=True)

    @finite_rows
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.one_way:
            raise InverseNotAvailable(f"{', '.join(self.one_way)} has no inverse, so this flow cannot sample")
        return self._run(inputs, context, to_noise=False)

    def _run(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, self.name)
        if self.keeps_shape and self.features is not None and inputs.shape[-1] != self.features:
            raise ValueError(f"{self.name} takes {self.features} features, not an input of {tuple(inputs.shape)}")
        steps = list(self._conditioned(context))
        outputs, log_det = inputs, inputs.new_zeros(len(inputs))
        with naming_shape(inputs, self.name):
            for part, backwards, bounded in reversed(steps) if to_noise else steps:
                called = backwards == to_noise
                limits = _limits(part, called) if bounded else None
                outputs, change = within(limits, outputs, to_noise, partial(_change, part, called))
                log_det = log_det + change
        if self.keeps_shape and outputs.shape != inputs.shape:
            raise ValueError(f"{self.name} does not take inputs of shape {tuple(inputs.shape)}")
        return outputs, log_det

    def _conditioned(self, context: Tensor | None) -> Iterator[tuple]:
        for part, backwards, bounded in zip(self.parts(), self.backwards, self.bounded, strict=True):
            if not _reads_context(part):
                yield part, backwards, bounded
                continue
            for step, reverse in _steps(part.condition(context), backwards):
                if _is(step, "ConditionedMatrixExponential") and callable(step.weights):
                    step.weights = step.weights()  # else its network runs for the value and again for the log-det
                yield step, reverse, False


class ConditionedBase(Held):
    """A ``ConditionalDistribution`` of Pyro; calling it on a context gives the distribution."""

    def forward(self, context: Tensor | None = None) -> Distribution:
        return super().forward().condition(context)


def transform_in(thing) -> Transform | None:
    """A transform, conditional or not; an exported one comes back as it went.

    Raises: as ``TorchTransform``.
    """
    thing = thing.export if _is(thing, "ConditionalExport") else thing
    if isinstance(thing, ExportedTransform):
        if thing.context is None:
            return thing.transform
        thing = thing.inv if thing.data_to_noise else thing
    conditional = _conditional()
    known = transforms.Transform if conditional is None else transforms.Transform | conditional.ConditionalTransform
    return TorchTransform([thing]) if isinstance(thing, known) else None


def flow_in(thing) -> Flow | None:
    """A ``TransformedDistribution`` of torch or Pyro, or Pyro's ``ConditionalTransformedDistribution``, with its base.

    Raises:
        ValueError: for a tensor in it that was computed from parameters; for a base that reads a context, if nothing
            says its width; and as ``TorchTransform``.
    """
    conditional = _conditional()
    while isinstance(thing, Independent):
        thing = thing.base_dist
    if isinstance(thing, TransformedDistribution):
        shape, transform = thing.batch_shape + thing.event_shape, TorchTransform(thing.transforms)
        base = TorchBase(Held(thing.base_dist, _kinds()), thing.base_dist.batch_shape + thing.base_dist.event_shape)
    elif conditional is not None and isinstance(thing, conditional.ConditionalTransformedDistribution):
        base, reads = thing.base_dist, None
        if not isinstance(base, conditional.ConstantConditionalDistribution):
            reads = _context_of(base)
        transform = TorchTransform(thing.transforms, reads)
        noise_shape, shape = _shapes(thing, transform.context_features)
        source = ConditionedBase(base, _kinds()) if reads else Held(base.base_dist, _kinds())
        base = TorchBase(source, noise_shape)
    else:
        return None
    return Flow(transform, base, shape, transform.context_features)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool):
    """torch's ``Transform``; for Pyro its ``TransformModule`` or, conditional, its ``ConditionalTransformModule``.

    torch knows no conditional transforms; what it gets has ``.condition(context)`` all the same.

    Raises:
        ValueError: for a transform that changes the shape, if nothing says the shapes.
    """
    check_shapes_known(transform, event_dim)
    if library == "torch":
        return ExportedTransform(transform, event_dim)
    return _exports()["ConditionalExport" if conditional else "Export"](transform, event_dim)


def native_log_prob(exported, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of the ``TransformedDistribution`` of Pyro, or of torch if that is what the transform was exported to."""
    shape = inputs.shape[1:]
    base = Independent(Normal(inputs.new_zeros(shape), inputs.new_ones(shape)), len(shape))
    if _reads_context(exported):
        flow = _pyro().ConditionalTransformedDistribution(base, [exported])
        return flow.condition(context).log_prob(inputs)
    exported = exported if context is None else exported.condition(context)
    flow = _pyro().TransformedDistribution if _is(exported, "TransformModule") else TransformedDistribution
    return flow(base, [exported]).log_prob(inputs)


@cache
def _pyro():
    """``pyro.distributions``. Its import switches argument validation on; here it is left as it was found."""
    found = Distribution._validate_args
    import pyro.distributions

    Distribution.set_default_validate_args(found)
    return pyro.distributions


def _conditional():
    """Pyro's module of conditional things; ``None`` if nobody has imported Pyro, so that there can be none."""
    return sys.modules.get("pyro.distributions.conditional")


@cache
def _exports() -> dict[str, type]:
    """The classes of what is exported to Pyro: they exist once Pyro, their parents' package, has been imported."""
    pyro = _pyro()

    class Export(ExportedTransform, pyro.torch_transform.TransformModule):
        __doc__ = ExportedTransform.__doc__
        __hash__ = ExportedTransform.__hash__
        __qualname__ = "Export"

    class ConditionalExport(pyro.conditional.ConditionalTransformModule):
        """An nflows transform that takes a context as Pyro's: ``condition(context)`` is a torch transform."""

        __qualname__ = "ConditionalExport"
        bijective = True

        def __init__(self, transform: Transform, event_dim: EventDim):
            super().__init__()
            self.export = Export(transform, event_dim)
            self.domain, self.codomain = self.export.domain, self.export.codomain

        def condition(self, context: Tensor) -> Export:
            return self.export.condition(context)

    return {"Export": Export, "ConditionalExport": ConditionalExport}


def __getattr__(name: str) -> type:
    """The classes of exports by their names, where ``pickle`` looks for them."""
    if name in ("Export", "ConditionalExport"):
        return _exports()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _change(part, called: bool, value: Tensor) -> tuple[Tensor, Tensor]:
    """The part or its inverse at the value, and its log-determinants ``(batch,)``.

    A part keeps its last (x, y), and with it what the log-determinant at these very tensors needs.
    """
    x, y = (value, part(value)) if called else (_inverse(part, value), value)
    log_det = per_row(part.log_abs_det_jacobian(x, y), x, part.domain.event_dim)
    return (y, log_det) if called else (x, -log_det)


def _inverse(part, y: Tensor) -> Tensor:
    """x of y. Pyro's autoregressive inverse starts from zeros of the default dtype: here they are of the flow's."""
    if y.dtype == torch.get_default_dtype() or not _is(part, "AffineAutoregressive"):
        return part._inv_call(y)
    with _Zeros(y.dtype):
        return part._inv_call(y)


class _Zeros(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.zeros:
            kwargs.setdefault("dtype", self.dtype)
        return function(*args, **kwargs)


def _steps(thing, backwards: bool = False) -> Iterator[tuple]:
    """The single transforms, noise side first, each with whether it runs backwards (noise → data by its inverse)."""
    conditional = _conditional()
    match thing:
        case transforms.ComposeTransform():
            parts = thing.parts
        case transforms.IndependentTransform():
            parts = [thing.base_transform]
        case transforms._InverseTransform():
            yield from _steps(thing.inv, not backwards)
            return
        case _ if conditional is not None and isinstance(thing, conditional.ConditionalComposeTransformModule):
            parts = thing.transforms
        case _ if conditional is not None and isinstance(thing, conditional._ConditionalInverseTransformModule):
            yield from _steps(thing.inv, not backwards)
            return
        case _ if conditional is not None and isinstance(thing, conditional.ConstantConditionalTransform):
            parts = [thing.transform]
        case _:
            yield thing, backwards
            return
    for part in reversed(parts) if backwards else parts:
        yield from _steps(part, backwards)


def _check_bijective(steps: list[tuple]) -> None:
    for part, backwards in steps:
        if _is(part, "ConditionalGeneralizedChannelPermute"):
            raise ValueError(
                f"{_name(part)} has no log-determinant for a batch of contexts: Pyro takes the diagonal of one matrix"
            )
        if _is(part, "Sylvester") and backwards:
            raise ValueError(
                "Sylvester has a wrong log-determinant in Pyro: that of x + A tanh(Bx + b), while its value is "
                "x + Aᵀ tanh(Bᵀx + b)"
            )
        if not _reads_context(part) and not part.bijective:
            raise ValueError(f"{_name(part)} is no bijection, so no flow can use it")
        if not backwards and not _has_inverse(part):
            raise InverseNotAvailable(
                f"{_name(part)} runs noise → data only and cannot score a value that it did not sample itself; "
                "its .inv makes a flow that scores, and cannot sample"
            )


def _has_inverse(part) -> bool:
    return not _is(part, *ONE_WAY) and getattr(type(part), "_inverse", None) is not transforms.Transform._inverse


def _changes_shape(part) -> bool:
    if isinstance(part, ExportedTransform):
        return part.shapes is not None
    kinds = transforms.ReshapeTransform | transforms.StickBreakingTransform | transforms.CorrCholeskyTransform
    return isinstance(part, kinds) or _is(part, "CorrLCholeskyTransform", "SimplexToOrderedTransform")


def _limits(part, called: bool) -> Limits | None:
    """The bounds of what the part takes, when it is called or its inverse is."""
    if _is(part, "ELUTransform") and not called:
        return -1.0, None  # Pyro says that its values are positive
    return bounds(part.domain if called else part.codomain)


def _reads_context(part) -> bool:
    return _is(part, "ConditionalTransform", "ConditionalDistribution")


def _context_of(part) -> Width:
    """Width of the context that something conditional reads: its own ``context_dim``, or its network's."""
    if not _reads_context(part):
        return None
    for thing in (part, getattr(part, "nn", None)):
        if getattr(thing, "context_dim", None):
            return thing.context_dim
    network = getattr(part, "nn", None)
    return network.input_dim if _is(network, "DenseNN") else ...


def _features(part) -> int | None:
    """Size of the last dimension of the values, if the transform shows it."""
    if hasattr(part, "split_dim"):
        if hasattr(part, "upper_spline"):
            return part.split_dim + part.upper_spline.input_dim
        dim = part.kwargs.get("dim", -1) if hasattr(part, "kwargs") else part.dim
        return part.split_dim + part.nn.param_dims[0] if dim == -1 and hasattr(part.nn, "param_dims") else None
    for thing in (part, getattr(part, "arn", None), getattr(part, "nn", None)):
        if isinstance(getattr(thing, "input_dim", None), int) and not _is(thing, "DenseNN"):
            return thing.input_dim
    return len(part.permutation) if _is(part, "Permute") and part.dim == -1 else None


def _shapes(flow, context_features: Width) -> tuple[torch.Size, torch.Size]:
    """The shapes of one noise and one datum of a ``ConditionalTransformedDistribution``, found by conditioning it."""
    if context_features is ...:
        raise ValueError(
            "nothing says how wide a context this distribution takes; give what reads it an attribute context_dim"
        )
    modules = [part for part in (flow.base_dist, *flow.transforms) if isinstance(part, nn.Module)]
    like = next((p for module in modules for p in module.parameters()), torch.empty(0))
    with torch.no_grad():
        conditioned = flow.condition(like.new_zeros(context_features or 0))
    base = conditioned.base_dist
    return base.batch_shape + base.event_shape, conditioned.batch_shape + conditioned.event_shape


def _kinds() -> tuple[type, ...]:
    conditional = _conditional()
    found = () if conditional is None else (conditional.ConditionalTransform, conditional.ConditionalDistribution)
    return (transforms.Transform, Distribution, *found)


def _is(thing, *names: str) -> bool:
    """Whether the thing is of a class of one of these names, or derived from one; so no import is needed to ask."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def _name(thing) -> str:
    return type(thing).__name__
