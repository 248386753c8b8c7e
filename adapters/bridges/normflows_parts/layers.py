"""One layer of normflows as an nflows transform, and chains of them.

normflows' ``Composite`` and ``Reverse`` become nflows' ``CompositeTransform`` and ``InverseTransform``, since
``Composite`` adds up log-determinants in float32 and both drop the context. As in normflows, a chain runs noise → data
and lists the noise side first; one ``InverseTransform`` around the whole turns it round.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from nflows.transforms import CompositeTransform, InverseNotAvailable, InverseTransform, Transform
from normflows import flows
from normflows.nets.made import MADE
from normflows.nets.resnet import ResidualNet
from torch import Tensor, nn

from adapters.bridges.common.context import Width, one_width
from adapters.bridges.common.tensors import per_row
from adapters.bridges.normflows_parts.corrections import check_usable, run_in_float64, way_to_run
from adapters.checks import check_context, check_enough_rows, naming_shape


class NormflowsLayer(Transform):
    """A layer of normflows as an nflows transform: ``forward`` runs noise → data here as there.

    A layer that is wrong when normflows runs it is run in another way, which the table in ``corrections`` says.

    An ``ActNorm`` that is not yet initialised follows nflows' rule, not its own: it takes its scale and shift from the
    first data it meets in training; until then, and for noise, it uses the parameters it has.

    Args:
        layer: of a class of normflows, or derived from its ``Flow``.
        inverted: whether the chain runs it backwards, so that noise goes through its ``inverse``.

    Raises:
        InverseNotAvailable: for a layer without an ``inverse``; if it is inverted, only when ``inverse`` is called.
        ValueError: for a layer that is no bijection or whose log-determinant is random; in a call, for a context that
            is missing, superfluous or of another shape, or an input of another shape.
        nflows.transforms.base.InputOutsideDomain: in a call, for inputs outside [0, 1] of a spline with ``tails=None``,
            and for noise beyond the bound of a periodic layer.
    """

    def __init__(self, layer: nn.Module, inverted: bool = False):
        super().__init__()
        check_usable(layer)
        self.has_inverse = _has_inverse(layer)
        if not inverted and not self.has_inverse:
            raise InverseNotAvailable(
                f"{type(layer).__name__} runs noise → data only, so it cannot score data; "
                "normflows.flows.Reverse turns it into a flow that scores, and cannot sample"
            )
        self.layer = layer
        self.inverted = inverted
        self.context_features = _context_width_of(layer)
        self.drops_context = False  # unless the flow around it has one to give: see chain
        self.features = _features_of(layer)
        self.keeps_shape = not isinstance(layer, flows.Squeeze | flows.Split | flows.AffineCoupling)
        self.way = way_to_run(layer)
        self.actnorms: list[Any] = [part for part in layer.modules() if isinstance(part, flows.ActNorm)]
        self.name = f"normflows' {type(layer).__name__}"

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not self.has_inverse:
            raise InverseNotAvailable(f"{type(self.layer).__name__} has no inverse, so this flow cannot sample")
        return self._run(inputs, context, inverse=True)

    def _run(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """The layer's own ``forward``, or its ``inverse``."""
        tensor = inputs if isinstance(inputs, Tensor) else inputs[0]  # between a Split and a Merge, there are two
        shape = tensor.shape
        context = None if self.drops_context else context
        check_context(context, self.context_features, tensor, self.name)
        if self.features is not None and shape[1:2] != (self.features,):
            raise ValueError(f"{self.name} takes {self.features} features, not inputs of shape {tuple(shape)}")
        if self.keeps_shape and shape[0] == 0:  # which some layers cannot reshape
            return inputs.new_zeros(shape), inputs.new_zeros(0)
        layer: Any = self._modules["layer"]  # self.layer, which takes PyTorch ten times as long to find
        if self.actnorms:
            layer = self._ready(from_data=inverse != self.inverted)
            if layer is self.layer and not all(actnorm.data_dep_init_done for actnorm in self.actnorms):
                check_enough_rows(tensor, self.name)
        given = layer, inputs, () if self.context_features is None else (context,), inverse
        try:
            outputs, log_det = self.way(*given)
        except AssertionError:  # of a spline, whose discriminant rounding or a NaN has made negative
            outputs, log_det = run_in_float64(self.way, *given)
        except (RuntimeError, IndexError):
            with naming_shape(tensor, self.name):  # entered only now, since each layer would pay for it in each call
                raise
        if self.keeps_shape and outputs.shape != shape:
            raise ValueError(f"{self.name} takes no inputs of shape {tuple(shape)}")
        return outputs, per_row(log_det, tensor)

    def _ready(self, from_data: bool) -> nn.Module:
        """The layer; where an ActNorm in it would initialise itself in this call and should not, a copy that won't.

        The copy has the same parameters. The layer itself is left alone, since other threads may be running it.
        """
        if all(actnorm.data_dep_init_done or (from_data and actnorm.training) for actnorm in self.actnorms):
            return self.layer
        layer = copy.deepcopy(self.layer, {id(parameter): parameter for parameter in self.layer.parameters()})
        for name, buffer in layer.named_buffers():
            if name.rpartition(".")[2] == "data_dep_init_done":
                buffer.fill_(1)
        return layer


