"""Every transform of torch.distributions, Pyro and zuko, and every flow of zuko, found in the packages as installed.

Each is held to the laws, or refused with a reason, or named as no transform: one that is in no table here fails.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from nflows.transforms import InverseNotAvailable
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.transforms import Transform
from torch.testing import assert_close

from adapters import as_flow, as_transform
from adapters.bridges.zuko import import_zuko
from adapters.flow import Flow
from adapters.torch_distributions import Held, TorchBase
from tests.laws import autograd_log_det, batch, context_for, randomise

zuko = import_zuko()
flows, lazy, Z = zuko.flows, zuko.lazy, zuko.transforms
ROWS = 6
SMALL = {"hidden_features": (8,)}


class Case(NamedTuple):
    """A thing of a library, and what it takes.

    Attributes:
        make: makes it.
        shape: of what it takes when it is called: noise for torch and Pyro, data for zuko.
        context: width of the context.
        modes: whether the module is in training, each to be tried.
        free: for data that have more entries than noise: which of them are the coordinates that its density is about.
        exact: how far it may be from its own inverse.
    """

    make: Callable
    shape: tuple[int, ...]
    context: int | None = None
    modes: tuple[bool, ...] = (False, True)
    free: Callable[[Tensor], Tensor] | None = None
    exact: float = 1e-7


class Refused(NamedTuple):
    """A thing that no flow can use, the kind of error and what it says."""

    make: Callable
    error: type
    says: str


class Scores(NamedTuple):
    """A thing of which only the inverse can score, and nothing can sample."""

    make: Callable
    shape: tuple[int, ...]
    context: int | None = None


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def classes(*packages, of: tuple[type, ...]) -> set[str]:
    """Names of the classes of these kinds that the packages define."""
    found = set()
    for package in packages:
        inside = pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}.")
        for module in (package, *(importlib.import_module(each.name) for each in inside)):
            for thing in vars(module).values():
                if isinstance(thing, type) and thing.__module__ == module.__name__ and issubclass(thing, of):
                    found.add(thing.__name__)
    return found


def affine() -> Transform:
    return torch.distributions.AffineTransform(parameter(0.5, -1.0, 0.0), parameter(0.5, 2.0, -3.0), event_dim=1)


def strictly_lower(x: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*x.shape[-2:], -1)
    return x[..., rows, columns]


def lower(x: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*x.shape[-2:])
    return x[..., rows, columns]


TORCH = {
    "_InverseTransform": Case(lambda: affine().inv, (3,)),
    "ComposeTransform": Case(
        lambda: T.ComposeTransform([affine(), T.SigmoidTransform(), T.SigmoidTransform().inv]), (3,)
    ),
    "IndependentTransform": Case(lambda: T.IndependentTransform(affine(), 1), (2, 3)),
    "ReshapeTransform": Case(lambda: T.ReshapeTransform((6,), (2, 3)), (6,)),
    "ExpTransform": Case(T.ExpTransform, (3,)),
    "PowerTransform": Case(lambda: T.PowerTransform(parameter(0.8, 1.5, -2.0)), (3,)),
    "SigmoidTransform": Case(T.SigmoidTransform, (3,)),
    "SoftplusTransform": Case(T.SoftplusTransform, (3,)),
    "TanhTransform": Case(T.TanhTransform, (3,)),
    "AffineTransform": Case(affine, (3,)),
    "CorrCholeskyTransform": Case(T.CorrCholeskyTransform, (6,), free=strictly_lower),
    "StickBreakingTransform": Case(T.StickBreakingTransform, (3,), free=lambda x: x[..., :-1]),
    "CatTransform": Case(lambda: T.CatTransform([affine(), T.ExpTransform()], dim=-1, lengths=[3, 2]), (5,)),
    "StackTransform": Case(lambda: T.StackTransform([affine(), T.ExpTransform()], dim=-2), (2, 3)),
    "CumulativeDistributionTransform": Case(
        lambda: T.CumulativeDistributionTransform(dist.Normal(parameter(0.0, 1.0, 2.0), parameter(1.0, 2.0, 3.0))), (3,)
    ),
    "AbsTransform": Refused(T.AbsTransform, ValueError, "AbsTransform is no bijection"),
    "SoftmaxTransform": Refused(T.SoftmaxTransform, ValueError, "SoftmaxTransform is no bijection"),
    "LowerCholeskyTransform": Refused(T.LowerCholeskyTransform, ValueError, "LowerCholeskyTransform is no bijection"),
    "PositiveDefiniteTransform": Refused(T.PositiveDefiniteTransform, ValueError, "is no bijection"),
    "Transform": Refused(Transform, ValueError, "Transform is no bijection"),
}


def conditioned(make: Callable, width: int = 2) -> Transform:
    """A conditional transform of Pyro's with a context for good."""
    return make().condition(torch.ones(width))


