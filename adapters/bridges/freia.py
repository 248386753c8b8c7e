"""FrEIA: its invertible networks and blocks in, any transform out.

FrEIA runs data → noise as nflows does, and noise → data if it is called with ``rev=True``. It has no class for a
density. Its networks are trained with the loss z²/2 − log|det J|, which is that of a standard normal base: so a whole
network becomes a flow with that base.

FrEIA calls a context a condition, and a network may have several. They are flattened and laid side by side in one row
of our context.
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
# A function that runs a block. It takes the block, its inputs, its conditions by their keys, and whether the block runs
# in reverse (noise → data). It returns the block's outputs and its log-determinant.
Run = Callable[[Any, Values, dict[int, Tensor], bool], tuple[Values, Tensor | float]]


class FreiaTransform(Transform):
    """A ``SequenceINN``, ``GraphINN`` or single block of FrEIA: ``(batch, *event_shape)`` ↦ ``(batch, *noise_shape)``.

    The blocks of a network are run one by one, because some of FrEIA's blocks compute something wrong when they run
    themselves: see ``_corrections``.

    An ``ActNorm`` that is not initialised yet takes its scale and shift from the first data that it meets in training.
    In FrEIA it takes them from its first call, even if that is a call with noise or in evaluation mode.

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
        self.keeps_shape = self.event_shape == self.noise_shape
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
        if inputs.shape[0] == 0:  # several blocks look at their first row to count its coordinates
            return inputs.new_zeros(0, *shape), inputs.new_zeros(0)
        (outputs,), log_det = self._run(self.module, (inputs,), self._split(context), rev)
        return outputs, log_det

    def _split(self, context: Tensor | None) -> dict[int, Tensor]:
        """The conditions that lie side by side in a context, by their keys, each in its own shape."""
        if context is None:
            return {}
        parts = context.split([math.prod(shape) for shape in self.conditions.values()], dim=1)
        keyed = zip(self.conditions.items(), parts, strict=True)
        return {key: part.unflatten(1, shape) for (key, shape), part in keyed}

    def _run(self, module: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor]:
        """Run a block, or all blocks of a network: the outputs, and the log-determinant ``(batch,)``."""
        run = self.ways.get(type(module))
        if run is not None:
            outputs, log_det = run(module, values, conditions, rev)
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
        """The same for a ``GraphINN``, whose nodes are listed so that each one comes after those that feed it."""
        total = values[0].new_zeros(len(values[0]))
        starts, ends = (graph.out_nodes, graph.in_nodes) if rev else (graph.in_nodes, graph.out_nodes)
        known = dict(zip(((node, 0) for node in starts), values, strict=True))  # (node, which of its outputs) → value
        known.update(zip(((node, 0) for node in graph.condition_nodes), conditions.values(), strict=True))
        for node in reversed(graph.node_list) if rev else graph.node_list:
            if node.module is None:  # a start, an end or a condition
                continue
            inputs = tuple(known[place] for place in (node.outputs if rev else node.inputs))
            own_conditions = {key: known[condition, 0] for key, condition in enumerate(node.conditions)}
            outputs, log_det = self._run(node.module, inputs, own_conditions, rev)
            known.update(((node, index), output) for index, output in enumerate(outputs))
            total = total + log_det
        return tuple(known[(end.outputs if rev else end.inputs)[0]] for end in ends), total


def _keep_what_was_loaded(transform: Any, _) -> None:
    """After a ``load_state_dict``, let no ``ActNorm`` initialise itself any more: it would overwrite what was loaded.

    FrEIA registers a hook for this, too, but in a copied module FrEIA's hook still refers to the original.
    """
    for block in transform.modules():
        if hasattr(block, "init_on_next_batch"):
            block.init_on_next_batch = False


def _is_network(kind: type) -> bool:
    """Whether a module of this class only runs its blocks: it has the ``forward`` of one of FrEIA's networks."""
    return kind.forward.__module__.startswith("FrEIA.framework.")


