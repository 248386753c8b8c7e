"""An nflows ``Flow`` that knows its shapes, and a standard normal that keeps its dtype."""

from collections.abc import Callable
from functools import partial

import nflows.distributions
import nflows.flows
import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.checks import (
    check_context,
    check_event,
    check_no_labels,
    check_positive,
    check_rows,
    check_tensor,
    explain_mismatch,
)


class StandardNormal(nflows.distributions.StandardNormal):
    """nflows' standard normal N(0, I), sampled in the dtype and on the device it was moved to (nflows': float32)."""

    def __init__(self, shape):
        with torch.device("cpu"):  # nflows makes a float64 constant, which not every device has
            super().__init__(shape)
        self._log_z = torch.zeros(()) + self._log_z.to(torch.get_default_dtype()).item()

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = (num_samples,) if context is None else (context.shape[0], num_samples)
        return torch.randn(*leading, *self._shape, dtype=self._log_z.dtype, device=self._log_z.device)


class Flow(nflows.flows.Flow):
    """log p(x) = log p_base(f(x)) + log|det J_f(x)|, with f = ``transform``, data → noise.

    An nflows ``Flow`` in every respect (``log_prob``, ``sample``, ``sample_and_log_prob``, each with ``context``),
    which knows its shapes and so can refuse wrong ones before they reach a layer.

    Args:
        transform: f, an nflows ``Transform``.
        distribution: the base, an nflows ``Distribution``.
        event_shape: shape of one datum.
        context_features: width of a context row; ``None`` if the flow takes no context.

    Raises:
        TypeError: in a call, for inputs or a context that are no tensors, or of a dtype that the flow cannot take.
        ValueError: for inputs or a context of another shape or on another device, or a context missing or superfluous.
    """

    def __init__(
        self,
        transform: Transform,
        distribution: nflows.distributions.Distribution,
        event_shape: tuple[int, ...],
        context_features: int | None = None,
    ):
        super().__init__(transform, distribution)
        self.event_shape = torch.Size(event_shape)
        self.context_features = context_features

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats: ``(batch, *event)`` → ``(batch,)``."""
        self._check_inputs(inputs, context)
        return self._call(super().log_prob, inputs=inputs, context=context)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """f(x; context): ``(batch, *event)`` → the noise that the datum is made of."""
        self._check_inputs(inputs, context)
        return self._call(super().transform_to_noise, inputs=inputs, context=context)

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """``(num_samples, *event)``, or ``(batch, num_samples, *event)`` for a context of ``batch`` rows.

        Args:
            batch_size: draw at most so many at once, for each row of the context, to save memory.
        """
        self._check_context_of_samples(context)
        if batch_size is None:
            return self._call(partial(super().sample, num_samples), context=context)
        check_positive(num_samples=num_samples, batch_size=batch_size)
        parts = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
        return torch.cat([self.sample(part, context) for part in parts], dim=0 if context is None else 1)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples, as ``sample``, and their log_prob from the same pass."""
        self._check_context_of_samples(context)
        return self._call(partial(super().sample_and_log_prob, num_samples), context=context)

    def _call(self, function: Callable, **tensors: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """``function`` of the tensors. What it says of none is what it says of one, less that one.

        So an empty batch reaches no layer: many a library's reshapes it to a size that nothing tells.
        """
        if any(tensor is not None and tensor.shape[:1] == (0,) for tensor in tensors.values()):
            one = {name: t if t is None else t.new_zeros(1, *t.shape[1:]) for name, t in tensors.items()}
            answer = function(**one)
            return answer[:0] if isinstance(answer, Tensor) else tuple(part[:0] for part in answer)
        try:
            return function(**tensors)
        except (RuntimeError, TypeError, ValueError) as error:
            explain_mismatch(error.__context__ or error, self, "flow", **tensors)  # a network has spoken for itself
            raise

    def _check_inputs(self, inputs: Tensor, context: Tensor | None) -> None:
        check_tensor(inputs, "the inputs of this flow")
        if not inputs.is_floating_point():
            explain_mismatch(TypeError(), self, "flow", inputs=inputs)
        check_event(inputs, self.event_shape, "this flow")
        self._check_context_of_samples(context)
        if context is not None:
            check_rows(context, inputs, "this flow")

    def _check_context_of_samples(self, context: Tensor | None) -> None:
        if context is not None:
            check_tensor(context, "the context of this flow")
        self._check_context(context)

    def _check_context(self, context: Tensor | None) -> None:
        if self.context_features is None:
            if context is not None:
                raise ValueError(
                    f"this flow is unconditional, but a context of shape {tuple(context.shape)} was given; "
                    "build it with context_features to condition it"
                )
        elif context is None:
            raise ValueError(f"this flow is conditional: give a context of shape (batch, {self.context_features})")
        else:
            check_no_labels(context, self.context_features, "the context of this flow")
            check_event(context, (self.context_features,), "the context of this flow")


class ContextAsCoordinates(Transform):
    """A transform of x and a context side by side that leaves the context unchanged, as a conditional one of x.

    Args:
        transform: of ``(batch, features + context_features)``.
        features, context_features: how many coordinates of each.
    """

    def __init__(self, transform: Transform, features: int, context_features: int):
        super().__init__()
        self.transform, self.features, self.context_features = transform, features, context_features

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform.inverse, inputs, context)

    def _apply_to(self, function: Callable, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_event(inputs, (self.features,), "this transform")
        check_context(context, self.context_features, inputs, "this transform")
        outputs, log_det = function(torch.cat((inputs, context), dim=1))
        return outputs[:, : self.features], log_det
