"""Packed coupling layers: a coupling layer without arithmetic on entries that its mask would throw away.

``MaskedCouplingLayer`` evaluates two networks of full width, and discards most of what goes in and comes out. Here one
network, the conditioner, is given the coordinates with b = 1 only, and computes parameters for those with b = 0 only:

    z'_{b=1} = z_{b=1}
    z'_{b=0} = f(z_{b=0}; conditioner(z_{b=1}))

with f elementwise and invertible. For an affine f these are equations 15 to 17 of ``layers/coupling.py``. As there,
``forward`` runs noise → data.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from adapters.checks import check_event, check_output, check_positive
from adapters.masks import check_mask
from adapters.networks import MAX_INPUT, MAX_LOG_SCALE, condition, within
from adapters.parts import parts_of
from adapters.words import in_one_line, mask_in_words

Elementwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # PackedCoupling.elementwise or its inverse

SELECT, SWAP, STAY = "select", "swap", "stay"  # how PackedComposite comes from one layer's order to the next one's


class PackedCoupling(Transform):
    """What all packed coupling layers have in common. A subclass gives f and its inverse.

    Args:
        conditioner: a module from ``(batch, U)`` to ``(batch, parameters_per_coordinate · T)``, where U coordinates are
            read and T are transformed. It is also handed ``context`` when the layer is given one.
        mask: b, of shape ``event``; 1 = unchanged, 0 = transformed.
        reads: of the same shape; 1 = the conditioner may read this coordinate. It reads those that are also unchanged.
            By default it reads all unchanged coordinates.

    Attributes:
        parameters_per_coordinate: how many numbers f takes for each transformed coordinate. A subclass sets it.
        conditioning: indices, in the flattened event, of the U coordinates that the conditioner reads. A buffer.
        transformed: indices of the T coordinates with b = 0. A buffer.

    Raises:
        ValueError: for a mask that is empty, all ones or not of 0 and 1; in a call, for an input that is not of the
            mask's shape or a conditioner whose output is not as above.
        TypeError: in a call, for an input that is no tensor.

    A new layer is f, f⁻¹ and how many parameters they take:

    >>> class Shift(PackedCoupling):
    ...     parameters_per_coordinate = 1
    ...     def elementwise(self, z, parameters):
    ...         return z + parameters, z.new_zeros(len(z))
    ...     def elementwise_inverse(self, z, parameters):
    ...         return z - parameters, z.new_zeros(len(z))
    >>> Shift(nn.Identity(), torch.tensor([1, 0]))(torch.tensor([[10.0, 1.0]]))[0]
    tensor([[10., 11.]])
    """

    parameters_per_coordinate: int
    conditioning: Tensor
    transformed: Tensor

    def __init__(self, conditioner: nn.Module, mask: Tensor, reads: Tensor | None = None):
        super().__init__()
        mask = check_mask(mask)
        self.conditioner = conditioner
        self.event_shape = tuple(mask.shape)
        readable = mask if reads is None else mask * reads.to(mask)
        self.register_buffer("conditioning", readable.flatten().nonzero().flatten())
        self.register_buffer("transformed", (mask == 0).flatten().nonzero().flatten())

    @property
    def sizes(self) -> list[int]:
        """How many coordinates the conditioner reads, how many the layer transforms, and how many are neither."""
        read, transformed = len(self.conditioning), len(self.transformed)
        return [read, transformed, math.prod(self.event_shape) - read - transformed]

    def order(self) -> Tensor:
        """The indices of all coordinates, in the order of ``sizes``."""
        rest = torch.ones(math.prod(self.event_shape), dtype=torch.bool, device=self.transformed.device)
        rest[self.conditioning] = rest[self.transformed] = False
        return torch.cat((self.conditioning, self.transformed, rest.nonzero().flatten()))

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) and Σ_d log|∂f(z)/∂z|_d, of shapes ``(batch, T)`` and ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define elementwise")

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """f⁻¹(z) and Σ_d log|∂f⁻¹(z)/∂z|_d, of the same shapes."""
        raise NotImplementedError(f"{type(self).__name__} must define elementwise_inverse")

    def conditioner_input(self, z: Tensor) -> Tensor:
        """What the conditioner is given in place of z, the coordinates that it reads: ``(batch, U)`` both.

        By default z itself, clamped so that no sum in the network overflows.
        """
        return within(z, MAX_INPUT)

    def __repr__(self) -> str:
        mask = torch.ones(math.prod(self.event_shape), device=self.transformed.device)
        return in_one_line(self, mask_in_words(mask.index_fill(0, self.transformed, 0).view(self.event_shape)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z ↦ z' and log|det J|, noise → data. Shapes ``(batch, *event)`` and ``(batch,)``."""
        return self._run(self.elementwise, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z' ↦ z and log|det J⁻¹|, data → noise."""
        return self._run(self.elementwise_inverse, z, context)

    def couple(
        self, function: Elementwise, read: Tensor, transformed: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply f or f⁻¹ to the coordinates with b = 0.

        Args:
            function: ``elementwise`` or ``elementwise_inverse``.
            read: the coordinates that the conditioner reads, ``(batch, U)``.
            transformed: the coordinates with b = 0, ``(batch, T)``.

        Returns:
            the new values of ``transformed`` and the log-determinant, ``(batch,)``.
        """
        parameters = condition(self.conditioner, self.conditioner_input(read), context)
        check_output(parameters, (read.shape[0], self.parameters_per_coordinate * transformed.shape[1]), "conditioner")
        # Under autocast the networks compute in a lower precision; the layer itself does not.
        return function(transformed, parameters.to(transformed.dtype))

    def _run(self, function: Elementwise, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_event(z, self.event_shape, "this layer")
        flat = z.flatten(1)
        conditioning, index = self.conditioning.expand(z.shape[0], -1), self.transformed.expand(z.shape[0], -1)
        transformed, log_det = self.couple(function, flat.gather(1, conditioning), flat.gather(1, index), context)
        outputs = flat.to(transformed.dtype).scatter(1, index, transformed)
        return outputs if z.dim() == 2 else outputs.view(z.shape), log_det


class PackedAffineCouplingLayer(PackedCoupling):
    """Equations 15, 16 and 17 in packed form: (s̃, t) = conditioner(z_{b=1}), s = β ⊙ tanh(s̃ / β₀).

    Args:
        conditioner, mask, reads: as for ``PackedCoupling``, with two parameters a coordinate: all of s̃, then all of t.
            A zero-initialised last layer (``MLP`` has one) makes the layer start at the identity.
        scale_bound: β₀, where β starts, which is learnable, one per transformed coordinate; ``None`` for no bound,
            s = s̃. In either case |s| is at most ``MAX_LOG_SCALE``. Training starts where s̃ = 0 and β = β₀. There
            ∂s/∂s̃ = 1 whatever β₀ is, so that s learns as fast as t.

    Raises:
        ValueError: as ``PackedCoupling``, and for a bound that is not positive.

    >>> def conditioner(read):  # s = log 2 and t = 1, whatever it reads
    ...     return torch.tensor([[math.log(2), 1.0]]).expand(len(read), 2)
    >>> layer = PackedAffineCouplingLayer(conditioner, torch.tensor([1, 0]), scale_bound=None)
    >>> z_prime, log_det = layer(torch.tensor([[5.0, 3.0]]))
    >>> z_prime.round(decimals=3), log_det
    (tensor([[5., 7.]]), tensor([0.6931]))
    """

    parameters_per_coordinate = 2
    scale_bound: nn.Parameter | None

    def __init__(
        self, conditioner: nn.Module, mask: Tensor, scale_bound: float | None = 2.0, reads: Tensor | None = None
    ):
        super().__init__(conditioner, mask, reads)
        if scale_bound is None:
            self.scale_bound = None
        else:
            check_positive(scale_bound=scale_bound)
            self.initial_bound = float(scale_bound)
            self.scale_bound = nn.Parameter(torch.full((len(self.transformed),), self.initial_bound))

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._scale_translation(parameters)
        return torch.addcmul(t, z, s.exp()), s.sum(1)

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        minus_s, t = self._scale_translation(parameters, sign=-1)
        return (z - t) * minus_s.exp(), minus_s.sum(1)

    def _scale_translation(self, parameters: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        """± s and t. The sign goes to β, which is smaller than s."""
        s, t = parameters.chunk(2, dim=1)
        if self.scale_bound is None:
            return sign * within(s, MAX_LOG_SCALE), t
        bound = within(self.scale_bound, MAX_LOG_SCALE)
        return (bound if sign == 1 else -bound) * (s / self.initial_bound).tanh(), t


class PackedComposite(CompositeTransform):
    """Packed layers in a row, between which the vector is not put together and taken apart again.

    The vector stays in three parts: what the layer at hand reads, what it transforms, and the rest. One selection of
    columns leads from one layer's parts to those of the next. No selection is needed where the first two parts only
    change roles, as they do under a mask and its complement. Hooks on the single layers are not called. The numbers are
    those of nflows' ``CompositeTransform``.

    Args:
        layers: of one event shape; the first runs first in ``forward``.

    Raises:
        ValueError: if there is no layer, or they differ in their event shapes.

    >>> masks = torch.tensor([[1, 0], [0, 1]])
    >>> layers = [PackedAffineCouplingLayer(nn.Linear(1, 2), mask) for mask in masks]
    >>> z = torch.randn(5, 2)
    >>> torch.equal(PackedComposite(layers)(z)[0], CompositeTransform(layers)(z)[0])
    True
    """

    selections: Tensor
    selections_back: Tensor

    def __init__(self, layers: Iterable[PackedCoupling]):
        super().__init__(layers)
        shapes = sorted({layer.event_shape for layer in self._layers})
        if len(shapes) != 1:
            raise ValueError(f"PackedComposite needs at least one layer, and one event shape for all, not {shapes}")
        self._plan()
        self.register_load_state_dict_post_hook(PackedComposite._plan)  # the weights may come with other masks

    @property
    def _layers(self) -> Sequence[PackedCoupling]:
        return cast(Sequence[PackedCoupling], parts_of(self))

    def _plan(self, _=None) -> None:
        """How to come from each order to the next, there and back: by ``SELECT``, or by less where that is enough."""
        layers = self._layers
        own = torch.arange(math.prod(layers[0].event_shape), device=layers[0].transformed.device)
        orders = [own, *(layer.order() for layer in layers), own]
        selections = torch.stack([before.argsort()[after] for before, after in itertools.pairwise(orders)])
        self.register_buffer("selections", selections, persistent=False)
        self.register_buffer("selections_back", selections.argsort(1).flip(0), persistent=False)
        self.moves = [SELECT, *itertools.starmap(_move, itertools.pairwise(layers))]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z ↦ z' and log|det J|, noise → data. Shapes ``(batch, *event)`` and ``(batch,)``."""
        steps = [(layer, layer.elementwise) for layer in self._layers]
        return self._run(steps, self.selections, self.moves, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z' ↦ z and log|det J⁻¹|, data → noise."""
        steps = [(layer, layer.elementwise_inverse) for layer in reversed(self._layers)]
        return self._run(steps, self.selections_back, [SELECT, *self.moves[:0:-1]], z, context)

    def _run(
        self,
        steps: list[tuple[PackedCoupling, Elementwise]],
        selections: Tensor,
        moves: list[str],
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        check_event(z, self._layers[0].event_shape, "this layer")
        *into_each, out_of_the_last = selections.unbind()
        parts, log_dets = [z.flatten(1)], []
        for (layer, function), selection, move in zip(steps, into_each, moves, strict=True):
            if move == SELECT:
                parts = _join(parts).index_select(1, selection).split(layer.sizes, 1)
            read, transformed, rest = parts if move != SWAP else (parts[1], parts[0], parts[2])
            transformed, log_det = layer.couple(function, read, transformed, context)
            parts = [read, transformed, rest]
            log_dets.append(log_det)
        return _join(parts).index_select(1, out_of_the_last).view(z.shape), reduce(add, log_dets)


def _move(before: PackedCoupling, after: PackedCoupling) -> str:
    """What leads from one layer's parts to the next one's."""
    if before.conditioning.equal(after.conditioning) and before.transformed.equal(after.transformed):
        return STAY
    roles_change = before.conditioning.equal(after.transformed) and before.transformed.equal(after.conditioning)
    return SWAP if roles_change and not after.sizes[2] else SELECT


def _join(parts: Sequence[Tensor]) -> Tensor:
    parts = [part for part in parts if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
