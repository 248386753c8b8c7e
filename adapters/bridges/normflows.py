"""normflows: its flow layers and its whole models in, any transform out.

normflows runs noise → data and lists the noise side first; ``NormflowsTransform`` turns that round. It runs the layers
itself, one by one, for four reasons: normflows' own loops add up log-determinants in float32; some of its layers give
a log-determinant of no dimension, or a number; its unconditional models drop a context that their layers take; and some
layers are wrong by themselves (see ``_way_to_run``).

A context has the shape ``(batch, width)``. A class-conditional base takes the one-hot class as its context.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import EllipsisType

import nflows.distributions
import torch
from nflows.transforms import InverseNotAvailable, Transform
from nflows.transforms.base import InputOutsideDomain
from torch import Tensor, nn

from adapters.checks import check_context, naming_shape
from adapters.finite import with_finite_rows
from adapters.flow import Flow

PACKAGES = LIBRARIES = ("normflows",)
DISTRIBUTION = "normflows"
EXTRA = "normflows"

# Width of the context that something reads: None if it reads none, ... if it does not say.
Width = int | EllipsisType | None


class NormflowsTransform(Transform):
    """normflows layers f₁ … f_n, noise side first, as one transform: x = f_n(… f₁(z)), ``forward`` runs x ↦ z.

    Args:
        flows: the layers; ``Composite`` and ``Reverse`` are taken apart, since they drop the context.
        context_features: width of the context, where something beside the layers, such as a base, reads one.

    Periodic coordinates lie on a circle: ``PeriodicWrap`` and ``PeriodicShift`` score any representative of a point,
    and take noise within their bound only, where they are one to one.

    An ``ActNorm`` that is not yet initialised follows nflows' rule, not its own: it takes its scale and shift from the
    first data it meets in training; until then, and for noise, it uses the parameters it has.

    Raises:
        InverseNotAvailable: for a layer without the direction data → noise; in ``inverse``, without the other one.
        ValueError: for a layer that is no bijection or whose log-determinant is random; in a call, for a context that
            is missing, superfluous or of another shape, or an input of another width.
        nflows.transforms.base.InputOutsideDomain: in a call, for inputs outside [0, 1] of a spline with ``tails=None``,
            and for noise beyond the bound of a periodic layer.
    """

    def __init__(self, flows: Iterable[nn.Module], context_features: Width = None):
        from normflows.flows import ActNorm, Squeeze

        super().__init__()
        steps = [step for flow in flows for step in _steps(flow)]
        self.layers = nn.ModuleList(layer for layer, _ in steps)
        self.backwards = [backwards for _, backwards in steps]
        _check_bijective(steps)
        self.one_way = [_name(layer) for layer, backwards in steps if backwards and not _has_inverse(layer)]
        widths = [_context_of(layer) for layer in self.layers]
        self.reads_context = [width is not None for width in widths]
        self.ways = [_way_to_run(layer) for layer in self.layers]
        self.context_features = _one_width([context_features, *widths])
        self.keeps_shape = not any(isinstance(layer, Squeeze) for layer in self.layers)
        self.channels = _channels(steps)
        self.actnorms = {
            i: [m for m in layer.modules() if isinstance(m, ActNorm)] for i, layer in enumerate(self.layers)
        }
        self.name = "normflows' " + ", ".join(dict.fromkeys(_name(layer) for layer in self.layers))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.channels is not None and inputs.shape[1:2] != (self.channels,):
            raise ValueError(f"{self.name} takes {self.channels} features, not inputs of shape {tuple(inputs.shape)}")
        return self._run(inputs, context, to_noise=True)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.one_way:
            raise InverseNotAvailable(f"{', '.join(self.one_way)} has no inverse, so this flow cannot sample")
        return self._run(inputs, context, to_noise=False)

    def _run(self, inputs: Tensor, context: Tensor | None, to_noise: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, self.name)
        if self.keeps_shape and inputs.shape[0] == 0:  # which some layers cannot reshape
            return inputs.new_zeros(inputs.shape), inputs.new_zeros(0)
        layers = [self._held(i, to_noise) for i in range(len(self.layers))]
        steps = list(zip(layers, self.backwards, self.reads_context, self.ways, strict=True))
        outputs, log_det = inputs, 0.0
        with naming_shape(inputs, self.name):
            for layer, backwards, reads_context, run in reversed(steps) if to_noise else steps:
                given = layer, outputs, (context,) if reads_context else (), backwards != to_noise
                try:
                    outputs, step = run(*given)
                except AssertionError:  # of a spline, whose discriminant rounding or a NaN has made negative
                    outputs, step = _run_in_float64(run, *given)
                log_det = log_det + step
        if self.keeps_shape and outputs.shape != inputs.shape:
            raise ValueError(f"{self.name} takes no inputs of shape {tuple(inputs.shape)}")
        return outputs, _per_row(log_det, inputs)

    def _held(self, i: int, to_noise: bool) -> nn.Module:
        """A layer; where an ActNorm in it would initialise itself in this call and should not, a copy that won't.

        The copy has the same parameters. The layer itself is left alone, since other threads may be running it.
        """
        layer = self.layers[i]
        if all(a.data_dep_init_done or (to_noise and a.training) for a in self.actnorms[i]):
            return layer
        layer = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
        for name, buffer in layer.named_buffers():
            if name.rpartition(".")[2] == "data_dep_init_done":
                buffer.fill_(1)
        return layer


class MultiscaleTransform(Transform):
    """The layers of a ``MultiscaleFlow``: an image ↦ the noise of all its levels, flattened, coarsest first.

    Args:
        model: the normflows model.
        shapes: the shape of each level's noise.
        context_features: width of the context of the bases; the layers read none.
    """

    def __init__(self, model: nn.Module, shapes: list[torch.Size], context_features: Width):
        super().__init__()
        flows = [list(level) for level in model.flows]
        if model.transform is not None:
            flows[-1].append(model.transform)
        self.levels = nn.ModuleList(NormflowsTransform(level, context_features) for level in flows)
        self.merges = model.merges
        self.shapes = shapes

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, log_det, noise = inputs, 0.0, []
        for i in range(len(self.levels) - 1, -1, -1):
            outputs, step = self.levels[i](outputs, context)
            log_det = log_det + step
            if i > 0:
                (outputs, split), step = self.merges[i - 1].inverse(outputs)
                log_det = log_det + step
                noise.append(split)
        noise.append(outputs)
        return torch.cat([z.flatten(1) for z in reversed(noise)], dim=1), _per_row(log_det, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, log_det = None, 0.0
        for i, noise in enumerate(_split(inputs, self.shapes)):
            if i > 0:
                noise, step = self.merges[i - 1]([outputs, noise])
                log_det = log_det + step
            outputs, step = self.levels[i].inverse(noise, context)
            log_det = log_det + step
        return outputs, _per_row(log_det, inputs)


class NormflowsBase(nflows.distributions.Distribution):
    """A base distribution of normflows, with its parameters, which normflows trains unless told otherwise.

    Args:
        q0: the base.
        like: a tensor of the flow's dtype and device; samples come in these (a ``GaussianMixture``'s own are float64).
    """

    def __init__(self, q0: nn.Module, like: Tensor):
        from normflows.distributions import UniformGaussian

        super().__init__()
        self.q0 = q0
        self.is_partly_uniform = isinstance(q0, UniformGaussian)
        self.reads_context = _context_of_base(q0) is not None
        self.register_buffer("_like", like.new_empty(0), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        log_prob = self.q0.log_prob(inputs, context) if self.reads_context else self.q0.log_prob(inputs)
        return self._within(inputs, log_prob.to(inputs.dtype))

    def _within(self, inputs: Tensor, log_prob: Tensor) -> Tensor:
        """−∞ where a coordinate lies outside its uniform distribution, which ``UniformGaussian`` itself overlooks."""
        if not self.is_partly_uniform:
            return log_prob
        half = self.q0.scale[self.q0.ind] / 2 * (1 + 16 * torch.finfo(inputs.dtype).eps)  # its own samples are rounded
        return log_prob.masked_fill((inputs[:, self.q0.ind].abs() > half).any(1), -torch.inf)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self.sample_and_log_prob(num_samples, context)[0]

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = 1 if context is None else len(context)
        if self.reads_context:
            drawn = self.q0(rows * num_samples, context.repeat_interleave(num_samples, dim=0))
        else:
            drawn = self.q0(rows * num_samples)
        samples, log_prob = (values.to(self._like) for values in drawn)
        if context is None:
            return samples, log_prob
        return samples.unflatten(0, (rows, num_samples)), log_prob.unflatten(0, (rows, num_samples))


class MultiscaleBase(nflows.distributions.Distribution):
    """Independent bases side by side, each flattened, as ``MultiscaleTransform`` lays its noise out."""

    def __init__(self, bases: Iterable[nflows.distributions.Distribution], shapes: list[torch.Size]):
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.shapes = shapes

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        parts = zip(self.bases, _split(inputs, self.shapes), strict=True)
        return sum(base.log_prob(part, context) for base, part in parts)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = 1 if context is None else 2
        return torch.cat([base.sample(num_samples, context).flatten(leading) for base in self.bases], dim=-1)


class AnyContextFlow(Flow):
    """A ``Flow`` whose context may have any shape but for its first dimension: its parts do not say which one."""

    def _check_context(self, context: Tensor | None) -> None:
        if context is None:
            raise ValueError("this flow is conditional: give a context of shape (batch, …)")


def transform_in(thing) -> Transform | None:
    """A flow layer, or layers in a ``Composite``; an exported transform comes back as it went."""
    from normflows.flows import Flow as Layer

    if not isinstance(thing, Layer):
        return None
    return thing.transform if isinstance(thing, _exported()) else NormflowsTransform([thing])


def flow_in(thing) -> Flow | None:
    """A ``NormalizingFlow``, ``ConditionalNormalizingFlow``, ``ClassCondFlow`` or ``MultiscaleFlow``, with its base.

    Raises:
        ValueError: for ``GaussianPCA``, whose log_prob in normflows is not normalised; for parts that disagree on the
            width of the context; and as ``NormflowsTransform``.
    """
    from normflows import ClassCondFlow, ConditionalNormalizingFlow, MultiscaleFlow, NormalizingFlow

    if isinstance(thing, MultiscaleFlow):
        return _multiscale_flow(thing)
    if not isinstance(thing, NormalizingFlow | ClassCondFlow):
        return None
    transform = NormflowsTransform(thing.flows, _context_of_base(thing.q0))
    event_shape = _data_shape(_shape(thing.q0), transform)
    width = transform.context_features
    if width is ... and not isinstance(thing, ConditionalNormalizingFlow):
        width = None  # layers that may take a context, in a model that has none to give
    return _flow(transform, _base(thing.q0, _like(thing)), event_shape, width)


def transform_out(transform: Transform, library: str, event_dim: int, conditional: bool) -> nn.Module:
    """A ``normflows.flows.Flow`` for ``NormalizingFlow`` and, with context, ``ConditionalNormalizingFlow``."""
    return _exported()(transform)


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of normflows' ``NormalizingFlow`` and, with context, ``ConditionalNormalizingFlow``."""
    from normflows import ConditionalNormalizingFlow, NormalizingFlow
    from normflows.distributions import DiagGaussian

    base = DiagGaussian(tuple(inputs.shape[1:]), trainable=False).to(inputs)
    kind = NormalizingFlow if context is None else ConditionalNormalizingFlow
    model = kind(base, [exported])
    return model.log_prob(inputs) if context is None else model.log_prob(inputs, context)


