"""Every transform of torch.distributions, Pyro and zuko, and every flow of zuko, found in the packages as installed.

Each is held to the laws at random parameters and after some training, or refused with a reason. A class that no table
here names fails by its name.
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
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, transform_to
from torch.testing import assert_close

from adapters import as_flow, as_transform
from adapters.bridges.common.bounds import bounds
from adapters.imports import import_zuko
from tests.laws import (
    assert_rows_apart_both_ways,
    autograd_log_det,
    batch,
    context_for,
    numbers_of_rows,
    randomise,
)

pytestmark = pytest.mark.filterwarnings("ignore:class CorrLCholeskyTransform is deprecated")
zuko = import_zuko()
flows, lazy, Z = zuko.flows, zuko.lazy, zuko.transforms
SMALL = {"hidden_features": (8,)}


class Case(NamedTuple):
    """A transform to hold against the laws.

    Attributes:
        make: makes it.
        shape: of what a call of it takes: noise for torch and Pyro, data for zuko.
        context: width of the context.
        one_way: it runs noise → data only: its inverse scores, and cannot sample.
        modes: whether the module is in training, each to be tried.
        entries: for what has more entries than it has freedom: those of an input that the others follow from, the input
            made of them, and those of an output.
        exact: how closely its inverse and autograd's log-determinant are met.
        rows: how many inputs are tried.
    """

    make: Callable
    shape: tuple[int, ...]
    context: int | None = None
    one_way: bool = False
    modes: tuple[bool, ...] = (False, True)
    entries: tuple[Callable, Callable, Callable] | None = None
    exact: float = 1e-7
    rows: int = 4


class Refused(NamedTuple):
    """A thing that no flow can use, and what the error says."""

    make: Callable
    says: str


one_way = partial(Case, one_way=True)
NO_BIJECTION = "is no bijection, so no flow can use it"


def trained(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def affine(event_dim: int = 1) -> Transform:
    return T.AffineTransform(trained(0.5, -1.0, 0.0), trained(0.5, 2.0, -3.0), event_dim)


def conditioned(make: Callable) -> Transform:
    """A conditional transform with one context for good."""
    return make().condition(torch.ones(2))


def flat(vectors: Tensor) -> Tensor:
    return vectors


def lower(matrices: Tensor, diagonal: int = 0) -> Tensor:
    rows, columns = torch.tril_indices(3, 3, diagonal)
    return matrices[..., rows, columns]


def strictly_lower(matrices: Tensor) -> Tensor:
    return lower(matrices, -1)


def symmetric(entries: Tensor) -> Tensor:
    """The 3 × 3 matrices of these lower triangles."""
    return entries[..., torch.tensor([[0, 1, 3], [1, 2, 4], [3, 4, 5]])]


def correlation(entries: Tensor) -> Tensor:
    """The 3 × 3 matrices of these entries below a diagonal of ones."""
    one = torch.ones_like(entries[..., 0])
    return symmetric(torch.stack([one, entries[..., 0], one, entries[..., 1], entries[..., 2], one], -1))


def channel_permute() -> Transform:
    part = T.generalized_channel_permute(channels=3)
    return type(part).__mro__[1](part.permutation, nn.Parameter(part.LU.detach()))


def autoregressive_spline(order: str) -> Transform:
    widths = [8, 8, 7] if order == "quadratic" else [8, 8, 7, 8]
    return T.SplineAutoregressive(3, AutoRegressiveNN(3, [8], param_dims=widths), order=order)


TORCH = {
    "Transform": Refused(Transform, NO_BIJECTION),
    "_InverseTransform": Case(lambda: affine().inv, (3,)),
    "ComposeTransform": Case(lambda: T.ComposeTransform([affine(0), T.SigmoidTransform(), T.ExpTransform()]), (3,)),
    "IndependentTransform": Case(lambda: T.IndependentTransform(affine(), 1), (2, 3)),
    "ReshapeTransform": Case(lambda: T.ReshapeTransform((6,), (2, 3)), (6,)),
    "ExpTransform": Case(T.ExpTransform, (3,)),
    "PowerTransform": Case(lambda: T.PowerTransform(trained(0.8, 1.5, -2.0)), (3,)),
    "SigmoidTransform": Case(T.SigmoidTransform, (3,)),
    "SoftplusTransform": Case(T.SoftplusTransform, (3,)),
    "TanhTransform": Case(T.TanhTransform, (3,)),
    "AbsTransform": Refused(T.AbsTransform, NO_BIJECTION),
    "AffineTransform": Case(affine, (3,)),
    "CorrCholeskyTransform": Case(T.CorrCholeskyTransform, (3,), entries=(flat, flat, strictly_lower)),
    "SoftmaxTransform": Refused(T.SoftmaxTransform, NO_BIJECTION),
    "StickBreakingTransform": Case(T.StickBreakingTransform, (3,), entries=(flat, flat, lambda x: x[..., :-1])),
    "LowerCholeskyTransform": Refused(T.LowerCholeskyTransform, NO_BIJECTION),
    "PositiveDefiniteTransform": Refused(T.PositiveDefiniteTransform, NO_BIJECTION),
    "CatTransform": Case(lambda: T.CatTransform([affine(0), T.ExpTransform()], dim=-1, lengths=[3, 2]), (5,)),
    "StackTransform": Case(lambda: T.StackTransform([affine(0), T.ExpTransform()], dim=-1), (3, 2)),
    "CumulativeDistributionTransform": Case(
        lambda: T.CumulativeDistributionTransform(dist.Normal(trained(0.0, 1.0, 2.0), trained(1.0, 2.0, 3.0))), (3,)
    ),
}

# by the class's name, and what is special about it
PYRO = {
    "AffineAutoregressive": Case(lambda: T.affine_autoregressive(3, [8]), (3,)),
    "AffineAutoregressive stable": Case(lambda: T.affine_autoregressive(3, [8], stable=True), (3,)),
    "ConditionalAffineAutoregressive": Case(lambda: T.conditional_affine_autoregressive(3, 2, [8]), (3,), 2),
    "AffineCoupling": Case(lambda: T.affine_coupling(4, [8]), (4,)),
    "AffineCoupling image": Case(lambda: T.affine_coupling((3, 2, 2), [8], None, -3), (3, 2, 2)),
    "ConditionalAffineCoupling": Case(lambda: T.conditional_affine_coupling(4, 2, [8]), (4,), 2),
    "ConditionalAffineCoupling image": Case(
        lambda: T.conditional_affine_coupling((3, 2, 2), 2, [8], None, -3), (3, 2, 2), 2
    ),
    "ELUTransform": Case(T.ELUTransform, (3,)),
    "LeakyReLUTransform": Case(T.LeakyReLUTransform, (3,)),
    # in training it normalises data by the batch at hand, and noise by running statistics
    "BatchNorm": Case(lambda: T.BatchNorm(3), (3,), modes=(False,)),
    "BlockAutoregressive": one_way(lambda: T.block_autoregressive(3), (3,)),
    "BlockAutoregressive normal": one_way(lambda: T.block_autoregressive(3, residual="normal"), (3,)),
    "BlockAutoregressive gated": one_way(lambda: T.block_autoregressive(3, residual="gated"), (3,)),
    "BlockAutoregressive ELU": one_way(lambda: T.block_autoregressive(3, activation="ELU"), (3,)),
    "BlockAutoregressive LeakyReLU": one_way(lambda: T.block_autoregressive(3, activation="LeakyReLU"), (3,)),
    "BlockAutoregressive sigmoid": one_way(lambda: T.block_autoregressive(3, activation="sigmoid"), (3,)),
    "CorrLCholeskyTransform": Case(T.CorrLCholeskyTransform, (3,), entries=(flat, flat, strictly_lower)),
    "CholeskyTransform": Case(T.CholeskyTransform, (3, 3), entries=(lower, symmetric, lower)),
    "CorrMatrixCholeskyTransform": Case(
        T.CorrMatrixCholeskyTransform, (3, 3), entries=(strictly_lower, correlation, strictly_lower)
    ),
    "DiscreteCosineTransform": Case(lambda: T.DiscreteCosineTransform(smooth=0.5), (4,)),
    "HaarTransform": Case(T.HaarTransform, (5,)),
    "ConditionedGeneralizedChannelPermute": Case(channel_permute, (3, 2, 2)),
    "GeneralizedChannelPermute": Case(lambda: T.generalized_channel_permute(channels=3), (3, 2, 2)),
    "ConditionalGeneralizedChannelPermute": Refused(
        lambda: T.conditional_generalized_channel_permute(2, channels=3), "no log-determinant for a batch of contexts"
    ),
    "ConditionedHouseholder": Case(lambda: conditioned(lambda: T.conditional_householder(3, 2, [8])), (3,)),
    "Householder": Case(lambda: T.householder(4, 2), (4,)),
    "ConditionalHouseholder": Case(lambda: T.conditional_householder(3, 2, [8], 2), (3,), 2),
    "LowerCholeskyAffine": Case(
        lambda: T.LowerCholeskyAffine(trained(0.5, -1.0, 0.0), nn.Parameter(symmetric(torch.arange(1.0, 7.0)).tril())),
        (3,),
    ),
    "ConditionedMatrixExponential": Refused(
        lambda: conditioned(lambda: T.conditional_matrix_exponential(3, 2, [8])), "what is trained inside a function"
    ),
    "MatrixExponential": Case(lambda: T.matrix_exponential(3, 30), (3,)),
    "ConditionalMatrixExponential": Case(lambda: T.conditional_matrix_exponential(3, 2, [8], 30), (3,), 2),
    "NeuralAutoregressive": one_way(lambda: T.neural_autoregressive(3, [8]), (3,)),
    "NeuralAutoregressive ELU": one_way(lambda: T.neural_autoregressive(3, [8], "ELU"), (3,)),
    "NeuralAutoregressive LeakyReLU": one_way(lambda: T.neural_autoregressive(3, [8], "LeakyReLU"), (3,)),
    "NeuralAutoregressive tanh": one_way(lambda: T.neural_autoregressive(3, [8], "tanh"), (3,)),
    "ConditionalNeuralAutoregressive": one_way(lambda: T.conditional_neural_autoregressive(3, 2, [8]), (3,), 2),
    "Normalize": Refused(T.Normalize, NO_BIJECTION),
    "OrderedTransform": Case(T.OrderedTransform, (3,)),
    "Permute": Case(lambda: T.permute(4), (4,)),
    "ConditionedPlanar": one_way(lambda: conditioned(lambda: T.conditional_planar(3, 2, [8])), (3,)),
    "Planar": one_way(lambda: T.planar(3), (3,)),
    "ConditionalPlanar": one_way(lambda: T.conditional_planar(3, 2, [8]), (3,), 2),
    "Polynomial": one_way(lambda: T.polynomial(3, [8]), (3,)),
    "PositivePowerTransform": Case(lambda: T.PositivePowerTransform(trained(0.8, 1.5, 3.0)), (3,)),
    "ConditionedRadial": one_way(lambda: conditioned(lambda: T.conditional_radial(3, 2, [8])), (3,)),
    "Radial": one_way(lambda: T.radial(3), (3,)),
    "ConditionalRadial": one_way(lambda: T.conditional_radial(3, 2, [8]), (3,), 2),
    "SimplexToOrderedTransform": Refused(T.SimplexToOrderedTransform, NO_BIJECTION),
    "SoftplusTransform": Case(T.SoftplusTransform, (3,)),
    "SoftplusLowerCholeskyTransform": Refused(T.SoftplusLowerCholeskyTransform, NO_BIJECTION),
    "ConditionedSpline": Case(lambda: conditioned(lambda: T.conditional_spline(3, 2, [8])), (3,)),
    "Spline": Case(lambda: T.spline(3), (3,)),
    "Spline quadratic": Case(lambda: T.Spline(3, 4, 3.0, "quadratic"), (3,)),
    "ConditionalSpline": Case(lambda: T.conditional_spline(3, 2, [8]), (3,), 2),
    "ConditionalSpline quadratic": Case(lambda: T.conditional_spline(3, 2, [8], 4, 3.0, "quadratic"), (3,), 2),
    "SplineAutoregressive": Case(lambda: autoregressive_spline("linear"), (3,)),
    "SplineAutoregressive quadratic": Case(lambda: autoregressive_spline("quadratic"), (3,)),
    "ConditionalSplineAutoregressive": Case(lambda: T.conditional_spline_autoregressive(3, 2, [8]), (3,), 2),
    "SplineCoupling": Case(lambda: T.spline_coupling(4, 2, [8]), (4,)),
    "Sylvester": Refused(lambda: T.sylvester(3).inv, "wrong log-determinant in Pyro"),
    "UnitLowerCholeskyTransform": Refused(T.UnitLowerCholeskyTransform, NO_BIJECTION),
    "TransformModule": Refused(dist.TransformModule, NO_BIJECTION),
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
}
PYRO_ABSTRACT = {"ConditionalTransform", "ConditionalTransformModule"}


def constant(name: str, *shapes: tuple[int, ...], **options) -> Callable:
    """A transform of zuko's, of random parameters of these shapes."""
    return lambda: lazy.UnconditionalTransform(getattr(Z, name), *map(torch.randn, shapes), **options)


