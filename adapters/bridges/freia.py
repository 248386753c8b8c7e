"""FrEIA: its invertible networks and blocks in, any transform out.

FrEIA runs data → noise as nflows does, and ``rev=True`` the other way. It has no density class: a network of its is
trained with the loss z²/2 − log|det J|, so a whole network means the flow from a standard normal base.

A context row of ours holds all conditions of a network, each flattened, side by side.
"""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional

from adapters.bridges.common.on_demand import class_on_demand
from adapters.bridges.common.tensors import like, per_row
from adapters.checks import check_context, check_enough_rows, check_event
from adapters.flow import Flow, StandardNormal

PACKAGES = ("FrEIA",)
LIBRARIES = ("freia",)
DISTRIBUTION = "FrEIA"
EXTRA = "freia"


Values = tuple[Tensor, ...]
# From a block, its inputs, its conditions by key, and whether it runs in reverse, to its outputs and log-determinant.
Run = Callable[[Any, Values, dict[int, Tensor], bool], tuple[Values, Tensor | float]]


class FreiaTransform(Transform):
    """A ``SequenceINN``, ``GraphINN`` or single block of FrEIA: ``(batch, *event_shape)`` ↦ ``(batch, *noise_shape)``.

    The blocks of a network run one by one, since some of FrEIA's are wrong by themselves: see ``_corrections``.

    An ``ActNorm`` not yet initialised takes its scale and shift from the first data it meets in training, and from
    nothing else (its own rule: from the first call, whatever it is).

    Raises:
        ValueError: for a block that has several inputs or outputs, is no bijection or has no exact log-determinant; in
            a call, for inputs or a context of another shape.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        _check_exact(module)
        self.module = module
        self.name = f"FrEIA's {type(module).__name__}"
        self.ways = _ways_to_run(module)
        self.event_shape, self.noise_shape = _shapes(module)
        self.conditions = _conditions(module)  # key → shape
        self.context_features = sum(map(math.prod, self.conditions.values())) or None
        self.register_load_state_dict_post_hook(_keep_what_was_loaded)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_event(inputs, self.event_shape, self.name)
        return self._run_all(inputs, context, self.noise_shape, rev=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        check_event(inputs, self.noise_shape, f"the inverse of {self.name}")
        return self._run_all(inputs, context, self.event_shape, rev=True)

    def _run_all(self, inputs: Tensor, context: Tensor | None, shape: tuple, rev: bool) -> tuple[Tensor, Tensor]:
        check_context(context, self.context_features, inputs, self.name)
        if inputs.shape[0] == 0:  # several blocks count the coordinates of their first row
            return inputs.new_zeros(0, *shape), inputs.new_zeros(0)
        (outputs,), log_det = self._run(self.module, (inputs,), self._split(context), rev)
        return outputs, log_det

    def _split(self, context: Tensor | None) -> dict[int, Tensor]:
        if context is None:
            return {}
        parts = context.split([math.prod(shape) for shape in self.conditions.values()], dim=1)
        keyed = zip(self.conditions.items(), parts, strict=True)
        return {key: part.unflatten(1, shape) for (key, shape), part in keyed}

    def _run(self, module: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
        """The outputs of a block, or of a network by running its blocks, and its log-determinant ``(batch,)``."""
        way = self.ways.get(type(module))
        if way is not None:
            outputs, log_det = way(module, values, conditions, rev)
            return outputs, per_row(log_det, values[0])
        if hasattr(module, "node_list"):
            return self._run_graph(module, values, conditions, rev)
        total = values[0].new_zeros(len(values[0]))
        blocks = list(zip(module.module_list, module.conditions, strict=True))
        for block, key in reversed(blocks) if rev else blocks:
            values, log_det = self._run(block, values, {} if key is None else {0: conditions[key]}, rev)
            total = total + log_det
        return values, total

    def _run_graph(self, graph: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
        total = values[0].new_zeros(len(values[0]))
        starts, ends = (graph.out_nodes, graph.in_nodes) if rev else (graph.in_nodes, graph.out_nodes)
        known = dict(zip(((node, 0) for node in starts), values, strict=True))  # (node, which of its outputs) → value
        known.update(zip(((node, 0) for node in graph.condition_nodes), conditions.values(), strict=True))
        for node in reversed(graph.node_list) if rev else graph.node_list:
            if node.module is None:  # a start, an end or a condition
                continue
            inputs = tuple(known[place] for place in (node.outputs if rev else node.inputs))
            given = {key: known[condition, 0] for key, condition in enumerate(node.conditions)}
            outputs, log_det = self._run(node.module, inputs, given, rev)
            known.update(((node, index), output) for index, output in enumerate(outputs))
            total = total + log_det
        return tuple(known[(end.outputs if rev else end.inputs)[0]] for end in ends), total


def _keep_what_was_loaded(transform: Any, _) -> None:
    """Let no ``ActNorm`` initialise itself any more: FrEIA's own hook for this, in a copy, does it to the original."""
    for block in transform.modules():
        if hasattr(block, "init_on_next_batch"):
            block.init_on_next_batch = False


