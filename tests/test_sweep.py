"""Every layer class of FrEIA, normflows and nflows: held to the laws, or refused, or named as no layer.

The classes are read off the installed packages, so that one that nobody lists fails by its name. Each layer is tried
at random parameters and again after some training steps, in train and in eval mode, in both directions, in float64.
"""

import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from nflows import transforms
from nflows.distributions import Distribution
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import nonlinearities, standard
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import FlowDistribution, as_flow, as_transform
from adapters.networks import MLP
from tests.laws import (
    assert_inputs_unchanged,
    assert_rows_apart_both_ways,
    autograd_log_det,
    batch,
    context_for,
    numbers_of_rows,
    randomise,
)

ROWS = 6
IMAGE = (2, 2, 2)
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0])


class Layer(NamedTuple):
    """A layer that the laws hold for.

    Attributes:
        make: makes the library's own layer.
        event_shape: of one datum.
        context_features: width of the context; ``None`` for none.
        data, noise: from ℝ to where each coordinate of the data and of the noise may lie.
        scores_only: whether it has no direction noise → data.
        needs_eval: whether in train mode it depends on the whole batch, or changes.
        tolerance: of every comparison, coarser where the library keeps something in float32.
    """

    make: Callable[[], nn.Module]
    event_shape: tuple[int, ...] = (4,)
    context_features: int | None = None
    data: Callable[[Tensor], Tensor] = torch.Tensor.clone
    noise: Callable[[Tensor], Tensor] = torch.Tensor.clone
    scores_only: bool = False
    needs_eval: bool = False
    tolerance: float = 1e-7


class Refused(NamedTuple):
    """A layer that no flow can use, and what is said about it."""

    make: Callable[[], nn.Module]
    message: str
    error: type = ValueError


def image_network(in_features: int, out_features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_features, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, out_features, 3, padding=1))


# FrEIA


