"""Masked autoregressive affine layers: Papamakarios et al. (2017), "Masked Autoregressive Flow", section 3.

    z'_d = z_d exp(s_d(z'_{<d})) + t_d(z'_{<d})              noise → data, one coordinate after another
    z_d = (z'_d − t_d(z'_{<d})) exp(−s_d(z'_{<d}))           data → noise, all of them at once
    log|det J_T(z)| = Σ_d s_d(z'_{<d})

A coupling layer goes by one half of the coordinates to change the other; here each goes by all that come before it. One
masked network gives all s_d and t_d in one pass, so that scoring takes one pass, as in a coupling layer. Sampling takes
D steps, but each computes only what the coordinate before it has made known: the arithmetic of one pass, not of D. As
there, ``forward`` runs noise → data.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from adapters.checks import check_event, check_output, check_positive
from adapters.layers.coupling import FURTHEST, STRONGEST, within
from adapters.networks import ACTIVATIONS, check_activation, condition


class MaskedLinear(nn.Linear):
    """x ↦ (W ⊙ M) x + b.

    Args:
        mask: M, of 0 and 1, ``(out_features, in_features)``. A buffer.
    """

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight))

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
        place = order.cpu().argsort() + 1  # the d-th of the order has place d
        lowest = 0 if context_features or features == 1 else 1
        degrees = [pad(place, (0, context_features or 0))]
        degrees += [lowest + torch.arange(w, device="cpu") * (features - lowest) // w for w in hidden_features]
        layers = []
        for before, after in itertools.pairwise(degrees):
            layers += [MaskedLinear(after[:, None] >= before), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        last = MaskedLinear(place.repeat(parameters_per_coordinate)[:, None] > degrees[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self.register_buffer("order", order.to(last.bias.device, copy=True))
        self.sequence = order.tolist()  # to read it off the buffer for each sample would wait for the device
        self.register_load_state_dict_post_hook(AutoregressiveMLP._read_order)  # it may bring another order
        # of each hidden layer, how many units have a degree of at most 0, 1, …: these come first
        self.counts = [[int((degree <= m).sum()) for m in range(features)] for degree in degrees[1:]]

    def _read_order(self, _=None) -> None:
        self.sequence = self.order.tolist()

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs if context is None else torch.cat((inputs, context), dim=1))

    def solve(self, coordinate: Callable[[int, Tensor], Tensor], context: Tensor) -> Tensor:
        """The x whose every x_d is ``coordinate(d, parameters)``, with this network's answers for d at x itself.

        Since these see only what comes before, x is found one coordinate after another. Each hidden unit is computed
        once, as soon as the coordinates that it sees are known.

        Args:
            coordinate: from d and its parameters, ``(batch, P)``, to x_d, ``(batch, 1)``; called once for each d.
            context: ``(batch, context_features)``; ``(batch, 0)`` for no context.

        Returns:
            x, ``(batch, D)``.

        Raises:
            ValueError: for a context of another width.
        """
        blocks = []  # each linear layer and what comes after it
        for module in self:
            if isinstance(module, MaskedLinear):
                blocks.append([])
            blocks[-1].append(module)
        *hidden, (last,) = blocks
        order = self.sequence
        weights = [layer.weight for layer, *_ in blocks]
        columns = [*range(len(order), weights[0].shape[1]), *order]  # first the context, which is known at once
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
            known = torch.cat((known, within(found[-1], FURTHEST)), dim=1)
        return torch.cat(found, dim=1).index_select(1, self.order.argsort())


class MaskedAutoregressiveLayer(Transform):
    """The equations above: (s̃, t) = conditioner(z'), s = β ⊙ tanh(s̃).

    Args:
        conditioner: from ``(batch, D)`` to ``(batch, 2 D)``, all of s̃, then all of t: an ``AutoregressiveMLP`` with two
            parameters per coordinate. It is also handed ``context`` when the layer is given one.
        scale_bound: the initial β, learnable, one per coordinate; used up to ``STRONGEST``.

    Raises:
        ValueError: for a bound that is not positive; in a call, for an input of another width or a conditioner whose
            output is.
    """

    def __init__(self, conditioner: AutoregressiveMLP, scale_bound: float = 2.0):
        super().__init__()
        check_positive(scale_bound=scale_bound)
        self.conditioner = conditioner
        self.features = len(conditioner.order)
        self.scale_bound = nn.Parameter(torch.full((self.features,), float(scale_bound)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z ↦ z' and log|det J_T(z)|, one coordinate after another."""
        check_event(z, (self.features,), "this layer")
        scales, columns, bounds = [], z.split(1, dim=1), within(self.scale_bound, STRONGEST).unbind()

        def coordinate(d: int, parameters: Tensor) -> Tensor:
            s, t = self._scale_translation(parameters, columns[d], bounds[d])
            scales.append(s)
            return torch.addcmul(t, columns[d], s.exp())

        z_prime = self.conditioner.solve(coordinate, z[:, :0] if context is None else context)
        return z_prime, torch.cat(scales, dim=1).sum(1)

    def inverse(self, z_prime: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z' ↦ z and log|det J_T⁻¹(z')|, in one pass."""
        check_event(z_prime, (self.features,), "this layer")
        parameters = condition(self.conditioner, within(z_prime, FURTHEST), context)
        minus_s, t = self._scale_translation(parameters, z_prime, -within(self.scale_bound, STRONGEST))
        return (z_prime - t) * minus_s.exp(), minus_s.sum(1)

    def _scale_translation(self, parameters: Tensor, z: Tensor, scale_bound: Tensor) -> tuple[Tensor, Tensor]:
        check_output(parameters, (z.shape[0], 2 * z.shape[1]), "conditioner")
        s, t = parameters.to(z.dtype).chunk(2, dim=1)  # under autocast the networks alone are less precise
        return scale_bound * s.tanh(), t
