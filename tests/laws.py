"""Helpers for the laws that every transform and flow is held to, in float64, with parameters away from their start."""

import torch
from torch import Tensor, nn

from adapters.registry import Example, modules

EXAMPLES: dict[str, Example] = {
    f"{module.__name__.removeprefix('adapters.')}:{name}": example
    for package in ("adapters.layers", "adapters.bridges")
    for module in modules(package)
    for name, example in module.EXAMPLES.items()
}


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The module in float64, trained parameters moved by N(0, scale²): nothing passes because it is the identity."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context_for(features: int | None, rows: int, seed: int = 2) -> Tensor | None:
    return None if features is None else batch(rows, features, seed=seed)


def autograd_log_det(function, x: Tensor, context: Tensor | None) -> Tensor:
    """log|det J| of ``function(x, context) -> (y, log_det)`` at each row, from autograd's Jacobian."""
    rows = []
    for i in range(len(x)):
        row_context = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, c=row_context: function(row.unsqueeze(0), c)[0].squeeze(0), x[i]
        )
        size = x[i].numel()
        rows.append(torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet)
    return torch.stack(rows)
