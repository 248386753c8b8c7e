"""zuko's transforms and flows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters import as_transform
from adapters.catalogue.specification import Specification
from adapters.catalogue.zuko import naf
from adapters.imports import import_zuko
from tests.examples import Example, Model


def decode(exported, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return exported(context).inv.call_and_ladj(noise)


def _lazy(name: str, *arguments, **options) -> Any:
    return getattr(import_zuko().flows, name)(*arguments, **options)


def _spline() -> dict:
    return {"univariate": import_zuko().transforms.MonotonicRQSTransform, "shapes": [(4,), (4,), (3,)]}


def _masked_couplings(context: int) -> Transform:
    mask = torch.tensor([1, 0, 0, 1, 0])
    layers = [_lazy("GeneralCouplingTransform", 5, context, mask=m, hidden_features=(8,)) for m in (mask, 1 - mask)]
    return as_transform(import_zuko().lazy.LazyComposedTransform(*layers))


def _composed() -> Transform:
    """Constant, elementwise and zero log-determinants, an inverted chain, and layers that ignore the context."""
    zuko = import_zuko()
    constant = zuko.lazy.UnconditionalTransform
    turned = zuko.lazy.LazyComposedTransform(
        _lazy("GeneralCouplingTransform", 4, 2, hidden_features=(8,)),
        _lazy("MaskedAutoregressiveTransform", 4, 2, hidden_features=(8,)),
    )
    return as_transform(
        zuko.lazy.LazyComposedTransform(
            constant(zuko.transforms.LULinearTransform, torch.randn(4, 4) + 2 * torch.eye(4)),
            constant(zuko.transforms.PermutationTransform, torch.tensor([2, 0, 3, 1]), buffer=True),
            turned.inv,
            constant(zuko.transforms.RotationTransform, torch.randn(4, 4)),
            constant(zuko.transforms.SoftclipTransform, bound=50.0),
            _lazy("ElementWiseTransform", 4, 2, hidden_features=(8,)),
        )
    )


def _bernstein() -> Transform:
    univariate = partial(import_zuko().transforms.BoundedBernsteinTransform, eps=1e-9)
    layer = _lazy("MaskedAutoregressiveTransform", 3, univariate=univariate, shapes=[(6,)], hidden_features=(8,))
    return as_transform(layer)


def _monotonic() -> Transform:
    return as_transform(naf(Specification(3, 1, (8,), 2, (), "relu")))


def _small_ode(atol: float, rtol: float) -> dict:
    """At zuko's tolerances the inverse is off by 1e-5. None finer than the dtype: its solver would never end."""
    return {"freqs": 1, "hidden_features": (4,), "activation": nn.Tanh, "atol": atol, "rtol": rtol}


def _continuous() -> Transform:
    return as_transform(_lazy("FFJTransform", 2, 1, **_small_ode(1e-11, 1e-10)))


def _continuous_flow() -> nn.Module:
    return _lazy("CNF", 2, **_small_ode(1e-9, 1e-8))


def _image() -> Transform:
    affine = import_zuko().transforms.MonotonicAffineTransform
    return as_transform(
        import_zuko().lazy.UnconditionalTransform(affine, shift=torch.randn(2, 3, 3), scale=torch.randn(2, 3, 3))
    )


def _uncalled() -> Transform:
    """A transform that is no module: its tensors are held as parameters and buffers."""
    transforms = import_zuko().transforms
    return as_transform(
        transforms.ComposedTransform(
            transforms.MonotonicRQSTransform(torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 3)),
            transforms.LULinearTransform(torch.randn(3, 3) + 2 * torch.eye(3)),
            transforms.AdditiveTransform(torch.randn(3, requires_grad=True)),
        )
    )


def _on_gaussian(transform: nn.Module, trainable: bool) -> nn.Module:
    zuko = import_zuko()
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, torch.randn(3), torch.rand(3) + 0.5, buffer=not trainable)
    return zuko.lazy.Flow(transform, base)


def _on_mixture() -> nn.Module:
    layer = _lazy("MaskedAutoregressiveTransform", 3, 2, hidden_features=(8,))
    return import_zuko().lazy.Flow(layer, _lazy("GMM", 3, 2, hidden_features=(8,)))


def _own_log_prob(flow, inputs: Tensor, context: Tensor | None) -> Tensor:
    return flow(context).log_prob(inputs)


def _model(make: Callable, features: int, context_features: int | None = None) -> Model:
    return Model(make, _own_log_prob, (features,), context_features)


EXAMPLES = {
    "coupling": Example(lambda: _masked_couplings(0), (5,)),
    "coupling-context": Example(lambda: _masked_couplings(2), (5,), 2),
    "autoregressive": Example(
        lambda: as_transform(_lazy("MaskedAutoregressiveTransform", 3, hidden_features=(8,))), (3,)
    ),
    "spline-context": Example(
        lambda: as_transform(_lazy("MaskedAutoregressiveTransform", 3, 2, hidden_features=(8,), **_spline())), (3,), 2
    ),
    "one-feature": Example(
        lambda: as_transform(_lazy("MaskedAutoregressiveTransform", 1, 2, hidden_features=(8,), **_spline())), (1,), 2
    ),
    "composed-context": Example(_composed, (4,), 2),
    "bernstein": Example(_bernstein, (3,)),
    "monotonic-context": Example(_monotonic, (3,), 2),
    "continuous-context": Example(_continuous, (2,), 1),
    "image": Example(_image, (2, 3, 3)),
    "uncalled": Example(_uncalled, (3,)),
}

MODELS = {
    "realnvp": _model(lambda: _lazy("RealNVP", 4, hidden_features=(8,)), 4),
    "nsf-context": _model(lambda: _lazy("NSF", 3, 2, hidden_features=(8,)), 3, 2),
    "maf-context": _model(lambda: _lazy("MAF", 4, 2, hidden_features=(8,)), 4, 2),
    "trainable-base": _model(lambda: _on_gaussian(_lazy("NSF", 3, hidden_features=(8,)).transform, True), 3),
    "conditional-base": _model(_on_mixture, 3, 2),
    "mixture": _model(lambda: _lazy("GMM", 3, components=4), 3),
    "continuous": _model(_continuous_flow, 2),
}
