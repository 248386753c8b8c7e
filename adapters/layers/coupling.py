"""Masked affine coupling: the layer of Real NVP (Dinh et al. 2017), as equations 15 to 17 of the exercise write it.

    z' = b ⊙ z + (1 − b) ⊙ (z ⊙ exp(s(b ⊙ z)) + t(b ⊙ z))             (15)
    z  = b ⊙ z' + (1 − b) ⊙ ((z' − t(b ⊙ z')) ⊙ exp(−s(b ⊙ z')))      (16)
    log|det J_T(z)| = Σ_d (1 − b_d) s_d(b ⊙ z)                        (17)

``MaskedCouplingLayer`` is that text. ``PackedCouplingLayer`` is the same function computed on the coordinates that
matter, for speed. ``forward`` runs (15), noise → data; a flow is therefore
``Flow(InverseTransform(CompositeTransform(layers)), base)``, which samples with (15) and scores with (16).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn
from torch.nn.functional import hardtanh

from adapters.checks import check_event, check_network, check_output, check_positive
from adapters.masks import check_mask
from adapters.networks import condition
from adapters.parts import parts_of

FURTHEST = 1e15  # of a coordinate that a conditioner is shown
SELECT, SWAP, STAY = "select", "swap", "stay"  # between two layers' orders
STRONGEST = 80.0  # of a log-scale s: e^±80 is still a float32


def within(values: Tensor, bound: float) -> Tensor:
    """The values, clamped to ±bound; NaN stays NaN.

    A conditioner's sums of huge numbers overflow to inf, and inf − inf is NaN; a scale that overflows makes NaN of 0.
    With both of them bounded, a finite point has a density, if only 0: log p = −inf.
    """
    return hardtanh(values, -bound, bound)  # whose gradient is one operation, that of clamp four


class MaskedCouplingLayer(Transform):
    """Equations 15, 16 and 17, with two networks on the masked vector.

    Args:
        scale_net: s, a module from ``(batch, *event)`` to the same shape. End it in tanh for stability.
        translation_net: t, likewise. Both are also handed ``context`` when the layer is given one.
        mask: b, of shape ``event`` (a vector's or an image's); 1 = unchanged, 0 = transformed. A buffer.

    Coordinates where b = 1 come through bitwise unchanged, whatever the networks say there, inf and NaN included.

    Raises:
        TypeError: for a network that can't be called, such as a class; in a call, for an input that is no tensor.
        ValueError: for a mask that is empty, all ones or not of 0 and 1; in a call, for an input that is not of the
            mask's shape or a network whose output is not.
    """

    def __init__(self, scale_net: nn.Module, translation_net: nn.Module, mask: Tensor):
        super().__init__()
        check_network(scale_net, "scale_net")
        check_network(translation_net, "translation_net")
        self.scale_net = scale_net
        self.translation_net = translation_net
        self.register_buffer("mask", check_mask(mask).clone())

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z ↦ z' = T(z) and log|det J_T(z)|: equations 15 and 17. Shapes ``(batch, *event)`` and ``(batch,)``."""
        b, s, t = self._mask_scale_translation(z, context)
        return torch.where(b, z, z * s.exp() + t), s.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z' ↦ z = T⁻¹(z') and log|det J_T⁻¹(z')|: equation 16 and minus equation 17."""
        b, s, t = self._mask_scale_translation(z, context)
        return torch.where(b, z, (z - t) * (-s).exp()), -s.flatten(1).sum(1)

    def _mask_scale_translation(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """b, (1 − b) ⊙ s(b ⊙ z) and (1 − b) ⊙ t(b ⊙ z); the same from z' as from z, since b ⊙ z = b ⊙ z'.

        Each product with a mask is a selection: an inf or NaN that it discards neither spreads nor has a gradient.
        """
        check_event(z, self.mask.shape, "this layer")
        b = self.mask.bool()
        bz = torch.where(b, z, 0)
        s = check_output(condition(self.scale_net, bz, context), z.shape, "scale_net")
        t = check_output(condition(self.translation_net, bz, context), z.shape, "translation_net")
        return b, torch.where(b, 0, s), torch.where(b, 0, t)


class PackedCoupling(Transform):
    """Any coupling layer, with no arithmetic on entries that its mask would throw away.

    The conditioner sees only the unchanged coordinates and answers only for the transformed ones:
    z'_{b=1} = z_{b=1} and z'_{b=0} = f(z_{b=0}; conditioner(z_{b=1})), with f elementwise and invertible. A subclass
    gives f and its inverse.

    Args:
        conditioner: a module from ``(batch, U)`` to ``(batch, parameters_per_coordinate · T)``, where the mask holds U
            ones and T zeros; it is also handed ``context`` when the layer is given one.
        mask: b, as for ``MaskedCouplingLayer``.
        reads: 1 = the conditioner sees this coordinate, if it is unchanged; all of these by default.
    """

    parameters_per_coordinate: int

    def __init__(self, conditioner: nn.Module, mask: Tensor, reads: Tensor | None = None):
        super().__init__()
        mask = check_mask(mask)
        self.conditioner = conditioner
        self.event_shape = tuple(mask.shape)
        self.register_buffer(
            "unchanged", (mask if reads is None else mask * reads.to(mask)).flatten().nonzero().flatten()
        )
        self.register_buffer("transformed", (mask == 0).flatten().nonzero().flatten())

    @property
    def sizes(self) -> list[int]:
        """How many coordinates the conditioner reads, the layer transforms, and neither."""
        read, transformed = len(self.unchanged), len(self.transformed)
        return [read, transformed, math.prod(self.event_shape) - read - transformed]

    def order(self) -> Tensor:
        """All coordinates in that order."""
        rest = torch.ones(math.prod(self.event_shape), dtype=torch.bool, device=self.transformed.device)
        rest[self.unchanged] = rest[self.transformed] = False
        return torch.cat((self.unchanged, self.transformed, rest.nonzero().flatten()))

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) and Σ_d log|∂f(z)/∂z|_d, of shapes ``(batch, T)`` and ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define elementwise")

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """f⁻¹(z) and Σ_d log|∂f⁻¹(z)/∂z|_d."""
        raise NotImplementedError(f"{type(self).__name__} must define elementwise_inverse")

    def read(self, unchanged: Tensor) -> Tensor:
        """What the conditioner is shown of the unchanged coordinates: these themselves, as far as arithmetic goes."""
        return within(unchanged, FURTHEST)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.elementwise, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.elementwise_inverse, z, context)

    def couple(
        self, function: Callable, kept: Tensor, changed: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``function``, f or f⁻¹ with its log-determinant, of z_{b=0} = ``changed``, given z_{b=1} = ``kept``."""
        parameters = condition(self.conditioner, self.read(kept), context)
        check_output(parameters, (kept.shape[0], self.parameters_per_coordinate * changed.shape[1]), "conditioner")
        return function(changed, parameters.to(changed.dtype))  # under autocast the networks alone are less precise

    def _run(self, function: Callable, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_event(z, self.event_shape, "this layer")
        flat = z.flatten(1)
        unchanged, index = self.unchanged.expand(z.shape[0], -1), self.transformed.expand(z.shape[0], -1)
        transformed, log_det = self.couple(function, flat.gather(1, unchanged), flat.gather(1, index), context)
        outputs = flat.to(transformed.dtype).scatter(1, index, transformed)
        return outputs if z.dim() == 2 else outputs.view(z.shape), log_det


class PackedComposite(CompositeTransform):
    """Packed layers in a row, between which the vector is not put together and taken apart again.

    It stays in the order that the layer at hand wants: what its conditioner reads, what it transforms, and the rest.
    One selection leads from a layer's order to the next one's; none is needed where the two parts only change roles, as
    they do under a mask and its complement. Hooks on the single layers are not called. The numbers are those of nflows'
    ``CompositeTransform``.

    Args:
        layers: of one event shape; the first runs first in ``forward``.

    Raises:
        ValueError: if there is no layer, or they differ in their event shapes.
    """

    selections: Tensor
    selections_back: Tensor

    def __init__(self, layers: Iterable[PackedCoupling]):
        super().__init__(layers)
        shapes = sorted({layer.event_shape for layer in parts_of(self)})
        if len(shapes) != 1:
            raise ValueError(f"PackedComposite needs at least one layer, and one event shape for all, not {shapes}")
        self._plan()
        self.register_load_state_dict_post_hook(PackedComposite._plan)  # it may bring other masks

    def _plan(self, _=None) -> None:
        """How to come from each order to the next, there and back: by ``SELECT``, or by less where that is enough."""
        layers = list(parts_of(self))
        own = torch.arange(math.prod(layers[0].event_shape), device=layers[0].transformed.device)
        orders = [own, *(layer.order() for layer in layers), own]
        selections = torch.stack([before.argsort()[after] for before, after in itertools.pairwise(orders)])
        self.register_buffer("selections", selections, persistent=False)
        self.register_buffer("selections_back", selections.argsort(1).flip(0), persistent=False)
        self.moves = [SELECT, *itertools.starmap(_move, itertools.pairwise(layers))]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = [(layer, layer.elementwise) for layer in parts_of(self)]
        return self._run(steps, self.selections, self.moves, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = [(layer, layer.elementwise_inverse) for layer in reversed(parts_of(self))]
        return self._run(steps, self.selections_back, [SELECT, *self.moves[:0:-1]], z, context)

    def _run(
        self, steps: list, selections: Tensor, moves: list[str], z: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        check_event(z, parts_of(self)[0].event_shape, "this layer")
        *selections, last = selections.unbind()
        parts, log_det = [z.flatten(1)], 0.0
        for (layer, function), selection, move in zip(steps, selections, moves, strict=True):
            if move == SELECT:
                parts = _join(parts).index_select(1, selection).split(layer.sizes, 1)
            kept, changed, rest = parts if move != SWAP else (parts[1], parts[0], parts[2])
            changed, step = layer.couple(function, kept, changed, context)
            parts, log_det = [kept, changed, rest], log_det + step
        return _join(parts).index_select(1, last).view(z.shape), log_det


def _move(before: PackedCoupling, after: PackedCoupling) -> str:
    """What leads from one layer's parts to the next one's."""
    if before.unchanged.equal(after.unchanged) and before.transformed.equal(after.transformed):
        return STAY
    roles_change = before.unchanged.equal(after.transformed) and before.transformed.equal(after.unchanged)
    return SWAP if roles_change and not after.sizes[2] else SELECT


def _join(parts: Sequence[Tensor]) -> Tensor:
    parts = [part for part in parts if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class PackedCouplingLayer(PackedCoupling):
    """Equations 15, 16 and 17 in packed form: (s̃, t) = conditioner(z_{b=1}), s = β ⊙ tanh(s̃).

    Args:
        conditioner, mask: as for ``PackedCoupling``, with two parameters a coordinate: all of s̃, then all of t. A
            zero-initialised last layer (``MLP`` has one) makes the layer start at the identity.
        scale_bound: the initial β, learnable, one per transformed coordinate; ``None`` for no bound, s = s̃. In
            either case |s| is at most ``STRONGEST``.
    """

    parameters_per_coordinate = 2

    def __init__(
        self, conditioner: nn.Module, mask: Tensor, scale_bound: float | None = 2.0, reads: Tensor | None = None
    ):
        super().__init__(conditioner, mask, reads)
        if scale_bound is not None:
            check_positive(scale_bound=scale_bound)
            scale_bound = nn.Parameter(torch.full((len(self.transformed),), float(scale_bound)))
        self.scale_bound = scale_bound

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self._scale_translation(parameters)
        return torch.addcmul(t, z, s.exp()), s.sum(1)

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        minus_s, t = self._scale_translation(parameters, sign=-1)
        return (z - t) * minus_s.exp(), minus_s.sum(1)

    def _scale_translation(self, parameters: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        """± s and t."""
        s, t = parameters.chunk(2, dim=1)
        if self.scale_bound is None:
            return sign * within(s, STRONGEST), t
        bound = within(self.scale_bound, STRONGEST)
        return (bound if sign == 1 else -bound) * s.tanh(), t
