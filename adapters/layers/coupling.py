"""Masked affine coupling: the layer of Real NVP (Dinh et al. 2017), as equations 15 to 17 of the exercise write it.

    z' = b ⊙ z + (1 − b) ⊙ (z ⊙ exp(s(b ⊙ z)) + t(b ⊙ z))             (15)
    z  = b ⊙ z' + (1 − b) ⊙ ((z' − t(b ⊙ z')) ⊙ exp(−s(b ⊙ z')))      (16)
    log|det J_T(z)| = Σ_d (1 − b_d) s_d(b ⊙ z)                        (17)

``MaskedCouplingLayer`` is that text. ``layers/packed.py`` computes the same function on the coordinates that matter
only, for speed. ``forward`` runs (15), noise → data; a flow is therefore
``Flow(InverseTransform(CompositeTransform(layers)), base)``, which samples with (15) and scores with (16).
"""

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.checks import check_event, check_network, check_output
from adapters.masks import check_mask
from adapters.networks import condition
from adapters.words import in_one_line, mask_in_words


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

    >>> from adapters import half_mask
    >>> layer = MaskedCouplingLayer(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4), half_mask(4))
    >>> z = torch.randn(3, 4)
    >>> z_prime, log_det = layer(z)
    >>> torch.allclose(layer.inverse(z_prime)[0], z, atol=1e-5), torch.equal(z_prime[:, :2], z[:, :2]), log_det.shape
    (True, True, torch.Size([3]))
    """

    mask: Tensor

    def __init__(self, scale_net: nn.Module, translation_net: nn.Module, mask: Tensor):
        super().__init__()
        check_network(scale_net, "scale_net")
        check_network(translation_net, "translation_net")
        self.scale_net = scale_net
        self.translation_net = translation_net
        self.register_buffer("mask", check_mask(mask).clone())

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z ↦ z' = T(z) and log|det J_T(z)|: equations 15 and 17. Shapes ``(batch, *event)`` and ``(batch,)``."""
        b, s, t = self._mask_scale_translation(z, context)
        return torch.where(b, z, z * s.exp() + t), s.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z' ↦ z = T⁻¹(z') and log|det J_T⁻¹(z')|: equation 16 and minus equation 17."""
        b, s, t = self._mask_scale_translation(z, context)
        return torch.where(b, z, (z - t) * (-s).exp()), -s.flatten(1).sum(1)

    def __repr__(self) -> str:
        return in_one_line(self, mask_in_words(self.mask))

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
