"""What a file of the catalogue holds: the types of its arguments and results.

A file of the catalogue may have two dictionaries.

- ``FLOWS`` has the flows of ``build_flow``, by name. Each value is a function ``make(specification, **options)`` that
  returns the transform data → noise, as nflows' ``Transform`` or as the library's own.
- ``NATIVE_FLOWS`` has the flows that benchmarks time, by the name that they show. Each value is a function
  ``make(features, masks, hidden_features)`` that returns a ``NativeFlow``. Where a library's coupling layers can only
  split the coordinates into halves, it does so and uses only the number of masks.

A file with the same name as a bridge is for that bridge's library. It imports the library only when a flow is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nflows.transforms import Transform
from torch import Tensor


@dataclass(frozen=True)
class Specification:
    """The arguments that all flows of the catalogue share, so that a comparison between them is fair.

    Attributes:
        features: D, the width of the data.
        layers: how many layers.
        hidden_features: widths of each conditioner's hidden layers.
        context_features: width of the context; ``None`` for an unconditional flow.
        masks: one mask for each layer, from the noise side to the data side, each of D floats on the CPU;
            1 = unchanged.
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
        """The masks of a coupling flow; a ValueError if there is only one coordinate, with nothing to couple."""
        if self.features == 1:
            raise ValueError(
                "a coupling flow needs at least 2 features, not 1; "
                "an autoregressive one, such as masked-autoregressive, takes 1"
            )
        return self.masks

    @property
    def network(self) -> dict[str, Any]:
        """The keyword arguments of ``networks.MLP`` that the specification decides."""
        return {
            "hidden_features": self.hidden_features,
            "context_features": self.context_features,
            "activation": self.activation,
        }

    @property
    def one_hidden_width(self) -> int:
        """The width of the hidden layers, for networks in which all have the same; a ValueError if they differ."""
        widths = set(self.hidden_features)
        if len(widths) != 1:
            raise ValueError(f"this network has one hidden width, so {self.hidden_features} must all be equal")
        return widths.pop()


class NativeFlow(NamedTuple):
    """A library's own affine coupling flow, built and scored as its authors would: no bridge in between.

    Attributes:
        flow: the library's flow.
        log_prob: its own log-density, ``(batch, D)`` → ``(batch,)``.
        sample: draws that many samples.
        parameters: the parameters that a training changes.
    """

    flow: Any
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Any]
    parameters: list[Tensor]
