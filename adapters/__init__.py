"""Hand-written and library normalizing flows side by side: every flow is an nflows ``Transform`` or ``Flow``.

One convention: ``Transform.forward`` runs data → noise inside a flow; in a mask 1 passes unchanged, 0 is transformed.
Log-densities are in nats. What is where, in the order in which a newcomer meets it:

The layer of the exercise, and its masks
    MaskedCouplingLayer     equations 15 to 17: noise → data, so a flow holds it in an ``InverseTransform``
    checkerboard_mask, random_mask, half_mask    and in ``adapters.masks``: the pyramid of masks
    adapters.networks       the networks inside a layer: ``MLP``, ``ConvNet``
    adapters.layers         more hand-written layers: packed affine, spline, histogram, autoregressive

Is my layer right?
    check                   ``check(layer, (2,))``, or ``python -m adapters.check my_layer.py:MyLayer``

A whole flow
    build_flow, flow_names  any flow of the catalogue by its name; ``python -m adapters`` lists and describes them
    adapters.flow           ``Flow``: log_prob, sample, sample_and_log_prob, encode, decode; ``StandardNormal``
    adapters.preprocess     fixed first layers: ``Standardize``, ``Logit``, ``Probit``, ``Marginals``
    plot_density, plot_images    figures for notebooks
    save_flow, load_flow    to a file and back, without pickle

Other libraries' flows
    as_transform, as_flow   a transform or flow of normflows, zuko, FrEIA, Pyro or torch as an nflows one
    to_library              the way back

In Pyro
    FlowDistribution        a flow as a distribution: prior, guide or likelihood
    adapters.priors         priors of a latent variable: normal, mixture, Vamp, flow
    adapters.vae            a variational autoencoder: ``VAE``, ``Model``, ``Guide``, ``Encoder``, ``Decoder``
"""

import importlib
from typing import TYPE_CHECKING, Any

from adapters import imports

imports.import_nflows()

from adapters.bridges import as_flow, as_transform, to_library
from adapters.catalogue import build_flow, flow_names
from adapters.check import check
from adapters.checkpoint import load_flow, save_flow
from adapters.layers.coupling import MaskedCouplingLayer
from adapters.masks import checkerboard_mask, half_mask, random_mask

if TYPE_CHECKING:
    from adapters.distribution import FlowDistribution
    from adapters.plots import plot_density, plot_images

__version__ = "0.1.0"

__all__ = [
    "FlowDistribution",
    "MaskedCouplingLayer",
    "as_flow",
    "as_transform",
    "build_flow",
    "check",
    "checkerboard_mask",
    "flow_names",
    "half_mask",
    "load_flow",
    "plot_density",
    "plot_images",
    "random_mask",
    "save_flow",
    "to_library",
]

# By name, the modules that bring Pyro or matplotlib with them.
LATER = {
    "FlowDistribution": "adapters.distribution",
    "plot_density": "adapters.plots",
    "plot_images": "adapters.plots",
}


def __getattr__(name: str) -> Any:
    """A name that is imported when it is first asked for."""
    if name not in LATER:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
