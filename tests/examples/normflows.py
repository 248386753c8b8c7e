"""normflows' layers and models."""

from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters import as_transform
from adapters.networks import MLP
from tests.examples import Example, Model


def decode(exported, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return exported(noise, context)


def _masked() -> list[nn.Module]:
    from normflows import flows

    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return [flows.MaskedAffineFlow(b, t=MLP(4, 4, (8,)), s=MLP(4, 4, (8,))) for b in (mask, 1 - mask)]


def _composite() -> Transform:
    """Layers whose log-determinants are a vector, of no dimension, and in float32."""
    from normflows import flows

    layers = [
        flows.AffineConstFlow(4),
        *_masked(),
        flows.Permute(4, mode="swap"),
        flows.Reverse(flows.LULinearPermute(4)),
        flows.InvertibleAffine(4, use_lu=False),
    ]
    return as_transform(flows.Composite(layers))


def _glow() -> Transform:
    """A Glow block on four channels, between a squeeze and its inverse: an image to an image."""
    from normflows import flows

    block = flows.GlowBlock(4, 8, use_lu=False)
    return as_transform(flows.Composite([flows.Reverse(flows.Squeeze()), block, flows.Squeeze()]))


def _layer(name: str, *arguments, **options) -> Transform:
    from normflows import flows

    return as_transform(getattr(flows, name)(*arguments, **options))


def _model(base: str, *arguments, **options) -> nn.Module:
    import normflows

    return normflows.NormalizingFlow(getattr(normflows.distributions.base, base)(*arguments, **options), _masked())


def _conditional_model() -> nn.Module:
    """A context for the base and for layers of two kinds, and layers that take one only to ignore it."""
    import normflows
    from normflows import flows

    layers = [
        flows.MaskedAffineAutoregressive(4, 8, context_features=2),
        flows.LULinearPermute(4),
        flows.CoupledRationalQuadraticSpline(4, 1, 8, num_context_channels=2),
    ]
    base = normflows.distributions.base.ConditionalDiagGaussian(4, nn.Linear(2, 8))
    return normflows.ConditionalNormalizingFlow(base, layers)


def _class_conditional_model() -> nn.Module:
    import normflows

    return normflows.ClassCondFlow(normflows.distributions.ClassCondDiagGaussian(4, 3), _masked())


def _multiscale_model(classes: int | None = None) -> nn.Module:
    """Two levels of an image of one channel, each squeezed to four."""
    import normflows
    from normflows import flows

    def level(channels: int) -> list[nn.Module]:
        network = nn.Conv2d(channels // 2, channels, 3, padding=1)
        return [flows.Invertible1x1Conv(channels), flows.AffineCouplingBlock(network), flows.Squeeze()]

    bases = [normflows.distributions.GlowBase(shape, classes) for shape in ((8, 1, 1), (2, 2, 2))]
    return normflows.MultiscaleFlow(bases, [level(8), level(4)], [flows.Merge()], class_cond=classes is not None)


def _one_way_model() -> nn.Module:
    """A planar flow turned round: it scores, and cannot sample."""
    import normflows
    from normflows import flows

    layers = [flows.Reverse(flows.Planar(3)), flows.Reverse(flows.Planar(3))]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(3, trainable=False), layers)


def _log_prob(model: Any, inputs: Tensor, context: Tensor | None) -> Tensor:
    """By the library's own method."""
    return model.log_prob(inputs) if context is None else model.log_prob(inputs, context)


EXAMPLES = {
    "composite": Example(_composite, (4,)),
    "planar": Example(lambda: _layer("Planar", 3, act="leaky_relu"), (3,)),
    "maf": Example(lambda: _layer("MaskedAffineAutoregressive", 3, 8), (3,)),
    "maf-context": Example(lambda: _layer("MaskedAffineAutoregressive", 3, 8, context_features=2), (3,), 2),
    "rqs-context": Example(lambda: _layer("CoupledRationalQuadraticSpline", 4, 1, 8, num_context_channels=2), (4,), 2),
    "autoregressive-rqs": Example(lambda: _layer("AutoregressiveRationalQuadraticSpline", 3, 1, 8), (3,)),
    "conv": Example(lambda: _layer("Invertible1x1Conv", 3), (3, 2, 2)),
    "glow": Example(_glow, (1, 4, 4)),
}

MODELS = {
    "NormalizingFlow": Model(lambda: _model("DiagGaussian", 4), _log_prob, (4,)),
    "GaussianMixture": Model(lambda: _model("GaussianMixture", 3, 4), _log_prob, (4,)),
    "ConditionalNormalizingFlow": Model(_conditional_model, _log_prob, (4,), 2),
    "ClassCondFlow": Model(_class_conditional_model, _log_prob, (4,), 3),
    "MultiscaleFlow": Model(_multiscale_model, lambda model, *inputs: model.log_prob(*inputs), (1, 4, 4)),
    "MultiscaleFlow-classes": Model(lambda: _multiscale_model(3), _log_prob, (1, 4, 4), 3),
    "planar": Model(_one_way_model, _log_prob, (3,), samples=False),
}
