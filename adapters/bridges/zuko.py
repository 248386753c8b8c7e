"""zuko: its lazy transforms and flows in, any transform out.

zuko runs data → noise and lists the data side first, as nflows does, so nothing is turned round. Each single transform
becomes a ``ZukoTransform``, and nflows' ``CompositeTransform`` chains them.

What ``import zuko`` does to the whole process, ``import_zuko`` undoes; nothing else here imports it.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from nflows.transforms import CompositeTransform, InverseNotAvailable, InverseTransform, Transform
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import _InverseTransform

from adapters.bridges.common.bounds import bounds, nowhere, within
from adapters.bridges.common.context import AnyContextFlow, Width, one_width
from adapters.bridges.common.exported_transform import ExportedTransform
from adapters.bridges.common.exports import EventDim, check_shapes_known
from adapters.bridges.common.held import Held
from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.tensors import like, per_row
from adapters.bridges.common.torch_base import TorchBase
from adapters.checks import check_context, check_event, naming_shape
from adapters.finite import finite_rows
from adapters.flow import Flow

PACKAGES = LIBRARIES = ("zuko",)
DISTRIBUTION = "zuko"
EXTRA = "zuko"


@cache
def import_zuko() -> ModuleType:
    """zuko, imported so that torch.distributions validates arguments as it did before.

    zuko turns validation off and empties ``arg_constraints`` for every distribution. Its own ones need that (some set
    their parameters only after torch would have checked them), so they, and they alone, keep it. What zuko adds to
    torch's ``Transform``, the method ``call_and_ladj``, stays: it changes nothing that torch does. Where zuko has been
    imported before, by somebody else, torch.distributions stays as that left it.
    """
    before = {name: vars(Distribution)[name] for name in ("_validate_args", "arg_constraints")}
    try:
        import zuko
    finally:
        for name, value in before.items():
            setattr(Distribution, name, value)
    for kind in vars(zuko.distributions).values():
        if isinstance(kind, type) and kind.__module__ == zuko.distributions.__name__:
            kind._validate_args = False
            kind.arg_constraints = vars(kind).get("arg_constraints", {})
    return zuko


class ZukoTransform(Transform):
    """One lazy transform of zuko, x ↦ f(x | c), as an nflows one: ``forward`` calls f, ``inverse`` its inverse.

    Each evaluates the conditioner once (an autoregressive inverse: once in each pass) and gives its log-determinant.
    Data beyond the bounds of f's domain have the density 0, and noise that no datum is mapped to gives NaN: zuko's
    ``NAF``, ``UNAF``, ``SOSPF`` and ``GF`` do not reach all noise, so their densities integrate to less than 1.
    In eval mode zuko cuts the weights of ``MNN``, ``UMNN`` and ``FFJTransform`` out of the graph. Here gradients reach
    them in either mode: these three are always in training mode, which changes nothing else in them.

    Args:
        lazy: a module whose call on a context, or None, gives a torch ``Transform``.
        context_features: the width of the context that it is given; it may ignore it.

    Raises:
        InverseNotAvailable: for a transform that is no bijection.
        ValueError: for one whose log-determinant is random; in a call, for a context that is missing, superfluous or of
            another shape, or an input of another width.
    """

    def __init__(self, lazy: nn.Module, context_features: Width):
        super().__init__()
        neural, continuous = import_zuko().flows.neural, import_zuko().flows.continuous
        layer = _layer(lazy)
        self.lazy = lazy
        self.name = f"zuko's {type(layer.thing if isinstance(layer, Held) else layer).__name__}"
        self.features, _ = _widths(layer)
        self.context_features = context_features
        self.takes_any_row = _takes_any_row(layer)
        cuts_gradients = neural.MNN, neural.UMNN, continuous.FFJTransform
        self.always_training = [module for module in lazy.modules() if isinstance(module, cuts_gradients)]
        self.train(self.training)
        if context_features is not ...:
            _check_exact(lazy(_a_context(lazy, context_features)))

    def train(self, mode: bool = True) -> "ZukoTransform":
        super().train(mode)
        for module in self.always_training:
            module.training = True
        return self

    @finite_rows
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._checked(inputs, context, self.name, inverse=False)

    @finite_rows
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._checked(inputs, context, f"the inverse of {self.name}", inverse=True)

    def _checked(self, inputs: Tensor, context: Tensor | None, what: str, inverse: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, self.name)
        if self.features is not None:
            check_event(inputs, (self.features,), what)
            return self._run(inputs, context, inverse)
        with naming_shape(inputs, what):
            return self._run(inputs, context, inverse)

    def _run(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        transform = self.lazy(context)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._check_traceable(transform)
        return _run(transform, inputs, inverse, scoring=not inverse)

    def _check_traceable(self, transform: torch.distributions.Transform) -> None:
        zuko = import_zuko().transforms
        layers: Any = [part for part in self.lazy.modules() if hasattr(part, "univariate") and hasattr(part, "shapes")]
        univariates = [layer.univariate(*map(torch.zeros, layer.shapes)) for layer in layers]
        singles = [single for each in (transform, *univariates) for single in _singles(each)]
        if any(isinstance(single, zuko.MonotonicTransform | zuko.FreeFormJacobianTransform) for single in singles):
            raise NotImplementedError(
                f"torch.jit cannot trace {self.name}, which solves an equation or differentiates within its pass: "
                "take Trace_ELBO instead of JitTrace_ELBO"
            )


def _run(transform: Any, values: Tensor, inverse: bool, scoring: bool) -> tuple[Tensor, Tensor]:
    """f(values), or f⁻¹(values), and its log|det| as ``(batch,)``. Each network of f is evaluated once.

    zuko's own ``call_and_ladj`` would evaluate each network of an inverse twice, and check no bounds.

    Args:
        transform: f, or what it is made of, as zuko builds it anew for each context and each univariate transform.
        scoring: what values beyond the bounds mean: data of density 0, or noise of no datum (see ``within``).
    """
    zuko, kind = import_zuko().transforms, type(transform)
    if isinstance(transform, _InverseTransform):
        return _run(transform.inv, values, not inverse, scoring)
    if kind is zuko.DependentTransform:
        return _run(transform.base, values, inverse, scoring)
    if kind is zuko.CouplingTransform:
        # as ``split`` and ``merge`` of the transform do, but several times faster, above all backward
        unchanged, changed = (values.index_select(-1, index) for index in (transform.idx_a, transform.idx_b))
        changed, log_det = _run(transform.meta(unchanged), changed, inverse, scoring)
        return values.index_copy(-1, transform.idx_b, changed), log_det
    if kind is zuko.AutoregressiveTransform:
        x = values
        if inverse:
            x = torch.zeros_like(values)
            for _ in range(transform.passes - 1):
                x = _preimage(transform.meta(x), values, missed=0.0)  # NaN would make the network's every output NaN
        return _run(transform.meta(x), values, inverse, scoring)  # all that a coordinate depends on is final by now
    if kind is zuko.ComposedTransform:
        log_det = values.new_zeros(len(values))
        for part in reversed(transform.transforms) if inverse else transform.transforms:
            values, log_det_of_part = _run(part, values, inverse, scoring)
            log_det = log_det + log_det_of_part
        return values, log_det
    if inverse and isinstance(transform, zuko.FreeFormJacobianTransform):  # whose inverse is another of the kind
        transform, inverse = transform.inv, False
    run = _invert if inverse else _call
    limits = bounds(transform.codomain if inverse else transform.domain)
    return within(limits, values, scoring, lambda inside: run(transform, inside, scoring))


def _call(transform: Any, x: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    y, log_det = transform.call_and_ladj(x)
    return y, per_row(log_det, x, transform.domain.event_dim)


def _invert(transform: Any, y: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    x = _preimage(transform, y, missed=math.nan)
    missed = None
    if _bisects(transform):
        missed = x.isnan() & ~y.isnan()
        x = x.masked_fill(missed, 0.0)
    log_det = -per_row(transform.log_abs_det_jacobian(x, y), x, transform.domain.event_dim)
    return (x, log_det) if missed is None else nowhere(missed, x, log_det, scoring)


def _preimage(transform: Any, y: Tensor, missed: float) -> Tensor:
    """f⁻¹(y) alone; ``missed`` where f does not reach y."""
    zuko, kind = import_zuko().transforms, type(transform)
    if kind is zuko.ComposedTransform:
        for part in reversed(transform.transforms):
            y = _preimage(part, y, missed)
        return y
    if kind is zuko.DependentTransform:
        return _preimage(transform.base, y, missed)
    return _bisect(transform, y, missed) if _bisects(transform) else transform.inv(y)


def _bisects(transform: Any) -> bool:
    return getattr(type(transform), "_inverse", None) is import_zuko().transforms.MonotonicTransform._inverse


def _bisect(transform: Any, y: Tensor, missed: float) -> Tensor:
    """f⁻¹(y) of a ``MonotonicTransform``; ``missed`` where f does not reach y.

    zuko looks in [−bound, bound] only, and gives the nearer end of that for all y beyond. Here the interval is widened
    where it has to be, up to ``FAR``.
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
    return x.masked_fill(beyond, missed).masked_fill(y.isnan(), math.nan)


