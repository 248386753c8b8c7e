"""An nflows transform as a ``Transform`` of torch's, to which zuko's and Pyro's bridges export."""

import copy
import math

import nflows.transforms
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from adapters.bridges.common.exports import EventDim, check_event_dim
from adapters.checks import check_tensor
from adapters.last_result import LastResult


class ExportedTransform(Transform, nn.Module):
    """An nflows transform as one of torch's. It runs noise → data or, for zuko, data → noise.

    Inputs may have any number of leading dimensions.

    torch computes a log_prob by two calls, ``x = t.inv(y)`` and ``t.log_abs_det_jacobian(x, y)``. Both need the same
    pass of the networks. So the inverse keeps its log-determinant, and the second call takes it: see ``LastResult``.

    Args:
        transform: an nflows transform, data → noise.
        event_dim: how many dimensions a datum has, if its noise has the same shape; else the shapes of a datum and of
            its noise.
        context: ``(*batch, C)``, broadcast with the batch of the input; ``None`` for no context.
        data_to_noise: which way ``__call__`` runs.

    Raises:
        TypeError, ValueError: for a wrong ``event_dim``: see ``check_event_dim``. In a call: for an input of too few
            dimensions; for a transform that changes the shape although ``event_dim`` is one number; for a context that
            is missing, is of another width than the transform's ``context_features``, or does not broadcast with the
            inputs.
    """

    bijective = True
    __hash__ = nn.Module.__hash__  # pyright: ignore[reportAssignmentType]  # torch's Transform has none
    __repr__ = nn.Module.__repr__  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        transform: nflows.transforms.Transform,
        event_dim: EventDim,
        context: Tensor | None = None,
        data_to_noise: bool = False,
    ):
        check_event_dim(event_dim)
        super().__init__()
        self.transform = transform
        self.context = context
        self.data_to_noise = data_to_noise
        self.shapes = None if isinstance(event_dim, int) else tuple(map(torch.Size, event_dim))
        self.dimensions = [event_dim] * 2 if isinstance(event_dim, int) else [len(shape) for shape in event_dim]
        ends = [constraints.independent(constraints.real, dimensions) for dimensions in self.dimensions]
        self.domain, self.codomain = ends if data_to_noise else reversed(ends)
        self.last = LastResult()

    @property
    def inv(self) -> Transform:
        """The other direction."""
        if self._inv is None:
            vars(self)["_inv"] = ExportedInverse(self)
        return vars(self)["_inv"]

    def condition(self, context: Tensor) -> "ExportedTransform":
        """The same transform, of the same parameters, with this context."""
        conditioned = copy.copy(self)
        vars(conditioned).update(context=context, last=self.last.sibling(self.transform))
        return conditioned

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|det dy/dx|, from one pass."""
        return self._run(x, to_noise=self.data_to_noise)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._run(y, to_noise=not self.data_to_noise)
        self.last.keep(-log_det, self.transform, x, y, self.context)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known = self.last.take(self.transform, x, y, self.context)
        if known is not None:
            return known
        # data → noise is the direction that every transform of a flow has
        return self._run(x, to_noise=True)[1] if self.data_to_noise else -self._run(y, to_noise=True)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._shape_after(shape, to_noise=self.data_to_noise)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._shape_after(shape, to_noise=not self.data_to_noise)

    def _shape_after(self, shape: torch.Size, to_noise: bool) -> torch.Size:
        if self.shapes is None:
            return shape
        before, after = self.shapes if to_noise else reversed(self.shapes)
        cut = len(shape) - len(before)
        if cut < 0 or shape[cut:] != before:
            raise ValueError(f"this transform takes shapes that end in {tuple(before)}, not {tuple(shape)}")
        return torch.Size((*shape[:cut], *after))

    def with_cache(self, cache_size: int = 1) -> "ExportedTransform":
        """Itself, without a cache: torch's cache would not notice that parameters have changed."""
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_inv": None}

    def _run(self, value: Tensor, to_noise: bool) -> tuple[Tensor, Tensor]:
        check_tensor(value, "the inputs of this transform")
        dimensions = self.dimensions[0 if to_noise else 1]
        if value.dim() < dimensions:
            raise ValueError(f"this transform takes inputs of at least {dimensions} dimensions, not {value.dim()}")
        batch, event = value.shape[: value.dim() - dimensions], value.shape[value.dim() - dimensions :]
        context = self.context
        if context is not None:
            check_tensor(context, "the context of this transform")
            batch = _broadcast(batch, context)
            context = context.expand(*batch, context.shape[-1]).reshape(math.prod(batch), context.shape[-1])
        flat = value
        if len(batch) != 1 or context is not None:
            flat = value.expand(*batch, *event).reshape(math.prod(batch), *event)
        try:
            outputs, log_det = (self.transform if to_noise else self.transform.inverse)(flat, context)
        except RuntimeError as error:  # such as PyTorch's own for matrices whose shapes do not fit
            _explain(self.transform, context, error)
            raise
        if outputs.shape[1:] != (event if self.shapes is None else self.shapes[1 if to_noise else 0]):
            both = [tuple(event), tuple(outputs.shape[1:])]
            datum, noise = both if to_noise else reversed(both)
            raise ValueError(
                f"this transform makes noise of shape {noise} of a datum of shape {datum}: export the whole flow, "
                f"which knows both, or say so to to_library by event_dim=({datum}, {noise})"
            )
        if len(batch) == 1:
            return outputs, log_det
        return outputs.reshape(*batch, *outputs.shape[1:]), log_det.reshape(batch)


class ExportedInverse(_InverseTransform):
    """The other direction of an ``ExportedTransform``. A copy of it still knows what it inverts, unlike torch's own."""

    def __getstate__(self) -> dict:
        return dict(self.__dict__)


def _explain(transform: nn.Module, context: Tensor | None, error: RuntimeError) -> None:
    """Raise a ValueError if a part of the transform wants another context, which then explains the error."""
    widths = (getattr(module, "context_features", None) for module in transform.modules())
    width = next((width for width in widths if width is not None), None)
    if not isinstance(width, int):
        return
    if context is None:
        raise ValueError(
            f"this transform is conditional: give it a context of shape (*batch, {width}) by .condition(context)"
        ) from error
    if context.shape[-1] != width:
        raise ValueError(
            f"this transform takes a context of shape (*batch, {width}), not {tuple(context.shape)}"
        ) from error


def _broadcast(batch: torch.Size, context: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(batch, context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"a context of shape {tuple(context.shape)} does not broadcast with a batch of {tuple(batch)}"
        ) from None