def _is_network(kind: type) -> bool:
    """Whether it does nothing but run its blocks: a network of FrEIA's, or of a class that inherits its ``forward``."""
    return kind.forward.__module__.startswith("FrEIA.framework.")


class Correction(NamedTuple):
    """How the blocks of one class are run, and what would be wrong if they ran themselves."""

    kind: type
    wrong: str
    run: Run


@cache
def _corrections() -> list[Correction]:
    from FrEIA import modules

    return [
        Correction(modules.ActNorm, "it initialises itself from noise and in eval mode, too", _run_guarded),
        Correction(modules.HaarDownsampling, "it overwrites its input", _run_guarded),
        Correction(modules.AllInOneBlock, "it keeps a matrix of its last call, with its graph", _run_all_in_one),
        Correction(
            modules.InvertibleSigmoid,
            "it sums the log-determinant of an image over the channels alone, and overflows far from 0",
            _run_sigmoid,
        ),
        Correction(
            modules.LearnedElementwiseScaling,
            "it gives the inverse the log-determinant of the other direction",
            _run_scaling,
        ),
        Correction(
            modules.OrthogonalTransform,
            "it takes its matrix for orthogonal, which training makes it only once in many steps",
            _run_orthogonal,
        ),
    ]


def _correction(block: nn.Module) -> Correction | None:
    return next((correction for correction in _corrections() if isinstance(block, correction.kind)), None)


def _ways_to_run(module: nn.Module) -> dict[type, Run]:
    """How the blocks of each class in a network are run: by their own call, or by something that is right."""
    from FrEIA.modules import InvertibleModule

    ways = {}
    for block in module.modules():
        kind = type(block)
        if isinstance(block, InvertibleModule) and not _is_network(kind):
            correction = _correction(block)
            own = _run_itself if kind.forward.__module__.startswith("FrEIA.") else _run_guarded
            ways[kind] = correction.run if correction else own
    return ways


def _run_itself(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor | float]:
    if conditions:
        keyed = hasattr(block, "conditions")  # a sequence that has a forward of its own
        outputs, log_det = block(values, c=conditions if keyed else list(conditions.values()), rev=rev)
    else:
        outputs, log_det = block(values, rev=rev)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return outputs, log_det.reshape(-1) if isinstance(log_det, Tensor) else log_det


def _run_guarded(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor | float]:
    """A block that may overwrite its input, or hold an ``ActNorm`` that would initialise itself: on copies of both."""
    if any(getattr(part, "init_on_next_batch", False) and (rev or not part.training) for part in block.modules()):
        block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        for part in block.modules():
            part.init_on_next_batch = False
    elif any(getattr(part, "init_on_next_batch", False) for part in block.modules()):
        check_enough_rows(values[0], f"FrEIA's {type(block).__name__}")
    return _run_itself(block, tuple(value.clone() for value in values), conditions, rev)


def _run_all_in_one(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool):
    if block.householder:  # then it keeps its matrix in itself, where other threads and copies would meet it
        block = copy.copy(block)
    return _run_itself(block, values, conditions, rev)


def _run_sigmoid(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool):
    (x,) = values
    y = x.logit() if rev else x.sigmoid()
    logit = y if rev else x
    log_det = (functional.logsigmoid(logit) + functional.logsigmoid(-logit)).flatten(1).sum(1)
    return (y,), -log_det if rev else log_det


def _run_scaling(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool):
    log_scale = -block.s if rev else block.s
    return (values[0] * log_scale.exp(),), log_scale.sum()


def _run_orthogonal(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool):
    log_scale = block._log_e(block.scaling)
    log_det = log_scale.sum() + torch.linalg.slogdet(block.weights).logabsdet
    if not rev:  # in training it is called, so that its hook projects the matrix after some backward passes
        return (block if block.training else block.forward)(values)[0], log_det
    shifted = values[0] * (-log_scale).exp() - block.bias
    return (torch.linalg.solve(block.weights, shifted, left=False),), -log_det


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
    base = StandardNormal(transform.noise_shape).to(like(thing))
    return Flow(transform, base, transform.event_shape, transform.context_features)


