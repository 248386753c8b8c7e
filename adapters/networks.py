"""Conditioners: the networks that give a coupling or autoregressive layer its parameters."""

import inspect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, pixel_shuffle, pixel_unshuffle

from adapters.checks import check_tensor, explain_mismatch, naming_shape

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh, "elu": nn.ELU}
MAX_INPUT = 1e15  # the largest coordinate that a conditioner is given; larger ones are clamped to it
MAX_LOG_SCALE = 80.0  # the largest log-scale s of an affine layer: e^±80 is still a float32


class MLP(nn.Sequential):
    """A multilayer perceptron. A context, if there is one, is concatenated to the input.

    The last layer starts at zero, so that the coupling layer around it starts at the identity.

    Args:
        in_features: width of the input, ``(batch, in_features)``.
        out_features: width of the output, ``(batch, out_features)``.
        hidden_features: widths of the hidden layers.
        context_features: width of the context, ``(batch, context_features)``; ``None`` for no context.
        activation: a key of ``ACTIVATIONS``.
        dropout: probability of dropping a hidden unit in training.

    Raises:
        ValueError: for an activation that is not known.

    >>> MLP(2, 4, context_features=3)(torch.randn(5, 2), torch.randn(5, 3)).shape
    torch.Size([5, 4])
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

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """``(batch, in_features)`` and ``(batch, context_features)`` → ``(batch, out_features)``."""
        input = input if context is None else torch.cat((input, context), dim=1)
        if input.shape[1] == 0:  # with no input and no context the output is constant; the first layer needs a column
            input = input.new_zeros(input.shape[0], 1)
        return super().forward(input)


class ConvNet(nn.Module):
    """A residual convolutional network from some pixels of a square grey image to parameters of other pixels.

    It is the conditioner of a packed coupling layer that reads U pixels and transforms T: ``(batch, U)`` to
    ``(batch, P · T)``. The network works as follows.

    1. The U pixels are put in their places in the image, which is zero elsewhere. A second plane marks their places.
    2. Each 2 × 2 square of the two planes becomes one position with 8 channels.
    3. A 3 × 3 convolution is followed by one residual block for each hidden width: activation, 3 × 3 convolution,
       activation, 1 × 1 convolution.
    4. A last 1 × 1 convolution, which starts at zero, gives P numbers for each pixel, of which those for the T pixels
       are returned.

    If every other row and every other column is neither read nor written, they are left out of the image first. This is
    repeated as often as it applies, so that masks on a coarse grid get a small image.

    Args:
        reads, writes: 0/1 vectors over the image's H · W pixels. 1 marks the U pixels that the network is given, and
            the T pixels that it gives parameters for.
        parameters_per_coordinate: P.
        hidden_features: channels of the blocks, all equal.
        context_features: width of the context, ``(batch, context_features)``, which is mapped linearly to the channels
            and added after the first convolution.
        activation, dropout: as for ``MLP``.

    Raises:
        ValueError: unless the image is square with an even side, and the channels are equal; for an activation that is
            not known.

    >>> from adapters import checkerboard_mask
    >>> mask = checkerboard_mask(4, 4).flatten()
    >>> network = ConvNet(mask, 1 - mask, parameters_per_coordinate=2)
    >>> network(torch.randn(5, 8)).shape  # from half of 16 pixels, a scale and a shift for each of the others
    torch.Size([5, 16])
    """

    reads: Tensor
    writes: Tensor
    plane: Tensor

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
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """``(batch, U)`` and ``(batch, context_features)`` → ``(batch, P · T)``, parameter by parameter."""
        image = inputs.new_zeros(inputs.shape[0], self.side**2).index_copy(1, self.reads, inputs)
        image = pixel_unshuffle(image.view(-1, 1, self.side, self.side), 2)
        image = torch.cat((image, self.plane.expand(image.shape[0], -1, -1, -1)), dim=1)
        hidden = self.first(image.contiguous(memory_format=torch.channels_last))
        if context is not None and self.context is not None:
            hidden = hidden + self.context(context)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(self.activation(hidden))
        outputs = pixel_shuffle(self.last(self.activation(hidden)), 2).flatten(2)
        return outputs.index_select(2, self.writes).flatten(1)


NETS = ("mlp", "conv")


def conditioner(net: str, reads: Tensor, writes: Tensor, parameters_per_coordinate: int, **network) -> nn.Module:
    """The conditioner of a packed coupling layer, which reads some coordinates to give parameters for others.

    Args:
        net: ``mlp``, or ``conv`` for the pixels of a square image. A layer that reads fewer than 49 pixels gets an MLP
            in either case: so few are too coarse a grid for convolutions.
        reads, writes: 0/1 vectors over all D coordinates: those that the layer reads and those that it transforms.
        parameters_per_coordinate: how many numbers the layer takes for each coordinate that it transforms.
        network: keywords that ``MLP`` and ``ConvNet`` share.

    Raises:
        ValueError: for a net that is not known.

    >>> from adapters import checkerboard_mask
    >>> for side in (8, 28):
    ...     mask = checkerboard_mask(side, side).flatten()
    ...     print(type(conditioner("conv", mask, 1 - mask, parameters_per_coordinate=2)).__name__)
    MLP
    ConvNet
    """
    if not isinstance(net, str) or net not in NETS:
        raise ValueError(f"unknown net {net!r}; known: {', '.join(NETS)}")
    if net == "conv" and reads.sum() >= 49:
        return ConvNet(reads, writes, parameters_per_coordinate, **network)
    return MLP(int(reads.sum()), parameters_per_coordinate * int(writes.sum()), **network)


def check_activation(activation: str) -> None:
    """Raise a ValueError that lists the known names, if this is none of them.

    >>> check_activation("softmax")
    Traceback (most recent call last):
    ValueError: unknown activation 'softmax'; known: relu, silu, gelu, tanh, elu
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def within(values: Tensor, bound: float) -> Tensor:
    """The values, clamped to [−bound, bound]. NaN stays NaN.

    Layers clamp with it so that the density of a finite point is never NaN. Without it, a network's sums of huge
    numbers overflow to inf, and inf − inf is NaN; and a scale that overflows to inf makes NaN of 0. With it, a point
    far out has the log-density −inf at worst.

    >>> within(torch.tensor([-5.0, 0.5, math.inf, math.nan]), 1.0)
    tensor([-1.0000,  0.5000,  1.0000,     nan])
    """
    return hardtanh(values, -bound, bound)  # backward, it is one operation, where clamp takes four


def condition(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    """The network's output: ``network(inputs)``, or ``network(inputs, context)`` when there is a context.

    Raises:
        TypeError: if there is a context and the network has no second argument to take it, or it is no tensor.
        ValueError: if the network takes inputs or a context of another width.

    >>> condition(nn.Linear(2, 4), torch.ones(5, 2), context=torch.ones(5, 3))
    Traceback (most recent call last):
    TypeError: a context of shape (5, 3) was given, but Linear takes no context
    """
    arguments = (inputs,) if context is None else (inputs, context)
    if context is not None:
        check_tensor(context, "the context of this layer")
        try:
            inspect.signature(network.forward if isinstance(network, nn.Module) else network).bind(*arguments)
        except TypeError:
            name, shape = type(network).__name__, tuple(context.shape)
            raise TypeError(f"a context of shape {shape} was given, but {name} takes no context") from None
    try:
        return network(*arguments)
    except RuntimeError as error:
        if isinstance(network, nn.Module):
            explain_mismatch(error, network, "network", inputs=inputs, context=context)
        beside = "" if context is None else f" with a context of shape {tuple(context.shape)}"
        with naming_shape(inputs, f"the network {type(network).__name__}{beside}"):
            raise
