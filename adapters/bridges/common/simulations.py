"""What sbi trains a flow on, simulations, and whether a flow fits them: what can't be right is refused before training.

A flow's context is the condition once it is embedded, by a network which may standardise it first.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from nflows.flows import Flow as NflowsFlow
from nflows.transforms.base import InputOutsideDomain
from torch import Tensor, nn

from adapters.checks import check_tensor
from adapters.flow import Flow
from adapters.parts import event_shape_of

ROLES = {"theta": "the prior's parameters", "x": "the simulations"}
TRAINERS = "use NPE, NLE or MarginalTrainer"  # those of sbi that take a flow
UNCONDITIONAL = "this flow is unconditional: it would ignore what NPE and NLE condition on"


def check_simulations(data: Mapping[str, Tensor], of: str, z_scores: Mapping[str, str | None]) -> None:
    """Raise an error unless a density can be trained on these simulations, and standardised by them.

    NaN in the simulations that a density is conditioned on may stand for something that was not observed.

    Args:
        data: ``theta`` and ``x``, or ``x`` alone, each ``(batch, *event)``.
        of: which one the density is of.
        z_scores: how each of the two is standardised: ``"independent"``, ``"structured"``, or not.

    Raises:
        TypeError: for what is no tensor; for integers; for two tensors of different dtypes.
        ValueError: for another shape; for numbers of rows that differ; for values that are not finite; for fewer rows
            or numbers than a standard deviation takes.
    """
    for name, values in data.items():
        check_tensor(values, name)
        if not values.is_floating_point():
            raise TypeError(f"{name} is of {values.dtype}, but sbi takes floating-point numbers: give {name}.float()")
        if values.dim() < 2 or not values.numel():
            remedy = f"; give {name}.unsqueeze(1)" if values.dim() == 1 else ""
            raise ValueError(f"{name} must have the shape (batch, numbers), not {tuple(values.shape)}{remedy}")
        finite = int(values.flatten(1).isfinite().all(1).sum())
        if finite < len(values) and name in (of, "theta"):
            raise ValueError(
                f"{name} has NaN or infinite values in {len(values) - finite} of {len(values)} rows: leave them out"
            )
        if z_scores[name] not in (None, "none"):
            if finite < 2:
                raise ValueError(
                    f"{name} can't be standardised by {finite} finite row{'s' * (finite != 1)}, two are the least (sbi "
                    f"keeps a part of them for validation): simulate more, or give z_score_{name}='none'"
                )
            if z_scores[name] == "structured" and values.shape[1] < 2:
                raise ValueError(
                    f"z_score_{name}='structured' takes the standard deviation along a row's first dimension, which "
                    f"has only one number in the shape {tuple(values.shape[1:])}: give 'independent'"
                )
    if len({len(values) for values in data.values()}) > 1:
        raise ValueError(f"theta has {len(data['theta'])} rows, but x has {len(data['x'])}: give one x for each theta")
    if len({values.dtype for values in data.values()}) > 1:
        raise TypeError(f"theta is of {data['theta'].dtype}, but x of {data['x'].dtype}: give both as torch.float32")


class Pairs(NamedTuple):
    """Simulations, each a row of both tensors, by their roles in a density of ``of``, which is ``theta`` or ``x``."""

    of: str
    inputs: Tensor
    conditions: Tensor

    def hold(self, input: Tensor, condition: Tensor) -> bool:
        """Whether these two, each one row, are the input and the condition of one simulation."""
        same = (self.inputs == input.to(self.inputs)) & (self.conditions == condition.to(self.conditions))
        return bool(same.flatten(1).all(1).any())


def check_not_swapped(made_of: Pairs, inputs: Tensor, conditions: Tensor) -> None:
    """Raise a ValueError if training takes for the condition what the density is to be of, and the reverse.

    The first pair tells: it is one of the simulations that the estimator was made of, but only the other way round.

    Args:
        made_of: these simulations, whose inputs and conditions are of one shape.
        inputs, conditions: a batch that it is trained on, each ``(*batch, *event)``.
    """
    first, second = (values.reshape(-1, *made_of.inputs.shape[1:])[:1] for values in (inputs, conditions))
    if made_of.hold(second, first) and not made_of.hold(first, second):
        is_of, given = ("p(θ | x)", "x given θ") if made_of.of == "theta" else ("p(x | θ)", "θ given x")
        remedy = "'likelihood' for NLE" if made_of.of == "theta" else "'posterior', the default, for NPE"
        raise ValueError(f"this estimator is of {is_of}, but is trained on {given}: give estimates={remedy}")


@torch.no_grad()
def embedded(embedding_net: nn.Module, conditions: Tensor) -> Tensor:
    """The first two conditions embedded. A copy is tried, since a network may keep statistics of what it is given.

    So is one alone, as an observation is later: a network that squeezes its output would fail only then.

    Raises:
        ValueError: if the network does not take them, or gives no row for each.
    """
    tried = copy.deepcopy(embedding_net).eval()
    two, _ = [_rows_of(tried, rows) for rows in (conditions[:2], conditions[:1])]
    return two


def _rows_of(embedding_net: nn.Module, conditions: Tensor) -> Tensor:
    try:
        found = embedding_net(conditions)
    except RuntimeError as error:
        shape = tuple(conditions.shape[1:])
        raise ValueError(f"the embedding network can't be given conditions of shape {shape} ({error})") from error
    if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != len(conditions):
        given = tuple(conditions.shape)
        returned = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the embedding network must return (batch, numbers), but of {given} it returned {returned}")
    return found


def check_widths(flow: NflowsFlow, of: str, shape: torch.Size, width: int | None) -> None:
    """Raise a ValueError if the flow is known to be of data of another shape, or to take another context.

    Args:
        flow: of any library.
        of: what the density is of, ``"theta"`` or ``"x"``.
        shape: of one row of it.
        width: of the context; ``None`` for ``MarginalTrainer``, which has none.
    """
    known = event_shape_of(flow)
    if known is not None and known != shape:
        remedy = f"build it with features={shape.numel()}" if len(shape) == 1 else "build a flow of data of that shape"
        if len(shape) > 1 and known == (shape.numel(),):
            remedy = f"give {of}.flatten(1)"
        raise ValueError(
            f"{ROLES[of]} have the shape {tuple(shape)}, but the flow is of data of shape {tuple(known)}: {remedy}"
        )
    takes = getattr(flow, "context_features", ...)
    if takes is ... or takes == width:
        return
    if takes is None:
        raise ValueError(f"{UNCONDITIONAL}; build it with context_features={width}")
    if width is None:
        raise ValueError(
            f"this flow is conditional, of a context of {takes} numbers, and MarginalTrainer conditions on nothing"
        )
    raise ValueError(
        f"this flow takes a context of {takes} numbers, but the condition has {width}, once embedded: build the flow "
        f"with context_features={width}, or give an embedding_net that returns {takes}"
    )


@torch.enable_grad()
def check_reads_context(flow: Flow, of: str, inputs: Tensor, context: Tensor) -> None:
    """Raise a ValueError unless the flow takes the data, and its density depends on the context.

    That it depends is what autograd sees. A copy is asked, since a layer may take its first batch to initialise itself.

    Args:
        flow: the flow.
        of: what the density is of, ``"theta"`` or ``"x"``.
        inputs, context: some rows of its data and of its context.
    """
    flow, context = copy.deepcopy(flow).eval(), context.detach().nan_to_num().requires_grad_()
    shape, width = tuple(inputs.shape[1:]), context.shape[1]
    remedy = f"build its layers with a context of {width} numbers"
    try:
        log_prob = flow.log_prob(inputs, context)
    except InputOutsideDomain as error:
        raise ValueError(
            f"{ROLES[of]} lie outside the domain of a layer of this flow, such as [0, 1] of a logit: put a layer that "
            f"maps them there before it, or give z_score_{of}='none' if they lie there until they are standardised"
        ) from error
    except Exception as error:
        try:
            flow.transform(inputs)
        except Exception:
            cure = "build its layers for both"
            if "is unconditional" in str(error):  # the error of a layer beside others, which do take a context
                cure = (
                    "join that layer to the others in its own library before as_flow, or wrap it in a Transform that "
                    "does not hand it the context"
                )
            raise ValueError(
                f"this flow does not take data of shape {shape} with a context of {width} numbers ({error}): {cure}"
            ) from error
        raise ValueError(f"{UNCONDITIONAL}; {remedy}") from error
    if not log_prob.requires_grad or torch.autograd.grad(log_prob.sum(), context, allow_unused=True)[0] is None:
        raise ValueError(f"{UNCONDITIONAL}; {remedy}")
