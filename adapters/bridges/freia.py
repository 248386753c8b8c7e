"""FrEIA: its invertible networks and blocks in, any transform out.

FrEIA runs data → noise as nflows does, and ``rev=True`` the other way. It has no density class: a network of its is
trained with the loss z²/2 − log|det J|, so a whole network means the flow from a standard normal base.

A context row of ours holds all conditions of a network, each flattened, side by side.
"""

import copy
import math
from collections.abc import Callable
from functools import cache

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional

from adapters.checks import check_context, check_event
from adapters.flow import Flow, StandardNormal

PACKAGES = ("FrEIA",)
LIBRARIES = ("freia",)
DISTRIBUTION = "FrEIA"
EXTRA = "freia"


class FreiaTransform(Transform):
    """A ``SequenceINN``, ``GraphINN`` or single block of FrEIA: ``(batch, *event_shape)`` ↦ ``(batch, *noise_shape)``.

    The blocks of a network run one by one, since some of FrEIA's are wrong by themselves: see ``_ways_to_run``.

    An ``ActNorm`` not yet initialised takes its scale and shift from the first data it meets in training, and from
    nothing else (its own rule: from the first call, whatever it is).

    Raises:
        ValueError: for a block that has several inputs or outputs, is no bijection or has no exact log-determinant; in
            a call, for inputs or a context of another shape.
    """

    def __init__(self, module: nn.Module):
        from FrEIA.modules import ActNorm

        super().__init__()
        _check_exact(module)
        self.module = module
        self.ways = _ways_to_run(module)
        self.event_shape, self.noise_shape = _shapes(module)
        self.conditions = _conditions(module)  # key → shape
        self.context_features = sum(map(math.prod, self.conditions.values())) or None
        self.actnorms = [part for part in module.modules() if isinstance(part, ActNorm)]

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_event(inputs, self.event_shape, f"FrEIA's {type(self.module).__name__}")
        return self._run(inputs, context, self.noise_shape, rev=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_event(inputs, self.noise_shape, f"the inverse of FrEIA's {type(self.module).__name__}")
        return self._run(inputs, context, self.event_shape, rev=True)

    def _run(self, inputs: Tensor, context: Tensor | None, shape: tuple, rev: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, f"FrEIA's {type(self.module).__name__}")
        if inputs.shape[0] == 0:  # several blocks count the coordinates of their first row
            return inputs.new_zeros(0, *shape), inputs.new_zeros(0)
        (outputs,), log_det = _run(self.ways, self.module, (inputs,), self._split(context), rev)
        return outputs, log_det.expand(inputs.shape[0])

    def _split(self, context: Tensor | None) -> dict[int, Tensor]:
        if context is None:
            return {}
        parts = context.split([math.prod(shape) for shape in self.conditions.values()], dim=1)
        keyed = zip(self.conditions.items(), parts, strict=True)
        return {key: part.unflatten(1, shape) for (key, shape), part in keyed}

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        for actnorm in self.actnorms:  # FrEIA's own hook for this sets, in a copy of a network, the original's flag
            actnorm.init_on_next_batch = False


Values = tuple[Tensor, ...]


Way = Callable[[nn.Module, Values, dict[int, Tensor], bool], tuple[Values, Tensor]]


def _ways_to_run(module: nn.Module) -> dict[type, Way]:
    """How the blocks of each class in a network are run: by their own call, or by something that is right."""
    from FrEIA import modules

    special = {
        modules.ActNorm: _run_actnorm,
        modules.AllInOneBlock: _run_all_in_one,
        modules.HaarDownsampling: _run_copying,
        modules.InvertibleSigmoid: _run_sigmoid,
        modules.LearnedElementwiseScaling: _run_scaling,
        modules.OrthogonalTransform: _run_orthogonal,
    }
    ways = {}
    for kind in {type(part) for part in module.modules() if isinstance(part, modules.InvertibleModule)}:
        if not _is_network(kind):
            own = _run_block if kind.forward.__module__.startswith("FrEIA.") else _run_unchecked
            ways[kind] = next((way for wrong, way in special.items() if issubclass(kind, wrong)), own)
    return ways


def _is_network(kind: type) -> bool:
    """Whether it does nothing but run its blocks: a network of FrEIA's, or of a class that inherits its ``forward``."""
    return kind.forward.__module__.startswith("FrEIA.framework.")


def _run(ways: dict[type, Way], module, values: Values, conditions: dict[int, Tensor], rev: bool):
    """The outputs of a network or block, and its log-determinant as ``(batch,)`` or ``(1,)``."""
    way = ways.get(type(module))
    if way is not None:
        return way(module, values, conditions, rev)
    return (_run_graph if hasattr(module, "node_list") else _run_sequence)(ways, module, values, conditions, rev)


def _run_sequence(ways: dict[type, Way], network, values: Values, conditions: dict[int, Tensor], rev: bool):
    total = values[0].new_zeros(1)
    blocks = list(zip(network.module_list, network.conditions, strict=True))
    for block, key in reversed(blocks) if rev else blocks:
        values, log_det = _run(ways, block, values, {} if key is None else {0: conditions[key]}, rev)
        total = total + log_det
    return values, total


def _run_graph(ways: dict[type, Way], network, values: Values, conditions: dict[int, Tensor], rev: bool):
    total = values[0].new_zeros(1)
    starts, ends = (network.out_nodes, network.in_nodes) if rev else (network.in_nodes, network.out_nodes)
    known = dict(zip(((node, 0) for node in starts), values, strict=True))  # (node, which of its outputs) → value
    known.update(zip(((node, 0) for node in network.condition_nodes), conditions.values(), strict=True))
    for node in reversed(network.node_list) if rev else network.node_list:
        if node.module is None:  # a start, an end or a condition
            continue
        given = tuple(known[place] for place in (node.outputs if rev else node.inputs))
        outputs, log_det = _run(ways, node.module, given, {i: known[c, 0] for i, c in enumerate(node.conditions)}, rev)
        known.update(((node, i), output) for i, output in enumerate(outputs))
        total = total + log_det
    return tuple(known[(end.outputs if rev else end.inputs)[0]] for end in ends), total


def _run_block(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    if conditions:
        keyed = hasattr(block, "conditions")  # a sequence that has a forward of its own
        outputs, log_det = block(values, c=conditions if keyed else list(conditions.values()), rev=rev)
    else:
        outputs, log_det = block(values, rev=rev)
    if not isinstance(log_det, Tensor):  # a number, from some blocks
        log_det = torch.as_tensor(log_det, dtype=values[0].dtype, device=values[0].device)
    return (outputs,) if isinstance(outputs, Tensor) else outputs, log_det.reshape(-1)


def _run_copying(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """On copies, for what overwrites its input."""
    return _run_block(block, tuple(value.clone() for value in values), conditions, rev)


def _run_unchecked(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """A block of somebody else's: it may overwrite its input, or hold an ``ActNorm`` that would initialise itself."""
    if any(getattr(part, "init_on_next_batch", False) and (rev or not part.training) for part in block.modules()):
        block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        for part in block.modules():
            part.init_on_next_batch = False
    return _run_copying(block, values, conditions, rev)


def _run_all_in_one(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    if block.householder:  # it keeps its matrix, with a graph, in itself, where other threads and copies would meet it
        block = copy.copy(block)
    return _run_block(block, values, conditions, rev)


def _run_actnorm(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """FrEIA's initialises itself from noise, and in eval mode, too."""
    (x,) = values
    if block.init_on_next_batch and block.training and not rev:
        block._initialize_with_data(x)
    y = (x - block.bias) / block.scale.exp() if rev else x * block.scale.exp() + block.bias
    log_det = block.scale.sum().reshape(1) * math.prod(x.shape[2:])
    return (y,), -log_det if rev else log_det


def _run_sigmoid(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """FrEIA's sums an image's log-determinant over the channels alone, and overflows far from 0."""
    (x,) = values
    y = x.logit() if rev else x.sigmoid()
    logit = y if rev else x
    log_det = (functional.logsigmoid(logit) + functional.logsigmoid(-logit)).flatten(1).sum(1)
    return (y,), -log_det if rev else log_det


def _run_scaling(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """FrEIA's gives the inverse the log-determinant of the other direction."""
    log_scale = -block.s if rev else block.s
    return (values[0] * log_scale.exp(),), log_scale.sum().reshape(1)


def _run_orthogonal(block, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
    """FrEIA's takes its matrix for orthogonal, which training makes it only every 256 steps."""
    log_scale = block._log_e(block.scaling)
    log_det = log_scale.sum().reshape(1) + torch.linalg.slogdet(block.weights).logabsdet
    if not rev:  # in training it is called, so that its hook projects the matrix after some backward passes
        return (block if block.training else block.forward)(values)[0], log_det
    shifted = values[0] * (-log_scale).exp() - block.bias
    return (torch.linalg.solve(block.weights, shifted, left=False),), -log_det


_CORRECTIONS = _run_sigmoid, _run_scaling, _run_orthogonal


def transform_in(thing) -> Transform | None:
    """Any ``InvertibleModule``: a network or a block; an exported transform comes back as it went."""
    from FrEIA.modules import InvertibleModule

    if isinstance(thing, _exported()):
        return thing.transform
    return FreiaTransform(thing) if isinstance(thing, InvertibleModule) else None


def flow_in(thing) -> Flow | None:
    """A ``SequenceINN`` or ``GraphINN``, with the standard normal that FrEIA trains it against."""
    from FrEIA.framework import GraphINN, SequenceINN

    if not isinstance(thing, SequenceINN | GraphINN):
        return None
    transform = FreiaTransform(thing)
    like = next((p for p in thing.parameters() if p.is_floating_point()), torch.empty(0))
    base = StandardNormal(transform.noise_shape).to(like)
    return Flow(transform, base, transform.event_shape, transform.context_features)


def transform_out(transform: Transform, library: str, event_dim: int, conditional: bool) -> nn.Module:
    """An ``InvertibleModule``; ``sequence.append(exported.placed)`` and ``Node(…, exported.placed, {})`` take it in."""
    return _exported()(transform)


@cache
def _exported() -> type:
    """The class of exported transforms: it exists once FrEIA, its parent's package, has been imported."""
    from FrEIA.modules import InvertibleModule

    class NflowsModule(InvertibleModule):
        """An nflows transform as a FrEIA module."""

        __qualname__ = "NflowsModule"  # where pickle looks for it: see __getattr__

        def __init__(self, transform: Transform):
            super().__init__([])
            self.transform = transform

        def placed(self, dims_in, dims_c=None) -> "NflowsModule":
            """Itself, for inputs of these shapes: FrEIA's networks call a constructor where others take a module."""
            self.dims_in, self.dims_c = list(dims_in), list(dims_c or [])
            return self

        def forward(self, x_or_z, c=None, rev: bool = False, jac: bool = True) -> tuple[tuple[Tensor], Tensor]:
            context = torch.cat([part.flatten(1) for part in c], dim=1) if c else None
            outputs, log_det = (self.transform.inverse if rev else self.transform)(x_or_z[0], context)
            return (outputs,), log_det

        def output_dims(self, input_dims) -> list[tuple[int, ...]]:
            """Found by running a copy of the transform on zeros, since nflows' transforms don't say it."""
            transform = copy.deepcopy(self.transform).eval()
            like = next((p for p in transform.parameters() if p.is_floating_point()), torch.empty(0))
            context = like.new_zeros(1, sum(map(math.prod, self.dims_c))) if self.dims_c else None
            with torch.no_grad():
                return [tuple(transform(like.new_zeros(1, *input_dims[0]), context)[0].shape[1:])]

    return NflowsModule


def __getattr__(name: str) -> type:
    """The class of exported transforms by its name, so that pickles of them find it, in another process too."""
    if name == "NflowsModule":
        return _exported()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of a ``SequenceINN`` of the exported module and the loss that FrEIA's networks are trained with."""
    from FrEIA.framework import SequenceINN

    network = SequenceINN(*inputs.shape[1:])
    if context is None:
        network.append(exported.placed)
    else:
        network.append(exported.placed, cond=0, cond_shape=tuple(context.shape[1:]))
    return _log_prob(network, inputs, context)


def _log_prob(network: nn.Module, inputs: Tensor, context: Tensor | None) -> Tensor:
    noise, log_det = network(inputs, c=None if context is None else [context])
    noise = noise.flatten(1)
    return -0.5 * (noise**2).sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi) + log_det


def _check_exact(module: nn.Module) -> None:
    from FrEIA import modules

    reasons = {
        modules.IResNetLayer: "its log-determinant is a random estimate and its inverse an approximation",
        modules.InvAutoFC: "it is invertible only once trained to be, and has no log-determinant",
        modules.InvAutoConv2D: "it is invertible only once trained to be, and has no log-determinant",
        modules.GaussianMixtureModel: "it maps to several components at once",
    }
    for part in module.modules():
        for kind, reason in reasons.items():
            if isinstance(part, kind):
                raise ValueError(f"FrEIA's {kind.__name__} is no layer of a flow: {reason}")
        if isinstance(part, modules.HouseholderPerm) and part.conditional:
            raise ValueError("FrEIA's HouseholderPerm with a condition fails in FrEIA itself; without one it works")
        if isinstance(part, modules.InvertibleModule) and not _is_network(type(part)):
            for inner in list(part.modules())[1:]:
                if isinstance(inner, modules.InvertibleModule) and _ways_to_run(inner).get(type(inner)) in _CORRECTIONS:
                    raise ValueError(
                        f"{type(part).__name__} runs FrEIA's {type(inner).__name__} itself, which is wrong unless this "
                        "package runs it; make it a block of a SequenceINN or a GraphINN"
                    )


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of its one input and of its one output."""
    from FrEIA.framework import GraphINN, SequenceINN
    from FrEIA.modules import HaarDownsampling, HaarUpsampling, IRevNetDownsampling, IRevNetUpsampling

    if isinstance(module, SequenceINN):
        return [module.shapes[0], module.shapes[-1]]
    dims_in = module.dims_in
    if isinstance(dims_in[0], int):  # ActNorm overwrites the list of shapes by its one shape
        dims_in = [dims_in]
    for up, down in ((HaarUpsampling, HaarDownsampling), (IRevNetUpsampling, IRevNetDownsampling)):
        if isinstance(module, up):  # these keep the shape of their output there
            dims_in = down.output_dims(module, dims_in)
    dims_out = module.global_out_shapes if isinstance(module, GraphINN) else module.output_dims(dims_in)
    if len(dims_in) != 1 or len(dims_out) != 1:
        raise ValueError(
            f"FrEIA's {type(module).__name__} has {len(dims_in)} inputs, {len(dims_out)} outputs; a transform has one"
        )
    return [tuple(dims_in[0]), tuple(dims_out[0])]


def _conditions(module: nn.Module) -> dict[int, tuple[int, ...]]:
    """The shape of every condition, by its place in the list that FrEIA takes."""
    from FrEIA.framework import SequenceINN

    if isinstance(module, SequenceINN):
        keyed = zip(module.conditions, module.module_list, strict=True)
        return dict(sorted((key, tuple(block.dims_c[0])) for key, block in keyed if key is not None))
    return {key: tuple(shape) for key, shape in enumerate(module.dims_c)}
