"""What every bridge needs to know about tensors: a module's dtype and device, and a log-determinant for each row."""

from itertools import chain

import torch
from torch import Tensor, nn


def like(module: nn.Module) -> Tensor:
    """A tensor of the module's dtype and device, for ``like(module).new_zeros(…)`` or ``other.to(like(module))``.

    It is the first parameter of floating-point numbers, or else the first such buffer. If the module has neither, it is
    an empty tensor of PyTorch's default dtype and device.
    """
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def per_row(log_det: Tensor | float, inputs: Tensor, event_dim: int | None = None) -> Tensor:
    """A library's log-determinant at ``inputs`` ``(batch, …)`` as nflows wants it: ``(batch,)``.

    Args:
        log_det: one number for each row, or one for all rows. torch's transforms give one number for each entry of the
            dimensions left of the last ``event_dim``; these are summed here to one for each row. Only torch's
            ``StackTransform`` gives even more numbers, because it forgets to sum; they are summed, too.
        inputs: the result has their dtype and device.
        event_dim: over how many of the last dimensions the library has summed; ``None`` for all of a datum's.
    """
    left = 1 if event_dim is None else inputs.dim() - event_dim
    log_det = log_det.to(inputs) if isinstance(log_det, Tensor) else inputs.new_full((), log_det)
    if log_det.dim() <= left:  # one of shape (D,) is of D coordinates, even if there are as many rows
        log_det = log_det.expand(inputs.shape[:left])
    return log_det if log_det.dim() == 1 else log_det.flatten(1).sum(1)