@cache
def _exported() -> type:
    """The class of exported transforms: it exists once normflows, its parent, has been imported."""
    from normflows.flows import Flow as Layer

    class NflowsLayer(Layer):
        """An nflows transform, data → noise, as a normflows layer, noise → data."""

        __qualname__ = "NflowsLayer"  # where pickle looks for it: see __getattr__

        def __init__(self, transform: Transform):
            super().__init__()
            self.transform = transform

        def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.transform.inverse(z, context)

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.transform(z, context)

    return NflowsLayer


def __getattr__(name: str) -> type:
    """The class of exported transforms by its name, so that pickles of them find it, in another process too."""
    if name == "NflowsLayer":
        return _exported()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _multiscale_flow(model) -> Flow:
    shapes = [_shape(q0) for q0 in model.q0]
    context_features = _one_width([_context_of_base(q0) for q0 in model.q0]) if model.class_cond else None
    transform = MultiscaleTransform(model, shapes, context_features)
    like = _like(model)
    base = MultiscaleBase([_base(q0, like) for q0 in model.q0], shapes)
    event_shape = _data_shape(shapes[0], transform.levels[0])
    for level, merge, shape in zip(transform.levels[1:], model.merges, shapes[1:], strict=True):
        event_shape = _data_shape(_merged(event_shape, shape, merge), level)
    return _flow(transform, base, event_shape, context_features)


