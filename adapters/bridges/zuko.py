"""zuko: its lazy transforms and flows in, any transform out.

zuko runs data → noise and lists the data side first, as nflows does, so nothing is turned round. A call of a lazy
transform on a context gives a torch ``Transform``, whose ``call_and_ladj`` gives both halves of a flow's density.

What ``import zuko`` does to the whole process, ``import_zuko`` undoes; nothing else here imports it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import ModuleType

import torch
from nflows.transforms import IdentityTransform, InverseNotAvailable, Transform
from torch import Tensor, nn
from torch.distributions import Distribution

from adapters.bridges.common.bounds import bounds, nowhere, within
from adapters.bridges.common.context import AnyContextFlow, Width, one_width
from adapters.bridges.common.exported_transform import ExportedTransform
from adapters.bridges.common.exports import EventDim, check_shapes_known
from adapters.bridges.common.held import Held
from adapters.bridges.common.tensors import per_row
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
    """A lazy transform of zuko, x ↦ f(x | c), as an nflows one: ``forward`` calls f, ``inverse`` its inverse.

    Each is one evaluation of every conditioner (autoregressive inverses: one for each pass), with its log-determinant.
    Data beyond the bounds of a transform's domain have the density 0, and noise that no datum is mapped to gives NaN:
    zuko's ``NAF``, ``UNAF``, ``SOSPF`` and ``GF`` do not reach all noise, and their densities integrate to less than 1.
    In eval mode zuko cuts the weights of ``MNN``, ``UMNN`` and ``FFJTransform`` out of the graph. Here gradients reach
    them in either mode: the flag is held at "training", which changes nothing else in these three.

    Args:
        lazy: a module whose call on a context, or None, gives a torch ``Transform``.
        widths: the contexts that something beside it, such as a base, reads.

    Raises:
        InverseNotAvailable: for a transform that is no bijection.
        ValueError: for one whose log-determinant is random; in a call, for a context that is missing, superfluous or of
            another shape, or an input of another width.
    """

    def __init__(self, lazy: nn.Module, widths: Iterable[Width] = ()):
        super().__init__()
        zuko = import_zuko()
        self.lazy = lazy
        self.name = f"zuko's {type(lazy.thing if isinstance(lazy, Held) else lazy).__name__}"
        parts = [_reads(part) for part in _parts(lazy)]
        self.features = parts[0][0], parts[-1][0]
        self.context_features = one_width(
            [*widths, *(w for _, read in parts for w in read)], "the context of a zuko flow"
        )
        if self.context_features is not ...:
            _check_bijective(lazy(_some_context(lazy, self.context_features)))
        gradient_cutting = zuko.flows.neural.MNN, zuko.flows.neural.UMNN, zuko.flows.FFJTransform
        self.gradient_cutting = [module for module in lazy.modules() if isinstance(module, gradient_cutting)]
        self.takes_any_row = all(map(_takes_any_row, _parts(lazy)))
        self.train(self.training)

    def train(self, mode: bool = True) -> "ZukoTransform":
        super().train(mode)
        for module in self.gradient_cutting:
            module.training = True
        return self

    @finite_rows
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with naming_shape(inputs, self.name):
            return _call(self._transform(inputs, context, self.features[0]), inputs, scoring=True)

    @finite_rows
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with naming_shape(inputs, f"the inverse of {self.name}"):
            return _invert(self._transform(inputs, context, self.features[1]), inputs, scoring=False)

    def _transform(self, inputs: Tensor, context: Tensor | None, features: int | None):
        if features is not None:
            check_event(inputs, (features,), self.name)
        check_context(context, self.context_features, inputs, self.name)
        transform = self.lazy(context)
        if torch.jit.is_tracing():
            self._check_traceable(transform)
        return transform

    def _check_traceable(self, transform) -> None:
        layers = [
            module for module in self.lazy.modules() if hasattr(module, "univariate") and hasattr(module, "shapes")
        ]
        univariates = [layer.univariate(*map(torch.zeros, layer.shapes)) for layer in layers]
        if any(map(_solves, (transform, *univariates))):
            raise NotImplementedError(
                f"torch.jit cannot trace {self.name}, which solves an equation or differentiates within its pass: "
                "take Trace_ELBO instead of JitTrace_ELBO"
            )


def _call(transform, x: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    """y = f(x) and log|det dy/dx| as ``(batch,)``, each network of f evaluated once, behind an ``.inv`` too.

    What lies beyond the bounds of f's domain, as the interval of a circular shift, has no y: see ``within``.
    """
    transforms, kind = import_zuko().transforms, type(transform)
    if kind is transforms.ComposedTransform:
        return _chain(_call, transform.transforms, x, scoring)
    if isinstance(transform, torch.distributions.transforms._InverseTransform):
        return _invert(transform.inv, x, scoring)
    if kind is transforms.DependentTransform:
        return _call(transform.base, x, scoring)
    if kind is transforms.AutoregressiveTransform:
        return _call(transform.meta(x), x, scoring)
    if kind is transforms.CouplingTransform:
        x_a, x_b = transform.split(x)
        y_b, log_det = _call(transform.meta(x_a), x_b, scoring)
        return transform.merge(x_a, y_b, x.shape), log_det

    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = transform.call_and_ladj(x)
        return y, per_row(log_det, x, transform.domain.event_dim)

    return within(bounds(transform.domain), x, scoring, values)


def _invert(transform, y: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    """x = f⁻¹(y) and log|det dx/dy| as ``(batch,)``; zuko itself would run each network again for the latter."""
    transforms, kind = import_zuko().transforms, type(transform)
    if kind is transforms.ComposedTransform:
        return _chain(_invert, reversed(transform.transforms), y, scoring)
    if isinstance(transform, torch.distributions.transforms._InverseTransform):
        return _call(transform.inv, y, scoring)
    if kind is transforms.DependentTransform:
        return _invert(transform.base, y, scoring)
    if kind is transforms.CouplingTransform:
        y_a, y_b = transform.split(y)
        x_b, log_det = _invert(transform.meta(y_a), y_b, scoring)
        return transform.merge(y_a, x_b, y.shape), log_det
    if kind is transforms.AutoregressiveTransform:
        x = torch.zeros_like(y)
        for _ in range(transform.passes - 1):
            x = _preimage(transform.meta(x), y, missed=0.0)  # for in a network, NaN is NaN for every coordinate
        # all that a coordinate of the last pass depends on is already final
        return _invert(transform.meta(x), y, scoring)

    def values(y: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(transform, transforms.FreeFormJacobianTransform):
            x, log_det = transform.inv.call_and_ladj(y)
            return x, per_row(log_det, y, 1)
        x = _preimage(transform, y, missed=math.nan)
        if not _bisects(transform):
            return x, -per_row(transform.log_abs_det_jacobian(x, y), x, transform.domain.event_dim)
        missed = x.isnan() & ~y.isnan()
        inside = x.masked_fill(missed, 0.0)
        return nowhere(missed, inside, -per_row(transform.log_abs_det_jacobian(inside, y), x, 0), scoring)

    return within(bounds(transform.codomain), y, scoring, values)


def _preimage(transform, y: Tensor, missed: float) -> Tensor:
    """f⁻¹(y) alone; ``missed`` where f does not reach y."""
    transforms, kind = import_zuko().transforms, type(transform)
    if kind is transforms.ComposedTransform:
        for part in reversed(transform.transforms):
            y = _preimage(part, y, missed)
        return y
    if kind is transforms.DependentTransform:
        return _preimage(transform.base, y, missed)
    return _bisect(transform, y, missed) if _bisects(transform) else transform.inv(y)


def _bisects(transform) -> bool:
    return getattr(type(transform), "_inverse", None) is import_zuko().transforms.MonotonicTransform._inverse


def _bisect(transform, y: Tensor, missed: float) -> Tensor:
    """f⁻¹(y) of a ``MonotonicTransform``; ``missed`` where f does not reach y.

    zuko looks in [−bound, bound] only, and gives the nearer end of that for all y beyond; here it is widened to ``FAR``
    where it has to be.
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