def square(name: str) -> Callable:
    return lambda: lazy.UnconditionalTransform(getattr(Z, name), torch.randn(3, 3) + 2 * torch.eye(3))


def masked(features: int = 3, context: int = 0, **options) -> nn.Module:
    return flows.MaskedAutoregressiveTransform(features, context, **SMALL, **options)


def monotonic(kind: str, shapes: list) -> nn.Module:
    return masked(univariate=getattr(flows.neural, kind)(signal=4, stack=3, **SMALL), shapes=shapes)


def continuous(context: int = 0, **options) -> nn.Module:
    options = {"freqs": 1, "hidden_features": (4,), "activation": nn.Tanh, "atol": 1e-7, "rtol": 1e-6, **options}
    return flows.FFJTransform(2, context, **options)


def composed() -> nn.Module:
    parts = [constant("SoftclipTransform", bound=5.0)(), masked(), square("LULinearTransform")()]
    return lazy.LazyComposedTransform(*parts)


TIGHT = {"eps": 1e-12}  # of bisections, which zuko leaves off by 1e-6

ZUKO = {
    "LazyInverse": Case(lambda: masked().inv, (3,)),
    "LazyComposedTransform": Case(composed, (3,)),
    "UnconditionalTransform": Case(constant("AdditiveTransform", (3,)), (3,)),
    "MaskedAutoregressiveTransform": Case(masked, (3,)),
    "MaskedAutoregressiveTransform context": Case(lambda: masked(4, 2, passes=2), (4,), 2),
    "MaskedAutoregressiveTransform MNN": Case(lambda: monotonic("MNN", [(4,)]), (3,), exact=1e-5),
    "MaskedAutoregressiveTransform UMNN": Case(lambda: monotonic("UMNN", [(4,), ()]), (3,), exact=1e-5),
    "GeneralCouplingTransform": Case(lambda: flows.GeneralCouplingTransform(4, **SMALL), (4,)),
    "GeneralCouplingTransform context": Case(lambda: flows.GeneralCouplingTransform(3, 2, **SMALL), (3,), 2),
    "ElementWiseTransform": Case(lambda: flows.ElementWiseTransform(3), (3,)),
    "ElementWiseTransform context": Case(lambda: flows.ElementWiseTransform(3, 2, **SMALL), (3,), 2),
    "FFJTransform": Case(continuous, (2,)),
    "FFJTransform random": Refused(
        lambda: continuous(exact=False), "the log-determinant of this transform is a random"
    ),
    "ComposedTransform": Case(
        lambda: Z.ComposedTransform(Z.SinTransform(), Z.AdditiveTransform(trained(0.1, 0.2))), (2,)
    ),
    "DependentTransform": Case(lambda: Z.DependentTransform(Z.AdditiveTransform(trained(0.1, 0.2)), 1), (2,)),
    "IdentityTransform": Case(constant("IdentityTransform"), (3,)),
    "CosTransform": Case(constant("CosTransform"), (3,)),
    "SinTransform": Case(constant("SinTransform"), (3,)),
    "SoftclipTransform": Case(constant("SoftclipTransform", bound=2.0), (3,)),
    "CircularShiftTransform": Case(constant("CircularShiftTransform", bound=2.0), (3,)),
    "SignedPowerTransform": Case(constant("SignedPowerTransform", (3,)), (3,)),
    "AdditiveTransform": Case(constant("AdditiveTransform", (3,)), (3,)),
    "MonotonicAffineTransform": Case(constant("MonotonicAffineTransform", (3,), (3,)), (3,)),
    "MonotonicRQSTransform": Case(constant("MonotonicRQSTransform", (3, 4), (3, 4), (3, 3)), (3,)),
    "MonotonicTransform": Case(lambda: Z.MonotonicTransform(torch.sinh, **TIGHT), (3,)),
    "BernsteinTransform": Case(constant("BernsteinTransform", (3, 6), **TIGHT), (3,)),
    "BoundedBernsteinTransform": Case(constant("BoundedBernsteinTransform", (3, 6), **TIGHT), (3,)),
    "GaussianizationTransform": Case(constant("GaussianizationTransform", (3, 6), (3, 6), **TIGHT), (3,)),
    "UnconstrainedMonotonicTransform": Case(lambda: Z.UnconstrainedMonotonicTransform(torch.cosh, **TIGHT), (3,)),
    "SOSPolynomialTransform": Case(constant("SOSPolynomialTransform", (3, 2, 4), **TIGHT), (3,)),
    "AutoregressiveTransform": Case(lambda: masked()(), (3,)),
    "CouplingTransform": Case(lambda: flows.GeneralCouplingTransform(4, **SMALL)(), (4,)),
    "FreeFormJacobianTransform": Case(lambda: continuous()(), (2,), modes=(False,), exact=1e-4, rows=1),
    "PermutationTransform": Case(lambda: Z.PermutationTransform(torch.tensor([2, 0, 1])), (3,)),
    "RotationTransform": Case(square("RotationTransform"), (3,)),
    "LULinearTransform": Case(square("LULinearTransform"), (3,)),
}

