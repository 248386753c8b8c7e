"""Conditioners: the networks inside a coupling layer."""

import inspect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from adapters.checks import check_tensor, explain_mismatch, naming_shape

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
        widths = [in_features + (context_features or 0) or 1, *hidden_features]
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
        inputs = inputs if context is None else torch.cat((inputs, context), dim=1)
        if inputs.shape[1] == 0:  # nothing to go by: the network is its bias
            inputs = inputs.new_zeros(inputs.shape[0], 1)
        return super().forward(inputs)


class ConvNet(nn.Module):
    """A residual convolutional network from some pixels of a square grey image to parameters of other pixels.

    The pixels are laid out in the image, zero elsewhere, beside a plane that marks them; 2 × 2 squares become channels;
    then a 3 × 3 convolution, one block a hidden width (3 × 3, activation, 1 × 1, added to its input), and a last 1 × 1
    convolution, which starts at zero. Where every other row and column is neither read nor written, the image is the
    smaller one without them.

    Args:
        reads, writes: 0/1 vectors over the image's H · W pixels: what the network is given, what it is asked for.
        parameters_per_coordinate: P, how many numbers it gives for each of the latter.
        hidden_features: channels of the blocks, all equal.
        context_features: width of the context, ``(batch, context_features)``, which shifts the first channels.
        activation, dropout: as for ``MLP``.

    Calling it maps ``(batch, U)`` to ``(batch, P · T)``, as a packed coupling layer wants.

    Raises:
        ValueError: unless the image is square with an even side, and the channels are equal.
    """

    def __init__(
        self,
        reads: Tensor,
        writes: Tensor,
        parameters_per_coordinate: int,
        hidden_features: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.side = math.isqrt(reads.numel())
        if self.side**2 != reads.numel() or self.side % 2:
            raise ValueError(f"net conv needs square images with an even side, not {reads.numel()} pixels")
        if len(set(hidden_features)) != 1:
            raise ValueError(f"net conv has one number of channels, so {tuple(hidden_features)} must all be equal")
        check_activation(activation)
        channels = hidden_features[0]
        reads, writes = (plane.view(self.side, self.side) for plane in (reads, writes))
        while self.side % 4 == 0 and (reads + writes).count_nonzero() == (reads + writes)[::2, ::2].count_nonzero():
            reads, writes, self.side = reads[::2, ::2], writes[::2, ::2], self.side // 2
        self.first = nn.Conv2d(8, channels, 3, padding=1)
        device = self.first.weight.device  # torch's default one, wherever the masks were made
        self.register_buffer("reads", reads.flatten().nonzero().flatten().to(device), persistent=False)
        self.register_buffer("writes", writes.flatten().nonzero().flatten().to(device), persistent=False)
        plane = pixel_unshuffle(reads[None, None].to(self.first.weight), 2)
        self.register_buffer("plane", plane, persistent=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                ACTIVATIONS[activation](),
                nn.Dropout(dropout),
                nn.Conv2d(channels, channels, 1),
            )
            for _ in hidden_features
        )
        self.activation = ACTIVATIONS[activation]()
        self.context = None if context_features is None else nn.Linear(context_features, channels)
        self.last = nn.Conv2d(channels, 4 * parameters_per_coordinate, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        image = inputs.new_zeros(inputs.shape[0], self.side**2).index_copy(1, self.reads, inputs)
        image = pixel_unshuffle(image.view(-1, 1, self.side, self.side), 2)
        image = torch.cat((image, self.plane.expand(image.shape[0], -1, -1, -1)), dim=1)
        hidden = self.first(image.contiguous(memory_format=torch.channels_last))
        if context is not None:
            hidden = hidden + self.context(context)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(self.activation(hidden))
        outputs = pixel_shuffle(self.last(self.activation(hidden)), 2).flatten(2)
        return outputs.index_select(2, self.writes).flatten(1)


NETS = ("mlp", "conv")


def conditioner(net: str, reads: Tensor, writes: Tensor, parameters_per_coordinate: int, **network) -> nn.Module:
    """The conditioner of a packed coupling layer that reads and writes these coordinates, 0/1 vectors over all D.

    Args:
        net: ``mlp``, or ``conv`` for the pixels of a square image. Where there is next to nothing to read, ``conv``
            too is an MLP.
        network: the keywords of ``MLP`` and ``ConvNet`` alike.

    Raises:
        ValueError: for a net that is not known.
    """
    if not isinstance(net, str) or net not in NETS:
        raise ValueError(f"unknown net {net!r}; known: {', '.join(NETS)}")
    if net == "conv" and reads.sum() >= 49:
        return ConvNet(reads, writes, parameters_per_coordinate, **network)
    return MLP(int(reads.sum()), parameters_per_coordinate * int(writes.sum()), **network)


def check_activation(activation: str) -> None:
    """Raise a ValueError that lists the known names, if this is none of them."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def condition(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    """The network's answer: ``network(inputs)``, or ``network(inputs, context)`` when there is a context.

    Raises:
        TypeError: if there is a context and the network has no second argument to take it, or it is no tensor.
        ValueError: if the network takes inputs or a context of another width.
    """
    given = (inputs,) if context is None else (inputs, context)
    if context is not None:
        check_tensor(context, "the context of this layer")
        try:
            inspect.signature(network.forward if isinstance(network, nn.Module) else network).bind(*given)
        except TypeError:
            name, shape = type(network).__name__, tuple(context.shape)
            raise TypeError(f"a context of shape {shape} was given, but {name} takes no context") from None
    try:
        return network(*given)
    except RuntimeError as error:
        if isinstance(network, nn.Module):
            explain_mismatch(error, network, "network", inputs=inputs, context=context)
        beside = "" if context is None else f" with a context of shape {tuple(context.shape)}"
        with naming_shape(inputs, f"the network {type(network).__name__}{beside}"):
            raise
