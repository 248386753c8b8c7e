"""An nflows ``Flow`` that knows its shapes, and a standard normal that keeps its dtype."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NoReturn, TypeVar

import nflows.distributions
import nflows.flows
import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.checks import (
    check_context,
    check_event,
    check_no_labels,
    check_rows,
    check_tensor,
    explain_mismatch,
    shown,
)
from adapters.parts import base_of, embedding_of, noise_shape_of, transform_of
from adapters.words import in_one_line, shape_in_words

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


class StandardNormal(nflows.distributions.StandardNormal):
    """The standard normal N(0, I), which draws samples of the dtype and on the device that it was moved to.

    nflows' own draws float32 always.

    Args:
        shape: of one sample.

    >>> base = StandardNormal([2])
    >>> base.log_prob(torch.zeros(1, 2)), base.double().sample(5).dtype  # −log 2π nats
    (tensor([-1.8379]), torch.float64)
    """

    def __init__(self, shape):
        with torch.device("cpu"):  # nflows makes a float64 constant, which not every device has
            super().__init__(shape)
        self._log_z = torch.zeros(()) + self._log_z.to(torch.get_default_dtype()).item()

    def __repr__(self) -> str:
        return f"StandardNormal({shape_in_words(self._shape)})"

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = (num_samples,) if context is None else (context.shape[0], num_samples)
        return torch.randn(*leading, *self._shape, dtype=self._log_z.dtype, device=self._log_z.device)


class Flow(nflows.flows.Flow):
    """log p(x) = log p_base(f(x)) + log|det J_f(x)|, with f = ``transform``, data → noise.

    It is an nflows ``Flow``, with ``log_prob``, ``sample`` and ``sample_and_log_prob``, each with a ``context``. Beyond
    that, it knows the shapes of its data and its context, and refuses wrong ones before they reach a layer. ``encode``
    turns data into noise, and ``decode`` noise into data. ``transform`` and ``base`` are the two parts it is made of.

    Args:
        transform: f, an nflows ``Transform``.
        distribution: the base, an nflows ``Distribution``.
        event_shape: shape of one datum.
        context_features: width of the context, ``(batch, context_features)``; ``None`` if the flow takes no context.

    Attributes:
        blueprint: the arguments of ``build_flow``, by name. Only a flow that ``build_flow`` made has it; a checkpoint
            holds it, so that ``load_flow`` can build the flow again.

    Raises:
        TypeError: in a call, for inputs, noise or a context that are no tensors, or of a dtype that the flow cannot
            take; for a number of samples that is no integer.
        ValueError: for inputs, noise or a context of another shape or on another device; for a context that is given
            but not wanted, or wanted but not given; for a number of samples below 1.
        nflows.transforms.InverseNotAvailable: when a flow is sampled or decodes whose transform has no inverse.

    >>> from adapters import build_flow
    >>> flow = build_flow("masked-affine", features=2)
    >>> x, log_prob = flow.sample_and_log_prob(5)
    >>> x.shape, log_prob.shape, torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-5)
    (torch.Size([5, 2]), torch.Size([5]), True)
    """

    blueprint: dict[str, Any]

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
        """f, data → noise. It may be replaced: ``flow.transform = torch.compile(flow.transform)``.

        >>> from adapters.preprocess import Standardize
        >>> flow = Flow(Standardize(torch.tensor([1.0]), torch.tensor([2.0])), StandardNormal([1]), event_shape=(1,))
        >>> noise, log_det = flow.transform(torch.tensor([[5.0]]))  # log_det is −log 2
        >>> noise, log_det
        (tensor([[2.]]), tensor([-0.6931]))
        """
        return transform_of(self)

    @property
    def base(self) -> nflows.distributions.Distribution:
        """The distribution of the noise. It may be replaced.

        >>> from adapters import build_flow
        >>> build_flow("masked-affine", features=2).base
        StandardNormal(2)
        """
        return base_of(self)

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute; a new ``transform`` or ``base`` replaces the old one under the name that nflows uses."""
        super().__setattr__({"transform": "_transform", "base": "_distribution"}.get(name, name), value)

    def __repr__(self) -> str:
        """One line; ``print(flow.transform)`` shows the layers."""
        made = vars(self).get("blueprint", {})
        what = [made["name"], f"{made['layers']} layer{'s' * (made['layers'] != 1)}"] if "name" in made else []
        what.append(f"data {shape_in_words(self.event_shape)}")
        if self.context_features is not None:
            width = self.context_features if isinstance(self.context_features, int) else "of any width"
            shape = getattr(self, "context_shape", None)  # of a library's flow, whose context may be no vector
            what.append(f"context {width if shape is None else shape_in_words(shape)}")
        return in_one_line(self, *what, f"base {type(self.base).__name__}")

    def forward(self, *args: Any) -> NoReturn:
        """Refused: a flow is no function of x.

        Raises:
            RuntimeError: always, as nflows does.

        >>> from adapters import build_flow
        >>> build_flow("masked-affine", features=2)(torch.zeros(1, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: a flow is not called: flow.log_prob(x) gives densities, flow.sample(n) draws, ...
        """
        raise RuntimeError(
            "a flow is not called: flow.log_prob(x) gives densities, flow.sample(n) draws, flow.encode(x) gives noise"
        )

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats: ``(batch, *event)`` → ``(batch,)``.

        >>> from adapters import build_flow
        >>> flow = build_flow("masked-affine", features=2)  # a new one is the identity: x is standard normal,
        >>> flow.log_prob(torch.zeros(1, 2)).detach()  # with the log-density −log 2π at 0
        tensor([-1.8379])
        """
        self._check_inputs(inputs, context)
        return self._call(super().log_prob, inputs=inputs, context=context)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """f(x; context), the noise that corresponds to the data: ``(batch, *event)`` → ``(batch, *noise)``.

        >>> from adapters.preprocess import Standardize
        >>> flow = Flow(Standardize(torch.tensor([1.0]), torch.tensor([2.0])), StandardNormal([1]), event_shape=(1,))
        >>> flow.encode(torch.tensor([[5.0]]))
        tensor([[2.]])
        """
        self._check_inputs(x, context)
        return self._call(super().transform_to_noise, inputs=x, context=context)

    def decode(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """f⁻¹(noise; context), the data that correspond to the noise: ``(batch, *noise)`` → ``(batch, *event)``.

        >>> from adapters.preprocess import Standardize
        >>> flow = Flow(Standardize(torch.tensor([1.0]), torch.tensor([2.0])), StandardNormal([1]), event_shape=(1,))
        >>> flow.decode(torch.tensor([[2.0]]))
        tensor([[5.]])
        """
        self._check(noise, "noise", noise_shape_of(self.base), "decode of this flow", context)
        return self._call(self._decode, noise=noise, context=context)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """nflows' name for ``encode``.

        >>> from adapters import build_flow
        >>> flow, x = build_flow("masked-affine", features=2), torch.randn(5, 2)
        >>> torch.equal(flow.transform_to_noise(x), flow.encode(x))
        True
        """
        return self.encode(inputs, context)

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Samples, ``(num_samples, *event)``; for a context of ``batch`` rows ``(batch, num_samples, *event)``.

        Args:
            num_samples: how many samples to draw, for each row of the context if there is one.
            batch_size: how many of them to draw at once; fewer take less memory. By default all.

        >>> from adapters import build_flow
        >>> flow = build_flow("masked-affine", features=2, context_features=3)
        >>> flow.sample(5, context=torch.randn(7, 3)).shape  # five for each of the seven contexts
        torch.Size([7, 5, 2])
        """
        self._check_context_of_samples(context)
        num_samples = _count("num_samples", num_samples)
        if batch_size is None:
            return self._call(partial(super().sample, num_samples), context=context)
        batch_size = _count("batch_size", batch_size)
        parts = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
        return torch.cat([self.sample(part, context) for part in parts], dim=0 if context is None else 1)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples, as ``sample`` gives them, and log p of each in nats, from the same pass through the transform.

        >>> from adapters import build_flow
        >>> flow = build_flow("masked-affine", features=2)
        >>> x, log_prob = flow.sample_and_log_prob(5)
        >>> torch.allclose(log_prob, flow.log_prob(x), atol=1e-5)
        True
        """
        self._check_context_of_samples(context)
        num_samples = _count("num_samples", num_samples)
        return self._call(partial(super().sample_and_log_prob, num_samples), context=context)

    def _decode(self, noise: Tensor, context: Tensor | None) -> Tensor:
        return self.transform.inverse(noise, context=embedding_of(self)(context))[0]

    def _call(self, function: Callable[..., Result], **tensors: Tensor | None) -> Result:
        """``function(**tensors)``, also for an empty batch, and with a clear error for a wrong dtype or device.

        An empty batch reaches no layer, since many libraries' layers reshape a batch to a size that cannot be inferred
        from no elements. The function is called on one row of zeros instead, whose result is left out.
        """
        if any(tensor is not None and tensor.shape[:1] == (0,) for tensor in tensors.values()):
            one_row = {name: t if t is None else t.new_zeros(1, *t.shape[1:]) for name, t in tensors.items()}
            result = function(**one_row)
            return result[:0] if isinstance(result, Tensor) else tuple(part[:0] for part in result)  # type: ignore
        try:
            return function(**tensors)
        except (RuntimeError, TypeError, ValueError) as error:
            # A network's message is about the network; its context is torch's own error, which tells the cause.
            explain_mismatch(error.__context__ or error, self, "flow", **tensors)
            raise

    def _check_inputs(self, inputs: Tensor, context: Tensor | None) -> None:
        self._check(inputs, "inputs", self.event_shape, "this flow", context)

    def _check(self, values: Tensor, role: str, shape: torch.Size | None, what: str, context: Tensor | None) -> None:
        """Raise an error unless ``values`` and ``context`` are of the dtype and shape that this flow takes.

        Args:
            values: inputs or noise, ``(batch, *shape)``.
            role: which of them, for messages.
            shape: of one row; ``None`` if nothing says it.
            what: is to take them, for messages.
        """
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


def _count(name: str, count: Any) -> int:
    """The number as an ``int``; a TypeError unless it is an integer, a ValueError unless it is positive."""
    if not isinstance(count, Integral) or isinstance(count, bool):
        raise TypeError(f"{name} must be a positive integer, not {shown(count)}")
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, not {count}")
    return int(count)


class ContextAsCoordinates(Transform):
    """A conditional transform of x, made of a transform of x and the context in one vector.

    It is for libraries whose coupling layers take no context: coordinates that a mask leaves unchanged condition the
    others just as a context does.

    Args:
        transform: of vectors ``(batch, features + context_features)``, x first. It leaves the context unchanged.
        features: width of x.
        context_features: width of the context.

    Raises:
        ValueError: in a call, for inputs or a context of another shape.

    >>> from adapters import MaskedCouplingLayer
    >>> mask = torch.tensor([0, 1])
    >>> layer = MaskedCouplingLayer(torch.zeros_like, lambda bz: bz.flip(1), mask)  # (x, c) ↦ (x + c, c)
    >>> shift = ContextAsCoordinates(layer, features=1, context_features=1)
    >>> shift(torch.tensor([[1.0]]), context=torch.tensor([[10.0]]))[0]
    tensor([[11.]])
    """

    def __init__(self, transform: Transform, features: int, context_features: int):
        super().__init__()
        self.transform, self.features, self.context_features = transform, features, context_features

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ↦ the first ``features`` coordinates of transform(x, context), and log|det J|, as a ``Transform`` does."""
        return self._apply_to(self.transform, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The way back, by the transform's own inverse."""
        return self._apply_to(self.transform.inverse, inputs, context)

    def _apply_to(self, function: Callable, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        check_event(inputs, (self.features,), "this transform")
        check_context(context, self.context_features, inputs, "this transform")
        outputs, log_det = function(inputs if context is None else torch.cat((inputs, context), dim=1))
        return outputs[:, : self.features], log_det