ZUKO_FLOWS = {
    "NICE": lambda **options: flows.NICE(2, **SMALL, **options),
    "RealNVP": lambda **options: flows.RealNVP(2, **SMALL, **options),
    "MAF": lambda **options: flows.MAF(2, **SMALL, **options),
    "NSF": lambda **options: flows.NSF(2, **SMALL, **options),
    "NCSF": lambda **options: flows.NCSF(2, **SMALL, **options),
    "SOSPF": lambda **options: flows.SOSPF(2, **SMALL, **options),
    "BPF": lambda **options: flows.BPF(2, **SMALL, **options),
    "NAF": lambda **options: flows.NAF(2, network=SMALL, **SMALL, **options),
    "UNAF": lambda **options: flows.UNAF(2, network=SMALL, **SMALL, **options),
    "GF": lambda **options: flows.GF(2, **options),
    "CNF": lambda **options: flows.CNF(2, freqs=1, hidden_features=(4,), activation=nn.Tanh, **options),
    "GMM": lambda **options: flows.GMM(2, **options),
}
# they do not reach all noise: there, a sample is NaN, and their densities integrate to what is left
PARTIAL = ("SOSPF", "NAF", "UNAF", "GF")
ZUKO_ABSTRACT = {"LazyTransform", "LazyDistribution", "Flow", "UnconditionalDistribution"}


