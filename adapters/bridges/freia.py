"""FrEIA: its invertible networks and blocks in, any transform out, and its affine coupling for the catalogue.

FrEIA runs data → noise as nflows does, and ``rev=True`` the other way. It has no density class: a network of its is
trained with the loss z²/2 − log|det J|, so a whole network means the flow from a standard normal base.

A context row of ours holds all conditions of a network, each flattened, side by side.
"""

import math
from functools import cache

import torch
from nflows.transforms import CompositeTransform, Permutation, Transform
from torch import Tensor, nn

from adapters.checks import check_context, check_event
from adapters.flow import Flow, StandardNormal
from adapters.networks import MLP
from adapters.registry import Example, Model, Specification

PACKAGES = ("FrEIA",)
LIBRARIES = ("freia",)
EXTRA = "freia"


class FreiaTransform(Transform):
    """A ``SequenceINN``, ``GraphINN`` or single block of FrEIA: ``(batch, *event_shape)`` ↦ ``(batch, *noise_shape)``.

    An ``ActNorm`` not yet initialised takes its scale and shift from the first data it meets in training, and from
    nothing else (its own rule: from the first call, whatever it is).

    Raises:
        ValueError: for a block that has several inputs or outputs, is no bijection or has no exact log-determinant; in
            a call, for inputs or a context of another shape.
    """

    def __init__(self, module: nn.Module):
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import ActNorm

        super().__init__()
        _check_exact(module)
        self.module = module
        self.is_sequence = isinstance(module, SequenceINN)
        self.event_shape, self.noise_shape = _shapes(module)
        self.conditions = _conditions(module)  # key → shape
        self.context_features = sum(map(math.prod, self.conditions.values())) or None
        self.actnorms = [part for part in module.modules() if isinstance(part, ActNorm)]
        self.householders = [part for part in module.modules() if getattr(part, "householder", 0)]

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_event(inputs, self.event_shape, f"FrEIA's {type(self.module).__name__}")
        return self._run(inputs, context, rev=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_event(inputs, self.noise_shape, f"the inverse of FrEIA's {type(self.module).__name__}")
        return self._run(inputs, context, rev=True)

    def _run(self, inputs: Tensor, context: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, f"FrEIA's {type(self.module).__name__}")
        held = [norm for norm in self.actnorms if norm.init_on_next_batch and (rev or not norm.training)]
        for norm in held:
            norm.init_on_next_batch = False
        try:
            outputs, log_det = self.module((inputs,), rev=rev, **self._split(context))
        finally:
            for norm in held:
                norm.init_on_next_batch = True
            for block in self.householders:  # a matrix kept with its graph: it could not be copied
                block.w_perm = block.w_perm_inv = None
        log_det = torch.as_tensor(log_det, dtype=inputs.dtype, device=inputs.device)  # a number, from some blocks
        return outputs if isinstance(outputs, Tensor) else outputs[0], log_det.expand(len(inputs))

    def _split(self, context: Tensor | None) -> dict:
        if context is None:
            return {}
        parts = context.split([math.prod(shape) for shape in self.conditions.values()], dim=1)
        conditions = {
            key: part.unflatten(1, shape) for (key, shape), part in zip(self.conditions.items(), parts, strict=True)
        }
        return {"c": conditions if self.is_sequence else list(conditions.values())}


def transform_in(thing) -> Transform | None:
    """Any ``InvertibleModule``: a network or a block; an exported transform comes back as it went."""
    from FrEIA.modules import InvertibleModule

    if isinstance(thing, _exported()):
        return thing.transform
    return FreiaTransform(thing) if isinstance(thing, InvertibleModule) else None


def flow_in(thing) -> Flow | None:
    """A ``SequenceINN`` or ``GraphINN``, with the standard normal that FrEIA trains it against."""
    from FrEIA.framework import GraphINN, SequenceINN

    if not isinstance(thing, SequenceINN | GraphINN):
        return None
    transform = FreiaTransform(thing)
    like = next((p for p in thing.parameters() if p.is_floating_point()), torch.empty(0))
    base = StandardNormal(transform.noise_shape).to(like)
    return Flow(transform, base, transform.event_shape, transform.context_features)


def transform_out(transform: Transform, library: str, event_dim: int, conditional: bool) -> nn.Module:
    """An ``InvertibleModule``; ``sequence.append(exported.placed)`` and ``Node(…, exported.placed, {})`` take it in."""
    return _exported()(transform)


@cache
def _exported() -> type:
    """The class of exported transforms: it exists once FrEIA, its parent's package, has been imported."""
    from FrEIA.modules import InvertibleModule

    class NflowsModule(InvertibleModule):
        """An nflows transform that keeps the shape of its input, as a FrEIA module."""

        def __init__(self, transform: Transform):
            super().__init__([])
            self.transform = transform

        def placed(self, dims_in, dims_c=None) -> "NflowsModule":
            """Itself, for inputs of these shapes: FrEIA's networks call a constructor where others take a module."""
            self.dims_in, self.dims_c = list(dims_in), list(dims_c or [])
            return self

        def forward(self, x_or_z, c=None, rev: bool = False, jac: bool = True) -> tuple[tuple[Tensor], Tensor]:
            context = torch.cat([part.flatten(1) for part in c], dim=1) if c else None
            outputs, log_det = (self.transform.inverse if rev else self.transform)(x_or_z[0], context)
            return (outputs,), log_det

        def output_dims(self, input_dims):
            return input_dims

    return NflowsModule


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of a ``SequenceINN`` of the exported module and the loss that FrEIA's networks are trained with."""
    from FrEIA.framework import SequenceINN

    network = SequenceINN(*inputs.shape[1:])
    if context is None:
        network.append(exported.placed)
    else:
        network.append(exported.placed, cond=0, cond_shape=tuple(context.shape[1:]))
    return _log_prob(network, inputs, context)


def _log_prob(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    noise, log_det = network(inputs, c=None if context is None else [context])
    noise = noise.flatten(1)
    return -0.5 * (noise**2).sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi) + log_det


def _check_exact(module: nn.Module) -> None:
    from FrEIA import modules

    reasons = {
        modules.IResNetLayer: "its log-determinant is a random estimate and its inverse an approximation",
        modules.InvAutoFC: "it is invertible only once trained to be, and has no log-determinant",
        modules.InvAutoConv2D: "it is invertible only once trained to be, and has no log-determinant",
        modules.GaussianMixtureModel: "it maps to several components at once",
    }
    for part in module.modules():
        for kind, reason in reasons.items():
            if isinstance(part, kind):
                raise ValueError(f"FrEIA's {kind.__name__} is no layer of a flow: {reason}")


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of its one input and of its one output."""
    from FrEIA.framework import GraphINN, SequenceINN

    if isinstance(module, SequenceINN):
        return [module.shapes[0], module.shapes[-1]]
    dims_in = module.dims_in
    if isinstance(dims_in[0], int):  # ActNorm overwrites the list of shapes by its one shape
        dims_in = [dims_in]
    dims_out = module.global_out_shapes if isinstance(module, GraphINN) else module.output_dims(dims_in)
    if len(dims_in) != 1 or len(dims_out) != 1:
        raise ValueError(
            f"FrEIA's {type(module).__name__} has {len(dims_in)} inputs, {len(dims_out)} outputs; a transform has one"
        )
    return [tuple(dims_in[0]), tuple(dims_out[0])]


def _conditions(module: nn.Module) -> dict[int, tuple[int, ...]]:
    """The shape of every condition, by its place in the list that FrEIA takes."""
    from FrEIA.framework import SequenceINN

    if isinstance(module, SequenceINN):
        keyed = zip(module.conditions, module.module_list, strict=True)
        return dict(sorted((key, tuple(block.dims_c[0])) for key, block in keyed if key is not None))
    return {key: tuple(shape) for key, shape in enumerate(module.dims_c)}


def affine(specification: Specification, clamp: float = 2.0) -> Transform:
    """``AffineCouplingOneSided`` under our masks and networks.

    FrEIA splits by place: the first coordinates pass. Here the coordinates are put in the mask's order before each
    block, and back after it. The scale is exp(clamp · 0.636 · atan s), within e^±clamp.
    """
    from FrEIA.modules import AffineCouplingOneSided

    def network(in_features: int, out_features: int) -> MLP:
        return MLP(in_features, out_features, specification.hidden_features, None, specification.activation)

    dims_c = [(specification.context_features,)] if specification.context_features else []
    layers = []
    for mask in reversed(specification.coupling_masks):
        order = torch.argsort(mask, descending=True, stable=True)
        block = AffineCouplingOneSided(
            [(specification.features,)], dims_c, network, clamp=clamp, split_len=int(mask.sum())
        )
        layers += [Permutation(order), FreiaTransform(block), Permutation(torch.argsort(order))]
    return CompositeTransform(layers)


def _sequence(context_features: int | None = None) -> nn.Module:
    """Coupling blocks, one of them conditional where there is a context, and ones with a number as log-determinant."""
    from FrEIA import framework, modules

    condition = {"cond": 0, "cond_shape": (context_features,)} if context_features else {}
    network = framework.SequenceINN(4)
    network.append(modules.GLOWCouplingBlock, subnet_constructor=MLP, **condition)
    network.append(modules.PermuteRandom, seed=0)
    network.append(modules.NICECouplingBlock, subnet_constructor=MLP)
    return network


def _graph() -> nn.Module:
    from FrEIA import framework, modules

    start, condition = framework.InputNode(3), framework.ConditionNode(2)
    block = framework.Node(start, modules.RNVPCouplingBlock, {"subnet_constructor": MLP}, conditions=condition)
    return framework.GraphINN([start, condition, block, framework.OutputNode(block)])


def _image() -> nn.Module:
    """Couplings of an image's channels between a wavelet transform and its inverse."""
    from FrEIA import framework, modules

    network = framework.SequenceINN(1, 4, 4)
    network.append(modules.HaarDownsampling)
    network.append(modules.GLOWCouplingBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    network.append(modules.HaarUpsampling)
    return network


def _constant() -> nn.Module:
    """Blocks whose log-determinants have no dimension, or are numbers."""
    from FrEIA import framework, modules

    network = framework.SequenceINN(2, 3, 3)
    network.append(modules.Fixed1x1Conv, M=torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
    network.append(modules.NICECouplingBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    return network


FLOWS = {"freia-affine": affine}

EXAMPLES = {
    "sequence": Example(lambda: FreiaTransform(_sequence()), (4,)),
    "sequence-context": Example(lambda: FreiaTransform(_sequence(2)), (4,), 2),
    "graph-context": Example(lambda: FreiaTransform(_graph()), (3,), 2),
    "image": Example(lambda: FreiaTransform(_image()), (1, 4, 4)),
    "constant": Example(lambda: FreiaTransform(_constant()), (2, 3, 3)),
}

MODELS = {
    "SequenceINN": Model(_sequence, _log_prob, (4,)),
    "SequenceINN-context": Model(lambda: _sequence(2), _log_prob, (4,), 2),
    "GraphINN-context": Model(_graph, _log_prob, (3,), 2),
    "SequenceINN-image": Model(_image, _log_prob, (1, 4, 4)),
}
