"""Masked autoregressive affine layers: Papamakarios et al. (2017), "Masked Autoregressive Flow", section 3.

    z'_d = z_d exp(s_d(z'_{<d})) + t_d(z'_{<d})              noise → data, one coordinate after another
    z_d = (z'_d − t_d(z'_{<d})) exp(−s_d(z'_{<d}))           data → noise, all of them at once
    log|det J_T(z)| = Σ_d s_d(z'_{<d})

A coupling layer goes by one half of the coordinates to change the other; here each goes by all that come before it. One
masked network gives all s_d and t_d in one pass, so that scoring takes one pass, as in a coupling layer, and sampling
takes D. As there, ``forward`` runs noise → data.
"""

import itertools
from collections.abc import Sequence

import torch
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from torch import Tensor, nn
from torch.nn.functional import linear

from adapters.checks import check_event, check_output, check_positive
from adapters.networks import ACTIVATIONS, check_activation, condition
from adapters.registry import Example, Specification


class MaskedLinear(nn.Linear):
    """x ↦ (W ⊙ M) x + b.

    Args:
        mask: M, of 0 and 1, ``(out_features, in_features)``. A buffer.
    """

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight * self.mask, self.bias)


class AutoregressiveMLP(nn.Sequential):
    """A perceptron whose answers for a coordinate see the coordinates before it, and the context, alone.

    Each hidden unit has a degree m and sees the first m coordinates; the answers for the d-th see units of a degree
    below d (MADE: Germain et al. 2015, section 3). Units of degree 0 see the context only: through them it reaches the
    first coordinate, too, which in nflows' MADE it does not. The last layer starts at zero, so that the layer around it
    starts at the identity.

    Args:
        order: the D coordinates, the first one first, e.g. ``torch.arange(D)``.
        parameters_per_coordinate: P. The output is ``(batch, P · D)``: all first parameters, then all second ones, ….
        hidden_features, context_features, activation, dropout: as for ``networks.MLP``.

    Raises:
        ValueError: unless ``order`` holds each of 0 to D − 1 once.
    """

    def __init__(
        self,
        order: Tensor,
        parameters_per_coordinate: int = 2,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        check_activation(activation)
        features = len(order)
        if order.dim() != 1 or not features or sorted(order.tolist()) != list(range(features)):
            raise ValueError(f"order must hold each of 0 to D − 1 once, not {order.tolist()}")
        place = order.argsort().cpu() + 1  # the d-th of the order has place d
        lowest = 0 if context_features or features == 1 else 1
        degrees = [torch.cat((place, torch.zeros(context_features or 0, dtype=place.dtype)))]
        degrees += [lowest + torch.arange(width) * (features - lowest) // width for width in hidden_features]
        layers = []
        for before, after in itertools.pairwise(degrees):
            layers += [MaskedLinear(after[:, None] >= before), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        last = MaskedLinear(place.repeat(parameters_per_coordinate)[:, None] > degrees[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs if context is None else torch.cat((inputs, context), dim=1))


class MaskedAutoregressiveLayer(Transform):
    """The equations above: (s̃, t) = conditioner(z'), s = β ⊙ tanh(s̃).

    Args:
        conditioner: a module from ``(batch, D)`` to ``(batch, 2 D)``, all of s̃, then all of t, whose answers for a
            coordinate depend on those before it alone, in whatever order: an ``AutoregressiveMLP``. It is also handed
            ``context`` when the layer is given one.
        features: D.
        scale_bound: the initial β, learnable, one per coordinate.

    Raises:
        ValueError: for numbers that are not positive; in a call, for an input of another width or a conditioner whose
            output is.
    """

    def __init__(self, conditioner: nn.Module, features: int, scale_bound: float = 2.0):
        super().__init__()
        check_positive(features=features, scale_bound=scale_bound)
        self.conditioner = conditioner
        self.features = features
        self.scale_bound = nn.Parameter(torch.full((features,), float(scale_bound)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z ↦ z' and log|det J_T(z)|, in D passes: after the d-th the first d coordinates of z' are what they are."""
        check_event(z, (self.features,), "this layer")
        z_prime = torch.zeros_like(z)
        for _ in range(self.features):
            s, t = self._scale_translation(z_prime, context)
            z_prime = z * s.exp() + t
        return z_prime, s.sum(1)

    def inverse(self, z_prime: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z' ↦ z and log|det J_T⁻¹(z')|, in one pass."""
        check_event(z_prime, (self.features,), "this layer")
        s, t = self._scale_translation(z_prime, context)
        return (z_prime - t) * (-s).exp(), -s.sum(1)

    def _scale_translation(self, z_prime: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = condition(self.conditioner, z_prime, context)
        check_output(parameters, (len(z_prime), 2 * self.features), "conditioner")
        s, t = parameters.to(z_prime.dtype).chunk(2, dim=1)  # under autocast the networks alone are less precise
        return self.scale_bound * s.tanh(), t


def masked_autoregressive(specification: Specification, scale_bound: float = 2.0, dropout: float = 0.0) -> Transform:
    """Masked autoregressive affine layers, in ascending and descending order by turns: fast log_prob.

    There are no masks to choose.
    """
    ascending = torch.arange(specification.features)
    networks = [
        AutoregressiveMLP(ascending.flip(0) if i % 2 else ascending, dropout=dropout, **specification.network)
        for i in range(specification.layers)
    ]
    layers = [MaskedAutoregressiveLayer(network, specification.features, scale_bound) for network in networks]
    return InverseTransform(CompositeTransform(layers))


FLOWS = {"masked-autoregressive": masked_autoregressive}

EXAMPLES = {
    "autoregressive": Example(lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(5)), 5), (5,)),
    "autoregressive-order": Example(
        lambda: MaskedAutoregressiveLayer(
            AutoregressiveMLP(torch.tensor([2, 0, 3, 1]), 2, (6, 2), None, "tanh"), 4, 0.5
        ),
        (4,),
    ),
    "autoregressive-context": Example(
        lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.tensor([1, 0, 2]), context_features=2), 3), (3,), 2
    ),
    "autoregressive-1d": Example(
        lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.zeros(1).long(), context_features=3), 1), (1,), 3
    ),
}
