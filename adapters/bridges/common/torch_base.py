"""A distribution of torch, or of a library that builds on torch's, as the base of an nflows ``Flow``."""

import nflows.distributions
import torch
from torch import Tensor, nn


class TorchBase(nflows.distributions.Distribution):
    """A torch distribution as the base of an nflows ``Flow``. Its samples are differentiable if torch's are.

    Args:
        source: a module whose call on a context (or None) gives the torch distribution.
        shape: shape of one sample.
    """

    def __init__(self, source: nn.Module, shape: torch.Size):
        super().__init__()
        self.source = source
        self.shape = torch.Size(shape)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        log_prob = self.source(context).log_prob(inputs)
        return log_prob if log_prob.dim() == 1 else log_prob.flatten(1).sum(1)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        distribution = self.source(context)
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        if context is None:
            return draw((num_samples,))
        if distribution.batch_shape + distribution.event_shape == self.shape:  # it does not depend on the context
            return draw((len(context), num_samples))
        return draw((num_samples,)).transpose(0, 1)
