"""Conditioners: the networks inside a coupling layer."""

import inspect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh, "elu": nn.ELU}


class MLP(nn.Sequential):
    """A multilayer perceptron on the input and, if there is one, the context, side by side.

    The last layer starts at zero, so that the coupling layer around it starts at the identity.

    Args:
        in_features: width of the input, ``(batch, in_features)``.
        out_features: width of the output, ``(batch, out_features)``.
        hidden_features: widths of the hidden layers.
        context_features: width of the context, ``(batch, context_features)``; ``None`` for no context.
        activation: one of ``ACTIVATIONS``.
        dropout: probability of dropping a hidden unit in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        check_activation(activation)
        widths = [in_features + (context_features or 0), *hidden_features]
        layers = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        last = nn.Linear(widths[-1], out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self.hidden_features = widths[-1]  # nflows' splines read it, to scale their bins down for the start

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs if context is None else torch.cat((inputs, context), dim=1))


def check_activation(activation: str) -> None:
    """Raise a ValueError that lists the known names, if this is none of them."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def condition(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    """The network's answer: ``network(inputs)``, or ``network(inputs, context)`` when there is a context.

    Raises:
        TypeError: if there is a context and the network has no second argument to take it.
    """
    if context is None:
        return network(inputs)
    try:
        inspect.signature(network.forward if isinstance(network, nn.Module) else network).bind(inputs, context)
    except TypeError:
        name = type(network).__name__
        raise TypeError(f"a context of shape {tuple(context.shape)} was given, but {name} takes no context") from None
    return network(inputs, context)
