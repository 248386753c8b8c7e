"""Helpers for the laws that every transform and flow is held to, in float64, with parameters away from their start."""

import torch
from torch import Tensor, nn


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


def assert_inputs_unchanged(function, *inputs: Tensor | None) -> None:
    """Law 1: no call changes the tensors that it is given."""
    given = [None if tensor is None else tensor.clone() for tensor in inputs]
    function(*given)
    for tensor, before in zip(given, inputs, strict=True):
        assert tensor is None or torch.equal(tensor, before), "the call has changed its inputs"


def autograd_log_det(function, x: Tensor, context: Tensor | None) -> Tensor:
    """log|det J| of ``function(x, context) -> (y, log_det)`` at each row, from autograd's Jacobian.

    Each row of y depends on its own row of x alone, so that the sum over the rows has all their Jacobians.
    """
    jacobians = torch.autograd.functional.jacobian(lambda rows: function(rows, context)[0].sum(0), x)
    size = x[0].numel()
    return torch.linalg.slogdet(jacobians.movedim(-x.dim(), 0).reshape(len(x), size, size)).logabsdet