def transform_out(transform: Transform, library: str, event_dim: Any, conditional: bool) -> nn.Module:
    """An ``InvertibleModule``; ``sequence.append(exported.placed)`` and ``Node(…, exported.placed, {})`` take it in."""
    return _exported()(transform)


def native_log_prob(exported: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of a ``SequenceINN`` of the exported module and the loss that FrEIA's networks are trained with."""
    from FrEIA.framework import SequenceINN

    network = SequenceINN(*inputs.shape[1:])
    if context is None:
        network.append(exported.placed)
        noise, log_det = network(inputs)
    else:
        network.append(exported.placed, cond=0, cond_shape=tuple(context.shape[1:]))
        noise, log_det = network(inputs, c=[context])
    noise = noise.flatten(1)
    return -0.5 * (noise**2).sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi) + log_det


@class_on_demand
def _exported() -> type:
    from FrEIA.modules import InvertibleModule

    class NflowsModule(InvertibleModule):
        """An nflows transform as a FrEIA module."""

        def __init__(self, transform: Transform):
            super().__init__([])
            self.transform = transform

        def placed(self, dims_in, dims_c=None) -> "NflowsModule":
            """Itself, for inputs of these shapes: FrEIA's networks call a constructor where others take a module."""
            self.dims_in, self.dims_c = list(dims_in), list(dims_c or [])
            return self

        def forward(self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True):
            context = torch.cat([part.flatten(1) for part in c], dim=1) if c else None
            outputs, log_det = (self.transform.inverse if rev else self.transform)(x_or_z[0], context)
            return (outputs,), log_det

        def output_dims(self, input_dims: Any) -> Any:
            """Found by running a copy of the transform on zeros, since nflows' transforms don't say it."""
            transform = copy.deepcopy(self.transform).eval()
            one = like(transform)
            context = one.new_zeros(1, sum(map(math.prod, self.dims_c))) if self.dims_c else None
            with torch.no_grad():
                return [tuple(transform(one.new_zeros(1, *input_dims[0]), context)[0].shape[1:])]

    return NflowsModule


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
            _check_runs_none_that_is_wrong(part)


def _check_runs_none_that_is_wrong(block: nn.Module) -> None:
    for inner in list(block.modules())[1:]:
        correction = _correction(inner)
        if correction and correction.run in (_run_sigmoid, _run_scaling, _run_orthogonal):
            raise ValueError(
                f"{type(block).__name__} runs FrEIA's {type(inner).__name__} itself, but {correction.wrong} unless "
                "this package runs it; make it a block of a SequenceINN or a GraphINN"
            )


def _shapes(module: Any) -> list[tuple[int, ...]]:
    """The shapes of its one input and of its one output."""
    from FrEIA.framework import GraphINN, SequenceINN
    from FrEIA.modules import HaarDownsampling, HaarUpsampling, IRevNetDownsampling, IRevNetUpsampling

    if isinstance(module, SequenceINN):
        return [module.shapes[0], module.shapes[-1]]
    dims_in: Any = module.dims_in
    if isinstance(dims_in[0], int):  # ActNorm overwrites the list of shapes by its one shape
        dims_in = [dims_in]
    upsampling: Any = {HaarUpsampling: HaarDownsampling, IRevNetUpsampling: IRevNetDownsampling}
    for up, down in upsampling.items():
        if isinstance(module, up):  # these keep the shape of their output there
            dims_in = down.output_dims(module, dims_in)
    dims_out = module.global_out_shapes if isinstance(module, GraphINN) else module.output_dims(dims_in)
    if len(dims_in) != 1 or len(dims_out) != 1:
        raise ValueError(
            f"FrEIA's {type(module).__name__} has {len(dims_in)} inputs, {len(dims_out)} outputs; a transform has one"
        )
    return [tuple(dims_in[0]), tuple(dims_out[0])]


def _conditions(module: Any) -> dict[int, Any]:
    """The shape of every condition, by its place in the list that FrEIA takes."""
    from FrEIA.framework import SequenceINN

    if isinstance(module, SequenceINN):
        blocks: Any = module.module_list
        keyed = zip(module.conditions, blocks, strict=True)
        return dict(sorted((key, tuple(block.dims_c[0])) for key, block in keyed if key is not None))
    return {key: tuple(shape) for key, shape in enumerate(module.dims_c)}
