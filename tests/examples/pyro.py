"""Pyro's and torch's transforms and distributions."""

from collections.abc import Callable

import pyro.distributions
import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, TransformedDistribution, transforms

from adapters import as_transform
from tests.examples import Example, Model


def decode(exported, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    transform = exported if context is None else exported.condition(context)
    x = transform(noise)
    return x, transform.log_abs_det_jacobian(noise, x)


def _example(*parts: str | tuple) -> Transform:
    """Transforms of Pyro, noise side first, composed as Pyro composes them."""
    made = [_make(part) for part in parts]
    if len(made) == 1:
        return as_transform(made[0])
    if any(_is_conditional(part) for part in made):
        return as_transform(pyro.distributions.conditional.ConditionalComposeTransformModule(made))
    return as_transform(pyro.distributions.torch_transform.ComposeTransformModule(made))


def _is_conditional(part) -> bool:
    return isinstance(part, pyro.distributions.ConditionalTransform)


def _make(part: tuple):
    """``("affine_coupling", 5)``, or ``("inv", …)`` for the inverse of one."""
    name, *arguments = part
    if name == "inv":
        return _make(tuple(arguments)).inv
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    return getattr(pyro.distributions.transforms, name)(*arguments, **options)


def _affine(event_dim: int) -> transforms.Transform:
    loc, scale = nn.Parameter(torch.tensor([0.5, -1.0, 0.0])), nn.Parameter(torch.tensor([0.5, 2.0, -3.0]))
    return transforms.AffineTransform(loc, scale, event_dim)


def _elementwise() -> Transform:
    """ℝ → (0, 1) → ℝ, each coordinate for itself."""
    sigmoid, power = transforms.SigmoidTransform(), transforms.PowerTransform(torch.tensor([0.8, 1.5, 3.0]))
    return as_transform(transforms.ComposeTransform([_affine(0), sigmoid, power, sigmoid.inv]))


def _normal(features: int, trainable: bool = False) -> Distribution:
    loc, scale = torch.linspace(-1, 1, features), torch.linspace(0.5, 1.5, features)
    return pyro.distributions.Normal(*(nn.Parameter(t) if trainable else t for t in (loc, scale))).to_event(1)


def _model(base: Callable[[], Distribution], *parts: tuple):
    made = [_make(part) for part in parts]
    kind = "ConditionalTransformedDistribution" if any(_is_conditional(p) for p in made) else "TransformedDistribution"
    return getattr(pyro.distributions, kind)(base(), made)


def _log_prob(flow, x: Tensor, context: Tensor | None) -> Tensor:
    """What Pyro or torch itself computes; batch dimensions of the distribution belong to the datum."""
    log_prob = (flow if context is None else flow.condition(context)).log_prob(x)
    return log_prob.reshape(len(x), -1).sum(1)


EXAMPLES = {
    "affine": Example(lambda: as_transform(_affine(1)), (3,)),
    "elementwise": Example(_elementwise, (3,)),
    "coupling": Example(lambda: _example(("affine_coupling", 5, [8])), (5,)),
    "coupling-image": Example(lambda: _example(("affine_coupling", (3, 2, 2), [8], None, -3)), (3, 2, 2)),
    "channels": Example(lambda: _example(("generalized_channel_permute", {"channels": 3})), (3, 2, 2)),
    "spline": Example(lambda: _example(("spline", 3)), (3,)),
    "spline-quadratic": Example(lambda: _example(("Spline", 3, 4, 3.0, "quadratic")), (3,)),
    "spline-coupling": Example(lambda: _example(("spline_coupling", 5, 2, [8])), (5,)),
    "autoregressive": Example(lambda: _example(("affine_autoregressive", 3, [8])), (3,)),
    "autoregressive-stable": Example(lambda: _example(("affine_autoregressive", 3, [8], {"stable": True})), (3,)),
    "autoregressive-inverse": Example(lambda: _example(("inv", "affine_autoregressive", 3, [8])), (3,)),
    "autoregressive-spline": Example(lambda: _example(("spline_autoregressive", 3, [8])), (3,)),
    "composed": Example(
        lambda: _example(
            ("leaky_relu",),
            ("affine_coupling", 4, [8]),
            ("permute", 4, torch.tensor([2, 0, 3, 1])),
            ("inv", "spline_coupling", 4, 2, [8]),
            ("householder", 4, 2),
            ("batchnorm", 4),
        ),
        (4,),
    ),
    "conditional-coupling": Example(lambda: _example(("conditional_affine_coupling", 5, 2, [8])), (5,), 2),
    "conditional-spline": Example(lambda: _example(("conditional_spline", 3, 2, [8], 4, 3.0, "quadratic")), (3,), 2),
    "conditional-composed": Example(
        lambda: _example(
            ("inv", "conditional_affine_autoregressive", 3, 2, [8]),
            ("permute", 3, torch.tensor([2, 0, 1])),
            ("conditional_spline_autoregressive", 3, 2, [8]),
            ("conditional_matrix_exponential", 3, 2, [8], 30),
        ),
        (3,),
        2,
    ),
}

MODELS = {
    "torch-elementwise": Model(
        lambda: TransformedDistribution(Normal(torch.zeros(3), torch.ones(3)), [_affine(0)]), _log_prob, (3,)
    ),
    "pyro-coupling": Model(
        lambda: _model(lambda: _normal(4), ("affine_coupling", 4, [8]), ("spline_coupling", 4, 2, [8])), _log_prob, (4,)
    ),
    "pyro-trainable-base": Model(
        lambda: _model(lambda: _normal(3, trainable=True), ("inv", "affine_autoregressive", 3, [8])), _log_prob, (3,)
    ),
    "pyro-planar-inverse": Model(
        lambda: _model(lambda: _normal(3), ("inv", "planar", 3)), _log_prob, (3,), None, False
    ),
    "pyro-conditional": Model(
        lambda: _model(
            lambda: _normal(4),
            ("conditional_affine_coupling", 4, 2, [8]),
            ("permute", 4, torch.tensor([2, 0, 3, 1])),
            ("inv", "conditional_affine_autoregressive", 4, 2, [8]),
        ),
        _log_prob,
        (4,),
        2,
    ),
}
