"""The whole models of normflows, and their bases."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from nflows.distributions import Distribution
from nflows.transforms import Transform
from normflows import ConditionalNormalizingFlow
from normflows.distributions import UniformGaussian
from normflows.distributions.base import ConditionalDiagGaussian, GaussianPCA
from normflows.flows import Merge
from torch import Tensor, nn

from adapters.bridges.common.context import AnyContextFlow, Width, one_width
from adapters.bridges.common.tensors import like, per_row
from adapters.bridges.normflows_parts.layers import chain, data_shape, single_layers
from adapters.flow import Flow

CONTEXT = "the context of a normflows flow"


def flow_of(model: Any) -> Flow:
    """The flow of a ``NormalizingFlow``, ``ConditionalNormalizingFlow`` or ``ClassCondFlow``."""
    layers, base = single_layers(model.flows), NormflowsBase(model.q0, like(model.flows))
    width = one_width([base.context_features, *(layer.context_features for layer in layers)], CONTEXT)
    if width is ... and not isinstance(model, ConditionalNormalizingFlow):
        width = None  # layers that may take a context, in a model that has none to give
    return _flow(chain(layers, width is not None), base, data_shape(base.shape, layers), width)


def multiscale_flow_of(model: Any) -> Flow:
    """The flow of a ``MultiscaleFlow``. Its noise is that of all levels, flattened, coarsest first."""
    levels = [single_layers(level) for level in model.flows]
    if model.transform is not None:
        levels[-1] += single_layers([model.transform])
    bases = [NormflowsBase(q0, like(model.flows)) for q0 in model.q0]
    shapes = [base.shape for base in bases]
    width = one_width([base.context_features for base in bases], CONTEXT) if model.class_cond else None
    transform = MultiscaleTransform([chain(level, width is not None) for level in levels], model.merges, shapes)
    event_shape = data_shape(shapes[0], levels[0])
    for merge, shape, level in zip(model.merges, shapes[1:], levels[1:], strict=True):
        event_shape = data_shape(_merged(event_shape, shape, merge), level)
    return _flow(transform, MultiscaleBase(bases), event_shape, width)


def _flow(transform: Transform, base: Distribution, event_shape: torch.Size, width: Width) -> Flow:
    if width is ...:
        return AnyContextFlow(transform, base, event_shape, needs_context=True)
    return Flow(transform, base, event_shape, width)


class MultiscaleTransform(Transform):
    """The levels of a ``MultiscaleFlow``: an image ↦ the noise of all levels, flattened, coarsest first.

    nflows' ``MultiscaleCompositeTransform`` is not that: it knows no checkerboards, and lists the finest level first.

    Args:
        levels: the transform of each level, data → noise, coarsest first.
        merges: what joins the data of a level with the noise of the next.
        shapes: the shape of each level's noise.
    """

    keeps_shape = False
    name = "normflows' MultiscaleFlow"

    def __init__(self, levels: Iterable[Transform], merges: Iterable[Merge], shapes: Sequence[torch.Size]):
        super().__init__()
        self.levels: Any = nn.ModuleList(levels)
        self.merges: Any = nn.ModuleList(merges)
        self.shapes = shapes

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, total, noise = inputs, inputs.new_zeros(len(inputs)), []
        for i in range(len(self.levels) - 1, -1, -1):
            outputs, log_det = self.levels[i](outputs, context)
            total = total + log_det
            if i > 0:
                (outputs, split), log_det = self.merges[i - 1].inverse(outputs)
                total = total + per_row(log_det, inputs)
                noise.append(split)
        noise.append(outputs)
        return torch.cat([part.flatten(1) for part in reversed(noise)], dim=1), total

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        coarsest, *others = _split(inputs, self.shapes)
        outputs, total = self.levels[0].inverse(coarsest, context)
        for merge, noise, level in zip(self.merges, others, self.levels[1:], strict=True):
            outputs, log_det = merge([outputs, noise])
            total = total + per_row(log_det, inputs)
            outputs, log_det = level.inverse(outputs, context)
            total = total + log_det
        return outputs, total


class NormflowsBase(Distribution):
    """A base distribution of normflows, with its parameters, which normflows trains unless told otherwise.

    Args:
        q0: the base.
        like: a tensor of the flow's dtype and device; samples come in these (a ``GaussianMixture``'s own are float64).

    Raises:
        ValueError: for ``GaussianPCA``, whose log_prob in normflows is not normalised.
    """

    _like: Tensor

    def __init__(self, q0: Any, like: Tensor):
        super().__init__()
        if isinstance(q0, GaussianPCA):
            raise ValueError("GaussianPCA cannot be a base: normflows' log_prob of it has wrong signs and no logarithm")
        self.q0: Any = q0
        self.is_partly_uniform = isinstance(q0, UniformGaussian)
        self.shape = _shape_of(q0)
        self.context_features = _context_width_of(q0)
        self.register_buffer("_like", like.new_empty(0), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        log_prob = self.q0.log_prob(inputs) if self.context_features is None else self.q0.log_prob(inputs, context)
        log_prob = log_prob.to(inputs.dtype)
        if self.is_partly_uniform:  # normflows overlooks where a uniform density ends
            uniform = self.q0.ind
            half = self.q0.scale[uniform] / 2 * (1 + 16 * torch.finfo(inputs.dtype).eps)  # its own samples are rounded
            log_prob = log_prob.masked_fill((inputs[:, uniform].abs() > half).any(1), -torch.inf)
        return log_prob

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self.sample_and_log_prob(num_samples, context)[0]

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = 1 if context is None else len(context)
        if context is None or self.context_features is None:
            drawn = self.q0(rows * num_samples)
        else:
            drawn = self.q0(rows * num_samples, context.repeat_interleave(num_samples, dim=0))
        samples, log_prob = (values.to(self._like) for values in drawn)
        if context is None:
            return samples, log_prob
        return samples.unflatten(0, (rows, num_samples)), log_prob.unflatten(0, (rows, num_samples))


class MultiscaleBase(Distribution):
    """Independent bases side by side, each flattened, as ``MultiscaleTransform`` lays its noise out."""

    def __init__(self, bases: Sequence[NormflowsBase]):
        super().__init__()
        self.bases: Any = nn.ModuleList(bases)
        self.shapes = [base.shape for base in bases]
        self.shape = torch.Size([sum(shape.numel() for shape in self.shapes)])

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        parts = zip(self.bases, _split(inputs, self.shapes), strict=True)
        return torch.stack([base.log_prob(part, context) for base, part in parts]).sum(0)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = 1 if context is None else 2
        return torch.cat([base.sample(num_samples, context).flatten(leading) for base in self.bases], dim=-1)


def _shape_of(q0: Any) -> torch.Size:
    """The shape of one draw from a base."""
    for name in ("shape", "ndim", "dim"):
        if hasattr(q0, name):
            shape = getattr(q0, name)
            return torch.Size((shape,) if isinstance(shape, int) else shape)
    return q0(1)[0].shape[1:]


def _context_width_of(q0: Any) -> Width:
    """The width of the context that a base reads: of a class-conditional one, how many classes there are."""
    if isinstance(q0, ConditionalDiagGaussian):
        first = next(q0.context_encoder.modules(), None)
        while isinstance(first, nn.Sequential):
            first = first[0]
        return first.in_features if isinstance(first, nn.Linear) else ...
    if isinstance(getattr(q0, "num_classes", None), int):
        return q0.num_classes
    foreign = not type(q0).__module__.startswith("normflows.")
    return ... if foreign and len(inspect.signature(q0.log_prob).parameters) > 1 else None


def _merged(first: torch.Size, second: torch.Size, merge: Any) -> torch.Size:
    if "checkerboard" in merge.mode:
        return torch.Size((*first[:-1], 2 * first[-1]))
    return torch.Size((first[0] + second[0], *first[1:]))


def _split(noise: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = noise.split([shape.numel() for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
