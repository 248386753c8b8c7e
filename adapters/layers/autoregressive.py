"""Masked autoregressive affine layers: Papamakarios et al. (2017), "Masked Autoregressive Flow", section 3.

    z'_d = z_d exp(s_d(z'_{<d})) + t_d(z'_{<d})              noise → data, one coordinate after another
    z_d = (z'_d − t_d(z'_{<d})) exp(−s_d(z'_{<d}))           data → noise, all of them at once
    log|det J_T(z)| = Σ_d s_d(z'_{<d})

A coupling layer changes one half of the coordinates, given the other half. Here each coordinate is changed given all
that come before it. One masked network gives all s_d and t_d in one pass, so that scoring takes one pass, as in a
coupling layer. Sampling takes D steps, one for each coordinate. Each step computes only those hidden units that the
coordinate before it has made known, so that the D steps together cost the arithmetic of one pass. As in a coupling
layer, ``forward`` runs noise → data.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from adapters.checks import check_event, check_output, check_positive
from adapters.networks import ACTIVATIONS, MAX_INPUT, MAX_LOG_SCALE, check_activation, condition, within
from adapters.words import in_one_line


class MaskedLinear(nn.Linear):
    """x ↦ (W ⊙ M) x + b, from ``(batch, in_features)`` to ``(batch, out_features)``.

    Args:
        mask: M, of 0 and 1, ``(out_features, in_features)``. A buffer.

    >>> layer = MaskedLinear(torch.tensor([[1, 0]]))  # one output, which does not depend on the second input
    >>> torch.equal(layer(torch.tensor([[1.0, 2.0]])), layer(torch.tensor([[1.0, 9.0]])))
    True
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """(W ⊙ M) x + b."""
        return linear(input, self.weight * self.mask, self.bias)


