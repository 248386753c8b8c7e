"""Images that trained models make, from noise that is fixed by a seed."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapters.flow import Flow
from adapters.vae import VAE
from runs.common.devices import device_of, seeded
from runs.common.images import CLASSES, SHAPE, context_for
from runs.common.progress import progress

CHUNK = 50  # images made at once: few, since some flows take minutes for them, and the bar must move


class Sampling(NamedTuple):
    """Which samples of a flow are wanted: how many, the factor on the base's noise, and the seed of that noise."""

    samples: int
    temperature: float
    seed: int


@torch.no_grad()
def decode(flow: Flow, noise: Tensor, context: Tensor | None) -> Tensor:
    """Noise ``(n, D)`` → images ``(n, 28, 28)`` in [0, 1], on the CPU."""
    device = device_of(flow)
    contexts = itertools.repeat(None) if context is None else context.to(device).split(CHUNK)
    parts = zip(noise.to(device).split(CHUNK), contexts, strict=False)
    images = []
    with progress(len(noise), "making images", "image") as bar:
        for chunk, chunk_context in parts:
            images.append(flow.decode(chunk, chunk_context).cpu())
            bar.update(len(chunk))
    return torch.cat(images).clamp(0, 1).view(-1, *SHAPE)


def in_turn(flow: Flow, count: int) -> Tensor | None:
    """A context for ``count`` samples, class after class; ``None`` for an unconditional flow."""
    return context_for(flow, torch.arange(count) % CLASSES)


def base_noise(count: int, temperature: float, seed: int) -> Tensor:
    """``temperature`` · N(0, I), ``(count, D)``, the same for the same seed on every device."""
    return temperature * torch.randn(count, math.prod(SHAPE), generator=torch.Generator().manual_seed(seed))


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation, (sin((1 − t)Ω) a + sin(tΩ) b) / sin Ω with Ω the angle between a and b: ``(*, D)``.

    Noise in many dimensions lies near a sphere; a straight line would leave it.
    """
    cosine = nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos()[..., None]
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


@torch.no_grad()
def decoded_samples(vae: VAE, seed: int, samples: int = 100) -> Tensor:
    """Means of p(x | z) at draws of the prior, ``(samples, 28, 28)``."""
    with seeded(seed, device_of(vae)):
        return vae.decoder(vae.prior().sample((samples,))).mean.cpu().view(-1, *SHAPE)
