"""What the files of the catalogue are given, and what they give.

A file of the catalogue may have

- ``FLOWS``, of names that ``build_flow`` takes: ``make(specification, **options)`` gives the transform data → noise,
  the library's own or nflows';
- ``NATIVE_FLOWS``, of names that the benchmarks show: ``make(features, masks, hidden_features)`` gives a
  ``NativeFlow``. A library whose coupling layers know halves only takes the halves, whatever the masks.

A file with the name of a bridge is of that bridge's library, and imports the library only when a flow is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nflows.transforms import Transform
from torch import Tensor


@dataclass(frozen=True)
class Specification:
    """What every flow of the catalogue is asked for alike, so that a comparison is fair.

    Attributes:
        features: D, the width of the data.
        layers: how many layers.
        hidden_features: widths of each conditioner's hidden layers.
        context_features: width of the context; ``None`` for an unconditional flow.
        masks: one mask of D entries a layer, from the noise side to the data side; 1 = unchanged. Floats, on the CPU.
        activation: name of the conditioners' activation, a key of ``networks.ACTIVATIONS``.
        preprocess: the fixed transform between the data and these layers, if there is one.
    """

    features: int
    layers: int
    hidden_features: tuple[int, ...]
    context_features: int | None
    masks: tuple[Tensor, ...]
    activation: str
    preprocess: Transform | None = None

    @property
    def coupling_masks(self) -> tuple[Tensor, ...]:
        """The masks; a ValueError if there is only one coordinate, and so nothing to couple it with."""
        if self.features == 1:
            raise ValueError(
                "a coupling flow needs at least 2 features, not 1; "
                "an autoregressive one, such as masked-autoregressive, takes 1"
            )
        return self.masks

    @property
    def network(self) -> dict[str, Any]:
        """The keywords of ``networks.MLP`` that follow from the specification."""
        return {
            "hidden_features": self.hidden_features,
            "context_features": self.context_features,
            "activation": self.activation,
        }

    @property
    def one_hidden_width(self) -> int:
        """The width of all hidden layers, for networks that have just one; a ValueError if there are several."""
        widths = set(self.hidden_features)
        if len(widths) != 1:
            raise ValueError(f"this network has one hidden width, so {self.hidden_features} must all be equal")
        return widths.pop()


class NativeFlow(NamedTuple):
    """A library's own affine coupling flow, built and scored as its authors would: no bridge in between.

    Attributes:
        flow: the library's flow.
        log_prob: its own log-density, ``(batch, D)`` → ``(batch,)``.
        sample: draws so many samples.
        parameters: what a training changes.
    """

    flow: Any
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Any]
    parameters: list[Tensor]
