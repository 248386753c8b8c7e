"""The layers of normflows that no flow can use, and those that are wrong unless they are run in another way.

A way to run a layer is a function of the layer, its input, a tuple that holds the context if the layer reads one, and
whether to run its ``inverse`` (data → noise) or its ``forward`` (noise → data). ``CORRECTIONS`` is the table of them.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nflows.transforms.base import InputOutsideDomain
from normflows import flows, transforms
from normflows.flows.neural_spline.autoregressive import Autoregressive, MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import (
    Coupling,
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from torch import Tensor, nn

from adapters.finite import with_finite_rows

Way = Callable[[Any, Tensor, tuple[Tensor | None, ...], bool], tuple[Tensor, Any]]

_SPLINES = (
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
_RANDOM_WALK = "is a random walk, not a bijection: it has no density of its own"
REFUSED = {
    flows.Residual: (  # with exact_trace too: the series is cut at a random term
        "cannot score data: its log-determinant is a random estimate, in eval mode too (exact for 2 features only), "
        "and its inverse stops at an error of 3e-3"
    ),
    flows.BatchNorm: "normalises by the batch at hand, in eval mode too: no datum has a density",
    flows.MetropolisHastings: _RANDOM_WALK,
    flows.HamiltonianMonteCarlo: _RANDOM_WALK,
}


class Correction(NamedTuple):
    """One row of the table of corrections.

    Attributes:
        concerns: whether a layer is one of these.
        fault: what is wrong with it when normflows runs it, as the end of a sentence "the layer …".
        run: how it is run here.
    """

    concerns: Callable[[nn.Module], bool]
    fault: str
    run: Way


def check_usable(layer: nn.Module) -> None:
    """Raise a ValueError for a layer that is no exact bijection, or that itself runs a layer that needs correcting."""
    for part in layer.modules():
        for kind, reason in REFUSED.items():
            if isinstance(part, kind):
                raise ValueError(f"{type(part).__name__} {reason}")
    if way_to_run(layer) not in (run_plainly, run_on_copy):
        return
    for part in layer.modules():
        correction = _correction_of(part) if isinstance(part, flows.Flow) else None
        if correction is not None and correction.run is not run_on_copy:
            raise ValueError(
                f"{type(layer).__name__} runs normflows' {type(part).__name__} itself, which is wrong unless this "
                f"package runs it, since it {correction.fault}; give the two as layers of a Composite"
            )


def way_to_run(layer: nn.Module) -> Way:
    """How a layer is run: by its own methods, or as the table says."""
    correction = _correction_of(layer)
    return run_plainly if correction is None else correction.run


def _correction_of(layer: nn.Module) -> Correction | None:
    return next((correction for correction in CORRECTIONS if correction.concerns(layer)), None)


def run_plainly(layer: Any, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Any]:
    """By the layer's own method."""
    return (layer.inverse if inverse else layer)(x, *context)


def run_on_copy(layer: Any, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Any]:
    """On a copy of the input, which the layer may overwrite."""
    return run_plainly(layer, x.clone(), context, inverse)


def run_within_bound(layer: Any, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Any]:
    """A periodic layer, with an error for noise beyond its bound. Data on a circle may be any representative."""
    if not inverse and (x[..., layer.ind].abs() > layer.bound * (1 + 1e-4)).any():  # the rest may be rounding
        raise InputOutsideDomain(
            f"{type(layer).__name__} takes noise within ±{layer.bound}, not {x[..., layer.ind].abs().max():g}: give "
            "its coordinates a base on that interval, such as normflows' UniformGaussian"
        )
    return run_plainly(layer, x, context, inverse)


def run_on_unit_interval(layer: Any, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Any]:
    """A spline without tails, with an error for what lies outside [0, 1]."""
    bounded = x
    couplings: list[Any] = [part for part in layer.modules() if isinstance(part, Coupling)]
    for coupling in couplings:
        if coupling.unconditional_transform is None:  # else each coordinate goes through a spline
            bounded = x[:, coupling.transform_features]
    if not ((bounded >= 0) & (bounded <= 1)).all():
        raise InputOutsideDomain(
            f"{type(layer).__name__} with tails=None maps [0, 1] to itself, but got values from {bounded.min():g} to "
            f"{bounded.max():g}; tails='linear' takes any"
        )
    return run_plainly(layer, x, context, inverse)