def _chain(function: Callable, transforms: Iterable, value: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    total = 0.0
    for transform in transforms:
        value, log_det = function(transform, value, scoring)
        total = total + log_det
    return value, total


def transform_in(thing) -> Transform | None:
    """A lazy transform, or a transform that needs no call; an exported one comes back as it went.

    Raises:
        InverseNotAvailable, ValueError: as ``ZukoTransform``.
    """
    if isinstance(thing, _exported()):
        return thing.transform
    if isinstance(thing, torch.distributions.Transform):
        return ZukoTransform(Held(thing))
    return ZukoTransform(thing) if isinstance(thing, import_zuko().lazy.LazyTransform) else None


def flow_in(thing) -> Flow | None:
    """A lazy flow or another lazy distribution, such as ``GMM``, or a distribution that needs no call.

    The event shape and the width of the context are read off its parts. A flow none of whose parts says what context
    it reads hands it on unchecked.

    Raises:
        InverseNotAvailable, ValueError: as ``ZukoTransform``; for parts that disagree on the width of the context; for
            a flow that a batch of contexts is already bound to.
    """
    zuko = import_zuko()
    transform = None
    if isinstance(thing, zuko.lazy.Flow):
        transform, base = thing.transform, thing.base
    elif isinstance(thing, zuko.lazy.LazyDistribution):
        base = thing
    elif isinstance(thing, zuko.distributions.NormalizingFlow):
        if thing.batch_shape:
            raise ValueError(
                f"this NormalizingFlow has a batch shape of {tuple(thing.batch_shape)}: its context, if any, is bound "
                "to it; as_flow takes the lazy flow that made it, and the context in each call"
            )
        transform, base = Held(thing.transform), Held(thing.base)
    elif isinstance(thing, Distribution):
        base = Held(thing)
    else:
        return None
    widths = _reads(base)[1]
    if transform is None:
        width, inner = one_width(widths, "the context of a zuko flow"), IdentityTransform()
    else:
        inner = ZukoTransform(transform, widths)
        width = inner.context_features
    context = _some_context(thing if isinstance(thing, nn.Module) else base, width)
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
    event_shape = shape if transform is None else _data_shape(transform, shape, context, width)
    if width is ...:
        return AnyContextFlow(inner, TorchBase(base, shape), event_shape, needs_context=False)
    return Flow(inner, TorchBase(base, shape), event_shape, width)


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


@cache
def _exported() -> type:
    """The class of exported transforms: it exists once zuko, its parent, has been imported."""

    class NflowsTransform(import_zuko().lazy.LazyTransform):
        """An nflows transform, data → noise, as a lazy one."""

        __qualname__ = "NflowsTransform"

        def __init__(self, transform: Transform, event_dim: EventDim):
            super().__init__()
            self.transform = transform
            self.event_dim = event_dim

        def forward(self, c: Tensor | None = None) -> torch.distributions.Transform:
            return ExportedTransform(self.transform, self.event_dim, c, data_to_noise=True)

    return NflowsTransform


def __getattr__(name: str) -> type:
    """The class of exports by its name, where ``pickle`` looks for it."""
    if name == "NflowsTransform":
        return _exported()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _data_shape(lazy: nn.Module, shape: torch.Size, context: Tensor | None, width: Width) -> torch.Size:
    """The shape of a datum whose noise is of this shape; that very shape where the transform cannot be asked."""
    lazies = import_zuko().lazy
    if width is not ... or isinstance(lazy, _exported()):
        return lazy(context).inverse_shape(shape)
    if isinstance(lazy, lazies.LazyInverse) and isinstance(lazy.transform, _exported()):
        return lazy.transform(context).forward_shape(shape)
    for transform in reversed(lazy.transforms) if isinstance(lazy, lazies.LazyComposedTransform) else []:
        shape = _data_shape(transform, shape, context, width)
    return shape


def _parts(lazy: nn.Module) -> Iterator[nn.Module]:
    """The single transforms of a lazy one, data side first."""
    zuko = import_zuko()
    if type(lazy) is zuko.lazy.LazyComposedTransform:
        for transform in lazy.transforms:
            yield from _parts(transform)
    elif type(lazy) is zuko.lazy.LazyInverse:
        yield from reversed(list(_parts(lazy.transform)))
    else:
        yield lazy


def _reads(part: nn.Module) -> tuple[int | None, list[Width]]:
    """The width of the data that one transform or base takes, ``None`` if unknown, and the contexts it reads.

    No context in the list means that whatever is given is ignored; 0 in it, that there must be none. A layer of
    a user's own may say it by an attribute ``context_features``.
    """
    zuko = import_zuko()
    flows, lazy = zuko.flows, zuko.lazy
    if isinstance(part, Held | lazy.UnconditionalTransform | lazy.UnconditionalDistribution | lazy.Unconditional):
        return None, []
    if isinstance(part, _exported()):
        return None, [_said(part.transform)]
    if isinstance(part, lazy.Flow):
        return None, [width for inner in (*_parts(part.transform), part.base) for width in _reads(inner)[1]]
    try:
        if isinstance(part, flows.MaskedAutoregressiveTransform):
            features = part.hyper.out_features // part.total
            context = part.hyper.in_features - features
        elif isinstance(part, flows.GeneralCouplingTransform):
            features = len(part.mask)
            context = part.hyper.in_features - int(part.mask.sum())
        elif isinstance(part, flows.FFJTransform):
            features = part.ode.out_features
            context = part.ode.in_features - features - 2 * len(part.freqs)
        elif isinstance(part, flows.ElementWiseTransform | zuko.mixtures.GMM):
            elementwise = isinstance(part, flows.ElementWiseTransform)
            unconditional = not hasattr(part, "hyper")
            width = part.phi[0].shape[0] if unconditional else part.hyper.out_features // part.total
            features = width if elementwise else None
            context = 0 if unconditional else part.hyper.in_features
        else:
            return None, [_said(part)]
    except AttributeError:  # another network in the place of zuko's own: it need not say its widths
        return None, [...]
    return features, [context]


def _said(part: nn.Module) -> Width:
    """What a part's attribute ``context_features`` says, where ``None`` means that it must be given none."""
    width = getattr(part, "context_features", ...)
    return 0 if width is None else width


def _some_context(module: nn.Module, width: Width) -> Tensor | None:
    """One row of context, to ask for shapes with."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return None if width in (None, ...) else like.new_zeros(1, width)


def _check_bijective(transform) -> None:
    transforms = import_zuko().transforms
    if isinstance(transform, transforms.ComposedTransform):
        for inner in transform.transforms:
            _check_bijective(inner)
    elif isinstance(transform, transforms.DependentTransform):
        _check_bijective(transform.base)
    elif not transform.bijective:
        raise InverseNotAvailable(f"{type(transform).__name__} is no bijection, so no flow can use it")
    elif isinstance(transform, transforms.FreeFormJacobianTransform) and not transform.exact:
        raise ValueError("the log-determinant of this transform is a random estimate; build it with exact=True")


def _takes_any_row(part: nn.Module) -> bool:
    """Whether it is a layer of which zuko computes each number on its own, by a formula without a check or a loop."""
    transforms = import_zuko().transforms
    univariate = getattr(part, "univariate", None)
    return getattr(univariate, "func", univariate) in (
        transforms.MonotonicAffineTransform,
        transforms.MonotonicRQSTransform,
    )


def _solves(transform) -> bool:
    """Whether it, or a part of it, works by bisection, by an integral or by a derivative of its own."""
    transforms = import_zuko().transforms
    match transform:
        case transforms.ComposedTransform():
            return any(map(_solves, transform.transforms))
        case transforms.DependentTransform():
            return _solves(transform.base)
        case torch.distributions.transforms._InverseTransform():
            return _solves(transform.inv)
    return isinstance(transform, transforms.MonotonicTransform | transforms.FreeFormJacobianTransform)
