"""An nflows ``Flow`` that knows its shapes, and a standard normal that keeps its dtype."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

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
from adapters.parts import base_of, embedding_of, noise_shape_of, transform_of

Answer = TypeVar("Answer", Tensor, tuple[Tensor, Tensor])


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
    which knows its shapes and so can refuse wrong ones before they reach a layer. ``encode`` and ``decode`` turn data
    into noise and noise into data; ``transform`` and ``base`` are the two parts that it is made of.

    Args:
        transform: f, an nflows ``Transform``.
        distribution: the base, an nflows ``Distribution``.
        event_shape: shape of one datum.
        context_features: width of a context row; ``None`` if the flow takes no context.

    Raises:
        TypeError: in a call, for inputs, noise or a context that are no tensors, or of a dtype that the flow cannot
            take.
        ValueError: for inputs, noise or a context of another shape or on another device, or a context missing or
            superfluous.
        nflows.transforms.InverseNotAvailable: when a flow samples or decodes that can only score.
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

    @property
    def transform(self) -> Transform:
        """f, data → noise. It may be replaced: ``flow.transform = torch.compile(flow.transform)``."""
        return transform_of(self)

    @property
    def base(self) -> nflows.distributions.Distribution:
        """The distribution of the noise. It may be replaced."""
        return base_of(self)

    def __setattr__(self, name: str, value) -> None:
        """A new ``transform`` or ``base`` is kept where nflows looks for it; PyTorch would store it beside the old."""
        super().__setattr__({"transform": "_transform", "base": "_distribution"}.get(name, name), value)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats: ``(batch, *event)`` → ``(batch,)``."""
        self._check_inputs(inputs, context)
        return self._call(super().log_prob, inputs=inputs, context=context)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """f(x; context), the noise that the data are made of: ``(batch, *event)`` → ``(batch, *noise)``."""
        self._check_inputs(x, context)
        return self._call(super().transform_to_noise, inputs=x, context=context)

    def decode(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """f⁻¹(noise; context), the data made of this noise: ``(batch, *noise)`` → ``(batch, *event)``."""
        self._check(noise, "noise", noise_shape_of(self.base), "decode of this flow", context)
        return self._call(self._decode, noise=noise, context=context)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """nflows' name for ``encode``."""
        return self.encode(inputs, context)

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

    def _decode(self, noise: Tensor, context: Tensor | None) -> Tensor:
        return self.transform.inverse(noise, context=embedding_of(self)(context))[0]

    def _call(self, function: Callable[..., Answer], **tensors: Tensor | None) -> Answer:
        """``function`` of the tensors. What it says of none is what it says of one, less that one.

        So an empty batch reaches no layer: many a library's reshapes it to a size that nothing tells.
        """
        if any(tensor is not None and tensor.shape[:1] == (0,) for tensor in tensors.values()):
            one = {name: t if t is None else t.new_zeros(1, *t.shape[1:]) for name, t in tensors.items()}
            answer = function(**one)
            return answer[:0] if isinstance(answer, Tensor) else tuple(part[:0] for part in answer)  # type: ignore
        try:
            return function(**tensors)
        except (RuntimeError, TypeError, ValueError) as error:
            explain_mismatch(error.__context__ or error, self, "flow", **tensors)  # a network has spoken for itself
            raise

    def _check_inputs(self, inputs: Tensor, context: Tensor | None) -> None:
        self._check(inputs, "inputs", self.event_shape, "this flow", context)

    def _check(self, values: Tensor, role: str, shape: torch.Size | None, what: str, context: Tensor | None) -> None:
        """Raise an error unless ``values``, the ``role`` of this flow, and ``context`` can be given to ``what``."""
        check_tensor(values, f"the {role} of this flow")
        if not values.is_floating_point():
            explain_mismatch(TypeError(), self, "flow", **{role: values})
        if shape is not None:
            check_event(values, shape, what)
        self._check_context_of_samples(context)
        if context is not None:
            check_rows(context, values, "this flow")

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

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._apply_to(self.transform.inverse, inputs, context)

    def _apply_to(self, function: Callable, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_event(inputs, (self.features,), "this transform")
        check_context(context, self.context_features, inputs, "this transform")
        given = inputs if context is None else torch.cat((inputs, context), dim=1)
        outputs, log_det = function(given)
        return outputs[:, : self.features], log_det