def _flow(transform: Transform, base, event_shape: torch.Size, context_features: Width) -> Flow:
    return (AnyContextFlow if context_features is ... else Flow)(transform, base, event_shape, context_features)


def _base(q0: nn.Module, like: Tensor) -> nflows.distributions.Distribution:
    from normflows.distributions.base import GaussianPCA

    if isinstance(q0, GaussianPCA):
        raise ValueError("GaussianPCA cannot be a base: normflows' log_prob of it has wrong signs and no logarithm")
    return NormflowsBase(q0, like)


def _steps(flow: nn.Module, backwards: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """The single layers, noise side first, each with whether it runs backwards (noise → data by its ``inverse``)."""
    from normflows.flows import Composite, Reverse

    kind = type(flow)
    if kind.forward is Composite.forward and kind.inverse is Composite.inverse:
        for inner in reversed(flow._flows) if backwards else flow._flows:
            yield from _steps(inner, backwards)
    elif kind.forward is Reverse.forward and kind.inverse is Reverse.inverse:
        yield from _steps(flow.flow, not backwards)
    else:
        yield flow, backwards


def _check_bijective(steps: list[tuple[nn.Module, bool]]) -> None:
    from normflows import flows

    for layer, backwards in steps:
        for module in layer.modules():
            if isinstance(module, flows.Residual):  # with exact_trace too: the series is cut at a random term
                raise ValueError(
                    "Residual cannot score data: its log-determinant is a random estimate, in eval mode too (exact "
                    "for 2 features only), and its inverse stops at an error of 3e-3"
                )
            if isinstance(module, flows.BatchNorm):
                raise ValueError("BatchNorm normalises by the batch at hand, in eval mode too: no datum has a density")
            if isinstance(module, flows.MetropolisHastings | flows.HamiltonianMonteCarlo):
                raise ValueError(f"{_name(module)} is a random walk, not a bijection: it has no density of its own")
        if _way_to_run(layer) in (_run, _run_copying):
            for module in layer.modules():
                if isinstance(module, flows.Flow) and _way_to_run(module) not in (_run, _run_copying):
                    raise ValueError(
                        f"{_name(layer)} runs normflows' {_name(module)} itself, which is wrong unless this package "
                        "runs it; give the two as layers of a Composite"
                    )
        if not backwards and not _has_inverse(layer):
            raise InverseNotAvailable(
                f"{_name(layer)} runs noise → data only, so it cannot score data; "
                "normflows.flows.Reverse turns it into a flow that scores, and cannot sample"
            )
    for (layer, backwards), end in zip(steps[:1] + steps[-1:], (0, 1), strict=False):
        if _two_tensors(layer)[end != backwards]:
            raise ValueError(f"{_name(layer)} takes or gives two tensors at an end of the flow, where there is one")


def _way_to_run(layer: nn.Module) -> Callable[[nn.Module, Tensor, tuple, bool], tuple[Tensor, Tensor]]:
    """What runs a layer on an input, by its ``forward`` or its ``inverse``: (layer, input, context, inverse)."""
    from normflows import flows, transforms
    from normflows.flows import neural_spline

    if isinstance(layer, transforms.Shift) or not type(layer).forward.__module__.startswith("normflows."):
        return _run_copying
    if isinstance(layer, flows.PeriodicWrap | flows.PeriodicShift):
        return _run_periodic
    for part in layer.modules():
        if type(part).__module__.startswith(f"{neural_spline.__name__}."):
            tails = getattr(part, "tails", "linear")
            if tails is None:
                return _run_on_unit_interval
            if not isinstance(tails, str):
                return _run_circular
    return _run


def _run(layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    return (layer.inverse if inverse else layer)(x, *context)


def _run_copying(layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    """On a copy, for what overwrites its input: ``Shift``, and maybe a layer that nobody has checked."""
    return _run(layer, x.clone(), context, inverse)


def _run_periodic(layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    if not inverse and (x[..., layer.ind].abs() > layer.bound * (1 + 1e-4)).any():  # the rest may be rounding
        raise InputOutsideDomain(
            f"{_name(layer)} takes noise within ±{layer.bound}, not {x[..., layer.ind].abs().max():g}: give its "
            "coordinates a base on that interval, such as normflows' UniformGaussian"
        )
    return _run(layer, x, context, inverse)


def _run_on_unit_interval(layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    """A spline with ``tails=None``, which reads beyond its knots outside [0, 1]."""
    from normflows.flows.neural_spline.coupling import Coupling

    bounded = x
    for part in layer.modules():
        if isinstance(part, Coupling) and part.unconditional_transform is None:
            bounded = x[:, part.transform_features]
    if not ((bounded >= 0) & (bounded <= 1)).all():
        raise InputOutsideDomain(
            f"{_name(layer)} with tails=None maps [0, 1] to itself, but got values from {bounded.min():g} to "
            f"{bounded.max():g}; tails='linear' takes any"
        )
    return _run(layer, x, context, inverse)


def _run_circular(layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    """A spline whose tails are a list: the identity beyond its bound, as with any other tails.

    normflows itself maps what lies there to 0, with a log-determinant of 0. Since networks read the outputs of earlier
    coordinates, these have to be put right within the layer.
    """
    from normflows.flows.neural_spline.autoregressive import Autoregressive
    from normflows.flows.neural_spline.coupling import Coupling, PiecewiseRationalQuadraticCDF

    if hasattr(layer, "prqct") or hasattr(layer, "mprqat"):  # the public classes run these backwards
        layer, inverse = getattr(layer, "prqct", None) or layer.mprqat, not inverse
    if isinstance(layer, PiecewiseRationalQuadraticCDF):
        y, log_det = _run(layer, x, (), inverse)
        return _inside(layer, x, y), log_det
    (context,) = context or (None,)
    if isinstance(layer, Autoregressive):
        if not inverse:
            y, log_det = layer(x, context)
            return _inside(layer, x, y), log_det
        y = torch.zeros_like(x)
        for _ in range(x.shape[1]):
            given = y
            y, log_det = layer._elementwise_inverse(x, layer.autoregressive_net(given, context))
            y = _inside(layer, x, y)
        return y, log_det
    assert isinstance(layer, Coupling)
    own, moved, log_det = x[:, layer.identity_features], x[:, layer.transform_features], 0.0
    through = own
    if layer.unconditional_transform is not None:
        through, log_det = _run_circular(layer.unconditional_transform, own, (), inverse)
    parameters = layer.transform_net(through if inverse else own, context)
    y, step = layer._coupling_transform(moved, parameters, inverse)
    outputs = torch.empty_like(x)
    outputs[:, layer.identity_features] = through
    outputs[:, layer.transform_features] = _inside(layer, moved, y)
    return outputs, log_det + step


def _run_in_float64(run: Callable, layer: nn.Module, x: Tensor, context: tuple, inverse: bool):
    """What runs a layer, in float64 on the CPU; rows that are not finite give NaN and leave the others alone."""

    def widened(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)

    tensors = (*layer.parameters(), *layer.buffers())
    layer = copy.deepcopy(layer, {id(tensor): widened(tensor) for tensor in tensors})  # with a graph to the parameters

    def in_float64(x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = run(layer, widened(x), (widened(own),) if context else (), inverse)
        return y.to(x), log_det.to(x)

    return with_finite_rows(in_float64, x, *context)


def _inside(spline: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y where x lies within the spline's bound, and x elsewhere."""
    return torch.where(x.abs() <= spline.tail_bound, y, x)


def _two_tensors(layer: nn.Module) -> tuple[bool, bool]:
    """Whether a layer takes, and whether it gives, a list of two tensors, in its own forward."""
    from normflows.flows import AffineCoupling, Merge, Split

    if isinstance(layer, AffineCoupling):
        return True, True
    return isinstance(layer, Merge), isinstance(layer, Split) and not isinstance(layer, Merge)


def _has_inverse(layer: nn.Module) -> bool:
    from normflows import flows

    if isinstance(layer, flows.Planar):
        return layer.act == "leaky_relu"
    return type(layer).inverse is not flows.Flow.inverse


def _context_of(layer: nn.Module) -> Width:
    """The context a layer reads. normflows' own take one by signature, but read it only if their network was built so.

    A network built for a context, given none, either fails deep below or, MADE, silently does without.
    """
    from normflows.flows import CCAffineConst, mixing
    from normflows.nets.made import MADE
    from normflows.nets.resnet import ResidualNet

    if isinstance(layer, CCAffineConst):
        return len(layer.s_cc)
    if len(inspect.signature(layer.inverse).parameters) < 2 or type(layer).__module__ == mixing.__name__:
        return None
    networks = [module for module in layer.modules() if isinstance(module, MADE | ResidualNet)]
    if not networks:
        return ...
    contexts = [getattr(network, "context_layer", None) for network in networks if isinstance(network, MADE)]
    widths = [context.in_features for context in contexts if context is not None]
    widths += [network.context_features for network in networks if isinstance(network, ResidualNet)]
    return _one_width(widths)


def _context_of_base(q0: nn.Module) -> Width:
    from normflows.distributions.base import ConditionalDiagGaussian

    if isinstance(q0, ConditionalDiagGaussian):
        first = next(q0.context_encoder.modules(), None)
        while isinstance(first, nn.Sequential):
            first = first[0]
        return first.in_features if isinstance(first, nn.Linear) else ...
    if isinstance(getattr(q0, "num_classes", None), int):
        return q0.num_classes
    foreign = not type(q0).__module__.startswith("normflows.")
    return ... if foreign and len(inspect.signature(q0.log_prob).parameters) > 1 else None


def _one_width(widths: Iterable[Width]) -> Width:
    """What all agree on; a ValueError if two say different numbers."""
    found = dict.fromkeys(width for width in widths if width is not None)
    known = [width for width in found if width is not ...]
    if len(known) > 1:
        raise ValueError(
            f"one context goes to every part of a flow, but they take {' and '.join(map(str, known))} wide"
        )
    return known[0] if known else (... if found else None)


def _channels(steps: list[tuple[nn.Module, bool]]) -> int | None:
    """Size of dimension 1 of the data, as the layers nearest to it know it; ``None`` if none does."""
    from normflows.flows import AffineConstFlow, MaskedAffineFlow, Planar, Squeeze

    scale = 1.0  # from the size at this layer to the size at the data
    for layer, backwards in reversed(steps):
        if isinstance(layer, Squeeze):
            scale *= 4 if backwards else 1 / 4
        for kind, tensor in ((AffineConstFlow, "s"), (MaskedAffineFlow, "b"), (Planar, "w")):
            if isinstance(layer, kind):
                return int(scale * getattr(layer, tensor).shape[1])
        for module in layer.modules():
            if type(module).__module__.startswith("normflows.flows."):
                for name in ("features", "num_channels"):
                    if isinstance(getattr(module, name, None), int):
                        return int(scale * getattr(module, name))
            if type(module).__module__ == "normflows.nets.made" and hasattr(module, "initial_layer"):
                return int(scale * module.initial_layer.in_features)
    return None


def _shape(q0: nn.Module) -> torch.Size:
    """The shape of one draw from a base."""
    for name in ("shape", "ndim", "dim"):
        if hasattr(q0, name):
            shape = getattr(q0, name)
            return torch.Size((shape,) if isinstance(shape, int) else shape)
    return q0(1)[0].shape[1:]


def _data_shape(noise_shape: torch.Size, transform: NormflowsTransform) -> torch.Size:
    """The shape of the data that layers make of noise: of normflows' own layers, only ``Squeeze`` changes it."""
    from normflows.flows import Squeeze

    shape = noise_shape
    for layer, backwards in zip(transform.layers, transform.backwards, strict=True):
        if isinstance(layer, Squeeze):
            c, h, w = shape
            shape = torch.Size((4 * c, h // 2, w // 2) if backwards else (c // 4, 2 * h, 2 * w))
    return shape


def _merged(first: torch.Size, second: torch.Size, merge: nn.Module) -> torch.Size:
    if "checkerboard" in merge.mode:
        return torch.Size((*first[:-1], 2 * first[-1]))
    return torch.Size((first[0] + second[0], *first[1:]))


def _split(noise: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = noise.split([shape.numel() for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _per_row(log_det: Tensor | float, inputs: Tensor) -> Tensor:
    """A log-determinant, whatever its shape, as one number for each input."""
    return torch.as_tensor(log_det, dtype=inputs.dtype, device=inputs.device).expand(inputs.shape[0])


def _like(model: nn.Module) -> Tensor:
    """A tensor of the dtype and device of the layers; of the default ones, if nothing in them has any."""
    return next((p for p in model.flows.parameters() if p.is_floating_point()), torch.empty(0))


def _name(thing) -> str:
    return type(thing).__name__
