"""zuko: its lazy transforms and flows in, any transform out.

zuko runs data → noise and lists the data side first, as nflows does, so nothing is turned round. Each single transform
becomes a ``ZukoTransform``, and a composition becomes a ``Chain`` of them.

A *lazy* transform or distribution of zuko is a module: called on a context, it gives a transform or distribution of
torch. The library is imported by ``import_zuko`` alone, which keeps it from changing settings of the whole process.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from nflows.transforms import InverseNotAvailable, Transform
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import _InverseTransform

from adapters.bridges.common.as_module import AsModule
from adapters.bridges.common.bounds import bounds, nowhere, within
from adapters.bridges.common.chain import Chain, Leaf
from adapters.bridges.common.context import AnyContextFlow, Width
from adapters.bridges.common.exported_transform import ExportedTransform
from adapters.bridges.common.exports import EventDim, check_shapes_known
from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.tensors import like, per_row
from adapters.bridges.common.torch_base import TorchBase
from adapters.checks import check_event
from adapters.flow import Flow
from adapters.imports import import_zuko
from adapters.parts import parts_of

PACKAGES = LIBRARIES = ("zuko",)
DISTRIBUTION = "zuko"
EXTRA = "zuko"


class ZukoTransform(Leaf):
    """One lazy transform of zuko, x ↦ f(x | c), as an nflows one: ``forward`` calls f, ``inverse`` its inverse.

    Either direction evaluates the conditioner once and gives the log-determinant, too. Only the inverse of an
    autoregressive transform evaluates it once in each of its passes.

    Data beyond the bounds of f's domain have the density 0. Noise that no datum is mapped to gives NaN: zuko's ``NAF``,
    ``UNAF``, ``SOSPF`` and ``GF`` do not reach all noise, so that their densities integrate to less than 1.

    In evaluation mode zuko cuts the weights of ``MNN``, ``UMNN`` and ``FFJTransform`` out of autograd's graph. Here
    gradients reach them in either mode, because these three are always kept in training mode. That changes nothing else
    in them.

    Args:
        part: a module whose call on a context, or on ``None``, gives a torch ``Transform``; or such a transform.
        backwards: whether the flow holds the inverse of f. Then ``forward`` calls the inverse, and ``inverse`` calls f.

    Raises:
        ValueError: in a call, for an input of another width.
        NotImplementedError: under ``torch.jit.trace``, for a transform that it cannot trace.
    """

    def __init__(self, part: nn.Module | torch.distributions.Transform, backwards: bool):
        super().__init__()
        flows = import_zuko().flows
        self.lazy = AsModule(part) if isinstance(part, torch.distributions.Transform) else part
        self.backwards = backwards
        self.name = f"zuko's {type(part).__name__}"
        self.features, self.context_width = _widths(part)
        self.takes_any_row = _takes_any_row(part)
        cuts_gradients = flows.neural.MNN, flows.neural.UMNN, flows.continuous.FFJTransform
        self.always_training = [module for module in self.lazy.modules() if isinstance(module, cuts_gradients)]
        self.train(self.training)

    def train(self, mode: bool = True) -> "ZukoTransform":
        super().train(mode)
        for module in self.always_training:
            module.training = True
        return self

    def run(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        if self.features is not None:
            check_event(inputs, (self.features,), self.name)
        return _evaluate(self.lazy(context), inputs, inverse=self.backwards == to_noise, scoring=to_noise)


def _evaluate(transform: Any, values: Tensor, inverse: bool, scoring: bool) -> tuple[Tensor, Tensor]:
    """f(values), or f⁻¹(values), and its log|det| as ``(batch,)``. Each network of f is evaluated once.

    zuko's own ``call_and_ladj`` would evaluate each network of an inverse twice, and would check no bounds.

    Args:
        transform: f, or one of the transforms that f is made of. zuko builds these anew for each context.
        values: x, or y if it is the inverse that is wanted.
        inverse: whether to compute f⁻¹ instead of f.
        scoring: whether the values are data on their way to noise. Values beyond the bounds are data of density 0 if
            they are, and else noise that belongs to no datum: see ``within``.
    """
    zuko, kind = import_zuko().transforms, type(transform)
    if isinstance(transform, _InverseTransform):
        return _evaluate(transform.inv, values, not inverse, scoring)
    if kind is zuko.DependentTransform:
        return _evaluate(transform.base, values, inverse, scoring)
    if kind is zuko.CouplingTransform:
        # The transform's own ``split`` and ``merge`` do the same, but slower on large batches, above all backward.
        unchanged, changed = (values.index_select(-1, index) for index in (transform.idx_a, transform.idx_b))
        changed, log_det = _evaluate(transform.meta(unchanged), changed, inverse, scoring)
        return values.index_copy(-1, transform.idx_b, changed), log_det
    if kind is zuko.AutoregressiveTransform:
        x = values
        if inverse:
            x = torch.zeros_like(values)
            for _ in range(transform.passes - 1):
                x = _preimage(transform.meta(x), values)
        # By now all coordinates that the network reads for another one are final.
        return _evaluate(transform.meta(x), values, inverse, scoring)
    if kind is zuko.ComposedTransform:
        total = values.new_zeros(len(values))
        for part in reversed(transform.transforms) if inverse else transform.transforms:
            values, log_det = _evaluate(part, values, inverse, scoring)
            total = total + log_det
        return values, total
    if inverse and isinstance(transform, zuko.FreeFormJacobianTransform):  # its inverse is of the same class
        transform, inverse = transform.inv, False
    _check_traceable(transform)
    limits = bounds(transform.codomain if inverse else transform.domain)
    single = partial(_invert, transform, scoring) if inverse else partial(_call, transform)
    return within(limits, values, scoring, single)


def _call(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and its log|det|, of a transform that is no composition."""
    y, log_det = transform.call_and_ladj(x)
    return y, per_row(log_det, x, transform.domain.event_dim)


