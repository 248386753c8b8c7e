"""sbi's estimators. It has no transforms of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from adapters.bridges.sbi import import_sbi, transform_in
from tests.examples import Model


def decode(exported, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """sbi has no call for it but its estimator's own flow, whose base it draws from itself."""
    transform = transform_in(exported)
    assert transform is not None
    return transform.inverse(noise, context)  # type: ignore[return-value]


def estimator(name: str, features: int, condition: tuple[int, ...], **options: Any) -> Any:
    """One of sbi's own, not trained, and standardised by simulations that are far from standard."""
    import_sbi()
    from sbi.neural_nets import posterior_nn

    theta, x = 2 + 3 * torch.randn(50, features), 5 * torch.randn(50, *condition) - 1
    return posterior_nn(name, hidden_features=8, num_transforms=2, **options)(theta, x)


def _marginal() -> Any:
    import_sbi()
    from sbi.neural_nets.factory import ZukoFlowType, marginal_nn

    return marginal_nn(ZukoFlowType.NSF, hidden_features=8, num_transforms=2)(2 + 3 * torch.randn(50, 3))


def _log_prob(native: Any, inputs: Tensor, context: Tensor | None) -> Tensor:
    return (native.log_prob(inputs) if context is None else native.log_prob(inputs, context)).reshape(-1)


def _model(name: str, width: int, **options: Any) -> Model:
    return Model(lambda: estimator(name, 3, (width,), **options), _log_prob, (3,), width)


MODELS = {
    "nsf": _model("nsf", 2),
    "maf": _model("maf", 2),
    "maf-embedded": Model(lambda: estimator("maf", 3, (4,), embedding_net=nn.Linear(4, 2)), _log_prob, (3,), 4),
    "zuko-nsf": _model("zuko_nsf", 2),
    "zuko-maf-embedded": Model(
        lambda: estimator("zuko_maf", 3, (4,), embedding_net=nn.Linear(4, 2)), _log_prob, (3,), 4
    ),
    "zuko-marginal": Model(_marginal, _log_prob, (3,)),
}