def run_as_identity_beyond(layer: Any, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Any]:
    """A circular spline, as the identity beyond its bound, which splines with any other tails are.

    Networks read the outputs of earlier coordinates, and so these have to be put right within the layer.
    """
    if hasattr(layer, "prqct") or hasattr(layer, "mprqat"):  # the public classes run these backwards
        return run_as_identity_beyond(getattr(layer, "prqct", None) or layer.mprqat, x, context, not inverse)
    if isinstance(layer, PiecewiseRationalQuadraticCDF):
        y, log_det = run_plainly(layer, x, (), inverse)
        return _within(layer, x, y), log_det
    (context_or_none,) = context or (None,)
    run = _run_autoregressive if isinstance(layer, Autoregressive) else _run_coupling
    return run(layer, x, context_or_none, inverse)


def _run_autoregressive(layer: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Any]:
    if not inverse:
        y, log_det = layer(x, context)
        return _within(layer, x, y), log_det
    y, log_det = torch.zeros_like(x), None
    for _ in range(x.shape[1]):
        parameters = layer.autoregressive_net(y, context)
        y, log_det = layer._elementwise_inverse(x, parameters)
        y = _within(layer, x, y)
    return y, log_det


def _run_coupling(layer: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Any]:
    own, moved, own_log_det = x[:, layer.identity_features], x[:, layer.transform_features], 0.0
    through = own
    if layer.unconditional_transform is not None:
        through, own_log_det = run_as_identity_beyond(layer.unconditional_transform, own, (), inverse)
    parameters = layer.transform_net(through if inverse else own, context)
    y, log_det = layer._coupling_transform(moved, parameters, inverse)
    outputs = torch.empty_like(x)
    outputs[:, layer.identity_features] = through
    outputs[:, layer.transform_features] = _within(layer, moved, y)
    return outputs, own_log_det + log_det


def _within(spline: Any, x: Tensor, y: Tensor) -> Tensor:
    """y where x lies within the spline's bound, and x elsewhere."""
    return torch.where(x.abs() <= spline.tail_bound, y, x)


def run_in_float64(run: Way, layer: nn.Module, x: Tensor, context: tuple, inverse: bool) -> tuple[Tensor, Tensor]:
    """A layer, run the way it is run, but in float64 on the CPU; rows that are not finite give NaN.

    This is for a spline that has asserted that a discriminant is not negative, which rounding or a NaN has made it.
    """

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)

    tensors = (*layer.parameters(), *layer.buffers())
    layer = copy.deepcopy(layer, {id(tensor): widened(tensor) for tensor in tensors})  # with a graph to the parameters

    def in_float64(x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given = tuple(own if own is None else widened(own) for _ in context)
        y, log_det = run(layer, widened(x), given, inverse)
        return y.to(x), log_det.to(x)

    return with_finite_rows(in_float64, x, *context)


def _is_somebody_elses(layer: nn.Module) -> bool:
    return not type(layer).forward.__module__.startswith("normflows.")


def _tails_of(layer: nn.Module) -> list:
    """The ``tails`` of the splines in a layer: "linear" or "circular", ``None``, or a list of one for each feature."""
    return [part.tails for part in layer.modules() if isinstance(part, _SPLINES)]


CORRECTIONS = (  # the first row that concerns a layer counts
    Correction(
        _is_somebody_elses,
        "may overwrite its input, since it is a class of somebody else's that nobody has checked",
        run_on_copy,
    ),
    Correction(
        lambda layer: isinstance(layer, transforms.Shift),
        "overwrites its input",
        run_on_copy,
    ),
    Correction(
        lambda layer: isinstance(layer, flows.PeriodicWrap | flows.PeriodicShift),
        "takes noise beyond its bound, where it is not one to one",
        run_within_bound,
    ),
    Correction(
        lambda layer: None in _tails_of(layer),
        "reads beyond its knots outside [0, 1]",
        run_on_unit_interval,
    ),
    Correction(
        lambda layer: any(isinstance(tails, list | tuple) for tails in _tails_of(layer)),
        "maps what lies beyond its bound to 0, with log-determinant 0",
        run_as_identity_beyond,
    ),
)