def _invert(transform: Any, scoring: bool, y: Tensor) -> tuple[Tensor, Tensor]:
    """f⁻¹(y) and its log|det|, of a transform that is no composition."""
    x, missed = _bisect(transform, y) if _bisects(transform) else (_preimage(transform, y), None)
    log_det = -per_row(transform.log_abs_det_jacobian(x, y), x, transform.domain.event_dim)
    return (x, log_det) if missed is None else nowhere(missed, x, log_det, scoring)


def _preimage(transform: Any, y: Tensor) -> Tensor:
    """f⁻¹(y) without its log-determinant. Where f does not reach y, it is 0."""
    zuko, kind = import_zuko().transforms, type(transform)
    if kind is zuko.ComposedTransform:
        for part in reversed(transform.transforms):
            y = _preimage(part, y)
        return y
    if kind is zuko.DependentTransform:
        return _preimage(transform.base, y)
    _check_traceable(transform)
    if _bisects(transform):
        return _bisect(transform, y)[0]
    own = getattr(kind, "_inverse", torch.distributions.Transform._inverse)
    # Some classes, such as torch's ComposeTransform, have no ``_inverse``. For all others it saves making ``.inv``.
    return transform.inv(y) if own is torch.distributions.Transform._inverse else own(transform, y)


def _bisects(transform: Any) -> bool:
    """Whether zuko computes this transform's inverse by bisection."""
    return getattr(type(transform), "_inverse", None) is import_zuko().transforms.MonotonicTransform._inverse


def _bisect(transform: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """f⁻¹(y) of a ``MonotonicTransform``, and which entries of y f does not reach. For these, f⁻¹(y) is given as 0.

    zuko searches the interval [−bound, bound] only. For every y beyond f of that interval it returns the nearer end.
    Here the interval is widened until it is wide enough, or as wide as ``FAR``.
    """
    bound = transform.bound
    with torch.no_grad():
        while True:
            end = torch.full_like(y, bound)
            beyond = (y < transform.f(-end)) | (y > transform.f(end))
            if bound >= FAR or not beyond.any():
                break
            bound *= 10
    steps = math.ceil(math.log2(2 * bound / transform.eps))
    x = import_zuko().utils.bisection(transform.f, y, -end, end, steps, transform.phi)
    return x.masked_fill(beyond, 0.0).masked_fill(y.isnan(), math.nan), beyond


FAR = 1e12  # wide enough: through sixteen untrained layers of a NAF, of slope 0.3 far out, 4 is reached from 1e9


def _check_traceable(transform: Any) -> None:
    """Raise a NotImplementedError if ``torch.jit.trace`` is at work, which cannot trace this single transform."""
    zuko = import_zuko().transforms
    untraceable = zuko.MonotonicTransform, zuko.FreeFormJacobianTransform
    if torch.jit.is_tracing() and isinstance(transform, untraceable):  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"torch.jit cannot trace zuko's {type(transform).__name__}, which solves an equation or differentiates "
            "within its pass: take Trace_ELBO instead of JitTrace_ELBO"
        )


