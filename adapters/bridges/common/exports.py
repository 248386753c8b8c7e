"""What ``to_library`` has to know: the shapes of a transform's data and noise, and a whole flow's transform."""

from collections.abc import Iterator, Sequence

from nflows import transforms
from nflows.distributions import Distribution
from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.parts import base_of, embedding_of, event_shape_of, inner_of, noise_shape_of, parts_of, transform_of

# The number of a datum's dimensions or, for a transform that changes the shape, the shapes of a datum and of its noise.
EventDim = int | tuple[Sequence[int], Sequence[int]]


def check_event_dim(event_dim: EventDim) -> None:
    """Raise a TypeError or ValueError unless it is a number of dimensions, or the shapes of a datum and its noise."""
    if isinstance(event_dim, int) and not isinstance(event_dim, bool):
        if event_dim < 0:
            raise ValueError(f"event_dim must be at least 0, not {event_dim}")
    elif not (isinstance(event_dim, tuple | list) and len(event_dim) == 2 and all(map(_is_shape, event_dim))):
        raise TypeError(
            "event_dim is the number of a datum's dimensions, such as 3, or the shapes of a datum and of its noise, "
            f"such as ((1, 28, 28), (784,)), not {event_dim!r}"
        )


def check_shapes_known(transform: Transform, event_dim: EventDim) -> None:
    """Raise a ValueError if ``event_dim`` is one number, and the transform is known to change the shape of a datum."""
    changes = list(_changes(transform))
    if len(changes) == 1 and isinstance(event_dim, int):
        raise ValueError(
            f"{changes[0]} changes the shape of a datum: export the whole flow, which knows the shapes of its data and "
            "of its noise, or say them to to_library, as event_dim=((1, 28, 28), (784,))"
        )


def _changes(transform: Transform) -> Iterator[str]:
    """The names of the parts that are known to change the shape; two of them may undo each other."""
    if isinstance(transform, transforms.CompositeTransform):
        for part in parts_of(transform):
            yield from _changes(part)
    elif isinstance(transform, transforms.InverseTransform):
        yield from _changes(inner_of(transform))
    elif isinstance(transform, transforms.SqueezeTransform | transforms.MultiscaleCompositeTransform):
        yield type(transform).__name__
    elif not getattr(transform, "keeps_shape", True):  # of a library's transform that a bridge has adapted
        yield str(transform.name)


def event_dim_of(flow: Flow) -> EventDim:
    """The dimensions of one datum of the flow or, if its noise has another shape, both shapes.

    Raises:
        ValueError: for a flow of nflows' own whose base does not say the shape of one sample.
    """
    base = base_of(flow)
    datum, noise = event_shape_of(flow), noise_shape_of(base)
    if datum is None:
        raise ValueError(
            f"neither the flow nor its base, {type(base).__name__}, says the shape of one datum: give an event_dim"
        )
    return len(datum) if noise is None or noise == datum else (tuple(datum), tuple(noise))


def reads_context(flow: Flow) -> bool:
    """Whether the flow takes a context: as it says itself or, if it does not say, as any module in it says."""
    width = getattr(flow, "context_features", ...)
    if width is not ...:
        return width is not None
    widths = (getattr(module, "context_features", None) for module in flow.modules())
    return not isinstance(embedding_of(flow), nn.Identity) or any(isinstance(width, int) for width in widths)


def whole_transform(flow: Flow) -> Transform:
    """The flow's transform. It takes the context that the flow takes, which an embedding network may change first."""
    transform, embedding_net = transform_of(flow), embedding_of(flow)
    return transform if isinstance(embedding_net, nn.Identity) else EmbeddedContext(transform, embedding_net)


class EmbeddedContext(Transform):
    """A conditional transform with the embedding network of its flow, which maps the context before it is used."""

    context_features = ...  # unknown, since a network need not tell the width of its inputs

    def __init__(self, transform: Transform, embedding_net: nn.Module):
        super().__init__()
        self.transform, self.embedding_net = transform, embedding_net

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(inputs, self.embedding_net(context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.transform.inverse(inputs, self.embedding_net(context))


class EmbeddedBase(Distribution):
    """A conditional base with the embedding network of its flow, which maps the context before it is used."""

    def __init__(self, base: Distribution, embedding_net: nn.Module):
        super().__init__()
        self.base, self.embedding_net, self.shape = base, embedding_net, noise_shape_of(base)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return self.base.log_prob(inputs, self.embedding_net(context))

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self.base.sample(num_samples, self.embedding_net(context))


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list)