FAR = 1e12  # sixteen untrained layers of a NAF, each of slope 0.3 far out, bring noise of 4 from 1e9


def transform_in(thing) -> Transform | None:
    """A lazy transform, or a transform that needs no call; an exported one comes back as it went.

    Raises:
        InverseNotAvailable, ValueError: as ``ZukoTransform``.
        ValueError: for parts that disagree on the width of the context.
    """
    if not isinstance(thing, torch.distributions.Transform | import_zuko().lazy.LazyTransform):
        return None
    layers = _layers(thing)
    return _chain(layers, _context_width(layers))


def flow_in(thing) -> Flow | None:
    """A lazy flow or another lazy distribution, such as ``GMM``, or a distribution that needs no call.

    The event shape and the width of the context are read off its parts. A flow none of whose parts says what context
    it reads hands it on unchecked.

    Raises:
        InverseNotAvailable, ValueError: as ``transform_in``; for a flow that a batch of contexts is already bound to.
    """
    zuko = import_zuko()
    layers = []
    if isinstance(thing, zuko.lazy.Flow):
        layers, base = _layers(thing.transform), thing.base
    elif isinstance(thing, zuko.lazy.LazyDistribution):
        base = thing
    elif isinstance(thing, zuko.distributions.NormalizingFlow):
        if thing.batch_shape:
            raise ValueError(
                f"this NormalizingFlow has a batch shape of {tuple(thing.batch_shape)}: its context, if any, is bound "
                "to it; as_flow takes the lazy flow that made it, and the context in each call"
            )
        layers, base = _layers(thing.transform), Held(thing.base)
    elif isinstance(thing, Distribution):
        base = Held(thing)
    else:
        return None
    width = _context_width([*_layers(base), *layers])
    transform = _chain(layers, width)
    context = _a_context(thing if isinstance(thing, nn.Module) else base, width)
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
    for layer in reversed(layers):
        if width is not ... or isinstance(_layer(layer), _exported()):  # others cannot be asked without a context
            shape = layer(context).inverse_shape(shape)
    if width is ...:
        return AnyContextFlow(transform, noise, shape, needs_context=False)
    return Flow(transform, noise, shape, width)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> nn.Module:
    """A ``zuko.lazy.LazyTransform``, for ``zuko.lazy.Flow``; any leading dimensions, broadcast with the context's.

    Raises:
        ValueError: for a transform that changes the shape, if nothing says the shapes.
    """
    check_shapes_known(transform, event_dim)
    return _exported()(transform, event_dim)


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of ``zuko.lazy.Flow`` on a ``DiagNormal`` N(0, I)."""
    zuko = import_zuko()
    zero = torch.zeros_like(inputs[0])
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, zero, torch.ones_like(zero), ndims=zero.dim(), buffer=True)
    return zuko.lazy.Flow(exported, base)(context).log_prob(inputs)


@class_on_demand
def _exported() -> type:
    class NflowsTransform(import_zuko().lazy.LazyTransform):
        """An nflows transform, data → noise, as a lazy one."""

        def __init__(self, transform: Transform, event_dim: EventDim):
            super().__init__()
            self.transform = transform
            self.event_dim = event_dim

        def forward(self, c: Tensor | None = None) -> torch.distributions.Transform:
            return ExportedTransform(self.transform, self.event_dim, c, data_to_noise=True)

    return NflowsTransform


def _layers(thing: Any) -> list[Any]:
    """The modules that a lazy transform or flow, or one that needs no call, is made of, data side first.

    Each is one of zuko's layers, or the inverse of one as zuko makes it, or ``Held``, or an exported transform. Those
    of a flow's base are the last.
    """
    zuko, kind = import_zuko(), type(thing)
    if isinstance(thing, zuko.lazy.Flow):
        return [*_layers(thing.transform), *_layers(thing.base)]
    if kind is zuko.lazy.LazyComposedTransform or kind is zuko.transforms.ComposedTransform:
        return [layer for part in thing.transforms for layer in _layers(part)]
    if kind is zuko.lazy.LazyInverse:
        return [layer.inv for layer in reversed(_layers(thing.transform))]
    return [Held(thing) if isinstance(thing, torch.distributions.Transform) else thing]


def _layer(lazy: Any) -> Any:
    """The layer itself, if this is the inverse of one."""
    return lazy.transform if type(lazy) is import_zuko().lazy.LazyInverse else lazy


def _chain(layers: list[Any], context_features: Width) -> Transform:
    """What the layers compute one after the other, if each is given a context of this width."""
    chained = []
    for lazy in layers:
        layer = _layer(lazy)
        if isinstance(layer, _exported()):
            chained.append(layer.transform if lazy is layer else InverseTransform(layer.transform))
        else:
            chained.append(ZukoTransform(lazy, context_features))
    return chained[0] if len(chained) == 1 else CompositeTransform(chained)


def _context_width(layers: list[Any]) -> Width:
    return one_width([_widths(_layer(layer))[1] for layer in layers], "the context of a zuko flow")


def _widths(layer: Any) -> tuple[int | None, Width]:
    """The width of a layer's data, ``None`` if unknown, and that of its context.

    The latter is ``None`` for what ignores whatever it is given, 0 for what must be given none, and ``...`` if it is
    unknown: see ``one_width``. A layer of a user's own may say it by an attribute ``context_features``.
    """
    zuko = import_zuko()
    flows, lazy = zuko.flows, zuko.lazy
    if isinstance(layer, Held | lazy.UnconditionalTransform | lazy.UnconditionalDistribution | lazy.Unconditional):
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
    except AttributeError:  # another network in the place of zuko's own: it need not say its widths
        return None, ...
    width = getattr(layer.transform if isinstance(layer, _exported()) else layer, "context_features", ...)
    return None, 0 if width is None else width


def _a_context(module: nn.Module, width: Width) -> Tensor | None:
    """One row of context, to ask for shapes with."""
    return like(module).new_zeros(1, width) if isinstance(width, int) else None


def _singles(transform: Any) -> list[Any]:
    """The single transforms that one of zuko's, or the inverse of one, is made of."""
    zuko = import_zuko().transforms
    if isinstance(transform, zuko.ComposedTransform):
        return [single for part in transform.transforms for single in _singles(part)]
    if isinstance(transform, zuko.DependentTransform):
        return _singles(transform.base)
    return _singles(transform.inv) if isinstance(transform, _InverseTransform) else [transform]


def _check_exact(transform: Any) -> None:
    for single in _singles(transform):
        if not single.bijective:
            raise InverseNotAvailable(f"{type(single).__name__} is no bijection, so no flow can use it")
        if isinstance(single, import_zuko().transforms.FreeFormJacobianTransform) and not single.exact:
            raise ValueError("the log-determinant of this transform is a random estimate; build it with exact=True")


def _takes_any_row(layer: Any) -> bool:
    """Whether it is a layer of which zuko computes each number on its own, by a formula without a check or a loop."""
    transforms = import_zuko().transforms
    univariate = getattr(layer, "univariate", None)
    return getattr(univariate, "func", univariate) in (
        transforms.MonotonicAffineTransform,
        transforms.MonotonicRQSTransform,
    )
