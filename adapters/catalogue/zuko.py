"""zuko's layers in the catalogue: couplings and autoregressive layers with affine, spline and other transforms.

zuko runs data → noise and lists the layer at the data side first, both as nflows does.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adapters.catalogue.specification import NativeFlow, Specification
from adapters.checks import check_positive
from adapters.imports import import_zuko
from adapters.networks import ACTIVATIONS


class Bracket(nn.Module):
    """Sets the interval in which a ``MonotonicTransform`` searches for its inverse, and the error of the search.

    ``Sequential(MNN(…), Bracket(…))`` is a univariate transform of zuko's. Its ``MNN`` alone has the fixed values 10
    and 1e-6.

    Args:
        bound: the search is in [−bound, bound].
        eps: the largest error of the result.
    """

    def __init__(self, bound: float, eps: float):
        super().__init__()
        check_positive(bound=bound, eps=eps)
        self.bound, self.eps = bound, eps

    def forward(self, transform):
        transform.bound, transform.eps = self.bound, self.eps
        return transform


def realnvp(specification: Specification) -> nn.Module:
    """``GeneralCouplingTransform`` with ``MonotonicAffineTransform``: its scale, data → noise, is in (0.001, 1000).

    The scale is e^s with s soft-clipped. The networks have our widths, but zuko's initial weights, so that the flow
    does not start at the identity.
    """
    return _couplings(specification)


def nsf(specification: Specification, bins: int = 8, tail_bound: float = 4.0, minimum: float = 1e-3) -> nn.Module:
    """``GeneralCouplingTransform`` with ``MonotonicRQSTransform``: the splines of ``zuko.flows.NSF`` in couplings.

    ``zuko.flows.NSF`` itself is autoregressive, with a tail bound of 5. Outside [−tail_bound, tail_bound] the splines
    are the identity. The slopes at the knots and the ratios of bin sizes are in (minimum, 1/minimum).
    """
    check_positive(tail_bound=tail_bound, minimum=minimum)
    transforms = import_zuko().transforms
    return _couplings(
        specification,
        univariate=partial(transforms.MonotonicRQSTransform, bound=tail_bound, slope=minimum),
        shapes=[(bins,), (bins,), (bins - 1,)],
    )


def maf(specification: Specification) -> nn.Module:
    """The layers of ``zuko.flows.MAF``, whose log_prob is fast. They have no masks to choose.

    The layers take the coordinates in ascending and in descending order by turns. The scale, data → noise, is in
    (0.001, 1000), as in ``realnvp``.
    """
    return _autoregressive(specification)


def bpf(specification: Specification, degree: int = 16, tail_bound: float = 4.0, eps: float = 1e-9) -> nn.Module:
    """The layers of ``zuko.flows.BPF``, ``BoundedBernsteinTransform``, autoregressive as in ``maf``.

    Outside [−tail_bound, tail_bound] (zuko: 5) the transform is a shift by 2·tail_bound·eps, by which the polynomial
    jumps at its ends, too. ``eps`` is also the error of the inverse, a bisection. At zuko's 1e-6, the log_prob that
    comes with the samples of a few layers is visibly not that of the samples; here it is 1e-9.
    """
    check_positive(tail_bound=tail_bound, eps=eps)
    transforms = import_zuko().transforms
    univariate = partial(transforms.BoundedBernsteinTransform, bound=tail_bound, eps=eps)
    return _autoregressive(specification, lambda: univariate, shapes=[(degree + 1,)])


def naf(specification: Specification, signal: int = 16, bound: float = 1e6, eps: float = 1e-9) -> nn.Module:
    """The layers of ``zuko.flows.NAF``, ``MNN``, autoregressive as in ``maf``, without its clips between the layers.

    ``zuko.flows.NAF`` soft-clips to (−11, 11) between layers. Its last layer then maps onto an interval only. No data
    correspond to noise beyond that interval, and the density integrates to less than 1. Without the clips the density
    is exactly normalised, but the data may lie anywhere. So the inverse, a bisection, starts from [−bound, bound]
    (zuko: 10), and has an error of at most eps (zuko: 1e-6).

    The hidden widths are those of the conditioners and of the monotonic networks, whose activation is zuko's. The
    monotonic networks are scaled so that they start at a mean slope of 1 around 0. zuko's own start at about 0.1, so
    that eight layers would have a slope of 1e-8.
    """
    return _autoregressive(
        specification, lambda: _monotonic_network(specification, signal, bound, eps), shapes=[(signal,)]
    )


def _monotonic_network(specification: Specification, signal: int, bound: float, eps: float) -> nn.Module:
    hidden, features = specification.hidden_features, specification.features
    network = import_zuko().flows.neural.MNN(signal=signal, stack=features, hidden_features=hidden)
    with torch.no_grad():
        ends = [network.f(torch.zeros(features, signal), torch.full((features,), x)) for x in (-1.0, 1.0)]
        last, slope = network.network[-1], (ends[1] - ends[0]) / 2
        last.weight /= slope[:, None, None]
        last.bias.sub_((ends[0] + ends[1])[:, None] / 2).div_(slope[:, None])
    return nn.Sequential(network, Bracket(bound, eps))


def _couplings(specification: Specification, **options) -> nn.Module:
    """Coupling layers under the specification's masks, with the data side first, as zuko lists layers."""
    zuko = import_zuko()
    return zuko.lazy.LazyComposedTransform(
        *(
            zuko.flows.GeneralCouplingTransform(mask=mask, **_common(specification), **options)
            for mask in reversed(specification.coupling_masks)
        )
    )


def _autoregressive(specification: Specification, univariate: Callable | None = None, **options) -> nn.Module:
    """Autoregressive layers, in ascending and descending order by turns.

    ``univariate``, if given, makes the univariate transform of one layer.
    """
    zuko = import_zuko()
    order = torch.arange(specification.features)
    layers = []
    for i in range(specification.layers):
        own = {} if univariate is None else {"univariate": univariate()}
        layers.append(
            zuko.flows.MaskedAutoregressiveTransform(
                order=order.flip(0) if i % 2 else order, **_common(specification), **own, **options
            )
        )
    return zuko.lazy.LazyComposedTransform(*layers)


def _common(specification: Specification) -> dict:
    """The specification as keyword arguments of zuko's layers."""
    return {
        "features": specification.features,
        "context": specification.context_features or 0,
        "hidden_features": specification.hidden_features,
        "activation": ACTIVATIONS[specification.activation],
    }


FLOWS = {"zuko-realnvp": realnvp, "zuko-nsf": nsf, "zuko-maf": maf, "zuko-bpf": bpf, "zuko-naf": naf}


def native_realnvp(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    flow = import_zuko().flows.RealNVP(features, transforms=len(masks), hidden_features=hidden_features)
    return NativeFlow(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), list(flow.parameters()))


NATIVE_FLOWS = {"zuko RealNVP": native_realnvp}