def transform_in(foreign: Any) -> Transform | None:
    """A lazy transform, or a transform that is not lazy. For an exported transform, the one that was exported.

    Raises:
        InverseNotAvailable: for a transform that is no bijection.
        ValueError: for one whose log-determinant is random; for parts that disagree on the width of the context.
    """
    if isinstance(foreign, _exported()):
        return foreign.transform
    if not isinstance(foreign, torch.distributions.Transform | import_zuko().lazy.LazyTransform):
        return None
    return _chain(_parts(foreign))


def flow_in(foreign: Any) -> Flow | None:
    """A lazy flow or another lazy distribution, such as ``GMM``, or a distribution that is not lazy.

    The event shape and the width of the context are read off the flow's parts. If no part says what context it reads,
    the flow hands its context on unchecked.

    Raises:
        InverseNotAvailable, ValueError: as ``transform_in``; for a flow that a batch of contexts is already bound to.
    """
    zuko = import_zuko()
    parts = []
    if isinstance(foreign, zuko.lazy.Flow):
        parts, base = _parts(foreign.transform), foreign.base
    elif isinstance(foreign, zuko.lazy.LazyDistribution):
        base = foreign
    elif isinstance(foreign, zuko.distributions.NormalizingFlow):
        if foreign.batch_shape:
            raise ValueError(
                f"this NormalizingFlow has a batch shape of {tuple(foreign.batch_shape)}: its context, if any, is "
                "bound to it; as_flow takes the lazy flow that made it, and the context in each call"
            )
        parts, base = _parts(foreign.transform), AsModule(foreign.base)
    elif isinstance(foreign, Distribution):
        base = AsModule(foreign)
    else:
        return None
    transform = _chain(parts, [_widths(part)[1] for part, _ in _parts(base)])
    width = transform.context_features
    context = _a_context(foreign if isinstance(foreign, nn.Module) else base, width)
    try:
        distribution = base(context)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(base).__name__} gives no distribution without a context, and does not say how wide a context it "
            "takes; give it an attribute context_features"
        ) from error
    if context is None:
        shape = distribution.batch_shape + distribution.event_shape
    else:
        shape = distribution.expand((1,)).event_shape
    noise = TorchBase(base, shape)
    leaves: Any = parts_of(transform)
    for leaf in reversed(leaves):
        if width is not ... or isinstance(leaf.lazy, _exported()):  # all others can be called with their context only
            part = leaf.lazy(context)
            shape = part.forward_shape(shape) if leaf.backwards else part.inverse_shape(shape)
    if width is ...:
        return AnyContextFlow(transform, noise, shape, needs_context=False)
    return Flow(transform, noise, shape, width)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> nn.Module:
    """A ``zuko.lazy.LazyTransform``, for ``zuko.lazy.Flow``. Its inputs may have any leading dimensions.

    The leading dimensions broadcast with those of the context.

    Raises:
        ValueError: for a transform that changes the shape, if nothing says the shapes.
    """
    check_shapes_known(transform, event_dim)
    return _exported()(transform, event_dim)


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of a ``zuko.lazy.Flow`` whose base is a ``DiagNormal``, N(0, I)."""
    zuko = import_zuko()
    zero = torch.zeros_like(inputs[0])
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, zero, torch.ones_like(zero), ndims=zero.dim(), buffer=True)
    return zuko.lazy.Flow(exported, base)(context).log_prob(inputs)


@class_on_demand
def _exported() -> type:
    class NflowsTransform(import_zuko().lazy.LazyTransform):
        """An nflows transform, data → noise, as a lazy transform of zuko."""

        def __init__(self, transform: Transform, event_dim: EventDim):
            super().__init__()
            self.transform = transform
            self.event_dim = event_dim

        def forward(self, c: Tensor | None = None) -> torch.distributions.Transform:
            return ExportedTransform(self.transform, self.event_dim, c, data_to_noise=True)

    return NflowsTransform


def _parts(foreign: Any, backwards: bool = False) -> list[tuple[Any, bool]]:
    """The single parts of a transform or a flow, lazy or not, data side first, each with whether it runs backwards.

    The parts of a flow's base come last.
    """
    zuko, kind = import_zuko(), type(foreign)
    if kind is zuko.lazy.LazyComposedTransform or kind is zuko.transforms.ComposedTransform:
        parts = reversed(foreign.transforms) if backwards else foreign.transforms
        return [single for part in parts for single in _parts(part, backwards)]
    if kind is zuko.lazy.LazyInverse:
        return _parts(foreign.transform, not backwards)
    if isinstance(foreign, _InverseTransform):
        return _parts(foreign.inv, not backwards)
    if kind is zuko.transforms.DependentTransform:
        return _parts(foreign.base, backwards)
    if isinstance(foreign, zuko.lazy.Flow):
        return [*_parts(foreign.transform), *_parts(foreign.base)]
    return [(foreign, backwards)]


def _chain(parts: list[tuple[Any, bool]], widths_of_base: Iterable[Width] = ()) -> Chain:
    """The parts, data side first, as one transform of nflows, once each is known to be an exact bijection."""
    leaves = [ZukoTransform(part, backwards) for part, backwards in parts]
    chain = Chain(leaves, widths_of_base)
    if chain.context_features is not ...:
        for leaf in leaves:
            _check_exact(leaf.lazy(_a_context(leaf.lazy, chain.context_features)))
    return chain


def _widths(layer: Any) -> tuple[int | None, Width]:
    """The width of a layer's data, ``None`` if unknown, and that of its context.

    The width of the context is ``None`` for a layer that ignores any context, 0 for one that must be given none, and
    ``...`` if it is unknown: see ``one_width``. A layer of a user's own may have an attribute ``context_features`` that
    says it.
    """
    zuko = import_zuko()
    flows, lazy = zuko.flows, zuko.lazy
    unconditional = lazy.UnconditionalTransform, lazy.UnconditionalDistribution, lazy.Unconditional
    if isinstance(layer, (AsModule, torch.distributions.Transform, *unconditional)):
        return None, None
    try:
        if isinstance(layer, flows.MaskedAutoregressiveTransform):
            features = layer.hyper.out_features // layer.total
            return features, layer.hyper.in_features - features
        if isinstance(layer, flows.GeneralCouplingTransform):
            return len(layer.mask), layer.hyper.in_features - int(layer.mask.sum())
        if isinstance(layer, flows.FFJTransform):
            features = layer.ode.out_features
            return features, layer.ode.in_features - features - 2 * len(layer.freqs)
        if isinstance(layer, flows.ElementWiseTransform):
            if hasattr(layer, "hyper"):
                return layer.hyper.out_features // layer.total, layer.hyper.in_features
            return len(layer.phi[0]), 0
        if isinstance(layer, zuko.mixtures.GMM):
            return None, layer.hyper.in_features if hasattr(layer, "hyper") else 0
    except AttributeError:  # the user has replaced zuko's network by another, which need not say its widths
        return None, ...
    width = getattr(layer.transform if isinstance(layer, _exported()) else layer, "context_features", ...)
    return None, 0 if width is None else width


def _a_context(module: nn.Module, width: Width) -> Tensor | None:
    """One row of context, by which a module can be called to find out shapes; ``None`` if it reads no context."""
    return like(module).new_zeros(1, width) if isinstance(width, int) else None


def _check_exact(transform: Any) -> None:
    """Raise for a transform that is no bijection, or whose log-determinant is random."""
    for single, _ in _parts(transform):
        if not single.bijective:
            raise InverseNotAvailable(f"{type(single).__name__} is no bijection, so no flow can use it")
        if isinstance(single, import_zuko().transforms.FreeFormJacobianTransform) and not single.exact:
            raise ValueError("the log-determinant of this transform is a random estimate; build it with exact=True")


def _takes_any_row(layer: Any) -> bool:
    """Whether a row that is not finite harms no other row: zuko computes each number by a formula of its own.

    Other layers search or integrate for all rows together, or check them together.
    """
    transforms = import_zuko().transforms
    univariate = getattr(layer, "univariate", None)
    return getattr(univariate, "func", univariate) in (
        transforms.MonotonicAffineTransform,
        transforms.MonotonicRQSTransform,
    )
