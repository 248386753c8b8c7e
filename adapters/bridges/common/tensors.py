"""Two small questions that every bridge asks about tensors."""

from itertools import chain

import torch
from torch import Tensor, nn


def like(module: nn.Module) -> Tensor:
    """A tensor of the module's dtype and device, for ``like(module).new_zeros(…)`` or ``other.to(like(module))``.

    It is the first parameter of floating-point numbers, or else the first such buffer. For a module that has neither it
    is of PyTorch's defaults.
    """
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def per_row(log_det: Tensor | float, inputs: Tensor, event_dim: int | None = None) -> Tensor:
    """A library's log-determinant at ``inputs`` ``(batch, …)`` as nflows wants it: ``(batch,)``.

    Args:
        log_det: one number for each row, or for all of them (a number, or a tensor that broadcasts with ``(batch,)``);
            or, as torch's transforms give it, one for each of the inputs' dimensions left of ``event_dim``, over which
            it is summed here. torch's ``StackTransform`` gives more than that: it forgets to sum over the datum's.
        inputs: of whose dtype and device the result is.
        event_dim: how many dimensions, from the last one on, the transform treats together; ``None`` for a whole datum.
    """
    left = 1 if event_dim is None else inputs.dim() - event_dim
    log_det = log_det.to(inputs) if isinstance(log_det, Tensor) else inputs.new_full((), log_det)
    if log_det.dim() <= left:  # one of shape (D,) is of D coordinates, even if there are as many rows
        log_det = log_det.expand(inputs.shape[:left])
    return log_det if log_det.dim() == 1 else log_det.flatten(1).sum(1)