def defined(*packages, of: tuple[type, ...]) -> set[str]:
    """The names of the classes of these kinds that the packages define, in all their modules."""
    found = set()
    for package in packages:
        inside = pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}.")
        for module in (package, *(importlib.import_module(each.name) for each in inside)):
            kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, of))
            found |= {kind.__qualname__ for kind in kinds if kind.__module__ == module.__name__}
    return found


def named(table: dict) -> set[str]:
    return {name.partition(" ")[0] for name in table}


def test_every_class_of_the_libraries_is_in_a_table():
    conditional = dist.conditional
    assert named(TORCH) == defined(torch.distributions.transforms, of=(Transform,))
    kinds = Transform, conditional.ConditionalTransform
    assert named(PYRO) | PYRO_ABSTRACT == defined(T, conditional, dist.torch_transform, of=kinds)
    kinds = Transform, lazy.LazyTransform, lazy.LazyDistribution
    assert named(ZUKO) | set(ZUKO_FLOWS) | ZUKO_ABSTRACT == defined(zuko, of=kinds)


CASES = {
    f"{library} {name}": case
    for library, table in (("torch", TORCH), ("pyro", PYRO), ("zuko", ZUKO))
    for name, case in table.items()
}
WORKING = [name for name, case in CASES.items() if isinstance(case, Case)]