PYRO = {
    "AffineAutoregressive": Case(lambda: T.affine_autoregressive(3, [8]), (3,)),
    "AffineAutoregressive stable": Case(lambda: T.affine_autoregressive(3, [8], stable=True), (3,)),
    "ConditionalAffineAutoregressive": Case(lambda: T.conditional_affine_autoregressive(3, 2, [8]), (3,), 2),
    "AffineCoupling": Case(lambda: T.affine_coupling(4, [8]), (4,)),
    "AffineCoupling of an image": Case(lambda: T.affine_coupling((3, 2, 2), [8], None, -3), (3, 2, 2)),
    "ConditionalAffineCoupling": Case(lambda: T.conditional_affine_coupling(4, 2, [8]), (4,), 2),
    "ConditionalAffineCoupling of an image": Case(
        lambda: T.conditional_affine_coupling((3, 2, 2), 2, [8], None, -3), (3, 2, 2), 2
    ),
    "ELUTransform": Case(T.ELUTransform, (3,)),
    "LeakyReLUTransform": Case(T.LeakyReLUTransform, (3,)),
    # in training it normalises data by the batch at hand, noise by running statistics
    "BatchNorm": Case(lambda: T.BatchNorm(3), (3,), modes=(False,)),
    "BlockAutoregressive": Scores(lambda: T.block_autoregressive(3), (3,)),
    "BlockAutoregressive normal": Scores(lambda: T.block_autoregressive(3, residual="normal"), (3,)),
    "BlockAutoregressive gated": Scores(lambda: T.block_autoregressive(3, residual="gated"), (3,)),
    "BlockAutoregressive ELU": Scores(lambda: T.block_autoregressive(3, activation="ELU"), (3,)),
    "BlockAutoregressive LeakyReLU": Scores(lambda: T.block_autoregressive(3, activation="LeakyReLU"), (3,)),
    "BlockAutoregressive sigmoid": Scores(lambda: T.block_autoregressive(3, activation="sigmoid"), (3,)),
    "CorrLCholeskyTransform": Case(
        T.transforms.CorrLCholeskyTransform if hasattr(T, "transforms") else T.CorrLCholeskyTransform,
        (6,),
        free=strictly_lower,
    ),
    "CholeskyTransform": Case(T.CholeskyTransform, (3, 3), free=lower),
    "CorrMatrixCholeskyTransform": Case(T.CorrMatrixCholeskyTransform, (3, 3), free=strictly_lower),
    "DiscreteCosineTransform": Case(lambda: T.DiscreteCosineTransform(smooth=0.5), (4,)),
    "HaarTransform": Case(T.HaarTransform, (5,)),
    "ConditionedGeneralizedChannelPermute": Case(
        lambda: T.generalized_channel_permute.__globals__["ConditionedGeneralizedChannelPermute"](
            torch.eye(3),
            parameter(*[0.1] * 9).reshape(3, 3).detach(),
            parameter(*[0.1] * 9).reshape(3, 3).detach(),
            parameter(1.0, 2.0, 3.0),
        ),
        (3, 2, 2),
    ),
    "GeneralizedChannelPermute": Case(lambda: T.generalized_channel_permute(channels=3), (3, 2, 2)),
    "ConditionalGeneralizedChannelPermute": Refused(
        lambda: T.conditional_generalized_channel_permute(2, channels=3), ValueError, "no log-determinant for a batch"
    ),
    "ConditionedHouseholder": Case(lambda: conditioned(lambda: T.conditional_householder(3, 2, [8])), (3,)),
    "Householder": Case(lambda: T.householder(4, 2), (4,)),
    "ConditionalHouseholder": Case(lambda: T.conditional_householder(3, 2, [8], 2), (3,), 2),
    "LowerCholeskyAffine": Case(
        lambda: T.LowerCholeskyAffine(
            parameter(0.5, -1.0, 0.0), nn.Parameter(torch.eye(3) + 0.1 * torch.ones(3, 3).tril())
        ),
        (3,),
    ),
    "ConditionedMatrixExponential": Case(
        lambda: conditioned(lambda: T.conditional_matrix_exponential(3, 2, [8], 30)), (3,)
    ),
    "MatrixExponential": Case(lambda: T.matrix_exponential(3, 30), (3,)),
    "ConditionalMatrixExponential": Case(lambda: T.conditional_matrix_exponential(3, 2, [8], 30), (3,), 2),
    "NeuralAutoregressive": Scores(lambda: T.neural_autoregressive(3, [8]), (3,)),
    "ConditionalNeuralAutoregressive": Scores(lambda: T.conditional_neural_autoregressive(3, 2, [8]), (3,), 2),
    "Normalize": Refused(T.Normalize, ValueError, "Normalize is no bijection"),
    "OrderedTransform": Case(T.OrderedTransform, (3,)),
    "Permute": Case(lambda: T.permute(4), (4,)),
    "ConditionedPlanar": Scores(lambda: conditioned(lambda: T.conditional_planar(3, 2, [8])), (3,)),
    "Planar": Scores(lambda: T.planar(3), (3,)),
    "ConditionalPlanar": Scores(lambda: T.conditional_planar(3, 2, [8]), (3,), 2),
    "Polynomial": Scores(lambda: T.polynomial(3, [8]), (3,)),
    "PositivePowerTransform": Case(lambda: T.PositivePowerTransform(parameter(0.8, 1.5, 3.0)), (3,)),
    "ConditionedRadial": Scores(lambda: conditioned(lambda: T.conditional_radial(3, 2, [8])), (3,)),
    "Radial": Scores(lambda: T.radial(3), (3,)),
    "ConditionalRadial": Scores(lambda: T.conditional_radial(3, 2, [8]), (3,), 2),
    "SimplexToOrderedTransform": Case(lambda: T.SimplexToOrderedTransform(), (3,)),
    "SoftplusTransform": Case(T.SoftplusTransform, (3,)),
    "SoftplusLowerCholeskyTransform": Refused(T.SoftplusLowerCholeskyTransform, ValueError, "is no bijection"),
    "ConditionedSpline": Case(lambda: conditioned(lambda: T.conditional_spline(3, 2, [8])), (3,)),
    "Spline": Case(lambda: T.spline(3), (3,)),
    "Spline quadratic": Case(lambda: T.Spline(3, 4, 3.0, "quadratic"), (3,)),
    "ConditionalSpline": Case(lambda: T.conditional_spline(3, 2, [8]), (3,), 2),
    "ConditionalSpline quadratic": Case(lambda: T.conditional_spline(3, 2, [8], 4, 3.0, "quadratic"), (3,), 2),
    "SplineAutoregressive": Case(lambda: T.spline_autoregressive(3, [8]), (3,)),
    "SplineAutoregressive quadratic": Case(lambda: T.spline_autoregressive(3, [8], 4, 3.0, "quadratic"), (3,)),
    "ConditionalSplineAutoregressive": Case(lambda: T.conditional_spline_autoregressive(3, 2, [8]), (3,), 2),
    "SplineCoupling": Case(lambda: T.spline_coupling(4, 2, [8]), (4,)),
    "Sylvester": Refused(lambda: T.sylvester(3).inv, ValueError, "wrong log-determinant"),
    "UnitLowerCholeskyTransform": Refused(T.UnitLowerCholeskyTransform, ValueError, "is no bijection"),
    "ComposeTransformModule": Case(
        lambda: dist.ComposeTransformModule([T.affine_coupling(3, [8]), T.permute(3), T.affine_coupling(3, [8])]), (3,)
    ),
    "ConditionalComposeTransformModule": Case(
        lambda: dist.conditional.ConditionalComposeTransformModule([T.conditional_spline(3, 2, [8]), T.permute(3)]),
        (3,),
        2,
    ),
    "_ConditionalInverseTransformModule": Case(lambda: T.conditional_affine_coupling(3, 2, [8]).inv, (3,), 2),
    "ConstantConditionalTransform": Case(
        lambda: dist.conditional.ConstantConditionalTransform(T.affine_coupling(3, [8])), (3,)
    ),
    "TransformModule": Refused(dist.TransformModule, ValueError, "TransformModule is no bijection"),
}