class Correction(NamedTuple):
    """How the blocks of one class are run here, and what would be wrong if they ran themselves.

    Attributes:
        kind: the class.
        wrong: what the class does wrong, in words for an error.
        run: runs a block of the class rightly; ``None`` if nothing can, so that no flow can have one.
    """

    kind: type
    wrong: str
    run: Run | None


@cache
def _corrections() -> list[Correction]:
    from FrEIA import modules

    one_way = "it is invertible only once trained to be, and has no log-determinant"
    estimate = "its log-determinant is a random estimate and its inverse an approximation"
    sigmoid = "it sums the log-determinant of an image over the channels alone, and overflows far from 0"
    scaling = "it gives the inverse the log-determinant of the other direction"
    orthogonal = "it takes its matrix for orthogonal, which training makes it only once in many steps"
    return [
        Correction(modules.ActNorm, "it initialises itself from noise and in eval mode, too", _run_guarded),
        Correction(modules.HaarDownsampling, "it overwrites its input", _run_guarded),
        Correction(modules.AllInOneBlock, "it keeps a matrix of its last call, with its graph", _run_all_in_one),
        Correction(modules.InvertibleSigmoid, sigmoid, _run_sigmoid),
        Correction(modules.LearnedElementwiseScaling, scaling, _run_scaling),
        Correction(modules.OrthogonalTransform, orthogonal, _run_orthogonal),
        Correction(modules.IResNetLayer, estimate, None),
        Correction(modules.InvAutoFC, one_way, None),
        Correction(modules.InvAutoConv2D, one_way, None),
        Correction(modules.GaussianMixtureModel, "it maps to several components at once", None),
    ]


def _correction(block: nn.Module) -> Correction | None:
    return next((correction for correction in _corrections() if isinstance(block, correction.kind)), None)


def _ways_to_run(module: nn.Module) -> dict[type, Run]:
    """How the blocks of each class in a network are run: by FrEIA's own call, or by a correction of it."""
    from FrEIA.modules import InvertibleModule

    ways = {}
    for block in module.modules():
        kind = type(block)
        if isinstance(block, InvertibleModule) and not _is_network(kind):
            correction = _correction(block)
            own = _run_itself if kind.forward.__module__.startswith("FrEIA.") else _run_guarded
            ways[kind] = (correction and correction.run) or own
    return ways


def _run_itself(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor | float]:
    """Run the block by FrEIA's own call."""
    if conditions:
        keyed = hasattr(block, "conditions")  # a sequence that has a forward of its own
        outputs, log_det = block(values, c=conditions if keyed else list(conditions.values()), rev=rev)
    else:
        outputs, log_det = block(values, rev=rev)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return outputs, log_det.reshape(-1) if isinstance(log_det, Tensor) else log_det


def _run_guarded(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool) -> tuple[Values, Tensor | float]:
    """Run a copy of the block on copies of the inputs.

    The block may overwrite its inputs. It may also contain an ``ActNorm``, which would initialise itself in this call.
    """
    if any(getattr(part, "init_on_next_batch", False) and (rev or not part.training) for part in block.modules()):
        block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        for part in block.modules():
            part.init_on_next_batch = False
    elif any(getattr(part, "init_on_next_batch", False) for part in block.modules()):
        check_enough_rows(values[0], f"FrEIA's {type(block).__name__}")
    return _run_itself(block, tuple(value.clone() for value in values), conditions, rev)


def _run_all_in_one(block: Any, values: Values, conditions: dict[int, Tensor], rev: bool):
    if block.householder:  # it stores the matrix of this call as an attribute, which other threads and copies would see
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
    if not rev:  # in training the block is called as a module: its hook makes the matrix orthogonal now and then
        return (block if block.training else block.forward)(values)[0], log_det
    shifted = values[0] * (-log_scale).exp() - block.bias
    return (torch.linalg.solve(block.weights, shifted, left=False),), -log_det


def transform_in(foreign) -> Transform | None:
    """Any ``InvertibleModule``, which is a network or a block. For an exported transform, the one that was exported."""
    from FrEIA.modules import InvertibleModule

    if isinstance(foreign, _exported()):
        return foreign.transform
    return FreiaTransform(foreign) if isinstance(foreign, InvertibleModule) else None


