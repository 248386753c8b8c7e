"""The width of the context that a library's flow reads, found from the widths that its parts read."""

from collections.abc import Iterable
from types import EllipsisType

import nflows.distributions
import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.checks import check_event
from adapters.flow import Flow

# The width of the context that something reads: None if it reads none, ... if it does not say how wide.
Width = int | EllipsisType | None


def one_width(widths: Iterable[Width], what: str) -> Width:
    """The width of the one context that goes to every part of a flow.

    Args:
        widths: of each part. ``None`` is for a part that ignores a context, 0 for one that fails if it is given one.
        what: the context, as the error names it.

    Returns:
        The width that the parts agree on; ``...`` if some part may read a context and none tells how wide; ``None`` if
        no part reads one.

    Raises:
        ValueError: if two parts want contexts of different widths.
    """
    found = dict.fromkeys(width for width in widths if width is not None)
    known = [width for width in found if width is not ...]
    if len(known) > 1:
        raise ValueError(f"the parts of {what} do not agree about its width: {', '.join(map(str, known))}")
    if known:
        return known[0] or None
    return ... if found else None


class AnyContextFlow(Flow):
    """A ``Flow`` whose context has no one known width: its parts do not tell it, or a row of it is no vector.

    Args:
        transform, distribution, event_shape: as for ``Flow``.
        needs_context: whether some part is known to read a context. A missing context is then an error.
        context_shape: of one row, such as an image's; by default not known, and a context of any shape is handed on.
    """

    def __init__(
        self,
        transform: Transform,
        distribution: nflows.distributions.Distribution,
        event_shape: torch.Size,
        needs_context: bool,
        context_shape: torch.Size | None = None,
    ):
        super().__init__(transform, distribution, event_shape, context_features=...)  # type: ignore[arg-type]
        self.needs_context, self.context_shape = needs_context, context_shape

    def _check_context(self, context: Tensor | None) -> None:
        if context is None and self.needs_context:
            row = "…" if self.context_shape is None else ", ".join(map(str, self.context_shape))
            raise ValueError(f"this flow is conditional: give a context of shape (batch, {row})")
        if context is not None and self.context_shape is not None:
            check_event(context, self.context_shape, "the context of this flow")