class NflowsLayer(flows.Flow):
    """The other way round: an nflows transform, data → noise, as a normflows layer, noise → data."""

    def __init__(self, transform: Transform):
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(z, context)


def single_layers(flow: Iterable[nn.Module]) -> list[NormflowsLayer]:
    """The layers of a normflows flow, noise side first, with every ``Composite`` and ``Reverse`` taken apart.

    Raises:
        ValueError: for a layer that takes or gives two tensors, at an end of the flow; and as ``NormflowsLayer``.
        InverseNotAvailable: as ``NormflowsLayer``.
    """
    layers = [layer for part in flow for layer in _taken_apart(part)]
    for at_data, layer in zip((False, True), layers[:1] + layers[-1:], strict=False):
        takes_two, gives_two = _two_tensors(layer.layer)
        if gives_two if at_data != layer.inverted else takes_two:
            name = type(layer.layer).__name__
            raise ValueError(f"{name} takes or gives two tensors at an end of the flow, where there is one")
    return layers


def _taken_apart(layer: Any, inverted: bool = False) -> Iterator[NormflowsLayer]:
    kind = type(layer)
    if kind.forward is flows.Composite.forward and kind.inverse is flows.Composite.inverse:
        for part in reversed(layer._flows) if inverted else layer._flows:
            yield from _taken_apart(part, inverted)
    elif kind.forward is flows.Reverse.forward and kind.inverse is flows.Reverse.inverse:
        yield from _taken_apart(layer.flow, not inverted)
    else:
        yield NormflowsLayer(layer, inverted)


def chain(layers: list[NormflowsLayer], conditional: bool) -> Transform:
    """The transform data → noise of a flow with these layers, noise side first.

    Args:
        conditional: whether it is given a context. The layers that read none then drop it; else they refuse it.
    """
    for layer in layers:
        layer.drops_context = conditional and layer.context_features is None
    if len(layers) == 1 and layers[0].inverted:
        return layers[0]
    parts = [InverseTransform(layer) if layer.inverted else layer for layer in layers]
    return InverseTransform(parts[0] if len(parts) == 1 else CompositeTransform(parts))


def data_shape(noise_shape: torch.Size, layers: list[NormflowsLayer]) -> torch.Size:
    """The shape of the data that layers make of noise: of normflows' own layers, only ``Squeeze`` changes it."""
    shape = noise_shape
    for layer in layers:
        if isinstance(layer.layer, flows.Squeeze):
            c, h, w = shape
            shape = torch.Size((4 * c, h // 2, w // 2) if layer.inverted else (c // 4, 2 * h, 2 * w))
    return shape


def _has_inverse(layer: Any) -> bool:
    """Whether a layer has the direction data → noise."""
    if isinstance(layer, flows.Planar):
        return layer.act == "leaky_relu"
    return type(layer).inverse is not flows.Flow.inverse


def _context_width_of(layer: Any) -> Width:
    """The width of the context that a layer reads.

    normflows' own layers take one by signature, but read it only if their network was built for one. Such a network,
    given none, either fails deep below or, as ``MADE`` does, silently does without.
    """
    if isinstance(layer, flows.CCAffineConst):
        return len(layer.s_cc)
    if len(inspect.signature(layer.inverse).parameters) < 2 or type(layer).__module__ == flows.mixing.__name__:
        return None
    made = [part for part in layer.modules() if isinstance(part, MADE)]
    residual = [part for part in layer.modules() if isinstance(part, ResidualNet)]
    if not made and not residual:
        return ...
    widths = [network.context_layer.in_features for network in made if hasattr(network, "context_layer")]
    widths += [network.context_features for network in residual]
    return one_width(widths, f"the context of normflows' {type(layer).__name__}")


def _features_of(layer: nn.Module) -> int | None:
    """The size of dimension 1 of a layer's inputs, if the layer knows it."""
    for kind, name in ((flows.AffineConstFlow, "s"), (flows.MaskedAffineFlow, "b"), (flows.Planar, "w")):
        if isinstance(layer, kind):
            return getattr(layer, name).shape[1]
    for part in layer.modules():
        if type(part).__module__.startswith("normflows.flows."):
            for name in ("features", "num_channels"):
                if isinstance(size := getattr(part, name, None), int):
                    return size
        if isinstance(part, MADE):
            return part.initial_layer.in_features
    return None


def _two_tensors(layer: nn.Module) -> tuple[bool, bool]:
    """Whether a layer takes, and whether it gives, a list of two tensors, in its own ``forward``."""
    if isinstance(layer, flows.AffineCoupling):
        return True, True
    return isinstance(layer, flows.Merge), isinstance(layer, flows.Split) and not isinstance(layer, flows.Merge)