def flow_in(foreign) -> Flow | None:
    """A ``SequenceINN`` or ``GraphINN``, with the standard normal that FrEIA trains it against."""
    from FrEIA.framework import GraphINN, SequenceINN

    if not isinstance(foreign, SequenceINN | GraphINN):
        return None
    transform = FreiaTransform(foreign)
    base = StandardNormal(transform.noise_shape).to(like(foreign))
    return Flow(transform, base, transform.event_shape, transform.context_features)


def transform_out(transform: Transform, library: str, event_dim: Any, conditional: bool) -> nn.Module:
    """An ``InvertibleModule``: ``sequence.append(exported.placed)`` and ``Node(…, exported.placed, {})`` add it."""
    return _exported()(transform)


def native_log_prob(exported: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density that belongs to FrEIA's loss of a ``SequenceINN`` with the exported module in it."""
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
            self.known: dict[tuple[int, ...], tuple[int, ...]] = {}  # the shape of the outputs for one of the inputs

        def placed(self, dims_in, dims_c=None) -> "NflowsModule":
            """This module, told the shapes of its inputs. FrEIA's networks call it as they would a constructor."""
            self.dims_in, self.dims_c = list(dims_in), list(dims_c or [])
            return self

        def forward(self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True):
            context = torch.cat([part.flatten(1) for part in c], dim=1) if c else None
            outputs, log_det = (self.transform.inverse if rev else self.transform)(x_or_z[0], context)
            return (outputs,), log_det

        def output_dims(self, input_dims: Any) -> Any:
            """The shape of the outputs. No nflows transform says it, so a copy is run on zeros, once."""
            shape = tuple(input_dims[0])
            if shape not in self.known:
                transform = copy.deepcopy(self.transform).eval()
                weight = like(transform)
                context = weight.new_zeros(1, sum(map(math.prod, self.dims_c))) if self.dims_c else None
                with torch.no_grad():
                    self.known[shape] = tuple(transform(weight.new_zeros(1, *shape), context)[0].shape[1:])
            return [self.known[shape]]

    return NflowsModule


def _check_exact(module: nn.Module) -> None:
    """Raise a ValueError for a block that is no bijection or has no exact log-determinant.

    A block may also call another block by itself, as no network of FrEIA's does. Then the correction of that block
    would not be used.
    """
    from FrEIA.modules import HouseholderPerm, InvertibleModule

    for block in module.modules():
        correction = _correction(block)
        if correction and correction.run is None:
            raise ValueError(f"FrEIA's {correction.kind.__name__} is no layer of a flow: {correction.wrong}")
        if isinstance(block, HouseholderPerm) and block.conditional:
            raise ValueError("FrEIA's HouseholderPerm with a condition fails in FrEIA itself; without one it works")
        if not isinstance(block, InvertibleModule) or _is_network(type(block)):
            continue
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
    if isinstance(dims_in[0], int):  # ActNorm replaces its list of one shape by that shape
        dims_in = [dims_in]
    upsampling: Any = {HaarUpsampling: HaarDownsampling, IRevNetUpsampling: IRevNetDownsampling}
    for up, down in upsampling.items():
        if isinstance(module, up):  # in dims_in these have the shape of their output
            dims_in = down.output_dims(module, dims_in)
    dims_out = module.global_out_shapes if isinstance(module, GraphINN) else module.output_dims(dims_in)
    if len(dims_in) != 1 or len(dims_out) != 1:
        raise ValueError(
            f"FrEIA's {type(module).__name__} has {len(dims_in)} inputs, {len(dims_out)} outputs; a transform has one"
        )
    return [tuple(dims_in[0]), tuple(dims_out[0])]


def _conditions(module: Any) -> dict[int, Any]:
    """The shape of every condition by its key, which is its place in the list of conditions that FrEIA takes."""
    from FrEIA.framework import SequenceINN

    if isinstance(module, SequenceINN):
        blocks: Any = module.module_list
        keyed = zip(module.conditions, blocks, strict=True)
        return dict(sorted((key, tuple(block.dims_c[0])) for key, block in keyed if key is not None))
    return {key: tuple(shape) for key, shape in enumerate(module.dims_c)}
