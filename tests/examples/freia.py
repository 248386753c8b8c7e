"""FrEIA's networks."""

import math

import torch
from torch import Tensor, nn

from adapters import as_transform
from adapters.networks import MLP
from tests.examples import Example, Model


def decode(exported, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    (x,), log_det = exported((noise,), None if context is None else [context], rev=True)
    return x, log_det


def _log_prob(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    """What the loss of FrEIA's networks means: the density around a standard normal."""
    noise, log_det = network(inputs, c=None if context is None else [context])
    noise = noise.flatten(1)
    return -0.5 * (noise**2).sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi) + log_det


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


EXAMPLES = {
    "sequence": Example(lambda: as_transform(_sequence()), (4,)),
    "sequence-context": Example(lambda: as_transform(_sequence(2)), (4,), 2),
    "graph-context": Example(lambda: as_transform(_graph()), (3,), 2),
    "image": Example(lambda: as_transform(_image()), (1, 4, 4)),
    "constant": Example(lambda: as_transform(_constant()), (2, 3, 3)),
}

MODELS = {
    "SequenceINN": Model(_sequence, _log_prob, (4,)),
    "SequenceINN-context": Model(lambda: _sequence(2), _log_prob, (4,), 2),
    "GraphINN-context": Model(_graph, _log_prob, (3,), 2),
    "SequenceINN-image": Model(_image, _log_prob, (1, 4, 4)),
}