class Made:
    """A case's transform in float64 (``transform``), made of the library's own (``native``).

    ``call`` runs it in the direction in which the library calls its own, and ``back`` in the other.
    """

    def __init__(self, name: str):
        self.case, torch_like = CASES[name], not name.startswith("zuko")
        torch.manual_seed(0)
        self.native = self.case.make()
        self.transform = as_transform(self.native.inv if self.case.one_way else self.native).double()
        both = self.transform.forward, self.transform.inverse
        self.call, self.back = reversed(both) if torch_like and not self.case.one_way else both

    def itself(self, context: Tensor | None):
        """The library's own transform, called as the library does."""
        if isinstance(self.native, lazy.LazyTransform):
            return self.native(context)
        return self.native.condition(context) if isinstance(self.native, dist.ConditionalTransform) else self.native

    def inputs(self, rows: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Values within its domain, and a context."""
        context = context_for(self.case.context, rows)
        onto = transform_to(self.itself(context).domain)
        return onto(batch(*onto.inverse_shape((rows, *self.case.shape)), seed=seed)), context

    def train(self, steps: int = 10) -> None:
        """By maximum likelihood, on data of its own."""
        values, context = self.inputs(8 * self.case.rows, seed=7)
        parameters = [parameter for parameter in self.transform.parameters() if parameter.requires_grad]
        if not parameters:
            return
        self.transform.train(self.case.modes[-1])
        with torch.no_grad():
            data = values if self.call == self.transform.forward else self.call(values, context)[0]
        optimiser = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(steps):
            optimiser.zero_grad()
            noise, log_det = self.transform(data, context)
            (0.5 * noise.flatten(1).square().sum(1) - log_det).mean().backward()
            optimiser.step()


def check_laws(made: Made) -> None:
    case, transform = made.case, made.transform
    for mode in case.modes:
        transform.train(mode)
        values, context = made.inputs(case.rows, seed=3)
        before = values.clone()
        outputs, log_det = made.call(values, context)
        assert torch.equal(values, before) and log_det.shape == (case.rows,) and log_det.dtype == torch.float64
        if case.one_way:
            with pytest.raises(InverseNotAvailable, match="has no inverse, so this flow cannot sample"):
                made.back(outputs, context)
        else:
            before = outputs.clone()
            again, log_det_back = made.back(outputs, context)
            assert torch.equal(outputs, before)
            assert_close(again, values, atol=case.exact, rtol=case.exact)
            assert_close(log_det_back, -log_det, atol=10 * case.exact, rtol=case.exact)
        if case.entries is not None:
            take, fill, pick = case.entries
            expected = autograd_log_det(lambda v, c: (pick(made.call(fill(v), c)[0]), None), take(values), context)  # noqa: B023
            assert_close(log_det, expected, atol=1e-6, rtol=1e-6)
            continue
        assert_close(log_det, autograd_log_det(made.call, values, context), atol=10 * case.exact, rtol=1e-6)
        if not case.one_way:
            expected = autograd_log_det(made.back, outputs.detach(), context)
            assert_close(log_det_back, expected, atol=10 * case.exact, rtol=1e-6)


@pytest.mark.parametrize("name", WORKING)
def test_laws_at_random_parameters_and_after_training(name):
    made = Made(name)
    values, context = made.inputs(made.case.rows, seed=3)
    assert_close(made.call(values, context)[0], made.itself(context)(values))
    randomise(made.transform, scale=0.2)
    check_laws(made)
    made.train()
    check_laws(made)


# an adaptive solver's steps depend on the whole batch
@pytest.mark.parametrize("name", [name for name in WORKING if "FFJ" not in name and "FreeForm" not in name])
@torch.no_grad()
def test_rows_are_apart(name):
    made = Made(name)
    randomise(made.transform, scale=0.2).eval()
    for rows in numbers_of_rows(made.inputs(1, seed=3)[0].shape[1:]):
        values, context = made.inputs(rows, seed=3)
        back = None if made.case.one_way else made.back
        assert_rows_apart_both_ways(made.call, back, values, context, 1e-5)


def test_some_transforms_train():
    """Else the sweep after training would say nothing."""
    assert sum(any(True for _ in Made(name).transform.parameters()) for name in WORKING) > 50


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Refused)])
def test_what_no_flow_can_use_is_refused(name):
    with pytest.raises(ValueError, match=CASES[name].says):
        as_transform(CASES[name].make())


@pytest.mark.parametrize("name", [name for name in WORKING if CASES[name].one_way])
def test_one_way_transforms_are_refused_the_way_they_run(name):
    with pytest.raises(InverseNotAvailable, match="runs noise → data only and cannot score"):
        as_transform(CASES[name].make())


@pytest.mark.parametrize("name", WORKING)
def test_beyond_the_bounds_there_is_no_density_and_no_datum(name):
    """Of data beyond where a transform's data can be; and noise beyond where its noise can be has no datum."""
    made = Made(name)
    values, context = made.inputs(4, seed=3)
    outputs, _ = made.call(values, context)
    itself = made.itself(context)
    for function, inside, domain in ((made.call, values, itself.domain), (made.back, outputs, itself.codomain)):
        expected, expected_log_det = (None, None) if made.case.one_way else function(inside, context)
        for limit, direction in zip(bounds(domain) or (), (-1.5, 1.5), strict=False):
            if limit is None:
                continue
            outside = inside.detach().clone()
            outside[1] = limit + direction
            got, log_det = function(outside, context)
            if function == made.transform.forward:
                assert log_det[1] == -torch.inf and got[1].isfinite().all()
            else:
                assert got[1].isnan().all() and log_det[1].isnan()
            kept = [0, 2, 3]  # the other rows
            assert_close((got[kept], log_det[kept]), (expected[kept], expected_log_det[kept]))


# -- whole flows of zuko -----------------------------------------------------------------------------------------------


def mass(flow, points: int = 161) -> float:
    """∫p over the plane up to 100, by the midpoint rule in u where x = sinh u."""
    width = 11.0 / points
    u = torch.linspace(-5.5 + width / 2, 5.5 - width / 2, points, dtype=torch.float64)
    x, density = torch.cartesian_prod(u.sinh(), u.sinh()), torch.cartesian_prod(u.cosh(), u.cosh()).prod(1)
    with torch.no_grad():
        return (flow.log_prob(x).exp() * density).sum().item() * width**2


def trained_flow(name: str):
    torch.manual_seed(0)
    flow = randomise(as_flow(ZUKO_FLOWS[name]()), scale=0.05)
    data = batch(256, 2, seed=4) * torch.tensor([0.5, 0.8]) + torch.tensor([0.3, -0.2])
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(10):
        optimiser.zero_grad()
        flow.log_prob(data).mean().neg().backward()
        optimiser.step()
    return flow


@pytest.mark.parametrize("name", ZUKO_FLOWS)
def test_a_flow_of_zuko_is_normalised_and_scores_its_samples(name):
    flow = trained_flow(name)
    for mode in (False, True):
        flow.train(mode)
        with torch.no_grad():
            samples, log_prob = flow.sample_and_log_prob(1000)
            reached = ~samples.isnan().any(1)
            again = flow.log_prob(samples[reached])
        assert_close(again, log_prob[reached], atol=1e-4, rtol=1e-4)
        assert name in PARTIAL or reached.all()
    total = reached.double().mean().item()
    assert abs(mass(flow) - total) < (0.06 if name in PARTIAL else 0.01)