class AutoregressiveMLP(nn.Sequential):
    """A perceptron whose outputs for a coordinate depend only on the coordinates before it, and on the context.

    This is MADE (Germain et al. 2015, section 3). Each hidden unit has a degree m, and depends on the first m
    coordinates only. The outputs for the d-th coordinate depend on units of a degree below d. Units of degree 0 depend
    on the context only. Through them the context reaches the first coordinate, too; in nflows' MADE it does not. The
    last layer starts at zero, so that the layer around it starts at the identity.

    Args:
        order: a permutation of 0 … D − 1: the coordinates in their order, e.g. ``torch.arange(D)``. A buffer.
        parameters_per_coordinate: P. The output is ``(batch, P · D)``: all first parameters, then all second ones, ….
        hidden_features, context_features, activation, dropout: as for ``networks.MLP``.

    Raises:
        ValueError: unless ``order`` holds each of 0 to D − 1 once; for an activation that is not known.

    >>> network = AutoregressiveMLP(torch.arange(3), parameters_per_coordinate=1)
    >>> for parameter in network.parameters():
    ...     _ = nn.init.ones_(parameter)
    >>> torch.autograd.functional.jacobian(network, torch.ones(1, 3)).squeeze() != 0  # which outputs see which inputs
    tensor([[False, False, False],
            [ True, False, False],
            [ True,  True, False]])
    """

    order: Tensor

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
        place = order.cpu().argsort() + 1  # of each coordinate in the order, from 1 on
        lowest = 0 if context_features or features == 1 else 1
        degrees = [pad(place, (0, context_features or 0))]
        degrees += [lowest + torch.arange(w, device="cpu") * (features - lowest) // w for w in hidden_features]
        layers = []
        for before, after in itertools.pairwise(degrees):
            layers += [MaskedLinear(after[:, None] >= before), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        last = MaskedLinear(place.repeat(parameters_per_coordinate)[:, None] > degrees[-1])
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        super().__init__(*layers, last)
        self.register_buffer("order", order.to(last.bias.device, copy=True))
        self.sequence = order.tolist()  # a copy on the host: reading the buffer in each call would wait for the device
        self.register_load_state_dict_post_hook(AutoregressiveMLP._read_order)  # the weights may come with another one
        # How many units of each hidden layer have a degree of at most 0, 1, …. A layer's units are sorted by degree.
        self.counts = [[int((degree <= m).sum()) for m in range(features)] for degree in degrees[1:]]

    def _read_order(self, _=None) -> None:
        self.sequence = self.order.tolist()

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """``(batch, D)`` → ``(batch, P · D)``."""
        return super().forward(input if context is None else torch.cat((input, context), dim=1))

    def solve(self, coordinate: Callable[[int, Tensor], Tensor], context: Tensor) -> Tensor:
        """The x with x_d = ``coordinate(d, parameters)`` for all d, where ``parameters`` are the outputs at x for d.

        The outputs for d depend only on the coordinates before d, so that x is found one coordinate after another. Each
        hidden unit is computed once, as soon as the coordinates that it depends on are known.

        Args:
            coordinate: from d and its parameters, ``(batch, P)``, to x_d, ``(batch, 1)``; called once for each d.
            context: ``(batch, context_features)``; ``(batch, 0)`` for no context.

        Returns:
            x, ``(batch, D)``.

        Raises:
            ValueError: for a context of another width.
        """
        blocks: list[list[Any]] = []  # each linear layer, with the activation and dropout that follow it
        for module in self:
            if isinstance(module, MaskedLinear):
                blocks.append([])
            blocks[-1].append(module)
        *hidden, (last,) = blocks
        order = self.sequence
        weights = [layer.weight for layer, *_ in blocks]
        columns = [*range(len(order), weights[0].shape[1]), *order]  # the context first, which is known from the start
        if context.shape[1] + len(order) != len(columns):
            raise ValueError(f"the context must have {len(columns) - len(order)} features, not {context.shape[1]}")
        weights[0] = weights[0][:, columns]
        known, found, units = context, [], [context[:, :0] for _ in hidden]
        for m, d in enumerate(order):
            seen = known
            for i, (layer, *rest) in enumerate(hidden):
                rows = slice(self.counts[i][m - 1] if m else 0, self.counts[i][m])
                new = linear(seen, weights[i][rows, : seen.shape[1]], layer.bias[rows])
                for module in rest:
                    new = module(new)
                seen = units[i] = torch.cat((units[i], new), dim=1)
            parameters = linear(seen, weights[-1][d :: len(order), : seen.shape[1]], last.bias[d :: len(order)])
            found.append(coordinate(d, parameters))
            known = torch.cat((known, within(found[-1], MAX_INPUT)), dim=1)
        return torch.cat(found, dim=1).index_select(1, self.order.argsort())


class MaskedAutoregressiveLayer(Transform):
    """The equations above, with (s̃, t) = conditioner(z') and s = β ⊙ tanh(s̃).

    Args:
        conditioner: from ``(batch, D)`` to ``(batch, 2 D)``, all of s̃, then all of t: an ``AutoregressiveMLP`` with two
            parameters per coordinate. It is also handed ``context`` when the layer is given one.
        scale_bound: the initial β, learnable, one per coordinate. Beyond ±``MAX_LOG_SCALE`` it is clamped.

    Raises:
        ValueError: for a bound that is not positive; in a call, for an input of another width, or a conditioner whose
            output is of another width.

    >>> layer = MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(3)))
    >>> for parameter in layer.parameters():
    ...     _ = nn.init.normal_(parameter, std=0.1)  # a new layer is the identity
    >>> z = torch.randn(5, 3)
    >>> z_prime, log_det = layer(z)
    >>> torch.allclose(layer.inverse(z_prime)[0], z, atol=1e-4), z_prime.shape, log_det.shape
    (True, torch.Size([5, 3]), torch.Size([5]))
    """

    conditioner: AutoregressiveMLP

    def __init__(self, conditioner: AutoregressiveMLP, scale_bound: float = 2.0):
        super().__init__()
        check_positive(scale_bound=scale_bound)
        self.conditioner = conditioner
        self.features = len(conditioner.order)
        self.scale_bound = nn.Parameter(torch.full((self.features,), float(scale_bound)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z ↦ z' and log|det J_T(z)|, one coordinate after another."""
        check_event(z, (self.features,), "this layer")
        scales, columns, bounds = [], z.split(1, dim=1), within(self.scale_bound, MAX_LOG_SCALE).unbind()

        def coordinate(d: int, parameters: Tensor) -> Tensor:
            s, t = self._scale_translation(parameters, columns[d], bounds[d])
            scales.append(s)
            return torch.addcmul(t, columns[d], s.exp())

        z_prime = self.conditioner.solve(coordinate, z[:, :0] if context is None else context)
        return z_prime, torch.cat(scales, dim=1).sum(1)

    def inverse(  # type: ignore[override]
        self, z_prime: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z' ↦ z and log|det J_T⁻¹(z')|, in one pass."""
        check_event(z_prime, (self.features,), "this layer")
        parameters = condition(self.conditioner, within(z_prime, MAX_INPUT), context)
        minus_s, t = self._scale_translation(parameters, z_prime, -within(self.scale_bound, MAX_LOG_SCALE))
        return (z_prime - t) * minus_s.exp(), minus_s.sum(1)

    def __repr__(self) -> str:
        return in_one_line(self, f"{self.features} features")

    def _scale_translation(self, parameters: Tensor, z: Tensor, scale_bound: Tensor) -> tuple[Tensor, Tensor]:
        check_output(parameters, (z.shape[0], 2 * z.shape[1]), "conditioner")
        # Under autocast the networks compute in a lower precision; the layer itself does not.
        s, t = parameters.to(z.dtype).chunk(2, dim=1)
        return scale_bound * s.tanh(), t