def freia_make(name: str, event_shape=(4,), condition=None, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from FrEIA import modules

        dims_c = {} if condition is None else {"dims_c": [condition]}
        return getattr(modules, name)([event_shape], **dims_c, **options)

    return make


def freia(name: str, event_shape=(4,), condition=None, laws=None, **options) -> Layer:
    width = None if condition is None else torch.Size(condition).numel()
    return Layer(freia_make(name, event_shape, condition, **options), event_shape, width, **laws or {})


def freia_network(build: Callable[[object], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build(importlib.import_module("FrEIA.framework"))


def sequence(framework, kind: str = "SequenceINN") -> nn.Module:
    """Blocks that are wrong by themselves, a conditional one, and one within another network."""
    from FrEIA import modules

    inner = framework.SequenceINN(4, force_tuple_output=True)
    inner.append(modules.LearnedElementwiseScaling)
    network = getattr(framework, kind)(4)
    network.append(modules.GLOWCouplingBlock, cond=1, cond_shape=(2,), subnet_constructor=MLP)
    network.append(lambda dims_in: inner)
    network.append(modules.ActNorm)
    network.append(modules.NICECouplingBlock, cond=0, cond_shape=(1,), subnet_constructor=MLP)
    network.append(modules.Reshape, output_dims=(4, 1, 1))
    network.append(modules.HaarUpsampling)
    return network


def graph(framework, kind: str = "GraphINN") -> nn.Module:
    """A branch that is split off, goes through blocks that are wrong by themselves, and is joined again."""
    from FrEIA import modules

    nodes = [framework.InputNode(4), framework.ConditionNode(3)]
    nodes.append(framework.Node(nodes[0], modules.LearnedElementwiseScaling, {}))
    nodes.append(framework.Node(nodes[-1], modules.Split, {}))
    split = nodes[-1]
    nodes.append(framework.Node(split.out0, modules.OrthogonalTransform, {}))
    nodes.append(framework.Node(nodes[-1], modules.GINCouplingBlock, {"subnet_constructor": MLP}, conditions=nodes[1]))
    nodes.append(framework.Node([split.out1, nodes[-1].out0], modules.Concat, {}))
    return getattr(framework, kind)([*nodes, framework.OutputNode(nodes[-1])], verbose=False)


COUPLING = {"subnet_constructor": MLP}
IMAGE_COUPLING = {"event_shape": IMAGE, "subnet_constructor": image_network}
MATRIX = torch.tensor([[2.0, 1.0], [0.3, -1.0]])
IN_FLOAT32 = {"tolerance": 1e-5}
FREIA = {
    "InvertibleModule": "the parent of all blocks",
    "_BaseCouplingBlock": "the parent of the couplings",
    "AllInOneBlock": [
        freia("AllInOneBlock", **COUPLING),
        freia("AllInOneBlock", **IMAGE_COUPLING),
        freia("AllInOneBlock", condition=(2,), reverse_permutation=True, **COUPLING),
        freia("AllInOneBlock", learned_householder_permutation=3, **COUPLING),
        freia("AllInOneBlock", learned_householder_permutation=2, reverse_permutation=True, **IMAGE_COUPLING),
        freia("AllInOneBlock", permute_soft=True, global_affine_type="SIGMOID", laws=IN_FLOAT32, **COUPLING),
        freia("AllInOneBlock", gin_block=True, global_affine_type="EXP", **COUPLING),
    ],
    "NICECouplingBlock": [freia("NICECouplingBlock", **COUPLING), freia("NICECouplingBlock", **IMAGE_COUPLING)],
    "RNVPCouplingBlock": [freia("RNVPCouplingBlock", **COUPLING), freia("RNVPCouplingBlock", **IMAGE_COUPLING)],
    "GLOWCouplingBlock": [
        freia("GLOWCouplingBlock", condition=(2,), clamp_activation="TANH", **COUPLING),
        freia("GLOWCouplingBlock", clamp_activation="SIGMOID", split_len=1, **COUPLING),
        freia("GLOWCouplingBlock", **IMAGE_COUPLING),
    ],
    "GINCouplingBlock": [
        freia("GINCouplingBlock", **COUPLING),
        freia("GINCouplingBlock", (4, 2, 2), subnet_constructor=image_network),
    ],
    "AffineCouplingOneSided": [
        freia("AffineCouplingOneSided", condition=(2,), **COUPLING),
        freia("AffineCouplingOneSided", **IMAGE_COUPLING),
    ],
    "ConditionalAffineTransform": [freia("ConditionalAffineTransform", condition=(2,), **COUPLING)],
    "ActNorm": [freia("ActNorm"), freia("ActNorm", IMAGE)],
    "InvAutoAct": [freia("InvAutoAct"), freia("InvAutoAct", IMAGE)],
    "InvAutoActFixed": [freia("InvAutoActFixed")],
    "InvAutoActTwoSided": [freia("InvAutoActTwoSided"), freia("InvAutoActTwoSided", IMAGE)],
    "LearnedElementwiseScaling": [freia("LearnedElementwiseScaling"), freia("LearnedElementwiseScaling", IMAGE)],
    "OrthogonalTransform": [
        freia("OrthogonalTransform"),
        # in train mode each backward pass, the Jacobian's too, may project its matrix
        freia("OrthogonalTransform", correction_interval=4, laws={"needs_eval": True}),
    ],
    "HouseholderPerm": [
        freia("HouseholderPerm", n_reflections=2),
        freia("HouseholderPerm", n_reflections=3),
        freia("HouseholderPerm", n_reflections=4, fixed=True, laws=IN_FLOAT32),
        Refused(freia_make("HouseholderPerm", condition=(4, 2), n_reflections=2), "with a condition fails in FrEIA"),
    ],
    "PermuteRandom": [freia("PermuteRandom"), freia("PermuteRandom", IMAGE)],
    "FixedLinearTransform": [freia("FixedLinearTransform", (2,), M=MATRIX, b=torch.ones(2), laws=IN_FLOAT32)],
    "Fixed1x1Conv": [freia("Fixed1x1Conv", IMAGE, M=MATRIX, laws=IN_FLOAT32)],
    "InvertibleSigmoid": [freia("InvertibleSigmoid", shape, laws={"noise": torch.sigmoid}) for shape in ((4,), IMAGE)],
    "Flatten": [freia("Flatten", IMAGE)],
    "Reshape": [freia("Reshape", IMAGE, output_dims=(4, 2))],
    "IRevNetDownsampling": [freia("IRevNetDownsampling", IMAGE, legacy_backend=legacy) for legacy in (False, True)],
    "IRevNetUpsampling": [freia("IRevNetUpsampling", (8, 1, 1), legacy_backend=legacy) for legacy in (False, True)],
    "HaarDownsampling": [
        freia("HaarDownsampling", IMAGE),
        freia("HaarDownsampling", IMAGE, order_by_wavelet=True, rebalance=0.5),
    ],
    "HaarUpsampling": [
        freia("HaarUpsampling", (8, 1, 1)),
        freia("HaarUpsampling", (8, 1, 1), order_by_wavelet=True, rebalance=0.5),
    ],
    "SequenceINN": [Layer(freia_network(sequence), (4,), 3)],
    "ReversibleSequential": [Layer(freia_network(partial(sequence, kind="ReversibleSequential")), (4,), 3)],
    "GraphINN": [Layer(freia_network(graph), (4,), 3)],
    "ReversibleGraphNet": [Layer(freia_network(partial(graph, kind="ReversibleGraphNet")), (4,), 3)],
    "IResNetLayer": [Refused(freia_make("IResNetLayer"), "its log-determinant is a random estimate")],
    "InvAutoFC": [Refused(freia_make("InvAutoFC"), "has no log-determinant")],
    "InvAutoConv2D": [Refused(freia_make("InvAutoConv2D", IMAGE), "has no log-determinant")],
    "GaussianMixtureModel": [Refused(freia_make("GaussianMixtureModel", condition=(4,)), "several components")],
    "Split": [Refused(freia_make("Split"), "has 1 inputs, 2 outputs")],
    "Concat": "takes several inputs: part of GraphINN's example",
    **dict.fromkeys(("Split1D", "SplitChannel", "Concat1d", "ConcatChannel"), "the old name of another"),
}

# normflows


def normflows_make(name: str, *arguments, reverse: bool = False, **options) -> Callable[[], nn.Module]:
    """Of an argument that is a lambda, what it returns."""

    def make() -> nn.Module:
        import normflows
        from normflows import flows

        modules = flows, flows.mixing, flows.neural_spline.coupling, flows.neural_spline.autoregressive
        kind = next(getattr(module, name) for module in (*modules, normflows.transforms) if hasattr(module, name))
        given = (made() if getattr(made, "__name__", "") == "<lambda>" else made for made in arguments)
        layer = kind(*given, **options)
        return flows.Reverse(layer) if reverse else layer

    return make


def normflows(name: str, *arguments, event_shape=(4,), context_features=None, laws=None, **options) -> Layer:
    return Layer(normflows_make(name, *arguments, **options), event_shape, context_features, **laws or {})


def normflows_composite() -> nn.Module:
    from normflows import flows, transforms

    inner = flows.Composite([flows.ActNorm(4), transforms.Shift(0.3)])
    return flows.Composite([flows.Reverse(inner), flows.LULinearPermute(4), flows.Planar(4, act="leaky_relu")])


def residual(in_features: int, out_features: int) -> nn.Module:
    return ResidualNet(in_features, out_features, 8, num_blocks=1)


UNIT = {"data": torch.sigmoid, "noise": torch.sigmoid}
WITHIN_3 = {"noise": lambda z: 3 * z.tanh()}
SCORES = {"reverse": True, "laws": {"scores_only": True}}
BOUNDS = torch.tensor([1.0, 2.0, 3.0, 4.0])
MIXED = ["circular", "linear", "circular", "linear"]
NORMFLOWS = {
    "Flow": "the parent of all layers",
    "Coupling": "the parent of the spline couplings",
    "PiecewiseCoupling": "the parent of the spline couplings",
    "Autoregressive": "the parent of the autoregressive layers",
    "_Linear": "the parent of _LULinear",
    "Composite": [Layer(normflows_composite)],
    "Reverse": [normflows("LULinearPermute", 4, reverse=True)],
    "AffineConstFlow": [
        normflows("AffineConstFlow", 4),
        normflows("AffineConstFlow", 1, event_shape=(1,)),
        normflows("AffineConstFlow", 4, shift=False),
        normflows("AffineConstFlow", (2, 1, 1), event_shape=IMAGE),
        normflows("AffineConstFlow", IMAGE, event_shape=IMAGE),
    ],
    "CCAffineConst": [
        normflows("CCAffineConst", 4, 3, context_features=3),
        normflows("CCAffineConst", (2, 1, 1), 3, event_shape=IMAGE, context_features=3),
    ],
    "ActNorm": [normflows("ActNorm", 4), normflows("ActNorm", (2, 1, 1), event_shape=IMAGE)],
    "MaskedAffineFlow": [
        normflows("MaskedAffineFlow", MASK, lambda: MLP(4, 4), lambda: MLP(4, 4)),
        normflows("MaskedAffineFlow", MASK, lambda: MLP(4, 4)),
    ],
    "AffineCouplingBlock": [
        *(
            normflows("AffineCouplingBlock", lambda: MLP(2, 4), scale_map=scale_map)
            for scale_map in ("exp", "sigmoid", "sigmoid_inv")
        ),
        normflows("AffineCouplingBlock", lambda: MLP(2, 2), scale=False),
        normflows("AffineCouplingBlock", lambda: image_network(1, 2), split_mode="channel_inv", event_shape=IMAGE),
        *(
            normflows("AffineCouplingBlock", lambda: image_network(2, 4), split_mode=mode, event_shape=IMAGE)
            for mode in ("checkerboard", "checkerboard_inv")
        ),
    ],
    "GlowBlock": [
        normflows("GlowBlock", 2, 4, init_zeros=False, event_shape=IMAGE),
        normflows("GlowBlock", 2, 4, split_mode="checkerboard", net_actnorm=True, event_shape=IMAGE),
        normflows("GlowBlock", 3, 4, split_mode="channel_inv", scale=False, use_lu=False, event_shape=(3, 2, 2)),
    ],
    "MaskedAffineAutoregressive": [
        normflows("MaskedAffineAutoregressive", 4, 8),
        Layer(normflows_make("MaskedAffineAutoregressive", 4, 8, reverse=True, context_features=2), (4,), 2),
    ],
    "Permute": [
        normflows("Permute", 5, event_shape=(5,)),
        normflows("Permute", 5, mode="swap", event_shape=(5,)),
        normflows("Permute", 2, event_shape=IMAGE),
    ],
    "InvertibleAffine": [normflows("InvertibleAffine", 4, use_lu=lu) for lu in (False, True)],
    "Invertible1x1Conv": [normflows("Invertible1x1Conv", 2, use_lu=lu, event_shape=IMAGE) for lu in (False, True)],
    "LULinearPermute": [normflows("LULinearPermute", 4, identity_init=False)],
    "_LULinear": [normflows("_LULinear", 4)],
    "_Permutation": [normflows("_Permutation", torch.tensor([1, 2, 0]), event_shape=(3,))],
    "_RandomPermutation": [normflows("_RandomPermutation", 4)],
    "PeriodicWrap": [normflows("PeriodicWrap", range(4), 3.0, laws={"data": WITHIN_3["noise"], **WITHIN_3})],
    "PeriodicShift": [normflows("PeriodicShift", range(4), 3.0, 0.5, laws={"data": WITHIN_3["noise"], **WITHIN_3})],
    "Planar": [
        normflows("Planar", 4, act="leaky_relu"),
        normflows("Planar", IMAGE, act="leaky_relu", event_shape=IMAGE),
        normflows("Planar", 4, **SCORES),
    ],
    "Radial": [normflows("Radial", 4, **SCORES), normflows("Radial", IMAGE, event_shape=IMAGE, **SCORES)],
    "Squeeze": [normflows("Squeeze", event_shape=IMAGE), normflows("Squeeze", reverse=True, event_shape=(8, 1, 1))],
    "PiecewiseRationalQuadraticCDF": [
        *(
            normflows("PiecewiseRationalQuadraticCDF", [4], tails=tails, tail_bound=bound)
            for tails in ("linear", "circular", MIXED)
            for bound in (2.0, BOUNDS)
        ),
        normflows("PiecewiseRationalQuadraticCDF", [4], laws=UNIT),
    ],
    "PiecewiseRationalQuadraticCoupling": [
        *(
            normflows("PiecewiseRationalQuadraticCoupling", MASK, residual, tails=tails, tail_bound=bound)
            for tails in ("linear", "circular", MIXED)
            for bound in (2.0, BOUNDS)
        ),
        normflows("PiecewiseRationalQuadraticCoupling", MASK, residual, laws=UNIT),
    ],
    "MaskedPiecewiseRationalQuadraticAutoregressive": [
        *(
            normflows("MaskedPiecewiseRationalQuadraticAutoregressive", 4, 8, tails=tails, tail_bound=bound)
            for tails in ("linear", "circular", MIXED)
            for bound in (2.0, BOUNDS)
        ),
        normflows("MaskedPiecewiseRationalQuadraticAutoregressive", 4, 8, laws=UNIT),
    ],
    "CoupledRationalQuadraticSpline": [
        normflows("CoupledRationalQuadraticSpline", 4, 1, 8, tail_bound=2.0),
        normflows("CoupledRationalQuadraticSpline", 4, 1, 8, tails="circular", tail_bound=2.0),
        normflows("CoupledRationalQuadraticSpline", 4, 1, 8, tails=None, laws=UNIT),
        normflows("CoupledRationalQuadraticSpline", 4, 1, 8, num_context_channels=2, context_features=2),
    ],
    "AutoregressiveRationalQuadraticSpline": [
        normflows("AutoregressiveRationalQuadraticSpline", 4, 1, 8, tail_bound=2),
        normflows("AutoregressiveRationalQuadraticSpline", 4, 1, 8, num_context_channels=2, context_features=2),
    ],
    **{
        name: [
            normflows(name, 4, 1, 8, [0, 1], tail_bound=2.0),
            normflows(name, 4, 1, 8, [0, 1, 2, 3], tail_bound=BOUNDS, num_context_channels=2, context_features=2),
            normflows(name, 4, 1, 8, [], tail_bound=2.0),
        ]
        for name in ("CircularCoupledRationalQuadraticSpline", "CircularAutoregressiveRationalQuadraticSpline")
    },
    "Logit": [normflows("Logit", event_shape=shape, laws={"data": torch.sigmoid}) for shape in ((4,), IMAGE)],
    "Shift": [normflows("Shift"), normflows("Shift", 0.3, reverse=True)],
    "AffineCoupling": [Refused(normflows_make("AffineCoupling", lambda: MLP(2, 4)), "takes or gives two tensors")],
    "Split": [Refused(normflows_make("Split"), "takes or gives two tensors")],
    "Merge": [Refused(normflows_make("Merge"), "takes or gives two tensors")],
    "Residual": [Refused(normflows_make("Residual", lambda: MLP(4, 4)), "its log-determinant is a random estimate")],
    "BatchNorm": [Refused(normflows_make("BatchNorm", reverse=True), "normalises by the batch at hand")],
    "MetropolisHastings": [Refused(normflows_make("MetropolisHastings", None, None, 1), "is a random walk")],
    "HamiltonianMonteCarlo": [
        Refused(normflows_make("HamiltonianMonteCarlo", None, 1, MASK, MASK), "is a random walk"),
    ],
}

# nflows


def nflows(kind: type, *arguments, event_shape=(4,), context_features=None, laws=None, **options) -> Layer:
    return Layer(partial(kind, *arguments, **options), event_shape, context_features, **laws or {})


def multiscale() -> nn.Module:
    transform = transforms.MultiscaleCompositeTransform(2)
    rest = transform.add_transform(transforms.SqueezeTransform(), (8, 1, 1))
    transform.add_transform(transforms.OneByOneConvolution(4, identity_init=False), rest)
    return transform


def conditional(in_features: int, out_features: int) -> nn.Module:
    return ResidualNet(in_features, out_features, 8, num_blocks=1, context_features=2)


def convolutional(in_features: int, out_features: int) -> nn.Module:
    return ConvResidualNet(in_features, out_features, 4, num_blocks=1)


TAILS = {"tails": "linear", "tail_bound": 2.0}
SPLINES = {"Linear": {"tolerance": 1e-4}, "Quadratic": {}, "Cubic": {"tolerance": 1e-5}, "RationalQuadratic": {}}
NFLOWS = {
    "Transform": "the parent of all layers",
    "Linear": "the parent of the linear layers",
    "CouplingTransform": "the parent of the couplings",
    "PiecewiseCouplingTransform": "the parent of the spline couplings",
    "AutoregressiveTransform": "the parent of the autoregressive layers",
    "CompositeTransform": [
        Layer(lambda: transforms.CompositeTransform([transforms.LULinear(4), transforms.LeakyReLU(0.3)]))
    ],
    "InverseTransform": [Layer(lambda: transforms.InverseTransform(transforms.LULinear(4)))],
    "MultiscaleCompositeTransform": [Layer(multiscale, IMAGE)],
    "CompositeCDFTransform": [
        Layer(lambda: transforms.CompositeCDFTransform(transforms.Sigmoid(), nonlinearities.PiecewiseQuadraticCDF([4])))
    ],
    **{
        kind.__name__: [
            nflows(kind, MASK, residual),
            nflows(kind, MASK, conditional, context_features=2),
            nflows(kind, torch.tensor([1, 0]), convolutional, event_shape=IMAGE),
        ]
        for kind in (transforms.AdditiveCouplingTransform, transforms.AffineCouplingTransform)
    },
    **{
        f"Piecewise{name}CouplingTransform": [
            nflows(kind, MASK, residual, laws=laws | UNIT),
            nflows(kind, MASK, residual, apply_unconditional_transform=True, **TAILS, laws=laws),
            nflows(kind, torch.tensor([1, 0]), convolutional, event_shape=IMAGE, **TAILS, laws=laws),
        ]
        for name, laws in SPLINES.items()
        for kind in (getattr(transforms, f"Piecewise{name}CouplingTransform"),)
    },
    **{
        f"Piecewise{name}CDF": [nflows(kind, [4], laws=laws | UNIT), nflows(kind, [4], **TAILS, laws=laws)]
        for name, laws in SPLINES.items()
        for kind in (getattr(nonlinearities, f"Piecewise{name}CDF"),)
    },
    "MaskedAffineAutoregressiveTransform": [
        nflows(transforms.MaskedAffineAutoregressiveTransform, 4, 8),
        Layer(lambda: transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2), (4,), 2),
    ],
    "MaskedPiecewiseLinearAutoregressiveTransform": [
        nflows(transforms.MaskedPiecewiseLinearAutoregressiveTransform, 5, 4, 8, laws=SPLINES["Linear"] | UNIT)
    ],
    "MaskedPiecewiseCubicAutoregressiveTransform": [
        nflows(transforms.MaskedPiecewiseCubicAutoregressiveTransform, 5, 4, 8, laws=SPLINES["Cubic"] | UNIT)
    ],
    **{
        kind.__name__: [nflows(kind, 4, 8, laws=UNIT), nflows(kind, 4, 8, **TAILS)]
        for kind in (
            transforms.MaskedPiecewiseQuadraticAutoregressiveTransform,
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        )
    },
    "LULinear": [nflows(transforms.LULinear, 4, identity_init=False)],
    "QRLinear": [nflows(transforms.QRLinear, 4, 3)],
    "SVDLinear": [nflows(transforms.SVDLinear, 4, 4, identity_init=False)],
    "NaiveLinear": "uses functions that torch no longer has, and says so",
    "HouseholderSequence": [nflows(transforms.HouseholderSequence, 4, 3)],
    "OneByOneConvolution": [nflows(transforms.OneByOneConvolution, 2, event_shape=IMAGE, identity_init=False)],
    "Permutation": [nflows(transforms.Permutation, torch.tensor([1, 2, 0, 3]))],
    "RandomPermutation": [nflows(transforms.RandomPermutation, 4)],
    "ReversePermutation": [nflows(transforms.ReversePermutation, 4)],
    "SqueezeTransform": [nflows(transforms.SqueezeTransform, event_shape=IMAGE)],
    "ActNorm": [nflows(transforms.ActNorm, 4), nflows(transforms.ActNorm, 2, event_shape=IMAGE)],
    "BatchNorm": [nflows(transforms.BatchNorm, 4, laws={"needs_eval": True})],
    "IdentityTransform": [nflows(transforms.IdentityTransform)],
    "PointwiseAffineTransform": [
        nflows(transforms.PointwiseAffineTransform, 1.0, 2.0),
        nflows(transforms.PointwiseAffineTransform, 1.0, BOUNDS),
        nflows(transforms.PointwiseAffineTransform, 1.0, BOUNDS[:2].view(2, 1, 1), event_shape=IMAGE),
    ],
    "AffineTransform": [nflows(standard.AffineTransform, 1.0, 2.0)],
    "LeakyReLU": [nflows(transforms.LeakyReLU, 0.3, event_shape=shape, laws=IN_FLOAT32) for shape in ((4,), IMAGE)],
    "LogTanh": [nflows(transforms.LogTanh, 0.5), nflows(transforms.LogTanh, 1)],
    "Tanh": [nflows(transforms.Tanh, laws={"noise": torch.tanh})],
    "Sigmoid": [
        nflows(transforms.Sigmoid, learn_temperature=learn, event_shape=shape, laws={"noise": torch.sigmoid})
        for learn in (False, True)
        for shape in ((4,), IMAGE)
    ],
    "Logit": [nflows(transforms.Logit, laws={"data": torch.sigmoid})],
    "CauchyCDF": [nflows(nonlinearities.CauchyCDF, laws={"noise": torch.sigmoid})],
    "CauchyCDFInverse": [nflows(nonlinearities.CauchyCDFInverse, laws={"data": torch.sigmoid})],
    "GatedLinearUnit": [Refused(nonlinearities.GatedLinearUnit, "counts the gate once")],
}

LIBRARIES = {  # of each library: the parent of its layers, and the table
    "FrEIA": ("FrEIA.modules", "InvertibleModule", FREIA),
    "normflows": ("normflows.flows", "Flow", NORMFLOWS),
    "nflows": ("nflows.transforms", "Transform", NFLOWS),
}
CASES = {
    f"{library}:{name}:{i}": (library, case)
    for library, (_, _, table) in LIBRARIES.items()
    for name, cases in table.items()
    if not isinstance(cases, str)
    for i, case in enumerate(cases)
}
LAYERS = {name: case for name, (_, case) in CASES.items() if isinstance(case, Layer)}
REFUSED = {name: case for name, (_, case) in CASES.items() if isinstance(case, Refused)}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_class_is_tried_or_named_as_no_layer(library):
    package, parent, table = LIBRARIES[library]
    root = pytest.importorskip(library)
    parent = getattr(importlib.import_module(package), parent)
    found = set()
    for module in pkgutil.walk_packages(root.__path__, f"{library}."):
        if module.name.endswith("_test"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if isinstance(kind, type) and issubclass(kind, parent) and kind.__module__ == module.name:
                own = vars(importlib.import_module(module.name)).get(kind.__name__) is kind
                found.add(kind.__name__ if own else name)
    assert found == set(table)


def made(name: str, trained: bool):
    """A layer as a transform with random parameters, on and after some steps of maximum likelihood if asked for."""
    library, layer = CASES[name]
    pytest.importorskip(library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform = as_transform(layer.make()).double().train()
    x = layer.data(1.5 * batch(32, *layer.event_shape, seed=7))
    context = context_for(layer.context_features, 32, seed=8)
    transform(x, context)  # layers that initialise themselves have met data
    randomise(transform)
    loss = negative_log_likelihood(transform, x, context)
    if trained and loss.requires_grad:
        optimiser = torch.optim.Adam([p for p in transform.parameters() if p.requires_grad], 0.02)
        for _ in range(10):
            optimiser.zero_grad()
            negative_log_likelihood(transform, x, context).backward()
            optimiser.step()
    return transform, layer


def negative_log_likelihood(transform, x: Tensor, context: Tensor | None) -> Tensor:
    noise, log_det = transform(x, context)
    return (noise.flatten(1).square().sum(1) / 2 - log_det).mean()


class Base(Distribution):
    """Noise where a layer takes it; its log_prob is not normalised, and varies from point to point."""

    def __init__(self, layer: Layer, shape):
        super().__init__()
        self._shape, self.noise = shape, layer.noise

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return -inputs.flatten(1).square().sum(1)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = (num_samples,) if context is None else (len(context), num_samples)
        return self.noise(1.5 * batch(*leading, *self._shape, seed=4))


# FrEIA's OrthogonalTransform has a hook of the old kind, nflows solves triangular systems by an old function of torch
@pytest.mark.filterwarnings("ignore:Using non-full backward hooks", "ignore:torch.triangular_solve is deprecated")
@pytest.mark.filterwarnings("ignore:ReversibleGraphNet's forward")
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("name", LAYERS)
def test_laws_of_every_layer(name, trained):
    transform, layer = made(name, trained)
    close = partial(assert_close, atol=layer.tolerance, rtol=layer.tolerance, check_dtype=False)
    x, context = layer.data(1.5 * batch(ROWS, *layer.event_shape)), context_for(layer.context_features, ROWS)
    for mode in (False,) if layer.needs_eval else (True, False):
        transform.train(mode)
        assert_inputs_unchanged(transform, x, context)
        noise, log_det = transform(x, context)
        assert log_det.shape == (ROWS,) and noise.dtype == torch.float64
        close(log_det, autograd_log_det(transform, x, context))
        if layer.scores_only:
            continue
        back, inverse_log_det = transform.inverse(noise, context)
        close(back, x)
        close(inverse_log_det, -log_det)
        noise = layer.noise(1.5 * batch(*noise.shape, seed=3))
        assert_inputs_unchanged(transform.inverse, noise, context)
        y, log_det = transform.inverse(noise, context)
        assert log_det.shape == (ROWS,) and y.dtype == torch.float64
        close(log_det, autograd_log_det(transform.inverse, noise, context))
        again, forward_log_det = transform(y, context)
        close(again, noise)
        close(forward_log_det, -log_det)
        p = FlowDistribution(
            Flow(transform, Base(layer, noise.shape[1:])), context, event_shape=x.shape[1:], validate_args=False
        )
        for drawn in (p.sample((2,)), p.rsample((2,))):
            close(p.log_prob(drawn), p.log_prob(drawn.clone()))


@pytest.mark.filterwarnings("ignore:Using non-full backward hooks", "ignore:torch.triangular_solve is deprecated")
@pytest.mark.filterwarnings("ignore:ReversibleGraphNet's forward")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_every_layer_are_apart(name):
    transform, layer = made(name, trained=False)
    transform.eval()
    with torch.no_grad():
        for rows in numbers_of_rows(layer.event_shape, layer.context_features):
            x = layer.data(1.5 * batch(rows, *layer.event_shape))
            context = context_for(layer.context_features, rows)
            inverse = None if layer.scores_only else transform.inverse
            assert_rows_apart_both_ways(transform, inverse, x, context, layer.tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_flow_can_use_is_refused(name):
    library, case = CASES[name]
    pytest.importorskip(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = case.make()
    with pytest.raises(case.error, match=re.escape(case.message)):
        as_transform(layer)


# what each base of normflows is made of: arguments of its class, and the width of its context
BASES = {
    "BaseDistribution": "the parent of all bases",
    "DiagGaussian": ((2,), None),
    "ConditionalDiagGaussian": ((2, nn.Linear(3, 4)), 3),
    "Uniform": ((2, -1.0, 2.0), None),
    "UniformGaussian": ((2, [0], torch.tensor([2.0, 1.5])), None),
    "ClassCondDiagGaussian": ((2, 3), 3),
    "GlowBase": (((2, 1, 1), 3), 3),
    "AffineGaussian": (((2,), (2,), 3), 3),
    "GaussianMixture": ((3, 2), None),
    "GaussianPCA": "refused: see flow_in",
}


def test_every_base_of_normflows_is_tried():
    base = pytest.importorskip("normflows").distributions.base
    kinds = {n for n, k in vars(base).items() if isinstance(k, type) and issubclass(k, base.BaseDistribution)}
    assert kinds == set(BASES)


@pytest.mark.parametrize("name", [name for name, case in BASES.items() if not isinstance(case, str)])
def test_bases_of_normflows_are_normalised_and_sampled_as_they_score(name):
    library = pytest.importorskip("normflows")
    arguments, classes = BASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = getattr(library.distributions.base, name)(*arguments)
    kind = library.NormalizingFlow if classes is None else library.ClassCondFlow
    kind = library.ConditionalNormalizingFlow if name.startswith("Conditional") else kind
    flow = randomise(as_flow(kind(base, [])))
    p = FlowDistribution(flow, None if classes is None else torch.eye(3, dtype=torch.float64)[1], validate_args=False)
    edge = torch.linspace(-11.975, 11.975, 480, dtype=torch.float64)  # a uniform density ends between two of these
    with torch.no_grad():
        log_prob = p.log_prob(torch.cartesian_prod(edge, edge).view(-1, *p.event_shape))
        area = (edge[1] - edge[0]) ** 2
        assert_close((log_prob.exp().sum() * area).item(), 1.0, atol=0.01, rtol=0)
        entropy = -(log_prob.exp() * log_prob.clamp(min=-1e9)).sum() * area
        x = p.sample((20_000,))
        assert_close(-p.log_prob(x).mean(), entropy, atol=0.05, rtol=0)
        assert torch.equal(p.log_prob(x), p.log_prob(x.clone()))
